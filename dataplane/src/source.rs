//! The source: disks captured, numbered, sealed and shipped, group by group. See [`Source`].

use std::collections::VecDeque;
use std::marker::PhantomData;

use afterimage_wire::handshake::Position;
use afterimage_wire::ids::{DiskId, StreamId, TimelineId};

use crate::host::{Answer, DiskKey, Disks, Export, Geometry, HostDisk, Request};
use crate::io::{Allocation, Done, Errno, Io, Nanos, Sock, Token};
use crate::seal::ControlKey;
use crate::sealers::Sealer;

mod config;
mod status;

pub use config::{DiskConfig, GroupConfig, MAX_GROUPS, MAX_SOURCE_DISKS, ProtectError, SourceLimits, pool_classes};
pub use status::{DiskStatus, GroupState, GroupStatus, LinkFailure, RpoSummary, Rung, SourceEvent, SyncProgress};

/// All source disks of one data thread.
pub struct Source<I> {
    base: Token,
    limits: SourceLimits,
    sealer: Sealer,
    events: VecDeque<SourceEvent>,
    answers: VecDeque<Answer>,
    world: PhantomData<fn(&mut I)>,
}

impl<I: Io> Source<I> {
    /// A source whose operations carry tokens `base_id << 48 ..`.
    pub fn new(base_id: u16, limits: SourceLimits, sealer: Sealer) -> Self {
        Self {
            base: Token::from(base_id) << 48,
            limits,
            sealer,
            events: VecDeque::new(),
            answers: VecDeque::new(),
            world: PhantomData,
        }
    }

    /// Protects a group: opens its disks under their locks, and their write-intent logs. Host I/O waits until the logs
    /// are ready; the first [`SourceEvent::Connect`] follows.
    ///
    /// # Errors
    /// Names the file or the field; nothing stays open or half-made.
    pub fn protect(&mut self, _io: &mut I, config: GroupConfig) -> Result<(), ProtectError> {
        self.limits.check()?;
        config.check()
    }

    /// Serves a disk without protecting it: no stream, no write-intent log.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub fn serve(&mut self, _io: &mut I, disk: DiskConfig) -> Result<DiskKey, ProtectError> {
        Err(ProtectError::File { path: disk.path, action: "open", errno: Errno::NOENT })
    }

    /// Ends the service of a disk that [`Self::serve`] began; its requests under way are finished first.
    pub fn unserve(&mut self, _io: &mut I, _key: DiskKey) {}

    /// Stops a group cleanly and forgets it: see [`Self::stop`].
    pub fn unprotect(&mut self, _io: &mut I, _stream: StreamId) {}

    /// The key of a disk of a group.
    pub fn disk_key(&self, _stream: StreamId, _disk: DiskId) -> Option<DiskKey> {
        None
    }

    /// True if a completion with this token is this source's.
    pub fn owns(&self, token: Token) -> bool {
        token >> 48 == self.base >> 48
    }

    /// Takes a completion of this source's.
    pub fn done(&mut self, _io: &mut I, _done: Done) {}

    /// Moves what can be moved: composes and sends frames, cuts, clears intent bits, synchronises. Call it after each
    /// batch of completions and when [`Self::deadline`] has come.
    pub fn turn(&mut self, _io: &mut I) {}

    /// When [`Self::turn`] is due at the latest although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        None
    }

    /// The next thing that the owner has to know.
    pub fn next_event(&mut self) -> Option<SourceEvent> {
        self.events.pop_front()
    }

    /// The target has accepted the hello of the last [`SourceEvent::Connect`]; `sock` carries frames from now on.
    /// `control` is the key of the target's messages.
    #[allow(clippy::too_many_arguments)]
    pub fn linked(
        &mut self,
        io: &mut I,
        _stream: StreamId,
        sock: Sock,
        _control: ControlKey,
        _timeline: TimelineId,
        _position: Position,
        _whole_resync: bool,
    ) {
        io.close_sock(sock);
    }

    /// The attempt of the last [`SourceEvent::Connect`] came to nothing.
    pub fn link_failed(&mut self, _io: &mut I, _stream: StreamId, _failure: LinkFailure) {}

    /// Holds (or lets go) all host I/O of a group: nothing new is issued, and no answer is given.
    pub fn fence(&mut self, _io: &mut I, _stream: StreamId, _hold: bool) {}

    /// Takes a cut now, with a label; [`SourceEvent::CutTaken`] names it.
    pub fn label_cut(&mut self, _io: &mut I, _stream: StreamId, _label: &str) {}

    /// Stops everything cleanly: host I/O under way is finished, later requests are refused with `ESHUTDOWN`, the
    /// queue is shipped for at most [`SourceLimits::stop_wait`], logs are marked clean where everything is
    /// acknowledged. Over when [`Self::is_idle`].
    pub fn stop(&mut self, _io: &mut I) {}

    /// Nothing is open or under way.
    pub fn is_idle(&self) -> bool {
        true
    }

    /// How every group is.
    pub fn status(&self, _now: Nanos) -> Vec<GroupStatus> {
        Vec::new()
    }

    /// The RPO samples of a group, in microseconds, for merging and export.
    pub fn rpo_histogram(&self, _stream: StreamId) -> Option<&hdrhistogram::Histogram<u64>> {
        None
    }
}

impl<I: Io> Disks<I> for Source<I> {
    fn exports(&self) -> Vec<Export> {
        let _ = &self.sealer;
        Vec::new()
    }

    fn disk(&mut self, _key: DiskKey) -> Option<impl HostDisk<I> + '_> {
        None::<SourceDisk<'_>>
    }
}

/// One disk of a [`Source`], borrowed for a call.
#[derive(Debug)]
pub struct SourceDisk<'a> {
    answers: &'a mut VecDeque<Answer>,
}

impl<I: Io> HostDisk<I> for SourceDisk<'_> {
    fn geometry(&self) -> Geometry {
        Geometry { size: 0, block: 512, physical_block: 512, read_only: true, discard: false, serial: String::new() }
    }

    fn request(&mut self, _io: &mut I, cookie: u64, _request: Request) {
        self.answers.push_back(Answer { cookie, result: Err(Errno::IO) });
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        self.answers
    }

    fn allocation(&mut self, _io: &mut I, _offset: u64) -> Result<Allocation, Errno> {
        Err(Errno::IO)
    }
}
