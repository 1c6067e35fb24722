//! One disk in one guest: requests from its queues to the disk, and their ends back.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::host::{DiskKey, FrontId, Geometry, HEADROOM, HostDisk, MAX_PART, Request};
use crate::io::guest::{Fault, GuestMemory, Map};
use crate::io::{Errno, Io, Nanos, Part, Pool};
use crate::nbd::request::Slab;

use super::chain::{Chain, Nonsense};
use super::events::{Events, Kind};
use super::proto::{self, feature, status};
use super::queue::{Addresses, Agreed, Queue};
use super::request::{self, Ask};
use super::server::Shared;

/// How often a part is tried again when its disk has no room for it; a try each few milliseconds.
const TRIES: u16 = 1000;
/// The disk completes partial blocks in place: room before and behind a write's data, bytes.
const BLOCK: usize = 4096;
/// A shorter time of looking without being asked to is none, nanoseconds.
const POLL_MIN: Nanos = 4_000;
/// Most requests that one queue gives in one look: a guest that adds them faster than they end must leave time for others.
const TAKE_MAX: usize = 128;
/// Shorter reads are copied, bytes: from here on that costs more than to have the kernel find the guest's pages.
const STRAIGHT_MIN: u64 = 16 * 1024;
/// Most looks at the queues in one turn.
const LOOKS_MAX: usize = 4;

/// What a device needs of the front end.
pub(super) struct Context<'a, I: Io> {
    pub io: &'a mut I,
    pub shared: &'a mut Shared,
    pub base: u16,
}

/// A queue as the messages have described it so far.
#[derive(Debug, Default)]
pub(super) struct Vring {
    pub size: u16,
    pub addresses: Option<Addresses>,
    pub base: u16,
    pub enabled: bool,
    pub events: Events,
    pub epoch: u8,
    /// A kick was heard since it stopped last.
    pub kicked: bool,
    /// It was told where it goes on.
    pub based: bool,
    /// There are no kicks: it is to be looked at.
    pub unkicked: bool,
    /// Runs.
    pub queue: Option<Queue>,
    /// Takes nothing new, since it is to stop.
    pub stopping: bool,
    /// Requests under way.
    outstanding: u32,
    /// The driver may have to be called.
    pub ended: bool,
}

impl Vring {
    /// As new; but what its event counters have under way still is that of those before.
    pub fn forget(&mut self) {
        *self = Self { epoch: self.epoch, ..Self::default() };
    }

    /// Nothing is under way, and nothing that a process before us began is left.
    pub fn is_quiet(&self) -> bool {
        self.outstanding == 0 && self.queue.as_ref().is_none_or(|q| !q.has_left())
    }
}

#[derive(Debug)]
struct Req {
    vring: u16,
    head: u16,
    chain: Chain,
    /// As it was when the request came.
    memory: Arc<GuestMemory>,
    ask: Ask,
    /// Bytes, or ranges, that have been asked of the disk.
    next: u64,
    /// Parts that the disk has.
    outstanding: u32,
    status: u8,
    fua: bool,
}

#[derive(Debug)]
struct PartOp {
    req: u32,
    /// Bytes, or ranges, of the request before it.
    at: u64,
    len: u64,
    cost: usize,
    tries: u16,
    /// The disk was given the guest's memory to read to.
    straight: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Device {
    pub id: u32,
    pub key: DiskKey,
    pub geometry: Geometry,
    /// The disk has gone: nothing is answered any more, so that the next process answers it.
    pub silent: bool,
    /// The connection has ended.
    pub closing: bool,
    /// Needs a look.
    pub active: bool,
    /// What found no room is to be tried again.
    pub retry_due: bool,
    pub features: u64,
    /// The driver has said what it wants.
    pub negotiated: bool,
    pub protocol: u64,
    /// As the driver has set it.
    pub writeback: Option<bool>,
    pub status: u8,
    pub memory: Arc<GuestMemory>,
    pub vrings: Vec<Vring>,
    /// Memory for requests under way, and for how many queues of how many entries.
    pub inflight: Option<(Arc<Map>, u16, u16)>,
    /// What the driver has set about the cache, in that memory.
    pub mode: Option<super::inflight::Mode>,
    reqs: Slab<Req>,
    ops: Slab<PartOp>,
    /// Requests with parts that the disk has not been asked for, in order.
    pending: VecDeque<u32>,
    /// Parts for which there was no room.
    retry: VecDeque<u32>,
    /// Parts that the disk has.
    outstanding: usize,
    spare: Vec<Chain>,
    pub events: Pool,
    starved: bool,
    /// Requests came, and requests ended, since the last look.
    taken: bool,
    ended: bool,
    /// When one ended last: its driver may have another one soon.
    pub last_end: Nanos,
    /// How long to look without being asked to; 0 as long as that did not pay.
    pub window: Nanos,
    polling: bool,
    /// There is more in the queues than one turn has time for.
    hurried: bool,
}

impl Device {
    pub fn new(id: u32, key: DiskKey, geometry: Geometry) -> Self {
        Self {
            id,
            key,
            geometry,
            silent: false,
            closing: false,
            active: true,
            retry_due: false,
            features: 0,
            negotiated: false,
            protocol: 0,
            writeback: None,
            status: 0,
            memory: Arc::default(),
            vrings: Vec::new(),
            inflight: None,
            mode: None,
            reqs: Slab::default(),
            ops: Slab::default(),
            pending: VecDeque::new(),
            retry: VecDeque::new(),
            outstanding: 0,
            spare: Vec::new(),
            events: super::events::pool(),
            starved: false,
            taken: false,
            ended: false,
            last_end: 0,
            window: 0,
            polling: false,
            hurried: false,
        }
    }

    /// Requests under way.
    pub fn requests(&self) -> usize {
        if self.closing || self.silent { self.outstanding } else { self.reqs.len() }
    }

    /// The disk has parts of it.
    pub fn is_waiting(&self) -> bool {
        self.outstanding > 0
    }

    /// It can be forgotten.
    pub fn is_finished(&self) -> bool {
        self.closing && self.outstanding == 0
    }

    /// It waits for room.
    pub fn is_starved(&self) -> bool {
        self.starved
    }

    /// It has a queue without kicks, to be looked at every now and then.
    pub fn is_unkicked(&self) -> bool {
        !self.silent && !self.closing && self.vrings.iter().any(|v| v.unkicked && v.queue.is_some())
    }

    /// Whether completed writes may be lost with power before a flush.
    pub fn is_writeback(&self) -> bool {
        let has = |bit| self.features & bit != 0;
        if !self.negotiated {
            return self.writeback.unwrap_or(true); // as it will be for most
        }
        if has(feature::CONFIG_WCE) {
            // Who does not flush begins without a cache.
            self.writeback.unwrap_or(has(feature::FLUSH))
        } else {
            // Who was offered flushes and does without them relies on every write.
            has(feature::FLUSH)
        }
    }

    /// It wants to be looked at without being asked to.
    pub fn is_polling(&self) -> bool {
        self.polling || self.hurried
    }

    // --- queues

    /// What was agreed with the driver about queues.
    fn agreed(&self) -> Agreed {
        let has = |bit| self.features & bit != 0;
        Agreed { event_idx: has(feature::EVENT_IDX), indirect: has(feature::INDIRECT_DESC) }
    }

    /// Features are others now.
    pub fn agree(&mut self) {
        let agreed = self.agreed();
        for queue in self.vrings.iter_mut().filter_map(|v| v.queue.as_mut()) {
            queue.agree(agreed);
        }
    }

    /// Starts a queue that has all it needs. It was kicked; or it was told where it goes on, and is on or may have been left
    /// by a process before us: then a kick may have been heard by somebody who did not live to follow it.
    pub fn start<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u16) {
        let agreed = self.agreed();
        let vring = &mut self.vrings[usize::from(number)];
        let (Some(addresses), None) = (vring.addresses, &vring.queue) else { return };
        let told = vring.kicked || vring.unkicked || vring.based && (vring.enabled || self.inflight.is_some());
        if !told || !vring.events.has_kick() && !vring.unkicked {
            return;
        }
        if vring.size == 0 || vring.outstanding > 0 {
            return; // if it was stopped for making no sense, what it had under way ends first
        }
        if !Queue::lies(&self.memory, addresses, vring.size) {
            return; // its memory may come later
        }
        let inflight = match &self.inflight {
            Some((_, queues, size)) if number >= *queues || vring.size > *size => {
                let why = Nonsense::Queue("the memory for requests under way is too small for it");
                return self.nonsense(cx, number, why);
            }
            Some((map, _, size)) => super::inflight::Inflight::new(map, number, *size),
            None => None,
        };
        match Queue::start(&self.memory, addresses, vring.size, vring.base, agreed, inflight) {
            Ok(queue) => {
                vring.queue = Some(queue);
                vring.stopping = false;
                // A process before us may have died between an end and its call.
                vring.ended = true;
                self.active = true;
            }
            Err(why) => self.nonsense(cx, number, why),
        }
    }

    /// What a queue says cannot be followed: it stops.
    pub fn nonsense<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u16, why: Nonsense) {
        let vring = &mut self.vrings[usize::from(number)];
        if let Some(queue) = vring.queue.take() {
            vring.base = queue.base();
        }
        vring.addresses = None;
        cx.shared.counters.nonsense += 1;
        self.raise(cx, number, Kind::Err);
        tracing::warn!(device = self.id, queue = number, %why, "a vhost-user queue makes no sense and has been stopped");
    }

    /// The guest's memory is another now.
    pub fn remember<I: Io>(&mut self, cx: &mut Context<'_, I>, memory: GuestMemory) {
        self.memory = Arc::new(memory);
        for number in 0..self.vrings.len() as u16 {
            let vring = &mut self.vrings[usize::from(number)];
            match (&mut vring.queue, vring.addresses) {
                (Some(queue), Some(addresses)) => {
                    if !queue.moved(&self.memory, addresses) {
                        tracing::info!(device = self.id, queue = number, "a vhost-user queue's memory has gone");
                    }
                }
                _ => self.start(cx, number),
            }
        }
    }

    /// Looks at the queues, and gives to the disk what it can. True if the disk was asked something.
    pub fn serve<I: Io>(&mut self, cx: &mut Context<'_, I>, disk: &mut impl HostDisk<I>, fetch: bool) -> bool {
        if self.silent || self.closing {
            (self.active, self.polling, self.hurried) = (false, false, false);
            return false;
        }
        for number in 0..self.vrings.len() as u16 {
            self.catch_up(cx, number);
        }
        let retry = std::mem::take(&mut self.retry_due);
        (self.active, self.starved) = (false, !self.retry.is_empty());
        let mut asked = retry && self.ask_again(cx, disk);
        self.hurried = false;
        for _ in 0..LOOKS_MAX {
            let mut taken = false;
            for number in 0..self.vrings.len() as u16 {
                taken |= fetch && self.take(cx, number);
            }
            self.taken |= taken;
            asked |= self.issue(cx, disk);
            if !self.rest(cx, fetch) {
                return asked;
            }
        }
        self.hurried = true;
        asked
    }

    /// Takes requests out of a queue. True if there was one.
    fn take<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u16) -> bool {
        let most = cx.shared.limits.requests;
        let default_on = self.features & feature::PROTOCOL == 0;
        let mut any = false;
        for taken in 0.. {
            if self.reqs.len() >= most {
                break; // looked at again when something ends
            }
            if taken == TAKE_MAX {
                self.hurried = true;
                break;
            }
            let vring = &mut self.vrings[usize::from(number)];
            // One that is to stop leaves nothing of a process before us behind, and takes nothing new.
            let left_only = vring.stopping;
            if !(left_only || vring.enabled || default_on) {
                break;
            }
            let Some(queue) = &mut vring.queue else { break };
            let mut chain = self.spare.pop().unwrap_or_default();
            let again = queue.has_left();
            match queue.take(&self.memory, &mut chain, left_only) {
                Ok(Some(head)) => {
                    any = true;
                    cx.shared.counters.requests += 1;
                    cx.shared.counters.again += u64::from(again);
                    self.begin(cx, number, head, chain);
                }
                Ok(None) => {
                    self.spare.push(chain);
                    break;
                }
                Err(why) => {
                    self.nonsense(cx, number, why);
                    break;
                }
            }
        }
        any
    }

    fn begin<I: Io>(&mut self, cx: &mut Context<'_, I>, vring: u16, head: u16, chain: Chain) {
        let Ok(ask) = request::parse(&chain, &self.memory, &self.geometry) else {
            return self.nonsense(cx, vring, Nonsense::Queue("a request has no room for its status"));
        };
        let fua = !self.is_writeback() || !self.negotiated;
        let memory = Arc::clone(&self.memory);
        let mut req = Req { vring, head, chain, memory, ask, next: 0, outstanding: 0, status: status::OK, fua };
        self.vrings[usize::from(vring)].outstanding += 1;
        let at_once = match req.ask {
            Ask::Answer(answer) => {
                req.status = answer;
                true
            }
            Ask::Identity(room) => {
                let identity = proto::identity(&self.geometry.serial);
                let len = identity.len().min(room as usize);
                if req.chain.write(&req.memory, 0, &identity[..len]).is_err() {
                    req.status = status::IOERR;
                }
                true
            }
            _ => false,
        };
        let number = self.reqs.insert(req);
        if at_once {
            self.finish(cx, number);
        } else {
            self.pending.push_back(number);
        }
    }

    /// Nothing more can be taken now: says so to the drivers, or looks on for a while. True if there is more after all.
    fn rest<I: Io>(&mut self, cx: &mut Context<'_, I>, fetch: bool) -> bool {
        let limit = cx.shared.limits.poll;
        if limit > 0 {
            let now = cx.io.now();
            let (taken, ended) = (std::mem::take(&mut self.taken), std::mem::take(&mut self.ended));
            if taken && self.polling {
                // It paid. What was waited for has come: the disk's answer is not waited for like this.
                (self.window, self.last_end) = (limit, 0);
            } else if self.polling && now.saturating_sub(self.last_end) >= self.window {
                // It did not pay.
                self.window = if self.window / 2 < POLL_MIN { 0 } else { self.window / 2 };
            }
            if ended {
                self.last_end = now;
            }
            let due = now.saturating_sub(self.last_end) < self.window;
            self.polling = due && fetch && self.vrings.iter().any(|v| v.queue.is_some() && !v.stopping);
        }
        if !fetch || self.reqs.len() >= cx.shared.limits.requests {
            return false; // looked at again when something ends
        }
        let mut more = false;
        for number in 0..self.vrings.len() as u16 {
            let default_on = self.features & feature::PROTOCOL == 0;
            let vring = &mut self.vrings[usize::from(number)];
            if vring.stopping || !(vring.enabled || default_on) {
                continue;
            }
            let Some(queue) = &mut vring.queue else { continue };
            let told = if self.polling {
                queue.need_no_kicks().map(|()| false)
            } else if queue.kicks_wanted() {
                Ok(false)
            } else {
                queue.want_kicks()
            };
            match told {
                Ok(waiting) => more |= waiting,
                Err(fault) => self.nonsense(cx, number, fault.into()),
            }
        }
        more
    }

    // --- to the disk

    /// Gives parts to the disk as far as there is room. True if it gave any.
    fn issue<I: Io>(&mut self, cx: &mut Context<'_, I>, disk: &mut impl HostDisk<I>) -> bool {
        let mut any = false;
        while let Some(&number) = self.pending.front() {
            let req = self.reqs.get(number).expect("a request with parts to come is under way");
            let end = ask_end(&req.ask);
            if req.status != status::OK {
                req.next = end; // no further parts
            }
            let at = req.next;
            if at == end {
                self.pending.pop_front();
                if req.outstanding == 0 {
                    self.finish(cx, number);
                }
                continue;
            }
            let len = part_len(&req.ask, at);
            let op = PartOp { req: number, at, len, cost: 0, tries: 0, straight: false };
            match self.ask(cx, disk, op) {
                Asked::Given => any = true,
                Asked::NoRoom(_) => {
                    self.starved = true;
                    self.active = true;
                    break;
                }
                Asked::Fault => {}
            }
            if let Some(req) = self.reqs.get(number) {
                req.next = at + len;
            }
        }
        any
    }

    /// Asks the disk for a part.
    fn ask<I: Io>(&mut self, cx: &mut Context<'_, I>, disk: &mut impl HostDisk<I>, mut op: PartOp) -> Asked {
        let req = self.reqs.get(op.req).expect("a part's request is under way");
        let fua = req.fua;
        let request = match &req.ask {
            Ask::Read { offset, .. } => {
                let offset = offset + op.at;
                let align = disk
                    .reads_into()
                    .filter(|align| op.len >= STRAIGHT_MIN && (offset | op.len).is_multiple_of(u64::from(*align)));
                let to = align.and_then(|align| req.chain.scatter(&req.memory, op.at, op.len as usize, align as usize));
                if let Some(to) = to {
                    // It takes no buffer, unless it cannot be done after all: then it waits for one.
                    op.straight = true;
                    return self.give(cx, disk, op, Request::ReadInto { offset, to });
                }
                op.straight = false;
                let cost = HEADROOM + op.len as usize + BLOCK;
                if cx.shared.read_used > 0 && cx.shared.read_used + cost > cx.shared.read_limit() {
                    return Asked::NoRoom(op);
                }
                cx.shared.read_used += cost;
                op.cost = cost;
                Request::Read { offset, len: op.len as usize }
            }
            Ask::Write { offset, .. } => {
                let (offset, len) = (offset + op.at, op.len as usize);
                let at = HEADROOM + (offset % BLOCK as u64) as usize;
                let cost = at + len + BLOCK;
                if cx.shared.write_used > 0 && cx.shared.write_used + cost > cx.shared.write_limit() {
                    return Asked::NoRoom(op);
                }
                let Some(mut buf) = cx.io.pool().take(cost) else { return Asked::NoRoom(op) };
                // The one copy: what the guest does to its memory from here on does not matter.
                let copied = req.chain.read(&req.memory, proto::HEADER as u64 + op.at, &mut buf[at..at + len]);
                if copied.is_err() {
                    req.status = status::IOERR;
                    return Asked::Fault;
                }
                cx.shared.write_used += cost;
                op.cost = cost;
                Request::Write { offset, data: Part { buf, at, len }, fua }
            }
            Ask::Flush => Request::Flush,
            Ask::Discard(ranges) => {
                let (offset, len) = ranges[op.at as usize];
                Request::Discard { offset, len, fua }
            }
            Ask::Zero(ranges) => {
                let (offset, len, unmap) = ranges[op.at as usize];
                Request::Zero { offset, len, unmap, fast_only: false, fua }
            }
            Ask::Identity(_) | Ask::Answer(_) => return Asked::Fault,
        };
        self.give(cx, disk, op, request)
    }

    /// Gives a part to the disk.
    fn give<I: Io>(
        &mut self,
        cx: &mut Context<'_, I>,
        disk: &mut impl HostDisk<I>,
        op: PartOp,
        request: Request,
    ) -> Asked {
        if let Some(req) = self.reqs.get(op.req) {
            req.outstanding += 1;
        }
        self.outstanding += 1;
        let number = self.ops.insert(op);
        disk.request(cx.io, FrontId::Vhost.cookie(u64::from(self.id) << 32 | u64::from(number)), request);
        Asked::Given
    }

    /// Asks again for what the disk had no room for.
    fn ask_again<I: Io>(&mut self, cx: &mut Context<'_, I>, disk: &mut impl HostDisk<I>) -> bool {
        let mut any = false;
        for _ in 0..self.retry.len() {
            let Some(number) = self.retry.pop_front() else { break };
            let Some(op) = self.ops.remove(number) else { continue };
            let req = op.req;
            match self.ask(cx, disk, op) {
                Asked::Given => any = true,
                Asked::NoRoom(op) => {
                    let number = self.ops.insert(op);
                    self.retry.push_back(number);
                    continue;
                }
                Asked::Fault => {}
            }
            // It was counted as outstanding while it waited.
            self.settle(cx, req);
        }
        self.starved |= !self.retry.is_empty();
        any
    }

    // --- and back

    /// Takes the disk's answer to a part.
    pub fn answer<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u32, result: Result<Option<Part>, Errno>) {
        if self.outstanding == 0 {
            return;
        }
        let Some(op) = self.ops.get(number) else { return };
        self.outstanding -= 1;
        self.active = true;
        let (req_number, at, len, cost) = (op.req, op.at, op.len, std::mem::take(&mut op.cost));
        let straight = op.straight;
        op.tries += 1;
        let (wait, req) = (op.tries < TRIES, self.reqs.get(req_number).expect("a part's request is under way"));
        if matches!(req.ask, Ask::Read { .. }) {
            cx.shared.read_used -= cost;
        } else {
            cx.shared.write_used -= cost;
        }
        if self.closing || self.silent {
            self.ops.remove(number);
            return;
        }
        match result {
            Err(Errno::SHUTDOWN) => {
                // The disk is being taken away, to be served by another process or with other settings: that one answers.
                self.silence();
                return;
            }
            // Room comes back: waiting is better than an error that no guest expects.
            Err(Errno::NOMEM) if wait && req.status == status::OK => {
                self.starved = true;
                self.retry.push_back(number);
                return;
            }
            Err(_) => req.status = status::IOERR,
            Ok(Some(part)) if matches!(req.ask, Ask::Read { .. }) && part.len as u64 == len => {
                cx.shared.counters.read_bytes += len;
                if req.chain.write(&req.memory, at, &part.buf[part.at..part.at + part.len]).is_err() {
                    req.status = status::IOERR;
                }
            }
            Ok(None) if straight => cx.shared.counters.read_bytes += len,
            Ok(_) if matches!(req.ask, Ask::Read { .. }) => req.status = status::IOERR,
            Ok(_) => {
                if matches!(req.ask, Ask::Write { .. }) {
                    cx.shared.counters.written_bytes += len;
                }
            }
        }
        self.ops.remove(number);
        self.settle(cx, req_number);
    }

    /// One part of a request less is outstanding.
    fn settle<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u32) {
        let Some(req) = self.reqs.get(number) else { return };
        req.outstanding -= 1;
        let end = ask_end(&req.ask);
        if req.status != status::OK {
            req.next = end;
        }
        if req.outstanding == 0 && req.next == end {
            self.pending.retain(|&pending| pending != number);
            self.finish(cx, number);
        }
    }

    /// Tells the guest the end of a request.
    fn finish<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u32) {
        let Some(req) = self.reqs.remove(number) else { return };
        let vring = &mut self.vrings[usize::from(req.vring)];
        vring.outstanding = vring.outstanding.saturating_sub(1);
        self.ended = true;
        if req.status != status::OK {
            cx.shared.counters.errors += 1;
        }
        let room = req.chain.writable_len() - 1;
        // As many bytes as were surely written, from the first on.
        let written = match req.ask {
            Ask::Read { len, .. } if req.status == status::OK => len + 1,
            Ask::Identity(room) if room <= proto::ID_BYTES as u64 && req.status == status::OK => room + 1,
            Ask::Identity(_) if req.status == status::OK => proto::ID_BYTES as u64,
            _ if room == 0 => 1,
            _ => 0,
        };
        let told = match &mut vring.queue {
            Some(queue) => req
                .chain
                .write(&req.memory, room, &[req.status])
                .and_then(|()| queue.end(req.head, u32::try_from(written).unwrap_or(u32::MAX))),
            None => Ok(()), // it was stopped for making no sense
        };
        vring.ended = true;
        if let Err(Fault) = told {
            self.nonsense(cx, req.vring, Nonsense::Fault);
        }
        let mut chain = req.chain;
        chain.clear();
        self.spare.push(chain);
        if self.vrings[usize::from(req.vring)].queue.is_none() {
            self.start(cx, req.vring);
        }
    }

    // --- the end

    /// Answers nothing any more.
    fn silence(&mut self) {
        self.silent = true;
        self.polling = false;
        self.pending.clear();
        self.retry.clear();
    }

    /// The disk has gone, and what it had with it.
    pub fn abandon<I: Io>(&mut self, cx: &mut Context<'_, I>) {
        self.silence();
        while let Some(op) = self.ops.take_any() {
            let Some(req) = self.reqs.get(op.req) else { continue };
            if matches!(req.ask, Ask::Read { .. }) {
                cx.shared.read_used -= op.cost;
            } else {
                cx.shared.write_used -= op.cost;
            }
        }
        self.outstanding = 0;
    }

    /// The connection has ended.
    pub fn close<I: Io>(&mut self, io: &mut I) {
        self.closing = true;
        self.polling = false;
        self.pending.clear();
        self.retry.clear();
        for vring in &mut self.vrings {
            for event in vring.events.take() {
                io.close_sock(event.sock);
            }
            vring.queue = None;
        }
    }
}

enum Asked {
    Given,
    NoRoom(PartOp),
    Fault,
}

/// Where a request's parts end: bytes, or ranges.
fn ask_end(ask: &Ask) -> u64 {
    match ask {
        Ask::Read { len, .. } | Ask::Write { len, .. } => *len,
        Ask::Discard(ranges) => ranges.len() as u64,
        Ask::Zero(ranges) => ranges.len() as u64,
        Ask::Flush => 1,
        Ask::Identity(_) | Ask::Answer(_) => 0,
    }
}

/// Length of the part that begins there: up to the next multiple of [`MAX_PART`] on the disk.
fn part_len(ask: &Ask, at: u64) -> u64 {
    match ask {
        Ask::Read { offset, len } | Ask::Write { offset, len } => {
            let room = MAX_PART as u64 - (offset + at) % MAX_PART as u64;
            (len - at).min(room)
        }
        _ => 1,
    }
}
