//! The table of registered files: which descriptor stands in which slot, and what is still under way on it.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use io_uring::IoUring;

use super::ublk::Attached;
use crate::io::Errno;

/// An open file or socket.
pub(super) struct Entry {
    pub(super) fd: OwnedFd,
    pub(super) socket: bool,
    /// An event counter, which counts as a socket.
    pub(super) event: bool,
    /// [`crate::io::FileInfo::discard`]; found out when it was opened.
    pub(super) discard: bool,
    /// Of a ublk device. It holds the file open, so it goes with it.
    pub(super) ublk: Option<Attached>,
    in_flight: u32,
    closing: bool,
}

struct Slot {
    /// Counts the slot's uses, so that a stale number is told from a fresh one.
    generation: u16,
    entry: Option<Entry>,
}

/// Numbers are `generation << 16 | slot`.
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u16>,
}

impl Table {
    /// A table as long as the one registered with the ring.
    pub(super) fn new(len: u16) -> Self {
        let slots = (0..len).map(|_| Slot { generation: 0, entry: None }).collect();
        Self { slots, free: (0..len).rev().collect() }
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Registers the descriptor and numbers it.
    pub(super) fn insert(&mut self, ring: &IoUring, fd: OwnedFd, socket: bool, discard: bool) -> Result<u32, Errno> {
        self.insert_as(ring, Entry { fd, socket, event: false, discard, ublk: None, in_flight: 0, closing: false })
    }

    /// As [`Table::insert`], of an event counter.
    pub(super) fn insert_event(&mut self, ring: &IoUring, fd: OwnedFd) -> Result<u32, Errno> {
        self.insert_as(
            ring,
            Entry { fd, socket: true, event: true, discard: false, ublk: None, in_flight: 0, closing: false },
        )
    }

    fn insert_as(&mut self, ring: &IoUring, entry: Entry) -> Result<u32, Errno> {
        let slot = *self.free.last().ok_or(Errno::NFILE)?;
        let registered = ring.submitter().register_files_update(u32::from(slot), &[entry.fd.as_raw_fd()]);
        registered.map_err(|e| super::kernel::errno(&e))?;
        self.free.pop();
        let place = &mut self.slots[usize::from(slot)];
        place.entry = Some(entry);
        Ok(u32::from(place.generation) << 16 | u32::from(slot))
    }

    /// Keeps what a ublk device has beside its file as long as that.
    pub(super) fn keep_attached(&mut self, number: u32, attached: Attached) {
        if let Some(entry) = &mut self.slots[usize::from(number as u16)].entry {
            entry.ublk = Some(attached);
        }
    }

    /// The entry, unless it was closed.
    pub(super) fn get(&self, number: u32) -> Option<&Entry> {
        let slot = self.slots.get(usize::from(number as u16))?;
        slot.entry.as_ref().filter(|entry| u32::from(slot.generation) == number >> 16 && !entry.closing)
    }

    /// Whether it is an event counter, and operations are under way on it.
    pub(super) fn busy_event(&self, number: u32) -> bool {
        self.get(number).is_some_and(|entry| entry.event && entry.in_flight > 0)
    }

    pub(super) fn fd(&self, number: u32) -> Result<BorrowedFd<'_>, Errno> {
        use std::os::fd::AsFd;
        self.get(number).map(|entry| entry.fd.as_fd()).ok_or(Errno::BADF)
    }

    /// Counts an operation; false if there is no such file (or socket).
    pub(super) fn begin(&mut self, number: u32, socket: bool) -> bool {
        if self.get(number).is_none_or(|entry| entry.socket != socket) {
            return false;
        }
        if let Some(entry) = &mut self.slots[usize::from(number as u16)].entry {
            entry.in_flight += 1;
        }
        true
    }

    /// Counts an operation's end.
    pub(super) fn end(&mut self, ring: &IoUring, number: u32) {
        if let Some(entry) = &mut self.slots[usize::from(number as u16)].entry {
            entry.in_flight -= 1;
        }
        self.release(ring, number);
    }

    /// No new operations; the descriptor goes when the last one under way has ended.
    pub(super) fn close(&mut self, ring: &IoUring, number: u32) {
        if self.get(number).is_none() {
            return;
        }
        if let Some(entry) = &mut self.slots[usize::from(number as u16)].entry {
            entry.closing = true;
            if entry.socket && !entry.event {
                // Ends what is under way, and tells the peer.
                let _ = rustix::net::shutdown(&entry.fd, rustix::net::Shutdown::Both);
            }
        }
        self.release(ring, number);
    }

    fn release(&mut self, ring: &IoUring, number: u32) {
        let index = number as u16;
        let slot = &mut self.slots[usize::from(index)];
        let Some(mut entry) = slot.entry.take_if(|entry| entry.closing && entry.in_flight == 0) else { return };
        if let Some(attached) = entry.ublk.take() {
            attached.let_go();
        }
        if !entry.socket {
            // The kernel may let go of a registered file only later; its lock ends now.
            let _ = rustix::fs::flock(&entry.fd, rustix::fs::FlockOperation::Unlock);
        }
        // The slot stays taken in the kernel if this fails, until it is overwritten; that is no reason to fail.
        let _ = ring.submitter().register_files_update(u32::from(index), &[-1]);
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
    }

    /// Shuts every socket down, so that what is under way on them ends.
    pub(super) fn shut_sockets(&self) {
        for entry in
            self.slots.iter().filter_map(|slot| slot.entry.as_ref()).filter(|entry| entry.socket && !entry.event)
        {
            let _ = rustix::net::shutdown(&entry.fd, rustix::net::Shutdown::Both);
        }
    }
}
