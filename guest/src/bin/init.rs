//! The test guest's only program: process 1.
//!
//! It never returns. Whatever goes wrong is printed and ends the machine with a kernel panic, which no test mistakes for success.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use guest::checker::Checker;
use guest::command::Command;
use guest::disk::Disks;
use guest::image::{DEPENDENCIES, Dependencies, MODULES};
use guest::memory::Memory;
use guest::parameters::Parameters;
use guest::reader;
use guest::service::{self, Answer};
use guest::status::{Counters, PREFIX, READY, Status};
use guest::system::{self, End};
use guest::userland::{self, Changes, Userland};
use guest::workload::Order;
use guest::writer::{self, Control};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How often the status goes to the console.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// How long a network interface may take to appear.
const INTERFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the machine goes on after it answered a command that ends it: the answer leaves through devices that end with it.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Room for heartbeats that arrive while the guest has no CPU time: seconds of them, so that none is lost by the guest's own fault.
const HEARTBEAT_BUFFER: i32 = 4 << 20;
const INTERFACE: &str = "eth0";
/// Memory that is left to the kernel where a userland's files would take all of it, in bytes.
const FREE: u64 = 64 << 20;
/// The first disk, and how large it is.
const DISK: &str = "/dev/vda";
const DISK_SECTORS: &str = "/sys/block/vda/size";

fn main() {
    if std::process::id() != 1 {
        eprintln!("guest-init is the init of the test guest; it does nothing anywhere else");
        std::process::exit(2);
    }
    // A thread that panics must not leave a guest that looks alive: the default message, then the end of process 1.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::abort();
    }));
    if let Err(error) = run() {
        panic!("{PREFIX}failed: {error}");
    }
}

fn run() -> Result<(), Failure> {
    system::mount(c"proc", c"/proc")?;
    system::mount(c"sysfs", c"/sys")?;
    system::mount(c"devtmpfs", c"/dev")?;
    let parameters = Parameters::parse(&fs::read_to_string("/proc/cmdline")?)?;
    let console = Arc::new(Console::open()?);
    load_modules(&parameters)?;
    if let Some((address, prefix)) = parameters.address {
        wait_for_interface()?;
        system::configure_interface(INTERFACE, address, prefix, parameters.gateway)?;
    }

    // Before there are threads, and before memory is filled that the copy of this process would share for a while.
    let boot = |changes| boot_userland(&console, &parameters, changes);
    let userland = parameters.userland.map(boot).transpose()?;

    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let boot = boot_number(&boot_id)?;
    let memory = Memory::fill(system::map(parameters.fill_bytes())?, boot, parameters.page_content());
    let tells = Arc::clone(&console);
    let disks = Disks::open(&parameters.disks, boot, move |finding| tells.say(finding))?;
    let guest = Arc::new(Guest {
        memory,
        disks: Arc::new(disks),
        counters: Counters::default(),
        control: Control::new(parameters.rate),
        boot_id,
        console,
    });
    guest.counters.generation_max.store(1, std::sync::atomic::Ordering::Relaxed);

    if let Some(userland) = userland {
        start("userland", move || Err(userland.watch().into()))?;
    }
    start_services(&guest)?;
    start_workload(&guest, &parameters, boot)?;
    start_disks(&guest)?;
    guest.console.say(READY);
    loop {
        guest.console.say(&guest.status_line()?);
        thread::sleep(STATUS_INTERVAL);
    }
}

/// Boots the userland of the first disk. One that only reads it then has its files fill memory, but for what is to be filled otherwise.
fn boot_userland(console: &Console, parameters: &Parameters, changes: Changes) -> Result<Userland, Failure> {
    let userland = Userland::start(changes)?;
    let took = userland.wait_booted()?;
    console.say(&format!("userland booted in {:.1} s", took.as_secs_f64()));
    if changes == Changes::OnDisk {
        // It is there for what it does to its disk, and fills memory as it goes.
        return Ok(userland);
    }
    let began = Instant::now();
    let read = userland::warm(parameters.fill_bytes() as u64 + FREE)?;
    let took = began.elapsed().as_secs_f64();
    console.say(&format!("{} MiB of its files read in {took:.1} s", read >> 20));
    Ok(userland)
}

/// The guest's state, shared by its threads.
struct Guest {
    memory: Memory,
    disks: Arc<Disks>,
    counters: Counters,
    control: Control,
    boot_id: String,
    console: Arc<Console>,
}

impl Guest {
    fn status(&self) -> Result<Status, Failure> {
        let uptime = fs::read_to_string("/proc/uptime")?;
        let seconds: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
        let status = self.counters.status(&self.boot_id, (seconds * 1e3) as u64, self.memory.pages());
        Ok(Status { disks: self.disks.status(), ..status })
    }

    fn status_line(&self) -> Result<String, Failure> {
        Ok(serde_json::to_string(&self.status()?)?)
    }

    /// Carries out a command as far as it concerns the workload, and says what to answer and how the machine then ends. What
    /// takes a while is left to do.
    fn obey(self: &Arc<Self>, line: &str) -> Answer<Option<End>> {
        let command = match Command::parse(line) {
            Ok(command) => command,
            Err(error) => return Answer::Now(error_line(&error), None),
        };
        command.apply(&self.control);
        let mut end = None;
        match command {
            Command::Status | Command::Rate(_) => {}
            Command::Pause => self.disks.pause(true),
            Command::Resume => self.disks.pause(false),
            Command::Check => {
                let guest = Arc::clone(self);
                return Answer::Later(Box::new(move || answer(serde_json::to_string(&guest.disks.check()))));
            }
            Command::Quiet => {
                let guest = Arc::clone(self);
                return Answer::Later(Box::new(move || match guest.disks.quiet() {
                    Ok(()) => answer(guest.status_line()),
                    Err(error) => error_line(&error),
                }));
            }
            Command::PowerOff => end = Some(End::PowerOff),
            Command::Reboot => end = Some(End::Reboot),
            Command::Panic => end = Some(End::Panic),
        }
        Answer::Now(answer(self.status_line()), end)
    }

    /// Ends the machine. But for a crash, its disks are first left as an orderly shutdown leaves them.
    fn end(&self, how: Option<End>) {
        let Some(how) = how else { return };
        thread::sleep(LAST_WORDS);
        if how != End::Panic
            && let Err(error) = self.disks.quiet()
        {
            self.console.say(&error.to_string());
        }
        end(how);
    }
}

fn answer<E: std::fmt::Display>(line: Result<String, E>) -> String {
    line.unwrap_or_else(|error| panic!("{PREFIX}no answer: {error}"))
}

fn error_line(error: &dyn std::error::Error) -> String {
    serde_json::json!({ "error": error.to_string() }).to_string()
}

fn end(how: End) {
    if let Err(error) = system::end(how) {
        panic!("{PREFIX}{how:?}: {error}");
    }
}

fn start_services(guest: &Arc<Guest>) -> Result<(), Failure> {
    let heartbeat = service::bind_udp(service::HEARTBEAT_PORT)?;
    system::widen_receive_buffer(&heartbeat, HEARTBEAT_BUFFER)?;
    start("heartbeat", move || service::heartbeat(&heartbeat).map_err(Into::into))?;
    let echo = service::bind_tcp(service::ECHO_PORT)?;
    start("echo", move || service::echo(&echo).map_err(Into::into))?;
    let control = service::bind_udp(service::CONTROL_PORT)?;
    let asked = Arc::clone(guest);
    start("control", move || Ok(service::control(&control, |line| asked.obey(line), |how| asked.end(how))?))?;
    let journal = service::bind_tcp(service::JOURNAL_PORT)?;
    let disks = Arc::clone(&guest.disks);
    start("journal", move || Ok(service::acknowledged(&journal, &disks)?))?;
    let typed = Arc::clone(guest);
    start("console", move || {
        for line in BufReader::new(&typed.console.input).lines() {
            match typed.obey(&line?) {
                Answer::Now(answer, how) => {
                    typed.console.say(&answer);
                    typed.end(how);
                }
                Answer::Later(find) => typed.console.say(&find()),
            }
        }
        Err("the console was closed".into())
    })
}

fn start_workload(guest: &Arc<Guest>, parameters: &Parameters, boot: u64) -> Result<(), Failure> {
    let working_set = parameters.working_set_pages();
    if working_set > 0 {
        let order = Order::new(parameters.pattern, working_set, boot);
        let guest = Arc::clone(guest);
        start("writer", move || {
            system::be_nice()?;
            writer::run(&guest.memory, order, &guest.control, &guest.counters)
        })?;
    }
    if parameters.check && guest.memory.pages() > 0 {
        let (guest, rate) = (Arc::clone(guest), parameters.check_rate);
        start("checker", move || {
            system::be_nice()?;
            Checker::default().run(&guest.memory, rate, &guest.counters, |finding| {
                guest.console.say(&format!("{finding:?}"))
            })
        })?;
    }
    if parameters.read {
        let disk = File::open(DISK)?;
        let sectors: u64 = fs::read_to_string(DISK_SECTORS)?.trim().parse()?;
        let guest = Arc::clone(guest);
        start("reader", move || {
            let blocks = sectors * 512 / reader::BLOCK as u64;
            Ok(reader::run(&disk, blocks, &guest.counters, |finding| guest.console.say(finding))?)
        })?;
    }
    Ok(())
}

fn start_disks(guest: &Arc<Guest>) -> Result<(), Failure> {
    for worker in guest.disks.workers() {
        start(&worker.name, move || {
            system::be_nice()?;
            (worker.run)();
            Ok(())
        })?;
    }
    Ok(())
}

/// Runs a part of the guest that never ends; if it does, the guest does.
fn start(name: &str, part: impl FnOnce() -> Result<(), Failure> + Send + 'static) -> Result<(), Failure> {
    let owned = name.to_owned();
    thread::Builder::new().name(name.to_owned()).spawn(move || match part() {
        Ok(()) => panic!("{PREFIX}{owned} ended"),
        Err(error) => panic!("{PREFIX}{owned}: {error}"),
    })?;
    Ok(())
}

/// The first serial line: what the guest says, and what it is told.
struct Console {
    input: File,
    output: Mutex<File>,
}

impl Console {
    fn open() -> Result<Self, Failure> {
        let input = OpenOptions::new().read(true).write(true).open("/dev/ttyS0")?;
        system::make_raw(&input)?;
        Ok(Self { output: Mutex::new(input.try_clone()?), input })
    }

    /// Prints a line in one piece. A console that takes nothing is no reason to fail: the network may still answer.
    fn say(&self, line: &str) {
        let line = format!("{PREFIX}{line}\r\n");
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = output.write_all(line.as_bytes());
    }
}

fn load_modules(parameters: &Parameters) -> Result<(), Failure> {
    let directory = Path::new(MODULES);
    let dependencies = Dependencies::parse(&fs::read_to_string(directory.join(DEPENDENCIES))?);
    let overlay = (parameters.userland == Some(Changes::InMemory)).then_some("overlay");
    for wanted in modules_for_devices()?.into_iter().chain(overlay) {
        for module in dependencies.load_order(wanted) {
            let path = directory.join(format!("{module}.ko"));
            system::load_module(&path).map_err(|error| format!("module {module}: {error}"))?;
        }
    }
    Ok(())
}

/// The modules for the devices this machine has: loading one that is not needed would only cost time.
///
/// Device numbers as in the virtio specification, 4.1.2: 0x1040 plus the device's type, or the transitional ones from 0x1000.
fn modules_for_devices() -> Result<Vec<&'static str>, Failure> {
    let mut modules = Vec::new();
    for device in fs::read_dir("/sys/bus/pci/devices")? {
        let device = device?.path();
        if fs::read_to_string(device.join("vendor"))?.trim() != "0x1af4" {
            continue;
        }
        modules.extend(match fs::read_to_string(device.join("device"))?.trim() {
            "0x1000" | "0x1041" => Some("virtio_net"),
            "0x1001" | "0x1042" => Some("virtio_blk"),
            "0x1002" | "0x1045" => Some("virtio_balloon"),
            "0x1003" | "0x1043" => Some("virtio_console"),
            "0x1004" | "0x1048" => Some("virtio_scsi"),
            "0x1005" | "0x1044" => Some("virtio_rng"),
            _ => None,
        });
    }
    if !modules.is_empty() {
        modules.insert(0, "virtio_pci");
    }
    if Path::new("/sys/bus/acpi/devices/QEMU0001:00").exists() {
        modules.push("pvpanic_mmio");
    }
    Ok(modules)
}

fn wait_for_interface() -> Result<(), Failure> {
    let deadline = Instant::now() + INTERFACE_TIMEOUT;
    while !Path::new("/sys/class/net").join(INTERFACE).exists() {
        if Instant::now() > deadline {
            return Err(format!("vmirror.ip is given, but no {INTERFACE} appeared").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The first 64 bits of the kernel's boot id.
fn boot_number(boot_id: &str) -> Result<u64, Failure> {
    let digits: String = boot_id.chars().filter(|c| *c != '-').take(16).collect();
    Ok(u64::from_str_radix(&digits, 16)?)
}
