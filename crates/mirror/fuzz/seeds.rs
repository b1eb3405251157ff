//! Writes what the corpora of these targets begin with: a mirror's frames, and both sides of NBD as QEMU speaks it.

use fuzzing::Seeds;
use mirror::hash::{ContentHash, Secret};
use mirror::layout::{PAGE_SIZE, PageIndex};
use mirror::memory::codec::{self, Absent, Entry};
use mirror::memory::compress::Encoding;
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
    codec::encode_blocks(&mut out, entries, Encoding::Lz4, payload_encoded.len());
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
    codec::encode_sync(&mut sync);
    seeds.add("disks", of_both(0, &[&blocks(&[whole, some, check, zero], &payload), &sync, &barrier()]));
    let last = disks::Entry::Part { block: BlockIndex(3), offset: 90, length: 10, fingerprint: 7 };
    seeds.add("disk-end", of_both(0, &[&blocks(&[last], &[5; 10])]));
}

const GO: u32 = 7;
const OPTION: &[u8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [OPTION, &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(name: &str) -> Vec<u8> {
    let length = (name.len() as u32).to_be_bytes();
    option(GO, &[&length[..], name.as_bytes(), &1u16.to_be_bytes(), &3u16.to_be_bytes()].concat())
}

fn request(flags: u16, command: u16, offset: u64, length: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x2560_9513u32.to_be_bytes();
    let cookie = 0x0102_0304_0506_0708u64.to_be_bytes();
    let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
    [&magic[..], &flags, &command, &cookie, &offset.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn nbd_server() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "nbd_server");
    let flags = 3u32.to_be_bytes();
    let begin = [&flags[..], &go("disk")].concat();
    let requests = [
        request(0, 1, 512, 512, &[6; 512]),
        request(1, 6, 0, 4096, &[]),
        request(2, 6, 4096, 4096, &[]),
        request(0, 4, 0, 512, &[]),
        request(0, 3, 0, 0, &[]),
        request(0, 0, 0, 4096, &[]),
        request(0, 2, 0, 0, &[]),
    ];
    seeds.add("requests", [begin.clone(), requests.concat()].concat());
    seeds.add("beyond", [begin, request(0, 0, 8192, 512, &[]), request(0, 9, 0, 0, &[])].concat());
    let asked =
        [&flags[..], &option(3, &[]), &option(6, &go("disk")[16..]), &option(8, &[]), &option(2, &[])];
    seeds.add("asks", asked.concat());
    seeds.add("old", [&1u32.to_be_bytes()[..], &option(1, b"disk"), &request(0, 0, 0, 512, &[])].concat());
}

fn nbd_client() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "nbd_client");
    let reply = |kind: u32, data: &[u8]| {
        let (magic, option) = (OPTION_REPLY.to_be_bytes(), GO.to_be_bytes());
        [&magic[..], &option, &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let answer = |error: u32, cookie: u64, data: &[u8]| {
        [&0x6744_6698u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
    };
    let greeting = [&b"NBDMAGIC"[..], OPTION, &3u16.to_be_bytes()].concat();
    let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &0x6du16.to_be_bytes()].concat();
    let sizes = [&3u16.to_be_bytes()[..], &[512u32, 4096, 4096].map(u32::to_be_bytes).concat()].concat();
    let agreed = [greeting.clone(), reply(3, &export), reply(3, &sizes), reply(1, &[])].concat();
    let said = |operations: &[u8], parts: &[Vec<u8>]| {
        [&[operations.len() as u8][..], operations, &agreed, &parts.concat()].concat()
    };
    seeds.add("reads", said(&[0, 8], &[answer(0, 1, &[1; 1024]), answer(0, 2, &[2; 1024])]));
    seeds.add("writes", said(&[1, 2, 3, 4], &[1, 2, 3, 4].map(|cookie| answer(0, cookie, &[]))));
    seeds.add("fails", said(&[1, 4], &[answer(28, 1, &[]), answer(5, 2, &[])]));
    seeds.add("other-cookie", said(&[0], &[answer(0, 7, &[1; 1024])]));
    seeds.add("refuses", [&[0][..], &greeting, &reply((1 << 31) + 6, b"no such export")].concat());
    let all = [&[1, 0][..], &greeting, &reply(3, &export), &reply(1, &[]), &answer(0, 1, &[3; 2])];
    seeds.add("default-sizes", all.concat());
}

fn main() {
    copy_stream();
    nbd_server();
    nbd_client();
}
