//! What a host may expect of its disks: which requests it issued, and which were answered, in which order.
//!
//! Every write fills its range with bytes that only it writes, so the content of a disk tells which request each byte
//! came from. The one rule, over all disks of a group: *if the effect of a request is visible, then so is that of every
//! request answered before it was issued* (or of something later on the same bytes). That is what crash consistency
//! means to a host, and all of it.

use std::collections::BTreeMap;
use std::fmt;

use afterimage_dataplane::io::Nanos;

/// Content is judged in pieces of at most this many bytes: what a power loss may tear.
const SECTOR: u64 = 512;
/// Blocks that cannot be read are told in this size, bytes.
pub const HOLE: u64 = 4096;
/// A shorter piece may hold a request's bytes by chance: it proves nothing to be visible.
const PROOF: u64 = 16;

/// Byte `at` of the disk, as request `id` writes it.
pub fn pattern(id: u64, at: u64) -> u8 {
    word(id, at / 8)[(at % 8) as usize]
}

/// Eight bytes of it.
fn word(id: u64, number: u64) -> [u8; 8] {
    bits(id, number).to_le_bytes()
}

/// As [`word`], the first byte lowest: this is where a run spends much of its time.
fn bits(id: u64, number: u64) -> u64 {
    let word = (id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd1b5_4a32_d192_ed03)).wrapping_add(id);
    let word = (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    // A quarter of the words is the id over and over, so that chunks compress. Both are made: which it is cannot be
    // foreseen.
    let same = (id & 0xff | (id & 0xff00 | 0x8000)) * 0x0001_0001_0001_0001;
    let which = u64::from(word >> 62 == 0).wrapping_neg();
    same & which | spread(word) & !which
}

/// Eight bits from every seventh bit on: byte n is `word >> (7 * n)`.
fn spread(word: u64) -> u64 {
    let halves = (word & 0x0fff_ffff) | ((word & 0x00ff_ffff_f000_0000) << 4);
    let quarters = (halves & 0x0000_3fff_0000_3fff) | ((halves & 0x0fff_c000_0fff_c000) << 2);
    let sevens = (quarters & 0x007f_007f_007f_007f) | ((quarters & 0x3f80_3f80_3f80_3f80) << 1);
    // The highest bit of each byte is the lowest of the next.
    let tops = ((sevens >> 8) & 0x0001_0101_0101_0101) | (((word >> 56) & 1) << 56);
    sevens | (tops << 7)
}

/// Fills `out` with what request `id` writes from byte `at` on.
pub fn fill(id: u64, at: u64, out: &mut [u8]) {
    let head = ((8 - at % 8) % 8).min(out.len() as u64) as usize;
    let (first, rest) = out.split_at_mut(head);
    for (i, byte) in first.iter_mut().enumerate() {
        *byte = pattern(id, at + i as u64);
    }
    let number = (at + head as u64) / 8;
    let (whole, last) = rest.as_chunks_mut::<8>();
    let tail = word(id, number + whole.len() as u64);
    for (i, bytes) in whole.iter_mut().enumerate() {
        *bytes = word(id, number + i as u64);
    }
    last.copy_from_slice(&tail[..last.len()]);
}

fn is_pattern(id: u64, at: u64, bytes: &[u8]) -> bool {
    let head = ((8 - at % 8) % 8).min(bytes.len() as u64) as usize;
    let (first, rest) = bytes.split_at(head);
    let number = (at + head as u64) / 8;
    let (whole, last) = rest.as_chunks::<8>();
    // Most that are asked about are not it, which the first words tell; the others are gone through without a look at each.
    let (quick, rest) = whole.split_at(whole.len().min(2));
    let differs = |words: &[[u8; 8]], number: u64| {
        let words = words.iter().zip(number..);
        words.fold(0, |differs, (bytes, number)| differs | (u64::from_le_bytes(*bytes) ^ bits(id, number))) != 0
    };
    first.iter().enumerate().all(|(i, byte)| *byte == pattern(id, at + i as u64))
        && !differs(quick, number)
        && rest.chunks(64).zip(0..).all(|(words, chunk)| !differs(words, number + quick.len() as u64 + chunk * 64))
        && *last == word(id, number + whole.len() as u64)[..last.len()]
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, last) = bytes.as_chunks::<8>();
    let zeros = |words: &[[u8; 8]]| words.iter().fold(0, |all, bytes| all | u64::from_le_bytes(*bytes)) == 0;
    words.chunks(64).all(zeros) && last.iter().all(|byte| *byte == 0)
}

/// What a request does to its range.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Its pattern.
    Write,
    /// Zeros.
    Zero,
}

/// A request that changes a disk.
#[derive(Clone, Debug)]
pub struct Change {
    /// Rises with each request of the history.
    pub id: u64,
    /// What it does.
    pub effect: Effect,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// When it was issued: a tick of the history, and the world's time.
    pub issued: u64,
    /// As [`Change::issued`].
    pub issued_at: Nanos,
    /// When it was answered.
    pub answered: Option<u64>,
    /// As [`Change::answered`].
    pub answered_at: Option<Nanos>,
    /// The answer was an error: its range may hold anything.
    pub failed: bool,
    /// It was answered as being on stable storage.
    pub durable: bool,
}

impl Change {
    fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether it left these bytes at byte `at` of the disk.
    pub fn matches(&self, at: u64, bytes: &[u8]) -> bool {
        match self.effect {
            Effect::Write => is_pattern(self.id, at, bytes),
            Effect::Zero => is_zero(bytes),
        }
    }
}

/// One disk's part of a history.
#[derive(Clone, Debug)]
struct Disk {
    base: Vec<u8>,
    changes: Vec<Change>,
}

/// What a host has done to its disks since one moment at which their content was known.
#[derive(Clone, Debug)]
pub struct History {
    disks: Vec<Disk>,
    tick: u64,
    next_id: u64,
    places: BTreeMap<u64, (usize, usize)>,
}

/// A content that no crash can explain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Bytes that nobody wrote there.
    Foreign {
        /// Disk.
        disk: usize,
        /// Where they begin.
        at: u64,
        /// How many are judged together.
        len: u64,
    },
    /// A request's effect is missing although it must be there.
    Missing {
        /// Disk.
        disk: usize,
        /// Where.
        at: u64,
        /// The request.
        id: u64,
        /// When it was answered, nanoseconds.
        answered_at: Nanos,
        /// What is there instead: a request before it, or nothing.
        instead: Option<u64>,
        /// Why it must be there: this request, issued after its answer, is visible; or nothing but a promise.
        because: Option<u64>,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { disk, at, len } => {
                write!(f, "disk {disk}: the {len} bytes at {at} were written by nobody")
            }
            Self::Missing { disk, at, id, answered_at, instead, because } => {
                write!(f, "disk {disk}: at {at} request {id}, answered at {answered_at} ns, is missing (")?;
                match instead {
                    Some(other) => write!(f, "request {other} is there")?,
                    None => write!(f, "what was there before all requests is")?,
                }
                match because {
                    Some(later) => write!(f, "), although request {later}, issued later, is visible"),
                    None => write!(f, "), although it was promised to be there"),
                }
            }
        }
    }
}

impl History {
    /// Begins with disks of this content; ids of requests go on from `next_id`.
    pub fn new(base: Vec<Vec<u8>>, next_id: u64) -> Self {
        let disks = base.into_iter().map(|base| Disk { base, changes: Vec::new() }).collect();
        Self { disks, tick: 1, next_id, places: BTreeMap::new() }
    }

    /// The id that the next request gets.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// The present tick.
    pub fn tick(&self) -> u64 {
        self.tick
    }

    /// Content at the begin.
    pub fn base(&self, disk: usize) -> &[u8] {
        &self.disks[disk].base
    }

    /// A request is issued; returns its id.
    pub fn issue(&mut self, disk: usize, effect: Effect, offset: u64, len: u64, now: Nanos) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.tick += 1;
        self.disks[disk].changes.push(Change {
            id,
            effect,
            offset,
            len,
            issued: self.tick,
            issued_at: now,
            answered: None,
            answered_at: None,
            failed: false,
            durable: false,
        });
        self.places.insert(id, (disk, self.disks[disk].changes.len() - 1));
        id
    }

    /// A request that was answered is on stable storage by itself.
    pub fn durable(&mut self, id: u64) {
        if let Some((disk, index)) = self.places.get(&id) {
            self.disks[*disk].changes[*index].durable = true;
        }
    }

    /// All requests of a disk, in the order of their issue.
    pub fn changes(&self, disk: usize) -> &[Change] {
        &self.disks[disk].changes
    }

    /// A request is answered.
    pub fn answer(&mut self, id: u64, now: Nanos, failed: bool) {
        self.tick += 1;
        if let Some((disk, index)) = self.places.get(&id).copied() {
            let change = &mut self.disks[disk].changes[index];
            change.answered = Some(self.tick);
            change.answered_at = Some(now);
            change.failed = failed;
        }
    }

    /// The last tick at which a request answered at `time` or before was answered: the floor that a promise about time
    /// makes.
    pub fn tick_at(&self, time: Nanos) -> u64 {
        let answered =
            self.disks.iter().flat_map(|d| &d.changes).filter(|c| c.answered_at.is_some_and(|at| at <= time));
        answered.filter_map(|c| c.answered).max().map_or(0, |tick| tick + 1)
    }

    /// Judges the content of some disks, all of one moment. Everything answered before `floor` (a tick) must be there.
    ///
    /// # Errors
    /// The first thing that no crash explains.
    pub fn judge(&self, images: &[(usize, &[u8])], floor: u64) -> Result<(), Violation> {
        let whole: Vec<_> = images.iter().map(|(disk, image)| (*disk, *image, &[][..])).collect();
        self.judge_but(&whole, floor)
    }

    /// As [`History::judge`]; nothing is said of the blocks of [`HOLE`] bytes whose offsets are named.
    ///
    /// # Errors
    /// As [`History::judge`].
    pub fn judge_but(&self, images: &[(usize, &[u8], &[u64])], floor: u64) -> Result<(), Violation> {
        let parts = images.iter().map(|(disk, image, holes)| self.parts(*disk, 0, image, holes));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        self.judge_parts(images.iter().map(|(disk, ..)| *disk).zip(parts), floor)
    }

    /// Judges what a read of a range gave: everything answered before `issued` must be in it.
    ///
    /// # Errors
    /// As [`History::judge`].
    pub fn judge_read(&self, disk: usize, offset: u64, bytes: &[u8], issued: u64) -> Result<(), Violation> {
        let parts = self.parts(disk, offset, bytes, &[])?;
        self.judge_parts([(disk, parts)].into_iter(), issued)
    }

    /// Judges what a power loss left of one disk: only what was flushed before it (answered before `floor`), or was
    /// durable by itself, must be there; the rest may be, sector by sector, in any order.
    ///
    /// # Errors
    /// As [`History::judge`].
    pub fn judge_power_loss(&self, disk: usize, image: &[u8], floor: u64) -> Result<(), Violation> {
        let changes = &self.disks[disk].changes;
        let parts = self.parts(disk, 0, image, &[])?;
        for piece in parts.pieces.iter().filter(|p| !p.anything) {
            let (owners, covering) = parts.of(piece);
            let owner = owners.first().map(|o| &changes[*o]);
            for covering in covering.iter().map(|c| &changes[*c]) {
                let kept = covering.answered.is_some_and(|a| a < floor || covering.durable);
                if kept && is_older(owners, changes, covering) {
                    return Err(Violation::Missing {
                        disk,
                        at: piece.at,
                        id: covering.id,
                        answered_at: covering.answered_at.unwrap_or_default(),
                        instead: owner.map(|o| o.id),
                        because: None,
                    });
                }
            }
        }
        Ok(())
    }

    fn judge_parts(&self, all: impl Iterator<Item = (usize, Parts)>, floor: u64) -> Result<(), Violation> {
        let all: Vec<_> = all.collect();
        let mut must = floor;
        let mut because = None;
        for (disk, parts) in &all {
            let long = parts.pieces.iter().filter(|p| p.len >= PROOF);
            for owner in long.filter_map(|p| parts.of(p).0.first().copied()) {
                let change = &self.disks[*disk].changes[owner];
                if change.effect == Effect::Write && change.issued > must {
                    must = change.issued;
                    because = Some(change.id);
                }
            }
        }
        for (disk, parts) in &all {
            let changes = &self.disks[*disk].changes;
            for piece in parts.pieces.iter().filter(|piece| !piece.anything) {
                let (owners, covering) = parts.of(piece);
                let owner = owners.first().map(|o| &changes[*o]);
                for covering in covering.iter().map(|c| &changes[*c]) {
                    let Some(answered) = covering.answered.filter(|a| *a < must) else { continue };
                    if is_older(owners, changes, covering) {
                        let because = if answered < floor { None } else { because };
                        return Err(Violation::Missing {
                            disk: *disk,
                            at: piece.at,
                            id: covering.id,
                            answered_at: covering.answered_at.unwrap_or_default(),
                            instead: owner.map(|o| o.id),
                            because,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// Cuts a range where requests begin and end, and finds whose bytes each piece holds.
    fn parts(&self, disk: usize, offset: u64, bytes: &[u8], holes: &[u64]) -> Result<Parts, Violation> {
        let Disk { base, changes } = &self.disks[disk];
        let end = offset + bytes.len() as u64;
        let over = |change: &&Change| change.offset < end && change.end() > offset;
        let mut begins: Vec<(u64, usize)> = Vec::new();
        let mut edges: Vec<u64> = vec![offset, end];
        let mut covered: Vec<(u64, u64)> = Vec::new();
        for (index, change) in changes.iter().enumerate().filter(|(_, change)| over(change)) {
            begins.push((change.offset, index));
            let range = (change.offset.max(offset), change.end().min(end));
            edges.extend([range.0, range.1]);
            covered.push(range);
        }
        // Sectors matter only where something was written: the rest is compared in one piece.
        covered.sort_unstable();
        let mut cut_to = 0;
        for (from, until) in covered {
            let first = from.max(cut_to).next_multiple_of(SECTOR);
            edges.extend((first..until).step_by(SECTOR as usize));
            cut_to = cut_to.max(until);
        }
        edges.sort_unstable();
        edges.dedup();
        begins.sort_unstable();
        let mut begins = begins.into_iter().peekable();
        // Newest first: the explanation that asks least.
        let mut active: Vec<usize> = Vec::new();
        let mut parts = Parts::default();
        for pair in edges.windows(2) {
            let (at, until) = (pair[0], pair[1]);
            active.retain(|c| changes[*c].end() > at);
            while let Some((_, index)) = begins.next_if(|(begin, _)| *begin <= at) {
                if changes[index].end() > at {
                    let place = active.partition_point(|other| *other > index);
                    active.insert(place, index);
                }
            }
            if active.is_empty() {
                untouched(disk, base, offset, bytes, (at, until), holes)?;
                continue;
            }
            let hole = holes.contains(&(at / HOLE * HOLE));
            let content = &bytes[(at - offset) as usize..(until - offset) as usize];
            let first = parts.list.len();
            // The same for all that write zeros.
            let mut zero = None;
            let mut matches = |change: &Change| match change.effect {
                Effect::Write => is_pattern(change.id, at, content),
                Effect::Zero => *zero.get_or_insert_with(|| is_zero(content)),
            };
            parts.list.extend(active.iter().copied().filter(|c| !hole && matches(&changes[*c])));
            let owners = parts.list.len() - first;
            let anything = hole || active.iter().any(|c| changes[*c].failed);
            if owners == 0 && !anything && *content != base[at as usize..until as usize] {
                return Err(Violation::Foreign { disk, at, len: until - at });
            }
            parts.list.extend_from_slice(&active);
            parts.pieces.push(Piece { at, len: until - at, first, owners, covering: active.len(), anything });
        }
        Ok(parts)
    }
}

/// What nobody has written to since the begin is as it was then.
fn untouched(
    disk: usize,
    base: &[u8],
    offset: u64,
    bytes: &[u8],
    range: (u64, u64),
    holes: &[u64],
) -> Result<(), Violation> {
    let part = |from: u64, until: u64| &bytes[(from - offset) as usize..(until - offset) as usize];
    if part(range.0, range.1) == &base[range.0 as usize..range.1 as usize] {
        return Ok(());
    }
    let mut at = range.0;
    while at < range.1 {
        let until = ((at / SECTOR + 1) * SECTOR).min(range.1);
        let hole = holes.contains(&(at / HOLE * HOLE));
        if !hole && part(at, until) != &base[at as usize..until as usize] {
            return Err(Violation::Foreign { disk, at, len: until - at });
        }
        at = until;
    }
    Ok(())
}

/// A piece of a disk over which the same requests lie.
#[derive(Debug)]
struct Piece {
    at: u64,
    len: u64,
    /// Where in [`Parts::list`] its requests begin: those whose bytes may be there, newest first (none for what was there
    /// before), then all that lie over it.
    first: usize,
    owners: usize,
    covering: usize,
    /// A failed request lies here.
    anything: bool,
}

/// The pieces of a range of a disk.
#[derive(Debug, Default)]
struct Parts {
    pieces: Vec<Piece>,
    list: Vec<usize>,
}

impl Parts {
    /// Whose bytes may be there, and who lies over it.
    fn of(&self, piece: &Piece) -> (&[usize], &[usize]) {
        self.list[piece.first..piece.first + piece.owners + piece.covering].split_at(piece.owners)
    }
}

/// What is there is older than that request, whoever's it is: they did not run together.
fn is_older(owners: &[usize], changes: &[Change], than: &Change) -> bool {
    owners.iter().all(|owner| changes[*owner].answered.is_some_and(|at| at < than.issued))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(id: u64, from: u64, len: u64) -> Vec<u8> {
        (from..from + len).map(|at| pattern(id, at)).collect()
    }

    fn history() -> History {
        History::new(vec![vec![0; 4096], vec![0; 4096]], 1)
    }

    #[test]
    fn a_pattern_is_filled_as_it_is_told() {
        for (at, len) in [(0, 64), (3, 4), (5, 40), (16, 3), (7, 1)] {
            let mut out = vec![0; len];
            fill(77, at, &mut out);
            assert_eq!(out, filled(77, at, len as u64));
            assert!(is_pattern(77, at, &out));
            *out.last_mut().expect("not empty") ^= 1;
            assert!(!is_pattern(77, at, &out));
        }
    }

    #[test]
    fn a_word_is_spread_as_it_is_told() {
        for word in [0, 1, u64::MAX, 0x8040_2010_0804_0201, 0x1234_5678_9abc_def0, 0xfedc_ba98_7654_3210] {
            let told: [u8; 8] = std::array::from_fn(|at| (word >> (at * 7)) as u8);
            assert_eq!(spread(word).to_le_bytes(), told);
        }
        assert_eq!(
            (0..400).find(|n| word(0x1234, *n)[..2] == [0x34, 0x92]).map(|n| word(0x1234, n)),
            Some([0x34, 0x92].repeat(4).try_into().expect("eight"))
        );
    }

    #[test]
    fn nothing_done_is_the_base() {
        let history = history();
        assert_eq!(history.judge(&[(0, &[0; 4096])], u64::MAX), Ok(()));
        let foreign = Violation::Foreign { disk: 0, at: 512, len: 512 };
        let mut image = vec![0; 4096];
        image[600] = 1;
        assert_eq!(history.judge(&[(0, &image)], 0), Err(foreign));
    }

    #[test]
    fn an_unanswered_write_may_be_there_or_not() {
        let mut history = history();
        let id = history.issue(0, Effect::Write, 100, 1000, 5);
        let mut image = vec![0; 4096];
        assert_eq!(history.judge(&[(0, &image)], u64::MAX), Ok(()));
        image[100..1100].copy_from_slice(&filled(id, 100, 1000));
        assert_eq!(history.judge(&[(0, &image)], u64::MAX), Ok(()));
    }

    #[test]
    fn a_promised_write_must_be_there() {
        let mut history = history();
        let id = history.issue(0, Effect::Write, 0, 512, 5);
        history.answer(id, 6, false);
        let error = history.judge(&[(0, &[0; 4096])], history.tick() + 1).expect_err("it is missing");
        assert!(matches!(error, Violation::Missing { id: 1, because: None, .. }), "{error}");
        assert_eq!(history.judge(&[(0, &[0; 4096])], 0), Ok(()));
    }

    #[test]
    fn order_holds_over_disks() {
        let mut history = history();
        let first = history.issue(0, Effect::Write, 0, 512, 5);
        history.answer(first, 6, false);
        let second = history.issue(1, Effect::Write, 0, 512, 7);
        let mut image = vec![0; 4096];
        image[..512].copy_from_slice(&filled(second, 0, 512));
        let error = history.judge(&[(0, &[0; 4096]), (1, &image)], 0).expect_err("the first is missing");
        assert!(matches!(error, Violation::Missing { disk: 0, id: 1, because: Some(2), .. }), "{error}");
        // A point that does not hold disk 0 says nothing about it.
        assert_eq!(history.judge(&[(1, &image)], 0), Ok(()));
    }

    #[test]
    fn what_ran_together_may_end_either_way() {
        let mut history = history();
        let a = history.issue(0, Effect::Write, 0, 512, 5);
        let b = history.issue(0, Effect::Write, 0, 512, 5);
        history.answer(b, 6, false);
        history.answer(a, 6, false);
        for winner in [a, b] {
            let mut image = vec![0; 4096];
            image[..512].copy_from_slice(&filled(winner, 0, 512));
            assert_eq!(history.judge(&[(0, &image)], u64::MAX), Ok(()));
        }
        let c = history.issue(0, Effect::Zero, 0, 256, 7);
        history.answer(c, 8, false);
        let mut image = vec![0; 4096];
        image[256..512].copy_from_slice(&filled(a, 256, 256));
        assert_eq!(history.judge(&[(0, &image)], u64::MAX), Ok(()));
        image[..256].copy_from_slice(&filled(a, 0, 256));
        assert!(history.judge(&[(0, &image)], u64::MAX).is_err());
    }

    #[test]
    fn zeros_may_be_those_of_any_that_ran_together() {
        let mut history = history();
        let long = history.issue(0, Effect::Zero, 0, 4096, 5);
        let short = history.issue(0, Effect::Zero, 0, 512, 6);
        history.answer(short, 7, false);
        let write = history.issue(0, Effect::Write, 0, 512, 8);
        history.answer(write, 9, false);
        history.answer(long, 10, false);
        // The long one ran beside the write, and may have come last.
        assert_eq!(history.judge(&[(0, &[0; 4096])], u64::MAX), Ok(()));
    }

    #[test]
    fn a_read_sees_what_was_answered_before_it() {
        let mut history = history();
        let id = history.issue(0, Effect::Write, 1000, 100, 5);
        history.answer(id, 6, false);
        let tick = history.tick() + 1;
        assert!(history.judge_read(0, 990, &[0; 50], tick).is_err());
        let mut bytes = vec![0; 50];
        bytes[10..].copy_from_slice(&filled(id, 1000, 40));
        assert_eq!(history.judge_read(0, 990, &bytes, tick), Ok(()));
    }

    #[test]
    fn a_power_loss_keeps_what_was_flushed_and_any_of_the_rest() {
        let mut history = history();
        let flushed = history.issue(0, Effect::Write, 0, 512, 5);
        history.answer(flushed, 6, false);
        let floor = history.tick() + 1;
        let lost = history.issue(0, Effect::Write, 512, 512, 7);
        history.answer(lost, 8, false);
        let kept = history.issue(0, Effect::Write, 1024, 512, 9);
        history.answer(kept, 10, false);
        let mut image = vec![0; 4096];
        image[..512].copy_from_slice(&filled(flushed, 0, 512));
        image[1024..1536].copy_from_slice(&filled(kept, 1024, 512));
        assert_eq!(history.judge_power_loss(0, &image, floor), Ok(()));
        history.durable(lost);
        assert!(history.judge_power_loss(0, &image, floor).is_err());
        assert!(history.judge_power_loss(0, &[0; 4096], floor).is_err());
    }

    #[test]
    fn a_failed_write_may_leave_anything() {
        let mut history = history();
        let id = history.issue(0, Effect::Write, 0, 512, 5);
        history.answer(id, 6, true);
        assert_eq!(
            history.judge(&[(0, &[9; 512].iter().copied().chain([0; 3584]).collect::<Vec<_>>())], u64::MAX),
            Ok(())
        );
    }
}
