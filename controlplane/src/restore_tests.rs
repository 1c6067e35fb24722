//! What is taken over from proxies after a restore, case by case.

use super::*;
use crate::desired::desired;
use crate::failover::FAILOVER_VIEW;
use crate::group::tests::{first_disk, policy, proxy};
use crate::policy::Wanted;

const KEY: [u8; 32] = [7; 32];

/// A policy, a group of one disk, its proxies.
fn model() -> Model {
    let mut txn = Txn::default();
    for (id, address) in [("src", ""), ("dr", "dr:1")] {
        txn.put(Object::Proxy(proxy(id, address)));
    }
    txn.put(Object::Policy(gold(3600)));
    txn.put(Object::Restored(Restored { observing: true, offset: 50, ..Restored::default() }));
    let model = Model::default().applied(txn, 7);
    add(&model, "shop", 8)
}

fn gold(retention_s: u64) -> Policy {
    let wanted = Wanted { retention_s: Some(retention_s), ..Wanted::default() };
    Policy { uid: "gold".into(), ..policy("gold", &wanted) }
}

fn add(model: &Model, id: &str, revision: u64) -> Model {
    let asked = v1::Group {
        policy: "tenants/default/policies/gold".into(),
        source: "tenants/default/proxies/src".into(),
        target: "tenants/default/proxies/dr".into(),
        ..v1::Group::default()
    };
    let group = crate::group::new_group(model, &Name::new("default", Kind::Group, id), &asked, 1).unwrap();
    let mut txn = Txn::default();
    txn.put(Object::Disk(first_disk(&group)));
    txn.put(Object::Group(Group { next_slot: 1, ..group }));
    model.applied(txn, revision)
}

#[test]
fn a_proxys_certificate_that_was_revoked_since_stays_revoked() {
    let old = model();
    let certificate = Certificate {
        role: crate::ca::Role::Proxy,
        uid: old.proxies[&("default".to_owned(), "src".to_owned())].uid.clone(),
        pin: "aa".repeat(32),
        ..crate::certificates::tests::certificate("1", "src", 1, 9)
    };
    let with = |model: &Model, certificate: Certificate| {
        let mut txn = Txn::default();
        txn.put(Object::Certificate(certificate));
        model.applied(txn, model.revision + 1)
    };
    let old = with(&old, certificate.clone());
    let revoked = Some(Revoked { at_ns: 5, by: "admin/a".into(), reason: String::new() });
    let newer = with(&old, Certificate { revoked, ..certificate });
    let (model, restored) = after(&old, &newer, &["dr"]);
    assert!(model.certificate("default", "1").unwrap().revoked.is_some());
    assert!(restored.findings.iter().any(|f| f.contains("proxy/src was revoked")), "{restored:?}");
}

fn changed(model: &Model, group: &str, change: impl FnOnce(&mut Group)) -> Model {
    let mut group = model.groups[&("default".to_owned(), group.to_owned())].clone();
    change(&mut group);
    let mut txn = Txn::default();
    txn.put(Object::Group(group));
    model.applied(txn, model.revision + 1)
}

/// What a proxy would have been told by a coordinator with this model.
fn told(model: &Model, id: &str) -> Observed {
    let proxy = model.proxies[&("default".to_owned(), id.to_owned())].clone();
    let (state, _) = desired(model, &proxy, |_| Some(KEY.to_vec()));
    Observed { proxy, state }
}

/// The old model after it has asked proxies that had been told by the newer.
fn after(old: &Model, newer: &Model, asked: &[&str]) -> (Model, Restored) {
    let folder = tempfile::tempdir().unwrap();
    let keys = Wrapper::open(&folder.path().join("keys.bin")).unwrap();
    let all: Vec<Observed> = asked.iter().map(|id| told(newer, id)).collect();
    let (mut model, mut restored) = (old.clone(), old.restored.clone().unwrap());
    // As they come, one after the other.
    for count in 1..=all.len() {
        let mut txn = Txn::default();
        adopt(&model, &all[..count], count == all.len(), &keys, 9, &mut restored, &mut txn);
        let revision = model.revision + 1;
        model = model.applied(txn, revision);
    }
    // Once more changes nothing.
    let mut txn = Txn::default();
    let before = restored.clone();
    adopt(&model, &all, true, &keys, 10, &mut restored, &mut txn);
    assert!(txn.is_empty() && restored == before, "{txn:?}");
    (model, restored)
}

fn shop(model: &Model) -> &Group {
    &model.groups[&("default".to_owned(), "shop".to_owned())]
}

fn orders() -> [[&'static str; 2]; 2] {
    [["src", "dr"], ["dr", "src"]]
}

#[test]
fn where_nothing_has_happened_nothing_is_changed() {
    let old = model();
    for order in orders() {
        let (model, restored) = after(&old, &old, &order);
        assert_eq!((model.groups, model.policies), (old.groups.clone(), old.policies.clone()));
        assert!(restored.findings.is_empty(), "{restored:?}");
    }
}

fn failed_over(old: &Model) -> Model {
    let newer = changed(old, "shop", |group| {
        group.phase = GroupPhase::FailedOver { view: FAILOVER_VIEW.into() };
        (group.hold, group.generation) = (true, 2);
    });
    let mut txn = Txn::default();
    txn.put(Object::View(View {
        uid: "v".into(),
        tenant: "default".into(),
        group: "shop".into(),
        id: FAILOVER_VIEW.into(),
        version: 1,
        created_ns: 1,
        kind: ViewKind::Failover,
        writable: true,
        point: PointRecord { seq: 90, ..PointRecord::default() },
        disk_uids: Vec::new(),
        exports: Vec::new(),
        reason: String::new(),
        open: true,
        closing: false,
        kept: false,
        request_id: String::new(),
    }));
    newer.applied(txn, newer.revision + 1)
}

#[test]
fn a_failover_since_is_taken_over_whoever_says_so() {
    let old = model();
    let newer = failed_over(&old);
    for asked in [&["src", "dr"][..], &["dr", "src"], &["dr"]] {
        let (model, restored) = after(&old, &newer, asked);
        let group = shop(&model);
        assert_eq!(group.phase, GroupPhase::FailedOver { view: FAILOVER_VIEW.into() }, "{asked:?}");
        assert!(group.hold && group.generation == 2 && group.writer_generation == 1, "{group:?}");
        assert_eq!(model.views.values().next().unwrap().point.seq, 90);
        assert!(restored.findings[..].iter().any(|f| f.contains("failed over since")), "{restored:?}");
    }
    // By its source alone: where it runs is not known, but its source stays held.
    let (model, _) = after(&old, &newer, &["src"]);
    assert!(shop(&model).hold);
}

#[test]
fn a_source_alone_does_not_let_itself_go_on() {
    // Failed over while the source was dead: it was never told.
    let old = failed_over(&model());
    let never_told = changed(&old, "shop", |group| (group.hold, group.phase) = (false, GroupPhase::Protecting));
    let (model, _) = after(&old, &never_told, &["src"]);
    assert!(shop(&model).hold);
    let folder = tempfile::tempdir().unwrap();
    let keys = Wrapper::open(&folder.path().join("keys.bin")).unwrap();
    let (mut restored, mut txn) = (old.restored.clone().unwrap(), Txn::default());
    adopt(&old, &[told(&never_told, "src"), told(&old, "dr")], true, &keys, 9, &mut restored, &mut txn);
    let model = old.applied(txn, 99);
    assert!(
        shop(&model).hold && matches!(shop(&model).phase, GroupPhase::FailedOver { .. }),
        "its target knows better"
    );
}

#[test]
fn a_failover_that_was_undone_since_is_no_failover() {
    let old = failed_over(&model());
    let mut txn = Txn::default();
    txn.delete(Object::View(old.views.values().next().unwrap().clone()));
    let newer = changed(&old, "shop", |group| {
        (group.hold, group.phase) = (false, GroupPhase::Protecting);
        (group.generation, group.writer_generation) = (3, 3);
    });
    let newer = newer.applied(txn, 20);
    for order in orders() {
        let (model, _) = after(&old, &newer, &order);
        let group = shop(&model);
        assert_eq!((&group.phase, group.hold), (&GroupPhase::Protecting, false), "{order:?}");
        assert_eq!((group.generation, group.writer_generation, model.views.len()), (3, 3, 0));
    }
}

#[test]
fn a_longer_retention_since_is_not_shortened() {
    let old = model();
    let mut txn = Txn::default();
    txn.put(Object::Policy(gold(86_400)));
    let newer = old.applied(txn, 9);
    for order in orders() {
        let (model, restored) = after(&old, &newer, &order);
        assert_eq!(model.policy_of(shop(&model)).unwrap().promises.retention_s, 86_400);
        assert_eq!(model.policies.len(), 1);
        assert!(restored.findings[0].contains("gold"));
    }
}

#[test]
fn a_group_that_was_moved_to_a_policy_that_nobody_knows_gets_one_of_its_own() {
    let old = add(&model(), "other", 9);
    let mut txn = Txn::default();
    txn.put(Object::Policy(Policy { id: "new".into(), uid: "n".into(), ..gold(86_400) }));
    let newer = changed(&old.applied(txn, 10), "shop", |group| group.policy = "new".into());
    for order in orders() {
        let (model, _) = after(&old, &newer, &order);
        let other = &model.groups[&("default".to_owned(), "other".to_owned())];
        assert_eq!(model.policy_of(shop(&model)).unwrap().promises.retention_s, 86_400, "{order:?}");
        assert_eq!(model.policy_of(other).unwrap().promises.retention_s, 3600, "{order:?}");
    }
}

#[test]
fn a_group_since_is_taken_over_with_its_key() {
    let old = model();
    let newer = add(&old, "later", 9);
    for order in orders() {
        let (model, restored) = after(&old, &newer, &order);
        let later = &model.groups[&("default".to_owned(), "later".to_owned())];
        let made = &newer.groups[&("default".to_owned(), "later".to_owned())];
        assert_eq!((&later.uid, &later.policy, later.next_slot), (&made.uid, &"gold".to_owned(), 1), "{restored:?}");
        assert_eq!(model.disks_of(later).count(), 1);
        assert!(model.keys.contains_key(&later.key));
        // What it would be told now is what it has.
        assert_eq!(told(&model, "src").state.sources, told(&newer, "src").state.sources);
    }
}

#[test]
fn a_group_that_ended_since_is_named_only_when_both_ends_say_so() {
    let old = add(&model(), "gone", 9);
    let newer = changed(&old, "gone", |group| group.phase = GroupPhase::Deleting);
    let named = |asked: &[&str]| {
        let all: Vec<Observed> = asked.iter().map(|id| told(&newer, id)).collect();
        ended(&old, &all).map(|g| g.id.clone()).collect::<Vec<_>>()
    };
    assert_eq!(named(&["src", "dr"]), ["gone"]);
    assert!(named(&["src"]).is_empty() && named(&["dr"]).is_empty());
    let restored = Restored { seen: vec![old.proxies.values().next().unwrap().uid.clone()], ..Restored::default() };
    assert_eq!(unseen(&old, &restored).count(), 1);
}

#[test]
fn a_policy_of_which_some_groups_have_not_been_heard_is_not_changed() {
    // A third proxy, and a group at it, of the same policy.
    let mut txn = Txn::default();
    txn.put(Object::Proxy(proxy("far", "")));
    let old = add(&model().applied(txn, 9), "other", 10);
    let old = changed(&old, "other", |group| (group.source, group.target) = ("far".into(), "far".into()));
    let mut txn = Txn::default();
    txn.put(Object::Policy(gold(60)));
    let newer = old.applied(txn, 20);
    let (model, _) = after(&old, &newer, &["src", "dr"]);
    let other = &model.groups[&("default".to_owned(), "other".to_owned())];
    assert_eq!(model.policy_of(other).unwrap().promises.retention_s, 3600);
    assert_eq!(model.policy_of(shop(&model)).unwrap().promises.retention_s, 60);
}
