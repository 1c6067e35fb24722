//! Restore points: listing them and finding the one that is meant.

use afterimage_wire::ids::StreamId;

use super::Target;
use super::config::{Choice, PointError};
use super::status::PointInfo;
use super::stream::Stream;
use crate::index::Points;
use crate::index::points::complete;
use crate::io::Io;
use crate::journal::Segment;

impl Stream {
    /// Newest record that is held and indexed.
    fn newest(&self) -> u64 {
        self.points.newest()
    }

    /// The newest record that is there, at or before `seq`: numbers have gaps between writers.
    pub fn snap(&self, seq: u64) -> Option<u64> {
        if self.points.kept().is_some_and(|kept| kept.seq == seq) {
            return Some(seq);
        }
        let in_frames = |segment: &Segment| {
            let after = segment.frames.partition_point(|frame| frame.first_seq <= seq);
            after.checked_sub(1).map(|at| segment.frames[at].last_seq.min(seq))
        };
        let found = self.journal.segments.iter().rev().find_map(in_frames);
        let floor = self.points.floor();
        found.filter(|found| *found >= floor).or((seq >= floor).then_some(floor))
    }

    /// What is to be told of the point after record `seq`, which is there.
    pub fn describe(&self, seq: u64) -> PointInfo {
        let lives = self.points.at(seq);
        let cut = self.points.cuts().find(|cut| cut.seq == seq);
        let kept = self.points.kept().filter(|kept| kept.seq == seq).map(|kept| kept.wall_ns);
        let segment = self.journal.segments.iter().rev().find(|s| s.first_seq().is_some_and(|first| first <= seq));
        let frame = segment.and_then(|segment| {
            let after = segment.frames.partition_point(|frame| frame.first_seq <= seq);
            after.checked_sub(1).map(|at| (at, &segment.frames[at]))
        });
        let wall_of_record = || {
            let (segment, (at, frame)) = (segment?, frame?);
            let delta = seq.checked_sub(segment.index.first_seq())?;
            let ours = segment.index.entries().filter(|entry| entry.frame as usize == at);
            let entry = ours.filter(|entry| u64::from(entry.seq_delta) <= delta).max_by_key(|entry| entry.seq_delta);
            Some(entry.map_or(frame.wall_ns, |entry| segment.wall_of(entry)))
        };
        PointInfo {
            seq,
            wall_ns: kept.or(cut.map(|cut| cut.wall_ns)).or_else(wall_of_record).unwrap_or(0),
            mono_ns: cut.map(|cut| cut.mono_ns).or(frame.map(|frame| frame.1.mono_ns)).unwrap_or(0),
            incarnation: segment.map(|segment| segment.writer.incarnation).unwrap_or_default(),
            cut: cut.map(|cut| cut.cut.clone()),
            disks: Points::held(&lives),
            complete: complete(&lives),
            damage: self.damage.at(seq, &lives),
        }
    }

    /// The last record whose time is not after `wall_ns`.
    fn at_time(&self, wall_ns: u64) -> Option<u64> {
        let floor = self.points.floor();
        let newest_cut = self.points.cuts().rev().find(|cut| cut.wall_ns <= wall_ns).map(|cut| cut.seq);
        for segment in self.journal.segments.iter().rev() {
            let Some((at, frame)) = segment.frames.iter().enumerate().rev().find(|(_, frame)| frame.wall_ns <= wall_ns)
            else {
                continue;
            };
            // Within the frame by the records' own times; others of the frame lie between them.
            let later = segment
                .index
                .entries()
                .filter(|entry| entry.frame as usize == at && segment.wall_of(entry) / 1000 > wall_ns / 1000)
                .map(|entry| segment.index.first_seq() + u64::from(entry.seq_delta))
                .min();
            // Cuts are not in the index.
            let cut = self.points.cuts().find(|cut| cut.seq >= frame.first_seq && cut.wall_ns > wall_ns);
            let later =
                [later, cut.map(|cut| cut.seq).filter(|seq| *seq <= frame.last_seq)].into_iter().flatten().min();
            let seq = later.map_or(frame.last_seq, |later| (later - 1).max(frame.first_seq));
            let seq = newest_cut.map_or(seq, |cut| if cut <= frame.last_seq { seq.max(cut) } else { seq });
            return (seq >= floor).then_some(seq);
        }
        None
    }

    /// Finds the point.
    pub fn choose(&self, choice: Choice) -> Result<PointInfo, PointError> {
        if !self.is_ready() {
            return Err(PointError::NotReady(self.config.stream));
        }
        let (floor, newest) = (self.points.floor(), self.newest());
        let seq = match choice {
            Choice::Latest => self.points.newest_complete().ok_or(PointError::None)?,
            Choice::Cut(number) => {
                let found = self.points.cuts().rev().find(|cut| cut.cut.number == number);
                found.map(|cut| cut.seq).ok_or(PointError::NoCut(number))?
            }
            Choice::Time(wall_ns) => {
                let kept = || self.points.kept().filter(|kept| kept.wall_ns <= wall_ns).map(|kept| kept.seq);
                self.at_time(wall_ns).or_else(kept).ok_or(PointError::TooOld)?
            }
            Choice::Seq(seq) if seq > newest => return Err(PointError::Future { newest }),
            Choice::Seq(seq) => seq,
        };
        let snapped = self.snap(seq).ok_or(PointError::Folded { floor })?;
        Ok(self.describe(snapped))
    }
}

impl<I: Io> Target<I> {
    /// Restore points from record `from_seq` on, oldest first, at most `limit`.
    ///
    /// # Errors
    /// Stream not known or not ready.
    pub fn points(
        &mut self,
        _io: &mut I,
        stream: StreamId,
        from_seq: u64,
        limit: usize,
        cuts_only: bool,
    ) -> Result<Vec<PointInfo>, PointError> {
        self.settle(stream);
        let open = self.ready(stream).map_err(|_| PointError::NotReady(stream))?;
        let cuts = open.points.cuts().filter(|cut| cut.seq >= from_seq).map(|cut| cut.seq);
        if cuts_only {
            let cuts: Vec<u64> = cuts.take(limit).collect();
            return Ok(cuts.into_iter().map(|seq| open.describe(seq)).collect());
        }
        let floor = open.points.floor();
        let base = (floor >= from_seq && floor > 0).then_some(floor);
        let kept = open.points.kept().map(|kept| kept.seq).filter(|seq| *seq >= from_seq);
        let records = open.journal.segments.iter().flat_map(|segment| &segment.frames);
        let records = records.flat_map(|frame| frame.first_seq.max(from_seq).max(floor + 1)..=frame.last_seq);
        let seqs: Vec<u64> = kept.into_iter().chain(base).chain(records).take(limit).collect();
        Ok(seqs.into_iter().map(|seq| open.describe(seq)).collect())
    }

    /// The point that is meant.
    ///
    /// # Errors
    /// There is none. A point that does not hold all disks is given, with `complete` false.
    pub fn resolve(&mut self, _io: &mut I, stream: StreamId, choice: Choice) -> Result<PointInfo, PointError> {
        self.settle(stream);
        let open = self.ready(stream).map_err(|_| PointError::NotReady(stream))?;
        open.choose(choice)
    }
}
