//! Views: a restore point opened beside what is running. Recorded before they are opened, so that none is forgotten.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{self, Severity};

use super::{Coordinator, misfit};
use crate::convert;
use crate::desired::open_view;
use crate::failover::{Choice, FAILOVER_VIEW};
use crate::model::{MAX_OBJECTS, Model};
use crate::names::{Name, check_id};
use crate::objects::{GroupPhase, Object, PointRecord, View, ViewKind, new_uid};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::{Asked, gone};

/// How long a proxy has to come back to close what was half made.
const CLEAN_UP: Duration = Duration::from_secs(60);

/// How long the same request, asked again, waits for the view to be open.
const OPEN_WITHIN: Duration = Duration::from_secs(20);

impl Coordinator {
    /// Opens a point as a view.
    ///
    /// # Errors
    /// There is no such group, point or disk; the name is taken; the target is not there or cannot.
    #[allow(clippy::too_many_arguments)]
    pub async fn create_view(
        self: &Arc<Self>,
        name: &Name,
        id: &str,
        asked: &v1::View,
        choice: Choice,
        validate_only: bool,
        request_id: &str,
        request: &Asked,
    ) -> Result<v1::View, Problem> {
        check_id("view_id", id)?;
        check_text("view.reason", &asked.reason)?;
        if id == FAILOVER_VIEW {
            return Err(Problem::invalid("view_id", id, "another: this one is kept for a failover"));
        }
        let model = self.model();
        if let Some(done) = request.done(&model)? {
            return self.view_made(name, id, &done.uid).await;
        }
        // As an earlier version of this program recorded it.
        if let Ok(old) = model.view(name, id)
            && !request_id.is_empty()
            && old.request_id == request_id
        {
            return Ok(convert::view_to_proto(&model, old));
        }
        let disk_uids = check_view(&model, name, id, &asked.disks)?;
        let point = self.resolve_point(name, choice).await?;
        if !point.damage.is_empty() {
            return Err(Problem::state(&point.name, format!("damaged: {}", point.damage), "choose another point"));
        }
        let record = convert::point_from_proto(&point);
        check_held(&model, name, &record, &disk_uids)?;
        let view = View {
            uid: new_uid(),
            tenant: name.tenant.clone(),
            group: name.id.clone(),
            id: id.to_owned(),
            version: 1,
            created_ns: self.clock.wall_ns(),
            kind: if asked.writable { ViewKind::Test } else { ViewKind::Browse },
            writable: asked.writable,
            point: record,
            disk_uids,
            exports: Vec::new(),
            reason: asked.reason.clone(),
            open: false,
            closing: false,
            kept: false,
            request_id: request_id.to_owned(),
        };
        if validate_only {
            return Ok(convert::view_to_proto(&model, &view));
        }
        let recorded = view.clone();
        let twin = self
            .change(|model, txn| {
                if let Some(done) = request.done(model)? {
                    return Ok(Some(done.uid.clone()));
                }
                check_view(model, name, id, &asked.disks)?;
                request.record(model, txn, recorded.created_ns, &recorded.uid);
                txn.put(Object::View(recorded));
                Ok(None)
            })
            .await?;
        if let Some(uid) = twin {
            return self.view_made(name, id, &uid).await;
        }
        let group = model.group(name)?;
        let (target, _) = self.target_of(name)?;
        let opened = match self.ask(&target, Tell::OpenView(open_view(group, &view))).await {
            Ok(Outcome::View(opened)) => Ok(opened),
            Ok(_) => Err(misfit(&target)),
            Err(e) => Err(e),
        };
        match opened {
            Ok(opened) => {
                let exports = opened.exports.iter().map(convert::export_from_proto).collect();
                let view = View { version: 2, exports, open: true, ..view };
                let shown = view.clone();
                self.change(|_, txn| {
                    txn.put(Object::View(view));
                    Ok(())
                })
                .await?;
                self.tell(Severity::Info, "object", &shown.name(), &format!("open at record {}", shown.point.seq));
                Ok(convert::view_to_proto(&self.model(), &shown))
            }
            Err(problem) => {
                self.clean_up(view).await;
                Err(problem)
            }
        }
    }

    /// The view that a request made, once it is open.
    async fn view_made(&self, group: &Name, id: &str, uid: &str) -> Result<v1::View, Problem> {
        let mut changes = self.model_changes();
        let until = tokio::time::Instant::now() + OPEN_WITHIN;
        loop {
            changes.mark_unchanged();
            let model = self.model();
            let name = crate::names::child(group, "views", id);
            let view = model.view(group, id).ok().filter(|v| v.uid == uid).ok_or_else(|| gone("view", name))?;
            if view.open || tokio::time::timeout_at(until, changes.changed()).await.is_err() {
                return Ok(convert::view_to_proto(&model, view));
            }
        }
    }

    /// Closes a view.
    ///
    /// # Errors
    /// There is none of that name; a group runs from it; the target is not there and `force` was not said.
    #[allow(clippy::too_many_arguments)]
    pub async fn delete_view(
        self: &Arc<Self>,
        group: &Name,
        id: &str,
        etag: &str,
        keep_delta: bool,
        force: bool,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let view = self
            .change(|model, txn| {
                if request.done(model)?.is_some() {
                    return Ok(None);
                }
                let view = model.view(group, id)?;
                model.check_etag(view.name(), &Object::View(view.clone()).key(), etag)?;
                let runs = match model.group(group).map(|g| &g.phase) {
                    // Which one is being opened or left changes meanwhile.
                    Ok(GroupPhase::FailingOver { .. } | GroupPhase::Changing { .. }) => true,
                    Ok(phase) => phase.view() == Some(id),
                    _ => false,
                };
                if view.kind == ViewKind::Failover && runs {
                    let remedy = "it cannot be closed while the group runs from it, or may go back to it; verbs that fit: \
                                  undo-failover, change-point, commit-failback";
                    return Err(Problem::state(view.name(), "what its group runs from", remedy));
                }
                if validate_only {
                    return Ok(None);
                }
                // From here on the proxy does not open it again by itself.
                txn.put(Object::View(View { closing: true, version: view.version + 1, ..view.clone() }));
                Ok(Some(view.clone()))
            })
            .await?;
        let Some(view) = view else { return Ok(()) };
        let (target, _) = self.target_of(group)?;
        let close = Tell::CloseView(v1::CloseView { view: view.proxy_name(), keep_delta });
        if let Err(e) = self.ask(&target, close).await {
            if !force {
                return Err(e);
            }
            self.tell(Severity::Warning, "object", &view.name(), &format!("forgotten though not closed: {e}"));
        }
        self.forget(&view, request).await
    }

    async fn forget(self: &Arc<Self>, view: &View, request: &Asked) -> Result<(), Problem> {
        let (group, id) = (view.group_name(), view.id.clone());
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            request.record(model, txn, now, &view.uid);
            if let Ok(view) = model.view(&group, &id) {
                txn.delete(Object::View(view.clone()));
            }
            if !view.open {
                // It has not been made: the request that was to make it may be tried again.
                let made = model.requests.values().filter(|r| r.uid == view.uid && r.tenant == view.tenant);
                made.for_each(|r| txn.delete(Object::Request(r.as_ref().clone())));
            }
            Ok(())
        })
        .await
    }

    async fn clean_up(self: &Arc<Self>, view: View) {
        if let Ok((target, _)) = self.target_of(&view.group_name()) {
            let close = Tell::CloseView(v1::CloseView { view: view.proxy_name(), keep_delta: false });
            // It may never have been opened; either way nothing of it is to stay.
            let _ = self.command(&target, "", "", close, Duration::ZERO, Duration::from_secs(5)).await;
        }
        if let Err(e) = self.forget(&view, &Asked::default()).await {
            self.tell(Severity::Error, "object", &view.name(), &format!("could not be forgotten: {e}"));
        }
    }

    /// Views that an earlier life recorded and did not get open: closed and forgotten.
    pub(super) fn drop_half_made_views(self: &Arc<Self>) {
        let model = self.model();
        // Those of a test that is going on are its own to close.
        let tests = |v: &View| {
            model
                .operations
                .values()
                .any(|o| o.ended_ns == 0 && o.tenant == v.tenant && o.group == v.group && o.work.facts.view == v.id)
        };
        let half_made = |v: &&View| !v.open && v.kind != ViewKind::Failover && !tests(v);
        let views: Vec<View> = model.views.values().filter(half_made).cloned().collect();
        for view in views {
            let coordinator = self.clone();
            tokio::spawn(async move {
                if let Ok((target, _)) = coordinator.target_of(&view.group_name()) {
                    let close = Tell::CloseView(v1::CloseView { view: view.proxy_name(), keep_delta: false });
                    let _ = coordinator.command(&target, "", "", close, CLEAN_UP, CLEAN_UP).await;
                }
                if let Err(e) = coordinator.forget(&view, &Asked::default()).await {
                    coordinator.tell(Severity::Error, "object", &view.name(), &e.to_string());
                }
            });
        }
    }
}

/// Checks that a view of these disks can be made; gives their uids.
fn check_view(model: &Model, name: &Name, id: &str, disks: &[String]) -> Result<Vec<String>, Problem> {
    let group = model.group(name)?;
    if group.phase == GroupPhase::Deleting {
        return Err(Problem::state(name, "being deleted", "nothing fits any more"));
    }
    if let Ok(taken) = model.view(name, id) {
        return Err(Problem::Exists { field: "view_id".into(), value: id.to_owned(), by: taken.name() });
    }
    if model.views.len() >= MAX_OBJECTS {
        return Err(Problem::Limit { what: "views".into(), limit: MAX_OBJECTS as u64 });
    }
    let mut uids = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let found = model.disks_of(group).find(|d| d.id == *disk);
        let found = found.ok_or_else(|| {
            let all: Vec<&str> = model.disks_of(group).map(|d| d.id.as_str()).collect();
            Problem::invalid(format!("view.disks[{i}]"), disk, all.join(", "))
        })?;
        if !uids.contains(&found.uid) {
            uids.push(found.uid.clone());
        }
    }
    Ok(uids)
}

fn check_held(model: &Model, name: &Name, point: &PointRecord, disk_uids: &[String]) -> Result<(), Problem> {
    let group = model.group(name)?;
    let missing = model.disks_of(group).find(|d| disk_uids.contains(&d.uid) && !point.disks.contains(&d.uid));
    match missing {
        Some(disk) => {
            let state = format!("without the disk \"{}\", which is being synchronised there", disk.id);
            Err(Problem::state(crate::names::child(name, "points", point.seq), state, "choose another point"))
        }
        None => Ok(()),
    }
}
