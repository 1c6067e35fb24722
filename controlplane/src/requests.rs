//! Requests that have been done, by the ids that their callers gave them: asked again they are not done again. A record is
//! committed together with what the request changed, so a crash leaves both or neither.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use prost::Message;
use serde::{Deserialize, Serialize};

use crate::ca::{hex, sha256};
use crate::model::{Model, Txn};
use crate::objects::Object;
use crate::problem::Problem;

/// Requests that are remembered, per tenant; the oldest go first.
pub const MAX_REQUESTS: usize = 4096;
/// How long they are, nanoseconds: 24 hours.
pub const REMEMBER_NS: u64 = 24 * 3600 * 1_000_000_000;
/// Longest id, characters.
const MAX_REQUEST_ID: usize = 64;

/// A request that has been done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Hash of caller, method and id.
    pub key: String,
    /// Tenant.
    pub tenant: String,
    /// Hash of the request.
    pub fingerprint: String,
    /// What it made, changed or deleted: its uid.
    pub uid: String,
    /// The point that it made, if that is what it did.
    #[serde(default)]
    pub point: Option<crate::objects::PointRecord>,
    /// When, nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// The join token that it spent, if that is what it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<crate::token::TokenRecord>,
}

/// What a request made: its uid, its point, the token that it spent.
type Made<'a> = (&'a str, Option<crate::objects::PointRecord>, Option<crate::token::TokenRecord>);

/// A request with an id, or without.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    key: String,
    tenant: String,
    fingerprint: String,
}

impl Asked {
    /// Of a caller (`actor`), for a method, as it was sent.
    ///
    /// # Errors
    /// The id is too long, or not printable.
    pub fn new(tenant: &str, actor: &str, method: &str, id: &str, request: &impl Message) -> Result<Self, Problem> {
        check_request_id(id)?;
        if id.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self {
            key: hex(&sha256(format!("{actor}\0{method}\0{id}").as_bytes())),
            tenant: tenant.to_owned(),
            fingerprint: hex(&sha256(&request.encode_to_vec())),
        })
    }

    /// What it is known by; empty if it has no id.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The record of this request, if it has been done.
    ///
    /// # Errors
    /// The id has been used for another request.
    pub fn done<'a>(&self, model: &'a Model) -> Result<Option<&'a RequestRecord>, Problem> {
        if self.key.is_empty() {
            return Ok(None);
        }
        match model.requests.get(&(self.tenant.clone(), self.key.clone())) {
            Some(record) if record.fingerprint != self.fingerprint => {
                let allowed = "an id that has not been used for another request";
                Err(Problem::invalid("request_id", "one that was used for another request", allowed))
            }
            found => Ok(found.map(AsRef::as_ref)),
        }
    }

    /// Records it as done, with the change that it makes.
    pub fn record(&self, model: &Model, txn: &mut Txn, now_ns: u64, uid: &str) {
        self.record_with(model, txn, now_ns, uid, None);
    }

    /// As [`Self::record`], with the token that it spent.
    pub fn record_token(&self, model: &Model, txn: &mut Txn, now_ns: u64, token: &crate::token::TokenRecord) {
        self.put(model, txn, now_ns, (&token.id, None, Some(token.clone())));
    }

    /// As [`Self::record`], with a point.
    pub fn record_with(
        &self,
        model: &Model,
        txn: &mut Txn,
        now_ns: u64,
        uid: &str,
        point: Option<crate::objects::PointRecord>,
    ) {
        self.put(model, txn, now_ns, (uid, point, None));
    }

    fn put(&self, model: &Model, txn: &mut Txn, now_ns: u64, (uid, point, token): Made<'_>) {
        if self.key.is_empty() {
            return;
        }
        let own = || model.requests.values().filter(|r| r.tenant == self.tenant);
        let mut kept = own().count();
        for old in own().filter(|r| r.at_ns.saturating_add(REMEMBER_NS) <= now_ns) {
            txn.delete(Object::Request(old.as_ref().clone()));
            kept -= 1;
        }
        if kept >= MAX_REQUESTS
            && let Some(oldest) = own().filter(|r| r.at_ns.saturating_add(REMEMBER_NS) > now_ns).min_by_key(|r| r.at_ns)
        {
            txn.delete(Object::Request(oldest.as_ref().clone()));
        }
        txn.put(Object::Request(RequestRecord {
            key: self.key.clone(),
            tenant: self.tenant.clone(),
            fingerprint: self.fingerprint.clone(),
            uid: uid.to_owned(),
            point,
            at_ns: now_ns,
            token,
        }));
    }
}

/// Requests that are being done, by their keys: for those that are recorded only after something was done elsewhere.
#[derive(Default)]
pub struct Turns {
    under_way: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl Turns {
    /// Waits until no other one with this key is being done; it is while the result is held. An empty key waits for
    /// nobody.
    pub async fn of(&self, key: &str) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        if key.is_empty() {
            return None;
        }
        let turn = {
            let mut under_way = self.under_way.lock().expect("nothing panics while it holds this");
            under_way.retain(|_, turn| turn.strong_count() > 0);
            let known = under_way.get(key).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            under_way.insert(key.to_owned(), Arc::downgrade(&turn));
            turn
        };
        Some(turn.lock_owned().await)
    }
}

/// What a request made is not there any more.
pub fn gone(kind: &str, name: impl ToString) -> Problem {
    Problem::not_found(kind, format!("{} (made by this request, and deleted since)", name.to_string()))
}

/// Checks a request id.
///
/// # Errors
/// Too long, or not printable.
pub fn check_request_id(id: &str) -> Result<(), Problem> {
    if id.len() > MAX_REQUEST_ID || !id.chars().all(|c| c.is_ascii_graphic()) {
        let allowed = format!("up to {MAX_REQUEST_ID} printable ASCII characters without spaces");
        return Err(Problem::invalid("request_id", id, allowed));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use afterimage_wire::v1::GetPolicyRequest;

    use super::*;

    fn asked(actor: &str, id: &str, name: &str) -> Asked {
        Asked::new("default", actor, "m", id, &GetPolicyRequest { name: name.into() }).unwrap()
    }

    fn record(model: &Model, asked: &Asked, now: u64) -> Model {
        let mut txn = Txn::default();
        asked.record(model, &mut txn, now, "u");
        if txn.is_empty() { model.clone() } else { model.applied(txn, model.revision + 1) }
    }

    #[test]
    fn a_request_is_known_by_caller_and_id_and_has_to_be_the_same() {
        let model = record(&Model::default(), &asked("anna", "1", "a"), 1);
        assert_eq!(asked("anna", "1", "a").done(&model).unwrap().unwrap().uid, "u");
        assert!(asked("anna", "1", "b").done(&model).is_err());
        assert!(asked("bob", "1", "b").done(&model).unwrap().is_none());
        assert!(asked("anna", "2", "a").done(&model).unwrap().is_none());
        assert!(asked("anna", "", "a").done(&model).unwrap().is_none());
    }

    #[test]
    fn old_ones_are_forgotten_and_there_are_never_too_many() {
        let mut model = Model::default();
        for i in 0..MAX_REQUESTS as u64 + 3 {
            model = record(&model, &asked("anna", &format!("{i}"), "a"), i + 1);
        }
        assert_eq!(model.requests.len(), MAX_REQUESTS);
        assert!(asked("anna", "2", "a").done(&model).unwrap().is_none());
        assert!(asked("anna", "3", "a").done(&model).unwrap().is_some());
        let model = record(&model, &asked("anna", "x", "a"), REMEMBER_NS * 2);
        assert_eq!(model.requests.len(), 1);
    }

    #[tokio::test]
    async fn requests_with_one_key_take_turns() {
        let turns = Turns::default();
        let first = turns.of("a").await;
        let waits = |key: &'static str| tokio::time::timeout(std::time::Duration::from_millis(20), turns.of(key));
        assert!(waits("a").await.is_err());
        assert!(waits("b").await.is_ok() && waits("").await.is_ok());
        drop(first);
        assert!(waits("a").await.is_ok());
        drop(turns.of("c").await);
        assert_eq!(turns.under_way.lock().unwrap().len(), 1, "what is over is forgotten");
    }

    #[test]
    fn ids_are_bounded() {
        for bad in ["a b", "\n", "ä", &"x".repeat(65)] {
            assert!(check_request_id(bad).is_err(), "{bad}");
        }
    }
}
