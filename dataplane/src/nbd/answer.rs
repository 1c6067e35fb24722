//! What the disk answers, and reads on their way to it and back to the client.

use crate::host::{HEADROOM, HostDisk, Request};
use crate::io::{Errno, Io, Part};

use super::conn::{Conn, gather_max, gathered_cost, read_cost};
use super::proto::{RequestHeader, cmd_flag, data_header, error_of, simple_reply};
use super::request::{Kind, NONE, PartOp, ReadMode};
use super::server::Shared;

/// Parts of one read that the disk has at a time.
const READ_WINDOW: u32 = 16;
/// How often a read is tried again when its disk has no buffer; a try each [`super::server::RETRY`] at the latest.
const READ_TRIES: u16 = 1000;

impl Conn {
    /// Takes the disk's answer to a part.
    pub fn answer<I: Io>(&mut self, shared: &mut Shared, io: &mut I, number: u32, result: Result<Option<Part>, Errno>) {
        if self.dead {
            self.outstanding = self.outstanding.saturating_sub(1);
            return;
        }
        if matches!(result, Err(Errno::SHUTDOWN)) {
            self.outstanding = self.outstanding.saturating_sub(1);
            // The disk is being taken away, to be served again by another process or with other settings. The text lets us
            // tell, but clients pass `ESHUTDOWN` on as a failed request; one whose connection ends asks again.
            return self.kill(shared, io);
        }
        let Some(op) = self.ops.get(number) else { return };
        self.outstanding -= 1;
        let (req_number, cost, len) = (op.req, op.cost, op.len);
        let req = self.reqs.get(req_number).expect("a part's request is under way");
        if matches!(result, Err(Errno::NOMEM))
            && matches!(req.kind, Kind::Read(_))
            && op.tries < READ_TRIES
            && req.error == 0
        {
            // Buffers come back: waiting is better than an error that no host expects. The request still waits for this
            // part: it is not over when the others are.
            op.tries += 1;
            self.retry.push_back(number);
            return;
        }
        req.outstanding -= 1;
        let mode = match req.kind {
            Kind::Read(mode) => mode,
            Kind::Write { .. } | Kind::Plain { .. } => {
                if let Err(errno) = result
                    && req.error == 0
                {
                    shared.counters.errors += 1;
                    req.error = error_of(errno, req.kind == Kind::Plain { fast: true });
                }
                let over = req.is_over();
                self.ops.remove(number);
                self.release_write(shared, cost);
                if over {
                    self.finish(req_number);
                }
                return;
            }
        };
        match result {
            Ok(Some(part)) if part.len == len && part.at >= HEADROOM => op.data = Some(part),
            other => {
                if req.error == 0 {
                    shared.counters.errors += 1;
                    req.error = error_of(other.err().unwrap_or(Errno::IO), false);
                }
                if req.next < req.end {
                    req.end = req.next; // no further parts
                    self.reads.retain(|&r| r != req_number);
                }
            }
        }
        match mode {
            ReadMode::Chunks => self.answer_chunk(shared, number, req_number),
            ReadMode::Gathered => self.answer_gathered(shared, req_number),
            ReadMode::Ordered => self.answer_ordered(shared, io),
        }
    }

    fn answer_chunk(&mut self, shared: &mut Shared, number: u32, req_number: u32) {
        let Some(op) = self.ops.remove(number) else { return };
        let req = self.reqs.get(req_number).expect("a part's request is under way");
        let over = req.is_over();
        let (cookie, failed) = (req.cookie, req.error != 0);
        match op.data {
            Some(part) => {
                let header = data_header(over && !failed, cookie, op.offset, op.len as u32);
                self.push_data(shared, part, &header, op.cost, false);
            }
            None => self.release_read(shared, op.cost),
        }
        if over {
            self.finish(req_number);
        }
    }

    fn answer_gathered(&mut self, shared: &mut Shared, req_number: u32) {
        let req = self.reqs.get(req_number).expect("a part's request is under way");
        if !req.is_over() {
            return;
        }
        let (cookie, offset, len, failed) = (req.cookie, req.offset, (req.end - req.offset) as u32, req.error != 0);
        let mut next = req.first;
        let mut first = true;
        while let Some(op) = self.ops.remove(next) {
            next = op.next;
            let more = next != NONE;
            match op.data {
                Some(part) if !failed => {
                    if !first {
                        self.push_data(shared, part, &[], op.cost, more);
                    } else if self.structured {
                        self.push_data(shared, part, &data_header(true, cookie, offset, len), op.cost, more);
                    } else {
                        self.push_data(shared, part, &simple_reply(0, cookie), op.cost, more);
                    }
                }
                _ => self.release_read(shared, op.cost),
            }
            first = false;
        }
        self.finish(req_number);
    }

    /// Moves what is ready of the reads that go out in order. One at a time: nothing gets between its pieces.
    fn answer_ordered<I: Io>(&mut self, shared: &mut Shared, io: &mut I) {
        while let Some(&number) = self.ordered.front() {
            self.stream_ready(shared, number);
            let req = self.reqs.get(number).expect("a queued read is under way");
            if req.error != 0 && req.started {
                // Its header said that all is well: nothing but the end of the connection can take that back.
                return self.kill(shared, io);
            }
            if !req.is_over() {
                return;
            }
            let mut next = req.first;
            while let Some(op) = self.ops.remove(next) {
                next = op.next;
                self.release_read(shared, op.cost);
            }
            self.ordered.pop_front();
            self.finish(number);
        }
    }

    /// Queues the parts of a read whose turn has come, in order as far as they are there.
    fn stream_ready(&mut self, shared: &mut Shared, number: u32) {
        loop {
            let req = self.reqs.get(number).expect("a queued read is under way");
            let (first, started, cookie, end) = (req.first, req.started, req.cookie, req.end);
            if req.error != 0 || self.ops.get(first).is_none_or(|op| op.data.is_none()) {
                return;
            }
            let Some(PartOp { data: Some(part), cost, next, offset, len, .. }) = self.ops.remove(first) else { return };
            let req = self.reqs.get(number).expect("as above");
            req.first = next;
            if next == NONE {
                req.last = NONE;
            }
            req.started = true;
            let more = offset + len as u64 != end;
            let header = simple_reply(0, cookie);
            let part = with_header(shared, part, if started { &[] } else { &header });
            self.tx.push_stream(part, cost, more);
        }
    }

    fn push_data(&mut self, shared: &mut Shared, part: Part, header: &[u8], cost: usize, more: bool) {
        self.tx.push_data(with_header(shared, part, header), cost, more);
    }

    // --- reads on their way to the disk

    pub(super) fn read_mode(&self, shared: &Shared, header: &RequestHeader) -> ReadMode {
        let len = header.len as usize;
        if self.structured && header.flags & cmd_flag::DF == 0 {
            ReadMode::Chunks
        } else if len <= gather_max(shared) {
            ReadMode::Gathered
        } else {
            ReadMode::Ordered
        }
    }

    /// Gives parts of reads to the disk as far as the budget goes.
    pub fn issue_reads<I: Io>(&mut self, shared: &mut Shared, io: &mut I, disk: &mut impl HostDisk<I>) {
        self.starved &= self.blocked;
        while let Some(&number) = self.reads.front() {
            let req = self.reqs.get(number).expect("a queued read is under way");
            let (offset, len, begin, end, kind) = (req.next, req.next_len(), req.offset, req.end, req.kind);
            if kind == Kind::Read(ReadMode::Gathered) {
                // All of it or nothing: two halves would wait for each other.
                if offset == begin && !self.reserve_read(shared, gathered_cost(begin, end)) {
                    return;
                }
            } else if req.outstanding >= READ_WINDOW || !self.reserve_read(shared, read_cost(len)) {
                return;
            }
            let op = PartOp { req: number, offset, len, cost: read_cost(len), next: NONE, tries: 0, data: None };
            let op = self.ops.insert(op);
            let req = self.reqs.get(number).expect("as above");
            req.next += len as u64;
            req.outstanding += 1;
            // Chunks go out as they come; the others are kept in a list, in order.
            let previous =
                if kind == Kind::Read(ReadMode::Chunks) { NONE } else { std::mem::replace(&mut req.last, op) };
            if previous == NONE {
                req.first = op;
            }
            if req.next == req.end {
                self.reads.pop_front();
            }
            if let Some(previous) = self.ops.get(previous) {
                previous.next = op;
            }
            self.outstanding += 1;
            disk.request(io, self.cookie(op), Request::Read { offset, len });
        }
    }

    /// Asks again for parts for which the disk had no buffer.
    pub fn retry_reads<I: Io>(&mut self, io: &mut I, disk: &mut impl HostDisk<I>) {
        for _ in 0..self.retry.len() {
            let Some(number) = self.retry.pop_front() else { break };
            let Some(op) = self.ops.get(number) else { continue };
            let (offset, len) = (op.offset, op.len);
            self.outstanding += 1;
            disk.request(io, self.cookie(number), Request::Read { offset, len });
        }
    }
}

/// The part with its header written in front of the data.
fn with_header(shared: &mut Shared, mut part: Part, header: &[u8]) -> Part {
    shared.counters.read_bytes += part.len as u64;
    let start = part.at - header.len();
    part.buf[start..part.at].copy_from_slice(header);
    part.len += header.len();
    part.at = start;
    part
}
