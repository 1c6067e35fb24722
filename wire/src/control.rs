//! Control messages, target → source, on the raw connection: 64 bytes each, of which 48 are sealed.
//!
//! ```text
//!  0  counter u64    message number on this connection and direction, from 0; its nonce
//!  8  sealed: kind u8, flags u8, reserved u16, detail u32, frame u64, seq u64, value u64   (32 bytes) + tag (16)
//! 56  zeros
//! ```
//! Sealed with AES-256-GCM under the connection's key for this direction (TLS exporter); associated data is the
//! counter. The counter must rise by one with each message, so none can be dropped, doubled or reordered unseen.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{FormatError, bounded};

/// Bytes of a message on the wire.
pub const CONTROL_LEN: usize = 64;
/// Bytes that are sealed.
pub const CONTROL_PLAIN_LEN: usize = 32;

/// What the target says.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Control {
    /// The connection carries frames from now on.
    Ready,
    /// Everything up to this frame and record is on stable storage.
    Ack {
        /// Highest durable frame of the incarnation.
        frame: u64,
        /// Last record in it.
        seq: u64,
    },
    /// Still here; nothing new.
    Alive,
    /// The stream ends here, and why. The connection is closed after it.
    Stop {
        /// The reason.
        reason: StopReason,
        /// A generation, a frame number or 0, by reason.
        value: u64,
    },
    /// The answer to a [`crate::record::RecordKind::SyncHash`], which is durable and indexed: which of its steps differ
    /// from what the target holds at that place, or cannot be read there.
    Compared {
        /// The record.
        seq: u64,
        /// A bit for each hash, lowest first.
        differs: u64,
    },
    /// The target's newest state of this range is not to be relied on (damage, an image restored from elsewhere): the
    /// source reads the range again, in a synchronisation of its own. Repeating it is harmless.
    Want {
        /// Slot of the disk in the stream.
        disk: u16,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// Why a target ends a connection.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum StopReason {
    /// A newer generation exists for a disk: `value` is the generation.
    Fenced = 1,
    /// A frame failed its CRC, seal, order or identity: `value` is the frame number expected.
    BadFrame = 2,
    /// No space in the journal.
    NoSpace = 3,
    /// The journal's disk failed.
    JournalFailed = 4,
    /// A newer connection of the same source took over.
    Replaced = 5,
    /// The target is shutting down.
    ShuttingDown = 6,
}

/// The 32 bytes before sealing.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    kind: u8,
    flags: u8,
    reserved: U16,
    detail: U32,
    frame: U64,
    seq: U64,
    value: U64,
}
const _: () = assert!(size_of::<Raw>() == CONTROL_PLAIN_LEN);

impl Control {
    /// The plain bytes.
    pub fn encode(&self) -> [u8; CONTROL_PLAIN_LEN] {
        let (kind, detail, frame, seq, value) = match *self {
            Self::Ready => (1, 0, 0, 0, 0),
            Self::Ack { frame, seq } => (2, 0, frame, seq, 0),
            Self::Alive => (3, 0, 0, 0, 0),
            Self::Stop { reason, value } => (4, reason as u32, 0, 0, value),
            Self::Compared { seq, differs } => (5, 0, 0, seq, differs),
            Self::Want { disk, offset, len } => (6, disk.into(), 0, offset, len),
        };
        let raw = Raw {
            kind,
            flags: 0,
            reserved: 0.into(),
            detail: detail.into(),
            frame: frame.into(),
            seq: seq.into(),
            value: value.into(),
        };
        let mut out = [0; CONTROL_PLAIN_LEN];
        out.copy_from_slice(raw.as_bytes());
        out
    }

    /// Reads the plain bytes.
    ///
    /// # Errors
    /// An unknown kind or reason, reserved bits, or a range that makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "control message";
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| FormatError::Short {
            what: WHAT,
            need: CONTROL_PLAIN_LEN,
            have: bytes.len(),
        })?;
        if raw.flags != 0 || raw.reserved.get() != 0 {
            return Err(FormatError::Malformed { what: WHAT, detail: "reserved bits set" });
        }
        Ok(match raw.kind {
            1 => Self::Ready,
            2 => Self::Ack { frame: bounded(raw.frame.get(), WHAT)?, seq: bounded(raw.seq.get(), WHAT)? },
            3 => Self::Alive,
            4 => Self::Stop {
                reason: match raw.detail.get() {
                    1 => StopReason::Fenced,
                    2 => StopReason::BadFrame,
                    3 => StopReason::NoSpace,
                    4 => StopReason::JournalFailed,
                    5 => StopReason::Replaced,
                    6 => StopReason::ShuttingDown,
                    other => return Err(FormatError::UnknownKind { what: "stop reason", value: other.into() }),
                },
                value: bounded(raw.value.get(), WHAT)?,
            },
            5 => Self::Compared { seq: bounded(raw.seq.get(), WHAT)?, differs: raw.value.get() },
            6 => {
                let disk = u16::try_from(raw.detail.get())
                    .map_err(|_| FormatError::Malformed { what: WHAT, detail: "slot of a disk" })?;
                let (offset, len) = (raw.seq.get(), raw.value.get());
                if len == 0 || offset.checked_add(len).is_none() {
                    return Err(FormatError::Malformed { what: WHAT, detail: "range" });
                }
                Self::Want { disk, offset, len }
            }
            other => return Err(FormatError::UnknownKind { what: WHAT, value: other.into() }),
        })
    }
}
