//! Why a command did not do what it was asked, and what that means for the exit code.

use std::process::ExitCode;

use agent::api::types::{ErrorBody, ErrorDetail};
use finding::{Finding, Stage};
use session::{Outcome, Report};

/// Exit codes, as the contract has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It is done.
    Done = 0,
    /// It failed; the VM still runs where it was.
    Failed = 1,
    /// Bad usage, or refused before anything began.
    Refused = 2,
    /// A person must decide.
    Uncertain = 3,
    /// Interrupted by Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

impl Exit {
    /// What a migration's end means.
    pub(crate) fn of(report: &Report) -> Exit {
        match report.outcome {
            Outcome::Completed => Exit::Done,
            Outcome::Uncertain => Exit::Uncertain,
            Outcome::Failed | Outcome::Cancelled => match &report.error {
                Some(failure) if failure.stage == Stage::Refused => Exit::Refused,
                _ => Exit::Failed,
            },
        }
    }
}

/// A command that did not do what it was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    detail: ErrorDetail,
}

impl Failure {
    pub(crate) fn new(
        exit: Exit,
        kind: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Failure {
        let detail = ErrorDetail {
            kind: kind.to_owned(),
            message: message.into(),
            hint: hint.into(),
            more: Vec::new(),
        };
        Failure { exit, detail }
    }

    /// Refused before anything began.
    pub(crate) fn refused(kind: &str, message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure::new(Exit::Refused, kind, message, hint)
    }

    /// What the agent answered.
    pub(crate) fn answered(exit: Exit, detail: ErrorDetail) -> Failure {
        Failure { exit, detail }
    }

    /// What kind of failure it is.
    pub(crate) fn kind(&self) -> &str {
        &self.detail.kind
    }

    /// What a migration ended with.
    pub(crate) fn ended(report: &Report) -> Failure {
        let finding = report.error.as_ref().map_or_else(
            || Finding::new("unknown", format!("the migration of {} did not complete", report.vm), ""),
            |failure| failure.finding.clone(),
        );
        let mut failure = Failure::new(Exit::of(report), &finding.kind, finding.message, finding.hint);
        failure.detail.more = report.error.as_ref().map(|failure| failure.more.clone()).unwrap_or_default();
        failure
    }

    /// A command line that cannot be understood, in one line.
    pub(crate) fn usage(error: &clap::Error) -> Failure {
        let text = error.render().to_string();
        let told = text.split("\n\nUsage:").next().unwrap_or(&text);
        let told = told.strip_prefix("error: ").unwrap_or(told);
        let (message, tips) = told.split_once("\n\n").unwrap_or((told, ""));
        let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let tip = one_line(tips.lines().find_map(|line| line.trim().strip_prefix("tip: ")).unwrap_or(""));
        let message = one_line(message);
        let hint = if tip.is_empty() { "see `vmirror --help`".to_owned() } else { tip };
        Failure::refused(
            "usage",
            message.trim_end_matches("For more information, try '--help'.").trim(),
            hint,
        )
    }

    /// One line for a person: what, why, what to do; and one for every further reason.
    pub(crate) fn line(&self) -> String {
        let sentence = |message: &str, hint: &str| {
            let message = message.trim_end_matches('.');
            if hint.is_empty() { message.to_owned() } else { format!("{message}; {hint}") }
        };
        let mut line = format!("error: {}", sentence(&self.detail.message, &self.detail.hint));
        for finding in &self.detail.more {
            line.push_str("\n  also: ");
            line.push_str(&sentence(&finding.message, &finding.hint));
        }
        line
    }

    /// For scripts.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    fn usage(arguments: &[&str]) -> String {
        let line = std::iter::once(&"vmirror").chain(arguments);
        Failure::usage(&Cli::try_parse_from(line).unwrap_err()).line()
    }

    #[test]
    fn a_wrong_command_line_is_told_in_one_line() {
        for (arguments, expected) in [
            (
                &["migrate", "web1"][..],
                "the following required arguments were not provided: --to <HOST:PORT>",
            ),
            (
                &["migrate", "web1", "--to", "b:1", "--downtime", "soon"],
                "invalid value 'soon' for '--downtime <TIME>'",
            ),
            (
                &["migrate", "web1", "--to", "b:1", "--bandwidth", "fast"],
                "\"fast\" is not a rate such as 500MiB/s",
            ),
            (
                &["migrate", "web1", "--to", "b:1", "--verify", "no"],
                "invalid value 'no' for '--verify <VERIFY>'",
            ),
            (&["show", "../x"], "\"../x\" cannot name a VM"),
            (&["lst"], "unrecognized subcommand 'lst'; some similar subcommands exist: 'stop', 'list'"),
            (
                &["list", "--jason"],
                "unexpected argument '--jason' found; a similar argument exists: '--json'",
            ),
            (&["report", "xyz"], "invalid value 'xyz' for '<ID>': an id has digits"),
        ] {
            let line = usage(arguments);
            assert!(line.contains(expected), "{line}");
            assert!(line.starts_with("error: ") && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn further_reasons_follow_each_on_its_line() {
        let mut failure = Failure::refused("a", "first.", "do this");
        failure.detail.more = vec![Finding::new("b", "second", "do that")];
        assert_eq!(failure.line(), "error: first; do this\n  also: second; do that");
    }

    #[test]
    fn exit_codes_say_where_the_machine_runs() {
        use crate::summary::tests::{refused, report};
        assert_eq!(Exit::of(&report()), Exit::Done);
        assert_eq!(Exit::of(&refused()), Exit::Refused);
        let mut failed = refused();
        failed.error.as_mut().unwrap().stage = Stage::Failed;
        assert_eq!(Exit::of(&failed), Exit::Failed);
        assert_eq!(Exit::of(&Report { outcome: Outcome::Uncertain, ..report() }), Exit::Uncertain);
    }
}
