//! What waits to be sent of disks, on every stream, and what is not certain about them.
//!
//! Two things come in over the same connection: what the guest writes, and what QEMU's copy job reads. What has been written
//! before, or is a part of a block only, is taken to be the guest's and goes first; it is answered at once while little of it waits,
//! so that the guest does not wait for the link. The rest is taken to be the copy, and waits behind. When enough waits of either,
//! what comes is answered as soon as there is less: so the guest and the job are paced. A wrong guess costs time only: pieces that
//! overlap never pass each other.
//!
//! QEMU's copy job first makes all of its target zero, and then writes what is not. Where the destination has nothing yet, that is so
//! already. Where it has content of before, that would be thrown away for most of it to come again: such zeros are *deferred*, and
//! what is left of them when the job is through is compared like what is owed.
//!
//! A guest must not wait for a link that has stopped. What has waited too long is let go of: the blocks are *owed*, and are read
//! from the source's own image and sent again when the link is back. A block of which only a part was sent is *unhashed*: nobody here
//! has seen all of it.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::codec::MAX_PAYLOAD;
use super::item::{Answer, Content, Item};
use super::layout::{BLOCK_SIZE, BlockIndex, CHUNK_BLOCKS, Disk, DiskLayout};
// A set of numbers of any index space.
use crate::memory::pages::PageSet as BlockSet;

/// The most of what the guest has written that waits on a stream without the guest waiting, in bytes.
const EARLY: usize = 8 << 20;
/// With more of the copy waiting on a stream than this, in bytes, the job waits until there is less. So much, two chunks, keeps a
/// stream busy while QEMU reads what the others get.
const AHEAD: usize = 4 << 20;
/// After which a stream that takes nothing is not waited for any more. On a slow link frames take longer: then it is so many times
/// the longest wait of late, up to what a guest may wait for its disk.
const STALL: Duration = Duration::from_millis(500);
const PATIENCE: u32 = 4;
const LONGEST: Duration = Duration::from_millis(800);
/// Most items of a frame: with these no table is too long.
const MAX_ITEMS: usize = 128;

/// What was let go of, to be dropped without the lock.
#[derive(Debug, Default)]
pub(super) struct Gone {
    /// What will not be sent as it is.
    pub(super) items: Vec<Item>,
    /// Who waited for room. Dropping answers.
    pub(super) answered: Vec<Arc<Answer>>,
}

/// What waits on one stream.
#[derive(Debug)]
struct Lane {
    urgent: VecDeque<Item>,
    copy: VecDeque<Item>,
    /// Bytes of both, and of what is urgent.
    bytes: usize,
    urgent_bytes: usize,
    /// Requests of the job that wait for room.
    held: Vec<Arc<Answer>>,
    /// When it last took something, or began to have something to take.
    moved: Instant,
    /// The longest wait of late.
    pace: Duration,
    state: Taking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taking {
    /// What is pushed is taken, sooner or later.
    Open,
    /// Nothing has been taken for too long.
    Stalled,
    /// Nothing will ever be taken again.
    Closed,
}

impl Lane {
    fn new() -> Lane {
        Lane {
            urgent: VecDeque::new(),
            copy: VecDeque::new(),
            bytes: 0,
            urgent_bytes: 0,
            held: Vec::new(),
            moved: Instant::now(),
            pace: Duration::ZERO,
            state: Taking::Open,
        }
    }

    fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.copy.is_empty()
    }

    /// Whether there is room for more of the copy.
    fn takes_copy(&self) -> bool {
        self.bytes - self.urgent_bytes < AHEAD
    }

    fn push(&mut self, item: Item, copy: bool) {
        if self.is_empty() {
            self.moved = Instant::now();
        }
        self.bytes += item.bytes();
        if copy {
            self.copy.push_back(item);
            return;
        }
        // Whatever it would overtake goes before it.
        let blocks = item.blocks();
        let overlaps = |waiting: &Item| {
            let other = waiting.blocks();
            blocks.start < other.end && other.start < blocks.end
        };
        let mut at = 0;
        while at < self.copy.len() {
            match overlaps(&self.copy[at]) {
                true => {
                    let overtaken = self.copy.remove(at);
                    self.urgent_bytes += overtaken.as_ref().map_or(0, Item::bytes);
                    self.urgent.extend(overtaken);
                }
                false => at += 1,
            }
        }
        self.urgent_bytes += item.bytes();
        self.urgent.push_back(item);
    }
}

/// What has happened to a block since its content was read to settle it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    Part,
    Whole,
}

/// All that waits and all that is not certain.
#[derive(Debug)]
pub(super) struct Queue {
    layout: DiskLayout,
    lanes: Vec<Lane>,
    /// With more of what the guest has written waiting on a stream than this, in bytes, it waits until there is less.
    early: usize,
    /// Requests of the guest's that wait for room.
    held: Vec<Arc<Answer>>,
    /// Written at least once.
    seen: BlockSet,
    unhashed: BlockSet,
    owed: BlockSet,
    /// Said to be zero, and not written since.
    deferred: BlockSet,
    /// The disks whose copies were all zero.
    zero: Vec<bool>,
    /// The others, as long as the copy jobs go over them.
    had_content: Vec<bool>,
    /// Being read, to be settled; whether they are owed, and what came in between.
    settling: HashMap<u64, (bool, Meanwhile)>,
}

impl Queue {
    /// With nothing in it. `zero` says which disks' copies are known to be all zero.
    pub(super) fn new(layout: DiskLayout, zero: &[bool]) -> Queue {
        let end = layout.end();
        let lanes = (0..layout.streams()).map(|_| Lane::new()).collect();
        let set = || BlockSet::new(end);
        Queue {
            layout,
            lanes,
            early: EARLY,
            held: Vec::new(),
            seen: set(),
            unhashed: set(),
            owed: set(),
            deferred: set(),
            zero: zero.to_owned(),
            had_content: zero.iter().map(|zero| !zero).collect(),
            settling: HashMap::new(),
        }
    }

    /// Lets no more wait of what the guest has written than that many bytes on each stream.
    pub(super) fn hold_back(&mut self, early: usize) {
        self.early = early.min(EARLY);
    }

    /// Takes in what was written to a disk.
    pub(super) fn write(&mut self, disk: usize, offset: u64, data: Vec<u8>, answer: Arc<Answer>) {
        let data = Arc::new(data);
        let first = self.layout.block_at(disk, offset).0;
        let last = self.layout.block_at(disk, offset + (data.len() as u64).saturating_sub(1)).0;
        let copy = (first..=last).all(|block| self.is_whole(block, disk, offset, data.len()))
            && !(first..=last).any(|block| self.seen.contains(block));
        if copy && !self.takes_copy(BlockIndex(first)) {
            let stream = self.layout.stream_of(BlockIndex(first));
            self.lanes[usize::from(stream)].held.push(answer);
        } else if !copy && !self.takes_writes() {
            self.held.push(answer);
        }
        let mut at = 0;
        while at < data.len() {
            let position = offset + at as u64;
            let block = self.layout.block_at(disk, position);
            let within = (position % BLOCK_SIZE as u64) as usize;
            let chunk_end = (block.0 / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
            let in_chunk = (chunk_end - block.0) as usize * BLOCK_SIZE - within;
            let length = (data.len() - at).min(in_chunk).min(MAX_PAYLOAD - within);
            let content = Content::Bytes { data: Arc::clone(&data), range: at..at + length };
            for touched in block.0..=self.layout.block_at(disk, position + length as u64 - 1).0 {
                let whole = self.is_whole(touched, disk, offset, data.len());
                self.touched(touched, whole);
            }
            self.push(Item { block, at: within, content }, copy);
            at += length;
        }
    }

    /// Whether a write covers all of a block.
    fn is_whole(&self, block: u64, disk: usize, offset: u64, length: usize) -> bool {
        let place = self.layout.locate(BlockIndex(block));
        place.is_some_and(|place| {
            place.disk == disk
                && offset <= place.offset
                && place.offset + place.length as u64 <= offset + length as u64
        })
    }

    /// Takes in that a range of a disk is zero.
    pub(super) fn zero(&mut self, disk: usize, offset: u64, length: u64, answer: Arc<Answer>) {
        let end = offset + length;
        let size = self.layout.disks()[disk].size;
        let block_size = BLOCK_SIZE as u64;
        let head = offset.next_multiple_of(block_size).min(end);
        // A short last block counts as whole when all that there is of it is zero.
        let tail = if end == size { end } else { (end - end % block_size).max(head) };
        for edge in [offset..head, tail..end] {
            if !edge.is_empty() {
                let zeros = vec![0; (edge.end - edge.start) as usize];
                self.write(disk, edge.start, zeros, Arc::clone(&answer));
            }
        }
        if head >= tail {
            return;
        }
        let (first, last) = (self.layout.block_at(disk, head).0, self.layout.block_at(disk, tail - 1).0);
        if !(first..=last).any(|block| self.seen.contains(block)) {
            if self.zero[disk] {
                // Nothing has been written there, so it still is; but what is being read of it may be from before.
                self.overtaken(first..last + 1);
                return;
            }
            if self.had_content[disk] {
                self.deferred.insert(first..last + 1);
                return;
            }
        }
        let mut block = first;
        while block <= last {
            let chunk_end = (block / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
            let count = (last + 1).min(chunk_end) - block;
            (block..block + count).for_each(|block| self.touched(block, true));
            let item = Item { block: BlockIndex(block), at: 0, content: Content::Zero(count) };
            self.push(item, false);
            block += count;
        }
    }

    /// What a range of a disk holds is not known any more: it has been given back.
    pub(super) fn trimmed(&mut self, disk: usize, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        let first = self.layout.block_at(disk, offset).0;
        let last = self.layout.block_at(disk, offset + length - 1).0;
        self.owed.insert(first..last + 1);
        self.overtaken(first..last + 1);
    }

    /// What has been read of these blocks to settle them is not what they hold any more.
    fn overtaken(&mut self, blocks: Range<u64>) {
        if self.settling.is_empty() {
            return;
        }
        for block in blocks {
            if let Some((owed, meanwhile)) = self.settling.get_mut(&block) {
                (*owed, *meanwhile) = (true, Meanwhile::Part);
            }
        }
    }

    /// Everything taken in so far is to be put on stable storage soon. Nobody waits for that: until the hand-over, before which all of
    /// it is made certain of, the source's own image is the one that counts.
    pub(super) fn sync(&mut self) {
        for lane in self.lanes.iter_mut().filter(|lane| lane.state == Taking::Open) {
            if !matches!(lane.urgent.back(), Some(Item { content: Content::Sync, .. })) {
                lane.push(Item { block: BlockIndex(0), at: 0, content: Content::Sync }, false);
            }
        }
    }

    /// These blocks are not at the destination what they should be.
    pub(super) fn owe(&mut self, block: BlockIndex) {
        self.owed.insert(block.0..block.0 + 1);
        if let Some((owed, _)) = self.settling.get_mut(&block.0) {
            *owed = true;
        }
    }

    fn touched(&mut self, block: u64, whole: bool) {
        self.seen.insert(block..block + 1);
        if let Some((_, meanwhile)) = self.settling.get_mut(&block) {
            *meanwhile = if whole { Meanwhile::Whole } else { Meanwhile::Part };
        }
        if whole {
            self.unhashed.remove(block..block + 1);
            self.owed.remove(block..block + 1);
            self.deferred.remove(block..block + 1);
        } else {
            self.unhashed.insert(block..block + 1);
        }
    }

    fn takes_writes(&self) -> bool {
        self.lanes.iter().all(|lane| lane.urgent_bytes < self.early)
    }

    fn takes_copy(&self, block: BlockIndex) -> bool {
        self.lanes[usize::from(self.layout.stream_of(block))].takes_copy()
    }

    /// Who waited for room and has it now: to be dropped without the lock, which answers.
    fn with_room(&mut self) -> Vec<Arc<Answer>> {
        let mut answered = Vec::new();
        if self.takes_writes() {
            answered.append(&mut self.held);
        }
        for lane in self.lanes.iter_mut().filter(|lane| lane.takes_copy()) {
            answered.append(&mut lane.held);
        }
        answered
    }

    fn push(&mut self, item: Item, copy: bool) {
        let stream = usize::from(self.layout.stream_of(item.block));
        if self.lanes[stream].state == Taking::Open {
            self.lanes[stream].push(item, copy);
        } else {
            self.let_go(&item);
        }
    }

    /// An item is not sent: what it was about is owed.
    fn let_go(&mut self, item: &Item) {
        let blocks = item.blocks();
        match &item.content {
            Content::Settled { owed: false, .. } => self.unhashed.insert(blocks),
            Content::Sync => {}
            _ => self.owed.insert(blocks),
        }
    }

    /// Takes what makes up the next frame of a stream: of one disk, what is urgent first. The copy waits where it is not to be
    /// taken. Who has waited for that room is given back, to be dropped without the lock, which answers.
    pub(super) fn take(&mut self, stream: u16, copy_too: bool, into: &mut Vec<Item>) -> Vec<Arc<Answer>> {
        let (lane, layout) = (&mut self.lanes[usize::from(stream)], &self.layout);
        let disk = |item: &Item| layout.locate(item.block).map(|place| place.disk);
        let mut payload = 0;
        let fits = |first: Option<&Item>, item: &Item, payload: usize| {
            let same = first.is_none_or(|first| {
                let is_sync = |item: &Item| matches!(item.content, Content::Sync);
                !is_sync(first) && !is_sync(item) && disk(first) == disk(item)
            });
            same && payload + item.bytes() <= MAX_PAYLOAD
        };
        while into.len() < MAX_ITEMS {
            let from = match (lane.urgent.front(), lane.copy.front()) {
                (Some(item), _) if fits(into.first(), item, payload) => {
                    lane.urgent_bytes -= item.bytes();
                    &mut lane.urgent
                }
                (None, Some(item)) if copy_too && fits(into.first(), item, payload) => &mut lane.copy,
                _ => break,
            };
            let Some(item) = from.pop_front() else { break };
            payload += item.bytes();
            into.push(item);
        }
        lane.bytes -= payload;
        // The longest wait, slowly forgotten.
        let waited = if into.is_empty() { Duration::ZERO } else { lane.moved.elapsed() };
        lane.pace = waited.max(lane.pace.mul_f64(0.9));
        lane.moved = Instant::now();
        self.with_room()
    }

    /// Lets go of what waits for streams that have stopped.
    pub(super) fn let_go_of_stalled(&mut self) -> Gone {
        let mut items = Vec::new();
        for stream in 0..self.lanes.len() {
            let lane = &self.lanes[stream];
            let limit = (lane.pace * PATIENCE).clamp(STALL, LONGEST);
            if lane.state == Taking::Open && !lane.is_empty() && lane.moved.elapsed() > limit {
                items.extend(self.empty(stream, Taking::Stalled));
            }
        }
        Gone { items, answered: self.with_room() }
    }

    /// Nothing is taken from a stream any more.
    pub(super) fn close(&mut self, stream: u16) -> Gone {
        let items = self.empty(usize::from(stream), Taking::Closed);
        Gone { items, answered: self.with_room() }
    }

    fn empty(&mut self, stream: usize, state: Taking) -> Vec<Item> {
        let lane = &mut self.lanes[stream];
        lane.state = state;
        (lane.bytes, lane.urgent_bytes) = (0, 0);
        let items: Vec<Item> = lane.urgent.drain(..).chain(lane.copy.drain(..)).collect();
        items.iter().for_each(|item| self.let_go(item));
        items
    }

    /// Takes up to so many blocks that are not certain, to be read. Whoever takes them brings them back by
    /// [`settle`](Self::settle).
    pub(super) fn take_uncertain(&mut self, most: usize) -> Vec<BlockIndex> {
        let mut taken = Vec::new();
        for disk in 0..self.layout.disks().len() {
            let blocks = self.layout.disks()[disk].blocks.clone();
            for owed in [true, false] {
                let set = if owed { &self.owed } else { &self.unhashed };
                let found: Vec<u64> = set.runs(blocks.clone()).flatten().take(most - taken.len()).collect();
                for block in found {
                    self.owed.remove(block..block + 1);
                    self.unhashed.remove(block..block + 1);
                    self.settling.insert(block, (owed, Meanwhile::Nothing));
                    taken.push(BlockIndex(block));
                }
            }
        }
        taken
    }

    /// Brings a block back with its content. If the block was written meanwhile, the content is worth nothing.
    pub(super) fn settle(&mut self, block: BlockIndex, data: Vec<u8>) {
        match self.settling.remove(&block.0) {
            Some((owed, Meanwhile::Nothing)) => {
                self.seen.insert(block.0..block.0 + 1);
                let content = Content::Settled { data, owed };
                self.push(Item { block, at: 0, content }, true);
            }
            Some((true, Meanwhile::Part)) => self.owed.insert(block.0..block.0 + 1),
            Some((false, Meanwhile::Part)) => self.unhashed.insert(block.0..block.0 + 1),
            Some((_, Meanwhile::Whole)) | None => {}
        }
    }

    /// A block could not be read: it is as uncertain as before.
    pub(super) fn not_settled(&mut self, block: BlockIndex) {
        match self.settling.remove(&block.0) {
            Some((true, _)) => self.owed.insert(block.0..block.0 + 1),
            Some((false, _)) => self.unhashed.insert(block.0..block.0 + 1),
            None => {}
        }
    }

    /// All of a disk is to be compared when the copy jobs are through, but for what they write.
    pub(super) fn defer(&mut self, disk: usize) {
        self.deferred.insert(self.layout.disks()[disk].blocks.clone());
    }

    /// The copy jobs are through: what is still deferred is owed.
    pub(super) fn owe_deferred(&mut self) {
        self.owed.extend(&self.deferred);
        self.deferred.clear();
        // What is said to be zero from here on is the guest's.
        self.had_content.fill(false);
    }

    /// Blocks that may be wrong at the destination.
    pub(super) fn owed(&self) -> u64 {
        self.owed.len()
    }

    /// Blocks that are not certain.
    pub(super) fn uncertain(&self) -> u64 {
        self.uncertain_by_disk().iter().sum()
    }

    /// Blocks that are not certain, of each disk.
    pub(super) fn uncertain_by_disk(&self) -> Vec<u64> {
        let mut all = self.owed.clone();
        all.extend(&self.unhashed);
        self.settling.keys().for_each(|&block| all.insert(block..block + 1));
        let of = |disk: &Disk| all.runs(disk.blocks.clone()).map(|run| run.end - run.start).sum();
        self.layout.disks().iter().map(of).collect()
    }

    /// Whether nothing is taken from a stream any more.
    pub(super) fn is_closed(&self) -> bool {
        self.lanes.iter().any(|lane| lane.state == Taking::Closed)
    }

    /// Bytes that wait.
    pub(super) fn waiting(&self) -> usize {
        self.lanes.iter().map(|lane| lane.bytes).sum()
    }

    /// A stream is there to take what waits, or has just sent something: one that had stopped goes on. Returns how many pieces
    /// wait.
    pub(super) fn resume(&mut self, stream: u16) -> usize {
        let lane = &mut self.lanes[usize::from(stream)];
        if lane.state == Taking::Stalled {
            lane.state = Taking::Open;
        }
        lane.urgent.len() + lane.copy.len()
    }

    /// Whether something waits on a stream.
    pub(super) fn waits(&self, stream: u16) -> bool {
        !self.lanes[usize::from(stream)].is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Arc<Answer> {
        Answer::to_nobody()
    }

    #[test]
    fn what_was_read_before_a_block_became_zero_is_not_sent() {
        let mut queue = Queue::new(DiskLayout::new([1 << 20], 1).unwrap(), &[true]);
        let size = BLOCK_SIZE as u64;
        // Given back before the copy has come there.
        queue.trimmed(0, 0, size);
        assert_eq!(queue.take_uncertain(8), [BlockIndex(0)]);
        queue.zero(0, 0, size, answer());
        queue.settle(BlockIndex(0), vec![1; BLOCK_SIZE]);
        assert_eq!((queue.pieces(), queue.uncertain()), (0, 1));
    }

    #[test]
    fn who_waits_for_room_has_it_before_everything_has_gone() {
        let mut queue = Queue::new(DiskLayout::new([64 << 20], 1).unwrap(), &[true]);
        let written = 9 << 20;
        for at in (0..written).step_by(4096) {
            queue.write(0, at + 512, vec![1; 2048], answer());
        }
        let (guests, copys) = (answer(), answer());
        let waiting = [Arc::downgrade(&guests), Arc::downgrade(&copys)];
        for at in 0..5 {
            queue.write(0, (32 + at) << 20, vec![1; 1 << 20], answer());
        }
        for at in (0..2 * written).step_by(4096) {
            queue.write(0, at + 512, vec![1; 2048], answer());
        }
        queue.write(0, 512, vec![1; 512], guests);
        queue.write(0, 40 << 20, vec![1; 1 << 20], copys);
        assert!(waiting.iter().all(|waiting| waiting.upgrade().is_some()));
        let waits = |queue: &mut Queue, who: usize| {
            let mut frames = 0;
            while waiting[who].upgrade().is_some() {
                drop(queue.take(0, true, &mut Vec::new()));
                frames += 1;
            }
            assert!(frames > 0 && queue.pieces() > 0, "{frames}");
        };
        waits(&mut queue, 0);
        waits(&mut queue, 1);
    }

    #[test]
    fn a_guest_that_is_held_back_waits_for_what_it_has_written_to_go() {
        let mut queue = Queue::new(DiskLayout::new([64 << 20], 1).unwrap(), &[true]);
        queue.hold_back(64 << 10);
        let answers: Vec<Arc<Answer>> = (0..3).map(|_| answer()).collect();
        let waiting: Vec<_> = answers.iter().map(Arc::downgrade).collect();
        for (at, answer) in (0..).zip(answers) {
            queue.write(0, (at << 20) + 512, vec![1; 60 << 10], answer);
        }
        let waits = || waiting.iter().map(|waiting| waiting.upgrade().is_some()).collect::<Vec<_>>();
        assert!(!waits()[0] && waits()[2], "{:?}", waits());
        while queue.pieces() > 0 {
            drop(queue.take(0, true, &mut Vec::new()));
        }
        assert_eq!(waits(), [false; 3]);
    }

    impl Queue {
        fn pieces(&self) -> usize {
            self.lanes.iter().map(|lane| lane.urgent.len() + lane.copy.len()).sum()
        }
    }
}
