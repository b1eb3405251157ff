//! `make bench`: vmirror and QEMU's own migration, side by side.

fn main() -> std::process::ExitCode {
    bench::compare()
}
