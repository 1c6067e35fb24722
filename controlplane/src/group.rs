//! What may be a group and a disk: checked at the API, so that nothing half-made reaches a proxy.

use afterimage_wire::v1;
use afterimage_wire::{MAX_DISKS, MAX_NAME};

use crate::model::{MAX_OBJECTS, Model};
use crate::names::{Kind, Name, check_id};
use crate::objects::{Disk, Group, GroupPhase, Proxy, new_uid};
use crate::policy::check_text;
use crate::problem::Problem;

/// Longest path, bytes.
const MAX_PATH: usize = 1024;
/// Longest serial: what virtio-blk has room for.
const MAX_SERIAL: usize = 20;

/// A disk as asked for, with what could be checked without its proxy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskWanted {
    /// Id.
    pub id: String,
    /// On the source's host.
    pub path: String,
    /// Empty for the default.
    pub serial: String,
    /// 0 for what is found.
    pub size: u64,
    /// 0 for what is found.
    pub block: u32,
    /// Empty for the default.
    pub export_name: String,
    /// On the target's host; empty for none.
    pub seed_path: String,
}

/// What a proxy found at a path.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// Physical block, bytes.
    pub physical_block: u32,
}

fn is_block(block: u32) -> bool {
    block.is_power_of_two() && (512..=65536).contains(&block)
}

impl DiskWanted {
    /// Checks a disk of the API; `id` is what it is to be called, or empty to take the last part of its name.
    ///
    /// # Errors
    /// Names the field (under `field`), the value and what is allowed.
    pub fn new(field: &str, id: &str, disk: &v1::Disk) -> Result<Self, Problem> {
        let id = if id.is_empty() { disk.name.rsplit('/').next().unwrap_or_default() } else { id };
        check_id(&format!("{field}.name"), id)?;
        check_path(format!("{field}.path"), &disk.path)?;
        if !disk.seed_path.is_empty() {
            check_path(format!("{field}.seed_path"), &disk.seed_path)?;
        }
        if disk.serial.len() > MAX_SERIAL || !disk.serial.chars().all(|c| c.is_ascii_graphic()) {
            let allowed = format!("up to {MAX_SERIAL} printable ASCII characters without spaces");
            return Err(Problem::invalid(format!("{field}.serial"), &disk.serial, allowed));
        }
        if disk.block_bytes != 0 && !is_block(disk.block_bytes) {
            let allowed = "a power of two from 512 to 65536";
            return Err(Problem::invalid(format!("{field}.block_bytes"), disk.block_bytes, allowed));
        }
        check_size(field, disk.size_bytes, disk.block_bytes.max(512))?;
        let export = disk.export_name.as_str();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if export.len() > MAX_NAME || !export.chars().all(plain) {
            let allowed = format!("up to {MAX_NAME} characters of a-z, A-Z, 0-9, \"-\", \"_\", \".\" and \"/\"");
            return Err(Problem::invalid(format!("{field}.export_name"), export, allowed));
        }
        Ok(Self {
            id: id.to_owned(),
            path: disk.path.clone(),
            serial: disk.serial.clone(),
            size: disk.size_bytes,
            block: disk.block_bytes,
            export_name: export.to_owned(),
            seed_path: disk.seed_path.clone(),
        })
    }

    /// The disk, once its proxy has looked at it.
    ///
    /// # Errors
    /// What was found is not what was said, or is no disk.
    pub fn found(&self, field: &str, group: &Group, slot: u16, found: Found, now_ns: u64) -> Result<Disk, Problem> {
        let block = if self.block == 0 { found.block } else { self.block };
        if !is_block(found.block) || !is_block(found.physical_block) {
            return Err(Problem::Refused {
                proxy: group.source.clone(),
                detail: format!("{} has blocks of {} bytes; allowed: 512 to 65536", self.path, found.block),
            });
        }
        if block < found.block {
            let allowed = format!("at least {} bytes, the logical block of {}", found.block, self.path);
            return Err(Problem::invalid(format!("{field}.block_bytes"), block, allowed));
        }
        if self.size != 0 && self.size != found.size {
            let allowed = format!("{} bytes, the size of {}; or nothing", found.size, self.path);
            return Err(Problem::invalid(format!("{field}.size_bytes"), self.size, allowed));
        }
        if found.size == 0 {
            return Err(Problem::invalid(format!("{field}.path"), &self.path, "a disk that is not empty"));
        }
        check_size(field, found.size, block)?;
        let uid = new_uid();
        let serial = match self.serial.as_str() {
            "" => uid.chars().filter(|c| *c != '-').take(MAX_SERIAL).collect(),
            given => given.to_owned(),
        };
        let export_name = match self.export_name.as_str() {
            "" => format!("{}/{}", group.id, self.id),
            given => given.to_owned(),
        };
        Ok(Disk {
            uid,
            group_uid: group.uid.clone(),
            id: self.id.clone(),
            slot,
            path: self.path.clone(),
            serial,
            size: found.size,
            block,
            physical_block: found.physical_block.max(block),
            export_name,
            created_ns: now_ns,
            leaving: false,
            seed_path: self.seed_path.clone(),
        })
    }
}

fn check_path(field: String, path: &str) -> Result<(), Problem> {
    let absolute = path.starts_with('/') && !path.split('/').any(|part| part == "..");
    if absolute && path.len() <= MAX_PATH && !path.chars().any(char::is_control) && !path.ends_with('/') {
        return Ok(());
    }
    let allowed = format!("an absolute path of up to {MAX_PATH} bytes without \"..\"");
    Err(Problem::invalid(field, path, allowed))
}

fn check_size(field: &str, size: u64, block: u32) -> Result<(), Problem> {
    if size.is_multiple_of(block.into()) && size <= 1 << 60 {
        return Ok(());
    }
    let allowed = format!("a multiple of the block ({block} bytes), up to 1 EiB");
    Err(Problem::invalid(format!("{field}.size_bytes"), size, allowed))
}

/// Checks that disks do not clash with each other or with those of other groups at the same proxy.
///
/// # Errors
/// A name, path or export that is taken; too many disks.
pub fn check_disks(model: &Model, group: &Group, disks: &[DiskWanted]) -> Result<(), Problem> {
    let own: Vec<&Disk> = model.disks_of(group).collect();
    if own.len() + disks.len() > MAX_DISKS || usize::from(group.next_slot) + disks.len() > usize::from(u16::MAX) {
        return Err(Problem::Limit { what: format!("disks of {}", group.name()), limit: MAX_DISKS as u64 });
    }
    let exists = |field: &str, value: &str, by: String| {
        Err(Problem::Exists { field: field.to_owned(), value: value.to_owned(), by })
    };
    let at_proxy = || {
        let groups = model.groups.values().filter(|g| g.tenant == group.tenant && g.source == group.source);
        groups.flat_map(|g| model.disks_of(g).map(move |d| (g, d)))
    };
    let export = |d: &DiskWanted| match d.export_name.as_str() {
        "" => format!("{}/{}", group.id, d.id),
        given => given.to_owned(),
    };
    for (i, disk) in disks.iter().enumerate() {
        if let Some(pattern) = model.policy_of(group).and_then(|p| p.promises.excludes(&disk.id, &disk.path)) {
            let allowed = format!("a disk that its policy does not exclude: \"{pattern}\" of policy {}", group.policy);
            return Err(Problem::invalid("disk", format!("{}={}", disk.id, disk.path), allowed));
        }
        let twin = "another disk of this request".to_owned();
        if own.iter().any(|d| d.id == disk.id) {
            return exists("disk.name", &disk.id, format!("a disk of {}", group.name()));
        }
        if disks[..i].iter().any(|d| d.id == disk.id) {
            return exists("disk.name", &disk.id, twin);
        }
        if disks[..i].iter().any(|d| d.path == disk.path) {
            return exists("disk.path", &disk.path, twin);
        }
        if disks[..i].iter().any(|d| export(d) == export(disk)) {
            return exists("disk.export_name", &export(disk), twin);
        }
        if let Some((g, d)) = at_proxy().find(|(_, d)| d.path == disk.path) {
            return exists("disk.path", &disk.path, format!("{}/disks/{}", g.name(), d.id));
        }
        if let Some((g, d)) = at_proxy().find(|(_, d)| d.export_name == export(disk)) {
            return exists("disk.export_name", &export(disk), format!("{}/disks/{}", g.name(), d.id));
        }
    }
    Ok(())
}

/// Checks a new group of the API against what is there; nothing of its disks. One that names no target has none yet.
///
/// # Errors
/// A field that is not allowed, a name that is taken, a policy or proxy that does not exist or does not fit.
pub fn new_group(model: &Model, name: &Name, group: &v1::Group, now_ns: u64) -> Result<Group, Problem> {
    check_id("group_id", &name.id)?;
    check_text("group.description", &group.description)?;
    if model.groups.contains_key(&(name.tenant.clone(), name.id.clone())) {
        return Err(Problem::Exists { field: "group_id".into(), value: name.id.clone(), by: name.to_string() });
    }
    if model.groups.len() >= MAX_OBJECTS {
        return Err(Problem::Limit { what: "groups".into(), limit: MAX_OBJECTS as u64 });
    }
    let same_tenant = |field: &str, found: &Name| {
        let allowed = "of the group's own tenant";
        if found.tenant == name.tenant { Ok(()) } else { Err(Problem::invalid(field, found, allowed)) }
    };
    let policy = Name::parse("group.policy", Kind::Policy, &group.policy)?;
    same_tenant("group.policy", &policy)?;
    model.policy(&policy)?;
    let source = Name::parse("group.source", Kind::Proxy, &group.source)?;
    same_tenant("group.source", &source)?;
    model.proxy(&source)?;
    // Without one it is placed once its disks are known.
    let target = match group.target.as_str() {
        "" => String::new(),
        given => {
            let target = Name::parse("group.target", Kind::Proxy, given)?;
            same_tenant("group.target", &target)?;
            check_target(model.proxy(&target)?)?;
            if source == target {
                let allowed = "another proxy than the source: a journal beside its disks is lost with them";
                return Err(Problem::invalid("group.target", &target, allowed));
            }
            target.id
        }
    };
    Ok(Group {
        uid: new_uid(),
        tenant: name.tenant.clone(),
        id: name.id.clone(),
        version: 1,
        created_ns: now_ns,
        updated_ns: now_ns,
        description: group.description.clone(),
        policy: policy.id,
        source: source.id,
        target,
        key: String::new(),
        generation: 1,
        writer_generation: 1,
        next_slot: 0,
        phase: GroupPhase::Protecting,
        hold: false,
        complete: false,
        request_id: String::new(),
        placement: String::new(),
        reverse: None,
        overwritten: false,
        leftovers: Vec::new(),
        older_keys: Vec::new(),
        next_key: String::new(),
        pause: None,
    })
}

fn check_target(target: &Proxy) -> Result<(), Problem> {
    if target.data_address.is_empty() {
        let remedy = "start it with a data address and a journal, then try again";
        return Err(Problem::state(target.name(), "not taking streams, or has never been connected", remedy));
    }
    Ok(())
}

#[cfg(test)]
#[path = "group_tests.rs"]
pub(crate) mod tests;
