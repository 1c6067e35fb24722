//! A process dies at any moment; the next one is given the memory in which requests under way are marked.

use std::sync::Arc;

use afterimage_dataplane::io::guest::Map;
use afterimage_dataplane::vhost::message::Command;
use afterimage_dataplane::vhost::proto::{kind, status};
use afterimage_dataplane::vhost::{Outcome, Reply};

use crate::bed::{ALL, Bed, Layout, MemDisk, Sent, pattern};

/// Asks for memory for requests under way, as whoever runs a guest does at the first connection.
fn track(bed: &mut Bed, queues: u16, size: u16) {
    let outcome = bed.command(Command::GetInflight { queues, size });
    let Outcome::Reply(Reply::Inflight { len, file, .. }) = outcome else { panic!("{outcome:?}") };
    use std::os::fd::AsFd;
    let map = Arc::new(Map::new(file.as_fd(), 0, len).unwrap());
    bed.inflight = Some(Arc::clone(&map));
    bed.ok(Command::SetInflight { queues, size, map });
}

fn bed(seed: u64, late: bool) -> Bed {
    let mut disk = MemDisk::new(4 << 20);
    disk.late = late;
    let mut bed = Bed::with(seed, disk, ALL, 0, 32);
    track(&mut bed, 2, 32);
    bed.add_rings(2, 32);
    bed
}

#[test]
fn requests_under_way_are_done_again_in_their_order_and_answered_once() {
    let mut bed = bed(1, false);
    let plain = Layout::default();
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &plain).status, status::OK);
    bed.disk().hold = true;
    let mut sent = Vec::new();
    for number in 0..5u64 {
        sent.push(bed.send(0, kind::OUT, 10 + number, &pattern(number, 512), 0, &plain));
    }
    bed.kick(0);
    bed.settle();
    assert!(bed.next_end(0).is_none());
    // Two more that nobody has looked at yet.
    sent.push(bed.send(0, kind::OUT, 20, &pattern(20, 512), 0, &plain));
    bed.disk().writes.clear();
    bed.restart();
    bed.settle();
    let order: Vec<u64> = bed.disk().writes.iter().map(|(offset, _)| offset / 512).collect();
    assert_eq!(order, [10, 11, 12, 13, 14, 20]);
    assert_eq!(bed.server.counters().again, 5);
    for sent in sent {
        assert_eq!(bed.wait(&sent).status, status::OK);
    }
    bed.settle();
    assert!(bed.next_end(0).is_none(), "each has ended once");
}

#[test]
fn deaths_at_any_moment_lose_double_and_reorder_nothing() {
    for seed in 0..60 {
        let mut bed = bed(seed, true);
        let mut model = vec![0u8; 4 << 20];
        let mut sent: Vec<(Sent, u64, Vec<u8>)> = Vec::new();
        for round in 0..40u64 {
            for _ in 0..bed.rng.below(6) {
                let queue = bed.rng.below(2) as usize;
                if bed.rings[queue].avail.wrapping_sub(bed.rings[queue].seen) >= 10 {
                    continue;
                }
                // One sector for each that is under way: what overlaps is the driver's to order.
                let sector = bed.rng.below(64);
                if sent.iter().any(|(_, other, _)| *other == sector) {
                    continue;
                }
                let data = pattern(seed << 32 | round << 8 | sector, 512);
                let layout = Layout { indirect: bed.rng.below(2) == 0, ..Layout::default() };
                sent.push((bed.send(queue, kind::OUT, sector, &data, 0, &layout), sector, data));
                bed.kick(queue);
            }
            for _ in 0..bed.rng.below(12) {
                bed.step();
            }
            let dies = bed.rng.below(4) == 0;
            if dies {
                bed.restart();
            }
            collect(&mut bed, &mut sent, &mut model);
        }
        for _ in 0..2_000 {
            collect(&mut bed, &mut sent, &mut model);
            if sent.is_empty() || !bed.step() {
                break;
            }
        }
        assert!(sent.is_empty(), "seed {seed}: {} requests were lost", sent.len());
        assert!(bed.disk().data == model, "seed {seed}");
    }
}

/// Takes what has ended: once each, and on the disk.
fn collect(bed: &mut Bed, sent: &mut Vec<(Sent, u64, Vec<u8>)>, model: &mut [u8]) {
    for queue in 0..2 {
        while let Some((head, len)) = bed.next_end(queue) {
            let found = sent.iter().position(|(s, ..)| s.queue == queue && s.head == head);
            let (request, sector, data) = sent.remove(found.expect("what ends was under way"));
            assert_eq!(bed.result(&request, len).status, status::OK);
            let at = sector as usize * 512;
            assert!(bed.disk().data[at..at + 512] == data[..], "what has ended is on the disk");
            model[at..at + 512].copy_from_slice(&data);
        }
    }
}

#[test]
fn a_disk_that_goes_away_leaves_its_requests_to_the_next_process() {
    let mut bed = bed(3, false);
    bed.disk().hold = true;
    let sent = bed.send(0, kind::OUT, 1, &pattern(1, 512), 0, &Layout::default());
    bed.kick(0);
    bed.settle();
    // As a core does that lets a disk go: every request hears of it, no guest does.
    for answer in &mut bed.disk().waiting {
        answer.result = Err(afterimage_dataplane::io::Errno::SHUTDOWN);
    }
    bed.disk().hold = false;
    bed.wake();
    bed.settle();
    assert!(bed.next_end(0).is_none());
    assert!(matches!(bed.command(Command::GetFeatures), Outcome::Gone));
    bed.restart();
    assert_eq!(bed.wait(&sent).status, status::OK);
}
