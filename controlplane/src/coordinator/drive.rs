//! Operations being done: what the machine in [`crate::failover`] says, recorded and carried out.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{self, Severity};
use tokio::time::{Instant, sleep};

use super::Coordinator;
use super::machines::keep_machines;
use crate::audit;
use crate::convert;
use crate::failover::{self, Action, Choice, Failover, Reply, Side, State, StepName, StepState, Verb};
use crate::model::{Model, Txn};
use crate::names::{Kind, Name};
use crate::objects::{Group, Object, Operation, View, ViewKind, Way, new_uid};
use crate::problem::Problem;
use crate::requests::Asked;

/// Before a change that the store refused is tried again.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// How long after a coordinator's start proxies that live have come to it.
pub(super) const PROXIES_BACK: Duration = Duration::from_secs(15);
/// Between two looks at how far the target is.
const DRAIN_POLL: Duration = Duration::from_millis(25);

impl Coordinator {
    /// Goes on with what an earlier life of the coordinator had begun.
    pub(super) fn resume_operations(self: &Arc<Self>) {
        for operation in self.model().operations.values().filter(|o| o.ended_ns == 0) {
            let subject = Name::new(&operation.tenant, Kind::Group, &operation.group).to_string();
            self.tell(Severity::Warning, "operation", &subject, &format!("going on with {}", operation.name()));
            tokio::spawn(self.clone().drive(operation.name(), true));
        }
    }

    /// Does an operation to its end; one that an earlier life had begun is `resumed`.
    pub(super) async fn drive(self: Arc<Self>, name: Name, resumed: bool) {
        let by_itself = audit::Caller::new(&name.tenant, audit::ITSELF, &name.to_string());
        audit::CALLER.scope(by_itself, self.drive_on(name, resumed)).await;
    }

    async fn drive_on(self: Arc<Self>, name: Name, resumed: bool) {
        let mut reply = None;
        let mut closing = self.closing();
        loop {
            let recorded = self.record(&name, reply.clone()).await;
            let (action, group) = match recorded {
                Ok(Some(next)) => next,
                Ok(None) => return,
                Err(e) => {
                    tracing::error!(operation = %name, error = %e, "cannot record a step; trying again");
                    tokio::select! {
                        () = sleep(STORE_RETRY) => continue,
                        _ = closing.wait_for(|c| *c) => return,
                    }
                }
            };
            tokio::select! {
                done = self.carry_out(&name, &group, action, resumed) => reply = Some(done),
                // The step stays recorded as running: the next life does it again.
                _ = closing.wait_for(|c| *c) => return,
            }
        }
    }

    /// Records what came of the last action and begins the next, in one commit. None once it has ended.
    async fn record(self: &Arc<Self>, name: &Name, reply: Option<Reply>) -> Result<Option<(Action, Group)>, Problem> {
        let now = self.clock.wall_ns();
        let (next, told) = self
            .change(move |model, txn| {
                let mut operation = model.operation(name)?.clone();
                if operation.ended_ns != 0 {
                    return Ok((None, Vec::new()));
                }
                let before = operation.work.clone();
                let group_name = Name::new(&name.tenant, Kind::Group, &operation.group);
                let mut group = model.group(&group_name)?.clone();
                let disks = disk_names(model, &group);
                if let Some(reply) = reply {
                    operation.work.apply(&mut group, &disks, reply, now);
                }
                let action = operation.work.begin(&mut group, now);
                if action == Action::Ended {
                    operation.ended_ns = now;
                }
                operation.version += 1;
                group.version += 1;
                group.updated_ns = now;
                let told = changes(&group_name, &before, &operation.work);
                keep_views(model, txn, &group, &operation);
                keep_machines(model, txn, &operation);
                txn.put(Object::Group(group.clone()));
                let ended = operation.ended_ns != 0;
                txn.put(Object::Operation(operation));
                Ok(((!ended).then_some((action, group)), told))
            })
            .await?;
        for (severity, subject, message) in told {
            self.tell(severity, "step", &subject, &message);
        }
        Ok(next)
    }

    async fn carry_out(&self, name: &Name, group: &Group, action: Action, resumed: bool) -> Reply {
        match action {
            Action::Record | Action::Ended => Reply::Nothing,
            Action::Wait { ms } => {
                // Cut short when it is given up: see `Failover::apply`.
                tokio::select! {
                    () = sleep(Duration::from_millis(ms)) => {}
                    () = self.cancelled(name) => {}
                }
                Reply::Nothing
            }
            Action::Machines(orders) => {
                let step = self.model().operation(name).ok().and_then(running_step).map_or("", StepName::as_str);
                self.order_all(&name.tenant, &name.id, step, &orders).await
            }
            Action::CatchUp { way, within_ms } => self.catch_up(group, way, Duration::from_millis(within_ms)).await,
            Action::Drain { way, seq, within_ms } => {
                self.drain(group, way, seq, Duration::from_millis(within_ms)).await
            }
            Action::Merge(merge) => self.merge(name, group, merge).await,
            Action::Await { what, within_ms } => {
                tokio::select! {
                    seen = self.await_report(group, what, Duration::from_millis(within_ms)) => seen,
                    () = self.cancelled(name) => Reply::NotSeen("given up".to_owned()),
                }
            }
            Action::Tell { side, command, connect_ms, answer_ms } => {
                let model = self.model();
                let proxy = match side {
                    Side::Source => model.source_of(group),
                    Side::Target => model.target_of(group),
                };
                let Some(proxy) = proxy else { return Reply::Unreachable("that proxy does not exist any more".into()) };
                let step = model.operation(name).ok().and_then(running_step).map_or("", StepName::as_str);
                // They were connected to the life before, and may be on their way: not there yet is not gone.
                let coming = if resumed { PROXIES_BACK.saturating_sub(self.clock.uptime()) } else { Duration::ZERO };
                let connect = Duration::from_millis(connect_ms).max(coming);
                let answer = Duration::from_millis(answer_ms);
                match self.command(proxy, &name.id, step, command, connect, answer).await {
                    Ok(outcome) => Reply::Answer(outcome),
                    Err(e) => Reply::Unreachable(format!("\"{}\": {e}", proxy.id)),
                }
            }
        }
    }

    /// Until somebody has asked that this operation be given up.
    pub(super) async fn cancelled(&self, name: &Name) {
        let given_up = |model: &Model| {
            let work = &model.operation(name).ok()?.work;
            (!work.cancelled_by.is_empty() && work.waits_for_cancel()).then_some(())
        };
        self.until(given_up).await;
    }

    /// Asks that an operation be given up.
    ///
    /// # Errors
    /// There is none of that name; it is too late.
    pub async fn cancel_operation(
        self: &Arc<Self>,
        name: &Name,
        by: &str,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        let now = self.clock.wall_ns();
        let (operation, asked) = self
            .change(|model, txn| {
                let mut operation = model.operation(name)?.clone();
                if request.done(model)?.is_some() {
                    return Ok((operation, false));
                }
                let before = operation.work.cancelled_by.clone();
                operation
                    .work
                    .cancel(by)
                    .map_err(|state| Problem::state(name, state, "it cannot be given up any more"))?;
                let asked = operation.work.cancelled_by != before;
                if asked {
                    operation.version += 1;
                    txn.put(Object::Operation(operation.clone()));
                }
                request.record(model, txn, now, &operation.uid);
                Ok((operation, asked))
            })
            .await?;
        if asked {
            let subject = Name::new(&name.tenant, Kind::Group, &operation.group).to_string();
            self.tell(Severity::Warning, "operation", &subject, &format!("{by} has asked that {name} be given up"));
        }
        Ok(convert::operation_to_proto(&self.model(), &operation))
    }

    /// Forgets an operation that has ended.
    ///
    /// # Errors
    /// There is none of that name; it has changed, or has not ended.
    pub async fn delete_operation(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let look = |model: &Model| {
            let old = model.operation(name)?;
            let hindrance =
                (old.ended_ns == 0).then(|| Problem::state(name, "being done", "wait for its end, or cancel it"));
            Ok((Object::Operation(old.clone()), old.uid.clone(), hindrance))
        };
        self.delete_object(name, etag, validate_only, request, look).await.map(drop)
    }

    /// Waits until a stream's keeper holds what had been captured when this began.
    async fn catch_up(&self, group: &Group, way: Way, within: Duration) -> Reply {
        let until = Instant::now() + within;
        let stands = || {
            let live = self.live.lock().expect("nothing panics while it holds this");
            let stream = live.streams.get(group.stream(way)?)?;
            Some((stream.source.as_ref()?.1.captured_seq, stream.target.as_ref()?.1.durable_seq))
        };
        let mut wanted = None;
        loop {
            let now = stands();
            // A coordinator that has just begun has not heard from them yet.
            wanted = wanted.or(now.map(|(captured, _)| captured));
            let behind = wanted.map(|seq: u64| seq.saturating_sub(now.map_or(0, |(_, durable)| durable)));
            match behind {
                Some(behind) if behind == 0 || Instant::now() >= until => return Reply::CaughtUp(behind),
                None if Instant::now() >= until => {
                    return Reply::Unreachable("its ends have not reported how far they are".to_owned());
                }
                _ => sleep(DRAIN_POLL).await,
            }
        }
    }

    /// Waits until a stream's keeper holds what had been captured, which is held.
    async fn drain(&self, group: &Group, way: Way, seq: u64, within: Duration) -> Reply {
        let model = self.model();
        let keeper = if way == Way::Forth { model.target_of(group) } else { model.source_of(group) };
        let (Some(target), Some(stream)) = (keeper, group.stream(way)) else { return Reply::Drained(0) };
        let until = Instant::now() + within;
        let ask =
            v1::ResolvePoint { stream_uid: stream.to_owned(), at: Some(convert::choice_to_proto(Choice::Latest)) };
        let mut newest = 0;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Reply::Drained(newest);
            }
            let asked = Tell::ResolvePoint(ask.clone());
            if let Ok(Outcome::Point(point)) = self.command(target, "", "drain", asked, Duration::ZERO, left).await {
                newest = point.seq.max(newest);
            }
            if newest >= seq {
                return Reply::Drained(newest);
            }
            sleep(DRAIN_POLL).await;
        }
    }

    /// An operation as it is, once it has ended or after `within`.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn wait_operation(&self, name: &Name, within: Duration) -> Result<v1::Operation, Problem> {
        let mut changes = self.model_changes();
        let mut closing = self.closing();
        let until = Instant::now() + within;
        loop {
            changes.mark_unchanged();
            let model = self.model();
            if model.has_ended(name)? || Instant::now() >= until || *closing.borrow() {
                return model.shown_operation(name);
            }
            tokio::select! {
                _ = tokio::time::timeout_at(until, changes.changed()) => {}
                _ = closing.wait_for(|c| *c) => {}
            }
        }
    }
}

pub(super) fn disk_names(model: &Model, group: &Group) -> Vec<(String, String)> {
    model.disks_of(group).map(|d| (d.uid.clone(), d.id.clone())).collect()
}

/// A view that is being left, or has been; and perhaps opened again.
fn left_view(left: &View, work: &Failover, state: StepState) -> View {
    let reopened = work.steps.iter().any(|s| s.name == StepName::ReopenView && s.state != StepState::Pending);
    let kept = state == StepState::Done && !reopened;
    let exports = match (kept, reopened) {
        (true, _) => Vec::new(),
        (false, true) => work.facts.exports.clone(),
        (false, false) => left.exports.clone(),
    };
    View { version: left.version + 1, closing: state == StepState::Running, open: !kept, kept, exports, ..left.clone() }
}

fn running_step(operation: &Operation) -> Option<StepName> {
    operation.work.steps.iter().find(|s| s.state == StepState::Running).map(|s| s.name)
}

/// The view objects follow the steps: recorded before they are opened, gone or kept once they are closed.
fn keep_views(model: &Model, txn: &mut Txn, group: &Group, operation: &Operation) {
    let work = &operation.work;
    let step = |name| work.steps.iter().find(|s| s.name == name).map(|s| s.state);
    if let Ok(left) = model.view(&group.name(), &work.facts.leaves) {
        // As long as it is not known to be deleted it can be named, and deleted later.
        if step(StepName::Discard) == Some(StepState::Done) {
            txn.delete(Object::View(left.clone()));
        } else if let Some(state) = step(StepName::LeaveView).filter(|s| *s != StepState::Pending) {
            txn.put(Object::View(left_view(left, work, state)));
        }
    }
    let old = model.view(&group.name(), &work.facts.view).ok();
    let begun = step(StepName::OpenView).is_some_and(|s| s != StepState::Pending);
    let stays = work.stays_open();
    let closed = matches!(step(StepName::CloseView), Some(StepState::Done | StepState::Skipped)) && !stays;
    let Some(point) = work.facts.point.clone().filter(|_| begun) else { return };
    if closed && !work.facts.reopens {
        if let Some(old) = old {
            txn.delete(Object::View(old.clone()));
        }
        return;
    }
    let view = View {
        uid: old.map_or_else(new_uid, |v| v.uid.clone()),
        tenant: group.tenant.clone(),
        group: group.id.clone(),
        id: work.facts.view.clone(),
        version: old.map_or(1, |v| v.version + 1),
        created_ns: old.map_or(group.updated_ns, |v| v.created_ns),
        kind: if work.spec.verb.is_trial() { ViewKind::Test } else { ViewKind::Failover },
        writable: true,
        point,
        disk_uids: work.facts.disks.clone(),
        exports: work.facts.exports.clone(),
        reason: work.spec.reason.clone(),
        open: (step(StepName::OpenView) == Some(StepState::Done) && !closed) || stays,
        // A test has that step before it; of others it is there once they are being undone.
        closing: step(StepName::CloseView).is_some_and(|s| s != StepState::Pending || work.state != State::Running)
            && !closed
            && !stays,
        kept: closed,
        request_id: String::new(),
    };
    txn.put(Object::View(view));
}

/// What to tell of a change of an operation.
fn changes(group: &Name, before: &Failover, after: &Failover) -> Vec<(Severity, String, String)> {
    let mut told = Vec::new();
    for step in &after.steps {
        let old = before.steps.iter().find(|s| s.name == step.name).map(|s| s.state);
        if old == Some(step.state) {
            continue;
        }
        let (severity, word) = match step.state {
            StepState::Done => (Severity::Info, "done"),
            StepState::Skipped => (Severity::Info, "skipped"),
            StepState::Failed => (Severity::Error, "failed"),
            StepState::Pending | StepState::Running => continue,
        };
        let detail = if step.detail.is_empty() { String::new() } else { format!(": {}", step.detail) };
        told.push((severity, group.to_string(), format!("{} {word}{detail}", step.name.as_str())));
    }
    if before.state != after.state {
        let message = match (after.state, &after.error) {
            (failover::State::Done, _) => (Severity::Warning, done_word(after.spec.verb).to_owned()),
            (failover::State::Failed, Some(e)) => {
                let (verb, step) = (after.spec.verb.as_str(), e.step.as_str());
                (Severity::Error, format!("{verb} failed at {step}: {}; {}", e.message, e.remedy))
            }
            _ => return told,
        };
        told.push((message.0, group.to_string(), message.1));
    }
    told
}

fn done_word(verb: Verb) -> &'static str {
    match verb {
        Verb::Failover | Verb::PlannedFailover => "failed over",
        Verb::UndoFailover => "its failover is undone: it runs at its source again",
        Verb::ChangePoint => "it runs from another point",
        Verb::Failback => "failing back: what is written to its view is protected to its source",
        Verb::CancelFailback => "its failback is over: it stays failed over",
        Verb::SwitchFailback => "failed back: it runs at its source, with all that was written to its view",
        Verb::CommitFailback => "its failback is committed",
        Verb::UndoFailback => "its failback is undone: it runs from its view, as that was left",
        Verb::TestFailover => "tested: its machines start from there and answer",
    }
}
