//! A policy: what is promised for a group. What may be in one, and what it is if nothing is said.

use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// Longest description, bytes.
pub const MAX_DESCRIPTION: usize = 1024;
/// Least journal budget, bytes.
pub const MIN_BUDGET: u64 = 256 * 1024 * 1024;
/// Most journal budget, bytes (64 PiB).
pub const MAX_BUDGET: u64 = 1 << 56;

/// Whether chunks are compressed.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Where it pays.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// The promises. Made by [`Promises::new`] only, so that what is stored is within the bounds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Promises {
    /// RPO that is to be kept, microseconds.
    pub rpo_target_us: u64,
    /// Time between cuts, milliseconds.
    pub cut_interval_ms: u64,
    /// How long every write stays a restore point, seconds of stream time.
    pub retention_s: u64,
    /// Most bytes of journal; 0: what the target allows.
    pub journal_budget_bytes: u64,
    /// Compression.
    pub compression: Compression,
    /// How long the RPO may be above its target before that is told, milliseconds.
    pub warn_after_ms: u64,
    /// How long before it is an error, milliseconds.
    #[serde(default = "error_after")]
    pub error_after_ms: u64,
    /// How long it has to be within its target before that is taken back, milliseconds.
    #[serde(default = "clear_after")]
    pub clear_after_ms: u64,
    /// Lease of the source, milliseconds; 0: none.
    #[serde(default)]
    pub lease_ms: u64,
    /// How long a write waits for the target at most, milliseconds; 0: asynchronous.
    #[serde(default)]
    pub sync_deadline_ms: u64,
}

fn error_after() -> u64 {
    60_000
}

fn clear_after() -> u64 {
    5_000
}

/// What a caller asks for; nothing stands for the default.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// See [`Promises::rpo_target_us`].
    pub rpo_target_us: Option<u64>,
    /// See [`Promises::cut_interval_ms`].
    pub cut_interval_ms: Option<u64>,
    /// See [`Promises::retention_s`].
    pub retention_s: Option<u64>,
    /// See [`Promises::journal_budget_bytes`].
    pub journal_budget_bytes: Option<u64>,
    /// See [`Promises::compression`].
    pub compression: Compression,
    /// See [`Promises::warn_after_ms`].
    pub warn_after_ms: Option<u64>,
    /// See [`Promises::error_after_ms`].
    pub error_after_ms: Option<u64>,
    /// See [`Promises::clear_after_ms`].
    pub clear_after_ms: Option<u64>,
    /// See [`Promises::lease_ms`].
    pub lease_ms: Option<u64>,
    /// See [`Promises::sync_deadline_ms`].
    pub sync_deadline_ms: Option<u64>,
}

impl Promises {
    /// Fills in the defaults and checks every bound.
    ///
    /// # Errors
    /// Names the first field that is out of its bounds, its value, and what is allowed.
    pub fn new(wanted: &Wanted) -> Result<Self, Problem> {
        let within = |field: &str, value: Option<u64>, default: u64, least: u64, most: u64, unit: &str| {
            let value = value.unwrap_or(default);
            if (least..=most).contains(&value) {
                Ok(value)
            } else {
                Err(Problem::invalid(format!("policy.{field}"), value, format!("{least} to {most} {unit}")))
            }
        };
        let us = "microseconds";
        let rpo_target_us = within("rpo_target_us", wanted.rpo_target_us, 1_000_000, 1_000, 86_400_000_000, us)?;
        let cut_interval_ms = within("cut_interval_ms", wanted.cut_interval_ms, 1_000, 10, 3_600_000, "milliseconds")?;
        let retention_s = within("retention_s", wanted.retention_s, 14_400, 1, 2_678_400, "seconds")?;
        if retention_s * 1000 < cut_interval_ms {
            let least = cut_interval_ms.div_ceil(1000);
            let allowed = format!("no shorter than the cut interval: at least {least} seconds");
            return Err(Problem::invalid("policy.retention_s", retention_s, allowed));
        }
        let budget = wanted.journal_budget_bytes.unwrap_or(0);
        if budget != 0 && !(MIN_BUDGET..=MAX_BUDGET).contains(&budget) {
            let allowed = format!("0 (what the target allows), or {MIN_BUDGET} to {MAX_BUDGET} bytes");
            return Err(Problem::invalid("policy.journal_budget_bytes", budget, allowed));
        }
        let warn_after_ms = within("warn_after_ms", wanted.warn_after_ms, 5_000, 0, 86_400_000, "milliseconds")?;
        // A policy that warns late and does not say when that is an error has both at once.
        let late = error_after().max(warn_after_ms);
        let error_after_ms = within("error_after_ms", wanted.error_after_ms, late, 0, 86_400_000, "milliseconds")?;
        if error_after_ms < warn_after_ms {
            let allowed = format!("no shorter than warn_after_ms: at least {warn_after_ms} milliseconds");
            return Err(Problem::invalid("policy.error_after_ms", error_after_ms, allowed));
        }
        let clear_after_ms =
            within("clear_after_ms", wanted.clear_after_ms, clear_after(), 0, 3_600_000, "milliseconds")?;
        let or_none = |field: &str, value: Option<u64>, least: u64, most: u64| match value.unwrap_or(0) {
            0 => Ok(0),
            value if (least..=most).contains(&value) => Ok(value),
            value => {
                let allowed = format!("0 (none), or {least} to {most} milliseconds");
                Err(Problem::invalid(format!("policy.{field}"), value, allowed))
            }
        };
        let lease_ms = or_none("lease_ms", wanted.lease_ms, 3_000, 3_600_000)?;
        let sync_deadline_ms = or_none("sync_deadline_ms", wanted.sync_deadline_ms, 200, 60_000)?;
        Ok(Self {
            lease_ms,
            sync_deadline_ms,
            rpo_target_us,
            cut_interval_ms,
            retention_s,
            journal_budget_bytes: budget,
            compression: wanted.compression,
            warn_after_ms,
            error_after_ms,
            clear_after_ms,
        })
    }
}

/// Checks a text for people.
///
/// # Errors
/// Names the field, and the bound.
pub fn check_text(field: &str, text: &str) -> Result<(), Problem> {
    if text.len() > MAX_DESCRIPTION || text.chars().any(|c| c.is_control() && c != '\n') {
        let allowed = format!("up to {MAX_DESCRIPTION} bytes without control characters");
        return Err(Problem::invalid(field, text, allowed));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of(wanted: Wanted) -> String {
        match Promises::new(&wanted).unwrap_err() {
            Problem::Invalid { field, .. } => field,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn nothing_said_gives_the_defaults() {
        let promises = Promises::new(&Wanted::default()).unwrap();
        assert_eq!((promises.rpo_target_us, promises.cut_interval_ms), (1_000_000, 1_000));
        assert_eq!((promises.retention_s, promises.journal_budget_bytes), (14_400, 0));
    }

    #[test]
    fn an_rpo_target_of_zero_is_refused_by_name() {
        let wanted = Wanted { rpo_target_us: Some(0), ..Wanted::default() };
        let text = Promises::new(&wanted).unwrap_err().to_string();
        assert!(text.contains("policy.rpo_target_us") && text.contains("\"0\"") && text.contains("1000 to"), "{text}");
    }

    #[test]
    fn a_retention_shorter_than_the_cut_interval_is_refused() {
        let wanted = Wanted { cut_interval_ms: Some(5_000), retention_s: Some(4), ..Wanted::default() };
        assert_eq!(field_of(wanted), "policy.retention_s");
        let wanted = Wanted { cut_interval_ms: Some(5_000), retention_s: Some(5), ..Wanted::default() };
        assert!(Promises::new(&wanted).is_ok());
    }

    #[test]
    fn every_bound_is_checked() {
        assert_eq!(field_of(Wanted { cut_interval_ms: Some(9), ..Wanted::default() }), "policy.cut_interval_ms");
        assert_eq!(field_of(Wanted { retention_s: Some(u64::MAX), ..Wanted::default() }), "policy.retention_s");
        let field = field_of(Wanted { journal_budget_bytes: Some(1), ..Wanted::default() });
        assert_eq!(field, "policy.journal_budget_bytes");
        assert_eq!(field_of(Wanted { warn_after_ms: Some(u64::MAX), ..Wanted::default() }), "policy.warn_after_ms");
        let wanted = Wanted { warn_after_ms: Some(10), error_after_ms: Some(9), ..Wanted::default() };
        assert_eq!(field_of(wanted), "policy.error_after_ms");
        assert_eq!(field_of(Wanted { clear_after_ms: Some(u64::MAX), ..Wanted::default() }), "policy.clear_after_ms");
        assert_eq!(field_of(Wanted { lease_ms: Some(2_999), ..Wanted::default() }), "policy.lease_ms");
        let field = field_of(Wanted { sync_deadline_ms: Some(199), ..Wanted::default() });
        assert_eq!(field, "policy.sync_deadline_ms");
    }
}
