//! Writing to the spill: one write for each frame, a few under way, counted in order. A new segment's name, made durable
//! beside this thread, is the first of them, its head the second.

use std::collections::VecDeque;

use afterimage_wire::ALIGN;
use afterimage_wire::ids::IncarnationId;
use afterimage_wire::segment::Predecessor;

use super::{MAX_WRITES, RETRY, Segment, Spill, SpillWriter, file_name, head, kind};
use crate::io::{Buf, Done, Errno, File, Io, Nanos, Op, Part};
use crate::journal::close_made;

/// Whether a frame may be written now.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Prepared {
    /// Yes: [`Spill::write`] it.
    Go,
    /// Something else must end first; a completion, or time, says when to ask again.
    Wait,
}

/// A frame whose write has ended.
#[derive(Debug)]
pub(crate) struct Returned {
    /// Its number.
    pub number: u64,
    /// Its buffer.
    pub buf: Option<Buf>,
    /// It is in the spill, and so is everything before it.
    pub written: bool,
}

#[derive(Debug)]
struct UnderWay {
    serial: u32,
    /// 0 for a head, and for the name of a segment.
    number: u64,
    last_seq: u64,
    len: u64,
    finished: Option<(bool, Option<Buf>)>,
}

#[derive(Debug)]
struct Active {
    file: File,
    at: u64,
    /// The frame that may follow.
    next_frame: u64,
    /// Everything counted is on stable storage.
    synced: bool,
    /// A write failed: nothing more goes into it.
    broken: bool,
}

/// The file that becomes the next segment.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
enum Spare {
    #[default]
    None,
    /// It is being made, by this operation.
    Making(u32),
    Made(File),
}

/// The writing half of a [`Spill`].
#[derive(Debug, Default)]
pub(super) struct Write {
    writer: Option<SpillWriter>,
    active: Option<Active>,
    under_way: VecDeque<UnderWay>,
    serial: u32,
    syncing: Option<u32>,
    returned: VecDeque<Returned>,
    retry_at: Option<Nanos>,
    spare: Spare,
    /// A frame has waited for the spare since this was last looked at.
    spare_wanted: bool,
    /// It could not be made ahead; when to try again.
    spare_at: Nanos,
    /// The last frame that is in the spill, in order, and its last record.
    place: Predecessor,
    /// A sync failed: after a loss of power not everything counted may be there.
    unsure: bool,
}

const SERIALS: u32 = 0xff_ffff;

impl Spill {
    /// Who seals the frames that come next, unless it is known.
    pub fn set_writer(&mut self, incarnation: IncarnationId, make: impl FnOnce() -> SpillWriter) {
        if self.write.writer.as_ref().is_none_or(|writer| writer.incarnation != incarnation) {
            self.write.writer = Some(make());
        }
    }

    /// What is known of the writer has changed.
    pub fn forget_writer(&mut self) {
        self.write.writer = None;
    }

    /// The last frame in it, in order.
    pub fn place(&self) -> Predecessor {
        self.write.place
    }

    /// A write or sync is under way.
    pub fn is_writing(&self) -> bool {
        !self.write.under_way.is_empty() || self.write.syncing.is_some()
    }

    /// Makes ready to write frame `first.0`, which begins with record `first.1` and is `len` bytes long.
    pub fn prepare<I: Io>(&mut self, io: &mut I, first: (u64, u64), len: usize) -> Prepared {
        let write = &self.write;
        if write.under_way.len() >= MAX_WRITES || write.syncing.is_some() {
            return Prepared::Wait;
        }
        let Some(incarnation) = write.writer.as_ref().map(|writer| writer.incarnation) else { return Prepared::Wait };
        if let (Some(active), Some(segment)) = (&write.active, self.segments.back())
            && !active.broken
            && segment.incarnation == incarnation
            && active.next_frame == first.0
            && active.at + len as u64 <= segment.size
        {
            return Prepared::Go;
        }
        if !write.under_way.is_empty() || write.retry_at.is_some_and(|at| io.now() < at) {
            return Prepared::Wait;
        }
        if write.active.as_ref().is_some_and(|active| !active.synced) {
            self.sync(io);
            return Prepared::Wait;
        }
        match self.create(io, incarnation, first) {
            Ok(made) => {
                self.write.retry_at = None;
                self.trouble = None;
                if made { Prepared::Go } else { Prepared::Wait }
            }
            Err(why) => {
                self.write.retry_at = Some(io.now() + RETRY);
                self.trouble = Some(why);
                Prepared::Wait
            }
        }
    }

    /// Begins a new segment; false while its file is still being made.
    fn create<I: Io>(&mut self, io: &mut I, incarnation: IncarnationId, first: (u64, u64)) -> Result<bool, String> {
        self.close_active(io);
        if self.segments.back().is_some_and(|segment| segment.last_frame == 0) {
            // Not one frame came to be in it.
            self.remove_back(io);
        }
        let file = match self.write.spare {
            Spare::Made(file) => file,
            Spare::Making(_) => {
                self.write.spare_wanted = true;
                return Ok(false);
            }
            Spare::None => {
                self.make_spare(io)?;
                self.write.spare_wanted = true;
                return Ok(false);
            }
        };
        let Some(writer) = &self.write.writer else { return Err("no writer is known".into()) };
        let number = self.next_number;
        let bytes = head(self.stream, writer, number, first, io.wall()).encode();
        let Some(mut buf) = io.pool().take(bytes.len()) else { return Err("no buffer for a head".into()) };
        buf[..bytes.len()].copy_from_slice(&bytes);
        let path = format!("{}/{}", self.config.dir, file_name(number, incarnation, first.0));
        io.rename(&self.spare_path(), &path).map_err(|errno| {
            self.faults += 1;
            self.drop_spare(io);
            format!("{path}: {errno}")
        })?;
        self.write.spare = Spare::None;
        self.next_number += 1;
        let (size, len) = (self.config.segment_bytes, bytes.len() as u64);
        let (first_frame, end) = (first.0, 0);
        self.segments.push_back(Segment { number, path, incarnation, first_frame, last_frame: 0, end, size });
        self.write.active = Some(Active { file, at: len, next_frame: first.0, synced: false, broken: false });
        // The name is durable before anything counts that is in it; so are the names gone that were removed.
        let serial = self.begin(0, 0, 0);
        io.submit(self.op(kind::WRITE, serial), Op::SyncDir { dir: self.config.dir.clone() });
        let serial = self.begin(0, 0, len);
        let part = Part { buf, at: 0, len: bytes.len() };
        io.submit(self.op(kind::WRITE, serial), Op::Write { file, offset: 0, part, durable: false });
        Ok(true)
    }

    /// Begins to make the file of the next segment.
    fn make_spare<I: Io>(&mut self, io: &mut I) -> Result<(), String> {
        let size = self.config.segment_bytes;
        if self.bytes + size > self.config.bytes {
            return Err(format!("the spill holds {} bytes and may hold {}", self.bytes, self.config.bytes));
        }
        let reserve = self.config.reserve;
        if reserve > 0 && io.free_space(&self.config.dir).is_ok_and(|free| free < reserve.saturating_add(size)) {
            return Err(format!("less than {reserve} bytes would be left free in {}", self.config.dir));
        }
        self.bytes += size;
        self.write.serial = (self.write.serial + 1) & SERIALS;
        self.write.spare = Spare::Making(self.write.serial);
        io.submit(self.op(kind::SPARE, self.write.serial), Op::Create { path: self.spare_path(), len: size });
        Ok(())
    }

    /// Takes a spare that has been made, or could not be. No room for it is no trouble before it is needed.
    pub fn spare_done<I: Io>(&mut self, io: &mut I, serial: u32, done: &Done) {
        if self.write.spare != Spare::Making(serial) {
            return close_made(io, done);
        }
        self.write.spare = match done.result {
            Ok(file) => Spare::Made(File(file as u32)),
            Err(errno) => {
                self.bytes -= self.config.segment_bytes;
                if errno == Errno::EXIST {
                    let _ = io.remove(&self.spare_path());
                }
                let again = io.now() + RETRY;
                self.write.spare_at = again;
                if self.write.spare_wanted {
                    self.write.retry_at = Some(again);
                    self.trouble = Some(format!("{}: {errno}", self.spare_path()));
                    self.faults += u64::from(errno != Errno::NOSPC);
                }
                Spare::None
            }
        };
    }

    /// The file of the next segment is being made.
    pub fn is_making(&self) -> bool {
        matches!(self.write.spare, Spare::Making(_))
    }

    /// With nothing in the spill, a spare that no frame waits for goes.
    pub(super) fn reap_spare<I: Io>(&mut self, io: &mut I) {
        let wanted = self.is_making() || std::mem::take(&mut self.write.spare_wanted);
        if self.segments.is_empty() && !wanted {
            self.drop_spare(io);
        }
    }

    /// The spare is not needed. One that is still being made is looked at again when it is.
    pub(super) fn drop_spare<I: Io>(&mut self, io: &mut I) {
        let Spare::Made(file) = self.write.spare else { return };
        self.write.spare = Spare::None;
        self.bytes -= self.config.segment_bytes;
        io.close(file);
        if let Err(errno) = io.remove(&self.spare_path()) {
            tracing::warn!(path = self.spare_path(), %errno, "a spare spill segment cannot be removed");
        }
    }

    fn begin(&mut self, number: u64, last_seq: u64, len: u64) -> u32 {
        let write = &mut self.write;
        write.serial = (write.serial + 1) & SERIALS;
        write.under_way.push_back(UnderWay { serial: write.serial, number, last_seq, len, finished: None });
        write.serial
    }

    /// Writes a frame. Only after [`Spill::prepare`] has said so of it.
    pub fn write<I: Io>(&mut self, io: &mut I, number: u64, last_seq: u64, buf: Buf, len: usize) {
        debug_assert!(len.is_multiple_of(ALIGN));
        let Some(active) = &mut self.write.active else {
            return self.write.returned.push_back(Returned { number, buf: Some(buf), written: false });
        };
        let (file, offset) = (active.file, active.at);
        active.at += len as u64;
        active.next_frame = number + 1;
        active.synced = false;
        let serial = self.begin(number, last_seq, len as u64);
        let part = Part { buf, at: 0, len };
        io.submit(self.op(kind::WRITE, serial), Op::Write { file, offset, part, durable: false });
        let half = offset + len as u64 >= self.config.segment_bytes / 2;
        if half && self.write.spare == Spare::None && io.now() >= self.write.spare_at && self.make_spare(io).is_err() {
            self.write.spare_at = io.now() + RETRY;
        }
    }

    /// Takes a completed write.
    pub fn write_done(&mut self, now: Nanos, serial: u32, done: Done) {
        let Some(write) = self.write.under_way.iter_mut().find(|write| write.serial == serial) else { return };
        if let Err(errno) = done.result {
            self.trouble = Some(format!("writing: {errno}"));
            self.faults += 1;
            self.write.retry_at = Some(now + RETRY);
        }
        write.finished = Some((done.result.is_ok(), done.part.map(|part| part.buf)));
        while self.write.under_way.front().is_some_and(|write| write.finished.is_some()) {
            let Some(write) = self.write.under_way.pop_front() else { break };
            let Some((ok, buf)) = write.finished else { break };
            let (Some(active), Some(segment)) = (&mut self.write.active, self.segments.back_mut()) else { continue };
            active.broken |= !ok;
            // What landed behind a failure does not count: nothing in front of it may be missing.
            let written = !active.broken;
            if written {
                segment.end += write.len;
            }
            if write.number > 0 {
                if written {
                    segment.last_frame = write.number;
                    self.write.place =
                        Predecessor { incarnation: segment.incarnation, frame: write.number, seq: write.last_seq };
                }
                self.write.returned.push_back(Returned { number: write.number, buf, written });
            }
        }
    }

    /// The next frame whose write has ended.
    pub fn take_returned(&mut self) -> Option<Returned> {
        self.write.returned.pop_front()
    }

    /// Makes what is in it durable; asks for that again and again. True once it is.
    ///
    /// # Errors
    /// It never will be: a sync has failed.
    pub fn make_durable<I: Io>(&mut self, io: &mut I) -> Result<bool, ()> {
        if self.write.unsure {
            return Err(());
        }
        if self.is_writing() {
            return Ok(false);
        }
        match &self.write.active {
            Some(active) if !active.synced => {
                self.sync(io);
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    fn sync<I: Io>(&mut self, io: &mut I) {
        if let Some(active) = &self.write.active
            && self.write.syncing.is_none()
        {
            let file = active.file;
            self.write.serial = (self.write.serial + 1) & SERIALS;
            self.write.syncing = Some(self.write.serial);
            io.submit(self.op(kind::SYNC, self.write.serial), Op::Sync { file });
        }
    }

    /// Takes a completed sync.
    pub fn sync_done(&mut self, serial: u32, done: &Done) {
        if self.write.syncing != Some(serial) {
            return;
        }
        self.write.syncing = None;
        if let Err(errno) = done.result {
            // What is read back is checked; but no clean stop may rest on it.
            self.trouble = Some(format!("syncing: {errno}"));
            self.faults += 1;
            self.write.unsure = true;
        }
        if let Some(active) = &mut self.write.active {
            active.synced = true;
        }
    }

    pub(super) fn close_active<I: Io>(&mut self, io: &mut I) {
        if let Some(active) = self.write.active.take() {
            io.close(active.file);
        }
        if self.segments.is_empty() {
            self.write.unsure = false;
        }
    }

    /// The room that was missing may be there.
    pub(super) fn room_made(&mut self) {
        self.write.retry_at = None;
        self.write.spare_at = 0;
    }

    /// Writes under way end unseen.
    pub(super) fn forget_writes<I: Io>(&mut self, io: &mut I) {
        self.close_active(io);
        self.write.under_way.clear();
        self.write.returned.clear();
        self.write.syncing = None;
        self.write.writer = None;
        self.write.place = Predecessor::default();
    }

    pub(super) fn set_place(&mut self, place: Predecessor) {
        self.write.place = place;
    }
}
