//! What a target has found to be unreadable in its journals, kept beside them: which chunks of which frames, and what
//! the index knew of their records. With it a journal is read back after a start as it was known before: the points and
//! blocks that need what is lost stay named, and all others stay good.
//!
//! A file that is replaced as a whole (write, sync, rename, sync the folder).
//!
//! ```text
//!   0  magic "AIDM"   4 version u16   6 reserved u16   8 crc u32 (with this field 0)   12 length u32
//!  16  stream [16]   32 frame_count u32   36 stretch_count u32 (version 2), zeros to 64
//!  64  frames: timeline [16], segment u64, at u32, record_count u32, wall_ns u64, lost chunks u64 (a bit each),
//!              frame header [96], chunk directory (8 bytes each, as in the frame),
//!              records of the lost chunks: record [56], payload length u32, payload (of cuts, joins and the like)
//!   …  stretches (version 2): timeline [16], incarnation [16], segment u64, first frame u64, last frame u64,
//!              first record u64, newest record when it was found u64
//! ```
//! The data of writes is what is lost: a write's record says where it was. Of a stretch nothing is known but its place,
//! and where the stream stood when it was found: what was compared before that may have been compared with it. A list
//! without stretches is written as version 1, which has no place for them.

use bytes::{Buf, BufMut};
use zerocopy::{FromBytes, IntoBytes};

use crate::frame::{FRAME_HEADER_LEN, FrameHeader};
use crate::ids::{IncarnationId, StreamId, TimelineId};
use crate::record::{RECORD_LEN, RawRecord, Record};
use crate::{FormatError, WIRE_VERSION, finished, get_id, get_number, need};

/// First bytes.
pub const DAMAGE_MAGIC: [u8; 4] = *b"AIDM";
/// Most frames that are remembered; more are not: they are found again.
pub const MAX_LOST_FRAMES: usize = 1024;
/// Most stretches of frames that are remembered.
pub const MAX_LOST_STRETCHES: usize = 256;
/// Version with stretches.
const STRETCHES: u16 = 2;
/// Bytes of a stretch.
const STRETCH_LEN: usize = 72;
/// Most records of one frame.
pub const MAX_LOST_RECORDS: usize = crate::frame::MAX_CHUNKS * crate::chunk::MAX_CHUNK_RECORDS;
/// Longest payload that is kept with a record (a join with its names), bytes.
pub const MAX_KEPT_PAYLOAD: usize = 4096;

/// A frame with chunks that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LostFrame {
    /// Branch whose journal it is in.
    pub timeline: TimelineId,
    /// Segment number.
    pub segment: u64,
    /// Byte offset in the segment.
    pub at: u32,
    /// Its header (length and CRC count for nothing).
    pub header: FrameHeader,
    /// Source's wall clock at its first record, nanoseconds since the epoch.
    pub wall_ns: u64,
    /// Lost chunks, a bit each; none if only header, directory or padding are damaged.
    pub lost: u64,
    /// Where each chunk lies in the frame: offset and length.
    pub directory: Vec<(u32, u32)>,
    /// Records of the lost chunks by number, with the payload of those that are no data.
    pub records: Vec<(Record, Vec<u8>)>,
}

/// Frames of one segment of which nothing is known.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct LostStretch {
    /// Branch whose journal they are in.
    pub timeline: TimelineId,
    /// Writer.
    pub incarnation: IncarnationId,
    /// Segment number.
    pub segment: u64,
    /// First frame that is lost.
    pub first_frame: u64,
    /// Last frame that is lost; the highest number there is for all the rest of the segment.
    pub last_frame: u64,
    /// First record that may be lost.
    pub first_seq: u64,
    /// Newest record that the stream had when the loss was found.
    pub found_at: u64,
}

/// The file, taken apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DamageFile {
    /// Stream.
    pub stream: StreamId,
    /// Frames, in no order.
    pub frames: Vec<LostFrame>,
    /// Stretches, in no order.
    pub stretches: Vec<LostStretch>,
}

impl DamageFile {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(&DAMAGE_MAGIC);
        out.put_u16_le(if self.stretches.is_empty() { WIRE_VERSION } else { STRETCHES });
        out.put_u16_le(0);
        out.put_u64_le(0); // CRC and length, below
        out.put_slice(&self.stream.0);
        out.put_u32_le(self.frames.len() as u32);
        out.put_u32_le(self.stretches.len() as u32);
        out.put_bytes(0, 24);
        for frame in &self.frames {
            out.put_slice(&frame.timeline.0);
            out.put_u64_le(frame.segment);
            out.put_u32_le(frame.at);
            out.put_u32_le(frame.records.len() as u32);
            out.put_u64_le(frame.wall_ns);
            out.put_u64_le(frame.lost);
            out.put_slice(frame.header.as_bytes());
            for (at, len) in &frame.directory {
                out.put_u32_le(*at);
                out.put_u32_le(*len);
            }
            for (record, payload) in &frame.records {
                out.put_slice(record.to_raw().as_bytes());
                out.put_u32_le(payload.len() as u32);
                out.put_slice(payload);
            }
        }
        for stretch in &self.stretches {
            out.put_slice(&stretch.timeline.0);
            out.put_slice(&stretch.incarnation.0);
            out.put_u64_le(stretch.segment);
            out.put_u64_le(stretch.first_frame);
            out.put_u64_le(stretch.last_frame);
            out.put_u64_le(stretch.first_seq);
            out.put_u64_le(stretch.found_at);
        }
        crate::close_table(&mut out);
        out
    }

    /// Reads the file; what follows its length is ignored.
    ///
    /// # Errors
    /// Foreign, damaged, of another version, or senseless.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "damage list";
        let bad = |detail| FormatError::Malformed { what: WHAT, detail };
        let (version, bytes) = crate::open_table_up_to(STRETCHES, bytes, DAMAGE_MAGIC, WHAT)?;
        let mut input = &bytes[16..];
        let stream = StreamId(get_id(&mut input, WHAT)?);
        let (count, stretch_count) = (input.get_u32_le() as usize, input.get_u32_le() as usize);
        let counts_fit = count <= MAX_LOST_FRAMES && stretch_count <= MAX_LOST_STRETCHES;
        if !counts_fit || (version >= STRETCHES) == (stretch_count == 0) || input[..24] != [0; 24] {
            return Err(bad("head"));
        }
        input.advance(24);
        let mut frames = Vec::new();
        for _ in 0..count {
            need(&input, 48 + FRAME_HEADER_LEN, WHAT)?;
            let timeline = TimelineId(get_id(&mut input, WHAT)?);
            let (segment, at) = (get_number(&mut input, WHAT)?, input.get_u32_le());
            let records = input.get_u32_le() as usize;
            let (wall_ns, lost) = (input.get_u64_le(), input.get_u64_le());
            let header = *FrameHeader::parse(input)?;
            input.advance(FRAME_HEADER_LEN);
            let chunks = usize::from(header.chunk_count.get());
            if records > MAX_LOST_RECORDS || (chunks < 64 && lost >> chunks != 0) {
                return Err(bad("counts"));
            }
            need(&input, chunks * 8, WHAT)?;
            let directory = (0..chunks).map(|_| (input.get_u32_le(), input.get_u32_le())).collect();
            let mut kept = Vec::new();
            for _ in 0..records {
                need(&input, RECORD_LEN + 4, WHAT)?;
                let (raw, rest) = RawRecord::ref_from_prefix(input).map_err(|_| bad("record"))?;
                let record = Record::from_raw(raw)?;
                input = rest;
                let len = input.get_u32_le() as usize;
                if len > MAX_KEPT_PAYLOAD {
                    return Err(bad("payload"));
                }
                need(&input, len, WHAT)?;
                kept.push((record, input[..len].to_vec()));
                input.advance(len);
            }
            frames.push(LostFrame { timeline, segment, at, header, wall_ns, lost, directory, records: kept });
        }
        let mut stretches = Vec::new();
        for _ in 0..stretch_count {
            need(&input, STRETCH_LEN, WHAT)?;
            let timeline = TimelineId(get_id(&mut input, WHAT)?);
            // Of a first segment whose head is lost not even the writer is known: zeros.
            let incarnation = IncarnationId(get_id(&mut input, WHAT)?);
            let segment = get_number(&mut input, WHAT)?;
            let (first_frame, last_frame) = (input.get_u64_le(), input.get_u64_le());
            let (first_seq, found_at) = (get_number(&mut input, WHAT)?, get_number(&mut input, WHAT)?);
            if first_frame > last_frame {
                return Err(bad("a stretch that ends before it begins"));
            }
            stretches.push(LostStretch {
                timeline,
                incarnation,
                segment,
                first_frame,
                last_frame,
                first_seq,
                found_at,
            });
        }
        finished(&input, WHAT)?;
        Ok(Self { stream, frames, stretches })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FRAME_MAGIC;
    use crate::record::RecordKind;

    fn sample() -> DamageFile {
        let header = FrameHeader {
            magic: FRAME_MAGIC,
            version: WIRE_VERSION.into(),
            chunk_count: 2.into(),
            length: 8192.into(),
            crc: 7.into(),
            stream: StreamId([1; 16]),
            incarnation: IncarnationId([2; 16]),
            number: 9.into(),
            acked: 8.into(),
            first_seq: 100.into(),
            last_seq: 102.into(),
            mono_ns: 5.into(),
            sync_ms: 0.into(),
            reserved: [0; 4],
        };
        let record = |seq, kind, len| Record {
            seq,
            kind,
            disk: 3,
            offset: 4096,
            len,
            mono_ns: 1,
            wall_ns: 2,
            payload_at: 0,
            payload_len: if kind == RecordKind::Cut { 9 } else { len },
            crc: 0,
        };
        let records =
            vec![(record(100, RecordKind::Write, 512), Vec::new()), (record(101, RecordKind::Cut, 0), vec![1; 9])];
        let frame = LostFrame {
            timeline: TimelineId([4; 16]),
            segment: 12,
            at: 4096,
            header,
            wall_ns: 77,
            lost: 1,
            directory: vec![(112, 1000), (1120, 2000)],
            records,
        };
        let stretch = LostStretch {
            timeline: TimelineId([4; 16]),
            incarnation: IncarnationId([2; 16]),
            segment: 13,
            first_frame: 11,
            last_frame: u64::MAX,
            first_seq: 111,
            found_at: 222,
        };
        DamageFile { stream: StreamId([1; 16]), frames: vec![frame], stretches: vec![stretch] }
    }

    #[test]
    fn decodes_what_it_encodes() {
        let file = sample();
        let mut bytes = file.encode();
        assert_eq!(DamageFile::decode(&bytes).unwrap(), file);
        bytes.resize(8192, 0);
        assert_eq!(DamageFile::decode(&bytes).unwrap(), file, "padding is ignored");
    }

    #[test]
    fn without_stretches_it_is_what_it_was() {
        let file = DamageFile { stretches: Vec::new(), ..sample() };
        let bytes = file.encode();
        assert_eq!((bytes[4], DamageFile::decode(&bytes)), (1, Ok(file)));
        assert_eq!(sample().encode()[4], 2);
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            assert!(DamageFile::decode(&changed).is_err(), "byte {at}");
            assert!(DamageFile::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
