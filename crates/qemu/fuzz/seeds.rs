//! Writes what the corpora of this package begin with: what QEMU 7.2 and 10.0 say, and heads of images.

use fuzzing::Seeds;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 13, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"}, "capabilities": ["oob"]}}"#;
const OK: &str = r#"{"return": {}}"#;

/// A question by its number in the target, and what QEMU answers, its events in between.
const ANSWERS: &[(u8, &str, &[&str])] = &[
    (
        0,
        "version",
        &[r#"{"return": {"qemu": {"micro": 13, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"}}"#],
    ),
    (1, "status", &[r#"{"return": {"status": "inmigrate", "singlestep": false, "running": false}}"#]),
    (
        2,
        "drives",
        &[
            r##"{"return": [{"io-status": "ok", "device": "", "locked": false, "removable": false, "inserted": {"iops_rd": 0, "detect_zeroes": "off", "image": {"backing-image": {"virtual-size": 1048576, "filename": "/i/base.raw", "format": "raw", "actual-size": 4096, "dirty-flag": false}, "virtual-size": 1048576, "filename": "/i/a.qcow2", "cluster-size": 65536, "format": "qcow2", "actual-size": 200704, "backing-filename": "base.raw", "full-backing-filename": "/i/base.raw", "backing-filename-format": "raw", "dirty-flag": false}, "iops_wr": 0, "ro": false, "node-name": "#block154", "backing_file_depth": 1, "drv": "qcow2", "bps": 0, "encrypted": false, "file": "/i/a.qcow2"}, "qdev": "/machine/peripheral/vd0/virtio-backend", "type": "unknown"}, {"io-status": "ok", "device": "ide1-cd0", "locked": false, "removable": true, "qdev": "/machine/unattached/device[23]", "tray_open": false, "type": "unknown"}]}"##,
        ],
    ),
    (
        3,
        "node-names",
        &[
            r##"{"return": [{"ro": false, "drv": "qcow2", "node-name": "#block154", "file": "/i/a.qcow2"}, {"ro": false, "drv": "file", "node-name": "#block056", "file": "/i/a.qcow2"}]}"##,
        ],
    ),
    (
        4,
        "blocks",
        &[
            r#"{"return": [{"drv": "qcow2", "file": "/i/a", "image": {"filename": "/i/a", "backing-image": {"filename": "/i/b", "backing-image": {"filename": "/i/c"}}}}, {"drv": "file", "file": "/i/a", "image": {"filename": "/i/a"}}, {"drv": "host_device", "file": "/dev/vg/x"}]}"#,
        ],
    ),
    (
        5,
        "block-jobs",
        &[
            r#"{"timestamp": {"seconds": 1700000000, "microseconds": 137}, "event": "JOB_STATUS_CHANGE", "data": {"status": "ready", "id": "vmirror-0"}}"#,
            r#"{"timestamp": {"seconds": 1700000000, "microseconds": 150}, "event": "BLOCK_JOB_READY", "data": {"device": "vmirror-0", "len": 1048576, "offset": 1048576, "speed": 0, "type": "mirror"}}"#,
            r#"{"return": [{"auto-finalize": true, "io-status": "ok", "device": "vmirror-0", "auto-dismiss": true, "busy": false, "len": 1048576, "offset": 1048576, "status": "ready", "paused": false, "speed": 0, "ready": true, "type": "mirror", "actively-synced": true}]}"#,
        ],
    ),
    (
        6,
        "migrate",
        &[
            r#"{"return": {"blocked": true, "blocked-reasons": ["State blocked by non-migratable device"], "expected-downtime": 300, "status": "active", "setup-time": 2, "total-time": 1234, "ram": {"total": 134754304, "postcopy-requests": 0, "dirty-sync-count": 2, "mbps": 268.1, "transferred": 3143, "normal": 12}}}"#,
        ],
    ),
    (
        7,
        "cpu-features",
        &[
            r#"{"return": [{"thread-id": 25627, "props": {"core-id": 0, "thread-id": 0, "socket-id": 0}, "qom-path": "/machine/unattached/device[0]", "cpu-index": 0, "target": "x86_64"}]}"#,
            r#"{"return": [{"name": "avx2", "type": "bool"}, {"name": "sse4_1", "type": "bool"}, {"name": "sse4-1", "type": "bool"}, {"name": "realized", "type": "bool"}, {"name": "lapic", "type": "child<apic>"}]}"#,
            r#"{"return": true}"#,
            r#"{"return": false}"#,
        ],
    ),
    (
        8,
        "cpuid",
        &[
            r#"{"return": [{"thread-id": 25627, "qom-path": "/machine/unattached/device[0]", "cpu-index": 0}]}"#,
            r#"{"return": [{"cpuid-register": "EDX", "cpuid-input-eax": 1, "features": 395049983}, {"cpuid-register": "EBX", "cpuid-input-eax": 7, "features": 4294967295, "cpuid-input-ecx": 0}]}"#,
        ],
    ),
    (
        9,
        "memory-devices",
        &[
            r#"{"return": [{"type": "dimm", "data": {"addr": 4294967296, "id": "d1", "memdev": "/objects/m1", "size": 1073741824, "slot": 0}}, {"type": "virtio-mem", "data": {"id": "vm0", "requested-size": 0}}]}"#,
        ],
    ),
    (10, "machine-type", &[r#"{"return": "pc-q35-7.2-machine"}"#]),
    (
        11,
        "exports",
        &[r#"{"return": [{"node-name": "n", "shutting-down": false, "type": "nbd", "id": "disk0"}]}"#],
    ),
    (
        12,
        "end-mirror",
        &[
            OK,
            r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "BLOCK_JOB_COMPLETED", "data": {"device": "job", "len": 5, "offset": 5, "speed": 0, "type": "mirror"}}"#,
            r#"{"timestamp": {"seconds": 1700000000, "microseconds": 150}, "event": "JOB_STATUS_CHANGE", "data": {"status": "null", "id": "job"}}"#,
        ],
    ),
    (
        13,
        "quiesce",
        &[
            r#"{"return": {"status": "running", "running": true}}"#,
            r#"{"timestamp": {"seconds": 5, "microseconds": 1}, "event": "STOP"}"#,
            OK,
        ],
    ),
    (
        15,
        "refused",
        &[r#"{"error": {"class": "CommandNotFound", "desc": "The command query-name has not been found"}}"#],
    ),
];

/// A qcow2 header of version 3 with a backing file and the extension that names its format.
fn qcow2() -> Vec<u8> {
    let mut head = vec![0; 65536];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(8, &512u64.to_be_bytes());
    put(16, &9u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 30).to_be_bytes());
    put(36, &16u32.to_be_bytes());
    put(40, &(3u64 << 16).to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(112, &0xe279_2acau32.to_be_bytes());
    put(116, &3u32.to_be_bytes());
    put(120, b"raw");
    put(128, &0x6803_f857u32.to_be_bytes());
    put(132, &48u32.to_be_bytes());
    put(512, b"/i/b.qcow");
    head
}

/// A table with these lines, and a heap in which the first block is described so.
fn ram_table(lines: &[&str], words: [u64; 6], name: &str) -> Vec<u8> {
    let table = [&["Block Name PSize Offset Used Total HVA RO"], lines].concat().join("\n");
    let description: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let head = (table.len() as u16).to_le_bytes();
    [&head[..], table.as_bytes(), &[0; 16], &description, &[1, 0, 0, 0], name.as_bytes(), &[0; 64]].concat()
}

fn main() {
    let package = env!("CARGO_MANIFEST_DIR");
    let seeds = Seeds::of(package, "qmp");
    for (question, name, answers) in ANSWERS {
        let mut said = vec![*question];
        said.extend([&[GREETING, OK][..], answers].concat().join("\n").bytes());
        seeds.add(name, said);
    }
    let seeds = Seeds::of(package, "qcow2");
    let image = qcow2();
    seeds.add("version-3", &image[..1024]);
    let version_2 = [&image[..4], &2u32.to_be_bytes(), &[0; 8], &image[16..72], &[0; 8]].concat();
    seeds.add("version-2", version_2);
    seeds.add("version-1", [&b"QFI\xfb\0\0\0\x01"[..], &[0; 64]].concat());
    seeds.add("vmdk", b"KDMV\x01\0\0\0");
    seeds.add("raw", [0; 512]);
    let mut fixed = vec![0; 1024];
    fixed[512..520].copy_from_slice(b"conectix");
    seeds.add("vhd", fixed);
    let seeds = Seeds::of(package, "ram_table");
    let ram = "pc.ram    4 KiB  0x0000000000002000 0x0000000000001000 0x0000000000002000";
    let rom = "/rom@etc/acpi/tables    4 KiB  0x0000000021000000 0x0000000000020000 0x0000000000200000";
    let words = [0x7f00_0000, 0, 0x2000, 0x1000, 0x2000, 0xdead];
    seeds.add("7.2", ram_table(&[ram, rom], words, "pc.ram"));
    let told = "vga.vram 4 KiB 0x80060000 0x1000000 0x1000000 0x00007f12ebe00000 rw";
    let unnamed = "4 KiB 0x80060000 0x1000000 0x1000000 0x00007f12ebe00000 rw";
    seeds.add("10", ram_table(&[told, unnamed], words, "vga.vram"));
    seeds.add("short", ram_table(&["name 4 KiB 0x1 0x2"], [0; 6], "name"));
}
