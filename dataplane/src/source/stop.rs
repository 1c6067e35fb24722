//! A clean stop: requests end, the disks are flushed, the queue is shipped or put into the spill, the logs say so. What
//! cannot be done in time is left to the next life: its bits stay set.
//!
//! With the queue in the spill bits stay set, too, but the logs' headers name the place up to which the spill must be
//! found whole; then nothing is in doubt. They are written last: the disks flushed before, the spill durable before.

use afterimage_wire::record::RecordKind;

use super::group::{Around, Group, Phase};
use super::status::SourceEvent;
use crate::capture::{Disk, Gate};
use crate::intent::IntentLog;
use crate::io::{Io, Nanos};
use crate::sealers::Payload;
use crate::ship::{Event, SMALL_COST};
use crate::spill::Spill;

/// With a spill, acknowledgements are waited for at most this long: a restart is quicker than a long queue.
const SHIP_WAIT: Nanos = 500_000_000;
/// Without one, at most this long: hosts wait for the next process meanwhile, and what is not acknowledged is compared then.
const SHIP_WAIT_ALONE: Nanos = 1_000_000_000;

/// What a stop waits for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum StopStage {
    /// Requests under way.
    Drain,
    /// The flush of every disk.
    Flush,
    /// Acknowledgements.
    Ship,
    /// The spill, to hold what is not acknowledged.
    Spill,
    /// Bits to be cleared.
    Clear,
    /// The last headers.
    Mark,
    /// The kernel.
    Close,
}

impl StopStage {
    /// Frames may still leave.
    pub fn ships(self) -> bool {
        matches!(self, Self::Drain | Self::Flush | Self::Ship)
    }
}

impl Group {
    /// Begins to stop.
    pub fn stop<I: Io>(&mut self, w: &mut Around<'_, I>) {
        if matches!(self.phase, Phase::Stopping(_) | Phase::Closed) {
            return;
        }
        let opened = self.phase == Phase::Open;
        self.stop_at = w.io.now() + self.limits.stop_wait;
        self.phase = Phase::Stopping(if opened { StopStage::Drain } else { StopStage::Close });
        self.set_gates(w, Gate::Stopping);
    }

    /// Goes on with a stop.
    pub fn stop_turn<I: Io>(&mut self, w: &mut Around<'_, I>, stage: StopStage) {
        let now = w.io.now();
        let late = now >= self.stop_at;
        let next = match stage {
            StopStage::Drain if self.all_disks(w.disks, |d| d.is_drained() && d.sync.is_quiet()) => {
                self.each_disk(w, |disk, f| disk.flush_own(f));
                StopStage::Flush
            }
            StopStage::Flush if self.all_disks(w.disks, |d| !d.flush.is_busy()) => {
                if !self.ship.queue.closed && self.all_disks(w.disks, |d| d.sync.running().is_none()) {
                    let event = Event { kind: RecordKind::End, disk: 0, offset: 0, len: 0 };
                    let (mono, wall) = (now, w.io.wall());
                    self.ship.queue.push(event, Payload::None, 0, SMALL_COST, mono, wall);
                }
                StopStage::Ship
            }
            StopStage::Ship if self.fenced.is_none() && self.should_spill(now) => {
                // What is on its way comes back; what arrives nevertheless is passed over when it is sent again.
                self.ship.link.close(w.io);
                StopStage::Spill
            }
            StopStage::Spill => match self.spill_all(w, late) {
                Some(next) => next,
                None => stage,
            },
            StopStage::Ship
                if late
                    || self.waited(now, SHIP_WAIT_ALONE)
                    || self.fenced.is_some()
                    || (self.ship.is_drained() && self.ship.link.announced) =>
            {
                self.clean = self.ship.is_drained() && self.ship.link.announced && self.is_complete(w.disks);
                self.clean |= mutant!(CleanStopUnsent);
                self.ship.link.close(w.io);
                if self.ship.link.announced {
                    let clean = self.clean;
                    let (frame, seq) = (self.ship.acked_frame, self.ship.acked_seq);
                    self.each_disk(w, |disk, _| {
                        let epoch = disk.flush.flushed();
                        let covered = crate::intent::Covered { frame, seq, epoch, bound: 0 };
                        match &mut disk.log {
                            Some(log) if clean => log.clear_all(&covered),
                            Some(log) => {
                                log.set_header(|h| (h.acked_frame, h.acked_seq) = (frame, seq));
                            }
                            None => {}
                        }
                    });
                }
                StopStage::Clear
            }
            StopStage::Clear => {
                let (frame, seq) = (self.ship.acked_frame, self.ship.acked_seq);
                self.each_disk(w, |disk, f| {
                    let epoch = disk.flush.flushed();
                    if let Some(log) = &mut disk.log {
                        log.clear(&crate::intent::Covered { frame, seq, epoch, bound: 0 });
                        log.pump(f.io);
                    }
                });
                if self.all_logs(w.disks, |log| log.is_settled() && !log.is_clearing()) {
                    let spilled = self.spilled.unwrap_or_default();
                    let hot = self.spilled.is_none() && !self.all_logs(w.disks, |log| log.hot() == 0);
                    self.clean &= !hot || mutant!(CleanStopUnsent);
                    if self.clean {
                        self.each_disk(w, |disk, f| {
                            // The last write of the disk has ended: a later change of the file is not ours.
                            let mtime = f.io.info(disk.file).map_or(0, |info| info.mtime_ns);
                            if let Some(log) = &mut disk.log {
                                log.set_header(|h| (h.clean, h.mtime_ns, h.spilled) = (true, mtime, spilled));
                                log.pump(f.io);
                            }
                        });
                    }
                    StopStage::Mark
                } else if late && self.all_logs(w.disks, IntentLog::is_broken) {
                    self.clean = false;
                    StopStage::Close
                } else {
                    stage
                }
            }
            StopStage::Mark
                if self.all_logs(w.disks, IntentLog::is_settled)
                    || (late && self.all_logs(w.disks, IntentLog::is_broken)) =>
            {
                StopStage::Close
            }
            StopStage::Close
                if self.all_disks(w.disks, Disk::is_quiet) && !self.spill.as_ref().is_some_and(Spill::is_making) =>
            {
                self.close(w);
                return;
            }
            stage => stage,
        };
        self.phase = Phase::Stopping(next);
        if next != stage {
            self.compose_and_send(w);
            self.stop_turn(w, next);
        }
    }

    /// There is a spill, and the target does not take the rest soon.
    fn should_spill(&self, now: Nanos) -> bool {
        self.spill.is_some()
            && !self.ship.queue.closed
            && !self.ship.is_drained()
            && (!self.ship.takes() || self.waited(now, SHIP_WAIT))
    }

    /// The stop began that long ago.
    fn waited(&self, now: Nanos, time: Nanos) -> bool {
        now + self.limits.stop_wait >= self.stop_at + time
    }

    /// Puts everything that is not acknowledged into the spill; what comes next when it is there, or cannot be.
    fn spill_all<I: Io>(&mut self, w: &mut Around<'_, I>, late: bool) -> Option<StopStage> {
        self.compose_and_send(w);
        self.spill_turn(w);
        let spill = self.spill.as_mut()?;
        let durable = if self.ship.is_spilled() { spill.make_durable(w.io) } else { Ok(false) };
        if durable == Ok(false) && !late {
            return None;
        }
        let place = spill.place();
        let (incarnation, seq) = (self.ship.incarnation, self.ship.queue.last_seq());
        // The place is that of the last record, or there is nothing to rest a clean stop on.
        let whole = durable == Ok(true) && (place.incarnation, place.seq) == (incarnation, seq);
        if whole && self.is_complete(w.disks) {
            self.clean = true;
            self.spilled = Some(place);
        }
        self.name_acked(w);
        Some(StopStage::Clear)
    }

    /// The logs name the acknowledged place, if they name its writer.
    fn name_acked<I: Io>(&mut self, w: &mut Around<'_, I>) {
        if !self.ship.link.announced {
            return;
        }
        let (frame, seq) = (self.ship.acked_frame, self.ship.acked_seq);
        self.each_disk(w, |disk, _| {
            if let Some(log) = &mut disk.log {
                log.set_header(|h| (h.acked_frame, h.acked_seq) = (frame, seq));
            }
        });
    }

    /// Every disk is complete at the target, and on stable storage here.
    fn is_complete(&self, disks: &[Option<Disk>]) -> bool {
        self.all_disks(disks, |disk| {
            !disk.sync.is_open()
                && !disk.sync.whole_owed
                && disk.is_flush_clean()
                && !disk.flush.has_failed()
                && disk.log.as_ref().is_none_or(|log| !log.owes())
        })
    }

    fn close<I: Io>(&mut self, w: &mut Around<'_, I>) {
        self.ship.link.close(w.io);
        if let Some(spill) = &mut self.spill {
            spill.close(w.io);
        }
        for index in &self.disks {
            if let Some(disk) = w.disks[*index as usize].take() {
                w.io.close(disk.file);
                if let Some(log) = disk.log {
                    log.close(w.io);
                }
            }
        }
        self.phase = Phase::Closed;
        w.events.push_back(SourceEvent::Stopped { stream: self.config.stream, clean: self.clean });
    }
}
