//! `afterimage bench`: measurements side by side with other software, on this machine, in one run.

use std::path::PathBuf;
use std::process::ExitCode;

mod compare;
mod fio;
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
    match args.what {
        What::Compare(args) => match compare::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("afterimage bench compare: {error}");
                ExitCode::FAILURE
            }
        },
    }
}
