//! What has to be so before a verb is begun.

use super::{FAILOVER_VIEW, Spec, Verb};
use crate::model::Model;
use crate::objects::{Group, GroupPhase, PointRecord};
use crate::problem::Problem;

/// What does not fit a group's state, and what does.
fn misfit(group: &Group) -> Problem {
    let name = group.name();
    let wait = |operation: &str| format!("wait for tenants/{}/operations/{operation}, or cancel it", group.tenant);
    let (state, remedy) = match &group.phase {
        GroupPhase::Protecting if group.pause.is_some() => {
            ("paused, and not failed over", "verbs that fit: resume, failover, test-failover, points, views".to_owned())
        }
        GroupPhase::Protecting => ("not failed over", "verbs that fit: failover, planned-failover, pause".to_owned()),
        GroupPhase::FailingOver { operation } => ("being failed over", wait(operation)),
        GroupPhase::FailedOver { view } => {
            let verbs = if group.overwritten { "failback" } else { "failback, undo-failover" };
            let remedy =
                format!("it runs from the view \"{view}\"; verbs that fit: {verbs}, change-point, points, views");
            ("failed over already", remedy)
        }
        GroupPhase::Changing { operation, .. } => ("failed over, and an operation is changing that", wait(operation)),
        GroupPhase::FailingBack { view } => {
            let verbs = "switch-failback, cancel-failback, points, views";
            ("failing back", format!("it runs from the view \"{view}\"; verbs that fit: {verbs}"))
        }
        GroupPhase::FailedBack { .. } => (
            "failed back",
            "it runs at its source; verbs that fit: commit-failback, undo-failback, points, views".into(),
        ),
        GroupPhase::Settling { operation, .. } => ("failed back, and an operation is settling that", wait(operation)),
        GroupPhase::Deleting => ("being deleted", "nothing fits any more".to_owned()),
    };
    Problem::state(name, state, remedy)
}

/// Checks that a failover, or the undoing of a failback, fits the group's state, before anything is stored.
///
/// # Errors
/// What does not fit, and what does.
pub fn check(
    spec: &Spec,
    confirm_name: &str,
    group: &Group,
    disks: usize,
    source_connected: bool,
    target_connected: bool,
    lease_ms: u64,
) -> Result<(), Problem> {
    let name = group.name();
    match (&group.phase, spec.verb) {
        (GroupPhase::Protecting, verb) if verb != Verb::UndoFailback => {}
        (GroupPhase::FailedBack { .. }, Verb::UndoFailback) => {}
        _ => return Err(misfit(group)),
    }
    if disks == 0 {
        return Err(Problem::state(name, "without disks", "add a disk first"));
    }
    if spec.unconfirmed && confirm_name != group.id {
        return Err(Problem::invalid("confirm_name", confirm_name, format!("the group's id, typed: {:?}", group.id)));
    }
    if !target_connected {
        let detail = format!("the target of {name} is not connected; look at that proxy, then start again");
        return Err(Problem::Unreachable { proxy: group.target.clone(), detail });
    }
    if spec.verb == Verb::PlannedFailover && group.pause.is_some() {
        return Err(Problem::state(
            name,
            "paused: what its source holds would not arrive",
            "resume it first; or start a failover that is not planned, to a point that the target holds",
        ));
    }
    if spec.verb == Verb::PlannedFailover && !source_connected {
        return Err(Problem::state(
            name,
            format!("not to be handed over: its source \"{}\" cannot be reached", group.source),
            "bring that proxy back; or start a failover that is not planned",
        ));
    }
    // Without it, a source that keeps to a lease has stopped after a while.
    if !source_connected && !spec.unconfirmed && lease_ms == 0 {
        return Err(Problem::state(
            name,
            format!("not to be fenced: its source \"{}\" cannot be reached", group.source),
            "bring that proxy back; or, if its machine is known to be off, start the failover with `unconfirmed` and \
             the group's id in `confirm_name`",
        ));
    }
    Ok(())
}

/// Checks that a group can be paused, or resumed.
///
/// # Errors
/// It does not run at its source, or is being taken from it, or back: what does fit.
pub fn check_pause(group: &Group) -> Result<(), Problem> {
    match group.phase {
        GroupPhase::Protecting => Ok(()),
        _ => Err(misfit(group)),
    }
}

/// Checks that a point is fit to run from.
///
/// # Errors
/// It is damaged or holds not all disks.
pub fn check_point(point: &PointRecord, damage: &str, disks: &[(String, String)]) -> Result<(), String> {
    if !damage.is_empty() {
        return Err(format!("the point {} is damaged: {damage}", point.seq));
    }
    let missing: Vec<&str> =
        disks.iter().filter(|(uid, _)| !point.disks.contains(uid)).map(|(_, id)| id.as_str()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("the point {} does not hold {}: being synchronised there", point.seq, missing.join(", ")))
}

/// Checks that a verb for a group that is failed over fits its state, before anything is stored; gives the id of the view
/// that the group runs from. `in_use`: how many hosts the target says that view has.
///
/// # Errors
/// What does not fit, and what does.
pub fn check_failed_over(
    verb: Verb,
    group: &Group,
    target_connected: bool,
    in_use: u32,
    force: bool,
) -> Result<String, Problem> {
    let name = group.name();
    let GroupPhase::FailedOver { view } = &group.phase else { return Err(misfit(group)) };
    if verb == Verb::UndoFailover && group.overwritten {
        return Err(Problem::state(
            name,
            "not to be undone: its source's disks hold what a failback brought, and not what the source had",
            "verbs that fit: failback, change-point",
        ));
    }
    if !target_connected {
        let detail = format!(
            "{name} runs at its target, which is not connected: what is written there cannot be stopped; look at that \
             proxy, then start again"
        );
        return Err(Problem::Unreachable { proxy: group.target.clone(), detail });
    }
    if in_use > 0 && !force {
        let what = if verb == Verb::UndoFailover { "undone" } else { "changed" };
        return Err(Problem::state(
            name,
            format!("not to be {what}: {in_use} hosts have disks of its view \"{view}\" open"),
            "stop the machine that runs from them; or say `force`: they lose these disks in the middle of what they do",
        ));
    }
    Ok(view.clone())
}

/// How the two ends of a group are, as far as verbs about its reverse stream ask.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ends {
    /// The source is connected.
    pub source: bool,
    /// The target is connected.
    pub target: bool,
    /// The source can keep a stream.
    pub source_keeps: bool,
    /// What is still missing before the group can switch, or before its failback can be committed.
    pub missing: Option<String>,
}

/// Checks that a verb about the reverse stream fits the group's state, before anything is stored; gives the id of the view
/// that the group runs from, or ran from.
///
/// # Errors
/// What does not fit, and what does.
pub fn check_back(verb: Verb, group: &Group, ends: &Ends) -> Result<String, Problem> {
    let name = group.name();
    let view = match (&group.phase, verb) {
        (GroupPhase::FailedOver { view }, Verb::Failback) => view,
        (GroupPhase::FailingBack { view }, Verb::CancelFailback | Verb::SwitchFailback) => view,
        (GroupPhase::FailedBack { view, .. }, Verb::CommitFailback) => view,
        _ => return Err(misfit(group)),
    };
    let needed = [
        (&group.target, ends.target, true),
        (&group.source, ends.source, matches!(verb, Verb::Failback | Verb::SwitchFailback)),
    ];
    if let Some((proxy, ..)) = needed.into_iter().find(|(_, connected, needed)| *needed && !connected) {
        let detail = format!("{} of {name} needs it, and it is not connected; look at that proxy", verb.as_str());
        return Err(Problem::Unreachable { proxy: proxy.clone(), detail });
    }
    if verb == Verb::Failback && !ends.source_keeps {
        return Err(Problem::state(
            name,
            format!("not to be failed back: its source \"{}\" takes no stream", group.source),
            format!(
                "give \"{}\" `target.journal` and `target.listen` in its configuration, start it again",
                group.source
            ),
        ));
    }
    if verb == Verb::Failback && !group.leftovers.is_empty() {
        let at = |there: bool, proxy: &str| there.then(|| format!("\"{proxy}\""));
        let ends =
            group.leftovers.iter().flat_map(|l| [at(l.at_target, &group.target), at(l.at_source, &group.source)]);
        let proxies: std::collections::BTreeSet<String> = ends.flatten().collect();
        let proxies = proxies.into_iter().collect::<Vec<_>>().join(", ");
        let state = format!("still with what is left of an earlier failback, at {proxies}");
        return Err(Problem::state(name, state, "it goes by itself; see its conditions, then start again"));
    }
    if let Some(missing) = &ends.missing {
        let state = if verb == Verb::CommitFailback { "not protected again" } else { "not ready to switch" };
        let remedy = "wait for it (see `failback status`), then start again";
        return Err(Problem::state(name, format!("{state}: {missing}"), remedy));
    }
    Ok(view.clone())
}

/// The id for a new view of a failover: the first that no view of the group has, also none that is kept.
pub fn free_view(model: &Model, group: &Group) -> String {
    let free = |id: &String| model.view(&group.name(), id).is_err();
    let numbered = (2..).map(|number| format!("{FAILOVER_VIEW}-{number}"));
    std::iter::once(FAILOVER_VIEW.to_owned()).chain(numbered).find(free).unwrap_or_default()
}
