//! The host: clients that keep some requests under way on all disks, overlapping, unaligned, of every kind.

use std::collections::BTreeMap;

use afterimage_dataplane::host::{HEADROOM, MAX_PART, Request};
use afterimage_dataplane::io::sim::Rng;
use afterimage_dataplane::io::{Errno, Io, Nanos, Part};

use crate::history::{Effect, History, fill};
use crate::stage::Stage;

/// Shortest write: shorter ones could not be told apart by their bytes.
const MIN_WRITE: u64 = 16;
/// What a disk answers that is being stopped.
const SHUTDOWN: Errno = Errno(108);
/// What is left behind the data of a write, for completing its last block.
const SLACK: usize = 4096;

/// How a host behaves.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Requests under way together, at most.
    pub depth: usize,
    /// Longest pause between two requests, nanoseconds.
    pub pause: Nanos,
    /// Part of each disk that most writes go to, per cent: small means that many overlap.
    pub hot: u64,
    /// Longest write, bytes.
    pub longest: u64,
    /// The disks take discards.
    pub discard: bool,
    /// Most requests of a burst go to one of the disks.
    pub favours: bool,
    /// Flushes, per cent of the requests.
    pub flushes: u64,
    /// What offsets and lengths are multiples of, bytes.
    pub unit: u64,
    /// It works for so long …
    pub work: Nanos,
    /// … and then rests for so long, and goes on elsewhere on its disks.
    pub idle: Nanos,
}

enum Pending {
    Change(u64, bool),
    Flush(u64),
    Read { disk: usize, offset: u64, issued: u64 },
}

/// A request under way.
struct Asked {
    disk: usize,
    pending: Pending,
    /// Since when, in the time of the world.
    since: Nanos,
}

/// The host's clients.
pub struct Host {
    rng: Rng,
    habits: Habits,
    sizes: Vec<u64>,
    pending: BTreeMap<u64, Asked>,
    cookie: u64,
    next_at: Nanos,
    /// Requests stop.
    pub quiet: bool,
    /// Ticks: everything on the disk answered before is on stable storage.
    pub flushed: Vec<u64>,
    /// Requests issued since the begin.
    pub issued: u64,
    /// Answers.
    pub answered: u64,
    /// When the present burst ends.
    rest_at: Nanos,
    /// Where its writes go, in parts of a hundred of each disk.
    place: u64,
    /// The disk that most of its requests go to, if it favours one.
    favourite: usize,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Host({} requests, {} pending)", self.issued, self.pending.len())
    }
}

impl Host {
    /// A host of disks of these sizes.
    pub fn new(rng: Rng, habits: Habits, sizes: Vec<u64>) -> Self {
        let flushed = vec![0; sizes.len()];
        let (pending, quiet) = (BTreeMap::new(), false);
        let rest_at = 0;
        let (cookie, next_at, issued, answered, place, favourite) = (0, 0, 0, 0, 0, 0);
        Self {
            rng,
            habits,
            sizes,
            pending,
            cookie,
            next_at,
            quiet,
            flushed,
            issued,
            answered,
            rest_at,
            place,
            favourite,
        }
    }

    /// When the host next does something by itself.
    pub fn deadline(&self) -> Nanos {
        if self.quiet { Nanos::MAX } else { self.next_at }
    }

    /// Requests under way.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Nothing but changes of the disks is under way.
    pub fn waits_for_writes_only(&self) -> bool {
        self.pending.values().all(|asked| matches!(asked.pending, Pending::Change(..)))
    }

    /// When its present or last burst ends, and when it next begins to work, in the time of the world.
    pub fn burst(&self, now: Nanos) -> (Nanos, Nanos) {
        let begun = self.rest_at.saturating_sub(self.habits.work);
        if self.habits.idle == 0 {
            (Nanos::MAX, Nanos::MAX)
        } else if begun > now {
            // It rests.
            (begun.saturating_sub(self.habits.idle), begun)
        } else {
            (self.rest_at, self.rest_at.saturating_add(self.habits.idle))
        }
    }

    /// Since when the oldest request waits for its answer, in the time of the world.
    pub fn oldest(&self) -> Option<Nanos> {
        self.pending.values().map(|asked| asked.since).min()
    }

    /// The source has died: its requests are answered by nobody.
    pub fn abandoned(&mut self) {
        self.pending.clear();
        self.flushed.iter_mut().for_each(|tick| *tick = 0);
    }

    /// Issues what is due.
    pub fn turn(&mut self, stage: &mut Stage, history: &mut History) {
        let now = stage.world.now();
        if self.quiet || now < self.next_at {
            return;
        }
        self.next_at = now + self.rng.between(1_000, self.habits.pause.max(1_001));
        if self.rest_at == 0 {
            self.rest_at = now.saturating_add(self.habits.work);
        }
        if now >= self.rest_at {
            // The last flush is asked while the last writes are under way, or never.
            if stage.takes_requests() && self.rng.chance(0.6) {
                for disk in 0..self.sizes.len() {
                    self.flush(disk, stage, history);
                }
            }
            self.next_at = now + self.habits.idle;
            self.rest_at = self.next_at.saturating_add(self.habits.work);
            self.place = self.rng.below(100);
            self.favourite = self.rng.below(self.sizes.len() as u64) as usize;
        }
        if stage.takes_requests() && self.pending.len() < self.habits.depth {
            self.issue(stage, history);
        }
    }

    fn flush(&mut self, disk: usize, stage: &mut Stage, history: &History) {
        self.cookie += 1;
        self.issued += 1;
        let pending = Pending::Flush(history.tick());
        self.pending.insert(self.cookie, Asked { disk, pending, since: stage.world.now() });
        stage.request(disk, self.cookie, Request::Flush);
    }

    fn issue(&mut self, stage: &mut Stage, history: &mut History) {
        let now = stage.source_now();
        let disk = match self.rng.below(self.sizes.len() as u64) as usize {
            _ if self.habits.favours && self.rng.chance(0.95) => self.favourite,
            any => any,
        };
        self.cookie += 1;
        let cookie = self.cookie;
        let kind = if self.rng.below(100) < self.habits.flushes { 74 } else { self.rng.below(90) };
        let (pending, request) = match if kind > 74 { kind + 10 } else { kind } {
            0..=59 => {
                let (offset, len) = self.range(disk, MIN_WRITE, self.habits.longest.min(MAX_PART as u64), false);
                let lead = HEADROOM + (offset % 4096) as usize;
                let io = &stage.source.as_ref().expect("protected").io;
                // A front end without a buffer does not read the socket: the request comes later.
                let Some(mut buf) = io.pool().take(lead + len as usize + SLACK) else { return };
                let id = history.issue(disk, Effect::Write, offset, len, now);
                fill(id, offset, &mut buf[lead..lead + len as usize]);
                let fua = self.rng.chance(0.1);
                let data = Part { buf, at: lead, len: len as usize };
                (Pending::Change(id, fua), Request::Write { offset, data, fua })
            }
            60..=67 => {
                let aligned = self.rng.chance(0.5);
                let (offset, len) = self.range(disk, 1, 1 << 20, aligned);
                let id = history.issue(disk, Effect::Zero, offset, len, now);
                let fua = self.rng.chance(0.1);
                let unmap = self.rng.chance(0.5);
                (Pending::Change(id, fua), Request::Zero { offset, len, unmap, fast_only: false, fua })
            }
            68..=73 if self.habits.discard => {
                let (offset, len) = self.range(disk, 4096, 1 << 20, true);
                let id = history.issue(disk, Effect::Zero, offset, len, now);
                (Pending::Change(id, false), Request::Discard { offset, len, fua: false })
            }
            74 => (Pending::Flush(history.tick()), Request::Flush),
            _ => {
                let (offset, len) = self.range(disk, 1, MAX_PART as u64, false);
                let issued = history.tick() + 1;
                (Pending::Read { disk, offset, issued }, Request::Read { offset, len: len as usize })
            }
        };
        self.issued += 1;
        self.pending.insert(cookie, Asked { disk, pending, since: stage.world.now() });
        stage.request(disk, cookie, request);
    }

    /// A range on the disk, most often short and in its hot part, within one part of [`MAX_PART`].
    fn range(&mut self, disk: usize, least: u64, most: u64, aligned: bool) -> (u64, u64) {
        let size = self.sizes[disk];
        let span = if self.rng.chance(0.8) { (size * self.habits.hot / 100).max(8192) } else { size };
        let longest = match self.rng.below(10) {
            0..=6 => most.min(16 * 1024),
            7..=8 => most.min(128 * 1024),
            _ => most,
        };
        let unit = if aligned || self.rng.chance(0.6) {
            4096
        } else if self.rng.chance(0.5) {
            512
        } else {
            1
        };
        let unit = unit.max(self.habits.unit);
        let base = (size - span) * self.place / 100;
        let offset = (base + self.rng.below(span)) / unit * unit;
        let len = self.rng.between(least, longest.max(least)).next_multiple_of(unit);
        let edge = (offset / MAX_PART as u64 + 1) * MAX_PART as u64;
        let len = len.min(edge.min(size) - offset);
        if len < least { (offset / 4096 * 4096, 4096) } else { (offset, len) }
    }

    /// Takes the answers that have come.
    ///
    /// # Errors
    /// A read that shows what it must not.
    pub fn answers(&mut self, stage: &mut Stage, history: &mut History, may_fail: bool) -> Result<(), String> {
        let now = stage.source_now();
        while let Some((disk, answer)) = stage.answers.pop_front() {
            let Some(Asked { disk: asked, pending, .. }) = self.pending.remove(&answer.cookie) else {
                return Err(format!("disk {disk} answers {}, which nobody asks", answer.cookie));
            };
            if asked != disk {
                return Err(format!("disk {disk} answers what disk {asked} was asked"));
            }
            if let Err(error) = answer.result
                && !(may_fail && error == Errno::IO || stage.stopping && error == SHUTDOWN)
            {
                return Err(format!("disk {disk} answers with {error:?}"));
            }
            let failed = answer.result.is_err();
            self.answered += 1;
            match pending {
                Pending::Change(id, fua) => {
                    history.answer(id, now, failed);
                    if fua && !failed {
                        history.durable(id);
                    }
                }
                Pending::Flush(tick) => {
                    if !failed {
                        self.flushed[disk] = self.flushed[disk].max(tick + 1);
                    }
                }
                Pending::Read { disk, offset, issued } => {
                    if let Ok(bytes) = answer.result {
                        let bytes = bytes.ok_or("a read is answered without data")?;
                        let judged = history.judge_read(disk, offset, &bytes, issued);
                        judged.map_err(|v| format!("a read of {} bytes at {offset}: {v}", bytes.len()))?;
                    }
                }
            }
        }
        Ok(())
    }
}
