//! The descriptors of one request: a list in the queue's table, or in a table of its own in the guest's memory.

use crate::io::guest::{Fault, GuestMemory, Scatter, Window};

/// Bytes of a descriptor.
pub const DESC: usize = 16;
/// Most descriptors of a request, in whichever table. More than any queue has, so that a list that is longer runs in a
/// circle or is not meant for us.
pub const CHAIN_MAX: usize = 1024;

/// Most bytes of a request, of both kinds together.
const LEN_MAX: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A range of the guest's memory.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Seg {
    /// The guest's address.
    pub addr: u64,
    /// Bytes, more than 0.
    pub len: u32,
}

/// A request as the guest laid it out.
#[derive(Debug, Default)]
pub struct Chain {
    /// What we read.
    pub readable: Vec<Seg>,
    /// What we write.
    pub writable: Vec<Seg>,
    /// Something about it is not allowed: it is to be failed where a status byte can be found.
    pub bad: Option<&'static str>,
}

/// The queue cannot be trusted any more.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Nonsense {
    /// Its memory is not there.
    #[error("its memory is not there")]
    Fault,
    /// What is wrong.
    #[error("{0}")]
    Queue(&'static str),
}

impl From<Fault> for Nonsense {
    fn from(_: Fault) -> Self {
        Self::Fault
    }
}

struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn new(b: [u8; DESC]) -> Self {
        Self {
            addr: u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            len: u32::from_le_bytes([b[8], b[9], b[10], b[11]]),
            flags: u16::from_le_bytes([b[12], b[13]]),
            next: u16::from_le_bytes([b[14], b[15]]),
        }
    }
}

impl Chain {
    /// Forgets all; keeps its memory.
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.bad = None;
    }

    /// Reads the list that begins at `head`. `table` has `size` descriptors.
    ///
    /// # Errors
    /// [`Nonsense`]: where the list goes cannot be followed.
    pub fn walk(
        &mut self,
        table: &Window,
        size: u16,
        memory: &GuestMemory,
        head: u16,
        indirect: bool,
    ) -> Result<(), Nonsense> {
        self.clear();
        let mut at = head;
        for _ in 0..size {
            if at >= size {
                return Err(Nonsense::Queue("a descriptor lies outside of its table"));
            }
            let desc = Desc::new(table.bytes(usize::from(at) * DESC)?);
            if desc.flags & INDIRECT != 0 {
                if !indirect {
                    self.bad = Some("indirect descriptors, which were not agreed upon");
                }
                if desc.flags & NEXT != 0 {
                    self.bad = Some("a list that goes on after an indirect table");
                }
                // Others may stand before it; whether it is to be written to does not matter.
                self.walk_table(memory, &desc)?;
                self.check();
                return Ok(());
            }
            self.add(memory, &desc);
            if desc.flags & NEXT == 0 {
                self.check();
                return Ok(());
            }
            at = desc.next;
        }
        Err(Nonsense::Queue("a list of descriptors runs in a circle"))
    }

    fn walk_table(&mut self, memory: &GuestMemory, outer: &Desc) -> Result<(), Nonsense> {
        let count = outer.len as usize / DESC;
        if count == 0 || !(outer.len as usize).is_multiple_of(DESC) {
            return Err(Nonsense::Queue("an indirect table is not made of descriptors"));
        }
        if !memory.covers(outer.addr, u64::from(outer.len)) {
            return Err(Nonsense::Queue("an indirect table lies outside of the guest's memory"));
        }
        let mut at = 0;
        for _ in 0..count.min(CHAIN_MAX) {
            if at >= count {
                return Err(Nonsense::Queue("a descriptor lies outside of its indirect table"));
            }
            let mut bytes = [0; DESC];
            memory.read(outer.addr + (at * DESC) as u64, &mut bytes)?;
            let desc = Desc::new(bytes);
            if desc.flags & INDIRECT != 0 {
                return Err(Nonsense::Queue("an indirect table within another"));
            }
            self.add(memory, &desc);
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            at = usize::from(desc.next);
        }
        Err(Nonsense::Queue("an indirect list of descriptors runs in a circle"))
    }

    /// A list is no longer than its lengths can say.
    fn check(&mut self) {
        if self.readable_len() + self.writable_len() > LEN_MAX {
            self.bad = Some("a request that is too long");
        }
    }

    fn add(&mut self, memory: &GuestMemory, desc: &Desc) {
        if desc.len == 0 {
            self.bad = Some("an empty descriptor");
            return;
        }
        if !memory.covers(desc.addr, u64::from(desc.len)) {
            self.bad = Some("a descriptor outside of the guest's memory");
            return;
        }
        let seg = Seg { addr: desc.addr, len: desc.len };
        if desc.flags & WRITE != 0 {
            self.writable.push(seg);
        } else {
            if !self.writable.is_empty() {
                self.bad = Some("something to read after something to write");
            }
            self.readable.push(seg);
        }
    }

    /// Bytes that we read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|seg| u64::from(seg.len)).sum()
    }

    /// Bytes that we write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|seg| u64::from(seg.len)).sum()
    }

    /// Copies bytes out of what we read, from `skip` on.
    ///
    /// # Errors
    /// [`Fault`] if they are not there.
    pub fn read(&self, memory: &GuestMemory, skip: u64, mut out: &mut [u8]) -> Result<(), Fault> {
        let mut skip = skip;
        for seg in &self.readable {
            let len = u64::from(seg.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let here = ((len - skip) as usize).min(out.len());
            let (now, rest) = out.split_at_mut(here);
            memory.read(seg.addr + skip, now)?;
            (out, skip) = (rest, 0);
            if out.is_empty() {
                return Ok(());
            }
        }
        if out.is_empty() { Ok(()) } else { Err(Fault) }
    }

    /// `len` bytes of what we write, from `skip` on, as memory that the disk fills; none if they are not all there, or not
    /// of addresses and lengths that are multiples of `align`, or in too many pieces: those are copied.
    pub fn scatter(&self, memory: &GuestMemory, mut skip: u64, mut len: usize, align: usize) -> Option<Scatter> {
        let mut scatter = Scatter::default();
        for seg in &self.writable {
            let here = u64::from(seg.len);
            if skip >= here {
                skip -= here;
                continue;
            }
            let now = ((here - skip) as usize).min(len);
            memory.add_to(&mut scatter, seg.addr + skip, now).ok()?;
            (len, skip) = (len - now, 0);
            if len == 0 {
                return scatter.is_aligned(align).then_some(scatter);
            }
        }
        None
    }

    /// Copies bytes into what we write, from `skip` on.
    ///
    /// # Errors
    /// [`Fault`] if there is no room.
    pub fn write(&self, memory: &GuestMemory, skip: u64, mut bytes: &[u8]) -> Result<(), Fault> {
        let mut skip = skip;
        for seg in &self.writable {
            let len = u64::from(seg.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let here = ((len - skip) as usize).min(bytes.len());
            let (now, rest) = bytes.split_at(here);
            memory.write(seg.addr + skip, now)?;
            (bytes, skip) = (rest, 0);
            if bytes.is_empty() {
                return Ok(());
            }
        }
        if bytes.is_empty() { Ok(()) } else { Err(Fault) }
    }
}
