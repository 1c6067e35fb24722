//! In steady state the ring allocates nothing: counted by an allocator of this test's own.

#![allow(unsafe_code)] // An allocator is an unsafe trait; this one only counts.

#[path = "shared/counting_allocations.rs"]
mod counting_allocations;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use afterimage_dataplane::io::ring::{Ring, RingConfig};
use afterimage_dataplane::io::{Class, Done, Io, Op, OpenHow, Part, Pool};
use counting_allocations::allocations;

/// Sixteen writes, and a send and a receive of four parts each; buffers and vectors go round.
struct Round {
    buffers: Vec<Part>,
    send: Vec<Part>,
    receive: Vec<Part>,
}

fn part(pool: &Pool) -> Part {
    Part { buf: pool.take(4096).expect("the pool has room"), at: 0, len: 4096 }
}

#[test]
fn a_round_of_operations_allocates_nothing() {
    let pool = Pool::new(&[Class { capacity: 4096, count: 64 }]);
    let mut ring = Ring::new(pool.clone(), RingConfig::default()).expect("this kernel has what the ring needs");
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
    let path = format!("{}/f", dir.path().display());
    let file = ring.open(&path, OpenHow { write: true, create_new: true, lock: false }).expect("a new file");
    ring.set_len(file, 1 << 20, true).expect("room");
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let (a, b) = (ring.attach(OwnedFd::from(ours)).expect("a"), ring.attach(OwnedFd::from(theirs)).expect("b"));
    let four = || (0..4).map(|_| part(&pool)).collect::<Vec<_>>();
    let mut round = Round { buffers: (0..16).map(|_| part(&pool)).collect(), send: four(), receive: four() };
    let mut done: Vec<Done> = Vec::with_capacity(64);

    let mut run = |ring: &mut Ring, round: &mut Round| {
        for n in 0..16 {
            let part = round.buffers.pop().expect("it came back");
            ring.submit(n, Op::Write { file, offset: n * 4096, part, durable: n == 0 });
        }
        ring.submit(20, Op::SendV { sock: a, parts: std::mem::take(&mut round.send) });
        ring.submit(21, Op::RecvV { sock: b, parts: std::mem::take(&mut round.receive) });
        ring.submit(22, Op::Timer { at: ring.now() + 1000 });
        ring.submit(23, Op::Sync { file });
        let (mut left, mut received) = (20, 0);
        while left > 0 {
            let until = ring.now() + 5_000_000_000;
            ring.poll(Some(until), &mut done);
            for done in done.drain(..) {
                left -= 1;
                round.buffers.extend(done.part);
                match done.token {
                    20 => round.send = done.parts,
                    21 => {
                        received += done.result.expect("bytes come");
                        round.receive = done.parts;
                        if received < 4 * 4096 {
                            left += 1;
                            ring.submit(21, Op::RecvV { sock: b, parts: std::mem::take(&mut round.receive) });
                        }
                    }
                    _ => assert!(done.result.is_ok()),
                }
            }
        }
    };
    for _ in 0..20 {
        run(&mut ring, &mut round);
    }
    let before = allocations();
    for _ in 0..200 {
        run(&mut ring, &mut round);
    }
    assert_eq!(allocations() - before, 0, "allocations in 4000 operations");
}
