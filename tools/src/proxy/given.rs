//! Sockets that a service manager holds and passes on (systemd's `LISTEN_FDS`): they outlive the process, so that clients
//! wait in their queues while one process takes the place of another.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use afterimage_dataplane::io::inherited::inherited;
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::config::{Config, Listen};

/// Why the sockets that were passed on cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GivenError {
    /// A variable of the environment.
    #[error("`LISTEN_FDS={0}`: must be a number of sockets")]
    Count(String),
    /// A descriptor.
    #[error("the sockets that `LISTEN_FDS` announces cannot be taken: {0}")]
    Take(io::Error),
    /// Something else than is needed.
    #[error(
        "the socket `{0}` of the service manager is no stream socket that listens: its unit needs `ListenStream=` and `Accept=no`"
    )]
    NotListening(String),
    /// An address that nothing is configured for.
    #[error(
        "the socket `{name}` of the service manager listens on {at}, which is not in {wanted}: say so there, or take it out of the socket's unit"
    )]
    NoSetting {
        /// Its name.
        name: String,
        /// Its address.
        at: String,
        /// The fields in which it was looked for.
        wanted: String,
    },
    /// One address, several sockets or settings.
    #[error("the socket `{name}` of the service manager listens on {at}, which is there twice")]
    Twice {
        /// Its name.
        name: String,
        /// Its address.
        at: String,
    },
}

/// The fields that sockets can be for; a socket with one of these names is for that field alone.
const FIELDS: [&str; 3] = ["source.nbd", "target.views", "target.listen"];

struct Socket {
    name: String,
    at: Listen,
    socket: OwnedFd,
}

/// The sockets that were passed on.
#[derive(Default)]
pub struct Given(Vec<Socket>);

impl Given {
    /// Those of this process, each of which `config` has a use for.
    ///
    /// # Errors
    /// [`GivenError`].
    pub fn take(config: &Config) -> Result<Self, GivenError> {
        let names = announced(std::process::id(), |name| std::env::var(name).ok())?;
        let sockets = inherited(names.len()).map_err(GivenError::Take)?;
        Self::fitting(names.into_iter().zip(sockets), &settings(config))
    }

    fn fitting(
        sockets: impl Iterator<Item = (String, OwnedFd)>,
        settings: &[(&'static str, Listen)],
    ) -> Result<Self, GivenError> {
        let mut given = Self::default();
        for (name, socket) in sockets {
            let at = address(&socket).ok_or_else(|| GivenError::NotListening(name.clone()))?;
            let at = match at {
                Ok(at) => at,
                Err(at) => return Err(GivenError::NoSetting { name, at, wanted: FIELDS.join(", ") }),
            };
            let fits = settings.iter().filter(|(field, listen)| meant_for(&name, field) && same(listen, &at)).count();
            if fits == 0 {
                let wanted = FIELDS.iter().filter(|field| meant_for(&name, field)).copied().collect::<Vec<_>>();
                return Err(GivenError::NoSetting { name, at: at.to_string(), wanted: wanted.join(", ") });
            }
            if fits > 1 || given.0.iter().any(|other| same(&other.at, &at)) {
                return Err(GivenError::Twice { name, at: at.to_string() });
            }
            given.0.push(Socket { name, at, socket });
        }
        Ok(given)
    }

    /// The socket for `field`'s address `listen`, if one was passed on. A copy: the queue is one and the same.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn find(&self, field: &str, listen: &Listen) -> io::Result<Option<OwnedFd>> {
        let found = self.0.iter().find(|given| meant_for(&given.name, field) && same(&given.at, listen));
        found.map(|given| given.socket.try_clone()).transpose()
    }
}

fn meant_for(name: &str, field: &str) -> bool {
    name == field || !FIELDS.contains(&name)
}

/// The names of the sockets that are announced to the process `pid`.
fn announced(pid: u32, variable: impl Fn(&str) -> Option<String>) -> Result<Vec<String>, GivenError> {
    // A process that was started by the one they were meant for sees the variables, too.
    if variable("LISTEN_PID").is_none_or(|value| value != pid.to_string()) {
        return Ok(Vec::new());
    }
    let Some(count) = variable("LISTEN_FDS") else { return Ok(Vec::new()) };
    let count: u16 = count.parse().map_err(|_| GivenError::Count(count))?;
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    Ok((0..count).map(|_| names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned()).collect())
}

fn settings(config: &Config) -> Vec<(&'static str, Listen)> {
    let mut settings = Vec::new();
    settings.extend(config.source.iter().flat_map(|role| &role.nbd).map(|listen| (FIELDS[0], listen.clone())));
    settings.extend(config.target.iter().flat_map(|role| &role.views).map(|listen| (FIELDS[1], listen.clone())));
    settings.extend(config.target.iter().map(|role| (FIELDS[2], Listen::Tcp(role.listen))));
    settings
}

/// Where it listens; `None` if it does not, the text of an address that no setting can name as an error.
fn address(socket: &OwnedFd) -> Option<Result<Listen, String>> {
    if sockopt::socket_type(socket) != Ok(SocketType::STREAM) || sockopt::socket_acceptconn(socket) != Ok(true) {
        return None;
    }
    match sockopt::socket_domain(socket).ok()? {
        AddressFamily::UNIX => {
            let listener = std::os::unix::net::UnixListener::from(socket.try_clone().ok()?);
            let address = listener.local_addr().ok()?;
            Some(address.as_pathname().map(|path| Listen::Unix(path.to_owned())).ok_or_else(|| format!("{address:?}")))
        }
        AddressFamily::INET | AddressFamily::INET6 => {
            let address = std::net::TcpListener::from(socket.try_clone().ok()?).local_addr().ok()?;
            Some(Ok(Listen::Tcp(address)))
        }
        _ => None,
    }
}

fn same(one: &Listen, other: &Listen) -> bool {
    match (one, other) {
        (Listen::Unix(one), Listen::Unix(other)) => real(one) == real(other),
        (Listen::Tcp(one), Listen::Tcp(other)) => plain(*one) == plain(*other),
        _ => false,
    }
}

/// `/var/run` is `/run`.
fn real(path: &Path) -> PathBuf {
    match (path.parent().and_then(|folder| folder.canonicalize().ok()), path.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => path.to_owned(),
    }
}

/// Without the label of a flow, which a listening socket has not.
fn plain(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => std::net::SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pid: &str, count: Option<&str>, names: Option<&str>) -> Result<Vec<String>, String> {
        announced(7, |variable| match variable {
            "LISTEN_PID" => Some(pid.to_owned()),
            "LISTEN_FDS" => count.map(str::to_owned),
            "LISTEN_FDNAMES" => names.map(str::to_owned),
            _ => None,
        })
        .map_err(|error| error.to_string())
    }

    #[test]
    fn the_environment_is_read_as_systemd_writes_it() {
        assert_eq!(names("7", Some("2"), Some("source.nbd:b")).unwrap(), ["source.nbd", "b"]);
        assert_eq!(names("7", Some("2"), Some("a")).unwrap(), ["a", "unknown"]);
        assert_eq!(names("7", Some("1"), None).unwrap(), ["unknown"]);
        assert!(names("8", Some("2"), None).unwrap().is_empty(), "meant for another process");
        assert!(names("7", None, None).unwrap().is_empty());
        assert!(names("7", Some("-1"), None).unwrap_err().contains("LISTEN_FDS=-1"));
        assert!(announced(7, |_| None).unwrap().is_empty());
    }

    fn tcp() -> (OwnedFd, Listen) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = Listen::Tcp(listener.local_addr().unwrap());
        (listener.into(), at)
    }

    fn fitting(name: &str, socket: OwnedFd, settings: &[(&'static str, Listen)]) -> Result<Given, String> {
        Given::fitting(std::iter::once((name.to_owned(), socket)), settings).map_err(|error| error.to_string())
    }

    #[test]
    fn a_socket_is_found_by_its_address() {
        let (socket, at) = tcp();
        let given = fitting("unit.socket", socket, &[("source.nbd", at.clone())]).unwrap();
        assert!(given.find("source.nbd", &at).unwrap().is_some());
        assert!(given.find("source.nbd", &tcp().1).unwrap().is_none());
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("run")).unwrap();
        std::os::unix::fs::symlink("run", folder.path().join("alias")).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(folder.path().join("run/nbd")).unwrap();
        let at = Listen::Unix(folder.path().join("alias/nbd"));
        let given = fitting("source.nbd", listener.into(), &[("source.nbd", at.clone())]).unwrap();
        assert!(given.find("source.nbd", &at).unwrap().is_some());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (socket, at) = tcp();
        let error = fitting("x", socket, &[("source.nbd", tcp().1)]).err().unwrap();
        assert!(error.contains(&format!("`x` of the service manager listens on {at}")), "{error}");
        let (socket, at) = tcp();
        let error = fitting("target.views", socket, &[("source.nbd", at)]).err().unwrap();
        assert!(error.contains("not in target.views:"), "{error}");
        let (socket, at) = tcp();
        let error = fitting("x", socket, &[("source.nbd", at.clone()), ("target.views", at)]).err().unwrap();
        assert!(error.contains("twice"), "{error}");
        let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(fitting("x", connected.into(), &[]).err().unwrap().contains("Accept=no"));
        let datagram = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(fitting("x", datagram.into(), &[]).err().unwrap().contains("ListenStream="));
        let pipe = tempfile::tempfile().unwrap();
        assert!(fitting("x", pipe.into(), &[]).err().unwrap().contains("ListenStream="));
        let (socket, at) = tcp();
        let copy = socket.try_clone().unwrap();
        let both = [("a".to_owned(), socket), ("b".to_owned(), copy)].into_iter();
        assert!(matches!(Given::fitting(both, &[("source.nbd", at)]), Err(GivenError::Twice { .. })));
    }
}
