//! Bounds: requests, budgets, buffers.

use super::bed::{Bed, MemDisk, Message, classes, pattern};
use afterimage_dataplane::host::FrontEnd as _;
use afterimage_dataplane::io::Class;
use afterimage_dataplane::nbd::Limits;
use afterimage_dataplane::nbd::proto::{cmd, cmd_flag, error};

fn disk() -> MemDisk {
    MemDisk::new(7, "disk", 8 << 20)
}

#[test]
fn a_client_that_asks_much_and_listens_late_gets_every_reply() {
    let mut bed = Bed::new(1);
    bed.disk().late = true;
    let client = bed.serving(true);
    bed.clients[client].deaf = true;
    for cookie in 0..3000 {
        match cookie % 4 {
            0 => bed.request(client, cmd::FLUSH, 0, cookie, 0, 0),
            1 => bed.request(client, cmd::BLOCK_STATUS, 0, cookie, 0, 8 << 20),
            2 => bed.request(client, cmd::READ, 0, cookie, 0, u32::MAX),
            _ => bed.write(client, 0, cookie, cookie * 512, &pattern(cookie, 512)),
        }
    }
    bed.settle(2_000_000_000);
    bed.clients[client].deaf = false;
    bed.kick_all();
    let mut seen = vec![false; 3000];
    for _ in 0..3000 {
        let (Message::Simple { cookie, .. } | Message::Chunk { cookie, .. }) = bed.message(client);
        assert!(!std::mem::replace(&mut seen[cookie as usize], true));
    }
}

#[test]
fn many_large_writes_at_once_get_through_with_few_buffers() {
    let few = vec![Class { capacity: 32 * 1024, count: 64 }, Class { capacity: 532 * 1024, count: 2 }];
    let mut bed = Bed::with(2, Limits::default(), few, vec![disk()]);
    bed.disk().late = true;
    let clients: Vec<_> = (0..6).map(|_| bed.serving(false)).collect();
    for &client in &clients {
        bed.write(client, 0, 1, client as u64 * (1 << 20) + 77, &pattern(client as u64, 1 << 20));
    }
    for &client in &clients {
        assert_eq!(bed.error(client), 0);
        let at = client * (1 << 20) + 77;
        assert_eq!(bed.disk().data[at..at + (1 << 20)], pattern(client as u64, 1 << 20));
        bed.hang_up(client);
    }
    bed.settle(1_000_000_000);
    assert!(bed.server.is_idle());
    assert_eq!(bed.server_io_free(), bed.server_io_total());
}

#[test]
fn many_large_reads_at_once_get_through_with_few_buffers() {
    let few = vec![Class { capacity: 32 * 1024, count: 64 }, Class { capacity: 536 * 1024, count: 3 }];
    let mut bed = Bed::with(3, Limits::default(), few, vec![disk()]);
    bed.disk().late = true;
    let data = pattern(1, 8 << 20);
    bed.disk().data.copy_from_slice(&data);
    let clients: Vec<_> = (0..6).map(|n| bed.serving(n % 2 == 0)).collect();
    for &client in &clients {
        bed.request(client, cmd::READ, 0, 99, 4097, 5 << 20);
    }
    for &client in &clients {
        if client % 2 == 1 {
            assert_eq!(bed.error(client), 0);
            assert_eq!(bed.take(client, 5 << 20), data[4097..][..5 << 20]);
        } else {
            let mut got = 0;
            while got < 5 << 20 {
                let Message::Chunk { payload, .. } = bed.message(client) else { panic!() };
                let at = u64::from_be_bytes(payload[..8].try_into().expect("8 bytes")) as usize;
                assert_eq!(payload[8..], data[at..at + payload.len() - 8]);
                got += payload.len() - 8;
            }
        }
    }
}

#[test]
fn reads_wait_for_buffers_of_the_disk() {
    let mut bed = Bed::new(4);
    bed.disk().no_buffers = 20;
    let client = bed.serving(true);
    assert_eq!(bed.read(client, 0, 0, 2 << 20), Ok(vec![0; 2 << 20]));
    bed.disk().no_buffers = usize::MAX;
    assert_eq!(bed.read(client, 0, 0, 4096), Err(error::ENOMEM), "but not for ever");
}

#[test]
fn a_read_is_not_over_while_a_part_of_it_waits_for_a_buffer() {
    for parts in 1..4 {
        let mut bed = Bed::new(4);
        bed.disk().data.copy_from_slice(&pattern(9, 8 << 20));
        for (structured, flags) in [(true, 0), (true, cmd_flag::DF), (false, 0)] {
            let client = bed.serving(structured);
            for len in [1 << 20, 6 << 20] {
                if flags == cmd_flag::DF && len > 1 << 20 {
                    continue;
                }
                // The first parts find no buffer, the others do.
                bed.disk().no_buffers = parts;
                let data = if structured {
                    bed.read(client, flags, 777, len).expect("readable")
                } else {
                    bed.request(client, cmd::READ, 0, 1, 777, len);
                    assert_eq!(bed.error(client), 0);
                    bed.take(client, len as usize)
                };
                assert!(data == pattern(9, 8 << 20)[777..777 + len as usize]);
            }
        }
    }
}

#[test]
fn clients_that_do_not_listen_do_not_keep_others_from_reading() {
    let limits = Limits { read_bytes: 8 << 20, ..Limits::default() };
    let mut bed = Bed::with(5, limits, classes(), vec![disk()]);
    let deaf: Vec<_> = (0..3).map(|_| bed.serving(true)).collect();
    for &client in &deaf {
        bed.clients[client].deaf = true;
        for _ in 0..10 {
            bed.request(client, cmd::READ, 0, 1, 0, 1 << 20);
        }
    }
    bed.settle(1_000_000_000);
    let client = bed.serving(true);
    assert!(bed.read(client, 0, 0, 1 << 20).is_ok());
    assert_eq!(bed.server.status()[0].clients, 4);
}

#[test]
fn when_all_buffers_are_held_by_clients_that_do_not_listen_one_of_them_goes() {
    let limits = Limits { read_bytes: 4 << 20, ..Limits::default() };
    let mut bed = Bed::with(6, limits, classes(), vec![disk()]);
    let deaf: Vec<_> = (0..8).map(|_| bed.serving(true)).collect();
    for &client in &deaf {
        bed.clients[client].deaf = true;
        for _ in 0..10 {
            bed.request(client, cmd::READ, 0, 1, 0, 1 << 20);
        }
    }
    bed.settle(1_000_000_000);
    let client = bed.serving(true);
    assert!(bed.read(client, 0, 0, 1 << 20).is_ok());
    assert!(bed.server.status()[0].clients < 9);
}

/// Long buffers are a part of the pool, as they are in a source's.
fn long_buffers_are_few() -> Vec<Class> {
    vec![
        Class { capacity: 16 * 1024, count: 1024 },
        Class { capacity: 80 * 1024, count: 200 },
        Class { capacity: 532 * 1024, count: 36 },
    ]
}

#[test]
fn while_others_do_not_listen_one_that_comes_later_reads_and_writes_at_once() {
    let mut bed = Bed::with(7, Limits::default(), long_buffers_are_few(), vec![disk()]);
    for n in 0..4 {
        let deaf = bed.serving(n % 2 == 0);
        bed.clients[deaf].deaf = true;
        for cookie in 0..40 {
            bed.request(deaf, cmd::READ, 0, cookie, 0, 1 << 20);
        }
    }
    bed.settle(1_000_000_000);
    let begun = bed.world.now();
    let client = bed.serving(true);
    bed.write(client, 0, 1, 12345, &pattern(3, 1 << 20));
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.read(client, 0, 12345, 1 << 20), Ok(pattern(3, 1 << 20)));
    assert!(bed.world.now() - begun < 1_000_000_000, "{} ns", bed.world.now() - begun);
    assert_eq!(bed.server.status()[0].clients, 5, "nobody had to go for it");
}

#[test]
fn writes_that_are_never_ended_leave_room_for_others() {
    let mut bed = Bed::with(8, Limits::default(), long_buffers_are_few(), vec![disk()]);
    for _ in 0..40 {
        let slow = bed.serving(false);
        bed.request(slow, cmd::WRITE, 0, 1, 0, 4 << 20);
        bed.send(slow, &[1; 1000]);
    }
    bed.settle(1_000_000_000);
    let begun = bed.world.now();
    let client = bed.serving(true);
    bed.write(client, 0, 1, 4096, &pattern(3, 1 << 20));
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.read(client, 0, 4096, 1 << 20), Ok(pattern(3, 1 << 20)));
    assert!(bed.world.now() - begun < 1_000_000_000, "{} ns", bed.world.now() - begun);
}

#[test]
fn when_writes_that_are_never_ended_hold_all_buffers_one_of_them_goes() {
    let few = vec![Class { capacity: 16 * 1024, count: 64 }, Class { capacity: 532 * 1024, count: 2 }];
    let mut bed = Bed::with(9, Limits::default(), few, vec![disk()]);
    for _ in 0..2 {
        let slow = bed.serving(false);
        bed.request(slow, cmd::WRITE, 0, 1, 0, 1 << 20);
        bed.send(slow, &[1; 1000]);
    }
    bed.settle(1_000_000_000);
    let client = bed.serving(false);
    bed.write(client, 0, 1, 0, &pattern(3, 1 << 20));
    assert_eq!(bed.error(client), 0);
    assert_eq!(bed.disk().data[..1 << 20], pattern(3, 1 << 20));
    assert_eq!(bed.server.status()[0].clients, 2);
}

#[test]
fn buffers_of_connections_are_a_small_part_of_the_pool() {
    let small = vec![Class { capacity: 16 * 1024, count: 128 }, Class { capacity: 532 * 1024, count: 12 }];
    let mut bed = Bed::with(10, Limits::default(), small, vec![disk()]);
    for _ in 0..30 {
        bed.connect();
    }
    bed.settle(1_000_000_000);
    let used = bed.server_io_total() - bed.server_io_free();
    assert!(used <= bed.server_io_total() / 8, "{used} of {}", bed.server_io_total());
    assert!((15..30).contains(&bed.clients.iter().filter(|c| !c.closed).count()));
}
