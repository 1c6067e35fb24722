//! One seed from outside: a panic of the code under test is a failure like any other.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::plan::Plan;
use crate::run::{Report, run};
use crate::trace;

/// Plays a plan; with `print` what happens is printed as it does.
///
/// # Errors
/// When and what, in words.
pub fn play(plan: Plan, print: bool) -> Result<Report, String> {
    trace::begin(print);
    #[cfg(feature = "mutants")]
    afterimage_dataplane::mutant::forget_seals();
    match catch_unwind(AssertUnwindSafe(|| run(plan))) {
        Ok(Ok(report)) => Ok(report),
        Ok(Err(failure)) => Err(format!("at {:.3} ms: {}", failure.at as f64 / 1e6, failure.what)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}
