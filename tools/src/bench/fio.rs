//! One run of fio against an NBD export, and what it measured.

use std::io;
use std::path::Path;
use std::process::Command;

/// A load.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Short name.
    pub name: &'static str,
    /// fio's `rw`.
    pub rw: &'static str,
    /// fio's `bs`.
    pub block: &'static str,
    /// fio's `iodepth`.
    pub depth: u32,
}

/// The jobs of the comparison.
pub const JOBS: [Job; 3] = [
    Job { name: "qd1", rw: "randwrite", block: "4k", depth: 1 },
    Job { name: "qd32", rw: "randwrite", block: "4k", depth: 32 },
    Job { name: "seq", rw: "write", block: "1m", depth: 8 },
];

/// What fio measured.
#[derive(Copy, Clone, Debug, Default)]
pub struct Measured {
    /// Writes per second.
    pub iops: f64,
    /// Writes done in all.
    pub ios: f64,
    /// Mean of the completion latency, µs.
    pub mean_us: f64,
    /// 99th percentile of the completion latency, µs.
    pub p99_us: f64,
}

/// Runs `job` for `seconds` against `export` at `socket`.
///
/// The data compresses by about 40% (`buffer_compress_percentage`), as database pages do, and is refilled for every
/// write, so that nobody profits from repetition.
///
/// # Errors
/// fio is missing, fails, or prints something else than its JSON.
pub fn run(job: &Job, socket: &Path, export: &str, seconds: u32, size_mib: u64) -> io::Result<Measured> {
    let output = Command::new("fio")
        .args(["--name=compare", "--ioengine=nbd", "--output-format=json", "--group_reporting"])
        .arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()))
        .arg(format!("--rw={}", job.rw))
        .arg(format!("--bs={}", job.block))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--size={size_mib}m"))
        .args(["--time_based", &format!("--runtime={seconds}"), "--ramp_time=1"])
        .args(["--randrepeat=1", "--refill_buffers", "--buffer_compress_percentage=40", "--norandommap"])
        .output()
        .map_err(|e| io::Error::other(format!("fio does not start ({e}); on Debian: apt-get install fio")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(io::Error::other(format!("fio failed: {} {text}", String::from_utf8_lossy(&output.stderr))));
    }
    let json = text.find('{').map_or("", |at| &text[at..]);
    let parsed: serde_json::Value = serde_json::from_str(json).map_err(io::Error::other)?;
    let write = &parsed["jobs"][0]["write"];
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or(0.0);
    let measured = Measured {
        iops: number(&write["iops"]),
        ios: number(&write["total_ios"]),
        mean_us: number(&write["clat_ns"]["mean"]) / 1000.0,
        p99_us: number(&write["clat_ns"]["percentile"]["99.000000"]) / 1000.0,
    };
    if measured.ios < 1.0 || parsed["jobs"][0]["error"].as_i64() != Some(0) {
        return Err(io::Error::other(format!("fio wrote nothing or met an error against `{export}`")));
    }
    Ok(measured)
}
