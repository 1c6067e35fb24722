//! A frame: chunks under one header; the unit of sending, of acknowledging and of the journal.
//!
//! ```text
//!   0  magic "AIFR"        4  version u16      6  chunk_count u16
//!   8  length u32          whole frame, a multiple of 4096
//!  12  crc u32             CRC32C of the whole frame with this field 0
//!  16  stream [16]
//!  32  incarnation [16]
//!  48  number u64          of the frame in its incarnation, from 1, without gaps
//!  56  acked u64           highest frame number of this incarnation that was acknowledged when this one was sealed
//!  64  first_seq u64      72  last_seq u64
//!  80  mono_ns u64         source's monotonic clock when the frame was closed
//!  88  sync_ms u32         0: hosts are answered without waiting; else see [`FrameHeader::sync_ms`]
//!  92  reserved [4]
//!  96  chunk directory: chunk_count × { at u32, sealed_len u32 }, `at` from the frame's start
//! ```
//! Bytes 0..8 and 16..96 are the associated data of each chunk, followed by the chunk's index (u32); the length, the
//! CRC and the directory are known only after sealing and are covered by the CRC and by each chunk's tag. Nothing that
//! can change while the frame lives (a generation, a timeline) stands in it: a resend repeats its bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::{IncarnationId, StreamId};
use crate::{ALIGN, FormatError, MAX_NUMBER, WIRE_VERSION};

/// First bytes of a frame.
pub const FRAME_MAGIC: [u8; 4] = *b"AIFR";
/// Bytes of the fixed header.
pub const FRAME_HEADER_LEN: usize = 96;
/// Bytes of one directory entry.
pub const DIRECTORY_ENTRY_LEN: usize = 8;
/// Most chunks in a frame.
pub const MAX_CHUNKS: usize = 64;
/// Longest frame, bytes.
pub const MAX_FRAME: usize = 2 * 1024 * 1024;

/// The fixed header.
#[derive(Copy, Clone, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    /// [`FRAME_MAGIC`].
    pub magic: [u8; 4],
    /// [`WIRE_VERSION`].
    pub version: U16,
    /// Chunks in this frame, 1 to [`MAX_CHUNKS`].
    pub chunk_count: U16,
    /// Bytes of the whole frame.
    pub length: U32,
    /// CRC32C of the whole frame with this field 0.
    pub crc: U32,
    /// Stream.
    pub stream: StreamId,
    /// Incarnation whose data key seals the chunks.
    pub incarnation: IncarnationId,
    /// Number in the incarnation, from 1.
    pub number: U64,
    /// Highest acknowledged frame number when this was sealed; 0 for none.
    pub acked: U64,
    /// Number of the first record.
    pub first_seq: U64,
    /// Number of the last record.
    pub last_seq: U64,
    /// Source's monotonic clock when closed, nanoseconds.
    pub mono_ns: U64,
    /// Not 0: when this was sealed no host had been answered a write that was not acknowledged, and none is answered
    /// before this many milliseconds have passed since the acknowledgement of frame `acked` was sent. See the target's
    /// claim of zero loss.
    pub sync_ms: U32,
    /// 0.
    pub reserved: [u8; 4],
}
const _: () = assert!(size_of::<FrameHeader>() == FRAME_HEADER_LEN);

/// A directory entry.
#[derive(Copy, Clone, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirectoryEntry {
    /// Where the sealed chunk begins, from the frame's start.
    pub at: U32,
    /// Bytes of the sealed chunk with its tag.
    pub sealed_len: U32,
}

impl FrameHeader {
    /// Reads the header at the front of `bytes` and checks all of it that can be checked before the rest is there.
    ///
    /// # Errors
    /// Short, foreign, of another version, or of a senseless length, number or count. The CRC is not checked:
    /// [`check_frame`] does that.
    pub fn parse(bytes: &[u8]) -> Result<&Self, FormatError> {
        let bad = |detail| FormatError::Malformed { what: "frame", detail };
        let (header, _) = Self::ref_from_prefix(bytes).map_err(|_| FormatError::Short {
            what: "frame",
            need: FRAME_HEADER_LEN,
            have: bytes.len(),
        })?;
        if header.magic != FRAME_MAGIC {
            return Err(FormatError::Magic { what: "frame" });
        }
        if header.version.get() != WIRE_VERSION {
            return Err(FormatError::Version { what: "frame", found: header.version.get(), known: WIRE_VERSION });
        }
        let length = header.length.get() as usize;
        if length == 0 || !length.is_multiple_of(ALIGN) || length > MAX_FRAME {
            return Err(bad("length"));
        }
        let count = usize::from(header.chunk_count.get());
        if count == 0 || count > MAX_CHUNKS {
            return Err(bad("chunk count"));
        }
        if header.number.get() == 0 || header.number.get() > MAX_NUMBER || header.acked.get() >= header.number.get() {
            return Err(bad("frame number"));
        }
        let (first, last) = (header.first_seq.get(), header.last_seq.get());
        if first == 0 || first > last || last > MAX_NUMBER {
            return Err(bad("record numbers"));
        }
        if header.reserved != [0; 4] {
            return Err(bad("reserved bits set"));
        }
        Ok(header)
    }

    /// The associated data of chunk `index` of this frame.
    pub fn associated_data(&self, index: u32) -> [u8; 92] {
        let mut out = [0; 92];
        let bytes = self.as_bytes();
        out[..8].copy_from_slice(&bytes[..8]);
        out[8..88].copy_from_slice(&bytes[16..96]);
        out[88..].copy_from_slice(&index.to_le_bytes());
        out
    }

    /// The nonce of chunk `index`: frame number and index. Unique under an incarnation's key, since a frame number is
    /// sealed once.
    pub fn nonce(&self, index: u32) -> [u8; 12] {
        let mut out = [0; 12];
        out[..8].copy_from_slice(&self.number.get().to_le_bytes());
        out[8..].copy_from_slice(&index.to_le_bytes());
        out
    }
}

/// CRC32C of a whole frame as its header's `crc` field must hold it.
pub fn frame_crc(frame: &[u8]) -> u32 {
    crate::crc_without(frame, 12)
}

/// A whole frame, checked: header, CRC and directory.
///
/// # Errors
/// As [`FrameHeader::parse`]; also a length other than `frame.len()`, a CRC that differs, or a directory whose chunks
/// overlap, lie out of order or leave the frame.
pub fn check_frame(frame: &[u8]) -> Result<(&FrameHeader, &[DirectoryEntry]), FormatError> {
    let bad = |detail| FormatError::Malformed { what: "frame", detail };
    let header = FrameHeader::parse(frame)?;
    let length = header.length.get() as usize;
    if frame.len() != length {
        return Err(FormatError::Short { what: "frame", need: length, have: frame.len() });
    }
    if frame_crc(frame) != header.crc.get() {
        return Err(FormatError::Checksum { what: "frame" });
    }
    let count = usize::from(header.chunk_count.get());
    let directory_end = FRAME_HEADER_LEN + count * DIRECTORY_ENTRY_LEN;
    let directory =
        <[DirectoryEntry]>::ref_from_bytes(&frame[FRAME_HEADER_LEN..directory_end]).map_err(|_| bad("directory"))?;
    let mut free_from = directory_end;
    for entry in directory {
        let at = entry.at.get() as usize;
        let end = at.checked_add(entry.sealed_len.get() as usize).ok_or_else(|| bad("directory"))?;
        if at < free_from || end > length {
            return Err(bad("chunk outside its frame"));
        }
        free_from = end;
    }
    Ok((header, directory))
}
