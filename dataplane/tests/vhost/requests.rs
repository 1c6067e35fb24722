//! Requests of a driver that keeps to the rules.

use afterimage_dataplane::vhost::message::Command;
use afterimage_dataplane::vhost::proto::{self, RANGE_SECTORS_MAX, RANGES_MAX, feature, kind, status};

use crate::bed::{ALL, Bed, Layout, MemDisk, Sent, pattern};

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut out = sector.to_le_bytes().to_vec();
    out.extend_from_slice(&sectors.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    out
}

/// Layouts that all say the same.
fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for indirect in [false, true] {
        for (readable, writable) in [
            (vec![16], vec![]),
            (vec![], vec![]),
            (vec![1, 3, 8, 4, 100], vec![1, 511, 7]),
            (vec![15, 2, 511, 513], vec![512, 512, 4096]),
            (vec![20], vec![1; 5]),
        ] {
            all.push(Layout { readable, writable, indirect });
        }
    }
    all
}

#[test]
fn what_is_written_is_read_however_it_is_laid_out() {
    for event_idx in [0, feature::EVENT_IDX] {
        let mut bed = Bed::with(1, MemDisk::new(4 << 20), ALL & !feature::EVENT_IDX | event_idx, 1, 128);
        for (number, layout) in layouts().iter().enumerate() {
            for (sector, len) in [(0, 512), (3, 4096), (1021, 3 * 512), (8, 600 * 1024), (1 << 10, 1 << 20)] {
                let data = pattern(number as u64 ^ sector, len);
                let ended = bed.ask(kind::OUT, sector, &data, 0, layout);
                assert_eq!((ended.status, ended.len), (status::OK, 1));
                let at = sector as usize * 512;
                assert!(bed.disk().data[at..at + len] == data[..]);
                let ended = bed.ask(kind::IN, sector, &[], len, layout);
                assert_eq!((ended.status, ended.len), (status::OK, len as u32 + 1));
                assert!(ended.data == data, "{layout:?}");
            }
        }
        assert_eq!(bed.disk().durable, 0);
    }
}

#[test]
fn flush_identity_discard_zeroes() {
    let mut bed = Bed::new(2);
    for layout in &layouts() {
        bed.disk().data.fill(0xaa);
        let flushes = bed.disk().flushes;
        assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, layout).status, status::OK);
        assert_eq!(bed.disk().flushes, flushes + 1);
        let ended = bed.ask(kind::GET_ID, 0, &[], 20, layout);
        assert_eq!((ended.status, ended.len, &ended.data[..]), (status::OK, 21, &b"0123456789abcdef\0\0\0\0"[..]));
        let two = [range(8, 16, 0), range(100, 1, 0)].concat();
        assert_eq!(bed.ask(kind::DISCARD, 0, &two, 0, layout).status, status::OK);
        assert_eq!(bed.disk().discards, [(4096, 8192), (51200, 512)]);
        bed.disk().discards.clear();
        let two = [range(8, 16, 1), range(33, 7, 0)].concat();
        assert_eq!(bed.ask(kind::WRITE_ZEROES, 0, &two, 0, layout).status, status::OK);
        assert_eq!(bed.disk().zeroes, [(4096, 8192, true), (33 * 512, 7 * 512, false)]);
        bed.disk().zeroes.clear();
        assert!(bed.disk().data[4096..12288].iter().all(|b| *b == 0));
        assert_eq!(bed.disk().data[12288], 0xaa);
    }
}

#[test]
fn an_identity_is_cut_to_the_room_that_there_is() {
    let mut bed = Bed::new(3);
    bed.disk().geometry.serial = "0123456789abcdefghijklmnop".into();
    let geometry = bed.disk().geometry.clone();
    let device = bed.device;
    assert!(bed.server.refresh(device, geometry));
    for (room, expected) in [(0, ""), (4, "0123"), (20, "0123456789abcdefghij")] {
        let ended = bed.ask(kind::GET_ID, 0, &[], room, &Layout::default());
        assert_eq!((ended.status, ended.data.as_slice()), (status::OK, expected.as_bytes()));
    }
    let ended = bed.ask(kind::GET_ID, 0, &[], 30, &Layout::default());
    assert_eq!((ended.status, &ended.data[..20]), (status::OK, &b"0123456789abcdefghij"[..]));
}

#[test]
fn what_a_disk_cannot_do_is_refused_as_the_text_says() {
    let mut bed = Bed::new(4);
    let end = (4 << 20) / 512;
    let plain = Layout::default();
    let one = pattern(1, 512);
    let mut status = |kind, sector, payload: &[u8], room| bed.ask(kind, sector, payload, room, &plain).status;
    assert_eq!(status(kind::OUT, end, &one, 0), status::IOERR);
    assert_eq!(status(kind::OUT, end - 1, &[one.clone(), one.clone()].concat(), 0), status::IOERR);
    assert_eq!(status(kind::OUT, u64::MAX, &one, 0), status::IOERR);
    assert_eq!(status(kind::IN, u64::MAX / 512, &[], 512), status::IOERR);
    assert_eq!(status(kind::IN, end, &[], 512), status::IOERR);
    assert_eq!(status(kind::IN, end - 1, &[], 512), status::OK);
    assert_eq!(status(kind::OUT, 0, &one[..511], 0), status::IOERR);
    assert_eq!(status(kind::IN, 0, &[], 100), status::IOERR);
    assert_eq!(status(kind::IN, 0, &[], 0), status::OK, "nothing is read");
    assert_eq!(status(2, 0, &[], 0), status::UNSUPP);
    assert_eq!(status(14, 0, &range(0, 8, 0), 0), status::UNSUPP, "secure erase is not offered");
    assert_eq!(status(u32::MAX, 0, &[], 0), status::UNSUPP);
    assert_eq!(status(kind::DISCARD, 0, &range(0, 8, 1), 0), status::UNSUPP);
    assert_eq!(status(kind::DISCARD, 0, &range(0, 8, 2), 0), status::UNSUPP);
    assert_eq!(status(kind::WRITE_ZEROES, 0, &range(0, 8, 2), 0), status::UNSUPP);
    assert_eq!(status(kind::DISCARD, 0, &range(end, 8, 0), 0), status::IOERR);
    assert_eq!(status(kind::DISCARD, 0, &[range(0, 8, 0), range(end - 1, 2, 0)].concat(), 0), status::IOERR);
    assert_eq!(status(kind::DISCARD, 0, &range(0, 8, 0)[..15], 0), status::IOERR);
    assert_eq!(status(kind::DISCARD, 0, &[], 0), status::IOERR);
    assert_eq!(status(kind::DISCARD, 0, &range(0, 0, 0), 0), status::OK, "nothing is discarded");
    assert_eq!(status(kind::WRITE_ZEROES, 0, &range(0, RANGE_SECTORS_MAX + 1, 0), 0), status::IOERR);
    assert_eq!(status(kind::DISCARD, 0, &range(0, 1, 0).repeat(RANGES_MAX as usize + 1), 0), status::IOERR);
    assert_eq!(status(kind::DISCARD, 0, &range(0, 1, 0).repeat(RANGES_MAX as usize), 0), status::OK);
    assert_eq!(bed.disk().discards.len(), RANGES_MAX as usize, "a range that is wrong leaves the others undone");
    assert!(bed.disk().zeroes.is_empty() && bed.disk().writes.is_empty());
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let mut disk = MemDisk::new(1 << 20);
    disk.geometry.read_only = true;
    let features = ALL & !(feature::DISCARD | feature::WRITE_ZEROES);
    let mut bed = Bed::with(5, disk, features | feature::RO, 1, 64);
    let offered = bed.number(Command::GetFeatures);
    assert_eq!(offered & (feature::RO | feature::DISCARD | feature::WRITE_ZEROES), feature::RO);
    let plain = Layout::default();
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &plain).status, status::IOERR);
    assert_eq!(bed.ask(kind::WRITE_ZEROES, 0, &range(0, 8, 0), 0, &plain).status, status::UNSUPP);
    assert_eq!(bed.ask(kind::DISCARD, 0, &range(0, 8, 0), 0, &plain).status, status::UNSUPP);
    assert_eq!(bed.ask(kind::IN, 0, &[], 512, &plain).status, status::OK);
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::OK);
}

#[test]
fn a_driver_without_flushes_has_each_write_made_durable() {
    for (features, writeback, durable) in [
        (ALL, None, 0),
        (ALL & !feature::FLUSH, None, 1),
        (ALL | feature::CONFIG_WCE, None, 0),
        (ALL | feature::CONFIG_WCE, Some(0), 1),
        (ALL & !feature::FLUSH | feature::CONFIG_WCE, None, 1),
        (feature::PROTOCOL, None, 1),
        (ALL & !feature::FLUSH | feature::CONFIG_WCE, Some(1), 0),
    ] {
        let mut bed = Bed::with(6, MemDisk::new(1 << 20), features, 1, 64);
        if let Some(on) = writeback {
            bed.ok(Command::SetConfig { offset: proto::CONFIG_WCE as u32, bytes: vec![on] });
        }
        assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &Layout::default()).status, status::OK);
        assert_eq!(bed.disk().durable, durable, "{features:x} {writeback:?}");
    }
}

#[test]
fn errors_of_the_disk_reach_the_guest_and_want_of_room_does_not() {
    let mut bed = Bed::new(7);
    let plain = Layout::default();
    bed.disk().no_room = 3;
    let data = pattern(9, 2048);
    assert_eq!(bed.ask(kind::OUT, 5, &data, 0, &plain).status, status::OK);
    bed.disk().no_room = 3;
    assert!(bed.ask(kind::IN, 5, &[], 2048, &plain).data == data);
    bed.disk().no_room = 1;
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::OK);
    bed.disk().fail = Some(afterimage_dataplane::io::Errno::IO);
    assert_eq!(bed.ask(kind::OUT, 5, &data, 0, &plain).status, status::IOERR);
    assert_eq!(bed.ask(kind::IN, 5, &[], 2 << 20, &plain).status, status::IOERR);
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::IOERR);
    bed.disk().fail = None;
    assert_eq!(bed.ask(kind::IN, 0, &[], 512, &plain).status, status::OK);
}

#[test]
fn many_requests_of_several_queues_end_each_with_its_own_data() {
    for seed in 0..12 {
        let features = if seed % 2 == 0 { ALL } else { ALL & !feature::EVENT_IDX };
        let mut disk = MemDisk::new(4 << 20);
        disk.late = true;
        let mut bed = Bed::with(seed, disk, features, 3, 64);
        let mut model = vec![0; 4 << 20];
        for round in 0..12 {
            // Ranges that do not overlap, so that their order does not matter.
            let mut sent: Vec<(Sent, Option<Vec<u8>>)> = Vec::new();
            for slot in 0..30u64 {
                let queue = bed.rng.below(3) as usize;
                let sector = slot * 256 + bed.rng.below(100);
                let len = 512 * (1 + bed.rng.below(150) as usize);
                let indirect = bed.rng.below(2) == 0;
                let layout = Layout { readable: vec![16, 1000], writable: vec![700], indirect };
                let at = sector as usize * 512;
                if bed.rng.below(2) == 0 {
                    let data = pattern(seed * 1000 + round * 100 + slot, len);
                    model[at..at + len].copy_from_slice(&data);
                    sent.push((bed.send(queue, kind::OUT, sector, &data, 0, &layout), None));
                } else {
                    let expected = model[at..at + len].to_vec();
                    sent.push((bed.send(queue, kind::IN, sector, &[], len, &layout), Some(expected)));
                }
                if bed.rng.below(3) == 0 {
                    bed.kick(queue);
                }
            }
            (0..3).for_each(|queue| bed.kick(queue));
            let mut left = sent.len();
            while left > 0 {
                for queue in 0..3 {
                    while let Some((head, len)) = bed.next_end(queue) {
                        let (at, expected) = {
                            let found = sent.iter().position(|(s, _)| s.queue == queue && s.head == head).unwrap();
                            (sent[found].0.clone(), sent.remove(found).1)
                        };
                        let ended = bed.result(&at, len);
                        assert_eq!(ended.status, status::OK);
                        assert!(expected.is_none_or(|data| data == ended.data));
                        left -= 1;
                    }
                }
                assert!(left == 0 || bed.step(), "{left} requests have not ended");
            }
        }
        assert!(bed.disk().data == model);
        let called: usize = bed.rings.iter().map(|ring| ring.calls).sum();
        assert!(called > 0);
    }
}

#[test]
fn queues_are_looked_at_for_a_while_without_a_kick() {
    let mut bed = Bed::new(8);
    let limits = afterimage_dataplane::vhost::Limits { poll: 1_000_000, ..Default::default() };
    bed.server = afterimage_dataplane::vhost::Server::new(0x4001, limits);
    bed.device = bed.server.attach(&mut bed.io, &mut bed.disks, crate::bed::KEY).unwrap();
    bed.introduce();
    bed.start(0);
    let plain = Layout::default();
    // A kick that comes soon after the last end: so it pays to look.
    for _ in 0..3 {
        assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::OK);
    }
    assert!(bed.server.is_polling());
    let sent = bed.send(0, kind::FLUSH, 0, &[], 0, &plain);
    bed.turn();
    assert_eq!(bed.next_end(0).map(|(head, _)| head), Some(sent.head), "without a kick");
    for _ in 0..40 {
        bed.world.advance(1_000_000);
        bed.turn();
    }
    assert!(!bed.server.is_polling(), "it ends when nothing comes");
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::OK, "and kicks are heard again");
}
