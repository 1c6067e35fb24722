//! Options as clients send them, good and bad.

use super::bed::{Bed, MemDisk, classes, go, meta, option_bytes};
use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::nbd::Limits;
use afterimage_dataplane::nbd::proto::{self, be16, be32, be64, cmd, error, flag, info, option, rep};

fn two_disks() -> Bed {
    let disks = vec![MemDisk::new(1, "system", 1 << 20), MemDisk::new(2, "data", 2 << 20)];
    Bed::with(1, Limits::default(), classes(), disks)
}

fn greeted(bed: &mut Bed) -> usize {
    let client = bed.connect();
    let greeting = bed.take(client, 18);
    assert_eq!(
        (be64(&greeting), be64(&greeting[8..]), be16(&greeting[16..])),
        (proto::GREETING, proto::OPTION_MAGIC, 3)
    );
    bed.send(client, &3u32.to_be_bytes());
    client
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let mut bed = two_disks();
    let client = bed.connect();
    bed.take(client, 18);
    bed.send(client, &7u32.to_be_bytes());
    assert!(bed.rest(client).is_empty());
}

#[test]
fn list_names_all_exports() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    bed.option(client, option::LIST, &[]);
    for name in ["system", "data"] {
        let (number, kind, data) = bed.option_reply(client);
        assert_eq!((number, kind, be32(&data) as usize), (option::LIST, rep::SERVER, name.len()));
        assert_eq!(&data[4..4 + name.len()], name.as_bytes());
        assert_eq!(&data[4 + name.len()..], format!("the disk {name}").as_bytes());
    }
    assert_eq!(bed.option_reply(client), (option::LIST, rep::ACK, vec![]));
}

#[test]
fn a_long_list_arrives_whole() {
    let disks = (0..3000).map(|n| MemDisk::new(n, &format!("disk number {n} of many"), 4096)).collect();
    let mut bed = Bed::with(1, Limits::default(), classes(), disks);
    let client = greeted(&mut bed);
    let twice = [option_bytes(option::LIST, &[]), option_bytes(option::LIST, &[])].concat();
    bed.send(client, &twice);
    for _ in 0..2 {
        for _ in 0..3000 {
            assert_eq!(bed.option_reply(client).1, rep::SERVER);
        }
        assert_eq!(bed.option_reply(client).1, rep::ACK);
    }
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    bed.option(client, option::ABORT, b"data that means nothing");
    assert_eq!(bed.option_reply(client), (option::ABORT, rep::ACK, vec![]));
    assert!(bed.rest(client).is_empty());
}

#[test]
fn abort_is_acknowledged_when_its_data_has_come() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    let whole = option_bytes(option::ABORT, &vec![b'x'; 100_000]);
    bed.send(client, &whole[..50_000]);
    bed.settle(1_000_000_000);
    assert!(bed.clients[client].input.is_empty() && !bed.clients[client].closed);
    bed.send(client, &whole[50_000..]);
    assert_eq!(bed.option_reply(client), (option::ABORT, rep::ACK, vec![]));
    assert!(bed.rest(client).is_empty());
    assert_eq!(bed.server.counters().violations, 0);
}

#[test]
fn unknown_options_are_skipped_with_their_data() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    for (number, data) in [(option::STARTTLS, vec![]), (11, vec![]), (0x7654321, vec![1; 100_000]), (4, vec![2; 3])] {
        bed.option(client, number, &data);
        assert_eq!(bed.option_reply(client), (number, rep::ERR_UNSUP, vec![]));
    }
    bed.option(client, option::LIST, &[]);
    assert_eq!(bed.option_reply(client).1, rep::SERVER);
}

#[test]
fn known_options_that_are_too_long_are_skipped() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    for number in [option::INFO, option::GO, option::SET_META_CONTEXT] {
        bed.option(client, number, &vec![0; 50_000]);
        assert_eq!(bed.option_reply(client), (number, rep::ERR_TOO_BIG, vec![]));
    }
    bed.option(client, option::GO, &go(&"n".repeat(5000), &[]));
    assert_eq!(bed.option_reply(client).1, rep::ERR_TOO_BIG);
}

#[test]
fn an_option_too_long_to_skip_ends_the_connection() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    let mut bytes = option_bytes(99, &[]);
    bytes[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    bed.send(client, &bytes);
    assert!(bed.rest(client).is_empty());
}

#[test]
fn another_protocol_is_noticed_early() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    bed.send(client, b"GET / HT");
    assert!(bed.rest(client).is_empty());
    assert_eq!(bed.server.counters().violations, 1);
}

#[test]
fn options_that_have_no_data_refuse_it() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    for (number, len) in [(option::LIST, 1), (option::STRUCTURED_REPLY, 1), (option::LIST, 50_000)] {
        bed.option(client, number, &vec![b'x'; len]);
        assert_eq!(bed.option_reply(client).1, rep::ERR_INVALID);
    }
}

#[test]
fn lengths_that_do_not_fit_are_invalid() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    bed.option(client, option::STRUCTURED_REPLY, &[]);
    assert_eq!(bed.option_reply(client).1, rep::ACK);
    let mut too_long = go("data", &[]);
    too_long[3] = 200;
    let mut short_list = go("data", &[1, 2]);
    short_list.truncate(short_list.len() - 1);
    let mut surplus = meta("data", &["base:allocation"]);
    surplus.push(0);
    let mut bad_query = meta("data", &["base:allocation"]);
    bad_query[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut bad_count = meta("data", &["base:allocation"]);
    bad_count[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    for (number, data) in [
        (option::GO, vec![]),
        (option::INFO, too_long),
        (option::GO, short_list),
        (option::SET_META_CONTEXT, surplus),
        (option::LIST_META_CONTEXT, bad_query),
        (option::SET_META_CONTEXT, bad_count),
        (option::SET_META_CONTEXT, vec![]),
    ] {
        bed.option(client, number, &data);
        assert_eq!(bed.option_reply(client).1, rep::ERR_INVALID);
    }
}

#[test]
fn info_tells_what_was_asked_and_does_not_enter() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    let infos = [info::BLOCK_SIZE, info::NAME, info::DESCRIPTION, 77];
    for number in [option::INFO, option::GO] {
        bed.option(client, number, &go("data", &infos));
        let mut seen = Vec::new();
        loop {
            let (_, kind, data) = bed.option_reply(client);
            if kind == rep::ACK {
                break;
            }
            assert_eq!(kind, rep::INFO);
            match be16(&data) {
                info::EXPORT => {
                    assert_eq!((be64(&data[2..]), data.len()), (2 << 20, 12));
                    assert_eq!(
                        be16(&data[10..]) & (flag::HAS_FLAGS | flag::READ_ONLY | flag::SEND_DF),
                        flag::HAS_FLAGS
                    );
                }
                info::NAME => assert_eq!(&data[2..], b"data"),
                info::DESCRIPTION => assert_eq!(&data[2..], b"the disk data"),
                info::BLOCK_SIZE => {
                    assert_eq!((be32(&data[2..]), be32(&data[6..]), be32(&data[10..])), (1, 4096, 32 << 20));
                }
                other => panic!("information {other}"),
            }
            seen.push(be16(&data));
        }
        seen.sort_unstable();
        assert_eq!(seen, [info::EXPORT, info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]);
    }
    bed.request(client, cmd::READ, 0, 1, 0, 512);
    assert_eq!(bed.error(client), 0);
}

#[test]
fn an_unknown_export_can_be_followed_by_a_known_one() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    for name in ["nothing", "", "dat", "data "] {
        bed.option(client, option::GO, &go(name, &[]));
        assert_eq!(bed.option_reply(client).1, rep::ERR_UNKNOWN, "{name}");
    }
    bed.option(client, option::GO, &go("system", &[]));
    assert_eq!(bed.option_reply(client).1, rep::INFO);
}

#[test]
fn the_empty_name_is_the_only_export() {
    let mut bed = Bed::new(1);
    let client = greeted(&mut bed);
    bed.option(client, option::GO, &go("", &[info::NAME]));
    assert_eq!(bed.option_reply(client).1, rep::INFO);
    assert_eq!(&bed.option_reply(client).2[2..], b"disk");
}

#[test]
fn export_name_enters_with_and_without_zeroes() {
    let mut bed = Bed::new(1);
    for (flags, len) in [(3u32, 10), (1, 134), (0, 134)] {
        let client = bed.connect();
        bed.take(client, 18);
        bed.send(client, &flags.to_be_bytes());
        // A request may follow at once: this option has no error that the client would have to wait for.
        bed.option(client, option::EXPORT_NAME, b"disk");
        bed.request(client, cmd::READ, 0, 1, 0, 512);
        let reply = bed.take(client, len);
        assert_eq!(be64(&reply), 8 << 20);
        assert!(reply[10..].iter().all(|&b| b == 0));
        assert_eq!(bed.error(client), 0);
    }
}

#[test]
fn export_name_of_nothing_ends_the_connection() {
    let mut bed = two_disks();
    for name in ["nothing", ""] {
        let client = greeted(&mut bed);
        bed.option(client, option::EXPORT_NAME, name.as_bytes());
        assert!(bed.rest(client).is_empty());
    }
}

#[test]
fn a_read_only_disk_says_so_and_a_disk_without_discard_offers_none() {
    let mut bed = two_disks();
    bed.disks.0[0].export.geometry.read_only = true;
    bed.disks.0[1].export.geometry.discard = false;
    let client = greeted(&mut bed);
    let mut flags = |name| {
        bed.option(client, option::INFO, &go(name, &[]));
        let data = bed.option_reply(client).2;
        bed.option_reply(client);
        be16(&data[10..])
    };
    let always = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    assert_eq!(flags("system"), always | flag::READ_ONLY);
    assert_eq!(flags("data"), always | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO);
}

#[test]
fn metadata_contexts_are_listed_and_set() {
    let mut bed = two_disks();
    let client = greeted(&mut bed);
    bed.option(client, option::SET_META_CONTEXT, &meta("data", &["base:allocation"]));
    assert_eq!(bed.option_reply(client).1, rep::ERR_INVALID, "structured replies come first");
    bed.option(client, option::STRUCTURED_REPLY, &[]);
    assert_eq!(bed.option_reply(client).1, rep::ACK);
    let list = option::LIST_META_CONTEXT;
    let set = option::SET_META_CONTEXT;
    for (number, queries, found) in [
        (list, vec![], true),
        (list, vec!["base:"], true),
        (list, vec!["base:allocation", "base:allocation"], true),
        (list, vec!["x-nosuch:", "qemu:dirty-bitmap:a", "base", "base:other"], false),
        (set, vec![], false),
        (set, vec!["base:"], false),
        (set, vec!["x-nosuch:", "base:allocation"], true),
    ] {
        bed.option(client, number, &meta("data", &queries));
        if found {
            let (_, kind, data) = bed.option_reply(client);
            assert_eq!((kind, &data[4..]), (rep::META_CONTEXT, &b"base:allocation"[..]));
        }
        assert_eq!(bed.option_reply(client).1, rep::ACK, "{queries:?}");
    }
    bed.option(client, list, &meta("nothing", &[]));
    assert_eq!(bed.option_reply(client).1, rep::ERR_UNKNOWN);
}

#[test]
fn a_context_holds_for_the_export_it_was_set_for() {
    for (name, queries, expected) in [
        ("data", vec!["base:allocation"], 0),
        ("system", vec!["base:allocation"], error::EINVAL),
        ("data", vec!["base:"], error::EINVAL),
        ("nothing", vec!["base:allocation"], error::EINVAL),
    ] {
        let mut bed = two_disks();
        let client = greeted(&mut bed);
        bed.option(client, option::STRUCTURED_REPLY, &[]);
        bed.option_reply(client);
        bed.option(client, option::SET_META_CONTEXT, &meta("data", &["base:allocation"]));
        bed.option_reply(client);
        bed.option_reply(client);
        bed.option(client, option::SET_META_CONTEXT, &meta(name, &queries));
        while !matches!(bed.option_reply(client).1, rep::ACK | rep::ERR_UNKNOWN) {}
        bed.option(client, option::GO, &go("data", &[]));
        while bed.option_reply(client).1 != rep::ACK {}
        bed.request(client, cmd::BLOCK_STATUS, 0, 1, 0, 4096);
        match bed.message(client) {
            super::bed::Message::Chunk { kind: proto::chunk::BLOCK_STATUS, .. } => assert_eq!(expected, 0),
            super::bed::Message::Chunk { payload, .. } => assert_eq!(be32(&payload), expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_client_that_says_nothing_is_dropped_in_time() {
    let mut bed = two_disks();
    let silent = bed.connect();
    let slow = greeted(&mut bed);
    bed.settle(40_000_000_000);
    bed.option(slow, option::LIST, &[]);
    bed.settle(30_000_000_000);
    assert!(bed.clients[silent].closed && !bed.clients[slow].closed);
    bed.settle(61_000_000_000);
    assert!(bed.clients[slow].closed && bed.server.is_idle());
}

#[test]
fn a_client_in_transmission_may_be_silent() {
    let mut bed = Bed::new(1);
    let client = bed.serving(true);
    bed.settle(600_000_000_000);
    assert_eq!(bed.read(client, 0, 0, 512), Ok(vec![0; 512]));
}

#[test]
fn one_client_too_many_is_turned_away() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let mut bed = Bed::with(1, limits, classes(), vec![MemDisk::new(7, "disk", 1 << 20)]);
    let first = bed.serving(true);
    bed.connect();
    let third = bed.connect();
    assert!(bed.rest(third).is_empty());
    bed.hang_up(first);
    bed.settle(1_000_000_000);
    bed.serving(true);
}

#[test]
fn clients_that_say_nothing_do_not_keep_others_out() {
    let limits = Limits { connections: 3, ..Limits::default() };
    let mut bed = Bed::with(1, limits, classes(), vec![MemDisk::new(7, "disk", 1 << 20)]);
    let serving = bed.serving(true);
    let silent = [bed.connect(), bed.connect()];
    bed.settle(3_000_000_000);
    bed.serving(true);
    bed.settle(1_000_000_000);
    assert!(bed.clients[silent[0]].closed && !bed.clients[silent[1]].closed);
    assert_eq!(bed.read(serving, 0, 0, 1), Ok(vec![0]));
}
