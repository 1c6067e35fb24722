//! Groups and their disks: created, changed, deleted.

use std::sync::Arc;

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{self, CommandErrorKind, Severity};
use std::time::Duration;

use super::objects::made_before;
use super::policies::check_excluded;
use super::{Coordinator, misfit, refusal, unreachable};
use crate::convert;
use crate::fields::{self, Rules};
use crate::group::{DiskWanted, Found, check_disks, new_group};
use crate::model::Model;
use crate::names::{Kind, Name};
use crate::objects::{Disk, Group, GroupPhase, Object, Proxy, ViewKind, new_uid};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::{Asked, gone};

impl Coordinator {
    /// Creates a group with its disks. The source proxy looks at each disk first.
    ///
    /// # Errors
    /// A field that is not allowed; names, paths or exports that are taken; proxies that do not fit or are not there.
    pub async fn create_group(
        self: &Arc<Self>,
        name: &Name,
        asked: &v1::Group,
        validate_only: bool,
        request_id: &str,
        request: &Asked,
    ) -> Result<v1::Group, Problem> {
        let model = self.model();
        if let Some(done) = request.done(&model)? {
            return self.group_made(&model, name, &done.uid);
        }
        // As an earlier version of this program recorded it.
        if let Ok(old) = model.group(name)
            && !request_id.is_empty()
            && old.request_id == request_id
        {
            return Ok(convert::group_to_proto(&model, old));
        }
        let now = self.clock.wall_ns();
        let mut group = new_group(&model, name, asked, now)?;
        group.request_id = request_id.to_owned();
        let field = |i: usize| format!("group.disks[{i}]");
        let wanted: Vec<DiskWanted> =
            asked.disks.iter().enumerate().map(|(i, d)| DiskWanted::new(&field(i), "", d)).collect::<Result<_, _>>()?;
        check_disks(&model, &group, &wanted)?;
        let source = model.source_of(&group).cloned().ok_or_else(|| Problem::not_found("proxy", &group.source))?;
        let mut disks = Vec::with_capacity(wanted.len());
        for (i, disk) in wanted.iter().enumerate() {
            let found = self.inspect(&source, &format!("{}.path", field(i)), &disk.path).await?;
            disks.push(disk.found(&field(i), &group, i as u16, found, now)?);
        }
        group.next_slot = disks.len() as u16;
        let placed = group.target.is_empty();
        let made_disks = disks.clone();
        let made = self
            .change(|model, txn| {
                if let Some(done) = request.done(model)? {
                    return Ok(Err(done.uid.clone()));
                }
                // Looking took a while: what was checked has to hold still.
                new_group(model, name, asked, now)?;
                check_disks(model, &group, &wanted)?;
                if placed {
                    // By the newest model: groups that are created together see each other.
                    let size = disks.iter().map(|d| d.size).sum();
                    (group.target, group.placement) = self.choose_target(model, &group, size)?;
                }
                // In its turn: the wrapping key of now is not given up meanwhile.
                let key = self.keys.generate(now).map_err(|e| Problem::Internal(e.to_string()))?;
                group.key.clone_from(&key.id);
                let made = group.clone();
                if !validate_only {
                    request.record(model, txn, now, &group.uid);
                    txn.put(Object::Key(key));
                    txn.put(Object::Group(group));
                    disks.into_iter().for_each(|d| txn.put(Object::Disk(d)));
                }
                Ok(Ok(made))
            })
            .await?;
        let made = match made {
            Ok(made) => made,
            Err(twin) => return self.group_made(&self.model(), name, &twin),
        };
        if validate_only {
            let mut shown = convert::group_to_proto(&model, &made);
            shown.disks = made_disks.iter().map(|d| convert::disk_to_proto(&model, &made, d)).collect();
            return Ok(shown);
        }
        let message = match placed {
            true => format!("protected from now on, at {}", made.placement),
            false => "protected from now on".to_owned(),
        };
        self.tell(Severity::Info, "object", &name.to_string(), &message);
        let model = self.model();
        Ok(convert::group_to_proto(&model, model.group(name)?))
    }

    /// The group that a request made or changed, as it is now.
    fn group_made(&self, model: &Model, name: &Name, uid: &str) -> Result<v1::Group, Problem> {
        Ok(convert::group_to_proto(model, &made_before(model, name, uid)?))
    }

    /// What a proxy finds at a path.
    async fn inspect(&self, source: &Proxy, field: &str, path: &str) -> Result<Found, Problem> {
        let tell = Tell::InspectDisk(v1::InspectDisk { path: path.to_owned() });
        match self.command(source, "", "", tell, Duration::ZERO, Duration::from_secs(15)).await {
            Ok(Outcome::Disk(d)) => Ok(Found {
                size: d.size_bytes,
                block: d.block_bytes,
                physical_block: d.physical_block_bytes.max(d.block_bytes),
            }),
            Ok(Outcome::Error(e)) if matches!(e.kind(), CommandErrorKind::NotFound | CommandErrorKind::Invalid) => {
                let allowed = format!("a raw file or block device on the host of \"{}\": {}", source.id, e.message);
                Err(Problem::invalid(field, path, allowed))
            }
            Ok(Outcome::Error(e)) => Err(refusal(source, &e)),
            Ok(_) => Err(misfit(source)),
            Err(e) => Err(unreachable(source, &e)),
        }
    }

    /// Changes a group's policy or description.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a field that is not allowed or must not change.
    pub async fn update_group(
        self: &Arc<Self>,
        name: &Name,
        asked: &v1::Group,
        mask: Option<&prost_types::FieldMask>,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Group, Problem> {
        let made = self
            .update_object(name, &asked.etag, validate_only, request, |model, old: &Group, now| {
                let wanted = fields::update(&convert::group_to_proto(model, old), asked, mask, &UPDATE)?;
                check_text("group.description", &wanted.description)?;
                let policy = Name::parse("group.policy", Kind::Policy, &wanted.policy)?;
                if policy.tenant != name.tenant {
                    return Err(Problem::invalid("group.policy", &policy, "of the group's own tenant"));
                }
                check_excluded(model, old, &model.policy(&policy)?.promises, "group.policy")?;
                Ok(Group {
                    version: old.version + 1,
                    updated_ns: now,
                    description: wanted.description,
                    policy: policy.id,
                    ..old.clone()
                })
            })
            .await?;
        Ok(convert::group_to_proto(&self.model(), &made))
    }

    /// Ends a group's protection. Safe to call again if it stopped half-way.
    ///
    /// # Errors
    /// There is none of that name; it is being failed over, runs from a view or has views open; a proxy is not there and
    /// `force` was not said.
    pub async fn delete_group(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        delete_points: bool,
        force: bool,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let group = self
            .change(|model, txn| {
                if request.done(model)?.is_some() {
                    return Ok(None);
                }
                let old = model.group(name)?;
                if old.phase == GroupPhase::Deleting && !validate_only {
                    return Ok(Some(old.clone()));
                }
                model.check_etag(name, &Object::Group(old.clone()).key(), etag)?;
                self.check_deletable(model, old, delete_points, force)?;
                if validate_only {
                    return Ok(None);
                }
                let marked = Group { version: old.version + 1, phase: GroupPhase::Deleting, ..old.clone() };
                txn.put(Object::Group(marked.clone()));
                Ok(Some(marked))
            })
            .await?;
        let Some(group) = group else { return Ok(()) };
        let model = self.model();
        let stream_uid = group.uid.clone();
        if let Some(source) = model.source_of(&group) {
            let unprotect = Tell::Unprotect(v1::Unprotect { stream_uid: stream_uid.clone() });
            let told = self.ask_why(source, unprotect).await;
            if let Err((_, Some(v1::CommandErrorKind::WrongState))) = &told
                && !force
            {
                // Nothing has been ended there: a disk is in use. So it is protected on.
                self.keep_protecting(name, &group).await?;
            }
            self.forgive(&group, told.map_err(|(problem, _)| problem), force)?;
        }
        if let Some(target) = model.target_of(&group).filter(|_| delete_points) {
            let told = self.ask(target, Tell::DropStream(v1::DropStream { stream_uid })).await;
            self.forgive(&group, told, force)?;
        }
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            let Ok(old) = model.group(name) else { return Ok(()) };
            request.record(model, txn, now, &old.uid);
            model.views_of(old).for_each(|v| txn.delete(Object::View(v.clone())));
            model.machines_of(old).for_each(|m| txn.delete(Object::Machine(m.clone())));
            let disks = model.disks.values().filter(|d| d.group_uid == old.uid);
            disks.for_each(|d| txn.delete(Object::Disk(d.clone())));
            // What is kept of the journal can still be opened by its keys.
            for key in old.all_keys().filter_map(|id| model.keys.get(id)).filter(|_| delete_points) {
                txn.delete(Object::Key(key.clone()));
            }
            txn.delete(Object::Group(old.clone()));
            Ok(())
        })
        .await?;
        self.tell(Severity::Info, "object", &name.to_string(), "deleted");
        let (history, uid) = (self.history.clone(), group.uid.clone());
        if let Ok(Err(e)) = tokio::task::spawn_blocking(move || history.forget(&uid)).await {
            tracing::warn!(group = %name, error = %e, "its RPO history could not be deleted");
        }
        Ok(())
    }

    /// Takes back that a group is being deleted.
    async fn keep_protecting(self: &Arc<Self>, name: &Name, marked: &Group) -> Result<(), Problem> {
        self.change(|model, txn| {
            match model.group(name) {
                Ok(group) if group.phase == GroupPhase::Deleting && group.uid == marked.uid => {
                    let version = group.version + 1;
                    txn.put(Object::Group(Group { version, phase: GroupPhase::Protecting, ..group.clone() }));
                }
                _ => {}
            }
            Ok(())
        })
        .await
    }

    fn check_deletable(&self, model: &Model, group: &Group, points: bool, force: bool) -> Result<(), Problem> {
        super::plans::check_in_no_plan(model, group)?;
        let name = group.name();
        match &group.phase {
            GroupPhase::FailingOver { operation }
            | GroupPhase::Changing { operation, .. }
            | GroupPhase::Settling { operation, .. } => {
                let remedy = format!("wait for tenants/{}/operations/{operation}", group.tenant);
                return Err(Problem::state(name, "being failed over, or back", remedy));
            }
            GroupPhase::FailingBack { .. } => {
                return Err(Problem::state(name, "failing back", "cancel its failback first"));
            }
            GroupPhase::FailedBack { .. } => {
                return Err(Problem::state(name, "failed back", "commit its failback first, or undo it"));
            }
            GroupPhase::FailedOver { .. } if points || !force => {
                let remedy = "its machine runs from its points; to forget the group and keep them, say `force` and not \
                              `delete_points`";
                return Err(Problem::state(name, "failed over", remedy));
            }
            _ => {}
        }
        if !group.leftovers.is_empty() && !force {
            let remedy = "wait until both its proxies are there; or say `force`, and look after these yourself";
            return Err(Problem::state(name, "still with what is left of an earlier failback", remedy));
        }
        // What was kept of a failover is deleted with the points, or stays with them.
        if let Some(view) = model.views_of(group).find(|v| v.kind != ViewKind::Failover) {
            return Err(Problem::state(name, format!("shown by {}", view.name()), "close that view first"));
        }
        let needed = [model.source_of(group), model.target_of(group).filter(|_| points)];
        for proxy in needed.into_iter().flatten() {
            if !force && !self.sessions.connected(&proxy.uid) {
                let detail = "it is not connected; bring it back, or say `force`".to_owned();
                return Err(Problem::Unreachable { proxy: proxy.name().to_string(), detail });
            }
        }
        Ok(())
    }

    fn forgive(&self, group: &Group, told: Result<Outcome, Problem>, force: bool) -> Result<(), Problem> {
        match told {
            Ok(_) => Ok(()),
            Err(e) if force => {
                self.tell(Severity::Warning, "object", &group.name().to_string(), &format!("forced past: {e}"));
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Adds a disk to a group.
    ///
    /// # Errors
    /// As for [`Self::create_group`]; or the group is not protecting.
    pub async fn create_disk(
        self: &Arc<Self>,
        name: &Name,
        id: &str,
        asked: &v1::Disk,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Disk, Problem> {
        let model = self.model();
        let made_before = |model: &Model, uid: &str| {
            let group = model.group(name)?;
            let disk = model.disks_of(group).find(|d| d.uid == uid).cloned();
            Ok((group.clone(), disk.ok_or_else(|| gone("disk", crate::names::child(name, "disks", id)))?))
        };
        if let Some(done) = request.done(&model)? {
            let (group, disk) = made_before(&model, &done.uid)?;
            return Ok(convert::disk_to_proto(&model, &group, &disk));
        }
        let group = model.group(name)?;
        let wanted = DiskWanted::new("disk", id, asked)?;
        check_protecting(group)?;
        check_disks(&model, group, std::slice::from_ref(&wanted))?;
        let source = model.source_of(group).ok_or_else(|| Problem::not_found("proxy", &group.source))?;
        let found = self.inspect(source, "disk.path", &wanted.path).await?;
        let now = self.clock.wall_ns();
        let (group, made) = self
            .change(|model, txn| {
                if let Some(done) = request.done(model)? {
                    return made_before(model, &done.uid);
                }
                let group = model.group(name)?;
                check_protecting(group)?;
                check_disks(model, group, std::slice::from_ref(&wanted))?;
                let made = wanted.found("disk", group, group.next_slot, found, now)?;
                // Until the new disk is synchronised there is no point of *all* disks.
                let group = Group {
                    version: group.version + 1,
                    updated_ns: now,
                    next_slot: group.next_slot + 1,
                    complete: false,
                    ..group.clone()
                };
                if !validate_only {
                    request.record(model, txn, now, &made.uid);
                    txn.put(Object::Group(group.clone()));
                    txn.put(Object::Disk(made.clone()));
                }
                Ok((group, made))
            })
            .await?;
        Ok(convert::disk_to_proto(&self.model(), &group, &made))
    }

    /// Takes a disk out of a group.
    ///
    /// # Errors
    /// There is none of that name; the group is not protecting, or this is its last disk; the source proxy is not there,
    /// or cannot.
    pub async fn delete_disk(
        self: &Arc<Self>,
        name: &Name,
        id: &str,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let model = self.model();
        if request.done(&model)?.is_some() {
            return Ok(());
        }
        let group = model.group(name)?;
        check_protecting(group)?;
        let found = model.disks.values().find(|d| d.group_uid == group.uid && d.id == id);
        let full = crate::names::child(name, "disks", id);
        let disk = found.cloned().ok_or_else(|| Problem::not_found("disk", &full))?;
        model.check_etag(&full, &Object::Disk(disk.clone()).key(), etag)?;
        if model.disks_of(group).all(|d| d.uid == disk.uid) {
            return Err(Problem::state(name, "of this one disk only", "delete the group instead"));
        }
        if let Some(machine) = model.machines_of(group).find(|m| m.disks.iter().any(|d| d == id)) {
            let remedy = "change that machine's disks first";
            return Err(Problem::state(full, format!("in use by {}", machine.name()), remedy));
        }
        let source = model.source_of(group).ok_or_else(|| Problem::not_found("proxy", &group.source))?;
        if validate_only {
            return Ok(());
        }
        self.mark_leaving(&disk, true).await?;
        let leave = v1::LeaveDisk { stream_uid: group.uid.clone(), disk_uid: disk.uid.clone() };
        if let Err(e) = self.ask(source, Tell::LeaveDisk(leave)).await {
            self.mark_leaving(&disk, false).await?;
            return Err(e);
        }
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            request.record(model, txn, now, &disk.uid);
            if let Ok(group) = model.group(name) {
                txn.put(Object::Group(Group { version: group.version + 1, updated_ns: now, ..group.clone() }));
            }
            txn.delete(Object::Disk(disk));
            Ok(())
        })
        .await
    }

    /// What the source's disks hold that the target may not; written to files there if `export_to` names a folder.
    ///
    /// # Errors
    /// There is none of that name; its source is not there, is not held, or cannot read or write what it has to.
    pub async fn inspect_branch(
        self: &Arc<Self>,
        name: &Name,
        export_to: &str,
        request: &Asked,
    ) -> Result<v1::Branch, Problem> {
        // Two that come at once with one id: the second waits for what the first is told.
        let _turn = self.turns.of(request.key()).await;
        let model = self.model();
        let group = model.group(name)?;
        let plain = !export_to.split('/').any(|part| part == "..") && !export_to.chars().any(char::is_control);
        if !export_to.is_empty() && (!export_to.starts_with('/') || export_to.len() > 1024 || !plain) {
            let allowed = "an absolute path of up to 1024 bytes without \"..\"";
            return Err(Problem::invalid("export_to", export_to, allowed));
        }
        if !export_to.is_empty() && !group.hold {
            let remedy = "its disks change while they are copied; take a view of a restore point instead";
            return Err(Problem::state(name, "not held", remedy));
        }
        let source = model.source_of(group).ok_or_else(|| Problem::not_found("proxy", &group.source))?;
        let tell =
            Tell::InspectBranch(v1::InspectBranch { stream_uid: group.uid.clone(), export_to: export_to.to_owned() });
        // A copy takes as long as its disks are large.
        let wait = if export_to.is_empty() { Duration::from_secs(30) } else { Duration::from_secs(3600) };
        // Only so that the id is not used for another request: the proxy knows the command again, and one that it has
        // forgotten looks at, and writes, the same.
        let (now, uid) = (self.clock.wall_ns(), group.uid.clone());
        self.change(|model, txn| {
            if request.done(model)?.is_none() {
                request.record(model, txn, now, &uid);
            }
            Ok(())
        })
        .await?;
        let id = if request.key().is_empty() { new_uid() } else { request.key().to_owned() };
        match self.command_once(&id, source, "", "", tell, Duration::ZERO, wait).await {
            Ok(Outcome::Branch(branch)) => Ok(branch),
            Ok(Outcome::Error(e)) => Err(refusal(source, &e)),
            Ok(_) => Err(misfit(source)),
            Err(e) => Err(unreachable(source, &e)),
        }
    }

    async fn mark_leaving(self: &Arc<Self>, disk: &Disk, leaving: bool) -> Result<(), Problem> {
        self.change(|_, txn| {
            txn.put(Object::Disk(Disk { leaving, ..disk.clone() }));
            Ok(())
        })
        .await
    }
}

/// What an update of a group may change.
const UPDATE: Rules<'static> = Rules {
    root: "group",
    writable: &["description", "policy"],
    fixed: &[
        ("source", "what it is: it cannot be changed"),
        ("target", "what it is: it cannot be changed"),
        ("disks", "what they are: disks come with CreateDisk and go with DeleteDisk"),
    ],
};

fn check_protecting(group: &Group) -> Result<(), Problem> {
    if group.phase == GroupPhase::Protecting {
        return Ok(());
    }
    Err(Problem::state(group.name(), "not being protected by its source", "disks change only while it is"))
}
