//! What every front end (NBD now; vhost-user-blk and ublk later) says to a disk, and what it hears.
//!
//! Two disks answer: a source disk ([`crate::source`]) and a view ([`crate::view`]). A front end cuts a large request into
//! parts of at most [`MAX_PART`] bytes and joins their answers; the disk knows only parts.

use std::collections::VecDeque;

use crate::io::{Allocation, Errno, Io, Part};

/// Longest part of a read or write, bytes. Front ends cut at its multiples on the disk.
pub const MAX_PART: usize = 512 * 1024;

/// Room in front of the data of a read's answer, for a reply header, and slack behind: see [`Request::Read`].
pub const HEADROOM: usize = 4096;

/// What a host asks of a disk. Offsets and lengths may have any alignment; the front end has checked that the range
/// lies on the disk and is not empty, and that nothing is written to a read-only disk.
#[derive(Debug)]
pub enum Request {
    /// Read `len` ≤ [`MAX_PART`] bytes. The answer's part has at least [`HEADROOM`] bytes before `at`.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// Write the part's bytes, at most [`MAX_PART`].
    ///
    /// `data.at` is congruent to `offset` modulo 4096 and lies at or after [`HEADROOM`]; the buffer reaches at least
    /// 4096 bytes past the data's end: so the disk can complete partial blocks in place.
    Write {
        /// Byte offset.
        offset: u64,
        /// The stable copy.
        data: Part,
        /// On stable storage before the answer.
        fua: bool,
    },
    /// The range reads as zeros afterwards. Any length.
    Zero {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The range may be deallocated.
        unmap: bool,
        /// `ENOTSUP` rather than a slow zeroing.
        fast_only: bool,
        /// On stable storage before the answer.
        fua: bool,
    },
    /// The host does not need the range any more. Done as write-zeroes-may-unmap on what whole blocks it has.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// On stable storage before the answer.
        fua: bool,
    },
    /// Everything answered before this was asked is on stable storage before the answer.
    Flush,
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub struct Answer {
    /// As given with the request.
    pub cookie: u64,
    /// The data of a read, nothing for the others; or the error that the host gets.
    pub result: Result<Option<Part>, Errno>,
}

/// What a host sees of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// Physical block, bytes.
    pub physical_block: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Discard is offered.
    pub discard: bool,
    /// Serial.
    pub serial: String,
}

/// A disk as front ends see it.
pub trait HostDisk<I: Io> {
    /// What the host sees.
    fn geometry(&self) -> Geometry;

    /// Takes a request; its answer appears in [`HostDisk::answers`], in any order. `cookie` is the front end's.
    fn request(&mut self, io: &mut I, cookie: u64, request: Request);

    /// Answers that are ready; the front end takes them out.
    fn answers(&mut self) -> &mut VecDeque<Answer>;

    /// Whether the disk is allocated at `offset`, and how far; for block status. Never claims a hole that may hold data.
    fn allocation(&mut self, io: &mut I, offset: u64) -> Result<Allocation, Errno>;
}

/// Names a disk to its front ends; chosen by the owner of the disk.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DiskKey(pub u32);

/// A disk on offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Which.
    pub key: DiskKey,
    /// The name that clients ask for.
    pub name: String,
    /// For a person.
    pub description: String,
    /// What a host sees.
    pub geometry: Geometry,
}

/// The disks that a front end serves: implemented by [`crate::source::Source`] and [`crate::target::Target`].
pub trait Disks<I: Io> {
    /// What is on offer now.
    fn exports(&self) -> Vec<Export>;

    /// The disk, borrowed for one call; none if it is no longer on offer.
    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<I> + '_>;
}
