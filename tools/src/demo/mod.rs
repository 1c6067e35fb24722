//! `afterimage demo`: the product's main job with real processes on one host.

use std::process::ExitCode;

/// Options of `afterimage demo`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the demo.
pub fn run(_args: Args) -> ExitCode {
    eprintln!("afterimage: demo: not available in this build");
    ExitCode::FAILURE
}
