//! Failover as a machine: which step is next, what it takes, what its outcome changes. No I/O, no clock.
//!
//! ```text
//! check · fence · drain · raise-generation · [lease] · resolve-point · open-view · finish
//!           │ any failure up to here
//!           ▼
//! close-view · return-generation · release          (undoing: the source goes on under a new generation)
//! ```
//! A step is recorded as running before it is done ([`Failover::begin`]), with what it changes in the group, so that a
//! coordinator that restarts does the same step again. Every command is safe to repeat. The undoing steps never fail:
//! whom they cannot reach is told by the desired state when it is back.

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use serde::{Deserialize, Serialize};

use crate::convert;
use crate::objects::{Disk, ExportRecord, Group, GroupPhase, PointRecord, proxy_view_name};
use crate::problem::Problem;

/// Id of the view that a failed over group runs from.
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

/// Which point is wanted.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The newest durable write.
    Latest,
    /// A cut.
    Cut(u64),
    /// The last write not after this time, nanoseconds since the Unix epoch.
    Time(u64),
    /// Exactly this write.
    Seq(u64),
}

/// What was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Which point.
    pub to: Choice,
    /// Go on if the source cannot be reached.
    pub unconfirmed: bool,
    /// For a person.
    pub reason: String,
}

/// The steps.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepName {
    /// It can be done: before anything is stored.
    Check,
    /// The source holds all I/O, or the operator says that it is gone.
    Fence,
    /// What a fenced source had captured becomes durable.
    Drain,
    /// The disks are taken from their writer.
    RaiseGeneration,
    /// A source that could not be reached has stopped by itself.
    Lease,
    /// The choice becomes one point.
    ResolvePoint,
    /// That point is opened for writing.
    OpenView,
    /// The group runs from the view.
    Finish,
    /// Undoing: the view goes.
    CloseView,
    /// Undoing: the source gets a generation above the one that was raised.
    ReturnGeneration,
    /// Undoing: the source's I/O goes on.
    Release,
}

impl StepName {
    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Fence => "fence",
            Self::Drain => "drain",
            Self::RaiseGeneration => "raise-generation",
            Self::Lease => "lease",
            Self::ResolvePoint => "resolve-point",
            Self::OpenView => "open-view",
            Self::Finish => "finish",
            Self::CloseView => "close-view",
            Self::ReturnGeneration => "return-generation",
            Self::Release => "release",
        }
    }
}

/// How far a step is.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepState {
    /// To be done.
    Pending,
    /// Recorded; may have been done.
    Running,
    /// Done.
    Done,
    /// Failed.
    Failed,
    /// Not needed.
    Skipped,
}

/// A step as recorded.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StepRecord {
    /// Which.
    pub name: StepName,
    /// How far.
    pub state: StepState,
    /// What was found or done.
    pub detail: String,
    /// Nanoseconds since the Unix epoch; 0 if not begun.
    pub started_ns: u64,
    /// Nanoseconds since the Unix epoch; 0 if not ended.
    pub ended_ns: u64,
}

/// How far the operation is.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Going forward.
    Running,
    /// A step has failed.
    Undoing,
    /// The group runs from its view.
    Done,
    /// Undone.
    Failed,
}

/// Why the source does not write any more.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FenceKind {
    /// The source proxy holds all I/O.
    Confirmed,
    /// The operator said so by name.
    Unconfirmed,
    /// Its lease has run out: it has stopped by itself.
    #[serde(rename = "self-fenced")]
    SelfFenced,
}

/// What has been found out on the way.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Facts {
    /// RPO as shown when it began, microseconds.
    pub rpo_at_start_us: u64,
    /// Uids of the group's disks.
    pub disks: Vec<String>,
    /// Last number that the fenced source had drawn.
    pub last_seq: Option<u64>,
    /// How the source was fenced.
    pub fence: Option<FenceKind>,
    /// Lease that the source is known to keep to, milliseconds; 0 if none is.
    #[serde(default)]
    pub lease_ms: u64,
    /// No answered write was missing at the target when the disks were taken.
    #[serde(default)]
    pub zero_loss: bool,
    /// Generation that the target is told to raise to.
    pub at_least: u64,
    /// Generation that it raised to.
    pub generation: u64,
    /// The point.
    pub point: Option<PointRecord>,
    /// The view's exports.
    pub exports: Vec<ExportRecord>,
}

/// Why it failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// At which step.
    pub step: StepName,
    /// What went wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

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
    /// Wait until the target holds this record, for a bounded time; not reaching it is no failure.
    Drain {
        /// Record number.
        seq: u64,
        /// Milliseconds.
        within_ms: u64,
    },
    /// Wait for so long, then apply [`Reply::Nothing`].
    Wait {
        /// Milliseconds.
        ms: u64,
    },
    /// Nothing: apply [`Reply::Nothing`].
    Record,
    /// It has ended.
    Ended,
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
    /// For [`Action::Record`].
    Nothing,
}

/// Checks that a failover fits the group's state, before anything is stored.
///
/// # Errors
/// What does not fit, and what does.
pub fn check(
    spec: &Spec,
    confirm_name: &str,
    group: &Group,
    disks: usize,
    source_connected: bool,
    target_connected: bool,
    lease_ms: u64,
) -> Result<(), Problem> {
    let name = group.name();
    match &group.phase {
        GroupPhase::Protecting => {}
        GroupPhase::FailingOver { operation } => {
            let remedy = format!("wait for tenants/{}/operations/{operation}", group.tenant);
            return Err(Problem::state(name, "being failed over already", remedy));
        }
        GroupPhase::FailedOver { view } => {
            let remedy = format!("it runs from the view \"{view}\"; verbs that fit: points, views");
            return Err(Problem::state(name, "failed over already", remedy));
        }
        GroupPhase::Deleting => return Err(Problem::state(name, "being deleted", "nothing fits any more")),
    }
    if disks == 0 {
        return Err(Problem::state(name, "without disks", "add a disk first"));
    }
    if spec.unconfirmed && confirm_name != group.id {
        return Err(Problem::invalid("confirm_name", confirm_name, format!("the group's id, typed: {:?}", group.id)));
    }
    if !target_connected {
        let detail = format!("the target of {name} is not connected; look at that proxy, then start again");
        return Err(Problem::Unreachable { proxy: group.target.clone(), detail });
    }
    // Without it, a source that keeps to a lease has stopped after a while.
    if !source_connected && !spec.unconfirmed && lease_ms == 0 {
        return Err(Problem::state(
            name,
            format!("not to be fenced: its source \"{}\" cannot be reached", group.source),
            "bring that proxy back; or, if its machine is known to be off, start the failover with `unconfirmed` and \
             the group's id in `confirm_name`",
        ));
    }
    Ok(())
}

/// Checks that a point is fit to run from.
///
/// # Errors
/// It is damaged or holds not all disks.
pub fn check_point(point: &PointRecord, damage: &str, disks: &[(String, String)]) -> Result<(), String> {
    if !damage.is_empty() {
        return Err(format!("the point {} is damaged: {damage}", point.seq));
    }
    let missing: Vec<&str> =
        disks.iter().filter(|(uid, _)| !point.disks.contains(uid)).map(|(_, id)| id.as_str()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("the point {} does not hold {}: being synchronised there", point.seq, missing.join(", ")))
}

impl Failover {
    /// A failover whose checks have passed.
    pub fn new(spec: Spec, disks: &[&Disk], rpo_at_start_us: u64, lease_ms: u64, checked: String, now_ns: u64) -> Self {
        use StepName::*;
        let mut steps: Vec<StepRecord> =
            [Check, Fence, Drain, RaiseGeneration, Lease, ResolvePoint, OpenView, Finish].map(pending).into();
        if lease_ms == 0 {
            steps.retain(|step| step.name != Lease);
        }
        steps[0] = StepRecord {
            state: StepState::Done,
            detail: checked,
            started_ns: now_ns,
            ended_ns: now_ns,
            ..steps[0].clone()
        };
        let disks = disks.iter().map(|d| d.uid.clone()).collect();
        let facts = Facts { rpo_at_start_us, lease_ms, disks, ..Facts::default() };
        Self { spec, state: State::Running, steps, facts, error: None, cancelled_by: String::new() }
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
        let stream_uid = group.uid.clone();
        let view = proxy_view_name(&group.tenant, &group.id, FAILOVER_VIEW);
        let back = if resumed { RETURN_MS } else { 0 };
        let tell = |side, command, connect_ms, answer_ms| Action::Tell { side, command, connect_ms, answer_ms };
        match step.name {
            StepName::Check | StepName::Finish => Action::Record,
            StepName::Fence => {
                group.hold = true;
                tell(Side::Source, Tell::Fence(v1::Fence { stream_uid, hold: true }), back, FENCE_MS)
            }
            StepName::Drain => match (self.spec.to, self.facts.last_seq) {
                (Choice::Latest, Some(seq)) => Action::Drain { seq, within_ms: DRAIN_MS },
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
                    kind: v1::ViewKind::Failover.into(),
                    reason: reason(&self.spec.reason, "failover"),
                };
                tell(Side::Target, Tell::OpenView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::CloseView => {
                let command = v1::CloseView { view, keep_delta: false };
                tell(Side::Target, Tell::CloseView(command), UNDO_MS, UNDO_MS)
            }
            StepName::ReturnGeneration => {
                // Above the one that was raised: what the source writes from here is another branch.
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
        }
    }

    /// Records what came of the action that [`Self::begin`] returned.
    pub fn apply(&mut self, group: &mut Group, disks: &[(String, String)], reply: Reply, now_ns: u64) {
        let Some(at) = self.current() else { return };
        let name = self.steps[at].name;
        let outcome = if self.state == State::Undoing {
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
            Ok((state, detail)) => {
                step.state = state;
                step.detail = detail;
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
        if self.state == State::Undoing {
            group.phase = GroupPhase::Protecting;
            self.state = State::Failed;
        } else {
            group.phase = GroupPhase::FailedOver { view: FAILOVER_VIEW.to_owned() };
            self.state = State::Done;
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
            State::Running if self.reached(StepName::OpenView) => Err("past the step from which it goes on to its end"),
            State::Running => {
                if self.cancelled_by.is_empty() {
                    by.clone_into(&mut self.cancelled_by);
                }
                Ok(())
            }
        }
    }

    fn given_up(&self) -> (String, String) {
        (
            format!("given up by {}", self.cancelled_by),
            "the source has been let go on; start again when it is wanted".into(),
        )
    }

    /// Before the next step: gives it up if that is asked. A step that was being done is done first.
    fn heed_cancel(&mut self, group: &mut Group) {
        let next = self.steps.iter().find(|s| matches!(s.state, StepState::Pending | StepState::Running));
        let Some(next) = next.filter(|s| s.state == StepState::Pending).map(|s| s.name) else { return };
        if self.state == State::Running && !self.cancelled_by.is_empty() && !self.reached(StepName::OpenView) {
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
        let again = format!("the source has been let go on; look at the target proxy \"{target}\", then start again");
        match (name, reply) {
            (StepName::Fence, Reply::Answer(Outcome::Fenced(fenced))) => {
                self.facts.fence = Some(FenceKind::Confirmed);
                self.facts.last_seq = Some(fenced.last_seq);
                Ok((Done, format!("confirmed: the source holds all I/O, its last record is {}", fenced.last_seq)))
            }
            (StepName::Fence, reply) => {
                let why = why(reply);
                if self.spec.unconfirmed {
                    self.facts.fence = Some(FenceKind::Unconfirmed);
                    return Ok((Done, format!("unconfirmed, as the operator said by name: {why}")));
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
                } else {
                    format!("the target holds records up to {seq} of {last}; the rest did not arrive in time")
                };
                Ok((Done, detail))
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
            (StepName::Lease, Reply::Nothing) => {
                let fenced = self.facts.fence == Some(FenceKind::SelfFenced);
                Ok((Done, if fenced { "the source's lease has run out" } else { "not needed" }.to_owned()))
            }
            (StepName::ResolvePoint, Reply::Answer(Outcome::Point(point))) => {
                let record = convert::point_from_proto(&point);
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
            (StepName::Check | StepName::Finish, Reply::Nothing) => Ok((Done, String::new())),
            (_, reply) => Err((why(reply), again)),
        }
    }

    fn undone(&mut self, group: &Group, name: StepName, reply: Reply) -> (StepState, String) {
        match reply {
            Reply::Answer(Outcome::Error(e)) => (StepState::Skipped, format!("refused: {}", e.message)),
            Reply::Answer(_) | Reply::Nothing | Reply::Drained(_) => (StepState::Done, String::new()),
            Reply::Unreachable(detail) => {
                let proxy = if name == StepName::Release { &group.source } else { &group.target };
                (StepState::Skipped, format!("{detail}; \"{proxy}\" is told when it is back"))
            }
        }
    }

    fn fail(&mut self, group: &mut Group, step: StepName, message: String, remedy: String) {
        self.error = Some(Failure { step, message, remedy });
        self.state = State::Undoing;
        self.steps.retain(|s| s.state != StepState::Pending);
        let undo = [
            (StepName::OpenView, StepName::CloseView),
            (StepName::RaiseGeneration, StepName::ReturnGeneration),
            (StepName::Fence, StepName::Release),
        ];
        for (of, by) in undo {
            if self.reached(of) {
                self.steps.push(pending(by));
            }
        }
        debug_assert!(group.hold || !self.reached(StepName::Fence), "only steps from the fence on can fail");
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
        Reply::Answer(_) | Reply::Drained(_) | Reply::Nothing => {
            "the proxy's answer does not fit the command".to_owned()
        }
    }
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
