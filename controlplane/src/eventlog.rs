//! Events over a restart, and how far each hook has got: a file beside the store (`events.redb`). Losing it loses what has
//! happened, and nothing that is so.
//!
//! ```text
//! events   = number of the event -> version u8 = 1 · the event as in the API (protobuf)
//! cursors  = name of a hook -> number of the newest event that it has had
//! ```
//! Events are written a few times a second, all that are new at once: a crash loses the last of them.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use afterimage_wire::v1::Event;
use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::beside;
use crate::events::MAX_EVENTS;

const EVENTS: TableDefinition<u64, &[u8]> = TableDefinition::new("events");
const CURSORS: TableDefinition<&str, u64> = TableDefinition::new("cursors");
/// Version of an event's value.
const VERSION: u8 = 1;

/// The file.
#[derive(Clone)]
pub struct EventLog {
    database: Arc<Database>,
}

impl EventLog {
    /// Opens the file, or makes it. One that cannot be read is put aside.
    ///
    /// # Errors
    /// It can neither be opened nor made.
    pub fn open(path: &Path) -> Result<Self, String> {
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let create = || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
            file.map_err(|e| failed(&e))?;
            Database::create(path).map_err(|e| failed(&e))
        };
        let database = beside::open(path, "events", create, |write| {
            write.open_table(EVENTS)?;
            write.open_table(CURSORS).map(drop)
        })?;
        Ok(Self { database: Arc::new(database) })
    }

    /// Adds events; the oldest give way. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&self, events: &[Event]) -> Result<(), redb::Error> {
        let Some(newest) = events.iter().map(|e| e.number).max() else { return Ok(()) };
        let write = self.database.begin_write()?;
        {
            let mut table = write.open_table(EVENTS)?;
            for event in events {
                let mut bytes = vec![VERSION];
                bytes.extend(event.encode_to_vec());
                table.insert(event.number, bytes.as_slice())?;
            }
            table.retain_in(..newest.saturating_sub(MAX_EVENTS as u64 - 1), |_, _| false)?;
        }
        write.commit()?;
        Ok(())
    }

    /// All that are kept, oldest first. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self) -> Result<Vec<Event>, redb::Error> {
        let read = self.database.begin_read()?;
        let table = read.open_table(EVENTS)?;
        let mut found = Vec::new();
        for item in table.iter()? {
            let (number, value) = item?;
            let event = value.value().strip_prefix(&[VERSION]).and_then(|bytes| Event::decode(bytes).ok());
            found.extend(event.filter(|e| e.number == number.value()));
        }
        Ok(found)
    }

    /// How far a hook has got; nothing if it is new. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn cursor(&self, hook: &str) -> Result<Option<u64>, redb::Error> {
        let read = self.database.begin_read()?;
        Ok(read.open_table(CURSORS)?.get(hook)?.map(|v| v.value()))
    }

    /// A hook has had everything up to there. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_cursor(&self, hook: &str, number: u64) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        write.open_table(CURSORS)?.insert(hook, number)?;
        write.commit()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u64) -> Event {
        Event { number, kind: "condition".into(), message: format!("m{number}"), ..Event::default() }
    }

    #[test]
    fn events_and_cursors_are_there_again_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.redb");
        let log = EventLog::open(&path).unwrap();
        log.add(&(1..=3).map(event).collect::<Vec<_>>()).unwrap();
        log.set_cursor("pager", 2).unwrap();
        drop(log);
        let log = EventLog::open(&path).unwrap();
        assert_eq!(log.read().unwrap(), (1..=3).map(event).collect::<Vec<_>>());
        assert_eq!((log.cursor("pager").unwrap(), log.cursor("other").unwrap()), (Some(2), None));
        let many = 5 + MAX_EVENTS as u64;
        log.add(&(4..=many).map(event).collect::<Vec<_>>()).unwrap();
        let kept = log.read().unwrap();
        assert_eq!((kept.len(), kept[0].number), (MAX_EVENTS, 6));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.redb");
        std::fs::write(&path, "this is no database".repeat(1000)).unwrap();
        EventLog::open(&path).unwrap().add(&[event(1)]).unwrap();
        assert!(folder.path().join("events.redb.unreadable").exists());
    }

    #[test]
    fn the_bytes_are_these() {
        let folder = tempfile::tempdir().unwrap();
        let log = EventLog::open(&folder.path().join("e.redb")).unwrap();
        log.add(&[event(1)]).unwrap();
        let read = log.database.begin_read().unwrap();
        let table = read.open_table(EVENTS).unwrap();
        let bytes = table.get(1).unwrap().unwrap().value().to_vec();
        assert_eq!(crate::ca::hex(&bytes), "0108012209636f6e646974696f6e32026d31");
    }
}
