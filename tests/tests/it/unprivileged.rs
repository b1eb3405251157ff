//! Moving a guest must not take privileges that it does not need.

use std::process::{Child, Command, Stdio};

use end_to_end::{Guest, Pair, report_adds_up, vmirror};
use testbed::guest_spec::{GuestSpec, Pattern, Ram};
use testbed::old_kernel;

/// A user and group that own nothing.
const NOBODY: &str = "65534";

/// Runs the test of that name again by somebody who may do nothing, if this is not such a one. Whether it is done with that.
fn by_nobody(name: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let program = std::env::current_exe().unwrap();
    let name = module_path!().split_once("::").map(|(_, module)| format!("{module}::{name}")).unwrap();
    let as_nobody = |program: &std::path::Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]).arg(program);
        command
    };
    if !as_nobody(&program).arg("--list").output().unwrap().status.success() {
        eprintln!("SKIPPED {name}: {} is out of other users' reach", program.display());
        return true;
    }
    let output = as_nobody(&program).args(["--exact", &name, "--nocapture"]).output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert!(said.contains("moved by user 65534"), "{said}");
    true
}

/// A QEMU that does not outlive the test.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What libvirt gives each of its QEMUs.
const SANDBOX: [&str; 2] =
    ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];

#[test]
fn an_ordinary_user_moves_a_guest_there_and_back() {
    if by_nobody("an_ordinary_user_moves_a_guest_there_and_back") {
        return;
    }
    let pair = Pair::start();
    // In a sandbox of its own, whose filter the agent may not put aside.
    let extra = SANDBOX.map(str::to_owned).to_vec();
    let spec = GuestSpec { rate: 1000, pattern: Pattern::Random, extra, ..pair.spec("vm", 192) };
    let guest = pair.run(pair.a(), "vm", &spec);
    let before = guest.status();
    for [from, to] in [[pair.a(), pair.b()], [pair.b(), pair.a()]] {
        report_adds_up(&pair.migrate("vm", from, to, &[]), &guest);
        pair.holds_nothing(from);
        guest.sound_since(&before);
    }
    eprintln!("moved by user {}", rustix::process::geteuid().as_raw());
}

#[test]
fn a_guest_under_an_unknown_filter_is_not_made_to_call_what_might_kill_it() {
    if by_nobody("a_guest_under_an_unknown_filter_is_not_made_to_call_what_might_kill_it") {
        return;
    }
    let pair = Pair::start();
    let qmp = pair.a().directory().join("own.qmp");
    let ram = Ram::File(pair.a().ram_dir().join("own"));
    let spec = GuestSpec { ram, qmp: Some(qmp.clone()), ..pair.spec("vm", 192) };
    let line = spec.command_line();
    let mut command = pair.a().command(&line[0]);
    command.args(&line[1..]).stdout(Stdio::null()).stdin(Stdio::null());
    // Harmless in truth, which nobody can see from outside.
    old_kernel::without_bpf(&mut command).unwrap();
    let mut qemu = Started(command.spawn().unwrap());
    let guest = Guest::ready("vm", &spec);
    let before = guest.status();
    let _ = vmirror(pair.a(), &["adopt", "vm", "--qmp", qmp.to_str().unwrap(), "--json"]).done();

    let words = ["seccomp filter", "userfaultfd()", "CAP_SYS_ADMIN", "trust_seccomp"];
    pair.migration_refused("vm", &[]).is("tracking", &words);
    guest.sound_since(&before);

    // Who knows better says so.
    let trust = |config: &mut toml::Table| drop(config.insert("trust_seccomp".to_owned(), true.into()));
    pair.a().stop_agent().unwrap();
    pair.a().configure(trust).unwrap();
    pair.a().start_agent().unwrap();
    report_adds_up(&pair.migrate("vm", pair.a(), pair.b(), &[]), &guest);
    guest.sound_since(&before);
    qemu.0.wait().unwrap();
    eprintln!("moved by user {}", rustix::process::geteuid().as_raw());
}
