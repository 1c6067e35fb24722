//! Scrub: journals are read in the background and verified by CRC, without keys; what is found to be bad, here or by
//! anybody who reads, is looked at a second time and then named as lost.
//!
//! ```text
//! pass: window of frames ─▶ CRC ─┬─ good
//!                                └─ bad ─▶ suspect ─▶ read alone, block by block if need be ─┬─ good: it was the way
//! views, folding ─ cannot open ────▶ suspect ─▶    ▲                                         └─ bad: lost ─┐
//!                                                  └────────── after a second, two, four … an hour ─────────┘
//! ```
//! A disk that gives nothing for a while has lost nothing: a frame that is whole when it is looked at again is taken back
//! among the good ones, and nothing is folded as unknown before it was looked at once more.
//!
//! Low priority: one read at a time, at most so many bytes a second. Suspects do not wait for that.

use std::collections::{BTreeSet, VecDeque};

use crate::index::Cover;
use crate::io::{Done, File, Io, Nanos, Op, Part};
use crate::journal::Salvage;
use crate::target::ops::{Ctx, JournalId, Purpose};
use crate::target::stream::Stream;
use crate::target::{Damage, ScrubStatus, TargetEvent};

/// Bytes read at a time, at least one frame.
const WINDOW: usize = 256 * 1024;
/// Most frames that wait for a second look; more are found again.
const MAX_SUSPECTS: usize = 1024;
/// When a read cannot be begun, how long until the next try.
const AGAIN: Nanos = 100_000_000;
/// From a loss until what is lost is looked at again; twice as long after each time that something still is …
const FIRST_LOOK: Nanos = 1_000_000_000;
/// … and at most so long.
const LONGEST_LOOK: Nanos = 3_600_000_000_000;
/// Once looks are further than this from each other they find what the ones before have found.
const SETTLED: Nanos = 16_000_000_000;
/// How often to look whether lost blocks have been replaced.
const REVIEW: Nanos = 100_000_000;

/// A frame somewhere in the journals of a stream.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Suspect {
    pub journal: JournalId,
    /// [`crate::journal::Segment::uid`].
    pub segment: u64,
    /// In the segment's table.
    pub frame: u32,
}

/// Where a pass is: everything before is verified.
#[derive(Copy, Clone, Debug)]
struct Pass {
    /// The stream's own journal first, then deltas by their ids.
    delta: Option<u32>,
    segment: u64,
    frame: u32,
    done: u64,
    total: u64,
}

#[derive(Debug)]
struct Reading {
    journal: JournalId,
    segment: u64,
    first: u32,
    count: u32,
    start: u64,
    file: File,
    /// A second look at one frame.
    alone: bool,
}

/// The machine that verifies the journals of a stream.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    interval: Nanos,
    rate: u64,
    pass: Option<Pass>,
    next_pass: Option<Nanos>,
    next_read: Nanos,
    suspects: VecDeque<Suspect>,
    reading: Option<Reading>,
    salvage: Option<Salvage>,
    /// When what is lost is looked at again, and how long until the time after that.
    again_at: Option<Nanos>,
    again_after: Nanos,
    /// Segments with losses that have not been looked at again.
    fresh: BTreeSet<u64>,
    review_at: Nanos,
    cover: Cover,
    passes: u64,
    ended: Option<Nanos>,
    bad_frames: u64,
}

impl Scrub {
    /// A pass every `interval` (0: none but those asked for) at most `rate` bytes a second.
    pub fn new(interval: Nanos, rate: u64) -> Self {
        Self { interval, rate: rate.max(1), ..Self::default() }
    }

    /// Everything has just been read: the next pass is due an interval from now.
    pub fn rest(&mut self, now: Nanos) {
        self.next_pass = (self.interval > 0).then(|| now + self.interval);
    }

    /// Begins a pass as soon as possible; one under way goes on.
    pub fn ask(&mut self, now: Nanos) {
        self.next_pass = Some(now);
    }

    /// Something could not be read there.
    pub fn suspect(&mut self, suspect: Suspect) {
        if self.suspects.len() < MAX_SUSPECTS && !self.suspects.contains(&suspect) {
            self.suspects.push_back(suspect);
        }
    }

    /// What is lost has changed: it is written down with the next turn.
    pub fn look_soon(&mut self) {
        self.review_at = 0;
    }

    /// Something is lost: it is looked at again soon.
    pub fn look_again(&mut self, now: Nanos) {
        let soon = now + FIRST_LOOK;
        self.again_at = Some(self.again_at.map_or(soon, |at| at.min(soon)));
        self.again_after = FIRST_LOOK;
    }

    /// What is lost of this segment is about to be looked at again.
    pub fn doubts(&self, segment: u64) -> bool {
        self.fresh.contains(&segment)
            || self.suspects.iter().any(|suspect| suspect.segment == segment)
            || self.reading.as_ref().is_some_and(|reading| reading.alone && reading.segment == segment)
    }

    /// What is lost has been looked at again and again: it will hardly come back.
    pub fn has_settled(&self) -> bool {
        self.fresh.is_empty() && self.suspects.is_empty() && (self.again_at.is_none() || self.again_after > SETTLED)
    }

    /// When to go on although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        let next = match (&self.reading, self.pass.is_some() || !self.suspects.is_empty()) {
            (Some(_), _) => return None,
            (None, true) => Some(self.next_read),
            (None, false) => self.next_pass,
        };
        [next, self.again_at].into_iter().flatten().min()
    }

    /// No read is under way.
    pub fn is_quiet(&self) -> bool {
        self.reading.is_none()
    }

    /// How far it is.
    pub fn status(&self) -> ScrubStatus {
        let (done, total) = self.pass.map_or((0, 0), |pass| (pass.done, pass.total));
        ScrubStatus {
            running: self.pass.is_some(),
            done,
            total: total.max(done),
            passes: self.passes,
            ended: self.ended,
            bad_frames: self.bad_frames,
        }
    }
}

impl Stream {
    /// Goes on verifying. Everything it needs comes by completions and by [`Scrub::deadline`].
    pub(crate) fn scrub_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, events: &mut VecDeque<TargetEvent>) {
        self.review_damage(ctx.io, events);
        if self.scrub.reading.is_some() {
            return self.salvage_turn(ctx, events);
        }
        let now = ctx.io.now();
        if self.scrub.pass.is_none() && self.scrub.next_pass.is_some_and(|at| at <= now) {
            self.scrub.next_pass = None;
            let deltas = self.deltas.iter().map(|delta| delta.journal.bytes).sum::<u64>();
            let total = self.journal.bytes + deltas;
            self.scrub.pass = Some(Pass { delta: None, segment: 0, frame: 0, done: 0, total });
        }
        if self.scrub.again_at.is_some_and(|at| at <= now) {
            self.suspect_lost(now);
        }
        if now < self.scrub.next_read {
            return;
        }
        while let Some(suspect) = self.scrub.suspects.pop_front() {
            let Some((start, len)) = self.frame_at(&suspect) else { continue };
            let (journal, segment, first) = (suspect.journal, suspect.segment, suspect.frame);
            if !self.begin_read(ctx, (journal, segment), (first, 1), (start, len), true) {
                self.scrub.suspects.push_front(suspect);
                self.scrub.next_read = now + AGAIN;
            }
            return;
        }
        let Some(mut pass) = self.scrub.pass else { return };
        match self.next_window(&mut pass) {
            Some((journal, segment, first, count, start, len)) => {
                if self.begin_read(ctx, (journal, segment), (first, count), (start, len), false) {
                    pass.frame = first + count;
                    pass.done += len as u64;
                    self.scrub.next_read = now + (len as u64).saturating_mul(1_000_000_000) / self.scrub.rate;
                } else {
                    self.scrub.next_read = now + AGAIN;
                }
                self.scrub.pass = Some(pass);
            }
            None => {
                self.scrub.pass = None;
                self.scrub.passes += 1;
                self.scrub.ended = Some(now);
                self.scrub.rest(now);
                tracing::info!(stream = %self.config.stream, bytes = pass.done, "the journals have been verified");
            }
        }
    }

    /// What is lost is to be looked at again.
    fn suspect_lost(&mut self, now: Nanos) {
        let lost: Vec<Suspect> = self.lost().collect();
        self.scrub.again_at = (!lost.is_empty()).then_some(now + self.scrub.again_after.max(FIRST_LOOK));
        self.scrub.again_after = self.scrub.again_after.saturating_mul(2).min(LONGEST_LOOK);
        self.scrub.fresh.clear();
        lost.into_iter().for_each(|suspect| self.scrub.suspect(suspect));
    }

    fn lost(&self) -> impl Iterator<Item = Suspect> {
        let journals = std::iter::once(&self.journal).chain(self.deltas.iter().map(|delta| &delta.journal));
        journals.flat_map(|journal| {
            let id = journal.id;
            let of = move |segment: u64| move |frame: &u32| Suspect { journal: id, segment, frame: *frame };
            journal.segments.iter().flat_map(move |segment| segment.lost.keys().map(of(segment.uid)))
        })
    }

    /// A journal has been read with losses that were known: they are looked at again soon.
    pub(crate) fn doubt_lost(&mut self, now: Nanos) {
        let segments: BTreeSet<u64> = self.lost().map(|suspect| suspect.segment).collect();
        if !segments.is_empty() {
            self.scrub.fresh = segments;
            self.scrub.look_again(now);
        }
    }

    /// Where the suspect lies, if it is still there.
    fn frame_at(&mut self, suspect: &Suspect) -> Option<(u64, usize)> {
        let segment = self.journal_mut(suspect.journal)?.segment(suspect.segment)?;
        let frame = segment.frames.get(suspect.frame as usize)?;
        Some((u64::from(frame.at), frame.len as usize))
    }

    /// The next frames of a pass that lie back to back: journal, segment, first frame, count, first byte, bytes. Frames
    /// that are known to be bad are passed over.
    #[allow(clippy::type_complexity)]
    fn next_window(&self, pass: &mut Pass) -> Option<(JournalId, u64, u32, u32, u64, usize)> {
        loop {
            let journal = match pass.delta {
                None => &self.journal,
                Some(id) => &self.deltas.iter().find(|delta| delta.id == id)?.journal,
            };
            for segment in &journal.segments {
                if segment.uid < pass.segment {
                    continue;
                }
                if segment.uid > pass.segment {
                    (pass.segment, pass.frame) = (segment.uid, 0);
                }
                let is_bad = |frame: u32| segment.lost.contains_key(&frame);
                while is_bad(pass.frame) {
                    pass.frame += 1;
                }
                let first = pass.frame;
                let Some(entry) = segment.frames.get(first as usize) else { continue };
                let (start, mut end, mut after) =
                    (u64::from(entry.at), u64::from(entry.at) + u64::from(entry.len), first + 1);
                while let Some(next) = segment.frames.get(after as usize).filter(|_| !is_bad(after)) {
                    let next_end = u64::from(next.at) + u64::from(next.len);
                    if u64::from(next.at) != end || next_end - start > WINDOW as u64 {
                        break;
                    }
                    (end, after) = (next_end, after + 1);
                }
                return Some((journal.id, segment.uid, first, after - first, start, (end - start) as usize));
            }
            let last = pass.delta.unwrap_or(0);
            let next = self.deltas.iter().map(|delta| delta.id).filter(|id| *id > last).min()?;
            (pass.delta, pass.segment, pass.frame) = (Some(next), 0, 0);
        }
    }

    /// False: not now.
    fn begin_read<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        (id, segment): (JournalId, u64),
        (first, count): (u32, u32),
        (start, len): (u64, usize),
        alone: bool,
    ) -> bool {
        let Some(buf) = ctx.io.pool().take(len) else { return false };
        let Some(journal) = self.journal_mut(id) else { return true };
        let Ok(file) = journal.open_for_read(ctx.io, segment) else { return false };
        journal.hold(segment);
        self.scrub.reading = Some(Reading { journal: id, segment, first, count, start, file, alone });
        let part = Part { buf, at: 0, len };
        ctx.submit(Purpose::Scrub(self.id), Op::Read { file, offset: start, part });
        true
    }

    /// A read of the scrub has ended.
    pub(crate) fn scrub_done<I: Io>(&mut self, io: &mut I, done: Done, events: &mut VecDeque<TargetEvent>) {
        if let Some(salvage) = &mut self.scrub.salvage {
            return salvage.done(done);
        }
        let Some(reading) = self.scrub.reading.take() else { return };
        let Some(mut part) = done.part else { return };
        if done.result.is_err() && reading.alone {
            self.scrub.salvage = Some(Salvage::new(reading.file, reading.start, part));
            self.scrub.reading = Some(reading);
            return;
        }
        let readable = done.result.is_ok();
        self.look_at(io, &reading, &mut part, readable, events);
    }

    /// Goes on reading a suspect block by block.
    fn salvage_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, events: &mut VecDeque<TargetEvent>) {
        let Some(salvage) = &mut self.scrub.salvage else { return };
        if let Some(op) = salvage.next() {
            return ctx.submit(Purpose::Scrub(self.id), op);
        }
        if !salvage.is_over() {
            return;
        }
        let part = self.scrub.salvage.take().and_then(Salvage::finish);
        if let (Some(reading), Some(mut part)) = (self.scrub.reading.take(), part) {
            self.look_at(ctx.io, &reading, &mut part, true, events);
        }
    }

    /// Verifies what was read.
    fn look_at<I: Io>(
        &mut self,
        io: &mut I,
        reading: &Reading,
        part: &mut Part,
        readable: bool,
        events: &mut VecDeque<TargetEvent>,
    ) {
        let (mut lost, mut regained) = (None, None);
        let mut suspects = Vec::new();
        let id = reading.journal;
        // What folding has taken for unknown by now stays so.
        let folding = self.fold.is_busy().then(|| self.journal.segments.front().map(|front| front.uid)).flatten();
        let Some(journal) = self.journal_mut(id) else { return };
        let timeline = journal.config.timeline;
        // Folded meanwhile: nothing is left to be verified.
        if let Some(segment) = journal.segment_mut(reading.segment) {
            for frame in reading.first..reading.first + reading.count {
                let Some(entry) = segment.frames.get(frame as usize).copied() else { break };
                let at = part.at + (u64::from(entry.at) - reading.start) as usize;
                let bytes = &mut part.buf[at..at + entry.len as usize];
                if readable && segment.is_whole(frame, bytes) {
                    let lost = segment.lost.contains_key(&frame) && folding != Some(reading.segment);
                    if lost && segment.regain(frame, bytes).is_ok() {
                        regained = Some((segment.writer.incarnation, entry.number));
                    }
                    continue;
                }
                if reading.alone {
                    lost = segment.judge(frame, bytes).map(|verdict| (frame, verdict));
                } else {
                    suspects.push(Suspect { journal: id, segment: reading.segment, frame });
                }
            }
        }
        journal.release(io, reading.segment);
        for suspect in suspects {
            tracing::warn!(stream = %self.config.stream, ?suspect, "a frame is not what it was");
            self.scrub.suspect(suspect);
        }
        if let Some((incarnation, number)) = regained
            && let Some(what) = self.damage.regain(timeline, incarnation, number)
        {
            tracing::info!(stream = %self.config.stream, what, "what was taken for lost can be read again");
            events.push_back(TargetEvent::Regained { stream: self.config.stream, what });
            self.keep_damage(io);
        }
        if let Some((frame, verdict)) = lost {
            self.lose(io, id, reading.segment, frame, &verdict, events);
        }
    }

    /// A frame has been found to be bad twice: what is lost of it is named, and kept.
    fn lose<I: Io>(
        &mut self,
        io: &mut I,
        id: JournalId,
        segment: u64,
        frame: u32,
        verdict: &crate::journal::Verdict,
        events: &mut VecDeque<TargetEvent>,
    ) {
        let (journal, points, view) = match id {
            JournalId::Stream(_) => (&mut self.journal, &self.points, None),
            JournalId::Delta(id) => {
                let Some(delta) = self.deltas.iter_mut().find(|delta| delta.id == id) else { return };
                (&mut delta.journal, &delta.points, Some(delta.view.name.clone()))
            }
        };
        let timeline = journal.config.timeline;
        let uid = segment;
        let Some(segment) = journal.segment_mut(uid) else { return };
        if segment.lost.get(&frame).is_some_and(|known| known & verdict.chunks == verdict.chunks) {
            return;
        }
        let Some(lost) = segment.lose(timeline, frame, verdict, points) else { return };
        let mut why = match verdict.chunks.count_ones() {
            0 => "its checksum differs, its records can be read".to_owned(),
            1 => "a chunk cannot be read".to_owned(),
            n => format!("{n} chunks cannot be read"),
        };
        if let Some(view) = view {
            why = format!("{why}; what was written to the view `{view}` there is lost");
        }
        self.scrub.bad_frames += 1;
        let disks: Vec<_> = self.history.table().disks.iter().map(|disk| (disk.disk.slot, disk.disk.id)).collect();
        let disk_of = |slot| disks.iter().find(|(known, _)| *known == slot).map(|(_, id)| *id).unwrap_or_default();
        let damage = self.damage.add_frame(lost, &disk_of, &why);
        self.name_damage(damage, events);
        self.keep_damage(io);
        self.scrub.fresh.insert(uid);
        self.scrub.look_again(io.now());
        self.scrub.look_soon();
        self.mend_at = 0;
    }

    /// Tells of a loss.
    pub(crate) fn name_damage(&self, damage: Damage, events: &mut VecDeque<TargetEvent>) {
        tracing::error!(stream = %self.config.stream, what = damage.what, blocks = damage.blocks.len(), "history is lost");
        events.push_back(TargetEvent::Damaged { stream: self.config.stream, damage });
    }

    /// Looks now and then what of the lost newer data has replaced, and forgets what concerns no point any more.
    fn review_damage<I: Io>(&mut self, io: &mut I, events: &mut VecDeque<TargetEvent>) {
        let now = io.now();
        if !self.damage.wants_review() || now < self.scrub.review_at {
            return;
        }
        self.scrub.review_at = now + REVIEW;
        let bottom = crate::damage::Bottom { floor: self.points.floor(), unreadable: &self.history.state().unreadable };
        for what in self.damage.review(&self.journal, &mut self.scrub.cover, self.points.newest(), bottom) {
            tracing::info!(stream = %self.config.stream, what, "newer data has taken the place of what was lost");
            events.push_back(TargetEvent::Mended { stream: self.config.stream, what });
        }
        // What a kept point lacks is said as long as it is kept.
        let oldest = self.points.kept().map_or(self.points.floor(), |kept| kept.seq);
        self.damage.forget(oldest, self.points.now());
        self.keep_damage(io);
    }

    /// Writes down what is lost, if that has changed. If it cannot be written it is tried again with the next look; a
    /// restart before that finds the loss anew, and then doubts more than it had to.
    pub(crate) fn keep_damage<I: Io>(&mut self, io: &mut I) {
        if let Err(errno) = self.damage.keep(io) {
            tracing::error!(stream = %self.config.stream, %errno, "the damage list cannot be written");
        }
    }
}
