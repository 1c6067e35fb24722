//! Bounds that hold all the time: on the wait of a host, on memory, on the time between cuts, on what folding may take.

use afterimage_dataplane::io::Nanos;
use afterimage_dataplane::source::{GroupState, GroupStatus, Rung};
use afterimage_dataplane::target::{StreamState, StreamStatus};

use crate::front::Front;
use crate::plan::{Fault, Moment};
use crate::run::{MS, Run};
use crate::trouble::Happened;

/// Longest wait of a request while nothing is wrong with the disk below: many that overlap, one behind the other, each
/// with its reads, its intent bit and its wait for room.
const STALL: Nanos = 3_000 * MS;
/// Beyond the queue's limit: marks take no room before they are there, and a sealed frame takes a whole buffer, of up to
/// four times what its records took, as does one that is read back from the spill.
const QUEUE_SLACK: usize = (4 << 20) + (64 << 10);
/// What a cut may be late.
const CUT_SLACK: Nanos = 500 * MS;
/// How much older than its newest record a frame's time may be.
const FRAME_SLACK: Nanos = 2_000 * MS;

/// What has been seen so far.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// The source's disk and process are as they should be since then, time of the world.
    calm_at: Nanos,
    /// Life of the source, newest cut, and since when.
    cut: (u64, u64, Nanos),
    /// Newest complete point.
    newest: Option<u64>,
    /// The floor that was checked last.
    floor: u64,
    /// The source was stopped cleanly before its present life, and nothing has happened to make it synchronise.
    pub(crate) clean_start: bool,
    /// The source is being stopped: how long it stays down, and whether somebody writes to its disks then.
    pub(crate) stop: Option<(Nanos, bool)>,
    /// What goes wrong after a moment, and how long after it.
    pub(crate) armed: Vec<(Moment, Nanos, Fault)>,
    /// As of the last look.
    pub(crate) happened: Happened,
}

impl Watch {
    /// Whatever waits now may wait until then, and as long again as it may without reason.
    pub(crate) fn calm(&mut self, at: Nanos) {
        self.calm_at = self.calm_at.max(at);
        self.cut.2 = self.cut.2.max(at);
    }

    /// Nothing since has kept what is under way from its end.
    pub(crate) fn is_calm(&self, since: Nanos) -> bool {
        self.calm_at < since
    }

    /// The target lost what it had: what it says next is new.
    pub(crate) fn forget_points(&mut self) {
        self.newest = None;
    }
}

impl Run {
    /// Checks them all.
    pub(crate) fn limits(&mut self, group: Option<&GroupStatus>, stream: Option<&StreamStatus>) -> Result<(), String> {
        let now = self.stage.world.now();
        if group.is_some_and(|group| group.held.is_some()) {
            self.watch.calm(now);
        }
        // Whoever waits behind a write that hangs waits as long as it does, whenever it was begun.
        self.watch.calm(self.stage.world.hangs_until(self.stage.source_node));
        if let Some(oldest) = self.host.oldest()
            && now > oldest.max(self.watch.calm_at) + STALL + self.plan.setup.sync_deadline
            && !self.stage.still[0]
            && !self.stage.hold
            // A front end that is being shut lets go of hosts whose requests it has not taken.
            && !(self.stage.stopping && self.plan.setup.front != Front::Direct)
            // Who has been fenced holds everything, also what it had taken before it learned of it.
            && group.is_none_or(|group| group.held.is_none())
        {
            let waits = (now - oldest) / MS;
            return Err(format!("a request has waited for {waits} ms; {group:#?}"));
        }
        if self.stage.shuts_out() && now > self.watch.calm_at + STALL {
            return Err("a host is not let in".into());
        }
        if let Some(group) = group {
            if group.queue_bytes > group.queue_limit + QUEUE_SLACK {
                return Err(format!("the queue holds {} bytes of {}", group.queue_bytes, group.queue_limit));
            }
            self.clean_start(group)?;
            self.cuts(group, now)?;
        }
        let Some(stream) = stream else { return Ok(()) };
        if let StreamState::Failed(why) = &stream.state {
            self.stage.sick.get_or_insert_with(|| why.clone());
        }
        self.points_stay(stream)
    }

    /// After a clean stop no disk owes anything.
    fn clean_start(&mut self, group: &GroupStatus) -> Result<(), String> {
        if !self.watch.clean_start || !self.stage.protected {
            return Ok(());
        }
        // Where one disk is fenced the others go on without it, as another writer: for them that is a beginning.
        if group.disks.iter().any(|disk| disk.out.is_some()) {
            self.watch.clean_start = false;
            return Ok(());
        }
        if self.stage.syncs_begun > 0 && group.uncaptured == 0 {
            return Err("the source was stopped cleanly, and synchronises when it is started".into());
        }
        if group.uncaptured > 0 || group.state == GroupState::Protected {
            self.watch.clean_start = false;
        }
        Ok(())
    }

    fn cuts(&mut self, group: &GroupStatus, now: Nanos) -> Result<(), String> {
        let (life, cut, since) = self.watch.cut;
        let working = self.stage.takes_requests()
            && group.rung != Rung::Dirty
            && !matches!(group.state, GroupState::Opening | GroupState::Stopping | GroupState::Fenced { .. });
        if !working || life != self.stage.source_lives || cut != group.cut {
            self.watch.cut = (self.stage.source_lives, group.cut, since.max(now));
        } else if now > since + 2 * self.plan.setup.cut_interval + CUT_SLACK {
            return Err(format!("cut {cut} is the newest since {} ms", (now - since) / MS));
        }
        Ok(())
    }

    /// The newest complete point stays; what is younger than the retention stays.
    fn points_stay(&mut self, stream: &StreamStatus) -> Result<(), String> {
        if self.robbed {
            return Ok(());
        }
        if let Some(before) = self.watch.newest
            && stream.newest.is_none_or(|newest| newest < before)
            // A start that could not read some of it says so, and has the whole sent again.
            && !(self.reads_failed && stream.damage.iter().any(|damage| !damage.known))
        {
            return Err(format!("record {before} was the newest complete point, now it is {:?}", stream.newest));
        }
        self.watch.newest = stream.newest;
        let raised = stream.floor != std::mem::replace(&mut self.watch.floor, stream.floor);
        if raised && stream.shortened.is_none() && self.tap.entries.contains_key(&stream.floor) {
            // Time passes within each life of a writer.
            let mut age = 0;
            let mut last: Option<(_, Nanos)> = None;
            for entry in self.tap.entries.range(stream.floor..).map(|(_, entry)| entry) {
                if let Some((writer, mono)) = last
                    && writer == entry.incarnation
                {
                    age += entry.record.mono_ns.saturating_sub(mono);
                }
                last = Some((entry.incarnation, entry.record.mono_ns));
            }
            if age + FRAME_SLACK < self.plan.setup.retention {
                let (floor, kept) = (stream.floor, self.plan.setup.retention / MS);
                return Err(format!("record {floor} is folded at an age of {} ms; {kept} ms are to be kept", age / MS));
            }
        }
        Ok(())
    }
}
