//! A machine's command line as a host starts it that has got it from another.
//!
//! Who sends a machine chooses its command line, and QEMU's options reach far beyond the machine: they write files, listen on
//! sockets, load code. So nothing of it is passed on because nobody has thought of it. Every option is known by its name, and what is
//! in it by its kind: it is passed as it is, rendered in another way, left out because it belongs to the process and not to
//! the machine, or refused by name. What a host's operator lets through beyond that is in [`Permissions`].
//!
//! A QEMU that waits for a machine must not touch what another one uses, which still runs it and may see the same files: it gets
//! [`Place`]s of its own for its sockets, in a directory that is nobody else's. Only when the machine is its own are they given the
//! names by which its users know them.

mod chardevs;
mod devices;
mod displays;
mod networks;
mod objects;
mod options;
mod permissions;
mod renderer;
mod storage;

pub use permissions::{Allowed, NotAnArgument, Permissions, Place, Refused, Remedy, Way};
pub use renderer::{Purpose, QMP_SOCKET, Rendering};

use crate::argument::Argument;
use crate::spec::Spec;
use renderer::{PID_FILE, Renderer};

/// A command line as QEMU is started with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// It.
    pub spec: Spec,
    /// What is at another place than the command line had it.
    pub places: Vec<Place>,
}

impl Spec {
    /// The command line with which a host starts this machine that has got it from another: this one, with nothing in it that is not
    /// allowed, and with its sockets, our own monitor's among them, in a directory of its own. To be called for what [`Spec::for_destination`] returns, or for what it
    /// is called with, to hear what stands in the way.
    ///
    /// # Errors
    /// Everything that is not let through.
    pub fn render(&self, how: &Rendering<'_>) -> Result<Rendered, Vec<Refused>> {
        let mut renderer = Renderer { spec: self, how, sockets: 0, places: Vec::new(), refused: Vec::new() };
        let mut arguments = Vec::new();
        for argument in &self.arguments {
            if renderer.is_let_through(argument) {
                arguments.push(argument.clone());
            } else {
                arguments.extend(options::render(&mut renderer, argument).unwrap_or_default());
            }
        }
        renderer.is_not_silent();
        arguments.extend(renderer.displays());
        if self.sandboxes() > 0 || !how.permissions.unsandboxed {
            arguments.push(Argument::with_value("-sandbox", SANDBOX));
        }
        arguments.push(Argument::with_value("-pidfile", how.directory.join(PID_FILE).to_string_lossy()));
        if !renderer.refused.is_empty() {
            return Err(renderer.refused);
        }
        let mut spec = Spec { binary: self.binary.clone(), arguments };
        spec.keep_images_apart();
        Ok(Rendered { spec, places: renderer.places })
    }

    /// This command line, under the filters of system calls that another one is under: those that the process has which is on record
    /// with it.
    #[must_use]
    pub fn sandboxed_as(mut self, rendered: &Spec) -> Spec {
        self.remove_all("sandbox");
        self.arguments
            .extend(rendered.arguments.iter().filter(|argument| argument.name() == "sandbox").cloned());
        self
    }
}

/// The filter of system calls that QEMU puts itself under: what a machine never needs. The same as libvirt's.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
