//! Builds the guest's image: `guest-image KERNEL_PACKAGE INIT OUTPUT`.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [kernel_package, init, output] = arguments.as_slice() else {
        eprintln!("usage: guest-image KERNEL_PACKAGE INIT OUTPUT");
        return ExitCode::from(2);
    };
    match guest::image::build(kernel_package, init, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            let mut line = String::from("guest-image");
            while let Some(error) = cause {
                line.push_str(&format!(": {error}"));
                cause = error.source();
            }
            eprintln!("{line}");
            ExitCode::FAILURE
        }
    }
}
