//! What the steps of a plan's run take: scripts at proxies, operations of groups, looks whether they answer.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use tokio::time::{Instant, sleep};

use super::Coordinator;
use super::drive::PROXIES_BACK;
use super::verbs::Asking;
use crate::failover::{self, Order, StepName, StepState, Verb};
use crate::machine::Role;
use crate::model::Model;
use crate::names::{Kind, Name};
use crate::objects::{Group, Operation, Proxy};
use crate::plan::run::{Child, Reply, Run, RunStep, Stage, Task};
use crate::plan::{self, PlanVerb, Script, Shown};
use crate::problem::Problem;
use crate::requests::Asked;

/// Between two tries, or two looks.
const AGAIN: Duration = Duration::from_millis(250);
/// How long a script may take: what its proxy allows at most, and a little.
const SCRIPT: Duration = Duration::from_secs(3_620);
/// How long one look may take.
const LOOK: Duration = Duration::from_secs(20);
/// How long each wait of a planned failover may take, milliseconds.
const PLANNED_WITHIN_MS: u64 = 60_000;
/// What a proxy says that can run scripts.
const SCRIPTS: &str = "scripts";

fn no(problem: Problem) -> Reply {
    match problem {
        Problem::State { subject, state, remedy } => Reply::No { why: format!("{subject} is {state}"), remedy },
        problem => Reply::No { why: problem.to_string(), remedy: String::new() },
    }
}

fn word(stage: Stage) -> &'static str {
    if stage == Stage::Ready { "ready" } else { stage.as_str() }
}

/// How an operation of a group has ended.
fn child(model: &Model, operation: &Operation) -> Child {
    let work = &operation.work;
    let group = model.group(&Name::new(&operation.tenant, Kind::Group, &operation.group)).ok();
    let named = |names: &[StepName]| work.steps.iter().find(|step| names.contains(&step.name)).cloned();
    let awaited = named(&[StepName::AwaitReplica, StepName::AwaitTest]);
    let answered = awaited.as_ref().is_none_or(|step| step.state == StepState::Done);
    let odd = |step: &&failover::StepRecord| match step.state {
        StepState::Failed => true,
        StepState::Skipped => step.detail.contains("see to it there"),
        _ => false,
    };
    let (why, remedy) = match &work.error {
        Some(e) => {
            (format!("{} failed at {}: {}", work.spec.verb.as_str(), e.step.as_str(), e.message), e.remedy.clone())
        }
        None => (work.steps.iter().find(odd).map(|step| step.detail.clone()).unwrap_or_default(), String::new()),
    };
    Child {
        uid: operation.uid.clone(),
        done: work.state == failover::State::Done,
        answered,
        answered_ns: awaited.filter(|_| answered).map_or(0, |step| step.ended_ns),
        group_uid: group.map(|group| group.uid.clone()).unwrap_or_default(),
        generation: group.map_or(0, |group| group.generation),
        point: work.facts.point.as_ref().map(|point| (point.seq, point.wall_ns)),
        why,
        remedy,
    }
}

impl Coordinator {
    /// Does what a step takes now.
    pub(super) async fn do_task(self: &Arc<Self>, run: &Run, at: usize, task: Task) -> Reply {
        let step = &run.steps[at];
        match task {
            Task::Script { script, id } => self.run_script(run, step, &script, &id).await,
            Task::Failover { request_id } => self.move_group(run, step, &request_id).await,
            Task::Ready => self.await_ready(run, step).await,
        }
    }

    fn proxy_for<'a>(&self, model: &'a Model, tenant: &str, group: &Group, id: &str) -> Result<&'a Proxy, Problem> {
        let id = if id.is_empty() { &group.target } else { id };
        model.proxy(&Name::new(tenant, Kind::Proxy, id))
    }

    async fn run_script(&self, run: &Run, step: &RunStep, script: &Script, id: &str) -> Reply {
        match self.ask_script(run, step, &script.name, &script.proxy, (id, step.attempt), SCRIPT).await {
            Ok((true, said)) => Reply::Yes(said),
            Ok((false, said)) => {
                let why = format!("the script \"{}\" says no: {said}", script.name);
                Reply::No { why, remedy: "look at what it does on its proxy's host".to_owned() }
            }
            Err(why) => {
                let remedy = "look at that proxy, and at the script on its host".to_owned();
                Reply::No { why: format!("the script \"{}\": {why}", script.name), remedy }
            }
        }
    }

    async fn ask_script(
        &self,
        run: &Run,
        step: &RunStep,
        script: &str,
        proxy: &str,
        (id, attempt): (&str, u32),
        answer: Duration,
    ) -> Result<(bool, String), String> {
        let tell = Tell::RunScript(v1::RunScript {
            script: script.to_owned(),
            plan: Name::new(&run.tenant, Kind::Plan, &run.plan).to_string(),
            run: run.uid.clone(),
            step: step.wanted.id.clone(),
            group: Name::new(&run.tenant, Kind::Group, &step.wanted.group).to_string(),
            verb: plan::verb_to_proto(run.spec.verb).into(),
            when: word(step.stage).to_owned(),
            attempt,
        });
        self.ask_checked(run, step, proxy, id, tell, answer).await
    }

    async fn ask_checked(
        &self,
        run: &Run,
        step: &RunStep,
        proxy: &str,
        id: &str,
        tell: Tell,
        answer: Duration,
    ) -> Result<(bool, String), String> {
        let model = self.model();
        let group = model.group(&Name::new(&run.tenant, Kind::Group, &step.wanted.group)).map_err(|e| e.to_string())?;
        let proxy = self.proxy_for(&model, &run.tenant, group, proxy).map_err(|e| e.to_string())?;
        let told = self.command_once(id, proxy, &run.uid, &step.wanted.id, tell, PROXIES_BACK, answer).await;
        match told {
            Ok(Outcome::Checked(checked)) => Ok((checked.yes, checked.detail)),
            Ok(Outcome::Error(e)) => Err(format!("\"{}\": {}", proxy.id, e.message)),
            Ok(_) => Err(format!("\"{}\": its answer does not fit; is it of another version?", proxy.id)),
            Err(e) => Err(format!("\"{}\": {e}", proxy.id)),
        }
    }

    /// Starts the operation of a step's group, or finds it, and waits for its end.
    async fn move_group(self: &Arc<Self>, run: &Run, step: &RunStep, request_id: &str) -> Reply {
        let name = Name::new(&run.tenant, Kind::Group, &step.wanted.group);
        let asking = Asking { actor: run.actor.clone(), request_id: request_id.to_owned(), validate_only: false };
        let about = v1::GetGroupRequest { name: name.to_string() };
        let request = match Asked::new(&run.tenant, &run.actor, "PlanRun", request_id, &about) {
            Ok(request) => request,
            Err(problem) => return no(problem),
        };
        let started = loop {
            match self.start_verb(run, &name, &asking, &request).await {
                Ok(started) => break started,
                // Nobody has said that it cannot be done: the store, or a proxy that has not come back yet.
                Err(Problem::Internal(why)) => {
                    tracing::warn!(operation = %run.name(), why, "not started; trying again")
                }
                Err(Problem::Unreachable { .. } | Problem::State { .. }) if self.clock.uptime() < PROXIES_BACK => {}
                Err(problem) => return no(problem),
            }
            sleep(AGAIN).await;
        };
        let operation = Name::new(&run.tenant, Kind::Operation, &started.uid);
        let ended = |model: &Model| match model.operation(&operation) {
            Ok(found) => (found.ended_ns != 0).then(|| Reply::Ended(child(model, found))),
            Err(problem) => Some(no(problem)),
        };
        self.until(ended).await
    }

    async fn start_verb(
        self: &Arc<Self>,
        run: &Run,
        name: &Name,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        let reason = match run.spec.reason.as_str() {
            "" => format!("plan {}", run.plan),
            given => given.to_owned(),
        };
        match run.spec.verb {
            PlanVerb::Run => {
                let spec = failover::Spec { reason, ..spec(run) };
                self.start_failover(name, spec, &name.id, asking, request).await
            }
            PlanVerb::Test => {
                let trial = super::Trial { to: Some(run.spec.to), reason, ..super::Trial::default() };
                self.test_failover(name, trial, asking, request).await
            }
            PlanVerb::Undo => {
                self.undo_failover(name, (run.spec.discard, run.spec.force, reason), asking, request).await
            }
        }
    }

    /// Looks until a step answers, or its time is over.
    async fn await_ready(&self, run: &Run, step: &RunStep) -> Reply {
        let until = Instant::now() + Duration::from_millis(step.wanted.ready_within_ms);
        let mut looks = 0;
        loop {
            looks += 1;
            let why = match self.look_ready(run, step, looks).await {
                Ok(detail) => return Reply::Yes(detail),
                Err(why) => why,
            };
            if Instant::now() + AGAIN >= until {
                let why = format!("it runs, but does not answer within {} ms: {why}", step.wanted.ready_within_ms);
                return Reply::No { why, remedy: "look at it there".to_owned() };
            }
            sleep(AGAIN).await;
        }
    }

    async fn look_ready(&self, run: &Run, step: &RunStep, look: u32) -> Result<String, String> {
        let model = self.model();
        let group = model.group(&Name::new(&run.tenant, Kind::Group, &step.wanted.group)).map_err(|e| e.to_string())?;
        for machine in model.machines_of(group).filter(|machine| machine.target.is_driven()) {
            let proxy = machine.proxy_of(Role::Replica, group).to_owned();
            let order = Order { proxy, tell: machine.probe(Role::Replica), within_ms: 0, until_ready: false };
            match self.order(&run.tenant, &run.uid, &step.wanted.id, &order).await? {
                Outcome::Machine(state) if state.ready => {}
                Outcome::Machine(state) => return Err(format!("{}: {}", machine.id, state.detail)),
                Outcome::Error(e) => return Err(format!("{}: {}", machine.id, e.message)),
                _ => return Err(format!("{}: its proxy's answer does not fit", machine.id)),
            }
        }
        let Some(check) = &step.wanted.check else { return Ok(String::new()) };
        let (yes, said) = match &check.by {
            Shown::Tcp(address) => {
                let tell = Tell::LookAt(v1::LookAt { address: address.clone() });
                self.ask_checked(run, step, &check.proxy, &crate::objects::new_uid(), tell, LOOK).await?
            }
            Shown::Script(name) => {
                let id = crate::objects::new_uid();
                self.ask_script(run, step, name, &check.proxy, (&id, look), SCRIPT).await?
            }
        };
        if yes { Ok(said) } else { Err(said) }
    }

    /// Checks of a step what can be checked now.
    pub(super) async fn try_step(&self, model: &Model, run: &Run, step: &RunStep) -> Result<String, Problem> {
        let name = Name::new(&run.tenant, Kind::Group, &step.wanted.group);
        let group = model.group(&name)?;
        let scripts = [false, true].map(|after| step.wanted.scripts(run.spec.verb, after)).concat();
        let checks = step.wanted.check.as_ref().filter(|_| run.spec.verb == PlanVerb::Run);
        let proxies = scripts.iter().map(|script| &script.proxy).chain(checks.map(|check| &check.proxy));
        for id in proxies {
            let proxy = self.proxy_for(model, &run.tenant, group, id)?;
            if !self.sessions.connected(&proxy.uid) {
                let detail = format!("step {} runs scripts or looks from there; look at that proxy", step.wanted.id);
                return Err(Problem::Unreachable { proxy: proxy.id.clone(), detail });
            }
        }
        for script in &scripts {
            let proxy = self.proxy_for(model, &run.tenant, group, &script.proxy)?;
            if !proxy.can(SCRIPTS) {
                let state = format!("not to be run as it stands: the proxy \"{}\" has no scripts", proxy.id);
                let remedy = format!("add [machines.script.{}] to its configuration", script.name);
                return Err(Problem::state(Name::new(&run.tenant, Kind::Plan, &run.plan), state, remedy));
            }
        }
        match run.spec.verb {
            PlanVerb::Undo => Ok(String::new()),
            PlanVerb::Run => {
                self.check_failover(model, &name, &spec(run), &name.id)?;
                self.machines_for(model, group, spec(run).verb)?;
                let point = self.fit_point(model, &name, run.spec.to).await?;
                self.check_machines(&name, Role::Replica).await?;
                Ok(format!("record {} can be opened", point.seq))
            }
            PlanVerb::Test => {
                super::trials::check(group, model.machines_of(group).any(|m| m.target.is_driven()))?;
                self.machines_for(model, group, Verb::TestFailover)?;
                let point = self.fit_point(model, &name, run.spec.to).await?;
                self.check_machines(&name, Role::Test("check")).await?;
                Ok(format!("record {} can be opened", point.seq))
            }
        }
    }
}

/// What is asked of a group.
fn spec(run: &Run) -> failover::Spec {
    let verb = if run.spec.planned { Verb::PlannedFailover } else { Verb::Failover };
    let within_ms = if run.spec.planned { PLANNED_WITHIN_MS } else { 0 };
    failover::Spec { unconfirmed: run.spec.unconfirmed, within_ms, ..failover::Spec::new(verb, run.spec.to) }
}
