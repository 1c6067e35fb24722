//! Failover as a machine: which step is next, what it takes, what its outcome changes. No I/O, no clock.
//!
//! ```text
//! failover          check · fence · drain · raise-generation · [lease] · resolve-point · open-view · finish
//! planned-failover  check · catch-up · fence · drain · raise-generation · resolve-point · open-view · finish
//!                     │ any failure up to here
//!                     ▼
//!                   close-view · return-generation · release  (undoing: the source goes on under a new generation)
//!
//! undo-failover     check · leave-view · return-generation · release · [discard]
//!                     │ if the view cannot be left: as it was
//! change-point      check · resolve-point · open-view · leave-view · finish
//!                     │ any failure up to here: close-view, and as it was
//!
//! failback          check · release-disks · reverse · await-reverse
//!                     │ any failure: end-reverse · drop-reverse, and failed over as it was
//! cancel-failback   check · end-reverse · drop-reverse
//! switch-failback   check · catch-up · fence · drain · raise-generation · merge · leave-view ·
//!                     │ any failure up to here: return-generation · release, of the reverse stream: failing back as it was
//!                   end-reverse · drop-reverse · return-generation · release
//!                     │ the source, or its machine, does not start: hold-again · take-again · reopen-view: failed over as
//!                     │ it was
//! commit-failback   check · discard
//! undo-failback     as a failover, to the view as it was left
//! ```
//! The source is let go on only when nobody can write to the view any more. A planned failover takes nothing from the
//! source unless all that it had captured is at the target.
//!
//! A step is recorded as running before it is done ([`Failover::begin`]), with what it changes in the group, so that a
//! coordinator that restarts does the same step again. Every command is safe to repeat. The undoing steps never fail:
//! whom they cannot reach is told by the desired state when it is back.

mod checks;
mod failback;
mod machines;
mod parts;
mod trial;

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use serde::{Deserialize, Serialize};

pub use self::checks::{Ends, check, check_back, check_failed_over, check_pause, check_point, free_view};
pub use self::machines::{Driven, Order, Stands, fences};
pub use self::parts::{Choice, Facts, Failure, FenceKind, Spec, State, StepName, StepRecord, StepState, Verb};
use crate::convert;
use crate::objects::{Disk, Group, GroupPhase, PointRecord, Way, proxy_view_name};

/// Id of the view that a failed over group runs from; another is `failover-2` and so on, where it has been there before.
pub const FAILOVER_VIEW: &str = "failover";

/// How long a command may take, milliseconds.
const ANSWER_MS: u64 = 15_000;
/// How long the source may take to hold its I/O, milliseconds: past it it counts as unreachable.
const FENCE_MS: u64 = 5_000;
/// After a restart of the coordinator, how long its proxies have to come back, milliseconds.
const RETURN_MS: u64 = 15_000;
/// How long what the source had captured may take to become durable once it is held, milliseconds.
const DRAIN_MS: u64 = 2_000;
/// How long undoing waits for each proxy, milliseconds: the source's hosts are held meanwhile.
const UNDO_MS: u64 = 3_000;
/// Waited beyond a lease, milliseconds, and a tenth of the lease more: clocks run at different speeds, and what was being
/// answered when it ran out may take a moment.
const LEASE_MARGIN_MS: u64 = 1_000;

/// A failover.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failover {
    /// What was asked for.
    pub spec: Spec,
    /// How far it is.
    pub state: State,
    /// Its steps.
    pub steps: Vec<StepRecord>,
    /// What has been found out.
    pub facts: Facts,
    /// Why it failed.
    pub error: Option<Failure>,
    /// By whom it is to be given up; empty if by nobody.
    #[serde(default)]
    pub cancelled_by: String,
}

/// Which proxy of the group.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Side {
    /// At the disks.
    Source,
    /// At the journal.
    Target,
}

/// What is to be done next.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// A command for a proxy.
    Tell {
        /// Which.
        side: Side,
        /// What.
        command: Tell,
        /// How long to wait for the proxy to be connected, milliseconds.
        connect_ms: u64,
        /// How long to wait for its answer, milliseconds.
        answer_ms: u64,
    },
    /// Wait until the keeper of a stream holds this record, for a bounded time; not reaching it is no failure.
    Drain {
        /// Which stream.
        way: Way,
        /// Record number.
        seq: u64,
        /// Milliseconds.
        within_ms: u64,
    },
    /// Wait until the keeper of a stream holds what has been captured until now, for a bounded time.
    CatchUp {
        /// Which stream.
        way: Way,
        /// Milliseconds.
        within_ms: u64,
    },
    /// Wait for so long, then apply [`Reply::Nothing`].
    Wait {
        /// Milliseconds.
        ms: u64,
    },
    /// Commands for the proxies of machines, all at once.
    Machines(Vec<Order>),
    /// Have the source write what the reverse stream holds to its disks, for a bounded time; asked again it goes on.
    Merge(v1::MergeStream),
    /// Wait until proxies report something, for a bounded time.
    Await {
        /// What.
        what: Awaited,
        /// Milliseconds.
        within_ms: u64,
    },
    /// Nothing: apply [`Reply::Nothing`].
    Record,
    /// It has ended.
    Ended,
}

/// What proxies are to report.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Awaited {
    /// Both have the reverse stream.
    Reverse,
    /// The source serves its disks, and captures.
    Started,
    /// The source has been told to hold all I/O, and does.
    Held,
}

/// What came of an action. One at a time: its size does not matter.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// The proxy's answer.
    Answer(Outcome),
    /// The proxy is not there, or did not answer in time.
    Unreachable(String),
    /// The target's newest record after draining.
    Drained(u64),
    /// How many records the target is behind after catching up.
    CaughtUp(u64),
    /// What came of each order, as they were given.
    Machines(Vec<Stands>),
    /// What was waited for has been reported.
    Seen,
    /// It has not, and what has been instead.
    NotSeen(String),
    /// For [`Action::Record`].
    Nothing,
}

impl Failover {
    /// A verb whose checks have passed. `leaves` is the view that a group that is failed over runs from, `view` the one
    /// that is opened.
    pub fn new(
        spec: Spec,
        disks: &[&Disk],
        (view, leaves): (&str, &str),
        rpo_at_start_us: u64,
        lease_ms: u64,
        checked: String,
        now_ns: u64,
    ) -> Self {
        use StepName::*;
        let names: &[StepName] = match spec.verb {
            Verb::Failover if lease_ms == 0 => &[Check, Fence, Drain, RaiseGeneration, ResolvePoint, OpenView, Finish],
            Verb::Failover => &[Check, Fence, Drain, RaiseGeneration, Lease, ResolvePoint, OpenView, Finish],
            Verb::PlannedFailover => &[Check, CatchUp, Fence, Drain, RaiseGeneration, ResolvePoint, OpenView, Finish],
            Verb::UndoFailover if spec.discard => &[Check, LeaveView, ReturnGeneration, Release, Discard],
            Verb::UndoFailover => &[Check, LeaveView, ReturnGeneration, Release],
            Verb::ChangePoint => &[Check, ResolvePoint, OpenView, LeaveView, Finish],
            Verb::UndoFailback if lease_ms == 0 => &[Check, Fence, Drain, RaiseGeneration, OpenView, Finish],
            Verb::UndoFailback => &[Check, Fence, Drain, RaiseGeneration, Lease, OpenView, Finish],
            Verb::Failback => &[Check, ReleaseDisks, Reverse, AwaitReverse],
            Verb::CancelFailback => &[Check, EndReverse, DropReverse],
            Verb::SwitchFailback => &[
                Check,
                CatchUp,
                Fence,
                Drain,
                RaiseGeneration,
                Merge,
                LeaveView,
                EndReverse,
                DropReverse,
                ReturnGeneration,
                Release,
            ],
            Verb::CommitFailback => &[Check, Discard],
            Verb::TestFailover if spec.hold_ms > 0 => {
                &[Check, OpenView, StartTest, AwaitTest, Hold, StopTest, CloseView]
            }
            Verb::TestFailover => &[Check, OpenView, StartTest, AwaitTest, StopTest, CloseView],
        };
        let mut steps: Vec<StepRecord> = names.iter().copied().map(pending).collect();
        steps[0] = StepRecord {
            state: StepState::Done,
            detail: checked,
            started_ns: now_ns,
            ended_ns: now_ns,
            ..steps[0].clone()
        };
        let facts = Facts {
            rpo_at_start_us,
            disks: disks.iter().map(|d| d.uid.clone()).collect(),
            last_seq: None,
            fence: None,
            lease_ms,
            zero_loss: false,
            at_least: 0,
            generation: 0,
            point: None,
            exports: Vec::new(),
            view: view.to_owned(),
            leaves: leaves.to_owned(),
            reopens: false,
            machines: Vec::new(),
            left: Vec::new(),
            reverse: String::new(),
            after: 0,
            pausing: false,
        };
        Self { spec, state: State::Running, steps, facts, error: None, cancelled_by: String::new() }
    }

    /// Opens a view that is there already, with what was written to it: its point is known.
    #[must_use]
    pub fn reopening(mut self, point: PointRecord) -> Self {
        self.facts.point = Some(point);
        self.facts.reopens = true;
        self.steps.retain(|step| step.name != StepName::ResolvePoint);
        self
    }

    /// True once nothing is left to do.
    pub fn ended(&self) -> bool {
        matches!(self.state, State::Done | State::Failed)
    }

    fn current(&self) -> Option<usize> {
        self.steps.iter().position(|s| matches!(s.state, StepState::Pending | StepState::Running))
    }

    fn reached(&self, name: StepName) -> bool {
        self.steps.iter().any(|s| s.name == name && s.state != StepState::Pending)
    }

    /// Records the next step as running, with what it changes in the group; both are to be stored *before* the action is
    /// done. After a restart it is the step that was running (`resumed`).
    pub fn begin(&mut self, group: &mut Group, now_ns: u64) -> Action {
        self.heed_cancel(group);
        let Some(at) = self.current() else { return Action::Ended };
        let resumed = self.steps[at].state == StepState::Running;
        let step = &mut self.steps[at];
        step.state = StepState::Running;
        if !resumed {
            step.started_ns = now_ns;
        }
        let name = step.name;
        if self.spec.verb.is_back() {
            return self.begin_back(group, name, resumed);
        }
        if let Some(pause) = self.pause() {
            return pause;
        }
        let stream_uid = group.uid.clone();
        let view = proxy_view_name(&group.tenant, &group.id, &self.facts.view);
        let back = if resumed { RETURN_MS } else { 0 };
        let tell = |side, command, connect_ms, answer_ms| Action::Tell { side, command, connect_ms, answer_ms };
        match name {
            StepName::Check | StepName::Finish => Action::Record,
            StepName::StopSource
            | StepName::PowerOff
            | StepName::StartReplica
            | StepName::AwaitReplica
            | StepName::StopReplica
            | StepName::RestartReplica
            | StepName::StartSource
            | StepName::AwaitSource
            | StepName::StartTest
            | StepName::AwaitTest
            | StepName::StopTest => self.machine_action(name, group),
            StepName::Hold => self.hold_action(now_ns),
            StepName::CatchUp => Action::CatchUp { way: Way::Forth, within_ms: self.spec.within_ms },
            StepName::Fence => {
                group.hold = true;
                tell(Side::Source, Tell::Fence(v1::Fence { stream_uid, hold: true }), back, FENCE_MS)
            }
            // Nothing is on its way: what was written since it was paused stays where it is.
            StepName::Drain if group.pause.is_some() => Action::Record,
            StepName::Drain => match (self.spec.to, self.facts.last_seq) {
                (Choice::Latest, Some(seq)) => {
                    Action::Drain { way: Way::Forth, seq, within_ms: self.spec.within_ms.max(DRAIN_MS) }
                }
                _ => Action::Record,
            },
            StepName::RaiseGeneration => {
                if self.facts.at_least == 0 {
                    self.facts.at_least = group.generation + 1;
                }
                let command = v1::RaiseGeneration {
                    stream_uid,
                    disk_uids: self.facts.disks.clone(),
                    reason: reason(&self.spec.reason, "failover"),
                    at_least: self.facts.at_least,
                };
                tell(Side::Target, Tell::RaiseGeneration(command), RETURN_MS, ANSWER_MS)
            }
            // From the beginning after a restart: nobody knows how much of it had passed.
            StepName::Lease if self.facts.fence == Some(FenceKind::SelfFenced) => {
                let lease = self.facts.lease_ms;
                Action::Wait { ms: lease + lease / 10 + LEASE_MARGIN_MS }
            }
            StepName::Lease => Action::Record,
            StepName::ResolvePoint => {
                let command = v1::ResolvePoint { stream_uid, at: Some(convert::choice_to_proto(self.spec.to)) };
                tell(Side::Target, Tell::ResolvePoint(command), RETURN_MS, ANSWER_MS)
            }
            StepName::OpenView => {
                let command = v1::OpenView {
                    stream_uid,
                    view,
                    seq: self.facts.point.as_ref().map_or(0, |p| p.seq),
                    disk_uids: self.facts.disks.clone(),
                    writable: true,
                    kind: if self.spec.verb.is_trial() { v1::ViewKind::Test } else { v1::ViewKind::Failover }.into(),
                    reason: reason(&self.spec.reason, "failover"),
                };
                tell(Side::Target, Tell::OpenView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::LeaveView => {
                let view = proxy_view_name(&group.tenant, &group.id, &self.facts.leaves);
                // Kept in any case: if nobody hears that it was closed, it is opened again.
                let command = v1::CloseView { view, keep_delta: true };
                tell(Side::Target, Tell::CloseView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::Discard => {
                let view = proxy_view_name(&group.tenant, &group.id, &self.facts.leaves);
                let command = v1::CloseView { view, keep_delta: false };
                tell(Side::Target, Tell::CloseView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::CloseView => {
                // What had been written to it before this operation is not this operation's to delete.
                let command = v1::CloseView { view, keep_delta: self.facts.reopens };
                tell(Side::Target, Tell::CloseView(command), UNDO_MS, UNDO_MS)
            }
            StepName::ReturnGeneration => {
                // Above the one that was raised: what the source writes from here is another branch.
                if self.facts.at_least == 0 {
                    self.facts.at_least = group.generation;
                }
                let generation = self.facts.at_least.max(self.facts.generation) + 1;
                group.generation = generation;
                group.writer_generation = generation;
                let command = v1::RaiseGeneration {
                    stream_uid,
                    disk_uids: self.facts.disks.clone(),
                    reason: "failover undone".to_owned(),
                    at_least: generation,
                };
                tell(Side::Target, Tell::RaiseGeneration(command), UNDO_MS, UNDO_MS)
            }
            StepName::Release => {
                group.hold = false;
                tell(Side::Source, Tell::Fence(v1::Fence { stream_uid, hold: false }), UNDO_MS, UNDO_MS)
            }
            StepName::ReleaseDisks
            | StepName::Reverse
            | StepName::AwaitReverse
            | StepName::Merge
            | StepName::EndReverse
            | StepName::DropReverse
            | StepName::HoldAgain
            | StepName::TakeAgain
            | StepName::ReopenView => unreachable!("a step of verbs about the reverse stream"),
        }
    }

    /// Records what came of the action that [`Self::begin`] returned.
    pub fn apply(&mut self, group: &mut Group, disks: &[(String, String)], reply: Reply, now_ns: u64) {
        let Some(at) = self.current() else { return };
        let name = self.steps[at].name;
        if self.paused(&reply) {
            return;
        }
        let outcome = if self.spec.verb.is_back() {
            self.apply_back(group, name, reply)
        } else if self.state == State::Undoing || self.is_past_return(name) || self.removes(name) {
            Ok(self.undone(group, name, reply))
        } else if name == StepName::Lease && !self.cancelled_by.is_empty() {
            // The wait may have been cut short: nobody knows that the source has stopped.
            Err(self.given_up())
        } else {
            self.done(group, disks, name, reply)
        };
        let step = &mut self.steps[at];
        step.ended_ns = now_ns;
        match outcome {
            Ok((StepState::Running, detail)) => {
                step.ended_ns = 0;
                step.detail = detail;
            }
            Ok((state, detail)) => {
                step.detail = detail;
                self.steps[at].state = self.try_again(at, state, now_ns);
            }
            Err((message, remedy)) => {
                step.state = StepState::Failed;
                step.detail.clone_from(&message);
                self.fail(group, name, message, remedy);
            }
        }
        self.settle(group);
    }

    fn settle(&mut self, group: &mut Group) {
        if self.current().is_some() || self.ended() {
            return;
        }
        let runs_from = |view: &str| GroupPhase::FailedOver { view: view.to_owned() };
        group.phase = match (self.state == State::Undoing, self.spec.verb) {
            (_, Verb::TestFailover) => group.phase.clone(),
            (undone, verb) if verb.is_back() => self.phase_back(group, undone),
            (true, Verb::UndoFailback) if !self.stays_open() => failback::as_it_was(group),
            (true, Verb::UndoFailback) => runs_from(&self.facts.view),
            (true, verb) if verb.is_of_failed_over() => runs_from(&self.facts.leaves),
            (true, _) | (false, Verb::UndoFailover) => GroupPhase::Protecting,
            (false, _) => runs_from(&self.facts.view),
        };
        if group.phase.is_failed_over() {
            // Its source does not send any more in any case; once that goes on, what it wrote is wanted.
            group.pause = None;
        }
        self.state = if self.state == State::Undoing { State::Failed } else { State::Done };
    }

    /// The view has been left, and the source is to go on: from here on nothing can fail.
    fn is_past_return(&self, step: StepName) -> bool {
        self.spec.verb == Verb::UndoFailover
            && matches!(
                step,
                StepName::ReturnGeneration | StepName::Release | StepName::StartSource | StepName::Discard
            )
    }

    /// An undone failback has come to nothing, and its view could not be closed again.
    pub fn stays_open(&self) -> bool {
        let skipped = |s: &StepRecord| s.name == StepName::CloseView && s.state == StepState::Skipped;
        self.spec.verb == Verb::UndoFailback && self.steps.iter().any(skipped)
    }

    /// From this step on it goes on to its end.
    fn decided_at(&self) -> StepName {
        match self.spec.verb {
            Verb::Failover | Verb::PlannedFailover | Verb::UndoFailback => StepName::OpenView,
            Verb::UndoFailover | Verb::ChangePoint | Verb::SwitchFailback => StepName::LeaveView,
            Verb::CancelFailback => StepName::EndReverse,
            Verb::CommitFailback => StepName::Discard,
            // It has no such step.
            Verb::Failback => StepName::Finish,
            // Never: whoever has seen enough says so.
            Verb::TestFailover => StepName::Finish,
        }
    }

    /// Asks that it be given up, by whom; between two steps it will be.
    ///
    /// # Errors
    /// It is too late, and why.
    pub fn cancel(&mut self, by: &str) -> Result<(), &'static str> {
        match self.state {
            State::Done | State::Failed => Err("ended"),
            State::Undoing => Ok(()),
            State::Running if self.reached(self.decided_at()) => Err("past the step from which it goes on to its end"),
            State::Running => {
                if self.cancelled_by.is_empty() {
                    by.clone_into(&mut self.cancelled_by);
                }
                Ok(())
            }
        }
    }

    /// What has become of the group when this is undone.
    fn goes_on(&self) -> &'static str {
        match self.spec.verb {
            Verb::TestFailover => "the group has not been touched, and what was there for the test is removed",
            Verb::Failover | Verb::PlannedFailover | Verb::UndoFailback => "the source has been let go on",
            _ => "the group runs on as it did",
        }
    }

    fn given_up(&self) -> (String, String) {
        let remedy = format!("{}; start again when it is wanted", self.goes_on());
        (format!("given up by {}", self.cancelled_by), remedy)
    }

    /// Before the next step: gives it up if that is asked. A step that was being done is done first.
    fn heed_cancel(&mut self, group: &mut Group) {
        let next = self.steps.iter().find(|s| matches!(s.state, StepState::Pending | StepState::Running));
        let Some(next) = next.filter(|s| s.state == StepState::Pending).map(|s| s.name) else { return };
        let enough = self.reached(StepName::Hold) || self.reached(StepName::StopTest);
        if self.state == State::Running && !self.cancelled_by.is_empty() && !self.reached(self.decided_at()) && !enough
        {
            let (message, remedy) = self.given_up();
            self.fail(group, next, message, remedy);
            self.settle(group);
        }
    }

    /// How much is done, as far as the steps tell, 0 to 100.
    pub fn progress_percent(&self) -> u32 {
        let left = self.steps.iter().filter(|s| matches!(s.state, StepState::Pending | StepState::Running)).count();
        if self.ended() || self.steps.is_empty() {
            return 100;
        }
        ((self.steps.len() - left) * 100 / self.steps.len()) as u32
    }

    #[allow(clippy::type_complexity)]
    fn done(
        &mut self,
        group: &mut Group,
        disks: &[(String, String)],
        name: StepName,
        reply: Reply,
    ) -> Result<(StepState, String), (String, String)> {
        use StepState::{Done, Skipped};
        let target = group.target.as_str();
        let planned = self.spec.verb == Verb::PlannedFailover;
        let goes_on = self.goes_on();
        let again = format!("{goes_on}; look at the target proxy \"{target}\", then start again");
        let rest = "wait until the group has caught up (see `status`), or allow more time; or start a failover that is not planned";
        match (name, reply) {
            (name, reply) if name.is_of_machines() => self.machines_done(group, name, reply),
            (StepName::CatchUp, Reply::CaughtUp(0)) => {
                Ok((Done, "what the source captures is at the target at once".into()))
            }
            (StepName::CatchUp, Reply::CaughtUp(behind)) => Err((
                format!("the target is {behind} records behind its source, and the time for catching up is over"),
                format!("nothing was held or taken; {rest}"),
            )),
            (StepName::Fence, Reply::Answer(Outcome::Fenced(fenced))) => {
                self.facts.fence = Some(FenceKind::Confirmed);
                self.facts.last_seq = Some(fenced.last_seq);
                Ok((Done, format!("confirmed: the source holds all I/O, its last record is {}", fenced.last_seq)))
            }
            (StepName::Fence, reply) => {
                let why = why(reply);
                if planned {
                    let remedy = "its I/O has been let go on; look at that proxy, then start again, or start a failover that is not planned";
                    return Err((format!("the source did not confirm that it holds all I/O: {why}"), remedy.into()));
                }
                if self.spec.unconfirmed {
                    self.facts.fence = Some(FenceKind::Unconfirmed);
                    return Ok((Done, format!("unconfirmed, as the operator said by name: {why}")));
                }
                if self.steps.iter().any(|s| s.name == StepName::PowerOff) && self.facts.lease_ms == 0 {
                    return Ok((Done, format!("{why}; its machines are to be switched off instead")));
                }
                if self.facts.lease_ms > 0 {
                    self.facts.fence = Some(FenceKind::SelfFenced);
                    let seconds = self.facts.lease_ms as f64 / 1000.0;
                    return Ok((Done, format!("{why}; it stops by itself, {seconds} s after its last word")));
                }
                let remedy = format!(
                    "bring the source proxy \"{}\" back; or, if its machine is known to be off, start again with \
                     `unconfirmed` and the group's id in `confirm_name`",
                    group.source
                );
                Err((format!("the source did not confirm that it holds all I/O: {why}"), remedy))
            }
            (StepName::Drain, Reply::Drained(seq)) => {
                let last = self.facts.last_seq.unwrap_or_default();
                let detail = if seq >= last {
                    "everything that the source had captured is durable at the target".to_owned()
                } else if planned {
                    let message =
                        format!("the target holds records up to {seq} of {last}: the rest did not arrive in time");
                    return Err((message, format!("the source has been let go on; {rest}")));
                } else {
                    format!("the target holds records up to {seq} of {last}; the rest did not arrive in time")
                };
                Ok((Done, detail))
            }
            (StepName::Drain, _) if group.pause.is_some() => {
                Ok((Skipped, "the group is paused: what was written since stays at its source".into()))
            }
            (StepName::Drain, _) => Ok((Skipped, "not needed: the source is gone, or an older point is wanted".into())),
            (StepName::RaiseGeneration, Reply::Answer(Outcome::Generation(raised)))
                if raised.generation >= self.facts.at_least =>
            {
                self.facts.generation = raised.generation;
                group.generation = raised.generation;
                self.facts.zero_loss = raised.zero_loss;
                let loss = if raised.zero_loss { "; nothing answered is missing" } else { "" };
                Ok((Done, format!("the disks are at generation {}{loss}", raised.generation)))
            }
            (StepName::Hold, Reply::Nothing) => Ok(self.held()),
            (StepName::Lease, Reply::Nothing) => {
                let fenced = self.facts.fence == Some(FenceKind::SelfFenced);
                Ok((Done, if fenced { "the source's lease has run out" } else { "not needed" }.to_owned()))
            }
            (StepName::ResolvePoint, Reply::Answer(Outcome::Point(point))) => {
                let record = convert::point_from_proto(&point);
                if planned && record.seq < self.facts.last_seq.unwrap_or(u64::MAX) {
                    let message = format!(
                        "the newest point is record {}, and the source had come to {:?}",
                        record.seq, self.facts.last_seq
                    );
                    return Err((message, format!("the source has been let go on; {rest}")));
                }
                check_point(&record, &point.damage, disks)
                    .map_err(|message| (message, "choose an older point, such as a cut from `points`".to_owned()))?;
                let detail = format!("record {}", record.seq);
                self.facts.point = Some(record);
                Ok((Done, detail))
            }
            (StepName::ResolvePoint, reply) => Err((why(reply), format!("choose another point; {again}"))),
            (StepName::OpenView, Reply::Answer(Outcome::View(opened))) if !opened.exports.is_empty() => {
                self.facts.exports = opened.exports.iter().map(convert::export_from_proto).collect();
                Ok((Done, format!("{} disks", opened.exports.len())))
            }
            (StepName::LeaveView, Reply::Answer(Outcome::Done(_))) => {
                Ok((Done, format!("\"{}\" is closed, and what was written to it is kept", self.facts.leaves)))
            }
            (StepName::LeaveView, reply) => Err((
                format!("the view \"{}\" was not closed: {}", self.facts.leaves, why(reply)),
                format!(
                    "the group runs on from it; stop what uses its disks, look at the target proxy \"{target}\", then start again"
                ),
            )),
            (StepName::Check | StepName::Finish, Reply::Nothing) => Ok((Done, String::new())),
            (_, reply) => Err((why(reply), again)),
        }
    }

    fn undone(&mut self, group: &Group, name: StepName, reply: Reply) -> (StepState, String) {
        let closed = matches!(reply, Reply::Answer(Outcome::Done(_)));
        if name == StepName::CloseView && self.spec.verb == Verb::UndoFailback && !closed {
            // Hosts know that view from before: where it may be open, the source is not let go.
            self.steps.retain(|s| s.state != StepState::Pending);
            if self.reached(StepName::StopReplica) {
                self.steps.push(pending(StepName::RestartReplica));
            }
            let why = why(reply);
            return (
                StepState::Skipped,
                format!("nobody has confirmed that it is closed, so the group runs from it: {why}"),
            );
        }
        match reply {
            reply if name.is_of_machines() => self.machines_undone(name, reply),
            Reply::Answer(Outcome::Error(e)) => (StepState::Skipped, format!("refused: {}", e.message)),
            Reply::Unreachable(detail) => {
                let proxy = if name == StepName::Release { &group.source } else { &group.target };
                (StepState::Skipped, format!("{detail}; \"{proxy}\" is told when it is back"))
            }
            _ => (StepState::Done, String::new()),
        }
    }

    fn fail(&mut self, group: &mut Group, step: StepName, message: String, remedy: String) {
        self.error = Some(Failure { step, message, remedy });
        self.state = State::Undoing;
        self.steps.retain(|s| s.state != StepState::Pending);
        if self.spec.verb.is_back() {
            let steps = self.undo_back();
            self.steps.extend(steps.iter().copied().map(pending));
            return;
        }
        let undo = [
            (StepName::StartTest, StepName::StopTest),
            (StepName::StartReplica, StepName::StopReplica),
            (StepName::OpenView, StepName::CloseView),
            (StepName::RaiseGeneration, StepName::ReturnGeneration),
            (StepName::Fence, StepName::Release),
            (StepName::StopSource, StepName::StartSource),
            (StepName::PowerOff, StepName::StartSource),
            (StepName::StopReplica, StepName::RestartReplica),
        ];
        for (of, by) in undo {
            if self.reached(of) && !self.steps.iter().any(|s| s.name == by && s.state == StepState::Pending) {
                self.steps.push(pending(by));
            }
        }
        debug_assert!(group.hold || !self.reached(StepName::Fence), "what was held is let go on by undoing");
    }
}

fn pending(name: StepName) -> StepRecord {
    StepRecord { name, state: StepState::Pending, detail: String::new(), started_ns: 0, ended_ns: 0 }
}

fn reason(given: &str, default: &str) -> String {
    if given.is_empty() { default.to_owned() } else { given.chars().take(200).collect() }
}

fn why(reply: Reply) -> String {
    match reply {
        Reply::Answer(Outcome::Error(e)) => e.message,
        Reply::Unreachable(detail) => detail,
        Reply::NotSeen(instead) => instead,
        _ => "the proxy's answer does not fit the command".to_owned(),
    }
}

#[cfg(test)]
mod failback_tests;
#[cfg(test)]
mod machines_tests;
#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
#[cfg(test)]
mod verbs_tests;
