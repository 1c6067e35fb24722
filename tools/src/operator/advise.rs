//! `afterimage failover advise`: what is reachable, which verb fits and why, and what each would lose. The same is said before
//! a verb that loses something is done.
//!
//! What fits is not guessed: the coordinator is asked to check each verb without doing it. What that says stands as it is, and
//! what is lost comes from the status.

use afterimage_wire::v1::{self, Phase};
use serde_json::{Value, json};

use super::documents::{id, phase_word};
use super::failure::{Failure, Kind};
use super::group::object;
use super::output::{Mood, fields, state, table, text};
use super::session::Session;
use super::values::{json_time, show_count, show_duration, show_size, show_time};

/// How far the check of a verb may look, milliseconds: nothing is waited for.
const WITHIN_MS: u64 = 60_000;

/// A verb that could be done with a group.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Verb {
    /// `group resume`
    Resume,
    /// `failover planned`
    Planned,
    /// `failover start`
    Start,
    /// `failover start --unconfirmed`
    Unconfirmed,
    /// `failover change-point`
    ChangePoint,
    /// `failover undo`
    Undo,
    /// `failback start`
    Failback,
    /// `failback switch`
    Switch,
    /// `failback cancel`
    Cancel,
    /// `failback commit`
    Commit,
    /// `failback undo`
    UndoFailback,
}

impl Verb {
    /// As operations have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Resume => "resume",
            Self::Planned => "planned-failover",
            Self::Start | Self::Unconfirmed => "failover",
            Self::ChangePoint => "change-point",
            Self::Undo => "undo-failover",
            Self::Failback => "failback",
            Self::Switch => "switch-failback",
            Self::Cancel => "cancel-failback",
            Self::Commit => "commit-failback",
            Self::UndoFailback => "undo-failback",
        }
    }

    fn command(self, group: &str) -> String {
        match self {
            Self::Resume => format!("afterimage group resume {group}"),
            Self::Planned => format!("afterimage failover planned {group}"),
            Self::Start => format!("afterimage failover start {group} --to latest"),
            Self::Unconfirmed => format!("afterimage failover start {group} --to latest --unconfirmed {group}"),
            Self::ChangePoint => format!("afterimage failover change-point {group} --to POINT"),
            Self::Undo => format!("afterimage failover undo {group}"),
            Self::Failback => format!("afterimage failback start {group}"),
            Self::Switch => format!("afterimage failback switch {group}"),
            Self::Cancel => format!("afterimage failback cancel {group}"),
            Self::Commit => format!("afterimage failback commit {group}"),
            Self::UndoFailback => format!("afterimage failback undo {group}"),
        }
    }

    /// Those that could fit a group, the mildest first.
    fn of(status: &v1::GroupStatus) -> &'static [Self] {
        match status.phase() {
            Phase::Syncing | Phase::Protected if status.pause.is_some() => {
                &[Self::Resume, Self::Planned, Self::Start, Self::Unconfirmed]
            }
            Phase::Syncing | Phase::Protected => &[Self::Planned, Self::Start, Self::Unconfirmed],
            Phase::FailedOver => &[Self::Failback, Self::ChangePoint, Self::Undo],
            Phase::FailingBack => &[Self::Switch, Self::Cancel],
            Phase::FailedBack => &[Self::Commit, Self::UndoFailback],
            Phase::FailingOver | Phase::Unspecified => &[],
        }
    }
}

/// What a verb leaves behind, as far as it is known.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loss {
    /// What was written in the last so many milliseconds.
    pub ms: Option<u64>,
    /// So many bytes.
    pub bytes: Option<u64>,
    /// In words.
    pub what: String,
}

impl Loss {
    fn nothing(what: &str) -> Self {
        Self { ms: Some(0), bytes: Some(0), what: what.to_owned() }
    }

    fn short(&self) -> String {
        match (self.ms, self.bytes) {
            (Some(0), Some(0)) => "nothing".to_owned(),
            (Some(ms), Some(bytes)) => format!("{}, {}", show_duration(ms * 1_000_000), show_size(bytes)),
            (Some(ms), None) => show_duration(ms * 1_000_000),
            (None, Some(bytes)) => show_size(bytes),
            (None, None) => "not known".to_owned(),
        }
    }
}

/// What a verb would lose, from where a group stands at `now_ns` (wall clock).
pub fn loss(verb: Verb, status: &v1::GroupStatus, now_ns: u64) -> Loss {
    let since = |at_ns: u64| (at_ns > 0).then(|| now_ns.saturating_sub(at_ns) / 1_000_000);
    let view = status.views.iter().find(|v| v.kind() == v1::ViewKind::Failover && v.open);
    match verb {
        Verb::Resume => Loss::nothing("what was written since it was paused is sent"),
        Verb::Planned => Loss::nothing("all that the source has captured goes along"),
        Verb::Start | Verb::Unconfirmed if status.zero_loss => {
            Loss::nothing("no host has been answered a write that the target does not hold")
        }
        Verb::Start | Verb::Unconfirmed => {
            let ms = status.rpo.as_ref().and_then(|rpo| rpo.now_us).map(|us| us.div_ceil(1000));
            let bytes = ms.map(|_| status.queue_bytes + status.spill_bytes);
            let what = match ms {
                Some(_) if status.pause.is_some() => {
                    "it is paused: what was written since does not come along; resumed first, more of it does"
                }
                Some(_) => {
                    "at most, if the source is gone: what was written in this time; the bytes are as it last reported"
                }
                None => "nothing has been reported",
            };
            Loss { ms, bytes, what: what.to_owned() }
        }
        Verb::Undo | Verb::ChangePoint => Loss {
            ms: view.and_then(|v| since(v.create_time_ns)),
            bytes: None,
            what: "what was written since the failover does not come along, and is kept as a branch".to_owned(),
        },
        Verb::Failback => Loss::nothing("the group runs on as it does"),
        Verb::Switch => {
            Loss::nothing("all that was written to the view goes along; what only the source's disks held goes")
        }
        Verb::Cancel => Loss::nothing("the group runs on as it does; what the source holds of the failback is deleted"),
        Verb::Commit => Loss::nothing("but for the way back: what the target keeps of its view is deleted"),
        Verb::UndoFailback => {
            let back = status.conditions.iter().find(|c| c.kind == "failed-back");
            Loss {
                ms: back.and_then(|c| since(c.since_ns)),
                bytes: None,
                what: "what the source wrote since the switch does not come along".to_owned(),
            }
        }
    }
}

/// What a verb would lose, as it is said before it is done.
pub fn said(verb: Verb, standing: &Standing) -> String {
    let lost = loss(verb, &standing.status, standing.now_ns);
    let seen = &standing.seen;
    let ends = [("source", seen.source), ("target", seen.target)];
    let away: Vec<&str> = ends.iter().filter(|(_, there)| !there).map(|(end, _)| *end).collect();
    let away = if away.is_empty() { String::new() } else { format!(" Not connected: {}.", away.join(", ")) };
    format!("Lost: {} ({}).{away}", lost.short(), lost.what)
}

/// Says what a verb would lose, and asks. With `--yes` nobody is asked, and nothing is looked up.
///
/// # Errors
/// The answer was not yes, or there is no terminal to ask on; the coordinator does not answer.
pub async fn confirm(verb: Verb, group: &str, session: &Session, what: &str) -> Result<(), Failure> {
    if session.out.yes {
        return Ok(());
    }
    let standing = standing(session, group).await?;
    let choices = weigh(session, group, &standing).await?;
    let advised = advise(&standing.status, &standing.seen, &choices);
    let advice = match advised.verb {
        Some(other) if other != verb => format!("\nWhat fits better: {}: {}.", other.command(group), advised.why),
        _ => String::new(),
    };
    session.out.confirm(&object(group), &format!("{what}\n{}{advice}", said(verb, &standing)))
}

/// Where a group stands.
#[derive(Clone, Debug)]
pub struct Standing {
    /// As the coordinator shows it.
    pub status: v1::GroupStatus,
    /// What of it is there.
    pub seen: Seen,
    /// The coordinator's wall clock, nanoseconds since the Unix epoch.
    pub now_ns: u64,
}

/// What is there of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Its source reports.
    pub source: bool,
    /// Its target reports.
    pub target: bool,
    /// The stream between them, in a word.
    pub link: &'static str,
}

impl Seen {
    /// `proxies` are those of the same snapshot.
    pub fn of(status: &v1::GroupStatus, proxies: &[v1::Proxy]) -> Self {
        let is = |kind: &str| status.conditions.iter().any(|c| c.kind == kind);
        let there = |name: &str| proxies.iter().any(|p| p.name == name && p.connected);
        let (source, target) = (there(&status.source), there(&status.target));
        let link = match () {
            () if is("refused") || is("fenced") => "refused",
            () if is("link-down") || !source || !target => "down",
            () if matches!(status.phase(), Phase::Protected | Phase::Syncing | Phase::FailedBack) => "up",
            () => "not-needed",
        };
        Self { source, target, link }
    }
}

/// A verb, whether it fits, and what it would lose.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Which.
    pub verb: Verb,
    /// Why it does not fit; nothing if it does.
    pub refused: Option<String>,
    /// What it would lose.
    pub loss: Loss,
}

/// What is advised.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Advice {
    /// What to do; nothing: leave it as it is.
    pub verb: Option<Verb>,
    /// Why.
    pub why: String,
}

/// What speaks for leaving a source that is there.
fn trouble(status: &v1::GroupStatus) -> Option<&v1::Condition> {
    status.conditions.iter().find(|c| c.kind == "disk-failed" || c.kind == "damaged")
}

/// Which verb fits a group best. `choices` are those of its phase.
pub fn advise(status: &v1::GroupStatus, seen: &Seen, choices: &[Choice]) -> Advice {
    let fits = |verb: Verb| choices.iter().any(|c| c.verb == verb && c.refused.is_none());
    let refusal =
        |verb: Verb| choices.iter().find(|c| c.verb == verb).and_then(|c| c.refused.clone()).unwrap_or_default();
    let stay = |why: String| Advice { verb: None, why };
    let take = |verb, why: &str| Advice { verb: Some(verb), why: why.to_owned() };
    if let Some(operation) = &status.operation {
        let (verb, name) = (&operation.verb, id(&operation.name));
        return stay(format!("{verb} is being done: afterimage failover wait {name}"));
    }
    if !seen.target {
        return stay(
            "its target is not connected, and nothing can be done without it: look at that host; if this coordinator is what \
             is cut off, `afterimage failover local` there does it"
                .to_owned(),
        );
    }
    match status.phase() {
        Phase::Syncing | Phase::Protected if status.pause.is_some() && seen.source => match trouble(status) {
            Some(condition) => take(
                Verb::Resume,
                &format!("{}; it is paused: resumed, and then failed over as planned, it loses least", condition.message),
            ),
            None => stay(format!(
                "it is paused, by {}: nothing is sent, as was meant; `group resume` ends that",
                status.pause.as_ref().map(|pause| pause.by.as_str()).unwrap_or_default()
            )),
        },
        Phase::Syncing | Phase::Protected if seen.source && fits(Verb::Planned) => {
            match trouble(status) {
                Some(condition) => take(Verb::Planned, &format!("{}; the source hands over, and nothing is lost", condition.message)),
                None => stay(
                    "source and target are there, and it is protected. To move it, `failover planned` loses nothing; from bad \
                     data to before it, `failover start --to time:…`"
                        .to_owned(),
                ),
            }
        }
        Phase::Syncing | Phase::Protected if fits(Verb::Start) && seen.source => take(
            Verb::Start,
            "its source is there, and does not hand over in an orderly way; all its I/O is held first",
        ),
        Phase::Syncing | Phase::Protected if fits(Verb::Start) && status.lease_ms > 0 => {
            let lease = show_duration(status.lease_ms * 1_000_000);
            take(Verb::Start, &format!("its source is away, and stops by itself: its lease of {lease} is waited for"))
        }
        Phase::Syncing | Phase::Protected if fits(Verb::Start) => {
            take(Verb::Start, "its source is away, and who drives its machines can say that they are off")
        }
        Phase::Syncing | Phase::Protected if !seen.source && fits(Verb::Unconfirmed) => take(
            Verb::Unconfirmed,
            "its source is away, and nobody can say that it is off: make sure of that first, or both will be written to",
        ),
        Phase::Syncing | Phase::Protected => stay(format!("nothing can be run from yet: {}", refusal(Verb::Start))),
        Phase::FailedOver if fits(Verb::Failback) => take(
            Verb::Failback,
            "its source is there again: what is written is protected back to it, while the group runs on",
        ),
        Phase::FailedOver => {
            stay(format!("it runs at its target; back to its source it does not go now: {}", refusal(Verb::Failback)))
        }
        Phase::FailingBack if fits(Verb::Switch) => {
            take(Verb::Switch, "its source has all of it: the group can run there again, at a time that suits")
        }
        Phase::FailingBack => stay(format!("it is on its way: {}", refusal(Verb::Switch))),
        Phase::FailedBack if !seen.source && fits(Verb::UndoFailback) => {
            take(Verb::UndoFailback, "its source is away: it can run from its view again, as it was at the switch")
        }
        Phase::FailedBack if fits(Verb::Commit) => {
            take(Verb::Commit, "it is protected again; commit it once the machine at the source is as it should be")
        }
        Phase::FailedBack => {
            stay(format!("it runs at its source, and can be undone; not committed yet: {}", refusal(Verb::Commit)))
        }
        Phase::FailingOver | Phase::Unspecified => stay("an operation is being done".to_owned()),
    }
}

/// Shows it.
///
/// # Errors
/// There is no such group, or the coordinator does not answer.
pub async fn run(group: &str, session: &Session) -> Result<(), Failure> {
    let standing = standing(session, group).await?;
    let choices = weigh(session, group, &standing).await?;
    let Standing { status, seen, .. } = standing;
    let advice = advise(&status, &seen, &choices);
    session
        .out
        .show(&document(group, &status, &seen, &choices, &advice), || shown(group, &status, &seen, &choices, &advice));
    Ok(())
}

/// The verbs of a group's phase, each checked.
async fn weigh(session: &Session, group: &str, standing: &Standing) -> Result<Vec<Choice>, Failure> {
    let Standing { status, seen, now_ns } = standing;
    let mut choices = Vec::new();
    for &verb in Verb::of(status) {
        if verb == Verb::Unconfirmed && seen.source {
            continue;
        }
        let refused = check(verb, group, session).await?;
        choices.push(Choice { verb, refused, loss: loss(verb, status, *now_ns) });
    }
    Ok(choices)
}

/// A group as it stands.
///
/// # Errors
/// There is none of that name, or the coordinator does not answer.
pub async fn standing(session: &Session, group: &str) -> Result<Standing, Failure> {
    let request = v1::GetStatusRequest { parent: session.group(group) };
    let snapshot = session.ask(object(group), session.status().get_status(request)).await?;
    let status = snapshot.groups.into_iter().next().unwrap_or_default();
    let seen = Seen::of(&status, &snapshot.proxies);
    Ok(Standing { status, seen, now_ns: snapshot.time_ns })
}

/// Asks whether a verb could be begun now; why not.
async fn check(verb: Verb, group: &str, session: &Session) -> Result<Option<String>, Failure> {
    let name = session.group(group);
    let validate_only = true;
    let object = object(group);
    let latest = || Some(v1::PointChoice { at: Some(v1::point_choice::At::Latest(true)) });
    let mut failovers = session.failovers();
    if verb == Verb::Resume {
        let request = v1::ResumeGroupRequest { name, validate_only, ..Default::default() };
        return refusal(session.ask(&object, session.groups().resume_group(request)).await);
    }
    let asked = match verb {
        // Asked above: it makes no operation.
        Verb::Resume => return Ok(None),
        Verb::Planned => {
            let request = v1::StartPlannedFailoverRequest {
                group: name,
                within_ms: WITHIN_MS,
                validate_only,
                ..Default::default()
            };
            session.ask(&object, failovers.start_planned_failover(request)).await
        }
        Verb::Start | Verb::Unconfirmed => {
            let unconfirmed = verb == Verb::Unconfirmed;
            let confirm_name = if unconfirmed { group.to_owned() } else { String::new() };
            let request = v1::StartFailoverRequest {
                group: name,
                to: latest(),
                unconfirmed,
                confirm_name,
                validate_only,
                ..Default::default()
            };
            session.ask(&object, failovers.start_failover(request)).await
        }
        Verb::ChangePoint => {
            let choice = latest().map(v1::change_point_request::Choice::To);
            let request =
                v1::ChangePointRequest { group: name, choice, force: true, validate_only, ..Default::default() };
            session.ask(&object, failovers.change_point(request)).await
        }
        Verb::Undo => {
            let request = v1::UndoFailoverRequest { group: name, force: true, validate_only, ..Default::default() };
            session.ask(&object, failovers.undo_failover(request)).await
        }
        Verb::Failback => {
            let request = v1::StartFailbackRequest { group: name, validate_only, ..Default::default() };
            session.ask(&object, failovers.start_failback(request)).await
        }
        Verb::Switch => {
            let request =
                v1::SwitchFailbackRequest { group: name, within_ms: WITHIN_MS, validate_only, ..Default::default() };
            session.ask(&object, failovers.switch_failback(request)).await
        }
        Verb::Cancel => {
            let request = v1::CancelFailbackRequest { group: name, validate_only, ..Default::default() };
            session.ask(&object, failovers.cancel_failback(request)).await
        }
        Verb::Commit => {
            let request = v1::CommitFailbackRequest { group: name, validate_only, ..Default::default() };
            session.ask(&object, failovers.commit_failback(request)).await
        }
        Verb::UndoFailback => {
            let request = v1::UndoFailbackRequest { group: name, validate_only, ..Default::default() };
            session.ask(&object, failovers.undo_failback(request)).await
        }
    };
    refusal(asked)
}

/// Why a verb is refused; nothing if it is not.
fn refusal<T>(asked: Result<T, Failure>) -> Result<Option<String>, Failure> {
    match asked {
        Ok(_) => Ok(None),
        // Of a proxy that is away, too; a coordinator that is would have been missed before.
        Err(failure) if matches!(failure.kind, Kind::Refused | Kind::Unreachable | Kind::NotFound | Kind::Failed) => {
            Ok(Some(failure.message.clone()))
        }
        Err(failure) => Err(failure),
    }
}

fn document(group: &str, status: &v1::GroupStatus, seen: &Seen, choices: &[Choice], advice: &Advice) -> Value {
    let rpo = status.rpo.as_ref();
    let choice = |c: &Choice| {
        json!({
            "verb": c.verb.word(),
            "command": c.verb.command(group),
            "fits": c.refused.is_none(),
            "refused": c.refused,
            "loses": { "ms": c.loss.ms, "bytes": c.loss.bytes, "what": c.loss.what },
        })
    };
    let newest = status.points.as_ref().and_then(|p| p.newest.as_ref());
    json!({
        "group": group,
        "phase": phase_word(status.phase()),
        "source": { "proxy": id(&status.source), "connected": seen.source },
        "target": { "proxy": id(&status.target), "connected": seen.target },
        "link": seen.link,
        "lease_ms": (status.lease_ms > 0).then_some(status.lease_ms),
        "rpo_now_ms": rpo.and_then(|r| r.now_us).map(|us| us as f64 / 1000.0),
        "report_age_ms": rpo.and_then(|r| r.report_age_us).map(|us| us as f64 / 1000.0),
        "zero_loss": status.zero_loss,
        "newest_point": newest.map(|p| json!({ "seq": p.seq, "time": json_time(p.wall_ns) })),
        "advice": { "verb": advice.verb.map(Verb::word), "command": advice.verb.map(|v| v.command(group)), "why": advice.why },
        "verbs": choices.iter().map(choice).collect::<Vec<_>>(),
    })
}

fn shown(group: &str, status: &v1::GroupStatus, seen: &Seen, choices: &[Choice], advice: &Advice) -> String {
    let there =
        |proxy: &str, there: bool| format!("{} is {}", id(proxy), if there { "connected" } else { "NOT connected" });
    let us = |us: Option<u64>| us.map_or_else(|| "not known".to_owned(), |us| show_duration(us.saturating_mul(1000)));
    let rpo = status.rpo.unwrap_or_default();
    let newest = status.points.as_ref().and_then(|p| p.newest.as_ref());
    let point = newest.map(|p| format!("write {} of {}", show_count(p.seq), show_time(p.wall_ns)));
    let lease = match status.lease_ms {
        0 => "none: a source that is cut off goes on writing".to_owned(),
        ms => format!("{}: a source that is cut off stops by itself", show_duration(ms * 1_000_000)),
    };
    let mut shown = fields(&[
        ("group", format!("{group}, {}", phase_word(status.phase()))),
        ("source", there(&status.source, seen.source)),
        ("target", there(&status.target, seen.target)),
        ("link", seen.link.to_owned()),
        ("lease", lease),
        ("RPO now", format!("{}, as of a report {} ago", us(rpo.now_us), us(rpo.report_age_us))),
        ("newest point", point.unwrap_or_default()),
    ]);
    let what = advice.verb.map_or_else(|| "leave it as it is".to_owned(), |verb| verb.command(group));
    shown += &format!("\n{}", fields(&[("advice", what), ("why", advice.why.clone())]));
    if !choices.is_empty() {
        let row = |c: &Choice| {
            let fits = if c.refused.is_none() { state("yes", Mood::Good) } else { state("no", Mood::Plain) };
            let word = if c.verb == Verb::Unconfirmed { "failover --unconfirmed" } else { c.verb.word() };
            vec![text(word), fits, text(c.loss.short()), text(c.refused.as_ref().unwrap_or(&c.loss.what))]
        };
        shown += &format!("\n{}", table(&["VERB", "FITS", ">LOSES", "WHAT, OR WHY NOT"], choices.iter().map(row)));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: Phase, conditions: &[&str]) -> v1::GroupStatus {
        v1::GroupStatus {
            name: "tenants/default/groups/shop".into(),
            source: "tenants/default/proxies/src".into(),
            target: "tenants/default/proxies/dr".into(),
            phase: phase.into(),
            rpo: Some(v1::Rpo { now_us: Some(2_500_000), report_age_us: Some(2_000_000), ..Default::default() }),
            queue_bytes: 3 << 20,
            spill_bytes: 1 << 20,
            conditions: conditions
                .iter()
                .map(|kind| v1::Condition { kind: (*kind).into(), since_ns: 40_000_000_000, ..Default::default() })
                .collect(),
            ..Default::default()
        }
    }

    fn seen(status: &v1::GroupStatus) -> Seen {
        let away = |kind: &str| status.conditions.iter().any(|c| c.kind == kind);
        let proxy = |name: &str, connected| v1::Proxy { name: name.into(), connected, ..Default::default() };
        let proxies = [
            proxy("tenants/default/proxies/src", !away("source-unreachable")),
            proxy("tenants/default/proxies/dr", !away("target-unreachable")),
        ];
        Seen::of(status, &proxies)
    }

    fn choices(status: &v1::GroupStatus, refused: &[Verb]) -> Vec<Choice> {
        let choice = |verb: &Verb| Choice {
            verb: *verb,
            refused: refused.contains(verb).then(|| "something is missing".to_owned()),
            loss: loss(*verb, status, 100_000_000_000),
        };
        Verb::of(status).iter().map(choice).collect()
    }

    fn advised(status: &v1::GroupStatus, refused: &[Verb]) -> (Option<Verb>, String) {
        let advice = advise(status, &seen(status), &choices(status, refused));
        (advice.verb, advice.why)
    }

    #[test]
    fn what_is_advised_is_what_fits_and_loses_least() {
        use Verb::*;
        let away = ["source-unreachable"];
        let protected = status(Phase::Protected, &[]);
        assert_eq!(advised(&protected, &[]).0, None);
        assert_eq!(advised(&status(Phase::Protected, &["disk-failed"]), &[]).0, Some(Planned));
        assert_eq!(advised(&protected, &[Planned]).0, Some(Start));
        let gone = status(Phase::Protected, &away);
        let (verb, why) = advised(&gone, &[Planned, Start]);
        assert_eq!(verb, Some(Unconfirmed));
        assert!(why.contains("make sure"), "{why}");
        let paused = |of: &v1::GroupStatus| v1::GroupStatus { pause: Some(v1::Pause::default()), ..of.clone() };
        let (verb, why) = advised(&paused(&protected), &[Planned]);
        assert!(verb.is_none() && why.contains("group resume"), "{why}");
        assert_eq!(advised(&paused(&status(Phase::Protected, &["disk-failed"])), &[Planned]).0, Some(Resume));
        assert_eq!(advised(&paused(&gone), &[Planned, Start]).0, Some(Unconfirmed));
        let what = loss(Start, &paused(&gone), 0).what;
        assert!(what.contains("paused"), "{what}");
        let leased = v1::GroupStatus { lease_ms: 10_000, ..gone.clone() };
        let (verb, why) = advised(&leased, &[Planned]);
        assert!(verb == Some(Start) && why.contains("10 s"), "{why}");
        assert!(advised(&gone, &[Planned]).1.contains("machines"));
        assert_eq!(advised(&gone, &[Planned, Start, Unconfirmed]).0, None);
        let (verb, why) = advised(&status(Phase::Protected, &["target-unreachable"]), &[Planned, Start, Unconfirmed]);
        assert!(verb.is_none() && why.contains("failover local"), "{why}");
        assert_eq!(advised(&status(Phase::FailedOver, &[]), &[]).0, Some(Failback));
        assert!(advised(&status(Phase::FailedOver, &[]), &[Failback]).1.contains("something is missing"));
        assert_eq!(advised(&status(Phase::FailingBack, &[]), &[]).0, Some(Switch));
        assert_eq!(advised(&status(Phase::FailingBack, &[]), &[Switch]).0, None);
        assert_eq!(advised(&status(Phase::FailedBack, &["failed-back"]), &[]).0, Some(Commit));
        assert_eq!(
            advised(&status(Phase::FailedBack, &["failed-back", "source-unreachable"]), &[]).0,
            Some(UndoFailback)
        );
        assert_eq!(advised(&status(Phase::FailedBack, &["failed-back"]), &[Commit]).0, None);
        let busy = v1::GroupStatus {
            operation: Some(v1::Operation {
                name: "tenants/default/operations/op".into(),
                verb: "failover".into(),
                ..Default::default()
            }),
            ..protected
        };
        assert!(advised(&busy, &[]).1.contains("failover wait op"));
    }

    #[test]
    fn what_is_lost_is_told_in_time_and_bytes_as_far_as_it_is_known() {
        let now = 100_000_000_000;
        let gone = status(Phase::Protected, &["source-unreachable"]);
        let lost = loss(Verb::Start, &gone, now);
        assert_eq!((lost.ms, lost.bytes), (Some(2_500), Some(4 << 20)));
        let standing = Standing { status: gone.clone(), seen: seen(&gone), now_ns: now };
        let text = said(Verb::Start, &standing);
        assert!(text.contains("2.50 s, 4 MiB") && text.contains("Not connected: source"), "{text}");
        let whole = v1::GroupStatus { zero_loss: true, ..gone.clone() };
        assert_eq!(loss(Verb::Start, &whole, now).ms, Some(0));
        let silent = v1::GroupStatus { rpo: None, ..gone };
        assert_eq!(loss(Verb::Start, &silent, now).short(), "not known");
        assert_eq!(loss(Verb::Planned, &silent, now).short(), "nothing");
        let view = v1::View {
            kind: v1::ViewKind::Failover.into(),
            open: true,
            create_time_ns: 70_000_000_000,
            ..Default::default()
        };
        let over = v1::GroupStatus { views: vec![view], ..status(Phase::FailedOver, &[]) };
        assert_eq!(
            loss(Verb::Undo, &over, now),
            Loss { ms: Some(30_000), bytes: None, ..loss(Verb::ChangePoint, &over, now) }
        );
        assert_eq!(loss(Verb::UndoFailback, &status(Phase::FailedBack, &["failed-back"]), now).ms, Some(60_000));
    }

    #[test]
    fn the_table_fits_and_the_document_has_all_of_it() {
        let gone = status(Phase::Protected, &["source-unreachable"]);
        let (seen, choices) = (seen(&gone), choices(&gone, &[Verb::Planned, Verb::Start]));
        let advice = advise(&gone, &seen, &choices);
        let text = shown("shop", &gone, &seen, &choices, &advice);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        for part in [
            "src is NOT connected",
            "dr is connected",
            "--unconfirmed shop",
            "planned-failover",
            "something is missing",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let document = document("shop", &gone, &seen, &choices, &advice);
        assert_eq!(document["advice"]["verb"], "failover");
        assert_eq!(document["verbs"][1]["loses"]["ms"], 2_500);
        assert_eq!((&document["verbs"][0]["fits"], &document["source"]["connected"]), (&false.into(), &false.into()));
    }
}
