//! `afterimage demo`: the product's main job, with real processes, on one host.
//!
//! Coordinator, source proxy and target proxy run as processes of their own. A writer works on two disks through NBD;
//! the source proxy is killed; the group is failed over; every block is held against what the writer knows. Then the
//! machine writes at its replica, the source comes back, and the group fails back to it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use afterimage_wire::v1;

pub mod api;
mod back;
mod check;
mod display;
mod site;
mod writer;

use api::Api;
use check::{Verdict, check_prefix, read_state};
use display::Display;
use site::Site;
use writer::{Memory, Places, Progress, wall_ns};

/// Size of the data disk, bytes.
const DATA_BYTES: u64 = 1 << 30;
/// Size of the log disk, bytes.
const LOG_BYTES: u64 = 256 << 20;
/// Most writes that the writer remembers.
const MAX_WRITES: usize = 2_000_000;
const GROUP: &str = "tenants/default/groups/shop";

/// Options of `afterimage demo`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Exit code 0: everything that was checked is as it must be. 1: something differs, or could not be done.

Examples:
  afterimage demo
  afterimage demo --seconds 30
  afterimage demo --keep            # leaves everything running and prints how to look around
  afterimage demo --json | tail -1")]
pub struct Args {
    /// Seconds of load before the disaster.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(4..=60))]
    seconds: u64,
    /// Folder to work in (default: a temporary one, removed at the end); must be on a real disk, with 6 GiB free.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Leave coordinator, target and the failed-over disks running.
    #[arg(long)]
    keep: bool,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// What the demo found.
struct Summary {
    lost_ms: f64,
    rto_ms: f64,
    rpo: v1::Rpo,
    blocks_checked: u64,
    back: back::Back,
}

/// Runs the demo.
pub fn run(args: Args) -> ExitCode {
    // A thread beside this one keeps the connection to the coordinator alive while blocks are being checked here.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("afterimage demo: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(play(&args)) {
        Ok(summary) => {
            if args.json {
                let us = |value: Option<u64>| value.map_or(0.0, |v| round(v as f64 / 1000.0));
                println!(
                    "{}",
                    serde_json::json!({
                        "verified": true,
                        "lost_ms": round(summary.lost_ms),
                        "rto_ms": round(summary.rto_ms),
                        "rpo_ms": {
                            "p50": us(summary.rpo.p50_us), "p99": us(summary.rpo.p99_us), "max": us(summary.rpo.max_us),
                        },
                        "blocks_checked": summary.blocks_checked,
                        "failback_verified": true,
                        "failback_bytes_ratio": round(summary.back.bytes_ratio),
                        "failback_switch_ms": round(summary.back.switch_ms),
                        "failback_blocks_compared": summary.back.blocks_compared,
                    })
                );
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nafterimage demo: FAILED: {error}");
            if args.json {
                println!("{}", serde_json::json!({ "verified": false, "error": error.to_string() }));
            }
            ExitCode::FAILURE
        }
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn fail<T>(text: String) -> io::Result<T> {
    Err(io::Error::other(text))
}

async fn play(args: &Args) -> io::Result<Summary> {
    let started = Instant::now();
    let display = Display::new();
    display.headline("1  Two sites on this host: coordinator, source proxy, target proxy");
    let mut site = Site::new(args.dir.as_deref())?;
    let mut api = site.start().await?;
    display.line(&format!("   running in {} after {:.1} s", site.dir().display(), started.elapsed().as_secs_f64()));

    display.headline("2  Protect a group of two disks, 1 GiB and 256 MiB");
    let (data, log) = (site.make_disk("data.img", DATA_BYTES)?, site.make_disk("log.img", LOG_BYTES)?);
    api.protect(GROUP, &[("data", &data), ("log", &log)]).await?;
    let first = wait_protected(&mut api, &display).await?;
    display.line(&format!("   protected, first point held: {}", points_of(&first)));

    display.headline("3  A database writes to both disks through NBD");
    let progress = Arc::new(Progress::default());
    let writer = {
        let (progress, socket) = (progress.clone(), site.source_socket());
        std::thread::spawn(move || {
            writer::run(&Places { socket: &socket, data: "shop/data", log: "shop/log" }, &progress, MAX_WRITES)
        })
    };
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let mut shown = first;
    let mut shown_at = wall_ns();
    while Instant::now() < until {
        if writer.is_finished() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        shown = api.group_status(GROUP).await?;
        shown_at = wall_ns();
        display.live(&shown, progress.writes.load(Ordering::Relaxed));
    }
    display.end_live();

    display.headline("4  Disaster: the source proxy is killed (SIGKILL)");
    site.kill_source()?;
    let killed_at = wall_ns();
    let memory = writer.join().map_err(|_| io::Error::other("the writer crashed"))??;
    let Some(ended_by) = &memory.ended_by else {
        return fail("the writer ended before the disaster: nothing was lost, nothing is shown".to_owned());
    };
    display.line(&format!(
        "   the database had {} writes answered when its disks were gone ({ended_by})",
        memory.writes.iter().filter(|w| w.answered_ns != u64::MAX).count()
    ));
    let rpo = shown.rpo.unwrap_or_default();
    let shown_us = rpo.now_us.unwrap_or(u64::MAX);
    display.line(&format!("   RPO last shown: {}", display::ms(rpo.now_us)));

    display.headline("5  Failover to the newest durable write");
    let verb = Instant::now();
    let operation = api.failover(GROUP, "shop").await?;
    let Some(result) = operation.failover.clone() else {
        return fail(format!("the failover ended without a view: {operation:?}"));
    };
    let view = result.view.unwrap_or_default();
    let exports = export_names(&view)?;
    let views = site.view_socket();
    first_read(&views, &exports[0])?;
    let rto = verb.elapsed();
    for step in &operation.steps {
        display.line(&format!("   {:<18} {}", step.name, step.detail));
    }
    display.line(&format!("   first read from the replica {:.0} ms after the verb", rto.as_secs_f64() * 1e3));

    display.headline("6  Every block of both disks against what the database knows");
    let mut blocks_checked = 0;
    let verdict = check_view(&memory, &views, &exports, &mut blocks_checked)?;
    if verdict.writes_held == 0 {
        return fail("the replica is empty".to_owned());
    }
    let lost_ms = check_loss(&verdict, killed_at, shown_at, shown_us)?;
    display.line(&format!(
        "   {blocks_checked} blocks: exactly a prefix over both disks, {} of {} writes, newest commit {}",
        verdict.writes_held,
        memory.writes.len(),
        verdict.committed
    ));

    display.headline("7  Three earlier points, one of them a single write");
    blocks_checked += check_earlier(&mut api, &memory, &views, &display).await?;

    let sides = back::Sides { images: [&data, &log], views: (&views, &exports) };
    let back = back::play(&mut site, &mut api, &sides, &display).await?;

    let summary = Summary { lost_ms, rto_ms: rto.as_secs_f64() * 1e3, rpo, blocks_checked, back };
    display.summary(&summary_rows(&summary));
    if args.keep {
        display.keep(&site.look_around(&exports));
        site.keep();
    }
    Ok(summary)
}

fn summary_rows(summary: &Summary) -> Vec<(&'static str, String)> {
    vec![
        ("data lost", format!("{:.1} ms of answered writes", summary.lost_ms)),
        ("time until the first read", format!("{:.0} ms", summary.rto_ms)),
        (
            "RPO while it ran",
            format!(
                "p50 {} · p99 {} · max {}",
                display::ms(summary.rpo.p50_us),
                display::ms(summary.rpo.p99_us),
                display::ms(summary.rpo.max_us)
            ),
        ),
        ("blocks checked", summary.blocks_checked.to_string()),
        (
            "failback",
            format!(
                "{} blocks as they were written; {:.2} bytes sent for each that had to be; switched in {:.0} ms",
                summary.back.blocks_compared, summary.back.bytes_ratio, summary.back.switch_ms
            ),
        ),
    ]
}

fn points_of(status: &v1::GroupStatus) -> u64 {
    status.points.as_ref().map_or(0, |p| p.count)
}

async fn wait_protected(api: &mut Api, display: &Display) -> io::Result<v1::GroupStatus> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let status = api.group_status(GROUP).await?;
        if status.phase() == v1::Phase::Protected && status.rpo.as_ref().is_some_and(|r| r.now_us.is_some()) {
            return Ok(status);
        }
        if Instant::now() > until {
            let conditions: Vec<&str> = status.conditions.iter().map(|c| c.message.as_str()).collect();
            return fail(format!("not protected after 60 s: {:?}, {}", status.phase(), conditions.join("; ")));
        }
        display.live(&status, 0);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn export_names(view: &v1::View) -> io::Result<[String; 2]> {
    let of = |disk: &str| {
        view.exports
            .iter()
            .find(|e| e.disk == disk)
            .map(|e| e.export_name.clone())
            .ok_or_else(|| io::Error::other(format!("view {} shows no disk `{disk}`", view.name)))
    };
    Ok([of("data")?, of("log")?])
}

fn first_read(socket: &Path, export: &str) -> io::Result<()> {
    let mut client = crate::nbd_client::Client::connect(socket, export, Duration::from_secs(30))?;
    client.read(0, &mut [0; writer::BLOCK])
}

fn check_view(memory: &Memory, socket: &Path, exports: &[String; 2], blocks: &mut u64) -> io::Result<Verdict> {
    let state = read_state(socket, [&exports[0], &exports[1]])?;
    *blocks += state.blocks_read;
    check_prefix(memory, &state).map_err(io::Error::other)
}

/// What is missing must be no older than the RPO that was last shown; returns how much is missing, milliseconds.
fn check_loss(verdict: &Verdict, killed_at: u64, shown_at: u64, shown_us: u64) -> io::Result<f64> {
    let Some(oldest) = verdict.oldest_missing_ns else { return Ok(0.0) };
    let promised = shown_at.saturating_sub(shown_us.saturating_mul(1000));
    if oldest < promised {
        return fail(format!(
            "a write answered {:.1} ms before the RPO was last shown is missing, but the RPO shown was {:.1} ms",
            (shown_at - oldest) as f64 / 1e6,
            shown_us as f64 / 1e3
        ));
    }
    Ok(killed_at.saturating_sub(oldest) as f64 / 1e6)
}

/// Opens two cuts and a single write from the history and checks each.
async fn check_earlier(api: &mut Api, memory: &Memory, socket: &Path, display: &Display) -> io::Result<u64> {
    let cuts: Vec<v1::Point> = api
        .cuts(GROUP)
        .await?
        .into_iter()
        .filter(|p| p.cut.is_some() && p.wall_ns > memory.writes[memory.writes.len() / 10].sent_ns)
        .collect();
    if cuts.len() < 4 {
        return fail(format!("only {} cuts are held in the time of the load", cuts.len()));
    }
    let mut blocks = 0;
    for (id, cut) in [("early-cut", &cuts[cuts.len() / 4]), ("middle-cut", &cuts[cuts.len() / 2])] {
        let number = cut.cut.unwrap_or_default();
        let (view, exports) = open(api, id, v1::point_choice::At::Cut(number)).await?;
        let verdict = check_view(memory, socket, &exports, &mut blocks)?;
        check_cut_time(memory, &verdict, cut.wall_ns)?;
        api.close_view(&view.name).await?;
        display.line(&format!("   cut {number:<12} a prefix up to commit {}", verdict.committed));
    }
    // A single write: some records past a cut, so that no cut lies there. It and the one before it differ by at most
    // that one write.
    let seq = cuts[cuts.len() / 2].seq + 7;
    let mut held = Vec::new();
    for (id, seq) in [("before-write", seq - 1), ("single-write", seq)] {
        let (view, exports) = open(api, id, v1::point_choice::At::Seq(seq)).await?;
        let state = read_state(socket, [&exports[0], &exports[1]])?;
        blocks += state.blocks_read;
        let verdict = check_prefix(memory, &state).map_err(io::Error::other)?;
        api.close_view(&view.name).await?;
        held.push((state, verdict));
    }
    let (before, after) = (&held[0].0, &held[1].0);
    let differing = after.blocks.iter().filter(|(place, stamp)| before.blocks.get(place) != Some(stamp)).count();
    if differing != 1 {
        return fail(format!("points {} and {seq} differ in {differing} blocks instead of one", seq - 1));
    }
    display.line(&format!(
        "   write {seq:<10} a prefix up to commit {}; one block apart from the write before it",
        held[1].1.committed
    ));
    Ok(blocks)
}

/// What was answered before the cut's time is in it; what was sent after it is not. One host, one clock.
fn check_cut_time(memory: &Memory, verdict: &Verdict, wall_ns: u64) -> io::Result<()> {
    for written in &memory.writes {
        if written.answered_ns < wall_ns && written.transaction > verdict.committed + 1 {
            return fail(format!("write {} was answered before the cut, but is not in it", written.write));
        }
        if written.sent_ns > wall_ns && written.transaction <= verdict.committed {
            return fail(format!("write {} was sent after the cut, but is in it", written.write));
        }
    }
    Ok(())
}

async fn open(api: &mut Api, id: &str, at: v1::point_choice::At) -> io::Result<(v1::View, [String; 2])> {
    let view = api.open_view(GROUP, id, at).await?;
    let exports = export_names(&view)?;
    Ok((view, exports))
}
