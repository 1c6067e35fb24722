//! A split virtqueue, its event counters not included: which requests are new, and how their ends are told.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use crate::io::guest::{Fault, GuestMemory, Window};

use super::chain::{Chain, DESC, Nonsense};
use super::inflight::Inflight;

/// Bytes of the available ring before its entries, and of the used ring.
const RING_HEAD: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// Where both rings have their index.
const IDX: usize = 2;
/// In the flags of the available ring: the driver wants no calls.
const NO_INTERRUPT: u16 = 1;
/// In the flags of the used ring: the device wants no kicks.
const NO_NOTIFY: u16 = 1;

/// Where a queue lies, in addresses of the process that runs the guest.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Addresses {
    /// The table of descriptors.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

impl Addresses {
    /// As the text of virtio wants them to be.
    pub fn is_aligned(&self) -> bool {
        self.desc.is_multiple_of(16) && self.avail.is_multiple_of(2) && self.used.is_multiple_of(4)
    }
}

#[derive(Debug)]
struct Places {
    desc: Window,
    avail: Window,
    used: Window,
}

impl Places {
    fn find(memory: &GuestMemory, at: Addresses, size: u16) -> Option<Self> {
        let size = usize::from(size);
        at.is_aligned().then_some(())?;
        Some(Self {
            desc: memory.window(at.desc, size * DESC)?,
            // With the event indices behind the entries, which are there whether they are used or not.
            avail: memory.window(at.avail, RING_HEAD + size * AVAIL_ENTRY + 2)?,
            used: memory.window(at.used, RING_HEAD + size * USED_ENTRY + 2)?,
        })
    }
}

/// What was agreed with the driver.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Agreed {
    /// Indices say at which entry a kick or call is wanted.
    pub event_idx: bool,
    /// Requests may have tables of their own.
    pub indirect: bool,
}

/// A queue that runs.
#[derive(Debug)]
pub struct Queue {
    size: u16,
    places: Places,
    addresses: Addresses,
    agreed: Agreed,
    /// It does not lie in the guest's memory now: nothing is taken until it does. What was taken before ends where it lay.
    lost: bool,
    /// Something was taken since it began.
    touched: bool,
    /// Entries of the available ring that were taken.
    taken: u16,
    /// Entries of the used ring that were made.
    used: u16,
    /// `used` when the driver was last called; none if it has to be called at the next end in any case.
    called_at: Option<u16>,
    /// Which heads are under way: none may come twice.
    busy: Vec<bool>,
    /// Requests of a process before us, to be done first.
    again: VecDeque<u16>,
    inflight: Option<Inflight>,
    counter: u64,
    /// The driver was told to kick at the next entry.
    kicks_wanted: bool,
}

impl Queue {
    /// A queue of `size` entries that goes on where `base` says; or, where there is `inflight`, where a process before us
    /// left it.
    ///
    /// # Errors
    /// [`Nonsense`] if it does not lie in the memory.
    pub fn start(
        memory: &GuestMemory,
        addresses: Addresses,
        size: u16,
        base: u16,
        agreed: Agreed,
        inflight: Option<Inflight>,
    ) -> Result<Self, Nonsense> {
        let places = Places::find(memory, addresses, size)
            .ok_or(Nonsense::Queue("the queue does not lie in the guest's memory"))?;
        let used = places.used.load16(IDX)?;
        let (mut taken, mut again, mut counter) = (base, VecDeque::new(), 0);
        if let Some(inflight) = &inflight {
            let mut left = inflight.recover(used)?;
            left.heads.retain(|head| *head < size);
            if !left.fresh {
                taken = used.wrapping_add(left.heads.len() as u16);
            }
            counter = left.counter;
            again = left.heads.into();
        }
        let mut busy = vec![false; usize::from(size)];
        for head in &again {
            busy[usize::from(*head)] = true;
        }
        let queue = Self {
            size,
            places,
            addresses,
            agreed,
            lost: false,
            touched: false,
            taken,
            used,
            called_at: None,
            busy,
            again,
            inflight,
            counter,
            kicks_wanted: false,
        };
        Ok(queue)
    }

    /// Whether a queue lies in the memory.
    pub fn lies(memory: &GuestMemory, addresses: Addresses, size: u16) -> bool {
        Places::find(memory, addresses, size).is_some()
    }

    /// The guest's memory is another now, or the queue lies elsewhere in it. False if it does not lie there: whoever takes
    /// memory away to put other memory in its place does that in two steps, so that the queue waits for the second one.
    pub fn moved(&mut self, memory: &GuestMemory, addresses: Addresses) -> bool {
        let places = Places::find(memory, addresses, self.size);
        self.lost = places.is_none();
        if let Some(places) = places {
            (self.places, self.addresses) = (places, addresses);
        }
        !self.lost
    }

    /// Other features were agreed upon.
    pub fn agree(&mut self, agreed: Agreed) {
        self.agreed = agreed;
        // Whatever was asked before may have been asked in another way.
        self.kicks_wanted = false;
        self.called_at = None;
    }

    /// Whether anything was taken since it began: as long as not, it may as well begin elsewhere.
    pub fn is_touched(&self) -> bool {
        self.touched
    }

    /// Where it lies.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Where a later start goes on, once nothing is under way.
    pub fn base(&self) -> u16 {
        self.taken
    }

    /// Requests of a process before us wait to be done.
    pub fn has_left(&self) -> bool {
        !self.again.is_empty() && !self.lost
    }

    /// Takes the next request: its head, its descriptors into `chain`. Only those of a process before us if `left_only`.
    ///
    /// # Errors
    /// [`Nonsense`]: the queue has to stop.
    pub fn take(&mut self, memory: &GuestMemory, chain: &mut Chain, left_only: bool) -> Result<Option<u16>, Nonsense> {
        if self.lost {
            return Ok(None);
        }
        if let Some(head) = self.again.pop_front() {
            self.touched = true;
            chain.walk(&self.places.desc, self.size, memory, head, self.agreed.indirect)?;
            return Ok(Some(head));
        }
        if left_only {
            return Ok(None);
        }
        let avail = self.places.avail.load16(IDX)?;
        let waiting = avail.wrapping_sub(self.taken);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(Nonsense::Queue("more requests are available than the queue has entries"));
        }
        self.touched = true;
        let entry = RING_HEAD + usize::from(self.taken % self.size) * AVAIL_ENTRY;
        let head = self.places.avail.load16(entry)?;
        match self.busy.get_mut(usize::from(head)) {
            None => return Err(Nonsense::Queue("a request begins outside of the table")),
            Some(busy) if *busy => return Err(Nonsense::Queue("a request that is under way came again")),
            Some(busy) => *busy = true,
        }
        if let Some(inflight) = &self.inflight {
            inflight.begin(head, self.counter)?;
            self.counter = self.counter.wrapping_add(1);
        }
        self.taken = self.taken.wrapping_add(1);
        // The index at which a kick is wanted lies behind now.
        self.kicks_wanted &= !self.agreed.event_idx;
        chain.walk(&self.places.desc, self.size, memory, head, self.agreed.indirect)?;
        Ok(Some(head))
    }

    /// Tells the end of a request, `written` bytes of which lie in the guest's memory.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn end(&mut self, head: u16, written: u32) -> Result<(), Fault> {
        let mut entry = [0; USED_ENTRY];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        self.places.used.write(RING_HEAD + usize::from(self.used % self.size) * USED_ENTRY, &entry)?;
        if let Some(inflight) = &self.inflight {
            inflight.ending(head)?;
        }
        self.used = self.used.wrapping_add(1);
        self.busy[usize::from(head)] = false;
        self.places.used.store16(IDX, self.used)?;
        if let Some(inflight) = &self.inflight {
            inflight.ended(head, self.used)?;
        }
        Ok(())
    }

    /// Whether the driver is to be called for what ended since it was asked last.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn call_due(&mut self) -> Result<bool, Fault> {
        let before = self.called_at.replace(self.used);
        if before == Some(self.used) {
            return Ok(false);
        }
        // The driver sets what it wants and then looks at the index; we have set the index and look at what it wants.
        fence(Ordering::SeqCst);
        if self.agreed.event_idx {
            let wanted = self.places.avail.load16(RING_HEAD + usize::from(self.size) * AVAIL_ENTRY)?;
            let Some(before) = before else { return Ok(true) };
            let since = self.used.wrapping_sub(before);
            Ok(self.used.wrapping_sub(wanted).wrapping_sub(1) < since)
        } else {
            Ok(self.places.avail.load16(0)? & NO_INTERRUPT == 0)
        }
    }

    /// The driver has another way of being called: it hears of the next end in any case.
    pub fn forget_calls(&mut self) {
        self.called_at = None;
    }

    /// Asks the driver to kick at the next request. True if there is one already.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn want_kicks(&mut self) -> Result<bool, Fault> {
        self.kicks_wanted = true;
        if self.agreed.event_idx {
            self.places.used.store16(RING_HEAD + usize::from(self.size) * USED_ENTRY, self.taken)?;
        } else {
            self.places.used.store16(0, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(!self.lost && self.places.avail.load16(IDX)? != self.taken)
    }

    /// Tells the driver that it need not kick: we look by ourselves.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn need_no_kicks(&mut self) -> Result<(), Fault> {
        if std::mem::replace(&mut self.kicks_wanted, false) && !self.agreed.event_idx {
            self.places.used.store16(0, NO_NOTIFY)?;
        }
        Ok(())
    }

    /// It was asked to kick, and has not been told otherwise.
    pub fn kicks_wanted(&self) -> bool {
        self.kicks_wanted
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
