//! The connection of a stream: asked for, made by the owner, lost, asked for again; and what the target says on it.

use afterimage_wire::control::{CONTROL_LEN, Control, StopReason};

use crate::io::{Buf, Done, Io, Nanos, Op, Part, Sock};
use crate::seal::ControlKey;

/// First pause after a failure.
const MIN_BACKOFF: Nanos = 100_000_000;
/// Longest pause.
const MAX_BACKOFF: Nanos = 5_000_000_000;
/// Bytes of the receive buffer, a multiple of a message.
const RECV_BYTES: usize = 4096;
const EPOCH_MASK: u32 = (1 << 24) - 1;

/// Where a connection stands.
#[derive(Debug)]
pub(crate) enum LinkState {
    /// None; the next attempt is due then.
    Down(Nanos),
    /// The owner has been asked for one.
    Asked,
    /// There is one; frames may leave when the target is `ready`.
    Up { sock: Sock, ready: bool },
    /// None is wanted.
    Off,
}

/// What the target said.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// An acknowledged place.
    Ack(u64, u64),
    /// The stream ends here.
    Stop(StopReason, u64),
    /// Which steps of a record of hashes differ.
    Compared(u64, u64),
    /// A range is to be read again: slot of the disk, offset, bytes.
    Want(u16, u64, u64),
    /// Nonsense, or the connection is gone.
    Lost(String),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    pub state: LinkState,
    /// Which connection: completions of older ones are told apart by it.
    epoch: u32,
    pub sending: bool,
    /// What must be durable before the first frame leaves is.
    pub announced: bool,
    control: Option<ControlKey>,
    filled: usize,
    heard_at: Nanos,
    silence: Nanos,
    backoff: Nanos,
    parts: Vec<Part>,
    /// Why there is none.
    pub reason: String,
}

impl Link {
    pub fn new(silence: Nanos) -> Self {
        Self {
            state: LinkState::Down(0),
            epoch: 0,
            sending: false,
            announced: false,
            control: None,
            filled: 0,
            heard_at: 0,
            silence,
            backoff: MIN_BACKOFF,
            parts: Vec::with_capacity(super::MAX_SEND),
            reason: String::from("not connected yet"),
        }
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Frames may leave.
    pub fn is_ready(&self) -> bool {
        self.announced && matches!(self.state, LinkState::Up { ready: true, .. })
    }

    pub fn is_up(&self) -> bool {
        matches!(self.state, LinkState::Up { .. })
    }

    /// The socket, if a send may begin.
    pub fn may_send(&self) -> Option<Sock> {
        match self.state {
            LinkState::Up { sock, ready: true } if self.announced && !self.sending => Some(sock),
            _ => None,
        }
    }

    pub fn take_parts(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }

    /// Keeps the memory of a list of parts.
    pub fn keep_parts(&mut self, parts: Vec<Part>) {
        if parts.capacity() > self.parts.capacity() {
            self.parts = parts;
        }
    }

    /// It is time to ask for a connection.
    pub fn is_due(&self, now: Nanos) -> bool {
        matches!(self.state, LinkState::Down(at) if at <= now)
    }

    /// When something is due: an attempt, or giving a silent connection up.
    pub fn deadline(&self) -> Option<Nanos> {
        match self.state {
            LinkState::Down(at) => Some(at),
            LinkState::Up { .. } => Some(self.heard_at + self.silence),
            LinkState::Asked | LinkState::Off => None,
        }
    }

    pub fn is_silent(&self, now: Nanos) -> bool {
        self.is_up() && now >= self.heard_at + self.silence
    }

    /// A connection is there. `token` is of its receives.
    pub fn up(&mut self, io: &mut impl Io, sock: Sock, control: ControlKey, token: u64) -> bool {
        let Some(buf) = io.pool().take(RECV_BYTES) else {
            io.close_sock(sock);
            self.fail(io.now(), "no buffer to receive into");
            return false;
        };
        self.epoch = (self.epoch + 1) & EPOCH_MASK;
        self.state = LinkState::Up { sock, ready: false };
        self.sending = false;
        self.control = Some(control);
        self.filled = 0;
        self.heard_at = io.now();
        self.receive(io, sock, buf, token);
        true
    }

    fn receive(&self, io: &mut impl Io, sock: Sock, buf: Buf, token: u64) {
        let part = Part { buf, at: self.filled, len: RECV_BYTES - self.filled };
        io.submit(token | u64::from(self.epoch), Op::Recv { sock, part });
    }

    /// The attempt, or the connection, has failed; the next attempt comes after a pause.
    pub fn fail(&mut self, now: Nanos, reason: &str) {
        reason.clone_into(&mut self.reason);
        self.state = LinkState::Down(now + self.backoff);
        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
    }

    /// The next attempt comes after the longest pause: it will hardly go better.
    pub fn fail_for_long(&mut self, now: Nanos, reason: &str) {
        self.backoff = MAX_BACKOFF;
        self.fail(now, reason);
    }

    /// Ends the connection, if there is one.
    pub fn close(&mut self, io: &mut impl Io) {
        if let LinkState::Up { sock, .. } = self.state {
            io.close_sock(sock);
            self.epoch = (self.epoch + 1) & EPOCH_MASK;
            self.control = None;
            self.state = LinkState::Down(io.now());
        }
    }

    /// The next attempt is due at once.
    pub fn again(&mut self, now: Nanos) {
        self.state = LinkState::Down(now);
    }

    /// Takes a completed receive and reads the messages in it, oldest first.
    pub fn received(&mut self, io: &mut impl Io, epoch: u32, done: Done, token: u64, heard: &mut Vec<Heard>) {
        let LinkState::Up { sock, ready } = &mut self.state else { return };
        if epoch != self.epoch {
            return;
        }
        let (Some(part), Some(control)) = (done.part, self.control.as_mut()) else { return };
        let mut buf = part.buf;
        match done.result {
            Ok(0) => return heard.push(Heard::Lost("the target closed the connection".into())),
            Err(errno) => return heard.push(Heard::Lost(format!("receiving: {errno}"))),
            Ok(bytes) => self.filled += bytes as usize,
        }
        self.heard_at = io.now();
        let mut at = 0;
        while at + CONTROL_LEN <= self.filled {
            let mut message = [0; CONTROL_LEN];
            message.copy_from_slice(&buf[at..at + CONTROL_LEN]);
            at += CONTROL_LEN;
            match control.open(&message) {
                Ok(Control::Ready) => *ready = true,
                Ok(Control::Alive) => {}
                Ok(Control::Ack { frame, seq }) => {
                    self.backoff = MIN_BACKOFF;
                    match heard.last_mut() {
                        // Only the newest place of several counts.
                        Some(Heard::Ack(f, s)) if frame >= *f => (*f, *s) = (frame, seq),
                        _ => heard.push(Heard::Ack(frame, seq)),
                    }
                }
                Ok(Control::Compared { seq, differs }) => heard.push(Heard::Compared(seq, differs)),
                Ok(Control::Want { disk, offset, len }) => heard.push(Heard::Want(disk, offset, len)),
                Ok(Control::Stop { reason, value }) => return heard.push(Heard::Stop(reason, value)),
                Err(error) => return heard.push(Heard::Lost(error.to_string())),
            }
        }
        buf.copy_within(at..self.filled, 0);
        self.filled -= at;
        let sock = *sock;
        self.receive(io, sock, buf, token);
    }
}
