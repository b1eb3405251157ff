//! A monitor that answers what it likes, a line to a line of the input: the first is its greeting, each after that goes out when a
//! command has come, with that command's number put in where it begins like an answer. Its end is the connection's.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;
use qemu::Qmp;
use qemu::qmp::JobEvent;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// A client that sends nothing for so long waits for something else than it gets: the connection ends, before its deadline of half a minute.
const SILENCE: Duration = Duration::from_millis(20);

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));
static SOCKET: LazyLock<(PathBuf, UnixListener)> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("vmirror-fuzz-qmp-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    (path, listener)
});

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let question = input.byte();
    RUNTIME.block_on(async {
        let (path, listener) = &*SOCKET;
        let monitor = async {
            let (stream, _) = listener.accept().await.expect("the client that connects below");
            answer(stream, input.0).await;
        };
        tokio::join!(monitor, ask(path.clone(), question));
    });
});

async fn answer(stream: UnixStream, lines: &[u8]) {
    let (read, mut write) = stream.into_split();
    let mut commands = BufReader::new(read).lines();
    for line in lines.split(|byte| *byte == b'\n') {
        let mut said = line.to_vec();
        if line.starts_with(b"{\"return\"") || line.starts_with(b"{\"error\"") {
            let Ok(Ok(Some(command))) = timeout(SILENCE, commands.next_line()).await else { return };
            let command: Value = serde_json::from_str(&command).expect("a command is JSON");
            said.splice(..1, format!("{{\"id\":{},", command["id"]).into_bytes());
        }
        said.push(b'\n');
        if write.write_all(&said).await.is_err() {
            return;
        }
    }
}

async fn ask(path: PathBuf, question: u8) {
    let Ok(qmp) = Qmp::connect(&path).await else { return };
    let mut events = qmp.events();
    // Nothing but what was sent is ever an answer; whether there is one does not matter.
    match question % 16 {
        0 => drop(qmp.version().await),
        1 => drop(qmp.status().await),
        2 => drop(qmp.drives().await),
        3 => drop(qmp.node_names().await),
        4 => drop(qmp.blocks().await),
        5 => drop(qmp.block_jobs().await),
        6 => drop(qmp.query_migrate().await),
        7 => drop(qmp.cpu_features().await),
        8 => drop(qmp.cpuid_words().await),
        9 => drop(qmp.memory_devices().await),
        10 => drop(qmp.machine_type().await),
        11 => drop(qmp.exports().await),
        12 => drop(qmp.end_mirror("job", false).await),
        13 => drop(qmp.quiesce().await),
        14 => drop(qmp.migrate_parameters().await),
        _ => drop(qmp.name().await),
    }
    while let Ok(event) = events.try_recv() {
        let _ = JobEvent::of(&event);
    }
}
