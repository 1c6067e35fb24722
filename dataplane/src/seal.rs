//! Sealing and opening, as pure functions: records → chunks → one sealed frame, and back.
//!
//! Keys: each start of a writer has a fresh random [`DataKey`]; frame number and chunk index are the nonce, so a frame
//! number is sealed once and a resend repeats the bytes. The data key travels wrapped under the policy's key.

use std::sync::Arc;

use afterimage_wire::chunk::{
    CHUNK_HEAD_LEN, CHUNK_TARGET, Chunk, ChunkHead, Codec, MAX_CHUNK_RECORDS, MAX_PAYLOAD, TAG_LEN,
};
use afterimage_wire::control::{CONTROL_LEN, CONTROL_PLAIN_LEN, Control};
use afterimage_wire::frame::{
    DIRECTORY_ENTRY_LEN, DirectoryEntry, FRAME_HEADER_LEN, FRAME_MAGIC, FrameHeader, MAX_CHUNKS, MAX_FRAME, frame_crc,
};
use afterimage_wire::ids::{IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::record::{HASH_LEN, HASH_STEP, MAX_HASHES, RECORD_LEN, Record};
use afterimage_wire::segment::{Sealed48, WrappedKey};
use afterimage_wire::{ALIGN, FormatError, WIRE_VERSION, align_up};
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zerocopy::{FromBytes, IntoBytes};

/// What cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The seal does not fit: another key, or bytes that were changed.
    #[error("the seal of {0} does not fit: another key, or changed bytes")]
    Seal(&'static str),
    /// The bytes make no sense.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// LZ4 data that does not expand to what the chunk says.
    #[error("the payload of a chunk does not decompress")]
    Compression,
    /// A record's payload differs from its CRC.
    #[error("record {0} fails its checksum")]
    Record(u64),
}

fn aead(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are an AES-256 key"))
}

/// The key of one incarnation. Its bytes are never printed.
pub struct DataKey {
    key: LessSafeKey,
    bytes: [u8; 32],
}

impl DataKey {
    /// From fresh random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self { key: aead(&bytes), bytes }
    }

    /// What must never be: control messages under the key of the data.
    pub(crate) fn as_control(&self) -> ControlKey {
        ControlKey::new(&self.bytes)
    }
}

impl Clone for DataKey {
    fn clone(&self) -> Self {
        Self::new(self.bytes)
    }
}

impl std::fmt::Debug for DataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DataKey(…)")
    }
}

/// The key of a policy: wraps data keys. With those that were before it, by which what is older opens.
#[derive(Clone)]
pub struct PolicyKey {
    /// Names it in wrapped keys.
    pub id: PolicyKeyId,
    bytes: [u8; 32],
    older: Arc<[(PolicyKeyId, [u8; 32])]>,
}

impl PolicyKey {
    /// From its id and its bytes.
    pub fn new(id: PolicyKeyId, bytes: [u8; 32]) -> Self {
        Self { id, bytes, older: Arc::new([]) }
    }

    /// The same with keys that were before it: nothing is wrapped under them any more.
    pub fn with_older(self, older: impl IntoIterator<Item = (PolicyKeyId, [u8; 32])>) -> Self {
        Self { older: older.into_iter().collect(), ..self }
    }

    fn bytes_of(&self, id: PolicyKeyId) -> Option<&[u8; 32]> {
        let older = || self.older.iter().find(|(older, _)| *older == id).map(|(_, bytes)| bytes);
        if id == self.id { Some(&self.bytes) } else { older() }
    }

    /// Wraps `key` for `incarnation`; `nonce` is random.
    pub fn wrap(&self, incarnation: IncarnationId, key: &DataKey, nonce: [u8; 12]) -> WrappedKey {
        let mut sealed = [0; 48];
        sealed[..32].copy_from_slice(&key.bytes);
        let tag = aead(&self.bytes)
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(incarnation.0),
                &mut sealed[..32],
            )
            .expect("32 bytes can be sealed");
        sealed[32..].copy_from_slice(tag.as_ref());
        WrappedKey { policy_key: self.id, nonce, sealed: Sealed48(sealed) }
    }

    /// Unwraps the data key of `incarnation`.
    ///
    /// # Errors
    /// Wrapped under another key, for another incarnation, or changed.
    pub fn unwrap(&self, incarnation: IncarnationId, wrapped: &WrappedKey) -> Result<DataKey, OpenError> {
        let bytes = self
            .bytes_of(wrapped.policy_key)
            .ok_or(OpenError::Seal("a data key (it is wrapped under another policy key)"))?;
        let mut sealed = wrapped.sealed.0;
        let plain = aead(bytes)
            .open_in_place(Nonce::assume_unique_for_key(wrapped.nonce), Aad::from(incarnation.0), &mut sealed)
            .map_err(|_| OpenError::Seal("a data key"))?;
        let mut bytes = [0; 32];
        bytes.copy_from_slice(plain);
        Ok(DataKey::new(bytes))
    }
}

/// Label under which the key of a stream's hashes is derived from its policy's key.
const HASH_LABEL: &[u8] = b"afterimage resync v1";

/// Hashes ranges of a stream's disks, so that two ends can compare them without sending them. Keyed: whoever does not
/// have the policy's key can neither guess a content from its hash nor make two contents of one hash.
pub struct HashKey(ring::hmac::Key);

impl PolicyKey {
    /// The key of the hashes of `stream` in a writer's comparison: of the policy key that the writer is wrapped under, so
    /// that both ends mean the same one while it is rotated.
    pub fn hash_key(&self, stream: StreamId, under: PolicyKeyId) -> HashKey {
        let bytes = self.bytes_of(under).unwrap_or(&self.bytes);
        let master = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, bytes);
        let mut context = ring::hmac::Context::with_key(&master);
        context.update(HASH_LABEL);
        context.update(&stream.0);
        HashKey(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, context.sign().as_ref()))
    }
}

impl HashKey {
    fn hash(&self, slot: u16, offset: u64, bytes: &[u8]) -> [u8; HASH_LEN] {
        let mut context = ring::hmac::Context::with_key(&self.0);
        context.update(&slot.to_le_bytes());
        context.update(&offset.to_le_bytes());
        context.update(bytes);
        let mut out = [0; HASH_LEN];
        out.copy_from_slice(&context.sign().as_ref()[..HASH_LEN]);
        out
    }

    /// Appends the hashes of `data`, which lies at `offset` of the disk in `slot`: one for each
    /// [`HASH_STEP`] bytes, the last of what is left.
    pub fn hashes(&self, slot: u16, offset: u64, data: &[u8], out: &mut Vec<u8>) {
        for (number, step) in data.chunks(HASH_STEP as usize).enumerate() {
            out.extend_from_slice(&self.hash(slot, offset + number as u64 * u64::from(HASH_STEP), step));
        }
    }

    /// Which steps of `data` have another hash than `hashes` says, a bit for each, lowest first; those that one of the
    /// two lacks count as different.
    pub fn differs(&self, slot: u16, offset: u64, data: &[u8], hashes: &[u8]) -> u64 {
        let mut steps = data.chunks(HASH_STEP as usize);
        let mut differs = 0;
        for (number, hash) in hashes.chunks(HASH_LEN).enumerate().take(MAX_HASHES) {
            let at = offset + number as u64 * u64::from(HASH_STEP);
            let same = steps.next().is_some_and(|step| self.hash(slot, at, step) == hash);
            differs |= u64::from(!same) << number;
        }
        differs
    }
}

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashKey(…)")
    }
}

impl std::fmt::Debug for PolicyKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PolicyKey({})", self.id)
    }
}

/// A record about to be sealed: `payload_at`, `payload_len` and `crc` are filled by the sealer.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// The record.
    pub record: Record,
    /// Its payload.
    pub payload: &'a [u8],
}

/// What the header of a frame says, known when it is composed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameMeta {
    /// Stream.
    pub stream: StreamId,
    /// Incarnation.
    pub incarnation: IncarnationId,
    /// Frame number.
    pub number: u64,
    /// Highest acknowledged frame.
    pub acked: u64,
    /// Monotonic clock.
    pub mono_ns: u64,
    /// See [`FrameHeader::sync_ms`].
    pub sync_ms: u32,
}

/// Counts how much of a frame a run of records takes, and where chunks begin. The one place that knows the bounds.
#[derive(Debug, Default, Clone)]
pub struct Plan {
    /// Records in each chunk.
    chunks: Vec<usize>,
    chunk_payload: usize,
    /// Payload of the largest chunk so far.
    largest: usize,
    upper: usize,
}

impl Plan {
    /// Forgets everything; keeps its memory.
    pub fn clear(&mut self) {
        self.chunks.clear();
        self.chunk_payload = 0;
        self.largest = 0;
        self.upper = 0;
    }

    /// Adds a record with that much payload; false (and unchanged) if the frame would become too large.
    pub fn add(&mut self, payload: usize) -> bool {
        debug_assert!(payload <= MAX_PAYLOAD);
        let opens = match self.chunks.last() {
            None => true,
            Some(records) => *records >= MAX_CHUNK_RECORDS || self.chunk_payload + payload > CHUNK_TARGET,
        };
        let mut upper = self.upper + RECORD_LEN + payload;
        if opens {
            upper += CHUNK_HEAD_LEN + TAG_LEN + DIRECTORY_ENTRY_LEN + 16;
        }
        let chunk_payload = if opens { payload } else { self.chunk_payload + payload };
        let largest = self.largest.max(chunk_payload);
        if (opens && self.chunks.len() == MAX_CHUNKS)
            || FRAME_HEADER_LEN + upper + lz4_room(largest) > MAX_FRAME - ALIGN
        {
            return false;
        }
        self.upper = upper;
        self.chunk_payload = chunk_payload;
        self.largest = largest;
        if opens {
            self.chunks.push(1);
        } else {
            *self.chunks.last_mut().expect("a chunk is open") += 1;
        }
        true
    }

    /// Records so far.
    pub fn records(&self) -> usize {
        self.chunks.iter().sum()
    }

    /// No record yet.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Bytes that the sealed frame needs at most; the buffer given to [`seal_frame`] has at least that many.
    pub fn frame_bound(&self) -> usize {
        align_up(FRAME_HEADER_LEN + self.upper + lz4_room(self.largest))
    }
}

/// What LZ4 wants beside a chunk's `n` bytes of payload while it tries: with less it refuses to begin. Only the chunk
/// being tried needs it, since what shrank or was stored plain is never longer than planned.
fn lz4_room(n: usize) -> usize {
    get_maximum_output_size(n) - n
}

/// Memory that a sealing thread keeps: the compressor's tables and the run of small payloads that compress together.
pub struct Scratch {
    small: CompressTable,
    large: CompressTable,
    gather: Vec<u8>,
    /// Chunks to store plain before trying again, and how many to skip next time.
    skip: u32,
    penalty: u32,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            small: CompressTable::small(),
            large: CompressTable::large(),
            gather: vec![0; CHUNK_TARGET],
            skip: 0,
            penalty: 0,
        }
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}

/// Seals `items`, as planned, into `out`; returns the frame's length, a multiple of 4096, its tail zeroed.
///
/// A payload is read once from where it lies: the compressor's output, or the plain copy, is the frame. Several small
/// payloads are first laid side by side, for the ratio.
///
/// # Panics
/// If `items` is not what was planned, or `out` is shorter than [`Plan::frame_bound`]: bugs of the caller.
pub fn seal_frame(
    key: &DataKey,
    meta: &FrameMeta,
    plan: &Plan,
    items: &[Item<'_>],
    compress: bool,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> usize {
    assert_eq!(plan.records(), items.len());
    let (first, last) = (items.first().expect("not empty"), items.last().expect("not empty"));
    let mut header = FrameHeader {
        magic: FRAME_MAGIC,
        version: WIRE_VERSION.into(),
        chunk_count: (plan.chunks.len() as u16).into(),
        length: 0.into(),
        crc: 0.into(),
        stream: meta.stream,
        incarnation: meta.incarnation,
        number: meta.number.into(),
        acked: meta.acked.into(),
        first_seq: first.record.seq.into(),
        last_seq: last.record.seq.into(),
        mono_ns: meta.mono_ns.into(),
        sync_ms: meta.sync_ms.into(),
        reserved: [0; 4],
    };
    let mut at = FRAME_HEADER_LEN + plan.chunks.len() * DIRECTORY_ENTRY_LEN;
    let mut rest = items;
    for (index, count) in plan.chunks.iter().enumerate() {
        let (chunk, after) = rest.split_at(*count);
        rest = after;
        let start = at.next_multiple_of(16);
        out[at..start].fill(0);
        let plain_end = start + write_chunk(chunk, compress, scratch, &mut out[start..]);
        let index = index as u32;
        crate::mutant::sealed(&key.bytes, header.nonce(index), &out[start..plain_end], "a chunk");
        let tag = key
            .key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(header.nonce(index)),
                Aad::from(header.associated_data(index)),
                &mut out[start..plain_end],
            )
            .expect("a chunk is far below the cipher's limit");
        out[plain_end..plain_end + TAG_LEN].copy_from_slice(tag.as_ref());
        at = plain_end + TAG_LEN;
        let entry = DirectoryEntry { at: (start as u32).into(), sealed_len: ((at - start) as u32).into() };
        let entry_at = FRAME_HEADER_LEN + index as usize * DIRECTORY_ENTRY_LEN;
        out[entry_at..entry_at + DIRECTORY_ENTRY_LEN].copy_from_slice(entry.as_bytes());
    }
    let length = align_up(at);
    out[at..length].fill(0);
    header.length = (length as u32).into();
    out[..FRAME_HEADER_LEN].copy_from_slice(header.as_bytes());
    let crc = frame_crc(&out[..length]);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    length
}

/// Writes a chunk, unsealed, to the front of `out`; returns its length.
fn write_chunk(items: &[Item<'_>], compress: bool, scratch: &mut Scratch, out: &mut [u8]) -> usize {
    let payload_at = CHUNK_HEAD_LEN + items.len() * RECORD_LEN;
    let mut plain_len = 0;
    for (number, item) in items.iter().enumerate() {
        let record = Record {
            payload_at: plain_len as u32,
            payload_len: item.payload.len() as u32,
            crc: crc32c::crc32c(item.payload),
            ..item.record
        };
        plain_len += item.payload.len();
        let entry_at = CHUNK_HEAD_LEN + number * RECORD_LEN;
        out[entry_at..entry_at + RECORD_LEN].copy_from_slice(record.to_raw().as_bytes());
    }
    let stored = if compress { try_lz4(items, plain_len, scratch, &mut out[payload_at..]) } else { None };
    let (codec, stored_len) = match stored {
        Some(len) => (Codec::Lz4, len),
        None => {
            let mut at = payload_at;
            for item in items {
                out[at..at + item.payload.len()].copy_from_slice(item.payload);
                at += item.payload.len();
            }
            (Codec::Plain, plain_len)
        }
    };
    let head = ChunkHead {
        record_count: (items.len() as u16).into(),
        codec: codec as u8,
        reserved: 0,
        plain_len: (plain_len as u32).into(),
        stored_len: (stored_len as u32).into(),
        reserved2: 0.into(),
    };
    out[..CHUNK_HEAD_LEN].copy_from_slice(head.as_bytes());
    payload_at + stored_len
}

/// Smallest payload worth compressing, bytes.
const WORTH_COMPRESSING: usize = 256;

/// Compresses, unless recent chunks did not shrink: data that does not shrink is tried ever more rarely (every 2nd,
/// 4th, … 64th chunk).
fn try_lz4(items: &[Item<'_>], plain_len: usize, scratch: &mut Scratch, out: &mut [u8]) -> Option<usize> {
    if plain_len < WORTH_COMPRESSING {
        return None;
    }
    if scratch.skip > 0 {
        scratch.skip -= 1;
        return None;
    }
    let room = get_maximum_output_size(plain_len).min(out.len());
    let alone = items.iter().position(|item| item.payload.len() == plain_len);
    let input = match alone {
        Some(only) => items[only].payload,
        None => {
            let mut at = 0;
            for item in items {
                scratch.gather[at..at + item.payload.len()].copy_from_slice(item.payload);
                at += item.payload.len();
            }
            &scratch.gather[..at]
        }
    };
    let table = if plain_len < usize::from(u16::MAX) { &mut scratch.small } else { &mut scratch.large };
    match compress_into_with_table(input, &mut out[..room], table) {
        Ok(len) if len <= plain_len - plain_len / 16 => {
            scratch.penalty = 0;
            Some(len)
        }
        _ => {
            scratch.penalty = (scratch.penalty * 2 + 1).min(63);
            scratch.skip = scratch.penalty;
            None
        }
    }
}

/// Opens chunk `index` of a frame: `sealed` (with its tag) is decrypted in place; the plain chunk is its front.
///
/// # Errors
/// [`OpenError::Seal`] if the bytes, the header or the key are not those it was sealed with.
pub fn open_chunk<'a>(
    key: &DataKey,
    header: &FrameHeader,
    index: u32,
    sealed: &'a mut [u8],
) -> Result<&'a [u8], OpenError> {
    let plain = key
        .key
        .open_in_place(
            Nonce::assume_unique_for_key(header.nonce(index)),
            Aad::from(header.associated_data(index)),
            sealed,
        )
        .map_err(|_| OpenError::Seal("a chunk"))?;
    Ok(plain)
}

/// The plain payload of an opened chunk: borrowed as it is, or decompressed into `out` (which is resized).
///
/// # Errors
/// [`OpenError::Compression`] if the stored bytes do not expand to exactly the length that the chunk names.
pub fn payload<'a>(chunk: &Chunk<'a>, out: &'a mut Vec<u8>) -> Result<&'a [u8], OpenError> {
    match chunk.codec {
        Codec::Plain => Ok(chunk.stored),
        Codec::Lz4 => {
            out.resize(chunk.plain_len, 0);
            match decompress_into(chunk.stored, out) {
                Ok(len) if len == chunk.plain_len => Ok(out),
                _ => Err(OpenError::Compression),
            }
        }
    }
}

/// The payload of `record` within its chunk's plain payload, checked against its CRC.
///
/// # Errors
/// [`OpenError::Record`] if the CRC differs.
pub fn record_payload<'a>(record: &Record, plain: &'a [u8]) -> Result<&'a [u8], OpenError> {
    let bytes = &plain[record.payload_at as usize..][..record.payload_len as usize];
    if crc32c::crc32c(bytes) == record.crc { Ok(bytes) } else { Err(OpenError::Record(record.seq)) }
}

/// One direction of a connection's control messages.
pub struct ControlKey {
    key: LessSafeKey,
    counter: u64,
    /// For the watch over nonces.
    #[cfg(feature = "mutants")]
    bytes: [u8; 32],
}

impl ControlKey {
    /// From 32 bytes of the TLS exporter.
    pub fn new(bytes: &[u8; 32]) -> Self {
        Self {
            key: aead(bytes),
            counter: 0,
            #[cfg(feature = "mutants")]
            bytes: *bytes,
        }
    }

    fn nonce_bytes(counter: u64) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&counter.to_le_bytes());
        nonce
    }

    fn nonce(counter: u64) -> Nonce {
        Nonce::assume_unique_for_key(Self::nonce_bytes(counter))
    }

    /// Seals the next message.
    pub fn seal(&mut self, message: &Control, out: &mut [u8; CONTROL_LEN]) {
        let counter = self.counter;
        self.counter += 1;
        *out = [0; CONTROL_LEN];
        out[..8].copy_from_slice(&counter.to_le_bytes());
        let (plain, tag_room) = out[8..].split_at_mut(CONTROL_PLAIN_LEN);
        plain.copy_from_slice(&message.encode());
        #[cfg(feature = "mutants")]
        crate::mutant::sealed(&self.bytes, Self::nonce_bytes(counter), plain, "a control message");
        let tag = self
            .key
            .seal_in_place_separate_tag(Self::nonce(counter), Aad::from(counter.to_le_bytes()), plain)
            .expect("32 bytes can be sealed");
        tag_room[..TAG_LEN].copy_from_slice(tag.as_ref());
    }

    /// Opens the next message.
    ///
    /// # Errors
    /// Out of order, changed, or senseless: the connection ends.
    pub fn open(&mut self, bytes: &[u8; CONTROL_LEN]) -> Result<Control, OpenError> {
        let mut sealed = [0; CONTROL_PLAIN_LEN + TAG_LEN];
        sealed.copy_from_slice(&bytes[8..8 + CONTROL_PLAIN_LEN + TAG_LEN]);
        let counter = u64::read_from_bytes(&bytes[..8]).map(u64::from_le).unwrap_or(u64::MAX);
        if counter != self.counter || bytes[8 + CONTROL_PLAIN_LEN + TAG_LEN..].iter().any(|b| *b != 0) {
            return Err(OpenError::Seal("a control message (out of order)"));
        }
        let plain = self
            .key
            .open_in_place(Self::nonce(counter), Aad::from(counter.to_le_bytes()), &mut sealed)
            .map_err(|_| OpenError::Seal("a control message"))?;
        let message = Control::decode(plain)?;
        self.counter += 1;
        Ok(message)
    }
}

impl std::fmt::Debug for ControlKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ControlKey(message {})", self.counter)
    }
}
