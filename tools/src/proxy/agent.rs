//! The proxy's side of the coordinator: joins once with a token, then keeps a session open for as long as it runs.
//! Without the coordinator everything goes on as it was last told.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use afterimage_controlplane::bundle::{Bundle, BundleError};
use afterimage_controlplane::client::{self, ClientError};
use afterimage_wire::ids::StreamId;
use afterimage_wire::v1::proxy_control_client::ProxyControlClient;
use afterimage_wire::v1::{
    CommandResult, CoordinatorMessage, Heard, ProxyMessage, Register, Registered, Report, Severity,
    coordinator_message, proxy_message,
};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;

use super::commands::{self, Answered};
use super::config::Secret;
use super::identity::{Identity, IdentityError, Pems};
use super::renewal;
use super::report::Reporter;
use super::runtime::Gone;
use super::state::Proxy;

/// File of the bundle in the state folder.
pub const BUNDLE_FILE: &str = "identity.json";
/// First pause before the coordinator is tried again; doubles …
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// … up to this.
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// Messages to the coordinator that may wait.
const OUTGOING: usize = 32;
/// Reports whose answer may still come; an older one would be of no use to a lease.
const UNANSWERED: usize = 64;
/// Commands that are done at the same time; the next is read when one has ended.
const COMMANDS: usize = 16;
/// Bounds of the time between two reports: what the coordinator asks for is kept within them.
const REPORTS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));

/// Why a proxy has no place at a coordinator.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The kept bundle cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Joining failed, and trying again would not help.
    #[error("cannot join: {0}")]
    Join(#[source] ClientError),
    /// There is neither a bundle nor a token.
    #[error(
        "this proxy has not joined yet: `coordinator.token` or `coordinator.token_file` (--token, --token-file) is needed for its first start, and {} does not exist",
        .0.display()
    )]
    NoToken(PathBuf),
    /// The bundle is another's.
    #[error("{} is the certificate of `{found}`, but this proxy is called `{name}`", path.display())]
    Name {
        /// The bundle.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Ours.
        name: String,
    },
    /// What came with the join cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// The certificate of an earlier start, or a new one by token. Waits for a coordinator that is not there yet.
///
/// # Errors
/// [`AgentError`]: waiting would not help.
pub async fn join(dir: &Path, name: &str, address: &str, token: Option<&Secret>) -> Result<Bundle, AgentError> {
    let path = dir.join(BUNDLE_FILE);
    let endpoint = format!("https://{address}");
    if path.exists() {
        let mut bundle = Bundle::load(&path)?;
        if bundle.name != name {
            return Err(AgentError::Name { path, found: bundle.name, name: name.to_owned() });
        }
        bundle.endpoint = endpoint;
        return Ok(bundle);
    }
    let token = token.ok_or_else(|| AgentError::NoToken(path.clone()))?;
    let mut pause = FIRST_PAUSE;
    loop {
        match client::join(&token.0, Some(&endpoint)).await {
            Ok(bundle) => {
                bundle.save(&path)?;
                if bundle.name != name {
                    return Err(AgentError::Name { path, found: bundle.name, name: name.to_owned() });
                }
                tracing::info!(name, uid = bundle.uid, "joined");
                return Ok(bundle);
            }
            Err(error @ ClientError::Connect { .. }) => {
                tracing::warn!(%error, "cannot join yet");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            Err(error) => return Err(AgentError::Join(error)),
        }
    }
}

/// What streams need of a bundle.
///
/// # Errors
/// The bundle's certificates are of no use.
pub fn identity(bundle: &Bundle) -> Result<Identity, IdentityError> {
    Identity::new(&Pems {
        uid: bundle.uid.clone(),
        ca_pem: bundle.ca_pem.clone(),
        certificate_pem: bundle.certificate_pem.clone(),
        key_pem: bundle.key_pem.clone(),
    })
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the coordinator ended the session: {}", .0.message())]
    Status(#[from] Box<tonic::Status>),
    #[error("the coordinator closed the session")]
    Closed,
    /// Not an end: the next session begins by the new certificate.
    #[error("the certificate was renewed")]
    Renewed,
    #[error("the coordinator does not keep to the protocol: {0}")]
    Protocol(&'static str),
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Keeps a session open until the data threads have ended.
pub async fn run(proxy: Rc<Proxy>, bundle: Bundle) -> Gone {
    let (bundle, changes) = watch::channel(bundle);
    let _renewal = Aborts(tokio::task::spawn_local(renewal::keep(Rc::clone(&proxy), bundle)));
    let mut agent = Agent {
        proxy,
        bundle: changes,
        before: None,
        asked: std::cell::RefCell::default(),
        answered: Rc::default(),
        reporter: Reporter::default(),
    };
    let mut pause = FIRST_PAUSE;
    let mut told = String::new();
    loop {
        let started = tokio::time::Instant::now();
        let end = agent.session().await;
        match end {
            SessionEnd::Gone(gone) => return gone,
            SessionEnd::Renewed => continue,
            _ => agent.before = None,
        }
        if started.elapsed() > LAST_PAUSE {
            pause = FIRST_PAUSE;
            told.clear();
        }
        // A coordinator that stays away is named once, not at every try.
        let message = end.to_string();
        if message != told {
            agent.proxy.event(Severity::Warning, None, "coordinator", message.clone());
            told = message;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Ends a task with whoever began it.
struct Aborts(tokio::task::JoinHandle<()>);

impl Drop for Aborts {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// For as long as a coordinator is there.
struct InSession(Rc<Proxy>);

impl InSession {
    fn begin(proxy: &Rc<Proxy>) -> Self {
        proxy.in_session.set(true);
        Self(Rc::clone(proxy))
    }
}

impl Drop for InSession {
    fn drop(&mut self) {
        self.0.in_session.set(false);
    }
}

/// The two directions of a session.
type Open = (mpsc::Sender<ProxyMessage>, tonic::Streaming<CoordinatorMessage>);

struct Agent {
    proxy: Rc<Proxy>,
    /// The newest certificate.
    bundle: watch::Receiver<Bundle>,
    /// The session by the certificate before: it stays open until the next one is, so that nobody is told of an end.
    before: Option<Open>,
    /// Reports that are not answered yet, and when they were begun, since boot.
    asked: std::cell::RefCell<VecDeque<(u64, u64)>>,
    answered: Rc<std::cell::RefCell<Answered>>,
    reporter: Reporter,
}

impl Agent {
    async fn session(&mut self) -> SessionEnd {
        match self.try_session().await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn try_session(&mut self) -> Result<std::convert::Infallible, SessionEnd> {
        let bundle = self.bundle.borrow_and_update().clone();
        let bundle = &bundle;
        let channel = client::connect(bundle).await?;
        let (out, outgoing) = mpsc::channel(OUTGOING);
        // From here on nothing is decided here that this registration does not tell.
        let _here = InSession::begin(&self.proxy);
        let register = proxy_message::Message::Register(register(&self.proxy, bundle));
        send(&out, register).await?;
        let status = |status: tonic::Status| SessionEnd::Status(Box::new(status));
        let answer = ProxyControlClient::new(channel).session(ReceiverStream::new(outgoing)).await.map_err(status)?;
        let mut incoming = answer.into_inner();
        let first = incoming.message().await.map_err(status)?.ok_or(SessionEnd::Closed)?;
        let Some(coordinator_message::Message::Registered(Registered { term, report_interval_ms })) = first.message
        else {
            return Err(SessionEnd::Protocol("its first message is not `registered`"));
        };
        if self.proxy.see_term(term).is_err() {
            return Err(SessionEnd::Protocol("it has an older term than the one seen"));
        }
        tracing::info!(term, "registered with the coordinator");
        self.before = None;
        let interval = Duration::from_millis(report_interval_ms.into()).clamp(REPORTS.0, REPORTS.1);
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let room = std::sync::Arc::new(Semaphore::new(COMMANDS));
        self.asked.borrow_mut().clear();
        let mut renewed = self.bundle.clone();
        let mut number = 0;
        loop {
            // Both are safe to drop: gRPC's reader keeps its place, and neither is a read of tokio-uring's.
            tokio::select! {
                message = incoming.message() => {
                    let message = message.map_err(status)?.ok_or(SessionEnd::Closed)?;
                    self.message(message, &out, &room).await?;
                }
                Ok(()) = renewed.changed() => {
                    self.before = Some((out, incoming));
                    return Err(SessionEnd::Renewed);
                }
                _ = ticks.tick() => {
                    // A coordinator that does not read gets no report; what has happened waits for the next.
                    if let Ok(permit) = out.try_reserve() {
                        let asked = since_boot();
                        let report = self.reporter.report(&self.proxy).await?;
                        number += 1;
                        self.asking(number, asked);
                        let report = Report { number, ..report };
                        permit.send(ProxyMessage { message: Some(proxy_message::Message::Report(report)) });
                    }
                }
            }
        }
    }

    /// A report with this number is about to be sent; what it says was asked for at `at`.
    fn asking(&self, number: u64, at: u64) {
        let mut asked = self.asked.borrow_mut();
        if asked.len() == UNANSWERED {
            asked.pop_front();
        }
        asked.push_back((number, at));
    }

    /// The coordinator says which streams are still ours: leases go on from when that was asked.
    async fn heard(&self, heard: &Heard) -> Result<(), SessionEnd> {
        let Some(source) = &self.proxy.source else { return Ok(()) };
        let asked = {
            let mut asked = self.asked.borrow_mut();
            let at = asked.iter().find(|(number, _)| *number == heard.report).map(|(_, at)| *at);
            asked.retain(|(number, _)| *number > heard.report);
            at
        };
        let Some(asked) = asked else { return Ok(()) };
        let streams: Vec<StreamId> = heard.stream_uids.iter().filter_map(|uid| uid.parse().ok()).collect();
        source
            .call(move |desk| streams.into_iter().for_each(|stream| desk.core.confirm(desk.io, stream, asked)))
            .await?;
        Ok(())
    }

    async fn message(
        &self,
        message: CoordinatorMessage,
        out: &mpsc::Sender<ProxyMessage>,
        room: &std::sync::Arc<Semaphore>,
    ) -> Result<(), SessionEnd> {
        match message.message {
            Some(coordinator_message::Message::Desired(desired)) => {
                let version = desired.version;
                match self.proxy.set_desired(desired) {
                    Ok(()) => tracing::debug!(version, "desired state"),
                    Err(error) => self.proxy.event(Severity::Error, None, "coordinator", error.to_string()),
                }
            }
            Some(coordinator_message::Message::Command(command)) => {
                let permit = std::sync::Arc::clone(room).acquire_owned().await.expect("the semaphore is never closed");
                let (proxy, answered, out) = (Rc::clone(&self.proxy), Rc::clone(&self.answered), out.clone());
                tokio::task::spawn_local(async move {
                    let _permit = permit;
                    let before = answered.borrow().get(&command.id);
                    let result: CommandResult = match before {
                        Some(result) => result,
                        None => commands::execute(&proxy, command).await,
                    };
                    answered.borrow_mut().keep(&result);
                    // A session that has ended in between: the coordinator asks again in the next.
                    let _ = send(&out, proxy_message::Message::Result(result)).await;
                });
            }
            Some(coordinator_message::Message::Heard(heard)) => self.heard(&heard).await?,
            Some(coordinator_message::Message::Registered(_)) => {
                return Err(SessionEnd::Protocol("`registered` came twice"));
            }
            None => tracing::warn!("the coordinator said something that this version does not know"),
        }
        Ok(())
    }
}

/// As the source core has it: the time since boot, with the time asleep.
fn since_boot() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

async fn send(out: &mpsc::Sender<ProxyMessage>, message: proxy_message::Message) -> Result<(), SessionEnd> {
    out.send(ProxyMessage { message: Some(message) }).await.map_err(|_| SessionEnd::Closed)
}

fn register(proxy: &Proxy, bundle: &Bundle) -> Register {
    let (source, target) = (proxy.config.source.as_ref(), proxy.config.target.as_ref());
    let listens = source.map(|s| s.nbd.as_slice()).unwrap_or_default().iter();
    let listens = listens.chain(target.map(|t| t.views.as_slice()).unwrap_or_default());
    let nbd_addresses: Vec<String> = listens.map(ToString::to_string).collect();
    let mut capabilities = Vec::new();
    let mut can = |yes: bool, what: &str| {
        if yes {
            capabilities.push(what.to_owned());
        }
    };
    can(source.is_some(), "source");
    can(target.is_some(), "target");
    can(nbd_addresses.iter().any(|a| a.starts_with("unix:")), "nbd-unix");
    can(nbd_addresses.iter().any(|a| a.starts_with("tcp:")), "nbd-tcp");
    capabilities.extend(proxy.config.machines.capabilities().map(str::to_owned));
    let data_address = target.map(|t| t.advertise.clone().unwrap_or_else(|| t.listen.to_string()));
    Register {
        name: proxy.config.name.clone(),
        uid: bundle.uid.clone(),
        software_version: env!("CARGO_PKG_VERSION").to_owned(),
        data_address: data_address.unwrap_or_default(),
        nbd_addresses,
        capabilities,
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
        observed_version: proxy.desired.borrow().version,
        observed_term: proxy.term.get(),
        site: proxy.config.site.clone(),
        local_failovers: proxy.local.borrow().clone(),
    }
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
