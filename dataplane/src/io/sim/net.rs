//! Connections: two byte streams each, cut into random pieces that arrive late, in order, whole or not at all.
//!
//! A [`Sock`] is one end: number `2 c` or `2 c + 1` of connection `c`. Each end holds the bytes on their way to it.

use std::collections::VecDeque;
use std::io::Read as _;

use super::state::{Event, LifeId, State};
use crate::io::{Done, Errno, Nanos, Op, Part, Sock, Token};

enum Piece {
    Bytes(Vec<u8>),
    /// The sender closed in order.
    End,
    /// The connection is broken.
    Reset,
}

enum Receive {
    One(Part),
    Many(Vec<Part>),
}

struct Sending {
    token: Token,
    part: Option<Part>,
    parts: Vec<Part>,
    /// Bytes that the network has taken.
    taken: usize,
    total: usize,
}

/// One end of a connection.
pub(super) struct End {
    life: LifeId,
    node: usize,
    /// Not closed by its own process.
    open: bool,
    /// Its machine lost power: nothing answers, not even a reset, until it lives again.
    vanished: bool,
    /// On their way here, in order of arrival.
    flying: VecDeque<(Nanos, Piece)>,
    /// Arrived and not received.
    arrived: VecDeque<u8>,
    /// Bytes in both.
    held: usize,
    /// Nothing is accepted towards this end any more: an end or a reset flies.
    ended: bool,
    /// A reset flies, or has arrived.
    broken: bool,
    end_seen: bool,
    reset_seen: bool,
    receiving: Option<(Token, Receive)>,
    sending: Option<Sending>,
}

pub(super) struct Conn {
    ends: [End; 2],
}

impl State {
    fn end(&mut self, sock: u32) -> &mut End {
        &mut self.conns[sock as usize / 2].ends[sock as usize % 2]
    }

    fn own_end(&mut self, life: LifeId, sock: Sock) -> &mut End {
        let known = (sock.0 as usize / 2) < self.conns.len();
        assert!(known, "{sock:?} was never connected");
        let end = self.end(sock.0);
        assert!(end.life == life, "{sock:?} belongs to another process");
        assert!(end.open, "{sock:?} is used after it was closed");
        end
    }

    fn socks_of(&self, life: LifeId) -> Vec<u32> {
        let numbered = self.conns.iter().enumerate();
        numbered
            .flat_map(|(c, conn)| (0..2).map(move |side| (c * 2 + side, &conn.ends[side])))
            .filter(|(_, end)| end.life == life && end.open)
            .map(|(sock, _)| sock as u32)
            .collect()
    }

    pub(super) fn connect(&mut self, a: usize, b: usize) -> (Sock, Sock) {
        let number = self.conns.len() as u32;
        let end = |node: usize, life| End {
            life,
            node,
            open: true,
            vanished: false,
            flying: VecDeque::new(),
            arrived: VecDeque::new(),
            held: 0,
            ended: false,
            broken: false,
            end_seen: false,
            reset_seen: false,
            receiving: None,
            sending: None,
        };
        let (life_a, life_b) = (self.living(a), self.living(b));
        self.conns.push(Conn { ends: [end(a, life_a), end(b, life_b)] });
        (Sock(number * 2), Sock(number * 2 + 1))
    }

    pub(super) fn submit_net(&mut self, life: LifeId, token: Token, op: Op) {
        let (sock, receive, send) = match op {
            Op::Recv { sock, part } => {
                assert!(part.len > 0 && part.at + part.len <= part.buf.len(), "a receive of {} bytes", part.len);
                (sock, Some(Receive::One(part)), None)
            }
            Op::RecvV { sock, parts } => {
                assert!((1..=64).contains(&parts.len()), "a receive into {} parts", parts.len());
                (sock, Some(Receive::Many(parts)), None)
            }
            Op::Send { sock, part } => {
                let total = part.len;
                (sock, None, Some(Sending { token, part: Some(part), parts: Vec::new(), taken: 0, total }))
            }
            Op::SendV { sock, parts } => {
                assert!((1..=64).contains(&parts.len()), "a send of {} parts", parts.len());
                let total = parts.iter().map(|part| part.len).sum();
                (sock, None, Some(Sending { token, part: None, parts, taken: 0, total }))
            }
            other => unreachable!("{other:?} is no operation of a socket"),
        };
        if let Some(receive) = receive {
            let end = self.own_end(life, sock);
            assert!(end.receiving.is_none(), "two receives on {sock:?} are under way together");
            end.receiving = Some((token, receive));
            self.try_receive(sock.0);
        }
        if let Some(send) = send {
            let end = self.own_end(life, sock);
            assert!(send.total > 0, "a send of nothing");
            assert!(end.sending.is_none(), "two sends on {sock:?} are under way together");
            end.sending = Some(send);
            self.try_send(sock.0);
        }
    }

    /// Gives the network what fits its window; completes the send if that is all.
    fn try_send(&mut self, sock: u32) {
        let peer = sock ^ 1;
        let (window, piece_max, latency) =
            (self.config.net_window, self.config.net_piece.max(1), self.config.net_latency);
        let Some(mut sending) = self.end(sock).sending.take() else { return };
        if self.end(sock).reset_seen {
            return self.end_send(sock, sending, Err(Errno::PIPE));
        }
        loop {
            let left = sending.total - sending.taken;
            let swallowed = self.end(peer).ended;
            let room = if swallowed { left } else { window.saturating_sub(self.end(peer).held) };
            if left == 0 || room == 0 {
                break;
            }
            // Mostly large pieces, sometimes tiny ones: a reader must cope with any cut.
            let most = if self.rng.chance(0.1) { 40 } else { piece_max as u64 };
            let len = (self.rng.between(1, most.min(piece_max as u64)) as usize).min(left).min(room);
            if !swallowed {
                let bytes = gather(&sending, len);
                let at = self.now + self.between(latency);
                self.fly(peer, at, Piece::Bytes(bytes));
            }
            sending.taken += len;
        }
        if sending.taken == sending.total {
            let total = sending.total as u64;
            self.end_send(sock, sending, Ok(total));
        } else {
            self.end(sock).sending = Some(sending);
        }
    }

    fn end_send(&mut self, sock: u32, sending: Sending, result: Result<u64, Errno>) {
        let life = self.end(sock).life;
        let Sending { token, part, parts, .. } = sending;
        let at = self.now + self.rng.below(2_000);
        self.at(at, Event::Complete(life, Done { token, result, part, parts }));
    }

    fn fly(&mut self, to: u32, at: Nanos, piece: Piece) {
        let end = self.end(to);
        let at = end.flying.back().map_or(at, |(last, _)| at.max(*last));
        match &piece {
            Piece::Bytes(bytes) => end.held += bytes.len(),
            Piece::End => end.ended = true,
            Piece::Reset => (end.ended, end.broken) = (true, true),
        }
        end.flying.push_back((at, piece));
        self.at(at, Event::Arrive(to));
    }

    pub(super) fn arrive(&mut self, sock: u32) {
        let now = self.now;
        let (node, peer_node) = (self.end(sock).node, self.end(sock ^ 1).node);
        if self.partitions.contains(&(peer_node, node)) {
            return; // Healing sends it on its way again.
        }
        let mut refused = false;
        while self.end(sock).flying.front().is_some_and(|(at, _)| *at <= now) {
            let end = self.end(sock);
            if end.vanished {
                return;
            }
            let Some((_, piece)) = end.flying.pop_front() else { break };
            match piece {
                Piece::Bytes(bytes) if end.open => end.arrived.extend(bytes),
                Piece::Bytes(bytes) => {
                    end.held -= bytes.len();
                    refused = true;
                }
                Piece::End => end.end_seen = true,
                Piece::Reset => end.reset_seen = true,
            }
        }
        if refused && !self.end(sock ^ 1).broken {
            // Data for a closed socket is answered with a reset.
            let at = self.now + self.between(self.config.net_latency);
            self.fly(sock ^ 1, at, Piece::Reset);
        }
        self.try_receive(sock);
        if self.end(sock).reset_seen {
            if let Some(sending) = self.end(sock).sending.take() {
                self.end_send(sock, sending, Err(Errno::CONNRESET));
            }
        } else if refused {
            self.try_send(sock ^ 1);
        }
    }

    fn try_receive(&mut self, sock: u32) {
        let eager = !self.rng.chance(0.25);
        let cut = self.rng.next_u64();
        let end = self.end(sock);
        if end.receiving.is_none() || !end.open {
            return;
        }
        let settled = end.end_seen || end.reset_seen;
        if end.arrived.is_empty() && !settled {
            return;
        }
        let Some((token, receive)) = end.receiving.take() else { return };
        let life = end.life;
        let (mut part, mut parts) = match receive {
            Receive::One(part) => (Some(part), Vec::new()),
            Receive::Many(parts) => (None, parts),
        };
        let room: usize = part.iter().chain(&parts).map(|part| part.len).sum();
        let mut len = room.min(end.arrived.len());
        if !eager && len > 1 {
            len = 1 + (cut % len as u64) as usize;
        }
        let mut left = len;
        for part in part.iter_mut().chain(&mut parts) {
            let take = left.min(part.len);
            let read = end.arrived.read_exact(&mut part.buf[part.at..part.at + take]);
            read.expect("no more is taken than has arrived");
            left -= take;
        }
        end.held -= len;
        let result = if len == 0 && end.reset_seen { Err(Errno::CONNRESET) } else { Ok(len as u64) };
        let at = self.now + self.rng.below(2_000);
        self.at(at, Event::Complete(life, Done { token, result, part, parts }));
        self.try_send(sock ^ 1);
    }

    pub(super) fn close_sock(&mut self, life: LifeId, sock: Sock) {
        if !self.lives[life].alive {
            return;
        }
        let end = self.own_end(life, sock);
        end.open = false;
        let unread = !end.arrived.is_empty();
        let (receiving, sending) = (end.receiving.take(), end.sending.take());
        end.held -= end.arrived.len();
        end.arrived.clear();
        if let Some((token, receive)) = receiving {
            let (part, parts) = match receive {
                Receive::One(part) => (Some(part), Vec::new()),
                Receive::Many(parts) => (None, parts),
            };
            self.at(self.now, Event::Complete(life, Done { token, result: Ok(0), part, parts }));
        }
        if let Some(sending) = sending {
            self.end_send(sock.0, sending, Err(Errno::PIPE));
        }
        if !self.end(sock.0 ^ 1).ended {
            let at = self.now + self.between(self.config.net_latency);
            self.fly(sock.0 ^ 1, at, if unread { Piece::Reset } else { Piece::End });
        }
        self.try_send(sock.0 ^ 1);
    }

    /// Loses what flies to this end after a random byte, and lets a reset follow.
    fn break_towards(&mut self, sock: u32) {
        self.truncate(sock);
        let end = self.end(sock);
        end.flying.retain(|(_, piece)| matches!(piece, Piece::Bytes(_)));
        let at = self.now + self.between(self.config.net_latency);
        self.fly(sock, at, Piece::Reset);
    }

    fn truncate(&mut self, sock: u32) {
        let State { conns, rng, .. } = self;
        let end = &mut conns[sock as usize / 2].ends[sock as usize % 2];
        let flying = end.held - end.arrived.len();
        let mut keep = rng.below(flying as u64 + 1) as usize;
        end.held = end.arrived.len() + keep;
        end.flying.retain_mut(|(_, piece)| match piece {
            Piece::Bytes(bytes) => {
                bytes.truncate(keep);
                keep -= bytes.len();
                !bytes.is_empty()
            }
            Piece::End | Piece::Reset => true,
        });
    }

    pub(super) fn cut(&mut self, sock: Sock) {
        self.break_towards(sock.0);
        self.break_towards(sock.0 ^ 1);
    }

    /// The process died: the kernel closes its sockets, or they break in the middle.
    pub(super) fn break_sockets(&mut self, life: LifeId) {
        for sock in self.socks_of(life) {
            let end = self.end(sock);
            end.open = false;
            end.receiving = None;
            end.sending = None;
            end.held -= end.arrived.len();
            end.arrived.clear();
            if self.end(sock ^ 1).ended {
                continue;
            }
            if self.rng.chance(0.5) {
                self.break_towards(sock ^ 1);
            } else {
                let at = self.now + self.between(self.config.net_latency);
                self.fly(sock ^ 1, at, Piece::End);
            }
            self.try_send(sock ^ 1);
        }
    }

    /// The machine lost power: its peers hear nothing of it.
    pub(super) fn vanish_sockets(&mut self, life: LifeId) {
        for sock in self.socks_of(life) {
            let end = self.end(sock);
            end.open = false;
            end.vanished = true;
            end.receiving = None;
            end.sending = None;
            self.truncate(sock ^ 1);
        }
    }

    /// The machine lives again and answers what its former life left open with a reset.
    pub(super) fn reset_vanished(&mut self, node: usize) {
        for sock in 0..self.conns.len() as u32 * 2 {
            let end = self.end(sock);
            if end.node == node && std::mem::take(&mut end.vanished) && !self.end(sock ^ 1).ended {
                let at = self.now + self.between(self.config.net_latency);
                self.fly(sock ^ 1, at, Piece::Reset);
            }
        }
    }

    pub(super) fn partition(&mut self, a: usize, b: usize, on: bool) {
        self.partition_one_way(a, b, on);
        self.partition_one_way(b, a, on);
    }

    pub(super) fn partition_one_way(&mut self, from: usize, to: usize, on: bool) {
        if on {
            self.partitions.insert((from, to));
            return;
        }
        if !self.partitions.remove(&(from, to)) {
            return;
        }
        for sock in 0..self.conns.len() as u32 * 2 {
            if (self.end(sock ^ 1).node, self.end(sock).node) == (from, to) && !self.end(sock).flying.is_empty() {
                let at = self.now + self.between(self.config.net_latency);
                // What would have arrived later than that still has its own event.
                self.at(at, Event::Arrive(sock));
            }
        }
    }
}

/// The next `len` bytes of a send.
fn gather(sending: &Sending, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    let mut skip = sending.taken;
    for part in sending.part.iter().chain(&sending.parts) {
        let from = skip.min(part.len);
        skip -= from;
        let take = (part.len - from).min(len - bytes.len());
        bytes.extend_from_slice(&part.buf[part.at + from..part.at + from + take]);
    }
    bytes
}
