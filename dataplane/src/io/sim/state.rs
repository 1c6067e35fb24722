//! The world's queue of events, its nodes and the lives of their processes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::content::Content;
use super::disk::{DiskOp, Flight};
use super::folders::Errand;
use super::names::{InodeId, Names, tidy};
use super::net::Conn;
use super::ublk::Device;
use super::{Errors, Fault, NodeId, Rng, WorldConfig};
use crate::io::{Done, Errno, File, Nanos, OpenHow, Token};

/// Index of a life in [`State::lives`].
pub(super) type LifeId = usize;

/// When, and in which order within the same nanosecond.
pub(super) type EventKey = (Nanos, u64);

pub(super) enum Event {
    /// A disk operation has its effect, or the next part of it.
    Land(u64),
    /// A disk operation completes.
    Finish(u64),
    /// The next step of making a file, or of making a folder durable.
    Errand(u64),
    /// A completion that is settled already.
    Complete(LifeId, Done),
    /// A poll's time is up.
    Wake(LifeId),
    /// Bytes arrive at this end of a connection.
    Arrive(u32),
}

/// A file that some process has (or had, while its last operations land) open.
pub(super) struct OpenFile {
    pub(super) inode: InodeId,
    pub(super) path: String,
    pub(super) write: bool,
    pub(super) in_flight: u32,
    pub(super) closing: bool,
}

pub(super) struct Inode {
    pub(super) content: Content,
    locked: Option<(LifeId, u32)>,
}

struct Injected {
    path: String,
    fault: Fault,
    error: Errno,
    times: u32,
}

pub(super) struct Node {
    name: String,
    pub(super) names: Names,
    pub(super) inodes: BTreeMap<InodeId, Inode>,
    pub(super) space: u64,
    boots: u64,
    /// When its machine was started last.
    booted_at: Nanos,
    pub(super) wall_offset: i64,
    pub(super) wall_synced: bool,
    pub(super) life: Option<LifeId>,
    injected: Vec<Injected>,
    pub(super) errors: Errors,
    pub(super) stalled_until: Nanos,
    /// The next write to each of these files takes that much longer.
    pub(super) hanging: Vec<(String, Nanos)>,
    /// When the last write that did so ends.
    pub(super) hangs_until: Nanos,
    /// Since when its process stands still, and whether its monotonic clock does.
    suspended: Option<(Nanos, bool)>,
    /// How long the monotonic clock has stood still.
    slept: Nanos,
}

/// What is on a disk.
#[derive(Clone)]
pub(super) struct Disk {
    names: Names,
    contents: BTreeMap<InodeId, Content>,
}

pub(super) struct Life {
    pub(super) node: usize,
    pub(super) alive: bool,
    pub(super) files: BTreeMap<u32, OpenFile>,
    next_file: u32,
    pub(super) done: Vec<Done>,
    /// Stands in [`State::ready`].
    queued: bool,
    wake: Option<EventKey>,
}

pub(super) struct State {
    pub(super) config: WorldConfig,
    pub(super) rng: Rng,
    pub(super) now: Nanos,
    order: u64,
    pub(super) events: BTreeMap<EventKey, Event>,
    pub(super) nodes: Vec<Node>,
    pub(super) lives: Vec<Life>,
    ready: VecDeque<LifeId>,
    pub(super) flights: BTreeMap<u64, Flight>,
    pub(super) errands: BTreeMap<u64, Errand>,
    next_id: u64,
    pub(super) conns: Vec<Conn>,
    pub(super) ublk: Vec<Device>,
    pub(super) partitions: BTreeSet<(usize, usize)>,
    seed: u64,
    /// Copies put back.
    restores: u64,
}

impl State {
    pub(super) fn new(seed: u64, config: WorldConfig) -> Self {
        assert!(matches!(config.block, 512 | 4096), "blocks of {} bytes are not simulated", config.block);
        Self {
            config,
            rng: Rng::new(seed),
            now: 1_000_000_000,
            order: 0,
            events: BTreeMap::new(),
            nodes: Vec::new(),
            lives: Vec::new(),
            ready: VecDeque::new(),
            flights: BTreeMap::new(),
            errands: BTreeMap::new(),
            next_id: 0,
            conns: Vec::new(),
            ublk: Vec::new(),
            partitions: BTreeSet::new(),
            seed,
            restores: 0,
        }
    }

    pub(super) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn at(&mut self, at: Nanos, event: Event) -> EventKey {
        self.order += 1;
        let key = (at.max(self.now), self.order);
        self.events.insert(key, event);
        key
    }

    pub(super) fn between(&mut self, range: (Nanos, Nanos)) -> Nanos {
        self.rng.between(range.0, range.1)
    }

    // ---- nodes and lives

    pub(super) fn add_node(&mut self, name: &str) -> NodeId {
        self.nodes.push(Node {
            name: name.to_owned(),
            names: Names::default(),
            inodes: BTreeMap::new(),
            space: self.config.space,
            boots: 1,
            booted_at: 0,
            wall_offset: 0,
            wall_synced: true,
            life: None,
            injected: Vec::new(),
            errors: Errors::default(),
            stalled_until: 0,
            hanging: Vec::new(),
            hangs_until: 0,
            suspended: None,
            slept: 0,
        });
        NodeId(self.nodes.len() as u32 - 1)
    }

    pub(super) fn new_life(&mut self, node: NodeId) -> LifeId {
        let node = node.0 as usize;
        self.crash(node);
        let life = self.lives.len();
        self.lives.push(Life {
            node,
            alive: true,
            files: BTreeMap::new(),
            next_file: 0,
            done: Vec::new(),
            queued: false,
            wake: None,
        });
        self.nodes[node].life = Some(life);
        self.reset_vanished(node);
        life
    }

    /// The node's living process.
    pub(super) fn living(&self, node: usize) -> LifeId {
        self.nodes[node].life.unwrap_or_else(|| panic!("no process lives on node {}", self.nodes[node].name))
    }

    pub(super) fn crash(&mut self, node: usize) {
        let Some(life) = self.nodes[node].life.take() else { return };
        self.end_life(life);
        self.requeue_ublk(life);
        self.break_sockets(life);
        self.orphan_flights(life);
    }

    pub(super) fn power_loss(&mut self, node: usize) {
        if let Some(life) = self.nodes[node].life.take() {
            self.end_life(life);
            self.vanish_sockets(life);
        }
        self.lose_ublk(node);
        self.tear_flights(node);
        let keep = self.config.keep_unsynced;
        let State { nodes, rng, lives, .. } = self;
        let machine = &mut nodes[node];
        for inode in machine.inodes.values_mut() {
            inode.content.power_loss(rng, keep);
            inode.locked = None;
        }
        machine.names.power_loss(rng);
        machine.boots += 1;
        machine.booted_at = self.now;
        for life in lives.iter_mut().filter(|life| life.node == node) {
            life.files.clear();
        }
        self.collect(node);
    }

    /// A number for a file of this life.
    pub(super) fn new_file(&mut self, life: LifeId) -> File {
        let life = &mut self.lives[life];
        life.next_file += 1;
        File(life.next_file - 1)
    }

    fn end_life(&mut self, life: LifeId) {
        let node = self.lives[life].node;
        self.suspend(node, false, false);
        // What it was about to do to folders is not done: a thread of its own would have done it.
        self.errands.retain(|_, errand| errand.life != life);
        let ended = &mut self.lives[life];
        ended.alive = false;
        ended.done.clear();
        for file in ended.files.values_mut() {
            file.closing = true;
        }
        if let Some(key) = ended.wake.take() {
            self.events.remove(&key);
        }
        self.close_settled(life);
    }

    pub(super) fn boot_id(&self, node: usize) -> [u8; 16] {
        let mut id = [0; 16];
        let boot = (node as u64) << 32 | self.nodes[node].boots;
        Rng::new(self.seed ^ boot.wrapping_mul(0x9e37_79b9)).fill(&mut id);
        id
    }

    pub(super) fn wall(&self, node: usize) -> u64 {
        (self.config.wall_start + self.now).wrapping_add_signed(self.nodes[node].wall_offset)
    }

    pub(super) fn mono(&self, node: usize) -> Nanos {
        let machine = &self.nodes[node];
        let asleep = machine.suspended.filter(|(_, clock)| *clock).map_or(0, |(since, _)| self.now - since);
        self.now - machine.slept - asleep
    }

    /// Goes on while the machine sleeps, as the world does.
    pub(super) fn since_boot(&self, node: usize) -> Nanos {
        self.now - self.nodes[node].booted_at
    }

    /// When the node's monotonic clock will show this, if it does not sleep meanwhile.
    pub(super) fn world_time(&self, node: usize, mono: Nanos) -> Nanos {
        mono.saturating_add(self.nodes[node].slept)
    }

    pub(super) fn suspend(&mut self, node: usize, on: bool, clock: bool) {
        let now = self.now;
        let machine = &mut self.nodes[node];
        if on {
            machine.suspended.get_or_insert((now, clock));
        } else if let Some((since, clock)) = machine.suspended.take() {
            machine.slept += if clock { now - since } else { 0 };
            if let Some(life) = machine.life {
                // It looks at once at what has come, and sets its times anew.
                self.make_ready(life);
            }
        }
    }

    pub(super) fn snapshot(&self, node: usize) -> Disk {
        let machine = &self.nodes[node];
        let contents = machine.inodes.iter().map(|(inode, file)| (*inode, file.content.settled()));
        Disk { names: machine.names.settled(), contents: contents.collect() }
    }

    pub(super) fn restore(&mut self, node: usize, disk: &Disk) {
        assert!(self.nodes[node].life.is_none(), "the disk of node {} is in use", self.nodes[node].name);
        // What a dead process had under way goes nowhere.
        self.flights.retain(|_, flight| flight.node != node);
        for life in self.lives.iter_mut().filter(|life| life.node == node) {
            life.files.clear();
        }
        // Above all that whoever looks may have seen of the same file.
        self.restores += 1;
        let restored = self.restores << 40;
        let machine = &mut self.nodes[node];
        machine.names = disk.names.clone();
        let contents = disk.contents.iter();
        let back = |content: &Content| Inode { content: content.restored(restored), locked: None };
        machine.inodes = contents.map(|(inode, content)| (*inode, back(content))).collect();
        self.collect(node);
    }

    // ---- time

    pub(super) fn make_ready(&mut self, life: LifeId) {
        let ready = &mut self.lives[life];
        if ready.alive && !ready.queued {
            ready.queued = true;
            self.ready.push_back(life);
        }
    }

    pub(super) fn wake_at(&mut self, life: LifeId, until: Option<Nanos>) {
        // Time passes between two polls, as it would.
        let until = until.map(|until| until.max(self.now + 1));
        if let Some(key) = self.lives[life].wake.take() {
            if Some(key.0) == until {
                self.lives[life].wake = Some(key);
                return;
            }
            self.events.remove(&key);
        }
        if let Some(until) = until {
            let key = self.at(until, Event::Wake(life));
            self.lives[life].wake = Some(key);
        }
    }

    pub(super) fn step(&mut self) -> Option<NodeId> {
        loop {
            while let Some(life) = self.ready.pop_front() {
                self.lives[life].queued = false;
                let node = self.lives[life].node;
                if self.lives[life].alive && self.nodes[node].suspended.is_none() {
                    return Some(NodeId(node as u32));
                }
            }
            let ((at, _), event) = self.events.pop_first()?;
            self.now = at;
            self.handle(event);
        }
    }

    pub(super) fn advance(&mut self, nanos: Nanos) {
        let until = self.now + nanos;
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > until {
                break;
            }
            self.now = entry.key().0;
            let event = entry.remove();
            self.handle(event);
        }
        self.now = until;
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Land(id) => self.land(id),
            Event::Finish(id) => self.finish(id),
            Event::Errand(id) => self.errand(id),
            Event::Complete(life, done) => self.complete(life, done),
            Event::Wake(life) => {
                self.lives[life].wake = None;
                self.make_ready(life);
            }
            Event::Arrive(sock) => self.arrive(sock),
        }
    }

    pub(super) fn complete(&mut self, life: LifeId, done: Done) {
        if self.lives[life].alive {
            self.lives[life].done.push(done);
            self.make_ready(life);
        }
    }

    pub(super) fn complete_at(&mut self, at: Nanos, life: LifeId, token: Token, result: Result<u64, Errno>) {
        self.at(at, Event::Complete(life, Done { token, result, part: None, parts: Vec::new() }));
    }

    // ---- files

    pub(super) fn open(&mut self, life: LifeId, path: &str, how: OpenHow) -> Result<File, Errno> {
        let node = self.lives[life].node;
        let path = tidy(path);
        let machine = &mut self.nodes[node];
        if machine.names.is_dir(&path) {
            return Err(Errno::ISDIR);
        }
        let inode = if how.create_new {
            let inode = self.next_id + 1;
            machine.names.link(&path, inode)?;
            machine.inodes.insert(inode, Inode { content: Content::default(), locked: None });
            self.next_id = inode;
            inode
        } else {
            machine.names.get(&path).ok_or(Errno::NOENT)?
        };
        let number = self.lives[life].next_file;
        let entry = self.nodes[node].inodes.get_mut(&inode).expect("a name leads to a content");
        if how.lock {
            if entry.locked.is_some() {
                return Err(Errno::AGAIN);
            }
            entry.locked = Some((life, number));
        }
        let life = &mut self.lives[life];
        life.next_file += 1;
        life.files.insert(number, OpenFile { inode, path, write: how.write, in_flight: 0, closing: false });
        Ok(File(number))
    }

    /// The open file, for a caller that must have it open.
    pub(super) fn open_file(&mut self, life: LifeId, file: File) -> &mut OpenFile {
        let open = self.lives[life].files.get_mut(&file.0).filter(|open| !open.closing);
        open.unwrap_or_else(|| panic!("{file:?} is used after it was closed, or was never opened"))
    }

    pub(super) fn content(&mut self, node: usize, inode: InodeId) -> &mut Content {
        &mut self.nodes[node].inodes.get_mut(&inode).expect("an open file has a content").content
    }

    pub(super) fn close(&mut self, life: LifeId, file: File) {
        if !self.lives[life].alive || self.close_ublk(life, file) {
            return;
        }
        self.open_file(life, file).closing = true;
        self.close_settled(life);
    }

    /// Ends the files that are closing and have nothing in flight, and their locks.
    pub(super) fn close_settled(&mut self, life: LifeId) {
        let Life { node, files, .. } = &mut self.lives[life];
        let machine = &mut self.nodes[*node];
        let before = files.len();
        files.retain(|number, file| {
            let settled = file.closing && file.in_flight == 0;
            if settled
                && let Some(inode) = machine.inodes.get_mut(&file.inode)
                && inode.locked == Some((life, *number))
            {
                inode.locked = None;
            }
            !settled
        });
        if files.len() != before {
            let node = *node;
            self.collect(node);
        }
    }

    /// Forgets contents that no name and no open file leads to.
    pub(super) fn collect(&mut self, node: usize) {
        let mut reachable = self.nodes[node].names.reachable();
        let lives = self.lives.iter().filter(|life| life.node == node);
        reachable.extend(lives.flat_map(|life| life.files.values().map(|file| file.inode)));
        self.nodes[node].inodes.retain(|inode, _| reachable.contains(inode));
    }

    /// Bytes that the node's disk can still take.
    pub(super) fn free_space(&self, node: usize) -> u64 {
        let machine = &self.nodes[node];
        let used: u64 = machine.inodes.values().map(|inode| inode.content.used()).sum();
        machine.space.saturating_sub(used)
    }

    /// Puts content under a name; durable unless `settled` is false.
    pub(super) fn put(&mut self, node: usize, path: &str, bytes: &[u8], settled: bool) {
        let inode = self.id();
        let mut content = Content::from_bytes(bytes);
        content.mtime_ns = self.wall(node);
        self.nodes[node].inodes.insert(inode, Inode { content, locked: None });
        let names = &mut self.nodes[node].names;
        if settled {
            names.put(path, inode)
        } else {
            names.replace(path, inode)
        }
        self.collect(node);
    }

    // ---- faults

    pub(super) fn inject(&mut self, node: usize, path: &str, fault: Fault, error: Errno, times: u32) {
        self.nodes[node].injected.push(Injected { path: tidy(path), fault, error, times });
    }

    /// The error that was asked for, or that chance brings.
    pub(super) fn fault(&mut self, node: usize, path: &str, fault: Fault) -> Option<Errno> {
        let injected = &mut self.nodes[node].injected;
        if let Some(at) = injected.iter().position(|i| i.fault == fault && i.path == path && i.times > 0) {
            injected[at].times -= 1;
            return Some(injected[at].error);
        }
        let errors = &self.nodes[node].errors;
        let probability = match fault {
            Fault::Read => self.config.read_error + errors.read,
            Fault::Write => self.config.write_error + errors.write,
            Fault::Sync => self.config.sync_error + errors.sync,
            Fault::Misdirect | Fault::Lose => 0.0,
        };
        self.rng.chance(probability).then_some(Errno::IO)
    }

    pub(super) fn check_range(&self, offset: u64, at: usize, len: usize) {
        let block = u64::from(self.config.block);
        assert!(
            len > 0 && [offset, at as u64, len as u64].iter().all(|n| n % block == 0),
            "I/O of {len} bytes at {offset} with its buffer at {at} is not made of blocks of {block}"
        );
    }

    pub(super) fn submit_disk(&mut self, life: LifeId, token: Token, file: File, op: DiskOp) {
        let open = self.open_file(life, file);
        open.in_flight += 1;
        let (inode, path, writable) = (open.inode, open.path.clone(), open.write);
        let mut latency = self.between(self.config.disk_latency);
        let machine = &mut self.nodes[self.lives[life].node];
        let begin = self.now.max(machine.stalled_until);
        if let (DiskOp::Write { .. }, Some(at)) = (&op, machine.hanging.iter().position(|(hangs, _)| *hangs == path)) {
            latency += machine.hanging.swap_remove(at).1;
            machine.hangs_until = machine.hangs_until.max(begin + latency);
        }
        let land = begin + self.rng.below(latency + 1);
        let finish = begin + latency;
        let split = self.rng.chance(0.25);
        let id = self.id();
        let node = self.lives[life].node;
        self.flights.insert(id, Flight { life, node, file, inode, path, token, op, writable, split, landed: None });
        self.at(land, Event::Land(id));
        self.at(finish, Event::Finish(id));
    }
}
