//! Where the switch of the guests' network learns stations to be, as it learns it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::SystemTime;

use crate::TestbedError;
use crate::namespace::Namespace;

/// What the switch learns, from when this is made until it is dropped.
#[derive(Debug)]
pub struct Places {
    monitor: Child,
    learned: Arc<Mutex<Vec<(SystemTime, String)>>>,
}

impl Places {
    pub(crate) fn watch(switch: &Namespace) -> Result<Self, TestbedError> {
        let mut command = Command::new("bridge");
        command.args(["-n", switch.name(), "monitor", "fdb"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let failed = |source| TestbedError::Start { program: "bridge".to_owned(), source };
        let mut monitor = command.spawn().map_err(failed)?;
        let learned = Arc::new(Mutex::new(Vec::new()));
        let (told, said) = (Arc::clone(&learned), monitor.stdout.take());
        thread::spawn(move || {
            let lines = said.into_iter().flat_map(|said| BufReader::new(said).lines()).map_while(Result::ok);
            for line in lines {
                told.lock().unwrap_or_else(PoisonError::into_inner).push((SystemTime::now(), line));
            }
        });
        Ok(Self { monitor, learned })
    }

    /// When the switch last learned that a station is behind that port of its.
    pub(crate) fn when(&self, mac: &str, port: &str) -> Option<SystemTime> {
        let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = format!(" dev {port} ");
        let said = |line: &str| line.starts_with(mac) && line.contains(&behind);
        learned.iter().rev().find(|(_, line)| said(line)).map(|(when, _)| *when)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}
