//! Diverting what is sent to a tap to another interface.
//!
//! By a small BPF program at the tap's way out (TCX, Linux 6.6), which hands each frame to the interface whose number is in a map, or
//! lets it pass. A change of that number takes effect between two frames, and takes no time; to attach the program takes tens of
//! milliseconds, as the kernel waits for everybody who may be running another one. It ends with the descriptor: whoever is killed
//! diverts nothing any more. A filter of traffic control would do the same, but its place at the interface (`clsact`) cannot be made or
//! removed without a moment in which every frame is lost (seen: two or three of 5,000 per second).

use std::io;
use std::os::fd::OwnedFd;

/// What is sent to a tap goes elsewhere, between [`begin`](Self::begin) and [`end`](Self::end).
#[derive(Debug)]
pub struct Diversion {
    to: u32,
    switch: OwnedFd,
    _link: OwnedFd,
}

impl Diversion {
    /// Prepares it, by the indices of both interfaces. Blocks for some tens of milliseconds.
    ///
    /// # Errors
    /// EPERM without `CAP_BPF` and `CAP_NET_ADMIN`; EINVAL of a kernel older than 6.6; ENODEV where the tap is gone.
    pub fn prepare(tap: u32, to: u32) -> io::Result<Diversion> {
        let switch = bpf::map()?;
        let program = bpf::load(&bpf::redirect(&switch))?;
        Ok(Diversion { to, switch, _link: bpf::attach(&program, tap)? })
    }

    /// From the next frame on.
    ///
    /// # Errors
    /// None is known.
    pub fn begin(&self) -> io::Result<()> {
        bpf::set(&self.switch, self.to)
    }

    /// Not any more, from the next frame on. To drop it blocks as [`prepare`](Self::prepare) does.
    ///
    /// # Errors
    /// None is known.
    pub fn end(&self) -> io::Result<()> {
        bpf::set(&self.switch, 0)
    }
}

/// The few parts of bpf(2) that are needed, as in linux/bpf.h.
mod bpf {
    use std::ffi::CStr;
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

    const MAP_CREATE: libc::c_int = 0;
    const MAP_UPDATE_ELEM: libc::c_int = 2;
    const MAP_TYPE_ARRAY: u32 = 2;
    const PROG_LOAD: libc::c_int = 5;
    const LINK_CREATE: libc::c_int = 28;
    const PROG_TYPE_SCHED_CLS: u32 = 3;
    const TCX_EGRESS: u32 = 47;
    /// Before all others: theirs might let a frame pass to a guest that is not there.
    const BEFORE: u32 = 1 << 3;
    /// The helper `bpf_redirect`.
    const REDIRECT: i32 = 23;
    const LICENSE: &CStr = c"Dual MIT/GPL";

    /// `struct bpf_insn`.
    #[repr(C)]
    pub(super) struct Instruction {
        code: u8,
        registers: u8,
        offset: i16,
        immediate: i32,
    }

    /// `map[0] == 0 ? TCX_NEXT : bpf_redirect(map[0], 0)`.
    pub(super) fn redirect(map: &OwnedFd) -> [Instruction; 9] {
        let instruction =
            |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
        // The lower half of `registers` is the destination, the upper the source.
        [
            // r1 = &map[0], in two parts, the first of which has the map's descriptor (`BPF_PSEUDO_MAP_VALUE`).
            instruction(0x18, 0x21, 0, map.as_raw_fd()),
            instruction(0, 0, 0, 0),
            // r1 = *(u32 *) r1
            instruction(0x61, 0x11, 0, 0),
            // r0 = TCX_NEXT
            instruction(0xb7, 0, 0, -1),
            // if r1 == 0 goto exit
            instruction(0x15, 1, 3, 0),
            // r2 = 0
            instruction(0xb7, 2, 0, 0),
            // r0 = bpf_redirect(r1, r2)
            instruction(0x85, 0, 0, REDIRECT),
            // goto exit
            instruction(0x05, 0, 0, 0),
            // exit
            instruction(0x95, 0, 0, 0),
        ]
    }

    /// `union bpf_attr` of `BPF_PROG_LOAD`, as far as it is used.
    #[repr(C)]
    struct Load {
        kind: u32,
        instructions: u32,
        at: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }

    /// The same of `BPF_MAP_CREATE`.
    #[repr(C)]
    struct Map {
        kind: u32,
        key: u32,
        value: u32,
        entries: u32,
    }

    /// The same of `BPF_MAP_UPDATE_ELEM`.
    #[repr(C)]
    struct Update {
        map: u32,
        unused: u32,
        key: u64,
        value: u64,
        flags: u64,
    }

    /// The same of `BPF_LINK_CREATE`.
    #[repr(C)]
    struct Link {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
        relative: u32,
        unused: u32,
        revision: u64,
    }

    /// An array of one number, 0 at first.
    pub(super) fn map() -> io::Result<OwnedFd> {
        let map = Map { kind: MAP_TYPE_ARRAY, key: 4, value: 4, entries: 1 };
        // SAFETY: the kernel reads the structure, which is laid out as it expects and outlives the call. It writes nothing.
        let made = unsafe { call(MAP_CREATE, &map) }?;
        // SAFETY: the kernel has just made it, for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(made) })
    }

    /// Changes the number.
    pub(super) fn set(map: &OwnedFd, number: u32) -> io::Result<()> {
        let key: u32 = 0;
        let map = u32::try_from(map.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let at = |number: &u32| std::ptr::from_ref(number).expose_provenance() as u64;
        let update = Update { map, unused: 0, key: at(&key), value: at(&number), flags: 0 };
        // SAFETY: the kernel reads the structure, which is laid out as it expects, and key and value behind its pointers, of the sizes
        // that the map was made with. All outlive the call. It writes nothing.
        unsafe { call(MAP_UPDATE_ELEM, &update) }.map(drop)
    }

    pub(super) fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
        let mut name = [0; 16];
        name[..7].copy_from_slice(b"vmirror");
        let load = Load {
            kind: PROG_TYPE_SCHED_CLS,
            instructions: program.len() as u32,
            at: program.as_ptr().expose_provenance() as u64,
            license: LICENSE.as_ptr().expose_provenance() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
            interface: 0,
            attach_type: TCX_EGRESS,
        };
        // SAFETY: the kernel reads the structure, which is laid out as it expects, and the program and the license behind its
        // pointers, all of which outlive the call. It writes nothing.
        let made = unsafe { call(PROG_LOAD, &load) }?;
        // SAFETY: the kernel has just made it, for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(made) })
    }

    pub(super) fn attach(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
        let program = u32::try_from(program.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let link = Link {
            program,
            interface,
            attach_type: TCX_EGRESS,
            flags: BEFORE,
            relative: 0,
            unused: 0,
            revision: 0,
        };
        // SAFETY: the kernel reads the structure, which is laid out as it expects and outlives the call. It writes nothing.
        let made = unsafe { call(LINK_CREATE, &link) }?;
        // SAFETY: the kernel has just made it, for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(made) })
    }

    /// # Safety
    /// What the command reads behind pointers in the attributes must be there.
    unsafe fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
        // SAFETY: by the caller.
        let answer =
            unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
        match RawFd::try_from(answer) {
            Ok(answer) if answer >= 0 => Ok(answer),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
