//! Operations under way: what the kernel holds, how it is told, and what its answer means.
//!
//! A [`Flight`] owns the buffers of its operation from the submission to the completion. Flights stand in a slab whose
//! index is the operation's `user_data`; it grows to the most that were ever under way together, and then allocates no
//! more.

use io_uring::{opcode, squeue, types};

use crate::io::guest::{PIECES_MAX, Scatter};
use crate::io::ublk::uapi::data_offset;
use crate::io::{Errno, Op, Part, Pool, Token, UblkOp};

/// Most parts of one vectored operation.
pub(super) const MAX_PARTS: usize = 64;
/// The pool is registered in pieces of this many bytes; the kernel takes at most 1 GiB in one.
pub(super) const REGISTRATION: usize = 64 << 20;
/// Most bytes of one operation.
const MAX_LEN: u32 = 1 << 30;
/// RWF_DSYNC.
const DSYNC: i32 = libc::RWF_DSYNC;
/// Bytes of an event counter.
const EVENT_LEN: u64 = 8;
const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;

/// Header and vectors of a vectored operation, at an address that stays.
pub(super) struct Message {
    header: libc::msghdr,
    vectors: [libc::iovec; PIECES_MAX],
}

const _: () = assert!(MAX_PARTS <= PIECES_MAX);

impl Message {
    pub(super) fn new() -> Box<Self> {
        // SAFETY: both are plain C structures for which all zeros (null pointers, no lengths) is a valid value.
        Box::new(unsafe { std::mem::zeroed() })
    }

    /// Points at the parts, but for their first `skip` bytes.
    fn point(&mut self, parts: &mut [Part], mut skip: usize) -> *mut libc::msghdr {
        let mut count = 0;
        for part in parts {
            let from = skip.min(part.len);
            skip -= from;
            if from < part.len {
                // In bounds: checked when the operation was submitted.
                let base = part.buf.address().wrapping_add(part.at + from);
                self.vectors[count] = libc::iovec { iov_base: base.cast(), iov_len: part.len - from };
                count += 1;
            }
        }
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = count;
        &mut self.header
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    ReadInto,
    Write {
        durable: bool,
    },
    Sync,
    Zero {
        unmap: bool,
    },
    Recv,
    RecvV,
    Send,
    SendV,
    /// Until an event counter can be read.
    Hear,
    /// Adds to an event counter.
    Raise,
    UblkFetch {
        tag: u16,
        commit: Option<i32>,
    },
    UblkCopy {
        out: bool,
    },
}

/// An operation and all that the kernel uses of it.
pub(super) struct Flight {
    pub(super) token: Token,
    /// Of the file or socket in the table.
    pub(super) number: u32,
    pub(super) kind: Kind,
    pub(super) offset: u64,
    /// Bytes done by earlier rounds.
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) part: Option<Part>,
    pub(super) parts: Vec<Part>,
    pub(super) to: Option<Scatter>,
    pub(super) message: Option<Box<Message>>,
}

/// What a completion means for its operation.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// It is over.
    Over(Result<u64, Errno>),
    /// The rest has to be submitted.
    Continue,
}

fn check(part: &Part) -> u64 {
    // Memory safety hangs on this: the kernel is given the address.
    assert!(
        part.len > 0 && part.at.checked_add(part.len).is_some_and(|end| end <= part.buf.len()),
        "{} bytes at {} are not within a buffer of {}",
        part.len,
        part.at,
        part.buf.len()
    );
    part.len as u64
}

impl Flight {
    /// From anything but a timer and what [`super::helper`] does.
    pub(super) fn new(token: Token, op: Op) -> Self {
        let flight = |number, kind, offset, total, part, parts| Self {
            token,
            number,
            kind,
            offset,
            done: 0,
            total,
            part,
            parts,
            to: None,
            message: None,
        };
        match op {
            Op::Read { file, offset, part } => flight(file.0, Kind::Read, offset, check(&part), Some(part), Vec::new()),
            Op::ReadInto { file, offset, to } => {
                assert!(!to.is_empty(), "a read of nothing");
                let flight = flight(file.0, Kind::ReadInto, offset, to.len() as u64, None, Vec::new());
                Self { to: Some(to), ..flight }
            }
            Op::Write { file, offset, part, durable } => {
                flight(file.0, Kind::Write { durable }, offset, check(&part), Some(part), Vec::new())
            }
            Op::Sync { file } => flight(file.0, Kind::Sync, 0, 0, None, Vec::new()),
            Op::Zero { file, offset, len, unmap } => {
                flight(file.0, Kind::Zero { unmap }, offset, len, None, Vec::new())
            }
            Op::Recv { sock, part } => flight(sock.0, Kind::Recv, 0, check(&part), Some(part), Vec::new()),
            Op::Send { sock, part } => flight(sock.0, Kind::Send, 0, check(&part), Some(part), Vec::new()),
            Op::RecvV { sock, parts } | Op::SendV { sock, parts } if parts.is_empty() || parts.len() > MAX_PARTS => {
                panic!("{} parts for socket {}: 1 to {MAX_PARTS} are possible", parts.len(), sock.0)
            }
            Op::RecvV { sock, parts } => flight(sock.0, Kind::RecvV, 0, parts.iter().map(check).sum(), None, parts),
            Op::SendV { sock, parts } => flight(sock.0, Kind::SendV, 0, parts.iter().map(check).sum(), None, parts),
            Op::Ublk(UblkOp::Fetch { device, tag, commit }) => {
                flight(device.0, Kind::UblkFetch { tag, commit }, 0, 0, None, Vec::new())
            }
            Op::Ublk(UblkOp::CopyIn { device, tag, at, part }) => {
                let kind = Kind::UblkCopy { out: false };
                flight(device.0, kind, data_offset(tag, at), check(&part), Some(part), Vec::new())
            }
            Op::Ublk(UblkOp::CopyOut { device, tag, at, part }) => {
                let kind = Kind::UblkCopy { out: true };
                flight(device.0, kind, data_offset(tag, at), check(&part), Some(part), Vec::new())
            }
            Op::Timer { .. } | Op::Create { .. } | Op::SyncDir { .. } => {
                unreachable!("timers, and what blocks, do not go to the kernel's ring")
            }
        }
    }

    pub(super) fn is_net(&self) -> bool {
        matches!(self.kind, Kind::Recv | Kind::RecvV | Kind::Send | Kind::SendV | Kind::Hear | Kind::Raise)
    }

    /// What is asked of a socket is asked of an event counter, which the kernel has other operations for.
    pub(super) fn on_event(&mut self) {
        self.kind = match self.kind {
            Kind::Recv => Kind::Hear,
            Kind::Send => Kind::Raise,
            other => panic!("{other:?} on an event counter"),
        };
        assert_eq!(self.total, EVENT_LEN, "an event counter takes and gives 8 bytes");
    }

    /// Waits for a request of a ublk device: nothing but the device's end completes it, and it has no buffer.
    pub(super) fn is_fetch(&self) -> bool {
        matches!(self.kind, Kind::UblkFetch { .. })
    }

    pub(super) fn needs_message(&self) -> bool {
        matches!(self.kind, Kind::RecvV | Kind::SendV | Kind::ReadInto)
    }

    /// The submission entry for what is left to do. Of `pool` so many pieces, from the first on, are `registered` with
    /// the ring.
    pub(super) fn entry(&mut self, pool: &Pool, registered: usize) -> squeue::Entry {
        let fd = types::Fixed(u32::from(self.number as u16));
        let (mode_zero, keep) = (libc::FALLOC_FL_ZERO_RANGE, libc::FALLOC_FL_KEEP_SIZE);
        if let Some(entry) = super::ublk::entry(self) {
            return entry;
        }
        match self.kind {
            Kind::UblkFetch { .. } | Kind::UblkCopy { .. } => unreachable!("their entry was made above"),
            Kind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Kind::Zero { unmap } => {
                let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { mode_zero } | keep;
                opcode::Fallocate::new(fd, self.total).offset(self.offset).mode(mode).build()
            }
            Kind::Hear => opcode::PollAdd::new(fd, libc::POLLIN as u32).build(),
            Kind::ReadInto => {
                let (message, to) = (self.message.as_mut(), self.to.as_ref());
                let (message, to) = message.zip(to).expect("a read into shared memory has its vectors and its ranges");
                let count = to.point(&mut message.vectors, self.done as usize);
                let offset = self.offset + self.done;
                opcode::Readv::new(fd, message.vectors.as_ptr(), count as u32).offset(offset).build()
            }
            Kind::RecvV | Kind::SendV => {
                let message = self.message.as_mut().expect("a vectored operation has its message");
                let header = message.point(&mut self.parts, self.done as usize);
                if self.kind == Kind::RecvV {
                    opcode::RecvMsg::new(fd, header).build()
                } else {
                    opcode::SendMsg::new(fd, header).flags(SEND_FLAGS as u32).build()
                }
            }
            Kind::Read | Kind::Write { .. } | Kind::Recv | Kind::Send | Kind::Raise => {
                let done = self.done as usize;
                let part = self.part.as_mut().expect("the operation has its buffer");
                let fixed = registration(pool, part, done).filter(|piece| usize::from(*piece) < registered);
                // In bounds: `done` is less than the length, which was checked when it was submitted.
                let address = part.buf.address().wrapping_add(part.at + done);
                let len = u32::try_from(part.len - done).map_or(MAX_LEN, |len| len.min(MAX_LEN));
                let offset = self.offset + self.done;
                match (self.kind, fixed) {
                    (Kind::Raise, _) => opcode::Write::new(fd, address, len).build(),
                    (Kind::Recv, _) => opcode::Recv::new(fd, address, len).build(),
                    (Kind::Send, _) => opcode::Send::new(fd, address, len).flags(SEND_FLAGS).build(),
                    (Kind::Read, Some(index)) => opcode::ReadFixed::new(fd, address, len, index).offset(offset).build(),
                    (Kind::Read, None) => opcode::Read::new(fd, address, len).offset(offset).build(),
                    (kind, index) => {
                        let flags = if kind == (Kind::Write { durable: true }) { DSYNC } else { 0 };
                        match index {
                            Some(index) => {
                                opcode::WriteFixed::new(fd, address, len, index).offset(offset).rw_flags(flags).build()
                            }
                            None => opcode::Write::new(fd, address, len).offset(offset).rw_flags(flags).build(),
                        }
                    }
                }
            }
        }
    }

    /// What the kernel's result means.
    pub(super) fn outcome(&mut self, result: i32) -> Outcome {
        if result < 0 {
            return match -result {
                libc::EINTR => Outcome::Continue,
                // The counter is as high as it goes: it is raised, then.
                libc::EAGAIN if self.kind == Kind::Raise => Outcome::Over(Ok(EVENT_LEN)),
                error => Outcome::Over(Err(Errno(error))),
            };
        }
        match self.kind {
            Kind::Recv | Kind::RecvV => Outcome::Over(Ok(result as u64)),
            Kind::Sync | Kind::Zero { .. } | Kind::UblkFetch { .. } => Outcome::Over(Ok(0)),
            Kind::Hear | Kind::Raise => Outcome::Over(Ok(EVENT_LEN)),
            Kind::Read | Kind::ReadInto | Kind::Write { .. } | Kind::Send | Kind::SendV | Kind::UblkCopy { .. } => {
                self.done += result as u64;
                let direct = !self.is_net();
                if self.done >= self.total {
                    // Pages that have gone from under a mapping take what was read along.
                    let gone = self.to.as_ref().is_some_and(|to| to.check().is_err());
                    Outcome::Over(if gone { Err(Errno::FAULT) } else { Ok(self.total) })
                } else if result == 0 || (direct && !self.done.is_multiple_of(512)) {
                    // The end of the file, maybe within a block, where direct I/O cannot go on.
                    Outcome::Over(Err(Errno::IO))
                } else {
                    Outcome::Continue
                }
            }
        }
    }
}

/// In which registered piece of the pool the bytes from `skip` on lie; none if in none or in two.
fn registration(pool: &Pool, part: &mut Part, skip: usize) -> Option<u16> {
    if !pool.same(part.buf.pool()) {
        return None;
    }
    let first = part.buf.address().addr() + part.at + skip - pool.region().0.addr();
    let last = first + (part.len - skip) - 1;
    (first / REGISTRATION == last / REGISTRATION).then_some((first / REGISTRATION) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Class, File, Sock};

    fn part(len: usize) -> Part {
        let pool = Pool::new(&[Class { capacity: 65536, count: 1 }]);
        Part { buf: pool.take(len).unwrap(), at: 0, len }
    }

    #[test]
    fn a_short_write_goes_on_and_an_end_of_file_is_an_error() {
        let mut write = Flight::new(1, Op::Write { file: File(0), offset: 0, part: part(8192), durable: false });
        assert_eq!(write.outcome(4096), Outcome::Continue);
        assert_eq!((write.done, write.total), (4096, 8192));
        assert_eq!(write.outcome(4096), Outcome::Over(Ok(8192)));
        let mut read = Flight::new(1, Op::Read { file: File(0), offset: 0, part: part(8192) });
        assert_eq!(read.outcome(5000), Outcome::Over(Err(Errno::IO)));
        let mut read = Flight::new(1, Op::Read { file: File(0), offset: 0, part: part(8192) });
        assert_eq!(read.outcome(0), Outcome::Over(Err(Errno::IO)));
    }

    #[test]
    fn a_short_send_goes_on_at_any_byte() {
        let mut send = Flight::new(1, Op::Send { sock: Sock(0), part: part(1000) });
        assert_eq!(send.outcome(333), Outcome::Continue);
        assert_eq!(send.outcome(-libc::EINTR), Outcome::Continue);
        assert_eq!(send.outcome(-libc::EPIPE), Outcome::Over(Err(Errno::PIPE)));
    }

    #[test]
    fn vectors_skip_what_is_done() {
        let mut parts = vec![part(100), part(50), part(10)];
        let mut message = Message::new();
        message.point(&mut parts, 120);
        assert_eq!(message.header.msg_iovlen, 2);
        assert_eq!(message.vectors[0].iov_len, 30);
        assert_eq!(message.vectors[1].iov_len, 10);
    }

    #[test]
    #[should_panic(expected = "not within a buffer")]
    fn a_range_past_its_buffer_is_refused() {
        let mut part = part(4096);
        part.at = 65536;
        Flight::new(1, Op::Recv { sock: Sock(0), part });
    }
}
