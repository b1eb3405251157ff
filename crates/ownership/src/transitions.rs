//! The transitions, event by event.

use uuid::Uuid;

use super::{
    Answer, Asked, Effect, Event, MOST_OUTGOING, Mark, Outgoing, Ownership, Qemu, Response, SourceSays,
    Standing, Step, Why, Withdrawal,
};

/// What follows when something happens to a machine. Total: every event is answered in every standing.
#[must_use]
pub fn on(now: Option<&Standing>, event: Event) -> Step {
    let Some(standing) = now else { return without_record(event) };
    match event {
        Event::Offered { session, to, address } => offered(standing, session, to, address),
        Event::Withdrawn { session } => withdrawn(standing, session),
        Event::HandedOver { session, to, address, keeper, supplies } => {
            let offered = standing.outgoing.iter().any(|outgoing| outgoing.session == session);
            if !offered || standing.ownership != Ownership::Owner {
                return refused(standing, Why::Changed);
            }
            becomes(
                Standing {
                    generation: standing.generation.saturating_add(1),
                    ownership: Ownership::HandedOver { session, to, address, keeper },
                    outgoing: without(standing, session),
                    switching: false,
                    resuming: false,
                    has_run: true,
                    supplies,
                    ..standing.clone()
                },
                [Effect::Commit],
            )
        }
        Event::Answered { session, answer } => answered(standing, session, answer),
        Event::Supplied => becomes(Standing { supplies: false, ..standing.clone() }, []),
        Event::Reserved { from, generation, abandoned, .. } => match &standing.ownership {
            Ownership::Incoming { session, from: earlier, ready }
                if *earlier == from && standing.generation <= generation =>
            {
                // One that is not complete was never handed over. A complete one may be all that there is of the machine, and its source
                // have forgotten that: with a state directory of yesterday it says of an older state of it that it is its own.
                if !ready || abandoned.is_none_or(|named| named.contains(session)) {
                    stays(standing, [Effect::Discard(standing.mark())])
                } else {
                    refused(standing, Why::CopyWaits)
                }
            }
            _ => refused(standing, Why::NameTaken),
        },
        Event::Copied { session } => match &standing.ownership {
            Ownership::Incoming { session: of, from, ready: false } if *of == session => {
                let ownership = Ownership::Incoming { session, from: from.clone(), ready: true };
                becomes(Standing { ownership, ..standing.clone() }, [Effect::Respond(Response::Ready)])
            }
            _ => stays(standing, [Effect::Respond(Response::NotNow)]),
        },
        Event::Committed { session, from, generation, mark } => {
            committed(standing, session, &from, generation, mark)
        }
        Event::Cancelled { session, from, mark } => cancelled(standing, session, &from, mark),
        Event::Released { session } if standing.arrived_by == Some(session) => {
            becomes(Standing { released: true, ..standing.clone() }, [])
        }
        Event::Released { .. } => stays(standing, []),
        Event::Resumed => {
            becomes(Standing { switching: false, resuming: false, has_run: true, ..standing.clone() }, [])
        }
        Event::NotResumed { never_ran } => not_resumed(standing, never_ran),
        Event::SessionOver { session } => match standing.ownership {
            // Not complete, it is worth nothing; complete, the source may have handed the machine over.
            Ownership::Incoming { session: of, ready: false, .. } if of == session => {
                stays(standing, [Effect::Discard(None)])
            }
            _ => stays(standing, [Effect::Wait]),
        },
        Event::Ended => ended(standing),
        Event::Found(qemu) => found(standing, qemu),
        Event::RunHere { asked, force } => run_here(standing, asked, force),
        Event::GiveUp => match standing.ownership {
            Ownership::HandedOver { .. } if standing.supplies => refused(standing, Why::Supplies),
            Ownership::Incoming { .. } | Ownership::HandedOver { .. } => {
                stays(standing, [Effect::Discard(standing.mark())])
            }
            // Its memory is lost, and nobody saw it run: whoever gives it up accepts the older state that the source still has.
            Ownership::Owner if standing.is_unseen() => {
                stays(standing, [Effect::Discard(Some(Mark::NeverRan))])
            }
            // It has run here before it was handed over and taken back, and no older state of it may.
            Ownership::Owner if standing.resuming => stays(standing, [Effect::Discard(standing.mark())]),
            Ownership::Owner => refused(standing, Why::NotInDoubt),
        },
    }
}

fn becomes<const N: usize>(standing: Standing, effects: [Effect; N]) -> Step {
    Step { standing: Some(standing), effects: effects.into() }
}

fn stays<const N: usize>(standing: &Standing, effects: [Effect; N]) -> Step {
    becomes(standing.clone(), effects)
}

fn refused(standing: &Standing, why: Why) -> Step {
    stays(standing, [Effect::Refuse(why)])
}

/// What is remembered answers where no record does; where nothing is, nobody may draw a conclusion from that: the state directory
/// may have been lost, or be an older one.
fn by_mark(mark: Option<Mark>, never_ran: Response) -> Effect {
    Effect::Respond(match mark {
        Some(Mark::Ran) => Response::Running,
        Some(Mark::NeverRan) => never_ran,
        None => Response::Unknown,
    })
}

fn without_record(event: Event) -> Step {
    let effects = match event {
        Event::Reserved { session, from, generation, .. } => {
            let standing = Standing {
                generation,
                ownership: Ownership::Incoming { session, from: from.clone(), ready: false },
                arrived_by: Some(session),
                arrived_from: Some(from),
                has_run: false,
                ..Standing::own()
            };
            return becomes(standing, []);
        }
        Event::Committed { mark, .. } => vec![by_mark(mark, Response::NoCopy)],
        Event::Cancelled { mark, .. } => vec![by_mark(mark, Response::Cancelled)],
        Event::Withdrawn { .. } | Event::Released { .. } | Event::SessionOver { .. } | Event::Ended => {
            Vec::new()
        }
        _ => vec![Effect::Refuse(Why::Changed)],
    };
    Step { standing: None, effects }
}

fn offered(standing: &Standing, session: Uuid, to: String, address: String) -> Step {
    if standing.ownership != Ownership::Owner {
        return refused(standing, Why::Changed);
    }
    let mut outgoing = without(standing, session);
    if outgoing.len() >= MOST_OUTGOING {
        return refused(standing, Why::CopiesLeft);
    }
    outgoing.push(Outgoing { session, to: Some(to), address });
    // It runs here, whatever could not be put on record of that before: a late Commit must not resume it within its switch-over.
    let offered = Standing { outgoing, switching: true, resuming: false, has_run: true, ..standing.clone() };
    becomes(offered, [])
}

/// Where copies may wait, but for that of one migration.
fn without(standing: &Standing, session: Uuid) -> Vec<Outgoing> {
    standing.outgoing.iter().filter(|outgoing| outgoing.session != session).cloned().collect()
}

fn withdrawn(standing: &Standing, session: Uuid) -> Step {
    becomes(Standing { outgoing: without(standing, session), ..standing.clone() }, [])
}

/// Back to this host, under a generation that no copy has.
fn taken_back(standing: &Standing) -> Standing {
    Standing {
        generation: standing.generation.saturating_add(1),
        ownership: Ownership::Owner,
        resuming: true,
        has_run: true,
        supplies: false,
        ..standing.clone()
    }
}

/// The same, of a destination that is still to hear so.
fn taken_back_from(standing: &Standing, left: Outgoing) -> Standing {
    let mut back = taken_back(standing);
    back.outgoing.push(left);
    back
}

fn answered(standing: &Standing, session: Uuid, answer: Answer) -> Step {
    let Ownership::HandedOver { session: of, to, address, keeper, .. } = &standing.ownership else {
        return refused(standing, Why::Changed);
    };
    if *of != session {
        return refused(standing, Why::Changed);
    }
    match answer {
        Answer::Running => stays(standing, [Effect::Release]),
        // Another state directory than the one that took the copy has no word in it.
        Answer::NoCopy { keeper: here } if keeper.is_some() && *keeper != here => {
            stays(standing, [Effect::Doubt])
        }
        // What was made there for a copy that was complete stays until the source is heard to have the machine.
        Answer::NoCopy { .. } => {
            let left = Outgoing { session, to: Some(to.clone()), address: address.clone() };
            becomes(taken_back_from(standing, left), [Effect::Resume, Effect::Abandon])
        }
        Answer::Unknown | Answer::Other => stays(standing, [Effect::Ask]),
    }
}

fn committed(standing: &Standing, session: Uuid, from: &str, generation: u64, mark: Option<Mark>) -> Step {
    if mark.is_some() || !standing.came_by(session, from) {
        return stays(standing, [by_mark(mark, Response::NoCopy)]);
    }
    match standing.ownership {
        Ownership::Incoming { ready: true, .. } if Some(generation) == standing.generation.checked_add(1) => {
            becomes(
                Standing { generation, ownership: Ownership::Owner, resuming: true, ..standing.clone() },
                [Effect::Resume],
            )
        }
        // It was never complete, or not of this generation: nothing that was handed over.
        Ownership::Incoming { .. } => stays(standing, [Effect::Respond(Response::Unknown)]),
        Ownership::Owner if standing.is_unseen() => stays(standing, [Effect::Resume]),
        Ownership::Owner | Ownership::HandedOver { .. } => {
            stays(standing, [Effect::Respond(Response::Running)])
        }
    }
}

fn cancelled(standing: &Standing, session: Uuid, from: &str, mark: Option<Mark>) -> Step {
    if mark == Some(Mark::Ran) || !standing.came_by(session, from) {
        return stays(standing, [by_mark(mark, Response::Cancelled)]);
    }
    match standing.ownership {
        Ownership::Incoming { .. } => {
            stays(standing, [Effect::Discard(standing.mark()), Effect::Respond(Response::Cancelled)])
        }
        Ownership::Owner | Ownership::HandedOver { .. } => {
            stays(standing, [Effect::Respond(Response::Running)])
        }
    }
}

fn not_resumed(standing: &Standing, never_ran: bool) -> Step {
    match (standing.arrived_by, &standing.arrived_from) {
        (Some(session), Some(from)) if never_ran && standing.is_unseen() => {
            // A copy again: the source may have the machine back.
            let back = Standing {
                generation: standing.generation.saturating_sub(1),
                ownership: Ownership::Incoming { session, from: from.clone(), ready: true },
                resuming: false,
                ..standing.clone()
            };
            becomes(back, [Effect::Discard(Some(Mark::NeverRan)), Effect::Respond(Response::NoCopy)])
        }
        _ => stays(standing, [Effect::Respond(Response::NotNow)]),
    }
}

fn ended(standing: &Standing) -> Step {
    match standing.ownership {
        // It has never run, and never will.
        Ownership::Incoming { .. } => stays(standing, [Effect::Discard(standing.mark())]),
        Ownership::HandedOver { .. } => stays(standing, [Effect::Ask]),
        // It became this host's, and nobody knows whether it ran before it was gone: its source may still have it, and
        // only a person can weigh that.
        Ownership::Owner if standing.resuming => stays(standing, [Effect::Doubt]),
        Ownership::Owner => stays(standing, [Effect::Discard(standing.mark())]),
    }
}

fn found(standing: &Standing, qemu: Qemu) -> Step {
    match (&standing.ownership, qemu) {
        (Ownership::HandedOver { .. }, _) if standing.outgoing.is_empty() => stays(standing, [Effect::Ask]),
        (Ownership::HandedOver { .. }, _) => stays(standing, [Effect::Ask, Effect::Abandon]),
        (_, Qemu::Gone) => ended(standing),
        (_, Qemu::Unclear) => stays(standing, [Effect::Wait]),
        // With a state directory of yesterday: it may be all that there is of the machine.
        (Ownership::Incoming { ready: false, .. }, Qemu::Ran) => stays(standing, [Effect::Doubt]),
        (Ownership::Incoming { ready: false, .. }, _) => stays(standing, [Effect::Discard(None)]),
        (Ownership::Incoming { .. }, _) => stays(standing, [Effect::Wait]),
        (Ownership::Owner, qemu) => {
            // Only what is on record as ours: anybody may migrate or stop a machine by other means. That a copy of an earlier attempt
            // may wait somewhere says nothing of who has paused it.
            let paused_by_us = match qemu {
                // No switch-over has paused one that has come and not run yet.
                Qemu::Switched => standing.switching || standing.resuming && standing.has_run,
                _ => standing.resuming || qemu == Qemu::Held,
            };
            match (paused_by_us, !standing.outgoing.is_empty()) {
                (true, true) => stays(standing, [Effect::Resume, Effect::Abandon]),
                (true, false) => stays(standing, [Effect::Resume]),
                (false, _) if qemu == Qemu::Switched => stays(standing, [Effect::Doubt]),
                (false, true) => stays(standing, [Effect::Abandon]),
                (false, false) => stays(standing, []),
            }
        }
    }
}

fn run_here(standing: &Standing, asked: Asked, force: bool) -> Step {
    match (&standing.ownership, asked) {
        (Ownership::HandedOver { session, to, address, .. }, Asked::Destination(withdrawal)) => {
            let outgoing = Outgoing { session: *session, to: Some(to.clone()), address: address.clone() };
            match withdrawal {
                Withdrawal::RunsThere => refused(standing, Why::RunsThere),
                Withdrawal::Unknown if !force => refused(standing, Why::UnknownThere),
                Withdrawal::Unheard if !force => refused(standing, Why::Unheard),
                Withdrawal::Done | Withdrawal::Unknown => becomes(taken_back(standing), [Effect::Resume]),
                // It is told as soon as it can be.
                Withdrawal::Unheard => {
                    becomes(taken_back_from(standing, outgoing), [Effect::Resume, Effect::Abandon])
                }
            }
        }
        (Ownership::Incoming { ready: true, .. }, Asked::Source(says)) => match says {
            SourceSays::Mine if !force => refused(standing, Why::OwnedThere),
            // It may have gone on from there to a third host, or that agent may have lost its state directory.
            SourceSays::Unknown if !force => refused(standing, Why::UnknownThere),
            SourceSays::Unheard if !force => refused(standing, Why::Unheard),
            _ => becomes(
                Standing {
                    generation: standing.generation.saturating_add(1),
                    ownership: Ownership::Owner,
                    resuming: true,
                    ..standing.clone()
                },
                [Effect::Resume],
            ),
        },
        _ => refused(standing, Why::NotInDoubt),
    }
}
