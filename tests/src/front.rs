//! What stands between hosts and a core: nothing, an NBD connection, or a ublk device; and how a core is driven with it.

use std::collections::{BTreeMap, VecDeque};

use afterimage_dataplane::host::{Answer, Disks, FrontEnd as _, Request};
use afterimage_dataplane::io::sim::{SimIo, UblkId, World};
use afterimage_dataplane::io::ublk::uapi::{op, op_flag};
use afterimage_dataplane::io::{Done, Errno, Io, Nanos, Op, Part, Sock};
use afterimage_dataplane::nbd::proto::{self, RequestHeader, be16, be32, be64, cmd, cmd_flag, option, rep};
use afterimage_dataplane::source::Source;
use afterimage_dataplane::target::Target;
use afterimage_dataplane::{nbd, ublk};

/// Machine ids of the front ends.
const NBD_BASE: u16 = 0x4000;
const UBLK_BASE: u16 = 0x5000;
/// Tags of a ublk device.
pub const TAGS: u16 = 16;
/// Most polls of a node at one moment of the world: more is a core that spins.
const MAX_ROUNDS: usize = 20_000;
/// Bytes that a client asks for at once.
const WINDOW: usize = 128 * 1024;
/// Greeting of a server.
const GREETING: usize = 18;
/// Header of a reply to an option.
const OPTION_REPLY: usize = 20;

/// Through what hosts ask disks.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Front {
    /// They ask the core itself.
    Direct,
    /// Each disk by a connection.
    Nbd,
    /// Each disk by a device of the node's kernel.
    Ublk,
}

/// An answer, as a host hears it.
#[derive(Debug)]
pub struct Heard {
    /// As asked.
    pub cookie: u64,
    /// The bytes of a read.
    pub result: Result<Option<Vec<u8>>, Errno>,
}

impl From<Answer> for Heard {
    fn from(answer: Answer) -> Self {
        let bytes = |part: Part| part.buf[part.at..part.at + part.len].to_vec();
        Self { cookie: answer.cookie, result: answer.result.map(|part| part.map(bytes)) }
    }
}

/// What a core is to whoever drives it.
pub trait Core: Disks<SimIo> {
    /// Takes a completion.
    fn done(&mut self, io: &mut SimIo, done: Done);
    /// Moves its queues.
    fn turn(&mut self, io: &mut SimIo);
    /// When it wants its next turn.
    fn deadline(&self) -> Option<Nanos>;
}

macro_rules! core {
    ($name:ident) => {
        impl Core for $name<SimIo> {
            fn done(&mut self, io: &mut SimIo, done: Done) {
                debug_assert!(self.owns(done.token));
                self.done(io, done);
            }

            fn turn(&mut self, io: &mut SimIo) {
                self.turn(io);
            }

            fn deadline(&self) -> Option<Nanos> {
                self.deadline()
            }
        }
    };
}
core!(Source);
core!(Target);

/// One life of a process.
pub struct Life<C> {
    /// Its operations.
    pub io: SimIo,
    /// Its core.
    pub core: C,
    /// Serves NBD.
    pub nbd: nbd::Server<SimIo>,
    /// Serves ublk.
    pub ublk: ublk::Server<SimIo>,
}

impl<C: Core> Life<C> {
    /// Nobody asks it yet.
    pub fn new(io: SimIo, core: C) -> Self {
        let nbd = nbd::Server::new(NBD_BASE, nbd::Limits::default());
        let ublk = ublk::Server::new(UBLK_BASE, ublk::Limits::default());
        Self { io, core, nbd, ublk }
    }

    /// Does what there is to do, as a data thread does: the core's turn, the front ends, then sleep until something comes
    /// or the core wants its turn.
    pub fn run(&mut self, done: &mut Vec<Done>) {
        let (mut until, mut more) = (None, false);
        for round in 0.. {
            assert!(round < MAX_ROUNDS, "a core spins at {}", self.io.now());
            self.io.poll(until, done);
            if done.is_empty() && round > 0 && !more {
                return;
            }
            for done in done.drain(..) {
                if self.nbd.owns(done.token) {
                    self.nbd.done(&mut self.io, &mut self.core, done);
                } else if self.ublk.owns(done.token) {
                    self.ublk.done(&mut self.io, &mut self.core, done);
                } else {
                    self.core.done(&mut self.io, done);
                }
            }
            self.core.turn(&mut self.io);
            self.nbd.collect(&mut self.io, &mut self.core);
            more = self.ublk.collect(&mut self.io, &mut self.core) && !self.nbd.is_idle();
            until = if more { None } else { self.core.deadline() };
        }
    }

    /// Lets the hosts go; see [`Life::is_free`].
    pub fn let_go(&mut self) {
        self.nbd.shutdown(&mut self.io);
        self.ublk.shutdown(&mut self.io);
    }

    /// No hosts are left.
    pub fn is_free(&self) -> bool {
        self.nbd.is_idle() && self.ublk.is_idle()
    }
}

/// The way of hosts to one disk.
#[derive(Debug)]
pub enum Way {
    /// To the core.
    Direct,
    /// By this client.
    Nbd(u64),
    /// By this device.
    Ublk(Device),
}

impl Way {
    /// What hosts have heard by it since. What a core says to them itself is asked of it.
    ///
    /// # Errors
    /// What no server may say.
    pub fn heard(&mut self, clients: &mut Clients, world: &World) -> Result<Vec<Heard>, String> {
        match self {
            Self::Direct => Ok(Vec::new()),
            Self::Nbd(client) => Ok(clients.heard(*client).into()),
            Self::Ublk(device) => device.heard(world),
        }
    }
}

/// A ublk device, as hosts see it.
#[derive(Debug)]
pub struct Device {
    /// In the world.
    pub id: UblkId,
    /// At its server.
    pub served: ublk::DeviceId,
    /// What hosts asked: their cookies, and whether it is a read.
    asked: BTreeMap<u64, (u64, bool)>,
}

impl Device {
    /// Makes a device for the export of this name.
    ///
    /// # Errors
    /// There is no such export, or the server takes none.
    pub fn make<C: Core>(world: &World, life: &mut Life<C>, name: &str) -> Result<Self, String> {
        let export = life.core.exports().into_iter().find(|export| export.name == name);
        let geometry = export.ok_or_else(|| format!("{name} is not on offer"))?.geometry;
        let id = world.ublk_device(life.io.node(), TAGS);
        let file = life.io.attach_ublk(id).map_err(|errno| format!("{errno}"))?;
        let queue = ublk::Queue {
            file,
            depth: TAGS,
            longest: ublk::MAX_REQUEST,
            size: geometry.size,
            block: geometry.block,
            read_only: geometry.read_only,
        };
        let served = life.ublk.attach(&mut life.io, queue, name, &mut life.core).map_err(|e| e.to_string())?;
        Ok(Self { id, served, asked: BTreeMap::new() })
    }

    /// A host asks.
    pub fn ask(&mut self, world: &World, cookie: u64, request: Request) {
        let sectors = |offset: u64, len: u64| (offset / 512, (len / 512) as u32);
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let (kind, flags, (start_sector, nr_sectors), data) = match request {
            Request::Read { offset, len } => (op::READ, 0, sectors(offset, len as u64), vec![0xa5; len]),
            Request::Write { offset, data, fua } => {
                let bytes = data.buf[data.at..data.at + data.len].to_vec();
                (op::WRITE, flag(fua, op_flag::FUA), sectors(offset, data.len as u64), bytes)
            }
            Request::Zero { offset, len, unmap, fua, .. } => {
                let flags = flag(fua, op_flag::FUA) | flag(!unmap, op_flag::NOUNMAP);
                (op::WRITE_ZEROES, flags, sectors(offset, len), Vec::new())
            }
            Request::Discard { offset, len, fua } => {
                (op::DISCARD, flag(fua, op_flag::FUA), sectors(offset, len), Vec::new())
            }
            Request::Flush => (op::FLUSH, 0, (0, 0), Vec::new()),
            Request::ReadInto { .. } => unreachable!("no host of a device asks so"),
        };
        // As the kernel writes it: operation and flags, sectors, first sector, an address that says nothing here.
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&(u32::from(kind) | flags).to_ne_bytes());
        bytes[4..8].copy_from_slice(&nr_sectors.to_ne_bytes());
        bytes[8..16].copy_from_slice(&start_sector.to_ne_bytes());
        let request = world.ublk_ask(self.id, bytes, data);
        self.asked.insert(request, (cookie, kind == op::READ));
    }

    /// What hosts have heard since.
    ///
    /// # Errors
    /// An answer to what nobody asks.
    pub fn heard(&mut self, world: &World) -> Result<Vec<Heard>, String> {
        let answers = world.ublk_answers(self.id).into_iter().map(|answer| {
            let asked = self.asked.remove(&answer.request);
            let (cookie, read) = asked.ok_or("a ublk request is answered twice, or was never asked")?;
            let result = match answer.result {
                errno if errno < 0 => Err(Errno(-errno)),
                _ => Ok(read.then_some(answer.data)),
            };
            Ok(Heard { cookie, result })
        });
        answers.collect()
    }
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Phase {
    Greeting,
    Options,
    Serving,
    Closed,
}

/// A client of an NBD server.
struct Client {
    sock: Sock,
    name: String,
    phase: Phase,
    out: VecDeque<Vec<u8>>,
    /// Requests that wait for the end of the handshake.
    early: VecDeque<Vec<u8>>,
    sending: bool,
    input: Vec<u8>,
    /// Bytes that the reply to each request carries.
    asked: BTreeMap<u64, usize>,
    heard: VecDeque<Heard>,
}

/// All NBD clients: they live on a node of their own.
pub struct Clients {
    io: SimIo,
    all: BTreeMap<u64, Client>,
    next: u64,
    done: Vec<Done>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Clients({})", self.all.len())
    }
}

impl Clients {
    /// None.
    pub fn new(io: SimIo) -> Self {
        Self { io, all: BTreeMap::new(), next: 0, done: Vec::new() }
    }

    /// A new client on this connection, for the export of this name.
    pub fn open(&mut self, sock: Sock, name: &str) -> u64 {
        self.next += 1;
        let client = Client {
            sock,
            name: name.to_owned(),
            phase: Phase::Greeting,
            out: VecDeque::new(),
            early: VecDeque::new(),
            sending: false,
            input: Vec::new(),
            asked: BTreeMap::new(),
            heard: VecDeque::new(),
        };
        self.all.insert(self.next, client);
        self.listen(self.next);
        self.next
    }

    /// The client goes.
    pub fn close(&mut self, id: u64) {
        if let Some(client) = self.all.remove(&id) {
            self.io.close_sock(client.sock);
        }
    }

    /// It has shaken hands, and the connection stands.
    pub fn is_serving(&self, id: u64) -> bool {
        self.all.get(&id).is_some_and(|client| client.phase == Phase::Serving)
    }

    /// The connection is gone.
    pub fn is_closed(&self, id: u64) -> bool {
        self.all.get(&id).is_none_or(|client| client.phase == Phase::Closed)
    }

    /// A host asks.
    pub fn ask(&mut self, id: u64, cookie: u64, request: Request) {
        let Some(client) = self.all.get_mut(&id) else { return };
        let flag = |on: bool, flag: u16| if on { flag } else { 0 };
        let (kind, flags, offset, len, data) = match request {
            Request::Read { offset, len } => (cmd::READ, 0, offset, len as u32, None),
            Request::Write { offset, data, fua } => {
                (cmd::WRITE, flag(fua, cmd_flag::FUA), offset, data.len as u32, Some(data))
            }
            Request::Zero { offset, len, unmap, fua, .. } => {
                let flags = flag(fua, cmd_flag::FUA) | flag(!unmap, cmd_flag::NO_HOLE);
                (cmd::WRITE_ZEROES, flags, offset, len as u32, None)
            }
            Request::Discard { offset, len, fua } => (cmd::TRIM, flag(fua, cmd_flag::FUA), offset, len as u32, None),
            Request::Flush => (cmd::FLUSH, 0, 0, 0, None),
            Request::ReadInto { .. } => unreachable!("no client asks so"),
        };
        let mut bytes = RequestHeader { flags, kind, cookie, offset, len }.bytes().to_vec();
        if let Some(data) = data {
            bytes.extend_from_slice(&data.buf[data.at..data.at + data.len]);
        }
        client.asked.insert(cookie, if kind == cmd::READ { len as usize } else { 0 });
        if client.phase == Phase::Serving {
            client.out.push_back(bytes)
        } else {
            client.early.push_back(bytes)
        }
        self.send(id);
    }

    /// What hosts have heard by this client since.
    pub fn heard(&mut self, id: u64) -> VecDeque<Heard> {
        self.all.get_mut(&id).map(|client| std::mem::take(&mut client.heard)).unwrap_or_default()
    }

    fn listen(&mut self, id: u64) {
        let Some(client) = self.all.get(&id) else { return };
        let buf = self.io.pool().take(WINDOW).expect("a client has a buffer");
        let len = buf.len().min(WINDOW);
        self.io.submit(id << 1, Op::Recv { sock: client.sock, part: Part { buf, at: 0, len } });
    }

    fn send(&mut self, id: u64) {
        let Some(client) = self.all.get_mut(&id).filter(|client| !client.sending) else { return };
        let Some(bytes) = client.out.pop_front().filter(|_| client.phase != Phase::Closed) else { return };
        let mut buf = self.io.pool().take(bytes.len()).expect("a client has a buffer");
        buf[..bytes.len()].copy_from_slice(&bytes);
        client.sending = true;
        let part = Part { buf, at: 0, len: bytes.len() };
        self.io.submit(id << 1 | 1, Op::Send { sock: client.sock, part });
    }

    /// Takes what has come; the node is to be woken at this time.
    ///
    /// # Errors
    /// A server that does not keep to the protocol.
    pub fn run(&mut self, until: Nanos) -> Result<(), String> {
        loop {
            self.io.poll(Some(until), &mut self.done);
            if self.done.is_empty() {
                return Ok(());
            }
            for Done { token, result, part, .. } in std::mem::take(&mut self.done) {
                let id = token >> 1;
                let Some(client) = self.all.get_mut(&id) else { continue };
                match (token & 1, result, part) {
                    (0, Ok(len), Some(part)) if len > 0 => {
                        client.input.extend_from_slice(&part.buf[..len as usize]);
                        drop(part);
                        client.read().map_err(|what| format!("NBD, {}: {what}", client.name))?;
                        self.listen(id);
                    }
                    (1, Ok(_), _) => client.sending = false,
                    _ => client.phase = Phase::Closed,
                }
                self.send(id);
            }
        }
    }
}

impl Client {
    /// What the server has said.
    fn read(&mut self) -> Result<(), String> {
        while self.one()? {}
        Ok(())
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        self.input.drain(..len).collect()
    }

    /// One message; false if none is whole.
    fn one(&mut self) -> Result<bool, String> {
        let has = self.input.len();
        match self.phase {
            Phase::Greeting if has >= GREETING => {
                let said = self.take(GREETING);
                if be64(&said) != proto::GREETING || be64(&said[8..]) != proto::OPTION_MAGIC {
                    return Err("the greeting is none".into());
                }
                let flags = u32::from(be16(&said[16..])) & 3;
                self.out.push_back(flags.to_be_bytes().to_vec());
                let name = self.name.as_bytes();
                let mut data = (name.len() as u32).to_be_bytes().to_vec();
                data.extend_from_slice(name);
                data.extend_from_slice(&0u16.to_be_bytes());
                let mut bytes = proto::OPTION_MAGIC.to_be_bytes().to_vec();
                bytes.extend_from_slice(&option::GO.to_be_bytes());
                bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
                bytes.extend_from_slice(&data);
                self.out.push_back(bytes);
                self.phase = Phase::Options;
            }
            Phase::Options if has >= OPTION_REPLY => {
                let len = be32(&self.input[16..]) as usize;
                if has < OPTION_REPLY + len {
                    return Ok(false);
                }
                let said = self.take(OPTION_REPLY + len);
                if be64(&said) != proto::OPTION_REPLY_MAGIC || be32(&said[8..]) != option::GO {
                    return Err("a reply to an option that was not asked".into());
                }
                match be32(&said[12..]) {
                    rep::ACK => {
                        self.phase = Phase::Serving;
                        self.out.append(&mut self.early);
                    }
                    rep::INFO => {}
                    // It is not on offer.
                    _ => self.phase = Phase::Closed,
                }
            }
            Phase::Serving if has >= proto::SIMPLE_HEADER => {
                let (error, cookie) = (be32(&self.input[4..]), be64(&self.input[8..]));
                if be32(&self.input) != proto::SIMPLE_MAGIC {
                    return Err("a reply that is none".into());
                }
                let Some(len) = self.asked.get(&cookie).copied() else {
                    return Err(format!("{cookie} is answered, and nobody asks it"));
                };
                let len = if error == 0 { len } else { 0 };
                if has < proto::SIMPLE_HEADER + len {
                    return Ok(false);
                }
                self.asked.remove(&cookie);
                let data = self.take(proto::SIMPLE_HEADER + len).split_off(proto::SIMPLE_HEADER);
                let result = match error {
                    0 => Ok((len > 0).then_some(data)),
                    errno => Err(Errno(errno as i32)),
                };
                self.heard.push_back(Heard { cookie, result });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}
