//! A database at work must not lose what it has committed when it moves, and its clients nothing but time.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use end_to_end::{Guest, PATIENCE, Pair, image, report_adds_up, until, vmirror};
use session::report::DiskMode;
use testbed::client::Pgbench;
use testbed::disk::{self, Format};
use testbed::guest_spec::{GuestSpec, Nic, TestDisk, Userland};
use testbed::programs::Postgresql;
use testbed::{Client, Host, root_or_skip};

const TAP: &str = "tap0";
const IMAGE: &str = "postgresql.raw";
/// Moves while the database is at work: the last one ends where it began.
const MOVES: usize = 4;
/// Of pgbench.
const CONNECTIONS: u32 = 4;
/// What must be committed before the first move, and after each.
const TRANSACTIONS: u64 = 200;

/// The database of a guest, as seen from the client host.
struct Database<'a> {
    client: &'a Client,
    programs: &'a Postgresql,
    address: Ipv4Addr,
}

/// What must add up in the database: each transaction adds an amount to an account, a teller and a branch, and notes it in the history.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Books {
    transactions: u64,
    history: i64,
    accounts: i64,
    tellers: i64,
    branches: i64,
}

impl Database<'_> {
    fn accepts(&self) -> bool {
        self.client.sql(self.programs, self.address, "select 1").is_ok()
    }

    /// How many transactions are in the history.
    fn committed(&self) -> u64 {
        self.ask("select count(*) from pgbench_history").parse().unwrap()
    }

    fn books(&self) -> Books {
        let answer = self.ask(
            "select count(*), coalesce(sum(delta), 0), (select sum(abalance) from pgbench_accounts),
               (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches)
             from pgbench_history",
        );
        let numbers: Vec<i64> = answer.split('|').map(|number| number.parse().unwrap()).collect();
        let [transactions, history, accounts, tellers, branches] = numbers.try_into().unwrap();
        Books { transactions: transactions.try_into().unwrap(), history, accounts, tellers, branches }
    }

    /// Whether PostgreSQL, when it was started last, found that it had not been shut down.
    fn has_recovered(&self) -> bool {
        let log = "select pg_read_file('/var/log/postgresql/postgresql-'
             || current_setting('server_version_num')::int / 10000 || '-main.log')";
        self.ask(log).contains("was not properly shut down; automatic recovery in progress")
    }

    fn ask(&self, sql: &str) -> String {
        self.client.sql(self.programs, self.address, sql).unwrap()
    }
}

impl Books {
    fn balance(&self) -> bool {
        [self.accounts, self.tellers, self.branches] == [self.history; 3]
    }
}

/// Boots the guest from the image on a host, and waits until its database answers.
fn boot(pair: &Pair, host: &Host, spec: &GuestSpec, database: &Database<'_>) -> Guest {
    let began = Instant::now();
    host.add_tap(TAP).unwrap();
    let guest = pair.run(host, "vm", spec);
    until("PostgreSQL accepts connections", || database.accepts());
    eprintln!("booted in {:.1?}", began.elapsed());
    guest
}

/// One move, with all that must hold for it. Gives back when it was.
fn moves(pair: &Pair, guest: &Guest, [from, to]: [&Host; 2]) -> Range<SystemTime> {
    let (began, start) = (SystemTime::now(), Instant::now());
    let report = pair.migrate("vm", from, to, &["--timeout", "30m"]);
    let (ended, took) = (SystemTime::now(), start.elapsed());
    report_adds_up(&report, guest);
    let [disk] = &report.disks[..] else { panic!("one disk: {:?}", report.disks) };
    assert_eq!(disk.mode, DiskMode::Mirrored);
    let size = std::fs::metadata(image(from, IMAGE)).unwrap().len();
    let verification = &report.verification;
    assert_eq!(verification.proof_blocks, size.div_ceil(65536), "{verification:?}");
    assert_eq!((verification.mismatched_blocks, verification.repaired_blocks), (0, 0), "{verification:?}");
    if from.inventory().unwrap().links.contains_key(TAP) {
        // This one was made by hand, and is left to whoever made it.
        from.remove_tap(TAP).unwrap();
    }
    pair.holds_nothing(from);
    eprintln!(
        "to {}: {:.1?}, downtime {:.1} ms; memory {} KiB, disk {} KiB on the link; stopped to scan {:?}; {:?}",
        to.name(),
        took,
        report.downtime_ms,
        report.memory.wire_bytes >> 10,
        disk.wire_bytes >> 10,
        report.quiesced,
        report.pause,
    );
    began..ended
}

/// Waits until the database has committed as many more as shows that it is at work where it is now.
fn works_on(database: &Database<'_>, pgbench: &mut Pgbench) {
    let enough = database.committed() + TRANSACTIONS;
    until("transactions are committed", || {
        assert!(!pgbench.has_ended(), "all clients gave up");
        database.committed() >= enough
    });
}

#[test]
#[ignore = "a Debian with PostgreSQL and minutes of its work: run by `make test-full`"]
fn no_transaction_that_was_committed_is_lost_and_no_client_fails() {
    const NAME: &str = "no_transaction_that_was_committed_is_lost_and_no_client_fails";
    if !root_or_skip(NAME) {
        return;
    }
    let Some(programs) = Postgresql::find_or_skip(NAME) else { return };
    let pair = Pair::with_local_disks();
    let mut hosts = [pair.a(), pair.b()];
    disk::copy_sparse(&programs.image, &image(hosts[0], IMAGE)).unwrap();
    let nic = Nic::new(TAP, 10);
    let database = Database { client: pair.client().unwrap(), programs: &programs, address: nic.address };
    let root = TestDisk::new(pair.a().local_dir().join(IMAGE), Format::Raw, "root");
    let spec = GuestSpec {
        nic: Some(nic),
        userland: Some(Userland::Own(root)),
        fill_mib: 32,
        rate: 100,
        ..pair.spec("vm", 512)
    };

    let guest = boot(&pair, hosts[0], &spec, &database);
    let before = guest.status();
    assert_eq!(database.books().transactions, 0, "its history is not empty at first");
    let log = pair.testbed().directory().join("pgbench");
    std::fs::create_dir(&log).unwrap();
    let mut pgbench = database.client.pgbench(&programs, database.address, CONNECTIONS, &log).unwrap();
    works_on(&database, &mut pgbench);
    let began = SystemTime::now();
    let mut times = Vec::new();
    for _ in 0..MOVES {
        times.push(moves(&pair, &guest, hosts));
        guest.sane_since(&before);
        works_on(&database, &mut pgbench);
        hosts.reverse();
    }
    let report = pgbench.stop(PATIENCE).unwrap();
    let (summary, log) = (report.summary, &report.log);
    let stalls: Vec<Duration> = times.iter().map(|time| log.longest_stall(time.clone())).collect();
    eprintln!(
        "{} transactions; longest stall of each move {stalls:.2?}, before the first {:.2?}; longest transaction {:.2?}",
        summary.processed,
        log.longest_stall(UNIX_EPOCH..began),
        log.longest
    );
    assert!(report.status.success(), "{}: {}", report.status, report.complaints);
    assert_eq!((summary.failed, report.complaints.as_str()), (0, ""));
    assert_eq!(log.commits.len() as u64, summary.processed, "those in the log, and all");
    let books = database.books();
    assert_eq!(books.transactions, summary.processed, "what is in the history, and what clients were told");
    assert!(books.balance(), "{books:?}");
    guest.sound_since(&before);

    // As a power cut would end it: all that its clients were told of must be on the disk that has moved.
    let _ = vmirror(hosts[0], &["stop", "vm", "--force"]).done();
    until("it is gone", || pair.qemu(hosts[0]).is_none());
    pair.holds_nothing(hosts[0]);
    let spec = GuestSpec { serial: pair.a().serial("again"), ..spec };
    let guest = boot(&pair, hosts[0], &spec, &database);
    assert!(database.has_recovered(), "it was not switched off at work");
    assert_eq!(database.books(), books, "after recovery, and before");
    assert!(!guest.console().text().contains("EXT4-fs error"), "{}", guest.console().text());
}
