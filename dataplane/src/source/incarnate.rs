//! The begin of an incarnation, and its connections.
//!
//! Before the first frame of an incarnation leaves, every log of the group names it durably: so a later life knows
//! whether the target may hold anything of it. The first records are the joins of the disks and the begins of what must
//! be synchronised; what the target says when it first accepts can make that more, and then the incarnation, of which
//! nothing has been sent, is begun anew.

use std::sync::Arc;

use afterimage_wire::WIRE_VERSION;
use afterimage_wire::control::StopReason;
use afterimage_wire::handshake::{DiskClaim, Hello, Position, Refusal};
use afterimage_wire::ids::IncarnationId;
use afterimage_wire::record::RecordKind;
use afterimage_wire::segment::{Predecessor, WrappedKey};

use super::group::{Around, Group, Phase};
use super::status::{LinkFailure, SourceEvent};
use crate::capture::{Disk, Gate};
use crate::intent::IntentLog;
use crate::io::{Done, Io, Nanos, Sock};
use crate::seal::{ControlKey, DataKey, PolicyKey};
use crate::sealers::Payload;
use crate::ship::{Event, Heard, LinkState, SMALL_COST};
use crate::spill::SpillWriter;

/// After so many frames refused as bad in a row, what is in memory is not trusted any more.
const MAX_BAD_FRAMES: u32 = 3;
/// Incarnations are not begun faster than this without a pause.
const INCARNATION_PACE: Nanos = 1_000_000_000;

/// A fresh writer: its id, its key, and the key wrapped.
pub(super) fn fresh_writer<I: Io>(io: &mut I, policy: &PolicyKey) -> (IncarnationId, DataKey, WrappedKey) {
    let (mut id, mut key, mut nonce) = ([0; 16], [0; 32], [0; 12]);
    io.random(&mut id);
    io.random(&mut key);
    io.random(&mut nonce);
    let incarnation = IncarnationId(id);
    let key = DataKey::new(if mutant!(NonceReused) { [7; 32] } else { key });
    let wrapped = policy.wrap(incarnation, &key, nonce);
    (incarnation, key, wrapped)
}

impl Group {
    /// The logs are ready: the stream begins, and host I/O with it.
    pub fn open<I: Io>(&mut self, w: &mut Around<'_, I>) {
        self.phase = Phase::Open;
        let fenced = |disk: &Disk| disk.out.filter(|generation| *generation > 0);
        let newest = self.disks.iter().filter_map(|index| fenced(w.disks[*index as usize].as_ref()?)).max();
        if self.all_disks(w.disks, |disk| fenced(disk).is_some()) {
            // As the process before has found out: the logs say so.
            self.ship.queue.closed = true;
            self.ship.link.state = LinkState::Off;
            self.fenced = newest;
        } else if self.ship.past().is_some() && !self.all_disks(w.disks, |disk| disk.out.is_none()) {
            // What earlier lives left in the spill has records of a disk that is not in the stream any more.
            self.reincarnate(w, false, 0);
        } else {
            self.draw_head(w);
        }
        self.set_gates(w, Gate::Open);
    }

    /// The first records of an incarnation: every disk joins, every disk that owes a synchronisation begins it.
    fn draw_head<I: Io>(&mut self, w: &mut Around<'_, I>) {
        let (now, wall) = (w.io.now(), w.io.wall());
        self.draw_leaves(w);
        self.each_disk(w, |disk, f| {
            if disk.out.is_some() {
                return;
            }
            let mut body = Vec::with_capacity(128);
            disk.describe().encode(&mut body);
            let event = Event { kind: RecordKind::Join, disk: disk.config.slot, offset: 0, len: 0 };
            if let Some(queue) = f.queue.as_deref_mut() {
                queue.push(event, Payload::Mark(body), 0, SMALL_COST, now, wall);
            }
        });
        let mut whole = true;
        self.each_disk(w, |disk, f| {
            if disk.out.is_some() {
                return;
            }
            let everything = disk.log.as_ref().is_none_or(|log| log.dirty() == log.extents_of_disk());
            whole &= disk.sync.whole_owed && everything;
            if disk.sync.whole_owed {
                disk.begin_sync(f, true);
            } else if disk.sync.end_owed || disk.log.as_ref().is_some_and(|log| log.dirty() > 0) {
                disk.begin_sync(f, false);
            }
        });
        self.head_whole = whole;
    }

    /// Gives up everything that is queued and begins a new incarnation: what was not acknowledged is in the dirty map
    /// then, and is synchronised; everything is, from zero, if `whole`. Numbers go on at `least` or above.
    pub fn reincarnate<I: Io>(&mut self, w: &mut Around<'_, I>, whole: bool, least: u64) {
        self.forget_queue(w, least);
        if self.phase != Phase::Open {
            return;
        }
        if whole {
            self.each_disk(w, |disk, _| disk.owe_all());
        }
        self.draw_head(w);
        self.ship.queue.overflow = false;
    }

    /// What heads of spill segments say of this life.
    pub fn spill_writer(&self, disks: &[Option<Disk>]) -> SpillWriter {
        let info = |index: &u32| disks[*index as usize].as_ref().map(Disk::describe);
        SpillWriter {
            incarnation: self.ship.incarnation,
            predecessor: self.predecessor,
            wrapped: self.wrapped,
            disks: self.disks.iter().filter_map(info).collect(),
        }
    }

    /// Another policy key: a new incarnation under it, at a moment when nothing is on its way, so that nothing is in doubt.
    pub(super) fn key_turn<I: Io>(&mut self, w: &mut Around<'_, I>) {
        if self.wrapped.policy_key == self.config.policy_key.id
            || self.phase != Phase::Open
            || self.fenced.is_some()
            || self.ship.past().is_some()
            || !self.ship.link.is_ready()
            || !self.ship.is_drained()
            || !self.leaving.is_empty()
            || self.spill.as_ref().is_some_and(|spill| !spill.is_empty())
        {
            return;
        }
        let quiet = |disk: &Disk| {
            let owes = disk.sync.is_open() || disk.sync.whole_owed || disk.sync.end_owed;
            disk.out.is_none() && !owes && disk.log.as_ref().is_none_or(|log| log.dirty() == 0)
        };
        if self.all_disks(w.disks, quiet) {
            self.reincarnate(w, false, 0);
            "a writer under another policy key introduces itself".clone_into(&mut self.ship.link.reason);
        }
    }

    /// Everything of an earlier life is at the target: the next one is shipped, on a connection of its own.
    fn next_life<I: Io>(&mut self, w: &mut Around<'_, I>) {
        self.ship.link.close(w.io);
        self.ship.link.announced = false;
        self.announcing = None;
        self.ship.next_life(w.io, self.spill.as_mut(), self.first_seq);
        if self.ship.past().is_none() {
            self.rpo.shipped();
        }
        "the next life of this source introduces itself".clone_into(&mut self.ship.link.reason);
        self.ship.link.again(w.io.now());
    }

    pub fn forget_queue<I: Io>(&mut self, w: &mut Around<'_, I>, least: u64) {
        self.part_and_strand(w);
        let (frame, seq) = (self.ship.acked_frame, self.ship.acked_seq);
        if let Some(past) = self.ship.past() {
            // This life has sent nothing. What the target may hold is the earlier one, if a log names it.
            let (incarnation, before) = (past.incarnation, past.predecessor);
            let named = |log: &IntentLog| log.header().incarnation == incarnation;
            if self.ship.link.announced || self.announcing.is_some() || self.all_logs(w.disks, named) {
                self.predecessor = Predecessor { incarnation, frame, seq };
                self.alternative = (frame == 0).then_some(before).filter(|p| !p.incarnation.is_none());
            } else {
                (self.predecessor, self.alternative) = (before, None);
            }
        } else if self.ship.link.announced {
            self.alternative = (frame == 0).then_some(self.predecessor).filter(|p| !p.incarnation.is_none());
            self.predecessor = Predecessor { incarnation: self.ship.incarnation, frame, seq };
        }
        // What is given up counts from when the oldest of it was numbered.
        self.rpo.incomplete(self.ship.oldest().unwrap_or_else(|| w.io.now()));
        let acked = self.ship.acked_seq;
        self.each_disk(w, |disk, _| {
            if let Some(log) = &mut disk.log {
                log.unacked_to_dirty(acked);
            }
            disk.sync.reset();
        });
        self.ship.link.close(w.io);
        self.ship.link.announced = false;
        self.announcing = None;
        self.bad_frames = 0;
        if let Some(spill) = &mut self.spill {
            spill.clear(w.io);
        }
        let (incarnation, key, wrapped) = fresh_writer(w.io, &self.config.policy_key);
        self.wrapped = wrapped;
        let hashes = self.config.policy_key.hash_key(self.config.stream, wrapped.policy_key);
        self.ship.queue.hash_key = Some(Arc::new(hashes));
        self.first_seq = self.ship.restart(incarnation, key, least);
        let now = w.io.now();
        if now < self.incarnated_at + INCARNATION_PACE {
            self.ship.link.fail(now, "a new incarnation begins");
        } else {
            self.ship.link.again(now);
        }
        self.incarnated_at = now;
    }

    fn hello(&self, disks: &[Option<Disk>]) -> Hello {
        let claim = |index: &u32| {
            let disk = disks[*index as usize].as_ref().filter(|disk| disk.out.is_none())?;
            Some(DiskClaim { disk: disk.describe(), generation: disk.config.generation })
        };
        let (predecessor, key, first_seq) = match self.ship.past() {
            Some(past) => (past.predecessor, past.wrapped, past.first_seq),
            None => (self.predecessor, self.wrapped, self.first_seq),
        };
        Hello {
            version: WIRE_VERSION,
            stream: self.config.stream,
            incarnation: self.ship.shipped_incarnation(),
            predecessor,
            key,
            first_seq,
            next_frame: self.ship.next_frame(),
            connection: 0,
            disks: self.disks.iter().filter_map(claim).collect(),
        }
    }

    /// Asks for a connection when one is due; gives a silent one up.
    pub fn link_turn<I: Io>(&mut self, w: &mut Around<'_, I>, now: Nanos) {
        if self.ship.link.is_silent(now) {
            self.lost(w, "nothing was heard from the target");
        }
        let wanted = match self.phase {
            Phase::Open => true,
            Phase::Stopping(stage) => stage.ships() && !self.ship.is_drained() && now < self.stop_at,
            Phase::Opening | Phase::Closed => false,
        };
        if wanted && self.fenced.is_none() && self.ship.link.is_due(now) {
            self.ship.link.state = LinkState::Asked;
            self.asked_at = w.io.since_boot();
            let hello = Box::new(self.hello(w.disks));
            w.events.push_back(SourceEvent::Connect { stream: self.config.stream, hello });
        }
    }

    /// See [`super::Source::cut_off`].
    pub fn cut_off<I: Io>(&mut self, w: &mut Around<'_, I>, why: &str) {
        // While one is being made there is none to end: who makes it looks at the peer.
        if matches!(self.ship.link.state, LinkState::Up { .. }) {
            self.lost(w, why);
        }
    }

    /// The connection is gone.
    pub(super) fn lost<I: Io>(&mut self, w: &mut Around<'_, I>, reason: &str) {
        self.ship.link.close(w.io);
        self.ship.link.fail(w.io.now(), reason);
        self.ship.queue.healthy = false;
    }

    /// The target has accepted; see [`super::Source::linked`].
    pub fn linked<I: Io>(
        &mut self,
        w: &mut Around<'_, I>,
        sock: Sock,
        control: ControlKey,
        position: Position,
        whole_resync: bool,
    ) {
        if !matches!(self.ship.link.state, LinkState::Asked) || self.fenced.is_some() {
            return w.io.close_sock(sock);
        }
        self.refused = None;
        self.doubted = false;
        self.lease.word(self.asked_at);
        let now = w.io.now();
        if self.ship.past().is_none() {
            // What an earlier process promised is void. While its frames are shipped it is not: they say it again.
            self.synchronous.accepted(now);
        }
        self.synchronous.heard(now);
        let acked = if mutant!(PlaceNotCompared) { 0 } else { self.ship.acked_frame };
        let ours = position.incarnation == self.ship.shipped_incarnation();
        if let Some(past) = self.ship.past() {
            let follows = if ours { (acked..=past.last_frame).contains(&position.frame) } else { acked == 0 };
            if whole_resync || !follows {
                // The target is not where this earlier life can go on: what is in the spill is of no use there, and
                // the hello of this life finds out what is.
                w.io.close_sock(sock);
                return self.reincarnate(w, false, position.seq + 1);
            }
        }
        // What the target once acknowledged and does not hold, or what we never sent: it is not the target we knew.
        let foreign = if ours {
            whole_resync || position.frame < acked || position.frame >= self.ship.next_frame()
        } else {
            acked > 0
        };
        if foreign {
            w.io.close_sock(sock);
            return self.reincarnate(w, true, position.seq + 1);
        }
        if self.ship.past().is_none() && !ours && whole_resync && !self.head_whole {
            w.io.close_sock(sock);
            let older = self.alternative.take_if(|place| {
                place.incarnation == position.incarnation && (place.frame, place.seq) <= (position.frame, position.seq)
            });
            match older {
                // The newest writer that our logs name never reached the target: its place is that of the one before.
                Some(place) if self.phase == Phase::Open => {
                    self.predecessor = place;
                    if let Some(spill) = &mut self.spill {
                        spill.forget_writer();
                    }
                    self.ship.link.again(now);
                }
                _ => self.reincarnate(w, true, position.seq + 1),
            }
            return;
        }
        let control = self.ship.control_key(control);
        let from = if ours { position.frame + 1 } else { 1 };
        // What it names is durable there, although its acknowledgement was lost.
        if ours && !self.ship.ack(position.frame, Some(position.seq)) {
            w.io.close_sock(sock);
            return self.reincarnate(w, true, position.seq + 1);
        }
        if self.ship.is_life_over() {
            w.io.close_sock(sock);
            return self.next_life(w);
        }
        if !self.ship.link.announced && self.announcing.is_none() {
            self.announce(w, whole_resync);
        }
        if self.ship.link.up(w.io, sock, control, self.recv_token) {
            self.ship.resend_from(from);
            if ours {
                self.each_disk(w, |disk, f| disk.sync_relinked(f, position.seq));
            }
        }
    }

    /// Every log names this incarnation, durably, before its first frame leaves.
    fn announce<I: Io>(&mut self, w: &mut Around<'_, I>, whole_resync: bool) {
        let (incarnation, before, seq) = match self.ship.past() {
            Some(past) => (past.incarnation, past.predecessor, past.first_seq - 1),
            None => (self.ship.incarnation, self.predecessor, self.first_seq - 1),
        };
        let prior = if whole_resync { Predecessor::default() } else { before };
        let mut tickets = Vec::with_capacity(self.disks.len());
        self.each_disk(w, |disk, f| {
            let whole = disk.sync.whole_owed;
            let ticket = disk.log.as_mut().map_or(0, |log| {
                let ticket = log.set_header(|h| {
                    // An earlier life may be named already, with a place that must not go back.
                    if h.incarnation != incarnation {
                        h.incarnation = incarnation;
                        (h.acked_frame, h.acked_seq) = (0, seq);
                        h.prior = prior;
                    }
                    h.whole_owed = whole;
                });
                log.pump(f.io);
                ticket
            });
            tickets.push(ticket);
        });
        self.ship.link.announced |= mutant!(AnnounceNotAwaited);
        self.announcing = Some(tickets);
    }

    /// The attempt failed; see [`super::Source::link_failed`].
    pub fn link_failed<I: Io>(&mut self, w: &mut Around<'_, I>, failure: LinkFailure) {
        if !matches!(self.ship.link.state, LinkState::Asked) {
            return;
        }
        let now = w.io.now();
        match failure {
            LinkFailure::Unreachable(reason) => self.ship.link.fail(now, &reason),
            LinkFailure::Refused(Refusal::Fenced { disk, generation }, message)
                if self.claims_enough(w, Some(disk), generation) =>
            {
                self.ship.link.fail(now, &message);
            }
            LinkFailure::Refused(Refusal::Fenced { disk, generation }, _) => self.step_down(w, Some(disk), generation),
            // The target is past what an earlier life has to say: see `linked`.
            LinkFailure::Refused(Refusal::Branch, _) if self.ship.past().is_some() => self.reincarnate(w, false, 0),
            LinkFailure::Refused(Refusal::SeqBehind { newest }, _) if self.ship.past().is_some() => {
                self.reincarnate(w, false, newest + 1);
            }
            LinkFailure::Refused(Refusal::SeqBehind { newest }, _) => self.reincarnate(w, true, newest + 1),
            LinkFailure::Refused(Refusal::Busy, message) => self.ship.link.fail(now, &message),
            LinkFailure::Refused(refusal, message) => {
                self.ship.link.fail_for_long(now, &message);
                self.refused = Some((refusal, message));
            }
        }
    }

    /// Takes a completed receive.
    pub fn received<I: Io>(&mut self, w: &mut Around<'_, I>, epoch: u32, done: Done) {
        let mut heard = std::mem::take(&mut self.heard);
        self.ship.link.received(w.io, epoch, done, self.recv_token, &mut heard);
        for what in heard.drain(..) {
            match what {
                Heard::Ack(frame, seq) => {
                    if !self.ship.ack(frame, Some(seq)) {
                        self.lost(w, "the target acknowledged what was not sent");
                        break;
                    }
                    self.bad_frames = 0;
                    self.synchronous.heard(w.io.now());
                    if self.ship.is_life_over() {
                        self.next_life(w);
                        break;
                    }
                }
                Heard::Lost(reason) => {
                    self.lost(w, &reason);
                    break;
                }
                Heard::Stop(reason, value) => {
                    self.stopped_by_target(w, reason, value);
                    break;
                }
                Heard::Compared(seq, differs) => {
                    let mut known = false;
                    self.each_disk(w, |disk, f| known = known || disk.sync_compared(f, seq, differs));
                }
                Heard::Want(slot, offset, len) => self.each_disk(w, |disk, _| {
                    if disk.config.slot == slot {
                        disk.sync_wanted(offset, len);
                    }
                }),
            }
        }
        heard.clear();
        self.heard = heard;
    }

    fn stopped_by_target<I: Io>(&mut self, w: &mut Around<'_, I>, reason: StopReason, value: u64) {
        match reason {
            StopReason::Fenced => self.fenced_somewhere(w, value),
            StopReason::BadFrame => {
                self.bad_frames += 1;
                if self.bad_frames >= MAX_BAD_FRAMES {
                    // The same bytes were refused again and again: they are bad here, not on their way.
                    self.reincarnate(w, false, 0);
                } else {
                    self.lost(w, "the target refused a frame");
                }
            }
            StopReason::NoSpace => self.stopped_for_long(w, "the target has no space"),
            StopReason::JournalFailed => self.stopped_for_long(w, "the target's journal failed"),
            StopReason::Replaced => self.lost(w, "another connection took over"),
            StopReason::ShuttingDown => self.lost(w, "the target is shutting down"),
        }
    }

    fn stopped_for_long<I: Io>(&mut self, w: &mut Around<'_, I>, reason: &str) {
        self.ship.link.close(w.io);
        self.ship.link.fail_for_long(w.io.now(), reason);
    }

    /// Takes a completed send.
    pub fn sent<I: Io>(&mut self, w: &mut Around<'_, I>, epoch: u32, mut done: Done) {
        self.ship.sent(&mut done.parts);
        self.ship.link.keep_parts(done.parts);
        if epoch == self.ship.link.epoch() && self.ship.link.is_up() {
            self.ship.link.sending = false;
            if let Err(errno) = done.result {
                self.lost(w, &format!("sending: {errno}"));
            }
        }
    }
}
