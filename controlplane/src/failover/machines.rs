//! The machines of a group within its verbs: switched off at the source before that is fenced, started from the view once
//! that is open, and back.
//!
//! ```text
//! failover          … fence · [power-off] · drain · … · open-view · start-replica · await-replica · finish
//! planned-failover  … catch-up · stop-source · fence · … · open-view · start-replica · await-replica · finish
//!                     failing before a replica runs: [stop-replica] · close-view · return-generation · release · [start-source]
//! undo-failover     check · stop-replica · leave-view · return-generation · release · [start-source] · [discard]
//! change-point      check · resolve-point · open-view · stop-replica · leave-view · start-replica · await-replica · finish
//!                     failing before the view is left: close-view · restart-replica
//! switch-failback   … catch-up · [stop-source] · stop-replica · fence · … · release · start-source · await-source
//!                     failing before the view is left: return-generation · release · restart-replica
//!                     the source's machine does not start: hold-again · power-off · … · reopen-view · restart-replica
//! undo-failback     check · stop-source · fence · [power-off] · … · open-view · start-replica · await-replica · finish
//!                     failing before a replica runs: [stop-replica] · close-view · … · release · [start-source]
//! ```
//! A machine that is still on at its source when the group switches has been held since it was failed over: what it has in
//! memory is of disks that are about to be others, so its power is cut.
//!
//! What is switched on or off is asked first and recorded, so that only what ran is started again. A replica that runs but
//! does not answer in time is left running: it may have answered somebody.

use serde::{Deserialize, Serialize};

use super::{Action, Failover, FenceKind, Reply, State, StepName, StepRecord, StepState, Verb, pending};
use crate::machine::{Machine, MachineDisk, Role, source_disk, view_disks};
use crate::objects::{ExportRecord, Group};
use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;

/// How long a driver may take to do what needs no waiting, milliseconds.
const DRIVE_MS: u64 = 60_000;
/// How long a machine whose power is cut may take to be off, milliseconds, beyond what it was given.
const POWER_MS: u64 = 20_000;
/// How long undoing waits for a replica to be off, milliseconds: the source's hosts are held meanwhile.
const UNDO_MS: u64 = 10_000;

/// A machine as an operation began with it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Driven {
    /// As it was then.
    pub machine: Machine,
    /// Its disks.
    pub disks: Vec<MachineDisk>,
    /// It was on at its source; not known before it has been asked.
    pub was_on: Option<bool>,
}

/// A command for the proxy of a machine.
#[derive(Clone, PartialEq, Debug)]
pub struct Order {
    /// Id of the proxy.
    pub proxy: String,
    /// What.
    pub tell: Tell,
    /// How long it may take, milliseconds; a proxy that is not there is asked again until then.
    pub within_ms: u64,
    /// Asked again, too, until the machine answers.
    pub until_ready: bool,
}

/// What came of an order: how the machine stands, or why that is not known.
pub type Stands = Result<Outcome, String>;

impl StepName {
    /// Tells the proxies of machines.
    pub(super) fn is_of_machines(self) -> bool {
        use StepName::*;
        let switches =
            matches!(self, StopSource | PowerOff | StartReplica | StopReplica | RestartReplica | StartSource);
        switches || matches!(self, AwaitReplica | AwaitSource | StartTest | AwaitTest | StopTest)
    }

    /// Until the machines answer.
    fn awaits(self) -> bool {
        matches!(self, Self::AwaitReplica | Self::AwaitSource | Self::AwaitTest)
    }

    /// Until they are off.
    fn stops(self) -> bool {
        matches!(self, Self::StopSource | Self::PowerOff | Self::StopReplica | Self::StopTest)
    }
}

impl Failover {
    /// The verb together with the machines of its group. `fences`: that they are off says that nobody writes at the source, and
    /// somebody is there to be asked. `left`: the exports of the view that the group runs from.
    #[must_use]
    pub fn with_machines(mut self, machines: Vec<Driven>, fences: bool, left: Vec<ExportRecord>) -> Self {
        use StepName::*;
        let target = machines.iter().any(|m| m.machine.target.is_driven());
        let source = machines.iter().any(|m| m.machine.source.is_driven());
        let stopped = machines.iter().any(|m| m.machine.stopped_at_source && m.machine.source.is_driven());
        let mut put = |wanted: bool, before: StepName, names: &[StepName]| {
            let at = self.steps.iter().position(|s| s.name == before);
            if let Some(at) = at.filter(|_| wanted) {
                self.steps.splice(at..at, names.iter().copied().map(pending));
            }
        };
        match self.spec.verb {
            Verb::Failover => put(fences, Drain, &[PowerOff]),
            Verb::PlannedFailover => put(source, Fence, &[StopSource]),
            Verb::UndoFailover | Verb::ChangePoint => put(target, LeaveView, &[StopReplica]),
            Verb::SwitchFailback => {
                put(source, Fence, &[StopSource]);
                put(target, Fence, &[StopReplica]);
            }
            Verb::UndoFailback => {
                put(source, Fence, &[StopSource]);
                put(fences, Drain, &[PowerOff]);
            }
            Verb::Failback | Verb::CancelFailback | Verb::CommitFailback | Verb::TestFailover => {}
        }
        put(target, Finish, &[StartReplica, AwaitReplica]);
        if self.spec.verb == Verb::UndoFailover && stopped {
            let at = self.steps.iter().position(|s| s.name == Release).map_or(self.steps.len(), |at| at + 1);
            self.steps.insert(at, pending(StartSource));
        }
        if self.spec.verb == Verb::SwitchFailback && source {
            self.steps.extend([StartSource, AwaitSource].map(pending));
        }
        self.facts.machines = machines;
        self.facts.left = left;
        self
    }

    /// The same without asking for the machines at a source that nobody can reach: what fences that decides.
    #[must_use]
    pub fn with_source_unasked(mut self) -> Self {
        self.steps.retain(|s| s.name != StepName::StopSource);
        self
    }

    fn role(&self, step: StepName) -> Role<'_> {
        match step {
            StepName::StartTest | StepName::AwaitTest | StepName::StopTest => Role::Test(&self.facts.view),
            StepName::StopSource | StepName::PowerOff | StepName::StartSource | StepName::AwaitSource => Role::Source,
            _ => Role::Replica,
        }
    }

    /// The machines of the operation that this step is about, by their places among [`super::Facts::machines`].
    fn addressed(&self, step: StepName) -> Vec<usize> {
        let role = self.role(step);
        let about = |driven: &Driven| {
            driven.machine.place(role).is_driven()
                && match step {
                    StepName::StopSource => self.asks_first() || driven.was_on == Some(true),
                    StepName::StartSource | StepName::AwaitSource => {
                        driven.was_on == Some(true) || self.brings_back(driven)
                    }
                    _ => true,
                }
        };
        (0..self.facts.machines.len()).filter(|at| about(&self.facts.machines[*at])).collect()
    }

    /// Whatever was so at the source: it is to run there again.
    fn brings_back(&self, driven: &Driven) -> bool {
        let Machine { stopped_at_source: stopped, runs_from, .. } = &driven.machine;
        match self.spec.verb {
            Verb::UndoFailover => *stopped,
            Verb::SwitchFailback => *stopped || !runs_from.is_empty(),
            _ => false,
        }
    }

    /// The source holds all I/O for certain, and that is why its machines need not be off.
    fn is_held(&self) -> bool {
        !self.spec.verb.is_back() && self.facts.fence == Some(FenceKind::Confirmed)
    }

    /// Whether its machines are on at the source has not been asked yet.
    fn asks_first(&self) -> bool {
        self.facts.machines.iter().any(|m| m.machine.source.is_driven() && m.was_on.is_none())
    }

    /// A step that undoes what this operation did is not to take long: hosts wait.
    fn is_undoing(&self) -> bool {
        self.state == State::Undoing
    }

    pub(super) fn machine_action(&self, step: StepName, group: &Group) -> Action {
        let addressed = self.addressed(step);
        let needless = step == StepName::PowerOff && self.is_held();
        if addressed.is_empty() || needless {
            return Action::Record;
        }
        let role = self.role(step);
        let order = |at: &usize| {
            let Driven { machine, disks, .. } = &self.facts.machines[*at];
            let source = || disks.iter().map(source_disk).collect();
            let (tell, within_ms) = match step {
                StepName::StopSource | StepName::PowerOff if self.asks_first() => (machine.probe(role), DRIVE_MS),
                // Its disks are held: it could not go down by itself.
                StepName::StopSource if self.spec.verb == Verb::SwitchFailback => (machine.stop(role, 0), POWER_MS),
                StepName::StopSource => (machine.stop(role, machine.stop_within_ms), machine.stop_within_ms + POWER_MS),
                StepName::PowerOff => (machine.stop(role, 0), POWER_MS),
                StepName::StopReplica if self.is_undoing() => (machine.stop(role, 0), UNDO_MS),
                StepName::StopReplica => {
                    (machine.stop(role, machine.stop_within_ms), machine.stop_within_ms + POWER_MS)
                }
                // Nobody misses what such an instance has not written yet.
                StepName::StopTest => (machine.stop(role, 0), POWER_MS),
                StepName::StartReplica | StepName::StartTest => {
                    (machine.start(role, view_disks(disks, &self.facts.exports)), DRIVE_MS)
                }
                StepName::RestartReplica => {
                    // One that a failback left is opened by the exports that it had, or by new ones.
                    let of_over = self.spec.verb.is_of_failed_over();
                    let exports = if of_over { &self.facts.left } else { &self.facts.exports };
                    (machine.start(role, view_disks(disks, exports)), DRIVE_MS)
                }
                StepName::StartSource => {
                    (machine.start(role, source()), if self.is_undoing() { UNDO_MS } else { DRIVE_MS })
                }
                _ => (machine.probe(role), machine.ready_within_ms),
            };
            let proxy = machine.proxy_of(role, group).to_owned();
            Order { proxy, tell, within_ms, until_ready: step.awaits() }
        };
        Action::Machines(addressed.iter().map(order).collect())
    }

    /// How each machine stands that was told something, by its id; or why that is not as it should be.
    fn judged(&self, step: StepName, reply: Reply) -> Result<Vec<(usize, v1::MachineState)>, String> {
        let addressed = self.addressed(step);
        let answers = match reply {
            Reply::Machines(answers) if answers.len() == addressed.len() => answers,
            Reply::Nothing if addressed.is_empty() => Vec::new(),
            other => return Err(super::why(other)),
        };
        let mut stand = Vec::new();
        let mut wrong = Vec::new();
        for (at, answer) in addressed.into_iter().zip(answers) {
            let id = &self.facts.machines[at].machine.id;
            match answer {
                Ok(Outcome::Machine(state)) => match misfit(step, self.asks_first(), &state) {
                    None => stand.push((at, state)),
                    Some(why) => wrong.push(format!("machine \"{id}\" {why}")),
                },
                Ok(Outcome::Error(e)) => wrong.push(format!("machine \"{id}\": {}", e.message)),
                Ok(_) => wrong.push(format!("machine \"{id}\": the proxy's answer does not fit the command")),
                Err(why) => wrong.push(format!("machine \"{id}\": {why}")),
            }
        }
        if wrong.is_empty() { Ok(stand) } else { Err(wrong.join("; ")) }
    }

    #[allow(clippy::type_complexity)]
    pub(super) fn machines_done(
        &mut self,
        group: &Group,
        step: StepName,
        reply: Reply,
    ) -> Result<(StepState, String), (String, String)> {
        use StepState::{Done, Failed, Running, Skipped};
        if step == StepName::PowerOff && self.is_held() {
            return Ok((Skipped, "not needed: the source holds all I/O".to_owned()));
        }
        let judged = self.judged(step, reply);
        let source = matches!(step, StepName::StopSource | StepName::PowerOff);
        if source
            && self.asks_first()
            && let Ok(stand) = &judged
        {
            for (at, state) in stand {
                self.facts.machines[*at].was_on = Some(state.power() == v1::MachinePower::On);
            }
            return Ok((Running, "being switched off".to_owned()));
        }
        let on = self.goes_on();
        match (step, judged) {
            (StepName::PowerOff, Ok(_)) => {
                self.facts.fence = Some(FenceKind::Confirmed);
                Ok((Done, format!("confirmed: {} off at the source", self.named(step, "is", "are"))))
            }
            (StepName::PowerOff, Err(why)) if self.facts.fence.is_some() => {
                Ok((Skipped, format!("not confirmed: {why}")))
            }
            (StepName::PowerOff, Err(why)) => Err((
                format!("nobody confirms that the source is off: {why}"),
                format!(
                    "bring the source proxy \"{}\" back; or, if its machine is known to be off, start again with \
                     `unconfirmed` and the group's id in `confirm_name`",
                    group.source
                ),
            )),
            // Nobody could be asked. Whether it is fenced is the next step's to find out.
            (StepName::StopSource, Err(why)) if self.spec.verb == Verb::UndoFailback && self.asks_first() => {
                Ok((Failed, why))
            }
            (StepName::StopSource, Err(why)) => Err((
                format!("not switched off at the source: {why}"),
                format!("{on}; look at it there, then start again"),
            )),
            (StepName::StopReplica, Err(why)) => {
                Err((format!("the replica was not switched off: {why}"), format!("{on}; look at it, then start again")))
            }
            // The view that it ran from has been left: there is no way back.
            (StepName::StartReplica, Err(why)) if self.spec.verb.is_of_failed_over() => Ok((Failed, why)),
            (StepName::StartReplica, Err(why)) => Err((
                format!("the replica was not started: {why}"),
                format!("{on}; look at its driver's settings, then start again"),
            )),
            (StepName::StartTest | StepName::AwaitTest, Err(why)) => Err((
                format!("the test has failed: {why}"),
                format!("{on}; look at the machine's definition and its driver's settings"),
            )),
            (StepName::StartSource, Err(why)) => Err((
                format!("the source's machine was not started: {why}"),
                "the replica is started again, if the source confirms that it holds; look at the driver's settings at the \
                 source, then fail back again"
                    .to_owned(),
            )),
            (StepName::AwaitReplica | StepName::AwaitSource, Err(why)) => Ok((Failed, format!("it runs, but {why}"))),
            (_, Err(why)) => Err((why, on.to_owned())),
            (StepName::StopSource, Ok(stand)) if stand.is_empty() => Ok((Skipped, "off already".to_owned())),
            (StepName::StartSource | StepName::AwaitSource, Ok(stand)) if stand.is_empty() => {
                Ok((Skipped, "not needed: none ran".to_owned()))
            }
            (step, Ok(_)) if step.awaits() => Ok((Done, format!("{} answering", self.named(step, "is", "are")))),
            (StepName::StartReplica | StepName::StartSource | StepName::StartTest, Ok(_)) => {
                Ok((Done, format!("{} on", self.named(step, "is", "are"))))
            }
            (_, Ok(_)) => Ok((Done, format!("{} off", self.named(step, "is", "are")))),
        }
    }

    /// What came of a step that never fails.
    pub(super) fn machines_undone(&self, step: StepName, reply: Reply) -> (StepState, String) {
        let word = if step.stops() { "off" } else { "on again" };
        match self.judged(step, reply) {
            Ok(stand) if stand.is_empty() => (StepState::Skipped, "not needed".to_owned()),
            Ok(_) => (StepState::Done, format!("{} {word}", self.named(step, "is", "are"))),
            Err(why) => (StepState::Skipped, format!("{why}; see to it there")),
        }
    }

    fn named(&self, step: StepName, one: &str, many: &str) -> String {
        let driven = self.facts.machines.iter().filter(|m| m.machine.place(self.role(step)).is_driven());
        let ids: Vec<&str> = driven.map(|m| m.machine.id.as_str()).collect();
        format!("{} {}", ids.join(", "), if ids.len() == 1 { one } else { many })
    }

    /// How a machine is to be noted, as far as this operation has come: whether it is switched off at its source by an
    /// operation, and from which view its replica runs.
    pub fn machine_marks(&self, driven: &Driven) -> (bool, String) {
        use StepName::*;
        let state = |name| self.steps.iter().find(|s: &&StepRecord| s.name == name).map(|s| s.state);
        let done = |name| state(name) == Some(StepState::Done);
        let taken = driven.was_on == Some(true) && (self.reached(StopSource) || self.reached(PowerOff));
        // Of a switch that was undone.
        let cut = self.reached(HoldAgain) && self.reached(PowerOff) && self.brings_back(driven);
        let stopped = ((driven.machine.stopped_at_source || taken) && !done(StartSource)) || cut;
        let mut runs_from = driven.machine.runs_from.clone();
        if driven.machine.target.is_driven() {
            let undoes = !self.spec.verb.is_of_failed_over();
            if self.reached(StartReplica) && undoes {
                runs_from.clone_from(&self.facts.view);
            }
            // Without its view nothing runs, whoever could be told.
            if done(StopReplica) || (undoes && matches!(state(CloseView), Some(StepState::Done))) {
                runs_from.clear();
            }
            if self.reached(RestartReplica) {
                let views = [&self.facts.leaves, &self.facts.view];
                runs_from = views.into_iter().find(|view| !view.is_empty()).cloned().unwrap_or_default();
            }
            if self.reached(StartReplica) && !undoes {
                runs_from.clone_from(&self.facts.view);
            }
        }
        (stopped, runs_from)
    }
}

/// What is not as it should be of a machine that was told something.
fn misfit(step: StepName, asked: bool, state: &v1::MachineState) -> Option<String> {
    use v1::MachinePower::{Off, On, Unspecified};
    let because = || if state.detail.is_empty() { String::new() } else { format!(": {}", state.detail) };
    match (step, state.power()) {
        (StepName::StopSource | StepName::PowerOff, On | Off) if asked => None,
        (step, Off) if step.stops() => None,
        (step, On) if step.stops() => Some(format!("is still on{}", because())),
        (step, On) if step.awaits() && state.ready => None,
        (step, On) if step.awaits() => Some(format!("does not answer in time{}", because())),
        (_, On) => None,
        (_, Off) => Some(format!("is off{}", because())),
        (_, Unspecified) => Some(format!("stands as nobody knows{}", because())),
    }
}

/// That these machines are off says that nobody writes to the group's disks at its source: each disk is one of theirs, and
/// each of them can be asked.
pub fn fences(machines: &[Driven], disks: &[String]) -> bool {
    let has = |uid: &String| machines.iter().any(|m| m.disks.iter().any(|d| d.uid == *uid));
    !machines.is_empty() && machines.iter().all(|m| m.machine.source.is_driven()) && disks.iter().all(has)
}
