//! The write-intent log of a disk: which extents may differ from the replica. See [`afterimage_wire::intent`] for the
//! file.
//!
//! An extent's bit is durable before the first write into it is issued, and stays while anything holds it:
//! - a write in flight,
//! - a record that is not acknowledged,
//! - a completed write that no later-issued, successful flush covers (after power loss the disk may have lost what the
//!   replica has),
//! - the dirty map, or a range that could not be written or read.
//!
//! Bits nobody holds are cleared lazily, above a bound, those first that were not touched lately, and those that only a
//! synchronisation has touched in any case: a header that names
//! the acknowledged place is made durable, then every candidate is judged again, then the pages are written. A crash
//! in between leaves bits set, never the reverse. A load that meets clean extents all the time, such as random writes all
//! over a large disk, waits for a write of the log each time: then neighbours are marked ahead, more and more of them, and
//! bits stay for longer. That costs a longer comparison after a crash, and ends with the load.
//!
//! The *dirty map* is what the next synchronisation reads: a bitmap in memory, every extent of which has its bit set in
//! the file. A whole synchronisation begins with all of it. So what a synchronisation has done is known after a crash:
//! its extents' bits are cleared like those of any write, once the record that compared or sent them is acknowledged.
//!
//! One write of the log is in flight at a time; who waits for a bit waits for a page write that began after the bit
//! was set, so any number of writers share one.
//!
//! Nobody could tell an older copy of the log, put in its place, from the log: both are whole, and the bits of what was
//! written since are missing. So each write has a serial, and a *witness*, a small file in another place, follows: a write
//! of the log that says more than before (a header, or a page with a new bit) counts as durable only once the witness
//! names it. Whatever rests on it comes later. A log behind its witness is an older copy; a witness behind its log was cut
//! short by a crash, and nothing rests on what it does not name. See decision 14.

use std::collections::VecDeque;

use afterimage_wire::ALIGN;
use afterimage_wire::intent::{EXTENT, IntentHeader, PAGE_BITS, PAGES_AT, Witness, encode_page};

use crate::io::{Buf, Done, Errno, File, Io, Nanos, Op, Part, Token};

mod load;
pub use load::{Loaded, Verdict, load};

/// After a failed write of the log, the next attempt comes this much later.
const RETRY: Nanos = 100_000_000;
/// After this many failed attempts in a row, writes that wait for a bit are failed: the disk cannot be written safely.
const MAX_FAILURES: u32 = 20;
/// A header is written at least every so many writes: a page's stamp is the lower half of its serial.
const MAX_SINCE_HEADER: u64 = 1 << 30;
/// A bit is cleared at the earliest after this many ticks without a touch …
const COLD_TICKS: u32 = 2;
/// … or at most this many, while writes meet clean extents all the time.
const MAX_COLD_TICKS: u32 = 64;
/// So many page writes with a new bit in a tick are many: for each such number twice as many extents are marked at once.
const MANY_SETS: u32 = 64;
/// Most extents that one write into a clean one marks.
const MAX_SPREAD: u32 = 1024;

const PAGE_BYTES: usize = (PAGE_BITS / 8) as usize;
const NONE: u32 = u32::MAX;

/// Bytes of the log of a disk of that size.
pub fn log_len(size: u64) -> u64 {
    PAGES_AT + size.div_ceil(EXTENT).div_ceil(PAGE_BITS) * ALIGN as u64
}

/// An extent that something but the dirty map holds.
#[derive(Debug)]
struct Hot {
    extent: u32,
    /// I/Os under way.
    in_flight: u32,
    /// Version of the page in which the bit is set.
    version: u64,
    /// Newest record on the extent.
    last_seq: u64,
    /// Flush epoch of the newest completed write that was not durable by itself; 0 for none.
    epoch: u64,
    /// Tick of the last touch.
    touched: u32,
    /// Being compared or read by a synchronisation.
    syncing: bool,
    /// A host has written there since a synchronisation last read it: it may do so again.
    used: bool,
    /// Held until the disk is opened anew: unreadable, or written before a sync that failed.
    stuck: bool,
}

#[derive(Debug, Default)]
struct Page {
    /// Rises with each change.
    wanted: u64,
    /// Version that is durable.
    durable: u64,
    queued: bool,
    /// It has a bit that its last write did not.
    sets: bool,
    /// Version in which all its bits were set for a whole synchronisation, until that is durable; else 0.
    mapped: u64,
}

#[derive(Copy, Clone, Debug)]
enum Writing {
    /// The header, as of this version.
    Header(u64),
    /// A page, as of this version; whether it has a bit that is new.
    Page(u32, u64, bool),
}

/// How an I/O on extents ended.
#[derive(Copy, Clone, Debug, Default)]
pub struct Outcome {
    /// The record's number, if there is one.
    pub seq: Option<u64>,
    /// Current flush epoch, if a flush must still cover it.
    pub epoch: u64,
    /// The range could not be read: held until opened anew.
    pub stuck: bool,
}

/// What holds beyond the log itself, when bits are cleared.
#[derive(Copy, Clone, Debug)]
pub struct Covered {
    /// Acknowledged place.
    pub frame: u64,
    /// Its record.
    pub seq: u64,
    /// Newest flush epoch that was flushed.
    pub epoch: u64,
    /// Bits that may stay set with nothing holding them.
    pub bound: usize,
}

/// See the module.
#[derive(Debug)]
pub struct IntentLog {
    file: File,
    /// Follows the log, if there is one.
    witness: Option<File>,
    token: Token,
    /// Extent → place in `hot`, or none.
    slots: Vec<u32>,
    hot: Vec<Hot>,
    /// The dirty map: a bit for each extent.
    todo: Vec<u64>,
    dirty: usize,
    bits: Vec<u8>,
    /// Bits set in `bits`.
    set: usize,
    /// Pages whose bits, all set, are not durable yet.
    unmapped: usize,
    pages: Vec<Page>,
    queue: VecDeque<u32>,
    /// 4 KiB; with the kernel while a write is in flight.
    buf: Option<Buf>,
    writing: Option<Writing>,
    /// What is in flight is the witness of that write, which has been done.
    witnessing: bool,
    /// Serial of the newest write that was begun.
    serial: u64,
    /// Where the newest header stands.
    slot: u8,
    header: IntentHeader,
    header_version: u64,
    header_durable: u64,
    /// What the header being written says: not what is set meanwhile.
    pending: IntentHeader,
    /// What the durable header says.
    durable: IntentHeader,
    failures: u32,
    retry_at: Option<Nanos>,
    tick: u32,
    /// Page writes with a new bit in this tick.
    sets: u32,
    /// Extents that a write into a clean one marks, itself among them: its neighbours, aligned.
    spread: u32,
    /// Ticks without a touch until a bit may be cleared.
    cold: u32,
    clear_after: Option<u64>,
}

impl IntentLog {
    /// A log over an open file, with the extents that `loaded` says are set. Nothing is written yet: the caller sets
    /// the header; `rewrite` queues every page as well.
    pub(crate) fn new(file: File, token: Token, size: u64, header: IntentHeader, loaded: &Loaded, buf: Buf) -> Self {
        let extents = size.div_ceil(EXTENT) as usize;
        let pages = (extents as u64).div_ceil(PAGE_BITS) as usize;
        let mut log = Self {
            file,
            witness: None,
            token,
            slots: vec![NONE; extents],
            hot: Vec::with_capacity(1024),
            todo: vec![0; extents.div_ceil(64)],
            dirty: 0,
            bits: vec![0; pages * PAGE_BYTES],
            set: 0,
            unmapped: 0,
            pages: (0..pages).map(|_| Page::default()).collect(),
            queue: VecDeque::with_capacity(pages),
            buf: Some(buf),
            writing: None,
            witnessing: false,
            serial: header.serial,
            slot: loaded.slot,
            header,
            header_version: 0,
            header_durable: 0,
            pending: header,
            durable: header,
            failures: 0,
            retry_at: None,
            tick: COLD_TICKS,
            sets: 0,
            spread: 1,
            cold: COLD_TICKS,
            clear_after: None,
        };
        for extent in &loaded.extents {
            log.mark(*extent);
        }
        // What was read is what is durable; a torn page counts as all set, so its bits are, too.
        log.queue.clear();
        for (page, state) in log.pages.iter_mut().enumerate() {
            state.durable = state.wanted;
            state.queued = loaded.rewrite || loaded.torn.contains(&(page as u32));
            state.sets = false;
            if state.queued {
                state.wanted += 1;
                log.queue.push_back(page as u32);
            }
        }
        log
    }

    /// From now on the log is followed by a witness in this file, which is behind it.
    pub(crate) fn witnessed_by(&mut self, file: File) {
        self.witness = Some(file);
    }

    /// After a clean stop that left records up to `seq` in the spill: nothing is in doubt, and the bits are held by those
    /// records alone. Everything was flushed.
    pub(crate) fn trust_until(&mut self, seq: u64) {
        while let Some(extent) = self.next_dirty(0) {
            self.todo[extent as usize / 64] &= !(1 << (extent % 64));
            self.dirty -= 1;
            let at = self.hot_index(extent);
            self.hot[at].last_seq = seq;
        }
    }

    fn hot_index(&mut self, extent: u32) -> usize {
        let slot = self.slots[extent as usize];
        if slot != NONE {
            return slot as usize;
        }
        self.change(extent, true);
        self.slots[extent as usize] = self.hot.len() as u32;
        self.hot.push(Hot {
            extent,
            in_flight: 0,
            // For one that the dirty map had set before, not later than this.
            version: self.pages[(extent / PAGE_BITS as u32) as usize].wanted,
            last_seq: 0,
            epoch: 0,
            touched: self.tick,
            syncing: false,
            used: false,
            stuck: false,
        });
        self.hot.len() - 1
    }

    /// Sets or clears a bit, if it is not as wanted.
    fn change(&mut self, extent: u32, set: bool) {
        let page = extent / PAGE_BITS as u32;
        let bit = extent as usize % PAGE_BITS as usize;
        let byte = &mut self.bits[page as usize * PAGE_BYTES + bit / 8];
        let mask = 1 << (bit % 8);
        if (*byte & mask != 0) == set {
            return;
        }
        *byte ^= mask;
        if set {
            self.set += 1;
            self.pages[page as usize].sets = true;
        } else {
            self.set -= 1;
        }
        self.want_page(page);
    }

    fn want_page(&mut self, page: u32) {
        let state = &mut self.pages[page as usize];
        state.wanted += 1;
        if !state.queued {
            state.queued = true;
            self.queue.push_back(page);
        }
    }

    fn is_dirty(&self, extent: u32) -> bool {
        self.todo[extent as usize / 64] >> (extent % 64) & 1 == 1
    }

    /// Puts an extent in the dirty map.
    fn mark(&mut self, extent: u32) {
        if !self.is_dirty(extent) {
            self.todo[extent as usize / 64] |= 1 << (extent % 64);
            self.dirty += 1;
            self.change(extent, true);
        }
    }

    /// Puts every extent in the dirty map, for a whole synchronisation that begins at zero. The header, which must say
    /// so before anything else does, is the caller's; [`Self::is_mapped`] tells when the bits are durable.
    pub fn mark_all(&mut self) {
        for extent in 0..self.slots.len() as u32 {
            self.mark(extent);
        }
        self.map_pages(0);
    }

    /// The disk has grown: what is new is in the dirty map. The header names the old size until the bits of what is new
    /// are durable, see [`Self::is_mapped`].
    ///
    /// # Errors
    /// The log's file cannot grow; nothing has changed.
    pub fn grow(&mut self, io: &mut impl Io, from: u64, to: u64) -> Result<(), Errno> {
        io.set_len(self.file, log_len(to), true)?;
        self.enlarge(from, to);
        Ok(())
    }

    /// As [`Self::grow`], of a log whose file is long enough.
    pub fn enlarge(&mut self, from: u64, to: u64) {
        let extents = to.div_ceil(EXTENT) as usize;
        let pages = (extents as u64).div_ceil(PAGE_BITS) as usize;
        self.slots.resize(extents, NONE);
        self.todo.resize(extents.div_ceil(64), 0);
        self.bits.resize(pages * PAGE_BYTES, 0);
        self.pages.resize_with(pages, Page::default);
        self.mark_dirty(from, to);
        self.map_pages((from / EXTENT / PAGE_BITS) as u32);
    }

    /// Writes all pages from `first` on anew, and remembers until when.
    fn map_pages(&mut self, first: u32) {
        for page in first..self.pages.len() as u32 {
            self.want_page(page);
            let state = &mut self.pages[page as usize];
            state.sets = true;
            self.unmapped += usize::from(state.mapped == 0);
            state.mapped = state.wanted;
        }
    }

    /// What [`Self::mark_all`] or [`Self::grow`] has set is durable.
    pub fn is_mapped(&self) -> bool {
        self.unmapped == 0
    }

    /// Extents of the disk.
    pub fn extents_of_disk(&self) -> usize {
        self.slots.len()
    }

    fn extents(start: u64, end: u64) -> std::ops::Range<u32> {
        (start / EXTENT) as u32..end.div_ceil(EXTENT) as u32
    }

    /// Counts an I/O on `start..end` as in flight and sets its bits. True if they are durable: it may be issued. Else
    /// ask [`Self::ready`] after each completion of the log.
    pub fn hold(&mut self, start: u64, end: u64) -> bool {
        let mut ready = true;
        for extent in Self::extents(start, end) {
            if self.spread > 1 && self.slots[extent as usize] == NONE {
                self.mark_around(extent);
            }
            let at = self.hot_index(extent);
            let hot = &mut self.hot[at];
            hot.in_flight += 1;
            hot.touched = self.tick;
            hot.used = true;
            ready &= self.pages[(extent / PAGE_BITS as u32) as usize].durable >= hot.version;
        }
        ready
    }

    /// Marks the neighbours of a clean extent, too: one page write serves them all, and under a load that comes everywhere
    /// they are next. Nothing holds their bits: they are cleared when they have gone cold.
    fn mark_around(&mut self, extent: u32) {
        let first = (extent / self.spread * self.spread).max(extent / PAGE_BITS as u32 * PAGE_BITS as u32);
        let last = (extent / self.spread * self.spread + self.spread).min(self.slots.len() as u32);
        for other in (first..last).take_while(|other| other / PAGE_BITS as u32 == extent / PAGE_BITS as u32) {
            if self.slots[other as usize] == NONE && !self.is_dirty(other) {
                let at = self.hot_index(other);
                self.hot[at].used = true;
            }
        }
    }

    /// True if every bit of the range is durable.
    pub fn ready(&self, start: u64, end: u64) -> bool {
        Self::extents(start, end).all(|extent| {
            let slot = self.slots[extent as usize];
            slot != NONE && self.pages[(extent / PAGE_BITS as u32) as usize].durable >= self.hot[slot as usize].version
        })
    }

    /// Ends what [`Self::hold`] began.
    pub fn release(&mut self, start: u64, end: u64, outcome: Outcome) {
        for extent in Self::extents(start, end) {
            if mutant!(BitBySecondWrite) && self.slots[extent as usize] == NONE {
                continue;
            }
            let hot = &mut self.hot[self.slots[extent as usize] as usize];
            hot.in_flight = if mutant!(BitBySecondWrite) { 0 } else { hot.in_flight - 1 };
            Self::settle(hot, outcome);
        }
    }

    fn settle(hot: &mut Hot, outcome: Outcome) {
        hot.last_seq = hot.last_seq.max(outcome.seq.unwrap_or(0));
        hot.epoch = hot.epoch.max(outcome.epoch);
        hot.stuck |= outcome.stuck;
    }

    /// A record of a synchronisation on the range: holds those bits that are set.
    pub fn note(&mut self, start: u64, end: u64, outcome: Outcome) {
        for extent in Self::extents(start, end) {
            let slot = self.slots[extent as usize];
            if slot != NONE {
                Self::settle(&mut self.hot[slot as usize], outcome);
            } else if outcome.stuck {
                let at = self.hot_index(extent);
                Self::settle(&mut self.hot[at], outcome);
            }
        }
    }

    /// Puts the range in the dirty map. For a write that passes uncaptured its bits must be durable (see
    /// [`Self::hold`]); whoever else asks for a range to be read again does so anew after a crash.
    pub fn mark_dirty(&mut self, start: u64, end: u64) {
        for extent in Self::extents(start, end) {
            let slot = self.slots[extent as usize];
            if mutant!(ResyncForgetsRewrite) && slot != NONE && self.hot[slot as usize].syncing {
                continue;
            }
            self.mark(extent);
        }
    }

    /// Everything that is not acknowledged goes to the dirty map: its records are lost (a new incarnation begins).
    pub fn unacked_to_dirty(&mut self, acked_seq: u64) {
        for at in 0..self.hot.len() {
            let hot = &mut self.hot[at];
            let lost = hot.syncing || hot.last_seq > acked_seq;
            hot.syncing = false;
            hot.last_seq = 0;
            let extent = hot.extent;
            if lost {
                self.mark(extent);
            }
        }
    }

    /// The first dirty extent at or after `from`, or the first of all.
    pub fn next_dirty(&self, from: u32) -> Option<u32> {
        if self.dirty == 0 {
            return None;
        }
        let words = self.todo.len();
        let begin = (from as usize / 64).min(words - 1);
        let masked = |word: usize, mask: u64| {
            let bits = self.todo[word] & mask;
            (bits != 0).then(|| (word * 64) as u32 + bits.trailing_zeros())
        };
        let first = masked(begin, u64::MAX << (from % 64));
        first.or_else(|| (begin + 1..words).chain(0..=begin).find_map(|word| masked(word, u64::MAX)))
    }

    /// First byte past the dirty extents that follow one another from `extent` on, within `end`.
    pub fn dirty_until(&self, extent: u32, end: u64) -> u64 {
        let last = end.div_ceil(EXTENT).min(self.slots.len() as u64) as u32;
        let next = (extent..last).find(|extent| !self.is_dirty(*extent)).unwrap_or(last);
        u64::from(next) * EXTENT
    }

    /// A synchronisation begins with the range: it leaves the dirty map, and its bits are held.
    pub fn sync_begin(&mut self, start: u64, end: u64) {
        for extent in Self::extents(start, end) {
            if self.is_dirty(extent) {
                self.todo[extent as usize / 64] &= !(1 << (extent % 64));
                self.dirty -= 1;
            }
            let at = self.hot_index(extent);
            let hot = &mut self.hot[at];
            hot.syncing = true;
            hot.used = hot.in_flight > 0;
            hot.touched = self.tick;
            // Written by an earlier life, perhaps, and unknown when flushed: any flush of this one will do.
            hot.epoch = hot.epoch.max(1);
        }
    }

    /// Every record of the range has its number, and every question about it its answer. What was written uncaptured
    /// meanwhile is in the dirty map again.
    pub fn sync_done(&mut self, start: u64, end: u64) {
        for extent in Self::extents(start, end) {
            let slot = self.slots[extent as usize];
            if slot != NONE {
                self.hot[slot as usize].syncing = false;
            }
        }
    }

    /// A sync failed: nothing is known of writes that were not flushed until `epoch`, whatever a later sync says.
    pub fn stick_unflushed(&mut self, epoch: u64) {
        for hot in &mut self.hot {
            hot.stuck |= hot.epoch > epoch;
        }
    }

    /// Extents whose bit is set.
    pub fn hot(&self) -> usize {
        self.set
    }

    /// Extents in the dirty map, not counting those being compared or read.
    pub fn dirty(&self) -> usize {
        self.dirty
    }

    /// Something is in the dirty map or held for good.
    pub fn owes(&self) -> bool {
        self.dirty > 0 || self.hot.iter().any(|h| h.syncing || h.stuck || h.in_flight > 0)
    }

    /// Changes the header; durable when [`Self::header_done`] says so of the returned ticket.
    pub fn set_header(&mut self, change: impl FnOnce(&mut IntentHeader)) -> u64 {
        change(&mut self.header);
        self.header_version += 1;
        self.header_version
    }

    /// Says that a synchronisation has begun whose end is not acknowledged.
    pub fn owe_end(&mut self) {
        if !self.header.sync_owed {
            self.set_header(|h| h.sync_owed = true);
        }
    }

    /// The header as of that ticket, or a later one, is durable.
    pub fn header_done(&self, ticket: u64) -> bool {
        self.header_durable >= ticket
    }

    /// What the header says or will say.
    pub fn header(&self) -> &IntentHeader {
        &self.header
    }

    /// What the durable header says.
    pub fn durable_header(&self) -> &IntentHeader {
        &self.durable
    }

    /// Everything queued is durable.
    pub fn is_settled(&self) -> bool {
        self.writing.is_none() && self.queue.is_empty() && self.header_durable == self.header_version
    }

    /// The log cannot be written: writes into clean extents must fail.
    pub fn is_broken(&self) -> bool {
        self.failures >= MAX_FAILURES
    }

    /// A write of the log is with the kernel.
    pub fn in_flight(&self) -> bool {
        self.writing.is_some()
    }

    /// When a failed write is tried again.
    pub fn deadline(&self) -> Option<Nanos> {
        self.retry_at
    }

    /// Issues the next write, if one is due.
    pub fn pump(&mut self, io: &mut impl Io) {
        if self.writing.is_some() {
            return;
        }
        if self.serial - self.durable.serial >= MAX_SINCE_HEADER {
            self.header_version += 1;
        }
        let header = self.header_durable < self.header_version;
        if !header && self.queue.is_empty() {
            return;
        }
        if self.retry_at.is_some_and(|at| io.now() < at) {
            return;
        }
        self.retry_at = None;
        let Some(mut buf) = self.buf.take() else { return };
        self.serial += 1;
        let (offset, writing) = if header {
            self.header.serial = self.serial;
            buf[..ALIGN].copy_from_slice(&self.header.encode());
            self.pending = self.header;
            (u64::from(1 - self.slot) * ALIGN as u64, Writing::Header(self.header_version))
        } else {
            let page = self.queue.pop_front().expect("not empty");
            let state = &mut self.pages[page as usize];
            state.queued = false;
            let sets = std::mem::take(&mut state.sets);
            self.sets += u32::from(sets);
            if sets && self.sets.is_multiple_of(MANY_SETS) {
                self.spread = (self.spread * 2).min(MAX_SPREAD);
            }
            let bits = &self.bits[page as usize * PAGE_BYTES..][..PAGE_BYTES];
            encode_page(page, self.serial, bits, &mut buf[..ALIGN]);
            (PAGES_AT + u64::from(page) * ALIGN as u64, Writing::Page(page, state.wanted, sets))
        };
        self.writing = Some(writing);
        let part = Part { buf, at: 0, len: ALIGN };
        io.submit(self.token, Op::Write { file: self.file, offset, part, durable: true });
    }

    /// Takes the completion of a write of the log, or of its witness. True if a write of the log failed.
    pub fn done(&mut self, io: &mut impl Io, done: Done) -> bool {
        self.buf = done.part.map(|part| part.buf);
        let Some(writing) = self.writing else { return false };
        if std::mem::take(&mut self.witnessing) {
            if let Err(errno) = done.result {
                // It names an older write for good: true, and of less use.
                tracing::warn!(disk = %self.header.disk, %errno, "an older copy of the write-intent log would not be noticed");
                self.witness.take().into_iter().for_each(|file| io.close(file));
            }
            self.settled(writing);
            return false;
        }
        if done.result.is_err() {
            self.writing = None;
            self.failures += 1;
            self.retry_at = Some(io.now() + RETRY);
            if let Writing::Page(page, _, sets) = writing {
                let state = &mut self.pages[page as usize];
                state.sets |= sets;
                if !state.queued {
                    state.queued = true;
                    self.queue.push_back(page);
                }
            }
            return true;
        }
        self.failures = 0;
        let says_more = matches!(writing, Writing::Header(_) | Writing::Page(_, _, true));
        if let Some(file) = self.witness.filter(|_| says_more)
            && let Some(mut buf) = self.buf.take()
        {
            let witness = Witness { disk: self.header.disk, stream: self.header.stream, serial: self.serial };
            buf[..ALIGN].copy_from_slice(&witness.encode());
            self.witnessing = true;
            let part = Part { buf, at: 0, len: ALIGN };
            io.submit(self.token, Op::Write { file, offset: 0, part, durable: false });
        } else {
            self.settled(writing);
        }
        false
    }

    /// A write of the log is durable, and its witness says so: what waits for it may go on.
    fn settled(&mut self, writing: Writing) {
        self.writing = None;
        match writing {
            Writing::Header(version) => {
                self.header_durable = version;
                self.durable = self.pending;
                self.slot = 1 - self.slot;
            }
            Writing::Page(page, version, _) => {
                let state = &mut self.pages[page as usize];
                state.durable = version;
                if state.mapped != 0 && state.mapped <= version {
                    state.mapped = 0;
                    self.unmapped -= 1;
                }
            }
        }
    }

    fn clearable(&self, hot: &Hot, covered: &Covered) -> bool {
        hot.in_flight == 0
            && !hot.syncing
            && !self.is_dirty(hot.extent)
            && !hot.stuck
            && hot.last_seq <= covered.seq
            && hot.touched + self.cold <= self.tick
    }

    /// A tick of about a second: begins to clear bits if there are more than the bound. True if a sync of the disk
    /// would let some be cleared.
    pub fn tick(&mut self, covered: &Covered) -> bool {
        self.tick += 1;
        if self.sets >= MANY_SETS {
            self.cold = (self.cold * 2).min(MAX_COLD_TICKS);
        } else {
            self.cold = (self.cold - 1).max(COLD_TICKS);
            self.spread = (self.spread / 2).max(1);
        }
        self.sets = 0;
        if self.clear_after.is_some() {
            return false;
        }
        let mut flushed = false;
        let mut unflushed = false;
        let over = self.hot.len() > covered.bound;
        for hot in self.hot.iter().filter(|h| (over || !h.used) && self.clearable(h, covered)) {
            flushed |= hot.epoch <= covered.epoch;
            unflushed |= hot.epoch > covered.epoch;
        }
        if flushed {
            self.clear_after = Some(self.name_place(covered));
        }
        unflushed
    }

    /// Puts the acknowledged place in the header, unless the durable one names it.
    fn name_place(&mut self, covered: &Covered) -> u64 {
        if self.header.acked_frame == covered.frame && self.header.acked_seq == covered.seq {
            return self.header_version;
        }
        let (frame, seq) = (covered.frame, covered.seq);
        self.set_header(|h| {
            h.acked_frame = frame;
            h.acked_seq = seq;
        })
    }

    /// Clears what may be cleared once the header is durable. Call it after each completion of the log.
    pub fn clear(&mut self, covered: &Covered) {
        if self.clear_after.is_none_or(|ticket| !self.header_done(ticket)) {
            return;
        }
        self.clear_after = None;
        let place = Covered { seq: covered.seq.min(self.durable.acked_seq), ..*covered };
        let mut at = self.hot.len();
        while at > 0 {
            at -= 1;
            let hot = &self.hot[at];
            let wanted = !hot.used || self.hot.len() > covered.bound;
            if wanted && self.clearable(hot, &place) && hot.epoch <= covered.epoch {
                let extent = self.hot.swap_remove(at).extent;
                self.slots[extent as usize] = NONE;
                if let Some(moved) = self.hot.get(at) {
                    self.slots[moved.extent as usize] = at as u32;
                }
                self.change(extent, false);
            }
        }
    }

    /// At a clean stop: as [`Self::tick`], for everything at once and whenever it was touched.
    pub fn clear_all(&mut self, covered: &Covered) {
        self.cold = COLD_TICKS;
        for hot in &mut self.hot {
            hot.touched = 0;
        }
        self.clear_after = Some(self.name_place(covered));
    }

    /// A batch waits for its header.
    pub fn is_clearing(&self) -> bool {
        self.clear_after.is_some()
    }

    /// Closes its files; nothing may be in flight.
    pub fn close(self, io: &mut impl Io) {
        io.close(self.file);
        self.witness.into_iter().for_each(|file| io.close(file));
    }
}

#[cfg(test)]
mod tests;
