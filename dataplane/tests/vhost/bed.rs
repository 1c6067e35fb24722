//! A front end on one node, a guest on another, a disk in memory that checks what it is asked and answers when told to.

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_dataplane::host::{
    Answer, DiskKey, Disks, Export, FrontEnd as _, Geometry, HEADROOM, HostDisk, MAX_PART, Request,
};
use afterimage_dataplane::io::guest::{Map, Region, share};
use afterimage_dataplane::io::sim::{NodeId, Rng, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Allocation, Class, Errno, Io, Op, Part, Pool, Sock};
use afterimage_dataplane::vhost::message::Command;
use afterimage_dataplane::vhost::proto::feature;
use afterimage_dataplane::vhost::queue::Addresses;
use afterimage_dataplane::vhost::{DeviceId, Limits, Outcome, Reply, Server};

pub const KEY: DiskKey = DiskKey(7);
/// Where the guest sees its memory, and where the process that runs it does.
pub const GUEST: u64 = 0x4000_0000;
pub const USER: u64 = 0x7f00_0000_0000;
pub const MEMORY: u64 = 8 << 20;
/// Bytes of a queue's tables in the guest's memory; data lies behind those of all queues.
const QUEUE_BYTES: u64 = 64 * 1024;
const DATA: u64 = 1 << 20;
const VHOST_ID: u16 = 0x4001;

/// A disk in memory. What it does takes effect when asked.
pub struct MemDisk {
    pub geometry: Geometry,
    pub data: Vec<u8>,
    /// It reads into the guest's memory what is aligned like this.
    pub into: Option<u32>,
    /// It cannot do the next such read after all.
    pub copy_next: bool,
    /// Such reads.
    pub straight: usize,
    pub fail: Option<Errno>,
    /// So many requests find no room.
    pub no_room: usize,
    /// Answers wait, and go in random order.
    pub late: bool,
    /// Answers wait until this is false.
    pub hold: bool,
    /// Nothing is done until this is false.
    pub later: bool,
    postponed: Vec<(u64, Request)>,
    pub durable: usize,
    pub flushes: usize,
    pub writes: Vec<(u64, usize)>,
    pub discards: Vec<(u64, u64)>,
    pub zeroes: Vec<(u64, u64, bool)>,
    pub ready: VecDeque<Answer>,
    pub waiting: Vec<Answer>,
}

impl MemDisk {
    pub fn new(size: usize) -> Self {
        let geometry = Geometry {
            size: size as u64,
            block: 512,
            physical_block: 4096,
            read_only: false,
            discard: true,
            serial: "0123456789abcdef".into(),
        };
        Self {
            geometry,
            data: vec![0; size],
            into: Some(512),
            copy_next: false,
            straight: 0,
            fail: None,
            no_room: 0,
            late: false,
            hold: false,
            later: false,
            postponed: Vec::new(),
            durable: 0,
            flushes: 0,
            writes: Vec::new(),
            discards: Vec::new(),
            zeroes: Vec::new(),
            ready: VecDeque::new(),
            waiting: Vec::new(),
        }
    }

    fn check(&self, offset: u64, len: u64) {
        assert!(len > 0 && offset + len <= self.geometry.size, "nothing past the end is let through");
    }

    fn execute(&mut self, pool: &Pool, request: Request) -> Result<Option<Part>, Errno> {
        if self.no_room > 0 {
            self.no_room -= 1;
            return Err(Errno::NOMEM);
        }
        if let Some(errno) = self.fail {
            return Err(errno);
        }
        let part_check = |offset: u64, len: usize| {
            assert!(len <= MAX_PART && offset / MAX_PART as u64 == (offset + len as u64 - 1) / MAX_PART as u64);
        };
        match request {
            Request::Read { offset, len } => {
                part_check(offset, len);
                self.check(offset, len as u64);
                let mut buf = pool.take(HEADROOM + len + 4096).ok_or(Errno::NOMEM)?;
                buf.fill(0xee);
                buf[HEADROOM..HEADROOM + len].copy_from_slice(&self.data[offset as usize..][..len]);
                Ok(Some(Part { buf, at: HEADROOM, len }))
            }
            Request::ReadInto { offset, to } => {
                part_check(offset, to.len());
                self.check(offset, to.len() as u64);
                let block = self.into.expect("it said that it can") as usize;
                assert!(offset.is_multiple_of(block as u64) && to.is_aligned(block));
                let data = &self.data[offset as usize..][..to.len()];
                if std::mem::take(&mut self.copy_next) {
                    let mut buf = pool.take(HEADROOM + data.len() + 4096).ok_or(Errno::NOMEM)?;
                    buf[HEADROOM..HEADROOM + data.len()].copy_from_slice(data);
                    return Ok(Some(Part { buf, at: HEADROOM, len: to.len() }));
                }
                to.write(data).map_err(|_| Errno::FAULT)?;
                self.straight += 1;
                Ok(None)
            }
            Request::Write { offset, data: Part { mut buf, at, len }, fua } => {
                part_check(offset, len);
                self.check(offset, len as u64);
                assert!(at as u64 % 4096 == offset % 4096 && at >= HEADROOM && at + len + 4096 <= buf.len());
                assert!(!self.geometry.read_only);
                self.durable += usize::from(fua);
                self.writes.push((offset, len));
                self.data[offset as usize..][..len].copy_from_slice(&buf[at..at + len]);
                buf.fill(0xdd); // it is the disk's now, all of it
                Ok(None)
            }
            Request::Zero { offset, len, unmap, fast_only, fua } => {
                self.check(offset, len);
                assert!(!fast_only);
                self.durable += usize::from(fua);
                self.zeroes.push((offset, len, unmap));
                self.data[offset as usize..][..len as usize].fill(0);
                Ok(None)
            }
            Request::Discard { offset, len, .. } => {
                self.check(offset, len);
                self.discards.push((offset, len));
                Ok(None)
            }
            Request::Flush => {
                self.flushes += 1;
                Ok(None)
            }
        }
    }
}

impl<I: Io> HostDisk<I> for &mut MemDisk {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    fn request(&mut self, io: &mut I, cookie: u64, request: Request) {
        if self.later {
            return self.postponed.push((cookie, request));
        }
        let result = self.execute(&io.pool().clone(), request);
        let answer = Answer { cookie, result };
        if self.late || self.hold { self.waiting.push(answer) } else { self.ready.push_back(answer) }
    }

    fn reads_into(&self) -> Option<u32> {
        self.into
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.ready
    }

    fn allocation(&mut self, _: &mut I, _: u64) -> Result<Allocation, Errno> {
        Err(Errno::INVAL)
    }
}

/// One disk, or none.
pub struct OneDisk(pub Option<MemDisk>);

impl<I: Io> Disks<I> for OneDisk {
    fn exports(&self) -> Vec<Export> {
        let export = |d: &MemDisk| Export {
            key: KEY,
            name: "disk".into(),
            description: String::new(),
            geometry: d.geometry.clone(),
        };
        self.0.iter().map(export).collect()
    }

    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<I> + '_> {
        self.0.as_mut().filter(|_| key == KEY)
    }
}

/// The driver's side of a queue.
pub struct Ring {
    pub size: u16,
    base: u64,
    pub avail: u16,
    pub seen: u16,
    kick: Sock,
    /// Calls heard.
    pub calls: usize,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    pub event_idx: bool,
}

impl Ring {
    pub fn desc(&self) -> u64 {
        self.base
    }
    pub fn avail_at(&self) -> u64 {
        self.base + 0x8000
    }
    pub fn used_at(&self) -> u64 {
        self.base + 0xc000
    }
}

/// A descriptor.
#[derive(Copy, Clone, Debug)]
pub struct Desc {
    /// The guest's address.
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// How a request is laid out: lengths into which its readable and its writable bytes are cut.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    pub readable: Vec<usize>,
    pub writable: Vec<usize>,
    pub indirect: bool,
}

/// A request that was made available.
#[derive(Clone, Debug)]
pub struct Sent {
    pub queue: usize,
    pub head: u16,
    /// Where its writable bytes lie, the status last.
    writable: Vec<(u64, usize)>,
}

/// A request that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub status: u8,
    pub len: u32,
    pub data: Vec<u8>,
}

pub struct Bed {
    pub world: World,
    node: NodeId,
    pub io: SimIo,
    guest_node: NodeId,
    guest_io: SimIo,
    pub server: Server<SimIo>,
    pub disks: OneDisk,
    pub device: DeviceId,
    pub map: Arc<Map>,
    pub rings: Vec<Ring>,
    pub features: u64,
    heap: u64,
    pub rng: Rng,
    pub inflight: Option<Arc<Map>>,
}

pub const ALL: u64 = feature::FLUSH
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::MQ
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL
    | feature::VERSION_1;

pub fn classes() -> Vec<Class> {
    vec![
        Class { capacity: 16 * 1024, count: 256 },
        Class { capacity: 80 * 1024, count: 64 },
        Class { capacity: 532 * 1024, count: 32 },
    ]
}

impl Bed {
    pub fn new(seed: u64) -> Self {
        Self::with(seed, MemDisk::new(4 << 20), ALL, 1, 128)
    }

    pub fn with(seed: u64, disk: MemDisk, features: u64, queues: usize, size: u16) -> Self {
        let (_, map) = share("guest", MEMORY).unwrap();
        let limits = Limits { poll: 0, ..Limits::default() };
        let world = World::new(seed, WorldConfig::default());
        let (node, guest_node) = (world.node("host"), world.node("guest"));
        let mut io = world.io_with_pool(node, Pool::new(&classes()));
        let guest_io = world.io(guest_node);
        let mut server = Server::new(VHOST_ID, limits);
        let mut disks = OneDisk(Some(disk));
        let device = server.attach(&mut io, &mut disks, KEY).unwrap();
        let rng = world.rng();
        let mut bed = Self {
            world,
            node,
            io,
            guest_node,
            guest_io,
            server,
            disks,
            device,
            map: Arc::new(map),
            rings: Vec::new(),
            features,
            heap: DATA,
            rng,
            inflight: None,
        };
        bed.introduce();
        bed.add_rings(queues, size);
        bed
    }

    pub fn add_rings(&mut self, queues: usize, size: u16) {
        for _ in 0..queues {
            self.add_ring(size);
            self.start(self.rings.len() - 1);
        }
    }

    /// The driver's side only.
    pub fn add_ring(&mut self, size: u16) {
        let (features, number) = (self.features, self.rings.len());
        self.rings.push(Ring {
            size,
            base: number as u64 * QUEUE_BYTES,
            avail: 0,
            seen: 0,
            kick: Sock(0),
            calls: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            event_idx: features & feature::EVENT_IDX != 0,
        });
    }

    /// As if so many requests had come and ended already.
    pub fn go_on_at(&mut self, number: usize, base: u16) {
        let ring = &mut self.rings[number];
        (ring.avail, ring.seen) = (base, base);
        self.map.store16((ring.avail_at() + 2) as usize, base).unwrap();
        self.map.store16((ring.used_at() + 2) as usize, base).unwrap();
        self.map.store16((ring.avail_at() + 4 + u64::from(ring.size) * 2) as usize, base).unwrap();
    }

    /// Another event counter for kicks: the device's end of it.
    pub fn new_kick(&mut self, number: usize) -> Sock {
        let (kick, theirs) = self.event();
        self.rings[number].kick = kick;
        theirs
    }

    /// An event counter for errors, heard of as calls are.
    pub fn new_err(&mut self, number: usize) -> Sock {
        let (err, theirs) = self.event();
        self.listen(number, err);
        theirs
    }

    /// Features and memory.
    pub fn introduce(&mut self) {
        self.ok(Command::SetOwner);
        self.ok(Command::SetFeatures(self.features));
        self.ok(Command::MemTable(vec![self.region()]));
    }

    pub fn region(&self) -> Region {
        Region { guest: GUEST, user: USER, map: Arc::clone(&self.map) }
    }

    /// Describes a queue that the driver has, and starts it.
    pub fn start(&mut self, number: usize) {
        let queue = number as u32;
        let ring = &self.rings[number];
        let at = Addresses { desc: USER + ring.desc(), avail: USER + ring.avail_at(), used: USER + ring.used_at() };
        let (size, seen) = (u32::from(ring.size), u32::from(ring.seen));
        self.ok(Command::VringNum { queue, size });
        self.ok(Command::VringBase { queue, base: seen });
        self.ok(Command::VringAddr { queue, at });
        self.start_events(number);
    }

    /// The last of it: event counters, and on.
    pub fn start_events(&mut self, number: usize) {
        let queue = number as u32;
        let (kick, theirs) = self.event();
        self.rings[number].kick = kick;
        self.ok(Command::VringKick { queue, event: Some(theirs) });
        let (call, theirs) = self.event();
        self.listen(number, call);
        self.ok(Command::VringCall { queue, event: Some(theirs) });
        self.ok(Command::VringEnable { queue, on: true });
    }

    /// An event counter: the guest's end and ours.
    pub fn event(&mut self) -> (Sock, Sock) {
        self.world.connect(self.guest_node, self.node)
    }

    fn listen(&mut self, number: usize, call: Sock) {
        let buf = self.guest_io.pool().take(4096).unwrap();
        let token = (number as u64) << 32 | u64::from(call.0);
        self.guest_io.submit(token, Op::Recv { sock: call, part: Part { buf, at: 0, len: 8 } });
    }

    pub fn command(&mut self, command: Command<Sock>) -> Outcome<Command<Sock>> {
        let outcome = self.server.command(&mut self.io, &mut self.disks, self.device, command);
        self.server.collect(&mut self.io, &mut self.disks);
        outcome
    }

    pub fn ok(&mut self, command: Command<Sock>) {
        let text = format!("{command:?}");
        match self.command(command) {
            Outcome::Done => {}
            other => panic!("{text}: {other:?}"),
        }
    }

    pub fn number(&mut self, command: Command<Sock>) -> u64 {
        match self.command(command) {
            Outcome::Reply(Reply::Number(number)) => number,
            other => panic!("{other:?}"),
        }
    }

    /// The process dies and another one takes its place; the guest's side stays as it is.
    pub fn restart(&mut self) {
        self.restart_without_queues();
        for number in 0..self.rings.len() {
            self.start(number);
        }
    }

    /// As [`Bed::restart`], before anything is said about queues.
    pub fn restart_without_queues(&mut self) {
        let disk = self.disks.0.take().map(|mut disk| {
            // What it was asked has happened; whoever asked does not hear of it.
            disk.waiting.clear();
            disk.ready.clear();
            disk.hold = false;
            disk
        });
        self.world.crash(self.node);
        self.io = self.world.io_with_pool(self.node, Pool::new(&classes()));
        self.server = Server::new(VHOST_ID, Limits { poll: 0, ..Limits::default() });
        self.disks = OneDisk(disk);
        self.device = self.server.attach(&mut self.io, &mut self.disks, KEY).unwrap();
        self.introduce();
        if let Some(map) = &self.inflight {
            let (queues, size) = (self.rings.len() as u16, self.rings[0].size);
            let map = Arc::clone(map);
            self.ok(Command::SetInflight { queues, size, map });
        }
    }

    pub fn disk(&mut self) -> &mut MemDisk {
        self.disks.0.as_mut().unwrap()
    }

    // --- the guest's memory

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.map.write(at as usize, bytes).unwrap();
    }

    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.map.read(at as usize, &mut out).unwrap();
        out
    }

    /// Room for data; wraps around, as nothing is kept for long.
    pub fn room(&mut self, len: usize) -> u64 {
        if self.heap + len as u64 > MEMORY {
            self.heap = DATA;
        }
        let at = self.heap;
        // With a gap, so that what is written past an end is seen.
        self.heap += len as u64 + 16;
        assert!(self.heap <= MEMORY + 16);
        at
    }

    pub fn put_desc(&self, table: u64, index: u16, desc: Desc) {
        let mut bytes = desc.addr.to_le_bytes().to_vec();
        bytes.extend_from_slice(&desc.len.to_le_bytes());
        bytes.extend_from_slice(&desc.flags.to_le_bytes());
        bytes.extend_from_slice(&desc.next.to_le_bytes());
        self.poke(table + u64::from(index) * 16, &bytes);
    }

    /// Makes a list of descriptors available that stands in the queue's table.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let (at, entry) = (ring.avail_at(), u64::from(ring.avail % ring.size));
        ring.avail = ring.avail.wrapping_add(1);
        let avail = ring.avail;
        self.map.store16((at + 4 + entry * 2) as usize, head).unwrap();
        self.map.store16((at + 2) as usize, avail).unwrap();
    }

    pub fn kick(&mut self, queue: usize) {
        let buf = self.guest_io.pool().take(4096).unwrap();
        let sock = self.rings[queue].kick;
        self.guest_io.submit(u64::MAX, Op::Send { sock, part: Part { buf, at: 0, len: 8 } });
        self.guest_io.poll(None, &mut Vec::new());
    }

    /// Sends a request: its header, what follows it, room for so many bytes and the status.
    pub fn send(&mut self, queue: usize, kind: u32, sector: u64, payload: &[u8], room: usize, layout: &Layout) -> Sent {
        let mut readable = kind.to_le_bytes().to_vec();
        readable.extend_from_slice(&[0; 4]);
        readable.extend_from_slice(&sector.to_le_bytes());
        readable.extend_from_slice(payload);
        let mut descs = Vec::new();
        for piece in cut(readable.len(), &layout.readable) {
            let at = self.room(piece.len());
            self.poke(at, &readable[piece.clone()]);
            descs.push(Desc { addr: GUEST + at, len: piece.len() as u32, flags: 0, next: 0 });
        }
        let mut writable = Vec::new();
        for piece in cut(room + 1, &layout.writable) {
            let at = self.room(piece.len());
            self.poke(at, &vec![0xcc; piece.len() + 16]);
            writable.push((at, piece.len()));
            descs.push(Desc { addr: GUEST + at, len: piece.len() as u32, flags: WRITE, next: 0 });
        }
        let head = if layout.indirect {
            let table = self.room(descs.len() * 16);
            let count = descs.len();
            for (index, mut desc) in descs.into_iter().enumerate() {
                if index + 1 < count {
                    (desc.flags, desc.next) = (desc.flags | NEXT, index as u16 + 1);
                }
                self.put_desc(table, index as u16, desc);
            }
            let head = self.rings[queue].free.pop().expect("the queue has room");
            let outer = Desc { addr: GUEST + table, len: count as u32 * 16, flags: INDIRECT, next: 0 };
            self.put_desc(self.rings[queue].desc(), head, outer);
            self.rings[queue].chains[usize::from(head)] = vec![head];
            head
        } else {
            let ring = &mut self.rings[queue];
            let slots: Vec<u16> = descs.iter().map(|_| ring.free.pop().expect("the queue has room")).collect();
            let table = ring.desc();
            ring.chains[usize::from(slots[0])] = slots.clone();
            for (index, mut desc) in descs.into_iter().enumerate() {
                if index + 1 < slots.len() {
                    (desc.flags, desc.next) = (desc.flags | NEXT, slots[index + 1]);
                }
                self.put_desc(table, slots[index], desc);
            }
            slots[0]
        };
        self.offer(queue, head);
        Sent { queue, head, writable }
    }

    /// The next request that has ended, if any: its head and how many bytes were written.
    pub fn next_end(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let used = ring.used_at();
        if self.map.load16((used + 2) as usize).unwrap() == ring.seen {
            return None;
        }
        let entry = used + 4 + u64::from(ring.seen % ring.size) * 8;
        ring.seen = ring.seen.wrapping_add(1);
        if ring.event_idx {
            let at = ring.avail_at() + 4 + u64::from(ring.size) * 2;
            self.map.store16(at as usize, ring.seen).unwrap();
        }
        let bytes = self.peek(entry, 8);
        let head = u16::from_le_bytes([bytes[0], bytes[1]]);
        assert_eq!(bytes[2..4], [0, 0]);
        let ring = &mut self.rings[queue];
        let slots = std::mem::take(&mut ring.chains[usize::from(head)]);
        ring.free.extend(slots);
        Some((head, u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])))
    }

    /// As [`Bed::next_end`] for a guest that has lost track: whether there was one.
    pub fn next_end_raw(&mut self, queue: usize) -> bool {
        let ring = &mut self.rings[queue];
        let used = ring.used_at();
        if self.map.load16((used + 2) as usize).unwrap() == ring.seen {
            return false;
        }
        ring.seen = ring.seen.wrapping_add(1);
        ring.free = (0..ring.size).rev().collect();
        true
    }

    pub fn result(&self, sent: &Sent, len: u32) -> Ended {
        let mut data = Vec::new();
        for (at, piece) in &sent.writable {
            data.extend_from_slice(&self.peek(*at, *piece));
            assert_eq!(self.peek(at + *piece as u64, 16), [0xcc; 16], "nothing is written past an end");
        }
        let status = data.pop().unwrap();
        Ended { status, len, data }
    }

    /// Sends a request alone and waits for its end.
    pub fn ask(&mut self, kind: u32, sector: u64, payload: &[u8], room: usize, layout: &Layout) -> Ended {
        let sent = self.send(0, kind, sector, payload, room, layout);
        self.kick(0);
        self.wait(&sent)
    }

    /// Steps until this request has ended, which is the next one of its queue.
    pub fn wait(&mut self, sent: &Sent) -> Ended {
        for _ in 0..100_000 {
            if let Some((head, len)) = self.next_end(sent.queue) {
                assert_eq!(head, sent.head);
                return self.result(sent, len);
            }
            assert!(self.step(), "the world stands still and the request has not ended");
        }
        panic!("the request does not end");
    }

    /// One event of the world. False if nothing will ever happen.
    pub fn step(&mut self) -> bool {
        let Some(node) = self.world.step() else { return false };
        let mut done = Vec::new();
        if node == self.node {
            self.io.poll(None, &mut done);
            for done in done.drain(..) {
                assert!(self.server.owns(done.token));
                self.server.done(&mut self.io, &mut self.disks, done);
            }
            self.turn();
            self.io.poll(None, &mut done);
            for done in done.drain(..) {
                self.server.done(&mut self.io, &mut self.disks, done);
            }
        } else {
            self.guest_io.poll(None, &mut done);
            for done in done.drain(..) {
                if done.token == u64::MAX || !matches!(done.result, Ok(1..)) {
                    continue;
                }
                let (number, sock) = ((done.token >> 32) as usize, Sock(done.token as u32));
                self.rings[number].calls += 1;
                drop(done);
                self.listen(number, sock);
            }
            self.guest_io.poll(None, &mut Vec::new());
        }
        true
    }

    /// A turn of the loop: the disk answers what it will, the front end does the rest.
    pub fn turn(&mut self) {
        if let Some(disk) = &mut self.disks.0
            && !disk.later
        {
            for (cookie, request) in std::mem::take(&mut disk.postponed) {
                HostDisk::request(&mut &mut *disk, &mut self.io, cookie, request);
            }
        }
        if let Some(disk) = &mut self.disks.0
            && !disk.hold
        {
            while !disk.waiting.is_empty() && (!disk.late || self.rng.below(3) > 0) {
                let which = self.rng.below(disk.waiting.len() as u64) as usize;
                let answer = disk.waiting.swap_remove(which);
                disk.ready.push_back(answer);
            }
        }
        self.server.collect(&mut self.io, &mut self.disks);
        if self.disks.0.as_ref().is_some_and(|d| !d.hold && !d.waiting.is_empty()) {
            self.world.wake(self.node);
        }
    }

    /// Lets everything happen that will, so many steps at most.
    pub fn settle(&mut self) {
        for _ in 0..2_000 {
            if !self.step() {
                return;
            }
        }
    }

    pub fn wake(&mut self) {
        self.world.wake(self.node);
    }
}

/// Ranges of these lengths, the last one as long as is left.
fn cut(len: usize, pieces: &[usize]) -> Vec<std::ops::Range<usize>> {
    let mut out = Vec::new();
    let mut at = 0;
    for piece in pieces {
        if at + piece >= len {
            break;
        }
        out.push(at..at + piece);
        at += piece;
    }
    out.push(at..len);
    out
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 24) as u8
        })
        .collect()
}
