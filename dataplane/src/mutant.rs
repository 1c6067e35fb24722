//! Deliberate bugs, for judging the simulator: one that does not find them would not find real ones either.
//!
//! Each is switched on by itself, in a build with the feature `mutants`, for the thread that plays a seed. Without the
//! feature [`on`] is the constant `false` and nothing of them is left in the code. `tests/sim --mutants` plays them all.
//!
//! The same build also watches every seal: a key and a nonce that meet twice over different bytes are reported by
//! `reused_nonce`, which is there only then.

use crate::seal::{ControlKey, DataKey};

// Not among them: a whole synchronisation that counts as done before its end is acknowledged. It does no harm. From when
// the header says that all bits are mapped, each of them stays until the records of its extent are acknowledged and a
// flush covers what an earlier life wrote there; so a next life finds in the bits all that was not done, whatever the
// header says of the whole. Before that the header says so in any case. What is lost is only what the target then asks
// to be sent once more. Its place is taken by the wait for those bits, on which all of this rests.

macro_rules! mutants {
    ($($name:ident = $text:literal : $what:literal,)*) => {
        /// A deliberate bug.
        #[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Mutant { $(#[doc = $what] $name,)* }

        impl Mutant {
            /// All of them, in the order of a write's path.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// As it is called on a command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What is wrong in it.
            pub const fn what(self) -> &'static str {
                match self { $(Self::$name => $what,)* }
            }
        }
    };
}

mutants! {
    OverlapUnordered = "overlap-unordered": "overlapping writes are in flight together",
    NumberAtSubmission = "number-at-submission": "a write is numbered, and its range let go, when it is submitted",
    NumberAfterAnswer = "number-after-answer": "a write is numbered after its answer",
    BitNotAwaited = "bit-not-awaited": "a write is issued before its intent bit is durable",
    BitBySecondWrite = "bit-by-second-write": "one write that ends lets go of the bit that another still holds",
    BitByEarlierFlush = "bit-by-earlier-flush": "a flush counts for writes that completed while it ran",
    DiscardNotRecorded = "discard-not-recorded": "a discard becomes no record",
    PassedNotDirty = "passed-not-dirty": "a write that passes uncaptured is not in the dirty map",
    FlushNotForwarded = "flush-not-forwarded": "a flush is answered without a sync",
    FuaIgnored = "fua-ignored": "a forced write is not durable",
    FailedSyncForgotten = "failed-sync-forgotten": "after a failed sync the next one counts for everything",
    DiskNotLocked = "disk-not-locked": "the disk is opened while I/O of a dead process may still land",
    RebootTrusted = "reboot-trusted": "after a reboot the log of a disk that was not stopped cleanly is believed",
    CleanStopUnsent = "clean-stop-unsent": "a stop is called clean although not everything is acknowledged",
    ResyncAfterRelease = "resync-after-release": "a read of a synchronisation is numbered after its range was let go",
    ResyncForgetsRewrite = "resync-forgets-rewrite": "an extent written uncaptured while it is read is not read again",
    MapNotAwaited = "map-not-awaited": "a whole synchronisation's bits count before they are durable",
    EndOwedForgotten = "end-owed-forgotten": "a new incarnation forgets that a synchronisation was begun",
    AnnounceNotAwaited = "announce-not-awaited": "frames leave before the logs name their writer",
    PlaceNotCompared = "place-not-compared": "a target that lost acknowledged frames is gone on with",
    PromiseForgotten = "promise-forgotten": "a new process keeps the promise of its own policy, not of the one before",
    NonceReused = "nonce-reused": "a restarted writer uses its old key",
    AcksByDataKey = "acks-by-data-key": "acknowledgements are sealed with the data key",
    RpoForgetsQueue = "rpo-forgets-queue": "records that are not sealed yet do not count for the RPO",
    CutsByWallClock = "cuts-by-wall-clock": "cuts stop while the wall clock is behind the last one",
    AckBeforeSync = "ack-before-sync": "frames are acknowledged when written, durable or not",
    AckOnReceipt = "ack-on-receipt": "frames are acknowledged when received",
    HeadNotDurable = "head-not-durable": "a segment's head, with its key, is not durable before its frames",
    NameNotDurable = "name-not-durable": "a segment is used before its name is durable",
    WriteErrorIgnored = "write-error-ignored": "a failed write of the journal counts as done",
    HealedBeforeFound = "healed-before-found": "a synchronisation makes good what was found to be lost only after it",
    TornNotDamaged = "torn-not-damaged": "damage to what was acknowledged is taken for a torn tail",
    PredecessorNotCompared = "predecessor-not-compared": "a new writer's acknowledged place is not compared",
    StaleGeneration = "stale-generation": "a source of an older generation is accepted",
    FenceLeavesWriter = "fence-leaves-writer": "a fence leaves the writer's connection as it is",
    SyncingDiskHeld = "syncing-disk-held": "points within a synchronisation count as complete",
    NewestCompleteFolded = "newest-complete-folded": "the newest complete point is folded away",
    RetentionByWallClock = "retention-by-wall-clock": "history ages by the wall clock",
    PinIgnored = "pin-ignored": "a point that a view uses is folded away",
    FloorAfterImage = "floor-after-image": "the floor is raised after the image was overwritten",
    ImageNotSynced = "image-not-synced": "a folded segment goes before the image is durable",
    ViewReadsOn = "view-reads-on": "a view shows what was written after its point",
    ViewAskUnheard = "view-ask-unheard": "what a view is asked after a round's turn waits until something else happens",
    DeltaFlushEarly = "delta-flush-early": "a flush of a view is answered before the delta is durable",
}

impl std::str::FromStr for Mutant {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().copied().find(|mutant| mutant.name() == name);
        found.ok_or_else(|| format!("there is no mutant `{name}`"))
    }
}

#[cfg(feature = "mutants")]
mod active {
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;

    use super::Mutant;

    thread_local! {
        pub(super) static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
        /// Key and nonce of each seal, with a checksum of the sealed bytes.
        pub(super) static SEALS: RefCell<HashMap<([u8; 32], [u8; 12]), u32>> = RefCell::default();
        pub(super) static REUSED: RefCell<Option<String>> = const { RefCell::new(None) };
    }
}

/// Whether that bug is on.
#[cfg(feature = "mutants")]
pub fn on(mutant: Mutant) -> bool {
    active::ON.get() == Some(mutant)
}

/// Whether that bug is on: never in this build.
#[cfg(not(feature = "mutants"))]
pub const fn on(_: Mutant) -> bool {
    false
}

/// Switches one on for this thread, or all off; forgets every seal.
#[cfg(feature = "mutants")]
pub fn set(mutant: Option<Mutant>) {
    active::ON.set(mutant);
    active::SEALS.with_borrow_mut(std::collections::HashMap::clear);
    active::REUSED.set(None);
}

/// Forgets every seal: another world begins, whose keys come from its seed again.
#[cfg(feature = "mutants")]
pub fn forget_seals() {
    set(active::ON.get());
}

/// Takes note of a seal.
#[cfg(feature = "mutants")]
pub(crate) fn sealed(key: &[u8; 32], nonce: [u8; 12], bytes: &[u8], what: &str) {
    let sum = crc32c::crc32c(bytes);
    let before = active::SEALS.with_borrow_mut(|seals| seals.insert((*key, nonce), sum));
    if before.is_some_and(|before| before != sum) {
        active::REUSED.set(Some(format!("{what} is sealed with a key and a nonce that sealed something else")));
    }
}

/// Takes note of a seal: not in this build.
#[cfg(not(feature = "mutants"))]
pub(crate) const fn sealed(_: &[u8; 32], _: [u8; 12], _: &[u8], _: &str) {}

/// A nonce that was used twice with its key since [`set`] was last called.
#[cfg(feature = "mutants")]
pub fn reused_nonce() -> Option<String> {
    active::REUSED.take()
}

/// The key of a connection's messages: the right one, or the writer's data key.
pub(crate) fn control_key(right: ControlKey, data: &DataKey) -> ControlKey {
    if on(Mutant::AcksByDataKey) { data.as_control() } else { right }
}
