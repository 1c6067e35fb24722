//! What a proxy should be, from the objects: a pure function. A proxy gets nothing of groups that are not its own, and
//! policy keys only of those.

use afterimage_wire::v1;

use crate::ca;
use crate::convert::{compression_to_proto, view_kind_to_proto};
use crate::escrow::EscrowKey;
use crate::keys::{KEY_LEN, unhex};
use crate::machine::{Machine, MachineDisk, Role, source_disk};
use crate::model::Model;
use crate::objects::{Disk, Group, GroupPhase, Proxy, Reverse, View, proxy_view_name};

/// The desired state of a proxy at this model's revision. `key` opens a policy key; a group whose key does not open is
/// left out and named in the second part of the result.
pub fn desired(
    model: &Model,
    proxy: &Proxy,
    mut key: impl FnMut(&str) -> Option<[u8; KEY_LEN]>,
    recovery: Option<&EscrowKey>,
) -> (v1::DesiredState, Vec<String>) {
    let mut state = v1::DesiredState { term: model.term, version: model.version(), ..v1::DesiredState::default() };
    let mut without_key = Vec::new();
    let groups = model.groups.values().filter(|g| g.tenant == proxy.tenant && g.phase != GroupPhase::Deleting);
    for group in groups {
        let (is_source, is_target) = (group.source == proxy.id, group.target == proxy.id);
        if !is_source && !is_target {
            continue;
        }
        let Some(held) = policy_key(group, is_source, &mut key, recovery) else {
            without_key.push(group.name().to_string());
            continue;
        };
        let peer = if is_source { model.target_of(group) } else { model.source_of(group) };
        if let Some(peer) = peer
            && !state.peers.iter().any(|p| p.uid == peer.uid)
        {
            state.peers.push(as_peer(peer));
        }
        if is_source {
            state.targets.extend(group.reverse.as_ref().map(|r| reverse_target(model, group, r, held.clone())));
            state.sources.push(source_group(model, group, held));
        } else {
            // As its source: under the key that both ends have.
            let reverse = group.reverse.as_ref().zip(policy_key(group, true, &mut key, None));
            state.sources.extend(reverse.map(|(r, key)| reverse_source(model, group, r, key)));
            let mut stream = target_stream(model, group, held);
            stream.recovery_key = recovery.map(|r| r.id.to_vec()).unwrap_or_default();
            state.targets.push(stream);
        }
    }
    let revoked = model.certificates.values().filter(|c| c.tenant == proxy.tenant && c.revoked.is_some());
    let pins = revoked.filter(|c| c.role == ca::Role::Proxy && c.uid != proxy.uid).filter_map(|c| unhex(&c.pin));
    state.revoked_key_pins = pins.collect();
    for peer in &mut state.peers {
        peer.key_pins.retain(|pin| !state.revoked_key_pins.contains(pin));
    }
    (state, without_key)
}

/// The key that a proxy writes under, and those that it needs for what is older. A target has the next one before its source
/// writes under it.
fn policy_key(
    group: &Group,
    is_source: bool,
    key: &mut impl FnMut(&str) -> Option<[u8; KEY_LEN]>,
    recovery: Option<&EscrowKey>,
) -> Option<v1::PolicyKey> {
    let mut one = |id: &str| {
        let bytes = key(id)?;
        let ids = recovery.and_then(|r| Some((r, group.uid.parse().ok()?, id.parse().ok()?)));
        let sealed = ids.filter(|_| !is_source).map(|(r, stream, id)| r.seal(stream, id, &bytes).to_vec());
        let recovery = sealed.unwrap_or_default();
        Some(v1::PolicyKey { id: id.to_owned(), key: bytes.to_vec(), recovery, older: Vec::new() })
    };
    let mut ids = group.all_keys().skip(usize::from(is_source && !group.next_key.is_empty()));
    let mut newest = one(ids.next()?)?;
    newest.older = ids.map(one).collect::<Option<_>>()?;
    Some(newest)
}

fn as_peer(proxy: &Proxy) -> v1::Peer {
    // While a proxy changes its key both are good: it may have the new one and not use it yet.
    let pins = std::iter::once(&proxy.pin).chain(&proxy.previous_pin);
    v1::Peer { uid: proxy.uid.clone(), name: proxy.id.clone(), key_pins: pins.filter_map(|p| unhex(p)).collect() }
}

fn source_group(model: &Model, group: &Group, key: v1::PolicyKey) -> v1::SourceGroup {
    let target = model.target_of(group);
    let promises = model.policy_of(group).map(|p| &p.promises);
    let disk = |d: &Disk| v1::SourceDisk {
        uid: d.uid.clone(),
        slot: d.slot.into(),
        name: d.id.clone(),
        path: d.path.clone(),
        export_name: d.export_name.clone(),
        serial: d.serial.clone(),
        size_bytes: d.size,
        block_bytes: d.block,
        physical_block_bytes: d.physical_block,
        generation: group.writer_generation,
        view: String::new(),
    };
    v1::SourceGroup {
        stream_uid: group.uid.clone(),
        name: group.id.clone(),
        key: Some(key),
        cut_interval_ms: promises.map_or(1000, |p| p.cut_interval_ms),
        compression: promises.map_or(v1::Compression::Auto, |p| compression_to_proto(p.compression)).into(),
        disks: model.disks_of(group).map(disk).collect(),
        target_address: target.map(|t| t.data_address.clone()).unwrap_or_default(),
        target_uid: target.map(|t| t.uid.clone()).unwrap_or_default(),
        hold: group.hold,
        rpo_target_us: promises.map_or(0, |p| p.rpo_target_us),
        lease_ms: promises.map_or(0, |p| p.lease_ms),
        // Nobody waits for a target that is sent nothing.
        sync_deadline_ms: promises.filter(|_| group.pause.is_none()).map_or(0, |p| p.sync_deadline_ms),
        left_slots: left_slots(model, group),
        bandwidth_bytes_per_s: promises.map_or(0, |p| p.bandwidth_bytes_per_s),
        allowed_hours: promises.map(|p| p.allowed_hours.clone()).unwrap_or_default(),
        time_zone: promises.map(|p| p.time_zone.clone()).unwrap_or_default(),
        priority: promises.map_or(0, |p| p.priority),
        paused: group.pause.is_some(),
    }
}

/// Slots that disks of the group once had.
fn left_slots(model: &Model, group: &Group) -> Vec<u32> {
    let taken: Vec<u16> = model.disks_of(group).map(|d| d.slot).collect();
    (0..group.next_slot).filter(|slot| !taken.contains(slot)).map(u32::from).collect()
}

fn target_stream(model: &Model, group: &Group, key: v1::PolicyKey) -> v1::TargetStream {
    let promises = model.policy_of(group).map(|p| &p.promises);
    let disk = |d: &Disk| v1::TargetDisk {
        uid: d.uid.clone(),
        slot: d.slot.into(),
        name: d.id.clone(),
        serial: d.serial.clone(),
        size_bytes: d.size,
        block_bytes: d.block,
        physical_block_bytes: d.physical_block,
        generation: group.generation,
        seed_path: d.seed_path.clone(),
        base_path: String::new(),
    };
    v1::TargetStream {
        stream_uid: group.uid.clone(),
        name: group.id.clone(),
        key: Some(key),
        retention_s: promises.map_or(14_400, |p| p.retention_s),
        journal_budget_bytes: promises.map_or(0, |p| p.journal_budget_bytes),
        disks: model.disks_of(group).map(disk).collect(),
        source_uid: model.source_of(group).map(|s| s.uid.clone()).unwrap_or_default(),
        views: model.views_of(group).filter(|v| v.open && !v.closing).map(|v| open_view(group, v)).collect(),
        recovery_key: Vec::new(),
        machines: replicas(model, group),
    }
}

/// The machines of a group that its target itself starts.
fn replicas(model: &Model, group: &Group) -> Vec<v1::StartInstance> {
    let driven = |m: &&Machine| m.place(Role::Replica).is_driven() && m.proxy_of(Role::Replica, group) == group.target;
    let start = |m: &Machine| {
        let disks: Vec<MachineDisk> = m.disks_in(model, group).into_iter().map(Into::into).collect();
        m.instance(Role::Replica, disks.iter().map(source_disk).collect())
    };
    model.machines_of(group).filter(driven).map(start).collect()
}

/// The other way, at the group's target: the disks are those of the view. It keeps to no hours, since who waits for a failback
/// waits for it, and to no lease, since nobody takes the view from it unasked.
fn reverse_source(model: &Model, group: &Group, reverse: &Reverse, key: v1::PolicyKey) -> v1::SourceGroup {
    let forth = source_group(model, group, key);
    let source = model.source_of(group);
    let view = proxy_view_name(&group.tenant, &group.id, &reverse.view);
    let exports = model.view(&group.name(), &reverse.view).map(|v| v.exports.clone()).unwrap_or_default();
    let disk = |d: v1::SourceDisk| v1::SourceDisk {
        path: String::new(),
        export_name: match exports.iter().find(|e| e.disk_uid == d.uid) {
            Some(export) => export.name.clone(),
            None => format!("{view}/{}", d.name),
        },
        generation: reverse.writer_generation,
        view: view.clone(),
        ..d
    };
    v1::SourceGroup {
        stream_uid: reverse.stream_uid.clone(),
        disks: forth.disks.into_iter().map(disk).collect(),
        target_address: source.map(|s| s.data_address.clone()).unwrap_or_default(),
        target_uid: source.map(|s| s.uid.clone()).unwrap_or_default(),
        hold: reverse.hold,
        lease_ms: 0,
        sync_deadline_ms: 0,
        allowed_hours: Vec::new(),
        paused: false,
        ..forth
    }
}

/// The other way, at the group's source: what comes is kept beside its disks, and begins with what they hold.
fn reverse_target(model: &Model, group: &Group, reverse: &Reverse, key: v1::PolicyKey) -> v1::TargetStream {
    let forth = target_stream(model, group, key);
    let path = |uid: &str| model.disks_of(group).find(|d| d.uid == uid).map(|d| d.path.clone()).unwrap_or_default();
    let disk = |d: v1::TargetDisk| v1::TargetDisk {
        generation: reverse.generation,
        seed_path: String::new(),
        base_path: path(&d.uid),
        ..d
    };
    v1::TargetStream {
        stream_uid: reverse.stream_uid.clone(),
        disks: forth.disks.into_iter().map(disk).collect(),
        source_uid: model.target_of(group).map(|t| t.uid.clone()).unwrap_or_default(),
        views: Vec::new(),
        machines: Vec::new(),
        ..forth
    }
}

/// The command that opens a view, also after a restart of its proxy.
pub fn open_view(group: &Group, view: &View) -> v1::OpenView {
    v1::OpenView {
        stream_uid: group.uid.clone(),
        view: view.proxy_name(),
        seq: view.point.seq,
        disk_uids: view.disk_uids.clone(),
        writable: view.writable,
        kind: view_kind_to_proto(view.kind).into(),
        reason: view.reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::{Certificate, Revoked};
    use crate::group::tests::{first_disk, policy, proxy};
    use crate::model::Txn;
    use crate::names::{Kind, Name};
    use crate::objects::Object;
    use crate::policy::Wanted;

    fn model() -> Model {
        let mut txn = Txn::default();
        for (id, address) in [("src", ""), ("dr", "dr:1"), ("other", "o:1")] {
            txn.put(Object::Proxy(proxy(id, address)));
        }
        txn.put(Object::Policy(policy("gold", &Wanted { retention_s: Some(60), ..Wanted::default() })));
        let mut model = Model::default().applied(txn, 7);
        let asked = v1::Group {
            policy: "tenants/default/policies/gold".into(),
            source: "tenants/default/proxies/src".into(),
            target: "tenants/default/proxies/dr".into(),
            ..v1::Group::default()
        };
        let name = Name::new("default", Kind::Group, "shop");
        let mut group = crate::group::new_group(&model, &name, &asked, 1).unwrap();
        group.generation = 5;
        group.writer_generation = 4;
        let mut txn = Txn::default();
        txn.put(Object::Disk(first_disk(&group)));
        txn.put(Object::Group(group));
        model = model.applied(txn, 8);
        model
    }

    fn of(model: &Model, id: &str) -> v1::DesiredState {
        let proxy = &model.proxies[&("default".to_owned(), id.to_owned())];
        desired(model, proxy, |_| Some([1; 32]), None).0
    }

    #[test]
    fn each_end_gets_its_own_part() {
        let model = model();
        let (source, target) = (of(&model, "src"), of(&model, "dr"));
        assert_eq!((source.sources.len(), source.targets.len(), source.version), (1, 0, 8));
        assert_eq!((target.sources.len(), target.targets.len()), (0, 1));
        assert_eq!(source.sources[0].target_address, "dr:1");
        assert_eq!(source.peers[0].name, "dr");
        assert_eq!(target.peers[0].name, "src");
        assert_eq!(target.targets[0].retention_s, 60);
    }

    #[test]
    fn while_it_fails_back_each_end_has_the_other_stream_too() {
        let mut model = model();
        let mut group = model.groups.values().next().unwrap().clone();
        group.hold = true;
        group.reverse = Some(Reverse {
            stream_uid: "back".into(),
            view: "failover".into(),
            generation: 3,
            writer_generation: 2,
            hold: true,
        });
        let mut txn = Txn::default();
        txn.put(Object::Group(group.clone()));
        let source = model.proxies[&("default".to_owned(), "src".to_owned())].clone();
        txn.put(Object::Proxy(Proxy { data_address: "src:1".into(), ..source.clone() }));
        model = model.applied(txn, 9);
        let (at_source, at_target) = (of(&model, "src"), of(&model, "dr"));
        let disk = model.disks_of(&group).next().unwrap();

        let back = &at_target.sources[0];
        assert_eq!((back.stream_uid.as_str(), back.hold, back.target_address.as_str()), ("back", true, "src:1"));
        assert_eq!((&back.target_uid, back.lease_ms), (&source.uid, 0));
        let d = &back.disks[0];
        assert_eq!((d.view.as_str(), d.path.as_str(), d.generation), ("shop.failover", "", 2));
        assert_eq!((d.export_name.clone(), &d.uid), (format!("shop.failover/{}", disk.id), &disk.uid));
        assert_eq!(at_target.targets[0].stream_uid, group.uid);

        let kept = &at_source.targets[0];
        assert_eq!((kept.stream_uid.as_str(), kept.source_uid.clone()), ("back", at_source.peers[0].uid.clone()));
        let d = &kept.disks[0];
        assert_eq!((&d.base_path, d.generation, d.seed_path.as_str()), (&disk.path, 3, ""));
        assert!(at_source.sources[0].hold, "its own stays held");
        assert_eq!(at_source.sources[0].disks[0].view, "");
    }

    #[test]
    fn a_source_whose_disks_were_taken_is_not_given_the_new_generation() {
        let model = model();
        assert_eq!(of(&model, "src").sources[0].disks[0].generation, 4);
        assert_eq!(of(&model, "dr").targets[0].disks[0].generation, 5);
    }

    #[test]
    fn a_proxy_gets_nothing_of_groups_that_are_not_its_own() {
        let model = model();
        let state = of(&model, "other");
        assert!(state.sources.is_empty() && state.targets.is_empty() && state.peers.is_empty());
    }

    #[test]
    fn a_revoked_key_is_no_pin_any_more_and_is_named() {
        let model = model();
        let peer = model.proxies[&("default".to_owned(), "dr".to_owned())].clone();
        let key = |seed: &str| seed.repeat(32);
        let certificate = |serial: &str, name: &str, uid: &str, pin: String, revoked| Certificate {
            role: ca::Role::Proxy,
            uid: uid.to_owned(),
            pin,
            revoked,
            ..crate::certificates::tests::certificate(serial, name, 1, 9)
        };
        let revoked = || Some(Revoked { at_ns: 1, by: "admin/a".into(), reason: String::new() });
        let mut txn = Txn::default();
        txn.put(Object::Certificate(certificate("1", "dr", &peer.uid, key("aa"), revoked())));
        txn.put(Object::Certificate(certificate("2", "dr", &peer.uid, key("bb"), None)));
        txn.put(Object::Certificate(certificate("3", "other", "o", key("cc"), revoked())));
        txn.put(Object::Proxy(Proxy { pin: key("bb"), previous_pin: Some(key("aa")), ..peer }));
        let model = model.applied(txn, 9);
        let source = of(&model, "src");
        assert_eq!(source.peers[0].key_pins, [vec![0xbb; 32]]);
        assert_eq!(source.revoked_key_pins, [vec![0xaa; 32], vec![0xcc; 32]]);
        // Its own is not told to who may hold it no more.
        assert_eq!(of(&model, "dr").revoked_key_pins, [vec![0xcc; 32]]);
    }

    #[test]
    fn a_target_has_the_next_key_before_its_source_and_both_have_the_older_ones() {
        let model = model();
        let group = model.groups.values().next().unwrap().clone();
        let uid = || crate::objects::new_uid();
        let (next, key, older) = (uid(), uid(), uid());
        let mut txn = Txn::default();
        let older_keys = vec![older.clone()];
        txn.put(Object::Group(Group { key: key.clone(), next_key: next.clone(), older_keys, ..group }));
        let model = model.applied(txn, 9);
        let recovery = EscrowKey::new(crate::escrow::Holder::Recovery, &[5; 32]);
        let told = |id: &str| {
            let proxy = &model.proxies[&("default".to_owned(), id.to_owned())];
            desired(&model, proxy, |_| Some([1; 32]), Some(&recovery)).0
        };
        let ids = |key: &v1::PolicyKey| {
            std::iter::once(&key.id).chain(key.older.iter().map(|k| &k.id)).cloned().collect::<Vec<_>>()
        };
        let (source, target) = (&told("src").sources[0], &told("dr").targets[0]);
        assert_eq!(ids(source.key.as_ref().unwrap()), [key.clone(), older.clone()]);
        assert_eq!(ids(target.key.as_ref().unwrap()), [next.clone(), key, older]);
        let sealed = &target.key.as_ref().unwrap().recovery;
        let stream = target.stream_uid.parse().unwrap();
        assert_eq!(recovery.open(stream, next.parse().unwrap(), sealed), Some([1; 32]));
        assert!(source.key.as_ref().unwrap().recovery.is_empty());
        assert_eq!(target.recovery_key, recovery.id);
        // Nothing that has not changed looks changed.
        assert_eq!(told("dr").targets[0], *target);
    }

    #[test]
    fn a_group_without_its_key_is_named_and_left_out() {
        let model = model();
        let proxy = &model.proxies[&("default".to_owned(), "src".to_owned())];
        let (state, missing) = desired(&model, proxy, |_| None, None);
        assert!(state.sources.is_empty());
        assert_eq!(missing, ["tenants/default/groups/shop"]);
    }
}
