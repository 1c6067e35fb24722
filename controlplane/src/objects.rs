//! The objects that are kept in the store, one key each, as JSON. Fields are only ever added, with a default.

use serde::{Deserialize, Serialize};

use crate::authorities::Authorities;
use crate::certificates::Certificate;
use crate::failover::Failover;
use crate::keys::{Recovery, Wrapping};
use crate::machine::Machine;
use crate::names::{Kind, Name, child};
use crate::plan::Plan;
use crate::plan::run::Run;
use crate::policy::Promises;
use crate::requests::RequestRecord;
use crate::restore::Restored;
use crate::token::TokenRecord;

/// A policy.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// Uid.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Id.
    pub id: String,
    /// Rises with each change.
    pub version: u64,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub updated_ns: u64,
    /// For a person.
    pub description: String,
    /// What is promised.
    pub promises: Promises,
}

/// Where a group stands, as decided by operations; that no complete point is held yet is seen from reports.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupPhase {
    /// Its source writes.
    Protecting,
    /// An operation is taking it to its target.
    FailingOver {
        /// Uid of the operation.
        operation: String,
    },
    /// It runs from a view at its target.
    FailedOver {
        /// Id of the view.
        view: String,
    },
    /// It runs from a view at its target, and an operation is changing that: back to its source, or to another point.
    Changing {
        /// Uid of the operation.
        operation: String,
        /// Id of the view that it ran from when that began.
        view: String,
    },
    /// It runs from a view at its target, and what is written there is protected back to its source.
    FailingBack {
        /// Id of the view.
        view: String,
    },
    /// Its source writes again, with what was written to the view; that is not settled yet.
    FailedBack {
        /// Id of the view that it ran from, which its target keeps.
        view: String,
        /// The newest record that the target held then: a point above it is one of what the source writes since.
        after: u64,
    },
    /// Failed back, and an operation settles that: it stays there, or goes back to the view.
    Settling {
        /// Uid of the operation.
        operation: String,
        /// As in [`Self::FailedBack`].
        view: String,
        /// As in [`Self::FailedBack`].
        after: u64,
    },
    /// Its protection is being ended.
    Deleting,
}

impl GroupPhase {
    /// Its source does not write: it runs from a view at its target.
    pub fn is_failed_over(&self) -> bool {
        matches!(self, Self::FailedOver { .. } | Self::Changing { .. } | Self::FailingBack { .. })
    }

    /// Id of the view that it runs from, or that it ran from before it was failed back.
    pub fn view(&self) -> Option<&str> {
        match self {
            Self::FailedOver { view } | Self::FailingBack { view } => Some(view),
            Self::Changing { view, .. } | Self::FailedBack { view, .. } | Self::Settling { view, .. } => Some(view),
            Self::Protecting | Self::FailingOver { .. } | Self::Deleting => None,
        }
    }

    /// Uid of the operation that is being done on it.
    pub fn operation(&self) -> Option<&str> {
        match self {
            Self::FailingOver { operation } | Self::Changing { operation, .. } => Some(operation),
            Self::Settling { operation, .. } => Some(operation),
            Self::Protecting | Self::FailedOver { .. } | Self::Deleting => None,
            Self::FailingBack { .. } | Self::FailedBack { .. } => None,
        }
    }
}

/// Which of a group's streams.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Way {
    /// From its source to its target.
    Forth,
    /// While it is failing back: from its target to its source.
    Back,
}

/// The stream by which a group that is failing back is protected to its source. As long as it is here, both proxies are to
/// have it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reverse {
    /// Uid, another one each time.
    pub stream_uid: String,
    /// Id of the view whose writes it carries.
    pub view: String,
    /// Generation of its disks, as the group's source has been told, which is its target.
    pub generation: u64,
    /// Generation under which the view may be written.
    pub writer_generation: u64,
    /// All I/O of the view's hosts is held.
    pub hold: bool,
}

/// A reverse stream that is over, and that a proxy which could not be told is still to end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Leftover {
    /// Uid of the stream.
    pub stream_uid: String,
    /// The group's target is still to end it.
    pub at_target: bool,
    /// The group's source is still to drop what it holds of it.
    pub at_source: bool,
}

/// A group.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Group {
    /// Uid; also the id of its stream.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Id.
    pub id: String,
    /// Rises with each change.
    pub version: u64,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub updated_ns: u64,
    /// For a person.
    pub description: String,
    /// Id of its policy.
    pub policy: String,
    /// Id of the proxy at its disks.
    pub source: String,
    /// Id of the proxy that keeps its journal.
    pub target: String,
    /// The key under which its writers' keys are wrapped.
    pub key: String,
    /// Generation of its disks, as its target has been told.
    pub generation: u64,
    /// Generation under which its source may write; below the other once the disks have been taken from it.
    pub writer_generation: u64,
    /// Slot of the next disk.
    pub next_slot: u16,
    /// Phase.
    pub phase: GroupPhase,
    /// The source holds all I/O of the disks, now and after it restarts.
    pub hold: bool,
    /// A complete point of all disks has been held.
    pub complete: bool,
    /// As given when it was created.
    #[serde(default)]
    pub request_id: String,
    /// Why its target was chosen; empty if it was named.
    #[serde(default)]
    pub placement: String,
    /// By which it is failing back.
    #[serde(default)]
    pub reverse: Option<Reverse>,
    /// What a failback brought has been written to its source's disks, or has begun to be: what its source had itself is not
    /// there any more. Until a failback is committed.
    #[serde(default)]
    pub overwritten: bool,
    /// What is left of failbacks that are over.
    #[serde(default)]
    pub leftovers: Vec<Leftover>,
    /// Keys before [`Self::key`], newest first: what was written under them is still there.
    #[serde(default)]
    pub older_keys: Vec<String>,
    /// The key that takes the place of [`Self::key`] as soon as its target has it; empty for none.
    #[serde(default)]
    pub next_key: String,
    /// Nothing of it is sent, until it is resumed or failed over.
    #[serde(default)]
    pub pause: Option<Pause>,
}

/// That a group is paused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pause {
    /// Since when, nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// "role/name" of who paused it.
    pub by: String,
    /// For a person.
    pub reason: String,
}

impl Group {
    /// Id of the proxy that writes a stream.
    pub fn sender(&self, way: Way) -> &str {
        if way == Way::Forth { &self.source } else { &self.target }
    }

    /// Id of the proxy that keeps a stream.
    pub fn keeper(&self, way: Way) -> &str {
        if way == Way::Forth { &self.target } else { &self.source }
    }

    /// Uid of a stream, if there is one.
    pub fn stream(&self, way: Way) -> Option<&str> {
        match way {
            Way::Forth => Some(&self.uid),
            Way::Back => self.reverse.as_ref().map(|reverse| reverse.stream_uid.as_str()),
        }
    }

    /// Notes that a proxy is still to end a reverse stream.
    pub fn leave(&mut self, stream_uid: &str, at_target: bool, at_source: bool) {
        if let Some(known) = self.leftovers.iter_mut().find(|l| l.stream_uid == stream_uid) {
            known.at_target |= at_target;
            known.at_source |= at_source;
        } else {
            self.leftovers.push(Leftover { stream_uid: stream_uid.to_owned(), at_target, at_source });
        }
    }

    /// Its name.
    pub fn name(&self) -> Name {
        Name::new(&self.tenant, Kind::Group, &self.id)
    }

    /// Ids of all its keys, newest first.
    pub fn all_keys(&self) -> impl Iterator<Item = &str> {
        let next = Some(self.next_key.as_str()).filter(|id| !id.is_empty());
        next.into_iter().chain(std::iter::once(self.key.as_str())).chain(self.older_keys.iter().map(String::as_str))
    }
}

/// A disk of a group.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// Uid.
    pub uid: String,
    /// Uid of its group.
    pub group_uid: String,
    /// Id within the group.
    pub id: String,
    /// Slot in the stream.
    pub slot: u16,
    /// On the source's host.
    pub path: String,
    /// As the host sees it.
    pub serial: String,
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// Physical block, bytes.
    pub physical_block: u32,
    /// NBD export.
    pub export_name: String,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// It is leaving the stream.
    #[serde(default)]
    pub leaving: bool,
    /// Raw image on the target's host with which its replica begins; empty for none.
    #[serde(default)]
    pub seed_path: String,
}

/// A proxy that has joined.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Proxy {
    /// Uid.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Id.
    pub id: String,
    /// Rises with each change.
    pub version: u64,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// SHA-256 of its key, hex. Only a certificate with this key opens a session.
    pub pin: String,
    /// The key before, until the proxy has registered with the new one.
    #[serde(default)]
    pub previous_pin: Option<String>,
    /// When its newest certificate ends, nanoseconds since the Unix epoch.
    pub expire_time_ns: u64,
    /// As it last registered: where sources connect to.
    #[serde(default)]
    pub data_address: String,
    /// As it last registered: where machines connect to.
    #[serde(default)]
    pub nbd_addresses: Vec<String>,
    /// As it last registered.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// As it last registered.
    #[serde(default)]
    pub boot_id: String,
    /// As it last registered.
    #[serde(default)]
    pub software_version: String,
    /// When it should have its certificate renewed, nanoseconds since the Unix epoch; 0 where that was not noted.
    #[serde(default)]
    pub renew_time_ns: u64,
    /// As it last registered: where it stands; empty if that is not known.
    #[serde(default)]
    pub site: String,
}

impl Proxy {
    /// Its name.
    pub fn name(&self) -> Name {
        Name::new(&self.tenant, Kind::Proxy, &self.id)
    }

    /// Whether it says that it can do this; one that says nothing of the kind is asked and may refuse.
    pub fn can(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|c| c == capability)
    }
}

/// A restore point as an operation or view keeps it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PointRecord {
    /// Last record that it holds.
    pub seq: u64,
    /// Number of the cut, if it is one.
    pub cut: Option<u64>,
    /// The source's wall clock there.
    pub wall_ns: u64,
    /// Label.
    #[serde(default)]
    pub label: String,
    /// Clock in sync.
    #[serde(default)]
    pub clock_synced: bool,
    /// Nothing unflushed.
    #[serde(default)]
    pub flush_clean: bool,
    /// Uids of the disks that it holds.
    pub disks: Vec<String>,
    /// Branch.
    #[serde(default)]
    pub timeline: String,
}

/// What a view is for.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ViewKind {
    /// Read-only.
    Browse,
    /// Writable, thrown away.
    Test,
    /// What a failed over group runs from.
    Failover,
}

/// An export of a view.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExportRecord {
    /// Id of the disk.
    pub disk: String,
    /// Uid of the disk.
    pub disk_uid: String,
    /// NBD export.
    pub name: String,
    /// NBD URIs.
    pub uris: Vec<String>,
    /// Bytes.
    pub size: u64,
}

/// A view.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct View {
    /// Uid.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Id of its group.
    pub group: String,
    /// Id.
    pub id: String,
    /// Rises with each change.
    pub version: u64,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// What it is for.
    pub kind: ViewKind,
    /// It can be written.
    pub writable: bool,
    /// What it shows.
    pub point: PointRecord,
    /// Uids of the disks asked for; none for all.
    pub disk_uids: Vec<String>,
    /// Exports; none until it is open.
    pub exports: Vec<ExportRecord>,
    /// For a person.
    pub reason: String,
    /// It has been opened.
    pub open: bool,
    /// It is being closed: the proxy need not open it again.
    #[serde(default)]
    pub closing: bool,
    /// As given.
    #[serde(default)]
    pub request_id: String,
    /// It is closed, and the target keeps what was written to it: a branch.
    #[serde(default)]
    pub kept: bool,
}

impl View {
    /// Its name.
    pub fn name(&self) -> String {
        child(&self.group_name(), "views", &self.id)
    }

    /// The name of its group.
    pub fn group_name(&self) -> Name {
        Name::new(&self.tenant, Kind::Group, &self.group)
    }

    /// Its name at the proxy: unique there, and fit for a file name.
    pub fn proxy_name(&self) -> String {
        proxy_view_name(&self.tenant, &self.group, &self.id)
    }
}

/// The name of a view at its proxy. Ids hold no dots, so two views never share one.
pub fn proxy_view_name(tenant: &str, group: &str, id: &str) -> String {
    if tenant == crate::names::DEFAULT_TENANT { format!("{group}.{id}") } else { format!("{tenant}.{group}.{id}") }
}

/// Long work.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Operation {
    /// Uid.
    pub uid: String,
    /// Tenant.
    pub tenant: String,
    /// Rises with each change.
    pub version: u64,
    /// Id of the group that it works on.
    pub group: String,
    /// As given.
    pub request_id: String,
    /// Who asked.
    pub actor: String,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Nanoseconds since the Unix epoch; 0 before the end.
    pub ended_ns: u64,
    /// The work.
    pub work: Box<Failover>,
}

impl Operation {
    /// Its name.
    pub fn name(&self) -> Name {
        Name::new(&self.tenant, Kind::Operation, &self.uid)
    }
}

/// A policy key, wrapped.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeyRecord {
    /// Uid.
    pub id: String,
    /// Nonce and sealed key, hex.
    pub wrapped: String,
    /// Id of the wrapping key; empty for `keys.bin` itself.
    #[serde(default)]
    pub under: String,
    /// When it was made, nanoseconds since the Unix epoch; 0 where an earlier version made it.
    #[serde(default)]
    pub since_ns: u64,
}

/// An object of the store.
#[derive(Clone, PartialEq, Debug)]
pub enum Object {
    /// A policy.
    Policy(Policy),
    /// A group.
    Group(Group),
    /// A disk.
    Disk(Disk),
    /// A proxy.
    Proxy(Proxy),
    /// A view.
    View(View),
    /// An operation.
    Operation(Operation),
    /// A machine.
    Machine(Machine),
    /// A failover plan.
    Plan(Plan),
    /// A run of a plan.
    Run(Run),
    /// A join token.
    Token(TokenRecord),
    /// A policy key.
    Key(KeyRecord),
    /// A certificate that has been issued.
    Certificate(Certificate),
    /// The authorities, since there has been more than the first.
    Authorities(Authorities),
    /// The keys that policy keys are wrapped under, since there has been one beside `keys.bin`.
    Wrapping(Wrapping),
    /// The recovery key.
    Recovery(Recovery),
    /// A request that has been done.
    Request(RequestRecord),
    /// The highest term.
    Term(u64),
    /// The newest record of the audit log.
    Audit(crate::audit::Head),
    /// That the store was restored from a backup.
    Restored(Restored),
}

impl Object {
    /// Its key in the store.
    pub fn key(&self) -> String {
        match self {
            Self::Policy(o) => format!("policies/{}/{}", o.tenant, o.id),
            Self::Group(o) => format!("groups/{}/{}", o.tenant, o.id),
            Self::Disk(o) => format!("disks/{}/{:05}", o.group_uid, o.slot),
            Self::Proxy(o) => format!("proxies/{}/{}", o.tenant, o.id),
            Self::View(o) => format!("views/{}/{}/{}", o.tenant, o.group, o.id),
            Self::Operation(o) => format!("operations/{}/{}", o.tenant, o.uid),
            Self::Machine(o) => format!("machines/{}/{}", o.tenant, o.id),
            Self::Plan(o) => format!("plans/{}/{}", o.tenant, o.id),
            Self::Run(o) => format!("runs/{}/{}", o.tenant, o.uid),
            Self::Token(o) => format!("tokens/{}", o.id),
            Self::Key(o) => format!("keys/{}", o.id),
            Self::Certificate(o) => format!("certificates/{}/{}", o.tenant, o.serial),
            Self::Request(o) => format!("requests/{}/{}", o.tenant, o.key),
            Self::Authorities(_) => "authorities".to_owned(),
            Self::Wrapping(_) => "wrapping".to_owned(),
            Self::Recovery(_) => "recovery".to_owned(),
            Self::Term(_) => "term".to_owned(),
            Self::Audit(_) => "audit".to_owned(),
            Self::Restored(_) => "restored".to_owned(),
        }
    }

    /// The stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let json = match self {
            Self::Policy(o) => serde_json::to_vec(o),
            Self::Group(o) => serde_json::to_vec(o),
            Self::Disk(o) => serde_json::to_vec(o),
            Self::Proxy(o) => serde_json::to_vec(o),
            Self::View(o) => serde_json::to_vec(o),
            Self::Operation(o) => serde_json::to_vec(o),
            Self::Machine(o) => serde_json::to_vec(o),
            Self::Plan(o) => serde_json::to_vec(o),
            Self::Run(o) => serde_json::to_vec(o),
            Self::Token(o) => serde_json::to_vec(o),
            Self::Key(o) => serde_json::to_vec(o),
            Self::Authorities(o) => serde_json::to_vec(o),
            Self::Wrapping(o) => serde_json::to_vec(o),
            Self::Recovery(o) => serde_json::to_vec(o),
            Self::Certificate(o) => serde_json::to_vec(o),
            Self::Request(o) => serde_json::to_vec(o),
            Self::Term(o) => serde_json::to_vec(o),
            Self::Audit(o) => serde_json::to_vec(o),
            Self::Restored(o) => serde_json::to_vec(o),
        };
        json.expect("objects are plain data with string keys")
    }

    /// Reads a stored object.
    ///
    /// # Errors
    /// The key names no kind of object, or the value does not read as one.
    pub fn decode(key: &str, value: &[u8]) -> Result<Self, String> {
        fn read<T: for<'a> Deserialize<'a>>(key: &str, value: &[u8]) -> Result<T, String> {
            serde_json::from_slice(value).map_err(|e| format!("{key}: {e}"))
        }
        let kind = key.split('/').next().unwrap_or_default();
        Ok(match kind {
            "policies" => Self::Policy(read(key, value)?),
            "groups" => Self::Group(read(key, value)?),
            "disks" => Self::Disk(read(key, value)?),
            "proxies" => Self::Proxy(read(key, value)?),
            "views" => Self::View(read(key, value)?),
            "operations" => Self::Operation(read(key, value)?),
            "machines" => Self::Machine(read(key, value)?),
            "plans" => Self::Plan(read(key, value)?),
            "runs" => Self::Run(read(key, value)?),
            "tokens" => Self::Token(read(key, value)?),
            "keys" => Self::Key(read(key, value)?),
            "certificates" => Self::Certificate(read(key, value)?),
            "requests" => Self::Request(read(key, value)?),
            "authorities" => Self::Authorities(read(key, value)?),
            "wrapping" => Self::Wrapping(read(key, value)?),
            "recovery" => Self::Recovery(read(key, value)?),
            "term" => Self::Term(read(key, value)?),
            "audit" => Self::Audit(read(key, value)?),
            "restored" => Self::Restored(read(key, value)?),
            _ => return Err(format!("{key}: no kind of object that this program knows")),
        })
    }
}

/// A fresh uid.
pub fn new_uid() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[cfg(test)]
impl Group {
    /// One that is protected, for tests.
    pub(crate) fn sample(id: &str) -> Self {
        Self {
            uid: format!("uid-{id}"),
            tenant: "default".into(),
            id: id.into(),
            version: 1,
            created_ns: 1,
            updated_ns: 1,
            description: String::new(),
            policy: "gold".into(),
            source: "src".into(),
            target: "dr".into(),
            key: "k".into(),
            generation: 1,
            writer_generation: 1,
            next_slot: 2,
            phase: GroupPhase::Protecting,
            hold: false,
            complete: true,
            request_id: String::new(),
            placement: String::new(),
            older_keys: Vec::new(),
            next_key: String::new(),
            pause: None,
            reverse: None,
            overwritten: false,
            leftovers: Vec::new(),
        }
    }
}

#[cfg(test)]
#[path = "pinned_tests.rs"]
mod pinned;
