//! Reads `cargo metadata` on standard input, and checks the licence of every package against the list in `deny.toml`.
//!
//! `licences DENY_TOML`: exit status 0 when each package can be used under licences on the list, 1 when not.

use std::env;
use std::error::Error;
use std::fs;
use std::io;
use std::process::ExitCode;

use serde_json::Value;
use spdx::{Expression, ParseMode};

fn main() -> ExitCode {
    match run() {
        Ok(refused) if refused.is_empty() => ExitCode::SUCCESS,
        Ok(refused) => {
            refused.iter().for_each(|package| eprintln!("licences: {package}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("licences: {error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<Vec<String>, Box<dyn Error>> {
    let path = env::args().nth(1).ok_or("usage: licences DENY_TOML < METADATA")?;
    let allowed = allowed(&fs::read_to_string(path)?)?;
    let metadata: Value = serde_json::from_reader(io::stdin())?;
    let packages = metadata["packages"].as_array().ok_or("no packages in the metadata")?;
    let refused: Vec<String> = packages.iter().filter_map(|package| refuse(package, &allowed)).collect();
    println!("licences: {} packages, {} refused", packages.len(), refused.len());
    Ok(refused)
}

/// The list under `licenses.allow`, as cargo-deny reads it.
fn allowed(deny_toml: &str) -> Result<Vec<String>, Box<dyn Error>> {
    let table: toml::Table = deny_toml.parse()?;
    let list = table.get("licenses").and_then(|licences| licences.get("allow")?.as_array());
    let list = list.ok_or("no list licenses.allow in deny.toml")?;
    Ok(list.iter().filter_map(|licence| licence.as_str().map(str::to_owned)).collect())
}

/// Why a package may not be used, if so.
fn refuse(package: &Value, allowed: &[String]) -> Option<String> {
    let text = |key: &str| package[key].as_str().unwrap_or_default();
    let name = format!("{} {}", text("name"), text("version"));
    let licence = text("license");
    // Lax: some packages still write "MIT/Apache-2.0".
    let expression = match Expression::parse_mode(licence, ParseMode::LAX) {
        Ok(expression) => expression,
        Err(error) => return Some(format!("{name}: licence {licence:?} cannot be read: {}", error.reason)),
    };
    let fits = expression.evaluate(|licence| allowed.contains(&licence.to_string()));
    (!fits).then(|| format!("{name}: licence {licence:?} is not allowed by deny.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(licence: &str) -> bool {
        let package = serde_json::json!({ "name": "p", "version": "1", "license": licence });
        refuse(&package, &["MIT".into(), "Apache-2.0".into(), "Apache-2.0 WITH LLVM-exception".into()])
            .is_some()
    }

    #[test]
    fn one_allowed_alternative_is_enough_and_every_part_is_needed() {
        assert!(!refused("MIT OR GPL-3.0-only"));
        assert!(!refused("GPL-3.0-only OR (MIT AND Apache-2.0)"));
        assert!(!refused("MIT/Apache-2.0"));
        assert!(!refused("Apache-2.0 WITH LLVM-exception"));
        assert!(refused("MIT AND GPL-3.0-only"));
        assert!(refused("GPL-2.0-or-later"));
        assert!(refused(""));
        assert!(refused("whatever"));
    }

    #[test]
    fn the_list_is_read_from_deny_toml() {
        assert_eq!(allowed("[licenses]\nallow = [\"MIT\"]").unwrap(), ["MIT"]);
        assert!(allowed("[bans]").is_err());
    }
}
