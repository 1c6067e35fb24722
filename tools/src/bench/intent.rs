//! What the write-intent log costs where it is worst: random writes all over a large sparse disk, so that most of them meet
//! an extent whose bit is not set.

use std::fs::File;
use std::io;
use std::path::Path;

use super::IntentArgs;
use super::compare::round;
use super::fio::{self, JOBS, Measured};
use super::paired::Ratio;
use super::protected::{self, Setting};

/// Runs it and prints it.
///
/// # Errors
/// fio is missing, a process does not come up, or a run fails: no figure is printed then.
pub fn run(args: &IntentArgs) -> io::Result<()> {
    let root = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let memory = tempfile::tempdir_in(&args.memory)?;
    println!(
        "{} pairs of {} s each, sparse disks of {} GiB; the log beside the disk over the log in memory: median [lowest–highest]",
        args.pairs, args.seconds, args.disk_gib
    );
    println!("{:<5} {:>18} {:>18}", "job", "writes/s", "mean latency");
    let mut ratios = serde_json::Map::new();
    for job in JOBS.iter().filter(|job| job.rw == "randwrite") {
        let mut pairs: Vec<(Measured, Measured)> = Vec::new();
        for _ in 0..args.pairs {
            let beside = one(args, &root.path().join("beside"), None, job)?;
            let within = one(args, &root.path().join("memory"), Some(memory.path()), job)?;
            pairs.push((beside, within));
        }
        let of = |what: fn(&Measured) -> f64| {
            let values: Vec<_> = pairs.iter().map(|(beside, within)| (what(beside), what(within))).collect();
            Ratio::of(&values)
        };
        let iops = of(|m| m.iops);
        println!("{:<5} {:>18} {:>18}", job.name, iops.to_string(), of(|m| m.mean_us).to_string());
        ratios.insert(format!("intent_{}", job.name), round(iops.median));
    }
    if args.json {
        println!("{}", serde_json::json!({ "ratios": ratios }));
    }
    Ok(())
}

/// A run on a disk that earlier runs may have written.
fn one(args: &IntentArgs, dir: &Path, state: Option<&Path>, job: &fio::Job) -> io::Result<Measured> {
    std::fs::create_dir_all(dir)?;
    let disk = dir.join("disk.img");
    if !disk.exists() {
        File::create_new(&disk)?.set_len(args.disk_gib << 30)?;
    }
    let server = protected::start(dir, &disk, Setting { queue_mib: None, state })?;
    fio::run(job, &server.socket, &server.export, args.seconds, args.disk_gib << 10)
}
