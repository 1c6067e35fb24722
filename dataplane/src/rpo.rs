//! RPO now: the age of the oldest write that is in no durable restore point, on the source's monotonic clock.
//!
//! Sampled every [`SAMPLE`] into a histogram. While nothing is owed no one wakes to sample: the missed samples were all
//! zero and are added at once, when next looked at.

use std::cell::Cell;

use hdrhistogram::Histogram;

use crate::io::Nanos;

/// Time between two samples.
pub const SAMPLE: Nanos = 10_000_000;

/// Longest RPO that the histogram tells apart, microseconds (a week).
const MAX_MICROS: u64 = 7 * 86_400 * 1_000_000;

/// RPO over time.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
pub struct RpoSummary {
    /// Median.
    pub p50: Nanos,
    /// 99th percentile.
    pub p99: Nanos,
    /// Greatest.
    pub max: Nanos,
    /// Samples taken.
    pub samples: u64,
}

/// The RPO of one stream.
#[derive(Debug)]
pub struct Rpo {
    histogram: Histogram<u64>,
    next: Nanos,
    /// Since when some disk is in no complete point; none while all are.
    incomplete_since: Option<Nanos>,
    /// The oldest write that an earlier process left unshipped was this old when this one began, and when that was.
    carried: Option<(Nanos, Nanos)>,
    /// As told last: whoever looks often finds nothing new most often, and a look goes through the whole histogram.
    told: Cell<RpoSummary>,
}

impl Rpo {
    /// Begins to count at `now`.
    pub fn new(now: Nanos) -> Self {
        let histogram = Histogram::new_with_bounds(1, MAX_MICROS, 3).expect("constant bounds are valid");
        Self { histogram, next: now + SAMPLE, incomplete_since: None, carried: None, told: Cell::default() }
    }

    /// Points from `now` on do not hold every disk: a synchronisation begins.
    pub fn incomplete(&mut self, now: Nanos) {
        self.incomplete_since = Some(self.incomplete_since.map_or(now, |since| since.min(now)));
    }

    /// The last synchronisation has reached its end durably.
    pub fn complete(&mut self) {
        self.incomplete_since = None;
    }

    /// An earlier process left something to ship: its oldest write is of age `age` at `now`.
    pub fn carry(&mut self, age: Nanos, now: Nanos) {
        self.carried = Some((age, now));
    }

    /// What an earlier process left is durable at the target.
    pub fn shipped(&mut self) {
        self.carried = None;
    }

    /// RPO at `now`, given when the oldest unacknowledged record was numbered.
    pub fn at(&self, now: Nanos, oldest: Option<Nanos>) -> Nanos {
        let carried = self.carried.map_or(0, |(age, since)| age + now.saturating_sub(since));
        carried.max(self.of_this_life(now, oldest))
    }

    fn of_this_life(&self, now: Nanos, oldest: Option<Nanos>) -> Nanos {
        let since = match (self.incomplete_since, oldest) {
            (Some(a), Some(b)) => a.min(b),
            (Some(a), None) | (None, Some(a)) => a,
            (None, None) => return 0,
        };
        now.saturating_sub(since)
    }

    /// Takes the samples that are due. Call it *before* the queue changes at `now`, so that the time since the last
    /// call is judged by what was owed in it.
    pub fn sample(&mut self, now: Nanos, oldest: Option<Nanos>) {
        if now < self.next {
            return;
        }
        let due = (now - self.next) / SAMPLE + 1;
        // Of several samples at once (the loop was late, or slept while nothing was owed) each has its own age.
        for back in (0..due.min(100)).rev() {
            let micros = self.at(now - back * SAMPLE, oldest) / 1000;
            self.histogram.saturating_record(micros);
        }
        if due > 100 {
            let micros = self.at(now - 100 * SAMPLE, oldest) / 1000;
            let _ = self.histogram.record_n(micros.min(MAX_MICROS), due - 100);
        }
        self.next += due * SAMPLE;
    }

    /// When to sample next; none while the answer stays zero.
    pub fn deadline(&self, oldest: Option<Nanos>) -> Option<Nanos> {
        (oldest.is_some() || self.incomplete_since.is_some() || self.carried.is_some()).then_some(self.next)
    }

    /// The samples, in microseconds.
    pub fn histogram(&self) -> &Histogram<u64> {
        &self.histogram
    }

    /// The samples in short.
    pub fn summary(&self) -> RpoSummary {
        let samples = self.histogram.len();
        if self.told.get().samples != samples {
            let at = |q| self.histogram.value_at_quantile(q) * 1000;
            self.told.set(RpoSummary { p50: at(0.5), p99: at(0.99), max: self.histogram.max() * 1000, samples });
        }
        self.told.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    #[test]
    fn nothing_owed_is_zero() {
        let mut rpo = Rpo::new(0);
        rpo.sample(1000 * MS, None);
        assert_eq!(rpo.summary(), RpoSummary { p50: 0, p99: 0, max: 0, samples: 100 });
        assert_eq!(rpo.deadline(None), None);
    }

    #[test]
    fn counts_from_the_oldest_record() {
        let mut rpo = Rpo::new(0);
        assert_eq!(rpo.at(7 * MS, Some(2 * MS)), 5 * MS);
        rpo.sample(10 * MS, Some(4 * MS));
        assert_eq!(rpo.summary().max / MS, 6);
    }

    #[test]
    fn counts_from_the_last_complete_point_while_synchronising() {
        let mut rpo = Rpo::new(0);
        rpo.incomplete(3 * MS);
        rpo.incomplete(9 * MS);
        assert_eq!(rpo.at(20 * MS, None), 17 * MS);
        assert_eq!(rpo.at(20 * MS, Some(12 * MS)), 17 * MS);
        assert_eq!(rpo.at(20 * MS, Some(MS)), 19 * MS);
        rpo.complete();
        assert_eq!(rpo.at(20 * MS, None), 0);
    }

    #[test]
    fn what_an_earlier_process_left_goes_on_ageing() {
        let mut rpo = Rpo::new(5 * MS);
        rpo.carry(3000 * MS, 5 * MS);
        assert_eq!(rpo.at(10 * MS, None), 3005 * MS);
        assert_eq!(rpo.at(10 * MS, Some(9 * MS)), 3005 * MS);
        assert!(rpo.deadline(None).is_some());
        rpo.shipped();
        assert_eq!(rpo.at(10 * MS, Some(9 * MS)), MS);
    }

    #[test]
    fn late_samples_keep_their_ages() {
        let mut rpo = Rpo::new(0);
        rpo.sample(50 * MS, Some(10 * MS));
        assert_eq!(rpo.summary().samples, 5);
        assert_eq!(rpo.summary().max / MS, 40);
        assert_eq!(rpo.summary().p50 / MS, 20);
    }
}
