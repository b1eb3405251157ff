//! The RAM files of machines, as their command lines name them: each is read once, not once for every reservation.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use qemu::Spec;
use qemu::spec::ram_place;

use crate::vm::Record;
use ownership::VmName;

/// Directory and size of a RAM file, and the file.
pub(crate) type RamFile = (PathBuf, u64, PathBuf);

/// Those that a command line names.
pub(crate) fn read(argv: &[String]) -> Vec<RamFile> {
    let backends = Spec::parse(argv).map(|spec| spec.ram_backends()).unwrap_or_default();
    let file = |ram: qemu::RamBackend| {
        let file = ram.named_file()?.to_owned();
        Some((place(&file)?, ram.size, file))
    };
    backends.into_iter().filter_map(file).collect()
}

/// What the command lines of machines say of them.
#[derive(Debug, Default)]
pub struct RamFiles(Mutex<HashMap<VmName, Read>>);

/// A command line, and the RAM files that it names.
type Read = (Vec<String>, Vec<RamFile>);

impl RamFiles {
    /// Those of these machines; others are not remembered any longer.
    pub(crate) fn of(&self, records: Vec<Record>, read: impl Fn(&[String]) -> Vec<RamFile>) -> Vec<RamFile> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *known);
        for Record { name, argv, .. } in records {
            let read = match before.remove(&name) {
                Some((same, files)) if same == argv => files,
                _ => read(&argv),
            };
            known.insert(name, (argv, read));
        }
        known.values().flat_map(|(_, files)| files.iter().cloned()).collect()
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
            let sizes = files.of(records, |argv| {
                read.set(read.get() + 1);
                vec![("/dev/shm".into(), argv[2].parse().unwrap(), format!("/dev/shm/{}", argv[2]).into())]
            });
            let mut sizes: Vec<u64> = sizes.into_iter().map(|(_, size, _)| size).collect();
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
}
