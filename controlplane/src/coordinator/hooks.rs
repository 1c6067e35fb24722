//! Events are kept over a restart, and given to hooks: each hook one after the other in their order, again until it is
//! taken or given up. How far it has got is recorded after it has taken one: after a crash it may get one again, by the
//! same id.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{Event, Severity};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::Coordinator;
use crate::hooks::Hook;

/// Between two writes of new events.
const KEEP_EVERY: Duration = Duration::from_millis(250);
/// Pause after the first try that failed; it doubles …
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// … up to this.
const LAST_PAUSE: Duration = Duration::from_secs(60);

impl Coordinator {
    /// Writes new events, until the coordinator ends.
    pub(super) async fn keep_events(self: Arc<Self>) {
        let mut tick = interval(KEEP_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut closing = self.closing();
        loop {
            let ends = tokio::select! {
                _ = tick.tick() => false,
                _ = closing.wait_for(|c| *c) => true,
            };
            let kept = *self.kept_events.borrow();
            let new = self.events_from(kept + 1, usize::MAX, |_| true);
            if let Some(newest) = new.last().map(|e| e.number) {
                let log = self.event_log.clone();
                match tokio::task::spawn_blocking(move || log.add(&new)).await {
                    Ok(Ok(())) => drop(self.kept_events.send_replace(newest)),
                    Ok(Err(error)) => tracing::error!(%error, "events are not kept"),
                    Err(error) => tracing::error!(%error, "events are not kept"),
                }
            }
            if ends {
                return;
            }
        }
    }

    /// Gives events to a hook, until the coordinator ends.
    pub(super) async fn feed_hook(self: Arc<Self>, hook: Hook) {
        let mut closing = self.closing();
        tokio::select! {
            () = self.feed(&hook) => {}
            _ = closing.wait_for(|c| *c) => {}
        }
    }

    async fn feed(self: &Arc<Self>, hook: &Hook) {
        let (log, name) = (self.event_log.clone(), hook.name.clone());
        let cursor = tokio::task::spawn_blocking(move || log.cursor(&name)).await;
        // A new hook begins with what happens from now on.
        let mut cursor = match cursor {
            Ok(Ok(Some(cursor))) => cursor,
            _ => {
                let newest = *self.kept_events.borrow();
                self.got(hook, newest).await;
                newest
            }
        };
        let mut feed = self.event_feed();
        let mut kept = self.kept_events.subscribe();
        loop {
            if !self.keeps_events_after(cursor) {
                let oldest = self.events_from(0, 1, |_| true).first().map_or(cursor, |e| e.number - 1);
                let lost = oldest.saturating_sub(cursor);
                self.tell_of(hook, Severity::Error, &format!("it is too far behind: {lost} events are passed over"));
                cursor = oldest;
            }
            let newest = *kept.borrow_and_update();
            // Only what would be there after a restart: a number is never given to two events that a hook has had.
            let next = self.events_from(cursor + 1, 1, |e| e.number <= newest && hook.wants(e)).pop();
            match next {
                Some(event) => {
                    self.give(hook, &event).await;
                    cursor = event.number;
                    self.got(hook, cursor).await;
                }
                None => {
                    cursor = cursor.max(newest);
                    tokio::select! {
                        changed = kept.changed() => if changed.is_err() { return },
                        told = feed.recv() => if matches!(told, Err(RecvError::Closed)) { return },
                    }
                }
            }
        }
    }

    /// Until the hook has taken it, or it is given up.
    async fn give(&self, hook: &Hook, event: &Event) {
        // The same again after a restart, and never another's, also when numbers begin anew with a lost file.
        let id = format!("{:x}-{}", event.time_ns, event.number);
        let until = Instant::now() + hook.retry;
        let mut pause = FIRST_PAUSE;
        let mut told = false;
        loop {
            let Err(why) = hook.deliver(event, &id).await else {
                if told {
                    self.tell_of(hook, Severity::Info, "it takes events again");
                }
                return;
            };
            if Instant::now() + pause > until {
                let message = format!("event {} is given up: {why}", event.number);
                return self.tell_of(hook, Severity::Error, &message);
            }
            if !told {
                self.tell_of(hook, Severity::Warning, &format!("event {} is tried again: {why}", event.number));
                told = true;
            }
            sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    async fn got(&self, hook: &Hook, cursor: u64) {
        let (log, name) = (self.event_log.clone(), hook.name.clone());
        let kept = tokio::task::spawn_blocking(move || log.set_cursor(&name, cursor)).await;
        if !matches!(kept, Ok(Ok(()))) {
            tracing::warn!(hook = %hook.name, "how far it has got cannot be kept: it may get events again");
        }
    }

    fn tell_of(&self, hook: &Hook, severity: Severity, message: &str) {
        let message = format!("hook \"{}\": {message}", hook.name);
        self.tell(severity, "hook", &crate::names::tenant(crate::names::DEFAULT_TENANT), &message);
    }
}
