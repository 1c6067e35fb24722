//! The lease of a source: for how long after the last word of its target or coordinator it may answer hosts.
//!
//! What counts is when a word was *asked for*, not when it came: a message may have been on its way for long. Whoever
//! answers at some moment says that nothing was fenced until then, and that moment lies behind the question. So a
//! source whose lease is `span` long has stopped by `span` after the fence, and whoever waits for `span` and a margin
//! knows that it has, without hearing from it. The questions are the frames (answered by their acknowledgement), the
//! hellos (answered by the welcome) and the reports to the coordinator.
//!
//! The clock counts the time that the host sleeps. The newest word is kept in the write-intent logs, now and then: a
//! process that starts again within one boot goes on with what is left of its lease; after a reboot there is none.

use crate::io::Nanos;

/// Shortest lease: words come at least once a second.
pub const MIN_LEASE: Nanos = 3_000_000_000;
/// Longest lease.
pub const MAX_LEASE: Nanos = 3_600_000_000_000;

/// The lease of one group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lease {
    /// 0: none is needed.
    span: Nanos,
    /// When the newest word was asked for, since boot.
    word_at: Option<Nanos>,
    /// What of that is durable, or on its way to be.
    kept: Nanos,
}

impl Lease {
    /// A lease of this length (0: none is needed); `kept` is the word that an earlier process of the same boot had.
    pub fn new(span: Nanos, kept: Option<Nanos>) -> Self {
        Self { span, word_at: kept, kept: kept.unwrap_or(0) }
    }

    /// Its length; 0 if none is needed.
    pub fn span(&self) -> Nanos {
        self.span
    }

    /// Another length. A lease that was not needed before has no word before the next one.
    pub fn set_span(&mut self, span: Nanos) {
        self.span = span;
    }

    /// A word that was asked for at `asked`, since boot.
    pub fn word(&mut self, asked: Nanos) {
        self.word_at = self.word_at.max(Some(asked));
    }

    /// Hosts may be answered before this moment, since boot; [`Nanos::MAX`] if no lease is needed.
    pub fn end(&self) -> Nanos {
        match (self.span, self.word_at) {
            (0, _) => Nanos::MAX,
            (_, None) => 0,
            (span, Some(at)) => at.saturating_add(span),
        }
    }

    /// Hosts may be answered at `now`.
    pub fn holds(&self, now: Nanos) -> bool {
        now < self.end()
    }

    /// A word that should be made durable, if it is time. Every quarter of the span: a process that starts again has
    /// three quarters left at least.
    pub fn next_kept(&mut self) -> Option<Nanos> {
        let at = self.word_at.filter(|at| self.span > 0 && *at >= self.kept + self.span / 4)?;
        self.kept = at;
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Nanos = 1_000_000_000;

    #[test]
    fn without_a_policy_there_is_no_end() {
        let mut lease = Lease::new(0, None);
        assert!(lease.holds(Nanos::MAX - 1));
        lease.word(5);
        assert_eq!(lease.next_kept(), None);
    }

    #[test]
    fn before_the_first_word_nothing_is_answered() {
        let mut lease = Lease::new(10 * S, None);
        assert!(!lease.holds(0));
        lease.word(3 * S);
        assert!(lease.holds(12 * S) && !lease.holds(13 * S));
    }

    #[test]
    fn an_older_word_takes_nothing_away() {
        let mut lease = Lease::new(10 * S, None);
        lease.word(8 * S);
        lease.word(2 * S);
        assert_eq!(lease.end(), 18 * S);
    }

    #[test]
    fn a_process_of_the_same_boot_goes_on_with_what_is_left() {
        let lease = Lease::new(10 * S, Some(100 * S));
        assert!(lease.holds(109 * S) && !lease.holds(110 * S));
    }

    #[test]
    fn words_are_kept_now_and_then() {
        let mut lease = Lease::new(8 * S, None);
        lease.word(20 * S);
        assert_eq!(lease.next_kept(), Some(20 * S));
        lease.word(21 * S);
        assert_eq!(lease.next_kept(), None);
        lease.word(22 * S);
        assert_eq!(lease.next_kept(), Some(22 * S));
    }
}
