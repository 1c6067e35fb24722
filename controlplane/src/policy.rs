//! A policy: what is promised for a group. What may be in one, and what it is if nothing is said.

use serde::{Deserialize, Serialize};

use crate::hours::Hours;
use crate::problem::Problem;

/// Longest description, bytes.
pub const MAX_DESCRIPTION: usize = 1024;
/// Least journal budget, bytes.
pub const MIN_BUDGET: u64 = 256 * 1024 * 1024;
/// Most journal budget, bytes (64 PiB).
pub const MAX_BUDGET: u64 = 1 << 56;

/// Least bandwidth, bytes a second.
pub const MIN_BANDWIDTH: u64 = 64 * 1024;
/// Most bandwidth, bytes a second.
pub const MAX_BANDWIDTH: u64 = 1_000_000_000_000;
/// Most patterns of excluded disks.
const MAX_PATTERNS: usize = 64;
/// Longest pattern, bytes.
const MAX_PATTERN: usize = 256;

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
    /// Most bytes a second that a source sends for a group; 0: no bound.
    #[serde(default)]
    pub bandwidth_bytes_per_s: u64,
    /// When it may send; none: always. See [`Hours`].
    #[serde(default)]
    pub allowed_hours: Vec<String>,
    /// Zone of the hours.
    #[serde(default = "utc")]
    pub time_zone: String,
    /// Higher ones go first.
    #[serde(default = "priority")]
    pub priority: u32,
    /// Patterns of ids and paths of disks that no group has.
    #[serde(default)]
    pub excluded_disks: Vec<String>,
    /// A group may be placed at the site of its source.
    #[serde(default)]
    pub same_site: bool,
}

fn utc() -> String {
    "UTC".to_owned()
}

fn priority() -> u32 {
    50
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
    /// See [`Promises::bandwidth_bytes_per_s`].
    pub bandwidth_bytes_per_s: Option<u64>,
    /// See [`Promises::allowed_hours`].
    pub allowed_hours: Vec<String>,
    /// See [`Promises::time_zone`].
    pub time_zone: String,
    /// See [`Promises::priority`].
    pub priority: Option<u32>,
    /// See [`Promises::excluded_disks`].
    pub excluded_disks: Vec<String>,
    /// See [`Promises::same_site`].
    pub same_site: Option<bool>,
}

impl Promises {
    /// With the defaults.
    pub fn usual() -> Self {
        Self::new(&Wanted::default()).expect("the defaults are within their bounds")
    }

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
        let bandwidth = wanted.bandwidth_bytes_per_s.unwrap_or(0);
        if bandwidth != 0 && !(MIN_BANDWIDTH..=MAX_BANDWIDTH).contains(&bandwidth) {
            let allowed = format!("0 (no bound), or {MIN_BANDWIDTH} to {MAX_BANDWIDTH} bytes a second");
            return Err(Problem::invalid("policy.bandwidth_bytes_per_s", bandwidth, allowed));
        }
        Hours::parse("policy.allowed_hours", &wanted.allowed_hours)?;
        if !wanted.allowed_hours.is_empty() && (lease_ms > 0 || sync_deadline_ms > 0) {
            let allowed = "nothing with a lease or a synchronous mode: both need the target at all times";
            return Err(Problem::invalid("policy.allowed_hours", wanted.allowed_hours.join("; "), allowed));
        }
        let time_zone = if wanted.time_zone.is_empty() { utc() } else { wanted.time_zone.clone() };
        if jiff::tz::TimeZone::get(&time_zone).is_err() {
            let allowed = "a name of the time zone database, such as UTC or Europe/Vienna";
            return Err(Problem::invalid("policy.time_zone", time_zone, allowed));
        }
        let given = wanted.priority.unwrap_or(priority());
        let priority = within("priority", Some(given.into()), 0, 0, 100, "(50 if nothing is said)")? as u32;
        if wanted.excluded_disks.len() > MAX_PATTERNS {
            let allowed = format!("up to {MAX_PATTERNS} patterns");
            return Err(Problem::invalid("policy.excluded_disks", wanted.excluded_disks.len(), allowed));
        }
        for (i, pattern) in wanted.excluded_disks.iter().enumerate() {
            if pattern.is_empty() || pattern.len() > MAX_PATTERN || pattern.chars().any(char::is_control) {
                let allowed = format!("1 to {MAX_PATTERN} bytes without control characters");
                return Err(Problem::invalid(format!("policy.excluded_disks[{i}]"), pattern, allowed));
            }
        }
        Ok(Self {
            bandwidth_bytes_per_s: bandwidth,
            allowed_hours: wanted.allowed_hours.clone(),
            time_zone,
            priority,
            excluded_disks: wanted.excluded_disks.clone(),
            same_site: wanted.same_site.unwrap_or(false),
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

    /// The pattern by which a disk is excluded.
    pub fn excludes(&self, id: &str, path: &str) -> Option<&str> {
        let fits = |p: &&String| matches(p.as_bytes(), id.as_bytes()) || matches(p.as_bytes(), path.as_bytes());
        self.excluded_disks.iter().find(fits).map(String::as_str)
    }

    /// What can hardly be kept whatever is written: the hours against the RPO.
    pub fn shortfalls(&self) -> Vec<String> {
        let gap = Hours::parse("", &self.allowed_hours).map_or(0, |hours| hours.longest_gap() as u64);
        if gap * 60_000_000 <= self.rpo_target_us {
            return Vec::new();
        }
        let target = self.rpo_target_us as f64 / 1e6;
        vec![format!("nothing is sent for up to {gap} minutes on end: the RPO of {target} s is not kept then")]
    }

    /// What can hardly be kept of a group, by what has been measured of it: bytes captured and sent per second.
    pub fn shortfalls_of(&self, group: &str, captured_per_s: f64, wire_per_s: f64) -> Vec<String> {
        let mut short = Vec::new();
        let bandwidth = self.bandwidth_bytes_per_s as f64;
        // Compression is in what is sent, and a bound on what is sent hides what would be.
        let ratio = if captured_per_s > 0.0 && wire_per_s > 0.0 { (wire_per_s / captured_per_s).min(1.0) } else { 1.0 };
        if bandwidth > 0.0 && captured_per_s * ratio > bandwidth {
            short.push(format!(
                "{group} writes {captured_per_s:.0} bytes a second at present; {bandwidth:.0} may be sent"
            ));
        }
        let needed = wire_per_s.max(captured_per_s * ratio) * self.retention_s as f64;
        if self.journal_budget_bytes > 0 && needed > self.journal_budget_bytes as f64 {
            short.push(format!(
                "{group} fills {needed:.0} bytes of journal in the retention of {} s at present; the budget is {} bytes",
                self.retention_s, self.journal_budget_bytes
            ));
        }
        short
    }
}

/// A pattern in which `*` stands for anything, also for nothing.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on if the rest does not fit: behind the last star, one character later.
    let mut back = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            back = Some((p + 1, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((star, from)) = back {
            (p, t) = (star, from + 1);
            back = Some((star, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
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
        let field = field_of(Wanted { bandwidth_bytes_per_s: Some(65_535), ..Wanted::default() });
        assert_eq!(field, "policy.bandwidth_bytes_per_s");
        assert_eq!(field_of(Wanted { priority: Some(101), ..Wanted::default() }), "policy.priority");
        assert_eq!(field_of(Wanted { time_zone: "Mars/Base".into(), ..Wanted::default() }), "policy.time_zone");
        let field = field_of(Wanted { excluded_disks: vec![String::new()], ..Wanted::default() });
        assert_eq!(field, "policy.excluded_disks[0]");
        let hours = vec!["08:00-09:00".to_owned()];
        for waits in [
            Wanted { lease_ms: Some(3_000), allowed_hours: hours.clone(), ..Wanted::default() },
            Wanted { sync_deadline_ms: Some(200), allowed_hours: hours.clone(), ..Wanted::default() },
        ] {
            assert_eq!(field_of(waits), "policy.allowed_hours");
        }
    }

    #[test]
    fn patterns_exclude_by_id_and_by_path() {
        let excluded_disks = vec!["swap*".to_owned(), "/dev/*/scratch".to_owned(), "*-tmp-*".to_owned()];
        let promises = Promises::new(&Wanted { excluded_disks, ..Wanted::default() }).unwrap();
        for (id, path) in [("swap", "/x"), ("swap1", "/x"), ("a", "/dev/vg0/scratch"), ("a", "/a-tmp-b-tmp-c")] {
            assert!(promises.excludes(id, path).is_some(), "{id} {path}");
        }
        for (id, path) in [("data", "/x"), ("noswap", "/x"), ("a", "/dev/vg0/scratch2"), ("a-tmp", "/y")] {
            assert!(promises.excludes(id, path).is_none(), "{id} {path}");
        }
    }

    #[test]
    fn what_cannot_be_kept_is_named_with_the_number() {
        let wanted = Wanted {
            allowed_hours: vec!["20:00-06:00".into()],
            bandwidth_bytes_per_s: Some(1_000_000),
            journal_budget_bytes: Some(MIN_BUDGET),
            ..Wanted::default()
        };
        let promises = Promises::new(&wanted).unwrap();
        assert!(promises.shortfalls()[0].contains("840 minutes"), "{:?}", promises.shortfalls());
        assert!(promises.shortfalls_of("shop", 10_000.0, 5_000.0).is_empty());
        let short = promises.shortfalls_of("shop", 4_000_000.0, 2_000_000.0);
        assert!(short.len() == 2 && short[0].contains("4000000") && short[1].contains("28800000000"), "{short:?}");
        let calm = Promises::new(&Wanted::default()).unwrap();
        assert!(calm.shortfalls().is_empty() && calm.shortfalls_of("shop", 1e12, 1e12).is_empty());
    }
}
