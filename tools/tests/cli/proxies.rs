//! A source and a target that are no more than what they say to the coordinator: enough to drive every command without
//! a disk. What they claim is fixed, so that what the command shows can be compared.

use std::time::Duration;

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use afterimage_wire::v1::proxy_control_client::ProxyControlClient;
use afterimage_wire::v1::{
    self, Register, Report, SourceDiskReport, SourceGroupReport, TargetStreamReport, command::Command, command_result,
    command_result::Outcome, coordinator_message, point_choice::At, proxy_message,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Number of the newest write that is claimed, and of the oldest.
pub const NEWEST: u64 = 10_000;
/// See [`NEWEST`].
pub const OLDEST: u64 = 1;
/// Cuts lie at each multiple of this number.
pub const CUT_EVERY: u64 = 100;
/// Wall clock of write 0, ns since 1970; each write is a millisecond after the last.
pub const BEGUN: u64 = 1_700_000_000_000_000_000;
/// Size of every disk that is looked at.
pub const DISK_BYTES: u64 = 1 << 30;

/// Messages to the coordinator that wait.
const OUTBOX: usize = 64;

/// Runs a proxy until the task is dropped or the session ends.
pub async fn run(bundle: Bundle, target: bool) {
    let channel = client::connect(&bundle).await.expect("the coordinator answers");
    let (to, outbox) = mpsc::channel(OUTBOX);
    let send = async |message| {
        let message = v1::ProxyMessage { message: Some(message) };
        to.send(message).await.is_ok()
    };
    send(proxy_message::Message::Register(Register {
        name: bundle.name.clone(),
        uid: bundle.uid.clone(),
        software_version: "0.0.0-test".into(),
        data_address: "127.0.0.1:9".into(),
        nbd_addresses: vec!["unix:/run/test.sock".into()],
        capabilities: vec![if target { "target" } else { "source" }.into(), "nbd-unix".into()],
        boot_id: "boot".into(),
        observed_version: 0,
        observed_term: 0,
        site: String::new(),
        local_failovers: Vec::new(),
    }))
    .await;
    let mut inbox = ProxyControlClient::new(channel)
        .session(ReceiverStream::new(outbox))
        .await
        .expect("the session is opened")
        .into_inner();
    let mut desired = v1::DesiredState::default();
    let mut views: Vec<v1::ViewReport> = Vec::new();
    let mut held = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tokio::select! {
            _ = tick.tick() => {
                let report = report(&desired, &views, &held);
                if !send(proxy_message::Message::Report(report)).await { return }
            }
            message = inbox.message() => {
                let Ok(Some(v1::CoordinatorMessage { message: Some(message) })) = message else { return };
                match message {
                    coordinator_message::Message::Registered(_) | coordinator_message::Message::Heard(_) => {}
                    coordinator_message::Message::Desired(state) => desired = state,
                    coordinator_message::Message::Command(command) => {
                        let outcome = command.command.map(|c| answer(c, &desired, &mut views, &mut held));
                        let result = v1::CommandResult { id: command.id, outcome };
                        if !send(proxy_message::Message::Result(result)).await { return }
                    }
                }
            }
        }
    }
}

fn report(desired: &v1::DesiredState, views: &[v1::ViewReport], held: &[String]) -> Report {
    let is_held = |group: &v1::SourceGroup| group.hold || held.contains(&group.stream_uid);
    let source = |group: &v1::SourceGroup| SourceGroupReport {
        stream_uid: group.stream_uid.clone(),
        link: v1::LinkState::Up.into(),
        rung: v1::Rung::Streaming.into(),
        held: is_held(group),
        captured_seq: NEWEST,
        sealed_seq: NEWEST,
        sent_seq: NEWEST,
        acked_seq: NEWEST,
        writes: NEWEST,
        captured_bytes: NEWEST * 4096,
        wire_bytes: NEWEST * 2048,
        queue_limit_bytes: 256 << 20,
        rpo_now_us: 4_200,
        disks: group
            .disks
            .iter()
            .map(|disk| SourceDiskReport {
                disk_uid: disk.uid.clone(),
                state: if is_held(group) { "held" } else { "serving" }.into(),
                generation: disk.generation,
                uris: vec![format!("nbd+unix:///{}?socket=/run/test.sock", disk.export_name)],
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    let target = |stream: &v1::TargetStream| TargetStreamReport {
        stream_uid: stream.stream_uid.clone(),
        connected: true,
        last_heard_ms: Some(1),
        durable_seq: NEWEST,
        points: Some(summary(stream)),
        journal_bytes: 1 << 30,
        segments: 16,
        disks: stream
            .disks
            .iter()
            .map(|disk| v1::DiskGeneration { disk_uid: disk.uid.clone(), generation: disk.generation })
            .collect(),
        ..Default::default()
    };
    Report {
        observed_version: desired.version,
        sources: desired.sources.iter().map(source).collect(),
        targets: desired.targets.iter().map(target).collect(),
        views: views.to_vec(),
        ..Default::default()
    }
}

fn summary(stream: &v1::TargetStream) -> v1::PointSummary {
    v1::PointSummary {
        oldest: Some(point(stream, OLDEST)),
        newest: Some(point(stream, NEWEST)),
        count: NEWEST,
        cuts: NEWEST / CUT_EVERY,
    }
}

fn point(stream: &v1::TargetStream, seq: u64) -> v1::Point {
    let cut = seq.is_multiple_of(CUT_EVERY).then_some(seq / CUT_EVERY);
    v1::Point {
        seq,
        cut,
        wall_ns: BEGUN + seq * 1_000_000,
        clock_synced: cut.is_some(),
        flush_clean: cut.is_some(),
        disks: stream.disks.iter().map(|disk| disk.uid.clone()).collect(),
        timeline: "1".into(),
        ..Default::default()
    }
}

fn error(kind: v1::CommandErrorKind, message: &str) -> Outcome {
    Outcome::Error(v1::CommandError { kind: kind.into(), message: message.into() })
}

fn answer(
    command: Command,
    desired: &v1::DesiredState,
    views: &mut Vec<v1::ViewReport>,
    held: &mut Vec<String>,
) -> command_result::Outcome {
    let stream =
        |uid: &str| desired.targets.iter().find(|stream| stream.stream_uid == uid).cloned().unwrap_or_default();
    match command {
        Command::Fence(fence) => {
            held.retain(|stream| *stream != fence.stream_uid);
            held.extend(fence.hold.then(|| fence.stream_uid.clone()));
            if fence.hold { Outcome::Fenced(v1::Fenced { last_seq: NEWEST }) } else { Outcome::Done(v1::Done {}) }
        }
        Command::RaiseGeneration(raise) => {
            Outcome::Generation(v1::GenerationRaised { generation: raise.at_least.max(2), zero_loss: false })
        }
        Command::ResolvePoint(resolve) => {
            let seq = match resolve.at.and_then(|choice| choice.at) {
                Some(At::Cut(cut)) => cut * CUT_EVERY,
                Some(At::Seq(seq)) => seq,
                Some(At::TimeNs(ns)) => (ns.saturating_sub(BEGUN) / 1_000_000).min(NEWEST),
                _ => NEWEST,
            };
            if (OLDEST..=NEWEST).contains(&seq) {
                Outcome::Point(point(&stream(&resolve.stream_uid), seq))
            } else {
                error(v1::CommandErrorKind::NotFound, "that point is not held; held are writes 1 to 10000")
            }
        }
        Command::ListPoints(list) => {
            let stream = stream(&list.stream_uid);
            let step = if list.cuts_only { CUT_EVERY } else { 1 };
            let first = list.from_seq.max(OLDEST).next_multiple_of(step);
            let mut seqs = (first..=NEWEST).step_by(step as usize);
            let points = seqs.by_ref().take(list.limit as usize).map(|seq| point(&stream, seq)).collect();
            let next_seq = seqs.next().unwrap_or(0);
            Outcome::Points(v1::PointList { points, next_seq, summary: Some(summary(&stream)) })
        }
        Command::OpenView(open) => {
            let stream = stream(&open.stream_uid);
            let wanted = |disk: &&v1::TargetDisk| open.disk_uids.is_empty() || open.disk_uids.contains(&disk.uid);
            let exports: Vec<v1::ViewExport> = stream
                .disks
                .iter()
                .filter(wanted)
                .map(|disk| v1::ViewExport {
                    disk: disk.name.clone(),
                    disk_uid: disk.uid.clone(),
                    export_name: format!("{}/{}", open.view, disk.name),
                    uris: vec![format!("nbd+unix:///{}/{}?socket=/run/test.sock", open.view, disk.name)],
                    size_bytes: disk.size_bytes,
                })
                .collect();
            views.retain(|view| view.view != open.view);
            views.push(v1::ViewReport {
                view: open.view,
                stream_uid: open.stream_uid,
                seq: open.seq,
                writable: open.writable,
                exports: exports.clone(),
                ..Default::default()
            });
            Outcome::View(v1::ViewOpened { exports })
        }
        Command::CloseView(close) => {
            views.retain(|view| view.view != close.view);
            Outcome::Done(v1::Done {})
        }
        Command::LabelCut(cut) => {
            let stream = stream(&cut.stream_uid);
            Outcome::Point(v1::Point { label: cut.label, ..point(&stream, NEWEST) })
        }
        Command::InspectDisk(inspect) if inspect.path.starts_with("/dev/") => {
            Outcome::Disk(v1::DiskFound { size_bytes: DISK_BYTES, block_bytes: 4096, physical_block_bytes: 4096 })
        }
        Command::InspectDisk(inspect) => {
            error(v1::CommandErrorKind::NotFound, &format!("{}: no such file or directory", inspect.path))
        }
        Command::Unprotect(_) | Command::DropStream(_) | Command::LeaveDisk(_) => Outcome::Done(v1::Done {}),
        Command::InspectBranch(_) => Outcome::Branch(v1::Branch::default()),
        Command::Observe(_) => Outcome::Observed(desired.clone()),
        Command::StartInstance(_)
        | Command::StopInstance(_)
        | Command::ProbeInstance(_)
        | Command::CheckInstance(_) => error(v1::CommandErrorKind::Unsupported, "nothing is set up for machines here"),
        Command::RunScript(_) | Command::LookAt(_) => {
            error(v1::CommandErrorKind::Unsupported, "nothing is set up for plans here")
        }
        Command::ReleaseDisks(release) => {
            held.retain(|stream| *stream != release.stream_uid);
            Outcome::Done(v1::Done {})
        }
        Command::MergeStream(_) => Outcome::Merged(v1::Merged {
            complete: true,
            merged_bytes: DISK_BYTES,
            total_bytes: DISK_BYTES,
            written_bytes: 4096,
        }),
    }
}
