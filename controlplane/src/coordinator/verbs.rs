//! Verbs that become operations: checked, recorded, begun. What they then do is in [`crate::failover`].

use std::sync::Arc;

use afterimage_wire::v1::{self, Severity};

use super::Coordinator;
use super::drive::disk_names;
use super::failback::phase_during;
use crate::convert;
use crate::failover::{self, Choice, Failover, Spec, Verb};
use crate::machine::Role;
use crate::model::Model;
use crate::names::{Kind, Name};
use crate::objects::{ExportRecord, Group, GroupPhase, Object, Operation, ViewKind, new_uid};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::{Asked, gone};

/// Who asks for a verb, and how.
#[derive(Clone, Debug, Default)]
pub struct Asking {
    /// "role/name" of the certificate.
    pub actor: String,
    /// Of the caller.
    pub request_id: String,
    /// Checks only.
    pub validate_only: bool,
}

/// What a group that is failed over is to run from.
#[derive(Clone, Debug)]
pub enum From {
    /// A point.
    Point(Choice),
    /// What is kept of a view, by its id.
    Kept(String),
}

impl Coordinator {
    /// Checks a failover, planned or not, and starts it. `confirm_name`: the group's id, typed, if the source is not to be
    /// asked.
    ///
    /// # Errors
    /// It does not fit the state; the target is not there, or the point is not fit.
    pub async fn start_failover(
        self: &Arc<Self>,
        name: &Name,
        spec: Spec,
        confirm_name: &str,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &spec.reason)?;
        let model = self.model();
        if let Some(done) = begun_before(&model, name, spec.verb, asking, request)? {
            return Ok(convert::operation_to_proto(&model, done));
        }
        self.check_failover(&model, name, &spec, confirm_name)?;
        let point = self.fit_point(&model, name, spec.to).await?;
        self.check_machines(name, Role::Replica).await?;
        let rpo = self.look(|scene, _| {
            let live = scene.live.streams.get(&scene.model.group(name).ok()?.uid)?;
            scene.rpo(scene.model.group(name).ok()?, live).now_us
        });
        let now = self.clock.wall_ns();
        self.begin(name, spec.verb, asking, request, |model| {
            self.check_failover(model, name, &spec, confirm_name)?;
            let group = model.group(name)?;
            let disks: Vec<_> = model.disks_of(group).collect();
            let lease = self.lease_of(model, group);
            let view = failover::free_view(model, group);
            let checked = format!("record {} can be opened", point.seq);
            let (machines, fences) = self.machines_for(model, group, spec.verb)?;
            let rpo = rpo.unwrap_or_default();
            let work = Failover::new(spec.clone(), &disks, (&view, ""), rpo, lease, checked, now);
            Ok(work.with_machines(machines, fences, Vec::new()))
        })
        .await
    }

    /// Checks that a group's failover can be undone, and begins with it.
    ///
    /// # Errors
    /// It does not fit the state; the target is not there; hosts use the view and `force` was not said.
    pub async fn undo_failover(
        self: &Arc<Self>,
        name: &Name,
        (discard, force, reason): (bool, bool, String),
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &reason)?;
        let spec = Spec { discard, reason, ..Spec::new(Verb::UndoFailover, Choice::Latest) };
        let now = self.clock.wall_ns();
        self.begin(name, spec.verb, asking, request, |model| {
            let view = self.check_failed_over(model, name, spec.verb, force)?;
            let group = model.group(name)?;
            let disks: Vec<_> = model.disks_of(group).collect();
            let checked = format!("the group runs from its view \"{view}\"");
            let work = Failover::new(spec.clone(), &disks, ("", &view), 0, 0, checked, now);
            let (machines, fences) = self.machines_for(model, group, spec.verb)?;
            Ok(work.with_machines(machines, fences, exports_of(model, name, &view)))
        })
        .await
    }

    /// Checks that a group that is failed over can run from elsewhere in its history, and begins with it.
    ///
    /// # Errors
    /// It does not fit the state; the target is not there, the point or the view is not fit; hosts use the present view and
    /// `force` was not said.
    pub async fn change_point(
        self: &Arc<Self>,
        name: &Name,
        from: From,
        (force, reason): (bool, String),
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &reason)?;
        let model = self.model();
        if let Some(done) = begun_before(&model, name, Verb::ChangePoint, asking, request)? {
            return Ok(convert::operation_to_proto(&model, done));
        }
        self.check_failed_over(&model, name, Verb::ChangePoint, force)?;
        let (to, checked) = match &from {
            From::Point(choice) => {
                let point = self.fit_point(&model, name, *choice).await?;
                (*choice, format!("record {} can be opened", point.seq))
            }
            From::Kept(view) => (Choice::Latest, format!("what was written to \"{view}\" is kept")),
        };
        self.check_machines(name, Role::Replica).await?;
        let spec = Spec { reason, ..Spec::new(Verb::ChangePoint, to) };
        let now = self.clock.wall_ns();
        self.begin(name, spec.verb, asking, request, |model| {
            let leaves = self.check_failed_over(model, name, spec.verb, force)?;
            let group = model.group(name)?;
            let disks: Vec<_> = model.disks_of(group).collect();
            let (machines, fences) = self.machines_for(model, group, spec.verb)?;
            let new = |view: &str| {
                let work = Failover::new(spec.clone(), &disks, (view, &leaves), 0, 0, checked.clone(), now);
                work.with_machines(machines.clone(), fences, exports_of(model, name, &leaves))
            };
            match &from {
                From::Point(_) => Ok(new(&failover::free_view(model, group))),
                From::Kept(id) => {
                    let kept: Vec<&str> = model.views_of(group).filter(|v| v.kept).map(|v| v.id.as_str()).collect();
                    let view = model.view(name, id).ok().filter(|v| v.kept && v.kind == ViewKind::Failover);
                    let view = view.ok_or_else(|| {
                        let allowed = if kept.is_empty() { "a point: nothing is kept".into() } else { kept.join(", ") };
                        Problem::invalid("view", id, allowed)
                    })?;
                    Ok(new(id).reopening(view.point.clone()))
                }
            }
        })
        .await
    }

    /// Known before anything is stopped: such a point is held, is whole, and can be named.
    pub(super) async fn fit_point(&self, model: &Model, name: &Name, to: Choice) -> Result<v1::Point, Problem> {
        let point = self.resolve_point(name, to).await?;
        let disks = disk_names(model, model.group(name)?);
        failover::check_point(&convert::point_from_proto(&point), &point.damage, &disks).map_err(|state| {
            Problem::state(name, format!("not to be failed over there: {state}"), "choose another point")
        })?;
        Ok(point)
    }

    /// Records an operation as `work` has it, and starts it. The same request begins one only once.
    pub(super) async fn begin(
        self: &Arc<Self>,
        name: &Name,
        verb: Verb,
        asking: &Asking,
        request: &Asked,
        work: impl FnOnce(&Model) -> Result<Failover, Problem>,
    ) -> Result<v1::Operation, Problem> {
        let now = self.clock.wall_ns();
        let uid = new_uid();
        let (operation, started) = self
            .change(|model, txn| {
                if let Some(done) = begun_before(model, name, verb, asking, request)? {
                    return Ok((done.clone(), false));
                }
                let work = work(model)?;
                let group = model.group(name)?;
                let phase = match work.spec.verb.is_trial() {
                    true => group.phase.clone(),
                    false => phase_during(&work, group, &uid),
                };
                let operation = Operation {
                    uid: uid.clone(),
                    tenant: name.tenant.clone(),
                    version: 1,
                    group: name.id.clone(),
                    request_id: asking.request_id.clone(),
                    actor: asking.actor.clone(),
                    created_ns: now,
                    ended_ns: 0,
                    work: Box::new(work),
                };
                if asking.validate_only {
                    return Ok((operation, false));
                }
                request.record(model, txn, now, &uid);
                txn.put(Object::Group(Group { version: group.version + 1, phase, ..group.clone() }));
                txn.put(Object::Operation(operation.clone()));
                for old in model.surplus_operations(&name.tenant) {
                    txn.delete(Object::Operation(old.clone()));
                }
                Ok((operation, true))
            })
            .await?;
        if started {
            let (verb, actor) = (operation.work.spec.verb.as_str(), &operation.actor);
            let message = format!("{verb} begun by {actor}: {}", operation.name());
            self.tell(Severity::Warning, "operation", &name.to_string(), &message);
            tokio::spawn(self.clone().drive(operation.name(), false));
        }
        let mut shown = convert::operation_to_proto(&self.model(), &operation);
        if asking.validate_only && !started {
            shown.validate_only = true;
            shown.name.clear();
            shown.uid.clear();
            shown.state = v1::OperationState::Done.into();
        }
        Ok(shown)
    }

    pub(super) fn check_failover(&self, model: &Model, name: &Name, spec: &Spec, confirm: &str) -> Result<(), Problem> {
        let group = model.group(name)?;
        let connected = |p: Option<&crate::objects::Proxy>| p.is_some_and(|p| self.sessions.connected(&p.uid));
        let (source, target) = (connected(model.source_of(group)), connected(model.target_of(group)));
        let lease = self.lease_of(model, group);
        // Whoever can say that its machines are off makes up for a source that nobody can ask.
        let lease = lease.max(u64::from(self.machines_fence(model, group)));
        failover::check(spec, confirm, group, model.disks_of(group).count(), source, target, lease)
    }

    fn check_failed_over(&self, model: &Model, name: &Name, verb: Verb, force: bool) -> Result<String, Problem> {
        let group = model.group(name)?;
        let target = model.target_of(group).is_some_and(|p| self.sessions.connected(&p.uid));
        // What runs from it is stopped first.
        let driven = model.machines_of(group).any(|m| !m.runs_from.is_empty());
        let in_use = match &group.phase {
            _ if driven => 0,
            GroupPhase::FailedOver { view } => {
                let view = model.view(name, view).map(|v| v.proxy_name()).unwrap_or_default();
                let live = self.live.lock().expect("nothing panics while it holds this");
                let stream = live.streams.get(&group.uid);
                stream.and_then(|s| s.views.get(&view)).map_or(0, |v| v.clients)
            }
            _ => 0,
        };
        failover::check_failed_over(verb, group, target, in_use, force)
    }

    /// The lease that the group's source keeps to for certain, milliseconds; 0 if none: it has reported so since it was
    /// last told anything, and the policy has not changed its mind.
    pub(super) fn lease_of(&self, model: &Model, group: &Group) -> u64 {
        let wanted = model.policy_of(group).map_or(0, |p| p.promises.lease_ms);
        let live = self.live.lock().expect("nothing panics while it holds this");
        let kept = live.streams.get(&group.uid).map_or(0, |stream| stream.lease_ms);
        if wanted == 0 || kept == 0 { 0 } else { wanted.max(kept) }
    }
}

/// By which the disks of a view are reached.
fn exports_of(model: &Model, group: &Name, view: &str) -> Vec<ExportRecord> {
    model.view(group, view).map(|v| v.exports.clone()).unwrap_or_default()
}

/// The operation that the same request began, if one did.
pub(super) fn begun_before<'a>(
    model: &'a Model,
    group: &Name,
    verb: Verb,
    asking: &Asking,
    request: &Asked,
) -> Result<Option<&'a Operation>, Problem> {
    if let Some(done) = request.done(model)? {
        let name = Name::new(&group.tenant, Kind::Operation, &done.uid);
        return model.operation(&name).map(Some).map_err(|_| gone("operation", &name));
    }
    // As an earlier version of this program recorded it.
    let id = &asking.request_id;
    let of = |o: &&Operation| o.tenant == group.tenant && o.group == group.id && o.work.spec.verb == verb;
    let same = |o: &&Operation| of(o) && o.request_id == *id;
    Ok(model.operations.values().filter(|_| !id.is_empty()).find(same))
}
