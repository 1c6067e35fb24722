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
    /// Acknowledged frames, and when that was said.
    told: VecDeque<(u64, Nanos)>,
    until: Option<Nanos>,
    synchronous: bool,
}

impl Promise {
    /// An acknowledgement of this frame is about to be sent.
    pub fn told(&mut self, incarnation: IncarnationId, frame: u64, now: Nanos) {
        if incarnation != self.incarnation {
            // Another writer: what its predecessor promised is void once it answers by itself.
            *self = Self { incarnation, ..Self::default() };
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
            *self = Self { incarnation, ..Self::default() };
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

    fn claim(promise: &Promise) -> Option<u64> {
        promise.until().map(|until| until / MS)
    }

    #[test]
    fn counts_from_the_acknowledgement_that_the_source_names() {
        let mut promise = Promise::default();
        promise.told(ONE, 1, 100 * MS);
        promise.told(ONE, 2, 200 * MS);
        promise.told(ONE, 3, 300 * MS);
        // Only the second had come when the frame was sealed; that the third was sent says nothing.
        promise.heard(ONE, 2, 1280);
        assert_eq!(claim(&promise), Some(200 + 630));
    }

    #[test]
    fn an_acknowledgement_that_nobody_remembers_claims_nothing() {
        let mut promise = Promise::default();
        promise.heard(ONE, 7, 1000);
        assert_eq!(claim(&promise), None);
        promise.told(ONE, 9, 100 * MS);
        promise.heard(ONE, 8, 1000);
        assert_eq!(claim(&promise), None);
    }

    #[test]
    fn a_frame_that_promises_nothing_ends_the_claim() {
        let mut promise = Promise::default();
        promise.told(ONE, 1, 100 * MS);
        promise.heard(ONE, 1, 1000);
        assert!(claim(&promise).is_some() && promise.is_synchronous());
        promise.heard(ONE, 1, 0);
        assert!(claim(&promise).is_none() && !promise.is_synchronous());
    }

    #[test]
    fn another_writer_begins_anew() {
        let mut promise = Promise::default();
        promise.told(ONE, 5, 100 * MS);
        promise.heard(IncarnationId([2; 16]), 5, 1000);
        assert_eq!(claim(&promise), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut promise = Promise::default();
        for frame in 0..2000 {
            promise.told(ONE, frame, frame);
        }
        assert_eq!(promise.told.len(), MAX_TOLD);
    }
}
