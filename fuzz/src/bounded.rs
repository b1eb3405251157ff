//! Memory that nobody can ask for without a limit.

use std::alloc::{GlobalAlloc, Layout, System};

/// The most that any target may allocate in one piece: twice the longest message that anything takes in, 32 MiB of NBD.
pub const LARGEST: usize = 64 << 20;

/// The system's allocator, which ends the program at an allocation beyond [`LARGEST`]: a length was believed that a peer made up.
#[derive(Debug)]
pub struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

fn check(size: usize) {
    if size > LARGEST {
        // Nothing that allocates: this is the allocator.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"an allocation without bound\n");
        std::process::abort();
    }
}

// SAFETY: everything is the system allocator's work; a comparison is all that is added.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check(size);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
