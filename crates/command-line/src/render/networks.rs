//! Networks: back ends that a host's operator has a say in elsewhere, and those that reach out by themselves.

use super::permissions::{Allowed, Refused, Remedy};
use super::renderer::{Outcome, Renderer};
use crate::argument::Argument;
use crate::devices::host_device;
use crate::known;
use crate::options::Properties;

/// Why user-mode networking is not just let in.
const USER: &str = "user-mode networking reaches whatever this host can reach, and its own services";

impl Renderer<'_> {
    /// A command line that says nothing of networks gets a card with user-mode networking.
    pub(super) fn is_not_silent(&mut self) {
        let silent = self.spec.nics().iter().any(|nic| nic.netdev == "#default");
        let user = Allowed { option: "netdev".to_owned(), kind: Some("user".to_owned()) };
        if silent && !self.how.permissions.arguments.contains(&user) {
            let option = "a command line without -nic or -netdev".to_owned();
            let remedy = Remedy::Arguments(user);
            self.refused.push(Refused { option, why: USER.to_owned(), remedy });
        }
    }
}

pub(super) fn render(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    // Said by whoever calls this, with its reason: what ties the machine to its host.
    if host_device(argument).is_some() {
        return Ok(vec![argument.clone()]);
    }
    let network = argument.properties();
    let kind = network.get("type").unwrap_or_default();
    if kind == "user" {
        return renderer.unknown(argument, USER);
    }
    if !known::NETWORKS.contains(&kind.as_str()) {
        return renderer
            .unknown(argument, format!("a network of kind {kind} reaches beyond this host's bridges"));
    }
    // Scripts and helpers are taken out, and taps made ready, for all that are announced; the others are refused for that.
    let network = without_programs(network);
    renderer.names_no_file(argument, &network, &["romfile"])?;
    Ok(vec![argument.clone()])
}

fn without_programs(mut network: Properties) -> Properties {
    for key in ["script", "downscript", "helper"] {
        network.remove(key);
    }
    network
}
