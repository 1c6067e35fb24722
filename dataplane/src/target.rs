//! The target's core: streams that arrive, their journals, and the views opened on them.
//!
//! The owner (a data thread on the ring, or the simulator) gives it completions ([`Target::done`]) and turns
//! ([`Target::turn`]), and says hello and attaches the sockets of sources.

use std::collections::VecDeque;

use afterimage_wire::handshake::{Hello, Refusal, Welcome};
use afterimage_wire::ids::{DiskId, StreamId};

use crate::host::{Answer, DiskKey, Disks, Export, Geometry, HostDisk, Request};
use crate::io::{Allocation, Done, Errno, Io, Nanos, Sock, Token};
use crate::seal::ControlKey;

mod config;
mod status;

pub use config::{Choice, MAX_SEGMENT, MIN_SEGMENT, PointError, StreamConfig, TargetConfig, TargetError, ViewConfig};
pub use status::{Damage, DiskStatus, PointInfo, StreamState, StreamStatus, TargetEvent, ViewStatus};

/// Most views open on one target.
pub const MAX_VIEWS: usize = 256;

/// The core.
pub struct Target<I: Io> {
    base: Token,
    config: TargetConfig,
    events: VecDeque<TargetEvent>,
    marker: std::marker::PhantomData<I>,
}

impl<I: Io> Target<I> {
    /// A target whose operations carry `base_id` in the upper 16 bits of their token.
    ///
    /// # Errors
    /// [`TargetError::Config`].
    pub fn new(base_id: u16, config: TargetConfig) -> Result<Self, TargetError> {
        config.check()?;
        Ok(Self { base: Token::from(base_id) << 48, config, events: VecDeque::new(), marker: std::marker::PhantomData })
    }

    /// True if a completion with this token is ours.
    pub fn owns(&self, token: Token) -> bool {
        token >> 48 == self.base >> 48
    }

    /// Settings.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    /// Makes the stream, or opens what is there and begins to recover it ([`TargetEvent::Ready`] follows). Called again
    /// for an open stream, it takes over name, retention, new disks and higher generations.
    ///
    /// # Errors
    /// Storage, a table that makes no sense, or a disk that is another one than the table's.
    pub fn open_stream(&mut self, _io: &mut I, config: StreamConfig) -> Result<(), TargetError> {
        Err(TargetError::UnknownStream(config.stream))
    }

    /// Closes the stream, its connection and its views; `erase` also removes all it has on disk.
    ///
    /// # Errors
    /// Not known, or storage.
    pub fn drop_stream(&mut self, _io: &mut I, stream: StreamId, _erase: bool) -> Result<(), TargetError> {
        Err(TargetError::UnknownStream(stream))
    }

    /// Decides about a source that introduces itself.
    pub fn hello(&mut self, _io: &mut I, _hello: &Hello) -> Welcome {
        Welcome::Refused { reason: Refusal::UnknownStream, message: String::new() }
    }

    /// Takes a connection after its handshake: `hello` was accepted, and `Begin` has come. It is decided about again
    /// (a fence may have come between); a refusal then is a sealed `Stop`. Replaces the stream's older connection.
    /// `control` seals target → source.
    pub fn attach(&mut self, io: &mut I, _hello: &Hello, sock: Sock, _control: ControlKey) {
        io.close_sock(sock);
    }

    /// A completion of ours.
    pub fn done(&mut self, _io: &mut I, _done: Done) {}

    /// Moves what is queued; call after the completions of a poll.
    pub fn turn(&mut self, _io: &mut I) {}

    /// When [`Target::turn`] is wanted at the latest; a past time means at once, after a poll that does not wait.
    pub fn deadline(&self) -> Option<Nanos> {
        None
    }

    /// What happened by itself.
    pub fn next_event(&mut self) -> Option<TargetEvent> {
        self.events.pop_front()
    }

    /// Restore points from record `from_seq` on, oldest first, at most `limit`.
    ///
    /// # Errors
    /// Stream not known or not ready.
    pub fn points(
        &mut self,
        _io: &mut I,
        stream: StreamId,
        _from_seq: u64,
        _limit: usize,
        _cuts_only: bool,
    ) -> Result<Vec<PointInfo>, PointError> {
        Err(PointError::NotReady(stream))
    }

    /// The point that is meant.
    ///
    /// # Errors
    /// There is none. A point that does not hold all disks is given, with `complete` false.
    pub fn resolve(&mut self, _io: &mut I, stream: StreamId, _choice: Choice) -> Result<PointInfo, PointError> {
        Err(PointError::NotReady(stream))
    }

    /// Fences: raises the generation of these disks (all of the stream if none is named) to one above the highest among
    /// them, durably, and ends the connection of a source that claims any of them. Nothing that its writer sends is
    /// acknowledged afterwards. Returns the generation.
    ///
    /// # Errors
    /// Not known, or storage: then nothing is raised.
    pub fn raise_generation(
        &mut self,
        _io: &mut I,
        stream: StreamId,
        _disks: &[DiskId],
        _reason: &str,
    ) -> Result<u64, TargetError> {
        Err(TargetError::UnknownStream(stream))
    }

    /// Presents a point as disks, without copying. The same call again (also after a restart) gives the same view, with
    /// what was written to it.
    ///
    /// # Errors
    /// The point does not exist or does not hold a disk; the name is another view's; storage.
    pub fn open_view(&mut self, _io: &mut I, config: ViewConfig) -> Result<Vec<Export>, TargetError> {
        Err(TargetError::UnknownStream(config.stream))
    }

    /// Ends a view: requests under way end with an error. `keep_delta` keeps what was written for a later
    /// [`Target::open_view`] of the same name, and keeps its base from being folded.
    ///
    /// # Errors
    /// Not known, or storage.
    pub fn close_view(&mut self, _io: &mut I, name: &str, _keep_delta: bool) -> Result<(), TargetError> {
        Err(TargetError::UnknownView(name.to_owned()))
    }

    /// Where every stream stands.
    pub fn status(&self) -> Vec<StreamStatus> {
        Vec::new()
    }
}

/// A disk of a view, borrowed.
pub struct ViewDisk<'a, I: Io> {
    target: &'a mut Target<I>,
    answers: VecDeque<Answer>,
    key: DiskKey,
}

impl<I: Io> Disks<I> for Target<I> {
    fn exports(&self) -> Vec<Export> {
        Vec::new()
    }

    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<I> + '_> {
        Some(ViewDisk { target: self, answers: VecDeque::new(), key })
    }
}

impl<I: Io> HostDisk<I> for ViewDisk<'_, I> {
    fn geometry(&self) -> Geometry {
        let _ = (&self.target.base, self.key);
        Geometry { size: 0, block: 512, physical_block: 4096, read_only: true, discard: false, serial: String::new() }
    }

    fn request(&mut self, _io: &mut I, cookie: u64, _request: Request) {
        self.answers.push_back(Answer { cookie, result: Err(Errno::IO) });
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.answers
    }

    fn allocation(&mut self, _io: &mut I, _offset: u64) -> Result<Allocation, Errno> {
        Err(Errno::IO)
    }
}
