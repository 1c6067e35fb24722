//! Looks at everything a few times a second: conditions begin and end, the first complete point makes a group
//! protected, silence counts towards the RPO, expired tokens go.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::Severity;
use tokio::time::{MissedTickBehavior, interval};

use super::Coordinator;
use crate::live::Live;
use crate::model::Model;
use crate::objects::{Group, GroupPhase, Object, Way};
use crate::reverse::newest_of_all;
use crate::rpo::Alarm;
use crate::status::Finding;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// Looks between two sweeps of what has expired.
const SWEEP_EVERY: u32 = 240;

impl Coordinator {
    pub(super) async fn watch_over(self: Arc<Self>) {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut closing = self.closing();
        let mut minute = self.minute();
        for round in 1u32.. {
            let ends = tokio::select! {
                _ = tick.tick() => false,
                _ = closing.wait_for(|c| *c) => true,
            };
            if ends {
                return self.keep_rpo(minute).await;
            }
            let model = self.model();
            self.age(&model);
            if self.minute() != minute {
                self.keep_rpo(minute).await;
                minute = self.minute();
            }
            self.find_conditions(&model);
            self.find_complete(&model).await;
            self.end_leftovers(&model);
            if model.views.values().any(|v| v.open && v.exports.is_empty()) {
                self.name_exports().await;
            }
            self.further_rotation(&model);
            self.further_keys(&model).await;
            if round % SWEEP_EVERY == 1 {
                self.sweep(&model).await;
            }
        }
    }

    fn age(&self, model: &Model) {
        let now = self.clock.mono_ns();
        let mut live = self.live.lock().expect("nothing panics while it holds this");
        let Live { streams, .. } = &mut *live;
        let both = |g| [Way::Forth, Way::Back].map(|way| (g, way));
        for (group, way) in model.groups.values().flat_map(both) {
            let Some(stream) = group.stream(way).and_then(|uid| streams.get_mut(uid)) else { continue };
            if way == Way::Forth && group.phase.is_failed_over() {
                stream.rpo.clear();
                stream.alarm = Alarm::default();
                continue;
            }
            stream.rpo.silence(now);
            let Some(policy) = model.policy_of(group) else { continue };
            let p = &policy.promises;
            if way == Way::Forth && group.pause.is_some() {
                // It grows, as is meant; from when it is resumed on it counts again.
                stream.alarm = Alarm::default();
                continue;
            }
            let above = stream.rpo.shown(now, p.rpo_target_us).is_some_and(|shown| shown.now_us > p.rpo_target_us);
            stream.alarm.update(now, above, p.warn_after_ms, p.clear_after_ms);
        }
        live.retain(|uid| model.stream(uid).is_some(), |uid| model.proxy_by_uid(uid).is_some());
    }

    /// The minute that it is, by the wall clock: its beginning in seconds since the Unix epoch.
    pub(super) fn minute(&self) -> u64 {
        let seconds = self.clock.wall_ns() / 1_000_000_000;
        seconds - seconds % crate::history::MINUTE.0
    }

    /// Writes down what was seen in the minute that has ended.
    async fn keep_rpo(&self, minute: u64) {
        let model = self.model();
        let buckets: Vec<(String, crate::history::Bucket)> = {
            let mut live = self.live.lock().expect("nothing panics while it holds this");
            let target = |uid: &str| {
                let policy = model.group_by_uid(uid).and_then(|g| model.policy_of(g));
                policy.map_or(u64::MAX, |p| p.promises.rpo_target_us)
            };
            // What is kept is kept by group: a reverse stream is gone with its failback.
            let own = live.streams.iter_mut().filter(|(uid, _)| model.group_by_uid(uid).is_some());
            let taken = own.filter_map(|(uid, s)| Some((uid.clone(), s.rpo.take(target(uid))?)));
            taken.collect()
        };
        let history = self.history.clone();
        match tokio::task::spawn_blocking(move || history.add(minute, &buckets)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::error!(error = %e, "the RPO of the last minute is not kept"),
            Err(e) => tracing::error!(error = %e, "the RPO of the last minute is not kept"),
        }
    }

    fn find_conditions(&self, model: &Model) {
        let found: Vec<(String, Vec<Finding>)> = self.look(|scene, _| {
            let groups = model.groups.values().map(|g| (g.name().to_string(), scene.conditions(g)));
            let proxies = model.proxies.values().map(|p| (p.name().to_string(), scene.proxy_conditions(p)));
            groups.chain(proxies).collect()
        });
        let wall = self.clock.wall_ns();
        let found = found.into_iter().chain(super::certificates::overdue(model, wall));
        let found: Vec<_> = found.chain(self.ending_authorities(wall)).collect();
        let mut told = Vec::new();
        {
            let mut tracker = self.tracker.lock().expect("nothing panics while it holds this");
            tracker.retain(|subject| found.iter().any(|(s, _)| s == subject));
            for (subject, findings) in &found {
                let new = tracker.update(subject, findings, wall);
                told.extend(new.into_iter().map(|(severity, message)| (severity, subject, message)));
            }
        }
        for (severity, subject, message) in told {
            self.tell(severity, "condition", subject, &message);
        }
    }

    async fn find_complete(self: &Arc<Self>, model: &Model) {
        let now_complete: Vec<Group> = {
            let live = self.live.lock().expect("nothing panics while it holds this");
            let complete = |g: &&Group| {
                g.phase == GroupPhase::Protecting
                    && !g.complete
                    && live.streams.get(&g.uid).is_some_and(|s| newest_of_all(model, g, s).is_some())
            };
            model.groups.values().filter(complete).cloned().collect()
        };
        for group in now_complete {
            let name = group.name();
            let marked = self
                .change(|model, txn| {
                    let Ok(old) = model.group(&name) else { return Ok(()) };
                    txn.put(Object::Group(Group { complete: true, version: old.version + 1, ..old.clone() }));
                    Ok(())
                })
                .await;
            match marked {
                Ok(()) => self.tell(Severity::Info, "phase", &name.to_string(), "protected: a complete point is held"),
                Err(e) => tracing::error!(group = %name, error = %e, "cannot record that it is protected"),
            }
        }
    }

    async fn sweep(self: &Arc<Self>, model: &Model) {
        self.sweep_certificates(model).await;
        let now = self.clock.wall_ns();
        let expired: Vec<_> = model.tokens.values().filter(|t| t.expire_time_ns <= now).cloned().collect();
        if expired.is_empty() {
            return;
        }
        let swept = self
            .change(|model, txn| {
                let still = expired.into_iter().filter(|t| model.tokens.contains_key(&t.id));
                still.for_each(|t| txn.delete(Object::Token(t)));
                Ok(())
            })
            .await;
        if let Err(e) = swept {
            tracing::error!(error = %e, "cannot forget expired tokens");
        }
    }
}
