//! Machines as JSON.

use afterimage_wire::v1;
use serde_json::{Value, json};

use super::{id, json_time, null_if_empty};

/// Word for a driver of machines.
pub fn driver_word(driver: v1::Driver) -> &'static str {
    match driver {
        v1::Driver::Unspecified | v1::Driver::None => "none",
        v1::Driver::Hook => "hook",
        v1::Driver::Qemu => "qemu",
        v1::Driver::Libvirt => "libvirt",
    }
}

/// Word for whether a machine is on.
pub fn power_word(power: v1::MachinePower) -> &'static str {
    match power {
        v1::MachinePower::Unspecified => "unknown",
        v1::MachinePower::Off => "off",
        v1::MachinePower::On => "on",
    }
}

/// When a machine counts as answering, as the command line has it.
pub fn ready_word(readiness: Option<&v1::Readiness>) -> String {
    let Some(readiness) = readiness else { return "running".to_owned() };
    match readiness.kind() {
        v1::ReadinessKind::Unspecified | v1::ReadinessKind::Running => "running".to_owned(),
        v1::ReadinessKind::Tcp => format!("tcp:{}", readiness.value),
        v1::ReadinessKind::Console => format!("console:{}", readiness.value),
        v1::ReadinessKind::Hook => format!("hook:{}", readiness.value),
    }
}

fn nic(nic: &v1::Nic) -> Value {
    json!({
        "network": nic.network,
        "mac": nic.mac,
        "addresses": nic.addresses,
        "gateways": nic.gateways,
        "name_servers": nic.name_servers,
        "target_addresses": nic.target_addresses,
    })
}

/// A machine.
pub fn machine(machine: &v1::Machine) -> Value {
    let place = |place: Option<&v1::MachinePlace>| {
        let place = place.cloned().unwrap_or_default();
        json!({
            "driver": driver_word(place.driver()),
            "profile": place.profile,
            "proxy": null_if_empty(&place.proxy),
            "called": null_if_empty(&place.machine),
        })
    };
    json!({
        "machine": id(&machine.name),
        "uid": machine.uid,
        "version": machine.version,
        "description": machine.description,
        "group": id(&machine.group),
        "disks": machine.disks,
        "cpus": machine.cpus,
        "memory_bytes": machine.memory_bytes,
        "firmware": if machine.firmware() == v1::Firmware::Uefi { "uefi" } else { "bios" },
        "nics": machine.nics.iter().map(nic).collect::<Vec<_>>(),
        "source": place(machine.source.as_ref()),
        "target": place(machine.target.as_ref()),
        "ready": ready_word(machine.readiness.as_ref()),
        "ready_within_ms": machine.ready_within_ms,
        "stop_within_ms": machine.stop_within_ms,
        "stopped_at_source": machine.stopped_at_source,
        "runs_from": null_if_empty(&machine.runs_from),
        "created": json_time(machine.create_time_ns),
        "updated": json_time(machine.update_time_ns),
    })
}

/// How a machine stands at its places; null where nobody drives it.
pub fn probe(machine: &str, found: &v1::ProbeMachineResponse) -> Value {
    let at = |at: &Option<v1::MachineState>| {
        at.as_ref().map(|at| json!({"power": power_word(at.power()), "ready": at.ready, "detail": at.detail}))
    };
    json!({
        "machine": machine,
        "source": at(&found.source),
        "target": at(&found.target),
        "hindrance": null_if_empty(&found.hindrance),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_a_machine_is_stable() {
        let mut target = v1::MachinePlace { proxy: "tenants/default/proxies/dr".into(), ..Default::default() };
        target.set_driver(v1::Driver::Qemu);
        let document = machine(&v1::Machine {
            name: "tenants/default/machines/web".into(),
            group: "tenants/default/groups/shop".into(),
            target: Some(target),
            stop_within_ms: Some(0),
            runs_from: "tenants/default/groups/shop/views/failover".into(),
            ..Default::default()
        });
        let keys: Vec<&str> = document.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys.join(" "),
            "cpus created description disks firmware group machine memory_bytes nics ready ready_within_ms runs_from source \
             stop_within_ms stopped_at_source target uid updated version"
        );
        assert_eq!(document["target"], json!({"driver": "qemu", "profile": "", "proxy": "dr", "called": null}));
        assert_eq!(document["source"]["driver"], "none");
        assert_eq!((&document["runs_from"], &document["stop_within_ms"]), (&json!("failover"), &json!(0)));
        let state = v1::MachineState { ready: true, ..Default::default() };
        let found = v1::ProbeMachineResponse { source: None, target: Some(state), hindrance: "no bridge".into() };
        let probed = probe("web", &found);
        assert_eq!(probed["hindrance"], "no bridge");
        assert_eq!(probed["target"], json!({"power": "unknown", "ready": true, "detail": ""}));
        assert_eq!(probed["source"], Value::Null);
    }
}
