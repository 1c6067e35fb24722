//! The source: disks captured, numbered, sealed and shipped, group by group. See [`Source`].
//!
//! ```text
//! front ends ─▶ capture (per disk: overlap, intent, resync) ─▶ queue of the stream ─▶ sealers ─▶ ship ─▶ target
//! ```
//! `group` is the life of one stream, `incarnate` its begins and connections, `stop` its end, `open` its files.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;

use afterimage_wire::handshake::Position;
use afterimage_wire::ids::{DiskId, StreamId, TimelineId};
use afterimage_wire::intent::IntentHeader;
use afterimage_wire::segment::Predecessor;

use crate::capture::{Disk, Flow, Gate, kind};
use crate::host::{Answer, DiskKey, Disks, Export, Geometry, HostDisk, Request};
use crate::intent::{IntentLog, Verdict};
use crate::io::{Allocation, Done, Errno, Io, Nanos, Pool, Sock, Token};
use crate::seal::{ControlKey, PolicyKey};
use crate::sealers::{Sealer, Sealing};
use crate::ship::{Queue, ShipLimits, Shipper};
use crate::spill::{self, Past, Recovered, Spill, SpillConfig};

mod config;
mod group;
mod hold;
mod incarnate;
mod lease;
mod membership;
mod open;
mod status;
mod stop;
mod synchronous;

pub use config::{
    DiskConfig, GroupConfig, MAX_GROUPS, MAX_SOURCE_DISKS, MIN_SYNC_RATE, Pace, ProtectError, SourceLimits,
    pool_classes,
};
use group::{Around, CUT_RESERVE, Group, Phase, SEQ_RESERVE};
pub use lease::{MAX_LEASE, MIN_LEASE};
use open::Opened;
pub use status::{
    DiskStatus, GroupState, GroupStatus, HoldReason, LinkFailure, RpoSummary, Rung, SourceEvent, SyncModeStatus,
    SyncProgress,
};
pub use synchronous::{MAX_SYNC_DEADLINE, MIN_SYNC_DEADLINE};

/// Most disks and groups over the life of a source: their indexes are in tokens and are never used again.
const MAX_INDEX: usize = 1 << 16;
/// Buffers of at least so many bytes are counted by themselves when they run short.
const LONG_BUFFER: usize = 64 << 10;

/// All source disks of one data thread.
///
/// Its owner feeds it completions, calls [`Source::turn`] after each batch, and acts on its events. It never blocks but
/// in [`Source::protect`] and [`Source::serve`], which open files.
pub struct Source<I> {
    base: Token,
    limits: SourceLimits,
    sealing: Sealing,
    disks: Vec<Option<Disk>>,
    groups: Vec<Option<Group>>,
    events: VecDeque<SourceEvent>,
    world: PhantomData<fn(&mut I)>,
}

impl<I> std::fmt::Debug for Source<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (groups, disks) = (self.groups.iter().flatten().count(), self.disks.iter().flatten().count());
        write!(f, "Source({groups} groups, {disks} disks)")
    }
}

impl<I: Io> Source<I> {
    /// A source whose operations carry tokens `base_id << 48 ..`.
    pub fn new(base_id: u16, limits: SourceLimits, sealer: Sealer) -> Self {
        Self {
            base: Token::from(base_id) << 48,
            limits,
            sealing: sealer.into(),
            disks: Vec::new(),
            groups: Vec::new(),
            events: VecDeque::with_capacity(64),
            world: PhantomData,
        }
    }

    /// Protects a group: opens its disks under their locks, and their write-intent logs. Host I/O waits until the logs
    /// are ready; the first [`SourceEvent::Connect`] follows.
    ///
    /// # Errors
    /// Names the file or the field; nothing stays open or half-made.
    pub fn protect(&mut self, io: &mut I, config: GroupConfig) -> Result<(), ProtectError> {
        self.limits.check()?;
        config.check()?;
        if self.groups.iter().flatten().any(|g| g.config.stream == config.stream) {
            return Err(ProtectError::Taken(config.stream));
        }
        for disk in &config.disks {
            self.check_free(disk)?;
        }
        if self.groups.len() >= MAX_INDEX || self.groups.iter().flatten().count() >= MAX_GROUPS {
            return Err(too_many("groups"));
        }
        let mut opened = open::open_all(io, config.stream, &config.disks)?;
        let mut bufs: Vec<_> = opened.iter().map_while(|_| io.pool().take(afterimage_wire::ALIGN)).collect();
        if bufs.len() < opened.len() {
            let path = config.disks[bufs.len()].log_path.clone();
            open::close_all(io, &config.disks, opened);
            return Err(ProtectError::File { path, action: "get a buffer for", errno: Errno::NOMEM });
        }
        let token = self.base | (self.groups.len() as u64) << 24;
        let tokens = |kind: u64| token | kind << 40;
        let mut left = match self.open_spill(io, config.stream, tokens(0)) {
            Ok(left) => left,
            Err(error) => {
                open::close_all(io, &config.disks, opened);
                return Err(error);
            }
        };
        let headers: Vec<Option<IntentHeader>> = opened.iter().map(|o| header_of(o).copied()).collect();
        let lineage = open::lineage(&headers);
        // An older copy may not know of all numbers that were drawn, but those it knows are not drawn again.
        let known = || headers.iter().flatten().chain(opened.iter().filter_map(|one| one.older.as_ref()));
        let first_seq = known().map(|h| h.reserved_seq).max().unwrap_or(0) + 1;
        let cut = known().map(|h| h.cut).max().unwrap_or(0);
        let (incarnation, key, wrapped) = incarnate::fresh_writer(io, &config.policy_key);
        let index = self.groups.len() as u32;
        let boot = io.boot_id();
        let found = left.as_ref().map(|left| left.spill.place());
        let trusted = open::spilled(&headers).filter(|place| found == Some(*place));
        let acked = left.as_mut().map_or((0, 0), |left| {
            let usable = |past: &Past| config.policy_key.unwrap(past.incarnation, &past.wrapped).is_ok();
            left.follow(io, lineage.predecessor, first_seq, usable)
        });
        let past = left.as_ref().and_then(|left| left.past.back());
        // Everything up to there is shipped before this life's first frame.
        let (predecessor, alternative) = match past {
            Some(last) => {
                let (frame, seq) = (last.last_frame, last.last_seq);
                (Predecessor { incarnation: last.incarnation, frame, seq }, None)
            }
            None => (lineage.predecessor, lineage.alternative),
        };
        let trusted = trusted.filter(|_| past.is_some());
        let same_boot = headers.iter().flatten().all(|h| h.boot == boot);
        let complete = headers.iter().flatten().map(|h| h.complete_wall_ns).min().unwrap_or(0);
        // What waits in the spill tells its age; what a crash left in doubt is younger than the last complete moment.
        let owed = past.is_some() || headers.iter().flatten().any(|h| !h.clean);
        let recorded = (complete > 0 && owed).then(|| io.wall().saturating_sub(complete));
        let age = match &left {
            Some(left) if trusted.is_some() && same_boot => left.age(io.now()).or(recorded),
            _ => recorded,
        };
        let mut disks = Vec::with_capacity(opened.len());
        let of_this_boot = headers.iter().flatten().filter(|h| h.boot == boot && h.lease_at > 0);
        let word_at = of_this_boot.map(|h| h.lease_at).max();
        // What an earlier process promised outlives its policy.
        let promised = headers.iter().flatten().map(|h| h.promised_ms).max().unwrap_or(0);
        let promised_ms = promised.max(synchronous::millis(config.sync_deadline));
        for ((one, config_of), odd) in opened.drain(..).zip(&config.disks).zip(&lineage.odd) {
            let number = self.disks.len() as u32;
            let token = self.base | u64::from(number) << 24;
            // That it was fenced stays true, whoever says so.
            let said = header_of(&one).or(one.older.as_ref());
            let fenced = said.filter(|h| h.fenced && config_of.generation <= h.generation);
            let fenced = fenced.map(|h| h.generation + 1);
            let left = header_of(&one).is_some_and(|h| h.left);
            let mut owed = open::owed(&one.loaded, config_of, &one.info, boot);
            owed.whole |= *odd || (left && fenced.is_none());
            owed.all |= *odd || (left && fenced.is_none());
            // A log of a disk that has grown names the old size until what is new has its bits.
            let before = header_of(&one).filter(|_| !owed.all).map(|header| header.size);
            let header = IntentHeader {
                serial: one.loaded.serial,
                disk: config_of.id,
                size: before.unwrap_or(one.info.size),
                stream: config.stream,
                incarnation: lineage.predecessor.incarnation,
                boot,
                acked_frame: lineage.predecessor.frame,
                acked_seq: lineage.predecessor.seq,
                reserved_seq: first_seq - 1 + SEQ_RESERVE,
                cut: cut + CUT_RESERVE,
                sync: 0,
                generation: config_of.generation,
                whole_owed: owed.whole,
                clean: false,
                sync_owed: owed.end,
                mapped: owed.whole && !owed.all,
                mtime_ns: 0,
                prior: lineage.alternative.unwrap_or_default(),
                spilled: Predecessor::default(),
                complete_wall_ns: complete,
                identity: one.info.identity,
                fenced: fenced.is_some(),
                left: left && fenced.is_some(),
                lease_at: word_at.unwrap_or(0),
                log_identity: one.log_identity,
                promised_ms,
            };
            let mut disk = Disk::new(config_of.clone(), DiskKey(number), Some(index), one.file, one.info, token);
            let Some(buf) = bufs.pop() else { break };
            let mut log = IntentLog::new(one.log, disk.token(kind::LOG, 0), one.info.size, header, &one.loaded, buf);
            match before {
                None => log.mark_all(),
                Some(before) if before < one.info.size => log.enlarge(before, one.info.size),
                Some(_) => {}
            }
            if let Some(witness) = one.witness {
                log.witnessed_by(witness);
            }
            log.set_header(|_| {});
            // A synchronisation that was not over, or a disk that has grown, is in doubt whatever the spill holds.
            let known = !owed.whole && !owed.end && before == Some(one.info.size);
            if let Some(place) = trusted.filter(|_| known) {
                log.trust_until(place.seq);
            }
            disk.log = Some(log);
            disk.sync.whole_owed = owed.whole;
            disk.sync.end_owed = owed.end && !mutant!(EndOwedForgotten);
            disk.out = fenced;
            disk.left = left && fenced.is_some();
            disks.push(number);
            self.disks.push(Some(disk));
        }
        let limits = ShipLimits {
            age_bound: self.limits.age_bound,
            few_unacked: self.limits.few_unacked,
            frame_bytes: self.limits.frame_bytes,
            link_silence: self.limits.link_silence,
        };
        let queue = self.limits.queue_bytes;
        let mut ship = Shipper::new(config.stream, index, incarnation, key, first_seq, queue, config.compress, limits);
        ship.durable_seq = lineage.predecessor.seq.max(acked.1);
        ship.queue.hash_key = Some(Arc::new(config.policy_key.hash_key(config.stream, wrapped.policy_key)));
        ship.queue.budget.set(self.limits.sync_rate, io.now());
        let mut group = Group::new(
            config,
            self.limits.clone(),
            disks,
            ship,
            wrapped,
            first_seq,
            cut,
            predecessor,
            alternative,
            (tokens(kind::SEND), tokens(kind::RECV)),
            word_at,
            promised_ms,
            io.now(),
        );
        if let Some(left) = left {
            if !left.past.is_empty() {
                group.ship.set_past(left.past, acked);
            }
            group.spill = Some(left.spill);
        }
        if let Some(age) = age {
            group.rpo.carry(age, io.now());
        }
        self.groups.push(Some(group));
        self.turn(io);
        Ok(())
    }

    fn open_spill(&self, io: &mut I, stream: StreamId, token: Token) -> Result<Option<Recovered>, ProtectError> {
        if self.limits.spill_dir.is_empty() {
            return Ok(None);
        }
        let config = SpillConfig {
            dir: format!("{}/{stream}", self.limits.spill_dir.trim_end_matches('/')),
            bytes: self.limits.spill_bytes,
            segment_bytes: self.limits.spill_segment_bytes,
            reserve: self.limits.spill_reserve_bytes,
        };
        spill::recover(io, config, stream, token).map(Some)
    }

    /// Serves a disk without protecting it: no stream, no write-intent log.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub fn serve(&mut self, io: &mut I, disk: DiskConfig) -> Result<DiskKey, ProtectError> {
        disk.check()?;
        self.check_free(&disk)?;
        let (file, info) = open::open_disk(io, &disk)?;
        let key = DiskKey(self.disks.len() as u32);
        let token = self.base | u64::from(key.0) << 24;
        self.disks.push(Some(Disk::new(disk, key, None, file, info, token)));
        Ok(key)
    }

    fn check_free(&self, disk: &DiskConfig) -> Result<(), ProtectError> {
        for other in self.disks.iter().flatten() {
            let twice = |what, value: &str| Err(ProtectError::Twice { what, value: value.to_owned() });
            if other.config.name == disk.name {
                return twice("name", &disk.name);
            }
            if other.config.path == disk.path {
                return twice("path", &disk.path);
            }
        }
        if self.disks.len() >= MAX_INDEX || self.disks.iter().flatten().count() >= MAX_SOURCE_DISKS {
            return Err(too_many("disks"));
        }
        Ok(())
    }

    /// Ends the service of a disk that [`Self::serve`] began; its requests under way are finished first.
    pub fn unserve(&mut self, io: &mut I, key: DiskKey) {
        if let Some(disk) = self.disks.get_mut(key.0 as usize).and_then(Option::as_mut)
            && disk.group.is_none()
        {
            disk.set_gate(&mut Flow { io, queue: None }, Gate::Stopping);
        }
        self.close_unserved(io);
    }

    fn close_unserved(&mut self, io: &mut I) {
        for slot in &mut self.disks {
            if slot.as_ref().is_some_and(|d| d.group.is_none() && d.gate == Gate::Stopping && d.is_quiet())
                && let Some(disk) = slot.take()
            {
                io.close(disk.file);
            }
        }
    }

    /// Stops a group cleanly and forgets it: see [`Self::stop`]; [`SourceEvent::Stopped`] says when.
    pub fn unprotect(&mut self, io: &mut I, stream: StreamId) {
        self.with_group(io, stream, |group, w| group.stop(w));
        self.turn(io);
    }

    /// The key of a disk of a group.
    pub fn disk_key(&self, stream: StreamId, disk: DiskId) -> Option<DiskKey> {
        let group = self.groups.iter().flatten().find(|g| g.config.stream == stream)?;
        let mut disks = group.disks.iter().filter_map(|index| self.disks[*index as usize].as_ref());
        disks.find(|d| d.config.id == disk).map(|d| d.key)
    }

    /// Answers of a disk that are ready; none if it has gone.
    pub(crate) fn answers_of(&mut self, key: DiskKey) -> Option<&mut VecDeque<Answer>> {
        self.disks.get_mut(key.0 as usize)?.as_mut().map(Disk::answers)
    }

    /// Nothing that hosts asked of the disk is under way or waits, unless it waits because all I/O is held.
    pub(crate) fn is_drained(&self, key: DiskKey) -> bool {
        let disk = self.disks.get(key.0 as usize).and_then(Option::as_ref);
        disk.is_none_or(|disk| disk.is_drained() || disk.is_fenced())
    }

    /// The disk has been let go of.
    pub(crate) fn has_closed(&self, key: DiskKey) -> bool {
        self.disks.get(key.0 as usize).is_none_or(Option::is_none)
    }

    /// True if a completion with this token is this source's.
    pub fn owns(&self, token: Token) -> bool {
        token >> 48 == self.base >> 48
    }

    fn with_group<R>(
        &mut self,
        io: &mut I,
        stream: StreamId,
        call: impl FnOnce(&mut Group, &mut Around<'_, I>) -> R,
    ) -> Option<R> {
        let group = self.groups.iter_mut().flatten().find(|g| g.config.stream == stream)?;
        let (disks, sealing, events) = (&mut self.disks, &mut self.sealing, &mut self.events);
        Some(call(group, &mut Around { io, disks, sealing, events }))
    }

    /// Takes a completion of this source's.
    pub fn done(&mut self, io: &mut I, done: Done) {
        let kind = done.token >> 40 & 0xff;
        let index = (done.token >> 24 & 0xffff) as usize;
        let low = (done.token & 0xff_ffff) as u32;
        if kind == kind::SEND || kind == kind::RECV {
            let Some(group) = self.groups.get_mut(index).and_then(Option::as_mut) else { return };
            let (disks, sealing, events) = (&mut self.disks, &mut self.sealing, &mut self.events);
            let mut w = Around { io, disks, sealing, events };
            return match kind {
                kind::SEND => group.sent(&mut w, low, done),
                _ => group.received(&mut w, low, done),
            };
        }
        if [spill::kind::WRITE, spill::kind::READ, spill::kind::SYNC, spill::kind::SPARE].contains(&kind) {
            let Some(group) = self.groups.get_mut(index).and_then(Option::as_mut) else { return };
            let (disks, sealing, events) = (&mut self.disks, &mut self.sealing, &mut self.events);
            return group.spill_done(&mut Around { io, disks, sealing, events }, kind, low, done);
        }
        let Some((disk, queue)) = parts(&mut self.disks, &mut self.groups, index) else { return };
        let mut f = Flow { io, queue };
        match kind {
            kind::HOST => disk.host_done(&mut f, low, done),
            kind::FLUSH => disk.flush_done(&mut f, done),
            kind::LOG => disk.log_done(&mut f, done),
            kind::SYNC => disk.sync_done(&mut f, low, done),
            _ => {}
        }
    }

    /// Moves what can be moved: composes and sends frames, cuts, clears intent bits, synchronises. Call it after each
    /// batch of completions and when [`Self::deadline`] has come.
    pub fn turn(&mut self, io: &mut I) {
        let shortage = self.shortage(io.pool());
        let now = io.now();
        let short = self.groups.iter().flatten().filter(|group| group.is_short(now));
        let short = short.map(|group| group.ship.pacer.priority()).max().unwrap_or(0);
        let mut w = Around { io, disks: &mut self.disks, sealing: &mut self.sealing, events: &mut self.events };
        for slot in &mut self.groups {
            if let Some(group) = slot {
                group.ship.pacer.gives_way = group.ship.pacer.priority() < short;
                group.turn(&mut w, shortage);
                if group.phase == Phase::Closed {
                    *slot = None;
                }
            }
        }
        loop {
            let mut any = false;
            while let Some(job) = w.sealing.next_done() {
                any = true;
                let owner = (job.owner >> 32) as usize;
                if let Some(group) = self.groups.get_mut(owner).and_then(Option::as_mut) {
                    group.ship.sealed(job);
                }
            }
            if !any {
                break;
            }
            for group in self.groups.iter_mut().flatten() {
                group.compose_and_send(&mut w);
            }
        }
        for slot in &mut *w.disks {
            if let Some(disk) = slot
                && disk.group.is_none()
            {
                disk.feed(&mut Flow { io: &mut *w.io, queue: None });
            }
        }
        self.close_unserved(io);
    }

    /// If buffers are short: what the queue of each group may hold of them, bytes. However many groups have a target that
    /// takes nothing, buffers are left for hosts and for the other groups. Long buffers run out by themselves: what most
    /// writes need fits into no shorter one.
    fn shortage(&self, pool: &Pool) -> Option<usize> {
        let (free, all) = (pool.free_bytes(), pool.total_bytes());
        let (long_free, long) = pool.bytes_from(LONG_BUFFER);
        let groups = self.groups.iter().flatten().count().max(1);
        (free < all / 8 || long_free < long / 8).then_some(all / 4 / groups)
    }

    /// When [`Self::turn`] is due at the latest although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        self.groups.iter().flatten().filter_map(|g| g.deadline(&self.disks)).min()
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
        stream: StreamId,
        sock: Sock,
        control: ControlKey,
        _timeline: TimelineId,
        position: Position,
        whole_resync: bool,
    ) {
        let linked = self.with_group(io, stream, |group, w| group.linked(w, sock, control, position, whole_resync));
        match linked {
            Some(()) => self.turn(io),
            None => io.close_sock(sock),
        }
    }

    /// The attempt of the last [`SourceEvent::Connect`] came to nothing.
    pub fn link_failed(&mut self, io: &mut I, stream: StreamId, failure: LinkFailure) {
        self.with_group(io, stream, |group, w| group.link_failed(w, failure));
        self.turn(io);
    }

    /// Ends a group's connection: its target is not to be spoken with any more, or not by this connection.
    pub fn cut_off(&mut self, io: &mut I, stream: StreamId, why: &str) {
        self.with_group(io, stream, |group, w| group.cut_off(w, why));
        self.turn(io);
    }

    /// Holds (or lets go) all host I/O of a group: nothing new is issued, and no answer is given.
    pub fn fence(&mut self, io: &mut I, stream: StreamId, hold: bool) {
        self.with_group(io, stream, |group, w| {
            group.held = hold;
            group.hold_turn(w);
        });
    }

    /// Changes what may change while a group runs: the time between its cuts, and compression.
    ///
    /// # Errors
    /// [`ProtectError::Value`]; nothing is changed.
    pub fn set_policy(
        &mut self,
        io: &mut I,
        stream: StreamId,
        cut_interval: Nanos,
        compress: bool,
    ) -> Result<(), ProtectError> {
        config::check_cut_interval(cut_interval)?;
        self.with_group(io, stream, |group, w| group.set_policy(w.io.now(), cut_interval, compress));
        Ok(())
    }

    /// What a group's writers are wrapped under from now on. The one of now ends as soon as nothing of it is on its way, so
    /// that nothing has to be sent again; under load that may take until the next start.
    pub fn set_policy_key(&mut self, io: &mut I, stream: StreamId, key: PolicyKey) {
        self.with_group(io, stream, |group, _| group.config.policy_key = key);
        self.turn(io);
    }

    /// When frames of a group may leave, from now on.
    ///
    /// # Errors
    /// [`ProtectError::Value`]; nothing is changed.
    pub fn set_pace(&mut self, io: &mut I, stream: StreamId, pace: Pace) -> Result<(), ProtectError> {
        config::check_pace(&pace)?;
        self.with_group(io, stream, |group, w| group.ship.pacer.set(pace, w.io.now()));
        self.turn(io);
        Ok(())
    }

    /// Changes what hosts wait for while a group runs: see [`GroupConfig::lease`] and [`GroupConfig::sync_deadline`].
    ///
    /// # Errors
    /// [`ProtectError::Value`]; nothing is changed.
    pub fn set_waiting(
        &mut self,
        io: &mut I,
        stream: StreamId,
        lease: Nanos,
        sync_deadline: Nanos,
    ) -> Result<(), ProtectError> {
        config::check_lease(lease)?;
        config::check_sync_deadline(sync_deadline)?;
        self.with_group(io, stream, |group, w| {
            group.lease.set_span(lease);
            group.synchronous.set_deadline(w.io.now(), sync_deadline);
            group.hold_turn(w);
        });
        self.turn(io);
        Ok(())
    }

    /// The coordinator has confirmed the disks' generations, when asked at `asked` (by [`Io::since_boot`]): as good as a
    /// word of the target. The lease runs from there.
    pub fn confirm(&mut self, io: &mut I, stream: StreamId, asked: Nanos) {
        self.with_group(io, stream, |group, w| {
            group.lease.word(asked);
            group.hold_turn(w);
        });
    }

    /// Disks are written under these generations from now on; lower ones change nothing. A disk that was fenced by a
    /// generation up to the new one is in the stream again, and its I/O goes on. What it holds more than the target is
    /// synchronised.
    pub fn set_generations(&mut self, io: &mut I, stream: StreamId, generations: &[(DiskId, u64)]) {
        self.with_group(io, stream, |group, w| group.set_generations(w, generations));
        self.turn(io);
    }

    /// Takes a disk out of its stream for good: requests under way are finished, later ones refused with `ESHUTDOWN`,
    /// the stream says that it has left, and its files are closed. [`SourceEvent::Left`] follows. False if it is not
    /// there, or is the last one.
    pub fn leave(&mut self, io: &mut I, stream: StreamId, disk: DiskId) -> bool {
        let left = self.with_group(io, stream, |group, w| group.leave(w, disk)).unwrap_or(false);
        self.turn(io);
        left
    }

    /// Takes a cut now, with a label; [`SourceEvent::CutTaken`] names it.
    pub fn label_cut(&mut self, io: &mut I, stream: StreamId, label: &str) {
        self.with_group(io, stream, |group, w| {
            if group.phase == Phase::Open {
                group.cut(w, label.to_owned(), true);
            }
        });
        self.turn(io);
    }

    /// Stops everything cleanly: host I/O under way is finished, later requests are refused with `ESHUTDOWN`, the
    /// queue is shipped for at most [`SourceLimits::stop_wait`], logs are marked clean where everything is
    /// acknowledged. Over when [`Self::is_idle`].
    pub fn stop(&mut self, io: &mut I) {
        let mut w = Around { io, disks: &mut self.disks, sealing: &mut self.sealing, events: &mut self.events };
        for group in self.groups.iter_mut().flatten() {
            group.stop(&mut w);
        }
        for disk in self.disks.iter_mut().flatten().filter(|d| d.group.is_none()) {
            disk.set_gate(&mut Flow { io: &mut *io, queue: None }, Gate::Stopping);
        }
        self.turn(io);
    }

    /// Nothing is open or under way.
    pub fn is_idle(&self) -> bool {
        self.groups.iter().all(Option::is_none) && self.disks.iter().all(Option::is_none)
    }

    /// How every group is.
    pub fn status(&self, now: Nanos) -> Vec<GroupStatus> {
        self.groups.iter().flatten().map(|group| self.group_status(group, now)).collect()
    }

    fn group_status(&self, group: &Group, now: Nanos) -> GroupStatus {
        let ship = &group.ship;
        let disks = group.disks.iter().filter_map(|index| self.disks[*index as usize].as_ref());
        let synchronous = (group.synchronous.deadline() > 0).then(|| SyncModeStatus {
            deadline: group.synchronous.deadline(),
            together: group.synchronous.is_together(),
            why: group.synchronous.why_apart().map(str::to_owned),
        });
        GroupStatus {
            stream: group.config.stream,
            name: group.config.name.clone(),
            state: group.state(&self.disks),
            rung: group.rung(&self.disks),
            held: group.hold_told,
            lease: group.lease.span(),
            lease_left: group.lease_due.map_or(0, |due| due.saturating_sub(now)),
            synchronous,
            incarnation: ship.incarnation,
            policy_key: group.wrapped.policy_key,
            captured_seq: ship.queue.last_seq(),
            sealed_seq: ship.sealed_seq,
            sent_seq: ship.sent_seq,
            acked_seq: ship.durable_seq,
            cut: group.cut,
            records: ship.queue.records,
            uncaptured: ship.queue.passed,
            captured_bytes: ship.queue.bytes,
            wire_bytes: ship.wire_bytes,
            frames: ship.sealed_frames,
            queue_bytes: ship.queue.used(),
            queue_limit: ship.queue.limit(),
            spill_bytes: group.spill.as_ref().map_or(0, Spill::bytes),
            spill_limit: group.spill.as_ref().map_or(0, Spill::limit),
            spill_trouble: group.spill.as_ref().and_then(Spill::trouble).map(str::to_owned),
            catch_up: ship.catch_up(group.spill.as_ref().map_or(0, Spill::unread)),
            rpo_now: group.rpo_now(now),
            rpo: group.rpo.summary(),
            disks: disks.map(|disk| disk_status(disk, now)).collect(),
        }
    }

    /// The RPO samples of a group, in microseconds, for merging and export.
    pub fn rpo_histogram(&self, stream: StreamId) -> Option<&hdrhistogram::Histogram<u64>> {
        self.groups.iter().flatten().find(|g| g.config.stream == stream).map(|g| g.rpo.histogram())
    }
}

fn header_of(opened: &Opened) -> Option<&IntentHeader> {
    match &opened.loaded.verdict {
        Verdict::Good(header) => Some(header),
        Verdict::Missing | Verdict::Foreign(_) => None,
    }
}

fn too_many(field: &'static str) -> ProtectError {
    ProtectError::Value { field, value: "one more".into(), allowed: "256 groups and 4096 disks at a time" }
}

fn disk_status(disk: &Disk, now: Nanos) -> DiskStatus {
    let dirty = disk.log.as_ref().map_or(0, IntentLog::dirty);
    let sync = disk.sync.progress(dirty, now).map(|p| SyncProgress {
        whole: p.whole,
        done: p.done,
        total: p.total,
        compared: p.compared,
        sent: p.sent,
        left: p.left,
    });
    DiskStatus {
        key: disk.key,
        id: disk.config.id,
        name: disk.config.name.clone(),
        size: disk.info.size,
        generation: disk.config.generation,
        out: disk.out,
        in_flight: disk.in_flight(),
        hot_extents: disk.log.as_ref().map_or(0, IntentLog::hot),
        dirty_extents: dirty,
        sync,
        failed_writes: disk.failed_writes,
        sync_failed: disk.flush.has_failed(),
    }
}

/// A disk and the queue of its stream.
fn parts<'a>(
    disks: &'a mut [Option<Disk>],
    groups: &'a mut [Option<Group>],
    index: usize,
) -> Option<(&'a mut Disk, Option<&'a mut Queue>)> {
    let disk = disks.get_mut(index)?.as_mut()?;
    let queue = match disk.group {
        Some(group) => Some(&mut groups.get_mut(group as usize)?.as_mut()?.ship.queue),
        None => None,
    };
    Some((disk, queue))
}

impl<I: Io> Disks<I> for Source<I> {
    fn exports(&self) -> Vec<Export> {
        let export = |disk: &Disk| Export {
            key: disk.key,
            name: disk.config.name.clone(),
            description: disk.config.path.clone(),
            geometry: disk.geometry(),
        };
        self.disks.iter().flatten().filter(|d| d.gate != Gate::Stopping).map(export).collect()
    }

    fn disk(&mut self, key: DiskKey) -> Option<impl HostDisk<I> + '_> {
        let (disk, queue) = parts(&mut self.disks, &mut self.groups, key.0 as usize)?;
        Some(SourceDisk { disk, queue })
    }
}

/// One disk of a [`Source`] with its stream's queue, borrowed for a call.
struct SourceDisk<'a> {
    disk: &'a mut Disk,
    queue: Option<&'a mut Queue>,
}

impl<I: Io> HostDisk<I> for SourceDisk<'_> {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn request(&mut self, io: &mut I, cookie: u64, request: Request) {
        self.disk.request(&mut Flow { io, queue: self.queue.as_deref_mut() }, cookie, request);
    }

    fn reads_into(&self) -> Option<u32> {
        Some(self.disk.info.block)
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        self.disk.answers()
    }

    fn allocation(&mut self, io: &mut I, offset: u64) -> Result<Allocation, Errno> {
        let end = self.disk.info.size;
        if offset >= end {
            return Err(Errno::INVAL);
        }
        // A file system that does not tell has data everywhere.
        let all = Allocation { len: end - offset, hole: false };
        Ok(io.allocation(self.disk.file, offset).unwrap_or(all))
    }
}
