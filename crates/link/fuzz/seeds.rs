//! Writes what the corpora of this package begin with.

use fuzzing::Seeds;

fn main() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "link_frames");
    let frame =
        |kind: u8, payload: &[u8]| [&(payload.len() as u32).to_be_bytes()[..], &[kind], payload].concat();
    let session =
        [frame(1, b"\x42\x00"), frame(2, b""), frame(1, &[7; 300]), frame(3, "no room\u{7}".as_bytes())];
    seeds.add("session", [&[3, 1, 7, 90][..], &session.concat()].concat());
    seeds.add("ping", [&[0][..], &frame(2, b"")].concat());
    seeds.add("too-long", [&[0][..], &[0, 0x10, 0, 1, 1, 0]].concat());
    seeds.add("longest", [&[1, 200][..], &[0, 0x10, 0, 0, 1], &[0x55; 2000]].concat());

    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "link_hello");
    let envelope = |body: &[u8]| [b"vmirror\x01", &(body.len() as u32).to_be_bytes()[..], body].concat();
    let agent = b"\x1a\x06host-a";
    seeds.add("control", envelope(&[&[8, 1, 16, 1][..], agent, &[0x22, 0]].concat()));
    let data = [&[0x0a, 16][..], &[0x11; 16], &[0x10, 3]].concat();
    seeds.add("data", envelope(&[&[8, 1, 16, 1][..], agent, &[0x2a, 20], &data].concat()));
    seeds.add("accepted", envelope(&[0x0a, 2, 8, 1]));
    seeds.add("no-version", envelope(&[0x12, 4, 8, 2, 16, 9]));
    seeds.add("refused", envelope(b"\x1a\x0d\x0a\x0bnot a peer\x07"));
}
