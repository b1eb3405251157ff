//! A destination that lies of the memory that a VM lacks there must not have the source let go of it: that may be all there is.

use super::liar::{Lies, Say, before};
use end_to_end::{Pair, vmirror};
use protocol::wire::{Pages, Reply, Supplied};
use session::Outcome;
use session::report::{Counted, Verdict};
use testbed::root_or_skip;

/// A lie, and what is told of it.
struct Lie {
    says: fn() -> Reply,
    told: &'static str,
}

/// What is said on one connection after the other, in the place of pages that the guest waits for.
const LIES: [Lie; 3] = [
    Lie {
        says: || Reply::Wanted(Pages { pages: vec![0, u64::MAX] }),
        told: "asks for more of the VM's memory than there is",
    },
    Lie { says: || Reply::Supplied(Supplied::default()), told: "said that nothing is missing, and " },
    Lie {
        // More than twice as many as a VM of 256 MiB has.
        says: || Reply::Wanted(Pages { pages: vec![0; 132_000] }),
        told: "asks for more of the VM's memory than there is",
    },
];

#[test]
fn a_destination_that_lies_of_what_is_missing_is_not_believed_and_the_vm_lacks_nothing_at_last() {
    if !root_or_skip("a destination that lies of what is missing") {
        return;
    }
    let pair = Pair::start();
    let guest = pair.run(pair.a(), "vm", &pair.outrun_by(pair.spec("vm", 256)));
    let first = guest.status();
    // A lie on each connection on which the guest runs there already: until then the source has another way out.
    let (mut lies, mut may_lie) = (LIES.iter(), false);
    let replies = Box::new(move |reply: Reply| {
        may_lie |= matches!(reply, Reply::Running(_) | Reply::Missing(_));
        if may_lie
            && matches!(reply, Reply::Wanted(_))
            && let Some(lie) = lies.next()
        {
            may_lie = false;
            return vec![Say::Reply((lie.says)())];
        }
        vec![Say::Reply(reply)]
    });
    let said = before(&pair, Lies { replies, ..Lies::default() }, |address| {
        vmirror(pair.a(), &["migrate", "vm", "--to", address, "--json", "--on-diverge", "post-copy"])
    });
    assert_eq!(said.code, Some(0), "{said:?}\n{}", pair.logs());
    let report = said.report();
    let post_copy = report.post_copy.as_ref().unwrap_or_else(|| panic!("no post-copy: {report:#?}"));
    assert!(post_copy.links > LIES.len() as u32, "{post_copy:?}\n{}", pair.logs());
    assert_eq!(
        (report.outcome, &post_copy.counted, report.verification.proof),
        (Outcome::Completed, &Counted::All, Verdict::Match),
        "{report:#?}"
    );
    let log = std::fs::read_to_string(pair.a().agent_log()).unwrap();
    for Lie { told, .. } in LIES {
        assert!(log.contains(&format!("the destination {told}")), "{told}: {}", pair.logs());
    }
    assert!(pair.runs_on("vm", pair.b()), "{}", pair.logs());
    pair.holds_nothing(pair.a());
    guest.sound_since(&first);
}
