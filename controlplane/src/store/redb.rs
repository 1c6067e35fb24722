//! The embedded store: one file, one process.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::broadcast;

use super::{Change, Entry, Listing, Pending, Seen, Store, StoreError, WATCH_BACKLOG, Watch, check_bounds};

/// Value and the revision of its last change.
const VALUES: TableDefinition<&str, (u64, &[u8])> = TableDefinition::new("values");
/// Numbers of the store itself.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Schema of the tables and of the values in them.
///
/// 1: first. 2: requests that have been done (`requests/`). 3: an object may lie in several values (`parts/`). 4: the head of
/// the audit log (`audit`), and that a store was restored (`restored`). The rest as before.
pub(crate) const SCHEMA: u64 = 4;
/// The oldest that is read.
pub(crate) const OLDEST_SCHEMA: u64 = 1;
const SCHEMA_KEY: &str = "schema";
const REVISION_KEY: &str = "revision";

/// Keys in a redb file.
#[derive(Clone)]
pub struct RedbStore {
    database: Arc<Database>,
    seen: broadcast::Sender<Seen>,
    /// Revision of the newest commit, known before it is told.
    newest: Arc<AtomicU64>,
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(error.to_string())
}

impl RedbStore {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// In use by another process, written by another version, or the file cannot be read or written.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.display().to_string()),
            other => StoreError::Failed(format!("{}: {other}", path.display())),
        })?;
        let write = database.begin_write().map_err(failed)?;
        let newest;
        {
            write.open_table(VALUES).map_err(failed)?;
            let mut meta = write.open_table(META).map_err(failed)?;
            let found = meta.get(SCHEMA_KEY).map_err(failed)?.map(|v| v.value());
            match found {
                Some(SCHEMA) => {}
                // All that is in it reads as it is; from here on a program that knows only the older one refuses it.
                Some(OLDEST_SCHEMA..SCHEMA) => drop(meta.insert(SCHEMA_KEY, SCHEMA).map_err(failed)?),
                Some(found) => return Err(StoreError::Schema { found, known: SCHEMA }),
                None => {
                    meta.insert(SCHEMA_KEY, SCHEMA).map_err(failed)?;
                    meta.insert(REVISION_KEY, 0).map_err(failed)?;
                }
            }
            newest = meta.get(REVISION_KEY).map_err(failed)?.map_or(0, |v| v.value());
        }
        write.commit().map_err(failed)?;
        let newest = Arc::new(AtomicU64::new(newest));
        Ok(Self { database: Arc::new(database), seen: broadcast::channel(WATCH_BACKLOG).0, newest })
    }

    fn get_now(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let read = self.database.begin_read().map_err(failed)?;
        let values = read.open_table(VALUES).map_err(failed)?;
        let found = values.get(key).map_err(failed)?;
        Ok(found.map(|v| {
            let (revision, value) = v.value();
            Entry { key: key.to_owned(), revision, value: value.to_vec() }
        }))
    }

    fn list_now(&self, prefix: &str) -> Result<Listing, StoreError> {
        let read = self.database.begin_read().map_err(failed)?;
        let values = read.open_table(VALUES).map_err(failed)?;
        let meta = read.open_table(META).map_err(failed)?;
        let revision = meta.get(REVISION_KEY).map_err(failed)?.map_or(0, |v| v.value());
        let mut entries = Vec::new();
        for item in values.range(prefix..).map_err(failed)? {
            let (key, value) = item.map_err(failed)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            let (revision, value) = value.value();
            entries.push(Entry { key: key.value().to_owned(), revision, value: value.to_vec() });
        }
        Ok(Listing { entries, revision })
    }

    fn commit_now(&self, changes: Vec<Change>) -> Result<u64, StoreError> {
        let write = self.database.begin_write().map_err(failed)?;
        let revision;
        {
            let mut values = write.open_table(VALUES).map_err(failed)?;
            let mut meta = write.open_table(META).map_err(failed)?;
            revision = meta.get(REVISION_KEY).map_err(failed)?.map_or(0, |v| v.value()) + 1;
            for change in &changes {
                let found = values.get(change.key.as_str()).map_err(failed)?.map(|v| v.value().0);
                change.check(found)?;
            }
            for change in &changes {
                match &change.value {
                    Some(value) => {
                        values.insert(change.key.as_str(), (revision, value.as_slice())).map_err(failed)?;
                    }
                    None => {
                        values.remove(change.key.as_str()).map_err(failed)?;
                    }
                }
            }
            meta.insert(REVISION_KEY, revision).map_err(failed)?;
        }
        write.commit().map_err(failed)?;
        self.newest.fetch_max(revision, Ordering::SeqCst);
        for change in changes {
            // Nobody watching is no error.
            let _ = self.seen.send(Seen { key: change.key, revision, value: change.value });
        }
        Ok(revision)
    }
}

/// Runs what blocks on a disk where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

impl Store for RedbStore {
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(blocking(move || store.get_now(&key)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Listing> {
        let (store, prefix) = (self.clone(), prefix.to_owned());
        Box::pin(blocking(move || store.list_now(&prefix)))
    }

    fn commit(&self, changes: Vec<Change>) -> Pending<'static, u64> {
        let store = self.clone();
        Box::pin(async move {
            check_bounds(&changes)?;
            blocking(move || store.commit_now(changes)).await
        })
    }

    fn watch(&self, prefix: &str, after: u64) -> Watch {
        let receiver = self.seen.subscribe();
        Watch::local(prefix, after, self.newest.load(Ordering::SeqCst), receiver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Expect, MAX_VALUE, Watched};

    fn put(key: &str, expect: Expect, value: &str) -> Change {
        Change { key: key.to_owned(), expect, value: Some(value.as_bytes().to_vec()) }
    }

    fn store() -> (tempfile::TempDir, RedbStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&folder.path().join("s.redb")).unwrap();
        (folder, store)
    }

    #[tokio::test]
    async fn a_change_happens_only_at_the_expected_revision() {
        let (_folder, store) = store();
        let first = store.commit(vec![put("a", Expect::Absent, "1")]).await.unwrap();
        assert!(matches!(
            store.commit(vec![put("a", Expect::Absent, "2")]).await,
            Err(StoreError::Conflict { found: Some(r), .. }) if r == first
        ));
        let second = store.commit(vec![put("a", Expect::Revision(first), "2")]).await.unwrap();
        assert!(second > first);
        assert!(store.commit(vec![put("a", Expect::Revision(first), "3")]).await.is_err());
        assert_eq!(store.get("a").await.unwrap().unwrap().value, b"2");
    }

    #[tokio::test]
    async fn several_keys_change_at_once_or_not_at_all() {
        let (_folder, store) = store();
        store.commit(vec![put("b", Expect::Absent, "1")]).await.unwrap();
        let both = vec![put("a", Expect::Absent, "1"), put("b", Expect::Absent, "2")];
        assert!(store.commit(both).await.is_err());
        assert_eq!(store.get("a").await.unwrap(), None);
    }

    #[tokio::test]
    async fn only_one_of_two_racing_changes_wins() {
        let (_folder, store) = store();
        let (a, b) = tokio::join!(
            store.commit(vec![put("k", Expect::Absent, "a")]),
            store.commit(vec![put("k", Expect::Absent, "b")])
        );
        assert_ne!(a.is_ok(), b.is_ok());
    }

    #[tokio::test]
    async fn a_list_is_the_prefix_and_no_more() {
        let (_folder, store) = store();
        let keys = ["a/1", "a/2", "b/1", "a"].map(|k| put(k, Expect::Any, "x"));
        let revision = store.commit(keys.to_vec()).await.unwrap();
        let listing = store.list("a/").await.unwrap();
        assert_eq!(listing.entries.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(), ["a/1", "a/2"]);
        assert_eq!(listing.revision, revision);
    }

    #[tokio::test]
    async fn a_watch_sees_changes_in_order_and_says_when_it_is_behind() {
        let (_folder, store) = store();
        let mut watch = store.watch("a/", 0);
        store.commit(vec![put("b/1", Expect::Any, "x"), put("a/1", Expect::Any, "x")]).await.unwrap();
        store.commit(vec![Change { key: "a/1".into(), expect: Expect::Any, value: None }]).await.unwrap();
        assert!(matches!(watch.next().await, Watched::Change(Seen { value: Some(_), .. })));
        assert!(matches!(watch.next().await, Watched::Change(Seen { value: None, .. })));
        let many: Vec<Change> = (0..WATCH_BACKLOG + 1).map(|i| put(&format!("a/{i}"), Expect::Any, "x")).collect();
        store.commit(many).await.unwrap();
        assert_eq!(watch.next().await, Watched::Compacted);
    }

    #[tokio::test]
    async fn a_watch_misses_nothing_between_the_list_and_its_beginning() {
        let (_folder, store) = store();
        let listed = store.commit(vec![put("a", Expect::Any, "1")]).await.unwrap();
        store.commit(vec![put("a", Expect::Any, "2")]).await.unwrap();
        assert_eq!(store.watch("", listed).next().await, Watched::Compacted, "told to list again");
        let mut watch = store.watch("", listed + 1);
        let third = store.commit(vec![put("a", Expect::Any, "3")]).await.unwrap();
        assert!(matches!(watch.next().await, Watched::Change(Seen { revision, .. }) if revision == third));
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_before_anything_is_done() {
        let (_folder, store) = store();
        let large = "x".repeat(MAX_VALUE + 1);
        let changes = vec![put("a", Expect::Any, "x"), put("b", Expect::Any, &large)];
        assert!(matches!(store.commit(changes).await, Err(StoreError::TooLarge { .. })));
        assert_eq!(store.get("a").await.unwrap(), None);
    }

    #[tokio::test]
    async fn values_and_revisions_outlive_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.redb");
        let store = RedbStore::open(&path).unwrap();
        let revision = store.commit(vec![put("a", Expect::Any, "1")]).await.unwrap();
        assert!(matches!(RedbStore::open(&path), Err(StoreError::InUse(_))));
        drop(store);
        let store = RedbStore::open(&path).unwrap();
        assert_eq!(store.get("a").await.unwrap().unwrap().revision, revision);
        assert!(store.commit(vec![put("b", Expect::Any, "1")]).await.unwrap() > revision);
    }

    /// As the first schema's program wrote them, byte for byte.
    const FIRST: [(&str, &str); 3] = [
        ("term", "7"),
        (
            "policies/default/gold",
            r#"{"uid":"u","tenant":"default","id":"gold","version":3,"created_ns":1,"updated_ns":2,"description":"d","promises":{"rpo_target_us":500000,"cut_interval_ms":1000,"retention_s":60,"journal_budget_bytes":0,"compression":"auto","warn_after_ms":5000}}"#,
        ),
        (
            "operations/default/o",
            r#"{"uid":"o","tenant":"default","version":9,"group":"shop","request_id":"r","actor":"admin/local","created_ns":1,"ended_ns":2,"work":{"spec":{"to":"latest","unconfirmed":false,"reason":""},"state":"done","steps":[],"facts":{"rpo_at_start_us":1,"disks":[],"last_seq":null,"fence":"confirmed","at_least":2,"generation":2,"point":null,"exports":[]},"error":null}}"#,
        ),
    ];

    #[tokio::test]
    async fn the_first_schema_is_read_and_moved_forward() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.redb");
        let store = RedbStore::open(&path).unwrap();
        store.commit(FIRST.iter().map(|(k, v)| put(k, Expect::Any, v)).collect()).await.unwrap();
        drop(store);
        let database = Database::create(&path).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(META).unwrap().insert(SCHEMA_KEY, OLDEST_SCHEMA).unwrap();
        write.commit().unwrap();
        drop(database);
        let store = RedbStore::open(&path).unwrap();
        let model = crate::model::Model::load(store.list("").await.unwrap()).unwrap();
        assert_eq!((model.term, model.policies.len(), model.operations.len()), (7, 1, 1));
        assert_eq!(model.policies.values().next().unwrap().promises.lease_ms, 0);
        assert!(model.operations.values().next().unwrap().work.cancelled_by.is_empty());
        drop(store);
        let database = Database::create(&path).unwrap();
        let read = database.begin_read().unwrap();
        let found = read.open_table(META).unwrap().get(SCHEMA_KEY).unwrap().unwrap().value();
        assert_eq!(found, SCHEMA, "a program that knows only the first refuses it from now on");
    }

    #[test]
    fn another_schema_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.redb");
        drop(RedbStore::open(&path).unwrap());
        let database = Database::create(&path).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(META).unwrap().insert(SCHEMA_KEY, 99).unwrap();
        write.commit().unwrap();
        drop(database);
        assert!(matches!(RedbStore::open(&path), Err(StoreError::Schema { found: 99, .. })));
    }
}
