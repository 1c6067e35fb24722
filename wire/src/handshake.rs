//! What source and target say to each other inside TLS before the socket carries raw frames.
//!
//! ```text
//! source ── Hello ──▶ target      who, which stream and incarnation, from where
//! source ◀─ Welcome ─ target      accepted, with the target's position; or refused, with a reason
//! source ── Begin ──▶ target      (only after an acceptance)
//! ═══ both leave TLS: no record of it follows; keys for control messages come from its exporter ═══
//! source ◀─ Ready (sealed control message) ─ target
//! source ── frames ─▶ target      source ◀─ acknowledgements ─ target
//! ```
//! Each message is `length u32 · kind u8 · body`. The target speaks last before the change and first after it, so no
//! raw byte can be in a TLS buffer. ALPN is [`ALPN`]; SNI is the target's id.

use bytes::{Buf, BufMut};

use crate::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use crate::record::DiskInfo;
use crate::segment::{Predecessor, WrappedKey};
use crate::{FormatError, MAX_DISKS, WIRE_VERSION, finished, get_id, get_number, get_str, need, put_str};

/// Application protocol of the TLS handshake.
pub const ALPN: &[u8] = b"afterimage-stream/1";
/// Label of the TLS exporter for the control keys: 64 bytes, first half target→source, second half source→target.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-afterimage-control-v1";
/// First bytes of a hello.
pub const HELLO_MAGIC: [u8; 4] = *b"AIHI";
/// Longest message.
pub const MAX_HANDSHAKE: usize = 1024 * 1024;

/// A disk and the generation under which its writer writes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskClaim {
    /// The disk.
    pub disk: DiskInfo,
    /// The writer's generation.
    pub generation: u64,
}

/// The source introduces itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hello {
    /// [`WIRE_VERSION`] of the source.
    pub version: u16,
    /// Stream.
    pub stream: StreamId,
    /// This life of the writer.
    pub incarnation: IncarnationId,
    /// The life before it and its last acknowledged place, from the write-intent log.
    pub predecessor: Predecessor,
    /// The incarnation's data key, wrapped.
    pub key: WrappedKey,
    /// First sequence number that this incarnation uses.
    pub first_seq: u64,
    /// Next frame that the source would send (1 if it has sent none).
    pub next_frame: u64,
    /// Which of the stream's connections this is, from 0. Version 1 has only connection 0.
    pub connection: u16,
    /// Disks and their generations.
    pub disks: Vec<DiskClaim>,
}

/// What the target holds of a stream.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Position {
    /// Newest incarnation held; NONE if nothing is.
    pub incarnation: IncarnationId,
    /// Its newest durable frame.
    pub frame: u64,
    /// Newest durable record of the stream.
    pub seq: u64,
}

/// Why a source is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Refusal {
    /// The stream is not known here.
    UnknownStream = 1,
    /// Another protocol version.
    Version {
        /// What the target speaks.
        known: u16,
    } = 2,
    /// A newer generation of this disk exists: the writer has been fenced.
    Fenced {
        /// The disk.
        disk: DiskId,
        /// Generation held here.
        generation: u64,
    } = 3,
    /// The predecessor is not this target's newest incarnation: a branch.
    Branch = 4,
    /// The sequence numbers begin at or below what is held; the source takes a new incarnation above it and compares.
    SeqBehind {
        /// Newest record held.
        newest: u64,
    } = 5,
    /// Another source is connected to this stream with the same incarnation, or the target is not ready. Try again.
    Busy = 6,
    /// The target cannot take data (no space, failing disk).
    Unable = 7,
    /// A claim makes no sense (a disk's size differs, unknown disk, no key).
    BadClaim = 8,
}

/// The target's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Welcome {
    /// Go on from here.
    Accepted {
        /// Branch that the stream writes on.
        timeline: TimelineId,
        /// What is held. Same incarnation: the source resends from `frame + 1`. Another: it is checked against the
        /// hello's predecessor, see `resync`.
        position: Position,
        /// What is held does not contain exactly what the predecessor's last acknowledged place promises: every disk
        /// is compared in full.
        whole_resync: bool,
    },
    /// No.
    Refused {
        /// Why.
        reason: Refusal,
        /// For a person.
        message: String,
    },
}

/// A message of the handshake.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Handshake {
    /// From the source.
    Hello(Hello),
    /// From the target.
    Welcome(Welcome),
    /// From the source.
    Begin,
}

impl Handshake {
    /// The bytes with their length in front.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 4];
        match self {
            Self::Hello(hello) => {
                out.put_u8(1);
                out.put_slice(&HELLO_MAGIC);
                out.put_u16_le(hello.version);
                out.put_u16_le(hello.connection);
                out.put_slice(&hello.stream.0);
                out.put_slice(&hello.incarnation.0);
                hello.predecessor.encode(&mut out);
                hello.key.encode(&mut out);
                out.put_u64_le(hello.first_seq);
                out.put_u64_le(hello.next_frame);
                out.put_u16_le(hello.disks.len() as u16);
                for claim in &hello.disks {
                    claim.disk.encode(&mut out);
                    out.put_u64_le(claim.generation);
                }
            }
            Self::Welcome(Welcome::Accepted { timeline, position, whole_resync }) => {
                out.put_u8(2);
                out.put_slice(&timeline.0);
                out.put_slice(&position.incarnation.0);
                out.put_u64_le(position.frame);
                out.put_u64_le(position.seq);
                out.put_u8((*whole_resync).into());
            }
            Self::Welcome(Welcome::Refused { reason, message }) => {
                out.put_u8(3);
                let (code, id, value) = match reason {
                    Refusal::UnknownStream => (1, DiskId::NONE, 0),
                    Refusal::Version { known } => (2, DiskId::NONE, u64::from(*known)),
                    Refusal::Fenced { disk, generation } => (3, *disk, *generation),
                    Refusal::Branch => (4, DiskId::NONE, 0),
                    Refusal::SeqBehind { newest } => (5, DiskId::NONE, *newest),
                    Refusal::Busy => (6, DiskId::NONE, 0),
                    Refusal::Unable => (7, DiskId::NONE, 0),
                    Refusal::BadClaim => (8, DiskId::NONE, 0),
                };
                out.put_u8(code);
                out.put_slice(&id.0);
                out.put_u64_le(value);
                put_str(&mut out, message);
            }
            Self::Begin => out.put_u8(4),
        }
        let length = (out.len() - 4) as u32;
        out[..4].copy_from_slice(&length.to_le_bytes());
        out
    }

    /// Reads one message from the front of `bytes`, if it is all there; also returns how many bytes it took.
    ///
    /// # Errors
    /// A length over [`MAX_HANDSHAKE`], an unknown kind, another version, or content that makes no sense. The
    /// connection ends.
    pub fn read(bytes: &[u8]) -> Result<Option<(Self, usize)>, FormatError> {
        const WHAT: &str = "handshake";
        let bad = |detail| FormatError::Malformed { what: WHAT, detail };
        let mut input = bytes;
        if input.len() < 4 {
            return Ok(None);
        }
        let length = input.get_u32_le() as usize;
        if length == 0 || length > MAX_HANDSHAKE {
            return Err(bad("length"));
        }
        if input.len() < length {
            return Ok(None);
        }
        let mut input = &input[..length];
        let message = match input.get_u8() {
            1 => {
                need(&input, 8, WHAT)?;
                if input[..4] != HELLO_MAGIC {
                    return Err(FormatError::Magic { what: WHAT });
                }
                input.advance(4);
                let version = input.get_u16_le();
                if version != WIRE_VERSION {
                    return Err(FormatError::Version { what: WHAT, found: version, known: WIRE_VERSION });
                }
                let connection = input.get_u16_le();
                let stream = StreamId(get_id(&mut input, WHAT)?);
                let incarnation = IncarnationId(get_id(&mut input, WHAT)?);
                let predecessor = Predecessor::read(&mut input, WHAT)?;
                let key = WrappedKey::read(&mut input)?;
                need(&input, 18, WHAT)?;
                let first_seq = get_number(&mut input, WHAT)?;
                let next_frame = get_number(&mut input, WHAT)?;
                let count = usize::from(input.get_u16_le());
                if count > MAX_DISKS {
                    return Err(bad("too many disks"));
                }
                if stream.is_none() || incarnation.is_none() || first_seq == 0 || next_frame == 0 {
                    return Err(bad("a field that must be set is not"));
                }
                let mut disks = Vec::with_capacity(count.min(64));
                for _ in 0..count {
                    let disk = DiskInfo::read(&mut input)?;
                    need(&input, 8, WHAT)?;
                    disks.push(DiskClaim { disk, generation: get_number(&mut input, WHAT)? });
                }
                Self::Hello(Hello {
                    version,
                    stream,
                    incarnation,
                    predecessor,
                    key,
                    first_seq,
                    next_frame,
                    connection,
                    disks,
                })
            }
            2 => {
                let timeline = TimelineId(get_id(&mut input, WHAT)?);
                let incarnation = IncarnationId(get_id(&mut input, WHAT)?);
                need(&input, 17, WHAT)?;
                let (frame, seq) = (get_number(&mut input, WHAT)?, get_number(&mut input, WHAT)?);
                let position = Position { incarnation, frame, seq };
                let whole_resync = match input.get_u8() {
                    0 => false,
                    1 => true,
                    _ => return Err(bad("unknown bits")),
                };
                Self::Welcome(Welcome::Accepted { timeline, position, whole_resync })
            }
            3 => {
                need(&input, 25, WHAT)?;
                let code = input.get_u8();
                let disk = DiskId(get_id(&mut input, WHAT)?);
                let value = get_number(&mut input, WHAT)?;
                let message = get_str(&mut input, WHAT, crate::MAX_NAME)?;
                let reason = match code {
                    1 => Refusal::UnknownStream,
                    2 => Refusal::Version { known: u16::try_from(value).map_err(|_| bad("version"))? },
                    3 => Refusal::Fenced { disk, generation: value },
                    4 => Refusal::Branch,
                    5 => Refusal::SeqBehind { newest: value },
                    6 => Refusal::Busy,
                    7 => Refusal::Unable,
                    8 => Refusal::BadClaim,
                    other => return Err(FormatError::UnknownKind { what: "refusal", value: other.into() }),
                };
                Self::Welcome(Welcome::Refused { reason, message })
            }
            4 => Self::Begin,
            other => return Err(FormatError::UnknownKind { what: WHAT, value: other.into() }),
        };
        finished(&input, WHAT)?;
        Ok(Some((message, 4 + length)))
    }
}
