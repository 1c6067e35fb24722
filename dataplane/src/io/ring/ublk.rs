//! ublk devices on a ring: the device's file, and the map of what the kernel says of requests.
//!
//! Of a device whose data the kernel copies itself (an unprivileged one), each tag has a place in memory of ours, which the
//! kernel is told with each fetch. There a write's data lies when the fetch completes, and a read's data has to lie before
//! it is answered: the operations are the same, and end at once.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use io_uring::{opcode, squeue, types};
use rustix::fs::{Mode, OFlags};
use zerocopy::IntoBytes;

use super::Ring;
use super::flight::{Flight, Kind};
use crate::io::ublk::uapi::{self, QueueCommand, io_cmd};
use crate::io::{Errno, File, Part};

/// Bytes of a request's descriptor.
pub(super) const DESCRIPTOR: usize = size_of::<uapi::Descriptor>();

/// The descriptors of a device's queue, as the kernel shows them.
pub(super) struct Descriptors {
    start: NonNull<u8>,
    len: usize,
    depth: u16,
}

impl Descriptors {
    fn map(fd: &OwnedFd, depth: u16) -> Result<Self, Errno> {
        use std::os::fd::AsRawFd;
        let len = (usize::from(depth) * DESCRIPTOR).next_multiple_of(rustix::param::page_size());
        let offset = uapi::DESCRIPTORS_OFFSET as libc::off_t;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that is open.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, fd.as_raw_fd(), offset) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, len, depth }),
            _ => Err(super::kernel::errno(&std::io::Error::last_os_error())),
        }
    }

    fn read(&self, tag: u16) -> Result<[u8; DESCRIPTOR], Errno> {
        if tag >= self.depth {
            return Err(Errno::INVAL);
        }
        let mut out = [0; DESCRIPTOR];
        let at = usize::from(tag) * DESCRIPTOR;
        for (index, byte) in out.iter_mut().enumerate() {
            // SAFETY: in bounds, since the tag is below the depth for which the mapping was made. The kernel writes a tag's
            // descriptor only while the tag is with it; should it write nevertheless, a volatile read of bytes has no
            // worse effect than a wrong value, and every value is checked by whoever uses it.
            *byte = unsafe { self.start.as_ptr().add(at + index).read_volatile() };
        }
        Ok(out)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped above with this length; nothing else has the address.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Memory from which and to which the kernel copies the data of requests: a place of `longest` bytes for each tag.
///
/// While a fetch of the device is under way the kernel may write here at any time. So this is given back only by
/// [`Places::let_go`], when the last one has ended; without that it stays as long as the process.
pub(super) struct Places {
    start: NonNull<u8>,
    len: usize,
    longest: usize,
}

impl Places {
    fn map(depth: u16, longest: u32) -> Result<Self, Errno> {
        let longest = longest as usize;
        let len = (usize::from(depth) * longest).next_multiple_of(rustix::param::page_size());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new memory at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, flags, -1, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, len, longest }),
            _ => Err(super::kernel::errno(&std::io::Error::last_os_error())),
        }
    }

    /// The place of a tag; none if there is no such tag.
    fn of(&self, tag: u16, at: usize, len: usize) -> Option<*mut u8> {
        let from = usize::from(tag) * self.longest + at;
        let within = at.checked_add(len).is_some_and(|end| end <= self.longest) && from + len <= self.len;
        within.then(|| self.start.as_ptr().wrapping_add(from))
    }

    /// The data of a request, from byte `at` on: into the part, or out of it.
    fn copy(&self, tag: u16, at: u32, part: &mut Part, out: bool) -> Result<u64, Errno> {
        let place = self.of(tag, at as usize, part.len).ok_or(Errno::INVAL)?;
        let ours = part.buf.address().wrapping_add(part.at);
        let (from, to) = if out { (ours.cast_const(), place) } else { (place.cast_const(), ours) };
        // SAFETY: both ranges lie within their memory (the part's was checked when the operation was made, the place's just
        // now), which are different mappings. Nobody has a reference to the place; the kernel writes there only while the
        // tag is with it, and should it do so now, the bytes are whatever it writes: any bytes are valid.
        unsafe { std::ptr::copy_nonoverlapping(from, to, part.len) };
        Ok(part.len as u64)
    }

    /// Gives the memory back. No fetch of the device is under way, and none will be.
    fn let_go(self) {
        // SAFETY: mapped above with this length; the kernel was told of it by fetches alone, which have all ended.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// What a device's file has beside it.
pub(super) struct Attached {
    descriptors: Descriptors,
    places: Option<Places>,
}

impl Attached {
    /// The file is closed, and nothing is under way on it.
    pub(super) fn let_go(self) {
        if let Some(places) = self.places {
            places.let_go();
        }
    }
}

impl Ring {
    /// Takes over the queue of a ublk device (`/dev/ublkcN`), with so many tags. From its first
    /// [`Fetch`](crate::io::ublk::UblkOp::Fetch) on, the device belongs to this thread. `copied` is the longest request, bytes,
    /// of a device whose data the kernel copies itself, without [`uapi::feature::USER_COPY`].
    ///
    /// # Errors
    /// `EBUSY`: another process has it. `ENFILE` if [`super::RingConfig::files`] are open.
    pub fn attach_ublk(&mut self, path: &str, depth: u16, copied: Option<u32>) -> Result<File, Errno> {
        // Non-blocking, or each copy would go by way of the kernel's worker threads; it never has to wait.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Errno(e.raw_os_error()))?;
        let descriptors = Descriptors::map(&fd, depth)?;
        let places = copied.map(|longest| Places::map(depth, longest)).transpose()?;
        let number = self.table.insert(&self.uring, fd, false, false)?;
        self.table.keep_attached(number, Attached { descriptors, places });
        Ok(File(number))
    }

    pub(super) fn descriptor(&self, device: File, tag: u16) -> Result<[u8; DESCRIPTOR], Errno> {
        let entry = self.table.get(device.0).ok_or(Errno::BADF)?;
        entry.ublk.as_ref().ok_or(Errno::INVAL)?.descriptors.read(tag)
    }

    /// What concerns a device whose data the kernel copies: a copy is done here, and a fetch names the place of its tag.
    pub(super) fn prepare_ublk(&self, flight: &mut Flight) -> Option<Result<u64, Errno>> {
        let places = self.table.get(flight.number)?.ublk.as_ref()?.places.as_ref()?;
        match flight.kind {
            Kind::UblkFetch { tag, .. } => {
                let Some(place) = places.of(tag, 0, places.longest) else { return Some(Err(Errno::INVAL)) };
                // The address of the place stands where a copy's would.
                flight.offset = place.expose_provenance() as u64;
                None
            }
            Kind::UblkCopy { out } => {
                let (tag, at) = uapi::data_place(flight.offset);
                let part = flight.part.as_mut()?;
                Some(places.copy(tag, at, part, out))
            }
            _ => None,
        }
    }
}

/// The entry of an operation on a device; none if it is no such operation.
pub(super) fn entry(flight: &mut Flight) -> Option<squeue::Entry> {
    let fd = types::Fixed(u32::from(flight.number as u16));
    let done = flight.done as usize;
    match flight.kind {
        Kind::UblkFetch { tag, commit } => {
            let command = QueueCommand { q_id: 0, tag, result: commit.unwrap_or(0), addr: flight.offset };
            let number = if commit.is_some() { io_cmd::COMMIT_AND_FETCH_REQ } else { io_cmd::FETCH_REQ };
            let mut bytes = [0; 16];
            bytes.copy_from_slice(command.as_bytes());
            Some(opcode::UringCmd16::new(fd, number).cmd(bytes).build())
        }
        Kind::UblkCopy { out } => {
            // Never by registered buffers: the driver takes plain memory only.
            let part = flight.part.as_mut()?;
            // In bounds: `done` is less than the length, which was checked when it was submitted.
            let address = part.buf.address().wrapping_add(part.at + done);
            let (len, offset) = ((part.len - done) as u32, flight.offset + flight.done);
            Some(if out {
                opcode::Write::new(fd, address, len).offset(offset).build()
            } else {
                opcode::Read::new(fd, address, len).offset(offset).build()
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Class, Pool};

    #[test]
    fn each_tag_has_a_place_of_its_own() {
        let places = Places::map(4, 8192).unwrap();
        let pool = Pool::new(&[Class { capacity: 16384, count: 2 }]);
        let part = |fill: u8, len| {
            let mut buf = pool.take(len).unwrap();
            buf[..len].fill(fill);
            Part { buf, at: 0, len }
        };
        for tag in 0..4 {
            assert_eq!(places.copy(tag, 0, &mut part(tag as u8 + 1, 8192), true), Ok(8192));
        }
        for tag in 0..4 {
            let mut back = part(0, 512);
            assert_eq!(places.copy(tag, 8192 - 512, &mut back, false), Ok(512));
            assert!(back.buf[..512].iter().all(|byte| *byte == tag as u8 + 1));
        }
        // Past a tag's place, and past all of them.
        for (tag, at) in [(0, 7681), (3, 8192), (4, 0), (u16::MAX, 0), (0, u32::MAX)] {
            assert_eq!(places.copy(tag, at, &mut part(9, 512), true), Err(Errno::INVAL), "{tag} {at}");
            assert_eq!(places.copy(tag, at, &mut part(9, 512), false), Err(Errno::INVAL), "{tag} {at}");
        }
        places.let_go();
    }
}
