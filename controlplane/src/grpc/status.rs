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
use crate::problem::Problem;

/// Updates that a watcher may be behind before it is waited for.
const WATCH_OUTBOX: usize = 16;
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
    let model = coordinator.model();
    Ok(StatusSnapshot {
        time_ns: coordinator.clock.wall_ns(),
        coordinator: Some(CoordinatorStatus {
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            term: model.term,
            uptime_ms: coordinator.clock.uptime().as_millis() as u64,
            revision: model.revision,
        }),
        groups,
        proxies: proxies(coordinator, &wanted.tenant),
    })
}

fn sent(update: Update) -> Result<WatchResponse, Status> {
    Ok(WatchResponse { update: Some(update) })
}

async fn watch(
    coordinator: Arc<Coordinator>,
    wanted: Wanted,
    every: Duration,
    events_only: bool,
    out: mpsc::Sender<Result<WatchResponse, Status>>,
) {
    let mut events = coordinator.event_feed();
    let mut changes = coordinator.model_changes();
    let closed = coordinator.closed();
    tokio::pin!(closed);
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    let mut due = None;
    loop {
        let soon = due.unwrap_or(last);
        let show = tokio::select! {
            _ = tick.tick() => !events_only,
            () = sleep_until(soon), if due.is_some() => true,
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                due = Some(last + BURST).filter(|_| !events_only);
                false
            }
            event = events.recv() => {
                match event {
                    Ok(event) if wanted.fits(&event.subject) => {
                        if out.send(sent(Update::Event(event))).await.is_err() {
                            return;
                        }
                        due = Some(last + BURST).filter(|_| !events_only);
                    }
                    // Behind: what was missed can be listed.
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
                false
            }
            () = out.closed() => return,
            () = &mut closed => {
                let _ = out.try_send(Err(Status::unavailable("the coordinator is stopping")));
                return;
            }
        };
        if show {
            due = None;
            last = Instant::now();
            let update = match snapshot(&coordinator, &wanted) {
                Ok(status) => sent(Update::Status(status)),
                Err(problem) => Err(problem.into()),
            };
            let ends = update.is_err();
            if out.send(update).await.is_err() || ends {
                return;
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
        let (sender, receiver) = mpsc::channel(WATCH_OUTBOX);
        tokio::spawn(watch(self.0.clone(), wanted, Duration::from_millis(every.into()), r.events_only, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_events(&self, request: Request<ListEventsRequest>) -> Result<Response<ListEventsResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let wanted = Wanted::parse(&scope, &r.parent)?;
        let limit = crate::coordinator::page_size(r.page_size)?;
        let events = self.0.events_from(r.from_number, limit as usize, |subject| wanted.fits(subject));
        Ok(Response::new(ListEventsResponse { events }))
    }
}
