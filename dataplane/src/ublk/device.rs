//! One device: its tags, the requests that they hold, and the pieces of these that are under way.
//!
//! A request with data is cut into pieces that the disk takes ([`crate::host::MAX_PART`]). A piece of a write is copied in,
//! then asked of the disk; a piece of a read is asked, then copied out. When nothing of a request is under way any more it
//! is answered, or, if its disk has gone or had no buffer, asked again as a whole: nobody has heard of it yet.

use std::collections::VecDeque;

use crate::host::{DiskKey, FrontId, HEADROOM, HostDisk, Request};
use crate::io::{Done, Errno, File, Io, Op, Part, Token, UblkOp};
use crate::nbd::request::Slab;

use super::request::{Bounds, Kind, PIECE_SHORT, Req};
use super::server::Shared;

/// A write's buffer reaches this far past its data: the disk completes pages in place.
const SLACK: usize = 4096;

/// Kinds of tokens, in the upper bits of a token's own part; the rest is a tag or a piece.
pub(super) const FETCH: u32 = 0;
pub(super) const COPY: u32 = 1;
pub(super) const NUMBER_BITS: u32 = 28;

/// Where a tag is.
#[derive(Debug)]
enum Tag {
    /// With the kernel.
    Fetching,
    /// With us.
    Busy(Req),
    /// With us, and left to the next process: this one takes no more.
    Left,
    /// The device gives no more requests.
    Over,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Stage {
    CopyIn,
    Asked,
    CopyOut,
}

/// A piece under way.
#[derive(Debug)]
struct Piece {
    tag: u16,
    offset: u64,
    len: usize,
    /// What it takes of the budgets, bytes.
    cost: usize,
    stage: Stage,
}

/// What one look at a device has found.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// All that waited is under way.
    Enough,
    /// Something waits for buffers.
    Short,
}

/// A device.
#[derive(Debug)]
pub(super) struct Device {
    /// Upper half of its tokens.
    pub token: Token,
    /// Its place in the server.
    pub index: u16,
    /// Lives of its place and of its tie to a disk: an answer to what an earlier one asked is not for this.
    pub epoch: u16,
    pub file: File,
    /// The export that it is a device of.
    pub name: String,
    pub bounds: Bounds,
    /// As it was made, bytes.
    pub device_size: u64,
    pub block: u32,
    pub key: Option<DiskKey>,
    /// Requests go to the disk. Otherwise they wait.
    pub serving: bool,
    /// The device is being ended: what would wait fails.
    pub failing: bool,
    tags: Vec<Tag>,
    pieces: Slab<Piece>,
    /// Requests of which something is still to be begun, in order.
    waiting: VecDeque<u16>,
    /// Those that are to be asked again at the next look.
    later: VecDeque<u16>,
    /// Tags that the kernel has.
    fetching: usize,
    /// Copies under way.
    copying: usize,
    /// Pieces that the disk has.
    asked: usize,
    held: usize,
}

impl Device {
    pub fn new(token: Token, index: u16, epoch: u16, file: File, name: String, depth: u16, bounds: Bounds) -> Self {
        Self {
            token,
            index,
            epoch,
            file,
            name,
            device_size: bounds.size,
            block: 512,
            bounds,
            key: None,
            serving: false,
            failing: false,
            tags: (0..depth).map(|_| Tag::Fetching).collect(),
            pieces: Slab::default(),
            waiting: VecDeque::new(),
            later: VecDeque::new(),
            fetching: 0,
            copying: 0,
            asked: 0,
            held: 0,
        }
    }

    /// Fetches every tag for the first time.
    pub fn begin<I: Io>(&mut self, io: &mut I) {
        for tag in 0..self.tags.len() as u16 {
            self.fetch(io, tag, None);
        }
    }

    /// Requests that it holds.
    pub fn requests(&self) -> usize {
        self.tags.iter().filter(|tag| matches!(tag, Tag::Busy(_))).count()
    }

    /// The kernel has ended it, and nothing is under way: it can be closed.
    pub fn is_over(&self) -> bool {
        self.fetching == 0 && self.copying == 0 && self.tags.iter().all(|tag| matches!(tag, Tag::Over | Tag::Left))
    }

    /// Nothing is under way with the disk.
    pub fn is_idle(&self) -> bool {
        self.copying == 0 && self.asked == 0
    }

    pub fn wants_disk(&self) -> bool {
        self.serving && !(self.waiting.is_empty() && self.later.is_empty())
    }

    fn fetch<I: Io>(&mut self, io: &mut I, tag: u16, commit: Option<i32>) {
        self.fetching += 1;
        self.tags[usize::from(tag)] = Tag::Fetching;
        let token = self.token | Token::from(FETCH << NUMBER_BITS | u32::from(tag));
        io.submit(token, Op::Ublk(UblkOp::Fetch { device: self.file, tag, commit }));
    }

    /// A fetch has completed.
    pub fn fetched<I: Io>(&mut self, shared: &mut Shared, io: &mut I, tag: u16, done: &Done) {
        let Some(place) = self.tags.get_mut(usize::from(tag)) else { return };
        self.fetching -= 1;
        if let Err(errno) = done.result {
            if errno != Errno::NODEV {
                tracing::warn!(device = self.name, tag, %errno, "a ublk tag cannot be fetched");
            }
            *place = Tag::Over;
            return;
        }
        if shared.stopping {
            // The next process is asked for it.
            *place = Tag::Left;
            return;
        }
        shared.counters.requests += 1;
        let request = io.ublk_request(self.file, tag).and_then(|bytes| Req::parse(&bytes, &self.bounds));
        match request {
            Ok(_) if self.failing => self.answer_error(shared, io, tag, Errno::IO),
            Ok(request) => {
                self.tags[usize::from(tag)] = Tag::Busy(request);
                self.waiting.push_back(tag);
            }
            Err(errno) => self.answer_error(shared, io, tag, errno),
        }
    }

    fn answer_error<I: Io>(&mut self, shared: &mut Shared, io: &mut I, tag: u16, errno: Errno) {
        shared.counters.errors += 1;
        self.fetch(io, tag, Some(-errno.0.max(1)));
    }

    fn req(&mut self, tag: u16) -> Option<&mut Req> {
        match self.tags.get_mut(usize::from(tag)) {
            Some(Tag::Busy(req)) => Some(req),
            _ => None,
        }
    }

    /// Begins what waits, as far as there is room.
    pub fn issue<I: Io>(&mut self, shared: &mut Shared, io: &mut I, disk: &mut impl HostDisk<I>, again: bool) -> Room {
        if again {
            self.waiting.extend(self.later.drain(..));
        }
        while let Some(&tag) = self.waiting.front() {
            let Some(req) = self.req(tag) else {
                self.waiting.pop_front();
                continue;
            };
            let (kind, offset, end) = (req.kind, req.next, req.end);
            let len = end - offset;
            match kind {
                Kind::Read => {
                    let len = req.next_len();
                    let cost = HEADROOM + len + SLACK;
                    if !self.reserve_read(shared, cost) {
                        return Room::Short;
                    }
                    let piece = self.piece(tag, offset, len, cost, Stage::Asked);
                    disk.request(io, self.cookie(piece), Request::Read { offset, len });
                }
                Kind::Write { .. } => {
                    let longest = req.next_len();
                    let Some((part, cost)) = self.place(shared, io, offset, longest) else { return Room::Short };
                    self.copying += 1;
                    let len = part.len;
                    let piece = self.piece(tag, offset, len, cost, Stage::CopyIn);
                    let token = self.token | Token::from(COPY << NUMBER_BITS | piece);
                    let at = self.within(tag, offset);
                    io.submit(token, Op::Ublk(UblkOp::CopyIn { device: self.file, tag, at, part }));
                }
                Kind::Flush => self.ask(io, disk, tag, Request::Flush),
                Kind::Discard { fua } => self.ask(io, disk, tag, Request::Discard { offset, len, fua }),
                Kind::Zero { unmap, fua } => {
                    self.ask(io, disk, tag, Request::Zero { offset, len, unmap, fast_only: false, fua });
                }
            }
            if self.req(tag).is_none_or(|req| req.is_begun()) {
                self.waiting.pop_front();
            }
        }
        Room::Enough
    }

    /// A request without data.
    fn ask<I: Io>(&mut self, io: &mut I, disk: &mut impl HostDisk<I>, tag: u16, request: Request) {
        let piece = self.piece(tag, 0, 0, 0, Stage::Asked);
        disk.request(io, self.cookie(piece), request);
    }

    fn piece(&mut self, tag: u16, offset: u64, len: usize, cost: usize, stage: Stage) -> u32 {
        self.asked += usize::from(stage == Stage::Asked);
        if let Some(req) = self.req(tag) {
            req.outstanding += 1;
            if req.has_data() {
                req.next = offset + len as u64;
            } else {
                req.begun = true;
            }
        }
        self.pieces.insert(Piece { tag, offset, len, cost, stage })
    }

    /// Where a piece begins in the data of its request.
    fn within(&mut self, tag: u16, offset: u64) -> u32 {
        self.req(tag).map_or(0, |req| (offset - req.offset) as u32)
    }

    fn cookie(&self, piece: u32) -> u64 {
        let own = u64::from(self.index) << 46 | u64::from(self.epoch) << 32 | u64::from(piece);
        FrontId::Ublk.cookie(own)
    }

    /// A copy has completed.
    pub fn copied<I: Io>(
        &mut self,
        shared: &mut Shared,
        io: &mut I,
        disk: Option<&mut impl HostDisk<I>>,
        number: u32,
        done: Done,
    ) {
        self.copying -= 1;
        let Some(piece) = self.pieces.get(number) else { return };
        let (tag, offset, len, stage) = (piece.tag, piece.offset, piece.len, piece.stage);
        let whole = done.result == Ok(len as u64);
        match (stage, done.part, disk) {
            (Stage::CopyIn, Some(data), Some(disk)) if whole && self.serving => {
                shared.counters.written_bytes += len as u64;
                piece.stage = Stage::Asked;
                self.asked += 1;
                let fua = self.req(tag).is_some_and(|req| req.kind == Kind::Write { fua: true });
                disk.request(io, self.cookie(number), Request::Write { offset, data, fua });
                return;
            }
            // Its disk has gone meanwhile.
            (Stage::CopyIn, _, _) if whole => self.restart(tag),
            (Stage::CopyOut, ..) if whole => shared.counters.read_bytes += len as u64,
            _ => self.fail(shared, tag, done.result.err().unwrap_or(Errno::IO)),
        }
        self.end_piece(shared, io, number, false);
    }

    /// The disk's answer to a piece.
    pub fn answer<I: Io>(&mut self, shared: &mut Shared, io: &mut I, number: u32, result: Result<Option<Part>, Errno>) {
        let Some(piece) = self.pieces.get(number) else { return };
        if piece.stage != Stage::Asked {
            return;
        }
        self.asked -= 1;
        let (tag, offset, len) = (piece.tag, piece.offset, piece.len);
        let reads = self.req(tag).is_some_and(|req| req.kind == Kind::Read);
        let mut later = false;
        match result {
            Ok(Some(part)) if reads && part.len == len => {
                if let Some(piece) = self.pieces.get(number) {
                    piece.stage = Stage::CopyOut;
                }
                self.copying += 1;
                let token = self.token | Token::from(COPY << NUMBER_BITS | number);
                let at = self.within(tag, offset);
                io.submit(token, Op::Ublk(UblkOp::CopyOut { device: self.file, tag, at, part }));
                return;
            }
            Ok(None) if !reads => {}
            Ok(_) => self.fail(shared, tag, Errno::IO),
            // The disk is being taken away, to be served again by another process or with other settings.
            Err(Errno::SHUTDOWN) => {
                self.serving = false;
                self.restart(tag);
            }
            // Buffers come back: waiting is better than an error that no host expects.
            Err(Errno::NOMEM) => {
                later = true;
                if let Some(req) = self.req(tag) {
                    req.short = true;
                }
                self.restart(tag);
            }
            Err(errno) => self.fail(shared, tag, errno),
        }
        self.end_piece(shared, io, number, later);
    }

    fn restart(&mut self, tag: u16) {
        if let Some(req) = self.req(tag) {
            req.restart = true;
        }
        self.waiting.retain(|waits| *waits != tag);
    }

    fn fail(&mut self, shared: &mut Shared, tag: u16, errno: Errno) {
        if let Some(req) = self.req(tag)
            && req.error == 0
        {
            req.error = errno.0.max(1);
            shared.counters.errors += 1;
        }
        self.waiting.retain(|waits| *waits != tag);
    }

    fn end_piece<I: Io>(&mut self, shared: &mut Shared, io: &mut I, number: u32, later: bool) {
        let Some(piece) = self.pieces.remove(number) else { return };
        let reads = self.req(piece.tag).is_some_and(|req| req.kind == Kind::Read);
        self.release(shared, piece.cost, reads);
        if let Some(req) = self.req(piece.tag) {
            req.outstanding -= 1;
        }
        self.settle(shared, io, piece.tag, later);
    }

    /// Answers a request of which nothing is under way, or has it asked again.
    fn settle<I: Io>(&mut self, shared: &mut Shared, io: &mut I, tag: u16, later: bool) {
        let failing = self.failing;
        let Some(req) = self.req(tag).filter(|req| req.outstanding == 0) else { return };
        if req.restart && req.error == 0 {
            if shared.stopping {
                self.tags[usize::from(tag)] = Tag::Left;
            } else if failing {
                self.answer_error(shared, io, tag, Errno::IO);
            } else {
                req.begin_again();
                if later { self.later.push_back(tag) } else { self.waiting.push_back(tag) }
            }
        } else if req.error != 0 || req.is_begun() {
            let result = req.result();
            self.fetch(io, tag, Some(result));
        }
    }

    /// The disk has gone without a word; what it had is asked again of the one that comes back.
    pub fn park<I: Io>(&mut self, shared: &mut Shared, io: &mut I) {
        self.serving = false;
        self.key = None;
        self.epoch = self.epoch.wrapping_add(1) & super::server::EPOCHS;
        for number in self.pieces.numbers() {
            let Some(piece) = self.pieces.get(number).filter(|piece| piece.stage == Stage::Asked) else { continue };
            let tag = piece.tag;
            self.asked -= 1;
            self.restart(tag);
            self.end_piece(shared, io, number, false);
        }
    }

    /// Everything that waits fails from now on: the device is being ended.
    pub fn fail_all<I: Io>(&mut self, shared: &mut Shared, io: &mut I) {
        self.failing = true;
        let waiting = std::mem::take(&mut self.waiting);
        let later = std::mem::take(&mut self.later);
        for tag in waiting.into_iter().chain(later) {
            self.fail(shared, tag, Errno::IO);
            self.settle(shared, io, tag, false);
        }
    }

    /// The process ends: what is not under way is left to the next one.
    pub fn leave(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        let later = std::mem::take(&mut self.later);
        for tag in waiting.into_iter().chain(later) {
            match self.req(tag) {
                Some(req) if req.outstanding > 0 => req.restart = true,
                Some(_) => self.tags[usize::from(tag)] = Tag::Left,
                None => {}
            }
        }
    }

    // --- budgets

    /// A place for up to `len` bytes of a write at `offset`, paid for. Where a long one is not to be had (long buffers are
    /// few, and what is captured keeps them until it is acknowledged) a short one lets the write go on.
    fn place<I: Io>(&mut self, shared: &mut Shared, io: &mut I, offset: u64, len: usize) -> Option<(Part, usize)> {
        let short = len.min(PIECE_SHORT - (offset % PIECE_SHORT as u64) as usize);
        for len in [len, short] {
            let at = HEADROOM + (offset % 4096) as usize;
            let cost = at + len + SLACK;
            // A device that holds nothing may always go on.
            if self.held > 0 && shared.write_used + cost > shared.write_limit() {
                continue;
            }
            if let Some(buf) = io.pool().take(cost) {
                shared.write_used += cost;
                self.held += cost;
                return Some((Part { buf, at, len }, cost));
            }
        }
        None
    }

    fn reserve_read(&mut self, shared: &mut Shared, cost: usize) -> bool {
        if self.held > 0 && shared.read_used + cost > shared.read_limit() {
            return false;
        }
        shared.read_used += cost;
        self.held += cost;
        true
    }

    fn release(&mut self, shared: &mut Shared, cost: usize, read: bool) {
        self.held -= cost;
        if read {
            shared.read_used -= cost;
        } else {
            shared.write_used -= cost;
        }
    }
}
