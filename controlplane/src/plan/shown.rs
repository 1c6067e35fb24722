//! Runs of plans for the API: as operations.

use afterimage_wire::v1;

use super::estimate::{self, Guess};
use super::run::{Run, RunState, RunStep};
use super::{Plan, PlanVerb, full};
use crate::convert;
use crate::failover::StepState;
use crate::model::Model;
use crate::names::{Kind, Name};
use crate::objects::Object;

fn state(state: RunState) -> v1::OperationState {
    match state {
        RunState::Running => v1::OperationState::Running,
        RunState::Done => v1::OperationState::Done,
        RunState::Failed => v1::OperationState::Failed,
        RunState::Stopped => v1::OperationState::Stopped,
    }
}

fn step(run: &Run, step: &RunStep) -> v1::PlanRunStep {
    let name = |kind, id: &str| full(&run.tenant, kind, id);
    v1::PlanRunStep {
        step: step.wanted.id.clone(),
        group: name(Kind::Group, &step.wanted.group),
        state: convert::step_state_to_proto(step.state).into(),
        stage: step.stage.as_str().to_owned(),
        attempt: step.attempt,
        detail: step.detail.clone(),
        operation: name(Kind::Operation, &step.operation),
        start_time_ns: step.started_ns,
        end_time_ns: step.ended_ns,
        took_ms: step.took_ms(),
        answered_ms: run.answered_ms(step),
        machines: step.machines.iter().map(|id| name(Kind::Machine, id)).collect(),
        point_seq: step.point_seq,
        point_time_ns: step.point_ns,
    }
}

/// What is being done, and what came of it, in a line.
fn said(step: &RunStep) -> String {
    match (step.state, step.detail.is_empty()) {
        (StepState::Running, true) => step.stage.as_str().to_owned(),
        (StepState::Running, false) => format!("{}: {}", step.stage.as_str(), step.detail),
        (StepState::Done, true) => match step.took_ms() {
            Some(ms) => format!("answers, after {ms} ms"),
            None => String::new(),
        },
        _ => step.detail.clone(),
    }
}

/// A run as an operation.
pub fn run(model: &Model, run: &Run) -> v1::Operation {
    let over = |step: &&RunStep| !matches!(step.state, StepState::Pending | StepState::Running);
    let progress = run.steps.iter().filter(over).count() * 100 / run.steps.len().max(1);
    v1::Operation {
        name: run.name().to_string(),
        uid: run.uid.clone(),
        version: run.version,
        verb: run.verb().to_owned(),
        subject: full(&run.tenant, Kind::Plan, &run.plan),
        request_id: run.request_id.clone(),
        actor: run.actor.clone(),
        state: state(run.state).into(),
        steps: run
            .steps
            .iter()
            .map(|step| v1::Step {
                name: step.wanted.id.clone(),
                state: convert::step_state_to_proto(step.state).into(),
                detail: said(step),
                start_time_ns: step.started_ns,
                end_time_ns: step.ended_ns,
            })
            .collect(),
        create_time_ns: run.created_ns,
        end_time_ns: run.ended_ns,
        error: run.failed().filter(|_| run.state == RunState::Failed).map(|step| v1::OperationError {
            step: step.wanted.id.clone(),
            message: step.detail.clone(),
            remedy: match step.remedy.is_empty() {
                true => format!("then: afterimage plan resume {}", run.plan),
                false => format!("{}; then: afterimage plan resume {}", step.remedy, run.plan),
            },
        }),
        failover: None,
        validate_only: false,
        etag: model.etag(&Object::Run(run.clone()).key()),
        done: run.ended_ns != 0,
        progress_percent: if run.ended() { 100 } else { progress as u32 },
        cancel_requested: !run.stopped_by.is_empty(),
        plan_run: Some(v1::PlanRun {
            steps: run.steps.iter().map(|s| step(run, s)).collect(),
            to: Some(convert::choice_to_proto(run.spec.to)),
            planned: run.spec.planned,
            rto_ms: run.rto_ms(),
            continues: full(&run.tenant, Kind::Operation, &run.continues),
            stopped_by: run.stopped_by.clone(),
        }),
    }
}

/// What the newest run of a verb that has ended has measured.
pub fn newest(model: &Model, plan: &Plan, verb: PlanVerb) -> Option<v1::PlanMeasure> {
    let run = model.runs_of(plan).into_iter().find(|run| run.spec.verb == verb && run.ended_ns != 0)?;
    Some(v1::PlanMeasure {
        operation: run.name().to_string(),
        end_time_ns: run.ended_ns,
        state: state(run.state).into(),
        rto_ms: run.rto_ms(),
    })
}

/// What a run would take from now.
pub fn estimated(model: &Model, plan: &Plan) -> v1::PlanEstimate {
    let over = |id: &str| {
        let group = model.group(&Name::new(&plan.tenant, Kind::Group, id));
        group.is_ok_and(|group| group.phase.is_failed_over())
    };
    let (guesses, rto_ms) = estimate::estimate(plan, &model.runs_of(plan), over);
    let step = |(wanted, guess): (&super::PlanStep, &Guess)| {
        let measured = guess.measured.as_ref();
        v1::StepEstimate {
            step: wanted.id.clone(),
            group: full(&plan.tenant, Kind::Group, &wanted.group),
            took_ms: measured.map(|m| m.took_ms),
            answered_ms: guess.answered_ms,
            measured_by: measured.map(|m| full(&plan.tenant, Kind::Operation, &m.run)).unwrap_or_default(),
            measured_time_ns: measured.map_or(0, |m| m.at_ns),
            by_test: measured.is_some_and(|m| m.by_test),
            over_already: guess.over,
        }
    };
    v1::PlanEstimate { steps: plan.steps.iter().zip(&guesses).map(step).collect(), rto_ms }
}
