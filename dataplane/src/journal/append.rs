//! Appending: batches of frames become one write each, a few of them under way, completed in order.
//!
//! ```text
//! push(batch) ─▶ queue ─pump─▶ (roll?) ─▶ write under way ─completion, in order─▶ written ─▶ the owner
//! ```
//! The next segment's file is made while the present one fills, beside this thread, which never waits for it: a batch that
//! needs it before it is there waits in the queue. One is made ahead, and only behind a segment whose head is durable: so
//! of all files without one only the newest may be something else than damage.

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_wire::ALIGN;
use afterimage_wire::record::DiskInfo;

use super::segment::{Segment, Writer, head};
use super::{Journal, Place, segment_name};
use crate::io::{Done, Errno, File, Io, Nanos, Op, Part};
use crate::target::ops::{Ctx, Purpose};

/// Writes of one journal under way. Blocks of a new segment were never written, so a durable write into them also commits
/// the file system's own journal; filling segments with zeros ahead, or using dropped ones again, gained nothing that
/// could be measured beside the disk's own flush (4 to 5 ms where this was tried) and doubles what is written.
const MAX_UNDER_WAY: usize = 4;
/// Batches that wait for a write to end.
const MAX_QUEUED: usize = 2;
/// How long to wait before asking again for room.
const ROOM_AGAIN: Nanos = 250_000_000;
/// Frames that lie back to back in a buffer.
#[derive(Debug)]
pub struct Batch {
    /// The bytes.
    pub part: Part,
    /// Who sealed them.
    pub writer: Arc<Writer>,
    /// Number of the first frame and of its first record.
    pub first: (u64, u64),
    /// Number of the last frame and of its last record.
    pub last: (u64, u64),
    /// On stable storage when it completes. Only if everything before is, too.
    pub durable: bool,
    /// The owner's.
    pub tag: u64,
}

/// A batch that is in the segment.
#[derive(Debug)]
pub struct Written {
    /// The bytes.
    pub part: Part,
    /// Segment.
    pub segment: u64,
    /// Byte offset in it.
    pub at: u64,
    /// As given.
    pub tag: u64,
}

#[derive(Debug)]
enum Kind {
    Head,
    Frames { segment: u64, at: u64, place: Place, durable: bool, tag: u64 },
}

#[derive(Debug)]
struct UnderWay {
    serial: u64,
    kind: Kind,
    finished: Option<(Result<(), Errno>, Option<Part>)>,
}

#[derive(Debug)]
struct Active {
    uid: u64,
    file: File,
    at: u64,
    size: u64,
    /// Its head is durable.
    headed: bool,
}

/// How far the next segment's file is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Step {
    /// It is being made.
    Making,
    /// It is there and allocated. Its name may be gone after a loss of power.
    Made,
    /// Its name is being made durable.
    Naming,
    /// It can be used.
    Ready,
}

/// The next segment's file, without a head.
#[derive(Debug)]
struct Prepared {
    number: u64,
    path: String,
    size: u64,
    file: Option<File>,
    step: Step,
}

/// Why no new segment can be made.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// The journal's budget.
    Budget,
    /// The file system.
    Space,
}

/// The appending half of a [`Journal`].
#[derive(Debug)]
pub(super) struct Append {
    active: Option<Active>,
    prepared: Option<Prepared>,
    queue: VecDeque<Batch>,
    under_way: VecDeque<UnderWay>,
    next_serial: u64,
    written: VecDeque<Written>,
    sync_wanted: bool,
    syncing: Option<Place>,
    failed: Option<Errno>,
    /// A new segment is needed and cannot be made; when to try again.
    no_room: Option<(NoRoom, Nanos)>,
    /// The next segment could not be made ahead; when to try again.
    prepare_at: Nanos,
    disks: Vec<DiskInfo>,
    budget: u64,
    reserve: u64,
    roll_after: Nanos,
}

impl Default for Append {
    fn default() -> Self {
        Self {
            active: None,
            prepared: None,
            queue: VecDeque::with_capacity(MAX_QUEUED),
            under_way: VecDeque::with_capacity(MAX_UNDER_WAY + 1),
            next_serial: 0,
            written: VecDeque::with_capacity(MAX_UNDER_WAY),
            sync_wanted: false,
            syncing: None,
            failed: None,
            no_room: None,
            prepare_at: 0,
            disks: Vec::new(),
            budget: u64::MAX,
            reserve: 0,
            roll_after: Nanos::MAX,
        }
    }
}

impl Append {
    /// An empty one with the same bounds.
    pub(super) fn successor(&self) -> Self {
        let (disks, budget) = (self.disks.clone(), self.budget);
        Self { disks, budget, reserve: self.reserve, roll_after: self.roll_after, ..Self::default() }
    }

    pub(super) fn close<I: Io>(&mut self, io: &mut I) {
        if let Some(file) = self.prepared.take().and_then(|prepared| prepared.file) {
            io.close(file);
        }
        self.active = None;
        self.queue.clear();
    }
}

impl Journal {
    /// Bounds: bytes of all segments, bytes of the file system left free, stream time of one segment.
    pub(crate) fn set_bounds(&mut self, budget: u64, reserve: u64, roll_after: Nanos) {
        (self.append.budget, self.append.reserve, self.append.roll_after) = (budget, reserve, roll_after);
    }

    /// The disks that heads of new segments name.
    pub(crate) fn set_disks(&mut self, disks: Vec<DiskInfo>) {
        self.append.disks = disks;
    }

    /// The segment that is appended to.
    pub(crate) fn active_uid(&self) -> Option<u64> {
        self.append.active.as_ref().map(|active| active.uid)
    }

    /// True while [`Journal::push`] may be called.
    pub(crate) fn has_room(&self) -> bool {
        self.append.queue.len() < MAX_QUEUED && self.append.failed.is_none()
    }

    /// Nothing is waiting and no write is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.append.queue.is_empty() && self.append.under_way.is_empty()
    }

    /// Nothing was given to the kernel that has not come back.
    pub(crate) fn is_settled(&self) -> bool {
        self.append.under_way.is_empty() && self.append.syncing.is_none() && !self.is_preparing()
    }

    /// The next segment's file may come to be at any moment.
    pub(crate) fn is_making(&self) -> bool {
        self.append.prepared.as_ref().is_some_and(|next| next.step == Step::Making)
    }

    /// The next segment's file is being made, or its name made durable.
    fn is_preparing(&self) -> bool {
        self.append.prepared.as_ref().is_some_and(|next| matches!(next.step, Step::Making | Step::Naming))
    }

    /// Nothing is written any more: the files lose the lock that writing needs. What is in them stays readable.
    pub(crate) fn stop_writing<I: Io>(&mut self, io: &mut I) {
        if let Some(active) = self.append.active.take()
            && let Some(segment) = self.segment_mut(active.uid)
        {
            segment.file = None;
            io.close(active.file);
        }
        self.append.close(io);
    }

    /// A write or sync failed: nothing more is taken.
    pub(crate) fn failed(&self) -> Option<Errno> {
        self.append.failed
    }

    /// A batch waits and there is no room for a new segment.
    pub(crate) fn no_room(&self) -> Option<NoRoom> {
        self.append.no_room.filter(|_| !self.append.queue.is_empty()).map(|(why, _)| why)
    }

    /// Room may have been made: ask again at once.
    pub(crate) fn room_made(&mut self) {
        if let Some((_, again)) = &mut self.append.no_room {
            *again = 0;
        }
        self.append.prepare_at = 0;
    }

    /// Batches that no write was begun for are given up: their sender is gone.
    pub(crate) fn drop_queue(&mut self) {
        if self.append.queue.is_empty() {
            return;
        }
        self.append.queue.clear();
        self.append.no_room = None;
        self.accepted = match self.append.under_way.iter().rev().find_map(|write| match write.kind {
            Kind::Frames { place, .. } => Some(place),
            Kind::Head => None,
        }) {
            Some(place) => place,
            None => self.complete,
        };
    }

    /// Takes a batch. Only while [`Journal::has_room`].
    pub(crate) fn push(&mut self, batch: Batch) {
        debug_assert!(batch.part.len.is_multiple_of(ALIGN) && batch.part.len > 0);
        self.accepted = Place { incarnation: batch.writer.incarnation, frame: batch.last.0, seq: batch.last.1 };
        self.append.queue.push_back(batch);
    }

    /// The next batch that is in the segment, in order.
    pub(crate) fn take_written(&mut self) -> Option<Written> {
        self.append.written.pop_front()
    }

    /// Everything written so far is to be durable; see [`Journal::durable`] for when it is.
    pub(crate) fn want_sync(&mut self) {
        if self.durable != self.complete {
            self.append.sync_wanted = true;
        }
    }

    /// Submits what can be.
    pub(crate) fn pump<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        if self.append.failed.is_some() {
            return;
        }
        while let Some(batch) = self.append.queue.front()
            && self.append.under_way.len() < MAX_UNDER_WAY
        {
            let len = batch.part.len as u64;
            if self.must_roll(batch, len) {
                if !self.append.under_way.is_empty() {
                    break;
                }
                if self.durable != self.complete {
                    self.append.sync_wanted = true;
                    break;
                }
                if !self.roll(ctx) {
                    break;
                }
                continue;
            }
            let active = self.append.active.as_mut().expect("rolled to one");
            let batch = self.append.queue.pop_front().expect("there is a front");
            let at = active.at;
            active.at += len;
            let serial = self.append.next_serial;
            self.append.next_serial += 1;
            let place = Place { incarnation: batch.writer.incarnation, frame: batch.last.0, seq: batch.last.1 };
            let kind = Kind::Frames { segment: active.uid, at, place, durable: batch.durable, tag: batch.tag };
            self.append.under_way.push_back(UnderWay { serial, kind, finished: None });
            let durable = batch.durable && !mutant!(AckBeforeSync);
            let op = Op::Write { file: active.file, offset: at, part: batch.part, durable };
            ctx.submit(Purpose::Append(self.id, serial), op);
        }
        if self.append.sync_wanted && self.append.syncing.is_none() {
            self.append.sync_wanted = false;
            if self.durable != self.complete
                && let Some(active) = &self.append.active
            {
                self.append.syncing = Some(self.complete);
                ctx.submit(Purpose::AppendSync(self.id), Op::Sync { file: active.file });
            }
        }
        self.prepare(ctx);
    }

    fn must_roll(&self, batch: &Batch, len: u64) -> bool {
        let Some(active) = &self.append.active else { return true };
        let Some(segment) = self.segment(active.uid) else { return true };
        segment.writer.incarnation != batch.writer.incarnation
            || active.at + len > active.size
            || segment.time.1.saturating_sub(segment.time.0) >= self.append.roll_after
    }

    /// Begins a new segment for the batch in front; false if it has to wait.
    fn roll<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) -> bool {
        if let Some((_, again)) = self.append.no_room
            && ctx.io.now() < again
        {
            return false;
        }
        let Some(batch) = self.append.queue.front() else { return false };
        let (writer, first) = (batch.writer.clone(), batch.first);
        let Some(next) = self.append.prepared.as_ref() else {
            if let Err(why) = self.make_next(ctx) {
                self.append.no_room = Some((why, ctx.io.now() + ROOM_AGAIN));
            }
            return false;
        };
        let (true, Some(file)) = (next.step == Step::Ready, next.file) else { return false };
        self.append.no_room = None;
        let number = next.number;
        let disks = if self.append.disks.is_empty() { writer.disks.clone() } else { self.append.disks.clone() };
        let (stream, timeline) = (self.config.stream, self.config.timeline);
        let bytes = head(stream, timeline, number, &writer, first, disks, ctx.io.wall()).encode();
        let Some(mut buf) = ctx.io.pool().take(bytes.len()) else { return false };
        buf[..bytes.len()].copy_from_slice(&bytes);
        let Some(next) = self.append.prepared.take() else { return false };
        self.close_active(ctx.io);
        let uid = self.next_uid;
        self.next_uid += 1;
        let mut segment = Segment::new(uid, number, next.path, stream, writer, next.size, first.1);
        segment.file = Some(file);
        self.segments.push_back(segment);
        let (at, size) = (bytes.len() as u64, next.size);
        self.append.active = Some(Active { uid, file, at, size, headed: false });
        let serial = self.append.next_serial;
        self.append.next_serial += 1;
        self.append.under_way.push_back(UnderWay { serial, kind: Kind::Head, finished: None });
        let part = Part { buf, at: 0, len: bytes.len() };
        let op = Op::Write { file, offset: 0, part, durable: !mutant!(HeadNotDurable) };
        ctx.submit(Purpose::Append(self.id, serial), op);
        true
    }

    /// The active segment is full: its index is put in its final form, and room that it does not need given back.
    fn close_active<I: Io>(&mut self, io: &mut I) {
        let Some(active) = self.append.active.take() else { return };
        let Some(at) = self.position(active.uid) else { return };
        let segment = &mut self.segments[at];
        segment.index.seal();
        segment.frames.shrink_to_fit();
        segment.chunks.shrink_to_fit();
        if active.size - active.at > active.size / 4 && io.set_len(active.file, active.at, false).is_ok() {
            self.bytes -= active.size - active.at;
            self.segments[at].size = active.at;
        }
    }

    /// Begins to make the next segment's file.
    ///
    /// # Errors
    /// There is no room for it.
    fn make_next<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) -> Result<(), NoRoom> {
        let (number, size) = (self.next_number, self.config.segment_bytes);
        let path = format!("{}/{}", self.config.dir, segment_name(self.config.timeline, number));
        if self.bytes.saturating_add(size) > self.append.budget {
            return Err(NoRoom::Budget);
        }
        if self.append.reserve > 0
            && ctx.io.free_space(&self.config.dir).is_ok_and(|free| free < self.append.reserve.saturating_add(size))
        {
            return Err(NoRoom::Space);
        }
        self.next_number += 1;
        self.bytes += size;
        self.append.prepared = Some(Prepared { number, path: path.clone(), size, file: None, step: Step::Making });
        ctx.submit(Purpose::Prepare(self.id, number), Op::Create { path, len: size });
        Ok(())
    }

    /// Goes on with the next segment's file, before it is needed.
    fn prepare<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        if let Some(next) = &mut self.append.prepared {
            if next.step == Step::Made {
                // Before any frame can be acknowledged in the file.
                next.step = Step::Naming;
                let number = next.number;
                ctx.submit(Purpose::Name(self.id, number), Op::SyncDir { dir: self.config.dir.clone() });
            }
            return;
        }
        let half = self.append.active.as_ref().is_some_and(|active| active.headed && active.at >= active.size / 2);
        if half && ctx.io.now() >= self.append.prepare_at && self.make_next(ctx).is_err() {
            // Not needed yet: the roll says it when it is.
            self.append.prepare_at = ctx.io.now() + ROOM_AGAIN;
        }
    }

    /// The next segment's file is made, or cannot be.
    pub(crate) fn on_prepare<I: Io>(&mut self, io: &mut I, number: u64, done: &Done) {
        let making = |next: &&mut Prepared| next.number == number && next.step == Step::Making;
        let Some(next) = self.append.prepared.as_mut().filter(making) else { return close_made(io, done) };
        match done.result {
            Ok(file) => {
                next.file = Some(File(file as u32));
                next.step = if mutant!(NameNotDurable) { Step::Ready } else { Step::Made };
            }
            Err(errno) => {
                // There is no such file. Its number goes to the next one: nothing else took one meanwhile.
                self.bytes -= next.size;
                self.next_number = number;
                self.append.prepared = None;
                if errno != Errno::NOSPC {
                    return self.fail(errno);
                }
                let again = io.now() + ROOM_AGAIN;
                if self.append.queue.front().is_some_and(|batch| self.must_roll(batch, batch.part.len as u64)) {
                    self.append.no_room = Some((NoRoom::Space, again));
                } else {
                    self.append.prepare_at = again;
                }
            }
        }
    }

    /// The name of the next segment's file is durable, or not.
    pub(crate) fn on_name(&mut self, number: u64, done: &Done) {
        let naming = |next: &&mut Prepared| next.number == number && next.step == Step::Naming;
        let Some(next) = self.append.prepared.as_mut().filter(naming) else { return };
        match done.result {
            Ok(_) => next.step = Step::Ready,
            Err(errno) => {
                // Whether the name outlives a loss of power is not known; the file is found again by reading.
                next.step = Step::Made;
                self.fail(errno);
            }
        }
    }

    /// A head or a batch has been written, or not.
    pub(crate) fn on_append(&mut self, serial: u64, done: Done) {
        let Some(write) = self.append.under_way.iter_mut().find(|write| write.serial == serial) else { return };
        write.finished = Some((done.result.map(|_| ()), done.part));
        while self.append.under_way.front().is_some_and(|write| write.finished.is_some()) {
            let write = self.append.under_way.pop_front().expect("there is a front");
            let Some((result, part)) = write.finished else { break };
            if let Err(errno) = result
                && !mutant!(WriteErrorIgnored)
            {
                self.fail(errno);
            }
            if self.append.failed.is_some() {
                // What completed behind a failure is in the file, but nothing in front of it may be missing.
                continue;
            }
            if let (Kind::Head, Some(active)) = (&write.kind, &mut self.append.active) {
                active.headed = true;
            }
            if let (Kind::Frames { segment, at, place, durable, tag }, Some(part)) = (write.kind, part) {
                self.complete = place;
                if durable {
                    self.durable = place;
                }
                self.append.written.push_back(Written { part, segment, at, tag });
            }
        }
    }

    /// A sync has ended.
    pub(crate) fn on_sync(&mut self, done: &Done) {
        let Some(place) = self.append.syncing.take() else { return };
        match done.result {
            Ok(_) => {
                // A durable write behind it may have been faster.
                if self.durable.incarnation != place.incarnation || self.durable.frame < place.frame {
                    self.durable = place;
                }
            }
            Err(errno) => self.fail(errno),
        }
    }

    fn fail(&mut self, errno: Errno) {
        if self.append.failed.is_none() {
            tracing::error!(timeline = %self.config.timeline, %errno, "a journal cannot be written any more");
            self.append.failed = Some(errno);
        }
        self.append.queue.clear();
    }

    /// When to pump again although nothing completes.
    pub(crate) fn deadline(&self) -> Option<Nanos> {
        self.no_room()?;
        // The roll waits for what is under way first.
        if !self.is_settled() {
            return None;
        }
        self.append.no_room.map(|(_, again)| again)
    }

    /// Goes on in the newest segment at byte `at` (after recovery).
    pub(crate) fn resume(&mut self, uid: u64, file: File, at: u64, size: u64) {
        self.append.active = Some(Active { uid, file, at, size, headed: true });
    }

    /// A file without a head, found by recovery, is the next segment. Nobody knows whether its name is durable.
    pub(crate) fn adopt_prepared(&mut self, number: u64, path: String, file: File, size: u64) {
        self.append.prepared = Some(Prepared { number, path, size, file: Some(file), step: Step::Made });
    }
}

/// A file was made for a journal, or a spill, that wants it no more.
pub(crate) fn close_made<I: Io>(io: &mut I, done: &Done) {
    if let Ok(file) = done.result {
        io.close(File(file as u32));
    }
}
