//! Network interfaces of machines: what they are connected to, and what they are addressed by at the source. Which network of a
//! host that is, and what addresses there become of these, is said in the configuration of the host's proxy.

use std::net::IpAddr;

use afterimage_wire::address::{NotPrefixed, Prefixed};
use afterimage_wire::v1;
use serde::{Deserialize, Serialize};

use crate::names::check_id;
use crate::problem::Problem;

/// Most network interfaces of a machine.
const MAX_NICS: usize = 16;
/// Most addresses of an interface, and most name servers.
const MAX_ADDRESSES: usize = 8;

/// A network interface. Addresses are checked texts.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Nic {
    /// Empty for any.
    pub mac: String,
    /// What the network is called.
    pub network: String,
    /// At the source, each with the length of its prefix.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Routers at the source.
    #[serde(default)]
    pub gateways: Vec<String>,
    /// Name servers at the source.
    #[serde(default)]
    pub name_servers: Vec<String>,
    /// Of its replica, instead of what rules make of `addresses`.
    #[serde(default)]
    pub target_addresses: Vec<String>,
}

fn few(field: &str, list: &[String]) -> Result<(), Problem> {
    if list.len() > MAX_ADDRESSES {
        return Err(Problem::invalid(field, list.len(), format!("up to {MAX_ADDRESSES}")));
    }
    Ok(())
}

fn prefixed(field: &str, list: &[String]) -> Result<Vec<String>, Problem> {
    few(field, list)?;
    let read =
        |text: &String| text.parse::<Prefixed>().map_err(|_| Problem::invalid(field, text, NotPrefixed.to_string()));
    list.iter().map(|text| Ok(read(text)?.to_string())).collect()
}

fn plain(field: &str, list: &[String]) -> Result<Vec<IpAddr>, Problem> {
    few(field, list)?;
    let read = |text: &String| text.parse().map_err(|_| Problem::invalid(field, text, "an address such as 192.0.2.1"));
    list.iter().map(read).collect()
}

fn nic(i: usize, nic: &v1::Nic) -> Result<Nic, Problem> {
    let field = |of: &str| format!("machine.nics[{i}].{of}");
    let hex = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let parts: Vec<&str> = nic.mac.split(':').collect();
    // The lowest bit of the first byte would make it an address of many.
    let unicast = u8::from_str_radix(parts[0], 16).is_ok_and(|first| first & 1 == 0);
    let whole = parts.len() == 6 && parts.iter().all(|p| hex(p)) && unicast;
    if !nic.mac.is_empty() && !whole {
        return Err(Problem::invalid(field("mac"), &nic.mac, "six bytes such as 52:54:00:12:34:56, of one station"));
    }
    check_id(&field("network"), &nic.network)?;
    let gateways = plain(&field("gateways"), &nic.gateways)?;
    let fours = gateways.iter().filter(|ip| ip.is_ipv4()).count();
    if fours > 1 || gateways.len() - fours > 1 {
        return Err(Problem::invalid(field("gateways"), nic.gateways.join(", "), "at most one of each family"));
    }
    let text = |list: Vec<IpAddr>| list.iter().map(IpAddr::to_string).collect();
    Ok(Nic {
        mac: nic.mac.to_ascii_lowercase(),
        network: nic.network.clone(),
        addresses: prefixed(&field("addresses"), &nic.addresses)?,
        gateways: text(gateways),
        name_servers: text(plain(&field("name_servers"), &nic.name_servers)?),
        target_addresses: prefixed(&field("target_addresses"), &nic.target_addresses)?,
    })
}

/// The interfaces of a machine as asked for.
///
/// # Errors
/// Names the field, the value and what is allowed.
pub fn wanted(asked: &[v1::Nic]) -> Result<Vec<Nic>, Problem> {
    if asked.len() > MAX_NICS {
        return Err(Problem::invalid("machine.nics", asked.len(), format!("up to {MAX_NICS}")));
    }
    let made: Vec<Nic> = asked.iter().enumerate().map(|(i, asked)| nic(i, asked)).collect::<Result<_, _>>()?;
    let addressed = made.iter().any(|nic| !nic.addresses.is_empty() || !nic.target_addresses.is_empty());
    for (i, nic) in made.iter().enumerate() {
        let field = |of: &str| format!("machine.nics[{i}].{of}");
        // A guest is told which interface is meant by that.
        if addressed && nic.mac.is_empty() {
            let allowed = "an address such as 52:54:00:12:34:56: interfaces of this machine have IP addresses";
            return Err(Problem::invalid(field("mac"), "", allowed));
        }
        if !nic.mac.is_empty() && made[..i].iter().any(|other| other.mac == nic.mac) {
            return Err(Problem::invalid(field("mac"), &nic.mac, "each once"));
        }
        if nic.addresses.is_empty() && !(nic.target_addresses.is_empty() && nic.gateways.is_empty()) {
            // Without them nothing could be undone.
            let allowed = "what it is addressed by at its source, such as 192.0.2.7/24, as other addresses are given";
            return Err(Problem::invalid(field("addresses"), "", allowed));
        }
    }
    Ok(made)
}

/// An interface for the API.
pub fn to_proto(nic: &Nic) -> v1::Nic {
    v1::Nic {
        mac: nic.mac.clone(),
        network: nic.network.clone(),
        addresses: nic.addresses.clone(),
        gateways: nic.gateways.clone(),
        name_servers: nic.name_servers.clone(),
        target_addresses: nic.target_addresses.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> v1::Nic {
        v1::Nic {
            mac: "52:54:00:AA:00:01".into(),
            network: "lan".into(),
            addresses: vec!["192.0.2.7/24".into(), "2001:DB8::7/64".into()],
            gateways: vec!["192.0.2.1".into()],
            name_servers: vec!["192.0.2.53".into()],
            target_addresses: Vec::new(),
        }
    }

    #[test]
    fn an_interface_reads_back_as_it_is_written() {
        let made = wanted(&[asked()]).unwrap();
        assert_eq!((made[0].mac.as_str(), made[0].addresses[1].as_str()), ("52:54:00:aa:00:01", "2001:db8::7/64"));
        assert_eq!(wanted(&[to_proto(&made[0])]).unwrap(), made);
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_does() {
        type Change = fn(&mut v1::Nic);
        let cases: [(Change, &str, &str); 7] = [
            (|n| n.addresses = vec!["192.0.2.7".into()], "nics[0].addresses", "192.0.2.7/24"),
            (|n| n.addresses = vec!["::1/64".into(); 9], "nics[0].addresses", "up to 8"),
            (|n| n.gateways = vec!["lan".into()], "nics[0].gateways", "192.0.2.1"),
            (|n| n.gateways = vec!["192.0.2.1".into(), "192.0.2.2".into()], "nics[0].gateways", "one of each"),
            (|n| n.name_servers = vec!["dns.example".into()], "nics[0].name_servers", "192.0.2.1"),
            (|n| n.mac = String::new(), "nics[0].mac", "52:54"),
            (|n| n.addresses.clear(), "nics[0].addresses", "at its source"),
        ];
        for (change, field, allowed) in cases {
            let mut nic = asked();
            change(&mut nic);
            let told = wanted(&[nic]).unwrap_err().to_string();
            assert!(told.contains(field) && told.contains(allowed), "{told}");
        }
        let told = wanted(&[asked(), asked()]).unwrap_err().to_string();
        assert!(told.contains("nics[1].mac") && told.contains("each once"), "{told}");
    }
}
