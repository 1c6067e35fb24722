//! Block status: the extents of `base:allocation`.

use crate::host::HostDisk;
use crate::io::{Allocation, Io};

use super::negotiate::ALLOCATION_ID;
use super::proto::{CHUNK_HEADER, state};

/// Most extents of one reply. A client asks again from where the reply ends.
const EXTENTS_MAX: usize = 256;
/// Lookups of one reply: neighbours are joined, and a disk in small pieces must not hold up the others.
const LOOKUPS_MAX: usize = 1024;
/// Room that a reply takes at most, its header included, bytes.
pub const STATUS_MAX: usize = CHUNK_HEADER + 4 + 8 * EXTENTS_MAX;

/// The payload of a block status chunk.
pub struct Extents {
    bytes: [u8; STATUS_MAX - CHUNK_HEADER],
    len: usize,
}

impl Extents {
    /// Of `offset..end`, which lies on the disk, is not empty and shorter than 2³² bytes; with `one` only the first.
    /// Where the disk cannot tell, the range is reported as data, which is always safe.
    pub fn of<I: Io>(io: &mut I, disk: &mut impl HostDisk<I>, offset: u64, end: u64, one: bool) -> Self {
        let mut extents = Self { bytes: [0; STATUS_MAX - CHUNK_HEADER], len: 4 };
        extents.bytes[..4].copy_from_slice(&ALLOCATION_ID.to_be_bytes());
        let mut current = look(io, disk, offset, end);
        let mut at = offset + current.len;
        for _ in 1..LOOKUPS_MAX {
            if at >= end {
                break;
            }
            let next = look(io, disk, at, end);
            at += next.len;
            if next.hole == current.hole {
                current.len += next.len;
            } else if one || extents.is_almost_full() {
                break;
            } else {
                extents.push(current);
                current = next;
            }
        }
        extents.push(current);
        extents
    }

    /// As it goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// One more fits.
    fn is_almost_full(&self) -> bool {
        self.len + 8 == self.bytes.len()
    }

    fn push(&mut self, extent: Allocation) {
        let flags = if extent.hole { state::HOLE | state::ZERO } else { 0 };
        let place = &mut self.bytes[self.len..self.len + 8];
        place[..4].copy_from_slice(&(extent.len as u32).to_be_bytes());
        place[4..].copy_from_slice(&flags.to_be_bytes());
        self.len += 8;
    }
}

/// The state at `at`, and how far it goes, not past `end`.
fn look<I: Io>(io: &mut I, disk: &mut impl HostDisk<I>, at: u64, end: u64) -> Allocation {
    match disk.allocation(io, at) {
        Ok(found) if found.len > 0 => Allocation { len: found.len.min(end - at), hole: found.hole },
        _ => Allocation { len: end - at, hole: false },
    }
}
