//! The check of the checks: every deliberate bug of [`afterimage_dataplane::mutant`] must be found.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use afterimage_dataplane::mutant::{self, Mutant};

use crate::plan::{Plan, Theme};
use crate::play::play;

/// What became of one.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Which; none for the code as it is.
    pub mutant: Option<Mutant>,
    /// The seed that found it, and what it found.
    pub found: Option<(u64, String)>,
    /// Seconds.
    pub seconds: f64,
}

/// Plays `within` seeds from `from` on for each of `which` until one fails; only
/// seeds of this theme, if one is named. `tell` is called as they end.
pub fn hunt(
    which: &[Option<Mutant>],
    from: u64,
    within: u64,
    theme: Option<Theme>,
    jobs: usize,
    tell: impl Fn(&Verdict) + Sync,
) -> Vec<Verdict> {
    let (next, verdicts) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(mutant) = which.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    let begun = Instant::now();
                    let found = (from..from.saturating_add(within)).find_map(|seed| {
                        let plan = Plan::roll(seed);
                        if theme.is_some_and(|theme| theme != plan.theme) {
                            return None;
                        }
                        mutant::set(mutant);
                        let result = play(plan, false);
                        result.err().map(|what| (seed, what))
                    });
                    mutant::set(None);
                    let verdict = Verdict { mutant, found, seconds: begun.elapsed().as_secs_f64() };
                    tell(&verdict);
                    verdicts.lock().expect("not poisoned").push(verdict);
                }
            });
        }
    });
    let mut verdicts = verdicts.into_inner().expect("not poisoned");
    verdicts.sort_by_key(|verdict| verdict.mutant);
    verdicts
}
