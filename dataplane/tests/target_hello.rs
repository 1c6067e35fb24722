//! Who may write: the table of hellos, and fences.

mod target_rig;

use afterimage_dataplane::seal::PolicyKey;
use afterimage_dataplane::target::Choice;
use afterimage_wire::control::{Control, StopReason};
use afterimage_wire::handshake::{Hello, Refusal, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::segment::Predecessor;
use target_rig::*;

fn reason(welcome: Welcome) -> Refusal {
    match welcome {
        Welcome::Refused { reason, .. } => reason,
        accepted => panic!("{accepted:?}"),
    }
}

fn whole(welcome: Welcome) -> bool {
    match welcome {
        Welcome::Accepted { whole_resync, .. } => whole_resync,
        refused => panic!("{refused:?}"),
    }
}

fn descendant(tag: u8, of: &Feeder, first_seq: u64) -> Feeder {
    let predecessor = Predecessor { incarnation: of.incarnation, frame: of.acked.0, seq: of.acked.1 };
    Feeder::new(tag, first_seq, predecessor)
}

fn shipped() -> (Rig, Feeder, Model) {
    let mut rig = Rig::plain(1);
    let mut first = Feeder::new(1, 1, Predecessor::default());
    let mut model = Model::default();
    first.join_and_sync(1);
    scribble(&mut first, &mut model, &mut Dice(1), 30);
    first.seal(5);
    rig.ship(&mut first);
    (rig, first, model)
}

#[test]
fn a_claim_that_makes_no_sense_is_refused_by_name() {
    let mut rig = Rig::plain(1);
    let feeder = Feeder::new(1, 1, Predecessor::default());
    let good = feeder.hello();
    type Change = fn(&mut Hello);
    let table: [(Change, Refusal); 9] = [
        (|hello| hello.version = 9, Refusal::Version { known: 1 }),
        (|hello| hello.stream = StreamId([8; 16]), Refusal::UnknownStream),
        (|hello| hello.disks[0].generation = 0, Refusal::Fenced { disk: DiskId([1; 16]), generation: 1 }),
        (|hello| hello.disks[0].generation = 2, Refusal::BadClaim),
        (|hello| hello.disks[0].disk.size -= 512, Refusal::BadClaim),
        (|hello| hello.disks[0].disk.slot = 5, Refusal::BadClaim),
        (|hello| hello.disks[0].disk.id = DiskId([77; 16]), Refusal::BadClaim),
        (|hello| hello.disks.clear(), Refusal::BadClaim),
        (|hello| hello.connection = 1, Refusal::BadClaim),
    ];
    for (number, (change, refusal)) in table.into_iter().enumerate() {
        let mut hello = good.clone();
        change(&mut hello);
        assert_eq!(reason(rig.hello(&hello)), refusal, "case {number}");
    }
    let mut hello = good.clone();
    let foreign = PolicyKey::new(PolicyKeyId([4; 16]), [6; 32]);
    hello.key = foreign.wrap(hello.incarnation, &feeder.key, [0; 12]);
    assert_eq!(reason(rig.hello(&hello)), Refusal::BadClaim);
    assert!(whole(rig.hello(&good)), "a target that holds nothing wants everything");
}

#[test]
fn a_successor_of_what_is_held_owes_only_what_is_in_doubt() {
    let (mut rig, first, mut model) = shipped();
    let mut second = descendant(2, &first, 1000);
    let (position, whole) = rig.connect(&second);
    assert!(!whole);
    assert_eq!((position.incarnation, position.seq), (first.incarnation, first.next_seq - 1));
    scribble(&mut second, &mut model, &mut Dice(2), 20);
    second.seal(4);
    rig.ship_more(&mut second);
    rig.check(&model, second.next_seq - 1);
    rig.check(&model, first.next_seq - 1);
    // A number between the writers means the newest record before it.
    let point = rig.target.resolve(&mut rig.io, stream_id(), Choice::Seq(800)).unwrap();
    assert_eq!(point.seq, first.next_seq - 1);
    rig.restart(true);
    rig.check(&model, second.next_seq - 1);
    // The old writer, and one that descends from it, are branches now.
    assert_eq!(reason(rig.hello(&first.hello())), Refusal::Branch);
    let branch = descendant(3, &first, 5000);
    assert_eq!(reason(rig.hello(&branch.hello())), Refusal::Branch);
}

#[test]
fn a_target_that_lacks_what_it_acknowledged_wants_everything() {
    let (mut rig, mut first, _) = shipped();
    first.acked = (first.acked.0 + 1, first.acked.1 + 9);
    assert!(whole(rig.hello(&descendant(2, &first, 1000).hello())));
}

#[test]
fn a_source_without_its_log_begins_above_and_sends_everything() {
    let (mut rig, first, _) = shipped();
    let newest = first.next_seq - 1;
    let lost = Feeder::new(2, 1, Predecessor::default());
    assert_eq!(reason(rig.hello(&lost.hello())), Refusal::SeqBehind { newest });
    assert!(whole(rig.hello(&Feeder::new(3, newest + 1, Predecessor::default()).hello())));
    let unknown = Predecessor { incarnation: IncarnationId([99; 16]), frame: 5, seq: 5 };
    assert!(whole(rig.hello(&Feeder::new(4, newest + 1, unknown).hello())));
}

#[test]
fn a_successor_of_one_that_was_welcome_and_sent_nothing_owes_what_it_owed() {
    let (mut rig, first, _) = shipped();
    let silent = descendant(2, &first, 1000);
    assert!(!whole(rig.hello(&silent.hello())));
    assert!(!whole(rig.hello(&descendant(3, &silent, 2000).hello())));
}

#[test]
fn a_writer_that_lost_what_it_sent_is_a_branch() {
    let (mut rig, first, _) = shipped();
    let mut hello = first.hello();
    hello.next_frame = 3;
    assert_eq!(reason(rig.hello(&hello)), Refusal::Branch);
}

#[test]
fn a_fence_ends_the_connection_and_outlives_a_restart() {
    let (mut rig, mut first, mut model) = shipped();
    scribble(&mut first, &mut model, &mut Dice(2), 30);
    first.seal(2);
    rig.send_from(&first, first.acked.0);
    for _ in 0..10 {
        rig.step();
    }
    let generation = rig.target.raise_generation(&mut rig.io, stream_id(), &[], "failover").unwrap();
    assert_eq!(generation, 2);
    let before = rig.acked();
    rig.until("stopped", |rig| rig.broken);
    assert_eq!(rig.acked(), before, "nothing is acknowledged behind a fence");
    assert_eq!(rig.messages.last(), Some(&Control::Stop { reason: StopReason::Fenced, value: 2 }));
    let fenced = Refusal::Fenced { disk: DiskId([1; 16]), generation: 2 };
    assert_eq!(reason(rig.hello(&first.hello())), fenced);
    rig.restart(true);
    assert_eq!(reason(rig.hello(&first.hello())), fenced);
    let second = rig.target.raise_generation(&mut rig.io, stream_id(), &[DiskId([2; 16])], "again").unwrap();
    assert_eq!(second, 3);
    let generations: Vec<u64> = rig.target.status()[0].disks.iter().map(|disk| disk.generation).collect();
    assert_eq!(generations, [2, 3]);
    let latest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap();
    assert!(latest.seq >= before.1);
    rig.check(&model, latest.seq);
}

#[test]
fn a_fence_between_hello_and_attach_is_told_sealed() {
    let (mut rig, first, _) = shipped();
    let hello = first.hello();
    assert!(matches!(rig.hello(&hello), Welcome::Accepted { .. }));
    rig.target.raise_generation(&mut rig.io, stream_id(), &[], "failover").unwrap();
    rig.attach(&hello);
    rig.until("stopped", |rig| rig.broken);
    assert_eq!(rig.messages.last(), Some(&Control::Stop { reason: StopReason::Fenced, value: 2 }));
}
