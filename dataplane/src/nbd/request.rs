//! Requests under way of one connection, and the parts of them that disks have.

use crate::host::MAX_PART;
use crate::io::Part;

/// What a request does, once it was found to be valid.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its answers carry data; how it goes out.
    Read(ReadMode),
    /// Payload is received part by part.
    Write {
        /// On stable storage before the reply.
        fua: bool,
    },
    /// One part without data. For fast zeroing the client hears `ENOTSUP`.
    Plain {
        /// `NBD_CMD_FLAG_FAST_ZERO`.
        fast: bool,
    },
}

/// How the data of a read goes out.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// When all of it is there, under one header: an error can still be told.
    Gathered,
    /// In order as it comes, under one header: too long to gather. After the header an error ends the connection, as
    /// the text demands.
    Ordered,
    /// Each part a chunk of its own, as it comes.
    Chunks,
}

/// No entry.
pub const NONE: u32 = u32::MAX;

/// A request under way.
#[derive(Debug)]
pub struct Req {
    /// The client's.
    pub cookie: u64,
    /// Byte offset.
    pub offset: u64,
    /// Byte offset of its end.
    pub end: u64,
    /// What it does.
    pub kind: Kind,
    /// From here on parts are still to be given to the disk.
    pub next: u64,
    /// Parts that the disk has.
    pub outstanding: u32,
    /// The error of the reply, 0 for none.
    pub error: u32,
    /// No reply: its client has gone, or has to ask again elsewhere, and must not take it for failed.
    pub unanswered: bool,
    /// Data has been queued to be sent.
    pub started: bool,
    /// First and last of its parts whose data is not queued yet, in order.
    pub first: u32,
    /// See `first`.
    pub last: u32,
}

impl Req {
    /// A request before its first part.
    pub fn new(cookie: u64, offset: u64, end: u64, kind: Kind) -> Self {
        Self {
            cookie,
            offset,
            end,
            kind,
            next: offset,
            outstanding: 0,
            error: 0,
            unanswered: false,
            started: false,
            first: NONE,
            last: NONE,
        }
    }

    /// Length of the part that begins at `next`: up to the next multiple of [`MAX_PART`] on the disk.
    pub fn next_len(&self) -> usize {
        let room = MAX_PART - (self.next % MAX_PART as u64) as usize;
        (self.end - self.next).min(room as u64) as usize
    }

    /// Every part was given to the disk and has been answered.
    pub fn is_over(&self) -> bool {
        self.next == self.end && self.outstanding == 0
    }
}

/// A part of a request.
#[derive(Debug)]
pub struct PartOp {
    /// Of this request.
    pub req: u32,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
    /// What it takes of the server's budget, bytes.
    pub cost: usize,
    /// The part after it.
    pub next: u32,
    /// How often the disk had no buffer for it.
    pub tries: u16,
    /// The answer, until it can be queued.
    pub data: Option<Part>,
}

/// Entries with stable numbers, reused.
#[derive(Debug)]
pub struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Adds an entry; returns its number.
    pub fn insert(&mut self, value: T) -> u32 {
        if let Some(number) = self.free.pop() {
            self.entries[number as usize] = Some(value);
            return number;
        }
        self.entries.push(Some(value));
        (self.entries.len() - 1) as u32
    }

    /// The entry of that number.
    pub fn get(&mut self, number: u32) -> Option<&mut T> {
        self.entries.get_mut(number as usize)?.as_mut()
    }

    /// Takes the entry of that number out.
    pub fn remove(&mut self, number: u32) -> Option<T> {
        let value = self.entries.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(value)
    }

    /// Takes some entry out.
    pub fn take_any(&mut self) -> Option<T> {
        let number = self.entries.iter().position(Option::is_some)?;
        self.remove(number as u32)
    }

    /// The numbers of all entries.
    pub fn numbers(&self) -> Vec<u32> {
        (0..self.entries.len() as u32).filter(|number| self.entries[*number as usize].is_some()).collect()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Drops all entries.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.free.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_end_at_multiples_on_the_disk() {
        let mut req = Req::new(1, 1000, 2 * MAX_PART as u64 + 7, Kind::Write { fua: false });
        let mut lens = Vec::new();
        while req.next < req.end {
            lens.push(req.next_len());
            req.next += req.next_len() as u64;
        }
        assert_eq!(lens, [MAX_PART - 1000, MAX_PART, 7]);
    }

    #[test]
    fn numbers_are_reused_and_stable() {
        let mut slab = Slab::default();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_eq!(slab.remove(a), Some('a'));
        assert_eq!(slab.get(a), None);
        assert_eq!(slab.insert('c'), a);
        assert_eq!(slab.get(b).copied(), Some('b'));
        assert_eq!(slab.len(), 2);
    }
}
