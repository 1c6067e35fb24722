//! What was decided at a target while no coordinator was there to be asked, taken in as it is: a pure function.
//!
//! The view is open there and may have been written to, so nothing of it is taken back. An operation that was being done on
//! the group when its coordinator went is over: its steps would fence, or let go, for a failover that is not the one that was
//! done. The source is told to hold all I/O as soon as it is there.

use afterimage_wire::v1;

use crate::convert;
use crate::failover::{Choice, Failover, Failure, FenceKind, Spec, State, StepName, StepState, Verb};
use crate::machine::Machine;
use crate::model::{Model, Txn};
use crate::names::{Kind, Name};
use crate::objects::{
    Group, GroupPhase, Object, Operation, PointRecord, Proxy, View, ViewKind, new_uid, proxy_view_name,
};

/// Takes a decision in. What to tell of it, and of which group; nothing if it is known. `observing`: the store was restored
/// from a backup, and asks its proxies for all the rest.
///
/// # Errors
/// It cannot be taken in, and is left as it is: for a person.
pub fn adopt(
    model: &Model,
    target: &Proxy,
    decided: &v1::LocalFailover,
    now_ns: u64,
    observing: bool,
    txn: &mut Txn,
) -> Result<Option<(String, String)>, String> {
    let own = |g: &&Group| g.tenant == target.tenant && g.target == target.id;
    let Some(group) = model.group_by_uid(&decided.stream_uid).filter(own) else {
        // A store that observes learns of groups that came after its backup.
        let what = format!("\"{}\" has failed over stream {}, which nobody knows", target.id, decided.stream_uid);
        return if observing { Ok(None) } else { Err(what) };
    };
    let known = Name::new(&group.tenant, Kind::Operation, &decided.uid);
    if model.operation(&known).is_ok() {
        return Ok(None);
    }
    let id = decided.view.rsplit('.').next().unwrap_or_default();
    let fits = uuid::Uuid::parse_str(&decided.uid).is_ok()
        && crate::names::check_id("view", id).is_ok()
        && proxy_view_name(&group.tenant, &group.id, id) == decided.view;
    let Some(point) = decided.point.as_ref().filter(|_| fits) else {
        return Err(format!(
            "\"{}\" has failed over {}, and what it says of that makes no sense",
            target.id,
            group.name()
        ));
    };
    let disks: Vec<_> = model.disks_of(group).collect();
    let held = point.disks.iter().filter(|uid| disks.iter().any(|d| d.uid == **uid)).cloned().collect();
    let point = PointRecord { disks: held, ..convert::point_from_proto(point) };
    let short = |text: &str, most: usize| text.chars().filter(|c| !c.is_control()).take(most).collect::<String>();
    let (reason, by) = (short(&decided.reason, 200), short(&decided.decided_by, 100));
    let machine = |m: &&Machine| decided.machines.contains(&m.name().to_string()) && m.runs_from != id;
    for machine in model.machines_of(group).filter(machine) {
        txn.put(Object::Machine(Machine { version: machine.version + 1, runs_from: id.to_owned(), ..machine.clone() }));
    }
    if observing {
        // The view is in the state that the target is asked for: see `restore`.
        return Ok(None);
    }
    let overtaken = match &group.phase {
        GroupPhase::Protecting | GroupPhase::FailedBack { .. } => None,
        GroupPhase::FailingOver { operation } | GroupPhase::Settling { operation, .. } => Some(operation),
        GroupPhase::FailedOver { view } if view == id => None,
        _ => {
            return Err(format!(
                "\"{}\" has failed {} over to its view \"{}\", and the group is in another state here: close one of its views",
                target.id,
                group.name(),
                id
            ));
        }
    };
    if let Some(operation) = overtaken {
        end(model, group, operation, now_ns, txn);
    }
    if model.view(&group.name(), id).is_err() {
        txn.put(Object::View(View {
            uid: new_uid(),
            tenant: group.tenant.clone(),
            group: group.id.clone(),
            id: id.to_owned(),
            version: 1,
            created_ns: decided.decide_time_ns,
            kind: ViewKind::Failover,
            writable: true,
            point: point.clone(),
            disk_uids: point.disks.clone(),
            // As the target reports them.
            exports: Vec::new(),
            reason: reason.clone(),
            open: true,
            closing: false,
            kept: false,
            request_id: String::new(),
        }));
    }
    let spec = Spec { unconfirmed: true, reason, ..Spec::new(Verb::Failover, Choice::Seq(point.seq)) };
    let checked = format!("decided by {by} at \"{}\", without a coordinator", target.id);
    let mut work = Failover::new(spec, &disks, (id, ""), 0, 0, checked, decided.decide_time_ns);
    for step in &mut work.steps {
        (step.state, step.started_ns, step.ended_ns) =
            (StepState::Done, decided.decide_time_ns, decided.decide_time_ns);
        match step.name {
            StepName::Fence => step.detail = "unconfirmed, as was said there by name".to_owned(),
            StepName::Drain => step.state = StepState::Skipped,
            StepName::RaiseGeneration => step.detail = format!("the disks are at generation {}", decided.generation),
            StepName::ResolvePoint => step.detail = format!("record {}", point.seq),
            _ => {}
        }
    }
    work.state = State::Done;
    work.facts.fence = Some(FenceKind::Unconfirmed);
    work.facts.zero_loss = decided.zero_loss;
    work.facts.generation = decided.generation;
    work.facts.point = Some(point);
    txn.put(Object::Operation(Operation {
        uid: decided.uid.clone(),
        tenant: group.tenant.clone(),
        version: 1,
        group: group.id.clone(),
        request_id: String::new(),
        actor: format!("proxy/{}", target.id),
        created_ns: decided.decide_time_ns,
        ended_ns: now_ns,
        work: Box::new(work),
    }));
    txn.put(Object::Group(Group {
        version: group.version + 1,
        updated_ns: now_ns,
        // Above whatever a source may have been given that the target did not hear of.
        generation: group.generation.max(decided.generation).max(group.writer_generation + 1),
        hold: true,
        pause: None,
        phase: GroupPhase::FailedOver { view: id.to_owned() },
        ..group.clone()
    }));
    let message = format!(
        "was failed over at \"{}\" by {by} while no coordinator was there, and is taken over as it is: it runs from its view \
         \"{id}\"; its source is told to hold all I/O",
        target.id
    );
    Ok(Some((group.name().to_string(), message)))
}

/// What was being done on the group is over, without being undone; its view, which the target has not opened, goes.
fn end(model: &Model, group: &Group, operation: &str, now_ns: u64, txn: &mut Txn) {
    let Ok(operation) = model.operation(&Name::new(&group.tenant, Kind::Operation, operation)) else { return };
    let mut ended = operation.clone();
    let running = ended.work.steps.iter_mut().find(|s| matches!(s.state, StepState::Running | StepState::Pending));
    let step = running.map_or(StepName::Check, |step| {
        step.state = StepState::Failed;
        step.name
    });
    ended.work.error = Some(Failure {
        step,
        message: "the group was failed over at its target meanwhile, without a coordinator".to_owned(),
        remedy: "see where it runs now (`status`), and go on from there".to_owned(),
    });
    ended.work.state = State::Failed;
    ended.ended_ns = now_ns;
    ended.version += 1;
    if !ended.work.facts.reopens
        && let Ok(view) = model.view(&group.name(), &ended.work.facts.view)
    {
        txn.delete(Object::View(view.clone()));
    }
    txn.put(Object::Operation(ended));
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
