//! Block status: the extents of `base:allocation`.

use crate::host::HostDisk;
use crate::io::{Allocation, Io};

use super::negotiate::ALLOCATION_ID;
use super::proto::state;

/// Most extents of one reply. A client asks again from where the reply ends.
const EXTENTS_MAX: usize = 512;
/// Lookups of one reply: neighbours are joined, and a disk in small pieces must not hold up the others.
const LOOKUPS_MAX: usize = 1024;
/// Room that a reply takes at most, its header included, bytes.
pub const STATUS_MAX: usize = 20 + 4 + 8 * EXTENTS_MAX;

/// Writes the payload of a block status chunk for `offset..end`, which lies on the disk and is not empty; returns its
/// length. Where the disk cannot tell, the range is reported as data, which is always safe.
pub fn extents<I: Io>(
    io: &mut I,
    disk: &mut impl HostDisk<I>,
    offset: u64,
    end: u64,
    one: bool,
    out: &mut [u8; STATUS_MAX],
) -> usize {
    out[..4].copy_from_slice(&ALLOCATION_ID.to_be_bytes());
    let mut used = 4;
    let mut at = offset;
    let mut current: Option<Allocation> = None;
    let mut emit = |extent: Allocation| {
        // The whole request is shorter than 2³² bytes, so an extent is too.
        out[used..used + 4].copy_from_slice(&(extent.len as u32).to_be_bytes());
        let flags = if extent.hole { state::HOLE | state::ZERO } else { 0 };
        out[used + 4..used + 8].copy_from_slice(&flags.to_be_bytes());
        used += 8;
        used
    };
    let mut full = 4;
    for _ in 0..LOOKUPS_MAX {
        if at >= end {
            break;
        }
        let next = match disk.allocation(io, at) {
            Ok(found) if found.len > 0 => Allocation { len: found.len.min(end - at), hole: found.hole },
            _ => Allocation { len: end - at, hole: false },
        };
        match &mut current {
            Some(extent) if extent.hole == next.hole => extent.len += next.len,
            Some(_) if one => break,
            Some(extent) => {
                full = emit(*extent);
                *extent = next;
                if full + 8 > 4 + 8 * EXTENTS_MAX {
                    return full;
                }
            }
            None => current = Some(next),
        }
        at += next.len;
    }
    if let Some(extent) = current {
        full = emit(extent);
    }
    full
}
