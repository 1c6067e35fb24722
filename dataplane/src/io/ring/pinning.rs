//! Pinning a pool's memory without holding up its thread.
//!
//! Registering memory takes every page of it for real. Where free memory is in small pieces, the kernel first makes
//! room for large pages, which has taken seconds for 256 MiB: too long for a proxy that hosts wait for. So a helper
//! thread takes the pages, piece by piece, and the ring registers a piece (then a matter of microseconds) when it next
//! has something to do. Until then, I/O on its buffers works as on any memory.
//!
//! While the kernel takes pages in one call, no thread of the process can map memory or begin another thread: with 64 MiB
//! at once a source that takes over from another stood still for a second before it had opened its disks. So each
//! call takes little, and what waits has as long a time between two of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use io_uring::IoUring;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::flight::REGISTRATION;
use super::kernel::{self, RingError};
use crate::io::Pool;

/// Bytes that are taken in one call: a large page.
const STEP: usize = 2 << 20;
/// Longest pause between two calls.
const PAUSE: Duration = Duration::from_millis(50);
/// Pools up to this size are registered at once, bytes.
const AT_ONCE: usize = 16 << 20;

#[derive(Debug, Default)]
struct Shared {
    /// Pieces whose pages are taken.
    taken: AtomicUsize,
    /// The ring has gone.
    over: AtomicBool,
}

/// How far the registration of a ring's pool has come.
#[derive(Debug)]
pub(super) struct Pinning {
    /// Pieces that are registered, from the first on.
    registered: usize,
    pieces: usize,
    shared: Arc<Shared>,
}

impl Pinning {
    /// None of it will be registered.
    pub(super) fn none() -> Self {
        Self { registered: 0, pieces: 0, shared: Arc::default() }
    }

    /// Begins.
    pub(super) fn begin(uring: &IoUring, pool: &Pool) -> Result<Self, RingError> {
        let len = pool.region().1;
        check_limit(len as u64)?;
        let pieces = len.div_ceil(REGISTRATION);
        let failed = |error| RingError::os("registering a table of buffers", error);
        uring.submitter().register_buffers_sparse(pieces as u32).map_err(failed)?;
        let mut pinning = Self { registered: 0, pieces, shared: Arc::default() };
        pool.want_large_pages();
        if len > AT_ONCE {
            let (pool, shared) = (pool.clone(), Arc::clone(&pinning.shared));
            let thread = move || take_pages(&pool, pieces, &shared);
            if std::thread::Builder::new().name("pin".to_owned()).spawn(thread).is_ok() {
                return Ok(pinning);
            }
            // No thread is to be had: then in the old way.
        }
        for piece in 0..pieces {
            pool.take_pages(piece * REGISTRATION, REGISTRATION);
            register(uring, pool, piece).map_err(|error| kernel::name_registration(error, len as u64))?;
        }
        pinning.registered = pieces;
        Ok(pinning)
    }

    /// Pieces that are registered.
    pub(super) fn registered(&self) -> usize {
        self.registered
    }

    /// Registers what can be. Cheap when there is nothing to do.
    pub(super) fn go_on(&mut self, uring: &IoUring, pool: &Pool) {
        if self.registered == self.pieces || self.shared.taken.load(Ordering::Acquire) == self.registered {
            return;
        }
        match register(uring, pool, self.registered) {
            Ok(()) => self.registered += 1,
            Err(error) => {
                let error = kernel::name_registration(error, pool.region().1 as u64);
                tracing::warn!(%error, "not all buffers are registered with the kernel: I/O costs more");
                self.pieces = self.registered;
            }
        }
    }
}

impl Drop for Pinning {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
    }
}

fn take_pages(pool: &Pool, pieces: usize, shared: &Shared) {
    for piece in 0..pieces {
        for step in (0..REGISTRATION).step_by(STEP) {
            if shared.over.load(Ordering::Acquire) {
                return;
            }
            let begun = Instant::now();
            pool.take_pages(piece * REGISTRATION + step, STEP);
            std::thread::sleep(begun.elapsed().min(PAUSE));
        }
        shared.taken.store(piece + 1, Ordering::Release);
    }
}

fn register(uring: &IoUring, pool: &Pool, piece: usize) -> std::io::Result<()> {
    let (start, len) = pool.region();
    let at = piece * REGISTRATION;
    let piece_of = libc::iovec { iov_base: start.wrapping_add(at).cast(), iov_len: REGISTRATION.min(len - at) };
    // SAFETY: the piece lies in the pool's region, which the ring keeps alive through its handle of the pool; the
    // registration ends with the ring.
    unsafe { uring.submitter().register_buffers_update(piece as u32, &[piece_of], None) }
}

/// The limit on locked memory, told before anything is pinned. Who has CAP_IPC_LOCK has none.
fn check_limit(need: u64) -> Result<(), RingError> {
    let privileged = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    match getrlimit(Resource::Memlock).current {
        Some(limit) if limit < need && !privileged => Err(RingError::LockedMemory { need, limit }),
        _ => Ok(()),
    }
}
