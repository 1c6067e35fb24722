//! A group that is paused and resumed: what its source is told, what is shown and not alarmed about, which verbs fit, and
//! coordinators that restart and die meanwhile.

mod world;

use std::time::Duration;

use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::*;
use tonic::{Code, Status};
use world::*;

async fn pause(world: &World, request_id: &str) -> Result<Group, Status> {
    let (request_id, reason) = (request_id.to_owned(), "new switch".to_owned());
    let request = PauseGroupRequest { name: SHOP.into(), request_id, reason, ..Default::default() };
    world.groups().pause_group(request).await.map(tonic::Response::into_inner)
}

async fn resume(world: &World, request_id: &str) -> Result<Group, Status> {
    let request = ResumeGroupRequest { name: SHOP.into(), request_id: request_id.into(), ..Default::default() };
    world.groups().resume_group(request).await.map(tonic::Response::into_inner)
}

async fn told(source: &FakeProxy, paused: bool) -> SourceGroup {
    let mut desired = source.desired.subscribe();
    let seen = desired.wait_for(|d| d.sources.first().is_some_and(|s| s.paused == paused)).await.unwrap();
    seen.sources[0].clone()
}

/// Until the source has said it.
async fn confirmed(world: &World) -> GroupStatus {
    for _ in 0..200 {
        let status = world.status().await;
        if status.pause.as_ref().is_some_and(|pause| pause.confirmed) {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the source does not confirm it: {:?}", world.status().await);
}

async fn events(world: &World, kind: &str) -> Vec<Event> {
    let request = ListEventsRequest { parent: TENANT.into(), page_size: 1000, ..Default::default() };
    let mut events = world.statuses().list_events(request).await.unwrap().into_inner().events;
    events.retain(|event| event.kind == kind && event.subject == SHOP);
    events
}

fn kinds(status: &GroupStatus) -> Vec<(&str, Severity)> {
    status.conditions.iter().map(|c| (c.kind.as_str(), c.severity())).collect()
}

#[tokio::test]
async fn a_pause_is_told_once_and_its_rpo_alarms_nobody() {
    let world = World::new().await;
    let source = world.proxy("src", Script { rpo_us: 90_000_000, ..Script::default() }).await;
    let _target = world.proxy("dr", Script::default()).await;
    let policy = Policy {
        rpo_target_us: Some(500_000),
        warn_after_ms: Some(200),
        sync_deadline_ms: Some(2_000),
        ..Policy::default()
    };
    world.gold_of(policy).await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    for _ in 0..200 {
        if kinds(&world.status().await).contains(&("rpo-above-target", Severity::Warning)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(told(&source, false).await.sync_deadline_ms, 2_000);

    let made = pause(&world, "p").await.unwrap();
    let who = made.pause.unwrap();
    assert_eq!((who.by.as_str(), who.reason.as_str(), who.confirmed), ("admin/local", "new switch", false));
    assert_eq!(told(&source, true).await.sync_deadline_ms, 0, "nobody waits for a target that is sent nothing");
    confirmed(&world).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let status = world.status().await;
    assert_eq!(kinds(&status), [("paused", Severity::Info)], "{status:?}");
    assert!(status.conditions[0].message.contains("new switch"), "{:?}", status.conditions);
    assert!(status.rpo.unwrap().now_us.unwrap() >= 90_000_000, "it is shown as it is");
    let pages = events(&world, "pause").await;
    assert_eq!(pages.len(), 1, "{pages:?}");
    assert!(pages[0].severity() == Severity::Warning && pages[0].message.contains("new switch"), "{pages:?}");

    // Again: as it is, by whoever asked first.
    let again = pause(&world, "q").await.unwrap();
    assert_eq!((again.pause.unwrap().time_ns, again.version), (who.time_ns, made.version));
    assert_eq!(events(&world, "pause").await.len(), 1);
    assert!(resume(&world, "r").await.unwrap().pause.is_none());
    assert_eq!(told(&source, false).await.sync_deadline_ms, 2_000);
    // The request of before is not done a second time.
    assert!(pause(&world, "p").await.unwrap().pause.is_none());
    assert!(resume(&world, "s").await.unwrap().pause.is_none());
    assert_eq!(events(&world, "pause").await.len(), 2);
}

#[tokio::test]
async fn a_failover_fits_a_paused_group_ends_the_pause_and_waits_for_nothing() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    pause(&world, "").await.unwrap();
    confirmed(&world).await;

    let planned = StartPlannedFailoverRequest { group: SHOP.into(), ..Default::default() };
    let refused = world.failovers().start_planned_failover(planned).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("paused") && refused.message().contains("resume"), "{refused}");
    let undo = UndoFailoverRequest { group: SHOP.into(), ..Default::default() };
    let refused = world.failovers().undo_failover(undo).await.unwrap_err();
    assert!(refused.message().contains("paused") && refused.message().contains("resume, failover"), "{refused}");

    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    let done = world.finish(&started.name).await;
    assert_eq!(done.state(), OperationState::Done, "{done:?}");
    let drain = done.steps.iter().find(|step| step.name == "drain").unwrap();
    assert!(drain.state() == StepState::Skipped && drain.detail.contains("paused"), "{drain:?}");
    let status = world.wait_phase(Phase::FailedOver).await;
    assert!(status.pause.is_none() && !kinds(&status).iter().any(|(kind, _)| *kind == "paused"), "{status:?}");
    for refused in [pause(&world, "").await.unwrap_err(), resume(&world, "").await.unwrap_err()] {
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("failed over") && refused.message().contains("undo-failover"), "{refused}");
    }
    let undo = UndoFailoverRequest { group: SHOP.into(), ..Default::default() };
    let started = world.failovers().undo_failover(undo).await.unwrap().into_inner();
    assert_eq!(world.finish(&started.name).await.state(), OperationState::Done);
    let after = told(&source, false).await;
    assert!(!after.hold, "what it wrote is wanted: {after:?}");
    assert!(world.wait_phase(Phase::Protected).await.pause.is_none());
}

#[tokio::test]
async fn a_failover_that_comes_to_nothing_leaves_the_pause() {
    use afterimage_wire::v1::command::Command as Tell;
    use afterimage_wire::v1::command_result::Outcome;
    let world = World::new().await;
    let _source = world.proxy("src", Script::default()).await;
    let say: Say = std::sync::Arc::new(|tell| {
        let error = CommandError { kind: CommandErrorKind::Io.into(), message: "no room".into() };
        matches!(tell, Tell::OpenView(_)).then_some(Some(Outcome::Error(error)))
    });
    let _target = world.proxy("dr", Script { say: Some(say), ..Script::default() }).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    pause(&world, "").await.unwrap();
    let started = world.failovers().start_failover(failover_request(At::Latest(true))).await.unwrap().into_inner();
    assert_eq!(world.finish(&started.name).await.state(), OperationState::Failed);
    let status = world.wait_phase(Phase::Protected).await;
    assert!(status.pause.is_some(), "{status:?}");
}

#[tokio::test]
async fn a_source_that_is_away_is_told_when_it_is_back_also_by_the_next_coordinator() {
    let mut world = World::new().await;
    let (source, _target) = world.shop().await;
    let (bundle, script) = source.kill().await;
    pause(&world, "").await.unwrap();
    let status = world.status().await;
    assert!(!status.pause.unwrap().confirmed);
    let paused = status.conditions.iter().find(|c| c.kind == "paused").unwrap();
    assert!(paused.message.contains("has not confirmed"), "{paused:?}");
    world.restart().await;
    let source = FakeProxy::connect(bundle, script).await;
    told(&source, true).await;
    let status = confirmed(&world).await;
    assert_eq!(status.pause.unwrap().by, "admin/local");
}

#[tokio::test]
async fn a_coordinator_that_dies_at_its_commit_has_paused_it_or_has_not() {
    let mut world = World::new().await;
    let (source, target) = world.shop().await;
    let mut scripts = vec![source.kill().await, target.kill().await];
    for (round, committed) in [(0, true), (1, false), (2, true), (3, false)] {
        let paused = round < 2;
        let before = world.status().await.pause.is_some();
        world.death.comes(0, committed);
        let id = format!("r-{round}");
        let asked = if paused { pause(&world, &id).await } else { resume(&world, &id).await };
        assert!(asked.is_err(), "nobody has heard of it: {asked:?}");
        world.restart().await;
        let now = world.status().await.pause.is_some();
        assert_eq!(now, if committed { paused } else { before }, "round {round}");
        // Asked again with the same id it is so, once.
        let version = |group: Group| (group.version, group.pause.is_some());
        let first = version(if paused { pause(&world, &id).await } else { resume(&world, &id).await }.unwrap());
        let again = version(if paused { pause(&world, &id).await } else { resume(&world, &id).await }.unwrap());
        assert_eq!((first, first.1), (again, paused), "round {round}");
        if round == 0 {
            resume(&world, "between").await.unwrap();
        } else if round == 2 {
            pause(&world, "between").await.unwrap();
        }
    }
    let (bundle, script) = scripts.remove(0);
    let source = FakeProxy::connect(bundle, script).await;
    told(&source, false).await;
}

#[tokio::test]
async fn what_is_only_checked_and_what_has_changed_pauses_nothing() {
    let world = World::new().await;
    let _proxies = world.shop().await;
    let checked = PauseGroupRequest { name: SHOP.into(), validate_only: true, ..Default::default() };
    assert!(world.groups().pause_group(checked).await.unwrap().into_inner().pause.is_some(), "as it would be");
    assert!(world.status().await.pause.is_none());
    let stale = PauseGroupRequest { name: SHOP.into(), etag: "1".into(), ..Default::default() };
    assert_eq!(code(world.groups().pause_group(stale).await), Code::Aborted);
    let long = PauseGroupRequest { name: SHOP.into(), reason: "x".repeat(10_000), ..Default::default() };
    assert_eq!(code(world.groups().pause_group(long).await), Code::InvalidArgument);
    let none = PauseGroupRequest { name: format!("{TENANT}/groups/none"), ..Default::default() };
    assert_eq!(code(world.groups().pause_group(none).await), Code::NotFound);
}
