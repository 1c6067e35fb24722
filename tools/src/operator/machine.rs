//! `afterimage machine`: what runs from a group's disks, and by what failovers start and stop it.

use afterimage_wire::v1;
use clap::{Args, Subcommand, ValueEnum};
use prost_types::FieldMask;
use uuid::Uuid;

use super::documents::{self, driver_word, id, power_word};
use super::failure::{Failure, Kind};
use super::output::{Mood, fields, state, table, text};
use super::session::{Session, Which, every};
use super::values::{duration_ns, show_duration, show_size, show_time, size};

/// Verbs of `afterimage machine`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Create a machine of a group's disks; what is not given has the default that is named.
    #[command(after_help = "Examples:\n  \
        afterimage machine create web --group shop --target qemu --cpus 2 --memory 4GiB --nic lan\n  \
        afterimage machine create web --group shop --source libvirt --source-name web01 --target libvirt\n  \
        afterimage machine create db --group shop --disk data --disk log --target hook:db --ready hook:db\n  \
        afterimage machine create web --group shop --source hook:ipmi --source-proxy dr --target qemu\n  \
        afterimage machine create web --group shop --target qemu \\\n    \
        --nic lan=52:54:00:12:34:56,address=192.0.2.7/24,gateway=192.0.2.1,dns=192.0.2.53\n\n\
        A driver is none, hook, qemu or libvirt; behind a colon stands which of its settings in the proxy's own\n\
        configuration: [machines.hook.db] there. With --source-proxy a proxy elsewhere, such as the target, confirms\n\
        that the machine is off when its own site is gone: then a failover needs no other confirmation.")]
    Create {
        /// The machine's name: a-z, 0-9 and "-", at most 63 characters.
        machine: String,
        /// Its group.
        #[arg(long, value_name = "GROUP")]
        group: String,
        #[command(flatten)]
        wanted: Wanted,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// List the machines.
    #[command(after_help = "Examples:\n  \
        afterimage machine list\n  \
        afterimage machine list --filter 'group:shop AND target.driver = DRIVER_QEMU'")]
    List {
        #[command(flatten)]
        which: Which,
    },
    /// Show a machine.
    Show {
        /// The machine's name.
        machine: String,
    },
    /// Change a machine; what is not given stays.
    #[command(after_help = "Examples:\n  \
        afterimage machine update web --memory 8GiB --stop-within 5m\n  \
        afterimage machine update web --ready console:login:")]
    Update {
        /// The machine's name.
        machine: String,
        #[command(flatten)]
        wanted: Wanted,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// Forget a machine; nothing is stopped.
    Delete {
        /// The machine's name.
        machine: String,
    },
    /// Ask whether a machine is on, at its source and at its target, and what would keep its replica from being started.
    #[command(after_help = "Examples:\n  afterimage machine probe web")]
    Probe {
        /// The machine's name.
        machine: String,
    },
}

/// The fields of a machine.
#[derive(Args, Debug, Default)]
pub struct Wanted {
    /// A disk of the group, in the machine's order; may be given many times; "" for all [default: all].
    #[arg(long = "disk", value_name = "DISK")]
    disks: Vec<String>,
    /// Processors [default: 1].
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<u32>,
    /// Memory, such as 4GiB [default: 1GiB].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// What it starts with [default: bios].
    #[arg(long, value_name = "FIRMWARE")]
    firmware: Option<Firmware>,
    /// A network interface: its network, and its address if that matters; then what the guest is addressed by at the source,
    /// where that is to change with the site: ,address=IP/LENGTH ,gateway=IP ,dns=IP, and ,at-target=IP/LENGTH where no rule
    /// of the target's fits. May be given many times; "" for none.
    #[arg(long = "nic", value_name = "NETWORK[=MAC][,address=…]", value_parser = nic)]
    nics: Vec<v1::Nic>,
    /// By what it is driven at its source [default: none].
    #[arg(long, value_name = "DRIVER[:PROFILE]", value_parser = driver)]
    source: Option<(v1::Driver, String)>,
    /// The proxy that does it there; "" for the group's own [default: the group's].
    #[arg(long, value_name = "PROXY")]
    source_proxy: Option<String>,
    /// What it is called there, such as a domain of libvirt; "" for the machine's name [default: its name].
    #[arg(long, value_name = "NAME")]
    source_name: Option<String>,
    /// By what its replica is driven at its target [default: none].
    #[arg(long, value_name = "DRIVER[:PROFILE]", value_parser = driver)]
    target: Option<(v1::Driver, String)>,
    /// The proxy that does it there; "" for the group's own [default: the group's].
    #[arg(long, value_name = "PROXY")]
    target_proxy: Option<String>,
    /// What the replica is called there; "" for the machine's name [default: its name].
    #[arg(long, value_name = "NAME")]
    target_name: Option<String>,
    /// When its replica counts as answering: running, tcp:HOST:PORT, console:TEXT (qemu), hook:NAME [default: running].
    #[arg(long, value_name = "WHAT", value_parser = ready)]
    ready: Option<v1::Readiness>,
    /// How long its replica has to answer, at least 1s [default: 5m].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    ready_within: Option<u64>,
    /// How long it has to switch itself off before its power is cut; 0s for at once [default: 2m].
    #[arg(long, value_name = "DURATION", value_parser = duration_ns)]
    stop_within: Option<u64>,
    /// For people.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
}

#[derive(ValueEnum, Debug, Clone, Copy)]
enum Firmware {
    /// BIOS.
    Bios,
    /// UEFI.
    Uefi,
}

fn driver(word: &str) -> Result<(v1::Driver, String), String> {
    let (driver, profile) = word.split_once(':').unwrap_or((word, ""));
    let driver = match driver {
        "none" => v1::Driver::None,
        "hook" => v1::Driver::Hook,
        "qemu" => v1::Driver::Qemu,
        "libvirt" => v1::Driver::Libvirt,
        _ => return Err("it is none, hook, qemu or libvirt, and :PROFILE if not default".to_owned()),
    };
    Ok((driver, profile.to_owned()))
}

/// When a machine counts as answering, as it is typed.
pub fn ready(word: &str) -> Result<v1::Readiness, String> {
    let (kind, value) = word.split_once(':').unwrap_or((word, ""));
    let kind = match (kind, value.is_empty()) {
        ("running", true) => v1::ReadinessKind::Running,
        ("tcp", false) => v1::ReadinessKind::Tcp,
        ("console", false) => v1::ReadinessKind::Console,
        ("hook", false) => v1::ReadinessKind::Hook,
        _ => return Err("it is running, tcp:HOST:PORT, console:TEXT or hook:NAME".to_owned()),
    };
    Ok(v1::Readiness { kind: kind.into(), value: value.to_owned() })
}

/// A network interface, as it is typed; empty for none.
fn nic(word: &str) -> Result<v1::Nic, String> {
    let mut parts = word.split(',');
    let (network, mac) = parts.next().map(|first| first.split_once('=').unwrap_or((first, ""))).unwrap_or_default();
    let mut nic = v1::Nic { network: network.to_owned(), mac: mac.to_owned(), ..v1::Nic::default() };
    for part in parts {
        let list = match part.split_once('=') {
            Some(("address", _)) => &mut nic.addresses,
            Some(("gateway", _)) => &mut nic.gateways,
            Some(("dns", _)) => &mut nic.name_servers,
            Some(("at-target", _)) => &mut nic.target_addresses,
            _ => return Err(format!("{part:?} is not address=IP/LENGTH, gateway=IP, dns=IP or at-target=IP/LENGTH")),
        };
        list.extend(part.split_once('=').map(|(_, value)| value.to_owned()));
    }
    Ok(nic)
}

fn ms(ns: u64, option: &str) -> Result<u64, Failure> {
    if ns.is_multiple_of(1_000_000) {
        return Ok(ns / 1_000_000);
    }
    Err(Failure::usage(format!("{option}: {} is not a whole number of milliseconds", show_duration(ns))))
}

impl Wanted {
    /// Writes what was given over what is there.
    fn over(&self, session: &Session, machine: &mut v1::Machine) -> Result<(), Failure> {
        let given = |list: &[String]| list.iter().filter(|text| !text.is_empty()).cloned().collect::<Vec<_>>();
        if !self.disks.is_empty() {
            machine.disks = given(&self.disks);
        }
        if let Some(cpus) = self.cpus {
            machine.cpus = cpus;
        }
        if let Some(memory) = self.memory {
            machine.memory_bytes = memory;
        }
        match self.firmware {
            Some(Firmware::Bios) => machine.set_firmware(v1::Firmware::Bios),
            Some(Firmware::Uefi) => machine.set_firmware(v1::Firmware::Uefi),
            None => {}
        }
        if !self.nics.is_empty() {
            machine.nics = self.nics.iter().filter(|nic| !nic.network.is_empty()).cloned().collect();
        }
        let proxy = |proxy: &String| if proxy.is_empty() { String::new() } else { session.proxy(proxy) };
        let over =
            |place: &mut Option<v1::MachinePlace>, by: &Option<(v1::Driver, String)>, at, name: &Option<String>| {
                let place = place.get_or_insert_default();
                if let Some((driver, profile)) = by {
                    place.set_driver(*driver);
                    place.profile.clone_from(profile);
                }
                let at: &Option<String> = at;
                if let Some(at) = at {
                    place.proxy = proxy(at);
                }
                if let Some(name) = name {
                    place.machine.clone_from(name);
                }
            };
        if self.mask().paths.iter().any(|p| p == "source") {
            over(&mut machine.source, &self.source, &self.source_proxy, &self.source_name);
        }
        if self.mask().paths.iter().any(|p| p == "target") {
            over(&mut machine.target, &self.target, &self.target_proxy, &self.target_name);
        }
        if self.ready.is_some() {
            machine.readiness.clone_from(&self.ready);
        }
        if let Some(ns) = self.ready_within {
            machine.ready_within_ms = Some(ms(ns, "--ready-within")?);
        }
        if let Some(ns) = self.stop_within {
            machine.stop_within_ms = Some(ms(ns, "--stop-within")?);
        }
        if let Some(description) = &self.description {
            machine.description.clone_from(description);
        }
        Ok(())
    }

    /// The fields that were given.
    fn mask(&self) -> FieldMask {
        let given = [
            ("disks", !self.disks.is_empty()),
            ("cpus", self.cpus.is_some()),
            ("memory_bytes", self.memory.is_some()),
            ("firmware", self.firmware.is_some()),
            ("nics", !self.nics.is_empty()),
            ("source", self.source.is_some() || self.source_proxy.is_some() || self.source_name.is_some()),
            ("target", self.target.is_some() || self.target_proxy.is_some() || self.target_name.is_some()),
            ("readiness", self.ready.is_some()),
            ("ready_within_ms", self.ready_within.is_some()),
            ("stop_within_ms", self.stop_within.is_some()),
            ("description", self.description.is_some()),
        ];
        FieldMask { paths: given.into_iter().filter(|(_, is)| *is).map(|(field, _)| field.to_owned()).collect() }
    }
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::Create { machine, group, wanted, dry_run } => {
            let mut made = v1::Machine { group: session.group(&group), ..v1::Machine::default() };
            wanted.over(session, &mut made)?;
            let request = v1::CreateMachineRequest {
                parent: session.tenant(),
                machine_id: machine.clone(),
                machine: Some(made),
                validate_only: dry_run,
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&machine), session.machines().create_machine(request)).await?;
            out.show(&documents::machine(&made), || shown(&made));
        }
        Verb::List { which } => {
            let request =
                v1::ListMachinesRequest { parent: session.tenant(), filter: which.filter, ..Default::default() };
            let machines: Vec<v1::Machine> = every!(session, "machines", machines.list_machines(request).machines);
            let document = machines.iter().map(documents::machine).collect::<Vec<_>>();
            out.show(&serde_json::json!({"machines": document}), || listed(&machines));
        }
        Verb::Show { machine } => {
            let found = get(session, &machine).await?;
            out.show(&documents::machine(&found), || shown(&found));
        }
        Verb::Update { machine, wanted, dry_run } => {
            if wanted.mask().paths.is_empty() {
                return Err(Failure::new(Kind::Usage, object(&machine), "nothing to change was given")
                    .hint("name what changes, for instance --memory 8GiB; see afterimage machine update --help"));
            }
            let mut changed = get(session, &machine).await?;
            wanted.over(session, &mut changed)?;
            let request = v1::UpdateMachineRequest {
                machine: Some(changed),
                validate_only: dry_run,
                update_mask: Some(wanted.mask()),
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&machine), session.machines().update_machine(request)).await?;
            out.show(&documents::machine(&made), || shown(&made));
        }
        Verb::Delete { machine } => {
            let found = get(session, &machine).await?;
            let request = v1::DeleteMachineRequest { name: found.name, etag: found.etag, ..Default::default() };
            session.ask(object(&machine), session.machines().delete_machine(request)).await?;
            out.show(&serde_json::json!({"deleted": {"machine": machine}}), || format!("machine {machine} deleted"));
        }
        Verb::Probe { machine } => {
            let request = v1::ProbeMachineRequest { name: session.machine(&machine) };
            let found = session.ask(object(&machine), session.machines().probe_machine(request)).await?;
            out.show(&documents::probe(&machine, &found), || probed(&found));
        }
    }
    Ok(())
}

async fn get(session: &Session, machine: &str) -> Result<v1::Machine, Failure> {
    let request = v1::GetMachineRequest { name: session.machine(machine) };
    session.ask(object(machine), session.machines().get_machine(request)).await
}

fn object(machine: &str) -> String {
    format!("machine \"{machine}\"")
}

fn place(place: Option<&v1::MachinePlace>) -> String {
    let Some(place) = place else { return "none".to_owned() };
    let mut shown = driver_word(place.driver()).to_owned();
    if place.driver() == v1::Driver::None {
        return shown;
    }
    if place.profile != "default" {
        shown += &format!(":{}", place.profile);
    }
    if !place.proxy.is_empty() {
        shown += &format!(" by {}", id(&place.proxy));
    }
    if !place.machine.is_empty() {
        shown += &format!(", called {}", place.machine);
    }
    shown
}

fn ready_shown(machine: &v1::Machine) -> String {
    documents::ready_word(machine.readiness.as_ref())
}

fn stands(machine: &v1::Machine) -> (&'static str, Mood) {
    match (machine.runs_from.is_empty(), machine.stopped_at_source) {
        (false, _) => ("at its target", Mood::Care),
        (true, true) => ("stopped", Mood::Care),
        (true, false) => ("at its source", Mood::Good),
    }
}

fn listed(machines: &[v1::Machine]) -> String {
    if machines.is_empty() {
        return "no machines; create one: afterimage machine create web --group GROUP".to_owned();
    }
    table(
        &["MACHINE", "GROUP", "RUNS", ">CPUS", ">MEMORY", "SOURCE", "TARGET"],
        machines.iter().map(|machine| {
            let (word, mood) = stands(machine);
            vec![
                text(id(&machine.name)),
                text(id(&machine.group)),
                state(word, mood),
                text(machine.cpus.to_string()),
                text(show_size(machine.memory_bytes)),
                text(place(machine.source.as_ref())),
                text(place(machine.target.as_ref())),
            ]
        }),
    )
}

fn shown(machine: &v1::Machine) -> String {
    let within = |ms: Option<u64>| ms.map_or_else(String::new, |ms| show_duration(ms.saturating_mul(1_000_000)));
    let nic = |nic: &v1::Nic| {
        let mut all = vec![nic.network.clone(), nic.mac.clone()];
        all.extend(nic.addresses.iter().cloned());
        all.extend(nic.target_addresses.iter().map(|address| format!("(at its target {address})")));
        all.retain(|part| !part.is_empty());
        all.join(" ")
    };
    let disks = if machine.disks.is_empty() { "all".to_owned() } else { machine.disks.join(" ") };
    let firmware = if machine.firmware() == v1::Firmware::Uefi { "uefi" } else { "bios" };
    fields(&[
        ("machine", id(&machine.name).to_owned()),
        ("description", machine.description.clone()),
        ("group", id(&machine.group).to_owned()),
        ("runs", stands(machine).0.to_owned()),
        ("from view", id(&machine.runs_from).to_owned()),
        ("disks", disks),
        ("processors", machine.cpus.to_string()),
        ("memory", show_size(machine.memory_bytes)),
        ("firmware", firmware.to_owned()),
        ("networks", machine.nics.iter().map(nic).collect::<Vec<_>>().join(", ")),
        ("source", place(machine.source.as_ref())),
        ("target", place(machine.target.as_ref())),
        ("ready when", ready_shown(machine)),
        ("ready within", within(machine.ready_within_ms)),
        ("stop within", within(machine.stop_within_ms)),
        ("uid", machine.uid.clone()),
        ("version", machine.version.to_string()),
        ("created", show_time(machine.create_time_ns)),
        ("updated", show_time(machine.update_time_ns)),
    ])
}

fn probed(found: &v1::ProbeMachineResponse) -> String {
    let at = |at: &Option<v1::MachineState>| match at {
        None => "nobody drives it there".to_owned(),
        Some(state) => {
            let ready = if state.ready { ", and answers" } else { "" };
            let detail = if state.detail.is_empty() { String::new() } else { format!(": {}", state.detail) };
            format!("{}{ready}{detail}", power_word(state.power()))
        }
    };
    let mut all = vec![("source", at(&found.source)), ("target", at(&found.target))];
    if !found.hindrance.is_empty() {
        all.push(("hindrance", format!("its replica could not be started: {}", found.hindrance)));
    }
    fields(&all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_and_readiness_are_read_or_explained() {
        assert_eq!(driver("hook:ipmi"), Ok((v1::Driver::Hook, "ipmi".into())));
        assert_eq!(driver("qemu"), Ok((v1::Driver::Qemu, String::new())));
        assert!(driver("xen").unwrap_err().contains("libvirt"));
        let ready = |word| super::ready(word).map(|r| (r.kind(), r.value));
        assert_eq!(ready("console:login:"), Ok((v1::ReadinessKind::Console, "login:".into())));
        assert_eq!(ready("tcp:[::1]:22"), Ok((v1::ReadinessKind::Tcp, "[::1]:22".into())));
        assert!(ready("tcp:").is_err() && ready("running:x").is_err() && ready("soon").is_err());
    }

    #[test]
    fn an_interface_is_read_or_explained() {
        let made =
            nic("lan=52:54:00:00:00:01,address=192.0.2.7/24,address=2001:db8::7/64,gateway=192.0.2.1,dns=192.0.2.53");
        let made = made.unwrap();
        assert_eq!((made.network.as_str(), made.mac.as_str()), ("lan", "52:54:00:00:00:01"));
        assert_eq!((made.addresses.len(), made.gateways.len(), made.name_servers.len()), (2, 1, 1));
        assert_eq!(nic("lan,at-target=10.0.0.7/8").unwrap().target_addresses, ["10.0.0.7/8"]);
        assert_eq!(nic("").unwrap(), v1::Nic::default());
        assert!(nic("lan,adress=192.0.2.7/24").unwrap_err().contains("at-target"));
    }

    #[test]
    fn a_table_of_machines_fits_100_columns() {
        let place = || {
            let mut place = v1::MachinePlace { proxy: "tenants/default/proxies/target-1".into(), ..Default::default() };
            place.set_driver(v1::Driver::Libvirt);
            Some(v1::MachinePlace { profile: "big".into(), machine: "web-01".into(), ..place })
        };
        let machine = v1::Machine {
            name: format!("tenants/default/machines/{}", "m".repeat(63)),
            group: format!("tenants/default/groups/{}", "g".repeat(63)),
            memory_bytes: 1 << 30,
            source: place(),
            target: place(),
            ..Default::default()
        };
        assert!(listed(&[machine]).lines().all(|line| line.chars().count() <= 100));
    }
}
