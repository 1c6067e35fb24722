//! What whoever runs a guest says, and what the guest itself writes into its memory, through a front end with a disk that
//! asserts what it is asked. Whatever one does, the next one is served, another queue goes on, and no buffer is lost.

use std::os::fd::OwnedFd;

use afterimage_dataplane::io::Io as _;
use afterimage_dataplane::io::guest::share;
use afterimage_dataplane::vhost::message::{self, Command, HEADER, Header};
use afterimage_dataplane::vhost::proto::{kind, status};
use afterimage_dataplane::vhost::{Outcome, Reply};

use crate::input::Input;

#[allow(dead_code)]
#[path = "../../../dataplane/tests/vhost/bed.rs"]
mod bed;

use bed::{ALL, Bed, GUEST, Layout, MemDisk, USER};

const DISK: usize = 1 << 20;
const SIZE: u16 = 16;
/// Most steps of one input.
const STEPS: usize = 64;

fn new_bed(queues: usize) -> Bed {
    Bed::with(1, MemDisk::new(DISK), ALL, queues, SIZE)
}

/// The device lets go, and the next connection is served.
fn all_is_well(mut bed: Bed) {
    bed.server.detach(&mut bed.io, bed.device);
    bed.settle();
    assert_eq!(bed.io.pool().free_bytes(), bed.io.pool().total_bytes(), "a buffer was lost");
    bed.device = bed.server.attach(&mut bed.io, &mut bed.disks, bed::KEY).expect("the device before has let go");
    bed.features = ALL;
    bed.inflight = None;
    bed.poke(0, &vec![0; 1 << 20]);
    bed.introduce();
    bed.rings.clear();
    bed.add_rings(1, SIZE);
    let ended = bed.ask(kind::FLUSH, 0, &[], 0, &Layout::default());
    assert_eq!(ended.status, status::OK);
}

/// An address that may be one of the guest's.
fn address(input: &mut Input<'_>) -> u64 {
    match input.below(4) {
        0 => input.number(64),
        1 => USER.wrapping_add(input.number(24)),
        2 => GUEST.wrapping_add(input.number(24)),
        _ => GUEST + (1 << 20) + input.below(1 << 16),
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A payload that may make sense for the request.
fn payload(request: u32, input: &mut Input<'_>) -> Vec<u8> {
    let state = |input: &mut Input<'_>| u64::from(input.byte() % 4) | input.number(16) << 32;
    match request {
        5 => {
            let mut out = words(&[1]);
            out.extend(words(&[GUEST, input.number(24), USER, input.number(16)]));
            out
        }
        8 | 10 | 11 | 18 => words(&[state(input)]),
        9 => words(&[u64::from(input.byte() % 4), address(input), address(input), address(input), 0]),
        12..=14 => words(&[u64::from(input.byte()) | u64::from(input.byte() & 1) << 8]),
        24 | 25 => {
            let (offset, len) = (input.number(10) as u32, input.below(80) as usize);
            let mut out = [offset, len as u32, 0].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
            out.resize(12 + len, input.byte());
            out
        }
        31 | 32 => words(&[input.number(20), input.number(8), input.number(32)]),
        37 | 38 => words(&[0, address(input), input.number(24), address(input), input.number(16)]),
        2 | 16 | 39 => words(&[input.number(64)]),
        _ => Vec::new(),
    }
}

/// Messages of the socket.
pub fn messages(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bed = new_bed(1);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let request = u32::from(input.byte() % 48);
        let mut bytes = [0; HEADER];
        let body = if input.byte().is_multiple_of(4) { input.take(100).to_vec() } else { payload(request, &mut input) };
        let flags = if input.byte() == 0 { input.number(8) as u32 } else { 1 | u32::from(input.byte() & 8) };
        let words = [request, flags, body.len() as u32];
        bytes.copy_from_slice(&words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>());
        let Ok(header) = Header::parse(&bytes) else { continue };
        let wanted = matches!(request, 5 | 12..=14 | 21 | 32 | 37) && input.byte() != 0;
        let fds: Vec<OwnedFd> = (0..u8::from(wanted) + u8::from(input.byte() == 7))
            .map(|_| share("fuzz", 1 << 16).expect("memory").0)
            .collect();
        let Ok(command) = message::parse(&header, &body, fds) else { continue };
        let Ok::<_, ()>(command) = command.attach(|_| Ok(bed.event().1)) else { continue };
        let mut outcome = bed.command(command);
        for _ in 0..3 {
            outcome = match outcome {
                Outcome::Wait(command) => {
                    bed.settle();
                    bed.command(command)
                }
                Outcome::Reply(reply) => {
                    assert!(reply.payload(body.len()).len() <= message::PAYLOAD_MAX);
                    if let Reply::Inflight { len, .. } = &reply {
                        assert!(*len > 0);
                    }
                    Outcome::Done
                }
                other => other,
            };
        }
        assert!(!matches!(outcome, Outcome::Wait(Command::GetFeatures) | Outcome::Gone));
        if input.byte() & 1 == 0 {
            bed.settle();
        }
    }
    all_is_well(bed);
}

/// A guest's memory: tables, rings, headers.
pub fn queues(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bed = new_bed(2);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(6) {
            0 => {
                let at = match input.below(3) {
                    0 => input.below(256),
                    1 => 0x8000 + input.below(40),
                    _ => (1 << 20) + input.below(4096),
                };
                bed.poke(at, input.take(8));
            }
            1 => {
                let desc = bed::Desc {
                    addr: address(&mut input),
                    len: input.number(32) as u32,
                    flags: u16::from(input.byte() % 8),
                    next: input.number(5) as u16,
                };
                let table = if input.byte() & 1 == 0 { bed.rings[0].desc() } else { 1 << 20 };
                bed.put_desc(table, u16::from(input.byte()) % SIZE, desc);
            }
            2 => bed.offer(0, u16::from(input.byte()) % (SIZE + 1)),
            3 => {
                if bed.rings[0].avail.wrapping_sub(bed.rings[0].seen) < 3 {
                    let request = [kind::IN, kind::OUT, kind::DISCARD, kind::WRITE_ZEROES, 8][input.below(5) as usize];
                    let (sector, room) = (input.number(64), input.below(2000) as usize);
                    let payload = input.take(64).to_vec();
                    let layout = Layout {
                        readable: vec![usize::from(input.byte())],
                        writable: vec![usize::from(input.byte())],
                        indirect: input.byte() & 1 == 0,
                    };
                    bed.send(0, request, sector, &payload, room, &layout);
                }
            }
            4 => {
                bed.kick(0);
                bed.settle();
            }
            _ => while bed.next_end_raw(0) {},
        }
    }
    bed.kick(0);
    bed.settle();
    let sent = bed.send(1, kind::FLUSH, 0, &[], 0, &Layout::default());
    bed.kick(1);
    assert_eq!(bed.wait(&sent).status, status::OK, "another queue goes on");
    all_is_well(bed);
}
