//! What the kernel asks, judged: the descriptor is checked as if anybody could have written it.

use zerocopy::FromBytes;

use crate::host::MAX_PART;
use crate::io::Errno;
use crate::io::ublk::uapi::{self, Descriptor, SECTOR, op, op_flag};

/// Pieces where no longer buffer is to be had are cut at multiples of this, bytes.
pub(crate) const PIECE_SHORT: usize = 64 * 1024;

/// What a request does.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write { fua: bool },
    Flush,
    Discard { fua: bool },
    Zero { unmap: bool, fua: bool },
}

/// The disk that it is for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Bytes.
    pub size: u64,
    /// Longest read or write, bytes.
    pub longest: u32,
    pub read_only: bool,
    pub discard: bool,
}

/// A request under way: what a tag holds.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Req {
    pub kind: Kind,
    /// Byte offset.
    pub offset: u64,
    /// Byte offset of its end.
    pub end: u64,
    /// From here on pieces are still to be begun.
    pub next: u64,
    /// A request without data has been given to the disk.
    pub begun: bool,
    /// Pieces under way.
    pub outstanding: u32,
    /// Errno of the answer, 0 for none.
    pub error: i32,
    /// All of it is asked again when nothing of it is under way.
    pub restart: bool,
    /// A buffer for a longer piece was not to be had: from now on its pieces are short.
    pub short: bool,
}

impl Req {
    /// Judges a descriptor.
    pub fn parse(bytes: &[u8; size_of::<Descriptor>()], bounds: &Bounds) -> Result<Self, Errno> {
        let Ok(descriptor) = Descriptor::read_from_bytes(bytes) else { return Err(Errno::INVAL) };
        let fua = descriptor.op_flags & op_flag::FUA != 0;
        let kind = match descriptor.op() {
            op::READ => Kind::Read,
            op::WRITE => Kind::Write { fua },
            op::FLUSH => Kind::Flush,
            op::DISCARD if bounds.discard => Kind::Discard { fua },
            op::WRITE_ZEROES => {
                Kind::Zero { unmap: bounds.discard && descriptor.op_flags & op_flag::NOUNMAP == 0, fua }
            }
            _ => return Err(Errno::OPNOTSUPP),
        };
        let request = |offset, end| Self {
            kind,
            offset,
            end,
            next: offset,
            begun: false,
            outstanding: 0,
            error: 0,
            restart: false,
            short: false,
        };
        if kind == Kind::Flush {
            // It has no range, whatever its fields say.
            return Ok(request(0, 0));
        }
        if bounds.read_only && kind != Kind::Read {
            return Err(Errno::PERM);
        }
        let len = u64::from(descriptor.nr_sectors) * SECTOR;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let offset = descriptor.start_sector.checked_mul(SECTOR).ok_or(Errno::IO)?;
        let end = offset.checked_add(len).filter(|end| *end <= bounds.size).ok_or(Errno::IO)?;
        let has_data = matches!(kind, Kind::Read | Kind::Write { .. });
        if has_data && len > u64::from(bounds.longest.min(uapi::MAX_REQUEST)) {
            return Err(Errno::INVAL);
        }
        Ok(request(offset, end))
    }

    /// Carries data.
    pub fn has_data(&self) -> bool {
        matches!(self.kind, Kind::Read | Kind::Write { .. })
    }

    /// Length of the piece that begins at `next`: up to the next multiple of [`MAX_PART`] (or of [`PIECE_SHORT`]) on the
    /// disk.
    pub fn next_len(&self) -> usize {
        let longest = if self.short { PIECE_SHORT } else { MAX_PART };
        let room = longest - (self.next % longest as u64) as usize;
        (self.end - self.next).min(room as u64) as usize
    }

    /// All of it was begun.
    pub fn is_begun(&self) -> bool {
        if self.has_data() { self.next == self.end } else { self.begun }
    }

    /// As it came.
    pub fn begin_again(&mut self) {
        *self = Self { next: self.offset, begun: false, outstanding: 0, error: 0, restart: false, ..*self };
    }

    /// What the kernel is told.
    pub fn result(&self) -> i32 {
        match self.error {
            0 if self.has_data() => (self.end - self.offset) as i32,
            0 => 0,
            errno => -errno,
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    const BOUNDS: Bounds = Bounds { size: 1 << 20, longest: MAX_PART as u32, read_only: false, discard: true };

    fn parse(op_flags: u32, nr_sectors: u32, start_sector: u64, bounds: &Bounds) -> Result<Req, Errno> {
        let descriptor = Descriptor { op_flags, nr_sectors, start_sector, addr: 0 };
        let mut bytes = [0; 24];
        bytes.copy_from_slice(descriptor.as_bytes());
        Req::parse(&bytes, bounds)
    }

    #[test]
    fn flags_mean_what_the_header_says() {
        let write = parse(u32::from(op::WRITE) | op_flag::FUA, 8, 16, &BOUNDS).unwrap();
        assert_eq!((write.kind, write.offset, write.end), (Kind::Write { fua: true }, 8192, 12288));
        assert_eq!(write.result(), 4096);
        let zero = parse(u32::from(op::WRITE_ZEROES), 1, 0, &BOUNDS).unwrap();
        assert_eq!((zero.kind, zero.result()), (Kind::Zero { unmap: true, fua: false }, 0));
        let kept = parse(u32::from(op::WRITE_ZEROES) | op_flag::NOUNMAP, 1, 0, &BOUNDS).unwrap();
        assert_eq!(kept.kind, Kind::Zero { unmap: false, fua: false });
        assert_eq!(parse(u32::from(op::FLUSH), 7, u64::MAX, &BOUNDS).unwrap().kind, Kind::Flush);
    }

    #[test]
    fn what_lies_off_the_disk_is_refused() {
        let read = u32::from(op::READ);
        assert!(parse(read, 1, 2047, &BOUNDS).is_ok());
        for (sectors, start) in [(1, 2048), (2, 2047), (1, u64::MAX), (1, u64::MAX / 512), (u32::MAX, 1), (0, 0)] {
            assert!(parse(read, sectors, start, &BOUNDS).is_err(), "{sectors} from {start}");
        }
        assert_eq!(parse(read, 1025, 0, &BOUNDS), Err(Errno::INVAL));
        assert!(parse(u32::from(op::DISCARD), 2048, 0, &BOUNDS).is_ok());
    }

    #[test]
    fn what_is_not_offered_is_refused() {
        for unknown in [4, 6, 10, 18, 255] {
            assert_eq!(parse(unknown, 1, 0, &BOUNDS), Err(Errno::OPNOTSUPP));
        }
        let firm = Bounds { discard: false, ..BOUNDS };
        assert_eq!(parse(u32::from(op::DISCARD), 1, 0, &firm), Err(Errno::OPNOTSUPP));
        assert_eq!(parse(5, 1, 0, &firm).unwrap().kind, Kind::Zero { unmap: false, fua: false });
        let view = Bounds { read_only: true, ..BOUNDS };
        for writing in [op::WRITE, op::DISCARD, op::WRITE_ZEROES] {
            assert_eq!(parse(u32::from(writing), 1, 0, &view), Err(Errno::PERM));
        }
        assert!(parse(u32::from(op::READ), 1, 0, &view).is_ok() && parse(2, 0, 0, &view).is_ok());
    }
}
