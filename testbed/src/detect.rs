//! What runs a guest's CPUs here: found out by booting one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::accelerator::Accelerator;
use crate::guest_spec::GuestSpec;
use crate::programs::{Programs, target};
use crate::running::RunningGuest;
use crate::{TestbedError, name};

/// How long a guest may take to boot under KVM: it takes less than two seconds where KVM works.
const KVM_TIMEOUT: Duration = Duration::from_secs(15);

impl GuestSpec {
    /// A guest of 512 MiB that fills 256 of them and writes nothing, without network, its console appended to `serial`, run by the best
    /// that there is here.
    ///
    /// # Errors
    /// [`TestbedError::NotSetUp`] where the guest's images are missing.
    pub fn new(serial: impl Into<PathBuf>) -> Result<Self, TestbedError> {
        let qemu = Programs::find().qemu;
        let accelerator = Accelerator::detect(&qemu)?;
        Self::accelerated(qemu, accelerator, serial)
    }
}

impl Accelerator {
    /// KVM if the test guest really boots with it, else TCG.
    ///
    /// That /dev/kvm is there says little: nested or restricted, it may run nothing larger than a few instructions. The answer is
    /// remembered under `target/` until the machine reboots.
    ///
    /// # Errors
    /// [`TestbedError::NotSetUp`] where there is no guest to try.
    pub fn detect(qemu: &Path) -> Result<Self, TestbedError> {
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let memory = memory();
        if let Some(known) = fs::read_to_string(&memory).ok().and_then(|text| Self::named(text.trim())) {
            return Ok(known);
        }
        let found = if boots_with_kvm(qemu)? { Self::Kvm } else { Self::Tcg };
        // Not being able to remember costs time, not truth.
        let _ = fs::create_dir_all(target()).and_then(|()| fs::write(&memory, found.name()));
        Ok(found)
    }
}

/// The file that remembers, named after this boot of this machine: a target directory may travel.
fn memory() -> PathBuf {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    target().join(format!("accelerator-{}", boot.trim()))
}

fn boots_with_kvm(qemu: &Path) -> Result<bool, TestbedError> {
    let serial = std::env::temp_dir().join(name::next());
    let spec = GuestSpec {
        fill_mib: 16,
        memory_mib: 256,
        no_reboot: true,
        ..GuestSpec::accelerated(qemu.to_owned(), Accelerator::Kvm, &serial)?
    };
    let line = spec.command_line();
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).stderr(std::process::Stdio::null());
    let booted = RunningGuest::start(command, &spec.qemu, &spec.serial)?.wait_ready(KVM_TIMEOUT).is_ok();
    let _ = fs::remove_file(serial);
    Ok(booted)
}
