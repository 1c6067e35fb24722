//! The records of one segment that say something about bytes of a disk, sorted for lookup.
//!
//! New records go to a short unsorted tail; a full tail becomes a sorted run; runs of like size are merged, all of them
//! when the segment is closed. A run is an array sorted by (disk, start) in which each entry also carries the furthest
//! end of the entries of its subtree: an implicit interval tree, so records of any length and overlap are found in
//! O(log n + found).

/// Records in the unsorted tail, looked through one by one.
const TAIL: usize = 512;

/// What a record makes of its range.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum EntryKind {
    /// The payload.
    #[default]
    Data,
    /// Zeros.
    Zero,
    /// Unknown bytes.
    Unreadable,
}

/// A record in the index: 40 bytes.
#[derive(Copy, Clone, Debug, Default)]
pub struct Entry {
    /// First byte on the disk.
    pub start: u64,
    /// Furthest end in the entry's subtree; kept by the run.
    pub(crate) furthest: u64,
    /// Record number less the segment's first.
    pub seq_delta: u32,
    /// Bytes.
    pub len: u32,
    /// Frame in the segment's table.
    pub frame: u32,
    /// First byte in the chunk's plain payload.
    pub payload_at: u32,
    /// Wall clock less that of the frame's first record, microseconds, saturating.
    pub wall_delta: i32,
    /// Slot of the disk.
    pub disk: u16,
    /// Chunk of the frame.
    pub chunk: u8,
    /// What it says.
    pub kind: EntryKind,
}
const _: () = assert!(size_of::<Entry>() == 40);

impl Entry {
    /// First byte past the range.
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.len)
    }
}

/// A sorted run, and which regions of the disks it says nothing about.
#[derive(Debug, Default)]
struct Run {
    entries: Vec<Entry>,
    /// A bit for each of [`REGION`] bytes of disk, by hash: unset means that no entry begins or lies there. Most lookups
    /// of a read miss most segments; this tells so with a memory access or two.
    touched: Vec<u64>,
}

/// Bytes of disk that share a bit of the filter.
const REGION: u64 = 64 * 1024;
/// Regions of one entry that are marked one by one; an entry that covers more switches the filter off.
const MAX_REGIONS: u64 = 32;
/// Bits of the filter for each entry.
const BITS: usize = 8;

fn region_hash(disk: u16, region: u64) -> u64 {
    (region ^ u64::from(disk) << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

impl Run {
    fn new(mut entries: Vec<Entry>) -> Self {
        build(&mut entries);
        let words = (entries.len() * BITS).div_ceil(64).next_power_of_two();
        let mut touched = vec![0u64; words];
        for entry in &entries {
            let (first, last) = (entry.start / REGION, (entry.end() - 1) / REGION);
            if last - first >= MAX_REGIONS {
                touched = Vec::new();
                break;
            }
            for region in first..=last {
                let bit = region_hash(entry.disk, region) as usize & (words * 64 - 1);
                touched[bit / 64] |= 1 << (bit % 64);
            }
        }
        Self { entries, touched }
    }

    fn may_touch(&self, disk: u16, start: u64, end: u64) -> bool {
        let (first, last) = (start / REGION, (end.max(start + 1) - 1) / REGION);
        if self.touched.is_empty() || last - first >= MAX_REGIONS {
            return true;
        }
        (first..=last).any(|region| {
            let bit = region_hash(disk, region) as usize & (self.touched.len() * 64 - 1);
            self.touched[bit / 64] & 1 << (bit % 64) != 0
        })
    }
}

/// Part of a segment's index; the numbers of different parts do not interleave.
#[derive(Copy, Clone, Debug)]
pub struct IndexPart<'a> {
    tail: &'a [Entry],
    run: Option<&'a Run>,
}

impl IndexPart<'_> {
    /// Appends the entries of `disk` that overlap `[start, end)`.
    pub fn overlapping(&self, disk: u16, start: u64, end: u64, out: &mut Vec<Entry>) {
        let Some(run) = self.run else {
            out.extend(self.tail.iter().filter(|e| e.disk == disk && e.start < end && e.end() > start));
            return;
        };
        if !run.may_touch(disk, start, end) {
            return;
        }
        let from = run.entries.partition_point(|e| e.disk < disk);
        let to = from + run.entries[from..].partition_point(|e| e.disk == disk);
        visit(&run.entries[from..to], start, end, out);
    }
}

fn visit(tree: &[Entry], start: u64, end: u64, out: &mut Vec<Entry>) {
    if tree.is_empty() {
        return;
    }
    let middle = tree.len() / 2;
    let root = &tree[middle];
    if root.furthest <= start {
        return;
    }
    visit(&tree[..middle], start, end, out);
    if root.start < end {
        if root.end() > start {
            out.push(*root);
        }
        visit(&tree[middle + 1..], start, end, out);
    }
}

/// Fills `furthest`; returns the tree's.
fn plant(tree: &mut [Entry]) -> u64 {
    if tree.is_empty() {
        return 0;
    }
    let middle = tree.len() / 2;
    let (left, rest) = tree.split_at_mut(middle);
    let (root, right) = rest.split_first_mut().expect("not empty");
    root.furthest = root.end().max(plant(left)).max(plant(right));
    root.furthest
}

fn build(entries: &mut [Entry]) {
    // Stable: merges what is sorted already.
    entries.sort_by_key(|e| (e.disk, e.start));
    let mut from = 0;
    while from < entries.len() {
        let disk = entries[from].disk;
        let to = from + entries[from..].partition_point(|e| e.disk == disk);
        plant(&mut entries[from..to]);
        from = to;
    }
}

/// The index of one segment.
#[derive(Debug, Default)]
pub struct SegmentIndex {
    first_seq: u64,
    /// Sorted, oldest first.
    runs: Vec<Run>,
    tail: Vec<Entry>,
}

impl SegmentIndex {
    /// Empty; record numbers are counted from `first_seq`.
    pub fn new(first_seq: u64) -> Self {
        Self { first_seq, runs: Vec::new(), tail: Vec::new() }
    }

    /// From which record numbers are counted.
    pub fn first_seq(&self) -> u64 {
        self.first_seq
    }

    /// Adds a record; numbers never fall.
    pub fn add(&mut self, entry: Entry) {
        if self.tail.capacity() == 0 {
            self.tail.reserve_exact(TAIL);
        }
        self.tail.push(entry);
        if self.tail.len() == TAIL {
            let mut run = self.tail.clone();
            self.tail.clear();
            while self.runs.last().is_some_and(|last| last.entries.len() <= 2 * run.len()) {
                let mut older = self.runs.pop().expect("there is a last").entries;
                older.append(&mut run);
                run = older;
            }
            self.runs.push(Run::new(run));
        }
    }

    /// The segment is closed: one run, no spare memory.
    pub fn seal(&mut self) {
        if self.tail.is_empty() && self.runs.len() <= 1 {
            self.tail = Vec::new();
            return;
        }
        let mut all = Vec::with_capacity(self.len());
        for run in self.runs.drain(..) {
            all.extend_from_slice(&run.entries);
        }
        all.append(&mut self.tail);
        self.tail = Vec::new();
        self.runs.push(Run::new(all));
    }

    /// Takes out entries by their places in [`SegmentIndex::entries`], lowest first.
    pub fn remove(&mut self, places: &[usize]) {
        if places.is_empty() {
            return;
        }
        let mut left = Vec::with_capacity(self.len() - places.len());
        let mut next = 0;
        for (place, entry) in self.entries().enumerate() {
            if places.get(next) == Some(&place) {
                next += 1;
            } else {
                left.push(*entry);
            }
        }
        self.tail = Vec::new();
        self.runs.clear();
        if !left.is_empty() {
            self.runs.push(Run::new(left));
        }
    }

    /// Forgets all records numbered `seq` and above.
    pub fn forget_from(&mut self, seq: u64) {
        let limit = seq.saturating_sub(self.first_seq);
        let keep = |entry: &Entry| u64::from(entry.seq_delta) < limit;
        self.tail.retain(keep);
        for run in &mut self.runs {
            if run.entries.iter().any(|entry| !keep(entry)) {
                run.entries.retain(keep);
                build(&mut run.entries);
            }
        }
    }

    /// The data of these chunks of a frame (a bit each) cannot be read any more: their records say so from now on.
    /// `each` gets every record of them as it was.
    pub fn lose(&mut self, frame: u32, chunks: u64, mut each: impl FnMut(&Entry)) {
        let runs = self.runs.iter_mut().flat_map(|run| &mut run.entries);
        for entry in runs.chain(&mut self.tail) {
            if entry.frame == frame && chunks & 1 << entry.chunk != 0 {
                each(entry);
                if entry.kind == EntryKind::Data {
                    entry.kind = EntryKind::Unreadable;
                }
            }
        }
    }

    /// A frame of which chunks were lost can be read again: `find` says where the bytes of a record lie, chunk and first
    /// byte in its payload, if it carries some.
    pub fn regain(&mut self, frame: u32, find: impl Fn(u32) -> Option<(u8, u32)>) {
        let runs = self.runs.iter_mut().flat_map(|run| &mut run.entries);
        for entry in runs.chain(&mut self.tail).filter(|entry| entry.frame == frame) {
            if let Some((chunk, payload_at)) = find(entry.seq_delta) {
                (entry.kind, entry.chunk, entry.payload_at) = (EntryKind::Data, chunk, payload_at);
            }
        }
    }

    /// The parts, newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = IndexPart<'_>> {
        std::iter::once(IndexPart { tail: &self.tail, run: None })
            .chain(self.runs.iter().rev().map(|run| IndexPart { tail: &[], run: Some(run) }))
    }

    /// Every entry, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.runs.iter().flat_map(|run| &run.entries).chain(&self.tail)
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|run| run.entries.len()).sum::<usize>() + self.tail.len()
    }

    /// No entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory, bytes.
    pub fn bytes(&self) -> usize {
        let run = |run: &Run| run.entries.capacity() * size_of::<Entry>() + run.touched.capacity() * 8;
        self.runs.iter().map(run).sum::<usize>() + self.tail.capacity() * size_of::<Entry>()
    }
}
