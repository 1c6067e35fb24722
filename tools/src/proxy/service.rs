//! The service thread: starts the data threads, listens, follows the cores' events, stops it all.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use super::agent::{self, AgentError};
use super::config::{Config, ConfigError, Control, Listen};
use super::converge;
use super::cores::{self, TargetStartError};
use super::given::{Given, GivenError};
use super::identity::{Identity, IdentityError};
use super::keep;
use super::local;
use super::machines;
use super::runtime::{Core, Handle, StartError};
use super::site::{SiteError, SiteKey};
use super::standalone::Standalone;
use super::state::{Proxy, StateError};
use super::streams;
use super::vhost;

/// How long a clean stop may take: hosts' requests are answered, the queue is shipped.
const STOP_WITHIN: Duration = Duration::from_secs(12);
/// How long the start waits for block devices that hosts had before, …
const DEVICES_WAIT: Duration = Duration::from_secs(10);
/// … looking so often.
const DEVICES_LOOK: Duration = Duration::from_millis(50);
/// Pause after a listener failed (no descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Mode of the Unix sockets: whoever may open one reads and writes disks. Their group is the folder's where that has its
/// group bit (`chmod g+s`), so that a hypervisor's user can be let in.
const SOCKET_MODE: u32 = 0o660;

/// A client over TCP that is silent for so long is asked whether it is still there, …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// … with this pause, …
const KEEPALIVE_PAUSE: Duration = Duration::from_secs(10);
/// … and given up after so many questions without an answer.
const KEEPALIVE_COUNT: u32 = 6;

/// How long an address that another process listens on is waited for, …
const BIND_WAIT: Duration = Duration::from_secs(3);
/// … looking so often.
const BIND_PAUSE: Duration = Duration::from_millis(20);

/// Why a proxy does not start, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kept state.
    #[error("kept state: {0}")]
    State(#[from] StateError),
    /// A journal by itself.
    #[error("{0}")]
    Journal(String),
    /// The key of the site.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The coordinator.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The source's data thread.
    #[error("source: {0}")]
    Source(#[from] StartError),
    /// The target's data thread.
    #[error("target: {0}")]
    Target(#[from] TargetStartError),
    /// An address cannot be listened on.
    #[error("`{field}`: cannot listen on {address}: {source}")]
    Listen {
        /// The field that says so.
        field: &'static str,
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The sockets that the service manager passed on.
    #[error(transparent)]
    Given(#[from] GivenError),
    /// The state folder cannot be made.
    #[error("`state_dir`: {0}")]
    StateDir(io::Error),
    /// ublk is asked for, and not there.
    #[error(transparent)]
    NoUblk(#[from] super::ublk::NoUblk),
    /// A disk of `--serve`.
    #[error(transparent)]
    Serve(#[from] converge::ServeError),
    /// A data thread ended although nobody told it to.
    #[error("the data thread `{0}` has ended: see the log above")]
    Died(&'static str),
    /// Signals cannot be caught.
    #[error("cannot catch signals: {0}")]
    Signals(io::Error),
}

/// Runs until a signal, or until something that the proxy cannot go on without is gone.
///
/// # Errors
/// [`ServiceError`].
pub fn run(config: Config) -> Result<(), ServiceError> {
    // Before anything else is opened.
    let given = Given::take(&config)?;
    if let Some(dir) = &config.state_dir {
        keep::folder(dir).map_err(ServiceError::StateDir)?;
    }
    let site = match (&config.state_dir, &config.control) {
        (Some(dir), Control::Coordinator { .. }) => Some(SiteKey::open(dir, &config.keys)?),
        _ => None,
    };
    super::ublk::check(&config)?;
    let sockets = Sockets::bind(&config, &given)?;
    allow_files();
    // The rings come before the disks: what the kernel lacks is told before those are touched.
    let source = config.source.as_ref().map(cores::start_source).transpose()?;
    let target = config.target.as_ref().map(cores::start_target).transpose()?;
    let (source_handle, source) = split(source);
    let (target_handle, target) = split(target);
    let proxy = Rc::new(Proxy { site, ..Proxy::new(config, source_handle, target_handle) });
    tokio_uring::start(async move {
        let mut threads = Vec::new();
        if let Some((events, thread)) = source {
            let follow = tokio::task::spawn_local(streams::source_events(Rc::clone(&proxy), events));
            threads.push(Following { name: "source", follow, thread });
        }
        if let Some((events, thread)) = target {
            let follow = tokio::task::spawn_local(streams::target_events(Rc::clone(&proxy), events));
            threads.push(Following { name: "target", follow, thread });
        }
        let result = serve(&proxy, &mut threads, sockets).await;
        stop(&proxy, threads).await;
        result
    })
}

/// Each disk takes descriptors, and so does each client; the usual soft limit of 1024 is for programs that use `select`.
fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some() && limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "the limit on open files stays at {:?}", limit.current);
        }
    }
}

type Rest<C> = (tokio::sync::mpsc::Receiver<<C as Core>::Event>, JoinHandle<()>);

fn split<C: Core>(thread: Option<super::runtime::DataThread<C>>) -> (Option<Handle<C>>, Option<Rest<C>>) {
    match thread {
        Some(thread) => (Some(thread.handle), Some((thread.events, thread.thread))),
        None => (None, None),
    }
}

/// A data thread, and the task that follows its events: that ends with it.
struct Following {
    name: &'static str,
    follow: tokio::task::JoinHandle<()>,
    thread: JoinHandle<()>,
}

async fn serve(proxy: &Rc<Proxy>, threads: &mut [Following], mut sockets: Sockets) -> Result<(), ServiceError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServiceError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServiceError::Signals)?;
    tokio::select! {
        ready = prepare(proxy, &mut sockets) => ready?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tracing::info!(name = proxy.config.name, "ready");
    say_ready();
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        name = died(threads) => Err(ServiceError::Died(name)),
    }
}

/// Tells systemd (`Type=notify`) that disks can be used: mounts of them are ordered after this.
fn say_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let bytes = path.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd does not hear that the proxy is ready");
    }
}

/// The name of the first data thread that ends.
async fn died(threads: &mut [Following]) -> &'static str {
    std::future::poll_fn(|context| {
        for thread in threads.iter_mut() {
            if std::pin::Pin::new(&mut thread.follow).poll(context).is_ready() {
                return std::task::Poll::Ready(thread.name);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// Finds the desired state, brings the cores there, then lets clients and streams in.
async fn prepare(proxy: &Rc<Proxy>, sockets: &mut Sockets) -> Result<(), ServiceError> {
    let config = &proxy.config;
    match &config.control {
        Control::Serve(disks) => {
            if let Some(source) = &proxy.source {
                for disk in disks {
                    converge::serve(source, disk).await?;
                }
            }
        }
        Control::File(path) => {
            let standalone = Standalone::load(path)?;
            *proxy.identity.borrow_mut() = Some(Identity::new(&standalone.identity)?);
            *proxy.desired.borrow_mut() = standalone.desired()?;
        }
        Control::Journal(wish) => *proxy.desired.borrow_mut() = wish.desired.clone(),
        Control::Coordinator { .. } => proxy.recall()?,
    }
    proxy.recall_decisions()?;
    // Who comes in finds what there was before a restart, not an empty house.
    if converge::begin(proxy).await.is_err() {
        return Err(ServiceError::Died("data"));
    }
    let_in(proxy, sockets)?;
    devices(proxy).await?;
    tokio::task::spawn_local(converge::run(Rc::clone(proxy)));
    tokio::task::spawn_local(local::resume(Rc::clone(proxy)));
    tokio::task::spawn_local(machines::clear(Rc::clone(proxy)));
    if let Control::Journal(wish) = &config.control {
        wish.open(proxy).await.map_err(ServiceError::Journal)?;
    }
    if let Control::Coordinator { address, token } = &config.control {
        listen_locally(proxy, sockets);
        let bundle = agent::join(config.state_dir()?, &config.name, address, token.as_ref()).await?;
        *proxy.identity.borrow_mut() = Some(agent::identity(&bundle)?);
        tokio::task::spawn_local(agent::run(Rc::clone(proxy), bundle));
    }
    Ok(())
}

/// Whoever owns the state folder may have a group failed over here when no coordinator is there to be asked.
fn listen_locally(proxy: &Rc<Proxy>, sockets: &mut Sockets) {
    let (Some(dir), Some(_)) = (&proxy.config.state_dir, &proxy.target) else { return };
    let path = dir.join(local::SOCKET);
    match bind_unix(&path).and_then(UnixListener::from_std) {
        Ok(listener) => {
            sockets.paths.push(path);
            sockets.accepting.push(tokio::task::spawn_local(local::serve(Rc::clone(proxy), listener)));
        }
        // A path that is too long for a socket, say.
        Err(error) => tracing::warn!(%error, path = %path.display(), "`failover local` will not reach this proxy"),
    }
}

/// Block devices that hosts had before, and new ones. One that waits for its disk does not hold the start up.
async fn devices(proxy: &Rc<Proxy>) -> Result<(), ServiceError> {
    let end = tokio::time::Instant::now() + DEVICES_WAIT;
    if super::ublk::converge(proxy).await.is_err() {
        return Err(ServiceError::Died("data"));
    }
    while !proxy.ublk.settled() && tokio::time::Instant::now() < end {
        let _ = tokio::time::timeout(DEVICES_LOOK, proxy.changed.notified()).await;
    }
    // Who waits for the same word looks, too.
    proxy.changed.notify_one();
    Ok(())
}

fn let_in(proxy: &Rc<Proxy>, sockets: &mut Sockets) -> Result<(), ServiceError> {
    let failed = |field| move |source| ServiceError::Listen { field, address: "its socket".to_owned(), source };
    if let Some(handle) = &proxy.source {
        let nbd = std::mem::take(&mut sockets.nbd);
        sockets.accepting.extend(serve_nbd(nbd, handle).map_err(failed("source.nbd"))?);
    }
    if let Some(handle) = &proxy.target {
        let views = std::mem::take(&mut sockets.views);
        sockets.accepting.extend(serve_nbd(views, handle).map_err(failed("target.views"))?);
    }
    if let (Some(handle), Some(dir)) = (&proxy.source, proxy.config.source.as_ref().and_then(|r| r.vhost_user.clone()))
    {
        let follow = vhost::follow(Rc::clone(proxy), handle.clone(), dir);
        sockets.accepting.push(tokio::task::spawn_local(async {
            let _ = follow.await;
        }));
    }
    if let (Some(handle), Some(dir)) = (&proxy.target, proxy.config.target.as_ref().and_then(|r| r.vhost_user.clone()))
    {
        let follow = vhost::follow(Rc::clone(proxy), handle.clone(), dir);
        sockets.accepting.push(tokio::task::spawn_local(async {
            let _ = follow.await;
        }));
    }
    if let Some(listener) = sockets.streams.take() {
        let listener = TcpListener::from_std(listener).map_err(failed("target.listen"))?;
        sockets.accepting.push(tokio::task::spawn_local(streams::accept_streams(Rc::clone(proxy), listener)));
    }
    for listen in
        proxy.config.source.iter().flat_map(|r| &r.nbd).chain(proxy.config.target.iter().flat_map(|r| &r.views))
    {
        tracing::info!(%listen, "NBD");
    }
    Ok(())
}

/// A socket that listens, before anybody is let in. Clients that come meanwhile wait in its queue: after a restart they
/// are held up for as long as that takes, not turned away.
enum Listening {
    Unix(std::os::unix::net::UnixListener),
    Tcp(std::net::TcpListener),
}

/// All sockets of a proxy.
#[derive(Default)]
struct Sockets {
    nbd: Vec<Listening>,
    views: Vec<Listening>,
    streams: Option<std::net::TcpListener>,
    /// Unix sockets, to be removed at the end.
    paths: Vec<PathBuf>,
    /// Those that let clients in.
    accepting: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Sockets {
    /// From here on another process can listen.
    fn drop(&mut self) {
        for task in &self.accepting {
            task.abort();
        }
        for path in &self.paths {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Sockets {
    /// Binds them all, or none, but for those that were passed on. A process that is about to end, whose place this one
    /// takes, is waited for.
    fn bind(config: &Config, given: &Given) -> Result<Self, ServiceError> {
        let end = std::time::Instant::now() + BIND_WAIT;
        loop {
            match Self::try_bind(config, given) {
                Err(ServiceError::Listen { source, .. })
                    if source.kind() == io::ErrorKind::AddrInUse && std::time::Instant::now() < end =>
                {
                    std::thread::sleep(BIND_PAUSE);
                }
                other => return other,
            }
        }
    }

    fn try_bind(config: &Config, given: &Given) -> Result<Self, ServiceError> {
        let mut sockets = Self::default();
        for listen in config.source.iter().flat_map(|role| &role.nbd) {
            let bound = sockets.bind_one("source.nbd", listen, given)?;
            sockets.nbd.push(bound);
        }
        for listen in config.target.iter().flat_map(|role| &role.views) {
            let bound = sockets.bind_one("target.views", listen, given)?;
            sockets.views.push(bound);
        }
        if let Some(role) = &config.target
            && let Listening::Tcp(bound) = sockets.bind_one("target.listen", &Listen::Tcp(role.listen), given)?
        {
            sockets.streams = Some(bound);
        }
        Ok(sockets)
    }

    fn bind_one(&mut self, field: &'static str, listen: &Listen, given: &Given) -> Result<Listening, ServiceError> {
        let failed = |source| ServiceError::Listen { field, address: listen.to_string(), source };
        if let Some(socket) = given.find(field, listen).map_err(failed)? {
            tracing::info!(%listen, field, "held by the service manager");
            // Its file stays: it is the manager's.
            return listening(socket, listen).map_err(failed);
        }
        match listen {
            Listen::Unix(path) => {
                let listener = bind_unix(path).map_err(failed)?;
                self.paths.push(path.clone());
                Ok(Listening::Unix(listener))
            }
            Listen::Tcp(address) => bind_tcp(*address).map(Listening::Tcp).map_err(failed),
        }
    }
}

/// A socket that listens already.
fn listening(socket: OwnedFd, listen: &Listen) -> io::Result<Listening> {
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(match listen {
        Listen::Unix(_) => Listening::Unix(socket.into()),
        Listen::Tcp(_) => Listening::Tcp(socket.into()),
    })
}

/// Lets clients of NBD in and hands each to the data thread.
fn serve_nbd<C: Core>(listening: Vec<Listening>, handle: &Handle<C>) -> io::Result<Vec<tokio::task::JoinHandle<()>>> {
    let mut tasks = Vec::with_capacity(listening.len());
    for listening in listening {
        let handle = handle.clone();
        tasks.push(match listening {
            Listening::Unix(listener) => {
                let listener = UnixListener::from_std(listener)?;
                tokio::task::spawn_local(accept_nbd(handle, async move || {
                    let (stream, _) = listener.accept().await?;
                    let stream = stream.into_std()?;
                    stream.set_nonblocking(false)?;
                    Ok(stream.into())
                }))
            }
            Listening::Tcp(listener) => {
                let listener = TcpListener::from_std(listener)?;
                tokio::task::spawn_local(accept_nbd(handle, async move || {
                    let (stream, _) = listener.accept().await?;
                    stream.set_nodelay(true)?;
                    keep_alive(&stream)?;
                    let stream = stream.into_std()?;
                    stream.set_nonblocking(false)?;
                    Ok(stream.into())
                }))
            }
        });
    }
    Ok(tasks)
}

/// A client whose host has gone without a word would keep its place for ever.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_PAUSE)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    Ok(())
}

fn bind_tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Binds a Unix socket; one left over by a process that was killed is replaced, one in use is not.
pub(super) fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Plain tokio accepts here: a stream of tokio-uring's cannot be turned into an owned descriptor for another ring
/// without `unsafe`.
async fn accept_nbd<C: Core>(handle: Handle<C>, accept: impl AsyncFn() -> io::Result<OwnedFd>) {
    loop {
        let socket = match accept().await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an NBD client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let attached = handle.call(move |desk| match desk.io.attach(socket) {
            Ok(sock) => desk.fronts.nbd.attach(desk.io, sock, desk.core).map_err(|error| error.to_string()),
            Err(errno) => Err(errno.to_string()),
        });
        match attached.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error, "an NBD client is turned away"),
            Err(_) => return,
        }
    }
}

/// Ends the data threads cleanly: the source first, while its target is still there to acknowledge.
async fn stop(proxy: &Proxy, threads: Vec<Following>) {
    let within = STOP_WITHIN.as_nanos() as u64;
    tracing::info!("stopping");
    for following in threads {
        match following.name {
            "source" => stop_one(proxy.source.as_ref(), within).await,
            _ => stop_one(proxy.target.as_ref(), within).await,
        }
        if !following.follow.is_finished()
            && tokio::time::timeout(STOP_WITHIN + Duration::from_secs(1), following.follow).await.is_err()
        {
            tracing::error!(thread = following.name, "the data thread does not end: a disk may hang");
            continue;
        }
        if following.thread.join().is_err() {
            tracing::error!(thread = following.name, "the data thread has panicked");
        }
    }
}

async fn stop_one<C: Core>(handle: Option<&Handle<C>>, within: u64) {
    if let Some(handle) = handle {
        handle.stop(within).await;
    }
}
