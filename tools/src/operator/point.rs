//! `afterimage point`: what a group can be brought back to. Every write is a point; cuts are the ones with a number, one
//! a second by default.

use std::collections::VecDeque;

use afterimage_wire::v1::{self, point_choice::At};
use clap::{Args, Subcommand};

use super::documents;
use super::failure::Failure;
use super::group::object;
use super::output::{Mood, fields, state, table, text};
use super::session::Session;
use super::values::{Selector, selector, show_count, show_time, time};

/// Points asked for at once; the API's most.
const PAGE: u32 = 1000;

/// Verbs of `afterimage point`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// List restore points: the newest cuts, or those of a span of time.
    #[command(after_help = "Examples:\n  \
        afterimage point list shop                        the newest 20 cuts\n  \
        afterimage point list shop --after -10m           of the last ten minutes\n  \
        afterimage point list shop --after 2026-11-21T10:00:00Z --before 2026-11-21T10:05:00Z --limit 0\n  \
        afterimage point list shop --writes --limit 50    single writes")]
    List {
        /// The group's name.
        group: String,
        /// Not before this time: 2026-11-21T10:00:00Z, or -10m (ago).
        #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
        after: Option<u64>,
        /// Not after this time.
        #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
        before: Option<u64>,
        /// Not before the write with this number.
        #[arg(long, value_name = "SEQ")]
        from_seq: Option<u64>,
        /// Every write, not only the cuts.
        #[arg(long)]
        writes: bool,
        /// The newest so many of them; 0 for all.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show which single point a choice means now.
    #[command(after_help = "Examples:\n  \
        afterimage point show shop                              the newest\n  \
        afterimage point show shop cut:42\n  \
        afterimage point show shop --at 2026-11-21T10:00:00Z    the last write not after this time\n  \
        afterimage point show shop --seq 123456                 exactly this write")]
    Show {
        /// The group's name.
        group: String,
        #[command(flatten)]
        choice: Choice,
    },
    /// Make a cut with a label now.
    #[command(after_help = "Examples:\n  afterimage point cut shop --label before-upgrade")]
    Cut {
        /// The group's name.
        group: String,
        /// What to call it, at most 255 bytes.
        #[arg(long)]
        label: String,
    },
}

/// A point in one of the ways to name it.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub struct Choice {
    /// latest, cut:N, seq:N, time:2026-11-21T10:00:00Z, time:-5m [default: latest].
    #[arg(value_parser = selector)]
    point: Option<Selector>,
    /// The last write not after this time: 2026-11-21T10:00:00Z, or -10m (ago).
    #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
    at: Option<u64>,
    /// Exactly this write.
    #[arg(long)]
    seq: Option<u64>,
    /// The cut with this number.
    #[arg(long)]
    cut: Option<u64>,
}

impl Choice {
    /// The point that was named, or the newest.
    pub fn selector(&self) -> Selector {
        let named = self.point.or(self.at.map(Selector::Time)).or(self.seq.map(Selector::Seq));
        named.or(self.cut.map(Selector::Cut)).unwrap_or(Selector::Latest)
    }
}

/// A choice as the API wants it.
pub fn api(choice: Selector) -> v1::PointChoice {
    v1::PointChoice {
        at: Some(match choice {
            Selector::Latest => At::Latest(true),
            Selector::Cut(cut) => At::Cut(cut),
            Selector::Time(ns) => At::TimeNs(ns),
            Selector::Seq(seq) => At::Seq(seq),
        }),
    }
}

/// Which point a choice means now.
pub async fn resolve(session: &Session, group: &str, choice: Selector) -> Result<v1::Point, Failure> {
    let request = v1::ResolvePointRequest { parent: session.group(group), at: Some(api(choice)) };
    session.ask(object(group), session.points().resolve_point(request)).await
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::List { group, after, before, from_seq, writes, limit } => {
            let wanted = Wanted { after, before, from_seq, writes, limit: limit as usize };
            let found = list(session, &group, &wanted).await?;
            let document = serde_json::json!({
                "group": group,
                "summary": found.summary.as_ref().map(documents::points),
                "matched": found.matched,
                "points": found.points.iter().map(documents::point).collect::<Vec<_>>(),
            });
            out.show(&document, || listed(&group, &found, writes));
        }
        Verb::Show { group, choice } => {
            let found = resolve(session, &group, choice.selector()).await?;
            out.show(&documents::point(&found), || shown(&found));
        }
        Verb::Cut { group, label } => {
            let request = v1::CreateCutRequest { parent: session.group(&group), label, ..Default::default() };
            let made = session.ask(object(&group), session.points().create_cut(request)).await?;
            out.show(&documents::point(&made), || shown(&made));
        }
    }
    Ok(())
}

/// What `point list` was asked for.
struct Wanted {
    after: Option<u64>,
    before: Option<u64>,
    from_seq: Option<u64>,
    writes: bool,
    /// 0: all.
    limit: usize,
}

impl Wanted {
    fn fits(&self, point: &v1::Point) -> bool {
        self.after.is_none_or(|t| point.wall_ns >= t) && self.before.is_none_or(|t| point.wall_ns <= t)
    }
}

/// What was found.
#[derive(Default)]
struct Found {
    points: VecDeque<v1::Point>,
    /// Points that fit, shown or not.
    matched: u64,
    summary: Option<v1::PointSummary>,
}

impl Found {
    /// Takes the points of a page that fit and keeps the newest.
    fn take(&mut self, wanted: &Wanted, points: Vec<v1::Point>) {
        for point in points.into_iter().filter(|point| wanted.fits(point)) {
            if wanted.limit > 0 && self.points.len() == wanted.limit {
                self.points.pop_front();
            }
            self.points.push_back(point);
            self.matched += 1;
        }
    }
}

async fn list(session: &Session, group: &str, wanted: &Wanted) -> Result<Found, Failure> {
    let mut found = Found::default();
    let mut request = v1::ListPointsRequest {
        parent: session.group(group),
        from_seq: wanted.from_seq.unwrap_or(0),
        page_size: 1,
        cuts_only: !wanted.writes,
        ..Default::default()
    };
    let first = session.ask(object(group), session.points().list_points(request.clone())).await?;
    found.summary = first.summary;
    if let Some(summary) = &found.summary {
        request.from_seq = request.from_seq.max(start(session, group, wanted, summary).await);
    }
    request.page_size = PAGE;
    loop {
        let page = session.ask(object(group), session.points().list_points(request.clone())).await?;
        // Points rise by number, and the wall clock may jump: a later point may be earlier by its clock, so every page
        // is read and the time decides point by point.
        found.take(wanted, page.points);
        if page.next_seq <= request.from_seq {
            return Ok(found);
        }
        request.from_seq = page.next_seq;
    }
}

/// A number at which to begin so that not the whole history has to be read; every point that is wanted lies at or above.
async fn start(session: &Session, group: &str, wanted: &Wanted, summary: &v1::PointSummary) -> u64 {
    if let Some(after) = wanted.after {
        // No point so early: begin with the oldest.
        return resolve(session, group, Selector::Time(after)).await.map_or(0, |point| point.seq);
    }
    match &summary.newest {
        Some(newest) if wanted.writes && wanted.limit > 0 && wanted.before.is_none() && wanted.from_seq.is_none() => {
            newest.seq.saturating_sub(wanted.limit as u64 - 1)
        }
        _ => 0,
    }
}

fn listed(group: &str, found: &Found, writes: bool) -> String {
    let what = if writes { "writes" } else { "cuts" };
    let mut shown = if found.points.is_empty() {
        format!("no {what} of group {group} fit\n")
    } else {
        table(
            &[">CUT", ">SEQ", "TIME AT SOURCE", "FLUSH-CLEAN", ">DISKS", "LABEL"],
            found.points.iter().map(|point| {
                vec![
                    text(point.cut.map_or_else(String::new, |cut| cut.to_string())),
                    text(point.seq.to_string()),
                    text(show_time(point.wall_ns)),
                    text(if point.flush_clean { "yes" } else { "" }),
                    text(point.disks.len().to_string()),
                    if point.damage.is_empty() { text(&point.label) } else { state(&point.damage, Mood::Bad) },
                ]
            }),
        )
    };
    if found.matched > found.points.len() as u64 {
        shown += &format!(
            "the newest {} of {} {what}; --limit 0 shows all\n",
            show_count(found.points.len() as u64),
            show_count(found.matched)
        );
    }
    if let Some(v1::PointSummary { oldest: Some(oldest), newest: Some(newest), count, cuts }) = &found.summary {
        shown += &format!(
            "held: {} single writes, {} of them cuts\n      {} to {}\n",
            show_count(*count),
            show_count(*cuts),
            show_time(oldest.wall_ns),
            show_time(newest.wall_ns)
        );
    }
    shown
}

fn shown(point: &v1::Point) -> String {
    fields(&[
        ("seq", point.seq.to_string()),
        ("cut", point.cut.map_or_else(String::new, |cut| cut.to_string())),
        ("time at source", show_time(point.wall_ns)),
        ("clock in sync", if point.clock_synced { "yes" } else { "not known" }.to_owned()),
        ("flush-clean", if point.flush_clean { "yes" } else { "not known" }.to_owned()),
        ("label", point.label.clone()),
        ("disks", point.disks.join(" ")),
        ("damage", point.damage.clone()),
        ("timeline", point.timeline.clone()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(limit: usize) -> Wanted {
        Wanted { after: Some(20), before: Some(40), from_seq: None, writes: false, limit }
    }

    fn points(times: &[u64]) -> Vec<v1::Point> {
        times.iter().map(|&wall_ns| v1::Point { wall_ns, seq: wall_ns, ..Default::default() }).collect()
    }

    #[test]
    fn a_span_of_time_holds_both_its_ends() {
        let mut found = Found::default();
        found.take(&wanted(0), points(&[19, 20, 30, 40, 41]));
        assert_eq!(found.points.iter().map(|p| p.wall_ns).collect::<Vec<_>>(), [20, 30, 40]);
    }

    #[test]
    fn a_limit_keeps_the_newest_over_all_pages() {
        let mut found = Found::default();
        found.take(&wanted(2), points(&[20, 21, 22]));
        found.take(&wanted(2), points(&[23]));
        assert_eq!(found.points.iter().map(|p| p.wall_ns).collect::<Vec<_>>(), [22, 23]);
        assert_eq!(found.matched, 4);
        assert!(listed("shop", &found, false).contains("the newest 2 of 4 cuts"));
    }

    #[test]
    fn a_choice_says_the_same_to_the_api() {
        assert_eq!(api(Selector::Latest).at, Some(At::Latest(true)));
        assert_eq!(api(Selector::Cut(3)).at, Some(At::Cut(3)));
        assert_eq!(api(Selector::Time(4)).at, Some(At::TimeNs(4)));
        assert_eq!(api(Selector::Seq(5)).at, Some(At::Seq(5)));
    }

    #[test]
    fn a_table_of_points_fits_100_columns() {
        let point = v1::Point {
            seq: u64::MAX,
            cut: Some(u64::MAX),
            wall_ns: 1_700_000_000_123_456_789,
            label: "label ".repeat(42),
            ..Default::default()
        };
        let found = Found { points: VecDeque::from([point]), matched: 1, summary: None };
        let shown = listed("shop", &found, false);
        assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
    }
}
