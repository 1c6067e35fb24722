//! What cannot be read any more, and what that means: which points and blocks need it, until newer data has taken its
//! place.
//!
//! Two kinds. Of a frame that was in the index when it was found to be bad, every record is known: exactly the points
//! that need the lost bytes are damaged, reads of those bytes fail, everything else stays good; and the list is kept
//! beside the journal ([`afterimage_wire::damage`]), so that a restart knows as much. Of a frame that was never seen
//! whole, nothing is known but its place: points behind it hold no disk until a whole synchronisation has been made
//! ([`crate::index::Points::damage`]), begun after the loss was found: one before that compared blocks while they could
//! still be read, and did not send them. So where a loss was found is kept as well, and a restart that finds it again
//! does not take it for a new one.

use afterimage_wire::damage::{DamageFile, LostFrame, LostStretch, MAX_LOST_FRAMES, MAX_LOST_STRETCHES};
use afterimage_wire::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use afterimage_wire::record::RecordKind;
use afterimage_wire::stream_state::UnreadableRange;

use crate::index::points::Lives;
use crate::index::{Content, Cover};
use crate::io::{Errno, Io};
use crate::journal::Journal;
use crate::target::{Damage, LostBlocks};

/// Ranges of one loss that are kept one by one; beyond it neighbours are joined (more is called lost than is).
const MAX_BLOCKS: usize = 1024;
/// Ranges that a text names.
const NAMED: usize = 4;

#[derive(Debug)]
struct Item {
    damage: Damage,
    /// Branch that it is in.
    timeline: TimelineId,
    /// As it is kept on disk.
    frame: Option<LostFrame>,
}

/// The bottom of a stream: below it there is only the image, of which these ranges are unknown.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Bottom<'a> {
    pub floor: u64,
    pub unreadable: &'a [UnreadableRange],
}

impl Bottom<'_> {
    fn is_good(&self, slot: u16, offset: u64, len: u64) -> bool {
        let hits = |range: &&UnreadableRange| {
            range.slot == slot && range.offset < offset + len && offset < range.offset + range.len
        };
        self.unreadable.iter().find(hits).is_none()
    }
}

/// The losses of a stream.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    items: Vec<Item>,
    path: String,
    stream: StreamId,
    /// The branch whose points are concerned; losses in others are those of views.
    timeline: TimelineId,
    /// Read back after a start: what the journals are to be read with.
    known: Known,
    /// What is on disk is older.
    dirty: bool,
}

/// What a journal is read back with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    frames: Vec<LostFrame>,
    stretches: Vec<LostStretch>,
}

impl Known {
    /// The frame of this branch, if its loss is known.
    pub fn frame(&self, timeline: TimelineId, incarnation: IncarnationId, number: u64) -> Option<&LostFrame> {
        self.frames.iter().find(|frame| {
            let header = &frame.header;
            (frame.timeline, header.incarnation, header.number.get()) == (timeline, incarnation, number)
        })
    }

    /// The loss that this one is all or a part of, found first.
    pub fn stretch(&self, timeline: TimelineId, damage: &Damage) -> Option<&LostStretch> {
        let covers = |known: &&LostStretch| {
            let whole_segment = known.last_frame == u64::MAX;
            let frames = known.incarnation == damage.incarnation
                && known.first_frame <= damage.first_frame
                && damage.last_frame <= known.last_frame;
            (known.timeline, known.segment) == (timeline, damage.segment)
                && known.first_seq <= damage.first_seq
                && (whole_segment || frames)
        };
        self.stretches.iter().filter(covers).min_by_key(|known| known.found_at)
    }
}

impl Ledger {
    /// Reads what was kept in this folder. A list that is itself damaged counts for nothing: what it says is found again.
    ///
    /// # Errors
    /// The file system.
    pub fn open<I: Io>(io: &mut I, dir: &str, stream: StreamId, timeline: TimelineId) -> Result<Self, Errno> {
        let path = format!("{dir}/damage");
        let known = match io.read_small(&path) {
            Err(Errno::NOENT) => Known::default(),
            Err(errno) => return Err(errno),
            Ok(bytes) => match DamageFile::decode(&bytes) {
                Ok(file) if file.stream == stream => Known { frames: file.frames, stretches: file.stretches },
                Ok(_) => Known::default(),
                Err(error) => {
                    tracing::warn!(path, %error, "the damage list cannot be used");
                    Known::default()
                }
            },
        };
        Ok(Self { items: Vec::new(), path, stream, timeline, known, dirty: false })
    }

    /// What was known when the stream was opened.
    pub fn known(&self) -> Known {
        self.known.clone()
    }

    /// What is known by now.
    pub fn now_known(&self) -> Known {
        Known { frames: self.items.iter().filter_map(|item| item.frame.clone()).collect(), stretches: self.stretches() }
    }

    fn stretches(&self) -> Vec<LostStretch> {
        let unknown = self.of_stream().filter(|damage| !damage.known).take(MAX_LOST_STRETCHES);
        let stretch = |damage: &Damage| LostStretch {
            timeline: self.timeline,
            incarnation: damage.incarnation,
            segment: damage.segment,
            first_frame: damage.first_frame,
            last_frame: damage.last_frame,
            first_seq: damage.first_seq,
            found_at: damage.found_at,
        };
        unknown.map(stretch).collect()
    }

    /// Losses that concern the state at the floor: from which record on, and where they were found
    /// ([`crate::index::Points::doubt`]).
    pub fn doubts(&self, floor: u64) -> impl Iterator<Item = (u64, u64)> {
        let before = self.known.stretches.iter().filter(|known| known.timeline == self.timeline);
        let before = before.map(|known| (known.first_seq, known.found_at));
        let now = self.of_stream().filter(|damage| !damage.known).map(|damage| (damage.first_seq, damage.found_at));
        before.chain(now).filter(move |(first_seq, found_at)| *first_seq <= floor && *found_at > floor)
    }

    /// Losses, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Damage> {
        self.items.iter().map(|item| &item.damage)
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// There is something to look at, or to write down.
    pub fn wants_review(&self) -> bool {
        self.dirty || !self.items.is_empty()
    }

    /// Takes a loss whose records nobody knows. With too many of a branch, the last takes in what is new.
    pub fn add(&mut self, timeline: TimelineId, damage: Damage) {
        self.dirty = true;
        let place = |damage: &Damage| (damage.segment, damage.incarnation, damage.first_frame, damage.last_frame);
        let unknown = |item: &&mut Item| item.timeline == timeline && !item.damage.known;
        if let Some(item) = self.items.iter_mut().filter(unknown).find(|item| place(&item.damage) == place(&damage)) {
            item.damage = damage;
        } else if self.items.iter_mut().filter(unknown).count() < MAX_LOST_STRETCHES {
            self.items.push(Item { damage, timeline, frame: None });
        } else if let Some(last) = self.items.iter_mut().filter(unknown).last() {
            last.damage.first_seq = last.damage.first_seq.min(damage.first_seq);
            last.damage.found_at = last.damage.found_at.max(damage.found_at);
        }
    }

    /// As [`Ledger::add`], unless the same is there already; true if it was not.
    pub fn add_once(&mut self, timeline: TimelineId, damage: Damage) -> bool {
        let is_new = !self.items.iter().any(|item| item.timeline == timeline && item.damage == damage);
        if is_new {
            self.add(timeline, damage);
        }
        is_new
    }

    /// Losses that were known before this start and are not in the journal any more, because they have been folded: they
    /// count as long as they concern something.
    pub fn restore_folded(&mut self, floor: u64, now: &Lives) {
        let owed = owes_whole(now);
        for known in std::mem::take(&mut self.known.stretches) {
            let ours = known.timeline == self.timeline && known.first_seq <= floor && (known.found_at > floor || owed);
            let found_again = self.of_stream().any(|damage| !damage.known && damage.segment == known.segment);
            if ours && !found_again {
                let (segment, first, frames) = (known.segment, known.first_seq, (known.first_frame, known.last_frame));
                let what = format!("records from {first} on were lost with segment {segment}, which has been folded");
                let damage = Damage::unknown(segment, known.incarnation, frames, first, known.found_at, what);
                self.add(known.timeline, damage);
            }
        }
    }

    /// The losses that were known before this start count on: those that the journal was read with, and those that have
    /// been folded since.
    pub fn restore(&mut self, journal: &Journal, used: &[(IncarnationId, u64)], disk_of: impl Fn(u16) -> DiskId) {
        let first = journal.segments.front().map_or(u64::MAX, |segment| segment.number);
        let ours = |frame: &LostFrame| frame.timeline == journal.config.timeline;
        for frame in self.known.frames.clone().into_iter().filter(ours) {
            let folded = frame.segment < first;
            if folded || used.contains(&(frame.header.incarnation, frame.header.number.get())) {
                self.add_frame(frame, &disk_of, "it was found to be damaged before");
            }
        }
        self.known.frames.retain(|frame| !ours(frame));
    }

    /// The branch's journal has been read again: what was lost unseen above the floor has been found again.
    pub fn forget_unknown(&mut self, timeline: TimelineId, floor: u64) {
        self.dirty = true;
        self.items.retain(|item| item.timeline != timeline || item.damage.known || item.damage.first_seq <= floor);
    }

    /// The branch is gone.
    pub fn forget_branch(&mut self, timeline: TimelineId) {
        self.dirty = true;
        self.items.retain(|item| item.timeline != timeline);
    }

    /// Takes a frame with lost chunks; returns what is to be told of it.
    pub fn add_frame(&mut self, frame: LostFrame, disk_of: &impl Fn(u16) -> DiskId, why: &str) -> Damage {
        let number = frame.header.number.get();
        self.dirty = true;
        self.items.retain(|item| !item.frame.as_ref().is_some_and(|known| same(known, &frame)));
        let damage = Damage {
            segment: frame.segment,
            incarnation: frame.header.incarnation,
            first_frame: number,
            last_frame: number,
            first_seq: frame.records.first().map_or(frame.header.first_seq.get(), |(record, _)| record.seq),
            found_at: frame.header.last_seq.get(),
            what: format!("frame {number} of segment {}: {why}", frame.segment),
            blocks: blocks_of(&frame, disk_of),
            known: true,
        };
        if self.items.iter().filter(|item| item.frame.is_some()).count() < MAX_LOST_FRAMES {
            self.items.push(Item { damage: damage.clone(), timeline: frame.timeline, frame: Some(frame) });
        } else {
            // Reads of what it held fail; after a restart it is found with nothing known of it.
            tracing::error!(what = damage.what, "too many losses: this one is not remembered by its blocks");
        }
        damage
    }

    /// A frame of which chunks were lost can be read again; what was said of it, if something was.
    pub fn regain(&mut self, timeline: TimelineId, incarnation: IncarnationId, number: u64) -> Option<String> {
        let is_it = |item: &Item| {
            let header = item.frame.as_ref().map(|frame| (frame.header.incarnation, frame.header.number.get()));
            item.timeline == timeline && header == Some((incarnation, number))
        };
        let at = self.items.iter().position(is_it)?;
        self.dirty = true;
        Some(self.items.remove(at).damage.what)
    }

    /// Writes down what is lost, if that has changed.
    ///
    /// # Errors
    /// Storage. After a restart the loss is found again, then with nothing known of it.
    pub fn keep<I: Io>(&mut self, io: &mut I) -> Result<(), Errno> {
        if self.dirty {
            let Known { frames, stretches } = self.now_known();
            io.replace_small(&self.path, &DamageFile { stream: self.stream, frames, stretches }.encode())?;
            self.dirty = false;
        }
        Ok(())
    }

    /// Looks which lost blocks newer records have replaced; returns which losses are mended by that.
    pub fn review(&mut self, journal: &Journal, cover: &mut Cover, newest: u64, bottom: Bottom<'_>) -> Vec<String> {
        let mut mended = Vec::new();
        for item in self.items.iter_mut().filter(|item| item.timeline == self.timeline) {
            let mut found = false;
            for block in item.damage.blocks.iter_mut().filter(|block| block.until.is_none()) {
                block.until = replaced(journal, cover, block, newest, bottom);
                found |= block.until.is_some();
            }
            if found && item.damage.is_mended() {
                mended.push(item.damage.what.clone());
            }
        }
        mended
    }

    /// Forgets what concerns no point any more.
    pub fn forget(&mut self, floor: u64, now: &Lives) {
        let owed = owes_whole(now);
        let before = self.items.len();
        self.items.retain(|item| {
            let damage = &item.damage;
            if item.timeline != self.timeline {
                true
            } else if damage.known {
                let over = damage.blocks.iter().all(|block| block.until.is_some_and(|until| until <= floor));
                !over || damage.first_seq > floor
            } else {
                // A synchronisation begun before it was found is known not to make it good.
                damage.first_seq > floor || damage.found_at > floor || owed
            }
        });
        self.dirty |= before != self.items.len();
    }

    /// What is wrong with the point after record `seq`, if something is.
    pub fn at(&self, seq: u64, lives: &Lives) -> Option<String> {
        let member = |slot: u16| lives.get(&slot).is_some_and(|life| life.member);
        for damage in self.of_stream().filter(|damage| damage.first_seq <= seq) {
            if !damage.known && owes_whole(lives) {
                return Some(damage.what.clone());
            }
            let needs = |block: &&LostBlocks| block.from <= seq && block.until.is_none_or(|until| seq < until);
            let mut hit = damage.blocks.iter().filter(needs).filter(|block| member(block.slot)).peekable();
            if hit.peek().is_some() {
                return Some(format!("{}; {}", damage.what, name_blocks(hit)));
            }
        }
        None
    }

    /// Blocks that the newest state lacks.
    pub fn open_blocks(&self) -> impl Iterator<Item = &LostBlocks> {
        self.of_stream().flat_map(|damage| &damage.blocks).filter(|block| block.until.is_none())
    }

    fn of_stream(&self) -> impl Iterator<Item = &Damage> {
        self.items.iter().filter(|item| item.timeline == self.timeline).map(|item| &item.damage)
    }
}

fn owes_whole(lives: &Lives) -> bool {
    lives.values().any(|life| life.member && life.owes_whole)
}

fn same(a: &LostFrame, b: &LostFrame) -> bool {
    (a.timeline, a.header.incarnation, a.header.number) == (b.timeline, b.header.incarnation, b.header.number)
}

fn blocks_of(frame: &LostFrame, disk_of: &impl Fn(u16) -> DiskId) -> Vec<LostBlocks> {
    let data = |kind| matches!(kind, RecordKind::Write | RecordKind::SyncWrite);
    let lost = frame.records.iter().filter(|(record, _)| data(record.kind)).map(|(record, _)| LostBlocks {
        disk: disk_of(record.disk),
        slot: record.disk,
        offset: record.offset,
        len: record.len.into(),
        from: record.seq,
        until: None,
    });
    let mut blocks: Vec<LostBlocks> = lost.collect();
    if blocks.len() > MAX_BLOCKS {
        blocks.sort_by_key(|block| (block.slot, block.offset));
        let mut gap = 4096;
        while blocks.len() > MAX_BLOCKS {
            blocks.dedup_by(|next, last| {
                let near = next.slot == last.slot && next.offset <= last.offset + last.len + gap;
                if near {
                    last.len = (next.offset + next.len).max(last.offset + last.len) - last.offset;
                    last.from = last.from.min(next.from);
                }
                near
            });
            gap *= 4;
        }
    }
    blocks
}

/// The record from which on newer ones hold all of the block's bytes, if there is one up to `newest`.
fn replaced(journal: &Journal, cover: &mut Cover, block: &LostBlocks, newest: u64, bottom: Bottom<'_>) -> Option<u64> {
    let mut covered = |seq: u64| {
        cover.start(block.offset, block.offset + block.len);
        journal.cover(cover, block.slot, seq);
        cover.finish().iter().all(|piece| match piece.content {
            // Folded since: what is lost of the image is known, and newer data has taken it off that list.
            Content::Below => block.from <= bottom.floor && bottom.is_good(block.slot, piece.offset, piece.len),
            Content::Unreadable => false,
            Content::Zero | Content::Data { .. } => piece.seq > block.from,
        })
    };
    if !covered(newest) {
        return None;
    }
    // What is covered stays covered.
    let (mut low, mut high) = (block.from.max(bottom.floor.saturating_sub(1)), newest.max(bottom.floor));
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if covered(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

fn name_blocks<'a>(blocks: impl Iterator<Item = &'a LostBlocks>) -> String {
    let mut text = String::from("lost are");
    let mut more = 0;
    for (number, block) in blocks.enumerate() {
        if number < NAMED {
            let comma = if number == 0 { "" } else { "," };
            text.push_str(&format!("{comma} {} bytes at {} of disk {}", block.len, block.offset, block.disk));
        } else {
            more += 1;
        }
    }
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}
