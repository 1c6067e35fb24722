//! The outage ladder of the source: memory, the spill, the dirty map; and what a stop or a crash leaves in the spill.

#[allow(dead_code)] // shared with other tests
#[path = "source/bed.rs"]
mod bed;

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::sim::{Fault, Rng, WorldConfig};
use afterimage_dataplane::io::{Errno, Io};
use afterimage_dataplane::source::{GroupState, Rung, SourceEvent, SourceLimits};
use afterimage_wire::ids::IncarnationId;
use afterimage_wire::intent::EXTENT;
use afterimage_wire::record::RecordKind;
use bed::{Bed, MS, SIZE};

const SPILL: &str = "/spill/";
const MIB: u64 = 1 << 20;

fn limits(spill_bytes: u64) -> SourceLimits {
    SourceLimits {
        queue_bytes: 4 << 20,
        spill_dir: "/spill".into(),
        spill_bytes,
        spill_segment_bytes: 4 << 20,
        stop_wait: 2000 * MS,
        ..SourceLimits::default()
    }
}

fn bed(seed: u64, spill_bytes: u64) -> Bed {
    Bed::new(seed, 2, WorldConfig::default(), limits(spill_bytes))
}

/// Writes that do not compress, `depth` at a time, over both disks.
fn load(bed: &mut Bed, rng: &mut Rng, mib: u64, depth: usize) {
    let mut left = mib * MIB / 65536;
    while left > 0 {
        let cookies: Vec<_> = (0..depth.min(left as usize))
            .map(|_| {
                let mut bytes = vec![0; 65536];
                rng.fill(&mut bytes);
                let request = bed.write_request(rng.below((SIZE - 65536) / 4096) * 4096, &bytes, false);
                bed.ask(rng.below(2) as usize, request)
            })
            .collect();
        left -= cookies.len() as u64;
        for cookie in cookies {
            bed.answer(cookie).expect("written");
        }
    }
}

/// The target is gone.
fn lose_target(bed: &mut Bed) {
    bed.unreachable = true;
    bed.cut();
    bed.until("noticed", |bed| !bed.is_protected());
}

fn spill_files(bed: &Bed) -> Vec<String> {
    bed.world.paths(bed.node, SPILL)
}

fn syncs(bed: &Bed) -> usize {
    bed.events.iter().filter(|e| matches!(e, SourceEvent::SyncBegun { .. })).count()
}

fn faults(bed: &Bed) -> usize {
    bed.events.iter().filter(|e| matches!(e, SourceEvent::SpillFault { .. })).count()
}

fn stop(bed: &mut Bed) -> bool {
    bed.source.stop(&mut bed.io);
    bed.until("stopped", |bed| bed.source.is_idle());
    bed.events.iter().any(|e| matches!(e, SourceEvent::Stopped { clean: true, .. }))
}

/// Everything that was captured came, in order and without a gap, and no synchronisation was needed for it.
fn back_without_resync(bed: &mut Bed) {
    bed.unreachable = false;
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.count(RecordKind::SyncBegin), 2, "only the first synchronisations");
    assert!(bed.status().rpo_now < 2000 * MS, "{}", bed.status().rpo_now);
    assert_eq!(bed.status().rung, Rung::Normal);
    assert_eq!(spill_files(bed), Vec::<String>::new());
}

#[test]
fn an_outage_longer_than_memory_loses_no_record() {
    let mut bed = bed(1, 64 * MIB);
    bed.ready();
    lose_target(&mut bed);
    load(&mut bed, &mut Rng::new(1), 24, 8);
    let status = bed.status();
    assert_eq!((status.rung, status.uncaptured), (Rung::Spilling, 0));
    assert!(status.spill_bytes > 16 * MIB && status.spill_bytes <= 64 * MIB, "{}", status.spill_bytes);
    assert!(status.queue_bytes <= 4 << 20, "{}", status.queue_bytes);
    assert_eq!(status.catch_up, None, "without a link nobody knows");
    assert!(status.rpo_now > 0);
    back_without_resync(&mut bed);
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::State { state: GroupState::CatchingUp, .. })));
    assert_eq!(faults(&bed), 0);
}

#[test]
fn the_host_works_on_while_the_spill_is_shipped() {
    let mut bed = bed(2, 64 * MIB);
    bed.ready();
    let mut rng = Rng::new(2);
    for _ in 0..3 {
        lose_target(&mut bed);
        load(&mut bed, &mut rng, 12, 4);
        bed.unreachable = false;
        load(&mut bed, &mut rng, 6, 4);
    }
    back_without_resync(&mut bed);
}

#[test]
fn a_connection_that_breaks_again_and_again_repeats_nothing_wrongly() {
    let mut bed = bed(3, 64 * MIB);
    bed.ready();
    lose_target(&mut bed);
    load(&mut bed, &mut Rng::new(3), 20, 8);
    bed.unreachable = false;
    for round in 0..12 {
        // Some of what arrives is not acknowledged: the next connection begins beyond the acknowledged place.
        bed.held.mute = round % 2 == 0;
        bed.pass(30 * MS);
        bed.cut();
    }
    bed.held.mute = false;
    back_without_resync(&mut bed);
}

#[test]
fn a_clean_stop_in_an_outage_costs_no_resync() {
    let mut bed = bed(4, 64 * MIB);
    bed.ready();
    let first = bed.status().incarnation;
    lose_target(&mut bed);
    let mut rng = Rng::new(4);
    load(&mut bed, &mut rng, 12, 8);
    let captured = bed.status().captured_seq;
    assert!(stop(&mut bed));
    bed.restart();
    // Twice, with writes in between: now two earlier lives wait.
    load(&mut bed, &mut rng, 2, 4);
    assert!(bed.status().rpo_now >= 1000 * MS, "the age of what waits goes on: {}", bed.status().rpo_now);
    let second = bed.status().incarnation;
    assert!(stop(&mut bed));
    bed.restart();
    assert_eq!(syncs(&bed), 0);
    let third = bed.status().incarnation;
    load(&mut bed, &mut rng, 2, 4);
    bed.held.hellos.clear();
    back_without_resync(&mut bed);
    assert!(bed.held.records.iter().any(|r| r.seq == captured));
    let mut lives: Vec<IncarnationId> = bed.held.hellos.iter().map(|h| h.incarnation).collect();
    lives.dedup();
    assert_eq!(lives, [first, second, third]);
}

#[test]
fn a_clean_stop_with_a_slow_target_is_quick_and_costs_no_resync() {
    let mut bed = bed(5, 64 * MIB);
    bed.ready();
    bed.held.mute = true;
    load(&mut bed, &mut Rng::new(5), 3, 4);
    let begun = bed.world.now();
    assert!(stop(&mut bed));
    assert!(bed.world.now() - begun < 1500 * MS, "{}", bed.world.now() - begun);
    bed.held.mute = false;
    bed.restart();
    back_without_resync(&mut bed);
}

#[test]
fn after_a_crash_the_spill_is_shipped_and_only_what_is_in_doubt_is_read() {
    for seed in 0..6 {
        let mut bed = bed(seed, 64 * MIB);
        bed.ready();
        lose_target(&mut bed);
        load(&mut bed, &mut Rng::new(seed), 12, 8);
        let before = bed.held.position.seq;
        if seed % 2 == 0 {
            bed.world.crash(bed.node)
        } else {
            bed.world.power_loss(bed.node)
        }
        bed.restart();
        let incarnation = bed.status().incarnation;
        bed.unreachable = false;
        bed.held.records.clear();
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        bed.assert_equal();
        let shipped = bed.held.records.iter().filter(|r| r.seq > before && r.kind == RecordKind::Write).count();
        assert!(shipped > 60 || seed % 2 == 1, "seed {seed}: {shipped} writes of the outage are points");
        let sync = bed.held.records.iter().find(|r| r.kind == RecordKind::SyncBegin).expect("in doubt");
        assert_eq!(bed.held.hellos.last().map(|h| h.incarnation), Some(incarnation));
        assert!(bed.held.records.iter().all(|r| r.kind != RecordKind::SyncWrite || r.seq > sync.seq));
        assert!(bed.events.iter().all(|e| !matches!(e, SourceEvent::SyncBegun { whole: true, .. })), "seed {seed}");
        assert_eq!(spill_files(&bed), Vec::<String>::new());
    }
}

#[test]
fn a_clean_stop_is_not_trusted_if_the_spill_is_not_whole() {
    for damage in 0..3 {
        let mut bed = bed(7, 64 * MIB);
        bed.ready();
        lose_target(&mut bed);
        load(&mut bed, &mut Rng::new(7), 12, 8);
        assert!(stop(&mut bed));
        let files = spill_files(&bed);
        match damage {
            // The newest file: found at once. The oldest: when it is read to be sent. A missing one, too.
            0 => bed.world.rot(bed.node, files.last().expect("some"), 40960, 4096),
            1 => bed.world.rot(bed.node, &files[1], 40960, 4096),
            _ => {
                bed.io.remove(&files[1]).expect("removed");
                bed.io.sync_dir(files[1].rsplit_once('/').expect("in a folder").0).expect("synced");
            }
        }
        bed.restart();
        bed.unreachable = false;
        bed.until("protected", |bed| bed.is_protected());
        bed.until("synchronised", |bed| bed.status().disks.iter().all(|d| d.dirty_extents == 0));
        bed.acked();
        bed.assert_equal();
        assert!(syncs(&bed) > 0, "damage {damage}");
        assert_eq!(spill_files(&bed), Vec::<String>::new());
    }
}

#[test]
fn a_target_that_lost_what_it_acknowledged_is_compared_in_full() {
    let mut bed = bed(8, 64 * MIB);
    bed.ready();
    let old = bed.held.position;
    load(&mut bed, &mut Rng::new(8), 1, 4);
    bed.acked();
    bed.pass(3000 * MS);
    lose_target(&mut bed);
    load(&mut bed, &mut Rng::new(9), 8, 4);
    assert!(stop(&mut bed));
    bed.restart();
    bed.held.position = old;
    bed.unreachable = false;
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { whole: true, .. })));
}

#[test]
fn a_full_spill_is_followed_by_the_dirty_map_and_keeps_its_points() {
    let mut bed = bed(9, 8 * MIB);
    bed.ready();
    lose_target(&mut bed);
    let mut rng = Rng::new(10);
    load(&mut bed, &mut rng, 7, 8);
    let kept = bed.status().captured_seq;
    assert_eq!((bed.status().rung, bed.status().uncaptured), (Rung::Spilling, 0));
    load(&mut bed, &mut rng, 16, 8);
    let status = bed.status();
    assert_eq!(status.rung, Rung::Dirty);
    assert!(status.uncaptured > 0 && status.spill_bytes <= 8 * MIB);
    assert!(status.spill_trouble.is_some());
    bed.unreachable = false;
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert!(bed.held.records.iter().any(|r| r.seq == kept), "what was spilled is in the stream");
    let went = |wanted: Rung| bed.events.iter().any(|e| matches!(e, SourceEvent::Rung { rung, .. } if *rung == wanted));
    assert!(went(Rung::Spilling) && went(Rung::Dirty) && went(Rung::Normal));
}

#[test]
fn a_spill_disk_that_fails_loses_nothing_that_a_resync_does_not_mend() {
    for kind in [Fault::Write, Fault::Sync, Fault::Read] {
        let mut bed = bed(11, 64 * MIB);
        bed.ready();
        lose_target(&mut bed);
        let mut rng = Rng::new(11);
        load(&mut bed, &mut rng, 6, 8);
        for path in spill_files(&bed) {
            bed.world.fail(bed.node, &path, kind, Errno::IO, 2);
        }
        load(&mut bed, &mut rng, 8, 8);
        bed.pass(2500 * MS);
        load(&mut bed, &mut rng, 4, 8);
        bed.unreachable = false;
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        bed.assert_equal();
        assert!(faults(&bed) > 0, "{kind:?}");
    }
}

#[test]
fn a_disk_without_room_for_the_spill_is_left_alone() {
    let mut bed = bed(12, 64 * MIB);
    bed.limits.spill_reserve_bytes = 1 << 41;
    bed.source = afterimage_dataplane::source::Source::new(1, bed.limits.clone(), Default::default());
    bed.ready();
    lose_target(&mut bed);
    load(&mut bed, &mut Rng::new(12), 12, 8);
    let status = bed.status();
    assert_eq!((status.rung, status.spill_bytes), (Rung::Dirty, 0));
    bed.unreachable = false;
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}

#[test]
fn writes_are_as_quick_without_a_target_as_with_one() {
    let mut bed = bed(13, 256 * MIB);
    bed.ready();
    let mut rng = Rng::new(13);
    let mut time = |bed: &mut Bed| {
        let begun = bed.world.now();
        for _ in 0..400 {
            let bytes = [rng.next_u64() as u8; 4096];
            bed.write(0, rng.below(2 * EXTENT / 4096) * 4096, &bytes).expect("written");
        }
        bed.world.now() - begun
    };
    time(&mut bed);
    let with = time(&mut bed);
    lose_target(&mut bed);
    load(&mut bed, &mut Rng::new(14), 8, 8);
    assert_eq!(bed.status().rung, Rung::Spilling);
    let without = time(&mut bed);
    assert!(without * 10 <= with * 11, "{with} ns with a target, {without} ns without");
    assert_eq!(bed.status().uncaptured, 0);
}

#[test]
fn after_a_crash_in_an_outage_the_rpo_goes_on_from_the_last_complete_moment() {
    for power in [false, true] {
        let mut bed = bed(16, 64 * MIB);
        bed.ready();
        bed.pass(12_000 * MS);
        lose_target(&mut bed);
        bed.write(0, 4096, &[1; 4096]).expect("written");
        let written = bed.world.now();
        bed.pass(30_000 * MS);
        if power {
            bed.world.power_loss(bed.node)
        } else {
            bed.world.crash(bed.node)
        }
        bed.restart();
        bed.pass(100 * MS);
        let (rpo, age) = (bed.status().rpo_now, bed.world.now() - written);
        assert!(rpo >= age && rpo <= age + 12_000 * MS, "{rpo} is said, {age} is true");
        bed.unreachable = false;
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        assert!(bed.status().rpo_now < 2000 * MS);
    }
}

#[test]
fn bits_of_spilled_records_stay_set_until_they_are_acknowledged() {
    let mut bed = bed(15, 64 * MIB);
    bed.limits.hot_extents = 0;
    bed.source = afterimage_dataplane::source::Source::new(1, bed.limits.clone(), Default::default());
    bed.ready();
    lose_target(&mut bed);
    bed.write(0, 3 * EXTENT, &[3; 4096]).expect("written");
    load(&mut bed, &mut Rng::new(15), 6, 8);
    assert!(stop(&mut bed));
    assert!(bed.log_bits(0).contains(&3));
    bed.restart();
    bed.pass(5000 * MS);
    assert!(bed.log_bits(0).contains(&3), "still only in the spill");
    back_without_resync(&mut bed);
    bed.until("cleared", |bed| !bed.log_bits(0).contains(&3));
}

#[test]
fn any_end_in_any_outage_is_mended() {
    for seed in 0..10 {
        let config = WorldConfig { keep_unsynced: 0.5, late: 100 * MS, ..WorldConfig::default() };
        let limits = SourceLimits { hot_extents: 1, ..limits([8 * MIB, 64 * MIB][seed as usize % 2]) };
        let mut bed = Bed::new(seed, 2, config, limits);
        let mut rng = Rng::new(seed);
        bed.protect().expect("the disks are there");
        bed.pass(rng.below(4000) * MS);
        for _ in 0..5 {
            if rng.chance(0.6) {
                bed.unreachable = true;
                bed.cut();
            }
            let mib = rng.below(5);
            load(&mut bed, &mut rng, mib, 6);
            match rng.below(4) {
                0 => bed.unreachable = false,
                1 => bed.cut(),
                2 => drop(bed.ask(0, Request::Flush)),
                _ => {}
            }
            bed.pass(rng.below(300) * MS);
            let owes = !bed.is_protected() && syncs(&bed) > 0;
            match rng.below(3) {
                0 => bed.world.crash(bed.node),
                1 => bed.world.power_loss(bed.node),
                _ => {
                    let clean = stop(&mut bed);
                    // Stopped cleanly, the power may go: what counts was made durable.
                    if rng.chance(0.5) {
                        bed.world.power_loss(bed.node);
                    }
                    bed.restart();
                    bed.pass(50 * MS);
                    assert!(!clean || owes || syncs(&bed) == 0, "seed {seed}: nothing is in doubt after a clean stop");
                    continue;
                }
            }
            bed.restart();
        }
        bed.unreachable = false;
        bed.until("protected", |bed| bed.is_protected());
        bed.until("clean", |bed| bed.status().disks.iter().all(|d| d.dirty_extents == 0));
        bed.acked();
        bed.assert_equal();
        assert_eq!(faults(&bed), 0, "seed {seed}");
    }
}

#[test]
fn shipping_an_earlier_life_never_lowers_its_acknowledged_place() {
    let mut bed = bed(17, 64 * MIB);
    bed.limits.hot_extents = 0;
    bed.source = afterimage_dataplane::source::Source::new(1, bed.limits.clone(), Default::default());
    bed.ready();
    let (old, images) = (bed.held.position, bed.held.images.clone());
    bed.write(0, 5 * EXTENT, &[5; 4096]).expect("written");
    bed.acked();
    bed.until("cleared", |bed| !bed.log_bits(0).contains(&5));
    lose_target(&mut bed);
    bed.write(1, 6 * EXTENT, &[6; 4096]).expect("written");
    assert!(stop(&mut bed));
    bed.restart();
    // The earlier life is announced, and nothing of it is acknowledged before the next crash.
    bed.held.mute = true;
    bed.unreachable = false;
    bed.until("linked", |bed| !bed.held.hellos.is_empty() && bed.held.position.seq > old.seq);
    bed.pass(20 * MS);
    bed.world.crash(bed.node);
    // The target comes back as an old copy, and the spill is lost, too.
    bed.held.mute = false;
    (bed.held.position, bed.held.images) = (old, images);
    bed.world.advance(5000 * MS);
    bed.io = bed.world.io(bed.node);
    for path in spill_files(&bed) {
        bed.io.remove(&path).expect("removed");
    }
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}

#[test]
fn the_time_to_catch_up_is_foretold() {
    let config = WorldConfig { net_latency: (5 * MS, 6 * MS), net_window: 16 * 1024, ..WorldConfig::default() };
    let mut bed = Bed::new(18, 2, config, limits(64 * MIB));
    bed.ready();
    lose_target(&mut bed);
    load(&mut bed, &mut Rng::new(18), 24, 8);
    bed.unreachable = false;
    bed.until("linked", |bed| bed.status().state == GroupState::CatchingUp);
    bed.pass(4000 * MS);
    let foretold = bed.status().catch_up.expect("the backlog shrinks");
    let begun = bed.world.now();
    bed.until("caught up", |bed| bed.status().catch_up == Some(0));
    let took = bed.world.now() - begun;
    assert!(foretold > took / 3 && foretold < took * 3, "{foretold} ns foretold, {took} ns taken");
}

/// Frames of an earlier life that are shipped out of the spill say again what it promised: the target believes it, so hosts
/// wait as they did then.
#[test]
fn frames_that_are_still_shipped_keep_the_promise_of_their_life() {
    let mut bed = bed(21, 64 * MIB);
    bed.sync_deadline = 2000 * MS;
    bed.ready();
    bed.until("together", |bed| bed.status().synchronous.is_some_and(|s| s.together));
    bed.acked();
    let (held, said, writer) = (bed.held.position, bed.held.promises.len(), bed.held.hellos[0].incarnation);
    bed.held.mute = true;
    let request = bed.write_request(0, &[1; 4096], false);
    bed.ask(0, request);
    bed.until("promised", |bed| bed.held.promises.len() > said);
    assert!(stop(&mut bed));
    // Nothing of it was acknowledged, and the target has died over it; nor has anybody to wait for it any more.
    bed.held.position = held;
    bed.sync_deadline = 0;
    let (begun, hellos, said) = (bed.world.now(), bed.held.hellos.len(), bed.held.promises.len());
    bed.restart();
    bed.until("shipped again", |bed| bed.held.promises.len() > said);
    assert_eq!(bed.held.promises[said], 2000, "the target believes it");
    assert_eq!(bed.held.hellos[hellos].incarnation, writer, "a hello for the earlier life");
    bed.write(0, 4096, &[2; 4096]).expect("written");
    let took = bed.world.now() - begun;
    assert!(took >= 1000 * MS, "answered after {} ms, and the promise is for 1000", took / MS);
}

/// Hosts wait for the next process meanwhile: what the target does not take within a second is compared later.
#[test]
fn a_stop_without_a_spill_waits_a_second_for_the_target_at_most() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.acked();
    bed.held.mute = true;
    bed.write(0, 0, &[1; 4096]).expect("written");
    let begun = bed.world.now();
    assert!(!stop(&mut bed), "something is owed");
    let took = bed.world.now() - begun;
    assert!((900 * MS..1200 * MS).contains(&took), "{} ms", took / MS);
    bed.held.mute = false;
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert!(!bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { whole: true, .. })));
}
