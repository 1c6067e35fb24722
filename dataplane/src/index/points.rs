//! Which places of a stream are restore points, and which disks each of them holds.
//!
//! A record's place is a point for every disk that is in the stream there, owes no synchronisation and lost no history.
//! Kept as the state at the floor (durable, see [`afterimage_wire::stream_state`]) and the few records after it that
//! change the state; the state at any place is the sum.

use std::collections::{BTreeMap, VecDeque};

use afterimage_wire::MAX_DISKS;
use afterimage_wire::ids::DiskId;
use afterimage_wire::record::{Cut, DiskInfo, Record, RecordKind, SyncMark};
pub use afterimage_wire::stream_state::{DiskLife, OpenSync};

use crate::compare::Question;

/// Most synchronisations of a disk that are begun and not ended; beyond it the oldest two count as one whole.
const MAX_OPEN_SYNCS: usize = 16;
/// Most losses that are doubted one by one; beyond it they count together.
const MAX_DOUBTS: usize = 256;
/// Of a loss: it has just been found, in a journal whose end is not yet known.
pub const FOUND_NOW: u64 = u64::MAX;

/// A cut that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutEntry {
    /// Its record.
    pub seq: u64,
    /// Source's wall clock, nanoseconds since the epoch.
    pub wall_ns: u64,
    /// Source's monotonic clock, nanoseconds.
    pub mono_ns: u64,
    /// The cut.
    pub cut: Cut,
}

/// What changes which disks a point holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Join(DiskInfo),
    Leave,
    Resize(DiskInfo),
    SyncBegin {
        mark: SyncMark,
        /// It may have compared with what has been found lost since.
        tainted: bool,
    },
    SyncEnd(SyncMark),
    /// Acknowledged history was lost, for every disk.
    Damage,
}

#[derive(Clone, Debug)]
struct Event {
    seq: u64,
    slot: u16,
    change: Change,
}

/// Disks by slot.
pub type Lives = BTreeMap<u16, DiskLife>;

fn apply(lives: &mut Lives, slot: u16, change: &Change) {
    match change {
        Change::Join(info) => {
            let life = lives.entry(slot).or_insert_with(|| DiskLife {
                info: info.clone(),
                member: false,
                owes_whole: true,
                open: Vec::new(),
            });
            // A disk that was outside the stream was written without us: only a whole synchronisation makes it good.
            if !life.member || life.info.id != info.id {
                life.owes_whole = true;
                life.open.clear();
            }
            life.member = true;
            life.info = info.clone();
        }
        Change::Damage => {
            for life in lives.values_mut() {
                life.owes_whole = true;
                life.open.iter_mut().for_each(|open| open.tainted = true);
            }
        }
        change => {
            let Some(life) = lives.get_mut(&slot) else { return };
            match change {
                Change::Leave => life.member = false,
                Change::Resize(info) => life.info = info.clone(),
                Change::SyncBegin { mark, tainted } => {
                    if life.open.len() == MAX_OPEN_SYNCS {
                        life.open.remove(0);
                        life.owes_whole = true;
                    }
                    if !mutant!(SyncingDiskHeld) {
                        life.open.push(OpenSync { sync: mark.sync, whole: mark.whole, tainted: *tainted });
                    }
                }
                Change::SyncEnd(mark) => end_sync(life, mark),
                Change::Join(_) | Change::Damage => {}
            }
        }
    }
}

/// A whole synchronisation, once complete, makes good all that was begun before it; a partial one only earlier partial
/// ones: a whole one that was cut off (its source restarted) still has to be done as a whole.
fn end_sync(life: &mut DiskLife, mark: &SyncMark) {
    let Some(at) = life.open.iter().position(|open| open.sync == mark.sync) else { return };
    let ended = life.open[at];
    if ended.whole {
        life.open.drain(..=at);
        if !ended.tainted {
            life.owes_whole = false;
        }
    } else {
        let mut index = 0;
        life.open.retain(|open| {
            index += 1;
            index - 1 > at || open.whole
        });
    }
}

/// The disk is in the stream, synchronised and whole.
pub fn holds(life: &DiskLife) -> bool {
    life.member && !life.owes_whole && life.open.is_empty()
}

/// Every disk of the stream is held, and there is one.
pub fn complete(lives: &Lives) -> bool {
    let mut members = lives.values().filter(|life| life.member).peekable();
    members.peek().is_some() && members.all(holds)
}

/// History that nobody knows: from its first record on, and what the newest record was when the loss was found. What was
/// synchronised between the two compared blocks that could still be read, and did not send them.
#[derive(Copy, Clone, Debug)]
struct Doubt {
    from: u64,
    found_at: u64,
}

/// A complete point below the floor: all there is of it is on a shelf.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub seq: u64,
    /// Source's wall clock, nanoseconds since the epoch.
    pub wall_ns: u64,
    pub lives: Lives,
}

/// Cuts and changes of a stream above its floor.
#[derive(Debug, Default)]
pub struct Points {
    floor: u64,
    base: Lives,
    events: VecDeque<Event>,
    now: Lives,
    cuts: VecDeque<CutEntry>,
    newest: u64,
    newest_complete: Option<u64>,
    kept: Option<Kept>,
    newest_cut: u64,
    membership: u64,
    doubts: Vec<Doubt>,
    /// Records of hashes taken in and not fetched; none while nobody wants to answer them (a journal is being read back).
    questions: Option<Vec<Question>>,
}

impl Points {
    /// With the state of the disks at the floor.
    pub fn new(floor: u64, base: Lives, newest_cut: u64) -> Self {
        let newest_complete = complete(&base).then_some(floor);
        let now = base.clone();
        Self {
            floor,
            base,
            events: VecDeque::new(),
            now,
            cuts: VecDeque::new(),
            newest: floor,
            newest_complete,
            kept: None,
            newest_cut,
            membership: 0,
            doubts: Vec::new(),
            questions: None,
        }
    }

    /// From here on records of hashes are kept for [`Points::take_questions`].
    pub(crate) fn listen(&mut self) {
        self.questions.get_or_insert_default();
    }

    /// Records of hashes taken in since the last call.
    pub(crate) fn take_questions(&mut self) -> impl Iterator<Item = Question> {
        self.questions.as_mut().map(|questions| questions.drain(..)).into_iter().flatten()
    }

    /// No point below this.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// Newest record seen.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Newest point that holds every disk; the kept one if none above the floor does.
    pub fn newest_complete(&self) -> Option<u64> {
        self.newest_complete.or(self.kept.as_ref().map(|kept| kept.seq))
    }

    /// As [`Points::newest_complete`], not below the floor.
    pub(crate) fn newest_above_floor(&self) -> Option<u64> {
        self.newest_complete
    }

    /// The point that is kept below the floor, as long as none above it is complete.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref().filter(|_| self.newest_complete.is_none())
    }

    /// A point below the floor, or about to be, is kept, or none any more.
    pub(crate) fn keep(&mut self, kept: Option<Kept>) {
        self.kept = kept;
    }

    /// Number of the newest cut ever seen.
    pub fn newest_cut(&self) -> u64 {
        self.newest_cut
    }

    /// Rises with each join, leave and resize.
    pub fn membership(&self) -> u64 {
        self.membership
    }

    /// Disks as of the newest record.
    pub fn now(&self) -> &Lives {
        &self.now
    }

    /// Disks as of the floor.
    pub fn base(&self) -> &Lives {
        &self.base
    }

    /// Takes in a record. Records at or below the floor (a fold was cut off; their segment is still there) change
    /// nothing: the state at the floor holds them.
    pub fn record(&mut self, record: &Record, payload: &[u8]) -> Result<(), afterimage_wire::FormatError> {
        let change = match record.kind {
            RecordKind::Join => Change::Join(DiskInfo::decode(payload)?),
            RecordKind::Leave => Change::Leave,
            RecordKind::Resize => Change::Resize(DiskInfo::decode(payload)?),
            RecordKind::SyncBegin => {
                let (mark, seq) = (SyncMark::decode(payload)?, record.seq);
                let tainted = self.doubts.iter().any(|doubt| doubt.from <= seq && seq <= doubt.found_at);
                Change::SyncBegin { mark, tainted }
            }
            RecordKind::SyncEnd => Change::SyncEnd(SyncMark::decode(payload)?),
            RecordKind::Cut => {
                let cut = Cut::decode(payload)?;
                if record.seq >= self.floor {
                    self.newest_cut = self.newest_cut.max(cut.number);
                    let (seq, wall_ns, mono_ns) = (record.seq, record.wall_ns, record.mono_ns);
                    self.cuts.push_back(CutEntry { seq, wall_ns, mono_ns, cut });
                }
                return Ok(());
            }
            RecordKind::SyncHash => {
                if let Some(questions) = &mut self.questions {
                    questions.push(Question { record: *record, hashes: payload.to_vec() });
                }
                return Ok(());
            }
            _ => return Ok(()),
        };
        if let Change::Join(info) | Change::Resize(info) = &change
            && info.slot != record.disk
        {
            return Err(afterimage_wire::FormatError::Malformed { what: "disk", detail: "slot of another disk" });
        }
        if matches!(change, Change::Join(_)) && self.now.len() >= MAX_DISKS && !self.now.contains_key(&record.disk) {
            return Err(afterimage_wire::FormatError::Malformed {
                what: "disk",
                detail: "more than a stream may have",
            });
        }
        self.change(record.seq, record.disk, change);
        Ok(())
    }

    /// Acknowledged history was lost from this record on, the next one to be taken in. It was found when `found_at` was
    /// the newest record: only a whole synchronisation begun after that makes it good. [`FOUND_NOW`]: while a journal is
    /// being read back; see [`Points::settle`].
    pub fn damage(&mut self, seq: u64, found_at: u64) {
        self.doubt(seq, found_at);
        while self.cuts.back().is_some_and(|cut| cut.seq >= seq) {
            self.cuts.pop_back();
        }
        if seq <= self.floor {
            // The oldest segment was being folded: the image, which is the state at the floor, lacks what is lost.
            apply(&mut self.base, 0, &Change::Damage);
            apply(&mut self.now, 0, &Change::Damage);
            self.newest_complete = self.newest_complete.filter(|newest| *newest > self.floor);
            return;
        }
        self.change(seq, 0, Change::Damage);
    }

    /// What was lost from this record on, and was found at that one, is no more to be found in the journal: the state at
    /// the floor has it. Synchronisations in between do not make it good.
    pub fn doubt(&mut self, from: u64, found_at: u64) {
        if mutant!(HealedBeforeFound) {
            return;
        }
        if let Some(doubt) = self.doubts.iter_mut().find(|doubt| doubt.found_at == found_at) {
            doubt.from = doubt.from.min(from);
        } else if self.doubts.len() < MAX_DOUBTS {
            self.doubts.push(Doubt { from, found_at });
        } else if let Some(last) = self.doubts.last_mut() {
            (last.from, last.found_at) = (last.from.min(from), last.found_at.max(found_at));
        }
    }

    /// The journal has been read back: what was found to be lost in it was found at its newest record.
    pub fn settle(&mut self) {
        let newest = self.newest;
        for doubt in self.doubts.iter_mut().filter(|doubt| doubt.found_at == FOUND_NOW) {
            doubt.found_at = newest;
        }
    }

    fn change(&mut self, seq: u64, slot: u16, change: Change) {
        if seq <= self.floor {
            return;
        }
        if complete(&self.now) {
            self.newest_complete = Some(seq - 1);
        }
        self.membership += u64::from(matches!(change, Change::Join(_) | Change::Leave | Change::Resize(_)));
        apply(&mut self.now, slot, &change);
        self.events.push_back(Event { seq, slot, change });
    }

    /// All records up to `seq` have been taken in.
    pub fn reached(&mut self, seq: u64) {
        self.newest = self.newest.max(seq);
        if complete(&self.now) {
            self.newest_complete = Some(self.newest);
        }
    }

    /// The disks as of `seq`.
    pub fn at(&self, seq: u64) -> Lives {
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.seq == seq && seq < self.floor) {
            return kept.lives.clone();
        }
        let mut lives = self.base.clone();
        for event in self.events.iter().take_while(|event| event.seq <= seq) {
            apply(&mut lives, event.slot, &event.change);
        }
        lives
    }

    /// Oldest point that holds every disk.
    pub fn oldest_complete(&self) -> Option<u64> {
        if let Some(kept) = self.kept() {
            return Some(kept.seq);
        }
        self.newest_complete?;
        if complete(&self.base) {
            return Some(self.floor);
        }
        let mut lives = self.base.clone();
        for (number, event) in self.events.iter().enumerate() {
            apply(&mut lives, event.slot, &event.change);
            // Changes of one record (a damage beside it) count together.
            let last_here = self.events.get(number + 1).is_none_or(|next| next.seq != event.seq);
            if last_here && complete(&lives) {
                return Some(event.seq);
            }
        }
        None
    }

    /// Cuts, oldest first.
    pub fn cuts(&self) -> impl DoubleEndedIterator<Item = &CutEntry> + ExactSizeIterator {
        self.cuts.iter()
    }

    /// Where the state changes after `seq`, and up to `until`.
    pub fn changes_within(&self, seq: u64, until: u64) -> bool {
        self.events.iter().any(|event| event.seq > seq && event.seq <= until)
    }

    /// The cuts and changes numbered `from` to `to`, as records again.
    pub fn records_within(&self, from: u64, to: u64) -> Vec<(Record, Vec<u8>)> {
        let plain = |seq, kind, disk| Record {
            seq,
            kind,
            disk,
            offset: 0,
            len: 0,
            mono_ns: 0,
            wall_ns: 0,
            payload_at: 0,
            payload_len: 0,
            crc: 0,
        };
        let mut found = Vec::new();
        for cut in self.cuts.iter().filter(|cut| cut.seq >= from && cut.seq <= to) {
            let mut payload = Vec::new();
            cut.cut.encode(&mut payload);
            let (mono_ns, wall_ns) = (cut.mono_ns, cut.wall_ns);
            found.push((Record { mono_ns, wall_ns, ..plain(cut.seq, RecordKind::Cut, 0) }, payload));
        }
        for event in self.events.iter().filter(|event| event.seq >= from && event.seq <= to) {
            let mut payload = Vec::new();
            let kind = match &event.change {
                Change::Join(info) => {
                    info.encode(&mut payload);
                    RecordKind::Join
                }
                Change::Resize(info) => {
                    info.encode(&mut payload);
                    RecordKind::Resize
                }
                Change::SyncBegin { mark, .. } => {
                    mark.encode(&mut payload);
                    RecordKind::SyncBegin
                }
                Change::SyncEnd(mark) => {
                    mark.encode(&mut payload);
                    RecordKind::SyncEnd
                }
                Change::Leave => RecordKind::Leave,
                Change::Damage => continue,
            };
            found.push((plain(event.seq, kind, event.slot), payload));
        }
        for (record, payload) in &mut found {
            record.payload_len = payload.len() as u32;
        }
        found.sort_by_key(|(record, _)| record.seq);
        found
    }

    /// Ids of the disks that are held in `lives`.
    pub fn held(lives: &Lives) -> Vec<DiskId> {
        lives.values().filter(|life| holds(life)).map(|life| life.info.id).collect()
    }

    /// Raises the floor: what lies at or below it becomes the base.
    pub fn raise_floor(&mut self, floor: u64) {
        while self.events.front().is_some_and(|event| event.seq <= floor) {
            let event = self.events.pop_front().expect("there is a front");
            apply(&mut self.base, event.slot, &event.change);
        }
        while self.cuts.front().is_some_and(|cut| cut.seq < floor) {
            self.cuts.pop_front();
        }
        self.floor = self.floor.max(floor);
        self.doubts.retain(|doubt| doubt.found_at > floor);
        if self.newest_complete.is_some_and(|newest| newest < self.floor) {
            self.newest_complete = None;
        }
    }

    /// Memory, roughly, bytes.
    pub fn bytes(&self) -> usize {
        self.cuts.capacity() * size_of::<CutEntry>() + self.events.capacity() * size_of::<Event>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_up_to_the_floor_concerns_the_point_there_and_all_behind_it() {
        let life = DiskLife { info: DiskInfo::default(), member: true, owes_whole: false, open: Vec::new() };
        let points = || Points::new(224, [(0, life.clone())].into(), 0);
        let mut lost = points();
        assert_eq!(lost.newest_complete(), Some(224));
        lost.damage(197, FOUND_NOW);
        lost.reached(300);
        assert_eq!((lost.newest_complete(), lost.oldest_complete()), (None, None));
        assert!(!complete(lost.base()) && !complete(&lost.at(224)) && !complete(&lost.at(300)));
        // Behind the floor it concerns only what is behind it.
        let mut lost = points();
        lost.reached(250);
        lost.damage(251, FOUND_NOW);
        lost.reached(300);
        assert_eq!(lost.newest_complete(), Some(250));
        assert!(complete(&lost.at(224)) && !complete(&lost.at(300)));
    }
}
