//! The `afterimage` command: three roles in one binary. [`coordinator`] and [`proxy`] run until stopped; everything
//! else is the [`operator`]'s commands, the demo and the benchmark.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod coordinator;
mod demo;
mod doctor;
mod init;
mod journal;
mod manual;
mod nbd_client;
mod operator;
mod proxy;
mod ublk;

/// Continuous data protection for Linux: every write of the last hours is a restore point.
#[derive(Parser, Debug)]
#[command(name = "afterimage", version, propagate_version = true, max_term_width = 100, after_help = operator::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the coordinator: policies, restore points, failover.
    Coordinator(coordinator::Args),
    /// Run a proxy: at the disks, or at the journal.
    Proxy(proxy::Args),
    /// A journal folder by itself: what is in it, and any point of it as disks.
    Journal(journal::Args),
    /// The block devices of this host that disks have.
    Ublk(ublk::Args),
    #[command(flatten)]
    Operator(operator::Command),
    /// Protect two disks on this host, lose their source, start from the replica.
    Demo(demo::Args),
    /// Measure, side by side with other software.
    Bench(bench::Args),
    /// Print what lets a shell complete commands and options.
    Completions(manual::Completions),
    /// Write a manual page for each command into a folder.
    Man(manual::Man),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return unread(&error),
    };
    match cli.command {
        Command::Coordinator(args) => coordinator::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Journal(args) => journal::run(args),
        Command::Ublk(args) => ublk::run(args),
        Command::Operator(command) => operator::run(command),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Completions(args) => manual::completions(args),
        Command::Man(args) => manual::man(args),
    }
}

/// A command line that is not understood, or that asks for help. A program that reads JSON gets the error as such, too.
fn unread(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        // The first paragraph says what is wrong; the rest is usage for a person.
        let text = error.render().to_string();
        let message = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        return operator::report(&operator::failure::Failure::usage(message), true);
    }
    // Nothing can be done about a terminal that is gone.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    fn each(command: &clap::Command, path: &str, see: &mut impl FnMut(&str, &clap::Command)) {
        for sub in command.get_subcommands() {
            let path = format!("{path} {}", sub.get_name());
            see(&path, sub);
            each(sub, &path, see);
        }
    }

    #[test]
    fn every_command_and_option_says_what_it_is() {
        let mut silent = Vec::new();
        each(&Cli::command(), "afterimage", &mut |path, command| {
            if command.get_about().is_none() {
                silent.push(path.to_owned());
            }
            for arg in command.get_arguments().filter(|arg| arg.get_help().is_none()) {
                silent.push(format!("{path}: {}", arg.get_id()));
            }
        });
        assert!(silent.is_empty(), "without a word of help: {silent:?}");
    }

    #[test]
    fn examples_fit_the_help() {
        let mut wide = Vec::new();
        each(&Cli::command(), "afterimage", &mut |path, command| {
            // Prose is wrapped; a command line with its comment beside it must not be.
            let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            wide.extend(
                text.lines()
                    .filter(|l| l.starts_with("  ") && l.chars().count() > 100)
                    .map(|line| format!("{path}: {line}")),
            );
        });
        assert!(wide.is_empty(), "{wide:#?}");
    }

    #[test]
    fn operators_commands_take_json_before_and_after_the_verb() {
        for line in [
            "afterimage group --json list",
            "afterimage group list --json",
            "afterimage proxies --json",
            "afterimage status shop --json --check",
            "afterimage failover start shop --to cut:7 --unconfirmed shop --dry-run --yes",
            "afterimage point list shop --after -10m",
            "afterimage point show shop --at -10m",
            "afterimage point show shop time:-5m",
            "afterimage token create src --role proxy --ttl 1h",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "afterimage failover start shop",
            "afterimage failover start shop --to newest",
            "afterimage failover start shop --to latest --dryrun",
            "afterimage point show shop latest --seq 5",
            "afterimage policy create gold --retention 5",
            "afterimage group create shop --policy p --source a --target b --disk data",
            "afterimage frobnicate",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
