//! The source against the simulated world: order, durability of intent, what a crash leaves, resending, pressure.

#[path = "source/bed.rs"]
#[allow(dead_code)]
mod bed;

use std::os::fd::AsFd as _;
use std::sync::Arc;

use afterimage_dataplane::host::{Disks, Request};
use afterimage_dataplane::io::guest::{GuestMemory, Map, Region, Scatter};
use afterimage_dataplane::io::sim::{Fault, Rng, SimIo, WorldConfig};
use afterimage_dataplane::io::{Errno, Io};
use afterimage_dataplane::source::{ProtectError, SourceEvent, SourceLimits};
use afterimage_wire::intent::EXTENT;
use afterimage_wire::record::RecordKind;
use bed::{Bed, MS, SIZE, STREAM};

#[test]
fn the_first_synchronisation_sends_the_disk() {
    let mut bed = Bed::usual(2);
    let mut image = vec![0; SIZE as usize];
    Rng::new(5).fill(&mut image[9_000_000..9_300_000]);
    bed.world.put_file(bed.node, &bed::path(1), &image);
    bed.ready();
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.records[0].kind, RecordKind::Join);
    assert_eq!(bed.held.records[2].kind, RecordKind::SyncBegin);
    assert!(bed.held.count(RecordKind::SyncWrite) < 5, "zeros are said, not sent");
}

#[test]
fn a_disk_has_the_block_that_it_was_given() {
    let mut bed = Bed::usual(1);
    bed.block = 4096;
    bed.ready();
    assert_eq!(Disks::<SimIo>::exports(&bed.source)[0].geometry.block, 4096);

    // What is no block at all.
    for block in [131_072, 3000] {
        let mut bed = Bed::usual(1);
        bed.block = block;
        let refused = bed.protect();
        assert!(matches!(refused, Err(ProtectError::Value { field: "block size given to the disk", .. })), "{block}");
    }
    // Less than the disk's own is its own.
    let mut bed = Bed::usual(1);
    bed.block = 1;
    bed.ready();
    assert_eq!(Disks::<SimIo>::exports(&bed.source)[0].geometry.block, 512);
}

#[test]
fn a_write_is_a_record_before_it_is_answered() {
    let mut bed = Bed::usual(1);
    bed.ready();
    let before = bed.status().captured_seq;
    let cookie = {
        let request = bed.write_request(8192, &[7; 4096], false);
        bed.ask(0, request)
    };
    while !bed.has_answer(cookie) {
        bed.step();
    }
    assert!(bed.status().captured_seq > before);
    bed.acked();
    bed.assert_equal();
}

#[test]
fn the_bit_is_durable_before_the_first_write() {
    let mut bed = Bed::usual(1);
    bed.ready();
    let offset = 5 * EXTENT;
    bed.until("cleared", |bed| bed.log_bits(0).is_empty());
    assert!(!bed.log_bits(0).contains(&5));
    let request = bed.write_request(offset, &[7; 4096], false);
    let cookie = bed.ask(0, request);
    while !bed.has_answer(cookie) {
        if bed.disk(0)[offset as usize] != 0 {
            assert!(bed.log_bits(0).contains(&5));
        }
        bed.step();
    }
    // Not only visible: it outlives a power loss.
    bed.world.power_loss(bed.node);
    assert!(bed.log_bits(0).contains(&5));
}

#[test]
fn overlapping_writes_are_numbered_in_their_order() {
    let mut bed = Bed::usual(1);
    bed.ready();
    let mut rng = Rng::new(3);
    for round in 0..40 {
        let mut cookies = Vec::new();
        for turn in 0..12u8 {
            let offset = rng.below(8) * 4096;
            let len = rng.between(1, 4) as usize * 4096;
            let request = bed.write_request(offset, &vec![turn + round * 6; len], false);
            cookies.push(bed.ask(0, request));
        }
        for cookie in cookies {
            bed.answer(cookie).expect("written");
        }
    }
    bed.acked();
    bed.assert_equal();
}

#[test]
fn unaligned_writes_and_zeroes_are_what_a_model_says() {
    // The disk's block, and the one that hosts are told of, to which not all of them keep.
    for (block, given) in [(512, 0), (4096, 0), (512, 8192), (4096, 65536)] {
        let config = WorldConfig { block, ..WorldConfig::default() };
        let mut bed = Bed::new(4, 1, config, SourceLimits { queue_bytes: 8 << 20, ..SourceLimits::default() });
        bed.block = given;
        bed.ready();
        assert_eq!(Disks::<SimIo>::exports(&bed.source)[0].geometry.block, block.max(given));
        let block = block.max(given.min(4096));
        let mut model = vec![0u8; SIZE as usize];
        let mut rng = Rng::new(u64::from(block));
        for turn in 0..150u64 {
            let offset = rng.below(60_000);
            let len = rng.between(1, 30_000);
            let range = offset as usize..(offset + len) as usize;
            let fua = rng.chance(0.2);
            let request = match rng.below(4) {
                0 => {
                    model[range].fill(0);
                    Request::Zero { offset, len, unmap: rng.chance(0.5), fast_only: false, fua }
                }
                1 if turn % 2 == 0 => {
                    let block = u64::from(block);
                    let (from, to) = (offset.next_multiple_of(block), (offset + len) / block * block);
                    if from < to {
                        model[from as usize..to as usize].fill(0);
                    }
                    Request::Discard { offset, len, fua }
                }
                _ => {
                    model[range.clone()].fill(turn as u8);
                    bed.write_request(offset, &vec![turn as u8; range.len()], fua)
                }
            };
            bed.call(0, request).expect("done");
            let read = bed.call(0, Request::Read { offset: 300, len: 90_000 }).expect("read");
            assert!(read == model[300..90_300], "after request {turn}");
        }
        assert!(bed.disk(0) == model);
        bed.acked();
        bed.assert_equal();
    }
}

#[test]
fn a_read_goes_straight_to_shared_memory_or_comes_in_a_buffer() {
    let mut bed = Bed::usual(1);
    bed.ready();
    let model: Vec<u8> = (0..131_072u32).map(|at| (at / 500) as u8).collect();
    bed.write(0, 0, &model).expect("written");
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 131_072).unwrap();
    let map = Arc::new(Map::new(file.as_fd(), 0, 131_072).unwrap());
    let memory = GuestMemory::new(vec![Region { guest: 0, user: 0, map }]).unwrap();
    let read = |bed: &mut Bed, offset: u64, pieces: &[(u64, usize)]| {
        memory.write(0, &[0xee; 131_072]).unwrap();
        let mut to = Scatter::default();
        pieces.iter().for_each(|(at, len)| memory.add_to(&mut to, *at, *len).unwrap());
        let result = bed.call(0, Request::ReadInto { offset, to });
        let mut found = Vec::new();
        for (at, len) in pieces {
            let mut bytes = vec![0; *len];
            memory.read(*at, &mut bytes).unwrap();
            found.extend(bytes);
        }
        (result, found)
    };
    let (result, found) = read(&mut bed, 512, &[(65_536, 4096), (512, 8192)]);
    assert_eq!(result, Ok(Vec::new()), "nothing is left to copy");
    assert!(found == model[512..512 + 12_288]);
    // An offset, a length, an address that the disk has no such reads for: whoever asked copies.
    for (offset, pieces) in [(1, [(0, 512), (4096, 512)]), (0, [(0, 500), (4096, 524)]), (0, [(4, 512), (4096, 512)])] {
        let (result, found) = read(&mut bed, offset, &pieces);
        assert!(result.expect("read") == model[offset as usize..][..1024]);
        assert!(found == [0xee; 1024]);
    }
    // Past the end; more than a part; an error of the disk.
    assert_eq!(read(&mut bed, SIZE - 512, &[(0, 1024)]).0, Err(Errno::INVAL));
    bed.world.fail(bed.node, &bed::path(0), Fault::Read, Errno::IO, 1);
    assert_eq!(read(&mut bed, 0, &[(0, 4096)]).0, Err(Errno::IO));
    // Memory that has gone under it: it comes in a buffer, and whoever copies sees it.
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let mut to = Scatter::default();
    memory.add_to(&mut to, 0, 65_536).unwrap();
    assert!(bed.call(0, Request::ReadInto { offset: 0, to }).expect("read") == model[..65_536]);
}

#[test]
fn zeros_are_written_where_the_disk_cannot_discard() {
    let config = WorldConfig { discard: false, ..WorldConfig::default() };
    let mut bed = Bed::new(4, 1, config, SourceLimits { queue_bytes: 8 << 20, ..SourceLimits::default() });
    bed.ready();
    bed.write(0, 0, &[1; 65536]).expect("written");
    let zero = Request::Zero { offset: 4096, len: 8192, unmap: true, fast_only: false, fua: true };
    bed.call(0, zero).expect("zeroed");
    assert_eq!(bed.call(0, Request::Discard { offset: 0, len: 4096, fua: false }), Err(Errno::OPNOTSUPP));
    bed.acked();
    bed.assert_equal();
}

#[test]
fn after_a_crash_exactly_the_set_extents_are_read_again() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.until("cleared", |bed| bed.log_bits(0).is_empty());
    for extent in [2, 7] {
        bed.write(0, extent * EXTENT + 4096, &[extent as u8; 4096]).expect("written");
    }
    bed.unreachable = true;
    bed.cut();
    bed.write(0, 8 * EXTENT, &[8; 4096]).expect("written");
    bed.world.crash(bed.node);
    bed.restart();
    bed.unreachable = false;
    bed.held.records.clear();
    bed.until("protected", |bed| bed.is_protected());
    let begun: Vec<_> = bed.events.iter().filter(|e| matches!(e, SourceEvent::SyncBegun { .. })).collect();
    assert!(matches!(begun[..], [SourceEvent::SyncBegun { whole: false, .. }]), "{begun:?}");
    let mut extents: Vec<u64> = bed
        .held
        .records
        .iter()
        .filter(|r| matches!(r.kind, RecordKind::SyncWrite | RecordKind::SyncZero | RecordKind::SyncHash))
        .map(|r| r.offset / EXTENT)
        .collect();
    extents.sort_unstable();
    extents.dedup();
    assert_eq!(extents, [2, 7, 8]);
    bed.acked();
    bed.assert_equal();
}

#[test]
fn a_power_loss_is_mended_although_the_replica_has_more() {
    for seed in 0..4 {
        let config = WorldConfig { keep_unsynced: 0.3, ..WorldConfig::default() };
        let mut bed = Bed::new(seed, 2, config, SourceLimits { queue_bytes: 8 << 20, ..SourceLimits::default() });
        bed.ready();
        let mut rng = Rng::new(seed);
        for turn in 0..60 {
            let disk = rng.below(2) as usize;
            bed.write(disk, rng.below(SIZE / 4096) * 4096, &[turn; 4096]).expect("written");
            if rng.chance(0.1) {
                bed.call(disk, Request::Flush).expect("flushed");
            }
        }
        bed.pass(rng.below(5000) * MS);
        bed.world.power_loss(bed.node);
        bed.restart();
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        bed.assert_equal();
    }
}

#[test]
fn bits_are_cleared_only_when_flushed_and_acknowledged() {
    let limits = SourceLimits { queue_bytes: 8 << 20, hot_extents: 0, ..SourceLimits::default() };
    let mut bed = Bed::new(1, 1, WorldConfig::default(), limits);
    bed.ready();
    bed.held.mute = true;
    bed.write(0, 3 * EXTENT, &[1; 4096]).expect("written");
    bed.call(0, Request::Flush).expect("flushed");
    bed.pass(8000 * MS);
    assert_eq!(bed.log_bits(0), [3], "not acknowledged");
    bed.held.mute = false;
    bed.write(0, 4 * EXTENT, &[1; 4096]).expect("written");
    bed.until("cleared", |bed| bed.log_bits(0).is_empty());
    bed.world.crash(bed.node);
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(!bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { .. })));
    bed.assert_equal();
}

#[test]
fn frames_are_sent_again_after_a_lost_connection() {
    let mut bed = Bed::usual(2);
    bed.ready();
    let mut rng = Rng::new(9);
    for turn in 0..120 {
        let disk = rng.below(2) as usize;
        let request = bed.write_request(rng.below(2000) * 4096, &[turn; 8192], false);
        bed.call(disk, request).expect("written");
        if turn % 17 == 5 {
            bed.cut();
            bed.pass(rng.below(250) * MS);
        }
    }
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.count(RecordKind::SyncBegin), 2, "only the first synchronisation");
    assert!(bed.held.hellos.len() > 2);
}

#[test]
fn without_a_link_writes_go_on_and_are_synchronised_later() {
    let limits = SourceLimits { queue_bytes: 4 << 20, ..SourceLimits::default() };
    let mut bed = Bed::new(1, 1, WorldConfig::default(), limits);
    bed.ready();
    bed.unreachable = true;
    bed.cut();
    let mut rng = Rng::new(2);
    let mut data = vec![0; 32768];
    for _ in 0..200 {
        let started = bed.world.now();
        rng.fill(&mut data);
        bed.write(0, rng.below(SIZE / 4096 - 8) * 4096, &data).expect("written");
        assert!(bed.world.now() - started < 50 * MS, "a write was stalled");
    }
    let status = bed.status();
    assert!(status.uncaptured > 0 && status.queue_bytes <= status.queue_limit);
    assert!(status.rpo_now > 0);
    bed.unreachable = false;
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.count(RecordKind::SyncBegin), bed.held.count(RecordKind::SyncEnd));
}

#[test]
fn a_slow_target_makes_writes_wait_no_longer_than_allowed() {
    let limits = SourceLimits { queue_bytes: 4 << 20, ..SourceLimits::default() };
    let mut bed = Bed::new(1, 1, WorldConfig::default(), limits);
    bed.ready();
    bed.held.mute = true;
    let mut longest = 0;
    for turn in 0..600u64 {
        let started = bed.world.now();
        bed.write(0, turn * 4096, &[turn as u8; 4096]).expect("written");
        longest = longest.max(bed.world.now() - started);
    }
    assert!(longest >= bed.limits.max_wait && longest < 2 * bed.limits.max_wait, "{longest}");
    bed.held.mute = false;
    bed.cut();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}

#[test]
fn a_failed_write_is_reported_recorded_and_mended() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.world.fail(bed.node, &bed::path(0), Fault::Write, Errno::IO, 1);
    assert_eq!(bed.write(0, 4096, &[9; 4096]), Err(Errno::IO));
    bed.until("mended", |bed| bed.held.count(RecordKind::SyncEnd) == 2);
    assert_eq!(bed.held.count(RecordKind::Unreadable), 1);
    assert_eq!(bed.status().disks[0].failed_writes, 1);
    bed.acked();
    bed.assert_equal();
}

#[test]
fn a_failed_sync_is_not_forgotten() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.write(0, 4096, &[9; 4096]).expect("written");
    bed.world.fail(bed.node, &bed::path(0), Fault::Sync, Errno::IO, 1);
    assert_eq!(bed.call(0, Request::Flush), Err(Errno::IO));
    assert_eq!(bed.call(0, Request::Flush), Err(Errno::IO));
    assert!(bed.status().disks[0].sync_failed);
    assert!(bed.log_bits(0).contains(&0));
}

#[test]
fn a_clean_stop_owes_nothing() {
    let mut bed = Bed::usual(2);
    bed.ready();
    for turn in 0..40u64 {
        bed.write((turn % 2) as usize, turn * 4096 * 200, &[turn as u8; 4096]).expect("written");
    }
    bed.source.stop(&mut bed.io);
    bed.until("idle", |bed| bed.source.is_idle());
    assert!(bed.events.contains(&SourceEvent::Stopped { stream: STREAM, clean: true }));
    assert_eq!(bed.held.records.last().map(|r| r.kind), Some(RecordKind::End));
    assert_eq!((bed.log_bits(0), bed.log_bits(1)), (vec![], vec![]));
    bed.world.crash(bed.node);
    bed.trust_reboot = false;
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(!bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { .. })));
    bed.assert_equal();
}

#[test]
fn a_disk_changed_after_a_clean_stop_is_compared_in_full() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.source.stop(&mut bed.io);
    bed.until("idle", |bed| bed.source.is_idle());
    bed.world.crash(bed.node);
    bed.world.advance(1000 * MS);
    let mut image = bed.disk(0);
    image[30_000_000] = 5;
    bed.world.put_file(bed.node, &bed::path(0), &image);
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { whole: true, .. })));
    bed.assert_equal();
}

#[test]
fn a_target_that_lost_everything_gets_everything() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.write(0, 9 * EXTENT, &[4; 4096]).expect("written");
    bed.acked();
    bed.held = bed::Held::default();
    bed.cut();
    bed.until("lost", |bed| !bed.is_protected());
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}

#[test]
fn a_fence_holds_requests_and_answers() {
    let mut bed = Bed::usual(1);
    bed.ready();
    let request = bed.write_request(0, &[1; 4096], false);
    let before = bed.ask(0, request);
    bed.source.fence(&mut bed.io, STREAM, true);
    let request = bed.write_request(4096, &[2; 4096], false);
    let after = bed.ask(0, request);
    bed.pass(100 * MS);
    assert!(!bed.has_answer(before) && !bed.has_answer(after));
    assert_eq!((bed.disk(0)[0], bed.disk(0)[4096]), (1, 0), "nothing new is issued");
    bed.source.fence(&mut bed.io, STREAM, false);
    bed.answer(before).expect("written");
    bed.answer(after).expect("written");
}

#[test]
fn a_refused_group_leaves_nothing_behind() {
    let mut bed = Bed::usual(2);
    let mut config = bed.config();
    config.disks[1].path = "/disks/missing.img".into();
    let refused = bed.source.protect(&mut bed.io, config);
    assert!(matches!(refused, Err(ProtectError::File { errno: Errno::NOENT, .. })), "{refused:?}");
    assert!(bed.world.file(bed.node, &bed::log_path(0)).is_none());
    bed.ready();
    assert!(matches!(bed.protect(), Err(ProtectError::Taken(_))));
}

#[test]
fn a_file_that_is_no_log_is_not_overwritten() {
    let mut bed = Bed::usual(1);
    bed.world.put_file(bed.node, &bed::log_path(0), b"a letter to a friend");
    assert!(matches!(bed.protect(), Err(ProtectError::Value { field: "log_path", .. })));
}

#[test]
fn cuts_are_numbered_over_lives_and_say_when_all_is_flushed() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.pass(2500 * MS);
    bed.source.label_cut(&mut bed.io, STREAM, "before the upgrade");
    bed.acked();
    let first = bed.status().cut;
    assert!(first >= 3);
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::CutTaken { label, .. } if label.starts_with("before"))));
    bed.world.crash(bed.node);
    bed.restart();
    bed.pass(1500 * MS);
    assert!(bed.status().cut > first);
}

#[test]
fn any_crash_at_any_step_is_mended() {
    for seed in 0..12 {
        let config = WorldConfig { keep_unsynced: 0.5, late: 100 * MS, ..WorldConfig::default() };
        let limits = SourceLimits { queue_bytes: 4 << 20, hot_extents: 1, ..SourceLimits::default() };
        let mut bed = Bed::new(seed, 2, config, limits);
        let mut rng = Rng::new(seed);
        bed.protect().expect("the disks are there");
        for _ in 0..4 {
            for _ in 0..rng.below(60) {
                let disk = rng.below(2) as usize;
                let offset = rng.below(SIZE / 4096 - 8) * 4096 + rng.below(2) * 100;
                let request =
                    bed.write_request(offset, &vec![rng.below(256) as u8; rng.between(1, 20000) as usize], false);
                bed.ask(disk, request);
                for _ in 0..rng.below(20) {
                    bed.step();
                }
                match rng.below(60) {
                    0 => bed.cut(),
                    1 => bed.unreachable = !bed.unreachable,
                    2 => bed.pass(rng.below(3000) * MS),
                    3 => drop(bed.ask(disk, Request::Flush)),
                    _ => {}
                }
            }
            if rng.chance(0.5) {
                bed.world.crash(bed.node);
            } else {
                bed.world.power_loss(bed.node);
            }
            bed.restart();
        }
        bed.unreachable = false;
        bed.until("protected", |bed| bed.is_protected());
        bed.acked();
        bed.assert_equal();
        let _ = bed.io.now();
    }
}

#[test]
fn frames_grow_behind_many_that_are_not_acknowledged() {
    let limits = SourceLimits { queue_bytes: 64 << 20, ..SourceLimits::default() };
    let mut bed = Bed::new(1, 1, WorldConfig::default(), limits);
    bed.ready();
    bed.acked();
    bed.held.mute = true;
    let before = bed.held.position.frame;
    for n in 0..1200_u64 {
        bed.write(0, n % 64 * 4096, &[n as u8; 4096]).expect("written");
        bed.pass(3 * MS);
    }
    let frames = bed.held.position.frame - before;
    assert!((64..900).contains(&frames), "{frames} frames of 1200 writes");
    bed.held.mute = false;
    bed.cut();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}
