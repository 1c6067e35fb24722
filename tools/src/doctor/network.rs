//! Addresses: those that are to be listened on, those that are to be reached, and the coordinator with its clock.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use afterimage_controlplane::grpc::auth::TIME_HEADER;
use serde_json::json;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::Check;
use crate::operator::session::endpoint;
use crate::operator::values::{millis, show_duration};
use crate::proxy::config;

/// Longest wait for one address.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Clocks that differ by more make times of points and of certificates mean different things.
const APART: Duration = Duration::from_secs(1);

/// An address to listen on.
#[derive(Debug)]
pub struct Listen {
    field: &'static str,
    at: At,
}

#[derive(Debug)]
enum At {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Listen {
    /// A TCP address, and the setting that it stands in.
    pub fn tcp(field: &'static str, address: SocketAddr) -> Self {
        Self { field, at: At::Tcp(address) }
    }

    /// An address of NBD.
    pub fn nbd(field: &'static str, at: &config::Listen) -> Self {
        let at = match at {
            config::Listen::Tcp(address) => At::Tcp(*address),
            config::Listen::Unix(path) => At::Unix(path.clone()),
        };
        Self { field, at }
    }
}

/// Whether it can be listened on. What listens there already is likely the role itself, running.
pub fn can_listen(listen: &Listen) -> Check {
    let taken = "fine if that is this role, running; or else choose another address, or stop what listens there";
    let (shown, tried) = match &listen.at {
        At::Tcp(address) => (address.to_string(), TcpListener::bind(address).map(drop)),
        At::Unix(path) => (path.display().to_string(), try_unix(path)),
    };
    let name = "can listen";
    match tried {
        Ok(()) => Check::ok(name, listen.field).of(shown),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Check::warn(name, format!("{}: something listens there already", listen.field), taken).of(shown)
        }
        Err(error) => {
            let remedy =
                "an address of this host, a port from 1024 up (or CAP_NET_BIND_SERVICE), a folder that is there";
            Check::fail(name, format!("{}: {error}", listen.field), remedy).of(shown)
        }
    }
}

/// Beside the path, so that no socket in use is touched.
fn try_unix(path: &std::path::Path) -> std::io::Result<()> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(std::io::ErrorKind::AddrInUse.into());
    }
    let folder = path.parent().unwrap_or(std::path::Path::new("/"));
    if !folder.is_dir() && folder.starts_with("/run") && folder.parent().is_some_and(std::path::Path::is_dir) {
        // A folder under /run is made by the service's unit.
        return Ok(());
    }
    let beside = folder.join(format!(".doctor-{}", std::process::id()));
    let made = UnixListener::bind(&beside).map(drop);
    let _ = std::fs::remove_file(&beside);
    made
}

/// Whether something accepts there, and how long that took.
pub async fn can_connect(address: &str, what: &str, limit: Duration) -> Check {
    let (name, begun) = ("can connect", Instant::now());
    let remedy = "see that it runs, that the address is right, and that no firewall on the way forbids it";
    match tokio::time::timeout(limit, tokio::net::TcpStream::connect(address)).await {
        Ok(Ok(_)) => {
            let took = begun.elapsed().as_nanos() as u64;
            let check = Check::ok(name, format!("{what} accepts, after {}", show_duration(took))).of(address);
            Check { measured: json!({"connect_ms": millis(took)}), ..check }
        }
        Ok(Err(error)) => Check::fail(name, format!("{what}: {error}"), remedy).of(address),
        Err(_) => Check::fail(name, format!("{what}: no answer within {limit:?}"), remedy).of(address),
    }
}

/// `host:port` of a URL.
pub fn host_port_of(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest).to_owned()
}

/// Calls the coordinator with the certificate: it is ours, it serves, and its clock is near.
pub async fn coordinator(mut bundle: Bundle, at: Option<&str>, limit: Duration, checks: &mut Vec<Check>) {
    if let Some(address) = at {
        bundle.endpoint = endpoint(address);
    }
    let shown = bundle.endpoint.trim_start_matches("https://").to_owned();
    let remedy = "see that it runs, that the address is right, and that this certificate is of that coordinator";
    let asked = async {
        let channel = client::connect(&bundle).await.map_err(|error| error.to_string())?;
        let mut health = HealthClient::new(channel);
        // The first call also makes the connection: the clock is read by one that only asks.
        let mut answered = None;
        for _ in 0..2 {
            let (before, begun) = (SystemTime::now(), Instant::now());
            let answer = health.check(HealthCheckRequest::default()).await.map_err(|s| s.message().to_owned())?;
            answered = Some((answer, before, begun.elapsed()));
        }
        answered.ok_or_else(|| "it was not asked".to_owned())
    };
    let (answer, before, took) = match tokio::time::timeout(limit, asked).await {
        Ok(Ok(answered)) => answered,
        Ok(Err(error)) => {
            checks.push(Check::fail("coordinator", error, remedy).of(shown));
            return;
        }
        Err(_) => {
            checks.push(Check::fail("coordinator", format!("no answer within {limit:?}"), remedy).of(shown));
            return;
        }
    };
    let took_ns = took.as_nanos() as u64;
    let ok = Check::ok("coordinator", format!("it knows us, and answers after {}", show_duration(took_ns)));
    checks.push(Check { measured: json!({"answer_ms": millis(took_ns)}), ..ok.of(&shown) });
    let time = answer.metadata().get(TIME_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    checks.push(match time {
        Some(theirs) => clocks(theirs, before, took).of(shown),
        None => Check::warn("clock offset", "the coordinator does not say its time", "upgrade it").of(shown),
    });
}

/// Its time lies within the call; that it was in the middle is wrong by half of the call at most.
fn clocks(theirs: u64, before: SystemTime, took: Duration) -> Check {
    let middle = before + took / 2;
    let ours = middle.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128);
    let offset = ours - i128::from(theirs);
    let (apart, bound) = (u64::try_from(offset.unsigned_abs()).unwrap_or(u64::MAX), took.as_nanos() as u64 / 2);
    let side = if offset < 0 { "behind" } else { "ahead of" };
    let found = format!("{} {side} the coordinator's, within {}", show_duration(apart), show_duration(bound));
    let name = "clock offset";
    let check = if apart > APART.as_nanos() as u64 + bound {
        let remedy = "have both clocks kept (chrony, ntpd): certificates and times of restore points depend on them";
        Check::warn(name, found, remedy)
    } else {
        Check::ok(name, found)
    };
    let signed = millis(apart) * if offset < 0 { -1.0 } else { 1.0 };
    Check { measured: json!({"offset_ms": signed, "within_ms": millis(bound)}), ..check }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn an_address_in_use_is_a_warning_and_a_foreign_one_a_failure() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        assert_eq!(can_listen(&Listen::tcp("listen", address)).state, State::Warn);
        drop(taken);
        assert_eq!(can_listen(&Listen::tcp("listen", address)).state, State::Ok);
        // TEST-NET-1: no host has it.
        assert_eq!(can_listen(&Listen::tcp("listen", "192.0.2.1:7700".parse().unwrap())).state, State::Fail);
    }

    #[test]
    fn a_socket_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let at = || Listen::nbd("source.nbd", &config::Listen::Unix(path.clone()));
        assert_eq!(can_listen(&at()).state, State::Ok);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(can_listen(&at()).state, State::Warn);
        drop(listener);
        assert!(path.exists(), "the file is its owner's");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let nowhere = config::Listen::Unix("/proc/none/nbd.sock".into());
        assert_eq!(can_listen(&Listen::nbd("source.nbd", &nowhere)).state, State::Fail);
    }

    #[test]
    fn clocks_that_are_apart_are_a_warning_with_the_side() {
        let before = UNIX_EPOCH + Duration::from_secs(100);
        let at = |theirs_ms: u64| clocks(theirs_ms * 1_000_000, before, Duration::from_millis(10));
        assert_eq!(at(100_005).state, State::Ok);
        let late = at(103_005);
        assert!(late.state == State::Warn && late.found.contains("3 s behind"), "{late:?}");
        assert_eq!(late.measured["offset_ms"], -3000.0);
        assert!(at(90_005).found.contains("ahead of"));
    }

    #[test]
    fn addresses_are_cut_out_of_urls() {
        assert_eq!(host_port_of("https://etcd-1:2379/x"), "etcd-1:2379");
        assert_eq!(host_port_of("etcd-1:2379"), "etcd-1:2379");
    }
}
