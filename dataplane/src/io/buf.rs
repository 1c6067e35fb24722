//! Owned, page-aligned buffers out of one region that the ring has registered.
//!
//! A [`Buf`] is owned by exactly one holder: a machine, or the kernel while an operation runs (the ring keeps it until
//! the completion). Dropping it gives its bytes back to the [`Pool`]. Nothing is allocated after the pool is made.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_wire::ALIGN;

/// How many buffers of one capacity a pool holds.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Bytes of each buffer, a multiple of 4096.
    pub capacity: usize,
    /// How many.
    pub count: usize,
}

/// Zeroed memory straight from the kernel: aligned to pages, and taken only page by page as it is first used (an
/// allocator would zero aligned memory by touching it all, which a pool that is mostly idle never needs).
struct Region {
    start: NonNull<u8>,
    len: usize,
}

impl Region {
    fn new(len: usize) -> Self {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), len, rights, kind, -1, 0)
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Self { start, len },
            _ => panic!("no {len} bytes of memory for buffers: {}", std::io::Error::last_os_error()),
        }
    }
}

// SAFETY: the region is plain memory; every byte of it is reached only through the one `Buf` that owns its range (the
// free lists hand out each index once), so moving or sharing the handle between threads moves no unguarded access.
unsafe impl Send for Region {}
// SAFETY: as above; `Region` itself offers no access through `&self` but its bounds.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `Region::new` with this length; the last `Arc` is gone, so no `Buf` is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

struct ClassState {
    class: Class,
    offset: usize,
    free: Mutex<Vec<u32>>,
    /// How many are free; written with the lock held, read without: it is looked at in each turn of a data thread.
    count: AtomicUsize,
}

impl ClassState {
    fn free_bytes(&self) -> usize {
        self.count.load(Ordering::Relaxed) * self.class.capacity
    }
}

struct Inner {
    region: Region,
    classes: Vec<ClassState>,
}

/// A bounded set of buffers; cheap to clone.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

impl Pool {
    /// A pool with these classes, zeroed.
    ///
    /// # Panics
    /// If there is no class, or a capacity is 0 or no multiple of 4096 (a bug of the caller); or if the kernel has no
    /// address space left.
    pub fn new(classes: &[Class]) -> Self {
        let mut classes = classes.to_vec();
        classes.sort_by_key(|c| c.capacity);
        let total: usize = classes.iter().map(|c| c.capacity * c.count).sum();
        assert!(total > 0 && classes.iter().all(|c| c.capacity > 0 && c.capacity.is_multiple_of(ALIGN)));
        let mut offset = 0;
        let classes = classes
            .into_iter()
            .map(|class| {
                let free = Mutex::new((0..class.count as u32).rev().collect());
                let state = ClassState { class, offset, free, count: AtomicUsize::new(class.count) };
                offset += class.capacity * class.count;
                state
            })
            .collect();
        Self(Arc::new(Inner { region: Region::new(total), classes }))
    }

    /// A buffer of at least `capacity` bytes, or none if all that fit are taken. Its content is what was left in it.
    pub fn take(&self, capacity: usize) -> Option<Buf> {
        for (number, state) in self.0.classes.iter().enumerate() {
            if state.class.capacity < capacity {
                continue;
            }
            let mut free = state.free.lock().unwrap_or_else(PoisonError::into_inner);
            let index = free.pop();
            state.count.store(free.len(), Ordering::Relaxed);
            drop(free);
            if let Some(index) = index {
                let at = state.offset + index as usize * state.class.capacity;
                // SAFETY: `at + capacity` lies within the region by construction of `offset` and `count`.
                let start = unsafe { self.0.region.start.add(at) };
                return Some(Buf {
                    start,
                    capacity: state.class.capacity,
                    class: number as u16,
                    index,
                    pool: self.clone(),
                });
            }
        }
        None
    }

    /// Bytes that are free now, over all classes.
    pub fn free_bytes(&self) -> usize {
        self.0.classes.iter().map(ClassState::free_bytes).sum()
    }

    /// Of the buffers with at least `capacity` bytes, those that are free now, and all of them; bytes.
    pub fn bytes_from(&self, capacity: usize) -> (usize, usize) {
        let long = self.0.classes.iter().filter(|s| s.class.capacity >= capacity);
        long.fold((0, 0), |(free, all), state| {
            (free + state.free_bytes(), all + state.class.count * state.class.capacity)
        })
    }

    /// Bytes of the whole pool.
    pub fn total_bytes(&self) -> usize {
        self.0.region.len
    }

    /// Where the region lies and how long it is, for registering it with a ring.
    pub(super) fn region(&self) -> (*mut u8, usize) {
        (self.0.region.start.as_ptr(), self.0.region.len)
    }

    /// Asks for large pages: fewer of them make each operation on registered memory cheaper, and registering it too.
    pub(super) fn want_large_pages(&self) {
        let region = &self.0.region;
        // SAFETY: the range is the region; the call changes no content. It is advice: what is refused costs time later.
        unsafe { libc::madvise(region.start.as_ptr().cast(), region.len, libc::MADV_HUGEPAGE) };
    }

    /// Takes the pages of `len` bytes from `at` on (or up to the end) from the kernel. Their content stays. This may take
    /// long; other threads may use the buffers meanwhile, but none of the process may map or unmap memory.
    pub(super) fn take_pages(&self, at: usize, len: usize) {
        let region = &self.0.region;
        let len = len.min(region.len.saturating_sub(at));
        let start = region.start.as_ptr().wrapping_add(at).cast();
        // SAFETY: the range lies within the region; the call changes no content. It is advice, as above.
        unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) };
    }

    /// True if both handles are of one pool.
    pub(super) fn same(&self, other: &Pool) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} of {} bytes free)", self.free_bytes(), self.total_bytes())
    }
}

/// One buffer: page-aligned bytes with one owner.
pub struct Buf {
    start: NonNull<u8>,
    capacity: usize,
    class: u16,
    index: u32,
    pool: Pool,
}

// SAFETY: a `Buf` is the only way to its bytes (see `Region`).
unsafe impl Send for Buf {}
// SAFETY: `&Buf` gives `&[u8]` only.
unsafe impl Sync for Buf {}

impl Buf {
    /// Address of the bytes, for the kernel. The buffer must outlive the kernel's use.
    pub(super) fn address(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The pool it comes from.
    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start..start+capacity` lies in the region, which `pool` keeps alive; it was zeroed when made, so all
        // bytes are initialised; this `Buf` is its only owner.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity) }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let state = &self.pool.0.classes[usize::from(self.class)];
        let mut free = state.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self.index);
        state.count.store(free.len(), Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.capacity)
    }
}
