//! Cutting a plan that fails down: fewer faults, a shorter run. What is left is what somebody has to read.

use crate::plan::Plan;

/// Most plays for one failure.
const MOST_PLAYS: usize = 120;

/// What is left of a plan.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// It still fails.
    pub plan: Plan,
    /// Places of its faults in the list of the whole plan.
    pub kept: Vec<usize>,
}

impl Shrunk {
    /// What to add to the command that plays the seed.
    pub fn options(&self) -> String {
        let kept: Vec<String> = self.kept.iter().map(usize::to_string).collect();
        let kept = if kept.is_empty() { "none".into() } else { kept.join(",") };
        format!("--keep {kept} --length {}", self.plan.length)
    }
}

/// Cuts `plan` down as long as `fails` says that it still fails.
pub fn shrink(plan: &Plan, mut fails: impl FnMut(&Plan) -> bool) -> Shrunk {
    let cut = |kept: &[usize], length| {
        let mut less = plan.clone();
        less.keep(kept, length);
        less
    };
    let mut kept: Vec<usize> = (0..plan.faults.len()).collect();
    let mut length = plan.length;
    let mut plays = 0;
    let mut try_it = |kept: &[usize], length| {
        plays += 1;
        plays <= MOST_PLAYS && fails(&cut(kept, length))
    };
    loop {
        let before = (kept.len(), length);
        for at in (0..kept.len()).rev() {
            let mut less = kept.clone();
            less.remove(at);
            if try_it(&less, length) {
                kept = less;
            }
        }
        for part in [4, 2] {
            let shorter = length - length / part;
            if shorter > 1_000_000 && try_it(&kept, shorter) {
                length = shorter;
            }
        }
        if (kept.len(), length) == before {
            return Shrunk { plan: cut(&kept, length), kept };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Fault;

    #[test]
    fn only_what_the_failure_needs_is_left() {
        let mut plan = Plan::roll(1);
        plan.length = 4_000_000_000;
        plan.faults = (0..6).map(|at| (at * 500_000_000, if at == 4 { Fault::Copy } else { Fault::Look })).collect();
        let shrunk = shrink(&plan, |plan| plan.faults.iter().any(|(_, fault)| *fault == Fault::Copy));
        assert_eq!(shrunk.kept, [4]);
        assert_eq!(shrunk.plan.faults.len(), 1);
        assert!(shrunk.plan.length < 100_000_000);
    }
}
