//! Command lines, a word to a line: nothing of a user's or a peer's command line is lost or read in two ways.

#![no_main]

use fuzzing as _;

use std::path::Path;

use command_line::render::{Permissions, Purpose, Rendering};
use command_line::{Destination, Mirrorable, Spec};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let argv: Vec<&str> = text.split('\n').collect();
    let Ok(spec) = Spec::parse(&argv) else { return };
    assert_eq!(spec.to_argv(), argv, "word for word");
    look_at(&spec);

    let mut absolute = spec.clone();
    absolute.make_paths_absolute(Path::new("/vm"));
    parsed_again(&absolute);
    let mut mirrorable = spec.clone();
    if mirrorable.make_mirrorable(&here()).is_ok() {
        parsed_again(&mirrorable);
    }
    for spec in [&spec, &mirrorable] {
        if let Ok(moved) = spec.for_destination(&there(spec)) {
            parsed_again(&moved);
            look_at(&moved);
            assert_eq!(moved.memory(), spec.memory(), "the guest sees the same");
            assert_eq!(moved.vcpus(), spec.vcpus());
            rendered(&moved);
        }
    }
});

/// What a host starts is what it has rendered: parsed and rendered again, it is the same.
fn rendered(spec: &Spec) {
    let permissions = Permissions { listen: vec![[127, 0, 0, 1].into()], ..Permissions::default() };
    for purpose in [Purpose::Rehearsal, Purpose::Machine] {
        let how =
            Rendering { permissions: &permissions, directory: Path::new("/run/vmirror/web1.d"), purpose };
        let Ok(once) = spec.render(&how) else { continue };
        parsed_again(&once.spec);
        look_at(&once.spec);
        assert_eq!(once.spec.memory(), spec.memory(), "the guest sees the same");
        let again = once.spec.render(&how).expect("nothing in it is refused");
        assert_eq!(again.spec, once.spec);
    }
}

/// What is rendered and parsed again is the same.
fn parsed_again(spec: &Spec) {
    let argv = spec.to_argv();
    assert_eq!(&Spec::parse(&argv).expect("our own words"), spec, "{argv:?}");
}

fn here() -> Mirrorable {
    Mirrorable {
        name: "web1".into(),
        host: "host-a".into(),
        ram_dir: "/dev/shm".into(),
        qmp_socket: "/run/vmirror/web1.qmp".into(),
        pid_file: Some("/run/vmirror/web1.pid".into()),
    }
}

fn there(spec: &Spec) -> Destination {
    let taps = spec.nics().into_iter().map(|nic| (nic.netdev, "vm-web1-0".to_owned()));
    Destination {
        name: "web1".into(),
        binary: "/usr/bin/qemu-system-x86_64".into(),
        machine: "pc-q35-7.2".into(),
        host: "host-b".into(),
        ram_dir: "/dev/shm".into(),
        huge_dirs: vec![("pc.ram".into(), "/mnt/huge".into())],
        qmp_socket: "/run/vmirror/web1.d/qmp".into(),
        taps: taps.collect(),
        macvtaps: Vec::new(),
    }
}

/// Everything that is asked of a command line has an answer.
fn look_at(spec: &Spec) {
    let _ = (spec.machine(), spec.cpu(), spec.accelerators(), spec.name(), spec.uuid(), spec.vcpus());
    let _ = (spec.pid_file(), spec.qmp_sockets(), spec.own_qmp_socket(), spec.relative_path());
    let _ = (spec.disks(), spec.nics(), spec.taps(), spec.files(), spec.files_made());
    let _ = (spec.declared_devices(), spec.host_devices(), spec.gives_memory_back(), spec.unknown_drives());
    let total: u64 = spec.ram_backends().iter().map(|backend| backend.size).sum();
    assert!(spec.memory().is_ok(), "sizes are checked when a command line is parsed: {total}");
    parsed_again(&spec.without_incoming());
    parsed_again(&spec.without_direct_boot());
}
