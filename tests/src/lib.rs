//! What the end-to-end tests share: two hosts with agents, guests that judge every migration, and the assertions that hold
//! for each of them.
//!
//! A test's story reads: a [`Pair`] of hosts; a [`Guest`] that runs on one of them; [`Pair::migrate`], which must complete;
//! [`Guest::sound_since`], the guest's own word that its memory survived; [`report_adds_up`], the report's. Everything is removed
//! when the pair is dropped, however the test ends.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod accounting;
mod disks;
mod guest;
mod level;
pub mod matrix;
mod moments;
mod outrun;
mod pair;
mod points;
mod refusal;
mod said;
mod scene;
mod state_dirs;
mod supervisor;
mod traffic;
mod under_way;
mod writes;

pub use accounting::{PHASES, report_adds_up};
pub use disks::{BlockDevice, image, local, noise, write_noise};
pub use guest::{Guest, PAGE};
pub use level::{Level, Trend};
pub use matrix::Side;
pub use outrun::{OUTRUN, outrunning};
pub use pair::{Pair, until, vmirror};
pub use points::{Held, Points};
pub use refusal::Refusal;
pub use said::Said;
pub use scene::Scene;
pub use state_dirs::copy;
pub use supervisor::Supervisor;
pub use traffic::{all_came_once, unbroken};
pub use under_way::UnderWay;
pub use writes::Writes;

use std::time::Duration;

/// How long anything may take that is waited for. Nothing takes nearly as long, except on a machine that does something else.
pub const PATIENCE: Duration = Duration::from_secs(120);
