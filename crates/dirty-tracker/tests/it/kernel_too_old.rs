//! A kernel without the features says which one. Emulated by a seccomp filter that answers like one.

use crate::tracee::Tracee;
use dirty_tracker::{DescriptorSource, Tracker, kernel_support};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use std::error::Error;

const PAGEMAP_SCAN: u64 = 0xC060_6610;

/// The role: lives on an older kernel, and says what the crate says there. Arguments: which feature is missing.
pub(crate) fn on_old_kernel(arguments: &[&str]) {
    let (call, rules, error) = match arguments[0] {
        "userfaultfd" => (libc::SYS_userfaultfd, vec![], libc::ENOSYS),
        "pagemap-scan" => {
            let request =
                SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, PAGEMAP_SCAN).unwrap();
            (libc::SYS_ioctl, vec![SeccompRule::new(vec![request]).unwrap()], libc::ENOTTY)
        }
        other => panic!("{other}"),
    };
    let filter = SeccompFilter::new(
        [(call, rules)].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.cast_unsigned()),
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
    println!("{}", in_full(&kernel_support().unwrap_err()));
    let page = 0..4096;
    let source = DescriptorSource::Injected;
    let error = Tracker::attach(std::process::id(), std::slice::from_ref(&page), source).unwrap_err();
    println!("{}", in_full(&error));
}

/// An error and what lies under it, as a program shows it.
fn in_full(error: &dyn Error) -> String {
    let under = error.source().map(|source| format!(": {}", in_full(source)));
    format!("{error}{}", under.unwrap_or_default())
}

#[test]
fn this_kernel_will_do() {
    // All other tests need it. So where this fails, its message says why they do.
    if let Err(error) = kernel_support() {
        panic!("{}", in_full(&error));
    }
}

#[test]
fn a_kernel_without_a_feature_is_told_by_its_name() {
    for (missing, named, answer) in [
        ("userfaultfd", "userfaultfd(UFFD_USER_MODE_ONLY)", "Function not implemented"),
        ("pagemap-scan", "ioctl PAGEMAP_SCAN", "Inappropriate ioctl for device"),
    ] {
        let mut process = Tracee::start("old-kernel", &[missing]);
        let alone = process.line();
        let attaching = process.line();
        assert!(process.finish().success());
        assert!(alone.contains(named) && alone.contains("Linux") && alone.contains(answer), "{alone}");
        assert_eq!(attaching, format!("dirty pages cannot be tracked on this host: {alone}"));
    }
}
