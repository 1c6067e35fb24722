//! Addresses of machines' interfaces, each with the length of its network's prefix.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An address and the length of its network's prefix: `192.0.2.7/24`, `2001:db8::7/64`.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Prefixed {
    /// The address.
    pub ip: IpAddr,
    /// Bits of it that are the network's: up to 32, or 128.
    pub length: u8,
}

/// The text is no address with a prefix.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an address with the length of its prefix, such as 192.0.2.7/24 or 2001:db8::7/64")]
pub struct NotPrefixed;

fn bits(ip: IpAddr) -> (u128, u32) {
    match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)), 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    }
}

impl FromStr for Prefixed {
    type Err = NotPrefixed;

    fn from_str(text: &str) -> Result<Self, NotPrefixed> {
        let (ip, length) = text.split_once('/').ok_or(NotPrefixed)?;
        let ip: IpAddr = ip.parse().map_err(|_| NotPrefixed)?;
        let plain = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
        let length: u8 = length.parse().map_err(|_| NotPrefixed)?;
        if !plain || u32::from(length) > bits(ip).1 {
            return Err(NotPrefixed);
        }
        Ok(Self { ip, length })
    }
}

impl fmt::Display for Prefixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.length)
    }
}

impl Prefixed {
    /// The bits of an address that are the host's here.
    fn host_mask(&self) -> u128 {
        let host = bits(self.ip).1 - u32::from(self.length);
        u128::MAX.checked_shr(128 - host).unwrap_or(0)
    }

    /// Nothing but the network is named: all bits of the host are zero.
    pub fn is_network(&self) -> bool {
        bits(self.ip).0 & self.host_mask() == 0
    }

    /// The address is of this network.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ((ours, width), (theirs, their_width)) = (bits(self.ip), bits(ip));
        width == their_width && (ours ^ theirs) & !self.host_mask() == 0
    }

    /// The address in this network that has the host's bits of the other one.
    pub fn with_host_of(&self, ip: IpAddr) -> IpAddr {
        let made = (bits(self.ip).0 & !self.host_mask()) | (bits(ip).0 & self.host_mask());
        match self.ip {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(made as u32)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(made)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Prefixed {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_read_back_and_nonsense_is_refused() {
        for good in ["192.0.2.7/24", "0.0.0.0/0", "2001:db8::7/64", "10.0.0.1/32", "::1/128"] {
            assert_eq!(of(good).to_string(), good);
        }
        for bad in ["192.0.2.7", "192.0.2.7/33", "::1/129", "192.0.2/24", "/24", "192.0.2.7/", "192.0.2.7/+8", "a/8"] {
            assert!(bad.parse::<Prefixed>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_host_keeps_its_part_in_another_network() {
        for (to, ip, made) in [
            ("198.51.100.0/24", "192.0.2.7", "198.51.100.7"),
            ("10.9.0.0/16", "10.1.3.7", "10.9.3.7"),
            ("198.51.100.64/26", "192.0.2.7", "198.51.100.71"),
            ("2001:db8:9::/48", "2001:db8:1:2::7", "2001:db8:9:2::7"),
            ("0.0.0.0/0", "192.0.2.7", "192.0.2.7"),
            ("10.0.0.1/32", "192.0.2.7", "10.0.0.1"),
        ] {
            assert_eq!(of(to).with_host_of(ip.parse().unwrap()), made.parse::<IpAddr>().unwrap(), "{ip} in {to}");
        }
    }

    #[test]
    fn a_network_contains_its_own() {
        let (lan, six) = (of("192.0.2.0/24"), of("2001:db8::/32"));
        assert!(lan.contains("192.0.2.255".parse().unwrap()) && !lan.contains("192.0.3.0".parse().unwrap()));
        assert!(six.contains("2001:db8:ffff::".parse().unwrap()) && !six.contains("192.0.2.1".parse().unwrap()));
        assert!(of("0.0.0.0/0").contains("8.8.8.8".parse().unwrap()) && of("::/0").contains("::1".parse().unwrap()));
        assert!(lan.is_network() && !of("192.0.2.1/24").is_network() && of("192.0.2.1/32").is_network());
    }
}
