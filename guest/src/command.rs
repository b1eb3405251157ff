//! What the guest can be told while it runs, on its serial console or by UDP.

use std::sync::atomic::Ordering::Relaxed;

use crate::rate;
use crate::writer::Control;

/// One command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Tell the status now. Also what an empty line means.
    Status,
    /// Write nothing until [`Command::Resume`].
    Pause,
    /// Write again.
    Resume,
    /// Write that many pages per second from now on.
    Rate(u64),
    /// Read everything back that the test disks must hold. Answered by a [`Verdict`](crate::disk::Verdict).
    Check,
    /// End the work on the test disks for good, with everything on them and their file systems unmounted.
    Quiet,
    /// Switch the machine off.
    PowerOff,
    /// Restart the machine.
    Reboot,
    /// Crash the kernel.
    Panic,
}

/// A command that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// There is no such command.
    #[error(
        "unknown command {0:?}: expected status, pause, resume, rate N, check, quiet, poweroff, reboot or panic"
    )]
    Unknown(String),
    /// The rate is none.
    #[error("bad rate {0:?}: expected pages per second, or MiB per second as in 4MiB")]
    Rate(String),
}

impl Command {
    /// Reads one line.
    ///
    /// # Errors
    /// Where it is no command.
    pub fn parse(line: &str) -> Result<Self, CommandError> {
        let mut words = line.split_ascii_whitespace();
        let command = match (words.next(), words.next(), words.next()) {
            (None | Some("status"), None, _) => Self::Status,
            (Some("pause"), None, _) => Self::Pause,
            (Some("resume"), None, _) => Self::Resume,
            (Some("check"), None, _) => Self::Check,
            (Some("quiet"), None, _) => Self::Quiet,
            (Some("poweroff"), None, _) => Self::PowerOff,
            (Some("reboot"), None, _) => Self::Reboot,
            (Some("panic"), None, _) => Self::Panic,
            (Some("rate"), Some(rate), None) => {
                Self::Rate(rate::parse(rate).map_err(|_| CommandError::Rate(rate.to_owned()))?)
            }
            _ => return Err(CommandError::Unknown(line.trim().to_owned())),
        };
        Ok(command)
    }

    /// Does what concerns the writer; what concerns the disks and the machine is left to the caller.
    pub fn apply(self, control: &Control) {
        match self {
            Self::Pause => control.paused.store(true, Relaxed),
            Self::Resume => control.paused.store(false, Relaxed),
            Self::Rate(rate) => control.rate.store(rate, Relaxed),
            Self::Status | Self::Check | Self::Quiet | Self::PowerOff | Self::Reboot | Self::Panic => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read() {
        assert_eq!(Command::parse("\r\n"), Ok(Command::Status));
        assert_eq!(Command::parse("rate 250\n"), Ok(Command::Rate(250)));
        assert_eq!(Command::parse("rate 1MiB"), Ok(Command::Rate(256)));
        assert_eq!(Command::parse("check"), Ok(Command::Check));
        assert_eq!(Command::parse("quiet\n"), Ok(Command::Quiet));
        assert_eq!(Command::parse(" poweroff"), Ok(Command::PowerOff));
        assert_eq!(Command::parse("rate x"), Err(CommandError::Rate("x".into())));
        assert_eq!(Command::parse("pause now"), Err(CommandError::Unknown("pause now".into())));
    }

    #[test]
    fn the_writer_obeys() {
        let control = Control::new(1);
        Command::Pause.apply(&control);
        assert!(control.paused.load(Relaxed));
        Command::Resume.apply(&control);
        assert!(!control.paused.load(Relaxed));
        Command::Rate(9).apply(&control);
        assert_eq!(control.rate.load(Relaxed), 9);
    }
}
