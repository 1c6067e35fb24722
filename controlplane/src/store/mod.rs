//! Where objects are kept: keys with a revision each, changed several at once or not at all, by compare-and-swap.
//!
//! One trait for two stores: [`redb`] is embedded, [`etcd`] is shared by several coordinators. Small values only
//! ([`MAX_VALUE`]): points, histograms and events do not belong here.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::{broadcast, mpsc};

pub mod etcd;
pub mod redb;

/// Longest value, bytes.
pub const MAX_VALUE: usize = 64 * 1024;
/// Longest key, bytes.
pub const MAX_KEY: usize = 512;
/// Most keys changed at once.
pub const MAX_CHANGES: usize = 2048;
/// Changes that a watch may be behind before it has to list again.
pub const WATCH_BACKLOG: usize = 1024;

/// A value with the revision of its last change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Revision of the store at which it was last changed.
    pub revision: u64,
    /// Value.
    pub value: Vec<u8>,
}

/// What must be so for a change to happen.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Expect {
    /// Nothing.
    Any,
    /// The key does not exist.
    Absent,
    /// The key was last changed at this revision.
    Revision(u64),
}

/// One key's change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// Key.
    pub key: String,
    /// Condition.
    pub expect: Expect,
    /// New value; none deletes the key.
    pub value: Option<Vec<u8>>,
}

impl Change {
    /// Whether its condition holds for a key that is at this revision, or not there.
    ///
    /// # Errors
    /// [`StoreError::Conflict`].
    pub(crate) fn check(&self, found: Option<u64>) -> Result<(), StoreError> {
        let holds = match self.expect {
            Expect::Any => true,
            Expect::Absent => found.is_none(),
            Expect::Revision(r) => found == Some(r),
        };
        if holds { Ok(()) } else { Err(StoreError::Conflict { key: self.key.clone(), expected: self.expect, found }) }
    }
}

/// What the store cannot do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A condition does not hold: nothing was changed.
    #[error("{key} is at revision {found:?}, expected was {expected:?}")]
    Conflict {
        /// The first key whose condition does not hold.
        key: String,
        /// What was expected.
        expected: Expect,
        /// Its revision; none if it does not exist.
        found: Option<u64>,
    },
    /// A key, value or transaction beyond the bounds.
    #[error("{what} of {key}: {size}; at most {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Which key.
        key: String,
        /// Its size.
        size: usize,
        /// The bound.
        limit: usize,
    },
    /// Written by another version of this program.
    #[error("the store's schema is {found}; this program reads {known}")]
    Schema {
        /// What was found.
        found: u64,
        /// What is known.
        known: u64,
    },
    /// Another process has it open.
    #[error("{0} is in use by another coordinator")]
    InUse(String),
    /// This coordinator does not lead, or not any more.
    #[error("this coordinator does not lead any more{}", if *maybe { "; whether the change was made, the next leader knows" } else { "" })]
    Deposed {
        /// The change may have been made: its answer was lost.
        maybe: bool,
    },
    /// The file, the disk or the network fails.
    #[error("the store failed: {0}")]
    Failed(String),
}

/// Answer that comes later; calls may block on a disk or a network.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Keys under a prefix, and the revision of the store at which that was so.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listing {
    /// Rising by key.
    pub entries: Vec<Entry>,
    /// Of the store.
    pub revision: u64,
}

/// A store.
pub trait Store: Send + Sync + 'static {
    /// One key.
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>>;

    /// All keys that begin with `prefix`, as of one moment.
    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Listing>;

    /// Does all changes at once and durably, or none; returns the new revision, which is that of every key changed.
    ///
    /// Once called it may happen even if the caller stops waiting.
    fn commit(&self, changes: Vec<Change>) -> Pending<'static, u64>;

    /// Changes after this revision, which a [`Listing`] gave: all of them, each once, also over a store's member that
    /// dies; or [`Watched::Compacted`] if they are not kept any more.
    fn watch(&self, prefix: &str, after: u64) -> Watch;

    /// Whether this process may still act on what it has read: false once another may have taken its place. Asks nobody.
    fn in_office(&self) -> bool {
        true
    }
}

/// A change as a watch sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Key.
    pub key: String,
    /// Revision of the change.
    pub revision: u64,
    /// New value; none if the key was deleted.
    pub value: Option<Vec<u8>>,
}

/// What a watch tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Watched {
    /// A key has changed.
    Change(Seen),
    /// The watch is too far behind: list again and compare.
    Compacted,
    /// The store is closed.
    Closed,
}

/// Changes under a prefix, in the order of their revisions.
pub struct Watch(From);

enum From {
    /// In this process.
    Local {
        prefix: String,
        after: u64,
        /// Something happened between `after` and now.
        behind: bool,
        receiver: broadcast::Receiver<Seen>,
    },
    /// By a task that knows the prefix.
    Task(mpsc::Receiver<Watched>),
}

impl Watch {
    /// `newest` is the store's revision, read after `receiver` was made.
    pub(crate) fn local(prefix: &str, after: u64, newest: u64, receiver: broadcast::Receiver<Seen>) -> Self {
        Self(From::Local { prefix: prefix.to_owned(), after, behind: newest > after, receiver })
    }

    pub(crate) fn from_task(receiver: mpsc::Receiver<Watched>) -> Self {
        Self(From::Task(receiver))
    }

    /// The next change under the prefix.
    pub async fn next(&mut self) -> Watched {
        let (prefix, after, behind, receiver) = match &mut self.0 {
            From::Task(receiver) => return receiver.recv().await.unwrap_or(Watched::Closed),
            From::Local { prefix, after, behind, receiver } => (prefix, after, behind, receiver),
        };
        if std::mem::take(behind) {
            return Watched::Compacted;
        }
        loop {
            match receiver.recv().await {
                Ok(seen) if seen.revision > *after && seen.key.starts_with(prefix.as_str()) => {
                    return Watched::Change(seen);
                }
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => return Watched::Compacted,
                Err(broadcast::error::RecvError::Closed) => return Watched::Closed,
            }
        }
    }
}

/// Refuses what is beyond the bounds, before anything is done.
pub(crate) fn check_bounds(changes: &[Change]) -> Result<(), StoreError> {
    let too_large = |what, key: &str, size, limit| {
        Err(StoreError::TooLarge { what, key: crate::text::head(key, 80).to_owned(), size, limit })
    };
    if changes.len() > MAX_CHANGES {
        return too_large("number of changes", "a transaction", changes.len(), MAX_CHANGES);
    }
    for change in changes {
        if change.key.len() > MAX_KEY {
            return too_large("length of the key", &change.key, change.key.len(), MAX_KEY);
        }
        if let Some(value) = &change.value
            && value.len() > MAX_VALUE
        {
            return too_large("length of the value", &change.key, value.len(), MAX_VALUE);
        }
    }
    Ok(())
}
