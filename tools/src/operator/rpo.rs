//! `afterimage rpo`: how old the oldest write in no durable restore point was, over any period, and where the time went.

use afterimage_wire::v1;
use clap::Args;
use serde_json::{Value, json};

use super::documents::id;
use super::failure::Failure;
use super::group::object;
use super::output::{table, text, width};
use super::session::{Session, every};
use super::status::micros;
use super::values::{duration_ns, json_time, millis, now_ns, show_duration, show_time, time};

/// Lines of the chart.
const LINES: usize = 10;
/// Columns before it: a duration and the axis.
const MARGIN: usize = 12;
/// Shortest part, seconds.
const MINUTE_S: u64 = 60;
/// Parts of that length are kept for so long, seconds; longer ones are by the hour.
const MINUTES_KEPT_S: u64 = 47 * 3600;

/// Options of `afterimage rpo`.
#[derive(Args, Debug)]
pub struct Rpo {
    /// The group's name; without one, a table of all groups.
    group: Option<String>,
    /// How far back, such as 1h or 7d.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration_ns, conflicts_with = "from")]
    last: u64,
    /// From this time on, such as 2026-11-21T10:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = time)]
    from: Option<u64>,
    /// Up to this time [default: now].
    #[arg(long, value_name = "TIME", value_parser = time)]
    to: Option<u64>,
    /// Length of a part, whole minutes; whole hours beyond two days back [default: what fits the chart].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    step: Option<u64>,
}

/// Shows it.
pub async fn run(args: Rpo, session: &Session) -> Result<(), Failure> {
    let end = args.to.unwrap_or_else(now_ns);
    let start = args.from.unwrap_or_else(|| end.saturating_sub(args.last));
    let ask = async |group: &str, step_s| {
        let request = v1::GetRpoRequest { group: session.group(group), start_time_ns: start, end_time_ns: end, step_s };
        session.ask(object(group), session.status().get_rpo(request)).await
    };
    let Some(group) = &args.group else {
        let request = v1::ListGroupsRequest { parent: session.tenant(), ..Default::default() };
        let groups: Vec<v1::Group> = every!(session, "groups", groups.list_groups(request).groups);
        let mut reports = Vec::new();
        for group in &groups {
            reports.push(ask(id(&group.name), 0).await?);
        }
        let document = json!({"groups": reports.iter().map(report).collect::<Vec<_>>()});
        session.out.show(&document, || listed(&reports));
        return Ok(());
    };
    let columns = usize::from(width()).saturating_sub(MARGIN).max(10);
    let step_s = match args.step {
        Some(ns) if ns % 1_000_000_000 == 0 && ns > 0 => u32::try_from(ns / 1_000_000_000).unwrap_or(u32::MAX),
        Some(_) => return Err(Failure::usage("--step: whole minutes, such as 5m")),
        None => fitting(start, end, now_ns(), columns),
    };
    let found = ask(group, step_s).await?;
    session.out.show(&report(&found), || {
        let head = listed(std::slice::from_ref(&found));
        format!("{head}\n{}\n{}", chart(&found, columns), went(&found.whole.unwrap_or_default()))
    });
    Ok(())
}

/// The shortest step with which all parts have room.
fn fitting(start: u64, end: u64, now: u64, columns: usize) -> u32 {
    let seconds = end.saturating_sub(start) / 1_000_000_000;
    let unit = if now.saturating_sub(start) / 1_000_000_000 < MINUTES_KEPT_S { MINUTE_S } else { 3600 };
    // The ends are taken out to whole units.
    let step = (seconds + 2 * unit).div_ceil(columns as u64).div_ceil(unit) * unit;
    u32::try_from(step).unwrap_or(u32::MAX)
}

fn period(period: &v1::RpoPeriod) -> Value {
    let ms = |us: Option<u64>| us.map(|us| millis(us.saturating_mul(1000)));
    let shares =
        shares(period).map(|s| json!({"idle": s[0], "seal": s[1], "link": s[2], "durable": s[3], "silent": s[4]}));
    json!({
        "start": json_time(period.start_time_ns),
        "end": json_time(period.end_time_ns),
        "samples": period.samples,
        "p50_ms": ms(period.p50_us),
        "p95_ms": ms(period.p95_us),
        "p99_ms": ms(period.p99_us),
        "max_ms": ms(period.max_us),
        "within_target": period.within_target,
        "waiting": shares,
    })
}

fn report(report: &v1::RpoReport) -> Value {
    json!({
        "group": id(&report.group),
        "target_ms": millis(report.target_us.saturating_mul(1000)),
        "whole": report.whole.as_ref().map(period),
        "periods": report.periods.iter().map(period).collect::<Vec<_>>(),
    })
}

/// Shares of idle, seal, link, durable, silent; nothing while there is none of them.
fn shares(period: &v1::RpoPeriod) -> Option<[f64; 5]> {
    let s = period.stages?;
    let all = [s.idle, s.seal, s.link, s.durable, s.silent];
    let sum: u64 = all.iter().sum();
    (sum > 0).then(|| all.map(|n| n as f64 / sum as f64))
}

fn percent(share: f64) -> String {
    // 100 % is said of nothing that is less.
    let shown = (share * 10_000.0).floor() / 100.0;
    format!("{shown:.2} %")
}

fn listed(reports: &[v1::RpoReport]) -> String {
    if reports.is_empty() {
        return "no groups; create one: afterimage group create --help\n".to_owned();
    }
    table(
        &["GROUP", ">TARGET", ">P50", ">P95", ">P99", ">MAX", ">IN TARGET"],
        reports.iter().map(|report| {
            let whole = report.whole.unwrap_or_default();
            vec![
                text(id(&report.group)),
                text(micros(Some(report.target_us))),
                text(micros(whole.p50_us)),
                text(micros(whole.p95_us)),
                text(micros(whole.p99_us)),
                text(micros(whole.max_us)),
                text(whole.within_target.map_or_else(String::new, percent)),
            ]
        }),
    )
}

/// The p99 of each part as a column, on a logarithmic scale; a dot where nothing is known.
fn chart(report: &v1::RpoReport, columns: usize) -> String {
    let parts: Vec<Option<u64>> = report.periods.iter().map(|p| p.p99_us).collect();
    // More parts than columns: the worst of those that share one.
    let each = parts.len().div_ceil(columns.max(1)).max(1);
    let bars: Vec<Option<u64>> = parts.chunks(each).map(|c| c.iter().copied().flatten().max()).collect();
    let Some(most) = bars.iter().copied().flatten().max() else { return "nothing is known of that time\n".to_owned() };
    let least = bars.iter().copied().flatten().min().unwrap_or(1).max(1);
    let (low, high) = ((least as f64).log10().floor(), (most.max(2) as f64).log10().ceil());
    let high = if high > low { high } else { low + 1.0 };
    let level = |us: u64| ((us.max(1) as f64).log10() - low) / (high - low) * LINES as f64;
    let target = Some(report.target_us).filter(|t| *t > 0).map(level);
    let mut out = "p99, each column the worst of its time; the line is the target\n".to_owned();
    for line in (0..LINES).rev() {
        let top = 10f64.powf(low + (high - low) * (line + 1) as f64 / LINES as f64);
        let label =
            if line + 1 == LINES || line == LINES / 2 { show_duration((top * 1000.0) as u64) } else { String::new() };
        let is_target = target.is_some_and(|t| t >= line as f64 && t < (line + 1) as f64);
        let column = |bar: &Option<u64>| match bar {
            // A value at the bottom of the scale is seen, too.
            Some(us) if level(*us) > line as f64 || line == 0 => '█',
            None if line == 0 => '·',
            _ if is_target => '─',
            _ => ' ',
        };
        let drawn: String = bars.iter().map(column).collect();
        out += format!("{label:>10} │{drawn}").trim_end();
        out.push('\n');
    }
    if let (Some(first), Some(last)) = (report.periods.first(), report.periods.last()) {
        let (first, last) = (show_time(first.start_time_ns), show_time(last.end_time_ns));
        let room = bars.len().saturating_sub(first.len() + last.len());
        let ends = if room > 0 { format!("{first}{}{last}", " ".repeat(room)) } else { format!("{first} to {last}") };
        out += &format!("{:>10} └{}\n{:>12}{ends}\n", "", "─".repeat(bars.len()), "");
    }
    out
}

/// Where the time went.
fn went(whole: &v1::RpoPeriod) -> String {
    let Some([idle, seal, link, durable, silent]) = shares(whole) else { return String::new() };
    format!(
        "the oldest write was waiting: nowhere {}, to be sealed {}, for the link {},\n\
         to be durable {}; nobody knows {}\n",
        percent(idle),
        percent(seal),
        percent(link),
        percent(durable),
        percent(silent)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(i: u64, p99_us: Option<u64>) -> v1::RpoPeriod {
        let ns = 1_000_000_000;
        v1::RpoPeriod { start_time_ns: i * 60 * ns, end_time_ns: (i + 1) * 60 * ns, p99_us, ..Default::default() }
    }

    fn found(parts: &[Option<u64>]) -> v1::RpoReport {
        v1::RpoReport {
            group: "tenants/default/groups/shop".into(),
            target_us: 500_000,
            periods: parts.iter().enumerate().map(|(i, p)| part(i as u64, *p)).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_chart_fits_100_columns_and_shows_the_worst_of_a_column() {
        let mut parts = vec![Some(3_000); 500];
        parts[250] = Some(90_000_000);
        parts[10] = None;
        let shown = chart(&found(&parts), 100 - MARGIN);
        assert!(shown.lines().all(|l| l.chars().count() <= 100), "{shown}");
        let top = shown.lines().nth(1).unwrap();
        assert_eq!(top.chars().filter(|c| *c == '█').count(), 1, "{shown}");
        assert!(shown.contains('─'), "the target\n{shown}");
    }

    #[test]
    fn what_is_not_known_is_a_dot_and_not_a_zero() {
        let shown = chart(&found(&[Some(1_000), None, Some(1_000_000)]), 50);
        let bottom = shown.lines().find(|l| l.contains('·')).unwrap();
        assert!(bottom.ends_with("█·█"), "{shown}");
        assert!(chart(&found(&[None, None]), 50).contains("nothing is known"));
        assert_eq!(period(&part(0, None))["p50_ms"], Value::Null);
        assert_eq!(period(&part(0, None))["waiting"], Value::Null);
    }

    #[test]
    fn steps_fit_the_columns_and_what_is_kept() {
        let (s, now) = (1_000_000_000, 2_000_000_000_000_000_000);
        assert_eq!(fitting(now - 3600 * s, now, now, 88), 60);
        assert_eq!(fitting(now - 86_400 * s, now, now, 88), 1020);
        assert_eq!(fitting(now - 7 * 86_400 * s, now, now, 88), 7200);
    }

    #[test]
    fn a_share_is_never_rounded_up_to_all() {
        assert_eq!(percent(0.999_999), "99.99 %");
        assert_eq!(percent(1.0), "100.00 %");
    }
}
