//! How long either side waits for the other, in one place, so that they fit each other. How long the crates below wait is theirs to say.
//!
//! docs/protocol.md has the same as a table; a test here compares the two, and checks that whoever waits waits longer than what it
//! waits for may take.

use std::time::Duration;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Destination: a source's first word, and its last, before it closes.
pub const FIRST_REQUEST: Duration = seconds(10);
/// Destination, right after the start of its agent: until the machine that is asked about is found.
pub const FOUND: Duration = seconds(8);
/// Destination: between two words that it is still at a reservation.
pub const WORKING: Duration = seconds(15);
/// Source: for a word of the destination while it reserves.
pub const RESERVE_WORD: Duration = seconds(60);
/// Source: for a reservation in all. QEMU reserves hundreds of GiB of huge pages meanwhile, and hooks run.
pub const RESERVE: Duration = seconds(1200);
/// Destination: for the files that a machine boots from, all of them.
pub const BOOT_FILES: Duration = seconds(600);
/// Source: for what an image holds that was there before.
pub const HOLDS: Duration = seconds(300);
/// Source: until a round is acknowledged.
pub const ROUND: Duration = seconds(300);
/// Source: until QEMU there waits for pages that are missing.
pub const POST_COPY_READY: Duration = seconds(75);
/// Source: until QEMU has paused a guest whose migration it was told to begin.
pub const UNTIL_PAUSED: Duration = seconds(10);
/// Source, within the pause: until what is known of the guest's addresses and connections is on its way.
pub const KNOWN: Duration = seconds(2);
/// Source, within the pause: beyond the longest downtime that was allowed, until the machine runs on where it was.
pub const PATIENCE: Duration = seconds(5);
/// Source: until QEMU lets a guest run again whose switch-over came to nothing.
pub const RESUME: Duration = seconds(10);
/// Source, within the pause: until a QEMU is gone that was killed, from when its monitor has closed.
pub const QEMU_ENDING: Duration = seconds(1);
/// Destination: until QEMU has loaded the devices.
pub const LOAD: Duration = seconds(60);
/// Source: for word that the machine runs, before it is asked for on another connection.
pub const RUNNING: Duration = seconds(10);
/// Source: for an answer on another connection.
pub const ANSWER: Duration = seconds(25);
/// Source: how often it asks within the migration, and how long apart.
pub const SETTLE_TRIES: u32 = 6;
/// See [`SETTLE_TRIES`].
pub const SETTLE_PAUSE: Duration = seconds(2);
/// Source: until a hand-over is decided, or known to be uncertain, from when it was handed over.
pub const DECIDED: Duration =
    RUNNING.saturating_add(ANSWER.saturating_add(SETTLE_PAUSE).saturating_mul(SETTLE_TRIES));
/// Source, from then on: first and longest wait between two questions to the destination.
pub const ASK_AGAIN: (Duration, Duration) = (seconds(1), seconds(60));
/// Source, while memory is missing: first and longest wait between two attempts to make a lost link again.
pub const LINK_AGAIN: (Duration, Duration) = (Duration::from_millis(200), seconds(5));
/// Source: first and longest wait between two attempts to tell a destination that its copy is worthless.
pub const ABANDON_PAUSE: (Duration, Duration) = (seconds(15), seconds(600));
/// Source: until a copy has been thrown away.
pub const CANCEL: Duration = seconds(30);
/// Source: for the report on the machine's health.
pub const HEALTH: Duration = seconds(15);
/// Destination: for a machine that makes no progress, while its health is watched.
pub const WATCH_STILL: Duration = seconds(3);
/// Destination: for the hook that turns the network, after that.
pub const REDIRECT: Duration = seconds(8);

/// Source, of a guest that has gone: nobody keeps sending to a place for longer where nothing is.
pub const DIVERTED: Duration = seconds(10);
/// Destination: a source that still has something for the guest after that has it for ever.
pub const STRAGGLERS: Duration = seconds(15);
/// An agent that goes down: until migrations to it are dropped.
pub const DROPPED: Duration = seconds(5);
/// The same: until migrations from it have ended, before it goes without them.
pub const GOING_DOWN: Duration = seconds(30);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Everything that the table has, by its names there.
    fn all() -> BTreeMap<&'static str, Duration> {
        let link = link::Deadlines::default();
        BTreeMap::from([
            ("connect", link.connect),
            ("handshake", link.handshake),
            ("ping", link.ping),
            ("silence", link.silence),
            ("stall", link.stall),
            ("first request", FIRST_REQUEST),
            ("found", FOUND),
            ("still working", WORKING),
            ("word while reserving", RESERVE_WORD),
            ("reserved", RESERVE),
            ("QEMU's start", qemu::START_DEADLINE),
            ("QEMU's answer", qemu::COMMAND_DEADLINE),
            ("hook", host::hooks::MAX_DEADLINE),
            ("boot files", BOOT_FILES),
            ("holds", HOLDS),
            ("round", ROUND),
            ("post-copy ready", POST_COPY_READY),
            ("tracking", dirty_tracker::ATTACH_PATIENCE),
            ("known", KNOWN),
            ("patience", PATIENCE),
            ("load", LOAD),
            ("running", RUNNING),
            ("answer", ANSWER),
            ("ask again", SETTLE_PAUSE),
            ("cancel", CANCEL),
            ("health", HEALTH),
            ("no progress", WATCH_STILL),
            ("network-redirect", REDIRECT),
            ("quit", host::QUIT_GRACE),
            ("kill", host::KILL_GRACE),
            ("greeting", qemu::GREETING_DEADLINE),
            ("pause", UNTIL_PAUSED),
            ("back to running", RESUME),
            ("killed QEMU", QEMU_ENDING),
            ("copy job", qemu::JOB_DEADLINE),
            ("export", qemu::EXPORT_DEADLINE),
            ("new image", qemu::CREATE_DEADLINE),
            ("storage daemon", qemu::STORAGE_DAEMON_DEADLINE),
            ("nft", network::nft::PATIENCE),
            ("cgroup", cgroup::make::LEAVE),
            ("diverted", DIVERTED),
            ("stragglers", STRAGGLERS),
            ("names of sockets", host::places::PATIENCE),
            ("power-off", host::POWER_OFF),
            ("dropped", DROPPED),
            ("going down", GOING_DOWN),
        ])
    }

    /// The first and the longest of waits that grow.
    fn growing() -> BTreeMap<&'static str, (Duration, Duration)> {
        BTreeMap::from([
            ("ask in the background", ASK_AGAIN),
            ("link again", LINK_AGAIN),
            ("throw away again", ABANDON_PAUSE),
        ])
    }

    fn told_seconds(text: &str) -> Option<Duration> {
        let number = text.strip_suffix(" s")?.replace(',', "").parse().ok()?;
        Duration::try_from_secs_f64(number).ok()
    }

    #[test]
    fn the_protocol_says_what_is_so() {
        let text = include_str!("../../../docs/protocol.md");
        let table = text.split("\n## Deadlines\n").nth(1).expect("a chapter of deadlines");
        let table = table.split("\n## ").next().unwrap();
        let (mut told, mut told_growing) = (BTreeMap::new(), BTreeMap::new());
        for row in table.lines().filter(|line| line.starts_with("| ")).skip(2) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let seconds = |text| told_seconds(text).unwrap_or_else(|| panic!("no seconds: {row}"));
            let is_new = match cells[2].split_once(", then up to ") {
                Some((first, longest)) => {
                    told_growing.insert(cells[1], (seconds(first), seconds(longest))).is_none()
                }
                None => told.insert(cells[1], seconds(cells[2])).is_none(),
            };
            assert!(is_new, "twice: {row}");
        }
        assert_eq!(told, all());
        assert_eq!(told_growing, growing());
        let (apart, answer) = (SETTLE_PAUSE.as_secs(), ANSWER.as_secs());
        let settled = format!("asks {SETTLE_TRIES} times, {apart} s apart (an answer may take {answer} s)");
        assert!(text.contains(&settled), "{settled:?} is not said");
        let at_first = |(first, longest): (Duration, Duration)| {
            format!("after {} s at first, doubling to {} s", first.as_secs_f64(), longest.as_secs())
        };
        let (first, longest) = (ABANDON_PAUSE.0.as_secs(), ABANDON_PAUSE.1.as_secs() / 60);
        for again in [
            at_first(ASK_AGAIN),
            at_first(LINK_AGAIN),
            format!("after {first} s at first, then up to every {longest} minutes"),
        ] {
            assert!(text.replace('\n', " ").contains(&again), "{again:?} is not said");
        }
    }

    #[test]
    fn who_is_to_wait_is_told_for_how_long() {
        let text = include_str!("../../../docs/operations.md");
        let decided = format!("within {} s", DECIDED.as_secs());
        let row = text.lines().find(|line| line.starts_with("| `handing-over` |")).expect("a row");
        assert!(row.contains(&decided), "{decided:?} is not said: {row}");
        let longest = ABANDON_PAUSE.1.as_secs() / 60;
        let told = format!("its agent is told within {longest} minutes");
        assert!(text.contains(&told), "{told:?} is not said");
    }

    #[test]
    fn who_waits_waits_longer_than_what_it_waits_for_may_take() {
        let all = all();
        let of = |names: &[&str]| names.iter().map(|name| all[name]).sum::<Duration>();
        for (waits, for_what, why) in [
            (of(&["silence"]), of(&["ping"]) * 4, "a link with some missed pings is not dead"),
            (of(&["word while reserving"]), of(&["still working"]) * 3, "a word may be late"),
            (
                of(&["reserved"]),
                of(&["QEMU's start", "hook", "QEMU's answer"]),
                "a machine in hundreds of GiB of huge pages can be reserved",
            ),
            (of(&["reserved"]), of(&["boot files"]), "a source that ships them goes on waiting"),
            (of(&["handshake"]), of(&["connect"]), "both ends of a connection"),
            (
                of(&["answer"]),
                of(&["found", "connect", "handshake"]),
                "an agent that has just started answers",
            ),
            (
                of(&["post-copy ready"]),
                of(&["QEMU's answer"]) + of(&["tracking"]) * 3,
                "QEMU is told, and held, there",
            ),
            (of(&["patience"]), of(&["known"]), "what is known is told within the pause"),
            (of(&["load"]), of(&["QEMU's answer"]), "QEMU is told there"),
            (
                (of(&["answer"]) + of(&["ask again"])) * SETTLE_TRIES,
                of(&["QEMU's answer"]) * 2,
                "a QEMU that hangs at its resumption is heard of within the migration",
            ),
            // QEMU is asked to quit, waited for, killed and waited for; then the storage daemon is.
            (of(&["cancel"]), of(&["quit", "quit", "kill", "kill"]), "a copy has been thrown away"),
            (of(&["health"]), of(&["no progress", "network-redirect"]), "the destination reports in time"),
            (of(&["stragglers"]), of(&["diverted"]), "what the source still has for the guest comes"),
        ] {
            assert!(waits > for_what, "{why}: {waits:?}, {for_what:?}");
        }
    }
}
