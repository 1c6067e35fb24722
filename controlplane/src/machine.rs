//! Machines: which disks are one, how it is made, and by what it is driven at either site. Checked at the API; what an
//! operation tells a proxy about one is put together here.

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use serde::{Deserialize, Serialize};

use crate::model::{MAX_OBJECTS, Model};
use crate::names::{DEFAULT_TENANT, Kind, Name, check_id, child, is_id};
use crate::nic::{self, Nic};
use crate::objects::{Disk, ExportRecord, Group, Object};
use crate::policy::check_text;
use crate::problem::Problem;

const MIB: u64 = 1 << 20;
/// Bounds of a machine's memory, bytes.
const MEMORY: std::ops::RangeInclusive<u64> = 16 * MIB..=(64 << 40);
/// Memory unless told, bytes.
const DEFAULT_MEMORY: u64 = 1 << 30;
/// Most processors.
const MAX_CPUS: u32 = 1024;
/// Longest name of a machine at its place, and of what is looked for, bytes.
const MAX_TEXT: usize = 200;
/// How long a machine has to switch itself off unless told, milliseconds.
const DEFAULT_STOP_MS: u64 = 120_000;
/// How long a replica has to answer unless told, milliseconds.
const DEFAULT_READY_MS: u64 = 300_000;
/// Longest of both, milliseconds.
const MAX_WITHIN_MS: u64 = 3_600_000;

/// By what a machine is driven.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// People.
    #[default]
    None,
    /// The operator's commands.
    Hook,
    /// A process of the proxy's.
    Qemu,
    /// A domain.
    Libvirt,
}

impl Driver {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Hook => "hook",
            Self::Qemu => "qemu",
            Self::Libvirt => "libvirt",
        }
    }
}

/// What a machine begins with.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// BIOS.
    #[default]
    Bios,
    /// UEFI.
    Uefi,
}

/// Where and how a machine is driven.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    /// Id of the proxy; empty for the group's own.
    pub proxy: String,
    /// By what.
    pub driver: Driver,
    /// Which of the proxy's settings for that.
    pub profile: String,
    /// What it is called there; empty for its id.
    pub machine: String,
}

impl Place {
    /// Somebody is told to start and stop it here.
    pub fn is_driven(&self) -> bool {
        self.driver != Driver::None
    }
}

/// When a machine counts as answering.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ready {
    /// It is on.
    #[default]
    Running,
    /// Something accepts at `host:port`.
    Tcp(String),
    /// This has been seen on its first serial port.
    Console(String),
    /// The `ready` command of this hook says so.
    Hook(String),
}

/// A machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Machine {
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
    /// Id of its group.
    pub group: String,
    /// Ids of its disks; none for all of the group.
    pub disks: Vec<String>,
    /// Processors.
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Firmware.
    pub firmware: Firmware,
    /// Network interfaces.
    pub nics: Vec<Nic>,
    /// At its source.
    pub source: Place,
    /// At its target.
    pub target: Place,
    /// When its replica counts as answering.
    pub ready: Ready,
    /// How long it has to switch itself off, milliseconds.
    pub stop_within_ms: u64,
    /// How long its replica has to answer, milliseconds.
    pub ready_within_ms: u64,
    /// An operation has switched it off at its source.
    pub stopped_at_source: bool,
    /// Id of the view that its replica runs from; empty for none.
    pub runs_from: String,
}

/// Which instance of a machine is meant.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Role<'a> {
    /// Itself, at its source.
    Source,
    /// Its replica.
    Replica,
    /// One to be thrown away, by the id of its view.
    Test(&'a str),
}

/// The end of a name: "tenants/default/groups/shop" and "shop" are the same.
fn last(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or_default()
}

fn check_plain(field: String, text: &str) -> Result<(), Problem> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.len() > MAX_TEXT || text.starts_with(['.', '-']) || !text.chars().all(plain) {
        let allowed =
            format!("up to {MAX_TEXT} characters of a-z, A-Z, 0-9, \"-\", \"_\" and \".\", a letter or digit first");
        return Err(Problem::invalid(field, text, allowed));
    }
    Ok(())
}

fn place(tenant: &str, side: &str, asked: Option<&v1::MachinePlace>) -> Result<Place, Problem> {
    let field = |of: &str| format!("machine.{side}.{of}");
    let Some(asked) = asked else { return Ok(Place::default()) };
    let driver = match v1::Driver::try_from(asked.driver) {
        Ok(v1::Driver::Unspecified | v1::Driver::None) => Driver::None,
        Ok(v1::Driver::Hook) => Driver::Hook,
        Ok(v1::Driver::Qemu) => Driver::Qemu,
        Ok(v1::Driver::Libvirt) => Driver::Libvirt,
        Err(_) => return Err(Problem::invalid(field("driver"), asked.driver, "none, hook, qemu or libvirt")),
    };
    let proxy = match asked.proxy.as_str() {
        "" => String::new(),
        name => {
            let name = Name::parse(&field("proxy"), Kind::Proxy, name)?;
            if name.tenant != tenant {
                return Err(Problem::not_found("proxy", name));
            }
            name.id
        }
    };
    check_plain(field("machine"), &asked.machine)?;
    let profile = if asked.profile.is_empty() { "default" } else { asked.profile.as_str() };
    if !is_id(profile) {
        return Err(Problem::invalid(field("profile"), profile, crate::names::ID_RULE));
    }
    Ok(Place { proxy, driver, profile: profile.to_owned(), machine: asked.machine.clone() })
}

/// When a machine counts as answering, as asked for; `root`: the message's field in the request.
///
/// # Errors
/// Names the field, the value and what is allowed.
pub fn ready(root: &str, asked: Option<&v1::Readiness>) -> Result<Ready, Problem> {
    let Some(asked) = asked else { return Ok(Ready::Running) };
    let value = asked.value.clone();
    let field = &format!("{root}.value");
    if value.len() > MAX_TEXT || value.chars().any(char::is_control) {
        return Err(Problem::invalid(field, value, format!("up to {MAX_TEXT} bytes without control characters")));
    }
    match v1::ReadinessKind::try_from(asked.kind) {
        Ok(v1::ReadinessKind::Unspecified | v1::ReadinessKind::Running) if value.is_empty() => Ok(Ready::Running),
        Ok(v1::ReadinessKind::Unspecified | v1::ReadinessKind::Running) => {
            Err(Problem::invalid(field, value, "nothing, for this kind"))
        }
        Ok(v1::ReadinessKind::Tcp) => {
            let fits = value
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
            if fits { Ok(Ready::Tcp(value)) } else { Err(Problem::invalid(field, value, "HOST:PORT")) }
        }
        Ok(v1::ReadinessKind::Console) if value.is_empty() => {
            Err(Problem::invalid(field, value, "what its serial port is to say"))
        }
        Ok(v1::ReadinessKind::Console) => Ok(Ready::Console(value)),
        Ok(v1::ReadinessKind::Hook) => check_id(field, &value).map(|()| Ready::Hook(value)),
        Err(_) => Err(Problem::invalid(format!("{root}.kind"), asked.kind, "running, tcp, console or hook")),
    }
}

fn within(field: &str, value: u64, least: u64) -> Result<u64, Problem> {
    if (least..=MAX_WITHIN_MS).contains(&value) {
        return Ok(value);
    }
    Err(Problem::invalid(field, value, format!("{least} to {MAX_WITHIN_MS}")))
}

impl Machine {
    /// A machine as asked for, with the identity of `old` or a new one.
    ///
    /// # Errors
    /// Names the field, the value and what is allowed; something that it names does not exist, or is taken.
    pub fn wanted(
        model: &Model,
        name: &Name,
        asked: &v1::Machine,
        old: Option<&Self>,
        now_ns: u64,
    ) -> Result<Self, Problem> {
        check_text("machine.description", &asked.description)?;
        let group = Name::parse("machine.group", Kind::Group, &asked.group)?;
        if group.tenant != name.tenant {
            return Err(Problem::not_found("group", group));
        }
        let firmware = match v1::Firmware::try_from(asked.firmware) {
            Ok(v1::Firmware::Unspecified | v1::Firmware::Bios) => Firmware::Bios,
            Ok(v1::Firmware::Uefi) => Firmware::Uefi,
            Err(_) => return Err(Problem::invalid("machine.firmware", asked.firmware, "bios or uefi")),
        };
        let cpus = if asked.cpus == 0 { 1 } else { asked.cpus };
        if cpus > MAX_CPUS {
            return Err(Problem::invalid("machine.cpus", cpus, format!("1 to {MAX_CPUS}")));
        }
        let memory = if asked.memory_bytes == 0 { DEFAULT_MEMORY } else { asked.memory_bytes };
        if !MEMORY.contains(&memory) || !memory.is_multiple_of(MIB) {
            let allowed = format!("{} to {}, a multiple of {MIB}", MEMORY.start(), MEMORY.end());
            return Err(Problem::invalid("machine.memory_bytes", memory, allowed));
        }
        let machine = Self {
            uid: old.map_or_else(crate::objects::new_uid, |o| o.uid.clone()),
            tenant: name.tenant.clone(),
            id: name.id.clone(),
            version: old.map_or(1, |o| o.version + 1),
            created_ns: old.map_or(now_ns, |o| o.created_ns),
            updated_ns: now_ns,
            description: asked.description.clone(),
            group: group.id.clone(),
            disks: asked.disks.iter().map(|disk| last(disk).to_owned()).collect(),
            cpus,
            memory,
            firmware,
            nics: nic::wanted(&asked.nics)?,
            source: place(&name.tenant, "source", asked.source.as_ref())?,
            target: place(&name.tenant, "target", asked.target.as_ref())?,
            ready: ready("machine.readiness", asked.readiness.as_ref())?,
            stop_within_ms: within("machine.stop_within_ms", asked.stop_within_ms.unwrap_or(DEFAULT_STOP_MS), 0)?,
            ready_within_ms: within(
                "machine.ready_within_ms",
                asked.ready_within_ms.unwrap_or(DEFAULT_READY_MS),
                1000,
            )?,
            stopped_at_source: old.is_some_and(|o| o.stopped_at_source),
            runs_from: old.map(|o| o.runs_from.clone()).unwrap_or_default(),
        };
        machine.check(model, model.group(&group)?)?;
        Ok(machine)
    }

    fn check(&self, model: &Model, group: &Group) -> Result<(), Problem> {
        if old_count(model, self) >= MAX_OBJECTS {
            return Err(Problem::Limit { what: "machines".into(), limit: MAX_OBJECTS as u64 });
        }
        for (i, disk) in self.disks.iter().enumerate() {
            let field = format!("machine.disks[{i}]");
            if !model.disks_of(group).any(|d| d.id == *disk) {
                let all: Vec<&str> = model.disks_of(group).map(|d| d.id.as_str()).collect();
                return Err(Problem::invalid(field, disk, all.join(", ")));
            }
            if self.disks[..i].contains(disk) {
                return Err(Problem::invalid(field, disk, "each disk once"));
            }
        }
        let mine: Vec<&str> = self.disks_in(model, group).iter().map(|d| d.id.as_str()).collect();
        for other in model.machines_of(group).filter(|o| o.id != self.id) {
            let theirs = other.disks_in(model, group);
            if let Some(both) = theirs.iter().find(|d| mine.contains(&d.id.as_str())) {
                let by = other.name().to_string();
                return Err(Problem::Exists { field: "machine.disks".into(), value: both.id.clone(), by });
            }
        }
        for (side, place) in [("source", &self.source), ("target", &self.target)] {
            if !place.proxy.is_empty() {
                model.proxy(&Name::new(&self.tenant, Kind::Proxy, &place.proxy))?;
            }
            let called = self.instance_at(place);
            let twin = model.machines.values().find(|o| {
                let theirs = if side == "source" { &o.source } else { &o.target };
                let same =
                    (&theirs.proxy, theirs.driver, &theirs.profile) == (&place.proxy, place.driver, &place.profile);
                o.uid != self.uid
                    && o.group == self.group
                    && place.is_driven()
                    && same
                    && o.instance_at(theirs) == called
            });
            if let Some(twin) = twin {
                let field = format!("machine.{side}.machine");
                return Err(Problem::Exists { field, value: called, by: twin.name().to_string() });
            }
        }
        if matches!(self.ready, Ready::Console(_)) && self.target.driver != Driver::Qemu {
            let allowed = "another kind: only the driver qemu sees the serial port";
            return Err(Problem::invalid("machine.readiness.kind", "console", allowed));
        }
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> Name {
        Name::new(&self.tenant, Kind::Machine, &self.id)
    }

    /// Its disks, in its order; one that has left the group is not among them.
    pub fn disks_in<'a>(&self, model: &'a Model, group: &Group) -> Vec<&'a Disk> {
        let of_group: Vec<&Disk> = model.disks_of(group).collect();
        if self.disks.is_empty() {
            return of_group;
        }
        self.disks.iter().filter_map(|id| of_group.iter().find(|d| d.id == *id).copied()).collect()
    }

    /// What it is called at a place. Of two tenants' machines with one id none is the other.
    fn instance_at(&self, place: &Place) -> String {
        match (place.machine.as_str(), self.tenant.as_str()) {
            ("", DEFAULT_TENANT) => self.id.clone(),
            ("", tenant) => format!("{tenant}.{}", self.id),
            (given, _) => given.to_owned(),
        }
    }

    /// Where an instance is.
    pub fn place(&self, role: Role<'_>) -> &Place {
        if role == Role::Source { &self.source } else { &self.target }
    }

    /// Id of the proxy that drives an instance.
    pub fn proxy_of<'a>(&'a self, role: Role<'_>, group: &'a Group) -> &'a str {
        match (self.place(role).proxy.as_str(), role) {
            ("", Role::Source) => &group.source,
            ("", _) => &group.target,
            (given, _) => given,
        }
    }

    fn reference(&self, role: Role<'_>) -> v1::MachineRef {
        let place = self.place(role);
        let (instance, role) = match role {
            Role::Source => (self.instance_at(place), v1::MachineRole::Source),
            Role::Replica => (self.instance_at(place), v1::MachineRole::Replica),
            Role::Test(view) => (format!("{}.{view}", self.instance_at(place)), v1::MachineRole::Test),
        };
        v1::MachineRef {
            uid: self.uid.clone(),
            name: self.name().to_string(),
            instance,
            driver: driver_to_proto(place.driver).into(),
            profile: place.profile.clone(),
            role: role.into(),
        }
    }

    /// The command that switches an instance on, with these disks.
    pub fn start(&self, role: Role<'_>, disks: Vec<v1::MachineDisk>) -> Tell {
        Tell::StartInstance(self.instance(role, disks))
    }

    /// An instance as its driver needs it, with these disks.
    pub fn instance(&self, role: Role<'_>, disks: Vec<v1::MachineDisk>) -> v1::StartInstance {
        v1::StartInstance {
            machine: Some(self.reference(role)),
            cpus: self.cpus,
            memory_bytes: self.memory,
            firmware: firmware_to_proto(self.firmware).into(),
            nics: self.nics.iter().map(nic::to_proto).collect(),
            disks,
            // Machines of one test see each other, and nobody else: two tests have the same addresses.
            isolation: match role {
                Role::Test(view) => child(&Name::new(&self.tenant, Kind::Group, &self.group), "views", view),
                Role::Source | Role::Replica => String::new(),
            },
        }
    }

    /// The question whether an instance could be started.
    pub fn check_start(&self, role: Role<'_>, disks: Vec<v1::MachineDisk>) -> Tell {
        Tell::CheckInstance(v1::CheckInstance { instance: Some(self.instance(role, disks)) })
    }

    /// The command that switches an instance off, within so long or at once.
    pub fn stop(&self, role: Role<'_>, within_ms: u64) -> Tell {
        Tell::StopInstance(v1::StopInstance { machine: Some(self.reference(role)), within_ms })
    }

    /// The command that looks how an instance stands.
    pub fn probe(&self, role: Role<'_>) -> Tell {
        let readiness = (role != Role::Source).then(|| ready_to_proto(&self.ready));
        Tell::ProbeInstance(v1::ProbeInstance { machine: Some(self.reference(role)), readiness })
    }
}

fn old_count(model: &Model, machine: &Machine) -> usize {
    model.machines.values().filter(|m| m.uid != machine.uid).count()
}

/// The disks of a machine in a view.
pub fn view_disks(disks: &[MachineDisk], exports: &[ExportRecord]) -> Vec<v1::MachineDisk> {
    let shown = |disk: &MachineDisk| {
        let export = exports.iter().find(|e| e.disk_uid == disk.uid)?;
        Some(v1::MachineDisk {
            export_name: export.name.clone(),
            uris: export.uris.clone(),
            size_bytes: export.size,
            ..source_disk(disk)
        })
    };
    disks.iter().filter_map(shown).collect()
}

/// A disk of a machine at its source.
pub fn source_disk(disk: &MachineDisk) -> v1::MachineDisk {
    v1::MachineDisk {
        disk: disk.id.clone(),
        uid: disk.uid.clone(),
        serial: disk.serial.clone(),
        size_bytes: disk.size,
        export_name: disk.export_name.clone(),
        uris: Vec::new(),
    }
}

/// A disk of a machine, as an operation keeps it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineDisk {
    /// Id.
    pub id: String,
    /// Uid.
    pub uid: String,
    /// As the machine sees it.
    pub serial: String,
    /// Bytes.
    pub size: u64,
    /// At its source.
    pub export_name: String,
}

impl From<&Disk> for MachineDisk {
    fn from(disk: &Disk) -> Self {
        Self {
            id: disk.id.clone(),
            uid: disk.uid.clone(),
            serial: disk.serial.clone(),
            size: disk.size,
            export_name: disk.export_name.clone(),
        }
    }
}

fn driver_to_proto(driver: Driver) -> v1::Driver {
    match driver {
        Driver::None => v1::Driver::None,
        Driver::Hook => v1::Driver::Hook,
        Driver::Qemu => v1::Driver::Qemu,
        Driver::Libvirt => v1::Driver::Libvirt,
    }
}

fn firmware_to_proto(firmware: Firmware) -> v1::Firmware {
    match firmware {
        Firmware::Bios => v1::Firmware::Bios,
        Firmware::Uefi => v1::Firmware::Uefi,
    }
}

fn ready_to_proto(ready: &Ready) -> v1::Readiness {
    let (kind, value) = match ready {
        Ready::Running => (v1::ReadinessKind::Running, ""),
        Ready::Tcp(at) => (v1::ReadinessKind::Tcp, at.as_str()),
        Ready::Console(text) => (v1::ReadinessKind::Console, text.as_str()),
        Ready::Hook(hook) => (v1::ReadinessKind::Hook, hook.as_str()),
    };
    v1::Readiness { kind: kind.into(), value: value.to_owned() }
}

/// A machine for the API.
pub fn to_proto(model: &Model, machine: &Machine) -> v1::Machine {
    let place = |place: &Place| v1::MachinePlace {
        proxy: match place.proxy.as_str() {
            "" => String::new(),
            id => Name::new(&machine.tenant, Kind::Proxy, id).to_string(),
        },
        driver: driver_to_proto(place.driver).into(),
        profile: place.profile.clone(),
        machine: place.machine.clone(),
    };
    let group = Name::new(&machine.tenant, Kind::Group, &machine.group);
    v1::Machine {
        name: machine.name().to_string(),
        uid: machine.uid.clone(),
        etag: model.etag(&Object::Machine(machine.clone()).key()),
        version: machine.version,
        create_time_ns: machine.created_ns,
        update_time_ns: machine.updated_ns,
        description: machine.description.clone(),
        disks: machine.disks.clone(),
        cpus: machine.cpus,
        memory_bytes: machine.memory,
        firmware: firmware_to_proto(machine.firmware).into(),
        nics: machine.nics.iter().map(nic::to_proto).collect(),
        source: Some(place(&machine.source)),
        target: Some(place(&machine.target)),
        readiness: Some(ready_to_proto(&machine.ready)),
        stop_within_ms: Some(machine.stop_within_ms),
        ready_within_ms: Some(machine.ready_within_ms),
        stopped_at_source: machine.stopped_at_source,
        runs_from: match machine.runs_from.as_str() {
            "" => String::new(),
            view => child(&group, "views", view),
        },
        group: group.to_string(),
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
