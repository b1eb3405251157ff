//! Memory in several pieces, of several kinds, below and above 4 GiB: none of them may be left behind.

use std::path::{Path, PathBuf};

use end_to_end::{Pair, report_adds_up};
use testbed::guest_spec::{GuestSpec, Pattern};
use testbed::{HugePages, files_below};

/// A guest of two NUMA nodes whose memory is in these two pieces; half of each node is filled.
fn of_two_nodes(pair: &Pair, backends: [String; 2], memory_mib: u64) -> GuestSpec {
    let [first, second] = backends;
    let words = [
        "-object",
        &first,
        "-object",
        &second,
        "-numa",
        "node,nodeid=0,cpus=0,memdev=m0",
        "-numa",
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

fn moves_there_and_back(pair: &Pair, spec: &GuestSpec) {
    let guest = pair.run(pair.a(), "vm", spec);
    let before = guest.status();
    for (from, to) in [(pair.a(), pair.b()), (pair.b(), pair.a())] {
        report_adds_up(&pair.migrate("vm", from, to, &[]), &guest);
        pair.holds_nothing(from);
        guest.sound_since(&before);
    }
}

/// The files in a directory for RAM, each with the directory of the agent that has made it.
fn files(directory: &Path) -> Vec<String> {
    let below = |file: PathBuf| file.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
    files_below(directory).into_iter().map(below).collect()
}

#[test]
fn a_guest_of_two_numa_nodes_in_private_memory_is_made_mirrorable_and_arrives_whole() {
    let pair = Pair::start();
    let backends = ["m0", "m1"].map(|id| format!("memory-backend-ram,id={id},size=96M"));
    let spec = of_two_nodes(&pair, backends, 192);
    moves_there_and_back(&pair, &spec);
    assert_eq!(files(pair.a().ram_dir()), ["vmirror-host-a/vmirror-vm@m0", "vmirror-host-a/vmirror-vm@m1"]);
}

#[test]
fn a_node_in_huge_pages_beside_one_in_small_ones_is_not_left_behind() {
    let mut pool = HugePages::add(2 * 48).expect("this test needs root and a host with huge pages to spare");
    let directory = pool.directory(None).unwrap();
    let pair = Pair::start();
    let huge = format!("memory-backend-file,id=m1,size=96M,share=on,mem-path={}", directory.display());
    let spec = of_two_nodes(&pair, ["memory-backend-ram,id=m0,size=96M".to_owned(), huge], 192);
    moves_there_and_back(&pair, &spec);
    assert_eq!(files(pair.a().ram_dir()), ["vmirror-host-a/vmirror-vm@m0"]);
    assert_eq!(files(&directory), ["vmirror-host-a/vmirror-vm@m1"]);
}

#[test]
fn nodes_of_an_old_machine_that_share_its_one_memory_arrive_whole() {
    let pair = Pair::start();
    let nodes = ["-numa", "node,nodeid=0,cpus=0,mem=96M", "-numa", "node,nodeid=1,cpus=1,mem=96M"];
    // Newer machine types take no node that is not a memory device of its own.
    let machine = "pc-q35-5.0".to_owned();
    let spec =
        GuestSpec { machine, cpus: 2, extra: nodes.map(str::to_owned).to_vec(), ..pair.spec("vm", 192) };
    moves_there_and_back(&pair, &spec);
    assert_eq!(files(pair.a().ram_dir()), ["vmirror-host-a/vmirror-vm@pc.ram"]);
}
