//! What holds a source: fences, leases, synchronous mode; and disks that leave their stream.

#[allow(dead_code)]
#[path = "source/bed.rs"]
mod bed;

use afterimage_dataplane::host::Disks;
use afterimage_dataplane::source::{GroupState, HoldReason, SourceEvent};
use afterimage_wire::handshake::Refusal;
use afterimage_wire::ids::DiskId;
use afterimage_wire::record::RecordKind;
use bed::{Bed, MS, STREAM};

const FIRST: DiskId = DiskId([1; 16]);
const SECOND: DiskId = DiskId([2; 16]);

fn fenced(bed: &mut Bed) -> bool {
    bed.events.iter().any(|event| matches!(event, SourceEvent::Fenced { .. }))
}

fn is_together(bed: &mut Bed) -> bool {
    bed.status().synchronous.is_some_and(|s| s.together)
}

/// A synchronous source that has begun to hold its answers.
fn together(deadline: u64) -> Bed {
    let mut bed = Bed::usual(1);
    bed.sync_deadline = deadline;
    bed.ready();
    bed.until("together", is_together);
    bed
}

fn ask_write(bed: &mut Bed, disk: usize, offset: u64, byte: u8) -> u64 {
    let request = bed.write_request(offset, &[byte; 4096], false);
    bed.ask(disk, request)
}

#[test]
fn a_source_that_was_fenced_steps_down_and_is_given_its_disk_back() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.write(0, 0, &[1; 4096]).expect("written");
    bed.acked();
    bed.refusal = Some(Refusal::Fenced { disk: FIRST, generation: 2 });
    bed.held.mute = true;
    bed.write(0, 4096, &[2; 4096]).expect("written: nobody has told it yet");
    bed.cut();
    bed.until("fenced", fenced);
    assert_eq!(bed.status().state, GroupState::Fenced { generation: 2 });
    assert_eq!(bed.status().held, Some(HoldReason::SteppedDown));
    let held = ask_write(&mut bed, 0, 8192, 3);
    bed.pass(3000 * MS);
    assert!(!bed.has_answer(held), "the machine may run elsewhere");
    assert_eq!(bed.disk(0)[8192], 0, "nothing is written either");
    assert!(bed.log_bits(0).contains(&0), "what the target does not hold is on the map");

    // A generation that does not reach the fence changes nothing.
    bed.refusal = None;
    bed.held.mute = false;
    bed.source.set_generations(&mut bed.io, STREAM, &[(FIRST, 1)]);
    bed.pass(1000 * MS);
    assert!(!bed.has_answer(held));

    let before = bed.held.records.len();
    bed.source.set_generations(&mut bed.io, STREAM, &[(FIRST, 3)]);
    bed.answer(held).expect("written");
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.held.hellos.last().expect("said").disks[0].generation, 3);
    let begins = bed.held.records[before..].iter().filter(|r| r.kind == RecordKind::SyncWrite);
    assert!(begins.map(|r| u64::from(r.len)).sum::<u64>() <= 4 << 20, "what was in doubt, not everything");
}

#[test]
fn a_source_that_stepped_down_stays_down_over_a_restart() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.refusal = Some(Refusal::Fenced { disk: FIRST, generation: 5 });
    bed.cut();
    bed.until("fenced", fenced);
    bed.pass(500 * MS);
    bed.world.crash(bed.node);
    bed.refusal = None;
    bed.restart();
    let held = ask_write(&mut bed, 0, 0, 9);
    bed.pass(3000 * MS);
    assert!(!bed.has_answer(held) && bed.held.hellos.len() == 1, "it does not even ask");
    assert_eq!(bed.disk(0)[0], 0);
    bed.generation = 6;
    bed.world.crash(bed.node);
    bed.restart();
    bed.write(0, 0, &[8; 4096]).expect("a new generation");
}

#[test]
fn a_refusal_of_what_was_claimed_before_does_not_take_a_disk_that_was_given_since() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.write(0, 0, &[1; 4096]).expect("written");
    bed.acked();
    bed.world.crash(bed.node);
    (bed.refuse_claims, bed.gives_meanwhile) = (Some((FIRST, 3)), Some((FIRST, 3)));
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    assert!(!fenced(&mut bed));
    bed.write(0, 4096, &[2; 4096]).expect("its disk is its own");
    bed.acked();
    bed.assert_equal();
    let claims: Vec<u64> = bed.held.hellos.iter().map(|hello| hello.disks[0].generation).collect();
    assert_eq!(claims, [1, 3], "the claim that was refused is made again, as it is now");
}

#[test]
fn the_other_disks_of_a_group_go_on_without_the_fenced_one() {
    let mut bed = Bed::usual(2);
    bed.ready();
    // Under way when the fence comes: it must not arrive in the stream any more.
    bed.held.mute = true;
    let late = ask_write(&mut bed, 1, 12288, 7);
    bed.refuse_claims = Some((SECOND, 4));
    bed.cut();
    bed.until("fenced", fenced);
    bed.held.mute = false;
    let before = bed.held.records.len();
    let held = ask_write(&mut bed, 1, 0, 5);
    bed.write(0, 8192, &[6; 4096]).expect("not fenced");
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.pass(1000 * MS);
    assert!(!bed.has_answer(held));
    assert!(bed.status().rpo_now >= 1000 * MS, "what the fenced disk holds more is in no point");
    let _ = late;
    let new = &bed.held.records[before..];
    assert!(new.iter().any(|r| r.kind == RecordKind::Leave && r.disk == 1));
    let leave = new.iter().position(|r| r.kind == RecordKind::Leave && r.disk == 1).expect("just seen");
    assert!(new[leave + 1..].iter().all(|r| r.disk != 1), "nothing of the fenced disk behind its leave");
    assert_eq!(bed.held.hellos.last().expect("said").disks.len(), 1);
    assert!(bed.disk(0)[..] == bed.held.images[&0][..]);

    bed.refuse_claims = None;
    bed.source.set_generations(&mut bed.io, STREAM, &[(FIRST, 1), (SECOND, 5)]);
    bed.answer(held).expect("written");
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
}

#[test]
fn without_a_word_for_the_time_of_its_lease_nothing_is_answered() {
    let mut bed = Bed::usual(1);
    bed.lease = 4000 * MS;
    bed.ready();
    // Idle for long: cuts and their acknowledgements renew it.
    bed.pass(20_000 * MS);
    bed.write(0, 0, &[1; 4096]).expect("written");
    bed.held.mute = true;
    bed.unreachable = true;
    let silent = bed.world.now();
    let mut last = silent;
    while bed.world.now() < silent + 8000 * MS {
        let cookie = ask_write(&mut bed, 0, 4096, 2);
        bed.pass(10 * MS);
        if bed.has_answer(cookie) {
            last = bed.world.now();
        }
    }
    assert!(last <= silent + 4100 * MS, "answered {} ms after the last word", (last - silent) / MS);
    assert!(last >= silent + 2000 * MS, "while the lease lasts, hosts are served");
    assert_eq!(bed.status().held, Some(HoldReason::Lease));
    let read = bed.ask(0, afterimage_dataplane::host::Request::Read { offset: 0, len: 4096 });
    bed.pass(500 * MS);
    assert!(!bed.has_answer(read), "a machine that may run elsewhere gets no answer at all");

    bed.held.mute = false;
    bed.unreachable = false;
    bed.cut();
    bed.answer(read).expect("read");
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.status().held, None);
}

#[test]
fn a_word_of_the_coordinator_counts_from_when_it_was_asked_for() {
    let mut bed = Bed::usual(1);
    bed.lease = 3000 * MS;
    bed.unreachable = true;
    bed.protect().expect("the disk is there");
    let cookie = ask_write(&mut bed, 0, 0, 1);
    bed.pass(2000 * MS);
    assert!(!bed.has_answer(cookie), "no word yet");
    // Asked long ago: it has run out already.
    let now = bed.world.now();
    bed.pass(4000 * MS);
    bed.source.confirm(&mut bed.io, STREAM, now);
    bed.pass(100 * MS);
    assert!(!bed.has_answer(cookie));
    let now = bed.world.now();
    bed.source.confirm(&mut bed.io, STREAM, now);
    bed.answer(cookie).expect("written");
}

#[test]
fn a_lease_goes_on_over_a_restart_within_one_boot_and_not_over_a_reboot() {
    let mut bed = Bed::usual(1);
    bed.lease = 20_000 * MS;
    bed.ready();
    bed.pass(8000 * MS);
    bed.world.crash(bed.node);
    bed.unreachable = true;
    bed.restart();
    bed.write(0, 0, &[1; 4096]).expect("what is left of the lease");
    bed.until("the end", |bed| bed.status().held == Some(HoldReason::Lease));

    bed.unreachable = false;
    bed.until("a word", |bed| bed.status().held.is_none());
    bed.pass(8000 * MS);
    bed.unreachable = true;
    bed.world.power_loss(bed.node);
    bed.restart();
    let cookie = ask_write(&mut bed, 0, 4096, 2);
    bed.pass(3000 * MS);
    assert!(!bed.has_answer(cookie), "another boot: the generation must be confirmed first");
    // Dying and coming back does not make it so.
    bed.world.crash(bed.node);
    bed.restart();
    let cookie = ask_write(&mut bed, 0, 4096, 2);
    bed.pass(3000 * MS);
    assert!(!bed.has_answer(cookie));
    bed.unreachable = false;
    bed.answer(cookie).expect("confirmed");
}

#[test]
fn a_synchronous_answer_comes_when_the_target_holds_the_write() {
    let mut bed = together(2000 * MS);
    for round in 0..50u64 {
        let cookie = ask_write(&mut bed, 0, round * 4096, round as u8 + 1);
        while !bed.has_answer(cookie) {
            bed.step();
        }
        let held = &bed.held.images[&0][(round * 4096) as usize..][..4096];
        assert!(held.iter().all(|b| *b == round as u8 + 1), "answered before the target held it");
    }
    assert!(bed.held.promises.last().is_some_and(|ms| *ms == 2000));
}

#[test]
fn a_synchronous_write_waits_for_its_deadline_at_most_and_nothing_is_promised_then() {
    let mut bed = together(1000 * MS);
    bed.held.mute = true;
    let asked = bed.world.now();
    let cookie = ask_write(&mut bed, 0, 0, 1);
    bed.answer(cookie).expect("written");
    let took = bed.world.now() - asked;
    assert!((500 * MS..=1050 * MS).contains(&took), "{} ms", took / MS);
    let said = bed.status().synchronous.expect("the policy says so");
    assert!(!said.together && said.why.is_some());
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::Synchronous { together: false, .. })));
    let asked = bed.world.now();
    bed.write(0, 4096, &[2; 4096]).expect("asynchronous now");
    assert!(bed.world.now() - asked < 100 * MS);
    bed.pass(100 * MS);
    assert_eq!(bed.held.promises.last(), Some(&0));

    bed.held.mute = false;
    bed.until("together", is_together);
}

#[test]
fn a_cut_off_synchronous_source_keeps_its_promise_until_it_is_over() {
    let mut bed = together(2000 * MS);
    bed.write(0, 0, &[1; 4096]).expect("written");
    bed.acked();
    bed.unreachable = true;
    bed.cut();
    let cut = bed.world.now();
    let cookie = ask_write(&mut bed, 0, 4096, 2);
    bed.answer(cookie).expect("written");
    // The target may claim zero loss until half of the deadline after its last acknowledgement.
    assert!(bed.world.now() - cut >= 900 * MS);
}

#[test]
fn what_a_process_promised_is_kept_by_the_next_one_under_a_shorter_policy() {
    for deadline in [0, 200 * MS] {
        let mut bed = together(2000 * MS);
        bed.write(0, 0, &[1; 4096]).expect("written");
        bed.acked();
        bed.unreachable = true;
        bed.world.crash(bed.node);
        let begun = bed.world.now();
        bed.sync_deadline = deadline;
        bed.restart();
        let cookie = ask_write(&mut bed, 0, 4096, 2);
        bed.answer(cookie).expect("written");
        assert!(bed.world.now() - begun >= 1000 * MS, "{} ms", (bed.world.now() - begun) / MS);
        // From then on its own policy counts, also for the process after it.
        bed.pass(500 * MS);
        bed.world.crash(bed.node);
        let begun = bed.world.now();
        bed.restart();
        let cookie = ask_write(&mut bed, 0, 8192, 3);
        bed.answer(cookie).expect("written");
        let took = bed.world.now() - begun;
        assert!(took < deadline / 2 + 300 * MS, "{} ms", took / MS);
    }
}

#[test]
fn a_policy_made_asynchronous_lets_everybody_go_whatever_was_waited_for() {
    // Before the target has accepted this writer, while it is being joined, and together.
    for steps in (0..400).step_by(16) {
        let mut bed = Bed::usual(1);
        bed.sync_deadline = 2000 * MS;
        bed.protect().expect("the disks are there");
        for _ in 0..steps {
            bed.step();
        }
        let waits = ask_write(&mut bed, 0, 0, 1);
        bed.source.set_waiting(&mut bed.io, STREAM, 0, 0).expect("allowed");
        let asked = bed.world.now();
        bed.answer(waits).expect("written");
        bed.write(0, 4096, &[2; 4096]).expect("written");
        assert!(bed.world.now() - asked < 1500 * MS, "after {steps} steps");
    }
}

#[test]
fn a_disk_leaves_and_the_others_go_on() {
    let mut bed = Bed::usual(2);
    bed.ready();
    bed.write(1, 0, &[1; 4096]).expect("written");
    assert!(bed.source.leave(&mut bed.io, STREAM, SECOND));
    bed.until("left", |bed| bed.events.iter().any(|e| matches!(e, SourceEvent::Left { acknowledged: true, .. })));
    assert_eq!(Disks::<afterimage_dataplane::io::sim::SimIo>::exports(&bed.source).len(), 1);
    let leave = bed.held.records.iter().position(|r| r.kind == RecordKind::Leave).expect("said in the stream");
    assert_eq!(bed.held.records[leave].disk, 1);
    bed.write(0, 0, &[2; 4096]).expect("goes on");
    assert_eq!(bed.held.hellos.len(), 1, "on the same connection");
    assert!(!bed.source.leave(&mut bed.io, STREAM, FIRST), "the last one stays");
    bed.cut();
    bed.until("connected", |bed| bed.held.hellos.len() == 2);
    assert_eq!(bed.held.hellos[1].disks.len(), 1);
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    assert!(bed.disk(0)[..] == bed.held.images[&0][..]);
}

#[test]
fn a_leave_that_was_not_acknowledged_is_said_again_by_the_next_incarnation() {
    let mut bed = Bed::usual(2);
    bed.ready();
    bed.unreachable = true;
    bed.cut();
    assert!(bed.source.leave(&mut bed.io, STREAM, SECOND));
    bed.until("left", |bed| bed.events.iter().any(|e| matches!(e, SourceEvent::Left { acknowledged: false, .. })));
    bed.world.crash(bed.node);
    bed.unreachable = false;
    bed.disks = 1;
    bed.left = vec![1];
    bed.restart();
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    assert!(bed.held.records.iter().any(|r| r.kind == RecordKind::Leave && r.disk == 1));
}

#[test]
fn a_target_restored_from_an_old_copy_is_compared_and_not_believed() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.write(0, 0, &[1; 4096]).expect("written");
    bed.acked();
    let (position, images) = (bed.held.position, bed.held.images.clone());
    for round in 0..20u64 {
        bed.write(0, round << 20, &[round as u8 + 2; 4096]).expect("written");
    }
    bed.acked();
    // The copy is of the same writer, and behind what it had acknowledged since.
    bed.held.position = position;
    bed.held.images = images;
    bed.cut();
    bed.until("noticed", |bed| bed.held.hellos.len() > 2);
    bed.until("protected", |bed| bed.is_protected());
    bed.acked();
    bed.assert_equal();
    assert!(bed.events.iter().any(|e| matches!(e, SourceEvent::SyncBegun { whole: true, .. })));
}
