//! Who has changed what: a record for each change, in files beside the store, each with the hash of the one before it.
//!
//! ```text
//! audit/audit-000000000001.log     one line for each record: its hash, a space, the record as JSON; named after the first
//! hash = SHA-256 of the JSON, which holds the hash before it as `prev`
//! ```
//! A record is durable before its change is committed, and the head of the chain (number and hash) is committed with the
//! change. So a record that was altered, left out or put in breaks the chain, and one that was cut off the end is missed
//! by the store. One whose commit did not happen is followed by another that says so. Secrets are in none: records name
//! objects, never what is in them.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ca::{hex, sha256};

/// Bytes after which the next file is begun.
pub const FILE_BYTES: u64 = 16 << 20;
/// Files that are kept; the oldest go first.
pub const MAX_FILES: usize = 64;
/// Objects that a record names; of more it says how many.
const MAX_OBJECTS_NAMED: usize = 32;
/// Longest outcome, characters.
const MAX_OUTCOME: usize = 500;
/// Longest line that is read, bytes.
const MAX_LINE: u64 = 64 * 1024;
/// The hash before the first record.
pub const NONE: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// One record.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// Rises by one.
    pub seq: u64,
    /// Nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Tenant of who asked; empty for the coordinator itself.
    pub tenant: String,
    /// Who asked, "role/name"; "coordinator" for what it does by itself.
    pub actor: String,
    /// Method of the API, "Policies/CreatePolicy", or what the coordinator was at.
    pub method: String,
    /// As given; empty if none was.
    pub request_id: String,
    /// What was changed: "put policies/default/gold", "delete tokens/…".
    pub objects: Vec<String>,
    /// "done"; "denied: …"; or, of an earlier record, "not done: …".
    pub outcome: String,
    /// Hash of the record before, hex.
    pub prev: String,
}

impl Record {
    fn line(&self) -> (String, String) {
        let json = serde_json::to_string(self).expect("plain data");
        let hash = hex(&sha256(json.as_bytes()));
        let line = format!("{hash} {json}\n");
        (line, hash)
    }

    /// Reads a line; the record, and its hash as computed from it.
    fn parse(line: &str) -> Result<(Self, String), String> {
        let (said, json) = line.trim_end_matches('\n').split_once(' ').ok_or("no hash")?;
        let hash = hex(&sha256(json.as_bytes()));
        if said != hash {
            return Err("its content is not what its hash says".to_owned());
        }
        let record: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        Ok((record, hash))
    }
}

/// The newest record: what the store keeps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Its number; 0 before the first.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
    /// The oldest record that is to be there.
    #[serde(default)]
    pub floor: u64,
}

impl Default for Head {
    fn default() -> Self {
        Self { seq: 0, hash: NONE.to_owned(), floor: 1 }
    }
}

/// Who is asking, and what: goes with the task of a call.
#[derive(Clone, Debug)]
pub struct Caller {
    /// See [`Record::tenant`].
    pub tenant: String,
    /// See [`Record::actor`].
    pub actor: String,
    /// See [`Record::method`].
    pub method: String,
    /// Known once the message is read.
    pub request_id: RefCell<String>,
}

impl Caller {
    /// Whose request id is not known yet.
    pub fn new(tenant: &str, actor: &str, method: &str) -> Self {
        let (tenant, actor, method) = (tenant.to_owned(), actor.to_owned(), method.to_owned());
        Self { tenant, actor, method, request_id: RefCell::default() }
    }
}

tokio::task_local! {
    /// The call that a task does.
    pub static CALLER: Caller;
}

/// [`Record::actor`] of what the coordinator does by itself.
pub const ITSELF: &str = "coordinator";

/// Says by which id the present call goes.
pub fn asked_with(request_id: &str) {
    // Without a call nobody wants to know.
    let _ = CALLER.try_with(|caller| request_id.clone_into(&mut caller.request_id.borrow_mut()));
}

/// A record of what the present call, or the coordinator by itself, is about to do to these objects.
pub fn of_caller(time_ns: u64, mut objects: Vec<String>, outcome: &str) -> Record {
    // A message may be long; a record is not.
    let outcome: String = outcome.chars().take(MAX_OUTCOME).collect();
    let more = objects.len().saturating_sub(MAX_OBJECTS_NAMED);
    objects.truncate(MAX_OBJECTS_NAMED);
    if more > 0 {
        objects.push(format!("and {more} more"));
    }
    let record = Record { time_ns, objects, outcome, ..Record::default() };
    let by_itself = Record { actor: ITSELF.to_owned(), ..record.clone() };
    CALLER
        .try_with(|caller| Record {
            tenant: caller.tenant.clone(),
            actor: caller.actor.clone(),
            method: caller.method.clone(),
            request_id: caller.request_id.borrow().clone(),
            ..record
        })
        .unwrap_or(by_itself)
}

/// What is wrong with a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A record is not what it was.
    Altered {
        /// Its file and line.
        place: String,
        /// Why.
        why: String,
    },
    /// Records are missing.
    Missing {
        /// The first.
        from: u64,
        /// The last.
        to: u64,
    },
    /// A record does not follow from the one before it.
    Broken {
        /// Its number.
        seq: u64,
    },
    /// The newest record is another than the store knows.
    Head {
        /// Its number.
        seq: u64,
    },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Altered { place, why } => write!(f, "{place} was altered: {why}"),
            Self::Missing { from, to } if from == to => write!(f, "record {from} is missing"),
            Self::Missing { from, to } => write!(f, "records {from} to {to} are missing"),
            Self::Broken { seq } => write!(f, "record {seq} does not follow from the one before it"),
            Self::Head { seq } => write!(f, "record {seq} is not the one that was committed"),
        }
    }
}

/// What a look at a whole log found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Records that were read.
    pub records: u64,
    /// The oldest and the newest; 0 if there is none.
    pub first: u64,
    /// See `first`.
    pub last: u64,
    /// Hash of the newest.
    pub hash: String,
    /// What is wrong, at most [`MAX_FAULTS`]; nothing if all is well.
    pub faults: Vec<Fault>,
}

/// Faults that are told.
pub const MAX_FAULTS: usize = 100;

/// The log of one coordinator.
#[derive(Debug)]
pub struct AuditLog {
    dir: PathBuf,
    file: File,
    bytes: u64,
    head: Head,
    file_bytes: u64,
    max_files: usize,
}

impl AuditLog {
    /// Opens the log in `dir`, or begins one. A line that a crash left half-written is cut off: what it was to record has
    /// not happened.
    ///
    /// # Errors
    /// The folder or a file cannot be read or written.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::open_with(dir, FILE_BYTES, MAX_FILES)
    }

    fn open_with(dir: &Path, file_bytes: u64, max_files: usize) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let files = files(dir)?;
        let floor = files.first().map_or(1, |(first, _)| *first);
        let mut head = Head { floor, ..Head::default() };
        // A file may have been begun and nothing written: the newest record is in the one before it.
        for (_, path) in files.iter().rev() {
            let (last, whole) = last_line(path)?;
            let length = fs::metadata(path)?.len();
            if whole < length {
                OpenOptions::new().write(true).open(path)?.set_len(whole)?;
            }
            if let Some(line) = last {
                // An altered one is told by `verify`; the chain goes on from what stands there.
                let json = line.split_once(' ').map_or("", |(_, json)| json);
                let seq = serde_json::from_str::<Record>(json).map(|r| r.seq).unwrap_or_default();
                (head.seq, head.hash) = (seq, hex(&sha256(json.as_bytes())));
                break;
            }
        }
        let path = files.last().map_or_else(|| name(dir, head.seq + 1), |(_, path)| path.clone());
        let file = begin(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { dir: dir.to_owned(), file, bytes, head, file_bytes, max_files })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest record.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Goes on after the newest record that the store knows, unless it is in here: then what follows it here was never
    /// committed, or the store is an older one that was put back.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn follow(&mut self, head: &Head) -> io::Result<()> {
        let held = read(&self.dir, head.seq, 1, |_| true)?;
        if head.seq > 0 && held.first().is_none_or(|record| record.line().1 != head.hash) {
            (self.head.seq, self.head.hash) = (head.seq, head.hash.clone());
        }
        Ok(())
    }

    /// Adds a record; durable when this returns. Number and hash before it are given here.
    ///
    /// # Errors
    /// It cannot be written: what it records must not happen.
    pub fn append(&mut self, mut record: Record) -> io::Result<Head> {
        if self.bytes >= self.file_bytes {
            self.rotate()?;
        }
        record.seq = self.head.seq + 1;
        record.prev.clone_from(&self.head.hash);
        let (line, hash) = record.line();
        if let Err(error) = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data()) {
            // Half a line must not be in the way of the next one.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += line.len() as u64;
        (self.head.seq, self.head.hash) = (record.seq, hash);
        Ok(self.head.clone())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file = begin(&name(&self.dir, self.head.seq + 1))?;
        self.bytes = 0;
        File::open(&self.dir)?.sync_all()?;
        let files = files(&self.dir)?;
        for (_, path) in &files[..files.len().saturating_sub(self.max_files)] {
            fs::remove_file(path)?;
        }
        self.head.floor = files[files.len().saturating_sub(self.max_files)].0;
        Ok(())
    }
}

/// Records from number `from` on that `fits`, at most `limit`, oldest first. What cannot be read is passed over:
/// [`verify`] tells of it.
///
/// # Errors
/// A file cannot be read.
pub fn read(dir: &Path, from: u64, limit: usize, fits: impl Fn(&Record) -> bool) -> io::Result<Vec<Record>> {
    let files = files(dir)?;
    let mut found = Vec::new();
    for (i, (_, path)) in files.iter().enumerate() {
        if files.get(i + 1).is_some_and(|(next, _)| *next <= from) {
            continue;
        }
        for line in lines(path)? {
            let Ok((record, _)) = Record::parse(&line?) else { continue };
            if record.seq >= from && fits(&record) {
                found.push(record);
                if found.len() == limit {
                    return Ok(found);
                }
            }
        }
    }
    Ok(found)
}

/// Reads whole logs (several coordinators that share a store have one each) and says whether they are one chain, and,
/// with `head`, whether it is the one that the store knows.
///
/// # Errors
/// A file cannot be read.
pub fn verify(dirs: &[PathBuf], head: Option<&Head>) -> io::Result<Verdict> {
    let mut verdict = Verdict::default();
    let mut chain: Vec<(u64, String, String)> = Vec::new();
    let fault = |verdict: &mut Verdict, fault| {
        if verdict.faults.len() < MAX_FAULTS {
            verdict.faults.push(fault);
        }
    };
    for dir in dirs {
        for (_, path) in files(dir)? {
            for (i, line) in lines(&path)?.enumerate() {
                match Record::parse(&line?) {
                    Ok((record, hash)) => chain.push((record.seq, record.prev, hash)),
                    Err(why) => {
                        let place = format!("{}, line {}", path.display(), i + 1);
                        fault(&mut verdict, Fault::Altered { place, why });
                    }
                }
            }
        }
    }
    if dirs.len() > 1 {
        merge(&mut chain, head);
    }
    let floor = head.map_or(0, |h| h.floor);
    let mut expected = chain.first().map_or(1, |(seq, ..)| *seq);
    if floor > 0 && floor < expected {
        fault(&mut verdict, Fault::Missing { from: floor, to: expected - 1 });
    }
    let mut before: Option<String> = (expected == 1).then(|| NONE.to_owned());
    for (seq, prev, hash) in &chain {
        if *seq > expected {
            fault(&mut verdict, Fault::Missing { from: expected, to: seq - 1 });
            before = None;
        }
        if *seq < expected || before.as_ref().is_some_and(|before| before != prev) {
            fault(&mut verdict, Fault::Broken { seq: *seq });
        }
        if head.is_some_and(|head| head.seq == *seq && head.hash != *hash) {
            fault(&mut verdict, Fault::Head { seq: *seq });
        }
        before = Some(hash.clone());
        expected = seq + 1;
    }
    if let Some(head) = head.filter(|head| head.seq >= expected) {
        fault(&mut verdict, Fault::Missing { from: expected, to: head.seq });
    }
    verdict.records = chain.len() as u64;
    verdict.first = chain.first().map_or(0, |(seq, ..)| *seq);
    (verdict.last, verdict.hash) = chain.last().map_or((0, NONE.to_owned()), |(seq, _, hash)| (*seq, hash.clone()));
    Ok(verdict)
}

/// Makes one chain of several: of records with the same number the one that the next builds on. The others were written
/// by a coordinator that led no more when it wanted to commit.
fn merge(chain: &mut Vec<(u64, String, String)>, head: Option<&Head>) {
    chain.sort_by_key(|(seq, ..)| std::cmp::Reverse(*seq));
    let mut merged: Vec<(u64, String, String)> = Vec::with_capacity(chain.len());
    let mut wanted = head.map(|head| (head.seq, head.hash.clone()));
    for same in chain.chunk_by(|a, b| a.0 == b.0) {
        let built_on = same.iter().find(|(seq, _, hash)| wanted.as_ref() == Some(&(*seq, hash.clone())));
        let one = built_on.unwrap_or(&same[0]);
        // What is above the head was never committed.
        if head.is_none_or(|head| one.0 <= head.seq) {
            wanted = Some((one.0.saturating_sub(1), one.1.clone()));
            merged.push(one.clone());
        }
    }
    merged.reverse();
    *chain = merged;
}

/// What is shared with the tasks that write.
pub type Shared = Arc<std::sync::Mutex<AuditLog>>;

fn name(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("audit-{first:012}.log"))
}

fn begin(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// The files of a log with the numbers of their first records, rising.
fn files(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let first =
            path.file_name().and_then(|n| n.to_str()?.strip_prefix("audit-")?.strip_suffix(".log")?.parse().ok());
        if let Some(first) = first {
            found.push((first, path));
        }
    }
    found.sort();
    Ok(found)
}

fn lines(path: &Path) -> io::Result<impl Iterator<Item = io::Result<String>>> {
    let mut reader = BufReader::new(File::open(path)?);
    Ok(std::iter::from_fn(move || {
        let mut line = Vec::new();
        match io::Read::take(&mut reader, MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(Ok(String::from_utf8_lossy(&line).into_owned())),
            Err(error) => Some(Err(error)),
        }
    }))
}

/// The last whole line, and where it ends.
fn last_line(path: &Path) -> io::Result<(Option<String>, u64)> {
    let (mut last, mut end, mut at) = (None, 0, 0);
    for line in lines(path)? {
        let line = line?;
        at += line.len() as u64;
        if line.ends_with('\n') {
            (last, end) = (Some(line.trim_end_matches('\n').to_owned()), at);
        }
    }
    Ok((last, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u64) -> Record {
        Record { time_ns: n, actor: "admin/anna".into(), outcome: "done".into(), ..Record::default() }
    }

    fn filled(dir: &Path, n: u64) -> Head {
        let mut log = AuditLog::open(dir).unwrap();
        (0..n).map(|i| log.append(record(i)).unwrap()).last().unwrap()
    }

    fn faults(dir: &Path, head: &Head) -> Vec<Fault> {
        verify(&[dir.to_owned()], Some(head)).unwrap().faults
    }

    fn only_file(dir: &Path) -> PathBuf {
        files(dir).unwrap().pop().unwrap().1
    }

    #[test]
    fn a_chain_goes_on_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 3);
        let head = filled(dir.path(), 2);
        assert_eq!(head.seq, 5);
        let verdict = verify(&[dir.path().to_owned()], Some(&head)).unwrap();
        assert_eq!((verdict.records, verdict.first, verdict.last, &verdict.hash), (5, 1, 5, &head.hash));
        assert!(verdict.faults.is_empty());
        let listed = read(dir.path(), 2, 2, |_| true).unwrap();
        assert_eq!(listed.iter().map(|r| r.seq).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn half_a_line_of_a_crash_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 2);
        let path = only_file(dir.path());
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"0123 {\"seq\":3").unwrap();
        let head = filled(dir.path(), 1);
        assert_eq!((head.seq, faults(dir.path(), &head)), (3, vec![]));
    }

    #[test]
    fn what_was_altered_left_out_or_cut_is_found() {
        let altered = |change: &dyn Fn(Vec<String>) -> Vec<String>| {
            let dir = tempfile::tempdir().unwrap();
            let head = filled(dir.path(), 6);
            let path = only_file(dir.path());
            let lines = fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
            fs::write(&path, change(lines).iter().map(|l| format!("{l}\n")).collect::<String>()).unwrap();
            faults(dir.path(), &head)
        };
        let without = |i: usize| {
            move |mut lines: Vec<String>| {
                lines.remove(i);
                lines
            }
        };
        assert_eq!(altered(&without(2)), [Fault::Missing { from: 3, to: 3 }]);
        assert_eq!(altered(&without(5)), [Fault::Missing { from: 6, to: 6 }], "cut off the end");
        assert_eq!(altered(&without(0)), [Fault::Missing { from: 1, to: 1 }], "cut off the beginning");
        let found = altered(&|mut lines| {
            lines[3] = lines[3].replace("admin/anna", "admin/eve");
            lines
        });
        assert!(matches!(found[0], Fault::Altered { .. }), "{found:?}");
        // Altered with a hash that fits: the next one tells, and of the last the store.
        let forge = |i: usize| {
            move |mut lines: Vec<String>| {
                let (mut forged, _) = Record::parse(&lines[i]).unwrap();
                forged.actor = "admin/eve".into();
                lines[i] = forged.line().0.trim_end().to_owned();
                lines
            }
        };
        assert_eq!(altered(&forge(3)), [Fault::Broken { seq: 5 }]);
        assert_eq!(altered(&forge(5)), [Fault::Head { seq: 6 }]);
        assert_eq!(
            altered(&|mut lines| {
                lines.insert(2, lines[1].clone());
                lines
            })[0],
            Fault::Broken { seq: 2 }
        );
        assert!(altered(&|lines| lines).is_empty());
    }

    #[test]
    fn files_are_bounded_and_the_floor_says_where_they_begin() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = AuditLog::open_with(dir.path(), 1000, 3).unwrap();
        let head = (0..60).map(|i| log.append(record(i)).unwrap()).last().unwrap();
        let kept = files(dir.path()).unwrap();
        assert_eq!((kept.len(), kept[0].0), (3, head.floor));
        assert!(head.floor > 1 && faults(dir.path(), &head).is_empty());
        fs::remove_file(&kept[0].1).unwrap();
        assert!(matches!(faults(dir.path(), &head)[..], [Fault::Missing { .. }]));
        let mut log = AuditLog::open_with(dir.path(), 1000, 3).unwrap();
        assert_eq!(log.append(record(0)).unwrap().seq, head.seq + 1);
    }

    #[test]
    fn logs_of_coordinators_that_took_turns_are_one_chain() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut head = filled(one.path(), 3);
        for (dir, n) in [(&two, 2), (&one, 1)] {
            let mut log = AuditLog::open(dir.path()).unwrap();
            log.follow(&head).unwrap();
            for i in 0..n {
                head = log.append(record(i)).unwrap();
            }
        }
        // One that the other had got ahead of.
        AuditLog::open(two.path()).unwrap().append(record(9)).unwrap();
        head.floor = 1;
        let both = [one.path().to_owned(), two.path().to_owned()];
        assert_eq!(verify(&both, Some(&head)).unwrap().faults, []);
        assert_eq!(faults(one.path(), &head), [Fault::Missing { from: 4, to: 5 }]);
    }

    #[test]
    fn many_objects_are_named_in_part() {
        let record = of_caller(1, (0..100).map(|i| format!("put disks/{i}")).collect(), "done");
        assert_eq!((record.objects.len(), record.actor.as_str()), (MAX_OBJECTS_NAMED + 1, "coordinator"));
        assert_eq!(record.objects.last().unwrap(), "and 68 more");
    }
}
