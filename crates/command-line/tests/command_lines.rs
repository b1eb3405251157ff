//! Command lines as users, management programs and their documentation have them.

use command_line::{NicKind, RamKind, Spec};
use proptest::prelude::*;

/// A command line on which a test looks at a few things, and what it should find.
struct Line {
    who: &'static str,
    argv: &'static [&'static str],
    memory_mib: u64,
    machine: Option<&'static str>,
    accelerators: &'static [&'static str],
    vcpus: u32,
    disks: &'static [&'static str],
    nics: usize,
    qmp: &'static [&'static str],
    ram: &'static [(&'static str, RamKind)],
    host_devices: usize,
}

const LINES: &[Line] = &[
    Line {
        who: "a first try",
        argv: &["qemu-system-x86_64", "-enable-kvm", "-m", "2G", "-cdrom", "debian.iso", "disk.img"],
        memory_mib: 2048,
        machine: None,
        accelerators: &["kvm"],
        vcpus: 1,
        disks: &["debian.iso", "disk.img"],
        nics: 1,
        qmp: &[],
        ram: &[("pc.ram", RamKind::Implicit)],
        host_devices: 0,
    },
    Line {
        who: "a script with a tap",
        argv: &[
            "/usr/bin/qemu-system-x86_64",
            "-M",
            "q35,accel=kvm:tcg",
            "-cpu",
            "host,-vmx",
            "-smp",
            "sockets=1,cores=4,threads=2",
            "-m",
            "4096",
            "-drive",
            "file=/vm/a.qcow2,if=virtio,cache=none,aio=native",
            "-netdev",
            "tap,id=n,ifname=tap0,script=no,downscript=no",
            "-device",
            "virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc",
            "-display",
            "none",
            "-daemonize",
            "-pidfile",
            "/run/a.pid",
            "-qmp",
            "unix:/run/a.qmp,server,nowait",
            "-monitor",
            "unix:/run/a.mon,server,nowait",
            "-serial",
            "file:/var/log/a.log",
        ],
        memory_mib: 4096,
        machine: Some("q35"),
        accelerators: &["kvm", "tcg"],
        vcpus: 8,
        disks: &["/vm/a.qcow2"],
        nics: 1,
        qmp: &["/run/a.qmp"],
        ram: &[("pc.ram", RamKind::Implicit)],
        host_devices: 0,
    },
    Line {
        who: "the way of libvirt 9",
        argv: &[
            "/usr/bin/qemu-system-x86_64",
            "-name",
            "guest=web,debug-threads=on",
            "-S",
            "-object",
            r#"{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-web/master-key.aes"}"#,
            "-machine",
            "pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram,hpet=off,acpi=on",
            "-accel",
            "kvm",
            "-cpu",
            "host,migratable=on",
            "-m",
            "size=4194304k",
            "-object",
            r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":4294967296}"#,
            "-overcommit",
            "mem-lock=off",
            "-smp",
            "2,sockets=2,cores=1,threads=1",
            "-uuid",
            "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "-no-user-config",
            "-nodefaults",
            "-chardev",
            "socket,id=charmonitor,fd=33,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
            "-rtc",
            "base=utc,driftfix=slew",
            "-global",
            "kvm-pit.lost_tick_policy=delay",
            "-no-shutdown",
            "-boot",
            "strict=on",
            "-device",
            r#"{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}"#,
            "-blockdev",
            r#"{"driver":"file","filename":"/var/lib/libvirt/images/web.qcow2","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}"#,
            "-blockdev",
            r#"{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}"#,
            "-device",
            r#"{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}"#,
            "-netdev",
            r#"{"type":"tap","fd":"34","vhost":true,"vhostfd":"36","id":"hostnet0"}"#,
            "-device",
            r#"{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:11:22:33","bus":"pci.1","addr":"0x1"}"#,
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-msg",
            "timestamp=on",
        ],
        memory_mib: 4096,
        machine: Some("pc-q35-7.2"),
        accelerators: &["kvm"],
        vcpus: 2,
        disks: &["/var/lib/libvirt/images/web.qcow2"],
        nics: 1,
        qmp: &[],
        ram: &[("pc.ram", RamKind::Ram)],
        host_devices: 0,
    },
    Line {
        who: "the way of Proxmox VE 8",
        argv: &[
            "/usr/bin/kvm",
            "-id",
            "100",
            "-name",
            "web,debug-threads=on",
            "-no-shutdown",
            "-chardev",
            "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
            "-chardev",
            "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5",
            "-mon",
            "chardev=qmp-event,mode=control",
            "-pidfile",
            "/var/run/qemu-server/100.pid",
            "-daemonize",
            "-smbios",
            "type=1,uuid=6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "-smp",
            "4,sockets=1,cores=4,maxcpus=4",
            "-nodefaults",
            "-boot",
            "menu=on,strict=on,reboot-timeout=1000",
            "-vnc",
            "unix:/var/run/qemu-server/100.vnc,password=on",
            "-cpu",
            "kvm64,enforce,+kvm_pv_eoi,+lahf_lm,+sep",
            "-m",
            "2048",
            "-object",
            "iothread,id=iothread-virtioscsi0",
            "-device",
            "virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1,iothread=iothread-virtioscsi0",
            "-drive",
            "file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring,detect-zeroes=on",
            "-device",
            "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100",
            "-netdev",
            "type=tap,id=net0,ifname=tap100i0,script=/var/lib/qemu-server/pve-bridge,downscript=/var/lib/qemu-server/pve-bridgedown,vhost=on",
            "-device",
            "virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0,rx_queue_size=1024",
            "-machine",
            "type=pc+pve0",
        ],
        memory_mib: 2048,
        machine: Some("pc+pve0"),
        accelerators: &[],
        vcpus: 4,
        disks: &["/dev/pve/vm-100-disk-0"],
        nics: 1,
        qmp: &["/var/run/qemu-server/100.qmp", "/var/run/qmeventd.sock"],
        ram: &[("pc.ram", RamKind::Implicit)],
        host_devices: 0,
    },
    Line {
        who: "shared memory over two nodes with a device passed through",
        argv: &[
            "qemu-system-x86_64",
            "-machine",
            "q35",
            "-accel",
            "kvm",
            "-m",
            "1G,slots=4,maxmem=8G",
            "-smp",
            "4",
            "-object",
            "memory-backend-file,id=ram0,size=512M,mem-path=/dev/hugepages/vm-0,share=on,prealloc=on",
            "-object",
            "memory-backend-memfd,id=ram1,size=0.5G,hugetlb=on",
            "-numa",
            "node,nodeid=0,cpus=0-1,memdev=ram0",
            "-numa",
            "node,nodeid=1,cpus=2-3,memdev=ram1",
            "-device",
            "vfio-pci,host=0000:65:00.0",
            "-nic",
            "none",
            "-blockdev",
            "driver=raw,node-name=d,file.driver=host_device,file.filename=/dev/vg/lv,cache.direct=on",
            "-device",
            "virtio-blk-pci,drive=d",
        ],
        memory_mib: 1024,
        machine: Some("q35"),
        accelerators: &["kvm"],
        vcpus: 4,
        disks: &["/dev/vg/lv"],
        nics: 0,
        qmp: &[],
        ram: &[("ram0", RamKind::File), ("ram1", RamKind::Memfd)],
        host_devices: 1,
    },
    Line {
        who: "a microvm",
        argv: &[
            "qemu-system-x86_64",
            "-M",
            "microvm,x-option-roms=off,isa-serial=off,rtc=off",
            "-no-acpi",
            "-enable-kvm",
            "-cpu",
            "host",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-no-reboot",
            "-device",
            "virtio-serial-device",
            "-chardev",
            "stdio,id=virtiocon0",
            "-device",
            "virtconsole,chardev=virtiocon0",
            "-drive",
            "id=root,file=root.img,format=raw,if=none",
            "-device",
            "virtio-blk-device,drive=root",
            "-kernel",
            "vmlinux",
            "-append",
            "console=hvc0 root=/dev/vda -- --flag",
            "-m",
            "128m",
            "-smp",
            "1",
        ],
        memory_mib: 128,
        machine: Some("microvm"),
        accelerators: &["kvm"],
        vcpus: 1,
        disks: &["root.img"],
        nics: 0,
        qmp: &[],
        ram: &[("microvm.ram", RamKind::Implicit)],
        host_devices: 0,
    },
    Line {
        who: "double dashes, options from the future and values with dashes",
        argv: &[
            "qemu-system-x86_64",
            "--m",
            "64",
            "--append",
            "-v",
            "-from-the-future",
            "a=b,,c",
            "-another-flag",
            "--no-reboot",
            "-accel",
            "tcg,thread=multi",
            "-net",
            "nic,model=e1000",
            "-net",
            "user,hostfwd=tcp::2222-:22",
        ],
        memory_mib: 64,
        machine: None,
        accelerators: &["tcg"],
        vcpus: 1,
        disks: &[],
        nics: 1,
        qmp: &[],
        ram: &[("pc.ram", RamKind::Implicit)],
        host_devices: 0,
    },
];

#[test]
fn a_filter_that_qemu_puts_itself_under_is_counted_and_no_other() {
    for (options, filters) in [
        (&[][..], 0),
        (&["-sandbox", "off"], 0),
        (&["-sandbox", "on,obsolete=deny,spawn=deny"], 1),
        (&["-sandbox", "enable=on"], 1),
        (&["-sandbox", "enable=off,spawn=deny"], 0),
        (&["-sandbox", "on", "-sandbox", "on,spawn=deny"], 2),
    ] {
        let spec = Spec::parse(&[&["qemu-system-x86_64"], options].concat()).unwrap();
        assert_eq!(spec.sandboxes(), filters, "{options:?}");
    }
}

#[test]
fn real_command_lines_are_understood_and_come_back_word_for_word() {
    for line in LINES {
        let spec = Spec::parse(line.argv).unwrap_or_else(|error| panic!("{}: {error}", line.who));
        assert_eq!(spec.to_argv(), line.argv, "{}", line.who);
        assert_eq!(spec.memory(), Ok(line.memory_mib << 20), "{}", line.who);
        assert_eq!(spec.machine(), line.machine, "{}", line.who);
        assert_eq!(spec.accelerators(), line.accelerators, "{}", line.who);
        assert_eq!(spec.vcpus(), line.vcpus, "{}", line.who);
        let disks: Vec<_> = spec.disks().iter().map(|disk| disk.path.display().to_string()).collect();
        assert_eq!(disks, line.disks, "{}", line.who);
        assert_eq!(spec.nics().len(), line.nics, "{}", line.who);
        let qmp: Vec<_> = spec.qmp_sockets().iter().map(|socket| socket.display().to_string()).collect();
        assert_eq!(qmp, line.qmp, "{}", line.who);
        let ram: Vec<_> = spec.ram_backends().into_iter().map(|backend| (backend.id, backend.kind)).collect();
        let expected: Vec<_> = line.ram.iter().map(|(id, kind)| ((*id).to_owned(), kind.clone())).collect();
        assert_eq!(ram, expected, "{}", line.who);
        assert_eq!(spec.host_devices().len(), line.host_devices, "{}", line.who);
    }
}

#[test]
fn details_that_decide_how_a_machine_is_moved() {
    let of = |who: &str| Spec::parse(LINES.iter().find(|line| line.who.contains(who)).unwrap().argv).unwrap();
    let nic = of("libvirt").nics().remove(0);
    assert!(matches!(&nic.kind, NicKind::Tap { descriptors, .. } if !descriptors.is_empty()) && nic.vhost);
    assert_eq!((nic.netdev.as_str(), nic.mac.as_deref()), ("hostnet0", Some("52:54:00:11:22:33")));
    assert_eq!(of("libvirt").name().as_deref(), Some("web"));
    assert_eq!(of("two nodes").ram_backends()[1].size, 512 << 20);
    assert_eq!(of("microvm").files()[0].path.display().to_string(), "vmlinux");
}

#[test]
fn what_cannot_be_a_command_line_is_refused() {
    let none: &[&str] = &[];
    let error = |argv: &[&str]| Spec::parse(argv).unwrap_err().to_string();
    assert_eq!(error(none), "the command line is empty");
    assert_eq!(error(&[""]), "the command line is empty");
    assert_eq!(error(&["q", "-m"]), "option -m is the last word, but it needs a value");
    assert!(error(&["q", "-device", "{\"driver\":"]).starts_with("the value of -device is not valid JSON"));
    assert!(
        error(&["q", "-object", "memory-backend-ram,id=a,size=big"]).contains("size that cannot be read")
    );
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        "-{1,2}(m|M|machine|device|drive|object|netdev|nic|chardev|numa|smp|serial|blockdev|S|snapshot|nographic|unknown|name)",
        "[a-z0-9.:/=,_-]{0,24}",
        "(size=)?[0-9]{1,5}[MGk]?",
        "(memory-backend-(ram|memfd|file|odd)),id=[a-z]{1,3},size=[0-9]{1,4}M(,share=(on|off))?(,mem-path=/[a-z]{1,4})?",
        "(q35|pc|tap|user|socket|file)(,[a-z]{1,6}(=[a-z/,]{0,6})?){0,4}",
        Just(r#"{"driver":"virtio-net-pci","id":"x","cache":{"direct":true}}"#.to_owned()),
        "\\PC{0,12}",
    ]
}

proptest! {
    #[test]
    fn whatever_is_parsed_comes_back_word_for_word(mut argv in prop::collection::vec(word(), 0..12)) {
        argv.insert(0, "qemu".to_owned());
        if let Ok(spec) = Spec::parse(&argv) {
            prop_assert_eq!(&spec.to_argv(), &argv);
            prop_assert_eq!(&Spec::parse(&spec.to_argv()).unwrap(), &spec);
        }
    }

    /// No question about a command line may panic, and the changed ones can be read again.
    #[test]
    fn every_question_has_an_answer(mut argv in prop::collection::vec(word(), 0..12)) {
        argv.insert(0, "qemu".to_owned());
        let Ok(mut spec) = Spec::parse(&argv) else { return Ok(()) };
        let _ = (spec.memory(), spec.machine(), spec.cpu(), spec.accelerators(), spec.ram_backends(), spec.disks(), spec.nics());
        let _ = (spec.host_devices(), spec.files(), spec.declared_devices(), spec.qmp_sockets(), spec.vcpus(), spec.name());
        let how = command_line::Mirrorable {
            name: "vm".to_owned(), host: "a".to_owned(), ram_dir: "/dev/shm".into(), qmp_socket: "/run/q".into(), pid_file: Some("/run/p".into()),
        };
        if spec.make_mirrorable(&how).is_ok() {
            prop_assert!(spec.ram_backends().iter().all(|ram| ram.kind == RamKind::File && ram.share && ram.mem_path.is_some()));
            prop_assert_eq!(&Spec::parse(&spec.to_argv()).unwrap(), &spec);
            let there = command_line::Destination {
                name: "vm".to_owned(), binary: "/q".into(), machine: "pc-q35-7.2".to_owned(), host: "b".to_owned(),
                ram_dir: "/mnt".into(), huge_dirs: Vec::new(),
                qmp_socket: "/run/d".into(), taps: Vec::new(), macvtaps: Vec::new(),
            };
            let moved = spec.for_destination(&there).unwrap();
            prop_assert_eq!(moved.machine(), Some("pc-q35-7.2"));
            prop_assert!(moved.ram_backends().iter().all(|ram| ram.mem_path.as_ref().is_some_and(|path| path.starts_with("/mnt"))));
            prop_assert_eq!(&Spec::parse(&moved.to_argv()).unwrap(), &moved);
            prop_assert_eq!(moved.without_incoming().for_destination(&there).unwrap(), moved);
        }
    }
}
