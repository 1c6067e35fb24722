//! The coordinator at work: objects in the store, sessions of proxies, operations being done. The verbs are in the
//! modules below; `grpc` only translates.
//!
//! ```text
//!  verbs ──▶ change(): decide on the model · commit · next model ──▶ converge: desired states to proxies
//!  reports ─▶ live ──▶ watchman: conditions, events
//!  operations ─▶ drive: begin (recorded) · command · apply (recorded)
//! ```

use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant, SystemTime};

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{self, CommandErrorKind, Event, Severity};
use tokio::sync::{broadcast, watch};

use crate::audit::{self, AuditLog};
use crate::authorities::Trust;
use crate::ca::Ca;
use crate::connections::Connections;
use crate::desired::desired;
use crate::eventlog::EventLog;
use crate::events::Events;
use crate::history::History;
use crate::hooks::Hook;
use crate::keys::Wrapper;
use crate::live::Live;
use crate::model::{Model, Txn};
use crate::objects::{Object, Proxy, new_uid};
use crate::problem::Problem;
use crate::requests::Turns;
use crate::sessions::{CallError, Sessions};
use crate::status::{Scene, Tracker};
use crate::store::{Store, StoreError};

mod authorities;
mod certificates;
mod drive;
mod enrol;
mod failback;
mod groups;
mod hooks;
mod keys;
mod machines;
mod objects;
mod pause;
mod placement;
mod plan_runs;
mod plan_tasks;
mod plans;
mod points;
mod policies;
mod report;
mod restore;
mod rpo;
mod trials;
mod verbs;
mod views;
mod watchman;

pub use pause::Flow;
pub use points::page_size;
pub use trials::Trial;
pub use verbs::{Asking, From as RunFrom};

/// How long a proxy may take to answer a caller who waits.
const PATIENCE: Duration = Duration::from_secs(15);
/// Events that a watcher may be behind before it misses some.
const EVENT_BACKLOG: usize = 1024;

/// Where things are and how fast they go.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://host:port` by which others reach the coordinator; goes into join tokens.
    pub endpoint: String,
    /// Time between reports of a proxy.
    pub report_interval: Duration,
    /// Where the keys lie, for error messages.
    pub data_dir: PathBuf,
    /// Who is told of events.
    pub hooks: Vec<Hook>,
}

/// The clock: monotonic for ages, wall for people.
#[derive(Copy, Clone, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// Nanoseconds since the coordinator started, and a bit: never 0.
    pub fn mono_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64 + 1_000_000_000
    }

    /// Nanoseconds since the Unix epoch.
    pub fn wall_ns(&self) -> u64 {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
    }

    /// Since the start.
    pub fn uptime(&self) -> Duration {
        self.start.elapsed()
    }
}

/// The coordinator. Shared by all calls and tasks.
pub struct Coordinator {
    /// Settings.
    pub settings: Settings,
    /// The authority in `ca.pem`.
    file_ca: Arc<Ca>,
    /// The authorities, as the store says; told when that changes.
    trust: watch::Sender<Arc<Trust>>,
    /// Sessions of proxies.
    pub sessions: Sessions,
    /// Connections that are open.
    pub connections: Arc<Connections>,
    /// The clock.
    pub clock: Clock,
    /// Serial numbers of certificates that are being taken into the records.
    noting: Mutex<std::collections::HashSet<String>>,
    /// Certificates whose refusal is in the audit log, and since when.
    refused: Mutex<std::collections::HashMap<String, Instant>>,
    keys: Arc<Wrapper>,
    store: Arc<dyn Store>,
    history: History,
    audit: audit::Shared,
    turns: Turns,
    /// Streams of failbacks that are over, by uid, which proxies are ending: at the target, or else at the source.
    ending: Mutex<std::collections::HashSet<(String, bool)>>,
    /// Taken while a change is decided and committed: one at a time.
    changing: Arc<tokio::sync::Mutex<()>>,
    model: RwLock<Arc<Model>>,
    model_changed: watch::Sender<u64>,
    live: Mutex<Live>,
    tracker: Mutex<Tracker>,
    events: Mutex<Events>,
    event_log: EventLog,
    /// The newest event that is kept over a restart.
    kept_events: watch::Sender<u64>,
    event_feed: broadcast::Sender<Event>,
    closing: watch::Sender<bool>,
    /// What proxies have, as they said after a restore.
    observed: Mutex<Vec<crate::restore::Observed>>,
}

impl Coordinator {
    /// Reads the objects, and raises the term.
    ///
    /// # Errors
    /// The store cannot be read or written, or holds what this program does not know; a policy key does not open.
    pub async fn open(
        settings: Settings,
        store: Arc<dyn Store>,
        ca: Ca,
        keys: Wrapper,
        history: History,
    ) -> Result<Arc<Self>, StoreError> {
        let model = Model::load(store.list("").await?).map_err(StoreError::Failed)?;
        let keys = Arc::new(keys);
        if let Some(known) = model.wrapping.clone() {
            // It may run a command.
            let opening = keys.clone();
            let opened = tokio::task::spawn_blocking(move || opening.learn(&known)).await;
            opened.map_err(|e| StoreError::Failed(e.to_string()))?.map_err(|e| StoreError::Failed(e.to_string()))?;
        }
        for key in model.keys.values() {
            keys.unwrap(key).map_err(|e| StoreError::Failed(format!("{e}: {}", settings.data_dir.display())))?;
        }
        let file_ca = Arc::new(ca);
        let trust = Trust::open(&file_ca, model.authorities.as_ref(), &keys)
            .map_err(|e| StoreError::Failed(format!("{e}: {}", settings.data_dir.display())))?;
        let dir = settings.data_dir.join("audit");
        let audit =
            open_audit(&dir, &model.audit).map_err(|e| StoreError::Failed(format!("{}: {e}", dir.display())))?;
        let event_log = EventLog::open(&settings.data_dir.join("events.redb")).map_err(StoreError::Failed)?;
        let events = Events::restored(event_log.read().map_err(|e| StoreError::Failed(e.to_string()))?);
        let coordinator = Arc::new(Self {
            settings,
            file_ca,
            trust: watch::channel(Arc::new(trust)).0,
            sessions: Sessions::default(),
            connections: Arc::default(),
            noting: Mutex::default(),
            refused: Mutex::default(),
            clock: Clock { start: Instant::now() },
            keys,
            store,
            history,
            audit,
            turns: Turns::default(),
            ending: Mutex::default(),
            changing: Arc::default(),
            model: RwLock::new(Arc::new(model)),
            model_changed: watch::channel(0).0,
            live: Mutex::default(),
            tracker: Mutex::default(),
            kept_events: watch::channel(events.newest()).0,
            events: Mutex::new(events),
            event_log,
            event_feed: broadcast::channel(EVENT_BACKLOG).0,
            closing: watch::channel(false).0,
            observed: Mutex::default(),
        });
        let raised = coordinator
            .change_always(|model, txn| {
                if let Some(restored) = model.restored.as_ref().filter(|r| r.observing && !r.seen.is_empty()) {
                    // What they said was in memory: they are asked again.
                    txn.put(Object::Restored(crate::restore::Restored { seen: Vec::new(), ..restored.clone() }));
                }
                txn.put(Object::Term(model.term + 1));
                Ok(model.term + 1)
            })
            .await
            .map_err(|e| StoreError::Failed(e.to_string()))?;
        tracing::info!(term = raised, objects = coordinator.model().revision, "the store is open");
        Ok(coordinator)
    }

    /// Starts what goes on by itself: convergence, conditions, and operations that an earlier life had begun.
    pub fn start(self: &Arc<Self>) -> Vec<tokio::task::JoinHandle<()>> {
        if !self.model().observing() {
            self.resume_operations();
            self.resume_runs();
            self.drop_half_made_views();
        }
        self.resume_rewrap();
        let mut tasks = vec![
            tokio::spawn(self.clone().converge_always()),
            tokio::spawn(self.clone().watch_over()),
            tokio::spawn(self.clone().keep_events()),
        ];
        tasks.extend(self.settings.hooks.iter().map(|hook| tokio::spawn(self.clone().feed_hook(hook.clone()))));
        tasks
    }

    /// Ends sessions and streams, so that the server can stop.
    pub fn close(&self) {
        self.closing.send_replace(true);
        self.sessions.close();
    }

    /// True from [`Self::close`] on; streams end with it.
    pub fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// Ready from [`Self::close`] on.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut closing = self.closing();
        async move {
            // An error says that the coordinator is gone altogether.
            let _ = closing.wait_for(|c| *c).await;
        }
    }

    /// The objects now.
    pub fn model(&self) -> Arc<Model> {
        self.model.read().expect("nothing panics while it holds this").clone()
    }

    /// The authorities now.
    pub fn trust(&self) -> Arc<Trust> {
        self.trust.borrow().clone()
    }

    /// Told when authorities come or go.
    pub fn trust_changes(&self) -> watch::Receiver<Arc<Trust>> {
        self.trust.subscribe()
    }

    /// Told with each new model.
    pub fn model_changes(&self) -> watch::Receiver<u64> {
        self.model_changed.subscribe()
    }

    /// Waits until something is so of the objects.
    pub(crate) async fn until<T>(&self, seen: impl Fn(&Model) -> Option<T>) -> T {
        let mut changes = self.model_changes();
        loop {
            changes.mark_unchanged();
            if let Some(seen) = seen(&self.model()) {
                return seen;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Decides on the newest model and commits what was decided; one change at a time. Once decided it is done, even if
    /// the caller goes away.
    ///
    /// # Errors
    /// As decided; or the store failed and nothing was changed.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        decide: impl FnOnce(&Model, &mut Txn) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        self.change_always(|model, txn| {
            let result = decide(model, txn)?;
            if model.observing() && !txn.is_empty() {
                return Err(restore::only_observes());
            }
            Ok(result)
        })
        .await
    }

    /// As [`Self::change`], also before a restore has been confirmed.
    async fn change_always<T: Send + 'static>(
        self: &Arc<Self>,
        decide: impl FnOnce(&Model, &mut Txn) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let turn = self.changing.clone().lock_owned().await;
        let model = self.model();
        let mut txn = Txn::default();
        let result = decide(&model, &mut txn)?;
        if txn.is_empty() {
            return Ok(result);
        }
        let record = audit::of_caller(self.clock.wall_ns(), txn.subjects(), txn.outcome());
        if let Some((key, bytes, most)) = Model::too_long(&txn) {
            let what = format!("bytes of {key}, which would be {bytes}: nothing was changed");
            return Err(Problem::Limit { what, limit: most as u64 });
        }
        let coordinator = self.clone();
        let committed = tokio::spawn(async move {
            let head = coordinator.write_record(record.clone()).await?;
            let seq = head.seq;
            txn.put(Object::Audit(head));
            let revision = match coordinator.store.commit(model.changes(&txn)).await {
                Ok(revision) => revision,
                Err(error) => {
                    let outcome = format!("not done: record {seq}: {error}");
                    // The next record tells as much by its number if this one cannot be written.
                    let _ = coordinator.write_record(audit::Record { outcome, ..record }).await;
                    return Err(error);
                }
            };
            let next = Arc::new(model.applied(txn, revision));
            if next.authorities != model.authorities {
                // Before anybody is told of this version: it stands for these authorities.
                coordinator.reopen_trust(&next);
            }
            if next.wrapping != model.wrapping {
                // Before the next change: it is wrapped under the newest.
                coordinator.keys.follow(next.wrapping.as_ref());
            }
            *coordinator.model.write().expect("nothing panics while it holds this") = next;
            coordinator.model_changed.send_replace(revision);
            drop(turn);
            Ok::<(), StoreError>(())
        });
        match committed.await {
            Ok(Ok(())) => Ok(result),
            Ok(Err(e)) => {
                tracing::error!(error = %e, "the store refused a change");
                if matches!(e, StoreError::Deposed { .. }) {
                    let detail = format!("{e}: ask again, with the same request id");
                    return Err(Problem::Unreachable { proxy: "the coordinator".to_owned(), detail });
                }
                Err(match e {
                    // The object is named by its key.
                    StoreError::TooLarge { what, key, size, limit } => Problem::Limit {
                        what: format!("{what} of {key} would be {size}, so nothing was changed"),
                        limit: limit as u64,
                    },
                    e => Problem::Internal(format!("nothing was changed: {e}")),
                })
            }
            Err(e) => Err(Problem::Internal(format!("the change was interrupted: {e}"))),
        }
    }

    /// Writes a record of the audit log, durably. Only while it is this change's turn.
    async fn write_record(&self, record: audit::Record) -> Result<audit::Head, StoreError> {
        let log = self.audit.clone();
        let write = move || log.lock().expect("nothing panics while it holds this").append(record);
        let written = tokio::task::spawn_blocking(write).await;
        let failed = |why: String| StoreError::Failed(format!("the audit log cannot be written: {why}"));
        written.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
    }

    /// Records something that changes no object; done only if it could be recorded.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub async fn record_act(self: &Arc<Self>, what: String) -> Result<(), Problem> {
        self.change(|_, txn| {
            txn.note(what);
            Ok(())
        })
        .await
    }

    /// Records a call that was denied.
    pub async fn record_denial(self: &Arc<Self>, why: String) {
        let recorded = self.change_always(|_, txn| {
            txn.denied(why);
            Ok(())
        });
        if let Err(error) = recorded.await {
            tracing::warn!(%error, "a denied call is not in the audit log");
        }
    }

    /// Where the audit log lies, and the head that the store knows.
    pub fn audited(&self) -> (PathBuf, audit::Head) {
        let dir = self.audit.lock().expect("nothing panics while it holds this").dir().to_owned();
        (dir, self.model().audit.clone())
    }

    /// Something has happened.
    pub fn tell(&self, severity: Severity, kind: &str, subject: &str, message: &str) {
        match severity {
            Severity::Error => tracing::error!(kind, subject, "{message}"),
            Severity::Warning => tracing::warn!(kind, subject, "{message}"),
            _ => tracing::info!(kind, subject, "{message}"),
        }
        let mut events = self.events.lock().expect("nothing panics while it holds this");
        let event = events.push(self.clock.wall_ns(), severity, kind, subject, message);
        // Nobody watching is no error.
        let _ = self.event_feed.send(event);
    }

    /// Events from now on.
    pub fn event_feed(&self) -> broadcast::Receiver<Event> {
        self.event_feed.subscribe()
    }

    /// The number of the newest event.
    pub fn newest_event(&self) -> u64 {
        self.events.lock().expect("nothing panics while it holds this").newest()
    }

    /// Whether all events after this number are kept.
    pub fn keeps_events_after(&self, number: u64) -> bool {
        self.events.lock().expect("nothing panics while it holds this").keeps_after(number)
    }

    /// Events that are kept.
    pub fn events_from(&self, from: u64, limit: usize, fits: impl Fn(&Event) -> bool) -> Vec<Event> {
        self.events.lock().expect("nothing panics while it holds this").from(from, limit, fits)
    }

    /// Looks at what is, with everything that is needed to show it.
    pub fn look<T>(&self, at: impl FnOnce(&Scene<'_>, &dyn Fn(&str, &str) -> u64) -> T) -> T {
        let model = self.model();
        let live = self.live.lock().expect("nothing panics while it holds this");
        let tracker = self.tracker.lock().expect("nothing panics while it holds this");
        let scene = Scene {
            model: &model,
            live: &live,
            connected: &|uid| self.sessions.connected(uid),
            now_ns: self.clock.mono_ns(),
            wall_ns: self.clock.wall_ns(),
        };
        at(&scene, &|subject, kind| tracker.since(subject, kind))
    }

    /// Gives a proxy a command and waits for its answer, whatever it is.
    pub(crate) async fn command(
        &self,
        proxy: &Proxy,
        operation: &str,
        step: &str,
        tell: Tell,
        connect: Duration,
        answer: Duration,
    ) -> Result<Outcome, CallError> {
        self.command_once(&new_uid(), proxy, operation, step, tell, connect, answer).await
    }

    /// As [`Self::command`], with an id by which the proxy knows it again.
    #[allow(clippy::too_many_arguments)]
    async fn command_once(
        &self,
        id: &str,
        proxy: &Proxy,
        operation: &str,
        step: &str,
        tell: Tell,
        connect: Duration,
        answer: Duration,
    ) -> Result<Outcome, CallError> {
        // What was decided by who leads no more is not to be done: the next leader goes on with it.
        if !self.store.in_office() || (self.model().observing() && !restore::only_looks(&tell)) {
            return Err(CallError::NotConnected);
        }
        let command = v1::Command {
            id: id.to_owned(),
            term: self.model().term,
            operation: operation.to_owned(),
            step: step.to_owned(),
            command: Some(tell),
        };
        self.sessions.call(&proxy.uid, command, connect, answer).await
    }

    /// Asks a proxy something on behalf of a caller who waits: it has to be connected, and to answer soon.
    pub(crate) async fn ask_why(
        &self,
        proxy: &Proxy,
        tell: Tell,
    ) -> Result<Outcome, (Problem, Option<CommandErrorKind>)> {
        self.ask_by(proxy, "", tell).await
    }

    async fn ask_by(
        &self,
        proxy: &Proxy,
        id: &str,
        tell: Tell,
    ) -> Result<Outcome, (Problem, Option<CommandErrorKind>)> {
        let id = if id.is_empty() { new_uid() } else { id.to_owned() };
        match self.command_once(&id, proxy, "", "", tell, Duration::ZERO, PATIENCE).await {
            Ok(Outcome::Error(e)) => Err((refusal(proxy, &e), Some(e.kind()))),
            Ok(outcome) => Ok(outcome),
            Err(e) => Err((unreachable(proxy, &e), None)),
        }
    }

    /// As [`Self::ask`], with an id by which the proxy knows it again: asked twice it is done once. An empty one is none.
    pub(crate) async fn ask_once(&self, proxy: &Proxy, id: &str, tell: Tell) -> Result<Outcome, Problem> {
        self.ask_by(proxy, id, tell).await.map_err(|(problem, _)| problem)
    }

    /// As [`Self::ask_why`], for who need not tell one refusal from another.
    pub(crate) async fn ask(&self, proxy: &Proxy, tell: Tell) -> Result<Outcome, Problem> {
        self.ask_once(proxy, "", tell).await
    }

    async fn converge_always(self: Arc<Self>) {
        let mut changes = self.model_changes();
        let mut closing = self.closing();
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                _ = closing.wait_for(|c| *c) => return,
            }
            let model = self.model();
            for proxy in model.proxies.values().filter(|p| self.sessions.connected(&p.uid)) {
                self.converge(&model, proxy, false);
            }
        }
    }

    /// Sends a proxy what it should be, unless it has been told.
    pub(crate) fn converge(&self, model: &Model, proxy: &Proxy, first: bool) {
        if !self.store.in_office() || model.observing() || model.unasked(&proxy.uid) {
            return;
        }
        let recovery = model.recovery.as_ref().and_then(|r| self.open_recovery(r));
        let key = |id: &str| model.keys.get(id).and_then(|k| self.keys.unwrap(k).ok());
        let (mut state, without_key) = desired(model, proxy, key, recovery.as_ref());
        state.authorities_pem = self.trust().pem.clone();
        state.issuer = self.issuer_of(model, proxy);
        for group in without_key {
            let message = format!("its policy key does not open: {}", self.settings.data_dir.display());
            self.tell(Severity::Error, "key", &group, &message);
        }
        let streams: Vec<String> = state.sources.iter().map(|s| s.stream_uid.clone()).collect();
        if self.sessions.converge(&proxy.uid, state, first) {
            let mut live = self.live.lock().expect("nothing panics while it holds this");
            live.told(streams.iter().map(String::as_str));
        }
    }
}

fn open_audit(dir: &std::path::Path, head: &audit::Head) -> std::io::Result<audit::Shared> {
    let mut log = AuditLog::open(dir)?;
    log.follow(head)?;
    Ok(Arc::new(Mutex::new(log)))
}

/// A proxy that is not there.
fn unreachable(proxy: &Proxy, error: &CallError) -> Problem {
    let detail = format!("{error}; look at that host, then try again");
    Problem::Unreachable { proxy: proxy.name().to_string(), detail }
}

/// A proxy that said no.
fn refusal(proxy: &Proxy, error: &v1::CommandError) -> Problem {
    let detail = match error.kind() {
        CommandErrorKind::Unsupported => format!("cannot do that: {}", error.message),
        _ => error.message.clone(),
    };
    Problem::Refused { proxy: proxy.name().to_string(), detail }
}

/// A proxy whose answer is of the wrong kind.
fn misfit(proxy: &Proxy) -> Problem {
    let detail = "its answer does not fit the question; is it of another version?".to_owned();
    Problem::Refused { proxy: proxy.name().to_string(), detail }
}
