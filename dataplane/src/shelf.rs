//! The shelf of a view: what folding is about to overwrite of the view's point is first put there, so that a point in use
//! does not keep the journal from getting shorter.
//!
//! ```text
//! a read of a view = delta, else shelf, else journal up to its point, else image
//! fold: of the segment's records behind the point ─▶ what the point has there ─▶ shelf, durably ─▶ floor raised, image
//! written
//! ```
//! The newest complete point gets one, too, when there is no room beside it for a synchronisation (`target/keep.rs`).
//!
//! A shelf is a branch in journal format like a delta, one for each view that needs it; its first records join the view's
//! disks, so that the view can be opened again although its point lies below the floor. It is made only when room is
//! short: until then an open view just holds folding back. Everything of a segment is on the shelves, durably, before the
//! floor is raised past their points and the first byte of an image is overwritten; so after a crash either the image is
//! as it was, or the shelves have all they need.

use std::collections::VecDeque;

use afterimage_wire::ids::TimelineId;
use afterimage_wire::record::{DiskInfo, RecordKind};
use afterimage_wire::stream_state::DeltaView;
use afterimage_wire::timeline::TimelineKind;

use crate::delta::{Change, Delta};
use crate::host::{Answer, DiskKey};
use crate::index::points::{Lives, holds};
use crate::index::{Content, Cover, Points};
use crate::io::{Errno, Io, Nanos, Part};
use crate::target::ops::Ctx;
use crate::target::stream::{Stream, ViewPin};
use crate::view::ReadRequest;

/// Bytes copied at a time.
const PIECE: u64 = 256 * 1024;
/// Pieces under way.
const DEPTH: usize = 4;
/// Answers to these keys are ours: the lower bits name the stream.
const INTERNAL: u32 = 1 << 31;
/// What a shelf's name ends with: no view can be called so.
const MARK: char = '/';

/// The key under which a stream's own reads are answered.
pub(crate) fn key_of(stream: u32) -> DiskKey {
    DiskKey(INTERNAL | stream)
}

/// The stream whose own read or write this answers.
pub(crate) fn stream_of(key: DiskKey) -> Option<u32> {
    (key.0 & INTERNAL != 0).then_some(key.0 & !INTERNAL)
}

/// The view that a branch is the shelf of.
pub(crate) fn view_of(name: &str) -> Option<&str> {
    name.strip_suffix(MARK)
}

/// Name of the shelf of a view.
pub(crate) fn name_of(view: &str) -> String {
    format!("{view}{MARK}")
}

/// Name of the shelf of a point that is kept although no view shows it: its record, and its time on the source's wall
/// clock, nanoseconds since the epoch.
pub(crate) fn name_of_kept(seq: u64, wall_ns: u64) -> String {
    name_of(&format!("{MARK}{seq}.{wall_ns}"))
}

/// The point that is kept on the shelf of this name, and its time; none if that is a view's.
pub(crate) fn kept_of(name: &str) -> Option<(u64, u64)> {
    let (seq, wall_ns) = view_of(name)?.strip_prefix(MARK)?.split_once('.')?;
    Some((seq.parse().ok()?, wall_ns.parse().ok()?))
}

/// A view that holds folding back, or a point that is kept without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    /// Its name.
    pub name: String,
    /// Its point.
    pub seq: u64,
    /// What it writes is a failed-over machine's, or it is the newest complete point: it does not give way.
    pub failover: bool,
    /// It survives a restart.
    pub durable: bool,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Range {
    slot: u16,
    start: u64,
    end: u64,
    /// Reads of it that have failed.
    tries: u8,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Joins are to be written, and ranges to be listed.
    Begin,
    Copy,
    Flush,
}

/// One view being served.
#[derive(Debug)]
struct Serving {
    pin: Pin,
    shelf: u32,
    step: Step,
    ranges: VecDeque<Range>,
    /// What could not be read, and when it is looked at again.
    doubtful: Vec<(Nanos, Range)>,
}

/// What is under way for one segment.
#[derive(Debug)]
struct Round {
    uid: u64,
    left: VecDeque<Pin>,
    served: Vec<Pin>,
    serving: Option<Serving>,
    /// Reads of views that began before everything was on the shelves may look for it in the image still.
    barrier: Option<u64>,
}

/// Reads of a block that fail one after the other before it is left alone for a while.
const TRIES: u8 = 3;
/// How often it is looked at again then, before it counts as unknown: a disk that gives nothing for a while has lost
/// nothing, and what is not copied now is overwritten.
const LOOKS: u8 = 4;
/// From the last of these reads until the first look; twice as long before each further one.
const FIRST_LOOK: Nanos = 1_000_000_000;
/// A stretch that cannot be read at once is read in blocks of this many bytes.
const BLOCK: u64 = 4096;

/// Copying of a stream; part of its folding.
#[derive(Debug, Default)]
pub(crate) struct Shelving {
    round: Option<Round>,
    /// Operations under way, by cookie: what was read, or nothing for what is written.
    under_way: Vec<(u64, Option<Range>)>,
    next_cookie: u64,
    /// Reads that the owner is to begin.
    pub reads: Vec<ReadRequest>,
    /// Their answers, and those of writes to shelves.
    pub answers: Vec<Answer>,
    failed: Option<Errno>,
    cover: Cover,
}

/// How it stands with the segment that is to be folded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shelved {
    /// Not yet.
    Waiting,
    /// Not before then: what cannot be read is looked at again.
    Until(Nanos),
    /// Nothing of it is needed by any view any more.
    Done,
    /// It cannot be copied for this view.
    Failed(Pin, Errno),
}

impl Shelving {
    /// Something of an attempt is under way.
    pub fn is_busy(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Gives everything up: a shelf is gone, or the folding.
    pub fn abandon(&mut self) {
        self.round = None;
        self.under_way.clear();
        self.reads.clear();
        self.answers.clear();
        self.failed = None;
    }

    fn cookie(&mut self, range: Option<Range>) -> u64 {
        self.next_cookie += 1;
        self.under_way.push((self.next_cookie, range));
        self.next_cookie
    }
}

/// The disks of a pinned point that is not below the floor yet.
fn lives_of(points: &Points, pin: &Pin) -> Lives {
    let mut lives = points.at(pin.seq);
    if kept_of(&name_of(&pin.name)).is_some() {
        lives.retain(|_, life| holds(life));
    }
    lives
}

impl Stream {
    /// Views whose point lies before record `last`.
    pub(crate) fn pinned_below(&self, last: u64) -> Vec<Pin> {
        let mut pins = self.kept_pins();
        let kept: Vec<u64> = pins.iter().map(|pin| pin.seq).collect();
        // A view of a point that is kept needs no shelf of its own.
        let shares = |name: &str, seq: u64| kept.contains(&seq) && self.shelf(name).is_none();
        let deltas = self.history.state().views.iter();
        let deltas = deltas.filter(|view| !view.removing && view_of(&view.name).is_none());
        let durable = deltas.filter(|view| !shares(&view.name, view.seq)).map(|view| {
            let failover = view.kind == TimelineKind::Failover;
            Pin { name: view.name.clone(), seq: view.seq, failover, durable: true }
        });
        pins.extend(durable);
        pins.retain(|pin| pin.seq < last);
        for open in self.view_pins.iter().filter(|open| open.seq < last && !shares(&open.name, open.seq)) {
            if !pins.iter().any(|pin| pin.name == open.name) {
                pins.push(Pin { name: open.name.clone(), seq: open.seq, failover: false, durable: false });
            }
        }
        pins
    }

    /// The shelf of a view, by the view's name.
    pub(crate) fn shelf(&self, view: &str) -> Option<&Delta> {
        self.deltas.iter().find(|delta| view_of(&delta.view.name) == Some(view))
    }

    /// Brings what views need of segment `uid`, which ends with record `last`, onto their shelves. `image_reads` says
    /// which is the number of the next read of an image, and whether one before a number is under way.
    pub(crate) fn shelve<I: Io>(
        &mut self,
        ctx: &mut Ctx<'_, I>,
        (uid, last): (u64, u64),
        next_id: &mut u32,
        image_reads: (u64, impl Fn(u64) -> bool),
    ) -> Shelved {
        self.take_answers(ctx.io.now());
        let mut round = match self.shelving.round.take() {
            Some(round) if round.uid == uid => round,
            _ if self.shelving.is_busy() => return Shelved::Waiting,
            _ => Round { uid, left: VecDeque::new(), served: Vec::new(), serving: None, barrier: None },
        };
        loop {
            if let Some(errno) = self.shelving.failed {
                if self.shelving.is_busy() {
                    self.shelving.round = Some(round);
                    return Shelved::Waiting;
                }
                self.shelving.failed = None;
                match round.serving.take() {
                    Some(serving) => return Shelved::Failed(serving.pin, errno),
                    None => continue,
                }
            }
            if let Some(mut serving) = round.serving.take() {
                match self.serve(ctx, uid, &mut serving) {
                    Ok(true) => round.served.push(serving.pin),
                    Err(errno) => {
                        self.shelving.failed = Some(errno);
                        round.serving = Some(serving);
                    }
                    Ok(false) => {
                        let idle = !self.shelving.is_busy() && serving.ranges.is_empty();
                        let next = serving.doubtful.iter().map(|(at, _)| *at).min().filter(|_| idle);
                        round.serving = Some(serving);
                        self.shelving.round = Some(round);
                        return next.map_or(Shelved::Waiting, Shelved::Until);
                    }
                }
                continue;
            }
            let Some(pin) = round.left.pop_front() else {
                // Views may have been opened meanwhile.
                round.left = self.pinned_below(last).into_iter().filter(|pin| !round.served.contains(pin)).collect();
                if !round.left.is_empty() {
                    round.barrier = None;
                    continue;
                }
                let barrier = *round.barrier.get_or_insert(image_reads.0);
                if image_reads.1(barrier) {
                    self.shelving.round = Some(round);
                    return Shelved::Waiting;
                }
                return Shelved::Done;
            };
            if !self.pinned_below(last).contains(&pin) {
                continue;
            }
            let made = match self.shelf(&pin.name) {
                Some(shelf) if shelf.failed.is_some() => Err(Errno::IO),
                Some(shelf) => Ok(shelf.id),
                None => self.make_shelf(ctx, next_id, &pin),
            };
            match made {
                Ok(shelf) => {
                    let (step, ranges, doubtful) = (Step::Begin, VecDeque::new(), Vec::new());
                    round.serving = Some(Serving { pin, shelf, step, ranges, doubtful });
                }
                Err(errno) => return Shelved::Failed(pin, errno),
            }
        }
    }

    /// An empty shelf that knows the disks of the point.
    fn make_shelf<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, next_id: &mut u32, pin: &Pin) -> Result<u32, Errno> {
        let infos: Vec<DiskInfo> = lives_of(&self.points, pin).into_values().map(|life| life.info).collect();
        let mut timeline = [0; 16];
        ctx.io.random(&mut timeline);
        let view = DeltaView {
            timeline: TimelineId(timeline),
            seq: pin.seq,
            kind: TimelineKind::View,
            removing: !pin.durable,
            name: name_of(&pin.name),
            disks: infos.iter().map(|info| info.id).collect(),
        };
        self.history.add_delta(ctx.io, view.clone(), "what folding overwrites of a view's point").map_err(|error| {
            tracing::error!(stream = %self.config.stream, %error, "a view's point cannot be kept");
            if let crate::target::TargetError::Storage { errno, .. } = error { errno } else { Errno::NOSPC }
        })?;
        let id = *next_id;
        *next_id += 1;
        let shelf = self.new_delta(id, view);
        self.deltas.push(shelf);
        let kept = kept_of(&name_of(&pin.name)).is_some();
        let shows = |open: &&mut ViewPin| open.name == pin.name || kept && open.seq == pin.seq && open.shelf.is_none();
        self.view_pins.iter_mut().filter(shows).for_each(|open| open.shelf = Some(id));
        tracing::info!(stream = %self.config.stream, view = pin.name, seq = pin.seq, "history is folded under an open view");
        Ok(id)
    }

    /// Goes on for one view; true when everything that it needs of the segment is on its shelf, durably, or it is gone.
    fn serve<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, uid: u64, serving: &mut Serving) -> Result<bool, Errno> {
        let (key, stream) = (key_of(self.id), self.id);
        if serving.step == Step::Begin {
            self.join(ctx, serving)?;
            serving.ranges = self.ranges(uid, &serving.pin, serving.shelf);
            serving.step = Step::Copy;
        }
        let Some(shelf) = self.deltas.iter_mut().find(|delta| delta.id == serving.shelf) else { return Ok(true) };
        if serving.step == Step::Copy {
            let now = ctx.io.now();
            let due = serving.doubtful.extract_if(.., |(at, _)| *at <= now);
            serving.ranges.extend(due.map(|(_, range)| range));
            while self.shelving.under_way.len() < DEPTH
                && let Some(range) = serving.ranges.pop_front()
            {
                let cookie = self.shelving.cookie(Some(range));
                self.shelving.reads.push(ReadRequest {
                    key,
                    cookie,
                    slot: range.slot,
                    seq: serving.pin.seq,
                    delta: None,
                    view: None,
                    shelf: Some(serving.shelf),
                    stream,
                    offset: range.start,
                    len: (range.end - range.start) as usize,
                });
            }
            if self.shelving.is_busy() || !serving.ranges.is_empty() || !serving.doubtful.is_empty() {
                return Ok(false);
            }
            let cookie = self.shelving.cookie(None);
            shelf.flush(key, cookie);
            serving.step = Step::Flush;
        }
        Ok(!self.shelving.is_busy())
    }

    /// The first records of a shelf name the disks of the point. Without them nothing may be folded past it: nobody would
    /// know what there is to be kept.
    fn join<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, serving: &Serving) -> Result<(), Errno> {
        let Some(shelf) = self.deltas.iter_mut().find(|delta| delta.id == serving.shelf) else { return Ok(()) };
        let known = shelf.points.now();
        if serving.pin.seq < self.points.floor() {
            return if known.is_empty() { Err(Errno::IO) } else { Ok(()) };
        }
        let lives = lives_of(&self.points, &serving.pin);
        if lives.keys().all(|slot| known.contains_key(slot)) {
            return Ok(());
        }
        for life in lives.into_values() {
            let mut bytes = Vec::new();
            life.info.encode(&mut bytes);
            let mut buf = ctx.io.pool().take(bytes.len()).ok_or(Errno::NOMEM)?;
            buf[..bytes.len()].copy_from_slice(&bytes);
            let (slot, key, cookie) = (life.info.slot, key_of(self.id), self.shelving.cookie(None));
            let data = Some(Part { buf, at: 0, len: bytes.len() });
            shelf.change(Change { slot, key, cookie, kind: RecordKind::Join, offset: 0, len: 0, data, fua: false });
        }
        Ok(())
    }

    /// What the segment's records behind the pinned point overwrite, and the shelf does not hold yet.
    fn ranges(&mut self, uid: u64, pin: &Pin, shelf: u32) -> VecDeque<Range> {
        let mut found = VecDeque::new();
        let (Some(segment), Some(shelf)) =
            (self.journal.segment(uid), self.deltas.iter().find(|delta| delta.id == shelf))
        else {
            return found;
        };
        let lives =
            if pin.seq < self.points.floor() { shelf.points.now().clone() } else { lives_of(&self.points, pin) };
        let first = segment.index.first_seq();
        let behind = segment.index.entries().filter(|entry| first + u64::from(entry.seq_delta) > pin.seq);
        let mut ranges: Vec<Range> = behind
            .filter_map(|entry| {
                let size = lives.get(&entry.disk)?.info.size;
                let range = Range { slot: entry.disk, start: entry.start, end: entry.end().min(size), tries: 0 };
                (range.start < range.end).then_some(range)
            })
            .collect();
        ranges.sort_unstable_by_key(|range| (range.slot, range.start));
        ranges.dedup_by(|next, last| {
            let joins = next.slot == last.slot && next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        for range in ranges {
            self.shelving.cover.start(range.start, range.end);
            shelf.journal.cover(&mut self.shelving.cover, range.slot, u64::MAX);
            for piece in self.shelving.cover.finish().iter().filter(|piece| piece.content == Content::Below) {
                let (mut start, end) = (piece.offset, piece.offset + piece.len);
                while start < end {
                    let until = ((start / PIECE + 1) * PIECE).min(end);
                    found.push_back(Range { start, end: until, ..range });
                    start = until;
                }
            }
        }
        found
    }

    /// The range is known to be unreadable at the point: by the source, or because what held it was looked at again and
    /// again. No look of ours would change that.
    fn is_known_lost(&mut self, range: &Range, seq: u64) -> bool {
        let cover = &mut self.shelving.cover;
        cover.start(range.start, range.end);
        self.journal.cover(cover, range.slot, seq);
        let below = &self.history.state().unreadable;
        let settled = self.scrub.has_settled();
        cover.finish().iter().any(|piece| match piece.content {
            Content::Unreadable => settled,
            Content::Below => below.iter().any(|lost| {
                let (start, end) = (lost.offset, lost.offset + lost.len);
                lost.slot == range.slot && start < piece.offset + piece.len && piece.offset < end
            }),
            _ => false,
        })
    }

    /// What was read goes to the shelf.
    fn take_answers(&mut self, now: Nanos) {
        for answer in std::mem::take(&mut self.shelving.answers) {
            let Some(at) = self.shelving.under_way.iter().position(|(cookie, _)| *cookie == answer.cookie) else {
                continue;
            };
            let (_, range) = self.shelving.under_way.swap_remove(at);
            let Some(range) = range else {
                if let Err(errno) = answer.result {
                    self.shelving.failed = Some(errno);
                }
                continue;
            };
            let serving = self.shelving.round.as_ref().and_then(|round| round.serving.as_ref());
            let Some(seq) = serving.map(|serving| serving.pin.seq) else { continue };
            let may_look = (TRIES..TRIES + LOOKS).contains(&range.tries);
            let look = may_look && answer.result.is_err() && !self.is_known_lost(&range, seq);
            let Some(serving) = self.shelving.round.as_mut().and_then(|round| round.serving.as_mut()) else { continue };
            let (kind, data) = match answer.result {
                Ok(Some(part)) if part.buf[part.at..part.at + part.len].iter().any(|byte| *byte != 0) => {
                    (RecordKind::Write, Some(part))
                }
                Ok(_) => (RecordKind::Zero, None),
                Err(_) if range.tries < TRIES => {
                    // Once more, and no more than what cannot be read is given up.
                    let mut start = range.start;
                    while start < range.end {
                        let end = ((start / BLOCK + 1) * BLOCK).min(range.end);
                        serving.ranges.push_back(Range { start, end, tries: range.tries + 1, ..range });
                        start = end;
                    }
                    continue;
                }
                Err(_) if look => {
                    let at = now + (FIRST_LOOK << (range.tries - TRIES));
                    serving.doubtful.push((at, Range { tries: range.tries + 1, ..range }));
                    continue;
                }
                Err(errno) => {
                    let (view, slot, offset) = (&serving.pin.name, range.slot, range.start);
                    tracing::error!(stream = %self.config.stream, view, slot, offset, %errno, "a block of a view is lost");
                    (RecordKind::Unreadable, None)
                }
            };
            let Some(shelf) = self.deltas.iter_mut().find(|delta| delta.id == serving.shelf) else { continue };
            let cookie = self.shelving.cookie(None);
            let (offset, len) = (range.start, range.end - range.start);
            shelf.change(Change {
                slot: range.slot,
                key: key_of(self.id),
                cookie,
                kind,
                offset,
                len,
                data,
                fua: false,
            });
        }
    }
}
