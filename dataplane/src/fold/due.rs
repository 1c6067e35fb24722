//! Why the oldest segment is to be folded.

use crate::io::Nanos;
use crate::target::stream::Stream;

/// Why the oldest segment is to be folded, if it is.
pub(super) fn due(stream: &Stream) -> Option<&'static str> {
    // What lies over a disk in its place stays over it.
    if !stream.bases.is_empty() {
        return None;
    }
    let segments = &stream.journal.segments;
    let front = segments.front()?;
    if Some(front.uid) == stream.journal.active_uid() {
        return None;
    }
    let Some(last) = front.last_seq() else { return Some("") };
    // The newest frame stays in the journal: it says where the stream stands.
    if !segments.iter().skip(1).any(|segment| !segment.frames.is_empty()) {
        return None;
    }
    if last <= stream.points.floor() {
        return Some("");
    }
    // The newest complete point is not given up, whatever its age. Where what comes does not fit beside it, it goes to a
    // shelf of its own (`target/keep.rs`).
    let newest = stream.points.newest_above_floor();
    let past = newest.map_or(stream.points.kept().is_some(), |newest| newest < last) && !mutant!(NewestCompleteFolded);
    // What a source asks about must be answered first; that is a matter of moments.
    if stream.compare.pin().is_some_and(|pin| pin < last) {
        return None;
    }
    // A point in use holds history back while there is room. When that gets short, its view is given a shelf.
    let bounds = &stream.bounds;
    let short = stream.journal.bytes > bounds.budget_bytes / 2
        || stream.journal.index_bytes() > bounds.index_bytes / 2
        || stream.fold.space_low;
    if !short && !stream.pinned_below(last).is_empty() && !mutant!(PinIgnored) {
        return None;
    }
    let age = stream.journal.stream_time().saturating_sub(front.time.1);
    let age = if mutant!(RetentionByWallClock) { wall_age(stream) } else { age };
    if age > stream.config.retention && !past {
        return Some("");
    }
    if stream.journal.bytes + 2 * bounds.segment_bytes > bounds.budget_bytes {
        return Some("the journal's budget");
    }
    if stream.fold.space_low {
        return Some("the room on the file system");
    }
    if stream.journal.index_bytes() > bounds.index_bytes {
        return Some("the memory for the index");
    }
    None
}

/// The bug of [`RetentionByWallClock`](crate::mutant::Mutant::RetentionByWallClock).
fn wall_age(stream: &Stream) -> Nanos {
    let wall =
        |segment: Option<&crate::journal::Segment>| segment.and_then(|s| s.frames.last()).map_or(0, |f| f.wall_ns);
    let newest = stream.journal.segments.iter().rev().find(|segment| !segment.frames.is_empty());
    wall(newest).saturating_sub(wall(stream.journal.segments.front()))
}
