//! All objects at one revision of the store, and changes to them.
//!
//! A change is decided on one model, committed with the revisions that it was decided on, and only then becomes the next
//! model: what is read is always what is stored.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::audit::Head;
use crate::authorities::Authorities;
use crate::certificates::Certificate;
use crate::keys::{Recovery, Wrapping};
use crate::machine::Machine;
use crate::names::Name;
use crate::objects::{Disk, Group, KeyRecord, Object, Operation, Policy, Proxy, View, Way};
use crate::plan::Plan;
use crate::plan::run::Run;
use crate::problem::Problem;
use crate::requests::RequestRecord;
use crate::restore::Restored;
use crate::store::{Change, Expect, Listing, MAX_VALUE};
use crate::token::TokenRecord;

/// Most objects of a kind under a tenant.
pub const MAX_OBJECTS: usize = 4096;
/// Operations that are kept after their end, per tenant.
pub const MAX_ENDED_OPERATIONS: usize = 500;
/// Runs of a plan that are kept after their end.
const MAX_ENDED_RUNS: usize = 50;
/// Most join tokens that are neither spent nor expired.
pub const MAX_TOKENS: usize = 1000;

/// Bytes of an object in one value of the store; what is longer lies in several.
const PART: usize = MAX_VALUE - 1024;
/// Most values of one object: what fits a transaction together with others. A group of the most disks needs seven.
const MAX_PARTS: usize = 12;
/// What the keys of parts begin with.
const PARTS: &str = "parts/";

/// Tenant and id.
pub type Key = (String, String);

/// The objects. All maps are by tenant and id unless said otherwise.
#[derive(Clone, Default, Debug)]
pub struct Model {
    /// Of the store.
    pub revision: u64,
    /// Highest term.
    pub term: u64,
    /// The newest record of the audit log.
    pub audit: Head,
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
    /// Machines.
    pub machines: BTreeMap<Key, Machine>,
    /// Failover plans.
    pub plans: BTreeMap<Key, Plan>,
    /// Runs of plans, by tenant and uid.
    pub runs: BTreeMap<Key, Run>,
    /// Operations, by tenant and uid.
    pub operations: BTreeMap<Key, Operation>,
    /// Tokens, by id.
    pub tokens: BTreeMap<String, TokenRecord>,
    /// Policy keys, by id.
    pub keys: BTreeMap<String, KeyRecord>,
    /// Certificates that have been issued and are not over, by tenant and serial.
    pub certificates: BTreeMap<Key, Arc<Certificate>>,
    /// The authorities, if there has been more than the first.
    pub authorities: Option<Authorities>,
    /// The keys that policy keys are wrapped under, if there has been one beside `keys.bin`.
    pub wrapping: Option<Wrapping>,
    /// The recovery key, if one was made.
    pub recovery: Option<Recovery>,
    /// Requests that have been done, by tenant and key. Many, and copied with each change.
    pub requests: BTreeMap<Key, Arc<RequestRecord>>,
    /// That the store was restored, if it was.
    pub restored: Option<Restored>,
    /// Of every key: of an object, and of each of its parts.
    revisions: HashMap<String, u64>,
}

/// The values that hold an object, by key: one; or one that says how many parts there are, and those.
fn values(object: &Object) -> Vec<(String, Vec<u8>)> {
    let (key, value) = (object.key(), object.encode());
    if value.len() <= PART {
        return vec![(key, value)];
    }
    let parts: Vec<&[u8]> = value.chunks(PART).collect();
    let head = serde_json::to_vec(&Parted { parts: parts.len() }).expect("a number");
    let tail = parts.iter().enumerate().map(|(i, part)| (part_key(&key, i), part.to_vec()));
    std::iter::once((key.clone(), head)).chain(tail).collect()
}

/// What stands at the key of an object that lies in parts. No object begins so.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Parted {
    parts: usize,
}

fn part_key(key: &str, part: usize) -> String {
    format!("{PARTS}{key}/{part:02}")
}

/// Changes to be made at once.
#[derive(Default, Debug)]
pub struct Txn {
    puts: Vec<Object>,
    deletes: Vec<Object>,
    notes: Vec<String>,
    outcome: Option<String>,
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

    /// Says what is done elsewhere: for the audit log, which gets a record even if no object changes.
    pub fn note(&mut self, what: String) {
        self.notes.push(what);
    }

    /// Says that it was not done, and why: all that is committed is the record of that.
    pub fn denied(&mut self, why: String) {
        self.outcome = Some(why);
    }

    /// What the audit log says of it.
    pub fn outcome(&self) -> &str {
        self.outcome.as_deref().unwrap_or("done")
    }

    /// Nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty() && self.notes.is_empty() && self.outcome.is_none()
    }

    /// What is changed, for the audit log; nothing of its content. Records of requests are not named: they are there for
    /// what is.
    pub fn subjects(&self) -> Vec<String> {
        let named = |verb: &str, objects: &[Object]| -> Vec<String> {
            let objects = objects.iter().filter(|o| !matches!(o, Object::Request(_)));
            objects.map(|o| format!("{verb} {}", o.key())).collect()
        };
        [self.notes.clone(), named("put", &self.puts), named("delete", &self.deletes)].concat()
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
        let (mut parts, whole): (HashMap<_, _>, Vec<_>) = {
            let (parts, whole): (Vec<_>, Vec<_>) = listing.entries.into_iter().partition(|e| e.key.starts_with(PARTS));
            (parts.into_iter().map(|e| (e.key.clone(), e)).collect(), whole)
        };
        for mut entry in whole {
            if let Ok(Parted { parts: count }) = serde_json::from_slice(&entry.value) {
                entry.value.clear();
                for part in 0..count {
                    let key = part_key(&entry.key, part);
                    let found = parts.remove(&key).ok_or_else(|| format!("{key} is missing"))?;
                    entry.value.extend(found.value);
                    model.revisions.insert(key, found.revision);
                }
            }
            let object = Object::decode(&entry.key, &entry.value)?;
            if object.key() != entry.key {
                return Err(format!("{}: the object in it is {}", entry.key, object.key()));
            }
            model.revisions.insert(entry.key, entry.revision);
            model.insert(object);
        }
        match parts.into_keys().next() {
            Some(key) => Err(format!("{key} is a part of nothing")),
            None => Ok(model),
        }
    }

    /// What the store is asked to do: each key has to be as it is in this model.
    pub fn changes(&self, txn: &Txn) -> Vec<Change> {
        let change = |key: String, value: Option<Vec<u8>>| {
            let expect = self.revisions.get(&key).map_or(Expect::Absent, |r| Expect::Revision(*r));
            Change { key, expect, value }
        };
        let mut changes = Vec::new();
        for object in &txn.puts {
            let values = values(object);
            let key = object.key();
            let surplus = self.parts_from(&key, values.len() - 1);
            changes.extend(values.into_iter().map(|(key, value)| change(key, Some(value))));
            changes.extend(surplus.map(|key| change(key, None)));
        }
        for object in &txn.deletes {
            let key = object.key();
            changes.extend(self.parts_from(&key, 0).map(|key| change(key, None)));
            changes.push(change(key, None));
        }
        changes
    }

    /// Keys of the parts of an object that are there, from this one on.
    fn parts_from<'a>(&'a self, key: &'a str, from: usize) -> impl Iterator<Item = String> + 'a {
        (from..).map(move |part| part_key(key, part)).take_while(|key| self.revisions.contains_key(key))
    }

    /// An object that is too long for the store, by its key, with its length and the bound: refused before anything is
    /// changed.
    pub fn too_long(txn: &Txn) -> Option<(String, usize, usize)> {
        let most = PART * MAX_PARTS;
        let mut lengths = txn.puts.iter().map(|o| (o.key(), o.encode().len(), most));
        lengths.find(|(_, length, _)| *length > most)
    }

    /// The model after the changes have been committed.
    pub fn applied(&self, txn: Txn, revision: u64) -> Self {
        let changes = self.changes(&txn);
        let mut next = self.clone();
        next.revision = revision;
        for change in changes {
            match change.value {
                Some(_) => drop(next.revisions.insert(change.key, revision)),
                None => drop(next.revisions.remove(&change.key)),
            }
        }
        txn.puts.into_iter().for_each(|object| next.insert(object));
        txn.deletes.iter().for_each(|object| next.remove(object));
        next
    }

    fn insert(&mut self, object: Object) {
        match object {
            Object::Policy(o) => drop(self.policies.insert(pair(&o.tenant, &o.id), o)),
            Object::Group(o) => drop(self.groups.insert(pair(&o.tenant, &o.id), o)),
            Object::Disk(o) => drop(self.disks.insert((o.group_uid.clone(), o.slot), o)),
            Object::Proxy(o) => drop(self.proxies.insert(pair(&o.tenant, &o.id), o)),
            Object::View(o) => drop(self.views.insert((o.tenant.clone(), o.group.clone(), o.id.clone()), o)),
            Object::Operation(o) => drop(self.operations.insert(pair(&o.tenant, &o.uid), o)),
            Object::Machine(o) => drop(self.machines.insert(pair(&o.tenant, &o.id), o)),
            Object::Plan(o) => drop(self.plans.insert(pair(&o.tenant, &o.id), o)),
            Object::Run(o) => drop(self.runs.insert(pair(&o.tenant, &o.uid), o)),
            Object::Token(o) => drop(self.tokens.insert(o.id.clone(), o)),
            Object::Key(o) => drop(self.keys.insert(o.id.clone(), o)),
            Object::Certificate(o) => {
                drop(self.certificates.insert(pair(&o.tenant, &o.serial), Arc::new(o)));
            }
            Object::Request(o) => drop(self.requests.insert(pair(&o.tenant, &o.key), Arc::new(o))),
            Object::Authorities(o) => self.authorities = Some(o),
            Object::Wrapping(o) => self.wrapping = Some(o),
            Object::Recovery(o) => self.recovery = Some(o),
            Object::Term(term) => self.term = term,
            Object::Audit(head) => self.audit = head,
            Object::Restored(o) => self.restored = Some(o),
        }
    }

    fn remove(&mut self, object: &Object) {
        match object {
            Object::Policy(o) => drop(self.policies.remove(&pair(&o.tenant, &o.id))),
            Object::Group(o) => drop(self.groups.remove(&pair(&o.tenant, &o.id))),
            Object::Disk(o) => drop(self.disks.remove(&(o.group_uid.clone(), o.slot))),
            Object::Proxy(o) => drop(self.proxies.remove(&pair(&o.tenant, &o.id))),
            Object::View(o) => drop(self.views.remove(&(o.tenant.clone(), o.group.clone(), o.id.clone()))),
            Object::Operation(o) => drop(self.operations.remove(&pair(&o.tenant, &o.uid))),
            Object::Machine(o) => drop(self.machines.remove(&pair(&o.tenant, &o.id))),
            Object::Plan(o) => drop(self.plans.remove(&pair(&o.tenant, &o.id))),
            Object::Run(o) => drop(self.runs.remove(&pair(&o.tenant, &o.uid))),
            Object::Token(o) => drop(self.tokens.remove(&o.id)),
            Object::Key(o) => drop(self.keys.remove(&o.id)),
            Object::Certificate(o) => drop(self.certificates.remove(&pair(&o.tenant, &o.serial))),
            Object::Request(o) => drop(self.requests.remove(&pair(&o.tenant, &o.key))),
            Object::Authorities(_) => self.authorities = None,
            Object::Wrapping(_) => self.wrapping = None,
            Object::Recovery(_) => self.recovery = None,
            Object::Term(_) => self.term = 0,
            Object::Audit(_) => self.audit = Head::default(),
            Object::Restored(_) => self.restored = None,
        }
    }

    /// Version of desired states: rises with the store's revision, and over a restore.
    pub fn version(&self) -> u64 {
        self.revision + self.restored.as_ref().map_or(0, |r| r.offset)
    }

    /// From which version of desired states on proxies know these authorities.
    pub fn authorities_version(&self) -> u64 {
        self.revisions.get("authorities").copied().unwrap_or(0) + self.version() - self.revision
    }

    /// From which version of desired states on a group's proxies know this key.
    pub fn key_version(&self, id: &str) -> u64 {
        self.revisions.get(&format!("keys/{id}")).copied().unwrap_or(0) + self.version() - self.revision
    }

    /// Restored from a backup, and not confirmed.
    pub fn observing(&self) -> bool {
        self.restored.as_ref().is_some_and(|r| r.observing)
    }

    /// Whether what this proxy has is still to be asked for, before it is told anything.
    pub fn unasked(&self, proxy_uid: &str) -> bool {
        self.restored.as_ref().is_some_and(|r| !r.seen.iter().any(|s| s == proxy_uid))
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

    /// A machine.
    ///
    /// # Errors
    /// There is none.
    pub fn machine(&self, name: &Name) -> Result<&Machine, Problem> {
        self.machines.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// A plan.
    ///
    /// # Errors
    /// There is none.
    pub fn plan(&self, name: &Name) -> Result<&Plan, Problem> {
        self.plans.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// A run of a plan.
    ///
    /// # Errors
    /// There is none.
    pub fn run(&self, name: &Name) -> Result<&Run, Problem> {
        self.runs.get(&pair(&name.tenant, &name.id)).ok_or_else(|| Problem::not_found(name.kind.noun(), name))
    }

    /// An operation, of a group or a plan, for the API.
    ///
    /// # Errors
    /// There is none.
    pub fn shown_operation(&self, name: &Name) -> Result<afterimage_wire::v1::Operation, Problem> {
        match self.run(name) {
            Ok(run) => Ok(crate::plan::shown::run(self, run)),
            Err(_) => Ok(crate::convert::operation_to_proto(self, self.operation(name)?)),
        }
    }

    /// Whether an operation, of a group or a plan, is over.
    ///
    /// # Errors
    /// There is none.
    pub fn has_ended(&self, name: &Name) -> Result<bool, Problem> {
        let ended_ns = match self.run(name) {
            Ok(run) => run.ended_ns,
            Err(_) => self.operation(name)?.ended_ns,
        };
        Ok(ended_ns != 0)
    }

    /// Runs of a plan, newest first.
    pub fn runs_of(&self, plan: &Plan) -> Vec<&Run> {
        let mut runs: Vec<&Run> =
            self.runs.values().filter(|run| run.tenant == plan.tenant && run.plan == plan.id).collect();
        runs.sort_by(|a, b| b.created_ns.cmp(&a.created_ns).then_with(|| a.uid.cmp(&b.uid)));
        runs
    }

    /// The run of a plan that goes on.
    pub fn running(&self, plan: &Plan) -> Option<&Run> {
        let of = |run: &&Run| run.tenant == plan.tenant && run.plan == plan.id && run.ended_ns == 0;
        self.runs.values().find(of)
    }

    /// Ended runs of a plan that are too many to keep.
    pub fn surplus_runs(&self, plan: &Plan) -> Vec<&Run> {
        self.runs_of(plan).into_iter().filter(|run| run.ended_ns != 0).skip(MAX_ENDED_RUNS).collect()
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

    /// What is known of a certificate.
    pub fn certificate(&self, tenant: &str, serial: &str) -> Option<&Arc<Certificate>> {
        self.certificates.get(&pair(tenant, serial))
    }

    /// The group whose stream has this uid.
    pub fn group_by_uid(&self, uid: &str) -> Option<&Group> {
        self.groups.values().find(|g| g.uid == uid)
    }

    /// The group that a stream with this uid is of, and which of its streams that is.
    pub fn stream(&self, uid: &str) -> Option<(&Group, Way)> {
        let back = |g: &&Group| g.stream(Way::Back) == Some(uid);
        let forth = self.group_by_uid(uid).map(|group| (group, Way::Forth));
        forth.or_else(|| self.groups.values().find(back).map(|group| (group, Way::Back)))
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

    /// Machines of a group's disks, in the order of their ids.
    pub fn machines_of<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = &'a Machine> {
        self.machines.values().filter(|m| m.tenant == group.tenant && m.group == group.id)
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
        self.operations.get(&pair(&group.tenant, group.phase.operation()?))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::{Choice, Failover, Spec, Verb};
    use crate::objects::ExportRecord;
    use crate::store::Store;
    use crate::store::redb::RedbStore;

    /// A failover of so many disks.
    fn operation(disks: usize, version: u64) -> Object {
        let spec = Spec::new(Verb::Failover, Choice::Latest);
        let mut work = Failover::new(spec, &[], ("failover", ""), 0, 0, "ok".into(), 1);
        work.facts.disks = (0..disks).map(|_| crate::objects::new_uid()).collect();
        let export = |uid: &String| ExportRecord {
            disk: "a-disk-with-a-name-of-usual-length".into(),
            disk_uid: uid.clone(),
            name: format!("shop.failover/{uid}"),
            uris: vec![format!("nbd+unix:///shop.failover/{uid}?socket=/run/afterimage/views.sock")],
            size: 1 << 40,
        };
        work.facts.exports = work.facts.disks.iter().map(export).collect();
        let (tenant, uid, group) = ("default".to_owned(), "op".to_owned(), "shop".to_owned());
        let (request_id, actor) = (String::new(), "admin/local".to_owned());
        Object::Operation(Operation {
            uid,
            tenant,
            version,
            group,
            request_id,
            actor,
            created_ns: 1,
            ended_ns: 0,
            work: Box::new(work),
        })
    }

    async fn put(store: &RedbStore, model: &Model, object: &Object) -> Model {
        let mut txn = Txn::default();
        txn.put(object.clone());
        let revision = store.commit(model.changes(&txn)).await.unwrap();
        let next = model.applied(txn, revision);
        let read = Model::load(store.list("").await.unwrap()).unwrap();
        assert_eq!((&next.operations, &next.revisions), (&read.operations, &read.revisions), "as it is read back");
        next
    }

    #[tokio::test]
    async fn an_object_of_any_group_fits_the_store_and_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&folder.path().join("s.redb")).unwrap();
        let mut model = Model::default();
        let keys = async || store.list("").await.unwrap().entries.len();
        // More, fewer, as many, one value, many again.
        for (version, disks, least, most) in
            [(1, afterimage_wire::MAX_DISKS, 5, 8), (2, 400, 3, 4), (3, 400, 3, 4), (4, 2, 1, 1), (5, 700, 4, 6)]
        {
            let object = operation(disks, version);
            model = put(&store, &model, &object).await;
            assert!((least..=most).contains(&keys().await), "{disks} disks: {} values", keys().await);
            assert_eq!(Object::Operation(model.operations.values().next().unwrap().clone()), object);
        }
        let mut txn = Txn::default();
        txn.delete(operation(1, 6));
        store.commit(model.changes(&txn)).await.unwrap();
        assert_eq!(keys().await, 0, "no part is left");
        // Two coordinators with the same model: one of them is told that it has changed.
        let empty = Model::default();
        put(&store, &empty, &operation(900, 1)).await;
        let mut txn = Txn::default();
        txn.put(operation(900, 1));
        assert!(store.commit(empty.changes(&txn)).await.is_err());
    }

    #[tokio::test]
    async fn an_object_of_which_a_part_is_missing_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&folder.path().join("s.redb")).unwrap();
        put(&store, &Model::default(), &operation(900, 1)).await;
        let whole = store.list("").await.unwrap();
        let without = |key: &str| {
            let entries = whole.entries.iter().filter(|e| e.key != key).cloned().collect();
            Model::load(Listing { entries, revision: whole.revision }).unwrap_err()
        };
        assert!(without("parts/operations/default/op/01").contains("parts/operations/default/op/01 is missing"));
        assert!(without("operations/default/op").contains("is a part of nothing"));
    }

    #[test]
    fn what_is_too_long_for_any_store_is_named() {
        let mut txn = Txn::default();
        txn.put(operation(afterimage_wire::MAX_DISKS, 1));
        assert_eq!(Model::too_long(&txn), None);
        txn.put(operation(4 * afterimage_wire::MAX_DISKS, 1));
        assert_eq!(Model::too_long(&txn).unwrap().0, "operations/default/op");
    }
}
