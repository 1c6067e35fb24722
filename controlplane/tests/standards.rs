//! What a client of any language expects of a resource-oriented API: masks, etags, pages, filters, request ids, checks
//! only, watches that resume, operations that are given up.

mod world;

use std::time::Duration;

use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::watch_response::Update;
use afterimage_wire::v1::*;
use prost_types::FieldMask;
use tonic::Code;
use tonic_types::StatusExt;
use world::*;

fn create(id: &str, request_id: &str) -> CreatePolicyRequest {
    CreatePolicyRequest {
        parent: TENANT.into(),
        policy_id: id.into(),
        policy: Some(Policy { description: format!("the {id}"), ..Policy::default() }),
        request_id: request_id.into(),
        ..Default::default()
    }
}

fn mask(paths: &[&str]) -> Option<FieldMask> {
    Some(FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() })
}

fn name(id: &str) -> String {
    format!("{TENANT}/policies/{id}")
}

#[tokio::test]
async fn an_update_changes_what_its_mask_names() {
    let world = World::new().await;
    let old = world.policies().create_policy(create("a", "")).await.unwrap().into_inner();
    let update = async |policy: Policy, update_mask| {
        let request = UpdatePolicyRequest {
            policy: Some(Policy { name: name("a"), ..policy }),
            update_mask,
            ..Default::default()
        };
        world.policies().update_policy(request).await.map(tonic::Response::into_inner)
    };
    let both = Policy { retention_s: Some(60), cut_interval_ms: Some(500), ..Policy::default() };
    let made = update(both.clone(), mask(&["retention_s"])).await.unwrap();
    assert_eq!((made.retention_s, made.cut_interval_ms), (Some(60), old.cut_interval_ms));
    assert_eq!((made.description.as_str(), made.uid), ("the a", old.uid.clone()));
    // Without a mask: what is set.
    let made = update(Policy { cut_interval_ms: Some(250), ..Policy::default() }, None).await.unwrap();
    assert_eq!((made.retention_s, made.cut_interval_ms, made.description.as_str()), (Some(60), Some(250), "the a"));
    // Everything: what is not set has its default.
    let made = update(both, mask(&["*"])).await.unwrap();
    assert_eq!((made.retention_s, made.rpo_target_us, made.description.as_str()), (Some(60), Some(1_000_000), ""));
    let refused = update(Policy::default(), mask(&["retention"])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let violation = &refused.get_details_bad_request().unwrap().field_violations[0];
    assert_eq!(violation.field, "update_mask");
    assert!(violation.description.contains("retention_s"), "{violation:?}");
    assert_eq!(refused.get_details_error_info().unwrap().reason, "INVALID_FIELD");
}

#[tokio::test]
async fn a_request_id_is_done_once_and_only_for_what_it_was_given_for() {
    let mut world = World::new().await;
    let first = world.policies().create_policy(create("a", "1")).await.unwrap().into_inner();
    let again = world.policies().create_policy(create("a", "1")).await.unwrap().into_inner();
    assert_eq!(first, again);
    let refused = world.policies().create_policy(create("b", "1")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, "request_id");
    assert_eq!(code(world.policies().create_policy(create("a", "2")).await), Code::AlreadyExists);
    // Another caller's ids are its own.
    let other = world.join(Role::Operator, "anna").await;
    let channel = afterimage_controlplane::client::connect(&other).await.unwrap();
    let mut policies = policies_client::PoliciesClient::new(channel);
    policies.create_policy(create("b", "1")).await.unwrap();

    let update = UpdatePolicyRequest {
        policy: Some(Policy { name: name("a"), etag: first.etag.clone(), retention_s: Some(60), ..Policy::default() }),
        request_id: "3".into(),
        ..Default::default()
    };
    let made = world.policies().update_policy(update.clone()).await.unwrap().into_inner();
    // Over a restart, too: the etag would not fit any more.
    world.restart().await;
    let again = world.policies().update_policy(update).await.unwrap().into_inner();
    assert_eq!((again.version, again.etag), (made.version, made.etag));

    let delete = DeletePolicyRequest { name: name("a"), request_id: "4".into(), ..Default::default() };
    world.policies().delete_policy(delete.clone()).await.unwrap();
    world.policies().delete_policy(delete).await.unwrap();
    let delete = DeletePolicyRequest { name: name("a"), request_id: "5".into(), ..Default::default() };
    assert_eq!(code(world.policies().delete_policy(delete).await), Code::NotFound);
    // What the first request made is gone, and it is not made again.
    assert_eq!(code(world.policies().create_policy(create("a", "1")).await), Code::NotFound);
}

#[tokio::test]
async fn the_same_request_many_times_at_once_makes_one() {
    let world = World::new().await;
    let calls = (0..16).map(|_| {
        let mut policies = world.policies();
        tokio::spawn(async move { policies.create_policy(create("a", "same")).await.unwrap().into_inner().uid })
    });
    let mut uids = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        uids.push(call.await.unwrap());
    }
    uids.dedup();
    assert_eq!(uids.len(), 1);
}

#[tokio::test]
async fn checks_only_change_nothing() {
    let world = World::new().await;
    let _proxies = world.shop().await;
    let before = world.policies().get_policy(GetPolicyRequest { name: GOLD.into() }).await.unwrap().into_inner();
    let used = DeletePolicyRequest { name: GOLD.into(), validate_only: true, ..Default::default() };
    assert_eq!(code(world.policies().delete_policy(used).await), Code::FailedPrecondition);
    let group = DeleteGroupRequest { name: SHOP.into(), validate_only: true, ..Default::default() };
    world.groups().delete_group(group).await.unwrap();
    let disk = format!("{SHOP}/disks/wal");
    let delete = DeleteDiskRequest { name: disk.clone(), validate_only: true, ..Default::default() };
    world.groups().delete_disk(delete).await.unwrap();
    let stale = DeleteDiskRequest { name: disk.clone(), etag: "stale".into(), ..Default::default() };
    assert_eq!(code(world.groups().delete_disk(stale).await), Code::Aborted);
    world.groups().get_disk(GetDiskRequest { name: disk }).await.unwrap();
    let cut = CreateCutRequest { parent: SHOP.into(), label: "x".into(), validate_only: true, ..Default::default() };
    world.points().create_cut(cut).await.unwrap();
    let made = world.policies().create_policy(CreatePolicyRequest { validate_only: true, ..create("x", "9") }).await;
    assert!(made.unwrap().into_inner().etag.is_empty());
    // Nor is its request id spent.
    world.policies().create_policy(create("x", "9")).await.unwrap();
    let after = world.policies().get_policy(GetPolicyRequest { name: GOLD.into() }).await.unwrap().into_inner();
    assert_eq!(before, after);
}

#[tokio::test]
async fn pages_hold_everything_once_and_filters_what_fits() {
    let world = World::new().await;
    for i in 0..7 {
        world.policies().create_policy(create(&format!("p{i}"), "")).await.unwrap();
    }
    let list = async |page_size, page_token: &str, filter: &str| {
        let request = ListPoliciesRequest {
            parent: TENANT.into(),
            page_size,
            page_token: page_token.into(),
            filter: filter.into(),
        };
        world.policies().list_policies(request).await.map(tonic::Response::into_inner)
    };
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let page = list(3, &token, "").await.unwrap();
        assert!(page.policies.len() <= 3);
        found.extend(page.policies.into_iter().map(|p| p.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
        // Behind the reader, and before it.
        let delete = DeletePolicyRequest { name: found[0].clone(), ..Default::default() };
        let _ = world.policies().delete_policy(delete).await;
    }
    assert_eq!(found, (0..7).map(|i| name(&format!("p{i}"))).collect::<Vec<_>>());

    let page = list(1, "", "").await.unwrap();
    for (size, token, filter) in
        [(-1, "", ""), (1, "nonsense", ""), (1, page.next_page_token.as_str(), "version = 1"), (1, "", "nonsense = 1")]
    {
        assert_eq!(code(list(size, token, filter).await), Code::InvalidArgument, "{size} {token} {filter}");
    }
    let found = list(0, "", "description:\"p3\" OR name = \"*p5\"").await.unwrap().policies;
    assert_eq!(found.iter().map(|p| p.name.clone()).collect::<Vec<_>>(), [name("p3"), name("p5")]);
}

#[tokio::test]
async fn a_watch_resumes_where_it_was_and_says_what_it_has_missed() {
    let mut world = World::new().await;
    let _proxies = world.shop().await;
    let watch = async |world: &World, resume_token: String| {
        let request = WatchRequest { parent: TENANT.into(), events_only: true, resume_token, ..Default::default() };
        world.statuses().watch(request).await.map(tonic::Response::into_inner)
    };
    let join = async |world: &World, name: &str| drop(world.join(Role::Viewer, name).await);
    let next = async |stream: &mut tonic::Streaming<WatchResponse>| {
        let message = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.unwrap().unwrap().unwrap();
        let Some(Update::Event(event)) = message.update else { panic!("{message:?}") };
        (event, message.resume_token, message.gap)
    };
    let mut stream = watch(&world, String::new()).await.unwrap();
    join(&world, "one").await;
    let (event, token, gap) = next(&mut stream).await;
    assert!(event.message.contains("one") && !gap, "{event:?}");
    drop(stream);
    join(&world, "two").await;
    join(&world, "three").await;
    let mut stream = watch(&world, token.clone()).await.unwrap();
    for who in ["two", "three"] {
        let (event, _, gap) = next(&mut stream).await;
        assert!(event.message.contains(who) && !gap, "{event:?}");
    }
    for bad in ["nonsense", "AAAA", &token[..token.len() - 4]] {
        assert_eq!(code(watch(&world, bad.into()).await.map(drop)), Code::InvalidArgument, "{bad}");
    }
    let other = WatchRequest { parent: SHOP.into(), resume_token: token.clone(), ..Default::default() };
    assert_eq!(code(world.statuses().watch(other).await.map(drop)), Code::InvalidArgument);
    // Events of before a restart are gone: the watch goes on, and says so.
    drop(stream);
    world.restart().await;
    let mut stream = watch(&world, token).await.unwrap();
    join(&world, "four").await;
    assert!(next(&mut stream).await.2);
}

#[tokio::test]
async fn a_failover_is_given_up_until_its_view_is_being_opened() {
    use afterimage_wire::v1::command::Command as Tell;
    use afterimage_wire::v1::command_result::Outcome;
    let world = World::new().await;
    // The target takes its time to say which point that is.
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = asked.clone();
    let say: Say = std::sync::Arc::new(move |tell| {
        let third =
            matches!(tell, Tell::RaiseGeneration(_)) && count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
        third.then(|| {
            std::thread::sleep(Duration::from_millis(600));
            Some(Outcome::Generation(GenerationRaised { generation: 2, zero_loss: false }))
        })
    });
    let _source = world.proxy("src", Script::default()).await;
    let _target = world.proxy("dr", Script { say: Some(say), ..Script::default() }).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    let start = |id: &str| StartFailoverRequest { request_id: id.into(), ..failover_request(At::Latest(true)) };
    let begun = world.failovers().start_failover(start("1")).await.unwrap().into_inner();
    assert!(!begun.done && begun.progress_percent < 100);
    let cancel = |id: &str| CancelOperationRequest { name: begun.name.clone(), request_id: id.into() };
    let early = DeleteOperationRequest { name: begun.name.clone(), ..Default::default() };
    assert_eq!(code(world.operations().delete_operation(early).await), Code::FailedPrecondition);
    assert!(world.operations().cancel_operation(cancel("a")).await.unwrap().into_inner().cancel_requested);
    world.operations().cancel_operation(cancel("")).await.unwrap();
    let ended = world.finish(&begun.name).await;
    assert_eq!(ended.state(), OperationState::Failed, "{ended:?}");
    assert!(ended.done && ended.error.as_ref().unwrap().message.contains("given up by admin/local"), "{ended:?}");
    let steps: Vec<&str> = ended.steps.iter().map(|s| s.name.as_str()).collect();
    assert!(steps.contains(&"release") && !steps.contains(&"open-view"), "{steps:?}");
    assert_eq!(world.wait_phase(Phase::Protected).await.phase(), Phase::Protected);
    assert_eq!(code(world.operations().cancel_operation(cancel("b")).await), Code::FailedPrecondition);
    // The first request has been done, whatever has become of the operation since.
    assert!(world.operations().cancel_operation(cancel("a")).await.unwrap().into_inner().done);
    // The same request is the same operation; a new one is done.
    let same = world.failovers().start_failover(start("1")).await.unwrap().into_inner();
    assert_eq!(same.name, begun.name);
    let begun = world.failovers().start_failover(start("2")).await.unwrap().into_inner();
    let ended = world.finish(&begun.name).await;
    assert_eq!((ended.state(), ended.progress_percent), (OperationState::Done, 100), "{ended:?}");
    let list = ListOperationsRequest { parent: TENANT.into(), page_size: 1, ..Default::default() };
    let page = world.operations().list_operations(list.clone()).await.unwrap().into_inner();
    assert_eq!(page.operations[0].name, ended.name);
    let rest = ListOperationsRequest { page_token: page.next_page_token, ..list };
    let page = world.operations().list_operations(rest).await.unwrap().into_inner();
    assert_eq!((page.operations[0].name.as_str(), page.next_page_token.as_str()), (same.name.as_str(), ""));
    let delete = DeleteOperationRequest { name: same.name.clone(), etag: "x".into(), ..Default::default() };
    assert_eq!(code(world.operations().delete_operation(delete.clone()).await), Code::Aborted);
    world.operations().delete_operation(DeleteOperationRequest { etag: String::new(), ..delete }).await.unwrap();
}

#[tokio::test]
async fn points_come_in_pages() {
    let world = World::new().await;
    let _proxies = world.shop().await;
    let mut request = ListPointsRequest { parent: SHOP.into(), page_size: 30, ..Default::default() };
    let mut seqs = Vec::new();
    loop {
        let page = world.points().list_points(request.clone()).await.unwrap().into_inner();
        seqs.extend(page.points.iter().map(|p| p.seq));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(seqs, (1..=100).collect::<Vec<_>>());
    request.cuts_only = true;
    assert_eq!(code(world.points().list_points(request).await), Code::InvalidArgument);
}
