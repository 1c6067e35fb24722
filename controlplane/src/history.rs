//! The RPO of each group over time: one distribution for each minute and each hour, beside the store (`history.redb`), so
//! that what is written once a minute never burdens what is written with each decision. Losing this file loses numbers of
//! the past and nothing else.
//!
//! ```text
//! key   = "<uid of the group>/<seconds of the interval>/<its beginning, seconds since the Unix epoch>"
//! value = version u8 = 1 · inside u64 · total u64 · idle, seal, link, durable, silent u64 · hdrhistogram (V2)
//! ```
//! Little-endian. `inside` of `total` samples were within the target that held then.

use std::path::Path;
use std::sync::Arc;

use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::beside;
use crate::rpo::{self, MAX_RPO_US};

const RPO: TableDefinition<&str, &[u8]> = TableDefinition::new("rpo");
/// Version of a value.
const VERSION: u8 = 1;
/// Bytes before the histogram.
const HEAD: usize = 1 + 7 * 8;
/// Seconds of the short intervals, and for how long they are kept.
pub const MINUTE: (u64, u64) = (60, 48 * 3600);
/// Seconds of the long intervals, and for how long they are kept.
pub const HOUR: (u64, u64) = (3600, 400 * 86_400);

/// Where the oldest write that was not durable yet was waiting, in samples: one with each report.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Stages {
    /// Nowhere: everything was durable.
    pub idle: u64,
    /// At the source, for its frame to be closed and sealed.
    pub seal: u64,
    /// At the source, sealed, for the link.
    pub link: u64,
    /// Sent: on its way, or at the target for stable storage.
    pub durable: u64,
    /// Nobody knows: no report came.
    pub silent: u64,
}

/// The RPO in an interval.
#[derive(Clone, PartialEq, Debug)]
pub struct Bucket {
    /// Samples within the target.
    pub inside: u64,
    /// Samples.
    pub total: u64,
    /// Where the time went.
    pub stages: Stages,
    /// The samples, microseconds.
    pub samples: Histogram<u32>,
}

impl Default for Bucket {
    fn default() -> Self {
        Self { inside: 0, total: 0, stages: Stages::default(), samples: rpo::new_histogram() }
    }
}

impl Bucket {
    /// Adds another interval's.
    pub fn add(&mut self, other: &Self) {
        self.inside += other.inside;
        self.total += other.total;
        let (a, b) = (&mut self.stages, &other.stages);
        a.idle += b.idle;
        a.seal += b.seal;
        a.link += b.link;
        a.durable += b.durable;
        a.silent += b.silent;
        // Of the same bounds: cannot fail.
        let _ = self.samples.add(&other.samples);
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        let s = &self.stages;
        for number in [self.inside, self.total, s.idle, s.seal, s.link, s.durable, s.silent] {
            bytes.extend(number.to_le_bytes());
        }
        V2Serializer::new().serialize(&self.samples, &mut bytes).expect("a vector takes everything");
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HEAD || bytes[0] != VERSION {
            return None;
        }
        let mut numbers = bytes[1..HEAD].chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")));
        let mut next = || numbers.next().expect("seven of them");
        let (inside, total) = (next(), next());
        let stages = Stages { idle: next(), seal: next(), link: next(), durable: next(), silent: next() };
        let mut samples = rpo::new_histogram();
        for value in rpo::decode(&bytes[HEAD..]).ok()??.iter_recorded() {
            let count = u32::try_from(value.count_at_value()).unwrap_or(u32::MAX);
            samples.saturating_record_n(value.value_iterated_to().min(MAX_RPO_US), count);
        }
        Some(Self { inside, total, stages, samples })
    }
}

/// The file.
#[derive(Clone)]
pub struct History {
    database: Arc<Database>,
}

fn key(uid: &str, step_s: u64, begins_s: u64) -> String {
    format!("{uid}/{step_s:05}/{begins_s:012}")
}

impl History {
    /// Opens the file, or makes it. One that cannot be read is put aside under another name: numbers of the past are no
    /// reason not to start.
    ///
    /// # Errors
    /// It can neither be opened nor made.
    pub fn open(path: &Path) -> Result<Self, String> {
        let create = || Database::create(path).map_err(|e| format!("{}: {e}", path.display()));
        let database = beside::open(path, "history", create, |write| write.open_table(RPO).map(drop))?;
        Ok(Self { database: Arc::new(database) })
    }

    /// Adds what was seen in the minute that begins at `begins_s`, to the minute and its hour, and forgets what is too
    /// old. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&self, begins_s: u64, buckets: &[(String, Bucket)]) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            let mut table = write.open_table(RPO)?;
            for (uid, bucket) in buckets {
                for (step, kept) in [MINUTE, HOUR] {
                    let key = key(uid, step, begins_s - begins_s % step);
                    let old = table.get(key.as_str())?.and_then(|v| Bucket::decode(v.value()));
                    let mut next = old.unwrap_or_default();
                    next.add(bucket);
                    table.insert(key.as_str(), next.encode().as_slice())?;
                    let (first, last) = (self::key(uid, step, 0), self::key(uid, step, begins_s.saturating_sub(kept)));
                    table.retain_in(first.as_str()..last.as_str(), |_, _| false)?;
                }
            }
        }
        write.commit()?;
        Ok(())
    }

    /// Forgets a group. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn forget(&self, uid: &str) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            let (first, last) = (format!("{uid}/"), format!("{uid}0"));
            write.open_table(RPO)?.retain_in(first.as_str()..last.as_str(), |_, _| false)?;
        }
        write.commit()?;
        Ok(())
    }

    /// The intervals of `step_s` that begin in `from_s..to_s`, with their beginnings. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, uid: &str, step_s: u64, from_s: u64, to_s: u64) -> Result<Vec<(u64, Bucket)>, redb::Error> {
        let read = self.database.begin_read()?;
        let table = read.open_table(RPO)?;
        let (first, last) = (key(uid, step_s, from_s), key(uid, step_s, to_s));
        let mut found = Vec::new();
        for item in table.range(first.as_str()..last.as_str())? {
            let (key, value) = item?;
            let begins = key.value().rsplit('/').next().and_then(|s| s.parse().ok());
            if let (Some(begins), Some(bucket)) = (begins, Bucket::decode(value.value())) {
                found.push((begins, bucket));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::hex;

    fn bucket(value: u64, count: u32) -> Bucket {
        let mut bucket = Bucket { inside: 1, total: u64::from(count), ..Bucket::default() };
        bucket.samples.record_n(value, count).unwrap();
        bucket.stages.link = 2;
        bucket
    }

    fn history() -> (tempfile::TempDir, History) {
        let folder = tempfile::tempdir().unwrap();
        let history = History::open(&folder.path().join("h.redb")).unwrap();
        (folder, history)
    }

    #[test]
    fn minutes_are_merged_into_their_hour_and_a_minute_written_twice_is_one() {
        let (_folder, history) = history();
        let hour = 1_800_000_000;
        for minute in [0, 60, 60, 3600] {
            history.add(hour + minute, &[("u".into(), bucket(1000, 10))]).unwrap();
        }
        let minutes = history.read("u", 60, hour, hour + 7200).unwrap();
        assert_eq!(
            minutes.iter().map(|(s, b)| (s - hour, b.total)).collect::<Vec<_>>(),
            [(0, 10), (60, 20), (3600, 10)]
        );
        let hours = history.read("u", 3600, hour, hour + 7200).unwrap();
        assert_eq!(hours.iter().map(|(s, b)| (s - hour, b.total)).collect::<Vec<_>>(), [(0, 30), (3600, 10)]);
        assert_eq!((hours[0].1.samples.len(), hours[0].1.stages.link, hours[0].1.inside), (30, 6, 3));
        assert!(history.read("v", 60, 0, u64::MAX / 2).unwrap().is_empty());
    }

    #[test]
    fn what_is_too_old_goes_and_a_forgotten_group_too() {
        let (_folder, history) = history();
        let now = 1_800_000_000;
        history.add(now, &[("u".into(), bucket(1, 1)), ("ua".into(), bucket(1, 1))]).unwrap();
        history.add(now + MINUTE.1 + 120, &[("u".into(), bucket(1, 1))]).unwrap();
        assert_eq!(history.read("u", 60, 0, now * 2).unwrap().len(), 1);
        assert_eq!(history.read("u", 3600, 0, now * 2).unwrap().len(), 2);
        history.forget("u").unwrap();
        assert!(history.read("u", 3600, 0, now * 2).unwrap().is_empty());
        assert_eq!(history.read("ua", 3600, 0, now * 2).unwrap().len(), 1);
    }

    #[test]
    fn the_bytes_are_these() {
        let bytes = bucket(1000, 10).encode();
        let golden = "01 0100000000000000 0a00000000000000 0000000000000000 0000000000000000 0200000000000000 \
                      0000000000000000 0000000000000000"
            .replace(' ', "");
        assert_eq!(hex(&bytes[..HEAD]), golden);
        assert_eq!(Bucket::decode(&bytes).unwrap(), bucket(1000, 10));
        for bad in [&bytes[..HEAD - 1], &[2], &bytes[..HEAD + 10], &[]] {
            assert!(Bucket::decode(bad).is_none());
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("h.redb");
        std::fs::write(&path, "this is no database".repeat(1000)).unwrap();
        let history = History::open(&path).unwrap();
        history.add(60, &[("u".into(), bucket(1, 1))]).unwrap();
        assert!(folder.path().join("h.redb.unreadable").exists());
    }
}
