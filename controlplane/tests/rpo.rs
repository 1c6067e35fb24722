//! The RPO over time: kept over a restart, asked for any period, told when it is too high for too long, as numbers.

mod world;

use std::time::Duration;

use afterimage_wire::v1::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use world::*;

async fn rpo(world: &World, request: GetRpoRequest) -> Result<RpoReport, tonic::Status> {
    world.statuses().get_rpo(GetRpoRequest { group: SHOP.into(), ..request }).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_period_is_asked_for_and_outlives_a_restart() {
    let mut world = World::new().await;
    let source = world.proxy("src", Script { rpo_us: 200_000, ..Script::default() }).await;
    let _target = world.proxy("dr", Script::default()).await;
    world.gold().await;
    world.groups().create_group(shop_request()).await.unwrap();
    world.wait_phase(Phase::Protected).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let report = rpo(&world, GetRpoRequest { step_s: 3600, ..Default::default() }).await.unwrap();
    let whole = report.whole.unwrap();
    assert_eq!((report.target_us, whole.within_target), (500_000, Some(1.0)));
    let p50 = whole.p50_us.unwrap();
    assert!((200_000..204_000).contains(&p50), "{p50}");
    assert!(whole.stages.unwrap().idle > 0, "{whole:?}");
    assert!((24..=25).contains(&report.periods.len()), "{}", report.periods.len());
    assert_eq!(report.periods.iter().map(|p| p.samples).sum::<u64>(), whole.samples);
    // Of most parts nothing is known.
    assert!(report.periods.iter().filter(|p| p.samples == 0 && p.p50_us.is_none()).count() >= 22);

    source.kill().await;
    world.restart().await;
    let after = rpo(&world, GetRpoRequest::default()).await.unwrap().whole.unwrap();
    assert!(after.samples >= whole.samples, "{after:?}");

    for bad in [
        GetRpoRequest { step_s: 61, ..Default::default() },
        GetRpoRequest { step_s: 60, ..Default::default() },
        GetRpoRequest { start_time_ns: u64::MAX, ..Default::default() },
        GetRpoRequest { end_time_ns: 1, start_time_ns: 2, ..Default::default() },
        GetRpoRequest { start_time_ns: 1, step_s: 60, ..Default::default() },
    ] {
        assert_eq!(code(rpo(&world, bad.clone()).await), Code::InvalidArgument, "{bad:?}");
    }
    let other = GetRpoRequest { group: format!("{TENANT}/groups/none"), ..Default::default() };
    assert_eq!(code(world.statuses().get_rpo(other).await), Code::NotFound);
}

#[tokio::test]
async fn an_rpo_above_its_target_is_a_warning_then_an_error() {
    let world = World::new().await;
    let policy = Policy {
        rpo_target_us: Some(1_000),
        warn_after_ms: Some(300),
        error_after_ms: Some(1_500),
        clear_after_ms: Some(60_000),
        ..Policy::default()
    };
    world.gold_of(policy).await;
    let _source = world.proxy("src", Script { rpo_us: 900_000, ..Script::default() }).await;
    let _target = world.proxy("dr", Script::default()).await;
    world.groups().create_group(shop_request()).await.unwrap();
    let becomes = async |severity: Severity| {
        for _ in 0..400 {
            let status = world.status().await;
            let found = status.conditions.iter().find(|c| c.kind == "rpo-above-target");
            if found.is_some_and(|c| c.severity() == severity) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("it does not become {severity:?}: {:?}", world.status().await);
    };
    becomes(Severity::Warning).await;
    becomes(Severity::Error).await;
    let list = ListEventsRequest {
        parent: SHOP.into(),
        filter: "message:rpo-above-target AND kind = condition".into(),
        ..Default::default()
    };
    // The state is what it is at once; it is told of with the next look at all groups.
    let mut severities: Vec<Severity> = Vec::new();
    for _ in 0..400 {
        let told = world.statuses().list_events(list.clone()).await.unwrap().into_inner().events;
        severities = told.iter().map(Event::severity).collect();
        if severities.len() > 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(severities, [Severity::Warning, Severity::Error]);
}

async fn get(address: std::net::SocketAddr, request: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // What is refused may be cut off while it is still being sent.
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

#[tokio::test]
async fn numbers_are_given_over_http() {
    let folder = tempfile::tempdir().unwrap();
    let loopback = ([127, 0, 0, 1], 0).into();
    let config = afterimage_controlplane::Config {
        metrics: Some(loopback),
        ..afterimage_controlplane::Config::new(folder.path().join("c"), loopback)
    };
    let running = afterimage_controlplane::start(config).await.unwrap();
    let address = running.metrics().unwrap();
    let answer = get(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("text/plain; version=0.0.4"), "{answer}");
    assert!(answer.contains("\nafterimage_coordinator_term 1\n"), "{answer}");
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
        (&format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000)), "400"),
    ] {
        let answer = get(address, request).await;
        assert!(answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.20}: {answer}");
    }
    // Those that say nothing hold nobody up for long, and nobody at all while there are few.
    let _silent: Vec<_> = connect_many(address, 8).await;
    assert!(get(address, "HEAD /metrics HTTP/1.1\r\n\r\n").await.ends_with("\r\n\r\n"));
    running.stop().await;
}

async fn connect_many(address: std::net::SocketAddr, count: usize) -> Vec<tokio::net::TcpStream> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    all
}
