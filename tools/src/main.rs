//! The `afterimage` command: three roles in one binary. [`coordinator`] and [`proxy`] run until stopped; everything
//! else is the operator's commands, the demo and the benchmark.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod coordinator;
mod demo;
mod proxy;

/// Continuous data protection for Linux.
#[derive(Parser, Debug)]
#[command(name = "afterimage", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the coordinator.
    Coordinator(coordinator::Args),
    /// Run a proxy.
    Proxy(proxy::Args),
    /// Protect two disks on this host, lose their source, start from the replica.
    Demo(demo::Args),
    /// Measure, side by side with other software.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Coordinator(args) => coordinator::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
    }
}
