//! Failover through the API, with scripted proxies that die, refuse and come back, and a coordinator that restarts.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::*;
use tonic::Code;
use world::*;

fn steps(operation: &Operation) -> Vec<(&str, StepState)> {
    operation.steps.iter().map(|s| (s.name.as_str(), s.state())).collect()
}

#[tokio::test]
async fn with_the_source_there_it_is_held_and_the_group_runs_from_its_view() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert!(steps(&done).iter().all(|(_, s)| *s == StepState::Done), "{:?}", steps(&done));
    let result = done.failover.unwrap();
    assert_eq!((result.fence(), result.generation), (FenceKind::Confirmed, 2));
    assert_eq!(result.point.unwrap().seq, 100);
    let view = result.view.unwrap();
    assert_eq!((view.name, view.exports.len(), view.writable), (format!("{SHOP}/views/failover"), 2, true));

    // The source stays held under its old generation, also if it asks anew.
    let mut desired = source.desired.subscribe();
    let held = desired.wait_for(|d| d.sources[0].hold).await.unwrap().clone();
    assert_eq!(held.sources[0].disks[0].generation, 1);
    let mut desired = target.desired.subscribe();
    desired.wait_for(|d| d.targets[0].disks[0].generation == 2 && d.targets[0].views.len() == 1).await.unwrap();
    assert_eq!(world.status().await.phase(), Phase::FailedOver);

    let again = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    assert!(again.message().contains("failed over already"), "{again}");
    let close = DeleteViewRequest { name: format!("{SHOP}/views/failover"), ..Default::default() };
    assert_eq!(code(world.views().delete_view(close).await), Code::FailedPrecondition);
}

#[tokio::test]
async fn with_the_source_dead_the_operator_says_so_by_name() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let (bundle, script) = source.kill().await;
    while world.status().await.conditions.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let status = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("unconfirmed"), "{status}");
    let wrong = StartFailoverRequest { confirm_name: "shpo".into(), ..unconfirmed(At::Latest(true)) };
    assert_eq!(code(world.failovers().start_failover(wrong).await), Code::InvalidArgument);

    let begun = std::time::Instant::now();
    let started = world.failovers().start_failover(unconfirmed(At::Seq(73))).await.unwrap().into_inner();
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert!(begun.elapsed() < std::time::Duration::from_secs(2), "a dead source costs no time");
    let result = done.failover.unwrap();
    assert_eq!((result.fence(), result.point.unwrap().seq), (FenceKind::Unconfirmed, 73));

    // It is fenced when it comes back.
    let source = FakeProxy::connect(bundle, script).await;
    let mut desired = source.desired.subscribe();
    desired.wait_for(|d| d.sources.first().is_some_and(|s| s.hold)).await.unwrap();
}

#[tokio::test]
async fn a_source_with_a_lease_that_is_gone_is_waited_for_and_needs_no_word() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let policy = GetPolicyRequest { name: format!("{TENANT}/policies/gold") };
    let gold = world.policies().get_policy(policy.clone()).await.unwrap().into_inner();
    let update = |gold: &Policy, lease_ms| UpdatePolicyRequest {
        policy: Some(Policy { lease_ms: Some(lease_ms), ..gold.clone() }),
        ..Default::default()
    };
    assert_eq!(code(world.policies().update_policy(update(&gold, 2_999)).await), Code::InvalidArgument);
    world.policies().update_policy(update(&gold, 3_000)).await.unwrap();
    // Once the source has said that it keeps to it.
    while world.status().await.lease_ms != 3_000 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    source.kill().await;
    while world.status().await.conditions.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let begun = std::time::Instant::now();
    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    assert!(begun.elapsed() >= std::time::Duration::from_millis(4_300), "the lease, a tenth and a second");
    assert_eq!(done.failover.unwrap().fence(), FenceKind::SelfFenced);
}

#[tokio::test]
async fn a_policy_that_gives_up_its_lease_is_not_relied_on() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let policy = GetPolicyRequest { name: format!("{TENANT}/policies/gold") };
    for lease_ms in [3_000, 0] {
        let gold = world.policies().get_policy(policy.clone()).await.unwrap().into_inner();
        let gold = Policy { lease_ms: Some(lease_ms), ..gold };
        let update = UpdatePolicyRequest { policy: Some(gold), ..Default::default() };
        world.policies().update_policy(update).await.unwrap();
        while world.status().await.lease_ms != lease_ms {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
    source.kill().await;
    while world.status().await.conditions.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let refused = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap_err();
    assert!(refused.message().contains("unconfirmed"), "{refused}");
}

#[tokio::test]
async fn checking_only_stores_nothing_and_says_what_would_be_in_the_way() {
    let world = World::new().await;
    let (_source, target) = world.shop().await;
    let check = |to| StartFailoverRequest { validate_only: true, ..failover_request(to) };
    let shown = world.failovers().start_failover(check(At::Cut(4))).await.unwrap().into_inner();
    assert!(shown.validate_only && shown.name.is_empty());
    assert_eq!(steps(&shown)[0], ("check", StepState::Done));
    assert_eq!(world.status().await.phase(), Phase::Protected);
    let status = world.failovers().start_failover(check(At::Seq(50))).await.unwrap_err();
    assert!(status.message().contains("damaged"), "{status}");
    target.kill().await;
    while world.status().await.conditions.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(code(world.failovers().start_failover(check(At::Latest(true))).await), Code::Unavailable);
    let list = ListOperationsRequest { parent: TENANT.into(), ..Default::default() };
    assert!(world.operations().list_operations(list).await.unwrap().into_inner().operations.is_empty());
}

#[tokio::test]
async fn the_same_request_starts_one_operation() {
    let world = World::new().await;
    let (_source, _target) = world.shop().await;
    let request = StartFailoverRequest { request_id: "r-1".into(), ..failover_request(At::Latest(true)) };
    let (a, b) = (world.failovers(), world.failovers());
    let both = async |mut c: failovers_client::FailoversClient<_>| {
        c.start_failover(request.clone()).await.unwrap().into_inner().name
    };
    let (first, second) = tokio::join!(both(a), both(b));
    assert_eq!(first, second);
    world.finish(&first).await;
    assert_eq!(both(world.failovers()).await, first);
}

#[tokio::test]
async fn a_failure_lets_the_source_go_on_and_says_at_which_step() {
    let world = World::new().await;
    let source = world.proxy("src", Script::default()).await;
    let say: Say = Arc::new(|t| match t {
        Tell::OpenView(v) if v.kind() == ViewKind::Failover => Some(Some(Outcome::Error(CommandError {
            kind: CommandErrorKind::Io.into(),
            message: "no room for a delta".into(),
        }))),
        _ => None,
    });
    let target = world.proxy("dr", Script { say: Some(say), ..Script::default() }).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    let failed = world.finish(&started.name).await;
    assert_eq!(failed.state(), OperationState::Failed);
    let error = failed.error.clone().unwrap();
    assert_eq!((error.step.as_str(), error.message.as_str()), ("open-view", "no room for a delta"));
    assert!(!error.remedy.is_empty());
    let undone: Vec<&str> = failed.steps.iter().rev().take(3).map(|s| s.name.as_str()).collect();
    assert_eq!(undone, ["release", "return-generation", "close-view"]);

    let stream = world.status().await.uid;
    assert!(!source.script.journal.lock().unwrap().held[&stream]);
    let mut desired = source.desired.subscribe();
    let state = desired.wait_for(|d| !d.sources[0].hold && d.sources[0].disks[0].generation == 3).await.unwrap();
    assert_eq!(state.sources.len(), 1);
    assert_eq!(target.script.journal.lock().unwrap().generation, 3);
    assert_eq!(world.status().await.phase(), Phase::Protected);
    let views = world
        .views()
        .list_views(ListViewsRequest { parent: SHOP.into(), ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    assert!(views.views.is_empty());
}

/// The coordinator dies while each of the steps is being done; the next one finishes what was begun.
#[tokio::test]
async fn a_restarted_coordinator_goes_on_with_the_step_it_finds() {
    type Held = fn(&Tell) -> bool;
    let at: [(&str, Held); 4] = [
        ("fence", |t| matches!(t, Tell::Fence(_))),
        ("raise-generation", |t| matches!(t, Tell::RaiseGeneration(_))),
        // The first one is the check, before anything is stored; the second is the drain's.
        ("resolve-point", |t| matches!(t, Tell::ResolvePoint(_))),
        ("open-view", |t| matches!(t, Tell::OpenView(_))),
    ];
    for (step, held) in at {
        let mut world = World::new().await;
        let seen = Arc::new(AtomicUsize::new(0));
        let stuck = move |pass: usize| -> Script {
            let seen = seen.clone();
            let say: Say = Arc::new(move |t| (held(t) && seen.fetch_add(1, Ordering::SeqCst) >= pass).then_some(None));
            Script { say: Some(say), ..Script::default() }
        };
        let source = world.proxy("src", if step == "fence" { stuck(0) } else { Script::default() }).await;
        let pass = if step == "resolve-point" { 1 } else { 0 };
        let target = world.proxy("dr", if step == "fence" { Script::default() } else { stuck(pass) }).await;
        world.gold().await;
        world.groups().create_group(shop_request()).await.unwrap();
        world.wait_phase(Phase::Protected).await;
        let to = if step == "resolve-point" { At::Seq(42) } else { At::Latest(true) };
        let started = world.failovers().start_failover(failover_request(to)).await.unwrap().into_inner();
        loop {
            let get = GetOperationRequest { name: started.name.clone() };
            let now = world.operations().get_operation(get).await.unwrap().into_inner();
            if steps(&now).contains(&(step, StepState::Running)) {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let ((a, mut of_a), (b, mut of_b)) = (source.kill().await, target.kill().await);
        world.restart().await;
        (of_a.say, of_b.say) = (None, None);
        let source = FakeProxy::connect(a, of_a).await;
        let target = FakeProxy::connect(b, of_b).await;
        assert!(source.term >= 2, "each life of the coordinator has a term of its own");
        let done = world.finish(&started.name).await;
        assert_eq!(done.state(), OperationState::Done, "stopped at {step}: {done:?}");
        assert_eq!(done.failover.unwrap().fence(), FenceKind::Confirmed);
        assert_eq!(world.status().await.phase(), Phase::FailedOver);
        assert_eq!(target.script.journal.lock().unwrap().generation, 2, "raised once, whatever happened");
        assert_eq!(target.script.journal.lock().unwrap().views.len(), 1);
    }
}
