//! The comparison: which servers meet in which pairs, the medians, spreads and ratios.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::CompareArgs;
use super::fio::{self, JOBS, Job, Measured};
use super::protected::Setting;
use super::servers::{self, Server};

/// One measured run.
#[derive(Copy, Clone, Debug)]
struct Run {
    fio: Measured,
    ios_per_cpu: f64,
}

/// A comparison: ours over another.
struct Versus {
    key: &'static str,
    ours: &'static str,
    other: &'static str,
}

const VERSUS: [Versus; 3] = [
    Versus { key: "nbd", ours: "afterimage", other: "qemu-storage-daemon" },
    Versus { key: "protected", ours: "afterimage protected", other: "qemu-storage-daemon" },
    Versus { key: "vs_mirror", ours: "afterimage protected", other: "qemu-storage-daemon mirroring" },
];

/// Runs the comparison and prints it.
///
/// # Errors
/// A tool is missing, a server does not come up, or a run fails: no figure is printed then.
pub fn run(args: &CompareArgs) -> io::Result<()> {
    let jobs: Vec<Job> = JOBS.iter().copied().filter(|j| args.only.iter().any(|o| o == j.name)).collect();
    if jobs.len() != args.only.len() {
        return Err(io::Error::other(format!("--only {}: allowed are qd1, qd32, seq", args.only.join(","))));
    }
    let dir = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    println!(
        "{} pairs of {} s each, disks of {} MiB in {}; medians, with the lowest and highest of the runs",
        args.pairs,
        args.seconds,
        args.disk_mib,
        dir.path().display()
    );
    let mut ratios = serde_json::Map::new();
    for versus in &VERSUS {
        println!("\n{} against {}", versus.ours, versus.other);
        println!(
            "{:<5} {:>24} {:>24} {:>7} {:>7}  {:>9} {:>9}",
            "job", "ours writes/s", "other writes/s", "ratio", "p99", "ours", "other"
        );
        println!("{:<5} {:>24} {:>24} {:>7} {:>7}  {:>19}", "", "", "", "", "ratio", "writes/CPU second");
        for job in &jobs {
            let (ours, other) = measure(args, dir.path(), versus, job)?;
            let ratio = median_ratio(&ours, &other, |r| r.fio.iops);
            let p99 = median_ratio(&ours, &other, |r| r.fio.p99_us);
            println!(
                "{:<5} {:>24} {:>24} {:>7.2} {:>7.2}  {:>9.0} {:>9.0}",
                job.name,
                spread(&ours, |r| r.fio.iops),
                spread(&other, |r| r.fio.iops),
                ratio,
                p99,
                median(&ours, |r| r.ios_per_cpu),
                median(&other, |r| r.ios_per_cpu),
            );
            ratios.insert(format!("{}_{}", versus.key, job.name), round(ratio));
            if versus.key == "nbd" && job.name == "qd32" {
                ratios.insert("nbd_ios_per_cpu_s".into(), round(median_ratio(&ours, &other, |r| r.ios_per_cpu)));
            }
        }
    }
    if args.json {
        println!("{}", serde_json::json!({ "ratios": ratios }));
    }
    Ok(())
}

pub fn round(value: f64) -> serde_json::Value {
    serde_json::json!((value * 1000.0).round() / 1000.0)
}

/// A B A B …: each server is started anew for each run, on a disk that was filled once.
fn measure(args: &CompareArgs, dir: &Path, versus: &Versus, job: &Job) -> io::Result<(Vec<Run>, Vec<Run>)> {
    let disk_ours = dir.join("ours.img");
    let disk_other = dir.join("other.img");
    let copy = dir.join("copy.img");
    for disk in [&disk_ours, &disk_other, &copy] {
        fill(disk, args.disk_mib)?;
    }
    let (mut ours, mut other) = (Vec::new(), Vec::new());
    for pair in 0..args.pairs {
        eprint!("\r{} {} pair {}/{} ", versus.key, job.name, pair + 1, args.pairs);
        let server = match versus.key {
            "nbd" => servers::ours(dir, "ours", &disk_ours)?,
            _ => super::protected::start(dir, &disk_ours, Setting::default())?,
        };
        ours.push(one(args, job, server)?);
        let server = match versus.key {
            "vs_mirror" => servers::peer_with_mirror(dir, "other", &disk_other, &copy)?,
            _ => servers::peer(dir, "other", &disk_other)?,
        };
        other.push(one(args, job, server)?);
    }
    eprint!("\r{:40}\r", "");
    Ok((ours, other))
}

fn one(args: &CompareArgs, job: &Job, server: Server) -> io::Result<Run> {
    let before = server.cpu_seconds()?;
    let fio = fio::run(job, &server.socket, &server.export, args.seconds, args.disk_mib)?;
    let cpu = server.cpu_seconds()? - before;
    // The ramp second is in the CPU time but not in fio's count: scale it out by the rate.
    let ios = fio.iops * f64::from(args.seconds + 1);
    Ok(Run { fio, ios_per_cpu: ios / cpu.max(0.01) })
}

/// Writes the disk full of what does not compress to nothing, so that no run meets unwritten extents.
pub fn fill(path: &Path, mib: u64) -> io::Result<()> {
    if path.metadata().is_ok_and(|m| m.len() == mib << 20) {
        return Ok(());
    }
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    let mut block = vec![0u8; 1 << 20];
    let mut state = 0x853c_49e6_748f_ea9bu64;
    for _ in 0..mib {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()
}

fn sorted(runs: &[Run], of: impl Fn(&Run) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values
}

pub fn middle(values: &[f64]) -> f64 {
    let n = values.len();
    if n % 2 == 1 { values[n / 2] } else { (values[n / 2 - 1] + values[n / 2]) / 2.0 }
}

fn median(runs: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    middle(&sorted(runs, of))
}

/// Median of the ratios pair by pair: a drift of the machine is in both halves of a pair.
fn median_ratio(ours: &[Run], other: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    let mut ratios: Vec<f64> = ours.iter().zip(other).map(|(a, b)| of(a) / of(b).max(f64::MIN_POSITIVE)).collect();
    ratios.sort_by(f64::total_cmp);
    middle(&ratios)
}

fn spread(runs: &[Run], of: impl Fn(&Run) -> f64) -> String {
    let values = sorted(runs, of);
    format!("{:.0} [{:.0}–{:.0}]", middle(&values), values[0], values[values.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(iops: f64) -> Run {
        Run { fio: Measured { iops, ios: iops, mean_us: 1.0, p99_us: 1.0 }, ios_per_cpu: iops }
    }

    #[test]
    fn the_ratio_is_the_median_of_the_pairs() {
        let ours = [run_of(10.0), run_of(20.0), run_of(90.0)];
        let other = [run_of(10.0), run_of(10.0), run_of(30.0)];
        assert_eq!(median_ratio(&ours, &other, |r| r.fio.iops), 2.0);
        assert_eq!(spread(&ours, |r| r.fio.iops), "20 [10–90]");
    }
}
