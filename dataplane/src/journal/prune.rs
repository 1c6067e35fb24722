//! Of a delta only the newest state counts: records that newer ones have overwritten whole are taken out of the index,
//! and the oldest segments, once nothing in them counts, off the disk.
//!
//! A pass over all closed segments begins when the index or the files have doubled since the last one, and goes on a few records at a
//! time. A segment is dropped only when what has overwritten it is on stable storage: after a power loss the older record
//! would be the one that was flushed.

use super::Journal;
use crate::index::Cover;
use crate::io::{Errno, Io};

/// Records looked at in one step.
const STEP: usize = 64;

/// How far a pass is.
#[derive(Debug, Default)]
pub(crate) struct Prune {
    /// Bytes of index at which the next pass begins.
    at: usize,
    /// Bytes of segments at which it does.
    bytes_at: u64,
    /// Newest segment when that was last looked at, by the pass and by the owner.
    seen: Option<u64>,
    told: Option<u64>,
    /// Segment at hand, and the next of its records.
    pass: Option<(u64, usize)>,
    /// Of the segment at hand, by their places in its index, lowest first.
    overwritten: Vec<usize>,
    cover: Cover,
}

impl Prune {
    /// The first pass begins when the index, or the segments, take this many bytes.
    pub fn new(at: usize, bytes_at: u64) -> Self {
        Self { at, bytes_at, ..Self::default() }
    }

    /// There is a new segment, or a pass has ended, since this was last asked.
    pub fn has_grown(&mut self, journal: &Journal) -> bool {
        let newest = journal.segments.back().map(|segment| segment.uid);
        std::mem::replace(&mut self.told, newest) != newest
    }
}

impl Journal {
    /// Goes on with a pass, or begins one if it is time; true if there is more to do. Only for journals of which nobody
    /// asks for a place but the newest.
    ///
    /// # Errors
    /// Removing a segment; it is out of the index all the same.
    pub(crate) fn prune<I: Io>(&mut self, io: &mut I, prune: &mut Prune) -> Result<bool, Errno> {
        let Some((uid, from)) = prune.pass else {
            // The index grows by much only with new segments.
            let newest = self.segments.back().map(|segment| segment.uid);
            if newest != prune.seen && self.segments.len() > 1 {
                prune.seen = newest;
                if self.index_bytes() > prune.at || self.bytes > prune.bytes_at {
                    prune.pass = self.segments.front().map(|segment| (segment.uid, 0));
                }
            }
            return Ok(prune.pass.is_some());
        };
        let Some(at) = self.position(uid).filter(|_| Some(uid) != self.active_uid()) else {
            // At the active segment: the pass is over.
            (prune.pass, prune.told) = (None, None);
            prune.at = (prune.at / 2).max(2 * self.index_bytes());
            let dropped = self.drop_overwritten(io);
            prune.bytes_at = (prune.bytes_at / 2).max(2 * self.bytes);
            return dropped.map(|()| false);
        };
        let (entries, first_seq) = (self.segments[at].index.len(), self.segments[at].index.first_seq());
        let until = (from + STEP).min(entries);
        let newer = self.segments.iter().skip(at).rev();
        for (number, entry) in self.segments[at].index.entries().enumerate().take(until).skip(from) {
            prune.cover.start(entry.start, entry.end());
            for segment in newer.clone() {
                if prune.cover.is_covered() {
                    break;
                }
                prune.cover.lay(&segment.index, segment.uid, entry.disk, u64::MAX);
            }
            let seq = first_seq + u64::from(entry.seq_delta);
            if !prune.cover.finish().iter().any(|piece| piece.seq == seq) {
                prune.overwritten.push(number);
            }
        }
        prune.pass = Some((uid, until));
        if until == entries {
            let segment = &mut self.segments[at];
            segment.index.remove(&prune.overwritten);
            segment.overwritten_by = self.complete.seq;
            prune.overwritten.clear();
            prune.pass = Some((self.segments.get(at + 1).map_or(u64::MAX, |next| next.uid), 0));
        }
        Ok(true)
    }

    /// Drops the oldest segments as far as nothing in them counts.
    fn drop_overwritten<I: Io>(&mut self, io: &mut I) -> Result<(), Errno> {
        while let Some(front) = self.segments.front()
            && Some(front.uid) != self.active_uid()
            && self.segments.len() > 1
            && front.index.is_empty()
            && front.overwritten_by > 0
            && front.overwritten_by <= self.durable.seq
        {
            self.drop_oldest(io)?;
        }
        Ok(())
    }
}
