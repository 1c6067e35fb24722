//! What messages do: queues that stop and go on, memory that moves, disks that grow, nonsense that is refused.

use std::sync::Arc;

use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::io::guest::{Region, share};
use afterimage_dataplane::vhost::message::Command;
use afterimage_dataplane::vhost::proto::{self, QUEUES_MAX, feature, kind, protocol, status};
use afterimage_dataplane::vhost::queue::Addresses;
use afterimage_dataplane::vhost::{AttachError, Outcome, Reply};

use crate::bed::{ALL, Bed, GUEST, KEY, Layout, MEMORY, MemDisk, USER, pattern};

fn config(bed: &mut Bed) -> Vec<u8> {
    match bed.command(Command::GetConfig { offset: 0, len: 96, flags: 0 }) {
        Outcome::Reply(Reply::Config(0, 0, bytes)) => bytes,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let mut bed = Bed::with(1, MemDisk::new(4 << 20), ALL | feature::CONFIG_WCE, 1, 128);
    let bytes = config(&mut bed);
    assert_eq!(bytes.len(), 96);
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(bytes[..8], ((4u64 << 20) / 512).to_le_bytes());
    assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (0, proto::SEG_MAX, 512));
    assert_eq!((bytes[24], bytes[32], bytes[34]), (3, 1, QUEUES_MAX as u8), "4096 are 512 shifted by 3; write back");
    assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (proto::RANGE_SECTORS_MAX, proto::RANGES_MAX, 8));
    assert_eq!((u32_at(48), u32_at(52), bytes[56]), (proto::RANGE_SECTORS_MAX, proto::RANGES_MAX, 1));
    assert!(bytes[57..].iter().all(|b| *b == 0));
    let offered = bed.number(Command::GetFeatures);
    assert_eq!(offered & ALL, ALL);
    assert_eq!(bed.number(Command::GetProtocolFeatures), protocol::OFFERED);
    assert_eq!(bed.number(Command::QueueNum), u64::from(QUEUES_MAX));
    // Only the cache can be set.
    bed.ok(Command::SetConfig { offset: 32, bytes: vec![0] });
    assert_eq!(config(&mut bed)[32], 0);
    for (offset, bytes) in [(32, vec![2]), (0, vec![0]), (32, vec![0, 9]), (u32::MAX, vec![1])] {
        assert!(matches!(bed.command(Command::SetConfig { offset, bytes }), Outcome::Refused(_)));
    }
    assert!(matches!(bed.command(Command::GetConfig { offset: 200, len: 57, flags: 0 }), Outcome::Refused(_)));
    assert!(matches!(bed.command(Command::SetFeatures(1 << 40)), Outcome::Refused(_)));
    assert!(matches!(bed.command(Command::SetFeatures(ALL | feature::RO)), Outcome::Refused(_)));
    assert!(matches!(bed.command(Command::SetProtocolFeatures(1 << 1)), Outcome::Refused(_)));
}

#[test]
fn a_queue_stops_when_all_has_ended_and_goes_on_where_it_was() {
    let mut bed = Bed::new(2);
    let plain = Layout::default();
    for number in 0..5 {
        assert_eq!(bed.ask(kind::OUT, number, &pattern(number, 512), 0, &plain).status, status::OK);
    }
    bed.disk().hold = true;
    let sent = bed.send(0, kind::FLUSH, 0, &[], 0, &plain);
    bed.kick(0);
    bed.settle();
    let mut waits = match bed.command(Command::GetVringBase { queue: 0 }) {
        Outcome::Wait(command) => command,
        other => panic!("{other:?}"),
    };
    // What comes while it waits is left.
    let later = bed.send(0, kind::FLUSH, 0, &[], 0, &plain);
    bed.kick(0);
    bed.settle();
    bed.disk().hold = false;
    bed.wake();
    let base = loop {
        bed.settle();
        waits = match bed.command(waits) {
            Outcome::Wait(command) => command,
            Outcome::Reply(Reply::State(0, base)) => break base,
            other => panic!("{other:?}"),
        };
    };
    assert_eq!(base, 6);
    assert_eq!(bed.wait(&sent).status, status::OK);
    assert_eq!(bed.disk().flushes, 1);
    bed.start(0);
    bed.kick(0);
    assert_eq!(bed.wait(&later).status, status::OK);
}

#[test]
fn a_disabled_queue_is_left_alone_until_it_is_enabled() {
    let mut bed = Bed::new(3);
    bed.ok(Command::VringEnable { queue: 0, on: false });
    let sent = bed.send(0, kind::FLUSH, 0, &[], 0, &Layout::default());
    bed.kick(0);
    bed.settle();
    assert!(bed.next_end(0).is_none());
    bed.ok(Command::VringEnable { queue: 0, on: true });
    assert_eq!(bed.wait(&sent).status, status::OK, "a kick that came before is not forgotten");
}

#[test]
fn memory_that_is_added_moved_and_taken_away_is_followed() {
    let mut bed = Bed::new(4);
    let plain = Layout::default();
    assert!(bed.number(Command::MaxRegions) >= 8);
    let (_, more) = share("more", 1 << 20).unwrap();
    let more = Region { guest: GUEST + MEMORY, user: 0x1000, map: Arc::new(more) };
    bed.ok(Command::AddRegion(more.clone()));
    assert!(matches!(bed.command(Command::AddRegion(more.clone())), Outcome::Refused(_)), "it overlaps");
    bed.ok(Command::RemoveRegion { guest: more.guest, user: more.user, len: 1 << 20 });
    let gone = Command::RemoveRegion { guest: more.guest, user: more.user, len: 1 << 20 };
    assert!(matches!(bed.command(gone), Outcome::Refused(_)));
    // A request under way while the table is replaced by one that says the same of the same memory.
    bed.disk().hold = true;
    let sent = bed.send(0, kind::IN, 0, &[], 4096, &plain);
    bed.kick(0);
    bed.settle();
    bed.ok(Command::MemTable(vec![bed.region(), more]));
    bed.disk().hold = false;
    bed.wake();
    assert_eq!(bed.wait(&sent).status, status::OK);
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::OK);
    // The queue's own memory is taken away and put back, in two steps, while a request is under way and another comes.
    bed.disk().hold = true;
    let first = bed.send(0, kind::IN, 0, &[], 4096, &plain);
    bed.kick(0);
    bed.settle();
    bed.ok(Command::RemoveRegion { guest: GUEST, user: USER, len: MEMORY });
    let second = bed.send(0, kind::FLUSH, 0, &[], 0, &plain);
    bed.kick(0);
    bed.settle();
    bed.disk().hold = false;
    bed.wake();
    assert_eq!(bed.wait(&first).status, status::OK, "what was taken ends where it lay");
    bed.settle();
    assert!(bed.next_end(0).is_none(), "nothing is taken meanwhile");
    bed.ok(Command::AddRegion(bed.region()));
    assert_eq!(bed.wait(&second).status, status::OK, "a kick that came meanwhile is not forgotten");
    bed.ok(Command::MemTable(Vec::new()));
    bed.ok(Command::MemTable(vec![bed.region()]));
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &plain).status, status::OK);
    assert_eq!(bed.server.counters().nonsense, 0);
}

#[test]
fn a_disk_that_has_grown_shows_it() {
    let mut bed = Bed::new(5);
    let mut geometry = bed.disk().geometry.clone();
    let device = bed.device;
    assert!(!bed.server.refresh(device, geometry.clone()), "nothing is new");
    bed.disk().data.resize(8 << 20, 0);
    geometry.size = 8 << 20;
    bed.disk().geometry = geometry.clone();
    let plain = Layout::default();
    assert_eq!(bed.ask(kind::IN, (4 << 20) / 512, &[], 512, &plain).status, status::IOERR);
    assert!(bed.server.refresh(device, geometry));
    assert_eq!(config(&mut bed)[..8], ((8u64 << 20) / 512).to_le_bytes());
    assert_eq!(bed.ask(kind::IN, (4 << 20) / 512, &[], 512, &plain).status, status::OK);
}

#[test]
fn a_reset_waits_for_what_is_under_way_and_forgets_the_rest() {
    for reset in [|| Command::ResetDevice, || Command::SetStatus(0)] {
        let mut bed = Bed::new(6);
        bed.ok(Command::SetStatus(15));
        assert_eq!(bed.number(Command::GetStatus), 15);
        bed.disk().hold = true;
        bed.send(0, kind::FLUSH, 0, &[], 0, &Layout::default());
        bed.kick(0);
        bed.settle();
        let Outcome::Wait(waits) = bed.command(reset()) else { panic!("it does not wait") };
        bed.disk().hold = false;
        bed.wake();
        bed.settle();
        bed.ok(waits);
        assert_eq!(bed.number(Command::GetStatus), 0);
        assert!(matches!(bed.command(Command::VringEnable { queue: 0, on: true }), Outcome::Done));
        bed.settle();
    }
}

#[test]
fn nonsense_about_queues_is_refused() {
    let mut bed = Bed::with(7, MemDisk::new(1 << 20), ALL, 0, 64);
    let many = u32::from(QUEUES_MAX);
    let refused = [
        Command::VringNum { queue: 0, size: 0 },
        Command::VringNum { queue: 0, size: 3 },
        Command::VringNum { queue: 0, size: 2048 },
        Command::VringNum { queue: many, size: 64 },
        Command::VringEnable { queue: u32::MAX, on: true },
        Command::GetVringBase { queue: many },
        Command::VringBase { queue: 0, base: 1 << 16 },
        Command::VringErr { queue: many, event: None },
        Command::GetInflight { queues: 0, size: 64 },
        Command::GetInflight { queues: 1, size: 0 },
        Command::GetInflight { queues: u16::MAX, size: u16::MAX },
    ];
    for command in refused {
        let text = format!("{command:?}");
        assert!(matches!(bed.command(command), Outcome::Refused(_)), "{text}");
    }
    let (_, small) = share("small", 64).unwrap();
    let small = Command::SetInflight { queues: 2, size: 64, map: Arc::new(small) };
    assert!(matches!(bed.command(small), Outcome::Refused(_)));
    assert!(matches!(bed.command(Command::GetVringBase { queue: 3 }), Outcome::Reply(Reply::State(3, 0))));
    // A queue that lies nowhere does not start, and one that is misplaced by a byte neither.
    bed.add_rings(1, 64);
    let at = Addresses { desc: USER + 1, avail: USER + 0x8000, used: USER + 0xc000 };
    assert!(matches!(bed.command(Command::VringAddr { queue: 0, at }), Outcome::Refused(_)));
}

#[test]
fn a_disk_is_in_use_once_and_free_when_all_has_ended() {
    let mut bed = Bed::new(8);
    bed.disk().hold = true;
    bed.send(0, kind::FLUSH, 0, &[], 0, &Layout::default());
    bed.kick(0);
    bed.settle();
    assert_eq!(bed.server.status()[0].requests, 1);
    let attach = |bed: &mut Bed| bed.server.attach(&mut bed.io, &mut bed.disks, KEY);
    assert_eq!(attach(&mut bed), Err(AttachError::Busy));
    bed.server.detach(&mut bed.io, bed.device);
    assert_eq!(attach(&mut bed), Err(AttachError::Busy), "what it writes must not land after what the next one does");
    assert!(matches!(bed.command(Command::GetFeatures), Outcome::Gone));
    bed.disk().hold = false;
    bed.wake();
    bed.settle();
    assert!(bed.server.is_idle());
    assert!(attach(&mut bed).is_ok());
    bed.disks.0 = None;
    bed.server.close_export(&mut bed.io, KEY);
    assert_eq!(attach(&mut bed), Err(AttachError::NoDisk));
}

#[test]
fn at_a_stop_what_is_under_way_is_answered_and_nothing_else_taken() {
    let mut bed = Bed::new(9);
    let plain = Layout::default();
    bed.disk().hold = true;
    let first = bed.send(0, kind::OUT, 0, &pattern(1, 512), 0, &plain);
    bed.kick(0);
    bed.settle();
    bed.server.shutdown(&mut bed.io);
    assert!(!bed.server.is_idle());
    bed.send(0, kind::OUT, 1, &pattern(2, 512), 0, &plain);
    bed.kick(0);
    bed.settle();
    bed.disk().hold = false;
    bed.wake();
    assert_eq!(bed.wait(&first).status, status::OK);
    bed.settle();
    assert!(bed.server.is_idle() && bed.next_end(0).is_none());
    assert_eq!(bed.disk().writes.len(), 1);
}
