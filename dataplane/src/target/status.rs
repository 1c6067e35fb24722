//! What a target tells about itself: plain data, copied out.

use afterimage_wire::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use afterimage_wire::record::Cut;
use afterimage_wire::timeline::{Fence, TimelineKind};

use crate::io::Nanos;

/// A restore point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointInfo {
    /// State after this record.
    pub seq: u64,
    /// Source's wall clock at the record, nanoseconds since the epoch (to a microsecond).
    pub wall_ns: u64,
    /// Source's monotonic clock at the record or at the end of its frame, nanoseconds.
    pub mono_ns: u64,
    /// Writer.
    pub incarnation: IncarnationId,
    /// The cut, if the record is one.
    pub cut: Option<Cut>,
    /// Disks that the point holds.
    pub disks: Vec<DiskId>,
    /// It holds every disk that is in the stream there.
    pub complete: bool,
    /// Some of it cannot be read: what, and which blocks, for a person.
    pub damage: Option<String>,
}

/// Where a stream stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamState {
    /// Its segments are being read after a start.
    Recovering,
    /// Takes data and opens views.
    Ready,
    /// No room for more; what is held stays readable.
    NoSpace(String),
    /// Its journal cannot be read or written.
    Failed(String),
}

/// A stretch of history that cannot be read although it had been acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Segment number.
    pub segment: u64,
    /// Writer.
    pub incarnation: IncarnationId,
    /// First frame lost.
    pub first_frame: u64,
    /// Last frame lost.
    pub last_frame: u64,
    /// First record lost.
    pub first_seq: u64,
    /// Newest record of the stream when it was found.
    pub found_at: u64,
    /// What is wrong, for a person.
    pub what: String,
    /// What the lost records held is known: points that need one of `blocks` are damaged, others are not. Otherwise
    /// points from `first_seq` on hold no disk until the end of a whole synchronisation that was begun after `found_at`.
    pub known: bool,
    /// Lost bytes, in no order.
    pub blocks: Vec<LostBlocks>,
}

impl Damage {
    /// Of these frames, the first and the last, of which nobody knows what they held.
    pub(crate) fn unknown(
        segment: u64,
        incarnation: IncarnationId,
        (first_frame, last_frame): (u64, u64),
        first_seq: u64,
        found_at: u64,
        what: String,
    ) -> Self {
        let (known, blocks) = (false, Vec::new());
        Self { segment, incarnation, first_frame, last_frame, first_seq, found_at, what, known, blocks }
    }

    /// What is wrong where frames are not there at all.
    pub(crate) fn missing(first_frame: u64, last_frame: u64) -> String {
        format!("frames {first_frame} to {last_frame} of an acknowledged stretch are missing")
    }

    /// The newest state is good again.
    pub fn is_mended(&self) -> bool {
        self.known && self.blocks.iter().all(|block| block.until.is_some())
    }
}

/// Bytes of a disk that cannot be read at some points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostBlocks {
    /// Disk.
    pub disk: DiskId,
    /// Its slot.
    pub slot: u16,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Damaged are points from this record on …
    pub from: u64,
    /// … to the one before this, from which on newer data is there; the newest state lacks them while it is not set.
    pub until: Option<u64>,
}

/// How the journals of a stream are verified in the background.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// A pass is under way.
    pub running: bool,
    /// Bytes that it has verified.
    pub done: u64,
    /// Bytes that it has to verify.
    pub total: u64,
    /// Passes that have ended since the start.
    pub passes: u64,
    /// When the last one ended, this host's monotonic clock.
    pub ended: Option<Nanos>,
    /// Frames found to be damaged since the start.
    pub bad_frames: u64,
}

/// A disk of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskStatus {
    /// The disk.
    pub id: DiskId,
    /// Name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Lowest generation that may write it.
    pub generation: u64,
    /// Branch that this generation writes.
    pub timeline: TimelineId,
    /// It is in the stream now.
    pub member: bool,
    /// A synchronisation is going on: the newest points do not hold it.
    pub syncing: bool,
    /// History of it was lost; a whole synchronisation mends it.
    pub damaged: bool,
}

/// A stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamStatus {
    /// Which.
    pub stream: StreamId,
    /// For people.
    pub name: String,
    /// Where it stands.
    pub state: StreamState,
    /// A source is connected.
    pub connected: bool,
    /// When the source was last heard, this host's monotonic clock.
    pub last_heard: Option<Nanos>,
    /// Branch that the source writes.
    pub timeline: TimelineId,
    /// The newest frame was sealed while its source held answers until they were acknowledged.
    pub synchronous: bool,
    /// No answered write is missing here before this moment, this host's clock since boot. Past it nobody knows.
    pub zero_loss_until: Option<Nanos>,
    /// Fences, oldest first.
    pub fences: Vec<Fence>,
    /// Newest writer.
    pub incarnation: IncarnationId,
    /// Its newest frame received.
    pub received_frame: u64,
    /// Its newest frame on stable storage.
    pub durable_frame: u64,
    /// Newest record on stable storage.
    pub durable_seq: u64,
    /// No point below this record exists any more.
    pub floor: u64,
    /// Oldest point that holds all disks.
    pub oldest: Option<u64>,
    /// Newest point that holds all disks.
    pub newest: Option<u64>,
    /// Newest cut held.
    pub newest_cut: u64,
    /// Cuts held.
    pub cuts: usize,
    /// Records kept from the oldest to the newest point that holds all disks: each is a point.
    pub records: u64,
    /// Stream time between oldest and newest record kept, nanoseconds.
    pub history: Nanos,
    /// Bytes of its segment files.
    pub journal_bytes: u64,
    /// Segments.
    pub segments: usize,
    /// Memory of the index, bytes.
    pub index_bytes: usize,
    /// Bytes of frames received since the start.
    pub received_bytes: u64,
    /// Frames received since the start.
    pub received_frames: u64,
    /// Segments folded into the images since the start.
    pub folded_segments: u64,
    /// History that was shortened below the policy's retention, and why, if it was.
    pub shortened: Option<String>,
    /// What was lost and still concerns a point.
    pub damage: Vec<Damage>,
    /// The verification of what is held.
    pub scrub: ScrubStatus,
    /// Why folding does not get on, if it does not.
    pub fold_error: Option<String>,
    /// Disks.
    pub disks: Vec<DiskStatus>,
    /// Open views.
    pub views: Vec<ViewStatus>,
}

/// An open view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewStatus {
    /// Name.
    pub name: String,
    /// Its point.
    pub seq: u64,
    /// Its delta's branch; NONE if it is read-only.
    pub timeline: TimelineId,
    /// Why it exists.
    pub kind: TimelineKind,
    /// Bytes of its delta's segments.
    pub delta_bytes: u64,
    /// Bytes of what was kept of its point when folding went past it.
    pub shelf_bytes: u64,
    /// Its delta cannot be written any more, and why.
    pub failed: Option<String>,
}

/// Something that happened by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// The stream is recovered: it takes connections and opens views.
    Ready {
        /// Stream.
        stream: StreamId,
    },
    /// The stream cannot be used.
    Failed {
        /// Stream.
        stream: StreamId,
        /// Why.
        why: String,
    },
    /// A source's connection carries frames.
    Connected {
        /// Stream.
        stream: StreamId,
        /// Writer.
        incarnation: IncarnationId,
    },
    /// It ended.
    Disconnected {
        /// Stream.
        stream: StreamId,
        /// Why.
        why: String,
    },
    /// History was shortened below the retention.
    Shortened {
        /// Stream.
        stream: StreamId,
        /// Oldest record that is left as a point.
        floor: u64,
        /// Why.
        why: String,
    },
    /// A view was given up: there was no room to keep its point beside folding.
    ViewLost {
        /// Stream.
        stream: StreamId,
        /// The view.
        view: String,
        /// Why.
        why: String,
    },
    /// The newest state needs nothing any more of what a loss had taken.
    Mended {
        /// Stream.
        stream: StreamId,
        /// The loss, as [`Damage::what`] has it.
        what: String,
    },
    /// What was taken for lost can be read again: nothing of it is.
    Regained {
        /// Stream.
        stream: StreamId,
        /// The loss, as [`Damage::what`] had it.
        what: String,
    },
    /// Something acknowledged cannot be read.
    Damaged {
        /// Stream.
        stream: StreamId,
        /// What.
        damage: Damage,
    },
}

/// How far a merge is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct MergeStatus {
    /// All of it is on stable storage.
    pub complete: bool,
    /// Looked at, bytes.
    pub done: u64,
    /// Bytes of the disks.
    pub total: u64,
    /// Written, bytes.
    pub written: u64,
}
