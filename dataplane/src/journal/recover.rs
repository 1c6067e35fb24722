//! Reading a journal back: every segment in order, every frame checked, opened and indexed.
//!
//! A frame that is not what must come next is a *torn tail* (a write that was under way when the process died) or
//! *damage* (something that had been acknowledged). Frames are sealed with the highest acknowledged number, segments
//! begin only when everything before is durable, and a writer names its predecessor's last acknowledged place: if any
//! of these says that the missing frame had been durable, it is damage. Damage is named and stepped over; a torn tail is
//! written over. Before the journal is used again its last segment is synced: what was read may not be stable yet.

use std::sync::Arc;

use afterimage_wire::ALIGN;
use afterimage_wire::frame::{FrameHeader, MAX_FRAME, check_frame};
use afterimage_wire::ids::IncarnationId;
use afterimage_wire::segment::{MAX_SEGMENT_HEAD, SegmentHead};

use super::salvage::Salvage;
use super::segment::{Segment, Writer};
use super::{Journal, Place};
use crate::damage::Known;
use crate::index::Points;
use crate::index::points::FOUND_NOW;
use crate::io::{Done, Errno, File, Io, Nanos, Op, OpenHow, Part};
use crate::target::Damage;
use crate::target::ops::{Ctx, Purpose};

/// How long to wait for the lock of a file that a dead process still has I/O on.
const LOCK_AGAIN: Nanos = 10_000_000;

/// How recovery goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// An operation is under way, or a lock is waited for.
    Waiting,
    /// The journal can be used.
    Ready,
    /// It cannot.
    Failed(String),
}

#[derive(Debug)]
struct Found {
    number: u64,
    path: String,
    head: Option<(SegmentHead, usize)>,
    /// Without a head: the first good frame in it.
    seen: Option<Seen>,
}

/// A good frame of a segment whose head cannot be read.
#[derive(Debug, Clone, Copy)]
struct Seen {
    header: FrameHeader,
    at: u64,
    /// A later frame says that it had been acknowledged: the segment was in use.
    proof: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    OpenHead,
    ReadHead,
    SeekHead,
    OpenFrames,
    ReadFrames,
    OpenSync,
    Sync,
    Done,
}

/// Looking for proof that a missing frame had been durable.
#[derive(Debug, Clone, Copy)]
struct Probe {
    found: Option<(u64, u64, u64)>,
}

/// The machine that reads one journal back.
#[derive(Debug)]
pub(crate) struct Recovery {
    found: Vec<Found>,
    at: usize,
    step: Step,
    file: Option<(File, u64)>,
    again: Option<Nanos>,
    under_way: bool,
    /// Where the read under way begins; a stretch that cannot be read at once is read block by block.
    reading: u64,
    salvage: Option<Salvage>,
    // The scan of one segment.
    uid: u64,
    pos: u64,
    /// Frame and record that must come next.
    expected: (u64, u64),
    probe: Option<Probe>,
    /// Where appending goes on: segment's place in `found`, uid, byte.
    resume: Option<(usize, u64, u64)>,
    plain: Vec<u8>,
    pub damage: Vec<Damage>,
    /// What is known to be lost, and those frames of it that the journal was read with.
    known: Known,
    pub used: Vec<(IncarnationId, u64)>,
}

impl Recovery {
    /// Of these segments (number, path), in any order, of which these frames are known to be damaged.
    pub fn new(mut files: Vec<(u64, String)>, known: Known) -> Self {
        files.sort();
        Self {
            found: files.into_iter().map(|(number, path)| Found { number, path, head: None, seen: None }).collect(),
            at: 0,
            step: Step::OpenHead,
            file: None,
            again: None,
            under_way: false,
            reading: 0,
            salvage: None,
            uid: 0,
            pos: 0,
            expected: (0, 0),
            probe: None,
            resume: None,
            plain: Vec::new(),
            damage: Vec::new(),
            known,
            used: Vec::new(),
        }
    }

    /// When to go on although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        self.again
    }

    /// Gives up: closes what is open.
    pub fn close<I: Io>(&mut self, io: &mut I) {
        self.salvage = None;
        if let Some((file, _)) = self.file.take() {
            io.close(file);
        }
    }

    /// Goes on as far as possible without waiting.
    pub fn turn<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        purpose: Purpose,
        journal: &mut Journal,
        points: &mut Points,
    ) -> Progress {
        if self.under_way || self.again.is_some_and(|again| ctx.io.now() < again) {
            return Progress::Waiting;
        }
        self.again = None;
        match self.go_on(ctx, purpose, journal, points) {
            Ok(progress) => progress,
            Err(Stop::Locked) => {
                self.again = Some(ctx.io.now() + LOCK_AGAIN);
                Progress::Waiting
            }
            Err(Stop::Because(why)) => Progress::Failed(why),
        }
    }

    fn go_on<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        purpose: Purpose,
        journal: &mut Journal,
        points: &mut Points,
    ) -> Result<Progress, Stop> {
        if let Some(salvage) = &mut self.salvage {
            if let Some(op) = salvage.next() {
                self.under_way = true;
                ctx.submit(purpose, op);
                return Ok(Progress::Waiting);
            }
            let part = self.salvage.take().and_then(Salvage::finish);
            self.read(ctx.io, part, journal, points)?;
        }
        loop {
            match self.step {
                Step::OpenHead => {
                    if self.at == self.found.len() {
                        self.at = 0;
                        self.step = Step::OpenFrames;
                        continue;
                    }
                    self.open(ctx.io)?;
                    self.step = Step::ReadHead;
                }
                Step::ReadHead | Step::SeekHead | Step::ReadFrames => {
                    let Some((file, size)) = self.file else { return Err(Stop::because("no file is open")) };
                    let (from, want) = match self.step {
                        Step::ReadHead => (0, MAX_SEGMENT_HEAD),
                        _ => (self.pos, MAX_FRAME),
                    };
                    let left = size.saturating_sub(from) / ALIGN as u64 * ALIGN as u64;
                    if left == 0 {
                        self.read(ctx.io, None, journal, points)?;
                        continue;
                    }
                    let Some(buf) = ctx.io.pool().take(want) else {
                        self.again = Some(ctx.io.now() + LOCK_AGAIN);
                        return Ok(Progress::Waiting);
                    };
                    let len = left.min((buf.len() / ALIGN * ALIGN) as u64) as usize;
                    self.under_way = true;
                    self.reading = from;
                    ctx.submit(purpose, Op::Read { file, offset: from, part: Part { buf, at: 0, len } });
                    return Ok(Progress::Waiting);
                }
                Step::OpenFrames => {
                    if self.at == self.found.len() {
                        self.step = Step::OpenSync;
                        continue;
                    }
                    self.begin_segment(ctx, journal, points)?;
                }
                Step::OpenSync => {
                    let Some((at, ..)) = self.resume else {
                        self.step = Step::Done;
                        continue;
                    };
                    self.at = at;
                    self.open(ctx.io)?;
                    self.step = Step::Sync;
                }
                Step::Sync => {
                    let Some((file, _)) = self.file else { return Err(Stop::because("no file is open")) };
                    self.under_way = true;
                    ctx.submit(purpose, Op::Sync { file });
                    return Ok(Progress::Waiting);
                }
                Step::Done => {
                    self.finish(ctx.io, journal, points)?;
                    return Ok(Progress::Ready);
                }
            }
        }
    }

    fn open<I: Io>(&mut self, io: &mut I) -> Result<(), Stop> {
        if self.file.is_some() {
            return Ok(());
        }
        let path = &self.found[self.at].path;
        let file = io.open(path, OpenHow { write: true, create_new: false, lock: true }).map_err(|errno| {
            if errno == Errno::AGAIN { Stop::Locked } else { Stop::storage("opening", path, errno) }
        })?;
        let info = io.info(file).map_err(|errno| {
            io.close(file);
            Stop::storage("looking at", path, errno)
        })?;
        self.file = Some((file, info.size));
        Ok(())
    }

    fn close_file<I: Io>(&mut self, io: &mut I) {
        self.close(io);
    }

    /// A completion.
    pub fn done<I: Io>(
        &mut self,
        io: &mut I,
        done: Done,
        journal: &mut Journal,
        points: &mut Points,
    ) -> Result<(), String> {
        self.under_way = false;
        if let Some(salvage) = &mut self.salvage {
            salvage.done(done);
            return Ok(());
        }
        let path = self.found.get(self.at).map_or("", |found| found.path.as_str());
        if let Err(errno) = done.result {
            if let (Step::ReadHead | Step::SeekHead | Step::ReadFrames, Some((file, _)), Some(part)) =
                (self.step, self.file, done.part)
            {
                tracing::warn!(path, %errno, at = self.reading, "a journal cannot be read in one piece");
                self.salvage = Some(Salvage::new(file, self.reading, part));
                return Ok(());
            }
            return Err(format!("{} {path}: {errno}", if self.step == Step::Sync { "syncing" } else { "reading" }));
        }
        if self.step == Step::Sync {
            self.step = Step::Done;
            return Ok(());
        }
        self.read(io, done.part, journal, points).map_err(|stop| match stop {
            Stop::Because(why) => why,
            Stop::Locked => "locked".into(),
        })
    }

    fn read<I: Io>(
        &mut self,
        io: &mut I,
        part: Option<Part>,
        journal: &mut Journal,
        points: &mut Points,
    ) -> Result<(), Stop> {
        match self.step {
            Step::ReadHead => {
                let found = &mut self.found[self.at];
                if let Some(part) = &part
                    && let Ok((head, length)) = SegmentHead::decode(&part.buf[..part.len])
                    && (head.stream, head.timeline, head.segment)
                        == (journal.config.stream, journal.config.timeline, found.number)
                {
                    found.head = Some((head, length));
                }
                journal.bytes += self.file.map_or(0, |(_, size)| size);
                if found.head.is_none() {
                    self.pos = ALIGN as u64;
                    self.step = Step::SeekHead;
                } else {
                    self.next_head(io);
                }
            }
            Step::SeekHead => {
                let (before, last) = (self.pos, self.at + 1 == self.found.len());
                let more = part.is_some_and(|part| self.seek(&part.buf[..part.len], journal));
                // A window without any frame: nothing, or nothing that was acknowledged, follows.
                let wanted = self.found[self.at].seen.is_some_and(|seen| last && !seen.proof);
                if !(more && wanted && self.pos > before) {
                    self.next_head(io);
                }
            }
            Step::ReadFrames => match part {
                Some(mut part) => {
                    let len = part.len;
                    self.scan(&mut part.buf[..len], journal, points);
                }
                None => self.end_of_segment(io, journal, points),
            },
            _ => {}
        }
        Ok(())
    }

    fn next_head<I: Io>(&mut self, io: &mut I) {
        self.close_file(io);
        self.at += 1;
        self.step = Step::OpenHead;
    }

    /// Looks for frames in a window of a segment without a head; true if there were any.
    fn seek(&mut self, window: &[u8], journal: &Journal) -> bool {
        let seen = &mut self.found[self.at].seen;
        let (mut at, mut any) = (0, false);
        while at < window.len() {
            let header = FrameHeader::parse(&window[at..]).ok().filter(|header| header.stream == journal.config.stream);
            let length = header.map_or(ALIGN, |header| header.length.get() as usize);
            if at > 0 && at + length > window.len() {
                break; // The next window begins here.
            }
            match (header, window.get(at..at + length).is_some_and(|bytes| check_frame(bytes).is_ok()), &mut *seen) {
                (Some(header), true, None) => {
                    *seen = Some(Seen { header: *header, at: self.pos + at as u64, proof: false });
                    any = true;
                    at += length;
                }
                (Some(header), true, Some(first)) => {
                    first.proof |= header.incarnation == first.header.incarnation
                        && header.acked.get() >= first.header.number.get();
                    any = true;
                    at += length;
                }
                _ => at += ALIGN,
            }
        }
        self.pos += at as u64;
        any
    }

    /// The head of the segment at hand put together from a neighbour's of the same writer, if it has one and was in use.
    fn rebuilt(&self, journal: &Journal) -> Option<(SegmentHead, usize)> {
        let found = &self.found[self.at];
        let seen = found.seen?;
        if self.at + 1 == self.found.len() && !seen.proof {
            return None;
        }
        let incarnation = seen.header.incarnation;
        let before = journal.segments.back().map(|segment| &segment.writer).filter(|w| w.incarnation == incarnation);
        let (predecessor, key, disks) = match before {
            Some(writer) => (writer.predecessor, writer.wrapped, writer.disks.clone()),
            None => {
                let head = self.later_heads().find(|head| head.incarnation == incarnation)?;
                (head.predecessor, head.key, head.disks.clone())
            }
        };
        let head = SegmentHead {
            stream: journal.config.stream,
            timeline: journal.config.timeline,
            incarnation,
            predecessor,
            segment: found.number,
            first_frame: seen.header.number.get(),
            first_seq: seen.header.first_seq.get(),
            created_wall_ns: 0,
            key,
            disks,
        };
        Some((head, seen.at as usize))
    }

    fn begin_segment<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        journal: &mut Journal,
        points: &mut Points,
    ) -> Result<(), Stop> {
        let last_file = self.at + 1 == self.found.len();
        let rebuilt = if self.found[self.at].head.is_none() { self.rebuilt(journal) } else { None };
        if let Some((head, _)) = &rebuilt {
            let (path, known) = (&self.found[self.at].path, self.expected.0 > 0);
            tracing::error!(path, "the head of a segment cannot be read; its neighbour's key opens it");
            if !known && head.first_frame > 1 && head.first_seq > points.floor() + 1 {
                let (number, first) = (head.segment, head.first_frame);
                let what = format!("frames before {first} behind the damaged head of {path} cannot be found");
                let seq = points.floor() + 1;
                self.lost(journal, points, number, 1, first - 1, seq, what);
            }
        }
        let found = &self.found[self.at];
        journal.next_number = journal.next_number.max(found.number + 1);
        let Some((head, length)) = found.head.as_ref().or(rebuilt.as_ref()) else {
            if last_file && !found.seen.is_some_and(|seen| seen.proof) {
                // Prepared and never begun, or begun and torn before anything in it was acknowledged.
                let (number, path) = (found.number, found.path.clone());
                self.open(ctx.io)?;
                match self.file.take_if(|(_, size)| *size == journal.config.segment_bytes) {
                    Some((file, size)) => journal.adopt_prepared(number, path, file, size),
                    None => {
                        // The process died while it was being made; the next one is made in its place.
                        self.remove(ctx.io, journal, &path)?;
                        journal.next_number = number;
                    }
                }
            } else if journal.segments.is_empty() && self.is_folded(points.floor()) {
                // It was kept because nobody knew what was in it; by now the history begins behind it.
                let path = found.path.clone();
                tracing::warn!(path, "a segment without a head lies before the oldest point and is removed");
                self.open(ctx.io)?;
                self.remove(ctx.io, journal, &path)?;
            } else {
                let what = format!("the head of {} cannot be read: all its frames are lost", found.path);
                let (frame, seq) = if self.expected.0 > 0 { self.expected } else { (1, points.floor() + 1) };
                let (number, path) = (found.number, found.path.clone());
                self.lost(journal, points, number, frame, u64::MAX, seq, what);
                self.keep_husk(ctx.io, journal, number, path, seq);
            }
            self.at += 1;
            return Ok(());
        };
        let key = journal
            .policy(&head.key, head.incarnation)
            .map_err(|error| Stop::Because(format!("{}: {error}", found.path)))?;
        let (head, length, number, path) = (head.clone(), *length, found.number, found.path.clone());
        if let Some(before) = journal.segments.back()
            && before.writer.incarnation == head.incarnation
            && self.expected.0 > 0
            && head.first_frame > self.expected.0
        {
            let (first, seq, number) = (self.expected.0, self.expected.1, before.number);
            let what = format!("frames {first} to {} are missing", head.first_frame - 1);
            self.lost(journal, points, number, first, head.first_frame - 1, seq, what);
        }
        self.open(ctx.io)?;
        let size = self.file.map_or(0, |(_, size)| size);
        let writer = match journal.segments.back() {
            Some(before) if before.writer.incarnation == head.incarnation => before.writer.clone(),
            _ => Arc::new(Writer {
                incarnation: head.incarnation,
                predecessor: head.predecessor,
                wrapped: head.key,
                key,
                disks: head.disks.clone(),
            }),
        };
        self.uid = journal.next_uid;
        journal.next_uid += 1;
        let segment = Segment::new(self.uid, number, path, head.stream, writer, size, head.first_seq);
        journal.segments.push_back(segment);
        self.expected = (head.first_frame, head.first_seq);
        self.pos = length as u64;
        self.probe = None;
        self.resume = Some((self.at, self.uid, self.pos));
        self.step = Step::ReadFrames;
        Ok(())
    }

    /// Everything before the next segment whose head can be read is at or below the floor.
    fn is_folded(&self, floor: u64) -> bool {
        self.later_heads().next().is_some_and(|head| head.first_seq <= floor + 1)
    }

    /// The heads of the segments behind the present one, as far as they can be read.
    fn later_heads(&self) -> impl Iterator<Item = &SegmentHead> {
        self.found[self.at + 1..].iter().filter_map(|found| found.head.as_ref()).map(|(head, _)| head)
    }

    /// Removes the segment that is open.
    fn remove<I: Io>(&mut self, io: &mut I, journal: &mut Journal, path: &str) -> Result<(), Stop> {
        let Some((file, size)) = self.file.take() else { return Err(Stop::because("no file is open")) };
        io.close(file);
        io.remove(path).map_err(|errno| Stop::storage("removing", path, errno))?;
        journal.bytes -= size;
        Ok(())
    }

    /// A segment of which nothing can be used stands in its place, empty, until its turn to be dropped comes. Nothing is
    /// appended in front of it.
    fn keep_husk<I: Io>(&mut self, io: &mut I, journal: &mut Journal, number: u64, path: String, seq: u64) {
        let Some(writer) = journal.segments.back().map(|before| before.writer.clone()) else { return };
        let size = self.open(io).ok().and(self.file).map_or(0, |(_, size)| size);
        self.close_file(io);
        let uid = journal.next_uid;
        journal.next_uid += 1;
        let stream = journal.config.stream;
        journal.segments.push_back(Segment::new(uid, number, path, stream, writer, size, seq));
        self.resume = None;
    }

    /// Looks at the frames of a window that begins at `self.pos`.
    fn scan(&mut self, window: &mut [u8], journal: &mut Journal, points: &mut Points) {
        let start = self.pos;
        let size = self.file.map_or(0, |(_, size)| size);
        let incarnation = journal.segments.back().map(|segment| segment.writer.incarnation);
        while self.pos < start + window.len() as u64 {
            // Behind a hole it goes on with the frame that was found there, which may be in an earlier window than the one
            // that proves the hole: that one is read again.
            let Some(at) = self.pos.checked_sub(start) else { return };
            let at = at as usize;
            let header = FrameHeader::parse(&window[at..]).ok().copied().filter(|header| {
                header.stream == journal.config.stream
                    && Some(header.incarnation) == incarnation
                    && self.pos + u64::from(header.length.get()) <= size
            });
            let length = header.map_or(ALIGN, |header| header.length.get() as usize);
            let wanted = header.is_some_and(|header| header.number.get() >= self.expected.0);
            if wanted && at > 0 && at + length > window.len() {
                return; // The next window begins here, and holds the longest frame.
            }
            let whole = wanted && window.get(at..at + length).is_some_and(|bytes| check_frame(bytes).is_ok());
            if !whole && self.probe.is_none() {
                match self.scan_known(window, at, journal, points) {
                    Some(true) => continue,
                    Some(false) => return,
                    None => {}
                }
            }
            let (Some(header), true) = (header, whole) else {
                self.probe.get_or_insert(Probe { found: None });
                self.pos += ALIGN as u64;
                continue;
            };
            let (number, first_seq) = (header.number.get(), header.first_seq.get());
            match &mut self.probe {
                None if number == self.expected.0 && first_seq >= self.expected.1 => {
                    let bytes = &mut window[at..at + length];
                    if let Err(error) = journal.index_frame(self.uid, self.pos, bytes, points, false, &mut self.plain) {
                        let segment = journal.segments.back().map_or(0, |segment| segment.number);
                        let what = format!("frame {number} cannot be opened: {error}");
                        self.lost(journal, points, segment, number, number, first_seq, what);
                    }
                    self.expected = (number + 1, header.last_seq.get() + 1);
                    self.pos += length as u64;
                    journal.complete =
                        Place { incarnation: header.incarnation, frame: number, seq: header.last_seq.get() };
                    if let Some(resume) = &mut self.resume {
                        resume.2 = self.pos;
                    }
                }
                None => {
                    // Whole, ours, and not what comes next.
                    self.probe = Some(Probe { found: None });
                }
                Some(probe) => {
                    if number > self.expected.0 {
                        let found = *probe.found.get_or_insert((self.pos, number, first_seq));
                        if header.acked.get() >= self.expected.0 && !mutant!(TornNotDamaged) {
                            self.mend(journal, points, found);
                            continue;
                        }
                    }
                    self.pos += length as u64;
                }
            }
        }
    }

    /// The frame that must come next is not whole: it may be one whose loss is known, and is taken as it was known. False:
    /// the window ends within it.
    fn scan_known(&mut self, window: &mut [u8], at: usize, journal: &mut Journal, points: &mut Points) -> Option<bool> {
        let segment = journal.segments.back()?;
        let (incarnation, number) = (segment.writer.incarnation, segment.number);
        let known = self.known.frame(journal.config.timeline, incarnation, self.expected.0)?;
        if known.segment != number || u64::from(known.at) != self.pos || known.header.first_seq.get() < self.expected.1
        {
            return None;
        }
        let length = known.header.length.get() as usize;
        if at > 0 && at + length > window.len() {
            return Some(false);
        }
        let bytes = window.get_mut(at..at + length)?;
        if let Err(error) = journal.index_lost(self.uid, known, bytes, points, &mut self.plain) {
            tracing::error!(frame = self.expected.0, %error, "more of a damaged frame is lost than before");
            return None;
        }
        let (frame, seq) = (self.expected.0, known.header.last_seq.get());
        self.used.push((incarnation, frame));
        self.expected = (frame + 1, seq + 1);
        self.pos += length as u64;
        journal.complete = Place { incarnation, frame, seq };
        if let Some(resume) = &mut self.resume {
            resume.2 = self.pos;
        }
        Some(true)
    }

    /// The hole is damage: goes on with the first good frame behind it.
    fn mend(&mut self, journal: &Journal, points: &mut Points, found: (u64, u64, u64)) {
        let (first, seq) = self.expected;
        let segment = journal.segments.back().map_or(0, |segment| segment.number);
        let what = format!("frames {first} to {} of an acknowledged stretch are damaged", found.1 - 1);
        self.lost(journal, points, segment, first, found.1 - 1, seq, what);
        self.pos = found.0;
        self.expected = (found.1, found.2);
        self.probe = None;
    }

    fn end_of_segment<I: Io>(&mut self, io: &mut I, journal: &mut Journal, points: &mut Points) {
        let here = journal.segments.back().map(|segment| segment.writer.incarnation);
        // What follows, as far as its writer is known: one without a head goes on with this one's frames, too.
        let next = self.found[self.at + 1..].iter().find_map(|found| match (&found.head, found.seen) {
            (Some((head, _)), _) => Some((head.incarnation, head.first_frame, Some(head.predecessor))),
            (None, Some(seen)) if Some(seen.header.incarnation) == here => {
                Some((seen.header.incarnation, seen.header.number.get(), None))
            }
            _ => None,
        });
        let durable = next.is_some_and(|(writer, first_frame, predecessor)| {
            if Some(writer) == here {
                first_frame > self.expected.0
            } else {
                let before = predecessor.filter(|before| Some(before.incarnation) == here);
                before.is_some_and(|before| before.frame >= self.expected.0)
            }
        });
        let durable = durable && !mutant!(TornNotDamaged);
        match self.probe.and_then(|probe| probe.found) {
            Some(found) if durable => {
                self.mend(journal, points, found);
                return;
            }
            // With nothing readable behind the hole, or no hole because the file ends there, a next segment of the same
            // writer names the gap itself.
            None if durable && next.is_some_and(|(writer, ..)| Some(writer) != here) => {
                let (first, seq) = self.expected;
                let last = next.and_then(|(.., before)| before).map_or(first, |before| before.frame);
                let number = journal.segments.back().map_or(0, |segment| segment.number);
                self.lost(journal, points, number, first, last, seq, Damage::missing(first, last));
            }
            _ => {}
        }
        self.close_file(io);
        if let Some(segment) = journal.segments.back_mut()
            && self.at + 1 < self.found.len()
        {
            segment.index.seal();
        }
        self.at += 1;
        self.step = Step::OpenFrames;
    }

    #[allow(clippy::too_many_arguments)]
    fn lost(
        &mut self,
        journal: &Journal,
        points: &mut Points,
        segment: u64,
        first_frame: u64,
        last_frame: u64,
        first_seq: u64,
        what: String,
    ) {
        let incarnation = journal.segments.back().map(|segment| segment.writer.incarnation).unwrap_or_default();
        let frames = (first_frame, last_frame);
        let mut damage = Damage::unknown(segment, incarnation, frames, first_seq, FOUND_NOW, what);
        if let Some(before) = self.known.stretch(journal.config.timeline, &damage) {
            damage.found_at = before.found_at;
        }
        points.damage(first_seq, damage.found_at);
        self.damage.push(damage);
    }

    fn finish<I: Io>(&mut self, io: &mut I, journal: &mut Journal, points: &mut Points) -> Result<(), Stop> {
        points.settle();
        for damage in self.damage.iter_mut().filter(|damage| damage.found_at == FOUND_NOW) {
            damage.found_at = points.newest();
        }
        if let (Some((at, uid, end)), Some((file, size))) = (self.resume, self.file.take()) {
            debug_assert_eq!(at, self.at);
            if let Some(segment) = journal.segment_mut(uid) {
                segment.file = Some(file);
                // A segment that was cut to its length when it was closed takes nothing more; the next batch rolls.
                journal.resume(uid, file, end, size);
            } else {
                io.close(file);
            }
        }
        if journal.complete.seq < points.floor() {
            // What the floor came from is lost. Whose it was is not known, but its numbers are taken.
            journal.complete = Place { seq: points.floor(), ..Place::default() };
        }
        (journal.durable, journal.accepted) = (journal.complete, journal.complete);
        Ok(())
    }
}

#[derive(Debug)]
enum Stop {
    Locked,
    Because(String),
}

impl Stop {
    fn because(why: &str) -> Self {
        Self::Because(why.to_owned())
    }

    fn storage(what: &str, path: &str, errno: Errno) -> Self {
        Self::Because(format!("{what} {path}: {errno}"))
    }
}
