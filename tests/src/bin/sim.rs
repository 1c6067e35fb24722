//! Plays seeds of the simulator; a seed that fails is printed with what it needs to fail, what happened, and the command
//! that plays it again.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use afterimage_dataplane::io::Nanos;
use afterimage_tests::pinned::PINNED;
use afterimage_tests::plan::{Plan, Theme};
use afterimage_tests::play::play;
use afterimage_tests::run::Report;
use afterimage_tests::shrink::shrink;
use afterimage_tests::trace;
use clap::Parser;

/// Plays the source, the network and the target in one simulated world, seed by seed, and checks every restore point.
#[derive(Parser)]
#[command(name = "sim")]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Go on after a failure, and count.
    #[arg(long)]
    keep_going: bool,
    /// Say how far it is after each so many seeds, with the seed to go on from; 0 for not at all.
    #[arg(long, default_value_t = 1000)]
    progress: u64,
    /// Threads; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    jobs: usize,
    /// Play each seed twice: it must come out the same to the nanosecond, or no failure could be replayed.
    #[arg(long)]
    twice: bool,
    /// Print the plan and what happens.
    #[arg(short, long)]
    verbose: bool,
    /// Of the plan's faults only these, by their places in it: `0,3`, or `none`.
    #[arg(long, value_parser = places)]
    keep: Option<Places>,
    /// How long the host works, nanoseconds, instead of what the plan says.
    #[arg(long)]
    length: Option<Nanos>,
    /// Only seeds of this theme: mixed, cycles, outage, badtarget, badsource, clocks, moments, folding or doubt.
    #[arg(long)]
    theme: Option<Theme>,
    /// Only the seeds that failed once.
    #[arg(long, conflicts_with = "seeds")]
    pinned: bool,
    /// Report a failure as it is, without looking for a smaller one.
    #[arg(long)]
    no_shrink: bool,
    /// Switch deliberate bugs on, one after the other, and see whether each is found; needs the feature `mutants`.
    #[arg(long)]
    mutants: bool,
    /// Only these deliberate bugs (`none` for the code as it is), by name. With `--verbose`: play the seeds with it.
    #[arg(long, value_delimiter = ',')]
    mutant: Vec<String>,
}

#[derive(Clone, Debug)]
struct Places(Vec<usize>);

fn places(text: &str) -> Result<Places, String> {
    if text == "none" {
        return Ok(Places(Vec::new()));
    }
    let numbers = text.split(',').map(|one| one.trim().parse().map_err(|e| format!("`{one}`: {e}")));
    Ok(Places(numbers.collect::<Result<_, _>>()?))
}

impl Args {
    fn plan(&self, seed: u64) -> Plan {
        let mut plan = Plan::roll(seed);
        if self.keep.is_some() || self.length.is_some() {
            let all = || (0..plan.faults.len()).collect();
            let kept = self.keep.as_ref().map_or_else(all, |places| places.0.clone());
            plan.keep(&kept, self.length.unwrap_or(plan.length));
        }
        plan
    }

    fn jobs(&self) -> usize {
        match self.jobs {
            _ if self.verbose => 1,
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            jobs => jobs,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    // A failure is told once, with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    if args.mutants || !args.mutant.is_empty() { mutants(&args) } else { seeds(&args, || ()) }
}

/// Plays them all; `prepare` is called first in each thread that plays.
fn seeds(args: &Args, prepare: impl Fn() + Sync) -> ExitCode {
    let begun = Instant::now();
    let total = Mutex::new(Total { next: args.from, ..Total::default() });
    let end = if args.pinned { u64::MAX } else { args.from.saturating_add(args.seeds) };
    let lock = || total.lock().expect("not poisoned");
    std::thread::scope(|scope| {
        for _ in 0..args.jobs() {
            scope.spawn(|| {
                prepare();
                loop {
                    let next = lock().begin(args, end);
                    let Some(seed) = next else { return };
                    let result = one(args, seed);
                    let told = result.as_ref().err().map(|what| tell(args, seed, what));
                    let mut total = lock();
                    total.end(seed, result.ok());
                    if let Some(told) = told {
                        println!("{told}");
                    }
                    if args.progress > 0 && total.played.is_multiple_of(args.progress) {
                        let from = total.running.first().copied().unwrap_or(total.next);
                        println!("{}; go on with --from {from}", total.line(begun));
                    }
                }
            });
        }
    });
    let mut total = total.into_inner().expect("not poisoned");
    total.failed.sort_unstable();
    println!("{}", total.line(begun));
    if total.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        println!("failed: {:?}", total.failed);
        ExitCode::FAILURE
    }
}

/// What all seeds together have come to.
#[derive(Default)]
struct Total {
    sum: Report,
    played: u64,
    /// The next to begin.
    next: u64,
    running: BTreeSet<u64>,
    failed: Vec<u64>,
}

impl Total {
    /// The next seed to be played, if there is one.
    fn begin(&mut self, args: &Args, end: u64) -> Option<u64> {
        let wanted = |seed: &u64| args.theme.is_none_or(|theme| theme == Plan::roll(*seed).theme);
        let mut pinned = PINNED.iter().copied().filter(|seed| *seed >= self.next);
        let seed = if args.pinned { pinned.find(wanted) } else { (self.next..end).find(wanted) };
        let seed = seed.filter(|_| args.keep_going || self.failed.is_empty())?;
        self.next = seed + 1;
        self.running.insert(seed);
        Some(seed)
    }

    fn end(&mut self, seed: u64, report: Option<Report>) {
        self.running.remove(&seed);
        self.played += 1;
        if let Some(report) = report {
            self.sum.requests += report.requests;
            self.sum.records += report.records;
            self.sum.points += report.points;
            self.sum.time += report.time;
            // In whatever order seeds end.
            self.sum.trace = self.sum.trace.wrapping_add(report.trace);
        } else {
            self.failed.push(seed);
        }
    }

    fn line(&self, begun: Instant) -> String {
        let Self { sum, played, failed, .. } = self;
        format!(
            "{played} seeds in {:.1} s ({:.0} s simulated): {} requests, {} records, {} restore points compared; {} failed; trace {:016x}",
            begun.elapsed().as_secs_f64(),
            sum.time as f64 / 1e9,
            sum.requests,
            sum.records,
            sum.points,
            failed.len(),
            sum.trace
        )
    }
}

fn one(args: &Args, seed: u64) -> Result<Report, String> {
    let plan = args.plan(seed);
    if args.verbose {
        println!("{plan:#?}");
    }
    let first = play(plan.clone(), args.verbose)?;
    if args.twice {
        let second = play(plan, false);
        if second.as_ref() != Ok(&first) {
            return Err(format!("comes out as {first:?} and then as {second:?}"));
        }
    }
    Ok(first)
}

/// A failure as somebody wants to read it: what is left of the plan, the last things that happened, how to see it again.
fn tell(args: &Args, seed: u64, what: &str) -> String {
    let again = |options: &str| format!("again: tests/sim --from {seed} --seeds 1 -v{options}");
    if args.verbose || args.no_shrink || args.twice {
        return format!("seed {seed}: {what}\n  {}", again(""));
    }
    let shrunk = shrink(&args.plan(seed), |plan| play(plan.clone(), false).is_err());
    let smaller = play(shrunk.plan.clone(), false).err().unwrap_or_default();
    let mut text = format!("seed {seed}: {what}\n  cut down: {smaller}\n");
    for (at, fault) in &shrunk.plan.faults {
        text += &format!("  fault at {:.3} ms: {fault:?}\n", *at as f64 / 1e6);
    }
    for line in trace::last() {
        text += &format!("  | {line}\n");
    }
    text + "  " + &again(&format!(" {}", shrunk.options())) + "\n  whole: " + &again("")
}

#[cfg(not(feature = "mutants"))]
fn mutants(_: &Args) -> ExitCode {
    println!("this build cannot play them: `tests/sim --mutants` makes one that can");
    ExitCode::FAILURE
}

#[cfg(feature = "mutants")]
fn mutants(args: &Args) -> ExitCode {
    use afterimage_dataplane::mutant::{self, Mutant};
    use afterimage_tests::mutants::hunt;

    let parse = |name: &String| if name == "none" { Ok(None) } else { name.parse::<Mutant>().map(Some) };
    let named: Result<Vec<_>, _> = args.mutant.iter().map(parse).collect();
    let which = match named {
        Ok(named) if !named.is_empty() => named,
        Ok(_) => [None].into_iter().chain(Mutant::ALL.iter().copied().map(Some)).collect(),
        Err(why) => {
            println!("{why}; there are: {}", Mutant::ALL.iter().map(|m| m.name()).collect::<Vec<_>>().join(", "));
            return ExitCode::FAILURE;
        }
    };
    if args.verbose {
        return seeds(args, || mutant::set(which[0]));
    }
    let line = |verdict: &afterimage_tests::mutants::Verdict| {
        let name = verdict.mutant.map_or("none", Mutant::name);
        let seconds = verdict.seconds;
        match &verdict.found {
            Some((seed, what)) => {
                let what: String = what.lines().next().unwrap_or_default().chars().take(110).collect();
                format!("{name:<26} {seed:>6} {seconds:>7.1} s  {what}")
            }
            None => format!("{name:<26}  never {seconds:>7.1} s"),
        }
    };
    println!("{:<26} {:>6} {:>9}  what it looked like", "deliberate bug", "seed", "time");
    let verdicts =
        hunt(&which, args.from, args.seeds, args.theme, args.jobs(), |verdict| println!("{}", line(verdict)));
    let missed: Vec<_> = verdicts.iter().filter(|v| v.mutant.is_some() == v.found.is_none()).collect();
    println!("in the order of a write's path:");
    for verdict in &verdicts {
        println!("  {}\n      {}", line(verdict), verdict.mutant.map_or("the code as it is", Mutant::what));
    }
    let bugs = verdicts.iter().filter(|v| v.mutant.is_some()).count();
    let found = verdicts.iter().filter(|v| v.mutant.is_some() && v.found.is_some()).count();
    println!("{found} of {bugs} deliberate bugs found within {} seeds", args.seeds);
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
