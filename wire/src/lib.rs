//! What crosses a process in Afterimage: the stream (records in chunks in frames), the journal's segments, the
//! handshake, the control messages of a connection, the write-intent log, and the tables of a target. No I/O, no `unsafe`,
//! no keys used: sealing is `dataplane::seal`.
//!
//! The bytes are drawn in `docs/format.md` and pinned by the golden tests of this crate. Everything is little-endian.
//!
//! ```text
//! segment = segment header (wrapped key, disk table) · frame · frame · …
//! frame   = header · chunk directory · sealed chunk · sealed chunk · … · zeros up to a multiple of 4 KiB
//! chunk   = chunk head · record table · payload (LZ4 or plain)          (all of it sealed)
//! ```

use bytes::{Buf, BufMut};

pub mod address;
pub mod chunk;
pub mod control;
pub mod damage;
pub mod frame;
pub mod handshake;
pub mod ids;
pub mod intent;
pub mod keys;
pub mod record;
pub mod segment;
pub mod stream_state;
pub mod timeline;

/// The gRPC API of `proto/afterimage/v1`, generated.
#[cfg(feature = "grpc")]
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("afterimage.v1");

    /// The compiled descriptors, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/afterimage.v1.bin"));
}

/// Version of the stream, the segment and the handshake. A peer or file of another major version is refused by name.
///
/// 1: first.
pub const WIRE_VERSION: u16 = 1;

/// Everything on disk and every frame is a multiple of this many bytes and aligned to it.
pub const ALIGN: usize = 4096;

/// Longest name, label or serial, bytes.
pub const MAX_NAME: usize = 255;

/// Most disks in one stream.
pub const MAX_DISKS: usize = 1024;

/// Highest number of a frame, record, segment, cut, synchronisation or generation, and most bytes of a disk. No history
/// comes near it; a higher one is refused where it is read, so that nobody who counts on from it can overflow.
pub const MAX_NUMBER: u64 = i64::MAX as u64;

/// Bytes that are not what they should be. Nothing decoded from such bytes is ever used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the structure needs.
    #[error("{what} is cut short: {have} bytes where {need} are needed")]
    Short {
        /// The structure.
        what: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// Not ours at all.
    #[error("{what} does not begin with its magic number")]
    Magic {
        /// The structure.
        what: &'static str,
    },
    /// Written by another version.
    #[error("{what} is of version {found}; this program reads version {known}")]
    Version {
        /// The structure.
        what: &'static str,
        /// The version found.
        found: u16,
        /// The version that is known.
        known: u16,
    },
    /// A checksum differs.
    #[error("{what} fails its checksum")]
    Checksum {
        /// The structure.
        what: &'static str,
    },
    /// A number that names nothing.
    #[error("{what} of unknown kind {value}")]
    UnknownKind {
        /// The structure.
        what: &'static str,
        /// The kind found.
        value: u64,
    },
    /// Well-framed but senseless.
    #[error("{what} is malformed: {detail}")]
    Malformed {
        /// The structure.
        what: &'static str,
        /// What is wrong with it.
        detail: &'static str,
    },
}

pub(crate) fn need(input: &&[u8], bytes: usize, what: &'static str) -> Result<(), FormatError> {
    if input.len() < bytes { Err(FormatError::Short { what, need: bytes, have: input.len() }) } else { Ok(()) }
}

pub(crate) fn finished(input: &&[u8], what: &'static str) -> Result<(), FormatError> {
    if input.is_empty() { Ok(()) } else { Err(FormatError::Malformed { what, detail: "bytes left over" }) }
}

pub(crate) fn put_str(out: &mut impl BufMut, text: &str) {
    // Longer names are refused where they enter; cutting here keeps the encoder total.
    let mut end = text.len().min(MAX_NAME);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.put_u16_le(end as u16);
    out.put_slice(&text.as_bytes()[..end]);
}

pub(crate) fn get_str(input: &mut &[u8], what: &'static str, max: usize) -> Result<String, FormatError> {
    need(input, 2, what)?;
    let len = usize::from(input.get_u16_le());
    if len > max {
        return Err(FormatError::Malformed { what, detail: "too long" });
    }
    need(input, len, what)?;
    let (text, rest) = input.split_at(len);
    *input = rest;
    String::from_utf8(text.to_vec()).map_err(|_| FormatError::Malformed { what, detail: "not UTF-8" })
}

pub(crate) fn get_id(input: &mut &[u8], what: &'static str) -> Result<[u8; 16], FormatError> {
    need(input, 16, what)?;
    let mut id = [0; 16];
    input.copy_to_slice(&mut id);
    Ok(id)
}

/// A number that others count on from: see [`MAX_NUMBER`]. The caller has checked that the bytes are there.
pub(crate) fn get_number(input: &mut impl Buf, what: &'static str) -> Result<u64, FormatError> {
    bounded(input.get_u64_le(), what)
}

/// `value`, if it is not above [`MAX_NUMBER`].
pub(crate) fn bounded(value: u64, what: &'static str) -> Result<u64, FormatError> {
    if value > MAX_NUMBER { Err(FormatError::Malformed { what, detail: "a number out of range" }) } else { Ok(value) }
}

/// `n` rounded up to a multiple of [`ALIGN`].
pub const fn align_up(n: usize) -> usize {
    n.next_multiple_of(ALIGN)
}

/// CRC32C of `bytes` with the four at `at`, where it stands itself, taken as zero.
pub(crate) fn crc_without(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..at]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[at + 4..])
}

/// Bytes that every table (timeline table, stream state) has at least.
const TABLE_HEAD: usize = 64;

/// Fills length and CRC of a table, whose fields for them are 0.
pub(crate) fn close_table(out: &mut [u8]) {
    let length = out.len() as u32;
    out[12..16].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c::crc32c(out);
    out[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// Checks magic, version, length and CRC of a table; returns it without what follows its length.
pub(crate) fn open_table<'a>(bytes: &'a [u8], magic: [u8; 4], what: &'static str) -> Result<&'a [u8], FormatError> {
    open_table_up_to(WIRE_VERSION, bytes, magic, what).map(|(_, bytes)| bytes)
}

/// As [`open_table`], of a table that has had versions since the first; tells which it is.
pub(crate) fn open_table_up_to<'a>(
    known: u16,
    bytes: &'a [u8],
    magic: [u8; 4],
    what: &'static str,
) -> Result<(u16, &'a [u8]), FormatError> {
    need(&bytes, TABLE_HEAD, what)?;
    if bytes[..4] != magic {
        return Err(FormatError::Magic { what });
    }
    let version = u16::from_le_bytes([bytes[4], bytes[5]]);
    if !(WIRE_VERSION..=known).contains(&version) {
        return Err(FormatError::Version { what, found: version, known });
    }
    let length = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]) as usize;
    if length < TABLE_HEAD {
        return Err(FormatError::Malformed { what, detail: "length" });
    }
    need(&bytes, length, what)?;
    let bytes = &bytes[..length];
    if crc_without(bytes, 8).to_le_bytes() != bytes[8..12] {
        return Err(FormatError::Checksum { what });
    }
    Ok((version, bytes))
}
