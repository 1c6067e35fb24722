//! The target's core: streams that arrive, their journals, and the views opened on them.
//!
//! The owner (a data thread on the ring, or the simulator) gives it completions ([`Target::done`]) and turns
//! ([`Target::turn`]), and says hello and attaches the sockets of sources.
//!
//! - `config`, `status`: what goes in and what comes out; `hello`: who may write, and its connection; `mend`: asking for
//!   what is lost; `stream`: one stream and how it is opened after a start; `reopen`: a journal that has failed; `points`:
//!   restore points; `views`: opening, serving and closing views; `ops`: operations under way.

use std::collections::{BTreeMap, VecDeque};

use afterimage_wire::control::StopReason;
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::timeline::TimelineKind;

use crate::host::{Answer, DiskKey};
use crate::io::{Done, Io, Nanos, Token};
use crate::journal::append::NoRoom;
use crate::journal::{Journal, close_made};
use crate::receive::{Connection, End};
use crate::view::{Reads, View};

mod config;
mod hello;
pub(crate) mod images;
mod keep;
mod mend;
mod merge;
pub(crate) mod ops;
mod points;
mod promise;
mod reopen;
mod seed;
mod status;
pub(crate) mod stream;
mod views;

pub use config::{Choice, MAX_SEGMENT, MIN_SEGMENT, PointError, StreamConfig, TargetConfig, TargetError, ViewConfig};
pub use status::{
    Damage, DiskStatus, LostBlocks, MergeStatus, PointInfo, ScrubStatus, StreamState, StreamStatus, TargetEvent,
    ViewStatus,
};
pub use views::ViewDisk;

use ops::{Ctx, JournalId, Ops, Purpose};
use stream::{Phase, Stream};

/// Most views open on one target.
pub const MAX_VIEWS: usize = 256;
/// Events kept until they are asked for; older ones are dropped.
const MAX_EVENTS: usize = 1024;
/// Batches of received frames taken into the index in one turn.
const INDEX_PER_TURN: usize = 2;
/// When a buffer is waited for, how long until the next look.
const STARVED: Nanos = 1_000_000;

/// The core.
pub struct Target<I: Io> {
    ops: Ops,
    config: TargetConfig,
    events: VecDeque<TargetEvent>,
    next_id: u32,
    next_key: u32,
    streams: BTreeMap<u32, Stream>,
    connections: BTreeMap<u32, Connection>,
    views: Vec<View>,
    reads: Reads,
    /// Answers on their way to their disks; kept for its memory.
    delivering: Vec<(DiskKey, Answer)>,
    /// Images to begin with, of disks that may come.
    seeds: BTreeMap<DiskId, String>,
    /// Replicas in their place, of streams that may come.
    bases: BTreeMap<StreamId, BTreeMap<DiskId, String>>,
    /// There is more to do without a completion.
    more: bool,
    starved_at: Option<Nanos>,
    marker: std::marker::PhantomData<fn(I)>,
}

fn seeds_of(seeds: &BTreeMap<DiskId, String>, config: &StreamConfig) -> Vec<(DiskId, String)> {
    let named =
        |(info, _): &(afterimage_wire::record::DiskInfo, u64)| seeds.get(&info.id).map(|path| (info.id, path.clone()));
    config.disks.iter().filter_map(named).collect()
}

fn delta(streams: &mut BTreeMap<u32, Stream>, id: u32) -> Option<&mut crate::delta::Delta> {
    streams.values_mut().flat_map(|stream| &mut stream.deltas).find(|delta| delta.id == id)
}

fn journal(streams: &mut BTreeMap<u32, Stream>, id: JournalId) -> Option<&mut Journal> {
    match id {
        JournalId::Stream(id) => streams.get_mut(&id).map(|stream| &mut stream.journal),
        JournalId::Delta(id) => delta(streams, id).map(|delta| &mut delta.journal),
    }
}

impl<I: Io> Target<I> {
    /// A target whose operations carry `base_id` in the upper 16 bits of their token.
    ///
    /// # Errors
    /// [`TargetError::Config`].
    pub fn new(base_id: u16, config: TargetConfig) -> Result<Self, TargetError> {
        config.check()?;
        Ok(Self {
            ops: Ops::new(base_id),
            reads: Reads::new(config.cache_bytes),
            config,
            events: VecDeque::new(),
            next_id: 1,
            next_key: 1,
            streams: BTreeMap::new(),
            connections: BTreeMap::new(),
            views: Vec::new(),
            delivering: Vec::new(),
            seeds: BTreeMap::new(),
            bases: BTreeMap::new(),
            more: false,
            starved_at: None,
            marker: std::marker::PhantomData,
        })
    }

    /// True if a completion with this token is ours.
    pub fn owns(&self, token: Token) -> bool {
        self.ops.owns(token)
    }

    /// Settings.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    fn id_of(&self, stream: StreamId) -> Option<u32> {
        self.streams.values().find(|open| open.config.stream == stream).map(|open| open.id)
    }

    fn stream(&mut self, stream: StreamId) -> Result<&mut Stream, TargetError> {
        let id = self.id_of(stream).ok_or(TargetError::UnknownStream(stream))?;
        self.streams.get_mut(&id).ok_or(TargetError::UnknownStream(stream))
    }

    fn ready(&mut self, stream: StreamId) -> Result<&mut Stream, TargetError> {
        let open = self.stream(stream)?;
        match &open.phase {
            Phase::Ready => Ok(open),
            Phase::Failed(why) => Err(TargetError::Failed { stream, why: why.clone() }),
            _ => Err(TargetError::Recovering(stream)),
        }
    }

    /// Makes the stream, or opens what is there and begins to recover it ([`TargetEvent::Ready`] follows). Called again
    /// for an open stream, it takes over name, retention, new disks and higher generations.
    ///
    /// # Errors
    /// Storage, a table that makes no sense, or a disk that is another one than the table's.
    pub fn open_stream(&mut self, io: &mut I, config: StreamConfig) -> Result<(), TargetError> {
        if let Some(id) = self.id_of(config.stream) {
            let open = self.streams.get_mut(&id).expect("found above");
            if !matches!(open.phase, Phase::Failed(_)) {
                open.seeds.wanted = seeds_of(&self.seeds, &config);
                open.reconfigure(io, config)?;
                self.enforce(io, id, "a newer generation was set");
                return Ok(());
            }
            // It is read again from the beginning.
            self.forget_stream(io, id);
        }
        let id = self.take_id();
        let seeds = seeds_of(&self.seeds, &config);
        let mut open = Stream::open(io, id, config, &self.config)?;
        open.seeds.wanted = seeds;
        open.bases = self.bases.get(&open.config.stream).cloned().unwrap_or_default();
        open.open_turn(&mut Ctx { io, ops: &mut self.ops }, &mut self.next_id, &mut self.events);
        self.streams.insert(id, open);
        Ok(())
    }

    /// Names a raw image with which the replica of a disk begins, if it is not there yet. To be said before
    /// [`Target::open_stream`] names the disk. The image is moved; while it cannot be, sources are refused with the
    /// reason, and it is tried again.
    pub fn seed(&mut self, disk: DiskId, path: impl Into<String>) {
        self.seeds.insert(disk, path.into());
    }

    fn take_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn forget_stream(&mut self, io: &mut I, id: u32) {
        let names: Vec<String> =
            self.views.iter().filter(|view| view.stream == id).map(|view| view.name.clone()).collect();
        for name in names {
            self.shut_view(&name);
        }
        if let Some(mut open) = self.streams.remove(&id) {
            if let Some(connection) = open.connection.take().and_then(|id| self.connections.get_mut(&id)) {
                connection.stop(StopReason::ShuttingDown, 0, "the stream is closed here".into());
            }
            open.close(io);
        }
    }

    /// Closes the stream, its connection and its views; `erase` also removes all it has on disk.
    ///
    /// # Errors
    /// Not known, or storage.
    pub fn drop_stream(&mut self, io: &mut I, stream: StreamId, erase: bool) -> Result<(), TargetError> {
        let id = self.id_of(stream).ok_or(TargetError::UnknownStream(stream))?;
        self.forget_stream(io, id);
        self.bases.remove(&stream);
        if !erase {
            return Ok(());
        }
        let dir = format!("{}/streams/{stream}", self.config.root);
        // The tables go last: as long as they are there, what is left can be found.
        for folder in [format!("{dir}/segments"), format!("{dir}/replica"), dir] {
            let storage = |path: &str, errno| TargetError::Storage { what: "erasing", path: path.to_owned(), errno };
            let names = io.list(&folder).map_err(|errno| storage(&folder, errno))?;
            for name in names.iter().filter(|name| !matches!(name.as_str(), "segments" | "replica")) {
                let path = format!("{folder}/{name}");
                io.remove(&path).map_err(|errno| storage(&path, errno))?;
            }
            io.sync_dir(&folder).map_err(|errno| storage(&folder, errno))?;
        }
        Ok(())
    }

    /// A completion of ours.
    pub fn done(&mut self, io: &mut I, done: Done) {
        let Some(purpose) = self.ops.take(done.token) else { return };
        match purpose {
            Purpose::Receive(id) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.on_received(io.now(), done);
                    if let Some(stream) = self.streams.get_mut(&connection.stream)
                        && stream.connection == Some(id)
                    {
                        stream.last_heard = Some(connection.last_heard);
                        let mut ctx = Ctx { io, ops: &mut self.ops };
                        connection.turn(&mut ctx, &mut stream.journal);
                        stream.journal.pump(&mut ctx);
                        if let Some((acked, sync_ms)) = connection.promised.take() {
                            stream.promise.heard(connection.writer.incarnation, acked, sync_ms);
                        }
                    }
                }
            }
            Purpose::Control(id) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.on_sent(&done);
                }
            }
            Purpose::Append(JournalId::Stream(id), serial) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.journal.on_append(serial, done);
                    self.written(id, io.since_boot());
                }
            }
            Purpose::Append(JournalId::Delta(id), serial) => {
                if let Some(delta) = self.delta(id) {
                    delta.on_append(serial, done);
                }
            }
            Purpose::Prepare(id, number) => self.prepared(io, id, number, &done),
            Purpose::Name(id, number) => {
                if let Some(journal) = journal(&mut self.streams, id) {
                    journal.on_name(number, &done);
                }
                self.pump(io, id);
            }
            Purpose::AppendSync(JournalId::Stream(id)) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.journal.on_sync(&done);
                }
            }
            Purpose::AppendSync(JournalId::Delta(id)) => {
                if let Some(delta) = self.delta(id) {
                    delta.journal.on_sync(&done);
                }
            }
            Purpose::Recover(id) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.recover_done(io, done, &mut self.events);
                }
            }
            Purpose::Seed(id) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.seed_done(&done);
                }
            }
            Purpose::Fold(id, what) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.fold_done(&mut Ctx { io, ops: &mut self.ops }, what, done);
                }
            }
            Purpose::Scrub(id) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.scrub_done(io, done, &mut self.events);
                }
            }
            Purpose::Merge(id, cookie) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.merge_done(&mut self.reads, cookie, &done);
                }
            }
            Purpose::MergeSync(id) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.merge_synced(&done);
                }
            }
            Purpose::Chunk(number) => self.reads.on_chunk(number, done),
            Purpose::Image(number) => self.reads.on_image(number, done),
        }
    }

    /// A segment has been made ahead, or not; maybe for a journal that is gone.
    fn prepared(&mut self, io: &mut impl Io, id: JournalId, number: u64, done: &Done) {
        match journal(&mut self.streams, id) {
            Some(journal) => journal.on_prepare(io, number, done),
            None => {
                close_made(io, done);
                self.streams.values_mut().for_each(|stream| stream.end_leaving(io, id));
            }
        }
        self.pump(io, id);
    }

    /// What waited for a segment goes on.
    fn pump(&mut self, io: &mut impl Io, id: JournalId) {
        if let Some(journal) = journal(&mut self.streams, id) {
            journal.pump(&mut Ctx { io, ops: &mut self.ops });
        }
    }

    fn delta(&mut self, id: u32) -> Option<&mut crate::delta::Delta> {
        delta(&mut self.streams, id)
    }

    /// Batches are durable: acknowledged now, indexed in a later turn, so that the acknowledgement does not wait.
    fn written(&mut self, id: u32, now: Nanos) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let mut any = false;
        while let Some(written) = stream.journal.take_written() {
            stream.received_bytes += written.part.len as u64;
            stream.to_index.push_back(written);
            any = true;
        }
        if any {
            stream.welcomed = None;
            let durable = stream.journal.durable;
            if let Some(connection) = stream.connection.and_then(|id| self.connections.get_mut(&id))
                && connection.writer.incarnation == durable.incarnation
            {
                connection.acknowledge(durable.frame, durable.seq);
                stream.promise.told(durable.incarnation, durable.frame, now);
            }
        }
    }

    /// Moves what is queued; call after the completions of a poll.
    pub fn turn(&mut self, io: &mut I) {
        self.more = false;
        let mut starved = false;
        let mut ctx = Ctx { io, ops: &mut self.ops };
        for stream in self.streams.values_mut() {
            if !stream.is_ready() {
                stream.open_turn(&mut ctx, &mut self.next_id, &mut self.events);
                continue;
            }
            // What became durable before this turn's poll is indexed; its acknowledgement is under way.
            stream.seed_turn(&mut ctx);
            self.more |= stream.index_turn(ctx.io, INDEX_PER_TURN, &mut self.events);
            stream.compare_turn(&mut self.reads);
            self.more |= stream.fold_turn(&mut ctx, &mut self.next_id, &self.reads);
            stream.scrub_turn(&mut ctx, &mut self.events);
            stream.reopen_turn(&mut ctx, &mut self.events);
            starved |= stream.fold.starved;
            for delta in &mut stream.deltas {
                self.more |= delta.turn(&mut ctx);
            }
            stream.journal.pump(&mut ctx);
        }
        self.pump_connections(io);
        for stream in self.streams.values_mut() {
            for request in stream.shelving.reads.drain(..) {
                self.reads.ask(request);
            }
        }
        self.give_way(io);
        self.mend(io.now());
        for stream in self.streams.values_mut() {
            self.more |= stream.merge_turn(&mut Ctx { io, ops: &mut self.ops }, &mut self.reads);
        }
        let mut ctx = Ctx { io, ops: &mut self.ops };
        self.reads.turn(&mut ctx, &mut self.streams);
        for (id, suspect) in self.reads.suspects.drain(..) {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.scrub.suspect(suspect);
                self.more = true;
            }
        }
        starved |= self.reads.is_starved() || self.connections.values().any(Connection::is_starved);
        self.starved_at = starved.then(|| io.now() + STARVED);
        self.deliver();
        self.tell_compared(io);
        self.look_after(io);
        let surplus = self.events.len().saturating_sub(MAX_EVENTS);
        self.events.drain(..surplus);
    }

    /// Gives what was compared to the connections of those who asked.
    fn tell_compared(&mut self, io: &mut I) {
        for stream in self.streams.values_mut().filter(|stream| stream.compare.has_answers()) {
            if let Some(connection) = stream.connection.and_then(|id| self.connections.get_mut(&id)) {
                connection.compared(&mut stream.compare);
                connection.say(&mut Ctx { io, ops: &mut self.ops });
            }
        }
    }

    /// Views that are in the way of folding and cannot be kept beside it: tests give way, failovers never do.
    fn give_way(&mut self, io: &mut I) {
        let lost =
            self.streams.values_mut().filter_map(|stream| Some((stream.config.stream, stream.fold.gave_way.take()?)));
        for (stream, (view, why)) in lost.collect::<Vec<_>>() {
            tracing::error!(%stream, view, why, "a view is given up");
            if let Err(error) = self.close_view(io, &view, false) {
                tracing::error!(%stream, view, %error, "what is left of a view cannot be removed");
            }
            self.event(TargetEvent::ViewLost { stream, view, why });
        }
    }

    fn pump_connections(&mut self, io: &mut I) {
        let mut ended = Vec::new();
        for connection in self.connections.values_mut() {
            let mut ctx = Ctx { io, ops: &mut self.ops };
            match self.streams.get_mut(&connection.stream) {
                Some(stream) => {
                    connection.turn(&mut ctx, &mut stream.journal);
                    stream.journal.pump(&mut ctx);
                }
                None => connection.say(&mut ctx),
            }
            if connection.is_over(io.now()) {
                ended.push(connection.id);
            }
        }
        for id in ended {
            let Some(mut connection) = self.connections.remove(&id) else { continue };
            connection.close(io);
            let Some(stream) = self.streams.get_mut(&connection.stream) else { continue };
            stream.received_frames += connection.received_frames;
            if stream.connection == Some(id) {
                stream.connection = None;
            }
            let why = match connection.end {
                Some(End::Stopped(_, why)) => why,
                Some(End::Peer(Some(errno))) => errno.to_string(),
                Some(End::Peer(None)) | None => "the source closed the connection".into(),
            };
            tracing::info!(stream = %stream.config.stream, why, "a source's connection has ended");
            let stream = stream.config.stream;
            self.events.push_back(TargetEvent::Disconnected { stream, why });
        }
    }

    /// Conditions that end a connection, and what is to be told.
    fn look_after(&mut self, io: &mut I) {
        for stream in self.streams.values_mut() {
            if let Some((why, floor)) = stream.fold.shortened.take() {
                let told = stream.shortened.is_some();
                stream.shortened = Some(format!("history is shorter than its retention: {why} is used up"));
                if !told {
                    let why = why.to_owned();
                    self.events.push_back(TargetEvent::Shortened { stream: stream.config.stream, floor, why });
                }
            }
            // Enough is kept again: the next time is told again.
            if stream.shortened.is_some() && stream.history_kept() >= stream.config.retention {
                stream.shortened = None;
            }
            if let Some(number) = stream.bad_seal.take()
                && let Some(connection) = stream.connection.and_then(|id| self.connections.get_mut(&id))
            {
                let why = format!("frame {number} cannot be opened");
                connection.stop(StopReason::BadFrame, number, why);
                stream.journal.drop_queue();
            }
            let connection = stream.connection.and_then(|id| self.connections.get_mut(&id));
            if let Some(errno) = stream.journal.failed() {
                if let Some(connection) = connection {
                    connection.stop(StopReason::JournalFailed, 0, format!("the journal's disk failed: {errno}"));
                }
                continue;
            }
            if stream.no_space.is_some() {
                // Folding (a longer budget, a closed view) may have made room.
                if stream.has_space(io) {
                    stream.no_space = None;
                }
                continue;
            }
            if let Some(why) = stream.journal.no_room()
                && !stream.can_fold()
            {
                let why = match why {
                    NoRoom::Budget => "the journal's budget is used up and nothing may be folded",
                    NoRoom::Space => "the journal's file system is full and nothing may be folded",
                };
                tracing::error!(stream = %stream.config.stream, why, "the stream stops");
                stream.no_space = Some(why.to_owned());
                stream.journal.drop_queue();
                if let Some(connection) = connection {
                    connection.stop(StopReason::NoSpace, 0, why.to_owned());
                }
            }
        }
    }

    fn event(&mut self, event: TargetEvent) {
        self.events.push_back(event);
    }

    /// When [`Target::turn`] is wanted at the latest; a past time means at once, after a poll that does not wait.
    pub fn deadline(&self) -> Option<Nanos> {
        if self.more {
            return Some(0);
        }
        let streams = self.streams.values().flat_map(|stream| {
            let deltas = stream.deltas.iter().filter_map(|delta| delta.deadline());
            deltas
                .chain(stream.deadline())
                .chain(stream.journal.deadline())
                .chain(stream.fold_deadline())
                .chain(stream.scrub_deadline())
                .chain(stream.mend_deadline())
        });
        let connections = self.connections.values().filter_map(Connection::deadline);
        streams.chain(connections).chain(self.starved_at).min()
    }

    /// What happened by itself.
    pub fn next_event(&mut self) -> Option<TargetEvent> {
        self.events.pop_front()
    }

    /// Fences: raises the generation of these disks (all of the stream if none is named) to one above the highest among
    /// them, durably, and ends the connection of a source that claims any of them. Nothing that its writer sends is
    /// acknowledged afterwards. Returns the generation.
    ///
    /// # Errors
    /// Not known, or storage: then nothing is raised.
    pub fn raise_generation(
        &mut self,
        io: &mut I,
        stream: StreamId,
        disks: &[DiskId],
        reason: &str,
    ) -> Result<u64, TargetError> {
        self.settle(stream);
        let zero_loss = self.zero_loss(stream, io.since_boot());
        let open = self.ready(stream)?;
        let id = open.id;
        let place = open.position();
        let generation = open.history.raise(io, disks, place, zero_loss, reason)?;
        tracing::info!(%stream, generation, reason, zero_loss, "writers of an older generation are fenced");
        self.enforce(io, id, reason);
        Ok(generation)
    }

    /// Ends the connection of a source that claims a disk under an older generation than the table's.
    fn enforce(&mut self, io: &mut I, id: u32, reason: &str) {
        let Some(open) = self.streams.get_mut(&id) else { return };
        let table = open.history.table();
        let newer = |claim: &(DiskId, u64)| Some(table.disk(claim.0)?.generation).filter(|known| claim.1 < *known);
        if let Some(connection) = open.connection.and_then(|id| self.connections.get_mut(&id))
            && let Some(generation) = connection.claims.iter().filter_map(newer).max()
            && !mutant!(FenceLeavesWriter)
        {
            connection.stop(StopReason::Fenced, generation, format!("fenced: {reason}"));
            connection.discard();
            // No write was begun for these. Those that were, end in the journal behind the place of the fence, and are
            // not acknowledged: they are the losing branch.
            open.journal.drop_queue();
            open.connection = None;
        }
        self.pump_connections(io);
    }

    /// No host has been answered a write that is not here, as far as a synchronous source has promised: `now` is since
    /// boot. False means that nobody knows.
    pub fn zero_loss(&self, stream: StreamId, now: Nanos) -> bool {
        let open = self.id_of(stream).and_then(|id| self.streams.get(&id));
        // A point that does not hold a disk is no place to run from, whatever was acknowledged.
        open.is_some_and(|open| open.is_ready() && open.is_current() && open.promise.until().is_some_and(|u| now < u))
    }

    /// Verifies everything that is held of the stream, from now on; see [`StreamStatus::scrub`] for how far it is.
    ///
    /// # Errors
    /// Not known or not ready.
    pub fn scrub(&mut self, io: &mut I, stream: StreamId) -> Result<(), TargetError> {
        let now = io.now();
        self.ready(stream)?.scrub.ask(now);
        Ok(())
    }

    /// Where every stream stands.
    pub fn status(&self) -> Vec<StreamStatus> {
        self.streams.values().map(|stream| self.status_of(stream)).collect()
    }

    fn status_of(&self, stream: &Stream) -> StreamStatus {
        let connection = stream.connection.and_then(|id| self.connections.get(&id));
        let state = match (&stream.phase, stream.journal.failed(), &stream.no_space) {
            (Phase::Failed(why), ..) => StreamState::Failed(why.clone()),
            (Phase::Ready, Some(errno), _) => StreamState::Failed(format!("the journal's disk failed: {errno}")),
            (Phase::Ready, None, Some(why)) => StreamState::NoSpace(why.clone()),
            (Phase::Ready, None, None) => StreamState::Ready,
            _ => StreamState::Recovering,
        };
        let place = stream.position();
        let journal = &stream.journal;
        let (oldest, newest) = (stream.points.oldest_complete(), stream.points.newest_complete());
        // Numbers have gaps between incarnations, never within a segment.
        let records = journal.segments.iter().map(|segment| {
            let (Some(first), Some(last)) = (segment.frames.first(), segment.frames.last()) else { return 0 };
            let from = first.first_seq.max(oldest.unwrap_or(u64::MAX));
            (last.last_seq.min(newest.unwrap_or_default()) + 1).saturating_sub(from)
        });
        let records = records.sum();
        let lives = stream.points.now();
        let disks = stream.history.table().disks.iter().map(|known| {
            let life = lives.get(&known.disk.slot);
            DiskStatus {
                id: known.disk.id,
                name: known.disk.name.clone(),
                size: life.map_or(known.disk.size, |life| life.info.size),
                generation: known.generation,
                timeline: known.timeline,
                member: life.is_some_and(|life| life.member),
                syncing: life.is_some_and(|life| !life.open.is_empty()),
                damaged: stream.owes_whole(&[]) && life.is_some_and(|life| life.member && life.owes_whole)
                    || stream.damage.open_blocks().any(|block| block.slot == known.disk.slot),
            }
        });
        let views = self.views.iter().filter(|view| view.stream == stream.id).map(|view| {
            let delta = stream.deltas.iter().find(|delta| Some(delta.id) == view.delta);
            ViewStatus {
                name: view.name.clone(),
                seq: view.seq,
                timeline: delta.map(|delta| delta.timeline()).unwrap_or_default(),
                kind: if delta.is_some() { view.kind } else { TimelineKind::View },
                delta_bytes: delta.map_or(0, |delta| delta.journal.bytes),
                shelf_bytes: stream.shelf(&view.name).map_or(0, |shelf| shelf.journal.bytes),
                failed: delta
                    .into_iter()
                    .chain(stream.shelf_for(&view.name, view.seq))
                    .find_map(|delta| delta.failed.clone()),
            }
        });
        StreamStatus {
            stream: stream.config.stream,
            name: stream.config.name.clone(),
            state,
            connected: connection.is_some_and(|connection| connection.end.is_none()),
            last_heard: stream.last_heard,
            timeline: stream.history.table().current,
            synchronous: stream.promise.is_synchronous(),
            zero_loss_until: stream.promise.until().filter(|_| stream.is_ready() && stream.is_current()),
            fences: stream.history.table().fences.clone(),
            incarnation: place.incarnation,
            // Of the same writer: a newer one's first frames count once they are durable.
            received_frame: if journal.accepted.incarnation == place.incarnation {
                journal.accepted.frame
            } else {
                place.frame
            },
            durable_frame: place.frame,
            durable_seq: place.seq,
            floor: stream.points.floor(),
            oldest,
            newest,
            newest_cut: stream.points.newest_cut(),
            cuts: stream.points.cuts().len(),
            records,
            history: stream.history_kept(),
            journal_bytes: journal.bytes,
            segments: journal.segments.len(),
            index_bytes: journal.index_bytes() + stream.points.bytes(),
            received_bytes: stream.received_bytes,
            received_frames: stream.received_frames + connection.map_or(0, |connection| connection.received_frames),
            folded_segments: stream.fold.folded,
            shortened: stream.shortened.clone(),
            damage: stream.damage.all().cloned().collect(),
            scrub: stream.scrub.status(),
            fold_error: stream.fold.error.clone(),
            disks: disks.collect(),
            views: views.collect(),
        }
    }

    /// Takes every durable frame into the index: what is asked next is about all of them.
    fn settle(&mut self, stream: StreamId) {
        if let Some(id) = self.id_of(stream)
            && let Some(open) = self.streams.get_mut(&id)
        {
            open.index_written(usize::MAX, &mut self.events);
        }
    }
}
