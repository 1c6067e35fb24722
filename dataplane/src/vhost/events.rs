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
/// In the kind of a token: which of a queue's event counters, below the queue and its epoch.
const KIND_BITS: u32 = 2;
const _: () = assert!(proto::QUEUES_MAX << KIND_BITS <= 1 << u8::BITS);

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
    busy: bool,
    /// It is to be raised once more.
    again: bool,
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

impl Kind {
    const ALL: [Self; 3] = [Self::Kick, Self::Call, Self::Err];
}

/// The event counters of a queue.
#[derive(Debug, Default)]
pub(super) struct Events([Option<Event>; 3]);

impl Events {
    /// The one for this.
    pub fn of(&mut self, kind: Kind) -> &mut Option<Event> {
        &mut self.0[kind as usize]
    }

    /// There is one for kicks.
    pub fn has_kick(&self) -> bool {
        self.0[Kind::Kick as usize].is_some()
    }

    /// All, which are none from now on.
    pub fn take(&mut self) -> impl Iterator<Item = Event> {
        std::mem::take(&mut self.0).into_iter().flatten()
    }
}

/// The kind of a token: of which event counter it is.
fn name(queue: u16, kind: Kind, epoch: u8) -> u16 {
    u16::from(epoch) << 8 | queue << KIND_BITS | kind as u16
}

fn unname(token: u16) -> Option<(u16, Kind, u8)> {
    let kind = Kind::ALL.get(usize::from(token & ((1 << KIND_BITS) - 1)))?;
    Some(((token & 0xff) >> KIND_BITS, *kind, (token >> 8) as u8))
}

impl Device {
    /// Takes another event counter in the place of the one there.
    pub fn set_event<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16, kind: Kind, sock: Option<Sock>) {
        let vring = &mut self.vrings[usize::from(queue)];
        vring.epoch = vring.epoch.wrapping_add(1);
        let fresh = sock.map(|sock| Event { sock, epoch: vring.epoch, busy: false, again: false });
        if let Some(old) = std::mem::replace(vring.events.of(kind), fresh) {
            cx.io.close_sock(old.sock);
        }
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
        let Some(kick) = self.vrings[usize::from(queue)].events.of(Kind::Kick) else { return };
        if !kick.busy
            && let Some(buf) = self.events.take(EVENT_BUF)
        {
            kick.busy = true;
            let token = token(cx.base, self.id, name(queue, Kind::Kick, kick.epoch));
            cx.io.submit(token, Op::Recv { sock: kick.sock, part: Part { buf, at: 0, len: EVENT } });
        }
    }

    /// Raises the one for calls, or for errors.
    pub fn raise<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16, kind: Kind) {
        let Some(event) = self.vrings[usize::from(queue)].events.of(kind) else { return };
        if event.busy {
            event.again = true;
            return;
        }
        let Some(mut buf) = self.events.take(EVENT_BUF) else {
            (event.again, self.active) = (true, true);
            return;
        };
        (event.busy, event.again) = (true, false);
        buf[..EVENT].copy_from_slice(&1u64.to_ne_bytes());
        cx.shared.counters.calls += u64::from(kind == Kind::Call);
        let token = token(cx.base, self.id, name(queue, kind, event.epoch));
        cx.io.submit(token, Op::Send { sock: event.sock, part: Part { buf, at: 0, len: EVENT } });
    }

    /// Does what found no buffer when it was its time.
    pub fn catch_up<I: Io>(&mut self, cx: &mut Context<'_, I>, queue: u16) {
        for kind in [Kind::Call, Kind::Err] {
            let event = self.vrings[usize::from(queue)].events.of(kind);
            if event.as_ref().is_some_and(|event| event.again && !event.busy) {
                self.raise(cx, queue, kind);
            }
        }
        self.listen(cx, queue);
    }

    /// An operation on an event counter has ended.
    pub fn event<I: Io>(&mut self, cx: &mut Context<'_, I>, which: u16, done: Done) {
        let Some((queue, kind, epoch)) = unname(which) else { return };
        let ok = matches!(done.result, Ok(1..));
        drop(done);
        let Some(vring) = self.vrings.get_mut(usize::from(queue)) else { return };
        let slot = vring.events.of(kind);
        let Some(event) = slot.as_mut().filter(|event| event.epoch == epoch) else { return };
        event.busy = false;
        if !ok {
            if let Some(event) = slot.take() {
                cx.io.close_sock(event.sock);
            }
            return;
        }
        if kind != Kind::Kick {
            if event.again {
                self.raise(cx, queue, kind);
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
                Some(Ok(true)) => self.raise(cx, number, Kind::Call),
                Some(Err(fault)) => self.nonsense(cx, number, fault.into()),
                Some(Ok(false)) | None => {}
            }
        }
    }
}
