//! `cargo run --release -p afterimage-fuzz -- --seconds 60`: every body, or those named, for so long each. An input that
//! fails is written to a file, with the command that replays it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use afterimage_fuzz::{TARGETS, Target, soak, target};
use clap::Parser;

/// Feeds hostile bytes to everything that reads bytes of others.
#[derive(Parser, Debug)]
struct Args {
    /// Only this body; may be repeated.
    #[arg(long)]
    target: Vec<String>,
    /// Seconds for each body.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// The same inputs again.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Feed this file once, to the body named by --target.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Where inputs that fail are written.
    #[arg(long, default_value = ".")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut chosen: Vec<&Target> = Vec::new();
    for name in &args.target {
        match target(name) {
            Some(target) => chosen.push(target),
            None => {
                let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
                eprintln!("--target is `{name}`; allowed: {}", names.join(", "));
                return ExitCode::from(2);
            }
        }
    }
    if let Some(path) = &args.replay {
        return replay(path, &chosen);
    }
    if chosen.is_empty() {
        chosen.extend(TARGETS);
    }
    let mut failed = false;
    for target in chosen {
        let end = Instant::now() + Duration::from_secs(args.seconds);
        match soak::run(target, args.seed, |_| Instant::now() >= end) {
            Ok(done) => {
                let (slowest, input) = done.slowest;
                println!("ok - {}: {} inputs, the slowest took {} ms", target.name, done.inputs, slowest.as_millis());
                if slowest > Duration::from_secs(5) {
                    println!("     its {} bytes are in {}", input.len(), keep(&args.out, target, "slow", &input));
                }
            }
            Err(failure) => {
                failed = true;
                let path = keep(&args.out, target, "crash", &failure.input);
                println!("not ok - {}: input {} of seed {}", target.name, failure.number, args.seed);
                println!("     replay: cargo run -p afterimage-fuzz -- --target {} --replay {path}", target.name);
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn replay(path: &PathBuf, chosen: &[&Target]) -> ExitCode {
    let [target] = chosen else {
        eprintln!("--replay wants exactly one --target");
        return ExitCode::from(2);
    };
    match std::fs::read(path) {
        Ok(input) => {
            (target.body)(&input);
            println!("ok - {}: {} bytes", target.name, input.len());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}: {error}", path.display());
            ExitCode::from(2)
        }
    }
}

fn keep(folder: &std::path::Path, target: &Target, what: &str, input: &[u8]) -> String {
    let path = folder.join(format!("{what}-{}-{:08x}", target.name, crc32c::crc32c(input)));
    match std::fs::write(&path, input) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("(not kept: {error})"),
    }
}
