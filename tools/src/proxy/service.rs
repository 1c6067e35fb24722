//! The service thread: starts the data threads, listens, follows the cores' events, stops it all.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use super::agent::{self, AgentError};
use super::config::{Config, ConfigError, Control, Listen};
use super::converge;
use super::cores::{self, TargetStartError};
use super::identity::{Identity, IdentityError};
use super::keep;
use super::runtime::{Core, Handle, StartError};
use super::standalone::Standalone;
use super::state::{Proxy, StateError};
use super::streams;

/// How long a clean stop may take: hosts' requests are answered, the queue is shipped.
const STOP_WITHIN: Duration = Duration::from_secs(12);
/// Pause after a listener failed (no descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Mode of the Unix sockets: whoever may open one reads and writes disks.
const SOCKET_MODE: u32 = 0o660;

/// Why a proxy does not start, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kept state.
    #[error("kept state: {0}")]
    State(#[from] StateError),
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
    /// The state folder cannot be made.
    #[error("`state_dir`: {0}")]
    StateDir(io::Error),
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
    if let Some(dir) = &config.state_dir {
        keep::folder(dir).map_err(ServiceError::StateDir)?;
    }
    // The rings come first: what the kernel lacks is told before anything else is touched.
    let source = config.source.as_ref().map(cores::start_source).transpose()?;
    let target = config.target.as_ref().map(cores::start_target).transpose()?;
    let (source_handle, source) = split(source);
    let (target_handle, target) = split(target);
    let proxy = Rc::new(Proxy::new(config, source_handle, target_handle));
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
        let result = serve(&proxy, &mut threads).await;
        stop(&proxy, threads).await;
        result
    })
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

async fn serve(proxy: &Rc<Proxy>, threads: &mut [Following]) -> Result<(), ServiceError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServiceError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServiceError::Signals)?;
    let sockets = tokio::select! {
        ready = prepare(proxy) => ready?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tracing::info!(name = proxy.config.name, "ready");
    let result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        name = died(threads) => Err(ServiceError::Died(name)),
    };
    for path in sockets {
        let _ = std::fs::remove_file(path);
    }
    result
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

/// Finds the desired state, brings the cores there, then lets clients and streams in. Returns the Unix sockets, to be
/// removed at the end.
async fn prepare(proxy: &Rc<Proxy>) -> Result<Vec<PathBuf>, ServiceError> {
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
        Control::Coordinator { .. } => proxy.recall()?,
    }
    // Who comes in finds what there was before a restart, not an empty house.
    if converge::once(proxy).await.is_err() {
        return Err(ServiceError::Died("data"));
    }
    let sockets = listen(proxy)?;
    tokio::task::spawn_local(converge::run(Rc::clone(proxy)));
    if let Control::Coordinator { address, token } = &config.control {
        let bundle = agent::join(config.state_dir()?, &config.name, address, token.as_ref()).await?;
        *proxy.identity.borrow_mut() = Some(agent::identity(&bundle)?);
        tokio::task::spawn_local(agent::run(Rc::clone(proxy), bundle));
    }
    Ok(sockets)
}

fn listen(proxy: &Rc<Proxy>) -> Result<Vec<PathBuf>, ServiceError> {
    let config = &proxy.config;
    let mut sockets = Vec::new();
    if let (Some(role), Some(handle)) = (&config.source, &proxy.source) {
        for listen in &role.nbd {
            listen_nbd("source.nbd", listen, handle, &mut sockets)?;
        }
    }
    if let (Some(role), Some(handle)) = (&config.target, &proxy.target) {
        for listen in &role.views {
            listen_nbd("target.views", listen, handle, &mut sockets)?;
        }
        let listener = std::net::TcpListener::bind(role.listen)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(TcpListener::from_std)
            .map_err(|source| ServiceError::Listen {
                field: "target.listen",
                address: role.listen.to_string(),
                source,
            })?;
        tokio::task::spawn_local(streams::accept_streams(Rc::clone(proxy), listener));
    }
    Ok(sockets)
}

/// Listens for clients of NBD and hands each to the data thread.
fn listen_nbd<C: Core>(
    field: &'static str,
    listen: &Listen,
    handle: &Handle<C>,
    sockets: &mut Vec<PathBuf>,
) -> Result<(), ServiceError> {
    let failed = |source| ServiceError::Listen { field, address: listen.to_string(), source };
    match listen {
        Listen::Unix(path) => {
            let listener = bind_unix(path).map_err(failed)?;
            sockets.push(path.clone());
            let handle = handle.clone();
            tokio::task::spawn_local(accept_nbd(handle, async move || {
                let (stream, _) = listener.accept().await?;
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }));
        }
        Listen::Tcp(address) => {
            let listener = std::net::TcpListener::bind(address)
                .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                .and_then(TcpListener::from_std)
                .map_err(failed)?;
            let handle = handle.clone();
            tokio::task::spawn_local(accept_nbd(handle, async move || {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }));
        }
    }
    tracing::info!(%listen, "NBD");
    Ok(())
}

/// Binds a Unix socket; one left over by a process that was killed is replaced, one in use is not.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
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
            Ok(sock) => desk.nbd.attach(desk.io, sock, desk.core).map_err(|error| error.to_string()),
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
