//! `vmirror cert`: certificates for the link.

use std::path::PathBuf;

use agent::error::chain;
use link::certificates::{self, CertificatesError, Files};
use serde::Serialize;

use crate::cli::Cert;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// What was made.
#[derive(Debug, Serialize)]
struct Made {
    certificate: PathBuf,
    key: PathBuf,
}

pub(super) fn run(command: &Cert, output: &Output) -> Result<Exit, Failure> {
    let made = match command {
        Cert::Init { dir } => certificates::init(dir),
        Cert::Issue { dir, name, addresses } => certificates::issue(dir, name, addresses),
    };
    let Files { certificate, key } = made.map_err(|error: CertificatesError| {
        Failure::refused("certificates", chain(&error), "see `vmirror cert --help`")
    })?;
    output.done(&Made { certificate, key }, |made| {
        let advice = match command {
            Cert::Init { .. } => {
                "keep the key where only you can read it: whoever has it can pose as any agent"
            }
            Cert::Issue { .. } => "these, and ca.pem, go to that agent; the key to nobody else",
        };
        format!("{}\n{}\n{advice}", made.certificate.display(), made.key.display())
    });
    Ok(Exit::Done)
}
