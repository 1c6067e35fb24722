//! A bed for the source: a simulated machine with its disks, and a target that only applies what it receives.

use std::collections::{BTreeMap, VecDeque};

use afterimage_dataplane::host::{Answer, Disks, HEADROOM, HostDisk, Request};
use afterimage_dataplane::io::sim::{NodeId, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Done, Errno, Io, Nanos, Op, OpenHow, Part, Pool, Sock};
use afterimage_dataplane::seal::{ControlKey, DataKey, PolicyKey, open_chunk, payload, record_payload};
use afterimage_dataplane::sealers::Sealer;
use afterimage_dataplane::source::{
    DiskConfig, GroupConfig, GroupState, GroupStatus, LinkFailure, ProtectError, Source, SourceEvent, SourceLimits,
    pool_classes,
};
use afterimage_wire::chunk::Chunk;
use afterimage_wire::control::{CONTROL_LEN, Control};
use afterimage_wire::frame::{FrameHeader, MAX_FRAME, check_frame};
use afterimage_wire::handshake::{Hello, Position, Refusal};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId, TimelineId};
use afterimage_wire::record::{DiskInfo, Record, RecordKind};

pub const STREAM: StreamId = StreamId([7; 16]);
pub const MS: Nanos = 1_000_000;
pub const SIZE: u64 = 40 << 20;

pub fn policy() -> PolicyKey {
    PolicyKey::new(PolicyKeyId([1; 16]), [2; 32])
}

/// The key that takes the place of [`policy`].
pub fn rotated() -> PolicyKey {
    PolicyKey::new(PolicyKeyId([6; 16]), [8; 32]).with_older([(policy().id, [2; 32])])
}

/// What the target holds: the images, and every record.
#[derive(Default)]
pub struct Held {
    pub position: Position,
    pub images: BTreeMap<u16, Vec<u8>>,
    pub records: Vec<Record>,
    key: Option<DataKey>,
    under: PolicyKeyId,
    bytes: Vec<u8>,
    pub hellos: Vec<Hello>,
    /// What each frame promised, milliseconds.
    pub promises: Vec<u32>,
    /// Frames are received and not acknowledged.
    pub mute: bool,
    /// Hashes are compared and nobody is told.
    pub silent: bool,
    /// What was compared: the record, and which steps differ.
    compared: VecDeque<(u64, u64)>,
    /// Bytes of frames that were received.
    pub received: u64,
}

impl Held {
    /// Judges a hello as a target does: whether everything must be compared.
    fn welcome(&mut self, hello: &Hello) -> bool {
        let (place, before) = (self.position, hello.predecessor);
        let whole = place.incarnation != hello.incarnation
            && !(place.incarnation == before.incarnation
                && !place.incarnation.is_none()
                && (place.frame, place.seq) >= (before.frame, before.seq));
        self.key = Some(rotated().unwrap(hello.incarnation, &hello.key).expect("wrapped under a key of the policy"));
        self.under = hello.key.policy_key;
        self.bytes.clear();
        self.hellos.push(hello.clone());
        whole
    }

    /// Applies whole frames; the new place, if there is one.
    fn receive(&mut self, hello: &Hello) -> bool {
        let mut new = false;
        while let Ok(header) = FrameHeader::parse(&self.bytes) {
            let length = header.length.get() as usize;
            if self.bytes.len() < length {
                break;
            }
            let frame: Vec<u8> = self.bytes.drain(..length).collect();
            self.received += length as u64;
            self.apply(&frame, hello.incarnation);
            new = true;
        }
        new
    }

    fn apply(&mut self, frame: &[u8], incarnation: IncarnationId) {
        let (header, directory) = check_frame(frame).expect("a valid frame");
        assert_eq!(header.incarnation, incarnation);
        self.promises.push(header.sync_ms.get());
        let next = if self.position.incarnation == incarnation { self.position.frame + 1 } else { 1 };
        assert_eq!(header.number.get(), next, "frames come in order");
        assert!(header.first_seq.get() > self.position.seq, "numbers rise");
        if self.position.incarnation == incarnation {
            assert_eq!(header.first_seq.get(), self.position.seq + 1, "numbers have no gaps");
        }
        let mut seq = header.first_seq.get();
        for (index, entry) in directory.iter().enumerate() {
            let (at, len) = (entry.at.get() as usize, entry.sealed_len.get() as usize);
            let mut sealed = frame[at..at + len].to_vec();
            let key = self.key.as_ref().expect("after a hello");
            let plain = open_chunk(key, header, index as u32, &mut sealed).expect("opens");
            let chunk = Chunk::parse(plain).expect("parses");
            let mut out = Vec::new();
            let bytes = payload(&chunk, &mut out).expect("expands");
            for record in chunk.records() {
                let record = record.expect("makes sense");
                assert_eq!(record.seq, seq);
                seq += 1;
                let data = record_payload(&record, bytes).expect("its checksum holds").to_vec();
                if record.kind.changes_disk() {
                    let image = self.images.entry(record.disk).or_insert_with(|| vec![0xEE; SIZE as usize]);
                    let range = record.offset as usize..record.end() as usize;
                    if record.kind.is_zero() {
                        image[range].fill(0);
                    } else {
                        image[range].copy_from_slice(&data);
                    }
                }
                if record.kind == RecordKind::Resize {
                    let size = DiskInfo::decode(&data).expect("a disk").size as usize;
                    self.images.entry(record.disk).or_default().resize(size, 0);
                }
                if record.kind == RecordKind::SyncHash && !self.silent {
                    let image = self.images.entry(record.disk).or_insert_with(|| vec![0xEE; SIZE as usize]);
                    let range = &image[record.offset as usize..record.end() as usize];
                    let key = rotated().hash_key(STREAM, self.under);
                    self.compared.push_back((record.seq, key.differs(record.disk, record.offset, range, &data)));
                }
                self.records.push(record);
            }
        }
        assert_eq!(seq, header.last_seq.get() + 1);
        self.position = Position { incarnation, frame: header.number.get(), seq: header.last_seq.get() };
    }

    pub fn count(&self, kind: RecordKind) -> usize {
        self.records.iter().filter(|r| r.kind == kind).count()
    }
}

/// The bed.
pub struct Bed {
    pub world: World,
    pub node: NodeId,
    pub far: NodeId,
    pub io: SimIo,
    far_io: SimIo,
    pub source: Source<SimIo>,
    pub held: Held,
    pub disks: usize,
    pub policy: PolicyKey,
    pub limits: SourceLimits,
    pub trust_reboot: bool,
    /// The logs have witnesses.
    pub witnessed: bool,
    /// The logical block that disks are given; 0: their own.
    pub block: u32,
    pub lease: Nanos,
    pub sync_deadline: Nanos,
    pub generation: u64,
    /// Slots of disks that have left.
    pub left: Vec<u16>,
    /// A hello that claims this disk below this generation is refused.
    pub refuse_claims: Option<(DiskId, u64)>,
    /// Each hello is under way when the source is given this disk under this generation.
    pub gives_meanwhile: Option<(DiskId, u64)>,
    /// No connection can be made.
    pub unreachable: bool,
    /// What the target says to a hello instead of welcoming it.
    pub refusal: Option<Refusal>,
    link: Option<(Sock, Sock, ControlKey, Hello)>,
    /// Counts the connections: names the receives of each.
    links: u64,
    pub events: Vec<SourceEvent>,
    /// As the source last said: asking for its status at each step would cost more than all else.
    state: Option<GroupState>,
    pub answers: VecDeque<(usize, Answer)>,
    cookie: u64,
}

impl Bed {
    pub fn new(seed: u64, disks: usize, config: WorldConfig, limits: SourceLimits) -> Self {
        let world = World::new(seed, config);
        let (node, far) = (world.node("source"), world.node("target"));
        let io = world.io_with_pool(node, Pool::new(&pool_classes(limits.queue_bytes)));
        let far_io = world.io(far);
        for disk in 0..disks {
            world.put_file(node, &path(disk), &vec![0; SIZE as usize]);
        }
        let source = Source::new(1, limits.clone(), Sealer::Inline);
        Self {
            world,
            node,
            far,
            io,
            far_io,
            source,
            held: Held::default(),
            disks,
            policy: policy(),
            limits,
            trust_reboot: true,
            witnessed: false,
            block: 0,
            lease: 0,
            sync_deadline: 0,
            generation: 1,
            left: Vec::new(),
            refuse_claims: None,
            gives_meanwhile: None,
            unreachable: false,
            refusal: None,
            link: None,
            links: 1,
            events: Vec::new(),
            state: None,
            answers: VecDeque::new(),
            cookie: 0,
        }
    }

    pub fn usual(disks: usize) -> Self {
        Self::new(1, disks, WorldConfig::default(), SourceLimits { queue_bytes: 8 << 20, ..SourceLimits::default() })
    }

    pub fn config(&self) -> GroupConfig {
        GroupConfig {
            stream: STREAM,
            name: "group".into(),
            disks: (0..self.disks)
                .map(|disk| DiskConfig {
                    id: disk_id(disk),
                    slot: disk as u16,
                    name: format!("disk{disk}"),
                    path: path(disk),
                    log_path: log_path(disk),
                    witness_path: if self.witnessed { witness_path(disk) } else { String::new() },
                    serial: format!("serial{disk}"),
                    block: self.block,
                    generation: self.generation,
                    read_only: false,
                    trust_reboot: self.trust_reboot,
                    ..DiskConfig::default()
                })
                .collect(),
            policy_key: self.policy.clone(),
            cut_interval: 1000 * MS,
            compress: true,
            lease: self.lease,
            sync_deadline: self.sync_deadline,
            left: self.left.clone(),
        }
    }

    /// Connections that were asked for.
    pub fn links(&self) -> u64 {
        self.links
    }

    pub fn protect(&mut self) -> Result<(), ProtectError> {
        let config = self.config();
        self.source.protect(&mut self.io, config)
    }

    /// Protects and waits until everything is synchronised.
    pub fn ready(&mut self) {
        self.protect().expect("the disks are there");
        self.until("protected", |bed| bed.is_protected());
    }

    pub fn status(&self) -> GroupStatus {
        self.source.status(self.io.now()).remove(0)
    }

    pub fn is_protected(&self) -> bool {
        self.state == Some(GroupState::Protected)
    }

    /// A new process on the same disks, after a crash or power loss.
    pub fn restart(&mut self) {
        self.link = None;
        self.io = self.world.io_with_pool(self.node, Pool::new(&pool_classes(self.limits.queue_bytes)));
        self.source = Source::new(1, self.limits.clone(), Sealer::Inline);
        self.events.clear();
        self.state = None;
        while let Err(error) = self.protect() {
            assert!(matches!(error, ProtectError::Locked { .. }), "{error}");
            self.world.advance(50 * MS);
            let _ = self.world.step();
            self.io.poll(None, &mut Vec::new());
        }
    }

    /// Lets the world go on by one step at most.
    pub fn step(&mut self) {
        let mut done: Vec<Done> = Vec::new();
        self.io.poll(self.source.deadline(), &mut done);
        if done.is_empty() {
            self.far_turn();
            self.io.poll(self.source.deadline(), &mut done);
            if done.is_empty() {
                self.world.step();
                self.io.poll(None, &mut done);
            }
        }
        for done in done.drain(..) {
            assert!(self.source.owns(done.token));
            self.source.done(&mut self.io, done);
        }
        self.source.turn(&mut self.io);
        for disk in 0..self.disks {
            let Some(key) = self.source.disk_key(STREAM, DiskId([disk as u8 + 1; 16])) else { continue };
            let Some(mut one) = Disks::<SimIo>::disk(&mut self.source, key) else { continue };
            let answers = HostDisk::<SimIo>::answers(&mut one);
            self.answers.extend(answers.drain(..).map(|a| (disk, a)));
        }
        while let Some(event) = self.source.next_event() {
            if let SourceEvent::Connect { hello, .. } = &event {
                self.connect(hello);
            }
            if let SourceEvent::State { state, .. } = &event {
                self.state = Some(state.clone());
            }
            self.events.push(event);
        }
        self.far_turn();
    }

    fn connect(&mut self, hello: &Hello) {
        if let Some(given) = self.gives_meanwhile {
            self.source.set_generations(&mut self.io, STREAM, &[given]);
        }
        if self.unreachable {
            let failure = LinkFailure::Unreachable("no way".into());
            return self.source.link_failed(&mut self.io, STREAM, failure);
        }
        if let Some(refusal) = self.refusal.clone() {
            let failure = LinkFailure::Refused(refusal, "no".into());
            return self.source.link_failed(&mut self.io, STREAM, failure);
        }
        if let Some((disk, generation)) = self.refuse_claims
            && hello.disks.iter().any(|claim| claim.disk.id == disk && claim.generation < generation)
        {
            let failure = LinkFailure::Refused(Refusal::Fenced { disk, generation }, "no".into());
            return self.source.link_failed(&mut self.io, STREAM, failure);
        }
        let position = self.held.position;
        let whole = self.held.welcome(hello);
        let (here, there) = self.world.connect(self.node, self.far);
        let mut control = ControlKey::new(&[9; 32]);
        self.say(there, &mut control, Control::Ready);
        self.link = Some((here, there, control, hello.clone()));
        self.links += 1;
        self.listen(there);
        let key = ControlKey::new(&[9; 32]);
        self.source.linked(&mut self.io, STREAM, here, key, TimelineId::NONE, position, whole);
    }

    fn say(&mut self, sock: Sock, control: &mut ControlKey, message: Control) {
        let mut bytes = [0; CONTROL_LEN];
        control.seal(&message, &mut bytes);
        let mut buf = self.far_io.pool().take(4096).expect("the bed has buffers");
        buf[..CONTROL_LEN].copy_from_slice(&bytes);
        self.far_io.submit(0, Op::Send { sock, part: Part { buf, at: 0, len: CONTROL_LEN } });
        self.far_io.poll(None, &mut Vec::new());
    }

    fn listen(&mut self, sock: Sock) {
        let buf = self.far_io.pool().take(MAX_FRAME).expect("the bed has buffers");
        self.far_io.submit(self.links, Op::Recv { sock, part: Part { buf, at: 0, len: MAX_FRAME } });
    }

    fn far_turn(&mut self) {
        let mut done = Vec::new();
        self.far_io.poll(None, &mut done);
        for done in done {
            let Some((here, there, mut control, hello)) = self.link.take() else { continue };
            if done.token == self.links {
                let part = done.part.expect("a receive has its buffer");
                let Ok(bytes @ 1..) = done.result else {
                    self.far_io.close_sock(there);
                    continue;
                };
                self.held.bytes.extend_from_slice(&part.buf[..bytes as usize]);
                drop(part);
                if self.held.receive(&hello) && !self.held.mute {
                    let Position { frame, seq, .. } = self.held.position;
                    self.say(there, &mut control, Control::Ack { frame, seq });
                }
                while let Some((seq, differs)) = self.held.compared.pop_front() {
                    self.say(there, &mut control, Control::Compared { seq, differs });
                }
                self.listen(there);
            }
            self.link = Some((here, there, control, hello));
        }
    }

    /// The target says something on the connection.
    pub fn tell(&mut self, message: Control) {
        if let Some((here, there, mut control, hello)) = self.link.take() {
            self.say(there, &mut control, message);
            self.link = Some((here, there, control, hello));
        }
    }

    /// Breaks the connection.
    pub fn cut(&mut self) {
        if let Some((here, ..)) = self.link.take() {
            self.world.cut(here);
        }
    }

    /// Steps until it holds.
    pub fn until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let limit = self.world.now() + 120_000 * MS;
        while !holds(self) {
            self.step();
            assert!(self.world.now() < limit, "{what} never came: {:?}", self.source.status(self.io.now()));
        }
    }

    /// Steps for that long.
    pub fn pass(&mut self, nanos: Nanos) {
        let end = self.world.now() + nanos;
        self.until("time", |bed| bed.world.now() >= end);
    }

    /// Asks a disk something; the cookie.
    pub fn ask(&mut self, disk: usize, request: Request) -> u64 {
        self.cookie += 1;
        let key = self.source.disk_key(STREAM, DiskId([disk as u8 + 1; 16])).expect("protected");
        let mut one = Disks::<SimIo>::disk(&mut self.source, key).expect("on offer");
        one.request(&mut self.io, self.cookie, request);
        self.cookie
    }

    /// A write request with these bytes.
    pub fn write_request(&self, offset: u64, bytes: &[u8], fua: bool) -> Request {
        let at = HEADROOM + (offset % 4096) as usize;
        let mut buf = self.io.pool().take(at + bytes.len() + HEADROOM).expect("the bed has buffers");
        buf.fill(0xDB);
        buf[at..at + bytes.len()].copy_from_slice(bytes);
        Request::Write { offset, data: Part { buf, at, len: bytes.len() }, fua }
    }

    /// Asks and waits for the answer.
    pub fn call(&mut self, disk: usize, request: Request) -> Result<Vec<u8>, Errno> {
        let cookie = self.ask(disk, request);
        self.answer(cookie)
    }

    /// Waits for an answer.
    pub fn answer(&mut self, cookie: u64) -> Result<Vec<u8>, Errno> {
        let mut found = None;
        self.until("an answer", |bed| {
            if let Some(at) = bed.answers.iter().position(|(_, a)| a.cookie == cookie) {
                found = bed.answers.remove(at);
            }
            found.is_some()
        });
        let (_, answer) = found.expect("just found");
        answer.result.map(|part| part.map_or(Vec::new(), |p| p.buf[p.at..p.at + p.len].to_vec()))
    }

    pub fn write(&mut self, disk: usize, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let request = self.write_request(offset, bytes, false);
        self.call(disk, request).map(drop)
    }

    pub fn has_answer(&self, cookie: u64) -> bool {
        self.answers.iter().any(|(_, a)| a.cookie == cookie)
    }

    /// Waits until everything numbered is acknowledged.
    pub fn acked(&mut self) {
        self.until("acknowledged", |bed| {
            let status = bed.status();
            status.acked_seq == status.captured_seq
        });
    }

    /// The source's disk as a reader sees it.
    pub fn disk(&self, disk: usize) -> Vec<u8> {
        self.world.file(self.node, &path(disk)).expect("there")
    }

    /// Both ends hold the same.
    pub fn assert_equal(&self) {
        for disk in 0..self.disks {
            let (here, there) = (self.disk(disk), &self.held.images[&(disk as u16)]);
            if here == *there {
                continue;
            }
            if let Some(at) = here.iter().zip(there).position(|(a, b)| a != b) {
                panic!("disk {disk} differs at {at}: {} here, {} there", here[at], there[at]);
            }
        }
    }

    /// Makes a disk's file longer, as its owner would.
    pub fn grow(&mut self, disk: usize, size: u64) {
        let mut other = if self.io.alive() { None } else { Some(self.world.io(self.node)) };
        let io = other.as_mut().unwrap_or(&mut self.io);
        let how = OpenHow { write: true, ..OpenHow::default() };
        let file = io.open(&path(disk), how).expect("there");
        io.set_len(file, size, false).expect("grows");
        io.close(file);
    }

    /// Which extents the log on the disk says are set.
    pub fn log_bits(&self, disk: usize) -> Vec<u32> {
        let bytes = self.world.file(self.node, &log_path(disk)).expect("there");
        afterimage_dataplane::intent::load(&bytes, DiskId([disk as u8 + 1; 16]), SIZE, STREAM).extents
    }
}

pub fn path(disk: usize) -> String {
    format!("/disks/disk{disk}.img")
}

pub fn log_path(disk: usize) -> String {
    format!("/disks/disk{disk}.log")
}

pub fn witness_path(disk: usize) -> String {
    format!("/disks/disk{disk}.witness")
}

pub fn disk_id(disk: usize) -> DiskId {
    DiskId([disk as u8 + 1; 16])
}
