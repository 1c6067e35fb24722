//! `afterimage bench`: measurements side by side with other software, on this machine, in one run.

use std::path::PathBuf;
use std::process::ExitCode;

mod compare;
mod coordinator;
mod fio;
mod intent;
mod interrupt;
mod outage;
mod paired;
mod protected;
mod servers;

/// Options of `afterimage bench`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// Drive our NBD front end and qemu-storage-daemon's with the same fio job, in turn.
    Compare(CompareArgs),
    /// Latency of a protected disk's writes while its target is gone, against those while it is there.
    Outage(OutageArgs),
    /// What the write-intent log costs under random writes all over a large sparse disk.
    Intent(IntentArgs),
    /// How much of a machine a coordinator takes, with simulated proxies and groups.
    Coordinator(CoordinatorArgs),
}

/// Options of `afterimage bench coordinator`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
For capacity planning: a real coordinator on loopback, proxies that only say what proxies say, calls at a steady rate. CPU
time and memory are those of the coordinator's process; the proxies run in this one, on the same cores.

Examples:
  afterimage bench coordinator
  afterimage bench coordinator --groups 1000 --proxies 50 --seconds 60 --json
  afterimage bench coordinator --groups 20 --proxies 2 --seconds 2      # a quick look, not a result")]
pub struct CoordinatorArgs {
    /// Groups, of one disk each.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    groups: u32,
    /// Proxies; each is a source and a target.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(2..=400))]
    proxies: u32,
    /// Seconds that are measured, once everything is protected.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Folder for the coordinator's state (default: the system's temporary folder).
    #[arg(long)]
    dir: Option<PathBuf>,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Options of `afterimage bench outage`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Needs fio (with its nbd engine). For each pair the same job runs with the target there and, right after, with the target
killed: once with room for all of it in memory, once with so little that frames queue in the spill.

Examples:
  afterimage bench outage
  afterimage bench outage --pairs 9 --dir /var/tmp --json")]
pub struct OutageArgs {
    /// Measured pairs of each rung and job.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Seconds of each run.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Size of the disk in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    disk_mib: u64,
    /// Folder for the disks and sockets; must be on a real disk (default: the system's temporary folder).
    #[arg(long)]
    dir: Option<PathBuf>,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Options of `afterimage bench intent`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Needs fio (with its nbd engine). Both sides are protected pairs on sparse files of the same size, written at random; one has
its write-intent log (and the log's witness) beside the disk, the other in a folder in memory, where writing it costs next to
nothing.

Examples:
  afterimage bench intent
  afterimage bench intent --disk-gib 64 --pairs 3 --dir /var/tmp --json")]
pub struct IntentArgs {
    /// Measured pairs.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Seconds of each run.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Size of each disk in GiB.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=16_384))]
    disk_gib: u64,
    /// Folder for the disks and sockets; must be on a real disk (default: the system's temporary folder).
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Folder in memory that takes direct I/O.
    #[arg(long, default_value = "/dev/shm")]
    memory: PathBuf,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Options of `afterimage bench compare`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Needs fio (with its nbd engine) and qemu-storage-daemon. Both sides serve a preallocated raw file of the
same size in the same folder; runs alternate A B A B, so that a machine whose speed drifts hurts both.

Examples:
  afterimage bench compare
  afterimage bench compare --pairs 7 --seconds 10 --dir /var/tmp --json
  afterimage bench compare --only qd1,qd32 --pairs 1 --seconds 2     # a quick look, not a result")]
pub struct CompareArgs {
    /// Measured pairs of each comparison.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Seconds of each run.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Size of each disk in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    disk_mib: u64,
    /// Folder for the disks and sockets; must be on a real disk (default: the system's temporary folder).
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Only these jobs: qd1, qd32, seq.
    #[arg(long, value_delimiter = ',', default_value = "qd1,qd32,seq")]
    only: Vec<String>,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark.
pub fn run(args: Args) -> ExitCode {
    if let Err(error) = interrupt::watch() {
        eprintln!("afterimage bench: signals cannot be caught: {error}");
        return ExitCode::FAILURE;
    }
    let (name, done) = match args.what {
        What::Compare(args) => ("compare", compare::run(&args)),
        What::Outage(args) => ("outage", outage::run(&args)),
        What::Intent(args) => ("intent", intent::run(&args)),
        What::Coordinator(args) => ("coordinator", coordinator::run(&args)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::interrupted() => {
            eprintln!("afterimage bench {name}: interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("afterimage bench {name}: {error}");
            ExitCode::FAILURE
        }
    }
}
