//! The RAM of machines, as their command lines have it: each is read once, not once for every reservation.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use qemu::spec::ram_place;
use qemu::{Process, Spec, huge_page_size};

use crate::vm::Record;
use ownership::VmName;

/// Directory and size of a RAM file, and the file.
pub(crate) type RamFile = (PathBuf, u64, PathBuf);

/// What a machine has of RAM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MachineRam {
    /// In files.
    pub(crate) files: Vec<RamFile>,
    /// In ordinary pages without a named file, as a QEMU has it that was started by others: bytes.
    pub(crate) unnamed: u64,
}

/// What a command line says of RAM.
pub(crate) fn read(argv: &[String]) -> MachineRam {
    let backends = Spec::parse(argv).map(|spec| spec.ram_backends()).unwrap_or_default();
    let mut ram = MachineRam::default();
    for backend in backends {
        if let Some(file) = backend.named_file() {
            ram.files.extend(place(file).map(|place| (place, backend.size, file.to_owned())));
        } else if !backend.hugetlb && backend.mem_path.as_deref().and_then(huge_page_size).is_none() {
            ram.unnamed = ram.unnamed.saturating_add(backend.size);
        }
    }
    ram
}

/// What the command lines of machines say of it.
#[derive(Debug, Default)]
pub struct RamFiles(Mutex<HashMap<VmName, Read>>);

/// A command line, and the RAM that it names.
type Read = (Vec<String>, MachineRam);

impl RamFiles {
    /// That of these machines, each with its process; others are not remembered any longer.
    pub(crate) fn of(
        &self,
        records: Vec<Record>,
        read: impl Fn(&[String]) -> MachineRam,
    ) -> Vec<(Option<Process>, MachineRam)> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *known);
        let one = |Record { name, argv, process, .. }: Record| {
            let ram = match before.remove(&name) {
                Some((same, ram)) if same == argv => ram,
                _ => read(&argv),
            };
            known.insert(name, (argv, ram.clone()));
            (process, ram)
        };
        records.into_iter().map(one).collect()
    }
}

/// The directory that says of which memory a RAM file is: one that is there before the file is made.
pub(crate) fn place(file: &Path) -> Option<PathBuf> {
    ram_place(file).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_command_line_is_read_once_and_again_when_it_has_changed() {
        let record = |name: &str, memory: &str| -> Record {
            serde_json::from_value(serde_json::json!({
                "name": name, "generation": 0, "ownership": "owner", "origin": "run", "arrived_by": null, "resuming": false,
                "process": null, "argv": ["qemu", "-m", memory], "qmp_socket": "/q", "memory": 0,
                "made": { "files": [], "taps": [] },
            }))
            .unwrap()
        };
        let read = Cell::new(0);
        let of = |files: &RamFiles, records: Vec<Record>| {
            let found = files.of(records, |argv| {
                read.set(read.get() + 1);
                MachineRam { files: Vec::new(), unnamed: argv[2].parse().unwrap() }
            });
            let mut sizes: Vec<u64> = found.into_iter().map(|(_, ram)| ram.unnamed).collect();
            sizes.sort_unstable();
            (sizes, read.take())
        };
        let files = RamFiles::default();
        assert_eq!(of(&files, vec![record("a", "1"), record("b", "2")]), (vec![1, 2], 2));
        assert_eq!(of(&files, vec![record("a", "1"), record("b", "2")]), (vec![1, 2], 0));
        assert_eq!(of(&files, vec![record("a", "3"), record("b", "2")]), (vec![2, 3], 1));
        assert_eq!(of(&files, vec![record("b", "2")]), (vec![2], 0));
        assert_eq!(of(&files, vec![record("a", "3")]), (vec![3], 1), "one that had gone is not remembered");
    }

    #[test]
    fn ram_without_a_named_file_counts_unless_it_is_in_a_pool_of_its_own() {
        let ram = |line: &str| read(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(ram("qemu -m 128").unnamed, 128 << 20);
        let memfd = "qemu -m 64 -object memory-backend-memfd,id=m,size=64M -machine memory-backend=m";
        assert_eq!(ram(memfd).unnamed, 64 << 20);
        assert_eq!(ram(&memfd.replace("size=64M", "size=64M,hugetlb=on")).unnamed, 0);
        let named = "qemu -m 64 -object memory-backend-file,id=m,size=64M,share=on,mem-path=/dev/shm/x -machine memory-backend=m";
        assert_eq!((ram(named).unnamed, ram(named).files.len()), (0, 1));
    }
}
