//! A monitor of a QEMU that the agents do not use.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::PATIENCE;

/// A client of a QMP socket of the user's own.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a socket that nobody else uses.
    ///
    /// # Panics
    /// If that is not possible.
    #[must_use]
    pub fn connect(socket: &Path) -> Qmp {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp { stream: BufReader::new(stream) };
        let _ = qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Carries out a command and gives back what QEMU returns.
    ///
    /// # Panics
    /// If QEMU refuses, or does not answer.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.ask(command, arguments).unwrap_or_else(|| panic!("QEMU ended at {command}"))
    }

    /// As [`Qmp::execute`]; none where QEMU has ended.
    ///
    /// # Panics
    /// If QEMU refuses.
    #[track_caller]
    pub fn ask(&mut self, command: &str, arguments: Value) -> Option<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes()).ok()?;
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return Some(value.clone());
            }
        }
    }
}
