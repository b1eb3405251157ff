use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::time::Instant;

use tempfile::TempDir;

use super::*;

/// Longer than anything takes that is expected to happen.
const LONG: Duration = Duration::from_secs(60);

/// A directory of hooks.
struct Site {
    directory: TempDir,
    hooks: Hooks,
}

impl Site {
    fn new(deadline: Duration) -> Site {
        let directory = tempfile::tempdir().unwrap();
        let hooks = Hooks { directory: Some(directory.path().to_owned()), deadline };
        Site { directory, hooks }
    }

    /// One with a script for `network-up`.
    fn with(script: &str) -> Site {
        let site = Site::new(LONG);
        install(&site.path("network-up"), script, 0o755);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    async fn run(&self, hook: Hook) -> Result<(), HookError> {
        run(&self.hooks, hook, &[interface("net0")], true).await
    }

    async fn error(&self) -> HookError {
        self.run(Hook::Up).await.unwrap_err()
    }
}

/// Writes a script in another process: the descriptor by which one of ours writes it could be in a child of another test, and
/// a file that is open for writing cannot be run.
fn install(path: &Path, script: &str, mode: u32) {
    let here = path.parent().unwrap().to_str().unwrap();
    let script = script.replace("HERE", here);
    let mut cat = std::process::Command::new("sh")
        .args(["-c", "cat >\"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    cat.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(cat.wait().unwrap().success());
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn interface(netdev: &str) -> HookInterface {
    HookInterface {
        netdev: netdev.to_owned(),
        ifname: "vm-web1".to_owned(),
        mac: Some("52:54:00:00:00:01".to_owned()),
        bridge: None,
        mtu: 9000,
    }
}

async fn run(
    hooks: &Hooks,
    hook: Hook,
    interfaces: &[HookInterface],
    rehearsal: bool,
) -> Result<(), HookError> {
    let vm = "web1".parse().unwrap();
    let context = HookContext {
        vm: &vm,
        host: "host-b",
        peer: "host-a",
        session: Uuid::from_u128(7),
        side: Side::Destination,
        rehearsal,
        interfaces,
    };
    hooks.run(hook, &context).await
}

/// Whether a process is there, and not only its exit status.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < LONG, "{what} does not come about");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_hook_is_given_the_document_and_little_environment() {
    let script = "#!/bin/sh\ncat >HERE/document\n\
        tr '\\0' '\\n' </proc/$$/environ | sort >HERE/environment\npwd >HERE/pwd\n";
    let site = Site::with(script);
    site.run(Hook::Up).await.unwrap();
    let document: serde_json::Value = serde_json::from_str(&site.read("document")).unwrap();
    let expected = serde_json::json!({
        "version": 1, "hook": "network-up", "vm": "web1", "host": "host-b", "peer": "host-a",
        "session": "00000000-0000-0000-0000-000000000007", "side": "destination", "rehearsal": true,
        "interfaces": [{
            "netdev": "net0", "ifname": "vm-web1", "mac": "52:54:00:00:00:01", "bridge": null, "mtu": 9000
        }],
    });
    assert_eq!(document, expected);
    let path = std::env::var("PATH").unwrap();
    assert_eq!(site.read("environment"), format!("LANG=C.UTF-8\nPATH={path}\nVMIRROR_HOOK=network-up\n"));
    assert_eq!(site.read("pwd"), "/\n");
}

#[tokio::test]
async fn every_moment_has_its_file() {
    let site = Site::new(LONG);
    let moments = [Hook::Prepare, Hook::Up, Hook::Redirect, Hook::Down];
    for hook in moments {
        install(&site.path(hook.name()), "#!/bin/sh\necho \"$0 $VMIRROR_HOOK\" >>HERE/ran\n", 0o700);
        site.run(hook).await.unwrap();
    }
    let directory = site.directory.path().canonicalize().unwrap();
    let line = |hook: &Hook| format!("{} {}\n", directory.join(hook.name()).display(), hook.name());
    assert_eq!(site.read("ran"), moments.iter().map(line).collect::<String>());
}

#[tokio::test]
async fn nothing_configured_or_no_such_file_is_nothing_to_do() {
    Site::with("#!/bin/sh\nexit 1\n").run(Hook::Redirect).await.unwrap();
    run(&Hooks::default(), Hook::Up, &[], true).await.unwrap();
}

#[tokio::test]
async fn a_directory_or_a_link_that_leads_nowhere_is_not_taken_for_nothing() {
    let site = Site::new(LONG);
    symlink("nowhere", site.path("network-up")).unwrap();
    assert!(matches!(site.error().await, HookError::Look { .. }));
    let gone = Hooks { directory: Some(site.path("gone")), deadline: LONG };
    let error = run(&gone, Hook::Up, &[], true).await.unwrap_err();
    assert!(error.to_string().contains(site.path("gone").to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn a_failure_tells_exit_status_and_last_line() {
    let error =
        Site::with("#!/bin/sh\necho first\nprintf 'no bridge \\033br-int\\n\\n' >&2\nexit 3\n").error().await;
    let message = error.to_string();
    assert!(
        message.ends_with("network-up has ended with exit status 3: no bridge \\u{1b}br-int"),
        "{message}"
    );
    let finding = error.finding("host-b");
    assert_eq!(finding.kind, "hook-failed");
    assert!(finding.message.starts_with("host-b: hook /"), "{finding:?}");

    let message = Site::with("#!/bin/sh\nkill -TERM $$\n").error().await.to_string();
    assert!(message.ends_with("has ended with signal 15, and printed nothing"), "{message}");
}

#[tokio::test]
async fn at_the_deadline_everything_that_was_started_is_killed() {
    let mut site = Site::with("#!/bin/sh\necho waiting\nsleep 1000 &\necho $! >HERE/pid\nwait\n");
    site.hooks.deadline = Duration::from_secs(3);
    let begin = Instant::now();
    let error = site.error().await;
    assert!(begin.elapsed() < LONG);
    let message = error.to_string();
    assert!(message.ends_with("has not ended within 3s and was killed: waiting"), "{message}");
    assert!(error.finding("host-b").hint.contains("deadline"));
    let pid = site.read("pid");
    until("the end of what the hook had started", || !runs(&pid)).await;
}

#[tokio::test]
async fn a_hook_that_is_no_longer_waited_for_is_killed() {
    let site = Site::with("#!/bin/sh\nsleep 1000 &\necho $! >HERE/new\nmv HERE/new HERE/pid\nwait\n");
    let there = until("the hook's start", || site.path("pid").exists());
    tokio::select! {
        ended = site.run(Hook::Up) => panic!("{ended:?}"),
        () = there => {}
    }
    let pid = site.read("pid");
    until("the end of what the hook had started", || !runs(&pid)).await;
}

#[tokio::test]
async fn what_a_hook_leaves_running_is_neither_waited_for_nor_killed() {
    let site = Site::with("#!/bin/sh\nsleep 1000 &\necho $! >HERE/pid\necho done\nexit 5\n");
    let error = site.error().await;
    assert!(error.to_string().ends_with("exit status 5: done"), "{error}");
    let pid = site.read("pid");
    assert!(runs(&pid));
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_hook_need_not_read_its_document() {
    let many: Vec<_> = (0..5000).map(|n| interface(&format!("net{n}"))).collect();
    assert!(serde_json::to_vec(&many).unwrap().len() > 4 * PIPE);
    for script in ["#!/bin/sh\nexit 0\n", "#!/bin/sh\nexec <&-\nsleep 0.1\n", "#!/bin/sh\nsleep 0.1\n"] {
        run(&Site::with(script).hooks, Hook::Up, &many, true).await.unwrap();
    }
    let site = Site::with("#!/bin/sh\nsleep 0.1\nwc -c >HERE/count\n");
    run(&site.hooks, Hook::Up, &many, true).await.unwrap();
    assert!(site.read("count").trim().parse::<usize>().unwrap() > 4 * PIPE);
}

#[tokio::test]
async fn much_output_holds_nothing_up() {
    let much = "head -c 1048576 /dev/zero | tr '\\0' x";
    Site::with(&format!("#!/bin/sh\n{much}\n")).run(Hook::Up).await.unwrap();
    let error =
        Site::with(&format!("#!/bin/sh\n{much}; {much} >&2; echo; echo last\nexit 1\n")).error().await;
    assert!(error.to_string().ends_with("exit status 1: last"), "{error}");
    let error = Site::with(&format!("#!/bin/sh\n{much}\nexit 1\n")).error().await;
    assert!(error.to_string().ends_with(&format!("status 1: {}…", "x".repeat(LONGEST_LINE))), "{error}");
}

#[tokio::test]
async fn what_cannot_be_run_is_said_and_no_shell_is_tried() {
    let site = Site::with("echo no interpreter >HERE/ran\n");
    let error = site.error().await;
    assert!(
        matches!(&error, HookError::Start { source, .. } if source.raw_os_error() == Some(libc::ENOEXEC)),
        "{error:?}"
    );
    assert!(!site.path("ran").exists());
    assert!(error.finding("b").hint.contains("#!/bin/sh"));

    fs::set_permissions(site.path("network-up"), Permissions::from_mode(0o644)).unwrap();
    let error = site.error().await;
    assert!(error.to_string().ends_with("network-up is not executable"), "{error}");
    fs::create_dir(site.path("network-down")).unwrap();
    let error = site.run(Hook::Down).await.unwrap_err();
    assert!(error.to_string().ends_with("network-down is not a file"), "{error}");
}

#[tokio::test]
async fn what_others_could_have_written_is_not_run() {
    let site = Site::with("#!/bin/sh\ntouch HERE/ran\n");
    let hook = site.path("network-up");
    for mode in [0o775, 0o757] {
        fs::set_permissions(&hook, Permissions::from_mode(mode)).unwrap();
        let error = site.error().await;
        assert!(error.to_string().contains("network-up can be written by"), "{error}");
        assert!(error.finding("b").hint.contains("chmod go-w"));
    }
    fs::set_permissions(&hook, Permissions::from_mode(0o755)).unwrap();
    for mode in [0o770, 0o1707] {
        fs::set_permissions(site.directory.path(), Permissions::from_mode(mode)).unwrap();
        let error = site.error().await;
        assert!(
            matches!(&error, HookError::Writable { path, .. } if !path.ends_with("network-up")),
            "{error}"
        );
    }
    fs::set_permissions(site.directory.path(), Permissions::from_mode(0o755)).unwrap();

    // A link is as safe as what it leads to.
    let linked = Site::new(LONG);
    symlink(&hook, linked.path("network-up")).unwrap();
    fs::set_permissions(site.directory.path(), Permissions::from_mode(0o775)).unwrap();
    let error = linked.error().await;
    assert!(matches!(&error, HookError::Writable { path, .. } if hook.starts_with(path)), "{error}");
    assert!(!site.path("ran").exists());
    fs::set_permissions(site.directory.path(), Permissions::from_mode(0o755)).unwrap();
    linked.run(Hook::Up).await.unwrap();
    assert!(site.path("ran").exists());
}

#[tokio::test]
async fn what_is_somebody_elses_is_not_run() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED what_is_somebody_elses_is_not_run: needs root to give a file away");
        return;
    }
    let site = Site::with("#!/bin/sh\n");
    std::os::unix::fs::chown(site.path("network-up"), Some(65534), None).unwrap();
    let error = site.error().await;
    assert!(error.to_string().contains("belongs to user 65534"), "{error}");
}

/// The example of the documentation, with commands that only say what they were told.
#[tokio::test]
async fn the_open_vswitch_example_does_what_it_says() {
    if std::process::Command::new("jq").arg("--version").output().is_err() {
        eprintln!("SKIPPED the_open_vswitch_example_does_what_it_says: jq is not installed");
        return;
    }
    let site = Site::new(LONG);
    let told = "#!/bin/sh\necho \"${0##*/} $*\" >>HERE/told\ncase $* in *\" get \"*) echo 7;; esac\n";
    for command in ["ovs-vsctl", "ovs-appctl"] {
        install(&site.path(command), told, 0o755);
    }
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/open-vswitch");
    let moments = [Hook::Prepare, Hook::Up, Hook::Redirect, Hook::Down];
    for hook in moments {
        let script = fs::read_to_string(example.join(hook.name())).unwrap();
        let script = script.replacen("#!/bin/sh\n", "#!/bin/sh\nPATH=HERE:$PATH\n", 1);
        install(&site.path(hook.name()), &script, 0o755);
        site.run(hook).await.unwrap();
    }
    let looked = "ovs-vsctl --timeout=5 br-exists br-int\n";
    assert_eq!(site.read("told"), looked, "a rehearsal changes nothing");

    let without_address = HookInterface { ifname: "vm-web1.1".to_owned(), mac: None, ..interface("net1") };
    let interfaces = [interface("net0"), without_address];
    for hook in moments {
        run(&site.hooks, hook, &interfaces, false).await.unwrap();
    }
    let expected = r#"ovs-vsctl --timeout=5 br-exists br-int
ovs-vsctl --timeout=5 --may-exist add-port br-int vm-web1 -- set Interface vm-web1 external_ids:vm-uuid="web1" external_ids:iface-status=inactive external_ids:attached-mac="52:54:00:00:00:01" -- remove Interface vm-web1 external_ids iface-id
ovs-vsctl --timeout=5 get Interface vm-web1 ofport
ovs-vsctl --timeout=5 --may-exist add-port br-int vm-web1.1 -- set Interface vm-web1.1 external_ids:vm-uuid="web1" external_ids:iface-status=inactive -- remove Interface vm-web1.1 external_ids iface-id
ovs-vsctl --timeout=5 get Interface vm-web1.1 ofport
ovs-vsctl --timeout=2 set Interface vm-web1 external_ids:iface-id="web1-net0" external_ids:iface-status=active
ovs-vsctl --timeout=2 set Interface vm-web1.1 external_ids:iface-id="web1-net1" external_ids:iface-status=active
ovs-appctl --timeout=5 fdb/flush br-int
ovs-vsctl --timeout=5 --if-exists del-port br-int vm-web1
ovs-vsctl --timeout=5 --if-exists del-port br-int vm-web1.1
"#;
    assert_eq!(site.read("told"), format!("{looked}{expected}"));

    let option = HookInterface { ifname: "--db=elsewhere".to_owned(), ..interface("net0") };
    let error = run(&site.hooks, Hook::Prepare, &[option], false).await.unwrap_err();
    assert!(error.to_string().contains("is no name"), "{error}");
}
