//! The host itself: what its kernel can, what its limits are, whether its clock is kept.

use afterimage_dataplane::io::ring;
use afterimage_dataplane::io::ublk::control::Control;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::{Check, Needs, State};
use crate::operator::values::show_size;

/// Oldest kernel that has all that the rings need.
const KERNEL: (u32, u32) = (6, 1);
/// Open files that a proxy of some size needs: disks and clients take some each.
const FILES: u64 = 65_536;
/// Fewest with which it is worth a start.
const FEW_FILES: u64 = 1024;

/// Kernel, io_uring, ublk, NBD. A coordinator needs none of the last three.
pub fn kernel(coordinator: bool, needs: &Needs, checks: &mut Vec<Check>) {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy().into_owned();
    let machine = system.machine().to_string_lossy();
    let found = format!("Linux {release} on {machine}");
    checks.push(match version(&release) {
        Some(have) if have < KERNEL && !coordinator => {
            Check::fail("kernel", found, format!("a proxy needs Linux {}.{} or later", KERNEL.0, KERNEL.1))
        }
        _ => Check::ok("kernel", found),
    });
    if coordinator {
        return;
    }
    checks.push(match ring::check_kernel() {
        Ok(()) => Check::ok("io_uring", "every operation and setting that the data path uses is there"),
        Err(error) => Check::fail("io_uring", error.to_string(), "a newer kernel, or the setting that it names"),
    });
    checks.push(match (Control::open(), needs.ublk) {
        (Ok(_), _) => Check::ok("ublk", "disks can be block devices of this host"),
        (Err(error), Some(field)) => {
            Check::fail("ublk", format!("{field} is set, and {error}"), format!("mend that, or take {field} out"))
        }
        (Err(error), None) => {
            let found = format!("not to be used here: {error}");
            Check::ok("ublk", format!("{found}. Other ways to a disk do not need it"))
        }
    });
    let loaded = std::path::Path::new("/sys/module/nbd").exists();
    checks.push(Check::ok(
        "nbd",
        if loaded {
            "the kernel's client is there: NBD disks can be attached to this host"
        } else {
            "the kernel's client is not loaded; only a host that attaches NBD disks itself needs it (modprobe nbd)"
        },
    ));
}

/// `6.1` of `6.1.0-13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// What this process may take. A service has limits of its own: those of its unit.
pub fn limits(needs: &Needs, checks: &mut Vec<Check>) {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let shown = if files == u64::MAX { "no limit".to_owned() } else { format!("up to {files}") };
    let remedy = "LimitNOFILE=65536 in the service's unit (tools/systemd has one), or ulimit -n in this shell";
    checks.push(match files {
        FILES.. => Check::ok("open files", shown),
        FEW_FILES.. => Check::warn("open files", format!("{shown}: few disks and clients"), remedy),
        _ => Check::fail("open files", shown, remedy),
    });
    if needs.pinned == 0 {
        return;
    }
    let privileged = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    let need = show_size(needs.pinned);
    checks.push(match getrlimit(Resource::Memlock).current {
        _ if privileged => Check::ok("locked memory", format!("no limit (CAP_IPC_LOCK); buffers take {need}")),
        Some(limit) if limit < needs.pinned => Check::warn(
            "locked memory",
            format!("{}, and buffers take {need}: unregistered, each I/O costs more", show_size(limit)),
            "LimitMEMLOCK=infinity in the service's unit, or ulimit -l unlimited in this shell, or less `memory`",
        ),
        _ => Check::ok("locked memory", format!("enough; buffers take {need}")),
    });
    checks.push(memory(needs.pinned));
}

/// Pinned buffers must leave the host most of its memory.
fn memory(pinned: u64) -> Check {
    let total = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    let Some(total) = total.map(|kib| kib << 10) else {
        return Check::warn("memory", "not known: /proc/meminfo cannot be read", "");
    };
    let found = format!("{} in all, of which buffers take {}", show_size(total), show_size(pinned));
    match pinned {
        pinned if pinned > total / 10 * 8 => Check::fail("memory", found, "make `memory` smaller"),
        pinned if pinned > total / 2 => Check::warn("memory", found, "make `memory` smaller, or give the host more"),
        _ => Check::ok("memory", found),
    }
}

/// Whether something keeps the wall clock. Order never depends on it; times of restore points do.
pub fn clock(checks: &mut Vec<Check>) {
    checks.push(if ring::clock_synced() {
        Check::ok("clock", "kept in sync, says the kernel")
    } else {
        Check::warn(
            "clock",
            "not in sync, says the kernel: times of restore points may be off",
            "run chrony, ntpd or systemd-timesyncd (a virtual machine whose host keeps its clock may be right anyway)",
        )
    });
    debug_assert!(checks.last().is_some_and(|check| check.state != State::Fail), "it never keeps a proxy from working");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_out_of_releases() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("6.12-rc1"), Some((6, 12)));
        assert_eq!(version("nonsense"), None);
        assert!(version("5.15.0").unwrap() < KERNEL && version("6.10.1").unwrap() > KERNEL);
    }

    #[test]
    fn buffers_larger_than_the_host_fail() {
        assert_eq!(memory(1 << 50).state, State::Fail);
        assert_eq!(memory(1).state, State::Ok);
    }

    #[test]
    fn a_ublk_that_is_asked_for_and_not_there_fails() {
        let mut checks = Vec::new();
        kernel(false, &Needs { ublk: Some("source.ublk"), ..Needs::default() }, &mut checks);
        let found = checks.iter().find(|check| check.name == "ublk").unwrap();
        assert_eq!(found.state == State::Fail, Control::open().is_err());
        assert!(checks.iter().any(|check| check.name == "io_uring" && check.state == State::Ok));
    }
}
