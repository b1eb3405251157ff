//! Writes what the corpus of this target begins with: a mirror's frames.

use compression::Encoding;
use fuzzing::Seeds;
use mirror::hash::{ContentHash, Secret};
use mirror::layout::{PAGE_SIZE, PageIndex};
use mirror::memory::codec::{self, Absent, Entry};
use mirror::memory::delta;
use mirror::storage::codec as disks;
use mirror::storage::layout::BlockIndex;

/// The target's own.
fn secret() -> Secret {
    Secret::from([7; 192])
}

fn page(fill: u8) -> Vec<u8> {
    (0..PAGE_SIZE).map(|at| if at % 64 == 0 { fill } else { 0 }).collect()
}

fn hash(page: &[u8]) -> ContentHash {
    secret().hash(page)
}

fn frame(entries: &[Entry], encoding: Encoding, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec::encode_pages(&mut out, 1, entries, encoding, payload.len());
    [out, payload.to_vec()].concat()
}

fn plain(number: u64, content: &[u8]) -> Entry {
    Entry::Plain { page: PageIndex(number), hash: hash(content) }
}

fn barrier() -> Vec<u8> {
    let mut out = Vec::new();
    codec::encode_barrier(&mut out, 1);
    out
}

fn absent() -> Vec<u8> {
    let mut out = Vec::new();
    let chunk = |first, pages| Absent { first: PageIndex(first), pages };
    codec::encode_absent(
        &mut out,
        2,
        &[chunk(0, [0b1011, 0, 0, 0, 0, 0, 0, 0]), chunk(1024, [3, 0, 0, 0, 0, 0, 0, 0])],
    );
    out
}

fn blocks(entries: &[disks::Entry], payload: &[u8]) -> Vec<u8> {
    let payload_encoded = lz4_flex::block::compress(payload);
    let mut out = Vec::new();
    disks::encode_blocks(&mut out, entries, Encoding::Lz4, payload_encoded.len());
    [out, payload_encoded].concat()
}

fn copy_stream() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "copy_stream");
    let (one, two) = (page(1), page(2));
    let mut changed = one.clone();
    changed[100] = 9;
    let mut difference = Vec::new();
    let length = delta::encode(&one, &changed, &mut difference).expect("a small change");
    let length = u16::try_from(length).expect("a small change");
    let zero = Entry::Zero { page: PageIndex(4), count: 3 };
    let delta = Entry::Delta { page: PageIndex(0), hash: hash(&changed), length };
    let twin = Entry::Duplicate { page: PageIndex(5), hash: hash(&two) };
    let duplicate = frame(&[twin], Encoding::None, &1024u64.to_le_bytes());
    let pages = [plain(0, &one), plain(1024, &two), zero];
    let both = [&one[..], &two].concat();
    let lz4 = frame(&pages, Encoding::Lz4, &lz4_flex::block::compress(&both));
    let zstd = frame(&pages, Encoding::Zstd, &zstd::bulk::compress(&both, 1).expect("memory"));
    let of_both = |how: u8, parts: &[&[u8]]| [&[how][..], &parts.concat()].concat();
    let delta = frame(&[delta], Encoding::None, &difference);
    seeds.add("lz4", of_both(0, &[&lz4, &delta, &duplicate, &barrier()]));
    seeds.add("zstd", of_both(0, &[&zstd, &barrier(), &delta]));
    seeds.add("plain", of_both(1, &[&frame(&[plain(512, &one)], Encoding::None, &one), &barrier()]));
    seeds.add("wrong", of_both(0, &[&frame(&[plain(1, &two)], Encoding::None, &one), &barrier()]));
    seeds.add("absent", of_both(2, &[&lz4, &absent(), &barrier()]));

    let block = vec![3; 64 << 10];
    let mut part = block.clone();
    part[512..1024].fill(4);
    let whole =
        disks::Entry::Whole { block: BlockIndex(1), hash: secret().hash_block(&block), length: block.len() };
    let some =
        disks::Entry::Part { block: BlockIndex(1), offset: 512, length: 512, fingerprint: 0x1234_5678 };
    let check = disks::Entry::Check { block: BlockIndex(1), hash: secret().hash_block(&part) };
    let zero = disks::Entry::Zero { block: BlockIndex(0), count: 4 };
    let payload = [&block[..], &part[512..1024]].concat();
    let mut sync = Vec::new();
    disks::encode_sync(&mut sync);
    seeds.add("disks", of_both(0, &[&blocks(&[whole, some, check, zero], &payload), &sync, &barrier()]));
    let last = disks::Entry::Part { block: BlockIndex(3), offset: 90, length: 10, fingerprint: 7 };
    seeds.add("disk-end", of_both(0, &[&blocks(&[last], &[5; 10])]));
}

fn main() {
    copy_stream();
}
