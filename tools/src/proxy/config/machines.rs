//! What this host lets the coordinator do with machines: by name, so that no command ever comes from elsewhere.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, within};

#[path = "networks.rs"]
pub mod networks;

pub use networks::Network;

/// How long a hook or a script may take unless told, seconds.
pub const DEFAULT_HOOK_S: u64 = 60;
/// The URI of libvirt unless told.
pub const DEFAULT_LIBVIRT_URI: &str = "qemu:///system";
/// Where libvirt reads the seeds of machines unless told.
pub const DEFAULT_SEEDS: &str = "/var/lib/libvirt/images";
/// The program of machines unless told.
pub const DEFAULT_QEMU: &str = "qemu-system-x86_64";

/// `[machines]` of the file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileMachines {
    #[serde(default)]
    hook: BTreeMap<String, FileHook>,
    #[serde(default)]
    qemu: BTreeMap<String, FileQemu>,
    #[serde(default)]
    libvirt: BTreeMap<String, FileLibvirt>,
    #[serde(default)]
    script: BTreeMap<String, FileScript>,
    #[serde(default)]
    network: BTreeMap<String, networks::FileNetwork>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileScript {
    command: Vec<String>,
    deadline_s: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileHook {
    start: Vec<String>,
    stop: Vec<String>,
    probe: Vec<String>,
    ready: Option<Vec<String>>,
    deadline_s: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileQemu {
    program: Option<PathBuf>,
    accelerators: Option<Vec<String>>,
    #[serde(default)]
    arguments: Vec<String>,
    #[serde(default)]
    networks: BTreeMap<String, String>,
    uefi: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLibvirt {
    uri: Option<String>,
    virsh: Option<PathBuf>,
    kind: Option<String>,
    #[serde(default)]
    networks: BTreeMap<String, String>,
    seeds: Option<PathBuf>,
}

/// Commands of the operator's, each with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Switches a machine on.
    pub start: Vec<String>,
    /// Switches it off.
    pub stop: Vec<String>,
    /// Says whether it is on.
    pub probe: Vec<String>,
    /// Says whether it answers; empty for none.
    pub ready: Vec<String>,
    /// How long each may take.
    pub deadline: Duration,
}

/// A script of the operator's, with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// What is run.
    pub command: Vec<String>,
    /// How long it may take.
    pub deadline: Duration,
}

/// How machines are started as processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// The first that this host has is taken.
    pub accelerators: Vec<String>,
    /// More for its command line.
    pub arguments: Vec<String>,
    /// `-netdev` without its id, by the name of the network, for those that are to be none of `[machines.network]`.
    pub networks: BTreeMap<String, String>,
    /// Image of a UEFI firmware.
    pub uefi: Option<PathBuf>,
}

/// How machines are started as domains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Libvirt {
    /// Which libvirt.
    pub uri: String,
    /// The program.
    pub virsh: PathBuf,
    /// Type of the domains: `kvm`, `qemu`.
    pub kind: String,
    /// Bridges, by the name of the network, for those that are to be none of `[machines.network]`.
    pub networks: BTreeMap<String, String>,
    /// Where the seeds of its machines are put, for libvirt to read.
    pub seeds: PathBuf,
}

/// The drivers that this host has, by the names of their settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machines {
    /// Commands.
    pub hooks: BTreeMap<String, Hook>,
    /// Processes.
    pub qemu: BTreeMap<String, Qemu>,
    /// Domains.
    pub libvirt: BTreeMap<String, Libvirt>,
    /// What plans run.
    pub scripts: BTreeMap<String, Script>,
    /// What the networks of machines are here.
    pub networks: BTreeMap<String, Network>,
}

impl Machines {
    /// What the coordinator is told that this proxy can do.
    pub fn capabilities(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            ("machine-hook", self.hooks.is_empty()),
            ("machine-qemu", self.qemu.is_empty()),
            ("machine-libvirt", self.libvirt.is_empty()),
            ("machine-check", self.hooks.is_empty() && self.qemu.is_empty() && self.libvirt.is_empty()),
            ("scripts", self.scripts.is_empty()),
        ];
        all.into_iter().filter(|(_, none)| !none).map(|(word, _)| word)
    }
}

/// A command begins with a path that does not depend on where the program was started.
fn command(field: &'static str, words: Vec<String>) -> Result<Vec<String>, ConfigError> {
    if words.first().is_some_and(|program| program.starts_with('/')) {
        return Ok(words);
    }
    let allowed = "an absolute path, and arguments".to_owned();
    Err(ConfigError::Field { field, value: format!("{words:?}"), allowed })
}

pub(super) fn machines(file: FileMachines) -> Result<Machines, ConfigError> {
    let drivers = file.hook.keys().chain(file.qemu.keys()).chain(file.libvirt.keys());
    let names = drivers.chain(file.script.keys()).chain(file.network.keys());
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    for name in names {
        if name.is_empty() || name.len() > 63 || name.starts_with('-') || !name.bytes().all(plain) {
            let allowed = "1 to 63 characters of a-z, 0-9 and `-`, beginning with a letter or digit".to_owned();
            return Err(ConfigError::Field { field: "machines", value: format!("`{name}`"), allowed });
        }
    }
    let hook = |hook: FileHook| {
        let deadline = within("machines.hook.deadline_s", hook.deadline_s.unwrap_or(DEFAULT_HOOK_S), 1, 3600)?;
        Ok::<_, ConfigError>(Hook {
            start: command("machines.hook.start", hook.start)?,
            stop: command("machines.hook.stop", hook.stop)?,
            probe: command("machines.hook.probe", hook.probe)?,
            ready: hook.ready.map(|ready| command("machines.hook.ready", ready)).transpose()?.unwrap_or_default(),
            deadline: Duration::from_secs(deadline),
        })
    };
    let qemu = |qemu: FileQemu| Qemu {
        program: qemu.program.unwrap_or_else(|| DEFAULT_QEMU.into()),
        accelerators: qemu.accelerators.unwrap_or_else(|| vec!["kvm".to_owned(), "tcg".to_owned()]),
        arguments: qemu.arguments,
        networks: qemu.networks,
        uefi: qemu.uefi,
    };
    let libvirt = |libvirt: FileLibvirt| Libvirt {
        uri: libvirt.uri.unwrap_or_else(|| DEFAULT_LIBVIRT_URI.to_owned()),
        virsh: libvirt.virsh.unwrap_or_else(|| "virsh".into()),
        kind: libvirt.kind.unwrap_or_else(|| "kvm".to_owned()),
        networks: libvirt.networks,
        seeds: libvirt.seeds.unwrap_or_else(|| DEFAULT_SEEDS.into()),
    };
    let script = |script: FileScript| {
        let deadline = within("machines.script.deadline_s", script.deadline_s.unwrap_or(DEFAULT_HOOK_S), 1, 3600)?;
        let command = command("machines.script.command", script.command)?;
        Ok::<_, ConfigError>(Script { command, deadline: Duration::from_secs(deadline) })
    };
    Ok(Machines {
        hooks: file.hook.into_iter().map(|(name, h)| Ok((name, hook(h)?))).collect::<Result<_, ConfigError>>()?,
        qemu: file.qemu.into_iter().map(|(name, q)| (name, qemu(q))).collect(),
        libvirt: file.libvirt.into_iter().map(|(name, l)| (name, libvirt(l))).collect(),
        scripts: file.script.into_iter().map(|(name, s)| Ok((name, script(s)?))).collect::<Result<_, ConfigError>>()?,
        networks: networks::networks(file.network)?,
    })
}
