//! A failover as the coordinator does it: its decisions are the real ones ([`afterimage_controlplane::failover`]), what it
//! tells the proxies is done on the stage, and it dies between any two steps and goes on from what it had recorded.

use afterimage_controlplane::failover::{
    Action, Choice, FAILOVER_VIEW, Failover, FenceKind, Reply, Side, Spec, State, Verb,
};
use afterimage_controlplane::objects::{Group, GroupPhase};
use afterimage_dataplane::io::{Io, Nanos};
use afterimage_dataplane::target::{self, ViewConfig};
use afterimage_wire::timeline::TimelineKind;
use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;

use crate::check;
use crate::front::Front;
use crate::run::{MS, Run};
use crate::stage::disk_id;

/// How long a planned failover waits for what is still to come, milliseconds.
const PLANNED_MS: u64 = 3_000;
/// A journal's budget that no run uses up, bytes.
const ROOM: u64 = 1 << 30;
/// Most steps of one operation, those of a coordinator that died counted again.
const MOST_STEPS: usize = 100;

fn error(message: impl Into<String>) -> Reply {
    Reply::Answer(Outcome::Error(v1::CommandError { kind: 1, message: message.into() }))
}

impl Run {
    fn group_object(&self, generation: u64) -> Group {
        Group {
            uid: self.stage.stream.to_string(),
            tenant: "default".into(),
            id: "group".into(),
            version: 1,
            created_ns: 0,
            updated_ns: 0,
            description: String::new(),
            policy: "gold".into(),
            source: "source".into(),
            target: "target".into(),
            key: "key".into(),
            generation,
            writer_generation: generation,
            next_slot: self.plan.setup.disks.len() as u16,
            phase: GroupPhase::FailingOver { operation: "failover".into() },
            hold: false,
            complete: true,
            request_id: String::new(),
            placement: String::new(),
            reverse: None,
            overwritten: false,
            leftovers: Vec::new(),
            older_keys: Vec::new(),
            next_key: String::new(),
            pause: None,
        }
    }

    /// Plays a failover to its end; whatever the plan still has in store goes on beside it.
    pub(crate) fn coordinate(&mut self) -> Result<(), String> {
        let lease = self.plan.setup.lease;
        if lease > 0 && self.rng.chance(0.5) {
            self.cut_off(true);
        }
        let unconfirmed = lease == 0 && self.stage.source.is_none() || self.rng.chance(0.2);
        let mut spec = Spec { unconfirmed, reason: "tested".into(), ..Spec::new(Verb::Failover, Choice::Latest) };
        if lease == 0 && !unconfirmed && self.rng.chance(0.4) {
            spec = Spec { within_ms: PLANNED_MS, ..Spec::new(Verb::PlannedFailover, Choice::Latest) };
        }
        let mut group = self.group_object(self.stage.generation);
        let work = Failover::new(spec, &[], (FAILOVER_VIEW, ""), 0, lease / MS, "fits".into(), 1);
        let (work, answered) = self.operate(work, &mut group)?;
        match work.state {
            State::Done => self.taken_over(&work, answered)?,
            State::Failed => return self.goes_on(&group),
            State::Running | State::Undoing => return Err(format!("the failover has ended as {:?}", work.state)),
        }
        if self.rng.chance(0.5) {
            return Ok(());
        }
        // And back: what the hosts had been answered is in the source's disks, and comes over without all of them.
        group.phase = GroupPhase::Changing { operation: "undo".into(), view: FAILOVER_VIEW.into() };
        let spec = Spec { discard: self.rng.chance(0.5), ..Spec::new(Verb::UndoFailover, Choice::Latest) };
        let work = Failover::new(spec, &[], ("", FAILOVER_VIEW), 0, 0, "fits".into(), 1);
        let (work, _) = self.operate(work, &mut group)?;
        if work.state != State::Done || group.phase != GroupPhase::Protecting || group.hold {
            return Err(format!("the failover cannot be undone: {work:#?}"));
        }
        self.goes_on(&group)
    }

    /// Plays an operation to its end. With a source that holds all I/O: how many answers it had given by then, and in which
    /// of its lives.
    fn operate(&mut self, mut work: Failover, group: &mut Group) -> Result<(Failover, Option<(u64, u64)>), String> {
        let disks: Vec<(String, String)> =
            (0..self.plan.setup.disks.len()).map(|d| (disk_id(d).to_string(), format!("disk{d}"))).collect();
        work.facts.disks = disks.iter().map(|(uid, _)| uid.clone()).collect();
        let (mut answered, mut waited) = (None, false);
        for step in 0.. {
            if step == MOST_STEPS {
                return Err(format!("the operation does not end: {work:#?}"));
            }
            let now = self.stage.world.now();
            let action = work.begin(group, now);
            // Recorded from here on; whoever goes on begins with what was.
            let recorded = serde_json::to_string(&(&work, &*group)).map_err(|e| e.to_string())?;
            let (before, after) = (self.rng.chance(0.1), self.rng.chance(0.1));
            self.stage.hold = group.hold;
            if before {
                self.say("the coordinator dies before it acts");
                (work, *group) = serde_json::from_str(&recorded).map_err(|e| e.to_string())?;
                continue;
            }
            let reply = match action {
                Action::Ended => break,
                Action::Record => Reply::Nothing,
                Action::Machines(_) => unreachable!("groups of the simulator have no machines"),
                Action::Wait { ms } => {
                    let until = self.stage.world.now() + ms * MS;
                    self.until(until)?;
                    waited = true;
                    Reply::Nothing
                }
                Action::CatchUp { within_ms, .. } => match self.stage.group().map(|group| group.captured_seq) {
                    Some(seq) => match self.drain(seq, within_ms)? {
                        Reply::Drained(held) => Reply::CaughtUp(seq.saturating_sub(held)),
                        other => other,
                    },
                    None => Reply::Unreachable("it has not reported how far it is".into()),
                },
                Action::Drain { seq, within_ms, .. } => self.drain(seq, within_ms)?,
                // Of failbacks, which are not played here.
                Action::Merge(_) | Action::Await { .. } => {
                    return Err(format!("no verb that is played here does that: {action:?}"));
                }
                Action::Tell { side, command, connect_ms, answer_ms } => {
                    self.say(&format!("the coordinator tells the {side:?}: {command:?}"));
                    self.tell(side, command, connect_ms, answer_ms)?
                }
            };
            if work.facts.fence == Some(FenceKind::SelfFenced) && waited && self.silent_at.is_none() {
                return Err("the lease is waited for, and nothing was fenced".into());
            }
            if after {
                self.say("the coordinator dies before it has recorded what came of it");
                (work, *group) = serde_json::from_str(&recorded).map_err(|e| e.to_string())?;
                continue;
            }
            work.apply(group, &disks, reply, self.stage.world.now());
            self.stage.hold = group.hold;
            if work.facts.fence == Some(FenceKind::Confirmed) && answered.is_none() {
                answered = Some((self.host.answered, self.stage.source_lives));
            }
        }
        self.say(&format!("{} has ended: {:?}, {:?}", work.spec.verb.as_str(), work.state, work.error));
        Ok((work, answered))
    }

    /// The source writes again, under the generation that it was given back: the desired state reaches it.
    fn goes_on(&mut self, group: &Group) -> Result<(), String> {
        self.silent_at = None;
        self.stage.deposed = false;
        self.stage.hold = group.hold;
        if self.stage.cut_off {
            self.cut_off(false);
        }
        let generation = group.writer_generation;
        if self.stage.generation != generation && self.stage.source.is_some() {
            match self.rng.below(4) {
                // A process that learns of it at its start; one that runs; one that has begun to connect as it was.
                0 => self.fell_source(false)?,
                1 => self.stage.give_generation(generation),
                _ => {
                    self.fell_source(false)?;
                    self.stage.start_source();
                    let limit = self.stage.world.now() + 10_000 * MS;
                    while !self.stage.protected && self.stage.world.now() < limit {
                        let until = self.stage.world.now() + MS / 4;
                        self.until(until)?;
                    }
                    let until = self.stage.world.now() + self.rng.between(0, 12) * MS / 4;
                    self.until(until)?;
                    self.stage.give_generation(generation);
                }
            }
        }
        self.stage.generation = generation;
        self.mend_all()?;
        // What was written meanwhile may be more than the journal may hold beside the newest complete point: the stream stops
        // then, says so, and waits for room.
        if self.stage.setup.budget_bytes < ROOM {
            self.stage.setup.budget_bytes = ROOM;
            self.fell_target(false)?;
        }
        if self.stage.target.is_none() {
            self.stage.start_target();
        }
        self.target_ready()?;
        self.stage.converge();
        self.watch.calm(self.stage.world.now());
        self.rest()?;
        self.at_rest()
    }

    /// The group runs from the view: nothing answered may be missing if the source held everything.
    fn taken_over(&mut self, work: &Failover, answered: Option<(u64, u64)>) -> Result<(), String> {
        let point = work.facts.point.as_ref().ok_or("a failover without a point is done")?;
        if let Some((answered, life)) = answered
            && life == self.stage.source_lives
            && self.host.answered != answered
            // Behind a front end an answer may have been on its way.
            && self.plan.setup.front == Front::Direct
        {
            let more = self.host.answered - answered;
            return Err(format!("a source that holds all I/O has given {more} answers"));
        }
        let drained = work.facts.last_seq.is_some_and(|last| point.seq >= last);
        if work.spec.verb == Verb::PlannedFailover && !drained {
            return Err(format!("a planned failover took record {} of {:?}", point.seq, work.facts.last_seq));
        }
        let floor = match self.claimed {
            _ if self.robbed => 0,
            _ if answered.is_some() && drained => u64::MAX,
            Some(tick) if work.facts.zero_loss => tick,
            _ => 0,
        };
        if self.stage.cut_off {
            self.cut_off(false);
        }
        self.mend_without_source()?;
        self.target_ready()?;
        check::point(self, point.seq, floor)?;
        let generation = work.facts.generation;
        let fenced = self.stage.stream().is_some_and(|s| s.disks.iter().all(|disk| disk.generation >= generation));
        if generation <= 1 || !fenced {
            return Err(format!("the failover is done, and the disks are not at generation {generation}"));
        }
        self.stage.hold = true;
        self.source_is_fenced()
    }

    fn drain(&mut self, seq: u64, within_ms: u64) -> Result<Reply, String> {
        let limit = self.stage.world.now() + within_ms * MS;
        loop {
            let held = self.stage.stream().map_or(0, |stream| stream.durable_seq);
            if held >= seq || self.stage.world.now() >= limit {
                return Ok(Reply::Drained(held));
            }
            let until = (self.stage.world.now() + MS).min(limit);
            self.until(until)?;
        }
    }

    /// A command reaches a proxy, if it lives within the time.
    fn tell(&mut self, side: Side, command: Tell, connect_ms: u64, answer_ms: u64) -> Result<Reply, String> {
        let limit = self.stage.world.now() + connect_ms * MS;
        loop {
            let lives = match side {
                Side::Source => {
                    let stage = &self.stage;
                    stage.source.is_some() && stage.protected && !stage.still[0] && !stage.cut_off
                }
                Side::Target => self.stage.target.is_some() && !self.stage.still[1],
            };
            if lives {
                break;
            }
            if self.stage.world.now() >= limit {
                return Ok(Reply::Unreachable("it is not connected".into()));
            }
            let until = (self.stage.world.now() + MS).min(limit);
            self.until(until)?;
        }
        let arrives = self.stage.world.now() + self.rng.between(1, 20) * MS / 4;
        self.until(arrives)?;
        let reply = match side {
            Side::Source => self.source_does(&command),
            Side::Target => self.target_does(&command, answer_ms)?,
        };
        let comes_back: Nanos = self.stage.world.now() + self.rng.between(1, 20) * MS / 4;
        self.until(comes_back)?;
        Ok(reply)
    }

    fn source_does(&mut self, command: &Tell) -> Reply {
        let stream = self.stage.stream;
        let Some(life) = self.stage.source.as_mut() else { return Reply::Unreachable("it has died".into()) };
        match command {
            Tell::Fence(said) => {
                life.core.fence(&mut life.io, stream, said.hold);
                let status = life.core.status(life.io.now());
                self.stage.world.wake(self.stage.source_node);
                match (status.first(), said.hold) {
                    (Some(group), true) => Reply::Answer(Outcome::Fenced(v1::Fenced { last_seq: group.captured_seq })),
                    (Some(_), false) => Reply::Answer(Outcome::Done(v1::Done {})),
                    (None, _) => error("the stream is not protected from here"),
                }
            }
            other => error(format!("{other:?} is not for a source")),
        }
    }

    fn target_does(&mut self, command: &Tell, answer_ms: u64) -> Result<Reply, String> {
        // What a proxy does while its stream is being recovered: it waits a little.
        let limit = self.stage.world.now() + (answer_ms * MS).min(10_000 * MS);
        while !self.stage.ready && self.stage.world.now() < limit {
            let until = (self.stage.world.now() + MS).min(limit);
            self.until(until)?;
        }
        let stream = self.stage.stream;
        let Some(life) = self.stage.target.as_mut().filter(|_| self.stage.ready) else {
            return Ok(Reply::Unreachable("it has died".into()));
        };
        let reply = match command {
            Tell::RaiseGeneration(said) => {
                let zero_loss = life.core.zero_loss(stream, life.io.since_boot());
                let status = life.core.status();
                let held = status.first().and_then(|s| s.disks.iter().map(|disk| disk.generation).min());
                let mut held = held.unwrap_or(0);
                let mut failed = None;
                while held < said.at_least && failed.is_none() {
                    match life.core.raise_generation(&mut life.io, stream, &[], &said.reason) {
                        Ok(raised) => held = raised,
                        Err(why) => failed = Some(why.to_string()),
                    }
                }
                match failed {
                    Some(why) => error(why),
                    None => {
                        self.fenced_now();
                        let tick = self.epochs.last().map_or(0, |epoch| epoch.history.tick() + 1);
                        self.claimed = zero_loss.then_some(tick);
                        Reply::Answer(Outcome::Generation(v1::GenerationRaised { generation: held, zero_loss }))
                    }
                }
            }
            Tell::ResolvePoint(_) => match life.core.resolve(&mut life.io, stream, target::Choice::Latest) {
                Ok(point) => Reply::Answer(Outcome::Point(v1::Point {
                    seq: point.seq,
                    disks: point.disks.iter().map(ToString::to_string).collect(),
                    ..v1::Point::default()
                })),
                Err(why) => error(why.to_string()),
            },
            Tell::OpenView(said) => {
                let config = ViewConfig {
                    name: said.view.replace('/', "-"),
                    stream,
                    seq: said.seq,
                    disks: None,
                    writable: true,
                    kind: TimelineKind::Failover,
                    reason: said.reason.clone(),
                };
                match life.core.open_view(&mut life.io, config) {
                    Ok(exports) => {
                        let export = |e: &afterimage_dataplane::host::Export| v1::ViewExport {
                            disk: e.name.clone(),
                            disk_uid: e.name.clone(),
                            ..v1::ViewExport::default()
                        };
                        Reply::Answer(Outcome::View(v1::ViewOpened { exports: exports.iter().map(export).collect() }))
                    }
                    Err(why) => error(why.to_string()),
                }
            }
            Tell::CloseView(said) => {
                match life.core.close_view(&mut life.io, &said.view.replace('/', "-"), said.keep_delta) {
                    Ok(()) => Reply::Answer(Outcome::Done(v1::Done {})),
                    Err(why) => error(why.to_string()),
                }
            }
            other => error(format!("{other:?} is not for a target")),
        };
        self.stage.world.wake(self.stage.target_node);
        Ok(reply)
    }
}
