//! ublk devices of a proxy: one for each disk on offer, made, taken over after a restart, and ended.
//!
//! A device is a thing of the kernel that outlives this process: while nobody serves it, its hosts wait. So it is ended
//! only when its disk leaves protection, or by `afterimage ublk remove`; whatever else ends this process leaves it to the
//! next one, which knows it again by a number that the kernel keeps with it ([`own`]). Which number (`/dev/ublkbN`) a disk
//! had is also kept in the state folder, so that it has the same after a reboot, when the kernel has forgotten.
//!
//! Control commands block, some for as long as a disk holds its I/O: each device has a thread of its own for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use afterimage_dataplane::host::Geometry;
use afterimage_dataplane::io::Errno;
use afterimage_dataplane::io::ublk::control::{Control, ControlError};
use afterimage_dataplane::io::ublk::uapi::{DeviceInfo, Params, SECTOR, attr, feature, state};
use afterimage_dataplane::ublk::{DeviceId, MAX_REQUEST, Queue, device_info, params};
use afterimage_wire::v1::Severity;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::keep;
use super::runtime::{Core, Gone, Handle};
use super::state::Proxy;

/// File of the numbers that devices have.
const FILE: &str = "ublk.json";
/// Stable names of devices of disks, …
pub const LINKS: &str = "/dev/afterimage";
/// … and of views.
pub const VIEW_LINKS: &str = "/dev/afterimage-views";
/// Names of devices, for the udev rule of `tools/systemd`.
const NAMES: &str = "/run/afterimage/ublk";
/// How long the process that served a device before is waited for: it ends when its last I/O has.
const TAKE_OVER: Duration = Duration::from_secs(60);
/// Time between two looks at it.
const LOOK: Duration = Duration::from_millis(20);
/// Time between two tries to make a device.
const RETRY: Duration = Duration::from_secs(5);
/// How long hosts' requests may take to end when a device is ended.
const END_WAIT: Duration = Duration::from_secs(10);
/// Where the kernel lists devices.
const SYS: &str = "/sys/class/ublk-char";

/// Which data thread serves a device.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Disks.
    Source,
    /// Views.
    Target,
}

impl Role {
    fn links(self) -> &'static str {
        match self {
            Self::Source => LINKS,
            Self::Target => VIEW_LINKS,
        }
    }

    fn field(self) -> &'static str {
        match self {
            Self::Source => "source.ublk",
            Self::Target => "target.ublk",
        }
    }
}

/// Why there is no ublk although it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("`{field}`: {error}")]
pub struct NoUblk {
    field: &'static str,
    error: ControlError,
}

/// How far a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// Being made or taken over.
    Starting,
    /// Hosts see it.
    Live {
        number: u32,
        id: DeviceId,
    },
    Ending,
}

/// The devices of a proxy; by role and name of the export.
#[derive(Default)]
pub struct Devices {
    all: RefCell<BTreeMap<(Role, String), Stage>>,
}

/// A line of [`FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    role: Role,
    name: String,
    number: u32,
}

/// What a device is to be made of.
#[derive(Clone, Debug)]
struct Wanted {
    role: Role,
    name: String,
    own: u64,
    geometry: Geometry,
}

/// Looks for the driver where ublk is asked for; says what is missing.
///
/// # Errors
/// [`NoUblk`].
pub fn check(proxy: &super::config::Config) -> Result<(), NoUblk> {
    let source = proxy.source.as_ref().is_some_and(|role| role.ublk).then_some(Role::Source);
    let target = proxy.target.as_ref().is_some_and(|role| role.ublk).then_some(Role::Target);
    let Some(role) = source.or(target) else { return Ok(()) };
    Control::open().map(|_| ()).map_err(|error| NoUblk { field: role.field(), error })
}

/// Tells whose device it is, as long as the kernel has it: of this disk, at this end. FNV-1a, never 0.
fn own(role: Role, identity: &str) -> u64 {
    let text = format!("afterimage/{role:?}/{identity}");
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    text.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, step).max(1)
}

impl Devices {
    /// Where hosts find an export, if it has a device.
    pub fn uri(&self, role: Role, export: &str) -> Option<String> {
        match self.all.borrow().get(&(role, export.to_owned())) {
            Some(Stage::Live { number, .. }) => Some(format!("ublk:/dev/ublkb{number}")),
            _ => None,
        }
    }

    /// None is on its way.
    pub fn settled(&self) -> bool {
        !self.all.borrow().values().any(|stage| matches!(stage, Stage::Starting))
    }

    /// Exports of a view that have devices.
    pub fn of_view(&self, view: &str) -> Vec<String> {
        let all = self.all.borrow();
        let of = |name: &&String| name.strip_prefix(view).is_some_and(|rest| rest.starts_with('/'));
        all.keys().filter(|(role, _)| *role == Role::Target).map(|(_, name)| name).filter(of).cloned().collect()
    }

    fn number(&self, role: Role, export: &str) -> Option<u32> {
        match self.all.borrow().get(&(role, export.to_owned())) {
            Some(Stage::Live { number, .. }) => Some(*number),
            _ => None,
        }
    }

    /// Of these exports, the first that a host holds: its device is mounted, or a part of something else.
    pub fn in_use(&self, role: Role, exports: &[String]) -> Option<String> {
        let busy = |export: &&String| {
            let Some(number) = self.number(role, export) else { return false };
            is_busy(&format!("/dev/ublkb{number}"))
        };
        let export = exports.iter().find(busy)?;
        Some(format!("/dev/ublkb{}, the device of `{export}`,", self.number(role, export).unwrap_or_default()))
    }
}

/// Whether a device, or a partition of it, is held by a mount or by another device.
pub fn is_busy(path: &str) -> bool {
    use rustix::fs::{Mode, OFlags, open};
    // An exclusive opener of a partition claims the whole disk as well.
    matches!(open(path, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()), Err(rustix::io::Errno::BUSY))
}

/// Makes or takes over what is missing, and ties devices to disks that are back. Nothing is ended from here.
///
/// # Errors
/// [`Gone`].
pub async fn converge(proxy: &Rc<Proxy>) -> Result<(), Gone> {
    let config = &proxy.config;
    if let (Some(handle), true) = (&proxy.source, config.source.as_ref().is_some_and(|role| role.ublk)) {
        let wanted = wanted(proxy, handle, Role::Source).await?;
        wanted.into_iter().for_each(|wanted| begin(proxy, handle, wanted));
    }
    if let (Some(handle), true) = (&proxy.target, config.target.as_ref().is_some_and(|role| role.ublk)) {
        let wanted = wanted(proxy, handle, Role::Target).await?;
        wanted.into_iter().for_each(|wanted| begin(proxy, handle, wanted));
    }
    Ok(())
}

async fn wanted<C: Core>(proxy: &Proxy, handle: &Handle<C>, role: Role) -> Result<Vec<Wanted>, Gone> {
    let exports = handle
        .call(|desk| {
            desk.fronts.ublk.rebind(desk.io, desk.core);
            desk.core.exports()
        })
        .await?;
    let identities = identities(proxy, role);
    let wanted = exports.into_iter().map(|export| {
        // What nobody has given an identity has its name.
        let identity = identities.get(&export.name).cloned().unwrap_or_else(|| export.name.clone());
        Wanted { role, own: own(role, &identity), name: export.name, geometry: export.geometry }
    });
    Ok(wanted.collect())
}

/// What tells a disk from another that may have its name one day.
fn identities(proxy: &Proxy, role: Role) -> BTreeMap<String, String> {
    let applied = proxy.applied.borrow();
    match role {
        Role::Source => {
            let disks = applied.groups.values().flat_map(|group| &group.disks);
            disks.map(|disk| (disk.export_name.clone(), disk.uid.clone())).collect()
        }
        Role::Target => BTreeMap::new(),
    }
}

/// Begins a device, unless there is one.
fn begin<C: Core>(proxy: &Rc<Proxy>, handle: &Handle<C>, wanted: Wanted) {
    let place = (wanted.role, wanted.name.clone());
    if proxy.ublk.all.borrow().contains_key(&place) {
        return;
    }
    proxy.ublk.all.borrow_mut().insert(place.clone(), Stage::Starting);
    let (proxy, handle) = (Rc::clone(proxy), handle.clone());
    tokio::task::spawn_local(async move {
        match start(&proxy, &handle, &wanted).await {
            Ok((number, id, recovered)) => {
                proxy.ublk.all.borrow_mut().insert(place, Stage::Live { number, id });
                let verb = if recovered { "goes on" } else { "is there" };
                let message = format!("`{}`: /dev/ublkb{number} {verb}", wanted.name);
                proxy.event(Severity::Info, None, "ublk", message);
            }
            Err(why) => {
                let message = format!("`{}` has no ublk device: {why}", wanted.name);
                proxy.event(Severity::Error, None, "ublk", message);
                tokio::time::sleep(RETRY).await;
                proxy.ublk.all.borrow_mut().remove(&place);
            }
        }
        proxy.changed.notify_one();
    });
}

/// Runs something that blocks, on a thread of its own: one that hangs holds nothing up.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (done, result) = oneshot::channel();
    let thread = std::thread::Builder::new().name("ublk-control".to_owned()).spawn(move || {
        let _ = done.send(work());
    });
    thread.map_err(|error| format!("no thread for control commands: {error}"))?;
    result.await.map_err(|_| "the thread of control commands has ended".to_owned())
}

/// A device that is there, and not served.
struct Found {
    info: DeviceInfo,
    params: Params,
    recovers: bool,
}

async fn start<C: Core>(proxy: &Proxy, handle: &Handle<C>, wanted: &Wanted) -> Result<(u32, DeviceId, bool), String> {
    let number = kept(proxy).into_iter().find(|k| k.role == wanted.role && k.name == wanted.name).map(|k| k.number);
    let (own, geometry) = (wanted.own, wanted.geometry.clone());
    let found = blocking(move || find_or_make(own, number, &geometry)).await??;
    let (number, recovers) = (found.info.dev_id, found.recovers);
    // Known before hosts see it: after a crash in between it is found again.
    keep_number(proxy, wanted, number)?;
    let queue = move |file| Queue {
        file,
        depth: found.info.queue_depth,
        longest: found.info.max_io_buf_bytes.min(MAX_REQUEST),
        size: found.params.basic.dev_sectors * SECTOR,
        block: 1 << found.params.basic.logical_bs_shift,
        read_only: found.params.basic.attrs & attr::READ_ONLY != 0,
    };
    let (name, depth) = (wanted.name.clone(), found.info.queue_depth);
    let attached = handle.call(move |desk| {
        let file = desk.io.attach_ublk(&format!("/dev/ublkc{number}"), depth);
        let file = file.map_err(|errno| format!("/dev/ublkc{number}: {errno}"))?;
        desk.fronts.ublk.attach(desk.io, queue(file), &name, desk.core).map_err(|error| error.to_string())
    });
    let id = attached.await.map_err(|gone| gone.to_string())??;
    name_for_udev(wanted.role, &wanted.name, number);
    blocking(move || {
        let (mut control, _) = Control::open().map_err(|error| error.to_string())?;
        let done = if recovers { control.end_recovery(number) } else { control.start(number) };
        done.map_err(|errno| format!("/dev/ublkb{number} does not start: {errno}"))
    })
    .await??;
    if let Err(error) = link(wanted.role, &wanted.name, number) {
        tracing::warn!(%error, name = wanted.name, "no link to /dev/ublkb{number} could be made");
    }
    Ok((number, id, recovers))
}

/// Finds the device that is ours, and waits for whoever served it to end; or makes one, by this number if it is free.
fn find_or_make(own: u64, number: Option<u32>, geometry: &Geometry) -> Result<Found, String> {
    let (mut control, _) = Control::open().map_err(|error| error.to_string())?;
    let control = &mut control;
    let end = Instant::now() + TAKE_OVER;
    while let Some(info) = find(control, own) {
        let number = info.dev_id;
        match info.state {
            state::DEAD => {
                // It was made, and never started, or was stopped and not ended.
                control.delete(number).map_err(|errno| format!("/dev/ublkc{number} cannot be removed: {errno}"))?;
                break;
            }
            state::QUIESCED => match control.begin_recovery(number) {
                Ok(()) => {
                    let params = control.params(number).map_err(|errno| format!("/dev/ublkc{number}: {errno}"))?;
                    return Ok(Found { info, params, recovers: true });
                }
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(format!("/dev/ublkc{number} cannot be taken over: {errno}")),
            },
            _ => {} // The kernel has not seen yet that its process has gone.
        }
        if Instant::now() >= end {
            return Err(format!("/dev/ublkc{number} is served by process {}, which does not end", info.ublksrv_pid));
        }
        std::thread::sleep(LOOK);
    }
    let made = match number.map(|number| control.add(device_info(number, own))) {
        Some(Ok(info)) => Ok(info),
        Some(Err(Errno::EXIST)) | None => control.add(device_info(u32::MAX, own)),
        Some(Err(errno)) => Err(errno),
    };
    let info = made.map_err(|errno| format!("a device cannot be made: {errno}"))?;
    let params = params(geometry);
    if let Err(errno) = control.set_params(info.dev_id, params) {
        let _ = control.delete(info.dev_id);
        return Err(format!("the kernel does not take a device of {} bytes: {errno}", geometry.size));
    }
    Ok(Found { info, params, recovers: false })
}

/// The device with this mark.
fn find(control: &mut Control, own: u64) -> Option<DeviceInfo> {
    let numbers = numbers();
    numbers
        .into_iter()
        .filter_map(|number| control.info(number).ok())
        .find(|info| info.ublksrv_flags == own && info.flags & feature::USER_RECOVERY != 0)
}

/// All devices of the kernel.
pub fn numbers() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(SYS) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.strip_prefix("ublkc")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// Ends the devices of exports that are no longer on offer. What hosts still ask of them fails.
pub async fn end(proxy: &Proxy, role: Role, exports: &[String]) {
    for export in exports {
        let place = (role, export.clone());
        let Some(Stage::Live { number, id }) = proxy.ublk.all.borrow().get(&place).cloned() else { continue };
        proxy.ublk.all.borrow_mut().insert(place.clone(), Stage::Ending);
        let result = match role {
            Role::Source => end_one(proxy.source.as_ref(), number, id).await,
            Role::Target => end_one(proxy.target.as_ref(), number, id).await,
        };
        match result {
            Ok(()) => {
                unlink(role, export, number);
                forget_number(proxy, role, export);
                proxy.event(Severity::Info, None, "ublk", format!("`{export}`: /dev/ublkb{number} has ended"));
            }
            Err(why) => proxy.event(Severity::Error, None, "ublk", format!("`{export}`: /dev/ublkb{number}: {why}")),
        }
        proxy.ublk.all.borrow_mut().remove(&place);
    }
}

async fn end_one<C: Core>(handle: Option<&Handle<C>>, number: u32, id: DeviceId) -> Result<(), String> {
    let Some(handle) = handle else { return Ok(()) };
    handle.call(move |desk| desk.fronts.ublk.retire(desk.io, id)).await.map_err(|gone| gone.to_string())?;
    let remove = blocking(move || {
        let (mut control, _) = Control::open().map_err(|error| error.to_string())?;
        control.stop(number).and_then(|()| control.delete(number)).map_err(|errno| format!("it does not end: {errno}"))
    });
    match tokio::time::timeout(END_WAIT, remove).await {
        Ok(result) => result?,
        Err(_) => Err("it does not end: somebody holds it open, or its disk holds its I/O".to_owned()),
    }
}

// --- what is kept

fn path(proxy: &Proxy) -> Option<PathBuf> {
    proxy.config.state_dir.as_ref().map(|dir| dir.join(FILE))
}

fn kept(proxy: &Proxy) -> Vec<Kept> {
    // A number is a convenience: without it, the device is known by its mark, or gets another one.
    let bytes = path(proxy).and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn write(proxy: &Proxy, all: &[Kept]) -> Result<(), String> {
    let Some(path) = path(proxy) else { return Ok(()) };
    let text = serde_json::to_vec_pretty(all).map_err(|error| error.to_string())?;
    keep::replace(&path, &text).map_err(|error| format!("{}: {error}", path.display()))
}

fn keep_number(proxy: &Proxy, wanted: &Wanted, number: u32) -> Result<(), String> {
    let mut all = kept(proxy);
    let line = Kept { role: wanted.role, name: wanted.name.clone(), number };
    if all.contains(&line) {
        return Ok(());
    }
    all.retain(|kept| (kept.role, &kept.name) != (wanted.role, &wanted.name));
    all.push(line);
    write(proxy, &all)
}

fn forget_number(proxy: &Proxy, role: Role, name: &str) {
    let mut all = kept(proxy);
    all.retain(|kept| (kept.role, kept.name.as_str()) != (role, name));
    if let Err(error) = write(proxy, &all) {
        tracing::warn!(error, "the number of a ublk device is not forgotten");
    }
}

/// The stable name of a device; none if its export's name does not do for a path.
fn link_path(role: Role, name: &str) -> Option<PathBuf> {
    let fits = name.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    fits.then(|| Path::new(role.links()).join(name))
}

fn link(role: Role, name: &str, number: u32) -> std::io::Result<()> {
    let Some(path) = link_path(role, name) else { return Ok(()) };
    let device = format!("/dev/ublkb{number}");
    if std::fs::read_link(&path).is_ok_and(|to| to == Path::new(&device)) {
        return Ok(());
    }
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    // Whoever opens it finds the old or the new one.
    let fresh = path.with_extension("new");
    let _ = std::fs::remove_file(&fresh);
    std::os::unix::fs::symlink(device, &fresh)?;
    std::fs::rename(fresh, path)
}

/// Says what a device is called before the kernel shows it. Where there is no udev, nobody reads it.
fn name_for_udev(role: Role, name: &str, number: u32) {
    let Some(path) = link_path(role, name) else { return };
    let Ok(name) = path.strip_prefix("/dev") else { return };
    let written = std::fs::create_dir_all(NAMES).and_then(|()| {
        std::fs::write(Path::new(NAMES).join(format!("ublkb{number}")), name.as_os_str().as_encoded_bytes())
    });
    if let Err(error) = written {
        tracing::debug!(%error, "udev is not told the name of a ublk device");
    }
}

fn unlink(role: Role, name: &str, number: u32) {
    let _ = std::fs::remove_file(Path::new(NAMES).join(format!("ublkb{number}")));
    let Some(path) = link_path(role, name) else { return };
    let _ = std::fs::remove_file(&path);
    if let Some(folder) = path.parent().filter(|folder| *folder != Path::new(role.links())) {
        let _ = std::fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_tells_disks_and_ends_apart() {
        assert_ne!(own(Role::Source, "a"), own(Role::Source, "b"));
        assert_ne!(own(Role::Source, "a"), own(Role::Target, "a"));
        assert_eq!(own(Role::Source, "a"), own(Role::Source, "a"));
    }

    #[test]
    fn links_stay_in_their_folder() {
        assert_eq!(link_path(Role::Source, "shop/data"), Some(PathBuf::from("/dev/afterimage/shop/data")));
        for bad in ["", "/x", "../x", "a/../b", "a//b", "a/.", "a\0b"] {
            assert_eq!(link_path(Role::Source, bad), None, "{bad:?}");
        }
    }
}
