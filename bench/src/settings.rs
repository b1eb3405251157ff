//! What can be chosen on the command line.

use std::path::PathBuf;

use clap::Parser;

/// Boots a real guest, migrates it live between two hosts and back, and measures that beside QEMU's own migration
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
#[command(name = "demo", max_term_width = 100)]
pub struct Settings {
    /// Memory of each guest, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..=16_384))]
    pub memory: u64,
    /// How much of it is filled with pages that the guest checks itself, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=15_000))]
    pub fill: u64,
    /// Migrations by each method
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Only vmirror: no migrations by QEMU itself
    #[arg(long)]
    pub alone: bool,
    /// As without root: two agents on loopback, guests without network
    #[arg(long)]
    pub rootless: bool,
    /// Where report.json and report.html go [default: target/demo, or target/bench]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

impl Settings {
    /// Whether the guest has room for what it is to fill, and for its own kernel and programs.
    pub fn validate(&self) -> Result<(), String> {
        // The guest's kernel, initramfs and tables take about 130 MiB.
        const SYSTEM_MIB: u64 = 160;
        if self.fill + SYSTEM_MIB > self.memory {
            return Err(format!(
                "--fill {} does not fit: of {} MiB of memory the guest's own system takes {SYSTEM_MIB}",
                self.fill, self.memory
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn settings(line: &[&str]) -> Settings {
        Settings::try_parse_from([&["demo"], line].concat()).unwrap()
    }

    #[test]
    fn the_defaults_are_those_of_the_goals() {
        Settings::command().debug_assert();
        let settings = settings(&[]);
        assert_eq!((settings.memory, settings.fill, settings.runs), (1024, 256, 4));
        settings.validate().unwrap();
    }

    #[test]
    fn a_guest_too_small_for_its_filling_is_refused() {
        assert!(
            settings(&["--memory", "512", "--fill", "512"]).validate().unwrap_err().contains("--fill 512")
        );
        assert!(Settings::try_parse_from(["demo", "--runs", "0"]).is_err());
    }
}
