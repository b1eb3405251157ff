//! The nftables table of a machine: the firewall rules that are about it alone, moved to another host with it.
//!
//! Tables are read and written by the program `nft`, in its JSON form (libnftables-json(5)). Where the agent's configuration names
//! no table, nothing is run.
//!
//! What a peer sends may hold only what belongs to the one table that the receiving agent's own configuration names for that
//! machine: it cannot change other tables. Within a table of the family `inet` a rule can still be about any packet of the host, so
//! an agent that names a table trusts the peers it allows with that.

use std::fmt;
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;
use std::{io, process};

use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// Longest description of a table, in bytes of JSON.
pub const MAX_DOCUMENT: usize = 1 << 20;

/// How long `nft` may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Longest part of a pattern beside the machine's name. The kernel takes names of 255 bytes.
const MAX_FIXED: usize = 63;

/// What stands for the machine's name in a pattern.
const VM: &str = "{vm}";

/// A kind of packets that a table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Inet,
    Bridge,
    Netdev,
}

impl Family {
    fn named(name: &str) -> Option<Family> {
        [Family::Inet, Family::Bridge, Family::Netdev].into_iter().find(|family| family.as_str() == name)
    }

    fn as_str(self) -> &'static str {
        match self {
            Family::Inet => "inet",
            Family::Bridge => "bridge",
            Family::Netdev => "netdev",
        }
    }
}

/// How the tables of machines are called: `vmirror-{vm}`, or with the family before it `bridge vmirror-{vm}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftPattern {
    family: Family,
    name: String,
}

/// A pattern by which no machine's table can be named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no table for each VM: use up to {MAX_FIXED} letters, digits, '.', '_' or '-' and once {VM}, beginning with a letter, \
     after inet, bridge or netdev and a space where it is not of inet"
)]
pub struct BadPattern(pub String);

impl FromStr for NftPattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<NftPattern, BadPattern> {
        let bad = || BadPattern(text.to_owned());
        let (family, name) = match text.split_once(' ') {
            Some((family, name)) => (Family::named(family).ok_or_else(bad)?, name),
            None => (Family::Inet, text),
        };
        let (before, after) = name.split_once(VM).ok_or_else(bad)?;
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        // A peer chooses the names of its machines. With nothing before it, one of them could be that of any table of this host.
        let begins = before.starts_with(|c: char| c.is_ascii_alphabetic());
        if begins && before.len() + after.len() <= MAX_FIXED && before.chars().chain(after.chars()).all(fits)
        {
            Ok(NftPattern { family, name: name.to_owned() })
        } else {
            Err(bad())
        }
    }
}

impl NftPattern {
    /// The table of a machine.
    #[must_use]
    pub fn table(&self, vm: &str) -> NftTable {
        NftTable { family: self.family, name: self.name.replace(VM, vm) }
    }
}

/// A table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NftTable {
    family: Family,
    name: String,
}

impl fmt::Display for NftTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family.as_str(), self.name)
    }
}

/// Why a table could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// The program is not there, or does not run.
    #[error("cannot run nft, which moves table {table}")]
    Run {
        /// For which table.
        table: NftTable,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It did not end.
    #[error("nft has not ended after {PATIENCE:?}: table {0}")]
    Stuck(NftTable),
    /// It refused.
    #[error("nft cannot {action} table {table}: {message}")]
    Failed {
        /// What was asked for.
        action: &'static str,
        /// Of which table.
        table: NftTable,
        /// Its own words.
        message: String,
    },
    /// A description is not one of a table, or of more than that.
    #[error("the description of table {table} is refused: {problem}")]
    Refused {
        /// The table that it should have been of.
        table: NftTable,
        /// What is wrong.
        problem: String,
    },
}

/// A table's description; none when there is no such table.
///
/// # Errors
/// [`NftError`]: `nft` is not installed or refuses, or the table takes more than [`MAX_DOCUMENT`].
pub async fn export(table: &NftTable) -> Result<Option<String>, NftError> {
    // What `nft` says of one that is missing is words only. All that exist are named in its list.
    let list = run("list", table, &json!([{"list": {"tables": null}}])).await?;
    let Listed(objects) = parse(&list, table)?;
    let is_it = |object: &Value| {
        let found = &object["table"];
        found["family"] == table.family.as_str() && found["name"] == *table.name
    };
    if !objects.iter().any(is_it) {
        return Ok(None);
    }
    let document = run("read", table, &json!([{"list": {"table": table.id()}}])).await?;
    // What the other host would refuse is better known here.
    commands(&document, table)?;
    Ok(Some(document))
}

/// Puts a table as described in the place of the one that there may be, all at once, and says what of it has become something else
/// than was described: nothing, where `nft` takes what it lists. 1.0.6 loses what is in a `ct timeout`, and another version may
/// describe the same in other words.
///
/// # Errors
/// [`NftError::Refused`] for a description that holds anything but this table, and as [`export`].
pub async fn load(document: &str, table: &NftTable) -> Result<Vec<String>, NftError> {
    let described = commands(document, table)?;
    let mut all = table.removal();
    all.extend(described.iter().cloned());
    run("write", table, &Value::Array(all)).await?;
    let now = export(table).await?.map_or(Ok(Vec::new()), |now| commands(&now, table))?;
    Ok(altered(described, now))
}

/// Removes a table, if it is there.
///
/// # Errors
/// As [`export`].
pub async fn remove(table: &NftTable) -> Result<(), NftError> {
    run("remove", table, &Value::Array(table.removal())).await.map(drop)
}

impl NftTable {
    fn id(&self) -> Value {
        json!({"family": self.family.as_str(), "name": self.name})
    }

    /// Deleting what is not there would be an error, so it is made first.
    fn removal(&self) -> Vec<Value> {
        vec![json!({"add": {"table": self.id()}}), json!({"delete": {"table": self.id()}})]
    }
}

/// What a table consists of, in the order in which it can be made: a map may name chains, and a rule anything. `nft` itself lists maps
/// before chains, and does not take that back (1.0.6).
const KINDS: [&str; 15] = [
    "table",
    "chain",
    "counter",
    "quota",
    "limit",
    "secmark",
    "synproxy",
    "ct helper",
    "ct timeout",
    "ct expectation",
    "flowtable",
    "set",
    "map",
    "element",
    "rule",
];

/// The objects of a description.
struct Listed(Vec<Value>);

fn parse(document: &str, table: &NftTable) -> Result<Listed, NftError> {
    if document.len() > MAX_DOCUMENT {
        return Err(table.refused(format!("it is longer than {MAX_DOCUMENT} bytes")));
    }
    let whole = serde_json::from_str(document).map_err(|error| table.refused(error.to_string()))?;
    match whole {
        Value::Object(mut whole) if whole.len() == 1 => match whole.remove("nftables") {
            Some(Value::Array(objects)) => Ok(Listed(objects)),
            _ => Err(table.refused("it has no nftables")),
        },
        _ => Err(table.refused("it is not of nftables alone")),
    }
}

/// The commands that make the table that is described, when that is all that they do.
pub(crate) fn commands(document: &str, table: &NftTable) -> Result<Vec<Value>, NftError> {
    let Listed(objects) = parse(document, table)?;
    let mut commands = Vec::with_capacity(objects.len());
    for object in objects {
        let (kind, object) = single(object).ok_or_else(|| table.refused("an entry is not one object"))?;
        let (kind, object) = match &*kind {
            "metainfo" => continue,
            "add" => single(object).ok_or_else(|| table.refused("add is not followed by one object"))?,
            _ => (kind, object),
        };
        let Some(rank) = KINDS.iter().position(|known| *known == kind) else {
            return Err(table.refused(format!("it holds {kind:?}")));
        };
        let Value::Object(mut object) = object else {
            return Err(table.refused(format!("a {kind} is not an object")));
        };
        if !object.values().all(is_exact) {
            return Err(table.refused(format!("a {kind} has a number that is not a whole one")));
        }
        let is_its = |key: &str, value: &str| object.get(key).is_some_and(|found| found == value);
        let place = if kind == "table" { "name" } else { "table" };
        if !is_its("family", table.family.as_str()) || !is_its(place, &table.name) {
            return Err(table.refused(format!("a {kind} is not this table's")));
        }
        // For a rule that is added it would be where to add it.
        object.remove("handle");
        object.remove("index");
        commands.push((rank, kind, object));
    }
    commands.sort_by_key(|(rank, ..)| *rank);
    Ok(commands.into_iter().map(|(_, kind, object)| json!({"add": {kind: object}})).collect())
}

/// Whether it is told on as it is: nft has whole numbers of at most 64 bits, and others would be rounded.
fn is_exact(value: &Value) -> bool {
    match value {
        Value::Number(number) => !number.is_f64(),
        Value::Array(values) => values.iter().all(is_exact),
        Value::Object(object) => object.values().all(is_exact),
        Value::Null | Value::Bool(_) | Value::String(_) => true,
    }
}

/// The names of objects that were to be and are not.
pub(crate) fn altered(mut described: Vec<Value>, mut now: Vec<Value>) -> Vec<String> {
    described.iter_mut().chain(&mut now).for_each(keep_what_lasts);
    let rest = described.into_iter().filter(|object| match now.iter().position(|found| found == object) {
        Some(at) => {
            now.swap_remove(at);
            false
        }
        None => true,
    });
    rest.filter_map(|command| single(single(command)?.1)).map(|(kind, object)| name(&kind, &object)).collect()
}

/// What a person calls an object.
fn name(kind: &str, object: &Value) -> String {
    match (object["name"].as_str(), object["chain"].as_str()) {
        (Some(name), _) => format!("{kind} {name}"),
        (None, Some(chain)) => format!("{kind} in chain {chain}"),
        (None, None) => kind.to_owned(),
    }
}

/// Leaves out what changes while packets pass, and the order of elements, which the kernel keeps in no order.
fn keep_what_lasts(value: &mut Value) {
    match value {
        Value::Object(object) => {
            // The limit of a quota is in bytes too, but a counter's has both.
            if object.remove("packets").is_some() {
                object.remove("bytes");
            }
            object.remove("used");
            object.remove("expires");
            object.values_mut().for_each(keep_what_lasts);
            for key in ["elem", "set"] {
                if let Some(Value::Array(elements)) = object.get_mut(key) {
                    elements.sort_by_cached_key(Value::to_string);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(keep_what_lasts),
        _ => {}
    }
}

/// The only key of an object, and its value.
fn single(value: Value) -> Option<(String, Value)> {
    match value {
        Value::Object(object) if object.len() == 1 => Map::into_iter(object).next(),
        _ => None,
    }
}

impl NftTable {
    fn refused(&self, problem: impl Into<String>) -> NftError {
        NftError::Refused { table: self.clone(), problem: problem.into() }
    }
}

/// Has commands done, all of them or none, and says what came out.
async fn run(action: &'static str, table: &NftTable, commands: &Value) -> Result<String, NftError> {
    let commands = json!({"nftables": commands}).to_string();
    let done = tokio::time::timeout(PATIENCE, nft(commands)).await;
    let done = done.map_err(|_| NftError::Stuck(table.clone()))?;
    let process::Output { status, stdout, stderr } =
        done.map_err(|source| NftError::Run { table: table.clone(), source })?;
    if status.success() {
        return String::from_utf8(stdout).map_err(|_| table.refused("it is not UTF-8"));
    }
    let message = String::from_utf8_lossy(&stderr);
    let message = message.lines().find(|line| line.contains("Error")).unwrap_or(&message).trim().to_owned();
    Err(NftError::Failed { action, table: table.clone(), message })
}

async fn nft(commands: String) -> io::Result<process::Output> {
    let mut command = Command::new("nft");
    command.args(["--json", "--file", "-"]).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let input = child.stdin.take();
    let write = async {
        if let Some(mut input) = input {
            // One that ends without having read it all says why itself.
            let _ = input.write_all(commands.as_bytes()).await;
        }
    };
    let ((), output) = tokio::join!(write, child.wait_with_output());
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> NftTable {
        "vmirror-{vm}".parse::<NftPattern>().unwrap().table("web1")
    }

    fn refused(document: &str) -> String {
        match commands(document, &table()) {
            Err(NftError::Refused { problem, .. }) => problem,
            other => panic!("{document}: {other:?}"),
        }
    }

    #[test]
    fn a_pattern_names_a_table_for_each_machine() {
        let name = |pattern: &str| pattern.parse::<NftPattern>().unwrap().table("web1").to_string();
        assert_eq!(name("vmirror-{vm}"), "inet vmirror-web1");
        assert_eq!(name("inet vm_{vm}.rules"), "inet vm_web1.rules");
        assert_eq!(name("bridge v{vm}"), "bridge vweb1");
        assert_eq!(name("netdev v{vm}"), "netdev vweb1");
        for bad in [
            "",
            "{vm}",
            "{vm}-rules",
            "vms",
            "1{vm}",
            "a{vm}b{vm}",
            "a b{vm}",
            "ip a{vm}",
            "inet  a{vm}",
            "a\"{vm}",
            "inet {vm}",
            "a{VM}",
        ] {
            assert_eq!(bad.parse::<NftPattern>(), Err(BadPattern(bad.to_owned())), "{bad}");
        }
        assert!(format!("a{}{{vm}}", "x".repeat(63)).parse::<NftPattern>().is_err());
    }

    /// As nft 1.0.6 lists a table: a map of verdicts stands before the chain that it names.
    const LISTED: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
        {"table": {"family": "inet", "name": "vmirror-web1", "handle": 2}},
        {"map": {"family": "inet", "name": "m", "table": "vmirror-web1", "type": "ipv4_addr", "handle": 7, "map": "verdict",
                 "elem": [["10.0.0.2", {"jump": {"target": "other"}}]]}},
        {"chain": {"family": "inet", "table": "vmirror-web1", "name": "other", "handle": 1}},
        {"rule": {"family": "inet", "table": "vmirror-web1", "chain": "other", "handle": 8, "expr": [{"drop": null}]}}]}"#;

    #[test]
    fn a_listed_table_is_made_in_an_order_that_can_be_and_without_handles() {
        let commands = commands(LISTED, &table()).unwrap();
        let kinds: Vec<&String> = commands
            .iter()
            .map(|command| command["add"].as_object().unwrap().keys().next().unwrap())
            .collect();
        assert_eq!(kinds, ["table", "chain", "map", "rule"]);
        assert!(!Value::Array(commands).to_string().contains("handle"));
    }

    #[test]
    fn a_document_cannot_hold_anything_but_the_one_table() {
        let of = |object: &str| format!(r#"{{"nftables": [{object}]}}"#);
        let cases = [
            (of(r#"{"table": {"family": "inet", "name": "filter"}}"#), "a table is not this table's"),
            (of(r#"{"table": {"family": "ip", "name": "vmirror-web1"}}"#), "a table is not this table's"),
            (of(r#"{"table": {"name": "vmirror-web1"}}"#), "a table is not this table's"),
            (
                of(r#"{"rule": {"family": "inet", "table": "filter", "chain": "input", "expr": []}}"#),
                "a rule is not",
            ),
            (
                of(r#"{"add": {"rule": {"family": "inet", "table": "filter", "chain": "input"}}}"#),
                "a rule is not",
            ),
            (
                of(r#"{"chain": {"family": "inet", "table": ["vmirror-web1"], "name": "x"}}"#),
                "a chain is not",
            ),
            (of(r#"{"element": {"family": "inet", "table": "filter", "name": "s"}}"#), "a element is not"),
            (
                of(
                    r#"{"rule": {"family": "inet", "table": "vmirror-web1", "expr": [{"limit": {"rate": 1.5}}]}}"#,
                ),
                "a rule has a number",
            ),
            (of(r#"{"flush": {"ruleset": null}}"#), "it holds \"flush\""),
            (
                of(r#"{"delete": {"table": {"family": "inet", "name": "vmirror-web1"}}}"#),
                "it holds \"delete\"",
            ),
            (of(r#"{"add": {"ruleset": null}}"#), "it holds \"ruleset\""),
            (
                of(r#"{"add": {"add": {"table": {"family": "inet", "name": "vmirror-web1"}}}}"#),
                "it holds \"add\"",
            ),
            (
                of(r#"{"insert": {"rule": {"family": "inet", "table": "vmirror-web1"}}}"#),
                "it holds \"insert\"",
            ),
            (
                of(r#"{"table": {"family": "inet", "name": "vmirror-web1"}, "flush": {"ruleset": null}}"#),
                "not one object",
            ),
            (of(r#"{"add": [1]}"#), "not followed by one object"),
            (of(r#"{"table": 7}"#), "a table is not an object"),
            (of("7"), "not one object"),
            (r#"{"nftables": {}}"#.to_owned(), "no nftables"),
            (r#"{"nftables": [], "more": 1}"#.to_owned(), "not of nftables alone"),
            ("[]".to_owned(), "not of nftables alone"),
            ("table inet vmirror-web1 { }".to_owned(), "expected"),
            ("[".repeat(1000), "recursion"),
            (format!("{}{LISTED}", " ".repeat(MAX_DOCUMENT)), "longer than"),
        ];
        for (document, problem) in cases {
            let said = refused(&document);
            assert!(said.contains(problem), "{document}: {said}");
        }
    }
}
