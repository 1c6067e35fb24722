//! What has to be so before a verb is begun.

use super::{FAILOVER_VIEW, Spec, Verb};
use crate::model::Model;
use crate::objects::{Group, GroupPhase, PointRecord};
use crate::problem::Problem;

/// Checks that a failover fits the group's state, before anything is stored.
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
    match &group.phase {
        GroupPhase::Protecting => {}
        GroupPhase::FailingOver { operation } => {
            let remedy = format!("wait for tenants/{}/operations/{operation}", group.tenant);
            return Err(Problem::state(name, "being failed over already", remedy));
        }
        GroupPhase::Changing { operation, .. } => return Err(being_changed(group, operation)),
        GroupPhase::FailedOver { view } => {
            let remedy =
                format!("it runs from the view \"{view}\"; verbs that fit: undo-failover, change-point, points, views");
            return Err(Problem::state(name, "failed over already", remedy));
        }
        GroupPhase::Deleting => return Err(Problem::state(name, "being deleted", "nothing fits any more")),
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

fn being_changed(group: &Group, operation: &str) -> Problem {
    let remedy = format!("wait for tenants/{}/operations/{operation}", group.tenant);
    Problem::state(group.name(), "failed over, and an operation is changing that", remedy)
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
    let view = match &group.phase {
        GroupPhase::FailedOver { view } => view.clone(),
        GroupPhase::Changing { operation, .. } => return Err(being_changed(group, operation)),
        GroupPhase::FailingOver { operation } => {
            let remedy = format!("wait for tenants/{}/operations/{operation}, or cancel it", group.tenant);
            return Err(Problem::state(name, "being failed over", remedy));
        }
        GroupPhase::Protecting => {
            return Err(Problem::state(name, "not failed over", "verbs that fit: failover, planned-failover"));
        }
        GroupPhase::Deleting => return Err(Problem::state(name, "being deleted", "nothing fits any more")),
    };
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
    Ok(view)
}

/// The id for a new view of a failover: the first that no view of the group has, also none that is kept.
pub fn free_view(model: &Model, group: &Group) -> String {
    let free = |id: &String| model.view(&group.name(), id).is_err();
    let numbered = (2..).map(|number| format!("{FAILOVER_VIEW}-{number}"));
    std::iter::once(FAILOVER_VIEW.to_owned()).chain(numbered).find(free).unwrap_or_default()
}
