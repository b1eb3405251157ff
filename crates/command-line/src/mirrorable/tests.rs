use super::*;
use crate::ram_files::ram_place;

fn how() -> Mirrorable {
    Mirrorable {
        name: "web1".to_owned(),
        host: "host-a".to_owned(),
        ram_dir: PathBuf::from("/dev/shm"),
        qmp_socket: PathBuf::from("/run/v/web1,a.qmp"),
        pid_file: None,
    }
}

fn made(argv: &[&str]) -> Result<Vec<String>, NotMirrorable> {
    let mut spec = Spec::parse(&[&["q"], argv].concat()).unwrap();
    let before = spec.clone();
    match spec.make_mirrorable(&how()) {
        Ok(()) => Ok(spec.to_argv()[1..].to_vec()),
        Err(error) => {
            assert_eq!(spec, before, "a refused machine must stay as it was");
            Err(error)
        }
    }
}

const OWN: [&str; 4] = [
    "-chardev",
    "socket,id=vmirror-qmp,path=/run/v/web1,,a.qmp,server=on,wait=off",
    "-mon",
    "chardev=vmirror-qmp,mode=control",
];

#[test]
fn plain_memory_gets_a_backend() {
    let argv = made(&["-M", "q35,accel=tcg", "-m", "512", "-daemonize"]).unwrap();
    let expected = [
        "-M",
        "q35,accel=tcg,memory-backend=pc.ram",
        "-m",
        "512",
        "-object",
        "memory-backend-file,id=pc.ram,size=536870912B,mem-path=/dev/shm/vmirror-host-a/vmirror-web1@pc.ram,share=on",
    ];
    assert_eq!(argv, [expected.as_slice(), &OWN].concat());
    let argv = made(&["-m", "1G", "-mem-path", "/nonexistent/x"]).unwrap();
    assert!(argv.contains(&"memory-backend=pc.ram".to_owned()) && !argv.contains(&"-mem-path".to_owned()));
}

#[test]
fn named_backends_become_shared_files() {
    let argv = made(&[
        "-m",
        "2G",
        "-object",
        "memory-backend-ram,id=n0,size=1G,policy=bind,host-nodes=0",
        "-object",
        r#"{"qom-type":"memory-backend-memfd","id":"n1","size":1073741824,"share":true,"seal":true}"#,
        "-numa",
        "node,memdev=n0",
        "-numa",
        "node,memdev=n1",
    ])
    .unwrap();
    assert_eq!(
        argv[3],
        "memory-backend-file,id=n0,size=1G,policy=bind,host-nodes=0,share=on,mem-path=/dev/shm/vmirror-host-a/vmirror-web1@n0"
    );
    let second: serde_json::Value = serde_json::from_str(&argv[5]).unwrap();
    assert_eq!(
        second,
        serde_json::json!({"qom-type":"memory-backend-file","id":"n1","size":1_073_741_824,"share":true,
            "mem-path":"/dev/shm/vmirror-host-a/vmirror-web1@n1"})
    );
    assert!(!argv.iter().any(|word| word.contains("memory-backend=")));
}

#[test]
fn a_shared_named_file_stays_where_it_is() {
    let object = "memory-backend-file,id=r,size=64M,share=on,mem-path=/dev/shm/my.ram";
    let argv = made(&["-machine", "pc,memory-backend=r", "-m", "64", "-object", object]).unwrap();
    assert_eq!(argv[5], object);
}

#[test]
fn making_it_mirrorable_twice_changes_nothing_more() {
    let mut spec = Spec::parse(&["q", "-m", "64"]).unwrap();
    spec.make_mirrorable(&how()).unwrap();
    let once = spec.clone();
    spec.make_mirrorable(&how()).unwrap();
    assert_eq!(spec, once);
    assert_eq!(spec.own_qmp_socket(), Some(how().qmp_socket));
}

#[test]
fn refusals_name_the_option() {
    let table: &[(&[&str], &str)] = &[
        (&["-incoming", "defer"], "-incoming defer cannot be used"),
        (&["-loadvm", "x"], "-loadvm x cannot be used"),
        (&["-snapshot"], "-snapshot cannot be used"),
        (&["-drive", "file=/d,snapshot=on"], "-drive file=/d,snapshot=on cannot be used"),
        (&["-readconfig", "f"], "-readconfig f cannot be used"),
        (&["-device", "vfio-pci,host=1"], "tied to this host: -device vfio-pci,host=1"),
        (&["-mem-path", "/dev/shm"], "RAM pc.ram is in directory /dev/shm"),
        (&["-object", "memory-backend-file,id=a,size=1M,mem-path=/tmp"], "RAM a is in directory /tmp"),
        (&["-object", "memory-backend-memfd,id=a,size=2M,hugetlb=on"], "RAM a is to have huge pages"),
        (&["-object", "memory-backend-odd,id=a,size=2M"], "RAM a has a backend of unknown kind"),
        (
            &["-object", "memory-backend-file,id=a,size=1M,mem-path=/proc/self/exe,share=off"],
            "RAM a is a private copy",
        ),
        (&["-netdev", "tap,id=n,fd=7"], "-netdev tap,id=n,fd=7 uses a descriptor"),
        (&["-add-fd", "fd=3,set=1"], "-add-fd fd=3,set=1 uses a descriptor"),
    ];
    for (argv, message) in table {
        let error = made(argv).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    let bad = Mirrorable { name: "../x".to_owned(), ..how() };
    assert!(matches!(Spec::parse(&["q"]).unwrap().make_mirrorable(&bad), Err(NotMirrorable::Name { .. })));
}

#[test]
fn where_a_ram_file_was_put_is_not_the_agents_own_directory() {
    for (file, place) in [
        ("/dev/shm/vmirror-host-a/vmirror-web1@pc.ram", "/dev/shm"),
        ("/dev/shm/vmirror-web1@pc.ram", "/dev/shm"),
        ("/dev/shm/web1", "/dev/shm"),
        ("/mnt/vmirror-huge/web1", "/mnt/vmirror-huge"),
    ] {
        assert_eq!(ram_place(Path::new(file)), Some(Path::new(place)), "{file}");
    }
    assert_eq!(
        ram_file(Path::new("/r"), "host b/..", "web1", "m0"),
        Path::new("/r/vmirror-host_b_../vmirror-web1@m0")
    );
}

#[test]
fn a_socket_that_would_be_waited_at_is_not() {
    let argv = made(&[
        "-serial",
        "unix:/a,,b,server",
        "-monitor",
        "mon:telnet:127.0.0.1:4444,server=on,wait=on",
        "-chardev",
        "socket,id=c,path=/c,server=on",
        "-chardev",
        r#"socket,id=d,path=/d,server,nowait"#,
        "-chardev",
        "socket,id=e,path=/e",
        "-qmp",
        "unix:/q,server,nowait",
    ])
    .unwrap();
    for word in [
        "unix:/a,,b,server,wait=off",
        "mon:telnet:127.0.0.1:4444,server=on,wait=off",
        "socket,id=c,path=/c,server=on,wait=off",
        "socket,id=d,path=/d,server,nowait",
        "socket,id=e,path=/e",
        "unix:/q,server,nowait",
    ] {
        assert!(argv.iter().any(|found| found == word), "{word} in {argv:?}");
    }
}

/// Found by the fuzz target `command_line`.
#[test]
fn what_is_taken_away_makes_no_disk_the_value_of_an_option_that_is_not_known() {
    let argv = ["q", "-later", "-much-later", "-pidfile", "/a", "disk.img", "-display", "none"];
    let mut spec = Spec::parse(&argv).unwrap();
    let disks = spec.disks();
    assert_eq!(disks.len(), 1);
    spec.make_mirrorable(&Mirrorable { pid_file: Some("/b".into()), ..how() }).unwrap();
    assert_eq!(Spec::parse(&spec.to_argv()).unwrap(), spec, "read in one way");
    assert_eq!(spec.disks(), disks);
    let waits = Spec::parse(&["q", "-later", "-incoming", "defer", "disk.img"]).unwrap();
    let runs = waits.without_incoming();
    assert_eq!(Spec::parse(&runs.to_argv()).unwrap(), runs, "read in one way");
    assert_eq!(runs.disks(), waits.disks());
}

#[test]
fn the_pid_file_asked_for_replaces_the_users() {
    let mut spec = Spec::parse(&["q", "-pidfile", "/a"]).unwrap();
    spec.make_mirrorable(&how()).unwrap();
    assert_eq!(spec.pid_file(), Some(Path::new("/a")));
    spec.make_mirrorable(&Mirrorable { pid_file: Some("/b".into()), ..how() }).unwrap();
    assert_eq!(spec.pid_file(), Some(Path::new("/b")));
}
