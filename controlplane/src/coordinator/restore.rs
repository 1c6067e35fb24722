//! After a restore: proxies are asked what they have, what is newer is taken over, and all waits for a word.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{self, Severity};

use super::Coordinator;
use crate::convert;
use crate::model::Model;
use crate::names::{DEFAULT_TENANT, Kind, Name};
use crate::objects::{Group, Object, Policy, Proxy, View};
use crate::problem::Problem;
use crate::restore::{Observed, Restored, adopt, ended, unknown, unseen};
use crate::store::{Listing, StoreError};

/// How long a proxy may take to say what it has, and the pause before it is asked again.
const ANSWER: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(2);

/// Why nothing is changed before a restore has been confirmed.
pub(super) fn only_observes() -> Problem {
    Problem::state(
        "the coordinator",
        "restored from a backup, and only observes",
        "see what it has found, then confirm: afterimage coordinator confirm",
    )
}

/// Whether a command changes nothing.
pub(super) fn only_looks(tell: &Tell) -> bool {
    let looks = |t: &Tell| matches!(t, Tell::Observe(_) | Tell::ResolvePoint(_) | Tell::ListPoints(_));
    looks(tell) || matches!(tell, Tell::InspectDisk(_) | Tell::InspectBranch(_) | Tell::CheckInstance(_))
}

impl Coordinator {
    /// Everything that is stored, as of one moment.
    ///
    /// # Errors
    /// The store's.
    pub async fn whole_store(&self) -> Result<Listing, StoreError> {
        self.store.list("").await
    }

    /// Asks a proxy what it has, until it has said so or its session has ended; takes over what is newer.
    pub(super) fn observe(self: &Arc<Self>, proxy: Proxy, epoch: u64) {
        let coordinator = self.clone();
        tokio::spawn(async move {
            while coordinator.sessions.is_current(&proxy.uid, epoch) && !*coordinator.closing().borrow() {
                let ask = Tell::Observe(v1::Observe {});
                match coordinator.command(&proxy, "", "", ask, Duration::ZERO, ANSWER).await {
                    Ok(Outcome::Observed(state)) => match coordinator.take_over(&proxy, state).await {
                        Ok(()) => return,
                        Err(error) => tracing::warn!(%error, proxy = proxy.id, "what it has is not taken over yet"),
                    },
                    Ok(other) => {
                        let message = format!("cannot say what it has: {other:?}; is it of an older version?");
                        coordinator.tell(Severity::Error, "restore", &proxy.name().to_string(), &message);
                        return;
                    }
                    Err(error) => tracing::warn!(%error, proxy = proxy.id, "it does not say what it has"),
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    async fn take_over(self: &Arc<Self>, proxy: &Proxy, state: v1::DesiredState) -> Result<(), Problem> {
        let all = {
            let mut observed = self.observed.lock().expect("nothing panics while it holds this");
            observed.retain(|o| o.proxy.uid != proxy.uid);
            observed.push(Observed { proxy: proxy.clone(), state });
            observed.clone()
        };
        let now = self.clock.wall_ns();
        let found = self
            .change_always(|model, txn| {
                let Some(restored) = &model.restored else { return Ok(Vec::new()) };
                let mut next = Restored { seen: restored.seen.clone(), ..restored.clone() };
                if restored.observing {
                    let settle = unseen(model, restored).all(|p| p.uid == proxy.uid);
                    adopt(model, &all, settle, &self.keys, now, &mut next, txn);
                } else {
                    late(model, all.last().expect("it has just been put there"), &mut next, now, txn);
                }
                next.seen.retain(|uid| *uid != proxy.uid);
                next.seen.push(proxy.uid.clone());
                let new = next.findings.iter().filter(|f| !restored.findings.contains(f)).cloned().collect();
                txn.put(Object::Restored(next));
                Ok::<Vec<String>, Problem>(new)
            })
            .await?;
        for finding in found {
            self.tell(Severity::Warning, "restore", &proxy.name().to_string(), &finding);
        }
        // Once confirmed: it is told now.
        self.converge(&self.model(), proxy, true);
        Ok(())
    }

    /// Where a restore stands.
    pub fn restore_state(&self) -> v1::Restore {
        let model = self.model();
        let Some(restored) = &model.restored else { return v1::Restore::default() };
        let observed = self.observed.lock().expect("nothing panics while it holds this");
        let ended = restored.observing.then(|| ended(&model, &observed).map(|g| g.name().to_string()).collect());
        v1::Restore {
            restored: true,
            observing: restored.observing,
            backup_time_ns: restored.backup_ns,
            restore_time_ns: restored.restored_ns,
            findings: restored.findings.clone(),
            unseen: unseen(&model, restored).map(|p| p.name().to_string()).collect(),
            ended: ended.unwrap_or_default(),
        }
    }

    /// From now on proxies are told what to be.
    ///
    /// # Errors
    /// It was not restored, or is confirmed already; proxies have not been heard, and nobody said to go on without them.
    pub async fn confirm_restore(self: &Arc<Self>, without_unseen: bool) -> Result<v1::Restore, Problem> {
        let observed = self.observed.lock().expect("nothing panics while it holds this").clone();
        let now = self.clock.wall_ns();
        self.change_always(|model, txn| {
            let restored = model.restored.as_ref().filter(|r| r.observing);
            let nothing =
                || Problem::state("the coordinator", "not waiting for a confirmation", "nothing is to be done");
            let restored = restored.ok_or_else(nothing)?;
            let missing: Vec<String> = unseen(model, restored).map(|p| format!("\"{}\"", p.id)).collect();
            if !missing.is_empty() && !without_unseen {
                let state = format!("still without word from {}", missing.join(", "));
                return Err(Problem::state("the coordinator", state, "bring them back, or say --without-unseen"));
            }
            let mut next = Restored { observing: false, ..restored.clone() };
            if !missing.is_empty() {
                adopt(model, &observed, true, &self.keys, now, &mut next, txn);
            }
            for one in &observed {
                for (_, name) in unknown(model, one) {
                    next.note(nobody_knows(&one.proxy, name));
                }
            }
            for group in ended(model, &observed) {
                next.note(format!("group \"{}\": ended since; forgotten", group.id));
                model.disks_of(group).for_each(|d| txn.delete(Object::Disk(d.clone())));
                model.views_of(group).for_each(|v| txn.delete(Object::View(v.clone())));
                txn.delete(Object::Group(group.clone()));
            }
            txn.put(Object::Restored(next));
            Ok(())
        })
        .await?;
        self.tell(
            Severity::Warning,
            "restore",
            &format!("tenants/{DEFAULT_TENANT}"),
            "the restored state is confirmed",
        );
        self.drop_half_made_views();
        self.name_exports().await;
        Ok(self.restore_state())
    }

    /// Views that were taken over, or opened by the desired state, get the exports that their targets report.
    pub(super) async fn name_exports(self: &Arc<Self>) {
        let found: Vec<View> = {
            let model = self.model();
            let live = self.live.lock().expect("nothing panics while it holds this");
            let exports = |v: &View| {
                let group = model.group(&v.group_name()).ok()?;
                let reported = live.streams.get(&group.uid)?.views.get(&v.proxy_name())?;
                let exports: Vec<_> = reported.exports.iter().map(convert::export_from_proto).collect();
                (!exports.is_empty()).then(|| View { exports, version: v.version + 1, ..v.clone() })
            };
            model.views.values().filter(|v| v.open && v.exports.is_empty()).filter_map(exports).collect()
        };
        let named = self
            .change(|model, txn| {
                let same = |v: &&View| model.view(&v.group_name(), &v.id).is_ok_and(|old| old.version + 1 == v.version);
                found.iter().filter(same).for_each(|v| txn.put(Object::View(v.clone())));
                Ok(())
            })
            .await;
        if let Err(error) = named {
            tracing::warn!(%error, "exports of views are not named yet");
        }
    }
}

fn nobody_knows(proxy: &Proxy, group: &str) -> String {
    format!("\"{}\" has group \"{group}\", which nobody knows; it is left as it is", proxy.id)
}

/// A proxy that comes only once all has been confirmed: what it has is behind decisions made since, but generations only
/// rise, and groups that nobody knows are named.
fn late(model: &Model, observed: &Observed, restored: &mut Restored, now_ns: u64, txn: &mut crate::model::Txn) {
    let proxy = &observed.proxy;
    let sources = observed.state.sources.iter();
    let targets = observed.state.targets.iter();
    let said = sources
        .map(|s| (&s.stream_uid, &s.name, s.disks.iter().map(|d| d.generation).max()))
        .chain(targets.map(|t| (&t.stream_uid, &t.name, t.disks.iter().map(|d| d.generation).max())));
    let mut longer = std::collections::BTreeMap::new();
    for said in &observed.state.targets {
        let policy = model.group_by_uid(&said.stream_uid).and_then(|g| model.policy_of(g));
        let Some(policy) = policy.filter(|p| p.promises.retention_s < said.retention_s) else { continue };
        let kept = longer.entry(policy.id.clone()).or_insert_with(|| policy.clone());
        kept.promises.retention_s = kept.promises.retention_s.max(said.retention_s);
    }
    for policy in longer.into_values() {
        // What the target keeps is not given up by an older word.
        restored.note(format!("policy \"{}\": \"{}\" keeps {} s", policy.id, proxy.id, policy.promises.retention_s));
        txn.put(Object::Policy(Policy { version: policy.version + 1, updated_ns: now_ns, ..policy }));
    }
    for (uid, name, generation) in said {
        let name = Name::new(&proxy.tenant, Kind::Group, name);
        let back = model.stream(uid).is_some_and(|(_, way)| way == crate::objects::Way::Back);
        match model.group_by_uid(uid) {
            None if back => {}
            None => restored.note(nobody_knows(proxy, &name.id)),
            Some(group) if generation.unwrap_or(0) > group.generation => {
                let generation = generation.unwrap_or(0);
                restored.note(format!("group \"{}\": generation {generation} at \"{}\"", group.id, proxy.id));
                let version = group.version + 1;
                txn.put(Object::Group(Group { version, updated_ns: now_ns, generation, ..group.clone() }));
            }
            Some(_) => {}
        }
    }
}
