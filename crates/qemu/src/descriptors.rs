//! How many files this process may have open, and what the programs that it starts get of that.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the limit was before it was raised.
static BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of open files of this process to the hard one, and returns that; none is no limit. The soft limit is low for
/// programs that use select(2), which this one does not.
///
/// # Errors
/// What the system says; the limit is as it was then.
pub fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    let limit = getrlimit(Resource::Nofile);
    BEFORE.get_or_init(|| limit);
    if limit.current != limit.maximum {
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    }
    Ok(limit.maximum)
}

/// Has a program start with the limit of open files that this process was started with: whoever counts on a low one, and whoever
/// closes every descriptor that there could be, is not surprised.
pub fn with_former_descriptor_limit(command: &mut Command) {
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are allowed. It reads what
    // was set once, which takes no lock, and makes one system call.
    unsafe {
        command.pre_exec(|| match BEFORE.get() {
            Some(before) => Ok(setrlimit(Resource::Nofile, *before)?),
            None => Ok(()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says to this very program, run once more by the test, that it is to look.
    const LOOK: &str = "VMIRROR_TEST_DESCRIPTORS";

    #[test]
    fn the_limit_is_raised_here_and_not_for_what_is_started() {
        if std::env::var_os(LOOK).is_none() {
            let script = "ulimit -S -n 200 && ulimit -H -n 300 && exec \"$0\" --exact \
                          descriptors::tests::the_limit_is_raised_here_and_not_for_what_is_started";
            let this = std::env::current_exe().unwrap();
            let shell = Command::new("sh").args(["-c", script]).arg(this).env(LOOK, "1").output().unwrap();
            assert!(shell.status.success(), "{shell:?}");
            return;
        }
        let told = |former: bool| {
            let mut shell = Command::new("sh");
            shell.args(["-c", "ulimit -S -n; ulimit -H -n"]);
            if former {
                with_former_descriptor_limit(&mut shell);
            }
            String::from_utf8(shell.output().unwrap().stdout).unwrap()
        };
        assert_eq!(told(true), "200\n300\n", "before it is raised nothing is set");
        assert_eq!(raise_descriptor_limit().unwrap(), Some(300));
        assert_eq!(raise_descriptor_limit().unwrap(), Some(300));
        assert_eq!((told(false), told(true)), ("300\n300\n".to_owned(), "200\n300\n".to_owned()));
    }
}
