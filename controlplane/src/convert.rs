//! Between the API's messages and the coordinator's own types.

use afterimage_wire::v1;

use crate::ca::Role;
use crate::failover::{self, Choice};
use crate::model::Model;
use crate::names::{Kind, Name, child};
use crate::objects::{
    Disk, ExportRecord, Group, GroupPhase, Object, Operation, Pause, PointRecord, Policy, View, ViewKind,
};
use crate::policy::{Compression, Wanted};
use crate::problem::Problem;

/// A role of the API; none if it is unspecified.
pub fn role_from_proto(role: v1::Role) -> Option<Role> {
    match role {
        v1::Role::Unspecified => None,
        v1::Role::Proxy => Some(Role::Proxy),
        v1::Role::Viewer => Some(Role::Viewer),
        v1::Role::Operator => Some(Role::Operator),
        v1::Role::Admin => Some(Role::Admin),
    }
}

/// A role for the API.
pub fn role_to_proto(role: Role) -> v1::Role {
    match role {
        Role::Proxy => v1::Role::Proxy,
        Role::Viewer => v1::Role::Viewer,
        Role::Operator => v1::Role::Operator,
        Role::Admin => v1::Role::Admin,
    }
}

/// A choice of the API.
///
/// # Errors
/// None, or a senseless one.
pub fn choice_from_proto(field: &str, choice: Option<&v1::PointChoice>) -> Result<Choice, Problem> {
    use v1::point_choice::At;
    let allowed = "exactly one of latest (true), cut, time_ns, seq";
    match choice.and_then(|c| c.at.as_ref()) {
        None => Err(Problem::invalid(field, "nothing", allowed)),
        Some(At::Latest(true)) => Ok(Choice::Latest),
        Some(At::Latest(false)) => Err(Problem::invalid(format!("{field}.latest"), "false", "true")),
        Some(At::Cut(number)) => Ok(Choice::Cut(*number)),
        Some(At::TimeNs(0)) => Err(Problem::invalid(format!("{field}.time_ns"), 0, "nanoseconds since the Unix epoch")),
        Some(At::TimeNs(time)) => Ok(Choice::Time(*time)),
        Some(At::Seq(0)) => Err(Problem::invalid(format!("{field}.seq"), 0, "1 or above")),
        Some(At::Seq(seq)) => Ok(Choice::Seq(*seq)),
    }
}

/// A choice for the API.
pub fn choice_to_proto(choice: Choice) -> v1::PointChoice {
    use v1::point_choice::At;
    let at = match choice {
        Choice::Latest => At::Latest(true),
        Choice::Cut(number) => At::Cut(number),
        Choice::Time(time) => At::TimeNs(time),
        Choice::Seq(seq) => At::Seq(seq),
    };
    v1::PointChoice { at: Some(at) }
}

/// What is kept of a point.
pub fn point_from_proto(point: &v1::Point) -> PointRecord {
    PointRecord {
        seq: point.seq,
        cut: point.cut,
        wall_ns: point.wall_ns,
        label: point.label.clone(),
        clock_synced: point.clock_synced,
        flush_clean: point.flush_clean,
        disks: point.disks.clone(),
        timeline: point.timeline.clone(),
    }
}

/// A point for the API.
pub fn point_to_proto(group: &Name, point: &PointRecord) -> v1::Point {
    v1::Point {
        name: child(group, "points", point.seq),
        seq: point.seq,
        cut: point.cut,
        wall_ns: point.wall_ns,
        clock_synced: point.clock_synced,
        flush_clean: point.flush_clean,
        label: point.label.clone(),
        disks: point.disks.clone(),
        damage: String::new(),
        timeline: point.timeline.clone(),
    }
}

/// A point as a proxy tells it, with its name.
pub fn named_point(group: &Name, point: v1::Point) -> v1::Point {
    v1::Point { name: child(group, "points", point.seq), ..point }
}

/// A summary as a proxy tells it, with names.
pub fn named_summary(group: &Name, summary: v1::PointSummary) -> v1::PointSummary {
    v1::PointSummary {
        oldest: summary.oldest.map(|p| named_point(group, p)),
        newest: summary.newest.map(|p| named_point(group, p)),
        ..summary
    }
}

/// What is kept of an export.
pub fn export_from_proto(export: &v1::ViewExport) -> ExportRecord {
    ExportRecord {
        disk: export.disk.clone(),
        disk_uid: export.disk_uid.clone(),
        name: export.export_name.clone(),
        uris: export.uris.clone(),
        size: export.size_bytes,
    }
}

fn export_to_proto(export: &ExportRecord) -> v1::ViewExport {
    v1::ViewExport {
        disk: export.disk.clone(),
        disk_uid: export.disk_uid.clone(),
        export_name: export.name.clone(),
        uris: export.uris.clone(),
        size_bytes: export.size,
    }
}

/// What a policy of the API asks for.
pub fn wanted(policy: &v1::Policy) -> Result<Wanted, Problem> {
    let compression = match v1::Compression::try_from(policy.compression) {
        Ok(v1::Compression::Unspecified | v1::Compression::Auto) => Compression::Auto,
        Ok(v1::Compression::Off) => Compression::Off,
        Err(_) => {
            return Err(Problem::invalid(
                "policy.compression",
                policy.compression,
                "COMPRESSION_AUTO, COMPRESSION_OFF",
            ));
        }
    };
    Ok(Wanted {
        rpo_target_us: policy.rpo_target_us,
        cut_interval_ms: policy.cut_interval_ms,
        retention_s: policy.retention_s,
        journal_budget_bytes: policy.journal_budget_bytes,
        compression,
        warn_after_ms: policy.warn_after_ms,
        error_after_ms: policy.error_after_ms,
        clear_after_ms: policy.clear_after_ms,
        lease_ms: policy.lease_ms,
        sync_deadline_ms: policy.sync_deadline_ms,
        bandwidth_bytes_per_s: policy.bandwidth_bytes_per_s,
        allowed_hours: policy.allowed_hours.clone(),
        time_zone: policy.time_zone.clone(),
        priority: policy.priority,
        excluded_disks: policy.excluded_disks.clone(),
        same_site: policy.same_site,
    })
}

/// Compression for the API.
pub fn compression_to_proto(compression: Compression) -> v1::Compression {
    match compression {
        Compression::Auto => v1::Compression::Auto,
        Compression::Off => v1::Compression::Off,
    }
}

/// A policy for the API.
pub fn policy_to_proto(model: &Model, policy: &Policy) -> v1::Policy {
    let promises = &policy.promises;
    v1::Policy {
        name: Name::new(&policy.tenant, Kind::Policy, &policy.id).to_string(),
        uid: policy.uid.clone(),
        etag: model.etag(&Object::Policy(policy.clone()).key()),
        version: policy.version,
        create_time_ns: policy.created_ns,
        update_time_ns: policy.updated_ns,
        description: policy.description.clone(),
        rpo_target_us: Some(promises.rpo_target_us),
        cut_interval_ms: Some(promises.cut_interval_ms),
        retention_s: Some(promises.retention_s),
        journal_budget_bytes: Some(promises.journal_budget_bytes),
        compression: compression_to_proto(promises.compression).into(),
        warn_after_ms: Some(promises.warn_after_ms),
        error_after_ms: Some(promises.error_after_ms),
        clear_after_ms: Some(promises.clear_after_ms),
        lease_ms: Some(promises.lease_ms),
        sync_deadline_ms: Some(promises.sync_deadline_ms),
        bandwidth_bytes_per_s: Some(promises.bandwidth_bytes_per_s),
        allowed_hours: promises.allowed_hours.clone(),
        time_zone: promises.time_zone.clone(),
        priority: Some(promises.priority),
        excluded_disks: promises.excluded_disks.clone(),
        same_site: Some(promises.same_site),
        warnings: promises.shortfalls(),
    }
}

/// A disk for the API.
pub fn disk_to_proto(model: &Model, group: &Group, disk: &Disk) -> v1::Disk {
    v1::Disk {
        name: child(&group.name(), "disks", &disk.id),
        uid: disk.uid.clone(),
        slot: disk.slot.into(),
        path: disk.path.clone(),
        serial: disk.serial.clone(),
        size_bytes: disk.size,
        block_bytes: disk.block,
        generation: group.generation,
        export_name: disk.export_name.clone(),
        create_time_ns: disk.created_ns,
        seed_path: disk.seed_path.clone(),
        etag: model.etag(&Object::Disk(disk.clone()).key()),
    }
}

/// A group's phase for the API.
pub fn phase_to_proto(group: &Group) -> v1::Phase {
    match &group.phase {
        GroupPhase::Protecting | GroupPhase::Deleting if group.complete => v1::Phase::Protected,
        GroupPhase::Protecting | GroupPhase::Deleting => v1::Phase::Syncing,
        GroupPhase::FailingOver { .. } => v1::Phase::FailingOver,
        GroupPhase::Changing { .. } if group.reverse.is_some() => v1::Phase::FailingBack,
        GroupPhase::FailedOver { .. } | GroupPhase::Changing { .. } => v1::Phase::FailedOver,
        GroupPhase::FailingBack { .. } => v1::Phase::FailingBack,
        GroupPhase::FailedBack { .. } | GroupPhase::Settling { .. } => v1::Phase::FailedBack,
    }
}

/// A group for the API.
pub fn group_to_proto(model: &Model, group: &Group) -> v1::Group {
    let name = group.name();
    v1::Group {
        name: name.to_string(),
        uid: group.uid.clone(),
        etag: model.etag(&Object::Group(group.clone()).key()),
        version: group.version,
        create_time_ns: group.created_ns,
        update_time_ns: group.updated_ns,
        description: group.description.clone(),
        policy: Name::new(&group.tenant, Kind::Policy, &group.policy).to_string(),
        source: Name::new(&group.tenant, Kind::Proxy, &group.source).to_string(),
        target: Name::new(&group.tenant, Kind::Proxy, &group.target).to_string(),
        disks: model.disks_of(group).map(|d| disk_to_proto(model, group, d)).collect(),
        phase: phase_to_proto(group).into(),
        operation: model.active_operation(group).map(|o| o.name().to_string()).unwrap_or_default(),
        failover_view: match group.phase.view().filter(|_| group.phase.is_failed_over()) {
            Some(view) => child(&name, "views", view),
            None => String::new(),
        },
        placement: group.placement.clone(),
        pause: group.pause.as_ref().map(|pause| pause_to_proto(pause, false)),
    }
}

/// That a group is paused, for the API; whether its source says that it sends nothing.
pub fn pause_to_proto(pause: &Pause, confirmed: bool) -> v1::Pause {
    v1::Pause { time_ns: pause.at_ns, by: pause.by.clone(), reason: pause.reason.clone(), confirmed }
}

/// What a view is for, for the API.
pub fn view_kind_to_proto(kind: ViewKind) -> v1::ViewKind {
    match kind {
        ViewKind::Browse => v1::ViewKind::Browse,
        ViewKind::Test => v1::ViewKind::Test,
        ViewKind::Failover => v1::ViewKind::Failover,
    }
}

/// A view for the API.
pub fn view_to_proto(model: &Model, view: &View) -> v1::View {
    let group = view.group_name();
    let disks = match model.group(&group) {
        Ok(group) => model.disks_of(group).filter(|d| view.disk_uids.contains(&d.uid)).map(|d| d.id.clone()).collect(),
        Err(_) => Vec::new(),
    };
    v1::View {
        name: view.name(),
        uid: view.uid.clone(),
        version: view.version,
        create_time_ns: view.created_ns,
        kind: view_kind_to_proto(view.kind).into(),
        writable: view.writable,
        point: Some(point_to_proto(&group, &view.point)),
        disks,
        exports: view.exports.iter().map(export_to_proto).collect(),
        reason: view.reason.clone(),
        open: view.open,
        etag: model.etag(&Object::View(view.clone()).key()),
        kept: view.kept,
    }
}

/// How far a step is, for the API.
pub fn step_state_to_proto(state: failover::StepState) -> v1::StepState {
    match state {
        failover::StepState::Pending => v1::StepState::Pending,
        failover::StepState::Running => v1::StepState::Running,
        failover::StepState::Done => v1::StepState::Done,
        failover::StepState::Failed => v1::StepState::Failed,
        failover::StepState::Skipped => v1::StepState::Skipped,
    }
}

/// An operation for the API.
pub fn operation_to_proto(model: &Model, operation: &Operation) -> v1::Operation {
    let work = &operation.work;
    let group = Name::new(&operation.tenant, Kind::Group, &operation.group);
    let step = |s: &failover::StepRecord| v1::Step {
        name: s.name.as_str().to_owned(),
        state: step_state_to_proto(s.state).into(),
        detail: s.detail.clone(),
        start_time_ns: s.started_ns,
        end_time_ns: s.ended_ns,
    };
    let left = model.view(&group, &work.facts.leaves).ok();
    let result = (work.state == failover::State::Done).then(|| v1::FailoverResult {
        point: work.facts.point.as_ref().filter(|_| !work.spec.verb.is_back()).map(|p| point_to_proto(&group, p)),
        view: model.view(&group, &work.facts.view).ok().map(|v| view_to_proto(model, v)),
        fence: match work.facts.fence {
            Some(failover::FenceKind::Confirmed) => v1::FenceKind::Confirmed,
            Some(failover::FenceKind::Unconfirmed) => v1::FenceKind::Unconfirmed,
            Some(failover::FenceKind::SelfFenced) => v1::FenceKind::SelfFenced,
            None => v1::FenceKind::Unspecified,
        }
        .into(),
        generation: work.facts.generation,
        rpo_at_start_us: work.facts.rpo_at_start_us,
        zero_loss: work.facts.zero_loss,
        branch: left.filter(|v| v.kept).map(|v| view_to_proto(model, v)),
    });
    v1::Operation {
        name: operation.name().to_string(),
        uid: operation.uid.clone(),
        version: operation.version,
        verb: work.spec.verb.as_str().to_owned(),
        subject: group.to_string(),
        request_id: operation.request_id.clone(),
        actor: operation.actor.clone(),
        state: match work.state {
            failover::State::Running => v1::OperationState::Running,
            failover::State::Undoing => v1::OperationState::Undoing,
            failover::State::Done => v1::OperationState::Done,
            failover::State::Failed => v1::OperationState::Failed,
        }
        .into(),
        steps: work.steps.iter().map(step).collect(),
        create_time_ns: operation.created_ns,
        end_time_ns: operation.ended_ns,
        error: work.error.as_ref().map(|e| v1::OperationError {
            step: e.step.as_str().to_owned(),
            message: e.message.clone(),
            remedy: e.remedy.clone(),
        }),
        failover: result,
        validate_only: false,
        etag: model.etag(&Object::Operation(operation.clone()).key()),
        done: operation.ended_ns != 0,
        progress_percent: work.progress_percent(),
        cancel_requested: !work.cancelled_by.is_empty(),
        plan_run: None,
    }
}
