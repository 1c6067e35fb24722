//! Memory that another process shares with us: a guest's, and the area in which its requests under way are kept.
//!
//! The other side may change every byte at any time, so nothing here gives a reference: bytes are copied in and out, and
//! the few words that both sides order things by are atomic. What it says about itself (how long a file is) is checked,
//! and it may lie later: a page that has gone from under a mapping would end this process with `SIGBUS`. Where that
//! happens, [`Map`] puts private zeros in the place of the whole mapping and every access from then on fails: whoever
//! copied bytes hears of it before it uses them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use super::Errno;

/// Most mappings of one process.
const MAPS_MAX: usize = 2048;
/// Longest mapping, bytes: what an address space has room for many times.
const LEN_MAX: u64 = 1 << 44;
/// Magic of a file system of huge pages, whose mappings begin and end at its own pages.
const HUGETLBFS: libc::__fsword_t = 0x9584_58f6;
const PAGE: u64 = 4096;
/// Most ranges that one operation fills.
pub const PIECES_MAX: usize = 128;

/// The other side has taken pages away from under a mapping, or the range lies outside.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("shared memory is not there")]
pub struct Fault;

/// Where a mapping lies, for the handler of `SIGBUS`.
struct Place {
    taken: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    broken: AtomicBool,
}

static PLACES: [Place; MAPS_MAX] = [const {
    Place {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; MAPS_MAX];

/// What stood there before, for faults that are not ours.
static BEFORE: AtomicUsize = AtomicUsize::new(0);
static INSTALL: Once = Once::new();

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole `siginfo_t` to a handler with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    for place in &PLACES {
        let (start, len) = (place.start.load(Ordering::Acquire), place.len.load(Ordering::Acquire));
        if len != 0 && at >= start && at - start < len {
            place.broken.store(true, Ordering::Release);
            let (rights, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
            // SAFETY: the range is a mapping of `Map` alone, which lives as long as its place says so: its bytes are
            // reached by copies only, which see zeros from now on. `mmap` is a plain system call, fit for a handler.
            let done = unsafe { libc::mmap(start as *mut _, len, rights, kind | libc::MAP_FIXED, -1, 0) };
            if done != libc::MAP_FAILED {
                return;
            }
        }
    }
    // Not ours: the next fault, when this returns, is for whoever stood here before.
    let before = BEFORE.load(Ordering::Acquire) as *const libc::sigaction;
    // SAFETY: `before` is null or points to a leaked, whole `sigaction`; null resets nothing, so the default is set then.
    unsafe {
        if before.is_null() {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        } else {
            libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut());
        }
    }
}

fn install() {
    INSTALL.call_once(|| {
        // SAFETY: all zeros is a valid `sigaction`; the fields that matter are set; both pointers are to whole structures,
        // and the handler does only what a handler may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let before: &'static mut libc::sigaction = Box::leak(Box::new(std::mem::zeroed()));
            if libc::sigaction(libc::SIGBUS, &action, before) == 0 {
                BEFORE.store(std::ptr::from_mut(before) as usize, Ordering::Release);
            }
        }
    });
}

/// A range of a file, mapped and shared.
pub struct Map {
    /// Of the mapping, which begins at or before the asked offset.
    start: NonNull<u8>,
    mapped: usize,
    /// Of the asked range, within the mapping.
    skip: usize,
    len: usize,
    place: &'static Place,
}

// SAFETY: plain shared memory, reached by copies and atomics only, from whichever thread.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `len` bytes from `offset` of a file (memory file, hugetlbfs, or other regular file) for reading and writing.
    ///
    /// # Errors
    /// `EINVAL` for a range that the file does not have, or for what is no regular file; `ENFILE` if there are too many
    /// mappings; what `mmap` says.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, Errno> {
        install();
        let stat = rustix::fs::fstat(file).map_err(|e| Errno(e.raw_os_error()))?;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        if !regular || len == 0 || len > LEN_MAX || stat.st_size < 0 || end > stat.st_size as u64 {
            return Err(Errno::INVAL);
        }
        let kind = rustix::fs::fstatfs(file).map_err(|e| Errno(e.raw_os_error()))?;
        let page = if kind.f_type == HUGETLBFS { (stat.st_blksize as u64).max(PAGE) } else { PAGE };
        let from = offset - offset % page;
        let mapped = (end - from).checked_next_multiple_of(page).ok_or(Errno::INVAL)? as usize;
        let free = |p: &&Place| p.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let place = PLACES.iter().find(free).ok_or(Errno::NFILE)?;
        place.broken.store(false, Ordering::Release);
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let kind = libc::MAP_SHARED | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), mapped, rights, kind, file.as_raw_fd(), from as libc::off_t)
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => {
                place.start.store(start.as_ptr() as usize, Ordering::Release);
                place.len.store(mapped, Ordering::Release);
                Ok(Self { start, mapped, skip: (offset - from) as usize, len: len as usize, place })
            }
            _ => {
                let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(Errno::IO.0);
                place.taken.store(false, Ordering::Release);
                Err(Errno(error))
            }
        }
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Pages have gone from under it: nothing can be read or written any more.
    pub fn is_broken(&self) -> bool {
        self.place.broken.load(Ordering::Acquire)
    }

    fn check(&self, at: usize, len: usize) -> Result<*mut u8, Fault> {
        if self.is_broken() || at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Fault);
        }
        Ok(self.start.as_ptr().wrapping_add(self.skip + at))
    }

    /// To be asked after bytes were copied: whether they were there.
    fn copied(&self) -> Result<(), Fault> {
        if self.is_broken() { Err(Fault) } else { Ok(()) }
    }

    /// Copies bytes out. The other side may write meanwhile: then any mixture comes out.
    ///
    /// # Errors
    /// [`Fault`]; `out` holds nothing of use then.
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        let from = self.check(at, out.len())?;
        // SAFETY: the source range lies within the mapping, which lives; `out` is ours alone. Raw pointers on the shared
        // side: no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        self.copied()
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Fault> {
        let to = self.check(at, bytes.len())?;
        #[cfg(test)]
        if Self::is_dead() {
            return Ok(());
        }
        // SAFETY: as in `read`, the other way around.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        self.copied()
    }

    /// As if this process had died before: nothing is stored any more.
    #[cfg(test)]
    fn is_dead() -> bool {
        tests::STORES.with(|left| match left.get() {
            Some(0) => true,
            Some(more) => {
                left.set(Some(more - 1));
                false
            }
            None => false,
        })
    }

    fn word(&self, at: usize) -> Result<&AtomicU16, Fault> {
        let place = self.check(at, 2)?;
        if !place.addr().is_multiple_of(2) {
            return Err(Fault);
        }
        // SAFETY: aligned and within the mapping, which outlives the borrow of `self`; whoever else reaches these bytes
        // is another process or a copy of `read`/`write`, neither of which is a Rust reference.
        Ok(unsafe { AtomicU16::from_ptr(place.cast()) })
    }

    /// An aligned little-endian word; what was written before it by the other side is seen after this.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn load16(&self, at: usize) -> Result<u16, Fault> {
        let value = u16::from_le(self.word(at)?.load(Ordering::Acquire));
        self.copied().map(|()| value)
    }

    /// Sets an aligned little-endian word; what was written before this is seen by whoever sees it.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn store16(&self, at: usize, value: u16) -> Result<(), Fault> {
        let word = self.word(at)?;
        #[cfg(test)]
        if Self::is_dead() {
            return Ok(());
        }
        word.store(value.to_le(), Ordering::Release);
        self.copied()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        self.place.len.store(0, Ordering::Release);
        // SAFETY: mapped in `new` with this length; nothing refers to it any more. After a `SIGBUS` the same range is an
        // anonymous mapping.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped) };
        self.place.taken.store(false, Ordering::Release);
    }
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Map({} bytes)", self.len)
    }
}

/// Zeroed memory to share: a file that never shrinks or grows, and our mapping of it.
///
/// # Errors
/// What the kernel says.
pub fn share(name: &str, len: u64) -> Result<(OwnedFd, Map), Errno> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let os = |e: rustix::io::Errno| Errno(e.raw_os_error());
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(os)?;
    rustix::fs::ftruncate(&file, len).map_err(os)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(os)?;
    let map = Map::new(file.as_fd(), 0, len)?;
    Ok((file, map))
}

/// A part of a [`Map`] that begins at its own zero.
#[derive(Clone, Debug)]
pub struct Window {
    map: Arc<Map>,
    base: usize,
    len: usize,
}

impl Window {
    /// `len` bytes from `base` on; none if the map has not that many.
    pub fn new(map: Arc<Map>, base: usize, len: usize) -> Option<Self> {
        (base.checked_add(len)? <= map.len()).then_some(Self { map, base, len })
    }

    fn at(&self, at: usize, len: usize) -> Result<usize, Fault> {
        if at.checked_add(len).is_none_or(|end| end > self.len) { Err(Fault) } else { Ok(self.base + at) }
    }

    /// As [`Map::read`], of so many bytes.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        self.map.read(self.at(at, N)?, &mut out)?;
        Ok(out)
    }

    /// As [`Map::write`].
    ///
    /// # Errors
    /// [`Fault`].
    pub fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.map.write(self.at(at, bytes.len())?, bytes)
    }

    /// As [`Map::load16`].
    ///
    /// # Errors
    /// [`Fault`].
    pub fn load16(&self, at: usize) -> Result<u16, Fault> {
        self.map.load16(self.at(at, 2)?)
    }

    /// As [`Map::store16`].
    ///
    /// # Errors
    /// [`Fault`].
    pub fn store16(&self, at: usize, value: u16) -> Result<(), Fault> {
        self.map.store16(self.at(at, 2)?, value)
    }
}

#[derive(Clone, Debug)]
struct Piece {
    map: Arc<Map>,
    at: usize,
    len: usize,
}

/// Ranges of shared memory that one operation fills, in this order. Each keeps its mapping: whatever happens to the guest's
/// memory meanwhile, the bytes go to where they were to go when the operation began.
#[derive(Clone, Debug, Default)]
pub struct Scatter {
    pieces: Vec<Piece>,
    len: usize,
}

impl Scatter {
    /// Appends a range.
    fn add(&mut self, map: &Arc<Map>, at: usize, len: usize) -> Result<(), Fault> {
        map.check(at, len)?;
        self.len += len;
        if let Some(last) = self.pieces.last_mut()
            && Arc::ptr_eq(&last.map, map)
            && last.at + last.len == at
        {
            last.len += len;
            return Ok(());
        }
        if self.pieces.len() == PIECES_MAX {
            return Err(Fault);
        }
        self.pieces.push(Piece { map: Arc::clone(map), at, len });
        Ok(())
    }

    /// Bytes, of all ranges together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All addresses and lengths are multiples of `align`, a power of two.
    pub fn is_aligned(&self, align: usize) -> bool {
        let whole = |piece: &Piece| {
            let address = piece.map.start.addr().get() + piece.map.skip + piece.at;
            address.is_multiple_of(align) && piece.len.is_multiple_of(align)
        };
        self.pieces.iter().all(whole)
    }

    /// Nothing of it has gone.
    ///
    /// # Errors
    /// [`Fault`]: what an operation put there may be nowhere.
    pub fn check(&self) -> Result<(), Fault> {
        self.pieces.iter().try_for_each(|piece| piece.map.copied())
    }

    /// Copies bytes in, from its first one on.
    ///
    /// # Errors
    /// [`Fault`], also if there are more bytes than it has room for.
    pub fn write(&self, mut bytes: &[u8]) -> Result<(), Fault> {
        for piece in &self.pieces {
            let (now, rest) = bytes.split_at(piece.len.min(bytes.len()));
            piece.map.write(piece.at, now)?;
            bytes = rest;
        }
        if bytes.is_empty() { Ok(()) } else { Err(Fault) }
    }

    /// Points at its ranges, but for their first `skip` bytes; returns how many vectors that takes.
    pub(super) fn point(&self, vectors: &mut [libc::iovec; PIECES_MAX], mut skip: usize) -> usize {
        let mut count = 0;
        for piece in &self.pieces {
            let from = skip.min(piece.len);
            skip -= from;
            if from < piece.len {
                // In bounds: checked when it was added.
                let base = piece.map.start.as_ptr().wrapping_add(piece.map.skip + piece.at + from);
                vectors[count] = libc::iovec { iov_base: base.cast(), iov_len: piece.len - from };
                count += 1;
            }
        }
        count
    }
}

/// One range of a guest's memory.
#[derive(Clone, Debug)]
pub struct Region {
    /// Where the guest sees it.
    pub guest: u64,
    /// Where the process that runs the guest sees it.
    pub user: u64,
    /// The bytes.
    pub map: Arc<Map>,
}

impl Region {
    fn len(&self) -> u64 {
        self.map.len() as u64
    }
}

/// A guest's memory: ranges that do not overlap, by the guest's addresses.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Of these regions.
    ///
    /// # Errors
    /// `EINVAL` if they overlap, or end past the last address.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, Errno> {
        regions.sort_by_key(|region| region.guest);
        let whole =
            regions.iter().all(|r| r.guest.checked_add(r.len()).is_some() && r.user.checked_add(r.len()).is_some());
        let apart = || regions.windows(2).all(|pair| pair[0].guest + pair[0].len() <= pair[1].guest);
        if whole && apart() { Ok(Self { regions }) } else { Err(Errno::INVAL) }
    }

    /// The regions, by the guest's addresses.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The map that has this guest address, where in it, and how many bytes follow there.
    fn find(&self, guest: u64) -> Result<(&Arc<Map>, usize, usize), Fault> {
        let after = self.regions.partition_point(|region| region.guest <= guest);
        let region = after.checked_sub(1).and_then(|at| self.regions.get(at)).ok_or(Fault)?;
        let at = guest - region.guest;
        if at >= region.len() {
            return Err(Fault);
        }
        Ok((&region.map, at as usize, (region.len() - at) as usize))
    }

    /// Whether all of a range is there, in however many regions.
    pub fn covers(&self, mut guest: u64, mut len: u64) -> bool {
        while len > 0 {
            let Ok((_, _, here)) = self.find(guest) else { return false };
            let step = len.min(here as u64);
            len -= step;
            let Some(next) = guest.checked_add(step) else { return len == 0 };
            guest = next;
        }
        true
    }

    /// Copies bytes out of the guest.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn read(&self, mut guest: u64, mut out: &mut [u8]) -> Result<(), Fault> {
        while !out.is_empty() {
            let (map, at, here) = self.find(guest)?;
            let (now, rest) = out.split_at_mut(here.min(out.len()));
            map.read(at, now)?;
            guest = guest.wrapping_add(now.len() as u64);
            out = rest;
        }
        Ok(())
    }

    /// Copies bytes into the guest.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn write(&self, mut guest: u64, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            let (map, at, here) = self.find(guest)?;
            let (now, rest) = bytes.split_at(here.min(bytes.len()));
            map.write(at, now)?;
            guest = guest.wrapping_add(now.len() as u64);
            bytes = rest;
        }
        Ok(())
    }

    /// Adds a range of the guest to those that an operation is to fill.
    ///
    /// # Errors
    /// [`Fault`] if it is not there, or in more pieces than [`PIECES_MAX`].
    pub fn add_to(&self, scatter: &mut Scatter, mut guest: u64, mut len: usize) -> Result<(), Fault> {
        while len > 0 {
            let (map, at, here) = self.find(guest)?;
            let step = here.min(len);
            scatter.add(map, at, step)?;
            guest = guest.wrapping_add(step as u64);
            len -= step;
        }
        Ok(())
    }

    /// `len` bytes at an address of the process that runs the guest; none if no single region has them all.
    pub fn window(&self, user: u64, len: usize) -> Option<Window> {
        let region = self.regions.iter().find(|r| r.user <= user && user - r.user < r.len())?;
        Window::new(Arc::clone(&region.map), (user - region.user) as usize, len)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    thread_local! {
        /// How many more stores this thread makes into shared memory before it counts as dead.
        pub(crate) static STORES: std::cell::Cell<Option<usize>> = const { std::cell::Cell::new(None) };
    }

    fn memory_file(len: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        file
    }

    fn region(guest: u64, user: u64, len: u64) -> Region {
        let file = memory_file(len);
        Region { guest, user, map: Arc::new(Map::new(file.as_fd(), 0, len).unwrap()) }
    }

    #[test]
    fn bytes_go_over_the_seam_of_two_regions_and_not_over_a_gap() {
        let memory =
            GuestMemory::new(vec![region(8192, 0x9000, 4096), region(4096, 0x1000, 4096), region(16384, 0, 4096)])
                .unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        memory.write(8192 - 50, &bytes).unwrap();
        let mut back = vec![0; 100];
        memory.read(8192 - 50, &mut back).unwrap();
        assert_eq!(back, bytes);
        assert!(memory.covers(4096, 8192) && !memory.covers(4096, 8193) && !memory.covers(0, 1));
        assert!(!memory.covers(u64::MAX, 2));
        assert_eq!(memory.write(12288 - 1, &[1, 2]), Err(Fault));
        assert!(memory.window(0x1000, 4096).is_some() && memory.window(0x1001, 4096).is_none());
    }

    #[test]
    fn a_scatter_joins_what_lies_together_and_takes_no_more_than_it_has_room_for() {
        let memory = GuestMemory::new(vec![region(0, 0, 1 << 20), region(1 << 20, 1 << 30, 1 << 20)]).unwrap();
        let mut to = Scatter::default();
        memory.add_to(&mut to, 4096, 4096).unwrap();
        memory.add_to(&mut to, 8192, 512).unwrap();
        assert!(to.pieces.len() == 1 && to.is_aligned(512) && !to.is_aligned(4096));
        // Over the seam of two mappings.
        memory.add_to(&mut to, (1 << 20) - 4096, 8192).unwrap();
        assert_eq!((to.pieces.len(), to.len()), (3, 4608 + 8192));
        let bytes: Vec<u8> = (0..to.len()).map(|at| (at / 7) as u8).collect();
        to.write(&bytes).unwrap();
        assert_eq!(to.write(&vec![0; to.len() + 1]), Err(Fault));
        to.write(&bytes).unwrap();
        let mut back = vec![0; 8192];
        memory.read((1 << 20) - 4096, &mut back).unwrap();
        assert!(back == bytes[4608..]);
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut vectors = [none; PIECES_MAX];
        assert_eq!(to.point(&mut vectors, 4608 + 100), 2);
        assert_eq!((vectors[0].iov_len, vectors[1].iov_len), (4096 - 100, 4096));
        assert_eq!(memory.add_to(&mut to, 2 << 20, 1), Err(Fault));
        let mut many = Scatter::default();
        for at in 0..PIECES_MAX as u64 {
            memory.add_to(&mut many, at * 1024, 512).unwrap();
        }
        assert_eq!(memory.add_to(&mut many, 1 << 19, 512), Err(Fault));
    }

    #[test]
    fn regions_that_overlap_are_refused() {
        assert!(GuestMemory::new(vec![region(0, 0, 8192), region(4096, 0x10000, 4096)]).is_err());
        assert!(GuestMemory::new(vec![region(u64::MAX - 4095, 0, 4096)]).is_err());
    }

    #[test]
    fn a_range_that_the_file_does_not_have_is_refused() {
        let file = memory_file(8192);
        assert_eq!(Map::new(file.as_fd(), 4096, 4097).unwrap_err(), Errno::INVAL);
        assert_eq!(Map::new(file.as_fd(), u64::MAX, 2).unwrap_err(), Errno::INVAL);
        assert_eq!(Map::new(file.as_fd(), 0, 0).unwrap_err(), Errno::INVAL);
        let map = Map::new(file.as_fd(), 100, 8000).unwrap();
        assert_eq!(map.len(), 8000);
        map.write(7999, &[7]).unwrap();
        assert_eq!(map.write(8000, &[7]), Err(Fault));
        assert_eq!(map.load16(1), Err(Fault));
    }

    #[test]
    fn a_file_that_shrinks_faults_instead_of_killing() {
        let file = memory_file(1 << 20);
        let map = Map::new(file.as_fd(), 0, 1 << 20).unwrap();
        let other = Map::new(file.as_fd(), 0, 4096).unwrap();
        map.write(0, &[1; 4096]).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let mut out = vec![0; 8192];
        assert_eq!(map.read(0, &mut out), Err(Fault), "half of it is gone");
        assert!(map.is_broken() && !other.is_broken());
        assert_eq!(map.load16(0), Err(Fault));
        let piece = Piece { map: Arc::new(map), at: 0, len: 512 };
        assert_eq!(Scatter { pieces: vec![piece], len: 512 }.check(), Err(Fault));
        assert_eq!(other.load16(0), Ok(0x0101));
    }
}
