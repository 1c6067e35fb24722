//! A run of a plan as a machine: which steps are begun, what each does next, what its outcome changes. No I/O, no clock.
//!
//! ```text
//! waiting ─▶ before ─▶ failover ─▶ ready ─▶ then ─▶ over
//!    │       scripts   an opera-   does it  scripts
//!    │                 tion of its answer?
//!    │                 group's     └─ each is tried again after a pause, as often as the plan says; then the step has failed:
//!    └─ skipped: the group is not as the verb needs it            what comes after it is not begun, the others go on
//! ```
//! What is begun is recorded before it is done ([`Run::begin`]). The operation of a group is asked for by an id that is made of
//! the run, the step and the try: whoever asks again finds it, so a coordinator that restarts never starts a second one. A stop
//! lets what is being done end, without another try, and begins nothing more. Resuming is another run, which takes over how far
//! each step was.

use serde::{Deserialize, Serialize};

use super::{Moved, Plan, PlanStep, PlanVerb, Script};
use crate::failover::{Choice, StepState};
use crate::names::{Kind, Name};

/// Before something that has failed is tried again, milliseconds.
const PAUSE_MS: u64 = 2_000;

/// What was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// What is done.
    pub verb: PlanVerb,
    /// Which point of each group.
    pub to: Choice,
    /// Groups hand over with nothing lost.
    pub planned: bool,
    /// Go on where a source cannot be reached.
    pub unconfirmed: bool,
    /// Of an undo: what was written is deleted.
    pub discard: bool,
    /// Of an undo: also while hosts have disks open.
    pub force: bool,
    /// For a person.
    pub reason: String,
}

/// What of a step is being done.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// It has not begun.
    Waiting,
    /// Scripts before it.
    Before,
    /// The operation of its group.
    Failover,
    /// Does it answer?
    Ready,
    /// Scripts after it.
    Then,
    /// Nothing more.
    Over,
}

impl Stage {
    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Before => "before",
            Self::Failover => "failover",
            Self::Ready => "ready",
            Self::Then => "then",
            Self::Over => "over",
        }
    }
}

/// A step of a run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunStep {
    /// As the plan has it.
    pub wanted: PlanStep,
    /// How far it is.
    pub state: StepState,
    /// What is being done, or was last.
    pub stage: Stage,
    /// Which script of that.
    pub script: usize,
    /// Which try of that, from 1.
    pub attempt: u32,
    /// It has been begun by this coordinator, or the one before it.
    pub told: bool,
    /// Since when it waits for another try, nanoseconds since the Unix epoch; 0 if it does not.
    pub paused_ns: u64,
    /// It did not begin from its beginning: how long it took says nothing.
    pub midway: bool,
    /// What was found or done.
    pub detail: String,
    /// What to do if it has failed.
    pub remedy: String,
    /// Uid of the newest operation that it started.
    pub operation: String,
    /// Ids of the group's machines.
    pub machines: Vec<String>,
    /// Last write of the point; 0 if there is none.
    pub point_seq: u64,
    /// When that was written.
    pub point_ns: u64,
    /// Nanoseconds since the Unix epoch; 0 before.
    pub started_ns: u64,
    /// When it answered.
    pub answered_ns: u64,
    /// When it ended.
    pub ended_ns: u64,
}

/// How a run stands.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// It goes on.
    Running,
    /// All steps are done, or were passed over.
    Done,
    /// A step has failed.
    Failed,
    /// It was stopped before all steps were begun.
    Stopped,
}

/// A run of a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Uid.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Rises with each change.
    pub version: u64,
    /// Id of the plan.
    pub plan: String,
    /// As given.
    pub request_id: String,
    /// Who asked.
    pub actor: String,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Nanoseconds since the Unix epoch; 0 before the end.
    pub ended_ns: u64,
    /// What was asked for.
    pub spec: Spec,
    /// Steps at once.
    pub parallel: u32,
    /// In the plan's order.
    pub steps: Vec<RunStep>,
    /// How it stands.
    pub state: RunState,
    /// By whom it is to be stopped; empty if by nobody.
    pub stopped_by: String,
    /// Uid of the run that it goes on with; empty if it began anew.
    pub continues: String,
}

/// How a step's group stands.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Stands {
    /// It runs at its source.
    AtSource,
    /// It is failed over, by this plan or otherwise.
    Over {
        /// By this plan.
        ours: bool,
    },
    /// There is no such group any more.
    Gone,
}

/// Why a verb has nothing to do for a group that stands so.
pub fn passed_over(verb: PlanVerb, standing: Stands) -> Option<&'static str> {
    match (verb, standing) {
        (PlanVerb::Run, Stands::Over { .. }) => Some("failed over already"),
        (PlanVerb::Undo, Stands::AtSource) => Some("not failed over"),
        (PlanVerb::Undo, Stands::Over { ours: false }) => Some("failed over, but not by this plan"),
        _ => None,
    }
}

/// What is to be done for a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Task {
    /// A script.
    Script {
        /// Which.
        script: Script,
        /// By what its proxy knows it again: asked twice it is run once, as long as the proxy remembers.
        id: String,
    },
    /// An operation of its group, started only if there is none by this id.
    Failover {
        /// For the group's verb.
        request_id: String,
    },
    /// Look until it answers, for a bounded time.
    Ready,
}

/// A task that is begun.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Begun {
    /// Of which step, by its place.
    pub step: usize,
    /// What.
    pub task: Task,
}

/// What comes next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Next {
    /// All at once.
    pub tasks: Vec<Begun>,
    /// Ask again after so long, milliseconds, if no reply comes before.
    pub wake_ms: Option<u64>,
    /// It has ended.
    pub ended: bool,
}

/// How the operation of a group has ended.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Child {
    /// Its uid.
    pub uid: String,
    /// What was wanted has been done.
    pub done: bool,
    /// The group's machines answer, as they are defined to.
    pub answered: bool,
    /// When they did, nanoseconds since the Unix epoch; 0 for now.
    pub answered_ns: u64,
    /// Uid of the group.
    pub group_uid: String,
    /// Generation of its disks.
    pub generation: u64,
    /// Last write of its point, and when that was written.
    pub point: Option<(u64, u64)>,
    /// What is not as it should be, for a person.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

/// What came of a task.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// A script ended well; it answers.
    Yes(String),
    /// It did not, and why.
    No {
        /// What went wrong.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// The operation has ended.
    Ended(Child),
}

fn fresh(wanted: &PlanStep, machines: Vec<String>) -> RunStep {
    RunStep {
        wanted: wanted.clone(),
        state: StepState::Pending,
        stage: Stage::Waiting,
        script: 0,
        attempt: 1,
        told: false,
        paused_ns: 0,
        midway: false,
        detail: String::new(),
        remedy: String::new(),
        operation: String::new(),
        machines,
        point_seq: 0,
        point_ns: 0,
        started_ns: 0,
        answered_ns: 0,
        ended_ns: 0,
    }
}

/// Left of a time since `from`, milliseconds; nothing if it is over, or the clock has been set back.
fn left(from_ns: u64, ms: u64, now_ns: u64) -> Option<u64> {
    let passed = now_ns.checked_sub(from_ns)?;
    let left = (ms * 1_000_000).checked_sub(passed)?;
    Some(left.div_ceil(1_000_000)).filter(|left| *left > 0)
}

impl Run {
    /// A run of a plan from its beginning. `machines` gives the ids of a group's.
    pub fn new(
        plan: &Plan,
        uid: String,
        spec: Spec,
        (actor, request_id): (&str, &str),
        machines: impl Fn(&str) -> Vec<String>,
        now_ns: u64,
    ) -> Self {
        Self {
            uid,
            tenant: plan.tenant.clone(),
            version: 1,
            plan: plan.id.clone(),
            request_id: request_id.to_owned(),
            actor: actor.to_owned(),
            created_ns: now_ns,
            ended_ns: 0,
            spec,
            parallel: plan.parallel,
            steps: plan.steps.iter().map(|step| fresh(step, machines(&step.group))).collect(),
            state: RunState::Running,
            stopped_by: String::new(),
            continues: String::new(),
        }
    }

    /// Goes on with a run that was stopped, or has failed: what was done stays done, what has failed begins where it failed.
    #[must_use]
    pub fn continuing(mut self, before: &Self) -> Self {
        self.continues.clone_from(&before.uid);
        for step in &mut self.steps {
            let same = |old: &&RunStep| old.wanted.id == step.wanted.id && old.wanted.group == step.wanted.group;
            let Some(old) = before.steps.iter().find(same) else { continue };
            step.operation.clone_from(&old.operation);
            (step.point_seq, step.point_ns) = (old.point_seq, old.point_ns);
            match old.state {
                StepState::Done => {
                    step.state = StepState::Skipped;
                    step.stage = Stage::Over;
                    step.detail = "done by the run before".to_owned();
                }
                StepState::Skipped => {
                    step.state = StepState::Skipped;
                    step.stage = Stage::Over;
                    step.detail.clone_from(&old.detail);
                }
                StepState::Failed => {
                    (step.stage, step.script) = (old.stage, old.script);
                    step.midway = old.stage > Stage::Waiting;
                }
                StepState::Pending | StepState::Running => {}
            }
        }
        self
    }

    /// Its name.
    pub fn name(&self) -> Name {
        Name::new(&self.tenant, Kind::Operation, &self.uid)
    }

    /// As the API has the verb.
    pub fn verb(&self) -> &'static str {
        match self.spec.verb {
            PlanVerb::Run => "run-plan",
            PlanVerb::Test => "test-plan",
            PlanVerb::Undo => "undo-plan",
        }
    }

    /// True once nothing is left to do.
    pub fn ended(&self) -> bool {
        self.state != RunState::Running
    }

    /// Places of the steps that come before one, in this verb's order.
    fn earlier(&self, at: usize) -> Vec<usize> {
        let step = &self.steps[at].wanted;
        let before = |other: &PlanStep| match self.spec.verb {
            PlanVerb::Undo => other.after.contains(&step.id),
            PlanVerb::Run | PlanVerb::Test => step.after.contains(&other.id),
        };
        (0..self.steps.len()).filter(|i| before(&self.steps[*i].wanted)).collect()
    }

    /// Whether a step may begin: nothing if not as things are; or in so many milliseconds, 0 for now.
    fn may_begin(&self, at: usize, now_ns: u64) -> Option<u64> {
        let mut wait = 0;
        for i in self.earlier(at) {
            let earlier = &self.steps[i];
            match earlier.state {
                StepState::Skipped => {}
                StepState::Done if self.spec.verb == PlanVerb::Undo => {}
                StepState::Done => {
                    wait = wait.max(left(earlier.ended_ns, earlier.wanted.delay_ms, now_ns).unwrap_or(0));
                }
                StepState::Pending | StepState::Running | StepState::Failed => return None,
            }
        }
        Some(wait)
    }

    /// Records what is begun next; to be stored *before* it is done. `resumed`: by a coordinator that has just begun, to which
    /// nothing that the one before it was doing will be answered.
    pub fn begin(&mut self, stands: &dyn Fn(&RunStep) -> Stands, resumed: bool, now_ns: u64) -> Next {
        let mut next = Next::default();
        if self.ended() {
            return Next { ended: true, ..next };
        }
        let stopping = !self.stopped_by.is_empty();
        let wake = |ms: u64, next: &mut Next| next.wake_ms = Some(next.wake_ms.map_or(ms, |least| least.min(ms)));
        for at in 0..self.steps.len() {
            let step = &mut self.steps[at];
            if step.state != StepState::Running {
                continue;
            }
            if resumed {
                step.told = false;
            }
            if step.told {
                continue;
            }
            if step.paused_ns > 0 {
                if stopping {
                    step.state = StepState::Failed;
                    step.ended_ns = now_ns;
                    continue;
                }
                if let Some(ms) = left(step.paused_ns, PAUSE_MS, now_ns) {
                    wake(ms, &mut next);
                    continue;
                }
                step.paused_ns = 0;
            }
            next.tasks.push(self.tell(at));
        }
        // What is skipped may let another one begin.
        let mut order: Vec<usize> = (0..self.steps.len()).collect();
        if self.spec.verb == PlanVerb::Undo {
            order.reverse();
        }
        for at in order {
            if stopping || self.steps[at].state != StepState::Pending {
                continue;
            }
            let Some(wait) = self.may_begin(at, now_ns) else { continue };
            if wait > 0 {
                wake(wait, &mut next);
            } else if self.count(StepState::Running) < self.parallel as usize {
                let standing = stands(&self.steps[at]);
                if self.start(at, standing, now_ns) {
                    next.tasks.push(self.tell(at));
                }
            }
        }
        // In an order that is a list's, one pass is enough: whatever a step waits for stands before it.
        if self.count(StepState::Running) == 0 && next.wake_ms.is_none() {
            self.end(now_ns);
            next.ended = true;
        }
        next
    }

    fn count(&self, state: StepState) -> usize {
        self.steps.iter().filter(|step| step.state == state).count()
    }

    /// Begins a step, unless there is nothing to do for it.
    fn start(&mut self, at: usize, standing: Stands, now_ns: u64) -> bool {
        let verb = self.spec.verb;
        let step = &mut self.steps[at];
        let moves = step.stage <= Stage::Failover;
        let skipped = match (verb, standing) {
            (_, Stands::Gone) => {
                step.state = StepState::Failed;
                step.detail = "its group does not exist any more".to_owned();
                step.remedy = "take it out of the plan".to_owned();
                step.ended_ns = now_ns;
                return false;
            }
            _ if moves => passed_over(verb, standing),
            _ => None,
        };
        if let Some(why) = skipped {
            step.state = StepState::Skipped;
            step.stage = Stage::Over;
            step.detail = why.to_owned();
            step.ended_ns = now_ns;
            return false;
        }
        if verb == PlanVerb::Run && !moves && standing == Stands::AtSource {
            // Somebody has brought it back meanwhile.
            (step.stage, step.script) = (Stage::Waiting, 0);
        }
        step.state = StepState::Running;
        step.started_ns = now_ns;
        step.attempt = 1;
        if step.stage == Stage::Waiting {
            step.stage = Stage::Before;
        }
        self.settle(at, now_ns);
        self.steps[at].state == StepState::Running
    }

    fn scripts(&self, at: usize) -> Vec<Script> {
        let step = &self.steps[at];
        step.wanted.scripts(self.spec.verb, step.stage == Stage::Then).into_iter().cloned().collect()
    }

    /// Goes over what there is nothing to do in.
    fn settle(&mut self, at: usize, now_ns: u64) {
        let scripts = self.scripts(at).len();
        let step = &mut self.steps[at];
        match step.stage {
            Stage::Before if step.script >= scripts => {
                (step.stage, step.script, step.attempt) = (Stage::Failover, 0, 1);
            }
            Stage::Then if step.script >= scripts => {
                step.stage = Stage::Over;
                step.state = StepState::Done;
                step.ended_ns = now_ns;
            }
            _ => {}
        }
    }

    fn tell(&mut self, at: usize) -> Begun {
        let scripts = self.scripts(at);
        let id = format!("{}.{at}.{}", self.uid, self.steps[at].attempt);
        let step = &mut self.steps[at];
        step.told = true;
        let task = match step.stage {
            Stage::Before | Stage::Then => {
                let script = scripts[step.script].clone();
                Task::Script { script, id: format!("{id}.{}.{}", step.stage.as_str(), step.script) }
            }
            Stage::Ready => Task::Ready,
            Stage::Waiting | Stage::Failover | Stage::Over => Task::Failover { request_id: id },
        };
        Begun { step: at, task }
    }

    /// Applies what came of a step's task. `moved` is what the plan has failed over.
    pub fn apply(&mut self, at: usize, reply: Reply, moved: &mut Vec<Moved>, now_ns: u64) {
        let verb = self.spec.verb;
        let step = &mut self.steps[at];
        if step.state != StepState::Running || !step.told {
            return;
        }
        step.told = false;
        match (step.stage, reply) {
            (_, Reply::No { why, remedy }) => self.fail(at, why, remedy, now_ns),
            (Stage::Failover, Reply::Ended(child)) if !child.done => {
                step.operation.clone_from(&child.uid);
                self.fail(at, child.why, child.remedy, now_ns);
            }
            (Stage::Failover, Reply::Ended(child)) => {
                step.operation = child.uid;
                step.detail = child.why;
                if let Some((seq, ns)) = child.point {
                    (step.point_seq, step.point_ns) = (seq, ns);
                }
                moved.retain(|m| verb == PlanVerb::Test || m.group_uid != child.group_uid);
                if verb == PlanVerb::Run {
                    moved.push(Moved { group_uid: child.group_uid, generation: child.generation });
                }
                (step.script, step.attempt) = (0, 1);
                if verb == PlanVerb::Run && (step.wanted.check.is_some() || !child.answered) {
                    step.stage = Stage::Ready;
                    return;
                }
                step.answered_ns = if child.answered_ns > 0 { child.answered_ns } else { now_ns };
                step.stage = Stage::Then;
                self.settle(at, now_ns);
            }
            (Stage::Ready, Reply::Yes(detail)) => {
                step.detail = detail;
                step.answered_ns = now_ns;
                (step.stage, step.script, step.attempt) = (Stage::Then, 0, 1);
                self.settle(at, now_ns);
            }
            (Stage::Before | Stage::Then, Reply::Yes(_)) => {
                (step.script, step.attempt) = (step.script + 1, 1);
                self.settle(at, now_ns);
            }
            (_, Reply::Yes(_) | Reply::Ended(_)) => {
                self.fail(at, "what came of it does not fit".to_owned(), "resume the plan".to_owned(), now_ns);
            }
        }
    }

    fn fail(&mut self, at: usize, why: String, remedy: String, now_ns: u64) {
        let stopping = !self.stopped_by.is_empty();
        let step = &mut self.steps[at];
        step.remedy = remedy;
        if step.attempt <= step.wanted.retries && !stopping {
            step.detail = format!("try {} of {}: {why}", step.attempt, step.wanted.retries + 1);
            step.attempt += 1;
            step.paused_ns = now_ns.max(1);
            return;
        }
        step.detail = why;
        step.state = StepState::Failed;
        step.ended_ns = now_ns;
    }

    fn end(&mut self, now_ns: u64) {
        self.ended_ns = now_ns;
        let left = self.count(StepState::Pending) > 0;
        self.state = match (self.count(StepState::Failed), left) {
            (0, false) => RunState::Done,
            (0, true) => RunState::Stopped,
            _ => RunState::Failed,
        };
        for at in 0..self.steps.len() {
            if self.steps[at].state != StepState::Pending {
                continue;
            }
            let failed = self.earlier(at).into_iter().map(|i| &self.steps[i]);
            let failed = failed.filter(|s| matches!(s.state, StepState::Failed | StepState::Pending));
            let names: Vec<&str> = failed.map(|s| s.wanted.id.as_str()).collect();
            self.steps[at].detail = match names.is_empty() {
                true => "not begun: the run was stopped".to_owned(),
                false => format!("not begun: it comes after {}", names.join(", ")),
            };
        }
    }

    /// Asks that it be stopped.
    ///
    /// # Errors
    /// It has ended.
    pub fn stop(&mut self, by: &str) -> Result<(), &'static str> {
        if self.ended() {
            return Err("over");
        }
        if self.stopped_by.is_empty() {
            by.clone_into(&mut self.stopped_by);
        }
        Ok(())
    }

    /// It does not go on: nobody knows how far it came.
    pub fn lose(&mut self, why: &str, now_ns: u64) {
        for step in self.steps.iter_mut().filter(|step| step.state == StepState::Running) {
            step.state = StepState::Failed;
            why.clone_into(&mut step.detail);
            "see where its group stands now, then resume the plan".clone_into(&mut step.remedy);
            step.ended_ns = now_ns;
        }
        self.end(now_ns);
        self.version += 1;
    }

    /// The first step that has failed.
    pub fn failed(&self) -> Option<&RunStep> {
        self.steps.iter().find(|step| step.state == StepState::Failed)
    }

    /// From its beginning to the last answer, milliseconds: of a run or a test that is done and was not resumed.
    pub fn rto_ms(&self) -> Option<u64> {
        if self.state != RunState::Done || !self.continues.is_empty() || self.spec.verb == PlanVerb::Undo {
            return None;
        }
        self.steps.iter().filter_map(|step| self.answered_ms(step)).max()
    }

    /// From the beginning of the run to a step's answer, milliseconds.
    pub fn answered_ms(&self, step: &RunStep) -> Option<u64> {
        let answered = step.state == StepState::Done && step.answered_ns > 0;
        answered.then(|| step.answered_ns.saturating_sub(self.created_ns) / 1_000_000)
    }
}

impl RunStep {
    /// From its own beginning to its answer, milliseconds.
    pub fn took_ms(&self) -> Option<u64> {
        let measured = self.state == StepState::Done && self.answered_ns > 0 && !self.midway;
        measured.then(|| self.answered_ns.saturating_sub(self.started_ns) / 1_000_000)
    }

    /// From its own beginning until others may go on, milliseconds.
    pub fn held_ms(&self) -> Option<u64> {
        self.took_ms().map(|took| took.max(self.ended_ns.saturating_sub(self.started_ns) / 1_000_000))
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
