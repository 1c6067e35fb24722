//! What is taken over from proxies after a restore, case by case.

use super::*;
use crate::desired::desired;
use crate::failover::FAILOVER_VIEW;
use crate::group::tests::{first_disk, policy, proxy};
use crate::objects::Reverse;
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
    let (state, _) = desired(model, &proxy, |_| Some(KEY), None);
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

#[test]
fn keys_that_were_rotated_since_are_taken_over_and_none_is_lost() {
    let [k1, k2, k3] = ["1", "2", "3"].map(str::to_owned);
    let with_key = |model: &Model| {
        let mut txn = Txn::default();
        txn.put(Object::Key(crate::objects::KeyRecord {
            id: k1.clone(),
            wrapped: String::new(),
            under: String::new(),
            since_ns: 0,
        }));
        model.applied(txn, model.revision + 1)
    };
    for (next_then, next_since) in [("", ""), ("", &k3), (&k2, ""), (&k2, &k3)] {
        let old = changed(&with_key(&model()), "shop", |group| {
            (group.key, group.next_key) = (k1.clone(), next_then.to_owned());
        });
        let newer = changed(&old, "shop", |group| {
            (group.key, group.next_key) = (k2.clone(), next_since.to_owned());
            group.older_keys = vec![k1.clone()];
        });
        for order in orders() {
            let (model, restored) = after(&old, &newer, &order);
            let group = shop(&model);
            let mut all: Vec<&str> = group.all_keys().collect();
            all.sort_unstable();
            let mut wanted = vec![k1.as_str(), k2.as_str(), next_since];
            wanted.retain(|id| !id.is_empty());
            assert_eq!(all, wanted, "{group:?}");
            // What the source writes under, or what takes its place once the target has it.
            assert!(group.key == k2 || group.next_key == k2, "{group:?}");
            assert!(wanted.iter().all(|id| *id == k2 && next_then == k2 || model.keys.contains_key(*id)), "{group:?}");
            let noted = restored.findings.iter().any(|f| f.contains("its key was rotated since"));
            assert_eq!(noted, next_then.is_empty() || !next_since.is_empty(), "{restored:?}");
        }
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

fn failing_back(old: &Model) -> Model {
    changed(&failed_over(old), "shop", |group| {
        group.phase = GroupPhase::FailingBack { view: FAILOVER_VIEW.into() };
        let (stream_uid, view) = ("back".to_owned(), FAILOVER_VIEW.to_owned());
        group.reverse = Some(Reverse { stream_uid, view, generation: 3, writer_generation: 2, hold: false });
    })
}

#[test]
fn a_failback_since_is_taken_over_and_its_stream_is_no_group() {
    let old = model();
    for (start, newer) in [(old.clone(), failing_back(&old)), (failed_over(&old), failing_back(&old))] {
        // The same group in both.
        let newer = changed(&newer, "shop", |group| group.uid.clone_from(&shop(&start).uid));
        for asked in [&["src", "dr"][..], &["dr", "src"], &["dr"]] {
            let (model, restored) = after(&start, &newer, asked);
            let group = shop(&model);
            assert_eq!(model.groups.len(), 1);
            assert_eq!(group.phase, GroupPhase::FailingBack { view: FAILOVER_VIEW.into() }, "{asked:?}");
            let reverse = group.reverse.as_ref().unwrap();
            assert_eq!(
                (reverse.stream_uid.as_str(), reverse.view.as_str(), reverse.hold),
                ("back", FAILOVER_VIEW, false)
            );
            let both = asked.len() == 2;
            assert_eq!((reverse.generation, reverse.writer_generation), if both { (3, 3) } else { (2, 2) });
            assert!(group.hold && group.leftovers.is_empty() && !group.overwritten);
            assert!(restored.findings[..].iter().any(|f| f.contains("failing back since")), "{restored:?}");
            let all = told(&newer, "dr");
            assert_eq!(unknown(&model, &all).count(), 0);
        }
    }
}

#[test]
fn a_view_that_was_held_for_a_switch_goes_on_once_its_source_is_known_to_be_held() {
    let old = model();
    let newer = changed(&failing_back(&old), "shop", |group| group.reverse.as_mut().unwrap().hold = true);
    let (model, _) = after(&old, &newer, &["dr"]);
    assert!(shop(&model).reverse.as_ref().unwrap().hold);
    for order in orders() {
        let (model, _) = after(&old, &newer, &order);
        let group = shop(&model);
        assert!(!group.reverse.as_ref().unwrap().hold && group.hold && group.overwritten, "{order:?}: {group:?}");
    }
}

#[test]
fn a_failback_that_has_ended_since_is_forgotten_and_what_it_had_is_not() {
    let old = failing_back(&model());
    // Given up; and switched, by which the source runs.
    let cancelled = changed(&old, "shop", |group| {
        (group.reverse, group.phase) = (None, GroupPhase::FailedOver { view: FAILOVER_VIEW.into() });
    });
    for order in orders() {
        let (model, restored) = after(&old, &cancelled, &order);
        let group = shop(&model);
        assert_eq!((&group.phase, group.hold), (&GroupPhase::FailedOver { view: FAILOVER_VIEW.into() }, true));
        assert!(group.reverse.is_none() && group.overwritten, "nobody knows whether a merge had begun");
        assert!(restored.findings.iter().any(|f| f.contains("its failback has ended since")), "{restored:?}");
    }
    let mut txn = Txn::default();
    let view = old.views.values().next().unwrap().clone();
    txn.put(Object::View(View { open: false, kept: true, ..view }));
    let switched = changed(&old, "shop", |group| {
        (group.reverse, group.hold) = (None, false);
        (group.generation, group.writer_generation) = (3, 3);
        group.phase = GroupPhase::FailedBack { view: FAILOVER_VIEW.into(), after: 5 };
    });
    let switched = switched.applied(txn, switched.revision + 1);
    for order in orders() {
        let (model, _) = after(&old, &switched, &order);
        let group = shop(&model);
        assert!(!group.hold && group.reverse.is_none() && !group.phase.is_failed_over(), "{order:?}: {group:?}");
        assert!(model.views.values().next().unwrap().kept, "what was written to it keeps its name");
        assert_eq!((group.generation, group.writer_generation), (3, 3));
    }
    // Known of a group that is failed back, nothing is changed.
    for order in orders() {
        let (model, _) = after(&switched, &switched, &order);
        assert_eq!(shop(&model), shop(&switched));
    }
}

#[test]
fn a_failback_in_a_backup_stands_where_it_stood() {
    let old = failing_back(&model());
    let phase = |phase: GroupPhase, reverse: bool| {
        let model = changed(&old, "shop", |group| {
            group.phase = phase;
            if !reverse {
                group.reverse = None;
            }
        });
        let mut group = shop(&model).clone();
        stand_still(&mut group);
        group.phase
    };
    let (operation, view) = (|| "op".to_owned(), || FAILOVER_VIEW.to_owned());
    let changing = || GroupPhase::Changing { operation: operation(), view: view() };
    assert_eq!(phase(changing(), true), GroupPhase::FailingBack { view: view() });
    assert_eq!(phase(changing(), false), GroupPhase::FailedOver { view: view() });
    let settling = GroupPhase::Settling { operation: operation(), view: view(), after: 7 };
    assert_eq!(phase(settling, false), GroupPhase::FailedBack { view: view(), after: 7 });
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
    let newer = changed(&add(&old, "later", 9), "later", |group| group.key = "k".into());
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
