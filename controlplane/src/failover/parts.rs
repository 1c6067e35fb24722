//! What a failover is made of: what was asked for, its steps, what was found out.

use serde::{Deserialize, Serialize};

use super::{Driven, FAILOVER_VIEW};
use crate::objects::{ExportRecord, PointRecord};

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

/// What is to be done with a group.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// It is to run at its target, from a point.
    #[default]
    Failover,
    /// The same, with nothing lost: its source is there and hands over.
    PlannedFailover,
    /// It is to run at its source again, as that left it.
    UndoFailover,
    /// Failed over, it is to run from another point, or from what it had written from an earlier one.
    ChangePoint,
    /// Failed over, what is written to its view is to be protected back to its source.
    Failback,
    /// That is to end; it stays failed over.
    CancelFailback,
    /// Failing back, it is to run at its source, with all that was written to its view.
    SwitchFailback,
    /// Failed back, it stays so: what its target keeps of the view goes.
    CommitFailback,
    /// Failed back, it is to run from its view again, as that was left.
    UndoFailback,
    /// Its machines are started from a view that is thrown away, and looked at.
    TestFailover,
}

impl Verb {
    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failover => "failover",
            Self::PlannedFailover => "planned-failover",
            Self::UndoFailover => "undo-failover",
            Self::ChangePoint => "change-point",
            Self::Failback => "failback",
            Self::CancelFailback => "cancel-failback",
            Self::SwitchFailback => "switch-failback",
            Self::CommitFailback => "commit-failback",
            Self::UndoFailback => "undo-failback",
            Self::TestFailover => "test-failover",
        }
    }

    /// Begins with a group that is failed over.
    pub fn is_of_failed_over(self) -> bool {
        matches!(self, Self::UndoFailover | Self::ChangePoint)
    }

    /// Is about the reverse stream of a failback. One that is undone is a failover like another.
    pub fn is_back(self) -> bool {
        matches!(self, Self::Failback | Self::CancelFailback | Self::SwitchFailback | Self::CommitFailback)
    }
}

/// What was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Which point; of no meaning when a failover is undone.
    pub to: Choice,
    /// Go on if the source cannot be reached.
    pub unconfirmed: bool,
    /// For a person.
    pub reason: String,
    /// What is to be done.
    #[serde(default)]
    pub verb: Verb,
    /// What was written while it was failed over is deleted, and not kept as a branch.
    #[serde(default)]
    pub discard: bool,
    /// How long what the source has captured may take to arrive in a planned failover, milliseconds.
    #[serde(default)]
    pub within_ms: u64,
    /// How long a test is left running once it answers, milliseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hold_ms: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(ms: &u64) -> bool {
    *ms == 0
}

impl Spec {
    /// A verb without any choice made.
    pub fn new(verb: Verb, to: Choice) -> Self {
        Self { verb, to, unconfirmed: false, discard: false, within_ms: 0, hold_ms: 0, reason: String::new() }
    }
}

/// The steps.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepName {
    /// It can be done: before anything is stored.
    Check,
    /// What the source captures arrives without delay: before its I/O is held for what is still to come.
    CatchUp,
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
    /// The view that it has run from is closed: nobody writes there any more.
    LeaveView,
    /// What was written to the view that was left is deleted.
    Discard,
    /// The group runs from the view.
    Finish,
    /// Undoing: the view goes.
    CloseView,
    /// Undoing: the source gets a generation above the one that was raised.
    ReturnGeneration,
    /// Undoing: the source's I/O goes on. Of a switch: the source starts; undone: the view's hosts go on.
    Release,
    /// The machines are switched off at the source.
    StopSource,
    /// A source that nobody can ask: its machines' power is cut.
    PowerOff,
    /// The replicas are switched on.
    StartReplica,
    /// They answer.
    AwaitReplica,
    /// The replicas are switched off.
    StopReplica,
    /// Undoing: the replicas are switched on again, from the view that the group runs from.
    RestartReplica,
    /// What was switched off at the source is switched on again.
    StartSource,
    /// They answer.
    AwaitSource,
    /// The source lets go of the disks that it holds, so that they can be the base of the reverse stream.
    ReleaseDisks,
    /// The reverse stream is to be.
    Reverse,
    /// Both proxies have the reverse stream.
    AwaitReverse,
    /// What the reverse stream holds is written to the source's disks.
    Merge,
    /// The reverse stream ends at the target, which wrote it.
    EndReverse,
    /// What the source holds of the reverse stream is deleted; its disks stay as they are.
    DropReverse,
    /// Undoing: the source, which was let go, holds all I/O again.
    HoldAgain,
    /// Undoing: its disks are taken from the source again.
    TakeAgain,
    /// Undoing: the view that was left is opened as it was.
    ReopenView,
    /// Instances to be thrown away are switched on.
    StartTest,
    /// They answer.
    AwaitTest,
    /// They are left running for a while.
    Hold,
    /// They are switched off.
    StopTest,
}

impl StepName {
    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::CatchUp => "catch-up",
            Self::Fence => "fence",
            Self::Drain => "drain",
            Self::RaiseGeneration => "raise-generation",
            Self::Lease => "lease",
            Self::ResolvePoint => "resolve-point",
            Self::OpenView => "open-view",
            Self::LeaveView => "leave-view",
            Self::Discard => "discard",
            Self::Finish => "finish",
            Self::CloseView => "close-view",
            Self::ReturnGeneration => "return-generation",
            Self::Release => "release",
            Self::StopSource => "stop-source",
            Self::PowerOff => "power-off",
            Self::StartReplica => "start-replica",
            Self::AwaitReplica => "await-replica",
            Self::StopReplica => "stop-replica",
            Self::RestartReplica => "restart-replica",
            Self::StartSource => "start-source",
            Self::AwaitSource => "await-source",
            Self::ReleaseDisks => "release-disks",
            Self::Reverse => "reverse",
            Self::AwaitReverse => "await-reverse",
            Self::Merge => "merge",
            Self::EndReverse => "end-reverse",
            Self::DropReverse => "drop-reverse",
            Self::HoldAgain => "hold-again",
            Self::TakeAgain => "take-again",
            Self::ReopenView => "reopen-view",
            Self::StartTest => "start-test",
            Self::AwaitTest => "await-test",
            Self::Hold => "hold",
            Self::StopTest => "stop-test",
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
    /// Done.
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
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
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
    /// Id of the view that is opened.
    #[serde(default = "first_view")]
    pub view: String,
    /// Id of the view that it has run from and leaves; empty if it was not failed over.
    #[serde(default)]
    pub leaves: String,
    /// The view is there already, closed, with what was written to it.
    #[serde(default)]
    pub reopens: bool,
    /// The group's machines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<Driven>,
    /// Exports of the view that it leaves, for machines that go on with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<ExportRecord>,
    /// Uid of the reverse stream; empty if it has no part in this.
    #[serde(default)]
    pub reverse: String,
    /// The newest record of the target before a switch.
    #[serde(default)]
    pub after: u64,
    /// What could not be removed is tried again after a pause.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pausing: bool,
}

fn first_view() -> String {
    FAILOVER_VIEW.to_owned()
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
