//! Bytes of one client on their way in, placed so that payload is not copied.
//!
//! A disk wants the payload of a write at a position in a page-aligned buffer that is congruent to its offset on the
//! disk. What comes next on a socket is not known before it is received, but it is mostly like what came before. So
//! while writes of equal size arrive, the receive is scattered over *slots*: buffers in which header and payload stand
//! together, the payload exactly where the disk wants it. A slot that got what was predicted *is* the stable copy.
//! Otherwise the bytes are still a stream, in pieces ([`Receiver::peek`] and [`Receiver::consume`] walk it), and payload
//! is copied once into a buffer of its own. Large payloads are received into their buffers directly: only the header of
//! the next request is received with them.
//!
//! One receive is under way at most, and none while bytes are left that could not be used: a client that asks for more
//! than it may have is not read from.

use std::collections::VecDeque;

use crate::host::HEADROOM;
use crate::io::{Buf, Done, Errno, Io, Op, Part, Sock, Token};

use super::proto::REQUEST_HEADER;

/// Bytes of the buffer for what is not predicted.
pub const STAGING_BYTES: usize = 16 * 1024;
/// Pages of a disk are completed in place: a write's buffer reaches this far past its data.
const SLACK: usize = 4096;
/// Longest payload that is predicted, bytes; longer ones are received by themselves.
const SLOT_PAYLOAD_MAX: usize = 64 * 1024;
/// Most slots of one receive.
const SLOTS_MAX: usize = 32;
/// Most bytes of slot buffers of one receive.
const SLOTS_BYTES_MAX: usize = 1 << 20;
/// Slots are used from this score on; see [`Prediction`].
const SCORE_USE: i8 = 2;
const SCORE_MAX: i8 = 8;

/// Capacity of a buffer for `len` bytes of payload whose offset on the disk is `offset`.
pub fn capacity(offset: u64, len: usize) -> usize {
    position(offset) + len + SLACK
}

/// Where the payload for `offset` stands in its buffer.
pub fn position(offset: u64) -> usize {
    HEADROOM + (offset % 4096) as usize
}

/// What the next write is thought to be.
#[derive(Debug, Default)]
struct Prediction {
    /// Payload of the last write, bytes.
    len: usize,
    /// End of the last write on the disk.
    end: u64,
    /// Rises with each write that a prediction from its predecessor fits, falls by more with each that it misplaced.
    score: i8,
    /// The last request was a write longer than slots are for.
    large: bool,
    /// Slots of the next receive: doubles while receives fill them all.
    depth: usize,
}

/// A piece of the received stream.
#[derive(Debug)]
struct Segment {
    buf: Buf,
    at: usize,
    end: usize,
    slot: bool,
}

/// Payload of a write on its way into its buffer.
#[derive(Debug)]
pub struct Fill {
    /// Its place.
    pub part: Part,
    /// Bytes that are there.
    pub filled: usize,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Posted {
    Fill,
    /// `carried` bytes of a header stand in front already.
    Slot {
        carried: usize,
    },
    Staging {
        carried: usize,
    },
}

/// Where the payload stands whose buffer the kernel has.
#[derive(Copy, Clone, Debug, Default)]
struct Place {
    at: usize,
    len: usize,
    filled: usize,
}

/// What the connection wants next.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// A request.
    Request,
    /// The rest of a payload, and then a request.
    Fill,
    /// The rest of a part of a payload, and then more of the payload.
    FillOnly,
    /// Bytes to throw away.
    Drain,
}

/// The receiving half of a connection.
#[derive(Debug)]
pub struct Receiver {
    staging: Option<Buf>,
    /// Bytes at the start of the staging buffer that the negotiation has not used yet.
    kept: usize,
    segments: VecDeque<Segment>,
    /// Payload being received, the part that is incomplete.
    pub fill: Option<Fill>,
    fill_place: Place,
    /// A header that is not complete.
    carry: [u8; REQUEST_HEADER],
    carried: usize,
    slots: Vec<Buf>,
    prediction: Prediction,
    posted: Vec<Posted>,
    parts: Vec<Part>,
    receiving: bool,
    /// Requests parsed since the last receive.
    parsed: usize,
    /// Slots posted with the last receive.
    posted_slots: usize,
}

impl Receiver {
    /// With its staging buffer.
    pub fn new(staging: Buf) -> Self {
        Self {
            staging: Some(staging),
            kept: 0,
            segments: VecDeque::with_capacity(SLOTS_MAX + 2),
            fill: None,
            fill_place: Place::default(),
            carry: [0; REQUEST_HEADER],
            carried: 0,
            slots: Vec::with_capacity(SLOTS_MAX),
            prediction: Prediction { depth: 1, ..Prediction::default() },
            posted: Vec::with_capacity(SLOTS_MAX + 2),
            parts: Vec::with_capacity(SLOTS_MAX + 2),
            receiving: false,
            parsed: 0,
            posted_slots: 0,
        }
    }

    /// A receive is under way.
    pub fn is_receiving(&self) -> bool {
        self.receiving
    }

    // --- negotiation: one contiguous buffer

    /// Starts a receive behind what the negotiation has not used.
    pub fn post_plain<I: Io>(&mut self, io: &mut I, token: Token, sock: Sock) {
        let buf = self.staging.take().expect("no receive is under way");
        let len = buf.len() - self.kept;
        self.receiving = true;
        io.submit(token, Op::Recv { sock, part: Part { buf, at: self.kept, len } });
    }

    /// Takes a completed receive of the negotiation.
    pub fn received_plain(&mut self, done: Done) {
        self.receiving = false;
        self.staging = done.part.map(|p| p.buf);
        self.kept += done.result.unwrap_or(0) as usize;
    }

    /// What the negotiation has not used.
    pub fn plain(&self) -> &[u8] {
        self.staging.as_ref().map_or(&[], |buf| &buf[..self.kept])
    }

    /// The negotiation has used so many bytes.
    pub fn consume_plain(&mut self, len: usize) {
        if let Some(buf) = &mut self.staging {
            buf.copy_within(len..self.kept, 0);
            self.kept -= len;
        }
    }

    /// The negotiation is over: what it has not used are requests.
    pub fn enter(&mut self) {
        if self.kept > 0
            && let Some(buf) = self.staging.take()
        {
            self.segments.push_back(Segment { buf, at: 0, end: self.kept, slot: false });
            self.kept = 0;
        }
    }

    // --- transmission: a stream in pieces

    /// The next 28 bytes, not consumed; none if they are not there yet, and then they are kept for the next receive.
    pub fn peek(&mut self) -> Option<[u8; REQUEST_HEADER]> {
        if self.segments.is_empty() {
            return None; // what is carried stays so
        }
        let mut header = [0; REQUEST_HEADER];
        let mut have = 0;
        for segment in &self.segments {
            let take = (segment.end - segment.at).min(REQUEST_HEADER - have);
            header[have..have + take].copy_from_slice(&segment.buf[segment.at..segment.at + take]);
            have += take;
            if have == REQUEST_HEADER {
                return Some(header);
            }
        }
        self.carry = header;
        self.carried = have;
        self.consume(have);
        None
    }

    /// Drops up to `len` bytes of the stream; returns how many were there.
    pub fn consume(&mut self, len: usize) -> usize {
        let mut left = len;
        while left > 0 {
            let Some(front) = self.segments.front_mut() else { break };
            let take = left.min(front.end - front.at);
            front.at += take;
            left -= take;
            if front.at == front.end {
                self.pop();
            }
        }
        len - left
    }

    fn pop(&mut self) {
        if let Some(segment) = self.segments.pop_front() {
            if segment.slot {
                self.slots.push(segment.buf);
            } else {
                self.staging = Some(segment.buf);
            }
        }
    }

    /// The header at the front is of a write of `len` bytes in its first part: does the payload lie, or will it lie, in
    /// its place in the slot?
    pub fn fits_slot(&self, offset: u64, len: usize) -> bool {
        let Some(front) = self.segments.front() else { return false };
        let at = front.at + REQUEST_HEADER;
        front.slot
            && at <= front.end
            && at >= HEADROOM
            && at % 4096 == (offset % 4096) as usize
            && front.end - at <= len
            && at + len + SLACK <= front.buf.len()
    }

    /// Consumes the header and takes the slot's buffer, which [`Receiver::fits_slot`].
    pub fn take_slot(&mut self, offset: u64, len: usize) {
        debug_assert!(self.fits_slot(offset, len));
        let Some(Segment { buf, at, end, .. }) = self.segments.pop_front() else { return };
        let at = at + REQUEST_HEADER;
        self.fill = Some(Fill { part: Part { buf, at, len }, filled: end - at });
    }

    /// Copies what is there of the payload being received into its place; returns how many bytes.
    pub fn copy_into_fill(&mut self) -> usize {
        let Some(mut fill) = self.fill.take() else { return 0 };
        let mut copied = 0;
        while fill.filled < fill.part.len {
            let Some(front) = self.segments.front() else { break };
            let take = (fill.part.len - fill.filled).min(front.end - front.at);
            let to = fill.part.at + fill.filled;
            fill.part.buf[to..to + take].copy_from_slice(&front.buf[front.at..front.at + take]);
            fill.filled += take;
            copied += take;
            self.consume(take);
        }
        self.fill = Some(fill);
        copied
    }

    /// A request other than a write was parsed.
    pub fn saw_other(&mut self) {
        self.parsed += 1;
        self.prediction.large = false;
        if self.segments.iter().any(|s| s.slot) {
            // It stood before a slot's payload and shifted what follows.
            self.prediction.score = (self.prediction.score - 1).max(0);
        }
    }

    /// A write was parsed; `placed` if its payload needs no copy.
    pub fn saw_write(&mut self, offset: u64, len: usize, placed: bool) {
        self.parsed += 1;
        let last = &mut self.prediction;
        let like_last = len == last.len && offset % 4096 == last.end % 4096;
        if placed || (like_last && self.posted_slots == 0) {
            last.score = (last.score + 1).min(SCORE_MAX);
        } else if self.posted_slots > 0 {
            last.score = (last.score - 2).max(0);
        } else {
            last.score = (last.score - 1).max(0);
        }
        last.len = len;
        last.end = offset.wrapping_add(len as u64);
        last.large = len > SLOT_PAYLOAD_MAX;
    }

    /// Starts a receive for what the connection wants next.
    pub fn post<I: Io>(&mut self, io: &mut I, token: Token, sock: Sock, want: Want) {
        debug_assert!(!self.receiving && self.segments.is_empty());
        self.adapt_depth();
        let mut parts = std::mem::take(&mut self.parts);
        if matches!(want, Want::Fill | Want::FillOnly)
            && let Some(Fill { part, filled }) = self.fill.take()
        {
            self.fill_place = Place { at: part.at, len: part.len, filled };
            parts.push(Part { buf: part.buf, at: part.at + filled, len: part.len - filled });
            self.posted.push(Posted::Fill);
        }
        let request_follows = matches!(want, Want::Fill | Want::Request);
        if request_follows && self.prediction.score >= SCORE_USE && !self.prediction.large {
            self.add_slots(io, &mut parts);
        } else {
            self.slots.clear(); // others may need them more
        }
        if want != Want::FillOnly
            && self.posted_slots == 0
            && let Some(mut buf) = self.staging.take()
        {
            let carried = std::mem::take(&mut self.carried);
            buf[..carried].copy_from_slice(&self.carry[..carried]);
            let end = if self.prediction.large && request_follows { REQUEST_HEADER } else { buf.len() };
            parts.push(Part { buf, at: carried, len: end - carried });
            self.posted.push(Posted::Staging { carried });
        }
        self.receiving = true;
        if parts.len() > 1 {
            io.submit(token, Op::RecvV { sock, parts });
        } else {
            let part = parts.pop().expect("the staging buffer is here while nothing is received");
            self.parts = parts;
            io.submit(token, Op::Recv { sock, part });
        }
    }

    fn adapt_depth(&mut self) {
        let parsed = std::mem::take(&mut self.parsed);
        let posted = std::mem::take(&mut self.posted_slots);
        let depth = &mut self.prediction.depth;
        if posted == 0 {
            *depth = parsed.clamp(1, SLOTS_MAX);
        } else if parsed >= posted {
            *depth = (*depth * 2).min(SLOTS_MAX);
        } else if parsed * 2 < *depth && *depth > 1 {
            *depth -= 1;
        }
    }

    fn add_slots<I: Io>(&mut self, io: &mut I, parts: &mut Vec<Part>) {
        let len = self.prediction.len;
        // If positions on a page differ from slot to slot, each must fit any.
        let capacity = if len.is_multiple_of(4096) { capacity(self.prediction.end, len) } else { capacity(4095, len) };
        let depth = self.prediction.depth.min(SLOTS_BYTES_MAX / capacity).max(1);
        let mut offset = self.prediction.end;
        while self.posted_slots < depth {
            let Some(mut buf) = self.slots.pop().filter(|b| b.len() >= capacity).or_else(|| io.pool().take(capacity))
            else {
                break;
            };
            let carried = std::mem::take(&mut self.carried);
            let at = position(offset) - REQUEST_HEADER;
            buf[at..at + carried].copy_from_slice(&self.carry[..carried]);
            parts.push(Part { buf, at: at + carried, len: REQUEST_HEADER - carried + len });
            self.posted.push(Posted::Slot { carried });
            self.posted_slots += 1;
            offset = offset.wrapping_add(len as u64);
        }
        self.slots.clear(); // others may need them more
    }

    /// Takes a completed receive. The number of bytes, 0 at the end of the stream, or the error.
    pub fn received(&mut self, done: Done) -> Result<usize, Errno> {
        self.receiving = false;
        let Done { result, part, mut parts, .. } = done;
        let bytes = result.map(|n| n as usize);
        let mut left = *bytes.as_ref().unwrap_or(&0);
        let vectored = !parts.is_empty();
        for (part, posted) in part.into_iter().chain(parts.drain(..)).zip(self.posted.drain(..)) {
            let here = left.min(part.len);
            left -= here;
            let Part { buf, at, .. } = part;
            match posted {
                Posted::Fill => {
                    let Place { at, len, filled } = self.fill_place;
                    self.fill = Some(Fill { part: Part { buf, at, len }, filled: filled + here });
                }
                Posted::Slot { .. } if here == 0 => self.slots.push(buf),
                Posted::Slot { carried } => {
                    self.segments.push_back(Segment { buf, at: at - carried, end: at + here, slot: true });
                }
                Posted::Staging { .. } if here == 0 => self.staging = Some(buf),
                Posted::Staging { carried } => {
                    self.segments.push_back(Segment { buf, at: at - carried, end: at + here, slot: false });
                }
            }
        }
        if vectored {
            self.parts = parts;
        }
        bytes
    }

    /// Gives all buffers back that are not under way: the connection is dead.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.slots.clear();
        self.fill = None;
        self.staging = None;
    }
}
