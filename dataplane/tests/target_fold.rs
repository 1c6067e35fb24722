//! Folding: retention, crashes at every step, pins, budgets.

mod target_rig;

use afterimage_dataplane::io::Errno;
use afterimage_dataplane::io::sim::{Fault, WorldConfig};
use afterimage_dataplane::target::{Choice, PointError, TargetConfig, TargetEvent};
use afterimage_wire::handshake::{Refusal, Welcome};
use afterimage_wire::record::RecordKind;
use afterimage_wire::segment::Predecessor;
use target_rig::*;

/// Retention of 16 s: segments of at most 2 s.
const RETENTION: u64 = 16 * SECOND;

fn begun(seed: u64, world: WorldConfig, retention: u64) -> (Rig, Feeder, Model) {
    let mut rig = Rig::new(seed, world, config(), retention);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    (rig, feeder, Model::default())
}

/// Ships `rounds` times two seconds of writes.
fn age(rig: &mut Rig, feeder: &mut Feeder, model: &mut Model, dice: &mut Dice, rounds: usize) {
    for _ in 0..rounds {
        scribble(feeder, model, dice, 12);
        feeder.mono += 2 * SECOND;
        feeder.cut(feeder.mono / SECOND);
        feeder.seal(5);
        rig.ship_more(feeder);
    }
}

#[test]
fn what_is_older_than_the_retention_is_folded_and_the_rest_is_right() {
    let (mut rig, mut feeder, mut model) = begun(1, WorldConfig::default(), RETENTION);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(1), 40);
    rig.until("folded", |rig| rig.target.status()[0].history <= RETENTION + 4 * SECOND);
    // What is being folded counts as gone already.
    rig.run_for(SECOND);
    let status = rig.target.status()[0].clone();
    assert!(status.floor > 0 && status.folded_segments > 15, "{status:?}");
    assert!(status.shortened.is_none());
    assert_eq!(status.oldest, Some(status.floor));
    for seq in (status.floor..feeder.next_seq).step_by(3) {
        rig.check(&model, seq);
    }
    let gone = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(status.floor - 1));
    assert_eq!(gone.unwrap_err(), PointError::Folded { floor: status.floor });
    rig.restart(true);
    for seq in (rig.target.status()[0].floor..feeder.next_seq).step_by(3) {
        rig.check(&model, seq);
    }
}

#[test]
fn killed_at_any_step_of_fold_and_roll_every_point_is_right() {
    for seed in 0..12u64 {
        let world = WorldConfig {
            block: if seed % 3 == 0 { 4096 } else { 512 },
            discard: seed % 5 != 0,
            ..WorldConfig::default()
        };
        let (mut rig, mut feeder, mut model) = begun(seed, world, RETENTION);
        let mut dice = Dice(seed);
        age(&mut rig, &mut feeder, &mut model, &mut dice, 8);
        for life in 0..6 {
            for _ in 0..3 {
                scribble(&mut feeder, &mut model, &mut dice, 10);
                feeder.mono += 2 * SECOND;
                feeder.seal(4);
            }
            rig.send_from(&feeder, feeder.acked.0);
            for _ in 0..dice.roll(400) {
                rig.step();
            }
            let acked = rig.acked().max(feeder.acked);
            let floor = rig.target.status()[0].floor;
            rig.restart((seed + life) % 2 == 0);
            assert!(!rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })), "{:?}", rig.events);
            let status = rig.target.status()[0].clone();
            assert!(status.durable_seq >= acked.1 && status.floor >= floor, "seed {seed} life {life}");
            assert_eq!(status.newest, Some(status.durable_seq), "seed {seed} life {life}");
            let oldest = status.oldest.expect("there are points").max(8);
            for seq in [oldest, (oldest + status.durable_seq) / 2, status.durable_seq] {
                rig.check(&model, seq);
            }
            feeder.acked = (status.durable_frame, status.durable_seq);
            rig.ship(&mut feeder);
        }
        rig.check(&model, feeder.next_seq - 1);
    }
}

#[test]
fn an_open_point_holds_folding_back_and_is_readable_meanwhile() {
    let (mut rig, mut feeder, mut model) = begun(3, WorldConfig::default(), RETENTION);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(3), 4);
    let seq = feeder.next_seq - 20;
    let exports = rig.view("pinned", seq, true);
    rig.write(exports[0].key, 700, b"mine", false);
    let mut want = model.at(0, seq);
    want[700..704].copy_from_slice(b"mine");
    age(&mut rig, &mut feeder, &mut model, &mut Dice(4), 30);
    assert!(rig.target.status()[0].floor <= seq);
    assert!(rig.read(exports[0].key, 0, SIZE as usize) == want);
    // Not even a restart lets it go.
    rig.restart(false);
    rig.run_for(SECOND);
    assert!(rig.target.status()[0].floor <= seq);
    let exports = rig.view("pinned", seq, true);
    assert!(rig.read(exports[0].key, 0, SIZE as usize) == want);
    // Closed but kept, it still holds.
    rig.target.close_view(&mut rig.io, "pinned", true).unwrap();
    rig.run_for(SECOND);
    assert!(rig.target.status()[0].floor <= seq);
    rig.target.close_view(&mut rig.io, "pinned", false).unwrap();
    rig.run_for(SECOND);
    assert!(rig.target.status()[0].floor > seq);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn a_view_reads_right_while_its_history_is_folded_under_it() {
    let (mut rig, mut feeder, mut model) = begun(4, WorldConfig::default(), RETENTION);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(4), 4);
    for round in 0..25 {
        let seq = feeder.next_seq - 1;
        let name = format!("v{round}");
        let exports = rig.view(&name, seq, false);
        let want = model.at(0, seq);
        age(&mut rig, &mut feeder, &mut model, &mut Dice(round), 1);
        for _ in 0..3 {
            assert!(rig.read(exports[0].key, 0, SIZE as usize) == want, "round {round}");
        }
        rig.target.close_view(&mut rig.io, &name, false).unwrap();
    }
    assert!(rig.target.status()[0].folded_segments > 5);
}

#[test]
fn a_failing_image_is_written_again() {
    let (mut rig, mut feeder, mut model) = begun(5, WorldConfig::default(), RETENTION);
    let image = rig.world.paths(rig.node, ROOT).into_iter().find(|path| path.ends_with(".img")).unwrap();
    rig.world.fail(rig.node, &image, Fault::Sync, Errno::IO, 2);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(5), 20);
    rig.run_for(5 * SECOND);
    rig.until("folded", |rig| rig.target.status()[0].folded_segments > 2);
    let floor = rig.target.status()[0].floor;
    for seq in [floor, feeder.next_seq - 1] {
        rig.check(&model, seq);
    }
}

#[test]
fn at_the_budget_history_is_shortened_and_that_is_told() {
    let config = TargetConfig { budget_bytes: 32 << 20, ..config() };
    let mut rig = Rig::new(6, WorldConfig::default(), config, 3600 * SECOND);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    let mut model = Model::default();
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    let mut dice = Dice(6);
    for _ in 0..60 {
        scribble(&mut feeder, &mut model, &mut dice, 100);
        feeder.seal(30);
        rig.ship_more(&mut feeder);
    }
    let status = rig.target.status()[0].clone();
    assert!(status.journal_bytes <= 32 << 20);
    assert!(status.shortened.is_some() && status.folded_segments > 0, "{status:?}");
    assert_eq!(rig.events.iter().filter(|event| matches!(event, TargetEvent::Shortened { .. })).count(), 1);
    rig.check(&model, status.floor);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn the_newest_complete_point_is_never_folded_away() {
    let (mut rig, mut feeder, mut model) = begun(7, WorldConfig::default(), RETENTION);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(7), 3);
    let complete = feeder.next_seq - 1;
    feeder.sync_mark(RecordKind::SyncBegin, 0, 2, false);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(8), 30);
    let status = rig.target.status()[0].clone();
    assert_eq!(status.newest, Some(complete));
    assert!(status.floor <= complete);
    rig.check(&model, complete);
    rig.restart(false);
    rig.check(&model, complete);
    rig.connect(&feeder);
    feeder.sync_mark(RecordKind::SyncEnd, 0, 2, false);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(9), 3);
    rig.run_for(SECOND);
    assert!(rig.target.status()[0].floor > complete);
    rig.check(&model, feeder.next_seq - 1);
}

#[test]
fn unreadable_ranges_stay_unreadable_until_written_also_when_folded() {
    use afterimage_dataplane::host::Request;
    let (mut rig, mut feeder, mut model) = begun(8, WorldConfig::default(), RETENTION);
    feeder.write(0, 0, vec![7; 16384]);
    feeder.record(RecordKind::Unreadable, 0, 4096, 8192, Vec::new());
    feeder.write(0, 4096, vec![9; 4096]);
    for (record, payload) in &feeder.records {
        model.note(record, payload);
    }
    for life in 0..3 {
        feeder.seal(1);
        if life == 0 {
            rig.ship_more(&mut feeder);
        }
        let exports = rig.view("v", feeder.next_seq - 1, false);
        assert_eq!(rig.read(exports[0].key, 0, 8192), model.at(0, u64::MAX)[..8192]);
        let cookie = rig.ask(exports[0].key, Request::Read { offset: 8192, len: 512 });
        assert_eq!(rig.answer(cookie).unwrap_err(), Errno::IO, "life {life}");
        rig.target.close_view(&mut rig.io, "v", false).unwrap();
        if life == 0 {
            // Everything up to here is folded.
            let floor = feeder.next_seq - 1;
            for _ in 0..30 {
                feeder.mono += 2 * SECOND;
                feeder.cut(feeder.mono);
                feeder.seal(1);
                rig.ship_more(&mut feeder);
            }
            rig.until("folded", |rig| rig.target.status()[0].floor > floor);
            rig.run_for(SECOND);
        }
        if life == 1 {
            rig.restart(true);
        }
    }
    rig.connect(&feeder);
    feeder.write(0, 8192, vec![3; 4096]);
    for (record, payload) in &feeder.records {
        model.note(record, payload);
    }
    feeder.seal(1);
    rig.ship_more(&mut feeder);
    rig.check(&model, feeder.next_seq - 1);
}

/// All that lies above the floor is lost: the image stands where the floor is, and nobody may use its numbers again.
#[test]
fn a_target_that_has_only_its_image_left_refuses_numbers_that_the_image_has_had() {
    let (mut rig, mut feeder, mut model) = begun(70, WorldConfig::default(), RETENTION);
    age(&mut rig, &mut feeder, &mut model, &mut Dice(70), 40);
    rig.until("folded", |rig| rig.target.status()[0].history <= RETENTION + 4 * SECOND);
    let floor = rig.target.status()[0].floor;
    assert!(floor > 1);
    rig.die(true);
    for path in rig.world.paths(rig.node, ROOT).into_iter().filter(|path| path.ends_with(".seg")) {
        rig.world.rot(rig.node, &path, 0, 8192);
    }
    rig.open();
    assert!(rig.events.iter().any(|event| matches!(event, TargetEvent::Damaged { .. })), "{:?}", rig.events);
    assert_eq!(rig.target.status()[0].durable_seq, rig.target.status()[0].floor);
    // A source that has lost its log begins at 1, and at the floor itself is too low, too.
    for first_seq in [1, floor] {
        let hello = Feeder::new(2, first_seq, Predecessor::default()).hello();
        match rig.hello(&hello) {
            Welcome::Refused { reason: Refusal::SeqBehind { newest }, .. } => assert!(newest >= floor),
            other => panic!("from {first_seq}: {other:?}"),
        }
    }
    let mut next = Feeder::new(3, feeder.next_seq, Predecessor::default());
    assert!(rig.connect(&next).1, "the whole");
    next.join_and_sync(2);
    next.seal(100);
    rig.ship(&mut next);
    rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).expect("a point again");
}
