//! Processes to be tracked.
//!
//! A tracee is this very program, started again with a role in its environment. The role runs on the
//! *main thread*, which is the one the tracker holds, before the test harness's own `main`: hence the entry
//! in `.init_array`, which the C runtime calls first (and after std's own, which stores the arguments).

use dirty_tracker::{Mapping, mappings};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Lines, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const ROLE: &str = "DIRTY_TRACKER_TEST_ROLE";
const ARGUMENTS: &str = "DIRTY_TRACKER_TEST_ARGUMENTS";
pub(crate) const PAGE: u64 = 4096;

#[used]
#[unsafe(link_section = ".init_array")]
static ENTRY: extern "C" fn() = enter;

extern "C" fn enter() {
    let Ok(role) = std::env::var(ROLE) else { return };
    // A tracee must not outlive the test that started it, however that ends.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let arguments = std::env::var(ARGUMENTS).unwrap();
    let arguments: Vec<&str> = arguments.split(' ').filter(|argument| !argument.is_empty()).collect();
    match role.as_str() {
        "memory" => memory(Path::new(arguments[0])),
        "writers" => crate::no_write_is_missed::writers(&arguments),
        "kvm" => crate::kvm_guest::guest(Path::new(arguments[0])),
        "agent" => crate::killed_agent::agent(&arguments),
        "spin" => crate::unharmed::spin(Path::new(arguments[0])),
        "wait" => crate::unharmed::wait(arguments[0], Path::new(arguments[1])),
        "old-kernel" => crate::kernel_too_old::on_old_kernel(&arguments),
        "traced" => crate::gone_and_busy::tracer(arguments[0]),
        "throttler" => crate::throttled::throttler(arguments[0]),
        "asleep" => crate::throttled::asleep(),
        "naps" => crate::gone_and_busy::naps(Path::new(arguments[0])),
        "confined" => crate::confined::confined(arguments[0], Path::new(arguments[1])),
        "own" => crate::empty::own(),
        "direct" => crate::direct_io::reader(Path::new(arguments[0]), Path::new(arguments[1])),
        _ => panic!("no role {role}"),
    }
    std::process::exit(0);
}

/// A running tracee; killed and collected when dropped.
pub(crate) struct Tracee {
    child: Child,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
}

impl Tracee {
    pub(crate) fn start(role: &str, arguments: &[&str]) -> Self {
        Self::start_as(role, arguments, |_| {})
    }

    pub(crate) fn start_as(role: &str, arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .env(ROLE, role)
            .env(ARGUMENTS, arguments.join(" "))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, input, output }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line it prints.
    pub(crate) fn line(&mut self) -> String {
        self.output.next().expect("the tracee ended without a word").unwrap()
    }

    /// What it had still printed before it ended.
    pub(crate) fn last_words(&mut self) -> Option<String> {
        self.child.wait().unwrap();
        self.output.next().map(Result::unwrap)
    }

    /// Has it do something, and waits for its answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.line()
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Closes its input, on which every role ends, and waits for that.
    pub(crate) fn finish(mut self) -> std::process::ExitStatus {
        self.input = None;
        self.child.wait().unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Where it has mapped that file, as `(addresses, the whole mapping)`.
    pub(crate) fn mapping_of(&self, file: &Path) -> Mapping {
        let mut found = mappings(self.pid()).unwrap();
        found.retain(|mapping| mapping.path == file);
        assert_eq!(found.len(), 1, "{} in {found:?}", file.display());
        found.remove(0)
    }

    pub(crate) fn range_of(&self, file: &Path) -> Range<u64> {
        self.mapping_of(file).range
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // Fails only if it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file for a tracee's memory, on tmpfs, of that many pages; removed when dropped.
pub(crate) struct Ram {
    directory: tempfile::TempDir,
    pub(crate) file: File,
}

impl Ram {
    pub(crate) fn new(pages: u64) -> Self {
        Self::on(Path::new("/dev/shm"), pages * PAGE)
    }

    pub(crate) fn on(filesystem: &Path, bytes: u64) -> Self {
        let directory =
            tempfile::Builder::new().prefix("dirty-tracker-test-").tempdir_in(filesystem).unwrap();
        let path = directory.path().join("ram");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(bytes).unwrap();
        Self { directory, file }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("ram")
    }
}

/// Maps a file, shared. For roles; the mapping stays until the process ends.
pub(crate) fn map(path: &Path) -> &'static mut [u8] {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice, which is never unmapped, and of
    // which nobody else in this process has a reference.
    unsafe {
        let start = mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &file, 0).unwrap();
        std::slice::from_raw_parts_mut(start.cast(), length)
    }
}

/// The role of memory that changes on command: `write PAGE`, `kernel PAGE` (the kernel writes it, by `read`),
/// `read PAGE`, `byte PAGE` and `pipe PAGE` (which answer with its first byte, read by itself or by the kernel),
/// `punch PAGE COUNT`, `drop PAGE COUNT` (from the page table only), `exec`.
fn memory(path: &Path) {
    use rustix::mm::{Advice, madvise};
    let memory = map(path);
    let mut zeros = File::open("/dev/zero").unwrap();
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let verb = words.next().unwrap();
        let mut number = || words.next().unwrap().parse::<usize>().unwrap();
        match verb {
            "write" => {
                let byte = &mut memory[number() * PAGE as usize];
                *byte = byte.wrapping_add(1);
            }
            "kernel" => {
                let start = number() * PAGE as usize;
                std::io::Read::read_exact(&mut zeros, &mut memory[start..start + 8]).unwrap();
            }
            "read" => {
                std::hint::black_box(memory[number() * PAGE as usize]);
            }
            "byte" => {
                println!("{}", memory[number() * PAGE as usize]);
                continue;
            }
            "pipe" => {
                let start = number() * PAGE as usize;
                let (read, write) = rustix::pipe::pipe().unwrap();
                rustix::io::write(write, &memory[start..start + 1]).unwrap();
                let mut byte = [0];
                rustix::io::read(read, &mut byte).unwrap();
                println!("{}", byte[0]);
                continue;
            }
            "punch" => {
                let start = number() * PAGE as usize;
                let hole = &mut memory[start..start + number() * PAGE as usize];
                // SAFETY: the range is ours, as a slice, and every content of it is valid.
                unsafe { madvise(hole.as_mut_ptr().cast(), hole.len(), Advice::LinuxRemove) }.unwrap();
            }
            "drop" => {
                let start = number() * PAGE as usize;
                let part = &mut memory[start..start + number() * PAGE as usize];
                // SAFETY: the range is ours and of a shared file, which keeps the content.
                unsafe { madvise(part.as_mut_ptr().cast(), part.len(), Advice::LinuxDontNeed) }.unwrap();
            }
            "exec" => {
                use std::os::unix::process::CommandExt;
                // `cat` lives as long as its input is open.
                panic!("{}", Command::new("cat").env_remove(ROLE).exec());
            }
            _ => panic!("{line}"),
        }
        println!("done");
    }
}
