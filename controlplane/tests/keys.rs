//! Keys of groups through the API: rotated, wrapped anew over a restart, and the recovery key shown once.

mod world;

use afterimage_controlplane::escrow::RecoveryKey;
use afterimage_wire::v1::keys_client::KeysClient;
use afterimage_wire::v1::*;
use tonic::Code;
use tonic::transport::Channel;
use world::*;

fn keys(world: &World) -> KeysClient<Channel> {
    KeysClient::new(world.channel.clone())
}

async fn listed(world: &World) -> PolicyKeys {
    keys(world).get_keys(GetKeysRequest { parent: TENANT.into() }).await.unwrap().into_inner()
}

fn rotate(request_id: &str) -> RotateKeyRequest {
    RotateKeyRequest { group: SHOP.into(), request_id: request_id.into(), ..Default::default() }
}

fn recovery(replace: bool, request_id: &str) -> MakeRecoveryKeyRequest {
    MakeRecoveryKeyRequest { parent: TENANT.into(), replace, request_id: request_id.into(), ..Default::default() }
}

fn ids(key: Option<&PolicyKey>) -> Vec<String> {
    let key = key.unwrap();
    std::iter::once(&key.id).chain(key.older.iter().map(|k| &k.id)).cloned().collect()
}

#[tokio::test]
async fn the_target_has_the_next_key_before_its_source() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    let first = listed(&world).await.groups.remove(0).versions.remove(0).uid;
    let (bundle, script) = target.kill().await;
    let asked = keys(&world).rotate_key(rotate("1")).await.unwrap().into_inner();
    let next = asked.groups[0].versions[0].clone();
    assert_eq!((next.state(), asked.groups[0].versions[1].state()), (KeyState::Next, KeyState::Current));
    // Asked again by its id it is not done again; without, it is refused until it is done.
    assert_eq!(keys(&world).rotate_key(rotate("1")).await.unwrap().into_inner().groups, asked.groups);
    let refused = keys(&world).rotate_key(rotate("2")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("\"dr\""), "{refused}");
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(ids(source.desired.borrow().sources[0].key.as_ref()), std::slice::from_ref(&first));

    let target = FakeProxy::connect(bundle, script).await;
    let mut told = target.desired.subscribe();
    let both = told.wait_for(|d| d.targets.len() == 1).await.unwrap().clone();
    assert_eq!(ids(both.targets[0].key.as_ref()), [next.uid.clone(), first.clone()]);
    let mut told = source.desired.subscribe();
    let after = told.wait_for(|d| ids(d.sources[0].key.as_ref())[0] == next.uid).await.unwrap().clone();
    assert_eq!(ids(after.sources[0].key.as_ref()), [next.uid.clone(), first]);
    assert!(listed(&world).await.groups[0].versions.iter().all(|v| v.state() != KeyState::Next));
    let check = RotateKeyRequest { validate_only: true, ..rotate("") };
    assert_eq!(keys(&world).rotate_key(check).await.unwrap().into_inner().groups[0].versions.len(), 2);
}

#[tokio::test]
async fn keys_are_the_same_ones_after_a_rewrap_and_a_restart() {
    let mut world = World::new().await;
    let (source, target) = world.shop().await;
    let before = source.desired.borrow().sources[0].key.clone().unwrap();
    keys(&world).make_recovery_key(recovery(false, "")).await.unwrap();
    assert!(listed(&world).await.wrapping.is_empty());
    let mut last = String::new();
    for n in 0..2 {
        let request = RewrapKeysRequest { parent: TENANT.into(), request_id: n.to_string(), ..Default::default() };
        let done = keys(&world).rewrap_keys(request.clone()).await.unwrap().into_inner();
        let again = keys(&world).rewrap_keys(request).await.unwrap().into_inner();
        assert_eq!((done.wrapping.len(), &done.wrapping), (1, &again.wrapping));
        assert_ne!(done.wrapping[0].uid, last);
        last.clone_from(&done.wrapping[0].uid);
        assert!(done.groups.iter().flat_map(|g| &g.versions).all(|v| v.wrapping_key == last));
    }
    let (bundle, script) = source.kill().await;
    drop(target);
    world.restart().await;
    let after = listed(&world).await;
    assert_eq!((after.wrapping[0].uid.as_str(), after.recovery_key.len()), (last.as_str(), 32));
    let source = FakeProxy::connect(bundle, script).await;
    let mut told = source.desired.subscribe();
    let now = told.wait_for(|d| d.sources.len() == 1).await.unwrap().clone();
    assert_eq!(now.sources[0].key.clone().unwrap(), before);
}

#[tokio::test]
async fn a_recovery_key_is_in_one_answer_and_opens_what_targets_are_told() {
    let world = World::new().await;
    let (source, target) = world.shop().await;
    let check = MakeRecoveryKeyRequest { validate_only: true, ..recovery(false, "") };
    let checked = keys(&world).make_recovery_key(check).await.unwrap().into_inner();
    assert!(checked.recovery_key.is_empty() && checked.keys.unwrap().recovery_key.is_empty());
    let made = keys(&world).make_recovery_key(recovery(false, "1")).await.unwrap().into_inner();
    let key = made.recovery_key.parse::<RecoveryKey>().unwrap().escrow();
    for again in [recovery(false, "1"), recovery(false, "2")] {
        let refused = keys(&world).make_recovery_key(again).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("made already"), "{refused}");
    }
    let mut told = target.desired.subscribe();
    let stream = told.wait_for(|d| d.targets[0].recovery_key == key.id).await.unwrap().targets[0].clone();
    let said = stream.key.unwrap();
    let opened = key.open(stream.stream_uid.parse().unwrap(), said.id.parse().unwrap(), &said.recovery);
    assert_eq!(opened.unwrap(), said.key[..]);
    assert!(source.desired.borrow().sources[0].key.as_ref().unwrap().recovery.is_empty());
    // Another one: asked again it is not made again, nor shown.
    let other = keys(&world).make_recovery_key(recovery(true, "3")).await.unwrap().into_inner();
    let other = other.recovery_key.parse::<RecoveryKey>().unwrap().escrow();
    assert_eq!(code(keys(&world).make_recovery_key(recovery(true, "3")).await), Code::FailedPrecondition);
    let mut told = target.desired.subscribe();
    let stream = told.wait_for(|d| d.targets[0].recovery_key == other.id).await.unwrap().targets[0].clone();
    let said = stream.key.unwrap();
    let open = |by: &afterimage_controlplane::escrow::EscrowKey| {
        by.open(stream.stream_uid.parse().unwrap(), said.id.parse().unwrap(), &said.recovery)
    };
    assert!(open(&other).is_some() && open(&key).is_none());
}

#[tokio::test]
async fn what_wraps_is_refused_by_its_field() {
    let folder = tempfile::tempdir().unwrap();
    let config = afterimage_controlplane::Config::new(folder.path(), ([127, 0, 0, 1], 0).into());
    let keys =
        afterimage_controlplane::wrapping::KeysConfig { file: Some(folder.path().join("none")), ..Default::default() };
    let refused = afterimage_controlplane::start(afterimage_controlplane::Config { keys, ..config }).await;
    let refused = refused.err().unwrap().to_string();
    assert!(refused.starts_with("keys.file: "), "{refused}");
}
