//! What a destination is asked to set aside.

use mirror::hash::Secret;
use qemu::qmp::CpuidWord;
use uuid::Uuid;

use super::{boot_files, earlier};
use crate::disks::Disk;
use crate::machine::Machine;
use host::Host;
use host::Vm;
use host::places;
use protocol::wire;
use session::options::{DiskRoom, Engine, OnDiverge, Options};

/// What the destination is asked to set aside.
#[expect(clippy::too_many_arguments, reason = "what a destination is told, one thing each")]
pub(super) fn reserve(
    host: &Host,
    session: Uuid,
    vm: &Vm,
    machine: &Machine,
    options: &Options,
    streams: u16,
    secret: &[u8; mirror::hash::SECRET_LENGTH],
    rehearsal: bool,
) -> wire::Reserve {
    let (macvtaps, taps) = machine.taps.iter().cloned().partition(|tap| tap.macvtap.is_some());
    wire::Reserve {
        session: session.as_bytes().to_vec(),
        name: vm.record.name.to_string(),
        generation: vm.record.generation,
        argv: places::by_their_names(host, &vm.record, vm.spec.to_argv()),
        machine: machine.machine.clone(),
        qemu_version: machine.qemu_version.clone(),
        cpuid: machine.cpuid.iter().map(wire_word).collect(),
        cpu_features: machine.cpu_features.clone(),
        ram: machine.ram.iter().map(wire_ram).collect(),
        disks: machine.disks.iter().map(Disk::wire).collect(),
        boot_files: Secret::try_from(&secret[..])
            .map_or_else(|_| Vec::new(), |secret| boot_files::of(&vm.spec, &secret)),
        whole_room: options.disk_room == DiskRoom::Whole,
        accept_disconnect: options.accept_disconnect,
        taps,
        macvtaps,
        limits: wire::CgroupLimits::of(&machine.limits),
        streams: u32::from(streams),
        secret: secret.to_vec(),
        rehearsal,
        forward: None,
        nft: String::new(),
        post_copy: options.on_diverge == OnDiverge::PostCopy,
        qemu_stream: options.engine == Engine::Qemu,
        saved_devices: machine.saves_devices(),
        patient: true,
        link_port: 0,
        abandoned: Some(earlier::named(host, &vm.record.name)),
    }
}

fn wire_word(word: &CpuidWord) -> wire::CpuidWord {
    let CpuidWord { leaf, subleaf, register, features } = word.clone();
    wire::CpuidWord { leaf, subleaf, register, features }
}

fn wire_ram(block: &qemu::RamBlock) -> wire::RamBlock {
    let is_huge = block.page_size > mirror::layout::PAGE_SIZE as u64;
    let huge_page = if is_huge { block.page_size } else { 0 };
    wire::RamBlock { id: block.id.clone(), size: block.size, huge_page }
}
