//! What only the simulated world has: crashes, lost power, broken connections, faults, and one seed for all of it.

use std::collections::BTreeSet;

use afterimage_dataplane::io::sim::{Fault, NodeId, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Done, Errno, File, Io, Nanos, Op, OpenHow, Part, Sock};

const NEW: OpenHow = OpenHow { write: true, create_new: true, lock: false };
const WRITE: OpenHow = OpenHow { write: true, create_new: false, lock: false };
const LOCKED: OpenHow = OpenHow { write: true, create_new: false, lock: true };

fn part(io: &SimIo, byte: u8, len: usize) -> Part {
    let mut buf = io.pool().take(len).expect("the pool has room");
    buf[..len].fill(byte);
    Part { buf, at: 0, len }
}

/// The next completions of a node; none if nothing will ever happen.
fn next(world: &World, io: &mut SimIo) -> Vec<Done> {
    let mut done = Vec::new();
    io.poll(None, &mut done);
    while done.is_empty() && world.step().is_some() {
        io.poll(None, &mut done);
    }
    done
}

fn wait(world: &World, io: &mut SimIo) -> Done {
    let mut done = next(world, io);
    assert_eq!(done.len(), 1, "one completion was expected");
    done.remove(0)
}

fn write(world: &World, io: &mut SimIo, file: File, offset: u64, byte: u8, len: usize, durable: bool) {
    let part = part(io, byte, len);
    io.submit(1, Op::Write { file, offset, part, durable });
    assert_eq!(wait(world, io).result, Ok(len as u64));
}

fn sync(world: &World, io: &mut SimIo, file: File) -> Result<u64, Errno> {
    io.submit(2, Op::Sync { file });
    wait(world, io).result
}

/// A world with one node whose file `f` of 1 MiB is all zeros, opened.
fn one(seed: u64, config: WorldConfig) -> (World, NodeId, SimIo, File) {
    let world = World::new(seed, config);
    let node = world.node("one");
    world.put_file(node, "f", &[0; 1 << 20]);
    let mut io = world.io(node);
    let file = io.open("f", WRITE).expect("it is there");
    (world, node, io, file)
}

fn two(seed: u64) -> (World, [NodeId; 2], [SimIo; 2], [Sock; 2]) {
    let world = World::new(seed, WorldConfig::default());
    let (a, b) = (world.node("a"), world.node("b"));
    let ios = [world.io(a), world.io(b)];
    let socks = world.connect(a, b);
    (world, [a, b], ios, [socks.0, socks.1])
}

/// Receives at `to` until the stream ends; what came, and how it ended.
fn drain(world: &World, io: &mut SimIo, sock: Sock) -> (Vec<u8>, Result<u64, Errno>) {
    let mut got = Vec::new();
    loop {
        let part = part(io, 0, 4096);
        io.submit(9, Op::Recv { sock, part });
        let done = wait(world, io);
        match done.result {
            Ok(0) | Err(_) => return (got, done.result),
            Ok(len) => got.extend_from_slice(&done.part.expect("it comes back").buf[..len as usize]),
        }
    }
}

#[test]
fn one_seed_one_history() {
    let run = |seed| {
        let (world, [a, b], [mut io_a, mut io_b], [sock_a, sock_b]) = two(seed);
        let file = io_a.open("f", NEW).expect("a new file");
        let mut log = Vec::new();
        let target = part(&io_b, 0, 4096);
        io_b.submit(1, Op::Recv { sock: sock_b, part: target });
        for n in 0..20 {
            let source = part(&io_a, n as u8, 8192);
            io_a.submit(n, Op::Write { file, offset: n * 4096, part: source, durable: false });
        }
        let source = part(&io_a, 7, 4096);
        io_a.submit(30, Op::Send { sock: sock_a, part: source });
        let mut done = Vec::new();
        while let Some(node) = world.step() {
            let io = if node == a { &mut io_a } else { &mut io_b };
            io.poll(None, &mut done);
            log.extend(done.drain(..).map(|done| (node, world.now(), done.token, done.result)));
        }
        world.power_loss(a);
        (log, world.file(a, "f"), world.file(b, "f"))
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn synced_writes_outlive_a_power_loss_and_others_tear() {
    let mut torn = 0;
    for seed in 0..30 {
        let (world, node, mut io, file) = one(seed, WorldConfig::default());
        write(&world, &mut io, file, 0, 1, 65536, false);
        assert_eq!(sync(&world, &mut io, file), Ok(0));
        write(&world, &mut io, file, 65536, 2, 65536, true);
        write(&world, &mut io, file, 131_072, 3, 65536, false);
        let before = io.boot_id();
        world.power_loss(node);
        let content = world.file(node, "f").expect("it is there");
        assert!(content[..65536].iter().all(|b| *b == 1));
        assert!(content[65536..131_072].iter().all(|b| *b == 2));
        let sectors: BTreeSet<Vec<u8>> = content[131_072..196_608].chunks(512).map(<[u8]>::to_vec).collect();
        assert!(sectors.iter().all(|sector| sector == &[0; 512] || sector == &[3; 512]));
        torn += sectors.len() / 2;
        assert_ne!(world.io(node).boot_id(), before);
        assert!(!io.alive());
    }
    assert!(torn > 20, "only {torn} of 30 unsynced writes were torn");
}

#[test]
fn a_sync_covers_only_what_had_completed() {
    let mut lost = 0;
    for seed in 0..50 {
        let config = WorldConfig { keep_unsynced: 0.0, ..WorldConfig::default() };
        let (world, node, mut io, file) = one(seed, config);
        let source = part(&io, 5, 4096);
        io.submit(1, Op::Write { file, offset: 0, part: source, durable: false });
        io.submit(2, Op::Sync { file });
        let mut seen = 0;
        while seen < 2 {
            seen += next(&world, &mut io).len();
        }
        world.power_loss(node);
        lost += usize::from(world.file(node, "f").expect("it is there")[0] == 0);
    }
    assert!(lost > 5 && lost < 45, "{lost} of 50 writes beside a sync were lost");
}

#[test]
fn a_crash_keeps_what_had_landed() {
    let (world, node, mut io, file) = one(1, WorldConfig::default());
    write(&world, &mut io, file, 0, 1, 65536, false);
    let before = io.boot_id();
    world.crash(node);
    assert!(world.file(node, "f").expect("it is there")[..65536].iter().all(|b| *b == 1));
    assert_eq!(world.io(node).boot_id(), before);
}

#[test]
fn the_lock_of_a_dead_process_ends_when_its_writes_have_landed() {
    let (mut waited, mut landed) = (0, 0);
    for seed in 0..50 {
        let (world, node, mut io, file) = one(seed, WorldConfig::default());
        io.close(file);
        let file = io.open("f", LOCKED).expect("nobody holds it");
        let source = part(&io, 1, 4096);
        io.submit(1, Op::Write { file, offset: 0, part: source, durable: false });
        let mut io = world.io(node);
        let start = world.now();
        while io.open("f", LOCKED) == Err(Errno::AGAIN) {
            world.advance(10_000_000);
        }
        waited += usize::from(world.now() > start);
        let content = world.file(node, "f").expect("it is there");
        landed += usize::from(content[0] == 1);
        world.advance(10_000_000_000);
        assert_eq!(world.file(node, "f"), Some(content), "a write landed after the lock had ended");
    }
    assert!(waited > 10 && landed > 10 && landed < 40, "waited {waited}, landed {landed} of 50");
}

#[test]
fn a_dead_process_hears_and_does_nothing() {
    let (world, node, mut io, file) = one(1, WorldConfig::default());
    let source = part(&io, 1, 4096);
    io.submit(1, Op::Write { file, offset: 0, part: source, durable: true });
    io.submit(2, Op::Timer { at: world.now() + 5 });
    world.crash(node);
    assert!(next(&world, &mut io).is_empty());
    assert_eq!(io.read_small("f"), Err(Errno::IO));
    io.submit(3, Op::Sync { file });
    io.close(file);
}

#[test]
fn names_need_a_synced_folder() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..40 {
        let world = World::new(seed, WorldConfig::default());
        let node = world.node("one");
        let mut io = world.io(node);
        io.list("d").expect("it is made");
        let file = io.open("d/kept", NEW).expect("a new file");
        io.sync_dir("d").expect("it is there");
        write(&world, &mut io, file, 0, 1, 4096, true);
        io.open("d/maybe", NEW).expect("a new file");
        world.power_loss(node);
        assert_eq!(world.file(node, "d/kept").expect("it was synced"), [1; 4096]);
        if world.file(node, "d/maybe").is_some() { kept += 1 } else { lost += 1 }
    }
    assert!(lost > 5 && kept > 5);
}

#[test]
fn a_small_file_is_replaced_durably_or_not_at_all() {
    let world = World::new(1, WorldConfig::default());
    let node = world.node("one");
    let mut io = world.io(node);
    io.replace_small("t", b"old").expect("it is replaced");
    world.fail(node, "t", Fault::Write, Errno::NOSPC, 1);
    assert_eq!(io.replace_small("t", b"new"), Err(Errno::NOSPC));
    assert_eq!(io.read_small("t").expect("it is there"), b"old");
    io.replace_small("t", b"new").expect("it is replaced");
    world.power_loss(node);
    assert_eq!(world.file(node, "t").expect("it is there"), b"new");
}

#[test]
fn asked_for_errors_come_as_often_as_asked() {
    let (world, node, mut io, file) = one(1, WorldConfig::default());
    world.fail(node, "f", Fault::Write, Errno::IO, 1);
    world.fail(node, "f", Fault::Read, Errno::IO, 1);
    world.fail(node, "f", Fault::Sync, Errno::NOSPC, 2);
    let source = part(&io, 1, 4096);
    io.submit(1, Op::Write { file, offset: 0, part: source, durable: false });
    let done = wait(&world, &mut io);
    assert!(done.result == Err(Errno::IO) && done.part.is_some());
    write(&world, &mut io, file, 0, 1, 4096, false);
    let target = part(&io, 0, 4096);
    io.submit(1, Op::Read { file, offset: 0, part: target });
    assert_eq!(wait(&world, &mut io).result, Err(Errno::IO));
    assert_eq!(sync(&world, &mut io, file), Err(Errno::NOSPC));
    assert_eq!(sync(&world, &mut io, file), Err(Errno::NOSPC));
    assert_eq!(sync(&world, &mut io, file), Ok(0));
}

#[test]
fn a_full_disk_says_so_and_takes_again_after_a_removal() {
    let world = World::new(1, WorldConfig { space: 1 << 20, ..WorldConfig::default() });
    let node = world.node("one");
    let mut io = world.io(node);
    let big = io.open("big", NEW).expect("a new file");
    io.set_len(big, 768 * 1024, true).expect("room");
    assert_eq!(io.free_space(""), Ok(256 * 1024));
    let small = io.open("small", NEW).expect("a new file");
    assert_eq!(io.set_len(small, 512 * 1024, true), Err(Errno::NOSPC));
    io.set_len(small, 512 * 1024, false).expect("a hole needs no room");
    let source = part(&io, 1, 512 * 1024);
    io.submit(1, Op::Write { file: small, offset: 0, part: source, durable: false });
    assert_eq!(wait(&world, &mut io).result, Err(Errno::NOSPC));
    // What was allocated can be written.
    write(&world, &mut io, big, 0, 1, 512 * 1024, false);
    io.close(big);
    io.remove("big").expect("it is there");
    io.sync_dir("").expect("the root");
    write(&world, &mut io, small, 0, 1, 512 * 1024, false);
}

#[test]
fn discard_is_refused_where_the_file_cannot() {
    let (world, _, mut io, file) = one(1, WorldConfig { discard: false, ..WorldConfig::default() });
    assert!(!io.info(file).expect("it is open").discard);
    io.submit(1, Op::Zero { file, offset: 0, len: 4096, unmap: true });
    assert_eq!(wait(&world, &mut io).result, Err(Errno::OPNOTSUPP));
    io.submit(1, Op::Zero { file, offset: 0, len: 4096, unmap: false });
    assert_eq!(wait(&world, &mut io).result, Ok(0));
}

#[test]
fn rot_changes_what_is_read() {
    let (world, node, _io, _) = one(1, WorldConfig::default());
    world.rot(node, "f", 4096, 10);
    let content = world.file(node, "f").expect("it is there");
    assert!(content[4096..4106].iter().all(|b| *b != 0));
    assert!(content[..4096].iter().chain(&content[4106..]).all(|b| *b == 0));
}

#[test]
fn a_cut_connection_ends_after_some_prefix_for_both() {
    let mut lengths = BTreeSet::new();
    for seed in 0..30 {
        let (world, _, [mut a, mut b], [sock_a, sock_b]) = two(seed);
        let source = part(&a, 7, 65536);
        a.submit(1, Op::Send { sock: sock_a, part: source });
        world.advance(200_000);
        world.cut(sock_b);
        let (got, end) = drain(&world, &mut b, sock_b);
        assert_eq!(end, Err(Errno::CONNRESET));
        lengths.insert(got.len());
        let mut done = Vec::new();
        a.poll(None, &mut done);
        let (_, end) = drain(&world, &mut a, sock_a);
        assert_eq!(end, Err(Errno::CONNRESET));
    }
    assert!(lengths.len() > 10, "cut at {lengths:?} only");
}

#[test]
fn a_crash_breaks_the_peer_off() {
    let mut ends = BTreeSet::new();
    for seed in 0..30 {
        let (world, [a, _], [mut io_a, mut b], [sock_a, sock_b]) = two(seed);
        let source = part(&io_a, 7, 65536);
        io_a.submit(1, Op::Send { sock: sock_a, part: source });
        world.crash(a);
        let (got, end) = drain(&world, &mut b, sock_b);
        assert!(got.len() <= 65536 && got.iter().all(|byte| *byte == 7));
        ends.insert((got.len() == 65536, end.is_ok()));
    }
    assert!(ends.contains(&(true, true)) && ends.contains(&(false, false)), "{ends:?}");
}

#[test]
fn a_powerless_peer_is_silent_until_it_lives_again() {
    let (world, [a, _], [_io_a, mut b], [_, sock_b]) = two(1);
    let target = part(&b, 0, 4096);
    b.submit(1, Op::Recv { sock: sock_b, part: target });
    world.power_loss(a);
    assert!(next(&world, &mut b).is_empty());
    let _io_a = world.io(a);
    assert_eq!(wait(&world, &mut b).result, Err(Errno::CONNRESET));
}

#[test]
fn a_partition_delays_and_loses_nothing() {
    let (world, [node_a, node_b], [mut a, mut b], [sock_a, sock_b]) = two(3);
    world.partition(node_a, node_b, true);
    let source = part(&a, 7, 65536);
    a.submit(1, Op::Send { sock: sock_a, part: source });
    let target = part(&b, 0, 4096);
    b.submit(1, Op::Recv { sock: sock_b, part: target });
    assert_eq!(wait(&world, &mut a).result, Ok(65536));
    assert!(next(&world, &mut b).is_empty());
    world.advance(1_000_000_000);
    world.partition(node_b, node_a, false);
    let first = wait(&world, &mut b).result.expect("bytes come") as usize;
    a.close_sock(sock_a);
    let (got, end) = drain(&world, &mut b, sock_b);
    assert_eq!((first + got.len(), end), (65536, Ok(0)));
}

#[test]
fn a_send_waits_for_room_in_the_window() {
    let world = World::new(1, WorldConfig { net_window: 10_000, ..WorldConfig::default() });
    let (a, b) = (world.node("a"), world.node("b"));
    let (mut io_a, mut io_b) = (world.io(a), world.io(b));
    let (sock_a, sock_b) = world.connect(a, b);
    let source = part(&io_a, 7, 65536);
    io_a.submit(1, Op::Send { sock: sock_a, part: source });
    assert!(next(&world, &mut io_a).is_empty());
    let mut got = 0;
    while got < 65536 {
        let target = part(&io_b, 0, 4096);
        io_b.submit(1, Op::Recv { sock: sock_b, part: target });
        got += wait(&world, &mut io_b).result.expect("bytes come");
    }
    assert_eq!(wait(&world, &mut io_a).result, Ok(65536));
}

#[test]
fn a_poll_is_woken_at_its_time_or_by_the_harness() {
    let world = World::new(1, WorldConfig::default());
    let node = world.node("one");
    let mut io = world.io(node);
    let mut done = Vec::new();
    let until: Nanos = world.now() + 5_000;
    io.poll(Some(until), &mut done);
    assert_eq!((world.step(), world.now()), (Some(node), until));
    assert_eq!(world.step(), None);
    world.wake(node);
    assert_eq!((world.step(), world.now()), (Some(node), until));
}

#[test]
fn the_wall_clock_jumps_and_the_monotonic_one_does_not() {
    let world = World::new(1, WorldConfig::default());
    let node = world.node("one");
    let io = world.io(node);
    let (wall, now) = (io.wall(), io.now());
    world.jump_wall(node, -3_600_000_000_000);
    world.set_wall_synced(node, false);
    assert_eq!((io.wall(), io.now()), (wall - 3_600_000_000_000, now));
    assert!(!io.wall_synced());
}

#[test]
fn writes_overtake_each_other() {
    let mut winners = BTreeSet::new();
    for seed in 0..30 {
        let (world, node, mut io, file) = one(seed, WorldConfig::default());
        for byte in [1, 2] {
            let source = part(&io, byte, 4096);
            io.submit(u64::from(byte), Op::Write { file, offset: 0, part: source, durable: false });
        }
        let mut seen = 0;
        while seen < 2 {
            seen += next(&world, &mut io).len();
        }
        let content = world.file_range(node, "f", 0, 4096).expect("it is there");
        winners.insert((content[0], content[4095]));
    }
    assert!(winners.contains(&(1, 1)) && winners.contains(&(2, 2)), "{winners:?}");
    assert!(winners.len() > 2, "writes that overlap were never mixed");
}

#[test]
#[should_panic(expected = "not made of blocks")]
fn a_range_off_the_blocks_is_a_bug() {
    let (_, _, mut io, file) = one(1, WorldConfig::default());
    let target = part(&io, 0, 4096);
    io.submit(1, Op::Read { file, offset: 100, part: target });
}

#[test]
#[should_panic(expected = "two receives")]
fn two_receives_on_one_socket_are_a_bug() {
    let (_, _, [mut a, _b], [sock, _]) = two(1);
    for _ in 0..2 {
        let target = part(&a, 0, 4096);
        a.submit(1, Op::Recv { sock, part: target });
    }
}

#[test]
#[should_panic(expected = "after it was closed")]
fn using_a_closed_file_is_a_bug() {
    let (_, _, mut io, file) = one(1, WorldConfig::default());
    io.close(file);
    io.submit(1, Op::Sync { file });
}
