//! `afterimage doctor`: is this host fit for its role, and if not, what to do. Each check looks at one thing, says what it
//! found, and changes nothing; what it writes to a folder is a file without a name, which is gone with the process.
//!
//! ```text
//! host      kernel, io_uring, ublk, nbd, limits, clock        disk      speed and room of a folder
//! network   can listen, can connect, the coordinator's clock  identity  certificates and keys
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::coordinator;
use crate::operator::failure::{Failure, Kind};
use crate::operator::output::{Mood, state, table, text};
use crate::operator::session::Common;
use crate::operator::values::duration_ns;
use crate::proxy;

mod disk;
mod host;
mod identity;
mod network;

/// Where the configuration of a proxy is looked for.
pub const PROXY_FILE: &str = "/etc/afterimage/proxy.toml";
/// Where that of a coordinator is looked for.
pub const COORDINATOR_FILE: &str = "/etc/afterimage/coordinator.toml";

/// Longest probe of a folder, ns.
const MAX_PROBE: u64 = 60_000_000_000;

/// Options of `afterimage doctor`.
#[derive(Args, Debug)]
pub struct Doctor {
    /// What this host is to be.
    #[arg(value_enum, default_value_t = Role::Host)]
    role: Role,
    /// Its configuration file [default: /etc/afterimage/proxy.toml or coordinator.toml].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A folder whose disk is measured, beside those of the configuration; may be given many times.
    #[arg(long, value_name = "FOLDER")]
    folder: Vec<PathBuf>,
    /// An address that must be reached from here, such as a target's; may be given many times.
    #[arg(long, value_name = "HOST:PORT")]
    connect: Vec<String>,
    /// How long each folder is measured, up to 1m; 0s for not at all.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = duration_ns)]
    probe: u64,
}

/// What a host is.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Any: the host itself, and the operator's identity if there is one.
    Host,
    /// A proxy.
    Proxy,
    /// A coordinator.
    Coordinator,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Ok,
    /// It works, but slower, for a while, or not for everything.
    Warn,
    /// It does not work.
    Fail,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "fail",
        }
    }

    fn mood(self) -> Mood {
        match self {
            State::Ok => Mood::Good,
            State::Warn => Mood::Care,
            State::Fail => Mood::Bad,
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
pub struct Check {
    /// What, in a few words; the same on every host.
    pub name: &'static str,
    /// Which one of several: a file, an address; empty where there is one.
    pub of: String,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do; empty where it is ok.
    pub remedy: String,
    /// Numbers, for programs; null where there are none.
    pub measured: Value,
}

impl Check {
    /// All is well.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, State::Ok, found, "")
    }

    /// Less than good.
    pub fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(name, State::Warn, found, remedy)
    }

    /// Bad.
    pub fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(name, State::Fail, found, remedy)
    }

    fn new(name: &'static str, state: State, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (found, remedy) = (found.into(), remedy.into());
        Self { name, of: String::new(), state, found, remedy, measured: Value::Null }
    }

    /// Which one of several.
    pub fn of(mut self, which: impl std::fmt::Display) -> Self {
        self.of = which.to_string();
        self
    }

    fn to_json(&self) -> Value {
        json!({
            "check": self.name,
            "of": if self.of.is_empty() { Value::Null } else { self.of.clone().into() },
            "state": self.state.word(),
            "found": self.found,
            "remedy": if self.remedy.is_empty() { Value::Null } else { self.remedy.clone().into() },
            "measured": self.measured,
        })
    }
}

/// What a role needs of its host, out of its configuration.
#[derive(Debug, Default)]
struct Needs {
    /// Bytes of buffers that are pinned.
    pinned: u64,
    /// Devices of ublk, under which setting.
    ublk: Option<&'static str>,
    /// Addresses to listen on: TCP as `host:port`, or a path.
    listen: Vec<network::Listen>,
    /// Addresses to reach, and what is there.
    connect: Vec<(String, &'static str)>,
    /// Folders that data is written to, and the bytes that have to be free there.
    folders: Vec<(PathBuf, u64)>,
    /// Where the certificate is, and whose.
    bundle: Option<(PathBuf, Option<String>)>,
    /// Folder of a coordinator's authority.
    authority: Option<PathBuf>,
    /// The coordinator, if it is not where the bundle says.
    coordinator: Option<String>,
}

/// Looks, and says what it found.
///
/// # Errors
/// Something that has to work does not: exit code 1.
pub async fn run(args: Doctor, common: &Common) -> Result<(), Failure> {
    if args.probe > MAX_PROBE {
        return Err(Failure::usage("--probe: allowed is up to 1m"));
    }
    let mut checks = Vec::new();
    let mut needs = match args.role {
        Role::Host => Needs::default(),
        Role::Proxy => of_proxy(args.config.as_deref().unwrap_or(Path::new(PROXY_FILE)), &mut checks),
        Role::Coordinator => of_coordinator(args.config.as_deref().unwrap_or(Path::new(COORDINATOR_FILE)), &mut checks),
    };
    needs.folders.extend(args.folder.into_iter().map(|folder| (folder, 0)));
    needs.connect.extend(args.connect.into_iter().map(|address| (address, "--connect")));
    if args.role == Role::Host {
        // One that was named has to be there; the usual one need not.
        let path = common.identity_file().ok().filter(|path| common.identity.is_some() || path.exists());
        needs.bundle = path.map(|path| (path, None));
    }
    needs.coordinator = common.coordinator.clone().or(needs.coordinator);

    host::kernel(args.role == Role::Coordinator, &needs, &mut checks);
    host::limits(&needs, &mut checks);
    host::clock(&mut checks);
    for listen in &needs.listen {
        checks.push(network::can_listen(listen));
    }
    let limit = Duration::from_nanos(common.timeout).min(network::PATIENCE);
    for (address, what) in &needs.connect {
        checks.push(network::can_connect(address, what, limit).await);
    }
    if let Some((path, name)) = &needs.bundle {
        let bundle = identity::of_caller(path, name.as_deref(), args.role == Role::Proxy, &mut checks);
        if let Some(bundle) = bundle {
            network::coordinator(bundle, needs.coordinator.as_deref(), limit, &mut checks).await;
        }
    }
    if let Some(dir) = &needs.authority {
        identity::of_authority(dir, &mut checks);
    }
    for (folder, reserve) in &needs.folders {
        disk::folder(folder, *reserve, Duration::from_nanos(args.probe), &mut checks);
    }
    report(&checks, common)
}

fn report(checks: &[Check], common: &Common) -> Result<(), Failure> {
    let count = |of: State| checks.iter().filter(|check| check.state == of).count();
    let (failed, warned) = (count(State::Fail), count(State::Warn));
    let document = json!({
        "ok": failed == 0,
        "failed": failed,
        "warnings": warned,
        "checks": checks.iter().map(Check::to_json).collect::<Vec<_>>(),
    });
    common.output().show(&document, || shown(checks));
    if failed > 0 {
        let what = if failed == 1 { "one check failed".to_owned() } else { format!("{failed} checks failed") };
        return Err(Failure::new(Kind::Failed, "", what).hint("see what stands under each of them above"));
    }
    Ok(())
}

fn shown(checks: &[Check]) -> String {
    table(
        &["STATE", "CHECK", "FOUND"],
        checks.iter().map(|check| {
            let mut found = if check.of.is_empty() { String::new() } else { format!("{}: ", check.of) };
            found += &check.found;
            if !check.remedy.is_empty() {
                found += &format!("\nto do: {}", check.remedy);
            }
            vec![state(check.state.word(), check.state.mood()), text(check.name), text(found)]
        }),
    )
}

/// What a proxy needs, by its configuration; one that is wrong is a check that failed.
fn of_proxy(path: &Path, checks: &mut Vec<Check>) -> Needs {
    let args = proxy::Args { config: Some(path.to_owned()), ..Default::default() };
    let config = match proxy::config::Config::load(&args) {
        Ok(config) => config,
        Err(error) => {
            checks.push(unread("proxy", path, &error.to_string()));
            return Needs::default();
        }
    };
    let mut needs = Needs::default();
    if let Some(dir) = &config.state_dir {
        needs.bundle = Some((dir.join(proxy::BUNDLE_FILE), Some(config.name.clone())));
        needs.connect.extend(proxy::known_targets(dir).into_iter().map(|address| (address, "a target")));
    }
    if let proxy::config::Control::Coordinator { address, .. } = &config.control {
        needs.coordinator = Some(address.clone());
        needs.connect.extend(address.split(',').map(|one| (one.trim().to_owned(), "the coordinator")));
    }
    let mut roles = Vec::new();
    if let Some(source) = &config.source {
        roles.push("source");
        needs.pinned += source.memory;
        needs.listen.extend(source.nbd.iter().map(|at| network::Listen::nbd("source.nbd", at)));
        needs.ublk = source.ublk.is_some().then_some("source.ublk");
        if let Some(spill) = &source.spill {
            needs.folders.push((spill.dir.clone(), spill.reserve));
        }
    }
    if let Some(target) = &config.target {
        roles.push("target");
        needs.pinned += target.memory;
        needs.listen.push(network::Listen::tcp("target.listen", target.listen));
        needs.listen.extend(target.views.iter().map(|at| network::Listen::nbd("target.views", at)));
        needs.ublk = needs.ublk.or_else(|| target.ublk.is_some().then_some("target.ublk"));
        needs.folders.push((target.journal.clone(), target.reserve));
    }
    checks
        .push(Check::ok("configuration", format!("proxy {}, {}", config.name, roles.join(" and "))).of(path.display()));
    needs
}

fn of_coordinator(path: &Path, checks: &mut Vec<Check>) -> Needs {
    let facts = match coordinator::inspect(path) {
        Ok(facts) => facts,
        Err(error) => {
            checks.push(unread("coordinator", path, &error.message));
            return Needs::default();
        }
    };
    let what = if facts.etcd.is_empty() { "a coordinator by itself" } else { "one of several coordinators" };
    checks.push(Check::ok("configuration", what).of(path.display()));
    let mut listen: Vec<_> = facts.listen.iter().map(|at| network::Listen::tcp("listen", *at)).collect();
    listen.extend(facts.metrics.map(|at| network::Listen::tcp("metrics", at)));
    let connect = facts.etcd.iter().map(|url| (network::host_port_of(url), "etcd")).collect();
    let admin = facts.data_dir.join("admin.json");
    Needs {
        listen,
        connect,
        bundle: admin.exists().then_some((admin, None)),
        authority: Some(facts.data_dir.clone()),
        folders: vec![(facts.data_dir, coordinator::ROOM)],
        ..Needs::default()
    }
}

fn unread(role: &str, path: &Path, error: &str) -> Check {
    let remedy = if path.exists() {
        format!("mend it; `afterimage {role} --help` shows what may stand in it")
    } else {
        "name it with --config FILE".to_owned()
    };
    let prefix = format!("{}: ", path.display());
    Check::fail("configuration", error.trim_start_matches(&prefix), remedy).of(path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_fits_100_columns_and_says_what_to_do() {
        let long = "x".repeat(150);
        let checks =
            [Check::ok("kernel", "Linux"), Check::fail("disk speed", long.clone(), long.clone()).of("/srv/journal")];
        let shown = shown(&checks);
        assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
        assert!(shown.contains("to do:") && shown.contains("fail"), "{shown}");
    }

    #[test]
    fn a_configuration_that_is_wrong_is_a_check_that_failed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("proxy.toml");
        std::fs::write(&file, "name = 'x'\nstate_dir = '/s'\n[coordinator]\naddress = 'nowhere'\n").unwrap();
        let mut checks = Vec::new();
        of_proxy(&file, &mut checks);
        assert_eq!(checks[0].state, State::Fail);
        assert!(checks[0].found.contains("coordinator.address"), "{checks:?}");
        of_coordinator(&dir.path().join("none.toml"), &mut checks);
        assert!(checks[1].remedy.contains("--config"), "{checks:?}");
    }

    #[test]
    fn a_configuration_says_what_its_role_needs() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("proxy.toml");
        let text = "name = 'x'\nstate_dir = '/s'\n[coordinator]\naddress = 'c:7700'\n[source]\nublk = true\n\
                    nbd = ['unix:/run/a.sock']\n[target]\njournal = '/j'\nlisten = '127.0.0.1:1'\n";
        std::fs::write(&file, text).unwrap();
        let needs = of_proxy(&file, &mut Vec::new());
        assert_eq!((needs.pinned, needs.ublk), (512 << 20, Some("source.ublk")));
        assert_eq!((needs.listen.len(), needs.folders.len()), (2, 2));
        assert_eq!(needs.connect, [("c:7700".to_owned(), "the coordinator")]);
    }
}
