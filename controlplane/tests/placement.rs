//! Groups that name no target, through the API, with scripted proxies that say how much room they have.

mod world;

use afterimage_wire::v1::*;
use tonic::Code;
use world::*;

const GIB: u64 = 1 << 30;

fn script(site: &str, free: u64) -> Script {
    Script { site: site.into(), free: Some(free * GIB), ..Script::default() }
}

/// A group of two disks of a GiB each that names no target.
fn unplaced(id: &str) -> CreateGroupRequest {
    let mut request = shop_request();
    request.group_id = id.into();
    let group = request.group.as_mut().unwrap();
    group.target.clear();
    for disk in &mut group.disks {
        disk.path = format!("{}-{id}", disk.path);
    }
    request
}

async fn has_said(world: &World, id: &str) {
    loop {
        let request = GetProxyRequest { name: proxy_name(id) };
        if world.proxies().get_proxy(request).await.unwrap().into_inner().room.is_some() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_group_goes_where_there_is_room_at_another_site_and_says_why() {
    let mut world = World::new().await;
    let source = world.proxy("src", script("vienna", 900)).await;
    let near = world.proxy("near", script("vienna", 900)).await;
    let small = world.proxy("small", script("graz", 10)).await;
    let far = world.proxy("far", script("linz", 60)).await;
    world.gold().await;
    for id in ["src", "near", "small", "far"] {
        has_said(&world, id).await;
    }
    let trial = CreateGroupRequest { validate_only: true, ..unplaced("shop") };
    assert_eq!(world.groups().create_group(trial).await.unwrap().into_inner().target, proxy_name("far"));
    let made = world.groups().create_group(unplaced("shop")).await.unwrap().into_inner();
    assert_eq!(made.target, proxy_name("far"));
    for part in ["\"far\": 18.0 GiB needed, 59.0 GiB left", "site \"vienna\"", "\"small\": short of 9.0 GiB"] {
        assert!(made.placement.contains(part), "{part}: {}", made.placement);
    }
    // Each takes what it may take, though nothing of it has been written yet: a fourth does not fit.
    for id in ["b", "c"] {
        assert_eq!(world.groups().create_group(unplaced(id)).await.unwrap().into_inner().target, proxy_name("far"));
    }
    let refused = world.groups().create_group(unplaced("d")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("\"far\": short of 13.0 GiB"), "{refused}");

    // At its source's own site only if the policy says so.
    let explain = ExplainPlacementRequest {
        parent: TENANT.into(),
        source: proxy_name("src"),
        policy: GOLD.into(),
        size_bytes: GIB,
        ..Default::default()
    };
    let found = world.groups().explain_placement(explain.clone()).await.unwrap().into_inner();
    assert!(found.target.is_empty() && found.candidates.len() == 4, "{found:?}");
    let policy = Policy { name: GOLD.into(), same_site: Some(true), ..Policy::default() };
    let update = UpdatePolicyRequest {
        policy: Some(policy),
        update_mask: Some(prost_types::FieldMask { paths: vec!["same_site".into()] }),
        ..Default::default()
    };
    world.policies().update_policy(update).await.unwrap();
    let found = world.groups().explain_placement(explain.clone()).await.unwrap().into_inner();
    assert_eq!(found.target, proxy_name("near"));
    let shop = ExplainPlacementRequest { parent: TENANT.into(), group: SHOP.into(), ..Default::default() };
    assert_eq!(world.groups().explain_placement(shop).await.unwrap().into_inner().target, proxy_name("near"));

    // The choice is kept, and nothing moves by itself: not over a restart, not because something better came.
    drop((source, near, small, far));
    world.restart().await;
    let kept = world.groups().get_group(GetGroupRequest { name: SHOP.into() }).await.unwrap().into_inner();
    assert_eq!((kept.target, kept.placement), (proxy_name("far"), made.placement));
    let found = world.groups().explain_placement(explain).await.unwrap().into_inner();
    assert!(found.target.is_empty() && found.reason.contains("not connected"), "{}", found.reason);
}

#[tokio::test]
async fn groups_that_are_created_together_see_each_other() {
    let world = World::new().await;
    let _source = world.proxy("src", script("", 0)).await;
    let _a = world.proxy("a", script("", 25)).await;
    let _b = world.proxy("b", script("", 25)).await;
    world.gold().await;
    for id in ["src", "a", "b"] {
        has_said(&world, id).await;
    }
    let create = async |id: &str| world.groups().create_group(unplaced(id)).await.map(|g| g.into_inner().target);
    let (x, y, z) = tokio::join!(create("x"), create("y"), create("z"));
    let mut placed: Vec<String> = [x, y, z].into_iter().flatten().collect();
    placed.sort();
    assert_eq!(placed, [proxy_name("a"), proxy_name("b")]);
}

#[tokio::test]
async fn a_proxy_whose_site_is_no_word_is_turned_away() {
    let world = World::new().await;
    let bundle = world.join(Role::Proxy, "src").await;
    let (sender, stream) = open_session(&bundle).await;
    let registration = register(&bundle, &script("Wien, 3. Bezirk", 1));
    let message = proxy_message::Message::Register(registration);
    sender.send(ProxyMessage { message: Some(message) }).await.unwrap();
    let refused = stream.unwrap().message().await.unwrap_err();
    assert!(refused.message().contains("register.site"), "{refused}");
}
