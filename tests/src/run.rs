//! Plays one seed: the host works, things go wrong, and what both ends say is checked as it goes; then the end.

use std::collections::BTreeMap;

use afterimage_dataplane::io::sim::{Rng, World};
use afterimage_dataplane::io::{Io, Nanos};
use afterimage_dataplane::source::GroupState;
use afterimage_dataplane::target::{Choice, ViewConfig};
use afterimage_wire::ids::{DiskId, IncarnationId};
use afterimage_wire::timeline::TimelineKind;

use crate::check;
use crate::history::{Effect, History, pattern};
use crate::plan::{Ending, Fault, Plan};
use crate::stage::{Stage, disk_path};
use crate::tap::Tap;
use crate::workload::Host;

const MS: Nanos = 1_000_000;
/// Between two looks at what both ends say of themselves.
const SAMPLE: Nanos = 5 * MS;
/// How long everything may take to come to rest once nothing is wrong any more.
const REST: Nanos = 120_000 * MS;

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
    fallen: Option<Option<Vec<u64>>>,
    /// Highest record that a source was told is durable.
    acked: u64,
    next_sample: Nanos,
    verbose: bool,
    pub(crate) restarts: u64,
}

/// Plays the seed.
///
/// # Errors
/// What was found to be wrong; the same seed finds it again.
pub fn run(plan: Plan, verbose: bool) -> Result<Report, Failure> {
    let mut run = Run::new(plan, verbose);
    let result = run.play();
    let at = run.stage.world.now();
    run.print_log();
    match result {
        Ok(()) => Ok(Report {
            requests: run.host.issued,
            records: run.tap.entries.len() as u64,
            points: run.points,
            time: at,
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
    fn new(plan: Plan, verbose: bool) -> Self {
        let mut rng = Rng::new(plan.seed);
        let world = World::new(rng.next_u64(), plan.world.clone());
        let contents: Vec<_> =
            plan.setup.disks.iter().enumerate().map(|(disk, size)| content(*size, disk, &mut rng)).collect();
        let stage = Stage::new(world, rng.fork(), plan.setup.clone(), &contents);
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
            acked: 0,
            next_sample: 0,
            verbose,
            restarts: 0,
            plan,
        }
    }

    fn play(&mut self) -> Result<(), String> {
        self.stage.start_target();
        self.stage.start_source();
        let begun = self.stage.world.now();
        let end = begun + self.plan.length;
        let mut mends: BTreeMap<Nanos, Fault> = BTreeMap::new();
        for (at, fault) in self.plan.faults.clone() {
            self.until(begun + at, &mut mends)?;
            self.say(&format!("{fault:?}"));
            let now = self.stage.world.now();
            match &fault {
                Fault::Source { power, down } if self.stage.source.is_some() => {
                    self.fell_source(*power)?;
                    mends.insert(now + down, fault);
                }
                Fault::Target { power, down } if self.stage.target.is_some() => {
                    self.fell_target(*power)?;
                    mends.insert(now + down, fault);
                }
                Fault::Cut => {
                    self.stage.cut_link();
                }
                Fault::Sever(time) => {
                    self.stage.severed = true;
                    self.stage.cut_link();
                    mends.insert(now + time, fault);
                }
                Fault::Partition(time) => {
                    self.stage.world.partition(self.stage.source_node, self.stage.target_node, true);
                    mends.insert(now + time, fault);
                }
                Fault::Upgrade { down } if self.stage.source.is_some() && self.stage.protected => {
                    self.upgrade(&mut mends)?;
                    let down = *down;
                    mends.insert(self.stage.world.now() + down, Fault::Source { power: false, down });
                }
                Fault::Look => self.look()?,
                Fault::Source { .. } | Fault::Target { .. } | Fault::Upgrade { .. } => {}
            }
        }
        self.until(end, &mut mends)?;
        match self.plan.ending {
            Ending::Heal => {
                self.mend_all(&mut mends)?;
                self.rest()?;
                self.at_rest()?;
            }
            Ending::Failover { power } => self.fail_over(power, &mut mends)?,
        }
        check::order(self)
    }

    pub(crate) fn say(&mut self, what: &str) {
        self.print_log();
        if self.verbose {
            println!("{:>10.3} ms  {what}", self.stage.world.now() as f64 / MS as f64);
        }
    }

    fn print_log(&mut self) {
        let now = self.stage.world.now() as f64 / MS as f64;
        for line in self.stage.log.drain(..) {
            if self.verbose {
                println!("{now:>10.3} ms  {line}");
            }
        }
    }

    /// Lets the world run until then, mending what is due.
    fn until(&mut self, end: Nanos, mends: &mut BTreeMap<Nanos, Fault>) -> Result<(), String> {
        loop {
            let next = mends.keys().next().map_or(end, |at| end.min(*at));
            while self.step(next)? {}
            let Some(due) = mends.first_entry().filter(|due| *due.key() <= end) else { return Ok(()) };
            let fault = due.remove();
            self.mend(&fault);
        }
    }

    fn mend(&mut self, fault: &Fault) {
        self.say(&format!("mended: {fault:?}"));
        match fault {
            Fault::Source { .. } if self.stage.source.is_none() => self.stage.start_source(),
            Fault::Target { .. } if self.stage.target.is_none() => self.stage.start_target(),
            Fault::Sever(_) => self.stage.severed = false,
            Fault::Partition(_) => {
                self.stage.world.partition(self.stage.source_node, self.stage.target_node, false);
            }
            _ => {}
        }
    }

    fn mend_all(&mut self, mends: &mut BTreeMap<Nanos, Fault>) -> Result<(), String> {
        while let Some((_, fault)) = mends.pop_first() {
            self.mend(&fault);
        }
        Ok(())
    }

    /// One thing of the world happens; false when it is `end`.
    pub(crate) fn step(&mut self, end: Nanos) -> Result<bool, String> {
        let host = if self.stage.protected { self.host.deadline() } else { Nanos::MAX };
        let until = end.min(host).min(self.next_sample);
        let went = self.stage.step(until);
        if self.restarts > 0 && self.stage.ready {
            // At once: what the target lost must be forgotten before a newer writer adds to what it kept.
            check::ends(self)?;
        }
        self.print_log();
        self.watch_source()?;
        if let Some(epoch) = self.epochs.last_mut() {
            self.host.answers(&mut self.stage, &mut epoch.history, false)?;
            self.host.turn(&mut self.stage, &mut epoch.history);
        }
        let now = self.stage.world.now();
        if now >= self.next_sample {
            self.next_sample = now + SAMPLE;
            self.sample()?;
        }
        Ok(went || now < end)
    }

    /// When the source has its disks (again): what it left on them is judged, and a new history begins.
    fn watch_source(&mut self) -> Result<(), String> {
        let life = self.stage.source_lives as usize;
        if !self.stage.protected || self.epochs.len() == life {
            return Ok(());
        }
        let images: Vec<_> = (0..self.plan.setup.disks.len()).map(|disk| self.source_disk(disk)).collect();
        if let Some(epoch) = self.epochs.last() {
            for (disk, image) in images.iter().enumerate() {
                let judged = match self.fallen.take().flatten() {
                    None => epoch.history.judge(&[(disk, image)], u64::MAX),
                    // Not flushed in this life: it may have lost what lives before it wrote, too.
                    Some(flushed) if flushed[disk] == 0 && self.epochs.len() > 1 => {
                        self.fallen = Some(Some(flushed));
                        Ok(())
                    }
                    Some(flushed) => {
                        let judged = epoch.history.judge_power_loss(disk, image, flushed[disk]);
                        self.fallen = Some(Some(flushed));
                        judged
                    }
                };
                judged.map_err(|v| format!("the source's disk after its restart: {v}"))?;
            }
        }
        self.fallen = None;
        // Before the first: content of the begin has ids 1 to 3, and no life was judged.
        let next_id = self.epochs.last().map_or(16, |e| e.history.next_id());
        while self.epochs.len() < life {
            let searched = self.tap.entries.keys().next_back().copied().unwrap_or(0);
            self.epochs.push(Epoch {
                history: History::new(images.clone(), next_id),
                matched: BTreeMap::new(),
                searched,
            });
        }
        Ok(())
    }

    pub(crate) fn source_disk(&self, disk: usize) -> Vec<u8> {
        self.stage.world.file(self.stage.source_node, &disk_path(disk)).expect("the source's disks are never removed")
    }

    fn fell_source(&mut self, power: bool) -> Result<(), String> {
        self.sample()?;
        // A life that never got its disks leaves the judgement of the one before as it is; a power loss outweighs.
        if self.fallen.is_none() || power {
            let flushed = match &self.fallen {
                Some(Some(flushed)) => flushed.clone(),
                _ => self.host.flushed.clone(),
            };
            self.fallen = Some(power.then_some(flushed));
        }
        self.host.abandoned();
        self.stage.stop_source(power);
        Ok(())
    }

    /// The source stops cleanly. Requests that had begun are answered first.
    fn upgrade(&mut self, mends: &mut BTreeMap<Nanos, Fault>) -> Result<(), String> {
        self.sample()?;
        self.stage.end_source();
        let limit = self.stage.world.now() + REST;
        while !self.stage.source_ended() {
            let now = self.stage.world.now();
            if now >= limit {
                return Err(format!("the source does not stop: {:#?}", self.stage.group()));
            }
            self.until(now + SAMPLE, mends)?;
        }
        if self.host.pending() > 0 {
            return Err(format!("{} requests are not answered by a clean stop", self.host.pending()));
        }
        self.fallen.get_or_insert(None);
        self.host.abandoned();
        self.stage.stop_source(false);
        Ok(())
    }

    fn fell_target(&mut self, power: bool) -> Result<(), String> {
        self.sample()?;
        self.restarts += 1;
        self.stage.stop_target(power);
        Ok(())
    }

    /// What both ends say of themselves, against each other and against what is known.
    fn sample(&mut self) -> Result<(), String> {
        check::ends(self)?;
        self.acked = self.acked.max(self.stage.acked().unwrap_or(0));
        Ok(())
    }

    /// The target has recovered: what it holds must be all that was acknowledged.
    pub(crate) fn recovered(&mut self, durable: u64) -> Result<(), String> {
        self.tap.restart(durable);
        for epoch in &mut self.epochs {
            epoch.matched.retain(|_, seq| *seq <= durable);
            epoch.searched = epoch.searched.min(durable);
        }
        if durable < self.acked {
            return Err(format!("record {} was acknowledged, but after a restart {durable} is the newest", self.acked));
        }
        Ok(())
    }

    fn look(&mut self) -> Result<(), String> {
        let Some(stream) = self.stage.stream() else { return Ok(()) };
        check::ends(self)?;
        for seq in check::choose(self, stream.stream, 2) {
            check::point(self, seq, 0)?;
        }
        Ok(())
    }

    /// Everything is mended and the host is quiet: until both ends say that they agree.
    fn rest(&mut self) -> Result<(), String> {
        self.host.quiet = true;
        let limit = self.stage.world.now() + REST;
        if self.stage.source.is_none() {
            self.stage.start_source();
        }
        if self.stage.target.is_none() {
            self.stage.start_target();
        }
        loop {
            let until = (self.stage.world.now() + SAMPLE).min(limit);
            while self.step(until)? {}
            if self.host.pending() == 0 && self.stage.settled() {
                return Ok(());
            }
            if self.stage.world.now() >= limit {
                return Err(format!(
                    "does not come to rest: {} requests unanswered; {:#?}; {:#?}",
                    self.host.pending(),
                    self.stage.group(),
                    self.stage.stream()
                ));
            }
        }
    }

    fn at_rest(&mut self) -> Result<(), String> {
        self.say("at rest");
        check::ends(self)?;
        let latest = self.latest()?;
        let images = check::point(self, latest, u64::MAX)?;
        for (disk, image) in &images {
            if *image != self.source_disk(*disk) {
                return Err(format!(
                    "disk {disk}: the newest point, record {latest}, is not what the source's disk holds"
                ));
            }
        }
        if images.len() != self.plan.setup.disks.len() {
            return Err(format!("the newest point holds {} disks", images.len()));
        }
        self.some_points(8)?;
        let power = self.rng.chance(0.5);
        self.say(if power { "the target loses power at rest" } else { "the target is killed at rest" });
        self.restart_target(power)?;
        self.some_points(8)?;
        let again = self.latest()?;
        if again < latest {
            return Err(format!("the newest point was record {latest}, after a restart it is {again}"));
        }
        check::point(self, again, u64::MAX)?;
        Ok(())
    }

    fn some_points(&mut self, count: usize) -> Result<(), String> {
        for seq in check::choose(self, self.stage.stream, count) {
            check::point(self, seq, 0)?;
        }
        Ok(())
    }

    fn restart_target(&mut self, power: bool) -> Result<(), String> {
        self.fell_target(power)?;
        self.stage.start_target();
        self.target_ready()
    }

    fn target_ready(&mut self) -> Result<(), String> {
        let limit = self.stage.world.now() + REST;
        while !self.stage.ready {
            if !self.step(limit)? {
                return Err("the target does not recover".into());
            }
        }
        check::ends(self)
    }

    fn latest(&mut self) -> Result<u64, String> {
        let stream = self.stage.stream;
        let life = self.stage.target.as_mut().ok_or("no target")?;
        let point =
            life.core.resolve(&mut life.io, stream, Choice::Latest).map_err(|e| format!("no latest point: {e}"))?;
        Ok(point.seq)
    }

    fn fail_over(&mut self, power: bool, mends: &mut BTreeMap<Nanos, Fault>) -> Result<(), String> {
        let promised = self.promised();
        if self.stage.source.is_some() {
            self.fell_source(power)?;
        }
        mends.retain(|_, fault| !matches!(fault, Fault::Source { .. }));
        self.say(&format!("failover; promised is all up to tick {promised:?}"));
        if self.rng.chance(0.3) && self.stage.target.is_some() {
            let power = self.rng.chance(0.5);
            self.restart_target(power)?;
        }
        self.mend_all(mends)?;
        if self.stage.target.is_none() {
            self.stage.start_target();
        }
        if !self.stage.known() {
            return Ok(()); // The source died before it had said a word.
        }
        self.target_ready()?;
        let settle = self.stage.world.now() + self.rng.between(1, 300) * MS;
        while self.step(settle)? {}
        let Ok(latest) = self.latest() else { return Ok(()) }; // It died before the first synchronisation had ended.
        let fences = self.rng.chance(0.8);
        let stream = self.stage.stream;
        if fences {
            let life = self.stage.target.as_mut().ok_or("no target")?;
            let raised = life.core.raise_generation(&mut life.io, stream, &[], "failover");
            let generation = raised.map_err(|e| format!("cannot raise the generation: {e}"))?;
            if generation <= self.stage.generation {
                return Err(format!("the generation was raised to {generation}"));
            }
        }
        check::point(self, latest, promised.unwrap_or(0))?;
        self.write_to_view(latest)?;
        self.some_points(3)?;
        if fences { self.source_is_fenced() } else { Ok(()) }
    }

    /// The tick up to which everything answered will be in the newest point: now less the RPO that the source reports.
    /// Nothing is promised while the source has not been complete in its present life.
    fn promised(&mut self) -> Option<u64> {
        let group = self.stage.group()?;
        let epoch = self.epochs.last()?;
        (self.stage.protected && self.complete_in(self.epochs.len() - 1))
            .then(|| epoch.history.tick_at(self.stage.world.now().saturating_sub(group.rpo_now + 1)))
    }

    /// Every disk has been complete within this life of the source, as the journal says.
    pub(crate) fn complete_in(&self, epoch: usize) -> bool {
        let Some(stream) = self.stage.stream() else { return false };
        let Some(newest) = stream.newest else { return false };
        let writer = self.tap.entries.get(&newest).and_then(|e| self.writers.get(&e.incarnation));
        writer == Some(&epoch)
    }

    /// The newest point takes writes, which are durable when flushed, whatever happens to the target.
    fn write_to_view(&mut self, seq: u64) -> Result<(), String> {
        let config = ViewConfig {
            name: "taken-over".into(),
            stream: self.stage.stream,
            seq,
            disks: None,
            writable: true,
            kind: TimelineKind::Failover,
            reason: "the source is lost".into(),
        };
        let exports = check::open_view(self, &config)?;
        let mut images = Vec::new();
        for (_, key, size) in &exports {
            let image = check::read_disk(self, *key, *size)?;
            images.push(image.ok_or("the target died while nothing was wrong")?);
        }
        let mut history = History::new(images, 1 << 32);
        for _ in 0..self.rng.between(1, 60) {
            let disk = self.rng.below(exports.len() as u64) as usize;
            let (_, key, size) = exports[disk];
            let offset = self.rng.below(size / 512) * 512;
            let len = (self.rng.between(1, 64) * 512).min(size - offset).min(512 * 1024 - offset % (512 * 1024));
            let now = self.stage.world.now();
            let id = history.issue(disk, Effect::Write, offset, len, now);
            let data = (offset..offset + len).map(|at| pattern(id, at)).collect::<Vec<_>>();
            check::write_view(self, key, offset, &data)?;
            history.answer(id, self.stage.world.now(), false);
        }
        for (_, key, _) in &exports {
            check::flush_view(self, *key)?;
        }
        let judge = |run: &mut Self, exports: &[(DiskId, _, u64)]| -> Result<(), String> {
            for (disk, (_, key, size)) in exports.iter().enumerate() {
                let image = check::read_disk(run, *key, *size)?.ok_or("the target died while nothing was wrong")?;
                let judged = history.judge(&[(disk, &image)], u64::MAX);
                judged.map_err(|v| format!("what was written to the view: {v}"))?;
            }
            Ok(())
        };
        judge(self, &exports)?;
        let power = self.rng.chance(0.5);
        self.say(if power { "the target loses power after the failover" } else { "the target is killed after it" });
        self.restart_target(power)?;
        let exports = check::open_view(self, &config)?;
        judge(self, &exports)
    }

    /// The lost source comes back, and must learn that it is fenced.
    fn source_is_fenced(&mut self) -> Result<(), String> {
        self.say("the source comes back");
        self.host.quiet = true;
        self.stage.severed = false;
        self.stage.start_source();
        let limit = self.stage.world.now() + REST;
        loop {
            let until = (self.stage.world.now() + SAMPLE).min(limit);
            while self.step(until)? {}
            if let Some(group) = self.stage.group()
                && matches!(group.state, GroupState::Fenced { .. })
            {
                return Ok(());
            }
            if self.stage.world.now() >= limit {
                return Err(format!("the source does not learn that it is fenced: {:#?}", self.stage.group()));
            }
        }
    }

    /// Now, as the source's node has it.
    pub(crate) fn now(&self) -> Nanos {
        self.stage.source.as_ref().map_or_else(|| self.stage.world.now(), |life| life.io.now())
    }
}
