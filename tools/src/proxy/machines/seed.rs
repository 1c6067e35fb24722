//! What a guest is told of its addresses: a small disk that cloud-init reads (NoCloud), with the network as it is where the guest
//! is started, and an id that is another one wherever that is another.
//!
//! cloud-init applies a network once for each id. The id is made of the network itself: a guest that comes home, or goes over
//! again, is told anew, and one that is started again in the same place is not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Cursor, Write};
use std::net::IpAddr;
use std::path::Path;

use afterimage_wire::address::Prefixed;
use afterimage_wire::v1::{MachineRole, Nic, StartInstance};

use super::super::config::machines::Network;
use super::super::keep;
use super::{DriveError, Instance, ways};

/// Size of the disk, bytes: some files of a few kilobytes.
const SIZE: usize = 512 * 1024;
/// By which cloud-init finds it.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// A guest with another id is a new machine to cloud-init. It is not: its host keys, its name and its users stay.
const USER_DATA: &str = "#cloud-config\n\
    ssh_deletekeys: false\n\
    preserve_hostname: true\n\
    disable_root: false\n\
    users: []\n";

/// What an interface is addressed by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addressed {
    /// With the lengths of their prefixes.
    pub addresses: Vec<Prefixed>,
    /// Routers.
    pub gateways: Vec<IpAddr>,
    /// Name servers.
    pub name_servers: Vec<IpAddr>,
}

/// What a guest is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    meta_data: String,
    network_config: String,
}

fn read<T: std::str::FromStr>(list: &[String]) -> Result<Vec<T>, DriveError> {
    let one = |text: &String| text.parse().map_err(|_| DriveError::failed(format!("`{text}` is no address")));
    list.iter().map(one).collect()
}

fn default_gateways(addressed: &Addressed) -> impl Iterator<Item = &IpAddr> {
    addressed.gateways.iter().filter(|ip| addressed.addresses.iter().any(|a| a.ip.is_ipv4() == ip.is_ipv4()))
}

/// What an interface is addressed by in the place of the instance; and whether that is another than at its source.
fn addressed(network: Option<&Network>, instance: &Instance, nic: &Nic) -> Result<(Addressed, bool), DriveError> {
    let at_source = Addressed {
        addresses: read(&nic.addresses)?,
        gateways: read(&nic.gateways)?,
        name_servers: read(&nic.name_servers)?,
    };
    let nothing = Network::default();
    let network = network.unwrap_or(&nothing);
    let stays = network.rules.is_empty() && nic.target_addresses.is_empty();
    if instance.role == MachineRole::Source || at_source.addresses.is_empty() || stays {
        return Ok((at_source, false));
    }
    let rule = |ip: IpAddr| network.rules.iter().find(|rule| rule.from.contains(ip));
    let moved = |address: &Prefixed| match rule(address.ip) {
        Some(rule) => Ok(Prefixed { ip: rule.to.with_host_of(address.ip), length: address.length }),
        None => {
            let (name, called) = (&nic.network, &instance.called);
            let message = format!(
                "the network \"{name}\" of {called}: no rule in [machines.network.{name}] says what {address} becomes here; add \
                 one, or give the machine an address at its target"
            );
            Err(DriveError::Setup(message))
        }
    };
    let addresses = match nic.target_addresses.as_slice() {
        [] => at_source.addresses.iter().map(moved).collect::<Result<_, _>>()?,
        given => read(given)?,
    };
    // A router that no rule knows is not one here.
    let routers = at_source.gateways.iter().filter_map(|ip| Some(rule(*ip)?.to.with_host_of(*ip)));
    let gateways = if network.gateways.is_empty() { routers.collect() } else { network.gateways.clone() };
    let name_servers =
        if network.name_servers.is_empty() { at_source.name_servers } else { network.name_servers.clone() };
    Ok((Addressed { addresses, gateways, name_servers }, true))
}

/// What each interface of an instance is addressed by where it is started.
///
/// # Errors
/// Names the machine, the network and an address that has no rule.
pub fn addresses(
    networks: &BTreeMap<String, Network>,
    instance: &Instance,
    said: &StartInstance,
) -> Result<Vec<Addressed>, DriveError> {
    let one = |nic: &Nic| Ok(addressed(networks.get(&nic.network), instance, nic)?.0);
    said.nics.iter().map(one).collect()
}

/// What a guest is to be told; nothing if its addresses are its own business, or stay what they are.
///
/// # Errors
/// As [`addresses`].
pub fn of(
    networks: &BTreeMap<String, Network>,
    instance: &Instance,
    said: &StartInstance,
) -> Result<Option<Seed>, DriveError> {
    let one = |nic: &Nic| addressed(networks.get(&nic.network), instance, nic);
    let all: Vec<(Addressed, bool)> = said.nics.iter().map(one).collect::<Result<_, _>>()?;
    // At its source it is told its addresses there whenever there are any: nobody there knows whether others were told elsewhere.
    let home = instance.role == MachineRole::Source && all.iter().any(|(a, _)| !a.addresses.is_empty());
    if !home && !all.iter().any(|(_, moved)| *moved) {
        return Ok(None);
    }
    let mut text = "version: 2\nethernets:\n".to_owned();
    for (i, (nic, (addressed, _))) in said.nics.iter().zip(&all).enumerate() {
        interface(&mut text, i, nic, addressed);
    }
    let id = format!("afterimage-{}-{}", instance.uid, ways::digest(&[&text]));
    Ok(Some(Seed { meta_data: format!("instance-id: {id}\n"), network_config: text }))
}

/// One of `ethernets`, in version 2 of cloud-init's format.
fn interface(text: &mut String, i: usize, nic: &Nic, addressed: &Addressed) {
    let dhcp = addressed.addresses.is_empty();
    let _ = write!(text, "  nic{i}:\n    match:\n      macaddress: \"{}\"\n    dhcp4: {dhcp}\n", nic.mac);
    if dhcp {
        return;
    }
    text.push_str("    dhcp6: false\n    addresses:\n");
    for address in &addressed.addresses {
        let _ = writeln!(text, "      - \"{address}\"");
    }
    let mut routers = default_gateways(addressed).peekable();
    if routers.peek().is_some() {
        text.push_str("    routes:\n");
    }
    for ip in routers {
        let all = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        let _ = write!(text, "      - to: \"{all}\"\n        via: \"{ip}\"\n");
    }
    if !addressed.name_servers.is_empty() {
        text.push_str("    nameservers:\n      addresses:\n");
    }
    for ip in &addressed.name_servers {
        let _ = writeln!(text, "        - \"{ip}\"");
    }
}

impl Seed {
    /// Puts the disk there.
    ///
    /// # Errors
    /// Names the path, and why not.
    pub fn write(&self, path: &Path) -> Result<(), DriveError> {
        self.image()
            .and_then(|image| keep::replace(path, &image))
            .map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))
    }

    /// The disk.
    ///
    /// # Errors
    /// It does not fit.
    fn image(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; SIZE];
        fatfs::format_volume(Cursor::new(&mut bytes), fatfs::FormatVolumeOptions::new().volume_label(LABEL))?;
        {
            let volume = fatfs::FileSystem::new(Cursor::new(&mut bytes), fatfs::FsOptions::new())?;
            let files = [
                ("meta-data", self.meta_data.as_str()),
                ("user-data", USER_DATA),
                ("network-config", self.network_config.as_str()),
            ];
            for (name, text) in files {
                volume.root_dir().create_file(name)?.write_all(text.as_bytes())?;
            }
            volume.unmount()?;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::super::config::machines::networks::Rule;
    use super::super::tests::instance;
    use super::*;

    fn nic() -> Nic {
        Nic {
            mac: "52:54:00:00:00:01".into(),
            network: "lan".into(),
            addresses: vec!["192.0.2.7/24".into(), "2001:db8:1::7/64".into()],
            gateways: vec!["192.0.2.1".into()],
            name_servers: vec!["192.0.2.53".into()],
            target_addresses: Vec::new(),
        }
    }

    fn rules() -> Network {
        let rule = |from: &str, to: &str| Rule { from: from.parse().unwrap(), to: to.parse().unwrap() };
        Network {
            bridge: Some("br0".into()),
            rules: vec![rule("192.0.2.0/24", "198.51.100.0/24"), rule("2001:db8:1::/48", "2001:db8:9::/48")],
            ..Network::default()
        }
    }

    fn made(network: Network, role: MachineRole, nic: Nic) -> Result<Option<Seed>, String> {
        let said = StartInstance { nics: vec![nic], ..StartInstance::default() };
        let networks = [("lan".to_owned(), network)].into();
        of(&networks, &Instance { role, ..instance("/s") }, &said).map_err(|e| e.to_string())
    }

    #[test]
    fn a_replica_is_told_its_addresses_there_and_the_source_its_own_again() {
        let there = made(rules(), MachineRole::Replica, nic()).unwrap().unwrap();
        assert_eq!(
            there.network_config,
            "version: 2\nethernets:\n  nic0:\n    match:\n      macaddress: \"52:54:00:00:00:01\"\n    dhcp4: false\n    \
             dhcp6: false\n    addresses:\n      - \"198.51.100.7/24\"\n      - \"2001:db8:9::7/64\"\n    routes:\n      - to: \
             \"0.0.0.0/0\"\n        via: \"198.51.100.1\"\n    nameservers:\n      addresses:\n        - \"192.0.2.53\"\n"
        );
        let home = made(rules(), MachineRole::Source, nic()).unwrap().unwrap();
        assert!(home.network_config.contains("192.0.2.7/24") && home.network_config.contains("via: \"192.0.2.1\""));
        assert_ne!(home.meta_data, there.meta_data, "it would not be told anew");
        assert_eq!(
            made(rules(), MachineRole::Test, nic()).unwrap().unwrap(),
            there,
            "a test shows what a failover does"
        );
    }

    #[test]
    fn a_machines_own_address_and_a_networks_own_router_go_first() {
        let given = Nic { target_addresses: vec!["203.0.113.9/28".into()], ..nic() };
        let network = Network {
            gateways: vec!["203.0.113.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            name_servers: vec!["203.0.113.53".parse().unwrap()],
            ..rules()
        };
        let text = made(network, MachineRole::Replica, given).unwrap().unwrap().network_config;
        assert!(text.contains("203.0.113.9/28") && text.contains("via: \"203.0.113.1\""), "{text}");
        assert!(text.contains("203.0.113.53") && !text.contains("192.0.2") && !text.contains("::1\""), "{text}");
    }

    #[test]
    fn what_no_rule_knows_is_named_and_what_has_none_stays() {
        let stranger = Nic { addresses: vec!["10.0.0.7/8".into()], ..nic() };
        let told = made(rules(), MachineRole::Replica, stranger).unwrap_err();
        assert!(told.contains("\"lan\" of web") && told.contains("10.0.0.7/8"), "{told}");
        let plain = Network { bridge: Some("br0".into()), ..Network::default() };
        assert_eq!(made(plain, MachineRole::Replica, nic()).unwrap(), None);
        let dhcp = Nic { addresses: Vec::new(), ..nic() };
        assert_eq!(made(rules(), MachineRole::Source, dhcp).unwrap(), None);
    }

    #[test]
    fn the_disk_has_its_label_and_its_files() {
        let seed = made(rules(), MachineRole::Replica, nic()).unwrap().unwrap();
        let mut image = seed.image().unwrap();
        assert_eq!(image, seed.image().unwrap(), "the same is the same");
        let volume = fatfs::FileSystem::new(Cursor::new(&mut image), fatfs::FsOptions::new()).unwrap();
        assert_eq!(
            (volume.volume_label().as_str(), volume.read_volume_label_from_root_dir().unwrap()),
            ("CIDATA", Some("CIDATA".into()))
        );
        for (name, within) in [
            ("meta-data", "instance-id: afterimage-6fa4"),
            ("network-config", "198.51.100.7"),
            ("user-data", "#cloud-config\n"),
        ] {
            let mut text = String::new();
            volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
            assert!(text.contains(within), "{name}: {text}");
        }
    }
}
