//! The range lock of a disk: I/Os that overlap are never in flight together, and go in the order in which they came.
//!
//! Held by writes, zeroes and the reads of a synchronisation, from before their first I/O until their record has its
//! number. A range that overlaps an earlier one waits for it, be that one in flight or itself waiting: so two
//! conflicting I/Os are numbered in the order of their arrival, and none is overtaken for ever.
//!
//! Entries lie densely in arrays and are searched in line: with a few hundred in flight that is some ten cache lines,
//! less than any tree costs to keep. Nothing is allocated once the arrays have grown to the greatest number in flight.

/// A range that is held or waited for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct LockId(u32);

#[derive(Debug)]
struct Entry {
    /// Rises with each entry: who came first.
    ticket: u64,
    owner: u32,
    id: u32,
    /// Earlier entries that overlap and are still there; the range is held when there are none.
    blockers: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub struct RangeLock {
    /// Parallel to `entries`: what is searched lies close together.
    ranges: Vec<(u64, u64)>,
    entries: Vec<Entry>,
    /// Where the entry of an id is.
    place: Vec<u32>,
    free: Vec<u32>,
    waiting: usize,
    next_ticket: u64,
}

impl RangeLock {
    /// With room for this many entries before it allocates.
    pub fn with_capacity(entries: usize) -> Self {
        Self {
            ranges: Vec::with_capacity(entries),
            entries: Vec::with_capacity(entries),
            place: Vec::with_capacity(entries),
            free: Vec::with_capacity(entries),
            waiting: 0,
            next_ticket: 0,
        }
    }

    /// Asks for `start..end` in the name of `owner`. True if it is held at once; else the owner is named by the
    /// [`Self::release`] that clears its way.
    pub fn acquire(&mut self, start: u64, end: u64, owner: u32) -> (LockId, bool) {
        debug_assert!(start < end);
        let blockers = self.ranges.iter().map(|(s, e)| u32::from(*s < end && start < *e)).sum();
        let blockers = if mutant!(OverlapUnordered) { 0 } else { blockers };
        let here = self.entries.len() as u32;
        let id = match self.free.pop() {
            Some(id) => {
                self.place[id as usize] = here;
                id
            }
            None => {
                self.place.push(here);
                (self.place.len() - 1) as u32
            }
        };
        self.ranges.push((start, end));
        self.entries.push(Entry { ticket: self.next_ticket, owner, id, blockers });
        self.next_ticket += 1;
        self.waiting += usize::from(blockers > 0);
        (LockId(id), blockers == 0)
    }

    /// Gives a range back, held or waited for; owners whose ranges are held from now on are appended to `granted`, in
    /// the order in which they came.
    pub fn release(&mut self, id: LockId, granted: &mut Vec<u32>) {
        let here = self.place[id.0 as usize] as usize;
        let (start, end) = self.ranges.swap_remove(here);
        let gone = self.entries.swap_remove(here);
        debug_assert_eq!(gone.id, id.0);
        if let Some(moved) = self.entries.get(here) {
            self.place[moved.id as usize] = here as u32;
        }
        self.free.push(id.0);
        self.waiting -= usize::from(gone.blockers > 0);
        if self.waiting == 0 {
            return;
        }
        let first = granted.len();
        let mut last_ticket = 0;
        let mut in_order = true;
        for (range, entry) in self.ranges.iter().zip(&mut self.entries) {
            if entry.ticket > gone.ticket && range.0 < end && start < range.1 {
                entry.blockers -= 1;
                if entry.blockers == 0 {
                    self.waiting -= 1;
                    granted.push(entry.owner);
                    in_order &= entry.ticket >= last_ticket;
                    last_ticket = entry.ticket;
                }
            }
        }
        if !in_order {
            // Those granted together do not overlap each other unless they wait on: only fairness asks for an order.
            let Self { entries, .. } = self;
            granted[first..].sort_unstable_by_key(|owner| {
                entries.iter().find(|e| e.owner == *owner && e.blockers == 0).map_or(u64::MAX, |e| e.ticket)
            });
        }
    }

    /// Ranges held or waited for.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nothing is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn disjoint_ranges_do_not_wait() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(0, 4096, 1).1);
        assert!(lock.acquire(4096, 8192, 2).1);
        assert_eq!(lock.len(), 2);
    }

    #[test]
    fn an_overlap_waits_for_the_earlier() {
        let mut lock = RangeLock::default();
        let (first, _) = lock.acquire(0, 8192, 1);
        assert!(!lock.acquire(4096, 12288, 2).1);
        let mut granted = Vec::new();
        lock.release(first, &mut granted);
        assert_eq!(granted, [2]);
    }

    #[test]
    fn a_later_one_waits_behind_one_that_waits() {
        let mut lock = RangeLock::default();
        let (first, _) = lock.acquire(0, 4096, 1);
        let (second, held) = lock.acquire(0, 12288, 2);
        assert!(!held);
        // Free of the first, but the second came before.
        let (_, held) = lock.acquire(8192, 12288, 3);
        assert!(!held);
        let mut granted = Vec::new();
        lock.release(first, &mut granted);
        assert_eq!(granted, [2]);
        granted.clear();
        lock.release(second, &mut granted);
        assert_eq!(granted, [3]);
    }

    #[test]
    fn one_that_gives_up_waiting_lets_others_go() {
        let mut lock = RangeLock::default();
        let (_first, _) = lock.acquire(0, 4096, 1);
        let (second, _) = lock.acquire(0, 8192, 2);
        assert!(!lock.acquire(4096, 8192, 3).1);
        let mut granted = Vec::new();
        lock.release(second, &mut granted);
        assert_eq!(granted, [3]);
    }

    proptest! {
        /// Never two overlapping holders; conflicting ranges are held in order of arrival; all are held in the end.
        #[test]
        fn holds_what_it_promises(ranges in prop::collection::vec((0u64..40, 1u64..12, any::<u16>()), 1..80)) {
            let mut lock = RangeLock::default();
            let mut ids = Vec::new();
            let mut held: Vec<u32> = Vec::new();
            let mut order: Vec<u32> = Vec::new();
            let mut granted = Vec::new();
            let range = |o: u32| (ranges[o as usize].0, ranges[o as usize].0 + ranges[o as usize].1);
            let overlap = |a: u32, b: u32| range(a).0 < range(b).1 && range(b).0 < range(a).1;
            for owner in 0..ranges.len() as u32 {
                let (start, end) = range(owner);
                let (id, now) = lock.acquire(start, end, owner);
                ids.push(id);
                if now {
                    held.push(owner);
                    order.push(owner);
                }
                if ranges[owner as usize].2 % 3 == 0 && !held.is_empty() {
                    let out = held.remove(ranges[owner as usize].2 as usize % held.len());
                    lock.release(ids[out as usize], &mut granted);
                    held.extend(&granted);
                    order.append(&mut granted);
                }
                for (i, a) in held.iter().enumerate() {
                    prop_assert!(held[..i].iter().all(|b| !overlap(*a, *b)));
                }
            }
            while let Some(out) = held.pop() {
                lock.release(ids[out as usize], &mut granted);
                held.extend(&granted);
                order.append(&mut granted);
            }
            prop_assert_eq!(order.len(), ranges.len());
            prop_assert!(lock.is_empty());
            for (i, a) in order.iter().enumerate() {
                prop_assert!(order[..i].iter().all(|b| !overlap(*a, *b) || b < a));
            }
        }
    }
}
