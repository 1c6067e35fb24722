//! Failover plans as objects.

use std::sync::Arc;

use afterimage_wire::v1;

use super::Coordinator;
use crate::fields::{self, Rules};
use crate::model::Model;
use crate::names::{Kind, Name, check_id};
use crate::objects::{Group, Object};
use crate::plan::{self, Plan};
use crate::problem::Problem;
use crate::requests::Asked;

/// What an update of a plan may change.
const UPDATE: Rules<'static> = Rules { root: "plan", writable: &["description", "steps", "parallel"], fixed: &[] };

/// A group that a plan names is not to vanish from it unseen.
pub(super) fn check_in_no_plan(model: &Model, group: &Group) -> Result<(), Problem> {
    let names = |plan: &&Plan| plan.tenant == group.tenant && plan.steps.iter().any(|step| step.group == group.id);
    match model.plans.values().find(names) {
        Some(plan) => {
            let state = format!("in use by {}", plan.name());
            Err(Problem::state(group.name(), state, "take it out of that plan first"))
        }
        None => Ok(()),
    }
}

impl Coordinator {
    /// Creates a plan.
    ///
    /// # Errors
    /// A field that is not allowed; a name that is taken; a group or proxy that does not exist.
    pub async fn create_plan(
        self: &Arc<Self>,
        tenant: &str,
        id: &str,
        asked: &v1::Plan,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Plan, Problem> {
        check_id("plan_id", id)?;
        let name = Name::new(tenant, Kind::Plan, id);
        let make = |model: &Model, now| Plan::wanted(model, &name, asked, None, now);
        let made = self.create_object(&name, validate_only, request, make).await?;
        Ok(plan::to_proto(&self.model(), &made))
    }

    /// Replaces a plan's fields.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a field that is not allowed.
    pub async fn update_plan(
        self: &Arc<Self>,
        name: &Name,
        asked: &v1::Plan,
        mask: Option<&prost_types::FieldMask>,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Plan, Problem> {
        let made = self
            .update_object(name, &asked.etag, validate_only, request, |model, old: &Plan, now| {
                let wanted = fields::update(&plan::to_proto(model, old), asked, mask, &UPDATE)?;
                Plan::wanted(model, name, &wanted, Some(old), now)
            })
            .await?;
        Ok(plan::to_proto(&self.model(), &made))
    }

    /// Forgets a plan.
    ///
    /// # Errors
    /// There is none of that name; it has changed.
    pub async fn delete_plan(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let look = |model: &Model| {
            let old = model.plan(name)?;
            let hindrance = model
                .running(old)
                .map(|run| Problem::state(name, "being run", format!("wait for {}, or stop it", run.name())));
            Ok((Object::Plan(old.clone()), old.uid.clone(), hindrance))
        };
        let deleted = self.delete_object(name, etag, validate_only, request, look).await?;
        if deleted.is_some() {
            // A plan that is made by this name is another one.
            self.change(|model, txn| {
                let of = |run: &&crate::plan::run::Run| run.tenant == name.tenant && run.plan == name.id;
                let orphans = model.runs.values().filter(of).filter(|run| run.ended_ns != 0);
                orphans.for_each(|run| txn.delete(Object::Run(run.clone())));
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}
