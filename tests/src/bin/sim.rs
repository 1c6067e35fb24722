//! Plays seeds of the simulator; a seed that fails is printed with the command that plays it again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use afterimage_tests::plan::Plan;
use afterimage_tests::run::{Report, run};
use clap::Parser;

/// Plays the source, the network and the target in one simulated world, seed by seed, and checks every restore point.
#[derive(Parser)]
#[command(name = "sim")]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Go on after a failure, and count.
    #[arg(long)]
    keep_going: bool,
    /// Threads; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    jobs: usize,
    /// Play each seed twice: it must come out the same to the nanosecond, or no failure could be replayed.
    #[arg(long)]
    twice: bool,
    /// Print the plan and what happens.
    #[arg(short, long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let jobs = match args.jobs {
        _ if args.verbose => 1,
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        jobs => jobs,
    };
    let begun = Instant::now();
    let (next, failed, total) = (AtomicU64::new(args.from), Mutex::new(Vec::new()), Mutex::new(Report::default()));
    let end = args.from.saturating_add(args.seeds);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || (!args.keep_going && !failed.lock().expect("not poisoned").is_empty()) {
                        return;
                    }
                    let first = play(seed, args.verbose);
                    let result = match first {
                        Ok(first) if args.twice => match play(seed, false) {
                            Ok(second) if second == first => Ok(first),
                            other => Err(format!("comes out as {first:?} and then as {other:?}")),
                        },
                        other => other,
                    };
                    match result {
                        Ok(report) => {
                            let mut total = total.lock().expect("not poisoned");
                            total.requests += report.requests;
                            total.records += report.records;
                            total.points += report.points;
                            total.time += report.time;
                        }
                        Err(what) => {
                            println!("seed {seed}: {what}\n  again: tests/sim --from {seed} --seeds 1 -v");
                            failed.lock().expect("not poisoned").push(seed);
                        }
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().expect("not poisoned");
    failed.sort_unstable();
    let total = total.into_inner().expect("not poisoned");
    let played = next.into_inner().min(end) - args.from;
    println!(
        "{played} seeds in {:.1} s ({:.0} s simulated): {} requests, {} records, {} restore points compared; {} failed",
        begun.elapsed().as_secs_f64(),
        total.time as f64 / 1e9,
        total.requests,
        total.records,
        total.points,
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        println!("failed: {failed:?}");
        ExitCode::FAILURE
    }
}

fn play(seed: u64, verbose: bool) -> Result<Report, String> {
    let plan = Plan::roll(seed);
    if verbose {
        println!("{plan:#?}");
    }
    match catch_unwind(AssertUnwindSafe(|| run(plan, verbose))) {
        Ok(Ok(report)) => Ok(report),
        Ok(Err(failure)) => Err(format!("at {:.3} ms: {}", failure.at as f64 / 1e6, failure.what)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}
