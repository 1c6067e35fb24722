//! Machines through the API: objects as others are, and failovers that start and stop them at scripted proxies.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::*;
use prost_types::FieldMask;
use tonic::Code;
use world::*;

const WEB: &str = "tenants/default/machines/web";

fn place(driver: Driver, proxy: &str, machine: &str) -> Option<MachinePlace> {
    let proxy = if proxy.is_empty() { String::new() } else { proxy_name(proxy) };
    Some(MachinePlace { proxy, driver: driver.into(), profile: String::new(), machine: machine.into() })
}

fn create(id: &str) -> CreateMachineRequest {
    CreateMachineRequest {
        parent: TENANT.into(),
        machine_id: id.into(),
        machine: Some(Machine {
            group: SHOP.into(),
            source: place(Driver::Hook, "", "web01"),
            target: place(Driver::Qemu, "", ""),
            ..Machine::default()
        }),
        ..CreateMachineRequest::default()
    }
}

async fn web(world: &World) -> Machine {
    world.machines().get_machine(GetMachineRequest { name: WEB.into() }).await.unwrap().into_inner()
}

fn on(proxy: &FakeProxy) -> Vec<String> {
    proxy.script.journal.lock().unwrap().on.iter().cloned().collect()
}

async fn planned(world: &World) -> Operation {
    let request = StartPlannedFailoverRequest { group: SHOP.into(), ..Default::default() };
    let started = world.failovers().start_planned_failover(request).await.unwrap().into_inner();
    world.finish(&started.name).await
}

async fn undo(world: &World) -> Operation {
    let request = UndoFailoverRequest { group: SHOP.into(), ..Default::default() };
    let started = world.failovers().undo_failover(request).await.unwrap().into_inner();
    world.finish(&started.name).await
}

fn step<'a>(operation: &'a Operation, name: &str) -> &'a Step {
    operation.steps.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no step {name}: {:?}", operation.steps))
}

#[tokio::test]
async fn a_machine_is_an_object_as_others_are() {
    let world = World::new().await;
    let (_source, _target) = world.shop().await;
    let trial = CreateMachineRequest { validate_only: true, ..create("web") };
    world.machines().create_machine(trial).await.unwrap();
    assert_eq!(code(world.machines().get_machine(GetMachineRequest { name: WEB.into() }).await), Code::NotFound);

    let once = CreateMachineRequest { request_id: "1".into(), ..create("web") };
    let made = world.machines().create_machine(once.clone()).await.unwrap().into_inner();
    let again = world.machines().create_machine(once).await.unwrap().into_inner();
    assert_eq!((made.uid, made.cpus, made.stop_within_ms), (again.uid, 1, Some(120_000)));
    assert_eq!(code(world.machines().create_machine(create("web")).await), Code::AlreadyExists);
    // All disks of the group are its.
    let taken = world.machines().create_machine(create("other")).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    assert!(taken.message().contains("machines/web"), "{taken}");

    let update = |machine, paths: &[&str]| UpdateMachineRequest {
        machine: Some(Machine { name: WEB.into(), ..machine }),
        update_mask: Some(FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() }),
        ..Default::default()
    };
    let more = update(Machine { cpus: 4, ..Machine::default() }, &["cpus"]);
    let changed = world.machines().update_machine(more).await.unwrap().into_inner();
    assert_eq!((changed.cpus, changed.version, changed.memory_bytes), (4, 2, 1 << 30));
    let stale = update(Machine { etag: made.etag, cpus: 8, ..Machine::default() }, &["cpus"]);
    assert_eq!(code(world.machines().update_machine(stale).await), Code::Aborted);
    let moved = update(Machine { group: "tenants/default/groups/other".into(), ..Machine::default() }, &["group"]);
    assert_eq!(code(world.machines().update_machine(moved).await), Code::InvalidArgument);

    let filter = "target.driver = DRIVER_QEMU".to_owned();
    let list = ListMachinesRequest { parent: TENANT.into(), filter, ..Default::default() };
    let listed = world.machines().list_machines(list).await.unwrap().into_inner().machines;
    assert_eq!(listed.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), [WEB]);

    // Over a restart, and to the end.
    let mut world = world;
    world.restart().await;
    assert_eq!(web(&world).await.cpus, 4);
    let delete = DeleteMachineRequest { name: WEB.into(), etag: "1".into(), ..Default::default() };
    assert_eq!(code(world.machines().delete_machine(delete).await), Code::Aborted);
    let delete = DeleteMachineRequest { name: WEB.into(), ..Default::default() };
    world.machines().delete_machine(delete.clone()).await.unwrap();
    assert_eq!(code(world.machines().delete_machine(delete).await), Code::NotFound);
}

#[tokio::test]
async fn a_planned_failover_and_its_undoing_take_the_machine_along() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    world.machines().create_machine(create("web")).await.unwrap();
    source.script.journal.lock().unwrap().on.insert("web01".into());

    let done = planned(&world).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert_eq!((on(&source), on(&target)), (vec![], vec!["web".to_owned()]));
    let started = target.told().into_iter().find_map(|t| if let Tell::StartInstance(s) = t { Some(s) } else { None });
    let started = started.unwrap();
    assert_eq!(started.disks.iter().map(|d| d.disk.as_str()).collect::<Vec<_>>(), ["data", "wal"]);
    assert!(started.disks[0].uris[0].contains("shop.failover/data"), "{:?}", started.disks);
    let machine = web(&world).await;
    assert_eq!((machine.stopped_at_source, machine.runs_from), (true, format!("{SHOP}/views/failover")));

    // While it runs there it is not forgotten, nor driven otherwise.
    let delete = DeleteMachineRequest { name: WEB.into(), ..Default::default() };
    assert_eq!(code(world.machines().delete_machine(delete).await), Code::FailedPrecondition);
    let elsewhere = Machine { name: WEB.into(), target: place(Driver::Hook, "", ""), ..Machine::default() };
    let update = UpdateMachineRequest { machine: Some(elsewhere), ..Default::default() };
    assert_eq!(code(world.machines().update_machine(update).await), Code::FailedPrecondition);
    let probed = world.machines().probe_machine(ProbeMachineRequest { name: WEB.into() }).await.unwrap().into_inner();
    let power = |state: Option<MachineState>| state.unwrap().power();
    assert_eq!((power(probed.source), power(probed.target)), (MachinePower::Off, MachinePower::On));

    let done = undo(&world).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert_eq!((on(&source), on(&target)), (vec!["web01".to_owned()], vec![]));
    let machine = web(&world).await;
    assert_eq!((machine.stopped_at_source, machine.runs_from.as_str()), (false, ""));
}

#[tokio::test]
async fn what_its_target_cannot_start_is_known_before_anything_is_begun() {
    let world = World::new().await;
    let bad = Arc::new(AtomicBool::new(true));
    let says = bad.clone();
    let say: Say = Arc::new(move |tell| {
        let asked = matches!(tell, Tell::CheckInstance(_)) && says.load(Ordering::SeqCst);
        let message =
            "the network \"lan\" of web is the bridge \"br9\" here, and this host has none of that name".into();
        let error = CommandError { kind: CommandErrorKind::Unsupported.into(), message };
        asked.then_some(Some(command_result::Outcome::Error(error)))
    });
    let source = world.proxy("src", Script::default()).await;
    let target = world.proxy("dr", Script { say: Some(say), ..Script::default() }).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    let mut request = create("web");
    let nic = Nic { mac: "52:54:00:00:00:01".into(), network: "lan".into(), ..Nic::default() };
    request.machine.as_mut().unwrap().nics = vec![Nic { addresses: vec!["192.0.2.7/24".into()], ..nic }];
    world.machines().create_machine(request).await.unwrap();
    source.script.journal.lock().unwrap().on.insert("web01".into());

    let planned_request = StartPlannedFailoverRequest { group: SHOP.into(), ..Default::default() };
    let test = TestFailoverRequest { group: SHOP.into(), ..Default::default() };
    let refused = [
        world.failovers().start_planned_failover(planned_request).await.unwrap_err(),
        world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap_err(),
        world.failovers().test_failover(test).await.unwrap_err(),
    ];
    for told in refused {
        assert_eq!(told.code(), Code::FailedPrecondition, "{told}");
        assert!(told.message().contains("machines/web") && told.message().contains("\"br9\""), "{told}");
    }
    let probed = world.machines().probe_machine(ProbeMachineRequest { name: WEB.into() }).await.unwrap().into_inner();
    assert!(probed.hindrance.contains("\"br9\""), "{probed:?}");
    assert!(source.told().iter().all(|t| !matches!(t, Tell::Fence(_) | Tell::StopInstance(_))), "production notices");
    assert!(target.told().iter().all(|t| !matches!(t, Tell::OpenView(_) | Tell::StartInstance(_))));

    bad.store(false, Ordering::SeqCst);
    let done = planned(&world).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    let asked = target.told().into_iter().find_map(|t| if let Tell::StartInstance(s) = t { Some(s) } else { None });
    assert_eq!(asked.unwrap().nics[0].addresses, ["192.0.2.7/24"]);
    let before = target.told().iter().filter(|t| matches!(t, Tell::CheckInstance(_))).count();
    // The way back is hindered by nothing.
    bad.store(true, Ordering::SeqCst);
    assert_eq!(undo(&world).await.state(), OperationState::Done);
    assert_eq!(target.told().iter().filter(|t| matches!(t, Tell::CheckInstance(_))).count(), before);
}

#[tokio::test]
async fn a_machine_that_does_not_go_off_is_handed_to_nobody() {
    let world = World::new().await;
    let say: Say = Arc::new(|tell| match tell {
        Tell::StopInstance(_) => Some(Some(machine(MachinePower::On, false))),
        _ => None,
    });
    let source = world.proxy("src", Script { say: Some(say), ..Script::default() }).await;
    let _target = world.proxy("dr", Script::default()).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    world.machines().create_machine(create("web")).await.unwrap();
    source.script.journal.lock().unwrap().on.insert("web01".into());
    let done = planned(&world).await;
    assert_eq!(done.state(), OperationState::Failed);
    let error = done.error.unwrap();
    assert!(error.step == "stop-source" && error.message.contains("is still on"), "{error:?}");
    assert_eq!(world.status().await.phase(), Phase::Protected);
}

#[tokio::test]
async fn whoever_cuts_the_power_of_a_dead_site_makes_up_for_its_proxy() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    let mut request = create("web");
    request.machine.as_mut().unwrap().source = place(Driver::Hook, "dr", "ipmi-web");
    world.machines().create_machine(request).await.unwrap();
    target.script.journal.lock().unwrap().on.insert("ipmi-web".into());
    source.kill().await;
    while world.status().await.conditions.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert_eq!(step(&done, "power-off").state(), StepState::Done);
    assert_eq!(done.failover.unwrap().fence(), FenceKind::Confirmed);
    assert_eq!(on(&target), ["web"]);
}

#[tokio::test]
async fn a_coordinator_that_restarts_while_a_machine_starts_goes_on() {
    let mut world = World::new().await;
    let silent = Arc::new(AtomicBool::new(true));
    let says = silent.clone();
    let say: Say =
        Arc::new(move |tell| (matches!(tell, Tell::StartInstance(_)) && says.load(Ordering::SeqCst)).then_some(None));
    let source = world.proxy("src", Script::default()).await;
    let target = world.proxy("dr", Script { say: Some(say), ..Script::default() }).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    world.machines().create_machine(create("web")).await.unwrap();
    source.script.journal.lock().unwrap().on.insert("web01".into());
    let request = StartPlannedFailoverRequest { group: SHOP.into(), ..Default::default() };
    let started = world.failovers().start_planned_failover(request).await.unwrap().into_inner();
    while !target.told().iter().any(|t| matches!(t, Tell::StartInstance(_))) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    silent.store(false, Ordering::SeqCst);
    world.restart().await;
    let (bundle, script) = target.kill().await;
    let target = FakeProxy::connect(bundle, script).await;
    let (bundle, script) = source.kill().await;
    let source = FakeProxy::connect(bundle, script).await;
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert_eq!((on(&source), on(&target)), (vec![], vec!["web".to_owned()]));
}

#[tokio::test]
async fn who_is_not_there_to_start_a_machine_is_known_before_anything_is_stopped() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let host = world.proxy("host", Script::default()).await;
    let mut request = create("web");
    request.machine.as_mut().unwrap().target = place(Driver::Libvirt, "host", "");
    world.machines().create_machine(request).await.unwrap();
    let start = StartPlannedFailoverRequest { group: SHOP.into(), ..Default::default() };
    let refused = world.failovers().start_planned_failover(start.clone()).await.unwrap_err();
    assert!(refused.message().contains("no libvirt"), "{refused}");
    let uses = DeleteProxyRequest { name: proxy_name("host"), ..Default::default() };
    assert_eq!(code(world.proxies().delete_proxy(uses).await), Code::FailedPrecondition);
    host.kill().await;
    while world.proxies().get_proxy(GetProxyRequest { name: proxy_name("host") }).await.unwrap().into_inner().connected
    {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let refused = world.failovers().start_planned_failover(start).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(source.told().iter().all(|t| !matches!(t, Tell::Fence(_))), "nothing was stopped");
}

async fn test(world: &World, hold_ms: u64) -> Operation {
    let request = TestFailoverRequest { group: SHOP.into(), hold_ms, ..Default::default() };
    world.failovers().test_failover(request).await.unwrap().into_inner()
}

fn views(target: &FakeProxy) -> Vec<String> {
    let mut views: Vec<_> = target.script.journal.lock().unwrap().views.keys().cloned().collect();
    views.sort();
    views
}

#[tokio::test]
async fn a_test_needs_a_machine_and_leaves_nothing_of_it() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    let request = TestFailoverRequest { group: SHOP.into(), ..Default::default() };
    let refused = world.failovers().test_failover(request.clone()).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("machine create"), "{refused}");
    world.machines().create_machine(create("web")).await.unwrap();
    let long = TestFailoverRequest { hold_ms: 86_400_001, ..request.clone() };
    assert_eq!(code(world.failovers().test_failover(long).await), Code::InvalidArgument);
    let trial = TestFailoverRequest { validate_only: true, ..request };
    assert!(world.failovers().test_failover(trial).await.unwrap().into_inner().validate_only);

    let done = world.finish(&test(&world, 0).await.name).await;
    assert_eq!((done.state(), done.verb.as_str()), (OperationState::Done, "test-failover"), "{done:?}");
    assert_eq!((on(&target), views(&target)), (vec![], vec![]));
    let started = target.told().into_iter().find_map(|t| if let Tell::StartInstance(s) = t { Some(s) } else { None });
    let machine = started.unwrap().machine.unwrap();
    assert!(machine.role() == MachineRole::Test && machine.instance.starts_with("web.test-"), "{machine:?}");
    assert_eq!(world.status().await.phase(), Phase::Protected);
    assert!(source.told().iter().all(|t| !matches!(t, Tell::Fence(_) | Tell::StopInstance(_))), "production notices");
}

#[tokio::test]
async fn a_test_goes_on_beside_a_failover_and_a_restart_and_ends_when_enough_is_seen() {
    let mut world = World::new().await;
    let (source, target) = world.shop().await;
    world.machines().create_machine(create("web")).await.unwrap();
    source.script.journal.lock().unwrap().on.insert("web01".into());
    let held = test(&world, 600_000).await;
    let running = |o: &Operation| o.steps.iter().any(|s| s.name == "hold" && s.state() == StepState::Running);
    let get = || GetOperationRequest { name: held.name.clone() };
    while !running(&world.operations().get_operation(get()).await.unwrap().into_inner()) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(planned(&world).await.state(), OperationState::Done);
    assert_eq!((on(&target).len(), views(&target).len()), (2, 2));
    world.restart().await;
    let (bundle, script) = target.kill().await;
    let target = FakeProxy::connect(bundle, script).await;
    let (bundle, script) = source.kill().await;
    let _source = FakeProxy::connect(bundle, script).await;
    assert!(running(&world.operations().get_operation(get()).await.unwrap().into_inner()), "it is held on");
    let cancel = CancelOperationRequest { name: held.name.clone(), ..Default::default() };
    world.operations().cancel_operation(cancel).await.unwrap();
    let done = world.finish(&held.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert_eq!((on(&target), views(&target)), (vec!["web".to_owned()], vec!["shop.failover".to_owned()]));
    assert_eq!(web(&world).await.runs_from, format!("{SHOP}/views/failover"), "its replica is not the test's");
    assert_eq!(world.status().await.phase(), Phase::FailedOver);
}
