//! The command line of a machine that is to come: what of it is not let through here, and why.

use qemu::Spec;
use qemu::spec::render::{Purpose, Refused, Remedy, Rendered, Rendering};

use super::Request;
use finding::Finding;
use host::Host;
use host::paths::Paths;

impl Request {
    /// Finds everything on the command line that is not let through.
    pub(super) fn examine_arguments(&self, host: &Host, findings: &mut Vec<Finding>) {
        if let Err(refused) = self.render(host, &self.spec.without_incoming()) {
            findings.extend(refused);
        }
    }

    /// What QEMU is started with here for such a command line.
    pub(super) fn render(&self, host: &Host, spec: &Spec) -> Result<Rendered, Vec<Finding>> {
        let directory = Paths::of(host, &self.name).own;
        let purpose = if self.rehearsal { Purpose::Rehearsal } else { Purpose::Machine };
        let permissions = host.allow.permissions();
        let how = Rendering { permissions: &permissions, directory: &directory, purpose };
        let finding = |refused: Refused| finding(&host.name, refused);
        spec.render(&how).map_err(|refused| refused.into_iter().map(finding).collect())
    }
}

fn finding(host: &str, refused: Refused) -> Finding {
    let Refused { option, why, remedy } = refused;
    let message = format!("{host} does not let {option} through: {why}");
    let add = |what: String, key: &str| format!("add {what} to [allow] {key} in the configuration of {host}");
    let hint = match remedy {
        Remedy::Arguments(allowed) => {
            let add = add(format!("{:?}", allowed.to_string()), "arguments");
            format!("start the VM without it; or, if that is to be let through whatever is in it, {add}")
        }
        Remedy::FileDirs(directory) => add(format!("{directory:?}"), "disk_dirs"),
        Remedy::OutputDirs(directory) => add(format!("{directory:?}"), "output_dirs"),
        Remedy::SocketDirs(directory) => add(format!("{directory:?}"), "socket_dirs"),
        Remedy::DiskDrivers(driver) => add(format!("{driver:?}"), "disk_drivers"),
        Remedy::Listen(address) => add(format!("{address:?}"), "listen"),
        Remedy::Start(how) => how.to_owned(),
        _ => "start the VM without it".to_owned(),
    };
    Finding::new("argument-not-allowed", message, hint)
}
