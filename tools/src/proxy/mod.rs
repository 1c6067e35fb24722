//! `afterimage proxy`: the role that carries the data plane.
//!
//! ```text
//!              service thread (tokio-uring)                    data threads (each its own ring)
//!  agent ──── gRPC to the coordinator, desired state ┐
//!  service ── accepts, handshakes (link)  ───────────┼─ commands ▶ source core + NBD of the machines
//!             hands sockets over                     ┘ ◀─ events ─ target core + NBD of the views
//! ```
//! The data threads know nothing of TLS, gRPC or certificates; the service thread touches no data.

use std::process::ExitCode;

pub mod config;
pub mod identity;
mod keep;
pub mod link;
pub mod runtime;
pub mod standalone;
pub mod throwaway;

pub use config::Args;

/// Runs the proxy until it is told to stop.
pub fn run(_args: Args) -> ExitCode {
    eprintln!("afterimage: proxy: not available in this build");
    ExitCode::FAILURE
}
