//! `afterimage status`: how groups and proxies stand now.

use afterimage_wire::v1::{self, Severity};
use clap::Args;

use super::documents::{self, group_of, id, operation_word, phase_word, rung_word, severity_word};
use super::failure::{Failure, Kind};
use super::group::object;
use super::output::{Mood, fields, state, table, text};
use super::session::Session;
use super::values::{show_count, show_duration, show_rate, show_size, show_time};
use super::{pause, phase_mood, proxies, view};

/// Options of `afterimage status`.
#[derive(Args, Debug)]
pub struct Status {
    /// The group's name, for all there is to know about one.
    pub group: Option<String>,
    /// Exit with 1 if anything is wrong: an error, or an RPO above its target.
    #[arg(long)]
    pub check: bool,
}

/// Shows it.
pub async fn run(args: Status, session: &Session) -> Result<(), Failure> {
    let parent = args.group.as_ref().map_or_else(|| session.tenant(), |group| session.group(group));
    let about = args.group.as_deref().map_or_else(|| "status".to_owned(), object);
    let request = v1::GetStatusRequest { parent };
    let snapshot = session.ask(about, session.status().get_status(request)).await?;
    session.out.show(&documents::status(&snapshot), || match (&args.group, snapshot.groups.first()) {
        (Some(_), Some(group)) => one(group),
        _ => all(&snapshot),
    });
    match wrong(&snapshot) {
        Some(what) if args.check => Err(Failure::new(Kind::Failed, "", what)),
        _ => Ok(()),
    }
}

/// The first thing that is wrong.
fn wrong(snapshot: &v1::StatusSnapshot) -> Option<String> {
    let of_groups = snapshot.groups.iter().flat_map(|g| g.conditions.iter().map(|c| (id(&g.name), c)));
    let of_proxies = snapshot.proxies.iter().flat_map(|p| p.conditions.iter().map(|c| (id(&p.name), c)));
    let bad = of_groups
        .chain(of_proxies)
        .find(|(_, condition)| condition.severity() == Severity::Error || condition.kind == "rpo-above-target");
    bad.map(|(name, condition)| format!("{name}: {}: {}", condition.kind, condition.message))
}

/// Everything, for a person.
pub fn all(snapshot: &v1::StatusSnapshot) -> String {
    let mut shown = if snapshot.groups.is_empty() {
        "no groups; create one: afterimage group create --help\n".to_owned()
    } else {
        groups(&snapshot.groups)
    };
    shown += &notes(snapshot);
    shown += "\n";
    shown += &proxies::listed(&snapshot.proxies);
    shown
}

/// Groups as a table.
pub fn groups(groups: &[v1::GroupStatus]) -> String {
    table(
        &["GROUP", "PHASE", ">RPO NOW", ">P99", ">TARGET", ">WRITES/S", ">CAPTURED", ">ON WIRE", ">CUTS"],
        groups.iter().map(|group| {
            let rpo = group.rpo.unwrap_or_default();
            // Whoever paused it knows.
            let late = group.pause.is_none() && rpo.now_us.is_some_and(|now| now > rpo.target_us);
            vec![
                text(id(&group.name)),
                state(phase(group), phase_mood(group.phase())),
                state(micros(rpo.now_us), if late { Mood::Bad } else { Mood::Plain }),
                text(micros(rpo.p99_us)),
                text(show_duration(rpo.target_us.saturating_mul(1000))),
                text(show_count(group.writes_per_s.round() as u64)),
                text(show_rate(group.captured_bytes_per_s)),
                text(show_rate(group.wire_bytes_per_s)),
                text(group.points.as_ref().map_or_else(String::new, |points| show_count(points.cuts))),
            ]
        }),
    )
}

/// What is to be known beside the tables, a line each.
pub fn notes(snapshot: &v1::StatusSnapshot) -> String {
    let mut shown = String::new();
    for group in &snapshot.groups {
        for condition in &group.conditions {
            shown += &noted(id(&group.name), condition);
        }
        if let Some(operation) = &group.operation {
            shown += &format!(
                "{}: {} {} {}\n",
                id(&group.name),
                operation.verb,
                id(&operation.name),
                operation_word(operation.state())
            );
        }
    }
    for proxy in &snapshot.proxies {
        for condition in &proxy.conditions {
            shown += &noted(id(&proxy.name), condition);
        }
    }
    shown
}

fn noted(name: &str, condition: &v1::Condition) -> String {
    format!("{name}: {}: {}: {}\n", severity_word(condition.severity()), condition.kind, condition.message)
}

/// The phase, and how far a synchronisation is.
pub fn phase(group: &v1::GroupStatus) -> String {
    let word = phase_word(group.phase());
    match group.reverse.as_ref().map_or(&group.sync, |reverse| &reverse.sync) {
        Some(sync) if sync.total_bytes > 0 => format!("{word} {}", progress(sync)),
        _ => word.to_owned(),
    }
}

/// How far a synchronisation is, and how long it takes.
pub fn progress(sync: &v1::SyncProgress) -> String {
    let left = sync.left_ms.map(|ms| format!(", {} left", show_duration(ms.saturating_mul(1_000_000))));
    format!("{} %{}", percent(sync), left.unwrap_or_default())
}

/// Rounded down: 100 means done.
fn percent(sync: &v1::SyncProgress) -> u64 {
    (u128::from(sync.done_bytes) * 100 / u128::from(sync.total_bytes.max(1))).min(100) as u64
}

/// Microseconds for a person; nothing where nothing is known.
pub fn micros(us: Option<u64>) -> String {
    us.map_or_else(String::new, |us| show_duration(us.saturating_mul(1000)))
}

/// One group in full.
pub fn one(group: &v1::GroupStatus) -> String {
    let rpo = group.rpo.unwrap_or_default();
    let points = group.points.clone().unwrap_or_default();
    let time = |point: &Option<v1::Point>| point.as_ref().map_or_else(String::new, |point| show_time(point.wall_ns));
    let ratio = match group.wire_bytes {
        0 => String::new(),
        wire => format!(" (ratio {:.2})", group.captured_bytes as f64 / wire as f64),
    };
    let window = show_duration(rpo.window_s.saturating_mul(1_000_000_000));
    let mut shown = fields(&[
        ("group", id(&group.name).to_owned()),
        ("phase", phase(group)),
        ("policy", id(&group.policy).to_owned()),
        ("from, to", format!("{} → {}", id(&group.source), id(&group.target))),
        ("RPO now", micros(rpo.now_us)),
        (
            "RPO p50, p99, max",
            match (rpo.p50_us, rpo.p99_us, rpo.max_us) {
                (None, None, None) => String::new(),
                (p50, p99, max) => format!("{}, {}, {} over {window}", micros(p50), micros(p99), micros(max)),
            },
        ),
        ("RPO target", show_duration(rpo.target_us.saturating_mul(1000))),
        (
            "inside the target",
            rpo.within_target.map_or_else(String::new, |share| format!("{:.2} % of {window}", share * 100.0)),
        ),
        ("report is old", micros(rpo.report_age_us)),
        ("paused", pause::told(group.pause.as_ref())),
        ("ladder", rung_word(group.rung()).to_owned()),
        ("writes", format!("{}/s, {} in all", show_count(group.writes_per_s.round() as u64), show_count(group.writes))),
        ("captured", format!("{}, {} in all", show_rate(group.captured_bytes_per_s), show_size(group.captured_bytes))),
        (
            "on the wire",
            format!("{}, {} in all{ratio}", show_rate(group.wire_bytes_per_s), show_size(group.wire_bytes)),
        ),
        ("queue", format!("{} of {}", show_size(group.queue_bytes), show_size(group.queue_limit_bytes))),
        (
            "spill",
            match group.spill_limit_bytes {
                0 => "none".to_owned(),
                limit => format!("{} of {}", show_size(group.spill_bytes), show_size(limit)),
            },
        ),
        ("caught up in", group.catch_up_ms.map_or_else(String::new, |ms| show_duration(ms.saturating_mul(1_000_000)))),
        (
            "lease",
            if group.lease_ms == 0 { String::new() } else { show_duration(group.lease_ms.saturating_mul(1_000_000)) },
        ),
        (
            "synchronous",
            match (group.synchronous.as_str(), group.zero_loss) {
                ("", _) => String::new(),
                ("together", true) => "yes; zero loss".to_owned(),
                ("together", false) => "yes; loss unknown".to_owned(),
                _ => "not for the time being; loss unknown".to_owned(),
            },
        ),
        ("last write", show_count(group.captured_seq)),
        ("last sent", show_count(group.sent_seq)),
        ("last durable", show_count(group.durable_seq)),
        ("restore points", format!("{} writes, {} cuts", show_count(points.count), show_count(points.cuts))),
        ("oldest point", time(&points.oldest)),
        ("newest point", time(&points.newest)),
        (
            "journal",
            match group.journal_budget_bytes {
                0 => format!("{} in {} segments", show_size(group.journal_bytes), group.segments),
                budget => {
                    format!("{} of {}, {} segments", show_size(group.journal_bytes), show_size(budget), group.segments)
                }
            },
        ),
        ("verified", group.scrub.as_ref().map_or_else(String::new, verified)),
    ]);
    if let Some(reverse) = &group.reverse {
        shown += "\n";
        shown += &super::failback::reverse_fields(reverse);
    }
    if !group.disks.is_empty() {
        shown += "\n";
        shown += &disks(group);
    }
    if !group.views.is_empty() {
        shown += "\n";
        shown += &view::listed(&group.views);
    }
    if let Some(operation) = &group.operation {
        shown += &format!(
            "\n{} {} of group {}: {}\n",
            operation.verb,
            id(&operation.name),
            group_of(&operation.subject),
            operation_word(operation.state())
        );
    }
    if !group.conditions.is_empty() {
        shown += "\n";
    }
    for condition in &group.conditions {
        shown += &format!(
            "{}: {}: {} (since {})\n",
            severity_word(condition.severity()),
            condition.kind,
            condition.message,
            show_time(condition.since_ns)
        );
    }
    shown
}

/// How the verification of what the target holds stands.
fn verified(scrub: &v1::ScrubProgress) -> String {
    let bad = match scrub.bad_frames {
        0 => String::new(),
        bad => format!(", {} damaged frames", show_count(bad)),
    };
    if scrub.running {
        return format!("{} of {}{bad}", show_size(scrub.done_bytes), show_size(scrub.total_bytes));
    }
    let ended = scrub.ended_ms.map(|ms| format!("{} ago", show_duration(ms.saturating_mul(1_000_000))));
    format!("{}{bad}", ended.unwrap_or_else(|| "when the target started".to_owned()))
}

fn disks(group: &v1::GroupStatus) -> String {
    let mut shown = table(
        &["DISK", ">SIZE", "STATE", "SYNC", ">CLIENTS", ">GENERATION"],
        group.disks.iter().map(|disk| {
            let mood = match disk.state.as_str() {
                "serving" => Mood::Good,
                "" => Mood::Plain,
                "held" => Mood::Care,
                _ => Mood::Bad,
            };
            vec![
                text(id(&disk.name)),
                text(show_size(disk.size_bytes)),
                state(&disk.state, mood),
                text(disk.sync.as_ref().map_or_else(String::new, |sync| format!("{} %", percent(sync)))),
                text(disk.clients.to_string()),
                text(disk.generation.to_string()),
            ]
        }),
    );
    for disk in &group.disks {
        for uri in &disk.uris {
            shown += &format!("  {}  {uri}\n", id(&disk.name));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn busy() -> v1::GroupStatus {
        v1::GroupStatus {
            name: format!("tenants/default/groups/{}", "g".repeat(63)),
            phase: v1::Phase::Syncing.into(),
            rung: v1::Rung::Streaming.into(),
            sync: Some(v1::SyncProgress { done_bytes: 1 << 40, total_bytes: 3 << 40, ..Default::default() }),
            rpo: Some(v1::Rpo {
                now_us: Some(86_399_999_999),
                p50_us: Some(1),
                p99_us: Some(86_399_999_999),
                max_us: Some(86_399_999_999),
                target_us: 86_399_999_999,
                within_target: Some(0.99999),
                window_s: 3600,
                ..Default::default()
            }),
            writes_per_s: 1_234_567.8,
            captured_bytes_per_s: 9.9e9,
            wire_bytes_per_s: 9.9e9,
            captured_seq: 1 << 60,
            sent_seq: 1 << 60,
            durable_seq: 1 << 60,
            points: Some(v1::PointSummary { count: 1 << 60, cuts: 2_678_400, ..Default::default() }),
            disks: vec![v1::DiskStatus { name: "a/disks/data".into(), state: "serving".into(), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn everything_shown_of_groups_fits_100_columns() {
        let shown = groups(&[busy()]) + &one(&busy());
        for line in shown.lines() {
            assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
        }
    }

    #[test]
    fn what_is_not_known_is_a_dash_and_not_a_zero() {
        let shown = one(&v1::GroupStatus::default());
        assert!(shown.lines().any(|line| line.starts_with("RPO now") && line.ends_with('-')), "{shown}");
    }

    #[test]
    fn a_synchronisation_says_how_far_it_is() {
        assert_eq!(phase(&busy()), "syncing 33 %");
    }

    #[test]
    fn a_check_finds_errors_and_a_missed_rpo() {
        let with = |kind: &str, severity: Severity| {
            let condition = v1::Condition { kind: kind.into(), severity: severity.into(), ..Default::default() };
            let group = v1::GroupStatus { name: "g/shop".into(), conditions: vec![condition], ..Default::default() };
            wrong(&v1::StatusSnapshot { groups: vec![group], ..Default::default() })
        };
        assert_eq!(with("held", Severity::Warning), None);
        assert_eq!(with("rpo-above-target", Severity::Warning).as_deref(), Some("shop: rpo-above-target: "));
        assert!(with("damaged", Severity::Error).is_some());
    }
}
