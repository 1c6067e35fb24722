//! The shipper of a stream: numbered records become sealed frames, frames leave in order and are kept until they are
//! acknowledged.
//!
//! ```text
//! queue of records ─▶ plan a frame ─▶ seal (perhaps elsewhere) ─▶ ready ─▶ sending ─▶ sent ─▶ acknowledged: freed
//! ```
//! A frame leaves at once while few are unacknowledged; otherwise records gather until the frame is full or its oldest
//! record has waited for the age bound: batches grow with the load and cost nothing without it. A frame number is sealed
//! once; after a connection was lost the same bytes leave again, from the place that the target names.
//!
//! `queue` has the records, `keep` the sealed frames (in memory, in the spill, of earlier lives), `link` the connection.

use std::sync::Arc;

use afterimage_wire::frame::FrameHeader;
use afterimage_wire::ids::{IncarnationId, StreamId};

use crate::io::{Io, Nanos, Op, Part};
use crate::seal::{ControlKey, DataKey, FrameMeta, Plan};
use crate::sealers::{Job, Sealing};

mod keep;
mod link;
mod pace;
mod queue;
mod rate;

use keep::{Frame, FrameState, Keep};
pub(crate) use link::{Heard, Link, LinkState};
pub(crate) use pace::Pacer;
pub(crate) use queue::{Event, Queue, Room, SMALL_COST, Waiter};
use rate::Rate;

/// Most frames that leave in one send.
const MAX_SEND: usize = 16;
/// Most records in one frame.
const MAX_FRAME_RECORDS: usize = 4096;
/// Without a link, records gather for this long: nothing is gained by small frames.
const UNLINKED_AGE: Nanos = 500_000_000;
/// With every so many frames in memory and not acknowledged, the age bound counts once more.
const MANY_UNACKED: usize = 64;
/// Frames of an earlier connection that the target may still have on their way to its disk when it takes a new one: its
/// journal has at most four batches of half a MiB under way, of frames of at least 4 KiB.
const MAX_UNDER_WAY_THERE: u64 = 1024;
/// Jobs kept for their memory.
const MAX_SPARE: usize = 32;

/// Bounds that the shipper needs.
#[derive(Copy, Clone, Debug)]
pub(crate) struct ShipLimits {
    pub age_bound: Nanos,
    pub few_unacked: usize,
    pub frame_bytes: usize,
    pub link_silence: Nanos,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Shipper {
    pub queue: Queue,
    pub link: Link,
    pub pacer: Pacer,
    stream: StreamId,
    pub incarnation: IncarnationId,
    key: Arc<DataKey>,
    /// Index of the group and count of its incarnations: names the owner of a job.
    owner: u64,
    limits: ShipLimits,
    compress: bool,
    /// Unacknowledged frames, and those of earlier lives that leave first.
    keep: Keep,
    next_frame: u64,
    /// Next frame to send on this connection.
    next_send: u64,
    /// Newest frame ever handed to the network.
    sent_frame: u64,
    /// Newest frame acknowledged, of the life that is being shipped.
    pub acked_frame: u64,
    /// Last record of that frame; before the first acknowledgement, the one before the life's first.
    pub acked_seq: u64,
    /// Newest record that a target ever acknowledged, as far as is known.
    pub durable_seq: u64,
    pub sealed_seq: u64,
    pub sent_seq: u64,
    /// What frames composed from now on promise to the target; see [`FrameHeader::sync_ms`].
    pub promise_ms: u32,
    /// When the newest frame had left that was acknowledged in answer to that, since boot: the target had not fenced us
    /// then.
    pub word_at: Option<Nanos>,
    /// Acknowledgements of frames below this one may answer what was sent on an earlier connection.
    word_from: u64,
    pub wire_bytes: u64,
    pub sealed_frames: u64,
    /// Bytes of frames acknowledged.
    drained_bytes: u64,
    rate: Rate,
    #[allow(clippy::vec_box)] // the boxes go round
    spare: Vec<Box<Job>>,
    /// No buffer for a frame since then.
    pub blocked_since: Option<Nanos>,
}

impl Shipper {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        stream: StreamId,
        group: u32,
        incarnation: IncarnationId,
        key: DataKey,
        first_seq: u64,
        queue_bytes: usize,
        compress: bool,
        limits: ShipLimits,
    ) -> Self {
        Self {
            queue: Queue::new(queue_bytes, first_seq),
            link: Link::new(limits.link_silence),
            pacer: Pacer::default(),
            stream,
            incarnation,
            key: Arc::new(key),
            owner: u64::from(group) << 32,
            limits,
            compress,
            keep: Keep::new(queue_bytes),
            next_frame: 1,
            next_send: 1,
            sent_frame: 0,
            acked_frame: 0,
            acked_seq: first_seq - 1,
            durable_seq: 0,
            sealed_seq: first_seq - 1,
            sent_seq: first_seq - 1,
            promise_ms: 0,
            word_at: None,
            word_from: 1,
            wire_bytes: 0,
            sealed_frames: 0,
            drained_bytes: 0,
            rate: Rate::default(),
            spare: Vec::with_capacity(MAX_SPARE),
            blocked_since: None,
        }
    }

    /// Begins another incarnation: everything queued is forgotten, numbers go on at `first` or above. Returns the first
    /// number.
    pub fn restart(&mut self, incarnation: IncarnationId, key: DataKey, first: u64) -> u64 {
        self.incarnation = incarnation;
        self.key = Arc::new(key);
        self.owner += 1;
        self.keep.clear();
        self.next_frame = 1;
        self.next_send = 1;
        self.sent_frame = 0;
        self.acked_frame = 0;
        self.blocked_since = None;
        let first = self.queue.restart(first);
        self.acked_seq = first - 1;
        self.sealed_seq = first - 1;
        self.sent_seq = first - 1;
        first
    }

    /// Unacknowledged frames in memory.
    pub fn unacked(&self) -> usize {
        self.keep.in_memory()
    }

    /// Next frame that would be sent if nothing were resent.
    pub fn next_frame(&self) -> u64 {
        self.sent_frame + 1
    }

    /// Every record is acknowledged.
    pub fn is_drained(&self) -> bool {
        self.keep.is_empty(self.acked_frame) && self.queue.entries.is_empty()
    }

    /// The key of a connection's control messages (the right one, but for a mutant).
    pub fn control_key(&self, right: ControlKey) -> ControlKey {
        crate::mutant::control_key(right, &self.key)
    }

    /// Frames may leave: there is a link, and this is an hour for it.
    pub fn takes(&self) -> bool {
        self.link.is_ready() && !self.pacer.is_closed()
    }

    /// The link takes what is sealed now: nothing older waits in the spill.
    pub fn is_flowing(&self) -> bool {
        self.takes() && !self.keep.is_behind(self.acked_frame)
    }

    /// When the oldest unacknowledged record of this process was numbered.
    pub fn oldest(&self) -> Option<Nanos> {
        let raw = || self.queue.entries.front().map(|e| e.record.mono_ns).filter(|_| !mutant!(RpoForgetsQueue));
        self.keep.oldest(self.acked_frame).or_else(raw)
    }

    /// From the next frame on.
    pub fn set_compress(&mut self, compress: bool) {
        self.compress = compress;
    }

    /// Compression is off, to seal faster.
    pub fn is_hurried(&self) -> bool {
        self.queue.raw() > self.queue.limit() / 4
    }

    /// Composes frames of what is due and gives them to be sealed. Only records up to number `reserved` leave the
    /// queue: a later life must not use their numbers again. `all`: whatever there is.
    pub fn compose(&mut self, io: &mut impl Io, sealing: &mut Sealing, reserved: u64, all: bool) {
        let now = io.now();
        while let Some(first) = self.queue.entries.front() {
            let oldest = first.record.mono_ns;
            let ready = self.is_flowing();
            let bound = self.age_bound();
            let due = all
                || (ready && self.keep.in_memory() < self.limits.few_unacked)
                || self.queue.payload >= self.limits.frame_bytes
                || self.queue.entries.len() >= MAX_FRAME_RECORDS
                || now >= oldest + bound;
            if !due || first.record.seq > reserved || !sealing.has_room() {
                return;
            }
            let mut job = self.spare.pop().unwrap_or_else(|| self.fresh_job());
            let mut most = self.limits.frame_bytes;
            let out = loop {
                self.plan(&mut job.plan, most, reserved);
                match io.pool().take(job.plan.frame_bound()) {
                    Some(out) => break Some(out),
                    // Perhaps for a smaller one.
                    None if job.plan.records() > 1 => most /= 4,
                    None => break None,
                }
            };
            let Some(out) = out else {
                self.spare.push(job);
                self.blocked_since.get_or_insert(now);
                return;
            };
            self.blocked_since = None;
            let records = job.plan.records();
            let cost = out.len();
            for entry in self.queue.entries.drain(..records) {
                self.queue.payload -= entry.record.payload_len as usize;
                self.queue.raw -= entry.cost;
                job.entries.push(entry);
            }
            self.queue.frames += cost;
            let last_seq = job.entries.last().map_or(self.sealed_seq, |e| e.record.seq);
            job.owner = self.owner;
            job.meta = FrameMeta {
                stream: self.stream,
                incarnation: self.incarnation,
                number: self.next_frame,
                acked: if self.keep.past.is_empty() { self.acked_frame } else { 0 },
                mono_ns: now,
                sync_ms: self.promise_ms,
            };
            job.key = self.key.clone();
            job.compress = self.compress && !self.is_hurried();
            job.out = Some(out);
            self.keep.tail.push_back(Frame::sealing(cost, last_seq, oldest));
            self.next_frame += 1;
            sealing.submit(job);
        }
    }

    fn fresh_job(&self) -> Box<Job> {
        Box::new(Job {
            owner: self.owner,
            meta: FrameMeta {
                stream: self.stream,
                incarnation: self.incarnation,
                number: 0,
                acked: 0,
                mono_ns: 0,
                sync_ms: 0,
            },
            key: self.key.clone(),
            compress: false,
            entries: Vec::with_capacity(64),
            plan: Plan::default(),
            out: None,
            len: 0,
        })
    }

    fn plan(&self, plan: &mut Plan, most: usize, reserved: u64) {
        plan.clear();
        let mut bytes = 0;
        for (count, entry) in self.queue.entries.iter().enumerate().take(MAX_FRAME_RECORDS) {
            let payload = entry.record.payload_len as usize;
            if entry.record.seq > reserved || (count > 0 && bytes + payload > most) || !plan.add(payload) {
                break;
            }
            bytes += payload;
        }
    }

    /// Takes a sealed frame back.
    pub fn sealed(&mut self, mut job: Box<Job>) {
        let out = job.out.take();
        if job.owner == self.owner
            && let Some(frame) = self.keep.tail_frame(job.meta.number)
        {
            frame.state = FrameState::Ready;
            frame.buf = out;
            frame.len = job.len;
            self.sealed_seq = self.sealed_seq.max(frame.last_seq);
            self.wire_bytes += job.len as u64;
            self.sealed_frames += 1;
        }
        if self.spare.len() < MAX_SPARE {
            self.spare.push(job);
        }
    }

    /// Sends what is ready, if nothing is being sent.
    pub fn send(&mut self, io: &mut impl Io, token: u64) {
        let Some(sock) = self.link.may_send() else { return };
        let acked = self.acked_frame;
        if self.keep.frame(acked, self.next_send).is_none_or(|frame| frame.state != FrameState::Ready) {
            return;
        }
        let now = io.now();
        let most = self.pacer.may_begin(now, MAX_SEND, self.next_send <= acked + 1);
        if most == 0 {
            return;
        }
        let mut parts = self.link.take_parts();
        let sent_at = io.since_boot();
        while parts.len() < most
            && let Some(frame) = self.keep.frame(acked, self.next_send)
            && frame.state == FrameState::Ready
            && self.pacer.take(frame.len, now)
            && let Some(buf) = frame.buf.take()
        {
            frame.state = FrameState::Sending;
            frame.sent_at = Some(sent_at);
            parts.push(Part { buf, at: 0, len: frame.len });
            self.sent_seq = self.sent_seq.max(frame.last_seq);
            self.sent_frame = self.sent_frame.max(self.next_send);
            self.next_send += 1;
        }
        if parts.is_empty() {
            return self.link.keep_parts(parts);
        }
        self.link.sending = true;
        io.submit(token | u64::from(self.link.epoch()), Op::SendV { sock, parts });
    }

    /// Takes the buffers of a send back to their frames, whatever became of it.
    pub fn sent(&mut self, parts: &mut Vec<Part>) {
        let shipped = self.shipped_incarnation();
        for part in parts.drain(..) {
            let Ok(header) = FrameHeader::parse(&part.buf) else { continue };
            if header.incarnation == shipped
                && let Some(frame) = self.keep.frame(self.acked_frame, header.number.get())
                && frame.state == FrameState::Sending
            {
                frame.buf = Some(part.buf);
                frame.state = FrameState::Ready;
            }
        }
    }

    /// A connection carries frames from `next` on.
    pub fn resend_from(&mut self, next: u64) {
        self.next_send = next;
        self.word_from = (self.sent_frame + 1).min(next + MAX_UNDER_WAY_THERE);
    }

    /// When the next frame is due by age.
    pub fn deadline(&self) -> Option<Nanos> {
        let first = self.queue.entries.front()?;
        Some(first.record.mono_ns + self.age_bound())
    }

    /// How old a record may be when its frame is closed. Behind many frames that are not acknowledged it gains nothing by
    /// leaving early, and each frame costs a buffer here and a write in the spill: a link that stands still would fill both
    /// with small ones. Once half of the queue is in use the spill is near.
    fn age_bound(&self) -> Nanos {
        if !self.is_flowing() || self.queue.used() > self.queue.limit() / 2 {
            return UNLINKED_AGE;
        }
        let many = (self.keep.in_memory() / MANY_UNACKED).max(1) as Nanos;
        (self.limits.age_bound * many).min(UNLINKED_AGE)
    }
}
