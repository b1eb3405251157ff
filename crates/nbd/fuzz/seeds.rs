//! Writes what the corpora of these targets begin with: both sides of NBD as QEMU speaks it.

use fuzzing::Seeds;

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
    nbd_server();
    nbd_client();
}
