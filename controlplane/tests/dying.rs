//! Every verb that is an operation, with a coordinator that dies at each of the commits that it makes of it, just before
//! and just after: the next one ends what was begun, once.

mod world;

use std::time::Duration;

use afterimage_wire::v1::point_choice::At;
use afterimage_wire::v1::*;
use tonic::Status;
use world::*;

/// No verb makes so many commits.
const MOST_COMMITS: usize = 40;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Does {
    Failover,
    Planned,
    ChangePoint,
    Undo,
    Failback,
    Cancel,
    Switch,
    Commit,
    UndoFailback,
}

impl Does {
    async fn ask(self, world: &World, request_id: &str) -> Result<Operation, Status> {
        let (group, request_id) = (SHOP.to_owned(), request_id.to_owned());
        let mut verbs = world.failovers();
        let started = match self {
            Self::Failover => {
                let request = StartFailoverRequest { request_id, ..failover_request(At::Latest(true)) };
                verbs.start_failover(request).await?
            }
            Self::Planned => {
                let request = StartPlannedFailoverRequest { group, request_id, ..Default::default() };
                verbs.start_planned_failover(request).await?
            }
            Self::ChangePoint => {
                let choice = Some(change_point_request::Choice::To(PointChoice { at: Some(At::Seq(42)) }));
                let request = ChangePointRequest { group, request_id, choice, ..Default::default() };
                verbs.change_point(request).await?
            }
            Self::Undo => verbs.undo_failover(UndoFailoverRequest { group, request_id, ..Default::default() }).await?,
            Self::Failback => {
                verbs.start_failback(StartFailbackRequest { group, request_id, ..Default::default() }).await?
            }
            Self::Cancel => {
                verbs.cancel_failback(CancelFailbackRequest { group, request_id, ..Default::default() }).await?
            }
            Self::Switch => {
                verbs.switch_failback(SwitchFailbackRequest { group, request_id, ..Default::default() }).await?
            }
            Self::Commit => {
                verbs.commit_failback(CommitFailbackRequest { group, request_id, ..Default::default() }).await?
            }
            Self::UndoFailback => {
                verbs.undo_failback(UndoFailbackRequest { group, request_id, ..Default::default() }).await?
            }
        };
        Ok(started.into_inner())
    }

    /// Where it leads, and how many generations higher.
    fn leads(self) -> (Phase, u64) {
        match self {
            Self::Failover | Self::Planned => (Phase::FailedOver, 1),
            // The fence is kept.
            Self::ChangePoint | Self::Cancel => (Phase::FailedOver, 0),
            Self::Undo => (Phase::Protected, 1),
            Self::Failback => (Phase::FailingBack, 0),
            Self::Switch => (Phase::FailedBack, 1),
            Self::Commit => (Phase::Protected, 0),
            Self::UndoFailback => (Phase::FailedOver, 1),
        }
    }
}

struct Shop {
    world: World,
    source: Option<FakeProxy>,
    target: Option<FakeProxy>,
    asked: usize,
}

impl Shop {
    async fn new() -> Self {
        let world = World::new().await;
        let (source, target) = world.shop().await;
        Self { world, source: Some(source), target: Some(target), asked: 0 }
    }

    fn journal(&self) -> std::sync::MutexGuard<'_, Journal> {
        self.target.as_ref().unwrap().script.journal.lock().unwrap()
    }

    /// The coordinator is another process; the proxies have met it.
    async fn restart(&mut self) {
        let mut scripts = Vec::new();
        for proxy in [self.source.take(), self.target.take()] {
            scripts.push(proxy.unwrap().kill().await);
        }
        self.world.restart().await;
        for (place, (bundle, script)) in [&mut self.source, &mut self.target].into_iter().zip(scripts) {
            *place = Some(FakeProxy::connect(bundle, script).await);
        }
    }

    /// Does it, with a death at the commit after so many others; whether the verb made that many.
    async fn does(&mut self, verb: Does, after: usize, committed: bool) -> bool {
        self.prepared_for(verb).await;
        let generation = self.journal().generation;
        let operations = self.operations().await;
        self.asked += 1;
        let request_id = format!("r-{}", self.asked);
        self.world.death.comes(after, committed);
        let started = verb.ask(&self.world, &request_id).await;
        if let Ok(started) = &started {
            tokio::select! {
                () = self.world.death.has_come() => {}
                () = self.ended(&started.name) => {}
            }
        }
        let died = self.world.death.is_off();
        let about = format!("{verb:?}, dead at commit {after}, which was {}made", if committed { "" } else { "not " });
        if died {
            self.restart().await;
        }
        let again = self.asked_again(verb, &request_id).await.unwrap_or_else(|e| panic!("{about}: {e}"));
        if let Ok(started) = started {
            assert_eq!(started.name, again.name, "{about}: a second operation of one request");
        }
        let done = self.world.finish(&again.name).await;
        assert_eq!(done.state(), OperationState::Done, "{about}: {done:#?}");
        assert_eq!(self.operations().await, operations + 1, "{about}");
        let (phase, higher) = verb.leads();
        self.world.wait_phase(phase).await;
        if higher > 0 {
            let reached = self.journal().generation;
            // One that died before it had recorded the answer asks for the same again.
            assert_eq!(reached, generation.max(1) + higher, "{about}: {done:#?}");
        }
        let views = self.journal().views.len();
        let runs = matches!(phase, Phase::FailedOver | Phase::FailingBack);
        assert_eq!(views, usize::from(runs), "{about}: it runs from one view, or from none");
        let status = self.world.status().await;
        assert_eq!(status.reverse.is_some(), phase == Phase::FailingBack, "{about}");
        died
    }

    /// As somebody does who got no answer, until the new coordinator has heard from the proxies what it judges by.
    async fn asked_again(&self, verb: Does, request_id: &str) -> Result<Operation, Status> {
        for _ in 0..400 {
            match verb.ask(&self.world, request_id).await {
                Err(e) if e.code() == tonic::Code::FailedPrecondition => {}
                answered => return answered,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        verb.ask(&self.world, request_id).await
    }

    /// What a verb waits for, that proxies report.
    async fn prepared_for(&mut self, verb: Does) {
        if verb == Does::Commit {
            self.journal().more += 7;
        }
        for _ in 0..400 {
            let ready = match verb {
                Does::Switch => self.world.status().await.reverse.is_some_and(|reverse| reverse.ready),
                Does::Commit => {
                    let request =
                        CommitFailbackRequest { group: SHOP.into(), validate_only: true, ..Default::default() };
                    self.world.failovers().commit_failback(request).await.is_ok()
                }
                _ => true,
            };
            if ready {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{verb:?} cannot begin: {:?}", self.world.status().await);
    }

    async fn operations(&self) -> usize {
        let request = ListOperationsRequest { parent: TENANT.into(), page_size: 1000, ..Default::default() };
        self.world.operations().list_operations(request).await.unwrap().into_inner().operations.len()
    }

    async fn ended(&self, name: &str) {
        loop {
            let request = WaitOperationRequest { name: name.into(), timeout_ms: 20_000 };
            match self.world.operations().wait_operation(request).await {
                Ok(operation) if operation.get_ref().state() == OperationState::Running => {}
                Ok(_) => return,
                // Its coordinator is dying.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

/// Plays a round trip again and again, the coordinator dying at a later commit of each verb each time.
async fn at_each_commit(trip: &[Does]) {
    let mut shop = Shop::new().await;
    let mut over = 0;
    for after in 0..MOST_COMMITS {
        let mut died = 0;
        for (at, verb) in trip.iter().enumerate() {
            // Made and not made by turns: the commit not made leaves what the one before it had, which was made.
            died += usize::from(shop.does(*verb, after, (after + at) % 2 == 0).await);
        }
        if died == 0 {
            over = after;
            break;
        }
    }
    assert!((3..MOST_COMMITS).contains(&over), "the verbs make {over} commits");
}

#[tokio::test]
async fn failover_another_point_and_undo() {
    at_each_commit(&[Does::Failover, Does::ChangePoint, Does::Undo]).await;
}

#[tokio::test]
async fn there_and_back() {
    at_each_commit(&[Does::Planned, Does::Failback, Does::Switch, Does::Commit]).await;
}

#[tokio::test]
async fn there_and_back_and_there_again() {
    use Does::*;
    at_each_commit(&[Planned, Failback, Cancel, Failback, Switch, UndoFailback, Failback, Switch, Commit]).await;
}
