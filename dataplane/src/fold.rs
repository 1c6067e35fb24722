//! Folding: the oldest segment's records go into the replica images, then the segment goes.
//!
//! ```text
//! eligible? ─▶ floor raised, durably ─▶ frames read in order; of each record what the rest of the segment does not
//! overwrite is written to the image ─▶ images synced ─▶ unreadable ranges durable ─▶ segment dropped
//! ```
//! A crash anywhere is repaired by folding the segment again: points below the raised floor are gone, and those above
//! find what the image may have only in part in the index, until the segment is dropped. A failed write or sync ends the
//! attempt; the next one writes everything of the segment again before it syncs.
//!
//! Low priority: at most [`MAX_WRITES`] writes under way, and a bounded number of pieces begun in one turn.

use std::collections::{BTreeSet, VecDeque};

use crate::index::{Content, Cover, EntryKind};
use crate::io::{Done, Errno, File, Io, Nanos, Op, Part};
use crate::journal::Salvage;
use crate::scrub::Suspect;
use crate::seal::{open_chunk, payload};
use crate::shelf::Shelved;
use crate::target::ops::{Ctx, FoldOp, Purpose};
use crate::target::stream::Stream;
use crate::view::Reads;
use afterimage_wire::chunk::Chunk;
use afterimage_wire::record::{Record, RecordKind};
use afterimage_wire::stream_state::{MAX_UNREADABLE, UnreadableRange};

mod due;

use due::due;

/// Image writes under way.
const MAX_WRITES: usize = 8;
/// Pieces begun in one turn.
const PIECES_PER_TURN: usize = 32;
/// Bytes of the segment read at a time, at least one frame.
const WINDOW: usize = 512 * 1024;
/// Longest single write to an image, bytes.
const MAX_WRITE: u64 = 512 * 1024;
/// Longest single zeroing, bytes.
const MAX_ZERO: u64 = 1 << 30;
/// How often to look whether the oldest segment is due.
const LOOK: Nanos = 10_000_000;
/// After a failure, how long until the next attempt.
const AGAIN: Nanos = 1_000_000_000;

/// Where a stretch of the image comes from.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum From {
    /// The open chunk's payload, from this byte on.
    Payload(usize),
    /// Zeros, the room given back if possible.
    Zero,
    /// Zeros, written.
    WriteZero,
}

#[derive(Copy, Clone, Debug)]
struct Stretch {
    slot: u16,
    offset: u64,
    len: u64,
    from: From,
}

/// Completing a block that a stretch covers only in part.
#[derive(Debug)]
struct Patch {
    file: File,
    at: u64,
    /// The new bytes, and where they go within the block.
    bytes: Vec<u8>,
    skip: usize,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
enum Step {
    Apply,
    Sync,
    Finish,
}

#[derive(Debug)]
struct Job {
    uid: u64,
    file: File,
    step: Step,
    /// Next frame to read.
    frame: u32,
    /// A window of whole frames that were read: first frame, frames, where the first lies in the file.
    window: Option<(Part, u32, u32, u64)>,
    reading: Option<(u32, u32, u64)>,
    /// The frame being read has lost chunks, and is read block by block if need be.
    alone: bool,
    salvage: Option<Salvage>,
    /// Frames that could not be read or opened: somebody has to look at them again.
    suspects: Vec<u32>,
    /// Zeroing that the file system cannot do: to be written instead.
    refused: VecDeque<Stretch>,
    /// Next frame and chunk of the window to open.
    next: (u32, u8),
    stretches: VecDeque<Stretch>,
    plain: Vec<u8>,
    touched: BTreeSet<u16>,
    syncs: usize,
    writes: usize,
    patch: Option<Patch>,
    unreadable: Vec<UnreadableRange>,
    failed: Option<Errno>,
}

/// The machine that folds a stream.
#[derive(Debug, Default)]
pub(crate) struct Fold {
    job: Option<Job>,
    again: Nanos,
    /// When to look next whether something is due; looking costs.
    look_at: Nanos,
    skipped: bool,
    /// A view's shelf is being filled: completions go on with it.
    shelving: bool,
    /// The file system is about to be too full for another segment.
    space_low: bool,
    /// A buffer is waited for.
    pub starved: bool,
    /// Why the last attempt failed.
    pub error: Option<String>,
    /// Segments folded.
    pub folded: u64,
    /// A view that is to be given up, and why.
    pub gave_way: Option<(String, String)>,
    /// The newest reason for folding before its time, not yet told.
    pub shortened: Option<(&'static str, u64)>,
    cover: Cover,
}

impl Fold {
    /// There is something to do at once.
    pub fn is_busy(&self) -> bool {
        self.job.is_some()
    }

    /// When to look again although nothing completes.
    pub fn retry_at(&self) -> Option<Nanos> {
        match (&self.job, &self.error) {
            (None, Some(_)) if self.shelving => None,
            (None, Some(_)) => Some(self.again.max(self.look_at)),
            (None, None) => self.skipped.then_some(self.look_at),
            (Some(_), _) => None,
        }
    }

    /// Ends without finishing. Completions that still come are ignored by the owner.
    pub fn abandon(&mut self) {
        self.job = None;
    }
}

impl Stream {
    /// Folding could make room, or is about to.
    pub(crate) fn can_fold(&self) -> bool {
        self.fold.is_busy() || (self.fold.error.is_none() && due(self).is_some())
    }

    /// Goes on; returns true if there is more to do without a completion.
    pub(crate) fn fold_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, next_id: &mut u32, reads: &Reads) -> bool {
        if self.fold.job.is_none() {
            let now = ctx.io.now();
            self.fold.skipped = now < self.fold.look_at && self.journal.segments.len() > 1;
            if now < self.fold.again || now < self.fold.look_at {
                return false;
            }
            if self.reopen_at.is_some() {
                // A journal that has failed is left as it is until it has been read back.
                self.fold.look_at = now + LOOK;
                return false;
            }
            self.release_kept(ctx.io);
            let wanted = self.bounds.reserve_bytes.saturating_add(2 * self.bounds.segment_bytes);
            self.fold.space_low = ctx.io.free_space(&self.journal.config.dir).is_ok_and(|free| free < wanted);
            let Some(why) = due(self) else {
                self.keeping = None;
                self.fold.error = None;
                self.fold.look_at = now + LOOK;
                return false;
            };
            if self.journal.segments.front().is_some_and(|front| self.scrub.doubts(front.uid)) {
                // What is lost of it may be readable again: it is looked at once more before it is folded as unknown.
                self.fold.look_at = now + LOOK;
                return false;
            }
            self.fold.shelving = false;
            self.keep_newest();
            match self.make_shelves(ctx, next_id, reads) {
                Ok(Shelved::Done) => {}
                Ok(Shelved::Until(at)) => {
                    self.fold.look_at = at;
                    self.fold.skipped = true;
                    return false;
                }
                Ok(_) => {
                    self.fold.shelving = self.fold.gave_way.is_none();
                    return false;
                }
                Err(error) => {
                    tracing::error!(stream = %self.config.stream, error, "folding waits");
                    self.fold.error = Some(error);
                    self.fold.again = ctx.io.now() + AGAIN;
                    return false;
                }
            }
            if let Err(error) = self.begin_fold(ctx, why) {
                tracing::error!(stream = %self.config.stream, error, "folding failed; history stays longer");
                self.fold.error = Some(error);
                self.fold.again = ctx.io.now() + AGAIN;
                return false;
            }
        }
        let Some(mut job) = self.fold.job.take() else { return true };
        self.fold.starved = false;
        let more = job.turn(ctx, self);
        if let Some(errno) = job.failed {
            if job.is_quiet() {
                let error = format!("writing the replica image: {errno}");
                tracing::error!(stream = %self.config.stream, error, "folding failed and is tried again");
                self.fold.error = Some(error);
                self.fold.again = ctx.io.now() + AGAIN;
                self.journal.release(ctx.io, job.uid);
                for frame in job.suspects {
                    self.scrub.suspect(Suspect { journal: self.journal.id, segment: job.uid, frame });
                }
                return true;
            }
        } else if job.step == Step::Finish {
            return match self.finish_fold(ctx.io, &mut job) {
                Ok(()) => true,
                Err(error) => {
                    tracing::error!(stream = %self.config.stream, error, "folding failed and is tried again");
                    self.fold.error = Some(error);
                    self.fold.again = ctx.io.now() + AGAIN;
                    false
                }
            };
        }
        self.fold.job = Some(job);
        more
    }

    /// What views need of the oldest segment is put on their shelves.
    fn make_shelves<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        next_id: &mut u32,
        reads: &Reads,
    ) -> Result<Shelved, String> {
        let front = self.journal.segments.front().and_then(|front| Some((front.uid, front.last_seq()?)));
        let Some((uid, last)) = front else { return Ok(Shelved::Done) };
        // Folded again after a crash: the shelves were complete before the floor was raised, and the image is not what it
        // was then.
        if last <= self.points.floor() || mutant!(PinIgnored) {
            return Ok(Shelved::Done);
        }
        let image_reads = (reads.next_number(), |number| reads.is_before(number));
        match self.shelve(ctx, (uid, last), next_id, image_reads) {
            Shelved::Failed(pin, errno) => {
                let error = format!("what the view `{}` needs of its point cannot be kept: {errno}", pin.name);
                if errno == Errno::NOSPC && !pin.failover {
                    self.fold.gave_way = Some((pin.name, error));
                    return Ok(Shelved::Waiting);
                }
                Err(error)
            }
            shelved => Ok(shelved),
        }
    }

    fn begin_fold<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, why: &'static str) -> Result<(), String> {
        let Some(front) = self.journal.segments.front() else { return Ok(()) };
        let (uid, incarnation) = (front.uid, front.writer.incarnation);
        let Some(last) = front.last_seq() else {
            // Nothing in it: only the writer is remembered.
            return self.journal.drop_oldest(ctx.io).map_err(|errno| format!("dropping a segment: {errno}"));
        };
        let lives = self.points.at(last);
        let newest_cut = self.points.cuts().take_while(|cut| cut.seq <= last).last().map_or(0, |cut| cut.cut.number);
        let newest_cut = newest_cut.max(self.history.state().newest_cut);
        if !mutant!(FloorAfterImage) {
            self.history
                .raise_floor(ctx.io, last, &lives, newest_cut, incarnation)
                .map_err(|error| format!("raising the floor: {error}"))?;
        }
        self.keep_point(last);
        self.points.raise_floor(last);
        if !why.is_empty() {
            self.fold.shortened = Some((why, last));
        }
        for life in lives.values() {
            self.ensure_image(ctx.io, &life.info).map_err(|errno| format!("making a replica image: {errno}"))?;
        }
        let file = self.journal.open_for_read(ctx.io, uid).map_err(|errno| format!("opening a segment: {errno}"))?;
        self.journal.hold(uid);
        self.fold.job = Some(Job {
            uid,
            file,
            step: Step::Apply,
            frame: 0,
            window: None,
            reading: None,
            alone: false,
            salvage: None,
            suspects: Vec::new(),
            refused: VecDeque::new(),
            next: (0, 0),
            stretches: VecDeque::new(),
            plain: Vec::new(),
            touched: BTreeSet::new(),
            syncs: 0,
            writes: 0,
            patch: None,
            unreadable: self.history.state().unreadable.clone(),
            failed: None,
        });
        Ok(())
    }

    fn finish_fold<I: Io>(&mut self, io: &mut I, job: &mut Job) -> Result<(), String> {
        self.journal.release(io, job.uid);
        if mutant!(FloorAfterImage) {
            let (floor, lives) = (self.points.floor(), self.points.base().clone());
            let writer = self.journal.segment(job.uid).map(|segment| segment.writer.incarnation).unwrap_or_default();
            let cut = self.points.newest_cut();
            self.history.raise_floor(io, floor, &lives, cut, writer).map_err(|error| error.to_string())?;
        }
        if job.unreadable != self.history.state().unreadable {
            let mut state = self.history.state().clone();
            state.unreadable = std::mem::take(&mut job.unreadable);
            self.history.write_state(io, state).map_err(|error| format!("keeping unreadable ranges: {error}"))?;
        }
        self.fold.folded += 1;
        self.fold.error = None;
        self.journal.drop_oldest(io).map_err(|errno| format!("dropping a segment: {errno}"))
    }

    /// A completion of the fold.
    pub(crate) fn fold_done<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, what: FoldOp, done: Done) {
        let Some(mut job) = self.fold.job.take() else { return };
        if let (FoldOp::Zero(slot, offset, len), Err(Errno::OPNOTSUPP)) = (what, done.result) {
            job.writes -= 1;
            job.refused.push_back(Stretch { slot, offset, len, from: From::WriteZero });
            if let Some(image) = self.images.get_mut(&slot) {
                image.unmap = false;
            }
        } else {
            job.done(ctx, self.id, what, done);
        }
        self.fold.job = Some(job);
    }
}

impl Job {
    fn is_quiet(&self) -> bool {
        self.writes == 0 && self.reading.is_none() && self.syncs == 0
    }

    fn turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, stream: &mut Stream) -> bool {
        if self.failed.is_some() {
            return false;
        }
        match self.step {
            Step::Apply => self.apply(ctx, stream),
            Step::Sync => {
                if self.syncs == 0 {
                    self.step = Step::Finish;
                }
                self.syncs == 0
            }
            Step::Finish => true,
        }
    }

    fn apply<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, stream: &mut Stream) -> bool {
        for _ in 0..PIECES_PER_TURN {
            if self.patch.is_some() || self.writes >= MAX_WRITES || self.failed.is_some() {
                return false;
            }
            if let Some(stretch) = self.refused.pop_front().or_else(|| self.stretches.pop_front()) {
                match self.write(ctx, stream, stretch) {
                    Ok(true) => {}
                    Ok(false) => {
                        self.stretches.push_front(stretch);
                        // A block written in part waits for the others; a buffer for whoever has it.
                        stream.fold.starved = self.writes == 0;
                        return false;
                    }
                    Err(errno) => self.failed = Some(errno),
                }
                continue;
            }
            // The payload of the last chunk is still being copied out of `plain` only when writes begin, so a new
            // chunk may be opened as soon as no stretch is left.
            if self.window.is_some() {
                self.open_next(stream);
                continue;
            }
            if self.reading.is_some() {
                let Some(salvage) = &mut self.salvage else { return false };
                if let Some(op) = salvage.next() {
                    ctx.submit(Purpose::Fold(stream.id, FoldOp::Window), op);
                }
                if !salvage.is_over() {
                    return false;
                }
                let part = self.salvage.take().and_then(Salvage::finish);
                self.window =
                    part.zip(self.reading.take()).map(|(part, (first, count, start))| (part, first, count, start));
                continue;
            }
            let Some(segment) = stream.journal.segment(self.uid) else {
                self.failed = Some(Errno::NOENT);
                return false;
            };
            if self.frame as usize == segment.frames.len() {
                if self.writes > 0 || !self.refused.is_empty() {
                    return false;
                }
                self.sync(ctx, stream);
                return self.syncs == 0;
            }
            let first = &segment.frames[self.frame as usize];
            let start = u64::from(first.at);
            let Some(buf) = ctx.io.pool().take(WINDOW.max(first.len as usize)) else {
                stream.fold.starved = true;
                return false;
            };
            let end_of = |number: usize| {
                let frame = &segment.frames[number];
                (u64::from(frame.at) + u64::from(frame.len) - start) as usize
            };
            let mut after = self.frame as usize + 1;
            // A frame with lost chunks is read alone.
            let whole = |number: usize| !segment.lost.contains_key(&(number as u32));
            while after < segment.frames.len() && end_of(after) <= buf.len() && whole(after - 1) && whole(after) {
                after += 1;
            }
            let len = end_of(after - 1);
            self.alone = !whole(self.frame as usize);
            self.reading = Some((self.frame, after as u32 - self.frame, start));
            self.next = (self.frame, 0);
            self.frame = after as u32;
            let part = Part { buf, at: 0, len };
            ctx.submit(Purpose::Fold(stream.id, FoldOp::Window), Op::Read { file: self.file, offset: start, part });
            return false;
        }
        true
    }

    /// Opens the next chunk of the window and lists what of it goes to the images.
    fn open_next(&mut self, stream: &mut Stream) {
        let Some((mut part, first, count, start)) = self.window.take() else { return };
        let (number, chunk) = self.next;
        if number == first + count {
            return;
        }
        let Some(segment) = stream.journal.segment(self.uid) else { return };
        let Some(frame) = segment.frames.get(number as usize) else { return };
        self.next = if u16::from(chunk) + 1 < frame.chunks { (number, chunk + 1) } else { (number + 1, 0) };
        if segment.is_lost(number, chunk) {
            let mut cover = std::mem::take(&mut stream.fold.cover);
            self.list_lost(number, chunk, &mut cover, segment);
            stream.fold.cover = cover;
            self.window = Some((part, first, count, start));
            return;
        }
        // Header and directory as they were when the frame came in: those on the disk may have rotted.
        let header = segment.header(frame);
        let opened = segment.locate(number, chunk).and_then(|(at, len)| {
            let at = (at - start) as usize;
            let sealed = part.buf.get_mut(at..at + len)?;
            let opened = open_chunk(&segment.writer.key, &header, chunk.into(), sealed).ok()?;
            let chunk = Chunk::parse(opened).ok()?;
            // Copied when it is not compressed: the writes take it from `plain` later.
            let mut plain = std::mem::take(&mut self.plain);
            if chunk.codec == afterimage_wire::chunk::Codec::Plain {
                plain.clear();
                plain.extend_from_slice(chunk.stored);
            } else {
                payload(&chunk, &mut plain).ok()?;
            }
            self.plain = plain;
            Some(chunk)
        });
        let Some(chunk) = opened else {
            // It could be read when it came in. The image would be wrong without it: nothing is dropped before it has been
            // looked at again.
            self.suspects.push(number);
            self.failed = Some(Errno::IO);
            return;
        };
        let mut cover = std::mem::take(&mut stream.fold.cover);
        for record in chunk.records().flatten() {
            if record.kind.changes_disk() || record.kind == RecordKind::Unreadable {
                self.list(&record, &mut cover, segment);
            }
            if matches!(record.kind, RecordKind::Join | RecordKind::Resize) {
                // What it cut off is in the index under its number.
                let delta = record.seq - segment.index.first_seq();
                for entry in segment.index.entries().filter(|entry| u64::from(entry.seq_delta) == delta) {
                    let range = Record { offset: entry.start, len: entry.len, ..record };
                    self.list(&range, &mut cover, segment);
                }
            }
        }
        stream.fold.cover = cover;
        self.window = Some((part, first, count, start));
    }

    /// What the index knows of a lost chunk: its zeros, and that the rest cannot be known.
    fn list_lost(&mut self, frame: u32, chunk: u8, cover: &mut Cover, segment: &crate::journal::Segment) {
        for entry in segment.index.entries().filter(|entry| entry.frame == frame && entry.chunk == chunk) {
            let kind = if entry.kind == EntryKind::Zero { RecordKind::Zero } else { RecordKind::Unreadable };
            let record = Record {
                seq: segment.index.first_seq() + u64::from(entry.seq_delta),
                kind,
                disk: entry.disk,
                offset: entry.start,
                len: entry.len,
                mono_ns: 0,
                wall_ns: 0,
                payload_at: 0,
                payload_len: 0,
                crc: 0,
            };
            self.list(&record, cover, segment);
        }
    }

    fn list(&mut self, record: &Record, cover: &mut Cover, segment: &crate::journal::Segment) {
        cover.start(record.offset, record.end());
        cover.lay(&segment.index, self.uid, record.disk, u64::MAX);
        self.take_pieces(record, cover);
    }

    /// Of the covered pieces those of this record: nothing newer in the segment overwrites them.
    fn take_pieces(&mut self, record: &Record, cover: &mut Cover) {
        for piece in cover.finish() {
            if piece.seq != record.seq {
                continue;
            }
            let from = match piece.content {
                Content::Data { at, .. } => From::Payload(at as usize),
                Content::Zero => From::Zero,
                Content::Unreadable => {
                    add_unreadable(&mut self.unreadable, record.disk, piece.offset, piece.len);
                    continue;
                }
                Content::Below => continue,
            };
            clear_unreadable(&mut self.unreadable, record.disk, piece.offset, piece.len);
            let stretch = Stretch { slot: record.disk, offset: piece.offset, len: piece.len, from };
            match self.stretches.back_mut() {
                Some(last) if continues(last, &stretch) => last.len += stretch.len,
                _ => self.stretches.push_back(stretch),
            }
        }
    }

    /// Begins to write (the front of) a stretch; what is left of it goes back to the queue. False: not now.
    fn write<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, stream: &mut Stream, stretch: Stretch) -> Result<bool, Errno> {
        if stretch.len == 0 {
            return Ok(true);
        }
        let end = stretch.offset + stretch.len;
        let image = stream.image_for(ctx.io, stretch.slot, if stretch.from == From::Zero { 0 } else { end })?;
        let Some(image) = image else { return Ok(true) }; // A disk that never joined: no point holds it.
        let (file, block, size, unmap) = (image.file, u64::from(image.block), image.size, image.unmap);
        if matches!(stretch.from, From::Zero | From::WriteZero) && end > size {
            // Behind the image's end there are zeros already.
            let len = size.saturating_sub(stretch.offset);
            self.stretches.push_front(Stretch { len, ..stretch });
            return Ok(true);
        }
        self.touched.insert(stretch.slot);
        let (head, inner) = (stretch.offset % block, stretch.len / block * block);
        if head != 0 || inner == 0 {
            // Part of one block.
            if self.writes > 0 {
                return Ok(false);
            }
            let len = stretch.len.min(block - head);
            let bytes = match stretch.from {
                From::Payload(at) => self.plain[at..at + len as usize].to_vec(),
                From::Zero | From::WriteZero => vec![0; len as usize],
            };
            let Some(buf) = ctx.io.pool().take(block as usize) else { return Ok(false) };
            let at = stretch.offset - head;
            self.patch = Some(Patch { file, at, bytes, skip: head as usize });
            self.writes += 1;
            self.rest(stretch, len);
            let part = Part { buf, at: 0, len: block as usize };
            ctx.submit(Purpose::Fold(stream.id, FoldOp::PatchRead), Op::Read { file, offset: at, part });
            return Ok(true);
        }
        if stretch.from == From::Zero && unmap {
            let len = inner.min(MAX_ZERO);
            self.rest(stretch, len);
            self.writes += 1;
            let op = Op::Zero { file, offset: stretch.offset, len, unmap: true };
            ctx.submit(Purpose::Fold(stream.id, FoldOp::Zero(stretch.slot, stretch.offset, len)), op);
            return Ok(true);
        }
        let len = inner.min(MAX_WRITE);
        let Some(mut buf) = ctx.io.pool().take(len as usize) else { return Ok(false) };
        match stretch.from {
            From::Payload(at) => buf[..len as usize].copy_from_slice(&self.plain[at..at + len as usize]),
            From::Zero | From::WriteZero => buf[..len as usize].fill(0),
        }
        self.rest(stretch, len);
        self.writes += 1;
        let part = Part { buf, at: 0, len: len as usize };
        let op = Op::Write { file, offset: stretch.offset, part, durable: false };
        ctx.submit(Purpose::Fold(stream.id, FoldOp::Write), op);
        Ok(true)
    }

    fn rest(&mut self, stretch: Stretch, done: u64) {
        if done < stretch.len {
            let from = match stretch.from {
                From::Payload(at) => From::Payload(at + done as usize),
                other => other,
            };
            let (offset, len) = (stretch.offset + done, stretch.len - done);
            self.stretches.push_front(Stretch { offset, len, from, ..stretch });
        }
    }

    fn sync<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, stream: &Stream) {
        self.step = Step::Sync;
        if mutant!(ImageNotSynced) {
            return;
        }
        for slot in &self.touched {
            if let Some(image) = stream.images.get(slot) {
                self.syncs += 1;
                ctx.submit(Purpose::Fold(stream.id, FoldOp::Sync), Op::Sync { file: image.file });
            }
        }
    }

    fn done<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, stream: u32, what: FoldOp, done: Done) {
        if what == FoldOp::Window
            && let Some(salvage) = &mut self.salvage
        {
            return salvage.done(done);
        }
        if let Err(errno) = done.result {
            if what == FoldOp::Window {
                return self.unread(errno, done.part);
            }
            self.failed = Some(errno);
        }
        match what {
            FoldOp::Sync => self.syncs -= 1,
            FoldOp::Window => {
                let window = self.reading.take();
                if let (None, Some(part), Some((first, count, start))) = (self.failed, done.part, window) {
                    self.window = Some((part, first, count, start));
                }
            }
            FoldOp::PatchRead => match (self.failed, done.part, &self.patch) {
                (None, Some(mut part), Some(patch)) => {
                    part.buf[patch.skip..patch.skip + patch.bytes.len()].copy_from_slice(&patch.bytes);
                    let op = Op::Write { file: patch.file, offset: patch.at, part, durable: false };
                    ctx.submit(Purpose::Fold(stream, FoldOp::PatchWrite), op);
                }
                _ => {
                    self.patch = None;
                    self.writes -= 1;
                }
            },
            FoldOp::PatchWrite => {
                self.patch = None;
                self.writes -= 1;
            }
            FoldOp::Write | FoldOp::Zero(..) => self.writes -= 1,
        }
    }
}

impl Job {
    /// A window could not be read in one piece. Of a frame that has lost chunks that is to be expected; others are to be
    /// looked at again.
    fn unread(&mut self, errno: Errno, part: Option<Part>) {
        match (self.reading, part) {
            (Some((_, 1, start)), Some(part)) if self.alone => {
                self.salvage = Some(Salvage::new(self.file, start, part));
            }
            (reading, _) => {
                let (first, count, _) = reading.unwrap_or_default();
                self.suspects.extend(first..first + count);
                self.reading = None;
                self.failed = Some(errno);
            }
        }
    }
}

fn continues(last: &Stretch, next: &Stretch) -> bool {
    last.slot == next.slot
        && last.offset + last.len == next.offset
        && match (last.from, next.from) {
            (From::Payload(a), From::Payload(b)) => a as u64 + last.len == b as u64,
            (a, b) => a == b,
        }
}

/// Takes a range out of the unreadable ones: it has been overwritten.
fn clear_unreadable(ranges: &mut Vec<UnreadableRange>, slot: u16, offset: u64, len: u64) {
    if ranges.is_empty() {
        return;
    }
    let end = offset + len;
    let mut left = Vec::with_capacity(ranges.len() + 1);
    for range in ranges.drain(..) {
        let range_end = range.offset + range.len;
        if range.slot != slot || range_end <= offset || end <= range.offset {
            left.push(range);
            continue;
        }
        if range.offset < offset {
            left.push(UnreadableRange { len: offset - range.offset, ..range });
        }
        if end < range_end {
            left.push(UnreadableRange { offset: end, len: range_end - end, ..range });
        }
    }
    *ranges = left;
}

/// Adds an unreadable range. If there are too many, neighbours are joined: more is called unreadable than is, never
/// less.
fn add_unreadable(ranges: &mut Vec<UnreadableRange>, slot: u16, offset: u64, len: u64) {
    clear_unreadable(ranges, slot, offset, len);
    let at = ranges.partition_point(|range| (range.slot, range.offset) < (slot, offset));
    ranges.insert(at, UnreadableRange { slot, offset, len });
    if ranges.len() >= MAX_UNREADABLE {
        let nearest = (1..ranges.len())
            .filter(|i| ranges[i - 1].slot == ranges[*i].slot)
            .min_by_key(|i| ranges[*i].offset - ranges[i - 1].offset - ranges[i - 1].len);
        if let Some(i) = nearest {
            let behind = ranges.remove(i);
            ranges[i - 1].len = behind.offset + behind.len - ranges[i - 1].offset;
        }
    }
}
