//! Keys of policies: rotated, wrapped anew, and the recovery key made.
//!
//! ```text
//!  rotate    next key stored ─▶ the target has it (its desired state) ─▶ it becomes the key ─▶ the source writes under it
//!  rewrap    new wrapping key stored ─▶ records wrapped under it, some at a time ─▶ the older ones forgotten
//!  recovery  stored, wrapped ─▶ shown to who asked, this once ─▶ targets keep their keys sealed under it, too
//! ```
//! Each step is a change of the store by itself, and what is left to be done is seen in it: a coordinator that dies in
//! between, or another one, goes on from there.

use std::sync::Arc;

use afterimage_wire::keys::MAX_KEYS;
use afterimage_wire::v1::{self, Severity};
use ring::rand::{SecureRandom, SystemRandom};

use super::Coordinator;
use crate::authorities::Authorities;
use crate::ca::hex;
use crate::escrow::{EscrowKey, RecoveryKey};
use crate::keys::{KEY_LEN, KeyError, Recovery, Wrapping};
use crate::model::{Model, Txn};
use crate::names::{DEFAULT_TENANT, Name, tenant};
use crate::objects::{Group, Object};
use crate::problem::Problem;
use crate::requests::Asked;

/// Records that are rewrapped in one change.
const AT_ONCE: usize = 64;
/// Older keys that a group may have: what a keys file has room for, and some.
const MAX_OLDER: usize = MAX_KEYS - 16;
/// What the recovery key's record is bound to: it is no policy's key.
const RECOVERY: &str = "recovery";

fn internal(error: KeyError) -> Problem {
    Problem::Internal(format!("nothing was changed: {error}"))
}

impl Coordinator {
    /// The keys of a tenant's groups, as they are shown: none of them itself.
    pub fn keys_of(&self, of: &str) -> v1::PolicyKeys {
        let model = self.model();
        let live = self.live.lock().expect("nothing panics while it holds this");
        let one = |group: &Group, id: &str| {
            let record = model.keys.get(id);
            let state = if id == group.next_key {
                v1::KeyState::Next
            } else if id == group.key {
                v1::KeyState::Current
            } else {
                v1::KeyState::Older
            };
            v1::KeyVersion {
                uid: id.to_owned(),
                state: state.into(),
                create_time_ns: record.map_or(0, |r| r.since_ns),
                wrapping_key: record.map(|r| r.under.clone()).unwrap_or_default(),
            }
        };
        let groups = model.groups.values().filter(|g| g.tenant == of).map(|group| {
            let said = live.streams.get(&group.uid).and_then(|s| s.source.as_ref());
            v1::GroupKeys {
                group: group.name().to_string(),
                versions: group.all_keys().map(|id| one(group, id)).collect(),
                written_under: said.map(|(_, s)| s.key_uid.clone()).unwrap_or_default(),
            }
        });
        let wrapping = model.wrapping.iter().flat_map(|w| &w.keys).map(|key| v1::WrappingKey {
            uid: key.id.clone(),
            by: key.by.clone(),
            create_time_ns: key.since_ns,
        });
        let recovery = model.recovery.as_ref();
        v1::PolicyKeys {
            groups: groups.collect(),
            wrapping: wrapping.collect(),
            recovery_key: recovery.and_then(|r| self.open_recovery(r)).map(|k| hex(&k.id)).unwrap_or_default(),
            recovery_create_time_ns: recovery.map_or(0, |r| r.made_ns),
        }
    }

    /// Gives a group a new key: what is written from then on needs it, what is there keeps those it has.
    ///
    /// # Errors
    /// There is no such group, or its key is being rotated already.
    pub async fn rotate_key(
        self: &Arc<Self>,
        name: &Name,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let now = self.clock.wall_ns();
        let rotated = self
            .change(|model, txn| {
                if request.done(model)?.is_some() {
                    return Ok(None);
                }
                let group = model.group(name)?.clone();
                if !group.next_key.is_empty() {
                    let remedy =
                        format!("bring its target \"{}\" back: it has to have the next key first", group.target);
                    return Err(Problem::state(format!("the key of {name}"), "being rotated already", remedy));
                }
                if group.older_keys.len() >= MAX_OLDER {
                    let what = format!("older keys of {name}, which its journal may need");
                    return Err(Problem::Limit { what, limit: MAX_OLDER as u64 });
                }
                if validate_only {
                    return Ok(None);
                }
                let key = self.keys.generate(now).map_err(internal)?;
                let (id, version) = (key.id.clone(), group.version + 1);
                request.record(model, txn, now, &group.uid);
                txn.put(Object::Key(key));
                txn.put(Object::Group(Group { next_key: id.clone(), version, updated_ns: now, ..group }));
                Ok(Some(id))
            })
            .await?;
        if let Some(id) = rotated {
            let message = format!("key {id} takes the place of the one before as soon as the target has it");
            self.tell(Severity::Info, "key", &name.to_string(), &message);
        }
        Ok(())
    }

    /// Keys whose target has them become those that sources write under.
    pub(super) async fn further_keys(self: &Arc<Self>, model: &Model) {
        let ready = |model: &Model, group: &Group| {
            let Some(target) = model.target_of(group).filter(|_| !group.next_key.is_empty()) else { return false };
            let live = self.live.lock().expect("nothing panics while it holds this");
            let version = model.key_version(&group.next_key);
            live.proxies.get(&target.uid).is_some_and(|p| {
                p.observed_version >= version && p.problems.iter().all(|problem| problem.stream_uid != group.uid)
            })
        };
        if model.observing() || !model.groups.values().any(|group| ready(model, group)) {
            return;
        }
        let now = self.clock.wall_ns();
        let done = self.change(|model, txn| {
            let mut names = Vec::new();
            for group in model.groups.values().filter(|group| ready(model, group)) {
                let mut group = group.clone();
                let key = std::mem::take(&mut group.next_key);
                group.older_keys.insert(0, std::mem::replace(&mut group.key, key));
                names.push((group.name().to_string(), group.key.clone()));
                txn.put(Object::Group(Group { version: group.version + 1, updated_ns: now, ..group }));
            }
            Ok(names)
        });
        match done.await {
            Ok(names) => {
                for (name, key) in names {
                    let message = format!("key {key} is the one that is written under from now on");
                    self.tell(Severity::Info, "key", &name, &message);
                }
            }
            Err(error) => tracing::warn!(%error, "keys are not rotated yet"),
        }
    }

    /// Makes a new wrapping key, and wraps everything under it.
    ///
    /// # Errors
    /// What wraps fails, and nothing has been changed; or the store does, and the next start goes on.
    pub async fn rewrap(self: &Arc<Self>, validate_only: bool, request: &Asked) -> Result<(), Problem> {
        if request.done(&self.model())?.is_some() {
            return Ok(());
        }
        let (keys, now) = (self.keys.clone(), self.clock.wall_ns());
        // It may run a command.
        let made = tokio::task::spawn_blocking(move || keys.make_wrapping(now)).await;
        let made = made.map_err(|e| Problem::Internal(e.to_string()))?;
        let key = made.map_err(|error| {
            let remedy = format!("mend that, or set `keys` otherwise, and try again: {error}");
            Problem::state("what wraps keys", "failing", remedy)
        })?;
        if validate_only {
            return Ok(());
        }
        let (id, by) = (key.id.clone(), key.by.clone());
        let begun = self
            .change(|model, txn| {
                if request.done(model)?.is_some() {
                    return Ok(false);
                }
                let mut known = model.wrapping.clone().unwrap_or_default();
                known.keys.push(key);
                txn.put(Object::Wrapping(known));
                request.record(model, txn, now, &id);
                Ok(true)
            })
            .await?;
        if !begun {
            return Ok(());
        }
        self.finish_rewrap().await?;
        let message = format!("keys are wrapped under {id}, which a {by} has wrapped");
        self.tell(Severity::Warning, "key", &tenant(DEFAULT_TENANT), &message);
        Ok(())
    }

    /// Goes on with what an earlier life has begun.
    pub(super) fn resume_rewrap(self: &Arc<Self>) {
        let model = self.model();
        if model.observing() || !model.wrapping.as_ref().is_some_and(|known| known.keys.len() > 1 || left(&model)) {
            return;
        }
        let coordinator = self.clone();
        tokio::spawn(async move {
            if let Err(error) = coordinator.finish_rewrap().await {
                tracing::error!(%error, "keys are not rewrapped: the next start tries again");
            }
        });
    }

    async fn finish_rewrap(self: &Arc<Self>) -> Result<(), Problem> {
        while self.change(|model, txn| self.rewrap_some(model, txn)).await? {}
        self.change(|model, txn| {
            if let Some(known) = model.wrapping.clone().filter(|known| known.keys.len() > 1 && !left(model)) {
                let newest = known.keys.into_iter().next_back();
                txn.put(Object::Wrapping(Wrapping { keys: newest.into_iter().collect() }));
            }
            Ok(())
        })
        .await
    }

    /// Some of what is not under the newest wrapping key; whether there was any.
    fn rewrap_some(&self, model: &Model, txn: &mut Txn) -> Result<bool, Problem> {
        let Some(newest) = newest(model) else { return Ok(false) };
        for key in model.keys.values().filter(|key| key.under != newest).take(AT_ONCE) {
            txn.put(Object::Key(self.keys.rewrap(key).map_err(internal)?));
        }
        if let Some(known) = model.authorities.as_ref().filter(|known| authority_left(known, newest)) {
            let issuing = known.issuing.rewrapped(&self.keys).map_err(internal)?;
            let replaced = known.replaced.as_ref().map(|a| a.rewrapped(&self.keys)).transpose().map_err(internal)?;
            txn.put(Object::Authorities(Authorities { issuing, replaced }));
        }
        if let Some(known) = model.recovery.as_ref().filter(|known| known.key.under != newest) {
            let key = self.keys.rewrap(&known.key).map_err(internal)?;
            txn.put(Object::Recovery(Recovery { key, ..known.clone() }));
        }
        Ok(!txn.is_empty())
    }

    /// Makes the recovery key; its text, which is not shown again.
    ///
    /// # Errors
    /// There is one, and it is not to be replaced.
    pub async fn make_recovery(
        self: &Arc<Self>,
        replace: bool,
        validate_only: bool,
        request: &Asked,
    ) -> Result<String, Problem> {
        let now = self.clock.wall_ns();
        let mut bytes = [0; KEY_LEN];
        SystemRandom::new().fill(&mut bytes).map_err(|_| Problem::Internal(KeyError::Random.to_string()))?;
        let made = RecoveryKey(bytes);
        self.change(|model, txn| {
            if let Some(known) = &model.recovery
                && (!replace || request.done(model)?.is_some())
            {
                let at = crate::text::time(known.made_ns);
                let remedy = "it is shown once; --replace makes another, and then that one opens nothing any more";
                return Err(Problem::state("the recovery key", format!("made already, at {at}"), remedy));
            }
            if !validate_only {
                let key = self.keys.wrap(RECOVERY, &made.0).map_err(internal)?;
                request.record(model, txn, now, RECOVERY);
                txn.put(Object::Recovery(Recovery { key, made_ns: now }));
            }
            Ok(())
        })
        .await?;
        if validate_only {
            return Ok(String::new());
        }
        let message = format!("recovery key {} was made and shown", hex(&made.escrow().id));
        self.tell(Severity::Warning, "key", &tenant(DEFAULT_TENANT), &message);
        Ok(made.text())
    }

    /// What the recovery key seals with.
    pub(super) fn open_recovery(&self, known: &Recovery) -> Option<EscrowKey> {
        match self.keys.unwrap(&known.key) {
            Ok(bytes) => Some(RecoveryKey(bytes).escrow()),
            Err(error) => {
                tracing::error!(%error, "the recovery key does not open");
                None
            }
        }
    }
}

fn newest(model: &Model) -> Option<&str> {
    model.wrapping.as_ref().and_then(|known| known.keys.last()).map(|key| key.id.as_str())
}

fn authority_left(known: &Authorities, newest: &str) -> bool {
    std::iter::once(&known.issuing).chain(&known.replaced).any(|a| a.is_under_another(newest))
}

/// Whether something is not under the newest wrapping key.
fn left(model: &Model) -> bool {
    let Some(newest) = newest(model) else { return false };
    model.keys.values().any(|key| key.under != newest)
        || model.recovery.as_ref().is_some_and(|known| known.key.under != newest)
        || model.authorities.as_ref().is_some_and(|known| authority_left(known, newest))
}
