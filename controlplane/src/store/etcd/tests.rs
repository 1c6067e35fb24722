//! Against a real etcd of one member on loopback, where there is one.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::{TcpListener, TcpStream};

use super::office::{Candidate, Stood};
use super::*;
use crate::store::{Expect, MAX_CHANGES};

struct Member {
    child: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn member() -> Option<Member> {
    let folder = tempfile::tempdir().unwrap();
    let (url, peer) = (format!("http://127.0.0.1:{}", free_port()), format!("http://127.0.0.1:{}", free_port()));
    let child = Command::new("etcd")
        .args(["--name", "m", "--max-txn-ops", "4096", "--initial-cluster", &format!("m={peer}")])
        .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .arg("--data-dir")
        .arg(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        println!("skip - no etcd here");
        return None;
    };
    let member = Member { child, url, _folder: folder };
    for _ in 0..300 {
        if candidate(&member.url).leader().await.is_ok() {
            return Some(member);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("etcd does not answer");
}

fn etcd(url: &str) -> Etcd {
    Etcd { members: vec![url.to_owned()], prefix: "test".to_owned(), tls: Tls::default() }
}

fn candidate(url: &str) -> Candidate {
    Candidate::new(&etcd(url), "127.0.0.1:1").unwrap()
}

async fn won(url: &str) -> Arc<Office> {
    match candidate(url).stand().await.unwrap() {
        Stood::Won(office) => office,
        Stood::Led(leader) => panic!("led by {leader:?}"),
    }
}

fn put(key: &str, expect: Expect, value: &str) -> Change {
    Change { key: key.to_owned(), expect, value: Some(value.as_bytes().to_vec()) }
}

async fn change(watch: &mut Watch) -> Seen {
    match tokio::time::timeout(Duration::from_secs(20), watch.next()).await {
        Ok(Watched::Change(seen)) => seen,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn changes_happen_as_in_the_embedded_store() {
    let Some(member) = member().await else { return };
    let store = EtcdStore::open(won(&member.url).await).await.unwrap();
    let first = store.commit(vec![put("a", Expect::Absent, "1"), put("b", Expect::Absent, "1")]).await.unwrap();
    let again = store.commit(vec![put("c", Expect::Absent, "2"), put("a", Expect::Absent, "2")]).await;
    assert!(matches!(again, Err(StoreError::Conflict { key, found: Some(r), .. }) if r == first && key == "a"));
    assert_eq!(store.get("c").await.unwrap(), None);
    let second = store.commit(vec![put("a", Expect::Revision(first), "2")]).await.unwrap();
    assert!(second > first);
    assert!(store.commit(vec![put("a", Expect::Revision(first), "3")]).await.is_err());
    assert_eq!(store.get("a").await.unwrap().unwrap().revision, second);
    store.commit(vec![Change { key: "a".into(), expect: Expect::Revision(second), value: None }]).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), None);
    // As many as are allowed at once, and more than one page of them.
    let many = (0..MAX_CHANGES).map(|i| put(&format!("m/{i:05}"), Expect::Absent, "x")).collect();
    let revision = store.commit(many).await.unwrap();
    let listing = store.list("m/").await.unwrap();
    assert_eq!((listing.entries.len(), listing.revision), (MAX_CHANGES, revision));
    assert!(listing.entries.is_sorted_by_key(|e| e.key.clone()));
}

#[tokio::test]
async fn who_leads_no_more_changes_nothing() {
    let Some(member) = member().await else { return };
    let old = won(&member.url).await;
    let store = EtcdStore::open(old.clone()).await.unwrap();
    let first = store.commit(vec![put("a", Expect::Absent, "old")]).await.unwrap();
    assert!(matches!(candidate(&member.url).stand().await.unwrap(), Stood::Led(_)), "one at a time");
    // As if the holder had been stopped: its lease ends, it knows nothing of it, and its clock says that all is well.
    let revoked: Result<rpc::Leased, _> =
        old.client().once("/etcdserverpb.Lease/LeaseRevoke", rpc::Lease { value: old.lease_for_tests() }).await;
    revoked.unwrap();
    let new = won(&member.url).await;
    let newer = EtcdStore::open(new).await.unwrap();
    newer.commit(vec![put("a", Expect::Revision(first), "new")]).await.unwrap();
    assert!(old.holds(), "or the test shows nothing");
    let late = store.commit(vec![put("b", Expect::Any, "late")]).await;
    assert!(matches!(late, Err(StoreError::Deposed { maybe: false })), "{late:?}");
    assert!(!store.in_office());
    assert_eq!(newer.get("b").await.unwrap(), None);
    assert_eq!(newer.get("a").await.unwrap().unwrap().value, b"new");
}

/// Passes connections on to etcd; while `deaf`, it swallows the answers and ends the connection after one.
async fn relay(to: String) -> (String, Arc<AtomicBool>) {
    let deaf = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let told = deaf.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (to, deaf) = (to.clone(), told.clone());
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let Ok(server) = TcpStream::connect(to.trim_start_matches("http://")).await else { return };
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let up = tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
                });
                let mut buffer = vec![0; 65536];
                while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                    if deaf.load(Ordering::SeqCst) {
                        // etcd has answered; a moment, so that more than an acknowledgement of the connection's has come.
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        break;
                    }
                    if to_client.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                }
                up.abort();
            });
        }
    });
    (url, deaf)
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_happens_once() {
    let Some(member) = member().await else { return };
    let (url, deaf) = relay(member.url.clone()).await;
    let store = EtcdStore::open(won(&url).await).await.unwrap();
    let mut last = store.commit(vec![put("n", Expect::Absent, "0")]).await.unwrap();
    for round in 1..=4 {
        deaf.store(true, Ordering::SeqCst);
        let committing = tokio::spawn({
            let store = store.clone();
            async move { store.commit(vec![put("n", Expect::Revision(last), &round.to_string())]).await }
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        let direct =
            get(&Client::new(std::slice::from_ref(&member.url), &Tls::default()).unwrap(), "test/o/n").await.unwrap();
        assert_eq!(direct.unwrap().value, round.to_string().as_bytes(), "it has happened, and nobody was told");
        deaf.store(false, Ordering::SeqCst);
        last = committing.await.unwrap().unwrap();
        assert_eq!(store.get("n").await.unwrap().unwrap().revision, last, "it was not done again");
    }
}

#[tokio::test]
async fn a_watch_goes_on_where_it_was_when_its_connection_is_lost() {
    let Some(member) = member().await else { return };
    let (url, deaf) = relay(member.url.clone()).await;
    let writer = EtcdStore::open(won(&member.url).await).await.unwrap();
    let listed = writer.commit(vec![put("w/0", Expect::Any, "x")]).await.unwrap();
    // After the list and before the watch.
    writer.commit(vec![put("w/1", Expect::Any, "x"), put("other", Expect::Any, "x")]).await.unwrap();
    let reader = EtcdStore { client: Arc::new(Client::new(&[url], &Tls::default()).unwrap()), ..writer.clone() };
    let mut watch = reader.watch("w/", listed);
    assert_eq!(change(&mut watch).await.key, "w/1");
    for i in 2..20 {
        deaf.store(i % 4 == 2, Ordering::SeqCst);
        writer.commit(vec![put(&format!("w/{i}"), Expect::Any, "x")]).await.unwrap();
        if i % 4 == 3 {
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }
    deaf.store(false, Ordering::SeqCst);
    for i in 2..20 {
        assert_eq!(change(&mut watch).await.key, format!("w/{i}"), "each once and in order");
    }
    writer.commit(vec![Change { key: "w/3".into(), expect: Expect::Any, value: None }]).await.unwrap();
    assert_eq!(change(&mut watch).await.value, None);
}

/// What etcd forgets: everything before this revision.
#[derive(Clone, PartialEq, prost::Message)]
struct Compact {
    #[prost(int64, tag = "1")]
    revision: i64,
    #[prost(bool, tag = "2")]
    physical: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Compacted {}

async fn compact(store: &EtcdStore, revision: u64) {
    let ask = Compact { revision: store.hidden(revision), physical: true };
    let _: Compacted = store.client.once("/etcdserverpb.KV/Compact", ask).await.unwrap();
}

#[tokio::test]
async fn a_watch_that_lost_its_place_to_a_compaction_says_so_and_nothing_is_missed() {
    let Some(member) = member().await else { return };
    let (url, deaf) = relay(member.url.clone()).await;
    let writer = EtcdStore::open(won(&member.url).await).await.unwrap();
    let reader = EtcdStore { client: Arc::new(Client::new(&[url], &Tls::default()).unwrap()), ..writer.clone() };
    let listed = writer.commit(vec![put("w/0", Expect::Any, "0")]).await.unwrap();
    let mut watch = reader.watch("w/", listed);
    writer.commit(vec![put("w/1", Expect::Any, "1")]).await.unwrap();
    assert_eq!(change(&mut watch).await.key, "w/1");
    // While nothing comes through: two changes, of which etcd then remembers none.
    deaf.store(true, Ordering::SeqCst);
    writer.commit(vec![put("w/2", Expect::Any, "2")]).await.unwrap();
    writer.commit(vec![Change { key: "w/0".into(), expect: Expect::Any, value: None }]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    let newest = writer.commit(vec![put("w/3", Expect::Any, "3")]).await.unwrap();
    compact(&writer, newest).await;
    deaf.store(false, Ordering::SeqCst);
    let told = tokio::time::timeout(Duration::from_secs(20), watch.next()).await.unwrap();
    assert_eq!(told, Watched::Compacted, "neither silence nor a gap");
    // As every watcher does then: a new list, which has all that was missed, and a watch from there on.
    let listing = reader.list("w/").await.unwrap();
    let keys: Vec<&str> = listing.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["w/1", "w/2", "w/3"]);
    let mut watch = reader.watch("w/", listing.revision);
    for i in 4..8 {
        let revision = writer.commit(vec![put(&format!("w/{i}"), Expect::Any, "x")]).await.unwrap();
        let seen = change(&mut watch).await;
        assert_eq!((seen.key, seen.revision), (format!("w/{i}"), revision));
        // One that keeps up is not disturbed.
        compact(&writer, revision).await;
    }
    // What was compacted away does not trouble the holder's commits.
    writer.commit(vec![put("w/1", Expect::Revision(listing.entries[0].revision), "again")]).await.unwrap();
}

#[tokio::test]
async fn a_value_that_is_too_large_is_refused_by_its_name() {
    let Some(member) = member().await else { return };
    let store = EtcdStore::open(won(&member.url).await).await.unwrap();
    let fits = "x".repeat(crate::store::MAX_VALUE);
    store.commit(vec![put("groups/default/shop", Expect::Any, &fits)]).await.unwrap();
    let refused =
        store.commit(vec![put("other", Expect::Any, "x"), put("groups/default/shop", Expect::Any, &(fits + "x"))]);
    let said = refused.await.unwrap_err().to_string();
    assert!(said.contains("groups/default/shop") && said.contains("65537") && said.contains("65536"), "{said}");
    assert_eq!(store.get("other").await.unwrap(), None, "nothing of it is done");
}

#[tokio::test]
async fn a_move_takes_everything_and_revisions_only_rise() {
    let Some(member) = member().await else { return };
    let entry = |i: u64| Entry { key: format!("k/{i:04}"), revision: i, value: format!("v{i}").into_bytes() };
    let listing = Listing { entries: (0..300).map(entry).collect(), revision: 1_000_000 };
    let moved = import(&etcd(&member.url), listing.clone()).await.unwrap();
    assert_eq!(moved.objects, 300);
    assert!(moved.revision > listing.revision);
    let again = import(&etcd(&member.url), listing.clone()).await;
    assert!(again.unwrap_err().to_string().contains("already"));
    let store = EtcdStore::open(won(&member.url).await).await.unwrap();
    let found = store.list("").await.unwrap();
    assert!(found.entries.iter().zip(&listing.entries).all(|(a, b)| a.key == b.key && a.value == b.value));
    assert!(found.entries.iter().all(|e| e.revision > listing.revision));
    let at = found.entries[0].revision;
    store.commit(vec![put("k/0000", Expect::Revision(at), "new")]).await.unwrap();
    // As if a move had been interrupted: nobody opens it.
    store.put_own("importing", "1").await.unwrap();
    store.office.give_back().await;
    let opened = EtcdStore::open(won(&member.url).await).await;
    assert!(opened.unwrap_err().to_string().contains("run it again"));
}

#[tokio::test]
async fn a_store_of_a_newer_version_is_refused_by_name_and_an_older_one_is_moved_forward() {
    let Some(member) = member().await else { return };
    let office = won(&member.url).await;
    let store = EtcdStore::open(office.clone()).await.unwrap();
    store.put_own("schema", "1").await.unwrap();
    let store = EtcdStore::open(office.clone()).await.unwrap();
    assert_eq!(number(&store.client, &store.own("schema")).await.unwrap(), Some(SCHEMA));
    store.put_own("schema", "99").await.unwrap();
    let refused = EtcdStore::open(office.clone()).await.unwrap_err();
    assert!(matches!(refused, StoreError::Schema { found: 99, known: SCHEMA }), "{refused}");
    assert!(refused.to_string().contains("99") && refused.to_string().contains(&SCHEMA.to_string()));
    assert_eq!(number(&store.client, &store.own("schema")).await.unwrap(), Some(99), "and left as it is");
}

#[test]
fn the_end_of_a_prefix_is_behind_all_its_keys() {
    assert_eq!(rpc::after("a/"), b"a0");
    assert_eq!(rpc::after(""), [0]);
}
