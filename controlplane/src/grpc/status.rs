//! Status: now, and as it changes.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::watch_response::Update;
use afterimage_wire::v1::{self, *};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::auth::Scope;
use crate::coordinator::Coordinator;
use crate::names::{Kind, Name, tenant as tenant_name};
use crate::paging::{self, Page};
use crate::problem::Problem;

/// Updates that a watcher may be behind before it is waited for.
const WATCH_OUTBOX: usize = 16;
/// Events read at once.
const CATCH_UP: usize = 256;
/// Least time between two states that one watcher is sent because something has changed.
const BURST: Duration = Duration::from_millis(50);

/// The status service.
#[derive(Clone)]
pub struct StatusService(pub Arc<Coordinator>);

/// What a caller wants to see: a tenant, or one of its groups.
#[derive(Clone)]
struct Wanted {
    tenant: String,
    group: Option<Name>,
}

impl Wanted {
    fn parse(scope: &Scope, parent: &str) -> Result<Self, Problem> {
        if parent.matches('/').count() > 1 {
            let group = scope.name("parent", Kind::Group, parent)?;
            return Ok(Self { tenant: group.tenant.clone(), group: Some(group) });
        }
        Ok(Self { tenant: scope.tenant("parent", parent)?, group: None })
    }

    /// Whether an event about this subject is to be seen.
    fn fits(&self, subject: &str) -> bool {
        match &self.group {
            Some(group) => is_under(subject, &group.to_string()),
            None => is_under(subject, &tenant_name(&self.tenant)),
        }
    }
}

fn is_under(subject: &str, name: &str) -> bool {
    subject.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The proxies of a tenant as they are shown.
pub(super) fn proxies(coordinator: &Coordinator, tenant: &str) -> Vec<v1::Proxy> {
    coordinator.look(|scene, since| {
        let own = scene.model.proxies.values().filter(|p| p.tenant == tenant);
        own.map(|p| scene.proxy(p, coordinator.sessions.desired_version(&p.uid), since)).collect()
    })
}

fn snapshot(coordinator: &Coordinator, wanted: &Wanted) -> Result<StatusSnapshot, Problem> {
    let groups = coordinator.look(|scene, since| match &wanted.group {
        Some(name) => Ok(vec![scene.group_status(scene.model.group(name)?, since)]),
        None => {
            let own = scene.model.groups.values().filter(|g| g.tenant == wanted.tenant);
            Ok(own.map(|g| scene.group_status(g, since)).collect())
        }
    })?;
    Ok(StatusSnapshot {
        time_ns: coordinator.clock.wall_ns(),
        coordinator: Some(coordinator.status()),
        groups,
        proxies: proxies(coordinator, &wanted.tenant),
    })
}

/// A watch that is going on.
struct Watching {
    coordinator: Arc<Coordinator>,
    wanted: Wanted,
    parent: String,
    every: Duration,
    events_only: bool,
    /// Of the events: up to here they have been looked at.
    seen: u64,
    /// Some were missed.
    gap: bool,
    out: mpsc::Sender<Result<WatchResponse, Status>>,
}

/// The watcher has gone away.
struct Gone;

impl Watching {
    async fn send(&mut self, update: Update) -> Result<(), Gone> {
        let resume_token = paging::resume_token(&self.parent, self.coordinator.model().term, self.seen);
        let gap = std::mem::take(&mut self.gap);
        self.out.send(Ok(WatchResponse { update: Some(update), resume_token, gap })).await.map_err(|_| Gone)
    }

    /// Sends the events since the last time; true if there was one.
    async fn catch_up(&mut self) -> Result<bool, Gone> {
        let mut any = false;
        loop {
            self.gap |= !self.coordinator.keeps_events_after(self.seen);
            let events = self.coordinator.events_from(self.seen + 1, CATCH_UP, |_| true);
            if events.is_empty() {
                return Ok(any);
            }
            for event in events {
                self.seen = event.number;
                if self.wanted.fits(&event.subject) {
                    any = true;
                    self.send(Update::Event(event)).await?;
                }
            }
        }
    }

    async fn run(mut self) {
        // That the watcher has gone is no news to it.
        let _ = self.until_gone().await;
    }

    async fn until_gone(&mut self) -> Result<(), Gone> {
        // The feed only says that there is something: what, is read from what is kept, so that nothing is missed.
        let mut feed = self.coordinator.event_feed();
        let mut changes = self.coordinator.model_changes();
        let closed = self.coordinator.closed();
        tokio::pin!(closed);
        let mut tick = interval(self.every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        let mut due = None;
        self.catch_up().await?;
        loop {
            let soon = due.unwrap_or(last);
            let show = tokio::select! {
                _ = tick.tick() => !self.events_only,
                () = sleep_until(soon), if due.is_some() => true,
                changed = changes.changed() => {
                    changed.map_err(|_| Gone)?;
                    due = Some(last + BURST).filter(|_| !self.events_only);
                    false
                }
                event = feed.recv() => {
                    if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                        return Ok(());
                    }
                    if self.catch_up().await? {
                        due = Some(last + BURST).filter(|_| !self.events_only);
                    }
                    false
                }
                () = self.out.closed() => return Err(Gone),
                () = &mut closed => {
                    let _ = self.out.try_send(Err(Status::unavailable("the coordinator is stopping")));
                    return Ok(());
                }
            };
            if show {
                due = None;
                last = Instant::now();
                match snapshot(&self.coordinator, &self.wanted) {
                    Ok(status) => self.send(Update::Status(status)).await?,
                    Err(problem) => {
                        let _ = self.out.send(Err(problem.into())).await;
                        return Ok(());
                    }
                }
            }
        }
    }
}

#[tonic::async_trait]
impl status_server::Status for StatusService {
    async fn get_status(&self, request: Request<GetStatusRequest>) -> Result<Response<StatusSnapshot>, Status> {
        let wanted = Wanted::parse(&Scope::of(&request)?, &request.get_ref().parent)?;
        Ok(Response::new(snapshot(&self.0, &wanted)?))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let wanted = Wanted::parse(&scope, &r.parent)?;
        if let Some(group) = &wanted.group {
            self.0.model().group(group)?;
        }
        let every = match r.interval_ms {
            0 => 1_000,
            100..=60_000 => r.interval_ms,
            other => return Err(Problem::invalid("interval_ms", other, "0, or 100 to 60000").into()),
        };
        let newest = self.0.newest_event();
        let (seen, gap) = match paging::read_resume_token(&r.parent, &r.resume_token)? {
            None => (newest, false),
            Some((term, number)) if term == self.0.model().term && number <= newest => (number, false),
            // Of an earlier life of the coordinator, whose events are gone: all since then, and that some are missing.
            Some(_) => (0, true),
        };
        let (out, receiver) = mpsc::channel(WATCH_OUTBOX);
        let watching = Watching {
            coordinator: self.0.clone(),
            wanted,
            parent: r.parent,
            every: Duration::from_millis(every.into()),
            events_only: r.events_only,
            seen,
            gap,
            out,
        };
        tokio::spawn(watching.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_rpo(&self, request: Request<GetRpoRequest>) -> Result<Response<RpoReport>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let report = self.0.rpo_report(&group, r.start_time_ns, r.end_time_ns, r.step_s.into()).await?;
        Ok(Response::new(report))
    }

    async fn list_events(&self, request: Request<ListEventsRequest>) -> Result<Response<ListEventsResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let wanted = Wanted::parse(&scope, &r.parent)?;
        let page = Page::of::<Event>("events", &r.parent, 0, &r.page_token, &r.filter)?;
        let from = if r.page_token.is_empty() { r.from_number } else { page.after_number()?.saturating_add(1) };
        let limit = crate::coordinator::page_size(r.page_size) as usize;
        // One more, to see whether there is a next page.
        let mut events = self.0.events_from(from, limit + 1, |e| wanted.fits(&e.subject) && page.fits(e));
        let more = events.len() > limit;
        events.truncate(limit);
        let last = events.last().filter(|_| more).map(|e| page.token_after(e.number));
        Ok(Response::new(ListEventsResponse { events, next_page_token: last.unwrap_or_default() }))
    }
}
