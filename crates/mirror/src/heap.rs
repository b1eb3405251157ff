//! The heap: what a mirror has taken goes back to the system when it is over.
//!
//! A mirror takes some 30 MiB in buffers of many sizes, on many threads. glibc keeps what is freed of it below other allocations in the
//! thread's arena, and an agent that has had twenty mirrors at once would keep that for ever.

/// Gives memory that is free back to the system. Takes milliseconds, and nothing waits for it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: has no preconditions; glibc locks one arena after the other.
    unsafe {
        libc::malloc_trim(0);
    }
}
