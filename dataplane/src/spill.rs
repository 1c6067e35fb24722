//! The spill: sealed frames that wait on the source's disk for a link, in order, when memory runs short.
//!
//! - `write`: frames to the active segment, in order; the roll to the next one.
//! - `read`: frames back, in order, read ahead of the sender.
//! - `recover`: what an earlier process left, after a stop or a crash.
//!
//! Segments are those of the journal (the same head, the same frames, byte for byte as they would have left), one
//! writer's frames each. The next segment's file is made while the present one fills, beside this thread, under a name of
//! its own: the *spare*. Together they hold a stretch without gaps that begins at or before the first frame that is
//! not acknowledged. Rules that keep it so:
//! - frames are written in the order of their numbers, and count as written when all before them are;
//! - nothing is written to a new segment before everything in the old one is durable, and a segment's name is durable
//!   before its first frame counts;
//! - a segment is removed, the oldest first, only when everything in it is acknowledged.
//!
//! The spill is never the only memory of what the replica lacks: every frame in it has its extents' bits set in the
//! write-intent log. Whatever cannot be read back is compared instead.

use std::cmp::Ordering;
use std::collections::VecDeque;

use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::segment::{Predecessor, SegmentHead, WrappedKey};

use crate::io::{Errno, Io, Nanos, Token};

mod read;
mod recover;
mod write;

pub(crate) use read::{Loaded, ReadBack};
pub(crate) use recover::{Past, Recovered, recover};
pub(crate) use write::{Prepared, Returned};

/// Writes under way.
const MAX_WRITES: usize = 4;
/// Name of the file that becomes the next segment. Nothing in it counts: a start removes it.
const SPARE: &str = "spare.seg.new";
/// After a failed write, or with no room on the disk, the next attempt comes this much later.
const RETRY: Nanos = 1_000_000_000;

/// A frame was closed at most this long after its oldest record was numbered, as far as can be told from outside.
pub(crate) const CLOSED_AFTER: Nanos = 1_000_000_000;

/// Which operation of a spill a completion is of: bits 40 to 47 of its token. The low 24 bits are a serial number.
pub(crate) mod kind {
    #![allow(missing_docs)]
    pub const WRITE: u64 = 0x10;
    pub const READ: u64 = 0x11;
    pub const SYNC: u64 = 0x12;
    pub const SPARE: u64 = 0x13;
}

/// Where and how much.
#[derive(Clone, Debug)]
pub(crate) struct SpillConfig {
    /// Folder of the stream's segments.
    pub dir: String,
    /// Bytes of all segments.
    pub bytes: u64,
    /// Bytes of one.
    pub segment_bytes: u64,
    /// Bytes of the file system that stay free.
    pub reserve: u64,
}

/// What heads of new segments say of who sealed the frames.
#[derive(Clone, Debug)]
pub(crate) struct SpillWriter {
    pub incarnation: IncarnationId,
    pub predecessor: Predecessor,
    pub wrapped: WrappedKey,
    pub disks: Vec<DiskInfo>,
}

/// A segment file.
#[derive(Debug)]
struct Segment {
    number: u64,
    path: String,
    incarnation: IncarnationId,
    first_frame: u64,
    /// Last frame that is in it, in order; 0 for none, `u64::MAX` where only a later read tells.
    last_frame: u64,
    /// Bytes that hold its head and those frames; the file's length where only a later read tells.
    end: u64,
    /// Bytes of the file.
    size: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Spill {
    config: SpillConfig,
    stream: StreamId,
    token: Token,
    /// Oldest first.
    segments: VecDeque<Segment>,
    next_number: u64,
    /// Bytes of all segment files, with the spare.
    bytes: u64,
    write: write::Write,
    read: read::Read,
    /// Why it takes nothing at the moment.
    trouble: Option<String>,
    /// Counts what went wrong, for whoever reports it.
    pub faults: u64,
}

/// Name of a segment's file.
fn file_name(number: u64, incarnation: IncarnationId, first_frame: u64) -> String {
    format!("{number:016x}-{incarnation}-{first_frame:016x}.seg")
}

/// What a file name says; none if it is not that of a segment.
fn parse_name(name: &str) -> Option<(u64, IncarnationId, u64)> {
    let stem = name.strip_suffix(".seg")?;
    let (number, rest) = stem.split_at_checked(16)?;
    let (incarnation, first_frame) = rest.strip_prefix('-')?.rsplit_once('-')?;
    if first_frame.len() != 16 {
        return None;
    }
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    Some((hex(number)?, incarnation.parse().ok()?, hex(first_frame)?))
}

impl Spill {
    fn new(config: SpillConfig, stream: StreamId, token: Token) -> Self {
        Self {
            config,
            stream,
            token,
            segments: VecDeque::new(),
            next_number: 1,
            bytes: 0,
            write: write::Write::default(),
            read: read::Read::default(),
            trouble: None,
            faults: 0,
        }
    }

    fn spare_path(&self) -> String {
        format!("{}/{SPARE}", self.config.dir)
    }

    fn op(&self, kind: u64, serial: u32) -> Token {
        self.token | kind << 40 | u64::from(serial)
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Most bytes that its files may have.
    pub fn limit(&self) -> u64 {
        self.config.bytes
    }

    /// Why it takes nothing at the moment.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Bytes in it that have not been read back.
    pub fn unread(&self) -> u64 {
        let (reading, pos) = self.read_place();
        let unread = |segment: &Segment| match segment.number.cmp(&reading) {
            Ordering::Less => 0,
            Ordering::Equal => segment.end.saturating_sub(pos),
            Ordering::Greater => segment.end,
        };
        self.segments.iter().map(unread).sum()
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Everything of `incarnation` up to `frame` is acknowledged: segments that hold nothing else go.
    pub fn reap<I: Io>(&mut self, io: &mut I, incarnation: IncarnationId, frame: u64) {
        while let Some(front) = self.segments.front() {
            let last = match self.segments.get(1) {
                Some(next) if next.incarnation == front.incarnation => next.first_frame - 1,
                _ => front.last_frame,
            };
            let active = self.segments.len() == 1 && self.is_writing();
            if front.incarnation != incarnation || last > frame || active {
                break;
            }
            self.remove_front(io);
        }
        self.reap_spare(io);
    }

    /// Everything of `incarnation` is acknowledged.
    pub fn drop_life<I: Io>(&mut self, io: &mut I, incarnation: IncarnationId) {
        while self.segments.front().is_some_and(|front| front.incarnation == incarnation) {
            self.remove_front(io);
        }
    }

    /// Forgets everything: what is in it is compared instead. Operations under way end unseen.
    pub fn clear<I: Io>(&mut self, io: &mut I) {
        self.forget_writes(io);
        while !self.segments.is_empty() {
            self.remove_front(io);
        }
        self.drop_spare(io);
    }

    fn remove_front<I: Io>(&mut self, io: &mut I) {
        let Some(segment) = self.segments.pop_front() else { return };
        self.close_read(io, segment.number);
        if self.segments.is_empty() {
            self.close_active(io);
            self.drop_spare(io);
        }
        self.remove_file(io, &segment);
        self.room_made();
    }

    fn remove_back<I: Io>(&mut self, io: &mut I) {
        let Some(segment) = self.segments.pop_back() else { return };
        self.close_read(io, segment.number);
        self.remove_file(io, &segment);
    }

    /// What cannot be removed is found again after a start, and holds what is acknowledged. The names that are gone are
    /// durably so before the next segment's is there.
    fn remove_file<I: Io>(&mut self, io: &mut I, segment: &Segment) {
        self.bytes -= segment.size;
        if let Err(errno) = io.remove(&segment.path)
            && errno != Errno::NOENT
        {
            tracing::warn!(path = segment.path, %errno, "a spill segment cannot be removed");
        }
    }

    /// Closes its files. What is under way ends by itself.
    pub fn close<I: Io>(&mut self, io: &mut I) {
        self.forget_writes(io);
        self.drop_spare(io);
        self.close_reader(io);
    }
}

/// What the head of a new segment says.
fn head(stream: StreamId, writer: &SpillWriter, number: u64, first: (u64, u64), wall_ns: u64) -> SegmentHead {
    SegmentHead {
        stream,
        // Which branch it is on is the target's to say.
        timeline: afterimage_wire::ids::TimelineId::NONE,
        incarnation: writer.incarnation,
        predecessor: writer.predecessor,
        segment: number,
        first_frame: first.0,
        first_seq: first.1,
        created_wall_ns: wall_ns,
        key: writer.wrapped,
        disks: writer.disks.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_segments() {
        let incarnation = IncarnationId([0xcd; 16]);
        let name = file_name(0x1f, incarnation, 7);
        assert_eq!(parse_name(&name), Some((0x1f, incarnation, 7)));
        for other in
            ["timelines", "x.seg", SPARE, "", "0000000000000001.seg", "0000000000000001-xyz-0000000000000001.seg"]
        {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}
