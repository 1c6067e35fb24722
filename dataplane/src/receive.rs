//! Receiving: bytes of a source's connection become batches for the journal, and what is durable is acknowledged.
//!
//! Frames are received into one aligned buffer, several at a time, and that buffer is written: nothing is copied but,
//! now and then, the beginning of a frame that does not fit behind the ones before it. Order, identity and CRC are
//! checked before anything is written; a frame that was received before (a resend) is passed over and acknowledged
//! again.

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_wire::control::{CONTROL_LEN, Control, StopReason};
use afterimage_wire::frame::{FRAME_HEADER_LEN, FrameHeader, check_frame};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::{ALIGN, FormatError};

use crate::compare::Compare;
use crate::io::{Buf, Done, Errno, Io, Nanos, Op, Part, Sock};
use crate::journal::{Batch, Journal, Writer};
use crate::seal::ControlKey;
use crate::target::ops::{Ctx, Purpose};

/// Smallest receive buffer, bytes.
const RECEIVE: usize = 512 * 1024;
/// The beginning of a frame is copied to a new buffer if it is at most this long, so that the frames before it are
/// written at once; for a longer one its end is waited for.
const COPY: usize = 128 * 1024;
/// How often an idle source hears that the target is there.
const ALIVE: Nanos = 1_000_000_000;
/// How long a stopped connection is still read (and what comes thrown away), so that the source gets to see why: closing
/// with bytes unread would reset the connection and could take the reason away.
const LINGER: Nanos = 2_000_000_000;
/// Room for control messages in one send, bytes.
const CONTROL_ROOM: usize = 4096;
/// Answers to a source's questions in one send: there is room for the other messages beside them.
const MAX_COMPARED: usize = CONTROL_ROOM / CONTROL_LEN - MAX_WANTS - 4;

/// Ranges that a source can be asked for again at a time; the owner asks again.
pub(crate) const MAX_WANTS: usize = 32;

/// What a connection comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The source closed it, or it broke.
    Peer(Option<Errno>),
    /// Stopped by us.
    Stopped(StopReason, String),
}

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Connection {
    pub id: u32,
    pub stream: u32,
    stream_id: StreamId,
    pub writer: Arc<Writer>,
    /// Disks that its source claims, with their generations.
    pub claims: Vec<(DiskId, u64)>,
    sock: Sock,
    control: ControlKey,
    buf: Option<Buf>,
    filled: usize,
    receiving: bool,
    /// Frame and record that must come next.
    next: (u64, u64),
    /// What the newest frame that came in order says of acknowledgements and promises.
    pub promised: Option<(u64, u32)>,
    sending: bool,
    ready: bool,
    /// Newest durable place that was not yet told.
    ack: Option<(u64, u64)>,
    /// Ranges that the source is to send again.
    wants: Vec<Control>,
    /// Answers to be sent: a record of hashes, and which of its steps differ.
    compared: VecDeque<(u64, u64)>,
    stop: Option<Control>,
    last_sent: Nanos,
    pub last_heard: Nanos,
    /// The other end is gone.
    gone: bool,
    /// Stopped, and the reason sent: until when it is read on.
    linger: Option<Nanos>,
    /// Why it ends; it is closed once what is to be sent has been.
    pub end: Option<End>,
    pub received_bytes: u64,
    pub received_frames: u64,
}

impl Connection {
    /// The source goes on with frame `next.0`, whose first record is not below `next.1`.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        id: u32,
        stream: u32,
        stream_id: StreamId,
        writer: Arc<Writer>,
        claims: Vec<(DiskId, u64)>,
        sock: Sock,
        control: ControlKey,
        next: (u64, u64),
        now: Nanos,
    ) -> Self {
        Self {
            id,
            stream,
            stream_id,
            writer,
            claims,
            sock,
            control,
            buf: None,
            filled: 0,
            receiving: false,
            next,
            promised: None,
            sending: false,
            ready: true,
            ack: None,
            wants: Vec::new(),
            compared: VecDeque::new(),
            stop: None,
            last_sent: now,
            last_heard: now,
            gone: false,
            linger: None,
            end: None,
            received_bytes: 0,
            received_frames: 0,
        }
    }

    /// Ends it: nothing more is taken; the reason is sent, sealed, and then it is closed.
    pub fn stop(&mut self, reason: StopReason, value: u64, why: String) {
        if self.end.is_none() {
            self.stop = Some(Control::Stop { reason, value });
            self.end = Some(End::Stopped(reason, why));
            self.ack = None;
        }
    }

    /// Everything up to this place is durable.
    pub fn acknowledge(&mut self, frame: u64, seq: u64) {
        if self.end.is_none() {
            self.ack = Some((frame, seq));
        }
    }

    /// The source is to send this range again: at most [`MAX_WANTS`] of them wait. False: not now.
    pub fn want(&mut self, disk: u16, offset: u64, len: u64) -> bool {
        let may = self.end.is_none() && self.wants.len() < MAX_WANTS;
        if may {
            self.wants.push(Control::Want { disk, offset, len });
        }
        may
    }

    /// Takes answers to be sent, as many as go out next.
    pub fn compared(&mut self, compare: &mut Compare) {
        while self.end.is_none()
            && self.compared.len() < MAX_COMPARED
            && let Some(answer) = compare.next_answer()
        {
            self.compared.push_back(answer);
        }
    }

    /// When a turn is wanted although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        if self.end.is_none() { Some(self.last_sent + ALIVE) } else { self.linger }
    }

    /// It has ended and nothing of it is left to do.
    pub fn is_over(&self, now: Nanos) -> bool {
        match &self.end {
            None => false,
            Some(End::Peer(_)) => {
                let whole = self.buf.as_ref().is_some_and(|buf| self.whole_frames(buf).is_some());
                !self.sending && !self.receiving && !whole
            }
            Some(End::Stopped(..)) => {
                !self.sending && self.stop.is_none() && (self.gone || self.linger.is_none_or(|until| now >= until))
            }
        }
    }

    /// It would receive, but has no buffer.
    pub fn is_starved(&self) -> bool {
        self.end.is_none() && !self.receiving && self.buf.is_none()
    }

    /// Closes the socket.
    pub fn close<I: Io>(&mut self, io: &mut I) {
        io.close_sock(self.sock);
    }

    /// Sends what is to be said, hands over what has come, receives more.
    pub fn turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, journal: &mut Journal) {
        self.hand_over(ctx, journal);
        self.receive(ctx);
        self.say(ctx);
    }

    /// Sends what is to be said; reads on after a stop.
    pub fn say<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        self.send(ctx);
        if !matches!(self.end, Some(End::Stopped(..))) || self.receiving || self.gone {
            return;
        }
        self.filled = 0;
        let buf = self.buf.take().or_else(|| ctx.io.pool().take(CONTROL_ROOM));
        if let Some(buf) = buf {
            self.receiving = true;
            let part = Part { at: 0, len: buf.len(), buf };
            ctx.submit(Purpose::Receive(self.id), Op::Recv { sock: self.sock, part });
        }
    }

    fn send<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        let now = ctx.io.now();
        let alive = self.end.is_none() && now >= self.last_sent + ALIVE;
        let told = self.ack.is_some() || !self.wants.is_empty() || !self.compared.is_empty();
        let nothing = self.stop.is_none() && !self.ready && !told && !alive;
        if self.sending || nothing || matches!(self.end, Some(End::Peer(_))) {
            if matches!(self.end, Some(End::Peer(_))) {
                self.stop = None;
            }
            return;
        }
        let Some(mut buf) = ctx.io.pool().take(CONTROL_ROOM) else { return };
        let mut len = 0;
        let mut put = |control: &mut ControlKey, message: Control| {
            let mut sealed = [0; CONTROL_LEN];
            control.seal(&message, &mut sealed);
            buf[len..len + CONTROL_LEN].copy_from_slice(&sealed);
            len += CONTROL_LEN;
        };
        let ready = std::mem::take(&mut self.ready);
        if ready {
            put(&mut self.control, Control::Ready);
        }
        let ack = self.ack.take();
        if let Some((frame, seq)) = ack {
            put(&mut self.control, Control::Ack { frame, seq });
        }
        for want in self.wants.drain(..) {
            put(&mut self.control, want);
        }
        if self.stop.is_none() {
            for (seq, differs) in self.compared.drain(..) {
                put(&mut self.control, Control::Compared { seq, differs });
            }
        }
        match self.stop.take() {
            Some(stop) => {
                self.linger = Some(now + LINGER);
                put(&mut self.control, stop);
            }
            None if !ready && !told => put(&mut self.control, Control::Alive),
            None => {}
        }
        self.sending = true;
        self.last_sent = now;
        ctx.submit(Purpose::Control(self.id), Op::Send { sock: self.sock, part: Part { buf, at: 0, len } });
    }

    /// Control messages have been sent, or not.
    pub fn on_sent(&mut self, done: &Done) {
        self.sending = false;
        if let Err(errno) = done.result {
            self.end_by_peer(Some(errno));
        }
    }

    /// Bytes have come, or the end.
    pub fn on_received(&mut self, now: Nanos, done: Done) {
        self.receiving = false;
        self.buf = done.part.map(|part| part.buf);
        match done.result {
            Ok(0) => self.end_by_peer(None),
            Ok(len) => {
                self.last_heard = now;
                self.filled += len as usize;
                self.received_bytes += len;
            }
            Err(errno) => self.end_by_peer(Some(errno)),
        }
    }

    fn end_by_peer(&mut self, errno: Option<Errno>) {
        self.gone = true;
        self.stop = None;
        self.end.get_or_insert(End::Peer(errno));
    }

    /// What has come is not wanted any more (another connection took over, a fence).
    pub fn discard(&mut self) {
        self.filled = 0;
    }

    fn receive<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) {
        if self.receiving || self.end.is_some() {
            return;
        }
        let (whole, missing) = self.layout();
        // Whole frames must not lie in a buffer that the kernel has, where they could not be written: only the end of a
        // long frame, which is on its way, is waited for with others in front of it.
        if whole > 0 && self.filled - whole <= COPY {
            return;
        }
        let buf = match self.buf.take() {
            Some(buf) if self.filled + missing <= buf.len() && self.filled < buf.len() => buf,
            Some(buf) => {
                // Full, or the frame that has begun does not fit. With whole frames in front it waits to be written.
                if whole > 0 {
                    self.buf = Some(buf);
                    return;
                }
                let Some(mut larger) = ctx.io.pool().take((self.filled + missing).max(RECEIVE)) else {
                    self.buf = Some(buf);
                    return;
                };
                larger[..self.filled].copy_from_slice(&buf[..self.filled]);
                larger
            }
            None => match ctx.io.pool().take(RECEIVE) {
                Some(buf) => {
                    self.filled = 0;
                    buf
                }
                None => return,
            },
        };
        // While a long frame is waited for, no more than its end: what is behind it would have to be copied.
        let room = buf.len() - self.filled;
        let len = if missing > COPY { missing.min(room) } else { room };
        self.receiving = true;
        let part = Part { at: self.filled, len, buf };
        ctx.submit(Purpose::Receive(self.id), Op::Recv { sock: self.sock, part });
    }

    /// Where the whole frames in the buffer end, and how many bytes the unfinished one behind them still needs: 0 if
    /// there is none.
    fn layout(&self) -> (usize, usize) {
        let Some(buf) = &self.buf else { return (0, 0) };
        let mut at = 0;
        while let Some(len) = length_at(&buf[at..self.filled]) {
            if at + len > self.filled {
                return (at, at + len - self.filled);
            }
            at += len;
        }
        (at, if at < self.filled { ALIGN } else { 0 })
    }

    fn whole_frames(&self, buf: &Buf) -> Option<usize> {
        let len = length_at(&buf[..self.filled])?;
        (len <= self.filled).then_some(len)
    }

    /// Checks the frames in the buffer and gives the whole ones to the journal.
    fn hand_over<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, journal: &mut Journal) {
        let stopped = matches!(self.end, Some(End::Stopped(..)));
        if self.receiving || stopped || !journal.has_room() {
            return;
        }
        let Some(buf) = &self.buf else { return };
        let first = self.next;
        let (mut begin, mut at) = (0, 0);
        let mut last = None;
        let mut bad = None;
        while let Some(len) = length_at(&buf[at..self.filled]) {
            if at + len > self.filled {
                break;
            }
            match self.check(&buf[at..at + len]) {
                Ok(Some((place, promised))) => {
                    self.next = (place.0 + 1, place.1 + 1);
                    last = Some(place);
                    self.promised = Some(promised);
                }
                // Received before. Resent frames come first.
                Ok(None) => begin = at + len,
                Err(why) => {
                    bad = Some(why);
                    break;
                }
            }
            at += len;
        }
        if bad.is_none()
            && self.filled - at >= FRAME_HEADER_LEN
            && let Err(error) = FrameHeader::parse(&buf[at..self.filled])
        {
            bad = Some(error.to_string());
        }
        let open = self.filled - at;
        match last {
            // The frames are whole; the beginning of the next one decides whether they go now.
            Some(place)
                if open <= COPY || bad.is_some() || self.end.is_some() || at + open + self.layout().1 > buf.len() =>
            {
                let rest = if open > 0 && bad.is_none() && self.end.is_none() {
                    let Some(mut rest) = ctx.io.pool().take(RECEIVE.max(open + self.layout().1)) else {
                        // They stay, and are looked at again.
                        self.next = first;
                        return;
                    };
                    rest[..open].copy_from_slice(&buf[at..self.filled]);
                    Some(rest)
                } else {
                    None
                };
                let first = self.first_of(&buf[begin..]).unwrap_or(first);
                let buf = std::mem::replace(&mut self.buf, rest).expect("looked at above");
                self.filled = if self.buf.is_some() { open } else { 0 };
                self.received_frames += place.0 + 1 - first.0;
                let part = Part { buf, at: begin, len: at - begin };
                let tag = self.id.into();
                journal.push(Batch { part, writer: self.writer.clone(), first, last: place, durable: true, tag });
                if mutant!(AckOnReceipt) {
                    self.ack = Some(place);
                }
            }
            Some(_) => self.next = first,
            None if begin > 0 => {
                // Only frames that are here already: told again, in case the acknowledgement was lost.
                let buf = self.buf.as_mut().expect("looked at above");
                buf.copy_within(begin..self.filled, 0);
                self.filled -= begin;
                if journal.durable.incarnation == self.writer.incarnation {
                    self.ack = Some((journal.durable.frame, journal.durable.seq));
                }
            }
            None => {}
        }
        if let Some(why) = bad {
            let expected = self.next.0;
            self.stop(StopReason::BadFrame, expected, format!("frame {expected} was expected: {why}"));
        }
    }

    fn first_of(&self, bytes: &[u8]) -> Option<(u64, u64)> {
        FrameHeader::parse(bytes).ok().map(|header| (header.number.get(), header.first_seq.get()))
    }

    /// Whole and what must come next: its number and last record, and what it says of acknowledgements and promises.
    /// None: it was received before.
    #[allow(clippy::type_complexity)]
    fn check(&self, bytes: &[u8]) -> Result<Option<((u64, u64), (u64, u32))>, String> {
        let (header, _) = check_frame(bytes).map_err(|error: FormatError| error.to_string())?;
        if header.stream != self.stream_id {
            return Err("it is of another stream".into());
        }
        if header.incarnation != self.writer.incarnation {
            return Err("it is of another incarnation".into());
        }
        let (number, first_seq) = (header.number.get(), header.first_seq.get());
        if number < self.next.0 {
            return Ok(None);
        }
        if number > self.next.0 {
            return Err(format!("it is frame {number}"));
        }
        // Records are numbered without gaps; only an incarnation may begin anywhere above what was said at its start.
        if first_seq < self.next.1 || (number > 1 && first_seq > self.next.1) {
            return Err(format!("it begins with record {first_seq} where {} follows", self.next.1));
        }
        Ok(Some(((number, header.last_seq.get()), (header.acked.get(), header.sync_ms.get()))))
    }
}

/// Length of the frame that begins here, if its header is there and makes sense.
fn length_at(bytes: &[u8]) -> Option<usize> {
    FrameHeader::parse(bytes).ok().map(|header| header.length.get() as usize)
}
