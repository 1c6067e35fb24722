//! The newest complete point beside a synchronisation for which the journal has no room: it is kept below the floor.
//!
//! ```text
//! room is short, and the oldest segment ends behind the newest complete point ─▶ what the segment overwrites of it goes to a
//! shelf ─▶ floor raised ─▶ segment folded … ─▶ a newer point is complete ─▶ the shelf is removed, unless a view shows it
//! ```
//! The shelf is a view's in all but its name, which says the point and cannot be a view's, and survives a restart. Without
//! it the stream would stop for good: the synchronisation, which alone makes a newer complete point, would not fit.

use super::stream::Stream;
use crate::delta::Delta;
use crate::index::points::{Kept, Lives};
use crate::io::Io;
use crate::shelf::{Pin, kept_of, name_of_kept, view_of};

impl Stream {
    /// Points that are kept without a view, or are about to be.
    pub(crate) fn kept_pins(&self) -> Vec<Pin> {
        let shelves = self.history.state().views.iter().filter(|view| !view.removing);
        let mut kept: Vec<(u64, u64)> = shelves.filter_map(|view| kept_of(&view.name)).collect();
        kept.extend(self.keeping.filter(|keeping| !kept.iter().any(|(seq, _)| *seq == keeping.0)));
        let pin = |(seq, wall_ns): (u64, u64)| {
            let name = name_of_kept(seq, wall_ns);
            let name = view_of(&name).unwrap_or_default().to_owned();
            Pin { name, seq, failover: true, durable: true }
        };
        kept.into_iter().map(pin).collect()
    }

    /// The shelf of a view, its own or that of its point.
    pub(crate) fn shelf_for(&self, view: &str, seq: u64) -> Option<&Delta> {
        let of_point = || self.deltas.iter().find(|delta| kept_of(&delta.view.name).is_some_and(|kept| kept.0 == seq));
        self.shelf(view).or_else(of_point)
    }

    /// The oldest segment is to be folded: if the newest complete point lies before its end, that is to be kept.
    pub(crate) fn keep_newest(&mut self) {
        let last = self.journal.segments.front().and_then(|front| front.last_seq()).unwrap_or(0);
        let newest = self.points.newest_above_floor().filter(|newest| *newest < last && !mutant!(NewestCompleteFolded));
        self.keeping = newest.map(|seq| (seq, self.describe(seq).wall_ns));
    }

    /// The floor is about to be raised to `last`, and all that the point needs is on its shelf, durably.
    pub(crate) fn keep_point(&mut self, last: u64) {
        let Some((seq, wall_ns)) = self.keeping.take().filter(|(seq, _)| *seq < last) else { return };
        let mut lives = self.points.at(seq);
        lives.retain(|_, life| life.member);
        tracing::info!(stream = %self.config.stream, seq, "the newest complete point is kept while history is folded past it");
        self.points.keep(Some(Kept { seq, wall_ns, lives }));
    }

    /// After a start: the newest of the points on shelves below the floor.
    pub(crate) fn find_kept(&mut self) {
        let floor = self.points.floor();
        let good = self.deltas.iter().filter(|delta| !delta.damaged && delta.failed.is_none());
        let below = good.filter_map(|delta| Some((kept_of(&delta.view.name)?, delta)));
        let newest = below.filter(|((seq, _), _)| *seq < floor).max_by_key(|((seq, _), _)| *seq);
        let kept = newest.map(|((seq, wall_ns), delta)| {
            let mut lives: Lives = delta.points.now().clone();
            // It was complete when it was put there.
            for life in lives.values_mut() {
                (life.member, life.owes_whole) = (true, false);
                life.open.clear();
            }
            Kept { seq, wall_ns, lives }
        });
        self.points.keep(kept.filter(|kept| !kept.lives.is_empty()));
    }

    /// Removes the shelves of points that are neither the newest complete one nor shown by a view.
    pub(crate) fn release_kept<I: Io>(&mut self, io: &mut I) {
        if self.shelving.is_busy() {
            return;
        }
        let newest = self.points.kept().map(|kept| kept.seq);
        let about_to = self.keeping.map(|(seq, _)| seq);
        let has_own = |view: &str| self.shelf(view).is_some();
        let shown = |seq: u64| {
            let mut deltas = self.history.state().views.iter();
            self.view_pins.iter().any(|pin| pin.seq == seq && !has_own(&pin.name))
                || deltas.any(|view| view.seq == seq && view_of(&view.name).is_none() && !has_own(&view.name))
        };
        let idle = self.deltas.iter().position(|delta| {
            let seq = kept_of(&delta.view.name).map(|(seq, _)| seq);
            seq.is_some_and(|seq| ![newest, about_to].contains(&Some(seq)) && !shown(seq))
        });
        let Some(at) = idle else { return };
        let seq = self.deltas[at].view.seq;
        self.shelving.abandon();
        if self.points.kept().is_none() {
            self.points.keep(None);
        }
        match self.remove_delta(io, at) {
            Ok(()) => tracing::info!(stream = %self.config.stream, seq, "a newer point is complete: the kept one goes"),
            // A start goes on with it.
            Err(error) => tracing::warn!(stream = %self.config.stream, %error, "a kept point cannot be removed yet"),
        }
    }
}
