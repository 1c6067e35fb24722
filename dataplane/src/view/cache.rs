//! Opened chunks, kept for the next read: bounded in bytes, the one not used for longest goes first (second chance).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Buffers kept for reuse.
const SPARES: usize = 8;

/// Names a chunk.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChunkKey {
    /// [`crate::journal::Segment::uid`].
    pub segment: u64,
    /// Frame in the segment's table.
    pub frame: u32,
    /// Chunk of the frame.
    pub chunk: u8,
}

#[derive(Debug)]
struct Kept {
    plain: Arc<Vec<u8>>,
    used: bool,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    limit: usize,
    bytes: usize,
    kept: HashMap<ChunkKey, Kept>,
    order: VecDeque<ChunkKey>,
    spares: Vec<Vec<u8>>,
}

impl Cache {
    /// Of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, kept: HashMap::new(), order: VecDeque::new(), spares: Vec::new() }
    }

    /// The chunk's plain payload, if it is kept.
    pub fn get(&mut self, key: ChunkKey) -> Option<Arc<Vec<u8>>> {
        let kept = self.kept.get_mut(&key)?;
        kept.used = true;
        Some(kept.plain.clone())
    }

    /// An empty vector, with memory if one was given up.
    pub fn spare(&mut self) -> Vec<u8> {
        self.spares.pop().unwrap_or_default()
    }

    /// Keeps a chunk; others go.
    pub fn put(&mut self, key: ChunkKey, plain: Arc<Vec<u8>>) {
        let size = plain.capacity();
        if size > self.limit {
            return;
        }
        while self.bytes + size > self.limit {
            let Some(oldest) = self.order.pop_front() else { break };
            let Some(kept) = self.kept.get_mut(&oldest) else { continue };
            if std::mem::take(&mut kept.used) {
                self.order.push_back(oldest);
                continue;
            }
            if let Some(kept) = self.kept.remove(&oldest) {
                self.bytes -= kept.plain.capacity();
                if self.spares.len() < SPARES
                    && let Ok(mut spare) = Arc::try_unwrap(kept.plain)
                {
                    spare.clear();
                    self.spares.push(spare);
                }
            }
        }
        self.bytes += size;
        if let Some(old) = self.kept.insert(key, Kept { plain, used: false }) {
            self.bytes -= old.plain.capacity();
        } else {
            self.order.push_back(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(frame: u32) -> ChunkKey {
        ChunkKey { segment: 1, frame, chunk: 0 }
    }

    #[test]
    fn stays_within_its_bytes_and_keeps_what_is_used() {
        let mut cache = Cache::new(1000);
        for frame in 0..100 {
            cache.put(key(frame), Arc::new(Vec::with_capacity(100)));
            assert!(cache.bytes <= 1000);
            assert!(cache.get(key(0)).is_some(), "used all the time");
        }
        assert!(cache.get(key(50)).is_none());
        assert!(cache.get(key(99)).is_some());
        assert_eq!(cache.order.len(), cache.kept.len());
    }
}
