//! A server on one node, clients on another, a disk in memory that checks what it is asked.

use std::collections::VecDeque;

use afterimage_dataplane::host::{
    Answer, DiskKey, Disks, Export, FrontEnd as _, Geometry, HEADROOM, HostDisk, MAX_PART, Request,
};
use afterimage_dataplane::io::sim::{NodeId, Rng, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Allocation, Class, Errno, Io, Nanos, Op, Part, Pool, Sock};
use afterimage_dataplane::nbd::proto::{self, RequestHeader, be16, be32, be64, cmd, info, option, rep};
use afterimage_dataplane::nbd::{Limits, Server};

pub const SERVER_ID: u16 = 0x4000;
const BLOCK: usize = 4096;

/// A disk in memory. What it does takes effect when asked; answers come at once or, with `late`, in random order.
pub struct MemDisk {
    pub export: Export,
    pub data: Vec<u8>,
    /// Blocks that were written; the others are holes.
    pub written: Vec<bool>,
    pub fail: Option<(std::ops::Range<u64>, Errno)>,
    /// So many reads find no buffer.
    pub no_buffers: usize,
    pub late: bool,
    /// It is being taken away, and says so to whatever it is asked.
    pub shutting: bool,
    pub flushes: usize,
    pub durable_writes: usize,
    pub requests: usize,
    ready: VecDeque<Answer>,
    waiting: Vec<Answer>,
}

impl MemDisk {
    pub fn new(key: u32, name: &str, size: usize) -> Self {
        let geometry = Geometry {
            size: size as u64,
            block: 512,
            physical_block: 4096,
            read_only: false,
            discard: true,
            serial: "0001".into(),
        };
        let export = Export { key: DiskKey(key), name: name.into(), description: format!("the disk {name}"), geometry };
        Self {
            export,
            data: vec![0; size],
            written: vec![false; size.div_ceil(BLOCK)],
            fail: None,
            no_buffers: 0,
            late: false,
            shutting: false,
            flushes: 0,
            durable_writes: 0,
            requests: 0,
            ready: VecDeque::new(),
            waiting: Vec::new(),
        }
    }

    /// Lets some of the answers that are late come, in random order.
    pub fn ripen(&mut self, rng: &mut Rng) {
        while !self.waiting.is_empty() && rng.below(3) > 0 {
            let which = rng.below(self.waiting.len() as u64) as usize;
            let answer = self.waiting.swap_remove(which);
            self.ready.push_back(answer);
        }
    }

    /// Answers are to come.
    pub fn is_late(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Nobody is there any more to hear its answers.
    pub fn forget(&mut self) {
        self.waiting.clear();
        self.ready.clear();
    }

    /// It is being taken away: what it has not answered it will not do.
    pub fn shut(&mut self) {
        self.waiting.drain(..).for_each(|answer| {
            self.ready.push_back(Answer { cookie: answer.cookie, result: Err(Errno::SHUTDOWN) });
        });
        self.shutting = true;
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), Errno> {
        assert!(
            len > 0 && offset + len <= self.export.geometry.size,
            "the front end lets nothing past the end through"
        );
        match &self.fail {
            Some((range, errno)) if offset < range.end && range.start < offset + len => Err(*errno),
            _ => Ok(()),
        }
    }

    fn part_check(offset: u64, len: usize) {
        assert!(len <= MAX_PART && offset / MAX_PART as u64 == (offset + len as u64 - 1) / MAX_PART as u64);
    }

    fn execute(&mut self, pool: &Pool, request: Request) -> Result<Option<Part>, Errno> {
        self.requests += 1;
        match request {
            Request::ReadInto { .. } => Err(Errno::INVAL),
            Request::Read { offset, len } => {
                Self::part_check(offset, len);
                self.check(offset, len as u64)?;
                if self.no_buffers > 0 {
                    self.no_buffers -= 1;
                    return Err(Errno::NOMEM);
                }
                let mut buf = pool.take(HEADROOM + len + 4096 + 512).ok_or(Errno::NOMEM)?;
                buf.fill(0xee);
                let at = HEADROOM + (offset % 512) as usize;
                buf[at..at + len].copy_from_slice(&self.data[offset as usize..][..len]);
                Ok(Some(Part { buf, at, len }))
            }
            Request::Write { offset, data: Part { mut buf, at, len }, fua } => {
                Self::part_check(offset, len);
                assert_eq!(at as u64 % 4096, offset % 4096);
                assert!(at >= HEADROOM && at + len + 4096 <= buf.len());
                self.durable_writes += usize::from(fua);
                let result = self.check(offset, len as u64);
                if result.is_ok() {
                    self.data[offset as usize..][..len].copy_from_slice(&buf[at..at + len]);
                    self.written[offset as usize / BLOCK..=(offset as usize + len - 1) / BLOCK].fill(true);
                }
                buf.fill(0xdd); // it is the disk's now, all of it
                result.map(|()| None)
            }
            Request::Zero { offset, len, unmap, fast_only, .. } => {
                self.check(offset, len)?;
                if fast_only {
                    return Err(Errno::OPNOTSUPP);
                }
                self.data[offset as usize..][..len as usize].fill(0);
                let blocks = (offset as usize).div_ceil(BLOCK)..(offset + len) as usize / BLOCK;
                if unmap && !blocks.is_empty() {
                    self.written[blocks].fill(false);
                }
                Ok(None)
            }
            Request::Discard { offset, len, .. } => {
                self.check(offset, len)?;
                let blocks = (offset as usize).div_ceil(BLOCK)..(offset + len) as usize / BLOCK;
                if !blocks.is_empty() {
                    self.data[blocks.start * BLOCK..blocks.end * BLOCK].fill(0);
                    self.written[blocks].fill(false);
                }
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
        self.export.geometry.clone()
    }

    fn request(&mut self, io: &mut I, cookie: u64, request: Request) {
        let result = if self.shutting { Err(Errno::SHUTDOWN) } else { self.execute(&io.pool().clone(), request) };
        let answer = Answer { cookie, result };
        if self.late { self.waiting.push(answer) } else { self.ready.push_back(answer) }
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.ready
    }

    fn allocation(&mut self, _: &mut I, offset: u64) -> Result<Allocation, Errno> {
        self.check(offset, 1)?;
        let first = offset as usize / BLOCK;
        let hole = !self.written[first];
        let blocks = self.written[first..].iter().take_while(|&&w| w != hole).count();
        // In pieces, so that joining them is exercised.
        let end = ((first + blocks.min(3)) * BLOCK).min(self.data.len()) as u64;
        Ok(Allocation { len: end - offset, hole })
    }
}

#[derive(Default)]
pub struct MemDisks(pub Vec<MemDisk>);

impl<I: Io> Disks<I> for MemDisks {
    fn exports(&self) -> Vec<Export> {
        self.0.iter().map(|d| d.export.clone()).collect()
    }

    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<I> + '_> {
        self.0.iter_mut().find(|d| d.export.key == key)
    }
}

/// A client: bytes to go, bytes that came.
pub struct Client {
    sock: Sock,
    out: VecDeque<Vec<u8>>,
    sending: bool,
    receiving: bool,
    /// Takes nothing while set.
    pub deaf: bool,
    pub input: Vec<u8>,
    pub closed: bool,
    hung_up: bool,
}

/// A message of the server in transmission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Simple { error: u32, cookie: u64 },
    Chunk { flags: u16, kind: u16, cookie: u64, payload: Vec<u8> },
}

pub struct Bed {
    pub world: World,
    server_node: NodeId,
    client_node: NodeId,
    pub server_io: SimIo,
    client_io: SimIo,
    pub server: Server<SimIo>,
    pub disks: MemDisks,
    pub clients: Vec<Client>,
    rng: Rng,
}

impl Bed {
    pub fn new(seed: u64) -> Self {
        Self::with(seed, Limits::default(), classes(), vec![MemDisk::new(7, "disk", 8 << 20)])
    }

    pub fn with(seed: u64, limits: Limits, classes: Vec<Class>, disks: Vec<MemDisk>) -> Self {
        let world = World::new(seed, WorldConfig::default());
        let (server_node, client_node) = (world.node("server"), world.node("client"));
        let server_io = world.io_with_pool(server_node, Pool::new(&classes));
        let client_io = world.io(client_node);
        let rng = world.rng();
        let server = Server::new(SERVER_ID, limits);
        let disks = MemDisks(disks);
        Self { world, server_node, client_node, server_io, client_io, server, disks, clients: Vec::new(), rng }
    }

    pub fn disk(&mut self) -> &mut MemDisk {
        &mut self.disks.0[0]
    }

    /// A new connection; its number.
    pub fn connect(&mut self) -> usize {
        let (ours, theirs) = self.world.connect(self.client_node, self.server_node);
        let _ = self.server.attach(&mut self.server_io, theirs, &self.disks);
        self.server.collect(&mut self.server_io, &mut self.disks);
        self.clients.push(Client {
            sock: ours,
            out: VecDeque::new(),
            sending: false,
            receiving: false,
            deaf: false,
            input: Vec::new(),
            closed: false,
            hung_up: false,
        });
        let client = self.clients.len() - 1;
        self.kick(client);
        client
    }

    /// A connection in transmission on the first disk.
    pub fn serving(&mut self, structured: bool) -> usize {
        let client = self.connect();
        let name = self.disk().export.name.clone();
        self.take(client, 18);
        self.send(client, &3u32.to_be_bytes());
        if structured {
            self.option(client, option::STRUCTURED_REPLY, &[]);
            assert_eq!(self.option_reply(client), (option::STRUCTURED_REPLY, rep::ACK, vec![]));
            self.option(client, option::SET_META_CONTEXT, &meta(&name, &["base:allocation"]));
            assert_eq!(self.option_reply(client).1, rep::META_CONTEXT);
            assert_eq!(self.option_reply(client).1, rep::ACK);
        }
        self.option(client, option::GO, &go(&name, &[info::BLOCK_SIZE]));
        assert_eq!(self.option_reply(client).1, rep::INFO);
        assert_eq!(self.option_reply(client).1, rep::INFO);
        assert_eq!(self.option_reply(client).1, rep::ACK);
        client
    }

    pub fn send(&mut self, client: usize, bytes: &[u8]) {
        self.clients[client].out.push_back(bytes.to_vec());
        self.kick(client);
    }

    pub fn option(&mut self, client: usize, number: u32, data: &[u8]) {
        self.send(client, &option_bytes(number, data));
    }

    pub fn request(&mut self, client: usize, kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.send(client, &RequestHeader { flags, kind, cookie, offset, len }.bytes());
    }

    pub fn write(&mut self, client: usize, flags: u16, cookie: u64, offset: u64, data: &[u8]) {
        let mut bytes =
            RequestHeader { flags, kind: cmd::WRITE, cookie, offset, len: data.len() as u32 }.bytes().to_vec();
        bytes.extend_from_slice(data);
        self.send(client, &bytes);
    }

    /// The client closes its socket.
    pub fn hang_up(&mut self, client: usize) {
        let client = &mut self.clients[client];
        client.closed = true;
        if !std::mem::replace(&mut client.hung_up, true) {
            self.client_io.close_sock(client.sock);
        }
    }

    /// The network breaks the connection.
    pub fn cut(&mut self, client: usize) {
        self.world.cut(self.clients[client].sock);
    }

    pub fn close_export(&mut self, key: DiskKey) {
        self.server.close_export(&mut self.server_io, key);
    }

    pub fn shutdown(&mut self) {
        self.server.shutdown(&mut self.server_io);
    }

    pub fn server_io_free(&self) -> usize {
        self.server_io.pool().free_bytes()
    }

    pub fn server_io_total(&self) -> usize {
        self.server_io.pool().total_bytes()
    }

    fn kick(&mut self, number: usize) {
        let client = &mut self.clients[number];
        if client.closed {
            return;
        }
        if !client.sending
            && let Some(bytes) = client.out.pop_front()
        {
            let mut buf = self.client_io.pool().take(bytes.len().min(1 << 20)).expect("the client has buffers");
            let len = bytes.len().min(buf.len());
            buf[..len].copy_from_slice(&bytes[..len]);
            if len < bytes.len() {
                client.out.push_front(bytes[len..].to_vec());
            }
            client.sending = true;
            self.client_io.submit(number as u64 * 2, Op::Send { sock: client.sock, part: Part { buf, at: 0, len } });
        }
        if !client.receiving && !client.deaf {
            let buf = self.client_io.pool().take(64 * 1024).expect("the client has buffers");
            client.receiving = true;
            let part = Part { len: buf.len(), buf, at: 0 };
            self.client_io.submit(number as u64 * 2 + 1, Op::Recv { sock: client.sock, part });
        }
    }

    /// One event of the world. False if nothing will ever happen.
    pub fn step(&mut self) -> bool {
        let Some(node) = self.world.step() else { return false };
        let mut done = Vec::new();
        if node == self.server_node {
            self.server_io.poll(None, &mut done);
            for done in done.drain(..) {
                assert!(self.server.owns(done.token));
                self.server.done(&mut self.server_io, &mut self.disks, done);
            }
            for disk in &mut self.disks.0 {
                disk.ripen(&mut self.rng);
            }
            self.server.collect(&mut self.server_io, &mut self.disks);
            if self.disks.0.iter().any(|d| !d.waiting.is_empty()) {
                self.world.wake(self.server_node);
            }
            self.server_io.poll(None, &mut done);
            for done in done {
                self.server.done(&mut self.server_io, &mut self.disks, done);
                self.server.collect(&mut self.server_io, &mut self.disks);
            }
        } else {
            self.client_io.poll(None, &mut done);
            for done in done {
                if done.token == u64::MAX {
                    continue;
                }
                let number = done.token as usize / 2;
                let client = &mut self.clients[number];
                if done.token % 2 == 0 {
                    client.sending = false;
                    client.closed |= done.result.is_err();
                } else {
                    client.receiving = false;
                    match (done.result, done.part) {
                        (Ok(n @ 1..), Some(part)) => client.input.extend_from_slice(&part.buf[..n as usize]),
                        _ => client.closed = true,
                    }
                }
                self.kick(number);
            }
            self.client_io.poll(None, &mut Vec::new());
        }
        true
    }

    /// Lets the world go on for so long.
    pub fn settle(&mut self, nanos: Nanos) {
        let until = self.world.now() + nanos;
        self.client_io.submit(u64::MAX, Op::Timer { at: until });
        while self.world.now() < until && self.step() {}
    }

    pub fn kick_all(&mut self) {
        for client in 0..self.clients.len() {
            self.kick(client);
        }
    }

    /// Steps until the client has so many bytes; takes them.
    pub fn take(&mut self, client: usize, len: usize) -> Vec<u8> {
        while self.clients[client].input.len() < len {
            assert!(!self.clients[client].closed, "the server closed before it had sent {len} bytes");
            assert!(self.step(), "the world stands still");
        }
        self.clients[client].input.drain(..len).collect()
    }

    /// Steps until the server has closed the connection; what it sent before.
    pub fn rest(&mut self, client: usize) -> Vec<u8> {
        while !self.clients[client].closed {
            assert!(self.step(), "the world stands still");
        }
        std::mem::take(&mut self.clients[client].input)
    }

    /// The next reply to an option: option, type, data.
    pub fn option_reply(&mut self, client: usize) -> (u32, u32, Vec<u8>) {
        let head = self.take(client, 20);
        assert_eq!(be64(&head), proto::OPTION_REPLY_MAGIC);
        let data = self.take(client, be32(&head[16..]) as usize);
        (be32(&head[8..]), be32(&head[12..]), data)
    }

    /// The next message of transmission; the data of a simple reply to a read stays.
    pub fn message(&mut self, client: usize) -> Message {
        let magic = self.take(client, 4);
        if be32(&magic) == proto::SIMPLE_MAGIC {
            let rest = self.take(client, 12);
            return Message::Simple { error: be32(&rest), cookie: be64(&rest[4..]) };
        }
        assert_eq!(be32(&magic), proto::CHUNK_MAGIC);
        let rest = self.take(client, 16);
        let payload = self.take(client, be32(&rest[12..]) as usize);
        Message::Chunk { flags: be16(&rest), kind: be16(&rest[2..]), cookie: be64(&rest[4..]), payload }
    }

    /// The error of the next reply, 0 for success.
    pub fn error(&mut self, client: usize) -> u32 {
        match self.message(client) {
            Message::Simple { error, .. } => error,
            Message::Chunk { kind, payload, .. } => {
                assert_eq!(kind, proto::chunk::ERROR);
                assert_eq!(usize::from(be16(&payload[4..])), payload.len() - 6);
                be32(&payload)
            }
        }
    }

    /// Reads over the wire, structured: joins the chunks. The error if there was one.
    pub fn read(&mut self, client: usize, flags: u16, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.request(client, cmd::READ, flags, 99, offset, len);
        let mut data = vec![None; len as usize];
        let mut error = None;
        loop {
            let Message::Chunk { flags, kind, cookie, payload } = self.message(client) else {
                panic!("a simple reply to a read")
            };
            assert_eq!(cookie, 99);
            match kind {
                proto::chunk::OFFSET_DATA => {
                    let at = (be64(&payload) - offset) as usize;
                    for (place, byte) in data[at..at + payload.len() - 8].iter_mut().zip(&payload[8..]) {
                        assert!(place.replace(*byte).is_none(), "overlapping chunks");
                    }
                }
                proto::chunk::ERROR => error = Some(be32(&payload)),
                other => panic!("chunk of type {other}"),
            }
            if flags & proto::chunk::DONE != 0 {
                break;
            }
        }
        match error {
            Some(error) => Err(error),
            None => Ok(data.into_iter().map(|b| b.expect("all of it was sent")).collect()),
        }
    }
}

pub fn classes() -> Vec<Class> {
    vec![
        Class { capacity: 12 * 1024, count: 512 },
        Class { capacity: 32 * 1024, count: 256 },
        Class { capacity: 80 * 1024, count: 64 },
        Class { capacity: 532 * 1024, count: 64 },
    ]
}

pub fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

pub fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
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
