//! One group: its stream's life from opening to stop; connections, incarnations, cuts, room, reservations. The steps of
//! an incarnation's begin and of the connection are in `incarnate`, those of a clean stop in `stop`.

use std::collections::VecDeque;

use afterimage_wire::handshake::Refusal;
use afterimage_wire::intent::IntentHeader;
use afterimage_wire::record::{Cut, RecordKind};
use afterimage_wire::segment::{Predecessor, WrappedKey};

use super::config::{GroupConfig, SourceLimits};
use super::lease::Lease;
use super::membership::Leaving;
use super::status::{GroupState, HoldReason, Rung, SourceEvent};
use super::stop::StopStage;
use super::synchronous::Synchronous;
use crate::capture::{Disk, Flow, Gate};
use crate::intent::{Covered, IntentLog};
use crate::io::{Done, Io, Nanos, Token};
use crate::rpo::Rpo;
use crate::sealers::{Payload, Sealing};
use crate::ship::{Event, Heard, SMALL_COST, Shipper};
use crate::spill::{self, ReadBack, Spill};

/// Record numbers reserved at a time.
pub(super) const SEQ_RESERVE: u64 = 1 << 24;
/// Cut numbers reserved at a time.
pub(super) const CUT_RESERVE: u64 = 1 << 16;
/// Time between two looks at the intent bits.
const TICK: Nanos = 1_000_000_000;
/// How old the moment may become that the logs name as complete while everything is.
const RECORD: Nanos = 10_000_000_000;
/// The wall clock has jumped if it moves by that much more or less than the monotonic one between two cuts.
const CLOCK_JUMP: i64 = 1_000_000_000;
/// With no buffer for a frame for this long, and none in sight, the queue is given up.
const STUCK: Nanos = 1_000_000_000;
/// … for this long if frames are in the spill, too, and none can be read back.
const STUCK_SPILLED: Nanos = 30_000_000_000;

/// Phase of a group's life.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Opening,
    Open,
    Stopping(StopStage),
    Closed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Group {
    pub config: GroupConfig,
    pub limits: SourceLimits,
    pub disks: Vec<u32>,
    pub ship: Shipper,
    pub rpo: Rpo,
    /// Where frames queue when memory is short.
    pub spill: Option<Spill>,
    spill_faults: u64,
    pub phase: Phase,
    /// Base of the tokens of its connection.
    pub send_token: Token,
    pub recv_token: Token,
    pub wrapped: WrappedKey,
    pub first_seq: u64,
    pub predecessor: Predecessor,
    pub alternative: Option<Predecessor>,
    /// Headers that name this incarnation are on their way: a ticket for each disk.
    pub announcing: Option<Vec<u64>>,
    /// Every disk began a whole synchronisation with this incarnation.
    pub head_whole: bool,
    pub fenced: Option<u64>,
    pub refused: Option<(Refusal, String)>,
    pub bad_frames: u32,
    pub incarnated_at: Nanos,
    /// Numbers up to here are reserved, or on their way to be.
    pub reserving: u64,
    /// … are reserved durably in every log.
    pub reserved: u64,
    pub cut: u64,
    pub cut_reserving: u64,
    pub cut_reserved: u64,
    next_cut: Nanos,
    next_tick: Nanos,
    /// Monotonic and wall clock at the last cut.
    clock: Option<(Nanos, u64)>,
    /// The owner holds it.
    pub held: bool,
    /// The target has said that some disk was fenced, and not yet which.
    pub doubted: bool,
    /// Why I/O is held, as last told.
    pub hold_told: Option<HoldReason>,
    pub lease: Lease,
    /// When it runs out, on the monotonic clock.
    pub lease_due: Option<Nanos>,
    /// When the hello of the last attempt was made, since boot.
    pub asked_at: Nanos,
    pub synchronous: Synchronous,
    pub together_told: bool,
    pub leaving: Vec<Leaving>,
    pub stop_at: Nanos,
    pub clean: bool,
    /// A clean stop rests on the spill's holding everything up to here.
    pub spilled: Option<Predecessor>,
    /// What the logs' headers say, or are about to: see [`IntentHeader::promised_ms`].
    pub promised_ms: u32,
    reported: u8,
    rung_reported: Rung,
    /// The pool is short of buffers: a queue that holds more bytes than this gets no more.
    shortage: Option<usize>,
    pub heard: Vec<Heard>,
    now: Nanos,
}

/// What a group needs of its source for a call.
pub(super) struct Around<'a, I> {
    pub io: &'a mut I,
    pub disks: &'a mut Vec<Option<Disk>>,
    pub sealing: &'a mut Sealing,
    pub events: &'a mut VecDeque<SourceEvent>,
}

impl Group {
    /// Takes over what may change while the group runs.
    pub fn set_policy(&mut self, now: Nanos, cut_interval: Nanos, compress: bool) {
        self.config.cut_interval = cut_interval;
        self.config.compress = compress;
        self.next_cut = self.next_cut.min(now + cut_interval);
        self.ship.set_compress(compress);
    }

    #[allow(clippy::too_many_arguments)]
    pub fn new(
        config: GroupConfig,
        limits: SourceLimits,
        disks: Vec<u32>,
        ship: Shipper,
        wrapped: WrappedKey,
        first_seq: u64,
        cut: u64,
        predecessor: Predecessor,
        alternative: Option<Predecessor>,
        tokens: (Token, Token),
        word_at: Option<Nanos>,
        promised_ms: u32,
        now: Nanos,
    ) -> Self {
        Self {
            next_cut: now + config.cut_interval,
            lease: Lease::new(config.lease, word_at),
            synchronous: Synchronous::new(config.sync_deadline, promised_ms),
            promised_ms,
            config,
            limits,
            disks,
            ship,
            rpo: Rpo::new(now),
            spill: None,
            spill_faults: 0,
            phase: Phase::Opening,
            send_token: tokens.0,
            recv_token: tokens.1,
            wrapped,
            first_seq,
            predecessor,
            alternative,
            announcing: None,
            head_whole: false,
            fenced: None,
            refused: None,
            bad_frames: 0,
            incarnated_at: now,
            reserving: first_seq - 1 + SEQ_RESERVE,
            reserved: 0,
            cut,
            cut_reserving: cut + CUT_RESERVE,
            cut_reserved: 0,
            next_tick: now + TICK,
            clock: None,
            held: false,
            doubted: false,
            hold_told: None,
            lease_due: None,
            asked_at: 0,
            together_told: false,
            leaving: Vec::new(),
            stop_at: 0,
            clean: false,
            spilled: None,
            reported: u8::MAX,
            rung_reported: Rung::Normal,
            shortage: None,
            heard: Vec::with_capacity(64),
            now,
        }
    }

    /// Calls `each` with every disk and its flow.
    pub fn each_disk<I: Io>(&mut self, w: &mut Around<'_, I>, mut each: impl FnMut(&mut Disk, &mut Flow<'_, I>)) {
        for index in &self.disks {
            if let Some(disk) = &mut w.disks[*index as usize] {
                each(disk, &mut Flow { io: &mut *w.io, queue: Some(&mut self.ship.queue) });
            }
        }
    }

    /// True if it holds of every disk.
    pub fn all_disks(&self, disks: &[Option<Disk>], holds: impl Fn(&Disk) -> bool) -> bool {
        self.disks.iter().all(|index| disks[*index as usize].as_ref().is_none_or(&holds))
    }

    /// True if it holds of every log.
    pub fn all_logs(&self, disks: &[Option<Disk>], holds: impl Fn(&IntentLog) -> bool) -> bool {
        self.all_disks(disks, |disk| disk.log.as_ref().is_none_or(&holds))
    }

    /// Changes every log's header; the tickets.
    pub fn set_headers(&self, disks: &mut [Option<Disk>], change: impl Fn(&mut IntentHeader)) -> Vec<u64> {
        let ticket = |index: &u32| {
            let log = disks[*index as usize].as_mut().and_then(|disk| disk.log.as_mut());
            log.map_or(0, |log| log.set_header(&change))
        };
        self.disks.iter().map(ticket).collect()
    }

    /// Everything that is due. See the source's `turn`. If the pool is short of buffers, `shortage` is what a queue may
    /// hold of it in bytes.
    pub fn turn<I: Io>(&mut self, w: &mut Around<'_, I>, shortage: Option<usize>) {
        self.shortage = shortage;
        let now = w.io.now();
        self.now = now;
        self.rpo.sample(now, self.ship.oldest());
        self.ship.pacer.forced = self.held;
        self.hold_turn(w);
        self.logs(w, now);
        if self.phase == Phase::Opening && self.all_logs(w.disks, IntentLog::is_settled) {
            self.open(w);
        }
        self.reserve(w);
        self.pressure(w);
        self.room(w, now);
        if self.phase == Phase::Open {
            self.next_cut = self.next_cut.min(now + self.cut_interval());
            while now >= self.next_cut {
                if mutant!(CutsByWallClock) && self.clock.is_some_and(|(_, before)| w.io.wall() < before) {
                    self.next_cut += self.config.cut_interval;
                    continue;
                }
                self.cut(w, String::new(), false);
                self.next_cut = (self.next_cut + self.cut_interval()).max(now.saturating_sub(TICK));
            }
        }
        let share = self.ship.queue.limit() / 100 * self.limits.sync_share;
        // Behind a backlog a synchronisation would only make it longer.
        let flowing = self.ship.is_flowing();
        self.each_disk(w, |disk, f| {
            disk.feed(f);
            if flowing {
                disk.pump_sync(f, share);
            }
        });
        if let Some(since) = self.ship.queue.incomplete_since.take() {
            self.rpo.incomplete(since);
        }
        self.sync_ends(w);
        self.leave_turn(w, now);
        self.sync_mode_turn(w, now);
        self.key_turn(w);
        self.compose_and_send(w);
        self.spill_turn(w);
        self.link_turn(w, now);
        if let Phase::Stopping(stage) = self.phase {
            self.stop_turn(w, stage);
        }
        self.report(w);
    }

    /// Time between two cuts. A cut is also a question to the target: leases and promises need one now and then.
    fn cut_interval(&self) -> Nanos {
        let waits = [self.lease.span(), self.synchronous.deadline()].into_iter().filter(|span| *span > 0);
        waits.map(|span| span / 4).fold(self.config.cut_interval, Nanos::min)
    }

    /// Seals and sends what is due; again after frames came back sealed.
    pub fn compose_and_send<I: Io>(&mut self, w: &mut Around<'_, I>) {
        let all = matches!(self.phase, Phase::Stopping(_));
        self.ship.compose(w.io, w.sealing, self.reserved, all);
        self.ship.send(w.io, self.send_token);
    }

    /// Frames to the spill, and back.
    pub fn spill_turn<I: Io>(&mut self, w: &mut Around<'_, I>) {
        let Some(mut spill) = self.spill.take() else { return };
        let all = matches!(self.phase, Phase::Stopping(StopStage::Spill));
        spill.set_writer(self.ship.incarnation, || self.spill_writer(w.disks));
        self.ship.spill(w.io, &mut spill, all);
        spill.reap(w.io, self.ship.shipped_incarnation(), self.ship.acked_frame);
        let read = self.ship.read_ahead(w.io, &mut spill);
        self.spill = Some(spill);
        self.judge_read(w, read);
    }

    /// Takes a completion of the spill.
    pub fn spill_done<I: Io>(&mut self, w: &mut Around<'_, I>, kind: u64, serial: u32, done: Done) {
        let Some(mut spill) = self.spill.take() else { return };
        let mut read = ReadBack::Fine;
        match kind {
            spill::kind::WRITE => spill.write_done(w.io.now(), serial, done),
            spill::kind::SYNC => spill.sync_done(serial, &done),
            spill::kind::SPARE => spill.spare_done(w.io, serial, &done),
            _ => read = self.ship.read_back(w.io, &mut spill, serial, done),
        }
        self.spill = Some(spill);
        self.judge_read(w, read);
    }

    fn judge_read<I: Io>(&mut self, w: &mut Around<'_, I>, read: ReadBack) {
        if let ReadBack::Broken(why) = read {
            let message = format!("what it held is lost and will be compared: {why}");
            w.events.push_back(SourceEvent::SpillFault { stream: self.config.stream, message });
            self.reincarnate(w, false, 0);
        }
    }

    /// Writes of the logs, and what waits for them.
    fn logs<I: Io>(&mut self, w: &mut Around<'_, I>, now: Nanos) {
        let tick = now >= self.next_tick;
        if tick {
            self.next_tick = now + TICK;
            self.ship.look(now);
            self.note_complete(w, now);
        }
        let announced = self.ship.link.announced;
        let (frame, seq, bound) = (self.ship.acked_frame, self.ship.acked_seq, self.limits.hot_extents);
        let running = self.phase == Phase::Open;
        self.each_disk(w, |disk, f| {
            if tick && running {
                disk.look_at_size(f);
            }
            let epoch = disk.flush.flushed();
            let covered = Covered { frame, seq, epoch, bound };
            let size = disk.info.size;
            let Some(log) = &mut disk.log else { return };
            if log.header().size != size && log.is_mapped() {
                log.set_header(|h| h.size = size);
            }
            // Of a whole synchronisation its bits say what is left, from when all of them were durable.
            let mapped = log.is_mapped() || mutant!(MapNotAwaited);
            if log.header().whole_owed && !log.header().mapped && mapped {
                log.set_header(|h| h.mapped = true);
            }
            // Before the logs name this incarnation, its places mean nothing to who reads them. While a synchronisation
            // is open, a next life must know that it owes an end: from the header, or from bits that stay.
            let known = !disk.sync.is_open() || log.durable_header().sync_owed;
            if announced && running && known {
                let unflushed = tick && log.tick(&covered);
                log.clear(&covered);
                if unflushed {
                    disk.flush_own(f);
                }
            }
            if let Some(log) = &mut disk.log {
                log.pump(f.io);
            }
        });
        if let Some(tickets) = &self.announcing {
            let done = self.disks.iter().zip(tickets).all(|(index, ticket)| {
                let log = w.disks[*index as usize].as_ref().and_then(|disk| disk.log.as_ref());
                log.is_none_or(|log| log.header_done(*ticket))
            });
            if done {
                self.announcing = None;
                self.ship.link.announced = true;
            }
        }
    }

    /// Says in the logs, now and then, that nothing is owed, for the next life to count its RPO from.
    fn note_complete<I: Io>(&mut self, w: &mut Around<'_, I>, now: Nanos) {
        let rpo = self.rpo_now(now);
        let synced = self.ship.link.is_ready() && self.all_disks(w.disks, |disk| !disk.sync.is_open());
        if self.phase != Phase::Open || !synced || rpo >= RECORD {
            return;
        }
        let since = w.io.wall().saturating_sub(rpo);
        if self.all_logs(w.disks, |log| log.header().complete_wall_ns.abs_diff(since) < RECORD) {
            return;
        }
        self.set_headers(w.disks, |h| h.complete_wall_ns = since);
    }

    /// Reserves numbers ahead of need.
    fn reserve<I: Io>(&mut self, w: &mut Around<'_, I>) {
        let last = self.ship.queue.last_seq();
        let seqs = last + SEQ_RESERVE / 2 > self.reserving;
        let cuts = self.cut + CUT_RESERVE / 2 > self.cut_reserving;
        if (seqs || cuts) && self.phase != Phase::Opening {
            self.reserving = self.reserving.max(last + SEQ_RESERVE);
            self.cut_reserving = self.cut_reserving.max(self.cut + CUT_RESERVE);
            let (seq, cut) = (self.reserving, self.cut_reserving);
            self.set_headers(w.disks, |h| (h.reserved_seq, h.cut) = (seq, cut));
        }
        if self.reserved < self.reserving || self.cut_reserved < self.cut_reserving {
            let headers = || {
                let logs = self.disks.iter().filter_map(|i| w.disks[*i as usize].as_ref()?.log.as_ref());
                logs.filter(|log| log.header_done(1)).map(IntentLog::durable_header)
            };
            if self.all_logs(w.disks, |log| log.header_done(1)) {
                self.reserved = headers().map(|h| h.reserved_seq).min().unwrap_or(0);
                self.cut_reserved = headers().map(|h| h.cut).min().unwrap_or(0);
            }
        }
    }

    /// Notices when the pool runs dry although the queue has room by its own count.
    fn pressure<I: Io>(&mut self, w: &mut Around<'_, I>) {
        let healthy = self.ship.takes();
        let queue = &mut self.ship.queue;
        queue.healthy = healthy;
        queue.pressed = self.shortage.is_some_and(|share| queue.used() > share.min(queue.limit() / 8));
        let stuck = self.ship.blocked_since.is_some_and(|since| self.now >= since + STUCK);
        let hopeless = match &self.spill {
            // What it holds is given up last: others may free what is missing.
            Some(spill) if !spill.is_empty() => {
                let long = self.ship.blocked_since.is_some_and(|since| self.now >= since + STUCK_SPILLED);
                long && self.ship.is_starved(spill)
            }
            _ => self.ship.unacked() == 0 || !healthy,
        };
        if stuck && hopeless {
            // No buffer can come free by itself any more: the records are given up, their extents are not.
            self.reincarnate(w, false, 0);
        }
    }

    /// Grants room, or lets whoever has waited for too long pass.
    fn room<I: Io>(&mut self, w: &mut Around<'_, I>, now: Nanos) {
        let oldest = |group: &Self| group.ship.queue.waiters.front().map(|waiter| waiter.since);
        while let Some(waiter) = self.ship.queue.grant() {
            if let Some(disk) = &mut w.disks[waiter.disk as usize] {
                let mut f = Flow { io: &mut *w.io, queue: Some(&mut self.ship.queue) };
                disk.room_granted(&mut f, waiter.slot, waiter.cost);
            }
        }
        if let Some(since) = oldest(self)
            && (now >= since + self.limits.max_wait || !self.ship.queue.healthy || self.ship.queue.closed)
        {
            self.ship.queue.overflow = true;
            while let Some(waiter) = self.ship.queue.waiters.pop_front() {
                if let Some(disk) = &mut w.disks[waiter.disk as usize] {
                    let mut f = Flow { io: &mut *w.io, queue: Some(&mut self.ship.queue) };
                    disk.pass(&mut f, waiter.slot);
                }
            }
        }
        let queue = &mut self.ship.queue;
        if queue.overflow && !queue.pressed && queue.used() <= queue.limit() / 2 {
            queue.overflow = false;
        }
    }

    /// Names a place in the stream.
    pub fn cut<I: Io>(&mut self, w: &mut Around<'_, I>, label: String, tell: bool) {
        let (now, wall) = (w.io.now(), w.io.wall());
        if let Some((mono, before)) = self.clock {
            let by = (wall as i64 - before as i64) - (now as i64 - mono as i64);
            if by.abs() > CLOCK_JUMP {
                w.events.push_back(SourceEvent::ClockJump { stream: self.config.stream, by });
            }
        }
        self.clock = Some((now, wall));
        let queue = &self.ship.queue;
        if self.cut >= self.cut_reserved || queue.closed || (queue.overflow && !tell) {
            return;
        }
        self.cut += 1;
        let flush_clean = self.all_disks(w.disks, Disk::is_flush_clean);
        let cut = Cut { number: self.cut, clock_synced: w.io.wall_synced(), flush_clean, label };
        let mut body = Vec::with_capacity(16 + cut.label.len());
        cut.encode(&mut body);
        let event = Event { kind: RecordKind::Cut, disk: 0, offset: 0, len: 0 };
        let seq = self.ship.queue.push(event, Payload::Mark(body), 0, SMALL_COST, now, wall);
        if tell {
            let (stream, cut, label) = (self.config.stream, cut.number, cut.label);
            w.events.push_back(SourceEvent::CutTaken { stream, cut, seq, label });
        }
    }

    /// Synchronisations whose end is acknowledged.
    fn sync_ends<I: Io>(&mut self, w: &mut Around<'_, I>) {
        let (stream, acked) = (self.config.stream, self.ship.acked_seq);
        let mut open = false;
        for index in &self.disks {
            let Some(disk) = &mut w.disks[*index as usize] else { continue };
            if let Some(whole) = disk.sync_acked(acked) {
                w.events.push_back(SourceEvent::SyncEnded { stream, disk: disk.config.id, whole });
            }
            if let Some(whole) = disk.sync.take_begun() {
                w.events.push_back(SourceEvent::SyncBegun { stream, disk: disk.config.id, whole });
            }
            open |= disk.sync.is_open();
            if disk.out.is_some_and(|generation| generation > 0) {
                // What it held more than the target is in no point, and nothing of it is on its way.
                self.rpo.incomplete(self.now);
                open = true;
            }
            while let Some(message) = disk.faults.pop_front() {
                w.events.push_back(SourceEvent::DiskFault { disk: disk.config.id, message });
            }
        }
        if !open && !self.ship.queue.closed && self.phase != Phase::Opening {
            self.rpo.complete();
            if self.ship.past().is_none() {
                self.rpo.shipped();
            }
        }
    }

    /// The link does not keep up with it.
    pub fn is_short(&self, now: Nanos) -> bool {
        self.ship.link.is_ready() && self.ship.pacer.is_short(self.ship.oldest(), now)
    }

    /// Where the group stands.
    pub fn state(&self, disks: &[Option<Disk>]) -> GroupState {
        match (&self.phase, self.fenced, &self.refused) {
            (Phase::Opening, ..) => GroupState::Opening,
            (Phase::Stopping(_) | Phase::Closed, ..) => GroupState::Stopping,
            (_, Some(generation), _) => GroupState::Fenced { generation },
            (_, _, Some((refusal, message))) => GroupState::Refused(refusal.clone(), message.clone()),
            _ if !self.ship.link.is_ready() => GroupState::Unlinked(self.ship.link.reason.clone()),
            _ if !self.ship.is_flowing() => GroupState::CatchingUp,
            _ if self.all_disks(disks, |disk| !disk.sync.is_open()) => GroupState::Protected,
            _ => GroupState::Syncing,
        }
    }

    fn report<I: Io>(&mut self, w: &mut Around<'_, I>) {
        // Told apart without making the state, which allocates.
        let code = match (&self.phase, self.fenced, &self.refused) {
            (Phase::Opening, ..) => 0,
            (Phase::Stopping(_) | Phase::Closed, ..) => 1,
            (_, Some(_), _) => 2,
            (_, _, Some(_)) => 3,
            _ if !self.ship.link.is_ready() => 4,
            _ if !self.ship.is_flowing() => 7,
            _ if self.all_disks(w.disks, |disk| !disk.sync.is_open()) => 5,
            _ => 6,
        };
        if code != self.reported {
            self.reported = code;
            let state = self.state(w.disks);
            w.events.push_back(SourceEvent::State { stream: self.config.stream, state });
        }
        let rung = self.rung(w.disks);
        if rung != self.rung_reported {
            self.rung_reported = rung;
            w.events.push_back(SourceEvent::Rung { stream: self.config.stream, rung });
        }
        if let Some(spill) = &self.spill
            && spill.faults > self.spill_faults
        {
            self.spill_faults = spill.faults;
            let message = spill.trouble().unwrap_or("a failure").to_owned();
            w.events.push_back(SourceEvent::SpillFault { stream: self.config.stream, message });
        }
    }

    /// How far up the ladder it is.
    pub fn rung(&self, disks: &[Option<Disk>]) -> Rung {
        let queue = &self.ship.queue;
        let dirty =
            |disk: &Disk| disk.sync.running() == Some(false) && disk.log.as_ref().is_some_and(|l| l.dirty() > 0);
        if queue.overflow || queue.closed || !self.all_disks(disks, |disk| !dirty(disk)) {
            Rung::Dirty
        } else if !queue.waiters.is_empty() {
            Rung::Waiting
        } else if self.ship.is_hurried() {
            Rung::Uncompressed
        } else if self.spill.as_ref().is_some_and(|spill| !spill.is_empty()) {
            Rung::Spilling
        } else {
            Rung::Normal
        }
    }

    /// RPO at `now`.
    pub fn rpo_now(&self, now: Nanos) -> Nanos {
        self.rpo.at(now, self.ship.oldest())
    }

    /// When a turn is due.
    pub fn deadline(&self, disks: &[Option<Disk>]) -> Option<Nanos> {
        // What was due at the last turn and could not be done waits for something else: look again a little later.
        let soon = self.now + 1_000_000;
        let mut due = vec_min([
            Some(self.next_tick),
            self.rpo.deadline(self.ship.oldest()),
            self.ship.deadline().map(|at| at.max(soon)),
            self.ship.link.deadline().filter(|_| self.phase == Phase::Open || self.ship.link.is_up()),
            self.ship.queue.waiters.front().map(|w| w.since + self.limits.max_wait),
            self.ship.pacer.due().filter(|_| self.ship.link.may_send().is_some()).map(|at| at.max(soon)),
            self.lease_due.filter(|at| *at > self.now),
            self.synchronous.due(self.awaits_since(disks)).map(|at| at.max(soon)),
            self.leave_due().map(|at| at.max(soon)),
            (self.phase == Phase::Open).then_some(self.next_cut),
            matches!(self.phase, Phase::Stopping(_)).then_some(self.stop_at.max(soon)),
        ]);
        let mut reads = false;
        for index in &self.disks {
            let Some(disk) = disks[*index as usize].as_ref() else { continue };
            reads |= disk.sync.running().is_some();
            due = vec_min([due, disk.deadline().map(|at| at.max(soon))]);
        }
        if reads && self.ship.takes() {
            due = vec_min([due, self.ship.queue.budget.due().map(|at| at.max(soon))]);
        }
        due
    }

    /// Opens the gates of its disks, or closes them.
    pub fn set_gates<I: Io>(&mut self, w: &mut Around<'_, I>, gate: Gate) {
        self.each_disk(w, |disk, f| disk.set_gate(f, gate));
    }
}

fn vec_min<const N: usize>(due: [Option<Nanos>; N]) -> Option<Nanos> {
    due.into_iter().flatten().min()
}
