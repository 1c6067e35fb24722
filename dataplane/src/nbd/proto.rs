//! Numbers and layouts of the NBD protocol, from its text (`doc/proto.md` of the reference implementation). All
//! integers on the wire are big-endian.

use crate::io::Errno;

/// First word of the greeting, "NBDMAGIC".
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and first word of each option, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of an option's header.
pub const OPTION_HEADER: usize = 16;
/// Bytes of a request's header.
pub const REQUEST_HEADER: usize = 28;
/// Bytes of a simple reply's header.
pub const SIMPLE_HEADER: usize = 16;
/// Bytes of a chunk's header.
pub const CHUNK_HEADER: usize = 20;
/// Bytes in front of the data of a data chunk: its header and the offset.
pub const DATA_HEADER: usize = CHUNK_HEADER + 8;
/// Longest string of the protocol, bytes.
pub const MAX_STRING: usize = 4096;
/// Longest payload of a read or write that we serve and advertise, bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The same for a client that was not told: by `EXPORT_NAME` it cannot be, by `GO` only if it asks.
pub const MAX_PAYLOAD_UNTOLD: u32 = 64 << 20;

/// Handshake flags, server and client alike.
pub mod handshake {
    #![allow(missing_docs)]
    pub const FIXED_NEWSTYLE: u16 = 1;
    pub const NO_ZEROES: u16 = 2;
}

/// Option numbers.
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information about an export.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of chunks.
pub mod chunk {
    #![allow(missing_docs)]
    pub const DONE: u16 = 1;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Flags of an extent in `base:allocation`.
pub mod state {
    #![allow(missing_docs)]
    pub const HOLE: u32 = 1;
    pub const ZERO: u32 = 2;
}

/// Error values of replies.
pub mod error {
    #![allow(missing_docs)]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// What a client asks, without its payload.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// [`cmd_flag`].
    pub flags: u16,
    /// [`cmd`].
    pub kind: u16,
    /// Returned with each reply.
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl RequestHeader {
    /// Reads a header; none if it does not begin with the magic number of requests.
    pub fn parse(bytes: &[u8; REQUEST_HEADER]) -> Option<Self> {
        if be32(&bytes[0..4]) != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: be16(&bytes[4..6]),
            kind: be16(&bytes[6..8]),
            cookie: be64(&bytes[8..16]),
            offset: be64(&bytes[16..24]),
            len: be32(&bytes[24..28]),
        })
    }

    /// The header as it goes over the wire; for clients and tests.
    pub fn bytes(&self) -> [u8; REQUEST_HEADER] {
        let mut out = [0; REQUEST_HEADER];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.len.to_be_bytes());
        out
    }
}

/// A simple reply without data, or in front of it.
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_HEADER] {
    let mut out = [0; SIMPLE_HEADER];
    out[0..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The header of a chunk with `len` bytes after it.
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, len: u32) -> [u8; CHUNK_HEADER] {
    let mut out = [0; CHUNK_HEADER];
    out[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..20].copy_from_slice(&len.to_be_bytes());
    out
}

/// What stands in front of the `len` bytes of a data chunk.
pub fn data_header(last: bool, cookie: u64, offset: u64, len: u32) -> [u8; DATA_HEADER] {
    let flags = if last { chunk::DONE } else { 0 };
    let mut out = [0; DATA_HEADER];
    out[..CHUNK_HEADER].copy_from_slice(&chunk_header(flags, chunk::OFFSET_DATA, cookie, len + 8));
    out[CHUNK_HEADER..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// The error that a client sees for an error of the disk. `ENOTSUP` is for fast zeroing alone: elsewhere the text
/// forbids it.
pub fn error_of(errno: Errno, fast_zero: bool) -> u32 {
    match errno.0 {
        1 | 13 | 30 => error::EPERM,       // EPERM, EACCES, EROFS
        12 => error::ENOMEM,               // ENOMEM
        22 => error::EINVAL,               // EINVAL
        27 | 28 | 122 => error::ENOSPC,    // EFBIG, ENOSPC, EDQUOT
        95 if fast_zero => error::ENOTSUP, // EOPNOTSUPP
        108 => error::ESHUTDOWN,           // ESHUTDOWN
        _ => error::EIO,
    }
}

/// Big-endian number at the start of `bytes`, which holds it.
pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

/// As [`be16`].
pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// As [`be16`].
pub fn be64(bytes: &[u8]) -> u64 {
    (u64::from(be32(bytes)) << 32) | u64::from(be32(&bytes[4..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_header_reads_back() {
        let header = RequestHeader { flags: 5, kind: 1, cookie: 0x0102_0304_0506_0708, offset: 1 << 40, len: 4096 };
        assert_eq!(RequestHeader::parse(&header.bytes()), Some(header));
    }

    #[test]
    fn a_request_of_another_protocol_is_none() {
        let mut bytes = [0; REQUEST_HEADER];
        bytes[..4].copy_from_slice(&0x12560953u32.to_be_bytes());
        assert_eq!(RequestHeader::parse(&bytes), None);
    }

    #[test]
    fn not_supported_is_told_for_fast_zeroing_alone() {
        assert_eq!(error_of(Errno::OPNOTSUPP, true), error::ENOTSUP);
        assert_eq!(error_of(Errno::OPNOTSUPP, false), error::EIO);
    }
}
