//! The agent against a coordinator that is played here, over real TLS with real certificates.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Mutex;

use afterimage_controlplane::ca::{Ca, Role};
use afterimage_controlplane::token::JoinToken;
use afterimage_wire::v1::enrolment_server::{Enrolment, EnrolmentServer};
use afterimage_wire::v1::proxy_control_server::{ProxyControl, ProxyControlServer};
use afterimage_wire::v1::{
    Command, CommandErrorKind, CreateJoinTokenRequest, CreateJoinTokenResponse, DesiredState, InspectDisk, JoinRequest,
    JoinResponse, RenewRequest, Report, SourceGroup, command, command_result,
};
use tokio_stream::Stream;
use tonic::transport::{Certificate, Identity as TlsIdentity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::super::config::{Config, Control, LogFormat};
use super::super::converge;
use super::*;

const UID: &str = "00000000-0000-4000-8000-00000000000a";

/// What the played coordinator does.
struct Played {
    ca: Ca,
    /// Said after the registration.
    say: Vec<coordinator_message::Message>,
    /// What the proxy said.
    heard: std::sync::mpsc::Sender<proxy_message::Message>,
}

#[derive(Clone)]
struct Coordinator(std::sync::Arc<Mutex<Played>>);

#[tonic::async_trait]
impl Enrolment for Coordinator {
    async fn create_join_token(
        &self,
        _: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        if request.secret != "right" {
            return Err(Status::permission_denied("the token is spent"));
        }
        let played = self.0.lock().unwrap();
        let issued = played.ca.issue(&request.csr_pem, "default", Role::Proxy, "src", Some(UID)).unwrap();
        Ok(Response::new(JoinResponse {
            certificate_pem: issued.certificate_pem,
            ca_pem: played.ca.certificate_pem().to_owned(),
            expire_time_ns: issued.expire_time_ns,
            role: afterimage_wire::v1::Role::Proxy.into(),
            name: "src".into(),
            uid: UID.into(),
            tenant: "default".into(),
            renew_time_ns: issued.renew_time_ns,
        }))
    }

    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<JoinResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

#[tonic::async_trait]
impl ProxyControl for Coordinator {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<ProxyMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut incoming = request.into_inner();
        let (say, heard) = {
            let played = self.0.lock().unwrap();
            (played.say.clone(), played.heard.clone())
        };
        tokio::spawn(async move {
            while let Ok(Some(ProxyMessage { message: Some(message) })) = incoming.message().await {
                if heard.send(message).is_err() {
                    break;
                }
            }
        });
        let registered = coordinator_message::Message::Registered(Registered { term: 4, report_interval_ms: 50 });
        let first = std::iter::once(registered).chain(say);
        let messages: Vec<_> = first.map(|m| Ok(CoordinatorMessage { message: Some(m) })).collect();
        let stream = tokio_stream::StreamExt::chain(tokio_stream::iter(messages), tokio_stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }
}

/// A coordinator on a thread of its own; its address, CA and what it hears.
fn coordinator(
    dir: &Path,
    say: Vec<coordinator_message::Message>,
) -> (SocketAddr, String, std::sync::mpsc::Receiver<proxy_message::Message>) {
    client::install_crypto();
    let ca = Ca::open(&dir.join("ca.pem")).unwrap();
    let ca_pem = ca.certificate_pem().to_owned();
    let (certificate, key) = ca.server(&["127.0.0.1".to_owned()]).unwrap();
    let (heard, hear) = std::sync::mpsc::channel();
    let coordinator = Coordinator(std::sync::Arc::new(Mutex::new(Played { ca, say, heard })));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let tls = ServerTlsConfig::new()
        .identity(TlsIdentity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(&ca_pem))
        .client_auth_optional(true);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let mut server = Server::builder().tls_config(tls).unwrap();
            let server = server.add_service(EnrolmentServer::new(coordinator.clone()));
            server.add_service(ProxyControlServer::new(coordinator)).serve_with_incoming(incoming).await.unwrap();
        });
    });
    (address, ca_pem, hear)
}

fn token(ca_pem: &str, secret: &str) -> Secret {
    let token = JoinToken {
        id: "1".into(),
        secret: secret.into(),
        endpoint: "https://127.0.0.1:1".into(),
        ca_pem: ca_pem.into(),
        role: "proxy".into(),
        name: "src".into(),
    };
    Secret(token.encode())
}

/// A proxy without a role, joined, until `enough` of what the coordinator hears.
fn play(
    dir: &Path,
    say: Vec<coordinator_message::Message>,
    mut enough: impl FnMut(&proxy_message::Message) -> bool,
) -> Rc<Proxy> {
    let (address, ca_pem, hear) = coordinator(dir, say);
    let address = address.to_string();
    let control = Control::Coordinator { address: address.clone(), token: None };
    let state_dir = dir.join("state");
    super::super::keep::folder(&state_dir).unwrap();
    let config = Config {
        name: "src".into(),
        state_dir: Some(state_dir.clone()),
        control,
        source: None,
        target: None,
        log: LogFormat::Text,
        site: String::new(),
        machines: Default::default(),
        keys: afterimage_controlplane::wrapping::KeysConfig::default(),
    };
    let proxy = Rc::new(Proxy::new(config, None, None));
    let shared = Rc::clone(&proxy);
    tokio_uring::start(async move {
        let bundle = join(&state_dir, "src", &address, Some(&token(&ca_pem, "right"))).await.unwrap();
        tokio::task::spawn_local(converge::run(Rc::clone(&shared)));
        tokio::task::spawn_local(run(shared, bundle));
        let end = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            assert!(std::time::Instant::now() < end, "the coordinator waits in vain");
            match hear.try_recv() {
                Ok(message) if enough(&message) => break,
                Ok(_) => {}
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    });
    proxy
}

#[test]
fn a_proxy_joins_by_token_and_registers_with_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    play(dir.path(), Vec::new(), |message| match message {
        proxy_message::Message::Register(register) => {
            assert_eq!((register.name.as_str(), register.uid.as_str()), ("src", UID));
            assert!(register.capabilities.is_empty() && register.boot_id.len() == 36);
            true
        }
        _ => panic!("something came before the registration"),
    });
    let bundle = Bundle::load(&dir.path().join("state").join(BUNDLE_FILE)).unwrap();
    assert_eq!(bundle.uid, UID);
    assert!(identity(&bundle).is_ok());
}

#[test]
fn desired_state_is_kept_and_what_cannot_be_done_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let group = SourceGroup { stream_uid: UID.into(), name: "shop".into(), ..SourceGroup::default() };
    let desired = DesiredState { term: 4, version: 9, sources: vec![group], ..DesiredState::default() };
    let proxy = play(dir.path(), vec![coordinator_message::Message::Desired(desired)], |message| match message {
        proxy_message::Message::Report(Report { observed_version: 9, problems, .. }) if !problems.is_empty() => {
            assert_eq!(problems[0].stream_uid, UID);
            assert!(problems[0].message.contains("no source role"), "{}", problems[0].message);
            true
        }
        _ => false,
    });
    let again = Proxy::new(proxy.config.clone(), None, None);
    again.recall().unwrap();
    assert_eq!((again.desired.borrow().version, again.term.get()), (9, 4));
}

#[test]
fn a_command_of_an_older_term_is_refused_and_one_that_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let inspect = |id: &str, term| {
        let verb = command::Command::InspectDisk(InspectDisk { path: "/dev/null".into() });
        let command = Command { id: id.into(), term, command: Some(verb), ..Command::default() };
        coordinator_message::Message::Command(command)
    };
    let mut kinds = std::collections::HashMap::new();
    play(dir.path(), vec![inspect("old", 3), inspect("new", 4)], |message| {
        if let proxy_message::Message::Result(result) = message
            && let Some(command_result::Outcome::Error(error)) = &result.outcome
        {
            kinds.insert(result.id.clone(), error.kind());
        }
        kinds.len() == 2
    });
    assert_eq!(kinds["old"], CommandErrorKind::StaleTerm);
    assert_eq!(kinds["new"], CommandErrorKind::Unsupported);
}

#[test]
fn a_spent_token_is_told_at_once_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (address, ca_pem, _hear) = coordinator(dir.path(), Vec::new());
    let error = tokio_uring::start(async {
        join(dir.path(), "src", &address.to_string(), Some(&token(&ca_pem, "wrong"))).await.unwrap_err()
    });
    assert!(matches!(&error, AgentError::Join(ClientError::Refused(_))), "{error}");
    assert!(error.to_string().contains("cannot join"));
    assert!(!dir.path().join(BUNDLE_FILE).exists());
}

#[test]
fn without_a_token_the_first_start_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let error = tokio_uring::start(async { join(dir.path(), "src", "127.0.0.1:1", None).await.unwrap_err() });
    assert!(matches!(&error, AgentError::NoToken(_)));
    assert!(error.to_string().contains("--token-file"), "{error}");
}
