//! What a KVM guest writes is found like what its process writes. The smallest guest there is: real mode, no
//! operating system, it increments one byte per run.

use crate::tracee::{PAGE, Ram, Tracee, map};
use dirty_tracker::{DescriptorSource, Scan, Tracker};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;

const PAGES: u64 = 256;
const CODE_PAGE: u64 = 1;
/// Real mode reaches 64 KiB by a 16-bit address: the pages after the code.
const WRITABLE: std::ops::Range<u64> = 2..16;
/// `inc byte [bx]; out 0x10, al; jmp` back.
const CODE: [u8; 6] = [0xfe, 0x07, 0xe6, 0x10, 0xeb, 0xfa];

/// The role: at every line of input, a page number, the guest increments the first byte of that page.
pub(crate) fn guest(path: &Path) {
    let vm = match Kvm::new().and_then(|kvm| kvm.create_vm()) {
        Ok(vm) => vm,
        Err(error) => {
            println!("cannot create a VM: {error}");
            return;
        }
    };
    let memory = map(path);
    let code_at = (CODE_PAGE * PAGE) as usize;
    memory[code_at..code_at + CODE.len()].copy_from_slice(&CODE);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr().addr() as u64,
    };
    // SAFETY: the mapping is that long, and is never unmapped.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut segments = vcpu.get_sregs().unwrap();
    for segment in [&mut segments.cs, &mut segments.ds] {
        segment.base = 0;
        segment.selector = 0;
    }
    vcpu.set_sregs(&segments).unwrap();
    println!("ready");
    for line in std::io::stdin().lines() {
        let page: u64 = line.unwrap().parse().unwrap();
        let mut registers = vcpu.get_regs().unwrap();
        registers.rip = CODE_PAGE * PAGE;
        registers.rbx = page * PAGE;
        registers.rflags = 2;
        vcpu.set_regs(&registers).unwrap();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => break,
                // The tracker stopping this thread interrupts the run, as any signal does.
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("{other:?}"),
            }
        }
        println!("done");
    }
}

#[test]
fn every_page_a_kvm_guest_writes_is_found_and_no_other() {
    let ram = Ram::new(PAGES);
    let mut tracee = Tracee::start("kvm", &[ram.path().to_str().unwrap()]);
    let first = tracee.line();
    if first != "ready" {
        eprintln!("SKIPPED every_page_a_kvm_guest_writes_is_found_and_no_other: {first}");
        return;
    }
    let range = tracee.range_of(&ram.path());
    let mut tracker = Tracker::attach(tracee.pid(), &[range], DescriptorSource::Injected).unwrap();
    let mut regions = Vec::new();
    tracker.scan(Scan::OneStep, &mut regions).unwrap();
    let mut counts = vec![0_u8; WRITABLE.end as usize];
    let writes = prop::collection::vec(WRITABLE, 0..24);
    let scans = prop_oneof![Just(Scan::OneStep), Just(Scan::TwoStep)];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    });
    let shared = std::cell::RefCell::new((&mut tracee, &mut tracker, &mut regions, &mut counts));
    runner
        .run(&(writes, scans), |(writes, scan)| {
            let (tracee, tracker, regions, counts) = &mut *shared.borrow_mut();
            for page in &writes {
                assert_eq!(tracee.ask(&page.to_string()), "done");
                counts[*page as usize] = counts[*page as usize].wrapping_add(1);
            }
            regions.clear();
            tracker.scan(scan, regions).unwrap();
            let found: BTreeSet<u64> =
                regions.iter().flat_map(|region| region.pages(PAGE)).map(|offset| offset / PAGE).collect();
            prop_assert_eq!(found, writes.into_iter().collect::<BTreeSet<_>>());
            Ok(())
        })
        .unwrap();
    // The guest did run: memory holds what it counted.
    for page in WRITABLE {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&ram.file, &mut byte, page * PAGE).unwrap();
        assert_eq!(byte[0], counts[page as usize], "page {page}");
    }
    tracker.detach().unwrap();
}
