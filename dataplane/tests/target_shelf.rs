//! Shelves: history is folded under open views when room is short, and the views go on reading what they were opened on.

mod target_rig;

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::sim::{Errors, WorldConfig};
use afterimage_dataplane::target::{Choice, StreamStatus, TargetConfig, TargetEvent};
use afterimage_wire::record::RecordKind;
use afterimage_wire::segment::Predecessor;
use target_rig::*;

fn begun(seed: u64, world: WorldConfig) -> (Rig, Feeder, Model) {
    let config = TargetConfig { budget_bytes: 40 << 20, ..config() };
    let mut rig = Rig::new(seed, world, config, 3600 * SECOND);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    (rig, feeder, Model::default())
}

/// About 1.5 MiB of writes.
fn fill(rig: &mut Rig, feeder: &mut Feeder, model: &mut Model, dice: &mut Dice, rounds: usize) {
    for _ in 0..rounds {
        scribble(feeder, model, dice, 120);
        feeder.seal(20);
        rig.ship_more(feeder);
    }
}

fn status(rig: &Rig) -> StreamStatus {
    rig.target.status()[0].clone()
}

#[test]
fn a_view_is_folded_under_and_reads_on() {
    for writable in [false, true] {
        let (mut rig, mut feeder, mut model) = begun(1, WorldConfig::default());
        let mut dice = Dice(1);
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 5);
        let seq = feeder.next_seq - 30;
        let exports = rig.view("held", seq, writable);
        let mut want = [model.at(0, seq), model.at(1, seq)];
        if writable {
            rig.write(exports[0].key, 700, b"mine", false);
            want[0][700..704].copy_from_slice(b"mine");
        }
        for _ in 0..40 {
            fill(&mut rig, &mut feeder, &mut model, &mut dice, 1);
            for (slot, want) in want.iter().enumerate() {
                assert!(rig.read(exports[slot].key, 0, SIZE as usize) == *want, "writable {writable}");
            }
        }
        let told = status(&rig);
        assert!(told.floor > seq, "{told:?}");
        assert!(told.journal_bytes <= 40 << 20 && told.views[0].shelf_bytes > 0, "{told:?}");
        assert!(told.shortened.is_some());
        rig.check(&model, feeder.next_seq - 1);
        // Closed, nothing of it is left.
        rig.target.close_view(&mut rig.io, "held", false).unwrap();
        let timeline = told.timeline.to_string();
        let paths = rig.world.paths(rig.node, ROOT);
        let others = paths.iter().filter(|path| path.ends_with(".seg") && !path.contains(&timeline)).count();
        assert_eq!(others, 0);
        rig.restart(false);
        rig.check(&model, feeder.next_seq - 1);
    }
}

/// Segment files that are not the stream's own.
fn of_others(rig: &Rig) -> usize {
    let timeline = status(rig).timeline.to_string();
    let paths = rig.world.paths(rig.node, ROOT);
    paths.iter().filter(|path| path.ends_with(".seg") && !path.contains(&timeline)).count()
}

#[test]
fn beside_a_synchronisation_that_does_not_fit_the_newest_complete_point_is_kept() {
    for life in 0..4u64 {
        let block = if life % 2 == 0 { 512 } else { 4096 };
        let (mut rig, mut feeder, mut model) = begun(life, WorldConfig { block, ..WorldConfig::default() });
        let mut dice = Dice(life);
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 3);
        let kept = feeder.next_seq - 1;
        let wall = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap().wall_ns;
        feeder.sync_mark(RecordKind::SyncBegin, 0, 7, false);
        for round in 0..45 {
            fill(&mut rig, &mut feeder, &mut model, &mut dice, 1);
            if life > 1 && round > 15 && round % 4 == 0 {
                for _ in 0..dice.roll(40) {
                    rig.step();
                }
                rig.restart(dice.roll(2) == 0);
                rig.check(&model, kept);
                rig.ship(&mut feeder);
            }
            assert_eq!(status(&rig).newest, Some(kept), "life {life}, round {round}");
        }
        let told = status(&rig);
        assert!(told.floor > kept && told.oldest == Some(kept), "{told:?}");
        assert!(told.journal_bytes <= 40 << 20, "{told:?}");
        assert!(told.shortened.is_some() || life > 1, "{told:?}");
        assert!(of_others(&rig) > 0);
        rig.check(&model, kept);
        let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
        assert_eq!((latest.seq, latest.complete, latest.wall_ns, latest.disks.len()), (kept, true, wall, 2));
        let timed = rig.target.resolve(&mut rig.io, stream_id(), Choice::Time(wall)).unwrap();
        assert_eq!(timed.seq, kept);
        let listed = rig.target.points(&mut rig.io, stream_id(), 0, 2, false).unwrap();
        assert!(listed[0].seq == kept && listed[1].seq >= told.floor);
        assert!(rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(kept + 1)).is_err());
        // A machine takes over from it, and what it has stays under it when a newer point is complete.
        let mut exports = rig.view("machine", kept, true);
        rig.write(exports[0].key, 700, b"mine", true);
        let mut want = [model.at(0, kept), model.at(1, kept)];
        want[0][700..704].copy_from_slice(b"mine");
        feeder.sync_mark(RecordKind::SyncEnd, 0, 7, false);
        for round in 0..40 {
            fill(&mut rig, &mut feeder, &mut model, &mut dice, 1);
            if life % 2 == 1 && round % 9 == 0 {
                rig.restart(life == 3);
                rig.ship(&mut feeder);
                exports = rig.view("machine", kept, true);
            }
            for (slot, want) in want.iter().enumerate() {
                assert!(rig.read(exports[slot].key, 0, SIZE as usize) == *want, "life {life}, round {round}");
            }
        }
        let told = status(&rig);
        assert!(told.oldest >= Some(told.floor) && told.newest == Some(feeder.next_seq - 1), "{told:?}");
        rig.check(&model, feeder.next_seq - 1);
        rig.target.close_view(&mut rig.io, "machine", false).unwrap();
        rig.until("nothing is left of it", |rig| of_others(rig) == 0);
        rig.restart(true);
        rig.check(&model, feeder.next_seq - 1);
        assert_eq!(of_others(&rig), 0);
    }
}

#[test]
fn killed_at_any_step_a_failed_over_machine_keeps_its_base() {
    for seed in 0..5u64 {
        let block = if seed % 3 == 0 { 4096 } else { 512 };
        let world = WorldConfig { block, discard: seed % 5 != 0, ..WorldConfig::default() };
        let (mut rig, mut feeder, mut model) = begun(seed, world);
        let mut dice = Dice(seed);
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 6);
        let seq = feeder.next_seq - 1 - dice.roll(100);
        let mut exports = rig.view("failover", seq, true);
        let mut want = [model.at(0, seq), model.at(1, seq)];
        // The journal is just below where it gets short.
        while status(&rig).journal_bytes <= 16 << 20 {
            fill(&mut rig, &mut feeder, &mut model, &mut dice, 1);
        }
        for life in 0..8 {
            scribble(&mut feeder, &mut model, &mut dice, 300);
            feeder.seal(20);
            rig.send_from(&feeder, feeder.acked.0);
            let offset = dice.roll(SIZE - 5000);
            let bytes = dice.bytes(4000);
            rig.write(exports[1].key, offset, &bytes, true);
            want[1][offset as usize..offset as usize + 4000].copy_from_slice(&bytes);
            for _ in 0..dice.roll(500) {
                rig.step();
            }
            let acked = rig.acked().max(feeder.acked);
            rig.restart((seed + life) % 2 == 0);
            assert!(!rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })), "{:?}", rig.events);
            assert!(status(&rig).durable_seq >= acked.1);
            exports = rig.view("failover", seq, true);
            for (slot, want) in want.iter().enumerate() {
                assert!(rig.read(exports[slot].key, 0, SIZE as usize) == *want, "seed {seed} life {life}");
            }
            feeder.acked = (status(&rig).durable_frame, status(&rig).durable_seq);
            rig.ship(&mut feeder);
            rig.check(&model, feeder.next_seq - 1);
        }
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 20);
        assert!(status(&rig).floor > seq, "seed {seed}: {:?}", status(&rig));
        for (slot, want) in want.iter().enumerate() {
            assert!(rig.read(exports[slot].key, 0, SIZE as usize) == *want, "seed {seed}");
        }
        // Closed and kept, it comes back as it was.
        rig.target.close_view(&mut rig.io, "failover", true).unwrap();
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 10);
        let exports = rig.view("failover", seq, true);
        for (slot, want) in want.iter().enumerate() {
            assert!(rig.read(exports[slot].key, 0, SIZE as usize) == *want, "seed {seed}");
        }
    }
}

/// Writes until the journal has so many segments of 8 MiB: with four it is too short to leave views their history.
fn until_segments(rig: &mut Rig, feeder: &mut Feeder, model: &mut Model, dice: &mut Dice, count: u64) {
    while status(rig).journal_bytes < count * (8 << 20) {
        scribble(feeder, model, dice, 20);
        feeder.seal(20);
        rig.ship_more(feeder);
    }
    assert_eq!(status(rig).floor, 0);
}

#[test]
fn what_cannot_be_read_for_a_while_is_copied_once_it_can_be() {
    for seconds in [0, 2, 6, 13] {
        let (mut rig, mut feeder, mut model) = begun(seconds, WorldConfig::default());
        let mut dice = Dice(seconds);
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 3);
        let seq = feeder.next_seq - 1;
        let exports = rig.view("machine", seq, true);
        let want = [model.at(0, seq), model.at(1, seq)];
        until_segments(&mut rig, &mut feeder, &mut model, &mut dice, 3);
        rig.world.errors(rig.node, Errors { read: 1.0, ..Errors::default() });
        until_segments(&mut rig, &mut feeder, &mut model, &mut dice, 4);
        rig.run_for(seconds * SECOND);
        assert!(status(&rig).floor < seq, "{seconds} s: nothing is folded over what could not be kept");
        rig.world.errors(rig.node, Errors::default());
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 3);
        rig.until("folded", |rig| status(rig).floor > seq);
        for (slot, want) in want.iter().enumerate() {
            assert!(rig.read(exports[slot].key, 0, SIZE as usize) == *want, "away for {seconds} s");
        }
        rig.check(&model, feeder.next_seq - 1);
    }
}

#[test]
fn what_stays_lost_does_not_hold_folding_back() {
    let (mut rig, mut feeder, mut model) = begun(5, WorldConfig::default());
    let mut dice = Dice(5);
    fill(&mut rig, &mut feeder, &mut model, &mut dice, 3);
    let seq = feeder.write(0, 8192, dice.bytes(4096));
    for (record, payload) in &feeder.records {
        model.note(record, payload);
    }
    let at = 4096 + feeder.frames.iter().map(|frame| frame.0.len() as u64).sum::<u64>();
    feeder.seal(1);
    rig.ship_more(&mut feeder);
    let mut want = model.at(0, seq);
    let (paths, name) = (rig.world.paths(rig.node, ROOT), status(&rig).timeline.to_string());
    let path = paths.iter().filter(|path| path.ends_with(".seg") && path.contains(&name)).min().unwrap();
    assert_eq!(rig.world.file_range(rig.node, path, at, 4), Some(b"AIFR".into()));
    rig.world.rot(rig.node, path, at + 300, 8);
    let exports = rig.view("machine", seq, true);
    until_segments(&mut rig, &mut feeder, &mut model, &mut dice, 4);
    let begun = rig.world.now();
    rig.until("folded", |rig| status(rig).floor > seq);
    let waited = rig.world.now() - begun;
    assert!((10 * SECOND..30 * SECOND).contains(&waited), "{waited}");
    // Nothing but the block that is lost is missing.
    let cookie = rig.ask(exports[0].key, Request::Read { offset: 8192, len: 4096 });
    assert!(rig.answer(cookie).is_err());
    let mut found = rig.read(exports[0].key, 0, 8192);
    found.extend_from_slice(&rig.read(exports[0].key, 12288, SIZE as usize - 12288));
    want.drain(8192..12288);
    assert!(found == want);
}

#[test]
fn several_views_at_different_points_are_served() {
    let (mut rig, mut feeder, mut model) = begun(3, WorldConfig::default());
    let mut dice = Dice(3);
    let mut held = Vec::new();
    for number in 0..40 {
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 1);
        if number % 4 == 1 {
            let seq = feeder.next_seq - 1 - dice.roll(100);
            let exports = rig.view(&format!("v{number}"), seq, number % 8 == 1);
            held.push((exports, model.at(0, seq), format!("v{number}")));
        }
        if number % 6 == 5 {
            let (.., name) = held.remove(0);
            rig.target.close_view(&mut rig.io, &name, false).unwrap();
        }
        for (exports, want, name) in &held {
            assert!(rig.read(exports[0].key, 0, SIZE as usize) == *want, "{name} in round {number}");
        }
    }
    assert!(status(&rig).floor > 0);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn a_test_gives_way_when_there_is_no_room_for_its_shelf_and_a_failover_does_not() {
    for failover in [false, true] {
        let (mut rig, mut feeder, mut model) = begun(4, WorldConfig::default());
        let mut dice = Dice(4);
        fill(&mut rig, &mut feeder, &mut model, &mut dice, 3);
        let seq = feeder.next_seq - 1;
        let exports = rig.view("held", seq, failover);
        let want = model.at(0, seq);
        // Room for three segments and a bit: no shelf.
        rig.world.set_space(rig.node, 28 << 20);
        for _ in 0..60 {
            scribble(&mut feeder, &mut model, &mut dice, 120);
        }
        feeder.seal(20);
        rig.send_from(&feeder, feeder.acked.0);
        let last = feeder.frames.len() as u64;
        if failover {
            rig.until("stopped", |rig| rig.broken);
            assert!(status(&rig).fold_error.is_some());
            assert!(rig.read(exports[0].key, 0, SIZE as usize) == want);
            // With room, both go on.
            rig.world.set_space(rig.node, 1 << 30);
            rig.run_for(3 * SECOND);
            feeder.acked = (status(&rig).durable_frame, status(&rig).durable_seq);
            rig.ship(&mut feeder);
            assert!(rig.read(exports[0].key, 0, SIZE as usize) == want);
        } else {
            rig.until("taken", |rig| rig.acked().0 == last);
            assert!(
                rig.events.iter().any(|event| matches!(event, TargetEvent::ViewLost { view, .. } if view == "held"))
            );
            assert!(status(&rig).views.is_empty());
        }
        rig.check(&model, feeder.next_seq - 1);
    }
}

#[test]
fn reads_under_way_see_the_point_while_its_image_is_overwritten() {
    for seed in 0..4 {
        // Some reads are overtaken by many other operations.
        let world = WorldConfig { disk_latency: (20_000, 40_000_000), ..WorldConfig::default() };
        let (mut rig, mut feeder, mut model) = begun(seed, world);
        let mut dice = Dice(seed);
        // The point lies just behind the beginning of a segment: what it needs is in the image when that is folded.
        while status(&rig).segments < 2 {
            fill(&mut rig, &mut feeder, &mut model, &mut dice, 1);
        }
        let seq = feeder.next_seq - 1;
        let exports = rig.view("held", seq, false);
        let want = model.at(0, seq);
        let mut cookies = Vec::new();
        for _ in 0..60 {
            scribble(&mut feeder, &mut model, &mut dice, 120);
            feeder.seal(20);
            rig.send_from(&feeder, feeder.acked.0);
            let last = feeder.frames.len() as u64;
            while rig.acked().0 < last {
                if cookies.len() < 40 {
                    let block = dice.roll(SIZE / 4096) as usize;
                    let cookie = rig.ask(exports[0].key, Request::Read { offset: block as u64 * 4096, len: 4096 });
                    cookies.push((cookie, block));
                }
                rig.step();
                for answer in std::mem::take(&mut rig.answers) {
                    let at = cookies.iter().position(|(cookie, _)| *cookie == answer.cookie).unwrap();
                    let (_, block) = cookies.swap_remove(at);
                    let part = answer.result.unwrap().unwrap();
                    assert!(part.buf[part.at..part.at + 4096] == want[block * 4096..][..4096], "block {block}");
                }
            }
            feeder.acked = (last, feeder.next_seq - 1);
            // Two segments are folded under it.
            if status(&rig).folded_segments > 2 {
                break;
            }
        }
        assert!(status(&rig).floor > seq);
    }
}
