//! What a synchronous source has promised, as far as the target knows: until when no host can have been answered a
//! write that is not here.
//!
//! A frame that was sealed while the source held its answers names the newest acknowledgement that it had got, and its
//! deadline. The source answers nothing that is not acknowledged before half of the deadline has passed since that
//! acknowledgement *came*; counted here from when it was *sent*, the claim ends earlier than the promise, whatever the
//! network did. Two hosts' clocks are not compared; a little is left for clocks that run at different speeds. Time that
//! the target's host was asleep counts.

use std::collections::VecDeque;

use afterimage_wire::ids::IncarnationId;

use crate::io::Nanos;

/// Acknowledgements whose time is remembered. A claim by an older one has ended long since.
const MAX_TOLD: usize = 512;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Promise {
    incarnation: IncarnationId,
    /// Its frames up to this one were held when this process began: nobody knows when that was said first.
    begun: u64,
    /// Acknowledged frames, and when that was said.
    told: VecDeque<(u64, Nanos)>,
    until: Option<Nanos>,
    synchronous: bool,
}

impl Promise {
    /// This writer is accepted, and frame `held` of it is the newest here (0 if none is). What its predecessor promised is
    /// void from now on: the writer may answer by itself. Frames that were held before this process heard of the writer
    /// were acknowledged by an earlier one. They may come again, with what they promised when they were sealed, and are
    /// no reason to claim anything.
    pub fn begin(&mut self, incarnation: IncarnationId, held: u64) {
        if incarnation != self.incarnation {
            *self = Self { incarnation, begun: held, ..Self::default() };
        }
    }

    /// An acknowledgement of this frame is about to be sent.
    pub fn told(&mut self, incarnation: IncarnationId, frame: u64, now: Nanos) {
        if incarnation != self.incarnation || frame <= self.begun {
            return;
        }
        if self.told.back().is_some_and(|(newest, _)| *newest >= frame) {
            return;
        }
        if self.told.len() == MAX_TOLD {
            self.told.pop_front();
        }
        self.told.push_back((frame, now));
    }

    /// A frame has come whose header says this.
    pub fn heard(&mut self, incarnation: IncarnationId, acked: u64, sync_ms: u32) {
        if incarnation != self.incarnation {
            return;
        }
        self.synchronous = sync_ms > 0;
        if !self.synchronous {
            self.until = None;
            return;
        }
        while self.told.len() > 1 && self.told[1].0 <= acked {
            self.told.pop_front();
        }
        let Some((_, at)) = self.told.front().filter(|(frame, _)| *frame <= acked) else { return };
        let half = Nanos::from(sync_ms) * 1_000_000 / 2;
        self.until = self.until.max(Some(at + half - half / 64));
    }

    /// The newest frame was sealed while the source held its answers.
    pub fn is_synchronous(&self) -> bool {
        self.synchronous
    }

    /// No answered write is missing here before this moment, since boot.
    pub fn until(&self) -> Option<Nanos> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: IncarnationId = IncarnationId([1; 16]);
    const MS: Nanos = 1_000_000;

    fn promise() -> Promise {
        let mut promise = Promise::default();
        promise.begin(ONE, 0);
        promise
    }

    fn claim(promise: &Promise) -> Option<u64> {
        promise.until().map(|until| until / MS)
    }

    #[test]
    fn counts_from_the_acknowledgement_that_the_source_names() {
        let mut promise = promise();
        promise.told(ONE, 1, 100 * MS);
        promise.told(ONE, 2, 200 * MS);
        promise.told(ONE, 3, 300 * MS);
        // Only the second had come when the frame was sealed; that the third was sent says nothing.
        promise.heard(ONE, 2, 1280);
        assert_eq!(claim(&promise), Some(200 + 630));
    }

    #[test]
    fn an_acknowledgement_that_nobody_remembers_claims_nothing() {
        let mut promise = promise();
        promise.heard(ONE, 7, 1000);
        assert_eq!(claim(&promise), None);
        promise.told(ONE, 9, 100 * MS);
        promise.heard(ONE, 8, 1000);
        assert_eq!(claim(&promise), None);
    }

    #[test]
    fn a_frame_that_promises_nothing_ends_the_claim() {
        let mut promise = promise();
        promise.told(ONE, 1, 100 * MS);
        promise.heard(ONE, 1, 1000);
        assert!(claim(&promise).is_some() && promise.is_synchronous());
        promise.heard(ONE, 1, 0);
        assert!(claim(&promise).is_none() && !promise.is_synchronous());
    }

    #[test]
    fn another_writer_begins_anew() {
        let mut promise = promise();
        promise.told(ONE, 5, 100 * MS);
        promise.heard(ONE, 5, 1000);
        assert!(claim(&promise).is_some());
        promise.begin(ONE, 5);
        assert!(claim(&promise).is_some(), "a new connection of the same writer changes nothing");
        let two = IncarnationId([2; 16]);
        promise.begin(two, 0);
        assert_eq!(claim(&promise), None);
        promise.heard(two, 5, 1000);
        promise.heard(ONE, 5, 1000);
        assert_eq!(claim(&promise), None);
    }

    #[test]
    fn what_an_earlier_process_acknowledged_claims_nothing() {
        let mut promise = Promise::default();
        promise.begin(ONE, 7);
        promise.told(ONE, 7, 100 * MS);
        promise.heard(ONE, 7, 1000);
        assert_eq!(claim(&promise), None);
        promise.told(ONE, 8, 200 * MS);
        promise.heard(ONE, 8, 1280);
        assert_eq!(claim(&promise), Some(200 + 630));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut promise = promise();
        for frame in 0..2000 {
            promise.told(ONE, frame, frame);
        }
        assert_eq!(promise.told.len(), MAX_TOLD);
    }
}
