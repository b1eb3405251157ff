//! Writes what the corpus of this target begins with: what two agents say to each other.

use fuzzing::Seeds;
use network::conntrack::wire::{Flow, Flows, Ports, Tuple};
use prost::Message as _;
use protocol::wire::{
    BootFile, CgroupLimits, Commit, CpuidWord, Disk, Finding, Findings, Forward, Health, Holds, Known,
    Lacking, Macvtap, Missing, Neighbour, Nothing, Pages, Port, RamBlock, Reply, Request, Reserve, Reserved,
    Resume, Running, Sums, Supplied, Tap, ToDestination, ToSource, Vlan, WrongBlocks,
};

const SESSION: [u8; 16] = [0x5e; 16];

fn text(text: &str) -> String {
    text.to_owned()
}

fn tap(netdev: &str) -> Tap {
    Tap {
        netdev: text(netdev),
        ifname: text("vm-web1"),
        bridge: text("br0"),
        mtu: 1500,
        multi_queue: true,
        mac: text("52:54:00:aa:bb:cc"),
        port: Some(Port { known: 1023, on: 8, vlans: vec![Vlan { vid: 7, flags: 3 }] }),
        queue_length: 1000,
        macvtap: None,
    }
}

fn reserve() -> Reserve {
    let argv = "/usr/bin/qemu-system-x86_64 -m 64M -nodefaults -drive file=/vm/a.img,if=virtio,format=raw";
    let mode = Macvtap { lower: text("eth0"), mode: 4, mac: text("52:54:00:aa:bb:cd") };
    Reserve {
        session: SESSION.to_vec(),
        name: text("web1"),
        generation: 3,
        argv: argv.split(' ').map(text).collect(),
        machine: text("pc-q35-7.2"),
        qemu_version: text("7.2.9"),
        cpu_features: vec![text("avx2")],
        cpuid: vec![CpuidWord { leaf: 7, subleaf: Some(0), register: text("EBX"), features: 0x1234 }],
        ram: vec![RamBlock { id: text("pc.ram"), size: 64 << 20, huge_page: 2 << 20 }],
        disks: vec![Disk {
            path: text("/vm/a.img"),
            probe: text("/vm/.vmirror-probe-1"),
            nonce: vec![1; 16],
            size: 1 << 30,
            format: text("raw"),
            allocated: 4096,
            ..Disk::default()
        }],
        taps: vec![tap("n0")],
        macvtaps: vec![Tap { macvtap: Some(mode), ..tap("n1") }],
        streams: 4,
        secret: vec![9; 192],
        boot_files: vec![BootFile { path: text("/vm/kernel"), size: 7, hash: vec![3; 16] }],
        nft: text(r#"{"nftables": [{"table": {"family": "inet", "name": "vmirror-web1"}}]}"#),
        limits: Some(CgroupLimits {
            cpu_time: Some(50_000),
            cpu_period: Some(100_000),
            cpu_weight: Some(100),
            memory_max: Some(1 << 30),
            ..CgroupLimits::default()
        }),
        forward: Some(Forward { port: 4789 }),
        patient: true,
        post_copy: true,
        link_port: 7600,
        ..Reserve::default()
    }
}

fn words() {
    let seeds = Seeds::of(env!("CARGO_MANIFEST_DIR"), "control_words");
    let commit = Commit { session: SESSION.to_vec(), name: text("web1"), generation: 4 };
    let neighbour = Neighbour {
        netdev: text("n0"),
        mac: text("52:54:00:aa:bb:cc"),
        addresses: vec![text("10.0.0.2"), text("fe80::1")],
    };
    let sums = Sums { barrier: 2, sums: vec![1; 64], audited: 9, disks: vec![0; 64], audited_blocks: 1 };
    let requests = [
        ("reserve", Request::Reserve(reserve())),
        ("device-state", Request::DeviceState(vec![1, 2, 3])),
        ("hold", Request::HoldDevices(Nothing {})),
        ("load", Request::Load(sums.clone())),
        ("commit", Request::Commit(commit.clone())),
        ("cancel", Request::Cancel(commit.clone())),
        ("resume", Request::Resume(Resume { commit: Some(commit), secret: vec![9; 192] })),
        ("known", Request::Known(Known { neighbours: vec![neighbour], flows: Some(connections()) })),
    ];
    for (name, request) in requests {
        seeds.add(name, [&[0][..], &ToDestination::from(request).encode_to_vec()].concat());
    }
    let finding = Finding { kind: text("room"), message: text("no room"), hint: text("make some") };
    let findings = Findings {
        findings: vec![finding.clone()],
        cpu_features: vec![text("avx2")],
        reserved: Some(Reserved {
            mirrored: vec![0],
            known: vec![0],
            existing: vec![0],
            keeper: vec![4; 16],
        }),
        keeper: vec![4; 16],
    };
    let supplied = Supplied { sums: vec![1; 64], faults: 7, longest_us: 80, total_us: 100, taken_over: true };
    let health = Health {
        watched_ms: 200.0,
        vcpus: 2,
        progressing: 1,
        status: text("running"),
        problems: vec![finding],
        frames_dropped: 1,
    };
    let replies = [
        ("reserved", Reply::Reserved(findings.reserved.clone().unwrap_or_default())),
        ("refused", Reply::Refused(findings.clone())),
        ("failed", Reply::Failed(findings)),
        ("barrier", Reply::Barrier(sums)),
        ("mismatch", Reply::Mismatch(Pages { pages: vec![0, 7, 511] })),
        ("running", Reply::Running(Running { supplied: Some(supplied), lacked: true })),
        ("health", Reply::Health(health)),
        ("missing", Reply::Missing(Missing { first: 64, bits: vec![1; 64], more: true })),
        ("holds", Reply::Holds(Holds { disk: 0, first: 3, hashes: vec![5; 64], last: false })),
        ("wrong-blocks", Reply::WrongBlocks(WrongBlocks { blocks: vec![1, 2], checked: true })),
        ("lacking", Reply::Lacking(Lacking { paths: vec![text("/vm/kernel")] })),
    ];
    for (name, reply) in replies {
        seeds.add(name, [&[1][..], &ToSource::from(reply).encode_to_vec()].concat());
    }
}

fn connections() -> Flows {
    let there = Tuple {
        source: vec![10, 0, 0, 2],
        destination: vec![10, 0, 0, 3],
        protocol: 6,
        ports: Some(Ports { source: 40_000, destination: 80 }),
        ..Tuple::default()
    };
    let flow = Flow { original: Some(there.clone()), reply: Some(there), ..Flow::default() };
    Flows { flows: vec![flow], more: false }
}

fn main() {
    words();
}
