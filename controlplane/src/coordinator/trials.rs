//! Test failovers: begun like other verbs, beside whatever the group does.

use std::sync::Arc;

use afterimage_wire::v1;

use super::Coordinator;
use super::verbs::Asking;
use crate::failover::{Choice, Failover, Spec, Verb};
use crate::machine::{Ready, Role};
use crate::model::Model;
use crate::names::Name;
use crate::objects::{Group, GroupPhase, new_uid};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::Asked;

/// How a test differs from what the machines are defined to do.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// Which point.
    pub to: Option<Choice>,
    /// When the machines count as answering, instead of as defined.
    pub ready: Option<Ready>,
    /// How long they have, milliseconds; 0 for as defined.
    pub ready_within_ms: u64,
    /// How long they are left running once they answer, milliseconds.
    pub hold_ms: u64,
    /// For a person.
    pub reason: String,
}

pub(super) fn check(group: &Group, driven: bool) -> Result<(), Problem> {
    if group.phase == GroupPhase::Deleting {
        return Err(Problem::state(group.name(), "being deleted", "nothing fits any more"));
    }
    if !driven {
        let remedy =
            "create one (afterimage machine create), or open a view to test by hand (afterimage view open --writable)";
        return Err(Problem::state(group.name(), "without a machine that a proxy starts at its target", remedy));
    }
    Ok(())
}

impl Coordinator {
    /// Starts the machines of a group from a view that is thrown away, looks whether they answer, and removes everything.
    ///
    /// # Errors
    /// The group has no machine that is driven at its target; the target, or whoever drives them, is not there; the point is
    /// not fit.
    pub async fn test_failover(
        self: &Arc<Self>,
        name: &Name,
        trial: Trial,
        asking: &Asking,
        request: &Asked,
    ) -> Result<v1::Operation, Problem> {
        check_text("reason", &trial.reason)?;
        let model = self.model();
        if let Some(done) = super::verbs::begun_before(&model, name, Verb::TestFailover, asking, request)? {
            return Ok(crate::convert::operation_to_proto(&model, done));
        }
        let driven = |model: &Model, group: &Group| model.machines_of(group).any(|m| m.target.is_driven());
        let group = model.group(name)?;
        check(group, driven(&model, group))?;
        let to = trial.to.unwrap_or(Choice::Latest);
        let point = self.fit_point(&model, name, to).await?;
        let record = crate::convert::point_from_proto(&point);
        let spec = Spec { hold_ms: trial.hold_ms, reason: trial.reason.clone(), ..Spec::new(Verb::TestFailover, to) };
        let view = format!("test-{}", &new_uid()[..8]);
        self.check_machines(name, Role::Test(&view)).await?;
        let now = self.clock.wall_ns();
        self.begin(name, spec.verb, asking, request, |model| {
            let group = model.group(name)?;
            check(group, driven(model, group))?;
            let disks: Vec<_> = model.disks_of(group).collect();
            let (mut machines, _) = self.machines_for(model, group, spec.verb)?;
            for driven in &mut machines {
                if let Some(ready) = &trial.ready {
                    driven.machine.ready = ready.clone();
                }
                if trial.ready_within_ms > 0 {
                    driven.machine.ready_within_ms = trial.ready_within_ms;
                }
            }
            let checked = format!("record {} can be opened", record.seq);
            let mut work = Failover::new(spec.clone(), &disks, (&view, ""), 0, 0, checked, now);
            work.facts.point = Some(record.clone());
            Ok(work.with_machines(machines, false, Vec::new()))
        })
        .await
    }
}
