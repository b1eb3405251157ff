//! What is different on every processor: the registers of a system call. The only such file.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "dirty-tracker knows the system call registers of x86_64 Linux only; another architecture needs its \
     own src/inject/registers.rs"
);

/// The registers of a thread, as `PTRACE_GETREGS` gives them.
pub(super) type Registers = libc::user_regs_struct;

/// The `syscall` instruction.
pub(super) const INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// The selector of 64-bit user code (`__USER_CS`).
const CODE_SEGMENT_64: u64 = 0x33;

/// Whether the thread runs 64-bit code, which alone knows `INSTRUCTION` and our call numbers.
pub(super) fn runs_64_bit(registers: &Registers) -> bool {
    registers.cs == CODE_SEGMENT_64
}

/// Where the thread is in its code.
pub(super) fn position(registers: &Registers) -> u64 {
    registers.rip
}

/// `registers` changed such that the thread, standing at `instruction`, makes the call.
///
/// `orig_rax` is -1, "not in a system call": else the kernel would take the thread for one whose
/// interrupted call is to be started again, and set it back by an instruction.
pub(super) fn calling(
    registers: &Registers,
    instruction: u64,
    number: i64,
    arguments: [u64; 3],
) -> Registers {
    Registers {
        rip: instruction,
        rax: number.cast_unsigned(),
        orig_rax: u64::MAX,
        rdi: arguments[0],
        rsi: arguments[1],
        rdx: arguments[2],
        ..*registers
    }
}

/// What the call returned: a result, or the error as a negative number.
pub(super) fn result(registers: &Registers) -> i64 {
    registers.rax.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_the_call_is_kept() {
        // SAFETY: the structure is integers only, for which all zeros is a value.
        let mut before: Registers = unsafe { std::mem::zeroed() };
        before.rsp = 7;
        before.r11 = 8;
        before.rcx = 9;
        let after = calling(&before, 0x1000, 3, [1, 2, 3]);
        assert_eq!((after.rip, after.rax, after.rdi, after.rsi, after.rdx), (0x1000, 3, 1, 2, 3));
        assert_eq!((after.rsp, after.r11, after.rcx, after.orig_rax), (7, 8, 9, u64::MAX));
        assert_eq!(result(&Registers { rax: (-38_i64).cast_unsigned(), ..before }), -38);
    }
}
