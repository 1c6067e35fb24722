//! All objects at one revision of the store, and changes to them.
//!
//! A change is decided on one model, committed with the revisions that it was decided on, and only then becomes the next
//! model: what is read is always what is stored.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::names::Name;
use crate::objects::{Disk, Group, GroupPhase, KeyRecord, Object, Operation, Policy, Proxy, View};
use crate::problem::Problem;
use crate::requests::RequestRecord;
use crate::store::{Change, Expect, Listing};
use crate::token::TokenRecord;

/// Most objects of a kind under a tenant.
pub const MAX_OBJECTS: usize = 4096;
/// Operations that are kept after their end, per tenant.
pub const MAX_ENDED_OPERATIONS: usize = 500;
/// Most join tokens that are neither spent nor expired.
pub const MAX_TOKENS: usize = 1000;

/// Tenant and id.
pub type Key = (String, String);

/// The objects. All maps are by tenant and id unless said otherwise.
#[derive(Clone, Default, Debug)]
pub struct Model {
    /// Of the store.
    pub revision: u64,
    /// Highest term.
    pub term: u64,
    /// Policies.
    pub policies: BTreeMap<Key, Policy>,
    /// Groups.
    pub groups: BTreeMap<Key, Group>,
    /// Disks, by uid of the group and slot.
    pub disks: BTreeMap<(String, u16), Disk>,
    /// Proxies.
    pub proxies: BTreeMap<Key, Proxy>,
    /// Views, by tenant, group and id.
    pub views: BTreeMap<(String, String, String), View>,
    /// Operations, by tenant and uid.
    pub operations: BTreeMap<Key, Operation>,
    /// Tokens, by id.
    pub tokens: BTreeMap<String, TokenRecord>,
    /// Policy keys, by id.
    pub keys: BTreeMap<String, KeyRecord>,
    /// Requests that have been done, by tenant and key. Many, and copied with each change.
    pub requests: BTreeMap<Key, Arc<RequestRecord>>,
    revisions: HashMap<String, u64>,
}

/// Changes to be made at once.
#[derive(Default, Debug)]
pub struct Txn {
    puts: Vec<Object>,
    deletes: Vec<Object>,
}

impl Txn {
    /// Creates or replaces an object.
    pub fn put(&mut self, object: Object) {
        self.puts.push(object);
    }

    /// Removes an object.
    pub fn delete(&mut self, object: Object) {
        self.deletes.push(object);
    }

    /// Nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty()
    }
}

fn pair(tenant: &str, id: &str) -> Key {
    (tenant.to_owned(), id.to_owned())
}

impl Model {
    /// Reads everything from the store.
    ///
    /// # Errors
    /// A value that this program cannot read, by its key.
    pub fn load(listing: Listing) -> Result<Self, String> {
        let mut model = Self { revision: listing.revision, ..Self::default() };
        for entry in listing.entries {
            let object = Object::decode(&entry.key, &entry.value)?;
            if object.key() != entry.key {
                return Err(format!("{}: the object in it is {}", entry.key, object.key()));
            }
            model.insert(object, entry.revision);
        }
        Ok(model)
    }

    /// What the store is asked to do: each key has to be as it is in this model.
    pub fn changes(&self, txn: &Txn) -> Vec<Change> {
        let change = |object: &Object, value: Option<Vec<u8>>| {
            let key = object.key();
            let expect = self.revisions.get(&key).map_or(Expect::Absent, |r| Expect::Revision(*r));
            Change { key, expect, value }
        };
        let puts = txn.puts.iter().map(|o| change(o, Some(o.encode())));
        puts.chain(txn.deletes.iter().map(|o| change(o, None))).collect()
    }

    /// The model after the changes have been committed.
    pub fn applied(&self, txn: Txn, revision: u64) -> Self {
        let mut next = self.clone();
        next.revision = revision;
        for object in txn.puts {
            next.insert(object, revision);
        }
        for object in txn.deletes {
            next.remove(&object);
        }
        next
    }

    fn insert(&mut self, object: Object, revision: u64) {
        self.revisions.insert(object.key(), revision);
        match object {
            Object::Policy(o) => drop(self.policies.insert(pair(&o.tenant, &o.id), o)),
            Object::Group(o) => drop(self.groups.insert(pair(&o.tenant, &o.id), o)),
            Object::Disk(o) => drop(self.disks.insert((o.group_uid.clone(), o.slot), o)),
            Object::Proxy(o) => drop(self.proxies.insert(pair(&o.tenant, &o.id), o)),
            Object::View(o) => drop(self.views.insert((o.tenant.clone(), o.group.clone(), o.id.clone()), o)),
            Object::Operation(o) => drop(self.operations.insert(pair(&o.tenant, &o.uid), o)),
            Object::Token(o) => drop(self.tokens.insert(o.id.clone(), o)),
            Object::Key(o) => drop(self.keys.insert(o.id.clone(), o)),
            Object::Request(o) => drop(self.requests.insert(pair(&o.tenant, &o.key), Arc::new(o))),
            Object::Term(term) => self.term = term,
        }
    }

    fn remove(&mut self, object: &Object) {
        self.revisions.remove(&object.key());
        match object {
            Object::Policy(o) => drop(self.policies.remove(&pair(&o.tenant, &o.id))),
            Object::Group(o) => drop(self.groups.remove(&pair(&o.tenant, &o.id))),
            Object::Disk(o) => drop(self.disks.remove(&(o.group_uid.clone(), o.slot))),
            Object::Proxy(o) => drop(self.proxies.remove(&pair(&o.tenant, &o.id))),
            Object::View(o) => drop(self.views.remove(&(o.tenant.clone(), o.group.clone(), o.id.clone()))),
            Object::Operation(o) => drop(self.operations.remove(&pair(&o.tenant, &o.uid))),
            Object::Token(o) => drop(self.tokens.remove(&o.id)),
            Object::Key(o) => drop(self.keys.remove(&o.id)),
            Object::Request(o) => drop(self.requests.remove(&pair(&o.tenant, &o.key))),
            Object::Term(_) => self.term = 0,
        }
    }

    /// A policy.
    ///
    /// # Errors
    /// There is none.
    pub fn policy(&self, name: &Name) -> Result<&Policy, Problem> {
        self.policies.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// A group.
    ///
    /// # Errors
    /// There is none.
    pub fn group(&self, name: &Name) -> Result<&Group, Problem> {
        self.groups.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// A proxy.
    ///
    /// # Errors
    /// There is none.
    pub fn proxy(&self, name: &Name) -> Result<&Proxy, Problem> {
        self.proxies.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// An operation.
    ///
    /// # Errors
    /// There is none.
    pub fn operation(&self, name: &Name) -> Result<&Operation, Problem> {
        self.operations.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// A view.
    ///
    /// # Errors
    /// There is none.
    pub fn view(&self, group: &Name, id: &str) -> Result<&View, Problem> {
        self.views
            .get(&(group.tenant.clone(), group.id.clone(), id.to_owned()))
            .ok_or_else(|| Problem::not_found("view", crate::names::child(group, "views", id)))
    }

    /// The group whose stream has this uid.
    pub fn group_by_uid(&self, uid: &str) -> Option<&Group> {
        self.groups.values().find(|g| g.uid == uid)
    }

    /// The proxy with this uid.
    pub fn proxy_by_uid(&self, uid: &str) -> Option<&Proxy> {
        self.proxies.values().find(|p| p.uid == uid)
    }

    /// The proxy at the source of a group, if it still exists.
    pub fn source_of(&self, group: &Group) -> Option<&Proxy> {
        self.proxies.get(&pair(&group.tenant, &group.source))
    }

    /// The proxy at the target of a group, if it still exists.
    pub fn target_of(&self, group: &Group) -> Option<&Proxy> {
        self.proxies.get(&pair(&group.tenant, &group.target))
    }

    /// The promises made for a group.
    pub fn policy_of(&self, group: &Group) -> Option<&Policy> {
        self.policies.get(&pair(&group.tenant, &group.policy))
    }

    /// Disks of a group, in the order of their slots, without those that are leaving.
    pub fn disks_of(&self, group: &Group) -> impl Iterator<Item = &Disk> {
        self.disks.range((group.uid.clone(), 0)..=(group.uid.clone(), u16::MAX)).map(|(_, d)| d).filter(|d| !d.leaving)
    }

    /// Views of a group.
    pub fn views_of(&self, group: &Group) -> impl Iterator<Item = &View> {
        let (tenant, id) = (group.tenant.clone(), group.id.clone());
        self.views
            .range((tenant.clone(), id.clone(), String::new())..)
            .take_while(move |((t, g, _), _)| *t == tenant && *g == id)
            .map(|(_, v)| v)
    }

    /// The operation that is being done on a group, if any.
    pub fn active_operation(&self, group: &Group) -> Option<&Operation> {
        match &group.phase {
            GroupPhase::FailingOver { operation } => self.operations.get(&pair(&group.tenant, operation)),
            _ => None,
        }
    }

    /// The etag of an object: changes with it.
    pub fn etag(&self, object_key: &str) -> String {
        self.revisions.get(object_key).map(u64::to_string).unwrap_or_default()
    }

    /// Checks an etag that a caller gave; an empty one fits.
    ///
    /// # Errors
    /// The object has changed.
    pub fn check_etag(&self, subject: impl ToString, object_key: &str, given: &str) -> Result<(), Problem> {
        let found = self.etag(object_key);
        if given.is_empty() || given == found {
            return Ok(());
        }
        Err(Problem::Changed { subject: subject.to_string(), given: given.to_owned(), found })
    }

    /// Ended operations of a tenant that are too many to keep, oldest first.
    pub fn surplus_operations(&self, tenant: &str) -> Vec<&Operation> {
        let mut ended: Vec<&Operation> =
            self.operations.values().filter(|o| o.tenant == tenant && o.ended_ns != 0).collect();
        ended.sort_by_key(|o| o.ended_ns);
        let surplus = ended.len().saturating_sub(MAX_ENDED_OPERATIONS);
        ended.truncate(surplus);
        ended
    }
}
