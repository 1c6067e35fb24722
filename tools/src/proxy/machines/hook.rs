//! The operator's commands: told on standard input and in the environment what is to be done, they answer by their exit
//! code: 0 is yes, 3 is no, anything else is that they cannot say.

use std::time::Duration;

use afterimage_wire::v1::{Firmware, MachineRole, StartInstance};
use serde_json::{Value, json};

use super::super::config::machines::Hook;
use super::{DriveError, Instance, Stand, command};

/// An instance that is driven by commands.
pub struct Hooked {
    hook: Hook,
    instance: Instance,
}

fn role(role: MachineRole) -> &'static str {
    match role {
        MachineRole::Source => "source",
        MachineRole::Test => "test",
        MachineRole::Replica | MachineRole::Unspecified => "replica",
    }
}

fn definition(said: &StartInstance) -> Value {
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
        "nics": said.nics.iter().map(|nic| json!({"mac": nic.mac, "network": nic.network})).collect::<Vec<_>>(),
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
    let variables = [
        ("AFTERIMAGE_ACTION", action.to_owned()),
        ("AFTERIMAGE_MACHINE", instance.name.clone()),
        ("AFTERIMAGE_INSTANCE", instance.called.clone()),
        ("AFTERIMAGE_ROLE", role(instance.role).to_owned()),
    ];
    let name = format!("the {action} command of the hook \"{}\"", instance.profile);
    if words.is_empty() {
        return Err(DriveError::Setup(format!("{name} is not set in this proxy's configuration")));
    }
    command::ask(&name, words, document.to_string().as_bytes(), &variables, deadline)
}

/// Whether the `ready` command of a hook says that a machine answers.
///
/// # Errors
/// Why not.
pub fn ready(hook: &Hook, instance: &Instance) -> Result<(), String> {
    match ask(hook, instance, "ready", json!({}), hook.deadline) {
        Ok((true, _)) => Ok(()),
        Ok((false, said)) => Err(said),
        Err(error) => Err(error.to_string()),
    }
}

impl Hooked {
    /// By these commands.
    pub fn new(hook: Hook, instance: Instance) -> Self {
        Self { hook, instance }
    }

    fn ask(&self, action: &str, more: Value, deadline: Duration) -> Result<(bool, String), DriveError> {
        ask(&self.hook, &self.instance, action, more, deadline)
    }

    /// Switches it on.
    pub fn start(&self, said: &StartInstance) -> Result<Stand, DriveError> {
        match self.ask("start", definition(said), self.hook.deadline)? {
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
            (true, said) => Stand::off(said),
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
    use super::*;
    use afterimage_wire::v1::MachineDisk;

    fn hooked(script: &str, deadline: Duration) -> Hooked {
        let words: Vec<String> = ["/bin/sh", "-c", script].map(str::to_owned).into();
        let hook = Hook { start: words.clone(), stop: words.clone(), probe: words, ready: Vec::new(), deadline };
        Hooked::new(hook, super::super::tests::instance("/nowhere"))
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
    fn a_command_that_is_not_set_is_named() {
        let hook = hooked("", Duration::from_secs(1));
        let why = ready(&hook.hook, &hook.instance).unwrap_err();
        assert!(why.contains("the ready command of the hook \"default\" is not set"), "{why}");
    }
}
