//! After a failed write or sync a journal is not trusted until it has been recovered by reading: that happens here, by
//! itself, while everything that it holds stays readable.
//!
//! ```text
//! failed ─▶ nothing under way any more ─▶ files for writing closed ─▶ read back beside the old one, as after a start
//!        ─▶ synced ─▶ takes the old one's place: what was on its way is in it, or comes again from the source
//! ```

use std::collections::VecDeque;

use super::ops::{Ctx, JournalId, Purpose};
use super::status::TargetEvent;
use super::stream::Stream;
use crate::index::Points;
use crate::io::{Done, Io, Nanos};
use crate::journal::Journal;
use crate::journal::recover::{Progress, Recovery};

/// From the failure to the first try, and between tries.
const AGAIN: Nanos = 1_000_000_000;

/// A journal that is being read back while the old one serves.
#[derive(Debug)]
pub(crate) struct Reopen {
    which: JournalId,
    recovery: Recovery,
    journal: Journal,
    points: Points,
}

impl Reopen {
    /// Gives up.
    pub fn close<I: Io>(&mut self, io: &mut I) {
        self.recovery.close(io);
        self.journal.close(io);
    }
}

impl Stream {
    /// Goes on with a journal that has failed.
    pub(crate) fn reopen_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>, events: &mut VecDeque<TargetEvent>) {
        let Some(mut reopen) = self.reopening.take() else { return self.begin_reopen(ctx.io, events) };
        let Reopen { recovery, journal, points, .. } = &mut *reopen;
        match recovery.turn(ctx, Purpose::Recover(self.id), journal, points) {
            Progress::Waiting => self.reopening = Some(reopen),
            Progress::Ready => self.take_place(ctx.io, *reopen, events),
            Progress::Failed(why) => self.put_off(ctx.io, *reopen, &why),
        }
    }

    /// When to go on although nothing completes.
    pub(crate) fn reopen_deadline(&self) -> Option<Nanos> {
        match &self.reopening {
            Some(reopen) => reopen.recovery.deadline(),
            None => self.reopen_at,
        }
    }

    /// A read or sync has ended.
    pub(crate) fn reopen_done<I: Io>(&mut self, io: &mut I, done: Done) {
        let Some(mut reopen) = self.reopening.take() else { return };
        let Reopen { recovery, journal, points, .. } = &mut *reopen;
        match recovery.done(io, done, journal, points) {
            Ok(()) => self.reopening = Some(reopen),
            Err(why) => self.put_off(io, *reopen, &why),
        }
    }

    fn put_off<I: Io>(&mut self, io: &mut I, mut reopen: Reopen, why: &str) {
        tracing::error!(stream = %self.config.stream, why, "a failed journal cannot be read back yet");
        reopen.close(io);
        self.reopen_at = Some(io.now() + AGAIN);
    }

    fn failed_journal(&self) -> Option<JournalId> {
        if self.journal.failed().is_some() {
            return Some(self.journal.id);
        }
        self.deltas.iter().find(|delta| delta.journal.failed().is_some()).map(|delta| delta.journal.id)
    }

    fn begin_reopen<I: Io>(&mut self, io: &mut I, events: &mut VecDeque<TargetEvent>) {
        let Some(which) = self.failed_journal() else {
            self.reopen_at = None;
            return;
        };
        let now = io.now();
        if *self.reopen_at.get_or_insert(now + AGAIN) > now {
            return;
        }
        // What is durable is indexed first: no point disappears, not even for a moment.
        self.index_written(usize::MAX, events);
        let points = match which {
            JournalId::Stream(_) => self.points_at_floor(),
            JournalId::Delta(_) => Points::default(),
        };
        let busy = self.fold.is_busy() || !self.scrub.is_quiet();
        let Some(old) = self.journal_mut(which) else { return };
        if busy || !old.is_settled() {
            self.reopen_at = Some(now + AGAIN / 100);
            return;
        }
        old.stop_writing(io);
        let (journal, timeline) = (old.successor(), old.config.timeline);
        match self.segment_files(io, timeline) {
            Ok(files) => {
                let recovery = Recovery::new(files, self.damage.now_known());
                self.reopening = Some(Box::new(Reopen { which, recovery, journal, points }));
                self.reopen_at = Some(now);
            }
            Err(why) => {
                tracing::error!(stream = %self.config.stream, why, "a failed journal cannot be read back yet");
                self.reopen_at = Some(now + AGAIN);
            }
        }
    }

    fn take_place<I: Io>(&mut self, io: &mut I, reopen: Reopen, events: &mut VecDeque<TargetEvent>) {
        let timeline = reopen.journal.config.timeline;
        tracing::warn!(stream = %self.config.stream, %timeline, "a failed journal has been read back and is used again");
        self.reopen_at = None;
        self.damage.forget_unknown(timeline, self.points.floor());
        for damage in reopen.recovery.damage.iter().cloned() {
            self.damage.add(timeline, damage.clone());
            self.name_damage(damage, events);
        }
        match reopen.which {
            JournalId::Stream(_) => {
                let old = std::mem::replace(&mut self.journal, reopen.journal);
                self.journal.inherit(io, old);
                self.points = reopen.points;
                self.find_kept();
                if let Err(error) = self.keep_base(io) {
                    return self.fail(error.to_string(), events);
                }
                self.keep_damage(io);
                self.after_reopen();
                events.push_back(TargetEvent::Ready { stream: self.config.stream });
            }
            JournalId::Delta(id) => {
                let Some(delta) = self.deltas.iter_mut().find(|delta| delta.id == id) else {
                    return { reopen.journal }.close(io);
                };
                delta.reopened(io, reopen.journal, reopen.points);
                delta.recovered(&reopen.recovery.damage);
            }
        }
        self.doubt_lost(io.now());
    }
}
