//! Fences as the target keeps them, and what it may claim of a synchronous source.

mod target_rig;

use afterimage_dataplane::io::Io;
use afterimage_dataplane::target::Choice;
use afterimage_wire::control::{Control, StopReason};
use afterimage_wire::handshake::{Refusal, Welcome};
use afterimage_wire::ids::DiskId;
use afterimage_wire::segment::Predecessor;
use target_rig::*;

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

fn zero_loss(rig: &Rig) -> bool {
    rig.target.zero_loss(stream_id(), rig.io.since_boot())
}

#[test]
fn a_generation_set_by_the_coordinator_ends_a_connection_below_it() {
    let (mut rig, mut first, model) = shipped();
    let mut config = stream_config(3600 * SECOND);
    config.disks[1].1 = 4;
    rig.target.open_stream(&mut rig.io, config).expect("taken over");
    let before = rig.acked();
    scribble(&mut first, &mut model.clone(), &mut Dice(3), 5);
    first.seal(5);
    rig.send_from(&first, first.acked.0);
    rig.until("stopped", |rig| rig.broken);
    assert_eq!(rig.messages.last(), Some(&Control::Stop { reason: StopReason::Fenced, value: 4 }));
    assert_eq!(rig.acked(), before, "a stale source adds nothing");
    let refused = rig.hello(&first.hello());
    let fenced = Refusal::Fenced { disk: DiskId([2; 16]), generation: 4 };
    assert!(matches!(refused, Welcome::Refused { reason, .. } if reason == fenced));
    // One that does not claim that disk goes on.
    let mut hello = first.hello();
    hello.disks.truncate(1);
    assert!(matches!(rig.hello(&hello), Welcome::Accepted { .. }));
    let fences = &rig.target.status()[0].fences;
    assert_eq!((fences.len(), fences[0].generation, &fences[0].disks[..]), (1, 4, &[DiskId([2; 16])][..]));
}

#[test]
fn a_fence_names_its_place_and_what_was_under_way_lies_behind_it() {
    let (mut rig, mut first, mut model) = shipped();
    scribble(&mut first, &mut model, &mut Dice(2), 40);
    first.seal(2);
    rig.send_from(&first, first.acked.0);
    for _ in 0..12 {
        rig.step();
    }
    let durable = rig.target.status()[0].durable_seq;
    rig.target.raise_generation(&mut rig.io, stream_id(), &[], "failover").unwrap();
    let acked = rig.acked();
    rig.until("stopped", |rig| rig.broken);
    rig.run_for(SECOND);
    let status = rig.target.status().remove(0);
    assert_eq!(rig.acked(), acked);
    assert_eq!((status.fences[0].seq, status.fences[0].incarnation), (durable, first.incarnation));
    assert_eq!((status.fences[0].generation, status.fences[0].reason.as_str()), (2, "failover"));
    assert!(!status.fences[0].zero_loss, "an asynchronous source promises nothing");
    // The losing branch can be looked at like any other place, also after a power loss.
    let newest = rig.target.resolve(&mut rig.io, stream_id(), Choice::Latest).unwrap().seq;
    assert!(newest >= durable);
    rig.check(&model, newest);
    rig.check(&model, durable);
    rig.restart(true);
    let again = rig.target.status().remove(0);
    assert_eq!(again.fences, status.fences);
    rig.check(&model, again.fences[0].seq);
}

#[test]
fn zero_loss_is_claimed_while_the_source_is_known_to_hold_its_answers() {
    let (mut rig, mut first, mut model) = shipped();
    assert!(!zero_loss(&rig));
    first.sync_ms = 2000;
    scribble(&mut first, &mut model, &mut Dice(4), 3);
    first.seal(5);
    rig.ship_more(&mut first);
    // The frame names the acknowledgement before it.
    assert!(zero_loss(&rig));
    rig.run_for(900_000_000);
    assert!(zero_loss(&rig));
    rig.run_for(200_000_000);
    assert!(!zero_loss(&rig), "the source may have parted by now");

    scribble(&mut first, &mut model, &mut Dice(5), 3);
    first.seal(5);
    rig.ship_more(&mut first);
    // It names an acknowledgement that was sent more than a second ago.
    assert!(!zero_loss(&rig));
    scribble(&mut first, &mut model, &mut Dice(6), 3);
    first.seal(5);
    rig.ship_more(&mut first);
    assert!(zero_loss(&rig));
    let generation = rig.target.raise_generation(&mut rig.io, stream_id(), &[], "failover").unwrap();
    let status = rig.target.status().remove(0);
    assert!(status.fences.iter().any(|fence| fence.generation == generation && fence.zero_loss));
}

#[test]
fn a_source_that_has_parted_says_so_and_a_restarted_target_claims_nothing() {
    let (mut rig, mut first, mut model) = shipped();
    first.sync_ms = 10_000;
    scribble(&mut first, &mut model, &mut Dice(4), 3);
    first.seal(5);
    rig.ship_more(&mut first);
    assert!(zero_loss(&rig) && rig.target.status()[0].synchronous);
    first.sync_ms = 0;
    scribble(&mut first, &mut model, &mut Dice(5), 3);
    first.seal(5);
    rig.ship_more(&mut first);
    assert!(!zero_loss(&rig) && !rig.target.status()[0].synchronous);

    first.sync_ms = 10_000;
    scribble(&mut first, &mut model, &mut Dice(6), 3);
    first.seal(5);
    rig.ship_more(&mut first);
    assert!(zero_loss(&rig));
    rig.restart(false);
    assert!(!zero_loss(&rig));
}
