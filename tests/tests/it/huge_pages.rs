//! A guest in huge pages must arrive in huge pages, whole, and must not be begun where there are not enough of them.

use std::fs::File;
use std::path::Path;

use end_to_end::{Guest, Pair, report_adds_up, until, vmirror};
use mirror::layout::{Layout, PAGE_SIZE, PageIndex};
use mirror::memory::{Ram, RamError, RamFile};
use testbed::guest_spec::{GuestSpec, Pattern, Ram as GuestRam};
use testbed::huge_pages::HUGE_PAGE;
use testbed::{AgentOptions, Host, HugePages, Testbed, files_below};

/// Memory of the guest in MiB: no whole number of huge pages.
const MEMORY: u64 = 129;
/// Huge pages that it takes.
const PAGES: u64 = 65;

/// The huge pages of a test. What needs root or a host that has such pages must fail without, not pass unseen.
fn huge_pages(pages: u64) -> HugePages {
    HugePages::add(pages).expect("this test needs root and a host with huge pages of 2 MiB to spare")
}

/// Bytes of huge pages that the QEMU on a host has mapped and touched.
fn in_huge_pages(pair: &Pair, host: &Host) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pair.qemu(host).unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

fn busy(pair: &Pair) -> GuestSpec {
    GuestSpec { fill_mib: 48, rate: 500, pattern: Pattern::Random, ..pair.spec("vm", MEMORY) }
}

fn on_huge_pages(pair: &Pair, directory: &Path) -> GuestSpec {
    GuestSpec { extra: vec!["-mem-path".into(), directory.to_str().unwrap().into()], ..busy(pair) }
}

/// Moves a guest there and back, and looks that it is in huge pages everywhere and leaves none behind.
fn there_and_back(pair: &Pair, guest: &Guest, pool: &HugePages) {
    let before = guest.status();
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        assert!(in_huge_pages(pair, from) > 48 << 20, "{}", in_huge_pages(pair, from));
        let report = pair.migrate("vm", from, to, &["--verify", "strict"]);
        report_adds_up(&report, guest);
        // Dirtied by huge pages, sent by small ones: only what has another content.
        let later = &report.rounds[1..];
        let (due, plain) = later
            .iter()
            .fold((0, 0), |(due, plain), round| (due + round.dirty_pages, plain + round.plain + round.delta));
        assert!(plain < due / 2, "{plain} pages sent of {due}: {later:#?}");
        pair.holds_nothing(from);
        assert!(in_huge_pages(pair, to) > 48 << 20, "{}", in_huge_pages(pair, to));
        until("the huge pages of the copy that was left are free", || pool.free().unwrap() >= PAGES);
        guest.sound_since(&before);
    }
}

#[test]
fn a_guest_whose_ram_dir_has_huge_pages_arrives_in_huge_pages() {
    let mut pool = huge_pages(2 * PAGES);
    let testbed = Testbed::new().unwrap();
    let directories = testbed.hosts().each_ref().map(|host| {
        let directory = pool.directory(None).unwrap();
        let ram_dir = directory.to_str().unwrap().to_owned();
        host.configure(|config| drop(config.insert("ram_dir".to_owned(), ram_dir.into()))).unwrap();
        directory
    });
    let pair = Pair::of(testbed);
    let guest = pair.run(pair.a(), "vm", &busy(&pair));
    there_and_back(&pair, &guest, &pool);
    assert_eq!(directories.map(|directory| files_below(&directory).len()), [1, 0]);
}

#[test]
fn a_guest_that_asked_for_huge_pages_by_mem_path_gets_them_at_the_same_place_there() {
    let mut pool = huge_pages(2 * PAGES);
    let directory = pool.directory(None).unwrap();
    let pair = Pair::of(Testbed::new().unwrap());
    let guest = pair.run(pair.a(), "vm", &on_huge_pages(&pair, &directory));
    there_and_back(&pair, &guest, &pool);
    assert_eq!(files_below(&directory).len(), 1);
}

/// Hosts whose RAM files are in huge pages, and a guest that was started by hand in pages of its own.
fn adopted(pool: &mut HugePages, extra: &[&str]) -> (Pair, Guest) {
    let testbed = Testbed::new().unwrap();
    for host in testbed.hosts() {
        let ram_dir = pool.directory(None).unwrap().to_str().unwrap().to_owned();
        host.configure(|config| drop(config.insert("ram_dir".to_owned(), ram_dir.into()))).unwrap();
    }
    let pair = Pair::of(testbed);
    let qmp = pair.a().directory().join("vm-own.qmp");
    let extra = ["-daemonize"].iter().chain(extra).map(|word| (*word).to_owned()).collect();
    let spec =
        GuestSpec { ram: GuestRam::Private, qmp: Some(qmp.clone()), memory_mib: 130, extra, ..busy(&pair) };
    let guest = Guest::by_hand(pair.a(), "vm", &spec);
    let _ = vmirror(pair.a(), &["adopt", "vm", "--qmp", qmp.to_str().unwrap()]).done();
    (pair, guest)
}

#[test]
fn a_guest_in_huge_pages_without_a_name_is_adopted_and_arrives_in_huge_pages() {
    let mut pool = huge_pages(2 * PAGES);
    let memfd = "memory-backend-memfd,id=m,size=130M,share=on,hugetlb=on";
    let (pair, guest) = adopted(&mut pool, &["-object", memfd, "-machine", "memory-backend=m"]);
    there_and_back(&pair, &guest, &pool);
}

#[test]
fn a_guest_in_huge_pages_of_its_own_is_adopted_and_arrives_in_huge_pages() {
    let mut pool = huge_pages(2 * PAGES);
    let directory = pool.directory(None).unwrap();
    let (pair, guest) = adopted(&mut pool, &["-mem-path", directory.to_str().unwrap()]);
    there_and_back(&pair, &guest, &pool);
}

#[test]
fn a_guest_in_huge_pages_is_not_begun_where_there_are_none_or_not_enough() {
    let mut pool = huge_pages(2 * PAGES - 1);
    let directory = pool.directory(None).unwrap();
    let pair = Pair::of(Testbed::new().unwrap());
    let guest = pair.run(pair.a(), "vm", &on_huge_pages(&pair, &directory));
    let before = guest.status();
    let address = pair.b().listen().to_string();
    let migrate = ["migrate", "vm", "--to", &address];
    pair.refused(pair.a(), &migrate)
        .is("no-room", &["130 MiB", "128 MiB", "2048 KiB", "host-b", "nr_hugepages"]);
    // Nor is a second one started that they are not enough for.
    let run =
        ["run", "big", "--", "qemu-system-x86_64", "-m", "130", "-mem-path", directory.to_str().unwrap()];
    pair.refused(pair.a(), &run).is("no-room", &["130 MiB", "128 MiB", "huge pages"]);

    pair.b().stop_agent().unwrap();
    pair.b()
        .start_agent_with(&AgentOptions { hidden: vec![directory.clone()], ..AgentOptions::default() })
        .unwrap();
    let refusal = pair.refused(pair.a(), &migrate);
    refusal.is("huge-pages", &["pc.ram", "2048 KiB", "host-b", directory.to_str().unwrap(), "hugetlbfs"]);
    guest.sound_since(&before);
}

#[test]
fn post_copy_of_a_guest_in_huge_pages_is_refused_before_anything_begins() {
    let mut pool = huge_pages(2 * PAGES);
    let directory = pool.directory(None).unwrap();
    let pair = Pair::of(Testbed::new().unwrap());
    let guest = pair.run(pair.a(), "vm", &on_huge_pages(&pair, &directory));
    let before = guest.status();
    let address = pair.b().listen().to_string();
    let options = ["vm", "--to", &address, "--on-diverge", "post-copy"];
    let check = vmirror(pair.a(), &[&["check", "--json"], &options[..]].concat());
    assert_eq!((check.code, check.json()["findings"][0]["kind"].as_str()), (Some(2), Some("post-copy")));
    let refusal = pair.refused(pair.a(), &[&["migrate"], &options[..]].concat());
    refusal.is("post-copy", &["pc.ram", "host-b", "huge pages", "--on-diverge throttle"]);
    guest.sound_since(&before);
}

/// RAM of so many huge pages in a new file that nothing has reserved pages for.
fn unreserved(directory: &Path, huge: u64) -> Result<Ram, RamError> {
    let file = File::options().read(true).write(true).create_new(true).open(directory.join("ram")).unwrap();
    file.set_len(huge * HUGE_PAGE).unwrap();
    let layout = Layout::new([("ram", huge * HUGE_PAGE)], 1).unwrap();
    Ram::new(layout, vec![RamFile { file, offset: 0, process: None }])
}

/// The page with this number of the huge page with that one.
fn page(huge: u64, small: u64) -> PageIndex {
    PageIndex(huge * (HUGE_PAGE / PAGE_SIZE as u64) + small)
}

#[test]
fn a_copy_that_runs_out_of_huge_pages_is_an_error_and_no_signal() {
    let mut pool = huge_pages(2);
    let directory = pool.directory(Some(2)).unwrap();
    let mut ram = unreserved(&directory, 3).unwrap();
    ram.begin_copy().unwrap();
    let content = [7; PAGE_SIZE];
    ram.write(page(0, 5), &content).unwrap();
    ram.write(page(2, 511), &content).unwrap();
    for refused in [ram.write(page(1, 0), &content), ram.clear(page(1, 3), 2)] {
        let Err(RamError::Io { source, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    }
    let mut found = [0; PAGE_SIZE];
    for (written, page) in [(7, page(0, 5)), (7, page(2, 511)), (0, page(0, 4)), (0, page(1, 0))] {
        ram.read(page, &mut found).unwrap();
        assert_eq!(found, [written; PAGE_SIZE], "{page:?}");
    }
}

#[test]
fn zeros_leave_their_neighbours_and_give_no_huge_page_away() {
    let mut pool = huge_pages(2);
    let directory = pool.directory(None).unwrap();
    let free = pool.free().unwrap();
    let mut ram = unreserved(&directory, 2).unwrap();
    ram.begin_copy().unwrap();
    for small in 0..512 {
        ram.write(page(1, small), &[small as u8 | 1; PAGE_SIZE]).unwrap();
    }
    ram.clear(page(1, 100), 3).unwrap();
    let mut found = [0; PAGE_SIZE];
    for (small, byte) in [(99, 99), (100, 0), (102, 0), (103, 103)] {
        ram.read(page(1, small), &mut found).unwrap();
        assert_eq!(found, [byte; PAGE_SIZE], "{small}");
    }
    // The guest that will run on it was promised these pages.
    ram.clear(page(1, 0), 512).unwrap();
    assert_eq!(pool.free().unwrap(), free - 1);
    // What a copy begins in is all zero, whatever it was.
    ram.write(page(1, 7), &[9; PAGE_SIZE]).unwrap();
    ram.begin_copy().unwrap();
    ram.read(page(1, 7), &mut found).unwrap();
    assert_eq!(found, [0; PAGE_SIZE]);
}
