//! `afterimage proxy`: the role that carries the data plane.

use std::process::ExitCode;

/// Options of `afterimage proxy`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the proxy until it is told to stop.
pub fn run(_args: Args) -> ExitCode {
    eprintln!("afterimage: proxy: not available in this build");
    ExitCode::FAILURE
}
