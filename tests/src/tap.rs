//! What the journal says, read straight from the target's segment files with the policy's key, not by the target.

use std::collections::BTreeMap;

use afterimage_dataplane::io::sim::{NodeId, World};
use afterimage_dataplane::seal::{DataKey, PolicyKey, open_chunk, payload, record_payload};
use afterimage_dataplane::target::Damage;
use afterimage_wire::ALIGN;
use afterimage_wire::chunk::Chunk;
use afterimage_wire::frame::{FrameHeader, check_frame};
use afterimage_wire::ids::{IncarnationId, TimelineId};
use afterimage_wire::record::{Cut, Record, RecordKind, SyncMark};
use afterimage_wire::segment::SegmentHead;

/// A record with what it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Writer.
    pub incarnation: IncarnationId,
    /// Its frame.
    pub frame: u64,
    /// The record.
    pub record: Record,
    /// Its payload.
    pub payload: Vec<u8>,
}

struct Segment {
    key: DataKey,
    incarnation: IncarnationId,
    read_to: u64,
    next_frame: u64,
}

/// Frames that the target cannot read any more, as it said first.
#[derive(Clone, Debug)]
struct Loss {
    incarnation: IncarnationId,
    frames: (u64, u64),
    first_seq: u64,
    /// Newest record then.
    found_at: u64,
    /// Up to there all is in the images.
    floor: u64,
}

impl Loss {
    fn has(&self, entry: &Entry) -> bool {
        let (first, last) = self.frames;
        self.incarnation == entry.incarnation && (first..=last).contains(&entry.frame) && entry.record.seq > self.floor
    }
}

/// Follows the segments of one stream as they grow.
pub struct Tap {
    policy: PolicyKey,
    folder: String,
    segments: BTreeMap<String, Option<Segment>>,
    /// Heads seen: one that cannot be read any more still says who wrote the segment.
    heads: BTreeMap<String, (SegmentHead, usize)>,
    /// Stamps of the files as they were read last, and what they were read for.
    seen: BTreeMap<String, (u64, u64)>,
    seen_for: (Option<(IncarnationId, u64)>, TimelineId),
    /// Every record seen, by number.
    pub entries: BTreeMap<u64, Entry>,
    /// Ends of synchronisations among them: when each was, by disk and number.
    synced: BTreeMap<u16, BTreeMap<u64, u64>>,
    /// A model of each disk as [`Tap::show`] left it, and the record up to which it is.
    models: BTreeMap<u16, Model>,
    /// Every frame seen, in the order in which they were.
    pub frames: Vec<Frame>,
    losses: Vec<Loss>,
    /// Frames may be bad: what follows one that is on stable storage, as this place says, is looked for.
    pub harmed: Option<(IncarnationId, u64)>,
}

/// A disk as the records up to one make it.
#[derive(Default)]
struct Model {
    seq: u64,
    image: Vec<u8>,
    unreadable: Vec<(u64, u64)>,
}

/// Where a frame lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// File.
    pub path: String,
    /// Byte offset.
    pub at: u64,
    /// Bytes.
    pub len: usize,
    /// Writer.
    pub incarnation: IncarnationId,
    /// Number.
    pub number: u64,
    /// Highest acknowledged one, as it says.
    pub acked: u64,
    /// Its last record.
    pub last_seq: u64,
}

/// What is wrong with a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong(pub String);

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tap({} records)", self.entries.len())
    }
}

impl Tap {
    /// Follows the segments in this folder.
    pub fn new(policy: PolicyKey, folder: String) -> Self {
        Self {
            policy,
            folder,
            segments: BTreeMap::new(),
            heads: BTreeMap::new(),
            seen: BTreeMap::new(),
            seen_for: (None, TimelineId::NONE),
            entries: BTreeMap::new(),
            synced: BTreeMap::new(),
            models: BTreeMap::new(),
            frames: Vec::new(),
            losses: Vec::new(),
            harmed: None,
        }
    }

    /// Reads what has come since; `timeline` is the branch that the source writes.
    ///
    /// # Errors
    /// Whole frames that make no sense, or a number that means another record than it did.
    pub fn follow(&mut self, world: &World, node: NodeId, timeline: TimelineId) -> Result<(), Wrong> {
        if self.seen_for != (self.harmed, timeline) {
            self.seen_for = (self.harmed, timeline);
            self.seen.clear();
        }
        // A file that is as it was when all of it had been read has nothing new.
        let mut changed = Vec::new();
        world.stamps(node, &self.folder, |path, stamp| {
            if path.ends_with(".seg") && self.seen.get(path) != Some(&stamp) {
                changed.push((path.to_owned(), stamp));
            }
        });
        for (path, stamp) in changed {
            self.seen.insert(path.clone(), stamp);
            let Some(head) = world.meant_range(node, &path, 0, ALIGN) else { continue };
            let read = SegmentHead::decode(&head).ok();
            if let Some(read) = &read
                && self.heads.get(&path) != Some(read)
            {
                self.heads.insert(path.clone(), read.clone());
            }
            let known = || self.harmed.and_then(|_| self.heads.get(&path).cloned());
            let Some((head, length)) = read.or_else(known) else { continue };
            if !path.ends_with(&format!("-{:016x}.seg", head.segment)) {
                continue; // A file used again, whose new head is not there yet.
            }
            // The name of a segment that nothing was acknowledged in may be given to the next writer's.
            let known = self.segments.get(&path).and_then(|s| s.as_ref()).map(|s| s.incarnation);
            if !self.segments.contains_key(&path) || known.is_some_and(|known| known != head.incarnation) {
                let segment = if head.timeline == timeline {
                    let key = self.policy.unwrap(head.incarnation, &head.key);
                    let key = key.map_err(|e| Wrong(format!("{path}: {e}")))?;
                    Some(Segment {
                        key,
                        incarnation: head.incarnation,
                        read_to: length as u64,
                        next_frame: head.first_frame,
                    })
                } else {
                    None
                };
                self.segments.insert(path.clone(), segment);
            }
            if let Some(Some(segment)) = self.segments.get_mut(&path) {
                // Up to which frame of it all is on stable storage: a newer writer's may still be on their way, and the
                // later ones there before the earlier.
                let newer = |writer| {
                    let mut heads = self.heads.values().map(|(head, _)| head);
                    heads.any(|other| other.incarnation == writer && other.segment > head.segment)
                };
                let durable = self.harmed.map(|(writer, frame)| match segment.incarnation {
                    ours if ours == writer => frame,
                    _ if newer(writer) => u64::MAX,
                    _ => 0,
                });
                let Self { entries, synced, models, frames, .. } = self;
                let known = Known { entries, synced, models, frames };
                read_frames(world, node, &path, segment, known, durable)?;
            }
        }
        Ok(())
    }

    /// The target has found, with this floor, that it cannot read something. From then on its state is the one without
    /// it; and only a whole synchronisation begun later makes a disk good.
    pub fn lose(&mut self, damage: &Damage, floor: u64) {
        let (mut incarnation, mut frames) = (damage.incarnation, (damage.first_frame, damage.last_frame));
        if damage.last_frame == u64::MAX {
            // A whole segment.
            let heads = || self.heads.values().map(|(head, _)| head);
            if let Some(head) = heads().find(|head| head.segment == damage.segment) {
                let next = heads().filter(|h| h.segment > head.segment && h.incarnation == head.incarnation);
                incarnation = head.incarnation;
                frames = (head.first_frame, next.map(|next| next.first_frame - 1).min().unwrap_or(u64::MAX));
            }
        }
        if !self.losses.iter().any(|known| (known.incarnation, known.frames) == (incarnation, frames)) {
            let (first_seq, found_at) = (damage.first_seq, damage.found_at);
            self.losses.push(Loss { incarnation, frames, first_seq, found_at, floor });
            self.models.clear();
        }
    }

    /// The target holds nothing above `newest` any more (it lost power); what follows is read afresh. With `read_again`
    /// what it could not read before it may read now: it says what is still lost.
    pub fn restart(&mut self, newest: u64, read_again: bool) {
        self.segments.clear();
        self.seen.clear();
        self.models.clear();
        self.losses.retain(|loss| loss.found_at <= newest && !read_again);
        self.entries.split_off(&(newest + 1));
        self.synced.values_mut().for_each(|ends| drop(ends.split_off(&(newest + 1))));
        self.frames.clear();
    }

    /// Applies the records of disk `slot` from `from` to `to`, both included, to its image and to the ranges that are
    /// unreadable.
    pub fn apply(&self, slot: u16, from: u64, to: u64, image: &mut [u8], unreadable: &mut Vec<(u64, u64)>) {
        if from > to {
            return;
        }
        for entry in self.entries.range(from..=to).map(|(_, e)| e) {
            let record = &entry.record;
            if self.losses.iter().any(|loss| loss.found_at < to && loss.has(entry)) {
                continue;
            }
            if record.disk == slot && record.kind == RecordKind::Unreadable {
                unreadable.push((record.offset, record.end()));
            }
            if record.disk != slot || !record.kind.changes_disk() {
                continue;
            }
            if !unreadable.is_empty() {
                let (start, end) = (record.offset, record.end());
                let left = |(from, to): (u64, u64)| [(from, to.min(start)), (from.max(end), to)];
                *unreadable = unreadable.drain(..).flat_map(left).filter(|(from, to)| from < to).collect();
            }
            let range = record.offset as usize..(record.end() as usize).min(image.len());
            if record.kind.is_zero() {
                image[range].fill(0);
            } else {
                image[range].copy_from_slice(&entry.payload);
            }
        }
    }

    /// Disk `slot`, of `size` bytes, as the records up to `seq` make it, and the ranges that are unreadable then.
    pub fn show(&mut self, slot: u16, seq: u64, size: usize) -> (&[u8], &[(u64, u64)]) {
        let mut model = self.models.remove(&slot).unwrap_or_default();
        // What was lost is left out of what comes after it was found: that is no matter of going on.
        let goes_on = self.losses.is_empty() && model.seq <= seq && model.image.len() == size;
        let from = if goes_on { model.seq + 1 } else { 0 };
        if !goes_on {
            model.unreadable.clear();
            model.image.clear();
            model.image.resize(size, 0);
        }
        self.apply(slot, from, seq, &mut model.image, &mut model.unreadable);
        model.seq = seq;
        let place = self.models.entry(slot).or_default();
        *place = model;
        (&place.image, &place.unreadable)
    }

    /// The first number up to `seq` that is missing within its incarnation's.
    pub fn gap(&self, seq: u64) -> Option<u64> {
        if !self.entries.contains_key(&seq) {
            return Some(seq);
        }
        let mut entries = self.entries.range(..=seq).map(|(_, e)| e).peekable();
        while let Some(entry) = entries.next() {
            let next = entry.record.seq + 1;
            if entries.peek().is_some_and(|e| e.incarnation == entry.incarnation && e.record.seq != next) {
                return Some(next);
            }
        }
        None
    }

    /// Whether disk `slot` is in the stream and complete after record `seq`.
    pub fn complete(&self, slot: u16, seq: u64) -> bool {
        let (mut complete, mut begun) = (false, BTreeMap::new());
        // Whole synchronisations make good what was found to be lost before they began.
        let lost = self.losses.iter().filter(|loss| loss.first_seq <= seq).map(|loss| loss.found_at).max();
        let mut good = lost.is_none();
        for entry in self.entries.range(..=seq).map(|(_, e)| e).filter(|e| e.record.disk == slot) {
            let record = &entry.record;
            match record.kind {
                RecordKind::Leave => complete = false,
                RecordKind::SyncBegin | RecordKind::SyncEnd => {
                    let Ok(mark) = SyncMark::decode(&entry.payload) else { continue };
                    if record.kind == RecordKind::SyncBegin {
                        complete = false;
                        begun.insert(mark.sync, record.seq);
                        continue;
                    }
                    complete = true;
                    // A synchronisation has the number of its first record, which may be in a frame that the disk lost.
                    good |= mark.whole && Some(begun.get(&mark.sync).copied().unwrap_or(mark.sync)) > lost;
                }
                _ => {}
            }
        }
        complete && good
    }

    /// When the newest synchronisation of disk `slot` that had ended by record `seq` did, on the source's clock.
    pub fn synced(&self, slot: u16, seq: u64) -> Option<u64> {
        self.synced.get(&slot)?.range(..=seq).next_back().map(|(_, at)| *at)
    }
}

/// Records, ends of synchronisations and frames that have been read.
struct Known<'a> {
    entries: &'a mut BTreeMap<u64, Entry>,
    synced: &'a mut BTreeMap<u16, BTreeMap<u64, u64>>,
    models: &'a mut BTreeMap<u16, Model>,
    frames: &'a mut Vec<Frame>,
}

impl Known<'_> {
    /// Takes a record.
    ///
    /// # Errors
    /// Its number was another one's.
    fn take(&mut self, entry: Entry) -> Result<(), String> {
        let record = &entry.record;
        match self.entries.get(&record.seq) {
            Some(known) if *known != entry => return Err(format!("record {} was another one before", record.seq)),
            Some(_) => {}
            None => {
                if record.kind == RecordKind::SyncEnd {
                    self.synced.entry(record.disk).or_default().insert(record.seq, record.mono_ns);
                }
                self.models.retain(|_, model| model.seq < record.seq);
                self.entries.insert(record.seq, entry);
            }
        }
        Ok(())
    }
}

fn read_frames(
    world: &World,
    node: NodeId,
    path: &str,
    segment: &mut Segment,
    mut known: Known<'_>,
    durable: Option<u64>,
) -> Result<(), Wrong> {
    loop {
        let Some(mut frame) = whole_frame(world, node, path, segment.read_to) else {
            // Not all there yet, or torn; or bad, and good ones may follow it.
            let durable = durable.is_some_and(|frame| segment.next_frame <= frame);
            let next = durable.then(|| next_frame(world, node, path, segment)).flatten();
            let Some((at, number)) = next else { return Ok(()) };
            (segment.read_to, segment.next_frame) = (at, number);
            continue;
        };
        let length = frame.len();
        let Ok((header, directory)) = check_frame(&frame) else { return Ok(()) };
        let (header, directory) = (*header, directory.to_vec());
        let wrong = |what: String| Wrong(format!("{path}, frame {}: {what}", header.number.get()));
        if header.incarnation != segment.incarnation || header.number.get() != segment.next_frame {
            // What the file held before it became this segment.
            return Ok(());
        }
        let mut seq = header.first_seq.get();
        for (index, entry) in directory.iter().enumerate() {
            let range = entry.at.get() as usize..(entry.at.get() + entry.sealed_len.get()) as usize;
            let opened = open_chunk(&segment.key, &header, index as u32, &mut frame[range]);
            let opened = opened.map_err(|e| wrong(e.to_string()))?;
            let chunk = Chunk::parse(opened).map_err(|e| wrong(e.to_string()))?;
            let mut room = Vec::new();
            let plain = payload(&chunk, &mut room).map_err(|e| wrong(e.to_string()))?;
            for record in chunk.records() {
                let record = record.map_err(|e| wrong(e.to_string()))?;
                if record.seq != seq {
                    return Err(wrong(format!("record {} where {seq} was due", record.seq)));
                }
                seq += 1;
                let payload = record_payload(&record, plain).map_err(|e| wrong(e.to_string()))?.to_vec();
                check_payload(&record, &payload).map_err(wrong)?;
                let entry = Entry { incarnation: header.incarnation, frame: header.number.get(), record, payload };
                known.take(entry).map_err(wrong)?;
            }
        }
        if seq != header.last_seq.get() + 1 {
            return Err(wrong(format!("ends with record {} where its header says {}", seq - 1, header.last_seq.get())));
        }
        known.frames.push(Frame {
            path: path.to_owned(),
            at: segment.read_to,
            len: length,
            incarnation: header.incarnation,
            number: header.number.get(),
            acked: header.acked.get(),
            last_seq: header.last_seq.get(),
        });
        segment.read_to += length as u64;
        segment.next_frame += 1;
    }
}

/// The frame that begins there, if it is whole.
fn whole_frame(world: &World, node: NodeId, path: &str, at: u64) -> Option<Vec<u8>> {
    let front = world.meant_range(node, path, at, ALIGN)?;
    let length = FrameHeader::parse(&front).ok()?.length.get() as usize;
    let frame = world.meant_range(node, path, at, length)?;
    check_frame(&frame).is_ok().then_some(frame)
}

/// The next whole frame of the segment's writer behind one that is not whole: where, and its number.
fn next_frame(world: &World, node: NodeId, path: &str, segment: &Segment) -> Option<(u64, u64)> {
    let end = world.meant_range(node, path, segment.read_to, usize::MAX)?.len() as u64 + segment.read_to;
    let places = (segment.read_to..end).step_by(ALIGN).skip(1);
    places.into_iter().find_map(|at| {
        let frame = whole_frame(world, node, path, at)?;
        let header = FrameHeader::parse(&frame).ok()?;
        let ours = header.incarnation == segment.incarnation && header.number.get() > segment.next_frame;
        ours.then_some((at, header.number.get()))
    })
}

fn check_payload(record: &Record, payload: &[u8]) -> Result<(), String> {
    let result = match record.kind {
        RecordKind::Cut => Cut::decode(payload).err(),
        RecordKind::SyncBegin | RecordKind::SyncEnd => SyncMark::decode(payload).err(),
        _ => None,
    };
    result.map_or(Ok(()), |e| Err(format!("record {}: {e}", record.seq)))
}
