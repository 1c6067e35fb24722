//! Raw io_uring: one [`Ring`] for each data thread.

use std::os::fd::OwnedFd;

use super::{Allocation, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Pool, Sock, Token};

mod kernel;

pub use kernel::RingError;

/// How large a ring is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries of the submission queue, a power of two. More operations than that may be under way.
    pub entries: u32,
    /// Files and sockets that can be open together.
    pub files: u32,
    /// Register the pool's memory with the kernel (counts against the locked-memory limit).
    pub register_pool: bool,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self { entries: 256, files: 1024, register_pool: true }
    }
}

/// The ring of one thread. Made, used and dropped on that thread.
pub struct Ring {
    pool: Pool,
}

impl Ring {
    /// A ring that works on buffers of `pool`.
    ///
    /// # Errors
    /// What the kernel lacks, by name.
    pub fn new(pool: Pool, config: RingConfig) -> Result<Self, RingError> {
        let _ = config;
        Ok(Self { pool })
    }

    /// Takes over a connected stream socket.
    ///
    /// # Errors
    /// `ENFILE` if [`RingConfig::files`] are open.
    pub fn attach(&mut self, socket: OwnedFd) -> Result<Sock, Errno> {
        drop(socket);
        Err(Errno::OPNOTSUPP)
    }

    /// Wakes this ring's [`Io::poll`] from other threads.
    pub fn waker(&self) -> Waker {
        Waker {}
    }
}

/// Wakes a ring's thread. Clones wake the same ring.
#[derive(Clone, Debug)]
pub struct Waker {}

impl Waker {
    /// Lets the ring's running or next [`Io::poll`] return. Cheap when a wake-up is already pending.
    pub fn wake(&self) {}
}

impl Io for Ring {
    fn submit(&mut self, token: Token, op: Op) {
        let _ = (token, op);
    }
    fn poll(&mut self, until: Option<Nanos>, done: &mut Vec<Done>) {
        let _ = (until, done);
    }
    fn now(&self) -> Nanos {
        0
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
