//! Waking a ring's thread from another one, by an eventfd that the ring always has a read on.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::ReadWriteFlags;

use super::RingError;

#[derive(Debug)]
struct Bell {
    fd: OwnedFd,
    /// Rung and not yet heard: further rings need no system call.
    rung: AtomicBool,
}

/// Wakes a ring's thread. Clones wake the same ring.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Bell>);

impl Waker {
    pub(super) fn new() -> Result<Self, RingError> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| RingError::os("making an eventfd", e))?;
        Ok(Self(Arc::new(Bell { fd, rung: AtomicBool::new(false) })))
    }

    /// Lets the ring's running or next [`crate::io::Io::poll`] return. Whatever this thread did before is seen by the
    /// ring's thread after that poll. Cheap when a wake-up is already pending.
    pub fn wake(&self) {
        if !self.0.rung.swap(true, Ordering::AcqRel) {
            // It can only fail if the counter is full, and then the ring is awake anyway.
            let _ = rustix::io::write(&self.0.fd, &1u64.to_ne_bytes());
        }
    }

    pub(super) fn raw(&self) -> i32 {
        self.0.fd.as_raw_fd()
    }

    /// Heard: what the wakers did before is visible from here on.
    pub(super) fn hear(&self) {
        self.0.rung.swap(false, Ordering::AcqRel);
    }
}

/// Whether this is an `eventfd`: of nothing else is it known that it is ready only when it was raised.
pub(super) fn is_event(fd: &OwnedFd) -> bool {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), Vec::new());
    link.is_ok_and(|link| link.to_bytes() == b"anon_inode:[eventfd]")
}

/// Sets an event counter back to zero if it is raised; never waits, even if its descriptor would.
pub(super) fn clear(fd: BorrowedFd<'_>) {
    let mut count = [0; 8];
    let _ = rustix::io::preadv2(fd, &mut [std::io::IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
}
