//! A domain as libvirt reads it. Pure: what is not in the settings or the command is not in it.

use std::fmt::Write;
use std::path::Path;

use afterimage_wire::v1::{Firmware, MachineRole, StartInstance};

use super::super::config::machines::Libvirt;
use super::ways::Way;
use super::{DriveError, Instance};

/// What libvirt calls the network of a test.
pub fn network_of(bridge: &str) -> String {
    format!("afterimage-{bridge}")
}

/// Text within XML.
fn text(of: &str) -> String {
    let mut safe = String::with_capacity(of.len());
    for c in of.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&apos;"),
            // Nothing of this can stand in XML at all.
            c if c.is_control() => {}
            c => safe.push(c),
        }
    }
    safe
}

/// A network without a way out: it forwards nowhere, and this host has no address in it.
pub fn isolated_network(bridge: &str) -> String {
    let name = network_of(bridge);
    format!("<network>\n  <name>{name}</name>\n  <bridge name='{bridge}' stp='off'/>\n</network>\n")
}

/// The name of the nth disk: vda to vdz, vdaa …
fn target(mut number: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.push((b'a' + (number % 26) as u8) as char);
        if number < 26 {
            break;
        }
        number = number / 26 - 1;
    }
    format!("vd{}", letters.iter().rev().collect::<String>())
}

/// How a disk is reached: by vhost-user where there is a socket, since that waits for a proxy that restarts.
enum Reach {
    VhostUser(String),
    /// Host element and export.
    Nbd(String, String),
}

fn reach(uris: &[String]) -> Option<Reach> {
    let vhost = uris.iter().find_map(|uri| Some(Reach::VhostUser(text(uri.strip_prefix("vhost-user:")?))));
    let unix = || {
        uris.iter().find_map(|uri| {
            let (export, socket) = uri.strip_prefix("nbd+unix:///")?.split_once("?socket=")?;
            Some(Reach::Nbd(format!("<host transport='unix' socket='{}'/>", text(socket)), text(export)))
        })
    };
    let tcp = || {
        uris.iter().find_map(|uri| {
            let (at, export) = uri.strip_prefix("nbd://")?.split_once('/')?;
            let (host, port) = at.rsplit_once(':')?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Some(Reach::Nbd(format!("<host name='{}' port='{}'/>", text(host), text(port)), text(export)))
        })
    };
    vhost.or_else(unix).or_else(tcp)
}

/// The domain of an instance whose interfaces lead there; `seed`: what it is told of its addresses.
///
/// # Errors
/// A disk that has no socket.
pub fn domain(
    settings: &Libvirt,
    instance: &Instance,
    said: &StartInstance,
    ways: &[Way],
    seed: Option<&Path>,
) -> Result<String, DriveError> {
    let mut xml = String::new();
    let mut line = |depth: usize, text: String| {
        let _ = writeln!(xml, "{:1$}{text}", "", depth * 2);
    };
    line(0, format!("<domain type='{}'>", text(&settings.kind)));
    line(1, format!("<name>{}</name>", text(&instance.called)));
    // Of a test there may be several beside the replica: libvirt makes up a uuid for each.
    if instance.role != MachineRole::Test {
        line(1, format!("<uuid>{}</uuid>", text(&instance.uid)));
    }
    line(1, format!("<description>{}, started by afterimage</description>", text(&instance.name)));
    line(1, format!("<memory unit='KiB'>{}</memory>", said.memory_bytes >> 10));
    if said.disks.iter().any(|disk| matches!(reach(&disk.uris), Some(Reach::VhostUser(_)))) {
        // The proxy reads and writes the guest's memory.
        line(1, "<memoryBacking>".to_owned());
        line(2, "<source type='memfd'/>".to_owned());
        line(2, "<access mode='shared'/>".to_owned());
        line(1, "</memoryBacking>".to_owned());
    }
    line(1, format!("<vcpu>{}</vcpu>", said.cpus));
    let firmware = if said.firmware() == Firmware::Uefi { " firmware='efi'" } else { "" };
    line(1, format!("<os{firmware}>"));
    line(2, "<type machine='q35'>hvm</type>".to_owned());
    line(1, "</os>".to_owned());
    line(1, "<features>".to_owned());
    line(2, "<acpi/>".to_owned());
    line(2, "<apic/>".to_owned());
    line(1, "</features>".to_owned());
    line(1, "<on_poweroff>destroy</on_poweroff>".to_owned());
    line(1, "<on_reboot>restart</on_reboot>".to_owned());
    line(1, "<on_crash>destroy</on_crash>".to_owned());
    line(1, "<devices>".to_owned());
    for (i, disk) in said.disks.iter().enumerate() {
        match reach(&disk.uris) {
            Some(Reach::VhostUser(socket)) => {
                line(2, "<disk type='vhostuser' device='disk'>".to_owned());
                line(3, "<driver name='qemu' type='raw'/>".to_owned());
                line(3, format!("<source type='unix' path='{socket}'>"));
                line(4, "<reconnect enabled='yes' timeout='1'/>".to_owned());
                line(3, "</source>".to_owned());
            }
            Some(Reach::Nbd(host, export)) => {
                line(2, "<disk type='network' device='disk'>".to_owned());
                // A guest whose disk is gone for a while stands still rather than fail.
                line(
                    3,
                    "<driver name='qemu' type='raw' error_policy='stop' rerror_policy='stop' discard='unmap'/>"
                        .to_owned(),
                );
                line(3, format!("<source protocol='nbd' name='{export}'>"));
                line(4, host);
                line(3, "</source>".to_owned());
            }
            None => {
                let message = format!("the disk {} has no socket: set `views` or `vhost_user` at its proxy", disk.disk);
                return Err(DriveError::Setup(message));
            }
        }
        line(3, format!("<target dev='{}' bus='virtio'/>", target(i)));
        if !disk.serial.is_empty() {
            line(3, format!("<serial>{}</serial>", text(&disk.serial)));
        }
        line(3, format!("<boot order='{}'/>", i + 1));
        line(2, "</disk>".to_owned());
    }
    if let Some(seed) = seed {
        line(2, "<disk type='file' device='disk'>".to_owned());
        line(3, "<driver name='qemu' type='raw'/>".to_owned());
        line(3, format!("<source file='{}'/>", text(&seed.to_string_lossy())));
        line(3, format!("<target dev='{}' bus='virtio'/>", target(said.disks.len())));
        line(3, "<readonly/>".to_owned());
        line(2, "</disk>".to_owned());
    }
    for (nic, way) in said.nics.iter().zip(ways) {
        let (kind, from) = match way {
            Way::Bridge(bridge) | Way::Own(bridge) => ("bridge", format!("<source bridge='{}'/>", text(bridge))),
            Way::Isolated(bridge) => ("network", format!("<source network='{}'/>", network_of(bridge))),
            // By the process itself, and without a cable.
            Way::Restricted | Way::Unplugged => ("user", String::new()),
        };
        line(2, format!("<interface type='{kind}'>"));
        if !from.is_empty() {
            line(3, from.clone());
        }
        if !nic.mac.is_empty() {
            line(3, format!("<mac address='{}'/>", text(&nic.mac)));
        }
        line(3, "<model type='virtio'/>".to_owned());
        if from.is_empty() {
            line(3, "<link state='down'/>".to_owned());
        }
        line(2, "</interface>".to_owned());
    }
    line(2, "<serial type='pty'/>".to_owned());
    line(2, "<console type='pty'/>".to_owned());
    line(1, "</devices>".to_owned());
    line(0, "</domain>".to_owned());
    Ok(xml)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{instance, validated};
    use super::*;
    use afterimage_wire::v1::{MachineDisk, Nic};

    fn settings() -> Libvirt {
        Libvirt {
            uri: "test:///default".into(),
            virsh: "virsh".into(),
            kind: "qemu".into(),
            networks: [("lan".to_owned(), "br0".to_owned())].into(),
            seeds: "/seeds".into(),
        }
    }

    fn domain(instance: &Instance, said: &StartInstance) -> String {
        let test = instance.role == MachineRole::Test;
        let way = |nic: &Nic| match nic.network.as_str() {
            "none" => Way::Unplugged,
            _ if test => Way::Isolated("aib1".into()),
            _ => Way::Bridge("br0".into()),
        };
        let ways: Vec<Way> = said.nics.iter().map(way).collect();
        super::domain(&settings(), instance, said, &ways, Some(Path::new("/seeds/web.img"))).unwrap()
    }

    fn said(firmware: Firmware) -> StartInstance {
        let disk = |name: &str, uri: &str| MachineDisk {
            disk: name.into(),
            serial: "abc-1".into(),
            uris: vec!["ublk:/dev/ublkb0".into(), uri.into()],
            ..MachineDisk::default()
        };
        StartInstance {
            cpus: 4,
            memory_bytes: 2 << 30,
            firmware: firmware.into(),
            disks: vec![
                disk("data", "nbd+unix:///shop.failover/data?socket=/run/a&b.sock"),
                disk("log", "nbd://dr.example:10809/shop.failover/log"),
                disk("tmp", "vhost-user:/run/v/shop.failover-tmp.sock"),
            ],
            nics: ["lan", "none"]
                .map(|network| Nic { mac: "52:54:00:00:00:01".into(), network: network.into(), ..Nic::default() })
                .into(),
            ..StartInstance::default()
        }
    }

    #[test]
    fn a_domain_is_as_libvirts_own_schema_has_it() {
        for role in [MachineRole::Replica, MachineRole::Test] {
            for firmware in [Firmware::Bios, Firmware::Uefi] {
                let xml = domain(&Instance { role, ..instance("/s") }, &said(firmware));
                validated("domain", &xml);
            }
        }
        validated("network", &isolated_network("aib1"));
    }

    #[test]
    fn disks_come_in_order_and_names_are_escaped() {
        let xml = domain(&instance("/s"), &said(Firmware::Bios));
        assert!(
            xml.contains("socket='/run/a&amp;b.sock'") && xml.contains("<host name='dr.example' port='10809'/>"),
            "{xml}"
        );
        let places = ["<target dev='vda'", "<target dev='vdb'"].map(|dev| xml.find(dev).unwrap());
        assert!(places[0] < places[1]);
        assert!(
            xml.contains("<source type='unix' path='/run/v/shop.failover-tmp.sock'>") && xml.contains("mode='shared'"),
            "{xml}"
        );
        assert!(xml.contains("<source bridge='br0'/>"));
        assert_eq!(text("<a b='\"&\u{1}>"), "&lt;a b=&apos;&quot;&amp;&gt;");
        assert_eq!(
            (target(0), target(25), target(26), target(701), target(702)),
            ("vda".into(), "vdz".into(), "vdaa".into(), "vdzz".into(), "vdaaa".into())
        );
    }

    #[test]
    fn a_test_has_no_way_out_and_what_is_unplugged_stays_so() {
        let test = domain(&Instance { role: MachineRole::Test, ..instance("/s") }, &said(Firmware::Bios));
        assert!(
            test.contains("<source network='afterimage-aib1'/>") && !test.contains("br0") && !test.contains("<uuid>")
        );
        assert!(!isolated_network("aib1").contains("forward") && !isolated_network("aib1").contains("<ip"));
        assert_eq!(test.matches("<link state='down'/>").count(), 1, "{test}");
    }

    #[test]
    fn the_seed_is_the_last_disk_and_is_only_read() {
        let xml = domain(&instance("/s"), &said(Firmware::Bios));
        let seed = &xml[xml.find("<source file='/seeds/web.img'/>").unwrap()..];
        assert!(seed.contains("<target dev='vdd' bus='virtio'/>\n      <readonly/>"), "{xml}");
    }
}
