//! Event counters on the kernel's ring, which are used like sockets.

use std::os::fd::{AsFd, OwnedFd};

use afterimage_dataplane::io::ring::{Ring, RingConfig};
use afterimage_dataplane::io::{Class, Done, Errno, Io, Op, Part, Pool, Sock};
use rustix::event::{EventfdFlags, eventfd};

const SECOND: u64 = 1_000_000_000;

fn ring() -> Ring {
    let pool = Pool::new(&[Class { capacity: 4096, count: 8 }]);
    Ring::new(pool, RingConfig { entries: 8, files: 8, register_pool: false }).unwrap()
}

fn part(io: &Ring, value: u64) -> Part {
    let mut buf = io.pool().take(8).unwrap();
    buf[..8].copy_from_slice(&value.to_ne_bytes());
    Part { buf, at: 0, len: 8 }
}

fn listen(io: &mut Ring, token: u64, sock: Sock) {
    let part = part(io, 0);
    io.submit(token, Op::Recv { sock, part });
}

/// What completes within so long.
fn poll(io: &mut Ring, nanos: u64) -> Vec<Done> {
    let mut done = Vec::new();
    let until = io.now() + nanos;
    io.poll(Some(until), &mut done);
    done
}

fn raise(event: &OwnedFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

/// The descriptor's own side may be non-blocking or not: the other process has the same.
fn both(test: impl Fn(EventfdFlags)) {
    test(EventfdFlags::CLOEXEC);
    test(EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
}

#[test]
fn a_raised_counter_is_heard_once_and_is_at_zero_again() {
    both(|flags| {
        let mut io = ring();
        let ours = eventfd(0, flags).unwrap();
        let sock = io.attach_event(ours.try_clone().unwrap()).unwrap();
        raise(&ours);
        listen(&mut io, 1, sock);
        let done = poll(&mut io, SECOND);
        assert_eq!((done.len(), done[0].token, done[0].result), (1, 1, Ok(8)), "what was raised before counts");
        listen(&mut io, 2, sock);
        assert!(poll(&mut io, SECOND / 50).is_empty(), "nothing was raised since");
        raise(&ours);
        raise(&ours);
        assert_eq!(poll(&mut io, SECOND).len(), 1);
        listen(&mut io, 3, sock);
        assert!(poll(&mut io, SECOND / 50).is_empty());
    });
}

#[test]
fn a_counter_is_raised_for_the_other_side() {
    both(|flags| {
        let mut io = ring();
        let theirs = eventfd(0, flags).unwrap();
        let sock = io.attach_event(theirs.try_clone().unwrap()).unwrap();
        let one = part(&io, 1);
        io.submit(1, Op::Send { sock, part: one });
        // One that is not non-blocking is written to by another thread of the kernel's.
        let done = poll(&mut io, SECOND);
        assert_eq!(done[0].result, Ok(8));
        let mut count = [0; 8];
        rustix::io::read(&theirs, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    });
}

#[test]
fn closing_ends_what_waits_whether_the_kernel_has_it_or_not() {
    both(|flags| {
        for polled in [false, true] {
            let mut io = ring();
            let total = io.pool().free_bytes();
            let ours = eventfd(0, flags).unwrap();
            let sock = io.attach_event(ours.try_clone().unwrap()).unwrap();
            listen(&mut io, 1, sock);
            if polled {
                assert!(poll(&mut io, SECOND / 50).is_empty());
            }
            io.close_sock(sock);
            let done = poll(&mut io, SECOND);
            assert_eq!((done.len(), done[0].result), (1, Err(Errno::CANCELED)));
            drop(done);
            assert_eq!(io.pool().free_bytes(), total);
            listen(&mut io, 2, sock);
            assert_eq!(poll(&mut io, SECOND)[0].result, Err(Errno::BADF));
        }
    });
}

#[test]
fn a_counter_that_is_as_high_as_it_goes_blocks_nothing() {
    both(|flags| {
        for closed in [false, true] {
            let mut io = ring();
            let theirs = eventfd(0, flags).unwrap();
            rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            let sock = io.attach_event(theirs.try_clone().unwrap()).unwrap();
            let one = part(&io, 1);
            io.submit(1, Op::Send { sock, part: one });
            // The kernel may wait until the other side has looked, or say at once that it is raised already.
            let mut done = poll(&mut io, SECOND / 20);
            if closed {
                io.close_sock(sock);
            } else {
                rustix::io::read(&theirs, &mut [0; 8]).unwrap();
            }
            done.extend(if done.is_empty() { poll(&mut io, 5 * SECOND) } else { Vec::new() });
            assert_eq!(done.len(), 1);
        }
    });
}

#[test]
fn what_is_no_event_counter_is_refused() {
    let mut io = ring();
    let file = rustix::fs::memfd_create("no-event", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(io.attach_event(file).unwrap_err(), Errno::INVAL);
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(io.attach_event(ours.as_fd().try_clone_to_owned().unwrap()).unwrap_err(), Errno::INVAL);
}
