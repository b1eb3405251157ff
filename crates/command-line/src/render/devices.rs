//! Devices: those of QEMU's own that are nothing but what the guest sees of them.

use super::renderer::{Outcome, Renderer};
use crate::argument::Argument;
use crate::devices::host_device;
use crate::known;

/// Properties that are texts for the guest, or names within the machine.
const TEXTS: &[&str] = &[
    "bus", "fw_name", "label", "model", "name", "osk", "product", "serial", "vendor", "ver", "version", "wwn",
];

pub(super) fn render(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    // Said by whoever calls this, with its reason: what ties the machine to its host.
    if host_device(argument).is_some() {
        return Ok(vec![argument.clone()]);
    }
    let device = argument.properties();
    let driver = device.get("driver").unwrap_or_default();
    if !known::is_guests_device(&driver) {
        return renderer.unknown(
            argument,
            format!("device {driver} is not known to be nothing but what the guest sees of it"),
        );
    }
    // ROMs are looked for by whoever calls this.
    let known: Vec<&str> = TEXTS.iter().copied().chain(["romfile"]).collect();
    renderer.names_no_file(argument, &device, &known)?;
    Ok(vec![argument.clone()])
}
