//! What a proxy reports: a snapshot of both cores, and what happened since the last report.

use std::collections::HashMap;

use afterimage_dataplane::host::{DiskKey, ExportStatus};
use afterimage_dataplane::io::Io;
use afterimage_dataplane::source::{DiskStatus, GroupState, GroupStatus, HoldReason, Pace, Rung};
use afterimage_dataplane::target::{Choice, StreamState, StreamStatus};
use afterimage_wire::ids::StreamId;
use afterimage_wire::v1;
use afterimage_wire::v1::{
    DiskGeneration, FenceRecord, LinkState, PointSummary, Report, ScrubProgress, SourceDiskReport, SourceGroupReport,
    SyncProgress, TargetStreamReport, ViewExport, ViewReport,
};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};

use super::convert;
use super::cores::{SourceCore, TargetCore};
use super::fronts;
use super::room::Measured;
use super::runtime::{Desk, Gone, ThreadIo};
use super::state::Proxy;
use super::ublk::Role;

/// Highest RPO that a report tells, microseconds: a day.
const RPO_HIGHEST_US: u64 = 86_400_000_000;
/// Significant digits of the RPO in a report.
const RPO_DIGITS: u8 = 3;
/// Damages named in a report; there may be more.
const MAX_DAMAGE: usize = 16;
/// Fences named in a report.
const MAX_FENCES: usize = 16;

/// Makes reports. Keeps what the last one said of the RPO, since each tells only what is new.
#[derive(Default)]
pub struct Reporter {
    rpo: HashMap<StreamId, Histogram<u64>>,
    room: Measured,
}

impl Reporter {
    /// The report of now. The events in it are taken: they go into no other.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn report(&mut self, proxy: &Proxy) -> Result<Report, Gone> {
        // Read first: what the cores say is not older than what the report claims to have seen.
        let observed_version = proxy.desired.borrow().version;
        let sources = self.sources(proxy).await?;
        let (mut targets, views) = targets(proxy).await?;
        let room = self.room.look(proxy, &mut targets);
        Ok(Report {
            observed_version,
            // Whoever wants an answer numbers it.
            number: 0,
            sources,
            targets,
            views,
            events: proxy.events.borrow_mut().drain(..).collect(),
            problems: proxy.problems.borrow().iter().chain(proxy.unrenewed.borrow().iter()).cloned().collect(),
            room,
        })
    }

    async fn sources(&mut self, proxy: &Proxy) -> Result<Vec<SourceGroupReport>, Gone> {
        let mut groups = Vec::new();
        let mut clients = HashMap::new();
        if let Some(source) = &proxy.source {
            let ask = source.call(|desk| (statuses(desk.core, desk.io), desk.fronts.status()));
            let (found, status) = ask.await?;
            groups.extend(found);
            clients.extend(by_export(&status).into_iter().map(|(key, count)| ((Role::Source, key), count)));
        }
        if let Some(target) = &proxy.target {
            let ask = target.call(|desk| {
                let mut found = statuses(&desk.core.source, desk.io);
                // Hosts know them by the keys of the views.
                for disk in found.iter_mut().flat_map(|(group, _)| &mut group.disks) {
                    disk.key = desk.core.view_key(disk.key).unwrap_or(disk.key);
                }
                (found, desk.fronts.status())
            });
            let (found, status) = ask.await?;
            groups.extend(found);
            clients.extend(by_export(&status).into_iter().map(|(key, count)| ((Role::Target, key), count)));
        }
        self.rpo.retain(|stream, _| groups.iter().any(|(group, _)| group.stream == *stream));
        let mut reports = Vec::with_capacity(groups.len());
        for (group, rpo) in groups {
            let role = if proxy.captures(group.stream) { Role::Target } else { Role::Source };
            let histogram = rpo.map(|rpo| self.new_samples(group.stream, rpo)).unwrap_or_default();
            let disks = group.disks.iter().map(|disk| SourceDiskReport {
                disk_uid: disk.id.to_string(),
                state: if disk.sync_failed {
                    "failed: a flush failed".to_owned()
                } else {
                    disk_state(&group, disk).to_owned()
                },
                generation: disk.generation,
                uris: fronts::uris(proxy, role, &disk.name),
                clients: clients.get(&(role, disk.key)).copied().unwrap_or_default(),
                sync: sync(disk),
            });
            let (link, link_detail) = link(&group.state);
            reports.push(SourceGroupReport {
                key_uid: group.policy_key.to_string(),
                stream_uid: group.stream.to_string(),
                link: link.into(),
                link_detail,
                rung: rung(group.rung, link).into(),
                held: group.held.is_some(),
                held_reason: group.held.map(held_word).unwrap_or_default().to_owned(),
                outside_hours: pace(proxy, group.stream).is_some_and(|pace| pace.closed),
                paused: pace(proxy, group.stream).is_some_and(|pace| pace.paused),
                lease_ms: lease(proxy, &group),
                lease_left_ms: group.lease_left / 1_000_000,
                synchronous: group.synchronous.is_some(),
                synchronous_now: group.synchronous.as_ref().is_some_and(|s| s.together),
                synchronous_detail: group.synchronous.as_ref().and_then(|s| s.why.clone()).unwrap_or_default(),
                fenced: matches!(group.state, GroupState::Fenced { .. }),
                captured_seq: group.captured_seq,
                sealed_seq: group.sealed_seq,
                sent_seq: group.sent_seq,
                acked_seq: group.acked_seq,
                writes: group.records,
                captured_bytes: group.captured_bytes,
                wire_bytes: group.wire_bytes,
                frames: group.frames,
                queue_bytes: group.queue_bytes as u64,
                queue_limit_bytes: group.queue_limit as u64,
                spill_bytes: group.spill_bytes,
                spill_limit_bytes: group.spill_limit,
                spill_trouble: group.spill_trouble.clone().unwrap_or_default(),
                catch_up_ms: group.catch_up.map(|nanos| nanos / 1_000_000),
                rpo_now_us: group.rpo_now / 1000,
                rpo_histogram: histogram,
                sync: group_sync(&group.disks),
                cut: group.cut,
                disks: disks.collect(),
                incarnation: group.incarnation.to_string(),
            });
        }
        Ok(reports)
    }

    /// Samples since the last report, encoded.
    fn new_samples(&mut self, stream: StreamId, now: Histogram<u64>) -> Vec<u8> {
        let mut fresh = now.clone();
        if let Some(before) = self.rpo.get(&stream)
            && fresh.subtract(before).is_err()
        {
            // The group has been started anew, and its samples with it.
            fresh = now.clone();
        }
        self.rpo.insert(stream, now);
        encode(&fresh)
    }
}

/// How a source's groups are, with their samples of the RPO.
fn statuses(source: &SourceCore, io: &ThreadIo) -> Vec<(GroupStatus, Option<Histogram<u64>>)> {
    let status = source.status(io.now());
    let with_rpo = |group: GroupStatus| {
        let rpo = source.rpo_histogram(group.stream).cloned();
        (group, rpo)
    };
    status.into_iter().map(with_rpo).collect()
}

/// In the bounds that the protocol names; what lies above them counts as the highest.
fn encode(samples: &Histogram<u64>) -> Vec<u8> {
    let mut told = Histogram::<u64>::new_with_bounds(1, RPO_HIGHEST_US, RPO_DIGITS).expect("constant bounds are valid");
    for sample in samples.iter_recorded() {
        told.saturating_record_n(sample.value_iterated_to(), sample.count_at_value());
    }
    let mut bytes = Vec::new();
    if let Err(error) = V2Serializer::new().serialize(&told, &mut bytes) {
        tracing::error!(?error, "an RPO histogram cannot be encoded");
        bytes.clear();
    }
    bytes
}

fn by_export(status: &[ExportStatus]) -> HashMap<DiskKey, u32> {
    let mut clients: HashMap<_, u32> = HashMap::new();
    for export in status {
        let of_export = clients.entry(export.key).or_default();
        *of_export = of_export.saturating_add(u32::try_from(export.clients).unwrap_or(u32::MAX));
    }
    clients
}

/// When frames of a group may leave, as it was last told.
fn pace(proxy: &Proxy, stream: StreamId) -> Option<Pace> {
    proxy.applied.borrow().paces.get(&stream).copied()
}

/// The lease that a group keeps to, milliseconds. Nothing while it is about to become another: the coordinator relies
/// on it.
fn lease(proxy: &Proxy, group: &GroupStatus) -> u64 {
    let kept = group.lease / 1_000_000;
    let uid = group.stream.to_string();
    let desired = proxy.desired.borrow();
    let wanted = desired.sources.iter().find(|source| source.stream_uid == uid).map_or(0, |source| source.lease_ms);
    if wanted == kept { kept } else { 0 }
}

fn held_word(reason: HoldReason) -> &'static str {
    match reason {
        HoldReason::Told => "told",
        HoldReason::SteppedDown => "stepped down",
        HoldReason::Lease => "lease",
    }
}

fn disk_state(group: &GroupStatus, disk: &DiskStatus) -> &'static str {
    match (&group.state, disk.out, group.held) {
        (GroupState::Fenced { .. }, ..) | (_, Some(1..), _) => "fenced",
        (_, Some(0), _) => "leaving",
        (_, None, Some(_)) => "held",
        (_, None, None) => "serving",
    }
}

fn sync(disk: &DiskStatus) -> Option<SyncProgress> {
    disk.sync.map(|sync| SyncProgress {
        done_bytes: sync.done,
        total_bytes: sync.total,
        compared_bytes: sync.compared,
        sent_bytes: sync.sent,
        left_ms: sync.left.map(|left| left / 1_000_000),
    })
}

fn group_sync(disks: &[DiskStatus]) -> Option<SyncProgress> {
    let mut all = disks.iter().filter_map(sync);
    let first = all.next()?;
    Some(all.fold(first, |sum, sync| SyncProgress {
        done_bytes: sum.done_bytes + sync.done_bytes,
        total_bytes: sum.total_bytes + sync.total_bytes,
        compared_bytes: sum.compared_bytes + sync.compared_bytes,
        sent_bytes: sum.sent_bytes + sync.sent_bytes,
        // They run side by side: the group is whole when the last one is.
        left_ms: sum.left_ms.zip(sync.left_ms).map(|(a, b)| a.max(b)),
    }))
}

fn link(state: &GroupState) -> (LinkState, String) {
    match state {
        GroupState::Opening => (LinkState::Connecting, "opening the disks".to_owned()),
        GroupState::Unlinked(why) if why.is_empty() => (LinkState::Connecting, String::new()),
        GroupState::Unlinked(why) => (LinkState::Down, why.clone()),
        GroupState::CatchingUp => (LinkState::Up, "what waited in the spill is being sent".to_owned()),
        GroupState::Syncing | GroupState::Protected => (LinkState::Up, String::new()),
        GroupState::Refused(reason, why) => (LinkState::Refused, format!("{reason:?}: {why}")),
        GroupState::Fenced { generation } => (LinkState::Refused, format!("fenced by generation {generation}")),
        GroupState::Stopping => (LinkState::Down, "stopping".to_owned()),
    }
}

fn rung(rung: Rung, link: LinkState) -> v1::Rung {
    match rung {
        Rung::Dirty => v1::Rung::Dirty,
        Rung::Spilling => v1::Rung::Spilling,
        Rung::Waiting | Rung::Uncompressed => v1::Rung::Queueing,
        Rung::Normal if link == LinkState::Up => v1::Rung::Streaming,
        Rung::Normal => v1::Rung::Queueing,
    }
}

async fn targets(proxy: &Proxy) -> Result<(Vec<TargetStreamReport>, Vec<ViewReport>), Gone> {
    let Some(target) = &proxy.target else { return Ok((Vec::new(), Vec::new())) };
    let (streams, clients) = target
        .call(|desk| {
            let (now, boot) = (desk.io.now(), desk.io.since_boot());
            let streams = desk.core.status();
            let reports = streams.into_iter().map(|stream| {
                let points = summary(desk, &stream);
                (stream_report(&stream, now, boot, points), stream)
            });
            (reports.collect::<Vec<_>>(), desk.fronts.status())
        })
        .await?;
    let clients = by_export(&clients);
    let mut reports = Vec::with_capacity(streams.len());
    let mut views = Vec::new();
    for (mut report, stream) in streams {
        let uid = &report.stream_uid;
        let desired = proxy.desired.borrow();
        let budget = desired.targets.iter().find(|t| t.stream_uid == *uid).map(|t| t.journal_budget_bytes);
        let role = proxy.config.target.as_ref().and_then(|role| role.budget);
        report.journal_budget_bytes = budget.filter(|b| *b > 0).or(role).unwrap_or_default();
        let applied = proxy.applied.borrow();
        for view in &stream.views {
            let open = applied.views.get(&view.name);
            views.push(ViewReport {
                view: view.name.clone(),
                stream_uid: uid.clone(),
                seq: view.seq,
                writable: open.is_some_and(|open| open.said.writable),
                exports: open.map(|open| exports_of(proxy, &stream, &view.name, open)).unwrap_or_default(),
                clients: open.map_or(0, |v| v.keys.iter().filter_map(|key| clients.get(key)).sum()),
                delta_bytes: view.delta_bytes,
            });
        }
        reports.push(report);
    }
    Ok((reports, views))
}

fn exports_of(proxy: &Proxy, stream: &StreamStatus, view: &str, open: &super::state::View) -> Vec<ViewExport> {
    let wanted = &open.said.disk_uids;
    let disks = stream.disks.iter().filter(|d| wanted.is_empty() || wanted.contains(&d.id.to_string()));
    disks
        .map(|disk| view_export(proxy, disk.id.to_string(), &disk.name, &format!("{view}/{}", disk.name), disk.size))
        .collect()
}

/// An export of a view, as the coordinator takes it.
pub fn view_export(proxy: &Proxy, disk_uid: String, disk: &str, export_name: &str, size: u64) -> ViewExport {
    ViewExport {
        disk: disk.to_owned(),
        disk_uid,
        export_name: export_name.to_owned(),
        uris: fronts::uris(proxy, Role::Target, export_name),
        size_bytes: size,
    }
}

fn stream_report(stream: &StreamStatus, now: u64, boot: u64, points: PointSummary) -> TargetStreamReport {
    let damage = stream.damage.iter().map(|damage| {
        let mended = if damage.is_mended() { " (newer points are good again)" } else { "" };
        format!("{}{mended}", damage.what)
    });
    TargetStreamReport {
        stream_uid: stream.stream.to_string(),
        connected: stream.connected,
        last_heard_ms: stream.last_heard.map(|at| now.saturating_sub(at) / 1_000_000),
        durable_seq: stream.durable_seq,
        durable_frame: stream.durable_frame,
        fold_floor: stream.floor,
        points: Some(points),
        journal_bytes: stream.journal_bytes,
        journal_budget_bytes: 0,
        held_bytes: 0,
        segments: u32::try_from(stream.segments).unwrap_or(u32::MAX),
        damage: damage.take(MAX_DAMAGE).collect(),
        newest_damaged: stream.damage.iter().any(|damage| !damage.is_mended() && damage.known)
            || stream.disks.iter().any(|disk| disk.damaged),
        shortened: stream.shortened.clone().unwrap_or_default(),
        folding: stream.fold_error.clone().unwrap_or_default(),
        scrub: Some(ScrubProgress {
            running: stream.scrub.running,
            done_bytes: stream.scrub.done,
            total_bytes: stream.scrub.total,
            ended_ms: stream.scrub.ended.map(|at| now.saturating_sub(at) / 1_000_000),
            bad_frames: stream.scrub.bad_frames,
        }),
        stopped: match &stream.state {
            StreamState::Ready => String::new(),
            StreamState::Recovering => "recovering".to_owned(),
            StreamState::NoSpace(why) | StreamState::Failed(why) => why.clone(),
        },
        synchronous: stream.synchronous,
        zero_loss: stream.zero_loss_until.is_some_and(|until| boot < until),
        zero_loss_ms: stream.zero_loss_until.map_or(0, |until| until.saturating_sub(boot) / 1_000_000),
        fences: fences(stream),
        disks: stream
            .disks
            .iter()
            .map(|disk| DiskGeneration { disk_uid: disk.id.to_string(), generation: disk.generation })
            .collect(),
    }
}

fn fences(stream: &StreamStatus) -> Vec<FenceRecord> {
    let newest = stream.fences.len().saturating_sub(MAX_FENCES);
    let told = stream.fences[newest..].iter().map(|fence| FenceRecord {
        generation: fence.generation,
        seq: fence.seq,
        time_ns: fence.wall_ns,
        zero_loss: fence.zero_loss,
        disk_uids: fence.disks.iter().map(ToString::to_string).collect(),
        reason: fence.reason.clone(),
    });
    told.collect()
}

/// What a stream can be brought back to.
pub fn summary(desk: &mut Desk<'_, TargetCore>, stream: &StreamStatus) -> PointSummary {
    let mut at = |seq: Option<u64>| {
        let point = desk.core.resolve(desk.io, stream.stream, Choice::Seq(seq?)).ok()?;
        Some(convert::point(&point, stream.timeline))
    };
    let (oldest, newest) = (at(stream.oldest), at(stream.newest));
    PointSummary { oldest, newest, count: stream.records, cuts: stream.cuts as u64 }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::Deserializer;

    use super::*;

    fn samples(values: &[u64]) -> Histogram<u64> {
        let mut histogram = Histogram::new_with_bounds(1, 86_400_000_000, 3).unwrap();
        values.iter().for_each(|v| histogram.record(*v).unwrap());
        histogram
    }

    #[test]
    fn a_histogram_is_told_within_the_bounds_of_the_protocol() {
        let mut wide = Histogram::<u64>::new_with_bounds(1, 7 * RPO_HIGHEST_US, 3).unwrap();
        wide.record_n(1500, 3).unwrap();
        wide.record(2 * RPO_HIGHEST_US).unwrap();
        let told = decoded(&encode(&wide));
        assert!(told.high() <= RPO_HIGHEST_US && told.sigfig() <= 3);
        assert_eq!((told.len(), told.count_between(1490, 1510)), (4, 3));
    }

    fn decoded(bytes: &[u8]) -> Histogram<u64> {
        Deserializer::new().deserialize(&mut &bytes[..]).unwrap()
    }

    #[test]
    fn a_report_holds_only_the_samples_since_the_last_one() {
        let mut reporter = Reporter::default();
        let stream = StreamId::random();
        assert_eq!(decoded(&reporter.new_samples(stream, samples(&[5, 7]))).len(), 2);
        let second = decoded(&reporter.new_samples(stream, samples(&[5, 7, 9])));
        assert_eq!((second.len(), second.max()), (1, 9));
    }

    #[test]
    fn a_group_that_began_anew_is_reported_whole() {
        let mut reporter = Reporter::default();
        let stream = StreamId::random();
        reporter.new_samples(stream, samples(&[5, 7, 8]));
        assert_eq!(decoded(&reporter.new_samples(stream, samples(&[6]))).len(), 1);
    }
}
