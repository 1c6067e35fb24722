//! What each request does, and the error each bad one gets.

use super::bed::{Bed, MemDisk, Message, classes, go, pattern};
use afterimage_dataplane::host::{FrontEnd as _, MAX_PART};
use afterimage_dataplane::io::Errno;
use afterimage_dataplane::nbd::Limits;
use afterimage_dataplane::nbd::proto::{MAX_PAYLOAD, be32, chunk, cmd, cmd_flag, error, info, option, rep};

#[test]
fn a_write_reads_back_by_simple_replies() {
    let mut bed = Bed::new(1);
    let client = bed.serving(false);
    let data = pattern(1, 5000);
    bed.write(client, 0, 11, 700, &data);
    assert_eq!(bed.message(client), Message::Simple { error: 0, cookie: 11 });
    bed.request(client, cmd::READ, 0, 12, 700, 5000);
    assert_eq!(bed.message(client), Message::Simple { error: 0, cookie: 12 });
    assert_eq!(bed.take(client, 5000), data);
}

#[test]
fn a_write_reads_back_by_structured_replies() {
    let mut bed = Bed::new(2);
    let client = bed.serving(true);
    let data = pattern(2, 3 * MAX_PART);
    bed.write(client, 0, 11, 4096 + 512, &data);
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.read(client, 0, 4096 + 512, data.len() as u32), Ok(data.clone()));
    assert_eq!(bed.read(client, cmd_flag::DF, 4096 + 512, data.len() as u32), Ok(data));
}

#[test]
fn an_unfragmented_read_comes_in_one_chunk() {
    let mut bed = Bed::new(3);
    let client = bed.serving(true);
    bed.request(client, cmd::READ, cmd_flag::DF, 5, 1, 1 << 20);
    let Message::Chunk { flags, kind, payload, .. } = bed.message(client) else { panic!() };
    assert_eq!((flags, kind, payload.len()), (chunk::DONE, chunk::OFFSET_DATA, 8 + (1 << 20)));
}

#[test]
fn an_unfragmented_read_that_is_too_long_overflows() {
    let mut bed = Bed::new(3);
    let client = bed.serving(true);
    assert_eq!(bed.read(client, cmd_flag::DF, 0, 8 << 20), Err(error::EOVERFLOW));
    assert_eq!(bed.read(client, cmd_flag::DF, 0, 65536), Ok(vec![0; 65536]));
}

#[test]
fn a_read_of_the_whole_disk_by_one_simple_reply() {
    let mut bed = Bed::new(4);
    let client = bed.serving(false);
    let data = pattern(3, 8 << 20);
    bed.disk().data.copy_from_slice(&data);
    bed.disk().late = true;
    bed.request(client, cmd::READ, 0, 1, 0, 8 << 20);
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.take(client, 8 << 20), data);
}

#[test]
fn nothing_gets_between_the_pieces_of_a_long_simple_reply() {
    for len in [3 << 20, 7 << 20] {
        let mut bed = Bed::new(4);
        let client = bed.serving(false);
        let data = pattern(3, 8 << 20);
        bed.disk().data.copy_from_slice(&data);
        bed.disk().late = true;
        for cookie in 0..40 {
            match cookie % 4 {
                0 => bed.request(client, cmd::READ, 0, cookie, cookie * 512, len),
                1 => bed.request(client, cmd::READ, 0, cookie, cookie * 512, 4096),
                _ => bed.request(client, cmd::FLUSH, 0, cookie, 0, 0),
            }
        }
        for _ in 0..40 {
            let Message::Simple { error: 0, cookie } = bed.message(client) else { panic!("no success") };
            let len = [len, 4096, 0, 0][cookie as usize % 4] as usize;
            let at = cookie as usize * 512;
            assert!(bed.take(client, len) == data[at..at + len], "the data of {cookie}");
        }
    }
}

#[test]
fn fua_reaches_the_disk_with_each_part() {
    let mut bed = Bed::new(5);
    let client = bed.serving(false);
    bed.write(client, cmd_flag::FUA, 1, 0, &pattern(1, MAX_PART + 1));
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.disk().durable_writes, 2);
}

#[test]
fn a_flush_reaches_the_disk_and_has_no_range() {
    let mut bed = Bed::new(6);
    let client = bed.serving(false);
    bed.request(client, cmd::FLUSH, cmd_flag::FUA, 1, 0, 0);
    assert_eq!(bed.error(client), 0);
    bed.request(client, cmd::FLUSH, 0, 2, 512, 512);
    assert_eq!(bed.error(client), error::EINVAL);
    assert_eq!(bed.disk().flushes, 1);
}

#[test]
fn zeroes_and_trims_of_any_length() {
    let mut bed = Bed::new(7);
    let client = bed.serving(true);
    bed.write(client, 0, 1, 0, &pattern(1, 2 << 20));
    assert_eq!(bed.error(client), 0);
    bed.request(client, cmd::WRITE_ZEROES, cmd_flag::NO_HOLE | cmd_flag::FUA, 2, 10, (1 << 20) - 10);
    assert_eq!(bed.error(client), 0);
    bed.request(client, cmd::TRIM, cmd_flag::FUA, 3, 1 << 20, 7 << 20);
    assert_eq!(bed.error(client), 0);
    let now = bed.read(client, 0, 0, 8 << 20).expect("readable");
    assert_eq!(now[..10], pattern(1, 10));
    assert!(now[10..].iter().all(|&b| b == 0));
}

#[test]
fn fast_zeroing_that_would_be_slow_is_not_supported() {
    let mut bed = Bed::new(8);
    let client = bed.serving(true);
    bed.request(client, cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 1, 0, 4096);
    assert_eq!(bed.error(client), error::ENOTSUP);
}

#[test]
fn what_lies_beyond_the_end_is_refused() {
    let mut bed = Bed::new(9);
    let client = bed.serving(true);
    let end = 8 << 20;
    for (kind, expected) in [
        (cmd::READ, error::EINVAL),
        (cmd::TRIM, error::EINVAL),
        (cmd::CACHE, error::EINVAL),
        (cmd::BLOCK_STATUS, error::EINVAL),
        (cmd::WRITE_ZEROES, error::ENOSPC),
    ] {
        for offset in [end, end - 511, u64::MAX, u64::MAX - 511] {
            bed.request(client, kind, 0, 1, offset, 512);
            assert_eq!(bed.error(client), expected, "command {kind} at {offset}");
        }
    }
    bed.write(client, 0, 1, end - 100, &pattern(1, 101));
    assert_eq!(bed.error(client), error::ENOSPC);
    assert_eq!(bed.disk().requests, 0);
}

#[test]
fn an_empty_range_is_refused_and_the_connection_goes_on() {
    let mut bed = Bed::new(10);
    let client = bed.serving(true);
    for kind in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS] {
        bed.request(client, kind, 0, 1, 0, 0);
        assert_eq!(bed.error(client), error::EINVAL, "command {kind}");
    }
    assert_eq!(bed.read(client, 0, 0, 1), Ok(vec![0]));
}

#[test]
fn unknown_commands_and_flags_are_refused() {
    let mut bed = Bed::new(11);
    let client = bed.serving(true);
    for (kind, flags) in [
        (8, 0),
        (0xffff, 0),
        (cmd::READ, 1 << 15),
        (cmd::READ, cmd_flag::NO_HOLE),
        (cmd::FLUSH, cmd_flag::DF),
        (cmd::TRIM, cmd_flag::FAST_ZERO),
        (cmd::CACHE, cmd_flag::REQ_ONE),
        (cmd::BLOCK_STATUS, cmd_flag::DF),
        (cmd::WRITE_ZEROES, 1 << 5),
    ] {
        bed.request(client, kind, flags, 1, 0, if kind == cmd::FLUSH { 0 } else { 512 });
        assert_eq!(bed.error(client), error::EINVAL, "command {kind} flags {flags}");
    }
    bed.write(client, cmd_flag::DF, 1, 0, &pattern(1, 100_000));
    assert_eq!(bed.error(client), error::EINVAL);
    assert_eq!(bed.disk().requests, 0);
    assert_eq!(bed.read(client, 0, 0, 1), Ok(vec![0]), "the payload was skipped");
}

#[test]
fn do_not_fragment_needs_structured_replies() {
    let mut bed = Bed::new(11);
    let client = bed.serving(false);
    bed.request(client, cmd::READ, cmd_flag::DF, 1, 0, 512);
    assert_eq!(bed.error(client), error::EINVAL);
    bed.request(client, cmd::BLOCK_STATUS, 0, 1, 0, 512);
    assert_eq!(bed.error(client), error::EINVAL);
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let mut bed = Bed::new(12);
    bed.disk().export.geometry.read_only = true;
    let client = bed.serving(true);
    bed.write(client, 0, 1, 0, &pattern(1, 70_000));
    assert_eq!(bed.error(client), error::EPERM);
    for kind in [cmd::TRIM, cmd::WRITE_ZEROES] {
        bed.request(client, kind, 0, 1, 0, 512);
        assert_eq!(bed.error(client), error::EPERM);
    }
    assert_eq!(bed.disk().requests, 0);
    assert_eq!(bed.read(client, 0, 0, 512), Ok(vec![0; 512]));
}

#[test]
fn too_long_a_payload_is_skipped_and_refused() {
    let mut bed = Bed::with(13, Limits::default(), classes(), vec![MemDisk::new(7, "disk", 40 << 20)]);
    let (client, simple) = (bed.serving(true), bed.serving(false));
    for (client, long_read) in [(client, error::EOVERFLOW), (simple, error::EINVAL)] {
        bed.write(client, 0, 1, 0, &vec![1; MAX_PAYLOAD as usize + 1]);
        assert_eq!(bed.error(client), error::EINVAL);
        bed.request(client, cmd::READ, 0, 1, 0, MAX_PAYLOAD + 1);
        assert_eq!(bed.error(client), long_read);
        // Too long and past the end: the end counts.
        bed.request(client, cmd::READ, 0, 1, 8 << 20, MAX_PAYLOAD + 1);
        assert_eq!(bed.error(client), error::EINVAL);
        bed.write(client, 0, 1, 8 << 20, &vec![1; MAX_PAYLOAD as usize + 1]);
        assert_eq!(bed.error(client), error::ENOSPC);
    }
    assert_eq!(bed.read(client, 0, 0, 512), Ok(vec![0; 512]));
    bed.request(client, cmd::WRITE, 0, 1, 0, u32::MAX);
    bed.rest(client);
    assert_eq!(bed.server.counters().violations, 1);
}

#[test]
fn a_refused_write_is_answered_when_its_payload_has_gone() {
    let mut bed = Bed::new(13);
    let client = bed.serving(true);
    bed.request(client, cmd::WRITE, 0, 1, 8 << 20, 100_000);
    bed.send(client, &vec![1; 99_999]);
    bed.settle(1_000_000_000);
    assert!(bed.clients[client].input.is_empty());
    bed.send(client, &[1]);
    assert_eq!(bed.error(client), error::ENOSPC);
}

#[test]
fn block_status_joins_extents() {
    let mut bed = Bed::new(14);
    let client = bed.serving(true);
    bed.write(client, 0, 1, 40960, &pattern(1, 81920));
    assert_eq!(bed.error(client), 0);
    let mut status = |flags, offset, len| {
        bed.request(client, cmd::BLOCK_STATUS, flags, 2, offset, len);
        let Message::Chunk { flags, kind, payload, .. } = bed.message(client) else { panic!() };
        assert_eq!((flags, kind, be32(&payload)), (chunk::DONE, chunk::BLOCK_STATUS, 1));
        payload[4..].chunks(8).map(|e| (be32(e), be32(&e[4..]))).collect::<Vec<_>>()
    };
    assert_eq!(status(0, 0, 8 << 20), [(40960, 3), (81920, 0), ((8 << 20) - 122880, 3)]);
    assert_eq!(status(0, 1, 40960), [(40959, 3), (1, 0)]);
    assert_eq!(status(cmd_flag::REQ_ONE, 100, 8192), [(8192, 3)]);
    assert_eq!(status(cmd_flag::REQ_ONE, 40960, 1 << 20), [(81920, 0)]);
}

#[test]
fn block_status_is_cut_and_goes_on_where_it_ended() {
    let mut bed = Bed::new(15);
    let client = bed.serving(true);
    for block in (0..2048).step_by(2) {
        bed.disk().written[block] = true;
    }
    let (mut at, mut extents) = (0, 0);
    while at < 8 << 20 {
        bed.request(client, cmd::BLOCK_STATUS, 0, 2, at, (8 << 20) - at as u32);
        let Message::Chunk { payload, .. } = bed.message(client) else { panic!() };
        for extent in payload[4..].chunks(8) {
            assert_eq!((be32(extent), be32(&extent[4..])), (4096, if (at / 4096).is_multiple_of(2) { 0 } else { 3 }));
            at += 4096;
            extents += 1;
        }
    }
    assert_eq!(extents, 2048);
}

#[test]
fn where_the_disk_cannot_tell_its_status_is_data() {
    let mut bed = Bed::new(16);
    let client = bed.serving(true);
    bed.disk().fail = Some((0..1 << 30, Errno::IO));
    bed.request(client, cmd::BLOCK_STATUS, 0, 2, 4096, 8192);
    let Message::Chunk { payload, .. } = bed.message(client) else { panic!() };
    assert_eq!((be32(&payload[4..]), be32(&payload[8..])), (8192, 0));
}

#[test]
fn an_error_of_the_disk_reaches_the_client() {
    let mut bed = Bed::new(17);
    bed.disk().fail = Some((MAX_PART as u64..MAX_PART as u64 + 1, Errno::IO));
    bed.disk().late = true;
    let simple = bed.serving(false);
    bed.request(simple, cmd::READ, 0, 1, 0, 3 * MAX_PART as u32);
    assert_eq!(bed.error(simple), error::EIO);
    bed.write(simple, 0, 1, 0, &pattern(1, 3 * MAX_PART));
    assert_eq!(bed.error(simple), error::EIO);
    bed.request(simple, cmd::READ, 0, 1, 0, 512);
    assert_eq!(bed.error(simple), 0);
    let structured = bed.serving(true);
    assert_eq!(bed.read(structured, 0, 0, 3 * MAX_PART as u32), Err(error::EIO));
    assert_eq!(bed.read(structured, cmd_flag::DF, 0, 3 * MAX_PART as u32), Err(error::EIO));
    assert!(bed.read(structured, 0, 0, 512).is_ok());
}

#[test]
fn an_error_behind_a_header_that_promised_success_ends_the_connection() {
    let mut bed = Bed::new(18);
    bed.disk().fail = Some(((8 << 20) - 1..8 << 20, Errno::IO));
    let client = bed.serving(false);
    bed.request(client, cmd::READ, 0, 1, 0, 8 << 20);
    let sent = bed.rest(client);
    assert!(sent.len() < 8 << 20);
}

#[test]
fn disconnect_answers_what_is_under_way_first() {
    let mut bed = Bed::new(19);
    bed.disk().late = true;
    let client = bed.serving(false);
    for cookie in 0..20 {
        bed.write(client, 0, cookie, cookie * 4096, &pattern(cookie, 4096));
    }
    bed.request(client, cmd::DISC, 0, 99, 0, 0);
    assert_eq!(bed.rest(client).len(), 20 * 16);
    assert_eq!(bed.disk().data[19 * 4096..20 * 4096], pattern(19, 4096));
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
}

#[test]
fn a_client_that_hangs_up_in_mid_payload_is_forgotten() {
    let mut bed = Bed::new(20);
    let client = bed.serving(false);
    bed.request(client, cmd::WRITE, 0, 1, 0, 1 << 20);
    bed.send(client, &pattern(1, 600_000));
    bed.settle(1_000_000_000);
    bed.hang_up(client);
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
    let free = bed.server_io_free();
    assert_eq!(free, bed.server_io_total(), "every buffer came back");
}

#[test]
fn connections_share_a_disk() {
    let mut bed = Bed::new(21);
    let (a, b) = (bed.serving(true), bed.serving(false));
    bed.write(a, 0, 1, 0, &pattern(5, 4096));
    assert_eq!(bed.error(a), 0);
    bed.request(b, cmd::READ, 0, 2, 0, 4096);
    assert_eq!(bed.error(b), 0);
    assert_eq!(bed.take(b, 4096), pattern(5, 4096));
    assert_eq!(bed.server.status()[0].clients, 2);
}

#[test]
fn closing_an_export_drops_its_clients() {
    let mut bed = Bed::new(22);
    bed.disk().late = true;
    let client = bed.serving(true);
    bed.request(client, cmd::READ, 0, 1, 0, 4096);
    bed.settle(700_000);
    let key = bed.disk().export.key;
    bed.disks.0.clear();
    bed.close_export(key);
    bed.rest(client);
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
}

#[test]
fn an_export_that_vanishes_drops_its_clients() {
    let mut bed = Bed::new(23);
    let client = bed.serving(true);
    bed.disks.0.clear();
    bed.request(client, cmd::READ, 0, 1, 0, 4096);
    bed.rest(client);
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
}

#[test]
fn shutting_down_answers_what_is_under_way() {
    let mut bed = Bed::new(24);
    bed.disk().late = true;
    let client = bed.serving(false);
    let idle = bed.serving(false);
    bed.write(client, 0, 1, 0, &pattern(5, 4096));
    while bed.disk().requests == 0 {
        assert!(bed.step());
    }
    bed.shutdown();
    assert_eq!(bed.rest(client).len(), 16);
    assert!(bed.rest(idle).is_empty());
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
}

#[test]
fn shutting_down_does_not_fail_a_write_that_was_not_received() {
    let mut bed = Bed::new(26);
    let client = bed.serving(false);
    bed.request(client, cmd::WRITE, 0, 1, 0, 2 << 20);
    bed.send(client, &pattern(5, 1 << 20));
    bed.settle(10_000_000);
    bed.shutdown();
    assert!(bed.rest(client).is_empty(), "a client that connects again asks again");
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
}

#[test]
fn a_disk_that_is_taken_away_fails_no_request() {
    for late in [false, true] {
        let mut bed = Bed::new(27);
        bed.disk().late = late;
        bed.disk().fail = Some((0..1 << 30, Errno::SHUTDOWN));
        for structured in [false, true] {
            let client = bed.serving(structured);
            bed.write(client, 0, 1, 0, &pattern(5, 4096));
            bed.request(client, cmd::READ, 0, 2, 0, 3 * MAX_PART as u32);
            assert!(bed.rest(client).is_empty());
        }
        bed.settle(1_000_000_000);
        assert!(bed.server.is_idle());
        assert_eq!(bed.server_io_free(), bed.server_io_total());
    }
}

#[test]
fn a_client_that_did_not_ask_for_the_sizes_is_not_bound_by_them() {
    let mut bed = Bed::with(28, Limits::default(), classes(), vec![MemDisk::new(7, "disk", 50 << 20)]);
    for (infos, expected) in [(&[][..], 0), (&[info::BLOCK_SIZE][..], error::EINVAL)] {
        let client = bed.connect();
        bed.take(client, 18);
        bed.send(client, &3u32.to_be_bytes());
        bed.option(client, option::GO, &go("disk", infos));
        while bed.option_reply(client).1 != rep::ACK {}
        bed.write(client, 0, 1, 0, &vec![1; (40 << 20) + 1]);
        assert_eq!(bed.error(client), expected);
    }
}

#[test]
fn a_client_that_could_not_be_told_the_longest_payload_may_send_more() {
    let mut bed = Bed::with(25, Limits::default(), classes(), vec![MemDisk::new(7, "disk", 50 << 20)]);
    let client = bed.connect();
    bed.take(client, 18);
    bed.send(client, &3u32.to_be_bytes());
    bed.option(client, option::EXPORT_NAME, b"disk");
    bed.take(client, 10);
    let data = pattern(1, 40 << 20);
    bed.write(client, 0, 1, 1024, &data);
    assert_eq!(bed.error(client), 0);
    bed.request(client, cmd::READ, 0, 2, 1024, 40 << 20);
    assert_eq!(bed.error(client), 0);
    assert!(bed.take(client, 40 << 20) == data);
    bed.request(client, cmd::READ, 0, 3, 0, (64 << 20) + 1);
    assert_eq!(bed.error(client), error::EINVAL);
}
