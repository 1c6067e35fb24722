//! A disk leaves its stream while the others go on: its requests end, the stream says that it has left, its files are
//! closed. Until the target has acknowledged that, each new incarnation says it again; and after a restart too, since
//! the group's configuration names the slots of the disks that have left.

use afterimage_wire::ids::DiskId;

use super::group::{Around, Group};
use super::status::SourceEvent;
use crate::capture::Gate;
use crate::io::{Io, Nanos};

/// A disk on its way out.
#[derive(Clone, Debug)]
pub(super) struct Leaving {
    /// Its index.
    disk: u32,
    /// The record that says so, once its requests have ended.
    pub seq: Option<u64>,
    /// When it is closed although that is not acknowledged.
    until: Nanos,
}

impl Group {
    /// Begins to take a disk out. False if it is not there, or the last one.
    pub fn leave<I: Io>(&mut self, w: &mut Around<'_, I>, id: DiskId) -> bool {
        let of = |index: &&u32| w.disks[**index as usize].as_ref().is_some_and(|disk| disk.config.id == id);
        let Some(index) = self.disks.iter().find(of).copied() else { return false };
        if self.leaving.iter().any(|one| one.disk == index) {
            return true;
        }
        if self.disks.len() <= self.leaving.len() + 1 {
            return false;
        }
        let until = w.io.now() + self.limits.stop_wait;
        self.leaving.push(Leaving { disk: index, seq: None, until });
        self.each_disk(w, |disk, f| {
            if disk.config.id == id {
                disk.set_gate(f, Gate::Stopping);
            }
        });
        true
    }

    /// When the next disk is closed at the latest.
    pub fn leave_due(&self) -> Option<Nanos> {
        self.leaving.iter().map(|one| one.until).min()
    }

    /// Goes on with the disks on their way out.
    pub fn leave_turn<I: Io>(&mut self, w: &mut Around<'_, I>, now: Nanos) {
        let mut at = 0;
        while at < self.leaving.len() {
            let one = self.leaving[at].clone();
            let Some(disk) = &mut w.disks[one.disk as usize] else {
                self.leaving.swap_remove(at);
                continue;
            };
            if one.seq.is_none() && disk.is_drained() && disk.sync.is_quiet() {
                disk.sync.reset();
                disk.out.get_or_insert(0);
                let slot = disk.config.slot;
                self.leaving[at].seq = Some(self.draw_leave(w, slot));
            }
            let acknowledged = one.seq.is_some_and(|seq| seq <= self.ship.acked_seq);
            let quiet = w.disks[one.disk as usize].as_ref().is_some_and(|disk| disk.is_quiet());
            // Headers that are on their way count the disks.
            if (acknowledged || (one.seq.is_some() && now >= one.until)) && quiet && self.announcing.is_none() {
                self.leaving.swap_remove(at);
                self.close_left(w, one.disk, acknowledged);
            } else {
                at += 1;
            }
        }
    }

    fn close_left<I: Io>(&mut self, w: &mut Around<'_, I>, index: u32, acknowledged: bool) {
        self.disks.retain(|other| *other != index);
        let Some(disk) = w.disks[index as usize].take() else { return };
        let (stream, id, slot) = (self.config.stream, disk.config.id, disk.config.slot);
        self.config.disks.retain(|other| other.id != id);
        self.config.left.push(slot);
        w.io.close(disk.file);
        if let Some(log) = disk.log {
            log.close(w.io);
        }
        w.events.push_back(SourceEvent::Left { stream, disk: id, acknowledged });
    }

    /// The head of a new incarnation: every disk that is not in the stream any more leaves it (again).
    pub fn draw_leaves<I: Io>(&mut self, w: &mut Around<'_, I>) {
        for at in 0..self.config.left.len() {
            let slot = self.config.left[at];
            self.draw_leave(w, slot);
        }
        for at in 0..self.disks.len() {
            let index = self.disks[at];
            let Some(disk) = w.disks[index as usize].as_mut().filter(|disk| disk.out.is_some()) else { continue };
            let slot = disk.config.slot;
            // Durable before the first frame of the incarnation leaves: its announcement counts this log.
            disk.left = true;
            if let Some(log) = &mut disk.log {
                log.set_header(|h| h.left = true);
            }
            let seq = self.draw_leave(w, slot);
            if let Some(leaving) = self.leaving.iter_mut().find(|one| one.disk == index) {
                leaving.seq = Some(seq);
            }
        }
    }
}
