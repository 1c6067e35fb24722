//! Comparing by hash at the target: at the place of the question, whatever came later, and over faults.

mod target_rig;

use afterimage_dataplane::io::Errno;
use afterimage_dataplane::io::sim::{Fault, WorldConfig};
use afterimage_dataplane::target::{Choice, Target, TargetConfig};
use afterimage_wire::control::Control;
use afterimage_wire::handshake::{Refusal, Welcome};
use afterimage_wire::record::RecordKind;
use afterimage_wire::segment::Predecessor;
use target_rig::*;

const STEP: usize = 4096;

/// A record of hashes of `data`.
fn ask(feeder: &mut Feeder, slot: u16, offset: u64, data: &[u8]) -> u64 {
    let mut hashes = Vec::new();
    policy().hash_key(stream_id(), policy().id).hashes(slot, offset, data, &mut hashes);
    feeder.record(RecordKind::SyncHash, slot, offset, data.len() as u64, hashes)
}

fn answer(rig: &mut Rig, seq: u64) -> u64 {
    let find = |rig: &Rig| {
        rig.messages.iter().find_map(|message| match message {
            Control::Compared { seq: of, differs } if *of == seq => Some(*differs),
            _ => None,
        })
    };
    rig.until("compared", |rig| find(rig).is_some());
    find(rig).expect("just seen")
}

fn begun(seed: u64, retention: u64) -> (Rig, Feeder, Model) {
    let mut rig = Rig::new(seed, WorldConfig::default(), config(), retention);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    (rig, feeder, Model::default())
}

/// Content of the disk after everything that is recorded.
fn now(model: &Model, slot: u16) -> Vec<u8> {
    model.at(slot, u64::MAX)
}

#[test]
fn a_place_is_compared_as_it_was_there() {
    let (mut rig, mut feeder, mut model) = begun(1, 3600 * SECOND);
    let mut dice = Dice(1);
    let mut asked = Vec::new();
    for _ in 0..12 {
        scribble(&mut feeder, &mut model, &mut dice, 6);
        let slot = dice.roll(2) as u16;
        let offset = dice.roll(SIZE / 512 - 300) as usize * 512;
        let len = 512 + dice.roll(280) as usize * 512;
        let data = now(&model, slot)[offset..offset + len].to_vec();
        asked.push(ask(&mut feeder, slot, offset as u64, &data));
        // In the same frame, later: it must not be seen.
        feeder.write(slot, offset as u64 / 512 * 512, vec![0xA5; 512]);
        let (record, payload) = feeder.records.last().expect("just made").clone();
        model.note(&record, &payload);
    }
    feeder.seal(40);
    rig.ship_more(&mut feeder);
    for seq in asked {
        assert_eq!(answer(&mut rig, seq), 0, "record {seq}");
    }
}

#[test]
fn exactly_what_differs_is_named() {
    let (mut rig, mut feeder, mut model) = begun(2, 3600 * SECOND);
    scribble(&mut feeder, &mut model, &mut Dice(2), 40);
    let mut data = now(&model, 1);
    for step in [0, 3, 4, 63] {
        data[step * STEP + 77] ^= 1;
    }
    let seq = ask(&mut feeder, 1, 0, &data);
    // The same bytes of the other disk, and of another place, have other hashes.
    let other = ask(&mut feeder, 0, 0, &vec![0; STEP]);
    feeder.seal(100);
    rig.ship_more(&mut feeder);
    assert_eq!(answer(&mut rig, seq), 1 | 1 << 3 | 1 << 4 | 1 << 63);
    let same = now(&model, 0)[..STEP].iter().all(|byte| *byte == 0);
    assert_eq!(answer(&mut rig, other), u64::from(!same));
}

#[test]
fn images_below_the_journal_are_compared_too() {
    let (mut rig, mut feeder, mut model) = begun(3, 16 * SECOND);
    let mut dice = Dice(3);
    for round in 0..40 {
        scribble(&mut feeder, &mut model, &mut dice, 12);
        let slot = dice.roll(2) as u16;
        let mut data = now(&model, slot);
        let step = dice.roll(64) as usize;
        data[step * STEP] ^= 1;
        let seq = ask(&mut feeder, slot, 0, &data);
        feeder.mono += 2 * SECOND;
        feeder.seal(5);
        rig.ship_more(&mut feeder);
        assert_eq!(answer(&mut rig, seq), 1 << step, "round {round}");
    }
    assert!(rig.target.status()[0].folded_segments > 5);
}

#[test]
fn a_place_in_question_is_not_folded_away() {
    let (mut rig, mut feeder, mut model) = begun(4, 16 * SECOND);
    let mut dice = Dice(4);
    scribble(&mut feeder, &mut model, &mut dice, 30);
    // More than are read at a time, and then everything grows old at once.
    let data = now(&model, 0);
    let asked: Vec<u64> = (0..200).map(|_| ask(&mut feeder, 0, 0, &data)).collect();
    for _ in 0..20 {
        scribble(&mut feeder, &mut model, &mut dice, 12);
        feeder.mono += 4 * SECOND;
        feeder.cut(feeder.mono / SECOND);
        feeder.seal(50);
    }
    rig.ship_more(&mut feeder);
    for seq in asked {
        assert_eq!(answer(&mut rig, seq), 0);
    }
}

#[test]
fn what_cannot_be_read_differs() {
    let (mut rig, mut feeder, mut model) = begun(5, 3600 * SECOND);
    scribble(&mut feeder, &mut model, &mut Dice(5), 10);
    feeder.seal(100);
    rig.ship_more(&mut feeder);
    let folder = format!("{ROOT}/streams/{}/segments/", stream_id());
    let segment = rig.world.paths(rig.node, &folder).into_iter().find(|path| path.ends_with(".seg")).expect("one");
    rig.world.fail(rig.node, &segment, Fault::Read, Errno::IO, 1000);
    let data = now(&model, 0);
    let seq = ask(&mut feeder, 0, 0, &data);
    feeder.seal(100);
    rig.ship_more(&mut feeder);
    assert_ne!(answer(&mut rig, seq), 0);
}

#[test]
fn an_answer_goes_into_the_next_connection() {
    let (mut rig, mut feeder, mut model) = begun(6, 3600 * SECOND);
    scribble(&mut feeder, &mut model, &mut Dice(6), 10);
    let data = now(&model, 0);
    let seq = ask(&mut feeder, 0, 0, &data);
    feeder.seal(100);
    // The welcome is said while the frames are on their way to the disk: they are not sent again.
    rig.send_from(&feeder, feeder.acked.0);
    rig.until("on its way", |rig| rig.target.status()[0].received_frame > feeder.acked.0);
    let (position, _) = rig.connect(&feeder);
    assert!(position.seq < seq, "not durable yet, so the source counts on an answer");
    rig.send_from(&feeder, position.frame);
    assert_eq!(answer(&mut rig, seq), 0);
}

#[test]
fn after_a_restart_nothing_old_is_answered_and_what_is_asked_is() {
    let (mut rig, mut feeder, mut model) = begun(7, 3600 * SECOND);
    scribble(&mut feeder, &mut model, &mut Dice(7), 10);
    let data = now(&model, 0);
    let old = ask(&mut feeder, 0, 0, &data);
    feeder.seal(100);
    rig.ship_more(&mut feeder);
    rig.restart(true);
    let new = ask(&mut feeder, 0, 0, &data);
    feeder.seal(100);
    rig.ship(&mut feeder);
    assert_eq!(answer(&mut rig, new), 0);
    assert!(!rig.messages.iter().any(|m| matches!(m, Control::Compared { seq, .. } if *seq == old)));
}

#[test]
fn a_seed_is_the_replica_and_only_what_differs_is_asked_for() {
    let mut rig = Rig::plain(8);
    rig.die(false);
    // A group whose disks this target has never seen; the image of one is brought.
    let root = "/other";
    let mut image: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 ^ at as u8).collect();
    rig.world.put_file(rig.node, "/other/brought.img", &image);
    rig.config = TargetConfig { root: root.into(), ..config() };
    rig.target = Target::new(7, rig.config.clone()).expect("good settings");
    rig.target.seed(disk(0).id, "/other/brought.img");
    rig.open();
    assert!(rig.world.file(rig.node, "/other/brought.img").is_none(), "it is moved");
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    for slot in [0, 1] {
        let mut payload = Vec::new();
        disk(slot).encode(&mut payload);
        feeder.record(RecordKind::Join, slot, 0, 0, payload);
        feeder.sync_mark(RecordKind::SyncBegin, slot, 1, true);
    }
    image[70_000] ^= 1;
    let seq = ask(&mut feeder, 0, 0, &image);
    feeder.record(RecordKind::SyncZero, 1, 0, SIZE, Vec::new());
    feeder.seal(100);
    rig.until("let in", |rig| matches!(rig.hello(&feeder.hello()), Welcome::Accepted { .. }));
    rig.ship(&mut feeder);
    assert_eq!(answer(&mut rig, seq), 1 << (70_000 / STEP));
    let step = 70_000 / STEP * STEP;
    feeder.record(RecordKind::SyncWrite, 0, step as u64, STEP as u64, image[step..step + STEP].to_vec());
    for slot in [0, 1] {
        feeder.sync_mark(RecordKind::SyncEnd, slot, 1, true);
    }
    feeder.seal(100);
    rig.ship_more(&mut feeder);
    let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).expect("complete").seq;
    let exports = rig.view("look", point, false);
    assert!(rig.read(exports[0].key, 0, SIZE as usize) == image);
    rig.target.close_view(&mut rig.io, "look", false).expect("closes");
    // A restart names the seed again, which is long taken.
    rig.die(true);
    rig.target.seed(disk(0).id, "/other/brought.img");
    rig.open();
    assert!(matches!(rig.hello(&feeder.hello()), Welcome::Accepted { .. }));
}

#[test]
fn a_seed_that_is_not_there_keeps_sources_out_and_says_so() {
    let mut rig = Rig::plain(9);
    rig.die(false);
    rig.config = TargetConfig { root: "/other".into(), ..config() };
    rig.target = Target::new(7, rig.config.clone()).expect("good settings");
    rig.target.seed(disk(1).id, "/other/missing.img");
    rig.open();
    let feeder = Feeder::new(1, 1, Predecessor::default());
    match rig.hello(&feeder.hello()) {
        Welcome::Refused { reason: Refusal::Unable, message } => {
            assert!(message.contains("`seed_path` of disk `disk1` is `/other/missing.img`"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    rig.world.put_file(rig.node, "/other/missing.img", &[5; 4096]);
    rig.until("let in", |rig| matches!(rig.hello(&feeder.hello()), Welcome::Accepted { .. }));
}

#[test]
fn questions_are_answered_after_a_failed_journal_has_been_read_back() {
    let (mut rig, mut feeder, mut model) = begun(9, 3600 * SECOND);
    scribble(&mut feeder, &mut model, &mut Dice(9), 20);
    feeder.seal(10);
    rig.ship_more(&mut feeder);
    let path = rig.world.paths(rig.node, ROOT).into_iter().find(|path| path.ends_with(".seg")).unwrap();
    rig.world.fail(rig.node, &path, Fault::Write, Errno::IO, 1);
    feeder.write(0, 0, vec![7; 512]);
    let (record, payload) = feeder.records.last().expect("just made").clone();
    model.note(&record, &payload);
    feeder.seal(1);
    rig.send_from(&feeder, feeder.acked.0);
    rig.until("stopped", |rig| rig.broken);
    rig.run_for(3 * SECOND);
    rig.ship(&mut feeder);
    let seq = ask(&mut feeder, 0, 0, &now(&model, 0));
    feeder.seal(1);
    rig.ship_more(&mut feeder);
    assert_eq!(answer(&mut rig, seq), 0);
}
