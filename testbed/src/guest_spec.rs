//! The QEMU command line of a test guest.

mod test_disk;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

pub use guest::disk::{Io, Role, Work};
pub use guest::page::Content;
pub use guest::workload::Pattern;

use guest::userland::Changes;

pub use test_disk::{Aio, Cache, Syntax, TestDisk};

use crate::TestbedError;
use crate::accelerator::Accelerator;
use crate::addresses::{self, GUEST_PREFIX};
use crate::programs;

/// A test guest to be: change the fields that matter, leave the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// The QEMU to run it with.
    pub qemu: PathBuf,
    /// What runs its CPUs.
    pub accelerator: Accelerator,
    /// The machine type, with options if need be.
    pub machine: String,
    /// The CPU model, where not the accelerator's usual one.
    pub cpu: Option<String>,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// Its CPUs.
    pub cpus: u32,
    /// Where its memory lies.
    pub ram: Ram,
    /// How much of it is filled and checked, in MiB.
    pub fill_mib: u64,
    /// How much of that is dirtied, in MiB; all of it where not given.
    pub working_set_mib: Option<u64>,
    /// How much is dirtied per second, in pages.
    pub rate: u64,
    /// How it is dirtied.
    pub pattern: Pattern,
    /// What its pages hold, where not what goes with the pattern.
    pub content: Option<Content>,
    /// Whether it checks itself.
    pub check: bool,
    /// How much it checks per second at most, in pages; what the guest thinks right where not given.
    pub check_rate: Option<u64>,
    /// A raw disk image of blocks that say which they are, by `guest::reader`, read all the time and around the host's page
    /// cache.
    pub direct_disk: Option<PathBuf>,
    /// A Debian that it boots beside itself, by `guest::userland`. Not together with `direct_disk`: each wants to be the first disk.
    pub userland: Option<Userland>,
    /// Disks that it works on, each known by its serial number.
    pub disks: Vec<TestDisk>,
    /// Its network interface.
    pub nic: Option<Nic>,
    /// The file its serial console is appended to.
    pub serial: PathBuf,
    /// A unix socket for QMP.
    pub qmp: Option<PathBuf>,
    /// Whether QEMU ends when the guest reboots.
    pub no_reboot: bool,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
}

/// A Debian that a guest boots beside itself: an ext4 file system, and no partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Userland {
    /// A raw image that is only read, by any number of guests.
    Shared(PathBuf),
    /// The guest's own disk, which is written.
    Own(TestDisk),
}

/// Where a guest's memory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ram {
    /// In QEMU's own memory, out of reach: what a plain command line gives.
    Private,
    /// In a named file that can be shared.
    File(PathBuf),
}

/// A virtio network interface on a tap device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The tap device's name.
    pub tap: String,
    /// The descriptors by which QEMU has it, one for each queue; by its name where there are none.
    pub descriptors: Vec<i32>,
    /// The interface's hardware address.
    pub mac: String,
    /// Its address in the guests' network.
    pub address: Ipv4Addr,
}

impl Nic {
    /// An interface on that tap, the guest's number (1 to 254) in its addresses: 10.88.0.N and 52:54:00:88:00:N.
    pub fn new(tap: &str, number: u8) -> Self {
        Self {
            tap: tap.to_owned(),
            descriptors: Vec::new(),
            mac: format!("52:54:00:88:00:{number:02x}"),
            address: addresses::of_guest(number),
        }
    }
}

impl GuestSpec {
    /// A guest of 512 MiB that fills 256 of them and writes nothing, without network, its console appended to `serial`, run by that.
    ///
    /// # Errors
    /// [`TestbedError::NotSetUp`] where the guest's images are missing.
    pub(crate) fn accelerated(
        qemu: PathBuf,
        accelerator: Accelerator,
        serial: impl Into<PathBuf>,
    ) -> Result<Self, TestbedError> {
        let (kernel, initramfs) = programs::guest_images()?;
        Ok(Self {
            qemu,
            accelerator,
            machine: "q35".into(),
            cpu: None,
            memory_mib: 512,
            cpus: 1,
            ram: Ram::Private,
            fill_mib: 256,
            working_set_mib: None,
            rate: 0,
            pattern: Pattern::Random,
            content: None,
            check: true,
            check_rate: None,
            direct_disk: None,
            userland: None,
            disks: Vec::new(),
            nic: None,
            serial: serial.into(),
            qmp: None,
            no_reboot: false,
            extra: Vec::new(),
            kernel,
            initramfs,
        })
    }

    /// The command line, program first.
    pub fn command_line(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut words = vec![text(&self.qemu), "-accel".into(), self.accelerator.name().into()];
        if let Some(cpu) = self.cpu.as_deref().or(self.accelerator.cpu()) {
            words.extend(["-cpu".into(), cpu.to_owned()]);
        }
        match &self.ram {
            Ram::Private => words.extend(["-machine".into(), self.machine.clone()]),
            Ram::File(path) => {
                let backend = format!(
                    "memory-backend-file,id=ram0,size={}M,mem-path={},share=on",
                    self.memory_mib,
                    escape(path)
                );
                words.extend(["-object".into(), backend]);
                words.extend(["-machine".into(), format!("{},memory-backend=ram0", self.machine)]);
            }
        }
        // Room for one CPU more makes QEMU's emulation keep what a locked instruction promises about the order of memory accesses. It does
        // not where there can be one CPU only, and then the guest and a device sometimes do not see each other: once in some minutes of
        // heavy traffic a guest waits for ever for a network card that waits for it.
        let cpus = format!("{},maxcpus={}", self.cpus, self.cpus + 1);
        words.extend(["-m".into(), self.memory_mib.to_string(), "-smp".into(), cpus]);
        words.extend(["-nodefaults", "-display", "none"].map(str::to_owned));
        let serial = format!("file,id=serial0,path={},append=on", escape(&self.serial));
        words.extend(["-chardev".into(), serial, "-serial".into(), "chardev:serial0".into()]);
        if let Some(image) = &self.direct_disk {
            let drive = format!("file={},format=raw,if=virtio,cache=none", escape(image));
            words.extend(["-drive".into(), drive]);
        }
        let own = match &self.userland {
            Some(Userland::Shared(image)) => {
                let drive = format!("file={},format=raw,if=virtio,readonly=on", escape(image));
                words.extend(["-drive".into(), drive]);
                None
            }
            Some(Userland::Own(disk)) => Some(disk),
            None => None,
        };
        let disks = own.into_iter().chain(&self.disks);
        words.extend(disks.enumerate().flat_map(|(place, disk)| disk.arguments(place)));
        if let Some(nic) = &self.nic {
            let queues: Vec<String> = nic.descriptors.iter().map(i32::to_string).collect();
            let (netdev, multi_queue) = match &queues[..] {
                [] => (format!("tap,id=net0,ifname={},script=no,downscript=no", nic.tap), ""),
                [one] => (format!("tap,id=net0,fd={one}"), ""),
                several => (format!("tap,id=net0,fds={}", several.join(":")), ",mq=on"),
            };
            // No boot ROM: the guest never boots from the network, and ROMs of two QEMU versions need not be alike.
            let device = format!("virtio-net-pci,id=nic0,netdev=net0,mac={},romfile={multi_queue}", nic.mac);
            words.extend(["-netdev".into(), netdev, "-device".into(), device]);
        }
        if let Some(qmp) = &self.qmp {
            words.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", escape(qmp))]);
        }
        if self.no_reboot {
            words.push("-no-reboot".into());
        }
        words.extend(["-kernel".into(), text(&self.kernel), "-initrd".into(), text(&self.initramfs)]);
        words.extend(["-append".into(), self.kernel_command_line()]);
        words.extend(self.extra.iter().cloned());
        words
    }

    fn kernel_command_line(&self) -> String {
        // A panic restarts the machine at once: QEMU then ends, or the guest's next boot shows that there was one. Mitigations of
        // CPU faults would only slow an emulated guest down. Whether timers interrupt is not tried: an emulated CPU that gets no time of
        // its host's meanwhile is taken for one whose timer is broken, and does not boot (KVM's guests do not try that either).
        let mut line = format!(
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check vmirror.fill={} vmirror.rate={} vmirror.pattern={}",
            self.fill_mib,
            self.rate,
            self.pattern.name()
        );
        let mut add = |name: &str, value: String| line.push_str(&format!(" vmirror.{name}={value}"));
        if let Some(mib) = self.working_set_mib {
            add("workset", mib.to_string());
        }
        if let Some(content) = self.content {
            add("content", content.name().to_owned());
        }
        if !self.check {
            add("check", "off".into());
        }
        if let Some(rate) = self.check_rate {
            add("check_rate", rate.to_string());
        }
        if self.direct_disk.is_some() {
            add("read", "on".into());
        }
        if let Some(userland) = &self.userland {
            add("userland", userland.changes().name().to_owned());
        }
        for parameter in self.disks.iter().filter_map(TestDisk::parameter) {
            add("disk", parameter);
        }
        if let Some(nic) = &self.nic {
            add("ip", format!("{}/{GUEST_PREFIX}", nic.address));
        }
        line
    }
}

impl Userland {
    fn changes(&self) -> Changes {
        match self {
            Self::Shared(_) => Changes::InMemory,
            Self::Own(_) => Changes::OnDisk,
        }
    }
}

/// A path inside a comma-separated option: QEMU reads a doubled comma as one.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest::parameters::Parameters;

    fn spec() -> GuestSpec {
        GuestSpec {
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            accelerator: Accelerator::Tcg,
            machine: "q35".into(),
            cpu: None,
            memory_mib: 512,
            cpus: 2,
            ram: Ram::File("/dev/shm/a,b".into()),
            fill_mib: 200,
            working_set_mib: Some(20),
            rate: 300,
            pattern: Pattern::Counter,
            content: Some(Content::Text),
            check: true,
            check_rate: Some(1000),
            direct_disk: Some("/d".into()),
            userland: None,
            disks: Vec::new(),
            nic: Some(Nic::new("tap7", 10)),
            serial: "/tmp/serial".into(),
            qmp: Some("/tmp/qmp".into()),
            no_reboot: true,
            extra: vec!["-S".into()],
            kernel: "/k".into(),
            initramfs: "/i".into(),
        }
    }

    #[test]
    fn the_guest_reads_from_its_command_line_what_the_spec_says() {
        let words = spec().command_line();
        let append = words.iter().position(|word| word == "-append").unwrap() + 1;
        let parameters = Parameters::parse(&words[append]).unwrap();
        assert_eq!(parameters.address, Some((Ipv4Addr::new(10, 88, 0, 10), 24)));
        assert_eq!((parameters.fill_mib, parameters.working_set_mib), (200, Some(20)));
        assert_eq!((parameters.rate, parameters.pattern), (300, Pattern::Counter));
        assert_eq!(parameters.content, Some(Content::Text));
        assert_eq!((parameters.check, parameters.check_rate), (true, 1000));
        assert!(parameters.read && parameters.userland.is_none());
    }

    #[test]
    fn a_userland_is_attached_so_that_guests_can_share_it() {
        let userland = Some(Userland::Shared("/u,1".into()));
        let spec = GuestSpec { direct_disk: None, userland, ..spec() };
        let words = spec.command_line();
        assert!(words.join(" ").contains("-drive file=/u,,1,format=raw,if=virtio,readonly=on "));
        let append = words.iter().position(|word| word == "-append").unwrap() + 1;
        assert_eq!(Parameters::parse(&words[append]).unwrap().userland, Some(Changes::InMemory));
    }

    #[test]
    fn a_userland_that_is_written_is_a_disk_like_others_and_the_first() {
        let disk = |serial| TestDisk::new("/t", crate::disk::Format::Raw, serial);
        let userland = Some(Userland::Own(disk("root")));
        let words =
            GuestSpec { direct_disk: None, userland, disks: vec![disk("d")], ..spec() }.command_line();
        let line = words.join(" ");
        assert!(line.contains("node-name=disk-root,file=file-root,read-only=off,"), "{line}");
        assert!(line.contains("serial=root,addr=0x10 ") && line.contains("serial=d,addr=0x11 "), "{line}");
        let append = words.iter().position(|word| word == "-append").unwrap() + 1;
        assert_eq!(Parameters::parse(&words[append]).unwrap().userland, Some(Changes::OnDisk));
    }

    #[test]
    fn the_guest_is_told_of_its_disks() {
        let disk = |serial| TestDisk::new("/t", crate::disk::Format::Raw, serial);
        let ext4 = TestDisk { roles: vec![Work::Ext4 { rate: 9 }.in_the_rest()], ..disk("e") };
        let words = GuestSpec { disks: vec![disk("idle"), ext4], ..spec() }.command_line();
        assert!(words.join(" ").contains("serial=e,addr=0x11 -netdev "));
        let append = words.iter().position(|word| word == "-append").unwrap() + 1;
        let plans = Parameters::parse(&words[append]).unwrap().disks;
        assert_eq!(plans.iter().map(ToString::to_string).collect::<Vec<_>>(), ["e:ext4,rate=9"]);
    }

    #[test]
    fn qemu_gets_every_part() {
        let line = spec().command_line().join(" ");
        for part in [
            "/usr/bin/qemu-system-x86_64 -accel tcg ",
            "-object memory-backend-file,id=ram0,size=512M,mem-path=/dev/shm/a,,b,share=on -machine q35,memory-backend=ram0 -m 512 -smp 2",
            "-chardev file,id=serial0,path=/tmp/serial,append=on",
            "-drive file=/d,format=raw,if=virtio,cache=none ",
            "-netdev tap,id=net0,ifname=tap7,script=no,downscript=no -device virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:88:00:0a,romfile=",
            "-qmp unix:/tmp/qmp,server=on,wait=off -no-reboot -kernel /k -initrd /i -append ",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(line.ends_with(" -S"));
    }
}
