//! Objects: memory, threads, secrets, and what devices are connected to.

use std::path::Path;

use super::renderer::{Outcome, Renderer};
use crate::argument::Argument;
use crate::devices::host_device;
use crate::known;

/// Where random numbers may come from.
const RANDOM: &[&str] = &["/dev/random", "/dev/urandom", "/dev/hwrng"];

pub(super) fn render(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    // Said by whoever calls this, with its reason: what ties the machine to its host.
    if host_device(argument).is_some() {
        return Ok(vec![argument.clone()]);
    }
    let object = argument.properties();
    let kind = object.get("qom-type").unwrap_or_default();
    if !known::OBJECTS.contains(&kind.as_str()) {
        return renderer
            .unknown(argument, format!("object {kind} is not known to be nothing outside of QEMU"));
    }
    let known: &[&str] = match kind.as_str() {
        "memory-backend-file" => &["mem-path"],
        "rng-random" => {
            let source = object.get("filename").filter(|path| !RANDOM.contains(&path.as_str()));
            if let Some(path) = source {
                return renderer.unknown(argument, format!("{path} is none of {}", RANDOM.join(", ")));
            }
            &["filename"]
        }
        "secret" => {
            if let Some(path) = object.get("file") {
                renderer.may_read(argument, Path::new(&path))?;
            }
            // Base64 has slashes.
            &["file", "data", "iv"]
        }
        "tls-creds-anon" | "tls-creds-psk" | "tls-creds-x509" => {
            if let Some(path) = object.get("dir") {
                renderer.may_read(argument, Path::new(&path))?;
            }
            &["dir", "priority"]
        }
        "authz-list" | "authz-simple" => &["identity"],
        _ => &[],
    };
    renderer.names_no_file(argument, &object, known)?;
    Ok(vec![argument.clone()])
}
