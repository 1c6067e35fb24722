//! A machine as a domain of libvirt's, by `virsh`. At its source it is defined already, and left so; a replica is defined when
//! it is started and undefined when it is off.

use std::fs;
use std::time::{Duration, Instant};

use afterimage_wire::v1::{MachineRole, StartInstance};

use super::super::config::machines::Libvirt;
use super::super::keep;
use super::{DriveError, Instance, Stand, command, short, xml};

/// How long one call of `virsh` may take.
const CALL: Duration = Duration::from_secs(30);
/// Between two looks at a domain that is being switched off.
const POLL: Duration = Duration::from_millis(250);
/// The guest is asked again to switch itself off after so long.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How long a domain has to be off once its power is cut.
const END: Duration = Duration::from_secs(10);

/// An instance that is a domain.
pub struct Domain {
    settings: Libvirt,
    instance: Instance,
}

/// What libvirt says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Domstate {
    On(String),
    Off(String),
    Unknown,
}

impl Domain {
    /// By these settings.
    pub fn new(settings: Libvirt, instance: Instance) -> Self {
        Self { settings, instance }
    }

    /// What `virsh` said, or why it failed.
    fn virsh(&self, words: &[&str]) -> Result<String, DriveError> {
        let program = self.settings.virsh.to_string_lossy();
        let mut all = vec![program.as_ref(), "-q", "-c", &self.settings.uri];
        all.extend(words);
        let all: Vec<String> = all.into_iter().map(str::to_owned).collect();
        let ran = command::run(&all, b"", &[("LC_ALL", "C".to_owned())], CALL)
            .map_err(|error| DriveError::Setup(format!("{program} cannot be started: {error}")))?;
        match ran.code {
            Some(0) => Ok(ran.said),
            _ if ran.late => {
                Err(DriveError::failed(format!("virsh {} was not done within {} s", words[0], CALL.as_secs())))
            }
            _ => Err(DriveError::failed(format!("virsh {}: {}", words.join(" "), short(&ran.said)))),
        }
    }

    fn state(&self) -> Result<Domstate, DriveError> {
        match self.virsh(&["domstate", &self.instance.called]) {
            Ok(said) => Ok(match said.trim() {
                off @ ("shut off" | "crashed") => Domstate::Off(off.to_owned()),
                on => Domstate::On(on.to_owned()),
            }),
            Err(DriveError::Failed(why))
                if why.contains("failed to get domain") || why.contains("Domain not found") =>
            {
                Ok(Domstate::Unknown)
            }
            Err(error) => Err(error),
        }
    }

    fn is_source(&self) -> bool {
        self.instance.role == MachineRole::Source
    }

    fn not_defined(&self) -> DriveError {
        let (called, uri) = (&self.instance.called, &self.settings.uri);
        DriveError::Setup(format!("{uri} has no domain \"{called}\": define it there, or name the right one"))
    }

    /// Defines and starts it.
    pub fn start(&self, said: &StartInstance) -> Result<Stand, DriveError> {
        let called = self.instance.called.as_str();
        let state = self.state()?;
        if let Domstate::On(state) = state {
            // One that is paused or half off is not what was wanted.
            return match state.as_str() {
                "running" | "idle" => Ok(Stand::on("it was on")),
                _ => Err(DriveError::failed(format!("the domain \"{called}\" is {state}"))),
            };
        }
        if self.is_source() {
            if state == Domstate::Unknown {
                return Err(self.not_defined());
            }
        } else {
            let xml = xml::domain(&self.settings, &self.instance, said)?;
            let path = self.instance.folder.join("domain.xml");
            keep::folder(&self.instance.folder)
                .and_then(|()| keep::replace(&path, xml.as_bytes()))
                .map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))?;
            if self.instance.role == MachineRole::Test && !said.nics.is_empty() {
                self.isolated_network()?;
            }
            self.virsh(&["define", &path.to_string_lossy()])?;
        }
        self.virsh(&["start", called])?;
        Ok(Stand::on(""))
    }

    fn isolated_network(&self) -> Result<(), DriveError> {
        if self.virsh(&["net-info", xml::ISOLATED]).is_err() {
            let path = self.instance.folder.join("network.xml");
            keep::replace(&path, xml::isolated_network().as_bytes())
                .map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))?;
            self.virsh(&["net-define", &path.to_string_lossy()])?;
        }
        match self.virsh(&["net-start", xml::ISOLATED]) {
            Err(DriveError::Failed(why)) if why.contains("already active") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Whether it is on.
    pub fn probe(&self) -> Result<Stand, DriveError> {
        match self.state()? {
            Domstate::On(state) => Ok(Stand::on(state)),
            Domstate::Off(state) => Ok(Stand::off(state)),
            Domstate::Unknown if self.is_source() => Err(self.not_defined()),
            Domstate::Unknown => Ok(Stand::off("not defined")),
        }
    }

    fn is_off(&self) -> Result<bool, DriveError> {
        Ok(!matches!(self.state()?, Domstate::On(_)))
    }

    /// Asks the guest to switch itself off; after `within` its power is cut.
    pub fn stop(&self, within: Duration) -> Result<Stand, DriveError> {
        let called = self.instance.called.as_str();
        let how = match self.state()? {
            Domstate::Unknown if self.is_source() => return Err(self.not_defined()),
            Domstate::Unknown => return Ok(Stand::off("not defined")),
            Domstate::Off(_) => "it was off",
            Domstate::On(_) => self.switch_off(called, within)?,
        };
        if !self.is_off()? {
            return Ok(Stand::on("its domain does not end"));
        }
        if !self.is_source() {
            self.virsh(&["undefine", called, "--nvram"])?;
            let _ = fs::remove_dir_all(&self.instance.folder);
        }
        Ok(Stand::off(how))
    }

    fn switch_off(&self, called: &str, within: Duration) -> Result<&'static str, DriveError> {
        let wait = |until: Instant| -> Result<bool, DriveError> {
            loop {
                if self.is_off()? {
                    return Ok(true);
                }
                if Instant::now() >= until {
                    return Ok(false);
                }
                std::thread::sleep(POLL);
            }
        };
        let until = Instant::now() + within;
        while Instant::now() < until {
            // A guest that is paused, or has just gone off, refuses: what counts is whether it is off.
            let _ = self.virsh(&["shutdown", called]);
            if wait(until.min(Instant::now() + ASK_AGAIN))? {
                return Ok("it has switched itself off");
            }
        }
        let cut = self.virsh(&["destroy", called]);
        if !wait(Instant::now() + END)? {
            cut?;
        }
        Ok("its power was cut")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::instance;
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    /// A `virsh` that keeps the state of each domain in a file, and writes down what it was told.
    const VIRSH: &str = r#"#!/bin/sh
dir=$(dirname "$0"); shift 3; echo "$@" >>"$dir/told"
name=$2; [ "$1" = define ] && name=$(sed -n 's:.*<name>\(.*\)</name>.*:\1:p' "$2")
state="$dir/$name.state"
case $1 in
define) echo "shut off" >"$state" ;;
domstate) [ -e "$state" ] || { echo "error: failed to get domain '$name'" >&2; exit 1; }; cat "$state" ;;
start) echo running >"$state" ;;
shutdown) [ -e "$dir/deaf" ] || echo "shut off" >"$state" ;;
destroy) echo "shut off" >"$state" ;;
undefine) rm "$state" ;;
net-*) exit 0 ;;
esac
"#;

    fn domain(dir: &Path, role: MachineRole) -> Domain {
        let virsh = dir.join("virsh");
        fs::write(&virsh, VIRSH).unwrap();
        fs::set_permissions(&virsh, fs::Permissions::from_mode(0o700)).unwrap();
        let settings = Libvirt { uri: "test:///x".into(), virsh, kind: "qemu".into(), networks: Default::default() };
        Domain::new(settings, Instance { role, ..instance(dir.to_str().unwrap()) })
    }

    fn told(dir: &Path) -> String {
        let told = fs::read_to_string(dir.join("told")).unwrap();
        told.lines()
            .filter_map(|line| line.split(' ').next())
            .filter(|w| *w != "domstate")
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn a_replica_is_defined_started_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let replica = domain(dir.path(), MachineRole::Replica);
        assert_eq!(replica.probe().unwrap(), Stand::off("not defined"));
        assert!(replica.start(&StartInstance::default()).unwrap().on);
        assert_eq!(replica.start(&StartInstance::default()).unwrap(), Stand::on("it was on"));
        assert_eq!(replica.probe().unwrap(), Stand::on("running"));
        assert_eq!(replica.stop(Duration::from_secs(5)).unwrap(), Stand::off("it has switched itself off"));
        assert_eq!(replica.stop(Duration::ZERO).unwrap(), Stand::off("not defined"));
        assert_eq!(told(dir.path()), "define start shutdown undefine");
    }

    #[test]
    fn a_guest_that_does_not_listen_loses_its_power() {
        let dir = tempfile::tempdir().unwrap();
        let source = domain(dir.path(), MachineRole::Source);
        fs::write(dir.path().join("web.state"), "running").unwrap();
        fs::write(dir.path().join("deaf"), "").unwrap();
        assert_eq!(source.stop(Duration::from_millis(10)).unwrap(), Stand::off("its power was cut"));
        assert!(source.start(&StartInstance::default()).unwrap().on);
        assert_eq!(told(dir.path()), "shutdown destroy start", "a source stays defined");
    }

    #[test]
    fn a_source_that_is_not_defined_is_no_machine_that_is_off() {
        let dir = tempfile::tempdir().unwrap();
        let source = domain(dir.path(), MachineRole::Source);
        for said in [source.probe(), source.stop(Duration::ZERO), source.start(&StartInstance::default())] {
            assert!(said.unwrap_err().to_string().contains("has no domain \"web\""));
        }
    }

    #[test]
    fn libvirt_that_is_not_there_says_nothing_about_a_machine() {
        let dir = tempfile::tempdir().unwrap();
        let source = domain(dir.path(), MachineRole::Source);
        fs::write(
            dir.path().join("virsh"),
            "#!/bin/sh\necho 'error: failed to connect to the hypervisor' >&2; exit 1\n",
        )
        .unwrap();
        assert!(source.probe().unwrap_err().to_string().contains("failed to connect"));
    }
}
