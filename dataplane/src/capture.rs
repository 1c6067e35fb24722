//! One source disk: what front ends ask of it, in order of overlap, with every completed write a numbered record.
//!
//! ```text
//! request ─▶ gate ─▶ range lock ─▶ complete partial blocks ─▶ intent bit durable ─▶ room in the queue ─▶ disk
//!                                                                                                         │
//! answer ◀── range lock free ◀── record, with the buffer, in its place ◀── number drawn ◀── completed ◀───┘
//! ```
//! What a crash at each step leaves: up to the bit, nothing has happened; from there to the acknowledgement the bit is
//! durable and the extent is read again by the next life; the host has no answer before the record has its number, so
//! whatever the host issues after an answer is numbered later. A write that fails gets no record of its data: its range
//! is recorded as unreadable and goes to the dirty map.
//!
//! `write` has the path of writes and zeroes, `flush` the flushes; synchronisation is in [`crate::resync`].

use std::collections::VecDeque;

use crate::host::{Answer, DiskKey, Geometry, HEADROOM, MAX_PART, Request};
use crate::intent::IntentLog;
use crate::io::guest::Scatter;
use crate::io::{Done, Errno, File, FileInfo, Io, Nanos, Op, Part, Token};
use crate::overlap::{LockId, RangeLock};
use crate::resync::Resync;
use crate::ship::Queue;
use crate::source::DiskConfig;

mod flush;
mod write;

pub(crate) use flush::Flush;

/// Most requests of one disk that are under way or held; more are refused with `ENOMEM`. Front ends admit far fewer.
pub const MAX_REQUESTS: usize = 16 * 1024;
/// Requests under way for which there is memory from the start.
const USUAL_REQUESTS: usize = 1024;
/// Most messages about faults that wait to be fetched.
const MAX_FAULTS: usize = 16;
/// Lock owners from here on are reads of a synchronisation.
pub(crate) const SYNC_OWNER: u32 = 1 << 31;

/// A record that will not be acknowledged.
const NEVER: u64 = u64::MAX;

const READ_ONLY: Errno = Errno(30);

/// Which operation of a disk a completion is of: bits 40 to 47 of its token.
pub(crate) mod kind {
    #![allow(missing_docs)]
    pub const HOST: u64 = 1;
    pub const FLUSH: u64 = 2;
    pub const LOG: u64 = 3;
    pub const SYNC: u64 = 4;
    pub const SEND: u64 = 5;
    pub const RECV: u64 = 6;
    // Those of the spill are in `spill::kind`.
}

/// Whether requests start.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Gate {
    /// The log is not ready: they are held.
    Opening,
    /// They start.
    Open,
    /// They are refused.
    Stopping,
}

/// What a request does.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Kind {
    Free,
    Read,
    Write,
    Zero { unmap: bool, fast_only: bool },
    Discard,
}

/// What an operation waits for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Stage {
    /// A buffer from the pool.
    Buffer,
    /// Its range.
    Lock,
    /// The block in which it begins.
    Head,
    /// The block in which it ends.
    Tail,
    /// The bits of its extents.
    Log,
    /// Room in the queue.
    Room,
    /// The disk.
    Disk,
    /// The disk, which reads straight to where the bytes are to go.
    Into,
}

/// How a piece of a request changes the disk.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Piece {
    /// Data, with partial blocks completed.
    Data,
    /// Zeros, written.
    Zeros,
    /// Zeros, by the file system or device.
    Native { unmap: bool },
}

/// A request under way. Zeroes and discards go piece by piece; a write is one piece.
#[derive(Debug)]
struct Active {
    kind: Kind,
    stage: Stage,
    cookie: u64,
    fua: bool,
    /// What is left: from here …
    at: u64,
    /// … to here.
    end: u64,
    piece: Piece,
    /// The piece reaches to here.
    to: u64,
    /// The I/O: from here …
    start: u64,
    /// … to here, whole blocks.
    stop: u64,
    data: Option<Part>,
    /// Where a read goes straight to; none if the host copies it.
    into: Option<Scatter>,
    lock: Option<LockId>,
    /// Bits are held.
    held: bool,
    /// Room taken.
    room: usize,
    captured: bool,
    /// Newest of its records; [`NEVER`] if a part of it is none.
    seq: u64,
}

const FREE: Active = Active {
    kind: Kind::Free,
    stage: Stage::Buffer,
    cookie: 0,
    fua: false,
    at: 0,
    end: 0,
    piece: Piece::Data,
    to: 0,
    start: 0,
    stop: 0,
    data: None,
    into: None,
    lock: None,
    held: false,
    room: 0,
    captured: false,
    seq: 0,
};

/// An answer that waits for the acknowledgement of a record.
#[derive(Debug)]
struct Awaiting {
    seq: u64,
    since: Nanos,
    cookie: u64,
}

/// What a disk needs of the world for a call.
pub(crate) struct Flow<'a, I> {
    pub io: &'a mut I,
    /// The queue of its stream; none if unprotected.
    pub queue: Option<&'a mut Queue>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Disk {
    pub config: DiskConfig,
    pub key: DiskKey,
    /// Index of the group; none if unprotected.
    pub group: Option<u32>,
    pub file: File,
    pub info: FileInfo,
    token: Token,
    pub gate: Gate,
    /// All I/O is held, answers too.
    fenced: bool,
    /// No answer is given from this moment on, since boot.
    pub lease_end: Nanos,
    /// It is not in the stream any more: the target holds this generation of it, or it has left (0).
    pub out: Option<u64>,
    /// The stream says that it has left: it comes back with a synchronisation of the whole disk only.
    pub left: bool,
    pub log: Option<IntentLog>,
    lock: RangeLock,
    granted: Vec<u32>,
    active: Vec<Active>,
    free: Vec<u32>,
    answers: VecDeque<Answer>,
    withheld: VecDeque<Answer>,
    /// Answers to writes in synchronous mode, in the order in which the writes ended.
    awaiting: VecDeque<Awaiting>,
    held: VecDeque<(u64, Request)>,
    starved: VecDeque<u32>,
    log_waiters: Vec<u32>,
    woken: Vec<u32>,
    pub flush: Flush,
    pub sync: Resync,
    /// The file cannot keep-allocated zeroes, or unmapping ones.
    cannot_zero: [bool; 2],
    pub failed_writes: u64,
    pub faults: VecDeque<String>,
}

impl Disk {
    /// A disk over an open file. `token` has the machine's id and the disk's index.
    pub fn new(config: DiskConfig, key: DiskKey, group: Option<u32>, file: File, info: FileInfo, token: Token) -> Self {
        Self {
            cannot_zero: [false, !info.discard],
            config,
            key,
            group,
            file,
            info,
            token,
            gate: if group.is_some() { Gate::Opening } else { Gate::Open },
            fenced: false,
            lease_end: Nanos::MAX,
            out: None,
            left: false,
            log: None,
            lock: RangeLock::with_capacity(USUAL_REQUESTS),
            granted: Vec::with_capacity(USUAL_REQUESTS),
            active: Vec::with_capacity(USUAL_REQUESTS),
            free: Vec::with_capacity(USUAL_REQUESTS),
            answers: VecDeque::with_capacity(USUAL_REQUESTS),
            withheld: VecDeque::new(),
            awaiting: VecDeque::new(),
            held: VecDeque::new(),
            starved: VecDeque::with_capacity(USUAL_REQUESTS),
            log_waiters: Vec::with_capacity(USUAL_REQUESTS),
            woken: Vec::with_capacity(USUAL_REQUESTS),
            flush: Flush::default(),
            sync: Resync::new(info.size),
            failed_writes: 0,
            faults: VecDeque::new(),
        }
    }

    /// The block that hosts are told of. Reads and writes are completed to the file's, which is never larger: not every
    /// host keeps to what it is told.
    pub fn told_block(&self) -> u32 {
        self.info.block.max(self.config.block)
    }

    pub fn geometry(&self) -> Geometry {
        Geometry {
            size: self.info.size,
            block: self.told_block(),
            physical_block: self.info.physical_block.max(self.told_block()),
            read_only: self.config.read_only,
            discard: self.info.discard,
            serial: self.config.serial.clone(),
        }
    }

    pub fn token(&self, kind: u64, slot: u32) -> Token {
        self.token | kind << 40 | u64::from(slot)
    }

    /// Requests under way, held, or answered and not fetched.
    pub fn in_flight(&self) -> usize {
        self.active.len() - self.free.len() + self.held.len() + self.awaiting.len()
    }

    /// Nothing of this disk is with the kernel, and no request is under way.
    pub fn is_quiet(&self) -> bool {
        self.active.len() == self.free.len()
            && self.held.is_empty()
            && !self.flush.is_busy()
            && self.sync.is_quiet()
            && self.log.as_ref().is_none_or(|log| !log.in_flight())
    }

    /// No request of a host is under way.
    pub fn is_drained(&self) -> bool {
        self.active.len() == self.free.len() && self.held.is_empty() && !self.flush.is_busy()
    }

    pub fn fault(&mut self, message: String) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push_back(message);
        }
    }

    pub fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.answers
    }

    fn answer<I: Io>(&mut self, f: &mut Flow<'_, I>, cookie: u64, result: Result<Option<Part>, Errno>) {
        // The lease is looked at for every single answer: the group may get its next turn too late.
        let hold = self.fenced || (self.lease_end != Nanos::MAX && f.io.since_boot() >= self.lease_end);
        let answers = if hold { &mut self.withheld } else { &mut self.answers };
        answers.push_back(Answer { cookie, result });
    }

    /// Holds all I/O and all answers, or lets them go.
    pub fn fence<I: Io>(&mut self, f: &mut Flow<'_, I>, hold: bool) {
        self.fenced = hold;
        if hold {
            self.withheld.append(&mut self.answers);
        } else {
            self.answers.append(&mut self.withheld);
            self.start_held(f);
        }
    }

    /// Brings what is held to what should be; true if that changed.
    pub fn hold<I: Io>(&mut self, f: &mut Flow<'_, I>, hold: bool) -> bool {
        let changed = self.fenced != hold;
        // Answers can also be withheld by a lease that has been renewed since.
        if changed || (!hold && !self.withheld.is_empty()) {
            self.fence(f, hold);
        }
        changed
    }

    /// Gives the answers that waited for records up to `acked`.
    pub fn answer_acked<I: Io>(&mut self, f: &mut Flow<'_, I>, acked: u64) {
        while self.awaiting.front().is_some_and(|first| first.seq <= acked)
            && let Some(first) = self.awaiting.pop_front()
        {
            self.answer(f, first.cookie, Ok(None));
        }
    }

    /// The records that answers wait for are given up: no acknowledgement will come.
    pub fn strand_answers(&mut self) {
        self.awaiting.iter_mut().for_each(|one| one.seq = NEVER);
    }

    /// Since when the oldest answer waits for an acknowledgement.
    pub fn awaits_since(&self) -> Option<Nanos> {
        self.awaiting.front().map(|first| first.since)
    }

    pub fn is_fenced(&self) -> bool {
        self.fenced
    }

    /// Opens or closes the gate; what was held starts or is refused.
    pub fn set_gate<I: Io>(&mut self, f: &mut Flow<'_, I>, gate: Gate) {
        self.gate = gate;
        self.start_held(f);
    }

    fn start_held<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        while !self.held.is_empty() && !self.holds() {
            if let Some((cookie, request)) = self.held.pop_front() {
                self.start(f, cookie, request);
            }
        }
        self.run(f);
    }

    fn holds(&self) -> bool {
        self.gate == Gate::Opening || (self.fenced && self.gate == Gate::Open)
    }

    /// Takes a request of a host.
    pub fn request<I: Io>(&mut self, f: &mut Flow<'_, I>, cookie: u64, request: Request) {
        if self.in_flight() >= MAX_REQUESTS {
            return self.answer(f, cookie, Err(Errno::NOMEM));
        }
        if self.holds() {
            self.held.push_back((cookie, request));
            return;
        }
        self.start(f, cookie, request);
        self.run(f);
    }

    fn start<I: Io>(&mut self, f: &mut Flow<'_, I>, cookie: u64, request: Request) {
        if self.gate == Gate::Stopping {
            return self.answer(f, cookie, Err(Errno::SHUTDOWN));
        }
        let (offset, len) = match &request {
            Request::Read { offset, len } => (*offset, *len as u64),
            Request::ReadInto { offset, to } => (*offset, to.len() as u64),
            Request::Write { offset, data, .. } => (*offset, data.len as u64),
            Request::Zero { offset, len, .. } | Request::Discard { offset, len, .. } => (*offset, *len),
            Request::Flush => return self.flush_for(f, cookie, 0),
        };
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.info.size && len > 0) else {
            return self.answer(f, cookie, Err(Errno::INVAL));
        };
        if self.config.read_only && !matches!(request, Request::Read { .. } | Request::ReadInto { .. }) {
            return self.answer(f, cookie, Err(READ_ONLY));
        }
        let new = Active { cookie, at: offset, end, ..FREE };
        match request {
            Request::Read { .. } if len <= MAX_PART as u64 => {
                let slot = self.admit(Active { kind: Kind::Read, ..new });
                self.read(f, slot);
            }
            Request::ReadInto { to, .. } if len <= MAX_PART as u64 => {
                let block = self.info.block as usize;
                let fits = offset.is_multiple_of(block as u64) && to.is_aligned(block);
                let slot = self.admit(Active { kind: Kind::Read, into: fits.then_some(to), ..new });
                self.read(f, slot);
            }
            Request::Write { data, fua, .. } => {
                // The contract of the front end; without it blocks could not be completed in place.
                let congruent = data.at % HEADROOM == (offset % HEADROOM as u64) as usize;
                if !congruent || data.at < HEADROOM || data.at + data.len + HEADROOM > data.buf.len() {
                    return self.answer(f, cookie, Err(Errno::INVAL));
                }
                let slot = self.admit(Active { kind: Kind::Write, fua, data: Some(data), ..new });
                self.begin_piece(f, slot);
            }
            Request::Zero { unmap, fast_only, fua, .. } => {
                let slot = self.admit(Active { kind: Kind::Zero { unmap, fast_only }, fua, ..new });
                self.begin_piece(f, slot);
            }
            Request::Discard { fua, .. } => {
                let block = u64::from(self.info.block);
                let (at, end) = (offset.next_multiple_of(block), end - end % block);
                if at >= end {
                    return self.answer(f, cookie, Ok(None));
                }
                let slot = self.admit(Active { kind: Kind::Discard, fua, at, end, ..new });
                self.begin_piece(f, slot);
            }
            Request::Read { .. } | Request::ReadInto { .. } | Request::Flush => {
                self.answer(f, cookie, Err(Errno::INVAL));
            }
        }
    }

    fn admit(&mut self, new: Active) -> u32 {
        match self.free.pop() {
            Some(slot) => {
                self.active[slot as usize] = new;
                slot
            }
            None => {
                self.active.push(new);
                (self.active.len() - 1) as u32
            }
        }
    }

    /// Ends a request.
    fn finish<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, result: Result<Option<Part>, Errno>) {
        let done = std::mem::replace(&mut self.active[slot as usize], FREE);
        self.free.push(slot);
        debug_assert!(done.lock.is_none() && !done.held && done.room == 0);
        match (done.kind, &result) {
            // Zeroing has no durable form: a flush is one.
            (Kind::Zero { .. } | Kind::Discard, Ok(_)) if done.fua => self.flush_for(f, done.cookie, done.seq),
            (Kind::Zero { .. } | Kind::Discard | Kind::Write, Ok(_)) => self.written_answer(f, done.cookie, done.seq),
            _ => self.answer(f, done.cookie, result),
        }
    }

    /// Answers a write that the disk has: at once, or when its record `seq` is acknowledged.
    fn written_answer<I: Io>(&mut self, f: &mut Flow<'_, I>, cookie: u64, seq: u64) {
        if seq > 0 && f.queue.as_deref().is_some_and(|queue| queue.holds_answers) {
            let since = f.io.now();
            return self.awaiting.push_back(Awaiting { seq, since, cookie });
        }
        self.answer(f, cookie, Ok(None));
    }

    fn read<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32) {
        let block = u64::from(self.info.block);
        let op = &mut self.active[slot as usize];
        op.start = op.at - op.at % block;
        op.stop = op.end.next_multiple_of(block);
        let len = (op.stop - op.start) as usize;
        if let Some(to) = op.into.take() {
            op.stage = Stage::Into;
            let (file, offset) = (self.file, op.start);
            return f.io.submit(self.token(kind::HOST, slot), Op::ReadInto { file, offset, to });
        }
        let Some(buf) = f.io.pool().take(HEADROOM + len) else {
            op.stage = Stage::Buffer;
            return self.starved.push_back(slot);
        };
        op.stage = Stage::Disk;
        let (file, offset) = (self.file, op.start);
        f.io.submit(self.token(kind::HOST, slot), Op::Read { file, offset, part: Part { buf, at: HEADROOM, len } });
    }

    fn read_done<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, done: Done) {
        let op = &self.active[slot as usize];
        let (skip, len) = ((op.at - op.start) as usize, (op.end - op.at) as usize);
        let straight = op.stage == Stage::Into;
        let result = match (done.result, done.part) {
            (Ok(_), None) if straight => Ok(None),
            // Memory that has gone, or that the kernel does no such I/O on: whoever asked copies, and sees which.
            (Err(Errno::FAULT | Errno::INVAL), _) if straight => return self.read(f, slot),
            (Ok(_), Some(part)) => Ok(Some(Part { buf: part.buf, at: part.at + skip, len })),
            (Err(errno), _) => Err(errno),
            (Ok(_), None) => Err(Errno::IO),
        };
        if let Err(errno) = &result {
            let message = format!("reading {len} bytes at {}: {errno}", self.active[slot as usize].at);
            self.fault(message);
        }
        self.finish(f, slot, result);
    }

    /// Takes a completion of a host's operation.
    pub fn host_done<I: Io>(&mut self, f: &mut Flow<'_, I>, slot: u32, done: Done) {
        match self.active[slot as usize].kind {
            Kind::Read => self.read_done(f, slot, done),
            Kind::Free => debug_assert!(false, "a completion of nothing"),
            _ => self.piece_done(f, slot, done),
        }
        self.run(f);
    }

    /// Takes a completion of the log; whoever waited for bits goes on.
    pub fn log_done<I: Io>(&mut self, f: &mut Flow<'_, I>, done: Done) {
        let Some(log) = &mut self.log else { return };
        let errno = done.result.err();
        if log.done(f.io, done)
            && let Some(errno) = errno
        {
            let message = format!("writing the write-intent log: {errno}");
            self.fault(message);
        }
        self.wake_log_waiters(f);
        self.run(f);
    }

    fn wake_log_waiters<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        if self.log_waiters.is_empty() {
            return;
        }
        std::mem::swap(&mut self.log_waiters, &mut self.woken);
        for at in 0..self.woken.len() {
            let slot = self.woken[at];
            self.bits_waited(f, slot);
        }
        self.woken.clear();
    }

    /// Goes on with whatever waits for buffers of the pool.
    pub fn feed<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        for _ in 0..self.starved.len() {
            let Some(slot) = self.starved.pop_front() else { break };
            let before = self.starved.len();
            match self.active[slot as usize].kind {
                Kind::Read => self.read(f, slot),
                _ => self.begin_piece(f, slot),
            }
            if self.starved.len() > before {
                // Still none: the first in the queue stays the first.
                self.starved.rotate_right(1);
                break;
            }
        }
        self.run(f);
    }

    /// Whoever has got its range goes on.
    pub(crate) fn run<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        let mut next = 0;
        while let Some(owner) = self.granted.get(next).copied() {
            next += 1;
            if owner & SYNC_OWNER == 0 {
                self.complete_blocks(f, owner);
            } else {
                self.sync_granted(f, owner & !SYNC_OWNER);
            }
        }
        self.granted.clear();
    }

    /// Takes the range lock of whole physical blocks; true if it is held at once.
    pub(crate) fn lock_range(&mut self, start: u64, stop: u64, owner: u32) -> (LockId, bool) {
        let block = u64::from(self.info.physical_block.max(self.info.block));
        self.lock.acquire(start - start % block, stop.next_multiple_of(block), owner)
    }

    pub(crate) fn unlock_range(&mut self, id: LockId) {
        self.lock.release(id, &mut self.granted);
    }

    /// Every write that was answered is on stable storage.
    pub fn is_flush_clean(&self) -> bool {
        self.flush.is_clean()
    }

    /// When a disk wants a turn although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        let log = self.log.as_ref().and_then(IntentLog::deadline);
        log.into_iter().chain(self.sync.deadline()).min()
    }
}
