//! The rarer faults of the simulated world: writes that go astray, disks that stand still, machines that sleep, one-way
//! partitions, copies of a disk that come back.

use afterimage_dataplane::io::sim::{Errors, Fault, NodeId, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Done, Errno, File, Io, Op, OpenHow, Part};

const WRITE: OpenHow = OpenHow { write: true, create_new: false, lock: false };
const SIZE: usize = 1 << 20;
const MS: u64 = 1_000_000;

fn part(io: &SimIo, byte: u8, len: usize) -> Part {
    let mut buf = io.pool().take(len).expect("the pool has room");
    buf[..len].fill(byte);
    Part { buf, at: 0, len }
}

fn wait(world: &World, io: &mut SimIo) -> Done {
    let mut done = Vec::new();
    io.poll(None, &mut done);
    while done.is_empty() && world.step().is_some() {
        io.poll(None, &mut done);
    }
    assert_eq!(done.len(), 1, "one completion was expected");
    done.remove(0)
}

fn write(world: &World, io: &mut SimIo, file: File, offset: u64, byte: u8, len: usize) -> Result<u64, Errno> {
    let part = part(io, byte, len);
    io.submit(1, Op::Write { file, offset, part, durable: true });
    wait(world, io).result
}

/// A world with one node whose file `f` is all zeros, opened.
fn one(seed: u64) -> (World, NodeId, SimIo, File) {
    let world = World::new(seed, WorldConfig::default());
    let node = world.node("one");
    world.put_file(node, "f", &[0; SIZE]);
    let mut io = world.io(node);
    let file = io.open("f", WRITE).expect("it is there");
    (world, node, io, file)
}

#[test]
fn a_misdirected_write_ends_well_and_is_elsewhere() {
    let (world, node, mut io, file) = one(3);
    world.fail(node, "f", Fault::Misdirect, Errno::IO, 1);
    assert_eq!(write(&world, &mut io, file, 8192, 7, 4096), Ok(4096));
    let content = world.file(node, "f").expect("it is there");
    assert_eq!(content.iter().filter(|byte| **byte == 7).count(), 4096);
    assert!(content[8192..12288].iter().any(|byte| *byte != 7));
    assert_eq!(write(&world, &mut io, file, 8192, 8, 4096), Ok(4096));
    assert!(world.file(node, "f").expect("it is there")[8192..12288].iter().all(|byte| *byte == 8));
}

#[test]
fn a_lost_write_ends_well_and_is_nowhere() {
    let (world, node, mut io, file) = one(4);
    world.fail(node, "f", Fault::Lose, Errno::IO, 1);
    assert_eq!(write(&world, &mut io, file, 8192, 7, 4096), Ok(4096));
    assert_eq!(world.file(node, "f"), Some(vec![0; SIZE]));
}

#[test]
fn a_disk_that_stands_still_goes_on_afterwards() {
    let (world, node, mut io, file) = one(5);
    let begun = world.now();
    world.stall(node, 300 * MS);
    assert_eq!(write(&world, &mut io, file, 0, 7, 4096), Ok(4096));
    assert!(world.now() >= begun + 300 * MS);
    let begun = world.now();
    assert_eq!(write(&world, &mut io, file, 0, 8, 4096), Ok(4096));
    assert!(world.now() < begun + 10 * MS);
}

#[test]
fn one_write_that_hangs_holds_up_no_other() {
    let (world, node, mut io, file) = one(12);
    let begun = world.now();
    world.hang(node, "f", 300 * MS);
    let slow = part(&io, 7, 4096);
    io.submit(9, Op::Write { file, offset: 0, part: slow, durable: true });
    assert_eq!(write(&world, &mut io, file, 4096, 8, 4096), Ok(4096));
    assert!(world.now() < begun + 10 * MS);
    assert_eq!(wait(&world, &mut io).token, 9);
    assert!(world.now() >= begun + 300 * MS);
}

#[test]
fn errors_of_one_node_are_its_own() {
    let (world, node, mut io, file) = one(6);
    let other = world.node("other");
    world.put_file(other, "f", &[0; SIZE]);
    let mut other_io = world.io(other);
    let other_file = other_io.open("f", WRITE).expect("it is there");
    world.errors(node, Errors { write: 1.0, ..Errors::default() });
    assert_eq!(write(&world, &mut io, file, 0, 7, 4096), Err(Errno::IO));
    assert_eq!(write(&world, &mut other_io, other_file, 0, 7, 4096), Ok(4096));
    world.errors(node, Errors::default());
    assert_eq!(write(&world, &mut io, file, 0, 7, 4096), Ok(4096));
}

#[test]
fn a_process_that_stands_still_is_not_polled_until_it_goes_on() {
    let (world, node, mut io, file) = one(7);
    let clock = world.node("clock");
    let mut ticks = world.io(clock);
    let part = part(&io, 7, 4096);
    io.submit(1, Op::Write { file, offset: 0, part, durable: true });
    world.suspend(node, true, false);
    ticks.poll(Some(world.now() + 100 * MS), &mut Vec::new());
    assert_eq!(world.step(), Some(clock));
    // Its disk worked on, its clock too.
    assert_eq!(world.file_range(node, "f", 0, 1), Some(vec![7]));
    assert_eq!(io.now(), world.now());
    world.suspend(node, false, false);
    assert_eq!(world.step(), Some(node));
    assert_eq!(wait(&world, &mut io).result, Ok(4096));
}

#[test]
fn the_clock_of_a_machine_that_sleeps_stands_still() {
    let (world, node, io, _) = one(8);
    let (mono, wall) = (io.now(), io.wall());
    world.suspend(node, true, true);
    world.advance(500 * MS);
    assert_eq!(io.now(), mono);
    world.suspend(node, false, true);
    world.advance(MS);
    assert_eq!(io.now(), mono + MS);
    assert_eq!(io.wall(), wall + 501 * MS);
    assert_eq!(world.mono(node), io.now());
}

#[test]
fn a_one_way_partition_stops_one_way_only() {
    let world = World::new(9, WorldConfig::default());
    let (a, b) = (world.node("a"), world.node("b"));
    let (mut io_a, mut io_b) = (world.io(a), world.io(b));
    let (sock_a, sock_b) = world.connect(a, b);
    world.partition_one_way(a, b, true);
    let (to, from) = (part(&io_b, 0, 64), part(&io_a, 1, 64));
    io_b.submit(1, Op::Recv { sock: sock_b, part: to });
    io_a.submit(1, Op::Send { sock: sock_a, part: from });
    let (to, from) = (part(&io_a, 0, 64), part(&io_b, 2, 64));
    io_a.submit(2, Op::Recv { sock: sock_a, part: to });
    io_b.submit(2, Op::Send { sock: sock_b, part: from });
    let (mut done_a, mut done_b) = (Vec::new(), Vec::new());
    while let Some(node) = world.step() {
        if node == a { io_a.poll(None, &mut done_a) } else { io_b.poll(None, &mut done_b) }
    }
    let tokens = |done: &[Done]| done.iter().map(|done| done.token).collect::<Vec<_>>();
    assert_eq!(tokens(&done_b), [2], "only its send has ended");
    assert!(done_a.iter().any(|done| done.token == 2), "what was sent the other way has come");
    world.partition_one_way(a, b, false);
    while let Some(node) = world.step() {
        if node == a { io_a.poll(None, &mut done_a) } else { io_b.poll(None, &mut done_b) }
    }
    assert_eq!(tokens(&done_b), [2, 1]);
}

#[test]
fn a_copy_of_a_disk_can_come_back() {
    let (world, node, mut io, file) = one(10);
    assert_eq!(write(&world, &mut io, file, 0, 1, 4096), Ok(4096));
    let copy = world.snapshot(node);
    assert_eq!(write(&world, &mut io, file, 0, 2, 4096), Ok(4096));
    io.open("g", OpenHow { create_new: true, ..WRITE }).expect("a new file");
    world.power_loss(node);
    world.restore(node, &copy);
    world.power_loss(node);
    assert_eq!(world.file_range(node, "f", 0, 1), Some(vec![1]));
    assert_eq!(world.paths(node, ""), ["f"]);
}

#[test]
fn what_somebody_else_writes_shows_in_the_time_of_change() {
    let (world, node, mut io, file) = one(11);
    let before = io.info(file).expect("open").mtime_ns;
    world.advance(MS);
    world.scribble(node, "f", 100, b"foreign");
    assert_eq!(world.file_range(node, "f", 100, 7), Some(b"foreign".to_vec()));
    assert!(io.info(file).expect("open").mtime_ns > before);
}
