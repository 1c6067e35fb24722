//! What the owner of a source tells it: limits, groups, disks; and why it is refused.

use std::fmt;

use afterimage_wire::MAX_NAME;
use afterimage_wire::ids::{DiskId, StreamId};

use super::lease::{MAX_LEASE, MIN_LEASE};
use super::synchronous::{MAX_SYNC_DEADLINE, MIN_SYNC_DEADLINE};
use crate::io::{Class, Errno, Nanos};
use crate::seal::PolicyKey;

/// Most groups of one source.
pub const MAX_GROUPS: usize = 256;
/// Least bound of the speed of synchronisations, bytes a second: below it they would hardly ever end.
pub const MIN_SYNC_RATE: u64 = 64 << 10;
/// Most disks of one source, over all groups.
pub const MAX_SOURCE_DISKS: usize = 4096;

/// Bounds of a source; the defaults suit a machine with some GiB of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLimits {
    /// Bytes of buffers that the records of one group may hold, from the issue of a write until its frame is
    /// acknowledged. The pool must be clearly larger: see [`pool_classes`].
    pub queue_bytes: usize,
    /// Longest time that a write waits for room in the queue while the link works, before it passes uncaptured.
    pub max_wait: Nanos,
    /// A record leaves in a frame at the latest this long after it was numbered, if the link can take it.
    pub age_bound: Nanos,
    /// With fewer frames than this unacknowledged, a frame leaves at once. One keeps the frames of a lone writer from
    /// costing the target a durable write for each of its writes; on a long link [`Self::age_bound`] lets them leave.
    pub few_unacked: usize,
    /// Payload at which a frame is full, bytes; at most 1 MiB.
    pub frame_bytes: usize,
    /// Extents of 4 MiB whose intent bit may stay set although nothing holds it.
    pub hot_extents: usize,
    /// Part of the queue that synchronisation may fill, per cent.
    pub sync_share: usize,
    /// Most bytes a second that the synchronisations of one group read from its disks; 0: as fast as they can, with few
    /// reads at a time while a host has requests under way.
    pub sync_rate: u64,
    /// Longest time that a clean stop waits for acknowledgements.
    pub stop_wait: Nanos,
    /// A connection on which nothing was heard for this long is given up.
    pub link_silence: Nanos,
    /// Folder on a disk of this host in which frames queue when memory runs short, a folder below it for each stream.
    /// Empty: there is no spill, and what memory does not hold is compared when the link is back.
    pub spill_dir: String,
    /// Most bytes of spill files of one group.
    pub spill_bytes: u64,
    /// Bytes of one spill file.
    pub spill_segment_bytes: u64,
    /// Bytes that the spill leaves free on its file system, for whoever else needs them.
    pub spill_reserve_bytes: u64,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            queue_bytes: 256 << 20,
            max_wait: 20_000_000,
            age_bound: 1_000_000,
            few_unacked: 1,
            frame_bytes: 512 << 10,
            hot_extents: 64,
            sync_share: 25,
            sync_rate: 0,
            stop_wait: 5_000_000_000,
            link_silence: 10_000_000_000,
            spill_dir: String::new(),
            spill_bytes: 16 << 30,
            spill_segment_bytes: 64 << 20,
            spill_reserve_bytes: 0,
        }
    }
}

/// Classes of a pool that carries a queue of `queue_bytes` and what front ends and synchronisation need beside it.
pub fn pool_classes(queue_bytes: usize) -> Vec<Class> {
    let class = |capacity: usize, bytes: usize, least: usize| Class { capacity, count: (bytes / capacity).max(least) };
    vec![
        class(4 << 10, queue_bytes / 32, 256),
        class(16 << 10, queue_bytes / 2, 1024),
        class(80 << 10, queue_bytes / 4, 128),
        class(272 << 10, queue_bytes / 4, 64),
        class(528 << 10, queue_bytes / 4, 48),
        class(2 << 20, queue_bytes / 2, 16),
    ]
}

/// A group to protect: the disks that share one history.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// Its stream.
    pub stream: StreamId,
    /// Name, for people.
    pub name: String,
    /// Its disks; at least one.
    pub disks: Vec<DiskConfig>,
    /// Wraps the data keys.
    pub policy_key: PolicyKey,
    /// Time between two cuts.
    pub cut_interval: Nanos,
    /// Compress where it shrinks.
    pub compress: bool,
    /// Without a word from target or coordinator for this long, all I/O is held. 0: it goes on; else 3 s to an hour.
    pub lease: Nanos,
    /// A write is answered when the target has acknowledged it, or this long after. 0: at once; else 200 ms to a minute.
    pub sync_deadline: Nanos,
    /// Slots of disks that have left the group: each incarnation says so again.
    pub left: Vec<u16>,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskConfig {
    /// The disk.
    pub id: DiskId,
    /// Slot in its stream, never reused in it. Ignored by `serve`.
    pub slot: u16,
    /// Name of the export.
    pub name: String,
    /// Name in the history, which views carry; empty: as `name`. Ignored by `serve`.
    pub label: String,
    /// File or device.
    pub path: String,
    /// Write-intent log: a file beside it, made if missing. Ignored by `serve`.
    pub log_path: String,
    /// Witness of that log: a file in a place that is not copied and put back with it, made if missing. By it an older copy
    /// of the log is found out; empty: there is none, and it is not. Ignored by `serve`.
    pub witness_path: String,
    /// Serial that the host sees.
    pub serial: String,
    /// Logical block that the host sees, bytes; no less than the file's own, which it is if this is 0.
    pub block: u32,
    /// Generation under which this source writes. Ignored by `serve`.
    pub generation: u64,
    /// Refuse writes.
    pub read_only: bool,
    /// After a reboot or power loss of this host, nobody else has used the disk: what the log says is enough. Without
    /// it, a disk that was not stopped cleanly is compared in full after a reboot.
    pub trust_reboot: bool,
}

/// Why a disk or a group is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtectError {
    /// Another process has the disk or its log open, or the last I/O of a dead one has not ended. Try again.
    #[error("`{path}` is locked by another process (or by the last I/O of one that has ended)")]
    Locked {
        /// The file.
        path: String,
    },
    /// A file cannot be opened, made or read.
    #[error("`{path}`: cannot {action}: {errno}")]
    File {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// A value that is not allowed.
    #[error("`{field}` is {value}; allowed: {allowed}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: &'static str,
    },
    /// The stream is protected already.
    #[error("stream {0} is protected already")]
    Taken(StreamId),
    /// Another disk has this name, id, slot or path.
    #[error("two disks have the {what} `{value}`")]
    Twice {
        /// What they share.
        what: &'static str,
        /// Its value.
        value: String,
    },
}

/// When frames of a group may leave. By default always, as fast as the link takes them.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Most bytes a second, 0 for no bound; else at least 64 KiB.
    pub rate: u64,
    /// None now: they queue, in memory and then in the spill, as without a link. While the group is held for a failover
    /// neither this nor `rate` counts.
    pub closed: bool,
    /// The same, and a hold changes nothing of it.
    pub paused: bool,
    /// A group gives way to those with a higher one while they fall behind on the link.
    pub priority: u8,
    /// A group has fallen behind when it is worse than half of this RPO.
    pub rpo_target: Nanos,
}

fn refuse<T>(field: &'static str, value: impl fmt::Display, allowed: &'static str) -> Result<T, ProtectError> {
    Err(ProtectError::Value { field, value: value.to_string(), allowed })
}

pub(super) fn check_cut_interval(interval: Nanos) -> Result<(), ProtectError> {
    if !(10_000_000..=86_400_000_000_000).contains(&interval) {
        return refuse("cut_interval", interval, "10 ms to a day");
    }
    Ok(())
}

pub(super) fn check_pace(pace: &Pace) -> Result<(), ProtectError> {
    if pace.rate != 0 && pace.rate < MIN_SYNC_RATE {
        return refuse("rate", pace.rate, "0, or at least 65536 bytes a second");
    }
    Ok(())
}

pub(super) fn check_lease(lease: Nanos) -> Result<(), ProtectError> {
    if lease != 0 && !(MIN_LEASE..=MAX_LEASE).contains(&lease) {
        return refuse("lease", lease, "0 (none), or 3 s to an hour, in nanoseconds");
    }
    Ok(())
}

pub(super) fn check_sync_deadline(deadline: Nanos) -> Result<(), ProtectError> {
    if deadline != 0 && !(MIN_SYNC_DEADLINE..=MAX_SYNC_DEADLINE).contains(&deadline) {
        return refuse("sync_deadline", deadline, "0 (asynchronous), or 200 ms to a minute, in nanoseconds");
    }
    Ok(())
}

impl SourceLimits {
    /// Checks every bound.
    ///
    /// # Errors
    /// [`ProtectError::Value`] names the first that is out of range.
    pub fn check(&self) -> Result<(), ProtectError> {
        if self.queue_bytes < 4 << 20 {
            return refuse("queue_bytes", self.queue_bytes, "at least 4 MiB");
        }
        if !(4096..=1 << 20).contains(&self.frame_bytes) {
            return refuse("frame_bytes", self.frame_bytes, "4096 to 1048576");
        }
        if !(1..=100).contains(&self.sync_share) {
            return refuse("sync_share", self.sync_share, "1 to 100 per cent");
        }
        if self.sync_rate != 0 && self.sync_rate < MIN_SYNC_RATE {
            return refuse("sync_rate", self.sync_rate, "0, or at least 65536 bytes a second");
        }
        if self.few_unacked == 0 {
            return refuse("few_unacked", self.few_unacked, "at least 1");
        }
        if !self.spill_dir.is_empty() {
            if !(4 << 20..=1 << 30).contains(&self.spill_segment_bytes)
                || !self.spill_segment_bytes.is_multiple_of(afterimage_wire::ALIGN as u64)
            {
                let allowed = "4194304 to 1073741824, a multiple of 4096";
                return refuse("spill_segment_bytes", self.spill_segment_bytes, allowed);
            }
            if self.spill_bytes < 2 * self.spill_segment_bytes {
                return refuse("spill_bytes", self.spill_bytes, "at least two spill segments");
            }
        }
        Ok(())
    }
}

impl GroupConfig {
    /// Checks what can be checked without touching a file.
    ///
    /// # Errors
    /// [`ProtectError::Value`] or [`ProtectError::Twice`].
    pub fn check(&self) -> Result<(), ProtectError> {
        if self.stream.is_none() {
            return refuse("stream", self.stream, "a stream's id");
        }
        if self.disks.is_empty() || self.disks.len() > afterimage_wire::MAX_DISKS {
            return refuse("disks", self.disks.len(), "1 to 1024 disks");
        }
        check_cut_interval(self.cut_interval)?;
        check_lease(self.lease)?;
        check_sync_deadline(self.sync_deadline)?;
        if let Some(slot) = self.left.iter().find(|slot| self.disks.iter().any(|disk| disk.slot == **slot)) {
            return refuse("left", slot, "slots of none of the disks");
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.check()?;
            if disk.id.is_none() {
                return refuse("disk id", disk.id, "a disk's id");
            }
            if disk.log_path.is_empty() {
                return refuse("log_path", "empty", "a path");
            }
            for other in &self.disks[..index] {
                let twice =
                    |what, value: &dyn fmt::Display| Err(ProtectError::Twice { what, value: value.to_string() });
                if other.id == disk.id {
                    return twice("id", &disk.id);
                }
                if other.slot == disk.slot {
                    return twice("slot", &disk.slot);
                }
                if other.path == disk.path || other.log_path == disk.log_path {
                    return twice("path", &disk.path);
                }
            }
        }
        Ok(())
    }
}

impl DiskConfig {
    /// Checks what holds for every disk.
    ///
    /// # Errors
    /// [`ProtectError::Value`].
    pub(crate) fn check(&self) -> Result<(), ProtectError> {
        if self.name.is_empty() || self.name.len() > MAX_NAME {
            return refuse("disk name", &self.name, "1 to 255 bytes");
        }
        if self.label.len() > MAX_NAME {
            return refuse("disk label", &self.label, "at most 255 bytes");
        }
        if self.generation > afterimage_wire::MAX_NUMBER {
            return refuse("generation", self.generation, "at most 2^63 - 1");
        }
        if self.serial.len() > MAX_NAME {
            return refuse("serial", &self.serial, "at most 255 bytes");
        }
        if self.path.is_empty() {
            return refuse("path", "empty", "a path");
        }
        Ok(())
    }
}
