//! The bytes of one simulated file: what a reader sees, and what would be left after a power loss.
//!
//! The visible content is kept in pages; for every page with unsynced sectors the content that the disk surely has is
//! kept beside it, so that a sync only forgets and a power loss only puts back.

use std::collections::{BTreeMap, BTreeSet};

use super::Rng;

/// What tears: a power loss keeps or loses sectors, bytes.
pub(super) const SECTOR: usize = 512;
/// Granularity of memory and of allocation, bytes.
pub(super) const PAGE: usize = 4096;
const SECTORS: usize = PAGE / SECTOR;

type Page = Box<[u8; PAGE]>;

fn zero_page() -> Page {
    Box::new([0; PAGE])
}

/// The surely durable content of a page that has unsynced sectors.
#[derive(Clone)]
struct Unsynced {
    stable: Page,
    /// Sectors that the next sync makes durable.
    dirty: u8,
    /// Sectors that a failed sync gave up: visible until a power loss, durable never.
    lost: u8,
}

/// Page numbers as ranges: first → one past the last.
#[derive(Clone, Default)]
struct Ranges {
    map: BTreeMap<u64, u64>,
    count: u64,
}

impl Ranges {
    fn remove(&mut self, from: u64, to: u64) {
        while let Some((start, end)) = self.map.range(..to).next_back().map(|(s, e)| (*s, *e)) {
            if end <= from {
                break;
            }
            self.map.remove(&start);
            self.count -= end - start;
            if start < from {
                self.map.insert(start, from);
                self.count += from - start;
            }
            if end > to {
                self.map.insert(to, end);
                self.count += end - to;
            }
        }
    }

    fn insert(&mut self, mut from: u64, mut to: u64) {
        if from >= to {
            return;
        }
        if let Some((start, end)) = self.map.range(..=from).next_back()
            && *end >= from
        {
            from = *start;
            to = to.max(*end);
        }
        if let Some((_, end)) = self.map.range(..=to).next_back() {
            to = to.max(*end);
        }
        self.remove(from, to);
        self.map.insert(from, to);
        self.count += to - from;
    }

    fn overlap(&self, from: u64, to: u64) -> u64 {
        let mut sum = 0;
        for (start, end) in self.map.range(..to).rev() {
            if *end <= from {
                break;
            }
            sum += end.min(&to) - start.max(&from);
        }
        sum
    }
}

/// One file's content.
#[derive(Clone, Default)]
pub(super) struct Content {
    size: u64,
    stable_size: u64,
    pages: BTreeMap<u64, Page>,
    unsynced: BTreeMap<u64, Unsynced>,
    /// What those pages would hold had no write gone astray and nothing rotted.
    meant: BTreeMap<u64, Page>,
    allocated: Ranges,
    /// Rises with whatever may change what a reader sees, or would see had nothing gone wrong.
    pub(super) stamp: u64,
    /// Wall clock of the last change, nanoseconds.
    pub(super) mtime_ns: u64,
}

impl Content {
    /// Durable from the start.
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.write(0, bytes, true);
        content
    }

    /// A copy of what is visible, all of it durable.
    pub(super) fn settled(&self) -> Self {
        Self { unsynced: BTreeMap::new(), meant: BTreeMap::new(), stable_size: self.size, ..self.clone() }
    }

    /// A copy that is put back: its stamp has these upper bits.
    pub(super) fn restored(&self, bits: u64) -> Self {
        Self { stamp: self.stamp & ((1 << 40) - 1) | bits, ..self.clone() }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes it takes on the disk.
    pub(super) fn used(&self) -> u64 {
        self.allocated.count * PAGE as u64
    }

    /// Bytes that a write of this range would take in addition.
    pub(super) fn growth(&self, offset: u64, len: u64) -> u64 {
        let (from, to) = page_span(offset, len);
        (to - from - self.allocated.overlap(from, to)) * PAGE as u64
    }

    /// Fills `out`; what lies past the end reads as zeros.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        let (from, to) = page_span(offset, out.len() as u64);
        let mut pages = self.pages.range(from..to).peekable();
        for_pages(offset, out.len() as u64, |page, within, at| {
            let out = &mut out[at..at + within.len()];
            match pages.next_if(|(number, _)| **number == page) {
                Some((_, bytes)) => out.copy_from_slice(&bytes[within]),
                None => out.fill(0),
            }
        });
    }

    /// As [`Content::read`], of what would be there had no write gone astray and nothing rotted.
    pub(super) fn read_meant(&self, offset: u64, out: &mut [u8]) {
        self.read(offset, out);
        if self.meant.is_empty() {
            return;
        }
        for_pages(offset, out.len() as u64, |page, within, at| {
            if let Some(bytes) = self.meant.get(&page) {
                out[at..at + within.len()].copy_from_slice(&bytes[within]);
            }
        });
    }

    /// These bytes should have been written, and were not.
    pub(super) fn lose(&mut self, offset: u64, bytes: &[u8]) {
        self.stamp += 1;
        self.keep_meant(offset, bytes.len() as u64);
        for_pages(offset, bytes.len() as u64, |page, within, at| {
            if let Some(meant) = self.meant.get_mut(&page) {
                meant[within.clone()].copy_from_slice(&bytes[at..at + within.len()]);
            }
        });
    }

    /// These bytes are written, and should not have been.
    pub(super) fn harm(&mut self, offset: u64, bytes: &[u8], durable: bool) {
        self.keep_meant(offset, bytes.len() as u64);
        let meant = std::mem::take(&mut self.meant);
        self.write(offset, bytes, durable);
        self.meant = meant;
    }

    fn keep_meant(&mut self, offset: u64, len: u64) {
        let (from, to) = page_span(offset, len);
        for page in from..to {
            let visible = || self.pages.get(&page).cloned().unwrap_or_else(zero_page);
            self.meant.entry(page).or_insert_with(visible);
        }
    }

    /// What is there is what is meant from now on.
    pub(super) fn accept(&mut self) {
        self.stamp += u64::from(!self.meant.is_empty());
        self.meant.clear();
    }

    /// Writes; on stable storage at once if `durable`, including a new length.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) {
        let len = bytes.len() as u64;
        let (from, to) = page_span(offset, len);
        self.stamp += 1;
        self.allocated.insert(from, to);
        for_pages(offset, len, |page, within, at| {
            if durable {
                self.settle(page, within.clone());
            } else {
                self.remember(page, within.clone());
            }
            let target = self.pages.entry(page).or_insert_with(zero_page);
            let source = &bytes[at..at + within.len()];
            target[within.clone()].copy_from_slice(source);
            if let Some(meant) = self.meant.get_mut(&page) {
                meant[within.clone()].copy_from_slice(source);
            }
            if durable && let Some(unsynced) = self.unsynced.get_mut(&page) {
                // A durable write of part of a sector (small files only) makes that part durable.
                unsynced.stable[within].copy_from_slice(source);
            }
        });
        self.size = self.size.max(offset + len);
        if durable {
            self.stable_size = self.size;
        }
    }

    /// Writes only those sectors that `keep` picks, durably: what a write leaves that a power loss or an error broke.
    pub(super) fn write_torn(&mut self, offset: u64, bytes: &[u8], mut keep: impl FnMut() -> bool) {
        let stable_size = self.stable_size;
        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
            let at = offset + (number * SECTOR) as u64;
            // A file's length never covers what was not written before it, so a torn tail does not lengthen it.
            if at + sector.len() as u64 <= self.size && keep() {
                self.write(at, sector, true);
            }
        }
        self.stable_size = stable_size;
    }

    /// The range reads as zeros; whole pages are given back if `unmap`, and are allocated otherwise.
    pub(super) fn zero(&mut self, offset: u64, len: u64, unmap: bool) {
        self.stamp += 1;
        // As with KEEP_SIZE: what lies past the end stays past the end.
        let (from, to) = page_span(offset, len);
        for (page, meant) in self.meant.range_mut(from..to) {
            let start = offset.max(page * PAGE as u64) - page * PAGE as u64;
            let end = (offset + len).min((page + 1) * PAGE as u64) - page * PAGE as u64;
            meant[start as usize..end as usize].fill(0);
        }
        // A hole that a failed sync gave up is made again: it is as new as the bytes of a write that is repeated.
        let there = self.pages.range(from..to).map(|(page, _)| *page);
        let touched: BTreeSet<u64> = there.chain(self.unsynced.range(from..to).map(|(page, _)| *page)).collect();
        for page in touched {
            let start = offset.max(page * PAGE as u64) - page * PAGE as u64;
            let end = (offset + len).min((page + 1) * PAGE as u64) - page * PAGE as u64;
            let within = start as usize..end as usize;
            self.remember(page, within.clone());
            if within.len() == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[within].fill(0);
            }
        }
        let whole = (offset.div_ceil(PAGE as u64), (offset + len) / PAGE as u64);
        if !unmap {
            self.allocated.insert(from, to);
        } else if whole.0 < whole.1 {
            self.allocated.remove(whole.0, whole.1);
        }
    }

    pub(super) fn set_len(&mut self, len: u64, allocate: bool) {
        if len < self.size {
            self.zero(len, self.size - len, true);
        }
        self.size = len;
        self.stamp += 1;
        if allocate {
            self.allocated.insert(0, len.div_ceil(PAGE as u64));
        }
    }

    /// How far from `offset` it is one hole, or one piece of data, up to the end.
    pub(super) fn allocation(&self, offset: u64) -> (u64, bool) {
        let first = offset / PAGE as u64;
        let end = self.size.div_ceil(PAGE as u64);
        let hole = !self.pages.contains_key(&first);
        let mut page = first + 1;
        if hole {
            page = self.pages.range(first..).next().map_or(end, |(page, _)| *page).min(end);
        } else {
            while page < end && self.pages.contains_key(&page) {
                page += 1;
            }
        }
        ((page * PAGE as u64).min(self.size) - offset, hole)
    }

    /// Everything visible is durable, but for what a failed sync gave up.
    pub(super) fn sync(&mut self) {
        self.unsynced.retain(|_, unsynced| {
            unsynced.dirty = 0;
            unsynced.lost != 0
        });
        self.stable_size = self.size;
    }

    /// Some sectors are durable, the others never will be, though readers see them for now.
    pub(super) fn fail_sync(&mut self, rng: &mut Rng) {
        for (number, unsynced) in &mut self.unsynced {
            for sector in 0..SECTORS {
                let bit = 1 << sector;
                if unsynced.dirty & bit == 0 {
                    continue;
                }
                unsynced.dirty &= !bit;
                if rng.chance(0.5) {
                    unsynced.lost |= bit;
                } else {
                    copy_sector(self.pages.get(number), &mut unsynced.stable, sector);
                }
            }
        }
        self.unsynced.retain(|_, unsynced| unsynced.dirty | unsynced.lost != 0);
    }

    /// Each dirty sector may be written back by the disk of its own accord, as caches do.
    pub(super) fn write_back(&mut self, offset: u64, len: u64, rng: &mut Rng) {
        let (from, to) = page_span(offset, len);
        for (number, unsynced) in self.unsynced.range_mut(from..to) {
            for sector in 0..SECTORS {
                if unsynced.dirty & (1 << sector) != 0 && rng.chance(0.25) {
                    copy_sector(self.pages.get(number), &mut unsynced.stable, sector);
                }
            }
        }
    }

    /// Each unsynced sector survives with probability `keep`; the others fall back to what was durable.
    pub(super) fn power_loss(&mut self, rng: &mut Rng, keep: f64) {
        self.accept();
        self.stamp += 1;
        for (number, unsynced) in std::mem::take(&mut self.unsynced) {
            let page = self.pages.entry(number).or_insert_with(zero_page);
            for sector in 0..SECTORS {
                let bit = 1 << sector;
                let falls_back = unsynced.lost & bit != 0 || (unsynced.dirty & bit != 0 && !rng.chance(keep));
                if falls_back {
                    let range = sector * SECTOR..(sector + 1) * SECTOR;
                    page[range.clone()].copy_from_slice(&unsynced.stable[range]);
                }
            }
            self.allocated.insert(number, number + 1);
        }
        if self.size != self.stable_size && !rng.chance(keep) {
            self.size = self.stable_size;
        }
        // What lies past the end that is left never existed.
        let end = self.size;
        self.pages.retain(|page, _| page * (PAGE as u64) < end);
        if let Some(last) = self.pages.get_mut(&(end / PAGE as u64)) {
            last[(end % PAGE as u64) as usize..].fill(0);
        }
        self.allocated.remove(end.div_ceil(PAGE as u64), u64::MAX);
        self.stable_size = end;
    }

    /// Before an unsynced change of these bytes of a page: keep what is durable.
    fn remember(&mut self, page: u64, within: std::ops::Range<usize>) {
        let visible = self.pages.get(&page);
        let unsynced = self.unsynced.entry(page).or_insert_with(|| Unsynced {
            stable: visible.cloned().unwrap_or_else(zero_page),
            dirty: 0,
            lost: 0,
        });
        for sector in within.start / SECTOR..within.end.div_ceil(SECTOR) {
            let bit = 1 << sector;
            // The durable content of a clean sector is the visible one, which may be newer than the page's first copy.
            if (unsynced.dirty | unsynced.lost) & bit == 0 {
                copy_sector(visible, &mut unsynced.stable, sector);
            }
            unsynced.lost &= !bit;
            unsynced.dirty |= bit;
        }
    }

    /// Before a durable change of these bytes of a page: whole sectors need nothing kept any more.
    fn settle(&mut self, page: u64, within: std::ops::Range<usize>) {
        let Some(unsynced) = self.unsynced.get_mut(&page) else { return };
        for sector in within.start.div_ceil(SECTOR)..within.end / SECTOR {
            let bit = 1 << sector;
            unsynced.dirty &= !bit;
            unsynced.lost &= !bit;
        }
        if unsynced.dirty | unsynced.lost == 0 {
            self.unsynced.remove(&page);
        }
    }
}

fn copy_sector(from: Option<&Page>, to: &mut Page, sector: usize) {
    let range = sector * SECTOR..(sector + 1) * SECTOR;
    match from {
        Some(page) => to[range.clone()].copy_from_slice(&page[range]),
        None => to[range].fill(0),
    }
}

fn page_span(offset: u64, len: u64) -> (u64, u64) {
    (offset / PAGE as u64, (offset + len).div_ceil(PAGE as u64))
}

/// Calls `each(page, bytes within the page, position in the buffer)`.
fn for_pages(offset: u64, len: u64, mut each: impl FnMut(u64, std::ops::Range<usize>, usize)) {
    let mut at = 0;
    while at < len {
        let page = (offset + at) / PAGE as u64;
        let start = ((offset + at) % PAGE as u64) as usize;
        let end = PAGE.min(start + (len - at) as usize);
        each(page, start..end, at as usize);
        at += (end - start) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &Content, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0xee; len];
        content.read(offset, &mut out);
        out
    }

    #[test]
    fn what_was_meant_is_known_beside_what_is_there() {
        let meant = |content: &Content, offset: u64, len: usize| {
            let mut out = vec![0xee; len];
            content.read_meant(offset, &mut out);
            out
        };
        let mut content = Content::from_bytes(&[1; 12288]);
        content.lose(4000, &[2; 200]);
        content.harm(8192, &[3; 512], true);
        assert_eq!(read(&content, 0, 8192), [1; 8192]);
        assert_eq!(read(&content, 8192, 512), [3; 512]);
        assert_eq!((meant(&content, 4000, 200), meant(&content, 8192, 512)), (vec![2; 200], vec![1; 512]));
        content.write(4096, &[4; 8], true);
        content.zero(8192, 100, false);
        assert_eq!(meant(&content, 4090, 20), [[2; 6].as_slice(), &[4; 8], &[2; 6]].concat());
        assert_eq!(meant(&content, 8192, 200), [[0; 100], [1; 100]].concat());
        content.accept();
        assert_eq!(meant(&content, 4090, 20), read(&content, 4090, 20));
    }

    #[test]
    fn an_unsynced_write_is_lost_with_the_power() {
        let mut content = Content::from_bytes(&[1; 8192]);
        content.write(512, &[2; 1024], false);
        assert_eq!(read(&content, 512, 1024), [2; 1024]);
        content.power_loss(&mut Rng::new(1), 0.0);
        assert_eq!(read(&content, 0, 8192), [1; 8192]);
    }

    #[test]
    fn a_synced_or_durable_write_stays() {
        let mut content = Content::from_bytes(&[1; 8192]);
        content.write(0, &[2; 512], false);
        content.sync();
        content.write(512, &[3; 512], true);
        content.write(1024, &[4; 512], false);
        content.power_loss(&mut Rng::new(1), 0.0);
        assert_eq!(read(&content, 0, 512), [2; 512]);
        assert_eq!(read(&content, 512, 512), [3; 512]);
        assert_eq!(read(&content, 1024, 512), [1; 512]);
    }

    #[test]
    fn after_a_failed_sync_a_later_sync_saves_nothing() {
        let mut content = Content::from_bytes(&[0; 65536]);
        content.write(0, &[7; 65536], false);
        content.fail_sync(&mut Rng::new(3));
        content.sync();
        assert_eq!(read(&content, 0, 65536), [7; 65536]);
        content.power_loss(&mut Rng::new(4), 1.0);
        let kept = read(&content, 0, 65536).chunks(512).filter(|s| s[0] == 7).count();
        assert!(kept > 0 && kept < 128, "{kept} of 128 sectors kept");
        content.write(0, &[8; 65536], false);
        content.sync();
        content.power_loss(&mut Rng::new(5), 0.0);
        assert_eq!(read(&content, 0, 65536), [8; 65536]);
    }

    #[test]
    fn zeros_after_a_failed_sync_are_as_durable_as_bytes_are() {
        for unmap in [true, false] {
            let mut content = Content::from_bytes(&[7; 2 * PAGE]);
            content.zero(0, PAGE as u64, unmap);
            content.fail_sync(&mut Rng::new(1));
            content.zero(0, PAGE as u64, unmap);
            content.sync();
            content.power_loss(&mut Rng::new(1), 0.0);
            assert_eq!(read(&content, 0, PAGE), vec![0; PAGE]);
        }
    }

    #[test]
    fn an_unsynced_length_may_fall_back() {
        let mut content = Content::from_bytes(&[1; 512]);
        content.write(4096, &[2; 512], false);
        assert_eq!(content.size(), 4608);
        content.power_loss(&mut Rng::new(1), 0.0);
        assert_eq!(content.size(), 512);
        content.set_len(8192, false);
        assert_eq!(read(&content, 4096, 512), [0; 512]);
    }

    #[test]
    fn zeroing_gives_space_back_only_when_asked() {
        let mut content = Content::from_bytes(&[1; 16384]);
        assert_eq!(content.used(), 16384);
        content.zero(4096, 4096, false);
        assert_eq!(content.used(), 16384);
        content.zero(8192, 4096, true);
        assert_eq!(content.used(), 12288);
        assert_eq!(read(&content, 4096, 8192), [0; 8192]);
        assert_eq!(content.allocation(0), (4096, false));
        assert_eq!(content.allocation(4096), (8192, true));
        assert_eq!(content.growth(0, 16384), 4096);
    }

    #[test]
    fn ranges_merge_and_split() {
        let mut ranges = Ranges::default();
        ranges.insert(0, 4);
        ranges.insert(6, 8);
        ranges.insert(3, 6);
        assert_eq!((ranges.count, ranges.map.len()), (8, 1));
        ranges.remove(2, 3);
        assert_eq!((ranges.count, ranges.map.len()), (7, 2));
        assert_eq!(ranges.overlap(0, 4), 3);
        ranges.remove(0, u64::MAX);
        assert_eq!((ranges.count, ranges.map.len()), (0, 0));
    }
}
