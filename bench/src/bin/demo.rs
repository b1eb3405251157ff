//! `make demo`: a real guest moves to another host and back while its client watches, measured beside QEMU's own migration.

fn main() -> std::process::ExitCode {
    bench::demo()
}
