//! Damage to what a target holds: found by reading and by the scrub, named by points and blocks, lived with, mended.

mod target_rig;

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::Errno;
use afterimage_dataplane::io::sim::{Errors, Fault, WorldConfig};
use afterimage_dataplane::target::{Choice, Damage, TargetConfig, TargetEvent};
use afterimage_wire::control::Control;
use afterimage_wire::record::RecordKind;
use afterimage_wire::segment::Predecessor;
use target_rig::*;

const RETENTION: u64 = 3600 * SECOND;

fn begun(seed: u64) -> (Rig, Feeder, Model) {
    let mut rig = Rig::new(seed, WorldConfig::default(), config(), RETENTION);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    (rig, feeder, Model::default())
}

/// Writes of one record each: a frame each.
fn write(rig: &mut Rig, feeder: &mut Feeder, model: &mut Model, slot: u16, offset: u64, bytes: Vec<u8>) -> u64 {
    let seq = feeder.write(slot, offset, bytes);
    for (record, payload) in &feeder.records {
        model.note(record, payload);
    }
    feeder.seal(1);
    rig.ship_more(feeder);
    seq
}

fn noise(tag: u64, len: usize) -> Vec<u8> {
    let mut dice = Dice(tag);
    (0..len).map(|_| dice.roll(256) as u8).collect()
}

fn segments(rig: &Rig) -> Vec<String> {
    rig.world.paths(rig.node, ROOT).into_iter().filter(|path| path.ends_with(".seg")).collect()
}

/// Those that have a head: not one that is only prepared.
fn used_segments(rig: &Rig) -> Vec<String> {
    let has_head = |path: &String| rig.world.file_range(rig.node, path, 0, 4) == Some(b"AISG".into());
    segments(rig).into_iter().filter(has_head).collect()
}

/// Where a frame (from 1) lies in the only segment.
fn at(feeder: &Feeder, frame: usize) -> u64 {
    4096 + feeder.frames[..frame - 1].iter().map(|frame| frame.0.len() as u64).sum::<u64>()
}

fn told(rig: &Rig) -> Vec<Damage> {
    let damage = |event: &TargetEvent| match event {
        TargetEvent::Damaged { damage, .. } => Some(damage.clone()),
        _ => None,
    };
    rig.events.iter().filter_map(damage).collect()
}

fn scrub(rig: &mut Rig) {
    let passes = rig.target.status()[0].scrub.passes;
    rig.target.scrub(&mut rig.io, stream_id()).unwrap();
    rig.until("scrubbed", |rig| {
        let scrub = &rig.target.status()[0].scrub;
        scrub.passes > passes && !scrub.running
    });
    rig.run_for(SECOND);
}

/// What reads of 4 KiB give at a point: the bytes, or that they are lost.
fn blocks(rig: &mut Rig, slot: usize, seq: u64) -> Vec<Option<Vec<u8>>> {
    let exports = rig.view("look", seq, false);
    let read = |rig: &mut Rig, offset| {
        let cookie = rig.ask(exports[slot].key, Request::Read { offset, len: 4096 });
        match rig.answer(cookie) {
            Ok(part) => part.map(|part| part.buf[part.at..part.at + part.len].to_vec()),
            Err(errno) => {
                assert_eq!(errno, Errno::IO);
                None
            }
        }
    };
    let found = (0..SIZE / 4096).map(|block| read(rig, block * 4096)).collect();
    rig.target.close_view(&mut rig.io, "look", false).unwrap();
    found
}

/// All blocks are those of the model but `lost`, which give an error.
fn check_but(rig: &mut Rig, model: &Model, seq: u64, lost: &[u64]) {
    for slot in [0, 1] {
        let want = model.at(slot, seq);
        for (block, found) in blocks(rig, usize::from(slot), seq).into_iter().enumerate() {
            let want = (slot == 1 || !lost.contains(&(block as u64))).then(|| want[block * 4096..][..4096].to_vec());
            assert!(found == want, "block {block} of disk {slot} at {seq}: {:?}", found.map(|bytes| bytes[0]));
        }
    }
}

/// Five writes to disk 0: blocks 0 and 1, 1, 5, and later both 0 and 1 again. The second frame of them is the victim.
fn story(seed: u64) -> (Rig, Feeder, Model, [u64; 5]) {
    let (mut rig, mut feeder, mut model) = begun(seed);
    let places = [(0, 8192), (4096, 4096), (5 * 4096, 4096), (0, 4096), (4096, 4096)];
    let seqs = std::array::from_fn(|number| {
        let (offset, len) = places[number];
        write(&mut rig, &mut feeder, &mut model, 0, offset, noise(seed * 10 + number as u64, len))
    });
    (rig, feeder, model, seqs)
}

#[test]
fn a_scrub_finds_nothing_where_nothing_is_wrong() {
    let (mut rig, mut feeder, mut model) = begun(1);
    for round in 0..4 {
        scribble(&mut feeder, &mut model, &mut Dice(round), 100);
        feeder.seal(9);
        rig.ship_more(&mut feeder);
    }
    scrub(&mut rig);
    assert!(told(&rig).is_empty(), "{:?}", told(&rig));
    let status = rig.target.status()[0].scrub.clone();
    assert_eq!((status.passes, status.bad_frames, status.running), (1, 0, false));
    assert!(status.ended.is_some());
}

#[test]
fn rot_found_by_the_scrub_damages_exactly_the_points_that_need_it() {
    let (mut rig, feeder, model, seqs) = story(2);
    let path = segments(&rig)[0].clone();
    // The write of block 1 is lost: needed from there until block 1 is written again.
    rig.world.rot(rig.node, &path, at(&feeder, 3) + 300, 8);
    scrub(&mut rig);
    let damage = told(&rig);
    assert_eq!(damage.len(), 1, "{damage:?}");
    let blocks: Vec<_> =
        damage[0].blocks.iter().map(|block| (block.slot, block.offset, block.len, block.from)).collect();
    assert_eq!((damage[0].known, blocks), (true, vec![(0, 4096, 4096, seqs[1])]));
    let status = rig.target.status()[0].clone();
    assert_eq!(status.damage[0].blocks[0].until, Some(seqs[4]));
    assert!(status.damage[0].is_mended());
    for life in 0..3 {
        for seq in seqs[0] - 1..=seqs[4] {
            let needs = (seqs[1]..seqs[4]).contains(&seq);
            check_but(&mut rig, &model, seq, if needs { &[1] } else { &[] });
            let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(seq)).unwrap();
            assert_eq!((point.complete, point.damage.is_some()), (true, needs), "life {life}: {point:?}");
            if needs {
                let text = point.damage.unwrap();
                assert!(text.contains("4096 bytes at 4096"), "{text}");
            }
        }
        // A restart knows as much, and no whole synchronisation is asked for.
        rig.restart(life == 1);
        let (_, whole) = rig.connect(&feeder);
        assert!(!whole);
    }
}

#[test]
fn what_a_reader_cannot_open_is_looked_at_again_and_named() {
    let (mut rig, feeder, model, seqs) = story(3);
    let path = segments(&rig)[0].clone();
    rig.world.rot(rig.node, &path, at(&feeder, 4) + 300, 8);
    check_but(&mut rig, &model, seqs[4], &[5]);
    rig.until("named", |rig| !told(rig).is_empty());
    let block = told(&rig)[0].blocks[0].clone();
    assert_eq!((block.offset, block.len, block.from, block.until), (5 * 4096, 4096, seqs[2], None));
    let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
    assert!(latest.damage.is_some());
    assert!(rig.target.status()[0].disks[0].damaged && !rig.target.status()[0].disks[1].damaged);
    // The source is asked for it: now, and after it comes back.
    let want = Control::Want { disk: 0, offset: 5 * 4096, len: 4096 };
    rig.until("asked", |rig| rig.messages.contains(&want));
    rig.connect(&feeder);
    rig.until("asked again", |rig| rig.messages.contains(&want));
    rig.messages.clear();
    rig.run_for(5 * SECOND);
    assert!(!rig.messages.contains(&want), "but not all the time");
}

#[test]
fn newer_data_mends_the_newest_state() {
    let (mut rig, mut feeder, mut model, seqs) = story(4);
    let path = segments(&rig)[0].clone();
    rig.world.rot(rig.node, &path, at(&feeder, 4) + 300, 8);
    scrub(&mut rig);
    assert!(!rig.target.status()[0].damage[0].is_mended());
    let seq = write(&mut rig, &mut feeder, &mut model, 0, 5 * 4096, noise(1, 4096));
    rig.run_for(SECOND);
    let damage = rig.target.status()[0].damage.clone();
    assert!(rig.events.iter().any(|event| matches!(event, TargetEvent::Mended { .. })));
    assert_eq!(damage[0].blocks[0].until, Some(seq));
    rig.check(&model, seq);
    check_but(&mut rig, &model, seqs[4], &[5]);
    assert!(!rig.target.status()[0].disks[0].damaged);
}

#[test]
fn an_unreadable_sector_costs_what_lies_in_it() {
    for restart in [false, true] {
        let (mut rig, feeder, model, seqs) = story(5);
        let path = segments(&rig)[0].clone();
        if restart {
            rig.die(false);
        }
        // Reads of the whole window fail, later ones of single blocks do not: nothing is lost.
        rig.world.fail(rig.node, &path, Fault::Read, Errno::IO, 2);
        if restart {
            rig.open();
        } else {
            scrub(&mut rig);
        }
        assert!(told(&rig).is_empty(), "{:?}", told(&rig));
        rig.check(&model, seqs[4]);
        rig.connect(&feeder);
    }
}

#[test]
fn what_cannot_be_read_for_a_while_is_not_lost() {
    for fails in [1, 3] {
        let (mut rig, _, model, seqs) = story(7);
        rig.world.errors(rig.node, Errors { read: 1.0, ..Errors::default() });
        for _ in 0..fails {
            let found = blocks(&mut rig, 0, seqs[2]);
            assert!([0, 1, 5].iter().all(|block| found[*block].is_none()), "nothing can be read");
            rig.until("named", |rig| told(rig).len() >= 3);
            rig.run_for(SECOND);
        }
        let damage = rig.target.status()[0].damage.clone();
        assert!(damage.iter().any(|damage| damage.blocks.iter().any(|block| block.offset == 5 * 4096)), "{damage:?}");
        rig.world.errors(rig.node, Errors::default());
        rig.until("taken back", |rig| rig.target.status()[0].damage.is_empty());
        let back = rig.events.iter().filter(|event| matches!(event, TargetEvent::Regained { .. })).count();
        assert_eq!(back, damage.len());
        for seq in seqs {
            rig.check(&model, seq);
            assert_eq!(rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(seq)).unwrap().damage, None);
        }
        rig.restart(fails == 1);
        assert!(told(&rig).is_empty());
        rig.check(&model, seqs[2]);
    }
}

#[test]
fn rot_stays_lost_when_it_is_looked_at_again_and_costs_less_and_less() {
    let (mut rig, feeder, model, seqs) = story(8);
    let path = segments(&rig)[0].clone();
    rig.world.rot(rig.node, &path, at(&feeder, 4) + 300, 8);
    scrub(&mut rig);
    // Nobody is there to be asked for it.
    rig.restart(false);
    let deadline = |rig: &Rig| rig.target.deadline().expect("it is looked at again") - rig.world.now();
    rig.run_for(100 * SECOND);
    assert!(deadline(&rig) > 10 * SECOND, "{}", deadline(&rig));
    assert_eq!((told(&rig).len(), rig.target.status()[0].damage.len()), (1, 1));
    check_but(&mut rig, &model, seqs[4], &[5]);
}

#[test]
fn what_cannot_be_read_for_a_while_is_not_folded_as_unknown() {
    let mut rig = Rig::new(9, WorldConfig::default(), config(), 16 * SECOND);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    let mut model = Model::default();
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    let seq = write(&mut rig, &mut feeder, &mut model, 0, 4096, noise(2, 4096));
    for round in 0..5 {
        feeder.mono += 3 * SECOND;
        write(&mut rig, &mut feeder, &mut model, 1, 0, noise(round, 4096));
    }
    assert_eq!(rig.target.status()[0].floor, 0, "the next write makes the oldest segment old enough");
    rig.world.errors(rig.node, Errors { read: 1.0, ..Errors::default() });
    blocks(&mut rig, 0, seq);
    rig.until("named", |rig| !told(rig).is_empty());
    rig.world.errors(rig.node, Errors::default());
    for round in 0..6 {
        feeder.mono += 3 * SECOND;
        write(&mut rig, &mut feeder, &mut model, 1, 0, noise(round, 4096));
    }
    rig.until("folded", |rig| rig.target.status()[0].floor > seq);
    rig.run_for(3 * SECOND);
    rig.check(&model, feeder.next_seq - 1);
    assert!(rig.target.status()[0].damage.is_empty());
}

#[test]
fn lost_chunks_are_folded_as_unknown_bytes() {
    for crash in 0..6 {
        let config = TargetConfig { segment_bytes: 8 << 20, ..config() };
        let mut rig = Rig::new(6, WorldConfig::default(), config, 16 * SECOND);
        let mut feeder = Feeder::new(1, 1, Predecessor::default());
        let mut model = Model::default();
        feeder.join_and_sync(1);
        feeder.seal(100);
        rig.ship(&mut feeder);
        write(&mut rig, &mut feeder, &mut model, 0, 0, noise(1, 8192));
        let lost = write(&mut rig, &mut feeder, &mut model, 0, 4096, noise(2, 4096));
        write(&mut rig, &mut feeder, &mut model, 0, 9 * 4096, noise(3, 4096));
        let path = segments(&rig)[0].clone();
        rig.world.rot(rig.node, &path, at(&feeder, 3) + 300, 8);
        if crash % 2 == 0 {
            scrub(&mut rig);
        }
        // Folding goes on in either case: it has the frame looked at when it cannot be opened.
        for round in 0..20 {
            feeder.mono += 2 * SECOND;
            write(&mut rig, &mut feeder, &mut model, 1, 0, noise(round, 4096));
            if crash > 1 && round == 8 + crash {
                for _ in 0..crash * 7 {
                    rig.step();
                }
                rig.restart(crash > 3);
                rig.ship(&mut feeder);
            }
        }
        rig.run_for(5 * SECOND);
        rig.until("folded", |rig| rig.target.status()[0].floor > lost + 3);
        let newest = feeder.next_seq - 1;
        check_but(&mut rig, &model, newest, &[1]);
        rig.restart(crash == 5);
        check_but(&mut rig, &model, newest, &[1]);
        let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
        assert!(latest.damage.is_some(), "crash {crash}");
        // Written again, it is good, and once that is folded nobody speaks of it any more.
        rig.ship(&mut feeder);
        let mended = write(&mut rig, &mut feeder, &mut model, 0, 4096, noise(4, 4096));
        rig.check(&model, mended);
        for round in 0..20 {
            feeder.mono += 2 * SECOND;
            write(&mut rig, &mut feeder, &mut model, 1, 0, noise(round, 4096));
        }
        rig.until("folded again", |rig| rig.target.status()[0].floor > mended);
        rig.run_for(SECOND);
        assert!(rig.target.status()[0].damage.is_empty(), "{:?}", rig.target.status()[0].damage);
        rig.restart(false);
        assert!(told(&rig).is_empty());
        let newest = feeder.next_seq - 1;
        rig.check(&model, newest);
    }
}

#[test]
fn a_segment_without_a_head_is_opened_with_its_neighbours_key() {
    for last in [false, true] {
        let (mut rig, mut feeder, mut model) = begun(7);
        let mut dice = Dice(7);
        // Two segments and a part of a third.
        while segments(&rig).len() < 4 {
            write(&mut rig, &mut feeder, &mut model, 0, dice.roll(32) * 4096, noise(dice.roll(1000), 32 * 4096));
        }
        for _ in 0..3 {
            write(&mut rig, &mut feeder, &mut model, 1, dice.roll(32) * 4096, noise(dice.roll(1000), 4096));
        }
        let used = used_segments(&rig);
        assert!(used.len() >= 3, "{used:?}");
        let victim = if last { used.last() } else { used.get(1) }.unwrap().clone();
        rig.world.rot(rig.node, &victim, 0, 4096);
        rig.restart(false);
        let (position, whole) = rig.connect(&feeder);
        assert_eq!((position.frame, whole), (feeder.frames.len() as u64, false), "{:?}", told(&rig));
        assert!(told(&rig).is_empty());
        rig.check(&model, feeder.next_seq - 1);
        rig.check(&model, feeder.next_seq / 2);
        write(&mut rig, &mut feeder, &mut model, 1, 0, noise(1, 4096));
        rig.check(&model, feeder.next_seq - 1);
    }
}

/// The last segment of a writer has no head, and another writer follows, whose head says how far the first had come.
#[test]
fn a_segment_without_a_head_before_the_next_writer_is_not_missed() {
    let (mut rig, mut feeder, mut model) = begun(8);
    let mut dice = Dice(8);
    while segments(&rig).len() < 3 {
        write(&mut rig, &mut feeder, &mut model, 0, dice.roll(32) * 4096, noise(dice.roll(1000), 32 * 4096));
    }
    for _ in 0..3 {
        write(&mut rig, &mut feeder, &mut model, 1, dice.roll(32) * 4096, noise(dice.roll(1000), 4096));
    }
    let victim = used_segments(&rig).pop().unwrap();
    let (frame, seq) = feeder.acked;
    let mut next = Feeder::new(2, seq + 2, Predecessor { incarnation: feeder.incarnation, frame, seq });
    next.join_and_sync(2);
    for (record, payload) in &next.records {
        model.note(record, payload);
    }
    next.seal(100);
    rig.ship(&mut next);
    rig.world.rot(rig.node, &victim, 0, 4096);
    // And the one before it has not been cut to its length: something follows its last frame.
    rig.die(false);
    let first = segments(&rig)[0].clone();
    let mut bytes = rig.world.file(rig.node, &first).unwrap();
    bytes.resize(bytes.len() + 65536, 0);
    rig.world.put_file(rig.node, &first, &bytes);
    rig.open();
    assert!(told(&rig).is_empty(), "{:?}", told(&rig));
    for power in [false, true] {
        rig.restart(power);
        assert!(told(&rig).is_empty(), "{:?}", told(&rig));
        rig.check(&model, seq);
        rig.check(&model, next.next_seq - 1);
    }
}

#[test]
fn a_journal_that_failed_is_read_back_and_goes_on_by_itself() {
    for seed in 0..6 {
        let (mut rig, mut feeder, mut model) = begun(20 + seed);
        scribble(&mut feeder, &mut model, &mut Dice(seed), 30);
        feeder.seal(3);
        rig.ship_more(&mut feeder);
        let exports = rig.view("held", feeder.next_seq - 1, false);
        let held = model.at(0, feeder.next_seq - 1);
        let path = segments(&rig)[0].clone();
        rig.world.fail(rig.node, &path, Fault::Write, Errno::IO, 1);
        scribble(&mut feeder, &mut model, &mut Dice(seed + 1), 60);
        feeder.seal(1);
        rig.events.clear();
        rig.send_from(&feeder, feeder.acked.0);
        rig.until("stopped", |rig| rig.broken);
        let acked = rig.acked().max(feeder.acked);
        // What is held stays readable meanwhile.
        assert!(rig.read(exports[0].key, 0, SIZE as usize) == held);
        rig.until("read back", |rig| rig.events.contains(&TargetEvent::Ready { stream: stream_id() }));
        assert!(told(&rig).is_empty(), "{:?}", told(&rig));
        assert!(rig.target.status()[0].durable_frame >= acked.0);
        assert!(rig.read(exports[0].key, 0, SIZE as usize) == held);
        let (position, whole) = rig.connect(&feeder);
        assert!(position.frame >= acked.0 && !whole);
        feeder.acked = (position.frame, position.seq);
        rig.ship(&mut feeder);
        rig.check(&model, feeder.next_seq - 1);
        rig.check(&model, acked.1);
        rig.restart(seed % 2 == 0);
        rig.check(&model, feeder.next_seq - 1);
    }
}

#[test]
fn a_delta_whose_flush_failed_is_read_back_and_goes_on() {
    let (mut rig, feeder, ..) = story(8);
    let exports = rig.view("failover", feeder.next_seq - 1, true);
    rig.write(exports[0].key, 0, &noise(1, 4096), true);
    rig.write(exports[0].key, 4096, &noise(2, 4096), false);
    let stream = segments(&rig);
    let timeline = rig.target.status()[0].views[0].timeline.to_string();
    let path = stream.into_iter().find(|path| path.contains(&timeline)).unwrap();
    rig.world.fail(rig.node, &path, Fault::Sync, Errno::IO, 1);
    let cookie = rig.ask(exports[0].key, Request::Flush);
    assert_eq!(rig.answer(cookie).unwrap_err(), Errno::IO);
    rig.run_for(3 * SECOND);
    assert_eq!(rig.target.status()[0].views[0].failed, None);
    rig.write(exports[0].key, 8192, &noise(3, 4096), true);
    for life in 0..2 {
        let exports = rig.view("failover", feeder.next_seq - 1, true);
        assert!(rig.read(exports[0].key, 0, 4096) == noise(1, 4096));
        assert!(rig.read(exports[0].key, 8192, 4096) == noise(3, 4096));
        rig.restart(life == 0);
    }
}

#[test]
fn a_full_file_system_shortens_history_before_it_stops_the_stream() {
    let mut rig = Rig::new(9, WorldConfig::default(), config(), RETENTION);
    rig.world.set_space(rig.node, 40 << 20);
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
    assert!(status.shortened.is_some() && status.folded_segments > 0, "{status:?}");
    assert_eq!(rig.events.iter().filter(|event| matches!(event, TargetEvent::Shortened { .. })).count(), 1);
    rig.check(&model, status.floor);
    rig.check(&model, feeder.next_seq - 1);
}

/// A synchronisation begun before a loss was found compared blocks that could still be read, and did not send them.
#[test]
fn a_synchronisation_before_a_loss_was_found_does_not_make_it_good() {
    for crash in 0..8 {
        let config = TargetConfig { segment_bytes: 8 << 20, ..config() };
        let mut rig = Rig::new(30 + crash, WorldConfig::default(), config, 40 * SECOND);
        let mut feeder = Feeder::new(1, 1, Predecessor::default());
        let mut model = Model::default();
        feeder.join_and_sync(1);
        feeder.seal(100);
        rig.ship(&mut feeder);
        let good = write(&mut rig, &mut feeder, &mut model, 0, 0, noise(1, 8192));
        write(&mut rig, &mut feeder, &mut model, 0, 4096, noise(2, 4096));
        write(&mut rig, &mut feeder, &mut model, 0, 9 * 4096, noise(3, 4096));
        let path = segments(&rig)[0].clone();
        // Its header goes: nothing of it is known to a reader that has not seen it before.
        rig.world.rot(rig.node, &path, at(&feeder, 3), 200);
        // Found equal everywhere.
        let mark = |rig: &mut Rig, feeder: &mut Feeder, kind, sync, whole| {
            let seqs = [0, 1].map(|slot| feeder.sync_mark(kind, slot, sync, whole));
            feeder.seal(9);
            rig.ship_more(feeder);
            seqs[1]
        };
        let complete = |rig: &mut Rig, seq| {
            let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(seq)).unwrap();
            assert!(point.complete == point.damage.is_none(), "{point:?}");
            point.complete
        };
        mark(&mut rig, &mut feeder, RecordKind::SyncBegin, 2, true);
        let early = mark(&mut rig, &mut feeder, RecordKind::SyncEnd, 2, true);
        let open = mark(&mut rig, &mut feeder, RecordKind::SyncBegin, 3, true);
        assert!(complete(&mut rig, early));
        rig.restart(crash % 2 == 0);
        assert_eq!(told(&rig).len(), 1, "{:?}", told(&rig));
        assert!(complete(&mut rig, good) && !complete(&mut rig, early) && !complete(&mut rig, open));
        let (_, whole) = rig.connect(&feeder);
        assert!(whole, "one that was open when the loss was found is not believed either");
        let late = mark(&mut rig, &mut feeder, RecordKind::SyncEnd, 3, true);
        assert!(!complete(&mut rig, late));
        // One begun after it sends what is missing.
        mark(&mut rig, &mut feeder, RecordKind::SyncBegin, 4, true);
        for slot in [0, 1] {
            let bytes = model.at(slot, feeder.next_seq - 1);
            feeder.record(RecordKind::SyncWrite, slot, 0, SIZE, bytes);
        }
        let healed = mark(&mut rig, &mut feeder, RecordKind::SyncEnd, 4, true);
        // Later starts find the loss again, and know that it has been made good since; also once it has been folded.
        for life in 0..4 {
            assert!(complete(&mut rig, healed), "crash {crash} life {life}");
            rig.check(&model, healed);
            if rig.target.status()[0].floor < late {
                assert!(!complete(&mut rig, late), "crash {crash} life {life}");
            }
            rig.restart(crash % 4 < 2);
            let (_, whole) = rig.connect(&feeder);
            assert!(!whole, "crash {crash} life {life}");
        }
        for round in 0..30 {
            feeder.mono += 2 * SECOND;
            write(&mut rig, &mut feeder, &mut model, 1, 0, noise(round, 4096));
            if crash >= 4 && round % 8 == crash {
                rig.restart(crash % 2 == 0);
                rig.ship(&mut feeder);
            }
            let newest = feeder.next_seq - 1;
            assert!(complete(&mut rig, newest), "crash {crash} round {round}");
            let floor = rig.target.status()[0].floor;
            if floor >= good {
                let held = complete(&mut rig, floor);
                assert_eq!(held, floor == good || floor >= healed, "crash {crash} round {round} floor {floor}");
            }
        }
        rig.run_for(5 * SECOND);
        rig.until("folded", |rig| rig.target.status()[0].floor > healed);
        rig.run_for(5 * SECOND);
        assert!(rig.target.status()[0].damage.is_empty(), "{:?}", rig.target.status()[0].damage);
        rig.check(&model, feeder.next_seq - 1);
    }
}

/// The oldest segment has lost its head, and no neighbour's key opens it: it is one loss, and goes when it has been folded.
#[test]
fn an_oldest_segment_without_a_head_is_given_up_in_the_end() {
    let config = TargetConfig { segment_bytes: 8 << 20, ..config() };
    let mut rig = Rig::new(9, WorldConfig::default(), config, 20 * SECOND);
    let (mut feeder, mut model) = (Feeder::new(1, 1, Predecessor::default()), Model::default());
    feeder.join_and_sync(1);
    feeder.seal(100);
    rig.ship(&mut feeder);
    write(&mut rig, &mut feeder, &mut model, 0, 0, noise(1, 8192));
    let (frame, seq) = feeder.acked;
    let victim = segments(&rig)[0].clone();
    let mut next = Feeder::new(2, seq + 2, Predecessor { incarnation: feeder.incarnation, frame, seq });
    rig.world.rot(rig.node, &victim, 0, 8192);
    let sync = |rig: &mut Rig, next: &mut Feeder, model: &mut Model| {
        next.join_and_sync(next.next_seq);
        for slot in [0, 1] {
            next.record(RecordKind::SyncWrite, slot, 0, SIZE, model.at(slot, u64::MAX));
        }
        for (record, payload) in &next.records {
            model.note(record, payload);
        }
        next.seal(100);
        rig.ship(next);
    };
    sync(&mut rig, &mut next, &mut model);
    rig.restart(false);
    assert_eq!(told(&rig).len(), 1, "{:?}", told(&rig));
    let (_, whole) = rig.connect(&next);
    assert!(whole);
    sync(&mut rig, &mut next, &mut model);
    let healed = next.next_seq - 1;
    for round in 0..60 {
        next.mono += SECOND;
        write(&mut rig, &mut next, &mut model, 1, 0, noise(round, 65536));
        if round % 6 == 5 {
            rig.restart(round % 12 == 5);
            let (_, whole) = rig.connect(&next);
            assert!(!whole, "round {round}");
        }
        let newest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
        assert!(newest.seq >= healed && newest.damage.is_none(), "round {round}: {newest:?}");
    }
    rig.run_for(5 * SECOND);
    assert!(rig.target.status()[0].floor > healed, "{:?}", rig.target.status()[0]);
    rig.restart(false);
    assert!(told(&rig).is_empty() && !segments(&rig).contains(&victim), "{:?}", told(&rig));
    rig.check(&model, next.next_seq - 1);
}

/// A target that was put back to an older copy of its disk lacks what it had acknowledged. It says so when the next
/// writer comes, says it again at each start, and takes what that writer synchronised for good.
#[test]
fn what_an_older_copy_of_a_target_lacks_is_known_and_made_good_once() {
    // Whether the segment was cut to its length, or kept its prepared end, after the copy was put back.
    for (seed, power) in [(50, false), (51, true)] {
        let (mut rig, mut feeder, mut model) = begun(seed);
        let kept = write(&mut rig, &mut feeder, &mut model, 0, 0, noise(1, 8192));
        let frames = feeder.acked.0;
        let copy = rig.world.snapshot(rig.node);
        for block in 0..4 {
            write(&mut rig, &mut feeder, &mut model, 0, block * 4096, noise(2 + block, 4096));
        }
        rig.put_back(&copy);
        let (lost_frame, lost_seq) = feeder.acked;
        let predecessor = Predecessor { incarnation: feeder.incarnation, frame: lost_frame, seq: lost_seq };
        let mut next = Feeder::new(2, feeder.next_seq + 1000, predecessor);
        // Welcomed twice: it is one loss.
        for _ in 0..2 {
            let (_, whole) = rig.connect(&next);
            assert!(whole);
            rig.tick();
        }
        let place = |damage: &Damage| (damage.first_frame, damage.last_frame, damage.first_seq, damage.found_at);
        let want = (frames + 1, lost_frame, kept + 1, kept);
        assert_eq!(told(&rig).iter().map(place).collect::<Vec<_>>(), [want]);
        for slot in [0, 1] {
            next.sync_mark(RecordKind::SyncBegin, slot, 2, true);
            next.record(RecordKind::SyncWrite, slot, 0, SIZE, model.at(slot, lost_seq));
            next.sync_mark(RecordKind::SyncEnd, slot, 2, true);
        }
        let half = next.next_seq - 2;
        let healed = next.next_seq - 1;
        next.seal(9);
        rig.ship(&mut next);
        for life in 0..3 {
            let complete = |rig: &mut Rig, seq| {
                let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(seq)).unwrap();
                assert!(point.complete == point.damage.is_none(), "{point:?}");
                point.complete
            };
            assert!(complete(&mut rig, kept) && !complete(&mut rig, half), "life {life}");
            assert!(complete(&mut rig, healed), "life {life}");
            rig.check(&model, healed);
            rig.restart(power);
            assert_eq!(told(&rig).iter().map(place).collect::<Vec<_>>(), [want], "life {life}");
            let (_, whole) = rig.connect(&next);
            assert!(!whole, "life {life}");
        }
    }
}

/// A frame proves a loss that lies more than one read before it.
#[test]
fn a_loss_that_is_proved_far_behind_it_is_gone_on_from_where_it_ends() {
    let (mut rig, mut feeder, mut model) = begun(60);
    let good = write(&mut rig, &mut feeder, &mut model, 0, 0, noise(1, 4096));
    let lost = feeder.acked.0 + 1;
    // All sealed before the first of them is acknowledged: none says of another that it is safe.
    for round in 0..40 {
        feeder.write(0, 0, noise(2 + round, 128 << 10));
    }
    for (record, payload) in &feeder.records {
        model.note(record, payload);
    }
    feeder.seal(1);
    rig.ship_more(&mut feeder);
    let last = write(&mut rig, &mut feeder, &mut model, 0, 0, noise(99, 4096));
    let path = segments(&rig)[0].clone();
    assert!(at(&feeder, feeder.frames.len()) - at(&feeder, lost as usize) > 4 << 20, "more than one read");
    rig.world.rot(rig.node, &path, at(&feeder, lost as usize), 200);
    rig.restart(true);
    let found: Vec<_> = told(&rig).iter().map(|damage| (damage.first_frame, damage.last_frame)).collect();
    assert_eq!(found, [(lost, lost)]);
    rig.check(&model, good);
    let status = rig.target.status()[0].clone();
    assert_eq!(status.durable_seq, last, "all that follows is there");
}

/// What was lost told that the disks are in the stream: nobody knows of them, and whoever comes next says the whole again.
#[test]
fn a_stream_that_lost_the_joins_of_its_disks_asks_for_the_whole() {
    let (mut rig, mut feeder, mut model) = begun(61);
    write(&mut rig, &mut feeder, &mut model, 0, 0, noise(1, 4096));
    // Its header says that all before it is safe.
    write(&mut rig, &mut feeder, &mut model, 0, 4096, noise(2, 4096));
    let path = segments(&rig)[0].clone();
    rig.world.rot(rig.node, &path, at(&feeder, 1), 200);
    rig.restart(true);
    let found: Vec<_> = told(&rig).iter().map(|damage| (damage.first_frame, damage.known)).collect();
    assert_eq!(found, [(1, false)]);
    let (_, whole) = rig.connect(&feeder);
    assert!(whole, "the writer itself");
    let (frame, seq) = feeder.acked;
    let mut next = Feeder::new(2, seq + 1, Predecessor { incarnation: feeder.incarnation, frame, seq });
    let (_, whole) = rig.connect(&next);
    assert!(whole, "its successor");
    next.join_and_sync(2);
    next.seal(100);
    rig.ship(&mut next);
    rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).expect("a point again");
    let (_, whole) = rig.connect(&next);
    assert!(!whole, "once is enough");
}
