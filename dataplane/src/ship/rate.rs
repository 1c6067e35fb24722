//! How fast a backlog grows and shrinks, for saying when it will be gone.

use crate::io::Nanos;

/// Time between two looks.
const LOOK: Nanos = 1_000_000_000;
/// Part of the newest look in the average, per cent.
const NEWEST: u64 = 30;

/// Averages of what came and what went, bytes per second.
#[derive(Debug, Default)]
pub(super) struct Rate {
    last: Option<(Nanos, u64, u64)>,
    filled: u64,
    drained: u64,
}

impl Rate {
    /// Takes the counters as they are now.
    pub fn look(&mut self, now: Nanos, filled: u64, drained: u64) {
        let Some((then, filled_then, drained_then)) = self.last else {
            self.last = Some((now, filled, drained));
            return;
        };
        let passed = now.saturating_sub(then);
        if passed < LOOK {
            return;
        }
        let first = (self.filled, self.drained) == (0, 0);
        let mix = |average: u64, bytes: u64| {
            let rate = (u128::from(bytes) * u128::from(LOOK) / u128::from(passed)) as u64;
            if first { rate } else { (average * (100 - NEWEST) + rate * NEWEST) / 100 }
        };
        self.filled = mix(self.filled, filled - filled_then);
        self.drained = mix(self.drained, drained - drained_then);
        self.last = Some((now, filled, drained));
    }

    /// How long a backlog of so many bytes will last; none if it does not shrink.
    pub fn time_for(&self, backlog: u64) -> Option<Nanos> {
        let speed = self.drained.checked_sub(self.filled).filter(|speed| *speed > 0)?;
        Some((u128::from(backlog) * u128::from(LOOK) / u128::from(speed)).min(u128::from(u64::MAX)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_that_shrinks_ends_and_one_that_grows_does_not() {
        let mut rate = Rate::default();
        for second in 0..60 {
            rate.look(second * LOOK, second * 1000, second * 3000);
        }
        let time = rate.time_for(20_000).expect("it shrinks by 2000 bytes a second");
        assert!((9..=11).contains(&(time / LOOK)), "{time}");
        for second in 60..120 {
            rate.look(second * LOOK, second * 1000, 180_000);
        }
        assert_eq!(rate.time_for(20_000), None);
    }
}
