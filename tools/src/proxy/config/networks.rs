//! The networks of machines: which bridge of this host each is, and what addresses become of those at the source.

use std::collections::BTreeMap;
use std::net::IpAddr;

use afterimage_wire::address::{NotPrefixed, Prefixed};
use serde::Deserialize;

use super::super::ConfigError;

/// Longest name of an interface, bytes.
const MAX_INTERFACE: usize = 15;
/// Most rules of a network.
const MAX_RULES: usize = 64;

/// `[machines.network.NAME]` of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct FileNetwork {
    bridge: Option<String>,
    #[serde(default)]
    unplugged: bool,
    #[serde(default)]
    addresses: Vec<FileRule>,
    #[serde(default)]
    gateways: Vec<IpAddr>,
    #[serde(default)]
    name_servers: Vec<IpAddr>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    from: String,
    to: String,
}

/// What becomes of addresses of one network: the host's part stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// A network at the source.
    pub from: Prefixed,
    /// As large, here.
    pub to: Prefixed,
}

/// What a network of machines is on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// The bridge that replicas are put into; none: they stay unplugged.
    pub bridge: Option<String>,
    /// The first that fits is taken.
    pub rules: Vec<Rule>,
    /// Routers here, at most one of each family.
    pub gateways: Vec<IpAddr>,
    /// Name servers here; none: as at the source.
    pub name_servers: Vec<IpAddr>,
}

fn wrong(field: &'static str, value: impl std::fmt::Display, allowed: &str) -> ConfigError {
    ConfigError::Field { field, value: format!("`{value}`"), allowed: allowed.to_owned() }
}

fn rule(rule: &FileRule) -> Result<Rule, ConfigError> {
    const FIELD: &str = "machines.network.addresses";
    let read = |text: &str| text.parse::<Prefixed>().map_err(|_| wrong(FIELD, text, &NotPrefixed.to_string()));
    let made = Rule { from: read(&rule.from)?, to: read(&rule.to)? };
    if !made.from.is_network() || !made.to.is_network() {
        return Err(wrong(FIELD, format!("{} to {}", rule.from, rule.to), "networks: the host's bits are zero"));
    }
    if made.from.ip.is_ipv4() != made.to.ip.is_ipv4() || made.from.length != made.to.length {
        let allowed = "two networks of one family and one size: the host's part stays";
        return Err(wrong(FIELD, format!("{} to {}", rule.from, rule.to), allowed));
    }
    Ok(made)
}

fn network(name: &str, file: FileNetwork) -> Result<Network, ConfigError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    match &file.bridge {
        Some(bridge) if bridge.is_empty() || bridge.len() > MAX_INTERFACE || !bridge.bytes().all(plain) => {
            return Err(wrong("machines.network.bridge", bridge, "the name of a bridge of this host, such as br0"));
        }
        Some(_) if file.unplugged => {
            return Err(wrong("machines.network.unplugged", name, "a bridge, or `unplugged = true`, and not both"));
        }
        None if !file.unplugged => {
            return Err(wrong("machines.network.bridge", name, "a bridge; or `unplugged = true` for none"));
        }
        Some(_) | None => {}
    }
    let fours = file.gateways.iter().filter(|ip| ip.is_ipv4()).count();
    if fours > 1 || file.gateways.len() - fours > 1 {
        return Err(wrong("machines.network.gateways", name, "at most one of each family"));
    }
    if file.addresses.len() > MAX_RULES {
        return Err(wrong("machines.network.addresses", file.addresses.len(), "up to 64"));
    }
    Ok(Network {
        bridge: file.bridge,
        rules: file.addresses.iter().map(rule).collect::<Result<_, _>>()?,
        gateways: file.gateways,
        name_servers: file.name_servers,
    })
}

pub(super) fn networks(file: BTreeMap<String, FileNetwork>) -> Result<BTreeMap<String, Network>, ConfigError> {
    file.into_iter().map(|(name, file)| Ok((name.clone(), network(&name, file)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Network, String> {
        network("lan", toml::from_str(text).map_err(|e| e.to_string())?).map_err(|e| e.to_string())
    }

    #[test]
    fn a_network_is_a_bridge_or_said_to_be_none() {
        let made = read("bridge = 'br-dr'\naddresses = [{ from = '192.0.2.0/24', to = '198.51.100.0/24' }]").unwrap();
        assert_eq!((made.bridge.as_deref(), made.rules.len()), (Some("br-dr"), 1));
        assert_eq!(read("unplugged = true").unwrap(), Network::default());
        for (text, allowed) in [
            ("", "unplugged"),
            ("bridge = 'br0'\nunplugged = true", "not both"),
            ("bridge = 'far too long a name'", "br0"),
            ("bridge = 'b'\naddresses = [{ from = '192.0.2.1/24', to = '198.51.100.0/24' }]", "bits are zero"),
            ("bridge = 'b'\naddresses = [{ from = '192.0.2.0/24', to = '198.51.100.0/25' }]", "one size"),
            ("bridge = 'b'\naddresses = [{ from = '192.0.2.0/24', to = '2001:d00::/24' }]", "one family"),
            ("bridge = 'b'\naddresses = [{ from = '192.0.2.0', to = '198.51.100.0/24' }]", "length of its prefix"),
            ("bridge = 'b'\ngateways = ['192.0.2.1', '192.0.2.2']", "one of each family"),
            ("bridge = 'b'\ngateway = ['192.0.2.1']", "unknown field"),
        ] {
            let told = read(text).unwrap_err();
            assert!(told.contains(allowed), "{text}: {told}");
        }
    }
}
