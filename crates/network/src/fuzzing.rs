//! What the fuzz targets in `fuzz/` are given of this crate beyond its interface. Compiled for nobody else.

use prost::Message as _;
use serde_json::{Value, json};

use crate::conntrack::wire::Flows;
use crate::nft::{self, NftPattern, NftTable};

/// Understands connections of a firewall.
///
/// # Panics
/// If they are told in another way than they were understood, or make no sense.
pub fn flows(bytes: &[u8]) {
    let Ok(part) = Flows::decode(bytes) else { return };
    let mut flows = Vec::new();
    let sound = part.add_to(&mut flows);
    assert!(flows.len() <= part.flows.len() && (!sound || flows.len() == part.flows.len()));
    let mut back = Vec::new();
    assert!(Flows::of(&flows).iter().all(|part| part.add_to(&mut back)), "our own words");
    assert_eq!(back, flows);
}

/// Understands a table of a firewall.
///
/// # Panics
/// If it holds anything else than that table, or is understood in two ways.
pub fn nft(document: &str) {
    let table: NftTable = "vmirror-{vm}".parse::<NftPattern>().expect("a pattern").table("web1");
    let Ok(commands) = nft::commands(document, &table) else { return };
    for command in &commands {
        let added = command.as_object().filter(|command| command.len() == 1).and_then(|it| it.get("add"));
        let object = added.and_then(Value::as_object).filter(|object| object.len() == 1);
        let (kind, object) = object.and_then(|object| object.iter().next()).expect("add, and one object");
        let name = if kind == "table" { "name" } else { "table" };
        assert!(object["family"] == "inet" && object[name] == "vmirror-web1", "{command}");
    }
    let again = json!({"nftables": commands}).to_string();
    assert_eq!(nft::commands(&again, &table).expect("our own"), commands);
    assert_eq!(nft::altered(commands.clone(), commands), Vec::<String>::new());
}
