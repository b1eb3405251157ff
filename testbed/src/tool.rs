//! Runs the small programs the testbed is made with: `ip`, `tc`, `bridge`, `mount`.

use std::path::Path;
use std::process::Command;

use crate::TestbedError;

/// Runs a program to its end and gives back what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String, TestbedError> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|source| TestbedError::Start { program: program.to_owned(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(TestbedError::Tool {
        command: format!("{program} {}", arguments.join(" ")),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// The end of a log, for an error message.
pub(crate) fn tail(log: &Path) -> String {
    const LINES: usize = 15;
    let Ok(bytes) = std::fs::read(log) else { return format!("nothing in {}", log.display()) };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
