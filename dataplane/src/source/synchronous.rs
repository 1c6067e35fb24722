//! Synchronous mode: a host's write is answered when the target has acknowledged its record, for at most a deadline.
//!
//! ```text
//!            everything complete and acknowledged      a write waits too long, or a disk is not complete
//! Apart ──▶ Joining ────────────────────▶ Together ────────────────────▶ Parting ──▶ Apart
//!   ▲ answers at once   answers wait         answers wait, frames promise    answers wait until the
//!   └──── too slow ────────┘                                                 promise has run out
//! ```
//! What the target may claim: a frame that was sealed in *Together* says so, and names the newest acknowledgement that
//! had come. Until half of the deadline has passed since it *sent* that acknowledgement, the target knows that no host
//! has been answered a write that it does not hold. The source keeps that promise without comparing clocks: once it
//! decides to part, it lets half of the deadline pass since the last acknowledgement *came*, which is later. Frames
//! composed after the decision promise nothing, so the claim is not prolonged meanwhile.
//!
//! An earlier process may have promised, too, under another policy. The longest deadline that it may have named is in the
//! write-intent logs, durably before it is named. A new process therefore answers nothing before half of that has passed
//! since its start, or the target has accepted its own writer, which ends every claim made by its predecessor's frames.
//! While those are still shipped out of the spill they promise it anew.
//!
//! A write thus waits for at most the deadline: half of it until the decision, half of it until the promise is over.

use crate::io::Nanos;

/// Shortest deadline.
pub const MIN_SYNC_DEADLINE: Nanos = 200_000_000;
/// Longest deadline.
pub const MAX_SYNC_DEADLINE: Nanos = 60_000_000_000;

/// Where a synchronous group stands.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Mode {
    /// Answers wait until then, or until the target has accepted this writer; the time is set in the first turn.
    Beginning(Option<Nanos>),
    /// Hosts are answered without waiting; to be tried again at this time at the earliest.
    Apart(Nanos),
    /// Answers wait; what was drawn up to this record may have been answered before.
    Joining(u64),
    /// Answers wait, and the target is told.
    Together,
    /// Answers wait until then, whatever is acknowledged.
    Parting(Nanos),
}

/// What the group looks like at a turn.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Seen {
    /// The link carries frames.
    pub ready: bool,
    /// Every disk is complete at the target, every write becomes a record, and the logs name the deadline.
    pub complete: bool,
    /// Newest record drawn.
    pub drawn: u64,
    /// Newest record acknowledged.
    pub acked: u64,
    /// Since when the oldest answer waits.
    pub oldest: Option<Nanos>,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Synchronous {
    /// 0: the policy is asynchronous.
    deadline: Nanos,
    mode: Mode,
    /// When the last acknowledgement came.
    heard: Nanos,
    /// Why hosts are answered without waiting.
    why: &'static str,
    /// How long an earlier process's promise is kept, at most.
    kept: Nanos,
}

/// A deadline in whole milliseconds, as the logs name it: not below the true one. Frames name it not above.
pub(crate) fn millis(deadline: Nanos) -> u32 {
    u32::try_from(deadline.div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

impl Synchronous {
    /// With this deadline, 0 for asynchronous; an earlier process may have promised `promised_ms`.
    pub fn new(deadline: Nanos, promised_ms: u32) -> Self {
        let promised = if mutant!(PromiseForgotten) { 0 } else { Nanos::from(promised_ms) * 1_000_000 };
        let kept = promised.max(deadline) / 2;
        let mode = if kept > 0 { Mode::Beginning(None) } else { Mode::Apart(0) };
        Self { deadline, mode, heard: 0, why: "not synchronised yet", kept }
    }

    /// Something that was promised under another deadline may still be out.
    pub fn owes(&self) -> bool {
        matches!(self.mode, Mode::Beginning(_) | Mode::Parting(_))
    }

    /// The deadline; 0 if the policy is asynchronous.
    pub fn deadline(&self) -> Nanos {
        self.deadline
    }

    /// Another deadline. A promise that is out is kept first.
    pub fn set_deadline(&mut self, now: Nanos, deadline: Nanos) {
        if deadline != self.deadline {
            self.part(now, "the policy has changed");
            self.deadline = deadline;
        }
    }

    /// The target has accepted this process's own writer.
    pub fn accepted(&mut self, now: Nanos) {
        if let Mode::Beginning(_) = self.mode {
            self.mode = Mode::Apart(now);
        }
    }

    /// An acknowledgement has come.
    pub fn heard(&mut self, now: Nanos) {
        self.heard = now;
    }

    /// Answers to writes wait.
    pub fn holds_answers(&self) -> bool {
        !matches!(self.mode, Mode::Apart(_))
    }

    /// What is acknowledged may be answered.
    pub fn answers_acked(&self) -> bool {
        !matches!(self.mode, Mode::Parting(_))
    }

    /// What frames promise, milliseconds; 0 for nothing.
    pub fn promise_ms(&self) -> u32 {
        if self.mode == Mode::Together { (self.deadline / 1_000_000) as u32 } else { 0 }
    }

    /// No answered write is missing at the target, as long as the promise holds.
    pub fn is_together(&self) -> bool {
        self.mode == Mode::Together
    }

    /// Why hosts are answered without waiting, or are about to be.
    pub fn why_apart(&self) -> Option<&'static str> {
        matches!(self.mode, Mode::Beginning(_) | Mode::Apart(_) | Mode::Parting(_)).then_some(self.why)
    }

    /// Answers do not wait any more once what was promised is over.
    pub fn part(&mut self, now: Nanos, why: &'static str) {
        match self.mode {
            Mode::Beginning(_) | Mode::Apart(_) | Mode::Parting(_) => {}
            Mode::Joining(_) => {
                self.why = why;
                self.mode = Mode::Apart(now + self.deadline);
            }
            Mode::Together => {
                self.why = why;
                self.mode = Mode::Parting(self.heard + self.deadline / 2);
            }
        }
    }

    /// Goes on. Call it before frames are composed.
    pub fn turn(&mut self, now: Nanos, seen: &Seen) {
        let late = seen.oldest.is_some_and(|since| now >= since + self.deadline / 2);
        if let Mode::Joining(_) | Mode::Together = self.mode {
            if !seen.complete {
                self.part(now, "a disk is being synchronised");
            } else if late {
                let why = if seen.ready { "the target acknowledges too late" } else { "the target is not connected" };
                self.part(now, why);
            }
        }
        match self.mode {
            Mode::Beginning(None) => self.mode = Mode::Beginning(Some(now + self.kept)),
            Mode::Beginning(Some(until)) | Mode::Parting(until) if now >= until => {
                self.mode = Mode::Apart(now + self.deadline)
            }
            Mode::Apart(from) if self.deadline > 0 && now >= from && seen.ready && seen.complete => {
                self.mode = Mode::Joining(seen.drawn);
            }
            _ => {}
        }
        if let Mode::Joining(from) = self.mode
            && seen.acked >= from
        {
            self.mode = Mode::Together;
        }
    }

    /// When a turn is due.
    pub fn due(&self, oldest: Option<Nanos>) -> Option<Nanos> {
        match self.mode {
            Mode::Beginning(until) => until,
            Mode::Parting(until) => Some(until),
            Mode::Joining(_) | Mode::Together => oldest.map(|since| since + self.deadline / 2),
            Mode::Apart(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    fn seen(drawn: u64, acked: u64, oldest: Option<Nanos>) -> Seen {
        Seen { ready: true, complete: true, drawn, acked, oldest }
    }

    fn together() -> Synchronous {
        let mut mode = Synchronous::new(1000 * MS, 0);
        mode.accepted(0);
        mode.turn(0, &seen(5, 3, None));
        assert!(mode.holds_answers() && mode.promise_ms() == 0, "what was drawn may have been answered");
        mode.heard(10 * MS);
        mode.turn(10 * MS, &seen(7, 5, None));
        assert!(mode.is_together() && mode.promise_ms() == 1000);
        mode
    }

    #[test]
    fn an_asynchronous_policy_never_waits() {
        let mut mode = Synchronous::new(0, 0);
        mode.turn(0, &seen(5, 5, None));
        assert!(!mode.holds_answers());
    }

    #[test]
    fn what_an_earlier_process_promised_is_kept() {
        let unlinked = Seen { ready: false, ..seen(5, 3, Some(10 * MS)) };
        let mut mode = Synchronous::new(1000 * MS, 0);
        assert!(mode.holds_answers());
        mode.turn(10 * MS, &unlinked);
        mode.turn(509 * MS, &unlinked);
        assert!(mode.holds_answers());
        assert_eq!((mode.due(None), mode.promise_ms()), (Some(510 * MS), 0));
        mode.turn(510 * MS, &unlinked);
        assert!(!mode.holds_answers());
        // Once the target has accepted this process it claims nothing by what the other one said.
        let mut mode = Synchronous::new(1000 * MS, 0);
        mode.turn(10 * MS, &unlinked);
        mode.accepted(20 * MS);
        assert!(!mode.holds_answers());
    }

    #[test]
    fn a_late_acknowledgement_parts_only_when_the_promise_is_over() {
        let mut mode = together();
        mode.heard(600 * MS);
        mode.turn(700 * MS, &seen(9, 8, Some(200 * MS)));
        // The decision: frames promise nothing from here on, answers still wait.
        assert_eq!((mode.promise_ms(), mode.holds_answers(), mode.answers_acked()), (0, true, false));
        // An acknowledgement that comes now prolongs nothing: no frame names it and promises.
        mode.heard(900 * MS);
        mode.turn(1099 * MS, &seen(9, 8, Some(200 * MS)));
        assert!(mode.holds_answers());
        mode.turn(1100 * MS, &seen(9, 8, Some(200 * MS)));
        assert!(!mode.holds_answers());
        assert_eq!(mode.why_apart(), Some("the target acknowledges too late"));
    }

    #[test]
    fn no_write_waits_longer_than_the_deadline() {
        let mut mode = together();
        let since = 50 * MS;
        let mut now = since;
        while mode.holds_answers() {
            mode.turn(now, &seen(9, 8, Some(since)));
            now += MS;
            assert!(now <= since + 1001 * MS);
        }
    }

    #[test]
    fn a_disk_that_is_not_complete_parts() {
        let mut mode = together();
        mode.turn(20 * MS, &Seen { complete: false, ..seen(9, 9, None) });
        assert_eq!((mode.promise_ms(), mode.holds_answers()), (0, true));
        mode.turn(10 * MS + 500 * MS, &Seen { complete: false, ..seen(9, 9, None) });
        assert!(!mode.holds_answers());
    }

    #[test]
    fn it_comes_back_after_a_pause() {
        let mut mode = together();
        mode.part(20 * MS, "test");
        mode.turn(510 * MS, &seen(9, 9, None));
        assert!(!mode.holds_answers());
        mode.turn(1500 * MS, &seen(9, 9, None));
        assert!(!mode.holds_answers());
        mode.turn(1510 * MS, &seen(9, 9, None));
        assert!(mode.is_together());
    }
}
