//! A place for one test's QEMUs: directories of their own, and an end for every process that was started there.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use qemu::spec::ram_directory;
use qemu::{Mirrorable, Process, Qmp, RamDirectory, Spec};

/// The QEMU to test with: `QEMU=/path`, else the installed one.
pub(crate) fn qemu() -> String {
    std::env::var("QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

pub(crate) struct Place {
    /// Sockets and logs.
    pub(crate) directory: tempfile::TempDir,
    /// RAM files, on tmpfs.
    pub(crate) ram: tempfile::TempDir,
    launched: RefCell<Vec<Process>>,
    children: RefCell<Vec<Child>>,
}

impl Place {
    pub(crate) fn new() -> Place {
        Place {
            directory: tempfile::tempdir().unwrap(),
            ram: tempfile::tempdir_in("/dev/shm").unwrap(),
            launched: RefCell::default(),
            children: RefCell::default(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A command line of the QEMU under test: TCG, no window, nothing that was not asked for.
    pub(crate) fn spec(options: &[&str]) -> Spec {
        let binary = qemu();
        let fixed = [binary.as_str(), "-accel", "tcg", "-display", "none", "-nodefaults"];
        Spec::parse(&[&fixed, options].concat()).unwrap()
    }

    pub(crate) fn mirrorable(&self, name: &str) -> Mirrorable {
        RamDirectory::open(&ram_directory(self.ram.path(), "host")).unwrap();
        Mirrorable {
            name: name.to_owned(),
            host: "host".to_owned(),
            ram_dir: self.ram.path().to_owned(),
            qmp_socket: self.path(&format!("{name}.qmp")),
            pid_file: None,
        }
    }

    pub(crate) async fn launch(&self, spec: &Spec) -> Process {
        let process = qemu::launch(spec, &self.path("log"), qemu::Launch::default(), Vec::new(), |_| Ok(()))
            .await
            .unwrap();
        self.launched.borrow_mut().push(process.clone());
        process
    }

    /// Makes a machine mirrorable, launches it and connects.
    pub(crate) async fn start(&self, name: &str, options: &[&str]) -> (Process, Spec, Qmp) {
        let mut spec = Place::spec(options);
        spec.make_mirrorable(&self.mirrorable(name)).unwrap();
        let process = self.launch(&spec).await;
        let qmp = Qmp::connect(&process.qmp_socket).await.unwrap();
        (process, spec, qmp)
    }

    /// Starts QEMU as a user would, with a QMP socket, and waits until the socket is there.
    pub(crate) fn start_by_hand(&self, options: &[&str]) -> PathBuf {
        let socket = self.path(&format!("hand{}.qmp", self.children.borrow().len()));
        let child = Command::new(qemu())
            .args(["-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(options)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.children.borrow_mut().push(child);
        // The file is there a moment before QEMU listens on it.
        wait_until("QEMU listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        socket
    }

    /// Has a process ended with the place that was started by other means.
    pub(crate) fn end_with_place(&self, process: &Process) {
        self.launched.borrow_mut().push(process.clone());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for process in self.launched.get_mut() {
            process.kill();
        }
        for child in self.children.get_mut() {
            // It may have ended by itself, which is what an error here says.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Waits for something that happens soon, and fails loudly if it does not within half a minute.
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !happened() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a command of QEMU's human monitor prints.
pub(crate) async fn human(qmp: &Qmp, command: &str) -> String {
    let answer = qmp
        .execute_raw("human-monitor-command", serde_json::json!({ "command-line": command }))
        .await
        .unwrap();
    answer.as_str().unwrap().to_owned()
}

/// An image file with something in it.
pub(crate) fn image(path: &Path) -> String {
    std::fs::write(path, vec![0x5a; 1 << 20]).unwrap();
    path.display().to_string()
}
