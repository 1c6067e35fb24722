//! Synchronisation of a disk while it is being written: the first one, a whole one, or that of what is in doubt.
//!
//! Between its begin and its end in the stream, no point holds the disk. Stretch by stretch (an extent, or a hole) the
//! disk is read in pieces; a piece takes its range like a write, reads it, and draws the numbers of its records before
//! it lets the range go: so whatever a host writes there later is numbered later. A whole synchronisation passes over
//! the disk once; then, and in a partial one from the start, the extents of the dirty map are read until there are
//! none. A write that passes uncaptured meanwhile puts its extent back into the map, before it is issued.
//!
//! What is zero is said, not sent. Reads take at most a share of the queue, so they do not push writes out of it.

use afterimage_wire::intent::EXTENT;
use afterimage_wire::record::{RecordKind, SyncMark};

use crate::capture::{Disk, Flow, Gate, SYNC_OWNER, kind};
use crate::intent::Outcome;
use crate::io::{Done, Io, Nanos, Op, Part};
use crate::overlap::LockId;
use crate::sealers::Payload;
use crate::ship::{Event, SMALL_COST};

/// Pieces of a disk that are read at a time.
const DEPTH: usize = 8;
/// Bytes of a piece.
const PIECE: u64 = 256 << 10;
/// Zeros are told from data in steps of this many bytes.
const ZERO_STEP: usize = 64 << 10;
/// A piece that cannot be read is tried in steps of this many bytes.
const MEND_STEP: u64 = 4096;
/// Longest hole that one record covers.
const MAX_HOLE: u64 = 1 << 30;
/// What a failed write left is read again after this time.
const SUSPECT_DELAY: Nanos = 1_000_000_000;

const ZEROS: [u8; 4096] = [0; 4096];

#[derive(Debug, Default)]
struct PieceRead {
    busy: bool,
    start: u64,
    end: u64,
    hole: bool,
    lock: Option<LockId>,
    part: Option<Part>,
    /// Room taken.
    room: usize,
    /// Of a synchronisation that is no longer wanted.
    stale: bool,
    /// Reading in small steps from here: the piece as a whole could not be read.
    mend_at: Option<u64>,
}

#[derive(Debug)]
struct Running {
    sync: u64,
    whole: bool,
}

#[derive(Debug)]
struct Stretch {
    start: u64,
    end: u64,
    next: u64,
    hole: bool,
}

/// How far a synchronisation is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub whole: bool,
    pub done: u64,
    pub total: u64,
}

/// State of the synchronisation of one disk; its steps are methods of [`Disk`].
#[derive(Debug)]
pub(crate) struct Resync {
    size: u64,
    running: Option<Running>,
    /// Where the pass over the whole disk is.
    cursor: u64,
    stretch: Option<Stretch>,
    pieces: [PieceRead; DEPTH],
    done: u64,
    suspect_at: Option<Nanos>,
    /// Record of the end that is not acknowledged yet, and whether it was a whole one.
    ended: Option<(u64, bool)>,
    /// The log's header owes a whole synchronisation until this record is acknowledged and this epoch flushed.
    whole_end: Option<(u64, u64)>,
    /// A begin that nobody has been told of.
    begun: Option<bool>,
    /// The target may know of a begin whose end was given up: another synchronisation must end, if only for that.
    pub end_owed: bool,
    /// The pass over the whole disk is owed and has not ended in this incarnation.
    pub whole_owed: bool,
}

impl Resync {
    pub fn new(size: u64) -> Self {
        Self {
            size,
            running: None,
            cursor: 0,
            stretch: None,
            pieces: Default::default(),
            done: 0,
            suspect_at: None,
            ended: None,
            whole_end: None,
            begun: None,
            end_owed: false,
            whole_owed: false,
        }
    }

    /// Whether one has begun since this was last asked, and whether it is a whole one.
    pub fn take_begun(&mut self) -> Option<bool> {
        self.begun.take()
    }

    /// No read is under way.
    pub fn is_quiet(&self) -> bool {
        self.pieces.iter().all(|p| !p.busy)
    }

    /// Some point since its last begin may not hold the disk, as far as is acknowledged.
    pub fn is_open(&self) -> bool {
        self.running.is_some() || self.ended.is_some()
    }

    /// A synchronisation runs; a whole one?
    pub fn running(&self) -> Option<bool> {
        self.running.as_ref().map(|r| r.whole)
    }

    /// How far it is, given the extents in the dirty map.
    pub fn progress(&self, dirty: usize) -> Option<Progress> {
        let running = self.running.as_ref()?;
        let left = if running.whole { self.size - self.cursor } else { dirty as u64 * EXTENT };
        let stretch = self.stretch.as_ref().map_or(0, |s| s.end - s.next);
        Some(Progress { whole: running.whole, done: self.done, total: self.done + left + stretch })
    }

    /// A write failed: its extent is in the dirty map and read again a little later.
    pub fn suspect(&mut self, now: Nanos) {
        self.suspect_at.get_or_insert(now + SUSPECT_DELAY);
    }

    pub fn deadline(&self) -> Option<Nanos> {
        self.suspect_at.filter(|_| self.running.is_none())
    }

    /// Gives up whatever runs: a new incarnation begins. Reads under way end without a record.
    pub fn reset(&mut self) {
        self.end_owed |= self.is_open() && !mutant!(EndOwedForgotten);
        self.running = None;
        self.stretch = None;
        self.ended = None;
        self.whole_end = None;
        self.cursor = 0;
        self.done = 0;
        for piece in &mut self.pieces {
            piece.stale = piece.busy;
        }
    }
}

impl Disk {
    /// Says in the stream that a synchronisation begins, unless one runs that does as much.
    pub fn begin_sync<I: Io>(&mut self, f: &mut Flow<'_, I>, whole: bool) {
        let Some(queue) = f.queue.as_deref_mut() else { return };
        if queue.closed || self.sync.running.as_ref().is_some_and(|r| r.whole || !whole) {
            return;
        }
        // The number of its first record: rises over lives, although nothing is kept.
        let sync = queue.last_seq() + 1;
        queue.incomplete_since.get_or_insert(f.io.now());
        self.sync.begun = Some(whole);
        self.sync.running = Some(Running { sync, whole });
        self.sync.end_owed = false;
        self.sync.ended = None;
        self.sync.done = 0;
        if whole {
            self.sync.cursor = 0;
            self.sync.whole_owed = true;
            self.sync.whole_end = None;
        }
        self.mark_sync(f, RecordKind::SyncBegin, SyncMark { sync, whole });
    }

    fn mark_sync<I: Io>(&mut self, f: &mut Flow<'_, I>, kind: RecordKind, mark: SyncMark) -> u64 {
        let mut body = Vec::with_capacity(16);
        mark.encode(&mut body);
        let event = Event { kind, disk: self.config.slot, offset: 0, len: 0 };
        let (now, wall) = (f.io.now(), f.io.wall());
        f.queue.as_deref_mut().map_or(0, |q| q.push(event, Payload::Mark(body), 0, SMALL_COST, now, wall))
    }

    /// Goes on with the synchronisation, as far as there is room. Call it while the link works.
    pub fn pump_sync<I: Io>(&mut self, f: &mut Flow<'_, I>, share: usize) {
        if self.gate != Gate::Open || self.is_fenced() || self.log.is_none() {
            return;
        }
        if self.sync.running.is_none() {
            let dirty = self.log.as_ref().is_some_and(|log| log.dirty() > 0);
            if !dirty || self.sync.suspect_at.is_some_and(|at| f.io.now() < at) {
                return;
            }
            self.begin_sync(f, false);
        }
        self.sync.suspect_at = None;
        while self.sync.running.is_some() {
            if self.sync.stretch.is_none() && !self.next_stretch(f) {
                break;
            }
            if !self.issue_pieces(f, share) {
                break;
            }
        }
        self.run(f);
    }

    /// Chooses what to read next; false if there is nothing (the synchronisation then ends) or not yet.
    fn next_stretch<I: Io>(&mut self, f: &mut Flow<'_, I>) -> bool {
        let sync = &mut self.sync;
        let Some(running) = &sync.running else { return false };
        let Some(log) = &mut self.log else { return false };
        let (start, end, hole) = if running.whole && sync.cursor < sync.size {
            let start = sync.cursor;
            let mut end = (start + EXTENT).min(sync.size);
            let allocation = f.io.allocation(self.file, start);
            let mut hole = false;
            if let Ok(found) = allocation
                && found.hole
            {
                let reach = start + found.len.min(MAX_HOLE);
                let reach = if reach >= sync.size { sync.size } else { reach - reach % EXTENT };
                if reach > start {
                    (end, hole) = (reach, true);
                }
            }
            sync.cursor = end;
            (start, end, hole)
        } else if let Some(extent) = log.next_dirty(0) {
            let start = u64::from(extent) * EXTENT;
            (start, (start + EXTENT).min(sync.size), false)
        } else {
            if f.queue.as_deref().is_some_and(|q| !q.overflow) {
                self.end_sync(f);
            }
            return false;
        };
        log.sync_begin(start, end);
        sync.stretch = Some(Stretch { start, end, next: start, hole });
        true
    }

    /// Issues pieces of the stretch; true if the stretch is done.
    fn issue_pieces<I: Io>(&mut self, f: &mut Flow<'_, I>, share: usize) -> bool {
        loop {
            let quiet = self.sync.is_quiet();
            let Some(stretch) = &mut self.sync.stretch else { return true };
            if stretch.next == stretch.end {
                if !quiet {
                    return false;
                }
                let (start, end) = (stretch.start, stretch.end);
                self.sync.stretch = None;
                self.sync.done += end - start;
                if let Some(log) = &mut self.log {
                    log.sync_done(start, end);
                }
                return true;
            }
            let Some(number) = self.sync.pieces.iter().position(|p| !p.busy) else { return false };
            let Some(queue) = f.queue.as_deref_mut() else { return false };
            let start = stretch.next;
            let hole = stretch.hole;
            let end = if hole { stretch.end } else { stretch.end.min(start + PIECE) };
            let part = if hole {
                None
            } else {
                let len = (end - start) as usize;
                let Some(buf) = f.io.pool().take(len) else { return false };
                Some(Part { buf, at: 0, len })
            };
            let room = part.as_ref().map_or(SMALL_COST, |p| p.buf.len());
            if !queue.take_share(room, share) {
                return false;
            }
            stretch.next = end;
            let owner = number as u32 | SYNC_OWNER;
            let (lock, held) = self.lock_range(start, end, owner);
            self.sync.pieces[number] =
                PieceRead { busy: true, start, end, hole, lock: Some(lock), part, room, stale: false, mend_at: None };
            if held {
                self.sync_granted(f, number as u32);
            }
        }
    }

    /// A piece has its range.
    pub fn sync_granted<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32) {
        let piece = &mut self.sync.pieces[number as usize];
        if piece.stale {
            return self.end_piece(f, number);
        }
        if piece.hole {
            // Asked again under the lock: it may have been written while the piece waited.
            let (start, end) = (piece.start, piece.end);
            let hole = f.io.allocation(self.file, start).is_ok_and(|a| a.hole && a.len >= end - start);
            if hole {
                self.record_zeros(f, start, end);
            } else if let Some(log) = &mut self.log {
                log.mark_dirty(start, end);
            }
            return self.end_piece(f, number);
        }
        let Some(part) = piece.part.take() else { return };
        let (file, offset) = (self.file, piece.start);
        if mutant!(ResyncAfterRelease)
            && let Some(lock) = piece.lock.take()
        {
            self.unlock_range(lock);
        }
        f.io.submit(self.token(kind::SYNC, number), Op::Read { file, offset, part });
    }

    /// Takes the completion of a piece's read.
    pub fn sync_done<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32, done: Done) {
        let piece = &mut self.sync.pieces[number as usize];
        let Some(part) = done.part else { return };
        if piece.stale {
            drop(part);
        } else if let Some(at) = piece.mend_at {
            self.mended(f, number, at, done.result.is_ok(), part);
            return self.run(f);
        } else if done.result.is_ok() {
            self.record_piece(f, number, part);
        } else {
            let message = format!("reading {} bytes at {} to synchronise", part.len, piece.start);
            self.fault(message);
            let at = self.sync.pieces[number as usize].start;
            self.mend(f, number, at, part);
            return;
        }
        self.end_piece(f, number);
        self.run(f);
    }

    fn end_piece<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32) {
        let piece = std::mem::take(&mut self.sync.pieces[number as usize]);
        if let Some(queue) = f.queue.as_deref_mut() {
            queue.give_back(piece.room);
        }
        if let Some(lock) = piece.lock {
            self.unlock_range(lock);
        }
    }

    /// Draws the numbers of what a piece found: leading zeros, data, trailing zeros.
    fn record_piece<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32, mut part: Part) {
        let (start, end) = {
            let piece = &self.sync.pieces[number as usize];
            (piece.start, piece.end)
        };
        let data = &part.buf[part.at..part.at + part.len];
        let first = data.chunks(ZERO_STEP).position(|step| !is_zero(step));
        let Some(first) = first else { return self.record_zeros(f, start, end) };
        let last = data.chunks(ZERO_STEP).rposition(|step| !is_zero(step)).unwrap_or(first);
        let data_start = start + (first * ZERO_STEP) as u64;
        let data_end = end.min(start + ((last + 1) * ZERO_STEP) as u64);
        if data_start > start {
            self.record_zeros(f, start, data_start);
        }
        part.at += (data_start - start) as usize;
        part.len = (data_end - data_start) as usize;
        let room = std::mem::take(&mut self.sync.pieces[number as usize].room);
        self.record(f, RecordKind::SyncWrite, data_start, data_end, Payload::Part(part), room, room);
        if data_end < end {
            self.record_zeros(f, data_end, end);
        }
    }

    fn record_zeros<I: Io>(&mut self, f: &mut Flow<'_, I>, start: u64, end: u64) {
        self.record(f, RecordKind::SyncZero, start, end, Payload::None, 0, SMALL_COST);
    }

    #[allow(clippy::too_many_arguments)]
    fn record<I: Io>(
        &mut self,
        f: &mut Flow<'_, I>,
        kind: RecordKind,
        start: u64,
        end: u64,
        payload: Payload,
        taken: usize,
        cost: usize,
    ) {
        let (now, wall) = (f.io.now(), f.io.wall());
        let Some(queue) = f.queue.as_deref_mut() else { return };
        let event = Event { kind, disk: self.config.slot, offset: start, len: (end - start) as u32 };
        let seq = queue.push(event, payload, taken, cost, now, wall);
        if let Some(log) = &mut self.log {
            let stuck = kind == RecordKind::Unreadable;
            log.note(start, end, Outcome { seq: Some(seq), epoch: 0, stuck });
        }
    }

    /// Reads the next small step of a piece that cannot be read as a whole.
    fn mend<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32, at: u64, mut part: Part) {
        let piece = &mut self.sync.pieces[number as usize];
        piece.mend_at = Some(at);
        part.at = 0;
        part.len = MEND_STEP.min(piece.end - at) as usize;
        let file = self.file;
        f.io.submit(self.token(kind::SYNC, number), Op::Read { file, offset: at, part });
    }

    fn mended<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32, at: u64, read: bool, part: Part) {
        let end = at + part.len as u64;
        let payload = if read { Payload::Mark(part.buf[..part.len].to_vec()) } else { Payload::None };
        let kind = if read { RecordKind::SyncWrite } else { RecordKind::Unreadable };
        self.record(f, kind, at, end, payload, 0, SMALL_COST + part.len);
        if end < self.sync.pieces[number as usize].end {
            self.mend(f, number, end, part);
        } else {
            self.end_piece(f, number);
        }
    }

    /// Every record is drawn and nothing is in doubt: the disk is complete from here on.
    fn end_sync<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        let Some(Running { sync, whole }) = self.sync.running.take() else { return };
        let seq = self.mark_sync(f, RecordKind::SyncEnd, SyncMark { sync, whole });
        self.sync.ended = Some((seq, whole));
        if whole {
            // What an earlier life wrote and did not flush has been read, but is on no stable storage.
            self.sync.whole_end = Some((seq, self.flush.epoch()));
            self.flush_own(f);
        }
    }

    /// Takes the acknowledged place; says whether a synchronisation has ended by it (and whether it was a whole one).
    pub fn sync_acked(&mut self, acked_seq: u64) -> Option<bool> {
        if let Some((seq, epoch)) = self.sync.whole_end
            && (seq <= acked_seq && self.flush.flushed() >= epoch || mutant!(WholeOwedForgotten))
        {
            self.sync.whole_end = None;
            self.sync.whole_owed = false;
            if let Some(log) = &mut self.log {
                log.set_header(|h| h.whole_owed = false);
            }
        }
        let (_, whole) = self.sync.ended.filter(|(seq, _)| *seq <= acked_seq)?;
        self.sync.ended = None;
        Some(whole)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|chunk| chunk == &ZEROS[..chunk.len()])
}
