//! What a coordinator that was restored from a backup makes of what proxies have: pure functions. The backup is old; each
//! proxy keeps the last desired state that it was given. What is newer there is taken over; nothing that a proxy has is
//! given up because the backup does not know it.
//!
//! ```text
//!  restore ─▶ observing: proxies are asked, none is told ─▶ adopt(), with each that answers ─▶ confirm ─▶ as ever
//! ```

mod back;

use std::collections::{BTreeMap, BTreeSet};

use afterimage_wire::v1;
use serde::{Deserialize, Serialize};

use crate::certificates::{Certificate, Revoked};
use crate::failover::{Failure, State, StepState};
use crate::keys::{KEY_LEN, Wrapper};
use crate::model::{Model, Txn};
use crate::names::{Kind, Name};
use crate::objects::{Disk, Group, GroupPhase, Object, Pause, PointRecord, Policy, Proxy, View, ViewKind, new_uid};
use crate::policy::{Compression, Promises};
use crate::store::Listing;

/// Most findings that are kept.
const MAX_FINDINGS: usize = 500;

/// That the store was restored, and how far its owner is with that. Stays once it has been confirmed: versions count on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Restored {
    /// When the backup was made, nanoseconds since the Unix epoch.
    pub backup_ns: u64,
    /// When it was restored.
    pub restored_ns: u64,
    /// Added to the store's revision: versions of desired states are above all that proxies have seen.
    pub offset: u64,
    /// Until it is confirmed nobody is told anything.
    pub observing: bool,
    /// Uids of the proxies whose state is known.
    pub seen: Vec<String>,
    /// What was found and taken over, for people.
    pub findings: Vec<String>,
}

impl Restored {
    /// Notes a finding, once.
    pub fn note(&mut self, finding: String) {
        if !self.findings.contains(&finding) && self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }
}

/// What a backup's objects become in a store that begins with them: no token of then is good, nothing that was being done
/// then goes on, and the store only observes.
///
/// # Errors
/// An object that this program cannot read.
pub fn prepare(listing: Listing, backup_ns: u64, now_ns: u64) -> Result<Vec<Object>, String> {
    let revision = listing.revision;
    let model = Model::load(listing)?;
    let version = model.version();
    // The audit log goes on behind what the store knew; its files are not in the backup.
    let mut objects: Vec<Object> = vec![Object::Term(model.term), Object::Audit(model.audit)];
    objects.extend(model.policies.into_values().map(Object::Policy));
    objects.extend(model.disks.into_values().map(Object::Disk));
    objects.extend(model.proxies.into_values().map(Object::Proxy));
    objects.extend(model.plans.into_values().map(Object::Plan));
    objects.extend(model.keys.into_values().map(Object::Key));
    objects.extend(model.machines.into_values().map(Object::Machine));
    objects.extend(model.authorities.map(Object::Authorities));
    objects.extend(model.wrapping.map(Object::Wrapping));
    objects.extend(model.recovery.map(Object::Recovery));
    objects.extend(model.certificates.into_values().map(|c| Object::Certificate((*c).clone())));
    objects.extend(model.requests.into_values().map(|r| Object::Request((*r).clone())));
    // A view that was being made or closed then is nobody's now; what is open its target will say.
    objects.extend(model.views.into_values().filter(|v| v.kept || v.open && !v.closing).map(Object::View));
    objects.extend(model.groups.into_values().map(|mut group| {
        stand_still(&mut group);
        Object::Group(group)
    }));
    objects.extend(model.operations.into_values().map(|mut operation| {
        if operation.ended_ns == 0 {
            let running = operation.work.steps.iter_mut().find(|s| s.state == StepState::Running);
            let step = running.map_or(crate::failover::StepName::Check, |step| {
                step.state = StepState::Failed;
                step.name
            });
            operation.work.error = Some(Failure {
                step,
                message: "the coordinator's state was restored from a backup that was made meanwhile".to_owned(),
                remedy: "see where the group stands now, and start again from there".to_owned(),
            });
            operation.work.state = State::Failed;
            operation.ended_ns = now_ns;
            operation.version += 1;
        }
        Object::Operation(operation)
    }));
    objects.extend(model.runs.into_values().map(|mut run| {
        if run.ended_ns == 0 {
            run.lose("the coordinator's state was restored from a backup that was made meanwhile", now_ns);
        }
        Object::Run(run)
    }));
    let offset = version.max(revision);
    objects.push(Object::Restored(Restored {
        backup_ns,
        restored_ns: now_ns,
        offset,
        observing: true,
        ..Restored::default()
    }));
    Ok(objects)
}

/// The group as it was before what was being done with it: that does not go on.
fn stand_still(group: &mut Group) {
    match &group.phase {
        GroupPhase::FailingOver { .. } => group.phase = GroupPhase::Protecting,
        // What became of it its ends will say.
        GroupPhase::Changing { view, .. } if group.reverse.is_some() => {
            group.phase = GroupPhase::FailingBack { view: view.clone() };
        }
        GroupPhase::Changing { view, .. } => group.phase = GroupPhase::FailedOver { view: view.clone() },
        GroupPhase::Settling { view, after, .. } => {
            group.phase = GroupPhase::FailedBack { view: view.clone(), after: *after };
        }
        GroupPhase::Protecting | GroupPhase::FailedOver { .. } | GroupPhase::Deleting => {}
        GroupPhase::FailingBack { .. } | GroupPhase::FailedBack { .. } => {}
    }
}

/// What a proxy has, as it says.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Who.
    pub proxy: Proxy,
    /// The last desired state that it was given.
    pub state: v1::DesiredState,
}

/// What of a group its two ends have.
#[derive(Default)]
struct Ends<'a> {
    source: Option<(&'a Observed, &'a v1::SourceGroup)>,
    target: Option<(&'a Observed, &'a v1::TargetStream)>,
}

/// Takes over what is newer at the proxies that have been asked so far. Doing it again with more of them adds what those
/// say. `settle` once no more are waited for: policies, which many groups share, are judged by all of them.
pub fn adopt(
    model: &Model,
    all: &[Observed],
    settle: bool,
    keys: &Wrapper,
    now_ns: u64,
    restored: &mut Restored,
    txn: &mut Txn,
) {
    let mut ends: BTreeMap<&str, Ends<'_>> = BTreeMap::new();
    for observed in all {
        for group in observed.state.sources.iter().filter(|g| !back::is_source(g)) {
            ends.entry(&group.stream_uid).or_default().source = Some((observed, group));
        }
        for stream in observed.state.targets.iter().filter(|t| !back::is_target(t)) {
            ends.entry(&stream.stream_uid).or_default().target = Some((observed, stream));
        }
    }
    revocations(model, all, now_ns, restored, txn);
    let mut found: Vec<Found> = Vec::new();
    for (uid, ends) in &ends {
        let known = model.group_by_uid(uid).cloned();
        let created = known.is_none();
        let group = match known {
            Some(group) => group,
            None => match new_group(model, uid, ends, now_ns, restored, txn) {
                Some(group) => group,
                None => continue,
            },
        };
        let before = group.clone();
        let mut group = merged(model, group, ends, all, now_ns, restored, txn);
        take_keys(model, &mut group, ends, keys, created, restored, txn);
        let promises = promises_of(model, &group, ends);
        found.push(Found { touched: group != before, group, promises, created });
    }
    policies(model, found, settle, now_ns, restored, txn);
}

/// Proxies' certificates that were revoked after the backup, as their peers were told. Those of people nobody was told.
fn revocations(model: &Model, all: &[Observed], now_ns: u64, restored: &mut Restored, txn: &mut Txn) {
    let pins: BTreeSet<String> =
        all.iter().flat_map(|o| &o.state.revoked_key_pins).map(|pin| crate::ca::hex(pin)).collect();
    for known in model.certificates.values().filter(|c| c.revoked.is_none() && pins.contains(&c.pin)) {
        let by = "a proxy that had been told so".to_owned();
        let revoked = Some(Revoked { at_ns: now_ns, by, reason: "restored from a backup".to_owned() });
        restored.note(format!("the certificate {} of {} was revoked since", known.serial, known.holder()));
        txn.put(Object::Certificate(Certificate { revoked, ..known.as_ref().clone() }));
    }
}

/// A group, and what it has been promised.
struct Found {
    group: Group,
    promises: Promises,
    /// Made after the backup.
    created: bool,
    /// Something of it is newer than in the backup.
    touched: bool,
}

/// A group that was made after the backup, as its source has it.
fn new_group(
    model: &Model,
    uid: &str,
    ends: &Ends<'_>,
    now_ns: u64,
    restored: &mut Restored,
    txn: &mut Txn,
) -> Option<Group> {
    // Both have to say so: one alone could make the other take something.
    let (observed, said) = ends.source?;
    let (_, _) = ends.target?;
    let name = Name::new(&observed.proxy.tenant, Kind::Group, &said.name);
    let target = model.proxy_by_uid(&said.target_uid);
    let Some(target) = target.filter(|_| model.group(&name).is_err()) else {
        restored.note(format!("group \"{}\": made after the backup; its target or its name is not known", said.name));
        return None;
    };
    let key = said.key.as_ref().filter(|k| k.key.len() == KEY_LEN)?;
    said.disks.iter().for_each(|d| txn.put(Object::Disk(disk(d, uid, now_ns))));
    restored.note(format!("group \"{}\": made after the backup; taken over from \"{}\"", said.name, observed.proxy.id));
    Some(Group {
        uid: uid.to_owned(),
        tenant: observed.proxy.tenant.clone(),
        id: said.name.clone(),
        version: 0,
        created_ns: now_ns,
        updated_ns: now_ns,
        description: String::new(),
        policy: String::new(),
        source: observed.proxy.id.clone(),
        target: target.id.clone(),
        key: key.id.clone(),
        generation: 1,
        writer_generation: 1,
        next_slot: next_slot(said),
        phase: GroupPhase::Protecting,
        hold: false,
        complete: false,
        request_id: String::new(),
        placement: String::new(),
        reverse: None,
        overwritten: false,
        leftovers: Vec::new(),
        older_keys: Vec::new(),
        next_key: String::new(),
        pause: None,
    })
}

/// Keys that came after the backup: what was written under them would not open without. The source says under which it
/// writes; each end keeps those before.
fn take_keys(
    model: &Model,
    group: &mut Group,
    ends: &Ends<'_>,
    keys: &Wrapper,
    created: bool,
    restored: &mut Restored,
    txn: &mut Txn,
) {
    let at_source = ends.source.and_then(|(_, s)| s.key.as_ref());
    let at_target = ends.target.and_then(|(_, s)| s.key.as_ref());
    let mut newer = false;
    for said in at_target.into_iter().chain(at_source).flat_map(|k| std::iter::once(k).chain(&k.older)) {
        if said.key.len() != KEY_LEN || said.id.is_empty() {
            continue;
        }
        if !model.keys.contains_key(&said.id) {
            let Ok(record) = keys.wrap(&said.id, &said.key) else { continue };
            txn.put(Object::Key(record));
        }
        if !group.all_keys().any(|id| id == said.id) {
            group.older_keys.insert(0, said.id.clone());
            newer = true;
        }
    }
    // One that only the target has is older, whatever it was to become: it is rotated again where that is wanted.
    let current = at_source.map(|k| k.id.clone()).filter(|id| *id != group.key && group.older_keys.contains(id));
    if let Some(current) = current {
        group.older_keys.retain(|id| *id != current);
        group.older_keys.insert(0, std::mem::replace(&mut group.key, current));
        // What was to be the next one then has been, or never will be.
        group.older_keys.extend(Some(std::mem::take(&mut group.next_key)).filter(|id| !id.is_empty()));
    }
    if newer && !created {
        restored.note(format!("group \"{}\": its key was rotated since", group.id));
    }
}

/// A disk as its source has it.
fn disk(said: &v1::SourceDisk, group_uid: &str, now_ns: u64) -> Disk {
    Disk {
        uid: said.uid.clone(),
        group_uid: group_uid.to_owned(),
        id: said.name.clone(),
        slot: said.slot as u16,
        path: said.path.clone(),
        serial: said.serial.clone(),
        size: said.size_bytes,
        block: said.block_bytes,
        physical_block: said.physical_block_bytes,
        export_name: said.export_name.clone(),
        created_ns: now_ns,
        leaving: false,
        seed_path: String::new(),
    }
}

/// The first slot that no disk of the group has, or has had.
fn next_slot(said: &v1::SourceGroup) -> u16 {
    let slots = said.disks.iter().map(|d| d.slot).chain(said.left_slots.iter().copied());
    slots.max().map_or(0, |s| s as u16 + 1)
}

/// The group with what its ends know better.
fn merged(
    model: &Model,
    mut group: Group,
    ends: &Ends<'_>,
    all: &[Observed],
    now_ns: u64,
    restored: &mut Restored,
    txn: &mut Txn,
) -> Group {
    let name = group.id.clone();
    if let Some((_, said)) = ends.source {
        let writes = said.disks.iter().map(|d| d.generation).max().unwrap_or(0);
        group.writer_generation = group.writer_generation.max(writes);
        if said.hold && !group.hold {
            restored.note(format!("group \"{name}\": its source was told to hold all I/O since"));
            group.hold = true;
        }
        if said.paused != group.pause.is_some() {
            let what = if said.paused { "paused" } else { "resumed, or failed over," };
            restored.note(format!("group \"{name}\": it was {what} since"));
            let by = "a source that had been told so".to_owned();
            group.pause = said.paused.then(|| Pause { at_ns: now_ns, by, reason: "restored from a backup".to_owned() });
        }
        disks(model, &group, said, now_ns, restored, txn);
        group.next_slot = group.next_slot.max(next_slot(said));
    }
    if let Some((_, said)) = ends.target {
        let held = said.disks.iter().map(|d| d.generation).max().unwrap_or(0);
        group.generation = group.generation.max(held);
        let runs_from = views(model, &group, said, now_ns, txn);
        let failed_over = runs_from.is_some();
        let was = matches!(group.phase, GroupPhase::FailedOver { .. });
        let back = matches!(group.phase, GroupPhase::FailingBack { .. });
        if let Some(view) = runs_from.clone() {
            if !was && !back {
                restored.note(format!("group \"{name}\": failed over since; it runs from its view"));
            }
            group.phase = GroupPhase::FailedOver { view };
        } else if was && ends.source.is_some_and(|(_, s)| !s.hold) {
            restored.note(format!("group \"{name}\": its failover was undone since"));
            group.phase = GroupPhase::Protecting;
        }
        // Whoever wrote has lost the disks: its I/O stays held, also if it says nothing itself. Only both ends together
        // may say that it goes on.
        let goes_on = !failed_over && ends.source.is_some_and(|(_, s)| !s.hold);
        group.hold = failed_over || (group.hold && !goes_on);
        let released = ends.source.is_some_and(|(_, s)| !s.hold);
        back::adopt(model, &mut group, all, runs_from.as_deref(), released, restored, txn);
        group.overwritten &= group.phase != GroupPhase::Protecting;
        group.pause = group.pause.take().filter(|_| !failed_over);
    }
    group.generation = group.generation.max(group.writer_generation);
    group
}

/// Disks that came or went after the backup.
fn disks(model: &Model, group: &Group, said: &v1::SourceGroup, now_ns: u64, restored: &mut Restored, txn: &mut Txn) {
    let known: Vec<&Disk> = model.disks_of(group).collect();
    if known.is_empty() {
        return;
    }
    for disk in said.disks.iter().filter(|d| !known.iter().any(|k| k.uid == d.uid)) {
        restored.note(format!("group \"{}\": disk \"{}\" was added since", group.id, disk.name));
        txn.put(Object::Disk(self::disk(disk, &group.uid, now_ns)));
    }
    for disk in known.into_iter().filter(|k| said.left_slots.contains(&u32::from(k.slot))) {
        restored.note(format!("group \"{}\": disk \"{}\" has left it since", group.id, disk.id));
        txn.delete(Object::Disk(disk.clone()));
    }
}

/// Views as their target has them; whether the group runs from one.
fn views(model: &Model, group: &Group, said: &v1::TargetStream, now_ns: u64, txn: &mut Txn) -> Option<String> {
    // What a group that was failing back ran from is kept by name: see `back`.
    let ran_from = |v: &View| group.reverse.as_ref().is_some_and(|r| r.view == v.id);
    let named = |v: &View| said.views.iter().any(|o| o.view == v.proxy_name()) || ran_from(v);
    // What is kept of one that is closed nobody names.
    let gone: Vec<View> = model.views_of(group).filter(|v| !named(v) && !v.kept).cloned().collect();
    gone.into_iter().for_each(|v| txn.delete(Object::View(v)));
    let mut runs_from = None;
    for open in &said.views {
        let Some(id) = open.view.rsplit('.').next().filter(|id| !id.is_empty()) else { continue };
        if open.kind() == v1::ViewKind::Failover {
            runs_from = Some(id.to_owned());
        }
        if model.views_of(group).any(|v| v.id == id) {
            continue;
        }
        let kind = match open.kind() {
            v1::ViewKind::Failover => ViewKind::Failover,
            v1::ViewKind::Test => ViewKind::Test,
            _ => ViewKind::Browse,
        };
        let disks = match open.disk_uids.is_empty() {
            true => said.disks.iter().map(|d| d.uid.clone()).collect(),
            false => open.disk_uids.clone(),
        };
        txn.put(Object::View(View {
            uid: new_uid(),
            tenant: group.tenant.clone(),
            group: group.id.clone(),
            id: id.to_owned(),
            version: 1,
            created_ns: now_ns,
            kind,
            writable: open.writable,
            point: PointRecord { seq: open.seq, disks, ..PointRecord::default() },
            disk_uids: open.disk_uids.clone(),
            exports: Vec::new(),
            reason: open.reason.clone(),
            open: true,
            closing: false,
            kept: false,
            request_id: String::new(),
        }));
    }
    runs_from
}

/// What the ends of a group have been promised for it, over what its policy says.
fn promises_of(model: &Model, group: &Group, ends: &Ends<'_>) -> Promises {
    let known = model.policy_of(group).map(|p| p.promises.clone());
    let mut promises = known.unwrap_or_else(Promises::usual);
    if let Some((_, said)) = ends.source {
        promises.cut_interval_ms = said.cut_interval_ms;
        promises.compression =
            if said.compression() == v1::Compression::Off { Compression::Off } else { Compression::Auto };
        if said.rpo_target_us != 0 {
            promises.rpo_target_us = said.rpo_target_us;
        }
        (promises.lease_ms, promises.sync_deadline_ms) = (said.lease_ms, said.sync_deadline_ms);
        // One that was told by an earlier version knows no hours.
        if !said.time_zone.is_empty() {
            promises.bandwidth_bytes_per_s = said.bandwidth_bytes_per_s;
            promises.allowed_hours.clone_from(&said.allowed_hours);
            promises.time_zone.clone_from(&said.time_zone);
            promises.priority = said.priority;
        }
    }
    if let Some((_, said)) = ends.target {
        (promises.retention_s, promises.journal_budget_bytes) = (said.retention_s, said.journal_budget_bytes);
    }
    promises
}

/// Policies become what the groups that name them have been promised, all of them alike; a group that was promised something
/// else gets a policy of its own. History that a proxy keeps is not shortened by an older word.
fn policies(model: &Model, groups: Vec<Found>, settle: bool, now_ns: u64, restored: &mut Restored, txn: &mut Txn) {
    let key_of = |group: &Group| (group.tenant.clone(), group.policy.clone());
    let mut changed: BTreeMap<(String, String), Promises> = BTreeMap::new();
    for (key, policy) in model.policies.iter().filter(|_| settle) {
        let own = || groups.iter().filter(|f| !f.created && key_of(&f.group) == *key);
        let named = model.groups.values().filter(|g| key_of(g) == *key).count();
        let Some(first) = own().next().map(|f| &f.promises) else { continue };
        if *first != policy.promises && own().count() == named && own().all(|f| f.promises == *first) {
            restored.note(format!("policy \"{}\": changed since", policy.id));
            changed.insert(key.clone(), first.clone());
        }
    }
    for Found { mut group, promises, created, mut touched } in groups {
        let as_said =
            |key: &(String, String)| changed.get(key).or_else(|| model.policies.get(key).map(|p| &p.promises));
        if (created || settle) && as_said(&key_of(&group)) != Some(&promises) {
            let same = |(key, p): &(&(String, String), &Policy)| key.0 == group.tenant && p.promises == promises;
            let known = model.policies.iter().find(same).map(|(key, _)| key.1.clone());
            group.policy = known.filter(|_| created).unwrap_or_else(|| {
                let id = format!("restored-{}", group.id.chars().take(54).collect::<String>());
                restored.note(format!("policy \"{id}\": made for group \"{}\"", group.id));
                changed.insert((group.tenant.clone(), id.clone()), promises.clone());
                id
            });
            touched = true;
        }
        if touched || created {
            txn.put(Object::Group(Group { version: group.version + 1, updated_ns: now_ns, ..group }));
        }
    }
    for ((tenant, id), promises) in changed {
        let old = model.policies.get(&(tenant.clone(), id.clone()));
        txn.put(Object::Policy(Policy {
            uid: old.map_or_else(new_uid, |p| p.uid.clone()),
            tenant,
            id,
            version: old.map_or(1, |p| p.version + 1),
            created_ns: old.map_or(now_ns, |p| p.created_ns),
            updated_ns: now_ns,
            description: old
                .map_or_else(|| "as found at proxies after a restore".to_owned(), |p| p.description.clone()),
            promises,
        }));
    }
}

/// Streams that a proxy has and nobody else knows, with their groups' names.
pub fn unknown<'a>(model: &'a Model, observed: &'a Observed) -> impl Iterator<Item = (&'a str, &'a str)> {
    let sources = observed.state.sources.iter().map(|s| (s.stream_uid.as_str(), s.name.as_str()));
    let targets = observed.state.targets.iter().map(|t| (t.stream_uid.as_str(), t.name.as_str()));
    sources.chain(targets).filter(|(uid, _)| model.stream(uid).is_none())
}

/// Groups that the backup knows and neither of their proxies does, of which both have been asked: ended since.
pub fn ended<'a>(model: &'a Model, all: &'a [Observed]) -> impl Iterator<Item = &'a Group> {
    let asked = |id: &str, tenant: &str| all.iter().find(|o| o.proxy.id == id && o.proxy.tenant == tenant);
    model.groups.values().filter(move |group| {
        let (Some(source), Some(target)) = (asked(&group.source, &group.tenant), asked(&group.target, &group.tenant))
        else {
            return false;
        };
        // Made, but not told to them before the backup's coordinator was gone: there is nothing to end, nor to lose.
        !source.state.sources.iter().any(|s| s.stream_uid == group.uid)
            && !target.state.targets.iter().any(|t| t.stream_uid == group.uid)
    })
}

/// Proxies that groups name and that have not been asked yet.
pub fn unseen<'a>(model: &'a Model, restored: &'a Restored) -> impl Iterator<Item = &'a Proxy> {
    let named =
        |p: &Proxy| model.groups.values().any(|g| g.tenant == p.tenant && (g.source == p.id || g.target == p.id));
    model.proxies.values().filter(move |p| named(p) && !restored.seen.contains(&p.uid))
}

#[cfg(test)]
#[path = "restore_tests.rs"]
mod tests;
