//! Failover plans through the API: objects as others are; runs that go on over a restart of the coordinator.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::plans_client::PlansClient;
use afterimage_wire::v1::*;
use prost_types::FieldMask;
use tonic::Code;
use tonic::transport::Channel;
use world::*;

const SITE: &str = "tenants/default/plans/site";

fn plans(world: &World) -> PlansClient<Channel> {
    PlansClient::new(world.channel.clone())
}

fn step(group: &str, after: &[&str]) -> PlanStep {
    let after = after.iter().map(|id| (*id).to_owned()).collect();
    PlanStep { group: format!("{TENANT}/groups/{group}"), after, ..PlanStep::default() }
}

fn create(id: &str, steps: Vec<PlanStep>) -> CreatePlanRequest {
    let plan = Some(Plan { steps, ..Plan::default() });
    CreatePlanRequest { parent: TENANT.into(), plan_id: id.into(), plan, ..CreatePlanRequest::default() }
}

async fn site(world: &World) -> Result<Plan, tonic::Status> {
    plans(world).get_plan(GetPlanRequest { name: SITE.into() }).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_plan_is_an_object_as_others_are() {
    let world = World::new().await;
    let (_source, _target) = world.shop().await;
    let steps = || vec![step("shop", &[])];
    let trial = CreatePlanRequest { validate_only: true, ..create("site", steps()) };
    plans(&world).create_plan(trial).await.unwrap();
    assert_eq!(code(site(&world).await), Code::NotFound);

    let once = CreatePlanRequest { request_id: "1".into(), ..create("site", steps()) };
    let made = plans(&world).create_plan(once.clone()).await.unwrap().into_inner();
    let again = plans(&world).create_plan(once).await.unwrap().into_inner();
    assert_eq!((made.uid, made.parallel, made.steps[0].id.as_str()), (again.uid, 4, "shop"));
    assert_eq!(code(plans(&world).create_plan(create("site", steps())).await), Code::AlreadyExists);
    assert_eq!(code(plans(&world).create_plan(create("other", vec![step("gone", &[])])).await), Code::NotFound);

    let update = |plan, paths: &[&str]| UpdatePlanRequest {
        plan: Some(Plan { name: SITE.into(), ..plan }),
        update_mask: Some(FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() }),
        ..Default::default()
    };
    let slower = vec![PlanStep { delay_ms: 500, ..step("shop", &[]) }];
    let changed = update(Plan { steps: slower, ..Plan::default() }, &["steps"]);
    let changed = plans(&world).update_plan(changed).await.unwrap().into_inner();
    assert_eq!((changed.steps[0].delay_ms, changed.version, changed.parallel), (500, 2, 4));
    let stale = update(Plan { etag: made.etag, parallel: 8, ..Plan::default() }, &["parallel"]);
    assert_eq!(code(plans(&world).update_plan(stale).await), Code::Aborted);
    let empty = update(Plan::default(), &["steps"]);
    assert_eq!(code(plans(&world).update_plan(empty).await), Code::InvalidArgument);

    let filter = "parallel = 4".to_owned();
    let list = ListPlansRequest { parent: TENANT.into(), filter, ..Default::default() };
    let listed = plans(&world).list_plans(list).await.unwrap().into_inner().plans;
    assert_eq!(listed.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), [SITE]);

    // A group is not to vanish from a plan unseen.
    let delete = DeleteGroupRequest { name: SHOP.into(), ..Default::default() };
    let refused = world.groups().delete_group(delete).await.unwrap_err();
    assert!(refused.message().contains("plans/site"), "{refused}");

    // Over a restart, and to the end.
    let mut world = world;
    world.restart().await;
    assert_eq!(site(&world).await.unwrap().steps[0].delay_ms, 500);
    let delete = DeletePlanRequest { name: SITE.into(), etag: "1".into(), ..Default::default() };
    assert_eq!(code(plans(&world).delete_plan(delete).await), Code::Aborted);
    let delete = DeletePlanRequest { name: SITE.into(), ..Default::default() };
    plans(&world).delete_plan(delete.clone()).await.unwrap();
    assert_eq!(code(plans(&world).delete_plan(delete).await), Code::NotFound);
}

/// Three groups at scripted proxies, and a plan with one after the other, the second behind a script.
async fn three(world: &World, target: Script) -> (FakeProxy, FakeProxy) {
    let source = world.proxy("src", Script::default()).await;
    let target = world.proxy("dr", target).await;
    world.gold().await;
    for id in ["shop", "app", "web"] {
        let mut request = CreateGroupRequest { group_id: id.into(), ..shop_request() };
        request
            .group
            .as_mut()
            .unwrap()
            .disks
            .iter_mut()
            .for_each(|disk| disk.path = format!("/disks/{id}/{}", disk.name));
        world.groups().create_group(request).await.unwrap();
    }
    let script = PlanScript { script: "gate".into(), ..PlanScript::default() };
    let app = PlanStep { before: vec![script], ..step("app", &["shop"]) };
    let steps = vec![step("shop", &[]), app, step("web", &["app"])];
    plans(world).create_plan(create("site", steps)).await.unwrap();
    for id in ["shop", "app", "web"] {
        wait_phase(world, id, Phase::Protected).await;
    }
    (source, target)
}

async fn phase(world: &World, group: &str) -> Phase {
    let request = GetStatusRequest { parent: format!("{TENANT}/groups/{group}") };
    world.statuses().get_status(request).await.unwrap().into_inner().groups.remove(0).phase()
}

async fn wait_phase(world: &World, group: &str, wanted: Phase) {
    for _ in 0..400 {
        if phase(world, group).await == wanted {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("{group} does not become {wanted:?}");
}

fn run() -> RunPlanRequest {
    RunPlanRequest { plan: SITE.into(), ..RunPlanRequest::default() }
}

fn words(operation: &Operation) -> Vec<StepState> {
    operation.steps.iter().map(Step::state).collect()
}

#[tokio::test]
async fn a_run_goes_on_over_a_restart_is_stopped_resumed_and_undone() {
    use StepState::{Done, Pending, Skipped};
    let mut world = World::new().await;
    let (closed, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (gate, count) = (closed.clone(), asked.clone());
    let say = move |tell: &Tell| {
        let Tell::RunScript(script) = tell else { return None };
        count.fetch_add(1, Ordering::SeqCst);
        assert_eq!((script.step.as_str(), script.when.as_str(), script.verb()), ("app", "before", PlanVerb::Run));
        gate.load(Ordering::SeqCst).then_some(None)
    };
    let script = Script { say: Some(Arc::new(say)), ..Script::default() };
    let (source, target) = three(&world, script).await;

    let trial = RunPlanRequest { validate_only: true, ..run() };
    let tried = plans(&world).run_plan(trial).await.unwrap().into_inner();
    assert_eq!(
        (tried.validate_only, tried.state(), words(&tried)),
        (true, OperationState::Done, vec![Done; 3]),
        "{tried:?}"
    );
    for bad in [
        RunPlanRequest { unconfirmed: true, confirm_name: "shop".into(), ..run() },
        RunPlanRequest { to: Some(PointChoice { at: Some(point_choice::At::Seq(5)) }), ..run() },
        RunPlanRequest { planned: true, to: Some(PointChoice { at: Some(point_choice::At::TimeNs(5)) }), ..run() },
    ] {
        assert_eq!(code(plans(&world).run_plan(bad).await), Code::InvalidArgument);
    }

    let once = RunPlanRequest { request_id: "1".into(), ..run() };
    let begun = plans(&world).run_plan(once.clone()).await.unwrap().into_inner();
    assert_eq!(plans(&world).run_plan(once.clone()).await.unwrap().into_inner().name, begun.name);
    assert_eq!(code(plans(&world).run_plan(run()).await), Code::FailedPrecondition);
    let delete = DeletePlanRequest { name: SITE.into(), ..Default::default() };
    assert_eq!(code(plans(&world).delete_plan(delete).await), Code::FailedPrecondition);
    while asked.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // The coordinator that asked is gone, and another one asks again, for the same.
    let (source, target) = (source.kill().await, target.kill().await);
    world.restart().await;
    let _source = FakeProxy::connect(source.0, source.1).await;
    let _target = FakeProxy::connect(target.0, target.1).await;
    while asked.load(Ordering::SeqCst) < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let stop = StopPlanRequest { plan: SITE.into(), ..Default::default() };
    let stopping = plans(&world).stop_plan(stop.clone()).await.unwrap().into_inner();
    assert!(stopping.cancel_requested && !stopping.done, "{stopping:?}");
    closed.store(false, Ordering::SeqCst);
    // Its session is the only one that has not been answered.
    let again = _target.kill().await;
    let _target = FakeProxy::connect(again.0, again.1).await;
    let stopped = world.finish(&begun.name).await;
    assert_eq!((stopped.state(), words(&stopped)), (OperationState::Stopped, vec![Done, Done, Pending]), "{stopped:?}");
    assert_eq!(code(plans(&world).stop_plan(stop).await), Code::FailedPrecondition);
    assert_eq!((phase(&world, "app").await, phase(&world, "web").await), (Phase::FailedOver, Phase::Protected));

    let resume = ResumePlanRequest { plan: SITE.into(), ..Default::default() };
    let resumed = plans(&world).resume_plan(resume.clone()).await.unwrap().into_inner();
    let resumed = world.finish(&resumed.name).await;
    assert_eq!((resumed.state(), words(&resumed)), (OperationState::Done, vec![Skipped, Skipped, Done]), "{resumed:?}");
    assert_eq!(resumed.plan_run.as_ref().unwrap().continues, begun.name);
    assert_eq!(code(plans(&world).resume_plan(resume).await), Code::FailedPrecondition);

    // Each group was failed over by one operation of its own.
    let list = ListOperationsRequest { parent: TENANT.into(), ..Default::default() };
    let all = world.operations().list_operations(list.clone()).await.unwrap().into_inner().operations;
    let mut verbs: Vec<&str> = all.iter().map(|operation| operation.verb.as_str()).collect();
    verbs.sort_unstable();
    assert_eq!(verbs, ["failover", "failover", "failover", "run-plan", "run-plan"]);

    let undo = UndoPlanRequest { plan: SITE.into(), ..Default::default() };
    let undone = plans(&world).undo_plan(undo).await.unwrap().into_inner();
    let undone = world.finish(&undone.name).await;
    assert_eq!((undone.state(), words(&undone)), (OperationState::Done, vec![Done; 3]), "{undone:?}");
    assert!(undone.steps[2].end_time_ns <= undone.steps[0].start_time_ns, "in the reverse order: {undone:?}");

    let runs = ListPlanRunsRequest { parent: SITE.into(), ..Default::default() };
    let runs = plans(&world).list_plan_runs(runs).await.unwrap().into_inner().runs;
    assert_eq!(runs.iter().map(|run| run.verb.as_str()).collect::<Vec<_>>(), ["undo-plan", "run-plan", "run-plan"]);
    let estimate = plans(&world).estimate_plan(EstimatePlanRequest { plan: SITE.into() }).await.unwrap().into_inner();
    assert!(estimate.rto_ms.is_some() && estimate.steps.iter().all(|step| !step.by_test), "{estimate:?}");
    let delete = DeleteOperationRequest { name: begun.name.clone(), ..Default::default() };
    world.operations().delete_operation(delete).await.unwrap();
    assert_eq!(code(world.operations().get_operation(GetOperationRequest { name: begun.name }).await), Code::NotFound);
}

#[tokio::test]
async fn a_source_that_is_gone_needs_the_plans_name_and_a_failure_is_resumed() {
    let world = World::new().await;
    let (source, _target) = three(&world, Script::default()).await;
    let (bundle, script) = source.kill().await;
    wait_unreachable(&world).await;
    let tried = plans(&world).run_plan(RunPlanRequest { validate_only: true, ..run() }).await.unwrap().into_inner();
    assert_eq!(tried.state(), OperationState::Failed, "{tried:?}");
    let unconfirmed = RunPlanRequest { unconfirmed: true, confirm_name: "site".into(), ..run() };
    let begun = plans(&world).run_plan(unconfirmed).await.unwrap().into_inner();
    let done = world.finish(&begun.name).await;
    assert_eq!((done.state(), words(&done)), (OperationState::Done, vec![StepState::Done; 3]), "{done:?}");
    assert!(done.plan_run.as_ref().unwrap().rto_ms.is_some());
    // Failed over already, all of them: nothing to do.
    let again = plans(&world).run_plan(run()).await.unwrap().into_inner();
    let again = world.finish(&again.name).await;
    assert_eq!((again.state(), words(&again)), (OperationState::Done, vec![StepState::Skipped; 3]), "{again:?}");
    // Without machines there is nothing to start for a test.
    let test = TestPlanRequest { plan: SITE.into(), ..Default::default() };
    let failed = plans(&world).test_plan(test).await.unwrap().into_inner();
    let failed = world.finish(&failed.name).await;
    assert_eq!(failed.state(), OperationState::Failed, "{failed:?}");
    let error = failed.error.unwrap();
    assert!(error.step == "shop" && error.remedy.contains("plan resume site"), "{error:?}");
    assert_eq!(failed.steps[1].detail, "not begun: it comes after shop");
    let _source = FakeProxy::connect(bundle, script).await;
}

async fn wait_unreachable(world: &World) {
    for _ in 0..200 {
        let request = GetProxyRequest { name: proxy_name("src") };
        if !world.proxies().get_proxy(request).await.unwrap().into_inner().connected {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("the source is not missed");
}
