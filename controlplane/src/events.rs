//! What has happened, for people: in memory, in order, bounded; [`crate::eventlog`] keeps it over a restart.

use std::collections::VecDeque;

use afterimage_wire::v1::{Event, Severity};

use crate::text::head;

/// Events that are kept.
pub const MAX_EVENTS: usize = 10_000;
/// Longest message, bytes.
const MAX_MESSAGE: usize = 2048;

/// The last [`MAX_EVENTS`] events.
#[derive(Default)]
pub struct Events {
    kept: VecDeque<Event>,
    next: u64,
}

impl Events {
    /// With what an earlier life has kept, oldest first; numbers go on from there.
    pub fn restored(mut kept: Vec<Event>) -> Self {
        kept.drain(..kept.len().saturating_sub(MAX_EVENTS));
        Self { next: kept.last().map_or(0, |e| e.number), kept: kept.into() }
    }

    /// Adds one and returns it with its number.
    pub fn push(&mut self, time_ns: u64, severity: Severity, kind: &str, subject: &str, message: &str) -> Event {
        self.next += 1;
        let event = Event {
            number: self.next,
            time_ns,
            severity: severity.into(),
            kind: kind.to_owned(),
            subject: subject.to_owned(),
            message: head(message, MAX_MESSAGE).to_owned(),
        };
        if self.kept.len() == MAX_EVENTS {
            self.kept.pop_front();
        }
        self.kept.push_back(event.clone());
        event
    }

    /// The number of the newest; 0 if there has been none.
    pub fn newest(&self) -> u64 {
        self.next
    }

    /// Whether all events after this number are kept.
    pub fn keeps_after(&self, number: u64) -> bool {
        self.kept.front().map_or(number >= self.next, |first| first.number <= number.saturating_add(1))
    }

    /// At most `limit` events with `from` or a higher number whose subject `fits`, oldest first.
    pub fn from(&self, from: u64, limit: usize, fits: impl Fn(&Event) -> bool) -> Vec<Event> {
        self.kept.iter().filter(|e| e.number >= from && fits(e)).take(limit).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_rise_and_the_oldest_go() {
        let mut events = Events::default();
        for i in 0..MAX_EVENTS + 5 {
            events.push(i as u64, Severity::Info, "k", "s", "m");
        }
        let all = events.from(0, usize::MAX, |_| true);
        assert_eq!(all.len(), MAX_EVENTS);
        assert_eq!((all[0].number, all[MAX_EVENTS - 1].number), (6, MAX_EVENTS as u64 + 5));
        assert_eq!(events.from(10_000, 3, |_| true).len(), 3);
        assert!(events.from(0, 10, |e| e.subject == "other").is_empty());
    }

    #[test]
    fn numbers_go_on_after_what_was_kept() {
        let mut events = Events::default();
        let kept: Vec<Event> = (0..3).map(|i| events.push(i, Severity::Info, "k", "s", "m")).collect();
        let mut next = Events::restored(kept);
        assert_eq!(next.push(9, Severity::Info, "k", "s", "m").number, 4);
        assert_eq!(next.from(0, 10, |_| true).len(), 4);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let mut events = Events::default();
        let event = events.push(0, Severity::Info, "k", "s", &"ä".repeat(5000));
        assert!(event.message.len() <= MAX_MESSAGE);
    }
}
