//! The store for several coordinators: etcd (v3). One of them holds the office ([`office`]); only it writes.
//!
//! Keys lie under a prefix:
//! ```text
//!  <prefix>/leader      who holds the office; goes with its lease
//!  <prefix>/seq         token of the last commit: what makes a commit happen once
//!  <prefix>/schema      of the values
//!  <prefix>/base        what revisions here are counted from
//!  <prefix>/shared      fingerprint of the files that all coordinators share
//!  <prefix>/importing   there while a move from an embedded store is being done
//!  <prefix>/o/<key>     the objects
//! ```
//! Every commit is one transaction with two conditions besides its own: the office is still this one (the leader's key
//! has the revision at which this coordinator made it), and the last commit is the one that this coordinator knows. So
//! a leader that was stopped and wakes late changes nothing; and when an answer is lost, the same transaction is sent
//! again: either it happens now, or `seq` holds its token and it has happened. There is no third outcome while the
//! office lasts.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};

use super::redb::SCHEMA;
use super::{
    Change, Entry, Expect, Listing, Pending, Seen, Store, StoreError, WATCH_BACKLOG, Watch, Watched, check_bounds,
};
use crate::objects::new_uid;
use office::Office;
use rpc::{Client, Compare, Do, Op, Put, Range, Ranged, Revision, Tls, Txn, TxnDone};

mod import;
pub mod office;
pub mod rpc;
#[cfg(test)]
mod tests;

pub use import::{Imported, import};

/// Keys in one answer.
const PAGE: i64 = 500;
/// Longest transaction, bytes: below what etcd takes without being told otherwise.
const MAX_BYTES: usize = 1_400_000;
/// Between two tries of a commit whose answer was lost.
const RETRY: Duration = Duration::from_millis(100);
/// Between two tries of a watch.
const WATCH_RETRY: Duration = Duration::from_millis(200);
/// Silence of a watch after which another member is asked how far the store is.
const WATCH_SILENCE: Duration = Duration::from_secs(2);

/// Where an etcd is.
#[derive(Clone)]
pub struct Etcd {
    /// `http://host:port` or `https://host:port` of each member.
    pub members: Vec<String>,
    /// What all keys begin with.
    pub prefix: String,
    /// For `https`.
    pub tls: Tls,
}

impl std::fmt::Debug for Etcd {
    // Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Etcd({} under {:?})", self.members.join(","), self.prefix)
    }
}

/// Keys in an etcd, as the holder of an office sees them.
#[derive(Clone)]
pub struct EtcdStore {
    client: Arc<Client>,
    prefix: Arc<str>,
    /// Added to every revision of etcd's.
    base: u64,
    office: Arc<Office>,
    /// Revision of `seq` as this coordinator knows it. Held during a commit: one at a time.
    last: Arc<Mutex<i64>>,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EtcdStore(under {:?})", self.prefix)
    }
}

fn range(key: &str, end: Vec<u8>) -> Range {
    Range { key: key.into(), range_end: end, ..Range::default() }
}

async fn get(client: &Client, key: &str) -> Result<Option<rpc::KeyValue>, StoreError> {
    let got: Ranged = client.repeat("/etcdserverpb.KV/Range", range(key, Vec::new())).await?;
    Ok(got.kvs.into_iter().next())
}

/// A number in a key of the store's own.
async fn number(client: &Client, key: &str) -> Result<Option<u64>, StoreError> {
    let Some(kv) = get(client, key).await? else { return Ok(None) };
    let text = String::from_utf8_lossy(&kv.value);
    text.parse().map(Some).map_err(|_| StoreError::Failed(format!("{key} holds {text:?}, which is no number")))
}

impl EtcdStore {
    /// Opens the store for who holds the office.
    ///
    /// # Errors
    /// etcd does not answer or takes no transaction of the size that is needed; the keys are another version's; a move
    /// into it was begun and not ended.
    pub async fn open(office: Arc<Office>) -> Result<Self, StoreError> {
        let store = Self::raw(office).await?;
        if get(&store.client, &store.own("importing")).await?.is_some() {
            let what = "a move of an embedded store into this etcd was begun and not ended: run it again";
            return Err(StoreError::Failed(what.to_owned()));
        }
        match number(&store.client, &store.own("schema")).await? {
            Some(SCHEMA) => {}
            // As in the embedded store: what is in it reads as it is, and an older program refuses it from now on.
            None => store.put_own("schema", &SCHEMA.to_string()).await?,
            Some(found) if found < SCHEMA => store.put_own("schema", &SCHEMA.to_string()).await?,
            Some(found) => return Err(StoreError::Schema { found, known: SCHEMA }),
        }
        Ok(store)
    }

    /// As [`Self::open`], whatever is in it.
    async fn raw(office: Arc<Office>) -> Result<Self, StoreError> {
        let (client, prefix) = (office.client().clone(), office.prefix().clone());
        check_room(&client, &prefix).await?;
        let base = number(&client, &format!("{prefix}/base")).await?.unwrap_or(0);
        let seq = get(&client, &format!("{prefix}/seq")).await?.map_or(0, |kv| kv.mod_revision);
        Ok(Self { client, prefix, base, office, last: Arc::new(Mutex::new(seq)) })
    }

    /// Keeps the fingerprint of what all coordinators share besides etcd.
    ///
    /// # Errors
    /// The office is lost, or etcd does not take it.
    pub async fn keep_shared(&self, fingerprint: &str) -> Result<(), StoreError> {
        match get(&self.client, &self.own("shared")).await? {
            Some(kv) if kv.value == fingerprint.as_bytes() => Ok(()),
            _ => self.put_own("shared", fingerprint).await,
        }
    }

    fn own(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    fn object(&self, key: &str) -> String {
        format!("{}/o/{key}", self.prefix)
    }

    fn shown(&self, revision: i64) -> u64 {
        self.base + revision.max(0) as u64
    }

    fn hidden(&self, revision: u64) -> i64 {
        revision.saturating_sub(self.base) as i64
    }

    async fn put_own(&self, name: &str, value: &str) -> Result<(), StoreError> {
        let put = Op::Put(Put { key: self.own(name).into(), value: value.into(), lease: 0 });
        self.transact(Vec::new(), vec![put.into()], &[]).await.map(drop)
    }

    async fn get_now(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let found = get(&self.client, &self.object(key)).await?;
        Ok(found.map(|kv| Entry { key: key.to_owned(), revision: self.shown(kv.mod_revision), value: kv.value }))
    }

    async fn list_now(&self, prefix: &str) -> Result<Listing, StoreError> {
        let first = self.object(prefix);
        let end = rpc::after(&first);
        let (mut from, mut revision, mut entries) = (first.into_bytes(), 0, Vec::new());
        loop {
            // All pages as of the revision of the first.
            let ask = Range { key: from, range_end: end.clone(), limit: PAGE, revision, ..Range::default() };
            let page: Ranged = self.client.repeat("/etcdserverpb.KV/Range", ask).await?;
            if revision == 0 {
                revision = page.header.as_ref().map_or(0, |h| h.revision);
            }
            let Some(last) = page.kvs.last() else { break };
            from = last.key.clone();
            from.push(0);
            for kv in page.kvs {
                entries.push(Entry {
                    key: self.shown_key(&kv.key)?,
                    revision: self.shown(kv.mod_revision),
                    value: kv.value,
                });
            }
            if !page.more {
                break;
            }
        }
        Ok(Listing { entries, revision: self.shown(revision) })
    }

    fn shown_key(&self, key: &[u8]) -> Result<String, StoreError> {
        let text = std::str::from_utf8(key).ok().and_then(|k| k.strip_prefix(&self.object("")));
        let foreign = || StoreError::Failed(format!("{} is no key of ours", String::from_utf8_lossy(key)));
        text.map(str::to_owned).ok_or_else(foreign)
    }

    async fn commit_now(&self, changes: Vec<Change>) -> Result<u64, StoreError> {
        let mut compare = Vec::new();
        let mut success = Vec::new();
        let mut bytes = 0;
        for change in &changes {
            let key = self.object(&change.key);
            bytes += key.len() * 3 + change.value.as_ref().map_or(0, Vec::len);
            match change.expect {
                Expect::Any => {}
                Expect::Absent => compare.push(Compare::equal(&key, Revision::Create(0))),
                Expect::Revision(r) => compare.push(Compare::equal(&key, Revision::Mod(self.hidden(r)))),
            }
            success.push(Do::from(match &change.value {
                Some(value) => Op::Put(Put { key: key.into(), value: value.clone(), lease: 0 }),
                None => Op::Delete(rpc::Delete { key: key.into() }),
            }));
        }
        if bytes > MAX_BYTES {
            let (what, key) = ("bytes of all changes", "a transaction".to_owned());
            return Err(StoreError::TooLarge { what, key, size: bytes, limit: MAX_BYTES });
        }
        self.transact(compare, success, &changes).await
    }

    /// One transaction, under the office, once. `changes` are what a conflict is looked for in.
    async fn transact(
        &self,
        mut compare: Vec<Compare>,
        mut success: Vec<Do>,
        changes: &[Change],
    ) -> Result<u64, StoreError> {
        let mut last = self.last.lock().await;
        let (leader, seq) = (self.office.key().to_owned(), self.own("seq"));
        // Whose it is, too: the history of this key shows that no two leaders' commits are mixed.
        let token = format!("{} {}", self.office.revision(), new_uid());
        compare.push(Compare::equal(&leader, Revision::Create(self.office.revision())));
        compare.push(Compare::equal(&seq, Revision::Mod(*last)));
        success.push(Op::Put(Put { key: seq.clone().into(), value: token.clone().into(), lease: 0 }).into());
        let mut failure: Vec<Do> =
            vec![Op::Range(range(&leader, Vec::new())).into(), Op::Range(range(&seq, Vec::new())).into()];
        let look = |c: &Change| Op::Range(Range { keys_only: true, ..range(&self.object(&c.key), Vec::new()) }).into();
        failure.extend(changes.iter().map(look));
        let txn = Txn { compare, success, failure };
        let mut maybe = false;
        loop {
            if !self.office.holds() {
                return Err(StoreError::Deposed { maybe });
            }
            let done: TxnDone = match self.client.once("/etcdserverpb.KV/Txn", txn.clone()).await {
                Ok(done) => done,
                Err(status) if rpc::is_refusal(&status) && !maybe => return Err(rpc::failed(&status)),
                Err(status) => {
                    tracing::warn!(error = status.message(), "etcd has not answered a commit; asking again");
                    maybe = true;
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let at = done.header.as_ref().map_or(0, |h| h.revision);
            if done.succeeded {
                *last = at;
                return Ok(self.shown(at));
            }
            let mut found = done.responses.into_iter().map(|d| d.range.and_then(|r| r.kvs.into_iter().next()));
            let (leader, seq) = (found.next().flatten(), found.next().flatten());
            if let Some(seq) = &seq
                && seq.value == token.as_bytes()
            {
                // An earlier try, whose answer was lost.
                *last = seq.mod_revision;
                return Ok(self.shown(seq.mod_revision));
            }
            let deposed = leader.is_none_or(|l| l.create_revision != self.office.revision());
            if deposed || seq.map_or(0, |s| s.mod_revision) != *last {
                // Another has written since, over the earlier tries if there were any: they can happen no more, but
                // one may have happened before the other wrote.
                self.office.lose();
                return Err(StoreError::Deposed { maybe });
            }
            for (change, found) in changes.iter().zip(found) {
                let found = found.map(|kv| self.shown(kv.mod_revision));
                change.check(found)?;
            }
            return Err(StoreError::Failed("etcd says that a condition does not hold, but they all do".to_owned()));
        }
    }

    /// Follows a prefix from a revision on, over members that die, until nobody listens.
    async fn follow(self, prefix: String, after: u64, told: mpsc::Sender<Watched>) {
        // All of ours and not the prefix alone: each commit moves `seq`, so that a silence of the watch can be told from
        // a member that is cut off.
        let (all, first) = (self.own(""), self.object(&prefix));
        let mut next = self.hidden(after) + 1;
        loop {
            let create =
                rpc::WatchCreate { key: all.clone().into(), range_end: rpc::after(&all), start_revision: next };
            let (_open, more) = mpsc::channel(1);
            let ask = rpc::WatchAsked { create: Some(create) };
            let stream = self.client.stream("/etcdserverpb.Watch/Watch", ask, more).await;
            let ended = match stream {
                Ok(stream) => self.hear(stream, &first, &mut next, &told).await,
                Err(_) => false,
            };
            if ended || told.is_closed() {
                return;
            }
            tokio::time::sleep(WATCH_RETRY).await;
        }
    }

    /// Passes on what a watch tells. True once there is nothing more to tell; false if it is to be begun again at `next`.
    async fn hear(
        &self,
        mut stream: tonic::Streaming<rpc::WatchTold>,
        first: &str,
        next: &mut i64,
        told: &mpsc::Sender<Watched>,
    ) -> bool {
        loop {
            let heard = tokio::select! {
                heard = tokio::time::timeout(WATCH_SILENCE, stream.message()) => heard,
                () = told.closed() => return true,
            };
            let message = match heard {
                Ok(Ok(Some(message))) => message,
                Ok(_) => {
                    self.client.give_up_on_current();
                    return false;
                }
                // Silent because nothing happens, or because its member is cut off: what a majority knows decides.
                Err(_) => match self.missed(*next).await {
                    Some(false) => continue,
                    _ => {
                        self.client.give_up_on_current();
                        return false;
                    }
                },
            };
            if message.compact_revision != 0 {
                let _ = told.send(Watched::Compacted).await;
                return true;
            }
            if message.canceled {
                return false;
            }
            // All changes of one revision come in one message: no fragments were asked for. The header tells how far the
            // store is, not how far this watch.
            let from = *next;
            for event in message.events {
                let Some(kv) = event.kv else { continue };
                *next = (*next).max(kv.mod_revision + 1);
                if kv.mod_revision < from || !kv.key.starts_with(first.as_bytes()) {
                    continue;
                }
                let Ok(key) = self.shown_key(&kv.key) else { continue };
                let value = (event.kind == 0).then_some(kv.value);
                let seen = Seen { key, revision: self.shown(kv.mod_revision), value };
                if told.send(Watched::Change(seen)).await.is_err() {
                    return true;
                }
            }
        }
    }

    /// Whether there is anything at or after this revision that a watch of this member has not told: none if no majority
    /// answers. May say so of what is just on its way.
    async fn missed(&self, next: i64) -> Option<bool> {
        let newest: Result<Ranged, _> =
            self.client.repeat("/etcdserverpb.KV/Range", range(&self.own("seq"), Vec::new())).await;
        let seq = newest.ok()?.kvs.into_iter().next();
        Some(seq.is_some_and(|kv| kv.mod_revision >= next))
    }
}

/// A transaction of the greatest size has to be taken: found out now rather than at the first large group.
async fn check_room(client: &Client, prefix: &str) -> Result<(), StoreError> {
    let most = super::MAX_CHANGES + 2;
    let look = || Op::Range(Range { keys_only: true, ..range(&format!("{prefix}/schema"), Vec::new()) }).into();
    let probe = Txn { success: (0..most).map(|_| look()).collect(), ..Txn::default() };
    let answer: Result<TxnDone, StoreError> = client.repeat("/etcdserverpb.KV/Txn", probe).await;
    answer.map(drop).map_err(|e| match e {
        StoreError::Failed(detail) if detail.contains("too many operations") => {
            StoreError::Failed(format!("{detail}: start etcd with --max-txn-ops={} or more", most.next_power_of_two()))
        }
        other => other,
    })
}

impl Store for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        Box::pin(self.get_now(key))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Listing> {
        Box::pin(self.list_now(prefix))
    }

    fn commit(&self, changes: Vec<Change>) -> Pending<'static, u64> {
        let store = self.clone();
        Box::pin(async move {
            check_bounds(&changes)?;
            // Runs to its end even if nobody waits: what is known of the last commit has to be right.
            let done = tokio::spawn(async move { store.commit_now(changes).await });
            done.await.map_err(|e| StoreError::Failed(e.to_string()))?
        })
    }

    fn watch(&self, prefix: &str, after: u64) -> Watch {
        let (sender, receiver) = mpsc::channel(WATCH_BACKLOG);
        tokio::spawn(self.clone().follow(prefix.to_owned(), after, sender));
        Watch::from_task(receiver)
    }

    fn in_office(&self) -> bool {
        self.office.holds()
    }
}
