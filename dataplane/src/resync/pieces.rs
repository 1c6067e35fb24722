//! The way of a piece: its range, its read, its hashes or its data in the stream.

use super::{Again, Asked, BUSY_DEPTH, DEPTH, MAX_ASKED, MAX_ASKED_IN_STREAM, PIECE};
use crate::capture::{Disk, Flow, SYNC_OWNER, kind};
use crate::intent::Outcome;
use crate::io::{Done, Io, Op, Part};
use crate::overlap::LockId;
use crate::sealers::Payload;
use crate::ship::{Event, SMALL_COST};
use afterimage_wire::record::{HASH_LEN, RecordKind, hashes};

/// Zeros are told from data in steps of this many bytes.
const ZERO_STEP: usize = 64 << 10;
/// A piece that cannot be read is tried in steps of this many bytes.
const MEND_STEP: u64 = 4096;

const ZEROS: [u8; 4096] = [0; 4096];

/// What becomes of a piece.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    /// Zeros are said.
    Hole,
    /// Read; hashes are sent.
    Hash,
    /// Read; the data is sent.
    #[default]
    Data,
}

/// A piece that is being read, or waits for its range.
#[derive(Debug, Default)]
pub(super) struct PieceRead {
    pub busy: bool,
    start: u64,
    end: u64,
    stretch: usize,
    mode: Mode,
    lock: Option<LockId>,
    part: Option<Part>,
    /// Room taken.
    room: usize,
    /// Of a synchronisation that is no longer wanted.
    pub stale: bool,
    /// Reading in small steps from here: the piece as a whole could not be read.
    mend_at: Option<u64>,
}

impl Disk {
    /// Begins the next piece; false if there is none, or not now.
    pub(super) fn issue_piece<I: Io>(&mut self, f: &mut Flow<'_, I>, share: usize) -> bool {
        let Some(whole) = self.sync.running() else { return false };
        let depth = if self.in_flight() > 0 { BUSY_DEPTH } else { DEPTH };
        if self.sync.pieces.iter().filter(|piece| piece.busy).count() >= depth {
            return false;
        }
        let Some(number) = self.sync.pieces.iter().position(|piece| !piece.busy) else { return false };
        let (next, again) = match self.sync.again.front() {
            Some(again) => (*again, true),
            None => match self.next_piece(f, whole) {
                Some(next) => (next, false),
                None => return false,
            },
        };
        let Again { start, end, stretch, mode } = next;
        let Some(queue) = f.queue.as_deref_mut() else { return false };
        if mode == Mode::Hash && (self.sync.asked.len() >= MAX_ASKED || queue.asked >= MAX_ASKED_IN_STREAM) {
            return false;
        }
        let part = if mode == Mode::Hole {
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
        if mode != Mode::Hole && !queue.budget.take(end - start, f.io.now()) {
            queue.give_back(room);
            return false;
        }
        if again {
            self.sync.again.pop_front();
        } else {
            let stretch = &mut self.sync.stretches[stretch];
            stretch.next = end;
            stretch.open += 1;
            if stretch.next == stretch.end {
                self.sync.current = None;
            }
            // Decided when it was looked at; counted now that it is done.
            if mode != Mode::Hole {
                self.sync.count_piece(mode == Mode::Data);
            }
        }
        let (lock, held) = self.lock_range(start, end, number as u32 | SYNC_OWNER);
        let lock = Some(lock);
        self.sync.pieces[number] =
            PieceRead { busy: true, start, end, stretch, mode, lock, part, room, stale: false, mend_at: None };
        if held {
            self.sync_granted(f, number as u32);
        }
        true
    }

    /// The next piece of the stretch at hand, or of a new one.
    fn next_piece<I: Io>(&mut self, f: &mut Flow<'_, I>, whole: bool) -> Option<Again> {
        if self.sync.current.is_none() && !self.next_stretch(f) {
            return None;
        }
        let number = self.sync.current?;
        let stretch = &self.sync.stretches[number];
        let (start, end) = (stretch.next, stretch.end);
        if stretch.hole {
            return Some(Again { start, end, stretch: number, mode: Mode::Hole });
        }
        let mode = if whole && self.sync.may_skip() { Mode::Data } else { Mode::Hash };
        Some(Again { start, end: end.min(start + PIECE), stretch: number, mode })
    }

    /// A piece has its range.
    pub fn sync_granted<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32) {
        let piece = &mut self.sync.pieces[number as usize];
        if piece.stale {
            return self.end_piece(f, number);
        }
        if piece.mode == Mode::Hole {
            // Asked again under the lock: it may have been written while the piece waited.
            let (start, end) = (piece.start, piece.end);
            let hole = f.io.allocation(self.file, start).is_ok_and(|a| a.hole && a.len >= end - start);
            if hole {
                self.record_zeros(f, start, end);
            } else if let Some(log) = &mut self.log {
                log.mark_dirty(start, end);
            }
            return self.settle_piece(f, number);
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
            self.end_piece(f, number);
        } else if let Some(at) = piece.mend_at {
            self.mended(f, number, at, done.result.is_ok(), part);
        } else if done.result.is_err() {
            let message = format!("reading {} bytes at {} to synchronise", part.len, piece.start);
            let at = piece.start;
            self.fault(message);
            self.mend(f, number, at, part);
        } else if piece.mode == Mode::Hash && !is_zero(&part.buf[part.at..part.at + part.len]) {
            self.ask(f, number, part);
        } else {
            self.record_piece(f, number, part);
            self.settle_piece(f, number);
        }
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

    fn settle_piece<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32) {
        let stretch = self.sync.pieces[number as usize].stretch;
        self.end_piece(f, number);
        self.settle(stretch);
    }

    /// Sends the hashes of a piece. Their number is drawn while its range is held, so they are of the disk at that place
    /// of the stream.
    fn ask<I: Io>(&mut self, f: &mut Flow<'_, I>, number: u32, part: Part) {
        let piece = &mut self.sync.pieces[number as usize];
        let (start, end, stretch) = (piece.start, piece.end, piece.stretch);
        let room = std::mem::take(&mut piece.room);
        let Some(key) = f.queue.as_deref().and_then(|queue| queue.hash_key.clone()) else {
            // Without a key there is nothing to compare with: it is sent.
            self.sync.pieces[number as usize].room = room;
            self.record_piece(f, number, part);
            return self.settle_piece(f, number);
        };
        let mut body = Vec::with_capacity(hashes(part.len as u32) * HASH_LEN);
        key.hashes(self.config.slot, start, &part.buf[part.at..part.at + part.len], &mut body);
        drop(part);
        let cost = SMALL_COST + body.len();
        let seq = self.record(f, RecordKind::SyncHash, start, end, Payload::Mark(body), room, cost);
        self.sync.asked.push_back(Asked { seq, start, end, stretch });
        if let Some(queue) = f.queue.as_deref_mut() {
            queue.asked += 1;
        }
        self.end_piece(f, number);
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
        // A small piece of a large buffer is copied, so that the buffer is not held for it.
        let (payload, cost) = if part.len < part.buf.len() / 8 {
            (Payload::Mark(part.buf[part.at..part.at + part.len].to_vec()), SMALL_COST + part.len)
        } else {
            (Payload::Part(part), room)
        };
        self.sync.sent += data_end - data_start;
        self.record(f, RecordKind::SyncWrite, data_start, data_end, payload, room, cost);
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
    ) -> u64 {
        let (now, wall) = (f.io.now(), f.io.wall());
        let Some(queue) = f.queue.as_deref_mut() else { return 0 };
        let event = Event { kind, disk: self.config.slot, offset: start, len: (end - start) as u32 };
        let seq = queue.push(event, payload, taken, cost, now, wall);
        if let Some(log) = &mut self.log {
            let stuck = kind == RecordKind::Unreadable;
            log.note(start, end, Outcome { seq: Some(seq), epoch: 0, stuck });
        }
        seq
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
        self.sync.sent += payload.bytes().len() as u64;
        self.record(f, kind, at, end, payload, 0, SMALL_COST + part.len);
        if end < self.sync.pieces[number as usize].end {
            self.mend(f, number, end, part);
        } else {
            self.settle_piece(f, number);
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|chunk| chunk == &ZEROS[..chunk.len()])
}
