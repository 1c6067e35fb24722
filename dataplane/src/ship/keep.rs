//! What is kept until it is acknowledged: sealed frames, in memory and in the spill.
//!
//! ```text
//! earlier lives ─▶ │ head │ only in the spill │ tail ◀─ sealed just now
//!                  ▲ acknowledged + 1          ▲ tail_first
//! ```
//! Without a spill the tail is all there is. With one, frames are written to it from the oldest on as memory runs short,
//! and then leave memory, but for a head that the link can take at once; what is only in the spill is read back into the
//! head ahead of the sender. Earlier lives, found in the spill at a start, are shipped first, one after the other; while
//! there is one, the head is its, and the tail is that of the life that still seals.

use std::collections::VecDeque;

use afterimage_wire::frame::{FrameHeader, MAX_FRAME};
use afterimage_wire::ids::IncarnationId;

use super::Shipper;
use crate::io::{Buf, Done, Io, Nanos, Pool};
use crate::spill::{CLOSED_AFTER, Loaded, Past, Prepared, ReadBack, Returned, Spill};

/// Part of the queue that frames read ahead may fill.
const HEAD_SHARE: usize = 8;
/// Frames go to the spill while more than this part of the queue is in use, per cent …
const SPILL_FROM: usize = 50;
/// … while the link takes what is sealed (a burst, a synchronisation), more than this …
const SPILL_FROM_FLOWING: usize = 75;
/// … and, when less than a quarter of all buffers is free, already more than this: other groups need them.
const SPILL_FROM_SHORT: usize = 6;

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum FrameState {
    Sealing,
    /// Sealed, here.
    Ready,
    /// With the kernel, on its way to the target.
    Sending,
    /// With the kernel, on its way to the spill.
    Spilling,
}

#[derive(Debug)]
pub(super) struct Frame {
    pub state: FrameState,
    pub buf: Option<Buf>,
    pub len: usize,
    /// Room of the queue that it takes.
    pub cost: usize,
    pub last_seq: u64,
    /// When its first record was numbered.
    pub oldest: Nanos,
    /// When it was last handed to the network, since boot.
    pub sent_at: Option<Nanos>,
    /// It has been given to the spill …
    given: bool,
    /// … which holds it, and everything before it.
    on_disk: bool,
}

impl Frame {
    pub fn sealing(cost: usize, last_seq: u64, oldest: Nanos) -> Self {
        Self {
            state: FrameState::Sealing,
            buf: None,
            len: 0,
            cost,
            last_seq,
            oldest,
            sent_at: None,
            given: false,
            on_disk: false,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Keep {
    /// Lives that are shipped before this one, oldest first.
    pub past: VecDeque<Past>,
    /// From the first frame on that is not acknowledged, of the life that is shipped.
    head: VecDeque<Frame>,
    /// Room that the head takes.
    head_bytes: usize,
    /// Most that read-ahead may take.
    head_limit: usize,
    /// The newest frames of the life that seals; the first is number `tail_first`.
    pub tail: VecDeque<Frame>,
    tail_first: u64,
    /// The next frame that goes to the spill.
    spill_next: u64,
    /// Room taken by frames of the tail that were given to the spill.
    given_bytes: usize,
    /// When the oldest record was numbered that only the spill holds, of the life that seals.
    gap_oldest: Nanos,
}

impl Keep {
    pub fn new(queue_bytes: usize) -> Self {
        Self {
            past: VecDeque::new(),
            head: VecDeque::with_capacity(64),
            head_bytes: 0,
            head_limit: (queue_bytes / HEAD_SHARE).max(MAX_FRAME),
            tail: VecDeque::with_capacity(256),
            tail_first: 1,
            spill_next: 1,
            given_bytes: 0,
            gap_oldest: 0,
        }
    }

    /// Forgets every frame.
    pub fn clear(&mut self) {
        self.past.clear();
        self.head.clear();
        self.tail.clear();
        (self.head_bytes, self.given_bytes) = (0, 0);
        (self.tail_first, self.spill_next) = (1, 1);
    }

    pub fn in_memory(&self) -> usize {
        self.head.len() + self.tail.len()
    }

    fn head_end(&self, acked: u64) -> u64 {
        acked + 1 + self.head.len() as u64
    }

    /// The first frame behind the head that is in memory, or that there is not, of the life that is shipped.
    fn gap_end(&self) -> u64 {
        self.past.front().map_or(self.tail_first, |past| past.last_frame + 1)
    }

    /// Frames wait that only the spill holds, or of an earlier life.
    pub fn is_behind(&self, acked: u64) -> bool {
        !self.past.is_empty() || self.head_end(acked) < self.tail_first
    }

    pub fn is_empty(&self, acked: u64) -> bool {
        !self.is_behind(acked) && self.head.is_empty() && self.tail.is_empty()
    }

    /// When the oldest record was numbered, of the life that seals.
    pub fn oldest(&self, acked: u64) -> Option<Nanos> {
        let tail = || self.tail.front().map(|frame| frame.oldest);
        if !self.past.is_empty() {
            return if self.tail_first > 1 { Some(self.gap_oldest) } else { tail() };
        }
        let gap = (self.head_end(acked) < self.tail_first).then_some(self.gap_oldest);
        self.head.front().map(|frame| frame.oldest).or(gap).or_else(tail)
    }

    /// A frame of the life that seals.
    pub fn tail_frame(&mut self, number: u64) -> Option<&mut Frame> {
        let at = number.checked_sub(self.tail_first)?;
        self.tail.get_mut(at as usize)
    }

    /// A frame in memory of the life that is shipped.
    pub fn frame(&mut self, acked: u64, number: u64) -> Option<&mut Frame> {
        let at = number.checked_sub(acked + 1)? as usize;
        if at < self.head.len() {
            return self.head.get_mut(at);
        }
        if self.past.is_empty() { self.tail_frame(number) } else { None }
    }

    /// Takes frames off the front up to `number`, of the life that is shipped: room freed, bytes of frames.
    fn drop_to(&mut self, acked: u64, number: u64) -> (usize, u64) {
        let (mut room, mut bytes) = (0, 0);
        for _ in acked..number.min(acked + self.head.len() as u64) {
            // One that is still with the kernel finds no place when it comes back, and is freed then.
            let Some(frame) = self.head.pop_front() else { break };
            self.head_bytes -= frame.cost;
            room += frame.cost;
            bytes += frame.len as u64;
        }
        if self.past.is_empty() && number >= self.tail_first {
            while self.tail_first <= number
                && let Some(frame) = self.tail.pop_front()
            {
                self.tail_first += 1;
                self.given_bytes -= if frame.given { frame.cost } else { 0 };
                room += frame.cost;
                bytes += frame.len as u64;
            }
            self.spill_next = self.spill_next.max(self.tail_first);
        }
        (room, bytes)
    }
}

/// Less than a quarter of all buffers is free.
fn is_short(pool: &Pool) -> bool {
    pool.free_bytes() < pool.total_bytes() / 4
}

impl Shipper {
    /// Earlier lives are shipped first. `acked` is the place of the first of them that is known to be acknowledged.
    pub fn set_past(&mut self, past: VecDeque<Past>, acked: (u64, u64)) {
        self.sent_frame = past.front().map_or(0, |first| first.last_frame);
        self.keep.past = past;
        (self.acked_frame, self.acked_seq) = acked;
        self.next_send = self.acked_frame + 1;
    }

    /// The earlier life that is being shipped, if one is.
    pub fn past(&self) -> Option<&Past> {
        self.keep.past.front()
    }

    /// Whose frames the connection carries.
    pub fn shipped_incarnation(&self) -> IncarnationId {
        self.past().map_or(self.incarnation, |past| past.incarnation)
    }

    /// Everything of the life that is shipped is acknowledged, and there is another one.
    pub fn is_life_over(&self) -> bool {
        self.past().is_some_and(|past| self.acked_frame >= past.last_frame)
    }

    /// Goes on with the next life. `first_seq` is the first record of the one that seals.
    pub fn next_life(&mut self, io: &mut impl Io, spill: Option<&mut Spill>, first_seq: u64) {
        let Some(over) = self.keep.past.pop_front() else { return };
        if let Some(spill) = spill {
            spill.drop_life(io, over.incarnation);
        }
        self.keep.head.clear();
        self.keep.head_bytes = 0;
        let (first, last) = self.past().map_or((first_seq, 0), |next| (next.first_seq, next.last_frame));
        (self.acked_frame, self.acked_seq) = (0, first - 1);
        self.sent_frame = last;
        self.next_send = 1;
    }

    /// Everything up to this frame is durable at the target. `seq`, if known, must be its last record. False if that
    /// cannot be.
    pub fn ack(&mut self, frame: u64, seq: Option<u64>) -> bool {
        if frame <= self.acked_frame {
            return true;
        }
        if frame > self.sent_frame {
            return false;
        }
        let ends = self.past().filter(|past| past.last_frame == frame).map(|past| past.last_seq);
        let last_seq = match (self.keep.frame(self.acked_frame, frame).map(|frame| frame.last_seq).or(ends), seq) {
            (Some(known), Some(seq)) if known != seq => return false,
            (Some(known), _) => known,
            // Only the spill has it: its successor, when it is read, must go on from there.
            (None, Some(seq)) if seq > self.acked_seq => seq,
            (None, _) => return false,
        };
        if frame >= self.word_from {
            let sent_at = self.keep.frame(self.acked_frame, frame).and_then(|frame| frame.sent_at);
            self.word_at = self.word_at.max(sent_at);
        }
        let (room, bytes) = self.keep.drop_to(self.acked_frame, frame);
        self.queue.frames -= room;
        self.drained_bytes += bytes;
        self.acked_frame = frame;
        self.acked_seq = last_seq;
        self.durable_seq = last_seq;
        self.next_send = self.next_send.max(frame + 1);
        true
    }

    /// Gives frames to the spill as far as memory is short (`all`: every one), and lets go of the memory of those that
    /// it holds.
    pub fn spill(&mut self, io: &mut impl Io, spill: &mut Spill, all: bool) {
        while let Some(returned) = spill.take_returned() {
            self.returned(returned);
        }
        let share = match (is_short(io.pool()), self.is_flowing()) {
            (true, _) => SPILL_FROM_SHORT,
            (false, true) => SPILL_FROM_FLOWING,
            (false, false) => SPILL_FROM,
        };
        let most = self.queue.limit() / 100 * share;
        while all || self.queue.used() - self.keep.given_bytes > most {
            let number = self.keep.spill_next;
            let Some(frame) = self.keep.tail_frame(number) else { break };
            let (FrameState::Ready, Some(buf)) = (frame.state, &frame.buf) else { break };
            let Ok(header) = FrameHeader::parse(buf) else { break };
            let (first, len) = ((number, header.first_seq.get()), frame.len);
            if spill.prepare(io, first, len) == Prepared::Wait {
                break;
            }
            let Some(buf) = frame.buf.take() else { break };
            frame.state = FrameState::Spilling;
            frame.given = true;
            let (last_seq, cost) = (frame.last_seq, frame.cost);
            self.keep.given_bytes += cost;
            self.keep.spill_next += 1;
            spill.write(io, number, last_seq, buf, len);
        }
        self.evict(most);
    }

    fn returned(&mut self, returned: Returned) {
        let Some(frame) = self.keep.tail_frame(returned.number) else { return };
        if frame.state != FrameState::Spilling {
            return;
        }
        frame.state = FrameState::Ready;
        frame.buf = returned.buf;
        frame.on_disk = returned.written;
        if !returned.written {
            frame.given = false;
            let cost = frame.cost;
            self.keep.given_bytes -= cost;
            self.keep.spill_next = self.keep.spill_next.min(returned.number);
        }
    }

    /// Frames that the spill holds leave memory, the oldest first, but for what the link takes next.
    fn evict(&mut self, most: usize) {
        let linked = self.link.is_up();
        while self.queue.used() > most
            && let Some(front) = self.keep.tail.front()
            && front.on_disk
            && front.state == FrameState::Ready
        {
            let keep = &mut self.keep;
            let ours = keep.past.is_empty();
            let no_gap = if ours { keep.head_end(self.acked_frame) == keep.tail_first } else { keep.tail_first == 1 };
            // Sent and not yet acknowledged: the acknowledgement must find it.
            let sent = linked && keep.tail_first < self.next_send;
            let Some(frame) = keep.tail.pop_front() else { break };
            keep.tail_first += 1;
            keep.given_bytes -= frame.cost;
            if ours && no_gap && (sent || keep.head_bytes + frame.cost <= keep.head_limit) {
                keep.head_bytes += frame.cost;
                keep.head.push_back(frame);
            } else {
                if no_gap {
                    keep.gap_oldest = frame.oldest;
                }
                self.queue.frames -= frame.cost;
            }
        }
    }

    /// Every frame that was ever sealed and is not acknowledged is in the spill, and nothing waits to be sealed.
    pub fn is_spilled(&self) -> bool {
        self.queue.entries.is_empty() && self.keep.tail.iter().all(|frame| frame.on_disk)
    }

    /// Reads frames back from the spill ahead of the sender.
    pub fn read_ahead(&mut self, io: &mut impl Io, spill: &mut Spill) -> ReadBack {
        let from = self.keep.head_end(self.acked_frame);
        if !self.takes() || from >= self.keep.gap_end() {
            return ReadBack::Fine;
        }
        // Where many are behind, each gets a little.
        let limit = if is_short(io.pool()) { MAX_FRAME } else { self.keep.head_limit };
        if self.keep.head_bytes >= limit {
            return ReadBack::Fine;
        }
        spill.read(io, self.shipped_incarnation(), from)
    }

    /// The link waits for frames of the spill, and there is no memory to read them into.
    pub fn is_starved(&self, spill: &Spill) -> bool {
        self.takes() && self.keep.is_behind(self.acked_frame) && self.keep.head.is_empty() && !spill.is_reading()
    }

    /// Takes a completed read of the spill.
    pub fn read_back(&mut self, io: &mut impl Io, spill: &mut Spill, serial: u32, done: Done) -> ReadBack {
        let last = self.keep.gap_end() - 1;
        let ours = spill.reading() == (self.shipped_incarnation(), self.keep.head_end(self.acked_frame));
        let mut wrong = None;
        let result = spill.read_done(io, serial, done, last, |loaded| {
            if ours && wrong.is_none() {
                wrong = self.load(loaded).err();
            }
        });
        match wrong {
            Some(number) => ReadBack::Broken(format!("frame {number} does not follow what is acknowledged")),
            None => result,
        }
    }

    fn load(&mut self, loaded: Loaded) -> Result<(), u64> {
        if loaded.number != self.keep.head_end(self.acked_frame) {
            return Err(loaded.number);
        }
        let before = self.keep.head.back().map_or(self.acked_seq, |frame| frame.last_seq);
        let follows = loaded.first_seq == before + 1 || (loaded.number == 1 && loaded.first_seq > before);
        if !follows {
            return Err(loaded.number);
        }
        let oldest = loaded.mono_ns.saturating_sub(CLOSED_AFTER);
        if self.keep.past.is_empty() {
            self.keep.gap_oldest = self.keep.gap_oldest.max(oldest);
        }
        let cost = loaded.buf.len();
        self.queue.frames += cost;
        self.keep.head_bytes += cost;
        let (state, buf) = (FrameState::Ready, Some(loaded.buf));
        let (len, last_seq) = (loaded.len, loaded.last_seq);
        self.keep.head.push_back(Frame {
            state,
            buf,
            len,
            cost,
            last_seq,
            oldest,
            sent_at: None,
            given: true,
            on_disk: true,
        });
        Ok(())
    }

    /// Looks at how fast the backlog changes.
    pub fn look(&mut self, now: Nanos) {
        self.rate.look(now, self.wire_bytes, self.drained_bytes);
    }

    /// When, as it looks now, everything that waits will be acknowledged: after so long; none if that cannot be said.
    pub fn catch_up(&self, spilled: u64) -> Option<Nanos> {
        if !self.takes() {
            return None;
        }
        let backlog = spilled + (self.queue.frames + self.queue.raw()) as u64;
        if self.is_flowing() && self.keep.in_memory() <= self.limits.few_unacked {
            return Some(0);
        }
        self.rate.time_for(backlog)
    }
}
