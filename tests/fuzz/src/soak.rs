//! Drives a body without coverage feedback: random inputs, and mutations of the corpus and of the golden bytes. Needs
//! nothing but a stable compiler; where nightly is to be had, libFuzzer finds more in the same time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use afterimage_dataplane::io::sim::Rng;

use crate::Target;

/// Longest input that is made.
const LONGEST: u64 = 4096;

/// An input under which a body panicked.
#[derive(Debug)]
pub struct Failure {
    /// The input.
    pub input: Vec<u8>,
    /// Which of the run it was.
    pub number: u64,
}

/// What a run has done.
#[derive(Debug, Default)]
pub struct Done {
    /// Inputs.
    pub inputs: u64,
    /// Longest that one took, and which.
    pub slowest: (Duration, Vec<u8>),
}

/// The folder of this crate, with its corpus.
pub fn home() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Inputs to begin with: the corpus of the body, and the pinned bytes of every format.
pub fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let mut seeds = files(&home().join("corpus").join(target.name));
    for folder in ["../../wire/tests/golden", "../../dataplane/tests/golden"] {
        for text in files(&home().join(folder)) {
            seeds.extend(from_hex(&String::from_utf8_lossy(&text)).filter(|bytes| bytes.len() <= 1 << 16));
        }
    }
    seeds
}

/// Contents of the files of a folder, in the order of their names; none if there is no such folder.
pub fn files(folder: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths.iter().filter_map(|path| std::fs::read(path).ok()).collect()
}

/// Reads the notation of the golden bytes: hexadecimal lines, and `zeros N`.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for line in text.lines() {
        if let Some(count) = line.strip_prefix("zeros ") {
            out.resize(out.len() + count.trim().parse::<usize>().ok()?, 0);
            continue;
        }
        for pair in line.as_bytes().chunks(2) {
            out.push(u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?);
        }
    }
    Some(out)
}

/// Makes inputs: the same ones from the same seed.
#[derive(Debug)]
pub struct Maker {
    rng: Rng,
    seeds: Vec<Vec<u8>>,
}

impl Maker {
    /// From these seeds.
    pub fn new(seed: u64, seeds: Vec<Vec<u8>>) -> Self {
        Self { rng: Rng::new(seed), seeds }
    }

    /// The next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let rng = &mut self.rng;
        if self.seeds.is_empty() || rng.below(2) == 0 {
            let most = [16, 64, 256, LONGEST][rng.below(4) as usize];
            let mut bytes = vec![0; rng.below(most) as usize];
            rng.fill(&mut bytes);
            if rng.below(4) == 0 {
                // Choices are often small.
                bytes.iter_mut().for_each(|byte| *byte &= 15);
            }
            return bytes;
        }
        let mut bytes = self.seeds[rng.below(self.seeds.len() as u64) as usize].clone();
        for _ in 0..rng.below(6) {
            self.mutate(&mut bytes);
        }
        bytes
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let rng = &mut self.rng;
        // Half of the time where headers are.
        let within = if rng.below(2) == 0 { bytes.len().min(128) } else { bytes.len() };
        let at = rng.below(within as u64 + 1) as usize;
        match rng.below(8) {
            0 => bytes.truncate(at),
            1 => {
                let mut more = vec![0; rng.below(32) as usize];
                rng.fill(&mut more);
                bytes.splice(at..at, more);
            }
            2 => {
                let end = (at + rng.below(32) as usize).min(bytes.len());
                bytes.drain(at..end);
            }
            3 => {
                let number = [0, 1, u64::MAX, 1 << 63, 1 << 62, 0xffff_ffff, 4096][rng.below(7) as usize];
                let len = [1, 2, 4, 8][rng.below(4) as usize].min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
            }
            4 if !self.seeds.is_empty() => {
                let other = &self.seeds[rng.below(self.seeds.len() as u64) as usize];
                let from = rng.below(other.len() as u64 + 1) as usize;
                let piece = &other[from..(from + rng.below(64) as usize).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            5 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            _ if at < bytes.len() => bytes[at] = rng.below(256) as u8,
            _ => bytes.push(rng.below(256) as u8),
        }
    }
}

/// Feeds the body until `end` says so.
///
/// # Errors
/// The first input under which it panicked.
pub fn run(target: &Target, seed: u64, mut end: impl FnMut(u64) -> bool) -> Result<Done, Box<Failure>> {
    let seeds = seeds(target);
    let mut done = Done::default();
    let mut maker = Maker::new(seed, seeds.clone());
    let mut seeds = seeds.into_iter();
    while !end(done.inputs) {
        let input = seeds.next().unwrap_or_else(|| maker.next_input());
        let begun = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| (target.body)(&input))).is_err() {
            return Err(Box::new(Failure { input, number: done.inputs }));
        }
        done.inputs += 1;
        let took = begun.elapsed();
        if took > done.slowest.0 {
            done.slowest = (took, input);
        }
    }
    Ok(done)
}
