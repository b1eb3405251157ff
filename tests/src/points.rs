//! An agent that a test holds at points of a migration, to strike exactly there.

use std::fs::{self, File};
use std::path::PathBuf;

use session::points::{DIRECTORY, Point};
use testbed::{AgentOptions, Host};

use crate::until;

/// The points of a host's agent.
#[derive(Debug)]
pub struct Points {
    directory: PathBuf,
    options: AgentOptions,
}

impl Points {
    /// Starts the agent of a host anew, so that it can be held; beside the points it is to have this in its environment.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn of(host: &Host, environment: &[(String, String)]) -> Points {
        let directory = host.directory().join("points");
        fs::create_dir(&directory).unwrap();
        let held = (DIRECTORY.to_owned(), directory.display().to_string());
        let environment = [environment, &[held]].concat();
        let points = Points { directory, options: AgentOptions { environment, ..AgentOptions::default() } };
        host.stop_agent().unwrap();
        host.start_agent_with(points.options()).unwrap();
        points
    }

    /// How an agent is started that can be held at them.
    #[must_use]
    pub fn options(&self) -> &AgentOptions {
        &self.options
    }

    /// Has the next migration that comes to a point held there, until the value is dropped.
    ///
    /// # Panics
    /// If that cannot be said.
    #[must_use]
    pub fn hold(&self, point: Point) -> Held {
        let held = Held {
            asked: self.directory.join(point.name()),
            reached: self.directory.join(format!("{}.reached", point.name())),
        };
        File::create(&held.asked).unwrap();
        held
    }
}

/// A migration that is held at a point, or will be.
#[derive(Debug)]
pub struct Held {
    asked: PathBuf,
    reached: PathBuf,
}

impl Held {
    /// Waits until the migration has come to the point.
    ///
    /// # Panics
    /// If it never does.
    #[track_caller]
    pub fn reached(&self) {
        until("the migration has come to the point", || self.reached.exists());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for file in [&self.asked, &self.reached] {
            let _ = fs::remove_file(file);
        }
    }
}
