//! Operations under way: which machine a completion goes to.

use crate::io::{Io, Op, Token};

/// Whose journal.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum JournalId {
    /// A stream's.
    Stream(u32),
    /// A view's delta.
    Delta(u32),
}

/// What a fold does.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum FoldOp {
    /// Reading frames.
    Window,
    /// Writing to an image.
    Write,
    /// Zeroing this range of the image in this slot.
    Zero(u16, u64, u64),
    /// Reading a block that is changed in part.
    PatchRead,
    /// Writing it.
    PatchWrite,
    /// Syncing an image.
    Sync,
}

/// Why an operation was submitted.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Bytes of a source.
    Receive(u32),
    /// Control messages to a source.
    Control(u32),
    /// A head or frames into a journal.
    Append(JournalId, u64),
    /// Making a journal's next segment, by its number.
    Prepare(JournalId, u64),
    /// Making that segment's name durable.
    Name(JournalId, u64),
    /// A journal's active segment to stable storage.
    AppendSync(JournalId),
    /// Reading a journal back.
    Recover(u32),
    /// Making a seed durable.
    Seed(u32),
    /// Folding.
    Fold(u32, FoldOp),
    /// Verifying a journal.
    Scrub(u32),
    /// A sealed chunk for views.
    Chunk(u64),
    /// A piece of a replica image for a view's read.
    Image(u64),
    /// Writing to a base.
    Merge(u32, u64),
    /// Syncing it.
    MergeSync(u32),
}

/// Operations under way, by the lower 48 bits of their token.
#[derive(Debug)]
pub(crate) struct Ops {
    base: Token,
    slots: Vec<Option<Purpose>>,
    free: Vec<u32>,
}

impl Ops {
    /// None; tokens carry `base_id` in their upper 16 bits.
    pub fn new(base_id: u16) -> Self {
        Self { base: Token::from(base_id) << 48, slots: Vec::new(), free: Vec::new() }
    }

    /// True for tokens of ours.
    pub fn owns(&self, token: Token) -> bool {
        token >> 48 == self.base >> 48
    }

    /// Whose the completion is; the token is free again.
    pub fn take(&mut self, token: Token) -> Option<Purpose> {
        let slot = token & 0xffff_ffff_ffff;
        let purpose = self.slots.get_mut(usize::try_from(slot).ok()?)?.take()?;
        self.free.push(slot as u32);
        Some(purpose)
    }

    fn put(&mut self, purpose: Purpose) -> Token {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.slots[slot as usize] = Some(purpose);
        self.base | Token::from(slot)
    }
}

/// What the target's machines act with.
pub(crate) struct Ctx<'a, I: Io> {
    /// The world.
    pub io: &'a mut I,
    /// Operations under way.
    pub ops: &'a mut Ops,
}

impl<I: Io> Ctx<'_, I> {
    /// Queues an operation.
    pub fn submit(&mut self, purpose: Purpose, op: Op) {
        let token = self.ops.put(purpose);
        self.io.submit(token, op);
    }
}
