//! Synchronisation of a disk while it is being written: the first one, a whole one, or that of what is in doubt.
//!
//! Between its begin and its end in the stream, no point holds the disk. What it reads is the dirty map of the
//! write-intent log, extent by extent; a whole one begins with all of it. A write that passes uncaptured meanwhile puts
//! its extent back into the map, before it is issued.
//!
//! ```text
//! dirty extents ─▶ stretch ─▶ pieces: read, hashed ─▶ record of hashes ─▶ target compares ─▶ answer
//!                     ▲                                                                        │ what differs
//!                     └── every piece settled: the stretch is done ◀── read again, sent ◀──────┘
//! ```
//! A piece takes its range like a write, reads it, and draws the numbers of its records before it lets the range go: so
//! whatever a host writes there later is numbered later. Hashes are records like any other: the target compares them with
//! what it holds *at that place*, so equal means that the replica has had these bytes from there on. What differs is read
//! again, in a piece of its own, for the disk may have changed since. The end is drawn when every answer has come and
//! every record of what differed is drawn.
//!
//! What is lost on the way is asked again: a new connection repeats the questions that its target took and whose answers
//! it may not have sent; a new incarnation finds every extent that is not done and acknowledged in the map. Where a whole
//! synchronisation meets a long run of differences (an empty replica), it sends without asking, and asks again now and
//! then. What is zero is said, not sent.
//!
//! Reads take at most a share of the queue, so they do not push writes out of it, and fewer at a time while a host has
//! requests under way. `pieces` has the way of a piece, `pace` the throttle, `grow` a disk that becomes larger.

use std::collections::VecDeque;

use afterimage_wire::intent::EXTENT;
use afterimage_wire::record::{HASH_STEP, MAX_HASHES, RecordKind, SyncMark, hashes};

use crate::capture::{Disk, Flow, Gate};
use crate::io::{Io, Nanos};
use crate::sealers::Payload;
use crate::ship::{Event, SMALL_COST};

mod grow;
pub(crate) mod pace;
mod pieces;

use pace::Meter;
use pieces::{Mode, PieceRead};

/// Pieces of a disk that are read at a time.
const DEPTH: usize = 8;
/// … while a host has requests under way on it.
const BUSY_DEPTH: usize = 2;
/// Bytes of a piece: what one record of hashes can stand for.
const PIECE: u64 = HASH_STEP as u64 * MAX_HASHES as u64;
/// Stretches of a disk that are begun and not done.
const MAX_STRETCHES: usize = 64;
/// Questions of a disk that wait for their answer.
const MAX_ASKED: usize = 256;
/// Questions of a stream that wait for their answer. The target keeps more than this.
const MAX_ASKED_IN_STREAM: usize = 1024;
/// If no answer comes for this long although the oldest question is at the target, it is taken for "all of it".
const PATIENCE: Nanos = 60_000_000_000;
/// Of a run of pieces that differ altogether, one more in so many is sent without asking: what that sends in vain at the
/// end of the run stays within this part of it.
const RUN_PART: u32 = 32;
/// Longest hole that one record covers.
const MAX_HOLE: u64 = 1 << 30;
/// What a failed write left is read again after this time.
const SUSPECT_DELAY: Nanos = 1_000_000_000;

#[derive(Debug)]
struct Running {
    sync: u64,
    whole: bool,
}

/// Extents that follow one another, taken out of the dirty map together.
#[derive(Copy, Clone, Debug, Default)]
struct Stretch {
    used: bool,
    start: u64,
    end: u64,
    /// Pieces have been begun up to here.
    next: u64,
    hole: bool,
    /// Pieces begun and not settled: being read, asked about, or to be read again.
    open: u32,
}

/// A question that waits for its answer.
#[derive(Copy, Clone, Debug)]
struct Asked {
    seq: u64,
    start: u64,
    end: u64,
    stretch: usize,
}

/// A range of a stretch that is to be read again.
#[derive(Copy, Clone, Debug)]
struct Again {
    start: u64,
    end: u64,
    stretch: usize,
    mode: Mode,
}

/// How far a synchronisation is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub whole: bool,
    pub done: u64,
    pub total: u64,
    /// Bytes compared by hash, and bytes sent, since it began in this life.
    pub compared: u64,
    pub sent: u64,
    /// How long the rest will take, if that can be said.
    pub left: Option<Nanos>,
}

/// State of the synchronisation of one disk; its steps are methods of [`Disk`].
#[derive(Debug)]
pub(crate) struct Resync {
    pub size: u64,
    running: Option<Running>,
    /// The dirty map is gone through from here.
    cursor: u32,
    stretches: Vec<Stretch>,
    /// The stretch whose pieces are being begun.
    current: Option<usize>,
    again: VecDeque<Again>,
    /// By rising number.
    asked: VecDeque<Asked>,
    /// When the last answer came, or the oldest question was not known to be at the target yet.
    patient_since: Nanos,
    /// Newest record that is acknowledged.
    acked: u64,
    pieces: [PieceRead; DEPTH],
    /// Pieces in a row that differed altogether, and how many were sent unasked since the last question.
    run: u32,
    unasked: u32,
    done: u64,
    compared: u64,
    sent: u64,
    meter: Meter,
    suspect_at: Option<Nanos>,
    /// Record of the end that is not acknowledged yet, and whether it was a whole one.
    ended: Option<(u64, bool)>,
    /// The log's header owes a whole synchronisation until this record is acknowledged and this epoch flushed.
    whole_end: Option<(u64, u64)>,
    /// A begin that nobody has been told of.
    begun: Option<bool>,
    /// The target may know of a begin whose end was given up: another synchronisation must end, if only for that.
    pub end_owed: bool,
    /// A whole synchronisation is owed and has not ended. What of it is left is the dirty map.
    pub whole_owed: bool,
}

impl Resync {
    pub fn new(size: u64) -> Self {
        Self {
            size,
            running: None,
            cursor: 0,
            stretches: vec![Stretch::default(); MAX_STRETCHES],
            current: None,
            again: VecDeque::new(),
            asked: VecDeque::new(),
            patient_since: 0,
            acked: 0,
            pieces: Default::default(),
            run: 0,
            unasked: 0,
            done: 0,
            compared: 0,
            sent: 0,
            meter: Meter::default(),
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
    pub fn progress(&self, dirty: usize, now: Nanos) -> Option<Progress> {
        let running = self.running.as_ref()?;
        let begun: u64 = self.stretches.iter().filter(|s| s.used).map(|s| s.end - s.start).sum();
        let left = (dirty as u64 * EXTENT + begun).min(self.size);
        // What an earlier life has done of a whole one counts.
        let (done, total) = if running.whole { (self.size - left, self.size) } else { (self.done, self.done + left) };
        let (compared, sent) = (self.compared, self.sent);
        Some(Progress { whole: running.whole, done, total, compared, sent, left: self.meter.left(left, now) })
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
        self.stretches.fill(Stretch::default());
        self.current = None;
        self.again.clear();
        self.asked.clear();
        self.ended = None;
        self.whole_end = None;
        self.cursor = 0;
        self.meter = Meter::default();
        for piece in &mut self.pieces {
            piece.stale = piece.busy;
        }
    }

    /// Nothing of it is under way, asked or to be read again.
    fn is_settled(&self) -> bool {
        self.stretches.iter().all(|stretch| !stretch.used)
    }

    /// The next piece may go without a question.
    fn may_skip(&self) -> bool {
        self.unasked < self.run / RUN_PART
    }

    /// A piece of a stretch goes with a question or without.
    fn count_piece(&mut self, unasked: bool) {
        if unasked {
            self.unasked += 1;
            self.run = self.run.saturating_add(1);
        } else {
            self.unasked = 0;
        }
    }
}

impl Disk {
    /// Says in the stream that a synchronisation begins, unless one runs that does as much.
    pub fn begin_sync<I: Io>(&mut self, f: &mut Flow<'_, I>, whole: bool) {
        let Some(queue) = f.queue.as_deref_mut() else { return };
        if queue.closed || self.out.is_some() || self.sync.running.as_ref().is_some_and(|r| r.whole || !whole) {
            return;
        }
        // The number of its first record: rises over lives, although nothing is kept.
        let sync = queue.last_seq() + 1;
        queue.incomplete_since.get_or_insert(f.io.now());
        if let Some(log) = &mut self.log {
            log.owe_end();
        }
        let state = &mut self.sync;
        state.begun = Some(whole);
        state.running = Some(Running { sync, whole });
        state.end_owed = false;
        state.ended = None;
        (state.done, state.compared, state.sent) = (0, 0, 0);
        (state.run, state.unasked) = (0, 0);
        if whole {
            state.whole_owed = true;
            state.whole_end = None;
        }
        self.mark_sync(f, RecordKind::SyncBegin, SyncMark { sync, whole });
    }

    /// A whole synchronisation is owed, from zero: whatever was done of one does not count any more.
    pub fn owe_all(&mut self) {
        self.sync.whole_owed = true;
        if let Some(log) = &mut self.log {
            log.set_header(|h| (h.whole_owed, h.mapped) = (true, false));
            log.mark_all();
        }
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
        if self.gate != Gate::Open || self.is_fenced() {
            return;
        }
        let Some(log) = &mut self.log else { return };
        if self.sync.running.is_none() {
            if log.dirty() == 0 || self.sync.suspect_at.is_some_and(|at| f.io.now() < at) {
                return;
            }
            // Without a durable word of it a next life could owe an end and not know it: an extent may be in the map
            // whose bit is not durable yet.
            log.owe_end();
            log.pump(f.io);
            if !log.durable_header().sync_owed {
                return;
            }
            self.begin_sync(f, false);
        }
        self.sync.suspect_at = None;
        self.lose_patience(f);
        while self.issue_piece(f, share) {}
        let left = self.log.as_ref().map_or(0, |log| log.dirty());
        if self.sync.running.is_some()
            && left == 0
            && self.sync.is_settled()
            && f.queue.as_deref().is_some_and(|queue| !queue.overflow)
        {
            self.end_sync(f);
        }
        self.sync.meter.note(self.sync.done, f.io.now());
        self.run(f);
    }

    /// Chooses the next stretch; false if there is nothing, or no place for it.
    fn next_stretch<I: Io>(&mut self, f: &mut Flow<'_, I>) -> bool {
        let sync = &mut self.sync;
        let Some(log) = &mut self.log else { return false };
        let Some(extent) = log.next_dirty(sync.cursor) else { return false };
        let Some(free) = sync.stretches.iter().position(|stretch| !stretch.used) else { return false };
        let start = u64::from(extent) * EXTENT;
        let mut end = (start + EXTENT).min(sync.size);
        let mut hole = false;
        if let Ok(found) = f.io.allocation(self.file, start)
            && found.hole
        {
            let reach = start + found.len.min(MAX_HOLE);
            // Whole extents, and only such as are to be read.
            let reach = if reach >= sync.size { sync.size } else { reach - reach % EXTENT };
            if reach > start {
                (end, hole) = (log.dirty_until(extent, reach).min(reach), true);
            }
        }
        log.sync_begin(start, end);
        sync.cursor = end.div_ceil(EXTENT) as u32;
        sync.stretches[free] = Stretch { used: true, start, end, next: start, hole, open: 0 };
        sync.current = Some(free);
        true
    }

    /// A piece of a stretch is done with; its last one ends the stretch.
    fn settle(&mut self, number: usize) {
        let stretch = &mut self.sync.stretches[number];
        if !stretch.used {
            return;
        }
        stretch.open -= 1;
        if stretch.open == 0 && stretch.next == stretch.end {
            let (start, end) = (stretch.start, stretch.end);
            *stretch = Stretch::default();
            self.sync.done += end - start;
            if let Some(log) = &mut self.log {
                log.sync_done(start, end);
            }
        }
    }

    /// The target has compared the hashes of record `seq`. False if this disk has not asked that (any more).
    pub fn sync_compared<I: Io>(&mut self, f: &mut Flow<'_, I>, seq: u64, differs: u64) -> bool {
        let Ok(at) = self.sync.asked.binary_search_by_key(&seq, |asked| asked.seq) else { return false };
        let Some(asked) = self.sync.asked.remove(at) else { return false };
        if let Some(queue) = f.queue.as_deref_mut() {
            queue.asked = queue.asked.saturating_sub(1);
        }
        self.sync.patient_since = f.io.now();
        let steps = hashes((asked.end - asked.start) as u32) as u32;
        let all = u64::MAX >> (MAX_HASHES as u32 - steps);
        self.sync.run = if differs & all == all { self.sync.run.saturating_add(1) } else { 0 };
        self.sync.compared += asked.end - asked.start;
        self.answered(asked, differs & all);
        true
    }

    /// Ranges that differ are to be read again and sent.
    fn answered(&mut self, asked: Asked, mut differs: u64) {
        while differs != 0 {
            let first = differs.trailing_zeros();
            let run = (!(differs >> first)).trailing_zeros();
            let start = asked.start + u64::from(first) * u64::from(HASH_STEP);
            let end = asked.end.min(start + u64::from(run) * u64::from(HASH_STEP));
            self.sync.stretches[asked.stretch].open += 1;
            self.sync.again.push_back(Again { start, end, stretch: asked.stretch, mode: Mode::Data });
            differs &= u64::MAX.checked_shl(first + run).unwrap_or(0);
        }
        self.settle(asked.stretch);
    }

    /// An answer that never comes (an older target, a fault of it) must not keep the synchronisation from its end.
    fn lose_patience<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        let (now, acked) = (f.io.now(), self.sync.acked);
        if self.sync.asked.front().is_none_or(|oldest| oldest.seq > acked) {
            // Nothing is asked, or it is still on its way: behind a slow link or a full spill that may take long.
            self.sync.patient_since = now;
        }
        if now < self.sync.patient_since + PATIENCE {
            return;
        }
        while let Some(asked) = self.sync.asked.front().filter(|asked| asked.seq <= acked).copied() {
            self.sync.asked.pop_front();
            if let Some(queue) = f.queue.as_deref_mut() {
                queue.asked = queue.asked.saturating_sub(1);
            }
            self.answered(asked, u64::MAX >> (MAX_HASHES as u32 - hashes((asked.end - asked.start) as u32) as u32));
        }
    }

    /// A new connection of the same incarnation, whose target holds everything up to record `held`: what was asked up to
    /// there may have been answered into the old connection, so it is asked again. The rest is sent again, and answered.
    pub fn sync_relinked<I: Io>(&mut self, f: &mut Flow<'_, I>, held: u64) {
        while let Some(asked) = self.sync.asked.front().filter(|asked| asked.seq <= held).copied() {
            self.sync.asked.pop_front();
            if let Some(queue) = f.queue.as_deref_mut() {
                queue.asked = queue.asked.saturating_sub(1);
            }
            let Asked { start, end, stretch, .. } = asked;
            self.sync.again.push_back(Again { start, end, stretch, mode: Mode::Hash });
        }
        self.sync.patient_since = f.io.now();
    }

    /// The target asks for a range to be read again.
    pub fn sync_wanted(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.info.size);
        if offset < end
            && let Some(log) = &mut self.log
        {
            log.mark_dirty(offset, end);
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
        self.sync.acked = acked_seq;
        if let Some((seq, epoch)) = self.sync.whole_end
            && seq <= acked_seq
            && self.flush.flushed() >= epoch
        {
            self.sync.whole_end = None;
            self.sync.whole_owed = false;
            if let Some(log) = &mut self.log {
                log.set_header(|h| (h.whole_owed, h.mapped) = (false, false));
            }
        }
        let (_, whole) = self.sync.ended.filter(|(seq, _)| *seq <= acked_seq)?;
        self.sync.ended = None;
        // One that has begun since owes an end of its own.
        if self.sync.running.is_none()
            && let Some(log) = &mut self.log
        {
            log.set_header(|h| h.sync_owed = false);
        }
        Some(whole)
    }
}
