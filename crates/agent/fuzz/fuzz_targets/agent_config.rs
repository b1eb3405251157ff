//! A configuration: what is taken is whole and within bounds, and an error names the file.

#![no_main]

use fuzzing as _;

use std::path::Path;

use agent::Config;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(Path::new("/etc/vmirror/agent.toml"), text) {
        Ok(config) => {
            let Config { api, state_dir, run_dir, ram_dir, tls, allow, hooks, .. } = &config;
            let paths = [api, state_dir, run_dir, ram_dir, &tls.ca, &tls.cert, &tls.key];
            let listed = allow.disk_dirs.iter().chain(&allow.qemu).chain(&hooks.directory);
            assert!(paths.into_iter().chain(listed).all(|path| path.is_absolute()), "{config:?}");
            assert!(!config.name.is_empty() && config.name.len() <= 64);
            assert!(config.bandwidth.is_none_or(|rate| rate.get() >= 65536) && config.forward_port > 0);
        }
        Err(error) => {
            let said = error.to_string();
            assert!(said.starts_with("/etc/vmirror/agent.toml:"), "{said}");
        }
    }
});
