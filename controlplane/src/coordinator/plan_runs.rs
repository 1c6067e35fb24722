//! Runs of plans: begun, stopped, gone on with. What a run does is decided in [`crate::plan::run`]; what its steps take is done in
//! `plan_tasks`.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{self, Severity};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Coordinator;
use super::verbs::Asking;
use crate::audit;
use crate::failover::{Choice, StepState};
use crate::model::{Model, Txn};
use crate::names::{Kind, Name};
use crate::objects::{GroupPhase, Object, new_uid};
use crate::plan::run::{Next, Reply, Run, RunState, RunStep, Spec, Stands, passed_over};
use crate::plan::{Plan, PlanVerb, shown};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::{Asked, gone};

/// Before a change that the store refused is tried again.
const STORE_RETRY: Duration = Duration::from_secs(1);

fn wait_for(run: &Run) -> Problem {
    let plan = Name::new(&run.tenant, Kind::Plan, &run.plan);
    let remedy = format!("wait for {}, or stop it", run.name());
    Problem::state(plan, "being run", remedy)
}

fn begun_before(model: &Model, tenant: &str, request: &Asked) -> Result<Option<Run>, Problem> {
    let Some(done) = request.done(model)? else { return Ok(None) };
    let name = Name::new(tenant, Kind::Operation, &done.uid);
    model.run(&name).map(|run| Some(run.clone())).map_err(|_| gone("operation", &name))
}

/// How the group of a step stands.
fn stands(model: &Model, plan: Option<&Plan>, step: &RunStep, tenant: &str) -> Stands {
    let Ok(group) = model.group(&Name::new(tenant, Kind::Group, &step.wanted.group)) else { return Stands::Gone };
    if group.phase == GroupPhase::Deleting {
        return Stands::Gone;
    }
    if !group.phase.is_failed_over() {
        return Stands::AtSource;
    }
    let ours = |m: &crate::plan::Moved| m.group_uid == group.uid && m.generation == group.generation;
    Stands::Over { ours: plan.is_some_and(|plan| plan.moved.iter().any(ours)) }
}

/// What to tell of a change of a run.
fn changes(before: &Run, after: &Run) -> Vec<(Severity, String)> {
    let mut told = Vec::new();
    for (old, new) in before.steps.iter().zip(&after.steps).filter(|(old, new)| old.state != new.state) {
        let (severity, word) = match new.state {
            StepState::Pending => continue,
            StepState::Running => (Severity::Info, "begun"),
            StepState::Done => (Severity::Info, "done"),
            StepState::Skipped => (Severity::Info, "passed over"),
            StepState::Failed => (Severity::Error, "failed"),
        };
        let detail = if new.detail.is_empty() { String::new() } else { format!(": {}", new.detail) };
        told.push((severity, format!("step {} {word}{detail}", old.wanted.id)));
    }
    if before.state != after.state {
        let verb = after.verb();
        told.push(match after.state {
            RunState::Running => return told,
            RunState::Done => (Severity::Warning, format!("{verb} is done")),
            RunState::Stopped => (Severity::Warning, format!("{verb} was stopped by {}", after.stopped_by)),
            RunState::Failed => (Severity::Error, format!("{verb} failed: afterimage plan resume {}", after.plan)),
        });
    }
    told
}

impl Coordinator {
    /// Goes on with runs that an earlier life of the coordinator had begun.
    pub(super) fn resume_runs(self: &Arc<Self>) {
        for run in self.model().runs.values().filter(|run| run.ended_ns == 0) {
            let subject = Name::new(&run.tenant, Kind::Plan, &run.plan).to_string();
            self.tell(Severity::Warning, "operation", &subject, &format!("going on with {}", run.name()));
            tokio::spawn(self.clone().drive_run(run.name()));
        }
    }

    /// Checks a verb of a plan, and begins with it. `confirm_name`: the plan's id, typed, if sources are not to be asked.
    ///
    /// # Errors
    /// It goes on already; a choice that makes no sense.
    pub async fn start_plan(
        self: &Arc<Self>,
        name: &Name,
        spec: Spec,
        confirm_name: &str,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &spec.reason)?;
        if !matches!(spec.to, Choice::Latest | Choice::Time(_)) {
            return Err(Problem::invalid(
                "to",
                "a cut or a write",
                "latest (true) or time_ns: groups number their own",
            ));
        }
        if spec.planned && spec.to != Choice::Latest {
            return Err(Problem::invalid("planned", true, "only to the latest"));
        }
        if spec.planned && spec.unconfirmed {
            return Err(Problem::invalid("unconfirmed", true, "nothing, with `planned`: sources hand over"));
        }
        if spec.unconfirmed && confirm_name != name.id {
            return Err(Problem::invalid("confirm_name", confirm_name, format!("the plan's id, typed: {:?}", name.id)));
        }
        let before = begun_before(&self.model(), &name.tenant, request)?;
        if asking.validate_only && before.is_none() {
            return self.try_plan(name, spec, asking).await;
        }
        self.begin_run(name, asking, request, |model, uid, now| {
            Ok(anew(model, model.plan(name)?, uid, &spec, asking, now))
        })
        .await
    }

    /// Goes on with a plan's newest run.
    ///
    /// # Errors
    /// It goes on still, or is done; there is none.
    pub async fn resume_plan(
        self: &Arc<Self>,
        name: &Name,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        let work = |model: &Model, uid: String, now: u64| {
            let plan = model.plan(name)?;
            let Some(newest) = model.runs_of(plan).first().copied() else {
                return Err(Problem::state(name, "not to be resumed: it was never run", "run it"));
            };
            if newest.state == RunState::Done {
                let state = format!("not to be resumed: its newest run ({}) is done", newest.verb());
                return Err(Problem::state(name, state, "begin another one"));
            }
            Ok(anew(model, plan, uid, &newest.spec, asking, now).continuing(newest))
        };
        if asking.validate_only {
            let model = self.model();
            let plan = model.plan(name)?;
            if let Some(running) = model.running(plan) {
                return Err(wait_for(running));
            }
            let run = work(&model, new_uid(), self.clock.wall_ns())?;
            return Ok(tried(&model, &run));
        }
        self.begin_run(name, asking, request, work).await
    }

    async fn begin_run(
        self: &Arc<Self>,
        name: &Name,
        asking: &Asking,
        request: &Asked,
        work: impl FnOnce(&Model, String, u64) -> Result<Run, Problem>,
    ) -> Result<v1::Operation, Problem> {
        let now = self.clock.wall_ns();
        let (run, started) = self
            .change(|model, txn| {
                if let Some(run) = begun_before(model, &name.tenant, request)? {
                    return Ok((run, false));
                }
                let plan = model.plan(name)?;
                if let Some(running) = model.running(plan) {
                    return Err(wait_for(running));
                }
                let run = work(model, new_uid(), now)?;
                request.record(model, txn, now, &run.uid);
                txn.put(Object::Run(run.clone()));
                for old in model.surplus_runs(plan) {
                    txn.delete(Object::Run(old.clone()));
                }
                Ok((run, true))
            })
            .await?;
        if started {
            let message = format!("{} begun by {}: {}", run.verb(), asking.actor, run.name());
            self.tell(Severity::Warning, "operation", &name.to_string(), &message);
            tokio::spawn(self.clone().drive_run(run.name()));
        }
        Ok(shown::run(&self.model(), &run))
    }

    /// Asks that the run of a plan be stopped.
    ///
    /// # Errors
    /// None goes on.
    pub async fn stop_plan(self: &Arc<Self>, name: &Name, by: &str, request: &Asked) -> Result<v1::Operation, Problem> {
        let model = self.model();
        if let Some(run) = begun_before(&model, &name.tenant, request)? {
            return Ok(shown::run(&model, &run));
        }
        let plan = model.plan(name)?;
        let Some(run) = model.running(plan) else {
            return Err(Problem::state(name, "not being run", "there is nothing to stop"));
        };
        self.stop_run(&run.name(), by, request).await
    }

    /// Asks that a run be stopped.
    ///
    /// # Errors
    /// There is none of that name; it has ended.
    pub async fn stop_run(self: &Arc<Self>, name: &Name, by: &str, request: &Asked) -> Result<v1::Operation, Problem> {
        let now = self.clock.wall_ns();
        let (run, asked) = self
            .change(|model, txn| {
                let mut run = model.run(name)?.clone();
                if request.done(model)?.is_some() {
                    return Ok((run, false));
                }
                let before = run.stopped_by.clone();
                run.stop(by).map_err(|state| Problem::state(name, state, "it cannot be stopped any more"))?;
                let asked = run.stopped_by != before;
                if asked {
                    run.version += 1;
                    txn.put(Object::Run(run.clone()));
                }
                request.record(model, txn, now, &run.uid);
                Ok((run, asked))
            })
            .await?;
        if asked {
            let subject = Name::new(&run.tenant, Kind::Plan, &run.plan).to_string();
            self.tell(Severity::Warning, "operation", &subject, &format!("{by} has asked that {name} be stopped"));
        }
        Ok(shown::run(&self.model(), &run))
    }

    /// Forgets a run that has ended.
    ///
    /// # Errors
    /// There is none of that name; it has changed, or has not ended.
    pub async fn delete_run(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let look = |model: &Model| {
            let old = model.run(name)?;
            let hindrance =
                (old.ended_ns == 0).then(|| Problem::state(name, "being done", "wait for its end, or stop it"));
            Ok((Object::Run(old.clone()), old.uid.clone(), hindrance))
        };
        self.delete_object(name, etag, validate_only, request, look).await.map(drop)
    }

    /// Does a run to its end.
    pub(super) async fn drive_run(self: Arc<Self>, name: Name) {
        let by_itself = audit::Caller::new(&name.tenant, audit::ITSELF, &name.to_string());
        audit::CALLER.scope(by_itself, self.drive_run_on(name)).await;
    }

    async fn drive_run_on(self: Arc<Self>, name: Name) {
        let mut replies: Vec<(usize, Reply)> = Vec::new();
        // Dropped with this, what is being done is not waited for: the next life asks for it again.
        let mut doing: JoinSet<(usize, Reply)> = JoinSet::new();
        let mut closing = self.closing();
        let mut resumed = true;
        let mut heeded = false;
        loop {
            let recorded = self.record_run(&name, replies.clone(), resumed).await;
            let (next, run) = match recorded {
                Ok(next) => next,
                Err(e) => {
                    tracing::error!(operation = %name, error = %e, "cannot record a step; trying again");
                    tokio::select! {
                        () = sleep(STORE_RETRY) => continue,
                        _ = closing.wait_for(|c| *c) => return,
                    }
                }
            };
            replies.clear();
            resumed = false;
            if next.ended {
                return;
            }
            heeded |= !run.stopped_by.is_empty();
            for begun in next.tasks {
                let (coordinator, run) = (self.clone(), run.clone());
                let by_itself = audit::Caller::new(&name.tenant, audit::ITSELF, &name.to_string());
                let work = async move { (begun.step, coordinator.do_task(&run, begun.step, begun.task).await) };
                doing.spawn(audit::CALLER.scope(by_itself, work));
            }
            let wake = Duration::from_millis(next.wake_ms.unwrap_or(0));
            let done = tokio::select! {
                Some(done) = doing.join_next() => Some(done),
                () = sleep(wake), if next.wake_ms.is_some() => None,
                () = self.asked_to_stop(&name), if !heeded => None,
                _ = closing.wait_for(|c| *c) => return,
            };
            match done {
                Some(Ok(reply)) => replies.push(reply),
                // It has panicked: all that is recorded as running is asked for again.
                Some(Err(error)) => {
                    tracing::error!(operation = %name, %error, "a step has ended without an answer");
                    doing.shutdown().await;
                    resumed = true;
                    sleep(STORE_RETRY).await;
                }
                None => {}
            }
        }
    }

    async fn asked_to_stop(&self, name: &Name) {
        self.until(|model| model.run(name).ok().filter(|run| !run.stopped_by.is_empty()).map(drop)).await;
    }

    /// Records what came of tasks and begins the next ones, in one commit.
    async fn record_run(
        self: &Arc<Self>,
        name: &Name,
        replies: Vec<(usize, Reply)>,
        resumed: bool,
    ) -> Result<(Next, Run), Problem> {
        let now = self.clock.wall_ns();
        let (next, run, told) = self
            .change(move |model, txn| {
                let before = model.run(name)?;
                let mut run = before.clone();
                let plan = model.plan(&Name::new(&run.tenant, Kind::Plan, &run.plan)).ok();
                let mut moved = plan.map(|plan| plan.moved.clone()).unwrap_or_default();
                for (step, reply) in replies {
                    run.apply(step, reply, &mut moved, now);
                }
                let standing = |step: &RunStep| stands(model, plan, step, &name.tenant);
                let next = run.begin(&standing, resumed, now);
                keep_run(txn, plan, before, &mut run, moved);
                let told = changes(before, &run);
                Ok((next, run, told))
            })
            .await?;
        let subject = Name::new(&run.tenant, Kind::Plan, &run.plan).to_string();
        for (severity, message) in told {
            self.tell(severity, "step", &subject, &message);
        }
        Ok((next, run))
    }
}

/// Puts what has changed: the run, and what the plan has failed over.
fn keep_run(txn: &mut Txn, plan: Option<&Plan>, before: &Run, run: &mut Run, moved: Vec<crate::plan::Moved>) {
    if let Some(plan) = plan.filter(|plan| plan.moved != moved) {
        txn.put(Object::Plan(Plan { moved, ..plan.clone() }));
    }
    if run != before {
        run.version += 1;
        txn.put(Object::Run(run.clone()));
    }
}

/// A run from the beginning of a plan.
fn anew(model: &Model, plan: &Plan, uid: String, spec: &Spec, asking: &Asking, now_ns: u64) -> Run {
    let machines = |id: &str| match model.group(&Name::new(&plan.tenant, Kind::Group, id)) {
        Ok(group) => model.machines_of(group).map(|machine| machine.id.clone()).collect(),
        Err(_) => Vec::new(),
    };
    Run::new(plan, uid, spec.clone(), (&asking.actor, &asking.request_id), machines, now_ns)
}

/// A run that was only checked.
fn tried(model: &Model, run: &Run) -> v1::Operation {
    let failed = run.failed().is_some();
    let mut operation = shown::run(model, run);
    operation.validate_only = true;
    operation.name.clear();
    operation.uid.clear();
    operation.done = true;
    operation.state = if failed { v1::OperationState::Failed } else { v1::OperationState::Done }.into();
    operation.error = run.failed().map(|step| v1::OperationError {
        step: step.wanted.id.clone(),
        message: step.detail.clone(),
        remedy: step.remedy.clone(),
    });
    operation
}

impl Coordinator {
    /// Checks of a verb what can be checked now, for each step.
    async fn try_plan(self: &Arc<Self>, name: &Name, spec: Spec, asking: &Asking) -> Result<v1::Operation, Problem> {
        let model = self.model();
        let plan = model.plan(name)?;
        if let Some(running) = model.running(plan) {
            return Err(wait_for(running));
        }
        let mut run = anew(&model, plan, new_uid(), &spec, asking, self.clock.wall_ns());
        for at in 0..run.steps.len() {
            let standing = stands(&model, Some(plan), &run.steps[at], &name.tenant);
            let skipped = passed_over(spec.verb, standing);
            let step = &mut run.steps[at];
            if let Some(why) = skipped {
                (step.state, step.detail) = (StepState::Skipped, why.to_owned());
                continue;
            }
            let step = run.steps[at].clone();
            let checked = self.try_step(&model, &run, &step).await;
            let step = &mut run.steps[at];
            match checked {
                Ok(detail) => (step.state, step.detail) = (StepState::Done, detail),
                Err(Problem::State { subject, state, remedy }) => {
                    (step.state, step.detail, step.remedy) =
                        (StepState::Failed, format!("{subject} is {state}"), remedy);
                }
                Err(problem) => (step.state, step.detail) = (StepState::Failed, problem.to_string()),
            }
        }
        if spec.verb == PlanVerb::Test && run.steps.iter().all(|step| step.state == StepState::Skipped) {
            return Err(Problem::state(name, "without anything to test", "add steps to it"));
        }
        Ok(tried(&model, &run))
    }
}
