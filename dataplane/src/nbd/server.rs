//! The front end that an owner of disks drives: connections, their place in the token space, routing of answers.

use std::marker::PhantomData;

use crate::host::{DiskKey, Disks};
use crate::io::{Done, Io, Nanos, Sock, Token};

/// What one front end may hold at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections, negotiating or not.
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
        Self { connections: 128, requests: 256, read_bytes: 64 << 20, write_bytes: 64 << 20, handshake: 60_000_000_000 }
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

/// Who uses an export.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// Which.
    pub key: DiskKey,
    /// Connections in transmission.
    pub clients: usize,
    /// Requests under way.
    pub requests: usize,
}

/// The NBD front end of one data thread.
///
/// The owner gives it each completion that it [`Server::owns`], and calls [`Server::collect`] once per turn of its loop,
/// after the disks had their turn: replies are sent from there only, so that one send carries all replies of a turn.
pub struct Server<I: Io> {
    base: u16,
    limits: Limits,
    counters: Counters,
    io: PhantomData<fn(&mut I)>,
}

impl<I: Io> Server<I> {
    /// A front end without connections. `base_id` is the upper 16 bits of all its tokens.
    pub fn new(base_id: u16, limits: Limits) -> Self {
        Self { base: base_id, limits, counters: Counters::default(), io: PhantomData }
    }

    /// Takes over a connected socket of a new client and greets it.
    pub fn attach(&mut self, io: &mut I, sock: Sock, disks: &impl Disks<I>) -> Result<(), AttachError> {
        let _ = disks;
        io.close_sock(sock);
        Err(AttachError::TooMany(self.limits.connections))
    }

    /// True if a completion with this token is for [`Server::done`].
    pub fn owns(&self, token: Token) -> bool {
        (token >> 48) as u16 == self.base
    }

    /// Takes a completion.
    pub fn done(&mut self, io: &mut I, disks: &mut impl Disks<I>, done: Done) {
        let _ = (io, disks, done);
    }

    /// Takes answers out of the disks in use, goes on with connections that waited for room, sends replies.
    pub fn collect(&mut self, io: &mut I, disks: &mut impl Disks<I>) {
        let _ = (io, disks);
    }

    /// Drops the connections of an export that is no longer on offer.
    pub fn close_export(&mut self, io: &mut I, key: DiskKey) {
        let _ = (io, key);
    }

    /// Takes no further requests, answers what is under way, then closes; see [`Server::is_idle`].
    pub fn shutdown(&mut self, io: &mut I) {
        let _ = io;
    }

    /// No connections are left.
    pub fn is_idle(&self) -> bool {
        true
    }

    /// Clients of each export that has any.
    pub fn status(&self) -> Vec<ExportStatus> {
        Vec::new()
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }
}
