//! The operator's commands: told on standard input and in the environment what is to be done, they answer by their exit
//! code: 0 is yes, 3 is no, anything else is that they cannot say.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use afterimage_wire::v1::{Firmware, MachineRole, Nic, StartInstance};
use serde_json::{Value, json};

use super::super::config::machines::Hook;
use super::super::keep;
use super::ways::Way;
use super::{DriveError, Instance, Networks, Stand, command, seed, ways};

/// An instance that is driven by commands.
pub struct Hooked {
    hook: Hook,
    networks: Networks,
    instance: Instance,
}

/// An interface, as a command is told: where it leads, and what it is to be addressed by.
struct Plugged {
    way: Option<Way>,
    addressed: seed::Addressed,
}

impl Plugged {
    /// The operator's bridge, or the name of a network of the test's own: the command makes that.
    fn leads(&self) -> (Option<&str>, Option<&str>) {
        match &self.way {
            Some(Way::Bridge(bridge)) => (Some(bridge), None),
            Some(Way::Isolated(name)) => (None, Some(name)),
            _ => (None, None),
        }
    }
}

fn role(role: MachineRole) -> &'static str {
    match role {
        MachineRole::Source => "source",
        MachineRole::Test => "test",
        MachineRole::Replica | MachineRole::Unspecified => "replica",
    }
}

fn definition(said: &StartInstance, plugged: &[Plugged]) -> Value {
    let text = |list: &[std::net::IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let nic = |(nic, plugged): (&Nic, &Plugged)| {
        let (bridge, isolated) = plugged.leads();
        json!({
            "mac": nic.mac,
            "network": nic.network,
            "bridge": bridge,
            "isolated": isolated,
            "unplugged": plugged.way == Some(Way::Unplugged),
            "addresses": plugged.addressed.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "gateways": text(&plugged.addressed.gateways),
            "name_servers": text(&plugged.addressed.name_servers),
        })
    };
    let disk = |disk: &afterimage_wire::v1::MachineDisk| {
        json!({
            "disk": disk.disk,
            "serial": disk.serial,
            "size_bytes": disk.size_bytes,
            "export": disk.export_name,
            "uris": disk.uris,
        })
    };
    json!({
        "cpus": said.cpus,
        "memory_bytes": said.memory_bytes,
        "firmware": if said.firmware() == Firmware::Uefi { "uefi" } else { "bios" },
        "nics": said.nics.iter().zip(plugged).map(nic).collect::<Vec<_>>(),
        "disks": said.disks.iter().map(disk).collect::<Vec<_>>(),
    })
}

/// Whether a hook says yes or no.
///
/// # Errors
/// It says neither.
fn ask(
    hook: &Hook,
    instance: &Instance,
    action: &str,
    more: Value,
    variables: Vec<(String, String)>,
    deadline: Duration,
) -> Result<(bool, String), DriveError> {
    let words = match action {
        "start" => &hook.start,
        "stop" => &hook.stop,
        "ready" => &hook.ready,
        _ => &hook.probe,
    };
    let mut document = json!({
        "action": action,
        "machine": instance.name,
        "uid": instance.uid,
        "instance": instance.called,
        "role": role(instance.role),
    });
    if let (Value::Object(all), Value::Object(more)) = (&mut document, more) {
        all.extend(more);
    }
    let mut all = vec![
        ("AFTERIMAGE_ACTION", action.to_owned()),
        ("AFTERIMAGE_MACHINE", instance.name.clone()),
        ("AFTERIMAGE_INSTANCE", instance.called.clone()),
        ("AFTERIMAGE_ROLE", role(instance.role).to_owned()),
    ];
    all.extend(variables.iter().map(|(name, value)| (name.as_str(), value.clone())));
    let name = format!("the {action} command of the hook \"{}\"", instance.profile);
    if words.is_empty() {
        return Err(DriveError::Setup(format!("{name} is not set in this proxy's configuration")));
    }
    command::ask(&name, words, document.to_string().as_bytes(), &all, deadline)
}

/// Whether the `ready` command of a hook says that a machine answers.
///
/// # Errors
/// Why not.
pub fn ready(hook: &Hook, instance: &Instance) -> Result<(), String> {
    match ask(hook, instance, "ready", json!({}), Vec::new(), hook.deadline) {
        Ok((true, _)) => Ok(()),
        Ok((false, said)) => Err(said),
        Err(error) => Err(error.to_string()),
    }
}

impl Hooked {
    /// By these commands, in these networks.
    pub fn new(hook: Hook, networks: Networks, instance: Instance) -> Self {
        Self { hook, networks, instance }
    }

    fn ask(&self, action: &str, more: Value, deadline: Duration) -> Result<(bool, String), DriveError> {
        ask(&self.hook, &self.instance, action, more, Vec::new(), deadline)
    }

    /// Where its interfaces lead. Where there is no map the commands know by themselves.
    fn plugged(&self, said: &StartInstance) -> Result<Vec<Plugged>, DriveError> {
        let ways: Vec<Option<Way>> = match self.networks.is_empty() {
            true => said.nics.iter().map(|_| None).collect(),
            false => {
                let ways = ways::of(&self.networks, &BTreeMap::new(), true, &self.instance, said)?;
                ways.into_iter().map(Some).collect()
            }
        };
        let addressed = seed::addresses(&self.networks, &self.instance, said)?;
        Ok(ways.into_iter().zip(addressed).map(|(way, addressed)| Plugged { way, addressed }).collect())
    }

    /// Looks whether it could be started.
    pub fn check(&self, said: &StartInstance) -> Result<(), DriveError> {
        self.plugged(said).map(drop)
    }

    /// Switches it on.
    pub fn start(&self, said: &StartInstance) -> Result<Stand, DriveError> {
        let plugged = self.plugged(said)?;
        let mut variables = vec![("AFTERIMAGE_NICS".to_owned(), said.nics.len().to_string())];
        for (i, (nic, plugged)) in said.nics.iter().zip(&plugged).enumerate() {
            let (bridge, isolated) = plugged.leads();
            let all = [
                ("MAC", nic.mac.as_str()),
                ("NETWORK", nic.network.as_str()),
                ("BRIDGE", bridge.unwrap_or_default()),
                ("ISOLATED", isolated.unwrap_or_default()),
            ];
            variables.extend(all.map(|(name, value)| (format!("AFTERIMAGE_NIC{i}_{name}"), value.to_owned())));
        }
        let mut more = definition(said, &plugged);
        if let Some(seed) = seed::of(&self.networks, &self.instance, said)? {
            let path = self.instance.folder.join("seed.img");
            keep::folder(&self.instance.folder)
                .map_err(|error| DriveError::failed(format!("{}: {error}", self.instance.folder.display())))?;
            seed.write(&path)?;
            let path = path.to_string_lossy().into_owned();
            more["seed"] = json!(path);
            variables.push(("AFTERIMAGE_SEED".to_owned(), path));
        }
        match ask(&self.hook, &self.instance, "start", more, variables, self.hook.deadline)? {
            (true, said) => Ok(Stand::on(said)),
            (false, said) => {
                Err(DriveError::failed(format!("the hook \"{}\" does not start it: {said}", self.instance.profile)))
            }
        }
    }

    /// Switches it off; the command knows how long the machine has to do so itself.
    pub fn stop(&self, within: Duration) -> Result<Stand, DriveError> {
        let more = json!({"within_ms": within.as_millis() as u64});
        Ok(match self.ask("stop", more, within + self.hook.deadline)? {
            (true, said) => {
                let _ = fs::remove_dir_all(&self.instance.folder);
                Stand::off(said)
            }
            (false, said) => Stand::on(said),
        })
    }

    /// Whether it is on.
    pub fn probe(&self) -> Result<Stand, DriveError> {
        Ok(match self.ask("probe", json!({}), self.hook.deadline)? {
            (true, said) => Stand::on(said),
            (false, said) => Stand::off(said),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::config::machines::Network;
    use super::super::super::config::machines::networks::Rule;
    use super::*;
    use afterimage_wire::v1::MachineDisk;

    fn hooked(script: &str, deadline: Duration) -> Hooked {
        let words: Vec<String> = ["/bin/sh", "-c", script].map(str::to_owned).into();
        let hook = Hook { start: words.clone(), stop: words.clone(), probe: words, ready: Vec::new(), deadline };
        Hooked::new(hook, Networks::new(), super::super::tests::instance("/nowhere"))
    }

    #[test]
    fn exit_codes_are_yes_no_and_cannot_say() {
        let probe = |script: &str| hooked(script, Duration::from_secs(10)).probe();
        assert_eq!(probe("echo up"), Ok(Stand::on("up")));
        assert_eq!(probe("exit 3"), Ok(Stand::off("")));
        let error = probe("echo no route >&2; exit 1").unwrap_err().to_string();
        assert!(error.contains("ended with 1: no route") && error.contains("\"default\""), "{error}");
        let error = hooked("sleep 9", Duration::from_millis(50)).probe().unwrap_err().to_string();
        assert!(error.contains("not done within 0.05 s"), "{error}");
    }

    #[test]
    fn a_hook_is_told_everything_as_json_and_the_gist_as_variables() {
        let said = StartInstance {
            cpus: 2,
            memory_bytes: 1 << 30,
            disks: vec![MachineDisk { disk: "data".into(), uris: vec!["nbd://h/x".into()], ..MachineDisk::default() }],
            ..StartInstance::default()
        };
        let stand =
            hooked("cat; echo $AFTERIMAGE_ACTION $AFTERIMAGE_INSTANCE $AFTERIMAGE_ROLE", Duration::from_secs(10))
                .start(&said);
        let text = stand.unwrap().detail;
        assert!(text.contains(r#""uris":["nbd://h/x"]"#) && text.contains(r#""cpus":2"#), "{text}");
        assert!(text.ends_with("start web replica"), "{text}");
    }

    #[test]
    fn a_hook_is_told_where_interfaces_lead_and_given_the_seed() {
        let dir = tempfile::tempdir().unwrap();
        let rule = Rule { from: "192.0.2.0/24".parse().unwrap(), to: "198.51.100.0/24".parse().unwrap() };
        let lan = Network { bridge: Some("br-dr".into()), rules: vec![rule], ..Network::default() };
        let nic = Nic { mac: "52:54:00:00:00:01".into(), network: "lan".into(), ..Nic::default() };
        let nic = Nic { addresses: vec!["192.0.2.7/24".into()], ..nic };
        let said = StartInstance { nics: vec![nic], isolation: "t".into(), ..StartInstance::default() };
        let script = "[ $AFTERIMAGE_ACTION = stop ] && exit; cat; echo $AFTERIMAGE_NICS $AFTERIMAGE_NIC0_MAC $AFTERIMAGE_NIC0_BRIDGE; wc -c <$AFTERIMAGE_SEED";
        let mut hooked = hooked(script, Duration::from_secs(10));
        hooked.networks = [("lan".to_owned(), lan)].into();
        hooked.instance = super::super::tests::instance(dir.path().to_str().unwrap());
        let text = hooked.start(&said).unwrap().detail;
        assert!(text.contains(r#""addresses":["198.51.100.7/24"],"bridge":"br-dr""#), "{text}");
        assert!(text.ends_with("1 52:54:00:00:00:01 br-dr 524288"), "{text}");
        hooked.stop(Duration::ZERO).unwrap();
        assert!(!hooked.instance.folder.exists());

        hooked.instance.role = MachineRole::Test;
        let text = hooked.start(&said).unwrap().detail;
        assert!(text.contains(r#""bridge":null"#) && text.contains(r#""isolated":"aib"#), "{text}");
        let unknown = StartInstance { nics: vec![Nic { network: "dmz".into(), ..Nic::default() }], ..said };
        hooked.instance.role = MachineRole::Replica;
        assert!(hooked.check(&unknown).unwrap_err().to_string().contains("\"dmz\" of web"));
        hooked.networks.clear();
        assert_eq!(hooked.check(&unknown), Ok(()), "without a map the commands know");
    }

    #[test]
    fn a_command_that_is_not_set_is_named() {
        let hook = hooked("", Duration::from_secs(1));
        let why = ready(&hook.hook, &hook.instance).unwrap_err();
        assert!(why.contains("the ready command of the hook \"default\" is not set"), "{why}");
    }
}
