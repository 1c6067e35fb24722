//! Runs over groups that are played: a crash of the coordinator at each record, a stop at each, a failure of each task; then they
//! are resumed, and undone.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::plan::estimate::estimate;
use crate::plan::{Check, Shown};

const SECOND: u64 = 1_000_000_000;

fn script(name: &str, verbs: &[PlanVerb]) -> Script {
    Script { name: name.into(), proxy: String::new(), verbs: verbs.to_vec() }
}

fn step(id: &str, after: &[&str]) -> PlanStep {
    PlanStep {
        id: id.into(),
        group: id.into(),
        after: after.iter().map(|id| (*id).to_owned()).collect(),
        delay_ms: 0,
        check: None,
        ready_within_ms: 1000,
        retries: 0,
        before: Vec::new(),
        then: Vec::new(),
    }
}

/// Two that go at once, one after both, one after that.
fn site() -> Plan {
    let check = Some(Check { by: Shown::Tcp("10.0.0.7:80".into()), proxy: String::new() });
    let all = [PlanVerb::Run, PlanVerb::Undo];
    let app = PlanStep { check, before: vec![script("route", &all)], ..step("app", &["db", "cache"]) };
    let then = vec![script("dns", &all), script("mail", &[PlanVerb::Run])];
    let web = PlanStep { then, retries: 1, ..step("web", &["app"]) };
    Plan {
        uid: "p".into(),
        tenant: "default".into(),
        id: "site".into(),
        version: 1,
        created_ns: 1,
        updated_ns: 1,
        description: String::new(),
        steps: vec![PlanStep { delay_ms: 500, ..step("db", &[]) }, step("cache", &[]), app, web],
        parallel: 2,
        moved: Vec::new(),
    }
}

fn spec(verb: PlanVerb) -> Spec {
    let (planned, unconfirmed, discard, force) = (false, false, false, false);
    Spec { verb, to: Choice::Latest, planned, unconfirmed, discard, force, reason: String::new() }
}

/// What is done to a run in its middle.
#[derive(Clone, Debug, Default)]
struct Harm {
    /// The coordinator dies at this record: what was to be done then has not been done; or it has, and nobody was told.
    crash: Option<(usize, bool)>,
    /// It is asked to stop at this record.
    stop: Option<usize>,
    /// This task of all fails.
    fails: Option<usize>,
    /// Replies come in the reverse order.
    reverse: bool,
}

/// The groups, and everybody who is told something.
struct World {
    plan: Plan,
    now: u64,
    /// Generation of each group: even at its source, odd when it is failed over.
    groups: BTreeMap<String, u64>,
    /// Operations of groups, by the ids they were asked for with: whether they were done.
    children: BTreeMap<String, bool>,
    /// Scripts that ran, by id.
    scripts: BTreeMap<String, String>,
    /// Groups that answer.
    answers: BTreeSet<String>,
    tasks: usize,
    runs: usize,
}

impl World {
    fn new() -> Self {
        let plan = site();
        let groups = plan.steps.iter().map(|step| (step.group.clone(), 2)).collect();
        let (children, scripts, answers) = Default::default();
        Self { plan, now: SECOND, groups, children, scripts, answers, tasks: 0, runs: 0 }
    }

    fn over(&self) -> Vec<&str> {
        self.groups.iter().filter(|(_, generation)| *generation % 2 == 1).map(|(id, _)| id.as_str()).collect()
    }

    /// Does a task, or fails at it; that something is done twice, or too early, is seen here.
    fn does(&mut self, run: &Run, begun: &Begun, fails: Option<usize>) -> Reply {
        self.tasks += 1;
        let fails = fails == Some(self.tasks);
        let step = &run.steps[begun.step];
        let group = step.wanted.group.clone();
        let no = || Reply::No { why: "broken".into(), remedy: "mend it".into() };
        match &begun.task {
            Task::Script { .. } | Task::Ready if fails => no(),
            Task::Script { script, id } => {
                let known = self.scripts.insert(id.clone(), script.name.clone());
                assert!(known.is_none_or(|known| known == script.name), "one id for two scripts");
                Reply::Yes(String::new())
            }
            Task::Ready => {
                assert!(self.groups[&group] % 2 == 1, "{group} is looked at, and does not run");
                self.answers.insert(group);
                Reply::Yes("accepts".into())
            }
            Task::Failover { request_id } => {
                let known = self.children.get(request_id).copied();
                let done = known.unwrap_or(!fails);
                self.children.insert(request_id.clone(), done);
                let generation = self.groups.get_mut(&group).unwrap();
                if known.is_none() && done {
                    match run.spec.verb {
                        PlanVerb::Run => {
                            assert!(generation.is_multiple_of(2), "{group} is failed over twice");
                            *generation += 1;
                            if step.wanted.check.is_none() {
                                self.answers.insert(group.clone());
                            }
                            let early = step.wanted.after.iter().find(|id| !self.answers.contains(*id));
                            assert_eq!(early, None, "{group} is too early");
                        }
                        PlanVerb::Undo => {
                            assert!(*generation % 2 == 1, "{group} is undone twice");
                            *generation += 1;
                            self.answers.remove(&group);
                            let later = self.plan.steps.iter().filter(|s| s.after.contains(&step.wanted.id));
                            let early = later.map(|s| &s.group).find(|id| self.groups[*id] % 2 == 1);
                            assert_eq!(early, None, "{group} is undone before what stands on it");
                        }
                        PlanVerb::Test => {}
                    }
                }
                let generation = self.groups[&group];
                let uid = format!("op {request_id}");
                let (why, remedy) = ("broken".to_owned(), "mend it".to_owned());
                Reply::Ended(match done {
                    false => Child { uid, why, remedy, ..Child::default() },
                    true => Child { uid, done, answered: true, group_uid: group, generation, ..Child::default() },
                })
            }
        }
    }

    fn begin(&mut self, verb: PlanVerb) -> Run {
        self.runs += 1;
        let uid = format!("run {}", self.runs);
        Run::new(&self.plan, uid, spec(verb), ("operator/anna", ""), |id| vec![format!("m-{id}")], self.now)
    }

    fn next(&self, run: &mut Run, resumed: bool) -> Next {
        let stands = |step: &RunStep| {
            let generation = self.groups[&step.wanted.group];
            let ours = |m: &Moved| m.group_uid == step.wanted.group && m.generation == generation;
            match generation % 2 {
                0 => Stands::AtSource,
                _ => Stands::Over { ours: self.plan.moved.iter().any(ours) },
            }
        };
        let next = run.begin(&stands, resumed, self.now);
        let running = run.steps.iter().filter(|s| s.state == StepState::Running).count();
        assert!(running <= self.plan.parallel as usize, "too many at once");
        // What is begun is what is read back.
        let kept = serde_json::to_vec(run).unwrap();
        assert_eq!(serde_json::from_slice::<Run>(&kept).unwrap(), *run);
        next
    }

    /// A run to its end; how many records that took.
    fn play(&mut self, mut run: Run, harm: &Harm) -> (Run, usize) {
        let mut records = 0;
        let mut doing: Vec<Begun> = Vec::new();
        let mut pending_at_stop: Option<Vec<String>> = None;
        let pending = |run: &Run| -> Vec<String> {
            run.steps.iter().filter(|s| s.state == StepState::Pending).map(|s| s.wanted.id.clone()).collect()
        };
        let mut next = self.next(&mut run, true);
        loop {
            records += 1;
            assert!(records < 200, "it does not end: {run:?}");
            if let Some((_, late)) = harm.crash.filter(|(at, _)| *at == records) {
                if late {
                    for begun in doing.iter().chain(&next.tasks).cloned().collect::<Vec<_>>() {
                        self.does(&run, &begun, None);
                    }
                }
                doing.clear();
                self.now += SECOND;
                next = self.next(&mut run, true);
                continue;
            }
            doing.append(&mut next.tasks);
            if next.ended {
                assert!(doing.is_empty() && run.ended());
                if let Some(before) = pending_at_stop {
                    assert_eq!(pending(&run), before, "a step was begun after the stop");
                }
                return (run, records);
            }
            if harm.stop == Some(records) {
                run.stop("operator/anna").unwrap();
                pending_at_stop = Some(pending(&run));
            } else if doing.is_empty() {
                let wake = next.wake_ms.expect("there is something to wait for");
                self.now += wake * 1_000_000;
            } else {
                self.now += SECOND / 100;
                let begun = if harm.reverse { doing.pop().unwrap() } else { doing.remove(0) };
                let reply = self.does(&run, &begun, harm.fails);
                let mut moved = std::mem::take(&mut self.plan.moved);
                run.apply(begun.step, reply, &mut moved, self.now);
                self.plan.moved = moved;
            }
            next = self.next(&mut run, false);
        }
    }

    fn does_all(&mut self, verb: PlanVerb) -> Run {
        let run = self.begin(verb);
        let (run, _) = self.play(run, &Harm::default());
        assert_eq!(run.state, RunState::Done, "{run:?}");
        run
    }

    /// A run that ended too early goes on to its end.
    fn resumed(&mut self, before: &Run) -> Run {
        if before.state == RunState::Done {
            return before.clone();
        }
        let run = self.begin(before.spec.verb).continuing(before);
        let (run, _) = self.play(run, &Harm::default());
        assert_eq!(run.state, RunState::Done, "{before:?} {run:?}");
        run
    }

    fn ran(&self, name: &str) -> usize {
        self.scripts.values().filter(|script| *script == name).count()
    }
}

/// What a run is put through: each harm at each place that it has.
fn harms(verb: PlanVerb) -> Vec<Harm> {
    let mut world = World::new();
    if verb == PlanVerb::Undo {
        world.does_all(PlanVerb::Run);
    }
    let before = world.tasks;
    let run = world.begin(verb);
    let (_, records) = world.play(run, &Harm::default());
    let tasks = world.tasks - before;
    let mut all = vec![Harm::default()];
    for at in 1..=records {
        all.push(Harm { crash: Some((at, false)), ..Harm::default() });
        all.push(Harm { crash: Some((at, true)), ..Harm::default() });
        all.push(Harm { stop: Some(at), ..Harm::default() });
        all.extend((1..=records + 2).map(|crash| Harm {
            stop: Some(at),
            crash: Some((crash, true)),
            ..Harm::default()
        }));
    }
    for at in before + 1..=before + tasks {
        all.push(Harm { fails: Some(at), ..Harm::default() });
        all.extend((1..=records + 2).map(|crash| Harm {
            fails: Some(at),
            crash: Some((crash, false)),
            ..Harm::default()
        }));
    }
    let reversed = all.clone().into_iter().map(|harm| Harm { reverse: true, ..harm });
    all.extend(reversed);
    all
}

#[test]
fn whatever_happens_in_a_run_it_can_be_resumed_and_undone() {
    for harm in harms(PlanVerb::Run) {
        let mut world = World::new();
        let run = world.begin(PlanVerb::Run);
        let (ended, _) = world.play(run, &harm);
        match (harm.stop, harm.fails) {
            (None, None) => assert_eq!(ended.state, RunState::Done, "{harm:?}"),
            (Some(_), _) => assert_ne!(ended.state, RunState::Failed, "{harm:?}"),
            // The last one is tried again.
            (_, Some(_)) => {
                let web = ended.failed().is_none();
                assert_eq!(ended.state, if web { RunState::Done } else { RunState::Failed }, "{harm:?}");
            }
        }
        // It may be undone as it stands, or resumed.
        let moved = world.plan.moved.len();
        assert_eq!(world.over().len(), moved, "{harm:?}: what was moved is known");
        let mut undone = World {
            plan: world.plan.clone(),
            groups: world.groups.clone(),
            children: world.children.clone(),
            scripts: world.scripts.clone(),
            answers: world.answers.clone(),
            ..world
        };
        undone.does_all(PlanVerb::Undo);
        assert!(undone.over().is_empty() && undone.plan.moved.is_empty(), "{harm:?}");
    }
}

#[test]
fn a_run_that_was_resumed_has_done_everything_once() {
    for harm in harms(PlanVerb::Run) {
        let mut world = World::new();
        let run = world.begin(PlanVerb::Run);
        let (ended, _) = world.play(run, &harm);
        world.resumed(&ended);
        assert_eq!(world.over(), ["app", "cache", "db", "web"], "{harm:?}");
        assert_eq!(world.children.values().filter(|done| **done).count(), 4, "{harm:?}: one operation each");
        assert_eq!((world.ran("route"), world.ran("dns"), world.ran("mail")), (1, 1, 1), "{harm:?}");
        world.does_all(PlanVerb::Undo);
        assert!(world.over().is_empty() && world.plan.moved.is_empty(), "{harm:?}");
        assert_eq!((world.ran("route"), world.ran("dns"), world.ran("mail")), (2, 2, 1), "{harm:?}");
    }
}

#[test]
fn whatever_happens_in_an_undo_it_can_be_resumed() {
    for harm in harms(PlanVerb::Undo) {
        let mut world = World::new();
        world.does_all(PlanVerb::Run);
        let undo = world.begin(PlanVerb::Undo);
        let (ended, _) = world.play(undo, &harm);
        world.resumed(&ended);
        assert!(world.over().is_empty() && world.plan.moved.is_empty(), "{harm:?}");
        assert_eq!(world.children.values().filter(|done| **done).count(), 8, "{harm:?}");
    }
}

#[test]
fn a_test_touches_nothing() {
    for harm in harms(PlanVerb::Test) {
        let mut world = World::new();
        let run = world.begin(PlanVerb::Test);
        let (ended, _) = world.play(run, &harm);
        world.resumed(&ended);
        assert!(world.over().is_empty() && world.scripts.is_empty() && world.plan.moved.is_empty(), "{harm:?}");
    }
}

#[test]
fn what_somebody_else_has_failed_over_is_passed_over_and_not_undone() {
    let mut world = World::new();
    world.groups.insert("cache".into(), 3);
    world.answers.insert("cache".into());
    let run = world.does_all(PlanVerb::Run);
    let cache = &run.steps[1];
    assert_eq!((cache.state, cache.detail.as_str()), (StepState::Skipped, "failed over already"));
    // And of what it did itself, somebody has brought one back and failed it over again.
    *world.groups.get_mut("db").unwrap() += 2;
    let undo = world.does_all(PlanVerb::Undo);
    assert_eq!(world.over(), ["cache", "db"]);
    assert_eq!(undo.steps[0].detail, "failed over, but not by this plan");
    let again = world.does_all(PlanVerb::Undo);
    assert!(again.steps.iter().all(|step| step.state == StepState::Skipped));
}

#[test]
fn what_comes_after_a_failure_says_why_it_was_not_begun_and_the_rest_goes_on() {
    let mut world = World::new();
    world.plan.steps.push(step("alone", &[]));
    world.groups.insert("alone".into(), 2);
    let run = world.begin(PlanVerb::Run);
    let (ended, _) = world.play(run, &Harm { fails: Some(1), ..Harm::default() });
    assert_eq!(ended.state, RunState::Failed);
    let says = |at: usize| ended.steps[at].detail.as_str();
    assert_eq!(
        (says(0), says(2), says(3)),
        ("broken", "not begun: it comes after db", "not begun: it comes after app")
    );
    assert_eq!(world.over(), ["alone", "cache"]);
    assert_eq!(ended.failed().unwrap().remedy, "mend it");
}

#[test]
fn a_plan_that_was_mended_is_resumed_as_it_is_now() {
    let mut world = World::new();
    let run = world.begin(PlanVerb::Run);
    // The look at the third one.
    let (ended, _) = world.play(run, &Harm { fails: Some(5), ..Harm::default() });
    let app = ended.failed().unwrap();
    assert_eq!((app.wanted.id.as_str(), app.stage), ("app", Stage::Ready));
    world.plan.steps[2].check = None;
    world.plan.steps[2].then = vec![script("more", &[PlanVerb::Run])];
    let run = world.resumed(&ended);
    assert_eq!((world.ran("more"), world.ran("route")), (1, 1));
    assert!(run.steps[2].midway && run.steps[2].took_ms().is_none() && run.rto_ms().is_none());
    assert_eq!(run.steps[0].detail, "done by the run before");
}

#[test]
fn what_a_run_has_measured_is_what_the_next_one_is_guessed_to_take() {
    let mut world = World::new();
    let nothing: Vec<&Run> = Vec::new();
    assert_eq!(estimate(&world.plan, &nothing, |_| false).1, None);
    let test = world.does_all(PlanVerb::Test);
    let run = world.does_all(PlanVerb::Run);
    let (guesses, rto) = estimate(&world.plan, &[&run, &test], |_| false);
    assert!(guesses.iter().all(|guess| guess.measured.as_ref().is_some_and(|m| m.run == run.uid && !m.by_test)));
    let measured: Vec<_> = run.steps.iter().map(|step| run.answered_ms(step)).collect();
    let guessed: Vec<_> = guesses.iter().map(|guess| guess.answered_ms).collect();
    assert_eq!((guessed, rto), (measured, run.rto_ms()));
    let (guesses, _) = estimate(&world.plan, &[&test], |id| id == "db");
    assert!(guesses[0].over && guesses[1].measured.as_ref().is_some_and(|m| m.by_test));
    // A step that nobody has measured is not guessed, nor what comes after it.
    world.plan.steps[2].id = "new".into();
    world.plan.steps[3].after = vec!["new".into()];
    let (guesses, rto) = estimate(&world.plan, &[&run, &test], |_| false);
    assert_eq!((guesses[2].answered_ms, guesses[3].answered_ms, rto), (None, None, None));
    assert!(guesses[3].measured.is_some() && guesses[0].answered_ms.is_some());
}

#[test]
fn a_clock_that_is_set_back_keeps_nothing_waiting() {
    assert_eq!(left(5 * SECOND, 2_000, 6 * SECOND), Some(1_000));
    assert_eq!((left(5 * SECOND, 2_000, 7 * SECOND), left(5 * SECOND, 2_000, SECOND)), (None, None));
}

#[test]
fn one_that_has_ended_is_not_stopped() {
    let mut world = World::new();
    let mut run = world.does_all(PlanVerb::Run);
    assert!(run.stop("operator/anna").is_err());
}
