//! Policies and proxies as objects.

use std::sync::Arc;

use afterimage_wire::v1;

use super::Coordinator;
use crate::convert;
use crate::model::MAX_OBJECTS;
use crate::names::{Kind, Name, check_id};
use crate::objects::{Object, Policy, new_uid};
use crate::policy::{Promises, check_text};
use crate::problem::Problem;

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
    ) -> Result<v1::Policy, Problem> {
        check_id("policy_id", id)?;
        check_text("policy.description", &policy.description)?;
        let promises = Promises::new(&convert::wanted(policy)?)?;
        let now = self.clock.wall_ns();
        let made = Policy {
            uid: new_uid(),
            tenant: tenant.to_owned(),
            id: id.to_owned(),
            version: 1,
            created_ns: now,
            updated_ns: now,
            description: policy.description.clone(),
            promises,
        };
        let name = Name::new(tenant, Kind::Policy, id);
        let kept = made.clone();
        self.change(move |model, txn| {
            if model.policy(&name).is_ok() {
                let by = name.to_string();
                return Err(Problem::Exists { field: "policy_id".into(), value: name.id.clone(), by });
            }
            if model.policies.len() >= MAX_OBJECTS {
                return Err(Problem::Limit { what: "policies".into(), limit: MAX_OBJECTS as u64 });
            }
            if !validate_only {
                txn.put(Object::Policy(kept));
            }
            Ok(())
        })
        .await?;
        Ok(convert::policy_to_proto(&self.model(), &made))
    }

    /// Replaces a policy's fields.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a field that is not allowed.
    pub async fn update_policy(
        self: &Arc<Self>,
        name: &Name,
        policy: &v1::Policy,
        validate_only: bool,
    ) -> Result<v1::Policy, Problem> {
        check_text("policy.description", &policy.description)?;
        let promises = Promises::new(&convert::wanted(policy)?)?;
        let now = self.clock.wall_ns();
        let made = self
            .change(|model, txn| {
                let old = model.policy(name)?;
                model.check_etag(name, &Object::Policy(old.clone()).key(), &policy.etag)?;
                let made = Policy {
                    version: old.version + 1,
                    updated_ns: now,
                    description: policy.description.clone(),
                    promises,
                    ..old.clone()
                };
                if !validate_only {
                    txn.put(Object::Policy(made.clone()));
                }
                Ok(made)
            })
            .await?;
        Ok(convert::policy_to_proto(&self.model(), &made))
    }

    /// Deletes a policy.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a group names it.
    pub async fn delete_policy(self: &Arc<Self>, name: &Name, etag: &str) -> Result<(), Problem> {
        self.change(|model, txn| {
            let old = model.policy(name)?;
            model.check_etag(name, &Object::Policy(old.clone()).key(), etag)?;
            if let Some(user) = model.groups.values().find(|g| g.tenant == name.tenant && g.policy == name.id) {
                let remedy = "give that group another policy first";
                return Err(Problem::state(name, format!("in use by {}", user.name()), remedy));
            }
            txn.delete(Object::Policy(old.clone()));
            Ok(())
        })
        .await
    }

    /// Deletes a proxy; its session ends, and its certificate is good for nothing any more.
    ///
    /// # Errors
    /// There is none of that name; it has changed; a group names it.
    pub async fn delete_proxy(self: &Arc<Self>, name: &Name, etag: &str) -> Result<(), Problem> {
        let uid = self
            .change(|model, txn| {
                let old = model.proxy(name)?;
                model.check_etag(name, &Object::Proxy(old.clone()).key(), etag)?;
                let uses = |g: &&crate::objects::Group| {
                    g.tenant == name.tenant && (g.source == name.id || g.target == name.id)
                };
                if let Some(user) = model.groups.values().find(uses) {
                    let remedy = "delete that group first";
                    return Err(Problem::state(name, format!("in use by {}", user.name()), remedy));
                }
                txn.delete(Object::Proxy(old.clone()));
                Ok(old.uid.clone())
            })
            .await?;
        self.sessions.expel(&uid, tonic::Status::permission_denied("this proxy has been deleted"));
        Ok(())
    }
}
