//! A machine as a process of QEMU's that outlives this proxy.
//!
//! Its folder holds `lock`, `pid`, `qmp.sock`, `qemu.log` and `serial.log`, and `seed.img` and `links.json` where it has them.
//! The process has the locked file as its standard input: the kernel frees the lock when the last process that has it is gone,
//! so whether the machine is on is known without a process number, also by the next life of the proxy, and a second process
//! for one instance is never begun.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use afterimage_wire::v1::{Firmware, MachineRole, StartInstance};
use rustix::fs::FlockOperation;
use serde_json::{Value, json};

use super::super::config::machines::Qemu;
use super::super::keep;
use super::qmp::Monitor;
use super::ways::Way;
use super::{DriveError, Instance, Networks, Stand, links, seed, short, ways};

/// Between two looks at a process.
const POLL: Duration = Duration::from_millis(50);
/// How long a process has until its monitor answers.
const BEGIN: Duration = Duration::from_secs(40);
/// How long a process has to end once its power is cut, and again once it is killed.
const END: Duration = Duration::from_secs(5);
/// The guest is asked again to switch itself off after so long: one that is still starting does not hear it.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Longest path of a socket, bytes.
const MAX_SOCKET: usize = 107;
/// What it is told of its addresses, in its folder.
const SEED: &str = "seed.img";
/// How long the machine waits for a proxy that restarts, seconds.
const RECONNECT_S: u32 = 3600;

/// An instance that is a process.
pub struct Process {
    settings: Qemu,
    networks: Networks,
    instance: Instance,
}

/// Removes what the instance of a folder is connected by that has ended by itself, or whose proxy died in the middle.
///
/// # Errors
/// Why not.
pub fn clear(folder: &Path) -> Result<(), DriveError> {
    let lock = lock(folder).map_err(|error| DriveError::failed(format!("{}: {error}", folder.display())))?;
    match lock {
        Some(_off) => links::clear(folder),
        None => Ok(()),
    }
}

/// The locked file of an instance, if no process has it.
fn lock(folder: &Path) -> io::Result<Option<File>> {
    let path = folder.join("lock");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Process {
    /// By these settings, in these networks.
    pub fn new(settings: Qemu, networks: Networks, instance: Instance) -> Self {
        Self { settings, networks, instance }
    }

    fn at(&self, file: &str) -> PathBuf {
        self.instance.folder.join(file)
    }

    /// What its first serial port has said.
    pub fn console(&self) -> PathBuf {
        self.at("serial.log")
    }

    fn lock(&self) -> io::Result<Option<File>> {
        lock(&self.instance.folder)
    }

    fn is_on(&self) -> io::Result<bool> {
        if !self.at("lock").exists() {
            return Ok(false);
        }
        Ok(self.lock()?.is_none())
    }

    fn failed(&self, what: &str, error: &io::Error) -> DriveError {
        DriveError::failed(format!("{}: {what}: {error}", self.instance.folder.display()))
    }

    /// Starts the process, and waits until its monitor answers.
    pub fn start(&self, said: &StartInstance) -> Result<Stand, DriveError> {
        let folder = &self.instance.folder;
        let socket = self.at("qmp.sock");
        if socket.as_os_str().len() > MAX_SOCKET {
            let message = format!("{} is too long for a socket: choose a shorter state_dir", socket.display());
            return Err(DriveError::Setup(message));
        }
        keep::folder(folder).map_err(|e| self.failed("cannot be made", &e))?;
        let Some(lock) = self.lock().map_err(|e| self.failed("lock", &e))? else {
            return Ok(Stand::on("it was on"));
        };
        for left in ["qmp.sock", "pid", "serial.log", SEED] {
            let _ = fs::remove_file(self.at(left));
        }
        let ways = self.ways(said)?;
        let seeded = match seed::of(&self.networks, &self.instance, said)? {
            Some(seed) => {
                seed.write(&self.at(SEED))?;
                true
            }
            None => false,
        };
        let arguments = arguments(&self.settings, &self.instance, said, folder, &ways, seeded)?;
        let started = links::connect(folder, &ways).and_then(|()| self.spawn(lock, &arguments, &ways));
        if started.is_err() {
            // What cannot be removed now is found by what is written down of it.
            let _ = links::clear(folder);
        }
        started
    }

    fn spawn(&self, lock: File, arguments: &[String], ways: &[Way]) -> Result<Stand, DriveError> {
        let socket = self.at("qmp.sock");
        let _ = keep::replace(&self.at("command"), arguments.join("\n").as_bytes());
        let log = || OpenOptions::new().create(true).append(true).mode(0o600).open(self.at("qemu.log"));
        let _ = fs::remove_file(self.at("qemu.log"));
        let (out, err) = (log(), log());
        let (Ok(out), Ok(err)) = (out, err) else { return Err(DriveError::failed("qemu.log cannot be written")) };
        let mut child = Command::new(&self.settings.program)
            .args(arguments)
            .stdin(Stdio::from(lock))
            .stdout(Stdio::from(out))
            .stderr(Stdio::from(err))
            .current_dir("/")
            .process_group(0)
            .spawn()
            .map_err(|e| DriveError::failed(format!("{} cannot be started: {e}", self.settings.program.display())))?;
        if let Err(error) = keep::replace(&self.at("pid"), child.id().to_string().as_bytes()) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(self.failed("pid", &error));
        }
        let end = Instant::now() + BEGIN;
        loop {
            if let Ok(mut monitor) = Monitor::connect(&socket) {
                for (i, _) in ways.iter().enumerate().filter(|(_, way)| **way == Way::Unplugged) {
                    // A guest that sees no cable does not wait for an answer.
                    let _ = monitor.ask_with("set_link", json!({"name": format!("nic{i}"), "up": false}));
                }
                break;
            }
            let ended = child.try_wait().map_err(|e| self.failed("wait", &e))?;
            if ended.is_some() || Instant::now() >= end {
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(self.at("qemu.log")).unwrap_or_default();
                let what = if ended.is_some() { "it has ended at once" } else { "its monitor does not answer" };
                return Err(DriveError::failed(format!("{what}: {}", short(&said))));
            }
            std::thread::sleep(POLL);
        }
        // Somebody has to take note of its end while this proxy lives; it is no child of the next one.
        let _ = std::thread::Builder::new().name("machine-end".to_owned()).spawn(move || child.wait());
        Ok(Stand::on(""))
    }

    fn ways(&self, said: &StartInstance) -> Result<Vec<Way>, DriveError> {
        ways::of(&self.networks, &self.settings.networks, false, &self.instance, said)
    }

    /// Looks whether it could be started.
    pub fn check(&self, said: &StartInstance) -> Result<(), DriveError> {
        firmware(&self.settings, &self.instance, said)?;
        seed::of(&self.networks, &self.instance, said)?;
        for (nic, way) in said.nics.iter().zip(self.ways(said)?) {
            if let Way::Bridge(bridge) = way {
                links::check_bridge(&self.instance.called, &nic.network, &bridge)?;
            }
        }
        Ok(())
    }

    /// Whether the process is there, and what its monitor says.
    pub fn probe(&self) -> Result<Stand, DriveError> {
        if !self.is_on().map_err(|e| self.failed("lock", &e))? {
            return Ok(Stand::off(""));
        }
        let status = Monitor::connect(&self.at("qmp.sock")).and_then(|mut monitor| monitor.ask("query-status"));
        Ok(match status {
            Ok(status) => Stand::on(status["status"].as_str().unwrap_or_default()),
            Err(error) => Stand::on(format!("its monitor does not answer: {error}")),
        })
    }

    /// Asks the guest to switch itself off; after `within` its power is cut, and the process killed if it does not end.
    pub fn stop(&self, within: Duration) -> Result<Stand, DriveError> {
        let ask = |command: &str| Monitor::connect(&self.at("qmp.sock")).and_then(|mut monitor| monitor.ask(command));
        let failed = |e: io::Error| self.failed("lock", &e);
        if !self.is_on().map_err(failed)? {
            return Ok(Stand::off(self.tidy("it was off")));
        }
        let ends = |by: Instant| -> io::Result<bool> {
            while self.is_on()? {
                if Instant::now() >= by {
                    return Ok(false);
                }
                std::thread::sleep(POLL);
            }
            Ok(true)
        };
        let mut how = "it has switched itself off";
        let until = Instant::now() + within;
        let mut off = false;
        while !off && Instant::now() < until {
            let _ = ask("system_powerdown");
            off = ends(until.min(Instant::now() + ASK_AGAIN)).map_err(failed)?;
        }
        if !off {
            how = "its power was cut";
            let _ = ask("quit");
            off = ends(Instant::now() + END).map_err(failed)?;
        }
        if !off {
            how = "its process was killed";
            self.kill();
            off = ends(Instant::now() + END).map_err(failed)?;
        }
        if !off {
            return Ok(Stand::on("its process does not end"));
        }
        Ok(Stand::off(self.tidy(how)))
    }

    fn kill(&self) {
        let pid = fs::read_to_string(self.at("pid")).ok().and_then(|text| text.trim().parse::<i32>().ok());
        let Some(pid) = pid else { return };
        // Another process may have that number by now: ours has its monitor on its command line.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let monitor = self.at("qmp.sock").into_os_string().into_encoded_bytes();
        if line.windows(monitor.len()).any(|part| part == monitor)
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// Of a test nothing stays; what a replica has said stays until it is started again. What it was connected by goes; it is off,
    /// even if that cannot be removed yet.
    fn tidy(&self, how: &str) -> String {
        if self.instance.folder.exists()
            && let Err(error) = links::clear(&self.instance.folder)
        {
            return format!("{how}; its taps are still there: {error}");
        }
        let _ = fs::remove_file(self.at(SEED));
        if self.instance.role == MachineRole::Test {
            let _ = fs::remove_dir_all(&self.instance.folder);
        }
        how.to_owned()
    }
}

/// As QEMU takes a value within an option.
fn plain(value: &str) -> String {
    value.replace(',', ",,")
}

/// The server of a disk, for `-blockdev`.
fn server(uris: &[String]) -> Option<(Value, String)> {
    let unix = uris.iter().find_map(|uri| {
        let (export, socket) = uri.strip_prefix("nbd+unix:///")?.split_once("?socket=")?;
        Some((json!({"type": "unix", "path": socket}), export.to_owned()))
    });
    let tcp = || {
        uris.iter().find_map(|uri| {
            let (at, export) = uri.strip_prefix("nbd://")?.split_once('/')?;
            let (host, port) = at.rsplit_once(':')?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Some((json!({"type": "inet", "host": host, "port": port}), export.to_owned()))
        })
    };
    unix.or_else(tcp)
}

/// The image of its firmware, if that is UEFI.
fn firmware<'a>(settings: &'a Qemu, instance: &Instance, said: &StartInstance) -> Result<Option<&'a Path>, DriveError> {
    match &settings.uefi {
        _ if said.firmware() != Firmware::Uefi => Ok(None),
        Some(image) => Ok(Some(image)),
        None => {
            let message =
                format!("`uefi` is not set in [machines.qemu.{}], and this machine needs it", instance.profile);
            Err(DriveError::Setup(message))
        }
    }
}

/// The command line of a machine whose interfaces lead there; `seeded`: it is told its addresses.
fn arguments(
    settings: &Qemu,
    instance: &Instance,
    said: &StartInstance,
    folder: &Path,
    ways: &[Way],
    seeded: bool,
) -> Result<Vec<String>, DriveError> {
    let file = |name: &str| plain(&folder.join(name).to_string_lossy());
    let mut all: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
    add("-name", format!("guest={}", plain(&instance.called)));
    add("-uuid", instance.uid.clone());
    add("-machine", "q35".to_owned());
    for accelerator in &settings.accelerators {
        add("-accel", accelerator.clone());
    }
    add("-smp", said.cpus.to_string());
    add("-m", format!("{}M", said.memory_bytes >> 20));
    add("-display", "none".to_owned());
    add("-serial", format!("file:{}", file("serial.log")));
    add("-qmp", format!("unix:{},server=on,wait=off", file("qmp.sock")));
    if let Some(image) = firmware(settings, instance, said)? {
        add("-drive", format!("if=pflash,format=raw,unit=0,readonly=on,file={}", plain(&image.to_string_lossy())));
    }
    for (i, disk) in said.disks.iter().enumerate() {
        let Some((server, export)) = server(&disk.uris) else {
            let message = format!("the disk {} is not reached by NBD: set `views` (or `nbd`) at its proxy", disk.disk);
            return Err(DriveError::Setup(message));
        };
        let block = json!({
            "driver": "nbd",
            "node-name": format!("disk{i}"),
            "server": server,
            "export": export,
            "reconnect-delay": RECONNECT_S,
            "discard": "unmap",
        });
        add("-blockdev", block.to_string());
        let serial = if disk.serial.is_empty() { String::new() } else { format!(",serial={}", plain(&disk.serial)) };
        add("-device", format!("virtio-blk-pci,drive=disk{i},bootindex={}{serial}", i + 1));
    }
    if seeded {
        let block = json!({"driver": "file", "node-name": "seed", "filename": folder.join(SEED), "read-only": true});
        add("-blockdev", block.to_string());
        add("-device", "virtio-blk-pci,drive=seed,serial=afterimage-seed".to_owned());
    }
    for (i, (nic, way)) in said.nics.iter().zip(ways).enumerate() {
        let back = match way {
            Way::Bridge(_) | Way::Isolated(_) => {
                Some(format!("tap,ifname={},script=no,downscript=no", links::tap(folder, i)))
            }
            Way::Own(back) => Some(back.clone()),
            Way::Restricted => Some("user,restrict=on".to_owned()),
            Way::Unplugged => None,
        };
        let mac = if nic.mac.is_empty() { String::new() } else { format!(",mac={}", nic.mac) };
        let peer = if back.is_some() { format!(",netdev=net{i}") } else { String::new() };
        if let Some(back) = back {
            add("-netdev", format!("{back},id=net{i}"));
        }
        add("-device", format!("virtio-net-pci,id=nic{i}{peer}{mac}"));
    }
    all.extend(["-nodefaults".to_owned(), "-no-user-config".to_owned()]);
    all.extend(settings.arguments.iter().cloned());
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::super::config::machines::Network;
    use super::super::tests::instance;
    use super::*;
    use afterimage_wire::v1::{MachineDisk, Nic};

    fn settings(program: &str) -> Qemu {
        Qemu {
            program: program.into(),
            accelerators: vec!["tcg".into()],
            arguments: vec!["-snapshot".into()],
            networks: [("lan".to_owned(), "bridge,br=br0".to_owned())].into(),
            uefi: None,
        }
    }

    fn said() -> StartInstance {
        StartInstance {
            cpus: 2,
            memory_bytes: 512 << 20,
            disks: vec![MachineDisk {
                disk: "data".into(),
                serial: "s,1".into(),
                uris: vec!["nbd://h:1/x".into(), "nbd+unix:///shop.failover/data?socket=/run/v.sock".into()],
                ..MachineDisk::default()
            }],
            nics: vec![Nic { mac: "52:54:00:00:00:01".into(), network: "lan".into(), ..Nic::default() }],
            ..StartInstance::default()
        }
    }

    fn process(folder: &str, program: &str, role: MachineRole) -> Process {
        let bridge = Network { bridge: Some("br9".into()), ..Network::default() };
        let networks = [("mapped".to_owned(), bridge), ("none".to_owned(), Network::default())].into();
        Process::new(settings(program), networks, Instance { role, ..instance(folder) })
    }

    fn line(role: MachineRole, said: &StartInstance) -> Result<String, DriveError> {
        let process = process("/s", "qemu", role);
        let ways = process.ways(said)?;
        Ok(arguments(&process.settings, &process.instance, said, Path::new("/s"), &ways, true)?.join(" "))
    }

    #[test]
    fn a_machine_has_its_disks_by_the_socket_and_its_networks_by_the_hosts_own_names() {
        let line = line(MachineRole::Replica, &said()).unwrap();
        assert!(line.contains("-smp 2 -m 512M"), "{line}");
        assert!(
            line.contains(r#""export":"shop.failover/data""#) && line.contains(r#""path":"/run/v.sock""#),
            "{line}"
        );
        assert!(line.contains("virtio-blk-pci,drive=disk0,bootindex=1,serial=s,,1"), "{line}");
        assert!(
            line.contains(
                "-netdev bridge,br=br0,id=net0 -device virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:00:00:01"
            ),
            "{line}"
        );
        assert!(line.ends_with("-snapshot"), "{line}");
    }

    #[test]
    fn a_test_has_no_way_out() {
        let line = line(MachineRole::Test, &said()).unwrap();
        assert!(line.contains("-netdev user,restrict=on,id=net0") && !line.contains("br0"), "{line}");
    }

    #[test]
    fn a_network_of_the_map_is_a_tap_and_one_that_stays_unplugged_has_no_peer() {
        let nics = ["mapped", "none"].map(|network| Nic { network: network.into(), ..Nic::default() });
        let said = StartInstance { nics: nics.into(), ..said() };
        for role in [MachineRole::Replica, MachineRole::Test] {
            let line = line(role, &said).unwrap();
            let tap = format!("-netdev tap,ifname={},script=no,downscript=no,id=net0", links::tap(Path::new("/s"), 0));
            assert!(line.contains(&tap), "{line}");
            assert!(line.contains("-device virtio-net-pci,id=nic1 -nodefaults"), "{line}");
            assert!(line.contains(r#""filename":"/s/seed.img","node-name":"seed","read-only":true"#), "{line}");
        }
    }

    #[test]
    fn what_the_host_has_not_is_named() {
        let elsewhere = StartInstance { nics: vec![Nic { network: "dmz".into(), ..Nic::default() }], ..said() };
        assert!(line(MachineRole::Replica, &elsewhere).unwrap_err().to_string().contains("\"dmz\""));
        let uefi = StartInstance { firmware: Firmware::Uefi.into(), ..said() };
        assert!(line(MachineRole::Replica, &uefi).unwrap_err().to_string().contains("`uefi` is not set"));
        let vhost = MachineDisk { disk: "d".into(), uris: vec!["unix:/x".into()], ..MachineDisk::default() };
        let unreached = StartInstance { disks: vec![vhost], ..said() };
        assert!(line(MachineRole::Replica, &unreached).unwrap_err().to_string().contains("not reached by NBD"));
    }

    #[test]
    fn tcp_is_taken_where_there_is_no_socket() {
        let (server, export) = server(&["nbd://[::1]:10809/shop/data".to_owned()]).unwrap();
        assert_eq!(
            (server["host"].as_str(), server["port"].as_str(), export.as_str()),
            (Some("::1"), Some("10809"), "shop/data")
        );
    }

    /// A process that has no monitor stands for one that hangs.
    #[test]
    fn a_process_is_found_again_by_its_lock_and_killed_if_it_does_not_listen() {
        let dir = tempfile::tempdir().unwrap();
        let process = process(dir.path().to_str().unwrap(), "qemu", MachineRole::Replica);
        keep::folder(&process.instance.folder).unwrap();
        assert_eq!(process.probe().unwrap(), Stand::off(""));
        let lock = process.lock().unwrap().unwrap();
        let name = process.at("qmp.sock").to_string_lossy().into_owned();
        let mut child = Command::new("/bin/sh")
            .args(["-c", "while true; do sleep 0.05; done", &name])
            .stdin(Stdio::from(lock))
            .spawn()
            .unwrap();
        fs::write(process.at("pid"), child.id().to_string()).unwrap();
        // As the next life of the proxy has it.
        let again = Process::new(settings("qemu"), Networks::new(), process.instance.clone());
        assert!(again.probe().unwrap().on);
        assert_eq!(again.start(&said()).unwrap(), Stand::on("it was on"));
        assert_eq!(again.stop(Duration::ZERO).unwrap(), Stand::off("its process was killed"));
        child.wait().unwrap();
        assert_eq!(again.stop(Duration::ZERO).unwrap(), Stand::off("it was off"));
    }

    #[test]
    fn one_that_ends_at_once_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("q");
        fs::write(&program, "#!/bin/sh\necho no such disk >&2; exit 1\n").unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let process = process(dir.path().to_str().unwrap(), program.to_str().unwrap(), MachineRole::Replica);
        let error = process.start(&said()).unwrap_err().to_string();
        assert!(error.contains("ended at once: no such disk"), "{error}");
        assert!(!process.probe().unwrap().on);
    }
}
