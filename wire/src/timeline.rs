//! The timeline table: the branches of a stream's history at a target, and who may write each disk.
//!
//! A file that is replaced as a whole (write, sync, rename, sync the folder). The generations in it only ever rise.
//!
//! ```text
//!   0  magic "AITL"   4 version u16   6 reserved u16   8 crc u32 (with this field 0)   12 length u32
//!  16  stream [16]   32 current timeline [16]
//!  48  fold_floor u64       no restore point below this record number exists any more
//!  56  timeline_count u16, disk_count u16, fence_count u16, reserved u16
//!  64  timelines, then disks, then fences, oldest first
//! ```

use bytes::{Buf, BufMut};

use crate::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use crate::record::DiskInfo;
use crate::{FormatError, MAX_DISKS, MAX_NAME, WIRE_VERSION, finished, get_id, get_number, get_str, need, put_str};

/// First bytes of the table.
pub const TIMELINE_MAGIC: [u8; 4] = *b"AITL";
/// Most branches of one stream.
pub const MAX_TIMELINES: usize = 4096;
/// Most fences remembered; the oldest are forgotten.
pub const MAX_FENCES: usize = 256;

/// Why a branch exists.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum TimelineKind {
    /// Written by the source.
    Source = 1,
    /// The delta of a failover: the replica writes it.
    Failover = 2,
    /// The delta of a view or test, given up when that ends.
    View = 3,
    /// Fenced: what its writer still sent, kept until commit or release.
    Losing = 4,
}

/// A branch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timeline {
    /// Its id.
    pub id: TimelineId,
    /// The branch it forks from; NONE for the first.
    pub parent: TimelineId,
    /// It holds everything of the parent up to and with this record number.
    pub fork_seq: u64,
    /// Why it exists.
    pub kind: TimelineKind,
    /// When it was made, the target's wall clock, nanoseconds since the Unix epoch.
    pub created_wall_ns: u64,
    /// For a person: the operation or view that made it.
    pub reason: String,
}

/// A disk and its fencing number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskGeneration {
    /// The disk.
    pub disk: DiskInfo,
    /// Generation; only ever rises.
    pub generation: u64,
    /// Branch that this generation writes.
    pub timeline: TimelineId,
    /// The disk is in the stream (joined, not left).
    pub member: bool,
}

/// A fence: from here on nothing that an older generation of these disks sends is acknowledged. What its writer had on
/// its way belongs to the losing branch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fence {
    /// The generation that was issued; every older one is fenced.
    pub generation: u64,
    /// Newest durable record when it was issued. Later records of the same writer are the losing branch.
    pub seq: u64,
    /// Newest writer then; NONE if there was none.
    pub incarnation: IncarnationId,
    /// When, the target's wall clock, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
    /// No answered write was missing here at that moment, as a synchronous source had promised. Else nobody knows.
    pub zero_loss: bool,
    /// The disks.
    pub disks: Vec<DiskId>,
    /// For a person.
    pub reason: String,
}

/// The table, taken apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TimelineTable {
    /// Stream.
    pub stream: StreamId,
    /// Branch that the source writes.
    pub current: TimelineId,
    /// No restore point below this record number exists any more.
    pub fold_floor: u64,
    /// Branches.
    pub timelines: Vec<Timeline>,
    /// Disks.
    pub disks: Vec<DiskGeneration>,
    /// Fences, oldest first; at most [`MAX_FENCES`].
    pub fences: Vec<Fence>,
}

impl TimelineTable {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(&TIMELINE_MAGIC);
        out.put_u16_le(WIRE_VERSION);
        out.put_u16_le(0);
        out.put_u64_le(0); // CRC and length, below
        out.put_slice(&self.stream.0);
        out.put_slice(&self.current.0);
        out.put_u64_le(self.fold_floor);
        out.put_u16_le(self.timelines.len() as u16);
        out.put_u16_le(self.disks.len() as u16);
        out.put_u16_le(self.fences.len() as u16);
        out.put_u16_le(0);
        for t in &self.timelines {
            out.put_slice(&t.id.0);
            out.put_slice(&t.parent.0);
            out.put_u64_le(t.fork_seq);
            out.put_u64_le(t.created_wall_ns);
            out.put_u8(t.kind as u8);
            put_str(&mut out, &t.reason);
        }
        for d in &self.disks {
            d.disk.encode(&mut out);
            out.put_u64_le(d.generation);
            out.put_slice(&d.timeline.0);
            out.put_u8(d.member.into());
        }
        for f in &self.fences {
            out.put_u64_le(f.generation);
            out.put_u64_le(f.seq);
            out.put_slice(&f.incarnation.0);
            out.put_u64_le(f.wall_ns);
            out.put_u8(f.zero_loss.into());
            put_str(&mut out, &f.reason);
            out.put_u16_le(f.disks.len() as u16);
            for disk in &f.disks {
                out.put_slice(&disk.0);
            }
        }
        crate::close_table(&mut out);
        out
    }

    /// Reads a table; what follows its length is ignored (a padded file).
    ///
    /// # Errors
    /// Foreign, damaged, of another version, or senseless.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "timeline table";
        let bad = |detail| FormatError::Malformed { what: WHAT, detail };
        let bytes = crate::open_table(bytes, TIMELINE_MAGIC, WHAT)?;
        let mut input = &bytes[16..];
        let stream = StreamId(get_id(&mut input, WHAT)?);
        let current = TimelineId(get_id(&mut input, WHAT)?);
        let fold_floor = get_number(&mut input, WHAT)?;
        let timeline_count = usize::from(input.get_u16_le());
        let disk_count = usize::from(input.get_u16_le());
        let fence_count = usize::from(input.get_u16_le());
        if input.get_u16_le() != 0 {
            return Err(bad("reserved bits set"));
        }
        if timeline_count > MAX_TIMELINES || disk_count > MAX_DISKS || fence_count > MAX_FENCES {
            return Err(bad("too many entries"));
        }
        let mut timelines = Vec::with_capacity(timeline_count);
        for _ in 0..timeline_count {
            need(&input, 49, WHAT)?;
            let id = TimelineId(get_id(&mut input, WHAT)?);
            let parent = TimelineId(get_id(&mut input, WHAT)?);
            let fork_seq = get_number(&mut input, WHAT)?;
            let created_wall_ns = input.get_u64_le();
            let kind = match input.get_u8() {
                1 => TimelineKind::Source,
                2 => TimelineKind::Failover,
                3 => TimelineKind::View,
                4 => TimelineKind::Losing,
                other => return Err(FormatError::UnknownKind { what: "timeline", value: other.into() }),
            };
            let reason = get_str(&mut input, WHAT, MAX_NAME)?;
            timelines.push(Timeline { id, parent, fork_seq, kind, created_wall_ns, reason });
        }
        let mut disks = Vec::with_capacity(disk_count);
        for _ in 0..disk_count {
            let disk = DiskInfo::read(&mut input)?;
            need(&input, 25, WHAT)?;
            let generation = get_number(&mut input, WHAT)?;
            let timeline = TimelineId(get_id(&mut input, WHAT)?);
            let member = match input.get_u8() {
                0 => false,
                1 => true,
                _ => return Err(bad("unknown bits")),
            };
            disks.push(DiskGeneration { disk, generation, timeline, member });
        }
        let mut fences = Vec::with_capacity(fence_count);
        for _ in 0..fence_count {
            need(&input, 41, WHAT)?;
            let (generation, seq) = (get_number(&mut input, WHAT)?, get_number(&mut input, WHAT)?);
            let incarnation = IncarnationId(get_id(&mut input, WHAT)?);
            let wall_ns = get_number(&mut input, WHAT)?;
            need(&input, 1, WHAT)?;
            let zero_loss = match input.get_u8() {
                0 => false,
                1 => true,
                _ => return Err(bad("unknown bits")),
            };
            let reason = get_str(&mut input, WHAT, MAX_NAME)?;
            need(&input, 2, WHAT)?;
            let count = usize::from(input.get_u16_le());
            if count > MAX_DISKS {
                return Err(bad("too many disks"));
            }
            let disks = (0..count).map(|_| get_id(&mut input, WHAT).map(DiskId)).collect::<Result<_, _>>()?;
            fences.push(Fence { generation, seq, incarnation, wall_ns, zero_loss, disks, reason });
        }
        finished(&input, WHAT)?;
        Ok(Self { stream, current, fold_floor, timelines, disks, fences })
    }

    /// The entry of a disk.
    pub fn disk(&self, id: DiskId) -> Option<&DiskGeneration> {
        self.disks.iter().find(|d| d.disk.id == id)
    }

    /// The entry of a branch.
    pub fn timeline(&self, id: TimelineId) -> Option<&Timeline> {
        self.timelines.iter().find(|t| t.id == id)
    }
}
