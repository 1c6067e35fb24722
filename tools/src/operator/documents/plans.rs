//! Plans as JSON.

use afterimage_controlplane::plan::PlanVerb;
use afterimage_wire::v1;
use serde_json::{Value, json};

use super::{id, json_time, null_if_empty, operation_word, step_word};
use crate::operator::plan::step;

fn measure(measure: Option<&v1::PlanMeasure>) -> Value {
    let Some(measure) = measure else { return Value::Null };
    json!({
        "run": id(&measure.operation),
        "state": operation_word(measure.state()),
        "ended": json_time(measure.end_time_ns),
        "rto_ms": measure.rto_ms,
    })
}

/// A plan.
pub fn plan(plan: &v1::Plan) -> Value {
    let script = |script: &v1::PlanScript| {
        let verbs: Vec<&str> = script.verbs().map(|verb| PlanVerb::from(verb).as_str()).collect();
        json!({"script": script.script, "proxy": null_if_empty(&script.proxy), "verbs": verbs})
    };
    let step = |step: &v1::PlanStep| {
        json!({
            "step": step.id,
            "group": id(&step.group),
            "after": step.after,
            "delay_ms": step.delay_ms,
            "ready": Some(step::ready(step)).filter(|ready| !ready.is_empty()),
            "ready_within_ms": step.ready_within_ms,
            "retries": step.retries,
            "before": step.before.iter().map(script).collect::<Vec<_>>(),
            "then": step.then.iter().map(script).collect::<Vec<_>>(),
            "typed": step::typed(step),
        })
    };
    json!({
        "plan": id(&plan.name),
        "uid": plan.uid,
        "version": plan.version,
        "description": plan.description,
        "parallel": plan.parallel,
        "steps": plan.steps.iter().map(step).collect::<Vec<_>>(),
        "running": null_if_empty(&plan.running),
        "last_test": measure(plan.last_test.as_ref()),
        "last_run": measure(plan.last_run.as_ref()),
        "created": json_time(plan.create_time_ns),
        "updated": json_time(plan.update_time_ns),
    })
}

fn to(choice: Option<&v1::PointChoice>) -> Value {
    match choice.and_then(|choice| choice.at.as_ref()) {
        Some(v1::point_choice::At::TimeNs(ns)) => json_time(*ns),
        _ => "latest".into(),
    }
}

/// A run of a plan.
pub fn plan_run(run: &v1::Operation) -> Value {
    let of_plan = run.plan_run.clone().unwrap_or_default();
    let step = |step: &v1::PlanRunStep| {
        let point = json!({"seq": step.point_seq, "time": json_time(step.point_time_ns)});
        json!({
            "step": step.step,
            "group": id(&step.group),
            "state": step_word(step.state()),
            "stage": step.stage,
            "attempt": step.attempt,
            "detail": step.detail,
            "operation": null_if_empty(&step.operation),
            "machines": step.machines.iter().map(|name| id(name)).collect::<Vec<_>>(),
            "point": Some(point).filter(|_| step.point_seq > 0),
            "started": json_time(step.start_time_ns),
            "ended": json_time(step.end_time_ns),
            "took_ms": step.took_ms,
            "answered_ms": step.answered_ms,
        })
    };
    json!({
        "run": id(&run.name),
        "plan": id(&run.subject),
        "verb": run.verb,
        "state": operation_word(run.state()),
        "dry_run": run.validate_only,
        "actor": run.actor,
        "request_id": run.request_id,
        "to": to(of_plan.to.as_ref()),
        "planned": of_plan.planned,
        "started": json_time(run.create_time_ns),
        "ended": json_time(run.end_time_ns),
        "rto_ms": of_plan.rto_ms,
        "continues": null_if_empty(&of_plan.continues),
        "stopped_by": Some(&of_plan.stopped_by).filter(|by| !by.is_empty()),
        "steps": of_plan.steps.iter().map(step).collect::<Vec<_>>(),
        "error": run.error.as_ref().map(|error| json!({
            "step": error.step,
            "message": error.message,
            "remedy": error.remedy,
        })),
    })
}

/// How long a run would take.
pub fn plan_estimate(plan: &str, estimate: &v1::PlanEstimate) -> Value {
    let step = |step: &v1::StepEstimate| {
        json!({
            "step": step.step,
            "group": id(&step.group),
            "took_ms": step.took_ms,
            "answered_ms": step.answered_ms,
            "by": match (step.over_already, step.measured_by.is_empty(), step.by_test) {
                (true, ..) => "failed-over",
                (_, true, _) => "unknown",
                (_, _, true) => "test",
                (_, _, false) => "run",
            },
            "run": null_if_empty(&step.measured_by),
            "measured": json_time(step.measured_time_ns),
        })
    };
    json!({"plan": plan, "rto_ms": estimate.rto_ms, "steps": estimate.steps.iter().map(step).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(value: &Value) -> String {
        value.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_shapes_of_plans_are_stable() {
        let script =
            v1::PlanScript { script: "dns".into(), verbs: vec![v1::PlanVerb::Undo.into()], ..Default::default() };
        let step = v1::PlanStep { group: "tenants/default/groups/db".into(), then: vec![script], ..Default::default() };
        let measured = v1::PlanMeasure::default();
        let document = plan(&v1::Plan { steps: vec![step], last_test: Some(measured), ..Default::default() });
        assert_eq!(
            keys(&document),
            "created description last_run last_test parallel plan running steps uid updated version"
        );
        assert_eq!(keys(&document["last_test"]), "ended rto_ms run state");
        let step = &document["steps"][0];
        assert_eq!(keys(step), "after before delay_ms group ready ready_within_ms retries step then typed");
        assert_eq!((&step["ready"], &step["typed"]), (&Value::Null, &json!("db undo-then=dns")));
        assert_eq!(step["then"], json!([{"script": "dns", "proxy": null, "verbs": ["undo"]}]));
    }

    #[test]
    fn the_shapes_of_runs_and_estimates_are_stable() {
        let steps = vec![v1::PlanRunStep { step: "db".into(), point_seq: 7, ..Default::default() }];
        let run = v1::Operation {
            plan_run: Some(v1::PlanRun { steps, ..Default::default() }),
            state: v1::OperationState::Stopped.into(),
            ..Default::default()
        };
        let document = plan_run(&run);
        assert_eq!(
            keys(&document),
            "actor continues dry_run ended error plan planned request_id rto_ms run started state steps stopped_by to verb"
        );
        assert_eq!((&document["state"], &document["to"]), (&json!("stopped"), &json!("latest")));
        assert_eq!(
            keys(&document["steps"][0]),
            "answered_ms attempt detail ended group machines operation point stage started state step took_ms"
        );
        let document = plan_estimate("site", &v1::PlanEstimate { steps: vec![Default::default()], rto_ms: None });
        assert_eq!(keys(&document), "plan rto_ms steps");
        assert_eq!(keys(&document["steps"][0]), "answered_ms by group measured run step took_ms");
        assert_eq!(document["steps"][0]["by"], "unknown");
    }
}
