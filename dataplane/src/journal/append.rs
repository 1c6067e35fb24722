//! Appending: batches of frames become one write each, a few of them under way, completed in order.
//!
//! ```text
//! push(batch) ─▶ queue ─pump─▶ (roll?) ─▶ write under way ─completion, in order─▶ written ─▶ the owner
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_wire::ALIGN;
use afterimage_wire::record::DiskInfo;

use super::segment::{Segment, Writer, head};
use super::{Journal, Place, segment_name};
use crate::io::{Done, Errno, File, Io, Nanos, Op, OpenHow, Part};
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
}

/// The next segment's file: allocated, its name durable, without a head.
#[derive(Debug)]
struct Prepared {
    number: u64,
    path: String,
    file: File,
    size: u64,
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
        if let Some(prepared) = self.prepared.take() {
            io.close(prepared.file);
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
        self.append.under_way.is_empty() && self.append.syncing.is_none()
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
        if self.append.prepared.is_none() {
            match self.create(ctx.io) {
                Ok(prepared) => self.append.prepared = Some(prepared),
                Err(Some(why)) => {
                    self.append.no_room = Some((why, ctx.io.now() + ROOM_AGAIN));
                    return false;
                }
                Err(None) => return false,
            }
        }
        self.append.no_room = None;
        let number = self.append.prepared.as_ref().map_or(0, |prepared| prepared.number);
        let disks = if self.append.disks.is_empty() { writer.disks.clone() } else { self.append.disks.clone() };
        let (stream, timeline) = (self.config.stream, self.config.timeline);
        let bytes = head(stream, timeline, number, &writer, first, disks, ctx.io.wall()).encode();
        let Some(mut buf) = ctx.io.pool().take(bytes.len()) else { return false };
        buf[..bytes.len()].copy_from_slice(&bytes);
        let prepared = self.append.prepared.take().expect("made above");
        self.close_active(ctx.io);
        let uid = self.next_uid;
        self.next_uid += 1;
        let mut segment = Segment::new(uid, number, prepared.path, stream, writer, prepared.size, first.1);
        segment.file = Some(prepared.file);
        self.segments.push_back(segment);
        let (file, at, size) = (prepared.file, bytes.len() as u64, prepared.size);
        self.append.active = Some(Active { uid, file, at, size });
        let serial = self.append.next_serial;
        self.append.next_serial += 1;
        self.append.under_way.push_back(UnderWay { serial, kind: Kind::Head, finished: None });
        let part = Part { buf, at: 0, len: bytes.len() };
        let op = Op::Write { file: prepared.file, offset: 0, part, durable: !mutant!(HeadNotDurable) };
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

    /// Makes the next segment's file. `Err(None)`: the journal has failed.
    fn create<I: Io>(&mut self, io: &mut I) -> Result<Prepared, Option<NoRoom>> {
        let number = self.next_number;
        let size = self.config.segment_bytes;
        let path = format!("{}/{}", self.config.dir, segment_name(self.config.timeline, number));
        if self.bytes.saturating_add(size) > self.append.budget {
            return Err(Some(NoRoom::Budget));
        }
        if self.append.reserve > 0
            && io.free_space(&self.config.dir).is_ok_and(|free| free < self.append.reserve.saturating_add(size))
        {
            return Err(Some(NoRoom::Space));
        }
        let result = io.open(&path, OpenHow { write: true, create_new: true, lock: true }).and_then(|file| {
            io.set_len(file, size, true).map(|()| file).inspect_err(|_| {
                io.close(file);
                let _ = io.remove(&path);
            })
        });
        // The folder is synced before any frame can be acknowledged in the file.
        let result = result.and_then(|file| io.sync_dir(&self.config.dir).map(|()| file));
        match result {
            Ok(file) => {
                self.next_number += 1;
                self.bytes += size;
                Ok(Prepared { number, path, file, size })
            }
            Err(Errno::NOSPC) => Err(Some(NoRoom::Space)),
            Err(errno) => {
                tracing::error!(path, %errno, "a segment cannot be made");
                self.append.failed = Some(errno);
                Err(None)
            }
        }
    }

    /// Makes the next segment's file before it is needed.
    fn prepare<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        let half = self.append.active.as_ref().is_some_and(|active| active.at >= active.size / 2);
        if !half || ctx.io.now() < self.append.prepare_at || self.append.prepared.is_some() {
            return;
        }
        match self.create(ctx.io) {
            Ok(prepared) => self.append.prepared = Some(prepared),
            // Not needed yet: the roll says it when it is.
            Err(Some(_)) => self.append.prepare_at = ctx.io.now() + ROOM_AGAIN,
            Err(None) => {}
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
        self.append.active = Some(Active { uid, file, at, size });
    }

    /// A file without a head, found by recovery, is the next segment.
    pub(crate) fn adopt_prepared(&mut self, number: u64, path: String, file: File, size: u64) {
        self.append.prepared = Some(Prepared { number, path, file, size });
    }
}
