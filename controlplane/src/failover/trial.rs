//! A test failover: the machines of a group started from a view that is thrown away, beside what runs.
//!
//! ```text
//! test-failover     check · open-view · start-test · await-test · [hold] · stop-test · close-view
//!                     │ any failure up to the hold, or if it is given up: stop-test · close-view
//! ```
//! The group stays as it is, whatever happens here. What is left of the test is removed by the same two steps on every way
//! out; whom they do not reach is asked again, for [`REMOVE_NS`] at most.

use super::{Action, Failover, Reply, State, StepName, StepState, Verb};

/// Before what could not be removed is tried again, milliseconds.
const AGAIN_MS: u64 = 2_000;
/// How long that is tried, nanoseconds. Afterwards what is left is named, and left.
const REMOVE_NS: u64 = 24 * 3600 * 1_000_000_000;

impl Verb {
    /// Leaves the group as it is.
    pub fn is_trial(self) -> bool {
        self == Self::TestFailover
    }
}

impl Failover {
    /// What removes the test: it never fails, on whatever way out.
    pub(super) fn removes(&self, step: StepName) -> bool {
        self.spec.verb.is_trial() && matches!(step, StepName::StopTest | StepName::CloseView)
    }

    /// What of a hold is left.
    pub(super) fn hold_action(&self, now_ns: u64) -> Action {
        let begun = self.steps.iter().find(|s| s.name == StepName::Hold).map_or(now_ns, |s| s.started_ns);
        Action::Wait { ms: self.spec.hold_ms.saturating_sub(now_ns.saturating_sub(begun) / 1_000_000) }
    }

    /// Its end, by the time or by somebody who has seen enough.
    pub(super) fn held(&self) -> (StepState, String) {
        let by = &self.cancelled_by;
        (StepState::Done, if by.is_empty() { String::new() } else { format!("ended by {by}") })
    }

    /// It waits for what [`Self::cancel`] cuts short.
    pub fn waits_for_cancel(&self) -> bool {
        self.state == State::Running
            && self
                .steps
                .iter()
                .any(|s| s.state == StepState::Running && matches!(s.name, StepName::Lease | StepName::Hold))
    }

    /// A removal that was not done is tried again after a while.
    pub(super) fn try_again(&mut self, at: usize, state: StepState, now_ns: u64) -> StepState {
        let step = &self.steps[at];
        let over = now_ns.saturating_sub(step.started_ns) > REMOVE_NS;
        if state != StepState::Skipped || over || !self.removes(step.name) {
            return state;
        }
        self.facts.pausing = true;
        StepState::Running
    }

    /// The pause before that.
    pub(super) fn pause(&self) -> Option<Action> {
        self.facts.pausing.then_some(Action::Wait { ms: AGAIN_MS })
    }

    /// True if what came back is the end of a pause.
    pub(super) fn paused(&mut self, reply: &Reply) -> bool {
        std::mem::take(&mut self.facts.pausing) && *reply == Reply::Nothing
    }
}
