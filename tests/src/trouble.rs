//! What goes wrong, and how it is mended.

use afterimage_dataplane::io::sim::{Errors, Fault as Injected};
use afterimage_dataplane::io::{Errno, Nanos};

use crate::check;
use crate::front::Front;
use crate::plan::{Fault, Moment, Side};
use crate::run::{MS, Run};
use crate::stage::{disk_path, log_path};

/// How long nobody notices that a process cannot go on.
const NOTICED: Nanos = 300 * MS;
/// What is left free of a disk that is full.
const LEFT: u64 = 256 * 1024;
/// Bytes that somebody else writes to a disk.
const FOREIGN: u64 = 8192;

/// Something to be done later.
pub(crate) enum Mend {
    /// The source starts.
    Source,
    /// Somebody has written to its disks meanwhile.
    Scribble,
    /// The target starts.
    Target,
    /// What came from this fault ends.
    End(Fault),
    /// Something goes wrong, as it was to at this moment.
    Strike(Fault),
    /// A view that was held is read.
    Read(check::Opened),
}

/// What moments are told by.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Happened {
    links: u64,
    syncs: u64,
    /// Disks whose synchronisation runs.
    running: usize,
    floor: u64,
    folded: u64,
    /// Files of segments, and of what is to become one.
    segments: usize,
}

impl Happened {
    fn of(run: &Run) -> Self {
        let (group, stream) = (run.stage.group(), run.stage.stream());
        Self {
            links: run.stage.links,
            syncs: run.stage.syncs,
            running: group.map_or(0, |group| group.disks.iter().filter(|disk| disk.sync.is_some()).count()),
            floor: stream.as_ref().map_or(0, |stream| stream.floor),
            folded: stream.as_ref().map_or(0, |stream| stream.folded_segments),
            segments: run.stage.segment_files(),
        }
    }

    fn has_come(&self, now: &Self, moment: Moment) -> bool {
        match moment {
            Moment::Linked => now.links > self.links,
            Moment::SyncBegun => now.syncs > self.syncs,
            Moment::SyncDrawn => now.running < self.running,
            Moment::Folding => now.floor > self.floor,
            Moment::Folded => now.folded > self.folded,
            Moment::Made => now.segments > self.segments,
        }
    }
}

impl Run {
    pub(crate) fn later(&mut self, after: Nanos, mend: Mend) {
        self.order += 1;
        self.mends.insert((self.stage.world.now() + after, self.order), mend);
    }

    /// Something goes wrong.
    pub(crate) fn strike(&mut self, fault: Fault) -> Result<(), String> {
        self.say(&format!("{fault:?}"));
        let (source, target) = (self.stage.source_node, self.stage.target_node);
        let world = self.stage.world.clone();
        match fault.clone() {
            Fault::Fall { side: Side::Source, power, down } if self.stage.source.is_some() => {
                self.fell_source(power)?;
                self.later(down, Mend::Source);
            }
            Fault::Fall { side: Side::Target, power, down } if self.stage.target.is_some() => {
                self.fell_target(power)?;
                self.later(down, Mend::Target);
            }
            Fault::Fall { .. } => {}
            Fault::FallWhen { wakes, power, down } => {
                let (rests, wakes_at) = self.host.burst(world.now());
                let now = world.now();
                let at = if wakes {
                    wakes_at + self.rng.below(self.plan.habits.pause + 2 * self.plan.world.disk_latency.1)
                } else {
                    rests.max(wakes_at.saturating_sub(MS))
                };
                if wakes_at < Nanos::MAX && at > now {
                    self.later(at - now, Mend::Strike(Fault::Fall { side: Side::Source, power, down }));
                }
            }
            Fault::Before { wakes, lead, fault } => {
                let (rests, wakes_at) = self.host.burst(world.now());
                let at = match (wakes, rests > world.now()) {
                    (true, _) => wakes_at,
                    (false, true) => rests,
                    (false, false) => wakes_at.saturating_add(self.plan.habits.work),
                };
                if at < Nanos::MAX {
                    self.later(at.saturating_sub(lead).saturating_sub(world.now()), Mend::Strike(*fault));
                }
            }
            Fault::Hang { disk, log, time, falls } => {
                let disk = disk % self.plan.setup.disks.len();
                world.hang(source, &if log { log_path(disk) } else { disk_path(disk) }, time);
                if falls {
                    let down = self.rng.between(1, 600) * MS;
                    let fall = Fault::Fall { side: Side::Source, power: false, down };
                    let before = self.rng.below(time / 4);
                    self.later(time - before, Mend::Strike(fall));
                }
            }
            Fault::Stop { down } => self.begin_stop(down, false),
            Fault::Foreign { clean: true, down } => self.begin_stop(down, true),
            Fault::Foreign { clean: false, down } => {
                // One that trusts its log over a reboot says that nobody does this.
                if self.stage.source.is_some() && !self.plan.setup.trust_reboot {
                    self.fell_source(true)?;
                    self.later(down, Mend::Scribble);
                }
            }
            Fault::Cut => {
                self.stage.cut_link();
            }
            Fault::Sever(time) => {
                self.stage.severed = true;
                self.stage.cut_link();
                self.later(time, Mend::End(fault));
            }
            Fault::Partition(time) => {
                world.partition(source, target, true);
                self.later(time, Mend::End(fault));
            }
            Fault::OneWay(side, time) => {
                let (from, to) = if side == Side::Source { (source, target) } else { (target, source) };
                world.partition_one_way(from, to, true);
                self.later(time, Mend::End(fault));
            }
            Fault::Stall(side, time) => {
                world.stall(self.node(side), time);
                if side == Side::Source {
                    self.watch.calm(world.now() + time);
                }
            }
            Fault::Suspend { side, time, sleeps } => {
                let lives =
                    if side == Side::Source { self.stage.source.is_some() } else { self.stage.target.is_some() };
                if lives {
                    world.suspend(self.node(side), true, sleeps);
                    self.stage.still[side as usize] = true;
                    self.later(time, Mend::End(fault));
                }
            }
            Fault::Jump(side, by) => world.jump_wall(self.node(side), by),
            Fault::Errors(side, errors, time) => {
                world.errors(self.node(side), errors);
                self.syncs_failed |= side == Side::Source && errors.sync > 0.0;
                if side == Side::Target {
                    self.reads_fail = errors.read > 0.0;
                    self.reads_failed |= self.reads_fail;
                }
                self.later(time, Mend::End(fault));
            }
            Fault::Full(time) => {
                world.set_space(target, world.used_space(target) + LEFT);
                self.later(time, Mend::End(fault));
            }
            Fault::Rot { proved } => self.rot(proved)?,
            Fault::Misdirect { lost } => {
                let newest =
                    world.paths(target, &self.stage.segments()).into_iter().rfind(|path| path.ends_with(".seg"));
                if let Some(path) = newest {
                    let kind = if lost { Injected::Lose } else { Injected::Misdirect };
                    world.fail(target, &path, kind, Errno::IO, 1);
                    self.robbed = true;
                }
            }
            Fault::Copy => {
                // Only of a stream that is there.
                if self.stage.ready {
                    self.copy = Some(world.snapshot(target));
                }
            }
            Fault::Many(faults) => {
                for fault in faults {
                    self.strike(fault)?;
                }
            }
            Fault::After(time, fault) => self.later(time, Mend::Strike(*fault)),
            Fault::When { moment, within, fault } => {
                let within = if within > 0 { self.rng.below(within) } else { 0 };
                if self.watch.armed.is_empty() {
                    self.watch.happened = Happened::of(self);
                }
                self.watch.armed.push((moment, within, *fault));
            }
            Fault::Rollback { down, both } => {
                if let (Some(_), Some(copy)) = (&self.stage.target, self.copy.clone()) {
                    self.fell_target(true)?;
                    world.restore(target, &copy);
                    self.robbed = true;
                    // Whatever later frames proved, they are gone with it.
                    self.proved = false;
                    self.watch.forget_points();
                    self.later(down, Mend::Target);
                    if both && self.stage.source.is_some() {
                        self.fell_source(false)?;
                        let down = self.rng.below(down + 1);
                        self.later(down, Mend::Source);
                    }
                }
            }
            Fault::Policy { sync_deadline, cut_interval, compress } => {
                // What waits may wait for what was promised before.
                self.watch.calm(world.now() + self.plan.setup.sync_deadline);
                for setup in [&mut self.plan.setup, &mut self.stage.setup] {
                    (setup.sync_deadline, setup.cut_interval, setup.compress) = (sync_deadline, cut_interval, compress);
                }
                self.stage.set_policy();
            }
            Fault::Lease(lease) => {
                // Nobody reaches a process that stands still: it would go on by the old one.
                if !self.stage.still[0] {
                    self.watch.calm(world.now());
                    (self.plan.setup.lease, self.stage.setup.lease) = (lease, lease);
                    self.stage.set_policy();
                }
            }
            Fault::Look => self.look()?,
            Fault::Hold(time) => {
                if self.stage.stream().is_some() {
                    check::ends(self)?;
                    if let Some(seq) = check::choose(self, self.stage.stream, 1).first()
                        && let Some(opened) = check::open_point(self, *seq)?
                    {
                        self.later(time, Mend::Read(opened));
                    }
                }
            }
        }
        Ok(())
    }

    /// Something that went wrong ends.
    pub(crate) fn mend(&mut self, mend: Mend) -> Result<(), String> {
        let (source, target) = (self.stage.source_node, self.stage.target_node);
        let world = self.stage.world.clone();
        match mend {
            Mend::Source => {
                if self.stage.source.is_none() {
                    self.say("the source starts");
                    self.stage.start_source();
                }
            }
            Mend::Scribble => {
                if self.stage.source.is_none() {
                    self.scribble()?;
                    self.stage.start_source();
                }
            }
            Mend::Target => {
                if self.stage.target.is_none() {
                    self.say("the target starts");
                    self.stage.start_target();
                }
            }
            Mend::Strike(fault) => self.strike(fault)?,
            Mend::Read(opened) => {
                check::read_point(self, opened, 0)?;
            }
            Mend::End(fault) => {
                self.say(&format!("ends: {fault:?}"));
                match fault {
                    Fault::Sever(_) => self.stage.severed = false,
                    Fault::Partition(_) => world.partition(source, target, false),
                    Fault::OneWay(Side::Source, _) => world.partition_one_way(source, target, false),
                    Fault::OneWay(Side::Target, _) => world.partition_one_way(target, source, false),
                    Fault::Suspend { side, .. } => {
                        world.suspend(self.node(side), false, false);
                        self.stage.still[side as usize] = false;
                        self.watch.calm(world.now());
                    }
                    Fault::Errors(side, ..) => {
                        world.errors(self.node(side), Errors::default());
                        self.reads_fail &= side != Side::Target;
                        self.watch.calm(world.now());
                        // A disk that failed a sync takes no flush any more until it is opened anew.
                        let failed = |group: afterimage_dataplane::source::GroupStatus| {
                            group.disks.iter().any(|disk| disk.sync_failed)
                        };
                        if side == Side::Source && self.stage.group().is_some_and(failed) {
                            self.fell_source(false)?;
                            self.later(NOTICED, Mend::Source);
                        }
                    }
                    Fault::Full(_) => world.set_space(target, self.plan.world.space),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// What was to go wrong at a moment does, if it has come.
    pub(crate) fn strike_armed(&mut self) {
        if self.watch.armed.is_empty() {
            return;
        }
        let now = Happened::of(self);
        let before = std::mem::replace(&mut self.watch.happened, now);
        for (moment, after, fault) in std::mem::take(&mut self.watch.armed) {
            if before.has_come(&now, moment) {
                self.later(after, Mend::Strike(fault));
            } else {
                self.watch.armed.push((moment, after, fault));
            }
        }
    }

    /// Everything is mended at once.
    pub(crate) fn mend_all(&mut self) -> Result<(), String> {
        self.watch.armed.clear();
        self.mends.retain(|_, mend| !matches!(mend, Mend::Strike(_)));
        while let Some((_, mend)) = self.mends.pop_first() {
            self.mend(mend)?;
        }
        Ok(())
    }

    fn node(&self, side: Side) -> afterimage_dataplane::io::sim::NodeId {
        if side == Side::Source { self.stage.source_node } else { self.stage.target_node }
    }

    pub(crate) fn fell_source(&mut self, power: bool) -> Result<(), String> {
        self.sample()?;
        // A life that never got its disks leaves the judgement of the one before as it is; a power loss outweighs.
        if self.fallen.is_none() || power {
            let flushed = match &self.fallen {
                Some(Some(flushed)) => flushed.clone(),
                _ => self.host.flushed.clone(),
            };
            self.fallen = Some(power.then_some(flushed));
        }
        self.watch.clean_start = false;
        self.host.abandoned();
        self.stage.stop_source(power);
        Ok(())
    }

    pub(crate) fn fell_target(&mut self, power: bool) -> Result<(), String> {
        self.sample()?;
        self.restarts += 1;
        self.stage.stop_target(power);
        Ok(())
    }

    /// An operator stops the source; somebody writes to its disks afterwards, if `foreign`.
    fn begin_stop(&mut self, down: Nanos, foreign: bool) {
        if self.stage.takes_requests() {
            self.stage.stop_cleanly();
            self.watch.stop = Some((down, foreign));
        }
    }

    /// It has stopped.
    pub(crate) fn source_stopped(&mut self) -> Result<(), String> {
        let clean = self.stage.stopped.take() == Some(true);
        self.say(if clean { "the source has stopped cleanly" } else { "the source has stopped, and owes" });
        // Who has been fenced, or has no lease, answers nothing any more; nor may a synchronous source that cannot reach
        // its target answer a write: whoever asked loses the connection, and asks the next life.
        let waits = self.plan.may_hold_answers() && self.host.waits_for_writes_only();
        // A front end answers what it has taken, not what is still on its way to it.
        let direct = self.plan.setup.front == Front::Direct;
        if self.host.pending() > 0 && !self.stage.held && !waits && direct {
            return Err(format!("the source has stopped, and {} requests are unanswered", self.host.pending()));
        }
        self.sample()?;
        let (down, foreign) = self.watch.stop.take().unwrap_or((MS, false));
        self.fallen.get_or_insert(None);
        self.host.abandoned();
        self.stage.stop_source(false);
        self.watch.clean_start = clean && !foreign && !self.plan.lenient();
        self.later(down, if foreign && clean { Mend::Scribble } else { Mend::Source });
        Ok(())
    }

    /// Somebody else writes to the source's disks.
    fn scribble(&mut self) -> Result<(), String> {
        self.judge_disks()?;
        self.judged = true;
        self.say("somebody else writes to the source's disks");
        for disk in 0..self.plan.setup.disks.len() {
            let blocks = self.plan.setup.disks[disk] / 4096;
            let at = self.rng.below(blocks) * 4096;
            let len = FOREIGN.min(self.plan.setup.disks[disk] - at) as usize;
            let mut bytes = vec![0; len];
            self.rng.fill(&mut bytes);
            self.stage.world.scribble(self.stage.source_node, &disk_path(disk), at, &bytes);
        }
        Ok(())
    }

    /// Bits of a frame flip.
    fn rot(&mut self, proved: bool) -> Result<(), String> {
        check::ends(self)?;
        let frames = &self.tap.frames;
        let names = |frame: &crate::tap::Frame| {
            frames.iter().any(|later| later.incarnation == frame.incarnation && later.acked >= frame.number)
        };
        let choice: Vec<_> = frames.iter().filter(|frame| !proved || names(frame)).cloned().collect();
        if choice.is_empty() {
            return Ok(());
        }
        let frame = choice[self.rng.below(choice.len() as u64) as usize].clone();
        let held = self.stage.stream().is_some_and(|stream| frame.last_seq > stream.floor);
        let at = frame.at + self.rng.below(frame.len as u64);
        self.say(&format!("frame {} rots, its last record is {}", frame.number, frame.last_seq));
        self.stage.world.rot(self.stage.target_node, &frame.path, at, 1);
        self.robbed = true;
        self.proved |= proved && held;
        Ok(())
    }

    /// A target that cannot go on is started again.
    pub(crate) fn restart_sick(&mut self) -> Result<(), String> {
        let Some(why) = self.stage.sick.take().filter(|_| self.stage.target.is_some()) else { return Ok(()) };
        if !self.stage.lenient {
            return Err(format!("the target has failed: {why}"));
        }
        self.say(&format!("the target is started again: {why}"));
        self.fell_target(false)?;
        self.later(NOTICED, Mend::Target);
        Ok(())
    }

    fn look(&mut self) -> Result<(), String> {
        let Some(stream) = self.stage.stream() else { return Ok(()) };
        check::ends(self)?;
        for seq in check::choose(self, stream.stream, 2) {
            // It may have died over the one before.
            if self.stage.target.is_none() || !self.stage.ready {
                break;
            }
            check::point(self, seq, 0)?;
        }
        Ok(())
    }
}
