//! The disk under a folder: how fast it takes what a journal or a spill writes, and how much room there is.
//!
//! What is written is random, so that no layer below can be clever about it, and lies in a file without a name
//! (`O_TMPFILE`), or one whose name is gone at once: nothing stays, whatever becomes of this process.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::{Check, State};
use crate::operator::values::{millis, show_duration, show_rate, show_size};

const MIB: u64 = 1 << 20;
/// Most that the sequential part writes, bytes.
const MOST: u64 = 256 * MIB;
/// Least for figures that mean something, bytes.
const LEAST: u64 = 8 * MIB;
/// What direct I/O is aligned to, at most, bytes.
const PAGE: usize = 4096;
/// A synced write that takes longer than this, at the 99th percentile, keeps an RPO from being small.
const SLOW_SYNC: Duration = Duration::from_millis(50);
/// Bytes a second below which a journal is slower than most links.
const SLOW_STREAM: f64 = 50.0 * MIB as f64;
/// File systems that are gone with the power.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Room and speed of one folder, of which `reserve` bytes are to stay free.
pub fn folder(path: &Path, reserve: u64, probe: Duration, checks: &mut Vec<Check>) {
    // A folder that the program will make itself is measured where it will be.
    let there = path.ancestors().find(|one| one.is_dir()).unwrap_or(Path::new("/"));
    let (free, total) = match rustix::fs::statvfs(there) {
        Ok(room) => (room.f_bavail.saturating_mul(room.f_frsize), room.f_blocks.saturating_mul(room.f_frsize)),
        Err(error) => {
            checks.push(Check::fail("free space", error.to_string(), "name another folder").of(path.display()));
            return;
        }
    };
    checks.push(room(free, total, reserve).of(path.display()));
    if probe.is_zero() {
        return;
    }
    let most = MOST.min(free / 8 / MIB * MIB);
    if most < LEAST {
        let found = format!("not measured: only {} are free", show_size(free));
        checks.push(Check::warn("disk speed", found, "make room").of(path.display()));
        return;
    }
    checks.push(match measure(there, most, probe) {
        Ok(speed) => judge(&speed, in_memory(there)).of(path.display()),
        Err(error) => Check::fail(
            "disk speed",
            format!("{} cannot be written to: {error}", there.display()),
            "make the folder, for the user that runs the role (mode 0700)",
        )
        .of(path.display()),
    });
}

fn room(free: u64, total: u64, reserve: u64) -> Check {
    let mut found = format!("{} of {} free", show_size(free), show_size(total));
    if reserve > 0 {
        found += &format!("; {} stay so", show_size(reserve));
    }
    let remedy = "more room, or another folder";
    let check = if free < reserve {
        Check::fail("free space", found, remedy)
    } else if free < reserve.saturating_add(512 * MIB) || free < total / 20 {
        Check::warn("free space", found, remedy)
    } else {
        Check::ok("free space", found)
    };
    Check { measured: json!({"free_bytes": free, "total_bytes": total, "reserve_bytes": reserve}), ..check }
}

fn in_memory(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| IN_MEMORY.contains(&stat.f_type))
}

/// What a folder's disk did.
#[derive(Debug)]
struct Speed {
    /// Bytes that direct I/O is aligned to; none where there is no direct I/O.
    direct: Option<usize>,
    /// Bytes a second of 1 MiB writes one after the other, the final sync included.
    stream: f64,
    /// How long 4 KiB and a sync took: each, sorted.
    synced: Vec<Duration>,
}

impl Speed {
    fn percentile(&self, share: f64) -> Duration {
        let at = (self.synced.len() as f64 * share) as usize;
        self.synced.get(at.min(self.synced.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    fn syncs_per_s(&self) -> f64 {
        let all: Duration = self.synced.iter().sum();
        self.synced.len() as f64 / all.as_secs_f64().max(1e-9)
    }
}

fn judge(speed: &Speed, in_memory: bool) -> Check {
    let (p50, p99) = (speed.percentile(0.5), speed.percentile(0.99));
    let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let mut found = format!(
        "4 KiB with a sync: {:.0} a second, p50 {}, p99 {}; 1 MiB in sequence: {}",
        speed.syncs_per_s(),
        show_duration(ns(p50)),
        show_duration(ns(p99)),
        show_rate(speed.stream)
    );
    let (state, remedy) = match speed.direct {
        None => {
            found += "; no direct I/O";
            (State::Fail, "another file system: journals, spills and disks are opened with O_DIRECT")
        }
        Some(align) => {
            found += &format!("; direct I/O by {align} bytes");
            if in_memory {
                found += "; it is in memory";
                (State::Warn, "a folder on a disk: this one is gone with a reboot")
            } else if p99 > SLOW_SYNC || speed.stream < SLOW_STREAM {
                (State::Warn, "a faster disk: an RPO cannot be smaller than what a sync takes here")
            } else {
                (State::Ok, "")
            }
        }
    };
    let measured = json!({
        "synced_writes_per_s": speed.syncs_per_s().round(),
        "synced_write_p50_ms": millis(ns(p50)),
        "synced_write_p99_ms": millis(ns(p99)),
        "sequential_bytes_per_s": speed.stream.round(),
        "direct_io_align_bytes": speed.direct,
    });
    Check { measured, ..Check::new("disk speed", state, found, remedy) }
}

/// A file in the folder that has no name.
fn nameless(folder: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let (flags, mode) = (flags | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    match rustix::fs::open(folder, flags | OFlags::TMPFILE, mode) {
        // EISDIR is said by kernels and file systems that do not know O_TMPFILE.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {}
        done => return Ok(done?),
    }
    let path = folder.join(format!(".afterimage-doctor-{}", uuid::Uuid::new_v4()));
    let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Half of the time for each part.
fn measure(folder: &Path, most: u64, time: Duration) -> io::Result<Speed> {
    let mut room = vec![0; MIB as usize + PAGE];
    let start = room.as_ptr().align_offset(PAGE);
    let block = &mut room[start..start + MIB as usize];
    SystemRandom::new().fill(block).map_err(|_| io::Error::other("no random numbers"))?;
    let (file, direct) = match nameless(folder, OFlags::DIRECT) {
        Ok(file) => {
            let align = alignment(&file, block)?;
            (file, Some(align))
        }
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
            (nameless(folder, OFlags::empty())?, None)
        }
        Err(error) => return Err(error),
    };
    let file = File::from(file);

    let begun = Instant::now();
    let mut written = 0;
    while written < LEAST || (written < most && begun.elapsed() < time / 2) {
        put(&file, block, written)?;
        written += MIB;
        // A disk that takes longer than this for the least is measured by what it has done.
        if begun.elapsed() > time.saturating_mul(2) {
            break;
        }
    }
    file.sync_data()?;
    let stream = written as f64 / begun.elapsed().as_secs_f64().max(1e-9);

    let (begun, mut synced) = (Instant::now(), Vec::new());
    let pages = written / PAGE as u64;
    // Places that do not follow each other, each in the block that is there already.
    let mut place = 7u64;
    while synced.len() < 100_000 && (synced.len() < 16 || begun.elapsed() < time / 2) {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let one = Instant::now();
        put(&file, &block[..PAGE], (place >> 33) % pages * PAGE as u64)?;
        file.sync_data()?;
        synced.push(one.elapsed());
        if begun.elapsed() > time.saturating_mul(2) {
            break;
        }
    }
    synced.sort_unstable();
    Ok(Speed { direct, stream, synced })
}

fn put(file: &File, data: &[u8], at: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    file.write_all_at(data, at)
}

/// The smallest write that direct I/O takes here.
fn alignment(file: &OwnedFd, block: &[u8]) -> io::Result<usize> {
    match rustix::io::pwrite(file, &block[..512], 512) {
        Ok(_) => Ok(512),
        Err(rustix::io::Errno::INVAL) => Ok(PAGE),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(direct: Option<usize>, stream: f64, sync_ms: u64) -> Speed {
        Speed { direct, stream, synced: vec![Duration::from_millis(sync_ms); 100] }
    }

    #[test]
    fn a_probe_measures_and_leaves_nothing() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let begun = Instant::now();
        let speed = measure(dir.path(), 16 * MIB, Duration::from_millis(200)).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(speed.stream > 0.0 && speed.synced.len() >= 16, "{speed:?}");
        assert!(speed.percentile(0.5) <= speed.percentile(0.99));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_is_judged_by_its_p99_its_stream_and_direct_io() {
        assert_eq!(judge(&speed(Some(512), 1e9, 1), false).state, State::Ok);
        assert_eq!(judge(&speed(Some(512), 1e9, 1), true).state, State::Warn);
        assert_eq!(judge(&speed(Some(512), 1e9, 80), false).state, State::Warn);
        assert_eq!(judge(&speed(Some(512), 1e6, 1), false).state, State::Warn);
        assert_eq!(judge(&speed(None, 1e9, 1), false).state, State::Fail);
    }

    #[test]
    fn room_below_the_reserve_fails() {
        assert_eq!(room(MIB, 100 * MIB, 2 * MIB).state, State::Fail);
        assert_eq!(room(600 * MIB, 1000 * MIB, 256 * MIB).state, State::Warn);
        assert_eq!(room(900_000 * MIB, 1_000_000 * MIB, MIB).state, State::Ok);
    }

    #[test]
    fn a_folder_that_nobody_may_write_to_fails_and_one_to_come_is_measured_above() {
        let mut checks = Vec::new();
        folder(Path::new("/proc/nothing/here"), 0, Duration::from_millis(10), &mut checks);
        assert!(checks.iter().all(|check| check.state != State::Ok), "{checks:?}");
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut checks = Vec::new();
        folder(&dir.path().join("to/come"), 0, Duration::ZERO, &mut checks);
        assert_eq!(checks.len(), 1);
        assert!(checks[0].of.ends_with("to/come"));
    }
}
