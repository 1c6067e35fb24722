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
use afterimage_wire::segment::{MAX_SEGMENT_HEAD, SegmentHead};

use super::segment::{Segment, Writer};
use super::{Journal, Place};
use crate::index::{Points, SegmentIndex};
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    OpenHead,
    ReadHead,
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
}

impl Recovery {
    /// Of these segments (number, path), in any order.
    pub fn new(mut files: Vec<(u64, String)>) -> Self {
        files.sort();
        Self {
            found: files.into_iter().map(|(number, path)| Found { number, path, head: None }).collect(),
            at: 0,
            step: Step::OpenHead,
            file: None,
            again: None,
            under_way: false,
            uid: 0,
            pos: 0,
            expected: (0, 0),
            probe: None,
            resume: None,
            plain: Vec::new(),
            damage: Vec::new(),
        }
    }

    /// When to go on although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        self.again
    }

    /// Gives up: closes what is open.
    pub fn close<I: Io>(&mut self, io: &mut I) {
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
                Step::ReadHead | Step::ReadFrames => {
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
                    self.finish(ctx.io, journal)?;
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
        let path = self.found.get(self.at).map_or("", |found| found.path.as_str());
        if let Err(errno) = done.result {
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
                self.close_file(io);
                self.at += 1;
                self.step = Step::OpenHead;
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

    fn begin_segment<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        journal: &mut Journal,
        points: &mut Points,
    ) -> Result<(), Stop> {
        let last_file = self.at + 1 == self.found.len();
        let found = &self.found[self.at];
        journal.next_number = journal.next_number.max(found.number + 1);
        let Some((head, length)) = &found.head else {
            if last_file {
                // Prepared and never begun, or begun and torn before anything in it was acknowledged.
                let (number, path) = (found.number, found.path.clone());
                self.open(ctx.io)?;
                let Some((file, size)) = self.file.take() else { return Err(Stop::because("no file is open")) };
                if size == journal.config.segment_bytes {
                    journal.adopt_prepared(number, path, file, size);
                } else {
                    ctx.io.close(file);
                    ctx.io.remove(&path).map_err(|errno| Stop::storage("removing", &path, errno))?;
                    journal.bytes -= size;
                }
            } else {
                let what = format!("the head of {} cannot be read: all its frames are lost", found.path);
                let (frame, seq) = if self.expected.0 > 0 { self.expected } else { (1, points.floor() + 1) };
                self.lost(journal, points, found.number, frame, frame, seq, what);
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
        journal.segments.push_back(Segment {
            uid: self.uid,
            number,
            path,
            stream: head.stream,
            writer,
            size,
            frames: Vec::new(),
            chunks: Vec::new(),
            index: SegmentIndex::new(head.first_seq),
            time: (0, 0),
            file: None,
            users: 0,
        });
        self.expected = (head.first_frame, head.first_seq);
        self.pos = length as u64;
        self.probe = None;
        self.resume = Some((self.at, self.uid, self.pos));
        self.step = Step::ReadFrames;
        Ok(())
    }

    /// Looks at the frames of a window that begins at `self.pos`.
    fn scan(&mut self, window: &mut [u8], journal: &mut Journal, points: &mut Points) {
        let start = self.pos;
        let size = self.file.map_or(0, |(_, size)| size);
        let incarnation = journal.segments.back().map(|segment| segment.writer.incarnation);
        while self.pos < start + window.len() as u64 {
            let at = (self.pos - start) as usize;
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
                        if header.acked.get() >= self.expected.0 {
                            self.mend(journal, points, found);
                            continue;
                        }
                    }
                    self.pos += length as u64;
                }
            }
        }
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
        if let Some(probe) = self.probe {
            let next = self.found[self.at + 1..].iter().find_map(|found| found.head.as_ref()).map(|(head, _)| head);
            let here = journal.segments.back().map(|segment| segment.writer.incarnation);
            let durable = next.is_some_and(|next| {
                if Some(next.incarnation) == here {
                    next.first_frame > self.expected.0
                } else {
                    Some(next.predecessor.incarnation) == here && next.predecessor.frame >= self.expected.0
                }
            });
            match probe.found {
                Some(found) if durable => {
                    self.mend(journal, points, found);
                    return;
                }
                // With nothing readable behind the hole, a next segment of the same writer names the gap itself.
                None if durable && next.is_some_and(|next| Some(next.incarnation) != here) => {
                    let (first, seq) = self.expected;
                    let last = next.map_or(first, |next| next.predecessor.frame);
                    let number = journal.segments.back().map_or(0, |segment| segment.number);
                    let what = format!("frames {first} to {last} of an acknowledged stretch are missing");
                    self.lost(journal, points, number, first, last, seq, what);
                }
                _ => {}
            }
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
        points.damage(first_seq);
        let incarnation = journal.segments.back().map(|segment| segment.writer.incarnation).unwrap_or_default();
        self.damage.push(Damage { segment, incarnation, first_frame, last_frame, first_seq, what });
    }

    fn finish<I: Io>(&mut self, io: &mut I, journal: &mut Journal) -> Result<(), Stop> {
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
