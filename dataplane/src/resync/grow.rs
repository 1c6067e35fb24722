//! A disk that grows while it is in use.
//!
//! What is behind its old end was never ours: it goes into the dirty map, and a synchronisation begins *before* the
//! record that says the new size. So no point holds the disk in its new size without what is in it, and points before
//! hold it in the old one. Its log names the new size only when the bits of what is new are durable: a life in between
//! finds a disk that is larger than its log says, and marks the rest itself.

use afterimage_wire::record::{DiskInfo, RecordKind};

use crate::capture::{Disk, Flow};
use crate::io::Io;
use crate::sealers::Payload;
use crate::ship::{Event, SMALL_COST};

impl Disk {
    /// The disk as its stream describes it.
    pub fn describe(&self) -> DiskInfo {
        DiskInfo {
            slot: self.config.slot,
            id: self.config.id,
            size: self.info.size,
            block: self.told_block(),
            physical_block: self.info.physical_block,
            serial: self.config.serial.clone(),
            name: if self.config.label.is_empty() { &self.config.name } else { &self.config.label }.clone(),
        }
    }

    /// Looks whether the disk has grown, and takes it over if it has. A disk that has shrunk stays as it is: what lies
    /// behind its end fails.
    pub fn look_at_size<I: Io>(&mut self, f: &mut Flow<'_, I>) {
        let Ok(found) = f.io.info(self.file) else { return };
        let (old, new) = (self.info.size, found.size - found.size % u64::from(self.told_block()));
        if new <= old || self.is_fenced() {
            return;
        }
        if let Some(log) = &mut self.log
            && let Err(errno) = log.grow(f.io, old, new)
        {
            return self.fault(format!("the disk has grown to {new} bytes; its write-intent log cannot: {errno}"));
        }
        self.begin_sync(f, false);
        (self.info.size, self.sync.size) = (new, new);
        let mut body = Vec::with_capacity(128);
        self.describe().encode(&mut body);
        let event = Event { kind: RecordKind::Resize, disk: self.config.slot, offset: 0, len: 0 };
        let (now, wall) = (f.io.now(), f.io.wall());
        if let Some(queue) = f.queue.as_deref_mut().filter(|queue| !queue.closed) {
            queue.push(event, Payload::Mark(body), 0, SMALL_COST, now, wall);
        }
        tracing::info!(disk = self.config.name, old, new, "the disk has grown");
    }
}
