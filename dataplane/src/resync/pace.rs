//! How fast a synchronisation may go, and how fast it goes.

use crate::io::Nanos;

/// What the allowance grows to while nothing is read: this part of a second's.
const BURST: u64 = 8;
/// Between two looks at the speed.
const LOOK: Nanos = 1_000_000_000;
/// After this time without progress the last speed says nothing any more.
const STALE: Nanos = 30_000_000_000;

/// Bytes of the disks that synchronisations may read, all of a stream together.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// Bytes a second; 0: no bound.
    rate: u64,
    /// Bytes that may be read now; below 0 after a piece larger than what there was.
    left: i64,
    at: Nanos,
}

impl Budget {
    /// From `now` on so many bytes a second, 0 for no bound.
    pub fn set(&mut self, rate: u64, now: Nanos) {
        if self.rate != rate {
            *self = Self { rate, left: 0, at: now };
        }
    }

    /// Takes `bytes`, if it is time.
    pub fn take(&mut self, bytes: u64, now: Nanos) -> bool {
        if self.rate == 0 {
            return true;
        }
        let grown = u128::from(now.saturating_sub(self.at)) * u128::from(self.rate) / 1_000_000_000;
        if grown > 0 {
            let most = i64::try_from(self.rate / BURST).unwrap_or(i64::MAX);
            self.left = self.left.saturating_add(i64::try_from(grown).unwrap_or(i64::MAX)).min(most);
            self.at = now;
        }
        if self.left < 0 {
            return false;
        }
        self.left -= bytes as i64;
        true
    }

    /// When something may be taken again, if that is a matter of time.
    pub fn due(&self) -> Option<Nanos> {
        let owed = u64::try_from(-self.left).ok().filter(|owed| *owed > 0 && self.rate > 0)?;
        let wait = u128::from(owed) * 1_000_000_000 / u128::from(self.rate) + 1;
        Some(self.at.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)))
    }
}

/// The speed of a synchronisation, smoothed.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// When it was last looked at, and what was done then.
    last: Option<(Nanos, u64)>,
    /// Bytes a second.
    rate: u64,
}

impl Meter {
    /// `done` bytes are done by `now`.
    pub fn note(&mut self, done: u64, now: Nanos) {
        let Some((at, before)) = self.last else {
            self.last = Some((now, done));
            return;
        };
        let passed = now.saturating_sub(at);
        if passed < LOOK || done == before {
            return;
        }
        let rate = u128::from(done.saturating_sub(before)) * 1_000_000_000 / u128::from(passed);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        self.rate = if self.rate == 0 { rate } else { self.rate / 4 * 3 + rate / 4 };
        self.last = Some((now, done));
    }

    /// How long `left` bytes will take, if that can be said.
    pub fn left(&self, left: u64, now: Nanos) -> Option<Nanos> {
        let (at, _) = self.last?;
        if self.rate == 0 || now > at + STALE {
            return None;
        }
        u64::try_from(u128::from(left) * 1_000_000_000 / u128::from(self.rate)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    #[test]
    fn no_bound_lets_everything_pass() {
        let mut budget = Budget::default();
        assert!((0..1000).all(|_| budget.take(1 << 30, 0)));
        assert_eq!(budget.due(), None);
    }

    #[test]
    fn a_bound_is_kept_over_time() {
        let mut budget = Budget::default();
        budget.set(8 << 20, 0);
        let (mut now, mut taken) = (0, 0u64);
        while now < 10 * SECOND {
            if budget.take(256 << 10, now) {
                taken += 256 << 10;
            } else {
                now = budget.due().expect("it is a matter of time");
            }
        }
        let wanted = 80 << 20;
        assert!(taken <= wanted + (1 << 20) && taken >= wanted - (1 << 20), "{taken}");
    }

    #[test]
    fn what_was_not_used_is_not_saved_up() {
        let mut budget = Budget::default();
        budget.set(8 << 20, 0);
        let mut taken = 0;
        while budget.take(64 << 10, 3600 * SECOND) {
            taken += 64 << 10;
        }
        assert!(taken <= (1 << 20) + (64 << 10), "{taken}");
    }

    #[test]
    fn time_left_follows_the_speed() {
        let mut meter = Meter::default();
        assert_eq!(meter.left(100, 0), None);
        for second in 0..20 {
            meter.note(second * 50, second * SECOND);
        }
        let left = meter.left(500, 20 * SECOND).expect("it is known");
        assert!((9 * SECOND..=12 * SECOND).contains(&left), "{left}");
        assert_eq!(meter.left(500, 60 * SECOND), None, "it stands still");
    }
}
