//! Every option of QEMU's that is known, and what becomes of it.

use std::path::Path;

use super::permissions::Remedy;
use super::renderer::{Outcome, Renderer};
use super::{chardevs, devices, displays, networks, objects, storage};
use crate::argument::Argument;
use crate::disks::IMAGE_OPTIONS;
use crate::known::SHORT_CHARDEVS;

/// Flags that say something of the machine, and of nothing else.
const FLAGS: &[&str] = &[
    "S",
    "alt-grab",
    "async-teardown",
    "ctrl-grab",
    "enable-fips",
    "enable-kvm",
    "full-screen",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-kvm-irqchip",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "nouserconfig",
    "old-param",
    "only-migratable",
    "portrait",
    "singlestep",
    "usb",
    "win2k-hack",
];

/// Options whose value is a text that is not looked up anywhere.
const TEXTS: &[&str] = &["append", "name", "uuid", "prom-env"];

/// Options whose value names no file.
const PLAIN: &[&str] = &[
    "action",
    "compat",
    "cpu",
    "echr",
    "g",
    "global",
    // A number of Proxmox's.
    "id",
    // Of no effect where no drive is one.
    "iscsi",
    "k",
    "m",
    "mon",
    "msg",
    "numa",
    "overcommit",
    "rotate",
    "rtc",
    "seed",
    "smp",
    "soundhw",
    "tb-size",
    "vga",
    "watchdog",
    "watchdog-action",
];

/// Options with files that must be there, and that whoever calls this looks for: [`crate::Spec::files`].
const FILES: &[&str] = &["bios", "dtb", "kernel", "option-rom", "shim", "smbios", "fw_cfg", "acpitable"];

/// What belongs to the process and not to the machine. It is another process here, and its host's operator says what that is like.
const OF_THE_PROCESS: &[&str] = &[
    "D",
    "chroot",
    "curses",
    "d",
    "daemonize",
    "dfilter",
    "enable-sync-profile",
    "loadvm",
    "run-with",
    "runas",
    "sandbox",
    "sdl",
];

/// Kinds of `-usbdevice` that are nothing of the host's.
const USB_DEVICES: &[&str] = &["keyboard", "mouse", "tablet", "wacom-tablet"];

/// Kinds of `-accel`, and of `-machine accel=`.
const ACCELERATORS: &[&str] = &["kvm", "tcg"];

pub(super) fn render(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let name = argument.name();
    if argument.is_image() || IMAGE_OPTIONS.contains(&name) {
        return storage::image(renderer, argument);
    }
    if name == "smbios" {
        // QEMU reads each.
        for (_, path) in argument.properties().texts().into_iter().filter(|(key, _)| key == "path") {
            renderer.may_read(argument, Path::new(&path))?;
        }
    }
    if FLAGS.contains(&name) || TEXTS.contains(&name) || FILES.contains(&name) {
        return Ok(vec![argument.clone()]);
    }
    if PLAIN.contains(&name) {
        return plain(renderer, argument);
    }
    if OF_THE_PROCESS.contains(&name) {
        return Ok(Vec::new());
    }
    match name {
        // Ours; nothing else that waits for a migration gets here.
        "incoming" if argument.value() == Some("defer") => Ok(vec![argument.clone()]),
        "pidfile" => renderer.pid_file(argument),
        // All RAM is put where this host has it.
        "mem-path" => Ok(Vec::new()),
        "machine" | "accel" => machine(renderer, argument),
        "initrd" => initrd(renderer, argument),
        "boot" => boot(renderer, argument),
        "L" => {
            renderer.may_read(argument, Path::new(argument.value().unwrap_or_default()))?;
            Ok(vec![argument.clone()])
        }
        "pflash" | "drive" | "blockdev" => storage::drive(renderer, argument),
        "device" => devices::render(renderer, argument),
        "object" => objects::render(renderer, argument),
        "chardev" => chardevs::long(renderer, argument),
        name if SHORT_CHARDEVS.contains(&name) => chardevs::short(renderer, argument),
        "gdb" if argument.value() == Some("none") => Ok(vec![argument.clone()]),
        "netdev" | "nic" | "net" => networks::render(renderer, argument),
        "vnc" => displays::vnc(renderer, argument),
        "spice" => displays::spice(renderer, argument),
        "display" => displays::display(renderer, argument),
        "audiodev" | "audio" => displays::audio(renderer, argument),
        "usbdevice" => match argument.value().filter(|value| USB_DEVICES.contains(value)) {
            Some(_) => Ok(vec![argument.clone()]),
            None => renderer.unknown(argument, "it may be a device or a file of the host"),
        },
        "set" => renderer.refuse(
            argument,
            "it changes another option in a way that cannot be followed",
            Remedy::Start("write the value into the option itself"),
        ),
        // Said by whoever calls this, with their reasons: what ties the machine to its host.
        "fsdev" | "tpmdev" | "virtfs" | "xen-attach" => Ok(vec![argument.clone()]),
        _ => renderer.unknown(argument, "it is not known to be harmless"),
    }
}

fn plain(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    if argument.value().is_some_and(|value| value.contains('/')) {
        return renderer.unknown(argument, "it names a file of the host");
    }
    Ok(vec![argument.clone()])
}

fn machine(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let properties = argument.properties();
    let listed = properties.get("accel").unwrap_or_default();
    if let Some(odd) = listed.split(':').find(|kind| !kind.is_empty() && !ACCELERATORS.contains(kind)) {
        return renderer.unknown(argument, format!("accelerator {odd} is neither kvm nor tcg"));
    }
    // Files are looked for by whoever calls this; the kernel's command line is a text.
    renderer.names_no_file(
        argument,
        &properties,
        &["append", "dtb", "firmware", "initrd", "kernel", "shim"],
    )?;
    Ok(vec![argument.clone()])
}

/// A picture for the guest's firmware to show is what the guest can read.
fn boot(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let boot = argument.properties();
    if let Some(splash) = boot.get("splash").filter(|splash| splash.contains('/')) {
        renderer.may_read(argument, Path::new(&splash))?;
    }
    renderer.names_no_file(argument, &boot, &["splash"])?;
    Ok(vec![argument.clone()])
}

/// Several modules can be given with commas in between, each with a command line after a space: which files those are, only QEMU knows.
fn initrd(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    if argument.value().is_some_and(|value| value.contains(',')) {
        return renderer.unknown(argument, "it names several files");
    }
    Ok(vec![argument.clone()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names;

    #[test]
    fn what_is_let_through_as_a_flag_is_read_as_one_and_what_has_a_value_is_not() {
        for flag in FLAGS {
            assert!(names::FLAGS.contains(flag), "-{flag} would take the next word for its value");
        }
        for option in [TEXTS, PLAIN, FILES].concat() {
            assert!(!names::FLAGS.contains(&option), "-{option} would leave its value to be an image");
        }
    }
}
