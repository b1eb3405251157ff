//! Logs of QEMUs, cut whenever one has become too long.
//!
//! A guest can write as fast as its console takes it, so the kernel tells when a log was written, and nobody waits for the next look.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, Logs};
use migration::LinkedHost;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

/// How long to wait after a look, so that a log that is written all the time costs little.
const PAUSE: Duration = Duration::from_millis(20);
/// How often to see whether the agent goes down.
const WAIT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Most that is heard before the logs are looked at.
const AT_ONCE: usize = 1024;
/// How often to look at all of them, whatever the kernel says.
const LOOK: Duration = Duration::from_secs(10);

/// Begins to cut the logs of a host's machines, until the agent goes down: those in the directory of logs, and those that an earlier
/// version has put among the sockets. A thread of its own, as it works on files.
pub(crate) fn keep_bounded(host: Arc<LinkedHost>, closing: CancellationToken) {
    let keeper = thread::Builder::new().name("logs".to_owned());
    if let Err(error) = keeper.spawn(move || keep(&host, &closing)) {
        tracing::error!(%error, "logs are not kept bounded");
    }
}

fn keep(host: &Host, closing: &CancellationToken) {
    let directories = [host.logs.directory().to_owned(), host.run_dir.clone()];
    let told = Told::by_kernel(&directories);
    if let Err(error) = &told {
        tracing::warn!(%error, "the kernel does not say when logs are written; they are looked at every {LOOK:?}");
    }
    host.logs.expire();
    let mut looked: Option<Instant> = None;
    while !closing.is_cancelled() {
        // Also at what was written while no agent was here.
        if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            directories.iter().for_each(|directory| host.logs.bound_all(directory));
            looked = Some(Instant::now());
        }
        match told.as_ref().map(Told::written) {
            Ok(Ok(Written::Logs(logs))) => logs.iter().for_each(|log| host.logs.bound(log)),
            Ok(Ok(Written::Many)) => looked = None,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the kernel does not say which logs were written");
                thread::sleep(Duration::from_secs(1));
            }
            Err(_) => thread::sleep(Duration::from_secs(1)),
        }
        thread::sleep(PAUSE);
    }
}

/// What the kernel says of files in directories.
struct Told {
    descriptor: OwnedFd,
    watches: Vec<(i32, PathBuf)>,
}

/// What was written.
#[derive(Debug, PartialEq, Eq)]
enum Written {
    /// These logs; none, if nothing was for a second.
    Logs(Vec<PathBuf>),
    /// So much that the kernel does not know any more.
    Many,
}

impl Told {
    fn by_kernel(directories: &[PathBuf]) -> io::Result<Told> {
        let descriptor = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let watch = |directory: &PathBuf| -> io::Result<(i32, PathBuf)> {
            Ok((inotify::add_watch(&descriptor, directory, WatchFlags::MODIFY)?, directory.clone()))
        };
        let watches = directories.iter().map(watch).collect::<Result<_, _>>()?;
        Ok(Told { descriptor, watches })
    }

    /// Waits until logs are written, or for a second.
    fn written(&self) -> io::Result<Written> {
        match poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], Some(&WAIT)) {
            Ok(0) | Err(Errno::INTR) => return Ok(Written::Logs(Vec::new())),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&self.descriptor, &mut buffer);
        let mut logs: Vec<PathBuf> = Vec::new();
        for _ in 0..AT_ONCE {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                return Ok(Written::Many);
            }
            let directory = self.watches.iter().find(|(watch, _)| *watch == event.wd());
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
            if let (Some((_, directory)), Some(name)) = (directory, name.filter(|name| Logs::is_live(name))) {
                let log = directory.join(name);
                if !logs.contains(&log) {
                    logs.push(log);
                }
            }
        }
        Ok(Written::Logs(logs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_that_are_written_are_named_and_nothing_else_is() {
        let (logs, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let told = Told::by_kernel(&[logs.path().to_owned(), run.path().to_owned()]).unwrap();
        std::fs::write(logs.path().join("web1.log"), "one").unwrap();
        std::fs::write(logs.path().join("web1.log.1"), "cut").unwrap();
        std::fs::write(run.path().join("web2.log"), "two").unwrap();
        std::fs::write(run.path().join("web2.pid"), "2").unwrap();
        std::fs::write(logs.path().join("web1.log"), "again").unwrap();
        let written = told.written().unwrap();
        assert_eq!(written, Written::Logs(vec![logs.path().join("web1.log"), run.path().join("web2.log")]));
        assert_eq!(told.written().unwrap(), Written::Logs(Vec::new()), "nothing since");
    }
}
