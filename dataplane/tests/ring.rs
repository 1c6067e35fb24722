//! What only the ring has: wake-ups from other threads, memory that is not registered, draining, real devices, cost.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use afterimage_dataplane::io::ring::{Ring, RingConfig};
use afterimage_dataplane::io::{Class, Done, Errno, File, Io, Op, OpenHow, Part, Pool};

const NEW: OpenHow = OpenHow { write: true, create_new: true, lock: false };

fn pool() -> Pool {
    Pool::new(&[Class { capacity: 4096, count: 256 }, Class { capacity: 1 << 20, count: 8 }])
}

fn ring() -> Ring {
    Ring::new(pool(), RingConfig::default()).expect("this kernel has what the ring needs")
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder")
}

fn file(ring: &mut Ring, dir: &tempfile::TempDir, len: u64) -> File {
    let path = format!("{}/f", dir.path().display());
    let file = ring.open(&path, NEW).expect("a new file");
    ring.set_len(file, len, true).expect("room for it");
    file
}

fn part(pool: &Pool, len: usize) -> Part {
    Part { buf: pool.take(len).expect("the pool has room"), at: 0, len }
}

fn wait(ring: &mut Ring) -> Done {
    let mut done = Vec::new();
    let deadline = ring.now() + 10_000_000_000;
    while done.is_empty() {
        assert!(ring.now() < deadline, "no completion came");
        ring.poll(Some(deadline), &mut done);
    }
    assert_eq!(done.len(), 1);
    done.remove(0)
}

fn pair(ring: &mut Ring) -> (afterimage_dataplane::io::Sock, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    (ring.attach(OwnedFd::from(ours)).expect("a slot"), theirs)
}

#[test]
fn another_thread_wakes_a_waiting_poll() {
    let mut ring = ring();
    let waker = ring.waker();
    for _ in 0..100 {
        let waker = waker.clone();
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(300));
            waker.wake();
            waker.wake();
        });
        let start = Instant::now();
        let mut done = Vec::new();
        let until = ring.now() + 5_000_000_000;
        ring.poll(Some(until), &mut done);
        assert!(done.is_empty() && start.elapsed() < Duration::from_secs(4));
        other.join().expect("the other thread ends");
        // The second ring of the bell may come late; it must not be lost, nor ring for ever.
        let soon = ring.now() + 1_000_000;
        ring.poll(Some(soon), &mut done);
    }
}

#[test]
fn a_wake_before_the_poll_is_not_lost() {
    let mut ring = ring();
    let mut done = Vec::new();
    ring.poll(None, &mut done);
    ring.waker().wake();
    let start = Instant::now();
    let until = ring.now() + 5_000_000_000;
    ring.poll(Some(until), &mut done);
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[test]
fn a_poll_without_events_lasts_until_its_time() {
    let mut ring = ring();
    let mut done = Vec::new();
    let until = ring.now() + 20_000_000;
    ring.poll(Some(until), &mut done);
    assert!(ring.now() >= until && done.is_empty());
}

#[test]
fn buffers_of_another_pool_work_too() {
    let (mut ring, dir, other) = (ring(), dir(), pool());
    let file = file(&mut ring, &dir, 65536);
    let mut source = part(&other, 8192);
    source.buf[..8192].fill(0x5a);
    ring.submit(1, Op::Write { file, offset: 0, part: source, durable: false });
    assert_eq!(wait(&mut ring).result, Ok(8192));
    ring.submit(2, Op::Read { file, offset: 0, part: part(&other, 8192) });
    let back = wait(&mut ring);
    assert!(back.part.expect("the buffer comes back").buf[..8192].iter().all(|b| *b == 0x5a));
}

#[test]
fn an_unregistered_ring_works() {
    let config = RingConfig { register_pool: false, ..RingConfig::default() };
    let (mut ring, dir) = (Ring::new(pool(), config).expect("a ring"), dir());
    let file = file(&mut ring, &dir, 65536);
    let source = part(ring.pool(), 4096);
    ring.submit(1, Op::Write { file, offset: 4096, part: source, durable: true });
    assert_eq!(wait(&mut ring).result, Ok(4096));
}

#[test]
fn dropping_a_ring_gives_every_buffer_back() {
    let (pool, dir) = (pool(), dir());
    let mut ring = Ring::new(pool.clone(), RingConfig { entries: 16, ..RingConfig::default() }).expect("a ring");
    let file = file(&mut ring, &dir, 1 << 20);
    let (sock, mut peer) = pair(&mut ring);
    ring.submit(1, Op::Recv { sock, part: part(&pool, 4096) });
    let parts = (0..4).map(|_| part(&pool, 1 << 20)).collect();
    ring.submit(2, Op::SendV { sock, parts });
    for n in 0..100 {
        ring.submit(3 + n, Op::Write { file, offset: n * 4096, part: part(&pool, 4096), durable: true });
    }
    let mut done = Vec::new();
    ring.poll(None, &mut done);
    for n in 0..50 {
        ring.submit(200 + n, Op::Write { file, offset: n * 4096, part: part(&pool, 4096), durable: false });
    }
    done.clear();
    drop(ring);
    assert_eq!(pool.free_bytes(), pool.total_bytes());
    // The peer is told, too.
    peer.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    std::io::copy(&mut peer, &mut std::io::sink()).expect("the stream ends");
}

#[test]
fn numbers_of_closed_files_are_not_taken_for_new_ones() {
    let (mut ring, dir) = (ring(), dir());
    let first = file(&mut ring, &dir, 4096);
    ring.close(first);
    let path = format!("{}/g", dir.path().display());
    let second = ring.open(&path, NEW).expect("a new file");
    assert_ne!(first, second);
    assert_eq!(ring.info(first), Err(Errno::BADF));
    let source = part(ring.pool(), 4096);
    ring.submit(1, Op::Write { file: first, offset: 0, part: source, durable: false });
    let refused = wait(&mut ring);
    assert!(refused.result == Err(Errno::BADF) && refused.part.is_some());
    assert_eq!(ring.info(second).expect("it is open").size, 0);
}

#[test]
fn a_full_table_refuses_and_makes_nothing() {
    let config = RingConfig { files: 1, ..RingConfig::default() };
    let (mut ring, dir) = (Ring::new(pool(), config).expect("a ring"), dir());
    file(&mut ring, &dir, 4096);
    let path = format!("{}/g", dir.path().display());
    assert_eq!(ring.open(&path, NEW), Err(Errno::NFILE));
    assert!(!std::path::Path::new(&path).exists());
    let (ours, _theirs) = UnixStream::pair().expect("a pair of sockets");
    assert_eq!(ring.attach(OwnedFd::from(ours)), Err(Errno::NFILE));
}

#[test]
fn a_registration_longer_than_one_piece_works() {
    // The kernel registers at most 1 GiB in one piece, and every page of it takes real memory: only with enough.
    let free = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free_kib =
        free.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.trim().trim_end_matches(" kB").parse().ok());
    if free_kib.unwrap_or(0u64) < 4 << 20 {
        eprintln!("skipped: less than 4 GiB of memory available");
        return;
    }
    // 3 MiB buffers: one of them straddles the border at 1 GiB.
    let pool = Pool::new(&[Class { capacity: 3 << 20, count: 345 }]);
    let mut ring = Ring::new(pool.clone(), RingConfig::default()).expect("a ring");
    let dir = dir();
    let file = file(&mut ring, &dir, 3 << 20);
    let held: Vec<_> = (0..345).map(|_| part(&pool, 3 << 20)).collect();
    for (n, part) in held.into_iter().enumerate().skip(338) {
        ring.submit(n as u64, Op::Write { file, offset: 0, part, durable: false });
        assert_eq!(wait(&mut ring).result, Ok(3 << 20));
    }
}

/// A loop device over a file, gone at the end; none where this host has none to give.
struct LoopDevice(String);

impl LoopDevice {
    fn new(path: &str) -> Option<Self> {
        let made = std::process::Command::new("losetup").args(["-f", "--show", "--direct-io=on", path]).output();
        let made = made.ok().filter(|made| made.status.success())?;
        Some(Self(String::from_utf8_lossy(&made.stdout).trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_opened_locked_written_and_zeroed() {
    let (mut ring, dir) = (ring(), dir());
    let backing = format!("{}/backing", dir.path().display());
    std::fs::File::create(&backing).and_then(|file| file.set_len(8 << 20)).expect("a backing file");
    let Some(device) = LoopDevice::new(&backing) else {
        eprintln!("skipped: no loop device can be made here");
        return;
    };
    let how = OpenHow { write: true, create_new: false, lock: true };
    let file = ring.open(&device.0, how).expect("nobody holds it");
    assert_eq!(ring.open(&device.0, how), Err(Errno::BUSY));
    let info = ring.info(file).expect("it is open");
    assert!(info.device && info.size == 8 << 20 && info.block >= 512 && info.physical_block >= info.block);
    assert_eq!(ring.set_len(file, 8 << 20, true), Ok(()));
    assert_eq!(ring.set_len(file, 4 << 20, false), Err(Errno::INVAL));
    let mut source = part(ring.pool(), 1 << 20);
    source.buf.fill(7);
    ring.submit(1, Op::Write { file, offset: 1 << 20, part: source, durable: true });
    assert_eq!(wait(&mut ring).result, Ok(1 << 20));
    assert!(!ring.allocation(file, 1 << 20).expect("it is open").hole);
    if info.discard {
        ring.submit(2, Op::Zero { file, offset: (1 << 20) + 4096, len: 4096, unmap: true });
        assert_eq!(wait(&mut ring).result, Ok(0));
    }
    ring.submit(3, Op::Zero { file, offset: (1 << 20) + 8192, len: 4096, unmap: false });
    assert_eq!(wait(&mut ring).result, Ok(0));
    ring.submit(4, Op::Sync { file });
    assert_eq!(wait(&mut ring).result, Ok(0));
    let target = part(ring.pool(), 1 << 20);
    ring.submit(5, Op::Read { file, offset: 1 << 20, part: target });
    let back = wait(&mut ring).part.expect("the buffer comes back");
    let zeros = if info.discard { 4096..12288 } else { 8192..12288 };
    for (at, byte) in back.buf.iter().enumerate() {
        assert_eq!(*byte, if zeros.contains(&at) { 0 } else { 7 }, "byte {at}");
    }
    let target = part(ring.pool(), 8192);
    ring.submit(6, Op::Read { file, offset: (8 << 20) - 4096, part: target });
    assert_eq!(wait(&mut ring).result, Err(Errno::IO));
    ring.close(file);
    let file = ring.open(&device.0, how).expect("it was closed");
    ring.close(file);
    drop(ring);
}

#[test]
fn opening_a_file_does_not_change_its_time() {
    let (mut ring, dir) = (ring(), dir());
    let path = format!("{}/f", dir.path().display());
    std::fs::write(&path, [1; 4096]).expect("a file");
    let before = std::fs::metadata(&path).and_then(|m| m.modified()).expect("its time");
    std::thread::sleep(Duration::from_millis(30));
    let file = ring.open(&path, OpenHow { write: true, create_new: false, lock: true }).expect("it is there");
    let before = before.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    assert_eq!(ring.info(file).expect("it is open").mtime_ns, before);
}

#[test]
fn more_completions_than_the_queue_holds_are_not_lost() {
    // 32 completions fit; 200 come while nobody looks.
    let mut ring = Ring::new(pool(), RingConfig { entries: 8, ..RingConfig::default() }).expect("a ring");
    let dir = dir();
    let file = file(&mut ring, &dir, 1 << 20);
    for n in 0..200 {
        let source = part(ring.pool(), 4096);
        ring.submit(n, Op::Write { file, offset: n * 4096, part: source, durable: false });
    }
    let mut done = Vec::new();
    ring.poll(None, &mut done);
    std::thread::sleep(Duration::from_millis(100));
    let deadline = ring.now() + 10_000_000_000;
    while done.len() < 200 {
        assert!(ring.now() < deadline, "{} of 200 completions came", done.len());
        ring.poll(Some(deadline), &mut done);
    }
    assert!(done.iter().all(|done| done.result == Ok(4096)));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn polls_do_not_enter_the_kernel_in_vain() {
    let mut ring = ring();
    let mut done = Vec::new();
    ring.poll(None, &mut done);
    let before = ring.stats();
    for _ in 0..1000 {
        ring.poll(None, &mut done);
    }
    assert_eq!(ring.stats().enters, before.enters);
}

#[test]
fn one_system_call_submits_and_waits() {
    let (mut ring, dir) = (ring(), dir());
    let file = file(&mut ring, &dir, 1 << 20);
    let mut done = Vec::new();
    ring.poll(None, &mut done);
    let before = ring.stats();
    let mut buffer = Some(part(ring.pool(), 4096));
    for n in 0..100 {
        let part = buffer.take().expect("it came back");
        ring.submit(n, Op::Write { file, offset: n % 256 * 4096, part, durable: false });
        buffer = wait(&mut ring).part;
    }
    let after = ring.stats();
    assert_eq!(after.completed - before.completed, 100);
    assert!(after.enters - before.enters <= 110, "{} system calls for 100 writes", after.enters - before.enters);
}
