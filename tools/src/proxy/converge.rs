//! Brings the cores to the desired state, and keeps trying. What the state no longer names is left as it is: nothing is
//! dropped, closed or stopped from here, except for a hold.

use std::rc::Rc;
use std::time::Duration;

use afterimage_dataplane::source::{DiskConfig, ProtectError};
use afterimage_dataplane::target::{Choice, PointError, TargetError};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::v1::{DesiredState, OpenView, Problem, Severity, SourceDisk, SourceGroup, TargetStream};

use super::config::Serve;
use super::convert;
use super::cores::SourceCore;
use super::keep;
use super::runtime::{Gone, Handle};
use super::site;
use super::state::{Proxy, View};

/// Time between two tries of what could not be done.
const RETRY: Duration = Duration::from_millis(500);
/// How long a disk that is locked is waited for: a dead process holds its locks until its last I/O has ended.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// Time between two looks at such a lock: hosts wait meanwhile.
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// Time between two looks at the clock, for hours that begin or end.
const LOOK_AT_HOURS: Duration = Duration::from_secs(1);
/// How long a group may take to stop before it is started anew with other disks or generations.
pub const STOP_WAIT: Duration = Duration::from_secs(10);

/// Why a part of the desired state is not done.
#[derive(Debug, thiserror::Error)]
enum Undone {
    /// For the report.
    #[error("{0}")]
    Problem(String),
    /// A disk is locked, by another process or by the last I/O of one that has ended.
    #[error("{0}")]
    Locked(String),
    #[error(transparent)]
    Gone(#[from] Gone),
}

fn problem(error: impl std::fmt::Display) -> Undone {
    Undone::Problem(error.to_string())
}

/// Runs as long as the data threads do.
pub async fn run(proxy: Rc<Proxy>) -> Gone {
    loop {
        match once(&proxy).await {
            Err(gone) => return gone,
            Ok(_) if super::ublk::converge(&proxy).await.is_err() => return Gone,
            Ok(_) if proxy.problems.borrow().is_empty() => {
                // Hours begin and end by the clock, which may also be set.
                let hours = proxy.desired.borrow().sources.iter().any(|group| !group.allowed_hours.is_empty());
                let wait = if hours { LOOK_AT_HOURS } else { Duration::MAX };
                let _ = tokio::time::timeout(wait, proxy.changed.notified()).await;
            }
            Ok(_) => {
                let _ = tokio::time::timeout(RETRY, proxy.changed.notified()).await;
            }
        }
    }
}

/// The first tries after a start: a process that was killed a moment ago may still hold the locks of its disks, and hosts
/// that come back at once should find them.
///
/// # Errors
/// [`Gone`].
pub async fn begin(proxy: &Proxy) -> Result<(), Gone> {
    let end = tokio::time::Instant::now() + LOCK_WAIT;
    while once(proxy).await? && tokio::time::Instant::now() < end {
        tokio::time::sleep(LOCK_RETRY).await;
    }
    Ok(())
}

/// One try. What cannot be done is in [`Proxy::problems`] afterwards; true if a disk of it is locked.
///
/// # Errors
/// [`Gone`].
async fn once(proxy: &Proxy) -> Result<bool, Gone> {
    super::streams::part(proxy).await?;
    let desired = proxy.desired.borrow().clone();
    let mut problems = Vec::new();
    let mut locked = false;
    let mut note = |uid: &str, result: Result<(), Undone>| match result {
        Ok(()) => Ok(()),
        Err(Undone::Gone(gone)) => Err(gone),
        Err(undone @ (Undone::Problem(_) | Undone::Locked(_))) => {
            locked |= matches!(undone, Undone::Locked(_));
            let message = undone.to_string();
            problems.push(Problem { stream_uid: uid.to_owned(), disk_uid: String::new(), message });
            Ok(())
        }
    };
    keep_back(proxy, &desired).await?;
    for group in desired.sources.iter().filter(|group| !convert::is_of_views(group)) {
        note(&group.stream_uid, converge_group(proxy, group).await)?;
    }
    for stream in &desired.targets {
        note(&stream.stream_uid, converge_stream(proxy, stream).await)?;
        for view in &stream.views {
            note(&stream.stream_uid, reopen(proxy, view).await)?;
        }
    }
    // Once the views are open.
    for group in desired.sources.iter().filter(|group| convert::is_of_views(group)) {
        note(&group.stream_uid, converge_group(proxy, group).await)?;
    }
    let known: Vec<String> = proxy.problems.borrow().iter().map(|p| p.message.clone()).collect();
    for problem in problems.iter().filter(|p| !known.contains(&p.message)) {
        proxy.event(Severity::Warning, problem.stream_uid.parse().ok(), "converge", problem.message.clone());
    }
    *proxy.problems.borrow_mut() = problems;
    proxy.offers.send_replace(());
    Ok(locked)
}

/// Views that are to be captured are offered to hosts only when they are.
async fn keep_back(proxy: &Proxy, desired: &DesiredState) -> Result<(), Gone> {
    let Some(target) = &proxy.target else { return Ok(()) };
    let disks = desired.sources.iter().flat_map(|group| &group.disks);
    let views: Vec<String> = disks.filter(|disk| !disk.view.is_empty()).map(|disk| disk.view.clone()).collect();
    target.call(move |desk| desk.core.keep_back(views)).await
}

/// Why a disk of `--serve` is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The core does not take it.
    #[error("--serve {name}: {error}")]
    Refused {
        /// The disk.
        name: String,
        /// Why.
        error: ProtectError,
    },
    /// No core.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Serves a disk without protection. A lock that the last I/O of a dead process still holds is waited for.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(source: &Handle<SourceCore>, disk: &Serve) -> Result<(), ServeError> {
    let id = DiskId::random();
    let config = DiskConfig {
        id,
        name: disk.name.clone(),
        path: disk.path.to_string_lossy().into_owned(),
        serial: id.to_string().chars().filter(|c| *c != '-').take(20).collect(),
        ..DiskConfig::default()
    };
    let end = tokio::time::Instant::now() + LOCK_WAIT;
    loop {
        let config = config.clone();
        match source.call(move |desk| desk.core.serve(desk.io, config)).await? {
            Ok(_) => break,
            Err(ProtectError::Locked { .. }) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(LOCK_RETRY).await;
            }
            Err(error) => return Err(ServeError::Refused { name: disk.name.clone(), error }),
        }
    }
    tracing::info!(name = disk.name, path = %disk.path.display(), "serving, unprotected");
    Ok(())
}

/// What of a group cannot be changed while it runs.
fn disks_differ(a: &SourceGroup, b: &SourceGroup) -> bool {
    let without_generations = |group: &SourceGroup| {
        group.disks.iter().map(|disk| SourceDisk { generation: 0, ..disk.clone() }).collect::<Vec<_>>()
    };
    without_generations(a) != without_generations(b)
}

/// Generations that have risen.
fn raised(was: &SourceGroup, group: &SourceGroup) -> Vec<(DiskId, u64)> {
    let before = |uid: &str| was.disks.iter().find(|disk| disk.uid == uid).map_or(0, |disk| disk.generation);
    let risen = group.disks.iter().filter(|disk| disk.generation > before(&disk.uid));
    risen.filter_map(|disk| Some((disk.uid.parse().ok()?, disk.generation))).collect()
}

async fn converge_group(proxy: &Proxy, group: &SourceGroup) -> Result<(), Undone> {
    converge_disks(proxy, group).await?;
    converge_pace(proxy, group).await
}

/// When frames of a group may leave: by its policy, and by the clock.
async fn converge_pace(proxy: &Proxy, group: &SourceGroup) -> Result<(), Undone> {
    let pace = convert::pace(group, jiff::Timestamp::now()).map_err(problem)?;
    let stream: StreamId = convert::id("stream_uid", &group.stream_uid).map_err(problem)?;
    let was = proxy.applied.borrow().paces.get(&stream).copied().unwrap_or_default();
    if was == pace || !proxy.applied.borrow().groups.contains_key(&stream) {
        return Ok(());
    }
    let set = proxy.at_source(stream, move |source, io| source.set_pace(io, stream, pace)).await?;
    set.unwrap_or(Ok(())).map_err(problem)?;
    proxy.applied.borrow_mut().paces.insert(stream, pace);
    if was.paused != pace.paused {
        let message = if pace.paused { "paused: nothing is sent from now on" } else { "resumed: it is sent again" };
        proxy.event(Severity::Info, Some(stream), "pause", message.to_owned());
    }
    if was.closed != pace.closed {
        let message = if pace.closed { "nothing is sent from now on" } else { "it is sent again" };
        proxy.event(Severity::Info, Some(stream), "hours", format!("by the hours of its policy {message}"));
    }
    Ok(())
}

async fn converge_disks(proxy: &Proxy, group: &SourceGroup) -> Result<(), Undone> {
    let captures = convert::is_of_views(group);
    if proxy.source.is_none() && !captures {
        return Err(problem("this proxy has no source role: `source.nbd` is not set"));
    }
    if proxy.target.is_none() && captures {
        return Err(problem("this proxy has no target role, so no views: `target.journal` is not set"));
    }
    let places = proxy.places_of(group);
    let trust_reboot = proxy.config.source.as_ref().is_some_and(|role| role.trust_reboot);
    let config = convert::group(group, &places, trust_reboot).map_err(problem)?;
    let stream = config.stream;
    let running = proxy.applied.borrow().groups.get(&stream).cloned();
    match running {
        // A failover has taken it from here: it is not started.
        None if group.hold => Ok(()),
        None => {
            for dir in [&places.intent, &places.witness].into_iter().flatten() {
                keep::folder(dir).map_err(|e| problem(format!("{}: {e}", dir.display())))?;
            }
            let pace = convert::pace(group, jiff::Timestamp::now()).map_err(problem)?;
            let protected = match (&proxy.source, &proxy.target) {
                (_, Some(target)) if captures => {
                    let capture = target.call(move |desk| {
                        desk.core.capture(desk.io, config)?;
                        desk.core.source.set_pace(desk.io, stream, pace)
                    });
                    capture.await?
                }
                (Some(source), _) => {
                    let protect = source.call(move |desk| {
                        desk.core.protect(desk.io, config)?;
                        // Before the first frame could leave.
                        desk.core.set_pace(desk.io, stream, pace)
                    });
                    protect.await?
                }
                _ => return Ok(()),
            };
            protected.map_err(|error| match error {
                ProtectError::Locked { .. } => Undone::Locked(error.to_string()),
                error => problem(error),
            })?;
            proxy.event(
                Severity::Info,
                Some(stream),
                "group",
                format!("group `{}` is protected from here", group.name),
            );
            proxy.applied.borrow_mut().groups.insert(stream, group.clone());
            proxy.applied.borrow_mut().paces.insert(stream, pace);
            Ok(())
        }
        Some(was) if disks_differ(&was, group) && !group.hold => {
            // The core takes disks at a start only; a clean stop before it costs no whole compare.
            stop_group(proxy, stream).await?;
            proxy.event(Severity::Info, Some(stream), "group", format!("group `{}` starts anew, changed", group.name));
            proxy.changed.notify_one();
            Ok(())
        }
        Some(was) => {
            if was.hold != group.hold {
                let hold = group.hold;
                proxy.at_source(stream, move |source, io| source.fence(io, stream, hold)).await?;
            }
            let generations = raised(&was, group);
            if !generations.is_empty() && !group.hold {
                proxy.at_source(stream, move |source, io| source.set_generations(io, stream, &generations)).await?;
            }
            if was.lease_ms != group.lease_ms || was.sync_deadline_ms != group.sync_deadline_ms {
                let (lease, deadline) = (config.lease, config.sync_deadline);
                let changed =
                    proxy.at_source(stream, move |source, io| source.set_waiting(io, stream, lease, deadline));
                changed.await?.unwrap_or(Ok(())).map_err(problem)?;
            }
            if was.cut_interval_ms != group.cut_interval_ms || was.compression != group.compression {
                let (interval, compress) = (config.cut_interval, config.compress);
                let changed =
                    proxy.at_source(stream, move |source, io| source.set_policy(io, stream, interval, compress));
                changed.await?.unwrap_or(Ok(())).map_err(problem)?;
            }
            if was.key != group.key {
                let key = config.policy_key;
                proxy.at_source(stream, move |source, io| source.set_policy_key(io, stream, key)).await?;
            }
            // Disks stay as they were given, so that a change is seen again when the hold ends.
            let disks = if group.hold { was.disks } else { group.disks.clone() };
            let kept = SourceGroup { disks, ..group.clone() };
            proxy.applied.borrow_mut().groups.insert(stream, kept);
            Ok(())
        }
    }
}

/// Ends a group cleanly and waits for it.
async fn stop_group(proxy: &Proxy, stream: StreamId) -> Result<(), Undone> {
    match unprotect(proxy, stream).await? {
        Some(_) => Ok(()),
        None => Err(problem("the group does not stop")),
    }
}

/// Ends a group; was it clean? Nothing if it did not end in time.
///
/// # Errors
/// [`Gone`].
pub async fn unprotect(proxy: &Proxy, stream: StreamId) -> Result<Option<bool>, Gone> {
    let (done, stopped) = tokio::sync::oneshot::channel();
    proxy.waiters.borrow_mut().stops.push((stream, done));
    match (&proxy.source, &proxy.target) {
        (_, Some(target)) if proxy.captures(stream) => {
            target.call(move |desk| desk.core.release(desk.io, stream)).await?;
        }
        (Some(source), _) => source.call(move |desk| desk.core.unprotect(desk.io, stream)).await?,
        _ => return Ok(Some(true)),
    }
    let clean = tokio::time::timeout(STOP_WAIT, stopped).await.ok().and_then(Result::ok);
    if clean.is_some() {
        proxy.applied.borrow_mut().groups.remove(&stream);
        proxy.applied.borrow_mut().paces.remove(&stream);
    }
    Ok(clean)
}

async fn converge_stream(proxy: &Proxy, said: &TargetStream) -> Result<(), Undone> {
    let Some(target) = &proxy.target else {
        return Err(problem("this proxy has no target role: `target.journal` is not set"));
    };
    let mut config = convert::stream(said).map_err(problem)?;
    let stream = config.stream;
    let same = |was: &TargetStream| {
        let without_views = |s: &TargetStream| TargetStream { views: Vec::new(), machines: Vec::new(), ..s.clone() };
        without_views(was) == without_views(said)
    };
    if proxy.applied.borrow().streams.get(&stream).is_some_and(same) {
        return Ok(());
    }
    let seeds = convert::seeds(said).map_err(problem)?;
    let bases = convert::bases(said).map_err(problem)?;
    // They are disks that it has served. Who keeps journals only lets nobody write into files of its host.
    if !bases.is_empty() && proxy.source.is_none() {
        return Err(problem(format!(
            "`{}` begins with disks of this host, and this proxy has no source role",
            said.name
        )));
    }
    // Before anything can be acknowledged under a key that is new.
    config.policy_key = site::keep_keys(proxy, said).map_err(problem)?.unwrap_or(config.policy_key);
    let opened = target.call(move |desk| {
        if !bases.is_empty() {
            desk.core.base(stream, bases);
        }
        seeds.into_iter().for_each(|(disk, path)| desk.core.seed(disk, path));
        desk.core.open_stream(desk.io, config)
    });
    opened.await?.map_err(problem)?;
    if proxy.applied.borrow_mut().streams.insert(stream, said.clone()).is_none() {
        proxy.event(Severity::Info, Some(stream), "stream", format!("the journal of `{}` is kept here", said.name));
    }
    Ok(())
}

/// Opens a view that the desired state names, unless it is open.
async fn reopen(proxy: &Proxy, view: &OpenView) -> Result<(), Undone> {
    if proxy.target.is_none() || proxy.applied.borrow().views.contains_key(&view.view) {
        return Ok(());
    }
    match open_view(proxy, view).await? {
        // Once the stream is ready, its event brings us back here.
        Ok(_) | Err(ViewError::Target(TargetError::Recovering(_) | TargetError::Point(PointError::NotReady(_)))) => {
            Ok(())
        }
        Err(ViewError::Senseless(error)) => Err(problem(error)),
        Err(ViewError::Target(error)) => Err(problem(format!("view `{}`: {error}", view.view))),
    }
}

/// Why a view is not open.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// It makes no sense.
    #[error(transparent)]
    Senseless(#[from] convert::Senseless),
    /// The target says no.
    #[error(transparent)]
    Target(#[from] TargetError),
}

/// Opens a view, or finds it open.
///
/// # Errors
/// [`Gone`]; inside, why the view is not open.
pub async fn open_view(
    proxy: &Proxy,
    said: &OpenView,
) -> Result<Result<Vec<afterimage_dataplane::host::Export>, ViewError>, Gone> {
    let Some(target) = &proxy.target else {
        let error = TargetError::UnknownStream(said.stream_uid.parse().unwrap_or(StreamId::NONE));
        return Ok(Err(error.into()));
    };
    let mut config = match convert::view(said) {
        Ok(config) => config,
        Err(error) => return Ok(Err(error.into())),
    };
    let opened = target.call(move |desk| {
        if config.seq == 0 {
            // Only a stand-alone file says so: the newest complete point, whatever its number.
            config.seq = desk.core.resolve(desk.io, config.stream, Choice::Latest)?.seq;
        }
        desk.core.open_view(desk.io, config)
    });
    match opened.await? {
        Err(error) => Ok(Err(error.into())),
        Ok(exports) => {
            let view = View { said: said.clone(), keys: exports.iter().map(|e| e.key).collect() };
            proxy.applied.borrow_mut().views.insert(said.view.clone(), view);
            Ok(Ok(exports))
        }
    }
}
