//! Reading the spill back, ahead of the sender: a window of the segment at a time, frame by frame into buffers of their
//! own. Each frame is checked as if it came over a network.

use afterimage_wire::ALIGN;
use afterimage_wire::frame::{FrameHeader, MAX_FRAME, check_frame};
use afterimage_wire::ids::IncarnationId;
use afterimage_wire::segment::SegmentHead;

use super::{Spill, kind};
use crate::io::{Buf, Done, File, Io, Op, OpenHow, Part};

/// Window for which there is memory when there is none for the longest frame, bytes.
const SMALL_WINDOW: usize = 128 * 1024;

/// A frame that was read back.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub number: u64,
    pub first_seq: u64,
    pub last_seq: u64,
    /// When it was closed.
    pub mono_ns: u64,
    pub buf: Buf,
    pub len: usize,
}

/// What became of a read.
#[derive(Debug)]
pub(crate) enum ReadBack {
    /// It went as it should; some frames may have been handed over.
    Fine,
    /// A frame that must be there is not, or cannot be read.
    Broken(String),
}

/// The reading half of a [`Spill`].
#[derive(Debug, Default)]
pub(super) struct Read {
    incarnation: IncarnationId,
    /// The frame that must come next.
    next: u64,
    /// Number of the segment, its file.
    file: Option<(u64, File)>,
    pos: u64,
    /// The read under way.
    busy: Option<u32>,
    serial: u32,
    /// The next frame is longer than a small window.
    long: bool,
    /// Where the read under way was to begin is not where the next one must.
    moved: bool,
}

impl Spill {
    /// Reads on, so that frame `from` of `incarnation` comes next. One read at a time; without a buffer none.
    pub fn read<I: Io>(&mut self, io: &mut I, incarnation: IncarnationId, from: u64) -> ReadBack {
        if self.read.busy.is_some() {
            return ReadBack::Fine;
        }
        if (self.read.incarnation, self.read.next) != (incarnation, from) || self.read.moved {
            self.close_reader(io);
            (self.read.incarnation, self.read.next) = (incarnation, from);
        }
        // The last of those that may hold it: one that broke off is followed by another with the same first frame.
        let at = self.segments.iter().rposition(|s| s.incarnation == incarnation && s.first_frame <= from);
        let Some(at) = at else {
            return ReadBack::Broken(format!("frame {from} is in no segment"));
        };
        let number = self.segments[at].number;
        if self.read.file.is_none_or(|(open, _)| open != number) {
            self.close_reader(io);
            match io.open(&self.segments[at].path, OpenHow::default()) {
                Ok(file) => self.read.file = Some((number, file)),
                Err(errno) => return ReadBack::Broken(format!("{}: {errno}", self.segments[at].path)),
            }
        }
        let (Some((_, file)), segment) = (self.read.file, &self.segments[at]) else { return ReadBack::Fine };
        let end = segment.end.min(segment.size) / ALIGN as u64 * ALIGN as u64;
        if self.read.pos >= end {
            return ReadBack::Broken(format!("frame {from} is missing in {}", segment.path));
        }
        // When large buffers are short a small window does, unless the next frame is longer.
        let small = || if self.read.long { None } else { io.pool().take(SMALL_WINDOW) };
        let Some(buf) = io.pool().take(MAX_FRAME).or_else(small) else { return ReadBack::Fine };
        let len = (end - self.read.pos).min(MAX_FRAME.min(buf.len()) as u64) as usize;
        self.read.serial = (self.read.serial + 1) & 0xff_ffff;
        self.read.busy = Some(self.read.serial);
        let (token, offset) = (self.op(kind::READ, self.read.serial), self.read.pos);
        io.submit(token, Op::Read { file, offset, part: Part { buf, at: 0, len } });
        ReadBack::Fine
    }

    /// Takes a completed read: gives `take` each frame from the wanted one on, up to `last`. Frames for which the pool
    /// has no buffer are read again.
    pub fn read_done<I: Io>(
        &mut self,
        io: &mut I,
        serial: u32,
        done: Done,
        last: u64,
        mut take: impl FnMut(Loaded),
    ) -> ReadBack {
        if self.read.busy != Some(serial) {
            return ReadBack::Fine;
        }
        self.read.busy = None;
        if self.read.moved {
            return ReadBack::Fine;
        }
        let part = match (done.result, done.part) {
            (Ok(_), Some(part)) => part,
            (result, _) => return ReadBack::Broken(format!("reading: {:?}", result.err())),
        };
        match self.frames(io, &part.buf[part.at..part.at + part.len], last, &mut take) {
            Ok(()) => ReadBack::Fine,
            Err(why) => ReadBack::Broken(why),
        }
    }

    fn frames<I: Io>(&mut self, io: &I, window: &[u8], last: u64, take: &mut impl FnMut(Loaded)) -> Result<(), String> {
        let Some((number, _)) = self.read.file else { return Ok(()) };
        let mut at = 0;
        if self.read.pos == 0 {
            let (head, length) = SegmentHead::decode(window).map_err(|error| error.to_string())?;
            if (head.stream, head.incarnation, head.segment) != (self.stream, self.read.incarnation, number) {
                return Err("a segment is not the one that its name says".into());
            }
            at = length;
            self.read.pos += length as u64;
        }
        while at < window.len() && self.read.next <= last {
            let header = match FrameHeader::parse(&window[at..]) {
                Ok(header) if header.incarnation == self.read.incarnation && header.stream == self.stream => *header,
                // The frames of the segment end here. The next one must go on where they end.
                _ => {
                    let next = self.read.next;
                    let further = self
                        .segments
                        .iter()
                        .any(|s| s.incarnation == self.read.incarnation && s.first_frame == next && s.number > number);
                    self.read.pos = u64::MAX;
                    return if further { Ok(()) } else { Err(format!("frame {next} is missing")) };
                }
            };
            let length = header.length.get() as usize;
            let Some(bytes) = window.get(at..at + length) else {
                // The next window begins here.
                if at > 0 || (!self.read.long && window.len() < length) {
                    self.read.long = at == 0;
                    return Ok(());
                }
                return Err(format!("frame {} is cut off", header.number.get()));
            };
            let frame = header.number.get();
            if frame > self.read.next {
                return Err(format!("frame {} is missing", self.read.next));
            }
            if frame == self.read.next {
                check_frame(bytes).map_err(|error| format!("frame {frame}: {error}"))?;
                let Some(mut buf) = io.pool().take(length) else { return Ok(()) };
                buf[..length].copy_from_slice(bytes);
                self.read.next += 1;
                self.read.long = false;
                take(Loaded {
                    number: frame,
                    first_seq: header.first_seq.get(),
                    last_seq: header.last_seq.get(),
                    mono_ns: header.mono_ns.get(),
                    buf,
                    len: length,
                });
            }
            at += length;
            self.read.pos += length as u64;
        }
        Ok(())
    }

    /// The segment that is being read, and how far; 0 for none.
    pub(super) fn read_place(&self) -> (u64, u64) {
        (self.read.file.map_or(0, |(number, _)| number), self.read.pos)
    }

    /// A read is under way.
    pub fn is_reading(&self) -> bool {
        self.read.busy.is_some()
    }

    /// The next frame that a read brings, of which writer.
    pub fn reading(&self) -> (IncarnationId, u64) {
        (self.read.incarnation, self.read.next)
    }

    pub(super) fn close_reader<I: Io>(&mut self, io: &mut I) {
        if let Some((_, file)) = self.read.file.take() {
            io.close(file);
        }
        self.read.pos = 0;
        self.read.moved = self.read.busy.is_some();
    }

    /// A segment goes.
    pub(super) fn close_read<I: Io>(&mut self, io: &mut I, number: u64) {
        if self.read.file.is_some_and(|(open, _)| open == number) {
            self.close_reader(io);
        }
    }
}
