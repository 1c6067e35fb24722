//! ublk devices on a ring: the device's file, and the map of what the kernel says of requests.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use io_uring::{opcode, squeue, types};
use rustix::fs::{Mode, OFlags};
use zerocopy::IntoBytes;

use super::Ring;
use super::flight::{Flight, Kind};
use crate::io::ublk::uapi::{self, QueueCommand, io_cmd};
use crate::io::{Errno, File};

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

impl Ring {
    /// Takes over the queue of a ublk device (`/dev/ublkcN`), with so many tags. From its first
    /// [`Fetch`](crate::io::ublk::UblkOp::Fetch) on, the device belongs to this thread.
    ///
    /// # Errors
    /// `EBUSY`: another process has it. `ENFILE` if [`super::RingConfig::files`] are open.
    pub fn attach_ublk(&mut self, path: &str, depth: u16) -> Result<File, Errno> {
        // Non-blocking, or each copy would go by way of the kernel's worker threads; it never has to wait.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Errno(e.raw_os_error()))?;
        let descriptors = Descriptors::map(&fd, depth)?;
        let number = self.table.insert(&self.uring, fd, false, false)?;
        self.table.keep_descriptors(number, descriptors);
        Ok(File(number))
    }

    pub(super) fn descriptor(&self, device: File, tag: u16) -> Result<[u8; DESCRIPTOR], Errno> {
        let entry = self.table.get(device.0).ok_or(Errno::BADF)?;
        entry.descriptors.as_ref().ok_or(Errno::INVAL)?.read(tag)
    }
}

/// The entry of an operation on a device; none if it is no such operation.
pub(super) fn entry(flight: &mut Flight) -> Option<squeue::Entry> {
    let fd = types::Fixed(u32::from(flight.number as u16));
    let done = flight.done as usize;
    match flight.kind {
        Kind::UblkFetch { tag, commit } => {
            let command = QueueCommand { q_id: 0, tag, result: commit.unwrap_or(0), addr: 0 };
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
