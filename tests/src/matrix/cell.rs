//! What can be done to a migration, and when.

use std::fmt;

use session::points::Point;

use crate::PHASES;

/// Which of the two hosts of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that the machine leaves.
    Source,
    /// The one that it goes to.
    Destination,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The agent is killed, and started again.
    KillAgent(Role),
    /// QEMU is killed.
    KillQemu(Role),
    /// The agent is stopped (SIGSTOP) for a while.
    StopAgent(Role),
    /// QEMU is stopped for a while.
    StopQemu(Role),
    /// Nothing comes to one of the agents for a while.
    CutOneWay,
    /// Nothing comes to either for a while.
    CutBothWays,
    /// The link takes 1 Mbit/s for a while.
    Slow,
    /// Bytes come to one of the agents that were not sent, for a while.
    Corrupt,
    /// The file system of a state directory is full for a while.
    StateFull,
    /// Nothing below a state directory can be made durable for a while.
    SyncFails,
    /// An agent is killed, and nothing below its state directory can be read when it is started again; then once more.
    ReadsFail,
    /// The clock of one agent jumps by a year, and after a while back.
    ClockJumps,
    /// The destination loses its power, and starts again.
    Reboot,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 17] = [
        Fault::KillAgent(Role::Source),
        Fault::KillAgent(Role::Destination),
        Fault::KillQemu(Role::Source),
        Fault::KillQemu(Role::Destination),
        Fault::StopAgent(Role::Source),
        Fault::StopAgent(Role::Destination),
        Fault::StopQemu(Role::Source),
        Fault::StopQemu(Role::Destination),
        Fault::CutOneWay,
        Fault::CutBothWays,
        Fault::Slow,
        Fault::Corrupt,
        Fault::StateFull,
        Fault::SyncFails,
        Fault::ReadsFail,
        Fault::ClockJumps,
        Fault::Reboot,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        use Role::{Destination, Source};
        match self {
            Fault::KillAgent(Source) => "kill-source-agent",
            Fault::KillAgent(Destination) => "kill-destination-agent",
            Fault::KillQemu(Source) => "kill-source-qemu",
            Fault::KillQemu(Destination) => "kill-destination-qemu",
            Fault::StopAgent(Source) => "stop-source-agent",
            Fault::StopAgent(Destination) => "stop-destination-agent",
            Fault::StopQemu(Source) => "stop-source-qemu",
            Fault::StopQemu(Destination) => "stop-destination-qemu",
            Fault::CutOneWay => "cut-one-way",
            Fault::CutBothWays => "cut-both-ways",
            Fault::Slow => "slow-link",
            Fault::Corrupt => "corrupted-bytes",
            Fault::StateFull => "state-full",
            Fault::SyncFails => "sync-fails",
            Fault::ReadsFail => "reads-fail",
            Fault::ClockJumps => "clock-jumps",
            Fault::Reboot => "destination-reboots",
        }
    }
}

/// What is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A guest without a disk.
    Diskless,
    /// One with a disk that is mirrored.
    Disk,
    /// One that outruns the link, and is handed over before its memory is complete.
    PostCopy,
    /// One that its user has started, with memory that is QEMU's own, and that an agent has adopted.
    Private,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Diskless, Kind::Disk, Kind::PostCopy, Kind::Private];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Diskless => "diskless",
            Kind::Disk => "disk",
            Kind::PostCopy => "post-copy",
            Kind::Private => "private",
        }
    }
}

/// From host A to host B, or back: then the destination has been the machine's host before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From A to B.
    There,
    /// From B to A.
    Back,
}

/// One of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// What is migrated.
    pub kind: Kind,
    /// What is done.
    pub fault: Fault,
    /// When.
    pub point: Point,
    /// On which way.
    pub direction: Direction,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::There => "there",
            Direction::Back => "back",
        };
        write!(f, "{}/{}/{}/{direction}", self.kind.name(), self.fault.name(), self.point.name())
    }
}

/// All points, in their order: the phases, and within the switch-over those of its own.
#[must_use]
pub fn points() -> Vec<Point> {
    let phases = PHASES.into_iter().map(Point::Phase);
    let (before, after): (Vec<_>, Vec<_>) = phases.partition(|point| place(*point) <= SWITCH_OVER);
    [before, Point::OF_SWITCH_OVER.to_vec(), after].concat()
}

const SWITCH_OVER: usize = 5;

fn place(point: Point) -> usize {
    let inside = Point::OF_SWITCH_OVER.len();
    match point {
        Point::Phase(phase) => {
            let place = PHASES.iter().position(|other| *other == phase).unwrap_or_default();
            if place <= SWITCH_OVER { place } else { place + inside }
        }
        point => {
            let place = Point::OF_SWITCH_OVER.iter().position(|other| *other == point).unwrap_or_default();
            SWITCH_OVER + 1 + place
        }
    }
}

impl Cell {
    /// The whole matrix: everything without a disk, and of the other kinds what differs by them.
    #[must_use]
    pub fn all() -> Vec<Cell> {
        let mut cells = Vec::new();
        for kind in Kind::ALL {
            for (number, fault) in Fault::ALL.into_iter().enumerate() {
                for (place, point) in points().into_iter().enumerate() {
                    for (turn, direction) in [Direction::There, Direction::Back].into_iter().enumerate() {
                        let part = match kind {
                            Kind::Diskless => 1,
                            // One in four, of each fault, of each point, in each direction.
                            Kind::Disk | Kind::PostCopy | Kind::Private => 4,
                        };
                        if (number + place + 2 * turn) % part == 0 {
                            cells.push(Cell { kind, fault, point, direction });
                        }
                    }
                }
            }
        }
        cells
    }

    /// Forty that have each fault and each point, none of which costs the machine its life.
    #[must_use]
    pub fn sample() -> Vec<Cell> {
        Cell::some(Kind::Diskless, 40, &[Direction::There, Direction::Back])
    }

    /// One of each fault for a guest with private memory, none of which costs it its life. Only there: after that its memory is a file.
    #[must_use]
    pub fn sample_of_private_memory() -> Vec<Cell> {
        Cell::some(Kind::Private, Fault::ALL.len(), &[Direction::There])
    }

    fn some(kind: Kind, count: usize, directions: &[Direction]) -> Vec<Cell> {
        let points = points();
        let mut cells: Vec<Cell> = Vec::new();
        for number in 0..count {
            let direction = directions[number % directions.len()];
            let fault = Fault::ALL[number % Fault::ALL.len()];
            let cells_of = |point| Cell { kind, fault, point, direction };
            // From one that goes around with another step than the faults on, the first that fits, and that is not there yet if
            // there is one.
            let from = (number * 8) % points.len();
            let around = (0..points.len()).map(|step| cells_of(points[(from + step) % points.len()]));
            let fit: Vec<Cell> =
                around.filter(|cell| cell.loss().is_none() && !cells.contains(cell)).collect();
            let is_new = |cell: &&Cell| cells.iter().all(|there| there.point != cell.point);
            let chosen = fit.iter().find(is_new).or(fit.first()).copied();
            cells.extend(chosen);
        }
        cells
    }

    /// The cell of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Cell> {
        let all = Kind::ALL.into_iter().flat_map(|kind| {
            Fault::ALL.into_iter().flat_map(move |fault| {
                points().into_iter().flat_map(move |point| {
                    [Direction::There, Direction::Back].map(|direction| Cell {
                        kind,
                        fault,
                        point,
                        direction,
                    })
                })
            })
        });
        all.into_iter().find(|cell| cell.to_string() == name)
    }

    /// The rule by which the machine may be lost with what was ended, as it would be on one host ("Crash by crash" in docs/protocol.md).
    #[must_use]
    pub fn loss(&self) -> Option<&'static str> {
        let at = place(self.point);
        let supplies = self.kind == Kind::PostCopy && at >= place(Point::HandedOver);
        let lost_before = match self.kind {
            Kind::Diskless | Kind::Disk | Kind::Private => Point::Sent,
            Kind::PostCopy => Point::HandedOver,
        };
        match self.fault {
            Fault::KillQemu(Role::Source) if at < place(lost_before) => {
                Some("QEMU at S, before its copy is complete: ended, as on one host")
            }
            Fault::KillQemu(Role::Source) if supplies => Some("S's QEMU, while memory is missing"),
            Fault::KillQemu(Role::Destination) if at >= place(Point::Resumed) => {
                Some("QEMU at D, after it has resumed: ended, as on one host")
            }
            Fault::Reboot if at >= place(Point::Owned) => Some("D host, after OWNER"),
            _ => None,
        }
    }
}
