//! A guest that ends while something else is done to it must be cleaned up after as soon as that is over: its memory is in a tmpfs.

use std::net::TcpListener;
use std::time::Duration;

use end_to_end::{Pair, until, vmirror};
use rustix::process::{Pid, Signal, kill_process};
use testbed::guest_spec::GuestSpec;

fn small(pair: &Pair) -> GuestSpec {
    GuestSpec { fill_mib: 16, rate: 100, ..pair.spec("vm", 128) }
}

fn kill_qemu(pair: &Pair) {
    kill_process(Pid::from_raw(pair.qemu(pair.a()).unwrap()).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn a_guest_that_ends_while_it_is_checked_leaves_nothing() {
    let pair = Pair::start();
    let _ = pair.run(pair.a(), "vm", &small(&pair));
    // Somebody who takes the connection, and says nothing.
    let address = pair.a().listen().ip();
    let silent = pair.a().on_network(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let to = silent.local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        let check = scope.spawn(|| vmirror(pair.a(), &["check", "vm", "--to", &to, "--json"]));
        let (_held, _) = silent.accept().unwrap();
        kill_qemu(&pair);
        // QEMU is gone while the check still waits.
        until("QEMU has ended", || pair.qemu(pair.a()).is_none());
        std::thread::sleep(Duration::from_millis(200));
        assert!(!check.is_finished(), "it waits for an answer");
        let checked = check.join().unwrap();
        assert_ne!(checked.code, Some(0), "{checked:?}");
    });
    until("it is not listed any more", || pair.show("vm", pair.a()).is_none());
    pair.holds_nothing(pair.a());
}

#[test]
fn a_guest_that_ends_while_it_is_mirrored_leaves_nothing_on_either_host() {
    let pair = Pair::start();
    let _ = pair.run(pair.a(), "vm", &small(&pair));
    let _ = pair.mirror("vm", pair.a(), pair.b(), &[]);
    kill_qemu(&pair);
    until("it is not listed any more", || pair.show("vm", pair.a()).is_none());
    pair.holds_nothing(pair.a());
    pair.holds_nothing(pair.b());
}
