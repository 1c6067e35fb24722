//! `afterimage bench`: measurements side by side with other software.

use std::process::ExitCode;

/// Options of `afterimage bench`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the benchmark.
pub fn run(_args: Args) -> ExitCode {
    eprintln!("afterimage: bench: not available in this build");
    ExitCode::FAILURE
}
