//! How often payload is copied in user space: at most once, and not at all once writes are alike.

use super::bed::{Bed, pattern};
use afterimage_dataplane::nbd::proto::{RequestHeader, cmd};

/// Writes `count` times `len` bytes, `depth` at a time, one after the other on the disk from `start`; returns how many
/// bytes of these were copied.
fn copied(bed: &mut Bed, client: usize, start: u64, len: usize, count: u64, depth: u64) -> u64 {
    let before = bed.server.counters();
    for first in (0..count).step_by(depth as usize) {
        let mut bytes = Vec::new();
        for n in first..count.min(first + depth) {
            let header = RequestHeader {
                flags: 0,
                kind: cmd::WRITE,
                cookie: n,
                offset: start + n * len as u64,
                len: len as u32,
            };
            bytes.extend_from_slice(&header.bytes());
            bytes.extend_from_slice(&pattern(n, len));
        }
        bed.send(client, &bytes);
        for _ in first..count.min(first + depth) {
            assert_eq!(bed.error(client), 0);
        }
    }
    for n in 0..count {
        let at = (start + n * len as u64) as usize;
        assert_eq!(bed.disk().data[at..at + len], pattern(n, len), "write {n}");
    }
    let after = bed.server.counters();
    assert_eq!(after.written_bytes - before.written_bytes, count * len as u64);
    after.copied_bytes - before.copied_bytes
}

#[test]
fn nothing_is_copied_once_small_writes_are_alike() {
    for (len, depth) in [(4096, 1), (4096, 32), (512, 7), (16384, 8), (65536, 4), (5000, 1), (1000, 20)] {
        let mut bed = Bed::new(len as u64 + depth);
        let client = bed.serving(true);
        let count = 40.min(depth * 10);
        let first = copied(&mut bed, client, 65536, len, count, depth);
        assert!(first <= count * len as u64, "at most once");
        let steady = copied(&mut bed, client, 65536 + count * len as u64, len, 60, depth);
        assert_eq!(steady, 0, "{len} bytes, {depth} at a time");
    }
}

#[test]
fn nothing_is_copied_of_large_writes_after_the_first() {
    for (len, depth) in [(1 << 20, 1), (1 << 20, 3), (200_000, 2), (70_000, 5)] {
        let mut bed = Bed::new(len as u64 + depth);
        let client = bed.serving(false);
        assert!(copied(&mut bed, client, 4096, len, 1, 1) <= 32 * 1024);
        assert_eq!(copied(&mut bed, client, 4096, len, 6, depth), 0, "{len} bytes, {depth} at a time");
    }
}

#[test]
fn a_change_of_size_costs_one_copy_of_what_was_misplaced() {
    let mut bed = Bed::new(9);
    let client = bed.serving(false);
    copied(&mut bed, client, 0, 4096, 64, 16);
    for len in [8192, 512, 100_000, 4096, 3333] {
        let count = 20;
        let here = copied(&mut bed, client, 1 << 20, len, count, 10);
        assert!(here < count * len as u64, "{here} of {} bytes of writes of {len}", count * len as u64);
        let next = (1 << 20) + count * len as u64;
        assert_eq!(copied(&mut bed, client, next, len, count, 10), 0, "steady again at {len}");
    }
}

#[test]
fn flushes_between_single_writes_do_not_misplace_them() {
    let mut bed = Bed::new(10);
    let client = bed.serving(false);
    copied(&mut bed, client, 0, 4096, 4, 1);
    for n in 0..20 {
        assert_eq!(copied(&mut bed, client, n * 8192, 4096, 1, 1), 0);
        bed.request(client, cmd::FLUSH, 0, 1, 0, 0);
        assert_eq!(bed.error(client), 0);
    }
}

#[test]
fn reads_are_never_copied_and_their_bytes_are_counted() {
    let mut bed = Bed::new(11);
    let client = bed.serving(true);
    assert_eq!(bed.read(client, 0, 0, 1 << 20).map(|d| d.len()), Ok(1 << 20));
    let counters = bed.server.counters();
    assert_eq!((counters.read_bytes, counters.copied_bytes), (1 << 20, 0));
}
