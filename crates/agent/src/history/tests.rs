use super::*;
use crate::sessions::tests::report;

fn kept_in(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("history.db")
}

#[test]
fn a_report_comes_back_as_it_was_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let mut full = report("0b9e5b0c-0000-4000-8000-000000000001");
    full.rounds.push(session::report::Round { n: 0, dirty_pages: 7, ..session::report::Round::default() });
    History::open(&kept_in(&directory)).unwrap().add(&full).unwrap();
    let again = History::open(&kept_in(&directory)).unwrap();
    assert_eq!(again.report(&full.id).unwrap(), full);
    assert_eq!(again.report("0b9e").unwrap(), full, "the beginning of an id is enough");
    let entries = again.list(None, 10).unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].id.as_str(), entries[0].outcome), (full.id.as_str(), full.outcome));
}

#[test]
fn the_newest_is_first_and_a_list_can_be_of_one_machine() {
    let directory = tempfile::tempdir().unwrap();
    let history = History::open(&kept_in(&directory)).unwrap();
    for (id, vm) in [("a1", "web1"), ("a2", "db"), ("b3", "web1")] {
        history.add(&Report { vm: vm.to_owned(), ..report(id) }).unwrap();
    }
    let ids = |vm, limit| -> Vec<String> {
        history.list(vm, limit).unwrap().into_iter().map(|entry| entry.id).collect()
    };
    assert_eq!(ids(None, 10), ["b3", "a2", "a1"]);
    assert_eq!(ids(None, 2), ["b3", "a2"]);
    assert_eq!(ids(Some("web1"), 10), ["b3", "a1"]);
    assert!(ids(Some("no"), 10).is_empty());
}

#[test]
fn an_id_that_fits_none_or_several_is_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let history = History::open(&kept_in(&directory)).unwrap();
    history.add(&report("a1")).unwrap();
    history.add(&report("a2")).unwrap();
    assert!(matches!(history.report("c"), Err(HistoryError::Unknown(id)) if id == "c"));
    assert!(matches!(history.report("%"), Err(HistoryError::Unknown(_))), "no patterns");
    let Err(HistoryError::Ambiguous { ids, .. }) = history.report("a") else { panic!("not told") };
    assert_eq!(ids, ["a2", "a1"]);
}

#[test]
fn only_the_newest_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let history = History::keeping(&kept_in(&directory), 3, ROOM).unwrap();
    for n in 0..10 {
        history.add(&report(&format!("id-{n}"))).unwrap();
    }
    let ids: Vec<_> = history.list(None, 100).unwrap().into_iter().map(|entry| entry.id).collect();
    assert_eq!(ids, ["id-9", "id-8", "id-7"]);
    assert_eq!(history.len().unwrap(), 3);
}

#[test]
fn large_reports_take_no_more_room_than_there_is_for_all_and_the_newest_is_kept_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let rounds =
        |id: &str, n: usize| Report { rounds: vec![session::report::Round::default(); n], ..report(id) };
    let bytes = |report: &Report| serde_json::to_string(report).unwrap().len() as u64;
    let (small, large) = (bytes(&report("0")), bytes(&rounds("0", 100)));
    let history = History::keeping(&kept_in(&directory), 1000, large + 3 * small).unwrap();
    let ids =
        || -> Vec<String> { history.list(None, 1000).unwrap().into_iter().map(|entry| entry.id).collect() };
    for n in 1..=5 {
        history.add(&rounds(&n.to_string(), 100)).unwrap();
    }
    assert_eq!(ids(), ["5"]);
    for id in ["6", "7", "8"] {
        history.add(&report(id)).unwrap();
    }
    assert_eq!(ids(), ["8", "7", "6", "5"]);
    history.add(&rounds("9", 1000)).unwrap();
    assert_eq!(ids(), ["9"], "more than there is room for");

    // What an earlier version has let grow goes in steps.
    drop(history);
    let before = History::keeping(&kept_in(&directory), 1000, u64::MAX).unwrap();
    for n in 100..300 {
        before.add(&report(&n.to_string())).unwrap();
    }
    let history = History::keeping(&kept_in(&directory), 1000, 10 * small).unwrap();
    for (n, left) in [(300, 201 + 1 - 64), (301, 202 + 1 - 128), (302, 203 + 1 - 192)] {
        history.add(&report(&n.to_string())).unwrap();
        assert_eq!(history.len().unwrap(), left);
    }
    history.add(&report("303")).unwrap();
    assert!(history.len().unwrap() < 10);
    assert_eq!(history.list(None, 1).unwrap()[0].id, "303");
}

#[test]
fn a_later_outcome_replaces_an_uncertain_one_in_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let history = History::open(&kept_in(&directory)).unwrap();
    history.add(&Report { outcome: session::Outcome::Uncertain, ..report("a1") }).unwrap();
    history.add(&report("a2")).unwrap();
    history.add(&report("a1")).unwrap();
    let entries = history.list(None, 10).unwrap();
    assert_eq!(entries.iter().map(|entry| entry.id.as_str()).collect::<Vec<_>>(), ["a2", "a1"]);
    assert_eq!(entries[1].outcome, session::Outcome::Completed);
}

#[test]
fn a_database_of_a_later_version_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    drop(History::open(&kept_in(&directory)).unwrap());
    let connection = Connection::open(kept_in(&directory)).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    let error = History::open(&kept_in(&directory)).unwrap_err();
    assert!(matches!(error, HistoryError::Newer { found: 99, known: 1, .. }), "{error}");
}

#[test]
fn what_is_no_database_is_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(kept_in(&directory), "not a database at all, but long enough to be looked at as one")
        .unwrap();
    let error = History::open(&kept_in(&directory)).unwrap_err();
    assert!(error.to_string().contains("history.db"), "{error}");
}
