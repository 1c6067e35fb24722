//! Who gets in, and what hostile input gets: an error, and nothing else.

mod world;

use std::time::Duration;

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::{Config, client, start};
use afterimage_wire::v1::enrolment_client::EnrolmentClient;
use afterimage_wire::v1::policies_client::PoliciesClient;
use afterimage_wire::v1::proxy_message::Message as Up;
use afterimage_wire::v1::status_client::StatusClient;
use afterimage_wire::v1::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use world::*;

async fn anonymous(world: &World) -> Channel {
    let tls = ClientTlsConfig::new()
        .domain_name("coordinator.afterimage")
        .ca_certificate(Certificate::from_pem(&world.admin.ca_pem));
    let endpoint = Endpoint::from_shared(world.admin.endpoint.clone()).unwrap();
    endpoint.tls_config(tls).unwrap().connect().await.unwrap()
}

fn policy(id: &str) -> CreatePolicyRequest {
    CreatePolicyRequest {
        parent: TENANT.into(),
        policy_id: id.into(),
        policy: Some(Policy::default()),
        validate_only: false,
        ..Default::default()
    }
}

#[tokio::test]
async fn each_role_may_what_it_may() {
    let world = World::new().await;
    let list = || ListPoliciesRequest { parent: TENANT.into(), ..Default::default() };
    let token = || CreateJoinTokenRequest {
        parent: TENANT.into(),
        role: Role::Admin.into(),
        name: "x".into(),
        ttl_s: 0,
        ..Default::default()
    };
    let denied = Code::PermissionDenied;

    let (channel, nobody) = (anonymous(&world).await, Code::Unauthenticated);
    assert_eq!(code(PoliciesClient::new(channel.clone()).list_policies(list()).await), nobody);
    assert_eq!(code(HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await), nobody);

    let viewer = client::connect(&world.join(Role::Viewer, "vera").await).await.unwrap();
    PoliciesClient::new(viewer.clone()).list_policies(list()).await.unwrap();
    assert_eq!(code(PoliciesClient::new(viewer.clone()).create_policy(policy("a")).await), denied);
    HealthClient::new(viewer).check(HealthCheckRequest { service: String::new() }).await.unwrap();

    let operator = client::connect(&world.join(Role::Operator, "olga").await).await.unwrap();
    PoliciesClient::new(operator.clone()).create_policy(policy("a")).await.unwrap();
    assert_eq!(code(EnrolmentClient::new(operator).create_join_token(token()).await), denied);

    let bundle = world.join(Role::Proxy, "src").await;
    let proxy = client::connect(&bundle).await.unwrap();
    assert_eq!(code(PoliciesClient::new(proxy.clone()).list_policies(list()).await), denied);
    let get = GetStatusRequest { parent: TENANT.into() };
    assert_eq!(code(StatusClient::new(proxy).get_status(get).await), denied);

    let (_sender, stream) = open_session(&world.admin).await;
    assert_eq!(code(stream), denied);
}

#[tokio::test]
async fn a_token_works_once() {
    let world = World::new().await;
    let token = world.token(Role::Operator, "olga").await;
    let bundle = client::join(&token, None).await.unwrap();
    assert_eq!((bundle.role.as_str(), bundle.name.as_str()), ("operator", "olga"));
    let text = client::join(&token, None).await.unwrap_err().to_string();
    assert!(text.contains("neither spent nor expired"), "{text}");
}

/// A request whose answer was lost: the same again, word for word, is answered again; nothing else is.
#[tokio::test]
async fn requests_to_join_are_done_once_by_their_ids() {
    let mut world = World::new().await;
    let ask = |id: &str, name: &str| CreateJoinTokenRequest {
        parent: TENANT.into(),
        role: Role::Viewer.into(),
        name: name.into(),
        request_id: id.into(),
        ..Default::default()
    };
    let mut admins = EnrolmentClient::new(world.channel.clone());
    let first = admins.create_join_token(ask("1", "v")).await.unwrap().into_inner();
    let again = admins.create_join_token(ask("1", "v")).await.unwrap().into_inner();
    assert_eq!(first, again, "the same token");
    assert_ne!(admins.create_join_token(ask("2", "v")).await.unwrap().into_inner().token, first.token);
    assert_eq!(code(admins.create_join_token(ask("1", "w")).await), Code::InvalidArgument);

    let token = afterimage_controlplane::token::JoinToken::parse(&first.token).unwrap();
    let (_, csr_pem) = afterimage_controlplane::ca::key_and_request().unwrap();
    let request = JoinRequest { token_id: token.id, secret: token.secret, csr_pem, request_id: "join".into() };
    let mut enrolment = EnrolmentClient::new(anonymous(&world).await);
    let joined = enrolment.join(request.clone()).await.unwrap().into_inner();
    assert_eq!(code(admins.create_join_token(ask("1", "v")).await), Code::NotFound, "spent");
    let (_, other) = afterimage_controlplane::ca::key_and_request().unwrap();
    for replayed in [
        JoinRequest { request_id: String::new(), ..request.clone() },
        JoinRequest { request_id: "other".into(), ..request.clone() },
        JoinRequest { secret: "guess".into(), ..request.clone() },
        JoinRequest { csr_pem: other.clone(), ..request.clone() },
    ] {
        assert_eq!(code(enrolment.join(replayed).await), Code::PermissionDenied);
    }
    world.restart().await;
    let mut enrolment = EnrolmentClient::new(anonymous(&world).await);
    let repeated = enrolment.join(request).await.unwrap().into_inner();
    let pin = |answer: &JoinResponse| {
        let (_, pem) = x509_parser::pem::parse_x509_pem(answer.certificate_pem.as_bytes()).unwrap();
        afterimage_controlplane::ca::key_pin(&pem.contents).unwrap()
    };
    assert_eq!((pin(&repeated), &repeated.name), (pin(&joined), &joined.name));

    let bundle = world.join(Role::Proxy, "src").await;
    let mut own = EnrolmentClient::new(client::connect(&bundle).await.unwrap());
    let (_, csr_pem) = afterimage_controlplane::ca::key_and_request().unwrap();
    let renew = |csr_pem: &str| RenewRequest { csr_pem: csr_pem.into(), request_id: "renew".into() };
    let first = own.renew(renew(&csr_pem)).await.unwrap().into_inner();
    let again = own.renew(renew(&csr_pem)).await.unwrap().into_inner();
    assert_eq!(pin(&first), pin(&again));
    assert_eq!(code(own.renew(renew(&other)).await), Code::InvalidArgument);
}

#[tokio::test]
async fn of_two_that_race_for_a_token_one_gets_in() {
    let world = World::new().await;
    let token = world.token(Role::Proxy, "src").await;
    let (a, b) = tokio::join!(client::join(&token, None), client::join(&token, None));
    assert_ne!(a.is_ok(), b.is_ok());
}

#[tokio::test]
async fn a_guessed_secret_neither_works_nor_spends_the_token() {
    let world = World::new().await;
    let token = afterimage_controlplane::token::JoinToken::parse(&world.token(Role::Admin, "ann").await).unwrap();
    let wrong = JoinRequest { token_id: token.id.clone(), secret: "guess".into(), ..JoinRequest::default() };
    let mut enrolment = EnrolmentClient::new(anonymous(&world).await);
    assert_eq!(code(enrolment.join(wrong).await), Code::PermissionDenied);
    client::join(&token.encode(), None).await.unwrap();
}

#[tokio::test]
async fn a_token_is_spent_even_if_the_request_is_bad() {
    let world = World::new().await;
    let token = afterimage_controlplane::token::JoinToken::parse(&world.token(Role::Viewer, "v").await).unwrap();
    let bad = JoinRequest {
        token_id: token.id.clone(),
        secret: token.secret.clone(),
        csr_pem: "no".into(),
        ..JoinRequest::default()
    };
    let mut enrolment = EnrolmentClient::new(anonymous(&world).await);
    assert_eq!(code(enrolment.join(bad).await), Code::InvalidArgument);
    assert!(client::join(&token.encode(), None).await.is_err());
}

#[tokio::test]
async fn a_tokens_terms_are_checked() {
    let world = World::new().await;
    let mut enrolment = EnrolmentClient::new(world.channel.clone());
    let good = CreateJoinTokenRequest {
        parent: TENANT.into(),
        role: Role::Proxy.into(),
        name: "a".into(),
        ttl_s: 60,
        ..Default::default()
    };
    enrolment.create_join_token(good.clone()).await.unwrap();
    for bad in [
        CreateJoinTokenRequest { ttl_s: 59, ..good.clone() },
        CreateJoinTokenRequest { ttl_s: u64::MAX, ..good.clone() },
        CreateJoinTokenRequest { role: 0, ..good.clone() },
        CreateJoinTokenRequest { role: 77, ..good.clone() },
        CreateJoinTokenRequest { name: "../x".into(), ..good.clone() },
        CreateJoinTokenRequest { parent: "tenants/other".into(), ..good },
    ] {
        assert_eq!(code(enrolment.create_join_token(bad).await), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn a_renewed_certificate_replaces_the_old_one() {
    let world = World::new().await;
    let old = world.join(Role::Proxy, "src").await;
    let new = client::renew(&old).await.unwrap();
    assert_eq!((new.uid.as_str(), new.name.as_str()), (old.uid.as_str(), "src"));
    // Until the new one has been used the old one is still good.
    FakeProxy::connect(old.clone(), Script::default()).await.kill().await;
    let session = FakeProxy::connect(new, Script::default()).await;
    let (sender, stream) = open_session(&old).await;
    sender.send(ProxyMessage { message: Some(Up::Register(register(&old, &Script::default()))) }).await.unwrap();
    assert_eq!(code(stream.unwrap().message().await), Code::PermissionDenied);
    drop(session);
}

#[tokio::test]
async fn another_coordinators_certificate_is_refused() {
    let (world, other) = (World::new().await, World::new().await);
    let mut foreign = other.admin.clone();
    foreign.endpoint.clone_from(&world.admin.endpoint);
    // The client sees that it is not its coordinator …
    assert!(client::connect(&foreign).await.is_err());
    // … and the coordinator that it is not its client.
    foreign.ca_pem.clone_from(&world.admin.ca_pem);
    let listed = match client::connect(&foreign).await {
        Err(_) => return,
        Ok(channel) => {
            PoliciesClient::new(channel)
                .list_policies(ListPoliciesRequest { parent: TENANT.into(), ..Default::default() })
                .await
        }
    };
    assert!(listed.is_err());
}

async fn refused_session(bundle: &Bundle, message: ProxyMessage) -> Code {
    let (sender, stream) = open_session(bundle).await;
    let mut stream = stream.unwrap();
    sender.send(message).await.unwrap();
    loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended without a reason"),
            Err(status) => return status.code(),
        }
    }
}

#[tokio::test]
async fn a_session_that_begins_wrong_ends_with_a_reason() {
    let world = World::new().await;
    let bundle = world.join(Role::Proxy, "src").await;
    let good = register(&bundle, &Script::default());
    let send = |message| ProxyMessage { message: Some(message) };
    let invalid = Code::InvalidArgument;
    assert_eq!(refused_session(&bundle, ProxyMessage { message: None }).await, invalid);
    assert_eq!(refused_session(&bundle, send(Up::Report(Report::default()))).await, invalid);
    for bad in [
        Register { name: "dr".into(), ..good.clone() },
        Register { uid: "another".into(), ..good.clone() },
        Register { data_address: "no-port".into(), ..good.clone() },
        Register { boot_id: "x".repeat(10_000), ..good.clone() },
        Register { capabilities: vec!["x".into(); 1000], ..good.clone() },
    ] {
        assert_eq!(refused_session(&bundle, send(Up::Register(bad))).await, invalid);
    }
    // It has seen more than this coordinator has: the store is not the newest.
    let ahead = Register { observed_version: 1_000_000, ..good.clone() };
    assert_eq!(refused_session(&bundle, send(Up::Register(ahead))).await, Code::FailedPrecondition);
    let ahead = Register { observed_term: 1_000_000, ..good };
    assert_eq!(refused_session(&bundle, send(Up::Register(ahead))).await, Code::FailedPrecondition);
}

#[tokio::test]
async fn hostile_reports_hurt_nobody() {
    let world = World::new().await;
    let (_source, _target) = world.shop().await;
    let stream_uid = world.status().await.uid;
    let eve = world.join(Role::Proxy, "eve").await;
    let (sender, stream) = open_session(&eve).await;
    let mut stream = stream.unwrap();
    let send = async |message| sender.send(ProxyMessage { message: Some(message) }).await.unwrap();
    send(Up::Register(register(&eve, &Script::default()))).await;
    stream.message().await.unwrap().unwrap();
    // Somebody else's stream, as if it were its own; a histogram that is none; answers that nobody asked for.
    let lies = SourceGroupReport {
        stream_uid: stream_uid.clone(),
        rpo_now_us: 1 << 60,
        rpo_histogram: vec![0xff; 4096],
        held: true,
        ..Default::default()
    };
    let view = ViewReport { stream_uid, view: "shop.x".into(), ..Default::default() };
    send(Up::Report(Report { sources: vec![lies], views: vec![view; 5000], ..Default::default() })).await;
    let outcome = Some(command_result::Outcome::Done(Done {}));
    send(Up::Result(CommandResult { id: "never given".into(), outcome })).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let status = world.status().await;
    assert!(status.rpo.unwrap().now_us.unwrap() < 10_000_000);
    assert!(status.conditions.is_empty(), "{:?}", status.conditions);
    // A second registration ends it.
    send(Up::Register(register(&eve, &Script::default()))).await;
    loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            other => break assert_eq!(code(other), Code::InvalidArgument),
        }
    }
}

#[tokio::test]
async fn a_newer_session_takes_over() {
    let world = World::new().await;
    let bundle = world.join(Role::Proxy, "src").await;
    let (sender, stream) = open_session(&bundle).await;
    let mut first = stream.unwrap();
    let message = Some(Up::Register(register(&bundle, &Script::default())));
    sender.send(ProxyMessage { message }).await.unwrap();
    first.message().await.unwrap().unwrap();
    let second = FakeProxy::connect(bundle, Script::default()).await;
    loop {
        match first.message().await {
            Ok(Some(_)) => {}
            other => break assert_eq!(code(other), Code::Aborted),
        }
    }
    let get = GetProxyRequest { name: proxy_name("src") };
    assert!(world.proxies().get_proxy(get).await.unwrap().into_inner().connected);
    drop(second);
}

#[tokio::test]
async fn what_is_no_tls_gets_nothing_and_costs_nothing() {
    let world = World::new().await;
    let address = world.running.as_ref().unwrap().addresses()[0];
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""] {
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    world.policies().list_policies(ListPoliciesRequest { parent: TENANT.into(), ..Default::default() }).await.unwrap();
}

#[tokio::test]
async fn messages_beyond_the_bound_are_refused() {
    let world = World::new().await;
    let mut request = policy("big");
    request.policy.as_mut().unwrap().description = "x".repeat(8 * 1024 * 1024);
    let refused = code(world.policies().create_policy(request).await);
    assert!(matches!(refused, Code::OutOfRange | Code::ResourceExhausted), "{refused:?}");
    let mut request = policy("long");
    request.policy.as_mut().unwrap().description = "x".repeat(100_000);
    let status = world.policies().create_policy(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().len() < 1000, "what is echoed is bounded");
}

/// Sends bytes as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl tonic::codec::Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Raw {
    type Item = Vec<u8>;
    type Error = tonic::Status;
    fn encode(&mut self, item: Vec<u8>, to: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(to, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for Raw {
    type Item = ();
    type Error = tonic::Status;
    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        let length = bytes::Buf::remaining(from);
        bytes::Buf::advance(from, length);
        Ok(Some(()))
    }
}

#[tokio::test]
async fn bytes_that_are_no_message_get_an_error_from_every_method() {
    let world = World::new().await;
    let methods = [
        ("Policies", "CreatePolicy GetPolicy ListPolicies UpdatePolicy DeletePolicy"),
        ("Groups", "CreateGroup GetGroup ListGroups UpdateGroup DeleteGroup CreateDisk GetDisk ListDisks DeleteDisk"),
        ("Groups", "PauseGroup ResumeGroup"),
        ("Proxies", "GetProxy ListProxies DeleteProxy"),
        ("Points", "ListPoints ResolvePoint CreateCut"),
        ("Failovers", "StartFailover StartPlannedFailover UndoFailover ChangePoint TestFailover"),
        ("Failovers", "StartFailback CancelFailback SwitchFailback CommitFailback UndoFailback"),
        ("Operations", "GetOperation ListOperations WaitOperation CancelOperation DeleteOperation"),
        ("Views", "CreateView GetView ListViews DeleteView"),
        ("Machines", "CreateMachine GetMachine ListMachines UpdateMachine DeleteMachine ProbeMachine"),
        ("Plans", "CreatePlan GetPlan ListPlans UpdatePlan DeletePlan ListPlanRuns EstimatePlan"),
        ("Plans", "RunPlan TestPlan UndoPlan StopPlan ResumePlan"),
        ("Status", "GetStatus GetRpo Watch ListEvents"),
        ("Enrolment", "CreateJoinToken Join Renew"),
    ];
    // Empty, a field cut short, an endless varint, a length past the end, a group that never ends.
    let hostile: [&[u8]; 6] = [
        &[],
        &[0x0a, 0x7f, 0x41],
        &[0xff; 64],
        &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f],
        &[0x0b; 300],
        &[0x0a, 0x02, 0xc3, 0x28],
    ];
    for (service, names) in methods {
        for name in names.split(' ') {
            for bytes in hostile {
                let mut client = tonic::client::Grpc::new(world.channel.clone());
                client.ready().await.unwrap();
                let path = format!("/afterimage.v1.{service}/{name}").parse().unwrap();
                let answer = client.unary(tonic::Request::new(bytes.to_vec()), path, Raw).await;
                assert!(answer.is_err(), "{service}/{name} took {bytes:?}");
            }
        }
    }
    world.policies().list_policies(ListPoliciesRequest { parent: TENANT.into(), ..Default::default() }).await.unwrap();
}

#[tokio::test]
async fn reflection_names_our_services() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let world = World::new().await;
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(world.channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    for service in ["Policies", "Groups", "ProxyControl", "Enrolment"] {
        let name = format!("afterimage.v1.{service}");
        assert!(list.service.iter().any(|s| s.name == name), "{name}");
    }
}

#[tokio::test]
async fn half_of_a_backup_is_refused_by_name() {
    let mut world = World::new().await;
    let (_source, _target) = world.shop().await;
    world.running.take().unwrap().stop().await;
    let folder = world.folder.path().join("coordinator");
    let refused = async || {
        let config = Config::new(&folder, ([127, 0, 0, 1], 0).into());
        start(config).await.err().expect("refused").to_string()
    };
    for file in ["ca.pem", "keys.bin"] {
        let path = folder.join(file);
        let kept = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(refused().await.contains(file));
        std::fs::write(&path, kept).unwrap();
    }
    std::fs::write(folder.join("keys.bin"), [7; 32]).unwrap();
    assert!(refused().await.contains("does not open with this key file"));
}

#[tokio::test]
async fn a_restart_keeps_everything_and_the_admins_bundle_works_on() {
    let mut world = World::new().await;
    world.gold().await;
    let before = world.admin.clone();
    world.restart().await;
    assert_eq!(world.admin, before);
    world.policies().get_policy(GetPolicyRequest { name: GOLD.into() }).await.unwrap();
}

#[tokio::test]
async fn a_second_coordinator_on_the_same_folder_is_refused() {
    let world = World::new().await;
    let config = Config::new(world.folder.path().join("coordinator"), ([127, 0, 0, 1], 0).into());
    let text = start(config).await.err().unwrap().to_string();
    assert!(text.contains("in use"), "{text}");
}

#[tokio::test]
async fn settings_that_are_not_allowed_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::new(folder.path(), ([127, 0, 0, 1], 0).into());
    let text = async |config| start(config).await.err().unwrap().to_string();
    assert!(text(Config { listen: vec![], ..config.clone() }).await.contains("listen"));
    assert!(text(Config { advertise: Some("nonsense".into()), ..config.clone() }).await.contains("advertise"));
    assert!(text(Config { report_interval: Duration::ZERO, ..config.clone() }).await.contains("report_interval"));
    assert!(text(Config { names: vec!["ä b".into()], ..config }).await.len() > 5);
}

#[tokio::test]
async fn everything_in_the_folder_is_its_owners_only() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new().await;
    let folder = world.folder.path().join("coordinator");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    let audit = folder.join("audit");
    assert_eq!(mode(&audit), 0o700);
    for entry in std::fs::read_dir(&folder).unwrap().chain(std::fs::read_dir(&audit).unwrap()) {
        let path = entry.unwrap().path();
        assert!(path == audit || mode(&path) == 0o600, "{}", path.display());
    }
}

#[tokio::test]
async fn who_ends_a_rotation_is_answered_before_it_is_cut_off() {
    let world = World::new().await;
    let anna = world.join(Role::Operator, "anna").await;
    let annas = client::connect(&anna).await.unwrap();
    let certificates = |channel: &Channel| certificates_client::CertificatesClient::new(channel.clone());
    let get = || GetAuthoritiesRequest { parent: TENANT.into() };
    let rotate =
        |finish| RotateAuthorityRequest { parent: TENANT.into(), finish, anyway: finish, ..Default::default() };
    let both = certificates(&world.channel).rotate_authority(rotate(false)).await.unwrap().into_inner();
    assert_eq!(both.authorities.len(), 2);
    certificates(&annas).get_authorities(get()).await.unwrap();
    // The caller has a certificate of the old one itself.
    let ended = certificates(&world.channel).rotate_authority(rotate(true)).await.unwrap().into_inner();
    assert_eq!((ended.authorities.len(), &ended.authorities[0].id), (1, &both.authorities[0].id));
    for channel in [&world.channel, &annas] {
        certificates(channel).get_authorities(get()).await.unwrap_err();
    }
    // The local admin's identity is of the new one by now.
    let renewed = async || {
        let bundle = Bundle::load(world.running.as_ref().unwrap().admin_bundle()).unwrap();
        let channel = client::connect(&bundle).await.ok()?;
        certificates(&channel).get_authorities(get()).await.ok()
    };
    for _ in 0..100 {
        if renewed().await.is_some() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody is let in any more");
}
