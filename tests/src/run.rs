//! Plays one seed: the host works, things go wrong ([`crate::trouble`]), and what both ends say is checked as it goes;
//! then the end ([`crate::ending`]).

use std::collections::BTreeMap;

use afterimage_dataplane::io::Nanos;
use afterimage_dataplane::io::sim::{Rng, Snapshot, World};
use afterimage_wire::ids::IncarnationId;

use crate::check;
use crate::front::Front;
use crate::history::{History, pattern};
use crate::limits::Watch;
use crate::plan::Plan;
use crate::stage::{Stage, disk_path};
use crate::tap::Tap;
use crate::trace;
use crate::trouble::Mend;
use crate::workload::Host;

pub(crate) const MS: Nanos = 1_000_000;
/// Between two looks at what both ends say of themselves.
pub(crate) const SAMPLE: Nanos = 5 * MS;

/// What one seed has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests of the host.
    pub requests: u64,
    /// Records in the journal.
    pub records: u64,
    /// Restore points that were read and compared.
    pub points: u64,
    /// Simulated time, nanoseconds.
    pub time: Nanos,
    /// Hash of all that happened, line by line.
    pub trace: u64,
}

/// A seed that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// When, nanoseconds of the world.
    pub at: Nanos,
    /// What is wrong.
    pub what: String,
}

/// One life of the source: the history of the host since then.
pub(crate) struct Epoch {
    pub(crate) history: History,
    /// Which record each of its writes is.
    pub(crate) matched: BTreeMap<u64, u64>,
    /// Up to here the journal was searched for its writes.
    pub(crate) searched: u64,
    /// For each disk, how many of its first requests need not be looked for: no writes, or matched.
    pub(crate) followed: Vec<usize>,
    /// For each disk, how many of its first requests are in a complete point.
    pub(crate) settled: Vec<usize>,
}

/// A seed being played.
pub(crate) struct Run {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) stage: Stage,
    pub(crate) host: Host,
    pub(crate) tap: Tap,
    pub(crate) epochs: Vec<Epoch>,
    /// Which life of the source wrote an incarnation.
    pub(crate) writers: BTreeMap<IncarnationId, usize>,
    pub(crate) points: u64,
    /// The source died by a power loss (its flushed ticks), a crash (nothing), or has not died since it was judged.
    pub(crate) fallen: Option<Option<Vec<u64>>>,
    /// Syncs of the source's disks may have failed: what they gave up is visible until a power loss, and then gone, to
    /// whatever life it belongs.
    pub(crate) syncs_failed: bool,
    /// Reads fail at the target now and then: what a view cannot read says nothing.
    pub(crate) reads_fail: bool,
    /// Reads have failed there: what a start could not read counts as lost, and the next start may read it.
    pub(crate) reads_failed: bool,
    /// What the source left on its disks was judged already: somebody wrote to them since.
    pub(crate) judged: bool,
    /// Highest record that a source was told is durable.
    pub(crate) acked: u64,
    pub(crate) restarts: u64,
    /// What is to be mended, or done, later.
    pub(crate) mends: BTreeMap<(Nanos, u64), Mend>,
    pub(crate) order: u64,
    /// The copy of the target's disk that somebody took.
    pub(crate) copy: Option<Snapshot>,
    /// The target has lost, by no fault of its own, what it had acknowledged.
    pub(crate) robbed: bool,
    /// Something was harmed that later frames prove to have been durable: the target must say so.
    pub(crate) proved: bool,
    pub(crate) watch: Watch,
    /// From this time of the world on no host may be answered: its lease has run out after a fence.
    pub(crate) silent_at: Option<Nanos>,
    /// What the target claimed when it was fenced: everything answered before this tick.
    pub(crate) claimed: Option<u64>,
    next_sample: Nanos,
}

/// Plays the seed.
///
/// # Errors
/// What was found to be wrong; the same seed finds it again.
pub fn run(plan: Plan) -> Result<Report, Failure> {
    let mut run = Run::new(plan);
    let result = run.play();
    let at = run.stage.world.now();
    run.trace_log();
    match result {
        Ok(()) => Ok(Report {
            requests: run.host.issued,
            records: run.tap.entries.len() as u64,
            points: run.points,
            time: at,
            trace: trace::hash(),
        }),
        Err(what) => Err(Failure { at, what }),
    }
}

/// Content of a disk before anything: patches of data in a hole, so that a first synchronisation has both.
fn content(size: u64, disk: usize, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    for _ in 0..rng.below(6) {
        let from = rng.below(size / 4096) * 4096;
        let until = (from + rng.between(1, 64) * 4096).min(size);
        for at in from..until {
            bytes[at as usize] = pattern(disk as u64 + 1, at);
        }
    }
    bytes
}

impl Run {
    fn new(plan: Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let world = World::new(rng.next_u64(), plan.world.clone());
        let contents: Vec<_> =
            plan.setup.disks.iter().enumerate().map(|(disk, size)| content(*size, disk, &mut rng)).collect();
        let mut stage = Stage::new(world, rng.fork(), plan.setup.clone(), &contents);
        stage.lenient = plan.lenient();
        let host = Host::new(rng.fork(), plan.habits.clone(), plan.setup.disks.clone());
        let tap = Tap::new(stage.policy.clone(), stage.segments());
        Self {
            rng,
            stage,
            host,
            tap,
            epochs: Vec::new(),
            writers: BTreeMap::new(),
            points: 0,
            fallen: None,
            syncs_failed: false,
            reads_fail: false,
            reads_failed: false,
            judged: false,
            acked: 0,
            restarts: 0,
            mends: BTreeMap::new(),
            order: 0,
            copy: None,
            robbed: false,
            proved: false,
            watch: Watch::default(),
            silent_at: None,
            claimed: None,
            next_sample: 0,
            plan,
        }
    }

    fn play(&mut self) -> Result<(), String> {
        self.stage.start_target();
        self.stage.start_source();
        let begun = self.stage.world.now();
        let end = begun + self.plan.length;
        for (at, fault) in self.plan.faults.clone() {
            self.until(begun + at)?;
            self.strike(fault)?;
        }
        self.until(end)?;
        self.end()?;
        check::order(self)?;
        check::nonces()
    }

    pub(crate) fn say(&mut self, what: &str) {
        self.trace_log();
        trace::line(self.stage.world.now(), what);
    }

    fn trace_log(&mut self) {
        let now = self.stage.world.now();
        for line in self.stage.log.drain(..) {
            trace::line(now, &line);
        }
    }

    /// Lets the world run until then, mending what is due.
    pub(crate) fn until(&mut self, end: Nanos) -> Result<(), String> {
        loop {
            // Anew at each step: what was armed may strike before whatever was next.
            let next = self.mends.keys().next().map_or(end, |(at, _)| end.min(*at));
            if self.step(next)? {
                continue;
            }
            let Some(due) = self.mends.first_entry().filter(|due| due.key().0 <= end) else { return Ok(()) };
            let mend = due.remove();
            self.mend(mend)?;
        }
    }

    /// One thing of the world happens, or is mended, before `end`; views that are held stay so.
    pub(crate) fn wait(&mut self, end: Nanos) -> Result<(), String> {
        let next = self.mends.keys().next().map_or(end, |(at, _)| end.min(*at));
        if self.step(next)? {
            return Ok(());
        }
        if let Some(due) = self.mends.first_entry().filter(|due| due.key().0 <= self.stage.world.now()) {
            match due.remove() {
                mend @ Mend::Read(_) => self.later(MS, mend),
                mend => self.mend(mend)?,
            }
        }
        Ok(())
    }

    /// One thing of the world happens; false when it is `end`.
    pub(crate) fn step(&mut self, end: Nanos) -> Result<bool, String> {
        let host = if self.stage.takes_requests() { self.host.deadline() } else { Nanos::MAX };
        let until = end.min(host).min(self.next_sample);
        let went = self.stage.step(until)?;
        self.strike_armed();
        if self.restarts > 0 && self.stage.ready {
            // At once: what the target lost must be forgotten before a newer writer adds to what it kept.
            check::ends(self)?;
        }
        self.trace_log();
        self.watch_source()?;
        if let Some(epoch) = self.epochs.last_mut() {
            let before = self.host.answered;
            self.host.answers(&mut self.stage, &mut epoch.history, self.plan.fails_requests())?;
            // What a source has said over a network is heard a little later.
            let road = if self.plan.setup.front == Front::Nbd { 2 * self.plan.world.net_latency.1 + MS } else { 0 };
            if let Some(at) = self.silent_at.filter(|at| self.stage.world.now() > *at + road)
                && self.host.answered > before
                && !self.stage.stopping
            {
                return Err(format!("a host is answered, and the lease of its source ran out at {} ms", at / MS));
            }
            self.host.turn(&mut self.stage, &mut epoch.history);
        }
        if self.stage.stopped.is_some() && self.stage.source.is_some() {
            self.source_stopped()?;
        }
        let now = self.stage.world.now();
        if now >= self.next_sample {
            self.next_sample = now + SAMPLE;
            self.sample()?;
            self.restart_sick()?;
        }
        Ok(went || now < end)
    }

    /// When the source has its disks (again): what it left on them is judged, and a new history begins.
    fn watch_source(&mut self) -> Result<(), String> {
        let life = self.stage.source_lives as usize;
        if !self.stage.protected || self.epochs.len() == life {
            return Ok(());
        }
        self.judge_disks()?;
        self.judged = false;
        let images: Vec<_> = (0..self.plan.setup.disks.len()).map(|disk| self.source_disk(disk)).collect();
        // Before the first: content of the begin has ids 1 to 3, and no life was judged.
        let next_id = self.epochs.last().map_or(16, |e| e.history.next_id());
        while self.epochs.len() < life {
            let searched = self.tap.entries.keys().next_back().copied().unwrap_or(0);
            self.epochs.push(Epoch {
                history: History::new(images.clone(), next_id),
                matched: BTreeMap::new(),
                searched,
                followed: Vec::new(),
                settled: Vec::new(),
            });
        }
        self.watch.calm(self.stage.world.now());
        Ok(())
    }

    /// What the source left on its disks must be what its host may expect.
    pub(crate) fn judge_disks(&mut self) -> Result<(), String> {
        let (Some(epoch), false) = (self.epochs.last(), self.judged) else { return Ok(()) };
        let flushed = self.fallen.take().flatten();
        for disk in 0..self.plan.setup.disks.len() {
            let image = self.source_disk(disk);
            let judged = match &flushed {
                None => epoch.history.judge(&[(disk, &image)], u64::MAX),
                // Not flushed in this life: it may have lost what lives before it wrote, too.
                Some(flushed) if (flushed[disk] == 0 || self.syncs_failed) && self.epochs.len() > 1 => Ok(()),
                Some(flushed) => epoch.history.judge_power_loss(disk, &image, flushed[disk]),
            };
            judged.map_err(|v| format!("the source's disk after its restart: {v}"))?;
        }
        Ok(())
    }

    /// What the target has said it cannot read.
    pub(crate) fn note_losses(&mut self) {
        for (damage, floor) in self.stage.losses.drain(..) {
            self.tap.lose(&damage, floor);
        }
    }

    pub(crate) fn source_disk(&self, disk: usize) -> Vec<u8> {
        self.stage.world.file(self.stage.source_node, &disk_path(disk)).expect("the source's disks are never removed")
    }

    /// What both ends say of themselves, against each other and against what is known.
    pub(crate) fn sample(&mut self) -> Result<(), String> {
        let (group, stream) = (self.stage.group(), self.stage.stream());
        check::ends_as(self, group.as_ref(), stream.as_ref())?;
        let acked = group.as_ref().and_then(|group| self.stage.acked_of(group));
        self.acked = self.acked.max(acked.unwrap_or(0));
        self.limits(group.as_ref(), stream.as_ref())
    }

    /// The target has recovered: what it holds must be all that was acknowledged.
    pub(crate) fn recovered(&mut self, durable: u64, said: bool) -> Result<(), String> {
        self.tap.restart(durable, self.reads_failed);
        self.note_losses();
        self.stage.world.accept(self.stage.target_node);
        for epoch in &mut self.epochs {
            epoch.matched.retain(|_, seq| *seq <= durable);
            epoch.followed.clear();
            epoch.searched = epoch.searched.min(durable);
        }
        if durable < self.acked {
            if !self.robbed {
                let acked = self.acked;
                return Err(format!("record {acked} was acknowledged, but after a restart {durable} is the newest"));
            }
            if self.proved && !said {
                return Err(format!(
                    "record {} was acknowledged and later frames prove it; after a restart {durable} is the newest, \
                     and nobody says that anything is damaged",
                    self.acked
                ));
            }
            self.acked = durable;
        }
        self.proved = false;
        Ok(())
    }

    /// Every disk has been complete within this life of the source, as the journal says.
    pub(crate) fn complete_in(&self, epoch: usize) -> bool {
        let Some(stream) = self.stage.stream() else { return false };
        let Some(newest) = stream.newest else { return false };
        let writer = self.tap.entries.get(&newest).and_then(|e| self.writers.get(&e.incarnation));
        writer == Some(&epoch)
    }

    /// Now, as the source's node has it.
    pub(crate) fn now(&self) -> Nanos {
        self.stage.source_now()
    }
}
