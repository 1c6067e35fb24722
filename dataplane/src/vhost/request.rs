//! What a request asks of the disk.

use crate::host::Geometry;
use crate::io::guest::{Fault, GuestMemory};

use super::chain::Chain;
use super::proto::{HEADER, RANGE, RANGE_SECTORS_MAX, RANGES_MAX, SECTOR, UNMAP, kind, status};

/// A valid request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// So many bytes from an offset on go to the guest.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes, more than 0.
        len: u64,
    },
    /// So many bytes of the guest go to an offset.
    Write {
        /// Byte offset.
        offset: u64,
        /// Bytes, more than 0.
        len: u64,
    },
    /// Flush.
    Flush,
    /// The guest does not need these ranges any more.
    Discard(Vec<(u64, u64)>),
    /// These ranges (offset, bytes, may be deallocated) read as zeros afterwards.
    Zero(Vec<(u64, u64, bool)>),
    /// The identity, in so many bytes.
    Identity(u64),
    /// There is nothing to do: this is the answer.
    Answer(u8),
}

/// No status byte can be found: nothing can be answered.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a request has no room for its status")]
pub struct NoStatus;

/// Reads what the request is. How its bytes are spread over descriptors does not matter: the first 16 that are read are
/// the header, the last that is written is the status.
///
/// # Errors
/// [`NoStatus`].
pub fn parse(chain: &Chain, memory: &GuestMemory, geometry: &Geometry) -> Result<Ask, NoStatus> {
    let room = chain.writable_len().checked_sub(1).ok_or(NoStatus)?;
    let payload = chain.readable_len().checked_sub(HEADER as u64);
    let (None, Some(payload)) = (chain.bad, payload) else { return Ok(Ask::Answer(status::IOERR)) };
    Ok(understand(chain, memory, geometry, room, payload).unwrap_or(Ask::Answer(status::IOERR)))
}

fn understand(chain: &Chain, memory: &GuestMemory, disk: &Geometry, room: u64, payload: u64) -> Result<Ask, Fault> {
    let mut head = [0; HEADER];
    chain.read(memory, 0, &mut head)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
    let ask = match word(0) {
        kind::IN => data(disk, sector, room, |offset, len| Ask::Read { offset, len }),
        kind::OUT if disk.read_only => Ask::Answer(status::IOERR),
        kind::OUT => data(disk, sector, payload, |offset, len| Ask::Write { offset, len }),
        kind::FLUSH => Ask::Flush,
        kind::GET_ID => Ask::Identity(room),
        kind::DISCARD if disk.discard && !disk.read_only => match ranges(chain, memory, disk, payload, 0)? {
            Ok(ranges) => Ask::Discard(ranges.into_iter().map(|(offset, len, _)| (offset, len)).collect()),
            Err(status) => Ask::Answer(status),
        },
        kind::WRITE_ZEROES if !disk.read_only => match ranges(chain, memory, disk, payload, UNMAP)? {
            Ok(ranges) => Ask::Zero(ranges),
            Err(status) => Ask::Answer(status),
        },
        _ => Ask::Answer(status::UNSUPP),
    };
    Ok(ask)
}

/// The range on the disk, if it is one.
fn range(disk: &Geometry, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    (offset.checked_add(len)? <= disk.size).then_some(offset)
}

fn data(disk: &Geometry, sector: u64, len: u64, ask: impl FnOnce(u64, u64) -> Ask) -> Ask {
    match range(disk, sector, len) {
        Some(_) if len == 0 => Ask::Answer(status::OK),
        Some(offset) if len.is_multiple_of(SECTOR) => ask(offset, len),
        _ => Ask::Answer(status::IOERR),
    }
}

type Ranges = Vec<(u64, u64, bool)>;

fn ranges(
    chain: &Chain,
    memory: &GuestMemory,
    disk: &Geometry,
    len: u64,
    flags: u32,
) -> Result<Result<Ranges, u8>, Fault> {
    let count = len / RANGE as u64;
    if !len.is_multiple_of(RANGE as u64) || count == 0 || count > u64::from(RANGES_MAX) {
        return Ok(Err(status::IOERR));
    }
    let mut all = Vec::with_capacity(count as usize);
    let mut answer = None;
    for at in 0..count {
        let mut b = [0; RANGE];
        chain.read(memory, HEADER as u64 + at * RANGE as u64, &mut b)?;
        let sector = u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        let sectors = u32::from_le_bytes([b[8], b[9], b[10], b[11]]);
        let given = u32::from_le_bytes([b[12], b[13], b[14], b[15]]);
        if given & !flags != 0 {
            return Ok(Err(status::UNSUPP));
        }
        let len = u64::from(sectors) * SECTOR;
        match range(disk, sector, len) {
            Some(offset) if sectors <= RANGE_SECTORS_MAX && len > 0 => all.push((offset, len, given & UNMAP != 0)),
            Some(_) if len == 0 => {}
            _ => answer = Some(status::IOERR),
        }
    }
    // All or nothing: a range that is wrong leaves the others undone. Nothing but empty ranges is done at once.
    Ok(match answer {
        Some(answer) => Err(answer),
        None if all.is_empty() => Err(status::OK),
        None => Ok(all),
    })
}
