//! What the service thread knows: the desired state, how far it has been applied, and what waits to be reported.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::names::DEFAULT_TENANT;
use afterimage_dataplane::host::DiskKey;
use afterimage_dataplane::source::Pace;
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::v1::{
    DesiredState, LocalFailover, OpenView, Problem, ProxyEvent, Severity, SourceGroup, TargetStream,
};
use prost::Message;
use tokio::sync::{Notify, oneshot, watch};

use super::config::Config;
use super::convert::{self, Places};
use super::cores::{self, SourceCore, TargetCore};
use super::identity::Identity;
use super::keep;
use super::runtime::{Gone, Handle, ThreadIo};
use super::site::{SiteError, SiteKey};

/// File of the last desired state: it holds policy keys, sealed under the site's.
const DESIRED_FILE: &str = "desired.pb";
/// File of the highest term seen.
const TERM_FILE: &str = "term";
/// Events that wait to be reported; the oldest give way.
const MAX_EVENTS: usize = 256;

/// The service thread's side of a proxy. One thread: borrows never cross an `await`.
pub struct Proxy {
    /// Configuration.
    pub config: Config,
    /// The source's data thread, with that role.
    pub source: Option<Handle<SourceCore>>,
    /// The target's data thread, with that role.
    pub target: Option<Handle<TargetCore>>,
    /// Seals policy keys that are kept here; none without a coordinator.
    pub site: Option<SiteKey>,
    /// Certificates of streams; none before the first join.
    pub identity: RefCell<Option<Identity>>,
    /// What should be.
    pub desired: RefCell<DesiredState>,
    /// Highest term seen.
    pub term: Cell<u64>,
    /// What has been done about it.
    pub applied: RefCell<Applied>,
    /// What of it could not be done.
    pub problems: RefCell<Vec<Problem>>,
    /// The keys (SHA-256 of the public key) of the proxies at the other end of streams, as their connections were made.
    pub linked: RefCell<HashMap<StreamId, [u8; 32]>>,
    /// That the certificate is not renewed although it is due.
    pub unrenewed: RefCell<Option<Problem>>,
    /// What happened since the last report.
    pub events: RefCell<VecDeque<ProxyEvent>>,
    /// Who waits for an event of the source core.
    pub waiters: RefCell<Waiters>,
    /// Failovers that were decided here and that nobody has taken in yet.
    pub local: RefCell<Vec<LocalFailover>>,
    /// A coordinator has registered this proxy, and the session lasts.
    pub in_session: Cell<bool>,
    /// Block devices of this host that disks and views have.
    pub ublk: super::ublk::Devices,
    /// Machines of this host that are being started or stopped.
    pub machines: super::machines::Turns,
    /// What came of scripts of plans.
    pub scripts: super::machines::script::Ran,
    /// Something in `desired` or in the cores is new: converge.
    pub changed: Notify,
    /// Something in `desired` is new: certificates follow.
    pub told: Notify,
    /// What is on offer may have changed: sockets of disks follow.
    pub offers: watch::Sender<()>,
}

/// What has been done about the desired state.
#[derive(Default)]
pub struct Applied {
    /// Groups given to the source core, as they were given.
    pub groups: HashMap<StreamId, SourceGroup>,
    /// Streams given to the target core, as they were given.
    pub streams: HashMap<StreamId, TargetStream>,
    /// When frames of groups may leave, as the source core was last told.
    pub paces: HashMap<StreamId, Pace>,
    /// Views open, by name.
    pub views: HashMap<String, View>,
}

/// An open view.
pub struct View {
    /// As it was asked for.
    pub said: OpenView,
    /// Its exports.
    pub keys: Vec<DiskKey>,
}

/// Who waits for an event of the source core.
#[derive(Default)]
pub struct Waiters {
    /// For a cut.
    pub cuts: Vec<CutWaiter>,
    /// The end of a group: was it clean?
    pub stops: Vec<(StreamId, oneshot::Sender<bool>)>,
    /// A disk that leaves its stream.
    pub leaves: Vec<(StreamId, DiskId, oneshot::Sender<()>)>,
}

/// Who waits for a cut.
pub struct CutWaiter {
    /// Of this stream.
    pub stream: StreamId,
    /// With this label.
    pub label: String,
    /// Gets its number and its record.
    pub taken: oneshot::Sender<(u64, u64)>,
}

/// Where the streams of a source went when it was last told, `host:port`; nothing where that cannot be read.
pub fn known_targets(dir: &std::path::Path) -> std::collections::BTreeSet<String> {
    let kept = std::fs::read(dir.join(DESIRED_FILE)).ok().and_then(|bytes| DesiredState::decode(&bytes[..]).ok());
    let sources = kept.map(|kept| kept.sources).unwrap_or_default();
    sources.into_iter().map(|group| group.target_address).filter(|address| !address.is_empty()).collect()
}

impl Proxy {
    /// A proxy that has applied nothing yet.
    pub fn new(config: Config, source: Option<Handle<SourceCore>>, target: Option<Handle<TargetCore>>) -> Self {
        Self {
            config,
            source,
            target,
            site: None,
            identity: RefCell::default(),
            desired: RefCell::default(),
            term: Cell::new(0),
            applied: RefCell::default(),
            problems: RefCell::default(),
            linked: RefCell::default(),
            unrenewed: RefCell::default(),
            events: RefCell::default(),
            waiters: RefCell::default(),
            local: RefCell::default(),
            in_session: Cell::new(false),
            ublk: super::ublk::Devices::default(),
            machines: super::machines::Turns::default(),
            scripts: super::machines::script::Ran::default(),
            changed: Notify::new(),
            told: Notify::new(),
            offers: watch::Sender::new(()),
        }
    }

    /// Notes something for the next report, and logs it.
    pub fn event(&self, severity: Severity, stream: Option<StreamId>, kind: &str, message: String) {
        let stream_uid = stream.map(|s| s.to_string()).unwrap_or_default();
        match severity {
            Severity::Error => tracing::error!(stream = %stream_uid, kind, "{message}"),
            Severity::Warning => tracing::warn!(stream = %stream_uid, kind, "{message}"),
            Severity::Info | Severity::Unspecified => tracing::info!(stream = %stream_uid, kind, "{message}"),
        }
        let mut events = self.events.borrow_mut();
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        events.push_back(ProxyEvent { severity: severity.into(), stream_uid, kind: kind.to_owned(), message, time_ns });
    }

    /// Takes over a desired state, durably first. One that is older than what has been seen is refused.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn set_desired(&self, mut desired: DesiredState) -> Result<(), StateError> {
        self.see_term(desired.term)?;
        let have = self.desired.borrow().version;
        if desired.version < have {
            return Err(StateError::Version { have, got: desired.version });
        }
        let taken_in = super::local::amend(&mut desired, &self.local.borrow());
        self.keep_state(&desired)?;
        *self.desired.borrow_mut() = desired;
        taken_in.iter().for_each(|stream| self.forget_decision(stream));
        self.changed.notify_one();
        self.told.notify_one();
        Ok(())
    }

    /// Whether a key was revoked.
    pub fn is_revoked(&self, pin: &[u8]) -> bool {
        self.desired.borrow().revoked_key_pins.iter().any(|revoked| revoked == pin)
    }

    /// Keeps what is desired after a command has changed it.
    ///
    /// # Errors
    /// The file system's.
    pub fn keep_desired(&self) -> Result<(), StateError> {
        self.keep_state(&self.desired.borrow())
    }

    fn keep_state(&self, desired: &DesiredState) -> Result<(), StateError> {
        let bytes = match &self.site {
            Some(site) => site.sealed(desired).encode_to_vec(),
            None => desired.encode_to_vec(),
        };
        self.keep(DESIRED_FILE, &bytes)
    }

    /// Refuses a term below the highest seen; remembers a higher one.
    ///
    /// # Errors
    /// [`StateError::Term`], or the file system's.
    pub fn see_term(&self, term: u64) -> Result<(), StateError> {
        let have = self.term.get();
        if term < have {
            return Err(StateError::Term { have, got: term });
        }
        if term > have {
            self.keep(TERM_FILE, term.to_string().as_bytes())?;
            self.term.set(term);
        }
        Ok(())
    }

    /// What an earlier start has kept.
    ///
    /// # Errors
    /// A file is there but makes no sense: it is not silently replaced.
    pub fn recall(&self) -> Result<(), StateError> {
        if let Some(bytes) = self.kept(TERM_FILE)? {
            let text = String::from_utf8_lossy(&bytes);
            let term = text.trim().parse().map_err(|_| self.damaged(TERM_FILE, "it is no number"))?;
            self.term.set(term);
        }
        if let Some(bytes) = self.kept(DESIRED_FILE)? {
            let mut desired =
                DesiredState::decode(&bytes[..]).map_err(|error| self.damaged(DESIRED_FILE, &error.to_string()))?;
            if let Some(site) = &self.site
                && site.opened(&mut desired)?
            {
                // As an earlier version has kept it: in plain.
                self.keep_state(&desired)?;
            }
            *self.desired.borrow_mut() = desired;
            self.changed.notify_one();
        }
        Ok(())
    }

    /// The stream is of a view that is captured here, so its source is in the target's thread.
    pub fn captures(&self, stream: StreamId) -> bool {
        let uid = stream.to_string();
        let desired = self.desired.borrow();
        let applied = self.applied.borrow();
        let mut known = desired.sources.iter().chain(applied.groups.get(&stream));
        known.any(|group| group.stream_uid == uid && convert::is_of_views(group))
    }

    /// Runs `job` with the source that a stream is of, in its thread. None: this proxy has no such role.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn at_source<R: Send + 'static>(
        &self,
        stream: StreamId,
        job: impl FnOnce(&mut SourceCore, &mut ThreadIo) -> R + Send + 'static,
    ) -> Result<Option<R>, Gone> {
        match (&self.source, &self.target) {
            (_, Some(target)) if self.captures(stream) => {
                target.call(move |desk| job(&mut desk.core.source, desk.io)).await.map(Some)
            }
            (Some(source), _) => source.call(move |desk| job(desk.core, desk.io)).await.map(Some),
            _ => Ok(None),
        }
    }

    /// Whose proxy this is.
    pub fn tenant(&self) -> String {
        let bundle = self.config.state_dir.as_ref().and_then(|dir| Bundle::load(&dir.join(super::BUNDLE_FILE)).ok());
        bundle.map_or_else(|| DEFAULT_TENANT.to_owned(), |bundle| bundle.tenant)
    }

    /// Where write-intent logs and their witnesses of a group stand; without a state folder beside the disks.
    pub fn places_of(&self, group: &SourceGroup) -> Places {
        match &self.config.target {
            Some(role) if convert::is_of_views(group) => {
                Places { intent: Some(cores::outbound(role)), ..self.places() }
            }
            _ => self.places(),
        }
    }

    fn places(&self) -> Places {
        let within = |name| self.config.state_dir.as_ref().map(|dir| dir.join(name));
        let told = self.config.source.as_ref().and_then(|role| role.witness.clone());
        Places { intent: within("intent"), witness: told.or_else(|| within("witness")) }
    }

    fn keep(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let Some(dir) = &self.config.state_dir else { return Ok(()) };
        let path = dir.join(name);
        keep::replace(&path, bytes).map_err(|source| StateError::File { path, source })
    }

    fn kept(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let Some(dir) = &self.config.state_dir else { return Ok(None) };
        let path = dir.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::File { path, source }),
        }
    }

    fn damaged(&self, name: &str, what: &str) -> StateError {
        let path = self.config.state_dir.clone().unwrap_or_default().join(name);
        StateError::Content { path, what: what.to_owned() }
    }
}

/// Why a desired state is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An older coordinator.
    #[error("term {got} is older than {have}, which has been seen")]
    Term {
        /// Seen.
        have: u64,
        /// Said.
        got: u64,
    },
    /// An older version.
    #[error("desired state {got} is older than {have}, which has been seen")]
    Version {
        /// Seen.
        have: u64,
        /// Said.
        got: u64,
    },
    /// A key in it does not open.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what we wrote.
    #[error("{}: {what}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

#[cfg(test)]
mod tests {
    use afterimage_controlplane::wrapping::KeysConfig;

    use super::*;
    use crate::proxy::config::{Control, LogFormat};

    fn proxy(dir: &std::path::Path) -> Proxy {
        let config = Config {
            name: "p".into(),
            state_dir: Some(dir.to_owned()),
            control: Control::Serve(Vec::new()),
            source: None,
            target: None,
            log: LogFormat::Text,
            site: String::new(),
            machines: Default::default(),
            keys: KeysConfig::default(),
        };
        Proxy::new(config, None, None)
    }

    #[test]
    fn the_last_desired_state_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        proxy(dir.path()).set_desired(DesiredState { term: 3, version: 7, ..DesiredState::default() }).unwrap();
        let again = proxy(dir.path());
        again.recall().unwrap();
        assert_eq!((again.desired.borrow().version, again.term.get()), (7, 3));
    }

    #[test]
    fn an_older_term_or_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let proxy = proxy(dir.path());
        let said = |term, version| DesiredState { term, version, ..DesiredState::default() };
        proxy.set_desired(said(3, 7)).unwrap();
        assert!(matches!(proxy.set_desired(said(2, 8)), Err(StateError::Term { have: 3, got: 2 })));
        assert!(matches!(proxy.set_desired(said(3, 6)), Err(StateError::Version { have: 7, got: 6 })));
        assert_eq!(proxy.desired.borrow().version, 7);
    }

    #[test]
    fn a_damaged_state_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(TERM_FILE), "many").unwrap();
        assert!(proxy(dir.path()).recall().unwrap_err().to_string().contains("term: it is no number"));
    }

    #[test]
    fn old_events_give_way() {
        let dir = tempfile::tempdir().unwrap();
        let proxy = proxy(dir.path());
        for n in 0..=MAX_EVENTS {
            proxy.event(Severity::Info, None, "test", n.to_string());
        }
        assert_eq!(proxy.events.borrow().len(), MAX_EVENTS);
        assert_eq!(proxy.events.borrow()[0].message, "1");
    }
}
