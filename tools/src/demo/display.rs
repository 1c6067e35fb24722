//! What the demo shows: headlines, one live line, a summary.

use std::time::Duration;

use afterimage_wire::v1;
use indicatif::{ProgressBar, ProgressStyle};

/// Milliseconds with a unit, from microseconds.
pub fn ms(us: Option<u64>) -> String {
    match us {
        None => "unknown".to_owned(),
        Some(us) if us < 10_000 => format!("{:.2} ms", us as f64 / 1e3),
        Some(us) if us < 100_000 => format!("{:.1} ms", us as f64 / 1e3),
        Some(us) => format!("{:.0} ms", us as f64 / 1e3),
    }
}

/// The demo's output. Everything but the summary goes to standard error, so that `--json` stays one line.
pub struct Display {
    live: ProgressBar,
}

impl Display {
    /// A display on the terminal.
    pub fn new() -> Self {
        let live = ProgressBar::no_length();
        live.set_style(
            ProgressStyle::with_template("   {spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self { live }
    }

    /// A stage begins.
    pub fn headline(&self, text: &str) {
        self.line(&format!("\n{text}"));
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        self.live.suspend(|| eprintln!("{text}"));
    }

    /// Refreshes the live line.
    pub fn live(&self, status: &v1::GroupStatus, answered: u64) {
        self.live.enable_steady_tick(Duration::from_millis(100));
        let rpo = status.rpo.as_ref();
        let points = status.points.as_ref().map_or(0, |p| p.count);
        let text = match (&status.sync, status.phase()) {
            (Some(sync), v1::Phase::Syncing) if sync.total_bytes > 0 => {
                format!("first synchronisation: {} of {} MiB", sync.done_bytes >> 20, sync.total_bytes >> 20)
            }
            _ => {
                let wire = status.wire_bytes_per_s.max(1.0);
                format!(
                    "{:>6.0} writes/s · {:>5.1} MB/s captured · {:>5.1} MB/s on the wire (ratio {:.2}) · RPO {} p99 {} · {} points · {} answered",
                    status.writes_per_s,
                    status.captured_bytes_per_s / 1e6,
                    status.wire_bytes_per_s / 1e6,
                    status.captured_bytes_per_s / wire,
                    ms(rpo.and_then(|r| r.now_us)),
                    ms(rpo.and_then(|r| r.p99_us)),
                    points,
                    answered,
                )
            }
        };
        self.live.set_message(text);
    }

    /// Refreshes the live line during a failback.
    pub fn reverse(&self, reverse: &v1::ReverseStatus, answered: u64) {
        self.live.enable_steady_tick(Duration::from_millis(100));
        let progress = reverse.sync.as_ref().map_or_else(
            || reverse.missing.clone(),
            |sync| format!("{} of {} MiB compared", sync.done_bytes >> 20, sync.total_bytes >> 20),
        );
        let sent = reverse.wire_bytes as f64 / 1e6;
        self.live.set_message(format!("{progress} · {sent:.1} MB sent · {answered} writes answered meanwhile"));
    }

    /// Leaves the last live line standing.
    pub fn end_live(&self) {
        let last = self.live.message();
        self.live.disable_steady_tick();
        self.live.finish_and_clear();
        eprintln!("   {last}");
    }

    /// The end.
    pub fn summary(&self, rows: &[(&str, String)]) {
        self.live.finish_and_clear();
        println!("\nVerified.");
        for (name, value) in rows {
            println!("   {name:<28}{value}");
        }
    }

    /// How to look around.
    pub fn keep(&self, commands: &[String]) {
        println!("\nEverything is still running. To look around:");
        for command in commands {
            println!("   {command}");
        }
    }
}
