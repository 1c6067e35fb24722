//! A coordinator that dies at any of its commits.

use std::sync::{Arc, Mutex};

use afterimage_controlplane::store::{Change, Entry, Listing, Pending, Store, StoreError, Watch};
use tokio::sync::watch;

/// When a coordinator dies: at one of its commits, which happens still or does not.
#[derive(Default)]
pub struct Death {
    /// Commits until then, and whether that one happens; none: it lives.
    at: Mutex<Option<(usize, bool)>>,
    dead: watch::Sender<bool>,
}

impl Death {
    /// At the commit after so many others.
    pub fn comes(&self, after: usize, committed: bool) {
        *self.at.lock().unwrap() = Some((after, committed));
    }

    /// It was not to come after all; whether it had.
    pub fn is_off(&self) -> bool {
        *self.at.lock().unwrap() = None;
        *self.dead.borrow()
    }

    pub async fn has_come(&self) {
        self.dead.subscribe().wait_for(|dead| *dead).await.unwrap();
    }

    /// A commit begins: whether it happens, and whether anybody lives to see that.
    fn commits(&self) -> (bool, bool) {
        if *self.dead.borrow() {
            return (false, false);
        }
        let mut at = self.at.lock().unwrap();
        match &mut *at {
            None => (true, true),
            Some((0, committed)) => {
                let committed = *committed;
                (*at, _) = (None, self.dead.send_replace(true));
                (committed, false)
            }
            Some((left, _)) => {
                *left -= 1;
                (true, true)
            }
        }
    }
}

/// A store whose coordinator dies: from then on it reads and changes nothing, and tells nobody anything.
pub struct Dying {
    inner: Arc<dyn Store>,
    death: Arc<Death>,
}

impl Dying {
    pub fn new(inner: Arc<dyn Store>, death: Arc<Death>) -> Self {
        Self { inner, death }
    }

    fn unless_dead<'a, T: Send + 'a>(&self, does: Pending<'a, T>) -> Pending<'a, T> {
        if *self.death.dead.borrow() { Box::pin(async { Err(gone()) }) } else { does }
    }
}

fn gone() -> StoreError {
    StoreError::Failed("its process has died".to_owned())
}

impl Store for Dying {
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        self.unless_dead(self.inner.get(key))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Listing> {
        self.unless_dead(self.inner.list(prefix))
    }

    fn commit(&self, changes: Vec<Change>) -> Pending<'static, u64> {
        let (happens, seen) = self.death.commits();
        let commit = happens.then(|| self.inner.commit(changes));
        Box::pin(async move {
            let committed = match commit {
                Some(commit) => commit.await,
                None => Err(gone()),
            };
            if seen { committed } else { Err(gone()) }
        })
    }

    fn watch(&self, prefix: &str, after: u64) -> Watch {
        self.inner.watch(prefix, after)
    }

    fn in_office(&self) -> bool {
        !*self.death.dead.borrow() && self.inner.in_office()
    }
}
