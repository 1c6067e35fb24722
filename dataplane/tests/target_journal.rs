//! The target's journal under crashes, damage and hostile input.

mod target_rig;

use afterimage_dataplane::io::sim::{Fault, WorldConfig};
use afterimage_dataplane::io::{Errno, Io};
use afterimage_dataplane::target::{Choice, PointError, StreamState, TargetEvent};
use afterimage_wire::control::{Control, StopReason};
use afterimage_wire::frame::frame_crc;
use afterimage_wire::handshake::{Hello, Refusal, Welcome};
use afterimage_wire::segment::Predecessor;
use target_rig::*;

fn begun(seed: u64, world: WorldConfig) -> (Rig, Feeder, Model) {
    let mut rig = Rig::new(seed, world, config(), 3600 * SECOND);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    (rig, feeder, Model::default())
}

fn segments(rig: &Rig) -> Vec<String> {
    rig.world.paths(rig.node, ROOT).into_iter().filter(|path| path.ends_with(".seg")).collect()
}

#[test]
fn killed_at_any_step_nothing_acknowledged_is_lost() {
    for seed in 0..20 {
        let (mut rig, mut feeder, mut model) = begun(seed, WorldConfig::default());
        let mut dice = Dice(seed);
        for life in 0..3 {
            scribble(&mut feeder, &mut model, &mut dice, 60);
            feeder.seal(1 + dice.roll(9) as usize);
            let from = feeder.acked.0;
            rig.send_from(&feeder, from);
            for _ in 0..dice.roll(120) {
                rig.step();
            }
            let (frame, seq) = rig.acked().max(feeder.acked);
            feeder.acked = (frame, seq);
            rig.restart((seed + life) % 2 == 0);
            assert!(!rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })), "{:?}", rig.events);
            let (position, whole) = rig.connect(&feeder);
            assert!(position.frame >= frame && position.seq >= seq, "seed {seed}: {position:?} after {frame}");
            assert!(!whole);
            rig.check(&model, position.seq);
            rig.send_from(&feeder, position.frame);
            let last = feeder.frames.len() as u64;
            feeder.acked = (position.frame, position.seq);
            if position.frame < last {
                rig.until("caught up", |rig| rig.acked().0 == last);
                feeder.acked = (last, feeder.next_seq - 1);
            }
            rig.check(&model, feeder.next_seq - 1);
        }
    }
}

/// A rig with the shortest segments, in which making one takes `slow` times as often a hundred times as long.
fn short(seed: u64, slow: f64) -> (Rig, Feeder, Model) {
    let world = WorldConfig { slow_folders: slow, ..WorldConfig::default() };
    let settings = afterimage_dataplane::target::TargetConfig { segment_bytes: 5 << 20, ..config() };
    let mut rig = Rig::new(seed, world, settings, 3600 * SECOND);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    (rig, feeder, Model::default())
}

/// Ships until another segment's file is there.
fn ship_to_the_next_segment(rig: &mut Rig, feeder: &mut Feeder, model: &mut Model, dice: &mut Dice) {
    let before = segments(rig).len();
    while segments(rig).len() == before {
        scribble(feeder, model, dice, 80);
        feeder.seal(40);
        let (last, from) = (feeder.frames.len() as u64, feeder.acked.0);
        rig.send_from(feeder, from);
        rig.until("acknowledged or made", |rig| rig.acked().0 == last || segments(rig).len() > before);
        feeder.acked = rig.acked().max(feeder.acked);
    }
}

fn assert_numbers(rig: &Rig) {
    let number = |path: &String| u64::from_str_radix(&path[path.len() - 20..path.len() - 4], 16).expect("a number");
    let numbers: Vec<_> = segments(rig).iter().map(number).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

#[test]
fn killed_while_the_next_segment_is_made_nothing_is_lost_and_no_number_is_left_out() {
    let mut left = [0; 2];
    for seed in 0..16 {
        let (mut rig, mut feeder, mut model) = short(seed, if seed % 4 == 0 { 0.0 } else { 1.0 });
        let mut dice = Dice(seed);
        for life in 0..4 {
            ship_to_the_next_segment(&mut rig, &mut feeder, &mut model, &mut dice);
            for _ in 0..dice.roll(8) {
                rig.step();
            }
            let (frame, seq) = rig.acked().max(feeder.acked);
            let newest = segments(&rig).pop().expect("one");
            let size = rig.world.file(rig.node, &newest).map_or(0, |bytes| bytes.len());
            left[usize::from(size > 0)] += 1;
            rig.restart((seed + life) % 2 == 0);
            assert!(!rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })), "{:?}", rig.events);
            let (position, whole) = rig.connect(&feeder);
            assert!(position.frame >= frame && position.seq >= seq, "seed {seed}: {position:?} after {frame}");
            assert!(!whole);
            assert_numbers(&rig);
            feeder.acked = (position.frame, position.seq);
            if position.frame < feeder.frames.len() as u64 {
                rig.ship_more(&mut feeder);
            }
            rig.check(&model, feeder.next_seq - 1);
        }
        assert_numbers(&rig);
    }
    assert!(left[0] > 0 && left[1] > 0, "half made and whole: {left:?}");
}

#[test]
fn frames_are_acknowledged_while_the_next_segment_is_made() {
    let (mut rig, mut feeder, mut model) = short(1, 0.0);
    let mut dice = Dice(1);
    // Nothing but making the next one takes long.
    rig.world.configure(|world| {
        world.disk_latency = (10_000_000, 10_000_000);
        world.slow_folders = 1.0;
    });
    ship_to_the_next_segment(&mut rig, &mut feeder, &mut model, &mut dice);
    rig.until("all of it", |rig| rig.acked().0 == feeder.frames.len() as u64);
    feeder.acked = (feeder.frames.len() as u64, feeder.next_seq - 1);
    let begun = rig.world.now();
    scribble(&mut feeder, &mut model, &mut dice, 20);
    feeder.seal(20);
    rig.ship_more(&mut feeder);
    assert!(rig.world.now() - begun < 500_000_000, "it waited for the segment");
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn no_room_for_the_next_segment_stops_nothing_before_it_is_needed() {
    let (mut rig, mut feeder, mut model) = short(2, 0.0);
    let mut dice = Dice(2);
    rig.world.set_space(rig.node, rig.world.used_space(rig.node) + (2 << 20));
    // Past the middle of the segment, where the next one is asked for.
    while feeder.frames.iter().map(|frame| frame.0.len()).sum::<usize>() < 4 << 20 {
        scribble(&mut feeder, &mut model, &mut dice, 40);
        feeder.seal(40);
        rig.ship_more(&mut feeder);
    }
    assert_eq!(segments(&rig).len(), 1);
    assert_eq!(rig.target.status()[0].state, StreamState::Ready);
    assert!(!rig.broken);
    rig.world.set_space(rig.node, 1 << 40);
    ship_to_the_next_segment(&mut rig, &mut feeder, &mut model, &mut dice);
    rig.until("all of it", |rig| rig.acked().0 == feeder.frames.len() as u64);
    rig.check(&model, feeder.next_seq - 1);
    assert_numbers(&rig);
}

#[test]
fn a_torn_tail_is_written_over() {
    let (mut rig, mut feeder, mut model) = begun(1, WorldConfig::default());
    scribble(&mut feeder, &mut model, &mut Dice(1), 20);
    feeder.seal(5);
    rig.ship_more(&mut feeder);
    let path = segments(&rig)[0].clone();
    // The newest frame, not yet named as acknowledged by any other, is torn.
    let at: usize = 4096 + feeder.frames[..4].iter().map(|frame| frame.0.len()).sum::<usize>();
    rig.world.rot(rig.node, &path, at as u64 + 600, 100);
    rig.restart(false);
    assert!(!rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })));
    let (position, whole) = rig.connect(&feeder);
    assert_eq!((position.frame, whole), (4, false));
    rig.send_from(&feeder, 4);
    rig.until("again", |rig| rig.acked().0 == 5);
    rig.check(&model, feeder.next_seq - 1);
    rig.restart(true);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn damage_below_an_acknowledged_place_is_named_and_mended_by_a_whole_sync() {
    let (mut rig, mut feeder, mut model) = begun(2, WorldConfig::default());
    for _ in 0..4 {
        scribble(&mut feeder, &mut model, &mut Dice(1), 20);
        feeder.seal(10);
        rig.ship_more(&mut feeder);
    }
    let path = segments(&rig)[0].clone();
    let at: usize = 4096 + feeder.frames[..2].iter().map(|frame| frame.0.len()).sum::<usize>();
    rig.world.rot(rig.node, &path, at as u64, 4096);
    rig.restart(false);
    let damage = rig.events.iter().find_map(|event| match event {
        TargetEvent::Damaged { damage, .. } => Some(damage.clone()),
        _ => None,
    });
    let damage = damage.expect("is told");
    let first_seq = feeder.frames[1].1 + 1;
    assert_eq!((damage.first_frame, damage.last_frame, damage.first_seq), (3, 3, first_seq));
    // Points before it are good, those behind it hold no disk, and the newest says so.
    rig.check(&model, first_seq - 1);
    let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(first_seq + 30)).unwrap();
    assert_eq!((point.complete, point.disks.len()), (false, 0));
    let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
    assert_eq!(latest.seq, first_seq - 1);
    assert!(rig.target.open_view(&mut rig.io, view_config("x", first_seq + 30, false)).is_err());
    // The source is told to compare everything; afterwards points are good again.
    let (position, whole) = rig.connect(&feeder);
    assert!(whole);
    assert_eq!(position.frame, feeder.frames.len() as u64);
    for slot in [0, 1] {
        feeder.sync_mark(afterimage_wire::record::RecordKind::SyncBegin, slot, 2, true);
        let bytes = model.at(slot, u64::MAX);
        for (number, piece) in bytes.chunks(64 * 1024).enumerate() {
            let kind = afterimage_wire::record::RecordKind::SyncWrite;
            feeder.record(kind, slot, number as u64 * 65536, piece.len() as u64, piece.to_vec());
        }
        feeder.sync_mark(afterimage_wire::record::RecordKind::SyncEnd, slot, 2, true);
    }
    for (record, payload) in &feeder.records {
        model.note(record, payload);
    }
    feeder.seal(6);
    rig.ship_more(&mut feeder);
    rig.check(&model, feeder.next_seq - 1);
    rig.restart(false);
    rig.check(&model, feeder.next_seq - 1);
    let (_, whole) = rig.connect(&feeder);
    assert!(!whole, "it has been done");
}

#[test]
fn bad_frames_end_the_connection_and_leave_nothing() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 7] = [
        ("crc", |frame| frame[500] ^= 1),
        ("number", |frame| frame[48] = 77),
        ("stream", |frame| frame[16] ^= 1),
        ("incarnation", |frame| frame[32] ^= 1),
        ("length", |frame| frame[8..12].copy_from_slice(&0xffff_f000u32.to_le_bytes())),
        ("seq gap", |frame| frame[64] += 1),
        ("garbage", |frame| frame.fill(0xaa)),
    ];
    for (what, change) in changes {
        let (mut rig, mut feeder, mut model) = begun(3, WorldConfig::default());
        scribble(&mut feeder, &mut model, &mut Dice(1), 10);
        feeder.seal(10);
        let mut bad = feeder.frames[1].0.clone();
        change(&mut bad);
        if what != "crc" && what != "garbage" && what != "length" {
            let crc = frame_crc(&bad);
            bad[12..16].copy_from_slice(&crc.to_le_bytes());
        }
        rig.send(bad);
        rig.until(what, |rig| rig.broken);
        let stop = Control::Stop { reason: StopReason::BadFrame, value: 2 };
        assert_eq!(rig.messages.last(), Some(&stop), "{what}");
        assert_eq!(rig.target.status()[0].durable_frame, 1, "{what}");
        rig.ship(&mut feeder);
        rig.check(&model, feeder.next_seq - 1);
    }
}

#[test]
fn a_seal_that_does_not_fit_is_damage_even_with_a_right_crc() {
    let (mut rig, mut feeder, mut model) = begun(4, WorldConfig::default());
    scribble(&mut feeder, &mut model, &mut Dice(1), 10);
    feeder.seal(10);
    let mut bad = feeder.frames[1].0.clone();
    bad[300] ^= 1;
    let crc = frame_crc(&bad);
    bad[12..16].copy_from_slice(&crc.to_le_bytes());
    rig.send(bad);
    rig.until("told", |rig| rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })));
    let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
    assert_eq!(latest.seq, 8);
    let (_, whole) = rig.connect(&feeder);
    assert!(whole);
}

#[test]
fn random_bytes_never_do_anything_but_end_the_connection() {
    let mut dice = Dice(9);
    for _ in 0..30 {
        let (mut rig, _, model) = begun(5, WorldConfig::default());
        let len = 1 + dice.roll(20_000) as usize;
        let bytes = (0..len).map(|_| dice.roll(256) as u8).collect();
        rig.send(bytes);
        rig.run_for(3 * SECOND);
        let status = &rig.target.status()[0];
        assert_eq!((status.durable_frame, status.state.clone()), (1, StreamState::Ready));
        assert_eq!(status.connected, len < 96, "{len} bytes");
        rig.check(&model, 8);
    }
}

#[test]
fn an_idle_source_hears_that_the_target_lives() {
    let (mut rig, ..) = begun(6, WorldConfig::default());
    rig.run_for(5 * SECOND + SECOND / 2);
    assert_eq!(rig.messages.first(), Some(&Control::Ready));
    let alive = rig.messages.iter().filter(|message| **message == Control::Alive).count();
    assert!((4..=6).contains(&alive), "{alive}");
}

#[test]
fn a_failing_journal_disk_ends_the_stream_and_its_points_stay() {
    let (mut rig, mut feeder, mut model) = begun(7, WorldConfig::default());
    scribble(&mut feeder, &mut model, &mut Dice(1), 10);
    feeder.seal(10);
    rig.ship_more(&mut feeder);
    let good = feeder.next_seq - 1;
    let path = segments(&rig)[0].clone();
    rig.world.fail(rig.node, &path, Fault::Write, Errno::IO, 1);
    scribble(&mut feeder, &mut model, &mut Dice(2), 10);
    feeder.seal(10);
    rig.send_from(&feeder, feeder.acked.0);
    rig.until("stopped", |rig| rig.broken);
    assert_eq!(rig.messages.last(), Some(&Control::Stop { reason: StopReason::JournalFailed, value: 0 }));
    rig.check(&model, good);
    assert!(matches!(rig.target.status()[0].state, StreamState::Failed(_)));
    // Recovered by reading, it goes on.
    rig.restart(false);
    rig.ship(&mut feeder);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn without_space_the_stream_stops_and_goes_on_when_there_is_some() {
    let (mut rig, mut feeder, mut model) = begun(8, WorldConfig::default());
    rig.world.set_space(rig.node, 9 << 20);
    let mut dice = Dice(1);
    for _ in 0..20 {
        scribble(&mut feeder, &mut model, &mut dice, 100);
    }
    feeder.seal(20);
    rig.send_from(&feeder, feeder.acked.0);
    rig.until("stopped", |rig| rig.broken);
    assert_eq!(rig.messages.last(), Some(&Control::Stop { reason: StopReason::NoSpace, value: 0 }));
    let good = rig.acked();
    rig.check(&model, good.1);
    assert!(matches!(rig.target.status()[0].state, StreamState::NoSpace(_)));
    let refused = |rig: &mut Rig, hello: &Hello| match rig.hello(hello) {
        Welcome::Refused { reason, .. } => Some(reason),
        Welcome::Accepted { .. } => None,
    };
    assert_eq!(refused(&mut rig, &feeder.hello()), Some(Refusal::Unable));
    // A stale source is told that it is one all the same.
    let mut stale = feeder.hello();
    stale.disks[0].generation = 0;
    let fenced = Refusal::Fenced { disk: stale.disks[0].disk.id, generation: 1 };
    assert_eq!(refused(&mut rig, &stale), Some(fenced));
    rig.world.set_space(rig.node, 1 << 30);
    rig.run_for(SECOND);
    feeder.acked = good;
    rig.ship(&mut feeder);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn a_newer_connection_takes_over_and_resent_frames_are_passed_over() {
    let (mut rig, mut feeder, mut model) = begun(9, WorldConfig::default());
    let mut dice = Dice(3);
    for round in 0..20 {
        scribble(&mut feeder, &mut model, &mut dice, 30);
        feeder.seal(4);
        rig.send_from(&feeder, feeder.acked.0);
        for _ in 0..dice.roll(30) {
            rig.step();
        }
        let (position, whole) = rig.connect(&feeder);
        assert!(!whole);
        // A source that has not heard of the newest frames sends some of them again.
        let from = position.frame.saturating_sub(dice.roll(3));
        rig.send_from(&feeder, from);
        let last = feeder.frames.len() as u64;
        rig.until("caught up", |rig| rig.acked().0 == last);
        feeder.acked = (last, feeder.next_seq - 1);
        rig.check(&model, feeder.next_seq - 1);
        if round % 5 == 4 {
            rig.restart(false);
            rig.connect(&feeder);
        }
    }
}

#[test]
fn points_are_listed_and_found() {
    let (mut rig, mut feeder, mut model) = begun(10, WorldConfig::default());
    let mut cuts = Vec::new();
    for number in 1..=5 {
        scribble(&mut feeder, &mut model, &mut Dice(number), 10);
        feeder.mono += SECOND;
        cuts.push((number, feeder.cut(number), 1_700_000_000 * SECOND + feeder.mono));
    }
    feeder.seal(8);
    rig.ship_more(&mut feeder);
    for (number, seq, wall_ns) in &cuts {
        let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Cut(*number)).unwrap();
        assert_eq!((point.seq, point.wall_ns, point.cut.unwrap().number), (*seq, *wall_ns, *number));
        let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Time(*wall_ns + 1000)).unwrap();
        assert_eq!(point.seq, *seq, "at the time of cut {number}");
        let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Time(*wall_ns - 500_000_000)).unwrap();
        assert_eq!(point.seq, *seq - 1, "half a second before cut {number}");
    }
    let listed = rig.target.points(&mut rig.io, stream_id(), 0, 100, true).unwrap();
    assert_eq!(listed.iter().map(|point| point.seq).collect::<Vec<_>>(), cuts.iter().map(|c| c.1).collect::<Vec<_>>());
    let listed = rig.target.points(&mut rig.io, stream_id(), 20, 10, false).unwrap();
    assert_eq!(listed.iter().map(|point| point.seq).collect::<Vec<_>>(), (20..30).collect::<Vec<_>>());
    let newest = feeder.next_seq - 1;
    let future = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(newest + 1));
    assert_eq!(future.unwrap_err(), PointError::Future { newest });
    assert_eq!(rig.target.resolve(&mut rig.io, stream_id(), Choice::Cut(9)).unwrap_err(), PointError::NoCut(9));
    assert_eq!(rig.target.resolve(&mut rig.io, stream_id(), Choice::Time(5)).unwrap_err(), PointError::TooOld);
    assert!(rig.io.now() > 0);
}
