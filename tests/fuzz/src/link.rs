//! A source whose target holds the right keys and means ill: welcomes of any position, control messages of any content,
//! silence, cuts. The source goes on serving its host whatever it is told, and does not panic.

use std::collections::VecDeque;

use afterimage_dataplane::host::{Disks, HEADROOM, HostDisk, Request};
use afterimage_dataplane::io::sim::{NodeId, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Class, Done, Io, Op, Part, Pool, Sock};
use afterimage_dataplane::seal::{ControlKey, PolicyKey};
use afterimage_dataplane::sealers::Sealer;
use afterimage_dataplane::source::{
    DiskConfig, GroupConfig, HoldReason, LinkFailure, Source, SourceEvent, SourceLimits,
};
use afterimage_wire::control::{CONTROL_PLAIN_LEN, Control, StopReason};
use afterimage_wire::handshake::{Handshake, Hello, Position, Refusal, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId, TimelineId};

use crate::forge;
use crate::input::Input;

pub(crate) const STREAM: StreamId = StreamId([7; 16]);
pub(crate) const DISK: DiskId = DiskId([1; 16]);
pub(crate) const SIZE: u64 = 8 << 20;
pub(crate) const LOG: &str = "/disks/disk.log";
const CONTROL: [u8; 32] = [9; 32];
const MS: u64 = 1_000_000;
/// Steps of the world that one turn of the attacker may take.
const PATIENCE: usize = 2000;

/// A source on its machine, and the end of its connection that the attacker holds.
pub(crate) struct Machine {
    pub world: World,
    node: NodeId,
    far: NodeId,
    io: SimIo,
    far_io: SimIo,
    pub source: Source<SimIo>,
    /// The attacker's socket and its number.
    link: Option<Sock>,
    links: u64,
    counter: u64,
    hello: Option<Hello>,
    answers: VecDeque<u64>,
    cookie: u64,
}

fn pool() -> Pool {
    let class = |capacity, count| Class { capacity, count };
    Pool::new(&[class(4 << 10, 128), class(16 << 10, 64), class(80 << 10, 32), class(528 << 10, 16), class(2 << 20, 8)])
}

fn limits() -> SourceLimits {
    SourceLimits { queue_bytes: 4 << 20, ..SourceLimits::default() }
}

impl Machine {
    pub fn new() -> Self {
        let world = World::new(1, WorldConfig::default());
        let (node, far) = (world.node("source"), world.node("target"));
        world.put_file(node, "/disks/disk.img", &vec![0; SIZE as usize]);
        let (io, far_io) = (world.io_with_pool(node, pool()), world.io(far));
        let source = Source::new(1, limits(), Sealer::Inline);
        let (link, links, counter, hello, answers, cookie) = (None, 0, 0, None, VecDeque::new(), 0);
        Self { world, node, far, io, far_io, source, link, links, counter, hello, answers, cookie }
    }

    pub fn put_log(&self, bytes: &[u8]) {
        self.world.put_file(self.node, LOG, bytes);
    }

    pub fn log(&self) -> Option<Vec<u8>> {
        self.world.file(self.node, LOG)
    }

    /// The group of one disk.
    pub fn config() -> GroupConfig {
        let disk = DiskConfig {
            id: DISK,
            slot: 0,
            name: "disk".into(),
            path: "/disks/disk.img".into(),
            log_path: LOG.into(),
            serial: "serial".into(),
            generation: 1,
            trust_reboot: true,
            ..DiskConfig::default()
        };
        GroupConfig {
            stream: STREAM,
            name: "group".into(),
            disks: vec![disk],
            policy_key: PolicyKey::new(PolicyKeyId([1; 16]), [2; 32]),
            cut_interval: 1000 * MS,
            compress: true,
            lease: 0,
            sync_deadline: 0,
            left: Vec::new(),
        }
    }

    /// Protects the disk; false if it is refused.
    pub fn protect(&mut self) -> bool {
        self.source.protect(&mut self.io, Self::config()).is_ok()
    }

    /// What the source's machine sees of the world.
    pub fn io(&self) -> &SimIo {
        &self.io
    }

    /// Tells the source something.
    pub fn order<T>(&mut self, order: impl FnOnce(&mut Source<SimIo>, &mut SimIo) -> T) -> T {
        order(&mut self.source, &mut self.io)
    }

    /// The process dies and starts again.
    pub fn restart(&mut self, power: bool) -> bool {
        if power {
            self.world.power_loss(self.node);
        } else {
            self.world.crash(self.node);
        }
        (self.link, self.hello) = (None, None);
        self.io = self.world.io_with_pool(self.node, pool());
        self.source = Source::new(1, limits(), Sealer::Inline);
        self.answers.clear();
        self.world.advance(10_000 * MS);
        while self.far_io.now() < self.world.now() && self.world.step().is_some() {}
        self.protect()
    }

    /// Lets so much time pass.
    pub fn pass(&mut self, nanos: u64) {
        let end = self.world.now() + nanos;
        for _ in 0..PATIENCE {
            let mut done: Vec<Done> = Vec::new();
            self.io.poll(self.source.deadline(), &mut done);
            for done in done.drain(..) {
                self.source.done(&mut self.io, done);
            }
            self.source.turn(&mut self.io);
            while let Some(event) = self.source.next_event() {
                if let SourceEvent::Connect { hello, .. } = event {
                    self.hello = Some(*hello);
                }
            }
            if let Some(key) = self.source.disk_key(STREAM, DISK)
                && let Some(mut disk) = Disks::<SimIo>::disk(&mut self.source, key)
            {
                self.answers.extend(HostDisk::<SimIo>::answers(&mut disk).drain(..).map(|answer| answer.cookie));
            }
            self.drain();
            if self.world.now() >= end {
                return;
            }
            // Something is bound to happen at the end.
            self.far_io.submit(u64::MAX, Op::Timer { at: end });
            self.far_io.poll(None, &mut done);
            if self.world.step().is_none() {
                return;
            }
        }
    }

    /// Throws away what the source has sent.
    fn drain(&mut self) {
        let mut done = Vec::new();
        self.far_io.poll(None, &mut done);
        for done in done {
            let Some(sock) = self.link else { continue };
            if done.token != self.links || done.result.is_ok_and(|len| len == 0) || done.result.is_err() {
                continue;
            }
            if let Some(part) = done.part {
                self.far_io.submit(self.links, Op::Recv { sock, part });
            }
        }
        self.far_io.poll(None, &mut Vec::new());
    }

    /// The answer to a hello, as it comes off the wire: none if it would not be read there.
    fn answer(&mut self, welcome: Welcome) {
        if self.hello.take().is_none() {
            return;
        }
        let Ok(Some((Handshake::Welcome(welcome), _))) = Handshake::read(&Handshake::Welcome(welcome).encode()) else {
            let failure = LinkFailure::Unreachable("the handshake broke".into());
            return self.source.link_failed(&mut self.io, STREAM, failure);
        };
        match welcome {
            Welcome::Refused { reason, message } => {
                self.source.link_failed(&mut self.io, STREAM, LinkFailure::Refused(reason, message));
            }
            Welcome::Accepted { timeline, position, whole_resync } => {
                if let Some(old) = self.link.take() {
                    self.far_io.close_sock(old);
                }
                let (ours, theirs) = self.world.connect(self.node, self.far);
                self.links += 1;
                self.counter = 0;
                self.link = Some(theirs);
                if let Some(buf) = self.far_io.pool().take(64 << 10) {
                    let part = Part { len: buf.len(), buf, at: 0 };
                    self.far_io.submit(self.links, Op::Recv { sock: theirs, part });
                }
                let key = ControlKey::new(&CONTROL);
                self.source.linked(&mut self.io, STREAM, ours, key, timeline, position, whole_resync);
            }
        }
    }

    /// A good answer to the hello that is asked, as of a target that holds nothing.
    pub fn welcome(&mut self) {
        let position = Position::default();
        self.answer(Welcome::Accepted { timeline: TimelineId([1; 16]), position, whole_resync: true });
        self.say(&Control::Ready.encode());
    }

    fn say(&mut self, plain: &[u8; CONTROL_PLAIN_LEN]) {
        let bytes = forge::control(CONTROL, self.counter, plain);
        self.counter = self.counter.wrapping_add(1);
        self.raw(&bytes);
    }

    fn raw(&mut self, bytes: &[u8]) {
        let Some(sock) = self.link.filter(|_| !bytes.is_empty()) else { return };
        if let Some(mut buf) = self.far_io.pool().take(bytes.len()) {
            buf[..bytes.len()].copy_from_slice(bytes);
            self.far_io.submit(u64::MAX, Op::Send { sock, part: Part { buf, at: 0, len: bytes.len() } });
        }
    }

    /// The host writes; whether that is answered, or need not be.
    pub fn write(&mut self, offset: u64, len: usize) -> bool {
        let Some(key) = self.source.disk_key(STREAM, DISK) else { return true };
        let at = HEADROOM + (offset % 4096) as usize;
        let Some(buf) = self.io.pool().take(at + len + 4096) else { return true };
        let Some(mut disk) = Disks::<SimIo>::disk(&mut self.source, key) else { return true };
        self.cookie += 1;
        let data = Part { buf, at, len };
        disk.request(&mut self.io, self.cookie, Request::Write { offset, data, fua: false });
        drop(disk);
        for _ in 0..20 {
            if self.answers.contains(&self.cookie) {
                return true;
            }
            self.pass(50 * MS);
        }
        // Told, under the target's seal, that another may run in its place, it answers nobody.
        let status = self.source.status(self.io.now());
        status.first().is_some_and(|group| group.held == Some(HoldReason::SteppedDown))
    }

    /// The host is answered, and the state can be told.
    pub fn well(&mut self) {
        assert!(self.write(4096, 8192), "a write of the host is not answered: {:?}", self.source.status(self.io.now()));
        let _ = self.source.status(self.io.now());
    }
}

/// The body.
pub fn body(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new();
    assert!(machine.protect(), "a good disk is taken");
    machine.pass(MS);
    for _ in 0..40 {
        if input.is_empty() {
            break;
        }
        step(&mut machine, &mut input);
        machine.pass(MS);
    }
    machine.well();
}

fn step(machine: &mut Machine, input: &mut Input<'_>) {
    let sent = machine.source.status(machine.world.now()).first().map_or((0, 0), |s| (s.acked_seq, s.captured_seq));
    match input.below(12) {
        0 | 1 => machine.welcome(),
        2 => {
            let same = machine.hello.as_ref().map_or(IncarnationId::NONE, |hello| hello.incarnation);
            let incarnation = if input.flag() { same } else { IncarnationId(input.id()) };
            let position = Position { incarnation, frame: input.number(1), seq: input.number(sent.1) };
            let timeline = TimelineId(input.id());
            machine.answer(Welcome::Accepted { timeline, position, whole_resync: input.flag() });
            if input.flag() {
                machine.say(&Control::Ready.encode());
            }
        }
        3 => {
            let reason = match input.below(8) {
                0 => Refusal::UnknownStream,
                1 => Refusal::Version { known: input.short() },
                2 => Refusal::Fenced { disk: DiskId(input.id()), generation: input.number(1) },
                3 => Refusal::Branch,
                4 => Refusal::SeqBehind { newest: input.number(sent.1) },
                5 => Refusal::Busy,
                6 => Refusal::Unable,
                _ => Refusal::BadClaim,
            };
            machine.answer(Welcome::Refused { reason, message: "no".into() });
        }
        4 | 5 => {
            let ack = Control::Ack { frame: input.number(2), seq: input.number(sent.1) };
            machine.say(&ack.encode());
        }
        6 => {
            let reasons = [
                StopReason::Fenced,
                StopReason::BadFrame,
                StopReason::NoSpace,
                StopReason::JournalFailed,
                StopReason::Replaced,
                StopReason::ShuttingDown,
            ];
            let reason = reasons[input.below(6) as usize];
            machine.say(&Control::Stop { reason, value: input.number(1) }.encode());
        }
        7 => {
            let mut plain = [0; CONTROL_PLAIN_LEN];
            let bytes = input.take(CONTROL_PLAIN_LEN);
            plain[..bytes.len()].copy_from_slice(bytes);
            machine.say(&plain);
        }
        8 => machine.raw(input.take(130)),
        9 => machine.pass(input.below(12_000) * MS),
        10 => {
            let offset = input.below(SIZE / 512 - 64) * 512;
            assert!(machine.write(offset, 512 * (1 + input.below(60)) as usize), "a write is not answered");
        }
        _ => match input.below(4) {
            0 => {
                machine.restart(input.flag());
            }
            1 => {
                if let Some(sock) = machine.link.take() {
                    machine.world.cut(sock)
                }
            }
            _ => machine.counter = input.number(machine.counter),
        },
    }
}
