//! What a target keeps of a stream beside its segments and its timeline table: the disks as of the fold floor, the
//! writers that are known, and the views that have a delta.
//!
//! A file that is replaced as a whole (write, sync, rename, sync the folder), before the timeline table is.
//!
//! ```text
//!   0  magic "AISS"   4 version u16   6 reserved u16   8 crc u32 (with this field 0)   12 length u32
//!  16  stream [16]
//!  32  floor u64              the state below is that after this record
//!  40  newest_cut u64         number of the newest cut at the floor
//!  48  disk_count u16, incarnation_count u16, view_count u16, reserved u16, unreadable_count u32, reserved u32
//!  64  disks: DiskInfo, bits u8 (1 member, 2 owes a whole synchronisation), open count u8,
//!             open synchronisations: number u64, bits u8 (1 whole, 2 history was lost since its begin)
//!   …  incarnations [16] each, oldest first
//!   …  views: timeline [16], seq u64, kind u8, bits u8 (1 being removed), name, count u16, disks [16] each
//!   …  unreadable ranges of the replica images: slot u16, offset u64, length u64
//! ```

use bytes::{Buf, BufMut};

use crate::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use crate::record::DiskInfo;
use crate::timeline::TimelineKind;
use crate::{FormatError, MAX_DISKS, MAX_NAME, WIRE_VERSION, finished, get_id, get_number, get_str, need, put_str};

/// First bytes.
pub const STATE_MAGIC: [u8; 4] = *b"AISS";
/// Most writers remembered; older ones are forgotten.
pub const MAX_INCARNATIONS: usize = 4096;
/// Most views with a delta.
pub const MAX_DELTAS: usize = 1024;
/// Most unreadable ranges of the images of a stream; beyond it neighbours are joined.
pub const MAX_UNREADABLE: usize = 65536;

/// A synchronisation that was begun and has not ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct OpenSync {
    /// Its number.
    pub sync: u64,
    /// Of the whole disk.
    pub whole: bool,
    /// History was lost since it began: its end does not make the disk whole.
    pub tainted: bool,
}

/// A disk of a stream at some place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskLife {
    /// What it is.
    pub info: DiskInfo,
    /// It is in the stream.
    pub member: bool,
    /// Only a whole synchronisation makes it a restore point again.
    pub owes_whole: bool,
    /// Synchronisations under way.
    pub open: Vec<OpenSync>,
}

/// A view with a delta.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeltaView {
    /// The delta's branch.
    pub timeline: TimelineId,
    /// Its base: the state after this record.
    pub seq: u64,
    /// Why it exists.
    pub kind: TimelineKind,
    /// It is being removed: its segments may be gone in part.
    pub removing: bool,
    /// Name.
    pub name: String,
    /// Its disks.
    pub disks: Vec<DiskId>,
}

/// A range of a replica image whose bytes are unknown.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct UnreadableRange {
    /// Slot of the disk.
    pub slot: u16,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The file, taken apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StreamStateFile {
    /// Stream.
    pub stream: StreamId,
    /// Record after which the rest holds.
    pub floor: u64,
    /// Number of the newest cut at the floor.
    pub newest_cut: u64,
    /// Disks, by slot.
    pub disks: Vec<DiskLife>,
    /// Writers known, oldest first.
    pub incarnations: Vec<IncarnationId>,
    /// Views with a delta.
    pub views: Vec<DeltaView>,
    /// Unreadable ranges of the images.
    pub unreadable: Vec<UnreadableRange>,
}

impl StreamStateFile {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(&STATE_MAGIC);
        out.put_u16_le(WIRE_VERSION);
        out.put_u16_le(0);
        out.put_u64_le(0); // CRC and length, below
        out.put_slice(&self.stream.0);
        out.put_u64_le(self.floor);
        out.put_u64_le(self.newest_cut);
        out.put_u16_le(self.disks.len() as u16);
        out.put_u16_le(self.incarnations.len() as u16);
        out.put_u16_le(self.views.len() as u16);
        out.put_u16_le(0);
        out.put_u32_le(self.unreadable.len() as u32);
        out.put_u32_le(0);
        for disk in &self.disks {
            disk.info.encode(&mut out);
            out.put_u8(u8::from(disk.member) | u8::from(disk.owes_whole) << 1);
            out.put_u8(disk.open.len() as u8);
            for open in &disk.open {
                out.put_u64_le(open.sync);
                out.put_u8(u8::from(open.whole) | u8::from(open.tainted) << 1);
            }
        }
        for incarnation in &self.incarnations {
            out.put_slice(&incarnation.0);
        }
        for view in &self.views {
            out.put_slice(&view.timeline.0);
            out.put_u64_le(view.seq);
            out.put_u8(view.kind as u8);
            out.put_u8(view.removing.into());
            put_str(&mut out, &view.name);
            out.put_u16_le(view.disks.len() as u16);
            for disk in &view.disks {
                out.put_slice(&disk.0);
            }
        }
        for range in &self.unreadable {
            out.put_u16_le(range.slot);
            out.put_u64_le(range.offset);
            out.put_u64_le(range.len);
        }
        crate::close_table(&mut out);
        out
    }

    /// Reads the file; what follows its length is ignored (a padded file).
    ///
    /// # Errors
    /// Foreign, damaged, of another version, or senseless.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "stream state";
        let bad = |detail| FormatError::Malformed { what: WHAT, detail };
        let bytes = crate::open_table(bytes, STATE_MAGIC, WHAT)?;
        let mut input = &bytes[16..];
        let stream = StreamId(get_id(&mut input, WHAT)?);
        let floor = get_number(&mut input, WHAT)?;
        let newest_cut = get_number(&mut input, WHAT)?;
        let disk_count = usize::from(input.get_u16_le());
        let incarnation_count = usize::from(input.get_u16_le());
        let view_count = usize::from(input.get_u16_le());
        input.advance(2);
        let unreadable_count = input.get_u32_le() as usize;
        input.advance(4);
        if disk_count > MAX_DISKS
            || incarnation_count > MAX_INCARNATIONS
            || view_count > MAX_DELTAS
            || unreadable_count > MAX_UNREADABLE
        {
            return Err(bad("too many entries"));
        }
        let flag = |bits: u8, bit: u8| bits & bit != 0;
        let mut disks = Vec::with_capacity(disk_count);
        for _ in 0..disk_count {
            let info = DiskInfo::read(&mut input)?;
            need(&input, 2, WHAT)?;
            let bits = input.get_u8();
            let mut open = Vec::new();
            for _ in 0..input.get_u8() {
                need(&input, 9, WHAT)?;
                let sync = get_number(&mut input, WHAT)?;
                let bits = input.get_u8();
                if bits & !3 != 0 {
                    return Err(bad("unknown bits"));
                }
                open.push(OpenSync { sync, whole: flag(bits, 1), tainted: flag(bits, 2) });
            }
            if bits & !3 != 0 {
                return Err(bad("unknown bits"));
            }
            disks.push(DiskLife { info, member: flag(bits, 1), owes_whole: flag(bits, 2), open });
        }
        let mut incarnations = Vec::with_capacity(incarnation_count);
        for _ in 0..incarnation_count {
            incarnations.push(IncarnationId(get_id(&mut input, WHAT)?));
        }
        let mut views = Vec::with_capacity(view_count);
        for _ in 0..view_count {
            let timeline = TimelineId(get_id(&mut input, WHAT)?);
            need(&input, 10, WHAT)?;
            let seq = get_number(&mut input, WHAT)?;
            let kind = match input.get_u8() {
                2 => TimelineKind::Failover,
                3 => TimelineKind::View,
                other => return Err(FormatError::UnknownKind { what: "view", value: other.into() }),
            };
            let removing = match input.get_u8() {
                0 => false,
                1 => true,
                _ => return Err(bad("unknown bits")),
            };
            let name = get_str(&mut input, WHAT, MAX_NAME)?;
            need(&input, 2, WHAT)?;
            let count = usize::from(input.get_u16_le());
            if count > MAX_DISKS {
                return Err(bad("too many disks"));
            }
            let disks = (0..count).map(|_| get_id(&mut input, WHAT).map(DiskId)).collect::<Result<_, _>>()?;
            views.push(DeltaView { timeline, seq, kind, removing, name, disks });
        }
        let mut unreadable = Vec::with_capacity(unreadable_count);
        for _ in 0..unreadable_count {
            need(&input, 18, WHAT)?;
            let slot = input.get_u16_le();
            let (offset, len) = (input.get_u64_le(), input.get_u64_le());
            if offset.checked_add(len).is_none() {
                return Err(bad("range past the end of the address space"));
            }
            unreadable.push(UnreadableRange { slot, offset, len });
        }
        finished(&input, WHAT)?;
        Ok(Self { stream, floor, newest_cut, disks, incarnations, views, unreadable })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> StreamStateFile {
        let info = DiskInfo {
            slot: 3,
            id: DiskId([7; 16]),
            size: 1 << 20,
            block: 512,
            physical_block: 4096,
            serial: "s".into(),
            name: "root".into(),
        };
        let open =
            vec![OpenSync { sync: 5, whole: true, tainted: false }, OpenSync { sync: 6, whole: false, tainted: true }];
        StreamStateFile {
            stream: StreamId([1; 16]),
            floor: 99,
            newest_cut: 4,
            disks: vec![DiskLife { info, member: true, owes_whole: true, open }],
            incarnations: vec![IncarnationId([2; 16]), IncarnationId([3; 16])],
            views: vec![DeltaView {
                timeline: TimelineId([4; 16]),
                seq: 120,
                kind: TimelineKind::Failover,
                removing: true,
                name: "db".into(),
                disks: vec![DiskId([7; 16])],
            }],
            unreadable: vec![UnreadableRange { slot: 3, offset: 4096, len: 512 }],
        }
    }

    #[test]
    fn decodes_what_it_encodes() {
        let state = sample();
        let mut bytes = state.encode();
        assert_eq!(StreamStateFile::decode(&bytes).unwrap(), state);
        bytes.resize(8192, 0);
        assert_eq!(StreamStateFile::decode(&bytes).unwrap(), state, "padding is ignored");
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            assert!(StreamStateFile::decode(&changed).is_err(), "byte {at}");
            assert!(StreamStateFile::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
