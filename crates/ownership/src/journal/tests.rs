use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, PermissionsExt as _};

use super::slots::{HEADER, SLOT, newest, whole};
use super::*;
use crate::testing::Plain as Record;
use crate::{Outgoing, Ownership};

fn record(name: &str, generation: u64) -> Record {
    Record {
        generation,
        content: vec!["qemu".into(), "x".repeat(generation as usize * 10)],
        ..Record::new(name.parse().unwrap())
    }
}

/// Puts the record of this generation in the place of the one before it.
fn rewrite(journal: &Journal<Record>, name: &str, generation: u64) {
    let before = journal.get(&name.parse().unwrap()).unwrap();
    journal.change(&claim_of(&before), |now| *now = record(name, generation)).unwrap();
}

/// Forgets a machine that nobody has decided about.
fn forget(journal: &Journal<Record>, name: &str) {
    let name = name.parse().unwrap();
    let mark = journal.get(&name).unwrap().standing().mark();
    journal.remove(&name, mark).unwrap();
}

/// Why the only record cannot be read, and that its name is taken all the same, and the others' are not.
fn unreadable(state_dir: &Path) -> JournalError {
    let mut journal = Journal::<Record>::open(state_dir).unwrap();
    assert!(journal.all().is_empty() && journal.get(&"a".parse().unwrap()).is_none());
    assert!(matches!(journal.claim(record("a", 1)), Err(JournalError::Unreadable(_))));
    journal.claim(record("other", 1)).unwrap();
    let (name, error) = journal.unreadable.pop().unwrap();
    assert_eq!(name.as_ref(), "a");
    journal.remove(&"other".parse().unwrap(), None).unwrap();
    error
}

#[test]
fn what_was_written_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(record("a", 1)).unwrap();
    journal.claim(record("b", 1)).unwrap();
    for generation in 2..9 {
        rewrite(&journal, "a", generation);
    }
    journal.remove(&"b".parse().unwrap(), None).unwrap();
    drop(journal);
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    assert_eq!(journal.all(), [record("a", 8)]);
    assert!(matches!(journal.claim(record("a", 1)), Err(JournalError::NameTaken(_))));
    assert!(matches!(journal.amend(&mut record("b", 1), |_| {}), Err(JournalError::Unknown(_))));
}

#[test]
fn a_hand_over_is_not_forgotten_with_its_machine() {
    let directory = tempfile::tempdir().unwrap();
    let (owned, copied) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(Record { arrived_by: Some(owned), ..record("a", 1) }).unwrap();
    let ownership = Ownership::Incoming { session: copied, from: "host".into(), ready: true };
    journal.claim(Record { arrived_by: Some(copied), ownership, ..record("b", 1) }).unwrap();
    assert_eq!(journal.mark(owned).unwrap(), None, "it is still here");
    forget(&journal, "a");
    forget(&journal, "b");
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    assert_eq!(journal.mark(owned).unwrap(), Some(Mark::Ran));
    assert_eq!(
        journal.mark(copied).unwrap(),
        Some(Mark::NeverRan),
        "it was complete, and never was this host's"
    );
    assert_eq!(journal.mark(Uuid::from_u128(3)).unwrap(), None);
    journal.released(owned);
    assert_eq!(journal.mark(owned).unwrap(), None, "its source does not ask any more");
}

#[test]
fn a_machine_that_ended_while_it_lacked_memory_is_not_remembered_as_one_that_had_all() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    let supplied = crate::Supplied { faults: 3, longest_us: 5, total_us: 9, taken_over: false };
    let [lacking, whole, neither] = [1, 2, 3].map(Uuid::from_u128);
    let arrived = |name, session| Record { arrived_by: Some(session), ..record(name, 1) };
    journal.claim(Record { lacks: true, ..arrived("a", lacking) }).unwrap();
    journal.claim(Record { supplied: Some(supplied), ..arrived("b", whole) }).unwrap();
    journal.claim(arrived("c", neither)).unwrap();
    for name in ["a", "b", "c"] {
        assert_eq!(journal.departed(lacking).unwrap().is_some(), name != "a");
        forget(&journal, name);
    }
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    assert_eq!(journal.departed(lacking).unwrap(), Some(Departed { lacked: true, supplied: None }));
    assert_eq!(journal.departed(whole).unwrap(), Some(Departed { lacked: false, supplied: Some(supplied) }));
    assert_eq!(journal.departed(neither).unwrap(), Some(Departed::default()));
    // A mark as earlier versions made it.
    std::fs::write(directory.path().join("departed").join(whole.to_string()), "").unwrap();
    assert_eq!(journal.departed(whole).unwrap(), Some(Departed::default()));
}

#[test]
fn a_torn_write_leaves_the_record_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vms/a.journal");
    for torn_at in [0, 8, 20, 30, HEADER as u64, HEADER as u64 + 50] {
        let journal = Journal::<Record>::open(directory.path()).unwrap();
        let name: VmName = "a".parse().unwrap();
        journal.remove(&name, None).unwrap();
        journal.claim(record("a", 1)).unwrap();
        rewrite(&journal, "a", 2);
        rewrite(&journal, "a", 3);
        drop(journal);
        // The third writing, sequence 3, is in slot 1.
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, SLOT + torn_at).unwrap();
        file.write_all_at(&[!byte[0]], SLOT + torn_at).unwrap();
        assert_eq!(
            Journal::<Record>::open(directory.path()).unwrap().all(),
            [record("a", 2)],
            "torn at {torn_at}"
        );
    }
}

#[test]
fn a_file_without_any_whole_record_is_not_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    drop(Journal::<Record>::open(directory.path()).unwrap());
    std::fs::write(directory.path().join("vms/a.journal"), vec![7; 2 * SLOT as usize]).unwrap();
    assert!(matches!(unreadable(directory.path()), JournalError::Corrupt(_)));
}

#[test]
fn a_record_of_a_later_version_does_not_yield_to_the_older_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vms/a.journal");
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(record("a", 1)).unwrap();
    drop(journal);
    // Sequence 1 is in slot 1; the next one goes into slot 0.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&whole(2, br#"{"ownership":"later"}"#), 0).unwrap();
    let error = unreadable(directory.path());
    assert!(matches!(&error, JournalError::NotUnderstood { source: Some(_), .. }), "{error:?}");
    // Of a later format nothing is understood.
    file.write_all_at(b"vmirror2", 0).unwrap();
    let error = unreadable(directory.path());
    assert!(matches!(&error, JournalError::NotUnderstood { source: None, .. }), "{error:?}");
    // What is older than the record that holds does not matter.
    file.write_all_at(&whole(0, br#"{"ownership":"later"}"#), 0).unwrap();
    assert_eq!(Journal::<Record>::open(directory.path()).unwrap().all(), [record("a", 1)]);
}

/// A file on a disk that cannot read one of its slots.
struct BadSlot {
    file: File,
    bad: u64,
}

impl FileExt for BadSlot {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if offset / SLOT == self.bad {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[test]
fn a_slot_that_the_disk_cannot_read_does_not_yield_to_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vms/a.journal");
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(record("a", 1)).unwrap();
    rewrite(&journal, "a", 2);
    assert_eq!(newest(&File::open(&path).unwrap(), &path).unwrap(), (2, record("a", 2)));
    // Sequence 2 is in slot 0, and what is in the other one is older; but who cannot read one does not know which is which.
    for bad in [0, 1] {
        let error = newest::<Record>(&BadSlot { file: File::open(&path).unwrap(), bad }, &path).unwrap_err();
        let JournalError::Io { action: "read", source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.raw_os_error(), Some(libc::EIO));
    }
}

/// Found by the fuzz target `journal_slots`: no journal writes that often, but a file may say so.
#[test]
fn a_record_after_which_there_is_no_number_is_read_and_not_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(record("a", 1)).unwrap();
    drop(journal);
    let file = OpenOptions::new().write(true).open(directory.path().join("vms/a.journal")).unwrap();
    let json = serde_json::to_vec(&record("a", 7)).unwrap();
    file.write_all_at(&whole(u64::MAX, &json), 0).unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    assert_eq!(journal.all(), [record("a", 7)]);
    let refused = journal.amend(&mut record("a", 7), |now| now.memory = 6);
    assert!(matches!(refused, Err(JournalError::Corrupt(_))), "{refused:?}");
    assert_eq!(journal.all(), [record("a", 7)]);
}

#[test]
fn a_record_of_another_name_than_its_file_is_nobodys() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(record("b", 1)).unwrap();
    drop(journal);
    std::fs::rename(directory.path().join("vms/b.journal"), directory.path().join("vms/a.journal")).unwrap();
    assert!(matches!(unreadable(directory.path()), JournalError::Corrupt(_)));
}

#[test]
fn a_mark_that_cannot_be_seen_is_not_taken_for_none() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    let session = Uuid::from_u128(1);
    assert_eq!(journal.mark(session).unwrap(), None);
    // In the place of the directory of marks: ENOTDIR for everybody, root too.
    let marks = directory.path().join("departed");
    std::fs::remove_dir(&marks).unwrap();
    std::fs::write(&marks, b"").unwrap();
    std::fs::set_permissions(&marks, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(journal.mark(session).is_err() && journal.departed(session).is_err());
}

#[test]
fn a_mark_does_not_go_by_the_clock() {
    let directory = tempfile::tempdir().unwrap();
    let session = Uuid::from_u128(1);
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(Record { arrived_by: Some(session), ..record("a", 1) }).unwrap();
    forget(&journal, "a");
    let mark = std::fs::File::open(directory.path().join("departed").join(session.to_string())).unwrap();
    mark.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(Journal::<Record>::open(directory.path()).unwrap().mark(session).unwrap(), Some(Mark::Ran));
}

#[test]
fn a_state_directory_is_known_again_and_an_empty_one_is_another() {
    let [one, other] = [0, 1].map(|_| tempfile::tempdir().unwrap());
    let identity = Journal::<Record>::open(one.path()).unwrap().identity();
    assert_eq!(Journal::<Record>::open(one.path()).unwrap().identity(), identity);
    assert_ne!(Journal::<Record>::open(other.path()).unwrap().identity(), identity);
    std::fs::write(one.path().join("identity"), b"").unwrap();
    // One that says nothing keeps no agent down, and what that says of copies is nobody's word.
    let unknown = Journal::<Record>::open(one.path()).unwrap().identity();
    assert_ne!(unknown, identity);
    assert_ne!(Journal::<Record>::open(one.path()).unwrap().identity(), unknown);
}

#[test]
fn what_somebody_else_has_changed_meanwhile_is_not_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::<Record>::open(directory.path()).unwrap();
    journal.claim(record("a", 1)).unwrap();
    let outgoing = Outgoing { session: Uuid::from_u128(1), to: Some("b".into()), address: "b:1".into() };
    let mut first = journal.get(&"a".parse().unwrap()).unwrap();
    let mut second = first.clone();
    let offered = |session| Event::Offered { session, to: "b".into(), address: "b:1".into() };
    let effects = journal.on(&mut first, offered(outgoing.session), |_| {}).unwrap();
    assert_eq!((effects, &first.outgoing), (vec![], &vec![outgoing.clone()]));
    // A detail changed by who has an older copy keeps what the first has put on record.
    journal.amend(&mut second, |now| now.memory = 8).unwrap();
    assert_eq!((&second.outgoing, second.memory), (&vec![outgoing.clone()], 8));
    let event = Event::HandedOver {
        session: outgoing.session,
        to: "b".into(),
        address: "b:1".into(),
        keeper: None,
        supplies: false,
    };
    assert_eq!(journal.on(&mut first, event, |_| {}).unwrap(), [Effect::Commit]);
    // Who took it for this host's cannot make it that again, nor say that a copy of it is gone.
    assert!(matches!(journal.amend(&mut second, |now| now.memory = 9), Err(JournalError::Changed(_))));
    let withdrawn = Event::Withdrawn { session: outgoing.session };
    assert!(matches!(journal.on(&mut second, withdrawn, |_| {}), Err(JournalError::Changed(_))));
    let kept = Journal::<Record>::open(directory.path()).unwrap().get(&"a".parse().unwrap()).unwrap();
    assert!(matches!(kept.ownership, Ownership::HandedOver { .. }) && kept.memory == 8);
}

#[test]
fn a_disk_that_one_machine_waits_for_keeps_no_other_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let journal = Arc::new(Journal::<Record>::open(directory.path()).unwrap());
    journal.claim(record("slow", 1)).unwrap();
    journal.claim(record("quick", 1)).unwrap();
    let (entered, enter) = std::sync::mpsc::channel();
    let (leave, left) = std::sync::mpsc::channel::<()>();
    let slow = std::thread::spawn({
        let journal = Arc::clone(&journal);
        move || {
            let mut slow = journal.get(&"slow".parse().unwrap()).unwrap();
            journal.amend(&mut slow, |now| {
                entered.send(()).unwrap();
                left.recv().unwrap();
                now.memory = 6;
            })
        }
    });
    enter.recv().unwrap();
    // Held up in the middle of a change of the slow one, as by its disk.
    let mut quick = journal.get(&"quick".parse().unwrap()).unwrap();
    journal.amend(&mut quick, |now| now.memory = 7).unwrap();
    assert_eq!(journal.all().iter().map(|record| record.memory).collect::<Vec<_>>(), [7, 5]);
    leave.send(()).unwrap();
    slow.join().unwrap().unwrap();
    assert_eq!(journal.get(&"slow".parse().unwrap()).unwrap().memory, 6);
}
