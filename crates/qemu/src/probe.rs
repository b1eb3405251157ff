//! Which accelerator works here: found out by running a guest, because the presence of /dev/kvm says little (nested
//! virtualisation without some feature starts QEMU and then stops at the guest's first steps).

use std::{io, path::Path, process::Stdio, time::Duration};

use tokio::{io::AsyncReadExt, process::Command, time::timeout};

/// A guest that shows whether an accelerator works.
#[derive(Debug, Clone, Copy)]
pub struct ProbeGuest<'a> {
    /// A Linux kernel.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initrd: &'a Path,
    /// What to add to the kernel command line `console=ttyS0 panic=-1`.
    pub append: &'a str,
    /// What it writes to its first serial port once it runs.
    pub marker: &'a str,
}

/// Runs a guest with an accelerator until it writes its marker to its first serial port. Whether it did so in time;
/// a QEMU that does not start, or a guest that hangs or crashes, counts as no. `options` come first on the command
/// line (such as `-L`).
///
/// # Errors
/// Only if the binary cannot be run at all.
pub async fn accelerator_works(
    binary: &Path,
    options: &[String],
    accelerator: &str,
    guest: &ProbeGuest<'_>,
    deadline: Duration,
) -> io::Result<bool> {
    let ProbeGuest { kernel, initrd, append, marker } = *guest;
    let mut command = Command::new(binary);
    command
        .args(options)
        .args([
            "-accel",
            accelerator,
            "-m",
            "256",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        .arg(format!("console=ttyS0 panic=-1 {append}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = command.spawn()?;
    let Some(mut output) = child.stdout.take() else { return Ok(false) };
    let found = timeout(deadline, async {
        let mut seen = Vec::new();
        loop {
            match output.read_buf(&mut seen).await {
                Ok(0) | Err(_) => return false,
                Ok(_) if contains(&seen, marker.as_bytes()) => return true,
                Ok(_) => {}
            }
        }
    })
    .await
    .unwrap_or(false);
    child.kill().await?;
    Ok(found)
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    part.is_empty() || text.windows(part.len()).any(|window| window == part)
}
