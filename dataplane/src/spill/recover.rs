//! What an earlier process left in a spill, found again without reading all of it: names, the first head of each
//! writer, and the frames of the last segment, which alone can be torn. The rest is checked when it is read to be sent.

use std::collections::VecDeque;

use afterimage_wire::frame::{FrameHeader, check_frame};
use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::segment::{Predecessor, SegmentHead, WrappedKey};

use super::{CLOSED_AFTER, SPARE, Segment, Spill, SpillConfig, parse_name};
use crate::io::{Errno, File, Io, Nanos, OpenHow, Token};
use crate::source::ProtectError;

/// An earlier life of the writer that still has frames to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Past {
    pub incarnation: IncarnationId,
    pub predecessor: Predecessor,
    pub wrapped: WrappedKey,
    /// The first frame that is in the spill, and its first record.
    pub first_frame: u64,
    pub first_seq: u64,
    /// The last frame that it sealed, as far as anything is left of it, and its last record.
    pub last_frame: u64,
    pub last_seq: u64,
    /// When the first frame in the spill was closed, on the clock of then.
    pub mono_ns: Nanos,
}

/// A spill with what was in it.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub spill: Spill,
    /// Oldest first; each follows the one before it.
    pub past: VecDeque<Past>,
}

impl Recovered {
    /// Keeps what follows the place that the logs name, and returns which frame and record of the first life left are
    /// known to be acknowledged. What does not follow is removed: its extents' bits are set, and it is compared.
    ///
    /// Segments go only when they are acknowledged, so whatever lies before the first frame here is. `usable` says
    /// whether a life can be shipped at all; `next_seq` is the first record of the life that begins now.
    pub fn follow<I: Io>(
        &mut self,
        io: &mut I,
        logged: Predecessor,
        next_seq: u64,
        usable: impl Fn(&Past) -> bool,
    ) -> (u64, u64) {
        let named = self.past.iter().position(|past| past.incarnation == logged.incarnation);
        let begins = |past: &Past| past.predecessor.incarnation == logged.incarnation && past.first_frame == 1;
        let whole = match named {
            Some(_) => true,
            None => self.past.front().is_some_and(begins),
        };
        let fits = self.past.back().is_some_and(|past| past.last_seq < next_seq) && self.past.iter().all(usable);
        if logged.incarnation.is_none() || !whole || !fits {
            self.past.clear();
            self.spill.clear(io);
            return (0, 0);
        }
        for _ in 0..named.unwrap_or(0) {
            self.drop_front(io);
        }
        let mut acked = match (self.past.front(), named) {
            (Some(first), Some(_)) if logged.frame >= first.first_frame => (logged.frame, logged.seq),
            (Some(first), _) => (first.first_frame - 1, first.first_seq - 1),
            (None, _) => (0, 0),
        };
        if self.past.front().is_some_and(|first| acked.0 >= first.last_frame) {
            self.drop_front(io);
            acked = self.past.front().map_or((0, 0), |first| (0, first.first_seq - 1));
        }
        acked
    }

    fn drop_front<I: Io>(&mut self, io: &mut I) {
        if let Some(past) = self.past.pop_front() {
            self.spill.drop_life(io, past.incarnation);
        }
    }

    /// How old the oldest record in it is at most, if the host has not been rebooted since.
    pub fn age(&self, now: Nanos) -> Option<Nanos> {
        let first = self.past.front()?;
        Some(now.saturating_sub(first.mono_ns.saturating_sub(CLOSED_AFTER)))
    }
}

fn failed(path: &str, action: &'static str, errno: Errno) -> ProtectError {
    let path = path.to_owned();
    match errno {
        Errno::AGAIN | Errno::BUSY => ProtectError::Locked { path },
        errno => ProtectError::File { path, action, errno },
    }
}

/// A writer's segments as their names say.
struct Life {
    incarnation: IncarnationId,
    head: SegmentHead,
    /// Its first frame's clock.
    mono_ns: Nanos,
}

/// Opens the spill of a stream; makes its folder if there is none.
///
/// # Errors
/// Its folder, or the lock of its last segment, which a dead process holds until its last write has ended. A segment
/// that makes no sense is no error: it and what is behind it does not count.
pub(crate) fn recover<I: Io>(
    io: &mut I,
    config: SpillConfig,
    stream: StreamId,
    token: Token,
) -> Result<Recovered, ProtectError> {
    let dir = config.dir.clone();
    let names = io.list(&dir).map_err(|errno| failed(&dir, "list", errno))?;
    let mut spill = Spill::new(config, stream, token);
    if names.iter().any(|name| name == SPARE) {
        // Made ahead, and not used or not yet counted.
        let path = spill.spare_path();
        io.remove(&path).map_err(|errno| failed(&path, "remove", errno))?;
    }
    let mut found: Vec<_> = names.iter().filter_map(|name| Some((parse_name(name)?, name))).collect();
    found.sort();
    for ((number, incarnation, first_frame), name) in found {
        let path = format!("{dir}/{name}");
        let size = match io.open(&path, OpenHow::default()) {
            Ok(file) => {
                let size = io.info(file).map_or(0, |info| info.size);
                io.close(file);
                size
            }
            Err(errno) => return Err(failed(&path, "open", errno)),
        };
        spill.next_number = number + 1;
        spill.bytes += size;
        let (last_frame, end) = (u64::MAX, size);
        spill.segments.push_back(Segment { number, path, incarnation, first_frame, last_frame, end, size });
    }
    let mut place = None;
    while let Some(last) = spill.segments.back() {
        let lock = lock(io, &last.path)?;
        place = scan(io, last, stream);
        io.close(lock);
        if place.is_some() {
            break;
        }
        // Made and not yet used, or torn at its begin; everything before it was durable when it was made.
        spill.remove_back(io);
    }
    let Some((place, end)) = place else { return Ok(Recovered { spill, past: VecDeque::new() }) };
    if let Some(last) = spill.segments.back_mut() {
        (last.last_frame, last.end) = (place.frame, end);
    }
    spill.set_place(place);
    let past = lives(io, &mut spill, stream, place);
    Ok(Recovered { spill, past })
}

fn lock<I: Io>(io: &mut I, path: &str) -> Result<File, ProtectError> {
    let how = OpenHow { write: true, create_new: false, lock: true };
    io.open(path, how).map_err(|errno| failed(path, "open", errno))
}

/// The last whole frame of a segment, and where it ends; none if there is none.
fn scan<I: Io>(io: &mut I, segment: &Segment, stream: StreamId) -> Option<(Predecessor, u64)> {
    let bytes = io.read_small(&segment.path).ok()?;
    let (head, mut at) = SegmentHead::decode(&bytes).ok()?;
    if (head.stream, head.incarnation, head.segment) != (stream, segment.incarnation, segment.number) {
        return None;
    }
    let mut next = (head.first_frame, head.first_seq);
    let mut place = None;
    while let Some(rest) = bytes.get(at..)
        && let Ok(header) = FrameHeader::parse(rest)
        && let Some(frame) = rest.get(..header.length.get() as usize)
        && check_frame(frame).is_ok()
        && (header.stream, header.incarnation) == (stream, segment.incarnation)
        && (header.number.get(), header.first_seq.get()) == next
    {
        at += frame.len();
        next = (next.0 + 1, header.last_seq.get() + 1);
        let (frame, seq) = (header.number.get(), header.last_seq.get());
        place = Some((Predecessor { incarnation: segment.incarnation, frame, seq }, at as u64));
    }
    place
}

/// The writers in a spill whose last frame is `place`. What does not lead there without a gap is removed.
fn lives<I: Io>(io: &mut I, spill: &mut Spill, stream: StreamId, place: Predecessor) -> VecDeque<Past> {
    let mut past: VecDeque<Past> = VecDeque::new();
    // From the newest back, each judged by what its successor says of it.
    let mut last = place;
    let mut at = spill.segments.len();
    while at > 0 {
        let end = at;
        let incarnation = spill.segments[end - 1].incarnation;
        while at > 0 && spill.segments[at - 1].incarnation == incarnation {
            at -= 1;
        }
        let life = (incarnation == last.incarnation).then(|| first_of(io, &spill.segments[at], stream)).flatten();
        let Some(life) = life.filter(|life| life.head.first_frame <= last.frame) else {
            at = end;
            break;
        };
        past.push_front(Past {
            incarnation: life.incarnation,
            predecessor: life.head.predecessor,
            wrapped: life.head.key,
            first_frame: life.head.first_frame,
            first_seq: life.head.first_seq,
            last_frame: last.frame,
            last_seq: last.seq,
            mono_ns: life.mono_ns,
        });
        spill.segments[end - 1].last_frame = last.frame;
        last = life.head.predecessor;
        if life.head.first_frame > 1 {
            // Its earlier frames were acknowledged, and with them everything before it.
            break;
        }
    }
    for _ in 0..at {
        spill.remove_front(io);
    }
    past
}

fn first_of<I: Io>(io: &mut I, segment: &Segment, stream: StreamId) -> Option<Life> {
    let bytes = io.read_small(&segment.path).ok()?;
    let (head, length) = SegmentHead::decode(&bytes).ok()?;
    let header = FrameHeader::parse(bytes.get(length..)?).ok()?;
    let named = (stream, segment.incarnation, segment.number, segment.first_frame);
    let says = (head.stream, head.incarnation, head.segment, head.first_frame);
    let mono_ns = header.mono_ns.get();
    (named == says).then_some(Life { incarnation: segment.incarnation, head, mono_ns })
}
