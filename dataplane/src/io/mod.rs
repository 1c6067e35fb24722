//! The one seam of the data plane: operations go in with the buffers they own, completions come out with them.
//!
//! Two implementations: [`ring::Ring`], raw io_uring, and [`sim::SimIo`], one node of a simulated world; and
//! [`tapped::Tapped`] around either, for disks that are served in the same thread. All `unsafe` of the project stands in
//! this module. The clock is read here and nowhere else.
//!
//! Rules, the same for both and held by the tests in `tests/conformance.rs`:
//! - A buffer given to an operation belongs to the kernel until its [`Done`], which brings it back, also on error.
//! - A [`Op::Read`], [`Op::ReadInto`], [`Op::Write`] or [`Op::Send`] completes when *all* its bytes are done, or with an error; a read
//!   past the end of a file is `EIO`. [`Op::Recv`] completes with at least one byte, or 0 at the end of the stream.
//! - Operations are not ordered among each other. Two sends (or two receives) on one socket must not be under way
//!   together.
//! - A write is on stable storage when it was submitted `durable`, or when a [`Op::Sync`] submitted after its
//!   completion has succeeded. After a failed sync nothing is known about the writes before it.
//! - Opening, creating, renaming, removing and syncing folders are blocking calls: cold paths only. What a path that is not
//!   cold needs of them is an operation, too: [`Op::Create`] and [`Op::SyncDir`].

use std::fmt;

pub mod buf;
pub mod guest;
pub mod inherited;
pub mod ring;
pub mod sim;
pub mod tapped;
pub mod ublk;

pub use buf::{Buf, Class, Pool};
pub use ublk::UblkOp;

/// Nanoseconds on the monotonic clock (of this host, since its boot).
pub type Nanos = u64;

/// Chosen by whoever submits; comes back with the completion. The upper 16 bits say which machine, see the drivers.
pub type Token = u64;

/// An open file, valid until closed. Never reused while an operation on it is under way.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct File(pub u32);

/// A connected stream socket; or an event counter of the kernel ([`ring::Ring::attach_event`]), which is used like one: a
/// [`Op::Recv`] of 8 bytes completes when it was raised since the last time, an [`Op::Send`] of a native 8-byte 1 raises it.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Sock(pub u32);

/// An errno as the kernel gave it.
#[derive(Copy, Clone, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    #![allow(missing_docs)]
    pub const PERM: Self = Self(1);
    pub const NOENT: Self = Self(2);
    pub const IO: Self = Self(5);
    pub const BADF: Self = Self(9);
    pub const AGAIN: Self = Self(11);
    pub const NOMEM: Self = Self(12);
    pub const FAULT: Self = Self(14);
    pub const BUSY: Self = Self(16);
    pub const EXIST: Self = Self(17);
    pub const NODEV: Self = Self(19);
    pub const NOTDIR: Self = Self(20);
    pub const ISDIR: Self = Self(21);
    pub const INVAL: Self = Self(22);
    pub const NFILE: Self = Self(23);
    pub const NOSPC: Self = Self(28);
    pub const PIPE: Self = Self(32);
    pub const OPNOTSUPP: Self = Self(95);
    pub const CONNRESET: Self = Self(104);
    pub const SHUTDOWN: Self = Self(108);
    pub const CANCELED: Self = Self(125);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}

/// A range of a buffer.
#[derive(Debug)]
pub struct Part {
    /// The buffer, whole.
    pub buf: Buf,
    /// First byte of the range.
    pub at: usize,
    /// Bytes of the range.
    pub len: usize,
}

/// An operation. File offsets, lengths and buffer positions of reads and writes are multiples of the file's block
/// ([`FileInfo::block`]); files are opened `O_DIRECT`.
#[derive(Debug)]
pub enum Op {
    /// Fills `part` from the file.
    Read {
        /// From here.
        file: File,
        /// Byte offset.
        offset: u64,
        /// Into this.
        part: Part,
    },
    /// Fills memory that another process shares with us from the file. What lies there after an error is not known.
    /// `EFAULT` if the memory has gone, or is of a kind that the kernel does no I/O on.
    ReadInto {
        /// From here.
        file: File,
        /// Byte offset.
        offset: u64,
        /// Into this; its addresses and lengths are multiples of the file's block, too. Does not come back.
        to: guest::Scatter,
    },
    /// Writes `part`.
    Write {
        /// To here.
        file: File,
        /// Byte offset.
        offset: u64,
        /// This.
        part: Part,
        /// On stable storage at completion (RWF_DSYNC).
        durable: bool,
    },
    /// Everything written and completed before is on stable storage at completion (fdatasync).
    Sync {
        /// Of this file.
        file: File,
    },
    /// The range reads as zeros afterwards. The range is given back to the file system or device if `unmap`, kept
    /// allocated otherwise. `EOPNOTSUPP` where the file cannot.
    Zero {
        /// Of this file.
        file: File,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Deallocate.
        unmap: bool,
    },
    /// Receives 1 to `part.len` bytes; 0 at the end of the stream.
    Recv {
        /// From here.
        sock: Sock,
        /// Into this.
        part: Part,
    },
    /// Receives 1 byte up to the sum of the parts, filling them in order. `parts` comes back in [`Done::parts`].
    RecvV {
        /// From here.
        sock: Sock,
        /// Into these, at most 64.
        parts: Vec<Part>,
    },
    /// Sends all of `part`.
    Send {
        /// To here.
        sock: Sock,
        /// This.
        part: Part,
    },
    /// Sends all parts in order. `parts` comes back in [`Done::parts`].
    SendV {
        /// To here.
        sock: Sock,
        /// These, at most 64.
        parts: Vec<Part>,
    },
    /// Makes a file, takes its lock, and makes sure that all of `len` has room on the disk: what [`Io::open`] and
    /// [`Io::set_len`] do, without stopping whoever else this thread serves. The result is the number of the [`File`]. After
    /// an error (`EEXIST`, `ENOSPC`, `ENFILE`) there is no file. A process that dies meanwhile may leave it, of any length.
    Create {
        /// Its path. Durable after a [`Op::SyncDir`] of its folder that is submitted later.
        path: String,
        /// Bytes, at least 1.
        len: u64,
    },
    /// What [`Io::sync_dir`] does, without stopping the thread: creations, renames and removals before it are durable.
    SyncDir {
        /// The folder.
        dir: String,
    },
    /// Completes at or soon after `at`.
    Timer {
        /// On the monotonic clock.
        at: Nanos,
    },
    /// Something with a ublk device of this host.
    Ublk(UblkOp),
}

/// A completed operation.
#[derive(Debug)]
pub struct Done {
    /// As submitted.
    pub token: Token,
    /// Bytes (receive: as many as came; read, write, send: all; create: the number of the file), or why not.
    pub result: Result<u64, Errno>,
    /// The buffer, for operations with one.
    pub part: Option<Part>,
    /// The buffers of `RecvV` and `SendV`; empty otherwise.
    pub parts: Vec<Part>,
}

/// How to open a file.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For writing too.
    pub write: bool,
    /// Make it; `EEXIST` if it is there.
    pub create_new: bool,
    /// Take the lock that is tied to the open file (`flock`; a device is also opened `O_EXCL`). `EAGAIN` (for a device
    /// `EBUSY`, also if it is mounted) while another holds it, which a dead process does until its last I/O has ended.
    pub lock: bool,
}

/// What a file or device is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    /// Alignment that reads and writes need (logical block), bytes.
    pub block: u32,
    /// Physical block, bytes: two I/Os within one may disturb each other.
    pub physical_block: u32,
    /// [`Op::Zero`] with `unmap` works.
    pub discard: bool,
    /// A block device.
    pub device: bool,
    /// When its content last changed as far as the file system says, nanoseconds since the Unix epoch. For a device, which
    /// does not say that, how much has been written to and discarded on it since the boot; 0 if that is not known.
    pub mtime_ns: u64,
    /// Tells this file or device from any other that may stand at its path one day: a number that a copy does not have,
    /// and that outlives a reboot. 0 if there is none.
    pub identity: u64,
}

/// A range of a file that is allocated or not, as far as the file system tells.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Bytes from the asked offset on.
    pub len: u64,
    /// A hole: reads as zeros.
    pub hole: bool,
}

/// What a machine may do to the world.
pub trait Io {
    /// Queues an operation; it starts at the next [`Io::poll`] at the latest. Never fails and never blocks: errors come
    /// with the completion. The caller bounds how many it has under way.
    fn submit(&mut self, token: Token, op: Op);

    /// Starts what is queued, and appends what has completed to `done`. If nothing has, and `until` is given, waits for
    /// a completion, a wake-up from another thread, or that time.
    fn poll(&mut self, until: Option<Nanos>, done: &mut Vec<Done>);

    /// Monotonic clock, as of the last poll or later.
    fn now(&self) -> Nanos;

    /// Time since the host's boot, with the time that it was asleep: what another host may rely on (leases). Never
    /// compared with another host's.
    fn since_boot(&self) -> Nanos {
        self.now()
    }

    /// Wall clock, nanoseconds since the Unix epoch. For people and for cuts: nothing is ordered by it.
    fn wall(&self) -> u64;

    /// The wall clock is synchronised to a time source, as the kernel says.
    fn wall_synced(&self) -> bool;

    /// `boot_id` of the kernel.
    fn boot_id(&self) -> [u8; 16];

    /// Where buffers come from.
    fn pool(&self) -> &Pool;

    /// Fills `out` with random bytes fit for keys (in the simulated world: from the seed).
    fn random(&mut self, out: &mut [u8]);

    /// Opens a file or block device, `O_DIRECT`: `EINVAL` where the file system has no direct I/O (a tmpfs before Linux
    /// 6.6) and for what is neither; `EISDIR` for a folder; `ENFILE` if too many are open. Changes nothing about a file
    /// that is there.
    fn open(&mut self, path: &str, how: OpenHow) -> Result<File, Errno>;

    /// Closes a file once no operation on it is under way; its lock ends then.
    fn close(&mut self, file: File);

    /// Shuts a socket down and closes it; operations on it end with an error or at the end of the stream.
    fn close_sock(&mut self, sock: Sock);

    /// What the file is now. `EBADF` if it is not open.
    fn info(&mut self, file: File) -> Result<FileInfo, Errno>;

    /// Whether the file is allocated at `offset`, and how far. All of it is where nobody knows, as on devices. `EINVAL`
    /// at or past the end.
    fn allocation(&mut self, file: File, offset: u64) -> Result<Allocation, Errno>;

    /// Sets the length and, if `allocate`, makes sure that all of it has room on the disk (`ENOSPC` if not). Durable after
    /// a sync. On a device only its own length can be set (`EINVAL`).
    fn set_len(&mut self, file: File, len: u64, allocate: bool) -> Result<(), Errno>;

    /// Names in a folder, of files and folders, in no order. Made (durably, with those above it) if missing.
    fn list(&mut self, dir: &str) -> Result<Vec<String>, Errno>;

    /// Renames, replacing what is there. Durable after [`Io::sync_dir`].
    fn rename(&mut self, from: &str, to: &str) -> Result<(), Errno>;

    /// Removes a file. Durable after [`Io::sync_dir`].
    fn remove(&mut self, path: &str) -> Result<(), Errno>;

    /// Makes creations, renames and removals in a folder durable.
    fn sync_dir(&mut self, dir: &str) -> Result<(), Errno>;

    /// Bytes that a file system can still take at this folder.
    fn free_space(&mut self, dir: &str) -> Result<u64, Errno>;

    /// Reads a small file whole (tables, not data); blocking.
    fn read_small(&mut self, path: &str) -> Result<Vec<u8>, Errno>;

    /// The request that a tag of a ublk device holds, as the kernel wrote it: a [`ublk::uapi::Descriptor`]. Valid from the
    /// completion of the tag's [`UblkOp::Fetch`] to the submission of the next.
    fn ublk_request(&mut self, device: File, tag: u16) -> Result<[u8; size_of::<ublk::uapi::Descriptor>()], Errno> {
        let _ = (device, tag);
        Err(Errno::OPNOTSUPP)
    }

    /// Replaces a small file durably: writes `path.new`, syncs it, renames it, syncs the folder. Blocking.
    fn replace_small(&mut self, path: &str, bytes: &[u8]) -> Result<(), Errno>;
}
