//! Does a machine that is on answer?

use std::io::{Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use afterimage_wire::v1::{Readiness, ReadinessKind};

use super::super::config::Machines;
use super::{Instance, hook, settings};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// Most that is looked at of what a serial port has said, from its end, bytes.
const MAX_CONSOLE: u64 = 4 * 1024 * 1024;

/// Looks once.
///
/// # Errors
/// Why it does not answer yet, or why that cannot be said.
pub(super) fn look(
    machines: &Machines,
    instance: &Instance,
    wanted: &Readiness,
    console: Option<&Path>,
) -> Result<(), String> {
    let value = wanted.value.as_str();
    match wanted.kind() {
        ReadinessKind::Unspecified | ReadinessKind::Running => Ok(()),
        ReadinessKind::Tcp => accepts(value).map(drop),
        ReadinessKind::Console => {
            let path = console.ok_or("its driver does not see its serial port")?;
            let said = tail(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let found = said.windows(value.len()).any(|part| part == value.as_bytes());
            if found { Ok(()) } else { Err(format!("its serial port has not said \"{value}\"")) }
        }
        ReadinessKind::Hook => {
            let hook = settings(&machines.hooks, "hook", value).map_err(|error| error.to_string())?;
            hook::ready(hook, instance)
        }
    }
}

/// Where something accepts of `host:port`.
///
/// # Errors
/// Why not.
pub(super) fn accepts(at: &str) -> Result<SocketAddr, String> {
    let addresses = at.to_socket_addrs().map_err(|error| format!("{at}: {error}"))?;
    let mut why = format!("{at} has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(_) => return Ok(address),
            Err(error) => why = format!("nothing accepts at {address}: {error}"),
        }
    }
    Err(why)
}

fn tail(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_CONSOLE)))?;
    let mut said = Vec::new();
    file.take(MAX_CONSOLE).read_to_end(&mut said)?;
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::super::tests::instance;
    use super::*;

    fn answer(kind: ReadinessKind, value: &str, console: Option<&Path>) -> Result<(), String> {
        let wanted = Readiness { kind: kind.into(), value: value.to_owned() };
        look(&Machines::default(), &instance("/nowhere"), &wanted, console)
    }

    #[test]
    fn a_port_answers_or_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        assert_eq!(answer(ReadinessKind::Tcp, &at, None), Ok(()));
        drop(listener);
        assert!(answer(ReadinessKind::Tcp, &at, None).unwrap_err().contains("nothing accepts at 127.0.0.1"));
    }

    #[test]
    fn a_console_has_said_it_or_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"\x1b[0mlogin: \xff").unwrap();
        assert_eq!(answer(ReadinessKind::Console, "login:", Some(file.path())), Ok(()));
        assert!(answer(ReadinessKind::Console, "ready", Some(file.path())).unwrap_err().contains("has not said"));
        assert!(answer(ReadinessKind::Console, "ready", None).is_err());
    }

    #[test]
    fn a_hook_that_is_not_set_is_named() {
        let why = answer(ReadinessKind::Hook, "web", None).unwrap_err();
        assert!(why.contains("[machines.hook.web]"), "{why}");
    }
}
