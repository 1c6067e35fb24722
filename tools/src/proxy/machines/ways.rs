//! Where the network interfaces of an instance lead on this host. Pure: nothing is looked at or made.

use std::collections::BTreeMap;

use afterimage_wire::v1::{MachineRole, Nic, StartInstance};

use super::super::config::machines::Network;
use super::{DriveError, Instance};

/// Digits of a digest in the name of an interface: it has room for 15 characters.
const DIGITS: usize = 10;

/// Where an interface leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Into this bridge, which is the operator's.
    Bridge(String),
    /// Into this bridge, which is made for a test and has no way out.
    Isolated(String),
    /// As the driver's own settings have it.
    Own(String),
    /// Nowhere, by the driver's own means: a test in a network that the map does not have.
    Restricted,
    /// Nowhere: the map says so.
    Unplugged,
}

/// The beginning of a digest, for names of interfaces.
pub fn digest(of: &[&str]) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    for part in of {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part.as_bytes());
    }
    context.finish().as_ref().iter().take(DIGITS / 2).map(|b| format!("{b:02x}")).collect()
}

/// The bridges that are made for a test.
pub fn bridges_of_test(ways: &[Way]) -> Vec<String> {
    let bridge = |way: &Way| if let Way::Isolated(bridge) = way { Some(bridge.clone()) } else { None };
    let mut bridges: Vec<String> = ways.iter().filter_map(bridge).collect();
    bridges.dedup();
    bridges
}

/// The bridge of a test's network: machines of one test that are in one network are together.
fn isolated(instance: &Instance, said: &StartInstance, nic: &Nic) -> String {
    // Of another proxy of this host, with a state folder of its own, there may be the same names.
    let home = instance.folder.ancestors().nth(2).unwrap_or(&instance.folder).to_string_lossy();
    let isolation = if said.isolation.is_empty() { &instance.called } else { &said.isolation };
    format!("aib{}", digest(&[&home, isolation, &nic.network]))
}

/// The ways of an instance's interfaces, in their order. `own`: what the driver's settings have, which goes before the map.
/// `isolates`: a test gets bridges of its own also for networks that the map does not have.
///
/// # Errors
/// Names the machine and a network that is not known here.
pub fn of(
    networks: &BTreeMap<String, Network>,
    own: &BTreeMap<String, String>,
    isolates: bool,
    instance: &Instance,
    said: &StartInstance,
) -> Result<Vec<Way>, DriveError> {
    let test = instance.role == MachineRole::Test;
    let way = |nic: &Nic| match (own.get(&nic.network), networks.get(&nic.network)) {
        (None, Some(Network { bridge: None, .. })) => Ok(Way::Unplugged),
        (None, Some(_)) if test => Ok(Way::Isolated(isolated(instance, said, nic))),
        _ if test && isolates => Ok(Way::Isolated(isolated(instance, said, nic))),
        // No way out, whatever the network is otherwise.
        _ if test => Ok(Way::Restricted),
        (Some(own), _) => Ok(Way::Own(own.clone())),
        (None, Some(Network { bridge: Some(bridge), .. })) => Ok(Way::Bridge(bridge.clone())),
        (None, None) => {
            let (name, network) = (&instance.called, &nic.network);
            let message = format!(
                "the network \"{network}\" of {name} is not known here: add [machines.network.{network}] to this proxy's \
                 configuration, with a bridge or `unplugged = true`"
            );
            Err(DriveError::Setup(message))
        }
    };
    said.nics.iter().map(way).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::instance;
    use super::*;

    fn said(network: &str, isolation: &str) -> StartInstance {
        let nic = Nic { network: network.into(), ..Nic::default() };
        StartInstance { nics: vec![nic], isolation: isolation.into(), ..StartInstance::default() }
    }

    fn way(role: MachineRole, network: &str, isolation: &str) -> Result<Way, String> {
        let lan = Network { bridge: Some("br0".into()), ..Network::default() };
        let map = [("lan".to_owned(), lan), ("backup".to_owned(), Network::default())].into();
        let own = [("wan".to_owned(), "user".to_owned())].into();
        let ways = of(&map, &own, false, &Instance { role, ..instance("/s/machines/qemu") }, &said(network, isolation));
        ways.map(|mut ways| ways.remove(0)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_replica_goes_where_the_map_says_or_nowhere_at_all() {
        for role in [MachineRole::Replica, MachineRole::Source] {
            assert_eq!(way(role, "lan", ""), Ok(Way::Bridge("br0".into())));
            assert_eq!(way(role, "backup", ""), Ok(Way::Unplugged));
            assert_eq!(way(role, "wan", ""), Ok(Way::Own("user".into())));
            let told = way(role, "dmz", "").unwrap_err();
            assert!(told.contains("\"dmz\" of web") && told.contains("[machines.network.dmz]"), "{told}");
        }
    }

    #[test]
    fn a_test_is_with_its_own_and_nobody_else() {
        let test = |network, isolation| way(MachineRole::Test, network, isolation).unwrap();
        let Way::Isolated(bridge) = test("lan", "a") else { panic!("no bridge of its own") };
        assert!(bridge.len() <= 15 && bridge.starts_with("aib"), "{bridge}");
        assert_eq!(test("lan", "a"), Way::Isolated(bridge.clone()));
        assert_ne!(test("lan", "b"), Way::Isolated(bridge));
        assert_eq!((test("backup", "a"), test("wan", "a")), (Way::Unplugged, Way::Restricted));
    }
}
