//! Guests that keep to no rules: the request fails or the queue stops, and everybody else goes on.

use afterimage_dataplane::vhost::proto::{kind, status};

use crate::bed::{ALL, Bed, Desc, GUEST, INDIRECT, Layout, MEMORY, MemDisk, NEXT, WRITE};

/// Header and status at fixed places in the guest's memory.
const HEAD: u64 = (4 << 20) + 4096;
const STATUS: u64 = (4 << 20) + 8192;
const DATA: u64 = (5 << 20) + 512;

fn desc(at: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr: GUEST + at, len, flags, next }
}

/// Offers the list that begins with descriptor 0. What became of it: the status, or none if the queue has stopped.
fn offer(kind: u32, descs: &[Desc], table: Option<(&[Desc], u64)>) -> Option<u8> {
    let mut bed = Bed::with(9, MemDisk::new(1 << 20), ALL, 2, 64);
    let mut head = kind.to_le_bytes().to_vec();
    head.extend_from_slice(&[0; 12]);
    bed.poke(HEAD, &head);
    bed.poke(STATUS, &[0xcc]);
    for (index, desc) in descs.iter().enumerate() {
        bed.put_desc(bed.rings[0].desc(), index as u16, *desc);
    }
    if let Some((inner, at)) = table {
        for (index, desc) in inner.iter().enumerate() {
            bed.put_desc(at, index as u16, *desc);
        }
    }
    bed.offer(0, 0);
    bed.kick(0);
    bed.settle();
    let stopped = bed.server.counters().nonsense;
    let ended = bed.next_end(0).is_some();
    assert_eq!(ended, stopped == 0, "a request ends, or its queue has stopped");
    let result = ended.then(|| bed.peek(STATUS, 1)[0]);
    // Another queue of the same device goes on.
    let sent = bed.send(1, kind::FLUSH, 0, &[], 0, &Layout::default());
    bed.kick(1);
    assert_eq!(bed.wait(&sent).status, status::OK);
    assert!(bed.disk().writes.is_empty());
    result
}

#[test]
fn descriptors_that_lie_fail_their_request_where_it_has_a_status() {
    let failed = Some(status::IOERR);
    let head = desc(HEAD, 16, NEXT, 1);
    let end = desc(STATUS, 1, WRITE, 0);
    let three =
        |middle: Desc| offer(kind::IN, &[head, Desc { flags: middle.flags | NEXT, next: 2, ..middle }, end], None);
    // Outside of the memory, in every way.
    assert_eq!(three(desc(MEMORY, 512, WRITE, 0)), failed);
    assert_eq!(three(desc(MEMORY - 511, 512, WRITE, 0)), failed);
    assert_eq!(three(Desc { addr: 0, len: 512, flags: WRITE, next: 0 }), failed);
    assert_eq!(three(Desc { addr: u64::MAX - 5, len: 512, flags: WRITE, next: 0 }), failed);
    assert_eq!(three(Desc { addr: GUEST, len: u32::MAX, flags: WRITE, next: 0 }), failed);
    // Empty; in the wrong order.
    assert_eq!(three(desc(DATA, 0, WRITE, 0)), failed);
    assert_eq!(offer(kind::IN, &[desc(DATA, 512, WRITE | NEXT, 1), desc(HEAD, 16, NEXT, 2), end], None), failed);
    // No whole header.
    assert_eq!(offer(kind::IN, &[desc(HEAD, 15, NEXT, 1), end], None), failed);
    assert_eq!(offer(kind::IN, &[end], None), failed);
    // Longer than any disk: an end that is past 4 GiB in all.
    let long = Desc { addr: GUEST, len: MEMORY as u32, flags: WRITE, next: 0 };
    assert_eq!(three(long), failed);
    // And one that is as it should be.
    assert_eq!(three(desc(DATA, 512, WRITE, 0)), Some(status::OK));
}

#[test]
fn lists_that_cannot_be_followed_stop_the_queue() {
    let head = desc(HEAD, 16, NEXT, 1);
    let end = desc(STATUS, 1, WRITE, 0);
    // In a circle; out of the table; nowhere to put a status.
    assert_eq!(offer(kind::IN, &[head, desc(DATA, 512, WRITE | NEXT, 1)], None), None);
    assert_eq!(offer(kind::IN, &[desc(HEAD, 16, NEXT, 0)], None), None);
    assert_eq!(offer(kind::IN, &[head, desc(DATA, 512, WRITE | NEXT, 64), end], None), None);
    assert_eq!(offer(kind::IN, &[head, desc(DATA, 512, WRITE | NEXT, 9999), end], None), None);
    assert_eq!(offer(kind::OUT, &[desc(HEAD, 16, 0, 0)], None), None);
    assert_eq!(offer(kind::OUT, &[Desc { addr: 1, len: 1, flags: WRITE, next: 0 }], None), None);
}

#[test]
fn indirect_tables_that_lie_are_not_followed() {
    const TABLE: u64 = 6 << 20;
    let inner = [desc(HEAD, 16, NEXT, 1), desc(DATA, 512, WRITE | NEXT, 2), desc(STATUS, 1, WRITE, 0)];
    let table = Some((&inner[..], TABLE));
    let outer = |len: u32, flags: u16| desc(TABLE, len, INDIRECT | flags, 1);
    assert_eq!(offer(kind::IN, &[outer(48, 0)], table), Some(status::OK));
    for len in [0, 1, 15, 47] {
        assert_eq!(offer(kind::IN, &[outer(len, 0)], table), None, "{len}");
    }
    assert_eq!(offer(kind::IN, &[outer(32, 0)], table), None, "the list leaves its table");
    assert_eq!(offer(kind::IN, &[desc(MEMORY - 16, 32, INDIRECT, 0)], table), None);
    assert_eq!(offer(kind::IN, &[Desc { addr: u64::MAX - 15, len: 48, flags: INDIRECT, next: 0 }], table), None);
    // Indirect and next together: failed, since its status is found.
    assert_eq!(offer(kind::IN, &[outer(48, NEXT), desc(DATA, 1, WRITE, 0)], table), Some(status::IOERR));
    // Behind others, which is allowed, and with a flag that is to be ignored.
    let rest = [desc(DATA, 512, WRITE | NEXT, 1), desc(STATUS, 1, WRITE, 0)];
    let behind = [desc(HEAD, 16, NEXT, 1), desc(TABLE, 32, INDIRECT | WRITE, 0)];
    assert_eq!(offer(kind::IN, &behind, Some((&rest[..], TABLE))), Some(status::OK));
    // A table within a table; one that runs in a circle.
    let nested = [desc(TABLE, 48, INDIRECT, 0), inner[1], inner[2]];
    assert_eq!(offer(kind::IN, &[outer(48, 0)], Some((&nested[..], TABLE))), None);
    let circle = [inner[0], desc(DATA, 512, WRITE | NEXT, 0), inner[2]];
    assert_eq!(offer(kind::IN, &[outer(48, 0)], Some((&circle[..], TABLE))), None);
}

#[test]
fn indices_that_jump_and_heads_that_come_twice_stop_the_queue() {
    type Lie = fn(&mut Bed);
    let lies: [Lie; 4] = [
        |bed| bed.map.store16((bed.rings[0].avail_at() + 2) as usize, 65).unwrap(),
        |bed| bed.map.store16((bed.rings[0].avail_at() + 2) as usize, u16::MAX).unwrap(),
        |bed| bed.offer(0, 64),
        |bed| {
            bed.disk().hold = true;
            let sent = bed.send(0, kind::FLUSH, 0, &[], 0, &Layout::default());
            bed.offer(0, sent.head);
        },
    ];
    for lie in lies {
        let mut bed = Bed::with(10, MemDisk::new(1 << 20), ALL, 1, 64);
        lie(&mut bed);
        bed.kick(0);
        bed.settle();
        assert_eq!(bed.server.counters().nonsense, 1);
        bed.disk().hold = false;
        bed.wake();
        bed.settle();
    }
}

#[test]
fn memory_that_is_taken_away_costs_the_guest_its_queue_and_nobody_else_anything() {
    // A guest whose memory file shrinks while requests are under way. The file of the bed is sealed: this one is not.
    use afterimage_dataplane::io::guest::{Map, Region};
    use afterimage_dataplane::vhost::message::Command;
    use std::os::fd::AsFd;
    let mut bed = Bed::with(11, MemDisk::new(1 << 20), ALL, 1, 64);
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, MEMORY).unwrap();
    let map = std::sync::Arc::new(Map::new(file.as_fd(), 0, MEMORY).unwrap());
    let extra = Region { guest: GUEST + MEMORY, user: 0x1000_0000, map };
    bed.ok(Command::AddRegion(extra));
    let table = bed.rings[0].desc();
    let mut head = kind::OUT.to_le_bytes().to_vec();
    head.extend_from_slice(&[0; 12]);
    bed.poke(HEAD, &head);
    bed.put_desc(table, 0, desc(HEAD, 16, NEXT, 1));
    bed.put_desc(table, 1, desc(MEMORY + 4096, 4096, NEXT, 2));
    bed.put_desc(table, 2, desc(STATUS, 1, WRITE, 0));
    rustix::fs::ftruncate(&file, 0).unwrap();
    bed.offer(0, 0);
    bed.kick(0);
    bed.settle();
    assert_eq!(bed.next_end(0).map(|(head, _)| head), Some(0));
    assert_eq!(bed.peek(STATUS, 1), [status::IOERR], "nothing that was not the guest's goes to the disk");
    assert!(bed.disk().writes.is_empty());
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &Layout::default()).status, status::OK);
}

#[test]
fn bytes_at_random_in_its_tables_harm_nobody() {
    for seed in 0..300 {
        let mut bed = Bed::with(seed, MemDisk::new(1 << 20), ALL, 2, 16);
        for _ in 0..20 {
            let sector = bed.rng.below(3000);
            let indirect = bed.rng.below(2) == 0;
            if bed.rings[0].avail.wrapping_sub(bed.rings[0].seen) < 3 {
                bed.send(0, kind::OUT, sector, &[7; 512], 0, &Layout { indirect, ..Layout::default() });
            }
            // Its descriptors, its rings, and where its tables and headers are.
            let at = match bed.rng.below(3) {
                0 => bed.rng.below(256),
                1 => 0x8000 + bed.rng.below(40),
                _ => (1 << 20) + bed.rng.below(4096),
            };
            let value = bed.rng.below(256) as u8;
            bed.poke(at, &[value]);
            bed.kick(0);
            bed.settle();
            while bed.next_end_raw(0) {}
        }
        let sent = bed.send(1, kind::FLUSH, 0, &[], 0, &Layout::default());
        bed.kick(1);
        assert_eq!(bed.wait(&sent).status, status::OK);
    }
}
