use super::*;
use std::io::{BufRead as _, Write as _};
use std::sync::mpsc;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixListener,
};

pub(crate) const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {}}, \"capabilities\": [\"oob\"]}}\r\n";

/// A QEMU that greets and then answers each command with the lines that `script` makes of it.
pub(crate) fn serve(script: impl Fn(&str, u64) -> String + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (read, mut write) = stream.into_split();
            write.write_all(GREETING).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let request: Value = serde_json::from_str(&line).unwrap();
                let (name, id) = (request["execute"].as_str().unwrap(), request["id"].as_u64().unwrap());
                let reply = if name == "qmp_capabilities" {
                    format!("{{\"return\":{{}},\"id\":{id}}}\r\n")
                } else {
                    script(name, id)
                };
                if reply.is_empty() {
                    break;
                }
                write.write_all(reply.as_bytes()).await.unwrap();
            }
        }
    });
    (directory, socket)
}

#[tokio::test]
async fn unknown_events_and_fields_and_garbage_do_not_break_the_stream() {
    let (_directory, socket) = serve(|_, id| {
        format!(
            "{{\"event\":\"FROM_THE_FUTURE\",\"timestamp\":{{\"seconds\":1700000000,\"microseconds\":250000,\"x\":1}},\"new\":[]}}\n\
             not json\n{{\"neither\":1}}\n{{\"return\":1,\"id\":999999999}}\n\
             {{\"event\":\"CLOCKLESS\",\"timestamp\":{{\"seconds\":-1,\"microseconds\":-1}},\"data\":{{\"a\":1}}}}\n\
             {{\"id\":{id},\"return\":{{\"status\":\"brand-new\"}},\"later\":true}}\n"
        )
    });
    let qmp = Qmp::connect(&socket).await.unwrap();
    let mut events = qmp.events();
    let answer = qmp.execute_raw("query-status", Value::Null).await.unwrap();
    assert_eq!(answer["status"], "brand-new");
    let event = events.recv().await.unwrap();
    assert_eq!(event.name, "FROM_THE_FUTURE");
    assert_eq!(event.timestamp, SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_250_000));
    assert_eq!(events.recv().await.unwrap().data["a"], 1);
}

#[tokio::test]
async fn refusals_carry_qemus_words() {
    let (_directory, socket) =
        serve(|_, id| format!("{{\"id\":{id},\"error\":{{\"class\":\"NewClass\",\"desc\":\"no way\"}}}}\n"));
    let qmp = Qmp::connect(&socket).await.unwrap();
    let error = qmp.execute_raw("stop", Value::Null).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU refused stop: no way");
    assert!(matches!(error, QmpError::Refused { command: "stop", class, .. } if class == "NewClass"));
}

#[tokio::test]
async fn waiting_commands_and_receivers_learn_that_qemu_is_gone() {
    let (_directory, socket) = serve(|_, _| String::new());
    let qmp = Qmp::connect(&socket).await.unwrap();
    let mut events = qmp.events();
    for _ in 0..2 {
        assert!(matches!(
            qmp.execute_raw("quit", Value::Null).await,
            Err(QmpError::Gone { command: "quit", .. })
        ));
    }
    assert_eq!(events.recv().await, Err(broadcast::error::RecvError::Closed));
    assert_eq!(qmp.events().recv().await, Err(broadcast::error::RecvError::Closed));
}

#[tokio::test]
async fn commands_at_the_same_time_get_their_own_answers() {
    let (_directory, socket) = serve(|_, id| format!("{{\"return\":{id},\"id\":{id}}}\n"));
    let qmp = Qmp::connect(&socket).await.unwrap();
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let qmp = qmp.clone();
            tokio::spawn(async move { qmp.execute_raw("x", Value::Null).await.unwrap() })
        })
        .collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap().as_u64().unwrap());
    }
    answers.sort_unstable();
    answers.dedup();
    assert_eq!(answers.len(), 100);
}

#[tokio::test]
async fn dropping_the_last_handle_frees_the_socket_for_the_next_client() {
    let (_directory, socket) = serve(|_, id| format!("{{\"return\":{{}},\"id\":{id}}}\n"));
    for _ in 0..3 {
        // The server takes one client at a time, as QEMU does; this hangs unless the one before is really closed.
        drop(Qmp::connect(&socket).await.unwrap());
    }
}

#[tokio::test]
async fn a_deadline_names_the_command() {
    let (_directory, socket) = serve(|_, _| "{\"event\":\"NOTHING\"}\n".to_owned());
    let qmp = Qmp::connect(&socket).await.unwrap();
    let error =
        qmp.run("query-x", Value::Null, With::default(), Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, QmpError::Deadline { command: "query-x", .. }));
}

#[tokio::test]
async fn what_is_not_qmp_is_said_to_be_so() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 mail server\r\n").await.unwrap();
    });
    assert!(
        matches!(Qmp::connect(&socket).await, Err(QmpError::NotQmp { text, .. }) if text.starts_with("220"))
    );
    let missing = directory.path().join("none");
    assert!(matches!(Qmp::connect(&missing).await, Err(QmpError::Connect { .. })));
}

/// A QEMU whose guest runs: it greets, answers two commands, says each line that it is given, and is gone when there are no more. It tells
/// when it has.
fn says(lines: mpsc::Receiver<&'static str>, said: mpsc::Sender<()>) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        (&stream).write_all(GREETING).unwrap();
        let mut requests = std::io::BufReader::new(&stream).lines();
        for answer in ["{}", "{\"status\":\"running\",\"running\":true}"] {
            let request: Value = serde_json::from_str(&requests.next().unwrap().unwrap()).unwrap();
            writeln!(&stream, "{{\"return\":{answer},\"id\":{}}}", request["id"]).unwrap();
        }
        for line in lines {
            (&stream).write_all(line.as_bytes()).unwrap();
            said.send(()).unwrap();
        }
        drop(stream);
        said.send(()).unwrap();
    });
    (directory, socket)
}

#[tokio::test]
async fn that_a_guest_runs_is_known_until_qemu_says_anything() {
    const LONG: Duration = Duration::from_secs(3600);
    for line in ["{\"event\":\"STOP\"}\n", "{\"event\":\"ST", ""] {
        let ((say, lines), (told, said)) = (mpsc::channel(), mpsc::channel());
        let (_directory, socket) = says(lines, told);
        let qmp = Qmp::connect(&socket).await.unwrap();
        assert!(!qmp.is_known_to_run(LONG), "nobody has asked");
        assert!(qmp.status().await.unwrap().running);
        assert!(qmp.is_known_to_run(LONG) && !qmp.is_known_to_run(Duration::ZERO));
        // In one thread nobody reads it before somebody else is awaited; of an empty line only the end of the connection is said.
        let mut events = qmp.events();
        if line.is_empty() {
            drop(say);
        } else {
            say.send(line).unwrap();
        }
        said.recv().unwrap();
        assert!(!qmp.is_known_to_run(LONG), "{line:?} waits in the socket");
        // However little of it is there, it is being read, or was.
        if line.ends_with('\n') || line.is_empty() {
            let _ = events.recv().await;
        } else {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!qmp.is_known_to_run(LONG), "{line:?} was read");
    }
}
