//! What goes where: results on stdout, words on stderr; with `--json`, one document on stdout and nothing else.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use serde::Serialize;

use crate::failure::Failure;

/// How results are to be shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Output {
        Output { json, quiet }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// A result: a document, or its form for people.
    pub(crate) fn result<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        if self.json { print_json(value, !is_stream()) } else { print(&text(value)) }
    }

    /// One of many results, each a line of its own.
    pub(crate) fn item<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        if self.json { print_json(value, false) } else { print(&text(value)) }
    }

    /// As [`Output::result`], but of something done: people who asked for quiet need no word of it.
    pub(crate) fn done<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        if self.json || !self.quiet {
            self.result(value, text);
        }
    }

    /// Words for people that are no result.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// What is done and is not as it should be. With `--json` the document says it.
    pub(crate) fn warn(&self, warnings: &[finding::Finding]) {
        if !self.json {
            let told = |found: &finding::Finding| {
                format!("warning: {}  [{}]\n  → {}\n", found.message, found.kind, found.hint)
            };
            let _ = write!(io::stderr(), "{}", warnings.iter().map(told).collect::<String>());
        }
    }

    /// Whether long work may draw on the terminal.
    pub(crate) fn draws(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// Whether long work tells what it does in plain lines.
    pub(crate) fn tells(&self) -> bool {
        !self.quiet && !self.json && !io::stderr().is_terminal()
    }

    /// Tells of a failure and says how to exit.
    pub(crate) fn failed(&self, failure: &Failure) -> ExitCode {
        if self.json {
            print_json(&failure.body(), false);
        }
        self.complain(failure);
        failure.exit.into()
    }

    /// Tells people of a failure whose document was printed already.
    pub(crate) fn complain(&self, failure: &Failure) {
        let _ = writeln!(io::stderr(), "{}", failure.line());
    }
}

/// A document on a terminal is for reading.
fn is_stream() -> bool {
    !io::stdout().is_terminal()
}

fn print_json<T: Serialize>(value: &T, pretty: bool) {
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    match text {
        Ok(text) => print(&text),
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: the answer cannot be put into JSON: {error}");
        }
    }
}

/// Prints to stdout, with a line end if there is none. Whoever reads may have gone away, as `head` does: that ends
/// the program, quietly.
pub(crate) fn print(text: &str) {
    let mut out = io::stdout().lock();
    let end = if text.ends_with('\n') { "" } else { "\n" };
    if write!(out, "{text}{end}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}
