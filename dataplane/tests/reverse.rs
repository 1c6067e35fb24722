//! The way back, from end to end in the simulated world: a protected disk, its source dead, its replica written to; that
//! captured and shipped to the old disk, through crashes; merged into it.

use std::collections::{BTreeMap, VecDeque};

use afterimage_dataplane::host::{Answer, DiskKey, Disks, HEADROOM, HostDisk, Request};
use afterimage_dataplane::io::sim::{Fault, NodeId, Rng, SimIo, World, WorldConfig};
use afterimage_dataplane::io::tapped::Tapped;
use afterimage_dataplane::io::{Done, Errno, Io, Part, Pool};
use afterimage_dataplane::reverse::{ReversibleTarget, path_of};
use afterimage_dataplane::seal::{ControlKey, PolicyKey};
use afterimage_dataplane::sealers::Sealer;
use afterimage_dataplane::source::{
    DiskConfig, GroupConfig, GroupState, LinkFailure, Source, SourceEvent, SourceLimits, pool_classes,
};
use afterimage_dataplane::target::{Choice, StreamConfig, Target, TargetConfig, TargetEvent, ViewConfig};
use afterimage_wire::handshake::{Hello, Welcome};
use afterimage_wire::ids::{DiskId, PolicyKeyId, StreamId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::timeline::TimelineKind;

const SIZE: u64 = 4 << 20;
const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
const THERE: StreamId = StreamId([1; 16]);
const BACK: StreamId = StreamId([2; 16]);
const DISK: &str = "/disks/data.img";
const VIEW: &str = "shop.failover";

fn disk_id() -> DiskId {
    DiskId([7; 16])
}

fn policy() -> PolicyKey {
    PolicyKey::new(PolicyKeyId([4; 16]), [5; 32])
}

fn info() -> DiskInfo {
    DiskInfo {
        slot: 0,
        id: disk_id(),
        size: SIZE,
        block: 512,
        physical_block: 512,
        serial: String::new(),
        name: "data".into(),
    }
}

/// A process with both roles.
struct Site {
    node: NodeId,
    io: Tapped<SimIo>,
    target: ReversibleTarget<SimIo>,
    source: Source<Tapped<SimIo>>,
    ready: Vec<StreamId>,
    alive: bool,
}

impl Site {
    fn new(world: &World, node: NodeId) -> Self {
        let limits = SourceLimits { queue_bytes: 4 << 20, hot_extents: 0, ..SourceLimits::default() };
        let io = Tapped::new(world.io_with_pool(node, Pool::new(&pool_classes(16 << 20))));
        let config = TargetConfig {
            segment_bytes: 8 << 20,
            budget_bytes: 256 << 20,
            reserve_bytes: 0,
            ..TargetConfig::new("/journal")
        };
        let target = Target::new(3, config).expect("good settings");
        let target = ReversibleTarget::new(target, Source::new(2, limits.clone(), Sealer::Inline));
        let source = Source::new(1, limits, Sealer::Inline);
        Self { node, io, target, source, ready: Vec::new(), alive: true }
    }

    /// The source that a stream is of.
    fn source_of(&mut self, stream: StreamId) -> (&mut Source<Tapped<SimIo>>, &mut Tapped<SimIo>) {
        let source = if stream == BACK { &mut self.target.source } else { &mut self.source };
        (source, &mut self.io)
    }
}

struct Scene {
    world: World,
    /// Where the machine was, and where its replica is.
    home: Site,
    away: Site,
    hellos: VecDeque<(StreamId, Box<Hello>)>,
    answers: BTreeMap<(DiskKey, u64), Answer>,
    next_cookie: u64,
    severed: bool,
    /// What the replica's machine has been answered.
    model: Vec<u8>,
    rng: Rng,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let world = World::new(seed, WorldConfig { land_after_crash: 0.0, ..WorldConfig::default() });
        let (home, away) = (world.node("home"), world.node("away"));
        let mut image = vec![0; SIZE as usize];
        Rng::new(seed).fill(&mut image[..1 << 20]);
        world.put_file(home, DISK, &image);
        for node in [home, away] {
            world.put_file(node, "/logs/none", &[]);
        }
        let (home, away) = (Site::new(&world, home), Site::new(&world, away));
        Self {
            rng: world.rng(),
            world,
            home,
            away,
            hellos: VecDeque::new(),
            answers: BTreeMap::new(),
            next_cookie: 0,
            severed: false,
            model: image,
        }
    }

    fn stream(stream: StreamId, generation: u64) -> StreamConfig {
        StreamConfig {
            stream,
            name: "shop".into(),
            policy_key: policy(),
            retention: 3_600 * SECOND,
            budget_bytes: 0,
            disks: vec![(info(), generation)],
        }
    }

    fn group(stream: StreamId, path: String, generation: u64) -> GroupConfig {
        let disk = DiskConfig {
            id: disk_id(),
            name: "data".into(),
            path,
            log_path: format!("/logs/{stream}.intent"),
            block: 512,
            generation,
            trust_reboot: true,
            ..DiskConfig::default()
        };
        GroupConfig {
            stream,
            name: "shop".into(),
            disks: vec![disk],
            policy_key: policy(),
            cut_interval: 100 * MS,
            compress: true,
            lease: 0,
            sync_deadline: 0,
            left: Vec::new(),
        }
    }

    fn pump(&mut self, of_home: bool) {
        let site = if of_home { &mut self.home } else { &mut self.away };
        let mut done: Vec<Done> = Vec::new();
        for round in 0.. {
            assert!(round < 10_000, "it spins");
            let deadline = [site.target.deadline(), site.source.deadline()].into_iter().flatten().min();
            site.io.poll(deadline, &mut done);
            let quiet = done.is_empty();
            for done in done.drain(..) {
                if site.source.owns(done.token) {
                    site.source.done(&mut site.io, done);
                } else {
                    assert!(site.target.owns(done.token));
                    site.target.done(&mut site.io, done);
                }
            }
            site.source.turn(&mut site.io);
            site.target.turn(&mut site.io);
            let keys: Vec<DiskKey> = site.target.exports().iter().map(|export| export.key).collect();
            for key in keys {
                let mut disk = site.target.disk(key).expect("on offer");
                for answer in disk.answers().drain(..) {
                    self.answers.insert((key, answer.cookie), answer);
                }
            }
            while let Some(event) = site.target.next_event() {
                if let TargetEvent::Ready { stream } = event {
                    site.ready.push(stream);
                }
            }
            let events = std::iter::from_fn(|| site.source.next_event().or_else(|| site.target.source.next_event()));
            for event in events {
                if let SourceEvent::Connect { stream, hello } = event {
                    self.hellos.push_back((stream, hello));
                }
            }
            if quiet && !site.io.taps.is_busy() {
                let deadline = [site.target.deadline(), site.source.deadline()].into_iter().flatten().min();
                if deadline.is_none_or(|at| at > site.io.now()) {
                    return;
                }
            }
        }
    }

    /// Handshakes that were asked for.
    fn shake(&mut self) {
        while let Some((stream, hello)) = self.hellos.pop_front() {
            let (from, to) =
                if stream == BACK { (&mut self.away, &mut self.home) } else { (&mut self.home, &mut self.away) };
            if !from.alive {
                continue;
            }
            let (source, io) = from.source_of(stream);
            if self.severed || !to.alive {
                source.link_failed(io, stream, LinkFailure::Unreachable("no route".into()));
                continue;
            }
            match to.target.hello(&mut to.io, &hello) {
                Welcome::Accepted { position, timeline, whole_resync, .. } => {
                    let (near, far) = self.world.connect(from.node, to.node);
                    to.target.attach(&mut to.io, &hello, far, ControlKey::new(&[9; 32]));
                    let (source, io) = from.source_of(stream);
                    source.linked(io, stream, near, ControlKey::new(&[9; 32]), timeline, position, whole_resync);
                }
                Welcome::Refused { reason, message } => {
                    source.link_failed(io, stream, LinkFailure::Refused(reason, message));
                }
            }
            self.world.wake(self.home.node);
            self.world.wake(self.away.node);
        }
    }

    fn step(&mut self) {
        self.shake();
        match self.world.step().expect("something happens") {
            node if node == self.home.node && self.home.alive => self.pump(true),
            node if node == self.away.node && self.away.alive => self.pump(false),
            _ => {}
        }
    }

    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        self.world.wake(self.home.node);
        self.world.wake(self.away.node);
        let end = self.world.now() + 120 * SECOND;
        while !condition(self) {
            assert!(self.world.now() < end, "never {what}: {:?}", self.away.target.source.status(self.away.io.now()));
            self.step();
        }
    }

    fn run_for(&mut self, nanos: u64) {
        let end = self.world.now() + nanos;
        self.until("that late", |scene| scene.world.now() >= end);
    }

    fn is_protected(&mut self, stream: StreamId) -> bool {
        let site = if stream == BACK { &mut self.away } else { &mut self.home };
        let (source, io) = site.source_of(stream);
        let now = io.now();
        source.status(now).iter().any(|group| group.stream == stream && group.state == GroupState::Protected)
    }

    fn open_at(&mut self, home: bool, stream: StreamId, generation: u64) {
        let site = if home { &mut self.home } else { &mut self.away };
        site.target.open_stream(&mut site.io, Self::stream(stream, generation)).expect("opens");
        self.until("ready", |scene| {
            let site = if home { &scene.home } else { &scene.away };
            site.ready.contains(&stream)
        });
    }

    /// The disk is protected, its source dies, and the replica runs from a view. Gives the view's key.
    fn fail_over(&mut self) -> DiskKey {
        self.open_at(false, THERE, 1);
        let group = Self::group(THERE, DISK.into(), 1);
        self.home.source.protect(&mut self.home.io, group).expect("protects");
        self.until("protected", |scene| scene.is_protected(THERE));
        self.world.crash(self.home.node);
        self.home.alive = false;
        let away = &mut self.away;
        away.target.raise_generation(&mut away.io, THERE, &[], "failover").expect("raises");
        let key = self.open_view();
        // Written before anybody thinks of going back.
        for _ in 0..20 {
            self.scribble(key);
        }
        self.home = Site::new(&self.world, self.home.node);
        key
    }

    fn open_view(&mut self) -> DiskKey {
        let away = &mut self.away;
        let seq = away.target.resolve(&mut away.io, THERE, Choice::Latest).expect("there is a point").seq;
        let known = away.target.status()[0].views.first().map(|view| view.seq);
        let config = ViewConfig {
            name: VIEW.into(),
            stream: THERE,
            seq: known.unwrap_or(seq),
            disks: None,
            writable: true,
            kind: TimelineKind::Failover,
            reason: "test".into(),
        };
        away.target.open_view(&mut away.io, config).expect("opens")[0].key
    }

    fn capture(&mut self, generation: u64) {
        let group = Self::group(BACK, path_of(VIEW, "data"), generation);
        self.away.target.capture(&mut self.away.io, group).expect("captures");
    }

    /// The old site becomes a target whose replica is the old disk.
    fn reverse(&mut self) {
        self.home.target.base(BACK, [(disk_id(), DISK.to_owned())]);
        self.open_at(true, BACK, 1);
        self.capture(1);
    }

    fn ask(&mut self, key: DiskKey, request: Request) -> u64 {
        self.next_cookie += 1;
        let mut disk = self.away.target.disk(key).expect("on offer");
        disk.request(&mut self.away.io, self.next_cookie, request);
        drop(disk);
        self.world.wake(self.away.node);
        self.next_cookie
    }

    fn answer(&mut self, key: DiskKey, cookie: u64) -> Result<Option<Part>, Errno> {
        self.until("answered", |scene| scene.answers.contains_key(&(key, cookie)));
        self.answers.remove(&(key, cookie)).expect("just seen").result
    }

    fn write_request(&mut self, offset: u64, bytes: &[u8]) -> Request {
        let at = HEADROOM + (offset % 4096) as usize;
        let mut buf = self.away.io.pool().take(at + bytes.len() + 4096).expect("a buffer");
        buf[at..at + bytes.len()].copy_from_slice(bytes);
        Request::Write { offset, data: Part { buf, at, len: bytes.len() }, fua: false }
    }

    /// Asks for a change of any kind, and notes what the disk holds once it is done.
    fn change(&mut self, key: DiskKey) -> u64 {
        let offset = self.rng.below(SIZE / 512) * 512;
        let len = (1 + self.rng.below(64)) * 512;
        let len = len.min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        let request = match self.rng.below(5) {
            0 => {
                self.model[range].fill(0);
                Request::Zero { offset, len, unmap: self.rng.below(2) == 0, fast_only: false, fua: false }
            }
            1 => {
                self.model[range].fill(0);
                Request::Discard { offset, len, fua: true }
            }
            _ => {
                let mut bytes = vec![0; len as usize];
                self.rng.fill(&mut bytes);
                self.model[range].copy_from_slice(&bytes);
                self.write_request(offset, &bytes)
            }
        };
        self.ask(key, request)
    }

    fn scribble(&mut self, key: DiskKey) {
        let cookie = self.change(key);
        self.answer(key, cookie).expect("changed");
    }

    fn read(&mut self, key: DiskKey) -> Vec<u8> {
        let mut all = Vec::new();
        for offset in (0..SIZE).step_by(256 << 10) {
            let cookie = self.ask(key, Request::Read { offset, len: 256 << 10 });
            let part = self.answer(key, cookie).expect("reads").expect("has data");
            all.extend_from_slice(&part.buf[part.at..part.at + part.len]);
        }
        all
    }

    fn same(&self, got: &[u8], what: &str) {
        let at = got.iter().zip(&self.model).position(|(a, b)| a != b);
        assert_eq!((got.len(), at), (self.model.len(), None), "{what}");
    }

    fn home_disk(&self) -> Vec<u8> {
        self.world.file(self.home.node, DISK).expect("it is there")
    }

    /// Nothing more is written, and all of it is at the old site.
    fn settle(&mut self) -> u64 {
        self.until("all is there", |scene| {
            let now = scene.away.io.now();
            let status = scene.away.target.source.status(now);
            status.iter().any(|group| {
                group.state == GroupState::Protected && group.captured_seq == group.acked_seq && group.acked_seq > 0
            })
        });
        self.run_for(300 * MS);
        let home = &mut self.home;
        home.target.resolve(&mut home.io, BACK, Choice::Latest).expect("a complete point").seq
    }

    fn merge(&mut self, seq: u64) {
        let home = &mut self.home;
        home.target.raise_generation(&mut home.io, BACK, &[], "switch").expect("raises");
        self.until("merged", |scene| match scene.home.target.merge(BACK, seq) {
            Ok(status) => status.complete,
            Err(error) => panic!("{error}"),
        });
    }
}

#[test]
fn what_a_replica_wrote_comes_back() {
    let mut scene = Scene::new(1);
    let key = scene.fail_over();
    let old = scene.home_disk();
    scene.reverse();
    for _ in 0..60 {
        scene.scribble(key);
    }
    scene.until("protected", |scene| scene.is_protected(BACK));
    for _ in 0..60 {
        scene.scribble(key);
    }
    let got = scene.read(key);
    scene.same(&got, "the captured view");
    let seq = scene.settle();
    assert_eq!(scene.home_disk(), old, "the losing branch stays until it is merged");
    let sent = scene.away.target.source.status(0)[0].wire_bytes;
    assert!(sent < SIZE * 3 / 4, "a part of the disk that is equal at both ends has been sent: {sent}");
    scene.merge(seq);
    scene.same(&scene.home_disk(), "the old disk after the merge");
}

#[test]
fn hosts_notice_neither_the_capture_nor_its_end() {
    for seed in 10..16 {
        let mut scene = Scene::new(seed);
        let key = scene.fail_over();
        scene.home.target.base(BACK, [(disk_id(), DISK.to_owned())]);
        scene.open_at(true, BACK, 1);
        // Under way on both sides of each border, none overlapping.
        let mut asked = Vec::new();
        let block = |scene: &mut Scene, number: u64| {
            let mut bytes = vec![0; 4096];
            scene.rng.fill(&mut bytes);
            let offset = number * 4096;
            scene.model[offset as usize..offset as usize + 4096].copy_from_slice(&bytes);
            let request = scene.write_request(offset, &bytes);
            scene.ask(key, request)
        };
        for number in 0..300 {
            asked.push(block(&mut scene, number));
            match number {
                100 => scene.capture(1),
                200 => scene.away.target.release(&mut scene.away.io, BACK),
                101..200 => scene.step(),
                _ => {}
            }
        }
        for cookie in asked {
            scene.answer(key, cookie).expect("written");
        }
        scene.until("given back", |scene| !scene.away.target.captures(BACK));
        for _ in 0..20 {
            scene.scribble(key);
        }
        let got = scene.read(key);
        scene.same(&got, "the view");
    }
}

#[test]
fn what_was_written_before_the_capture_is_not_missed() {
    for seed in 20..30 {
        let mut scene = Scene::new(seed);
        let key = scene.fail_over();
        scene.home.target.base(BACK, [(disk_id(), DISK.to_owned())]);
        scene.open_at(true, BACK, 1);
        let asked: Vec<u64> = (0..40).map(|_| scene.change(key)).collect();
        // They may overlap: which of them a disk ends up with is known only if it keeps their order, as a view does.
        scene.capture(1);
        for cookie in asked {
            scene.answer(key, cookie).expect("changed");
        }
        let seq = scene.settle();
        let got = scene.read(key);
        scene.model = got;
        scene.merge(seq);
        scene.same(&scene.home_disk(), "the old disk");
    }
}

#[test]
fn a_view_that_is_to_be_captured_is_not_offered_before() {
    let mut scene = Scene::new(3);
    let key = scene.fail_over();
    // Hosts that have it already keep it.
    scene.away.target.keep_back([VIEW.to_owned()]);
    scene.scribble(key);
    scene.reverse();
    scene.away.target.keep_back([VIEW.to_owned()]);
    scene.scribble(key);
    scene.world.crash(scene.away.node);
    scene.away = Site::new(&scene.world, scene.away.node);
    scene.away.target.keep_back([VIEW.to_owned()]);
    scene.open_at(false, THERE, 2);
    let key = scene.open_view();
    scene.away.target.keep_back([VIEW.to_owned()]);
    assert!(scene.away.target.exports().is_empty() && scene.away.target.disk(key).is_none());
    scene.capture(1);
    assert_eq!(scene.away.target.exports().len(), 1);
    scene.scribble(key);
    // Nobody wants it captured any more.
    scene.away.target.release(&mut scene.away.io, BACK);
    scene.away.target.keep_back([]);
    scene.until("given back", |scene| !scene.away.target.captures(BACK));
    scene.scribble(key);
}

#[test]
fn crashes_on_the_way_back_lose_nothing_that_was_answered() {
    for seed in 100..112 {
        let mut scene = Scene::new(seed);
        let mut key = scene.fail_over();
        scene.reverse();
        for round in 0..6 {
            for _ in 0..scene.rng.below(30) {
                scene.scribble(key);
            }
            match scene.rng.below(4) {
                // The proxy where the replica runs: the view is opened again and captured before hosts are let in.
                0 | 1 => {
                    scene.world.crash(scene.away.node);
                    scene.away = Site::new(&scene.world, scene.away.node);
                    scene.answers.clear();
                    scene.away.target.keep_back([VIEW.to_owned()]);
                    scene.open_at(false, THERE, 2);
                    key = scene.open_view();
                    scene.capture(1);
                }
                2 => {
                    scene.world.crash(scene.home.node);
                    scene.home = Site::new(&scene.world, scene.home.node);
                    scene.home.target.base(BACK, [(disk_id(), DISK.to_owned())]);
                    scene.open_at(true, BACK, 1);
                }
                _ => {
                    scene.severed = true;
                    for _ in 0..10 {
                        scene.scribble(key);
                    }
                    scene.severed = false;
                }
            }
            if round == 3 {
                scene.until("protected", |scene| scene.is_protected(BACK));
            }
        }
        let got = scene.read(key);
        scene.same(&got, "the view");
        let seq = scene.settle();
        scene.merge(seq);
        scene.same(&scene.home_disk(), "the old disk");
    }
}

#[test]
fn a_view_that_is_closed_under_its_capture_ends_it() {
    let mut scene = Scene::new(4);
    let key = scene.fail_over();
    scene.reverse();
    scene.scribble(key);
    scene.settle();
    // As a switch does it: hosts are held, and nobody can write to the view any more.
    scene.away.target.source.fence(&mut scene.away.io, BACK, true);
    let request = scene.write_request(0, &[0xA5; 4096]);
    scene.ask(key, request);
    scene.away.target.close_view(&mut scene.away.io, VIEW, true).expect("closes");
    scene.away.target.release(&mut scene.away.io, BACK);
    scene.until("given back", |scene| !scene.away.target.captures(BACK));
    // And back again: the view has what was answered, and not what was held.
    let key = scene.open_view();
    let got = scene.read(key);
    scene.same(&got, "the view");
    scene.scribble(key);
}

#[test]
fn a_merge_is_done_again_after_a_crash_in_its_middle() {
    for seed in 200..230 {
        let mut scene = Scene::new(seed);
        let key = scene.fail_over();
        scene.reverse();
        for _ in 0..40 {
            scene.scribble(key);
        }
        let seq = scene.settle();
        let home = &mut scene.home;
        home.target.raise_generation(&mut home.io, BACK, &[], "switch").expect("raises");
        scene.home.target.merge(BACK, seq).expect("begins");
        for _ in 0..scene.rng.below(60) {
            scene.step();
        }
        if scene.rng.below(2) == 0 {
            scene.world.crash(scene.home.node);
        } else {
            scene.world.power_loss(scene.home.node);
        }
        scene.home = Site::new(&scene.world, scene.home.node);
        scene.home.target.base(BACK, [(disk_id(), DISK.to_owned())]);
        scene.open_at(true, BACK, 2);
        scene.merge(seq);
        scene.same(&scene.home_disk(), "the old disk");
    }
}

#[test]
fn a_merge_that_fails_says_so_and_can_be_asked_for_again() {
    let mut scene = Scene::new(5);
    let key = scene.fail_over();
    scene.reverse();
    for _ in 0..20 {
        scene.scribble(key);
    }
    let seq = scene.settle();
    let error = scene.home.target.merge(BACK, seq).unwrap_err().to_string();
    assert!(error.contains("a source is connected"), "{error}");
    scene.world.fail(scene.home.node, DISK, Fault::Write, Errno::IO, 1);
    let home = &mut scene.home;
    home.target.raise_generation(&mut home.io, BACK, &[], "switch").expect("raises");
    let mut said = None;
    scene.until("failed", |scene| match scene.home.target.merge(BACK, seq) {
        Ok(status) => {
            assert!(!status.complete);
            false
        }
        Err(error) => {
            let error = error.to_string();
            let ended = !error.contains("has not ended yet");
            said = Some(error);
            ended
        }
    });
    assert!(said.is_some_and(|said| said.contains("of the disk in slot 0")));
    scene.until("merged", |scene| scene.home.target.merge(BACK, seq).is_ok_and(|status| status.complete));
    scene.same(&scene.home_disk(), "the old disk");
}
