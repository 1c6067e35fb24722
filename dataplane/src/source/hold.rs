//! What holds the I/O of a group's disks, and what lets it go: a fence (said by the coordinator, or found out from the
//! target), a lease that has run out, and synchronous mode, which holds answers only.
//!
//! A source that hears that the target holds a newer generation *steps down*: the machine may run elsewhere by now. It
//! holds all I/O of the disks concerned until it is given a generation above that one. Disks of the same group that
//! were not fenced go on: the others leave the stream, with a new incarnation, since records of theirs that are under
//! way must not arrive any more. What a disk holds that the target does not is in its write-intent log, and stays there
//! until the disk is given back.

use afterimage_wire::ids::DiskId;
use afterimage_wire::record::RecordKind;

use super::group::{Around, Group, Phase};
use super::status::{HoldReason, SourceEvent};
use super::synchronous::{Seen, millis};
use crate::io::{Io, Nanos};
use crate::sealers::Payload;
use crate::ship::{Event, LinkState, SMALL_COST};

impl Group {
    /// Why all of its I/O is held, if it is.
    pub fn hold_reason(&self, since_boot: Nanos) -> Option<HoldReason> {
        if self.fenced.is_some() || self.doubted {
            Some(HoldReason::SteppedDown)
        } else if self.held {
            Some(HoldReason::Told)
        } else if !self.lease.holds(since_boot) {
            Some(HoldReason::Lease)
        } else {
            None
        }
    }

    /// Takes over what the link has heard, and brings every disk to what should be.
    pub fn hold_turn<I: Io>(&mut self, w: &mut Around<'_, I>) {
        if let Some(at) = self.ship.word_at {
            self.lease.word(at);
        }
        let reason = self.hold_reason(w.io.since_boot());
        let end = self.lease.end();
        let left = end.saturating_sub(w.io.since_boot());
        self.lease_due = (end != Nanos::MAX).then(|| w.io.now() + left);
        self.each_disk(w, |disk, f| {
            disk.lease_end = end;
            disk.hold(f, reason.is_some() || disk.out.is_some_and(|generation| generation > 0));
        });
        if reason != self.hold_told {
            self.hold_told = reason;
            w.events.push_back(SourceEvent::Held { stream: self.config.stream, reason });
        }
        if let Some(at) = self.lease.next_kept() {
            self.set_headers(w.disks, |h| h.lease_at = at);
        }
    }

    /// Goes on with synchronous mode: answers whoever may be answered. Before frames are composed.
    pub fn sync_mode_turn<I: Io>(&mut self, w: &mut Around<'_, I>, now: Nanos) {
        let named = millis(self.synchronous.deadline());
        if named != self.promised_ms && !self.synchronous.owes() {
            self.promised_ms = named;
            self.set_headers(w.disks, |h| h.promised_ms = named);
        }
        // Not before whoever waited under another policy, or for what was promised, has been let go.
        if self.synchronous.deadline() == 0 && !self.synchronous.holds_answers() && !self.ship.queue.holds_answers {
            return;
        }
        let queue = &self.ship.queue;
        let whole = !matches!(self.phase, Phase::Opening | Phase::Closed) && !queue.closed && !queue.overflow;
        let complete = whole
            && self.all_disks(w.disks, |disk| !disk.sync.is_open() && !disk.sync.whole_owed)
            && self.all_logs(w.disks, |log| log.durable_header().promised_ms >= named);
        let seen = Seen {
            ready: self.ship.link.is_ready(),
            complete,
            drawn: queue.last_seq(),
            acked: self.ship.acked_seq,
            oldest: self.awaits_since(w.disks),
        };
        let before = self.synchronous.why_apart();
        self.synchronous.turn(now, &seen);
        self.sync_mode_apply(w, seen.acked);
        if self.synchronous.why_apart() != before || self.synchronous.is_together() != self.together_told {
            self.together_told = self.synchronous.is_together();
            let (stream, why) = (self.config.stream, self.synchronous.why_apart());
            let why = why.map(str::to_owned);
            w.events.push_back(SourceEvent::Synchronous { stream, together: self.together_told, why });
        }
    }

    fn sync_mode_apply<I: Io>(&mut self, w: &mut Around<'_, I>, acked: u64) {
        self.ship.queue.holds_answers = self.synchronous.holds_answers();
        self.ship.promise_ms = self.synchronous.promise_ms();
        if !self.synchronous.holds_answers() {
            self.each_disk(w, |disk, f| disk.answer_acked(f, u64::MAX));
        } else if self.synchronous.answers_acked() {
            self.each_disk(w, |disk, f| disk.answer_acked(f, acked));
        }
    }

    /// Since when the oldest answer waits for an acknowledgement.
    pub fn awaits_since(&self, disks: &[Option<crate::capture::Disk>]) -> Option<Nanos> {
        self.disks.iter().filter_map(|index| disks[*index as usize].as_ref()?.awaits_since()).min()
    }

    /// The records that answers wait for are given up.
    pub fn part_and_strand<I: Io>(&mut self, w: &mut Around<'_, I>) {
        self.synchronous.part(w.io.now(), "what was not acknowledged is given up and synchronised anew");
        self.ship.promise_ms = self.synchronous.promise_ms();
        self.each_disk(w, |disk, _| disk.strand_answers());
    }

    /// The target has said that a disk was fenced, not which: nothing is answered until it is known.
    pub fn fenced_somewhere<I: Io>(&mut self, w: &mut Around<'_, I>, generation: u64) {
        if self.claims_enough(w, None, generation) {
            return self.lost(w, "the target fenced what this source has been given since");
        }
        if self.disks_in(w).count() <= 1 {
            return self.step_down(w, None, generation);
        }
        self.doubted = true;
        self.ship.link.close(w.io);
        self.ship.link.again(w.io.now());
        self.hold_turn(w);
    }

    /// A fence of this generation is no newer than what the disk (each disk, if none is named) has been given: what was
    /// refused is a claim from before, and is made again.
    pub fn claims_enough<I: Io>(&self, w: &Around<'_, I>, disk: Option<DiskId>, generation: u64) -> bool {
        let disks = self.disks.iter().filter_map(|index| w.disks[*index as usize].as_ref());
        let mut within = disks.filter(|one| one.out.is_none() && disk.is_none_or(|id| one.config.id == id)).peekable();
        within.peek().is_some() && within.all(|one| one.config.generation >= generation)
    }

    fn disks_in<'a, I>(&'a self, w: &'a Around<'_, I>) -> impl Iterator<Item = DiskId> + 'a {
        let disks = self.disks.iter().filter_map(|index| w.disks[*index as usize].as_ref());
        disks.filter(|disk| disk.out.is_none()).map(|disk| disk.config.id)
    }

    /// The target holds a newer generation of a disk (of all, if none is named): it leaves the stream, and its I/O is
    /// held.
    pub fn step_down<I: Io>(&mut self, w: &mut Around<'_, I>, disk: Option<DiskId>, generation: u64) {
        let others = self.disks_in(w).filter(|id| Some(*id) != disk).count();
        let known = disk.is_some_and(|id| self.disks_in(w).any(|other| other == id));
        let all = !known || others == 0;
        self.each_disk(w, |one, f| {
            if one.out.is_none() && (all || Some(one.config.id) == disk) {
                one.out = Some(generation);
                if let Some(log) = &mut one.log {
                    log.set_header(|h| h.fenced = true);
                    log.pump(f.io);
                }
            }
        });
        let stream = self.config.stream;
        w.events.push_back(SourceEvent::Fenced { stream, disk: disk.filter(|_| known), generation });
        if all {
            self.forget_queue(w, 0);
            self.ship.queue.closed = true;
            self.ship.link.state = LinkState::Off;
            self.fenced = Some(generation);
            self.doubted = false;
        } else {
            self.reincarnate(w, false, 0);
            self.ship.link.again(w.io.now());
        }
        self.hold_turn(w);
    }

    /// The disks are this source's again under these generations, if they are above those that it was fenced by.
    pub fn set_generations<I: Io>(&mut self, w: &mut Around<'_, I>, generations: &[(DiskId, u64)]) {
        let mut back = false;
        self.each_disk(w, |disk, f| {
            let given = generations.iter().find(|(id, _)| *id == disk.config.id).map(|(_, generation)| *generation);
            let Some(generation) = given.filter(|generation| *generation > disk.config.generation) else { return };
            disk.config.generation = generation;
            let again = disk.out.is_some_and(|fenced| fenced > 0 && generation >= fenced);
            if again {
                disk.out = None;
                back = true;
            }
            if let Some(log) = &mut disk.log {
                log.set_header(|h| {
                    h.generation = generation;
                    h.fenced &= !again;
                });
            }
            if again && std::mem::take(&mut disk.left) {
                // The target takes a disk that has left for one that was written by others since.
                disk.owe_all();
                if let Some(log) = &mut disk.log {
                    log.set_header(|h| h.left = false);
                }
            }
            if let Some(log) = &mut disk.log {
                log.pump(f.io);
            }
        });
        if back {
            self.fenced = None;
            self.ship.queue.closed = false;
            // What it wrote since is in the logs, and is synchronised: the target goes on from what it holds.
            self.reincarnate(w, false, 0);
        }
        self.doubted = false;
        self.refused = None;
        if !self.ship.link.is_up() && self.fenced.is_none() && !matches!(self.ship.link.state, LinkState::Asked) {
            self.ship.link.again(w.io.now());
        }
        self.hold_turn(w);
    }

    /// Says in the stream that a disk is not in it any more.
    pub fn draw_leave<I: Io>(&mut self, w: &mut Around<'_, I>, slot: u16) -> u64 {
        let (now, wall) = (w.io.now(), w.io.wall());
        let event = Event { kind: RecordKind::Leave, disk: slot, offset: 0, len: 0 };
        self.ship.queue.push(event, Payload::None, 0, SMALL_COST, now, wall)
    }
}
