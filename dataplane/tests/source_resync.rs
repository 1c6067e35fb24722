//! Synchronisation by hash, from the source's end: what is asked, what is sent, what a failure in its middle leaves.

#[path = "source/bed.rs"]
#[allow(dead_code)]
mod bed;

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::sim::{Rng, WorldConfig};
use afterimage_dataplane::source::{SourceEvent, SourceLimits};
use afterimage_wire::control::Control;
use afterimage_wire::intent::EXTENT;
use afterimage_wire::record::{HASH_LEN, HASH_STEP, RecordKind};
use bed::{Bed, MS, SIZE, STREAM};

fn limits() -> SourceLimits {
    SourceLimits { queue_bytes: 8 << 20, hot_extents: 0, ..SourceLimits::default() }
}

/// A bed whose one disk is full of bytes that do not compress.
fn full(limits: SourceLimits) -> Bed {
    let bed = Bed::new(1, 1, WorldConfig::default(), limits);
    let mut image = vec![0; SIZE as usize];
    Rng::new(5).fill(&mut image);
    bed.world.put_file(bed.node, &bed::path(0), &image);
    bed
}

/// Bytes of the disk in records of this kind.
fn bytes_of(bed: &Bed, kind: RecordKind) -> u64 {
    bed.held.records.iter().filter(|r| r.kind == kind).map(|r| u64::from(r.len)).sum()
}

#[test]
fn after_a_crash_only_what_differs_is_sent() {
    let mut bed = full(limits());
    bed.ready();
    bed.acked();
    // Written and never sent: 40 blocks of 4 KiB.
    bed.unreachable = true;
    bed.cut();
    let mut rng = Rng::new(11);
    let mut blocks = std::collections::BTreeSet::new();
    while blocks.len() < 40 {
        let block = rng.below(SIZE / 4096);
        blocks.insert(block);
        let mut data = vec![0; 4096];
        rng.fill(&mut data);
        bed.write(0, block * 4096, &data).expect("written");
    }
    bed.world.crash(bed.node);
    bed.restart();
    bed.unreachable = false;
    bed.held.records.clear();
    bed.held.received = 0;
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    let dirty = blocks.len() as u64 * 4096;
    let sent = bytes_of(&bed, RecordKind::SyncWrite);
    assert_eq!(sent, dirty, "exactly the blocks that differ");
    let hashes = bytes_of(&bed, RecordKind::SyncHash) / u64::from(HASH_STEP) * HASH_LEN as u64;
    assert!(hashes > 0 && bed.held.received <= dirty * 105 / 100 + hashes * 2, "{} of {dirty}", bed.held.received);
}

#[test]
fn a_whole_disk_that_the_target_has_is_compared_and_not_sent() {
    let mut bed = full(limits());
    bed.held.images.insert(0, bed.disk(0));
    let image = bed.held.images.get_mut(&0).expect("just put");
    image[5_000_000] ^= 1;
    image[5_000_000 + 4096] ^= 1;
    bed.ready();
    bed.acked();
    bed.assert_equal();
    assert_eq!(bytes_of(&bed, RecordKind::SyncWrite), 8192);
    assert_eq!(bytes_of(&bed, RecordKind::SyncHash), SIZE);
}

#[test]
fn an_empty_target_is_not_asked_about_everything() {
    let mut bed = full(limits());
    bed.ready();
    bed.acked();
    bed.assert_equal();
    assert_eq!(bytes_of(&bed, RecordKind::SyncWrite), SIZE);
    assert!(bytes_of(&bed, RecordKind::SyncHash) < SIZE);
}

#[test]
fn the_end_waits_for_every_answer() {
    let mut bed = full(limits());
    bed.held.images.insert(0, bed.disk(0));
    bed.held.silent = true;
    bed.protect().expect("the disk is there");
    bed.pass(5000 * MS);
    assert_eq!(bed.held.count(RecordKind::SyncEnd), 0);
    assert!(bed.held.count(RecordKind::SyncHash) > 0);
    // A target that never answers gets all of it, so that the synchronisation ends.
    bed.until("protected", |bed| bed.is_protected());
    bed.assert_equal();
}

#[test]
fn what_was_asked_before_a_lost_connection_is_asked_again() {
    let mut bed = full(limits());
    bed.held.images.insert(0, bed.disk(0));
    bed.held.silent = true;
    bed.protect().expect("the disk is there");
    bed.until("asked", |bed| bed.held.count(RecordKind::SyncHash) > 4);
    bed.pass(200 * MS);
    bed.held.silent = false;
    let begun = bed.world.now();
    bed.cut();
    bed.until("protected", |bed| bed.is_protected());
    assert!(bed.world.now() - begun < 20_000 * MS, "it did not wait until it lost patience");
    assert_eq!(bytes_of(&bed, RecordKind::SyncWrite), 0);
    bed.assert_equal();
}

#[test]
fn writes_while_it_runs_are_kept() {
    let mut bed = full(limits());
    bed.held.images.insert(0, bed.disk(0));
    let mut rng = Rng::new(3);
    let image = bed.held.images.get_mut(&0).expect("just put");
    for _ in 0..200 {
        image[rng.below(SIZE) as usize] ^= 0x55;
    }
    bed.protect().expect("the disk is there");
    let mut turn = 0u8;
    while !bed.is_protected() {
        let request = bed.write_request(rng.below(SIZE / 512 - 16) * 512, &vec![turn; 512 * 7], false);
        let cookie = bed.ask(0, request);
        bed.answer(cookie).expect("written");
        turn = turn.wrapping_add(1);
    }
    bed.acked();
    bed.assert_equal();
}

#[test]
fn a_whole_one_goes_on_where_a_crash_left_it() {
    let mut bed = full(SourceLimits { sync_rate: 8 << 20, ..limits() });
    bed.protect().expect("the disk is there");
    bed.until("half done", |bed| {
        bed.world.now() > 3_500 * MS && bed.status().disks[0].sync.is_some_and(|s| s.done > 24 << 20)
    });
    bed.pass(2500 * MS);
    let left = bed.log_bits(0).len() as u64;
    assert!(left < SIZE / EXTENT - 3, "bits of what is done are cleared: {left}");
    bed.world.crash(bed.node);
    bed.held.records.clear();
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { whole: true, .. })));
    let read = bytes_of(&bed, RecordKind::SyncHash) + bytes_of(&bed, RecordKind::SyncWrite);
    assert!(read <= left * EXTENT * 2, "{read} bytes for {left} extents");
    assert!(bytes_of(&bed, RecordKind::SyncHash) <= left * EXTENT);
    bed.acked();
    bed.assert_equal();
}

#[test]
fn a_target_that_lost_something_begins_it_at_zero() {
    let mut bed = full(SourceLimits { sync_rate: 8 << 20, ..limits() });
    bed.protect().expect("the disk is there");
    bed.until("half done", |bed| {
        bed.world.now() > 3_500 * MS && bed.status().disks[0].sync.is_some_and(|s| s.done > 24 << 20)
    });
    bed.pass(2500 * MS);
    bed.world.crash(bed.node);
    bed.held = bed::Held::default();
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}

#[test]
fn an_end_is_owed_after_a_crash_although_no_bit_is_set() {
    let mut bed = full(SourceLimits { sync_rate: 1 << 20, ..limits() });
    bed.held.images.insert(0, bed.disk(0));
    bed.limits.sync_rate = 0;
    bed.ready();
    bed.acked();
    bed.until("cleared", |bed| bed.log_bits(0).is_empty());
    // The target wants a range; its synchronisation begins and never ends in this life.
    bed.held.silent = true;
    bed.tell(Control::Want { disk: 0, offset: 3 * EXTENT + 4096, len: 8192 });
    let ends = bed.held.count(RecordKind::SyncEnd);
    bed.until("begun", |bed| bed.held.count(RecordKind::SyncBegin) > ends);
    bed.world.crash(bed.node);
    bed.held.silent = false;
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(bed.held.count(RecordKind::SyncEnd) > ends);
    bed.assert_equal();
}

#[test]
fn a_range_that_the_target_wants_is_mended() {
    let mut bed = full(limits());
    bed.held.images.insert(0, bed.disk(0));
    bed.ready();
    bed.acked();
    let image = bed.held.images.get_mut(&0).expect("just put");
    image[9_000_000..9_010_000].fill(0xAB);
    bed.held.records.clear();
    bed.tell(Control::Want { disk: 0, offset: 9_000_000, len: 10_000 });
    bed.until("mended", |bed| bed.held.count(RecordKind::SyncEnd) == 1);
    bed.acked();
    bed.assert_equal();
    assert_eq!(bytes_of(&bed, RecordKind::SyncWrite), 3 * 4096, "the blocks that it lies in");
    assert_eq!(bytes_of(&bed, RecordKind::SyncHash), EXTENT);
}

#[test]
fn a_bound_on_its_speed_is_kept_and_the_time_left_is_told() {
    let mut bed = full(SourceLimits { sync_rate: 4 << 20, ..limits() });
    bed.held.images.insert(0, bed.disk(0));
    let begun = bed.world.now();
    bed.protect().expect("the disk is there");
    bed.until("half done", |bed| bed.status().disks[0].sync.is_some_and(|s| s.done > 20 << 20));
    let sync = bed.status().disks[0].sync.expect("it runs");
    let (left, seconds) = (sync.left.expect("it is known"), (sync.total - sync.done) / (4 << 20));
    assert!((seconds..seconds * 2 + 2).contains(&(left / (1000 * MS))), "{left} ns for {seconds} s");
    assert!(sync.whole && sync.total == SIZE && sync.compared > 0 && sync.sent == 0);
    bed.until("protected", |bed| bed.is_protected());
    assert!(bed.world.now() - begun >= SIZE / (4 << 20) * 1000 * MS * 9 / 10);
    bed.assert_equal();
}

#[test]
fn a_disk_that_grows_is_kept_to_its_new_end() {
    const NEW: u64 = SIZE + 10 * 1024 * 1024 + 4096;
    let mut bed = full(limits());
    bed.ready();
    bed.acked();
    bed.held.records.clear();
    bed.grow(0, NEW);
    bed.pass(1500 * MS);
    assert_eq!(bed.status().disks[0].size, NEW);
    bed.write(0, NEW - 8192, &[7; 8192]).expect("written");
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.disk(0).len() as u64, NEW);
    let marks: Vec<_> = bed.held.records.iter().map(|r| r.kind).collect();
    let at = |kind| marks.iter().position(|k| *k == kind).expect("it is there");
    assert!(at(RecordKind::SyncBegin) < at(RecordKind::Resize) && at(RecordKind::Resize) < at(RecordKind::SyncEnd));
    assert!(!bed.held.records.iter().any(|r| r.kind == RecordKind::SyncHash && r.end() <= SIZE - EXTENT));
}

#[test]
fn a_disk_that_grew_while_nobody_looked_owes_only_what_is_new() {
    const NEW: u64 = SIZE + 3 * EXTENT;
    let mut bed = full(limits());
    bed.ready();
    bed.acked();
    bed.until("cleared", |bed| bed.log_bits(0).is_empty());
    bed.world.crash(bed.node);
    bed.grow(0, NEW);
    bed.held.images.get_mut(&0).expect("there").resize(NEW as usize, 0xEE);
    bed.held.records.clear();
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { whole: false, .. })));
    bed.acked();
    bed.assert_equal();
    let changed = bed.held.records.iter().filter(|r| r.kind.changes_disk() || r.kind == RecordKind::SyncHash);
    assert!(changed.clone().count() > 0 && changed.clone().all(|r| r.offset >= SIZE), "only what is new");
}

#[test]
fn a_crash_at_any_step_of_growing_is_mended() {
    const NEW: u64 = SIZE + 2 * EXTENT;
    for steps in (0..150).step_by(15) {
        let mut bed = full(limits());
        bed.ready();
        bed.grow(0, NEW);
        bed.until("grown", |bed| bed.held.count(RecordKind::SyncBegin) == 2);
        let request = bed.write_request(SIZE + 100 * 4096, &[9; 4096], false);
        bed.ask(0, request);
        for _ in 0..steps {
            bed.step();
        }
        bed.world.crash(bed.node);
        bed.held.images.get_mut(&0).expect("there").resize(NEW as usize, 0xEE);
        bed.restart();
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        bed.assert_equal();
    }
}

#[test]
fn a_synchronisation_survives_any_number_of_failures() {
    for seed in 0..4 {
        let mut bed = full(SourceLimits { sync_rate: 16 << 20, ..limits() });
        let mut rng = Rng::new(seed);
        bed.protect().expect("the disk is there");
        for turn in 0..12u64 {
            bed.pass(rng.between(50, 900) * MS);
            for _ in 0..rng.below(8) {
                let request = bed.write_request(rng.below(SIZE / 4096 - 8) * 4096, &[turn as u8; 20_000], false);
                bed.ask(0, request);
            }
            match rng.below(6) {
                0 | 1 => bed.cut(),
                2 => drop(bed.ask(0, Request::Flush)),
                3 => {
                    bed.world.power_loss(bed.node);
                    bed.restart();
                }
                4 => {
                    bed.world.crash(bed.node);
                    bed.restart();
                }
                _ => {}
            }
        }
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        bed.assert_equal();
        let _ = STREAM;
    }
}
