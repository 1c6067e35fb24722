//! ublk devices of a proxy: one for each disk on offer, made, taken over after a restart, and ended.
//!
//! A device is a thing of the kernel that outlives this process: while nobody serves it, its hosts wait. So it is ended
//! only when its disk leaves protection, or by `afterimage ublk remove`; whatever else ends this process leaves it to the
//! next one, which knows it again by a number that the kernel keeps with it ([`own`]). Which number (`/dev/ublkbN`) a disk
//! had is also kept in the state folder, so that it has the same after a reboot, when the kernel has forgotten. An
//! unprivileged device is otherwise: the kernel ends it with its process.
//!
//! Control commands block, some for as long as a disk holds its I/O: each device has a thread of its own for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use afterimage_dataplane::host::Geometry;
use afterimage_dataplane::io::ublk::control::{self, Commands as _, Control, ControlError, Mode};
use afterimage_dataplane::io::ublk::uapi::{SECTOR, attr, feature};
use afterimage_dataplane::ublk::{DeviceId, Queue};
use afterimage_wire::v1::Severity;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::config::Wish;
use super::runtime::{Core, Gone, Handle};
use super::state::Proxy;

mod kernel;
mod names;

pub use kernel::{numbers, remove};
pub use names::{LINKS, VIEW_LINKS};

use kernel::{Found, Patience, Resized, Sought};

/// Time between two tries to make a device.
const RETRY: Duration = Duration::from_secs(5);
/// How long hosts' requests may take to end when a device is ended.
const END_WAIT: Duration = Duration::from_secs(10);

impl Wish {
    fn mode(self) -> Mode {
        match self {
            Self::Unprivileged if !control::is_privileged() => Mode::Unprivileged,
            _ => Mode::Full,
        }
    }
}

/// Which data thread serves a device.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Disks.
    Source,
    /// Views.
    Target,
}

impl Role {
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
    /// Being made or taken over; known from when its queue is served.
    Starting(Option<(u32, DeviceId)>),
    /// Hosts see it.
    Live(Device),
    Ending,
}

/// A device that hosts see.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    number: u32,
    id: DeviceId,
    /// Bytes, as hosts know it.
    size: u64,
    /// A new size that hosts are being told of, or could not be: not tried again.
    told: u64,
}

/// The devices of a proxy; by role and name of the export.
#[derive(Default)]
pub struct Devices {
    all: RefCell<BTreeMap<(Role, String), Stage>>,
}

/// What a device is to be made of.
#[derive(Clone, Debug)]
struct Wanted {
    role: Role,
    name: String,
    own: u64,
    geometry: Geometry,
    mode: Mode,
}

/// Looks for the driver where ublk is asked for; says what is missing.
///
/// # Errors
/// [`NoUblk`].
pub fn check(proxy: &super::config::Config) -> Result<(), NoUblk> {
    let source = proxy.source.as_ref().map(|role| (Role::Source, role.ublk));
    let target = proxy.target.as_ref().map(|role| (Role::Target, role.ublk));
    for (role, wish) in source.into_iter().chain(target).filter(|(_, wish)| wish.is_some()) {
        let failed = |error| NoUblk { field: role.field(), error };
        let control = Control::open().map_err(failed)?;
        if wish == Wish::Full && !control::is_privileged() {
            return Err(failed(ControlError::Privilege));
        }
        control::check(control.features(), wish.mode()).map_err(failed)?;
    }
    Ok(())
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
            Some(Stage::Live(device)) => Some(format!("ublk:/dev/ublkb{}", device.number)),
            _ => None,
        }
    }

    /// None is on its way.
    pub fn settled(&self) -> bool {
        !self.all.borrow().values().any(|stage| matches!(stage, Stage::Starting(_)))
    }

    /// Exports of a view that have devices.
    pub fn of_view(&self, view: &str) -> Vec<String> {
        let all = self.all.borrow();
        let of = |name: &&String| name.strip_prefix(view).is_some_and(|rest| rest.starts_with('/'));
        all.keys().filter(|(role, _)| *role == Role::Target).map(|(_, name)| name).filter(of).cloned().collect()
    }

    fn number(&self, role: Role, export: &str) -> Option<u32> {
        match self.all.borrow().get(&(role, export.to_owned())) {
            Some(Stage::Live(device)) => Some(device.number),
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

/// Makes or takes over what is missing, ties devices to disks that are back, and tells hosts of disks that have grown.
/// Nothing is ended from here.
///
/// # Errors
/// [`Gone`].
pub async fn converge(proxy: &Rc<Proxy>) -> Result<(), Gone> {
    let config = &proxy.config;
    if let (Some(handle), Some(role)) = (&proxy.source, &config.source) {
        converge_role(proxy, handle, Role::Source, role.ublk).await?;
    }
    if let (Some(handle), Some(role)) = (&proxy.target, &config.target) {
        converge_role(proxy, handle, Role::Target, role.ublk).await?;
    }
    Ok(())
}

async fn converge_role<C: Core>(proxy: &Rc<Proxy>, handle: &Handle<C>, role: Role, wish: Wish) -> Result<(), Gone> {
    if !wish.is_some() {
        return Ok(());
    }
    for wanted in wanted(proxy, handle, role, wish.mode()).await? {
        begin(proxy, handle, wanted.clone());
        grow(proxy, handle, wanted);
    }
    Ok(())
}

async fn wanted<C: Core>(proxy: &Proxy, handle: &Handle<C>, role: Role, mode: Mode) -> Result<Vec<Wanted>, Gone> {
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
        Wanted { role, own: own(role, &identity), name: export.name, geometry: export.geometry, mode }
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
    proxy.ublk.all.borrow_mut().insert(place.clone(), Stage::Starting(None));
    let (proxy, handle) = (Rc::clone(proxy), handle.clone());
    tokio::task::spawn_local(async move {
        let started = start(&proxy, &handle, &wanted).await;
        // Its disk may have gone meanwhile: then it is being ended, by whoever has seen to that.
        let stays = matches!(proxy.ublk.all.borrow().get(&place), Some(Stage::Starting(_)));
        match started {
            Ok((device, recovered)) => {
                let verb = if recovered { "goes on" } else { "is there" };
                let message = format!("`{}`: /dev/ublkb{} {verb}", wanted.name, device.number);
                if stays {
                    proxy.ublk.all.borrow_mut().insert(place, Stage::Live(device));
                    proxy.event(Severity::Info, None, "ublk", message);
                }
            }
            Err(why) => {
                let message = format!("`{}` has no ublk device: {why}", wanted.name);
                if stays {
                    proxy.event(Severity::Error, None, "ublk", message);
                    tokio::time::sleep(RETRY).await;
                    let mut all = proxy.ublk.all.borrow_mut();
                    if matches!(all.get(&place), Some(Stage::Starting(_))) {
                        all.remove(&place);
                    }
                }
            }
        }
        proxy.changed.notify_one();
    });
}

/// Tells the hosts of a device that its disk has grown; once for each new size.
fn grow<C: Core>(proxy: &Rc<Proxy>, handle: &Handle<C>, wanted: Wanted) {
    let place = (wanted.role, wanted.name.clone());
    let size = wanted.geometry.size - wanted.geometry.size % u64::from(wanted.geometry.block.max(1));
    let device = match proxy.ublk.all.borrow_mut().get_mut(&place) {
        Some(Stage::Live(device)) if size > device.size && size != device.told => {
            device.told = size;
            device.clone()
        }
        _ => return,
    };
    let (proxy, handle) = (Rc::clone(proxy), handle.clone());
    tokio::task::spawn_local(async move {
        let (number, id, old) = (device.number, device.id, device.size);
        // Its requests may lie behind the old end before the command has returned.
        let served = handle.call(move |desk| desk.fronts.ublk.resize(id, size)).await;
        let done = blocking(move || {
            let mut control = Control::open().map_err(|error| error.to_string())?;
            kernel::resize(&mut control, number, size).map_err(|errno| errno.to_string())
        });
        let done = match served {
            Ok(()) => done.await.and_then(|done| done),
            Err(gone) => Err(gone.to_string()),
        };
        let (name, again) = (&wanted.name, format!("it keeps {old} bytes until it is made anew"));
        if done == Ok(Resized::Done) {
            if let Some(Stage::Live(device)) = proxy.ublk.all.borrow_mut().get_mut(&place) {
                device.size = size;
            }
            let message = format!("`{name}`: /dev/ublkb{number} has grown to {size} bytes");
            return proxy.event(Severity::Info, None, "ublk", message);
        }
        let _ = handle.call(move |desk| desk.fronts.ublk.resize(id, old)).await;
        let (severity, why) = match done {
            Ok(_) => (Severity::Warning, "this kernel cannot tell its hosts (Linux 6.16 and later can)".to_owned()),
            Err(why) => (Severity::Error, why),
        };
        let message = format!("`{name}` has grown to {size} bytes, and /dev/ublkb{number} has not: {why}; {again}");
        proxy.event(severity, None, "ublk", message);
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

async fn start<C: Core>(proxy: &Proxy, handle: &Handle<C>, wanted: &Wanted) -> Result<(Device, bool), String> {
    let (role, name) = (wanted.role, wanted.name.clone());
    let number = names::number(proxy, role, &name);
    let sought = Sought { own: wanted.own, number, geometry: wanted.geometry.clone(), mode: wanted.mode };
    let found = blocking(move || {
        let mut control = Control::open().map_err(|error| error.to_string())?;
        kernel::find_or_make(&mut control, numbers, &sought, Patience::default())
    });
    let Found { info, params, recovers } = found.await??;
    let (number, basic) = (info.dev_id, params.basic);
    // Known before hosts see it: after a crash in between it is found again.
    names::keep_number(proxy, role, &name, number)?;
    let size = basic.dev_sectors * SECTOR;
    let queue = move |file| Queue {
        file,
        depth: info.queue_depth,
        // What was made by another version may have longer ones.
        longest: info.max_io_buf_bytes,
        size,
        block: 1 << basic.logical_bs_shift,
        read_only: basic.attrs & attr::READ_ONLY != 0,
    };
    // Where the server does not copy data the kernel does.
    let copied = (info.flags & feature::USER_COPY == 0).then_some(info.max_io_buf_bytes);
    let attached = handle.call(move |desk| {
        let path = control::device_path(number);
        let file = desk.io.attach_ublk(&path, info.queue_depth, copied);
        let file = file.map_err(|errno| format!("{path}: {errno}"))?;
        desk.fronts.ublk.attach(desk.io, queue(file), &name, desk.core).map_err(|error| error.to_string())
    });
    let id = attached.await.map_err(|gone| gone.to_string())??;
    let awaited = match proxy.ublk.all.borrow_mut().get_mut(&(role, wanted.name.clone())) {
        Some(Stage::Starting(known)) => {
            *known = Some((number, id));
            true
        }
        _ => false,
    };
    if !awaited {
        // It is to be ended before it has begun.
        end_one(Some(handle), number, id).await?;
        return Err("its disk has gone".to_owned());
    }
    names::name_for_udev(role, &wanted.name, number);
    blocking(move || {
        let mut control = Control::open().map_err(|error| error.to_string())?;
        let done = if recovers { control.end_recovery(number) } else { control.start(number) };
        done.map_err(|errno| format!("/dev/ublkb{number} does not start: {errno}"))
    })
    .await??;
    if let Err(error) = names::link(role, &wanted.name, number) {
        tracing::warn!(%error, name = wanted.name, "no link to /dev/ublkb{number} could be made");
    }
    Ok((Device { number, id, size, told: size }, recovers))
}

/// Ends the devices of exports that are no longer on offer. What hosts still ask of them fails.
pub async fn end(proxy: &Proxy, role: Role, exports: &[String]) {
    for export in exports {
        let place = (role, export.clone());
        let stage = proxy.ublk.all.borrow().get(&place).cloned();
        let known = match stage {
            Some(Stage::Live(device)) => Some((device.number, device.id)),
            Some(Stage::Starting(known)) => known,
            Some(Stage::Ending) | None => continue,
        };
        proxy.ublk.all.borrow_mut().insert(place.clone(), Stage::Ending);
        // One that is not served yet ends when it would be: see `start`.
        if let Some((number, id)) = known {
            let result = match role {
                Role::Source => end_one(proxy.source.as_ref(), number, id).await,
                Role::Target => end_one(proxy.target.as_ref(), number, id).await,
            };
            match result {
                Ok(gone) => {
                    names::unlink(role, export, number);
                    names::forget_number(proxy, role, export);
                    let open = if gone { "" } else { "; somebody has it open still, and gets errors" };
                    let message = format!("`{export}`: /dev/ublkb{number} has ended{open}");
                    proxy.event(Severity::Info, None, "ublk", message);
                }
                Err(why) => {
                    proxy.event(Severity::Error, None, "ublk", format!("`{export}`: /dev/ublkb{number}: {why}"));
                }
            }
        }
        proxy.ublk.all.borrow_mut().remove(&place);
    }
}

/// False: somebody has it open.
async fn end_one<C: Core>(handle: Option<&Handle<C>>, number: u32, id: DeviceId) -> Result<bool, String> {
    let Some(handle) = handle else { return Ok(true) };
    handle.call(move |desk| desk.fronts.ublk.retire(desk.io, id)).await.map_err(|gone| gone.to_string())?;
    let removed = blocking(move || {
        let mut control = Control::open().map_err(|error| error.to_string())?;
        remove(&mut control, number, Patience::default().gone)
    });
    match tokio::time::timeout(END_WAIT, removed).await {
        Ok(result) => result?,
        Err(_) => Err("it does not end: somebody holds it open, or its disk holds its I/O".to_owned()),
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
    fn what_is_wished_for_is_said_by_a_flag_or_a_word() {
        #[derive(Deserialize)]
        struct Role {
            ublk: Wish,
        }
        let parse = |text: &str| toml::from_str::<Role>(text).map(|role| role.ublk).map_err(|error| error.to_string());
        assert_eq!(parse("ublk = true"), Ok(Wish::Full));
        assert_eq!(parse("ublk = false"), Ok(Wish::No));
        assert_eq!(parse("ublk = \"unprivileged\""), Ok(Wish::Unprivileged));
        for wrong in ["ublk = \"yes\"", "ublk = 1"] {
            assert!(parse(wrong).unwrap_err().contains("unprivileged"), "{wrong}");
        }
    }
}
