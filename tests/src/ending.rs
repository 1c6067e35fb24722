//! How a run ends: at rest, with both ends the same; in a failover; or with a fence under a source that works.

use afterimage_dataplane::io::Nanos;
use afterimage_dataplane::source::GroupState;
use afterimage_dataplane::target::{Choice, ViewConfig};
use afterimage_wire::ids::DiskId;
use afterimage_wire::timeline::TimelineKind;

use crate::check;
use crate::history::{Effect, HOLE, History, pattern};
use crate::plan::Ending;
use crate::run::{MS, Run, SAMPLE};
use crate::trouble::Mend;

/// How long everything may take to come to rest once nothing is wrong any more.
const REST: Nanos = 120_000 * MS;
/// What a disk had under way when its source stopped has ended.
const SETTLES: Nanos = 100 * MS;

impl Run {
    /// The end.
    pub(crate) fn end(&mut self) -> Result<(), String> {
        match self.plan.ending {
            Ending::Heal => {
                self.mend_all()?;
                self.rest()?;
                if self.robbed {
                    // What is bad in the journal is found by reading it; then the newest state is mended.
                    self.restart_target(false)?;
                    self.rest()?;
                }
                self.at_rest()
            }
            Ending::Failover { power } => self.fail_over(power),
            Ending::Fence => self.fence(),
            Ending::Coordinated if self.stage.known() => self.coordinate(),
            Ending::Coordinated => Ok(()),
        }
    }

    /// Everything is mended and the host is quiet: until both ends say that they agree.
    pub(crate) fn rest(&mut self) -> Result<(), String> {
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
            self.until(until)?;
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

    pub(crate) fn at_rest(&mut self) -> Result<(), String> {
        self.say("at rest");
        check::ends(self)?;
        let latest = self.latest()?;
        let images = check::point(self, latest, u64::MAX)?;
        for check::Image { disk, bytes, holes } in &images {
            let mut disk_now = self.source_disk(*disk);
            for hole in holes {
                let range = *hole as usize..bytes.len().min((*hole + HOLE) as usize);
                disk_now[range.clone()].copy_from_slice(&bytes[range]);
            }
            if *bytes != disk_now {
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
        if self.robbed && self.latest().map_or(true, |now| now < latest) {
            // The loss of power has shown more that is bad, perhaps all there was: it is mended as well.
            self.rest()?;
        }
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

    pub(crate) fn target_ready(&mut self) -> Result<(), String> {
        let limit = self.stage.world.now() + REST;
        while !self.stage.ready {
            let until = (self.stage.world.now() + SAMPLE).min(limit);
            self.until(until)?;
            if self.stage.world.now() >= limit {
                return Err("the target does not recover".into());
            }
        }
        check::ends(self)
    }

    fn latest(&mut self) -> Result<u64, String> {
        // The journal is followed up to it.
        check::ends(self)?;
        let stream = self.stage.stream;
        let life = self.stage.target.as_mut().ok_or("no target")?;
        let point =
            life.core.resolve(&mut life.io, stream, Choice::Latest).map_err(|e| format!("no latest point: {e}"))?;
        Ok(point.seq)
    }

    fn fail_over(&mut self, power: bool) -> Result<(), String> {
        let promised = self.promised();
        if self.stage.source.is_some() {
            self.fell_source(power)?;
        }
        self.say(&format!("failover; promised is all up to tick {promised:?}"));
        // One that was never given a stream has nothing to recover.
        if self.rng.chance(0.3) && self.stage.target.is_some() && self.stage.known() {
            let power = self.rng.chance(0.5);
            self.restart_target(power)?;
        }
        self.mend_without_source()?;
        if !self.stage.known() {
            return Ok(()); // The source died before it had said a word.
        }
        self.target_ready()?;
        let settle = self.stage.world.now() + self.rng.between(1, 300) * MS;
        self.until(settle)?;
        self.target_ready()?;
        let Ok(latest) = self.latest() else { return Ok(()) }; // It died before the first synchronisation had ended.
        let fences = self.rng.chance(0.8);
        if fences {
            self.raise("failover")?;
        }
        check::point(self, latest, promised.unwrap_or(0))?;
        self.write_to_view(latest)?;
        self.some_points(3)?;
        if fences {
            self.say("the source comes back");
            self.source_is_fenced()
        } else {
            Ok(())
        }
    }

    /// As [`Run::mend_all`]; the source stays down.
    pub(crate) fn mend_without_source(&mut self) -> Result<(), String> {
        self.mends.retain(|_, mend| !matches!(mend, Mend::Source | Mend::Scribble | Mend::Strike(_)));
        self.mend_all()?;
        self.mends.retain(|_, mend| !matches!(mend, Mend::Source | Mend::Scribble | Mend::Strike(_)));
        if self.stage.target.is_none() {
            self.stage.start_target();
        }
        Ok(())
    }

    fn raise(&mut self, reason: &str) -> Result<(), String> {
        let stream = self.stage.stream;
        let life = self.stage.target.as_mut().ok_or("no target")?;
        let raised = life.core.raise_generation(&mut life.io, stream, &[], reason);
        let generation = raised.map_err(|e| format!("cannot raise the generation: {e}"))?;
        self.stage.world.wake(self.stage.target_node);
        self.fenced_now();
        if generation <= self.stage.generation {
            return Err(format!("the generation was raised to {generation}"));
        }
        Ok(())
    }

    /// The disks belong to somebody else from now on: a source that keeps to a lease has stopped when it is over.
    pub(crate) fn fenced_now(&mut self) {
        self.stage.deposed = true;
        if self.plan.setup.lease > 0 {
            self.silent_at.get_or_insert(self.stage.world.now() + self.plan.setup.lease);
        }
    }

    /// Nobody but its hosts reaches the source, or everybody does again.
    pub(crate) fn cut_off(&mut self, on: bool) {
        self.say(if on { "the source is cut off" } else { "the source can be reached again" });
        (self.stage.cut_off, self.stage.severed) = (on, on);
        self.stage.world.partition(self.stage.source_node, self.stage.target_node, on);
    }

    /// The lease of a source that is cut off runs out: it does no I/O any more.
    fn source_is_silent(&mut self) -> Result<(), String> {
        let over = self.silent_at.unwrap_or(0).max(self.stage.world.now()) + SETTLES;
        self.until(over)?;
        let images = |run: &Self| (0..run.plan.setup.disks.len()).map(|disk| run.source_disk(disk)).collect::<Vec<_>>();
        let (before, life) = (images(self), self.stage.source_lives);
        let until = self.stage.world.now() + self.rng.between(1, 1000) * MS;
        self.until(until)?;
        if self.watch.is_calm(over) && life == self.stage.source_lives && images(self) != before {
            return Err("a source writes to its disks although its lease has run out".into());
        }
        Ok(())
    }

    /// The target fences a source that goes on working, and learns of it only by being told.
    fn fence(&mut self) -> Result<(), String> {
        self.mend_all()?;
        if self.stage.target.is_none() {
            self.stage.start_target();
        }
        if !self.stage.known() {
            return Ok(());
        }
        self.target_ready()?;
        let cut_off = self.plan.setup.lease > 0 && self.rng.chance(0.7);
        if cut_off {
            self.cut_off(true);
        }
        self.raise("tested")?;
        // What was on its way to the disk may end there, and is not acknowledged.
        let fenced = self.stage.stream().map_or(0, |stream| stream.durable_seq);
        self.say(&format!("the target fences all above record {fenced}"));
        let until = self.stage.world.now() + self.rng.between(1, 1500) * MS;
        self.until(until)?;
        if cut_off {
            self.source_is_silent()?;
            self.cut_off(false);
        }
        self.mend_all()?;
        if let Some(acked) = self.stage.acked().filter(|acked| *acked > fenced) {
            return Err(format!("record {acked} of a fenced source was acknowledged; {fenced} was the newest before"));
        }
        self.target_ready()?;
        if let Ok(latest) = self.latest() {
            check::point(self, latest, 0)?;
            self.some_points(3)?;
        }
        self.source_is_fenced()
    }

    /// The tick up to which everything answered will be in the newest point: now less the RPO that the source reports.
    /// Nothing is promised while the source has not been complete in its present life.
    fn promised(&mut self) -> Option<u64> {
        if self.robbed {
            return None;
        }
        let epoch = self.epochs.last()?;
        if self.stage.zero_loss() {
            return Some(epoch.history.tick() + 1);
        }
        let group = self.stage.group()?;
        (self.stage.protected && self.complete_in(self.epochs.len() - 1))
            .then(|| epoch.history.tick_at(self.now().saturating_sub(group.rpo_now + 1)))
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
        let (mut images, mut lost) = (Vec::new(), Vec::new());
        for (_, key, size) in &exports {
            let image = check::read_disk(self, *key, *size)?;
            let (bytes, holes) = image.ok_or("the target died while nothing was wrong")?;
            images.push(bytes);
            lost.push(holes);
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
                let (image, holes) =
                    check::read_disk(run, *key, *size)?.ok_or("the target died while nothing was wrong")?;
                // A block that could not be read before cannot be read after a write to a part of it: the rest of it is
                // as unknown as it was. Every other block must be there, those written as a whole among them.
                let written = |hole: u64| {
                    let end = (hole + HOLE).min(*size);
                    history.changes(disk).iter().any(|c| c.offset <= hole && end <= c.offset + c.len)
                };
                if let Some(hole) =
                    holes.iter().find(|hole| written(**hole) || !lost[disk].contains(hole) && !run.robbed)
                {
                    return Err(format!(
                        "what was written to the view: disk {disk}: the block at {hole} cannot be read"
                    ));
                }
                let judged = history.judge_but(&[(disk, &image, &holes)], u64::MAX);
                judged.map_err(|v| format!("what was written to the view: {v}"))?;
            }
            Ok(())
        };
        judge(self, &exports)?;
        if self.robbed {
            return Ok(()); // What is bad below the view is found when it is read again.
        }
        let power = self.rng.chance(0.5);
        self.say(if power { "the target loses power after the failover" } else { "the target is killed after it" });
        self.restart_target(power)?;
        let exports = check::open_view(self, &config)?;
        judge(self, &exports)
    }

    /// A source that is there, or comes back, must learn that it is fenced.
    pub(crate) fn source_is_fenced(&mut self) -> Result<(), String> {
        self.host.quiet = true;
        self.stage.severed = false;
        if self.stage.source.is_none() {
            self.stage.start_source();
        }
        let limit = self.stage.world.now() + REST;
        loop {
            let until = (self.stage.world.now() + SAMPLE).min(limit);
            self.until(until)?;
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
}
