//! Reading a stretch of a file block by block after reading it at once has failed: an unreadable sector costs what lies
//! in it, not its neighbours.

use afterimage_wire::ALIGN;

use crate::io::{Done, File, Op, Part};

/// A stretch being read. What cannot be read is zeros: no frame and no head passes its checks with that in it.
#[derive(Debug)]
pub(crate) struct Salvage {
    file: File,
    from: u64,
    /// Where in the buffer, and bytes in all: a multiple of [`ALIGN`].
    at: usize,
    len: usize,
    done: usize,
    /// The block at hand has failed once.
    again: bool,
    part: Option<Part>,
    /// Blocks that could not be read.
    pub bad: usize,
}

impl Salvage {
    /// Of what `part` was to be filled with from byte `from` of the file.
    pub fn new(file: File, from: u64, part: Part) -> Self {
        let (at, len) = (part.at, part.len);
        debug_assert!(len > 0 && len.is_multiple_of(ALIGN));
        Self { file, from, at, len, done: 0, again: false, part: Some(part), bad: 0 }
    }

    /// The next read, or none when all has been tried. Not to be asked while one is under way.
    pub fn next(&mut self) -> Option<Op> {
        if self.done >= self.len {
            return None;
        }
        let mut part = self.part.take()?;
        (part.at, part.len) = (self.at + self.done, ALIGN);
        Some(Op::Read { file: self.file, offset: self.from + self.done as u64, part })
    }

    /// A block has been read, or not: then it is tried once more.
    pub fn done(&mut self, done: Done) {
        let Some(mut part) = done.part else { return };
        if done.result.is_err() && !std::mem::replace(&mut self.again, true) {
            self.part = Some(part);
            return;
        }
        self.again = false;
        if done.result.is_err() {
            part.buf[part.at..part.at + ALIGN].fill(0);
            self.bad += 1;
        }
        self.done += ALIGN;
        self.part = Some(part);
    }

    /// All has been tried, and no read is under way.
    pub fn is_over(&self) -> bool {
        self.done >= self.len && self.part.is_some()
    }

    /// The whole stretch, as far as it could be read.
    pub fn finish(self) -> Option<Part> {
        let (at, len) = (self.at, self.len);
        self.part.map(|part| Part { at, len, ..part })
    }
}
