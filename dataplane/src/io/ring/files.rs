//! Files as names and descriptors: everything about them that is a blocking call, on cold paths only.

use std::fs;
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom};

use super::kernel::errno;
use crate::io::{Allocation, Errno, FileInfo, OpenHow};

/// Smallest block that reads and writes are made of, bytes.
const MIN_BLOCK: u32 = 512;
/// Assumed where the kernel does not say: right for every disk, if larger than needed.
const SAFE_BLOCK: u32 = 4096;
/// Largest unit that a file system is believed to work in; network file systems name megabytes.
const MAX_PHYSICAL: u32 = 64 * 1024;

fn code(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}

fn is_device(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
}

/// Opens, and locks if asked.
pub(super) fn open(path: &str, how: OpenHow) -> Result<OwnedFd, Errno> {
    let mut flags = OFlags::DIRECT | OFlags::CLOEXEC | if how.write { OFlags::RDWR } else { OFlags::RDONLY };
    if how.create_new {
        flags |= OFlags::CREATE | OFlags::EXCL;
    } else {
        let stat = rustix::fs::stat(path).map_err(code)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::BlockDevice if how.lock => flags |= OFlags::EXCL,
            FileType::BlockDevice => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
    }
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(code)?;
    if how.lock {
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).map_err(code)?;
    }
    Ok(fd)
}

/// File systems that can give ranges back, by their magic numbers: ext2 to ext4, XFS, Btrfs, F2FS, tmpfs, bcachefs, GFS2,
/// OCFS2, and overlays, which ask the one below.
const PUNCH_HOLES: [u64; 9] =
    [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994, 0xca45_1a4e, 0x0116_1970, 0x7461_636f, 0x794c_7630];

/// Whether a range can be given back. Known by name, since trying it would change the file's time of modification.
pub(super) fn can_discard(fd: BorrowedFd<'_>) -> bool {
    let Ok(stat) = rustix::fs::fstat(fd) else { return false };
    if is_device(&stat) {
        return queue_value(stat.st_rdev, "write_zeroes_max_bytes").is_some_and(|bytes| bytes > 0);
    }
    rustix::fs::fstatfs(fd).is_ok_and(|system| PUNCH_HOLES.contains(&(system.f_type as u64 & 0xffff_ffff)))
}

/// A number that the block layer shows for a device, or for the disk that a partition is of.
fn queue_value(device: u64, name: &str) -> Option<u64> {
    let base = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let read = |path: String| fs::read_to_string(path).ok()?.trim().parse().ok();
    read(format!("{base}/queue/{name}")).or_else(|| read(format!("{base}/../queue/{name}")))
}

pub(super) fn info(fd: BorrowedFd<'_>, discard: bool) -> Result<FileInfo, Errno> {
    let stat = rustix::fs::fstat(fd).map_err(code)?;
    if is_device(&stat) {
        let size = rustix::fs::seek(fd, SeekFrom::End(0)).map_err(code)?;
        let block = rustix::fs::ioctl_blksszget(fd).map_err(code)?.max(MIN_BLOCK);
        let physical_block = rustix::fs::ioctl_blkpbszget(fd).map_err(code)?.max(block);
        let (mtime_ns, identity) = (written(stat.st_rdev), device_identity(stat.st_rdev));
        return Ok(FileInfo { size, block, physical_block, discard, device: true, mtime_ns, identity });
    }
    let block = direct_alignment(fd).unwrap_or(SAFE_BLOCK);
    let unit = u32::try_from(stat.st_blksize).unwrap_or(MAX_PHYSICAL).min(MAX_PHYSICAL);
    let mtime = stat.st_mtime.max(0) as u64 * 1_000_000_000 + stat.st_mtime_nsec as u64;
    Ok(FileInfo {
        size: stat.st_size as u64,
        block,
        physical_block: if unit.is_power_of_two() { unit.max(block) } else { block.max(SAFE_BLOCK) },
        discard,
        device: false,
        mtime_ns: mtime,
        identity: file_identity(fd),
    })
}

/// FNV-1a: a name for whatever the bytes say, never 0.
fn name_of(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step).max(1)
}

/// A file is told by its inode and its birth: a copy has others, and so has a file that was renamed over it.
fn file_identity(fd: BorrowedFd<'_>) -> u64 {
    use rustix::fs::{AtFlags, StatxFlags};
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    let Ok(found) = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted) else { return 0 };
    if found.stx_mask & wanted.bits() != wanted.bits() {
        return 0;
    }
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&found.stx_ino.to_le_bytes());
    bytes[8..16].copy_from_slice(&found.stx_btime.tv_sec.to_le_bytes());
    bytes[16..].copy_from_slice(&found.stx_btime.tv_nsec.to_le_bytes());
    name_of(&bytes)
}

/// A device is told by what its maker or its mapper calls it, and a partition by its number, too.
fn device_identity(device: u64) -> u64 {
    let base = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let partition = fs::read_to_string(format!("{base}/partition")).unwrap_or_default();
    let disk = if partition.is_empty() { base } else { format!("{base}/..") };
    let names = ["dm/uuid", "wwid", "device/wwid", "device/serial", "serial"];
    let found = names.iter().find_map(|name| {
        let text = fs::read_to_string(format!("{disk}/{name}")).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    });
    found.map_or(0, |name| name_of(format!("{name}/{}", partition.trim()).as_bytes()))
}

/// Sectors written and discarded since the boot, whoever did it; see the kernel's `block/stat`.
fn written(device: u64) -> u64 {
    let path = format!("/sys/dev/block/{}:{}/stat", rustix::fs::major(device), rustix::fs::minor(device));
    let Ok(text) = fs::read_to_string(path) else { return 0 };
    let fields: Vec<u64> = text.split_ascii_whitespace().filter_map(|field| field.parse().ok()).collect();
    let field = |number: usize| fields.get(number).copied().unwrap_or(0);
    // One more, since 0 says that it is not known.
    if fields.len() < 11 { 0 } else { 1 + field(6) + field(13) }
}

/// What O_DIRECT needs on this file, as the kernel says since 6.1 on most file systems.
fn direct_alignment(fd: BorrowedFd<'_>) -> Option<u32> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, `out` is a whole `statx`, and the descriptor is open while it is borrowed.
    let result = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, out.as_mut_ptr())
    };
    if result != 0 {
        return None;
    }
    // SAFETY: zeroed is a valid `statx`, and the kernel has filled it.
    let out = unsafe { out.assume_init() };
    let block = out.stx_dio_offset_align;
    let known = out.stx_mask & libc::STATX_DIOALIGN != 0 && block.is_power_of_two() && out.stx_dio_mem_align <= 4096;
    known.then(|| block.max(MIN_BLOCK))
}

pub(super) fn allocation(fd: BorrowedFd<'_>, offset: u64) -> Result<Allocation, Errno> {
    let size = rustix::fs::seek(fd, SeekFrom::End(0)).map_err(code)?;
    if offset >= size {
        return Err(Errno::INVAL);
    }
    let to = |end: u64, hole| Ok(Allocation { len: end.min(size) - offset, hole });
    match rustix::fs::seek(fd, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => to(data, true),
        Ok(_) => match rustix::fs::seek(fd, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => to(hole, false),
            _ => to(size, false),
        },
        Err(rustix::io::Errno::NXIO) => to(size, true),
        // A device, or a file system that does not know: all of it may be data.
        Err(_) => to(size, false),
    }
}

pub(super) fn set_len(fd: BorrowedFd<'_>, len: u64, allocate: bool) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(fd).map_err(code)?;
    if is_device(&stat) {
        let size = rustix::fs::seek(fd, SeekFrom::End(0)).map_err(code)?;
        return if size == len { Ok(()) } else { Err(Errno::INVAL) };
    }
    if allocate && len > 0 {
        // Asked first, since the file system takes what it has before it says that it has not enough.
        let room = rustix::fs::fstatvfs(fd).map_err(code)?;
        let missing = len.saturating_sub(stat.st_blocks as u64 * 512);
        if missing > room.f_bavail.saturating_mul(room.f_frsize) {
            return Err(Errno::NOSPC);
        }
        if let Err(error) = rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, len) {
            let _ = rustix::fs::ftruncate(fd, stat.st_size as u64);
            return Err(code(error));
        }
    }
    rustix::fs::ftruncate(fd, len).map_err(code)
}

/// The folder that a path lies in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => Path::new("/"),
    }
}

/// Makes a folder and those above it, durably.
fn make_dir(dir: &Path) -> std::io::Result<()> {
    match fs::create_dir(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && dir.parent().is_some() => {
            make_dir(folder(dir))?;
            fs::create_dir(dir)?;
        }
        Err(error) => return Err(error),
    }
    fs::File::open(folder(dir))?.sync_all()
}

pub(super) fn list(dir: &str) -> Result<Vec<String>, Errno> {
    let read = || -> std::io::Result<Vec<String>> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                make_dir(Path::new(dir))?;
                fs::read_dir(dir)?
            }
            entries => entries?,
        };
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    read().map_err(|e| errno(&e))
}

pub(super) fn rename(from: &str, to: &str) -> Result<(), Errno> {
    fs::rename(from, to).map_err(|e| errno(&e))
}

pub(super) fn remove(path: &str) -> Result<(), Errno> {
    fs::remove_file(path).map_err(|e| errno(&e))
}

pub(super) fn sync_dir(dir: &str) -> Result<(), Errno> {
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| errno(&e))
}

pub(super) fn free_space(dir: &str) -> Result<u64, Errno> {
    let room = rustix::fs::statvfs(dir).map_err(code)?;
    Ok(room.f_bavail.saturating_mul(room.f_frsize))
}

pub(super) fn read_small(path: &str) -> Result<Vec<u8>, Errno> {
    fs::read(path).map_err(|e| errno(&e))
}

pub(super) fn replace_small(path: &str, bytes: &[u8]) -> Result<(), Errno> {
    let replace = || -> std::io::Result<()> {
        let fresh = format!("{path}.new");
        let mut file = fs::File::from(rustix::fs::open(
            &fresh,
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )?);
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        fs::File::open(folder(Path::new(path)))?.sync_all()
    };
    replace().map_err(|e| errno(&e))
}
