//! Policies and proxies as objects.

use std::sync::Arc;

use afterimage_wire::v1;

use super::Coordinator;
use crate::convert;
use crate::fields::{self, Rules};
use crate::model::{MAX_OBJECTS, Model};
use crate::names::{Kind, Name, check_id};
use crate::objects::{Group, Object, Policy, new_uid};
use crate::policy::{Promises, check_text};
use crate::problem::Problem;
use crate::requests::Asked;

/// What an update of a policy may change.
const UPDATE: Rules<'static> = Rules {
    root: "policy",
    writable: &[
        "description",
        "rpo_target_us",
        "cut_interval_ms",
        "retention_s",
        "journal_budget_bytes",
        "compression",
        "warn_after_ms",
        "error_after_ms",
        "clear_after_ms",
        "lease_ms",
        "sync_deadline_ms",
        "bandwidth_bytes_per_s",
        "allowed_hours",
        "time_zone",
        "priority",
        "excluded_disks",
        "same_site",
    ],
    fixed: &[],
};

/// Groups of a policy that warnings are given of.
const MAX_WARNED: usize = 100;

/// Refuses promises that exclude a disk which the group has.
pub(super) fn check_excluded(model: &Model, group: &Group, promises: &Promises, field: &str) -> Result<(), Problem> {
    for disk in model.disks_of(group) {
        if let Some(pattern) = promises.excludes(&disk.id, &disk.path) {
            let allowed = format!("nothing that excludes a disk which is replicated: {} has {}", group.name(), disk.id);
            return Err(Problem::invalid(field, pattern, allowed));
        }
    }
    Ok(())
}

impl Coordinator {
    /// Creates a policy.
    ///
    /// # Errors
    /// A field that is not allowed; a name that is taken.
    pub async fn create_policy(
        self: &Arc<Self>,
        tenant: &str,
        id: &str,
        policy: &v1::Policy,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Policy, Problem> {
        check_id("policy_id", id)?;
        check_text("policy.description", &policy.description)?;
        let promises = Promises::new(&convert::wanted(policy)?)?;
        let name = Name::new(tenant, Kind::Policy, id);
        let made = self
            .create_object(&name, validate_only, request, |model, now| {
                if model.policies.len() >= MAX_OBJECTS {
                    return Err(Problem::Limit { what: "policies".into(), limit: MAX_OBJECTS as u64 });
                }
                Ok(Policy {
                    uid: new_uid(),
                    tenant: tenant.to_owned(),
                    id: id.to_owned(),
                    version: 1,
                    created_ns: now,
                    updated_ns: now,
                    description: policy.description.clone(),
                    promises,
                })
            })
            .await?;
        Ok(self.policy_shown(&self.model(), &made))
    }

    /// Replaces a policy's fields.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a field that is not allowed.
    pub async fn update_policy(
        self: &Arc<Self>,
        name: &Name,
        policy: &v1::Policy,
        mask: Option<&prost_types::FieldMask>,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Policy, Problem> {
        let made = self
            .update_object(name, &policy.etag, validate_only, request, |model, old: &Policy, now| {
                let wanted = fields::update(&convert::policy_to_proto(model, old), policy, mask, &UPDATE)?;
                check_text("policy.description", &wanted.description)?;
                let promises = Promises::new(&convert::wanted(&wanted)?)?;
                let made = Policy {
                    version: old.version + 1,
                    updated_ns: now,
                    description: wanted.description,
                    promises,
                    ..old.clone()
                };
                for group in model.groups.values().filter(|g| g.tenant == name.tenant && g.policy == name.id) {
                    check_excluded(model, group, &made.promises, "policy.excluded_disks")?;
                }
                Ok(made)
            })
            .await?;
        Ok(self.policy_shown(&self.model(), &made))
    }

    /// A policy for the API, with what can hardly be kept of it by what is measured at present.
    pub fn policy_shown(&self, model: &Model, policy: &Policy) -> v1::Policy {
        let mut shown = convert::policy_to_proto(model, policy);
        let now = self.clock.mono_ns();
        let live = self.live.lock().expect("nothing panics while it holds this");
        let named = model.groups.values().filter(|g| g.tenant == policy.tenant && g.policy == policy.id);
        for group in named.take(MAX_WARNED) {
            let Some(stream) = live.streams.get(&group.uid) else { continue };
            let rates = stream.rates.shown(now);
            shown.warnings.extend(policy.promises.shortfalls_of(&group.id, rates.captured, rates.wire));
        }
        shown
    }

    /// Deletes a policy.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a group names it.
    pub async fn delete_policy(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let look = |model: &Model| {
            let old = model.policy(name)?;
            let user = model.groups.values().find(|g| g.tenant == name.tenant && g.policy == name.id);
            let remedy = "give that group another policy first";
            let hindrance = user.map(|user| Problem::state(name, format!("in use by {}", user.name()), remedy));
            Ok((Object::Policy(old.clone()), old.uid.clone(), hindrance))
        };
        self.delete_object(name, etag, validate_only, request, look).await.map(drop)
    }

    /// Deletes a proxy; its session ends, and its certificate is good for nothing any more.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a group names it.
    pub async fn delete_proxy(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let look = |model: &Model| {
            let old = model.proxy(name)?;
            let uses =
                |g: &&crate::objects::Group| g.tenant == name.tenant && (g.source == name.id || g.target == name.id);
            let user = model.groups.values().find(uses);
            let remedy = "delete that group first";
            let hindrance = user.map(|user| Problem::state(name, format!("in use by {}", user.name()), remedy));
            let names = |m: &&crate::machine::Machine| {
                m.tenant == name.tenant && (m.source.proxy == name.id || m.target.proxy == name.id)
            };
            let machine = model.machines.values().find(names);
            let remedy = "give that machine another proxy first";
            let hindrance =
                hindrance.or(machine.map(|m| Problem::state(name, format!("in use by {}", m.name()), remedy)));
            let plan = model.plans.values().find(|p| p.tenant == name.tenant && p.names_proxy(&name.id));
            let remedy = "take its scripts and checks out of that plan first";
            let hindrance = hindrance.or(plan.map(|p| Problem::state(name, format!("in use by {}", p.name()), remedy)));
            Ok((Object::Proxy(old.clone()), old.uid.clone(), hindrance))
        };
        let uid = self.delete_object(name, etag, validate_only, request, look).await?;
        let Some(uid) = uid else { return Ok(()) };
        self.sessions.expel(&uid, tonic::Status::permission_denied("this proxy has been deleted"));
        Ok(())
    }
}
