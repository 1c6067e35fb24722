//! Failover plans: which groups, in which order, with what is run before and after each. Checked at the API; what is done with
//! one is decided in [`run`], how long that takes is guessed in [`estimate`].

use afterimage_wire::v1;
use serde::{Deserialize, Serialize};

use crate::model::{MAX_OBJECTS, Model};
use crate::names::{Kind, Name, check_id};
use crate::objects::Object;
use crate::policy::check_text;
use crate::problem::Problem;

pub mod estimate;
pub mod run;
pub mod shown;

/// Most steps of a plan.
const MAX_STEPS: usize = 100;
/// Most steps at once.
const MAX_PARALLEL: u32 = 16;
/// Steps at once unless told.
const DEFAULT_PARALLEL: u32 = 4;
/// Longest delay after a step, milliseconds: a day.
const MAX_DELAY_MS: u64 = 86_400_000;
/// How long a step has to answer unless told, milliseconds.
const DEFAULT_READY_MS: u64 = 300_000;
/// How long it may have, milliseconds.
const READY_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
/// Most tries after the first.
const MAX_RETRIES: u32 = 10;
/// Most scripts before a step, and after it.
const MAX_SCRIPTS: usize = 8;
/// Longest address, bytes.
const MAX_ADDRESS: usize = 200;

/// What is done with a plan.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanVerb {
    /// Its groups are failed over.
    Run,
    /// The machines of its groups are started from views that are thrown away.
    Test,
    /// What it has failed over is brought back, in the reverse order.
    Undo,
}

impl PlanVerb {
    /// As scripts and the API have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Test => "test",
            Self::Undo => "undo",
        }
    }
}

impl From<v1::PlanVerb> for PlanVerb {
    fn from(verb: v1::PlanVerb) -> Self {
        match verb {
            v1::PlanVerb::Unspecified | v1::PlanVerb::Run => Self::Run,
            v1::PlanVerb::Test => Self::Test,
            v1::PlanVerb::Undo => Self::Undo,
        }
    }
}

/// A script of a proxy's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Script {
    /// As the proxy's configuration calls it.
    pub name: String,
    /// Id of the proxy; empty for the target of the group.
    pub proxy: String,
    /// For which verbs.
    pub verbs: Vec<PlanVerb>,
}

/// What shows that a step answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shown {
    /// Something accepts at `host:port`.
    Tcp(String),
    /// A script says so.
    Script(String),
}

/// When a step counts as answering.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// What shows it.
    pub by: Shown,
    /// Id of the proxy that looks; empty for the target of the group.
    pub proxy: String,
}

/// A group in a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlanStep {
    /// What other steps call it.
    pub id: String,
    /// Id of the group.
    pub group: String,
    /// Ids of steps before it.
    pub after: Vec<String>,
    /// How long those that come after it wait, milliseconds.
    pub delay_ms: u64,
    /// When it answers, beside what its machines say.
    pub check: Option<Check>,
    /// How long it has for that, milliseconds.
    pub ready_within_ms: u64,
    /// Tries after the first.
    pub retries: u32,
    /// Before anything else.
    pub before: Vec<Script>,
    /// Once it answers.
    pub then: Vec<Script>,
}

/// A group that a plan has failed over, and that has not been brought back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Moved {
    /// Uid of the group.
    pub group_uid: String,
    /// Generation of its disks since: with another one it is another failover.
    pub generation: u64,
}

/// A plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Uid.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Id.
    pub id: String,
    /// Rises with each change.
    pub version: u64,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub updated_ns: u64,
    /// For a person.
    pub description: String,
    /// In the order in which they are begun where the plan leaves it open.
    pub steps: Vec<PlanStep>,
    /// Steps at once.
    pub parallel: u32,
    /// What it has failed over.
    pub moved: Vec<Moved>,
}

fn proxy_id(model: &Model, tenant: &str, field: &str, name: &str) -> Result<String, Problem> {
    if name.is_empty() {
        return Ok(String::new());
    }
    let proxy = Name::parse(field, Kind::Proxy, name)?;
    if proxy.tenant != tenant {
        return Err(Problem::not_found("proxy", proxy));
    }
    model.proxy(&proxy)?;
    Ok(proxy.id)
}

fn verb(field: &str, verb: i32) -> Result<PlanVerb, Problem> {
    match v1::PlanVerb::try_from(verb) {
        Ok(verb) => Ok(verb.into()),
        Err(_) => Err(Problem::invalid(field, verb, "PLAN_VERB_RUN, PLAN_VERB_TEST, PLAN_VERB_UNDO")),
    }
}

fn scripts(model: &Model, tenant: &str, root: &str, asked: &[v1::PlanScript]) -> Result<Vec<Script>, Problem> {
    if asked.len() > MAX_SCRIPTS {
        return Err(Problem::invalid(root, asked.len(), format!("up to {MAX_SCRIPTS} scripts")));
    }
    let made = |(i, script): (usize, &v1::PlanScript)| {
        let field = format!("{root}[{i}]");
        check_id(&format!("{field}.script"), &script.script)?;
        let mut verbs = Vec::new();
        for given in &script.verbs {
            let given = verb(&format!("{field}.verbs"), *given)?;
            if !verbs.contains(&given) {
                verbs.push(given);
            }
        }
        if verbs.is_empty() {
            verbs.push(PlanVerb::Run);
        }
        let proxy = proxy_id(model, tenant, &format!("{field}.proxy"), &script.proxy)?;
        Ok(Script { name: script.script.clone(), proxy, verbs })
    };
    asked.iter().enumerate().map(made).collect()
}

fn check(model: &Model, tenant: &str, root: &str, asked: &v1::PlanCheck) -> Result<Option<Check>, Problem> {
    use v1::plan_check::What;
    let by = match &asked.what {
        None => return Ok(None),
        Some(What::Script(name)) => {
            check_id(&format!("{root}.script"), name)?;
            Shown::Script(name.clone())
        }
        Some(What::Tcp(at)) => {
            let fits = at
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
            if !fits || at.len() > MAX_ADDRESS || !at.chars().all(|c| c.is_ascii_graphic()) {
                return Err(Problem::invalid(format!("{root}.tcp"), at, "HOST:PORT"));
            }
            Shown::Tcp(at.clone())
        }
    };
    Ok(Some(Check { by, proxy: proxy_id(model, tenant, &format!("{root}.proxy"), &asked.proxy)? }))
}

impl PlanStep {
    fn wanted(model: &Model, tenant: &str, root: &str, asked: &v1::PlanStep) -> Result<Self, Problem> {
        let group = Name::parse(&format!("{root}.group"), Kind::Group, &asked.group)?;
        if group.tenant != tenant {
            return Err(Problem::not_found("group", group));
        }
        model.group(&group)?;
        let id = if asked.id.is_empty() { group.id.clone() } else { asked.id.clone() };
        check_id(&format!("{root}.id"), &id)?;
        if asked.delay_ms > MAX_DELAY_MS {
            let allowed = format!("0 to {MAX_DELAY_MS}");
            return Err(Problem::invalid(format!("{root}.delay_ms"), asked.delay_ms, allowed));
        }
        let ready_within_ms = asked.ready_within_ms.unwrap_or(DEFAULT_READY_MS);
        if !READY_MS.contains(&ready_within_ms) {
            let allowed = format!("{} to {}", READY_MS.start(), READY_MS.end());
            return Err(Problem::invalid(format!("{root}.ready_within_ms"), ready_within_ms, allowed));
        }
        if asked.retries > MAX_RETRIES {
            return Err(Problem::invalid(format!("{root}.retries"), asked.retries, format!("0 to {MAX_RETRIES}")));
        }
        let checked = asked.check.as_ref().map(|asked| check(model, tenant, &format!("{root}.check"), asked));
        Ok(Self {
            id,
            group: group.id,
            after: asked.after.clone(),
            delay_ms: asked.delay_ms,
            check: checked.transpose()?.flatten(),
            ready_within_ms,
            retries: asked.retries,
            before: scripts(model, tenant, &format!("{root}.before"), &asked.before)?,
            then: scripts(model, tenant, &format!("{root}.then"), &asked.then)?,
        })
    }

    /// The scripts of a verb, before or after.
    pub fn scripts(&self, verb: PlanVerb, after: bool) -> Vec<&Script> {
        let all = if after { &self.then } else { &self.before };
        all.iter().filter(|script| script.verbs.contains(&verb)).collect()
    }
}

impl Plan {
    /// A plan as asked for, with the identity of `old` or a new one.
    ///
    /// # Errors
    /// Names the field, the value and what is allowed; something that it names does not exist.
    pub fn wanted(
        model: &Model,
        name: &Name,
        asked: &v1::Plan,
        old: Option<&Self>,
        now_ns: u64,
    ) -> Result<Self, Problem> {
        check_text("plan.description", &asked.description)?;
        if old.is_none() && model.plans.len() >= MAX_OBJECTS {
            return Err(Problem::Limit { what: "plans".into(), limit: MAX_OBJECTS as u64 });
        }
        if asked.steps.is_empty() || asked.steps.len() > MAX_STEPS {
            return Err(Problem::invalid("plan.steps", asked.steps.len(), format!("1 to {MAX_STEPS} steps")));
        }
        let parallel = if asked.parallel == 0 { DEFAULT_PARALLEL } else { asked.parallel };
        if parallel > MAX_PARALLEL {
            return Err(Problem::invalid("plan.parallel", parallel, format!("1 to {MAX_PARALLEL}")));
        }
        let mut steps: Vec<PlanStep> = Vec::new();
        for (i, asked) in asked.steps.iter().enumerate() {
            let root = format!("plan.steps[{i}]");
            let step = PlanStep::wanted(model, &name.tenant, &root, asked)?;
            for (field, twice) in [
                ("id", steps.iter().any(|s| s.id == step.id).then_some(&step.id)),
                ("group", steps.iter().any(|s| s.group == step.group).then_some(&step.group)),
            ] {
                if let Some(value) = twice {
                    return Err(Problem::invalid(format!("{root}.{field}"), value, "each step, and each group, once"));
                }
            }
            // Only steps before it: so there are no circles.
            for (j, after) in step.after.iter().enumerate() {
                let known: Vec<&str> = steps.iter().map(|s| s.id.as_str()).collect();
                if !known.contains(&after.as_str()) || step.after[..j].contains(after) {
                    let allowed = match known.is_empty() {
                        true => "nothing: it is the first".to_owned(),
                        false => format!("steps before it, each once: {}", known.join(", ")),
                    };
                    return Err(Problem::invalid(format!("{root}.after"), after, allowed));
                }
            }
            steps.push(step);
        }
        Ok(Self {
            uid: old.map_or_else(crate::objects::new_uid, |o| o.uid.clone()),
            tenant: name.tenant.clone(),
            id: name.id.clone(),
            version: old.map_or(1, |o| o.version + 1),
            created_ns: old.map_or(now_ns, |o| o.created_ns),
            updated_ns: now_ns,
            description: asked.description.clone(),
            steps,
            parallel,
            moved: old.map(|o| o.moved.clone()).unwrap_or_default(),
        })
    }

    /// Its name.
    pub fn name(&self) -> Name {
        Name::new(&self.tenant, Kind::Plan, &self.id)
    }

    /// Whether it runs scripts, or looks, by this proxy.
    pub fn names_proxy(&self, id: &str) -> bool {
        self.steps.iter().any(|step| {
            let scripts = step.before.iter().chain(&step.then).any(|script| script.proxy == id);
            scripts || step.check.as_ref().is_some_and(|check| check.proxy == id)
        })
    }
}

/// A name for the API; empty without an id.
fn full(tenant: &str, kind: Kind, id: &str) -> String {
    if id.is_empty() { String::new() } else { Name::new(tenant, kind, id).to_string() }
}

/// A verb for the API.
pub fn verb_to_proto(verb: PlanVerb) -> v1::PlanVerb {
    match verb {
        PlanVerb::Run => v1::PlanVerb::Run,
        PlanVerb::Test => v1::PlanVerb::Test,
        PlanVerb::Undo => v1::PlanVerb::Undo,
    }
}

/// A plan for the API.
pub fn to_proto(model: &Model, plan: &Plan) -> v1::Plan {
    let full = |kind, id: &str| full(&plan.tenant, kind, id);
    let script = |script: &Script| v1::PlanScript {
        script: script.name.clone(),
        proxy: full(Kind::Proxy, &script.proxy),
        verbs: script.verbs.iter().map(|verb| verb_to_proto(*verb).into()).collect(),
    };
    let check = |check: &Check| v1::PlanCheck {
        what: Some(match &check.by {
            Shown::Tcp(at) => v1::plan_check::What::Tcp(at.clone()),
            Shown::Script(name) => v1::plan_check::What::Script(name.clone()),
        }),
        proxy: full(Kind::Proxy, &check.proxy),
    };
    let step = |step: &PlanStep| v1::PlanStep {
        id: step.id.clone(),
        group: full(Kind::Group, &step.group),
        after: step.after.clone(),
        delay_ms: step.delay_ms,
        check: step.check.as_ref().map(check),
        ready_within_ms: Some(step.ready_within_ms),
        retries: step.retries,
        before: step.before.iter().map(script).collect(),
        then: step.then.iter().map(script).collect(),
    };
    v1::Plan {
        name: plan.name().to_string(),
        uid: plan.uid.clone(),
        etag: model.etag(&Object::Plan(plan.clone()).key()),
        version: plan.version,
        create_time_ns: plan.created_ns,
        update_time_ns: plan.updated_ns,
        description: plan.description.clone(),
        steps: plan.steps.iter().map(step).collect(),
        parallel: plan.parallel,
        running: model.running(plan).map(|run| run.name().to_string()).unwrap_or_default(),
        last_test: shown::newest(model, plan, PlanVerb::Test),
        last_run: shown::newest(model, plan, PlanVerb::Run),
    }
}

#[cfg(test)]
#[path = "plan/plan_tests.rs"]
mod tests;
