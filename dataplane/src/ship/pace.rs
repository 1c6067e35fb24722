//! When frames may leave: the hours and the bandwidth that a group is allowed, and the share of a short link that more
//! important groups leave to it.

use crate::io::Nanos;
use crate::resync::pace::Budget;
use crate::source::Pace;

/// A group gives way for this many times as long as its last send took until it was acknowledged: a tenth of the link
/// stays its own.
const GIVE_WAY: Nanos = 9;
/// Bounds of that pause: a quiet link is noticed soon, and nobody waits for ever.
const PAUSE: (Nanos, Nanos) = (250_000_000, 10_000_000_000);
/// A backlog younger than this says nothing of a link.
const SHORT_AFTER: Nanos = 100_000_000;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    pace: Pace,
    budget: Budget,
    /// A failover takes the group over: everything leaves now.
    pub forced: bool,
    /// A more important group is short of the link.
    pub gives_way: bool,
    /// When the newest send began, until a pause follows from it.
    began: Option<Nanos>,
    /// When the next send may begin while the group gives way.
    pause_until: Nanos,
    /// What is ready waits until then, by the last look.
    waits: Option<Nanos>,
}

impl Pacer {
    /// From `now` on.
    pub fn set(&mut self, pace: Pace, now: Nanos) {
        self.budget.set(pace.rate, now);
        self.pace = pace;
    }

    /// How important the group is.
    pub fn priority(&self) -> u8 {
        self.pace.priority
    }

    /// Nothing may leave at this hour, or for a pause.
    pub fn is_closed(&self) -> bool {
        self.pace.paused || (self.pace.closed && !self.forced)
    }

    /// A link that takes what is sealed has not kept up: the oldest record that is not acknowledged is older than half of
    /// what is promised, and no bound of the group's own is why.
    pub fn is_short(&self, oldest: Option<Nanos>, now: Nanos) -> bool {
        let bound = (self.pace.rpo_target / 2).max(SHORT_AFTER);
        !self.is_closed() && self.waits.is_none() && oldest.is_some_and(|oldest| now >= oldest + bound)
    }

    /// Most frames of the send that may begin now; 0: it waits, until [`Self::due`] or an acknowledgement. `settled`:
    /// nothing is sent that is not acknowledged. A network takes more than it has carried, so that a send has ended says
    /// nothing of a link.
    pub fn may_begin(&mut self, now: Nanos, most: usize, settled: bool) -> usize {
        self.waits = None;
        if self.is_closed() {
            return 0;
        }
        if self.gives_way && !self.forced {
            if !settled {
                return 0;
            }
            if let Some(began) = self.began.take() {
                let took = now.saturating_sub(began);
                self.pause_until = now + (took * GIVE_WAY).clamp(PAUSE.0, PAUSE.1);
            }
            if now < self.pause_until {
                self.waits = Some(self.pause_until);
                return 0;
            }
            return 1;
        }
        most
    }

    /// Takes a frame's bytes, if it is time; the send began with the first.
    pub fn take(&mut self, bytes: usize, now: Nanos) -> bool {
        if !self.forced && !self.budget.take(bytes as u64, now) {
            self.waits = self.budget.due();
            return false;
        }
        self.began = Some(now);
        true
    }

    /// When what is ready may leave, if that is a matter of time.
    pub fn due(&self) -> Option<Nanos> {
        self.waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    #[test]
    fn hours_close_and_a_failover_opens() {
        let mut pacer = Pacer::default();
        assert_eq!(pacer.may_begin(0, 16, false), 16);
        pacer.set(Pace { closed: true, ..Pace::default() }, 0);
        assert_eq!((pacer.may_begin(0, 16, true), pacer.due()), (0, None));
        pacer.forced = true;
        assert_eq!(pacer.may_begin(0, 16, false), 16);
    }

    #[test]
    fn a_pause_is_kept_to_whoever_holds_the_group() {
        let mut pacer = Pacer { forced: true, ..Pacer::default() };
        pacer.set(Pace { paused: true, ..Pace::default() }, 0);
        assert_eq!((pacer.may_begin(0, 16, true), pacer.due()), (0, None));
        assert!(!pacer.is_short(Some(0), u64::MAX), "nor does it count as short of the link");
        pacer.set(Pace::default(), 0);
        assert_eq!(pacer.may_begin(0, 16, false), 16);
    }

    #[test]
    fn a_bandwidth_is_kept_and_a_failover_does_not_wait_for_it() {
        let mut pacer = Pacer::default();
        pacer.set(Pace { rate: 1 << 20, ..Pace::default() }, 0);
        let (mut now, mut sent) = (0, 0u64);
        while now < 10_000 * MS {
            assert_eq!(pacer.may_begin(now, 16, false), 16);
            if pacer.take(64 << 10, now) {
                sent += 64 << 10;
            } else {
                now = pacer.due().expect("a matter of time");
            }
        }
        assert!((9 << 20..=11 << 20).contains(&sent), "{sent}");
        pacer.forced = true;
        assert!((0..100).all(|_| pacer.take(1 << 20, now)));
    }

    #[test]
    fn who_gives_way_keeps_a_tenth() {
        let mut pacer = Pacer { gives_way: true, ..Pacer::default() };
        let (mut now, mut sending) = (0, 0);
        while now < 60_000 * MS {
            if pacer.may_begin(now, 16, true) == 1 {
                assert!(pacer.take(512 << 10, now));
                assert_eq!((pacer.may_begin(now, 16, false), pacer.due()), (0, None), "until it is acknowledged");
                now += 200 * MS;
                sending += 200 * MS;
            } else {
                now = pacer.due().expect("a matter of time");
            }
        }
        assert!((5_000 * MS..=7_000 * MS).contains(&sending), "{sending}");
        pacer.gives_way = false;
        assert_eq!(pacer.may_begin(now, 16, false), 16);
    }

    #[test]
    fn a_group_is_short_of_the_link_and_not_of_its_own_bounds() {
        let mut pacer = Pacer::default();
        pacer.set(Pace { rate: 1 << 20, rpo_target: 1_000 * MS, ..Pace::default() }, 0);
        assert!(!pacer.is_short(None, 0) && !pacer.is_short(Some(0), 499 * MS));
        assert!(pacer.is_short(Some(0), 500 * MS));
        while pacer.take(64 << 10, 0) {}
        assert!(!pacer.is_short(Some(0), 500 * MS), "its own bandwidth is why");
    }
}
