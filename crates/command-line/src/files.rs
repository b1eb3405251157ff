//! Files other than disks that QEMU opens when it starts.

use std::path::PathBuf;

use crate::disks;
use crate::spec::Spec;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FilePurpose {
    /// `-kernel`
    Kernel,
    /// `-initrd`
    Initrd,
    /// `-dtb`
    DeviceTree,
    /// `-bios`: looked up in QEMU's own directories (`-L`) as well.
    Firmware,
    /// Firmware in flash: code or variables.
    Flash,
    /// ROM of a device, or `-option-rom`: looked up in QEMU's own directories as well.
    Rom,
    /// Content for SMBIOS, ACPI or fw_cfg.
    Table,
}

/// A file that must exist wherever the machine is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileUse {
    /// As written; where the purpose says so, it may be just a name in QEMU's own directories.
    pub path: PathBuf,
    /// What for.
    pub purpose: FilePurpose,
    /// Whether the guest can change it (flash variables).
    pub writable: bool,
}

impl Spec {
    /// Kernel, firmware, ROM and table files, in the order of the command line: what must exist at the destination
    /// under the same name. Disks are [`Spec::disks`].
    #[must_use]
    pub fn files(&self) -> Vec<FileUse> {
        let mut files = Vec::new();
        for argument in &self.arguments {
            let mut add = |path: Option<String>, purpose, writable| {
                files.extend(path.filter(|path| !path.is_empty()).map(|path| FileUse {
                    path: PathBuf::from(path),
                    purpose,
                    writable,
                }));
            };
            let whole = || argument.value().map(str::to_owned);
            match argument.name() {
                "kernel" | "shim" => add(whole(), FilePurpose::Kernel, false),
                // Several module files may be given with commas, each followed by its command line (multiboot).
                "initrd" => add(whole(), FilePurpose::Initrd, false),
                "dtb" => add(whole(), FilePurpose::DeviceTree, false),
                "bios" => add(whole(), FilePurpose::Firmware, false),
                "pflash" => add(whole(), FilePurpose::Flash, true),
                "option-rom" => {
                    add(argument.properties().get("romfile").or_else(whole), FilePurpose::Rom, false);
                }
                "device" => add(argument.properties().get("romfile"), FilePurpose::Rom, false),
                "smbios" => {
                    add(argument.properties().get("file"), FilePurpose::Table, false);
                    add(argument.properties().get("path"), FilePurpose::Table, false);
                }
                "fw_cfg" => add(argument.properties().get("file"), FilePurpose::Table, false),
                "acpitable" => {
                    let properties = argument.properties();
                    for list in [properties.get("file"), properties.get("data")].into_iter().flatten() {
                        list.split(':')
                            .for_each(|path| add(Some(path.to_owned()), FilePurpose::Table, false));
                    }
                }
                "machine" => {
                    let properties = argument.properties();
                    add(properties.get("kernel"), FilePurpose::Kernel, false);
                    add(properties.get("initrd"), FilePurpose::Initrd, false);
                    add(properties.get("dtb"), FilePurpose::DeviceTree, false);
                    add(properties.get("firmware"), FilePurpose::Firmware, false);
                }
                "drive" if argument.properties().get("if").as_deref() == Some("pflash") => {
                    if let Some(disk) = disks::drive_disk(&argument.properties()) {
                        let path = disk.path.to_string_lossy().into_owned();
                        add(Some(path), FilePurpose::Flash, disk.is_written());
                    }
                }
                _ => {}
            }
        }
        for node in self.pflash_nodes() {
            files.extend(self.node_disk(&node).map(|disk| FileUse {
                path: disk.path,
                purpose: FilePurpose::Flash,
                writable: !disk.read_only,
            }));
        }
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_file() {
        let spec = Spec::parse(&[
            "q",
            "-kernel",
            "/k",
            "-initrd",
            "/i",
            "-append",
            "x",
            "-bios",
            "bios.bin",
            "-machine",
            "q35,pflash0=code",
            "-drive",
            "if=pflash,format=raw,unit=0,file=/c,readonly=on",
            "-drive",
            "if=pflash,unit=1,file=/v",
            "-blockdev",
            "driver=file,node-name=code,filename=/n,read-only=on",
            "-device",
            "e1000,romfile=",
            "-device",
            "e1000,romfile=/r",
            "-smbios",
            "type=1,serial=3",
            "-fw_cfg",
            "name=opt/x,file=/f",
            "-acpitable",
            "file=/a:/b",
        ])
        .unwrap();
        let files: Vec<_> =
            spec.files().into_iter().map(|file| (file.path.display().to_string(), file.writable)).collect();
        let expected = ["/k", "/i", "bios.bin", "/c", "/v", "/r", "/f", "/a", "/b", "/n"];
        assert_eq!(files.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), expected);
        assert_eq!(files.iter().filter(|(_, writable)| *writable).count(), 1);
        assert!(spec.disks().is_empty(), "flash is not a disk");
    }
}
