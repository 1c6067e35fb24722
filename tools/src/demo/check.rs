//! Holds a pair of disks against what the writer remembers: is the state exactly a prefix of its history, over both
//! disks, and how old is what is missing?

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::writer::{BLOCK, Disk, Memory, Stamp, read_stamp};
use crate::nbd_client::Client;

/// Bytes of one read while checking.
const READ: usize = 4 * 1024 * 1024;

/// All stamps of a pair of disks.
#[derive(Debug, Default)]
pub struct State {
    /// What each written block says.
    pub blocks: HashMap<(u8, u64), Stamp>,
    /// Blocks read, written or not.
    pub blocks_read: u64,
}

/// Reads every block of both disks.
///
/// # Errors
/// A disk that cannot be read, a torn block, or one that belongs elsewhere.
pub fn read_state(socket: &Path, exports: [&str; 2]) -> io::Result<State> {
    let mut state = State::default();
    let mut buffer = vec![0; READ];
    for (disk, export) in [Disk::Data, Disk::Log].into_iter().zip(exports) {
        let mut client = Client::connect(socket, export, Duration::from_secs(30))?;
        let size = client.size();
        let mut at = 0;
        while at < size {
            let length = (size - at).min(READ as u64) as usize;
            client.read(at, &mut buffer[..length])?;
            for (number, page) in buffer[..length].chunks(BLOCK).enumerate() {
                let block = at / BLOCK as u64 + number as u64;
                state.blocks_read += 1;
                let stamp = read_stamp(page)
                    .map_err(|what| io::Error::other(format!("block {block} of the {disk:?} disk: {what}")))?;
                if let Some(stamp) = stamp {
                    if stamp.disk != disk || stamp.block != block {
                        return Err(io::Error::other(format!(
                            "block {block} of the {disk:?} disk holds block {} of the {:?} disk",
                            stamp.block, stamp.disk
                        )));
                    }
                    state.blocks.insert((disk as u8, block), stamp);
                }
            }
            at += length as u64;
        }
    }
    Ok(state)
}

/// What a state turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Newest transaction whose commit is there.
    pub committed: u64,
    /// Writes that the prefix holds.
    pub writes_held: u64,
    /// When the newest answered write that is there was answered, nanoseconds since the Unix epoch.
    pub newest_held_ns: u64,
    /// When the oldest answered write that is missing was answered; none if nothing answered is missing.
    pub oldest_missing_ns: Option<u64>,
}

/// Checks that `state` is a prefix of the writer's history.
///
/// Let `c` be the newest commit on the log disk. Every block must hold its newest write of a transaction up to `c`, or
/// a write of transaction `c + 1` (in flight at that place); anything else is a hole, a resurrection, or a write that
/// overtook another.
///
/// # Errors
/// The first block that differs, and how.
pub fn check_prefix(memory: &Memory, state: &State) -> Result<Verdict, String> {
    let committed = state.blocks.values().filter(|s| s.disk == Disk::Log).map(|s| s.transaction).max().unwrap_or(0);
    let mut expected: HashMap<(u8, u64), u64> = HashMap::new();
    let mut in_flight: HashMap<(u8, u64), u64> = HashMap::new();
    let mut verdict = Verdict { committed, writes_held: 0, newest_held_ns: 0, oldest_missing_ns: None };
    for written in &memory.writes {
        let place = (written.disk as u8, written.block);
        let held = if written.transaction <= committed {
            expected.insert(place, written.write);
            true
        } else {
            if written.transaction == committed + 1 {
                in_flight.insert(place, written.write);
            }
            state.blocks.get(&place).is_some_and(|s| s.write == written.write)
        };
        if held {
            verdict.writes_held += 1;
            if written.answered_ns != u64::MAX {
                verdict.newest_held_ns = verdict.newest_held_ns.max(written.answered_ns);
            }
        } else if written.answered_ns != u64::MAX {
            let oldest = verdict.oldest_missing_ns.get_or_insert(written.answered_ns);
            *oldest = (*oldest).min(written.answered_ns);
        }
    }
    let name = |place: &(u8, u64)| format!("block {} of the {} disk", place.1, ["data", "log"][usize::from(place.0)]);
    for (place, want) in &expected {
        match state.blocks.get(place) {
            None => return Err(format!("{} is empty, but write {want} was committed", name(place))),
            Some(stamp) if stamp.write == *want || in_flight.get(place) == Some(&stamp.write) => {}
            Some(stamp) => {
                return Err(format!(
                    "{} holds write {} of transaction {}, expected write {want} (newest commit: {committed})",
                    name(place),
                    stamp.write,
                    stamp.transaction
                ));
            }
        }
    }
    for (place, stamp) in &state.blocks {
        if !expected.contains_key(place) && in_flight.get(place) != Some(&stamp.write) {
            return Err(format!(
                "{} holds write {} of transaction {}, which is past the newest commit {committed}",
                name(place),
                stamp.write,
                stamp.transaction
            ));
        }
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use super::super::writer::{Written, fill};
    use super::*;

    fn memory(entries: &[(Disk, u64, u64)]) -> Memory {
        let writes = entries
            .iter()
            .enumerate()
            .map(|(n, (disk, block, transaction))| Written {
                disk: *disk,
                block: *block,
                transaction: *transaction,
                write: n as u64 + 1,
                sent_ns: n as u64 * 10,
                answered_ns: n as u64 * 10 + 5,
            })
            .collect();
        Memory { writes, ended_by: None }
    }

    fn state(memory: &Memory, held: &[u64]) -> State {
        let mut state = State::default();
        for write in held {
            let w = &memory.writes[*write as usize - 1];
            let stamp =
                Stamp { disk: w.disk, block: w.block, transaction: w.transaction, write: w.write, wall_ns: w.sent_ns };
            state.blocks.insert((w.disk as u8, w.block), stamp);
        }
        state
    }

    fn history() -> Memory {
        memory(&[
            (Disk::Data, 1, 1),
            (Disk::Log, 1, 1),
            (Disk::Data, 1, 2),
            (Disk::Data, 2, 2),
            (Disk::Log, 2, 2),
            (Disk::Data, 3, 3),
            (Disk::Log, 3, 3),
        ])
    }

    #[test]
    fn a_prefix_passes_and_names_what_is_missing() {
        let memory = history();
        let verdict = check_prefix(&memory, &state(&memory, &[1, 2])).unwrap();
        assert_eq!(verdict.committed, 1);
        assert_eq!(verdict.oldest_missing_ns, Some(25));
        assert_eq!(verdict.newest_held_ns, 15);
    }

    #[test]
    fn a_transaction_in_flight_may_be_there_in_part() {
        let memory = history();
        assert!(check_prefix(&memory, &state(&memory, &[1, 2, 4])).is_ok());
        assert!(check_prefix(&memory, &state(&memory, &[2, 3, 4])).is_ok());
    }

    #[test]
    fn a_commit_without_its_data_fails() {
        let memory = history();
        assert!(check_prefix(&memory, &state(&memory, &[1, 2, 3, 5])).is_err());
    }

    #[test]
    fn data_from_beyond_the_next_transaction_fails() {
        let memory = history();
        assert!(check_prefix(&memory, &state(&memory, &[1, 2, 6])).is_err());
    }

    #[test]
    fn an_older_version_of_a_block_fails() {
        let memory = history();
        assert!(check_prefix(&memory, &state(&memory, &[1, 2, 4, 5])).is_err());
    }

    #[test]
    fn a_torn_block_is_found() {
        let stamp = Stamp { disk: Disk::Log, block: 7, transaction: 3, write: 9, wall_ns: 1 };
        let mut page = [0; BLOCK];
        fill(&stamp, &mut page);
        assert_eq!(read_stamp(&page).unwrap(), Some(stamp));
        page[2048] ^= 1;
        assert!(read_stamp(&page).is_err());
        assert_eq!(read_stamp(&[0; BLOCK]).unwrap(), None);
    }
}
