//! The coordinator's state in a file: lines of JSON, a header first, a digest of all before it last.
//!
//! ```text
//!  {"afterimage_backup":1,"schema":4,"revision":812,"time_ns":…,"shared":"…","objects":41}
//!  {"k":"policies/default/gold","r":17,"v":"{…}"}        as stored, rising by key
//!  {"sha256":"…"}
//! ```
//! Keys of policies are in it as in the store, wrapped by `keys.bin`, which is not in it; so is the key of an authority that has
//! replaced the first one, which is in `ca.pem`. Both files do not change, and belong into a safe of their own; `shared` is
//! their fingerprint.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::ca::{hex, sha256};
use crate::objects::Object;
use crate::restore;
use crate::store::redb::{OLDEST_SCHEMA, RedbStore, SCHEMA};
use crate::store::{Change, Entry, Expect, Listing, Store, StoreError};

/// Version of the file.
const VERSION: u64 = 1;
/// Objects in one transaction of a restore.
const AT_ONCE: usize = 256;
/// Files that a backup needs beside it.
pub const SHARED_FILES: [&str; 2] = ["ca.pem", "keys.bin"];

#[derive(Serialize, Deserialize)]
struct Header {
    afterimage_backup: u64,
    schema: u64,
    revision: u64,
    time_ns: u64,
    shared: String,
    objects: usize,
}

#[derive(Serialize, Deserialize)]
struct Line {
    k: String,
    r: u64,
    v: String,
}

#[derive(Serialize, Deserialize)]
struct End {
    sha256: String,
}

/// A backup that has been read, whole.
#[derive(Debug)]
pub struct Backup {
    /// The objects, as they were stored.
    pub listing: Listing,
    /// When it was made, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Fingerprint of the files that it needs beside it.
    pub shared: String,
}

/// Why a backup is not restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file is cut short, changed, or none.
    #[error("this is no whole backup: {0}")]
    Damaged(String),
    /// Of a version that this program does not know.
    #[error("this backup is of version {found} of the {what}; this program reads {known}: use a newer one")]
    Version {
        /// "file" or "schema".
        what: &'static str,
        /// What was found.
        found: u64,
        /// What is known.
        known: u64,
    },
    /// The files that belong to it are not there, or are others.
    #[error("{0}")]
    Files(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Fingerprint of the files that all coordinators of one state share; tells nothing of them. None if one is missing.
pub fn fingerprint(dir: &Path) -> Option<String> {
    let mut all = b"afterimage shared files 1".to_vec();
    for file in SHARED_FILES {
        all.extend_from_slice(&sha256(&std::fs::read(dir.join(file)).ok()?));
    }
    Some(hex(&sha256(&all)))
}

/// The file.
///
/// # Errors
/// A value is no text, which none of ours is.
pub fn write(listing: &Listing, shared: &str, time_ns: u64) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let header = Header {
        afterimage_backup: VERSION,
        schema: SCHEMA,
        revision: listing.revision,
        time_ns,
        shared: shared.to_owned(),
        objects: listing.entries.len(),
    };
    line(&header, &mut out);
    for entry in &listing.entries {
        let v = String::from_utf8(entry.value.clone()).map_err(|_| format!("{} holds no text", entry.key))?;
        line(&Line { k: entry.key.clone(), r: entry.revision, v }, &mut out);
    }
    let end = End { sha256: hex(&sha256(&out)) };
    line(&end, &mut out);
    Ok(out)
}

fn line(value: &impl Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, value).expect("plain data");
    out.push(b'\n');
}

/// Reads a file, and checks that it is whole.
///
/// # Errors
/// [`BackupError`].
pub fn read(file: &[u8]) -> Result<Backup, BackupError> {
    let damaged = |what: String| BackupError::Damaged(what);
    let body = file.strip_suffix(b"\n").ok_or_else(|| damaged("its end is missing".into()))?;
    let cut = body.iter().rposition(|b| *b == b'\n').ok_or_else(|| damaged("it has one line".into()))? + 1;
    let head = body[..cut].split(|b| *b == b'\n').next().unwrap_or_default();
    let header: Header = serde_json::from_slice(head).map_err(|e| damaged(format!("line 1: {e}")))?;
    let known = |what, found, known| BackupError::Version { what, found, known };
    if header.afterimage_backup != VERSION {
        return Err(known("file", header.afterimage_backup, VERSION));
    }
    if !(OLDEST_SCHEMA..=SCHEMA).contains(&header.schema) {
        return Err(known("schema", header.schema, SCHEMA));
    }
    let end: End = serde_json::from_slice(&body[cut..]).map_err(|_| damaged("its last line is missing".into()))?;
    if end.sha256 != hex(&sha256(&body[..cut])) {
        return Err(damaged("its digest is another: it has been changed".into()));
    }
    let lines = body[head.len() + 1..cut].split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let entry = |line: &[u8]| {
        let line: Line = serde_json::from_slice(line).map_err(|e| damaged(e.to_string()))?;
        Ok(Entry { key: line.k, revision: line.r, value: line.v.into_bytes() })
    };
    let entries = lines.map(entry).collect::<Result<Vec<_>, BackupError>>()?;
    if entries.len() != header.objects {
        return Err(damaged(format!("{} objects of {}", entries.len(), header.objects)));
    }
    let listing = Listing { entries, revision: header.revision };
    Ok(Backup { listing, time_ns: header.time_ns, shared: header.shared })
}

/// What a store begins with after a restore, as changes to an empty one.
///
/// # Errors
/// An object that this program cannot read.
pub fn beginning(backup: Backup, now_ns: u64) -> Result<Vec<Change>, BackupError> {
    let objects = restore::prepare(backup.listing, backup.time_ns, now_ns).map_err(BackupError::Damaged)?;
    let mut txn = crate::model::Txn::default();
    objects.into_iter().for_each(|object: Object| txn.put(object));
    let changes = crate::model::Model::default().changes(&txn);
    debug_assert!(changes.iter().all(|c| c.expect == Expect::Absent));
    Ok(changes)
}

/// Restores into the embedded store of a data folder that has none. What is there at the end is all of it or nothing.
///
/// # Errors
/// There is a state already; `ca.pem` and `keys.bin` are not those of the backup; the file system's.
pub async fn restore_into(dir: &Path, backup: Backup, now_ns: u64) -> Result<usize, BackupError> {
    check_files(dir, &backup.shared)?;
    let (file, half) = (dir.join("state.redb"), dir.join("state.redb.restoring"));
    if file.exists() {
        let what = format!("{} exists: set it aside first, it may be newer than the backup", file.display());
        return Err(BackupError::Files(what));
    }
    let failed = |e: std::io::Error| BackupError::Files(format!("{}: {e}", half.display()));
    if half.exists() {
        std::fs::remove_file(&half).map_err(failed)?;
    }
    let changes = beginning(backup, now_ns)?;
    let objects = changes.len();
    let store = RedbStore::open(&half)?;
    let mut left = changes.into_iter().peekable();
    while left.peek().is_some() {
        store.commit(left.by_ref().take(AT_ONCE).collect()).await?;
    }
    drop(store);
    std::fs::rename(&half, &file).map_err(failed)?;
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(failed)?;
    Ok(objects)
}

/// The files that a backup needs, as they were.
///
/// # Errors
/// One is missing, or they are others.
pub fn check_files(dir: &Path, shared: &str) -> Result<(), BackupError> {
    let lacks = lacks_shared(dir, shared);
    lacks.map_or(Ok(()), |what| Err(BackupError::Files(format!("{what} of this backup: put those there first"))))
}

/// Says that the shared files in a folder are not those of this fingerprint, if so.
pub fn lacks_shared(dir: &Path, shared: &str) -> Option<String> {
    let state = match fingerprint(dir) {
        Some(own) if own == shared => return None,
        Some(_) => "has others than",
        None => "has not",
    };
    Some(format!("{} {state} the {}", dir.display(), SHARED_FILES.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing() -> Listing {
        let entry = |key: &str, revision, value: &str| Entry { key: key.into(), revision, value: value.into() };
        Listing {
            entries: vec![entry("keys/k", 3, r#"{"id":"k","wrapped":"00ff"}"#), entry("term", 4, "7")],
            revision: 9,
        }
    }

    /// Byte for byte: a backup is kept for years.
    const FIRST: &str = concat!(
        r#"{"afterimage_backup":1,"schema":4,"revision":9,"time_ns":5,"shared":"ab","objects":2}"#,
        "\n",
        r#"{"k":"keys/k","r":3,"v":"{\"id\":\"k\",\"wrapped\":\"00ff\"}"}"#,
        "\n",
        r#"{"k":"term","r":4,"v":"7"}"#,
        "\n",
    );

    #[test]
    fn the_file_is_as_it_is_pinned_and_reads_back() {
        let file = write(&listing(), "ab", 5).unwrap();
        let text = String::from_utf8(file.clone()).unwrap();
        assert!(text.starts_with(FIRST), "{text}");
        assert_eq!(&text[FIRST.len()..], format!("{{\"sha256\":\"{}\"}}\n", hex(&sha256(FIRST.as_bytes()))));
        let back = read(&file).unwrap();
        assert_eq!((back.listing, back.time_ns, back.shared.as_str()), (listing(), 5, "ab"));
    }

    #[test]
    fn no_part_of_a_file_and_no_changed_one_is_taken_for_whole() {
        let file = write(&listing(), "ab", 5).unwrap();
        for end in 0..file.len() {
            assert!(read(&file[..end]).is_err(), "{end} bytes");
        }
        for at in 0..file.len() {
            let mut other = file.clone();
            other[at] ^= 1;
            assert!(read(&other).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_newer_file_or_schema_is_refused_by_name() {
        let text = String::from_utf8(write(&listing(), "ab", 5).unwrap()).unwrap();
        let newer = text.replace("\"afterimage_backup\":1", "\"afterimage_backup\":2");
        assert!(matches!(read(newer.as_bytes()), Err(BackupError::Version { what: "file", found: 2, .. })));
        let newer = text.replace("\"schema\":4", "\"schema\":77");
        let said = read(newer.as_bytes()).unwrap_err().to_string();
        assert!(said.contains("77") && said.contains("newer"), "{said}");
    }

    #[tokio::test]
    async fn a_restored_store_only_observes_and_counts_on() {
        let folder = tempfile::tempdir().unwrap();
        for file in SHARED_FILES {
            std::fs::write(folder.path().join(file), file).unwrap();
        }
        let shared = fingerprint(folder.path()).unwrap();
        let backup = || read(&write(&listing(), &shared, 5).unwrap()).unwrap();
        // As if an earlier try had been killed.
        std::fs::write(folder.path().join("state.redb.restoring"), "half").unwrap();
        assert_eq!(restore_into(folder.path(), backup(), 6).await.unwrap(), 4);
        let store = RedbStore::open(&folder.path().join("state.redb")).unwrap();
        let model = crate::model::Model::load(store.list("").await.unwrap()).unwrap();
        assert!(model.observing() && model.version() > 9 && model.term == 7 && model.keys.len() == 1);
        drop(store);
        let again = restore_into(folder.path(), backup(), 6).await;
        assert!(again.unwrap_err().to_string().contains("exists"));
        std::fs::write(folder.path().join("keys.bin"), "another").unwrap();
        let others = restore_into(folder.path(), backup(), 6).await;
        assert!(others.unwrap_err().to_string().contains("has others"));
    }
}
