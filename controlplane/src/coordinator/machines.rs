//! Machines as objects, and telling their proxies.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1;
use afterimage_wire::v1::command_result::Outcome;
use tokio::time::{Instant, sleep};

use super::Coordinator;
use crate::failover::{Driven, Order, Reply, Verb, fences};
use crate::fields::{self, Rules};
use crate::machine::{self, Machine, MachineDisk, Role};
use crate::model::{Model, Txn};
use crate::names::{Kind, Name, check_id};
use crate::objects::{Group, Object, Operation};
use crate::problem::Problem;
use crate::requests::Asked;

/// What an update of a machine may change.
const UPDATE: Rules<'static> = Rules {
    root: "machine",
    writable: &[
        "description",
        "disks",
        "cpus",
        "memory_bytes",
        "firmware",
        "nics",
        "source",
        "target",
        "readiness",
        "stop_within_ms",
        "ready_within_ms",
    ],
    fixed: &[("group", "it cannot be changed: create another machine")],
};

/// What a proxy says that it can do if it answers whether a machine could be started.
const CHECKS: &str = "machine-check";
/// Between two tries to reach the proxy of a machine, or two looks at it.
const AGAIN: Duration = Duration::from_millis(250);
/// How long one look at a machine may take.
const LOOK: Duration = Duration::from_secs(20);

/// Nothing is changed under an operation: it began with the machine as it was.
fn check_idle(model: &Model, machine: &Machine) -> Result<(), Problem> {
    let group = Name::new(&machine.tenant, Kind::Group, &machine.group);
    let Some(operation) = model.group(&group).ok().and_then(|g| g.phase.operation()) else { return Ok(()) };
    let remedy = format!("wait for tenants/{}/operations/{operation}", machine.tenant);
    Err(Problem::state(machine.name(), "being started or stopped by an operation", remedy))
}

impl Coordinator {
    /// Creates a machine.
    ///
    /// # Errors
    /// A field that is not allowed; a name or disk that is taken; a group, disk or proxy that does not exist.
    pub async fn create_machine(
        self: &Arc<Self>,
        tenant: &str,
        id: &str,
        asked: &v1::Machine,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Machine, Problem> {
        check_id("machine_id", id)?;
        let name = Name::new(tenant, Kind::Machine, id);
        let made = self
            .create_object(&name, validate_only, request, |model, now| {
                let made = Machine::wanted(model, &name, asked, None, now)?;
                check_idle(model, &made)?;
                Ok(made)
            })
            .await?;
        Ok(machine::to_proto(&self.model(), &made))
    }

    /// Replaces a machine's fields.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a field that is not allowed; an operation is being done.
    pub async fn update_machine(
        self: &Arc<Self>,
        name: &Name,
        asked: &v1::Machine,
        mask: Option<&prost_types::FieldMask>,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Machine, Problem> {
        let made = self
            .update_object(name, &asked.etag, validate_only, request, |model, old: &Machine, now| {
                let wanted = fields::update(&machine::to_proto(model, old), asked, mask, &UPDATE)?;
                let made = Machine::wanted(model, name, &wanted, Some(old), now)?;
                check_idle(model, &made)?;
                if !made.runs_from.is_empty() && made.target != old.target {
                    let remedy = "undo the failover first: by other settings it could not be stopped";
                    return Err(Problem::state(name, "running at its target", remedy));
                }
                if made.stopped_at_source && made.source != old.source {
                    let remedy = "undo the failover first: by other settings it would not be started again";
                    return Err(Problem::state(name, "switched off at its source by a failover", remedy));
                }
                Ok(made)
            })
            .await?;
        Ok(machine::to_proto(&self.model(), &made))
    }

    /// Forgets a machine.
    ///
    /// # Errors
    /// There is none of that name; it has changed; it runs at its target, or an operation is being done.
    pub async fn delete_machine(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let look = |model: &Model| {
            let old = model.machine(name)?;
            let runs = !old.runs_from.is_empty();
            let remedy = "undo the failover first: nobody else stops it";
            let runs = runs.then(|| Problem::state(name, "running at its target", remedy));
            let hindrance = check_idle(model, old).err().or(runs);
            Ok((Object::Machine(old.clone()), old.uid.clone(), hindrance))
        };
        self.delete_object(name, etag, validate_only, request, look).await.map(drop)
    }

    /// Asks the proxies of a machine how it stands at its places.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn probe_machine(&self, name: &Name) -> Result<v1::ProbeMachineResponse, Problem> {
        let model = self.model();
        let machine = model.machine(name)?;
        let group = model.group(&Name::new(&machine.tenant, Kind::Group, &machine.group))?;
        let look = async |role: Role<'_>| {
            if !machine.place(role).is_driven() {
                return None;
            }
            let proxy = machine.proxy_of(role, group).to_owned();
            let order = Order { proxy, tell: machine.probe(role), within_ms: 0, until_ready: false };
            Some(match self.order(&name.tenant, "", "", &order).await {
                Ok(Outcome::Machine(state)) => state,
                Ok(Outcome::Error(e)) => v1::MachineState { detail: e.message, ..Default::default() },
                Ok(_) => v1::MachineState { detail: "its proxy's answer does not fit".into(), ..Default::default() },
                Err(detail) => v1::MachineState { detail, ..Default::default() },
            })
        };
        let (source, target, hindrance) = tokio::join!(
            look(Role::Source),
            look(Role::Replica),
            self.hindrance(&model, group, machine, Role::Replica)
        );
        let hindrance = hindrance.unwrap_or_else(|problem| Some(problem.to_string())).unwrap_or_default();
        Ok(v1::ProbeMachineResponse { source, target, hindrance })
    }

    /// Checks that whoever is to start and stop a group's machines is there, before anything is begun; gives the machines.
    ///
    /// # Errors
    /// A proxy is not connected, or has no such driver.
    pub(super) fn fit_machines(
        &self,
        model: &Model,
        group: &Group,
        roles: &[Role<'_>],
    ) -> Result<Vec<Driven>, Problem> {
        let mut all = Vec::new();
        for machine in model.machines_of(group) {
            for role in roles.iter().filter(|role| machine.place(**role).is_driven()) {
                let (proxy, place) = (machine.proxy_of(*role, group), machine.place(*role));
                let found = model.proxy(&Name::new(&group.tenant, Kind::Proxy, proxy))?;
                if !self.sessions.connected(&found.uid) {
                    let what = if *role == Role::Source { "stops" } else { "starts" };
                    let detail = format!("it {what} {} and is not connected; look at that proxy", machine.name());
                    return Err(Problem::Unreachable { proxy: proxy.to_owned(), detail });
                }
                let capability = format!("machine-{}", place.driver.as_str());
                if !found.can(&capability) {
                    let state =
                        format!("not to be driven by \"{proxy}\": its configuration has no {}", place.driver.as_str());
                    let remedy = format!("see [machines.{}.{}] there", place.driver.as_str(), place.profile);
                    return Err(Problem::state(machine.name(), state, remedy));
                }
            }
            let disks = machine.disks_in(model, group).into_iter().map(Into::into).collect();
            all.push(Driven { machine: machine.clone(), disks, was_on: None });
        }
        Ok(all)
    }

    /// What hinders an instance from being started where it is driven, as far as its proxy can say: its networks are there,
    /// its addresses are known. A proxy that is not there, or is older than the question, is not asked.
    async fn hindrance(
        &self,
        model: &Model,
        group: &Group,
        machine: &Machine,
        role: Role<'_>,
    ) -> Result<Option<String>, Problem> {
        let proxy = model.proxy(&Name::new(&group.tenant, Kind::Proxy, machine.proxy_of(role, group)))?;
        if !machine.place(role).is_driven() || !self.sessions.connected(&proxy.uid) || !proxy.can(CHECKS) {
            return Ok(None);
        }
        let disks: Vec<MachineDisk> = machine.disks_in(model, group).into_iter().map(Into::into).collect();
        let tell = machine.check_start(role, disks.iter().map(machine::source_disk).collect());
        match self.command(proxy, "", "check", tell, LOOK, LOOK).await {
            Ok(Outcome::Error(error)) => Ok(Some(error.message)),
            Ok(_) => Ok(None),
            Err(error) => {
                let detail = format!("it has not said whether {} can be started: {error}", machine.name());
                Err(Problem::Unreachable { proxy: proxy.id.clone(), detail })
            }
        }
    }

    /// Asks whoever is to start a group's machines whether they can be, as they are defined. Nothing has been begun.
    ///
    /// # Errors
    /// One cannot be started, and why.
    pub(super) async fn check_machines(&self, name: &Name, role: Role<'_>) -> Result<(), Problem> {
        let model = self.model();
        let group = model.group(name)?;
        for machine in model.machines_of(group) {
            if let Some(why) = self.hindrance(&model, group, machine, role).await? {
                let proxy = machine.proxy_of(role, group);
                let state = format!("not to be started by \"{proxy}\": {why}");
                let remedy = format!("nothing was begun: change the configuration of \"{proxy}\", or the machine");
                return Err(Problem::state(machine.name(), state, remedy));
            }
        }
        Ok(())
    }

    /// The machines of a group, for a verb; and whether that they are off confirms that nobody writes at the source.
    ///
    /// # Errors
    /// Whoever is to start and stop them is not there, or cannot.
    pub(super) fn machines_for(
        &self,
        model: &Model,
        group: &Group,
        verb: Verb,
    ) -> Result<(Vec<Driven>, bool), Problem> {
        let both = matches!(verb, Verb::PlannedFailover | Verb::SwitchFailback);
        let roles: &[Role<'_>] = if both { &[Role::Source, Role::Replica] } else { &[Role::Replica] };
        Ok((self.fit_machines(model, group, roles)?, self.machines_fence(model, group)))
    }

    /// Somebody can say of all that writes to a group's disks at its source that it is off.
    pub(super) fn machines_fence(&self, model: &Model, group: &Group) -> bool {
        let disks: Vec<String> = model.disks_of(group).map(|d| d.uid.clone()).collect();
        self.fit_machines(model, group, &[Role::Source]).is_ok_and(|machines| fences(&machines, &disks))
    }

    /// Tells all of them at once, each until it has answered or its time is over.
    pub(super) async fn order_all(&self, tenant: &str, operation: &str, step: &str, orders: &[Order]) -> Reply {
        let told = orders.iter().map(|order| self.order(tenant, operation, step, order));
        Reply::Machines(futures_all(told).await)
    }

    /// Tells a machine's proxy, until it has answered or its time is over.
    pub(super) async fn order(
        &self,
        tenant: &str,
        operation: &str,
        step: &str,
        order: &Order,
    ) -> Result<Outcome, String> {
        let model = self.model();
        let name = Name::new(tenant, Kind::Proxy, &order.proxy);
        let proxy = model.proxy(&name).map_err(|_| format!("the proxy \"{}\" does not exist any more", order.proxy))?;
        let until = Instant::now() + Duration::from_millis(order.within_ms);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let answer = if order.until_ready { LOOK } else { left.max(LOOK) };
            let said = self.command(proxy, operation, step, order.tell.clone(), left.min(LOOK), answer).await;
            let over = Instant::now() + AGAIN >= until;
            match said {
                Ok(Outcome::Machine(state)) if order.until_ready && !state.ready && !over => {}
                Ok(outcome) => return Ok(outcome),
                Err(_) if !over => {}
                Err(e) => return Err(format!("\"{}\": {e}", proxy.id)),
            }
            sleep(AGAIN).await;
        }
    }
}

/// All of them, at once, in their order.
async fn futures_all<T>(all: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = all.map(|one| (Box::pin(one), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (one, done) in waiting.iter_mut().filter(|(_, done)| done.is_none()) {
            match one.as_mut().poll(cx) {
                std::task::Poll::Ready(value) => *done = Some(value),
                std::task::Poll::Pending => pending = true,
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    waiting.into_iter().filter_map(|(_, done)| done).collect()
}

/// The machine objects follow the steps: noted as switched off, or as running, before they are told.
pub(super) fn keep_machines(model: &Model, txn: &mut Txn, operation: &Operation) {
    if operation.work.spec.verb.is_trial() {
        return;
    }
    for driven in &operation.work.facts.machines {
        let Ok(now) = model.machine(&driven.machine.name()) else { continue };
        let (stopped_at_source, runs_from) = operation.work.machine_marks(driven);
        if now.uid == driven.machine.uid && (now.stopped_at_source, &now.runs_from) != (stopped_at_source, &runs_from) {
            txn.put(Object::Machine(Machine { version: now.version + 1, stopped_at_source, runs_from, ..now.clone() }));
        }
    }
}
