//! A failback through the API, with scripted proxies that refuse, go away and come back, and a coordinator that restarts.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::*;
use tonic::Code;
use world::*;

fn start() -> StartFailbackRequest {
    StartFailbackRequest { group: SHOP.into(), ..Default::default() }
}

fn switch() -> SwitchFailbackRequest {
    SwitchFailbackRequest { group: SHOP.into(), ..Default::default() }
}

fn commit() -> CommitFailbackRequest {
    CommitFailbackRequest { group: SHOP.into(), ..Default::default() }
}

fn cancel() -> CancelFailbackRequest {
    CancelFailbackRequest { group: SHOP.into(), ..Default::default() }
}

fn steps(operation: &Operation) -> Vec<&str> {
    operation.steps.iter().map(|s| s.name.as_str()).collect()
}

async fn done(world: &World, started: &Operation) -> Operation {
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    done
}

async fn failed_over(world: &World) {
    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    done(world, &started).await;
}

/// Failing back, and ready to switch.
async fn failing_back(world: &World) -> GroupStatus {
    let started = world.failovers().start_failback(start()).await.unwrap().into_inner();
    done(world, &started).await;
    ready(world).await
}

async fn ready(world: &World) -> GroupStatus {
    for _ in 0..200 {
        let status = world.status().await;
        if status.reverse.as_ref().is_some_and(|r| r.ready) {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("it does not become ready: {:?}", world.status().await.reverse);
}

async fn switched(world: &World) -> Operation {
    let started = world.failovers().switch_failback(switch()).await.unwrap().into_inner();
    done(world, &started).await
}

#[tokio::test]
async fn there_and_back_and_committed() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    failed_over(&world).await;
    let group = world.status().await.uid;

    let status = failing_back(&world).await;
    assert_eq!(status.phase(), Phase::FailingBack);
    assert!(status.conditions.iter().any(|c| c.kind == "ready-to-switch"), "{:?}", status.conditions);
    let back = status.reverse.unwrap();
    assert_eq!((back.missing.as_str(), back.captured_seq, back.durable_seq), ("", 100, 100));
    assert!(back.rpo.unwrap().now_us.is_some() && status.rpo.unwrap().now_us.is_none());
    // Each end has the other stream, too; the source's own stays held, and is not run.
    let at_source = source.desired.borrow().clone();
    let at_target = target.desired.borrow().clone();
    assert_eq!(at_source.targets[0].disks[1].base_path, "/disks/wal");
    assert_eq!((at_source.targets[0].stream_uid.as_str(), at_source.sources[0].hold), (back.stream_uid.as_str(), true));
    assert_eq!(at_target.sources[0].disks[0].view, "shop.failover");
    assert_eq!(at_target.sources[0].disks[0].export_name, "shop.failover/data");
    assert_eq!(at_target.targets[0].views.len(), 1);

    source.script.journal.lock().unwrap().merges_left = 3;
    let done = switched(&world).await;
    let all = [
        "check",
        "catch-up",
        "fence",
        "drain",
        "raise-generation",
        "merge",
        "leave-view",
        "end-reverse",
        "drop-reverse",
        "return-generation",
        "release",
    ];
    assert_eq!(steps(&done), all);
    assert_eq!(done.failover.unwrap().generation, 3);
    let status = world.status().await;
    assert_eq!(status.phase(), Phase::FailedBack);
    assert!(status.reverse.is_none());
    assert!(status.views[0].kept && !status.views[0].open);
    let state = source.desired.borrow().clone();
    assert!(state.targets.is_empty() && !state.sources[0].hold);
    assert_eq!(state.sources[0].disks[0].generation, 3);
    assert!(target.desired.borrow().sources.is_empty());
    let merges = source.told().iter().filter(|t| matches!(t, Tell::MergeStream(_))).count();
    assert_eq!(merges, 4);
    assert!(source.told().iter().any(|t| matches!(t, Tell::MergeStream(m) if m.seq == 100 && m.source_uid == group)));

    // What is kept is not to be closed by hand, and nothing else fits before that is settled.
    let close = DeleteViewRequest { name: format!("{SHOP}/views/failover"), ..Default::default() };
    assert_eq!(code(world.views().delete_view(close).await), Code::FailedPrecondition);
    let again = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap_err();
    assert!(again.message().contains("undo-failback"), "{again}");
    let early = world.failovers().commit_failback(commit()).await.unwrap_err();
    assert!(early.message().contains("not protected again"), "{early}");
    target.script.journal.lock().unwrap().more = 7;
    let started = loop {
        match world.failovers().commit_failback(commit()).await {
            Ok(started) => break started.into_inner(),
            Err(e) => assert!(e.message().contains("not protected again"), "{e}"),
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    };
    let committed = world.finish(&started.name).await;
    assert_eq!((committed.state(), steps(&committed)), (OperationState::Done, vec!["check", "discard"]));
    let status = world.status().await;
    assert_eq!((status.phase(), status.views.len()), (Phase::Protected, 0));
    let last = target.told().pop().unwrap();
    assert!(matches!(&last, Tell::CloseView(c) if !c.keep_delta && c.view == "shop.failover"), "{last:?}");
}

#[tokio::test]
async fn it_is_undone_to_the_view_as_it_was_left_and_failed_back_again() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    failed_over(&world).await;
    let first = failing_back(&world).await.reverse.unwrap().stream_uid;
    switched(&world).await;
    let undo = UndoFailbackRequest { group: SHOP.into(), ..Default::default() };
    let started = world.failovers().undo_failback(undo).await.unwrap().into_inner();
    let undone = done(&world, &started).await;
    assert_eq!(steps(&undone), ["check", "fence", "drain", "raise-generation", "open-view", "finish"]);
    assert_eq!(undone.failover.unwrap().view.unwrap().name, format!("{SHOP}/views/failover"));
    assert_eq!(world.status().await.phase(), Phase::FailedOver);
    assert!(source.desired.borrow().sources[0].hold);
    let seen = target.told().into_iter().rev().find_map(|t| match t {
        Tell::OpenView(open) => Some((open.view, open.seq)),
        _ => None,
    });
    assert_eq!(
        seen,
        Some(("shop.failover".into(), 100)),
        "the same view at the same point, with what was written to it"
    );
    // The source's disks are not what they were.
    let undo = UndoFailoverRequest { group: SHOP.into(), ..Default::default() };
    let refused = world.failovers().undo_failover(undo).await.unwrap_err();
    assert!(refused.message().contains("what a failback brought"), "{refused}");
    let second = failing_back(&world).await.reverse.unwrap().stream_uid;
    assert_ne!(first, second, "each failback is a stream of its own");
}

#[tokio::test]
async fn a_source_that_is_off_is_named_to_undo_a_failback() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    failed_over(&world).await;
    failing_back(&world).await;
    switched(&world).await;
    source.kill().await;
    let undo = UndoFailbackRequest { group: SHOP.into(), ..Default::default() };
    let refused = loop {
        match world.failovers().undo_failback(UndoFailbackRequest { validate_only: true, ..undo.clone() }).await {
            Err(refused) => break refused,
            Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    assert!(refused.message().contains("unconfirmed"), "{refused}");
    let named = UndoFailbackRequest { unconfirmed: true, confirm_name: "shop".into(), ..undo };
    let started = world.failovers().undo_failback(named).await.unwrap().into_inner();
    assert_eq!(done(&world, &started).await.failover.unwrap().fence(), FenceKind::Unconfirmed);
}

#[tokio::test]
async fn a_source_that_takes_no_streams_is_named_with_what_it_lacks() {
    let world = World::new().await;
    let _source = world.proxy("src", Script { data_address: Some(String::new()), ..Script::default() }).await;
    let _target = world.proxy("dr", Script::default()).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    let early = world.failovers().start_failback(start()).await.unwrap_err();
    assert!(early.message().contains("not failed over"), "{early}");
    failed_over(&world).await;
    let refused = world.failovers().start_failback(start()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for part in ["\"src\"", "target.journal", "target.listen"] {
        assert!(refused.message().contains(part), "{refused}");
    }
}

#[tokio::test]
async fn cancelled_it_stays_failed_over_and_who_was_away_is_told_later() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    failed_over(&world).await;
    let stream = failing_back(&world).await.reverse.unwrap().stream_uid;
    for verb in ["undo", "change"] {
        let refused = match verb {
            "undo" => {
                let request = UndoFailoverRequest { group: SHOP.into(), force: true, ..Default::default() };
                world.failovers().undo_failover(request).await.unwrap_err()
            }
            _ => {
                let to = PointChoice { at: Some(At::Latest(true)) };
                let choice = Some(change_point_request::Choice::To(to));
                let request = ChangePointRequest { group: SHOP.into(), choice, force: true, ..Default::default() };
                world.failovers().change_point(request).await.unwrap_err()
            }
        };
        assert!(refused.message().contains("cancel-failback"), "{refused}");
    }
    let (bundle, script) = source.kill().await;
    while !world.status().await.conditions.iter().any(|c| c.kind == "source-unreachable") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = world.failovers().switch_failback(switch()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let started = world.failovers().cancel_failback(cancel()).await.unwrap().into_inner();
    let cancelled = done(&world, &started).await;
    assert_eq!(cancelled.steps.last().unwrap().state(), StepState::Skipped);
    assert_eq!(world.status().await.phase(), Phase::FailedOver);
    assert!(target.told().iter().any(|t| matches!(t, Tell::Unprotect(u) if u.stream_uid == stream)));
    while !world.status().await.conditions.iter().any(|c| c.kind == "leftover") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // It is told when it is back, and only then another failback begins.
    let source = FakeProxy::connect(bundle, script).await;
    while world.status().await.conditions.iter().any(|c| c.kind == "leftover") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(source.told().iter().any(|t| matches!(t, Tell::DropStream(d) if d.stream_uid == stream)));
    failing_back(&world).await;
}

#[tokio::test]
async fn one_that_is_still_synchronised_is_not_switched_and_checks_change_nothing() {
    let world = World::new().await;
    let (_source, target) = world.shop().await;
    failed_over(&world).await;
    let check = StartFailbackRequest { validate_only: true, ..start() };
    assert!(world.failovers().start_failback(check).await.unwrap().into_inner().validate_only);
    assert_eq!(world.status().await.phase(), Phase::FailedOver);
    let sync = SyncProgress { done_bytes: 5, total_bytes: 9, left_ms: Some(4_000), ..Default::default() };
    target.script.journal.lock().unwrap().sync = Some(sync);
    let request = StartFailbackRequest { request_id: "r-1".into(), ..start() };
    let started = world.failovers().start_failback(request.clone()).await.unwrap().into_inner();
    let same = world.failovers().start_failback(request).await.unwrap().into_inner();
    assert_eq!(same.name, started.name);
    done(&world, &started).await;
    let refused = loop {
        let refused = world.failovers().switch_failback(switch()).await.unwrap_err();
        if refused.message().contains("synchronising") {
            break refused;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(refused.message().contains("5 of 9 bytes, about 4 s left"), "{refused}");
    target.script.journal.lock().unwrap().sync = None;
    ready(&world).await;
    let short = SwitchFailbackRequest { within_ms: 5, ..switch() };
    assert_eq!(code(world.failovers().switch_failback(short).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_merge_that_fails_leaves_it_failing_back() {
    let world = World::new().await;
    let say: Say = Arc::new(|t| match t {
        Tell::MergeStream(_) => Some(Some(Outcome::Error(CommandError {
            kind: CommandErrorKind::Io.into(),
            message: "the disk is full".into(),
        }))),
        _ => None,
    });
    let _source = world.proxy("src", Script { say: Some(say), ..Script::default() }).await;
    let target = world.proxy("dr", Script::default()).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    failed_over(&world).await;
    let stream = failing_back(&world).await.reverse.unwrap().stream_uid;
    let started = world.failovers().switch_failback(switch()).await.unwrap().into_inner();
    let failed = world.finish(&started.name).await;
    assert_eq!(failed.state(), OperationState::Failed);
    let error = failed.error.clone().unwrap();
    assert_eq!((error.step.as_str(), error.message.as_str()), ("merge", "the disk is full"));
    assert_eq!(world.status().await.phase(), Phase::FailingBack);
    let mut desired = target.desired.subscribe();
    let back =
        |d: &DesiredState| d.sources.iter().any(|s| s.stream_uid == stream && !s.hold && s.disks[0].generation == 3);
    desired.wait_for(back).await.unwrap();
    assert!(!target.script.journal.lock().unwrap().held[&stream]);
    // What the source's disks held is gone, also once the failback is given up.
    let started = world.failovers().cancel_failback(cancel()).await.unwrap().into_inner();
    done(&world, &started).await;
    let undo = UndoFailoverRequest { group: SHOP.into(), ..Default::default() };
    assert_eq!(code(world.failovers().undo_failover(undo).await), Code::FailedPrecondition);
}

/// The coordinator dies while each of the steps of a switch is being done; the next one finishes what was begun.
#[tokio::test]
async fn a_restarted_coordinator_goes_on_with_the_switch() {
    type Held = fn(&Tell) -> bool;
    let at: [(&str, bool, Held); 5] = [
        ("fence", false, |t| matches!(t, Tell::Fence(f) if f.hold)),
        ("merge", true, |t| matches!(t, Tell::MergeStream(_))),
        ("leave-view", false, |t| matches!(t, Tell::CloseView(_))),
        ("end-reverse", false, |t| matches!(t, Tell::Unprotect(_))),
        ("drop-reverse", true, |t| matches!(t, Tell::DropStream(_))),
    ];
    for (step, at_source, held) in at {
        let mut world = World::new().await;
        let seen = Arc::new(AtomicUsize::new(0));
        let say: Say = Arc::new(move |t| {
            let stuck = held(t);
            seen.fetch_add(usize::from(stuck), Ordering::SeqCst);
            stuck.then_some(None)
        });
        let stuck = Script { say: Some(say), ..Script::default() };
        let (of_source, of_target) = match at_source {
            true => (stuck, Script::default()),
            false => (Script::default(), stuck),
        };
        let source = world.proxy("src", of_source).await;
        let target = world.proxy("dr", of_target).await;
        world.gold().await;
        world.groups().create_group(shop_request()).await.unwrap();
        world.wait_phase(Phase::Protected).await;
        failed_over(&world).await;
        failing_back(&world).await;
        let started = world.failovers().switch_failback(switch()).await.unwrap().into_inner();
        loop {
            let get = GetOperationRequest { name: started.name.clone() };
            let now = world.operations().get_operation(get).await.unwrap().into_inner();
            assert!(!now.done, "{now:?}");
            if now.steps.iter().any(|s| s.name == step && s.state() == StepState::Running) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let ((a, mut of_a), (b, mut of_b)) = (source.kill().await, target.kill().await);
        world.restart().await;
        (of_a.say, of_b.say) = (None, None);
        let source = FakeProxy::connect(a, of_a).await;
        let target = FakeProxy::connect(b, of_b).await;
        let done = world.finish(&started.name).await;
        assert_eq!(done.state(), OperationState::Done, "stopped at {step}: {done:?}");
        assert_eq!(world.status().await.phase(), Phase::FailedBack);
        assert!(!source.desired.borrow().sources[0].hold);
        assert!(target.desired.borrow().sources.is_empty());
        assert_eq!(target.script.journal.lock().unwrap().generation, 3, "returned once, whatever happened");
        assert!(target.script.journal.lock().unwrap().views.is_empty());
    }
}
