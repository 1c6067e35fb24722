//! A machine as a domain of libvirt's, by `virsh`. At its source it is defined already, and left so; a replica is defined when
//! it is started and undefined when it is off.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use afterimage_wire::v1::{MachineRole, StartInstance};

use super::super::config::machines::Libvirt;
use super::super::keep;
use super::ways::Way;
use super::{DriveError, Instance, Networks, Stand, command, links, seed, short, ways, xml};

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
    networks: Networks,
    instance: Instance,
}

/// The networks of a test, in its folder: the bridge of each on a line of its own.
const TESTS: &str = "networks";

/// One after the other: the last machine of a test removes its network, while another one of that test may be about to use it.
static TURN: Mutex<()> = Mutex::new(());

/// What libvirt says of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Domstate {
    On(String),
    Off(String),
    Unknown,
}

impl Domain {
    /// By these settings, in these networks.
    pub fn new(settings: Libvirt, networks: Networks, instance: Instance) -> Self {
        Self { settings, networks, instance }
    }

    fn ways(&self, said: &StartInstance) -> Result<Vec<Way>, DriveError> {
        ways::of(&self.networks, &self.settings.networks, true, &self.instance, said)
    }

    /// Where its seed is put.
    fn seed(&self) -> PathBuf {
        let role = if self.is_source() { "source" } else { "replica" };
        self.settings.seeds.join(format!("{}.afterimage-{role}.img", self.instance.called))
    }

    /// Looks whether it could be started.
    pub fn check(&self, said: &StartInstance) -> Result<(), DriveError> {
        seed::of(&self.networks, &self.instance, said)?;
        if self.is_source() {
            return Ok(());
        }
        // Of a libvirt elsewhere this host does not see the bridges.
        let here = self.settings.uri.contains(":///");
        for (nic, way) in said.nics.iter().zip(self.ways(said)?) {
            if let Way::Bridge(bridge) | Way::Own(bridge) = way
                && here
            {
                links::check_bridge(&self.instance.called, &nic.network, &bridge)?;
            }
        }
        Ok(())
    }

    /// Puts what it is told of its addresses where libvirt reads it, or takes it away.
    fn put_seed(&self, said: &StartInstance) -> Result<Option<PathBuf>, DriveError> {
        let path = self.seed();
        let Some(seed) = seed::of(&self.networks, &self.instance, said)? else {
            let _ = fs::remove_file(&path);
            return Ok(None);
        };
        seed.write(&path)?;
        Ok(Some(path))
    }

    /// A domain at its source has it as one more disk, from the first time on.
    fn attach_seed(&self, path: &Path) -> Result<(), DriveError> {
        let (called, path) = (self.instance.called.as_str(), path.to_string_lossy());
        if self.virsh(&["domblklist", "--inactive", called])?.contains(path.as_ref()) {
            return Ok(());
        }
        let options = ["--targetbus", "virtio", "--mode", "readonly", "--subdriver", "raw", "--config"];
        self.virsh(&[&["attach-disk", called, &path, "vdz"], &options[..]].concat()).map(drop)
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
            if let Some(seed) = self.put_seed(said)? {
                self.attach_seed(&seed)?;
            }
        } else {
            let ways = self.ways(said)?;
            let seed = self.put_seed(said)?;
            let xml = xml::domain(&self.settings, &self.instance, said, &ways, seed.as_deref())?;
            let path = self.instance.folder.join("domain.xml");
            keep::folder(&self.instance.folder)
                .and_then(|()| keep::replace(&path, xml.as_bytes()))
                .map_err(|error| DriveError::failed(format!("{}: {error}", path.display())))?;
            self.isolate(&ways)?;
            self.virsh(&["define", &path.to_string_lossy()])?;
        }
        self.virsh(&["start", called])?;
        Ok(Stand::on(""))
    }

    /// Makes the networks of a test: written down first, so that they are removed whatever happens in between.
    fn isolate(&self, ways: &[Way]) -> Result<(), DriveError> {
        let bridges = ways::bridges_of_test(ways);
        if bridges.is_empty() {
            return Ok(());
        }
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let folder = &self.instance.folder;
        let failed = |error: io::Error| DriveError::failed(format!("{}: {error}", folder.display()));
        keep::replace(&folder.join(TESTS), bridges.join("\n").as_bytes()).map_err(failed)?;
        for bridge in &bridges {
            let name = xml::network_of(bridge);
            if self.virsh(&["net-info", &name]).is_err() {
                let path = folder.join("network.xml");
                keep::replace(&path, xml::isolated_network(bridge).as_bytes()).map_err(failed)?;
                self.virsh(&["net-define", &path.to_string_lossy()])?;
            }
            match self.virsh(&["net-start", &name]) {
                Err(DriveError::Failed(why)) if why.contains("already active") => {}
                other => other.map(drop)?,
            }
        }
        Ok(())
    }

    /// Forgets an instance that is off, and the networks of a test that no other machine of it has.
    fn forget(&self) -> Result<(), DriveError> {
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let folder = &self.instance.folder;
        let listed = |folder: &Path| fs::read_to_string(folder.join(TESTS)).unwrap_or_default();
        let home = folder.parent().and_then(|home| fs::read_dir(home).ok());
        let others: Vec<PathBuf> =
            home.into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p != folder).collect();
        for bridge in listed(folder).lines() {
            if others.iter().any(|other| listed(other).lines().any(|line| line == bridge)) {
                continue;
            }
            let name = xml::network_of(bridge);
            if self.virsh(&["net-info", &name]).is_ok() {
                // It may not be active; undefining one that still is would leave it until the host restarts.
                let _ = self.virsh(&["net-destroy", &name]);
                self.virsh(&["net-undefine", &name])?;
            }
        }
        let _ = fs::remove_file(self.seed());
        let _ = fs::remove_dir_all(folder);
        Ok(())
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
            Domstate::Unknown => {
                self.forget()?;
                return Ok(Stand::off("not defined"));
            }
            Domstate::Off(_) => "it was off",
            Domstate::On(_) => self.switch_off(called, within)?,
        };
        if !self.is_off()? {
            return Ok(Stand::on("its domain does not end"));
        }
        if !self.is_source() {
            self.virsh(&["undefine", called, "--nvram"])?;
            self.forget()?;
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
    use afterimage_wire::v1::Nic;
    use std::os::unix::fs::PermissionsExt;

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
net-define) sed -n 's:.*<name>\(.*\)</name>.*:\1:p' "$2" >"$dir/net" ;;
net-info) [ -e "$dir/net" ] || exit 1 ;;
net-undefine) rm "$dir/net" ;;
net-*) exit 0 ;;
esac
"#;

    fn domain(dir: &Path, role: MachineRole) -> Domain {
        let virsh = dir.join("virsh");
        fs::write(&virsh, VIRSH).unwrap();
        fs::set_permissions(&virsh, fs::Permissions::from_mode(0o700)).unwrap();
        let networks = [("lan".to_owned(), "lo".to_owned())].into();
        let settings = Libvirt { uri: "test:///x".into(), virsh, kind: "qemu".into(), networks, seeds: dir.into() };
        Domain::new(settings, Networks::new(), Instance { role, ..instance(dir.to_str().unwrap()) })
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
    fn the_network_of_a_test_goes_with_its_last_machine() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("machines");
        let test = |called: &str| {
            let mut test = domain(dir.path(), MachineRole::Test);
            test.instance.called = called.into();
            test.instance.folder = home.join(called);
            test
        };
        let nics = vec![Nic { network: "lan".into(), ..Nic::default() }];
        let said = StartInstance { nics, isolation: "t".into(), ..StartInstance::default() };
        let (web, db) = (test("web.t"), test("db.t"));
        assert!(web.start(&said).unwrap().on && db.start(&said).unwrap().on);
        assert!(!web.stop(Duration::ZERO).unwrap().on && dir.path().join("net").exists());
        assert!(!db.stop(Duration::ZERO).unwrap().on && !dir.path().join("net").exists());
        assert_eq!(fs::read_dir(&home).unwrap().count(), 0, "something of the test is left");
    }

    #[test]
    fn a_source_that_comes_home_is_told_its_addresses_by_one_more_disk() {
        let dir = tempfile::tempdir().unwrap();
        let source = domain(dir.path(), MachineRole::Source);
        fs::write(dir.path().join("web.state"), "shut off").unwrap();
        let nic = Nic { network: "lan".into(), addresses: vec!["192.0.2.7/24".into()], ..Nic::default() };
        let said = StartInstance { nics: vec![nic], ..StartInstance::default() };
        assert!(source.start(&said).unwrap().on);
        assert_eq!(told(dir.path()), "domblklist attach-disk start");
        assert!(dir.path().join("web.afterimage-source.img").exists());
    }

    #[test]
    fn an_interface_that_is_no_bridge_is_found_before_anything_is_begun() {
        let dir = tempfile::tempdir().unwrap();
        let nics = vec![Nic { network: "lan".into(), ..Nic::default() }];
        let said = StartInstance { nics, ..StartInstance::default() };
        let told = domain(dir.path(), MachineRole::Replica).check(&said).unwrap_err().to_string();
        assert!(told.contains("\"lan\" of web") && told.contains("is no bridge"), "{told}");
        assert_eq!(domain(dir.path(), MachineRole::Test).check(&said), Ok(()));
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
