//! The way of a piece of a write, zero or discard through a disk, step by step; see the drawing in `capture`.

use afterimage_wire::record::RecordKind;

use super::{Active, Disk, Flow, Kind, NEVER, Piece, Stage, kind};
use crate::host::HEADROOM;
use crate::intent::Outcome;
use crate::io::{Done, Errno, Io, Op, Part};
use crate::sealers::Payload;
use crate::ship::{Event, Room, SMALL_COST, Waiter};

/// Longest zero piece, bytes: a record each.
const MAX_ZERO: u64 = 1 << 30;
/// Longest piece of zeros that are written where the file cannot zero by itself, bytes.
const MAX_WRITTEN_ZEROS: u64 = 256 << 10;

impl Disk {
    /// Begins the next piece of a request: what it is, its buffer, its range.
    pub(super) fn begin_piece<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let block = u64::from(self.info.block);
        let cannot_zero = self.cannot_zero;
        let op = &mut self.active[slot as usize];
        let whole = op.at.is_multiple_of(block) && op.end - op.at >= block;
        // Zeroes that may unmap are done in either way, the others only by keeping the range allocated.
        let unsupported = match op.kind {
            Kind::Zero { unmap, fast_only } => (cannot_zero[0] && (cannot_zero[1] || !unmap)).then_some(fast_only),
            Kind::Discard => cannot_zero[1].then_some(true),
            Kind::Write | Kind::Read | Kind::Free => None,
        };
        if unsupported == Some(true) {
            return self.finish(f, slot, Err(Errno::OPNOTSUPP));
        }
        op.start = op.at - op.at % block;
        (op.piece, op.to) = match op.kind {
            Kind::Zero { .. } if !whole => (Piece::Data, op.end.min(op.start + block)),
            Kind::Zero { .. } if unsupported.is_some() => {
                (Piece::Zeros, (op.end - op.end % block).min(op.at + MAX_WRITTEN_ZEROS))
            }
            Kind::Zero { unmap, .. } => {
                (Piece::Native { unmap: unmap && !cannot_zero[1] }, (op.end - op.end % block).min(op.at + MAX_ZERO))
            }
            Kind::Discard => (Piece::Native { unmap: true }, op.end.min(op.at + MAX_ZERO)),
            Kind::Write | Kind::Read | Kind::Free => (Piece::Data, op.end),
        };
        op.stop = op.to.next_multiple_of(block);
        if op.data.is_none() && !matches!(op.piece, Piece::Native { .. }) {
            let len = (op.to - op.at) as usize;
            let at = HEADROOM + (op.at % HEADROOM as u64) as usize;
            let Some(mut buf) = f.io.pool().take(at + len + HEADROOM) else {
                op.stage = Stage::Buffer;
                return self.starved.push_back(slot);
            };
            buf[at..at + len].fill(0);
            op.data = Some(Part { buf, at, len });
        }
        op.stage = Stage::Lock;
        let (start, stop) = (op.start, op.stop);
        let (id, held) = self.lock_range(start, stop, slot);
        self.active[slot as usize].lock = Some(id);
        if held {
            self.complete_blocks(f, slot);
        }
    }

    /// The range is held: blocks that the data covers only partly are completed from the disk, in the buffer.
    pub(super) fn complete_blocks<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &self.active[slot as usize];
        if op.piece == Piece::Data && op.at > op.start {
            self.read_block(f, slot, Stage::Head);
        } else {
            self.complete_tail(f, slot);
        }
    }

    fn complete_tail<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &self.active[slot as usize];
        if op.piece == Piece::Data && op.stop > op.to {
            return self.read_block(f, slot, Stage::Tail);
        }
        self.completed_blocks(f, slot);
    }

    fn completed_blocks<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &mut self.active[slot as usize];
        if op.piece == Piece::Data
            && let Some(part) = &mut op.data
        {
            part.at -= (op.at - op.start) as usize;
            part.len = (op.stop - op.start) as usize;
        }
        self.set_bits(f, slot);
    }

    /// Reads one block into the page in front of the data.
    fn read_block<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, stage: Stage) {
        let len = self.info.block as usize;
        let token = self.token(kind::HOST, slot);
        let op = &mut self.active[slot as usize];
        op.stage = stage;
        let Some(part) = op.data.take() else { return };
        let offset = if stage == Stage::Head { op.start } else { op.stop - len as u64 };
        // The data's place is not forgotten: it begins in the next page, congruent to the offset.
        let at = part.at - part.at % HEADROOM - HEADROOM;
        f.io.submit(token, Op::Read { file: self.file, offset, part: Part { buf: part.buf, at, len } });
    }

    fn block_read<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, done: Done) {
        let block = self.info.block as usize;
        let op = &mut self.active[slot as usize];
        let (Ok(_), Some(mut part)) = (done.result, done.part) else {
            let errno = done.result.err().unwrap_or(Errno::IO);
            let message = format!("reading a block at {} to complete it: {errno}", op.start);
            self.fault(message);
            self.let_go(f, slot, Outcome::default());
            return self.finish(f, slot, Err(errno));
        };
        let front = part.at;
        let at = front + HEADROOM + (op.at % HEADROOM as u64) as usize;
        let len = (op.to - op.at) as usize;
        let before = (op.at - op.start) as usize;
        let behind = (op.stop - op.to) as usize;
        let head = op.stage == Stage::Head;
        let one_block = op.stop - op.start == block as u64;
        if head {
            part.buf.copy_within(front..front + before, at - before);
        }
        if !head || one_block {
            part.buf.copy_within(front + block - behind..front + block, at + len);
        }
        op.data = Some(Part { buf: part.buf, at, len });
        if head && !one_block {
            self.complete_tail(f, slot);
        } else {
            self.completed_blocks(f, slot);
        }
    }

    /// The data is whole blocks: the extents' bits must be durable next.
    fn set_bits<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &mut self.active[slot as usize];
        if let Some(log) = &mut self.log {
            op.held = true;
            if !log.hold(op.start, op.stop) && !mutant!(BitNotAwaited) {
                op.stage = Stage::Log;
                self.log_waiters.push(slot);
                log.pump(f.io);
                return;
            }
        }
        self.take_room(f, slot);
    }

    /// A write of the log has ended.
    pub(super) fn bits_waited<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &self.active[slot as usize];
        let Some(log) = &self.log else { return };
        if log.ready(op.start, op.stop) {
            self.take_room(f, slot);
        } else if log.is_broken() {
            // Written without its bit, a crash would leave a difference that nobody knows of.
            self.let_go(f, slot, Outcome::default());
            self.finish(f, slot, Err(Errno::IO));
        } else {
            self.log_waiters.push(slot);
        }
    }

    fn take_room<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &mut self.active[slot as usize];
        let Some(queue) = f.queue.as_deref_mut() else { return self.issue(f, slot) };
        let cost = op.data.as_ref().map_or(SMALL_COST, |part| part.buf.len());
        match queue.take(cost) {
            Room::Taken => self.room_granted(f, slot, cost),
            Room::Wait => {
                op.stage = Stage::Room;
                queue.waiters.push_back(Waiter { disk: self.key.0, slot, cost, since: f.io.now() });
            }
            Room::Pass => self.pass(f, slot),
        }
    }

    /// There is room: `cost` bytes have been taken.
    pub fn room_granted<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, cost: usize) {
        let op = &mut self.active[slot as usize];
        op.room = cost;
        op.captured = true;
        self.issue(f, slot);
    }

    /// There is no room: the write goes uncaptured, and its extents into the dirty map. From here on no point of the
    /// stream holds this disk, which the begin of a synchronisation says in the stream before the disk is changed.
    pub fn pass<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &mut self.active[slot as usize];
        op.captured = false;
        if let Some(log) = &mut self.log
            && !mutant!(PassedNotDirty)
        {
            log.mark_dirty(op.start, op.stop);
        }
        self.begin_sync(f, false);
        if let Some(queue) = f.queue.as_deref_mut() {
            queue.passed += 1;
        }
        self.issue(f, slot);
    }

    fn issue<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let token = self.token(kind::HOST, slot);
        let file = self.file;
        if mutant!(NumberAtSubmission) {
            self.number_now(f, slot);
        }
        let op = &mut self.active[slot as usize];
        op.stage = Stage::Disk;
        let offset = op.start;
        let next = match (op.piece, op.data.take()) {
            (Piece::Native { unmap }, _) => Op::Zero { file, offset, len: op.stop - op.start, unmap },
            (_, Some(part)) => Op::Write { file, offset, part, durable: op.fua && !mutant!(FuaIgnored) },
            (_, None) => {
                // Cannot be: such pieces have a buffer. Nothing is written, the host hears of it.
                self.let_go(f, slot, Outcome::default());
                return self.finish(f, slot, Err(Errno::IO));
            }
        };
        f.io.submit(token, next);
    }

    /// The bug of [`NumberAtSubmission`](crate::mutant::Mutant::NumberAtSubmission).
    fn number_now<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &mut self.active[slot as usize];
        if let (true, Some(part), Some(queue)) = (op.captured, &op.data, f.queue.as_deref_mut()) {
            let copy = Payload::Mark(part.buf[part.at..part.at + part.len].to_vec());
            let event = event(RecordKind::Write, self.config.slot, op);
            queue.push(event, copy, 0, SMALL_COST, f.io.now(), f.io.wall());
            op.captured = false;
            if let Some(id) = op.lock.take() {
                self.unlock_range(id);
            }
        }
    }

    /// Takes a completion of a write, a zero, or a read that completes blocks.
    pub(super) fn piece_done<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, done: Done) {
        let op = &mut self.active[slot as usize];
        if op.stage != Stage::Disk {
            return self.block_read(f, slot, done);
        }
        match done.result {
            Ok(_) => {
                op.data = done.part;
                self.written(f, slot);
            }
            Err(Errno::OPNOTSUPP) if matches!(op.piece, Piece::Native { .. }) => {
                // Nothing has changed; the piece begins again in another way.
                if let Piece::Native { unmap } = op.piece {
                    self.cannot_zero[usize::from(unmap)] = true;
                }
                self.let_go(f, slot, Outcome::default());
                self.begin_piece(f, slot);
            }
            Err(errno) => self.failed(f, slot, errno),
        }
    }

    /// The disk has it: it becomes a record before anything else happens.
    fn written<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let op = &mut self.active[slot as usize];
        let durable = op.fua && !matches!(op.piece, Piece::Native { .. });
        let epoch = if durable { 0 } else { self.flush.note_write() };
        let data = op.data.take();
        let mut seq = None;
        if op.captured
            && !(mutant!(DiscardNotRecorded) && op.kind == Kind::Discard)
            && self.out.is_none()
            && let Some(queue) = f.queue.as_deref_mut()
        {
            let taken = std::mem::take(&mut op.room);
            let (kind, payload, cost) = match (op.piece, op.kind, data) {
                (Piece::Data, _, Some(part)) => (RecordKind::Write, Payload::Part(part), taken),
                (_, Kind::Discard, _) => (RecordKind::Discard, Payload::None, SMALL_COST),
                _ => (RecordKind::Zero, Payload::None, SMALL_COST),
            };
            let event = event(kind, self.config.slot, op);
            seq = Some(queue.push(event, payload, taken, cost, f.io.now(), f.io.wall()));
        }
        if op.captured
            && self.out.is_some()
            && let Some(log) = &mut self.log
        {
            // The disk was taken out of the stream meanwhile: what it holds more than the replica is in the log.
            log.mark_dirty(op.start, op.stop);
        }
        op.seq = if f.queue.is_some() { op.seq.max(seq.unwrap_or(NEVER)) } else { 0 };
        op.at = op.to;
        let finished = op.at == op.end;
        self.let_go(f, slot, Outcome { seq, epoch, stuck: false });
        if finished {
            self.finish(f, slot, Ok(None));
        } else {
            self.begin_piece(f, slot);
        }
    }

    /// The disk failed it: nobody knows what the range holds now.
    fn failed<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, errno: Errno) {
        let epoch = self.flush.note_write();
        let op = &mut self.active[slot as usize];
        let mut seq = None;
        if op.captured
            && self.out.is_none()
            && let Some(queue) = f.queue.as_deref_mut()
        {
            let event = event(RecordKind::Unreadable, self.config.slot, op);
            let taken = std::mem::take(&mut op.room);
            seq = Some(queue.push(event, Payload::None, taken, SMALL_COST, f.io.now(), f.io.wall()));
        }
        let (start, len) = (op.start, op.stop - op.start);
        if let Some(log) = &mut self.log {
            log.mark_dirty(op.start, op.stop);
            self.sync.suspect(f.io.now());
        }
        self.failed_writes += 1;
        self.fault(format!("writing {len} bytes at {start}: {errno}"));
        self.let_go(f, slot, Outcome { seq, epoch, stuck: false });
        self.finish(f, slot, Err(errno));
    }

    /// Gives back all that a piece holds.
    fn let_go<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, outcome: Outcome) {
        let op = &mut self.active[slot as usize];
        if std::mem::take(&mut op.held)
            && let Some(log) = &mut self.log
        {
            log.release(op.start, op.stop, outcome);
        }
        let room = std::mem::take(&mut op.room);
        op.captured = false;
        if op.kind != Kind::Write {
            op.data = None;
        }
        if room > 0
            && let Some(queue) = f.queue.as_deref_mut()
        {
            queue.give_back(room);
        }
        if let Some(id) = op.lock.take() {
            self.unlock_range(id);
        }
    }
}

fn event(kind: RecordKind, disk: u16, op: &Active) -> Event {
    Event { kind, disk, offset: op.start, len: (op.stop - op.start) as u32 }
}
