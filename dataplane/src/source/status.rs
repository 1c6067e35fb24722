//! What a source says of itself: events for its owner, status for whoever asks.

use afterimage_wire::handshake::{Hello, Refusal};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId};

use crate::host::DiskKey;
use crate::io::Nanos;

pub use crate::rpo::RpoSummary;

/// What the owner of a source has to know or to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Connect to the target, say this, and answer with `linked` or `link_failed`. Asked once per attempt.
    Connect {
        /// The stream.
        stream: StreamId,
        /// What to say.
        hello: Box<Hello>,
    },
    /// The target holds a newer generation: the disk (or all of the group) has left the stream, and its I/O is held.
    Fenced {
        /// The stream.
        stream: StreamId,
        /// The disk, if the target named it.
        disk: Option<DiskId>,
        /// The generation that the target holds.
        generation: u64,
    },
    /// All I/O of a group is held from now on, or (none) is not any more.
    Held {
        /// The stream.
        stream: StreamId,
        /// Why.
        reason: Option<HoldReason>,
    },
    /// Synchronous mode has begun or ended for the time being.
    Synchronous {
        /// The stream.
        stream: StreamId,
        /// No answered write is missing at the target.
        together: bool,
        /// Why writes are answered without waiting, or soon will be.
        why: Option<String>,
    },
    /// A disk has left its stream and is closed.
    Left {
        /// The stream.
        stream: StreamId,
        /// The disk.
        disk: DiskId,
        /// The target holds the record that says so.
        acknowledged: bool,
    },
    /// The state of a group is another.
    State {
        /// The stream.
        stream: StreamId,
        /// From now on.
        state: GroupState,
    },
    /// A synchronisation has begun.
    SyncBegun {
        /// The stream.
        stream: StreamId,
        /// The disk.
        disk: DiskId,
        /// All of it.
        whole: bool,
    },
    /// The end of a synchronisation is acknowledged.
    SyncEnded {
        /// The stream.
        stream: StreamId,
        /// The disk.
        disk: DiskId,
        /// All of it.
        whole: bool,
    },
    /// A cut was taken for [`crate::source::Source::label_cut`].
    CutTaken {
        /// The stream.
        stream: StreamId,
        /// Number of the cut.
        cut: u64,
        /// Its record.
        seq: u64,
        /// As given.
        label: String,
    },
    /// The wall clock jumped against the monotonic one.
    ClockJump {
        /// The stream whose cut noticed it.
        stream: StreamId,
        /// Forward if positive, nanoseconds.
        by: i64,
    },
    /// A disk or its log failed an operation.
    DiskFault {
        /// The disk.
        disk: DiskId,
        /// For a person.
        message: String,
    },
    /// A group is on another rung of the ladder.
    Rung {
        /// The stream.
        stream: StreamId,
        /// From now on.
        rung: Rung,
    },
    /// The spill failed an operation, or could not be read back: what it held is compared then.
    SpillFault {
        /// The stream.
        stream: StreamId,
        /// For a person.
        message: String,
    },
    /// A group has stopped and its files are closed.
    Stopped {
        /// The stream.
        stream: StreamId,
        /// Everything was acknowledged, or is whole in the spill; the next start owes no synchronisation.
        clean: bool,
    },
}

/// Why all I/O of a group is held.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum HoldReason {
    /// Its owner said so: a failover is taking it from here.
    Told,
    /// The target holds a newer generation (or says that some disk was fenced): the machine may run elsewhere.
    SteppedDown,
    /// No word from target or coordinator for longer than the policy's lease.
    Lease,
}

/// Synchronous mode now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncModeStatus {
    /// How long a write waits for its acknowledgement at most.
    pub deadline: Nanos,
    /// No answered write is missing at the target.
    pub together: bool,
    /// Why writes are answered without waiting, or soon will be.
    pub why: Option<String>,
}

/// Why a connection attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkFailure {
    /// The target said no.
    Refused(Refusal, String),
    /// It could not be reached, or the handshake broke.
    Unreachable(String),
}

/// Where a group stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupState {
    /// Its logs are being made ready; host I/O waits.
    Opening,
    /// No connection yet or any more; why, if known.
    Unlinked(String),
    /// Connected; what waited in the spill is being shipped.
    CatchingUp,
    /// Connected; at least one disk is being synchronised.
    Syncing,
    /// Connected, every disk complete.
    Protected,
    /// The target refuses the stream: an operator is needed.
    Refused(Refusal, String),
    /// A newer generation exists.
    Fenced {
        /// That generation.
        generation: u64,
    },
    /// Stopping.
    Stopping,
}

/// How far up the ladder a group is: where its records wait, and what happens to new ones.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Rung {
    /// Room for everything.
    #[default]
    Normal,
    /// Frames queue in the spill: memory is short, or the link is behind. No restore point is lost.
    Spilling,
    /// Compression is off to seal faster.
    Uncompressed,
    /// Writes wait for room.
    Waiting,
    /// Writes pass uncaptured into the dirty map.
    Dirty,
}

/// Progress of a synchronisation.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct SyncProgress {
    /// The whole disk (else what was in doubt).
    pub whole: bool,
    /// Bytes compared or sent.
    pub done: u64,
    /// Bytes in all, as known now.
    pub total: u64,
    /// Bytes of the disk that were compared by hash since it began in this life.
    pub compared: u64,
    /// Bytes of the disk that were sent: what differed.
    pub sent: u64,
    /// How long the rest will take at the present speed, if that can be said.
    pub left: Option<Nanos>,
}

/// A disk now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskStatus {
    /// Its key.
    pub key: DiskKey,
    /// The disk.
    pub id: DiskId,
    /// Name of its export.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Generation under which it is written.
    pub generation: u64,
    /// It is not in the stream any more: fenced by this generation, or leaving (0).
    pub out: Option<u64>,
    /// Requests under way.
    pub in_flight: usize,
    /// Intent bits set.
    pub hot_extents: usize,
    /// Extents in the dirty map.
    pub dirty_extents: usize,
    /// Its synchronisation, if one runs.
    pub sync: Option<SyncProgress>,
    /// Writes the disk failed.
    pub failed_writes: u64,
    /// A sync of the disk has failed: flushes are refused until it is opened anew.
    pub sync_failed: bool,
}

/// A group now. Counters are since the source was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// Stream.
    pub stream: StreamId,
    /// Name.
    pub name: String,
    /// State.
    pub state: GroupState,
    /// Ladder.
    pub rung: Rung,
    /// All I/O is held, and why.
    pub held: Option<HoldReason>,
    /// Length of its lease; 0 if it needs none.
    pub lease: Nanos,
    /// What is left of it.
    pub lease_left: Nanos,
    /// Synchronous mode, if the policy wants it.
    pub synchronous: Option<SyncModeStatus>,
    /// This life.
    pub incarnation: IncarnationId,
    /// The policy key that it is wrapped under.
    pub policy_key: PolicyKeyId,
    /// Newest number drawn.
    pub captured_seq: u64,
    /// Newest number in a sealed frame.
    pub sealed_seq: u64,
    /// Newest number handed to the network.
    pub sent_seq: u64,
    /// Newest number acknowledged as durable.
    pub acked_seq: u64,
    /// Newest cut.
    pub cut: u64,
    /// Records captured.
    pub records: u64,
    /// Writes that passed uncaptured.
    pub uncaptured: u64,
    /// Bytes captured.
    pub captured_bytes: u64,
    /// Bytes sealed for the wire.
    pub wire_bytes: u64,
    /// Frames sealed.
    pub frames: u64,
    /// Buffer bytes that the queue holds.
    pub queue_bytes: usize,
    /// Its bound.
    pub queue_limit: usize,
    /// Bytes of spill files.
    pub spill_bytes: u64,
    /// Their bound; 0 without a spill.
    pub spill_limit: u64,
    /// Why the spill takes nothing at the moment.
    pub spill_trouble: Option<String>,
    /// When, as it looks now, everything that waits will be acknowledged: after so long. None if that cannot be said:
    /// there is no link, or the backlog does not shrink.
    pub catch_up: Option<Nanos>,
    /// Age of the oldest write that is in no durable restore point.
    pub rpo_now: Nanos,
    /// RPO over time.
    pub rpo: RpoSummary,
    /// Disks.
    pub disks: Vec<DiskStatus>,
}
