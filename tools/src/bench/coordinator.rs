//! How many groups and proxies one coordinator carries: a real one, as a process of its own, with proxies that are simulated
//! here. They join by token, keep a session open, answer what a real proxy answers, and report as often as they are told,
//! with figures that change; no data flows. Its CPU time and memory are the kernel's figures for its process.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use afterimage_wire::v1;
use hdrhistogram::Histogram;
use tonic::transport::Channel;
use v1::coordinator_message::Message as Down;
use v1::proxy_message::Message as Up;

use super::{CoordinatorArgs, interrupt};
use crate::demo::api::Api;

const PARENT: &str = "tenants/default";
/// Callers that measure beside each other.
const CALLERS: usize = 4;
/// Calls a second of each: people and their tools, not a flood.
const CALLS_PER_S: u64 = 25;
/// Groups that are made at the same time.
const MAKERS: usize = 8;
/// Longest that everything may take to be protected.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Pause before a proxy, or a maker of groups, tries again.
const AGAIN: Duration = Duration::from_millis(200);
/// Messages of a proxy that wait for the coordinator.
const WAITING: usize = 16;

/// The coordinator's process, which ends with the measurement.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended already
        let _ = interrupt::ended(&mut self.0);
    }
}

/// Runs it.
///
/// # Errors
/// The coordinator or a call fails.
pub fn run(args: &CoordinatorArgs) -> io::Result<()> {
    let folder = tempfile::Builder::new()
        .prefix("afterimage-bench-")
        .tempdir_in(args.dir.clone().unwrap_or_else(std::env::temp_dir))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let measured = runtime.block_on(measure(args, folder.path()))?;
    if args.json {
        println!("{measured}");
    } else {
        let number = |field: &str| measured[field].as_f64().unwrap_or(0.0);
        println!("{} groups over {} proxies, {} s", args.groups, args.proxies, number("seconds"));
        println!("making a group     {:.1} ms each, {} at once", number("create_ms"), MAKERS);
        println!(
            "coordinator's CPU  {:.3} of a core while it is measured, {:.1} s in all",
            number("cpu_share"),
            number("cpu_total_s")
        );
        println!(
            "its memory         {:.0} MiB at most, {:.1} KiB for each group",
            number("peak_mib"),
            number("kib_per_group")
        );
        println!("reports            {:.0} a second", number("reports_per_s"));
        println!("sessions lost      {}", number("sessions_lost"));
        for call in measured["calls"].as_array().into_iter().flatten() {
            println!(
                "{:<18} p50 {:.2} ms, p99 {:.2} ms, {} calls",
                call["call"].as_str().unwrap_or(""),
                call["p50_ms"].as_f64().unwrap_or(0.0),
                call["p99_ms"].as_f64().unwrap_or(0.0),
                call["calls"]
            );
        }
    }
    Ok(())
}

fn refused(status: tonic::Status) -> io::Error {
    io::Error::other(format!("the coordinator answers {:?}: {}", status.code(), status.message()))
}

fn spawn(folder: &Path, address: &str) -> io::Result<Child> {
    let log = File::create(folder.join("coordinator.log"))?;
    interrupt::started(|| {
        Command::new(std::env::current_exe()?)
            .args(["coordinator", "--listen", address, "--call-rate", "0", "--data-dir"])
            .arg(folder.join("data"))
            .env("AFTERIMAGE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
    })
}

async fn measure(args: &CoordinatorArgs, folder: &Path) -> io::Result<serde_json::Value> {
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let child = Running(spawn(folder, &address)?);
    let pid = child.0.id();
    let mut api = Api::connect(&folder.join("data/admin.json")).await?;
    let empty = peak_kib(pid)?;
    let reports = Arc::new(AtomicU64::new(0));
    let lost = Arc::new(AtomicU64::new(0));
    for number in 0..args.proxies {
        let token = api.join_token(&proxy(number)).await?;
        let bundle = client::join(&token, None).await.map_err(io::Error::other)?;
        let (reports, lost) = (reports.clone(), lost.clone());
        tokio::spawn(async move {
            // As a real one, it comes back; how often it had to is among the figures.
            loop {
                let why = play(&bundle, &reports).await;
                eprintln!("afterimage bench coordinator: session of {}: {why}", bundle.name);
                lost.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(AGAIN).await;
            }
        });
    }
    let until = Instant::now() + READY_WITHIN;
    while api.connected_proxies().await? < args.proxies as usize {
        wait(until, "the proxies are connected").await?;
    }
    let channel = api.channel();
    policy(&channel).await?;
    let begun = Instant::now();
    make(&channel, args).await?;
    // As each maker sees it.
    let create = begun.elapsed().as_secs_f64() * 1000.0 * MAKERS as f64 / f64::from(args.groups);
    while protected(&channel).await? < args.groups as usize {
        wait(until + READY_WITHIN, "every group is protected").await?;
    }

    let (cpu, told, begun) = (cpu_s(pid)?, reports.load(Ordering::Relaxed), Instant::now());
    let time = Duration::from_secs(args.seconds.into());
    let callers: Vec<_> =
        (0..CALLERS).map(|number| tokio::spawn(call(channel.clone(), number, args.groups, time))).collect();
    let mut calls: Vec<Histogram<u64>> = (0..CALLS.len()).map(|_| histogram()).collect();
    for caller in callers {
        let one = caller.await.map_err(io::Error::other)??;
        for (all, one) in calls.iter_mut().zip(&one) {
            all.add(one).map_err(io::Error::other)?;
        }
    }
    let took = begun.elapsed().as_secs_f64();
    let peak = peak_kib(pid)?;
    let (share, all) = ((cpu_s(pid)? - cpu) / took, cpu_s(pid)?);
    Ok(serde_json::json!({
        "groups": args.groups,
        "proxies": args.proxies,
        "seconds": (took * 10.0).round() / 10.0,
        "create_ms": create,
        "cpu_share": share,
        "cpu_total_s": all,
        "peak_mib": peak as f64 / 1024.0,
        "kib_per_group": peak.saturating_sub(empty) as f64 / f64::from(args.groups),
        "sessions_lost": lost.load(Ordering::Relaxed),
        "reports_per_s": (reports.load(Ordering::Relaxed) - told) as f64 / took,
        "calls": CALLS.iter().zip(&calls).map(|(name, times)| serde_json::json!({
            "call": name,
            "calls": times.len(),
            "p50_ms": times.value_at_quantile(0.5) as f64 / 1000.0,
            "p99_ms": times.value_at_quantile(0.99) as f64 / 1000.0,
            "max_ms": times.max() as f64 / 1000.0,
        })).collect::<Vec<_>>(),
    }))
}

async fn wait(until: Instant, what: &str) -> io::Result<()> {
    if Instant::now() > until || interrupt::interrupted() {
        return Err(io::Error::other(format!("not in time: {what}")));
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    Ok(())
}

fn proxy(number: u32) -> String {
    format!("proxy-{number}")
}

fn group(number: u32) -> String {
    format!("group-{number:05}")
}

async fn policy(channel: &Channel) -> io::Result<()> {
    let policies = v1::policies_client::PoliciesClient::new(channel.clone());
    for id in ["bench", "other"] {
        let request = v1::CreatePolicyRequest {
            parent: PARENT.into(),
            policy_id: id.into(),
            policy: Some(v1::Policy::default()),
            ..Default::default()
        };
        policies.clone().create_policy(request).await.map_err(refused)?;
    }
    Ok(())
}

/// All groups, each from one proxy to the next.
async fn make(channel: &Channel, args: &CoordinatorArgs) -> io::Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let makers: Vec<_> = (0..MAKERS)
        .map(|_| {
            let (next, groups, proxies) = (next.clone(), args.groups, args.proxies);
            let mut client = v1::groups_client::GroupsClient::new(channel.clone());
            tokio::spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed) as u32;
                    if number >= groups || interrupt::interrupted() {
                        return Ok::<(), io::Error>(());
                    }
                    let (from, to) = (number % proxies, (number + 1) % proxies);
                    let disk = v1::Disk { name: "data".into(), path: format!("/disks/{number}"), ..Default::default() };
                    let request = v1::CreateGroupRequest {
                        parent: PARENT.into(),
                        group_id: group(number),
                        group: Some(v1::Group {
                            policy: format!("{PARENT}/policies/bench"),
                            source: format!("{PARENT}/proxies/{}", proxy(from)),
                            target: format!("{PARENT}/proxies/{}", proxy(to)),
                            disks: vec![disk],
                            ..Default::default()
                        }),
                        ..Default::default()
                    };
                    // A session that was lost is made anew in a moment.
                    let until = Instant::now() + READY_WITHIN;
                    while let Err(status) = client.create_group(request.clone()).await {
                        if status.code() != tonic::Code::Unavailable || Instant::now() > until {
                            return Err(refused(status));
                        }
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            })
        })
        .collect();
    for maker in makers {
        maker.await.map_err(io::Error::other)??;
    }
    Ok(())
}

/// Groups that are.
async fn protected(channel: &Channel) -> io::Result<usize> {
    let mut client = v1::status_client::StatusClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let request = v1::GetStatusRequest { parent: PARENT.into() };
    let snapshot = client.get_status(request).await.map_err(refused)?.into_inner();
    Ok(snapshot.groups.iter().filter(|group| group.phase() == v1::Phase::Protected).count())
}

/// What is called, in turn: reads of one thing, a page of a list, everything at once, a change.
const CALLS: [&str; 4] = ["GetStatus of one", "ListGroups of 100", "GetStatus of all", "UpdateGroup"];

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("these bounds are allowed")
}

/// Calls at a rate; latencies in microseconds, by call. Counted from when a call was due, so that one that is late makes
/// those behind it late, too.
async fn call(channel: Channel, number: usize, groups: u32, time: Duration) -> io::Result<Vec<Histogram<u64>>> {
    let mut times: Vec<Histogram<u64>> = (0..CALLS.len()).map(|_| histogram()).collect();
    let mut status = v1::status_client::StatusClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let mut client = v1::groups_client::GroupsClient::new(channel).max_decoding_message_size(64 << 20);
    let pause = Duration::from_micros(1_000_000 / CALLS_PER_S);
    let begun = Instant::now() + pause * number as u32 / CALLERS as u32;
    for turn in 0u32.. {
        let due = begun + pause * turn;
        if due.saturating_duration_since(begun) >= time || interrupt::interrupted() {
            break;
        }
        tokio::time::sleep_until(due.into()).await;
        let one = format!("{PARENT}/groups/{}", group((turn * CALLERS as u32 + number as u32) % groups));
        // Everything at once is what a dashboard asks for, once a second.
        let which = match turn % CALLS_PER_S as u32 {
            0 => 2,
            n => [0, 1, 0, 3][n as usize % 4],
        };
        match which {
            0 => drop(status.get_status(v1::GetStatusRequest { parent: one }).await.map_err(refused)?),
            1 => {
                let request = v1::ListGroupsRequest { parent: PARENT.into(), page_size: 100, ..Default::default() };
                drop(client.list_groups(request).await.map_err(refused)?);
            }
            2 => drop(status.get_status(v1::GetStatusRequest { parent: PARENT.into() }).await.map_err(refused)?),
            _ => {
                let group = v1::Group { name: one, description: format!("turn {turn}"), ..Default::default() };
                let mask = prost_types::FieldMask { paths: vec!["description".into()] };
                let request =
                    v1::UpdateGroupRequest { group: Some(group), update_mask: Some(mask), ..Default::default() };
                drop(client.update_group(request).await.map_err(refused)?);
            }
        }
        let took = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
        times[which].saturating_record(took.max(1));
    }
    Ok(times)
}

/// A proxy, as far as the coordinator can tell. Ends only with its session: why.
async fn play(bundle: &Bundle, reports: &AtomicU64) -> String {
    let session = async {
        let channel = client::connect(bundle).await.map_err(|error| error.to_string())?;
        let (tell, told) = tokio::sync::mpsc::channel(WAITING);
        let up = |message: Up| v1::ProxyMessage { message: Some(message) };
        let register = v1::Register {
            name: bundle.name.clone(),
            uid: bundle.uid.clone(),
            software_version: env!("CARGO_PKG_VERSION").into(),
            data_address: format!("{}.example:7800", bundle.name),
            nbd_addresses: vec!["unix:/run/nbd".into()],
            capabilities: vec!["source".into(), "target".into()],
            boot_id: bundle.uid.clone(),
            ..Default::default()
        };
        tell.send(up(Up::Register(register))).await.map_err(|error| error.to_string())?;
        let stream = tokio_stream::wrappers::ReceiverStream::new(told);
        let mut control =
            v1::proxy_control_client::ProxyControlClient::new(channel).max_decoding_message_size(64 << 20);
        let mut said = control.session(stream).await.map_err(|status| status.message().to_owned())?.into_inner();
        let mut interval = tokio::time::interval(Duration::from_millis(250));
        let (mut desired, mut number) = (v1::DesiredState::default(), 0);
        loop {
            tokio::select! {
                _ = interval.tick() => {
                    number += 1;
                    let message = up(Up::Report(report(&desired, number)));
                    tell.send(message).await.map_err(|error| error.to_string())?;
                    reports.fetch_add(1, Ordering::Relaxed);
                }
                message = said.message() => match message.map_err(|status| status.message().to_owned())? {
                    None => return Err("the coordinator has ended it".to_owned()),
                    Some(message) => match message.message {
                        Some(Down::Registered(registered)) => {
                            let ms = u64::from(registered.report_interval_ms.max(50));
                            interval = tokio::time::interval(Duration::from_millis(ms));
                        }
                        Some(Down::Desired(state)) => desired = state,
                        Some(Down::Command(command)) => {
                            let result = v1::CommandResult { id: command.id, outcome: Some(outcome(command.command)) };
                            tell.send(up(Up::Result(result))).await.map_err(|error| error.to_string())?;
                        }
                        Some(Down::Heard(_)) | None => {}
                    },
                }
            }
        }
    };
    let ended: Result<std::convert::Infallible, String> = session.await;
    match ended {
        Ok(never) => match never {},
        Err(why) => why,
    }
}

fn outcome(command: Option<v1::command::Command>) -> v1::command_result::Outcome {
    use v1::command_result::Outcome;
    match command {
        Some(v1::command::Command::InspectDisk(_)) => {
            Outcome::Disk(v1::DiskFound { size_bytes: 1 << 30, block_bytes: 512, physical_block_bytes: 4096 })
        }
        _ => Outcome::Done(v1::Done {}),
    }
}

/// A report of all that it is told to do, as if all of it went well and something was written meanwhile.
fn report(desired: &v1::DesiredState, number: u64) -> v1::Report {
    let seq = number * 100;
    let sources = desired.sources.iter().map(|group| v1::SourceGroupReport {
        stream_uid: group.stream_uid.clone(),
        link: v1::LinkState::Up.into(),
        rung: v1::Rung::Streaming.into(),
        captured_seq: seq,
        sealed_seq: seq,
        sent_seq: seq,
        acked_seq: seq,
        writes: seq,
        captured_bytes: seq * 4096,
        wire_bytes: seq * 2048,
        rpo_now_us: 1000 + number % 7 * 100,
        cut: number,
        disks: group
            .disks
            .iter()
            .map(|disk| v1::SourceDiskReport {
                disk_uid: disk.uid.clone(),
                state: "serving".into(),
                generation: disk.generation,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    });
    let targets = desired.targets.iter().map(|stream| {
        let disks: Vec<String> = stream.disks.iter().map(|disk| disk.uid.clone()).collect();
        let point = v1::Point { seq, cut: Some(number), wall_ns: seq, disks, ..Default::default() };
        v1::TargetStreamReport {
            stream_uid: stream.stream_uid.clone(),
            connected: true,
            last_heard_ms: Some(1),
            durable_seq: seq,
            points: Some(v1::PointSummary {
                count: seq,
                cuts: number,
                oldest: Some(v1::Point { seq: 1, ..point.clone() }),
                newest: Some(point),
            }),
            journal_bytes: seq * 4096,
            journal_budget_bytes: 16 << 30,
            segments: 1,
            disks: stream
                .disks
                .iter()
                .map(|disk| v1::DiskGeneration { disk_uid: disk.uid.clone(), generation: disk.generation })
                .collect(),
            ..Default::default()
        }
    });
    v1::Report {
        observed_version: desired.version,
        sources: sources.collect(),
        targets: targets.collect(),
        number,
        ..Default::default()
    }
}

/// CPU seconds of a process, its own and the kernel's for it.
fn cpu_s(pid: u32) -> io::Result<f64> {
    let stat = std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat")))?;
    // The name may hold anything; what is counted stands behind it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    Ok((ticks(11) + ticks(12)) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The most memory that a process has had resident, KiB.
fn peak_kib(pid: u32) -> io::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_of_this_process_are_read() {
        let me = std::process::id();
        let before = cpu_s(me).unwrap();
        let begun = Instant::now();
        let mut sum = 0u64;
        while begun.elapsed() < Duration::from_millis(100) {
            sum = sum.wrapping_mul(31).wrapping_add(std::hint::black_box(1));
        }
        assert!(std::hint::black_box(sum) != 1);
        assert!(cpu_s(me).unwrap() > before);
        assert!(peak_kib(me).unwrap() > 1000);
    }
}
