//! What the owner of a [`Target`](super::Target) tells it, and how it says no.

use afterimage_wire::FormatError;
use afterimage_wire::frame::MAX_FRAME;
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::segment::MAX_SEGMENT_HEAD;
use afterimage_wire::timeline::TimelineKind;

use crate::io::{Errno, Nanos};
use crate::seal::PolicyKey;

/// Smallest segment: a head and the longest write must fit.
pub const MIN_SEGMENT: u64 = (MAX_SEGMENT_HEAD + 2 * MAX_FRAME) as u64;
/// Largest segment: positions within one are kept in 32 bits.
pub const MAX_SEGMENT: u64 = 1 << 31;

/// Settings of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetConfig {
    /// Folder of the journal, the tables and the replica images.
    pub root: String,
    /// Bytes of a segment, from [`MIN_SEGMENT`] to [`MAX_SEGMENT`], a multiple of 4096.
    pub segment_bytes: u64,
    /// Most bytes of segments of one stream (deltas of its views apart). At this bound history is shortened from its old
    /// end; where that is not possible, the stream is refused. At least four segments.
    pub budget_bytes: u64,
    /// Most bytes of memory for the index of one stream; over it, history is folded early.
    pub index_bytes: usize,
    /// Most bytes of memory for opened chunks that views keep.
    pub cache_bytes: usize,
    /// Bytes of the file system that ingest leaves free, for folding and for the deltas of failed-over machines.
    pub reserve_bytes: u64,
    /// How often all that is held is read and verified, nanoseconds; 0 for never but when asked ([`super::Target::scrub`]).
    pub scrub_interval: Nanos,
    /// Most bytes that this reads in a second.
    pub scrub_rate: u64,
}

impl TargetConfig {
    /// Defaults below this root: segments of 64 MiB, 16 GiB of history and 256 MiB of index for each stream, 64 MiB of
    /// opened chunks, 256 MiB left free, verified once a week at 32 MiB/s.
    pub fn new(root: impl Into<String>) -> Self {
        Self {
            root: root.into(),
            segment_bytes: 64 << 20,
            budget_bytes: 16 << 30,
            index_bytes: 256 << 20,
            cache_bytes: 64 << 20,
            reserve_bytes: 256 << 20,
            scrub_interval: 7 * 86_400 * 1_000_000_000,
            scrub_rate: 32 << 20,
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`TargetError::Config`] naming the field, its value and what is allowed.
    pub fn check(&self) -> Result<(), TargetError> {
        let bad = |field, value: String, allowed| Err(TargetError::Config { field, value, allowed });
        if self.root.is_empty() {
            return bad("root", "(empty)".into(), "a folder");
        }
        if !(MIN_SEGMENT..=MAX_SEGMENT).contains(&self.segment_bytes) || !self.segment_bytes.is_multiple_of(4096) {
            return bad("segment_bytes", self.segment_bytes.to_string(), "a multiple of 4096 from 5 MiB to 2 GiB");
        }
        if self.budget_bytes < 4 * self.segment_bytes {
            return bad("budget_bytes", self.budget_bytes.to_string(), "at least four segments");
        }
        if self.index_bytes < 1 << 20 {
            return bad("index_bytes", self.index_bytes.to_string(), "at least 1 MiB");
        }
        if self.scrub_rate < 64 << 10 {
            return bad("scrub_rate", self.scrub_rate.to_string(), "at least 64 KiB a second");
        }
        if self.scrub_interval > 0 && self.scrub_interval < 1_000_000_000 {
            return bad("scrub_interval", self.scrub_interval.to_string(), "0, or at least a second in nanoseconds");
        }
        Ok(())
    }
}

/// A stream that this target keeps.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// Which.
    pub stream: StreamId,
    /// For people.
    pub name: String,
    /// Under which its data keys are wrapped.
    pub policy_key: PolicyKey,
    /// How much stream time stays in single writes, nanoseconds.
    pub retention: Nanos,
    /// Most bytes of its segments (deltas of its views apart), at least four segments; 0 for the target's own bound.
    pub budget_bytes: u64,
    /// Its disks, each with the lowest generation that may write it (the table's own counts if it is higher).
    pub disks: Vec<(DiskInfo, u64)>,
}

/// A restore point to be presented as disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewConfig {
    /// Name, unique on this target; the exports are called `<name>/<disk name>`.
    pub name: String,
    /// Of this stream.
    pub stream: StreamId,
    /// The point: the state after this record.
    pub seq: u64,
    /// These disks; none for all that the point holds.
    pub disks: Option<Vec<DiskId>>,
    /// Writes go to a delta, which is a timeline of its own and survives a restart.
    pub writable: bool,
    /// [`TimelineKind::View`] or [`TimelineKind::Failover`]: why it exists.
    pub kind: TimelineKind,
    /// For people.
    pub reason: String,
}

/// Why a target does not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Refused: names the field.
    #[error("{field} is {value}; allowed is {allowed}")]
    Config {
        /// Field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// No such stream here.
    #[error("stream {0} is not known here")]
    UnknownStream(StreamId),
    /// The stream is still being read after a start; ask again.
    #[error("stream {0} is still being recovered")]
    Recovering(StreamId),
    /// The stream could not be recovered, or its journal's disk has failed.
    #[error("stream {stream} cannot be used: {why}")]
    Failed {
        /// Stream.
        stream: StreamId,
        /// Why.
        why: String,
    },
    /// It cannot be written into the disks that it began with.
    #[error("stream {stream} cannot be merged: {why}")]
    Unmergeable {
        /// Stream.
        stream: StreamId,
        /// Why.
        why: String,
    },
    /// No such disk in the stream.
    #[error("disk {0} is not in the stream")]
    UnknownDisk(DiskId),
    /// No such view.
    #[error("there is no view `{0}`")]
    UnknownView(String),
    /// A view of this name exists with other settings.
    #[error("a view `{0}` exists already and is another one")]
    NameTaken(String),
    /// More views than [`super::MAX_VIEWS`], or more branches than a table holds.
    #[error("too many views are open")]
    TooManyViews,
    /// The place is no restore point (any more).
    #[error(transparent)]
    Point(#[from] PointError),
    /// The file system said no.
    #[error("{what} {path}: {errno}")]
    Storage {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// A table on disk makes no sense.
    #[error("{path}: {error}")]
    Format {
        /// The file.
        path: String,
        /// What is wrong.
        error: FormatError,
    },
}

/// Why a place is no restore point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PointError {
    /// The stream is not known, or not ready.
    #[error("stream {0} is not ready")]
    NotReady(StreamId),
    /// No point holds all disks yet.
    #[error("there is no complete restore point yet")]
    None,
    /// Folded into the replica image already.
    #[error("the point is older than what is kept; the oldest is record {floor}")]
    Folded {
        /// Oldest record that is still a point.
        floor: u64,
    },
    /// Not there yet.
    #[error("the point is newer than what is held; the newest is record {newest}")]
    Future {
        /// Newest durable record.
        newest: u64,
    },
    /// No cut of that number is kept.
    #[error("no cut {0} is kept")]
    NoCut(u64),
    /// Nothing that old is kept.
    #[error("nothing that old is kept")]
    TooOld,
    /// The disk is being synchronised there, is damaged, or is not in the stream.
    #[error("the point does not hold disk {disk}: {why}")]
    Incomplete {
        /// The disk.
        disk: DiskId,
        /// In a word.
        why: &'static str,
    },
}

/// Which restore point.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The newest that holds all disks.
    Latest,
    /// A cut, by its number.
    Cut(u64),
    /// The last write whose time, as the source's wall clock had it, is not after this (nanoseconds since the epoch).
    Time(u64),
    /// The state after this record.
    Seq(u64),
}
