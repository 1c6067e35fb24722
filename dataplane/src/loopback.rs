//! A front end whose host is a source in the same thread: what it asks of a served disk ([`crate::io::tapped`]), as
//! requests of that disk, and the answers as completions.
//!
//! A write is copied once more: the source keeps its buffer for the record, and the disk takes one of its own.

use std::collections::VecDeque;

use crate::host::{Answer, DiskKey, Disks, FrontId, HEADROOM, HostDisk, MAX_PART, Request};
use crate::io::tapped::Tapped;
use crate::io::{Done, Errno, File, Io, Op, Part, Token};

/// Bits of a cookie that number the parts of an operation.
const PART_BITS: u32 = 16;

/// An operation whose parts have been asked for.
#[derive(Debug)]
struct Under {
    token: Token,
    offset: u64,
    len: u64,
    /// Of the source: filled by a read, held by a write.
    part: Option<Part>,
    reads: bool,
    left: u32,
    error: Option<Errno>,
}

/// The machine.
#[derive(Debug, Default)]
pub(crate) struct Loopback {
    under: Vec<Option<Under>>,
    free: Vec<u32>,
    taken: Vec<Answer>,
    /// No buffer for a write's copy: looked for again soon.
    pub starved: bool,
}

/// The parts of a range as front ends cut it.
fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    let (mut at, end, most) = (offset, offset + len, MAX_PART as u64);
    std::iter::from_fn(move || {
        let from = at;
        at = ((from / most + 1) * most).min(end);
        (from < end).then(|| (from, (at - from) as usize))
    })
}

impl Loopback {
    /// Asks the disks for what waits. `disk_of`: which disk a file is, and whether it is being given back; none while it may
    /// not be asked yet.
    pub fn ask<I: Io>(
        &mut self,
        io: &mut Tapped<I>,
        disks: &mut impl Disks<Tapped<I>>,
        disk_of: impl Fn(&str) -> Option<(DiskKey, bool)>,
    ) {
        self.starved = false;
        let mut early = Vec::new();
        while let Some((token, file, op)) = io.taps.next_asked() {
            let key = io.taps.name(file).map(&disk_of);
            match key {
                Some(None) => early.push((token, file, op)),
                // Closed under its source, which has been told to let go and has nothing to write any more: what was answered
                // is in the view's delta.
                Some(Some((key, true))) if matches!(op, Op::Sync { .. }) && disks.disk(key).is_none() => {
                    io.taps.complete(Done { token, result: Ok(0), part: None, parts: Vec::new() });
                }
                Some(Some((key, _))) => {
                    if let Err(op) = self.begin(io, disks, key, token, op) {
                        self.starved = true;
                        early.push((token, file, op));
                        break;
                    }
                }
                None => fail(io, token, op, Errno::BADF),
            }
        }
        early.into_iter().rev().for_each(|asked: (Token, File, Op)| io.taps.put_back(asked));
    }

    /// Gives the operation back if there is no buffer for it.
    fn begin<I: Io>(
        &mut self,
        io: &mut Tapped<I>,
        disks: &mut impl Disks<Tapped<I>>,
        key: DiskKey,
        token: Token,
        op: Op,
    ) -> Result<(), Op> {
        let Some(mut disk) = disks.disk(key) else {
            fail(io, token, op, Errno::NODEV);
            return Ok(());
        };
        let mut requests = VecDeque::new();
        let (offset, len, part, reads) = match op {
            Op::Read { offset, part, .. } => {
                let len = part.len as u64;
                requests.extend(parts(offset, len).map(|(offset, len)| Request::Read { offset, len }));
                (offset, len, Some(part), true)
            }
            Op::Write { file, offset, part, durable } => {
                let len = part.len as u64;
                let mut from = part.at;
                for (offset, len) in parts(offset, len) {
                    let at = HEADROOM + (offset % HEADROOM as u64) as usize;
                    let Some(mut buf) = io.pool().take(at + len + HEADROOM) else {
                        return Err(Op::Write { file, offset: offset - (from - part.at) as u64, part, durable });
                    };
                    buf[at..at + len].copy_from_slice(&part.buf[from..from + len]);
                    from += len;
                    requests.push_back(Request::Write { offset, data: Part { buf, at, len }, fua: durable });
                }
                (offset, len, Some(part), false)
            }
            Op::Zero { offset, len, unmap, .. } => {
                requests.push_back(Request::Zero { offset, len, unmap, fast_only: false, fua: false });
                (offset, len, None, false)
            }
            Op::Sync { .. } => {
                requests.push_back(Request::Flush);
                (0, 0, None, false)
            }
            op => {
                fail(io, token, op, Errno::OPNOTSUPP);
                return Ok(());
            }
        };
        let under = Under { token, offset, len, part, reads, left: requests.len() as u32, error: None };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.under[slot as usize] = Some(under);
                slot
            }
            None => {
                self.under.push(Some(under));
                (self.under.len() - 1) as u32
            }
        };
        for (number, request) in requests.into_iter().enumerate() {
            let own = u64::from(slot) << PART_BITS | number as u64;
            disk.request(io, FrontId::Loopback.cookie(own), request);
        }
        Ok(())
    }

    /// Takes what a disk has answered to this front end; other answers stay.
    pub fn collect<I: Io>(&mut self, io: &mut Tapped<I>, answers: &mut VecDeque<Answer>) {
        FrontId::Loopback.take(answers, &mut self.taken);
        for Answer { cookie, result } in std::mem::take(&mut self.taken) {
            let own = cookie & FrontId::OWN;
            let (slot, number) = ((own >> PART_BITS) as usize, (own & ((1 << PART_BITS) - 1)) as usize);
            let Some(under) = self.under.get_mut(slot).and_then(Option::as_mut) else { continue };
            match result {
                Err(errno) => under.error = Some(errno),
                Ok(read) if under.reads => under.error = under.error.or(fill(under, number, read).err()),
                Ok(_) => {}
            }
            under.left -= 1;
            if under.left == 0
                && let Some(under) = self.under[slot].take()
            {
                self.free.push(slot as u32);
                let result = under.error.map_or(Ok(under.len), Err);
                io.taps.complete(Done { token: under.token, result, part: under.part, parts: Vec::new() });
            }
        }
    }

    /// Nothing has been asked and not been answered.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.under.len()
    }
}

/// Puts the bytes of a part of a read into their place.
fn fill(under: &mut Under, number: usize, read: Option<Part>) -> Result<(), Errno> {
    let (Some(read), Some(out)) = (read, &mut under.part) else { return Err(Errno::IO) };
    let (at, len) = parts(under.offset, under.len).nth(number).ok_or(Errno::IO)?;
    if read.len != len {
        return Err(Errno::IO);
    }
    let to = out.at + (at - under.offset) as usize;
    out.buf[to..to + len].copy_from_slice(&read.buf[read.at..read.at + len]);
    Ok(())
}

fn fail<I>(io: &mut Tapped<I>, token: Token, op: Op, errno: Errno) {
    let part = match op {
        Op::Read { part, .. } | Op::Write { part, .. } => Some(part),
        _ => None,
    };
    io.taps.complete(Done { token, result: Err(errno), part, parts: Vec::new() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_the_multiples_of_the_longest_part() {
        let most = MAX_PART as u64;
        assert_eq!(parts(0, 4096).collect::<Vec<_>>(), [(0, 4096)]);
        assert_eq!(parts(most - 512, 1024).collect::<Vec<_>>(), [(most - 512, 512), (most, 512)]);
        let cut: Vec<_> = parts(512, 2 * most).collect();
        assert_eq!(cut, [(512, MAX_PART - 512), (most, MAX_PART), (2 * most, 512)]);
    }
}
