//! A target in the simulated world, a source that seals frames by hand, and the model that both are held against.

#![allow(dead_code)]

use afterimage_dataplane::host::{Answer, DiskKey, Disks, Export, HEADROOM, HostDisk, Request};
use afterimage_dataplane::io::sim::{NodeId, SimIo, Snapshot, World, WorldConfig};
use afterimage_dataplane::io::{Done, Io, Op, Part, Sock};
use afterimage_dataplane::seal::{ControlKey, DataKey, FrameMeta, Item, Plan, PolicyKey, Scratch, seal_frame};
use afterimage_dataplane::target::{StreamConfig, Target, TargetConfig, TargetEvent, ViewConfig};
use afterimage_wire::WIRE_VERSION;
use afterimage_wire::control::{CONTROL_LEN, Control};
use afterimage_wire::handshake::{DiskClaim, Hello, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::record::{Cut, DiskInfo, Record, RecordKind, SyncMark};
use afterimage_wire::segment::{Predecessor, WrappedKey};
use afterimage_wire::timeline::TimelineKind;

pub const ROOT: &str = "/t";
pub const SIZE: u64 = 256 * 1024;
pub const SECOND: u64 = 1_000_000_000;

pub fn stream_id() -> StreamId {
    StreamId([9; 16])
}

pub fn policy() -> PolicyKey {
    PolicyKey::new(PolicyKeyId([4; 16]), [5; 32])
}

pub fn disk(slot: u16) -> DiskInfo {
    DiskInfo {
        slot,
        id: DiskId([slot as u8 + 1; 16]),
        size: SIZE,
        block: 512,
        physical_block: 4096,
        serial: format!("serial-{slot}"),
        name: format!("disk{slot}"),
    }
}

pub fn config() -> TargetConfig {
    TargetConfig { segment_bytes: 8 << 20, budget_bytes: 64 << 20, reserve_bytes: 0, ..TargetConfig::new(ROOT) }
}

pub fn stream_config(retention: u64) -> StreamConfig {
    StreamConfig {
        stream: stream_id(),
        name: "group".into(),
        policy_key: policy(),
        retention,
        budget_bytes: 0,
        disks: vec![(disk(0), 1), (disk(1), 1)],
    }
}

/// One record as the model knows it.
#[derive(Clone)]
pub struct Known {
    pub seq: u64,
    pub slot: u16,
    pub offset: u64,
    pub len: u64,
    pub bytes: Option<Vec<u8>>,
}

/// A source: seals frames, remembers what it wrote.
pub struct Feeder {
    pub incarnation: IncarnationId,
    pub predecessor: Predecessor,
    pub first_seq: u64,
    pub next_seq: u64,
    pub generation: u64,
    pub key: DataKey,
    pub wrapped: WrappedKey,
    /// Sealed frames, from number 1, with the number of their last record.
    pub frames: Vec<(Vec<u8>, u64)>,
    pub acked: (u64, u64),
    pub mono: u64,
    /// What the frames sealed from now on promise.
    pub sync_ms: u32,
    pub records: Vec<(Record, Vec<u8>)>,
    scratch: Scratch,
}

impl Feeder {
    pub fn new(tag: u8, first_seq: u64, predecessor: Predecessor) -> Self {
        let incarnation = IncarnationId([tag; 16]);
        let key = DataKey::new([tag; 32]);
        Self {
            incarnation,
            predecessor,
            first_seq,
            next_seq: first_seq,
            generation: 1,
            wrapped: policy().wrap(incarnation, &key, [tag; 12]),
            key,
            frames: Vec::new(),
            acked: (0, 0),
            mono: SECOND,
            sync_ms: 0,
            records: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    pub fn hello(&self) -> Hello {
        Hello {
            version: WIRE_VERSION,
            stream: stream_id(),
            incarnation: self.incarnation,
            predecessor: self.predecessor,
            key: self.wrapped,
            first_seq: self.first_seq,
            next_frame: self.frames.len() as u64 + 1,
            connection: 0,
            disks: [0, 1].map(|slot| DiskClaim { disk: disk(slot), generation: self.generation }).to_vec(),
        }
    }

    pub fn record(&mut self, kind: RecordKind, slot: u16, offset: u64, len: u64, payload: Vec<u8>) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        let record = Record {
            seq,
            kind,
            disk: slot,
            offset,
            len: len as u32,
            mono_ns: self.mono,
            wall_ns: 1_700_000_000 * SECOND + self.mono,
            payload_at: 0,
            payload_len: 0,
            crc: 0,
        };
        self.records.push((record, payload));
        seq
    }

    pub fn write(&mut self, slot: u16, offset: u64, bytes: Vec<u8>) -> u64 {
        self.record(RecordKind::Write, slot, offset, bytes.len() as u64, bytes)
    }

    pub fn cut(&mut self, number: u64) -> u64 {
        let mut payload = Vec::new();
        Cut { number, ..Cut::default() }.encode(&mut payload);
        self.record(RecordKind::Cut, 0, 0, 0, payload)
    }

    /// Joins both disks and synchronises them whole (as zeros).
    pub fn join_and_sync(&mut self, sync: u64) {
        for slot in [0, 1] {
            let mut payload = Vec::new();
            disk(slot).encode(&mut payload);
            self.record(RecordKind::Join, slot, 0, 0, payload);
            self.sync_mark(RecordKind::SyncBegin, slot, sync, true);
            self.record(RecordKind::SyncZero, slot, 0, SIZE, Vec::new());
            self.sync_mark(RecordKind::SyncEnd, slot, sync, true);
        }
    }

    pub fn sync_mark(&mut self, kind: RecordKind, slot: u16, sync: u64, whole: bool) -> u64 {
        let mut payload = Vec::new();
        SyncMark { sync, whole }.encode(&mut payload);
        self.record(kind, slot, 0, 0, payload)
    }

    /// Seals the records since the last call into frames of at most `most` records.
    pub fn seal(&mut self, most: usize) {
        let records = std::mem::take(&mut self.records);
        for group in records.chunks(most) {
            let mut plan = Plan::default();
            let items: Vec<Item<'_>> =
                group.iter().map(|(record, payload)| Item { record: *record, payload }).collect();
            for item in &items {
                assert!(plan.add(item.payload.len()));
            }
            let meta = FrameMeta {
                stream: stream_id(),
                incarnation: self.incarnation,
                number: self.frames.len() as u64 + 1,
                acked: self.acked.0,
                mono_ns: self.mono,
                sync_ms: self.sync_ms,
            };
            let mut out = vec![0; plan.frame_bound()];
            let len = seal_frame(&self.key, &meta, &plan, &items, true, &mut self.scratch, &mut out);
            out.truncate(len);
            self.frames.push((out, group.last().expect("a chunk is not empty").0.seq));
        }
    }
}

/// What both ends should agree on.
#[derive(Default, Clone)]
pub struct Model {
    pub records: Vec<Known>,
}

impl Model {
    pub fn note(&mut self, record: &Record, payload: &[u8]) {
        if !record.kind.changes_disk() {
            return;
        }
        let bytes = (!record.kind.is_zero()).then(|| payload.to_vec());
        let (seq, slot, offset, len) = (record.seq, record.disk, record.offset, record.len.into());
        self.records.push(Known { seq, slot, offset, len, bytes });
    }

    pub fn at(&self, slot: u16, seq: u64) -> Vec<u8> {
        let mut disk = vec![0; SIZE as usize];
        for known in self.records.iter().filter(|known| known.slot == slot && known.seq <= seq) {
            let range = known.offset as usize..(known.offset + known.len) as usize;
            match &known.bytes {
                Some(bytes) => disk[range].copy_from_slice(bytes),
                None => disk[range].fill(0),
            }
        }
        disk
    }
}

struct Link {
    sock: Sock,
    control: ControlKey,
    heard: Vec<u8>,
    sending: bool,
    queue: std::collections::VecDeque<Vec<u8>>,
}

/// A target on a node, and a source's end on another.
pub struct Rig {
    pub world: World,
    pub node: NodeId,
    pub peer: NodeId,
    pub io: SimIo,
    pub peer_io: SimIo,
    pub target: Target<SimIo>,
    pub config: TargetConfig,
    pub retention: u64,
    link: Option<Link>,
    pub messages: Vec<Control>,
    pub broken: bool,
    pub events: Vec<TargetEvent>,
    next_cookie: u64,
    pub answers: Vec<Answer>,
    pub steps: u64,
    links: u64,
}

impl Rig {
    pub fn new(seed: u64, world: WorldConfig, config: TargetConfig, retention: u64) -> Self {
        let world = World::new(seed, world);
        let (node, peer) = (world.node("target"), world.node("source"));
        let (io, peer_io) = (world.io(node), world.io(peer));
        let target = Target::new(7, config.clone()).expect("good settings");
        let mut rig = Self {
            world,
            node,
            peer,
            io,
            peer_io,
            target,
            config,
            retention,
            link: None,
            messages: Vec::new(),
            broken: false,
            events: Vec::new(),
            next_cookie: 1,
            answers: Vec::new(),
            steps: 0,
            links: 0,
        };
        rig.open();
        rig
    }

    pub fn plain(seed: u64) -> Self {
        Self::new(seed, WorldConfig::default(), config(), 3600 * SECOND)
    }

    /// Opens the stream and waits until it is ready.
    pub fn open(&mut self) {
        self.target.open_stream(&mut self.io, stream_config(self.retention)).expect("opens");
        self.until("ready", |rig| rig.events.contains(&TargetEvent::Ready { stream: stream_id() }));
    }

    /// The target's process dies (or its machine loses power) and a new one starts.
    pub fn restart(&mut self, power: bool) {
        self.die(power);
        self.open();
    }

    pub fn die(&mut self, power: bool) {
        if power {
            self.world.power_loss(self.node);
        } else {
            self.world.crash(self.node);
        }
        self.begin();
    }

    /// The target's machine loses power and comes back with what its disk held before.
    pub fn put_back(&mut self, copy: &Snapshot) {
        self.world.power_loss(self.node);
        self.world.restore(self.node, copy);
        self.begin();
        self.open();
    }

    fn begin(&mut self) {
        self.io = self.world.io(self.node);
        self.target = Target::new(7, self.config.clone()).expect("good settings");
        self.events.clear();
        self.link = None;
        self.answers.clear();
    }

    pub fn tick(&mut self) {
        let mut done: Vec<Done> = Vec::new();
        for _ in 0..10_000 {
            done.clear();
            self.io.poll(self.target.deadline(), &mut done);
            let quiet = done.is_empty();
            for done in done.drain(..) {
                assert!(self.target.owns(done.token));
                self.target.done(&mut self.io, done);
            }
            self.target.turn(&mut self.io);
            while let Some(event) = self.target.next_event() {
                self.events.push(event);
            }
            for export in self.target.exports() {
                let mut disk = self.target.disk(export.key).expect("on offer");
                let answers: Vec<Answer> = disk.answers().drain(..).collect();
                drop(disk);
                self.answers.extend(answers);
            }
            if quiet && self.target.deadline().is_none_or(|at| at > self.io.now()) {
                self.io.poll(self.target.deadline(), &mut done);
                if done.is_empty() {
                    return;
                }
                for done in done.drain(..) {
                    self.target.done(&mut self.io, done);
                }
            }
        }
        panic!(
            "the target spins: {:?} at {} {:?} {:?}",
            self.target.deadline(),
            self.io.now(),
            self.target.status(),
            self.events.last()
        );
    }

    fn tick_peer(&mut self) {
        let mut done: Vec<Done> = Vec::new();
        loop {
            self.send_next();
            self.peer_io.poll(None, &mut done);
            if done.is_empty() {
                return;
            }
            for done in done.drain(..) {
                let Some(link) = &mut self.link else { continue };
                if done.token / 4 != self.links {
                    continue; // Of an older connection.
                }
                match (done.token % 4, done.result) {
                    (1, Ok(_)) => link.sending = false,
                    (2, Ok(len)) if len > 0 => {
                        let part = done.part.expect("the buffer comes back");
                        link.heard.extend_from_slice(&part.buf[..len as usize]);
                        while link.heard.len() >= CONTROL_LEN {
                            let bytes: Vec<u8> = link.heard.drain(..CONTROL_LEN).collect();
                            let message = link.control.open(bytes.as_slice().try_into().unwrap()).expect("sealed");
                            self.messages.push(message);
                        }
                        let op = Op::Recv { sock: link.sock, part: Part { len: part.buf.len(), ..part } };
                        self.peer_io.submit(self.links * 4 + 2, op);
                    }
                    _ => self.broken = true,
                }
            }
        }
    }

    fn send_next(&mut self) {
        let Some(link) = &mut self.link else { return };
        if link.sending || self.broken {
            return;
        }
        let Some(bytes) = link.queue.pop_front() else { return };
        let mut buf = self.peer_io.pool().take(bytes.len()).expect("a buffer");
        buf[..bytes.len()].copy_from_slice(&bytes);
        link.sending = true;
        let part = Part { buf, at: 0, len: bytes.len() };
        self.peer_io.submit(self.links * 4 + 1, Op::Send { sock: link.sock, part });
    }

    pub fn step(&mut self) {
        self.steps += 1;
        let Some(node) = self.world.step() else { panic!("nothing will ever happen") };
        if node == self.node {
            self.tick();
        } else {
            self.tick_peer();
        }
    }

    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        self.tick();
        self.tick_peer();
        for _ in 0..50_000 {
            if condition(self) {
                return;
            }
            self.step();
        }
        panic!("never {what}: {:?} {:?}", self.target.status(), self.messages.last());
    }

    pub fn run_for(&mut self, nanos: u64) {
        let end = self.world.now() + nanos;
        // A timer of the peer's makes sure that something happens at the end.
        self.peer_io.submit(3, Op::Timer { at: end });
        self.until("that late", |rig| rig.world.now() >= end);
    }

    pub fn hello(&mut self, hello: &Hello) -> Welcome {
        self.target.hello(&mut self.io, hello)
    }

    /// Shakes hands and connects; the welcome's position and whether a whole resync is owed.
    pub fn connect(&mut self, feeder: &Feeder) -> (afterimage_wire::handshake::Position, bool) {
        let hello = feeder.hello();
        match self.hello(&hello) {
            Welcome::Accepted { position, whole_resync, .. } => {
                self.attach(&hello);
                (position, whole_resync)
            }
            refused => panic!("{refused:?}"),
        }
    }

    pub fn attach(&mut self, hello: &Hello) {
        if let Some(link) = self.link.take() {
            self.peer_io.close_sock(link.sock);
        }
        let (ours, theirs) = self.world.connect(self.node, self.peer);
        self.target.attach(&mut self.io, hello, ours, ControlKey::new(&[3; 32]));
        self.links += 1;
        self.broken = false;
        self.messages.clear();
        self.link = Some(Link {
            sock: theirs,
            control: ControlKey::new(&[3; 32]),
            heard: Vec::new(),
            sending: false,
            queue: std::collections::VecDeque::new(),
        });
        let buf = self.peer_io.pool().take(4096).expect("a buffer");
        self.peer_io.submit(self.links * 4 + 2, Op::Recv { sock: theirs, part: Part { buf, at: 0, len: 4096 } });
    }

    pub fn send(&mut self, bytes: Vec<u8>) {
        self.link.as_mut().expect("connected").queue.push_back(bytes);
    }

    /// Sends all frames of the feeder above `frame`.
    pub fn send_from(&mut self, feeder: &Feeder, frame: u64) {
        for (bytes, _) in &feeder.frames[frame as usize..] {
            self.send(bytes.clone());
        }
    }

    pub fn acked(&self) -> (u64, u64) {
        let acks = self.messages.iter().filter_map(|message| match message {
            Control::Ack { frame, seq } => Some((*frame, *seq)),
            _ => None,
        });
        acks.max().unwrap_or_default()
    }

    /// Connects, sends what the target lacks, waits for its acknowledgement.
    pub fn ship(&mut self, feeder: &mut Feeder) {
        let (position, _) = self.connect(feeder);
        let from = if position.incarnation == feeder.incarnation { position.frame } else { 0 };
        self.send_from(feeder, from);
        let last = feeder.frames.len() as u64;
        if from < last {
            self.until("acknowledged", |rig| rig.acked().0 == last);
        }
        feeder.acked = (last, feeder.frames.last().map_or(0, |frame| frame.1));
    }

    /// Sends frames on the open connection and waits.
    pub fn ship_more(&mut self, feeder: &mut Feeder) {
        self.send_from(feeder, feeder.acked.0);
        let last = feeder.frames.len() as u64;
        self.until("acknowledged", |rig| rig.acked().0 == last);
        feeder.acked = (last, feeder.frames.last().map_or(0, |frame| frame.1));
    }

    pub fn view(&mut self, name: &str, seq: u64, writable: bool) -> Vec<Export> {
        let config = view_config(name, seq, writable);
        self.target.open_view(&mut self.io, config).expect("opens")
    }

    pub fn ask(&mut self, key: DiskKey, request: Request) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.target.disk(key).expect("on offer").request(&mut self.io, cookie, request);
        cookie
    }

    pub fn answer(&mut self, cookie: u64) -> Result<Option<Part>, afterimage_dataplane::io::Errno> {
        self.until("answered", |rig| rig.answers.iter().any(|answer| answer.cookie == cookie));
        let at = self.answers.iter().position(|answer| answer.cookie == cookie).expect("just seen");
        self.answers.remove(at).result
    }

    pub fn read(&mut self, key: DiskKey, offset: u64, len: usize) -> Vec<u8> {
        let cookie = self.ask(key, Request::Read { offset, len });
        let part = self.answer(cookie).expect("reads").expect("has data");
        assert!(part.at >= HEADROOM);
        part.buf[part.at..part.at + part.len].to_vec()
    }

    pub fn write_request(&self, offset: u64, bytes: &[u8], fua: bool) -> Request {
        let at = HEADROOM + (offset % 4096) as usize;
        let mut buf = self.io.pool().take(at + bytes.len() + 4096).expect("a buffer");
        buf[at..at + bytes.len()].copy_from_slice(bytes);
        Request::Write { offset, data: Part { buf, at, len: bytes.len() }, fua }
    }

    pub fn write(&mut self, key: DiskKey, offset: u64, bytes: &[u8], fua: bool) {
        let request = self.write_request(offset, bytes, fua);
        let cookie = self.ask(key, request);
        self.answer(cookie).expect("writes");
    }

    /// Opens the point and compares both disks with the model.
    pub fn check(&mut self, model: &Model, seq: u64) {
        let exports = self.view("check", seq, false);
        assert_eq!(exports.len(), 2, "at {seq}");
        for (slot, export) in exports.iter().enumerate() {
            let got = self.read(export.key, 0, SIZE as usize);
            let want = model.at(slot as u16, seq);
            if got != want {
                let at = got.iter().zip(&want).position(|(a, b)| a != b);
                panic!("disk {slot} at record {seq} differs from byte {at:?}");
            }
        }
        self.target.close_view(&mut self.io, "check", false).expect("closes");
    }
}

pub fn view_config(name: &str, seq: u64, writable: bool) -> ViewConfig {
    ViewConfig {
        name: name.into(),
        stream: stream_id(),
        seq,
        disks: None,
        writable,
        kind: if writable { TimelineKind::Failover } else { TimelineKind::View },
        reason: "test".into(),
    }
}

/// A small deterministic generator for tests.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let tag = self.roll(256) as u8;
        // Half of it shrinks.
        if self.roll(2) == 0 { vec![tag; len] } else { (0..len).map(|_| self.roll(256) as u8).collect() }
    }
}

/// Random writes, zeros and discards of any 512-aligned range.
pub fn scribble(feeder: &mut Feeder, model: &mut Model, dice: &mut Dice, count: usize) {
    let before = feeder.records.len();
    for _ in 0..count {
        feeder.mono += 10_000_000;
        let slot = dice.roll(2) as u16;
        let offset = dice.roll(SIZE / 512) * 512;
        let most = (SIZE - offset).min(40 * 1024);
        let len = (1 + dice.roll(most / 512)) * 512;
        match dice.roll(6) {
            0 => feeder.record(RecordKind::Zero, slot, offset, len, Vec::new()),
            1 => feeder.record(RecordKind::Discard, slot, offset, len, Vec::new()),
            _ => {
                let bytes = dice.bytes(len as usize);
                feeder.write(slot, offset, bytes)
            }
        };
    }
    for (record, payload) in &feeder.records[before..] {
        model.note(record, payload);
    }
}
