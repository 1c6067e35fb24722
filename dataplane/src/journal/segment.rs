//! One segment in memory: where its frames and chunks lie, and the index of their records.

use std::collections::BTreeMap;
use std::sync::Arc;

use afterimage_wire::chunk::{Chunk, Codec};
use afterimage_wire::frame::{DirectoryEntry, FRAME_HEADER_LEN, FRAME_MAGIC, FrameHeader};
use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::record::{DiskInfo, Record, RecordKind};
use afterimage_wire::segment::{Predecessor, SegmentHead, WrappedKey};
use afterimage_wire::{ALIGN, FormatError, WIRE_VERSION};
use zerocopy::FromBytes;

use crate::index::{Entry, EntryKind, Points, SegmentIndex};
use crate::io::{File, Nanos};
use crate::seal::{DataKey, OpenError, open_chunk, payload, record_payload};

/// A writer of frames: one life of a source or of a delta, as the heads of its segments name it.
#[derive(Debug)]
pub struct Writer {
    /// Its id.
    pub incarnation: IncarnationId,
    /// The one before it.
    pub predecessor: Predecessor,
    /// Its data key, wrapped.
    pub wrapped: WrappedKey,
    /// Its data key.
    pub key: DataKey,
    /// Disks when it began.
    pub disks: Vec<DiskInfo>,
}

/// Where a frame lies and what its header says: enough to open its chunks without reading the header again.
#[derive(Copy, Clone, Debug)]
pub struct FrameEntry {
    /// Byte offset in the segment.
    pub at: u32,
    /// Bytes.
    pub len: u32,
    /// First of its chunks in the segment's table.
    pub first_chunk: u32,
    /// Chunks.
    pub chunks: u16,
    /// As its header says: needed to open its chunks.
    pub sync_ms: u32,
    /// Frame number.
    pub number: u64,
    /// Highest acknowledged frame as its header says.
    pub acked: u64,
    /// First record.
    pub first_seq: u64,
    /// Last record.
    pub last_seq: u64,
    /// Source's monotonic clock, nanoseconds.
    pub mono_ns: u64,
    /// Source's wall clock at the first record, nanoseconds since the epoch.
    pub wall_ns: u64,
}

/// Where a sealed chunk lies in its frame.
#[derive(Copy, Clone, Debug)]
pub struct ChunkEntry {
    /// Byte offset in the frame.
    pub at: u32,
    /// Bytes with the tag.
    pub sealed_len: u32,
}

/// A segment.
#[derive(Debug)]
pub struct Segment {
    /// Names it in memory; never used twice.
    pub uid: u64,
    /// Number along its timeline.
    pub number: u64,
    /// File.
    pub path: String,
    /// Stream.
    pub stream: StreamId,
    /// Writer of all its frames.
    pub writer: Arc<Writer>,
    /// Bytes of the file.
    pub size: u64,
    /// Frames.
    pub frames: Vec<FrameEntry>,
    /// Chunks of all frames.
    pub chunks: Vec<ChunkEntry>,
    /// Records.
    pub index: SegmentIndex,
    /// Stream time at the first frame's record and at the last frame, nanoseconds.
    pub time: (Nanos, Nanos),
    /// Open for reading (and writing while it is the active one).
    pub file: Option<File>,
    /// Reads that still need the file.
    pub users: u32,
    /// Chunks that cannot be read any more, a bit each, by frame in the table.
    pub lost: BTreeMap<u32, u64>,
    /// What is not in the index any more has been overwritten by records up to this one; 0: all of it is.
    pub overwritten_by: u64,
}

impl Segment {
    /// Empty; its record numbers are counted from `first_seq`.
    pub fn new(
        uid: u64,
        number: u64,
        path: String,
        stream: StreamId,
        writer: Arc<Writer>,
        size: u64,
        first_seq: u64,
    ) -> Self {
        Self {
            uid,
            number,
            path,
            stream,
            writer,
            size,
            frames: Vec::new(),
            chunks: Vec::new(),
            index: SegmentIndex::new(first_seq),
            time: (0, 0),
            file: None,
            users: 0,
            lost: BTreeMap::new(),
            overwritten_by: 0,
        }
    }

    /// The chunk cannot be read any more.
    pub fn is_lost(&self, frame: u32, chunk: u8) -> bool {
        self.lost.get(&frame).is_some_and(|chunks| chunks & 1 << chunk != 0)
    }

    /// Last record, if it holds any frame.
    pub fn last_seq(&self) -> Option<u64> {
        self.frames.last().map(|frame| frame.last_seq)
    }

    /// First record, if it holds any frame.
    pub fn first_seq(&self) -> Option<u64> {
        self.frames.first().map(|frame| frame.first_seq)
    }

    /// Memory, bytes.
    pub fn bytes(&self) -> usize {
        self.index.bytes()
            + self.frames.capacity() * size_of::<FrameEntry>()
            + self.chunks.capacity() * size_of::<ChunkEntry>()
    }

    /// The header of a frame, put together again as far as it is associated data.
    pub fn header(&self, frame: &FrameEntry) -> FrameHeader {
        FrameHeader {
            magic: FRAME_MAGIC,
            version: WIRE_VERSION.into(),
            chunk_count: frame.chunks.into(),
            length: 0.into(),
            crc: 0.into(),
            stream: self.stream,
            incarnation: self.writer.incarnation,
            number: frame.number.into(),
            acked: frame.acked.into(),
            first_seq: frame.first_seq.into(),
            last_seq: frame.last_seq.into(),
            mono_ns: frame.mono_ns.into(),
            sync_ms: frame.sync_ms.into(),
            reserved: [0; 4],
        }
    }

    /// Where chunk `chunk` of frame `frame` lies in the file: byte offset and length with the tag.
    pub fn locate(&self, frame: u32, chunk: u8) -> Option<(u64, usize)> {
        let frame = self.frames.get(frame as usize)?;
        if u16::from(chunk) >= frame.chunks {
            return None;
        }
        let chunk = self.chunks[frame.first_chunk as usize + usize::from(chunk)];
        Some((u64::from(frame.at) + u64::from(chunk.at), chunk.sealed_len as usize))
    }

    /// Takes in a frame whose CRC and directory have been checked ([`afterimage_wire::frame::check_frame`]) and that
    /// lies at byte `at` of the file: its chunks are opened in place, their records checked and put into the index and
    /// into `points`.
    ///
    /// `deep` also checks each record's payload against its CRC (after decompression).
    ///
    /// # Errors
    /// The seal, a record or its order do not fit. What the frame had put into the index until then stays there, marked
    /// by no number above the last good frame's: the caller takes the frame as damaged.
    pub fn take_frame(
        &mut self,
        at: u64,
        bytes: &mut [u8],
        points: &mut Points,
        deep: bool,
        plain: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        let header = *FrameHeader::parse(bytes)?;
        let count = usize::from(header.chunk_count.get());
        let bad = |detail| OpenError::Format(FormatError::Malformed { what: "frame", detail });
        let frame_number = self.frames.len() as u32;
        let (first_seq, last_seq) = (header.first_seq.get(), header.last_seq.get());
        if first_seq < self.index.first_seq() || last_seq - self.index.first_seq() > u64::from(u32::MAX) {
            return Err(bad("record numbers far apart"));
        }
        let mut seq = first_seq;
        let mut wall_ns = 0;
        let first_chunk = self.chunks.len();
        for index in 0..count {
            let entry_at = FRAME_HEADER_LEN + index * size_of::<DirectoryEntry>();
            let entry = DirectoryEntry::read_from_bytes(&bytes[entry_at..entry_at + size_of::<DirectoryEntry>()])
                .map_err(|_| bad("directory"))?;
            let (chunk_at, sealed_len) = (entry.at.get() as usize, entry.sealed_len.get() as usize);
            self.chunks.push(ChunkEntry { at: entry.at.get(), sealed_len: entry.sealed_len.get() });
            let opened =
                open_chunk(&self.writer.key, &header, index as u32, &mut bytes[chunk_at..chunk_at + sealed_len])
                    .and_then(|opened| Ok(Chunk::parse(opened)?));
            let chunk = opened.inspect_err(|_| self.chunks.truncate(first_chunk))?;
            let result = self.take_chunk(
                &chunk,
                (frame_number, index as u8),
                &mut seq,
                last_seq,
                &mut wall_ns,
                points,
                deep,
                plain,
            );
            result.inspect_err(|_| self.chunks.truncate(first_chunk))?;
        }
        if seq != last_seq + 1 {
            self.chunks.truncate(first_chunk);
            return Err(bad("fewer records than its header says"));
        }
        self.frames.push(FrameEntry {
            at: u32::try_from(at).map_err(|_| bad("position"))?,
            len: header.length.get(),
            first_chunk: first_chunk as u32,
            chunks: count as u16,
            sync_ms: header.sync_ms.get(),
            number: header.number.get(),
            acked: header.acked.get(),
            first_seq,
            last_seq,
            mono_ns: header.mono_ns.get(),
            wall_ns,
        });
        points.reached(last_seq);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn take_chunk(
        &mut self,
        chunk: &Chunk<'_>,
        (frame, number): (u32, u8),
        seq: &mut u64,
        last_seq: u64,
        wall_ns: &mut u64,
        points: &mut Points,
        deep: bool,
        plain: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        // Payloads are needed for checking, and for the few records whose payload says something to the index.
        let wanted = deep
            || chunk.table.iter().any(|raw| {
                use RecordKind::*;
                [Cut, Join, Resize, SyncBegin, SyncEnd].iter().any(|kind| *kind as u8 == raw.kind)
            });
        let data: &[u8] = if wanted || chunk.codec == Codec::Plain { payload(chunk, plain)? } else { &[] };
        for record in chunk.records() {
            let record = record?;
            if record.seq != *seq || record.seq > last_seq {
                return Err(OpenError::Format(FormatError::Malformed { what: "record", detail: "out of order" }));
            }
            if *wall_ns == 0 {
                *wall_ns = record.wall_ns;
            }
            let body = if wanted { record_payload(&record, data)? } else { &[] };
            self.take_record(&record, body, frame, number, *wall_ns, points)?;
            *seq += 1;
        }
        Ok(())
    }

    pub(super) fn take_record(
        &mut self,
        record: &Record,
        body: &[u8],
        frame: u32,
        chunk: u8,
        frame_wall: u64,
        points: &mut Points,
    ) -> Result<(), OpenError> {
        let delta_us = (record.wall_ns as i64).wrapping_sub(frame_wall as i64) / 1000;
        let mut entry = Entry {
            start: record.offset,
            seq_delta: (record.seq - self.index.first_seq()) as u32,
            len: record.len,
            frame,
            payload_at: record.payload_at,
            wall_delta: delta_us.clamp(i32::MIN.into(), i32::MAX.into()) as i32,
            disk: record.disk,
            chunk,
            ..Entry::default()
        };
        let bad = |detail| OpenError::Format(FormatError::Malformed { what: "record", detail });
        let size = points.now().get(&record.disk).map(|life| life.info.size);
        // A write past the end would make the image as long as whoever holds the key says.
        if record.len > 0 && size.is_some_and(|size| record.end() > size) {
            return Err(bad("past the end of its disk"));
        }
        match record.kind {
            RecordKind::Write | RecordKind::SyncWrite => entry.kind = EntryKind::Data,
            RecordKind::Zero | RecordKind::Discard | RecordKind::SyncZero => entry.kind = EntryKind::Zero,
            RecordKind::Unreadable => entry.kind = EntryKind::Unreadable,
            RecordKind::Join | RecordKind::Resize => {
                let new = DiskInfo::decode(body)?.size;
                // No source says so: a disk of another size than the table's is refused at the handshake.
                if size.is_some_and(|old| new < old) {
                    return Err(bad("a disk that becomes smaller"));
                }
                points.record(record, body)?;
                return Ok(());
            }
            _ => {
                points.record(record, body)?;
                return Ok(());
            }
        }
        if record.len > 0 {
            self.index.add(entry);
        }
        Ok(())
    }

    /// Time of record `seq`, if it is one that the index holds: source's wall clock, nanoseconds.
    pub fn wall_of(&self, entry: &Entry) -> u64 {
        let base = self.frames.get(entry.frame as usize).map_or(0, |frame| frame.wall_ns);
        base.wrapping_add_signed(i64::from(entry.wall_delta) * 1000)
    }
}

/// What the head of a new segment says.
pub fn head(
    stream: StreamId,
    timeline: afterimage_wire::ids::TimelineId,
    number: u64,
    writer: &Writer,
    first: (u64, u64),
    disks: Vec<DiskInfo>,
    wall_ns: u64,
) -> SegmentHead {
    SegmentHead {
        stream,
        timeline,
        incarnation: writer.incarnation,
        predecessor: writer.predecessor,
        segment: number,
        first_frame: first.0,
        first_seq: first.1,
        created_wall_ns: wall_ns,
        key: writer.wrapped,
        disks,
    }
}

/// The aligned range that covers `[at, at + len)`: offset, length, and where `at` lies in it.
pub fn cover_aligned(at: u64, len: usize, block: usize) -> (u64, usize, usize) {
    let block = block.max(1) as u64;
    let start = at / block * block;
    let end = (at + len as u64).next_multiple_of(block);
    (start, (end - start) as usize, (at - start) as usize)
}

const _: () = assert!(ALIGN == 4096);
