//! One client: its socket's two halves, its negotiation, its requests.
//!
//! Bytes come in through [`Receiver`], are judged in `advance`, and become parts that the disk has; answers come back
//! in [`Conn::answer`] and leave through [`Sender`]. What holds bytes is bounded: a connection that waits for room
//! ([`Conn::blocked`]) is not read from.

use std::collections::VecDeque;

use crate::host::{DiskKey, FrontId, HEADROOM, HostDisk, Request};
use crate::io::{Done, Io, Nanos, Part, Sock, Token};

use super::negotiate::{Entered, Negotiation};
use super::proto::{
    self, DATA_HEADER, MAX_PAYLOAD_UNTOLD, REQUEST_HEADER, RequestHeader, SIMPLE_HEADER, chunk, chunk_header, cmd,
    cmd_flag, error, simple_reply,
};
use super::receive::{Fill, Receiver, Want, capacity, position};
use super::reply::{SMALL_MAX, Sender};
use super::request::{Kind, NONE, PartOp, ReadMode, Req, Slab};
use super::server::Shared;
use super::status::{Extents, STATUS_MAX};

/// Longest payload that is received only to be thrown away, bytes. A client that announces more is out of step.
const DRAIN_MAX: u32 = MAX_PAYLOAD_UNTOLD;
/// Longest read that is gathered, bytes, if the budget has room for it.
const GATHER_MAX: usize = 4 << 20;

/// Parts of a write where no longer buffer is to be had are cut at multiples of this, bytes.
const PART_SHORT: usize = 64 * 1024;

/// What the server keeps for each state of a connection.
#[derive(Debug)]
pub enum Phase {
    /// Options are haggled.
    Negotiating(Box<Negotiation>),
    /// Requests are served.
    Serving,
}

/// A connection.
#[derive(Debug)]
pub struct Conn {
    /// Generation and index, as in cookies.
    pub id: u32,
    /// Its socket, closed once `dead`.
    pub sock: Sock,
    /// Where it stands.
    pub phase: Phase,
    /// The negotiation's next step must have come by then.
    pub deadline: Nanos,
    /// In the server's list of connections that need a look.
    pub active: bool,
    /// Something is received that waits for room.
    pub blocked: bool,
    /// What was missing last is not its own.
    pub(super) starved: bool,
    /// No further requests: once all replies are sent it closes.
    pub ending: bool,
    /// The socket is closed; waits for what the kernel and the disk still have.
    pub dead: bool,
    /// Since when the send has been under way.
    pub sending_since: Nanos,
    /// When something was last done for it.
    pub last_look: Nanos,
    /// The receiving half.
    pub rx: Receiver,
    /// The sending half.
    pub tx: Sender,
    /// What is served; none before transmission.
    pub key: Option<DiskKey>,
    size: u64,
    read_only: bool,
    discard: bool,
    pub(super) structured: bool,
    allocation: bool,
    max_payload: u32,
    pub(super) reqs: Slab<Req>,
    pub(super) ops: Slab<PartOp>,
    /// Parts that the disk has, of all requests.
    pub(super) outstanding: usize,
    /// The write whose payload is being received.
    writing: Option<u32>,
    /// Payload to throw away, bytes.
    drain: usize,
    /// The reply to the request whose payload that is. It is due when the payload has gone: clients do not expect it
    /// while they are still sending.
    drained: Option<(u64, u32, &'static str)>,
    /// Reads that have parts still to be given to the disk.
    pub(super) reads: VecDeque<u32>,
    /// Reads that go out in order as they come; the first has its turn.
    pub(super) ordered: VecDeque<u32>,
    /// Parts for which the disk had no buffer.
    pub(super) retry: VecDeque<u32>,
    /// This connection's part of the server's budgets, bytes.
    read_held: usize,
    write_held: usize,
}

impl Conn {
    /// A new client before its greeting.
    pub fn new(id: u32, sock: Sock, rx: Receiver, mut tx: Sender, deadline: Nanos) -> Self {
        let negotiation = Negotiation::new(tx.bulk());
        Self {
            id,
            sock,
            phase: Phase::Negotiating(Box::new(negotiation)),
            deadline,
            active: false,
            blocked: false,
            starved: false,
            ending: false,
            dead: false,
            sending_since: 0,
            last_look: 0,
            rx,
            tx,
            key: None,
            size: 0,
            read_only: true,
            discard: false,
            structured: false,
            allocation: false,
            max_payload: 0,
            reqs: Slab::default(),
            ops: Slab::default(),
            outstanding: 0,
            writing: None,
            drain: 0,
            drained: None,
            reads: VecDeque::new(),
            ordered: VecDeque::new(),
            retry: VecDeque::new(),
            read_held: 0,
            write_held: 0,
        }
    }

    /// Requests under way.
    pub fn requests(&self) -> usize {
        self.reqs.len()
    }

    /// Waits for the disk or for room, so the server must look again.
    pub fn wants_disk(&self) -> bool {
        !self.dead && (self.blocked || !self.reads.is_empty() || !self.retry.is_empty())
    }

    /// Waits for buffers or budget that others hold.
    pub fn is_starved(&self) -> bool {
        !self.dead && (self.starved || !self.retry.is_empty())
    }

    /// Bytes of buffers that its client keeps by doing nothing, since `before`: it takes no replies, or does not go on
    /// with a write that it has begun.
    pub fn kept_idle(&self, before: Nanos) -> usize {
        let deaf = self.tx.is_sending() && self.sending_since <= before;
        let dumb = self.writing.is_some() && self.rx.is_receiving() && self.last_look <= before;
        let (deaf, dumb) = (if deaf { self.read_held } else { 0 }, if dumb { self.write_held } else { 0 });
        if self.dead { 0 } else { deaf + dumb }
    }

    /// Nothing of it is under way any more.
    pub fn is_finished(&self) -> bool {
        self.dead && !self.rx.is_receiving() && !self.tx.is_sending() && self.outstanding == 0
    }

    /// Closes the socket and forgets what is queued.
    pub fn kill<I: Io>(&mut self, shared: &mut Shared, io: &mut I) {
        if self.dead {
            return;
        }
        self.dead = true;
        self.blocked = false;
        io.close_sock(self.sock);
        self.rx.clear();
        self.tx.clear();
        self.reqs.clear();
        self.ops.clear();
        self.reads.clear();
        self.ordered.clear();
        self.retry.clear();
        self.writing = None;
        shared.read_used -= std::mem::take(&mut self.read_held);
        shared.write_used -= std::mem::take(&mut self.write_held);
    }

    /// As [`Conn::kill`], and the answers of its disk will never come.
    pub fn abandon<I: Io>(&mut self, shared: &mut Shared, io: &mut I) {
        self.kill(shared, io);
        self.outstanding = 0;
    }

    /// Counts and ends a connection whose client broke the protocol.
    pub fn violation<I: Io>(&mut self, shared: &mut Shared, io: &mut I, what: &str) {
        tracing::debug!(client = self.id, what, "NBD connection dropped");
        shared.counters.violations += 1;
        self.kill(shared, io);
    }

    /// No further requests; what is under way is answered, then the connection closes.
    pub fn end(&mut self) {
        self.ending = true;
        self.blocked = false;
        if let Some(number) = self.writing.take() {
            // The payload will never be whole. What parts the disk has got are waited for.
            self.rx.fill = None;
            if let Some(req) = self.reqs.get(number) {
                req.end = req.next;
                req.unanswered = true;
                if req.outstanding == 0 {
                    self.finish(number);
                }
            }
        }
        if let Phase::Negotiating(negotiation) = &mut self.phase {
            negotiation.shut_down();
        }
    }

    /// Closes if it was to end and has nothing left to do.
    pub fn close_if_over<I: Io>(&mut self, shared: &mut Shared, io: &mut I) {
        if self.ending && !self.dead && self.reqs.len() == 0 && self.tx.is_empty() {
            self.kill(shared, io);
        }
    }

    /// Transmission begins.
    pub fn enter(&mut self, entered: Entered) {
        let Entered { export, structured, allocation, max_payload } = entered;
        self.phase = Phase::Serving;
        self.key = Some(export.key);
        self.size = export.geometry.size;
        self.read_only = export.geometry.read_only;
        self.discard = export.geometry.discard;
        self.structured = structured;
        self.allocation = allocation;
        self.max_payload = max_payload;
        self.rx.enter();
        self.blocked = true; // the first look is due when the negotiation's last reply is on its way
    }

    /// Takes a completed receive of the transmission phase. The server goes on with [`Conn::advance`].
    pub fn received<I: Io>(&mut self, shared: &mut Shared, io: &mut I, done: Done) {
        shared.counters.receives += 1;
        match self.rx.received(done) {
            _ if self.dead => self.rx.clear(),
            Ok(0) => self.end(),
            Ok(_) => {}
            Err(_) => self.kill(shared, io),
        }
    }

    /// Takes a completed send.
    pub fn sent<I: Io>(&mut self, shared: &mut Shared, io: &mut I, done: Done) {
        shared.counters.sends += 1;
        let cost = self.tx.sent(done.part, done.parts);
        if self.dead {
            return;
        }
        self.release_read(shared, cost);
        if done.result.is_err() {
            self.kill(shared, io);
        }
    }

    /// Uses what was received, as far as there is room, and receives more.
    pub fn advance<I: Io>(&mut self, shared: &mut Shared, io: &mut I, disk: &mut impl HostDisk<I>, token: Token) {
        if self.dead || self.ending || self.rx.is_receiving() || !self.tx.bulk_is_empty() {
            return;
        }
        self.blocked = false;
        self.starved = false;
        let want = loop {
            if self.drain > 0 {
                self.drain -= self.rx.consume(self.drain);
                if self.drain > 0 {
                    break Want::Drain;
                }
                if let Some((cookie, error, text)) = self.drained.take() {
                    self.push_error(shared, cookie, error, text);
                }
            } else if let Some(number) = self.writing {
                match self.payload(shared, io, disk, number) {
                    Ok(Some(want)) => break want,
                    Ok(None) => {}
                    Err(NoRoom) => {
                        self.blocked = true;
                        self.starved = true;
                        return;
                    }
                }
            } else {
                let Some(header) = self.rx.peek() else { break Want::Request };
                let reserved = self.reqs.len() * SMALL_MAX + STATUS_MAX;
                if self.reqs.len() >= shared.limits.requests || self.tx.room() < reserved {
                    self.blocked = true;
                    return;
                }
                let Some(header) = RequestHeader::parse(&header) else {
                    return self.violation(shared, io, "a request without its magic number");
                };
                match self.take_request(shared, io, disk, &header) {
                    Ok(()) => {}
                    Err(NoRoom) => {
                        self.blocked = true;
                        self.starved = true;
                        return;
                    }
                }
                if self.dead || self.ending {
                    return;
                }
            }
        };
        self.rx.post(io, token, self.sock, want);
    }

    /// Goes on with the payload of a write. What to receive for it, or none when a part or all of it went to the disk.
    fn payload<I: Io>(
        &mut self,
        shared: &mut Shared,
        io: &mut I,
        disk: &mut impl HostDisk<I>,
        number: u32,
    ) -> Result<Option<Want>, NoRoom> {
        let req = self.reqs.get(number).expect("the write being received is under way");
        let (offset, len, end, Kind::Write { fua }) = (req.next, req.next_len(), req.end, req.kind) else {
            unreachable!("only writes have payload")
        };
        if self.rx.fill.is_none() {
            self.rx.fill = Some(self.place(shared, io, offset, len)?);
        }
        shared.counters.copied_bytes += self.rx.copy_into_fill() as u64;
        let Some(fill) = &self.rx.fill else { unreachable!("placed above") };
        let len = fill.part.len;
        let last = offset + len as u64 == end;
        let Some(fill) = self.rx.fill.take_if(|f| f.filled == f.part.len) else {
            return Ok(Some(if last { Want::Fill } else { Want::FillOnly }));
        };
        shared.counters.written_bytes += len as u64;
        let req = self.reqs.get(number).expect("as above");
        req.next += len as u64;
        req.outstanding += 1;
        if last {
            self.writing = None;
        }
        let cost = capacity(offset, len);
        let op = self.ops.insert(PartOp { req: number, offset, len, cost, next: NONE, tries: 0, data: None });
        self.outstanding += 1;
        disk.request(io, self.cookie(op), Request::Write { offset, data: fill.part, fua });
        Ok(None)
    }

    /// A place for up to `len` bytes of payload for `offset`, paid for. Where a long one is not to be had (long buffers
    /// are few, and what is captured keeps them until it is acknowledged) a short one lets the write go on.
    fn place<I: Io>(&mut self, shared: &mut Shared, io: &mut I, offset: u64, len: usize) -> Result<Fill, NoRoom> {
        let short = len.min(PART_SHORT - (offset % PART_SHORT as u64) as usize);
        for len in [len, short] {
            let cost = capacity(offset, len);
            // Only a short one may go beyond the budget.
            let within = shared.write_used == 0 || shared.write_used + cost <= shared.write_limit();
            if !(within || len == short) || self.reserve_write(shared, cost).is_err() {
                continue;
            }
            if let Some(buf) = io.pool().take(cost) {
                return Ok(Fill { part: Part { buf, at: position(offset), len }, filled: 0 });
            }
            self.release_write(shared, cost);
        }
        Err(NoRoom)
    }

    pub(super) fn cookie(&self, op: u32) -> u64 {
        FrontId::Nbd.cookie(u64::from(self.id) << 32 | u64::from(op))
    }

    /// Takes the request whose header is at the front. Nothing is used up if there is no room for it.
    fn take_request<I: Io>(
        &mut self,
        shared: &mut Shared,
        io: &mut I,
        disk: &mut impl HostDisk<I>,
        header: &RequestHeader,
    ) -> Result<(), NoRoom> {
        if header.kind == cmd::WRITE {
            return self.take_write(shared, io, header);
        }
        shared.counters.requests += 1;
        self.rx.consume(REQUEST_HEADER);
        self.rx.saw_other();
        if header.kind == cmd::DISC {
            self.end();
            return Ok(());
        }
        if let Err((error, text)) = self.judge(shared, header) {
            self.push_error(shared, header.cookie, error, text);
            return Ok(());
        }
        let RequestHeader { flags, offset, cookie, .. } = *header;
        let len = u64::from(header.len);
        let fua = flags & cmd_flag::FUA != 0;
        let fast = flags & cmd_flag::FAST_ZERO != 0;
        let request = match header.kind {
            cmd::READ => {
                let mode = self.read_mode(shared, header);
                let number = self.reqs.insert(Req::new(cookie, offset, offset + len, Kind::Read(mode)));
                if mode == ReadMode::Ordered {
                    self.ordered.push_back(number);
                }
                self.reads.push_back(number);
                self.issue_reads(shared, io, disk);
                return Ok(());
            }
            cmd::CACHE => {
                self.push_success(cookie); // a hint, and the disk has no cache to fill
                return Ok(());
            }
            cmd::BLOCK_STATUS => {
                let one = flags & cmd_flag::REQ_ONE != 0;
                let extents = Extents::of(io, disk, offset, offset + len, one);
                let payload = extents.bytes();
                let head = chunk_header(chunk::DONE, chunk::BLOCK_STATUS, cookie, payload.len() as u32);
                self.tx.push_small(&head, payload);
                return Ok(());
            }
            cmd::FLUSH => Request::Flush,
            cmd::TRIM => Request::Discard { offset, len, fua },
            _ => {
                let unmap = self.discard && flags & cmd_flag::NO_HOLE == 0;
                Request::Zero { offset, len, unmap, fast_only: fast, fua }
            }
        };
        let end = offset + len;
        let number =
            self.reqs.insert(Req { next: end, outstanding: 1, ..Req::new(cookie, offset, end, Kind::Plain { fast }) });
        let op = self.ops.insert(PartOp { req: number, offset, len: 0, cost: 0, next: NONE, tries: 0, data: None });
        self.outstanding += 1;
        disk.request(io, self.cookie(op), request);
        Ok(())
    }

    fn take_write<I: Io>(&mut self, shared: &mut Shared, io: &mut I, header: &RequestHeader) -> Result<(), NoRoom> {
        if let Err((error, text)) = self.judge(shared, header) {
            shared.counters.requests += 1;
            self.rx.consume(REQUEST_HEADER);
            self.rx.saw_other();
            if header.len > DRAIN_MAX {
                self.violation(shared, io, "a payload too long to skip");
                return Ok(());
            }
            if header.len == 0 {
                self.push_error(shared, header.cookie, error, text);
            } else {
                self.drain = header.len as usize;
                self.drained = Some((header.cookie, error, text));
            }
            return Ok(());
        }
        let fua = header.flags & cmd_flag::FUA != 0;
        let end = header.offset + u64::from(header.len);
        let req = Req::new(header.cookie, header.offset, end, Kind::Write { fua });
        let len = req.next_len();
        let placed = self.rx.fits_slot(header.offset, len);
        if placed {
            self.reserve_write(shared, capacity(header.offset, len))?;
            self.rx.take_slot(header.offset, len);
        } else {
            let fill = self.place(shared, io, header.offset, len)?;
            self.rx.consume(REQUEST_HEADER);
            self.rx.fill = Some(fill);
        }
        shared.counters.requests += 1;
        self.rx.saw_write(header.offset, header.len as usize, placed);
        self.writing = Some(self.reqs.insert(req));
        Ok(())
    }

    /// Whether a request may be done, or the error of its reply.
    fn judge(&self, shared: &Shared, header: &RequestHeader) -> Result<(), (u32, &'static str)> {
        const BEYOND: &str = "beyond the end of the disk";
        let RequestHeader { flags, kind, offset, len, .. } = *header;
        let df = if self.structured { cmd_flag::DF } else { 0 };
        // FUA must be taken with every command, where it means nothing too.
        let allowed = cmd_flag::FUA
            | match kind {
                cmd::READ => df,
                cmd::WRITE | cmd::FLUSH | cmd::CACHE => 0,
                cmd::TRIM if self.discard || self.read_only => 0,
                cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
                cmd::BLOCK_STATUS if self.allocation => cmd_flag::REQ_ONE,
                cmd::BLOCK_STATUS => return Err((error::EINVAL, "no metadata context was selected")),
                cmd::TRIM => return Err((error::EINVAL, "this disk cannot discard")),
                _ => return Err((error::EINVAL, "unknown command")),
            };
        if flags & !allowed != 0 {
            return Err((error::EINVAL, "unknown flag"));
        }
        if kind == cmd::FLUSH {
            return if offset == 0 && len == 0 { Ok(()) } else { Err((error::EINVAL, "a flush has no range")) };
        }
        if self.read_only && matches!(kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES) {
            return Err((error::EPERM, "the disk is read-only"));
        }
        if len == 0 {
            return Err((error::EINVAL, "an empty range"));
        }
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > self.size) {
            let no_space = matches!(kind, cmd::WRITE | cmd::WRITE_ZEROES);
            return Err((if no_space { error::ENOSPC } else { error::EINVAL }, BEYOND));
        }
        if matches!(kind, cmd::READ | cmd::WRITE) && len > self.max_payload {
            // A structured read could be cut: for it the text has an error of its own, which says that less can be had.
            let cut = kind == cmd::READ && self.structured;
            return Err((if cut { error::EOVERFLOW } else { error::EINVAL }, "longer than the server takes"));
        }
        if kind == cmd::READ && flags & cmd_flag::DF != 0 && len as usize > gather_max(shared) {
            return Err((error::EOVERFLOW, "too long to send in one chunk"));
        }
        Ok(())
    }

    // --- replies

    fn push_success(&mut self, cookie: u64) {
        self.tx.push_small(&simple_reply(0, cookie), &[]);
    }

    fn push_error(&mut self, shared: &mut Shared, cookie: u64, error: u32, text: &str) {
        shared.counters.errors += 1;
        let (bytes, len) = error_reply(self.structured, cookie, error, text);
        self.tx.push_small(&bytes[..len], &[]);
    }

    /// Replies to a request that is over, but for reads that went well: their data is the reply.
    pub(super) fn finish(&mut self, number: u32) {
        let Some(req) = self.reqs.remove(number) else { return };
        if req.unanswered {
            return;
        }
        if req.error != 0 {
            let (bytes, len) = error_reply(self.structured, req.cookie, req.error, "");
            self.tx.push_after(&bytes[..len], &[]);
        } else if !matches!(req.kind, Kind::Read(_)) {
            self.push_success(req.cookie);
        }
    }

    // --- budgets

    pub(super) fn reserve_write(&mut self, shared: &mut Shared, cost: usize) -> Result<(), NoRoom> {
        // A connection that holds nothing may always go on: payload of one never waits for another's for good.
        if shared.write_used + cost > shared.write_limit() && self.write_held > 0 {
            return Err(NoRoom);
        }
        shared.write_used += cost;
        self.write_held += cost;
        Ok(())
    }

    pub(super) fn release_write(&mut self, shared: &mut Shared, cost: usize) {
        shared.write_used -= cost;
        self.write_held -= cost;
    }

    pub(super) fn reserve_read(&mut self, shared: &mut Shared, cost: usize) -> bool {
        let limit = shared.read_limit();
        // Half as much as is left, and something to begin with: clients that ask for all they can get and take none of
        // it leave room for those that come later.
        if self.read_held > 0 && self.read_held + cost > limit.saturating_sub(shared.read_used) / 2 {
            return false; // until its client takes what it has asked for
        }
        if shared.read_used + cost > limit && shared.read_used > 0 {
            self.starved = true;
            return false;
        }
        shared.read_used += cost;
        self.read_held += cost;
        true
    }

    pub(super) fn release_read(&mut self, shared: &mut Shared, cost: usize) {
        shared.read_used -= cost;
        self.read_held -= cost;
    }
}

/// There is no request slot, no budget or no buffer now.
#[derive(Debug)]
pub(super) struct NoRoom;

pub(super) fn gather_max(shared: &Shared) -> usize {
    GATHER_MAX.min(shared.read_limit() / 4).max(crate::host::MAX_PART)
}

pub(super) fn read_cost(len: usize) -> usize {
    HEADROOM + len + 4096
}

/// The sum of the costs of the parts of a read.
pub(super) fn gathered_cost(begin: u64, end: u64) -> usize {
    let part = crate::host::MAX_PART as u64;
    let parts = (end - 1) / part - begin / part + 1;
    (end - begin) as usize + parts as usize * read_cost(0)
}

/// An error reply and its length.
fn error_reply(structured: bool, cookie: u64, error: u32, text: &str) -> ([u8; SMALL_MAX], usize) {
    let mut out = [0; SMALL_MAX];
    if !structured {
        out[..SIMPLE_HEADER].copy_from_slice(&simple_reply(error, cookie));
        return (out, SIMPLE_HEADER);
    }
    let payload = 6 + text.len();
    let head = chunk_header(chunk::DONE, chunk::ERROR, cookie, payload as u32);
    out[..head.len()].copy_from_slice(&head);
    out[head.len()..][..4].copy_from_slice(&error.to_be_bytes());
    out[head.len() + 4..][..2].copy_from_slice(&(text.len() as u16).to_be_bytes());
    out[head.len() + 6..][..text.len()].copy_from_slice(text.as_bytes());
    (out, head.len() + payload)
}

const _: () = assert!(proto::CHUNK_HEADER + 6 + 64 <= SMALL_MAX && DATA_HEADER <= HEADROOM);
