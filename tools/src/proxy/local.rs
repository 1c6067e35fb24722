//! A failover with nobody to ask: coordinator and source are gone, and the target decides.
//!
//! ```text
//!  decision (durable, beside the journal) ─▶ raise-generation ─▶ open-view ─▶ start machines
//!     │ from here on                                                     any of it is repeated by asking again
//!     ├─ streams of the old source are refused, whatever generation they claim
//!     ├─ the view is part of what should be, whatever an older desired state says
//!     └─ told at each registration, until a desired state names the view: then the decision has been taken in, and its file goes
//! ```
//! Once decided it is not taken back here: what a failure leaves undone is done by asking again, or by the coordinator.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use afterimage_controlplane::objects::proxy_view_name;
use afterimage_wire::ids::StreamId;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{
    CommandError, CommandErrorKind as Kind, DesiredState, LocalFailover, LocalFailoverAnswer, LocalFailoverRequest,
    LocalMachine, MachineDisk, MachinePower, OpenView, RaiseGeneration, ResolvePoint, Severity, StartInstance,
    TargetStream, ViewExport, ViewKind,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use uuid::Uuid;

use super::commands::{self, Refused, refused};
use super::keep;
use super::machines;
use super::site::keys_path;
use super::state::{Proxy, StateError};

/// File of a decision, beside the journal.
const FILE: &str = "failover";
/// Socket in the state folder over which a proxy is asked.
pub const SOCKET: &str = "local.sock";
/// Longest message over it, bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// How long a client may take to say what it wants.
const REQUEST_WAIT: Duration = Duration::from_secs(5);
/// How long a stream that is still being recovered is waited for.
const RECOVERY_WAIT: Duration = Duration::from_secs(20);
/// Pause before what could not be raised is tried again: its stream is being recovered.
const RAISE_AGAIN: Duration = Duration::from_millis(100);

/// The file of a decision.
fn file(journal: &Path, stream_uid: &str) -> Option<PathBuf> {
    let stream: StreamId = stream_uid.parse().ok()?;
    Some(keys_path(journal, stream).with_file_name(FILE))
}

/// The decisions of a journal that nobody has taken in yet.
///
/// # Errors
/// One cannot be read, or is none: nothing may be let in then, since nobody knows what it was about.
pub fn kept(journal: &Path) -> Result<Vec<LocalFailover>, StateError> {
    let streams = journal.join("streams");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StateError::File { path, source }
    };
    let entries = match std::fs::read_dir(&streams) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(&streams)(error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let folder = entry.map_err(failed(&streams))?;
        let path = folder.path().join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            Err(error) => return Err(failed(&path)(error)),
        };
        let senseless = |what: &str| StateError::Content { path: path.clone(), what: what.to_owned() };
        let found = LocalFailover::decode(&bytes[..]).map_err(|error| senseless(&error.to_string()))?;
        let named = *folder.file_name() == *found.stream_uid;
        if !named || found.view.is_empty() || found.generation == 0 || found.point.is_none() {
            return Err(senseless("it is no decision of a failover of this stream"));
        }
        all.push(found);
    }
    Ok(all)
}

/// What should be, with what was decided here: each view and generation. The decisions that it names already.
pub fn amend(desired: &mut DesiredState, decisions: &[LocalFailover]) -> Vec<String> {
    let mut named = Vec::new();
    for decision in decisions {
        let of = |stream: &&mut TargetStream| stream.stream_uid == decision.stream_uid;
        let Some(stream) = desired.targets.iter_mut().find(of) else { continue };
        if stream.views.iter().any(|view| view.view == decision.view) {
            named.push(decision.stream_uid.clone());
            continue;
        }
        stream.views.push(view_of(decision));
        stream.disks.iter_mut().for_each(|disk| disk.generation = disk.generation.max(decision.generation));
    }
    named
}

fn view_of(decision: &LocalFailover) -> OpenView {
    let point = decision.point.clone().unwrap_or_default();
    OpenView {
        stream_uid: decision.stream_uid.clone(),
        view: decision.view.clone(),
        seq: point.seq,
        disk_uids: point.disks,
        writable: true,
        kind: ViewKind::Failover.into(),
        reason: decision.reason.clone(),
    }
}

impl Proxy {
    /// The decision about this stream that nobody has taken in yet.
    pub fn decided(&self, stream_uid: &str) -> Option<LocalFailover> {
        self.local.borrow().iter().find(|decision| decision.stream_uid == stream_uid).cloned()
    }

    /// Finds what an earlier start has decided.
    ///
    /// # Errors
    /// See [`kept`].
    pub fn recall_decisions(&self) -> Result<(), StateError> {
        let Some(role) = &self.config.target else { return Ok(()) };
        *self.local.borrow_mut() = kept(&role.journal)?;
        amend(&mut self.desired.borrow_mut(), &self.local.borrow());
        Ok(())
    }

    /// It is known elsewhere, or its view has been closed: it needs no telling any more.
    pub fn forget_decision(&self, stream_uid: &str) {
        self.local.borrow_mut().retain(|decision| decision.stream_uid != stream_uid);
        let path = self.config.target.as_ref().and_then(|role| file(&role.journal, stream_uid));
        let removed = path.map_or(Ok(()), |path| match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        });
        if let Err(error) = removed {
            // Told again at the next start, and known by its uid.
            tracing::warn!(%error, stream = stream_uid, "the decision of a failover is not removed");
        }
    }

    fn keep_decision(&self, decision: &LocalFailover) -> Result<(), Refused> {
        let journal = self.config.target.as_ref().map(|role| role.journal.clone()).unwrap_or_default();
        let io = |error: io::Error| Refused(Kind::Io, format!("the decision is not kept: {error}"));
        let path = file(&journal, &decision.stream_uid).ok_or(Refused(Kind::Invalid, "no stream".to_owned()))?;
        keep::replace(&path, &decision.encode_to_vec()).map_err(io)?;
        let mut local = self.local.borrow_mut();
        local.retain(|known| known.stream_uid != decision.stream_uid);
        local.push(decision.clone());
        Ok(())
    }
}

/// Takes the disks of what was decided before this start from their writer. Meanwhile that is refused.
pub async fn resume(proxy: Rc<Proxy>) {
    let decisions = proxy.local.borrow().clone();
    for decision in decisions {
        proxy.event(
            Severity::Warning,
            decision.stream_uid.parse().ok(),
            "failover",
            format!("runs from \"{}\", as was decided here without a coordinator", decision.view),
        );
        while let Err(Refused(_, why)) = raise(&proxy, &decision).await {
            tracing::debug!(why, "the generation is not raised yet");
            tokio::time::sleep(RAISE_AGAIN).await;
            if proxy.decided(&decision.stream_uid).is_none() {
                break;
            }
        }
    }
}

async fn raise(proxy: &Proxy, decision: &LocalFailover) -> Result<bool, Refused> {
    let raise = RaiseGeneration {
        stream_uid: decision.stream_uid.clone(),
        disk_uids: Vec::new(),
        reason: "failover without a coordinator".to_owned(),
        at_least: decision.generation,
    };
    match commands::raise_generation(proxy, raise).await? {
        Outcome::Generation(raised) => Ok(raised.zero_loss),
        _ => Ok(false),
    }
}

/// Which stream is meant.
fn meant(proxy: &Proxy, group: &str) -> Result<TargetStream, Refused> {
    let desired = proxy.desired.borrow();
    let forth = |stream: &&TargetStream| stream.disks.iter().all(|disk| disk.base_path.is_empty());
    let fits = |stream: &&TargetStream| stream.name == group || stream.stream_uid == group;
    let mut found = desired.targets.iter().filter(forth).filter(fits);
    match (found.next(), found.next()) {
        (Some(stream), None) => Ok(stream.clone()),
        (Some(_), Some(_)) => {
            refused(Kind::Invalid, format!("several groups are called `{group}`: say a stream's uid"))
        }
        (None, _) => {
            let all = desired.targets.iter().filter(forth).map(|s| format!("{} ({})", s.name, s.stream_uid));
            let all = all.collect::<Vec<_>>().join(", ");
            refused(Kind::NotFound, format!("`{group}` is not kept here; there are: {all}"))
        }
    }
}

/// Fails a group over, or goes on with that.
///
/// # Errors
/// It does not fit, and nothing has been decided; or what of it is not done, which asking again does.
pub async fn fail_over(proxy: &Proxy, wish: &LocalFailoverRequest) -> Result<LocalFailoverAnswer, Refused> {
    let stream = meant(proxy, &wish.group)?;
    let before = proxy.decided(&stream.stream_uid);
    let repeated = before.is_some();
    let mut decision = match before {
        Some(decision) => decision,
        None => decide(proxy, wish, &stream).await?,
    };
    amend(&mut proxy.desired.borrow_mut(), std::slice::from_ref(&decision));
    if let Err(error) = proxy.keep_desired() {
        // The decision itself is kept.
        tracing::warn!(%error, "the view is not remembered beside the decision");
    }
    let end = tokio::time::Instant::now() + RECOVERY_WAIT;
    let zero_loss = loop {
        match raise(proxy, &decision).await {
            // A target that has just started.
            Err(Refused(Kind::WrongState, _)) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(RAISE_AGAIN).await;
            }
            other => break other?,
        }
    };
    if zero_loss && !decision.zero_loss {
        decision.zero_loss = true;
        proxy.keep_decision(&decision)?;
    }
    let Outcome::View(opened) = commands::open_view(proxy, &view_of(&decision)).await? else {
        return refused(Kind::Io, "the view is not open");
    };
    let machines = start(proxy, &stream.machines, &opened.exports, &mut decision).await?;
    Ok(LocalFailoverAnswer { error: None, decision: Some(decision), exports: opened.exports, machines, repeated })
}

/// Where there is a coordinator, it decides.
fn may_decide(proxy: &Proxy, stream: &TargetStream) -> Result<(), Refused> {
    if !proxy.in_session.get() {
        return Ok(());
    }
    let how = format!("use `afterimage failover start {}`", stream.name);
    refused(Kind::WrongState, format!("this proxy is connected to its coordinator, which decides: {how}"))
}

async fn decide(proxy: &Proxy, wish: &LocalFailoverRequest, stream: &TargetStream) -> Result<LocalFailover, Refused> {
    may_decide(proxy, stream)?;
    let runs_from = stream.views.iter().find(|view| view.kind() == ViewKind::Failover && view.writable);
    if let Some(view) = runs_from {
        let message = format!("`{}` is failed over already, and runs from the view \"{}\"", stream.name, view.view);
        return refused(Kind::WrongState, message);
    }
    let resolve = ResolvePoint { stream_uid: stream.stream_uid.clone(), at: wish.at };
    let Outcome::Point(point) = commands::resolve_point(proxy, &resolve).await? else {
        return refused(Kind::NotFound, "there is no such point");
    };
    if !point.damage.is_empty() {
        return refused(Kind::WrongState, format!("the point {} is damaged: {}", point.seq, point.damage));
    }
    let lacks = stream.disks.iter().filter(|disk| !point.disks.contains(&disk.uid)).map(|disk| disk.name.as_str());
    let lacks = lacks.collect::<Vec<_>>().join(", ");
    if !lacks.is_empty() {
        let message =
            format!("the point {} does not hold {lacks}: being synchronised there; choose another", point.seq);
        return refused(Kind::WrongState, message);
    }
    let id: StreamId = super::convert::id("stream_uid", &stream.stream_uid)?;
    let generations = commands::target(proxy)?.call(move |desk| {
        let status = desk.core.status();
        let disks = status.into_iter().find(|s| s.stream == id).map(|s| s.disks).unwrap_or_default();
        disks.into_iter().map(|disk| disk.generation).max()
    });
    let told = stream.disks.iter().map(|disk| disk.generation).max().unwrap_or(0);
    let generation = generations.await?.unwrap_or(0).max(told) + 1;
    let uid = Uuid::new_v4().to_string();
    let short: String = uid.chars().take(8).collect();
    let decision = LocalFailover {
        view: proxy_view_name(&proxy.tenant(), &stream.name, &format!("local-{short}")),
        uid,
        stream_uid: stream.stream_uid.clone(),
        point: Some(point),
        generation,
        reason: wish.reason.chars().take(200).collect(),
        decided_by: wish.decided_by.chars().take(100).collect(),
        decide_time_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
        machines: Vec::new(),
        zero_loss: false,
    };
    // Nothing is waited for between this and the decision.
    may_decide(proxy, stream)?;
    proxy.keep_decision(&decision)?;
    let who = &decision.decided_by;
    let message = format!("failed over here by {who}, without a coordinator; it runs from \"{}\"", decision.view);
    proxy.event(Severity::Warning, Some(id), "failover", message);
    Ok(decision)
}

/// Starts the machines, each noted before it is told. One that does not start takes nothing back: it is told again by asking
/// again.
async fn start(
    proxy: &Proxy,
    machines: &[StartInstance],
    exports: &[ViewExport],
    decision: &mut LocalFailover,
) -> Result<Vec<LocalMachine>, Refused> {
    let mut came = Vec::new();
    for machine in machines {
        let name = machine.machine.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        if !decision.machines.contains(&name) {
            decision.machines.push(name.clone());
            proxy.keep_decision(decision)?;
        }
        let disk = |disk: &MachineDisk| {
            let export = exports.iter().find(|export| export.disk_uid == disk.uid)?;
            let (export_name, uris) = (export.export_name.clone(), export.uris.clone());
            Some(MachineDisk { export_name, uris, size_bytes: export.size_bytes, ..disk.clone() })
        };
        let said = StartInstance { disks: machine.disks.iter().filter_map(disk).collect(), ..machine.clone() };
        let (state, trouble) = match machines::start(proxy, said).await {
            Ok(Outcome::Machine(state)) if state.power() == MachinePower::On => (Some(state), String::new()),
            Ok(Outcome::Machine(state)) => {
                let why = format!("it is not on: {}", state.detail);
                (Some(state), why)
            }
            Ok(_) => (None, "its driver's answer makes no sense".to_owned()),
            Err(Refused(_, why)) => (None, why),
        };
        came.push(LocalMachine { name, state, trouble });
    }
    Ok(came)
}

/// Refuses a view that a coordinator of before the decision still wants to run the group from.
pub fn may_open(proxy: &Proxy, said: &OpenView) -> Result<(), Refused> {
    match proxy.decided(&said.stream_uid) {
        Some(decision) if said.kind() == ViewKind::Failover && said.view != decision.view => {
            let message = format!("the group has been failed over here, and runs from the view \"{}\"", decision.view);
            refused(Kind::WrongState, message)
        }
        _ => Ok(()),
    }
}

/// Answers whoever may open the socket, one after the other.
pub async fn serve(proxy: Rc<Proxy>, listener: UnixListener) {
    loop {
        let asked = match listener.accept().await {
            Ok((stream, _)) => answer(&proxy, stream).await,
            Err(error) => Err(error),
        };
        if let Err(error) = asked {
            tracing::warn!(%error, "what was asked over the local socket is not answered");
            tokio::time::sleep(RAISE_AGAIN).await;
        }
    }
}

async fn answer(proxy: &Proxy, mut stream: UnixStream) -> io::Result<()> {
    let request = tokio::time::timeout(REQUEST_WAIT, async {
        let length = stream.read_u32_le().await? as usize;
        if length > MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).await?;
        LocalFailoverRequest::decode(&bytes[..]).map_err(io::Error::other)
    });
    let request = request.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let answer = fail_over(proxy, &request).await.unwrap_or_else(|Refused(kind, message)| {
        tracing::warn!(?kind, "failover without a coordinator refused: {message}");
        LocalFailoverAnswer { error: Some(CommandError { kind: kind.into(), message }), ..Default::default() }
    });
    proxy.offers.send_replace(());
    let bytes = answer.encode_to_vec();
    stream.write_u32_le(bytes.len() as u32).await?;
    stream.write_all(&bytes).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use afterimage_wire::v1::{Point, TargetDisk};

    use super::*;

    fn decision(stream: StreamId) -> LocalFailover {
        LocalFailover {
            uid: "3c0e5f0a".into(),
            stream_uid: stream.to_string(),
            view: "shop.local-3c0e5f0a".into(),
            point: Some(Point { seq: 70, disks: vec!["d1".into()], ..Point::default() }),
            generation: 5,
            ..LocalFailover::default()
        }
    }

    fn desired(stream: StreamId, views: Vec<OpenView>) -> DesiredState {
        let disk = |generation| TargetDisk { generation, ..TargetDisk::default() };
        let disks = vec![disk(4), disk(7)];
        let target = TargetStream { stream_uid: stream.to_string(), views, disks, ..TargetStream::default() };
        DesiredState { targets: vec![target], ..DesiredState::default() }
    }

    #[test]
    fn what_was_decided_is_part_of_what_should_be_until_that_names_it() {
        let stream = StreamId::random();
        let other = OpenView { view: "shop.look".into(), ..OpenView::default() };
        let mut said = desired(stream, vec![other]);
        assert!(amend(&mut said, &[decision(stream), decision(StreamId::random())]).is_empty());
        let views: Vec<_> = said.targets[0].views.iter().map(|v| (v.view.as_str(), v.seq, v.writable)).collect();
        assert_eq!(views, [("shop.look", 0, false), ("shop.local-3c0e5f0a", 70, true)]);
        assert_eq!(said.targets[0].disks.iter().map(|d| d.generation).collect::<Vec<_>>(), [5, 7]);
        // Now it does, and nothing comes twice.
        assert_eq!(amend(&mut said, &[decision(stream)]), [stream.to_string()]);
        assert_eq!(said.targets[0].views.len(), 2);
    }

    #[test]
    fn a_decision_is_found_again_and_what_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(kept(dir.path()).unwrap().is_empty());
        let (one, other) = (StreamId::random(), StreamId::random());
        for stream in [one, other] {
            std::fs::create_dir_all(dir.path().join("streams").join(stream.to_string())).unwrap();
        }
        let at = file(dir.path(), &one.to_string()).unwrap();
        keep::replace(&at, &decision(one).encode_to_vec()).unwrap();
        assert_eq!(kept(dir.path()).unwrap(), [decision(one)]);
        // Copied beside another journal, or torn: nobody knows what it was about.
        for bytes in [decision(other).encode_to_vec(), b"torn".to_vec(), Vec::new()] {
            std::fs::write(&at, bytes).unwrap();
            assert!(kept(dir.path()).unwrap_err().to_string().contains("/failover: "));
        }
    }
}
