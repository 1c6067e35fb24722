//! Which requests of a queue are under way, in memory that outlives this process.
//!
//! Whoever runs the guest keeps it and gives it to the next process. Its layout and the order of the steps are those of
//! the vhost-user text for split queues: a request is marked before anything is done for it, and its mark is taken away
//! after the guest can see its end; between, two words say which end was the last, so that a death at any step leaves a
//! state out of which [`Inflight::recover`] knows exactly what is still to be done.
//!
//! The other side can write here, too; what it writes may make its own guest fail, nothing else.

use std::sync::Arc;

use crate::io::guest::{Fault, Map, Window};

const VERSION_AT: usize = 8;
const SIZE_AT: usize = 10;
const LAST_AT: usize = 12;
const USED_AT: usize = 14;
/// Bytes before the entries.
const HEAD: usize = 16;
/// Bytes of an entry: the mark, padding, `next`, `counter`.
const ENTRY: usize = 16;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;
const VERSION: u16 = 1;
/// Areas of queues begin at multiples.
const ALIGN: u64 = 64;

/// Bytes of one queue's area.
fn area(size: u16) -> u64 {
    (HEAD as u64 + u64::from(size) * ENTRY as u64).next_multiple_of(ALIGN)
}

/// Bytes for so many queues of so many entries.
pub fn bytes(queues: u16, size: u16) -> u64 {
    u64::from(queues) * area(size)
}

/// Bytes behind the areas of all queues. The text knows nothing of them, but whoever keeps this memory keeps it whole.
pub const TRAILER: u64 = ALIGN;

/// What the driver has set about the cache of writes: who runs the guest does not tell the next process.
#[derive(Clone, Debug)]
pub struct Mode(Window);

impl Mode {
    /// Behind the areas of so many queues of so many entries, if there is room: memory of another program has none.
    pub fn new(map: &Arc<Map>, queues: u16, size: u16) -> Option<Self> {
        let base = usize::try_from(bytes(queues, size)).ok()?;
        Window::new(Arc::clone(map), base, TRAILER as usize).map(Self)
    }

    /// Whether writes are cached, if the driver has set it.
    pub fn load(&self) -> Option<bool> {
        match self.0.load16(0) {
            Ok(1) => Some(false),
            Ok(2) => Some(true),
            _ => None,
        }
    }

    /// Sets it.
    pub fn store(&self, on: bool) {
        // If the memory has gone, so has everything that it could be of use for.
        let _ = self.0.store16(0, if on { 2 } else { 1 });
    }
}

/// One queue's requests under way.
#[derive(Clone, Debug)]
pub struct Inflight {
    area: Window,
    size: u16,
}

/// What a process before us left.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// There was none: the memory is new.
    pub fresh: bool,
    /// Requests to be done again, in the order in which they came.
    pub heads: Vec<u16>,
    /// The counter goes on from here.
    pub counter: u64,
}

impl Inflight {
    /// Of the queue of that number, of `size` entries, within memory for several.
    pub fn new(map: &Arc<Map>, queue: u16, size: u16) -> Option<Self> {
        let base = usize::try_from(u64::from(queue) * area(size)).ok()?;
        let area = Window::new(Arc::clone(map), base, HEAD + usize::from(size) * ENTRY)?;
        Some(Self { area, size })
    }

    fn at(head: u16) -> usize {
        HEAD + usize::from(head) * ENTRY
    }

    /// A request was taken from the queue: it is the `counter`th.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn begin(&self, head: u16, counter: u64) -> Result<(), Fault> {
        let at = Self::at(head);
        self.area.write(at + COUNTER_AT, &counter.to_le_bytes())?;
        // With the padding behind it, which nobody reads: a word is seen whole.
        self.area.store16(at, 1)
    }

    /// The guest is about to see the end of this request.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn ending(&self, head: u16) -> Result<(), Fault> {
        let last = self.area.load16(LAST_AT)?;
        self.area.store16(Self::at(head) + NEXT_AT, last)?;
        self.area.store16(LAST_AT, head)
    }

    /// The guest can see it, by the used index `used`.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn ended(&self, head: u16, used: u16) -> Result<(), Fault> {
        self.area.store16(Self::at(head), 0)?;
        self.area.store16(USED_AT, used)
    }

    /// Begins with what a process before left, or as new; `used` is the used index that the guest sees.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn recover(&self, used: u16) -> Result<Recovered, Fault> {
        if self.area.load16(VERSION_AT)? != VERSION || self.area.load16(SIZE_AT)? != self.size {
            for head in 0..self.size {
                self.area.write(Self::at(head), &[0; ENTRY])?;
            }
            self.area.store16(SIZE_AT, self.size)?;
            self.area.store16(LAST_AT, 0)?;
            self.area.store16(USED_AT, used)?;
            self.area.store16(VERSION_AT, VERSION)?;
            return Ok(Recovered { fresh: true, ..Recovered::default() });
        }
        let ended = used.wrapping_sub(self.area.load16(USED_AT)?);
        let mut last = self.area.load16(LAST_AT)?;
        // Ends that the guest has seen, and whose marks are still there.
        for _ in 0..ended.min(self.size) {
            if last >= self.size {
                break;
            }
            self.area.store16(Self::at(last), 0)?;
            last = self.area.load16(Self::at(last) + NEXT_AT)?;
        }
        self.area.store16(USED_AT, used)?;
        let mut left = Vec::new();
        for head in 0..self.size {
            if self.area.bytes::<1>(Self::at(head))?[0] == 1 {
                left.push((u64::from_le_bytes(self.area.bytes(Self::at(head) + COUNTER_AT)?), head));
            }
        }
        left.sort_unstable();
        let counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { fresh: false, heads: left.into_iter().map(|(_, head)| head).collect(), counter })
    }
}
