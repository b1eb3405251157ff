//! Tells what happens as it happens, and keeps it for the record.

use std::io::{IsTerminal as _, Write as _};
use std::time::Instant;

use crate::measure::ms;
use crate::record::Step;

/// Tells what happens.
#[derive(Debug)]
pub struct Narrator {
    start: Instant,
    colours: bool,
    steps: Vec<Step>,
    open: bool,
}

impl Narrator {
    /// The clock starts now.
    pub fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { start: Instant::now(), colours, steps: Vec::new(), open: false }
    }

    /// Whether the output is a terminal that wants colours.
    pub fn colours(&self) -> bool {
        self.colours
    }

    /// Milliseconds so far.
    pub fn elapsed_ms(&self) -> f64 {
        ms(self.start.elapsed())
    }

    /// Tells a step.
    pub fn step(&mut self, text: &str) {
        self.close();
        let at_ms = self.elapsed_ms();
        print(&format!("{}  {text}\n", self.dim(&format!("{:>6.1} s", at_ms / 1e3))));
        self.steps.push(Step { at_ms, text: text.to_owned() });
    }

    /// Adds a word to a line that goes on: phases as they pass.
    pub fn word(&mut self, word: &str) {
        let text = if self.open { format!(" · {word}") } else { format!("{:12}{word}", "") };
        print(&self.dim(&text));
        self.open = true;
    }

    /// Tells what came of a step.
    pub fn result(&mut self, text: &str) {
        self.close();
        print(&format!("{:10}→ {text}\n", ""));
        self.steps.push(Step { at_ms: self.elapsed_ms(), text: format!("→ {text}") });
    }

    /// Everything told so far.
    pub fn into_steps(mut self) -> Vec<Step> {
        self.close();
        std::mem::take(&mut self.steps)
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.open) {
            print("\n");
        }
    }

    fn dim(&self, text: &str) -> String {
        if self.colours { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Prints at once. Whoever reads may have gone away; the run goes on, for its files.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
