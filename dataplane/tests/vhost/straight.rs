//! Reads that the disk puts into the guest's memory itself, and those that have to be copied.

use std::sync::Arc;

use afterimage_dataplane::io::guest::{Map, Region, share};
use afterimage_dataplane::io::{Errno, Io as _};
use afterimage_dataplane::vhost::message::Command;
use afterimage_dataplane::vhost::proto::{kind, status};
use afterimage_dataplane::vhost::{Outcome, Reply};

use crate::bed::{ALL, Bed, Desc, GUEST, MEMORY, MemDisk, NEXT, USER, WRITE, pattern};

const HEAD: u64 = (4 << 20) + 4096;
const STATUS: u64 = (4 << 20) + 8192;
const DATA: u64 = 5 << 20;
const EXTRA: u64 = GUEST + MEMORY;

fn bed() -> Bed {
    let mut disk = MemDisk::new(4 << 20);
    disk.data = pattern(1, 4 << 20);
    Bed::with(31, disk, ALL, 1, 256)
}

/// Offers a read of these pieces of the guest's memory, by its addresses.
fn offer(bed: &mut Bed, sector: u64, pieces: &[(u64, u32)]) {
    let mut head = kind::IN.to_le_bytes().to_vec();
    head.extend_from_slice(&[0; 4]);
    head.extend_from_slice(&sector.to_le_bytes());
    bed.poke(HEAD, &head);
    bed.poke(STATUS, &[0xcc]);
    let table = bed.rings[0].desc();
    let put = |index: usize, addr, len, flags| {
        bed.put_desc(table, index as u16, Desc { addr, len, flags, next: index as u16 + 1 });
    };
    put(0, GUEST + HEAD, 16, NEXT);
    for (index, (addr, len)) in pieces.iter().enumerate() {
        put(index + 1, *addr, *len, WRITE | NEXT);
    }
    put(pieces.len() + 1, GUEST + STATUS, 1, WRITE);
    bed.offer(0, 0);
    bed.kick(0);
    bed.settle();
}

/// Its status, and how many parts of it were not copied.
fn read(bed: &mut Bed, sector: u64, pieces: &[(u64, u32)]) -> (Option<u8>, usize) {
    bed.disk().straight = 0;
    offer(bed, sector, pieces);
    let len: u32 = pieces.iter().map(|(_, len)| len).sum();
    let status = bed.next_end(0).map(|(_, written)| {
        let status = bed.peek(STATUS, 1)[0];
        assert_eq!(written > 1, status == status::OK);
        assert!(written <= 1 || written == len + 1);
        status
    });
    (status, bed.disk().straight)
}

fn holds(bed: &mut Bed, sector: u64, pieces: &[(u64, u32)]) {
    let mut at = sector as usize * 512;
    for (addr, len) in pieces {
        let found = bed.peek(addr - GUEST, *len as usize);
        assert!(found == bed.disk().data[at..at + *len as usize], "{len} bytes at {addr:x}");
        at += *len as usize;
    }
}

#[test]
fn what_is_aligned_goes_straight_and_all_else_is_copied() {
    const OK: Option<u8> = Some(status::OK);
    let base = GUEST + DATA;
    type Case<'a> = (u64, &'a [(u64, u32)], usize);
    let cases: &[Case<'_>] = &[
        (0, &[(base, 65_536)], 1),
        (7, &[(base + 512, 65_536)], 1),
        (8, &[(base, 32_768), (base + 99 * 512, 512), (base + 65_536, 32_768)], 1),
        // Cut at half a mebibyte of the disk, and within a descriptor.
        (1, &[(base, 700 * 1024)], 2),
        (900, &[(base, 1 << 20), (base + (1 << 20) + 4096, 512 * 1024)], 4),
        // Small ones.
        (0, &[(base, 4096)], 0),
        (1024 - 8, &[(base, 4096 + 65_536)], 1),
        // An address, a length within a request.
        (0, &[(base + 4, 65_536)], 0),
        (0, &[(base, 32_768), (base + 65_536 + 1, 32_768)], 0),
        (0, &[(base, 32_768 + 8), (base + 65_536, 32_768 - 8)], 0),
        // Its end is not aligned in the guest; its first part is.
        (0, &[(base, 512 * 1024), (base + (1 << 20) + 4, 65_536)], 1),
    ];
    let mut bed = bed();
    for (sector, pieces, straight) in cases {
        assert_eq!(read(&mut bed, *sector, pieces), (OK, *straight), "{sector} {pieces:?}");
        holds(&mut bed, *sector, pieces);
    }
    // As many pieces as one operation takes, and more.
    for (count, straight) in [(128u64, 1), (129, 0)] {
        let pieces: Vec<_> = (0..count).map(|at| (base + at * 1024, 512)).collect();
        assert_eq!(read(&mut bed, 0, &pieces), (OK, straight));
        holds(&mut bed, 0, &pieces);
    }
    // A disk of larger blocks, and one that cannot.
    bed.disk().into = Some(4096);
    for (sector, addr, straight) in [(8, base, 1), (1, base, 0), (8, base + 512, 0)] {
        assert_eq!(read(&mut bed, sector, &[(addr, 65_536)]), (OK, straight));
        holds(&mut bed, sector, &[(addr, 65_536)]);
    }
    bed.disk().into = None;
    assert_eq!(read(&mut bed, 8, &[(base, 65_536)]), (OK, 0));
    holds(&mut bed, 8, &[(base, 65_536)]);
}

#[test]
fn a_disk_that_could_not_after_all_has_it_copied_and_want_of_room_is_waited_for() {
    let mut bed = bed();
    let pieces = [(GUEST + DATA, 1 << 20)];
    bed.disk().copy_next = true;
    assert_eq!(read(&mut bed, 3, &pieces), (Some(status::OK), 1), "one of two; the third is small");
    holds(&mut bed, 3, &pieces);
    bed.poke(DATA, &vec![0; 1 << 20]);
    bed.disk().no_room = 5;
    assert_eq!(read(&mut bed, 3, &pieces), (Some(status::OK), 2));
    holds(&mut bed, 3, &pieces);
    bed.disk().fail = Some(Errno::IO);
    assert_eq!(read(&mut bed, 3, &pieces).0, Some(status::IOERR));
    bed.disk().fail = None;
    assert_eq!(bed.io.pool().free_bytes(), bed.io.pool().total_bytes());
}

/// Memory that is added to the guest's, and its file.
fn extra(len: u64) -> (std::os::fd::OwnedFd, Region) {
    let file = rustix::fs::memfd_create("extra", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, len).unwrap();
    let map = Map::new(std::os::fd::AsFd::as_fd(&file), 0, len).unwrap();
    (file, Region { guest: EXTRA, user: USER + MEMORY, map: Arc::new(map) })
}

#[test]
fn memory_that_is_taken_away_stays_until_the_read_into_it_has_ended() {
    for whole_table in [false, true] {
        let mut bed = bed();
        let (file, region) = extra(1 << 20);
        let map = Arc::downgrade(&region.map);
        bed.ok(Command::AddRegion(region));
        bed.disk().later = true;
        offer(&mut bed, 5, &[(GUEST + DATA, 65_536), (EXTRA, 65_536)]);
        assert!(bed.next_end(0).is_none());
        if whole_table {
            // The rest of it is mapped anew, as whoever runs the guest does when memory is added.
            let fresh = Region { map: Arc::clone(&bed.map), ..bed.region() };
            bed.ok(Command::MemTable(vec![fresh]));
        } else {
            bed.ok(Command::RemoveRegion { guest: EXTRA, user: USER + MEMORY, len: 1 << 20 });
        }
        assert!(map.upgrade().is_some(), "the disk may still write there");
        bed.disk().later = false;
        bed.wake();
        bed.settle();
        assert!(bed.next_end(0).is_some() && bed.peek(STATUS, 1) == [status::OK]);
        holds(&mut bed, 5, &[(GUEST + DATA, 65_536)]);
        assert!(map.upgrade().is_none(), "nobody needs it any more");
        let left = Map::new(std::os::fd::AsFd::as_fd(&file), 0, 65_536).unwrap();
        let mut found = vec![0; 65_536];
        left.read(0, &mut found).unwrap();
        assert!(found == bed.disk().data[5 * 512 + 65_536..][..65_536], "it went to where it was to go");
        // What is gone is gone for the next one.
        assert_eq!(read(&mut bed, 5, &[(EXTRA, 65_536)]).0, Some(status::IOERR));
    }
}

#[test]
fn a_queue_stops_and_a_device_resets_after_what_is_read_has_ended() {
    for reset in [false, true] {
        let mut bed = bed();
        bed.disk().later = true;
        offer(&mut bed, 5, &[(GUEST + DATA, 65_536)]);
        let stop = || if reset { Command::ResetDevice } else { Command::GetVringBase { queue: 0 } };
        assert!(matches!(bed.command(stop()), Outcome::Wait(_)));
        bed.settle();
        assert!(matches!(bed.command(stop()), Outcome::Wait(_)));
        assert!(bed.next_end(0).is_none());
        bed.disk().later = false;
        bed.wake();
        bed.settle();
        assert!(bed.next_end(0).is_some());
        holds(&mut bed, 5, &[(GUEST + DATA, 65_536)]);
        match bed.command(stop()) {
            Outcome::Done if reset => {}
            Outcome::Reply(Reply::State(0, 1)) if !reset => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_connection_that_ends_leaves_the_mapping_to_the_read() {
    let mut bed = bed();
    let (_file, region) = extra(1 << 20);
    let map = Arc::downgrade(&region.map);
    bed.ok(Command::AddRegion(region));
    bed.disk().later = true;
    offer(&mut bed, 5, &[(EXTRA, 65_536)]);
    bed.server.detach(&mut bed.io, bed.device);
    assert!(map.upgrade().is_some());
    let busy = bed.server.attach(&mut bed.io, &mut bed.disks, crate::bed::KEY);
    assert!(busy.is_err(), "the next connection waits for it");
    bed.disk().later = false;
    bed.wake();
    bed.settle();
    assert!(map.upgrade().is_none());
    assert!(bed.server.attach(&mut bed.io, &mut bed.disks, crate::bed::KEY).is_ok());
}

#[test]
fn memory_whose_pages_have_gone_fails_the_request() {
    let mut bed = bed();
    let (file, region) = extra(1 << 20);
    bed.ok(Command::AddRegion(region));
    rustix::fs::ftruncate(&file, 4096).unwrap();
    assert_eq!(read(&mut bed, 0, &[(EXTRA, 65_536)]).0, Some(status::IOERR));
    let (_, sealed) = share("other", 4096).unwrap();
    drop(sealed);
    assert_eq!(read(&mut bed, 0, &[(GUEST + DATA, 65_536)]), (Some(status::OK), 1));
}
