//! Commands of the coordinator: steps of operations, done once each, refused from an older term.

use std::collections::VecDeque;
use std::time::Duration;

use afterimage_dataplane::host::Export;
use afterimage_dataplane::io::{Errno, Io, OpenHow};
use afterimage_dataplane::target::{PointError, TargetError};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::v1::command::Command as Verb;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{
    CloseView, Command, CommandError, CommandErrorKind as Kind, CommandResult, DiskFound, Done, Fence, Fenced,
    GenerationRaised, InspectDisk, LabelCut, LeaveDisk, ListStreamPoints, OpenView, Point, PointList, RaiseGeneration,
    ResolvePoint, SourceGroup, ViewOpened,
};
use tokio::sync::oneshot;

use super::branch;
use super::converge::{self, ViewError};
use super::convert::{self, Senseless};
use super::cores::{self, SourceCore, TargetCore};
use super::failback;
use super::local;
use super::machines;
use super::report;
use super::runtime::{Gone, Handle};
use super::state::{CutWaiter, Proxy, StateError};
use super::ublk::{self, Role};

/// Results that are kept for a coordinator that asks again.
const KEPT_RESULTS: usize = 128;
/// Longest wait for a cut.
const CUT_WAIT: Duration = Duration::from_secs(5);
/// Longest wait for a disk to leave its stream.
const LEAVE_WAIT: Duration = Duration::from_secs(12);
/// Most points in one answer.
const MAX_POINTS: u32 = 1000;
/// How long a stream that is still being recovered is waited for.
const RECOVERY_WAIT: Duration = Duration::from_secs(20);

/// Why a command is not done.
#[derive(Debug)]
pub(super) struct Refused(pub Kind, pub String);

pub(super) fn refused<T>(kind: Kind, message: impl std::fmt::Display) -> Result<T, Refused> {
    Err(Refused(kind, message.to_string()))
}

impl From<Gone> for Refused {
    fn from(gone: Gone) -> Self {
        Self(Kind::Io, gone.to_string())
    }
}

impl From<Senseless> for Refused {
    fn from(error: Senseless) -> Self {
        Self(Kind::Invalid, error.to_string())
    }
}

impl From<PointError> for Refused {
    fn from(error: PointError) -> Self {
        let kind = match error {
            PointError::NotReady(_) | PointError::Incomplete { .. } => Kind::WrongState,
            PointError::None
            | PointError::Folded { .. }
            | PointError::Future { .. }
            | PointError::NoCut(_)
            | PointError::TooOld => Kind::NotFound,
        };
        Self(kind, error.to_string())
    }
}

impl From<TargetError> for Refused {
    fn from(error: TargetError) -> Self {
        let kind = match error {
            TargetError::Point(error) => return error.into(),
            TargetError::Config { .. } => Kind::Invalid,
            TargetError::UnknownStream(_) | TargetError::UnknownDisk(_) | TargetError::UnknownView(_) => Kind::NotFound,
            TargetError::Recovering(_)
            | TargetError::NameTaken(_)
            | TargetError::TooManyViews
            | TargetError::Unmergeable { .. } => Kind::WrongState,
            TargetError::Failed { .. } | TargetError::Storage { .. } | TargetError::Format { .. } => Kind::Io,
        };
        Self(kind, error.to_string())
    }
}

impl From<ViewError> for Refused {
    fn from(error: ViewError) -> Self {
        match error {
            ViewError::Senseless(error) => error.into(),
            ViewError::Target(error) => error.into(),
        }
    }
}

/// Results of the last commands: one that is asked again is answered as before.
#[derive(Default)]
pub struct Answered(VecDeque<CommandResult>);

impl Answered {
    /// The result of this command, if it has been done.
    pub fn get(&self, id: &str) -> Option<CommandResult> {
        self.0.iter().find(|result| result.id == id).cloned()
    }

    /// Keeps a result. An error is not kept: asked again, it is tried again.
    pub fn keep(&mut self, result: &CommandResult) {
        if matches!(result.outcome, Some(Outcome::Error(_))) {
            return;
        }
        if self.0.len() == KEPT_RESULTS {
            self.0.pop_front();
        }
        self.0.push_back(result.clone());
    }
}

/// Does a command.
pub async fn execute(proxy: &Proxy, command: Command) -> CommandResult {
    let name = command.command.as_ref().map_or("unknown", name);
    tracing::info!(id = command.id, operation = command.operation, step = command.step, "command {name}");
    let outcome = match proxy.see_term(command.term) {
        Err(error @ StateError::Term { .. }) => refused(Kind::StaleTerm, error),
        Err(error) => refused(Kind::Io, error),
        Ok(()) => verb(proxy, command.command).await,
    };
    let outcome = outcome.unwrap_or_else(|Refused(kind, message)| {
        tracing::warn!(id = command.id, ?kind, "command refused: {message}");
        Outcome::Error(CommandError { kind: kind.into(), message })
    });
    proxy.offers.send_replace(());
    CommandResult { id: command.id, outcome: Some(outcome) }
}

/// For the log.
fn name(verb: &Verb) -> &'static str {
    match verb {
        Verb::Fence(said) if said.hold => "fence: hold",
        Verb::Fence(_) => "fence: let go",
        Verb::RaiseGeneration(_) => "raise generation",
        Verb::ResolvePoint(_) => "resolve point",
        Verb::ListPoints(_) => "list points",
        Verb::OpenView(_) => "open view",
        Verb::CloseView(_) => "close view",
        Verb::LabelCut(_) => "label cut",
        Verb::InspectDisk(_) => "inspect disk",
        Verb::Unprotect(_) => "unprotect",
        Verb::DropStream(_) => "drop stream",
        Verb::LeaveDisk(_) => "leave disk",
        Verb::InspectBranch(_) => "inspect branch",
        Verb::Observe(_) => "observe",
        Verb::ReleaseDisks(_) => "release disks",
        Verb::MergeStream(_) => "merge stream",
        Verb::StartInstance(_) => "start machine",
        Verb::StopInstance(_) => "stop machine",
        Verb::ProbeInstance(_) => "probe machine",
        Verb::CheckInstance(_) => "check machine",
        Verb::RunScript(_) => "run script",
        Verb::LookAt(_) => "look at a port",
    }
}

async fn verb(proxy: &Proxy, verb: Option<Verb>) -> Result<Outcome, Refused> {
    match verb {
        Some(Verb::Fence(said)) => fence(proxy, &said).await,
        Some(Verb::RaiseGeneration(said)) => raise_generation(proxy, said).await,
        Some(Verb::ResolvePoint(said)) => resolve_point(proxy, &said).await,
        Some(Verb::ListPoints(said)) => list_points(proxy, &said).await,
        Some(Verb::OpenView(said)) => open_view(proxy, &said).await,
        Some(Verb::CloseView(said)) => close_view(proxy, said).await,
        Some(Verb::LabelCut(said)) => label_cut(proxy, said).await,
        Some(Verb::InspectDisk(said)) => inspect_disk(proxy, said).await,
        Some(Verb::Unprotect(said)) => unprotect(proxy, &said.stream_uid).await,
        Some(Verb::DropStream(said)) => drop_stream(proxy, &said.stream_uid).await,
        Some(Verb::LeaveDisk(said)) => leave_disk(proxy, &said).await,
        Some(Verb::Observe(_)) => Ok(Outcome::Observed(proxy.desired.borrow().clone())),
        Some(Verb::ReleaseDisks(said)) => failback::release_disks(proxy, &said).await,
        Some(Verb::MergeStream(said)) => failback::merge_stream(proxy, &said).await,
        Some(Verb::InspectBranch(said)) => branch::inspect(proxy, &said).await.map(Outcome::Branch),
        Some(Verb::StartInstance(said)) => machines::start(proxy, said).await,
        Some(Verb::StopInstance(said)) => machines::stop(proxy, said).await,
        Some(Verb::ProbeInstance(said)) => machines::probe(proxy, said).await,
        Some(Verb::CheckInstance(said)) => machines::check(proxy, said).await,
        Some(Verb::RunScript(said)) => machines::script::run(proxy, said).await,
        Some(Verb::LookAt(said)) => machines::script::look(said).await,
        None => refused(Kind::Unsupported, "the command is not known in this version"),
    }
}

pub(super) fn source(proxy: &Proxy) -> Result<&Handle<SourceCore>, Refused> {
    proxy.source.as_ref().map_or_else(|| refused(Kind::Unsupported, "this proxy has no source role"), Ok)
}

pub(super) fn target(proxy: &Proxy) -> Result<&Handle<TargetCore>, Refused> {
    proxy.target.as_ref().map_or_else(|| refused(Kind::Unsupported, "this proxy has no target role"), Ok)
}

async fn fence(proxy: &Proxy, said: &Fence) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let hold = said.hold;
    let last = proxy.at_source(stream, move |source, io| {
        source.fence(io, stream, hold);
        let status = source.status(io.now());
        status.iter().find(|group| group.stream == stream).map(|group| group.captured_seq)
    });
    match (last.await?.flatten(), hold) {
        (Some(last_seq), true) => Ok(Outcome::Fenced(Fenced { last_seq })),
        (Some(_), false) => Ok(Outcome::Done(Done {})),
        (None, _) => refused(Kind::NotFound, format!("stream {stream} is not protected from here")),
    }
}

pub(super) async fn raise_generation(proxy: &Proxy, said: RaiseGeneration) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let disks: Vec<DiskId> =
        said.disk_uids.iter().map(|uid| convert::id("disk_uids", uid)).collect::<Result<_, _>>()?;
    let (generation, zero_loss) = target(proxy)?
        .call(move |desk| {
            let status = desk.core.status();
            let held = status.iter().find(|s| s.stream == stream).and_then(|s| {
                let named = s.disks.iter().filter(|d| disks.is_empty() || disks.contains(&d.id));
                named.map(|d| d.generation).min()
            });
            match held {
                // Raised already by the same step.
                Some(held) if said.at_least > 0 && held >= said.at_least => {
                    let fences = status.iter().find(|s| s.stream == stream).map(|s| s.fences.clone());
                    let zero_loss = fences.unwrap_or_default().iter().any(|f| f.generation == held && f.zero_loss);
                    Ok((held, zero_loss))
                }
                _ => loop {
                    let zero_loss = desk.core.zero_loss(stream, desk.io.since_boot());
                    let raised = desk.core.raise_generation(desk.io, stream, &disks, &said.reason)?;
                    if raised >= said.at_least {
                        break Ok::<_, TargetError>((raised, zero_loss));
                    }
                },
            }
        })
        .await??;
    Ok(Outcome::Generation(GenerationRaised { generation, zero_loss }))
}

pub(super) async fn resolve_point(proxy: &Proxy, said: &ResolvePoint) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let choice = convert::choice(said.at.as_ref())?;
    let target = target(proxy)?;
    let point = recovered(async || {
        let resolve = target.call(move |desk| {
            let point = desk.core.resolve(desk.io, stream, choice)?;
            let status = desk.core.status();
            let timeline = status.iter().find(|s| s.stream == stream).map(|s| s.timeline).unwrap_or_default();
            Ok::<_, PointError>(convert::point(&point, timeline))
        });
        resolve.await
    })
    .await?;
    Ok(Outcome::Point(point))
}

/// Asks again while the stream is being recovered: a target that has just started is no reason for a failover to fail.
async fn recovered<T>(ask: impl AsyncFn() -> Result<Result<T, PointError>, Gone>) -> Result<T, Refused> {
    let end = tokio::time::Instant::now() + RECOVERY_WAIT;
    loop {
        match ask().await? {
            Err(PointError::NotReady(_)) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => return Ok(other?),
        }
    }
}

async fn list_points(proxy: &Proxy, said: &ListStreamPoints) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let (from, limit, cuts_only) = (said.from_seq, said.limit.clamp(1, MAX_POINTS) as usize, said.cuts_only);
    let target = target(proxy)?;
    let list = recovered(async || {
        let list = target.call(move |desk| {
            let points = desk.core.points(desk.io, stream, from, limit, cuts_only)?;
            let status = desk.core.status();
            let status = status.iter().find(|s| s.stream == stream).ok_or(PointError::NotReady(stream))?;
            let summary = report::summary(desk, status);
            let next_seq = if points.len() == limit { points.last().map_or(0, |p| p.seq + 1) } else { 0 };
            let points = points.iter().map(|p| convert::point(p, status.timeline)).collect();
            Ok(PointList { points, next_seq, summary: Some(summary) })
        });
        list.await
    })
    .await?;
    Ok(Outcome::Points(list))
}

pub(super) async fn open_view(proxy: &Proxy, said: &OpenView) -> Result<Outcome, Refused> {
    local::may_open(proxy, said)?;
    let end = tokio::time::Instant::now() + RECOVERY_WAIT;
    let exports = loop {
        match converge::open_view(proxy, said).await? {
            Err(ViewError::Target(TargetError::Recovering(_))) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => break other?,
        }
    };
    remember_view(proxy, said);
    if let Err(error) = proxy.keep_desired() {
        // The view is open; the coordinator will name it in the next desired state.
        tracing::warn!(%error, view = said.view, "the view is not remembered over a restart");
    }
    let disks = disk_uids(proxy, said).await?;
    let exports = exports.iter().map(|export| {
        let disk = disk_of(export, &said.view);
        let uid = disks.iter().find(|(name, _)| name == disk).map(|(_, uid)| uid.clone()).unwrap_or_default();
        report::view_export(proxy, uid, disk, &export.name, export.geometry.size)
    });
    Ok(Outcome::View(ViewOpened { exports: exports.collect() }))
}

/// The view is no part of what should be any more, durably.
fn forget_view(proxy: &Proxy, view: &str) -> Result<(), String> {
    let mut desired = std::mem::take(&mut *proxy.desired.borrow_mut());
    desired.targets.iter_mut().for_each(|stream| stream.views.retain(|known| known.view != view));
    *proxy.desired.borrow_mut() = desired;
    proxy.keep_desired().map_err(|error| error.to_string())
}

/// The target has given a view up: what its hosts ask fails, and nothing of them waits. A device that is mounted ends, too:
/// what it showed is not there any more.
pub async fn lose_view(proxy: &Proxy, view: &str) {
    if let Err(error) = forget_view(proxy, view) {
        // It would be tried again at the next start, and refused, since its point has gone.
        tracing::warn!(view, error, "a view that was given up is not forgotten");
    }
    let devices = proxy.ublk.of_view(view);
    let open = proxy.applied.borrow_mut().views.remove(view);
    let keys = open.map(|view| view.keys).unwrap_or_default();
    if let Some(target) = &proxy.target {
        let close = target.call(move |desk| keys.into_iter().for_each(|key| desk.fronts.close_export(desk.io, key)));
        if close.await.is_err() {
            return;
        }
    }
    proxy.offers.send_replace(());
    ublk::end(proxy, Role::Target, &devices).await;
}

/// The view is part of what should be from now on, also if the coordinator is lost before it says so.
fn remember_view(proxy: &Proxy, said: &OpenView) {
    let mut desired = proxy.desired.borrow_mut();
    if let Some(stream) = desired.targets.iter_mut().find(|t| t.stream_uid == said.stream_uid) {
        stream.views.retain(|view| view.view != said.view);
        stream.views.push(said.clone());
    }
}

fn disk_of<'a>(export: &'a Export, view: &str) -> &'a str {
    export.name.strip_prefix(view).and_then(|rest| rest.strip_prefix('/')).unwrap_or(&export.name)
}

async fn disk_uids(proxy: &Proxy, said: &OpenView) -> Result<Vec<(String, String)>, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let status = target(proxy)?.call(|desk| desk.core.status()).await?;
    let disks = status.into_iter().find(|s| s.stream == stream).map(|s| s.disks).unwrap_or_default();
    Ok(disks.into_iter().map(|d| (d.name, d.id.to_string())).collect())
}

async fn close_view(proxy: &Proxy, said: CloseView) -> Result<Outcome, Refused> {
    let devices = proxy.ublk.of_view(&said.view);
    not_in_use(proxy, Role::Target, &devices)?;
    let open = proxy.applied.borrow_mut().views.remove(&said.view);
    let keys = open.map(|view| view.keys).unwrap_or_default();
    let name = said.view.clone();
    let closed = target(proxy)?
        .call(move |desk| {
            let closed = desk.core.close_view(desk.io, &name, said.keep_delta);
            for key in keys {
                desk.fronts.close_export(desk.io, key);
            }
            closed
        })
        .await?;
    ublk::end(proxy, Role::Target, &devices).await;
    forget_view(proxy, &said.view).or_else(|error| refused(Kind::Io, error))?;
    let decided = proxy.local.borrow().iter().find(|d| d.view == said.view).map(|d| d.stream_uid.clone());
    decided.iter().for_each(|stream| proxy.forget_decision(stream));
    match closed {
        Ok(()) | Err(TargetError::UnknownView(_)) => Ok(Outcome::Done(Done {})),
        Err(error) => Err(error.into()),
    }
}

async fn label_cut(proxy: &Proxy, said: LabelCut) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    if said.label.is_empty() || said.label.len() > afterimage_wire::MAX_NAME {
        return refused(Kind::Invalid, "a label has 1 to 255 bytes");
    }
    let source = source(proxy)?;
    if !proxy.applied.borrow().groups.contains_key(&stream) {
        return refused(Kind::NotFound, format!("stream {stream} is not protected from here"));
    }
    let (taken, cut) = oneshot::channel();
    let label = said.label.clone();
    proxy.waiters.borrow_mut().cuts.push(CutWaiter { stream, label: label.clone(), taken });
    source.call(move |desk| desk.core.label_cut(desk.io, stream, &label)).await?;
    let cut = tokio::time::timeout(CUT_WAIT, cut).await;
    proxy.waiters.borrow_mut().cuts.retain(|waiter| !waiter.taken.is_closed());
    match cut {
        Ok(Ok((number, seq))) => {
            Ok(Outcome::Point(Point { seq, cut: Some(number), label: said.label, ..Point::default() }))
        }
        _ => refused(Kind::WrongState, "no cut was taken in time: is the stream held or not yet open?"),
    }
}

async fn inspect_disk(proxy: &Proxy, said: InspectDisk) -> Result<Outcome, Refused> {
    if !said.path.starts_with('/') {
        return refused(Kind::Invalid, format!("path `{}`: allowed is an absolute path", said.path));
    }
    let path = said.path.clone();
    let info = source(proxy)?
        .call(move |desk| {
            let file = desk.io.open(&path, OpenHow { write: true, ..OpenHow::default() })?;
            let info = desk.io.info(file);
            desk.io.close(file);
            info
        })
        .await?;
    match info {
        Ok(info) => Ok(Outcome::Disk(DiskFound {
            size_bytes: info.size,
            block_bytes: info.block,
            physical_block_bytes: info.physical_block,
        })),
        Err(Errno::NOENT) => refused(Kind::NotFound, format!("`{}` does not exist on the source's host", said.path)),
        Err(errno) => refused(Kind::Io, format!("`{}`: {errno}", said.path)),
    }
}

/// Takes a disk out of its stream, and out of what should be: a restart does not bring it back.
async fn leave_disk(proxy: &Proxy, said: &LeaveDisk) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid)?;
    let disk: DiskId = convert::id("disk_uid", &said.disk_uid)?;
    let source = source(proxy)?;
    let running = proxy.applied.borrow().groups.get(&stream).cloned();
    let Some(group) = running else {
        return refused(Kind::NotFound, format!("stream {stream} is not protected from here"));
    };
    let Some(leaving) = group.disks.iter().find(|d| d.uid == said.disk_uid).cloned() else {
        return Ok(Outcome::Done(Done {})); // Gone already.
    };
    let devices = [leaving.export_name.clone()];
    not_in_use(proxy, Role::Source, &devices)?;
    let (left, gone) = oneshot::channel();
    proxy.waiters.borrow_mut().leaves.push((stream, disk, left));
    if !source.call(move |desk| desk.core.leave(desk.io, stream, disk)).await? {
        proxy.waiters.borrow_mut().leaves.retain(|(s, d, _)| (*s, *d) != (stream, disk));
        return refused(Kind::WrongState, "it is the last disk of its group");
    }
    // From here on the stream says that it has left: so does what is kept for the next start.
    let without = |group: &mut SourceGroup| {
        group.disks.retain(|d| d.uid != said.disk_uid);
        if !group.left_slots.contains(&leaving.slot) {
            group.left_slots.push(leaving.slot);
        }
    };
    let of = |group: &&mut SourceGroup| group.stream_uid == said.stream_uid;
    forget(proxy, |desired| desired.sources.iter_mut().filter(of).for_each(without))?;
    proxy.applied.borrow_mut().groups.values_mut().filter(of).for_each(without);
    if tokio::time::timeout(LEAVE_WAIT, gone).await.is_err() {
        return refused(Kind::Io, "the disk does not come to rest: it may hang");
    }
    ublk::end(proxy, Role::Source, &devices).await;
    let only = SourceGroup { disks: vec![leaving], ..group };
    forget_disks(proxy, &only)?;
    Ok(Outcome::Done(Done {}))
}

/// A device that is mounted would fail its file system: it has to be given up first.
fn not_in_use(proxy: &Proxy, role: Role, exports: &[String]) -> Result<(), Refused> {
    match proxy.ublk.in_use(role, exports) {
        Some(device) => refused(Kind::WrongState, format!("{device} is in use on its host: unmount it first")),
        None => Ok(()),
    }
}

async fn unprotect(proxy: &Proxy, uid: &str) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", uid)?;
    if !proxy.captures(stream) && proxy.source.is_none() && proxy.target.is_some() {
        // A capture that has not begun since this process did: nothing of it runs.
        forget(proxy, |desired| desired.sources.retain(|group| group.stream_uid != uid))?;
        return Ok(Outcome::Done(Done {}));
    }
    let running = proxy.applied.borrow().groups.get(&stream).cloned();
    let disks = running.iter().flat_map(|group| &group.disks);
    let devices: Vec<String> = disks.map(|disk| disk.export_name.clone()).collect();
    if running.as_ref().is_some_and(convert::is_of_views) {
        // Hosts go on with the view itself, by the devices that they have.
        return end_capture(proxy, stream, uid).await;
    }
    not_in_use(proxy, Role::Source, &devices)?;
    forget(proxy, |desired| desired.sources.retain(|group| group.stream_uid != uid))?;
    if let Some(group) = running {
        if converge::unprotect(proxy, stream).await?.is_none() {
            return refused(Kind::Io, "the group does not stop: a disk may hang");
        }
        ublk::end(proxy, Role::Source, &devices).await;
        forget_disks(proxy, &group)?;
        forget_spill(proxy, &group);
    }
    Ok(Outcome::Done(Done {}))
}

/// Ends the capture of views.
async fn end_capture(proxy: &Proxy, stream: StreamId, uid: &str) -> Result<Outcome, Refused> {
    let running = proxy.applied.borrow().groups.get(&stream).cloned();
    let stopped = converge::unprotect(proxy, stream).await?;
    forget(proxy, |desired| desired.sources.retain(|group| group.stream_uid != uid))?;
    if stopped.is_none() {
        return refused(Kind::Io, "the capture of the view does not stop: its delta may hang");
    }
    // From now on nobody keeps the views back.
    proxy.changed.notify_one();
    if let Some(group) = running {
        forget_disks(proxy, &group)?;
        forget_spill(proxy, &group);
    }
    Ok(Outcome::Done(Done {}))
}

/// Removes what is remembered of disks for a stream. It is of use to that only; where it has ended, what is left does no
/// harm.
pub(super) fn forget_disks(proxy: &Proxy, group: &SourceGroup) -> Result<(), Refused> {
    for disk in convert::group(group, &proxy.places_of(group), false)?.disks {
        let _ = std::fs::remove_file(disk.log_path);
        let _ = std::fs::remove_file(disk.witness_path);
    }
    Ok(())
}

/// Removes what waited to be sent.
pub(super) fn forget_spill(proxy: &Proxy, group: &SourceGroup) {
    let role = proxy.config.target.as_ref().filter(|_| convert::is_of_views(group));
    let outbound = role.map(|role| cores::outbound(role).join("spill"));
    let own = || Some(proxy.config.source.as_ref()?.spill.as_ref()?.dir.clone());
    if let Some(dir) = outbound.or_else(own) {
        let _ = std::fs::remove_dir_all(dir.join(&group.stream_uid));
    }
}

async fn drop_stream(proxy: &Proxy, uid: &str) -> Result<Outcome, Refused> {
    let stream: StreamId = convert::id("stream_uid", uid)?;
    let target = target(proxy)?;
    forget(proxy, |desired| desired.targets.retain(|target| target.stream_uid != uid))?;
    {
        let mut applied = proxy.applied.borrow_mut();
        applied.streams.remove(&stream);
        applied.views.retain(|_, view| view.said.stream_uid != uid);
    }
    match target.call(move |desk| desk.core.drop_stream(desk.io, stream, true)).await? {
        Ok(()) | Err(TargetError::UnknownStream(_)) => {
            remove_empty_folders(proxy, stream);
            Ok(Outcome::Done(Done {}))
        }
        Err(error) => Err(error.into()),
    }
}

/// The core removes the files of a stream; its folders, if nothing is left in them, go here.
fn remove_empty_folders(proxy: &Proxy, stream: StreamId) {
    let Some(role) = &proxy.config.target else { return };
    let folder = role.journal.join("streams").join(stream.to_string());
    for folder in [folder.join("segments"), folder.join("replica"), folder] {
        let _ = std::fs::remove_dir(folder);
    }
}

/// Takes something out of what should be, durably, so that a restart does not bring it back.
fn forget(proxy: &Proxy, change: impl FnOnce(&mut afterimage_wire::v1::DesiredState)) -> Result<(), Refused> {
    change(&mut proxy.desired.borrow_mut());
    proxy.keep_desired().or_else(|error| refused(Kind::Io, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(id: &str, outcome: Outcome) -> CommandResult {
        CommandResult { id: id.to_owned(), outcome: Some(outcome) }
    }

    #[test]
    fn a_result_is_given_again_and_an_error_is_not() {
        let mut answered = Answered::default();
        answered.keep(&result("a", Outcome::Done(Done {})));
        answered.keep(&result("b", Outcome::Error(CommandError::default())));
        assert!(answered.get("a").is_some() && answered.get("b").is_none());
    }

    #[test]
    fn old_results_give_way() {
        let mut answered = Answered::default();
        for n in 0..=KEPT_RESULTS {
            answered.keep(&result(&n.to_string(), Outcome::Done(Done {})));
        }
        assert!(answered.get("0").is_none() && answered.get("1").is_some());
    }
}
