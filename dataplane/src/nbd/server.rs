//! The front end that an owner of disks drives: connections, their place in the token space, routing of answers.

use std::marker::PhantomData;

use crate::host::{Answer, DiskKey, Disks, ExportStatus, FrontEnd, FrontId, HostDisk};
use crate::io::{Done, Io, Nanos, Op, Sock, Token};

use super::conn::{Conn, Phase};
use super::negotiate::Verdict;
use super::receive::{Receiver, STAGING_BYTES};
use super::reply::{OUT_BYTES, SMALL_MAX, Sender};
use super::status::STATUS_MAX;

/// What one front end may hold at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections, negotiating or not; fewer where the pool is small: their buffers are not more than an eighth of it.
    pub connections: usize,
    /// Requests under way of one connection; it is not read from while it has this many.
    pub requests: usize,
    /// Bytes of reads under way or not yet sent, over all connections.
    pub read_bytes: usize,
    /// Bytes of writes given to disks and not yet answered, over all connections.
    pub write_bytes: usize,
    /// How long a client may take from one step of the negotiation to the next.
    pub handshake: Nanos,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            requests: 128,
            read_bytes: 64 << 20,
            write_bytes: 64 << 20,
            handshake: 60_000_000_000,
        }
    }
}

/// Why a socket was not taken; it is closed.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// [`Limits::connections`].
    #[error("{0} NBD clients are connected, which is the limit")]
    TooMany(usize),
    /// The pool has no room for its buffers.
    #[error("no buffers are free for another NBD client")]
    NoBuffers,
}

/// Counts since the start; for status and for tests of how often data is copied.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections taken.
    pub connections: u64,
    /// Requests taken off the wire, valid or not.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes of write payload received.
    pub written_bytes: u64,
    /// Of these, bytes that were copied once in user space because they were not received into their place.
    pub copied_bytes: u64,
    /// Bytes of read payload sent.
    pub read_bytes: u64,
    /// Receive operations completed.
    pub receives: u64,
    /// Send operations completed.
    pub sends: u64,
    /// Connections dropped for a violation of the protocol.
    pub violations: u64,
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub limits: Limits,
    pub counters: Counters,
    /// Bytes of the budgets in use.
    pub read_used: usize,
    pub write_used: usize,
    /// Bytes of the pool, once known: see [`Shared::read_limit`].
    pool_bytes: usize,
}

impl Shared {
    /// Not more than an eighth of the pool: reads come in parts of half a MiB, and buffers that long are a part of it.
    /// What clients do not take must leave some for writes and for what the disks do.
    pub(super) fn read_limit(&self) -> usize {
        self.limits.read_bytes.min(self.pool_bytes / 8)
    }

    fn most_connections(&self) -> usize {
        self.limits.connections.min(self.pool_bytes / 8 / CONNECTION_BYTES).max(1)
    }

    /// Not more than a quarter of the pool.
    pub(super) fn write_limit(&self) -> usize {
        self.limits.write_bytes.min(self.pool_bytes / 4)
    }
}

/// How long a connection that found no buffer waits before it looks again, if nothing else happens meanwhile.
pub const RETRY: Nanos = 5_000_000;
/// A client that has taken nothing, or not gone on with a write, for so long while others wait for the buffers that it
/// keeps is dropped.
const STALL: Nanos = 10_000_000_000;
/// A handshake that has stood still for less is not given up for another client.
const HANDSHAKE_GRACE: Nanos = 2_000_000_000;
/// Bytes of replies to options that may wait; no further option is looked at meanwhile.
const BULK_MAX: usize = 64 * 1024;
/// More requests than this could fill the buffer for small replies: see [`Limits::requests`].
const REQUESTS_MAX: usize = (OUT_BYTES - STATUS_MAX) / SMALL_MAX - 1;
/// Bytes of the buffers that each connection keeps: its staging buffer and two for replies.
const CONNECTION_BYTES: usize = STAGING_BYTES + 2 * OUT_BYTES;
/// Connections are numbered in 16 bits, and those that are being forgotten count too.
const CONNECTIONS_MAX: usize = 1 << 15;
/// Lives of a place that are told apart: cookies have that many bits for it ([`FrontId::BITS`] are not ours).
const GENERATIONS: u16 = (1 << (u16::BITS - FrontId::BITS)) - 1;

const RECV: u16 = 0;
const SEND: u16 = 1;
const HANDSHAKE_TIMER: u16 = 2;
const RETRY_TIMER: u16 = 3;

#[derive(Debug, Default)]
struct Place {
    generation: u16,
    conn: Option<Box<Conn>>,
}

/// The NBD front end of one data thread.
///
/// The owner gives it each completion that it [`FrontEnd::owns`], and calls [`FrontEnd::collect`] once per turn of its loop,
/// after the disks had their turn: replies are sent from there only, so that one send carries all replies of a turn.
#[derive(Debug)]
pub struct Server<I: Io> {
    base: u16,
    shared: Shared,
    places: Vec<Place>,
    vacant: Vec<u16>,
    /// Connections that need a look in [`FrontEnd::collect`].
    active: Vec<u16>,
    /// Those being looked at; kept for its memory.
    looking: Vec<u16>,
    /// Disks with connections, and how many.
    used: Vec<(DiskKey, usize)>,
    answers: Vec<Answer>,
    retry_timer: bool,
    handshake_timer: bool,
    shutdown: bool,
    io: PhantomData<fn(&mut I)>,
}

impl<I: Io> Server<I> {
    /// A front end without connections. `base_id` is the upper 16 bits of all its tokens.
    pub fn new(base_id: u16, limits: Limits) -> Self {
        let limits = Limits {
            connections: limits.connections.min(CONNECTIONS_MAX),
            requests: limits.requests.clamp(1, REQUESTS_MAX),
            ..limits
        };
        Self {
            base: base_id,
            shared: Shared { limits, counters: Counters::default(), read_used: 0, write_used: 0, pool_bytes: 0 },
            places: Vec::new(),
            vacant: Vec::new(),
            active: Vec::new(),
            looking: Vec::new(),
            used: Vec::new(),
            answers: Vec::new(),
            retry_timer: false,
            handshake_timer: false,
            shutdown: false,
            io: PhantomData,
        }
    }

    /// Takes over a connected socket of a new client and greets it. On error the socket is closed.
    pub fn attach(&mut self, io: &mut I, sock: Sock, disks: &impl Disks<I>) -> Result<(), AttachError> {
        let _ = disks; // asked when the client asks
        self.shared.pool_bytes = io.pool().total_bytes();
        if self.shutdown || !self.make_room(io) {
            io.close_sock(sock);
            return Err(AttachError::TooMany(self.shared.most_connections()));
        }
        let halves = io.pool().take(STAGING_BYTES).and_then(|b| Some((Receiver::new(b), Sender::new(io.pool())?)));
        let Some((rx, tx)) = halves else {
            io.close_sock(sock);
            return Err(AttachError::NoBuffers);
        };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            (self.places.len() - 1) as u16
        });
        let place = &mut self.places[usize::from(index)];
        place.generation = place.generation.wrapping_add(1) & GENERATIONS;
        let id = u32::from(place.generation) << 16 | u32::from(index);
        let deadline = io.now().saturating_add(self.shared.limits.handshake);
        let mut conn = Box::new(Conn::new(id, sock, rx, tx, deadline));
        conn.rx.post_plain(io, token(self.base, id, RECV), sock);
        if !self.handshake_timer {
            // One for all: later deadlines are seen when this one has passed.
            self.handshake_timer = true;
            io.submit(token(self.base, 0, HANDSHAKE_TIMER), Op::Timer { at: deadline });
        }
        conn.active = true;
        place.conn = Some(conn);
        self.active.push(index);
        self.shared.counters.connections += 1;
        Ok(())
    }

    /// True if one more client may come. Those that only hold a place have to make room: the one whose handshake has
    /// stood still the longest goes, if that is long enough.
    fn make_room(&mut self, io: &mut I) -> bool {
        let live = || self.places.iter().filter_map(|p| p.conn.as_deref()).filter(|c| !c.dead);
        let most = self.shared.most_connections();
        if self.places.len() - self.vacant.len() < most || live().count() < most {
            return true;
        }
        let oldest = live().filter(|c| matches!(c.phase, Phase::Negotiating(_))).min_by_key(|c| c.deadline);
        let patience = self.shared.limits.handshake.saturating_sub(HANDSHAKE_GRACE);
        let Some((id, deadline)) = oldest.map(|c| (c.id, c.deadline)) else { return false };
        if deadline > io.now().saturating_add(patience) {
            return false;
        }
        if let Some((index, conn)) = conn_of(&mut self.places, id) {
            conn.kill(&mut self.shared, io);
            self.activate(index);
        }
        true
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.shared.counters
    }

    fn activate(&mut self, index: u16) {
        if let Some(conn) = &mut self.places[usize::from(index)].conn
            && !conn.active
        {
            conn.active = true;
            self.active.push(index);
        }
    }

    /// Moves the answers of the disks in use to their connections; true if there were any.
    fn take_answers(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool {
        let mut any = false;
        for at in 0..self.used.len() {
            let key = self.used[at].0;
            if let Some(mut disk) = disks.disk(key) {
                FrontId::Nbd.take(disk.answers(), &mut self.answers);
            } else {
                self.drop_clients(io, key);
            }
            let mut answers = std::mem::take(&mut self.answers);
            any |= !answers.is_empty();
            for Answer { cookie, result } in answers.drain(..) {
                if let Some((index, conn)) = conn_of(&mut self.places, (cookie >> 32) as u32) {
                    conn.answer(&mut self.shared, io, cookie as u32, result);
                    self.activate(index);
                }
            }
            self.answers = answers;
        }
        any
    }

    /// The disk has gone without a word: so do its clients.
    fn drop_clients(&mut self, io: &mut I, key: DiskKey) {
        for index in 0..self.places.len() as u16 {
            if let Some(conn) = &mut self.places[usize::from(index)].conn
                && conn.key == Some(key)
            {
                conn.abandon(&mut self.shared, io);
                self.activate(index);
            }
        }
    }

    /// Lets a connection use what it has received and what has become free; `retry`: also ask again for what the disk had
    /// no buffer for, once per turn.
    fn serve(&mut self, io: &mut I, disks: &mut impl Disks<I>, index: u16, retry: bool) {
        let Some(conn) = &mut self.places[usize::from(index)].conn else { return };
        let Some(key) = conn.key else { return };
        let Some(mut disk) = disks.disk(key) else { return conn.abandon(&mut self.shared, io) };
        if retry {
            conn.retry_reads(io, &mut disk);
        }
        conn.issue_reads(&mut self.shared, io, &mut disk);
        conn.advance(&mut self.shared, io, &mut disk, token(self.base, conn.id, RECV));
    }

    /// Sends what has gathered, closes what is over, forgets what is finished.
    fn flush(&mut self, io: &mut I) {
        let now = io.now();
        let mut starved = false;
        std::mem::swap(&mut self.active, &mut self.looking);
        let mut looking = std::mem::take(&mut self.looking);
        for index in looking.drain(..) {
            let place = &mut self.places[usize::from(index)];
            let Some(conn) = &mut place.conn else { continue };
            conn.last_look = now;
            if !conn.dead {
                if !conn.tx.is_sending() {
                    conn.tx.flush(io, token(self.base, conn.id, SEND), conn.sock);
                    conn.sending_since = now;
                }
                conn.close_if_over(&mut self.shared, io);
            }
            if conn.is_finished() {
                if let Some(key) = conn.key
                    && let Some(at) = self.used.iter().position(|(k, _)| *k == key)
                {
                    self.used[at].1 -= 1;
                    if self.used[at].1 == 0 {
                        self.used.swap_remove(at);
                    }
                }
                place.conn = None;
                self.vacant.push(index);
                continue;
            }
            starved |= conn.is_starved();
            conn.active = conn.wants_disk();
            if conn.active {
                self.active.push(index);
            }
        }
        self.looking = looking;
        if starved {
            self.drop_stalled(io, now);
            if !self.retry_timer {
                self.retry_timer = true;
                io.submit(token(self.base, 0, RETRY_TIMER), Op::Timer { at: now.saturating_add(RETRY) });
            }
        }
    }

    /// Drops clients whose next step of the negotiation is overdue; looks again when the next one may be.
    fn drop_silent(&mut self, io: &mut I) {
        let now = io.now();
        let mut next = None;
        for index in 0..self.places.len() as u16 {
            let Some(conn) = &mut self.places[usize::from(index)].conn else { continue };
            if conn.dead || !matches!(conn.phase, Phase::Negotiating(_)) {
                continue;
            }
            if now >= conn.deadline {
                conn.kill(&mut self.shared, io);
                self.activate(index);
            } else {
                next = Some(next.unwrap_or(Nanos::MAX).min(conn.deadline));
            }
        }
        self.handshake_timer = next.is_some();
        if let Some(at) = next {
            io.submit(token(self.base, 0, HANDSHAKE_TIMER), Op::Timer { at });
        }
    }

    /// Somebody waits for buffers: the client that has kept the most by doing nothing for too long goes.
    fn drop_stalled(&mut self, io: &mut I, now: Nanos) {
        let Some(before) = now.checked_sub(STALL) else { return };
        let all = self.places.iter_mut().filter_map(|p| p.conn.as_mut()).filter(|c| c.kept_idle(before) > 0);
        if let Some(conn) = all.max_by_key(|c| c.kept_idle(before)) {
            tracing::warn!(
                client = conn.id,
                "NBD client dropped: it takes no replies or does not end a write, and others wait for its buffers"
            );
            conn.kill(&mut self.shared, io);
        }
    }
}

impl<I: Io> FrontEnd<I> for Server<I> {
    fn owns(&self, token: Token) -> bool {
        (token >> 48) as u16 == self.base
    }

    fn done(&mut self, io: &mut I, disks: &mut impl Disks<I>, done: Done) {
        let (kind, id) = (done.token as u16, (done.token >> 16) as u32);
        match kind {
            RETRY_TIMER => {
                self.retry_timer = false;
                return;
            }
            HANDSHAKE_TIMER => return self.drop_silent(io),
            _ => {}
        }
        let Some((index, conn)) = conn_of(&mut self.places, id) else { return };
        match kind {
            RECV if matches!(conn.phase, Phase::Negotiating(_)) => {
                let (ended, failed) = (matches!(done.result, Ok(0)), done.result.is_err());
                conn.rx.received_plain(done);
                if failed {
                    conn.kill(&mut self.shared, io);
                } else if ended {
                    conn.end(); // it may still read what was answered
                } else if !conn.dead {
                    negotiate(&mut self.shared, &mut self.used, self.base, io, disks, conn);
                }
            }
            RECV => {
                conn.received(&mut self.shared, io, done);
                self.serve(io, disks, index, false);
            }
            SEND => {
                conn.sent(&mut self.shared, io, done);
                if !conn.dead && !conn.rx.is_receiving() {
                    negotiate(&mut self.shared, &mut self.used, self.base, io, disks, conn);
                }
            }
            _ => {}
        }
        self.activate(index);
    }

    fn collect(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool {
        let mut first = true;
        let mut any = false;
        loop {
            let answered = self.take_answers(io, disks);
            any |= answered;
            if !first && !answered {
                break;
            }
            // A disk may answer at once, so what is asked now may have answers in the next round. A round without any is
            // the last; each other one has used something up that only a completion brings back.
            for at in 0..self.active.len() {
                let index = self.active[at];
                let Some(conn) = &mut self.places[usize::from(index)].conn else { continue };
                if conn.wants_disk() {
                    self.serve(io, disks, index, first);
                }
            }
            first = false;
        }
        self.flush(io);
        any
    }

    fn close_export(&mut self, io: &mut I, key: DiskKey) {
        self.drop_clients(io, key);
        self.flush(io);
    }

    fn shutdown(&mut self, io: &mut I) {
        self.shutdown = true;
        for index in 0..self.places.len() as u16 {
            if let Some(conn) = &mut self.places[usize::from(index)].conn {
                conn.end();
                self.activate(index);
            }
        }
        self.flush(io);
    }

    fn is_idle(&self) -> bool {
        self.places.len() == self.vacant.len()
    }

    fn status(&self) -> Vec<ExportStatus> {
        let mut all: Vec<ExportStatus> = Vec::new();
        for conn in self.places.iter().filter_map(|p| p.conn.as_deref()).filter(|c| !c.dead) {
            let Some(key) = conn.key else { continue };
            match all.iter_mut().find(|e| e.key == key) {
                Some(export) => {
                    export.clients += 1;
                    export.requests += conn.requests();
                }
                None => all.push(ExportStatus { key, clients: 1, requests: conn.requests() }),
            }
        }
        all
    }
}

fn token(base: u16, id: u32, kind: u16) -> Token {
    Token::from(base) << 48 | Token::from(id) << 16 | Token::from(kind)
}

/// The connection with this number, unless its place has been given to another.
fn conn_of(places: &mut [Place], id: u32) -> Option<(u16, &mut Conn)> {
    let index = id as u16;
    let conn = places.get_mut(usize::from(index))?.conn.as_deref_mut()?;
    (conn.id == id).then_some((index, conn))
}

/// Takes steps of the negotiation as far as the input goes.
fn negotiate<I: Io>(
    shared: &mut Shared,
    used: &mut Vec<(DiskKey, usize)>,
    base: u16,
    io: &mut I,
    disks: &impl Disks<I>,
    conn: &mut Conn,
) {
    loop {
        let Phase::Negotiating(negotiation) = &mut conn.phase else { return };
        if conn.ending || conn.tx.bulk().len() > BULK_MAX {
            return; // goes on when that is sent
        }
        let (consumed, verdict) = negotiation.step(conn.rx.plain(), &mut || disks.exports(), conn.tx.bulk());
        conn.rx.consume_plain(consumed);
        match verdict {
            Verdict::More => return conn.rx.post_plain(io, token(base, conn.id, RECV), conn.sock),
            Verdict::Reply => conn.deadline = io.now().saturating_add(shared.limits.handshake),
            Verdict::Enter(entered) => {
                let key = entered.export.key;
                match used.iter_mut().find(|(k, _)| *k == key) {
                    Some((_, clients)) => *clients += 1,
                    None => used.push((key, 1)),
                }
                return conn.enter(*entered);
            }
            Verdict::Close => conn.ending = true,
            Verdict::Violation(what) => return conn.violation(shared, io, what),
        }
    }
}
