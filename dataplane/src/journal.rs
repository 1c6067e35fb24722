//! A journal: the segments of one timeline, appended to by one writer at a time.
//!
//! - [`segment`]: one segment in memory; `lost`: frames of which something cannot be read any more.
//! - `prune`: what of a delta counts no more.
//! - [`append`]: frames to the active segment; the next one is prepared ahead; the roll.
//! - [`recover`]: reading it all back after a start: torn tail, damage, where to go on; `salvage`: past sectors that
//!   cannot be read.
//!
//! Rules that keep what was acknowledged:
//! - A frame counts as written when its write and all before it have completed; as durable when they were durable
//!   writes or a sync has followed.
//! - Nothing is written to a new segment before everything in the old one is durable. So a hole in front of a later
//!   segment of the same writer is damage, never a torn tail.
//! - The head of a segment is written before, or together with, its first frames, and counted first: no frame is
//!   acknowledged without its key.
//! - After a failed write or sync the journal takes nothing more until it has been recovered by reading.

use std::collections::VecDeque;

use afterimage_wire::MAX_NUMBER;
use afterimage_wire::frame::FrameHeader;
use afterimage_wire::ids::{IncarnationId, StreamId, TimelineId};
use afterimage_wire::segment::WrappedKey;

use crate::index::{Cover, Points};
use crate::io::{Errno, File, Io, Nanos, OpenHow};
use crate::seal::{DataKey, OpenError, PolicyKey};
use crate::target::ops::{Ctx, JournalId};

pub mod append;
mod lost;
mod prune;
pub mod recover;
mod salvage;
pub mod segment;

pub(crate) use append::close_made;
pub use append::{Batch, Written};
pub(crate) use lost::Verdict;
pub(crate) use prune::Prune;
pub(crate) use salvage::Salvage;
pub use segment::{ChunkEntry, FrameEntry, Segment, Writer};

/// Segment files that a journal keeps open for reading.
const MAX_OPEN: usize = 48;

/// A place in the frames of a writer.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Writer.
    pub incarnation: IncarnationId,
    /// Frame.
    pub frame: u64,
    /// Its last record.
    pub seq: u64,
}

/// Adds up the time that passed in the stream: the source's monotonic clock, within each of its lives.
#[derive(Debug, Default)]
struct StreamClock {
    incarnation: IncarnationId,
    mono_ns: Nanos,
    total: Nanos,
}

impl StreamClock {
    fn advance(&mut self, incarnation: IncarnationId, mono_ns: Nanos) -> Nanos {
        if self.incarnation == incarnation {
            self.total += mono_ns.saturating_sub(self.mono_ns);
            self.mono_ns = self.mono_ns.max(mono_ns);
        } else {
            (self.incarnation, self.mono_ns) = (incarnation, mono_ns);
        }
        self.total
    }
}

/// Where and how a journal is written.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    /// Folder of the segments.
    pub dir: String,
    /// Stream.
    pub stream: StreamId,
    /// Branch.
    pub timeline: TimelineId,
    /// Bytes of a segment.
    pub segment_bytes: u64,
}

/// The journal of one timeline.
#[derive(Debug)]
pub struct Journal {
    pub(crate) id: JournalId,
    pub(crate) config: JournalConfig,
    /// Oldest first; the active one, if any, is the last.
    pub(crate) segments: VecDeque<Segment>,
    next_uid: u64,
    next_number: u64,
    append: append::Append,
    pub(crate) policy_key: PolicyKey,
    clock: StreamClock,
    /// Written, in order.
    pub(crate) complete: Place,
    /// On stable storage.
    pub(crate) durable: Place,
    /// Given to the kernel, or waiting to be.
    pub(crate) accepted: Place,
    /// Dropped, but read from until the last reader is done.
    retired: Vec<Segment>,
    /// Bytes of segment files, with the prepared one.
    pub(crate) bytes: u64,
}

/// File name of a segment.
pub fn segment_name(timeline: TimelineId, number: u64) -> String {
    format!("{timeline}-{number:016x}.seg")
}

/// The timeline and number that a segment's file name says.
pub fn parse_segment_name(name: &str) -> Option<(TimelineId, u64)> {
    let stem = name.strip_suffix(".seg")?;
    let (timeline, number) = stem.rsplit_once('-')?;
    if number.len() != 16 {
        return None;
    }
    let number = u64::from_str_radix(number, 16).ok().filter(|number| *number <= MAX_NUMBER)?;
    Some((timeline.parse().ok()?, number))
}

impl Journal {
    /// An empty journal; `first_uid` begins a range of segment uids that no other journal uses.
    pub(crate) fn new(id: JournalId, config: JournalConfig, policy_key: PolicyKey, first_uid: u64) -> Self {
        Self {
            id,
            config,
            segments: VecDeque::new(),
            next_uid: first_uid,
            next_number: 1,
            append: append::Append::default(),
            policy_key,
            clock: StreamClock::default(),
            complete: Place::default(),
            durable: Place::default(),
            accepted: Place::default(),
            retired: Vec::new(),
            bytes: 0,
        }
    }

    /// The segment with this uid.
    pub fn segment(&self, uid: u64) -> Option<&Segment> {
        self.position(uid).map(|at| &self.segments[at])
    }

    pub(crate) fn segment_mut(&mut self, uid: u64) -> Option<&mut Segment> {
        self.position(uid).map(|at| &mut self.segments[at])
    }

    fn position(&self, uid: u64) -> Option<usize> {
        // Uids rise with the segments.
        let at = self.segments.partition_point(|segment| segment.uid < uid);
        self.segments.get(at).is_some_and(|segment| segment.uid == uid).then_some(at)
    }

    /// Lays all records up to `max_seq` over `cover`, newest first.
    pub fn cover(&self, cover: &mut Cover, disk: u16, max_seq: u64) {
        for segment in self.segments.iter().rev() {
            if cover.is_covered() {
                return;
            }
            if segment.index.first_seq() <= max_seq {
                cover.lay(&segment.index, segment.uid, disk, max_seq);
            }
        }
    }

    /// Takes a frame that lies in segment `uid` at byte `at` into the index; see [`Segment::take_frame`].
    ///
    /// # Errors
    /// It cannot be opened: nothing of it is in the index.
    pub(crate) fn index_frame(
        &mut self,
        uid: u64,
        at: u64,
        bytes: &mut [u8],
        points: &mut Points,
        deep: bool,
        plain: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        let Some(position) = self.position(uid) else { return Ok(()) };
        let segment = &mut self.segments[position];
        let header = *FrameHeader::parse(bytes)?;
        let now = self.clock.advance(segment.writer.incarnation, header.mono_ns.get());
        if segment.frames.is_empty() {
            segment.time.0 = now;
        }
        segment.time.1 = now;
        segment
            .take_frame(at, bytes, points, deep, plain)
            .inspect_err(|_| segment.index.forget_from(header.first_seq.get()))
    }

    /// Stream time now, nanoseconds: its zero means nothing.
    pub fn stream_time(&self) -> Nanos {
        self.clock.total
    }

    /// Unwraps the key of a writer.
    fn policy(&self, wrapped: &WrappedKey, incarnation: IncarnationId) -> Result<DataKey, OpenError> {
        self.policy_key.unwrap(incarnation, wrapped)
    }

    /// Memory of the index, bytes.
    pub fn index_bytes(&self) -> usize {
        self.segments.iter().map(Segment::bytes).sum()
    }

    /// The file of a segment, opened for reading if it is not open.
    pub(crate) fn open_for_read<I: Io>(&mut self, io: &mut I, uid: u64) -> Result<File, Errno> {
        let at = self.position(uid).ok_or(Errno::NOENT)?;
        if let Some(file) = self.segments[at].file {
            return Ok(file);
        }
        if self.segments.iter().filter(|segment| segment.file.is_some()).count() >= MAX_OPEN {
            let active = self.active_uid();
            let idle =
                |segment: &&mut Segment| segment.file.is_some() && segment.users == 0 && Some(segment.uid) != active;
            if let Some(other) = self.segments.iter_mut().find(idle)
                && let Some(file) = other.file.take()
            {
                io.close(file);
            }
        }
        let file = io.open(&self.segments[at].path, OpenHow::default())?;
        self.segments[at].file = Some(file);
        Ok(file)
    }

    /// A reader of segment `uid` begins.
    pub(crate) fn hold(&mut self, uid: u64) {
        if let Some(segment) = self.segment_mut(uid) {
            segment.users += 1;
        }
    }

    /// A reader of segment `uid` has ended.
    pub(crate) fn release<I: Io>(&mut self, io: &mut I, uid: u64) {
        if let Some(segment) = self.segment_mut(uid) {
            segment.users -= 1;
        } else if let Some(at) = self.retired.iter().position(|segment| segment.uid == uid) {
            self.retired[at].users -= 1;
            if self.retired[at].users == 0 {
                let segment = self.retired.swap_remove(at);
                if let Some(file) = segment.file {
                    io.close(file);
                }
            }
        }
    }

    /// Drops the oldest segment: its records are in the replica images, durably.
    ///
    /// # Errors
    /// The folder. The segment is out of the index all the same; what is left of the file is folded again after a start.
    pub(crate) fn drop_oldest<I: Io>(&mut self, io: &mut I) -> Result<(), Errno> {
        let Some(segment) = self.segments.pop_front() else { return Ok(()) };
        self.bytes -= segment.size;
        let path = segment.path.clone();
        // Who reads from it keeps the open file.
        if segment.users > 0 {
            self.retired.push(segment);
        } else if let Some(file) = segment.file {
            io.close(file);
        }
        io.remove(&path)?;
        self.room_made();
        io.sync_dir(&self.config.dir)
    }

    /// An empty journal of the same branch, to be filled by reading what is on the disk.
    pub(crate) fn successor(&self) -> Self {
        let mut journal = Self::new(self.id, self.config.clone(), self.policy_key.clone(), self.next_uid);
        journal.append = self.append.successor();
        journal
    }

    /// Takes over from a journal of the same branch: who still reads in its files reads on.
    pub(crate) fn inherit<I: Io>(&mut self, io: &mut I, old: Self) {
        // It may have been rotated meanwhile.
        self.policy_key = old.policy_key.clone();
        self.retired.extend(old.retired);
        for segment in old.segments {
            match segment.file {
                Some(_) if segment.users > 0 => self.retired.push(segment),
                Some(file) => io.close(file),
                None => {}
            }
        }
    }

    /// Closes every file. Writes under way end by themselves.
    pub(crate) fn close<I: Io>(&mut self, io: &mut I) {
        for segment in self.segments.iter_mut().chain(&mut self.retired) {
            if let Some(file) = segment.file.take() {
                io.close(file);
            }
        }
        self.append.close(io);
    }

    pub(crate) fn turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        self.pump(ctx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_segments() {
        let timeline = TimelineId([0xab; 16]);
        let name = segment_name(timeline, 0x1f);
        assert_eq!(parse_segment_name(&name), Some((timeline, 0x1f)));
        for other in ["timelines", "x.seg", "spare.seg", "abababab-000000000000001f.seg"] {
            assert_eq!(parse_segment_name(other), None, "{other}");
        }
    }
}
