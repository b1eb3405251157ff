//! The command line.

use std::num::{NonZeroU16, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use ownership::VmName;
use session::rate::RateError;
use session::{Compress, DiskRoom, Disks, Engine, OnDiverge, Options, Verify};

/// Moves running virtual machines between hosts by keeping a verified mirror of them.
#[derive(Debug, Parser)]
#[command(name = "vmirror", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// The local agent's API socket
    #[arg(
        long = "agent",
        value_name = "SOCKET",
        global = true,
        env = "VMIRROR_AGENT",
        default_value = "/run/vmirror/api.sock"
    )]
    pub(crate) socket: PathBuf,
    /// Print JSON on stdout: one document, or one per line for streams
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress and no summary, only errors
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent in the foreground; SIGTERM ends it, VMs keep running
    Agent {
        /// The configuration (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Keep the images of a VM that has left locked until killed: the agent starts one of these for each
    #[command(hide = true)]
    HoldLocks {
        /// The VM
        name: VmName,
        /// The agent's state directory, by which the agent knows it again
        state_dir: PathBuf,
    },
    /// Make certificates for the link between agents
    #[command(subcommand)]
    Cert(Cert),
    /// Start a VM under the agent: your own command line, made mirrorable
    Run {
        /// What to call it
        name: VmName,
        /// Start it even from images that a migration has left here, which are older than the VM's disks or only a part of them
        #[arg(long)]
        stale_disks: bool,
        /// The QEMU command line
        #[arg(last = true, required = true, value_name = "QEMU COMMAND LINE")]
        argv: Vec<String>,
    },
    /// Take in a QEMU that is already running
    Adopt {
        /// What to call it
        name: VmName,
        /// A QMP socket of that QEMU that nobody else uses
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
    },
    /// List the VMs of this host
    List,
    /// Show everything about one VM
    Show {
        /// The VM
        name: VmName,
    },
    /// Power a VM off
    Stop {
        /// The VM
        name: VmName,
        /// End QEMU at once instead of asking the guest
        #[arg(long)]
        force: bool,
    },
    /// Dry run: every reason why a migration would fail, at once
    Check(Migrate),
    /// Mirror a VM to another host, then switch over
    Migrate(Migrate),
    /// Mirror a VM to another host, and stay in sync until told
    Mirror {
        #[command(flatten)]
        migrate: Migrate,
        /// Return once the mirror is in sync; it stays standing
        #[arg(long)]
        detach: bool,
    },
    /// Switch over a standing mirror now
    Switch {
        /// The VM
        name: VmName,
    },
    /// Audit a standing mirror in full, now
    Verify {
        /// The VM
        name: VmName,
    },
    /// Show migrations and mirrors under way
    Status {
        /// Of this VM only
        name: Option<VmName>,
        /// Keep showing
        #[arg(long, short)]
        watch: bool,
    },
    /// Show what happened on this host
    Events {
        /// Keep showing what happens
        #[arg(long, short)]
        follow: bool,
    },
    /// End a migration or a mirror; the VM stays where it is
    Cancel {
        /// The VM
        name: VmName,
    },
    /// End the forwarding of a VM that was migrated with --forward: it joins the network of its new host, and what still comes for it
    /// at its old one gets there no more
    Release {
        /// The VM
        name: VmName,
        /// Only on this host, even if the other cannot be told
        #[arg(long)]
        force: bool,
    },
    /// Let go of a VM that was adopted: it runs on as it does, and is not the agent's any more
    Forget {
        /// The VM
        name: VmName,
    },
    /// Keep the images that a VM has left here locked no more: anybody may then start a VM from them, which are older than its disks.
    /// Only for images that are to be moved, used otherwise or given to another VM; to remove one, just remove it
    ForgetImages {
        /// The VM that has left
        name: VmName,
        /// Even if something was found that may start the VM here again, or its record cannot be read
        #[arg(long)]
        force: bool,
    },
    /// Decide about a VM whose hand-over is uncertain
    #[command(group = ArgGroup::new("decision").required(true))]
    Resolve {
        /// The VM
        name: VmName,
        /// Let it run here, by what the other agent answers: at its source, when the destination has given its copy up; at a
        /// destination where a copy waits, when the source says that it has handed it over
        #[arg(long, group = "decision")]
        run_here: bool,
        /// Remove what is left of it here: at its source, when the destination says that it runs there; at a destination, the copy
        /// that waits, or what came and never ran, but for the disks of a complete copy: its source may run it then
        #[arg(long, group = "decision")]
        give_up: bool,
        /// Even if the other agent cannot be asked, or says that it knows nothing of the VM, or, with --run-here, that it is its own
        #[arg(long)]
        force: bool,
    },
    /// List migrations that have ended, newest first
    History {
        /// Of this VM only
        #[arg(long, value_name = "NAME")]
        vm: Option<VmName>,
        /// At most this many
        #[arg(long, short = 'n', value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Show the report of a migration
    Report {
        /// Its id, or the beginning of it
        #[arg(value_parser = id)]
        id: String,
        /// Write it as a page to look at, with everything in one file
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Cert {
    /// A new certificate authority: ca.pem, ca-key.pem
    Init {
        /// Where to put it
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
    /// NAME.pem and NAME-key.pem for one agent
    Issue {
        /// Where the authority is, and where to put them
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// The agent's name
        #[arg(long, value_name = "HOST")]
        name: String,
        /// An address that the agent is reached at; may be given more than once
        #[arg(long = "address", value_name = "ADDR", required = true)]
        addresses: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// The VM
    pub(crate) name: VmName,
    /// The destination agent's link
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: String,
    #[command(flatten)]
    pub(crate) options: MigrateOptions,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateOptions {
    /// Switch over when the predicted downtime is at most this
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = humantime::parse_duration)]
    downtime: Duration,
    /// Accept a predicted downtime up to this when rounds stop shrinking [default: 1s, or --downtime if that is more]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    max_downtime: Option<Duration>,
    /// Limit of all data streams together, such as 500MiB/s. Given alone for a VM that is under way there, it changes
    /// that migration's limit, which `unlimited` lifts [default: unlimited]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bandwidth: Option<Limit>,
    /// Number of data connections [default: chosen from the cores]
    #[arg(long, value_name = "N")]
    streams: Option<NonZeroU16>,
    /// Give up when the switch-over has not begun by then
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// What is compared: both ledgers before the hand-over; in addition all of the frozen source after it; or, in
    /// addition to both, all of the destination's copy read back during the pause
    #[arg(long, value_enum, default_value_t = VerifyChoice::Proof)]
    verify: VerifyChoice,
    /// What to do with disks: mirror those that are not on shared storage, to where there is nothing yet; mirror all, over what is
    /// there; or take your word that all are on shared storage
    #[arg(long, value_enum, default_value_t = DisksChoice::Auto)]
    disks: DisksChoice,
    /// How much room images get that are made at the destination: what their content takes, or all they can ever need, at once
    #[arg(long, value_enum, default_value_t = DiskRoomChoice::Thin)]
    disk_room: DiskRoomChoice,
    /// Compress what is sent: whatever moves the memory soonest by measured speed of CPU and link; never; always so
    #[arg(long, value_enum, default_value_t = CompressChoice::Auto)]
    compress: CompressChoice,
    /// When the guest outruns the mirror: slow its CPUs until the mirror follows; switch over at once and send the rest
    /// as it is asked for; or give up and say why
    #[arg(long, value_enum, default_value_t = DivergeChoice::Throttle)]
    on_diverge: DivergeChoice,
    /// What carries the memory: the verified mirror, or QEMU's own migration stream, for hosts whose kernel cannot track memory
    #[arg(long, value_enum, default_value_t = EngineChoice::Mirror)]
    engine: EngineChoice,
    /// Move a VM with user-mode networking, or a network of sockets, though its connections end with that
    #[arg(long)]
    accept_disconnect: bool,
    /// Move a VM without a disk that is written, though what has started it here starts it again: two copies may run
    #[arg(long)]
    accept_supervisor: bool,
    /// The destination is in another network: leave the VM in the one it is in, through a tunnel between the hosts, until
    /// `vmirror release`
    #[arg(long)]
    forward: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum VerifyChoice {
    Gate,
    Proof,
    Strict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DiskRoomChoice {
    Thin,
    Whole,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DisksChoice {
    Auto,
    Mirror,
    Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CompressChoice {
    Auto,
    Off,
    Lz4,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DivergeChoice {
    Throttle,
    PostCopy,
    Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EngineChoice {
    Mirror,
    Qemu,
}

/// A limit of bandwidth, in bytes per second; none is a limit that is lifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) Option<NonZeroU64>);

impl MigrateOptions {
    /// The limit, where one was given.
    pub(crate) fn bandwidth(&self) -> Option<Limit> {
        self.bandwidth
    }
}

impl From<MigrateOptions> for Options {
    fn from(given: MigrateOptions) -> Options {
        Options {
            downtime: given.downtime,
            max_downtime: given.max_downtime.unwrap_or(Options::default().max_downtime.max(given.downtime)),
            bandwidth: given.bandwidth.and_then(|Limit(limit)| limit),
            streams: given.streams,
            timeout: given.timeout,
            verify: match given.verify {
                VerifyChoice::Gate => Verify::Gate,
                VerifyChoice::Proof => Verify::Proof,
                VerifyChoice::Strict => Verify::Strict,
            },
            accept_disconnect: given.accept_disconnect,
            accept_supervisor: given.accept_supervisor,
            forward: given.forward,
            disk_room: match given.disk_room {
                DiskRoomChoice::Thin => DiskRoom::Thin,
                DiskRoomChoice::Whole => DiskRoom::Whole,
            },
            disks: match given.disks {
                DisksChoice::Auto => Disks::Auto,
                DisksChoice::Mirror => Disks::Mirror,
                DisksChoice::Shared => Disks::Shared,
            },
            compress: match given.compress {
                CompressChoice::Auto => Compress::Auto,
                CompressChoice::Off => Compress::Off,
                CompressChoice::Lz4 => Compress::Lz4,
                CompressChoice::Zstd => Compress::Zstd,
            },
            on_diverge: match given.on_diverge {
                DivergeChoice::Throttle => OnDiverge::Throttle,
                DivergeChoice::PostCopy => OnDiverge::PostCopy,
                DivergeChoice::Fail => OnDiverge::Fail,
            },
            engine: match given.engine {
                EngineChoice::Mirror => Engine::Mirror,
                EngineChoice::Qemu => Engine::Qemu,
            },
        }
    }
}

fn rate(text: &str) -> Result<Limit, RateError> {
    session::rate::limit(text).map(Limit)
}

/// The beginning of a migration's id.
fn id(text: &str) -> Result<String, String> {
    let fits =
        !text.is_empty() && text.len() <= 36 && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    if fits { Ok(text.to_ascii_lowercase()) } else { Err("an id has digits, a to f, and dashes".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn migrate(arguments: &[&str]) -> Result<Options, clap::Error> {
        let line = ["vmirror", "migrate", "web1", "--to", "b:7600"];
        let cli = Cli::try_parse_from(line.iter().chain(arguments))?;
        let Command::Migrate(migrate) = cli.command else { panic!("not migrate") };
        Ok(migrate.options.into())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_left_out_are_those_of_the_controller() {
        assert_eq!(migrate(&[]).unwrap(), Options::default());
    }

    #[test]
    fn one_default_does_not_contradict_what_was_asked_for() {
        let options = migrate(&["--downtime", "2s"]).unwrap();
        assert_eq!(options.max_downtime, Duration::from_secs(2));
        options.validate().unwrap();
    }

    #[test]
    fn options_mean_what_they_say() {
        let options = migrate(&[
            "--downtime",
            "20ms",
            "--max-downtime",
            "300ms",
            "--bandwidth",
            "500MiB/s",
            "--streams",
            "3",
            "--timeout",
            "1h",
            "--verify",
            "gate",
            "--disks",
            "shared",
            "--engine",
            "qemu",
        ]);
        let options = options.unwrap();
        assert_eq!(options.downtime, Duration::from_millis(20));
        assert_eq!(options.max_downtime, Duration::from_millis(300));
        assert_eq!(options.bandwidth.unwrap().get(), 500 << 20);
        assert_eq!(options.streams.unwrap().get(), 3);
        assert_eq!(options.timeout, Duration::from_secs(3600));
        assert_eq!(
            (options.verify, options.disks, options.engine),
            (Verify::Gate, Disks::Shared, Engine::Qemu)
        );
    }

    #[test]
    fn rates_and_ids_that_make_no_sense_are_refused() {
        for bad in ["", "fast", "0", "-5MiB", "5MiB/h"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        assert_eq!(rate("100MB").unwrap(), Limit(NonZeroU64::new(100_000_000)));
        assert_eq!(rate("unlimited").unwrap(), Limit(None));
        for bad in ["", "xyz", "../a", "a%20"] {
            assert!(id(bad).is_err(), "{bad}");
        }
        assert_eq!(id("0B9E-").unwrap(), "0b9e-");
    }

    #[test]
    fn what_this_version_cannot_do_is_not_offered() {
        for arguments in
            [["--disks", "copy"], ["--engine", "xen"], ["--on-diverge", "hope"], ["--compress", "gzip"]]
        {
            assert!(migrate(&arguments).is_err(), "{arguments:?}");
        }
        for command in ["protect", "failover"] {
            assert!(Cli::try_parse_from(["vmirror", command, "web1"]).is_err(), "{command}");
        }
    }

    #[test]
    fn a_command_line_after_the_dashes_is_taken_as_it_is() {
        let line = ["vmirror", "run", "web1", "--", "qemu-system-x86_64", "-m", "1G", "--json", "-agent"];
        let cli = Cli::try_parse_from(line).unwrap();
        assert!(!cli.json);
        let Command::Run { argv, .. } = cli.command else { panic!("not run") };
        assert_eq!(argv, ["qemu-system-x86_64", "-m", "1G", "--json", "-agent"]);
    }

    #[test]
    fn what_a_decision_does_is_said_of_either_host() {
        let mut cli = Cli::command();
        let resolve = cli.find_subcommand_mut("resolve").unwrap();
        for decision in ["run_here", "give_up"] {
            let argument = resolve.get_arguments().find(|argument| argument.get_id() == decision).unwrap();
            let help = argument.get_help().unwrap().to_string();
            assert!(help.contains("at its source") && help.contains("at a destination"), "{help}");
        }
    }

    #[test]
    fn resolve_wants_exactly_one_decision() {
        for decisions in [&[][..], &["--run-here", "--give-up"]] {
            assert!(Cli::try_parse_from(["vmirror", "resolve", "web1"].iter().chain(decisions)).is_err());
        }
        assert!(Cli::try_parse_from(["vmirror", "resolve", "web1", "--give-up"]).is_ok());
    }
}
