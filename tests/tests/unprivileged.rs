//! Moving a guest must not take privileges that it does not need.

use std::process::Command;

use end_to_end::{Pair, accounted};
use testbed::guest_spec::{GuestSpec, Pattern};

/// A user and group that own nothing.
const NOBODY: &str = "65534";

#[test]
fn an_ordinary_user_moves_a_guest_there_and_back() {
    const NAME: &str = "an_ordinary_user_moves_a_guest_there_and_back";
    if !rustix::process::geteuid().is_root() {
        return there_and_back();
    }
    // The same test again, by somebody who may do nothing.
    let program = std::env::current_exe().unwrap();
    let as_nobody = |program: &std::path::Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]).arg(program);
        command
    };
    if !as_nobody(&program).arg("--list").output().unwrap().status.success() {
        eprintln!("SKIPPED {NAME}: {} is out of other users' reach", program.display());
        return;
    }
    let output = as_nobody(&program).args(["--exact", NAME, "--nocapture"]).output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert!(said.contains("moved by user 65534"), "{said}");
}

fn there_and_back() {
    let pair = Pair::start();
    let spec = GuestSpec { rate: 1000, pattern: Pattern::Random, ..pair.spec("vm", 192) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    for [from, to] in [[pair.a(), pair.b()], [pair.b(), pair.a()]] {
        accounted(&pair.migrate("vm", from, to, &[]), &guest);
        pair.holds_nothing(from);
        guest.sound_since(&before);
    }
    eprintln!("moved by user {}", rustix::process::geteuid().as_raw());
}
