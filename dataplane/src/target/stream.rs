//! A stream at its target: tables, journal, images, fold, deltas; how it is opened after a start.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use afterimage_wire::handshake::DiskClaim;
use afterimage_wire::ids::{DiskId, IncarnationId, TimelineId};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::segment::Predecessor;
use afterimage_wire::stream_state::{DeltaView, StreamStateFile};
use afterimage_wire::timeline::TimelineKind;

use super::config::{StreamConfig, TargetConfig, TargetError, ViewConfig};
use super::hello::is_behind;
use super::images::Image;
use super::merge::Merge;
use super::ops::{Ctx, JournalId, Purpose};
use super::promise::Promise;
use super::reopen::Reopen;
use super::seed::Seeds;
use super::status::{Damage, TargetEvent};
use crate::compare::Compare;
use crate::damage::Ledger;
use crate::delta::Delta;
use crate::fold::Fold;
use crate::index::points::complete;
use crate::index::{DiskLife, Points};
use crate::io::{Errno, File, Io, Nanos, OpenHow};
use crate::journal::recover::{Progress, Recovery};
use crate::journal::{Journal, JournalConfig, Place, Prune, Writer, Written, parse_segment_name};
use crate::scrub::Scrub;
use crate::shelf::{Shelving, kept_of, view_of};
use crate::timeline::History;
use crate::view::Reads;

/// Segments of a delta from which on what it has overwritten is looked for.
const PRUNE_AT: u64 = 4;
/// The index of a failed-over machine's delta may take this many times the memory of a stream's.
const FAILOVER_INDEX: usize = 8;
/// How long to wait for the lock of a file that a dead process still has I/O on.
const LOCK_AGAIN: Nanos = 10_000_000;
/// A segment holds at most this part of the retention.
const ROLL_PART: u64 = 8;
/// Batches of durable frames that wait to be indexed.
const MAX_TO_INDEX: usize = 8;
/// Shortest stream time of a segment that is not full.
const ROLL_MIN: Nanos = 1_000_000_000;

/// How far a stream is open.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Another process, or I/O of a dead one, holds the stream's lock.
    Locked,
    /// Images are being opened; their locks may be held by I/O of a dead process.
    Images,
    /// The journal is being read.
    Journal(Recovery),
    /// The deltas of views are being read; the number of the one at hand.
    Deltas(usize, Option<Recovery>),
    /// Open.
    Ready,
    /// It cannot be used.
    Failed(String),
}

/// An open view, as folding sees it.
#[derive(Clone, Debug)]
pub(crate) struct ViewPin {
    pub view: u32,
    pub name: String,
    pub seq: u64,
    /// What folding has overwritten of it.
    pub shelf: Option<u32>,
}

/// A hello that was accepted and whose writer has sent nothing yet.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Welcomed {
    pub incarnation: IncarnationId,
    pub whole_resync: bool,
}

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub id: u32,
    pub config: StreamConfig,
    /// The target's settings, with the stream's own budget if it has one.
    pub bounds: TargetConfig,
    default_budget: u64,
    pub dir: String,
    pub history: History,
    pub phase: Phase,
    again: Option<Nanos>,
    pub journal: Journal,
    pub points: Points,
    pub images: BTreeMap<u16, Image>,
    pub fold: Fold,
    pub shelving: Shelving,
    pub deltas: Vec<Delta>,
    /// Deltas that are being removed, whose last segment is still being made; each with its branch.
    leaving: Vec<(u32, TimelineId)>,
    /// Points that open views without a delta need.
    pub view_pins: Vec<ViewPin>,
    /// Record and time of the newest complete point, while folding is about to go past it.
    pub keeping: Option<(u64, u64)>,
    pub damage: Ledger,
    pub scrub: Scrub,
    pub connection: Option<u32>,
    pub last_heard: Option<Nanos>,
    pub welcomed: Option<Welcomed>,
    /// What a synchronous source has promised.
    pub promise: Promise,
    /// Durable, not yet in the index.
    pub to_index: VecDeque<Written>,
    /// Images that replicas begin with.
    pub seeds: Seeds,
    /// Files and devices that are the replicas of disks, in their place; of all disks of the stream, or of none.
    pub bases: BTreeMap<DiskId, String>,
    /// They are being written to.
    pub merge: Option<Merge>,
    /// What the source asks by hash.
    pub compare: Compare,
    ripe: usize,
    /// [`Points::membership`] that the timeline table has followed.
    noted: u64,
    /// A frame that could not be opened although its CRC was right: its sender is to be stopped.
    pub bad_seal: Option<u64>,
    pub plain: Vec<u8>,
    pub received_bytes: u64,
    pub received_frames: u64,
    pub shortened: Option<String>,
    pub no_space: Option<String>,
    /// A failed journal that is being read back.
    pub reopening: Option<Box<Reopen>>,
    pub reopen_at: Option<Nanos>,
    /// When the source is to be asked (again) for what is lost.
    pub mend_at: Nanos,
    lock: Option<File>,
}

fn storage(what: &'static str, path: &str, errno: Errno) -> TargetError {
    TargetError::Storage { what, path: path.to_owned(), errno }
}

impl Stream {
    /// Opens or makes the tables; the rest follows in turns.
    pub fn open<I: Io>(io: &mut I, id: u32, config: StreamConfig, bounds: &TargetConfig) -> Result<Self, TargetError> {
        let dir = format!("{}/streams/{}", bounds.root, config.stream);
        let parent = format!("{}/streams", bounds.root);
        for folder in [&parent, &dir, &format!("{dir}/segments"), &format!("{dir}/replica")] {
            io.list(folder).map_err(|errno| storage("opening", folder, errno))?;
        }
        // The folders' own names are durable before anything in them is.
        for folder in [&bounds.root, &parent, &dir] {
            io.sync_dir(folder).map_err(|errno| storage("syncing", folder, errno))?;
        }
        let history = History::unread(config.stream);
        let mut stream = Self {
            id,
            journal: Self::empty_journal(id, &config, bounds, &dir, TimelineId::NONE),
            config,
            bounds: bounds.clone(),
            default_budget: bounds.budget_bytes,
            dir,
            history,
            phase: Phase::Locked,
            again: None,
            points: Points::default(),
            images: BTreeMap::new(),
            fold: Fold::default(),
            shelving: Shelving::default(),
            deltas: Vec::new(),
            leaving: Vec::new(),
            view_pins: Vec::new(),
            keeping: None,
            damage: Ledger::default(),
            scrub: Scrub::new(bounds.scrub_interval, bounds.scrub_rate),
            connection: None,
            last_heard: None,
            welcomed: None,
            promise: Promise::default(),
            to_index: VecDeque::new(),
            seeds: Seeds::default(),
            bases: BTreeMap::new(),
            merge: None,
            compare: Compare::default(),
            ripe: 0,
            noted: 0,
            bad_seal: None,
            plain: Vec::new(),
            received_bytes: 0,
            received_frames: 0,
            shortened: None,
            no_space: None,
            reopening: None,
            reopen_at: None,
            mend_at: 0,
            lock: None,
        };
        if stream.take_lock(io)? {
            stream.load(io).inspect_err(|_| stream.close(io))?;
            stream.phase = Phase::Images;
        }
        Ok(stream)
    }

    fn empty_journal(
        id: u32,
        config: &StreamConfig,
        bounds: &TargetConfig,
        dir: &str,
        timeline: TimelineId,
    ) -> Journal {
        let journal = JournalConfig {
            dir: format!("{dir}/segments"),
            stream: config.stream,
            timeline,
            segment_bytes: bounds.segment_bytes,
        };
        Journal::new(JournalId::Stream(id), journal, config.policy_key.clone(), u64::from(id) << 40 | 1)
    }

    /// A second process on the same folder is kept out from the first byte on. What a dead one still has in flight is
    /// waited for here and, file by file, later. False: not yet.
    fn take_lock<I: Io>(&mut self, io: &mut I) -> Result<bool, TargetError> {
        let path = format!("{}/lock", self.dir);
        let how = OpenHow { write: true, create_new: true, lock: true };
        let opened = match io.open(&path, how) {
            Err(Errno::EXIST) => io.open(&path, OpenHow { create_new: false, ..how }),
            other => other,
        };
        match opened {
            Ok(file) => {
                self.lock = Some(file);
                Ok(true)
            }
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(storage("locking", &path, errno)),
        }
    }

    /// Reads the tables.
    fn load<I: Io>(&mut self, io: &mut I) -> Result<(), TargetError> {
        let mut history = History::open(io, &self.dir, self.config.stream, &self.config.name)?;
        history.configure(io, &self.config.disks, Place::default())?;
        history.drop_orphans(io)?;
        let timeline = history.table().current;
        self.journal = Self::empty_journal(self.id, &self.config, &self.bounds, &self.dir, timeline);
        self.damage = Ledger::open(io, &self.dir, self.config.stream, timeline)
            .map_err(|errno| storage("reading the damage list in", &self.dir, errno))?;
        self.history = history;
        self.points = self.points_at_floor();
        self.bound_journal();
        Ok(())
    }

    /// What is known of the stream before its journal is read.
    pub(super) fn points_at_floor(&self) -> Points {
        let state = self.history.state();
        let lives = state.disks.iter().map(|life| (life.info.slot, life.clone())).collect();
        let mut points = Points::new(state.floor, lives, state.newest_cut);
        self.damage.doubts(state.floor).for_each(|(from, found_at)| points.doubt(from, found_at));
        points
    }

    fn bound_journal(&mut self) {
        self.bounds.budget_bytes = match self.config.budget_bytes {
            0 => self.default_budget,
            bytes => bytes.max(4 * self.bounds.segment_bytes),
        };
        let roll_after = (self.config.retention / ROLL_PART).max(ROLL_MIN);
        self.journal.set_bounds(self.bounds.budget_bytes, self.bounds.reserve_bytes, roll_after);
        self.journal.set_disks(self.history.table().disks.iter().map(|disk| disk.disk.clone()).collect());
    }

    /// Takes over what may change while the stream is open.
    pub fn reconfigure<I: Io>(&mut self, io: &mut I, config: StreamConfig) -> Result<(), TargetError> {
        self.journal.policy_key = config.policy_key.clone();
        self.deltas.iter_mut().for_each(|delta| delta.set_policy_key(&config.policy_key));
        if matches!(self.phase, Phase::Locked) {
            self.config = config;
            return Ok(());
        }
        let place = self.position();
        self.history.configure(io, &config.disks, place)?;
        self.config = config;
        self.bound_journal();
        Ok(())
    }

    /// It takes connections and opens views.
    pub fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready)
    }

    /// When to go on with opening although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        let phase = match &self.phase {
            Phase::Journal(recovery) | Phase::Deltas(_, Some(recovery)) => recovery.deadline(),
            _ => None,
        };
        [self.again, phase, self.reopen_deadline(), self.seeds.deadline()].into_iter().flatten().min()
    }

    pub(super) fn fail(&mut self, why: String, events: &mut VecDeque<TargetEvent>) {
        tracing::error!(stream = %self.config.stream, why, "the stream cannot be used");
        events.push_back(TargetEvent::Failed { stream: self.config.stream, why: why.clone() });
        self.phase = Phase::Failed(why);
        self.again = None;
    }

    /// Goes on with opening.
    pub fn open_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, next_id: &mut u32, events: &mut VecDeque<TargetEvent>) {
        if self.again.is_some_and(|again| ctx.io.now() < again) {
            return;
        }
        self.again = None;
        loop {
            let phase = std::mem::replace(&mut self.phase, Phase::Images);
            match self.step(ctx, phase, next_id) {
                Ok((phase, true)) => self.phase = phase,
                Ok((phase, false)) => {
                    self.phase = phase;
                    break;
                }
                Err(why) => return self.fail(why, events),
            }
            if self.is_ready() {
                self.points.listen();
                self.find_kept();
                self.scrub.rest(ctx.io.now());
                self.doubt_lost(ctx.io.now());
                self.keep_damage(ctx.io);
                for damage in self.damage.all() {
                    events.push_back(TargetEvent::Damaged { stream: self.config.stream, damage: damage.clone() });
                }
                events.push_back(TargetEvent::Ready { stream: self.config.stream });
                break;
            }
        }
    }

    /// One step of opening: the next phase, and whether it can go on at once.
    fn step<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, phase: Phase, next_id: &mut u32) -> Result<(Phase, bool), String> {
        let purpose = Purpose::Recover(self.id);
        match phase {
            Phase::Locked => {
                if !self.take_lock(ctx.io).map_err(|error| error.to_string())? {
                    self.again = Some(ctx.io.now() + LOCK_AGAIN);
                    return Ok((Phase::Locked, false));
                }
                self.load(ctx.io).map_err(|error| error.to_string())?;
                Ok((Phase::Images, true))
            }
            Phase::Images => {
                self.seed_turn(ctx);
                let known = self.history.table().disks.iter().map(|disk| disk.disk.clone());
                let disks: Vec<DiskInfo> = known.chain(self.points.base().values().map(|l| l.info.clone())).collect();
                for info in disks {
                    // One that waits for its seed gets its image from it.
                    if self.seeds.wanted.iter().any(|(disk, _)| *disk == info.id) {
                        continue;
                    }
                    match self.ensure_image(ctx.io, &info) {
                        Ok(()) => {}
                        Err(Errno::AGAIN | Errno::BUSY) => {
                            self.again = Some(ctx.io.now() + LOCK_AGAIN);
                            return Ok((Phase::Images, false));
                        }
                        Err(errno) => return Err(format!("opening the image of disk {}: {errno}", info.id)),
                    }
                }
                let files = self.segment_files(ctx.io, self.journal.config.timeline)?;
                Ok((Phase::Journal(Recovery::new(files, self.damage.known())), true))
            }
            Phase::Journal(mut recovery) => match recovery.turn(ctx, purpose, &mut self.journal, &mut self.points) {
                Progress::Waiting => Ok((Phase::Journal(recovery), false)),
                Progress::Failed(why) => {
                    recovery.close(ctx.io);
                    Err(why)
                }
                Progress::Ready => {
                    for damage in recovery.damage.drain(..) {
                        self.damage.add(self.journal.config.timeline, damage);
                    }
                    let disks: Vec<_> = self.history.table().disks.iter().map(|d| (d.disk.slot, d.disk.id)).collect();
                    let disk_of = |slot| disks.iter().find(|(s, _)| *s == slot).map(|(_, id)| *id).unwrap_or_default();
                    self.damage.restore(&self.journal, &recovery.used, disk_of);
                    self.damage.restore_folded(self.points.floor(), self.points.now());
                    self.keep_base(ctx.io).map_err(|error| error.to_string())?;
                    self.begin_deltas(ctx.io, next_id)?;
                    Ok((Phase::Deltas(0, None), true))
                }
            },
            Phase::Deltas(at, None) => {
                let Some(delta) = self.deltas.get(at) else { return Ok((Phase::Ready, true)) };
                let files = self.segment_files(ctx.io, delta.timeline())?;
                Ok((Phase::Deltas(at, Some(Recovery::new(files, self.damage.known()))), true))
            }
            Phase::Deltas(at, Some(mut recovery)) => {
                let delta = &mut self.deltas[at];
                match recovery.turn(ctx, purpose, &mut delta.journal, &mut delta.points) {
                    Progress::Waiting => Ok((Phase::Deltas(at, Some(recovery)), false)),
                    Progress::Failed(why) => {
                        recovery.close(ctx.io);
                        Err(why)
                    }
                    Progress::Ready => {
                        delta.recovered(&recovery.damage);
                        let timeline = delta.timeline();
                        for damage in recovery.damage.drain(..) {
                            self.damage.add(timeline, damage);
                        }
                        self.damage.restore(&self.deltas[at].journal, &recovery.used, |_| DiskId::default());
                        Ok((Phase::Deltas(at + 1, None), true))
                    }
                }
            }
            ready => Ok((ready, false)),
        }
    }

    /// What was lost below the floor concerns the point at the floor: the table says so before its segment goes, and a
    /// later start, which finds nothing of it any more, asks for a whole synchronisation as this one does.
    pub(super) fn keep_base<I: Io>(&mut self, io: &mut I) -> Result<(), TargetError> {
        let disks: Vec<DiskLife> = self.points.base().values().cloned().collect();
        if disks != self.history.state().disks {
            let state = StreamStateFile { disks, ..self.history.state().clone() };
            self.history.write_state(io, state)?;
        }
        let floor = self.points.floor();
        let lost = |(slot, life): (&u16, &DiskLife)| {
            let now = self.points.now().get(slot);
            floor > 0 && life.owes_whole && now.is_some_and(|now| now.member && now.owes_whole && now.open.is_empty())
        };
        if self.points.base().iter().any(lost) && self.damage.all().all(|damage| damage.known) {
            let what = format!("something up to record {floor} was lost before");
            let (writer, newest) = (self.journal.durable.incarnation, self.points.newest());
            let damage = Damage::unknown(0, writer, (0, 0), floor, newest, what);
            self.damage.add(self.journal.config.timeline, damage);
        }
        Ok(())
    }

    /// A read or sync of recovery has ended.
    pub fn recover_done<I: Io>(&mut self, io: &mut I, done: crate::io::Done, events: &mut VecDeque<TargetEvent>) {
        let result = match &mut self.phase {
            Phase::Journal(recovery) => recovery.done(io, done, &mut self.journal, &mut self.points),
            Phase::Deltas(at, Some(recovery)) => {
                let delta = &mut self.deltas[*at];
                recovery.done(io, done, &mut delta.journal, &mut delta.points)
            }
            _ => {
                self.reopen_done(io, done);
                Ok(())
            }
        };
        if let Err(why) = result {
            self.fail(why, events);
        }
    }

    pub(super) fn segment_files<I: Io>(
        &mut self,
        io: &mut I,
        timeline: TimelineId,
    ) -> Result<Vec<(u64, String)>, String> {
        let dir = &self.journal.config.dir;
        let names = io.list(dir).map_err(|errno| format!("listing {dir}: {errno}"))?;
        let ours = names.iter().filter_map(|name| {
            let (named, number) = parse_segment_name(name)?;
            (named == timeline).then(|| (number, format!("{dir}/{name}")))
        });
        Ok(ours.collect())
    }

    /// The deltas of views, as of now empty; what is left of removed ones goes.
    fn begin_deltas<I: Io>(&mut self, io: &mut I, next_id: &mut u32) -> Result<(), String> {
        let views = self.history.state().views.clone();
        let lives = |name: &str| views.iter().any(|view| !view.removing && view.name == name);
        for view in views.clone() {
            let of_none = kept_of(&view.name).is_none() && view_of(&view.name).is_some_and(|view| !lives(view));
            if view.removing || of_none {
                self.remove_delta_files(io, view.timeline).map_err(|error| error.to_string())?;
            } else {
                let delta = self.new_delta(*next_id, view);
                *next_id += 1;
                self.deltas.push(delta);
            }
        }
        Ok(())
    }

    /// Removes a delta for good.
    pub fn remove_delta<I: Io>(&mut self, io: &mut I, at: usize) -> Result<(), TargetError> {
        let timeline = self.deltas[at].timeline();
        self.history.begin_removal(io, timeline)?;
        let mut delta = self.deltas.remove(at);
        let making = delta.journal.is_making();
        delta.journal.close(io);
        if making {
            // Its last segment may come to be at any moment, and goes then, with the others.
            self.leaving.push((delta.id, timeline));
            return Ok(());
        }
        self.remove_delta_files(io, timeline)
    }

    /// A segment has been made for a journal that is gone: nothing more comes of it.
    pub fn end_leaving<I: Io>(&mut self, io: &mut I, id: JournalId) {
        let Some(at) = self.leaving.iter().position(|(delta, _)| JournalId::Delta(*delta) == id) else { return };
        let (_, timeline) = self.leaving.swap_remove(at);
        if let Err(error) = self.remove_delta_files(io, timeline) {
            // A start goes on with it.
            tracing::warn!(stream = %self.config.stream, %error, "what is left of a view cannot be removed yet");
        }
    }

    /// Removes what is left of a delta that is marked as being removed.
    pub fn remove_delta_files<I: Io>(&mut self, io: &mut I, timeline: TimelineId) -> Result<(), TargetError> {
        let dir = self.journal.config.dir.clone();
        let names = io.list(&dir).map_err(|errno| storage("listing", &dir, errno))?;
        for name in names {
            if parse_segment_name(&name).is_some_and(|(named, _)| named == timeline) {
                let path = format!("{dir}/{name}");
                io.remove(&path).map_err(|errno| storage("removing", &path, errno))?;
            }
        }
        io.sync_dir(&dir).map_err(|errno| storage("syncing", &dir, errno))?;
        self.damage.forget_branch(timeline);
        self.history.end_removal(io, timeline)
    }

    /// Makes an empty delta for a view of these disks.
    pub fn add_delta<I: Io>(
        &mut self,
        io: &mut I,
        id: u32,
        config: &ViewConfig,
        disks: Vec<DiskId>,
    ) -> Result<(), TargetError> {
        let mut timeline = [0; 16];
        io.random(&mut timeline);
        let timeline = TimelineId(timeline);
        let (seq, kind, name) = (config.seq, config.kind, config.name.clone());
        let view = DeltaView { timeline, seq, kind, removing: false, name, disks };
        self.history.add_delta(io, view.clone(), &config.reason)?;
        let delta = self.new_delta(id, view);
        self.deltas.push(delta);
        Ok(())
    }

    /// An empty delta or shelf. What a failed-over machine needs may use the room that ingest leaves free up; that of a
    /// test leaves half of it.
    pub fn new_delta(&self, id: u32, view: DeltaView) -> Delta {
        let mut delta = Delta::new(id, view, &self.journal.config, &self.config.policy_key);
        let of = view_of(&delta.view.name).unwrap_or(&delta.view.name);
        let views = self.history.state().views.iter();
        let failover = views.filter(|view| view.name == of).any(|view| view.kind == TimelineKind::Failover);
        let reserve = if failover { 0 } else { self.bounds.reserve_bytes / 2 };
        delta.journal.set_bounds(u64::MAX, reserve, Nanos::MAX);
        if view_of(&delta.view.name).is_none() {
            delta.prune = Some(Prune::new(self.bounds.index_bytes / 4, PRUNE_AT * self.bounds.segment_bytes));
            delta.index_bytes = self.bounds.index_bytes.saturating_mul(if failover { FAILOVER_INDEX } else { 1 });
        }
        delta
    }

    /// Takes into the index what was durable before the last turn: its acknowledgement is under way by now. True if
    /// there is more.
    pub fn index_turn<I: Io>(&mut self, io: &mut I, limit: usize, events: &mut VecDeque<TargetEvent>) -> bool {
        let surplus = self.to_index.len().saturating_sub(MAX_TO_INDEX);
        self.index_written(self.ripe.min(limit).max(surplus), events);
        if self.noted != self.points.membership() {
            // The table follows the stream; should it fail, the next change or start repeats it.
            self.noted = self.points.membership();
            let lives = self.points.now().clone();
            if let Err(error) = self.history.note_lives(io, &lives) {
                tracing::warn!(stream = %self.config.stream, %error, "the timeline table lags behind");
            }
        }
        self.ripe = self.to_index.len();
        self.ripe > 0
    }

    /// Stream time between the oldest and the newest record kept, nanoseconds. A segment that is being folded is not.
    pub fn history_kept(&self) -> Nanos {
        let floor = self.points.floor();
        let mut kept =
            self.journal.segments.iter().filter(|segment| segment.last_seq().is_some_and(|last| last > floor));
        let newest = self.journal.stream_time();
        newest.saturating_sub(kept.next().map_or(newest, |segment| segment.time.0))
    }

    /// When a failed fold is tried again.
    pub fn fold_deadline(&self) -> Option<Nanos> {
        self.fold.retry_at()
    }

    /// The journal is another one, read from the disk: what followed the old one follows it.
    pub(super) fn after_reopen(&mut self) {
        self.to_index.clear();
        (self.ripe, self.noted, self.welcomed) = (0, u64::MAX, None);
        self.points.listen();
        self.bound_journal();
    }

    /// When the scrub goes on.
    pub fn scrub_deadline(&self) -> Option<Nanos> {
        if self.is_ready() { self.scrub.deadline() } else { None }
    }

    /// A segment more would fit.
    pub fn has_space<I: Io>(&self, io: &mut I) -> bool {
        let segment = self.bounds.segment_bytes;
        self.journal.bytes + segment <= self.bounds.budget_bytes
            && io
                .free_space(&self.journal.config.dir)
                .is_ok_and(|free| free >= self.bounds.reserve_bytes.saturating_add(segment))
    }

    /// Takes durable frames into the index, at most `limit`; true if some are left.
    pub fn index_written(&mut self, limit: usize, events: &mut VecDeque<TargetEvent>) -> bool {
        for _ in 0..limit {
            let Some(written) = self.to_index.pop_front() else { return false };
            self.index_batch(written, events);
        }
        !self.to_index.is_empty()
    }

    /// Begins the comparisons that the source asks for.
    pub fn compare_turn(&mut self, reads: &mut Reads) {
        let writer = self.journal.segments.back().map(|segment| segment.writer.incarnation).unwrap_or_default();
        self.compare.take(writer, self.points.take_questions());
        self.compare.turn(self.id, reads);
    }

    fn index_batch(&mut self, mut written: Written, events: &mut VecDeque<TargetEvent>) {
        let (mut at, end) = (written.part.at, written.part.at + written.part.len);
        let mut file_at = written.at;
        while at < end {
            let Ok(header) = afterimage_wire::frame::FrameHeader::parse(&written.part.buf[at..end]).copied() else {
                break;
            };
            let len = header.length.get() as usize;
            let bytes = &mut written.part.buf[at..at + len];
            let result =
                self.journal.index_frame(written.segment, file_at, bytes, &mut self.points, true, &mut self.plain);
            if let Err(error) = result {
                // Its CRC was right, so it is what the source sent: a fault of the source or of its memory. The frame is
                // acknowledged; what it held is lost until the next whole synchronisation.
                let (first_seq, found_at) = (header.first_seq.get(), header.last_seq.get());
                self.points.damage(first_seq, found_at);
                self.points.reached(found_at);
                let number = header.number.get();
                let segment = self.journal.segment(written.segment).map_or(0, |segment| segment.number);
                let what = format!("frame {number} cannot be opened: {error}");
                let damage = Damage::unknown(segment, header.incarnation, (number, number), first_seq, found_at, what);
                self.bad_seal = Some(number);
                self.damage.add(self.journal.config.timeline, damage.clone());
                self.name_damage(damage, events);
            }
            at += len;
            file_at += len as u64;
        }
    }

    /// A new writer comes that was told of more than is here: the disk was put back to what it held before. That is a
    /// loss, found now, and what the writer sends first makes it good. Said at every start from then on by the head of
    /// its first segment; kept in the list so that it is known then since when.
    pub fn note_behind(&mut self, predecessor: Predecessor, events: &mut VecDeque<TargetEvent>) {
        let held = self.position();
        if !is_behind(held, predecessor) || predecessor.frame <= held.frame {
            return;
        }
        // What is durable is to be in the index before what comes behind it.
        self.index_written(usize::MAX, events);
        let of_writer = self.journal.segments.iter().rfind(|segment| segment.writer.incarnation == held.incarnation);
        let segment = of_writer.map_or(0, |segment| segment.number);
        let (first, last) = (held.frame + 1, predecessor.frame);
        let what = Damage::missing(first, last);
        let damage = Damage::unknown(segment, held.incarnation, (first, last), held.seq + 1, held.seq, what);
        if self.damage.add_once(self.journal.config.timeline, damage.clone()) {
            self.points.damage(damage.first_seq, damage.found_at);
            self.name_damage(damage, events);
            self.scrub.look_soon();
        }
    }

    /// Some disk that is in the stream has lost history since its last whole synchronisation, and no whole one has begun
    /// since; or what was lost of the newest writer told that one of these disks is in the stream.
    pub fn owes_whole(&self, claims: &[DiskClaim]) -> bool {
        let lost = |damage: &&Damage| !damage.known;
        if !self.damage.all().any(|damage| lost(&damage)) {
            return false;
        }
        let now = self.points.now();
        let begun = |life: &DiskLife| life.open.iter().any(|open| open.whole && !open.tainted);
        let owes = |life: &DiskLife| life.member && life.owes_whole && !begun(life);
        let newest = self.position().incarnation;
        let of_newest = self.damage.all().filter(lost).any(|damage| damage.incarnation == newest);
        let is_out = |claim: &DiskClaim| now.get(&claim.disk.slot).is_none_or(|life| !life.member);
        now.values().any(owes) || of_newest && claims.iter().any(is_out)
    }

    /// The newest record is a point that holds every disk.
    pub fn is_current(&self) -> bool {
        complete(self.points.now()) && self.damage.is_empty()
    }

    /// Where the stream stands: newest writer, frame and record on stable storage.
    pub fn position(&self) -> Place {
        self.journal.durable
    }

    /// The writer is known to this history.
    pub fn knows(&self, incarnation: IncarnationId) -> bool {
        self.history.state().incarnations.contains(&incarnation)
            || self.journal.segments.iter().any(|segment| segment.writer.incarnation == incarnation)
    }

    /// The writer of the newest segment, if it is this one.
    pub fn writer(&self, incarnation: IncarnationId) -> Option<Arc<Writer>> {
        let newest = self.journal.segments.back()?;
        (newest.writer.incarnation == incarnation).then(|| newest.writer.clone())
    }

    /// Closes every file.
    pub fn close<I: Io>(&mut self, io: &mut I) {
        match &mut self.phase {
            Phase::Journal(recovery) | Phase::Deltas(_, Some(recovery)) => recovery.close(io),
            _ => {}
        }
        self.fold.abandon();
        self.shelving.abandon();
        if let Some(mut reopen) = self.reopening.take() {
            reopen.close(io);
        }
        self.journal.close(io);
        for delta in &mut self.deltas {
            delta.journal.close(io);
        }
        for image in std::mem::take(&mut self.images).into_values() {
            io.close(image.file);
        }
        if let Some(lock) = self.lock.take() {
            io.close(lock);
        }
    }
}
