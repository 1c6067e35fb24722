//! Every command with every flag at every kind of place, judged by the protocol's text and not by the server's code; and
//! options in orders that clients seldom send.

use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::nbd::Limits;
use afterimage_dataplane::nbd::proto::{self, be32, be64, chunk, cmd, cmd_flag, error, info, option, rep, state};

use super::bed::{Bed, Client, MemDisk, Message, classes, go, meta, option_bytes, pattern};

/// Not a multiple of a page, and longer than one part.
const SIZE: u64 = (1 << 20) + 1536;

/// Options that this server has not, and that clients try first.
const STARTTLS: u32 = 5;
const EXTENDED_HEADERS: u32 = 11;

/// What the text has a server say, 0 for success.
fn expected(kind: u16, flags: u16, offset: u64, len: u32, structured: bool) -> u32 {
    let known = match kind {
        cmd::READ if structured => cmd_flag::FUA | cmd_flag::DF,
        cmd::READ | cmd::WRITE | cmd::FLUSH | cmd::TRIM | cmd::CACHE => cmd_flag::FUA,
        cmd::WRITE_ZEROES => cmd_flag::FUA | cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
        cmd::BLOCK_STATUS if structured => cmd_flag::FUA | cmd_flag::REQ_ONE,
        _ => return error::EINVAL,
    };
    let end = u128::from(offset) + u128::from(len);
    match kind {
        _ if flags & !known != 0 => error::EINVAL,
        cmd::FLUSH => u32::from(offset != 0 || len != 0) * error::EINVAL,
        _ if len == 0 => error::EINVAL,
        cmd::WRITE | cmd::WRITE_ZEROES if end > u128::from(SIZE) => error::ENOSPC,
        _ if end > u128::from(SIZE) => error::EINVAL,
        cmd::WRITE_ZEROES if flags & cmd_flag::FAST_ZERO != 0 => error::ENOTSUP,
        _ => 0,
    }
}

/// The extents of a reply to a block status: lengths and states.
fn extents(message: Message, cookie: u64) -> Vec<(u32, u32)> {
    let Message::Chunk { flags, kind, cookie: got, payload } = message else { panic!("not a chunk") };
    assert_eq!((flags, kind, got, payload.len() % 8), (chunk::DONE, chunk::BLOCK_STATUS, cookie, 4));
    payload[4..].chunks_exact(8).map(|two| (be32(two), be32(&two[4..]))).collect()
}

/// A read by simple reply.
fn simple_read(bed: &mut Bed, client: usize, len: u32, cookie: u64) -> Vec<u8> {
    assert_eq!(bed.message(client), Message::Simple { error: 0, cookie });
    bed.take(client, len as usize)
}

#[test]
fn every_command_with_every_flag_at_every_kind_of_place_gets_what_the_text_says() {
    let places = [0, 1, 511, 4095, 65_536, SIZE - 512, SIZE - 1, SIZE, SIZE + 1, 1 << 63, u64::MAX];
    for structured in [true, false] {
        let mut bed = Bed::with(1, Limits::default(), classes(), vec![MemDisk::new(7, "disk", SIZE as usize)]);
        let client = bed.serving(structured);
        let mut model = vec![0; SIZE as usize];
        let (mut cookie, mut done, mut refused) = (0u64, 0, 0);
        for kind in [0, 1, 3, 4, 5, 6, 7, 8, 0x100, 0xffff] {
            for flags in (0..64).chain([1 << 8, 1 << 15, 0xffff]) {
                for offset in places {
                    let whole = SIZE.saturating_sub(offset).min(u64::from(u32::MAX)) as u32;
                    for len in [0, 1, 512, whole, whole.saturating_add(1)] {
                        if len > 70_000 && flags > 2 {
                            continue; // the longest few times only
                        }
                        cookie += 1;
                        let want = expected(kind, flags, offset, len, structured);
                        let bytes = pattern(cookie, if kind == cmd::WRITE { len as usize } else { 0 });
                        if kind == cmd::WRITE {
                            bed.write(client, flags, cookie, offset, &bytes);
                        } else {
                            bed.request(client, kind, flags, cookie, offset, len);
                        }
                        let what = format!("{kind} flags {flags} at {offset} of {len}, structured {structured}");
                        if want != 0 {
                            refused += 1;
                            assert_eq!(bed.error(client), want, "{what}");
                            continue;
                        }
                        done += 1;
                        let range = offset as usize..offset as usize + len as usize;
                        match kind {
                            cmd::READ if structured => {
                                let mut found = vec![0; len as usize];
                                loop {
                                    let Message::Chunk { flags: last, kind, cookie: got, payload } =
                                        bed.message(client)
                                    else {
                                        panic!("{what}: a simple reply to a read")
                                    };
                                    assert_eq!((kind, got), (chunk::OFFSET_DATA, cookie), "{what}");
                                    let at = (be64(&payload) - offset) as usize;
                                    found[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                                    if last == chunk::DONE {
                                        break;
                                    }
                                    assert_eq!(flags & cmd_flag::DF, 0, "{what}: in pieces");
                                }
                                assert!(found == model[range], "{what}");
                            }
                            cmd::READ => assert!(simple_read(&mut bed, client, len, cookie) == model[range], "{what}"),
                            cmd::BLOCK_STATUS => {
                                let found = extents(bed.message(client), cookie);
                                let told: u64 = found.iter().map(|(len, _)| u64::from(*len)).sum();
                                assert!(found.iter().all(|(len, _)| *len > 0), "{what}: {found:?}");
                                assert!(told <= u64::from(len), "{what}: {found:?}");
                                if flags & cmd_flag::REQ_ONE != 0 {
                                    assert_eq!(found.len(), 1, "{what}");
                                }
                                let mut at = offset as usize;
                                for (len, what_it_is) in found {
                                    let end = at + len as usize;
                                    let zeros = what_it_is & state::ZERO != 0;
                                    assert!(!zeros || model[at..end].iter().all(|byte| *byte == 0), "{what}");
                                    at = end;
                                }
                            }
                            _ => {
                                assert_eq!(bed.message(client), Message::Simple { error: 0, cookie }, "{what}");
                                match kind {
                                    cmd::WRITE => model[range].copy_from_slice(&bytes),
                                    cmd::WRITE_ZEROES => model[range].fill(0),
                                    cmd::TRIM => {
                                        // This disk drops whole blocks.
                                        let (first, last) =
                                            (range.start.div_ceil(4096) * 4096, range.end / 4096 * 4096);
                                        if first < last {
                                            model[first..last].fill(0);
                                        }
                                    }
                                    _ => {}
                                }
                            }
                        }
                    }
                }
            }
            assert!(bed.disk().data == model, "after command {kind}");
        }
        assert!(done > 200 && refused > 5000, "{done} done, {refused} refused");
    }
}

/// A client that has heard the greeting, and whose flags are sent.
fn greeted(bed: &mut Bed) -> usize {
    let client = bed.connect();
    bed.take(client, 18);
    bed.send(client, &3u32.to_be_bytes());
    client
}

#[test]
fn options_that_it_has_not_are_refused_and_the_older_ways_go_on() {
    let mut bed = Bed::new(2);
    let client = greeted(&mut bed);
    // As newer clients begin: TLS if there is any, extended headers, else structured replies; some ask twice.
    let order = [(STARTTLS, false), (EXTENDED_HEADERS, false), (option::STRUCTURED_REPLY, true)];
    for (number, known) in order.into_iter().chain(order) {
        bed.option(client, number, &[]);
        let reply = if known { rep::ACK } else { rep::ERR_UNSUP };
        assert_eq!(bed.option_reply(client), (number, reply, vec![]));
    }
    // Contexts are replaced by each option that sets some: none is left of the first.
    for (queries, found) in [(vec!["base:allocation"], 1), (vec!["x:y", "base:allocation", "base:allocation"], 1)] {
        bed.option(client, option::SET_META_CONTEXT, &meta("disk", &queries));
        for _ in 0..found {
            assert_eq!(bed.option_reply(client).1, rep::META_CONTEXT);
        }
        assert_eq!(bed.option_reply(client).1, rep::ACK);
    }
    bed.option(client, option::SET_META_CONTEXT, &meta("disk", &["x:y"]));
    assert_eq!(bed.option_reply(client).1, rep::ACK);
    bed.option(client, option::GO, &go("disk", &[info::EXPORT, info::EXPORT, 77]));
    assert_eq!(bed.option_reply(client).1, rep::INFO);
    assert_eq!(bed.option_reply(client).1, rep::ACK);
    bed.request(client, cmd::BLOCK_STATUS, 0, 1, 0, 512);
    assert_eq!(bed.error(client), error::EINVAL, "no context is left");
    assert_eq!(bed.read(client, 0, 0, 1), Ok(vec![0]));
}

#[test]
fn requests_sent_along_with_the_last_option_are_served() {
    for option in [option::GO, option::EXPORT_NAME] {
        let mut bed = Bed::new(3);
        let client = bed.connect();
        let mut bytes = 3u32.to_be_bytes().to_vec();
        let data = if option == option::GO { go("disk", &[]) } else { b"disk".to_vec() };
        bytes.extend(option_bytes(option, &data));
        for cookie in 0..50u64 {
            let header = proto::RequestHeader { flags: 0, kind: cmd::WRITE, cookie, offset: cookie * 512, len: 512 };
            bytes.extend(header.bytes());
            bytes.extend(pattern(cookie, 512));
        }
        bed.send(client, &bytes);
        bed.take(client, 18);
        if option == option::GO {
            assert_eq!(bed.option_reply(client).1, rep::INFO);
            assert_eq!(bed.option_reply(client).1, rep::ACK);
        } else {
            bed.take(client, 10);
        }
        for cookie in 0..50 {
            assert_eq!(bed.message(client), Message::Simple { error: 0, cookie });
        }
        for cookie in 0..50 {
            assert!(bed.disk().data[cookie * 512..][..512] == pattern(cookie as u64, 512));
        }
    }
}

#[test]
fn a_client_that_goes_after_any_byte_leaves_nothing_behind() {
    // A whole conversation: options, a write in three parts, a refused one, reads, a flush.
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    all.extend(option_bytes(EXTENDED_HEADERS, &[0; 9]));
    all.extend(option_bytes(option::SET_META_CONTEXT, &meta("disk", &["base:allocation"])));
    all.extend(option_bytes(option::GO, &go("disk", &[info::BLOCK_SIZE])));
    for (cookie, kind, offset, len) in [
        (1, cmd::WRITE, 4000, 500u32),
        (2, cmd::WRITE, SIZE, 300),
        (3, cmd::READ, 0, 4096),
        (4, cmd::BLOCK_STATUS, 0, 65_536),
        (5, cmd::WRITE_ZEROES, 100, 1000),
        (6, cmd::FLUSH, 0, 0),
    ] {
        all.extend(proto::RequestHeader { flags: 0, kind, cookie, offset, len }.bytes());
        if kind == cmd::WRITE {
            all.extend(pattern(cookie, len as usize));
        }
    }
    let mut bed = Bed::with(4, Limits::default(), classes(), vec![MemDisk::new(7, "disk", SIZE as usize)]);
    for (len, cut) in (0..=all.len()).flat_map(|len| [(len, false), (len, true)]) {
        let client = bed.connect();
        bed.disk().late = len % 3 == 0;
        if len > 0 {
            bed.send(client, &all[..len]);
        }
        bed.settle(2_000_000);
        if cut {
            bed.cut(client)
        } else {
            bed.hang_up(client)
        }
        bed.settle(1_000_000);
    }
    bed.disk().late = false;
    bed.settle(10_000_000_000);
    assert!(bed.server.is_idle(), "a connection is left");
    assert_eq!(bed.server_io_free(), bed.server_io_total(), "a buffer was lost");
    let client = bed.serving(true);
    assert!(bed.read(client, 0, 0, 8192).is_ok());
    let gone = |client: &Client| client.closed;
    assert_eq!(bed.clients.iter().filter(|client| !gone(client)).count(), 1);
}
