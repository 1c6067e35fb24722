//! Single sentences of the texts of vhost-user and virtio that other tests do not come across.

use std::sync::Arc;

use afterimage_dataplane::io::guest::{GuestMemory, Window, share};
use afterimage_dataplane::vhost::chain::Chain;
use afterimage_dataplane::vhost::message::{self, Command, Header, refusal, request};
use afterimage_dataplane::vhost::proto::{CONFIG_WCE, feature, kind, status};
use afterimage_dataplane::vhost::queue::Addresses;
use afterimage_dataplane::vhost::{Outcome, Reply, inflight};

use crate::bed::{ALL, Bed, Desc, GUEST, Layout, MemDisk, NEXT, USER, WRITE, pattern};

fn bed(features: u64) -> Bed {
    Bed::with(21, MemDisk::new(1 << 20), features, 0, 64)
}

/// A queue that was described, but for what `order` leaves out. Commands are given in the order of its letters: `n`
/// length, `b` base, `a` addresses, `k` kick, `e` enable, `m` memory, `f` features.
fn describe(bed: &mut Bed, order: &str, base: u32) {
    let ring = &bed.rings[0];
    let at = Addresses { desc: USER + ring.desc(), avail: USER + ring.avail_at(), used: USER + ring.used_at() };
    let queue = 0;
    for letter in order.chars() {
        let command = match letter {
            'n' => Command::VringNum { queue, size: u32::from(bed.rings[0].size) },
            'b' => Command::VringBase { queue, base },
            'a' => Command::VringAddr { queue, at },
            'k' => Command::VringKick { queue, event: Some(bed.new_kick(0)) },
            'e' => Command::VringEnable { queue, on: true },
            'm' => Command::MemTable(vec![bed.region()]),
            _ => Command::SetFeatures(bed.features),
        };
        bed.ok(command);
        bed.settle();
    }
}

#[test]
fn a_queue_may_be_described_in_any_order() {
    let plain = Layout::default();
    let orders = ["fmnbake", "fmnakbe", "eknabmf", "kaenmfb", "akmfnbe", "mfkbane", "fnbakem", "fnbakme"];
    for order in orders {
        let mut bed = bed(ALL);
        bed.ok(Command::MemTable(Vec::new()));
        bed.add_ring(64);
        // It has run before: the next request is the sixth.
        bed.go_on_at(0, 5);
        let sent = bed.send(0, kind::OUT, 1, &pattern(1, 512), 0, &plain);
        describe(&mut bed, order, 5);
        bed.kick(0);
        assert_eq!(bed.wait(&sent).status, status::OK, "{order}");
        assert_eq!(bed.disk().writes, [(512, 512)], "{order}");
        assert_eq!(bed.server.counters().nonsense, 0, "{order}");
        let ended = bed.ask(kind::FLUSH, 0, &[], 0, &plain);
        assert_eq!(ended.status, status::OK, "{order}");
    }
}

#[test]
fn without_protocol_features_a_queue_is_on_from_its_kick() {
    let mut bed = bed(ALL & !feature::PROTOCOL);
    bed.add_ring(64);
    let sent = bed.send(0, kind::FLUSH, 0, &[], 0, &Layout::default());
    describe(&mut bed, "nbak", 0);
    assert!(bed.next_end(0).is_none(), "it was not kicked");
    bed.kick(0);
    assert_eq!(bed.wait(&sent).status, status::OK);
}

#[test]
fn with_protocol_features_a_queue_is_off_until_it_is_on_even_for_what_was_left() {
    let mut bed = bed(ALL);
    let (_, area) = share("inflight", inflight::bytes(1, 64)).unwrap();
    bed.inflight = Some(Arc::new(area));
    let map = bed.inflight.clone().unwrap();
    bed.ok(Command::SetInflight { queues: 1, size: 64, map });
    bed.add_rings(1, 64);
    bed.disk().hold = true;
    let sent = bed.send(0, kind::OUT, 0, &pattern(1, 512), 0, &Layout::default());
    bed.kick(0);
    bed.settle();
    bed.disk().writes.clear();
    bed.restart_without_queues();
    bed.rings[0].calls = 0;
    let call = bed.new_err(0);
    bed.ok(Command::VringCall { queue: 0, event: Some(call) });
    describe(&mut bed, "nbak", 0);
    bed.kick(0);
    bed.settle();
    assert!(bed.rings[0].calls > 0, "for ends that nobody may have been told of");
    assert!(bed.disk().writes.is_empty() && bed.next_end(0).is_none());
    bed.ok(Command::VringEnable { queue: 0, on: true });
    assert_eq!(bed.wait(&sent).status, status::OK);
    assert_eq!(bed.server.counters().again, 1);
}

#[test]
fn a_queue_without_kicks_is_looked_at() {
    let mut bed = bed(ALL);
    bed.add_ring(64);
    describe(&mut bed, "nba", 0);
    bed.ok(Command::VringKick { queue: 0, event: None });
    bed.ok(Command::VringEnable { queue: 0, on: true });
    for sector in 0..3 {
        let sent = bed.send(0, kind::OUT, sector, &pattern(1, 512), 0, &Layout::default());
        assert_eq!(bed.wait(&sent).status, status::OK);
    }
}

#[test]
fn who_runs_the_guest_hears_of_a_queue_that_makes_no_sense() {
    let mut bed = Bed::with(22, MemDisk::new(1 << 20), ALL, 1, 64);
    let event = bed.new_err(0);
    bed.ok(Command::VringErr { queue: 0, event: Some(event) });
    bed.settle();
    bed.rings[0].calls = 0;
    bed.offer(0, 64);
    bed.kick(0);
    bed.settle();
    assert_eq!(bed.server.counters().nonsense, 1);
    assert!(bed.rings[0].calls > 0);
}

#[test]
fn features_may_be_told_again_while_queues_run() {
    let mut bed = Bed::with(23, MemDisk::new(1 << 20), ALL & !(feature::EVENT_IDX | feature::INDIRECT_DESC), 1, 64);
    let indirect = Layout { indirect: true, ..Layout::default() };
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &indirect).status, status::IOERR);
    bed.ok(Command::SetFeatures(ALL & !feature::EVENT_IDX));
    assert_eq!(bed.ask(kind::FLUSH, 0, &[], 0, &indirect).status, status::OK);
}

#[test]
fn what_the_driver_set_about_the_cache_outlives_a_reset_and_a_process() {
    let features = ALL | feature::CONFIG_WCE;
    let mut bed = bed(features);
    let outcome = bed.command(Command::GetInflight { queues: 1, size: 64 });
    let Outcome::Reply(Reply::Inflight { len, file, .. }) = outcome else { panic!("{outcome:?}") };
    use std::os::fd::AsFd;
    let map = Arc::new(afterimage_dataplane::io::guest::Map::new(file.as_fd(), 0, len).unwrap());
    bed.inflight = Some(Arc::clone(&map));
    bed.ok(Command::SetInflight { queues: 1, size: 64, map });
    bed.add_rings(1, 64);
    let plain = Layout::default();
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &plain).status, status::OK);
    assert_eq!(bed.disk().durable, 0);
    bed.ok(Command::SetConfig { offset: CONFIG_WCE as u32, bytes: vec![0] });
    bed.restart();
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &plain).status, status::OK);
    assert_eq!(bed.disk().durable, 1, "another process, and nobody told it");
    bed.ok(Command::SetStatus(0));
    bed.ok(Command::SetFeatures(features));
    bed.start(0);
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &plain).status, status::OK);
    assert_eq!(bed.disk().durable, 2);
    // A driver that will not flush begins without a cache, whatever the one before had set.
    bed.ok(Command::SetConfig { offset: CONFIG_WCE as u32, bytes: vec![1] });
    bed.ok(Command::ResetDevice);
    bed.ok(Command::SetFeatures(features & !feature::FLUSH));
    bed.start(0);
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &plain).status, status::OK);
    assert_eq!(bed.disk().durable, 3);
}

#[test]
fn indices_begin_again_after_the_last_number() {
    for features in [ALL, ALL & !feature::EVENT_IDX] {
        let mut bed = bed(features);
        bed.add_ring(64);
        bed.go_on_at(0, u16::MAX - 20);
        describe(&mut bed, "nba", u32::from(u16::MAX - 20));
        bed.start_events(0);
        bed.settle();
        for sector in 0..40 {
            bed.rings[0].calls = 0;
            let data = pattern(sector, 512);
            // One at a time: each is kicked for and called for.
            assert_eq!(bed.ask(kind::OUT, sector, &data, 0, &Layout::default()).status, status::OK);
            bed.settle();
            assert!(bed.rings[0].calls > 0, "{sector}");
        }
        assert!(matches!(bed.command(Command::GetVringBase { queue: 0 }), Outcome::Reply(Reply::State(0, 19))));
    }
}

#[test]
fn a_new_area_for_requests_under_way_leaves_the_beginning_to_whoever_told_it() {
    let mut bed = bed(ALL);
    let (_, area) = share("inflight", inflight::bytes(1, 64)).unwrap();
    bed.ok(Command::SetInflight { queues: 1, size: 64, map: Arc::new(area) });
    bed.add_ring(64);
    bed.go_on_at(0, 7);
    let sent = bed.send(0, kind::FLUSH, 0, &[], 0, &Layout::default());
    describe(&mut bed, "nbake", 7);
    bed.kick(0);
    assert_eq!(bed.wait(&sent).status, status::OK);
    assert!(matches!(bed.command(Command::GetVringBase { queue: 0 }), Outcome::Reply(Reply::State(0, 8))));
}

#[test]
fn a_list_that_is_longer_than_its_lengths_can_say_is_refused() {
    let bed = bed(ALL);
    let table = Window::new(Arc::clone(&bed.map), 0, 16 * 600).unwrap();
    for count in [511u16, 513] {
        for at in 0..count {
            let flags = WRITE | if at + 1 < count { NEXT } else { 0 };
            bed.put_desc(0, at, Desc { addr: GUEST, len: 8 << 20, flags, next: at + 1 });
        }
        let memory = GuestMemory::new(vec![bed.region()]).unwrap();
        let mut chain = Chain::default();
        chain.walk(&table, 600, &memory, 0, false).unwrap();
        assert_eq!(chain.bad.is_some(), count > 512, "{} bytes", chain.writable_len());
    }
}

fn parsed(request: u32, payload: &[u8]) -> Result<Command<std::os::fd::OwnedFd>, message::Refused> {
    message::parse(&Header { request, need_reply: false, len: payload.len() }, payload, Vec::new())
}

#[test]
fn ranges_of_the_configuration_space_may_come_in_larger_messages() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    for padding in [0, 60, 256] {
        let mut payload = words(&[0, 60, 0]);
        payload.resize(12 + padding, 0);
        let Ok(Command::GetConfig { offset: 0, len: 60, flags: 0 }) = parsed(request::GET_CONFIG, &payload) else {
            panic!("{padding}")
        };
        let reply = Reply::Config(0, 0, vec![7; 60]);
        assert_eq!(reply.payload(payload.len()).len(), payload.len().max(72), "as long as the request");
    }
    let mut payload = words(&[32, 1, 0]);
    assert!(parsed(request::SET_CONFIG, &payload).is_err());
    payload.extend_from_slice(&[1, 9, 9]);
    let Ok(Command::SetConfig { offset: 32, bytes }) = parsed(request::SET_CONFIG, &payload) else { panic!() };
    assert_eq!(bytes, [1]);
    for (offset, len) in [(250, 7), (u32::MAX, 1), (0, 257), (1, u32::MAX)] {
        assert!(parsed(request::GET_CONFIG, &words(&[offset, len, 0])).is_err());
        let refused = refusal(request::GET_CONFIG, &words(&[offset, len, 1])).unwrap().payload(300);
        assert_eq!(refused, words(&[offset, 0, 1]), "a range without bytes");
    }
    assert_eq!(refusal(request::GET_INFLIGHT_FD, &[]).unwrap().payload(24), [0; 24]);
    assert!(refusal(request::GET_VRING_BASE, &[]).is_none() && refusal(request::SET_FEATURES, &[]).is_none());
}

#[test]
fn memory_is_taken_away_by_its_three_names_whatever_comes_along() {
    let mut bed = bed(ALL);
    let words: Vec<u8> = [0, GUEST, 8 << 20, USER, 0xdead].iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
    let (file, _) = share("extra", 4096).unwrap();
    let header = Header { request: request::REM_MEM_REG, need_reply: false, len: 40 };
    let Ok(Command::RemoveRegion { guest, user, len }) = message::parse(&header, &words, vec![file]) else { panic!() };
    for (guest, user, len) in [(guest + 1, user, len), (guest, user + 1, len), (guest, user, len - 1)] {
        assert!(matches!(bed.command(Command::RemoveRegion { guest, user, len }), Outcome::Refused(_)));
    }
    bed.ok(Command::RemoveRegion { guest, user, len });
}

#[test]
fn the_configuration_space_may_be_written_as_it_stands_but_for_the_cache() {
    let mut bed = Bed::with(24, MemDisk::new(1 << 20), ALL | feature::CONFIG_WCE, 1, 64);
    let Outcome::Reply(Reply::Config(_, _, all)) = bed.command(Command::GetConfig { offset: 0, len: 60, flags: 0 })
    else {
        panic!()
    };
    let with = |at: usize, byte: u8| {
        let mut bytes = all.clone();
        bytes[at] = byte;
        bytes
    };
    let set = |offset, bytes| Command::SetConfig { offset, bytes };
    bed.ok(set(0, with(CONFIG_WCE, 0)));
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &Layout::default()).status, status::OK);
    assert_eq!(bed.disk().durable, 1, "it writes through now");
    // The size is not the driver's; nor is there a third way; nor a byte that it could set alone.
    let lies =
        [(0, with(0, 77)), (0, with(34, 0)), (0, with(CONFIG_WCE, 2)), (20, all[20..24].to_vec()), (250, vec![0; 7])];
    for (offset, bytes) in lies {
        assert!(matches!(bed.command(set(offset, bytes)), Outcome::Refused(_)));
    }
    bed.ok(set(20, all[20..].to_vec()));
    assert_eq!(bed.ask(kind::OUT, 0, &pattern(1, 512), 0, &Layout::default()).status, status::OK);
    assert_eq!(bed.disk().durable, 1);
}

#[test]
fn an_area_for_longer_queues_serves_shorter_ones_and_a_shorter_one_does_not() {
    let plain = Layout::default();
    for (longest, works) in [(128, true), (64, true), (32, false)] {
        let mut bed = bed(ALL);
        let (_, area) = share("inflight", inflight::bytes(2, longest)).unwrap();
        let map = Arc::new(area);
        bed.ok(Command::SetInflight { queues: 2, size: longest, map: Arc::clone(&map) });
        bed.add_rings(2, 64);
        let event = bed.new_err(1);
        bed.ok(Command::VringErr { queue: 1, event: Some(event) });
        bed.disk().hold = true;
        let sent = bed.send(1, kind::OUT, 3, &pattern(1, 512), 0, &plain);
        bed.kick(1);
        bed.settle();
        assert_eq!(bed.server.counters().nonsense > 0, !works);
        if !works {
            continue;
        }
        // The next process takes it from the same area.
        bed.disk().writes.clear();
        bed.restart_without_queues();
        bed.ok(Command::SetInflight { queues: 2, size: longest, map });
        bed.start(0);
        bed.start(1);
        bed.kick(1);
        assert_eq!(bed.wait(&sent).status, status::OK);
        assert_eq!((bed.server.counters().again, bed.disk().writes.len()), (1, 1));
    }
}
