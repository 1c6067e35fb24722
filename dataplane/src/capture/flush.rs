//! Flushes. One sync is with the kernel at a time; who asks meanwhile shares the next one, which is issued later than
//! all that they were told before.
//!
//! An epoch counts the syncs issued. A write that completes takes the current epoch; a sync covers the epochs before
//! its issue. After a failed sync nothing is known of the writes before it, and a later sync would not tell: every
//! flush is refused from then on, until the disk is opened anew.

use super::{Disk, Flow, kind};
use crate::io::{Done, Errno, Io, Op};

/// See the module.
#[derive(Debug)]
pub(crate) struct Flush {
    /// Who waits: cookie, and the record that must be acknowledged as well (0 for none).
    waiting: Vec<(u64, u64)>,
    running: Vec<(u64, u64)>,
    busy: bool,
    /// A sync is wanted although no host waits.
    own: bool,
    epoch: u64,
    /// What the sync under way covers.
    covers: u64,
    flushed: u64,
    /// Epoch of the newest write that was not durable by itself.
    newest: u64,
    failed: bool,
}

impl Default for Flush {
    fn default() -> Self {
        Self {
            waiting: Vec::with_capacity(64),
            running: Vec::with_capacity(64),
            busy: false,
            own: false,
            epoch: 1,
            covers: 0,
            flushed: 0,
            newest: 0,
            failed: false,
        }
    }
}

impl Flush {
    /// A write has completed that was not durable by itself; its epoch.
    pub fn note_write(&mut self) -> u64 {
        self.newest = self.epoch;
        self.epoch
    }

    /// Epoch that writes completing now get.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Newest epoch covered by a successful sync.
    pub fn flushed(&self) -> u64 {
        self.flushed
    }

    /// A sync has failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    pub fn is_busy(&self) -> bool {
        self.busy
    }

    pub fn is_clean(&self) -> bool {
        self.newest <= self.flushed
    }
}

impl Disk {
    /// Flushes for a host. `seq` is the record of what is flushed, if that must be acknowledged before the answer.
    pub(super) fn flush_for<I: Io>(&mut self, f: &mut Flow<'_, I>, cookie: u64, seq: u64) {
        if self.flush.failed {
            return self.answer(f, cookie, Err(Errno::IO));
        }
        if mutant!(FlushNotForwarded) {
            return self.answer(f, cookie, Ok(None));
        }
        self.flush.waiting.push((cookie, seq));
        self.start_flush(f);
    }

    /// Flushes for ourselves: a sync is issued after this call.
    pub fn flush_own<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        self.flush.own = !self.flush.failed;
        self.start_flush(f);
    }

    fn start_flush<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        let flush = &mut self.flush;
        if flush.busy || (flush.waiting.is_empty() && !flush.own) {
            return;
        }
        std::mem::swap(&mut flush.waiting, &mut flush.running);
        flush.busy = true;
        flush.own = false;
        flush.covers = flush.epoch;
        flush.epoch += 1;
        let file = self.file;
        f.io.submit(self.token(kind::FLUSH, 0), Op::Sync { file });
    }

    /// Takes the completion of a sync.
    pub fn flush_done<I: Io>(&mut self, f: &mut Flow<'_, I>, done: Done) {
        self.flush.busy = false;
        let result = match done.result {
            Ok(_) => {
                self.flush.flushed = if mutant!(BitByEarlierFlush) { self.flush.epoch } else { self.flush.covers };
                Ok(())
            }
            Err(errno) if mutant!(FailedSyncForgotten) => Err(errno),
            Err(errno) => {
                self.flush.failed = true;
                self.flush.own = false;
                let flushed = self.flush.flushed;
                if let Some(log) = &mut self.log {
                    log.stick_unflushed(flushed);
                }
                self.fault(format!("sync: {errno}; flushes are refused until the disk is opened anew"));
                Err(errno)
            }
        };
        let mut answered = std::mem::take(&mut self.flush.running);
        for (cookie, seq) in answered.drain(..) {
            match result {
                Ok(()) => self.written_answer(f, cookie, seq),
                Err(errno) => self.answer(f, cookie, Err(errno)),
            }
        }
        self.flush.running = answered;
        if self.flush.failed {
            while let Some((cookie, _)) = self.flush.waiting.pop() {
                self.answer(f, cookie, Err(Errno::IO));
            }
        }
        self.start_flush(f);
    }
}
