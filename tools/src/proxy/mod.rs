//! `afterimage proxy`: the role that carries the data plane.
//!
//! ```text
//!              service thread (tokio-uring)                      data threads (each its own ring)
//!  agent ───── gRPC to the coordinator, desired state ┐
//!  converge ── brings the cores there                 │
//!  streams ─── handshakes (link) both ways            ├─ jobs ────▶ source core + NBD of the machines
//!  service ─── NBD clients, signals                   │ ◀─ events ─ target core + NBD of the views
//!  vhost ───── sockets of guests                      │
//!  commands, report ── steps of operations, status    ┘
//! ```
//! The data threads ([`runtime`], [`cores`]) know nothing of TLS, gRPC or certificates; the service thread touches no
//! data. Where desired state comes from ([`agent`], [`standalone`] or `--serve`) makes no difference to the rest.

use std::io::IsTerminal;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

mod agent;
mod branch;
mod commands;
pub mod config;
mod converge;
mod convert;
mod cores;
mod failback;
mod fronts;
mod given;
mod identity;
mod keep;
mod link;
mod local;
mod machines;
mod pins;
mod renewal;
mod report;
mod rescue;
mod room;
mod runtime;
mod service;
pub mod site;
pub mod standalone;
mod state;
mod streams;
mod throwaway;
pub mod ublk;
mod vhost;

pub use agent::BUNDLE_FILE;
pub use config::{Args, OpenJournal};
pub use identity::{Identity, Pems};
pub use local::{MAX_MESSAGE, SOCKET};
pub use rescue::serve_journal;
pub use state::known_targets;

use config::{Config, LogFormat};
use service::ServiceError;

/// Exit code for a configuration mistake, as for a wrong flag.
const MISCONFIGURED: u8 = 2;

/// Runs the proxy until it is told to stop. Exit code 0: stopped cleanly; 1: could not go on; 2: misconfigured.
pub fn run(args: Args) -> ExitCode {
    if let (Some(dir), Some(listen)) = (&args.new_pair, args.listen) {
        return match standalone::write_pair(dir, &listen.to_string(), &args.serve) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("afterimage: proxy: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let config = match Config::load(&args) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("afterimage: proxy: {error}");
            return ExitCode::from(MISCONFIGURED);
        }
    };
    log(config.log);
    match service::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ (ServiceError::Config(_) | ServiceError::NoUblk(_) | ServiceError::Given(_))) => {
            tracing::error!("{error}");
            ExitCode::from(MISCONFIGURED)
        }
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The log goes to standard error; `AFTERIMAGE_LOG` chooses what is in it.
fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("AFTERIMAGE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An error says that a log is set up already, which is as good.
    let _ = match format {
        LogFormat::Text => log.with_target(false).with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().try_init(),
    };
}
