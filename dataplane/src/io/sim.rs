//! The simulated world: nodes with disks and clocks, and sockets between them, in one thread, from one seed.
//!
//! A harness owns a [`World`], gives each node's machines a [`SimIo`], and calls [`World::step`] until it names a node
//! that has something to poll. Time passes only there and in [`World::advance`].

use std::cell::RefCell;
use std::rc::Rc;

use super::{Allocation, Class, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Pool, Sock, Token};

mod rng;

pub use rng::Rng;

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
    /// Files can deallocate ([`Op::Zero`] with `unmap`).
    pub discard: bool,
    /// Bytes on each node's disk.
    pub space: u64,
    /// A read fails with `EIO`.
    pub read_error: f64,
    /// A write or zero fails with `EIO`; some of its sectors are written.
    pub write_error: f64,
    /// A sync fails with `EIO`; some of what it should have kept never will be.
    pub sync_error: f64,
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

/// Which operations of a file fail when asked to by [`World::fail`].
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Reads.
    Read,
    /// Writes and zeroes.
    Write,
    /// Syncs.
    Sync,
}

struct State {}

/// The world. Clones are handles to the same one.
#[derive(Clone)]
pub struct World(Rc<RefCell<State>>);

impl World {
    /// A world from a seed: the same seed and the same calls give the same events.
    pub fn new(seed: u64, config: WorldConfig) -> Self {
        let _ = (seed, config);
        Self(Rc::new(RefCell::new(State {})))
    }

    /// A new node, named for messages.
    pub fn node(&self, name: &str) -> NodeId {
        let _ = name;
        NodeId(0)
    }

    /// A new life of the node's process; an older one, if it still lives, is crashed first.
    pub fn io(&self, node: NodeId) -> SimIo {
        SimIo { world: self.clone(), node, pool: Pool::new(&[Class { capacity: 4096, count: 1 }]) }
    }

    /// As [`World::io`], with a pool of the caller.
    pub fn io_with_pool(&self, node: NodeId, pool: Pool) -> SimIo {
        SimIo { world: self.clone(), node, pool }
    }

    /// The process dies: its completions never arrive, its sockets break, what it had in flight lands late or never,
    /// its locks end when that is settled. The disk keeps what was written.
    pub fn crash(&self, node: NodeId) {
        let _ = node;
    }

    /// The machine loses power: as a crash, and unsynced writes are lost in part, torn at 512 bytes. Peers hear nothing
    /// until the node lives again. The boot id changes.
    pub fn power_loss(&self, node: NodeId) {
        let _ = node;
    }

    /// A connection between the living processes of two nodes (or of one).
    pub fn connect(&self, a: NodeId, b: NodeId) -> (Sock, Sock) {
        let _ = (a, b);
        (Sock(0), Sock(1))
    }

    /// Resets a connection, named by either end, after any prefix of the bytes under way.
    pub fn cut(&self, sock: Sock) {
        let _ = sock;
    }

    /// Stops (or lets pass again) all bytes between two nodes; nobody is told.
    pub fn partition(&self, a: NodeId, b: NodeId, on: bool) {
        let _ = (a, b, on);
    }

    /// Lets time pass until a process has something to poll and names its node; none if nothing will ever happen.
    pub fn step(&self) -> Option<NodeId> {
        None
    }

    /// The monotonic clock of all nodes.
    pub fn now(&self) -> Nanos {
        0
    }

    /// Lets time pass; what becomes ready is named by the next steps.
    pub fn advance(&self, nanos: Nanos) {
        let _ = nanos;
    }

    /// Makes the node's process ready to poll, as [`super::ring::Waker::wake`] does.
    pub fn wake(&self, node: NodeId) {
        let _ = node;
    }

    /// A file's content as a reader would see it now.
    pub fn file(&self, node: NodeId, path: &str) -> Option<Vec<u8>> {
        let _ = (node, path);
        None
    }

    /// Part of a file's content as a reader would see it now; what lies past the end is missing.
    pub fn file_range(&self, node: NodeId, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let _ = (node, path, offset, len);
        None
    }

    /// Puts a file in place, durable, replacing what is there.
    pub fn put_file(&self, node: NodeId, path: &str, bytes: &[u8]) {
        let _ = (node, path, bytes);
    }

    /// Flips bits in a range of a file (rot), durably.
    pub fn rot(&self, node: NodeId, path: &str, offset: u64, len: usize) {
        let _ = (node, path, offset, len);
    }

    /// Paths of all files of the node that begin with `prefix`, sorted.
    pub fn paths(&self, node: NodeId, prefix: &str) -> Vec<String> {
        let _ = (node, prefix);
        Vec::new()
    }

    /// Sets the size of the node's disk, bytes.
    pub fn set_space(&self, node: NodeId, bytes: u64) {
        let _ = (node, bytes);
    }

    /// The next `times` operations of that kind on the file fail with `error`.
    pub fn fail(&self, node: NodeId, path: &str, fault: Fault, error: Errno, times: u32) {
        let _ = (node, path, fault, error, times);
    }

    /// Changes how the world behaves from now on (`classes` matters to later lives only).
    pub fn configure(&self, change: impl FnOnce(&mut WorldConfig)) {
        let _ = change;
    }

    /// Moves the node's wall clock.
    pub fn jump_wall(&self, node: NodeId, nanos: i64) {
        let _ = (node, nanos);
    }

    /// Says whether the node's wall clock is synchronised.
    pub fn set_wall_synced(&self, node: NodeId, synced: bool) {
        let _ = (node, synced);
    }

    /// Randomness for the harness, from the same seed.
    pub fn rng(&self) -> Rng {
        Rng::new(0)
    }
}

/// One life of a node's process.
pub struct SimIo {
    world: World,
    node: NodeId,
    pool: Pool,
}

impl SimIo {
    /// The node it runs on.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The world it runs in.
    pub fn world(&self) -> &World {
        &self.world
    }
}

impl Io for SimIo {
    fn submit(&mut self, token: Token, op: Op) {
        let _ = (token, op);
    }
    fn poll(&mut self, until: Option<Nanos>, done: &mut Vec<Done>) {
        let _ = (until, done);
    }
    fn now(&self) -> Nanos {
        self.world.now()
    }
    fn wall(&self) -> u64 {
        0
    }
    fn wall_synced(&self) -> bool {
        false
    }
    fn boot_id(&self) -> [u8; 16] {
        [0; 16]
    }
    fn pool(&self) -> &Pool {
        &self.pool
    }
    fn random(&mut self, out: &mut [u8]) {
        out.fill(0);
    }
    fn open(&mut self, _: &str, _: OpenHow) -> Result<File, Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn close(&mut self, _: File) {}
    fn close_sock(&mut self, _: Sock) {}
    fn info(&mut self, _: File) -> Result<FileInfo, Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn allocation(&mut self, _: File, _: u64) -> Result<Allocation, Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn set_len(&mut self, _: File, _: u64, _: bool) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn list(&mut self, _: &str) -> Result<Vec<String>, Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn rename(&mut self, _: &str, _: &str) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn remove(&mut self, _: &str) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn sync_dir(&mut self, _: &str) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn free_space(&mut self, _: &str) -> Result<u64, Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn read_small(&mut self, _: &str) -> Result<Vec<u8>, Errno> {
        Err(Errno::OPNOTSUPP)
    }
    fn replace_small(&mut self, _: &str, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }
}
