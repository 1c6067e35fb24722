//! Restore points and views of a target against a model.

mod target_rig;

use afterimage_dataplane::host::Request;
use afterimage_dataplane::io::Io;
use afterimage_dataplane::io::sim::WorldConfig;
use afterimage_dataplane::target::{Choice, TargetConfig};
use afterimage_wire::segment::Predecessor;
use target_rig::*;

fn filled(seed: u64) -> (Rig, Feeder, Model) {
    let mut rig = Rig::plain(seed);
    let mut feeder = Feeder::new(1, 1, Predecessor::default());
    let mut model = Model::default();
    feeder.join_and_sync(1);
    feeder.seal(100);
    scribble(&mut feeder, &mut model, &mut Dice(seed), 120);
    feeder.seal(7);
    rig.ship(&mut feeder);
    (rig, feeder, model)
}

#[test]
fn every_single_write_is_a_point() {
    let (mut rig, feeder, model) = filled(1);
    for seq in 8..feeder.next_seq {
        rig.check(&model, seq);
    }
    let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
    assert_eq!((latest.seq, latest.complete), (feeder.next_seq - 1, true));
    rig.restart(false);
    for seq in 8..feeder.next_seq {
        rig.check(&model, seq);
    }
}

/// A front end may ask after the turn of a round: whoever sleeps until the deadline must not sleep over it.
#[test]
fn what_a_view_is_asked_wants_a_turn_at_once() {
    let (mut rig, feeder, _) = filled(2);
    let exports = rig.view("failover", feeder.next_seq - 1, true);
    rig.run_for(SECOND);
    let data = rig.write_request(0, &[7; 4096], false);
    for request in [Request::Read { offset: 0, len: 4096 }, data, Request::Flush] {
        let cookie = rig.ask(exports[0].key, request);
        let due = rig.target.deadline();
        assert!(due.is_some_and(|due| due <= rig.io.now()), "{due:?}");
        rig.answer(cookie).unwrap();
    }
}

#[test]
fn unaligned_reads_are_right() {
    let (mut rig, feeder, model) = filled(2);
    let seq = feeder.next_seq - 1;
    let exports = rig.view("v", seq, false);
    let want = model.at(1, seq);
    let mut dice = Dice(5);
    for _ in 0..100 {
        let offset = dice.roll(SIZE - 1);
        let len = 1 + dice.roll((SIZE - offset).min(70_000)) as usize;
        let got = rig.read(exports[1].key, offset, len);
        assert!(got == want[offset as usize..offset as usize + len], "{len} bytes at {offset}");
    }
}

#[test]
fn a_delta_is_read_back_and_survives_restarts() {
    let (mut rig, feeder, model) = filled(3);
    let seq = feeder.next_seq - 10;
    let mut want = [model.at(0, seq), model.at(1, seq)];
    let mut dice = Dice(77);
    for life in 0..3 {
        let exports = rig.view("failover", seq, true);
        assert_eq!(exports[0].name, "failover/disk0");
        for _ in 0..60 {
            let disk = dice.roll(2) as usize;
            let offset = dice.roll(SIZE - 1);
            let len = 1 + dice.roll((SIZE - offset).min(30_000));
            let range = offset as usize..(offset + len) as usize;
            if dice.roll(5) == 0 {
                let request = Request::Zero { offset, len, unmap: true, fast_only: false, fua: false };
                let cookie = rig.ask(exports[disk].key, request);
                rig.answer(cookie).unwrap();
                want[disk][range].fill(0);
            } else {
                let bytes = dice.bytes(len as usize);
                rig.write(exports[disk].key, offset, &bytes, dice.roll(4) == 0);
                want[disk][range].copy_from_slice(&bytes);
            }
        }
        for (disk, export) in exports.iter().enumerate() {
            assert!(rig.read(export.key, 0, SIZE as usize) == want[disk], "life {life}");
        }
        let cookie = rig.ask(exports[0].key, Request::Flush);
        rig.answer(cookie).unwrap();
        // What was flushed survives power loss; what was answered, the death of the process.
        rig.restart(life == 1);
    }
    let exports = rig.view("failover", seq, true);
    for (disk, export) in exports.iter().enumerate() {
        assert!(rig.read(export.key, 0, SIZE as usize) == want[disk]);
    }
    // The source's history is as it was.
    rig.check(&model, feeder.next_seq - 1);
    rig.target.close_view(&mut rig.io, "failover", false).unwrap();
    let left = rig.world.paths(rig.node, ROOT).into_iter().filter(|path| path.ends_with(".seg")).count();
    assert_eq!(left, 1, "the delta's segments are gone");
}

#[test]
fn overlapping_writes_in_flight_apply_in_the_order_asked() {
    let (mut rig, feeder, _) = filled(4);
    let exports = rig.view("f", feeder.next_seq - 1, true);
    let mut cookies = Vec::new();
    for round in 0..40u8 {
        let request = rig.write_request(u64::from(round) * 100, &[round + 1; 5000], false);
        cookies.push(rig.ask(exports[0].key, request));
    }
    for cookie in cookies {
        rig.answer(cookie).unwrap();
    }
    let got = rig.read(exports[0].key, 0, 40 * 100 + 4900);
    for (at, byte) in got.iter().enumerate() {
        assert_eq!(*byte, (at / 100).min(39) as u8 + 1, "byte {at}");
    }
}

#[test]
fn what_a_machine_overwrites_gives_its_room_back() {
    for seed in 0..4u64 {
        let config = TargetConfig { index_bytes: 1 << 20, ..config() };
        let mut rig = Rig::new(seed, WorldConfig::default(), config, 3600 * SECOND);
        let mut feeder = Feeder::new(1, 1, Predecessor::default());
        feeder.join_and_sync(1);
        feeder.seal(100);
        rig.ship(&mut feeder);
        let seq = feeder.next_seq - 1;
        let mut dice = Dice(seed);
        let mut want = vec![0; SIZE as usize];
        let mut exports = rig.view("failover", seq, true);
        // What was written since the last that is known to be durable, and the state before.
        let (mut base, mut open): (Vec<u8>, Vec<(u64, Vec<u8>)>) = (want.clone(), Vec::new());
        for round in 0..10 {
            for number in 0..460 {
                let (offset, bytes) = if number % 8 == 0 {
                    let offset = dice.roll(SIZE / 4096) * 4096;
                    let len = ((1 + dice.roll(17)) * 4096).min(SIZE - offset);
                    (offset, (0..len).map(|_| dice.roll(256) as u8).collect::<Vec<u8>>())
                } else {
                    // Many small ones, so that the index grows.
                    (dice.roll(SIZE / 16) / 512 * 512, vec![dice.roll(256) as u8; 64])
                };
                let fua = dice.roll(40) == 0;
                rig.write(exports[0].key, offset, &bytes, fua);
                want[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                open.push((offset, bytes));
                if fua {
                    (base, open) = (want.clone(), Vec::new());
                }
            }
            assert!(rig.read(exports[0].key, 0, SIZE as usize) == want, "seed {seed} round {round}");
            if round % 4 == 2 {
                rig.restart(seed % 2 == 0);
                exports = rig.view("failover", seq, true);
                let found = rig.read(exports[0].key, 0, SIZE as usize);
                if seed % 2 == 0 {
                    // Power loss: a prefix of what was written, with everything that was durable.
                    let mut state = base.clone();
                    let mut left = open.iter();
                    while state != found {
                        let (offset, bytes) = left.next().expect("no prefix of what was written");
                        state[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                    want = found;
                }
                assert!(rig.read(exports[0].key, 0, SIZE as usize) == want, "seed {seed} round {round}");
                (base, open) = (want.clone(), Vec::new());
            }
        }
        let numbers = rig.world.paths(rig.node, ROOT);
        let timeline = rig.target.status()[0].views[0].timeline.to_string();
        let first = numbers.iter().find(|path| path.contains(&timeline)).unwrap();
        assert!(!first.ends_with("-0000000000000001.seg"), "{first}");
    }
}
