//! The stage: two nodes with the real cores on simulated I/O, and the owner of both (what a proxy's threads and the
//! coordinator do around the cores: handshakes, restarts, configuration), reduced to what the cores can see of it.

use std::collections::{BTreeMap, VecDeque};

use afterimage_dataplane::host::{DiskKey, Disks, HostDisk};
use afterimage_dataplane::io::sim::{NodeId, Rng, SimIo, World};
use afterimage_dataplane::io::{Done, Io, Nanos, Pool, Sock};
use afterimage_dataplane::seal::{ControlKey, PolicyKey};
use afterimage_dataplane::sealers::Sealer;
use afterimage_dataplane::source::{
    DiskConfig, GroupConfig, GroupState, GroupStatus, LinkFailure, ProtectError, Source, SourceEvent, SourceLimits,
    pool_classes,
};
use afterimage_dataplane::target::{
    Damage, StreamConfig, StreamState, StreamStatus, Target, TargetConfig, TargetEvent,
};
use afterimage_wire::handshake::{Hello, Welcome};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::record::DiskInfo;

use crate::front::{Clients, Front, Heard, Life, Way};

mod ways;

/// Upper bits of the cores' tokens.
const SOURCE_BASE: u16 = 0x0001;
const TARGET_BASE: u16 = 0x0002;
/// The source's queue, bytes: small, so that outages fill it.
const QUEUE_BYTES: usize = 4 << 20;
/// How long a handshake waits for a process that stands still, before it looks again.
const HALT: Nanos = 1_000_000;
/// Between two tries to open what a dead process still locks.
const RETRY: Nanos = 50_000_000;
/// How long a stop waits for the target.
const STOP_WAIT: Nanos = 1_500_000_000;
/// Between two reports of the source to its coordinator.
const ASKS: Nanos = 1_000_000_000;
/// How long a process that is being stopped waits for its hosts' requests to end.
const HOSTS_END: Nanos = 3_000_000_000;

/// Where the target keeps its journal.
pub const ROOT: &str = "/journal";

/// Where the source spills.
const SPILL: &str = "/spill";

/// What is played.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Size of each disk, bytes.
    pub disks: Vec<u64>,
    /// Time between cuts.
    pub cut_interval: Nanos,
    /// Stream time that stays in single writes.
    pub retention: Nanos,
    /// Compress.
    pub compress: bool,
    /// Segment size, bytes.
    pub segment_bytes: u64,
    /// Bytes of journal before it is shortened.
    pub budget_bytes: u64,
    /// The source may trust its write-intent log after a power loss.
    pub trust_reboot: bool,
    /// Intent bits that may stay set with nothing holding them.
    pub hot_extents: usize,
    /// Bytes that the source may spill; 0: it has no spill.
    pub spill_bytes: u64,
    /// How long the source may answer without a word of the target or the coordinator; 0: for ever.
    pub lease: Nanos,
    /// The coordinator reaches the source, and gives it words, too.
    pub confirmed: bool,
    /// How long an answer may wait for the target's acknowledgement; 0: it does not.
    pub sync_deadline: Nanos,
    /// Through what hosts ask the source's disks.
    pub front: Front,
    /// Through what views are asked.
    pub view_front: Front,
}

/// Something that happens later.
enum Later {
    /// The source's hello arrives at the target (of this life).
    Hello(Box<Hello>, u64),
    /// The target's answer arrives at the source (of this life).
    Welcome(Box<Hello>, Box<Welcome>, u64),
    /// Nobody answers.
    Unreachable(u64),
    /// Open the source's disks again.
    Protect(u64),
    /// Hosts connect again where they could not (to this life).
    Connect(u64),
    /// The source (of this life) stops, whether its hosts are gone or not.
    StopCore(u64),
    /// The coordinator has heard the source and confirms what it was asked at that time since boot (of this life).
    Confirm(Nanos, u64),
}

/// Two nodes and what stands between them.
pub struct Stage {
    /// The world.
    pub world: World,
    /// What is played.
    pub setup: Setup,
    /// The source's node.
    pub source_node: NodeId,
    /// The target's node.
    pub target_node: NodeId,
    host_node: NodeId,
    clients: Clients,
    /// The hosts' way to each disk of the source, and to each view.
    ways: Vec<Way>,
    view_ways: BTreeMap<DiskKey, Way>,
    /// The source's core has been told to stop, after its hosts.
    core_stops: bool,
    /// The source's process, while it lives.
    pub source: Option<Life<Source<SimIo>>>,
    /// The target's process, while it lives.
    pub target: Option<Life<Target<SimIo>>>,
    /// Counts the source's lives.
    pub source_lives: u64,
    /// Counts the target's lives.
    pub target_lives: u64,
    /// The group is open on the source: its disks take requests.
    pub protected: bool,
    /// The target's stream is recovered.
    pub ready: bool,
    /// No connection can be made.
    pub severed: bool,
    /// The source holds all I/O, also after a restart.
    pub hold: bool,
    /// The source holds its I/O, as it says.
    pub held: bool,
    /// Nobody but its hosts reaches the source.
    pub cut_off: bool,
    /// The coordinator has begun to give its disks to others, and confirms nothing.
    pub deposed: bool,
    ask_at: Nanos,
    /// The source is being stopped, and takes no requests.
    pub stopping: bool,
    /// The processes stand still: the source's, the target's.
    pub still: [bool; 2],
    /// Storage may fail or lie: what would be a bug otherwise is a reason to restart a process.
    pub lenient: bool,
    /// The target cannot go on without a restart.
    pub sick: Option<String>,
    /// A source that was stopped has ended; cleanly?
    pub stopped: Option<bool>,
    /// Connections made.
    pub links: u64,
    /// Synchronisations begun.
    pub syncs: u64,
    /// Synchronisations that the present source has begun.
    pub syncs_begun: u64,
    /// The stream.
    pub stream: StreamId,
    /// The policy's key.
    pub policy: PolicyKey,
    /// Generation under which the source's disks are configured.
    pub generation: u64,
    /// First number that the present source uses, as its last hello says; 0 before.
    pub first_seq: u64,
    /// The connection last made, at the source's end.
    pub link: Option<Sock>,
    rng: Rng,
    infos: Vec<DiskInfo>,
    later: BTreeMap<(Nanos, u64), Later>,
    order: u64,
    /// Answers of the source's disks, by disk.
    pub answers: VecDeque<(usize, Heard)>,
    /// Answers of views, by key.
    pub view_answers: VecDeque<(DiskKey, Heard)>,
    /// What the cores reported, for the trace.
    pub log: VecDeque<String>,
    /// Losses of unknown records that the target has told of, and its floor then.
    pub losses: Vec<(Damage, u64)>,
    done: Vec<Done>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stage at {}", self.world.now())
    }
}

/// Path of a disk on the source's node.
pub fn disk_path(disk: usize) -> String {
    format!("/disks/disk{disk}.img")
}

/// Path of its write-intent log.
pub fn log_path(disk: usize) -> String {
    format!("/disks/disk{disk}.log")
}

/// A disk's id.
pub fn disk_id(disk: usize) -> DiskId {
    DiskId([0xd0 + disk as u8; 16])
}

impl Stage {
    /// Puts the disks in place with this content. Nothing runs yet.
    pub fn new(world: World, rng: Rng, setup: Setup, content: &[Vec<u8>]) -> Self {
        let (source_node, target_node, host_node) = (world.node("source"), world.node("target"), world.node("hosts"));
        for (disk, bytes) in content.iter().enumerate() {
            world.put_file(source_node, &disk_path(disk), bytes);
        }
        let clients = Clients::new(world.io(host_node));
        Self {
            world,
            setup,
            source_node,
            target_node,
            host_node,
            clients,
            ways: Vec::new(),
            view_ways: BTreeMap::new(),
            core_stops: false,
            source: None,
            target: None,
            source_lives: 0,
            target_lives: 0,
            protected: false,
            ready: false,
            severed: false,
            hold: false,
            held: false,
            cut_off: false,
            deposed: false,
            ask_at: 0,
            stopping: false,
            still: [false; 2],
            lenient: false,
            sick: None,
            stopped: None,
            links: 0,
            syncs: 0,
            syncs_begun: 0,
            stream: StreamId([0x57; 16]),
            policy: PolicyKey::new(afterimage_wire::ids::PolicyKeyId([0x90; 16]), [0x91; 32]),
            generation: 1,
            first_seq: 0,
            link: None,
            rng,
            infos: Vec::new(),
            later: BTreeMap::new(),
            order: 0,
            answers: VecDeque::new(),
            view_answers: VecDeque::new(),
            log: VecDeque::new(),
            losses: Vec::new(),
            done: Vec::new(),
        }
    }

    fn at(&mut self, at: Nanos, what: Later) {
        self.order += 1;
        self.later.insert((at, self.order), what);
    }

    /// Folder of the stream's segments on the target.
    pub fn segments(&self) -> String {
        format!("{ROOT}/streams/{}/segments/", self.stream)
    }

    /// How many files there are of segments, and of what is to become one, at both ends.
    pub fn segment_files(&self) -> usize {
        self.world.files(self.target_node, &self.segments()) + self.world.files(self.source_node, SPILL)
    }

    /// Starts the source's process. It opens its disks as soon as nothing of an older life holds them.
    pub fn start_source(&mut self) {
        self.source_lives += 1;
        let pool = Pool::new(&pool_classes(QUEUE_BYTES));
        let io = self.world.io_with_pool(self.source_node, pool);
        let spill = self.setup.spill_bytes > 0;
        let limits = SourceLimits {
            queue_bytes: QUEUE_BYTES,
            hot_extents: self.setup.hot_extents,
            spill_dir: if spill { SPILL.into() } else { String::new() },
            spill_bytes: self.setup.spill_bytes,
            spill_segment_bytes: 4 << 20,
            stop_wait: STOP_WAIT,
            ..SourceLimits::default()
        };
        self.source = Some(Life::new(io, Source::new(SOURCE_BASE, limits, Sealer::Inline)));
        self.protected = false;
        (self.stopping, self.core_stops, self.stopped, self.held) = (false, false, None, false);
        (self.first_seq, self.syncs_begun) = (0, 0);
        self.protect();
    }

    /// The source is there for its hosts, and has not let one in.
    pub fn shuts_out(&self) -> bool {
        self.protected && !self.stopping && !self.still[0] && !self.takes_requests()
    }

    /// The source takes requests.
    pub fn takes_requests(&self) -> bool {
        let there = |way: &Way| match way {
            Way::Nbd(client) => self.clients.is_serving(*client),
            Way::Direct | Way::Ublk(_) => true,
        };
        self.protected && !self.stopping && !self.still[0] && self.ways.iter().all(there)
    }

    /// The monotonic clock of the source's machine.
    pub fn source_now(&self) -> Nanos {
        self.world.mono(self.source_node)
    }

    /// Asks the source to stop; [`Stage::stopped`] says when it has.
    pub fn stop_cleanly(&mut self) {
        self.stopping = true;
        if let Some(life) = &mut self.source {
            life.let_go();
            self.world.wake(self.source_node);
        }
        let (at, life) = (self.world.now() + HOSTS_END, self.source_lives);
        self.at(at, Later::StopCore(life));
        self.go_on_stopping(false);
    }

    /// Once its hosts are gone, or have had their time, the core stops.
    fn go_on_stopping(&mut self, late: bool) {
        let Some(life) = self.source.as_mut().filter(|_| self.stopping && !self.core_stops) else { return };
        if late || life.is_free() {
            self.core_stops = true;
            life.core.stop(&mut life.io);
            self.world.wake(self.source_node);
        }
    }

    fn protect(&mut self) {
        let config = GroupConfig {
            stream: self.stream,
            name: "group".into(),
            disks: (0..self.setup.disks.len())
                .map(|disk| DiskConfig {
                    id: disk_id(disk),
                    slot: disk as u16,
                    name: format!("disk{disk}"),
                    path: disk_path(disk),
                    log_path: log_path(disk),
                    serial: format!("s{disk}"),
                    generation: self.generation,
                    read_only: false,
                    trust_reboot: self.setup.trust_reboot,
                    ..DiskConfig::default()
                })
                .collect(),
            policy_key: self.policy.clone(),
            cut_interval: self.setup.cut_interval,
            compress: self.setup.compress,
            lease: self.setup.lease,
            sync_deadline: self.setup.sync_deadline,
            left: Vec::new(),
        };
        let Some(life) = &mut self.source else { return };
        match life.core.protect(&mut life.io, config) {
            Ok(()) => {
                self.protected = true;
                if self.hold {
                    life.core.fence(&mut life.io, self.stream, true);
                }
                self.world.wake(self.source_node);
                self.connect_hosts();
            }
            Err(error) if self.lenient || matches!(error, ProtectError::Locked { .. }) => {
                let (at, life) = (self.world.now() + RETRY, self.source_lives);
                self.at(at, Later::Protect(life));
            }
            Err(error) => panic!("the source refuses its disks: {error}"),
        }
    }

    /// Tells a source that runs of its policy.
    pub fn set_policy(&mut self) {
        let Setup { cut_interval, compress, lease, sync_deadline, .. } = self.setup;
        let stream = self.stream;
        if let Some(life) = self.source.as_mut().filter(|_| self.protected) {
            life.core.set_policy(&mut life.io, stream, cut_interval, compress).expect("it is allowed");
            life.core.set_waiting(&mut life.io, stream, lease, sync_deadline).expect("it is allowed");
            self.world.wake(self.source_node);
        }
    }

    /// Starts the target's process; its stream recovers.
    pub fn start_target(&mut self) {
        self.target_lives += 1;
        let config = TargetConfig {
            segment_bytes: self.setup.segment_bytes,
            budget_bytes: self.setup.budget_bytes,
            reserve_bytes: 0,
            ..TargetConfig::new(ROOT)
        };
        let core = Target::new(TARGET_BASE, config).expect("the harness's configuration is allowed");
        self.target = Some(Life::new(self.world.io(self.target_node), core));
        (self.ready, self.sick) = (false, None);
        if !self.infos.is_empty() {
            self.open_stream();
        }
        self.world.wake(self.target_node);
    }

    /// Tells both ends what should be: the generation under which the source may write, and whether it holds its I/O.
    pub fn converge(&mut self) {
        if self.ready {
            self.open_stream();
        }
        let (stream, hold) = (self.stream, self.hold);
        if let Some(life) = self.source.as_mut().filter(|_| self.protected) {
            life.core.fence(&mut life.io, stream, hold);
            self.world.wake(self.source_node);
        }
    }

    /// A source that runs is told its disks' generation; one that is still opening them is left as it is.
    pub fn give_generation(&mut self, generation: u64) {
        let stream = self.stream;
        let generations: Vec<_> = (0..self.setup.disks.len()).map(|disk| (disk_id(disk), generation)).collect();
        if let Some(life) = self.source.as_mut().filter(|_| self.protected) {
            life.core.set_generations(&mut life.io, stream, &generations);
            self.world.wake(self.source_node);
        }
    }

    fn open_stream(&mut self) {
        let config = StreamConfig {
            stream: self.stream,
            name: "group".into(),
            policy_key: self.policy.clone(),
            retention: self.setup.retention,
            budget_bytes: 0,
            disks: self.infos.iter().map(|info| (info.clone(), self.generation)).collect(),
        };
        let Some(life) = &mut self.target else { return };
        if let Err(error) = life.core.open_stream(&mut life.io, config) {
            assert!(self.lenient, "the target refuses the stream: {error}");
            self.sick = Some(error.to_string());
        }
    }

    /// The source's process dies, or its machine loses power.
    pub fn stop_source(&mut self, power: bool) {
        self.source = None;
        self.link = None;
        self.protected = false;
        self.still[0] = false;
        self.answers.clear();
        for way in std::mem::take(&mut self.ways) {
            self.close_way(way);
        }
        if power { self.world.power_loss(self.source_node) } else { self.world.crash(self.source_node) }
    }

    /// The target's process dies, or its machine loses power.
    pub fn stop_target(&mut self, power: bool) {
        self.target = None;
        self.link = None;
        self.ready = false;
        self.still[1] = false;
        self.view_answers.clear();
        for way in std::mem::take(&mut self.view_ways).into_values() {
            self.close_way(way);
        }
        if power { self.world.power_loss(self.target_node) } else { self.world.crash(self.target_node) }
    }

    /// The source has introduced itself once.
    pub fn known(&self) -> bool {
        !self.infos.is_empty()
    }

    /// How the source's group is.
    pub fn group(&self) -> Option<GroupStatus> {
        let life = self.source.as_ref()?;
        life.core.status(life.io.now()).into_iter().next()
    }

    /// Highest record that the present source was told is durable, if it is one of its own.
    pub fn acked(&self) -> Option<u64> {
        self.group().and_then(|group| self.acked_of(&group))
    }

    /// As [`Stage::acked`], of what the group says.
    pub fn acked_of(&self, group: &GroupStatus) -> Option<u64> {
        Some(group.acked_seq).filter(|acked| self.first_seq > 0 && *acked >= self.first_seq)
    }

    /// How the target's stream is, once it is recovered.
    pub fn stream(&self) -> Option<StreamStatus> {
        if !self.ready {
            return None;
        }
        self.target.as_ref()?.core.status().into_iter().next()
    }

    /// Lets the world go on to the next thing that happens, but not past `until`; false when that is reached.
    ///
    /// # Errors
    /// What no server may say.
    pub fn step(&mut self, until: Nanos) -> Result<bool, String> {
        self.run_later();
        let next = self.later.keys().next().map_or(until, |(at, _)| until.min(*at));
        if self.world.now() >= until {
            return Ok(false);
        }
        self.clients.run(next)?;
        match self.world.step() {
            Some(node) if node == self.source_node => self.pump_source(),
            Some(node) if node == self.target_node => self.pump_target(),
            Some(node) => {
                debug_assert_eq!(node, self.host_node);
                self.clients.run(next)?;
            }
            None => unreachable!("the hosts' node always has a time to wake at"),
        }
        self.hear()?;
        Ok(true)
    }

    fn pump_source(&mut self) {
        let Some(life) = &mut self.source else { return };
        life.run(&mut self.done);
        for disk in (0..self.ways.len()).filter(|disk| matches!(self.ways[*disk], Way::Direct)) {
            let Some(key) = life.core.disk_key(self.stream, disk_id(disk)) else { continue };
            if let Some(mut source_disk) = life.core.disk(key) {
                self.answers.extend(source_disk.answers().drain(..).map(|answer| (disk, answer.into())));
            }
        }
        self.go_on_stopping(false);
        let Some(life) = &mut self.source else { return };
        let mut events = Vec::new();
        while let Some(event) = life.core.next_event() {
            events.push(event);
        }
        for event in events {
            self.source_event(event);
        }
    }

    fn source_event(&mut self, event: SourceEvent) {
        if let SourceEvent::Connect { hello, .. } = event {
            self.first_seq = hello.first_seq;
            let delay = self.rng.between(100_000, 3_000_000);
            let at = self.world.now() + delay;
            let life = self.source_lives;
            if self.severed || self.target.is_none() {
                self.at(at, Later::Unreachable(life));
            } else {
                self.at(at, Later::Hello(hello, life));
            }
        } else {
            self.syncs += u64::from(matches!(event, SourceEvent::SyncBegun { .. }));
            self.syncs_begun += u64::from(matches!(event, SourceEvent::SyncBegun { .. }));
            if let SourceEvent::Held { reason, .. } = &event {
                self.held = reason.is_some();
            }
            if let SourceEvent::Stopped { clean, .. } = event {
                self.stopped = Some(clean);
            }
            self.log.push_back(format!("source: {event:?}"));
        }
    }

    fn pump_target(&mut self) {
        let Some(life) = &mut self.target else { return };
        life.run(&mut self.done);
        for (key, _) in self.view_ways.iter().filter(|(_, way)| matches!(way, Way::Direct)) {
            if let Some(mut disk) = life.core.disk(*key) {
                self.view_answers.extend(disk.answers().drain(..).map(|answer| (*key, answer.into())));
            }
        }
        while let Some(event) = life.core.next_event() {
            match &event {
                TargetEvent::Ready { .. } => self.ready = true,
                TargetEvent::Failed { why, .. } => {
                    assert!(self.lenient, "the target's stream failed: {why}");
                    self.sick = Some(why.clone());
                }
                TargetEvent::Damaged { damage, .. } => {
                    assert!(self.lenient, "the target found damage where there is none: {damage:?}");
                    if !damage.known {
                        let floor = life.core.status().first().map_or(0, |stream| stream.floor);
                        self.losses.push((damage.clone(), floor));
                    }
                }
                _ => {}
            }
            self.log.push_back(format!("target: {event:?}"));
        }
    }

    /// The source reports to its coordinator once in a while, which confirms what it knows.
    fn ask_coordinator(&mut self) {
        let now = self.world.now();
        if self.setup.lease == 0 || !self.setup.confirmed || now < self.ask_at {
            return;
        }
        self.ask_at = now + ASKS;
        let Some(life) = self.source.as_ref().filter(|_| self.protected && !self.still[0]) else { return };
        let asked = life.io.since_boot();
        if self.cut_off || self.deposed {
            return;
        }
        let (at, life) = (now + self.rng.between(1_000_000, 400_000_000), self.source_lives);
        self.at(at, Later::Confirm(asked, life));
    }

    /// The target says that no host was answered a write that it does not hold.
    pub fn zero_loss(&self) -> bool {
        let Some(life) = self.target.as_ref().filter(|_| self.ready) else { return false };
        life.core.zero_loss(self.stream, life.io.since_boot())
    }

    fn run_later(&mut self) {
        self.ask_coordinator();
        while let Some(entry) = self.later.first_entry() {
            if entry.key().0 > self.world.now() {
                return;
            }
            if self.still[0] || self.still[1] {
                // Nobody shakes hands with who stands still.
                let what = entry.remove();
                self.at(self.world.now() + HALT, what);
                return;
            }
            match entry.remove() {
                Later::Protect(life) if life == self.source_lives => self.protect(),
                Later::Connect(life) if life == self.source_lives => self.connect_hosts(),
                Later::StopCore(life) if life == self.source_lives => self.go_on_stopping(true),
                Later::Confirm(asked, life) if life == self.source_lives && !self.cut_off => {
                    if let Some(life) = self.source.as_mut().filter(|_| self.protected) {
                        life.core.confirm(&mut life.io, self.stream, asked);
                        self.world.wake(self.source_node);
                    }
                }
                Later::Unreachable(life) if life == self.source_lives => {
                    self.refuse(LinkFailure::Unreachable("nobody answers".into()));
                }
                Later::Hello(hello, life) if life == self.source_lives => self.say_hello(hello),
                Later::Welcome(hello, welcome, life) if life == self.source_lives => self.welcome(&hello, *welcome),
                _ => {}
            }
        }
    }

    fn refuse(&mut self, failure: LinkFailure) {
        if let Some(life) = &mut self.source {
            life.core.link_failed(&mut life.io, self.stream, failure);
            self.world.wake(self.source_node);
        }
    }

    fn say_hello(&mut self, hello: Box<Hello>) {
        if self.infos.is_empty() {
            // What a coordinator does when the group is made: the target learns of its disks.
            self.infos = hello.disks.iter().map(|claim| claim.disk.clone()).collect();
            self.open_stream();
            self.world.wake(self.target_node);
        }
        let Some(life) = &mut self.target else {
            return self.refuse(LinkFailure::Unreachable("it has just died".into()));
        };
        let welcome = life.core.hello(&mut life.io, &hello);
        self.log.push_back(format!("target: {welcome:?}"));
        self.world.wake(self.target_node);
        let at = self.world.now() + self.rng.between(50_000, 1_000_000);
        let life = self.source_lives;
        self.at(at, Later::Welcome(hello, Box::new(welcome), life));
    }

    fn welcome(&mut self, hello: &Hello, welcome: Welcome) {
        match welcome {
            Welcome::Refused { reason, message } => self.refuse(LinkFailure::Refused(reason, message)),
            Welcome::Accepted { timeline, position, whole_resync } => {
                let (Some(source), Some(target)) = (&mut self.source, &mut self.target) else {
                    return self.refuse(LinkFailure::Unreachable("the handshake broke".into()));
                };
                if self.severed {
                    return self.refuse(LinkFailure::Unreachable("the handshake broke".into()));
                }
                let (near, far) = self.world.connect(self.source_node, self.target_node);
                let mut key = [0; 32];
                self.rng.fill(&mut key);
                target.core.attach(&mut target.io, hello, far, ControlKey::new(&key));
                let control = ControlKey::new(&key);
                source.core.linked(&mut source.io, self.stream, near, control, timeline, position, whole_resync);
                self.link = Some(near);
                self.links += 1;
                self.world.wake(self.source_node);
                self.world.wake(self.target_node);
            }
        }
    }

    /// Resets the connection, if one was made since the last time.
    pub fn cut_link(&mut self) -> bool {
        let link = self.link.take();
        link.inspect(|sock| self.world.cut(*sock)).is_some()
    }

    /// The source says that every disk is complete, and the target holds all that it has captured.
    pub fn settled(&self) -> bool {
        let (Some(group), Some(stream)) = (self.group(), self.stream()) else { return false };
        group.state == GroupState::Protected
            && stream.state == StreamState::Ready
            // A target that was started again may still have to tell the source what it lacks.
            && stream.connected
            && group.acked_seq == group.captured_seq
            && group.disks.iter().all(|disk| disk.dirty_extents == 0 && disk.sync.is_none())
            && stream.durable_seq == group.captured_seq
    }
}
