//! The verbs about the reverse stream: it is begun and ended, and the group switches to its source by it.
//!
//! At no moment may both the view be written and the source run: the source is let go only after the target has confirmed
//! that the view is closed, and the view is opened again only after the source has confirmed that it holds all I/O.

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;

use super::{
    ANSWER_MS, Action, Awaited, DRAIN_MS, FENCE_MS, Failover, FenceKind, RETURN_MS, Reply, Side, Spec, State, StepName,
    StepState, UNDO_MS, Verb, why,
};
use crate::convert;
use crate::objects::{Disk, Group, GroupPhase, Reverse, View, Way, proxy_view_name};

/// How long proxies may take to report that they have the reverse stream, milliseconds.
const AWAIT_REVERSE_MS: u64 = 30_000;
/// How long the source may take to serve its disks again, milliseconds.
const START_MS: u64 = 30_000;
/// How long the source may take to hold all I/O again, milliseconds.
const HOLD_MS: u64 = 15_000;

/// The phase of a group that was failed back before the operation that settles that, which has come to nothing.
pub(super) fn as_it_was(group: &Group) -> GroupPhase {
    match &group.phase {
        GroupPhase::Settling { view, after, .. } => GroupPhase::FailedBack { view: view.clone(), after: *after },
        other => other.clone(),
    }
}

type Outcomes = Result<(StepState, String), (String, String)>;

impl Failover {
    /// A verb about the reverse stream whose checks have passed. `view` is the one that the group runs from, or ran from;
    /// `reverse` the uid of that stream; `after` the newest record of the target.
    pub fn back(
        spec: Spec,
        disks: &[&Disk],
        view: &View,
        (reverse, after): (&str, u64),
        checked: String,
        now_ns: u64,
    ) -> Self {
        let mut work = Self::new(spec, disks, ("", &view.id), 0, 0, checked, now_ns);
        work.facts.reverse = reverse.to_owned();
        work.facts.after = after;
        // Should it have to be opened again.
        work.facts.point = Some(view.point.clone());
        work.facts.exports = view.exports.clone();
        work
    }

    pub(super) fn begin_back(&mut self, group: &mut Group, name: StepName, resumed: bool) -> Action {
        let forth = group.uid.clone();
        let stream_uid = self.facts.reverse.clone();
        let view = proxy_view_name(&group.tenant, &group.id, &self.facts.leaves);
        let disk_uids = self.facts.disks.clone();
        let undoing = self.state == State::Undoing;
        let back = if resumed { RETURN_MS } else { 0 };
        let tell = |side, command, connect_ms, answer_ms| Action::Tell { side, command, connect_ms, answer_ms };
        match name {
            StepName::ReleaseDisks => {
                let command = Tell::ReleaseDisks(v1::ReleaseDisks { stream_uid: forth });
                tell(Side::Source, command, back, ANSWER_MS)
            }
            StepName::Reverse => {
                group.reverse = Some(Reverse {
                    stream_uid,
                    view: self.facts.leaves.clone(),
                    generation: 1,
                    writer_generation: 1,
                    hold: false,
                });
                Action::Record
            }
            StepName::AwaitReverse => Action::Await { what: Awaited::Reverse, within_ms: AWAIT_REVERSE_MS },
            StepName::CatchUp => Action::CatchUp { way: Way::Back, within_ms: self.spec.within_ms },
            StepName::Fence => {
                if let Some(reverse) = &mut group.reverse {
                    reverse.hold = true;
                }
                tell(Side::Target, Tell::Fence(v1::Fence { stream_uid, hold: true }), back, FENCE_MS)
            }
            StepName::Drain => {
                let seq = self.facts.last_seq.unwrap_or(u64::MAX);
                Action::Drain { way: Way::Back, seq, within_ms: self.spec.within_ms.max(DRAIN_MS) }
            }
            StepName::RaiseGeneration => {
                if self.facts.at_least == 0 {
                    self.facts.at_least = group.reverse.as_ref().map_or(1, |r| r.generation) + 1;
                }
                let at_least = self.facts.at_least;
                let command = v1::RaiseGeneration { stream_uid, disk_uids, reason: "switch".into(), at_least };
                tell(Side::Source, Tell::RaiseGeneration(command), RETURN_MS, ANSWER_MS)
            }
            StepName::Merge => {
                // From here on what the source's disks held is not to be had any more, whatever comes of this.
                group.overwritten = true;
                let seq = self.facts.last_seq.unwrap_or_default();
                Action::Merge(v1::MergeStream { stream_uid, seq, source_uid: forth })
            }
            StepName::LeaveView => {
                let command = v1::CloseView { view, keep_delta: true };
                tell(Side::Target, Tell::CloseView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::EndReverse => {
                // No proxy is to have it any more, before it is told to end it.
                group.reverse = None;
                tell(Side::Target, Tell::Unprotect(v1::Unprotect { stream_uid }), UNDO_MS, ANSWER_MS)
            }
            StepName::DropReverse => {
                let connect = if undoing { UNDO_MS } else { RETURN_MS };
                tell(Side::Source, Tell::DropStream(v1::DropStream { stream_uid }), connect, ANSWER_MS)
            }
            StepName::ReturnGeneration if undoing => {
                let mut at_least = self.facts.at_least;
                if let Some(reverse) = &mut group.reverse {
                    if reverse.writer_generation <= at_least {
                        reverse.writer_generation = at_least.max(reverse.generation) + 1;
                        reverse.generation = reverse.writer_generation;
                    }
                    at_least = reverse.generation;
                }
                let command = v1::RaiseGeneration { stream_uid, disk_uids, reason: "switch undone".into(), at_least };
                tell(Side::Source, Tell::RaiseGeneration(command), UNDO_MS, UNDO_MS)
            }
            StepName::Release if undoing => {
                if let Some(reverse) = &mut group.reverse {
                    reverse.hold = false;
                }
                tell(Side::Target, Tell::Fence(v1::Fence { stream_uid, hold: false }), UNDO_MS, UNDO_MS)
            }
            StepName::ReturnGeneration => {
                if self.facts.generation == 0 {
                    self.facts.generation = group.generation + 1;
                }
                let at_least = self.facts.generation;
                (group.generation, group.writer_generation) = (at_least, at_least);
                let command =
                    v1::RaiseGeneration { stream_uid: forth, disk_uids, reason: "failed back".into(), at_least };
                tell(Side::Target, Tell::RaiseGeneration(command), UNDO_MS, UNDO_MS)
            }
            StepName::Release => {
                group.hold = false;
                Action::Await { what: Awaited::Started, within_ms: START_MS }
            }
            StepName::HoldAgain => {
                group.hold = true;
                Action::Await { what: Awaited::Held, within_ms: HOLD_MS }
            }
            StepName::TakeAgain => {
                let at_least = group.writer_generation + 1;
                group.generation = at_least;
                let command =
                    v1::RaiseGeneration { stream_uid: forth, disk_uids, reason: "switch undone".into(), at_least };
                tell(Side::Target, Tell::RaiseGeneration(command), UNDO_MS, UNDO_MS)
            }
            StepName::ReopenView => {
                let command = v1::OpenView {
                    stream_uid: forth,
                    view,
                    seq: self.facts.point.as_ref().map_or(0, |p| p.seq),
                    disk_uids,
                    writable: true,
                    kind: v1::ViewKind::Failover.into(),
                    reason: "switch undone".into(),
                };
                tell(Side::Target, Tell::OpenView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::Discard => {
                let command = v1::CloseView { view, keep_delta: false };
                tell(Side::Target, Tell::CloseView(command), RETURN_MS, ANSWER_MS)
            }
            StepName::Check
            | StepName::Lease
            | StepName::ResolvePoint
            | StepName::OpenView
            | StepName::CloseView
            | StepName::Finish
            | StepName::Hold => Action::Record,
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
        }
    }

    pub(super) fn apply_back(&mut self, group: &mut Group, name: StepName, reply: Reply) -> Outcomes {
        use StepState::{Done, Running, Skipped};
        if self.state == State::Undoing {
            return Ok(self.undone_back(group, name, reply));
        }
        let given_up = !self.cancelled_by.is_empty();
        let (source, target) = (group.source.clone(), group.target.clone());
        let on = "the group runs on from its view";
        let rest = format!("{on}; wait until it is ready (see `failback status`), or allow more time");
        let look = |proxy: &str| format!("{on}; look at the proxy \"{proxy}\", then start again");
        match (name, reply) {
            (name, reply) if name.is_of_machines() => self.machines_done(group, name, reply),
            (StepName::Check | StepName::Reverse, Reply::Nothing) => Ok((Done, String::new())),
            (StepName::ReleaseDisks, Reply::Answer(Outcome::Done(_))) => {
                Ok((Done, "the source has let its disks go".into()))
            }
            (StepName::AwaitReverse, Reply::Seen) => {
                Ok((Done, "what is written to the view is protected to the source".into()))
            }
            (StepName::AwaitReverse | StepName::Merge, Reply::NotSeen(_)) if given_up => Err(self.given_up()),
            (StepName::AwaitReverse, reply) => Err((
                format!("the reverse stream has not begun: {}", why(reply)),
                format!("{on}; look at the proxies \"{source}\" and \"{target}\", then start again"),
            )),
            (StepName::CatchUp, Reply::CaughtUp(0)) => {
                Ok((Done, "what is written to the view is at the source at once".into()))
            }
            (StepName::CatchUp, Reply::CaughtUp(behind)) => Err((
                format!("the source is {behind} records behind the view, and the time for catching up is over"),
                rest,
            )),
            (StepName::Fence, Reply::Answer(Outcome::Fenced(fenced))) => {
                self.facts.fence = Some(FenceKind::Confirmed);
                self.facts.last_seq = Some(fenced.last_seq);
                Ok((Done, format!("the view's hosts are held, its last record is {}", fenced.last_seq)))
            }
            (StepName::Fence, reply) => Err((
                format!("the target did not confirm that it holds the view's hosts: {}", why(reply)),
                look(&target),
            )),
            (StepName::Drain, Reply::Drained(seq)) => {
                let last = self.facts.last_seq.unwrap_or(u64::MAX);
                if seq >= last {
                    return Ok((Done, "everything that was written to the view is at the source".into()));
                }
                let message =
                    format!("the source holds records up to {seq} of {last}: the rest did not arrive in time");
                Err((message, rest))
            }
            (StepName::RaiseGeneration, Reply::Answer(Outcome::Generation(raised)))
                if raised.generation >= self.facts.at_least =>
            {
                if let Some(reverse) = &mut group.reverse {
                    reverse.generation = raised.generation;
                }
                Ok((Done, format!("the reverse stream is at generation {}", raised.generation)))
            }
            (StepName::Merge, Reply::Answer(Outcome::Merged(merged))) => {
                let (so_far, all, written) = (merged.merged_bytes, merged.total_bytes, merged.written_bytes);
                match merged.complete {
                    true => Ok((Done, format!("{written} bytes were written to the source's disks"))),
                    false if given_up => Err(self.given_up()),
                    false => Ok((
                        Running,
                        format!("{so_far} of {all} bytes of the source's disks looked at, {written} written"),
                    )),
                }
            }
            (StepName::LeaveView, Reply::Answer(Outcome::Done(_))) => {
                Ok((Done, format!("\"{}\" is closed, and what was written to it is kept", self.facts.leaves)))
            }
            (StepName::LeaveView, reply) => {
                Err((format!("the view \"{}\" was not closed: {}", self.facts.leaves, why(reply)), look(&target)))
            }
            // What was written there is at the source, or was not wanted: the proxy ends it when it is back.
            (StepName::EndReverse, reply) => Ok(self.ended_reverse(group, name, reply)),
            (StepName::DropReverse, reply) if self.spec.verb == Verb::CancelFailback => {
                Ok(self.ended_reverse(group, name, reply))
            }
            (StepName::DropReverse, Reply::Answer(Outcome::Done(_))) => {
                Ok((Done, "the source holds nothing of the reverse stream any more".into()))
            }
            (StepName::DropReverse, reply) => {
                group.leave(&self.facts.reverse, false, true);
                Err((format!("the reverse stream still has the source's disks: {}", why(reply)), look(&source)))
            }
            // The desired state tells it if it has not heard.
            (StepName::ReturnGeneration, reply) => Ok(self.undone(group, name, reply)),
            (StepName::Release, Reply::Seen) => Ok((Done, "the source serves its disks".into())),
            (StepName::Release, reply) => {
                Err((format!("the source does not serve its disks: {}", why(reply)), look(&source)))
            }
            (StepName::Discard, Reply::Answer(Outcome::Done(_))) => {
                group.overwritten = false;
                Ok((Done, format!("what was written to \"{}\" is deleted there", self.facts.leaves)))
            }
            (StepName::Discard, reply) => Err((
                format!("the target keeps what was written to its view: {}", why(reply)),
                format!("nothing has changed; look at the proxy \"{target}\", then start again"),
            )),
            (StepName::ReleaseDisks | StepName::RaiseGeneration | StepName::Merge, reply) => {
                Err((why(reply), look(&source)))
            }
            (StepName::CatchUp | StepName::Drain, reply) => Err((why(reply), rest)),
            (_, reply) => Ok((Skipped, why(reply))),
        }
    }

    /// What came of ending the reverse stream at one of its ends: whoever has not done it is told again.
    fn ended_reverse(&self, group: &mut Group, name: StepName, reply: Reply) -> (StepState, String) {
        if matches!(reply, Reply::Answer(Outcome::Done(_))) {
            return (StepState::Done, String::new());
        }
        let at_target = name == StepName::EndReverse;
        group.leave(&self.facts.reverse, at_target, !at_target);
        let proxy = if at_target { &group.target } else { &group.source };
        (StepState::Skipped, format!("{}; \"{proxy}\" is told again until it has done so", why(reply)))
    }

    fn undone_back(&mut self, group: &mut Group, name: StepName, reply: Reply) -> (StepState, String) {
        match name {
            StepName::EndReverse | StepName::DropReverse => self.ended_reverse(group, name, reply),
            StepName::HoldAgain if reply != Reply::Seen => {
                // Nobody knows whether it runs. So it may, and the view stays closed.
                group.hold = false;
                self.steps.retain(|s| s.state != StepState::Pending);
                let why = why(reply);
                (StepState::Skipped, format!("the source did not confirm that it holds all I/O, so it may run: {why}"))
            }
            StepName::ReopenView => match reply {
                Reply::Answer(Outcome::View(opened)) if !opened.exports.is_empty() => {
                    self.facts.exports = opened.exports.iter().map(convert::export_from_proto).collect();
                    (StepState::Done, format!("{} disks", opened.exports.len()))
                }
                reply => self.undone(group, name, reply),
            },
            // Of the reverse stream: the view's hosts are at the target.
            StepName::Release => match reply {
                Reply::Unreachable(detail) => {
                    (StepState::Skipped, format!("{detail}; \"{}\" is told when it is back", group.target))
                }
                reply => self.undone(group, name, reply),
            },
            _ => self.undone(group, name, reply),
        }
    }

    /// The steps that undo what has been reached.
    pub(super) fn undo_back(&self) -> Vec<StepName> {
        use StepName::*;
        let undoing = |steps: &[(StepName, StepName)]| {
            steps.iter().filter(|(of, _)| self.reached(*of)).map(|(_, by)| *by).collect::<Vec<_>>()
        };
        let replica = (StopReplica, RestartReplica);
        match self.spec.verb {
            Verb::Failback if self.reached(Reverse) => vec![EndReverse, DropReverse],
            // Its machines are switched off once it holds: where nobody confirms that, they are what runs.
            Verb::SwitchFailback if self.reached(StepName::Release) => undoing(&[
                (Release, HoldAgain),
                (StartSource, PowerOff),
                (Release, TakeAgain),
                (Release, ReopenView),
                replica,
            ]),
            Verb::SwitchFailback if self.reached(EndReverse) => undoing(&[(EndReverse, ReopenView), replica]),
            Verb::SwitchFailback => undoing(&[(RaiseGeneration, ReturnGeneration), (Fence, Release), replica]),
            _ => Vec::new(),
        }
    }

    /// What the group is once this has ended.
    pub(super) fn phase_back(&self, group: &Group, undone: bool) -> GroupPhase {
        let view = self.facts.leaves.clone();
        let failed_back = || GroupPhase::FailedBack { view: view.clone(), after: self.facts.after };
        let held = self.steps.iter().any(|s| s.name == StepName::HoldAgain && s.state == StepState::Done);
        match (self.spec.verb, undone) {
            (Verb::CommitFailback, true) => as_it_was(group),
            (Verb::CommitFailback, false) => GroupPhase::Protecting,
            (Verb::SwitchFailback, false) => failed_back(),
            (Verb::SwitchFailback, true) if self.reached(StepName::HoldAgain) && !held => failed_back(),
            _ if group.reverse.is_some() => GroupPhase::FailingBack { view },
            _ => GroupPhase::FailedOver { view },
        }
    }
}
