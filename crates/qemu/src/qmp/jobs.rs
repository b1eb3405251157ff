//! Block jobs: the mirroring of a disk, and the making of an image.

use std::time::Duration;

use qapi::Command;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    sync::broadcast::{
        Receiver,
        error::{RecvError, TryRecvError},
    },
    time::{Instant, timeout_at},
};

use super::connection::{Event, Qmp};
use super::error::QmpError;

/// How long a job may take to end once it was told to. One that waits for its target does so for as long as the NBD
/// connection lives.
pub const JOB_DEADLINE: Duration = Duration::from_secs(30);
/// How long an image may take to be made. That writes little more than its header.
pub const CREATE_DEADLINE: Duration = Duration::from_secs(60);
/// How long to wait for an event before the jobs are asked for, in case the event got lost.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Bytes per bit of the job's bitmap of what is still to be copied, and the least that it copies at a time. What the
/// guest writes meanwhile goes over as it is.
const GRANULARITY: u32 = 65536;
/// Bytes that a job has under way at most. A write of the guest waits for all of it where it meets it: by QEMU's default,
/// 16 MiB, that is for seconds where the link is slow.
const BUFFER: u32 = 2 << 20;

/// What of a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// All that the guest sees.
    Full,
    /// Only what is in the top image, not what its backing file holds: the target has the same backing file.
    Top,
}

/// A job that mirrors a disk.
#[derive(Debug, Clone, Copy)]
pub struct MirrorJob<'a> {
    /// The job's name: letters, digits, `-`, `.` and `_`, a letter first.
    pub job: &'a str,
    /// The node of the guest's disk ([`super::Drive::node`]); names that QEMU made up (`#block…`) will do.
    pub device_node: &'a str,
    /// The node that it is mirrored to. Of the same size.
    pub target_node: &'a str,
    /// What is copied.
    pub sync: Sync,
    /// The name for the node that QEMU puts on top of the disk, to see the guest's writes. Goes with the job. At most 31
    /// letters, as for any node.
    pub filter_node: &'a str,
    /// Bytes per second at most for the copying; the guest's own writes are not held back by it. None: no limit.
    pub speed: Option<u64>,
}

/// A block job that QEMU has.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockJob {
    /// Its name. For one that the user started without naming it: the drive's.
    #[serde(rename = "device")]
    pub id: String,
    /// `mirror`, `commit`, `stream`, `backup`, ….
    #[serde(rename = "type")]
    pub kind: String,
    /// A mirror: everything was copied once, and what the guest writes goes to both.
    #[serde(default)]
    pub ready: bool,
    /// Bytes done.
    pub offset: u64,
    /// Bytes to do in all; grows with what the guest writes.
    pub len: u64,
    /// Bytes per second at most; 0: no limit.
    pub speed: u64,
    /// QEMU's word: `created`, `running`, `paused`, `ready`, `standby`, `waiting`, `pending`, `aborting`, `concluded`, `null`.
    pub status: String,
    /// Whether it was paused by command.
    #[serde(default)]
    pub paused: bool,
    /// Whether I/O went wrong: `ok`, `failed`, `nospace`.
    #[serde(rename = "io-status")]
    pub io_status: String,
    /// Why it fails.
    pub error: Option<String>,
    /// A mirror that sees to it that no write ends before it is on both sides: whether it does so by now. None: QEMU
    /// before 8.2, or another kind of job.
    #[serde(rename = "actively-synced")]
    pub actively_synced: Option<bool>,
}

impl BlockJob {
    /// Whether it stands still as something could not be read or written.
    #[must_use]
    pub fn met_error(&self) -> bool {
        self.io_status != "ok"
    }
}

/// How a mirror ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirrorEnd {
    /// The target was the same as the disk at that moment, down to the last write.
    Synchronised,
    /// Given up; the target is no copy of anything.
    Cancelled,
    /// It had failed or did so at the end, in QEMU's words; the target is no copy of anything.
    Failed(String),
    /// There was no such job (any more).
    NoJob,
}

/// What an event says of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEvent {
    /// The job's name.
    pub job: String,
    /// What it is.
    pub news: JobNews,
}

/// What can be told of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobNews {
    /// Everything was copied once.
    Ready,
    /// It met an error of I/O.
    IoError {
        /// `read` or `write`. Reads are those of the source, writes those of the target.
        operation: String,
    },
    /// It is through.
    Completed {
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// It was given up.
    Cancelled,
    /// It is in another status ([`BlockJob::status`]); `null`: there is no trace of it left.
    Status(String),
}

impl JobEvent {
    /// What an event says of a job, if anything.
    #[must_use]
    pub fn of(event: &Event) -> Option<JobEvent> {
        let text = |key: &str| event.data.get(key).and_then(Value::as_str).map(str::to_owned);
        let (job, news) = match event.name.as_str() {
            "JOB_STATUS_CHANGE" => (text("id")?, JobNews::Status(text("status")?)),
            "BLOCK_JOB_READY" => (text("device")?, JobNews::Ready),
            "BLOCK_JOB_COMPLETED" => (text("device")?, JobNews::Completed { error: text("error") }),
            "BLOCK_JOB_CANCELLED" => (text("device")?, JobNews::Cancelled),
            "BLOCK_JOB_ERROR" => (text("device")?, JobNews::IoError { operation: text("operation")? }),
            _ => return None,
        };
        Some(JobEvent { job, news })
    }
}

commands! {
    QueryBlockJobs {} = "query-block-jobs" -> Vec<BlockJob>;
    SetJobSpeed<'a> { device: &'a str, speed: u64 } = "block-job-set-speed" -> Value;
    CancelJob<'a> { device: &'a str, force: bool } = "block-job-cancel" -> Value;
    QueryJobs {} = "query-jobs" -> Vec<Job>;
    DismissJob<'a> { id: &'a str } = "job-dismiss" -> Value;
}

#[derive(Deserialize)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
}

impl Qmp {
    /// Begins to mirror a disk. The job copies in the background what is there and becomes ready; from its start on a
    /// guest's write is done only when it is on the disk and at the target (`copy-mode` `write-blocking`), so that the
    /// rest gets smaller however much the guest writes. QEMU removes the job by itself when it is through
    /// (`auto-finalize`, `auto-dismiss`).
    ///
    /// An error of reading or at the target never reaches the guest. It makes the job stand still
    /// ([`BlockJob::met_error`]); the guest's writes go on to both, and only those to its own disk count. Somebody has to
    /// [end](Self::end_mirror) the job: one that were to end by itself (`report`) would crash QEMU, as
    /// [there](Self::end_mirror) told.
    ///
    /// The guest's flushes go to its own disk only. The target is flushed when the job becomes ready, when it ends, and
    /// whenever QEMU stops the machine; how long it takes for that is time in which the guest does not run (seen: 0.15 s
    /// for 256 MiB that a server had not flushed yet, with 7.2 and 10.0). A server that is to be quick at the end flushes
    /// beforehand.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if a node is missing or in use by another job. What goes wrong later is told by
    /// [`JobNews::IoError`].
    pub async fn mirror_disk(&self, job: &MirrorJob<'_>) -> Result<(), QmpError> {
        let sync = match job.sync {
            Sync::Full => "full",
            Sync::Top => "top",
        };
        let arguments = json!({
            "job-id": job.job,
            "device": job.device_node,
            "target": job.target_node,
            "sync": sync,
            "filter-node-name": job.filter_node,
            "speed": job.speed.unwrap_or(0),
            "copy-mode": "write-blocking",
            "granularity": GRANULARITY,
            "buf-size": BUFFER,
            "on-source-error": "stop",
            "on-target-error": "stop",
        });
        self.execute_raw("blockdev-mirror", arguments).await.map(drop)
    }

    /// The block jobs that there are, the user's too.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn block_jobs(&self) -> Result<Vec<BlockJob>, QmpError> {
        self.execute(QueryBlockJobs {}).await
    }

    /// Sets how many bytes per second a job copies at most; 0: no limit. The guest's own writes are not held back.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if there is no such job, or it is ending.
    pub async fn set_job_speed(&self, job: &str, speed: u64) -> Result<(), QmpError> {
        self.execute(SetJobSpeed { device: job, speed }).await.map(drop)
    }

    /// Ends a mirror, the guest going on with its own disk, and waits until nothing is left of the job: its filter is gone
    /// from the graph, and the target's node can be removed. A ready job first brings the target up to date; one that is
    /// not ready, or any with `force`, is given up.
    ///
    /// **The guest must be stopped where the job is given up.** QEMU frees the job's bitmap of what is under way before it
    /// waits for writes of the guest that are under way, each of which clears its bits there: heap memory that is in
    /// other use by then (`mirror_run` in `block/mirror.c`, at its `immediate_exit`; seen to crash 7.2 and 10.0). A guest
    /// that is stopped has none under way.
    ///
    /// A target that does not answer can hold the job up, with `force` too where it is not ready: until the NBD server
    /// closes the connection, which it should do first where it has no use for what comes.
    ///
    /// Dropping the future does not stop the end.
    ///
    /// # Errors
    /// [`QmpError::Deadline`] if the job is still there after 30 seconds.
    pub async fn end_mirror(&self, job: &str, force: bool) -> Result<MirrorEnd, QmpError> {
        // From before the command, so that nothing it brings about is missed.
        let mut events = self.events();
        let mut end = MirrorEnd::NoJob;
        if let Err(refusal) = self.execute(CancelJob { device: job, force }).await {
            let QmpError::Refused { .. } = refusal else { return Err(refusal) };
            match self.block_jobs().await?.into_iter().find(|known| known.id == job) {
                // It may have ended just now.
                None => {
                    drain(&mut events, job, &mut end);
                    return Ok(end);
                }
                // It ends already.
                Some(BlockJob { status, .. })
                    if matches!(
                        status.as_str(),
                        "waiting" | "pending" | "aborting" | "concluded" | "null"
                    ) => {}
                Some(_) => return Err(refusal),
            }
        }
        let deadline = Instant::now() + JOB_DEADLINE;
        while Instant::now() < deadline {
            match timeout_at(Instant::now() + LOOK_AGAIN, events.recv()).await {
                Ok(Ok(event)) => {
                    if learn(&event, job, &mut end) {
                        return Ok(end);
                    }
                    continue;
                }
                Ok(Err(RecvError::Closed)) => {
                    return Err(QmpError::Gone {
                        socket: self.socket().to_owned(),
                        command: CancelJob::NAME,
                    });
                }
                // Events were missed, or there are none: ask.
                Ok(Err(RecvError::Lagged(_))) | Err(_) => {}
            }
            if !self.block_jobs().await?.iter().any(|known| known.id == job) {
                // Events come before the answers that follow them.
                drain(&mut events, job, &mut end);
                return Ok(end);
            }
        }
        Err(QmpError::Deadline { command: CancelJob::NAME, after: JOB_DEADLINE })
    }

    /// Has QEMU or a storage daemon make an image by a job, and waits until it is made. Returns why it failed, if it did.
    pub(crate) async fn create_image(
        &self,
        job: &str,
        options: Value,
    ) -> Result<Result<(), String>, QmpError> {
        let command = "blockdev-create";
        let mut events = self.events();
        self.execute_raw(command, json!({ "job-id": job, "options": options })).await?;
        let deadline = Instant::now() + CREATE_DEADLINE;
        loop {
            let known = self.execute(QueryJobs {}).await?.into_iter().find(|known| known.id == job);
            if let Some(Job { error, .. }) = known.filter(|known| known.status == "concluded") {
                self.execute(DismissJob { id: job }).await?;
                return Ok(error.map_or(Ok(()), Err));
            }
            if Instant::now() >= deadline {
                return Err(QmpError::Deadline { command, after: CREATE_DEADLINE });
            }
            // Any event, or none for a while: look again.
            if let Ok(Err(RecvError::Closed)) = timeout_at(Instant::now() + LOOK_AGAIN, events.recv()).await {
                return Err(QmpError::Gone { socket: self.socket().to_owned(), command });
            }
        }
    }
}

/// Takes from an event how a job ends. Whether that was the last event of it.
fn learn(event: &Event, job: &str, end: &mut MirrorEnd) -> bool {
    match JobEvent::of(event).filter(|event| event.job == job).map(|event| event.news) {
        Some(JobNews::Completed { error: None }) => *end = MirrorEnd::Synchronised,
        Some(JobNews::Completed { error: Some(error) }) => *end = MirrorEnd::Failed(error),
        Some(JobNews::Cancelled) => *end = MirrorEnd::Cancelled,
        Some(JobNews::Status(status)) => return status == "null",
        _ => {}
    }
    false
}

/// Takes what has come so far.
fn drain(events: &mut Receiver<Event>, job: &str, end: &mut MirrorEnd) {
    loop {
        match events.try_recv() {
            Ok(event) => drop(learn(&event, job, end)),
            Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
        }
    }
}
