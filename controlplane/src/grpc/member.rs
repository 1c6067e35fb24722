//! One of several coordinators: stands for the office, serves while it has it, and otherwise passes every connection on
//! to who has it, unopened: a client may ask any of them and always speaks with the leader, by the leader's own TLS.
//!
//! ```text
//!  accept ──▶ leader known? ── it is this one ──▶ the server inside, on loopback
//!                 │ another                └────▶ its address
//!                 └ nobody: closed at once, the client asks the next
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::bound::Open;
use super::{Config, Running, ServeError, check_report, make_folder, start};
use crate::backup::{fingerprint, lacks_shared};
use crate::store::StoreError;
use crate::store::etcd::office::{Candidate, LEASE, LOOK, Office, Stood};
use crate::store::etcd::{Etcd, EtcdStore};

/// How long the leader may take to accept a connection that is passed on.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// How long what a time in office has begun may take to end.
const END_WITHIN: Duration = Duration::from_secs(20);

/// One of several coordinators.
pub struct Member {
    addresses: Vec<SocketAddr>,
    endpoint: String,
    admin: PathBuf,
    closing: watch::Sender<bool>,
    lives: JoinHandle<Result<(), ServeError>>,
    ports: Vec<JoinHandle<()>>,
}

/// Where connections go.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Way {
    /// To nobody: no leader is known.
    Closed,
    /// There.
    To(String),
}

impl Member {
    /// What it listens on.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// As in join tokens.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The local operator's bundle; there once this coordinator has led.
    pub fn admin_bundle(&self) -> &Path {
        &self.admin
    }

    /// Waits until it cannot go on, which does not happen by itself.
    ///
    /// # Errors
    /// What is in the way.
    pub async fn failed(&mut self) -> Result<(), ServeError> {
        (&mut self.lives).await.unwrap_or_else(|e| Err(ServeError::Config(format!("the coordinator ended: {e}"))))
    }

    /// Gives the office back if it has it, and ends, in a bounded time.
    pub async fn stop(self) {
        self.closing.send_replace(true);
        self.ports.iter().for_each(JoinHandle::abort);
        let abort = self.lives.abort_handle();
        if tokio::time::timeout(END_WITHIN, self.lives).await.is_err() {
            abort.abort();
        }
    }
}

/// Starts one of several coordinators; returns once its ports are open. `reach` is the `host:port` by which the others
/// reach it; default: the first address that is listened on.
///
/// # Errors
/// A setting, the folder, an address; etcd does not answer; or this coordinator has not the CA and the keys that the
/// others have.
pub async fn start_member(config: Config, etcd: Etcd, reach: Option<String>) -> Result<Member, ServeError> {
    crate::client::install_crypto();
    check_report(&config)?;
    make_folder(&config.data_dir)?;
    let embedded = config.data_dir.join("state.redb");
    if embedded.exists() {
        let hint = "`afterimage coordinator move` takes it into the etcd; or set it aside if the etcd's is to count";
        return Err(ServeError::Config(format!(
            "{} holds the state of a single coordinator: {hint}",
            embedded.display()
        )));
    }
    let mut listeners = Vec::new();
    let mut addresses = Vec::new();
    for address in &config.listen {
        let refused = |source| ServeError::Listen { address: *address, source };
        let listener = TcpListener::bind(*address).await.map_err(refused)?;
        addresses.push(listener.local_addr().map_err(refused)?);
        listeners.push(listener);
    }
    let endpoint = super::endpoint(config.advertise.as_deref(), addresses[0])?;
    let reach = match reach {
        Some(reach) => super::endpoint(Some(&reach), addresses[0])?,
        None if addresses[0].ip().is_unspecified() => {
            let what = "listen is a wildcard: say by --reach HOST:PORT where the other coordinators find this one";
            return Err(ServeError::Config(what.to_owned()));
        }
        None => super::endpoint(None, addresses[0])?,
    };
    let candidate = Candidate::new(&etcd, reach.trim_start_matches("https://"))?;
    check_shared(&candidate, &config.data_dir).await?;
    let closing = watch::channel(false).0;
    let way = watch::channel(Way::Closed).0;
    let open = Arc::new(Open::default());
    let ports = listeners.into_iter().map(|l| tokio::spawn(pass(l, way.subscribe(), open.clone()))).collect();
    // Its own server is reached by what has been accepted here, and counted.
    let names = config.names.iter().cloned().chain(addresses.iter().map(|a| a.ip().to_string())).collect();
    let inner = Config {
        listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        advertise: Some(endpoint.trim_start_matches("https://").to_owned()),
        names,
        ..config
    };
    let admin = inner.data_dir.join("admin.json");
    let lives = tokio::spawn(live(candidate, inner, way, closing.subscribe()));
    Ok(Member { addresses, endpoint, admin, closing, lives, ports })
}

/// A coordinator without the files that the others have would lock everybody out the moment it leads.
async fn check_shared(candidate: &Candidate, dir: &Path) -> Result<(), ServeError> {
    let Some(known) = candidate.shared().await? else { return Ok(()) };
    let Some(what) = lacks_shared(dir, &known) else { return Ok(()) };
    Err(ServeError::Config(format!("{what} of the coordinators of this etcd: copy both from one of them")))
}

/// Stands, leads, follows, until it is told to end.
async fn live(
    candidate: Candidate,
    config: Config,
    way: watch::Sender<Way>,
    mut closing: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let mut heard = Instant::now();
    while !*closing.borrow() {
        let stood = tokio::select! {
            stood = candidate.stand() => stood,
            _ = closing.wait_for(|c| *c) => return Ok(()),
        };
        match stood {
            Ok(Stood::Won(office)) => {
                let led = lead(&candidate, &office, &config, &way, &mut closing).await;
                way.send_replace(Way::Closed);
                office.give_back().await;
                led?;
                heard = Instant::now();
                continue;
            }
            Ok(Stood::Led(leader)) => {
                heard = Instant::now();
                let to = Way::To(leader.address);
                way.send_if_modified(|w| {
                    let new = *w != to;
                    if new {
                        tracing::info!(?to, "another coordinator leads");
                        *w = to;
                    }
                    new
                });
            }
            Err(error) => {
                tracing::warn!(%error, "who leads cannot be found out");
                // What was true a lease ago says nothing.
                if heard.elapsed() > LEASE {
                    way.send_if_modified(|w| std::mem::replace(w, Way::Closed) != Way::Closed);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = closing.wait_for(|c| *c) => {}
        }
    }
    Ok(())
}

/// One time in office.
async fn lead(
    candidate: &Candidate,
    office: &Arc<Office>,
    config: &Config,
    way: &watch::Sender<Way>,
    closing: &mut watch::Receiver<bool>,
) -> Result<(), ServeError> {
    // The first leader of all makes the files; nobody else may.
    check_shared(candidate, &config.data_dir).await?;
    let begun = async {
        let store = EtcdStore::open(office.clone()).await?;
        let running = start(Config { shared: Some(store.clone()), ..config.clone() }).await?;
        if let Some(own) = fingerprint(&config.data_dir) {
            store.keep_shared(&own).await?;
        }
        Ok::<Running, ServeError>(running)
    };
    let running = match begun.await {
        Ok(running) => running,
        // etcd went away, or the office did: no fault of this coordinator's.
        Err(ServeError::Store(error @ (StoreError::Deposed { .. } | StoreError::Failed(_)))) => {
            tracing::warn!(%error, "could not begin to lead");
            tokio::time::sleep(LOOK * 4).await;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    tracing::info!("this coordinator leads");
    way.send_replace(Way::To(running.addresses()[0].to_string()));
    tokio::select! {
        () = office.ended() => tracing::warn!("this coordinator leads no more"),
        _ = closing.wait_for(|c| *c) => {}
    }
    way.send_replace(Way::Closed);
    running.end(END_WITHIN).await
}

/// Accepts, within the bounds, and passes on.
async fn pass(listener: TcpListener, way: watch::Receiver<Way>, open: Arc<Open>) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of files, mostly: those that are open go on.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        let Some(entry) = open.enter(peer.ip()) else {
            tracing::warn!(%peer, "too many connections: this one is closed");
            continue;
        };
        let way = way.clone();
        tokio::spawn(async move {
            let _counted = entry;
            pass_one(stream, way).await;
        });
    }
}

/// Until an end closes it or the leader is another.
async fn pass_one(mut stream: TcpStream, mut way: watch::Receiver<Way>) {
    let Way::To(address) = way.borrow_and_update().clone() else { return };
    let Ok(Ok(mut leader)) = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(&address)).await else { return };
    let _ = (stream.set_nodelay(true), leader.set_nodelay(true));
    tokio::select! {
        // How it ended is the business of the two ends.
        _ = tokio::io::copy_bidirectional(&mut stream, &mut leader) => {}
        _ = way.changed() => {}
    }
}
