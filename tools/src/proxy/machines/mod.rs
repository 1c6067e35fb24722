//! Machines of this host: switched on and off as the coordinator's operations say, by drivers that this host's own
//! configuration allows.
//!
//! ```text
//! command     a program of the host's, with a deadline          xml      a domain, as libvirt reads it
//! hook        the operator's commands                           libvirt  domains, by virsh
//! qemu, qmp   a process that outlives this one, and its monitor ready    does it answer?
//! ways        where interfaces lead here                        links    taps, and the bridges of tests
//! seed        what a guest is told of its addresses              script   the operator's, before and after steps of plans
//! ```
//! A command says how things should be, and is safe to repeat; two for one instance are done one after the other. Drivers
//! wait for other programs: each command has a thread of its own, which a proxy that ends does not wait for.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{
    CheckInstance, CommandErrorKind as Kind, Done, Driver, MachinePower, MachineRef, MachineRole, MachineState,
    ProbeInstance, StartInstance, StopInstance,
};

use super::commands::{Refused, refused};
use super::config::{Config, Machines};
use super::fronts;
use super::state::Proxy;
use super::ublk::Role;

mod command;
mod hook;
mod libvirt;
mod links;
mod qemu;
mod qmp;
mod ready;
pub(super) mod script;
mod seed;
mod ways;
mod xml;

/// Longest name of an instance, bytes.
const MAX_INSTANCE: usize = 255;
/// What is kept of what a program said, bytes.
const MAX_SAID: usize = 600;

/// What the networks of machines are here, by their names.
type Networks = std::collections::BTreeMap<String, super::config::machines::Network>;

/// Why a machine is not driven.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DriveError {
    /// Nothing here is set up for that.
    #[error("{0}")]
    Setup(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

impl DriveError {
    fn failed(what: impl std::fmt::Display) -> Self {
        Self::Failed(what.to_string())
    }
}

impl From<DriveError> for Refused {
    fn from(error: DriveError) -> Self {
        let kind = if matches!(error, DriveError::Setup(_)) { Kind::Unsupported } else { Kind::Io };
        Self(kind, error.to_string())
    }
}

/// Whether a machine is on, and what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stand {
    on: bool,
    detail: String,
}

impl Stand {
    fn on(detail: impl Into<String>) -> Self {
        Self { on: true, detail: detail.into() }
    }

    fn off(detail: impl Into<String>) -> Self {
        Self { on: false, detail: detail.into() }
    }
}

/// One instance of a machine, as a driver has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Instance {
    /// Of the machine.
    uid: String,
    /// In full.
    name: String,
    /// What it is called here; fit for a file name.
    called: String,
    /// Which settings.
    profile: String,
    /// Which of the machine's instances.
    role: MachineRole,
    /// What a driver keeps of it.
    folder: PathBuf,
}

impl Instance {
    fn new(machine: Option<&MachineRef>, config: &Config) -> Result<(Self, Driver), Refused> {
        let Some(machine) = machine else { return refused(Kind::Invalid, "no machine is named") };
        let called = machine.instance.clone();
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if called.is_empty() || called.len() > MAX_INSTANCE || called.starts_with('.') || !called.bytes().all(plain) {
            return refused(Kind::Invalid, format!("`{called}` is no name of a machine"));
        }
        let Some(state) = &config.state_dir else {
            return refused(Kind::Unsupported, "this proxy has no state folder, which machines need");
        };
        let driver = machine.driver();
        let word = match driver {
            Driver::Hook => "hook",
            Driver::Qemu => "qemu",
            Driver::Libvirt => "libvirt",
            Driver::None | Driver::Unspecified => return refused(Kind::Invalid, format!("nobody drives {called}")),
        };
        let instance = Self {
            uid: machine.uid.clone(),
            name: machine.name.clone(),
            profile: machine.profile.clone(),
            role: machine.role(),
            folder: state.join("machines").join(word).join(&called),
            called,
        };
        Ok((instance, driver))
    }
}

fn settings<'a, T>(
    all: &'a std::collections::BTreeMap<String, T>,
    driver: &str,
    profile: &str,
) -> Result<&'a T, DriveError> {
    all.get(profile).ok_or_else(|| {
        let known: Vec<&str> = all.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
        let message =
            format!("this proxy's configuration has no [machines.{driver}.{profile}]; for {driver} it has {known}");
        DriveError::Setup(message)
    })
}

/// By what an instance is driven here.
enum Drives {
    Hook(hook::Hooked),
    Qemu(qemu::Process),
    Libvirt(libvirt::Domain),
}

impl Drives {
    fn new(machines: &Machines, instance: Instance, driver: Driver) -> Result<Self, DriveError> {
        let (profile, networks) = (instance.profile.clone(), machines.networks.clone());
        Ok(match driver {
            Driver::Qemu => {
                let settings = settings(&machines.qemu, "qemu", &profile)?.clone();
                Self::Qemu(qemu::Process::new(settings, networks, instance))
            }
            Driver::Libvirt => {
                let settings = settings(&machines.libvirt, "libvirt", &profile)?.clone();
                Self::Libvirt(libvirt::Domain::new(settings, networks, instance))
            }
            _ => {
                let settings = settings(&machines.hooks, "hook", &profile)?.clone();
                Self::Hook(hook::Hooked::new(settings, networks, instance))
            }
        })
    }

    fn check(&self, said: &StartInstance) -> Result<(), DriveError> {
        match self {
            Self::Hook(hook) => hook.check(said),
            Self::Qemu(process) => process.check(said),
            Self::Libvirt(domain) => domain.check(said),
        }
    }

    fn start(&self, said: &StartInstance) -> Result<Stand, DriveError> {
        match self {
            Self::Hook(hook) => hook.start(said),
            Self::Qemu(process) => process.start(said),
            Self::Libvirt(domain) => domain.start(said),
        }
    }

    fn stop(&self, within: Duration) -> Result<Stand, DriveError> {
        match self {
            Self::Hook(hook) => hook.stop(within),
            Self::Qemu(process) => process.stop(within),
            Self::Libvirt(domain) => domain.stop(within),
        }
    }

    fn probe(&self) -> Result<Stand, DriveError> {
        match self {
            Self::Hook(hook) => hook.probe(),
            Self::Qemu(process) => process.probe(),
            Self::Libvirt(domain) => domain.probe(),
        }
    }

    /// Where its first serial port is written to.
    fn console(&self) -> Option<PathBuf> {
        match self {
            Self::Qemu(process) => Some(process.console()),
            Self::Hook(_) | Self::Libvirt(_) => None,
        }
    }
}

/// Whose turn it is with each instance.
#[derive(Default)]
pub struct Turns(RefCell<HashMap<PathBuf, Rc<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// Of the instance that has this folder.
    fn of(&self, folder: &Path) -> Rc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.borrow_mut();
        turns.retain(|_, turn| Rc::strong_count(turn) > 1);
        Rc::clone(turns.entry(folder.to_owned()).or_default())
    }
}

/// Waits for it on a thread of its own.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriveError> + Send + 'static,
) -> Result<T, DriveError> {
    let (done, result) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("machine".to_owned()).spawn(move || drop(done.send(work())));
    if let Err(error) = thread {
        return Err(DriveError::failed(format!("no thread can be started: {error}")));
    }
    result.await.unwrap_or_else(|_| Err(DriveError::failed("the driver has ended in the middle of it")))
}

fn state(stand: Stand, ready: bool) -> Outcome {
    let power = if stand.on { MachinePower::On } else { MachinePower::Off };
    Outcome::Machine(MachineState { power: power.into(), ready, detail: stand.detail })
}

/// Switches an instance on.
pub(super) async fn start(proxy: &Proxy, mut said: StartInstance) -> Result<Outcome, Refused> {
    let (instance, driver) = Instance::new(said.machine.as_ref(), &proxy.config)?;
    if instance.role == MachineRole::Source {
        for disk in &mut said.disks {
            disk.uris = fronts::uris(proxy, Role::Source, &disk.export_name);
        }
    }
    let turn = proxy.machines.of(&instance.folder);
    let _turn = turn.lock().await;
    let drives = Drives::new(&proxy.config.machines, instance, driver)?;
    Ok(state(aside(move || drives.start(&said)).await?, false))
}

/// Switches an instance off.
pub(super) async fn stop(proxy: &Proxy, said: StopInstance) -> Result<Outcome, Refused> {
    let (instance, driver) = Instance::new(said.machine.as_ref(), &proxy.config)?;
    let turn = proxy.machines.of(&instance.folder);
    let _turn = turn.lock().await;
    let drives = Drives::new(&proxy.config.machines, instance, driver)?;
    let within = Duration::from_millis(said.within_ms);
    Ok(state(aside(move || drives.stop(within)).await?, false))
}

/// Looks whether an instance could be started, and does nothing.
pub(super) async fn check(proxy: &Proxy, said: CheckInstance) -> Result<Outcome, Refused> {
    let said = said.instance.unwrap_or_default();
    let (instance, driver) = Instance::new(said.machine.as_ref(), &proxy.config)?;
    let drives = Drives::new(&proxy.config.machines, instance, driver)?;
    aside(move || drives.check(&said)).await?;
    Ok(Outcome::Done(Done {}))
}

/// Removes what earlier lives of this proxy have made for machines that are off.
pub(super) async fn clear(proxy: Rc<Proxy>) {
    let Some(home) = proxy.config.state_dir.as_ref().map(|dir| dir.join("machines/qemu")) else { return };
    let Ok(folders) = std::fs::read_dir(home) else { return };
    for folder in folders.flatten().map(|entry| entry.path()).filter(|folder| links::any(folder)) {
        let turn = proxy.machines.of(&folder);
        let _turn = turn.lock().await;
        let machine = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Err(error) = aside(move || qemu::clear(&folder)).await {
            tracing::warn!(machine, "what it was connected by is still there: {error}");
        }
    }
}

/// Looks how an instance stands.
pub(super) async fn probe(proxy: &Proxy, said: ProbeInstance) -> Result<Outcome, Refused> {
    let (instance, driver) = Instance::new(said.machine.as_ref(), &proxy.config)?;
    let machines = proxy.config.machines.clone();
    let looked = aside(move || {
        let drives = Drives::new(&machines, instance.clone(), driver)?;
        let stand = drives.probe()?;
        let wanted = said.readiness.unwrap_or_default();
        match ready::look(&machines, &instance, &wanted, drives.console().as_deref()) {
            _ if !stand.on => Ok((stand, false)),
            Ok(()) => Ok((stand, true)),
            Err(why) => Ok((Stand { detail: why, ..stand }, false)),
        }
    });
    let (stand, ready) = looked.await?;
    Ok(state(stand, ready))
}

/// What a program said, short: one line for a message.
fn short(said: &str) -> String {
    let line = said.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_SAID) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A replica called `web`, kept in a folder.
    pub fn instance(folder: &str) -> Instance {
        Instance {
            uid: "6fa459ea-ee8a-4ca4-894e-db77e160355e".into(),
            name: "tenants/default/machines/web".into(),
            called: "web".into(),
            profile: "default".into(),
            role: MachineRole::Replica,
            folder: PathBuf::from(folder).join("web"),
        }
    }

    /// By libvirt's own judgement, where it is installed.
    pub fn validated(schema: &str, xml: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), xml).unwrap();
        let judged = std::process::Command::new("virt-xml-validate").arg(file.path()).arg(schema).output();
        if let Ok(judged) = judged {
            let said = String::from_utf8_lossy(&judged.stdout).into_owned() + &String::from_utf8_lossy(&judged.stderr);
            assert!(judged.status.success(), "{said}\n{xml}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let config =
            Config::of_text("name='s'\nstate_dir='/s'\n[coordinator]\naddress='h:1'\n[source]\nnbd=['unix:/n']\n");
        let config = config.unwrap();
        let called = |instance: &str| {
            let machine =
                MachineRef { instance: instance.into(), driver: Driver::Hook.into(), ..MachineRef::default() };
            Instance::new(Some(&machine), &config)
        };
        assert_eq!(called("acme.web").unwrap().0.folder, PathBuf::from("/s/machines/hook/acme.web"));
        for bad in ["", "..", ".x", "a/b", "a b", "a\n"] {
            assert!(called(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_not_configured_is_named_with_what_is() {
        let all = [("ipmi".to_owned(), ())].into();
        let error = settings(&all, "hook", "web").unwrap_err().to_string();
        assert!(error.contains("[machines.hook.web]") && error.contains("ipmi"), "{error}");
    }

    #[test]
    fn long_words_of_a_program_are_cut() {
        assert_eq!(short(" a\n\tb  "), "a b");
        assert_eq!(short(&"ä".repeat(2000)).chars().count(), MAX_SAID + 1);
    }
}
