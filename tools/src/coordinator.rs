//! `afterimage coordinator`: the role that holds the desired state, the certificate authority and the operations. It
//! reads its settings, opens its state, says how others join, and serves until it is told to stop.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use afterimage_controlplane::grpc::member::start_member;
use afterimage_controlplane::grpc::rate::{DEFAULT_BURST, DEFAULT_RATE, Rate};
use afterimage_controlplane::grpc::{Config, ServeError, start};
use afterimage_controlplane::hooks::{self, HookConfig};
use afterimage_controlplane::store::etcd::Etcd;
use afterimage_controlplane::wrapping::KeysConfig;
use clap::ValueEnum;
use serde::Deserialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::operator::failure::{Failure, Kind};
use crate::operator::output::{Output, fields};
use crate::operator::values::duration_ns;

mod backup;
mod shared;

use shared::EtcdArgs;

/// Port of the coordinator, where none is given.
pub const PORT: u16 = 7700;

/// Folder of the state, where none is given.
pub const DATA_DIR: &str = "/var/lib/afterimage/coordinator";

/// Options of `afterimage coordinator`. A flag wins over the file.
#[derive(clap::Args, Debug, Default)]
#[command(after_help = "\
Examples:
  afterimage coordinator                                        everything at its default
  afterimage coordinator --listen 10.0.0.5:7700 --data-dir /srv/coordinator
  afterimage coordinator --advertise coordinator.example:443    behind a gateway
  afterimage coordinator --etcd http://10.0.0.1:2379 --advertise 10.0.0.1:7700,10.0.0.2:7700
  afterimage coordinator move --etcd http://10.0.0.1:2379       a single one's state into an etcd
  afterimage coordinator backup /srv/backup/state               every night
  afterimage coordinator restore /srv/backup/state              then start it, and `confirm`

With --etcd for each member of an etcd, several coordinators share their state; --advertise names them all. Beside the
backups belong, once, DIR/ca.pem and DIR/keys.bin.

The first start makes a certificate authority and an identity for an admin, DIR/admin.json. With it:
  export AFTERIMAGE_IDENTITY=DIR/admin.json
  afterimage token create src --role proxy
  afterimage token create anna --role operator

It stands at the target or at a third site, never only at the source. Replication goes on without it.
Of several that share an etcd one leads; the others lead every caller to it. They share DIR/ca.pem and DIR/keys.bin.
SIGTERM and SIGINT stop it cleanly; AFTERIMAGE_LOG sets what is logged (info, debug, …).")]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Configuration file (TOML) with listen, advertise, data_dir, metrics, certificate_lifetime, call_rate,
    /// call_burst, etcd, keys, log, hook.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on; port 0 takes one that is free; may be given many times [default: 0.0.0.0:7700].
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// Where proxies and operators reach it, as written into tokens [default: the address listened on].
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Folder for the state, the CA and the admin's identity [default: /var/lib/afterimage/coordinator].
    #[arg(long, alias = "state", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Numbers for Prometheus: GET /metrics over plain HTTP, open to whoever reaches this address [default: none].
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// How long certificates last that are issued from now on, from 10s to 3650d; proxies and commands renew them by
    /// themselves when two thirds of that are over [default: 365d].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    certificate_lifetime: Option<u64>,
    /// Calls a second that each identity has; 0: no limit [default: 200].
    #[arg(long, value_name = "NUMBER")]
    call_rate: Option<u32>,
    /// Calls at once that each identity has [default: 1000].
    #[arg(long, value_name = "NUMBER")]
    call_burst: Option<u32>,
    /// How the log is written, to standard error [default: text].
    #[arg(long, value_name = "FORMAT")]
    log: Option<LogFormat>,
    /// Say as one line of JSON when it is ready.
    #[arg(long)]
    json: bool,
}

/// What is done instead of serving.
#[derive(clap::Subcommand, Debug)]
enum Action {
    /// Move the embedded state into an etcd that several coordinators share, while no coordinator runs.
    Move {
        /// Folder of the state [default: /var/lib/afterimage/coordinator].
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        #[command(flatten)]
        etcd: EtcdArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write the state into a file: of a coordinator that runs, or (--data-dir) of one that does not.
    Backup(backup::Backup),
    /// Begin from a backup, in a folder or etcd that holds no state: it then only observes, until `confirm`.
    Restore(backup::Restore),
    /// Show what a restored coordinator has found at its proxies, and let it go on.
    Confirm(backup::Confirm),
}

/// How a log is written.
#[derive(ValueEnum, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON document for each line.
    Json,
}

/// The configuration file. A field that is not known is refused, not passed over.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    listen: Vec<SocketAddr>,
    advertise: Option<String>,
    data_dir: Option<PathBuf>,
    metrics: Option<SocketAddr>,
    certificate_lifetime: Option<String>,
    call_rate: Option<u32>,
    call_burst: Option<u32>,
    log: Option<LogFormat>,
    #[serde(default)]
    etcd: EtcdArgs,
    #[serde(default)]
    keys: KeysConfig,
    #[serde(default)]
    hook: Vec<HookConfig>,
}

/// What it runs with.
#[derive(Debug)]
struct Settings {
    etcd: Option<Etcd>,
    reach: Option<String>,
    listen: Vec<SocketAddr>,
    /// `host:port`; the first address listened on where none was given.
    advertise: Option<String>,
    data_dir: PathBuf,
    metrics: Option<SocketAddr>,
    certificate_lifetime: Option<Duration>,
    calls: Rate,
    log: LogFormat,
    keys: KeysConfig,
    hooks: Vec<HookConfig>,
}

impl Settings {
    fn load(args: &Args) -> Result<Self, Failure> {
        let file = match &args.config {
            None => File::default(),
            Some(path) => read(path)?,
        };
        Self::merge(file, args)
    }

    fn merge(file: File, args: &Args) -> Result<Self, Failure> {
        let given = if args.listen.is_empty() { file.listen } else { args.listen.clone() };
        let etcd = args.etcd.clone().or(file.etcd);
        let lifetime = match (args.certificate_lifetime, &file.certificate_lifetime) {
            (Some(given), _) => Some(given),
            (None, Some(text)) => {
                Some(duration_ns(text).map_err(|e| Failure::usage(format!("certificate_lifetime is {text:?}: {e}")))?)
            }
            (None, None) => None,
        };
        let settings = Settings {
            etcd: etcd.etcd()?,
            reach: etcd.reach(),
            listen: if given.is_empty() { vec![SocketAddr::from(([0, 0, 0, 0], PORT))] } else { given },
            advertise: args.advertise.clone().or(file.advertise),
            data_dir: args.data_dir.clone().or(file.data_dir).unwrap_or_else(|| PathBuf::from(DATA_DIR)),
            metrics: args.metrics.or(file.metrics),
            certificate_lifetime: lifetime.map(Duration::from_nanos),
            calls: Rate {
                per_s: args.call_rate.or(file.call_rate).unwrap_or(DEFAULT_RATE),
                burst: args.call_burst.or(file.call_burst).unwrap_or(DEFAULT_BURST),
            },
            log: args.log.or(file.log).unwrap_or_default(),
            keys: file.keys,
            hooks: file.hook,
        };
        // Also of one that does not lead yet.
        hooks::check(&settings.hooks).map_err(Failure::usage)?;
        settings.calls.check().map_err(Failure::usage)?;
        settings.keys.check().map_err(Failure::usage)?;
        if let Some(address) = &settings.advertise {
            check_advertised(address)?;
        }
        Ok(settings)
    }
}

/// Room that the state, the history and the audit log of a coordinator may come to take, bytes.
pub const ROOM: u64 = 2 << 30;

/// What a configuration file says about the host that it is for.
#[derive(Debug)]
pub struct Facts {
    /// Addresses listened on.
    pub listen: Vec<SocketAddr>,
    /// Where numbers for Prometheus are given.
    pub metrics: Option<SocketAddr>,
    /// Folder of the state.
    pub data_dir: PathBuf,
    /// URLs of the members of etcd; none for a coordinator by itself.
    pub etcd: Vec<String>,
}

/// Reads and checks a configuration file, as a start does.
///
/// # Errors
/// What a start would end with: the field, its value, and what is allowed.
pub fn inspect(config: &Path) -> Result<Facts, Failure> {
    let settings = Settings::load(&Args { config: Some(config.to_owned()), ..Args::default() })?;
    Ok(Facts {
        listen: settings.listen,
        metrics: settings.metrics,
        data_dir: settings.data_dir,
        etcd: settings.etcd.map(|etcd| etcd.members).unwrap_or_default(),
    })
}

/// Checks a text as a start with a file of it would.
///
/// # Errors
/// As [`inspect`].
pub fn check_text(text: &str) -> Result<(), Failure> {
    let file = toml::from_str(text).map_err(|error| Failure::usage(error.to_string().trim_end()))?;
    Settings::merge(file, &Args::default()).map(drop)
}

/// What a text would set, all of it, to be compared.
#[cfg(test)]
pub fn shown_settings(text: &str) -> Result<String, Failure> {
    let file = toml::from_str(text).map_err(|error| Failure::usage(error.to_string().trim_end()))?;
    Ok(format!("{:?}", Settings::merge(file, &Args::default())?))
}

fn read(path: &Path) -> Result<File, Failure> {
    let object = format!("configuration {}", path.display());
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::new(Kind::Usage, &object, format!("cannot be read: {error}")))?;
    // The message of the parser names the line, the field and what is allowed.
    toml::from_str(&text).map_err(|error| Failure::new(Kind::Usage, object, error.to_string().trim_end()))
}

/// An address that is written into every token is worth a look before the first one is given out.
fn check_advertised(address: &str) -> Result<(), Failure> {
    let port = |one: &str| one.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, p)| p.parse().ok());
    if address.split(',').all(|one| matches!(port(one), Some(1u16..))) {
        return Ok(());
    }
    let allowed = "HOST:PORT, with a port from 1 to 65535; or several with commas";
    Err(Failure::usage(format!("advertise is \"{address}\"; allowed: {allowed}")))
}

/// Runs the coordinator until it is told to stop.
pub fn run(args: Args) -> ExitCode {
    let json = args.json
        || match &args.action {
            None => false,
            Some(Action::Move { json, .. }) => *json,
            Some(Action::Backup(backup)) => backup.common.json,
            Some(Action::Restore(restore)) => restore.json,
            Some(Action::Confirm(confirm)) => confirm.common.json,
        };
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => crate::operator::report(&failure, json),
    }
}

fn serve(mut args: Args) -> Result<(), Failure> {
    match args.action.take() {
        None => {}
        Some(Action::Move { data_dir, etcd, json }) => {
            start_log(LogFormat::Text);
            let etcd = etcd.etcd()?.ok_or_else(|| Failure::usage("where to: --etcd URL, once for each member"))?;
            let dir = data_dir.unwrap_or_else(|| PathBuf::from(DATA_DIR));
            return runtime()?.block_on(shared::move_into(&etcd, &dir, Output { json, yes: false }));
        }
        Some(Action::Backup(args)) => return runtime()?.block_on(backup::backup(args)),
        Some(Action::Restore(args)) => return runtime()?.block_on(backup::restore(args)),
        Some(Action::Confirm(args)) => return runtime()?.block_on(backup::confirm(args)),
    }
    let settings = Settings::load(&args)?;
    start_log(settings.log);
    runtime()?.block_on(until_stopped(settings, Output { json: args.json, yes: false }))
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("coordinator")
        .build()
        .map_err(|error| Failure::new(Kind::Failed, "coordinator", format!("no runtime: {error}")))
}

async fn until_stopped(settings: Settings, out: Output) -> Result<(), Failure> {
    let failed = |message: String| Failure::new(Kind::Failed, "coordinator", message);
    // Caught from before the start on: a signal that comes early must not leave a half-made state.
    let stop = StopSignal::new().map_err(|error| failed(format!("signals cannot be caught: {error}")))?;
    let everywhere = settings.listen.iter().any(|address| address.ip().is_unspecified());
    let loopback = everywhere && settings.advertise.is_none();
    let config = Config {
        listen: settings.listen.clone(),
        advertise: settings.advertise,
        metrics: settings.metrics,
        hooks: settings.hooks,
        calls: settings.calls,
        keys: settings.keys,
        ..Config::new(settings.data_dir, settings.listen[0])
    };
    let config = match settings.certificate_lifetime {
        Some(certificate_lifetime) => Config { certificate_lifetime, ..config },
        None => config,
    };
    if let Some(etcd) = settings.etcd {
        let mut member = start_member(config, etcd, settings.reach).await.map_err(|error| refused(&error))?;
        ready(member.addresses(), member.endpoint(), member.admin_bundle(), settings.metrics, out, loopback);
        let signal = tokio::select! {
            signal = stop.wait() => signal,
            ended = member.failed() => return ended.map_err(|error| refused(&error)),
        };
        tracing::info!("{signal}: stopping; another coordinator takes over");
        member.stop().await;
        return Ok(());
    }
    let running = start(config).await.map_err(|error| refused(&error))?;
    ready(running.addresses(), running.endpoint(), running.admin_bundle(), running.metrics(), out, loopback);
    let signal = stop.wait().await;
    tracing::info!("{signal}: stopping; replication goes on without the coordinator");
    running.stop().await;
    Ok(())
}

/// Why it did not start: by a setting, or otherwise.
fn refused(error: &ServeError) -> Failure {
    let failure = |kind, hint: &str| Failure::new(kind, "coordinator", error.to_string()).hint(hint);
    match error {
        ServeError::Config(_) => failure(Kind::Usage, ""),
        ServeError::Listen { .. } => failure(Kind::Failed, "choose another --listen, or stop what listens there"),
        ServeError::Folder { .. } => failure(Kind::Failed, "choose another --data-dir, or make that one writable"),
        _ => failure(Kind::Failed, ""),
    }
}

/// Says that it is ready, and how others join.
fn ready(
    addresses: &[SocketAddr],
    endpoint: &str,
    admin: &Path,
    metrics: Option<SocketAddr>,
    out: Output,
    loopback: bool,
) {
    let listening: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let admin = admin.display().to_string();
    let document = serde_json::json!({
        "ready": true,
        "endpoint": endpoint,
        "listening": listening,
        "admin_identity": admin,
        "metrics": metrics.map(|a| format!("http://{a}/metrics")),
    });
    out.show(&document, || {
        let mut text = fields(&[
            ("coordinator", endpoint.to_owned()),
            ("listening on", listening.join(" ")),
            ("admin identity", admin.clone()),
        ]);
        text += "\nlet others join:\n";
        text += &format!("  export AFTERIMAGE_IDENTITY={admin}\n");
        text += "  afterimage token create NAME --role proxy\n";
        text += "  afterimage token create NAME --role operator\n";
        if loopback {
            text += "\nTokens say that it is on this host: for others give --advertise HOST:PORT, ";
            text += "or --coordinator where they join.\n";
        }
        text
    });
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("AFTERIMAGE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// SIGTERM or SIGINT, whichever comes first.
struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    fn new() -> std::io::Result<Self> {
        Ok(StopSignal { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, args: Args) -> Result<Settings, Failure> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        Settings::load(&Args { config: Some(file.path().to_owned()), ..args })
    }

    #[test]
    fn without_a_word_everything_has_its_default() {
        let settings = Settings::load(&Args::default()).unwrap();
        assert_eq!(settings.listen, ["0.0.0.0:7700".parse().unwrap()]);
        assert_eq!(settings.data_dir, Path::new(DATA_DIR));
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let args = Args { data_dir: Some("/flag".into()), ..Args::default() };
        let settings = load("data_dir = '/file'\nlisten = ['127.0.0.1:1']\nlog = 'json'\n", args).unwrap();
        assert_eq!(settings.data_dir, Path::new("/flag"));
        assert_eq!((settings.listen[0].port(), settings.log), (1, LogFormat::Json));
    }

    #[test]
    fn a_hook_that_cannot_work_is_refused_at_the_start() {
        let good = "[[hook]]\nname = 'pager'\ncommand = ['/bin/cat']\nseverity = 'error'\n";
        assert_eq!(load(good, Args::default()).unwrap().hooks.len(), 1);
        let refused = load("[[hook]]\nname = 'pager'\nurl = 'gopher://x/'\n", Args::default()).unwrap_err();
        assert!(refused.kind == Kind::Usage && refused.message.contains("\"pager\": url"), "{refused}");
        assert!(load("[[hook]]\nname = 'pager'\nurll = 'http://x/'\n", Args::default()).is_err());
    }

    #[test]
    fn calls_are_bounded_unless_told() {
        let calls = |text: &str| load(text, Args::default()).map(|settings| settings.calls);
        assert_eq!(calls("").unwrap(), Rate::default());
        assert_eq!(calls("call_rate = 7\ncall_burst = 9\n").unwrap(), Rate { per_s: 7, burst: 9 });
        assert!(calls("call_burst = 0\n").unwrap_err().message.contains("call_burst"));
    }

    #[test]
    fn what_wraps_keys_is_checked_at_the_start() {
        let refused = load("[keys]\nfile = '/nonexistent/key'\n", Args::default()).unwrap_err();
        assert!(refused.message.starts_with("keys.file: /nonexistent/key"), "{refused}");
        let kept = load("[keys]\ncommand = ['/bin/cat']\ntimeout_s = 5\n", Args::default()).unwrap();
        assert_eq!((kept.keys.command.len(), kept.keys.timeout_s), (1, 5));
        assert!(load("[keys]\nfil = 'x'\n", Args::default()).unwrap_err().message.contains("fil"));
    }

    #[test]
    fn a_misspelt_field_is_refused_by_name() {
        let refused = load("lisen = '127.0.0.1:1'\n", Args::default()).unwrap_err();
        assert_eq!(refused.kind, Kind::Usage);
        assert!(refused.message.contains("lisen") && refused.message.contains("listen"), "{refused}");
    }

    #[test]
    fn an_address_that_nobody_can_reach_is_refused_before_it_is_in_a_token() {
        for bad in ["", "host", "host:", ":7700", "host:0", "host:65536"] {
            assert!(load(&format!("advertise = '{bad}'\n"), Args::default()).is_err(), "{bad}");
        }
        assert!(load("advertise = '[2001:db8::1]:443'\n", Args::default()).is_ok());
    }

    #[test]
    fn a_file_that_is_not_there_is_refused_by_name() {
        let args = Args { config: Some("/nonexistent/c.toml".into()), ..Args::default() };
        assert!(Settings::load(&args).unwrap_err().to_string().contains("/nonexistent/c.toml"));
    }
}
