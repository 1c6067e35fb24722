//! A chunk before sealing: head, record table, payload. The unit of compression and of sealing.
//!
//! ```text
//!  0  record_count u16   codec u8 (0 plain, 1 LZ4 block)   reserved u8
//!  4  plain_len u32      bytes of payload before compression
//!  8  stored_len u32     bytes of payload as stored (= plain_len for codec 0)
//! 12  reserved u32
//! 16  record table, 56 bytes each
//!  …  payload, stored_len bytes
//! ```
//! Sealed, 16 bytes of AES-256-GCM tag follow. No chunk needs another to be read.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::FormatError;
use crate::record::{RECORD_LEN, RawRecord, Record};

/// Most bytes of plain payload in a chunk, unless one record alone is larger.
pub const CHUNK_TARGET: usize = 64 * 1024;
/// Most bytes of plain payload of one record: larger writes are several records.
pub const MAX_PAYLOAD: usize = 1024 * 1024;
/// Most records in one chunk.
pub const MAX_CHUNK_RECORDS: usize = 256;
/// Bytes of the head.
pub const CHUNK_HEAD_LEN: usize = 16;
/// Bytes that sealing adds.
pub const TAG_LEN: usize = 16;

/// How a payload is stored.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Plain = 0,
    /// One LZ4 block without a size in front.
    Lz4 = 1,
}

/// Head of a chunk.
#[derive(Copy, Clone, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHead {
    /// Entries of the table.
    pub record_count: U16,
    /// [`Codec`].
    pub codec: u8,
    /// 0.
    pub reserved: u8,
    /// Payload before compression, bytes.
    pub plain_len: U32,
    /// Payload as stored, bytes.
    pub stored_len: U32,
    /// 0.
    pub reserved2: U32,
}
const _: () = assert!(size_of::<ChunkHead>() == CHUNK_HEAD_LEN);

/// An opened chunk: borrowed views of its parts, checked for sense.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// How the payload is stored.
    pub codec: Codec,
    /// Payload before compression, bytes.
    pub plain_len: usize,
    /// The table.
    pub table: &'a [RawRecord],
    /// The payload as stored.
    pub stored: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// Takes an opened chunk (without its tag) apart.
    ///
    /// # Errors
    /// Lengths that do not add up, an unknown codec, more than the maxima above.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let bad = |detail| FormatError::Malformed { what: "chunk", detail };
        let (head, rest) = ChunkHead::ref_from_prefix(bytes).map_err(|_| FormatError::Short {
            what: "chunk",
            need: CHUNK_HEAD_LEN,
            have: bytes.len(),
        })?;
        let codec = match head.codec {
            0 => Codec::Plain,
            1 => Codec::Lz4,
            other => return Err(FormatError::UnknownKind { what: "codec", value: other.into() }),
        };
        if head.reserved != 0 || head.reserved2.get() != 0 {
            return Err(bad("reserved bits set"));
        }
        let count = usize::from(head.record_count.get());
        let plain_len = head.plain_len.get() as usize;
        let stored_len = head.stored_len.get() as usize;
        if count == 0 || count > MAX_CHUNK_RECORDS {
            return Err(bad("record count"));
        }
        if plain_len > CHUNK_TARGET + MAX_PAYLOAD || stored_len > plain_len {
            return Err(bad("payload length"));
        }
        if codec == Codec::Plain && stored_len != plain_len {
            return Err(bad("plain payload of another length"));
        }
        let table_len = count * RECORD_LEN;
        if rest.len() != table_len + stored_len {
            return Err(bad("lengths do not add up"));
        }
        let (table, stored) = rest.split_at(table_len);
        let table = <[RawRecord]>::ref_from_bytes(table).map_err(|_| bad("table"))?;
        Ok(Self { codec, plain_len, table, stored })
    }

    /// The records, each checked for sense and for lying within the payload.
    pub fn records(&self) -> impl Iterator<Item = Result<Record, FormatError>> + 'a {
        let plain_len = self.plain_len;
        self.table.iter().map(move |raw| {
            let record = Record::from_raw(raw)?;
            let end = record.payload_at as usize + record.payload_len as usize;
            if end > plain_len {
                return Err(FormatError::Malformed { what: "record", detail: "payload past the chunk's end" });
            }
            Ok(record)
        })
    }
}
