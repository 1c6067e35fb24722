//! The port: TLS, who may call what, and services that translate and decide nothing.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1;
use afterimage_wire::v1::audit_server::AuditServer;
use afterimage_wire::v1::backups_server::BackupsServer;
use afterimage_wire::v1::certificates_server::CertificatesServer;
use afterimage_wire::v1::enrolment_server::EnrolmentServer;
use afterimage_wire::v1::failovers_server::FailoversServer;
use afterimage_wire::v1::groups_server::GroupsServer;
use afterimage_wire::v1::keys_server::KeysServer;
use afterimage_wire::v1::machines_server::MachinesServer;
use afterimage_wire::v1::operations_server::OperationsServer;
use afterimage_wire::v1::plans_server::PlansServer;
use afterimage_wire::v1::points_server::PointsServer;
use afterimage_wire::v1::policies_server::PoliciesServer;
use afterimage_wire::v1::proxies_server::ProxiesServer;
use afterimage_wire::v1::proxy_control_server::ProxyControlServer;
use afterimage_wire::v1::status_server::StatusServer;
use afterimage_wire::v1::views_server::ViewsServer;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};
use tonic_health::pb::health_server::HealthServer;
use tower::layer::util::{Identity as NoLayer, Stack};

use crate::bundle::BundleError;
use crate::ca::{self, Ca, CaError};
use crate::client::install_crypto;
use crate::coordinator::{Coordinator, Settings};
use crate::history::History;
use crate::hooks::{self, HookConfig};
use crate::keys::{KeyError, Wrapper};
use crate::problem::Problem;
use crate::store::etcd::EtcdStore;
use crate::store::redb::RedbStore;
use crate::store::{Store, StoreError};
use crate::wrapping::KeysConfig;

use upkeep::Upkeep;

mod audit;
pub mod auth;
mod backups;
pub mod bound;
mod certificates;
mod control;
pub mod deadline;
mod enrolment;
mod errors;
mod health;
mod keys;
mod machines;
pub mod member;
mod operator;
mod plans;
pub mod rate;
mod status;
mod tls;
mod upkeep;

/// Longest message that is read, bytes.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// Calls at once on one connection.
const MAX_STREAMS: u32 = 256;
/// Longest headers, bytes.
const MAX_HEADERS: u32 = 16 * 1024;
/// Silence on a connection after which it is asked whether it is there, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How long calls have to end when the coordinator stops.
const STOP_WITHIN: Duration = Duration::from_secs(3);
/// Name in the certificate of the local operator.
const LOCAL_ADMIN: &str = "local";
/// How long certificates may last.
pub const CERTIFICATE_LIFETIMES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(10 * 365 * 86_400);

/// What an embedded store is called once it has been moved into an etcd.
pub const MOVED: &str = "state.redb.moved";

/// Where a coordinator stands.
#[derive(Clone, Debug)]
pub struct Config {
    /// Store, CA, keys and the local operator's bundle; made if it is not there.
    pub data_dir: PathBuf,
    /// Addresses to listen on, at least one. Port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// `host:port` by which others reach it; goes into join tokens. Default: the first address that is listened on.
    pub advertise: Option<String>,
    /// More names or addresses for its certificate. Clients of ours need none of them.
    pub names: Vec<String>,
    /// Time between reports of a proxy.
    pub report_interval: Duration,
    /// Address for Prometheus, over plain HTTP and open to who reaches it; none: there is none.
    pub metrics: Option<SocketAddr>,
    /// Who is told of events.
    pub hooks: Vec<HookConfig>,
    /// How long certificates last that are issued from now on, the coordinator's own among them.
    pub certificate_lifetime: Duration,
    /// How many calls each identity has.
    pub calls: rate::Rate,
    /// What wrapping keys are wrapped by; nothing of it set: `keys.bin`.
    pub keys: KeysConfig,
    /// The store that several coordinators share, held by this one; none: the embedded one in the data folder.
    pub shared: Option<EtcdStore>,
}

impl Config {
    /// With what is usual for everything else.
    pub fn new(data_dir: impl Into<PathBuf>, listen: SocketAddr) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen: vec![listen],
            advertise: None,
            names: Vec::new(),
            report_interval: Duration::from_millis(250),
            metrics: None,
            hooks: Vec::new(),
            certificate_lifetime: ca::LIFETIME,
            calls: rate::Rate::default(),
            keys: KeysConfig::default(),
            shared: None,
        }
    }
}

/// A coordinator that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A setting that is not allowed.
    #[error("{0}")]
    Config(String),
    /// The data folder cannot be made or used.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The CA.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The key file.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The local operator's bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// TLS or the transport.
    #[error("the port failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Something else.
    #[error("{0}")]
    Problem(#[from] Problem),
}

/// A coordinator that runs.
pub struct Running {
    addresses: Vec<SocketAddr>,
    metrics: Option<SocketAddr>,
    admin: PathBuf,
    coordinator: Arc<Coordinator>,
    servers: Vec<JoinHandle<Result<(), tonic::transport::Error>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Running {
    /// What it listens on, with the ports that were taken.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Where the numbers for Prometheus are, if anywhere.
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// `https://host:port` as in join tokens.
    pub fn endpoint(&self) -> &str {
        &self.coordinator.settings.endpoint
    }

    /// The local operator's bundle (role admin), readable by the owner of the data folder.
    pub fn admin_bundle(&self) -> &std::path::Path {
        &self.admin
    }

    /// Waits until a port fails, which it does not by itself.
    async fn failed(&mut self) -> Result<(), ServeError> {
        for server in &mut self.servers {
            match server.await {
                Ok(result) => result?,
                Err(e) => return Err(ServeError::Config(format!("a server ended: {e}"))),
            }
        }
        Ok(())
    }

    /// As [`Self::stop`], and waits until nothing of it is left: only then may another life begin in this process.
    ///
    /// # Errors
    /// Something has not ended within `within`.
    pub(crate) async fn end(self, within: Duration) -> Result<(), ServeError> {
        let left = Arc::downgrade(&self.coordinator);
        self.stop().await;
        let until = tokio::time::Instant::now() + within;
        while left.strong_count() > 0 {
            if tokio::time::Instant::now() > until {
                return Err(ServeError::Config("what was being done has not ended: start it again".to_owned()));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends sessions and calls, in a bounded time. Operations that are being done go on with the next start.
    pub async fn stop(self) {
        self.coordinator.close();
        let aborts: Vec<_> = self.servers.iter().map(JoinHandle::abort_handle).collect();
        let ends = async {
            for server in self.servers {
                let _ = server.await;
            }
            for task in self.tasks {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(STOP_WITHIN, ends).await.is_err() {
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
    }
}

/// Runs a coordinator until `shutdown` is ready.
///
/// # Errors
/// It cannot start: a setting, the folder, the store, an address; or a port fails.
pub async fn serve(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    let mut running = start(config).await?;
    let ended = tokio::select! {
        () = shutdown => Ok(()),
        failed = running.failed() => failed,
    };
    running.coordinator.close();
    if ended.is_ok() {
        running.stop().await;
    }
    ended
}

/// Starts a coordinator and returns once its ports are open.
///
/// On the first start this makes, in the data folder: `state.redb` (objects), `ca.pem` (the CA and its key),
/// `keys.bin` (wraps policy keys), `history.redb` (RPO over time) and `admin.json` (the local operator's bundle), all readable by their owner only.
///
/// # Errors
/// A setting, the folder, the store, or an address.
pub async fn start(config: Config) -> Result<Running, ServeError> {
    start_over(config, |store| store).await
}

/// As [`start`], with something put in front of the store: a test's, that dies when it should.
///
/// # Errors
/// As [`start`].
pub async fn start_over(
    config: Config,
    front: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>,
) -> Result<Running, ServeError> {
    install_crypto();
    check_report(&config)?;
    config.calls.check().map_err(ServeError::Config)?;
    let (report, dir) = (config.report_interval, &config.data_dir);
    let hooks = hooks::check(&config.hooks).map_err(ServeError::Config)?;
    make_folder(dir)?;
    // First of all: it is what keeps a second coordinator out.
    let store: Arc<dyn Store> = match &config.shared {
        Some(shared) => Arc::new(shared.clone()),
        None => {
            check_not_moved(dir)?;
            let store = RedbStore::open(&dir.join("state.redb"))?;
            only_owner(&dir.join("state.redb"))?;
            Arc::new(store)
        }
    };
    let store = front(store);
    check_whole(store.as_ref(), dir).await?;
    let history = History::open(&dir.join("history.redb")).map_err(ServeError::Config)?;
    only_owner(&dir.join("history.redb"))?;
    let ca = Ca::open(&dir.join("ca.pem"))?.lasting(config.certificate_lifetime);
    let wrappers = config.keys.check().map_err(ServeError::Config)?;
    let keys = Wrapper::open(&dir.join("keys.bin"))?.by(wrappers);
    only_owner(&dir.join("keys.bin"))?;
    let mut incoming = Vec::new();
    for address in &config.listen {
        let refused = |source| ServeError::Listen { address: *address, source };
        let bound = TcpIncoming::bind(*address).map_err(refused)?.with_nodelay(Some(true));
        incoming.push((bound.local_addr().map_err(refused)?, bound));
    }
    let metrics = match config.metrics {
        None => None,
        Some(address) => {
            let refused = |source| ServeError::Listen { address, source };
            let listener = tokio::net::TcpListener::bind(address).await.map_err(refused)?;
            Some((listener.local_addr().map_err(refused)?, listener))
        }
    };
    let addresses: Vec<SocketAddr> = incoming.iter().map(|(a, _)| *a).collect();
    let endpoint = endpoint(config.advertise.as_deref(), addresses[0])?;
    let mut names = config.names.clone();
    names.extend(addresses.iter().map(|a| a.ip().to_string()));
    let settings = Settings { endpoint, report_interval: report, data_dir: dir.clone(), hooks };
    // Opens the policy keys, too: with another key file it stops here rather than at the first failover.
    let coordinator = Coordinator::open(settings, store, ca, keys, history).await?;
    let admin = dir.join("admin.json");
    let (upkeep, tls) = Upkeep::begin(coordinator.clone(), names, admin.clone()).await?;
    let mut servers = Vec::new();
    let open = if config.shared.is_some() { bound::Open::passed_on() } else { bound::Open::default() };
    let open = Arc::new(open);
    let limits = Arc::new(rate::Limits::new(config.calls));
    for (_, incoming) in incoming {
        let stop = coordinator.closed();
        let router = router(&coordinator, &limits)?;
        let bounded = bound::Bounded::new(incoming, open.clone());
        let secured = tls::secured(bounded, tls.clone(), coordinator.connections.clone());
        servers.push(tokio::spawn(router.serve_with_incoming_shutdown(secured, stop)));
    }
    let mut tasks = coordinator.start();
    tasks.push(tokio::spawn(upkeep.run()));
    let metrics = metrics.map(|(address, listener)| {
        tasks.push(tokio::spawn(crate::metrics::serve(coordinator.clone(), listener)));
        address
    });
    Ok(Running { addresses, metrics, admin, coordinator, servers, tasks })
}

type Layered = Router<Stack<auth::AuthLayer, NoLayer>>;

fn router(coordinator: &Arc<Coordinator>, limits: &Arc<rate::Limits>) -> Result<Layered, ServeError> {
    let operator = operator::Operator(coordinator.clone());
    let health = HealthServer::new(health::HealthService::new(coordinator.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| ServeError::Config(format!("the API's descriptors: {e}")))?;
    macro_rules! bounded {
        ($server:ident, $service:expr) => {
            $server::new($service).max_decoding_message_size(MAX_MESSAGE)
        };
    }
    Ok(Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .layer(auth::AuthLayer::of(coordinator.clone(), limits.clone()))
        .add_service(health)
        .add_service(reflection)
        .add_service(bounded!(PoliciesServer, operator.clone()))
        .add_service(bounded!(GroupsServer, operator.clone()))
        .add_service(bounded!(ProxiesServer, operator.clone()))
        .add_service(bounded!(PointsServer, operator.clone()))
        .add_service(bounded!(FailoversServer, operator.clone()))
        .add_service(bounded!(OperationsServer, operator.clone()))
        .add_service(bounded!(ViewsServer, operator.clone()))
        .add_service(bounded!(MachinesServer, operator.clone()))
        .add_service(bounded!(PlansServer, operator))
        .add_service(bounded!(StatusServer, status::StatusService(coordinator.clone())))
        .add_service(bounded!(AuditServer, audit::AuditService(coordinator.clone())))
        .add_service(bounded!(BackupsServer, backups::BackupsService(coordinator.clone())))
        .add_service(bounded!(CertificatesServer, certificates::CertificatesService(coordinator.clone())))
        .add_service(bounded!(KeysServer, keys::KeysService(coordinator.clone())))
        .add_service(bounded!(EnrolmentServer, enrolment::EnrolmentService(coordinator.clone())))
        .add_service(bounded!(ProxyControlServer, control::ControlService(coordinator.clone()))))
}

fn check_report(config: &Config) -> Result<(), ServeError> {
    let report = config.report_interval;
    if !(Duration::from_millis(50)..=Duration::from_secs(1)).contains(&report) {
        return Err(ServeError::Config(format!("report_interval is {report:?}; allowed: 50 ms to 1 s")));
    }
    if !CERTIFICATE_LIFETIMES.contains(&config.certificate_lifetime) {
        let given = config.certificate_lifetime;
        return Err(ServeError::Config(format!("certificate_lifetime is {given:?}; allowed: 10 s to 10 years")));
    }
    if config.listen.is_empty() {
        return Err(ServeError::Config("listen is empty; allowed: at least one address".to_owned()));
    }
    Ok(())
}

/// A store that is in use without the files beside it is half of a backup. New files would lock everybody out, and every
/// journal with them.
async fn check_whole(store: &dyn Store, dir: &std::path::Path) -> Result<(), ServeError> {
    if store.get("term").await?.is_none() {
        return Ok(());
    }
    for file in ["ca.pem", "keys.bin"] {
        let path = dir.join(file);
        if !path.exists() {
            let folder = dir.display();
            let message =
                format!("{folder} holds a store in use, but {file} is missing; put it back from the same backup");
            return Err(ServeError::Config(message));
        }
    }
    Ok(())
}

/// A store that was moved away leaves nothing to go on from: an empty one in its place would know nobody.
fn check_not_moved(dir: &std::path::Path) -> Result<(), ServeError> {
    if dir.join("state.redb").exists() || !dir.join(MOVED).exists() {
        return Ok(());
    }
    let folder = dir.display();
    Err(ServeError::Config(format!("the state in {folder} was moved into an etcd ({MOVED}): start it with --etcd")))
}

fn make_folder(path: &std::path::Path) -> Result<(), ServeError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| ServeError::Folder { path: path.to_owned(), source })
}

fn only_owner(path: &std::path::Path) -> Result<(), ServeError> {
    use std::os::unix::fs::PermissionsExt;
    let set = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600));
    set.map_err(|source| ServeError::Folder { path: path.to_owned(), source })
}

fn endpoint(advertise: Option<&str>, bound: SocketAddr) -> Result<String, ServeError> {
    let Some(given) = advertise else {
        let reach = match bound.ip() {
            ip if !ip.is_unspecified() => bound,
            ip if ip.is_ipv4() => SocketAddr::from(([127, 0, 0, 1], bound.port())),
            _ => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, bound.port())),
        };
        return Ok(format!("https://{reach}"));
    };
    let fits = |one: &str| {
        let (host, port) = one.rsplit_once(':').unwrap_or_default();
        !host.is_empty() && !one.contains('/') && port.parse::<u16>().is_ok_and(|p| p != 0)
    };
    if !given.split(',').all(fits) {
        let allowed = "\"host:port\", or several with commas";
        return Err(ServeError::Config(format!("advertise is {given:?}; allowed: {allowed}")));
    }
    Ok(format!("https://{given}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_is_one_that_can_be_reached() {
        let any: SocketAddr = "0.0.0.0:7443".parse().unwrap();
        assert_eq!(endpoint(None, any).unwrap(), "https://127.0.0.1:7443");
        assert_eq!(endpoint(None, "[::]:1".parse().unwrap()).unwrap(), "https://[::1]:1");
        assert_eq!(endpoint(Some("dr.example:7443"), any).unwrap(), "https://dr.example:7443");
        assert_eq!(endpoint(Some("a:1,b:2"), any).unwrap(), "https://a:1,b:2");
        for bad in ["a:1,", "a:1,b", "dr.example", ":1", "h:0", "h:x", "https://h:1"] {
            assert!(endpoint(Some(bad), any).unwrap_err().to_string().contains("advertise"), "{bad}");
        }
    }
}
