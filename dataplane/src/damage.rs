//! What cannot be read any more, and what that means: which points and blocks need it, until newer data has taken its
//! place.
//!
//! Two kinds. Of a frame that was in the index when it was found to be bad, every record is known: exactly the points
//! that need the lost bytes are damaged, reads of those bytes fail, everything else stays good; and the list is kept
//! beside the journal ([`afterimage_wire::damage`]), so that a restart knows as much. Of a frame that was never seen
//! whole, nothing is known but its place: points behind it hold no disk until a whole synchronisation has been made
//! ([`crate::index::Points::damage`]).

use afterimage_wire::damage::{DamageFile, LostFrame, MAX_LOST_FRAMES};
use afterimage_wire::ids::{DiskId, IncarnationId, StreamId, TimelineId};
use afterimage_wire::record::RecordKind;
use afterimage_wire::stream_state::UnreadableRange;

use crate::index::points::Lives;
use crate::index::{Content, Cover};
use crate::io::{Errno, Io};
use crate::journal::Journal;
use crate::target::{Damage, LostBlocks};

/// Losses that are remembered one by one.
const MAX_DAMAGE: usize = MAX_LOST_FRAMES;
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
    known: Vec<LostFrame>,
}

impl Ledger {
    /// Reads what was kept in this folder. A list that is itself damaged counts for nothing: what it says is found again.
    ///
    /// # Errors
    /// The file system.
    pub fn open<I: Io>(io: &mut I, dir: &str, stream: StreamId, timeline: TimelineId) -> Result<Self, Errno> {
        let path = format!("{dir}/damage");
        let known = match io.read_small(&path) {
            Err(Errno::NOENT) => Vec::new(),
            Err(errno) => return Err(errno),
            Ok(bytes) => match DamageFile::decode(&bytes) {
                Ok(file) if file.stream == stream => file.frames,
                Ok(_) => Vec::new(),
                Err(error) => {
                    tracing::warn!(path, %error, "the damage list cannot be used");
                    Vec::new()
                }
            },
        };
        Ok(Self { items: Vec::new(), path, stream, timeline, known })
    }

    /// Frames that are known to be damaged.
    pub fn known(&self) -> &[LostFrame] {
        &self.known
    }

    /// Losses, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Damage> {
        self.items.iter().map(|item| &item.damage)
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes a loss whose records nobody knows. False if it is not kept: there are too many.
    pub fn add(&mut self, timeline: TimelineId, damage: Damage) -> bool {
        if self.items.len() >= MAX_DAMAGE {
            return false;
        }
        self.items.push(Item { damage, timeline, frame: None });
        true
    }

    /// The losses that were known before this start count on: those that the journal was read with, and those that have
    /// been folded since.
    pub fn restore(&mut self, journal: &Journal, used: &[(IncarnationId, u64)], disk_of: impl Fn(u16) -> DiskId) {
        let first = journal.segments.front().map_or(u64::MAX, |segment| segment.number);
        let ours = |frame: &LostFrame| frame.timeline == journal.config.timeline;
        for frame in self.known.clone().into_iter().filter(ours) {
            let folded = frame.segment < first;
            if folded || used.contains(&(frame.header.incarnation, frame.header.number.get())) {
                self.add_frame(frame, &disk_of, "it was found to be damaged before");
            }
        }
        self.known.retain(|frame| !ours(frame));
    }

    /// Frames that a journal is to be read with.
    pub fn frames(&self) -> impl Iterator<Item = &LostFrame> {
        self.items.iter().filter_map(|item| item.frame.as_ref())
    }

    /// The branch's journal has been read again: what was lost unseen has been found again.
    pub fn forget_unknown(&mut self, timeline: TimelineId) {
        self.items.retain(|item| item.timeline != timeline || item.damage.known);
    }

    /// The branch is gone.
    pub fn forget_branch(&mut self, timeline: TimelineId) {
        self.items.retain(|item| item.timeline != timeline);
    }

    /// Takes a frame with lost chunks; returns what is to be told of it.
    pub fn add_frame(&mut self, frame: LostFrame, disk_of: &impl Fn(u16) -> DiskId, why: &str) -> Damage {
        let number = frame.header.number.get();
        self.items.retain(|item| !item.frame.as_ref().is_some_and(|known| same(known, &frame)));
        let damage = Damage {
            segment: frame.segment,
            incarnation: frame.header.incarnation,
            first_frame: number,
            last_frame: number,
            first_seq: frame.records.first().map_or(frame.header.first_seq.get(), |(record, _)| record.seq),
            what: format!("frame {number} of segment {}: {why}", frame.segment),
            blocks: blocks_of(&frame, disk_of),
            known: true,
        };
        if self.items.len() < MAX_DAMAGE {
            self.items.push(Item { damage: damage.clone(), timeline: frame.timeline, frame: Some(frame) });
        }
        damage
    }

    /// Writes down which frames are lost.
    ///
    /// # Errors
    /// Storage. After a restart the loss is found again, then with nothing known of it.
    pub fn keep<I: Io>(&mut self, io: &mut I) -> Result<(), Errno> {
        let frames = self.items.iter().filter_map(|item| item.frame.clone()).collect();
        io.replace_small(&self.path, &DamageFile { stream: self.stream, frames }.encode())
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

    /// Forgets what concerns no point any more; true if something was kept on disk of it.
    pub fn forget(&mut self, floor: u64, now: &Lives) -> bool {
        let owed = now.values().any(|life| life.member && life.owes_whole);
        let before = self.items.iter().filter(|item| item.frame.is_some()).count();
        self.items.retain(|item| {
            let damage = &item.damage;
            if item.timeline != self.timeline {
                true
            } else if damage.known {
                let over = damage.blocks.iter().all(|block| block.until.is_some_and(|until| until <= floor));
                !over || damage.first_seq > floor
            } else {
                damage.first_seq > floor || owed
            }
        });
        before != self.items.iter().filter(|item| item.frame.is_some()).count()
    }

    /// What is wrong with the point after record `seq`, if something is.
    pub fn at(&self, seq: u64, lives: &Lives) -> Option<String> {
        let member = |slot: u16| lives.get(&slot).is_some_and(|life| life.member);
        for damage in self.of_stream().filter(|damage| damage.first_seq <= seq) {
            if !damage.known && lives.values().any(|life| life.member && life.owes_whole) {
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

fn same(a: &LostFrame, b: &LostFrame) -> bool {
    (a.timeline, a.header.incarnation, a.header.number) == (b.timeline, b.header.incarnation, b.header.number)
}

/// The frame of this branch, if its loss is known.
pub(crate) fn find(
    known: &[LostFrame],
    timeline: TimelineId,
    incarnation: IncarnationId,
    number: u64,
) -> Option<&LostFrame> {
    known.iter().find(|frame| {
        frame.timeline == timeline && frame.header.incarnation == incarnation && frame.header.number.get() == number
    })
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
