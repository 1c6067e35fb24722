//! Frames of which something cannot be read any more: telling which chunks, and living without them.

use std::collections::BTreeMap;

use afterimage_wire::chunk::Chunk;
use afterimage_wire::damage::LostFrame;
use afterimage_wire::frame::{FrameHeader, check_frame};
use afterimage_wire::ids::TimelineId;
use afterimage_wire::record::{Record, RecordKind};
use zerocopy::IntoBytes;

use super::Journal;
use super::segment::{ChunkEntry, FrameEntry, Segment};
use crate::index::{Entry, EntryKind, Points};
use crate::seal::{OpenError, open_chunk};

/// What a second look at a frame has shown.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// Chunks that cannot be opened, a bit each.
    pub chunks: u64,
    /// First and last record of those that can.
    good: Vec<(u64, u64)>,
}

impl Segment {
    /// The bytes are this frame, whole: what a scrub asks. Needs no key.
    pub(crate) fn is_whole(&self, frame: u32, bytes: &[u8]) -> bool {
        let Some(entry) = self.frames.get(frame as usize) else { return false };
        // A good frame of another place would be a misdirected write.
        check_frame(bytes).is_ok_and(|(found, _)| {
            let ours = self.header(entry);
            found.as_bytes()[16..96] == ours.as_bytes()[16..96]
        })
    }

    /// Which chunks of a frame can still be opened. The bytes are of no use afterwards.
    pub(crate) fn judge(&self, frame: u32, bytes: &mut [u8]) -> Option<Verdict> {
        let entry = self.frames.get(frame as usize)?;
        let header = self.header(entry);
        let mut verdict = Verdict { chunks: 0, good: Vec::new() };
        for index in 0..entry.chunks {
            let chunk = self.chunks[entry.first_chunk as usize + usize::from(index)];
            let (at, len) = (chunk.at as usize, chunk.sealed_len as usize);
            let opened = bytes.get_mut(at..at + len).and_then(|sealed| {
                let opened = open_chunk(&self.writer.key, &header, index.into(), sealed).ok()?;
                let table = Chunk::parse(opened).ok()?.table;
                Some((table.first()?.seq.get(), table.last()?.seq.get()))
            });
            match opened {
                Some(range) => verdict.good.push(range),
                None => verdict.chunks |= 1 << index,
            }
        }
        Some(verdict)
    }

    /// Chunks of a frame are lost: the index says so from now on, and what it knew of them is returned.
    pub(crate) fn lose(
        &mut self,
        timeline: TimelineId,
        frame: u32,
        verdict: &Verdict,
        points: &Points,
    ) -> Option<LostFrame> {
        let entry = *self.frames.get(frame as usize)?;
        let (first_seq, first_chunk) = (self.index.first_seq(), entry.first_chunk as usize);
        let mut lost: Vec<Entry> = Vec::new();
        self.index.lose(frame, verdict.chunks, |entry| lost.push(*entry));
        let mut records: Vec<(Record, Vec<u8>)> = Vec::new();
        records.extend(
            points
                .records_within(entry.first_seq, entry.last_seq)
                .into_iter()
                .filter(|(record, _)| !verdict.good.iter().any(|(first, last)| (*first..=*last).contains(&record.seq))),
        );
        records.extend(lost.iter().map(|lost| {
            let kind = match lost.kind {
                EntryKind::Data => RecordKind::Write,
                EntryKind::Zero => RecordKind::Zero,
                EntryKind::Unreadable => RecordKind::Unreadable,
            };
            let record = Record {
                seq: first_seq + u64::from(lost.seq_delta),
                kind,
                disk: lost.disk,
                offset: lost.start,
                len: lost.len,
                mono_ns: entry.mono_ns,
                wall_ns: self.wall_of(lost),
                payload_at: 0,
                payload_len: if kind == RecordKind::Write { lost.len } else { 0 },
                crc: 0,
            };
            (record, Vec::new())
        }));
        records.sort_by_key(|(record, _)| record.seq);
        *self.lost.entry(frame).or_default() |= verdict.chunks;
        let header = FrameHeader { length: entry.len.into(), ..self.header(&entry) };
        let directory = &self.chunks[first_chunk..first_chunk + usize::from(entry.chunks)];
        Some(LostFrame {
            timeline,
            segment: self.number,
            at: entry.at,
            header,
            wall_ns: entry.wall_ns,
            lost: self.lost[&frame],
            directory: directory.iter().map(|chunk| (chunk.at, chunk.sealed_len)).collect(),
            records,
        })
    }

    /// A frame of which something was lost is whole again, as these bytes show: its records are what they were. The bytes
    /// are of no use afterwards.
    ///
    /// # Errors
    /// It cannot be opened: what was lost stays so.
    pub(crate) fn regain(&mut self, frame: u32, bytes: &mut [u8]) -> Result<(), OpenError> {
        let Some(entry) = self.frames.get(frame as usize) else { return Ok(()) };
        let (header, first_seq) = (self.header(entry), self.index.first_seq());
        let mut places = BTreeMap::new();
        for index in 0..entry.chunks {
            let chunk = self.chunks[entry.first_chunk as usize + usize::from(index)];
            let range = chunk.at as usize..chunk.at as usize + chunk.sealed_len as usize;
            let sealed = bytes.get_mut(range).ok_or(OpenError::Seal("a chunk"))?;
            let chunk = Chunk::parse(open_chunk(&self.writer.key, &header, index.into(), sealed)?)?;
            for record in chunk.records() {
                let record = record?;
                if matches!(record.kind, RecordKind::Write | RecordKind::SyncWrite) {
                    places.insert((record.seq - first_seq) as u32, (index as u8, record.payload_at));
                }
            }
        }
        self.index.regain(frame, |seq_delta| places.get(&seq_delta).copied());
        self.lost.remove(&frame);
        Ok(())
    }

    /// Takes in a frame that is known to have lost chunks: the others are opened, of the lost ones what was known
    /// counts.
    fn take_lost(
        &mut self,
        known: &LostFrame,
        bytes: &mut [u8],
        points: &mut Points,
        plain: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        let (first_seq, last_seq) = (known.header.first_seq.get(), known.header.last_seq.get());
        let frame = self.frames.len() as u32;
        let first_chunk = self.chunks.len();
        let mut left = known.records.iter().peekable();
        let mut wall_ns = known.wall_ns;
        let mut hole = None;
        for (index, &(at, sealed_len)) in known.directory.iter().enumerate() {
            self.chunks.push(ChunkEntry { at, sealed_len });
            if known.lost & 1 << index != 0 {
                hole.get_or_insert(index as u8);
                continue;
            }
            let sealed =
                bytes.get_mut(at as usize..at as usize + sealed_len as usize).ok_or(OpenError::Seal("a chunk"))?;
            let chunk = Chunk::parse(open_chunk(&self.writer.key, &known.header, index as u32, sealed)?)?;
            let mut seq = chunk.table.first().map_or(first_seq, |record| record.seq.get());
            self.take_known(&mut left, seq, frame, hole.take(), wall_ns, points)?;
            self.take_chunk(&chunk, (frame, index as u8), &mut seq, last_seq, &mut wall_ns, points, false, plain)?;
        }
        self.take_known(&mut left, u64::MAX, frame, hole, wall_ns, points)?;
        self.lost.insert(frame, known.lost);
        self.frames.push(FrameEntry {
            at: known.at,
            len: known.header.length.get(),
            first_chunk: first_chunk as u32,
            chunks: known.header.chunk_count.get(),
            sync_ms: known.header.sync_ms.get(),
            number: known.header.number.get(),
            acked: known.header.acked.get(),
            first_seq,
            last_seq,
            mono_ns: known.header.mono_ns.get(),
            wall_ns: known.wall_ns,
        });
        points.reached(last_seq);
        Ok(())
    }

    /// What is known of lost records below `until`.
    fn take_known<'a>(
        &mut self,
        left: &mut std::iter::Peekable<impl Iterator<Item = &'a (Record, Vec<u8>)>>,
        until: u64,
        frame: u32,
        chunk: Option<u8>,
        wall_ns: u64,
        points: &mut Points,
    ) -> Result<(), OpenError> {
        while let Some((record, payload)) = left.next_if(|(record, _)| record.seq < until) {
            let mut record = *record;
            if matches!(record.kind, RecordKind::Write | RecordKind::SyncWrite) {
                record.kind = RecordKind::Unreadable;
            }
            self.take_record(&record, payload, frame, chunk.unwrap_or(0), wall_ns, points)?;
        }
        Ok(())
    }
}

impl Journal {
    /// As [`Journal::index_frame`], of a frame with chunks that are known to be lost.
    ///
    /// # Errors
    /// More of it is lost than was known: nothing of it is in the index.
    pub(crate) fn index_lost(
        &mut self,
        uid: u64,
        known: &LostFrame,
        bytes: &mut [u8],
        points: &mut Points,
        plain: &mut Vec<u8>,
    ) -> Result<(), OpenError> {
        let Some(position) = self.position(uid) else { return Ok(()) };
        let segment = &mut self.segments[position];
        let now = self.clock.advance(segment.writer.incarnation, known.header.mono_ns.get());
        if segment.frames.is_empty() {
            segment.time.0 = now;
        }
        segment.time.1 = now;
        let chunks = segment.chunks.len();
        segment.take_lost(known, bytes, points, plain).inspect_err(|_| {
            segment.chunks.truncate(chunks);
            segment.index.forget_from(known.header.first_seq.get());
        })
    }
}
