//! What an attacker can do: set checksums right, and, with the keys of a source or target, seal whatever he likes.

use afterimage_wire::chunk::{CHUNK_HEAD_LEN, TAG_LEN};
use afterimage_wire::control::{CONTROL_LEN, CONTROL_PLAIN_LEN};
use afterimage_wire::frame::{DIRECTORY_ENTRY_LEN, FRAME_HEADER_LEN, FRAME_MAGIC, FrameHeader, MAX_CHUNKS, MAX_FRAME};
use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::record::Record;
use afterimage_wire::{ALIGN, WIRE_VERSION, align_up};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zerocopy::IntoBytes;

use crate::input::Input;

/// Sets the CRC32C at `at` right, counted with these four bytes zero.
pub fn mend(bytes: &mut [u8], at: usize) {
    if bytes.len() >= at + 4 {
        bytes[at..at + 4].fill(0);
        let crc = crc32c::crc32c(bytes);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// `data` with magic, version, its own length at `length_at` and a right CRC at `crc_at`: everything behind the first
/// checks of a structure.
pub fn signed(data: &[u8], magic: [u8; 4], length_at: usize, crc_at: usize, aligned: bool) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let length = bytes.len().max(64);
    bytes.resize(if aligned { align_up(length) } else { length }, 0);
    bytes[..4].copy_from_slice(&magic);
    bytes[4..6].copy_from_slice(&WIRE_VERSION.to_le_bytes());
    let length = bytes.len() as u32;
    bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    mend(&mut bytes, crc_at);
    bytes
}

fn aead(key: [u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("32 bytes are an AES-256 key"))
}

/// What the header of a forged frame says.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Stream.
    pub stream: StreamId,
    /// Incarnation.
    pub incarnation: IncarnationId,
    /// Frame number.
    pub number: u64,
    /// Highest acknowledged frame.
    pub acked: u64,
    /// First and last record.
    pub seqs: (u64, u64),
    /// Monotonic clock, nanoseconds.
    pub mono_ns: u64,
}

/// A frame of these plain chunks, sealed under `key`, whatever is in them. What does not fit is left out.
pub fn frame(key: [u8; 32], head: &Head, chunks: &[Vec<u8>]) -> Vec<u8> {
    let key = aead(key);
    let mut room = MAX_FRAME - FRAME_HEADER_LEN - MAX_CHUNKS * DIRECTORY_ENTRY_LEN;
    let fits = |chunk: &&Vec<u8>| {
        let fits = chunk.len() + TAG_LEN <= room;
        room -= if fits { chunk.len() + TAG_LEN } else { 0 };
        fits
    };
    let chunks: Vec<&Vec<u8>> = chunks.iter().take(MAX_CHUNKS).filter(fits).collect();
    let mut header = FrameHeader {
        magic: FRAME_MAGIC,
        version: WIRE_VERSION.into(),
        chunk_count: (chunks.len() as u16).into(),
        length: 0.into(),
        crc: 0.into(),
        stream: head.stream,
        incarnation: head.incarnation,
        number: head.number.into(),
        acked: head.acked.into(),
        first_seq: head.seqs.0.into(),
        last_seq: head.seqs.1.into(),
        mono_ns: head.mono_ns.into(),
        sync_ms: 0.into(),
        reserved: [0; 4],
    };
    let mut out = vec![0; FRAME_HEADER_LEN + chunks.len() * DIRECTORY_ENTRY_LEN];
    for (index, chunk) in chunks.iter().enumerate() {
        let at = out.len();
        let (nonce, data) = (header.nonce(index as u32), header.associated_data(index as u32));
        let mut sealed = (*chunk).clone();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(data), &mut sealed)
            .expect("a chunk is far below the cipher's limit");
        let entry = FRAME_HEADER_LEN + index * DIRECTORY_ENTRY_LEN;
        out[entry..entry + 4].copy_from_slice(&(at as u32).to_le_bytes());
        out[entry + 4..entry + 8].copy_from_slice(&(sealed.len() as u32).to_le_bytes());
        out.extend(sealed);
    }
    out.resize(align_up(out.len()), 0);
    header.length = (out.len() as u32).into();
    out[..FRAME_HEADER_LEN].copy_from_slice(header.as_bytes());
    mend(&mut out, 12);
    out
}

/// A plain chunk of these records and their payload, uncompressed; its lengths add up.
pub fn chunk(records: &[Record], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_HEAD_LEN + records.len() * 56 + payload.len());
    out.extend((records.len() as u16).to_le_bytes());
    out.extend([0, 0]);
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend([0; 4]);
    for record in records {
        out.extend(record.to_raw().as_bytes());
    }
    out.extend(payload);
    out
}

/// A control message of these plain bytes, sealed as number `counter` under `key`.
pub fn control(key: [u8; 32], counter: u64, plain: &[u8; CONTROL_PLAIN_LEN]) -> [u8; CONTROL_LEN] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&counter.to_le_bytes());
    let mut sealed = plain.to_vec();
    aead(key)
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(counter.to_le_bytes()), &mut sealed)
        .expect("32 bytes can be sealed");
    let mut out = [0; CONTROL_LEN];
    out[..8].copy_from_slice(&counter.to_le_bytes());
    out[8..8 + sealed.len()].copy_from_slice(&sealed);
    out
}

/// Changes some bytes of a file or message, as the input says; with `mending`, frames, heads and tables that begin on a
/// page boundary get their checksums set right, or a table is set right as a whole.
pub fn spoil(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    for _ in 0..1 + input.below(4) {
        if bytes.is_empty() {
            break;
        }
        // Mostly where headers are.
        let within = if input.flag() { bytes.len().min(512) } else { bytes.len() };
        let mut at = input.below(within as u64) as usize;
        if input.flag() {
            at = at / ALIGN * ALIGN + at % 128;
        }
        let at = at.min(bytes.len() - 1);
        match input.below(8) {
            0 => bytes.truncate(at),
            1 => {
                let len = (input.below(9000) as usize).min(bytes.len() - at);
                bytes[at..at + len].fill(input.byte());
            }
            2 => {
                let number = input.number(1).to_le_bytes();
                let len = 8.min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&number[..len]);
            }
            3 => {
                let piece = input.take(64);
                let len = piece.len().min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&piece[..len]);
            }
            4 => {
                let piece = bytes[at..(at + ALIGN).min(bytes.len())].to_vec();
                bytes.extend(piece);
            }
            _ => bytes[at] = input.byte(),
        }
    }
    if input.byte() < 200 {
        mend_all(bytes);
    }
}

/// Sets right what has a checksum: tables as a whole; heads of segments, frames, and pages and headers of a write-intent
/// log wherever one begins on a page.
pub fn mend_all(bytes: &mut [u8]) {
    let length_of = |bytes: &[u8]| u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
    for at in (0..bytes.len()).step_by(ALIGN) {
        let rest = &mut bytes[at..];
        if rest.len() < 64 {
            return;
        }
        match &rest[..4] {
            b"AISG" | b"AIFR" => {
                let length = length_of(rest);
                if length >= 64 && length <= rest.len() {
                    mend(&mut rest[..length], 12);
                }
            }
            b"AITL" | b"AISS" | b"AIDM" => {
                let length = u32::from_le_bytes([rest[12], rest[13], rest[14], rest[15]]) as usize;
                if length >= 64 && length <= rest.len() {
                    mend(&mut rest[..length], 8);
                }
            }
            b"AIIL" | b"AIIP" if rest.len() >= ALIGN => mend(&mut rest[..ALIGN], 8),
            _ => {}
        }
    }
}
