//! Moves what an embedded store holds into an etcd. A move that was interrupted is done again from its beginning; until
//! it has ended no coordinator opens what is there.

use super::office::{Candidate, Stood};
use super::{Etcd, EtcdStore, Op, get, rpc};
use crate::store::redb::SCHEMA;
use crate::store::{Change, Expect, Listing, Store, StoreError};

/// Objects in one transaction.
const AT_ONCE: usize = 64;
/// Bytes of values in one transaction, about.
const BYTES_AT_ONCE: usize = 512 * 1024;

/// What was moved.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Imported {
    /// How many objects.
    pub objects: usize,
    /// The store's revision afterwards: above all that the embedded store ever had.
    pub revision: u64,
}

/// Puts all of `listing` into an etcd that holds nothing of ours.
///
/// # Errors
/// It holds something already; a coordinator leads there; etcd does not answer.
pub async fn import(etcd: &Etcd, listing: Listing) -> Result<Imported, StoreError> {
    let refused = |detail: String| Err(StoreError::Failed(detail));
    let office = match Candidate::new(etcd, "")?.stand().await? {
        Stood::Won(office) => office,
        Stood::Led(leader) => return refused(format!("a coordinator leads there already, at {}", leader.address)),
    };
    let moved = import_in_office(&office, listing).await;
    office.give_back().await;
    moved
}

async fn import_in_office(
    office: &std::sync::Arc<super::office::Office>,
    listing: Listing,
) -> Result<Imported, StoreError> {
    let mut store = EtcdStore::raw(office.clone()).await?;
    let interrupted = get(&store.client, &store.own("importing")).await?.is_some();
    let there = store.list("").await?.entries;
    if !there.is_empty() && !interrupted {
        return Err(StoreError::Failed(format!("etcd holds {} objects of a coordinator already", there.len())));
    }
    store.put_own("importing", "1").await?;
    // Revisions go on above the embedded store's: proxies take no state that is older than what they have seen.
    store.put_own("base", &listing.revision.to_string()).await?;
    store.base = listing.revision;
    let kept: std::collections::HashSet<&str> = listing.entries.iter().map(|e| e.key.as_str()).collect();
    let left = there.iter().filter(|e| !kept.contains(e.key.as_str()));
    let gone = left.map(|e| Change { key: e.key.clone(), expect: Expect::Any, value: None });
    let put =
        |e: &crate::store::Entry| Change { key: e.key.clone(), expect: Expect::Any, value: Some(e.value.clone()) };
    let mut piece: Vec<Change> = Vec::new();
    let mut bytes = 0;
    for change in gone.chain(listing.entries.iter().map(put)) {
        bytes += change.value.as_ref().map_or(0, Vec::len);
        piece.push(change);
        if piece.len() >= AT_ONCE || bytes >= BYTES_AT_ONCE {
            store.commit(std::mem::take(&mut piece)).await?;
            bytes = 0;
        }
    }
    if !piece.is_empty() {
        store.commit(piece).await?;
    }
    // Read back before it counts.
    let now = store.list("").await?;
    let same = now.entries.len() == listing.entries.len()
        && now.entries.iter().zip(&listing.entries).all(|(a, b)| a.key == b.key && a.value == b.value);
    if !same {
        return Err(StoreError::Failed("what etcd holds after the move is not what was moved".to_owned()));
    }
    let done = vec![
        Op::Put(rpc::Put { key: store.own("schema").into(), value: SCHEMA.to_string().into(), lease: 0 }).into(),
        Op::Delete(rpc::Delete { key: store.own("importing").into() }).into(),
    ];
    let revision = store.transact(Vec::new(), done, &[]).await?;
    Ok(Imported { objects: listing.entries.len(), revision })
}
