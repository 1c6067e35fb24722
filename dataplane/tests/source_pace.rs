//! When frames may leave: hours, bandwidth.

#[path = "source/bed.rs"]
#[allow(dead_code)]
mod bed;

use afterimage_dataplane::io::sim::{Rng, WorldConfig};
use afterimage_dataplane::source::{Pace, ProtectError, SourceLimits};
use bed::{Bed, MS, STREAM};

fn paced(bed: &mut Bed, pace: Pace) {
    bed.source.set_pace(&mut bed.io, STREAM, pace).expect("allowed");
}

/// Writes that do not compress.
fn write(bed: &mut Bed, rng: &mut Rng, bytes: u64) {
    let mut block = vec![0; 64 << 10];
    for at in 0..bytes / (64 << 10) {
        rng.fill(&mut block);
        bed.write(0, (at % 128) * (64 << 10), &block).expect("written");
    }
}

#[test]
fn outside_the_hours_nothing_leaves_and_no_write_is_lost() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.acked();
    paced(&mut bed, Pace { closed: true, ..Pace::default() });
    let before = (bed.status().sent_seq, bed.status().wire_bytes);
    write(&mut bed, &mut Rng::new(1), 1 << 20);
    // Longer than a silent link is kept: it stays up all the same.
    bed.pass(30_000 * MS);
    let links = bed.links();
    assert_eq!(bed.status().sent_seq, before.0);
    assert!(bed.status().rpo_now >= 29_000 * MS, "the RPO tells it: {}", bed.status().rpo_now);
    paced(&mut bed, Pace::default());
    bed.acked();
    bed.assert_equal();
    assert_eq!(bed.links(), links);
}

#[test]
fn what_outruns_the_queue_outside_the_hours_is_resynchronised_inside() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.acked();
    paced(&mut bed, Pace { closed: true, ..Pace::default() });
    let mut rng = Rng::new(2);
    let begun = bed.world.now();
    for _ in 0..3 {
        write(&mut bed, &mut rng, 8 << 20);
    }
    assert!(bed.world.now() - begun < 60_000 * MS, "hosts do not wait for the hour");
    paced(&mut bed, Pace::default());
    bed.until("protected", |bed| bed.is_protected());
    bed.until("quiet", |bed| bed.status().acked_seq == bed.status().captured_seq);
    bed.assert_equal();
}

#[test]
fn a_pause_outlasts_a_hold_and_what_was_written_meanwhile_is_sent_once() {
    let limits = SourceLimits { queue_bytes: 32 << 20, ..SourceLimits::default() };
    let mut bed = Bed::new(6, 1, WorldConfig::default(), limits);
    bed.ready();
    bed.acked();
    paced(&mut bed, Pace { paused: true, ..Pace::default() });
    bed.pass(100 * MS);
    let before = (bed.status().acked_seq, bed.status().wire_bytes);
    let begun = bed.world.now();
    write(&mut bed, &mut Rng::new(6), 8 << 20);
    assert!(bed.world.now() - begun < 10_000 * MS, "hosts do not notice");
    // A failover that takes its disks from it gets what the target holds, and no more.
    bed.source.fence(&mut bed.io, STREAM, true);
    bed.pass(5_000 * MS);
    bed.source.fence(&mut bed.io, STREAM, false);
    assert_eq!((bed.status().acked_seq, bed.status().sent_seq), (before.0, before.0));
    paced(&mut bed, Pace::default());
    bed.acked();
    bed.assert_equal();
    let sent = bed.status().wire_bytes - before.1;
    assert!(sent <= (8 << 20) * 105 / 100, "{sent} bytes were sent for 8 MiB");
}

#[test]
fn a_bandwidth_is_kept_and_changed_while_the_group_runs() {
    let limits = SourceLimits { queue_bytes: 32 << 20, ..SourceLimits::default() };
    let mut bed = Bed::new(3, 1, WorldConfig::default(), limits);
    bed.ready();
    bed.acked();
    let spent = |bed: &mut Bed, rate: u64| {
        paced(bed, Pace { rate, ..Pace::default() });
        let begun = bed.world.now();
        write(bed, &mut Rng::new(rate), 4 << 20);
        bed.acked();
        bed.world.now() - begun
    };
    let slow = spent(&mut bed, 512 << 10);
    assert!((7_000 * MS..=9_500 * MS).contains(&slow), "4 MiB at 512 KiB/s: {} ms", slow / MS);
    let faster = spent(&mut bed, 2 << 20);
    assert!((1_500 * MS..=3_000 * MS).contains(&faster), "4 MiB at 2 MiB/s: {} ms", faster / MS);
    assert!(spent(&mut bed, 0) < 1_500 * MS);
    bed.assert_equal();
    let refused = bed.source.set_pace(&mut bed.io, STREAM, Pace { rate: 1, ..Pace::default() });
    assert!(matches!(refused, Err(ProtectError::Value { field: "rate", .. })));
}

#[test]
fn a_failover_does_not_wait_for_an_hour_or_a_bandwidth() {
    let mut bed = Bed::usual(1);
    bed.ready();
    bed.acked();
    paced(&mut bed, Pace { closed: true, rate: 64 << 10, ..Pace::default() });
    write(&mut bed, &mut Rng::new(4), 2 << 20);
    bed.pass(1_000 * MS);
    assert!(bed.status().acked_seq < bed.status().captured_seq);
    let begun = bed.world.now();
    bed.source.fence(&mut bed.io, STREAM, true);
    bed.acked();
    assert!(bed.world.now() - begun < 2_000 * MS);
    bed.source.fence(&mut bed.io, STREAM, false);
    write(&mut bed, &mut Rng::new(5), 64 << 10);
    bed.pass(2_000 * MS);
    assert!(bed.status().acked_seq < bed.status().captured_seq, "and it counts again afterwards");
}
