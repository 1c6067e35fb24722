//! Failing back: verbs about the reverse stream, what is waited for in them, and what is left of those that are over. What
//! the verbs then do is in [`crate::failover`].

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{self, Severity};
use tokio::time::{Instant, sleep};

use super::Coordinator;
use super::verbs::Asking;
use crate::failover::{self, Awaited, Ends, Failover, Reply, Spec, Verb};
use crate::machine::Role;
use crate::model::Model;
use crate::names::Name;
use crate::objects::{Group, GroupPhase, Leftover, Object, Proxy, new_uid};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::Asked;
use crate::reverse;

/// Between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(50);
/// How long the source is asked how far it is before that is recorded.
const MERGE_SHOWN: Duration = Duration::from_secs(5);
/// How long the source may take to say how far it is: before it begins, it puts aside what only its disks hold.
const MERGE_ANSWER: Duration = Duration::from_secs(600);
/// After a restart of the coordinator or of the source: how long that has to come back.
const MERGE_CONNECT: Duration = Duration::from_secs(15);
/// How long a proxy may take to end what is left of a failback.
const END_ANSWER: Duration = Duration::from_secs(30);

impl Coordinator {
    /// Checks a verb about the reverse stream of a group's failback, and begins with it.
    ///
    /// # Errors
    /// It does not fit the state; a proxy is not there, or takes no stream; it is too early to switch or to commit.
    pub async fn start_back(
        self: &Arc<Self>,
        name: &Name,
        spec: Spec,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &spec.reason)?;
        if spec.verb == Verb::SwitchFailback {
            self.check_machines(name, Role::Source).await?;
        }
        let now = self.clock.wall_ns();
        let uid = new_uid();
        self.begin(name, spec.verb, asking, request, |model| {
            let group = model.group(name)?;
            let ends = self.ends_of(group, spec.verb);
            let view = failover::check_back(spec.verb, group, &ends)?;
            let view = model.view(name, &view)?;
            let disks: Vec<_> = model.disks_of(group).collect();
            let reverse = group.reverse.as_ref().map_or(uid.as_str(), |reverse| reverse.stream_uid.as_str());
            let after = match spec.verb {
                Verb::SwitchFailback => self.durable(model, group)?,
                _ => 0,
            };
            let checked = match spec.verb {
                Verb::CommitFailback => "the group is protected again".to_owned(),
                Verb::SwitchFailback => format!("what is written to \"{}\" is at the source", view.id),
                _ => format!("the group runs from its view \"{}\"", view.id),
            };
            let work = Failover::back(spec.clone(), &disks, view, (reverse, after), checked, now);
            if spec.verb != Verb::SwitchFailback {
                return Ok(work);
            }
            let (machines, fences) = self.machines_for(model, group, spec.verb)?;
            Ok(work.with_machines(machines, fences, view.exports.clone()))
        })
        .await
    }

    /// Checks that a group's failback can be undone, and begins with it. `confirm_name`: the group's id, typed, if the
    /// source is not to be asked.
    ///
    /// # Errors
    /// It does not fit the state; the target is not there; the source is not, and nobody has said that it is off.
    pub async fn undo_failback(
        self: &Arc<Self>,
        name: &Name,
        spec: Spec,
        confirm_name: &str,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &spec.reason)?;
        self.check_machines(name, Role::Replica).await?;
        let now = self.clock.wall_ns();
        self.begin(name, spec.verb, asking, request, |model| {
            self.check_failover(model, name, &spec, confirm_name)?;
            let group = model.group(name)?;
            let view = model.view(name, group.phase.view().unwrap_or_default())?;
            let disks: Vec<_> = model.disks_of(group).collect();
            let lease = self.lease_of(model, group);
            let checked = format!("what was written to \"{}\" is kept", view.id);
            let work = Failover::new(spec.clone(), &disks, (&view.id, ""), 0, lease, checked, now);
            let (machines, fences) = self.machines_for(model, group, spec.verb)?;
            let work = work.reopening(view.point.clone()).with_machines(machines, fences, Vec::new());
            let asked = self.fit_machines(model, group, &[Role::Source]).is_ok();
            Ok(if asked { work } else { work.with_source_unasked() })
        })
        .await
    }

    fn ends_of(&self, group: &Group, verb: Verb) -> Ends {
        self.look(|scene, _| {
            let connected = |p: Option<&Proxy>| p.is_some_and(|p| self.sessions.connected(&p.uid));
            let (source, target) = (scene.model.source_of(group), scene.model.target_of(group));
            let missing =
                matches!(verb, Verb::SwitchFailback | Verb::CommitFailback).then(|| scene.missing_back(group));
            Ends {
                source: connected(source),
                target: connected(target),
                source_keeps: source.is_some_and(|p| !p.data_address.is_empty()),
                missing: missing.flatten(),
            }
        })
    }

    /// The newest record that a group's target holds.
    fn durable(&self, model: &Model, group: &Group) -> Result<u64, Problem> {
        let live = self.live.lock().expect("nothing panics while it holds this");
        let report = live.streams.get(&group.uid).and_then(|s| s.target.as_ref());
        let detail = "it has not reported what it holds; try again".to_owned();
        let proxy = model.target_of(group).map_or_else(|| group.target.clone(), |p| p.name().to_string());
        report.map(|(_, r)| r.durable_seq).ok_or(Problem::Unreachable { proxy, detail })
    }

    /// Waits until proxies report what is awaited, for a bounded time.
    pub(super) async fn await_report(&self, group: &Group, what: Awaited, within: Duration) -> Reply {
        let until = Instant::now() + within;
        loop {
            let model = self.model();
            let found = match (what, model.source_of(group)) {
                (Awaited::Reverse, _) => {
                    let live = self.live.lock().expect("nothing panics while it holds this");
                    reverse::begun(&model, &live, group)
                }
                (_, Some(source)) if self.sessions.connected(&source.uid) => {
                    // So that what it is told is what the model says now.
                    self.converge(&model, source, false);
                    let told = self.sessions.desired_version(&source.uid);
                    let live = self.live.lock().expect("nothing panics while it holds this");
                    match what {
                        // Told nothing: its session has just ended.
                        _ if told == 0 => Err("it is not connected".to_owned()),
                        Awaited::Held => reverse::held(&model, &live, group, told),
                        _ => reverse::started(&model, &live, group, told),
                    }
                }
                _ => Err("it is not connected".to_owned()),
            };
            match found {
                Ok(()) => return Reply::Seen,
                Err(instead) if Instant::now() >= until => return Reply::NotSeen(instead),
                Err(_) => sleep(POLL).await,
            }
        }
    }

    /// Has the source write what the reverse stream holds to its disks, until it has, or for a while.
    pub(super) async fn merge(&self, name: &Name, group: &Group, merge: v1::MergeStream) -> Reply {
        let until = Instant::now() + MERGE_SHOWN;
        loop {
            let model = self.model();
            let Some(source) = model.source_of(group) else {
                return Reply::Unreachable("that proxy does not exist any more".into());
            };
            let tell = Tell::MergeStream(merge.clone());
            let asked = self.command(source, &name.id, "merge", tell, MERGE_CONNECT, MERGE_ANSWER);
            let answer = tokio::select! {
                answer = asked => answer.map_err(|e| e.to_string()),
                () = self.gone(source) => Err("not connected".to_owned()),
                () = self.cancelled(name) => return Reply::NotSeen("given up".to_owned()),
            };
            let answer = match answer {
                Ok(outcome) => outcome,
                Err(e) => return Reply::Unreachable(format!("\"{}\": {e}", source.id)),
            };
            let goes_on = matches!(&answer, Outcome::Merged(merged) if !merged.complete);
            if !goes_on || Instant::now() >= until {
                return Reply::Answer(answer);
            }
            sleep(POLL).await;
        }
    }

    /// Until a proxy has not been connected for a while.
    async fn gone(&self, proxy: &Proxy) {
        let mut left = Instant::now() + MERGE_CONNECT;
        while Instant::now() < left {
            if self.sessions.connected(&proxy.uid) {
                left = Instant::now() + MERGE_CONNECT;
            }
            sleep(4 * POLL).await;
        }
    }

    /// Tells proxies that are there to end what is left of failbacks that are over.
    pub(super) fn end_leftovers(self: &Arc<Self>, model: &Model) {
        let ready = |g: &&Group| !g.leftovers.is_empty() && g.phase.operation().is_none();
        for group in model.groups.values().filter(ready) {
            let name = group.name();
            let connected = |p: Option<&Proxy>| p.filter(|p| self.sessions.connected(&p.uid)).cloned();
            let (source, target) = (connected(model.source_of(group)), connected(model.target_of(group)));
            for leftover in group.leftovers.clone() {
                let stream_uid = leftover.stream_uid.clone();
                let ends = [
                    (target.clone().filter(|_| leftover.at_target), {
                        Tell::Unprotect(v1::Unprotect { stream_uid: stream_uid.clone() })
                    }),
                    (source.clone().filter(|_| leftover.at_source), Tell::DropStream(v1::DropStream { stream_uid })),
                ];
                for (at_target, (proxy, tell)) in [true, false].into_iter().zip(ends) {
                    let Some(proxy) = proxy else { continue };
                    let key = (leftover.stream_uid.clone(), at_target);
                    if self.ending.lock().expect("nothing panics while it holds this").insert(key.clone()) {
                        tokio::spawn(self.clone().end_leftover(name.clone(), proxy, key, tell));
                    }
                }
            }
        }
    }

    async fn end_leftover(self: Arc<Self>, name: Name, proxy: Proxy, key: (String, bool), tell: Tell) {
        match self.command(&proxy, "", "leftover", tell, Duration::ZERO, END_ANSWER).await {
            Ok(Outcome::Done(_)) => {
                if let Err(error) = self.forget_leftover(&name, &key).await {
                    tracing::warn!(group = %name, %error, "what is left of a failback is ended, and still noted");
                }
                let message = format!("\"{}\" has ended what was left of an earlier failback", proxy.id);
                self.tell(Severity::Info, "failback", &name.to_string(), &message);
            }
            Ok(other) => {
                tracing::warn!(group = %name, proxy = proxy.id, ?other, "what is left of a failback stays");
                // It is asked again, but not all the time.
                sleep(END_ANSWER).await;
            }
            Err(error) => tracing::warn!(group = %name, proxy = proxy.id, %error, "what is left of a failback stays"),
        }
        self.ending.lock().expect("nothing panics while it holds this").remove(&key);
    }

    async fn forget_leftover(
        self: &Arc<Self>,
        name: &Name,
        (stream_uid, at_target): &(String, bool),
    ) -> Result<(), Problem> {
        self.change(|model, txn| {
            let Ok(group) = model.group(name) else { return Ok(()) };
            let mut group = Group { version: group.version + 1, ..group.clone() };
            for leftover in group.leftovers.iter_mut().filter(|l| l.stream_uid == *stream_uid) {
                match at_target {
                    true => leftover.at_target = false,
                    false => leftover.at_source = false,
                }
            }
            group.leftovers.retain(|Leftover { at_target, at_source, .. }| *at_target || *at_source);
            txn.put(Object::Group(group));
            Ok(())
        })
        .await
    }
}

/// The phase of a group while this verb is being done on it.
pub(super) fn phase_during(work: &Failover, group: &Group, operation: &str) -> GroupPhase {
    let operation = operation.to_owned();
    match (work.spec.verb, &group.phase) {
        (Verb::CommitFailback | Verb::UndoFailback, GroupPhase::FailedBack { view, after }) => {
            GroupPhase::Settling { operation, view: view.clone(), after: *after }
        }
        (verb, _) if verb.is_of_failed_over() || verb.is_back() => {
            GroupPhase::Changing { operation, view: work.facts.leaves.clone() }
        }
        _ => GroupPhase::FailingOver { operation },
    }
}
