//! What was decided at a target, taken in: state by state of the group.

use super::*;
use crate::desired::desired;
use crate::group::tests::{first_disk, policy, proxy};
use crate::machine::{Driver, Firmware, Place, Ready};
use crate::policy::Wanted;

const UID: &str = "3c0e5f0a-94a7-4a52-9d29-1b7f5d3f6f11";
const VIEW: &str = "local-3c0e5f0a";

/// A group of one disk and one machine.
fn model() -> Model {
    let mut txn = Txn::default();
    for (id, address) in [("src", ""), ("dr", "dr:1"), ("other", "o:1")] {
        txn.put(Object::Proxy(proxy(id, address)));
    }
    txn.put(Object::Policy(policy("gold", &Wanted { retention_s: Some(60), ..Wanted::default() })));
    let model = Model::default().applied(txn, 7);
    let asked = v1::Group {
        policy: "tenants/default/policies/gold".into(),
        source: "tenants/default/proxies/src".into(),
        target: "tenants/default/proxies/dr".into(),
        ..v1::Group::default()
    };
    let group = crate::group::new_group(&model, &Name::new("default", Kind::Group, "shop"), &asked, 1).unwrap();
    let hook = || Place { driver: Driver::Hook, profile: "default".into(), ..Place::default() };
    let mut txn = Txn::default();
    txn.put(Object::Disk(first_disk(&group)));
    txn.put(Object::Group(Group { next_slot: 1, generation: 4, writer_generation: 4, ..group }));
    txn.put(Object::Machine(Machine {
        uid: "web".into(),
        tenant: "default".into(),
        id: "web".into(),
        version: 1,
        created_ns: 1,
        updated_ns: 1,
        description: String::new(),
        group: "shop".into(),
        disks: Vec::new(),
        cpus: 1,
        memory: 1 << 30,
        firmware: Firmware::Bios,
        nics: Vec::new(),
        source: hook(),
        target: hook(),
        ready: Ready::Running,
        stop_within_ms: 1,
        ready_within_ms: 1,
        stopped_at_source: false,
        runs_from: String::new(),
    }));
    model.applied(txn, 8)
}

fn shop(model: &Model) -> &Group {
    model.group(&Name::new("default", Kind::Group, "shop")).unwrap()
}

fn web(model: &Model) -> &Machine {
    model.machines.values().next().unwrap()
}

fn at<'a>(model: &'a Model, id: &str) -> &'a Proxy {
    &model.proxies[&("default".to_owned(), id.to_owned())]
}

fn in_phase(model: &Model, phase: GroupPhase) -> Model {
    let mut txn = Txn::default();
    txn.put(Object::Group(Group { phase, ..shop(model).clone() }));
    model.applied(txn, model.revision + 1)
}

fn decided(model: &Model) -> v1::LocalFailover {
    let disks = model.disks_of(shop(model)).map(|d| d.uid.clone()).collect();
    v1::LocalFailover {
        uid: UID.into(),
        stream_uid: shop(model).uid.clone(),
        view: format!("shop.{VIEW}"),
        point: Some(v1::Point { seq: 90, disks, ..v1::Point::default() }),
        generation: 6,
        reason: "the site burns".into(),
        decided_by: "anna".into(),
        decide_time_ns: 50,
        machines: vec!["tenants/default/machines/web".into()],
        zero_loss: false,
    }
}

type Told = Result<Option<(String, String)>, String>;

/// The model after `dr` has told of it, and what that was told of.
fn after(model: &Model, decided: &v1::LocalFailover, observing: bool) -> (Model, Told) {
    let mut txn = Txn::default();
    let told = adopt(model, at(model, "dr"), decided, 99, observing, &mut txn);
    (model.applied(txn, model.revision + 1), told)
}

#[test]
fn a_protected_group_is_failed_over_to_the_view_that_is_open_there() {
    let before = model();
    let (model, told) = after(&before, &decided(&before), false);
    let (group, message) = told.unwrap().unwrap();
    assert!(group.ends_with("groups/shop") && message.contains("anna") && message.contains(VIEW), "{message}");
    let group = shop(&model);
    assert_eq!((&group.phase, group.hold), (&GroupPhase::FailedOver { view: VIEW.into() }, true));
    assert_eq!((group.generation, group.writer_generation), (6, 4));
    let view = model.view(&group.name(), VIEW).unwrap();
    assert_eq!(
        (view.proxy_name().as_str(), view.point.seq, view.open, view.writable),
        ("shop.local-3c0e5f0a", 90, true, true)
    );
    assert_eq!(web(&model).runs_from, VIEW);
    let operation = model.operation(&Name::new("default", Kind::Operation, UID)).unwrap();
    assert_eq!((operation.work.state, operation.actor.as_str(), operation.ended_ns), (State::Done, "proxy/dr", 99));
    assert_eq!(operation.work.facts.fence, Some(FenceKind::Unconfirmed));
    // What its ends are told from now on: by that the target knows that it has been taken in.
    let told = |id| desired(&model, at(&model, id), |_| Some([1; 32]), None).0;
    let stream = &told("dr").targets[0];
    assert_eq!((stream.views[0].view.as_str(), stream.views[0].seq), ("shop.local-3c0e5f0a", 90));
    assert_eq!((stream.disks[0].generation, stream.machines.len()), (6, 1));
    assert!(told("src").sources[0].hold);
    // Told again it is known, also after it has been undone.
    let mut txn = Txn::default();
    let again =
        adopt(&in_phase(&model, GroupPhase::Protecting), at(&model, "dr"), &decided(&model), 100, false, &mut txn);
    assert!(again == Ok(None) && txn.is_empty(), "{again:?}");
}

#[test]
fn an_operation_that_was_overtaken_is_over_and_undoes_nothing() {
    let before = model();
    let spec = Spec::new(Verb::Failover, Choice::Latest);
    let disks: Vec<_> = before.disks_of(shop(&before)).collect();
    let mut work = Failover::new(spec, &disks, ("failover", ""), 0, 0, "ok".into(), 5);
    let mut group = shop(&before).clone();
    let _ = work.begin(&mut group, 6);
    let operation = Operation {
        uid: "op".into(),
        tenant: "default".into(),
        version: 1,
        group: "shop".into(),
        request_id: String::new(),
        actor: "operator/ben".into(),
        created_ns: 5,
        ended_ns: 0,
        work: Box::new(work),
    };
    let mut txn = Txn::default();
    txn.put(Object::Operation(operation));
    txn.put(Object::Group(Group { phase: GroupPhase::FailingOver { operation: "op".into() }, ..group }));
    let (model, told) = after(&before.applied(txn, 9), &decided(&before), false);
    assert!(told.unwrap().is_some());
    let ended = model.operation(&Name::new("default", Kind::Operation, "op")).unwrap();
    assert_eq!((ended.work.state, ended.ended_ns), (State::Failed, 99));
    assert_eq!(ended.work.error.as_ref().unwrap().step, StepName::Fence);
    let mut work = ended.work.clone();
    assert!(work.ended(), "nobody goes on with it");
    work.cancel("operator/ben").unwrap_err();
    assert_eq!((&shop(&model).phase, shop(&model).hold), (&GroupPhase::FailedOver { view: VIEW.into() }, true));
}

#[test]
fn from_a_failback_that_is_not_committed_it_is_taken_in_too() {
    let before = in_phase(&model(), GroupPhase::FailedBack { view: "failover".into(), after: 3 });
    let (model, told) = after(&before, &decided(&before), false);
    assert!(told.unwrap().is_some());
    assert_eq!(shop(&model).phase, GroupPhase::FailedOver { view: VIEW.into() });
}

#[test]
fn what_does_not_fit_is_left_as_it_is_and_said() {
    let before = model();
    let good = decided(&before);
    let bad = [
        v1::LocalFailover { stream_uid: "unknown".into(), ..good.clone() },
        v1::LocalFailover { view: "stock.local-3c0e5f0a".into(), ..good.clone() },
        v1::LocalFailover { view: "shop.".into(), ..good.clone() },
        v1::LocalFailover { uid: "../x".into(), ..good.clone() },
        v1::LocalFailover { point: None, ..good.clone() },
    ];
    for bad in bad {
        let (model, told) = after(&before, &bad, false);
        assert!(told.is_err() && shop(&model) == shop(&before), "{bad:?}");
    }
    // Nor from a proxy that does not keep the journal.
    let mut txn = Txn::default();
    assert!(adopt(&before, at(&before, "other"), &good, 9, false, &mut txn).is_err() && txn.is_empty());
    // Nor where the group has gone another way.
    for phase in [
        GroupPhase::FailedOver { view: "failover".into() },
        GroupPhase::FailingBack { view: "failover".into() },
        GroupPhase::Changing { operation: "op".into(), view: "failover".into() },
        GroupPhase::Deleting,
    ] {
        let before = in_phase(&before, phase);
        let (model, told) = after(&before, &good, false);
        assert!(told.unwrap_err().contains("another state"));
        assert_eq!(shop(&model), shop(&before));
    }
}

#[test]
fn a_store_that_observes_learns_only_what_nobody_else_says() {
    let before = model();
    let (model, told) = after(&before, &decided(&before), true);
    assert_eq!(told, Ok(None));
    assert_eq!((shop(&model), web(&model).runs_from.as_str()), (shop(&before), VIEW));
    let unknown = v1::LocalFailover { stream_uid: "unknown".into(), ..decided(&before) };
    assert_eq!(after(&before, &unknown, true).1, Ok(None));
}
