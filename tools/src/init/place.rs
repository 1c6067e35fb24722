//! Where a coordinator may stand: at a target or at a third site. At the source it would be lost together with what it is
//! needed for.

use std::net::{IpAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_wire::v1;

use crate::coordinator::DATA_DIR;
use crate::doctor::{COORDINATOR_FILE, PROXY_FILE};
use crate::operator::documents::id;
use crate::operator::failure::{Failure, Kind};
use crate::operator::session::{Common, Session, every};
use crate::proxy;

/// How long another coordinator is asked, if there is one.
const ASKED: Duration = Duration::from_secs(3);

/// Refuses a coordinator on a host whose disks are protected: by the files of this host, and by what a coordinator that
/// can be reached knows.
pub async fn of_coordinator(out: &Path, common: &Common) -> Result<(), Failure> {
    for file in [PathBuf::from(PROXY_FILE), out.with_file_name("proxy.toml")] {
        let args = proxy::Args { config: Some(file.clone()), ..Default::default() };
        if proxy::config::Config::load(&args).is_ok_and(|config| config.source.is_some()) {
            return Err(together(&format!("{} makes this host a source", file.display())));
        }
    }
    // Without an identity, or without an answer, there is nobody who would know more.
    let known = tokio::time::timeout(ASKED, sources_here(common)).await;
    match known {
        Ok(Ok(groups)) if !groups.is_empty() => {
            Err(together(&format!("the disks of {} are on this host", groups.join(", "))))
        }
        _ => Ok(()),
    }
}

/// Groups whose source runs on this host, as it is booted now.
async fn sources_here(common: &Common) -> Result<Vec<String>, Failure> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let session = Session::open(common).await?;
    let request = v1::ListProxiesRequest { parent: session.tenant(), ..Default::default() };
    let proxies: Vec<v1::Proxy> = every!(session, "proxies", proxies.list_proxies(request).proxies);
    let request = v1::ListGroupsRequest { parent: session.tenant(), ..Default::default() };
    let groups: Vec<v1::Group> = every!(session, "groups", groups.list_groups(request).groups);
    let here = |name: &str| proxies.iter().any(|proxy| proxy.name == name && proxy.boot_id == boot.trim());
    Ok(groups.iter().filter(|group| here(&group.source)).map(|group| id(&group.name).to_owned()).collect())
}

/// The same from the other side: a source on the coordinator's host.
pub fn of_source(out: &Path, coordinator: &str) -> Result<(), Failure> {
    for file in [PathBuf::from(COORDINATOR_FILE), out.with_file_name("coordinator.toml")] {
        if file.exists() {
            return Err(together(&format!("{} makes this host a coordinator", file.display())));
        }
    }
    if Path::new(DATA_DIR).join("state.redb").exists() {
        return Err(together(&format!("{DATA_DIR} holds a coordinator's state")));
    }
    for address in coordinator.split(',') {
        let resolved = address.trim().to_socket_addrs().into_iter().flatten();
        if let Some(own) = resolved.map(|address| address.ip()).find(|ip| is_own(*ip)) {
            return Err(together(&format!("the coordinator {address} ({own}) is this host")));
        }
    }
    Ok(())
}

/// Whether it is an address of this host: only to those a socket can be bound.
fn is_own(ip: IpAddr) -> bool {
    !ip.is_unspecified() && UdpSocket::bind((ip, 0)).is_ok()
}

fn together(why: &str) -> Failure {
    let message = format!("not written: {why}. When a source's site is lost, its coordinator must not be lost with it");
    Failure::new(Kind::Refused, "init", message)
        .hint("put the coordinator at the target or at a third site; or add --anyway, for a trial on one host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_host_are_known() {
        assert!(is_own("127.0.0.1".parse().unwrap()));
        // TEST-NET-1: nobody's.
        assert!(!is_own("192.0.2.1".parse().unwrap()));
        assert!(!is_own("0.0.0.0".parse().unwrap()));
    }

    #[test]
    fn a_source_beside_a_coordinators_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("proxy.toml");
        assert!(of_source(&out, "192.0.2.1:7700").is_ok());
        assert_eq!(of_source(&out, "127.0.0.1:7700").unwrap_err().kind, Kind::Refused);
        std::fs::write(dir.path().join("coordinator.toml"), "").unwrap();
        let refused = of_source(&out, "192.0.2.1:7700").unwrap_err();
        assert!(refused.message.contains("coordinator.toml") && refused.hint.contains("--anyway"), "{refused}");
    }
}
