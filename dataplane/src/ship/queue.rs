//! The queue of numbered records of a stream, and the room in it.
//!
//! Room is taken before a write is issued, so that a number, once drawn, always has a place: from there on nothing can
//! fail. It is counted in bytes of buffers, not of data: what runs out is buffers. Numbers come from one atomic counter
//! (other threads may draw later); here records are pushed in the order in which they are drawn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_wire::record::{Record, RecordKind};

use crate::io::Nanos;
use crate::resync::pace::Budget;
use crate::seal::HashKey;
use crate::sealers::{Entry, Payload};

/// Room that a record without a buffer takes, bytes.
pub const SMALL_COST: usize = 128;

/// Answer to the question for room.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Room {
    /// Taken: go on.
    Taken,
    /// Wait: the owner of the queue will say.
    Wait,
    /// There is none: pass uncaptured.
    Pass,
}

/// Who waits for room.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Index of the disk.
    pub disk: u32,
    /// Its operation.
    pub slot: u32,
    /// Bytes wanted.
    pub cost: usize,
    /// Since when.
    pub since: Nanos,
}

/// What a record says, before it has a number.
#[derive(Copy, Clone, Debug)]
pub struct Event {
    /// Kind.
    pub kind: RecordKind,
    /// Slot of the disk in the stream.
    pub disk: u16,
    /// Byte offset.
    pub offset: u64,
    /// Bytes of the disk.
    pub len: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Queue {
    numbers: Arc<AtomicU64>,
    pub(super) entries: VecDeque<Entry>,
    /// Payload bytes of `entries`.
    pub(super) payload: usize,
    /// Room held by `entries`.
    pub(super) raw: usize,
    /// Room held by writes under way.
    taken: usize,
    /// Room held by frames.
    pub(super) frames: usize,
    limit: usize,
    /// Whoever waits, first come first.
    pub waiters: VecDeque<Waiter>,
    /// The link works: it is worth waiting for room.
    pub healthy: bool,
    /// Nothing is captured any more (fenced).
    pub closed: bool,
    /// Hosts' writes are answered when they are acknowledged: see `source::synchronous`.
    pub holds_answers: bool,
    /// Room ran out; everything passes until the queue is half empty.
    pub overflow: bool,
    /// The pool is short of buffers: as good as no room.
    pub pressed: bool,
    /// A synchronisation has begun since someone last looked.
    pub incomplete_since: Option<Nanos>,
    /// Hashes what a synchronisation asks about; without it, it sends everything.
    pub hash_key: Option<Arc<HashKey>>,
    /// Questions of synchronisations that wait for their answer.
    pub asked: usize,
    /// What synchronisations may read.
    pub budget: Budget,
    /// Records pushed.
    pub records: u64,
    /// Bytes of disk that they cover.
    pub bytes: u64,
    /// Writes that passed.
    pub passed: u64,
    /// What [`NumberAfterAnswer`](crate::mutant::Mutant::NumberAfterAnswer) keeps back.
    #[cfg(feature = "mutants")]
    late: Option<(Event, Payload, usize, Nanos, u64)>,
}

impl Queue {
    /// An empty queue of `limit` bytes; the first record gets `first`.
    pub fn new(limit: usize, first: u64) -> Self {
        Self {
            numbers: Arc::new(AtomicU64::new(first - 1)),
            entries: VecDeque::with_capacity(4096),
            payload: 0,
            raw: 0,
            taken: 0,
            frames: 0,
            limit,
            waiters: VecDeque::with_capacity(1024),
            healthy: false,
            closed: false,
            holds_answers: false,
            overflow: false,
            pressed: false,
            incomplete_since: None,
            hash_key: None,
            asked: 0,
            budget: Budget::default(),
            records: 0,
            bytes: 0,
            passed: 0,
            #[cfg(feature = "mutants")]
            late: None,
        }
    }

    /// Asks for room.
    pub fn take(&mut self, cost: usize) -> Room {
        if self.closed || self.overflow {
            Room::Pass
        } else if self.waiters.is_empty() && self.fits(cost) {
            self.taken += cost;
            Room::Taken
        } else if self.healthy {
            Room::Wait
        } else {
            self.overflow = true;
            Room::Pass
        }
    }

    /// Takes room for a synchronisation, if that leaves the queue filled to `share` bytes at most.
    pub fn take_share(&mut self, cost: usize, share: usize) -> bool {
        let free = !self.closed && !self.overflow && self.waiters.is_empty() && !self.pressed;
        let taken = free && (self.used() + cost <= share || self.used() == 0);
        self.taken += if taken { cost } else { 0 };
        taken
    }

    fn fits(&self, cost: usize) -> bool {
        !self.pressed && self.used() + cost <= self.limit
    }

    /// The first waiter, if there is room for it now; the room is taken.
    pub fn grant(&mut self) -> Option<Waiter> {
        let waiter = *self.waiters.front()?;
        if !self.fits(waiter.cost) {
            return None;
        }
        self.waiters.pop_front();
        self.taken += waiter.cost;
        Some(waiter)
    }

    /// Gives room back that was taken and not used.
    pub fn give_back(&mut self, cost: usize) {
        debug_assert!(self.taken >= cost);
        self.taken -= cost;
    }

    /// Draws the next number for a record and puts it in its place. `cost` is the room it holds from now on, out of
    /// `taken`, the room that was taken for it (0 for marks, which need none).
    pub fn push(&mut self, event: Event, payload: Payload, taken: usize, cost: usize, now: Nanos, wall: u64) -> u64 {
        #[cfg(feature = "mutants")]
        if mutant!(NumberAfterAnswer) {
            if self.late.is_none() && event.kind == RecordKind::Write {
                self.taken -= taken;
                self.late = Some((event, payload, cost, now, wall));
                return self.last_seq() + 2;
            }
            let seq = self.number(event, payload, taken, cost, now, wall);
            if let Some((event, payload, cost, now, wall)) = self.late.take() {
                self.number(event, payload, 0, cost, now, wall);
            }
            return seq;
        }
        self.number(event, payload, taken, cost, now, wall)
    }

    fn number(&mut self, event: Event, payload: Payload, taken: usize, cost: usize, now: Nanos, wall: u64) -> u64 {
        let seq = self.numbers.fetch_add(1, Ordering::Relaxed) + 1;
        debug_assert!(self.entries.back().is_none_or(|last| last.record.seq + 1 == seq));
        debug_assert!(self.taken >= taken);
        self.taken -= taken;
        self.raw += cost;
        let payload_len = payload.bytes().len();
        self.payload += payload_len;
        self.records += 1;
        self.bytes += u64::from(event.len);
        let record = Record {
            seq,
            kind: event.kind,
            disk: event.disk,
            offset: event.offset,
            len: event.len,
            mono_ns: now,
            wall_ns: wall,
            payload_at: 0,
            payload_len: payload_len as u32,
            crc: 0,
        };
        self.entries.push_back(Entry { record, payload, cost });
        seq
    }

    /// Forgets every record; the next one gets at least `first`. Returns the number it will get.
    pub fn restart(&mut self, first: u64) -> u64 {
        self.entries.clear();
        self.payload = 0;
        self.raw = 0;
        self.frames = 0;
        self.asked = 0;
        let last = self.last_seq().max(first.saturating_sub(1));
        self.numbers.store(last, Ordering::Relaxed);
        last + 1
    }

    /// Newest number drawn.
    pub fn last_seq(&self) -> u64 {
        self.numbers.load(Ordering::Relaxed)
    }

    /// Room in use.
    pub fn used(&self) -> usize {
        self.raw + self.taken + self.frames
    }

    /// Room that records not yet sealed hold.
    pub fn raw(&self) -> usize {
        self.raw
    }

    /// Room in all.
    pub fn limit(&self) -> usize {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Event = Event { kind: RecordKind::Zero, disk: 0, offset: 0, len: 4096 };

    #[test]
    fn room_is_bounded_and_waits_while_the_link_works() {
        let mut queue = Queue::new(1000, 1);
        queue.healthy = true;
        assert_eq!(queue.take(900), Room::Taken);
        assert_eq!(queue.take(200), Room::Wait);
        queue.waiters.push_back(Waiter { disk: 0, slot: 0, cost: 200, since: 0 });
        // Nobody overtakes one that waits.
        assert_eq!(queue.take(50), Room::Wait);
        assert_eq!(queue.grant(), None);
        queue.give_back(900);
        assert!(queue.grant().is_some());
        assert_eq!(queue.used(), 200);
    }

    #[test]
    fn room_is_not_waited_for_without_a_link() {
        let mut queue = Queue::new(1000, 1);
        assert_eq!(queue.take(1001), Room::Pass);
        assert!(queue.overflow);
        assert_eq!(queue.take(1), Room::Pass);
    }

    #[test]
    fn numbers_rise_without_gaps() {
        let mut queue = Queue::new(1000, 42);
        assert_eq!(queue.take(SMALL_COST), Room::Taken);
        assert_eq!(queue.push(EVENT, Payload::None, SMALL_COST, SMALL_COST, 0, 0), 42);
        assert_eq!(queue.push(EVENT, Payload::None, 0, SMALL_COST, 0, 0), 43);
        assert_eq!(queue.restart(10), 44);
        assert_eq!(queue.restart(100), 100);
        assert_eq!(queue.last_seq(), 99);
        assert_eq!(queue.used(), 0);
    }
}
