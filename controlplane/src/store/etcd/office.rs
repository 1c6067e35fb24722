//! Who leads: the coordinator whose lease the leader's key goes with. The holder renews the lease and stops by its own
//! clock before etcd takes it away, so that two never act at once while clocks run at about the same speed; whatever the
//! clocks do, only the holder's commits happen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::rpc::{Client, Compare, KeyValue, Lease, Leased, Op, Put, Range, Revision, Txn, TxnDone};
use super::{Etcd, get};
use crate::objects::new_uid;
use crate::store::StoreError;

/// How long a leader may be silent.
pub const LEASE: Duration = Duration::from_secs(5);
/// Of the lease, what the holder does not use: clocks differ in speed, and what was begun takes a moment.
const MARGIN: Duration = Duration::from_secs(1);
/// Between two looks at who leads.
pub const LOOK: Duration = Duration::from_millis(250);
/// Between two renewals, and how long a member may take for one: when two of three hang, the third is still asked before
/// the lease has been used.
const RENEW: Duration = Duration::from_millis(1000);
const RENEW_WITHIN: Duration = Duration::from_millis(800);
/// Between two renewals of which the first failed.
const RENEW_AGAIN: Duration = Duration::from_millis(50);

/// Who leads, as it says in the leader's key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Leader {
    /// Of this time in office.
    pub uid: String,
    /// `host:port` by which the other coordinators reach it.
    pub address: String,
}

/// What came of standing for the office.
pub enum Stood {
    /// It is ours.
    Won(Arc<Office>),
    /// Another has it.
    Led(Leader),
}

/// A time in office.
pub struct Office {
    client: Arc<Client>,
    prefix: Arc<str>,
    key: String,
    /// Revision at which the leader's key was made.
    revision: i64,
    lease: i64,
    began: Instant,
    /// Until when it is ours without another word, milliseconds after `began`.
    until_ms: std::sync::atomic::AtomicU64,
    lost: AtomicBool,
    ended: watch::Sender<bool>,
}

/// Stands for the office at one etcd, again and again.
pub struct Candidate {
    client: Arc<Client>,
    prefix: Arc<str>,
    address: String,
}

impl Candidate {
    /// `address` is where the others reach this one.
    ///
    /// # Errors
    /// An address of a member is none.
    pub fn new(etcd: &Etcd, address: &str) -> Result<Self, StoreError> {
        let prefix = etcd.prefix.trim_end_matches('/');
        if prefix.is_empty() || prefix.len() > 128 {
            return Err(StoreError::Failed("the prefix of etcd's keys; allowed: 1 to 128 bytes".to_owned()));
        }
        let client = Arc::new(Client::new(&etcd.members, &etcd.tls)?);
        Ok(Self { client, prefix: prefix.into(), address: address.to_owned() })
    }

    /// Who leads now, as a majority of etcd's members knows; none if nobody does.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn leader(&self) -> Result<Option<Leader>, StoreError> {
        get(&self.client, &format!("{}/leader", self.prefix)).await?.map(|kv| read(&kv)).transpose()
    }

    /// Fingerprint of what all coordinators share besides etcd; none before one has led.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn shared(&self) -> Result<Option<String>, StoreError> {
        let found = get(&self.client, &format!("{}/shared", self.prefix)).await?;
        Ok(found.map(|kv| String::from_utf8_lossy(&kv.value).into_owned()))
    }

    /// Takes the office if nobody has it.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn stand(&self) -> Result<Stood, StoreError> {
        if let Some(leader) = self.leader().await? {
            return Ok(Stood::Led(leader));
        }
        let asked = Instant::now();
        let seconds = LEASE.as_secs() as i64;
        let lease: Leased = self.client.repeat("/etcdserverpb.Lease/LeaseGrant", Lease { value: seconds }).await?;
        let key = format!("{}/leader", self.prefix);
        let me = Leader { uid: new_uid(), address: self.address.clone() };
        let value = serde_json::to_vec(&me).map_err(|e| StoreError::Failed(e.to_string()))?;
        let look = || Op::Range(Range { key: key.clone().into(), ..Range::default() }).into();
        let txn = Txn {
            compare: vec![Compare::equal(&key, Revision::Create(0))],
            success: vec![Op::Put(Put { key: key.clone().into(), value, lease: lease.id }).into(), look()],
            failure: vec![look()],
        };
        // If an answer is lost it is asked again, and finds its own key.
        let done: TxnDone = self.client.repeat("/etcdserverpb.KV/Txn", txn).await?;
        let found = done.responses.into_iter().filter_map(|d| d.range).next_back();
        let found = found.and_then(|r| r.kvs.into_iter().next());
        let found =
            found.ok_or_else(|| StoreError::Failed("etcd answers a transaction without its read".to_owned()))?;
        let leader = read(&found)?;
        if leader.uid != me.uid {
            return Ok(Stood::Led(leader));
        }
        let office = Arc::new(Office {
            client: self.client.clone(),
            prefix: self.prefix.clone(),
            key,
            revision: found.create_revision,
            lease: lease.id,
            began: asked,
            until_ms: 0.into(),
            lost: AtomicBool::new(false),
            ended: watch::channel(false).0,
        });
        office.renewed(asked, lease.ttl);
        tokio::spawn(office.clone().keep());
        Ok(Stood::Won(office))
    }
}

fn read(kv: &KeyValue) -> Result<Leader, StoreError> {
    serde_json::from_slice(&kv.value).map_err(|e| StoreError::Failed(format!("the leader's key: {e}")))
}

impl Office {
    /// etcd.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// What all keys begin with.
    pub fn prefix(&self) -> &Arc<str> {
        &self.prefix
    }

    /// The leader's key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Revision at which the leader's key was made: no other time in office has it.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Whether it is held, by this clock. A process that was stopped meanwhile finds out here.
    pub fn holds(&self) -> bool {
        let now = self.began.elapsed().as_millis() as u64;
        !self.lost.load(Ordering::SeqCst) && now < self.until_ms.load(Ordering::SeqCst)
    }

    /// It is not ours any more.
    pub fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        self.ended.send_replace(true);
    }

    /// Ready once it is lost.
    pub async fn ended(&self) {
        // An error says that the office is gone altogether.
        let _ = self.ended.subscribe().wait_for(|e| *e).await;
    }

    /// Gives it back, so that another need not wait for the lease to end.
    pub async fn give_back(&self) {
        self.lose();
        let revoked: Result<Leased, _> =
            self.client.once("/etcdserverpb.Lease/LeaseRevoke", Lease { value: self.lease }).await;
        if let Err(status) = revoked {
            tracing::debug!(error = status.message(), "the lease ends by itself");
        }
    }

    fn renewed(&self, asked: Instant, ttl: i64) {
        let lasts = Duration::from_secs(ttl.max(0) as u64).min(LEASE).saturating_sub(MARGIN);
        let until = asked.duration_since(self.began) + lasts;
        self.until_ms.fetch_max(until.as_millis() as u64, Ordering::SeqCst);
    }

    async fn keep(self: Arc<Self>) {
        let mut ended = self.ended.subscribe();
        let mut pause = RENEW;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = ended.wait_for(|e| *e) => return,
            }
            // One that has run out is not taken up again, even if etcd were still willing: who looked in between was
            // told that it is lost.
            if !self.holds() {
                return self.lose();
            }
            let asked = Instant::now();
            pause = match self.renew().await {
                Some(0) => return self.lose(),
                Some(ttl) => {
                    self.renewed(asked, ttl);
                    RENEW
                }
                None => RENEW_AGAIN,
            };
        }
    }

    /// Seconds that it lasts from now on; none if nobody answers.
    async fn renew(&self) -> Option<i64> {
        let (_open, more) = mpsc::channel(1);
        let ask = Lease { value: self.lease };
        let member = self.client.current();
        let answer = async {
            let stream = self.client.stream::<Lease, Leased>("/etcdserverpb.Lease/LeaseKeepAlive", ask, more).await;
            stream.ok()?.message().await.ok()?
        };
        match tokio::time::timeout(RENEW_WITHIN, answer).await {
            Ok(Some(leased)) => Some(leased.ttl),
            _ => {
                self.client.leave(member);
                None
            }
        }
    }
}

#[cfg(test)]
impl Office {
    /// The lease.
    pub fn lease_for_tests(&self) -> i64 {
        self.lease
    }
}
