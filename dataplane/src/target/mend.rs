//! Asking the source for what the newest state lacks: it reads those blocks again and sends them as a synchronisation, and
//! newer data takes the place of what is lost.

use super::Target;
use super::stream::Stream;
use crate::io::{Io, Nanos};

/// How often the source is asked for the same blocks: it may have been busy, or gone.
const AGAIN: Nanos = 10_000_000_000;
/// Blocks are asked for in multiples of this many bytes.
const BLOCK: u64 = 4096;

impl Stream {
    /// When the source is to be asked again.
    pub fn mend_deadline(&self) -> Option<Nanos> {
        let wanted = self.connection.is_some() && self.damage.open_blocks().next().is_some();
        wanted.then_some(self.mend_at)
    }
}

impl<I: Io> Target<I> {
    /// Asks connected sources for lost blocks of disks that are in their streams.
    pub(super) fn mend(&mut self, now: Nanos) {
        for stream in self.streams.values_mut().filter(|stream| stream.is_ready() && now >= stream.mend_at) {
            let Some(connection) = stream.connection.and_then(|id| self.connections.get_mut(&id)) else { continue };
            if stream.damage.open_blocks().next().is_none() {
                continue;
            }
            stream.mend_at = now + AGAIN;
            let lives = stream.points.now();
            for block in stream.damage.open_blocks() {
                let Some(life) = lives.get(&block.slot).filter(|life| life.member) else { continue };
                let start = block.offset / BLOCK * BLOCK;
                let end = (block.offset + block.len).next_multiple_of(BLOCK).min(life.info.size);
                if start < end && !connection.want(block.slot, start, end - start) {
                    break;
                }
            }
        }
    }
}
