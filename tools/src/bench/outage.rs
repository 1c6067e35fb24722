//! How long a host waits for its writes while the target is gone, against while it is there: the upper rungs of the outage
//! ladder must not be felt.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::OutageArgs;
use super::compare::{fill, round};
use super::fio::{self, JOBS, Measured};
use super::paired::Ratio;
use super::protected::{self, Setting};

/// A rung, and the queue that makes a run stay on it.
const RUNGS: [(&str, Option<u64>); 2] = [("memory", None), ("spill", Some(32))];
/// Until the source has noticed that its target is gone.
const NOTICE: Duration = Duration::from_millis(500);

/// Runs it and prints it.
///
/// # Errors
/// fio is missing, a process does not come up, or a run fails: no figure is printed then.
pub fn run(args: &OutageArgs) -> io::Result<()> {
    let root = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    println!(
        "{} pairs of {} s each, a disk of {} MiB; latency with the target gone over that with it: median [lowest–highest]",
        args.pairs, args.seconds, args.disk_mib
    );
    println!("{:<7} {:<5} {:>18} {:>18} {:>18}", "rung", "job", "mean", "99th percentile", "writes/s");
    let mut ratios = serde_json::Map::new();
    for (rung, queue_mib) in RUNGS {
        let dir = root.path().join(rung);
        std::fs::create_dir(&dir)?;
        for job in JOBS.iter().filter(|job| job.rw == "randwrite") {
            let mut pairs = Vec::new();
            for _ in 0..args.pairs {
                pairs.push(pair(args, &dir, Setting { queue_mib, state: None }, job)?);
            }
            let of = |what: fn(&Measured) -> f64| {
                let values: Vec<_> = pairs.iter().map(|(gone, there)| (what(gone), what(there))).collect();
                Ratio::of(&values)
            };
            let (mean, p99) = (of(|m| m.mean_us), of(|m| m.p99_us));
            let (mean_text, p99_text) = (mean.to_string(), p99.to_string());
            println!("{rung:<7} {:<5} {mean_text:>18} {p99_text:>18} {:>18}", job.name, of(|m| m.iops).to_string());
            ratios.insert(format!("{rung}_{}_mean", job.name), round(mean.median));
            ratios.insert(format!("{rung}_{}_p99", job.name), round(p99.median));
        }
    }
    if args.json {
        println!("{}", serde_json::json!({ "ratios": ratios }));
    }
    Ok(())
}

/// With the target gone, and with it there, in the same life of the source.
fn pair(args: &OutageArgs, dir: &Path, setting: Setting<'_>, job: &fio::Job) -> io::Result<(Measured, Measured)> {
    let disk = dir.join("disk.img");
    fill(&disk, args.disk_mib)?;
    let mut server = protected::start(dir, &disk, setting)?;
    let there = fio::run(job, &server.socket, &server.export, args.seconds, args.disk_mib)?;
    server.kill(0)?;
    std::thread::sleep(NOTICE);
    let gone = fio::run(job, &server.socket, &server.export, args.seconds, args.disk_mib)?;
    Ok((gone, there))
}
