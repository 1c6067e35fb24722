//! Taps of processes, and the bridges of tests: made before a machine is started, gone when it is off.
//!
//! What is to be made is written down first, in the instance's folder: what a proxy that died in the middle has left is found by
//! that, and removed before the instance is started again, when it is stopped, or when the proxy starts. A tap is named after its
//! instance, the bridge of a test after the test and its network: it goes with the last machine of the test.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::keep;
use super::ways::{Way, bridges_of_test, digest};
use super::{DriveError, command, short};

/// What an instance has made, in its folder.
const FILE: &str = "links.json";
/// How long one change may take.
const CALL: Duration = Duration::from_secs(10);

/// One after the other: the last machine of a test removes its bridge, while another one of that test may be about to use it.
static TURN: Mutex<()> = Mutex::new(());

/// What was, or is about to be, made.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Made {
    taps: Vec<String>,
    bridges: Vec<String>,
}

/// The name of an instance's tap.
pub fn tap(folder: &Path, nic: usize) -> String {
    format!("ai{}-{nic:x}", digest(&[&folder.to_string_lossy()]))
}

/// `ip`, which has to succeed; what it said.
fn ip(words: &[&str]) -> Result<String, DriveError> {
    let all: Vec<String> = std::iter::once("ip").chain(words.iter().copied()).map(str::to_owned).collect();
    let ran = command::run(&all, b"", &[("LC_ALL", "C".to_owned())], CALL)
        .map_err(|error| DriveError::Setup(format!("`ip`, of iproute2, cannot be started: {error}")))?;
    match ran.code {
        Some(0) => Ok(ran.said),
        _ => Err(DriveError::failed(format!("ip {}: {}", words.join(" "), short(&ran.said)))),
    }
}

/// An interface of this host; none if there is none of that name.
fn look(name: &str) -> Result<Option<Value>, DriveError> {
    match ip(&["-json", "-details", "link", "show", "dev", name]) {
        Ok(said) => {
            let all: Vec<Value> = serde_json::from_str(&said)
                .map_err(|error| DriveError::failed(format!("what `ip` says of {name} makes no sense: {error}")))?;
            Ok(all.into_iter().next())
        }
        Err(DriveError::Failed(why)) if why.contains("does not exist") => Ok(None),
        Err(error) => Err(error),
    }
}

fn kind(interface: &Value) -> &str {
    interface["linkinfo"]["info_kind"].as_str().unwrap_or_default()
}

/// Looks whether there is a bridge of that name.
///
/// # Errors
/// There is none, or it is something else; or that cannot be said.
pub fn check_bridge(machine: &str, network: &str, bridge: &str) -> Result<(), DriveError> {
    let at = format!("the network \"{network}\" of {machine} is the bridge \"{bridge}\" here");
    match look(bridge)? {
        Some(found) if kind(&found) == "bridge" => Ok(()),
        Some(_) => Err(DriveError::Setup(format!("{at}, and the interface of that name is no bridge"))),
        None => Err(DriveError::Setup(format!("{at}, and this host has none of that name"))),
    }
}

/// Writes a setting of an interface. One that this host's kernel does not have is not needed.
fn set(family: &str, bridge: &str, name: &str, value: &str) -> Result<(), DriveError> {
    let path = format!("/proc/sys/net/{family}/conf/{bridge}/{name}");
    match fs::write(&path, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && family == "ipv6" => Ok(()),
        done => done.map_err(|error| DriveError::failed(format!("{path}: {error}"))),
    }
}

/// A bridge without a way out: nothing is passed on to this host, from it, or through it.
fn isolate(bridge: &str) -> Result<(), DriveError> {
    if look(bridge)?.is_none() {
        ip(&["link", "add", "name", bridge, "type", "bridge", "stp_state", "0"])?;
    }
    ip(&["link", "set", "dev", bridge, "addrgenmode", "none"])?;
    // This host has addresses elsewhere: it neither says so here, nor takes what is sent to them, nor passes it on.
    for (name, value) in [("forwarding", "0"), ("arp_ignore", "8"), ("rp_filter", "1")] {
        set("ipv4", bridge, name, value)?;
    }
    set("ipv6", bridge, "disable_ipv6", "1")?;
    ip(&["link", "set", "dev", bridge, "up"]).map(drop)
}

fn plug(tap: &str, bridge: &str) -> Result<(), DriveError> {
    let uid = rustix::process::getuid().as_raw().to_string();
    ip(&["tuntap", "add", "dev", tap, "mode", "tap", "user", &uid])?;
    // A bridge takes the smallest size of its ports, and would fall to that of this one.
    if let Some(mtu) = look(bridge)?.and_then(|found| found["mtu"].as_u64()) {
        ip(&["link", "set", "dev", tap, "mtu", &mtu.to_string()])?;
    }
    ip(&["link", "set", "dev", tap, "addrgenmode", "none"])?;
    ip(&["link", "set", "dev", tap, "master", bridge])?;
    ip(&["link", "set", "dev", tap, "up"]).map(drop)
}

/// Makes the taps of an instance that is off, each in its bridge. After an error what was made is to be cleared.
///
/// # Errors
/// Why not.
pub fn connect(folder: &Path, ways: &[Way]) -> Result<(), DriveError> {
    let taps = ways.iter().enumerate().filter_map(|(i, way)| match way {
        Way::Bridge(bridge) | Way::Isolated(bridge) => Some((tap(folder, i), bridge.as_str())),
        Way::Own(_) | Way::Restricted | Way::Unplugged => None,
    });
    let taps: Vec<(String, &str)> = taps.collect();
    clear(folder)?;
    if taps.is_empty() {
        return Ok(());
    }
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let made = Made { taps: taps.iter().map(|(tap, _)| tap.clone()).collect(), bridges: bridges_of_test(ways) };
    let path = folder.join(FILE);
    let text = serde_json::to_vec(&made).map_err(DriveError::failed)?;
    keep::replace(&path, &text).map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))?;
    for bridge in &made.bridges {
        isolate(bridge)?;
    }
    taps.iter().try_for_each(|(tap, bridge)| plug(tap, bridge))
}

/// An instance has made something that may still be there.
pub fn any(folder: &Path) -> bool {
    folder.join(FILE).exists()
}

/// Removes what was made for an instance that is off; of a test's bridge, if no other machine of the test is in it.
///
/// # Errors
/// Why not: it is tried again before the next start.
pub fn clear(folder: &Path) -> Result<(), DriveError> {
    let path = folder.join(FILE);
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let made: Made = match fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(DriveError::failed(format!("{}: {error}", path.display()))),
    };
    for tap in &made.taps {
        if look(tap)?.is_some_and(|found| kind(&found) == "tun") {
            ip(&["link", "del", "dev", tap])?;
        }
    }
    for bridge in &made.bridges {
        let ports = || -> Result<bool, DriveError> {
            let said = ip(&["-json", "link", "show", "master", bridge])?;
            Ok(!matches!(said.trim(), "" | "[]"))
        };
        if look(bridge)?.is_some_and(|found| kind(&found) == "bridge") && !ports()? {
            ip(&["link", "del", "dev", bridge])?;
        }
    }
    fs::remove_file(&path).map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_an_interface_and_are_an_instances_own() {
        let (one, other) = (tap(Path::new("/s/machines/qemu/web"), 15), tap(Path::new("/s/machines/qemu/web.t"), 15));
        assert!(one.len() <= 15 && one != other && one.ends_with("-f"), "{one} {other}");
    }

    #[test]
    fn what_has_made_nothing_is_clear() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!any(dir.path()));
        clear(dir.path()).unwrap();
        connect(dir.path(), &[Way::Unplugged, Way::Own("user".into())]).unwrap();
        assert!(!any(dir.path()));
    }

    #[test]
    fn what_is_written_down_and_not_there_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        // Nothing has these names: they are digests of this folder.
        let made = Made { taps: vec![tap(dir.path(), 0)], bridges: vec![tap(dir.path(), 1)] };
        fs::write(dir.path().join(FILE), serde_json::to_vec(&made).unwrap()).unwrap();
        assert!(any(dir.path()));
        clear(dir.path()).unwrap();
        assert!(!any(dir.path()));
    }

    #[test]
    fn a_bridge_that_is_not_there_is_named_with_the_machine_and_the_network() {
        let name = tap(Path::new("/nowhere"), 0);
        let told = check_bridge("web", "lan", &name).unwrap_err().to_string();
        assert!(told.contains(&name) && told.contains("\"lan\" of web"), "{told}");
        let told = check_bridge("web", "lan", "lo").unwrap_err().to_string();
        assert!(told.contains("is no bridge"), "{told}");
    }
}
