//! From a place on a disk and a place in the stream to the bytes: which record is the newest there.
//!
//! - [`run`]: the records of a segment, sorted, as implicit interval trees ([`SegmentIndex`]).
//! - [`points`]: cuts, joins, synchronisations: which places are restore points, and of which disks ([`Points`]).
//! - [`Cover`], here: lays segments over each other, newest first, until a range is covered.

pub mod points;
pub mod run;

pub use points::{CutEntry, DiskLife, OpenSync, Points};
pub use run::{Entry, EntryKind, SegmentIndex};

/// What a piece of a disk is at a point.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// Unknown: the source could not read or write it.
    Unreadable,
    /// In a chunk of a segment.
    Data {
        /// [`crate::journal::Segment::uid`].
        segment: u64,
        /// Number of the frame in the segment's table.
        frame: u32,
        /// Chunk of the frame.
        chunk: u8,
        /// First byte in the chunk's plain payload.
        at: u32,
    },
    /// No record covers it: what is below (the replica image, or zeros) counts.
    Below,
}

/// A stretch of a disk with one content.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What it holds.
    pub content: Content,
    /// Number of the record that it is from; 0 for [`Content::Below`].
    pub seq: u64,
}

/// Finds the newest record for each byte of a range. Lay segments over it newest first; keep one around, its memory is
/// reused.
#[derive(Debug, Default)]
pub struct Cover {
    gaps: Vec<(u64, u64)>,
    hits: Vec<Entry>,
    pieces: Vec<Piece>,
}

impl Cover {
    /// Begins with the range `[start, end)`, nothing of it covered.
    pub fn start(&mut self, start: u64, end: u64) {
        self.gaps.clear();
        self.pieces.clear();
        if start < end {
            self.gaps.push((start, end));
        }
    }

    /// True once everything is covered: older segments need not be asked.
    pub fn is_covered(&self) -> bool {
        self.gaps.is_empty()
    }

    /// Covers what is still open with the records of `index` up to `max_seq`.
    pub fn lay(&mut self, index: &SegmentIndex, segment: u64, disk: u16, max_seq: u64) {
        for part in index.newest_first() {
            let (Some(first), Some(last)) = (self.gaps.first(), self.gaps.last()) else { return };
            let (start, end) = (first.0, last.1);
            self.hits.clear();
            part.overlapping(disk, start, end, &mut self.hits);
            let limit = max_seq.checked_sub(index.first_seq());
            self.hits.retain(|hit| limit.is_some_and(|limit| u64::from(hit.seq_delta) <= limit));
            // Newest first. Pieces of one record have one number and do not overlap.
            self.hits.sort_unstable_by_key(|hit| std::cmp::Reverse(hit.seq_delta));
            for i in 0..self.hits.len() {
                let hit = self.hits[i];
                self.take(&hit, segment, index.first_seq());
                if self.gaps.is_empty() {
                    return;
                }
            }
        }
    }

    fn take(&mut self, hit: &Entry, segment: u64, first_seq: u64) {
        // Gaps are sorted and apart: those that the record meets are neighbours.
        let from = self.gaps.partition_point(|gap| gap.1 <= hit.start);
        let to = from + self.gaps[from..].partition_point(|gap| gap.0 < hit.end());
        if from == to {
            return;
        }
        let seq = first_seq + u64::from(hit.seq_delta);
        for &(start, end) in &self.gaps[from..to] {
            let (start, end) = (start.max(hit.start), end.min(hit.end()));
            let content = match hit.kind {
                EntryKind::Zero => Content::Zero,
                EntryKind::Unreadable => Content::Unreadable,
                EntryKind::Data => Content::Data {
                    segment,
                    frame: hit.frame,
                    chunk: hit.chunk,
                    at: hit.payload_at + (start - hit.start) as u32,
                },
            };
            self.pieces.push(Piece { offset: start, len: end - start, content, seq });
        }
        let (first, last) = (self.gaps[from], self.gaps[to - 1]);
        let before = (first.0 < hit.start).then_some((first.0, hit.start));
        let behind = (hit.end() < last.1).then_some((hit.end(), last.1));
        self.gaps.splice(from..to, before.into_iter().chain(behind));
    }

    /// The pieces in the order of the disk; what no record covers is [`Content::Below`].
    pub fn finish(&mut self) -> &[Piece] {
        for (start, end) in self.gaps.drain(..) {
            self.pieces.push(Piece { offset: start, len: end - start, content: Content::Below, seq: 0 });
        }
        self.pieces.sort_unstable_by_key(|piece| piece.offset);
        &self.pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(seq_delta: u32, disk: u16, start: u64, len: u32, kind: EntryKind) -> Entry {
        Entry { start, seq_delta, len, frame: seq_delta, disk, kind, payload_at: 0, ..Entry::default() }
    }

    proptest! {
        /// Random records over several segments against a byte-wise model, at every place.
        #[test]
        fn newest_record_of_each_byte(
            records in proptest::collection::vec((0u16..2, 0u64..200, 1u32..80, 0u8..3), 1..300),
            cut in 0usize..300,
            at in 0usize..300,
        ) {
            const FIRST: u64 = 1000;
            let cut = cut.min(records.len());
            let at = at.min(records.len() - 1);
            let mut old = SegmentIndex::new(FIRST);
            let mut new = SegmentIndex::new(FIRST + cut as u64);
            let mut model = vec![vec![0u64; 300]; 2];
            for (i, &(disk, start, len, kind)) in records.iter().enumerate() {
                let kind = [EntryKind::Data, EntryKind::Zero, EntryKind::Unreadable][usize::from(kind)];
                if i < cut {
                    old.add(entry(i as u32, disk, start, len, kind));
                } else {
                    new.add(entry((i - cut) as u32, disk, start, len, kind));
                }
                if i <= at {
                    model[usize::from(disk)][start as usize..(start + u64::from(len)) as usize].fill(FIRST + i as u64);
                }
            }
            old.seal();
            let mut cover = Cover::default();
            for disk in 0..2u16 {
                cover.start(5, 290);
                cover.lay(&new, 2, disk, FIRST + at as u64);
                cover.lay(&old, 1, disk, FIRST + at as u64);
                let mut next = 5;
                for piece in cover.finish() {
                    prop_assert_eq!(piece.offset, next);
                    next += piece.len;
                    for byte in piece.offset..next {
                        prop_assert_eq!(model[usize::from(disk)][byte as usize], piece.seq);
                    }
                    if let Content::Data { segment, at, .. } = piece.content {
                        let record = (piece.seq - FIRST) as usize;
                        prop_assert_eq!(segment, if record < cut { 1 } else { 2 });
                        prop_assert_eq!(u64::from(at), piece.offset - records[record].1);
                    }
                }
                prop_assert_eq!(next, 290);
            }
        }
    }
}
