//! Memory in several pieces, of several kinds, below and above 4 GiB: none of them may be left behind.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use end_to_end::{Pair, accounted, vmirror};
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{HugePages, Status};

/// A guest of two NUMA nodes whose memory is in these two pieces; half of each node is filled.
fn of_two_nodes(pair: &Pair, backends: [String; 2], memory_mib: u64) -> GuestSpec {
    let [first, second] = backends;
    let words = [
        "-object", &first, "-object", &second, "-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa",
        "node,nodeid=1,cpus=1,memdev=m1",
    ];
    GuestSpec {
        cpus: 2,
        rate: 500,
        pattern: Pattern::Random,
        extra: words.map(str::to_owned).to_vec(),
        ..pair.spec("vm", memory_mib)
    }
}

fn moves_there_and_back(pair: &Pair, spec: &GuestSpec) -> Status {
    let guest = pair.run(pair.a(), "vm", spec);
    let before = guest.status();
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        accounted(&pair.migrate("vm", from, to, &[]), &guest);
        pair.holds_nothing(from);
        guest.sound_since(&before);
    }
    guest.status()
}

fn files(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        names.map(|file| file.unwrap().file_name().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_guest_of_two_numa_nodes_in_private_memory_is_made_mirrorable_and_arrives_whole() {
    let pair = Pair::start();
    let backends = ["m0", "m1"].map(|id| format!("memory-backend-ram,id={id},size=96M"));
    let spec = of_two_nodes(&pair, backends, 192);
    let _ = moves_there_and_back(&pair, &spec);
    assert_eq!(files(pair.a().ram_dir()), ["vmirror-vm@m0", "vmirror-vm@m1"]);
}

#[test]
fn a_node_in_huge_pages_beside_one_in_small_ones_is_not_left_behind() {
    let mut pool = HugePages::add(2 * 48).expect("this test needs root and a host with huge pages to spare");
    let directory = pool.directory(None).unwrap();
    let pair = Pair::start();
    let huge = format!("memory-backend-file,id=m1,size=96M,share=on,mem-path={}", directory.display());
    let spec = of_two_nodes(&pair, ["memory-backend-ram,id=m0,size=96M".to_owned(), huge], 192);
    let _ = moves_there_and_back(&pair, &spec);
    assert_eq!(files(pair.a().ram_dir()), ["vmirror-vm@m0"]);
    assert_eq!(files(&directory), ["vmirror-vm@m1@host-a"]);
}

#[test]
fn nodes_that_name_their_sizes_alone_are_refused_by_qemu_and_leave_nothing() {
    let pair = Pair::start();
    let spec = pair.spec("vm", 192);
    let held = pair.a().inventory().unwrap();
    let line = GuestSpec { cpus: 2, extra: ["-numa", "node,mem=96M", "-numa", "node,mem=96M"].map(str::to_owned).to_vec(), ..spec };
    let line = line.command_line();
    let mut arguments = vec!["run", "vm", "--json", "--"];
    arguments.extend(line.iter().map(String::as_str));
    let said = vmirror(pair.a(), &arguments);
    eprintln!("{said:?}");
    pair.holds(pair.a(), &held);
}
