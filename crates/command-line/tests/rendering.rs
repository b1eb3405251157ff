//! A command line of somebody else's must not make a host do what its operator has not allowed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use command_line::Spec;
use command_line::render::{Permissions, Place, Purpose, Refused, Remedy, Rendered, Rendering, Way};

const OWN: &str = "/run/vmirror/vm.d";

/// A host that lets its peers have images in one directory, and nothing else.
fn strict(files: &Path) -> Permissions {
    Permissions { file_dirs: vec![files.to_owned()], ..Permissions::default() }
}

fn render(words: &[&str], permissions: &Permissions, purpose: Purpose) -> Result<Rendered, Vec<Refused>> {
    let how = Rendering { permissions, directory: Path::new(OWN), purpose };
    // Silence about networks and displays is another test's.
    let line = [&["qemu-system-x86_64", "-nodefaults", "-display", "none"], words].concat();
    let rendered = Spec::parse(&line).unwrap().render(&how)?;
    // What is rendered is what is parsed, and is rendered in the same way.
    let argv = rendered.spec.to_argv();
    assert_eq!(Spec::parse(&argv).unwrap(), rendered.spec);
    if rendered.places.iter().all(|place| place.way == Way::Offered) {
        assert_eq!(rendered.spec.render(&how).unwrap().spec, rendered.spec);
    }
    Ok(rendered)
}

/// What of a command line is what QEMU is started with, but for what is there in any case.
fn words(rendered: &Rendered) -> Vec<String> {
    let words = rendered.spec.to_argv();
    words[4..words.len() - 4].to_vec()
}

/// Lines that reach for something of the host's. None is let through by a host that has not said so.
const REFUSED: &[&[&str]] = &[
    // Files that QEMU writes.
    &["-chardev", "file,id=c,path=/etc/cron.d/x"],
    &["-chardev", "file,id=c,path=FILES/disk.img"],
    &["-chardev", r#"file,id=c,path=relative"#],
    &["-chardev", "null,id=c,logfile=/etc/cron.d/x"],
    &["-chardev", "socket,id=c,path=FILES/s,server=on,logfile=/root/.profile,logappend=on"],
    &["-serial", "file:/etc/cron.d/x"],
    &["-monitor", "mon:file:/etc/cron.d/x"],
    &["-audiodev", "wav,id=a,path=/etc/cron.d/x"],
    &["-serial", "unix:FILES/s,server=on,logfile=/etc/cron.d/x"],
    &["-serial", "tcp:127.0.0.1:1,server=on,logfile=/etc/cron.d/x"],
    &["-chardev", "socket,id=c,path=/a,path=/b,server=on"],
    // Listeners that are not looked at where the last of a key is.
    &["-serial", "tcp:127.0.0.1:1,server=on,host=0.0.0.0"],
    &["-vnc", "unix:/any/path,vnc=unix:FILES/s"],
    &["-vnc", "0.0.0.0:1,vnc=127.0.0.1:2"],
    &["-vnc", "unix:FILES/s,websocket=0.0.0.0:5700"],
    &["-smbios", "type=11,path=/etc/shadow,path=FILES/x"],
    &["-drive", "file=FILES/x,if=virtio,format=raw,file.locking=off"],
    &["-blockdev", r#"{"driver":"file","filename":"FILES/x","node-name":"f","locking":"off"}"#],
    &["-drive", "file=FILES/x,if=virtio,format=raw,read-only=on,force-share=on"],
    &["-drive", "file=FILES/x,if=virtio,format=raw,read-only=on,force-share"],
    &["-drive", "file=FILES/x,if=virtio,format=raw,read-only=on,file.force-share=yes"],
    &[
        "-drive",
        r#"file=json:{"driver":"raw",,"file":{"driver":"file",,"filename":"FILES/x",,"force-share":true}},if=virtio"#,
    ],
    &[
        "-blockdev",
        r#"{"driver":"file","filename":"FILES/x","node-name":"f","read-only":true,"force-share":true}"#,
    ],
    &["-object", "filter-dump,id=f,netdev=n,file=/etc/cron.d/x"],
    &["-trace", "enable=*,file=/etc/cron.d/x"],
    &["-writeconfig", "/etc/cron.d/x"],
    &["-dump-vmstate", "/etc/cron.d/x"],
    &["-qtest-log", "/etc/cron.d/x"],
    &["-machine", "virt,dumpdtb=/etc/cron.d/x"],
    &["-perfmap"],
    // Files that QEMU reads, for the guest to see.
    &["-device", "loader,file=/etc/shadow,addr=0x1000"],
    &["-device", r#"{"driver":"guest-loader","kernel":"/etc/shadow","addr":4096}"#],
    &["-device", "ipmi-bmc-sim,id=b,fruareafile=/etc/shadow"],
    &["-global", "virtio-net-pci.romfile=/etc/shadow"],
    &["-global", "driver=e1000,property=romfile,value=/etc/shadow"],
    &["-initrd", "FILES/initrd,/etc/shadow"],
    &["-boot", "menu=on,splash=/etc/shadow"],
    &["-k", "../../../etc/shadow"],
    &["-L", "/etc"],
    &["-object", "secret,id=s,file=/etc/shadow"],
    &["-object", "secret_keyring,id=s,serial=1"],
    &["-object", "tls-creds-x509,id=t,dir=/etc/ssl/private,endpoint=server"],
    &["-object", "tls-creds-psk,id=t,dir=/etc/keys,endpoint=server"],
    &["-object", "authz-list-file,id=a,filename=/etc/x"],
    &["-object", "authz-pam,id=a,service=login"],
    &["-object", "rng-random,id=r,filename=/etc/shadow"],
    &["-spice", "unix=on,addr=FILES/s,x509-key-file=/etc/ssl/private/key.pem"],
    &["-semihosting"],
    &["-semihosting-config", "enable=on,target=native"],
    &["-smbios", "type=1", "-set", "drive.d.file=/etc/shadow"],
    // Images that reach further than their file.
    &["-drive", "file=fat:rw:/etc,if=virtio"],
    &["-drive", "file.driver=vvfat,file.dir=/etc,if=virtio"],
    &["-drive", "file=FILES/x.vmdk,format=vmdk"],
    &["-drive", "file=FILES/x,backing.driver=raw,backing.file.driver=file,backing.file.filename=/etc/shadow"],
    &[
        "-drive",
        r#"file=json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"/run/x"}}}"#,
    ],
    &[
        "-blockdev",
        r#"{"driver":"qcow2","node-name":"d","file":{"driver":"file","filename":"FILES/x"},"data-file":{"driver":"file","filename":"/etc/shadow"}}"#,
    ],
    &[
        "-blockdev",
        r#"{"driver":"quorum","node-name":"q","vote-threshold":1,"children":[{"driver":"file","filename":"/etc/shadow"}]}"#,
    ],
    &["-blockdev", "driver=ssh,node-name=s,host=example.org,path=/x"],
    &["-drive", "file=nbd:unix:/run/other.sock"],
    &["-hda", "http://169.254.169.254/latest/meta-data"],
    &["-cdrom", "iscsi://10.0.0.1/target/0"],
    &["-pflash", "nbd://10.0.0.1/x"],
    &["-drive", "driver=blkdebug,config=/etc/shadow,image.driver=null-co"],
    // Sockets that QEMU connects to, and listens on.
    &["-chardev", "socket,id=c,path=/run/docker.sock"],
    &["-serial", "unix:/run/docker.sock"],
    &["-chardev", "socket,id=c,path=x,abstract=on,server=on"],
    &["-chardev", "socket,id=c,host=10.0.0.1,port=22"],
    &["-chardev", "socket,id=c,host=0.0.0.0,port=2222,server=on,wait=off"],
    &["-serial", "tcp:10.0.0.1:22"],
    &["-monitor", "telnet::4444,server,nowait"],
    &["-qmp", "tcp:127.0.0.1:4444,server=on"],
    &["-chardev", "udp,id=c,host=10.0.0.1,port=53"],
    &["-serial", "udp:10.0.0.1:53@:54"],
    &["-s"],
    &["-gdb", "tcp::1234"],
    &["-vnc", ":0"],
    &["-vnc", "0.0.0.0:1,password=on"],
    &["-vnc", "10.0.0.1:5900,reverse=on"],
    &["-vnc", "unix:FILES/v,websocket=5700"],
    &["-display", "vnc=:1"],
    &["-spice", "port=5900,disable-ticketing=on"],
    &["-netdev", "user,id=n,hostfwd=tcp::22-:22"],
    &["-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:/bin/sh"],
    &["-nic", "user,smb=/etc"],
    &["-netdev", "socket,id=n,listen=:1234"],
    &["-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/run/x"],
    &["-netdev", "l2tpv3,id=n,src=10.0.0.1,dst=10.0.0.2,rxsession=1"],
    &["-netdev", "vde,id=n,sock=/run/vde"],
    &["-netdev", "passt,id=n"],
    &["-object", "input-barrier,id=i,name=x,server=10.0.0.1"],
    &["-object", "can-host-socketcan,id=c,if=can0,canbus=b"],
    &["-object", "pr-manager-helper,id=p,path=/run/x"],
    &["-object", "dbus-vmstate,id=d,addr=unix:path=/run/dbus"],
    &["-device", "hv-syndbg,host_ip=10.0.0.1,host_port=1"],
    &["-device", "vhost-vsock-pci,guest-cid=3"],
    // Devices of the host.
    &["-chardev", "serial,id=c,path=/dev/ttyS0"],
    &["-chardev", "parallel,id=c,path=/dev/parport0"],
    &["-serial", "/dev/ttyS0"],
    &["-chardev", "pipe,id=c,path=/run/pipe"],
    &["-object", "input-linux,id=i,evdev=/dev/input/event0"],
    &["-device", "virtio-input-host-pci,evdev=/dev/input/event0"],
    &["-device", "usb-mtp,rootdir=/etc"],
    &["-device", "u2f-passthru,hidraw=/dev/hidraw0"],
    &["-device", "ccid-card-emulated,backend=certificates,db=/etc/x"],
    &["-device", "pvrdma,ibdev=x"],
    &["-usbdevice", "disk:/etc/shadow"],
    &["-display", "egl-headless,rendernode=/dev/dri/renderD128"],
    &["-display", "dbus"],
    &["-accel", "kvm,device=/dev/other"],
    &["-accel", "qtest"],
    &["-machine", "pc,accel=xen"],
    // Code.
    &["-plugin", "/tmp/evil.so"],
    &["-object", "x-remote-object,id=o,fd=3"],
    &["-object", "qtest,id=q,chardev=c"],
    &["-qtest", "unix:/run/q"],
    // What nobody knows.
    &["-frobnicate", "x"],
    &["-device", "frobnicator"],
    &["-object", "frobnicator,id=f"],
    &["-chardev", "frobnicator,id=c"],
];

#[test]
fn what_reaches_for_the_host_is_refused_by_name() {
    let files = tempfile::tempdir().unwrap();
    let permissions = strict(files.path());
    let place = files.path().display().to_string();
    assert!(REFUSED.len() >= 50);
    for line in REFUSED {
        let line: Vec<String> = line.iter().map(|word| word.replace("FILES", &place)).collect();
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        for purpose in [Purpose::Rehearsal, Purpose::Machine] {
            match render(&line, &permissions, purpose) {
                Ok(rendered) => panic!("{line:?} is let through as {:?}", words(&rendered)),
                Err(refused) => {
                    // Said of the very option, whole.
                    let said = refused.iter().any(|refused| line.join(" ").contains(&refused.option));
                    assert!(
                        said && refused.iter().all(|refused| !refused.why.is_empty()),
                        "{line:?}: {refused:?}"
                    );
                }
            }
        }
    }
}

/// Lines that are let through in another form, or not at all, without being in the way.
const MAPPED: &[(&[&str], &[&str])] = &[
    (&["-monitor", "unix:/srv/m,server=on"], &["-monitor", "unix:OWN/socket1,server=on,wait=off"]),
    (&["-qmp", "unix:/srv/q,server,nowait"], &["-qmp", "unix:OWN/socket1,server,wait=off"]),
    (
        &["-serial", "mon:unix:/srv/s,server=on,wait=on"],
        &["-serial", "mon:unix:OWN/socket1,server=on,wait=off"],
    ),
    (
        &["-chardev", "socket,id=vmirror-qmp,path=/etc/x,server=off,logfile=/etc/y"],
        &["-chardev", "socket,id=vmirror-qmp,path=OWN/qmp,server=on,wait=off"],
    ),
    (&["-vnc", "unix:/srv/v,password=on"], &["-vnc", "unix:OWN/socket1,password=on"]),
    (
        &["-spice", "unix=on,addr=/srv/s,disable-ticketing=on"],
        &["-spice", "unix=on,addr=OWN/socket1,disable-ticketing=on"],
    ),
    (
        &["-display", "spice-app"],
        &["-display", "none", "-spice", "unix=on,addr=OWN/socket1,disable-ticketing=on"],
    ),
    (&["-display", "gtk,gl=on"], &["-display", "none"]),
    (&["-sdl"], &[]),
    (&["-audiodev", "pa,id=a,server=/run/pulse"], &["-audiodev", "none,id=a"]),
    (&["-audiodev", r#"{"id":"audio1","driver":"spice"}"#], &["-audiodev", "none,id=audio1"]),
    (&["-D", "/var/log/q.log", "-d", "guest_errors", "-dfilter", "0x1+0x2"], &[]),
    (&["-daemonize", "-runas", "root", "-chroot", "/", "-run-with", "user=root"], &[]),
    (&["-sandbox", "off"], &[]),
    (&["-pidfile", "/etc/passwd"], &[]),
];

#[test]
fn what_is_of_the_process_is_mapped_or_left_out() {
    let files = tempfile::tempdir().unwrap();
    for (line, expected) in MAPPED {
        let rendered = render(line, &strict(files.path()), Purpose::Machine)
            .unwrap_or_else(|refused| panic!("{line:?}: {refused:?}"));
        let expected: Vec<String> = expected.iter().map(|word| word.replace("OWN", OWN)).collect();
        assert_eq!(words(&rendered), expected, "{line:?}");
        let own = |place: &Place| place.own.starts_with(OWN) && !place.wanted.starts_with(OWN);
        assert!(rendered.places.iter().all(own), "{rendered:?}");
    }
    let wanted = |line: &[&str]| -> Vec<PathBuf> {
        let rendered = render(line, &strict(files.path()), Purpose::Machine).unwrap();
        rendered.places.into_iter().map(|place| place.wanted).collect()
    };
    let line = ["-monitor", "unix:/srv/m,server=on", "-pidfile", "/srv/p", "-vnc", "unix:/srv/v"];
    assert_eq!(wanted(&line), ["/srv/m", "/srv/p", "/srv/v"].map(PathBuf::from));
}

#[test]
fn a_filter_of_system_calls_is_there_unless_there_was_none_and_none_is_allowed() {
    const ON: &str = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let filters = |words: &[&str], unsandboxed| {
        let permissions = Permissions { unsandboxed, ..Permissions::default() };
        let rendered = render(words, &permissions, Purpose::Machine).unwrap().spec;
        let line = rendered.to_argv().join(" ");
        assert_eq!(rendered.sandboxes(), u32::from(line.contains(ON)), "{line}");
        rendered.sandboxes()
    };
    for (words, is_on) in [
        (&[][..], false),
        (&["-sandbox", "off"], false),
        (&["-sandbox", "on"], true),
        (&["-sandbox", "on", "-sandbox", "on,spawn=allow"], true),
    ] {
        assert_eq!(filters(words, false), 1, "{words:?}");
        assert_eq!(filters(words, true), u32::from(is_on), "{words:?}");
    }
    // The record says what the process is under.
    let how = Permissions::default();
    let rendered = render(&["-sandbox", "on,spawn=allow"], &how, Purpose::Machine).unwrap().spec;
    let recorded = Spec::parse(&["q", "-sandbox", "on", "-S"]).unwrap().sandboxed_as(&rendered);
    assert_eq!(recorded.to_argv().join(" "), format!("q -S {ON}"));
}

#[test]
fn what_a_site_needs_can_be_let_through() {
    let files = tempfile::tempdir().unwrap();
    let outputs = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc/cron.d/x", outputs.path().join("link")).unwrap();
    std::fs::create_dir(outputs.path().join("directory")).unwrap();
    let permissions = Permissions {
        arguments: ["-plugin", "-device vhost-vsock-pci", "-serial tcp"]
            .map(|text| text.parse().unwrap())
            .into(),
        output_dirs: vec![outputs.path().to_owned()],
        socket_dirs: vec![outputs.path().to_owned()],
        disk_drivers: vec!["nbd".to_owned()],
        listen: vec![[127, 0, 0, 1].into()],
        ..strict(files.path())
    };
    let place = outputs.path().display().to_string();
    let render = |line: &[&str], purpose| {
        let line: Vec<String> = line.iter().map(|word| word.replace("OUT", &place)).collect();
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        render(&line, &permissions, purpose).map(|rendered| words(&rendered).join(" ").replace(&place, "OUT"))
    };
    for line in [
        &["-plugin", "/opt/plugin.so"][..],
        &["-device", "vhost-vsock-pci,guest-cid=3"],
        &["-serial", "tcp:10.0.0.1:22"],
        &["-chardev", "file,id=c,path=OUT/console,append=on"],
        &["-drive", "file=nbd:unix:/run/other.sock"],
        &["-vnc", "127.0.0.1:5,password=on"],
        &["-vnc", "localhost:5"],
        &["-spice", "addr=127.0.0.1,port=5901"],
        &["-monitor", "telnet:127.0.0.1:4444,server=on,wait=off"],
    ] {
        assert_eq!(render(line, Purpose::Machine).unwrap(), line.join(" "));
    }
    for line in [
        &["-plugin", "/opt/plugin.so", "-device", "vhost-user-vsock-pci,chardev=c", "-frobnicate"][..],
        &["-chardev", "file,id=c,path=OUT/link"],
        &["-chardev", "file,id=c,path=OUT/directory"],
        &["-chardev", "file,id=c,path=OUT/../x"],
        &["-vnc", ":5"],
        &["-vnc", "127.0.0.2:5"],
        &["-spice", "port=5901"],
        &["-device", "vhost-vsock-pci-non-transitional,guest-cid=3"],
    ] {
        assert!(render(line, Purpose::Machine).is_err(), "{line:?}");
    }
    // What is only tried touches none of it.
    for (line, expected) in [
        (&["-chardev", "file,id=c,path=OUT/console,append=on,mux=on"][..], "-chardev null,id=c,mux=on"),
        (&["-serial", "file:OUT/console"], "-serial null"),
        (&["-chardev", "ringbuf,id=c,logfile=OUT/l,logappend=on"], "-chardev ringbuf,id=c"),
        (&["-vnc", "127.0.0.1:5,to=99,password=on"], "-vnc unix:/run/vmirror/vm.d/socket1,password=on"),
        (
            &["-spice", "addr=127.0.0.1,port=5901,ipv4=on,password-secret=s"],
            "-spice password-secret=s,unix=on,addr=/run/vmirror/vm.d/socket1",
        ),
        (
            &["-monitor", "telnet:127.0.0.1:4444,server,nowait"],
            "-monitor unix:/run/vmirror/vm.d/socket1,server=on,wait=off",
        ),
        (
            &["-chardev", "socket,id=c,host=127.0.0.1,port=4444,telnet=on,server=on"],
            "-chardev socket,id=c,server=on,path=/run/vmirror/vm.d/socket1,wait=off",
        ),
    ] {
        assert_eq!(render(line, Purpose::Rehearsal).unwrap(), expected, "{line:?}");
    }
    // A socket of somebody else's is looked for where there is none until the machine runs.
    assert_eq!(
        render(&["-chardev", "socket,id=c,path=OUT/agent"], Purpose::Machine).unwrap(),
        "-chardev socket,id=c,path=/run/vmirror/vm.d/socket1,reconnect=1"
    );
}

#[test]
fn the_remedy_is_the_very_key() {
    let files = tempfile::tempdir().unwrap();
    let remedy = |line: &[&str]| {
        let mut refused = render(line, &strict(files.path()), Purpose::Machine).unwrap_err();
        assert_eq!(refused.len(), 1, "{refused:?}");
        refused.remove(0).remedy
    };
    let arguments = |text: &str| Remedy::Arguments(text.parse().unwrap());
    assert_eq!(remedy(&["-device", "hv-syndbg"]), arguments("-device hv-syndbg"));
    assert_eq!(remedy(&["--trace", "x"]), arguments("-trace"));
    assert_eq!(remedy(&["-serial", "udp:10.0.0.1:53"]), arguments("-serial udp"));
    assert_eq!(remedy(&["-object", "x,y/id=/"]), arguments("-object x"));
    assert_eq!(remedy(&["-serial", "file:/var/log/s"]), Remedy::OutputDirs("/var/log".into()));
    assert_eq!(remedy(&["-serial", "unix:/run/s"]), Remedy::SocketDirs("/run".into()));
    assert_eq!(remedy(&["-L", "/usr/share/qemu"]), Remedy::FileDirs("/usr/share".into()));
    assert_eq!(remedy(&["-hda", "rbd:pool/image"]), Remedy::DiskDrivers("rbd".to_owned()));
    assert_eq!(remedy(&["-vnc", "localhost:1"]), Remedy::Listen("127.0.0.1".to_owned()));
    assert_eq!(remedy(&["-vnc", "[::1]:1"]), Remedy::Listen("::1".to_owned()));
    assert_eq!(remedy(&["-vnc", ":1"]), Remedy::Listen("0.0.0.0".to_owned()));
    assert!(matches!(remedy(&["-set", "drive.d.cache=none"]), Remedy::Start(_)));
}

#[test]
fn silence_means_no_window_no_listener_and_no_network() {
    let render = |words: &[&str], arguments: &[&str]| {
        let arguments = arguments.iter().map(|text| text.parse().unwrap()).collect();
        let permissions = Permissions { arguments, ..Permissions::default() };
        let how =
            Rendering { permissions: &permissions, directory: Path::new(OWN), purpose: Purpose::Machine };
        let rendered = Spec::parse(&[&["q"], words].concat()).unwrap().render(&how)?;
        Ok::<_, Vec<Refused>>(rendered.spec.to_argv()[1..].join(" "))
    };
    assert_eq!(
        render(&["-nic", "none"], &[]).unwrap(),
        "-nic none -display none -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -pidfile /run/vmirror/vm.d/pid"
    );
    assert_eq!(
        render(&["-nographic", "-nodefaults"], &[]).unwrap(),
        "-nographic -nodefaults -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -pidfile /run/vmirror/vm.d/pid"
    );
    let refused = render(&["-m", "64"], &[]).unwrap_err();
    assert_eq!(refused[0].remedy, Remedy::Arguments("-netdev user".parse().unwrap()));
    assert!(render(&["-m", "64"], &["-netdev user"]).is_ok());
}

/// Command lines as management programs make them, and what is in the way of each on a host that has allowed what such a host would.
#[test]
fn lines_of_management_programs_are_let_through_or_refused_with_a_remedy() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().display().to_string();
    let permissions = Permissions {
        socket_dirs: vec![place.path().to_owned()],
        listen: vec![[127, 0, 0, 1].into()],
        ..strict(place.path())
    };
    let refused = |line: &str| -> Vec<String> {
        let line = line.replace("DIR", &directory);
        let words: Vec<&str> = line.split_whitespace().collect();
        let how =
            Rendering { permissions: &permissions, directory: Path::new(OWN), purpose: Purpose::Machine };
        match Spec::parse(&words).unwrap().render(&how) {
            Ok(rendered) => {
                assert_eq!(rendered.spec.render(&how).unwrap().spec, rendered.spec);
                Vec::new()
            }
            Err(refused) => refused.into_iter().map(|refused| format!("{:?}", refused.remedy)).collect(),
        }
    };
    // Proxmox VE 8, `qm showcmd`.
    let proxmox = "/usr/bin/kvm -id 100 -name web,debug-threads=on -no-shutdown \
        -chardev socket,id=qmp,path=DIR/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
        -chardev socket,id=qmp-event,path=DIR/qmeventd.sock,reconnect=5 -mon chardev=qmp-event,mode=control \
        -pidfile DIR/100.pid -daemonize -smbios type=1,uuid=7b0c5cf2-2a54-4ea5-8b0d-1a2a1f7c1c11 \
        -smp 2,sockets=1,cores=2,maxcpus=2 -nodefaults -boot menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg \
        -vnc unix:DIR/100.vnc,password=on -cpu qemu64,+aes,enforce,+kvm_pv_eoi -m 2048 \
        -device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e -device vmgenid,guid=4a0f9c2e-0f65-4d1d-a6c8-0b9f0a51f6f1 \
        -device piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2 -device usb-tablet,id=tablet,bus=uhci.0,port=1 -device VGA,id=vga,bus=pci.0,addr=0x2 \
        -chardev socket,path=DIR/100.qga,server=on,wait=off,id=qga0 -device virtio-serial,id=qga0,bus=pci.0,addr=0x8 \
        -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0 -device virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3 \
        -iscsi initiator-name=iqn.1993-08.org.debian:01:a -drive file=DIR/vm-100.qcow2,if=none,id=drive-scsi0,format=qcow2,cache=none,aio=io_uring,detect-zeroes=on \
        -device virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5 -device scsi-hd,bus=scsihw0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100 \
        -netdev type=tap,id=net0,ifname=tap100i0,script=/usr/libexec/qemu-server/pve-bridge,downscript=/usr/libexec/qemu-server/pve-bridgedown,vhost=on \
        -device virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0 -machine type=pc-i440fx-8.1+pve0";
    assert_eq!(refused(proxmox), [r#"FileDirs("/usr/share/qemu-server")"#]);
    // libvirt 9 to 10, with its monitor on a path.
    let libvirt = r#"/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -S
        -object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-web/master-key.aes"}
        -machine pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram,hpet=off,acpi=on -accel kvm -cpu host,migratable=on
        -m size=4194304k -object {"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/dev/shm/web","share":true,"size":4294967296}
        -overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -uuid 6ba7b810-9dad-11d1-80b4-00c04fd430c8 -no-user-config -nodefaults
        -chardev socket,id=charmonitor,path=DIR/monitor.sock,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
        -rtc base=utc,driftfix=slew -global kvm-pit.lost_tick_policy=delay -no-shutdown -global ICH9-LPC.disable_s3=1 -boot strict=on
        -device {"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}
        -device {"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pci.1","addr":"0x0"}
        -blockdev {"driver":"file","filename":"DIR/web.qcow2","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}
        -blockdev {"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}
        -device {"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}
        -netdev {"type":"tap","ifname":"vnet0","vhost":true,"id":"hostnet0"} -device {"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:11:22:33"}
        -chardev pty,id=charserial0 -device {"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}
        -chardev spicevmc,id=charchannel0,name=vdagent -device {"driver":"virtserialport","chardev":"charchannel0","id":"channel0","name":"com.redhat.spice.0"}
        -audiodev {"id":"audio1","driver":"spice"} -spice port=5900,addr=127.0.0.1,disable-ticketing=on,image-compression=off,seamless-migration=on
        -device {"driver":"virtio-vga","id":"video0","max_outputs":1,"bus":"pcie.0","addr":"0x1"} -global ICH9-LPC.noreboot=off -watchdog-action reset
        -object {"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"} -device {"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0"}
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on"#;
    assert_eq!(refused(libvirt), [r#"FileDirs("/var/lib/libvirt/qemu/domain-1-web")"#]);
    // quickemu, with a network in user mode.
    let quickemu = "/usr/bin/qemu-system-x86_64 -name ubuntu,process=ubuntu -machine q35,smm=off,vmport=off,accel=kvm -global kvm-pit.lost_tick_policy=discard \
        -cpu host -smp cores=2,threads=2,sockets=1 -m 4G -device virtio-balloon -rtc base=localtime,clock=host,driftfix=slew -pidfile DIR/ubuntu.pid \
        -vga none -device virtio-vga,xres=1280,yres=800 -display sdl,gl=off -device virtio-rng-pci,rng=rng0 -object rng-random,id=rng0,filename=/dev/urandom \
        -device qemu-xhci,id=spicepass -chardev spicevmc,id=usbredirchardev1,name=usbredir -device usb-redir,chardev=usbredirchardev1,id=usbredirdev1 \
        -audiodev pa,id=audio0 -device intel-hda -device hda-micro,audiodev=audio0 -device usb-ehci,id=input -device usb-kbd,bus=input.0 -k en-us -device usb-tablet,bus=input.0 \
        -device virtio-net,netdev=nic -netdev user,hostname=ubuntu,hostfwd=tcp::22220-:22,id=nic \
        -drive if=pflash,format=raw,unit=0,file=DIR/OVMF_CODE_4M.fd,readonly=on -drive if=pflash,format=raw,unit=1,file=DIR/OVMF_VARS.fd \
        -drive media=cdrom,index=0,file=DIR/ubuntu.iso -device virtio-blk-pci,drive=SystemDisk -drive id=SystemDisk,if=none,format=qcow2,file=DIR/disk.qcow2 \
        -monitor unix:DIR/ubuntu-monitor.socket,server,nowait -serial unix:DIR/ubuntu-serial.socket,server,nowait";
    assert_eq!(refused(quickemu), [r#"Arguments(Allowed { option: "netdev", kind: Some("user") })"#]);
    // packer's builder.
    let packer = "/usr/bin/qemu-system-x86_64 -machine type=pc,accel=kvm -m 1024M -smp 1 -name packer -drive file=DIR/packer,if=virtio,cache=writeback,discard=ignore,format=qcow2 \
        -cdrom DIR/debian.iso -boot once=d -vnc 127.0.0.1:47 -device virtio-net,netdev=user.0 -netdev bridge,id=user.0,br=br0 -display gtk -vga std";
    assert_eq!(refused(packer), [""; 0]);
    // KubeVirt's virt-launcher: libvirt, with a block device, a serial console on a socket, and VNC on one.
    let kubevirt = r#"/usr/libexec/qemu-kvm -name guest=default_vm,debug-threads=on -S -machine pc-q35-rhel9.4.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,acpi=on -accel kvm
        -cpu Skylake-Server-IBRS,vmx=on -m size=1048576k -object {"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/dev/shm/x","share":true,"size":1073741824}
        -overcommit mem-lock=off -smp 1,sockets=1,dies=1,clusters=1,cores=1,threads=1 -object {"qom-type":"iothread","id":"iothread1"} -smbios type=1,manufacturer=KubeVirt,product=None,family=KubeVirt
        -no-user-config -nodefaults -chardev socket,id=charmonitor,path=DIR/monitor.sock,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc -no-shutdown -boot strict=on
        -device {"driver":"virtio-scsi-pci-non-transitional","id":"scsi0","bus":"pci.5","addr":"0x0"} -device {"driver":"virtio-serial-pci-non-transitional","id":"virtio-serial0","bus":"pci.6","addr":"0x0"}
        -blockdev {"driver":"host_device","filename":"DIR/rootdisk","node-name":"libvirt-1-storage","cache":{"direct":true,"no-flush":false},"auto-read-only":true,"discard":"unmap"}
        -blockdev {"node-name":"libvirt-1-format","read-only":false,"discard":"unmap","cache":{"direct":true,"no-flush":false},"driver":"raw","file":"libvirt-1-storage"}
        -device {"driver":"virtio-blk-pci-non-transitional","bus":"pci.7","addr":"0x0","drive":"libvirt-1-format","id":"ua-rootdisk","bootindex":1,"write-cache":"on","werror":"stop","rerror":"stop"}
        -netdev {"type":"tap","ifname":"tap0","vhost":true,"id":"hostua-default"} -device {"driver":"virtio-net-pci-non-transitional","host_mtu":1400,"netdev":"hostua-default","id":"ua-default","mac":"02:00:00:00:00:01","romfile":""}
        -chardev socket,id=charserial0,path=DIR/virt-serial0,server=on,wait=off,logfile=/var/run/kubevirt-private/virt-serial0-log,logappend=on
        -device {"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0} -audiodev {"id":"audio1","driver":"none"} -vnc vnc=unix:DIR/virt-vnc,audiodev=audio1
        -device {"driver":"VGA","id":"video0","vgamem_mb":16,"bus":"pcie.0","addr":"0x1"} -global ICH9-LPC.noreboot=off -watchdog-action reset -device {"driver":"virtio-balloon-pci-non-transitional","id":"balloon0","free-page-reporting":true}
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on"#;
    assert_eq!(refused(kubevirt), [r#"OutputDirs("/var/run/kubevirt-private")"#]);
}
