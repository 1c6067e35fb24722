//! What a proxy is told at start: a TOML file, flags over it, and the checks that refuse a mistake by name.
//!
//! Only what concerns this host stands here. What is protected, and where it goes, is desired state
//! (a `DesiredState`) from the coordinator.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use afterimage_controlplane::wrapping::KeysConfig;
use afterimage_dataplane::source::MIN_SYNC_RATE;
use serde::Deserialize;

#[path = "config/journal.rs"]
mod journal;
#[path = "config/machines.rs"]
pub mod machines;
#[path = "config/values.rs"]
mod values;

pub use journal::OpenJournal;
pub use machines::Machines;
pub use values::{ConfigError, Listen, LogFormat, Secret, Serve, Size, Wish};

/// Most seal threads that make sense on one source.
pub const MAX_SEAL_THREADS: usize = 64;
/// Smallest pool that the largest operations fit into, bytes.
pub const MIN_POOL: u64 = 64 * MIB;
/// Largest pool, bytes: registered memory is pinned.
pub const MAX_POOL: u64 = 64 * 1024 * MIB;
/// Pool of each data thread unless told, bytes.
pub const DEFAULT_POOL: u64 = 256 * MIB;
/// Spill of each group unless told, bytes.
pub const DEFAULT_SPILL: u64 = 8 * 1024 * MIB;
/// Room that the spill leaves free on its file system unless told, bytes.
pub const DEFAULT_SPILL_RESERVE: u64 = 2 * 1024 * MIB;
/// Bytes of one file of the spill unless told.
pub const DEFAULT_SPILL_SEGMENT: u64 = 64 * MIB;
/// Longest that a write waits for room in the queue unless told, milliseconds.
pub const DEFAULT_MAX_WAIT_MS: u64 = 20;
/// Bytes after which a segment of a journal is closed unless told.
pub const DEFAULT_SEGMENT: u64 = 64 * MIB;
/// Room that ingest leaves free on the journal's file system unless told, bytes.
pub const DEFAULT_RESERVE: u64 = 256 * MIB;
/// Time between two verifications of all that is held unless told, hours.
pub const DEFAULT_SCRUB_HOURS: u64 = 7 * 24;
/// Most that they read unless told, bytes a second.
pub const DEFAULT_SCRUB_RATE: u64 = 32 * MIB;
const MIB: u64 = 1024 * 1024;

/// Threads that seal unless told: one core is left for the data thread and the host.
pub fn default_seal_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cores - 1).clamp(1, 4)
}

/// The file. Every field may be missing and may come by flag instead.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Option<String>,
    site: Option<String>,
    state_dir: Option<PathBuf>,
    log: Option<LogFormat>,
    #[serde(default)]
    coordinator: FileCoordinator,
    #[serde(default)]
    keys: KeysConfig,
    #[serde(default)]
    source: FileSource,
    #[serde(default)]
    target: FileTarget,
    #[serde(default)]
    machines: machines::FileMachines,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileCoordinator {
    address: Option<String>,
    token: Option<Secret>,
    token_file: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSource {
    nbd: Option<Vec<Listen>>,
    vhost_user: Option<PathBuf>,
    ublk: Option<Wish>,
    memory: Option<Size>,
    queue: Option<Size>,
    seal_threads: Option<usize>,
    max_wait_ms: Option<u64>,
    sync_rate: Option<Size>,
    trust_reboot: Option<bool>,
    witness: Option<PathBuf>,
    spill: Option<PathBuf>,
    spill_budget: Option<Size>,
    spill_segment: Option<Size>,
    spill_reserve: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTarget {
    journal: Option<PathBuf>,
    listen: Option<SocketAddr>,
    advertise: Option<String>,
    views: Option<Vec<Listen>>,
    vhost_user: Option<PathBuf>,
    ublk: Option<Wish>,
    memory: Option<Size>,
    budget: Option<Size>,
    segment: Option<Size>,
    reserve: Option<Size>,
    scrub_hours: Option<u64>,
    scrub_rate: Option<Size>,
}

/// Options of `afterimage proxy`. A flag wins over the file.
#[derive(clap::Args, Debug, Default)]
#[command(after_long_help = examples::EXAMPLES)]
pub struct Args {
    /// Configuration file (TOML); every setting below can stand in it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of this proxy, as operators see it.
    #[arg(long)]
    pub name: Option<String>,
    /// Where this proxy stands, such as vienna: a group that names no target is not placed at the site of its source.
    #[arg(long)]
    pub site: Option<String>,
    /// Folder for the certificate, the last desired state and the identity of this proxy.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// The coordinator: HOST:PORT; of several, all of them with commas.
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<String>,
    /// One-time token of the first join.
    #[arg(long, env = "AFTERIMAGE_TOKEN", hide_env_values = true)]
    pub token: Option<Secret>,
    /// File that holds the token.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Source role: where hosts reach their disks by NBD (unix:/path or tcp:address:port); may be repeated.
    #[arg(long, value_name = "LISTEN")]
    pub nbd: Vec<Listen>,
    /// Source role: folder in which each disk has a socket (GROUP-DISK.sock) for guests, by vhost-user-blk.
    #[arg(long, value_name = "DIR")]
    pub vhost_user: Option<PathBuf>,
    /// Source role: each disk is also a block device of this host (ublk), /dev/afterimage/GROUP/DISK. "unprivileged": by
    /// an ordinary user; such a device ends with its proxy, without mercy for what is mounted.
    #[arg(long, value_name = "full|unprivileged", num_args = 0..=1, require_equals = true, default_missing_value = "full")]
    pub ublk: Option<Wish>,
    /// Target role: folder of the journals and replicas.
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// Target role: address on which streams of sources arrive.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Target role: the address by which sources reach that, if another (port forwarding, a name).
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Target role: where views are reached by NBD (unix:/path or tcp:address:port); may be repeated.
    #[arg(long, value_name = "LISTEN")]
    pub views: Vec<Listen>,
    /// Target role: folder in which each disk of a view has a socket (VIEW-DISK.sock) for guests, by vhost-user-blk.
    #[arg(long, value_name = "DIR")]
    pub view_vhost_user: Option<PathBuf>,
    /// Target role: each disk of a view is also a block device of this host, /dev/afterimage-views/VIEW/DISK.
    #[arg(long, value_name = "full|unprivileged", num_args = 0..=1, require_equals = true, default_missing_value = "full")]
    pub view_ublk: Option<Wish>,
    /// Buffer memory of each role, pinned, e.g. 512MiB.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Source role: threads that compress and seal.
    #[arg(long, value_name = "N")]
    pub seal_threads: Option<usize>,
    /// How the log is written, to standard error.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log: Option<LogFormat>,
    /// Serve this raw file or device over NBD, unprotected, without a coordinator; may be repeated.
    #[arg(long, value_name = "NAME=PATH", conflicts_with_all = ["coordinator", "standalone"])]
    pub serve: Vec<Serve>,
    /// Take the desired state from this file instead of from a coordinator.
    #[arg(long, value_name = "FILE", conflicts_with = "coordinator")]
    pub standalone: Option<PathBuf>,
    /// Write source.toml and target.toml for a stand-alone pair that protects the disks of --serve, with keys and
    /// certificates of their own, into this folder, and end. The target's streams arrive at --listen.
    #[arg(long, value_name = "DIR", requires_all = ["serve", "listen"])]
    pub new_pair: Option<PathBuf>,
}

/// How a proxy finds its desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// From a coordinator, by a session that is kept open.
    Coordinator {
        /// `host:port`.
        address: String,
        /// For the first join.
        token: Option<Secret>,
    },
    /// From a file that does not change.
    File(PathBuf),
    /// Nothing but these disks, unprotected.
    Serve(Vec<Serve>),
    /// A journal by itself: a point of it, and nothing else.
    Journal(Box<OpenJournal>),
}

/// The source role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRole {
    /// Where hosts come in.
    pub nbd: Vec<Listen>,
    /// Folder of the sockets of guests.
    pub vhost_user: Option<PathBuf>,
    /// Disks are block devices of this host, too.
    pub ublk: Wish,
    /// Pool, bytes.
    pub memory: u64,
    /// Most bytes captured and not yet acknowledged.
    pub queue: u64,
    /// Threads that seal; 0: the data thread does it.
    pub seal_threads: usize,
    /// Longest that a write waits for room, milliseconds.
    pub max_wait_ms: u64,
    /// Most bytes a second that synchronisations of one group read from its disks; 0: no bound.
    pub sync_rate: u64,
    /// After a reboot of this host nobody else has used its disks: what the write-intent log says is enough. Without it,
    /// a disk that was not stopped cleanly is compared in full after a reboot.
    pub trust_reboot: bool,
    /// Folder of the witnesses of the write-intent logs, if not in the state folder: one that is not copied and put back
    /// with it.
    pub witness: Option<PathBuf>,
    /// The spill, unless there is none.
    pub spill: Option<SpillRole>,
}

/// Where frames queue when memory runs short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpillRole {
    /// Folder.
    pub dir: PathBuf,
    /// Most bytes for each group.
    pub budget: u64,
    /// Bytes of one file.
    pub segment: u64,
    /// Bytes of its file system that stay free.
    pub reserve: u64,
}

/// The target role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRole {
    /// Journals and replicas.
    pub journal: PathBuf,
    /// Where streams arrive.
    pub listen: SocketAddr,
    /// By which sources reach it, if another.
    pub advertise: Option<String>,
    /// Where clients of views come in.
    pub views: Vec<Listen>,
    /// Folder of the sockets of guests.
    pub vhost_user: Option<PathBuf>,
    /// Disks of views are block devices of this host, too.
    pub ublk: Wish,
    /// Pool, bytes.
    pub memory: u64,
    /// Journal bytes of a stream whose policy sets none; unset: the core's default.
    pub budget: Option<u64>,
    /// Bytes after which a segment is closed.
    pub segment: u64,
    /// Bytes of the file system that ingest leaves free.
    pub reserve: u64,
    /// Hours between two verifications of all that is held; 0: never.
    pub scrub_hours: u64,
    /// Most bytes a second that this reads.
    pub scrub_rate: u64,
}

/// A configuration that has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this proxy.
    pub name: String,
    /// Folder for what it keeps; none in serve mode.
    pub state_dir: Option<PathBuf>,
    /// Where desired state comes from.
    pub control: Control,
    /// The source role, if it has it.
    pub source: Option<SourceRole>,
    /// The target role, if it has it.
    pub target: Option<TargetRole>,
    /// Log.
    pub log: LogFormat,
    /// Where it stands; empty if nothing is said.
    pub site: String,
    /// By what it may drive machines.
    pub machines: Machines,
    /// What wraps the key of the site.
    pub keys: KeysConfig,
}

impl Config {
    /// File, flags over it, checked.
    ///
    /// # Errors
    /// [`ConfigError`], naming the field, its value and what is allowed.
    pub fn load(args: &Args) -> Result<Self, ConfigError> {
        let file = match &args.config {
            Some(path) => parse(path)?,
            None => File::default(),
        };
        Self::merge(file, args)
    }

    /// As a file with this text would give it, without any flag.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn of_text(text: &str) -> Result<Self, ConfigError> {
        let file = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: PathBuf::from("configuration"),
            message: error.to_string().trim_end().to_owned(),
        })?;
        Self::merge(file, &Args::default())
    }

    fn merge(file: File, args: &Args) -> Result<Self, ConfigError> {
        let control = control(&file.coordinator, args)?;
        let name = args.name.clone().or(file.name);
        let name = match (&control, name) {
            (_, Some(name)) => name,
            (Control::Coordinator { .. }, None) => {
                return Err(ConfigError::Missing { field: "name", why: "operators know the proxy by it" });
            }
            (_, None) => "standalone".to_owned(),
        };
        if name.is_empty() || name.len() > 63 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        {
            return Err(ConfigError::Field {
                field: "name",
                value: format!("`{name}`"),
                allowed: "1 to 63 letters, digits, `-`, `_` and `.`".to_owned(),
            });
        }
        let state_dir = args.state.clone().or(file.state_dir);
        if state_dir.is_none() && matches!(control, Control::Coordinator { .. }) {
            return Err(ConfigError::Missing {
                field: "state_dir",
                why: "the certificate and the last desired state are kept there",
            });
        }
        let source = source_role(file.source, args, state_dir.as_deref())?;
        let target = target_role(file.target, args)?;
        if source.is_none() && target.is_none() {
            return Err(ConfigError::Missing {
                field: "source.nbd",
                why: "a proxy needs a role: `source.nbd` (--nbd), `source.vhost_user` (--vhost-user) or `source.ublk` (--ublk) for \
                      a source, `target.journal` (--journal) for a target",
            });
        }
        if matches!(control, Control::Serve(_)) && source.is_none() {
            return Err(ConfigError::Missing { field: "source.nbd", why: "--serve offers its disks there" });
        }
        let site = args.site.clone().or(file.site).unwrap_or_default();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if site.len() > 63 || site.starts_with('-') || !site.bytes().all(plain) {
            return Err(ConfigError::Field {
                field: "site",
                value: format!("`{site}`"),
                allowed: "1 to 63 characters of a-z, 0-9 and `-`, beginning with a letter or digit".to_owned(),
            });
        }
        let machines = machines::machines(file.machines)?;
        file.keys.check().map_err(ConfigError::Keys)?;
        let log = args.log.or(file.log).unwrap_or_default();
        Ok(Self { name, state_dir, control, source, target, log, site, machines, keys: file.keys })
    }

    /// The state folder.
    ///
    /// # Errors
    /// If there is none: it is needed by whoever asks.
    pub fn state_dir(&self) -> Result<&Path, ConfigError> {
        self.state_dir.as_deref().ok_or(ConfigError::Missing { field: "state_dir", why: "something has to be kept" })
    }
}

fn parse(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text)
        .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: error.to_string().trim_end().to_owned() })
}

fn control(file: &FileCoordinator, args: &Args) -> Result<Control, ConfigError> {
    if let Some(path) = &args.standalone {
        return Ok(Control::File(path.clone()));
    }
    if !args.serve.is_empty() {
        let mut seen = std::collections::HashSet::new();
        if let Some(twice) = args.serve.iter().find(|s| !seen.insert(&s.name)) {
            return Err(ConfigError::Field {
                field: "--serve",
                value: format!("`{}` twice", twice.name),
                allowed: "each name once".to_owned(),
            });
        }
        return Ok(Control::Serve(args.serve.clone()));
    }
    let address = args.coordinator.clone().or_else(|| file.address.clone()).ok_or(ConfigError::Missing {
        field: "coordinator.address",
        why: "desired state comes from there (or use --standalone or --serve)",
    })?;
    // Several coordinators with commas: any of them leads to who leads.
    for one in address.split(',') {
        host_port("coordinator.address", one.trim())?;
    }
    let token_file = args.token_file.as_ref().or(file.token_file.as_ref());
    let token = match (args.token.clone().or_else(|| file.token.clone()), token_file) {
        (Some(_), Some(path)) => {
            return Err(ConfigError::Field {
                field: "coordinator.token",
                value: format!("given beside token_file {}", path.display()),
                allowed: "one of token and token_file".to_owned(),
            });
        }
        (token, None) => token,
        // Read only when a join is due: after it the file may be gone.
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => Some(Secret(text.trim().to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(ConfigError::Read { path: path.clone(), source }),
        },
    };
    Ok(Control::Coordinator { address, token })
}

/// Checks `host:port`.
fn host_port(field: &'static str, text: &str) -> Result<(), ConfigError> {
    let ok =
        text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0));
    if ok {
        return Ok(());
    }
    Err(ConfigError::Field { field, value: format!("`{text}`"), allowed: "HOST:PORT".to_owned() })
}

fn within(field: &'static str, value: u64, min: u64, max: u64) -> Result<u64, ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::Field { field, value: value.to_string(), allowed: format!("{min} to {max}") })
}

/// Checks a folder that must not depend on where the program was started.
fn absolute(field: &'static str, dir: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
    match dir {
        Some(dir) if !dir.is_absolute() => {
            let (value, allowed) = (format!("`{}`", dir.display()), "an absolute path".to_owned());
            Err(ConfigError::Field { field, value, allowed })
        }
        dir => Ok(dir),
    }
}

fn spill_role(file: &FileSource, state_dir: Option<&Path>) -> Result<Option<SpillRole>, ConfigError> {
    let budget = file.spill_budget.map_or(DEFAULT_SPILL, |size| size.0);
    let beside = || state_dir.map(|dir| std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned()).join("spill"));
    let dir = file.spill.clone().or_else(beside);
    let Some(dir) = dir.filter(|_| budget > 0) else { return Ok(None) };
    let segment =
        within("source.spill_segment", file.spill_segment.map_or(DEFAULT_SPILL_SEGMENT, |s| s.0), 4 * MIB, 1024 * MIB)?;
    if !segment.is_multiple_of(4096) {
        let (value, allowed) = (segment.to_string(), "a multiple of 4096".to_owned());
        return Err(ConfigError::Field { field: "source.spill_segment", value, allowed });
    }
    let budget = within("source.spill_budget", budget, 2 * segment, u64::MAX)?;
    if !dir.is_absolute() {
        let (value, allowed) = (format!("`{}`", dir.display()), "an absolute path".to_owned());
        return Err(ConfigError::Field { field: "source.spill", value, allowed });
    }
    let reserve = file.spill_reserve.map_or(DEFAULT_SPILL_RESERVE, |size| size.0);
    Ok(Some(SpillRole { dir, budget, segment, reserve }))
}

/// A folder for sockets of disks: there must be room for a name behind it.
fn socket_folder(field: &'static str, dir: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
    // `sun_path` holds 108 bytes with its final zero: a slash, one letter, `.sock`.
    const MAX: usize = 107 - 7;
    match dir {
        Some(dir) if !dir.is_absolute() || dir.as_os_str().len() > MAX => {
            let allowed = format!("an absolute path of at most {MAX} bytes");
            Err(ConfigError::Field { field, value: format!("`{}`", dir.display()), allowed })
        }
        dir => Ok(dir),
    }
}

fn source_role(file: FileSource, args: &Args, state_dir: Option<&Path>) -> Result<Option<SourceRole>, ConfigError> {
    let spill = spill_role(&file, state_dir);
    let nbd = if args.nbd.is_empty() { file.nbd.unwrap_or_default() } else { args.nbd.clone() };
    let vhost_user = socket_folder("source.vhost_user", args.vhost_user.clone().or(file.vhost_user))?;
    let ublk = args.ublk.or(file.ublk).unwrap_or_default();
    if nbd.is_empty() && vhost_user.is_none() && !ublk.is_some() {
        return Ok(None);
    }
    let memory = args.memory.or(file.memory).unwrap_or(Size(DEFAULT_POOL)).0;
    within("source.memory", memory, MIN_POOL, MAX_POOL)?;
    let queue = file.queue.map_or(memory / 2, |size| size.0);
    within("source.queue", queue, MIN_POOL / 4, memory / 2)?;
    let seal_threads = args.seal_threads.or(file.seal_threads).unwrap_or_else(default_seal_threads);
    within("source.seal_threads", seal_threads as u64, 0, MAX_SEAL_THREADS as u64)?;
    let max_wait_ms = within("source.max_wait_ms", file.max_wait_ms.unwrap_or(DEFAULT_MAX_WAIT_MS), 0, 10_000)?;
    let sync_rate = match file.sync_rate {
        Some(Size(0)) | None => 0,
        Some(size) => within("source.sync_rate", size.0, MIN_SYNC_RATE, u64::MAX)?,
    };
    Ok(Some(SourceRole {
        nbd,
        vhost_user,
        ublk,
        memory,
        queue,
        seal_threads,
        max_wait_ms,
        sync_rate,
        trust_reboot: file.trust_reboot.unwrap_or(false),
        witness: absolute("source.witness", file.witness.clone())?,
        spill: spill?,
    }))
}

fn target_role(file: FileTarget, args: &Args) -> Result<Option<TargetRole>, ConfigError> {
    let Some(journal) = args.journal.clone().or(file.journal) else { return Ok(None) };
    let listen = args
        .listen
        .or(file.listen)
        .ok_or(ConfigError::Missing { field: "target.listen", why: "streams of sources arrive there" })?;
    let advertise = args.advertise.clone().or(file.advertise);
    match &advertise {
        Some(address) => host_port("target.advertise", address)?,
        None if listen.ip().is_unspecified() => {
            return Err(ConfigError::Missing {
                field: "target.advertise",
                why: "target.listen takes any address, so sources must be told one that leads here",
            });
        }
        None => {}
    }
    let memory = args.memory.or(file.memory).unwrap_or(Size(DEFAULT_POOL)).0;
    within("target.memory", memory, MIN_POOL, MAX_POOL)?;
    let segment = within("target.segment", file.segment.map_or(DEFAULT_SEGMENT, |s| s.0), 5 * MIB, 1024 * MIB)?;
    let reserve = within("target.reserve", file.reserve.map_or(DEFAULT_RESERVE, |s| s.0), 0, u64::MAX / 2)?;
    let scrub_hours = within("target.scrub_hours", file.scrub_hours.unwrap_or(DEFAULT_SCRUB_HOURS), 0, 24 * 366)?;
    let scrub_rate = within("target.scrub_rate", file.scrub_rate.map_or(DEFAULT_SCRUB_RATE, |s| s.0), MIB, 1 << 40)?;
    let budget = match file.budget {
        Some(size) => Some(within("target.budget", size.0, 4 * segment, u64::MAX)?),
        None => None,
    };
    let vhost_user = socket_folder("target.vhost_user", args.view_vhost_user.clone().or(file.vhost_user))?;
    let views = if args.views.is_empty() { file.views.unwrap_or_default() } else { args.views.clone() };
    Ok(Some(TargetRole {
        journal,
        listen,
        advertise,
        views,
        vhost_user,
        ublk: args.view_ublk.or(file.ublk).unwrap_or_default(),
        memory,
        budget,
        segment,
        reserve,
        scrub_hours,
        scrub_rate,
    }))
}

#[path = "examples.rs"]
mod examples;

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
