//! What an init asks of the kernel, and all of the guest's unsafe code.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;

pub mod container;

/// Mounts a file system that has no device.
///
/// # Errors
/// As `mount(2)`; a second mount at the same place is none.
pub fn mount(kind: &CStr, at: &CStr) -> io::Result<()> {
    match mount_with(kind, at, kind, 0, c"") {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        other => other,
    }
}

/// Mounts a file system from a source, with flags (`libc::MS_…`) and the options of its kind.
///
/// # Errors
/// As `mount(2)`.
pub fn mount_with(
    source: &CStr,
    at: &CStr,
    kind: &CStr,
    flags: libc::c_ulong,
    options: &CStr,
) -> io::Result<()> {
    // SAFETY: all pointers are to terminated strings that outlive the call.
    check(unsafe { libc::mount(source.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) })
}

/// Unmounts what is mounted there, all of it written to its disk.
///
/// # Errors
/// As `umount(2)`.
pub fn unmount(at: &CStr) -> io::Result<()> {
    // SAFETY: the path is a terminated string that outlives the call.
    check(unsafe { libc::umount2(at.as_ptr(), 0) })
}

/// Loads a kernel module from a file; one that is there already is no error.
///
/// # Errors
/// As `finit_module(2)`.
pub fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the duration of the call, and the parameter string is terminated.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match check(result as libc::c_int) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Zeroed memory that begins at a page boundary and is never given back.
///
/// # Errors
/// Where the kernel has no such room.
pub fn map(bytes: usize) -> io::Result<&'static mut [u8]> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has that length, is zeroed, belongs to nobody else and is never unmapped.
    Ok(unsafe { std::slice::from_raw_parts_mut(address.cast(), bytes) })
}

/// Lets the calling thread run only when the others leave time.
///
/// # Errors
/// As `setpriority(2)`.
pub fn be_nice() -> io::Result<()> {
    // SAFETY: no pointers; on Linux the id 0 stands for the calling thread.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) })
}

/// Makes a terminal pass bytes as they are: no echo, no translation.
///
/// # Errors
/// Where the file is no terminal.
pub fn make_raw(terminal: &File) -> io::Result<()> {
    // SAFETY: a zeroed termios is a valid value of that plain structure.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the structure is ours to write.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings) })?;
    // SAFETY: the structure is initialised.
    unsafe { libc::cfmakeraw(&raw mut settings) };
    // SAFETY: the descriptor is open and the structure initialised.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const settings) })
}

/// Gives a socket room for that many bytes not yet received, beyond the limit for ordinary programs.
///
/// # Errors
/// Where the caller has no CAP_NET_ADMIN.
pub fn widen_receive_buffer(socket: &impl AsRawFd, bytes: libc::c_int) -> io::Result<()> {
    let length = size_of_val(&bytes) as libc::socklen_t;
    let value = (&raw const bytes).cast();
    // SAFETY: the option's value is one int, which outlives the call.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value, length)
    })
}

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Switched off.
    PowerOff,
    /// Restarted.
    Reboot,
    /// The kernel crashes.
    Panic,
}

/// Ends the machine at once.
///
/// # Errors
/// Where the kernel refuses: without CAP_SYS_BOOT.
pub fn end(how: End) -> io::Result<()> {
    let command = match how {
        End::Panic => return fs::write("/proc/sysrq-trigger", "c"),
        End::PowerOff => libc::RB_POWER_OFF,
        End::Reboot => libc::RB_AUTOBOOT,
    };
    // SAFETY: no pointers; there is no disk state to lose.
    check(unsafe { libc::reboot(command) })
}

/// Brings an IPv4 interface up with that address, network prefix and default route.
///
/// # Errors
/// As the `netdevice(7)` calls.
pub fn configure_interface(
    name: &str,
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let netmask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    set_address(&socket, libc::SIOCSIFADDR, name, address)?;
    set_address(&socket, libc::SIOCSIFNETMASK, name, Ipv4Addr::from(netmask))?;
    bring_up(&socket, name)?;
    gateway.map_or(Ok(()), |gateway| add_default_route(&socket, gateway))
}

/// Brings an interface up as it is.
///
/// # Errors
/// As the `netdevice(7)` calls.
pub fn bring_up(socket: &impl AsRawFd, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request names an interface and carries the flags that SIOCSIFFLAGS reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

fn set_address(socket: &impl AsRawFd, call: libc::Ioctl, name: &str, address: Ipv4Addr) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    // SAFETY: the request names an interface and carries the IPv4 address that these calls read.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), call, &raw const request) })
}

fn add_default_route(socket: &impl AsRawFd, gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: a zeroed rtentry is a valid value: null device, no flags.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the route is a complete rtentry.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: a zeroed ifreq is a valid value of that plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = CString::new(name)?;
    let bytes = name.as_bytes_with_nul();
    if bytes.len() > request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

/// As `struct sockaddr`: family, then `struct sockaddr_in`'s port (two bytes) and address (four).
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_memory_is_zero_and_page_aligned() {
        let memory = map(3 * 4096).unwrap();
        assert_eq!(memory.as_ptr() as usize % 4096, 0);
        assert!(memory.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn addresses_stand_where_the_kernel_reads_them() {
        let address = socket_address(Ipv4Addr::new(10, 88, 0, 200));
        assert_eq!(i32::from(address.sa_family), libc::AF_INET);
        assert_eq!(
            address.sa_data[2..6].iter().map(|byte| *byte as u8).collect::<Vec<_>>(),
            [10, 88, 0, 200]
        );
    }

    #[test]
    fn interface_names_that_do_not_fit_are_refused() {
        assert!(request("eth0").is_ok());
        assert!(request("sixteen-letters!").is_err());
    }
}
