//! Replies on their way to one client.
//!
//! One send is under way at most. Meanwhile small replies gather in a buffer and read data queues up, each piece with
//! its header written into the headroom in front of it; the next send takes all of it. Small replies overtake data,
//! which the protocol allows; those that must not (the end of a structured reply whose chunks are still queued) wait
//! in `after` until the data is gone.

use std::collections::VecDeque;

use crate::io::{Buf, Io, Op, Part, Pool, Sock, Token};

/// Bytes of a buffer for small replies.
pub const OUT_BYTES: usize = 16 * 1024;
/// Longest small reply but for block status, bytes: an error chunk with its text.
pub const SMALL_MAX: usize = 96;
/// Pieces of one send: the small replies and data.
const SEND_PARTS: usize = 64;
/// Data of one send, bytes, unless a single piece is longer. Bounds how long a slow client keeps the buffers, and makes
/// a client that takes nothing at all distinguishable from a slow one.
const SEND_BYTES: usize = 2 << 20;

#[derive(Debug, Default)]
struct Sending {
    small: bool,
    cost: usize,
}

/// Data, and whether the message goes on with the next piece.
#[derive(Debug)]
struct Piece {
    part: Part,
    cost: usize,
    more: bool,
}

/// A small reply that follows data.
#[derive(Debug)]
struct Tail {
    bytes: [u8; SMALL_MAX],
    len: usize,
}

/// The sending half of a connection.
#[derive(Debug)]
pub struct Sender {
    small: Option<Buf>,
    small_len: usize,
    spare: Option<Buf>,
    /// Whole messages.
    data: VecDeque<Piece>,
    /// Pieces of the one message that is sent as it comes.
    stream: VecDeque<Piece>,
    /// What was sent last goes on with the next piece of `data` or of `stream`.
    in_data: bool,
    in_stream: bool,
    after: VecDeque<Tail>,
    /// Replies of the negotiation; sent before anything else.
    bulk: Vec<u8>,
    bulk_sent: usize,
    parts: Vec<Part>,
    sending: Option<Sending>,
}

impl Sender {
    /// With its two buffers out of the pool; none if it has not that much.
    pub fn new(pool: &Pool) -> Option<Self> {
        Some(Self {
            small: Some(pool.take(OUT_BYTES)?),
            small_len: 0,
            spare: Some(pool.take(OUT_BYTES)?),
            data: VecDeque::new(),
            stream: VecDeque::new(),
            in_data: false,
            in_stream: false,
            after: VecDeque::new(),
            bulk: Vec::new(),
            bulk_sent: 0,
            parts: Vec::with_capacity(SEND_PARTS),
            sending: None,
        })
    }

    /// Where the negotiation puts its replies.
    pub fn bulk(&mut self) -> &mut Vec<u8> {
        &mut self.bulk
    }

    /// All replies of the negotiation have been handed to the socket.
    pub fn bulk_is_empty(&self) -> bool {
        self.bulk.is_empty()
    }

    /// Bytes of small replies that still fit, with those that wait behind data taken off.
    pub fn room(&self) -> usize {
        OUT_BYTES.saturating_sub(self.small_len + self.after.len() * SMALL_MAX)
    }

    /// Queues a small reply. The caller has checked [`Sender::room`].
    pub fn push_small(&mut self, head: &[u8], tail: &[u8]) {
        let buf = self.small.as_mut().expect("one of the two buffers is always here");
        let middle = self.small_len + head.len();
        let end = middle + tail.len();
        assert!(end <= OUT_BYTES, "room for a reply is checked before its request is taken");
        buf[self.small_len..middle].copy_from_slice(head);
        buf[middle..end].copy_from_slice(tail);
        self.small_len = end;
    }

    /// Queues a small reply behind all data that is queued now. At most [`SMALL_MAX`] bytes.
    pub fn push_after(&mut self, head: &[u8], tail: &[u8]) {
        if self.data.is_empty() {
            return self.push_small(head, tail);
        }
        let mut bytes = [0; SMALL_MAX];
        bytes[..head.len()].copy_from_slice(head);
        bytes[head.len()..head.len() + tail.len()].copy_from_slice(tail);
        self.after.push_back(Tail { bytes, len: head.len() + tail.len() });
    }

    /// Queues data with its header in front. `cost` comes back when it is sent. With `more` the message goes on with the
    /// next call, which comes before anything else happens.
    pub fn push_data(&mut self, part: Part, cost: usize, more: bool) {
        self.data.push_back(Piece { part, cost, more });
    }

    /// Queues a piece of the one message that is sent as it comes; without `more` it ends.
    pub fn push_stream(&mut self, part: Part, cost: usize, more: bool) {
        self.stream.push_back(Piece { part, cost, more });
    }

    /// A send is under way.
    pub fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Nothing is queued and nothing under way.
    pub fn is_empty(&self) -> bool {
        self.sending.is_none()
            && self.small_len == 0
            && self.data.is_empty()
            && self.stream.is_empty()
            && self.after.is_empty()
            && self.bulk.is_empty()
    }

    /// Starts a send if none is under way and there is something to send.
    pub fn flush<I: Io>(&mut self, io: &mut I, token: Token, sock: Sock) {
        if self.sending.is_some() {
            return;
        }
        self.take_bulk();
        if self.data.is_empty() {
            while let Some(tail) = self.after.pop_front() {
                self.push_small(&tail.bytes[..tail.len], &[]);
            }
        }
        let mut sending = Sending::default();
        let mut parts = std::mem::take(&mut self.parts);
        if self.small_len > 0 && !self.in_data && !self.in_stream {
            let buf = std::mem::replace(&mut self.small, self.spare.take());
            let buf = buf.expect("one of the two buffers is always here");
            parts.push(Part { buf, at: 0, len: std::mem::take(&mut self.small_len) });
            sending.small = true;
        }
        let mut bytes = 0;
        while parts.len() < SEND_PARTS && bytes < SEND_BYTES {
            let Some(Piece { part, cost, .. }) = self.next_piece() else { break };
            bytes += part.len;
            sending.cost += cost;
            parts.push(part);
        }
        match parts.len() {
            0 => {
                self.parts = parts;
                return;
            }
            1 => {
                let part = parts.pop().expect("it has one");
                self.parts = parts;
                io.submit(token, Op::Send { sock, part });
            }
            _ => io.submit(token, Op::SendV { sock, parts }),
        }
        self.sending = Some(sending);
    }

    /// What may be sent next.
    fn next_piece(&mut self) -> Option<Piece> {
        if !self.in_stream
            && let Some(piece) = self.data.pop_front()
        {
            self.in_data = piece.more;
            return Some(piece);
        }
        let piece = self.stream.pop_front()?;
        self.in_stream = piece.more;
        Some(piece)
    }

    fn take_bulk(&mut self) {
        if self.bulk.is_empty() || self.small_len > 0 {
            return;
        }
        let len = OUT_BYTES.min(self.bulk.len() - self.bulk_sent);
        let buf = self.small.as_mut().expect("one of the two buffers is always here");
        buf[..len].copy_from_slice(&self.bulk[self.bulk_sent..self.bulk_sent + len]);
        self.small_len = len;
        self.bulk_sent += len;
        if self.bulk_sent == self.bulk.len() {
            self.bulk = Vec::new();
            self.bulk_sent = 0;
        }
    }

    /// Takes the buffers of a completed send back; returns the cost of the data that it carried.
    pub fn sent(&mut self, part: Option<Part>, mut parts: Vec<Part>) -> usize {
        let sending = self.sending.take().expect("a completion has its send");
        let has_parts = !parts.is_empty();
        let mut all = part.into_iter().chain(parts.drain(..));
        if sending.small {
            let small = all.next().expect("a send brings back what it was given").buf;
            if self.small.is_none() {
                self.small = Some(small);
            } else {
                self.spare = Some(small);
            }
        }
        drop(all);
        if has_parts {
            self.parts = parts;
        }
        sending.cost
    }

    /// Forgets what is queued: the connection is dead.
    pub fn clear(&mut self) {
        self.small_len = 0;
        self.data.clear();
        self.stream.clear();
        self.after.clear();
        self.bulk = Vec::new();
        self.bulk_sent = 0;
    }
}
