//! `afterimage plan`: groups in an order, failed over together, tried, brought back.

use afterimage_wire::v1::{self, OperationState, StepState};
use clap::{Args, Subcommand};
use prost_types::FieldMask;
use uuid::Uuid;

use super::documents::{self, id, operation_word, step_word};
use super::failover::{Begin, follow};
use super::failure::{Failure, Kind};
use super::output::{Mood, fields, line, state, table, text};
use super::point::api;
use super::session::{Session, Which, every};
use super::values::{Selector, selector, show_duration, show_time};

pub mod step;

/// Verbs of `afterimage plan`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// List the plans.
    #[command(after_help = "Examples:\n  afterimage plan list\n  afterimage plan list --filter 'description:web'")]
    List {
        #[command(flatten)]
        which: Which,
    },
    /// Show a plan with its steps.
    #[command(after_help = "Examples:\n  afterimage plan show site")]
    Show {
        /// The plan's name.
        plan: String,
    },
    /// Create a plan: a step for each group, in the order in which they are begun where the plan leaves it open.
    #[command(after_help = "Examples:\n  \
        afterimage plan create site --step db --step 'app after=db' --step 'web after=app'\n  \
        afterimage plan create site --parallel 2 \\\n    \
            --step 'db delay=10s within=2m' \\\n    \
            --step 'app after=db tcp=10.0.0.7:8080 retries=2' \\\n    \
            --step 'web after=app ready=web-up@dr then=dns@dr undo-then=dns@dr'\n\n\
        A step is a group, and what is to be said of it:\n  \
        after=STEP,STEP    begins once these answer      as=ID             what other steps call it\n  \
        delay=10s          those after it wait so long   retries=2         tries after the first\n  \
        tcp=HOST:PORT      answers when that accepts     ready=SCRIPT      … when that script says so\n  \
        within=5m          how long it has for that      before=, then=    scripts that are run\n  \
        test-before=, test-then=, undo-before=, undo-then=                 scripts of a test, of an undo\n\n\
        A script is one that the configuration of a proxy names: [machines.script.NAME]; behind \"@\" stands which\n\
        proxy, if it is not the target of the group. Steps that nothing orders go at once, --parallel at most.")]
    Create {
        /// The plan's name: a-z, 0-9 and "-", at most 63 characters.
        plan: String,
        #[command(flatten)]
        wanted: Wanted,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// Change a plan; what is not given stays. Steps are given anew, all of them.
    #[command(after_help = "Examples:\n  \
        afterimage plan update site --parallel 8\n  \
        afterimage plan update site --step db --step 'web after=db'")]
    Update {
        /// The plan's name.
        plan: String,
        #[command(flatten)]
        wanted: Wanted,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// Forget a plan, and its history.
    Delete {
        /// The plan's name.
        plan: String,
    },
    /// Start the machines of its groups from views that are thrown away, in its order; nothing that runs is touched.
    #[command(after_help = "Examples:\n  \
        afterimage plan test site\n  \
        afterimage plan test site --to time:2026-11-21T10:00:00+01:00\n\n\
        Exit codes: 0 all have answered, 1 one has not, 3 not allowed now, 4 unreachable.")]
    Test {
        /// The plan's name.
        plan: String,
        /// latest, or time:2026-11-21T10:00:00Z, time:-5m (ago): each group from its last write not after that.
        #[arg(long, value_name = "POINT", default_value = "latest", value_parser = selector)]
        to: Selector,
        #[command(flatten)]
        start: Begin,
    },
    /// Fail its groups over, in its order. Groups that are failed over already are passed over.
    #[command(after_help = "Examples:\n  \
        afterimage plan run site --dry-run\n  \
        afterimage plan run site                                  all sources that answer are fenced\n  \
        afterimage plan run site --planned                        nothing is lost: sources hand over\n  \
        afterimage plan run site --to time:2026-11-21T10:00:00Z   the last write of each not after that\n  \
        afterimage plan run site --unconfirmed site               their machines are off: you made sure\n\n\
        If a step fails, what comes after it is not begun, and the rest goes on: see what is wrong, then\n\
        `afterimage plan resume`.\n\
        Exit codes: 0 done, 1 a step failed or it was stopped, 3 not allowed now, 4 unreachable.")]
    Run {
        /// The plan's name.
        plan: String,
        /// latest, or time:2026-11-21T10:00:00Z, time:-5m (ago): each group to its last write not after that.
        #[arg(long, value_name = "POINT", default_value = "latest", value_parser = selector)]
        to: Selector,
        /// Each group hands over with nothing lost.
        #[arg(long, conflicts_with = "unconfirmed")]
        planned: bool,
        /// Go on where nobody confirms that a source is off; NAME is the plan's name, typed again.
        #[arg(long, value_name = "NAME")]
        unconfirmed: Option<String>,
        #[command(flatten)]
        start: Begin,
    },
    /// Begin no more steps of the run that goes on; what is being done is finished.
    #[command(after_help = "Examples:\n  afterimage plan stop site && afterimage plan undo site")]
    Stop {
        /// The plan's name.
        plan: String,
        /// Return at once, and do not wait until what is being done has ended.
        #[arg(long)]
        no_wait: bool,
    },
    /// Go on with the newest run from where it was stopped, or failed; the plan is taken as it is now.
    #[command(after_help = "Examples:\n  afterimage plan resume site")]
    Resume {
        /// The plan's name.
        plan: String,
        #[command(flatten)]
        start: Begin,
    },
    /// Bring back what the plan has failed over, in the reverse order, as `failover undo` does.
    #[command(after_help = "Examples:\n  \
        afterimage plan undo site\n  \
        afterimage plan undo site --discard --yes    what was written meanwhile is deleted\n\n\
        What somebody else has failed over is passed over.\n\
        Exit codes: 0 done, 1 a step failed or it was stopped, 3 not allowed now, 4 unreachable.")]
    Undo {
        /// The plan's name.
        plan: String,
        /// Delete what was written to their views, instead of keeping it.
        #[arg(long)]
        discard: bool,
        /// Also while hosts have disks of views open: they lose them.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        start: Begin,
    },
    /// What its runs and tests have done, newest first, and how long that took.
    #[command(after_help = "Examples:\n  \
        afterimage plan history site\n  \
        afterimage plan history site --steps          with what each group has taken\n  \
        afterimage plan history site --json | jq '.runs[0].steps[] | {step, took_ms}'")]
    History {
        /// The plan's name.
        plan: String,
        /// The steps of each, too.
        #[arg(long)]
        steps: bool,
        #[command(flatten)]
        which: Which,
    },
    /// How long a run would take from now, by what its runs and tests have taken.
    #[command(after_help = "Examples:\n  afterimage plan estimate site")]
    Estimate {
        /// The plan's name.
        plan: String,
    },
}

/// The fields of a plan.
#[derive(Args, Debug, Default)]
pub struct Wanted {
    /// A step: GROUP, and what is to be said of it; given once for each.
    #[arg(long = "step", value_name = "STEP")]
    steps: Vec<String>,
    /// So many steps at once at most, 1 to 16 [default: 4].
    #[arg(long, value_name = "NUMBER")]
    parallel: Option<u32>,
    /// For people.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
}

impl Wanted {
    fn over(&self, session: &Session, plan: &mut v1::Plan) -> Result<(), Failure> {
        if !self.steps.is_empty() {
            let tenant = session.tenant();
            let read = |step: &String| step::parse(step, |kind, id| format!("{tenant}/{kind}/{id}"));
            plan.steps = self.steps.iter().map(read).collect::<Result<_, _>>().map_err(Failure::usage)?;
        }
        if let Some(parallel) = self.parallel {
            plan.parallel = parallel;
        }
        if let Some(description) = &self.description {
            plan.description.clone_from(description);
        }
        Ok(())
    }

    fn mask(&self) -> FieldMask {
        let given = [
            ("steps", !self.steps.is_empty()),
            ("parallel", self.parallel.is_some()),
            ("description", self.description.is_some()),
        ];
        FieldMask { paths: given.into_iter().filter(|(_, is)| *is).map(|(field, _)| field.to_owned()).collect() }
    }
}

fn object(plan: &str) -> String {
    format!("plan \"{plan}\"")
}

async fn get(session: &Session, plan: &str) -> Result<v1::Plan, Failure> {
    let request = v1::GetPlanRequest { name: session.plan(plan) };
    session.ask(object(plan), session.plans().get_plan(request)).await
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::List { which } => {
            let request = v1::ListPlansRequest { parent: session.tenant(), filter: which.filter, ..Default::default() };
            let plans: Vec<v1::Plan> = every!(session, "plans", plans.list_plans(request).plans);
            let document = plans.iter().map(documents::plan).collect::<Vec<_>>();
            out.show(&serde_json::json!({"plans": document}), || listed(&plans));
        }
        Verb::Show { plan } => {
            let found = get(session, &plan).await?;
            out.show(&documents::plan(&found), || shown(&found));
        }
        Verb::Create { plan, wanted, dry_run } => {
            let mut made = v1::Plan::default();
            wanted.over(session, &mut made)?;
            let request = v1::CreatePlanRequest {
                parent: session.tenant(),
                plan_id: plan.clone(),
                plan: Some(made),
                validate_only: dry_run,
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&plan), session.plans().create_plan(request)).await?;
            out.show(&documents::plan(&made), || shown(&made));
        }
        Verb::Update { plan, wanted, dry_run } => {
            if wanted.mask().paths.is_empty() {
                return Err(Failure::new(Kind::Usage, object(&plan), "nothing to change was given")
                    .hint("name what changes, for instance --parallel 8; see afterimage plan update --help"));
            }
            let mut changed = get(session, &plan).await?;
            wanted.over(session, &mut changed)?;
            let request = v1::UpdatePlanRequest {
                plan: Some(changed),
                validate_only: dry_run,
                update_mask: Some(wanted.mask()),
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&plan), session.plans().update_plan(request)).await?;
            out.show(&documents::plan(&made), || shown(&made));
        }
        Verb::Delete { plan } => {
            let found = get(session, &plan).await?;
            let request = v1::DeletePlanRequest { name: found.name, etag: found.etag, ..Default::default() };
            session.ask(object(&plan), session.plans().delete_plan(request)).await?;
            out.show(&serde_json::json!({"deleted": {"plan": plan}}), || format!("plan {plan} deleted"));
        }
        Verb::History { plan, steps, which } => {
            let request =
                v1::ListPlanRunsRequest { parent: session.plan(&plan), filter: which.filter, ..Default::default() };
            let runs: Vec<v1::Operation> = every!(session, object(&plan), plans.list_plan_runs(request).runs);
            let document = runs.iter().map(documents::plan_run).collect::<Vec<_>>();
            out.show(&serde_json::json!({"plan": plan, "runs": document}), || history(&runs, steps));
        }
        Verb::Estimate { plan } => {
            let request = v1::EstimatePlanRequest { plan: session.plan(&plan) };
            let estimate = session.ask(object(&plan), session.plans().estimate_plan(request)).await?;
            out.show(&documents::plan_estimate(&plan, &estimate), || estimated(&estimate));
        }
        Verb::Stop { plan, no_wait } => {
            let request = v1::StopPlanRequest { plan: session.plan(&plan), ..Default::default() };
            let asked = session.ask(object(&plan), session.plans().stop_plan(request)).await?;
            let ended = if no_wait { asked } else { follow(session, asked, None).await? };
            out.show(&documents::plan_run(&ended), || run_shown(&ended));
        }
        verb => return begin(verb, session).await,
    }
    Ok(())
}

/// The verbs that begin a run.
async fn begin(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    let (plan, started, start) = match verb {
        Verb::Test { plan, to, start } => {
            let request = v1::TestPlanRequest {
                plan: session.plan(&plan),
                to: Some(api(to)),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&plan), session.plans().test_plan(request)).await?;
            (plan, started, start)
        }
        Verb::Run { plan, to, planned, unconfirmed, start } => {
            if let Some(name) = unconfirmed.as_ref().filter(|name| **name != plan) {
                let message = format!("--unconfirmed names \"{name}\", and the plan to run is \"{plan}\"");
                return Err(Failure::new(Kind::Usage, object(&plan), message)
                    .hint(format!("to say that the sources' machines are off, write --unconfirmed {plan}")));
            }
            if !start.dry_run {
                out.confirm(&object(&plan), &loss(session, &plan, to, planned, unconfirmed.is_some()).await?)?;
            }
            let request = v1::RunPlanRequest {
                plan: session.plan(&plan),
                to: Some(api(to)),
                planned,
                unconfirmed: unconfirmed.is_some(),
                confirm_name: unconfirmed.unwrap_or_default(),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&plan), session.plans().run_plan(request)).await?;
            (plan, started, start)
        }
        Verb::Undo { plan, discard, force, start } => {
            if !start.dry_run {
                let written = if discard { "is deleted" } else { "does not come along, and is kept as branches" };
                let loss = format!(
                    "What plan {plan} has failed over will run at its sources again, as those left it. What was written \
                     to its views {written}."
                );
                out.confirm(&object(&plan), &loss)?;
            }
            let request = v1::UndoPlanRequest {
                plan: session.plan(&plan),
                discard,
                force,
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&plan), session.plans().undo_plan(request)).await?;
            (plan, started, start)
        }
        Verb::Resume { plan, start } => {
            if !start.dry_run {
                let loss = format!("The newest run of plan {plan} goes on with the steps that it has not done.");
                out.confirm(&object(&plan), &loss)?;
            }
            let request = v1::ResumePlanRequest {
                plan: session.plan(&plan),
                validate_only: start.dry_run,
                request_id: start.request_id(),
            };
            let started = session.ask(object(&plan), session.plans().resume_plan(request)).await?;
            (plan, started, start)
        }
        _ => return Err(Failure::usage("this verb begins nothing")),
    };
    if start.no_wait && !started.validate_only {
        out.show(&documents::plan_run(&started), || {
            let (verb, name) = (&started.verb, id(&started.name));
            format!("{verb} {name} of plan {plan} started; see afterimage plan history {plan} --steps")
        });
        return Ok(());
    }
    let ended = if started.validate_only { started } else { follow(session, started, None).await? };
    end(session, &plan, &ended)
}

/// What a run leaves behind, said before it is begun.
async fn loss(
    session: &Session,
    plan: &str,
    to: Selector,
    planned: bool,
    unconfirmed: bool,
) -> Result<String, Failure> {
    let found = get(session, plan).await?;
    let groups: Vec<&str> = found.steps.iter().map(|step| id(&step.group)).collect();
    let request = v1::EstimatePlanRequest { plan: session.plan(plan) };
    let estimate = session.ask(object(plan), session.plans().estimate_plan(request)).await?;
    let takes = match estimate.rto_ms {
        Some(ms) => format!("about {}, as measured before", show_duration(ms.saturating_mul(1_000_000))),
        None => "not known: see `afterimage plan estimate`".to_owned(),
    };
    let lost = match (planned, unconfirmed) {
        (true, _) => "All I/O of their sources will be held, and nothing is lost.",
        (false, false) => {
            "All I/O of their sources will be held; lost is what their RPO shows, of those that are gone."
        }
        (false, true) => {
            "Sources are fenced where they can be reached. Where one cannot and its machine still runs, both will be \
             written to, and what is written at the source from now on does not come over."
        }
    };
    Ok(format!(
        "These groups will run at their targets, from {to}: {}.\n{lost}\nHow long it takes: {takes}.",
        groups.join(", ")
    ))
}

/// Shows how it ended; a run that was stopped or has failed is a failure of the command.
fn end(session: &Session, plan: &str, ended: &v1::Operation) -> Result<(), Failure> {
    let out = session.out;
    if out.json {
        out.show(&documents::plan_run(ended), String::new);
    } else if ended.validate_only {
        line(run_shown(ended).trim_end());
    }
    match (ended.state(), &ended.error) {
        (OperationState::Stopped, _) => {
            let message = "it was stopped before all steps were begun";
            let hint = format!("afterimage plan resume {plan}, or afterimage plan undo {plan}");
            Err(Failure::new(Kind::Failed, object(plan), message).hint(hint))
        }
        (OperationState::Failed, error) => {
            let error = error.clone().unwrap_or_default();
            // Of checks that do not pass nothing has been tried.
            let kind = if ended.validate_only { Kind::Refused } else { Kind::Failed };
            let message = format!("failed at step {}: {}", error.step, error.message);
            Err(Failure::new(kind, object(plan), message).hint(error.remedy))
        }
        _ => {
            if let Some(ms) = ended.plan_run.as_ref().and_then(|run| run.rto_ms).filter(|_| !ended.validate_only) {
                out.note(&format!("all have answered, {} after it was begun", show_duration(ms * 1_000_000)));
            }
            Ok(())
        }
    }
}

fn took(ms: Option<u64>) -> String {
    ms.map_or_else(String::new, |ms| show_duration(ms.saturating_mul(1_000_000)))
}

fn measure(measure: Option<&v1::PlanMeasure>) -> String {
    let Some(measure) = measure else { return "never".to_owned() };
    let rto = measure.rto_ms.map(|_| format!(", RTO {}", took(measure.rto_ms))).unwrap_or_default();
    format!("{} at {}{rto}", operation_word(measure.state()), show_time(measure.end_time_ns))
}

fn listed(plans: &[v1::Plan]) -> String {
    if plans.is_empty() {
        return "no plans; create one: afterimage plan create site --step GROUP".to_owned();
    }
    table(
        &["PLAN", ">STEPS", ">PARALLEL", "RUNNING", "LAST TEST", "LAST RUN"],
        plans.iter().map(|plan| {
            let running = if plan.running.is_empty() { ("", Mood::Plain) } else { ("yes", Mood::Care) };
            vec![
                text(id(&plan.name)),
                text(plan.steps.len().to_string()),
                text(plan.parallel.to_string()),
                state(running.0, running.1),
                text(measure(plan.last_test.as_ref())),
                text(measure(plan.last_run.as_ref())),
            ]
        }),
    )
}

fn shown(plan: &v1::Plan) -> String {
    let mut text = fields(&[
        ("plan", id(&plan.name).to_owned()),
        ("description", plan.description.clone()),
        ("at once", plan.parallel.to_string()),
        ("running", id(&plan.running).to_owned()),
        ("last test", measure(plan.last_test.as_ref())),
        ("last run", measure(plan.last_run.as_ref())),
        ("uid", plan.uid.clone()),
        ("version", plan.version.to_string()),
        ("created", show_time(plan.create_time_ns)),
        ("updated", show_time(plan.update_time_ns)),
    ]);
    text += "\n";
    for step in &plan.steps {
        text += &format!("step {}\n", step::typed(step));
    }
    text
}

fn mood(state: OperationState) -> Mood {
    match state {
        OperationState::Done => Mood::Good,
        OperationState::Failed => Mood::Bad,
        _ => Mood::Care,
    }
}

fn history(runs: &[v1::Operation], steps: bool) -> String {
    if runs.is_empty() {
        return "never run and never tested".to_owned();
    }
    if steps {
        return runs.iter().map(run_shown).collect::<Vec<_>>().join("\n");
    }
    table(
        &["=RUN", "VERB", "STATE", "STARTED", ">TOOK", ">RTO"],
        runs.iter().map(|run| {
            let lasted = run.end_time_ns.checked_sub(run.create_time_ns).map(show_duration);
            vec![
                text(id(&run.name)),
                text(&run.verb),
                state(operation_word(run.state()), mood(run.state())),
                text(show_time(run.create_time_ns)),
                text(lasted.unwrap_or_default()),
                text(took(run.plan_run.as_ref().and_then(|run| run.rto_ms))),
            ]
        }),
    )
}

fn run_shown(run: &v1::Operation) -> String {
    // A dry run is stored nowhere and has no name.
    let what = match run.validate_only {
        true => format!("dry run of {}", run.verb),
        false => format!("{} {}", run.verb, id(&run.name)),
    };
    let mut shown = format!("{what} of plan {}: {}\n", id(&run.subject), operation_word(run.state()));
    let detail = run.plan_run.clone().unwrap_or_default();
    if run.create_time_ns > 0 && !run.validate_only {
        shown += &format!("started {} by {}\n", show_time(run.create_time_ns), run.actor);
    }
    if !detail.stopped_by.is_empty() {
        shown += &format!("to be stopped, by {}\n", detail.stopped_by);
    }
    shown += "\n";
    shown += &table(
        &["STEP", "GROUP", "STATE", ">TOOK", ">ANSWERED", "DETAIL"],
        detail.steps.iter().map(|step| {
            let mood = match step.state() {
                StepState::Done => Mood::Good,
                StepState::Failed => Mood::Bad,
                StepState::Running => Mood::Care,
                _ => Mood::Plain,
            };
            let word = match step.state() {
                StepState::Running => format!("{} ({})", step_word(step.state()), step.stage),
                other => step_word(other).to_owned(),
            };
            vec![
                text(&step.step),
                text(id(&step.group)),
                state(word, mood),
                text(took(step.took_ms)),
                text(took(step.answered_ms)),
                text(&step.detail),
            ]
        }),
    );
    if let Some(error) = &run.error {
        shown += &format!("\nfailed at step {}: {}\n  to do: {}\n", error.step, error.message, error.remedy);
    }
    shown
}

fn estimated(estimate: &v1::PlanEstimate) -> String {
    let by = |step: &v1::StepEstimate| match (step.over_already, step.measured_by.is_empty()) {
        (true, _) => "failed over already".to_owned(),
        (_, true) => "unknown: never run and never tested".to_owned(),
        _ => format!("{} of {}", if step.by_test { "test" } else { "run" }, show_time(step.measured_time_ns)),
    };
    let mut shown = table(
        &["STEP", "GROUP", ">TAKES", ">ANSWERS AFTER", "BY"],
        estimate.steps.iter().map(|step| {
            vec![
                text(&step.step),
                text(id(&step.group)),
                text(took(step.took_ms)),
                text(took(step.answered_ms)),
                text(by(step)),
            ]
        }),
    );
    shown += "\n";
    shown += &match estimate.rto_ms {
        Some(_) => format!("RTO {}\n", took(estimate.rto_ms)),
        None => "RTO unknown: test the plan (afterimage plan test)\n".to_owned(),
    };
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(kind: &str) -> String {
        format!("tenants/default/{kind}/{}", "x".repeat(63))
    }

    #[test]
    fn tables_fit_100_columns() {
        let measure =
            v1::PlanMeasure { rto_ms: Some(95_123), end_time_ns: 1_700_000_000_000_000_000, ..Default::default() };
        let plan = v1::Plan {
            name: long("plans"),
            last_test: Some(measure.clone()),
            last_run: Some(measure),
            ..Default::default()
        };
        let step = v1::PlanRunStep {
            step: "s".repeat(63),
            group: long("groups"),
            detail: "words that go on and on ".repeat(9),
            took_ms: Some(95_123),
            answered_ms: Some(95_123),
            ..Default::default()
        };
        let run = v1::Operation {
            name: "tenants/default/operations/3c0e5f0a-94a7-4a52-9d29-1b7f5d3f6f11".into(),
            subject: long("plans"),
            verb: "undo-plan".into(),
            create_time_ns: 1_700_000_000_000_000_000,
            end_time_ns: 1_700_000_120_000_000_000,
            plan_run: Some(v1::PlanRun { steps: vec![step], rto_ms: Some(95_123), ..Default::default() }),
            ..Default::default()
        };
        let guess = v1::StepEstimate {
            step: "s".repeat(63),
            group: long("groups"),
            took_ms: Some(95_123),
            measured_by: "x".into(),
            measured_time_ns: 1_700_000_000_000_000_000,
            ..Default::default()
        };
        let estimate = v1::PlanEstimate { steps: vec![guess], rto_ms: None };
        for shown in [listed(&[plan]), history(std::slice::from_ref(&run), false), estimated(&estimate)] {
            assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
        }
        let table = run_shown(&run);
        assert!(table.lines().skip(3).all(|line| line.chars().count() <= 100), "{table}");
    }
}
