//! A data stream as a source sends it, pages and blocks of disks: whatever comes, only the stream's own pages and blocks are written,
//! and what the ledger then says of the copy is so.

#![no_main]

use std::fs::File;
use std::io::Cursor;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use fuzzing::Input;
use libfuzzer_sys::fuzz_target;
use mirror::hash::Secret;
use mirror::layout::{Layout, PAGE_SIZE};
use mirror::memory::destination::{Event, MemoryDestination};
use mirror::memory::{Ram, RamFile};
use mirror::storage::destination::StorageDestination;
use mirror::storage::image::Image;
use mirror::storage::layout::DiskLayout;

/// Pages of the three RAM blocks: chunks of the streams 0, 1 and 0.
const RAM: [u64; 3] = [16, 8, 4];
/// Bytes of the two disks, likewise of the streams 0 and 1.
const DISKS: [usize; 2] = [(192 << 10) + 100, 64 << 10];
/// What is before and after what a block may be in.
const GUARD: usize = PAGE_SIZE;
const GUARDED: u8 = 0xA5;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let how = input.byte();
    let stream = u16::from(how & 1);
    let layout = Layout::new(["a", "b", "c"].into_iter().zip(RAM.map(|pages| pages * PAGE_SIZE as u64)), 2);
    let files: Vec<File> = RAM.iter().map(|pages| guarded(*pages as usize * PAGE_SIZE)).collect();
    let offset = GUARD as u64;
    let ram = files.iter().map(|file| RamFile {
        file: file.try_clone().expect("a descriptor"),
        offset,
        process: None,
    });
    let ram = Ram::new(layout.expect("a layout"), ram.collect()).expect("RAM");
    let (tell, events) = mpsc::channel();
    let mut memory =
        MemoryDestination::start(ram, secret(), move |event| drop(tell.send(event))).expect("a copy");
    if how & 2 != 0 {
        memory.allow_absent();
    }
    let images: Vec<Disk> = DISKS.iter().map(|size| Disk(Arc::new(Mutex::new(vec![0; *size])))).collect();
    let disks = DiskLayout::new(DISKS.map(|size| size as u64), 2).expect("a layout");
    let boxed = images.iter().map(|image| Box::new(image.clone()) as Box<dyn Image>).collect();
    let storage =
        StorageDestination::start(disks, secret(), boxed, &[true; 2], |_| {}).expect("a copy of disks");
    let with_disks = how & 4 == 0;
    memory.attach(stream, Cursor::new(input.0.to_vec()), with_disks.then_some(&storage)).expect("a stream");
    while !matches!(events.recv(), Ok(Event::Ended { .. } | Event::Failed { .. })) {}

    let audit = memory.audit().expect("it can be read");
    assert!(
        audit.differing.is_empty(),
        "the ledger says something else than the copy: {:?}",
        audit.differing
    );
    let mut wrong = Vec::new();
    storage.audit(|block| wrong.push(block)).expect("it can be read");
    assert!(wrong.is_empty(), "the ledger says something else than the disks: {wrong:?}");
    drop(memory.finish());
    storage.finish();
    for (number, file) in files.iter().enumerate() {
        untouched(file, RAM[number] as usize * PAGE_SIZE, number % 2 == usize::from(stream));
    }
    for (number, image) in images.iter().enumerate() {
        let may_be_written = with_disks && number == usize::from(stream);
        assert!(may_be_written || image.lock().iter().all(|byte| *byte == 0), "another's disk was written");
    }
});

fn secret() -> Secret {
    Secret::from([7; 192])
}

/// A file in memory with room for so many bytes, and what must not be touched before and after.
fn guarded(length: usize) -> File {
    let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).expect("memory for a file");
    let file = File::from(file);
    file.set_len((2 * GUARD + length) as u64).expect("memory for a file");
    for at in [0, GUARD + length] {
        file.write_all_at(&[GUARDED; GUARD], at as u64).expect("memory for a file");
    }
    file
}

fn untouched(file: &File, length: usize, is_streams: bool) {
    let mut content = vec![0; 2 * GUARD + length];
    file.read_exact_at(&mut content, 0).expect("it is as long as it was");
    assert_eq!(file.metadata().expect("a file").len(), content.len() as u64, "it is as long as it was");
    let (ram, after) = content.split_at(GUARD + length);
    let (before, ram) = ram.split_at(GUARD);
    assert!(before.iter().chain(after).all(|byte| *byte == GUARDED), "what is no RAM was written");
    assert!(is_streams || ram.iter().all(|byte| *byte == 0), "another stream's pages were written");
}

/// A disk in memory.
#[derive(Clone)]
struct Disk(Arc<Mutex<Vec<u8>>>);

impl Disk {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for Disk {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let offset = offset as usize;
        buffer.copy_from_slice(&self.lock()[offset..offset + buffer.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, content: &[u8]) -> std::io::Result<()> {
        let offset = offset as usize;
        self.lock()[offset..offset + content.len()].copy_from_slice(content);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> std::io::Result<()> {
        let offset = offset as usize;
        self.lock()[offset..offset + length as usize].fill(0);
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
}
