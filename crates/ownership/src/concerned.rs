//! Whom a machine concerns: the agent that it came from, and the one that a copy of it was offered to or that it was handed over to.
//! Anybody else with a certificate hears what is said of a machine that nobody knows.

use uuid::Uuid;

use crate::{Ownership, SourceSays, Standing};

/// Whose a machine is, as its host says to an agent that asks about a migration of it.
#[must_use]
pub fn whose(now: Option<&Standing>, session: Uuid, asks: &str) -> SourceSays {
    let Some(standing) = now else { return SourceSays::Unknown };
    match &standing.ownership {
        Ownership::HandedOver { session: of, to, .. } if *of == session && to == asks => SourceSays::Yours,
        Ownership::Owner if was_offered(standing, session, asks) || standing.came_by(session, asks) => {
            SourceSays::Mine
        }
        // Of an earlier migration nobody keeps a copy that was not told to throw it away: it is not known here any more.
        Ownership::HandedOver { .. } | Ownership::Owner | Ownership::Incoming { .. } => SourceSays::Unknown,
    }
}

/// Whether a complete copy may be there by this migration.
fn was_offered(standing: &Standing, session: Uuid, to: &str) -> bool {
    // Earlier versions have not put on record to whom; the session is known to nobody else.
    let is_to = |name: &Option<String>| name.as_deref().is_none_or(|name| name == to);
    standing.outgoing.iter().any(|outgoing| outgoing.session == session && is_to(&outgoing.to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Outgoing;

    fn offered(session: Uuid, to: &str) -> Standing {
        let outgoing = Outgoing { session, to: Some(to.to_owned()), address: "10.0.0.2:7600".to_owned() };
        Standing { outgoing: vec![outgoing], ..Standing::own() }
    }

    fn handed_over(session: Uuid, to: &str) -> Standing {
        let (to, address) = (to.to_owned(), "10.0.0.2:7600".to_owned());
        Standing {
            ownership: Ownership::HandedOver { session, to, address, keeper: None },
            ..Standing::own()
        }
    }

    fn came(session: Uuid, from: &str) -> Standing {
        Standing { arrived_by: Some(session), arrived_from: Some(from.to_owned()), ..Standing::own() }
    }

    #[test]
    fn whom_it_concerns_is_told_whose_it_is_and_nobody_else_that_there_is_such_a_machine() {
        let [session, other] = [Uuid::new_v4(), Uuid::new_v4()];
        let b = "host-b";
        for (standing, says) in [
            (offered(session, b), SourceSays::Mine),
            (came(session, b), SourceSays::Mine),
            (handed_over(session, b), SourceSays::Yours),
        ] {
            assert_eq!(whose(Some(&standing), session, b), says);
            for (session, asks) in [(other, b), (session, "host-c"), (other, "host-c")] {
                assert_eq!(whose(Some(&standing), session, asks), whose(None, session, asks), "{standing:?}");
            }
        }
        let incoming = Ownership::Incoming { session, from: b.to_owned(), ready: true };
        let incoming = Standing { ownership: incoming, ..came(session, b) };
        assert_eq!(whose(Some(&incoming), session, b), SourceSays::Unknown);
        assert_eq!(whose(Some(&Standing::own()), session, b), SourceSays::Unknown);
    }
}
