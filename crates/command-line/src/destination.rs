//! The same machine for another host.

use std::path::{Path, PathBuf};

use crate::argument::Argument;
use crate::known::SHORT_CHARDEVS;
use crate::memory::RamKind;
use crate::mirrorable::{NotMirrorable, check_name, check_ram_ids, into_shared_file};
use crate::network::NicKind;
use crate::options::{Properties, escape};
use crate::ram_files::ram_file;
use crate::spec::Spec;

/// What differs at the host that a VM moves to.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The VM's name, part of the RAM files' names.
    pub name: String,
    /// QEMU there.
    pub binary: PathBuf,
    /// The versioned machine type that the source's QEMU runs, such as `pc-q35-7.2`: an alias like `q35` means another
    /// machine in another version of QEMU.
    pub machine: String,
    /// That host's name: RAM files are in a directory there that is called after it.
    pub host: String,
    /// Directory in which that is.
    pub ram_dir: PathBuf,
    /// Directories on hugetlbfs for RAM that must have huge pages, by the id of its backend, where that is not `ram_dir`.
    pub huge_dirs: Vec<(String, PathBuf)>,
    /// Where QEMU shall listen for us there.
    pub qmp_socket: PathBuf,
    /// Tap interfaces that are made ready there, by the back end that uses each ([`super::Nic::netdev`]).
    pub taps: Vec<(String, String)>,
    /// Macvtaps there, which QEMU can only be given: the numbers of its descriptors, one for each queue, by the back end.
    pub macvtaps: Vec<(String, Vec<i32>)>,
}

impl Spec {
    /// The command line that runs this machine at another host, waiting for its state: other binary, machine type
    /// pinned, RAM files and our sockets where that host has them, taps as they are prepared there. The user's own
    /// sockets, pidfile and logs stay; output files are appended to and never truncated. QEMU is started with what
    /// [`Spec::render`] makes of it.
    ///
    /// # Errors
    /// Names what cannot be carried over.
    pub fn for_destination(&self, how: &Destination) -> Result<Spec, NotMirrorable> {
        check_name(&how.name)?;
        check_ram_ids(self)?;
        self.check_portable()?;
        let mut spec = self.without_incoming();
        for option in ["loadvm", "daemonize"] {
            spec.remove_all(option);
        }
        spec.binary.clone_from(&how.binary);
        spec.pin_machine(&how.machine);
        spec.move_ram(how)?;
        spec.set_own_qmp(&how.qmp_socket);
        spec.connect_taps(&how.taps)?;
        let macvtaps = spec.connect_macvtaps(&how.macvtaps)?;
        if let Some(option) = spec.uses_of_descriptors(true).into_iter().next() {
            return Err(NotMirrorable::Descriptor { option });
        }
        for (at, properties) in macvtaps {
            spec.store(at, &properties);
        }
        spec.append_to_files();
        spec.arguments.push(Argument::with_value("-incoming", "defer"));
        spec.arguments.push(Argument::option("-S", None));
        Ok(spec)
    }

    fn pin_machine(&mut self, machine: &str) {
        let typed: Vec<(usize, Properties)> =
            self.all("machine").filter(|(_, properties)| properties.get("type").is_some()).collect();
        if typed.is_empty() {
            self.arguments.push(Argument::with_value("-machine", machine));
        }
        for (at, mut properties) in typed {
            properties.set("type", machine);
            self.store(at, &properties);
        }
    }

    /// All RAM is in shared files there that are the agent's, whatever it is in here.
    fn move_ram(&mut self, how: &Destination) -> Result<(), NotMirrorable> {
        let odd = self.ram_backends().into_iter().find_map(|backend| match backend.kind {
            RamKind::Other(kind) => Some(NotMirrorable::UnknownBackend { id: backend.id, kind }),
            _ => None,
        });
        if let Some(odd) = odd {
            return Err(odd);
        }
        // Before the others, as here.
        self.name_implicit_ram(0, Path::new(""));
        let objects: Vec<(usize, Properties)> = self.all("object").collect();
        for (at, mut object) in objects {
            if object.get("qom-type").is_some_and(|kind| kind.starts_with("memory-backend-")) {
                into_shared_file(&mut object);
                // Of a file that is nobody's but the machine's.
                for key in ["readonly", "rom"] {
                    object.remove(key);
                }
                self.store(at, &object);
            }
        }
        let objects: Vec<(usize, Properties)> = self.all("object").collect();
        for (at, mut object) in objects {
            if object.get("qom-type").as_deref() == Some("memory-backend-file") {
                let id = object.get("id").unwrap_or_default();
                let huge = how.huge_dirs.iter().find(|(of, _)| *of == id);
                let directory = huge.map_or(&how.ram_dir, |(_, directory)| directory);
                let path = ram_file(directory, &how.host, &how.name, &id);
                object.set("mem-path", &path.to_string_lossy());
                // The file there is ours alone, so the RAM begins at its beginning.
                object.remove("offset");
                self.store(at, &object);
            }
        }
        Ok(())
    }

    fn connect_taps(&mut self, taps: &[(String, String)]) -> Result<(), NotMirrorable> {
        for (netdev, ifname) in taps {
            let (at, mut properties, queues) = self.tap_backend(netdev, ifname)?;
            connect_tap(&mut properties, ifname, queues);
            self.store(at, &properties);
        }
        Ok(())
    }

    /// Takes the source's descriptors off the command line. Returns what is to be there in their place.
    fn connect_macvtaps(
        &mut self,
        macvtaps: &[(String, Vec<i32>)],
    ) -> Result<Vec<(usize, Properties)>, NotMirrorable> {
        let mut connected = Vec::new();
        for (netdev, descriptors) in macvtaps {
            let (at, mut properties, _) = self.tap_backend(netdev, "by descriptor")?;
            disconnect(&mut properties);
            self.store(at, &properties);
            let key = if descriptors.len() > 1 { "fds" } else { "fd" };
            let numbers: Vec<String> = descriptors.iter().map(i32::to_string).collect();
            properties.set(key, &numbers.join(":"));
            connected.push((at, properties));
        }
        Ok(connected)
    }

    /// A back end that can be given a tap: where it is, its properties, and how many queues it has.
    fn tap_backend(&self, netdev: &str, tap: &str) -> Result<(usize, Properties, u32), NotMirrorable> {
        let mut backends = self.backends().into_iter();
        let found = backends.find(|(at, properties)| self.backend_key(*at, properties) == netdev);
        let Some((at, properties)) = found else {
            return Err(NotMirrorable::Option {
                option: format!("tap {tap} for {netdev}"),
                why: "the machine has no such network back end",
            });
        };
        match self.nics().into_iter().find(|nic| nic.netdev == netdev) {
            Some(nic) if matches!(nic.kind, NicKind::Tap { .. } | NicKind::Bridge { .. }) => {
                Ok((at, properties, nic.queues))
            }
            _ => Err(NotMirrorable::Option {
                option: self.arguments[at].to_string(),
                why: "only tap and bridge back ends can be given a tap",
            }),
        }
    }

    /// Output files of the machine go on where the source stopped.
    fn append_to_files(&mut self) {
        let chardevs: Vec<(usize, Properties)> = self.all("chardev").collect();
        for (at, mut chardev) in chardevs {
            let is_file = chardev.get("backend").as_deref() == Some("file");
            let is_logged = chardev.get("logfile").is_some();
            if is_file {
                chardev.set_bool("append", true);
            }
            if is_logged {
                chardev.set_bool("logappend", true);
            }
            if is_file || is_logged {
                self.store(at, &chardev);
            }
        }
        // `-serial file:PATH` and its kin truncate, and the short form cannot say otherwise.
        for at in 0..self.arguments.len() {
            if !SHORT_CHARDEVS.contains(&self.arguments[at].name()) {
                continue;
            }
            let Some(path) =
                self.arguments[at].value().and_then(|value| value.strip_prefix("file:")).map(escape)
            else {
                continue;
            };
            let id = self.free_chardev_id();
            self.arguments[at].value = Some(format!("chardev:{id}"));
            self.arguments
                .push(Argument::with_value("-chardev", format!("file,id={id},path={path},append=on")));
        }
    }

    fn free_chardev_id(&self) -> String {
        let used: Vec<String> = self.all("chardev").filter_map(|(_, chardev)| chardev.get("id")).collect();
        let mut number = 0;
        loop {
            let id = format!("vmirror-file{number}");
            if !used.contains(&id) {
                return id;
            }
            number += 1;
        }
    }
}

fn connect_tap(properties: &mut Properties, ifname: &str, queues: u32) {
    let handed_in = ["fds", "vhostfd", "vhostfds"].iter().any(|key| properties.get(key).is_some());
    disconnect(properties);
    properties.set("ifname", ifname);
    properties.set("script", "no");
    properties.set("downscript", "no");
    if handed_in && queues > 1 {
        properties.set_number("queues", u64::from(queues));
    }
}

/// Makes a back end one that is to be given a tap. QEMU opens vhost-net itself where it is not given that either.
fn disconnect(properties: &mut Properties) {
    let vhost = ["vhostfd", "vhostfds"].iter().any(|key| properties.get(key).is_some());
    properties.set("type", "tap");
    for key in ["fd", "fds", "vhostfd", "vhostfds", "br", "helper"] {
        properties.remove(key);
    }
    if vhost {
        properties.set_bool("vhost", true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn how(taps: &[(&str, &str)]) -> Destination {
        Destination {
            name: "web1".to_owned(),
            binary: "/opt/qemu".into(),
            machine: "pc-q35-7.2".to_owned(),
            host: "host b".to_owned(),
            ram_dir: "/mnt/ram".into(),
            huge_dirs: Vec::new(),
            qmp_socket: "/run/d/web1.qmp".into(),
            taps: taps.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect(),
            macvtaps: Vec::new(),
        }
    }

    const RAM: [&str; 6] = [
        "q",
        "-machine",
        "q35,accel=tcg,memory-backend=pc.ram",
        "-object",
        "memory-backend-file,id=pc.ram,size=64M,share=on,mem-path=/dev/shm/x,offset=4096",
        "-nodefaults",
    ];

    fn moved(argv: &[&str], taps: &[(&str, &str)]) -> Result<Vec<String>, NotMirrorable> {
        Ok(Spec::parse(&[&RAM, argv].concat()).unwrap().for_destination(&how(taps))?.to_argv())
    }

    #[test]
    fn ram_machine_sockets_and_waiting() {
        let argv =
            moved(&["-daemonize", "-loadvm", "s", "-qmp", "unix:/u,server,nowait", "-pidfile", "/p"], &[])
                .unwrap();
        let expected = [
            "/opt/qemu",
            "-machine",
            "pc-q35-7.2,accel=tcg,memory-backend=pc.ram",
            "-object",
            "memory-backend-file,id=pc.ram,size=64M,share=on,mem-path=/mnt/ram/vmirror-host_b/vmirror-web1@pc.ram",
            "-nodefaults",
            "-qmp",
            "unix:/u,server,nowait",
            "-pidfile",
            "/p",
            "-chardev",
            "socket,id=vmirror-qmp,path=/run/d/web1.qmp,server=on,wait=off",
            "-mon",
            "chardev=vmirror-qmp,mode=control",
            "-incoming",
            "defer",
            "-S",
        ];
        assert_eq!(argv, expected);
    }

    #[test]
    fn huge_pages_go_where_the_destination_has_them() {
        let huge_dirs = vec![("pc.ram".to_owned(), "/mnt/huge".into())];
        let spec = Spec::parse(&RAM).unwrap();
        let moved = spec.for_destination(&Destination { huge_dirs, ..how(&[]) }).unwrap();
        let path = moved.ram_backends()[0].mem_path.clone();
        assert_eq!(path, Some("/mnt/huge/vmirror-host_b/vmirror-web1@pc.ram".into()));
        let odd = RAM.map(|word| word.replace("pc.ram", "../ram"));
        let refused = Spec::parse(&odd).unwrap().for_destination(&how(&[]));
        assert_eq!(refused, Err(NotMirrorable::Name { name: "../ram".to_owned() }));
    }

    #[test]
    fn a_machine_can_move_on_from_where_it_arrived() {
        let source = Spec::parse(&[RAM.as_slice(), &["-S", "-serial", "file:/log"]].concat()).unwrap();
        let first = source.for_destination(&how(&[])).unwrap();
        let second = first.for_destination(&how(&[])).unwrap();
        assert_eq!(first, second);
        let arrived = first.without_incoming();
        assert!(!arrived.is_incoming());
        assert_eq!(
            arrived.to_argv().iter().filter(|word| *word == "-S").count(),
            1,
            "the user's own -S stays"
        );
        assert_eq!(arrived.for_destination(&how(&[])).unwrap(), first);
    }

    #[test]
    fn output_files_are_appended_to() {
        let argv = moved(
            &[
                "-serial",
                "file:/a,b",
                "-chardev",
                "file,id=c,path=/c",
                "-chardev",
                "socket,id=s,path=/s,server=on,logfile=/l",
            ],
            &[],
        )
        .unwrap();
        for word in [
            "chardev:vmirror-file0",
            "file,id=vmirror-file0,path=/a,,b,append=on",
            "file,id=c,path=/c,append=on",
            "socket,id=s,path=/s,server=on,logfile=/l,logappend=on",
        ] {
            assert!(argv.iter().any(|found| found == word), "{word} in {argv:?}");
        }
    }

    #[test]
    fn taps_of_the_destination() {
        let argv = moved(
            &[
                "-netdev",
                "bridge,id=n0,br=lan",
                "-netdev",
                r#"{"type":"tap","fds":"30:31","vhost":true,"vhostfds":"32:33","id":"n1"}"#,
                "-nic",
                "tap,ifname=old,script=/x,model=e1000",
            ],
            &[("n0", "t0"), ("n1", "t1"), ("#nic0", "t2")],
        )
        .unwrap();
        let has = |word: &str| argv.iter().any(|found| found == word);
        assert!(has("tap,id=n0,ifname=t0,script=no,downscript=no"), "{argv:?}");
        assert!(has("tap,ifname=t2,script=no,model=e1000,downscript=no"), "{argv:?}");
        let json: serde_json::Value =
            serde_json::from_str(argv.iter().find(|word| word.starts_with('{')).unwrap()).unwrap();
        let expected = serde_json::json!({"type":"tap","vhost":true,"id":"n1","ifname":"t1","script":"no","downscript":"no","queues":2});
        assert_eq!(json, expected);
    }

    #[test]
    fn macvtaps_of_the_destination() {
        let given = |argv: &[&str], descriptors: &[i32]| {
            let macvtaps = vec![("n0".to_owned(), descriptors.to_vec())];
            let spec = Spec::parse(&[&RAM, argv].concat()).unwrap();
            let moved = spec.for_destination(&Destination { macvtaps, ..how(&[]) })?;
            Ok::<_, NotMirrorable>(moved.to_argv())
        };
        let one = given(&["-netdev", "tap,id=n0,fd=3,vhost=on,vhostfd=4"], &[31]).unwrap();
        assert!(one.iter().any(|word| word == "tap,id=n0,vhost=on,fd=31"), "{one:?}");
        let two = given(&["-netdev", "tap,id=n0,fds=3:4"], &[31, 35]).unwrap();
        assert!(two.iter().any(|word| word == "tap,id=n0,fds=31:35"), "{two:?}");
        let other = ["-netdev", "tap,id=n0,fd=3", "-netdev", "tap,id=n1,fd=5"];
        let refused = given(&other, &[31]).unwrap_err();
        assert_eq!(
            refused,
            NotMirrorable::Descriptor { option: "-netdev tap,id=n1,fd=5".to_owned() },
            "of one that is given, and one that is not"
        );
    }

    #[test]
    fn refusals() {
        let refused = |argv: &[&str], taps: &[(&str, &str)]| moved(argv, taps).unwrap_err().to_string();
        assert!(refused(&["-netdev", "tap,id=n,fd=3"], &[]).contains("uses a descriptor"));
        assert!(refused(&[], &[("n", "t")]).contains("no such network back end"));
        assert!(refused(&["-netdev", "user,id=n"], &[("n", "t")]).contains("only tap and bridge"));
        assert!(refused(&["-device", "vfio-pci"], &[]).contains("vfio-pci"));
        let odd =
            Spec::parse(&["q", "-object", "memory-backend-odd,id=e,size=1M", "-machine", "memory-backend=e"])
                .unwrap();
        assert_eq!(
            odd.for_destination(&how(&[])),
            Err(NotMirrorable::UnknownBackend { id: "e".to_owned(), kind: "odd".to_owned() })
        );
    }

    #[test]
    fn the_machine_type_is_pinned_where_there_was_none() {
        let spec = Spec::parse(&[
            "q",
            "-machine",
            "memory-backend=r",
            "-object",
            "memory-backend-file,id=r,size=1M,share=on,mem-path=/x",
        ]);
        let moved = spec.unwrap().for_destination(&how(&[])).unwrap();
        assert_eq!(moved.machine(), Some("pc-q35-7.2"));
        assert_eq!(moved.binary(), Path::new("/opt/qemu"));
    }
}
