//! What is written to a view: a timeline of its own, in journal format.
//!
//! Writes become records in frames, sealed under the delta's own incarnations and keys, in the order in which they were
//! asked; a write is answered when its frame and all before it are in the segment, so a crash of the process loses
//! nothing that was answered and a power cut leaves a prefix that holds everything flushed.

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_wire::ids::{IncarnationId, TimelineId};
use afterimage_wire::record::{Record, RecordKind};
use afterimage_wire::segment::Predecessor;
use afterimage_wire::stream_state::DeltaView;

use crate::host::{Answer, DiskKey};
use crate::index::Points;
use crate::io::{Done, Errno, Io, Nanos, Part};
use crate::journal::{Batch, Journal, JournalConfig, Place, Prune, Writer};
use crate::seal::{DataKey, FrameMeta, Item, Plan, PolicyKey, Scratch, seal_frame};
use crate::target::Damage;
use crate::target::ops::{Ctx, JournalId};

/// Longest range of one record without payload, bytes.
const MAX_RANGE: u64 = 1 << 30;

/// A change that a host asks for.
#[derive(Debug)]
pub(crate) struct Change {
    pub slot: u16,
    pub key: DiskKey,
    pub cookie: u64,
    pub kind: RecordKind,
    pub offset: u64,
    pub len: u64,
    /// For writes.
    pub data: Option<Part>,
    pub fua: bool,
}

/// Who is to be answered once everything up to a place is written, or durable.
#[derive(Debug)]
struct Asker {
    key: DiskKey,
    cookie: u64,
    place: Place,
    durable: bool,
}

/// A view's delta.
#[derive(Debug)]
pub(crate) struct Delta {
    pub id: u32,
    pub view: DeltaView,
    pub journal: Journal,
    pub points: Points,
    policy_key: PolicyKey,
    writer: Option<Arc<Writer>>,
    next_frame: u64,
    next_seq: u64,
    waiting: VecDeque<Change>,
    /// In the order of their places.
    written_askers: VecDeque<Asker>,
    durable_askers: Vec<Asker>,
    pub answers: Vec<(DiskKey, Answer)>,
    /// Why it cannot be written any more.
    pub failed: Option<String>,
    /// Some of what was written to it is lost, nobody knows what.
    pub damaged: bool,
    /// What of it counts no more; none for a shelf, of which all counts.
    pub prune: Option<Prune>,
    /// Most bytes of index; beyond it nothing more is taken.
    pub index_bytes: usize,
    full: bool,
    scratch: Box<Scratch>,
    plan: Plan,
    plain: Vec<u8>,
}

impl Delta {
    /// Its writers begin under this key from now on; what is there opens by those before.
    pub(crate) fn set_policy_key(&mut self, key: &PolicyKey) {
        self.policy_key = key.clone();
        self.journal.policy_key = key.clone();
    }

    /// An empty one; its segments stand beside the stream's.
    pub fn new(id: u32, view: DeltaView, stream: &JournalConfig, policy_key: &PolicyKey) -> Self {
        let config = JournalConfig { timeline: view.timeline, ..stream.clone() };
        let journal = Journal::new(JournalId::Delta(id), config, policy_key.clone(), u64::from(id) << 40 | 1);
        Self {
            id,
            journal,
            points: Points::default(),
            policy_key: policy_key.clone(),
            writer: None,
            next_frame: 1,
            next_seq: view.seq + 1,
            view,
            waiting: VecDeque::new(),
            written_askers: VecDeque::new(),
            durable_askers: Vec::new(),
            answers: Vec::new(),
            failed: None,
            damaged: false,
            prune: None,
            index_bytes: usize::MAX,
            full: false,
            scratch: Box::default(),
            plan: Plan::default(),
            plain: Vec::new(),
        }
    }

    /// Its branch.
    pub fn timeline(&self) -> TimelineId {
        self.view.timeline
    }

    /// Its journal has been read back.
    pub fn recovered(&mut self, damage: &[Damage]) {
        self.next_seq = self.next_seq.max(self.journal.complete.seq + 1);
        if let Some(damage) = damage.first() {
            self.failed = Some(format!("what was written to the view is damaged: {}", damage.what));
            self.damaged = true;
        }
    }

    /// Its journal had failed and has been read back: it goes on with what is on the disk. What had been answered and not
    /// flushed may be lost, as on a disk that fails a flush; whoever asked was told.
    pub fn reopened<I: Io>(&mut self, io: &mut I, journal: Journal, points: Points) {
        let old = std::mem::replace(&mut self.journal, journal);
        self.journal.inherit(io, old);
        self.points = points;
        self.next_seq = self.next_seq.max(self.journal.complete.seq + 1);
        (self.writer, self.failed) = (None, None);
    }

    /// Takes a change.
    pub fn change(&mut self, change: Change) {
        if self.full {
            let result = Err(Errno::NOSPC);
            self.answers.push((change.key, Answer { cookie: change.cookie, result }));
        } else if self.failed.is_some() {
            let result = Err(Errno::IO);
            self.answers.push((change.key, Answer { cookie: change.cookie, result }));
        } else {
            self.waiting.push_back(change);
        }
    }

    /// Everything answered so far is to be durable before this is answered.
    pub fn flush(&mut self, key: DiskKey, cookie: u64) {
        if self.failed.is_some() {
            self.answers.push((key, Answer { cookie, result: Err(Errno::IO) }));
            return;
        }
        if mutant!(DeltaFlushEarly) {
            self.answers.push((key, Answer { cookie, result: Ok(None) }));
            return;
        }
        let place = self.journal.complete;
        self.durable_askers.push(Asker { key, cookie, place, durable: true });
        self.journal.want_sync();
        self.answer();
    }

    /// When a turn is wanted although nothing completes.
    pub fn deadline(&self) -> Option<Nanos> {
        self.journal.deadline()
    }

    /// Seals what waits, submits it, answers what is done. True if there is more to do at once.
    pub fn turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) -> bool {
        let pruning = self.prune_turn(ctx);
        if self.idle() {
            return pruning;
        }
        while !self.waiting.is_empty() && self.journal.has_room() && self.failed.is_none() {
            if !self.compose(ctx) {
                break;
            }
            self.journal.pump(ctx);
        }
        self.journal.turn(ctx);
        self.collect();
        if self.journal.no_room().is_some() {
            self.refuse_queued();
        }
        if let (Some(errno), None) = (self.journal.failed(), &self.failed) {
            self.failed = Some(format!("writing the delta: {errno}"));
        }
        if self.failed.is_some() {
            self.fail_all(Errno::IO);
        }
        self.answer();
        pruning || (!self.waiting.is_empty() && self.journal.has_room() && self.failed.is_none())
    }

    /// Goes on taking out what has been overwritten.
    fn prune_turn<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) -> bool {
        let Some(prune) = &mut self.prune else { return false };
        if prune.has_grown(&self.journal) {
            let full = self.journal.index_bytes() > self.index_bytes;
            if full && !self.full {
                tracing::error!(view = self.view.name, "the memory for the index is used up: writes are refused");
            }
            self.full = full;
        }
        self.journal.prune(ctx.io, prune).unwrap_or_else(|errno| {
            tracing::warn!(view = self.view.name, %errno, "a segment that counts no more cannot be removed");
            false
        })
    }

    /// Nobody waits for an answer to a change or a flush.
    pub fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.written_askers.is_empty() && self.durable_askers.is_empty()
    }

    fn idle(&self) -> bool {
        self.waiting.is_empty()
            && self.written_askers.is_empty()
            && self.durable_askers.is_empty()
            && self.journal.is_idle()
    }

    /// A new life: fresh key, frames from 1, records behind all that was numbered before.
    fn begin<I: Io>(&mut self, io: &mut I) -> Arc<Writer> {
        let (mut id, mut key, mut nonce) = ([0; 16], [0; 32], [0; 12]);
        io.random(&mut id);
        io.random(&mut key);
        io.random(&mut nonce);
        let (incarnation, key) = (IncarnationId(id), DataKey::new(key));
        let before = self.journal.complete;
        let writer = Arc::new(Writer {
            incarnation,
            predecessor: Predecessor { incarnation: before.incarnation, frame: before.frame, seq: before.seq },
            wrapped: self.policy_key.wrap(incarnation, &key, nonce),
            key,
            disks: Vec::new(),
        });
        self.next_frame = 1;
        self.writer = Some(writer.clone());
        writer
    }

    /// Seals one frame of what waits. False: not now.
    fn compose<I: Io>(&mut self, ctx: &mut Ctx<'_, I>) -> bool {
        self.plan.clear();
        let mut count = 0;
        for change in &self.waiting {
            if change.len > MAX_RANGE && change.data.is_none() && count > 0 {
                break;
            }
            if !self.plan.add(change.data.as_ref().map_or(0, |part| part.len)) {
                break;
            }
            count += 1;
            if change.len > MAX_RANGE && change.data.is_none() {
                break;
            }
        }
        let Some(mut out) = ctx.io.pool().take(self.plan.frame_bound()) else { return false };
        let writer = match &self.writer {
            Some(writer) => writer.clone(),
            None => self.begin(ctx.io),
        };
        let (now, wall) = (ctx.io.now(), ctx.io.wall());
        let first_seq = self.next_seq;
        let mut items = Vec::with_capacity(count);
        for (number, change) in self.waiting.iter().take(count).enumerate() {
            let record = Record {
                seq: first_seq + number as u64,
                kind: change.kind,
                disk: change.slot,
                offset: change.offset,
                len: change.len.min(MAX_RANGE) as u32,
                mono_ns: now,
                wall_ns: wall,
                payload_at: 0,
                payload_len: 0,
                crc: 0,
            };
            let payload = change.data.as_ref().map_or(&[][..], |part| &part.buf[part.at..part.at + part.len]);
            items.push(Item { record, payload });
        }
        let durable = self.journal.durable;
        let meta = FrameMeta {
            stream: self.journal.config.stream,
            incarnation: writer.incarnation,
            number: self.next_frame,
            acked: if durable.incarnation == writer.incarnation { durable.frame } else { 0 },
            mono_ns: now,
            sync_ms: 0,
        };
        let len = seal_frame(&writer.key, &meta, &self.plan, &items, false, &mut self.scratch, &mut out);
        drop(items);
        let last_seq = first_seq + count as u64 - 1;
        let place = Place { incarnation: writer.incarnation, frame: self.next_frame, seq: last_seq };
        // A forced write needs no sync of its own if nothing before it is open.
        let forced = self.waiting.iter().take(count).any(|change| change.fua);
        let alone = self.journal.is_idle() && self.journal.durable == self.journal.complete;
        let batch = Batch {
            part: Part { buf: out, at: 0, len },
            writer,
            first: (self.next_frame, first_seq),
            last: (self.next_frame, last_seq),
            durable: forced && alone,
            tag: 0,
        };
        for _ in 0..count {
            let Some(mut change) = self.waiting.pop_front() else { break };
            if change.data.is_none() && change.len > MAX_RANGE {
                change.offset += MAX_RANGE;
                change.len -= MAX_RANGE;
                self.waiting.push_front(change);
                break;
            }
            let (key, cookie, durable) = (change.key, change.cookie, change.fua);
            self.written_askers.push_back(Asker { key, cookie, place, durable });
        }
        self.next_frame += 1;
        self.next_seq = last_seq + 1;
        self.journal.push(batch);
        true
    }

    /// Puts what is written into the index.
    fn collect(&mut self) {
        while let Some(mut written) = self.journal.take_written() {
            let range = written.part.at..written.part.at + written.part.len;
            let bytes = &mut written.part.buf[range];
            let (uid, at) = (written.segment, written.at);
            if let Err(error) = self.journal.index_frame(uid, at, bytes, &mut self.points, false, &mut self.plain) {
                self.failed = Some(format!("a frame of our own cannot be opened: {error}"));
            }
        }
    }

    /// No room for another segment: the queued frames are refused. Their numbers are used up, so a new life begins.
    fn refuse_queued(&mut self) {
        self.journal.drop_queue();
        let accepted = self.journal.accepted;
        while self.written_askers.back().is_some_and(|asker| !reached(accepted, asker.place)) {
            let Some(asker) = self.written_askers.pop_back() else { break };
            let result = Err(Errno::NOSPC);
            self.answers.push((asker.key, Answer { cookie: asker.cookie, result }));
        }
        for change in self.waiting.drain(..) {
            let result = Err(Errno::NOSPC);
            self.answers.push((change.key, Answer { cookie: change.cookie, result }));
        }
        self.writer = None;
    }

    fn fail_all(&mut self, errno: Errno) {
        let askers = self.written_askers.drain(..).chain(self.durable_askers.drain(..));
        for (key, cookie) in askers.map(|asker| (asker.key, asker.cookie)) {
            self.answers.push((key, Answer { cookie, result: Err(errno) }));
        }
        for change in self.waiting.drain(..) {
            self.answers.push((change.key, Answer { cookie: change.cookie, result: Err(errno) }));
        }
    }

    fn answer(&mut self) {
        let (complete, durable) = (self.journal.complete, self.journal.durable);
        while self.written_askers.front().is_some_and(|asker| reached(complete, asker.place)) {
            let Some(asker) = self.written_askers.pop_front() else { break };
            if asker.durable {
                self.durable_askers.push(asker);
            } else {
                self.answers.push((asker.key, Answer { cookie: asker.cookie, result: Ok(None) }));
            }
        }
        let answers = &mut self.answers;
        self.durable_askers.retain(|asker| {
            let done = reached(durable, asker.place);
            if done {
                answers.push((asker.key, Answer { cookie: asker.cookie, result: Ok(None) }));
            }
            !done
        });
        if !self.durable_askers.is_empty() {
            self.journal.want_sync();
        }
    }

    /// A write of the journal has ended.
    pub fn on_append(&mut self, serial: u64, done: Done) {
        self.journal.on_append(serial, done);
        self.collect();
    }
}

/// `place` is at or before `now`. Places of an earlier life are: a new one begins behind them.
fn reached(now: Place, place: Place) -> bool {
    place.seq <= now.seq
}
