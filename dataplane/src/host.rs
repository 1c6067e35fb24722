//! What every front end (NBD, vhost-user-blk, ublk) says to a disk, and what it hears.
//!
//! Two disks answer: a source disk ([`crate::source`]) and a view ([`crate::view`]). A front end cuts a large request into
//! parts of at most [`MAX_PART`] bytes and joins their answers; the disk knows only parts. Several front ends may serve
//! one disk: the upper bits of a cookie say whose it is ([`FrontId`]).

use std::collections::VecDeque;

use crate::io::guest::Scatter;
use crate::io::{Allocation, Done, Errno, Io, Part, Token};

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
    /// As [`Request::Read`], of at most [`MAX_PART`] bytes straight to where they are to go; only to disks that can, and
    /// aligned as they say ([`HostDisk::reads_into`]). The answer has no part then. It has one, as that of a read, where it
    /// could not be done after all.
    ReadInto {
        /// Byte offset.
        offset: u64,
        /// Memory that is shared with the host. What lies there after an error is not known.
        to: Scatter,
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

/// Which front end of a data thread; stands in the upper [`FrontId::BITS`] bits of every cookie that it gives to a disk.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FrontId {
    /// NBD.
    Nbd = 0,
    /// vhost-user-blk.
    Vhost = 1,
    /// ublk.
    Ublk = 2,
    /// A source in the same thread, whose disk this is: [`crate::loopback`].
    Loopback = 3,
}

impl FrontId {
    /// Bits of a cookie that name the front end.
    pub const BITS: u32 = 2;
    /// The bits of a cookie that are the front end's own.
    pub const OWN: u64 = u64::MAX >> Self::BITS;

    /// The cookie of this front end with these bits of its own.
    pub const fn cookie(self, own: u64) -> u64 {
        debug_assert!(own <= Self::OWN);
        (self as u64) << (u64::BITS - Self::BITS) | own
    }

    /// Whether this front end made the cookie.
    pub const fn made(self, cookie: u64) -> bool {
        cookie >> (u64::BITS - Self::BITS) == self as u64
    }

    /// Moves this front end's answers out of a disk's, in their order; the others' stay, in theirs.
    pub fn take(self, answers: &mut VecDeque<Answer>, into: &mut Vec<Answer>) {
        if answers.iter().all(|answer| self.made(answer.cookie)) {
            into.extend(answers.drain(..));
            return;
        }
        for _ in 0..answers.len() {
            let Some(answer) = answers.pop_front() else { break };
            if self.made(answer.cookie) {
                into.push(answer);
            } else {
                answers.push_back(answer);
            }
        }
    }
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub struct Answer {
    /// As given with the request.
    pub cookie: u64,
    /// The data of a [`Request::Read`], nothing for the others; or the error that the host gets.
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

    /// Takes a request; its answer appears in [`HostDisk::answers`], in any order. `cookie` is the front end's, made by
    /// [`FrontId::cookie`].
    fn request(&mut self, io: &mut I, cookie: u64, request: Request);

    /// Of what offset, addresses and lengths of a [`Request::ReadInto`] must be multiples; none if the disk can do no such
    /// reads.
    fn reads_into(&self) -> Option<u32> {
        None
    }

    /// Answers that are ready; each front end takes out its own ([`FrontId::take`]).
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

/// Who uses a disk through a front end.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// Which.
    pub key: DiskKey,
    /// Hosts connected.
    pub clients: usize,
    /// Requests under way.
    pub requests: usize,
}

/// A front end of a data thread: what speaks one protocol to hosts, and [`Request`]s to disks.
///
/// The owner gives it each completion that it [`FrontEnd::owns`], and calls [`FrontEnd::collect`] once or more per turn
/// of its loop, after the disks had their turn: replies leave from there only, so that those of one turn leave together.
pub trait FrontEnd<I: Io> {
    /// True if a completion with this token is for [`FrontEnd::done`].
    fn owns(&self, token: Token) -> bool;

    /// Takes a completion.
    fn done(&mut self, io: &mut I, disks: &mut impl Disks<I>, done: Done);

    /// Takes its answers out of the disks in use, goes on with hosts that waited for room, sends replies. True if there
    /// were answers: then disks may have more for other front ends, too.
    fn collect(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool;

    /// Drops the hosts of an export that is no longer on offer, without answering what they asked.
    fn close_export(&mut self, io: &mut I, key: DiskKey);

    /// Takes no further hosts and requests, answers what is under way, then lets go; see [`FrontEnd::is_idle`].
    fn shutdown(&mut self, io: &mut I);

    /// No hosts are left.
    fn is_idle(&self) -> bool;

    /// Users of each export that has any.
    fn status(&self) -> Vec<ExportStatus>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_front_end_takes_its_own_answers_in_order() {
        let answer = |cookie| Answer { cookie, result: Ok(None) };
        let (nbd, vhost) = (FrontId::Nbd, FrontId::Vhost);
        let mut answers: VecDeque<_> = [vhost.cookie(1), nbd.cookie(7), vhost.cookie(2), nbd.cookie(FrontId::OWN)]
            .into_iter()
            .map(answer)
            .collect();
        let cookies = |all: &[Answer]| all.iter().map(|a| a.cookie).collect::<Vec<_>>();
        let mut taken = Vec::new();
        nbd.take(&mut answers, &mut taken);
        assert_eq!(cookies(&taken), [nbd.cookie(7), nbd.cookie(FrontId::OWN)]);
        taken.clear();
        FrontId::Ublk.take(&mut answers, &mut taken);
        assert!(taken.is_empty());
        vhost.take(&mut answers, &mut taken);
        assert_eq!(cookies(&taken), [vhost.cookie(1), vhost.cookie(2)]);
        assert!(answers.is_empty());
    }
}
