//! The JSON that `--json` prints: one function for each object of the API. The shapes are an interface: a field may be
//! added, none is renamed or dropped within a major version. `docs/cli.md` lists them.
//!
//! Names are ids without their parents (`"shop"`), times RFC 3339 in UTC or null, durations `*_ms` or `*_s`, sizes
//! `*_bytes`, enumerations lower-case words; what is not known is null, never 0.

use afterimage_wire::v1;
use serde_json::{Value, json};

use super::values::{json_time, millis};

mod machines;
mod plans;

pub use machines::{driver_word, machine, power_word, probe, ready_word};
pub use plans::{plan, plan_estimate, plan_run};

/// The last part of a resource name: `tenants/default/groups/shop` → `shop`.
pub fn id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The group in the name of something that belongs to one: `tenants/default/groups/shop/views/check` → `shop`.
pub fn group_of(name: &str) -> &str {
    let mut parts = name.split('/');
    parts.find(|part| *part == "groups").and_then(|_| parts.next()).unwrap_or("")
}

fn null_if_empty(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { id(text).into() }
}

/// Word for a phase.
pub fn phase_word(phase: v1::Phase) -> &'static str {
    match phase {
        v1::Phase::Unspecified => "unknown",
        v1::Phase::Syncing => "syncing",
        v1::Phase::Protected => "protected",
        v1::Phase::FailingOver => "failing-over",
        v1::Phase::FailedOver => "failed-over",
        v1::Phase::FailingBack => "failing-back",
        v1::Phase::FailedBack => "failed-back",
    }
}

/// Word for a rung of the outage ladder.
pub fn rung_word(rung: v1::Rung) -> &'static str {
    match rung {
        v1::Rung::Unspecified => "unknown",
        v1::Rung::Streaming => "streaming",
        v1::Rung::Queueing => "queueing",
        v1::Rung::Spilling => "spilling",
        v1::Rung::Dirty => "dirty",
    }
}

/// Word for a severity.
pub fn severity_word(severity: v1::Severity) -> &'static str {
    match severity {
        v1::Severity::Unspecified => "unknown",
        v1::Severity::Info => "info",
        v1::Severity::Warning => "warning",
        v1::Severity::Error => "error",
    }
}

/// Word for the state of an operation.
pub fn operation_word(state: v1::OperationState) -> &'static str {
    match state {
        v1::OperationState::Unspecified => "unknown",
        v1::OperationState::Running => "running",
        v1::OperationState::Undoing => "undoing",
        v1::OperationState::Done => "done",
        v1::OperationState::Failed => "failed",
        v1::OperationState::Stopped => "stopped",
    }
}

/// Word for the state of a step.
pub fn step_word(state: v1::StepState) -> &'static str {
    match state {
        v1::StepState::Unspecified => "unknown",
        v1::StepState::Pending => "pending",
        v1::StepState::Running => "running",
        v1::StepState::Done => "done",
        v1::StepState::Failed => "failed",
        v1::StepState::Skipped => "skipped",
    }
}

/// What a source's disks hold that the target may not.
pub fn branch(branch: &v1::Branch) -> Value {
    let disk = |disk: &v1::BranchDisk| {
        json!({
            "disk": disk.name,
            "uid": disk.disk_uid,
            "generation": disk.generation,
            "fenced": disk.fenced,
            "whole": disk.whole,
            "size_bytes": disk.size_bytes,
            "ranges": disk.ranges.iter().map(|range| json!([range.offset, range.length])).collect::<Vec<_>>(),
            "file": disk.file,
        })
    };
    json!({"disks": branch.disks.iter().map(disk).collect::<Vec<_>>()})
}

/// Word for a way in which the source was kept from writing on.
pub fn fence_word(fence: v1::FenceKind) -> &'static str {
    match fence {
        v1::FenceKind::Unspecified => "unknown",
        v1::FenceKind::Confirmed => "confirmed",
        v1::FenceKind::Unconfirmed => "unconfirmed",
        v1::FenceKind::SelfFenced => "self-fenced",
    }
}

/// Word for a kind of view.
pub fn view_word(kind: v1::ViewKind) -> &'static str {
    match kind {
        v1::ViewKind::Unspecified => "unknown",
        v1::ViewKind::Browse => "browse",
        v1::ViewKind::Test => "test",
        v1::ViewKind::Failover => "failover",
    }
}

/// Word for a choice of compression.
pub fn compression_word(compression: v1::Compression) -> &'static str {
    match compression {
        v1::Compression::Unspecified | v1::Compression::Auto => "auto",
        v1::Compression::Off => "off",
    }
}

/// A policy.
pub fn policy(policy: &v1::Policy) -> Value {
    json!({
        "policy": id(&policy.name),
        "uid": policy.uid,
        "version": policy.version,
        "description": policy.description,
        "rpo_target_ms": policy.rpo_target_us.map(|us| millis(us.saturating_mul(1000))),
        "cut_interval_ms": policy.cut_interval_ms,
        "retention_s": policy.retention_s,
        "journal_budget_bytes": policy.journal_budget_bytes,
        "compression": compression_word(policy.compression()),
        "warn_after_ms": policy.warn_after_ms,
        "error_after_ms": policy.error_after_ms,
        "clear_after_ms": policy.clear_after_ms,
        "lease_ms": policy.lease_ms,
        "sync_deadline_ms": policy.sync_deadline_ms,
        "bandwidth_bytes_per_s": policy.bandwidth_bytes_per_s,
        "allowed_hours": policy.allowed_hours,
        "time_zone": policy.time_zone,
        "priority": policy.priority,
        "excluded_disks": policy.excluded_disks,
        "same_site": policy.same_site,
        "warnings": policy.warnings,
        "created": json_time(policy.create_time_ns),
        "updated": json_time(policy.update_time_ns),
    })
}

/// A group with its disks.
pub fn group(group: &v1::Group) -> Value {
    json!({
        "group": id(&group.name),
        "uid": group.uid,
        "version": group.version,
        "description": group.description,
        "phase": phase_word(group.phase()),
        "policy": id(&group.policy),
        "source": id(&group.source),
        "target": id(&group.target),
        "operation": null_if_empty(&group.operation),
        "failover_view": null_if_empty(&group.failover_view),
        "placement": null_if_empty_text(&group.placement),
        "pause": group.pause.as_ref().map(pause),
        "disks": group.disks.iter().map(disk).collect::<Vec<_>>(),
        "created": json_time(group.create_time_ns),
        "updated": json_time(group.update_time_ns),
    })
}

/// That a group is paused; null if it is not.
fn pause(pause: &v1::Pause) -> Value {
    json!({
        "since": json_time(pause.time_ns),
        "by": pause.by,
        "reason": null_if_empty_text(&pause.reason),
        "confirmed": pause.confirmed,
    })
}

/// A disk.
pub fn disk(disk: &v1::Disk) -> Value {
    json!({
        "group": group_of(&disk.name),
        "disk": id(&disk.name),
        "uid": disk.uid,
        "slot": disk.slot,
        "path": disk.path,
        "serial": disk.serial,
        "size_bytes": disk.size_bytes,
        "block_bytes": disk.block_bytes,
        "generation": disk.generation,
        "export": disk.export_name,
        "created": json_time(disk.create_time_ns),
    })
}

/// A proxy.
pub fn proxy(proxy: &v1::Proxy) -> Value {
    json!({
        "proxy": id(&proxy.name),
        "uid": proxy.uid,
        "connected": proxy.connected,
        "last_heard_age_ms": proxy.last_heard_age_ms,
        "data_address": null_if_empty_text(&proxy.data_address),
        "nbd_addresses": proxy.nbd_addresses,
        "capabilities": proxy.capabilities,
        "boot_id": proxy.boot_id,
        "software_version": proxy.software_version,
        "key_pin": proxy.key_pin,
        "site": null_if_empty_text(&proxy.site),
        "room": proxy.room.map(room),
        "certificate_expires": json_time(proxy.certificate_expire_time_ns),
        "observed_version": proxy.observed_version,
        "desired_version": proxy.desired_version,
        "conditions": proxy.conditions.iter().map(condition).collect::<Vec<_>>(),
        "joined": json_time(proxy.create_time_ns),
    })
}

fn room(room: v1::TargetRoom) -> Value {
    json!({
        "total_bytes": room.total_bytes,
        "free_bytes": room.free_bytes,
        "reserve_bytes": room.reserve_bytes,
        "default_budget_bytes": room.default_budget_bytes,
    })
}

/// Where a group goes.
pub fn placement(placement: &v1::Placement) -> Value {
    json!({
        "target": null_if_empty(&placement.target),
        "reason": placement.reason,
        "candidates": placement.candidates.iter().map(|candidate| json!({
            "proxy": id(&candidate.proxy),
            "fits": candidate.fits,
            "reason": candidate.reason,
            "site": null_if_empty_text(&candidate.site),
            "room": candidate.room.map(room),
            "promised_bytes": candidate.promised_bytes,
            "needed_bytes": candidate.needed_bytes,
            "groups": candidate.groups,
            "wire_bytes_per_s": candidate.wire_bytes_per_s,
        })).collect::<Vec<_>>(),
    })
}

fn null_if_empty_text(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { text.into() }
}

/// A restore point.
pub fn point(point: &v1::Point) -> Value {
    json!({
        "group": group_of(&point.name),
        "seq": point.seq,
        "cut": point.cut,
        "time": json_time(point.wall_ns),
        "clock_synced": point.clock_synced,
        "flush_clean": point.flush_clean,
        "label": null_if_empty_text(&point.label),
        "disk_uids": point.disks,
        "damage": null_if_empty_text(&point.damage),
        "timeline": point.timeline,
    })
}

/// What a group can be brought back to.
pub fn points(summary: &v1::PointSummary) -> Value {
    json!({
        "count": summary.count,
        "cuts": summary.cuts,
        "oldest": summary.oldest.as_ref().map(point),
        "newest": summary.newest.as_ref().map(point),
    })
}

/// A disk of a view, and where it is.
pub fn view_export(export: &v1::ViewExport) -> Value {
    json!({
        "disk": export.disk,
        "disk_uid": export.disk_uid,
        "export": export.export_name,
        "uris": export.uris,
        "size_bytes": export.size_bytes,
    })
}

/// A view.
pub fn view(view: &v1::View) -> Value {
    json!({
        "group": group_of(&view.name),
        "view": id(&view.name),
        "uid": view.uid,
        "kind": view_word(view.kind()),
        "writable": view.writable,
        "open": view.open,
        "kept": view.kept,
        "point": view.point.as_ref().map(point),
        "disks": view.disks,
        "exports": view.exports.iter().map(view_export).collect::<Vec<_>>(),
        "reason": null_if_empty_text(&view.reason),
        "created": json_time(view.create_time_ns),
    })
}

/// An operation with its steps and, for a failover that is done, its result.
pub fn operation(operation: &v1::Operation) -> Value {
    json!({
        "operation": id(&operation.name),
        "verb": operation.verb,
        "group": group_of(&operation.subject),
        "state": operation_word(operation.state()),
        "dry_run": operation.validate_only,
        "actor": operation.actor,
        "request_id": operation.request_id,
        "started": json_time(operation.create_time_ns),
        "ended": json_time(operation.end_time_ns),
        "steps": operation.steps.iter().map(|step| json!({
            "step": step.name,
            "state": step_word(step.state()),
            "detail": step.detail,
            "started": json_time(step.start_time_ns),
            "ended": json_time(step.end_time_ns),
        })).collect::<Vec<_>>(),
        "error": operation.error.as_ref().map(|error| json!({
            "step": error.step,
            "message": error.message,
            "remedy": error.remedy,
        })),
        "result": operation.failover.as_ref().map(|result| json!({
            "point": result.point.as_ref().map(point),
            "view": result.view.as_ref().map(view),
            "fence": fence_word(result.fence()),
            "generation": result.generation,
            "rpo_at_start_ms": millis(result.rpo_at_start_us.saturating_mul(1000)),
            "zero_loss": result.zero_loss,
            "branch": result.branch.as_ref().map(view),
        })),
    })
}

/// A condition.
pub fn condition(condition: &v1::Condition) -> Value {
    json!({
        "kind": condition.kind,
        "severity": severity_word(condition.severity()),
        "message": condition.message,
        "since": json_time(condition.since_ns),
    })
}

/// An event.
pub fn event(event: &v1::Event) -> Value {
    json!({
        "number": event.number,
        "time": json_time(event.time_ns),
        "severity": severity_word(event.severity()),
        "kind": event.kind,
        "subject": event.subject,
        "message": event.message,
    })
}

fn sync(sync: Option<&v1::SyncProgress>) -> Value {
    sync.map_or(Value::Null, |sync| {
        json!({
            "done_bytes": sync.done_bytes,
            "total_bytes": sync.total_bytes,
            "compared_bytes": sync.compared_bytes,
            "sent_bytes": sync.sent_bytes,
            "left_ms": sync.left_ms,
        })
    })
}

fn rpo(rpo: &v1::Rpo) -> Value {
    let ms = |us: Option<u64>| us.map(|us| millis(us.saturating_mul(1000)));
    json!({
        "now_ms": ms(rpo.now_us),
        "p50_ms": ms(rpo.p50_us),
        "p99_ms": ms(rpo.p99_us),
        "max_ms": ms(rpo.max_us),
        "target_ms": millis(rpo.target_us.saturating_mul(1000)),
        "report_age_ms": ms(rpo.report_age_us),
        "within_target": rpo.within_target,
        "window_s": rpo.window_s,
    })
}

fn reverse(reverse: &v1::ReverseStatus) -> Value {
    json!({
        "stream_uid": reverse.stream_uid,
        "ready": reverse.ready,
        "missing": null_if_empty_text(&reverse.missing),
        "rpo": reverse.rpo.as_ref().map(rpo),
        "sync": sync(reverse.sync.as_ref()),
        "captured_seq": reverse.captured_seq,
        "durable_seq": reverse.durable_seq,
        "wire_bytes": reverse.wire_bytes,
        "points": reverse.points.as_ref().map(points),
        "journal_bytes": reverse.journal_bytes,
    })
}

/// How far a group's failback is.
pub fn failback(status: &v1::GroupStatus) -> Value {
    json!({
        "group": id(&status.name),
        "phase": phase_word(status.phase()),
        "reverse": status.reverse.as_ref().map(reverse),
        "operation": status.operation.as_ref().map(operation),
        "conditions": status.conditions.iter().map(condition).collect::<Vec<_>>(),
    })
}

/// How a group stands.
pub fn group_status(status: &v1::GroupStatus) -> Value {
    json!({
        "group": id(&status.name),
        "uid": status.uid,
        "phase": phase_word(status.phase()),
        "rung": rung_word(status.rung()),
        "conditions": status.conditions.iter().map(condition).collect::<Vec<_>>(),
        "operation": status.operation.as_ref().map(operation),
        "rpo": status.rpo.as_ref().map(rpo),
        "writes_per_s": status.writes_per_s,
        "captured_bytes_per_s": status.captured_bytes_per_s,
        "wire_bytes_per_s": status.wire_bytes_per_s,
        "writes": status.writes,
        "captured_bytes": status.captured_bytes,
        "wire_bytes": status.wire_bytes,
        "queue_bytes": status.queue_bytes,
        "queue_limit_bytes": status.queue_limit_bytes,
        "spill_bytes": status.spill_bytes,
        "spill_limit_bytes": status.spill_limit_bytes,
        "catch_up_ms": status.catch_up_ms,
        "lease_ms": status.lease_ms,
        "pause": status.pause.as_ref().map(pause),
        "synchronous": null_if_empty_text(&status.synchronous),
        "zero_loss": status.zero_loss,
        "captured_seq": status.captured_seq,
        "sent_seq": status.sent_seq,
        "durable_seq": status.durable_seq,
        "sync": sync(status.sync.as_ref()),
        "points": status.points.as_ref().map(points),
        "journal_bytes": status.journal_bytes,
        "journal_budget_bytes": status.journal_budget_bytes,
        "segments": status.segments,
        "scrub": status.scrub.as_ref().map(|scrub| json!({
            "running": scrub.running,
            "done_bytes": scrub.done_bytes,
            "total_bytes": scrub.total_bytes,
            "ended_ms": scrub.ended_ms,
            "bad_frames": scrub.bad_frames,
        })),
        "disks": status.disks.iter().map(|disk| json!({
            "disk": id(&disk.name),
            "uid": disk.uid,
            "state": null_if_empty_text(&disk.state),
            "sync": sync(disk.sync.as_ref()),
            "uris": disk.uris,
            "clients": disk.clients,
            "generation": disk.generation,
            "size_bytes": disk.size_bytes,
        })).collect::<Vec<_>>(),
        "views": status.views.iter().map(view).collect::<Vec<_>>(),
        "reverse": status.reverse.as_ref().map(reverse),
        "source": id(&status.source),
        "target": id(&status.target),
        "policy": id(&status.policy),
    })
}

/// How everything stands.
pub fn status(snapshot: &v1::StatusSnapshot) -> Value {
    json!({
        "time": json_time(snapshot.time_ns),
        "coordinator": snapshot.coordinator.as_ref().map(|c| json!({
            "software_version": c.software_version,
            "term": c.term,
            "uptime_ms": c.uptime_ms,
            "revision": c.revision,
        })),
        "groups": snapshot.groups.iter().map(group_status).collect::<Vec<_>>(),
        "proxies": snapshot.proxies.iter().map(proxy).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(value: &Value) -> Vec<&str> {
        value.as_object().expect("an object").keys().map(String::as_str).collect()
    }

    #[test]
    fn ids_are_cut_out_of_names() {
        assert_eq!(id("tenants/default/groups/shop"), "shop");
        assert_eq!(id("shop"), "shop");
        assert_eq!(group_of("tenants/default/groups/shop/views/check"), "shop");
        assert_eq!(group_of("tenants/default/proxies/src"), "");
    }

    #[test]
    fn the_shape_of_a_status_is_stable() {
        let status = group_status(&v1::GroupStatus {
            name: "tenants/default/groups/shop".into(),
            phase: v1::Phase::Protected.into(),
            rung: v1::Rung::Streaming.into(),
            rpo: Some(v1::Rpo { now_us: Some(4_213), target_us: 1_000_000, ..Default::default() }),
            ..Default::default()
        });
        assert_eq!(
            keys(&status),
            [
                "captured_bytes",
                "captured_bytes_per_s",
                "captured_seq",
                "catch_up_ms",
                "conditions",
                "disks",
                "durable_seq",
                "group",
                "journal_budget_bytes",
                "journal_bytes",
                "lease_ms",
                "operation",
                "pause",
                "phase",
                "points",
                "policy",
                "queue_bytes",
                "queue_limit_bytes",
                "reverse",
                "rpo",
                "rung",
                "scrub",
                "segments",
                "sent_seq",
                "source",
                "spill_bytes",
                "spill_limit_bytes",
                "sync",
                "synchronous",
                "target",
                "uid",
                "views",
                "wire_bytes",
                "wire_bytes_per_s",
                "writes",
                "writes_per_s",
                "zero_loss",
            ]
        );
        assert_eq!(status["phase"], "protected");
        assert_eq!(status["rpo"]["now_ms"], 4.213);
        assert_eq!(status["rpo"]["p99_ms"], Value::Null, "what is not known is null, not 0");
        let pause = v1::Pause { by: "operator/anna".into(), ..Default::default() };
        let paused = group_status(&v1::GroupStatus { pause: Some(pause), ..Default::default() });
        assert_eq!(
            (&status["pause"], keys(&paused["pause"])),
            (&Value::Null, vec!["by", "confirmed", "reason", "since"])
        );
    }

    #[test]
    fn the_shape_of_a_failback_is_stable() {
        let status = v1::GroupStatus {
            name: "tenants/default/groups/shop".into(),
            phase: v1::Phase::FailingBack.into(),
            reverse: Some(v1::ReverseStatus { ready: true, ..Default::default() }),
            ..Default::default()
        };
        let document = failback(&status);
        assert_eq!(keys(&document), ["conditions", "group", "operation", "phase", "reverse"]);
        assert_eq!(document["phase"], "failing-back");
        assert_eq!(
            keys(&document["reverse"]),
            [
                "captured_seq",
                "durable_seq",
                "journal_bytes",
                "missing",
                "points",
                "ready",
                "rpo",
                "stream_uid",
                "sync",
                "wire_bytes"
            ]
        );
        assert_eq!(
            (&document["reverse"]["missing"], &group_status(&status)["reverse"]["ready"]),
            (&Value::Null, &true.into())
        );
    }

    #[test]
    fn the_shape_of_an_operation_is_stable() {
        let document = operation(&v1::Operation {
            name: "tenants/default/operations/0f".into(),
            subject: "tenants/default/groups/shop".into(),
            verb: "failover".into(),
            state: v1::OperationState::Failed.into(),
            steps: vec![v1::Step { name: "check".into(), state: v1::StepState::Failed.into(), ..Default::default() }],
            error: Some(v1::OperationError { step: "check".into(), message: "m".into(), remedy: "r".into() }),
            ..Default::default()
        });
        assert_eq!(
            keys(&document),
            [
                "actor",
                "dry_run",
                "ended",
                "error",
                "group",
                "operation",
                "request_id",
                "result",
                "started",
                "state",
                "steps",
                "verb"
            ]
        );
        assert_eq!(document["error"]["remedy"], "r");
        assert_eq!(document["steps"][0]["state"], "failed");
        assert_eq!(document["ended"], Value::Null);
    }

    #[test]
    fn the_shapes_of_stored_objects_are_stable() {
        assert_eq!(
            keys(&policy(&v1::Policy::default())),
            [
                "allowed_hours",
                "bandwidth_bytes_per_s",
                "clear_after_ms",
                "compression",
                "created",
                "cut_interval_ms",
                "description",
                "error_after_ms",
                "excluded_disks",
                "journal_budget_bytes",
                "lease_ms",
                "policy",
                "priority",
                "retention_s",
                "rpo_target_ms",
                "same_site",
                "sync_deadline_ms",
                "time_zone",
                "uid",
                "updated",
                "version",
                "warn_after_ms",
                "warnings"
            ]
        );
        assert_eq!(
            keys(&point(&v1::Point::default())),
            ["clock_synced", "cut", "damage", "disk_uids", "flush_clean", "group", "label", "seq", "time", "timeline"]
        );
        assert_eq!(
            keys(&view(&v1::View::default())),
            [
                "created", "disks", "exports", "group", "kept", "kind", "open", "point", "reason", "uid", "view",
                "writable"
            ]
        );
    }
}
