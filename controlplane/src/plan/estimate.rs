//! How long a run of a plan would take, by what runs and tests of it have measured. No I/O, no clock.

use super::run::{Run, RunState, RunStep};
use super::{Plan, PlanVerb};

/// By what the time of a step is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Measured {
    /// From its own beginning to its answer, milliseconds.
    pub took_ms: u64,
    /// From its own beginning until others may go on, milliseconds.
    pub held_ms: u64,
    /// Uid of the run that has measured it.
    pub run: String,
    /// When that ended, nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// It was a test.
    pub by_test: bool,
}

/// What is guessed of a step.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Guess {
    /// By what; nothing if it has never been measured.
    pub measured: Option<Measured>,
    /// It is failed over already.
    pub over: bool,
    /// From the beginning of the run to its answer, milliseconds.
    pub answered_ms: Option<u64>,
}

/// The newest run that measured a step, or else the newest test.
fn measured(plan: &Plan, at: usize, runs: &[&Run]) -> Option<Measured> {
    let wanted = &plan.steps[at];
    let of = |run: &Run, verb| -> Option<Measured> {
        let same = |step: &&RunStep| step.wanted.id == wanted.id && step.wanted.group == wanted.group;
        let step = run.steps.iter().find(same).filter(|_| run.spec.verb == verb && run.state != RunState::Running)?;
        Some(Measured {
            took_ms: step.took_ms()?,
            held_ms: step.held_ms()?,
            run: run.uid.clone(),
            at_ns: run.ended_ns,
            by_test: verb == PlanVerb::Test,
        })
    };
    let newest = |verb| runs.iter().filter_map(|run| of(run, verb)).max_by_key(|measured| measured.at_ns);
    newest(PlanVerb::Run).or_else(|| newest(PlanVerb::Test))
}

/// What a run from now would take: for each step in the plan's order, and in all, milliseconds. `over` says whether a group is
/// failed over already. Steps that were never measured, and what comes after them, are not guessed.
pub fn estimate(plan: &Plan, runs: &[&Run], over: impl Fn(&str) -> bool) -> (Vec<Guess>, Option<u64>) {
    let guess = |(at, step): (usize, &super::PlanStep)| match over(&step.group) {
        true => Guess { over: true, ..Guess::default() },
        false => Guess { measured: measured(plan, at, runs), ..Guess::default() },
    };
    let mut guesses: Vec<Guess> = plan.steps.iter().enumerate().map(guess).collect();
    // When each has ended, with the delay after it; nothing while it has not.
    let mut ends: Vec<Option<u64>> = guesses.iter().map(|g| g.over.then_some(0)).collect();
    let mut running: Vec<(u64, usize)> = Vec::new();
    let mut now = 0;
    loop {
        for at in 0..plan.steps.len() {
            let begun = ends[at].is_some() || running.iter().any(|(_, step)| *step == at);
            let earlier = plan.steps[at].after.iter().filter_map(|id| plan.steps.iter().position(|s| s.id == *id));
            let ready = earlier.map(|i| ends[i]).all(|end| end.is_some_and(|end| end <= now));
            if let Some(measured) = guesses[at].measured.as_ref()
                && !begun
                && ready
                && running.len() < plan.parallel as usize
            {
                running.push((now + measured.held_ms, at));
                guesses[at].answered_ms = Some(now + measured.took_ms);
            }
        }
        // The next moment at which something ends, or a delay does.
        let delays = ends.iter().flatten().copied().filter(|end| *end > now);
        let Some(then) = running.iter().map(|(end, _)| *end).chain(delays).min() else { break };
        now = now.max(then);
        running.retain(|(end, at)| {
            let over = *end <= now;
            if over {
                ends[*at] = Some(end + plan.steps[*at].delay_ms);
            }
            !over
        });
    }
    let all = guesses.iter().filter(|g| !g.over).map(|g| g.answered_ms).collect::<Option<Vec<u64>>>();
    let rto = all.and_then(|all| all.into_iter().max());
    (guesses, rto)
}
