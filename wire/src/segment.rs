//! Head of a segment: one file of the journal, of a spill or of a delta. Frames follow it back to back.
//!
//! ```text
//!   0  magic "AISG"        4  version u16     6  reserved u16
//!   8  length u32          of this head, a multiple of 4096
//!  12  crc u32             CRC32C of the head with this field 0
//!  16  stream [16]        32  timeline [16]   48  incarnation [16]
//!  64  predecessor: incarnation [16], frame u64, seq u64    (NONE, 0, 0 for the first)
//!  96  segment u64         rises by one along a timeline
//! 104  first_frame u64     number of the first frame that may follow
//! 112  first_seq u64       number of its first record
//! 120  created_wall_ns u64
//! 128  wrapped key (96 bytes, see WrappedKey)
//! 224  disk_count u16      226  zeros to 232
//! 232  disk table: DiskInfo of each disk in the stream when the segment was opened
//! ```
//! All frames of a segment are of one incarnation. The head is durable before the first frame is acknowledged, so that
//! no acknowledged byte is without its key.

use bytes::{Buf, BufMut};

use crate::ids::{IncarnationId, PolicyKeyId, StreamId, TimelineId};
use crate::record::DiskInfo;
use crate::{FormatError, MAX_DISKS, WIRE_VERSION, align_up, get_id, get_number, need};

/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 4] = *b"AISG";
/// Longest head.
pub const MAX_SEGMENT_HEAD: usize = align_up(232 + MAX_DISKS * (34 + 2 * (2 + crate::MAX_NAME)));
/// Bytes of a [`WrappedKey`].
pub const WRAPPED_KEY_LEN: usize = 96;

/// An incarnation's 256-bit data key, sealed under the policy's key (AES-256-GCM, random nonce, the incarnation's id
/// as associated data).
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct WrappedKey {
    /// Which key unwraps it.
    pub policy_key: PolicyKeyId,
    /// Nonce of the wrapping.
    pub nonce: [u8; 12],
    /// Sealed key and tag: 32 + 16 bytes.
    pub sealed: Sealed48,
}

/// 48 bytes: a sealed 32-byte key with its tag.
#[derive(Copy, Clone, PartialEq, Eq)]
pub struct Sealed48(pub [u8; 48]);

impl Default for Sealed48 {
    fn default() -> Self {
        Self([0; 48])
    }
}

impl std::fmt::Debug for Sealed48 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealed48(…)")
    }
}

impl WrappedKey {
    /// Appends [`WRAPPED_KEY_LEN`] bytes.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_slice(&self.policy_key.0);
        out.put_slice(&self.nonce);
        out.put_slice(&self.sealed.0);
        out.put_bytes(0, WRAPPED_KEY_LEN - 76);
    }

    /// Reads one from the front.
    ///
    /// # Errors
    /// Too short, or padding that is not 0.
    pub fn read(input: &mut &[u8]) -> Result<Self, FormatError> {
        need(input, WRAPPED_KEY_LEN, "wrapped key")?;
        let policy_key = PolicyKeyId(get_id(input, "wrapped key")?);
        let mut nonce = [0; 12];
        input.copy_to_slice(&mut nonce);
        let mut sealed = [0; 48];
        input.copy_to_slice(&mut sealed);
        let (padding, rest) = input.split_at(WRAPPED_KEY_LEN - 76);
        if padding.iter().any(|b| *b != 0) {
            return Err(FormatError::Malformed { what: "wrapped key", detail: "padding" });
        }
        *input = rest;
        Ok(Self { policy_key, nonce, sealed: Sealed48(sealed) })
    }
}

/// Where a writer's predecessor ended, as the writer knows it.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Predecessor {
    /// The incarnation before; [`IncarnationId::NONE`] for the first of a stream.
    pub incarnation: IncarnationId,
    /// Its last frame known to be acknowledged.
    pub frame: u64,
    /// The last record in that frame.
    pub seq: u64,
}

impl Predecessor {
    pub(crate) fn encode(&self, out: &mut impl BufMut) {
        out.put_slice(&self.incarnation.0);
        out.put_u64_le(self.frame);
        out.put_u64_le(self.seq);
    }

    pub(crate) fn read(input: &mut &[u8], what: &'static str) -> Result<Self, FormatError> {
        need(input, 32, what)?;
        Ok(Self {
            incarnation: IncarnationId(get_id(input, what)?),
            frame: get_number(input, what)?,
            seq: get_number(input, what)?,
        })
    }
}

/// The head, taken apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SegmentHead {
    /// Stream.
    pub stream: StreamId,
    /// Branch of history.
    pub timeline: TimelineId,
    /// Writer.
    pub incarnation: IncarnationId,
    /// The writer's predecessor.
    pub predecessor: Predecessor,
    /// Number of the segment along its timeline.
    pub segment: u64,
    /// Number of the first frame that may follow.
    pub first_frame: u64,
    /// Number of its first record.
    pub first_seq: u64,
    /// Wall clock of the host that opened the segment, nanoseconds since the Unix epoch.
    pub created_wall_ns: u64,
    /// The incarnation's data key.
    pub key: WrappedKey,
    /// Disks in the stream when the segment was opened.
    pub disks: Vec<DiskInfo>,
}

impl SegmentHead {
    /// The bytes, a multiple of [`crate::ALIGN`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(crate::ALIGN);
        out.put_slice(&SEGMENT_MAGIC);
        out.put_u16_le(WIRE_VERSION);
        out.put_u16_le(0);
        out.put_u64_le(0); // length and CRC, below
        out.put_slice(&self.stream.0);
        out.put_slice(&self.timeline.0);
        out.put_slice(&self.incarnation.0);
        self.predecessor.encode(&mut out);
        out.put_u64_le(self.segment);
        out.put_u64_le(self.first_frame);
        out.put_u64_le(self.first_seq);
        out.put_u64_le(self.created_wall_ns);
        self.key.encode(&mut out);
        out.put_u16_le(self.disks.len() as u16);
        out.put_bytes(0, 6);
        for disk in &self.disks {
            disk.encode(&mut out);
        }
        out.resize(align_up(out.len()), 0);
        let length = out.len() as u32;
        out[8..12].copy_from_slice(&length.to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Length of the head whose first bytes these are, to know how much to read.
    ///
    /// # Errors
    /// Foreign, of another version, or of a senseless length.
    pub fn length(bytes: &[u8]) -> Result<usize, FormatError> {
        let mut input = bytes;
        need(&input, 16, "segment")?;
        if input[..4] != SEGMENT_MAGIC {
            return Err(FormatError::Magic { what: "segment" });
        }
        input.advance(4);
        let version = input.get_u16_le();
        if version != WIRE_VERSION {
            return Err(FormatError::Version { what: "segment", found: version, known: WIRE_VERSION });
        }
        input.advance(2);
        let length = input.get_u32_le() as usize;
        if length == 0 || !length.is_multiple_of(crate::ALIGN) || length > MAX_SEGMENT_HEAD {
            return Err(FormatError::Malformed { what: "segment", detail: "length" });
        }
        Ok(length)
    }

    /// Reads a head from the front of `bytes`; also returns its length.
    ///
    /// # Errors
    /// As [`Self::length`]; also a CRC that differs, or content that makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), FormatError> {
        let length = Self::length(bytes)?;
        need(&bytes, length, "segment")?;
        let bytes = &bytes[..length];
        if crate::crc_without(bytes, 12).to_le_bytes() != bytes[12..16] {
            return Err(FormatError::Checksum { what: "segment" });
        }
        let bad = |detail| FormatError::Malformed { what: "segment", detail };
        let mut input = &bytes[16..];
        let stream = StreamId(get_id(&mut input, "segment")?);
        let timeline = TimelineId(get_id(&mut input, "segment")?);
        let incarnation = IncarnationId(get_id(&mut input, "segment")?);
        let predecessor = Predecessor::read(&mut input, "segment")?;
        need(&input, 32, "segment")?;
        let segment = get_number(&mut input, "segment")?;
        let first_frame = get_number(&mut input, "segment")?;
        let first_seq = get_number(&mut input, "segment")?;
        let created_wall_ns = input.get_u64_le();
        let key = WrappedKey::read(&mut input)?;
        need(&input, 8, "segment")?;
        let count = usize::from(input.get_u16_le());
        input.advance(6);
        if count > MAX_DISKS {
            return Err(bad("too many disks"));
        }
        let disks = (0..count).map(|_| DiskInfo::read(&mut input)).collect::<Result<_, _>>()?;
        if input.iter().any(|b| *b != 0) {
            return Err(bad("padding"));
        }
        let head = Self {
            stream,
            timeline,
            incarnation,
            predecessor,
            segment,
            first_frame,
            first_seq,
            created_wall_ns,
            key,
            disks,
        };
        Ok((head, length))
    }
}
