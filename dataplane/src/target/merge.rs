//! Merging: what a stream holds beside the disk that it began with is written into that disk.
//!
//! A stream over a base is never folded: its records stay in the journal, and the base is as it was found. When the disk is
//! to be used again at a place of the stream, everything that differs there is read as a view of the place would be, and
//! written to it, whole blocks of 4 KiB at a time; then the base is synced. The journal stays, and lies over the base as
//! before, so a crash anywhere is repaired by doing all of it again.

use super::Target;
use super::config::{Choice, TargetError};
use super::images::Image;
use super::ops::{Ctx, Purpose};
use super::status::MergeStatus;
use super::stream::Stream;
use crate::host::{Answer, DiskKey};
use crate::index::{Content, Cover};
use crate::io::{Done, Errno, Io, Op};
use crate::view::{ReadRequest, Reads};
use afterimage_wire::ALIGN;
use afterimage_wire::ids::{DiskId, StreamId};

/// How far is looked at a time, and the longest piece, bytes.
const WINDOW: u64 = 512 * 1024;
/// Pieces under way.
const DEPTH: usize = 8;
/// Windows looked at in one turn.
const WINDOWS_PER_TURN: usize = 256;
/// Keys of reads with these upper two bits are a merge's; see [`crate::compare`].
const KEYS: u32 = 3 << 30;

/// The stream that a read is for, if it is a merge's.
pub(crate) fn stream_of(key: DiskKey) -> Option<u32> {
    (key.0 & KEYS == KEYS).then_some(key.0 & !KEYS)
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Piece {
    slot: u16,
    offset: u64,
    len: u64,
    /// Nothing but zeros.
    zero: bool,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Step {
    Walk,
    Sync,
    Over,
}

/// A stream being merged.
#[derive(Debug)]
pub(crate) struct Merge {
    seq: u64,
    /// Slot and size of each disk.
    disks: Vec<(u16, u64)>,
    /// Which disk, and how far in it.
    at: (usize, u64),
    step: Step,
    under: Vec<(u64, Piece)>,
    next_cookie: u64,
    syncs: usize,
    /// Written, bytes.
    written: u64,
    failed: Option<String>,
    answers: Vec<Answer>,
    cover: Cover,
}

impl Merge {
    fn new(seq: u64, disks: Vec<(u16, u64)>) -> Self {
        Self {
            seq,
            disks,
            at: (0, 0),
            step: Step::Walk,
            under: Vec::new(),
            next_cookie: 0,
            syncs: 0,
            written: 0,
            failed: None,
            answers: Vec::new(),
            cover: Cover::default(),
        }
    }

    fn is_quiet(&self) -> bool {
        self.under.is_empty() && self.syncs == 0
    }

    fn status(&self) -> MergeStatus {
        let before = self.disks[..self.at.0].iter().map(|(_, size)| size).sum::<u64>();
        MergeStatus {
            complete: self.step == Step::Over,
            done: before + self.at.1,
            total: self.disks.iter().map(|(_, size)| size).sum(),
            written: self.written,
        }
    }

    /// A read of the merge has been answered.
    pub fn answer(&mut self, answer: Answer) {
        self.answers.push(answer);
    }

    fn fail(&mut self, piece: &Piece, what: &str, errno: Errno) {
        let why = format!("{what} {} bytes at {} of the disk in slot {}: {errno}", piece.len, piece.offset, piece.slot);
        self.failed.get_or_insert(why);
    }
}

/// Nothing of the base below this image may be written outside whole blocks of it.
fn whole_blocks(start: u64, end: u64, size: u64) -> (u64, u64) {
    let align = ALIGN as u64;
    (start - start % align, end.next_multiple_of(align).min(size))
}

impl Stream {
    /// What of the next window is to be written, if anything.
    fn next_piece(&self, merge: &mut Merge) -> Option<Result<Piece, String>> {
        let (slot, size) = *merge.disks.get(merge.at.0)?;
        let start = merge.at.1;
        let end = (start - start % WINDOW + WINDOW).min(size);
        merge.at.1 = end;
        if end == size {
            merge.at = (merge.at.0 + 1, 0);
        }
        merge.cover.start(start, end);
        self.journal.cover(&mut merge.cover, slot, merge.seq);
        let held = merge.cover.finish().iter().filter(|piece| !matches!(piece.content, Content::Below));
        let (mut from, mut to, mut zero, mut bytes) = (u64::MAX, 0, true, 0);
        for piece in held {
            if matches!(piece.content, Content::Unreadable) {
                let why = format!("{} bytes at {} of the disk in slot {slot} are lost", piece.len, piece.offset);
                return Some(Err(why));
            }
            (from, to) = (from.min(piece.offset), to.max(piece.offset + piece.len));
            zero &= matches!(piece.content, Content::Zero);
            bytes += piece.len;
        }
        if bytes == 0 {
            return Some(Ok(Piece { slot, offset: start, len: 0, zero: false }));
        }
        let (offset, end) = whole_blocks(from, to, size);
        // Zeros in one stretch of whole blocks.
        let zero = zero && bytes == end - offset;
        Some(Ok(Piece { slot, offset, len: end - offset, zero }))
    }

    /// Goes on with merging. True if there is more to do without a completion.
    pub(crate) fn merge_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, reads: &mut Reads) -> bool {
        let Some(mut merge) = self.merge.take() else { return false };
        for Answer { cookie, result } in std::mem::take(&mut merge.answers) {
            let Some(at) = merge.under.iter().position(|(under, _)| *under == cookie) else { continue };
            let piece = merge.under[at].1;
            let image = self.images.get(&piece.slot).copied();
            match (result, image) {
                (Ok(Some(part)), Some(image)) if merge.failed.is_none() => {
                    let (file, offset) = (image.file, piece.offset);
                    ctx.submit(Purpose::Merge(self.id, cookie), Op::Write { file, offset, part, durable: false });
                }
                (result, _) => {
                    merge.under.swap_remove(at);
                    merge.fail(&piece, "reading", result.err().unwrap_or(Errno::IO));
                }
            }
        }
        let mut looked = 0;
        while merge.step == Step::Walk
            && merge.failed.is_none()
            && merge.under.len() < DEPTH
            && looked < WINDOWS_PER_TURN
        {
            looked += 1;
            match self.next_piece(&mut merge) {
                None => merge.step = Step::Sync,
                Some(Err(why)) => merge.failed = Some(why),
                Some(Ok(piece)) if piece.len > 0 => self.begin_piece(ctx, reads, &mut merge, piece),
                Some(Ok(_)) => {}
            }
        }
        if merge.step == Step::Sync && merge.failed.is_none() && merge.is_quiet() {
            // Under way in one go: it is quiet again only when the last one has ended.
            for image in self.images.values() {
                merge.syncs += 1;
                ctx.submit(Purpose::MergeSync(self.id), Op::Sync { file: image.file });
            }
        }
        let more = merge.step == Step::Walk && merge.failed.is_none() && merge.under.len() < DEPTH;
        self.merge = Some(merge);
        more
    }

    fn begin_piece<I: Io>(&self, ctx: &mut Ctx<'_, I>, reads: &mut Reads, merge: &mut Merge, piece: Piece) {
        let cookie = merge.next_cookie;
        merge.next_cookie += 1;
        merge.under.push((cookie, piece));
        let image: Option<Image> = self.images.get(&piece.slot).copied();
        if let Some(image) = image.filter(|image| piece.zero && image.unmap) {
            let op = Op::Zero { file: image.file, offset: piece.offset, len: piece.len, unmap: true };
            return ctx.submit(Purpose::Merge(self.id, cookie), op);
        }
        reads.ask(self.merge_read(merge.seq, cookie, &piece));
    }

    fn merge_read(&self, seq: u64, cookie: u64, piece: &Piece) -> ReadRequest {
        ReadRequest {
            key: DiskKey(KEYS | self.id),
            cookie,
            slot: piece.slot,
            seq,
            delta: None,
            view: None,
            shelf: None,
            stream: self.id,
            offset: piece.offset,
            len: piece.len as usize,
        }
    }

    /// A piece has been written, or not.
    pub(crate) fn merge_done(&mut self, reads: &mut Reads, cookie: u64, done: &Done) {
        let Some(mut merge) = self.merge.take() else { return };
        if let Some(at) = merge.under.iter().position(|(under, _)| *under == cookie) {
            let piece = merge.under[at].1;
            match done.result {
                Ok(_) => {
                    merge.written += piece.len;
                    merge.under.swap_remove(at);
                }
                // What cannot be given back is written.
                Err(Errno::OPNOTSUPP) if piece.zero => {
                    merge.under[at].1.zero = false;
                    if let Some(image) = self.images.get_mut(&piece.slot) {
                        image.unmap = false;
                    }
                    reads.ask(self.merge_read(merge.seq, cookie, &piece));
                }
                Err(errno) => {
                    merge.under.swap_remove(at);
                    merge.fail(&piece, "writing", errno);
                }
            }
        }
        self.merge = Some(merge);
    }

    /// A base has been synced, or not.
    pub(crate) fn merge_synced(&mut self, done: &Done) {
        let Some(merge) = &mut self.merge else { return };
        merge.syncs -= 1;
        if let Err(errno) = done.result {
            merge.failed.get_or_insert(format!("syncing a disk: {errno}"));
        }
        if merge.is_quiet() && merge.failed.is_none() {
            merge.step = Step::Over;
        }
    }
}

impl<I: Io> Target<I> {
    /// Names the files or devices that the replicas of a stream's disks are, in their place. To be said before
    /// [`Target::open_stream`]. Nothing is folded into them: see [`Target::merge`].
    pub fn base(&mut self, stream: StreamId, bases: impl IntoIterator<Item = (DiskId, String)>) {
        self.bases.insert(stream, bases.into_iter().collect());
    }

    /// Begins to write everything that the stream holds up to `seq` into its bases, or says how far that is.
    ///
    /// # Errors
    /// It is no point, or a damaged one; the stream has no bases; somebody writes to it or has a view of it open. A merge
    /// that has failed says why, once; asked again, it begins anew.
    pub fn merge(&mut self, stream: StreamId, seq: u64) -> Result<MergeStatus, TargetError> {
        self.settle(stream);
        let id = self.ready(stream)?.id;
        let viewed = self.views.iter().any(|view| view.stream == id);
        let open = self.ready(stream)?;
        let refused = |why: &str| Err(TargetError::Unmergeable { stream, why: why.to_owned() });
        if open.bases.is_empty() {
            return refused("it has no disks of its own to be merged into");
        }
        if let Some(merge) = open.merge.as_mut().filter(|merge| merge.seq == seq) {
            if merge.failed.is_none() {
                return Ok(merge.status());
            }
            if !merge.is_quiet() {
                return refused("a failed merge has not ended yet");
            }
            let why = merge.failed.take().unwrap_or_default();
            open.merge = None;
            return refused(&why);
        }
        if open.merge.as_ref().is_some_and(|merge| !merge.is_quiet()) {
            return refused("it is being merged up to another record");
        }
        if open.connection.is_some() {
            return refused("a source is connected");
        }
        if viewed {
            return refused("a view of it is open");
        }
        let point = open.choose(Choice::Seq(seq))?;
        if point.seq < open.points.floor() {
            return refused("what is kept of it lies on a shelf");
        }
        if let Some(damage) = point.damage {
            return refused(&damage);
        }
        let lives = open.points.at(seq);
        let disks = lives.values().filter(|life| life.member);
        let disks: Vec<_> = disks.map(|life| (life.info.slot, life.info.size)).collect();
        let fits = |(slot, size): &(u16, u64)| open.images.get(slot).is_some_and(|image| image.size >= *size);
        if !disks.iter().all(fits) {
            return refused("a disk of it has grown beyond what it began with");
        }
        tracing::info!(%stream, seq, "what the stream holds is written into its disks");
        let merge = Merge::new(seq, disks);
        let status = merge.status();
        open.merge = Some(merge);
        self.more = true;
        Ok(status)
    }
}
