use super::*;

fn session() -> Uuid {
    Uuid::from_u128(1)
}

fn after(standing: Standing, event: Event) -> Step {
    on(Some(&standing), event)
}

/// A machine whose switch-over has begun.
fn offered() -> Standing {
    let event = Event::Offered { session: session(), to: "b".to_owned(), address: "b:1".to_owned() };
    after(Standing::own(), event).standing.unwrap()
}

fn ready_copy() -> Standing {
    let from = "a".to_owned();
    let reserved = on(None, Event::Reserved { session: session(), from, generation: 0, abandoned: None })
        .standing
        .unwrap();
    after(reserved, Event::Copied { session: session() }).standing.unwrap()
}

#[test]
fn what_runs_is_not_thrown_away_because_its_record_is_that_of_a_half_copy() {
    let half = Standing {
        ownership: Ownership::Incoming { session: session(), from: "a".to_owned(), ready: false },
        ..ready_copy()
    };
    assert_eq!(after(half.clone(), Event::Found(Qemu::There)).effects, [Effect::Discard(None)]);
    let ran = after(half.clone(), Event::Found(Qemu::Ran));
    assert_eq!((ran.standing, ran.effects), (Some(half), vec![Effect::Doubt]));
    assert_eq!(after(ready_copy(), Event::Found(Qemu::Ran)).effects, [Effect::Wait]);
}

#[test]
fn a_pause_counts_as_ours_only_from_a_switch_over_until_the_guest_was_seen_to_run() {
    let switched = || Event::Found(Qemu::Switched);
    assert_eq!(after(offered(), switched()).effects, [Effect::Resume, Effect::Abandon]);
    // It runs on; the destination could not be told, and somebody else migrates it later.
    let resumed = after(offered(), Event::Resumed).standing.unwrap();
    assert_eq!(sessions(&resumed), [1]);
    assert_eq!(after(resumed, switched()).effects, [Effect::Doubt]);
    assert_eq!(after(Standing::own(), switched()).effects, [Effect::Doubt]);
}

#[test]
fn a_guest_that_could_not_be_resumed_is_not_forgotten_when_the_destination_was_told() {
    let told = after(offered(), Event::Withdrawn { session: session() }).standing.unwrap();
    assert_eq!(told.outgoing, []);
    assert_eq!(after(told, Event::Found(Qemu::Switched)).effects, [Effect::Resume]);
}

#[test]
fn a_copy_runs_only_by_force_where_its_source_says_anything_but_that_it_gave_it_away() {
    for (says, why) in [
        (SourceSays::Mine, Why::OwnedThere),
        (SourceSays::Unknown, Why::UnknownThere),
        (SourceSays::Unheard, Why::Unheard),
    ] {
        let asked = |force| Event::RunHere { asked: Asked::Source(says), force };
        assert_eq!(after(ready_copy(), asked(false)).effects, [Effect::Refuse(why)], "{says:?}");
        assert_eq!(after(ready_copy(), asked(true)).effects, [Effect::Resume], "{says:?}");
    }
    let yours = Event::RunHere { asked: Asked::Source(SourceSays::Yours), force: false };
    assert_eq!(after(ready_copy(), yours).effects, [Effect::Resume]);
}

fn number(session: u128) -> Uuid {
    Uuid::from_u128(session)
}

fn sessions(standing: &Standing) -> Vec<u128> {
    standing.outgoing.iter().map(|outgoing| outgoing.session.as_u128()).collect()
}

fn offered_anew(standing: Standing, session: u128) -> Step {
    let to = format!("host-{session}");
    after(standing, Event::Offered { session: number(session), to: to.clone(), address: to })
}

fn handed_over(standing: Standing, session: u128) -> Standing {
    let to = format!("host-{session}");
    let session = number(session);
    let event = Event::HandedOver { session, to: to.clone(), address: to, keeper: None, supplies: false };
    after(standing, event).standing.unwrap()
}

#[test]
fn a_copy_that_could_not_be_withdrawn_is_not_forgotten_for_a_later_migration() {
    let resumed = after(offered(), Event::Resumed).standing.unwrap();
    let twice = offered_anew(resumed, 2).standing.unwrap();
    assert_eq!(sessions(&twice), [1, 2]);
    assert_eq!(after(twice.clone(), Event::Found(Qemu::There)).effects, [Effect::Abandon]);
    // Each is withdrawn by itself, and only the one that was handed over is not to be.
    assert_eq!(
        sessions(&after(twice.clone(), Event::Withdrawn { session: number(2) }).standing.unwrap()),
        [1]
    );
    let gone = handed_over(twice, 2);
    assert_eq!(sessions(&gone), [1]);
    assert_eq!(after(gone.clone(), Event::Found(Qemu::Gone)).effects, [Effect::Ask, Effect::Abandon]);
    let answer = Answer::NoCopy { keeper: None };
    let back = after(gone.clone(), Event::Answered { session: number(2), answer });
    // The disks of a complete copy stay there until it is told.
    assert_eq!(back.effects, [Effect::Resume, Effect::Abandon]);
    assert_eq!(sessions(&back.standing.unwrap()), [1, 2]);
    let asked = Asked::Destination(Withdrawal::Unheard);
    let back = after(gone, Event::RunHere { asked, force: true }).standing.unwrap();
    assert_eq!(sessions(&back), [1, 2]);
}

#[test]
fn copies_that_nobody_could_be_told_of_are_at_so_many_hosts_and_no_more() {
    let mut standing = Standing::own();
    for session in 1..=MOST_OUTGOING as u128 {
        standing = offered_anew(standing, session).standing.unwrap();
    }
    assert_eq!(standing.outgoing.len(), MOST_OUTGOING);
    let refused = offered_anew(standing.clone(), 99);
    assert_eq!(refused.effects, [Effect::Refuse(Why::CopiesLeft)]);
    assert_eq!(refused.standing.as_ref(), Some(&standing));
    assert_eq!(offered_anew(standing, 3).effects, [], "one of these once more is not one more");
}

#[test]
fn a_complete_copy_gives_way_only_to_who_says_that_it_has_abandoned_it() {
    let reserved = |standing: Standing, from: &str, abandoned| {
        let event = Event::Reserved { session: number(2), from: from.to_owned(), generation: 0, abandoned };
        after(standing, event).effects
    };
    let discard = [Effect::Discard(Some(Mark::NeverRan))];
    assert_eq!(reserved(ready_copy(), "a", Some(vec![session()])), discard);
    assert_eq!(reserved(ready_copy(), "a", Some(Vec::new())), [Effect::Refuse(Why::CopyWaits)]);
    assert_eq!(reserved(ready_copy(), "a", Some(vec![number(7)])), [Effect::Refuse(Why::CopyWaits)]);
    assert_eq!(reserved(ready_copy(), "c", Some(vec![session()])), [Effect::Refuse(Why::NameTaken)]);
    // An agent of before this was said.
    assert_eq!(reserved(ready_copy(), "a", None), discard);
    let event = Event::Reserved { session: session(), from: "a".to_owned(), generation: 0, abandoned: None };
    let incomplete = on(None, event).standing.unwrap();
    assert_eq!(reserved(incomplete, "a", Some(Vec::new())), [Effect::Discard(None)]);
}

/// A machine that has come here.
fn arrived() -> Standing {
    let event = Event::Committed { session: session(), from: "a".to_owned(), generation: 1, mark: None };
    after(ready_copy(), event).standing.unwrap()
}

#[test]
fn what_has_run_here_is_not_given_up_as_if_it_never_had() {
    // Nobody saw it run: who gives it up has looked.
    assert_eq!(after(arrived(), Event::GiveUp).effects, [Effect::Discard(Some(Mark::NeverRan))]);
    let ran = after(arrived(), Event::Resumed).standing.unwrap();
    let gone = handed_over(offered_anew(ran, 2).standing.unwrap(), 2);
    for event in [
        Event::Answered { session: number(2), answer: Answer::NoCopy { keeper: None } },
        Event::RunHere { asked: Asked::Destination(Withdrawal::Done), force: false },
    ] {
        let back = after(gone.clone(), event).standing.unwrap();
        assert!(back.resuming && !back.is_unseen());
        // Its source, which may not have heard yet that it ran, has an older state of it.
        assert_eq!(after(back.clone(), Event::GiveUp).effects, [Effect::Discard(Some(Mark::Ran))]);
        assert_eq!(back.mark(), Some(Mark::Ran));
        let asks = Event::Committed { session: session(), from: "a".to_owned(), generation: 1, mark: None };
        assert_eq!(after(back.clone(), asks).effects, [Effect::Respond(Response::Running)]);
        let not_resumed = after(back.clone(), Event::NotResumed { never_ran: true });
        assert_eq!(not_resumed.standing, Some(back));
    }
}

#[test]
fn a_machine_that_has_come_and_was_migrated_on_by_others_is_not_resumed() {
    assert_eq!(after(arrived(), Event::Found(Qemu::There)).effects, [Effect::Resume]);
    assert_eq!(after(arrived(), Event::Found(Qemu::Switched)).effects, [Effect::Doubt]);
    let gone =
        handed_over(offered_anew(after(arrived(), Event::Resumed).standing.unwrap(), 2).standing.unwrap(), 2);
    let answered = Event::Answered { session: number(2), answer: Answer::NoCopy { keeper: None } };
    let back = after(gone, answered).standing.unwrap();
    assert_eq!(after(back, Event::Found(Qemu::Switched)).effects, [Effect::Resume, Effect::Abandon]);
}

#[test]
fn what_another_state_directory_than_the_one_that_took_the_copy_says_of_it_is_not_believed() {
    let offered = offered_anew(Standing::own(), 2).standing.unwrap();
    let gone = |keeper| {
        let (session, to) = (number(2), "host-2".to_owned());
        let event = Event::HandedOver { session, to: to.clone(), address: to, keeper, supplies: false };
        after(offered.clone(), event).standing.unwrap()
    };
    let no_copy = |keeper| Event::Answered { session: number(2), answer: Answer::NoCopy { keeper } };
    let (took, other) = (Some(number(70)), Some(number(71)));
    for says in [other, None] {
        let step = after(gone(took), no_copy(says));
        assert_eq!((step.standing, step.effects), (Some(gone(took)), vec![Effect::Doubt]), "{says:?}");
    }
    let taken_back = [Effect::Resume, Effect::Abandon];
    assert_eq!(after(gone(took), no_copy(took)).effects, taken_back);
    // An agent of before it was told.
    assert_eq!(after(gone(None), no_copy(None)).effects, taken_back);
    let unknown = Event::Answered { session: number(2), answer: Answer::Unknown };
    assert_eq!(after(gone(took), unknown).effects, [Effect::Ask]);
}

#[test]
fn who_remembers_nothing_of_a_copy_does_not_say_that_it_never_ran() {
    let asks = |mark| Event::Committed { session: number(2), from: "a".to_owned(), generation: 1, mark };
    assert_eq!(on(None, asks(None)).effects, [Effect::Respond(Response::Unknown)]);
    assert_eq!(on(None, asks(Some(Mark::NeverRan))).effects, [Effect::Respond(Response::NoCopy)]);
    assert_eq!(on(None, asks(Some(Mark::Ran))).effects, [Effect::Respond(Response::Running)]);
    // Nor of one that came by another migration.
    assert_eq!(after(ready_copy(), asks(None)).effects, [Effect::Respond(Response::Unknown)]);
}
