//! What groups, policies, machines and plans have in common as objects of the API: made, changed and deleted once for each
//! request.

use std::sync::Arc;

use super::Coordinator;
use crate::machine::Machine;
use crate::model::Model;
use crate::names::Name;
use crate::objects::{Group, Object, Policy};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::requests::{Asked, gone};

/// An object that is made and changed as a whole.
pub(super) trait Whole: Clone + Send + 'static {
    /// As names and fields have it.
    const KIND: &'static str;

    /// The one of that name.
    ///
    /// # Errors
    /// There is none.
    fn find<'a>(model: &'a Model, name: &Name) -> Result<&'a Self, Problem>;

    /// Its uid.
    fn uid(&self) -> &str;

    /// As it is stored.
    fn object(&self) -> Object;
}

macro_rules! whole {
    ($kept:ident, $kind:literal, $find:ident) => {
        impl Whole for $kept {
            const KIND: &'static str = $kind;

            fn find<'a>(model: &'a Model, name: &Name) -> Result<&'a Self, Problem> {
                model.$find(name)
            }

            fn uid(&self) -> &str {
                &self.uid
            }

            fn object(&self) -> Object {
                Object::$kept(self.clone())
            }
        }
    };
}

whole!(Group, "group", group);
whole!(Policy, "policy", policy);
whole!(Machine, "machine", machine);
whole!(Plan, "plan", plan);

/// What a request made or changed that has been done before, as it is now.
pub(super) fn made_before<T: Whole>(model: &Model, name: &Name, uid: &str) -> Result<T, Problem> {
    T::find(model, name).ok().filter(|found| found.uid() == uid).cloned().ok_or_else(|| gone(T::KIND, name))
}

impl Coordinator {
    /// Makes an object; `make` is given the time, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// Its name is taken; as `make` says.
    pub(super) async fn create_object<T: Whole>(
        self: &Arc<Self>,
        name: &Name,
        validate_only: bool,
        request: &Asked,
        make: impl FnOnce(&Model, u64) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            if let Some(done) = request.done(model)? {
                return made_before(model, name, &done.uid);
            }
            if T::find(model, name).is_ok() {
                let (field, by) = (format!("{}_id", T::KIND), name.to_string());
                return Err(Problem::Exists { field, value: name.id.clone(), by });
            }
            let made = make(model, now)?;
            if !validate_only {
                request.record(model, txn, now, made.uid());
                txn.put(made.object());
            }
            Ok(made)
        })
        .await
    }

    /// Changes an object; `make` is given the old one, and the time as in [`Self::create_object`]. One that it leaves as it is
    /// is not written.
    ///
    /// # Errors
    /// There is none of that name; it has changed; as `make` says.
    pub(super) async fn update_object<T: Whole>(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
        make: impl FnOnce(&Model, &T, u64) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            if let Some(done) = request.done(model)? {
                return made_before(model, name, &done.uid);
            }
            let old = T::find(model, name)?;
            model.check_etag(name, &old.object().key(), etag)?;
            let made = make(model, old, now)?;
            if !validate_only {
                request.record(model, txn, now, made.uid());
                if made.object() != old.object() {
                    txn.put(made.object());
                }
            }
            Ok(made)
        })
        .await
    }

    /// Deletes an object for which nothing else is to be done; `look` finds it, with its uid and what is in the way of its
    /// deletion. Returns its uid, or nothing if it was a trial, or this request has been done before.
    ///
    /// # Errors
    /// As `look` says; it has changed; something is in the way.
    pub(super) async fn delete_object(
        self: &Arc<Self>,
        name: &Name,
        etag: &str,
        validate_only: bool,
        request: &Asked,
        look: impl FnOnce(&Model) -> Result<(Object, String, Option<Problem>), Problem>,
    ) -> Result<Option<String>, Problem> {
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            if request.done(model)?.is_some() {
                return Ok(None);
            }
            let (old, uid, hindrance) = look(model)?;
            model.check_etag(name, &old.key(), etag)?;
            if let Some(hindrance) = hindrance {
                return Err(hindrance);
            }
            if validate_only {
                return Ok(None);
            }
            request.record(model, txn, now, &uid);
            txn.delete(old);
            Ok(Some(uid))
        })
        .await
    }
}
