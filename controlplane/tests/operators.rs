//! What operators do, against a coordinator with real TLS and scripted proxies.

mod world;

use std::time::Duration;

use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::watch_response::Update;
use afterimage_wire::v1::*;
use tonic::Code;
use world::*;

#[tokio::test]
async fn a_group_is_protected_shown_and_deleted() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    let status = world.status().await;
    assert_eq!((status.source.as_str(), status.durable_seq), (proxy_name("src").as_str(), 100));
    assert_eq!(status.points.unwrap().newest.unwrap().name, format!("{SHOP}/points/100"));
    assert!(status.rpo.unwrap().now_us.is_some());
    assert!(status.conditions.is_empty(), "{:?}", status.conditions);

    let at_source = source.desired.borrow().clone();
    assert_eq!(at_source.sources[0].target_address, "dr.example:7070");
    assert_eq!(at_source.sources[0].disks.len(), 2);
    let at_target = target.desired.borrow().clone();
    assert_eq!(at_source.sources[0].key, at_target.targets[0].key);
    assert_eq!(at_source.sources[0].key.as_ref().unwrap().key.len(), 32);
    assert_eq!(at_source.peers[0].uid, target.bundle.uid);

    let delete = DeleteGroupRequest { name: SHOP.into(), delete_points: true, ..Default::default() };
    world.groups().delete_group(delete).await.unwrap();
    let mut desired = source.desired.subscribe();
    desired.wait_for(|d| d.sources.is_empty()).await.unwrap();
    let gone = world.groups().get_group(GetGroupRequest { name: SHOP.into() }).await;
    assert_eq!(code(gone), Code::NotFound);
}

#[tokio::test]
async fn a_changed_policy_reaches_the_proxies_and_a_used_one_stays() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let delete = DeletePolicyRequest { name: GOLD.into(), ..Default::default() };
    assert_eq!(code(world.policies().delete_policy(delete).await), Code::FailedPrecondition);
    let old = world.policies().get_policy(GetPolicyRequest { name: GOLD.into() }).await.unwrap().into_inner();
    let new = Policy { cut_interval_ms: Some(250), ..old.clone() };
    let update = |policy| UpdatePolicyRequest { policy: Some(policy), ..Default::default() };
    let made = world.policies().update_policy(update(new.clone())).await.unwrap().into_inner();
    assert_eq!(made.version, old.version + 1);
    let mut desired = source.desired.subscribe();
    desired.wait_for(|d| d.sources[0].cut_interval_ms == 250).await.unwrap();
    // The etag of before does not fit any more.
    assert_eq!(code(world.policies().update_policy(update(new)).await), Code::Aborted);
}

#[tokio::test]
async fn bad_input_is_refused_and_named_and_nothing_stays() {
    let world = World::new().await;
    let _source = world.proxy("src", Script::default()).await;
    let _target = world.proxy("dr", Script::default()).await;
    world.gold().await;
    let refuse = async |change: fn(&mut CreateGroupRequest), code: Code, word: &str| {
        let mut request = shop_request();
        change(&mut request);
        let status = world.groups().create_group(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{status}");
    };
    refuse(|r| r.group_id = "Shop!".into(), Code::InvalidArgument, "group_id").await;
    refuse(|r| r.parent = "tenants/other".into(), Code::InvalidArgument, "parent").await;
    refuse(|r| r.group = None, Code::InvalidArgument, "group").await;
    refuse(|r| r.group.as_mut().unwrap().policy = "tenants/default/policies/tin".into(), Code::NotFound, "tin").await;
    refuse(|r| r.group.as_mut().unwrap().source = proxy_name("nobody"), Code::NotFound, "nobody").await;
    refuse(|r| r.group.as_mut().unwrap().target = proxy_name("src"), Code::InvalidArgument, "group.target").await;
    refuse(|r| r.group.as_mut().unwrap().disks[1].path = "/nowhere".into(), Code::InvalidArgument, "/nowhere").await;
    refuse(|r| r.group.as_mut().unwrap().disks[1].size_bytes = 1000, Code::InvalidArgument, "disks[1].size_bytes")
        .await;
    refuse(|r| r.group.as_mut().unwrap().disks[1].size_bytes = 512, Code::InvalidArgument, "1073741824").await;
    refuse(|r| r.group.as_mut().unwrap().disks[1].name = "data".into(), Code::AlreadyExists, "data").await;
    refuse(|r| r.request_id = "x".repeat(65), Code::InvalidArgument, "request_id").await;
    let list = world
        .groups()
        .list_groups(ListGroupsRequest { parent: TENANT.into(), ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    assert!(list.groups.is_empty());

    let bad = CreatePolicyRequest {
        parent: TENANT.into(),
        policy_id: "zero".into(),
        policy: Some(Policy { rpo_target_us: Some(0), ..Policy::default() }),
        ..Default::default()
    };
    let status = world.policies().create_policy(bad).await.unwrap_err();
    assert!(status.message().contains("policy.rpo_target_us") && status.message().contains("1000"), "{status}");
}

#[tokio::test]
async fn validating_changes_nothing_and_the_same_request_is_done_once() {
    let world = World::new().await;
    let _source = world.proxy("src", Script::default()).await;
    let _target = world.proxy("dr", Script::default()).await;
    world.gold().await;
    let request = CreateGroupRequest { validate_only: true, ..shop_request() };
    let shown = world.groups().create_group(request).await.unwrap().into_inner();
    assert_eq!(shown.disks.len(), 2);
    assert_eq!(code(world.groups().get_group(GetGroupRequest { name: SHOP.into() }).await), Code::NotFound);

    let request = CreateGroupRequest { request_id: "r1".into(), ..shop_request() };
    let first = world.groups().create_group(request.clone()).await.unwrap().into_inner();
    let again = world.groups().create_group(request).await.unwrap().into_inner();
    assert_eq!(first.uid, again.uid);
    assert_eq!(code(world.groups().create_group(shop_request()).await), Code::AlreadyExists);
}

#[tokio::test]
async fn a_disk_joins_and_leaves() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let add = |path: &str| CreateDiskRequest {
        parent: SHOP.into(),
        disk_id: "more".into(),
        disk: Some(Disk { path: path.into(), ..Disk::default() }),
        ..Default::default()
    };
    assert_eq!(code(world.groups().create_disk(add("/disks/data")).await), Code::AlreadyExists);
    let disk = world.groups().create_disk(add("/disks/more")).await.unwrap().into_inner();
    assert_eq!((disk.slot, disk.size_bytes), (2, 1 << 30));
    let mut desired = source.desired.subscribe();
    desired.wait_for(|d| d.sources[0].disks.len() == 3).await.unwrap();
    world.groups().delete_disk(DeleteDiskRequest { name: disk.name, ..Default::default() }).await.unwrap();
    desired.wait_for(|d| d.sources[0].disks.len() == 2).await.unwrap();
    // Its slot is not used again.
    let disk = world.groups().create_disk(add("/disks/more")).await.unwrap().into_inner();
    assert_eq!(disk.slot, 3);
}

#[tokio::test]
async fn points_are_listed_resolved_and_labelled() {
    let world = World::new().await;
    let (_source, _target) = world.shop().await;
    let list =
        ListPointsRequest { parent: SHOP.into(), from_seq: 15, page_size: 3, cuts_only: true, ..Default::default() };
    let page = world.points().list_points(list.clone()).await.unwrap().into_inner();
    assert_eq!(page.points.iter().map(|p| p.cut.unwrap()).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(page.next_seq, 41);
    // More than there may be on a page is as much as there may be.
    let long = ListPointsRequest { page_size: u32::MAX, ..list };
    assert_eq!(world.points().list_points(long).await.unwrap().into_inner().points.len(), 9);
    let resolve = |at| ResolvePointRequest { parent: SHOP.into(), at: Some(PointChoice { at }) };
    let point = world.points().resolve_point(resolve(Some(At::TimeNs(33_500_000_000)))).await.unwrap().into_inner();
    assert_eq!(point.name, format!("{SHOP}/points/33"));
    for bad in [None, Some(At::Latest(false)), Some(At::Seq(0))] {
        assert_eq!(code(world.points().resolve_point(resolve(bad)).await), Code::InvalidArgument);
    }
    let status = world.points().resolve_point(resolve(Some(At::Seq(5000)))).await.unwrap_err();
    assert!(status.message().contains("1 to 100"), "{status}");
    let cut = CreateCutRequest { parent: SHOP.into(), label: "before upgrade".into(), ..Default::default() };
    assert_eq!(world.points().create_cut(cut).await.unwrap().into_inner().label, "before upgrade");
}

#[tokio::test]
async fn a_view_is_opened_shown_and_closed() {
    let world = World::new().await;
    let (_source, target) = world.shop().await;
    let open = |id: &str, at| CreateViewRequest {
        parent: SHOP.into(),
        view_id: id.into(),
        view: Some(View { disks: vec!["wal".into()], ..View::default() }),
        at: Some(PointChoice { at: Some(at) }),
        validate_only: false,
        request_id: String::new(),
    };
    let view = world.views().create_view(open("check", At::Cut(3))).await.unwrap().into_inner();
    assert_eq!((view.kind(), view.point.unwrap().seq), (ViewKind::Browse, 30));
    assert_eq!(view.exports.len(), 1);
    assert_eq!(view.exports[0].uris, ["nbd+unix:///shop.check/wal?socket=/run/nbd"]);
    // A target that restarts is told to open it again.
    let mut desired = target.desired.subscribe();
    desired.wait_for(|d| d.targets[0].views.len() == 1).await.unwrap();
    assert_eq!(code(world.views().create_view(open("check", At::Cut(3))).await), Code::AlreadyExists);
    assert_eq!(code(world.views().create_view(open("failover", At::Cut(3))).await), Code::InvalidArgument);
    assert_eq!(code(world.views().create_view(open("bad", At::Seq(50))).await), Code::FailedPrecondition);
    let all = ListViewsRequest { parent: format!("{TENANT}/groups/-"), ..Default::default() };
    assert_eq!(world.views().list_views(all).await.unwrap().into_inner().views.len(), 1);
    world.views().delete_view(DeleteViewRequest { name: view.name.clone(), ..Default::default() }).await.unwrap();
    desired.wait_for(|d| d.targets[0].views.is_empty()).await.unwrap();
    assert!(target.script.journal.lock().unwrap().views.is_empty());
    assert_eq!(code(world.views().get_view(GetViewRequest { name: view.name }).await), Code::NotFound);
}

#[tokio::test]
async fn a_view_that_does_not_open_leaves_nothing_behind() {
    let world = World::new().await;
    let source = world.proxy("src", Script::default()).await;
    let say: Say = std::sync::Arc::new(|t| match t {
        command::Command::OpenView(_) => Some(Some(command_result::Outcome::Error(CommandError {
            kind: CommandErrorKind::Io.into(),
            message: "no room for a delta".into(),
        }))),
        _ => None,
    });
    let _target = world.proxy("dr", Script { say: Some(say), ..Script::default() }).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    let request = CreateViewRequest {
        parent: SHOP.into(),
        view_id: "check".into(),
        view: Some(View { writable: true, ..View::default() }),
        at: Some(PointChoice { at: Some(At::Latest(true)) }),
        ..Default::default()
    };
    let status = world.views().create_view(request).await.unwrap_err();
    assert!(status.message().contains("no room for a delta"), "{status}");
    let list = world
        .views()
        .list_views(ListViewsRequest { parent: SHOP.into(), ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    assert!(list.views.is_empty());
    drop(source);
}

#[tokio::test]
async fn a_watch_shows_states_and_events() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let request = WatchRequest { parent: SHOP.into(), interval_ms: 100, ..Default::default() };
    let mut stream = world.statuses().watch(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    let Some(Update::Status(status)) = first.update else { panic!("{first:?}") };
    assert_eq!(status.groups[0].name, SHOP);
    source.kill().await;
    let gone = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            if let Some(Update::Event(e)) = stream.message().await.unwrap().unwrap().update
                && e.message.contains("source-unreachable")
            {
                return e;
            }
        }
    });
    assert_eq!(gone.await.unwrap().subject, SHOP);
    // What is shown rises while nobody reports.
    let before = world.status().await.rpo.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let after = world.status().await.rpo.unwrap();
    assert!(after.now_us.unwrap() >= before.now_us.unwrap() + 150_000);
    assert!(after.report_age_us.unwrap() >= 150_000);
    let list = ListEventsRequest { parent: TENANT.into(), ..Default::default() };
    assert!(!world.statuses().list_events(list).await.unwrap().into_inner().events.is_empty());
}

#[tokio::test]
async fn a_proxy_in_use_stays_and_one_deleted_is_kept_out() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let delete = |id: &str| DeleteProxyRequest { name: proxy_name(id), ..Default::default() };
    assert_eq!(code(world.proxies().delete_proxy(delete("src")).await), Code::FailedPrecondition);
    let request = DeleteGroupRequest { name: SHOP.into(), ..Default::default() };
    world.groups().delete_group(request).await.unwrap();
    world.proxies().delete_proxy(delete("src")).await.unwrap();
    let (bundle, script) = source.kill().await;
    let (sender, stream) = open_session(&bundle).await;
    let mut stream = stream.unwrap();
    let message = Some(proxy_message::Message::Register(register(&bundle, &script)));
    sender.send(ProxyMessage { message }).await.unwrap();
    assert_eq!(code(stream.message().await), Code::PermissionDenied);
}
