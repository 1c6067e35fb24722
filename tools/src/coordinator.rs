//! `afterimage coordinator`: the role that holds the desired state, the certificate authority and the operations.

use std::process::ExitCode;

/// Options of `afterimage coordinator`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the coordinator until it is told to stop.
pub fn run(_args: Args) -> ExitCode {
    eprintln!("afterimage: coordinator: not available in this build");
    ExitCode::FAILURE
}
