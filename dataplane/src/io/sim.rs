//! The simulated world: nodes with disks and clocks, and sockets between them, in one thread, from one seed.
//!
//! A harness owns a [`World`], gives each node's machines a [`SimIo`], and calls [`World::step`] until it names a node
//! that has something to poll. Time passes only there and in [`World::advance`].
//!
//! `content` the bytes of a file, visible and durable · `names` folders likewise · `disk` operations on files ·
//! `folders` making files and making folders durable, beside the process's thread · `net` connections · `ublk` block devices whose requests come to a process · `state` the queue of events · `life` what a machine sees.
//!
//! A breach of the rules of [`super`] (a range that is no multiple of the block, two receives on a socket, use of what
//! was closed) panics.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Class, Errno, Nanos, Pool, Sock};
use names::tidy;
use state::State;

mod content;
mod disk;
mod folders;
mod life;
mod names;
mod net;
mod rng;
mod state;
mod ublk;

pub use life::SimIo;
pub use rng::Rng;
pub use ublk::{UblkAnswer, UblkId};

/// A node of the world: a machine with a disk of its own.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

/// How the world behaves. Probabilities are per operation, 0 to 1; all faults are off in the default.
#[derive(Clone, Debug)]
pub struct WorldConfig {
    /// Shortest and longest time of a disk operation, nanoseconds.
    pub disk_latency: (Nanos, Nanos),
    /// Shortest and longest time on the network, one way, nanoseconds.
    pub net_latency: (Nanos, Nanos),
    /// The stream is cut at random into pieces of at most this many bytes.
    pub net_piece: usize,
    /// Bytes that a direction of a connection holds before a send waits.
    pub net_window: usize,
    /// Logical block of files, bytes: 512 or 4096.
    pub block: u32,
    /// Files can deallocate ([`super::Op::Zero`] with `unmap`).
    pub discard: bool,
    /// Bytes on each node's disk.
    pub space: u64,
    /// A read fails with `EIO`.
    pub read_error: f64,
    /// A write or zero fails with `EIO`; some of its sectors are written.
    pub write_error: f64,
    /// A sync fails with `EIO`; some of what it should have kept never will be.
    pub sync_error: f64,
    /// A step of [`super::Op::Create`] or [`super::Op::SyncDir`] takes a hundred times as long as a disk operation.
    pub slow_folders: f64,
    /// Each unsynced sector of 512 bytes outlives a power loss.
    pub keep_unsynced: f64,
    /// A write that was in flight when its process died lands (later) nevertheless.
    pub land_after_crash: f64,
    /// How long after the crash, at most, nanoseconds.
    pub late: Nanos,
    /// Wall clock at time 0, nanoseconds since the Unix epoch.
    pub wall_start: u64,
    /// Buffers of each [`SimIo`]'s pool.
    pub classes: Vec<Class>,
}

impl Default for WorldConfig {
    fn default() -> Self {
        Self {
            disk_latency: (20_000, 200_000),
            net_latency: (50_000, 500_000),
            net_piece: 64 * 1024,
            net_window: 1024 * 1024,
            block: 512,
            discard: true,
            space: 1 << 40,
            read_error: 0.0,
            write_error: 0.0,
            sync_error: 0.0,
            slow_folders: 0.0,
            keep_unsynced: 0.5,
            land_after_crash: 0.5,
            late: 4_000_000_000,
            wall_start: 1_790_000_000_000_000_000,
            classes: vec![
                Class { capacity: 16 * 1024, count: 512 },
                Class { capacity: 160 * 1024, count: 64 },
                Class { capacity: 544 * 1024, count: 32 },
                Class { capacity: 4 * 1024 * 1024 + 64 * 1024, count: 8 },
            ],
        }
    }
}

/// Which operations of a file fail when asked to by [`World::fail`], and how.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Reads end with the error.
    Read,
    /// Writes and zeroes do; some of their sectors are written.
    Write,
    /// Syncs do; some of what they should have kept never will be.
    Sync,
    /// Writes end well, and their bytes are somewhere else in the file.
    Misdirect,
    /// Writes end well, and their bytes are nowhere.
    Lose,
}

/// How often operations of one node fail, beside what [`WorldConfig`] says of all: probabilities, 0 to 1.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Errors {
    /// As [`WorldConfig::read_error`].
    pub read: f64,
    /// As [`WorldConfig::write_error`].
    pub write: f64,
    /// As [`WorldConfig::sync_error`].
    pub sync: f64,
}

/// All that is on a node's disk at one moment; see [`World::snapshot`].
#[derive(Clone)]
pub struct Snapshot(state::Disk);

/// The world. Clones are handles to the same one.
#[derive(Clone)]
pub struct World(Rc<RefCell<State>>);

impl World {
    /// A world from a seed: the same seed and the same calls give the same events.
    pub fn new(seed: u64, config: WorldConfig) -> Self {
        Self(Rc::new(RefCell::new(State::new(seed, config))))
    }

    /// A new node, named for messages.
    pub fn node(&self, name: &str) -> NodeId {
        self.0.borrow_mut().add_node(name)
    }

    /// A new life of the node's process; an older one, if it still lives, is crashed first.
    pub fn io(&self, node: NodeId) -> SimIo {
        let pool = Pool::new(&self.0.borrow().config.classes);
        self.io_with_pool(node, pool)
    }

    /// As [`World::io`], with a pool of the caller.
    pub fn io_with_pool(&self, node: NodeId, pool: Pool) -> SimIo {
        let life = self.0.borrow_mut().new_life(node);
        SimIo { world: self.clone(), node, life, pool }
    }

    /// The process dies: its completions never arrive, its sockets break, what it had in flight lands late or never,
    /// its locks end when that is settled. The disk keeps what was written.
    pub fn crash(&self, node: NodeId) {
        self.0.borrow_mut().crash(node.0 as usize);
    }

    /// The machine loses power: as a crash, and unsynced writes are lost in part, torn at 512 bytes. Peers hear nothing
    /// until the node lives again. The boot id changes.
    pub fn power_loss(&self, node: NodeId) {
        self.0.borrow_mut().power_loss(node.0 as usize);
    }

    /// A connection between the living processes of two nodes (or of one).
    ///
    /// # Panics
    /// If no process lives on one of them.
    pub fn connect(&self, a: NodeId, b: NodeId) -> (Sock, Sock) {
        self.0.borrow_mut().connect(a.0 as usize, b.0 as usize)
    }

    /// Resets a connection, named by either end, after any prefix of the bytes under way.
    pub fn cut(&self, sock: Sock) {
        self.0.borrow_mut().cut(sock);
    }

    /// Stops (or lets pass again) all bytes between two nodes; nobody is told.
    pub fn partition(&self, a: NodeId, b: NodeId, on: bool) {
        self.0.borrow_mut().partition(a.0 as usize, b.0 as usize, on);
    }

    /// As [`World::partition`], for the bytes that one node sends to the other only.
    pub fn partition_one_way(&self, from: NodeId, to: NodeId, on: bool) {
        self.0.borrow_mut().partition_one_way(from.0 as usize, to.0 as usize, on);
    }

    /// The node's process stops where it stands (as under `SIGSTOP`), or goes on; what completes meanwhile waits. With
    /// `clock` its machine sleeps: the monotonic clock stands still, too, while the wall clock goes on.
    pub fn suspend(&self, node: NodeId, on: bool, clock: bool) {
        self.0.borrow_mut().suspend(node.0 as usize, on, clock);
    }

    /// The node's disk does nothing for this time: what is submitted meanwhile ends afterwards.
    pub fn stall(&self, node: NodeId, nanos: Nanos) {
        let mut state = self.0.borrow_mut();
        let until = state.now + nanos;
        let stalled = &mut state.nodes[node.0 as usize].stalled_until;
        *stalled = until.max(*stalled);
    }

    /// The next write to a file takes that much longer, and no other operation does.
    pub fn hang(&self, node: NodeId, path: &str, nanos: Nanos) {
        self.0.borrow_mut().nodes[node.0 as usize].hanging.push((tidy(path), nanos));
    }

    /// When the last write of this node that was made to hang ends, or has ended; 0 if none was begun yet.
    pub fn hangs_until(&self, node: NodeId) -> Nanos {
        self.0.borrow().nodes[node.0 as usize].hangs_until
    }

    /// How often operations of this node fail from now on.
    pub fn errors(&self, node: NodeId, errors: Errors) {
        self.0.borrow_mut().nodes[node.0 as usize].errors = errors;
    }

    /// All that the node's disk would give a reader now, as a copy that somebody takes of it.
    pub fn snapshot(&self, node: NodeId) -> Snapshot {
        Snapshot(self.0.borrow().snapshot(node.0 as usize))
    }

    /// Puts a copy back in the place of all that is on the node's disk, durably.
    ///
    /// # Panics
    /// If a process lives on the node.
    pub fn restore(&self, node: NodeId, snapshot: &Snapshot) {
        self.0.borrow_mut().restore(node.0 as usize, &snapshot.0);
    }

    /// The monotonic clock of one node: [`World::now`] less the time that its machine slept.
    pub fn mono(&self, node: NodeId) -> Nanos {
        self.0.borrow().mono(node.0 as usize)
    }

    /// Bytes that are taken on the node's disk.
    pub fn used_space(&self, node: NodeId) -> u64 {
        let state = self.0.borrow();
        state.nodes[node.0 as usize].space - state.free_space(node.0 as usize)
    }

    /// Somebody else writes to a file, durably, as its time of change tells. Nothing happens if there is no such file.
    pub fn scribble(&self, node: NodeId, path: &str, offset: u64, bytes: &[u8]) {
        let mut state = self.0.borrow_mut();
        let wall = state.wall(node.0 as usize);
        if let Some(inode) = state.nodes[node.0 as usize].names.get(&tidy(path)) {
            let content = state.content(node.0 as usize, inode);
            content.write(offset, bytes, true);
            content.mtime_ns = wall;
        }
    }

    /// Lets time pass until a process has something to poll, and names its node; none if nothing will ever happen.
    ///
    /// The driver of a node polls until a poll brings nothing: only that last one sets the time to be woken at.
    pub fn step(&self) -> Option<NodeId> {
        self.0.borrow_mut().step()
    }

    /// The time of the world, nanoseconds: the monotonic clock of every node whose machine never slept.
    pub fn now(&self) -> Nanos {
        self.0.borrow().now
    }

    /// Lets time pass; what becomes ready is named by the next steps.
    pub fn advance(&self, nanos: Nanos) {
        self.0.borrow_mut().advance(nanos);
    }

    /// Makes the node's process ready to poll, as [`super::ring::Waker::wake`] does.
    pub fn wake(&self, node: NodeId) {
        let mut state = self.0.borrow_mut();
        if let Some(life) = state.nodes[node.0 as usize].life {
            state.make_ready(life);
        }
    }

    /// A file's content as a reader would see it now.
    pub fn file(&self, node: NodeId, path: &str) -> Option<Vec<u8>> {
        self.file_range(node, path, 0, usize::MAX)
    }

    /// Part of a file's content as a reader would see it now; what lies past the end is missing.
    pub fn file_range(&self, node: NodeId, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut state = self.0.borrow_mut();
        let inode = state.nodes[node.0 as usize].names.get(&tidy(path))?;
        let content = state.content(node.0 as usize, inode);
        let mut bytes = vec![0; content.size().saturating_sub(offset).min(len as u64) as usize];
        content.read(offset, &mut bytes);
        Some(bytes)
    }

    /// As [`World::file_range`], of what would be there had no write gone astray and nothing rotted since
    /// [`World::accept`], the last loss of power, or the begin.
    pub fn meant_range(&self, node: NodeId, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut state = self.0.borrow_mut();
        let inode = state.nodes[node.0 as usize].names.get(&tidy(path))?;
        let content = state.content(node.0 as usize, inode);
        let mut bytes = vec![0; content.size().saturating_sub(offset).min(len as u64) as usize];
        content.read_meant(offset, &mut bytes);
        Some(bytes)
    }

    /// What is on the node's disk is what is meant from now on.
    pub fn accept(&self, node: NodeId) {
        let mut state = self.0.borrow_mut();
        state.nodes[node.0 as usize].inodes.values_mut().for_each(|inode| inode.content.accept());
    }

    /// Puts a file in place, durable, replacing what is there. Makes its folders.
    pub fn put_file(&self, node: NodeId, path: &str, bytes: &[u8]) {
        self.0.borrow_mut().put(node.0 as usize, &tidy(path), bytes, true);
    }

    /// Flips bits in a range of a file (rot), durably. Nothing happens if there is no such file.
    pub fn rot(&self, node: NodeId, path: &str, offset: u64, len: usize) {
        let Some(mut bytes) = self.file_range(node, path, offset, len) else { return };
        let mut state = self.0.borrow_mut();
        for byte in &mut bytes {
            *byte ^= 1 << state.rng.below(8);
        }
        if let Some(inode) = state.nodes[node.0 as usize].names.get(&tidy(path)) {
            state.content(node.0 as usize, inode).harm(offset, &bytes, true);
        }
    }

    /// Paths of all files of the node that begin with `prefix`, sorted.
    pub fn paths(&self, node: NodeId, prefix: &str) -> Vec<String> {
        let state = self.0.borrow();
        state.nodes[node.0 as usize].names.visible(prefix).map(|(path, _)| path.clone()).collect()
    }

    /// How many there are of them.
    pub fn files(&self, node: NodeId, prefix: &str) -> usize {
        self.0.borrow().nodes[node.0 as usize].names.visible(prefix).count()
    }

    /// Shows each of them with its stamp, which is another one after whatever may have changed what
    /// [`World::file_range`] or [`World::meant_range`] gives.
    pub fn stamps(&self, node: NodeId, prefix: &str, mut each: impl FnMut(&str, (u64, u64))) {
        let state = self.0.borrow();
        let machine = &state.nodes[node.0 as usize];
        for (path, inode) in machine.names.visible(prefix) {
            if let Some(file) = machine.inodes.get(&inode) {
                each(path, (inode, file.content.stamp));
            }
        }
    }

    /// Sets the size of the node's disk, bytes.
    pub fn set_space(&self, node: NodeId, bytes: u64) {
        self.0.borrow_mut().nodes[node.0 as usize].space = bytes;
    }

    /// The next `times` operations of that kind on the file (or, for syncs, the folder) fail with `error`.
    pub fn fail(&self, node: NodeId, path: &str, fault: Fault, error: Errno, times: u32) {
        self.0.borrow_mut().inject(node.0 as usize, path, fault, error, times);
    }

    /// Changes how the world behaves from now on (`classes` and `space` matter to later lives and nodes only).
    pub fn configure(&self, change: impl FnOnce(&mut WorldConfig)) {
        change(&mut self.0.borrow_mut().config);
    }

    /// Moves the node's wall clock.
    pub fn jump_wall(&self, node: NodeId, nanos: i64) {
        self.0.borrow_mut().nodes[node.0 as usize].wall_offset += nanos;
    }

    /// Says whether the node's wall clock is synchronised.
    pub fn set_wall_synced(&self, node: NodeId, synced: bool) {
        self.0.borrow_mut().nodes[node.0 as usize].wall_synced = synced;
    }

    /// Randomness for the harness, from the same seed.
    pub fn rng(&self) -> Rng {
        self.0.borrow_mut().rng.fork()
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.0.borrow();
        write!(f, "World({} nodes, {} ns, {} events to come)", state.nodes.len(), state.now, state.events.len())
    }
}
