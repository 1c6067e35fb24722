//! Callers who hold on, come in crowds, never finish, or call what is not there: others are served, and the codes are
//! those of the protocol.

mod world;

use std::time::{Duration, Instant};

use afterimage_controlplane::grpc::bound::MAX_PER_ADDRESS;
use afterimage_wire::v1::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use world::*;

async fn list(world: &World) -> Result<ListPoliciesResponse, tonic::Status> {
    let request = ListPoliciesRequest { parent: TENANT.into(), ..Default::default() };
    world.policies().list_policies(request).await.map(tonic::Response::into_inner)
}

/// Waits until the other end has closed the connection; how long that took.
async fn closed(mut socket: TcpStream, within: Duration) -> Option<Duration> {
    let begun = Instant::now();
    let mut bytes = [0; 1024];
    let read = async { while matches!(socket.read(&mut bytes).await, Ok(1..)) {} };
    tokio::time::timeout(within, read).await.ok().map(|()| begun.elapsed())
}

#[tokio::test]
async fn a_crowd_from_one_address_is_bounded_and_whoever_is_in_goes_on() {
    let world = World::new().await;
    let address = world.running.as_ref().unwrap().addresses()[0];
    list(&world).await.unwrap();
    let mut crowd = Vec::new();
    for _ in 0..MAX_PER_ADDRESS + 20 {
        crowd.push(TcpStream::connect(address).await.unwrap());
    }
    // Those beyond the bound are closed at once, long before the handshake's patience ends.
    let last = crowd.split_off(MAX_PER_ADDRESS);
    for socket in last {
        assert!(closed(socket, Duration::from_secs(5)).await.is_some(), "one too many is let in");
    }
    list(&world).await.unwrap();
    drop(crowd);
    // There is room again.
    let mut again = None;
    for _ in 0..100 {
        again = afterimage_controlplane::client::connect(&world.admin).await.ok();
        if again.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(again.is_some(), "places are given back");
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_ended() {
    let world = World::new().await;
    let address = world.running.as_ref().unwrap().addresses()[0];
    let silent = TcpStream::connect(address).await.unwrap();
    let slow = async {
        let mut socket = TcpStream::connect(address).await.unwrap();
        // The first bytes of a client hello, drop by drop.
        for byte in [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3] {
            socket.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        closed(socket, Duration::from_secs(15)).await
    };
    let (silent, slow) = tokio::join!(closed(silent, Duration::from_secs(15)), slow);
    assert!(silent.is_some() && slow.is_some(), "silent: {silent:?}, slow: {slow:?}");
    list(&world).await.unwrap();
}

#[tokio::test]
async fn what_is_not_there_is_unimplemented() {
    let world = World::new().await;
    for path in ["/afterimage.v1.Policies/Nuke", "/afterimage.v9.Policies/GetPolicy", "/x/y"] {
        let mut client = tonic::client::Grpc::new(world.channel.clone());
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<ListPoliciesRequest, ListPoliciesResponse>::default();
        let request = tonic::Request::new(ListPoliciesRequest::default());
        let answer = client.unary(request, path.parse().unwrap(), codec).await;
        assert_eq!(code(answer), Code::Unimplemented, "{path}");
    }
}

#[tokio::test]
async fn health_is_told_as_its_text_says() {
    let world = World::new().await;
    let check = async |channel: Channel, service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        HealthClient::new(channel).check(request).await.map(|answer| answer.into_inner().status())
    };
    for service in ["", "afterimage.v1.Policies", "afterimage.v1.Groups", "afterimage.v1.Enrolment"] {
        let told = check(world.channel.clone(), service).await;
        assert_eq!(told.unwrap(), ServingStatus::Serving, "{service:?}");
    }
    assert_eq!(code(check(world.channel.clone(), "afterimage.v1.Nonsense").await), Code::NotFound);
}

#[tokio::test]
async fn names_of_any_script_and_shape_are_refused_by_field() {
    let world = World::new().await;
    let names = [
        "",
        " ",
        "A",
        "-a",
        "a_b",
        "\u{430}",
        "a\u{301}",
        "\u{202e}a",
        "a\u{200d}b",
        "a/b",
        "..",
        "a\0",
        "a\n",
        "%61",
        "\u{1f4a5}",
        &"a".repeat(64),
        &"\u{e9}".repeat(2000),
    ];
    for name in names {
        let request = CreatePolicyRequest {
            parent: TENANT.into(),
            policy_id: name.into(),
            policy: Some(Policy::default()),
            ..Default::default()
        };
        let status = world.policies().create_policy(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?}");
        assert!(status.message().contains("policy_id") && status.message().len() < 1500, "{name:?}: {status:?}");
        let request = GetGroupRequest { name: format!("{TENANT}/groups/{name}") };
        assert_eq!(code(world.groups().get_group(request).await), Code::InvalidArgument, "{name:?}");
    }
}
