//! Event counters of a device: kicks that are heard, calls that are made.

use crate::io::{Class, Done, Io, Op, Part, Pool, Sock};

use super::device::{Context, Device};
use super::proto;
use super::queue::Queue;
use super::server::token;

/// Buffers for the event counters of a device: three of each queue, and as many that come back late.
const EVENT_BUFS: usize = 6 * proto::QUEUES_MAX as usize;
const EVENT_BUF: usize = 4096;
/// Bytes that go over an event counter.
const EVENT: usize = 8;
/// In the kind of a token: it is of an event counter for errors. Queues and the bit for calls have those below.
const ERR: u16 = 1 << 7;
const _: () = assert!(proto::QUEUES_MAX << 1 <= ERR);

/// Buffers for a device.
pub(super) fn pool() -> Pool {
    Pool::new(&[Class { capacity: EVENT_BUF, count: EVENT_BUFS }])
}

/// An event counter, as far as we use it.
#[derive(Debug)]
pub(super) struct Event {
    pub sock: Sock,
    epoch: u8,
    /// An operation is under way on it.
    pub busy: bool,
    /// It is to be raised once more.
    pub again: bool,
}

/// What an event counter is for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The driver tells us of requests.
    Kick,
    /// We tell the driver of ends.
    Call,
    /// We tell whoever runs the guest that a queue makes no sense.
    Err,
}

impl Device {
    /// Takes another event counter in the place of the one there.
    pub fn set_event<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16, kind: Kind, sock: Option<Sock>) {
        let vring = &mut self.vrings[usize::from(queue)];
        vring.epoch = vring.epoch.wrapping_add(1);
        let epoch = vring.epoch;
        let slot = match kind {
            Kind::Kick => &mut vring.kick,
            Kind::Call => &mut vring.call,
            Kind::Err => &mut vring.err,
        };
        if let Some(old) = slot.take() {
            cx.io.close_sock(old.sock);
        }
        *slot = sock.map(|sock| Event { sock, epoch, busy: false, again: false });
        match kind {
            Kind::Kick => self.listen(cx, queue),
            Kind::Call => {
                if let Some(queue) = &mut vring.queue {
                    // What the old one was to tell may not have been heard.
                    queue.forget_calls();
                    vring.ended = true;
                }
            }
            Kind::Err => {}
        }
    }

    /// Waits for the next kick.
    pub fn listen<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16) {
        let Some(kick) = &mut self.vrings[usize::from(queue)].kick else { return };
        if !kick.busy
            && let Some(buf) = self.events.take(EVENT_BUF)
        {
            kick.busy = true;
            let token = token(cx.base, self.id, u16::from(kick.epoch) << 8 | queue << 1);
            cx.io.submit(token, Op::Recv { sock: kick.sock, part: Part { buf, at: 0, len: EVENT } });
        }
    }

    pub fn raise<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16) {
        let Some(call) = &mut self.vrings[usize::from(queue)].call else { return };
        if call.busy {
            call.again = true;
            return;
        }
        let Some(mut buf) = self.events.take(EVENT_BUF) else {
            (call.again, self.active) = (true, true);
            return;
        };
        (call.busy, call.again) = (true, false);
        buf[..EVENT].copy_from_slice(&1u64.to_ne_bytes());
        cx.shared.counters.calls += 1;
        let token = token(cx.base, self.id, u16::from(call.epoch) << 8 | queue << 1 | 1);
        cx.io.submit(token, Op::Send { sock: call.sock, part: Part { buf, at: 0, len: EVENT } });
    }

    /// An operation on an event counter has ended.
    pub fn event<I: Io>(&mut self, cx: &mut Context<'_, I>, kind: u16, done: Done) {
        let (epoch, queue, is_call) = ((kind >> 8) as u8, (kind & 0xff) >> 1, kind & 1 == 1);
        let ok = matches!(done.result, Ok(1..));
        drop(done);
        if kind & ERR != 0 {
            return; // raised, or not: whoever listens there can do without
        }
        let Some(vring) = self.vrings.get_mut(usize::from(queue)) else { return };
        let slot = if is_call { &mut vring.call } else { &mut vring.kick };
        let Some(event) = slot.as_mut().filter(|event| event.epoch == epoch) else { return };
        event.busy = false;
        if !ok {
            if let Some(event) = slot.take() {
                cx.io.close_sock(event.sock);
            }
            return;
        }
        if is_call {
            if event.again {
                self.raise(cx, queue);
            }
            return;
        }
        vring.kicked = true;
        cx.shared.counters.kicks += 1;
        if cx.shared.limits.poll > 0 && cx.io.now().saturating_sub(self.last_end) < cx.shared.limits.poll {
            // Had we looked a little longer, it need not have kicked.
            self.window = cx.shared.limits.poll;
        }
        self.active = true;
        self.listen(cx, queue);
        self.start(cx, queue);
    }

    /// Calls the driver where requests have ended.
    pub fn call<I: Io>(&mut self, cx: &mut Context<'_, I>) {
        for number in 0..self.vrings.len() as u16 {
            let vring = &mut self.vrings[usize::from(number)];
            if !std::mem::take(&mut vring.ended) || self.silent || self.closing {
                continue;
            }
            match vring.queue.as_mut().map(Queue::call_due) {
                Some(Ok(true)) => self.raise(cx, number),
                Some(Err(fault)) => self.nonsense(cx, number, fault.into()),
                Some(Ok(false)) | None => {}
            }
        }
    }

    /// Tells whoever runs the guest that a queue makes no sense.
    pub fn tell<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16) {
        let Some(err) = &self.vrings[usize::from(queue)].err else { return };
        let Some(mut buf) = self.events.take(EVENT_BUF) else { return };
        buf[..EVENT].copy_from_slice(&1u64.to_ne_bytes());
        let token = token(cx.base, self.id, ERR | queue);
        cx.io.submit(token, Op::Send { sock: err.sock, part: Part { buf, at: 0, len: EVENT } });
    }
}
