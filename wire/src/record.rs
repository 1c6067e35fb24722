//! A record: one captured event of a stream, with its number and its times.
//!
//! A record is a fixed 56-byte entry in its chunk's table; what it carries (the data of a write, the body of a cut)
//! is its *payload* in the same chunk. Records of a stream are numbered without gaps within an incarnation, and a
//! number is drawn when the disk has completed the write and before the host is told: a prefix of the stream is a
//! state that the disks could have had at a power cut.

use bytes::{Buf, BufMut};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::DiskId;
use crate::{FormatError, MAX_NAME};

/// What a record says. Unknown kinds are refused ([`FormatError::UnknownKind`]), never skipped.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// `len` bytes at `offset` of the disk became the payload.
    Write = 1,
    /// `len` bytes at `offset` became zeros. No payload.
    Zero = 2,
    /// As [`RecordKind::Zero`], and the host no longer needs them: the replica may unmap them. No payload.
    Discard = 3,
    /// A place is named: payload is a [`Cut`]. `disk` is 0.
    Cut = 4,
    /// A disk joins the stream in slot `disk`: payload is a [`DiskInfo`].
    Join = 5,
    /// The disk in slot `disk` leaves the stream. No payload.
    Leave = 6,
    /// A write over this range failed on the source, or the range cannot be read: its bytes are unknown. No payload.
    Unreadable = 7,
    /// A synchronisation of the disk begins: points between here and its end do not hold this disk. Payload: a
    /// [`SyncMark`].
    SyncBegin = 8,
    /// As [`RecordKind::Write`], read from the source disk by a synchronisation.
    SyncWrite = 9,
    /// As [`RecordKind::Zero`], found by a synchronisation.
    SyncZero = 10,
    /// Keyed hashes of a range, for comparing both ends at the same place: one of [`HASH_LEN`] bytes for each
    /// [`HASH_STEP`] bytes of the range, at most [`MAX_HASHES`]. The target answers each such record with a
    /// [`crate::control::Control::Compared`]. Payload: the hashes.
    SyncHash = 11,
    /// The synchronisation of the disk is complete at this place. Payload: a [`SyncMark`].
    SyncEnd = 12,
    /// The writer ended cleanly: nothing follows in this incarnation. Payload: 32-byte running digest of the stream,
    /// or nothing.
    End = 13,
    /// The disk in slot `disk` changed its size: payload is the new [`DiskInfo`].
    Resize = 14,
}

impl RecordKind {
    /// The kind with this number.
    pub fn from_u8(value: u8) -> Result<Self, FormatError> {
        use RecordKind::*;
        Ok(match value {
            1 => Write,
            2 => Zero,
            3 => Discard,
            4 => Cut,
            5 => Join,
            6 => Leave,
            7 => Unreadable,
            8 => SyncBegin,
            9 => SyncWrite,
            10 => SyncZero,
            11 => SyncHash,
            12 => SyncEnd,
            13 => End,
            14 => Resize,
            _ => return Err(FormatError::UnknownKind { what: "record", value: value.into() }),
        })
    }

    /// True if applying the record changes bytes of a disk.
    pub fn changes_disk(self) -> bool {
        use RecordKind::*;
        matches!(self, Write | Zero | Discard | SyncWrite | SyncZero)
    }

    /// True if the record's range becomes zeros.
    pub fn is_zero(self) -> bool {
        use RecordKind::*;
        matches!(self, Zero | Discard | SyncZero)
    }
}

/// Bytes of a disk that one keyed hash of a [`RecordKind::SyncHash`] stands for; the last one may stand for fewer.
pub const HASH_STEP: u32 = 4096;
/// Bytes of one keyed hash: HMAC-SHA-256 under a key of the stream, cut to 128 bits.
pub const HASH_LEN: usize = 16;
/// Most hashes in one record: an answer has a bit for each.
pub const MAX_HASHES: usize = 64;

/// Hashes that a range of `len` bytes has.
pub const fn hashes(len: u32) -> usize {
    len.div_ceil(HASH_STEP) as usize
}

/// A record in the table of a chunk. 56 bytes, little-endian.
#[derive(Copy, Clone, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawRecord {
    /// Number in the stream.
    pub seq: U64,
    /// Byte offset on the disk.
    pub offset: U64,
    /// Source's monotonic clock at completion, nanoseconds.
    pub mono_ns: U64,
    /// Source's wall clock as read, nanoseconds since the Unix epoch. For people: order is by number alone.
    pub wall_ns: U64,
    /// Bytes of the disk that the record covers (a write, zero, discard, hash), else 0.
    pub len: U32,
    /// Where the payload begins in the chunk's plain payload.
    pub payload_at: U32,
    /// Bytes of payload.
    pub payload_len: U32,
    /// CRC32C of the payload before compression.
    pub crc: U32,
    /// Slot of the disk in the stream.
    pub disk: U16,
    /// [`RecordKind`].
    pub kind: u8,
    /// Reserved, 0.
    pub flags: u8,
    /// Reserved, 0.
    pub reserved: U32,
}

/// Bytes of one [`RawRecord`].
pub const RECORD_LEN: usize = 56;
const _: () = assert!(size_of::<RawRecord>() == RECORD_LEN);

/// A record taken apart.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Number in the stream.
    pub seq: u64,
    /// What happened.
    pub kind: RecordKind,
    /// Slot of the disk in the stream.
    pub disk: u16,
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes of the disk.
    pub len: u32,
    /// Source's monotonic clock, nanoseconds.
    pub mono_ns: u64,
    /// Source's wall clock, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
    /// Where the payload begins in the chunk's plain payload, and its length.
    pub payload_at: u32,
    /// Bytes of payload.
    pub payload_len: u32,
    /// CRC32C of the payload.
    pub crc: u32,
}

impl Record {
    /// The bytes of this record in a chunk's table.
    pub fn to_raw(&self) -> RawRecord {
        RawRecord {
            seq: self.seq.into(),
            offset: self.offset.into(),
            mono_ns: self.mono_ns.into(),
            wall_ns: self.wall_ns.into(),
            len: self.len.into(),
            payload_at: self.payload_at.into(),
            payload_len: self.payload_len.into(),
            crc: self.crc.into(),
            disk: self.disk.into(),
            kind: self.kind as u8,
            flags: 0,
            reserved: 0.into(),
        }
    }

    /// Takes a table entry apart.
    ///
    /// # Errors
    /// An unknown kind, a reserved field that is not 0, a range past the end of the address space, or a payload
    /// that does not fit the kind.
    pub fn from_raw(raw: &RawRecord) -> Result<Self, FormatError> {
        let kind = RecordKind::from_u8(raw.kind)?;
        let record = Self {
            seq: crate::bounded(raw.seq.get(), "record")?,
            kind,
            disk: raw.disk.get(),
            offset: raw.offset.get(),
            len: raw.len.get(),
            mono_ns: raw.mono_ns.get(),
            wall_ns: raw.wall_ns.get(),
            payload_at: raw.payload_at.get(),
            payload_len: raw.payload_len.get(),
            crc: raw.crc.get(),
        };
        let bad = |what| Err(FormatError::Malformed { what: "record", detail: what });
        if raw.flags != 0 || raw.reserved.get() != 0 {
            return bad("reserved bits set");
        }
        if record.offset.checked_add(record.len.into()).is_none() {
            return bad("range past the end of the address space");
        }
        use RecordKind::*;
        match kind {
            Write | SyncWrite if record.payload_len != record.len || record.len == 0 => {
                bad("payload is not as long as the write")
            }
            Zero | Discard | SyncZero | Leave | Unreadable if record.payload_len != 0 => {
                bad("payload where none may be")
            }
            SyncHash
                if record.len == 0
                    || hashes(record.len) > MAX_HASHES
                    || record.payload_len as usize != hashes(record.len) * HASH_LEN =>
            {
                bad("not one hash for each step of the range")
            }
            _ => Ok(record),
        }
    }

    /// First byte past the range.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

/// Payload of a cut: a named place.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cut {
    /// Rises by one with each cut of the stream, over incarnations too.
    pub number: u64,
    /// The source's clock was synchronised (as the kernel says) when it was read.
    pub clock_synced: bool,
    /// Every write that was answered before the cut had been flushed.
    pub flush_clean: bool,
    /// Label of an application-consistent hook or of the operator; empty for an ordinary cut.
    pub label: String,
}

impl Cut {
    /// Appends the payload.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64_le(self.number);
        out.put_u8(u8::from(self.clock_synced) | u8::from(self.flush_clean) << 1);
        crate::put_str(out, &self.label);
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// Too short, too long, unknown bits, or a label that is no UTF-8 or longer than [`MAX_NAME`] bytes.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, FormatError> {
        let input = &mut bytes;
        crate::need(input, 9, "cut")?;
        let number = crate::get_number(input, "cut")?;
        let bits = input.get_u8();
        if bits & !3 != 0 {
            return Err(FormatError::Malformed { what: "cut", detail: "unknown bits" });
        }
        let label = crate::get_str(input, "cut label", MAX_NAME)?;
        crate::finished(input, "cut")?;
        Ok(Self { number, clock_synced: bits & 1 != 0, flush_clean: bits & 2 != 0, label })
    }
}

/// What a disk is: payload of a join or resize, entry of a segment's disk table, part of the handshake.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskInfo {
    /// Slot in the stream, never reused within a stream.
    pub slot: u16,
    /// The disk.
    pub id: DiskId,
    /// Bytes.
    pub size: u64,
    /// Logical block size, bytes.
    pub block: u32,
    /// Physical block size, bytes.
    pub physical_block: u32,
    /// Serial as the host sees it.
    pub serial: String,
    /// Name as the operator sees it.
    pub name: String,
}

impl DiskInfo {
    /// Appends the bytes.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u16_le(self.slot);
        out.put_slice(&self.id.0);
        out.put_u64_le(self.size);
        out.put_u32_le(self.block);
        out.put_u32_le(self.physical_block);
        crate::put_str(out, &self.serial);
        crate::put_str(out, &self.name);
    }

    /// What holds of every disk, wherever it comes from.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn check(&self) -> Result<(), FormatError> {
        let bad = |detail| Err(FormatError::Malformed { what: "disk", detail });
        for block in [self.block, self.physical_block] {
            if !block.is_power_of_two() || !(512..=65536).contains(&block) {
                return bad("block size");
            }
        }
        if self.size > crate::MAX_NUMBER || !self.size.is_multiple_of(self.block.into()) {
            return bad("size is no multiple of the block");
        }
        if self.serial.len() > MAX_NAME || self.name.len() > MAX_NAME {
            return bad("name or serial too long");
        }
        Ok(())
    }

    /// Reads one from the front of `input`.
    ///
    /// # Errors
    /// Too short, a size that is no multiple of the block, or a block size that is no power of two from 512 to 65536.
    pub fn read(input: &mut &[u8]) -> Result<Self, FormatError> {
        crate::need(input, 34, "disk")?;
        let slot = input.get_u16_le();
        let mut id = [0; 16];
        input.copy_to_slice(&mut id);
        let size = crate::get_number(input, "disk")?;
        let block = input.get_u32_le();
        let physical_block = input.get_u32_le();
        let serial = crate::get_str(input, "disk serial", MAX_NAME)?;
        let name = crate::get_str(input, "disk name", MAX_NAME)?;
        let info = Self { slot, id: DiskId(id), size, block, physical_block, serial, name };
        info.check()?;
        Ok(info)
    }

    /// Reads a payload that holds exactly one.
    ///
    /// # Errors
    /// As [`Self::read`], and bytes left over.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, FormatError> {
        let info = Self::read(&mut bytes)?;
        crate::finished(&bytes, "disk")?;
        Ok(info)
    }
}

/// Payload of the begin and the end of a synchronisation.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct SyncMark {
    /// Counts the synchronisations of the disk; begin and end carry the same.
    pub sync: u64,
    /// The whole disk is sent (else only what was in doubt).
    pub whole: bool,
}

impl SyncMark {
    /// Appends the payload.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64_le(self.sync);
        out.put_u8(u8::from(self.whole));
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// Wrong length or an unknown bit.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, FormatError> {
        crate::need(&bytes, 9, "sync mark")?;
        let sync = crate::get_number(&mut bytes, "sync mark")?;
        let whole = match bytes.get_u8() {
            0 => false,
            1 => true,
            _ => return Err(FormatError::Malformed { what: "sync mark", detail: "unknown bits" }),
        };
        crate::finished(&bytes, "sync mark")?;
        Ok(Self { sync, whole })
    }
}
