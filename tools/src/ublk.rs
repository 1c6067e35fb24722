//! `afterimage ublk`: the block devices of this host that disks have, seen from outside the proxy.

use std::path::Path;
use std::process::ExitCode;

use afterimage_dataplane::io::ublk::control::{Commands as _, Control, ControlError};
use afterimage_dataplane::io::ublk::uapi::{SECTOR, feature, state};
use clap::{Args as ClapArgs, Subcommand};
use serde::Serialize;

use crate::proxy::ublk::{LINKS, VIEW_LINKS, is_busy, numbers};

/// Options of `afterimage ublk`.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// List the ublk devices of this host.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// End a device whose proxy will not come back. What its hosts still wait for fails.
    Remove {
        /// The device: /dev/ublkbN, or a link to it.
        device: String,
        /// Also if a process serves it.
        #[arg(long)]
        force: bool,
    },
    /// Say whose an unprivileged device is, as numbers of user and group: for a rule of udev.
    Owner {
        /// The device: ublkcN or ublkbN, or its path.
        device: String,
    },
}

/// How long a device that has ended is waited for to be gone.
const GONE: std::time::Duration = std::time::Duration::from_secs(5);

/// Runs it. Exit code 0: done; 1: could not.
pub fn run(args: Args) -> ExitCode {
    let result = match args.verb {
        Verb::List { json } => list().map_err(|error| error.to_string()).and_then(|all| show(&all, json)),
        Verb::Remove { device, force } => number(&device).and_then(|number| remove(number, force)),
        Verb::Owner { device } => owner(&device),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimage: ublk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(all: &[Listed], json: bool) -> Result<(), String> {
    if json {
        let text = serde_json::to_string(&serde_json::json!({ "devices": all })).map_err(|error| error.to_string())?;
        println!("{text}");
        return Ok(());
    }
    for one in all {
        let used = if one.in_use { ", in use" } else { "" };
        println!(
            "{}\t{} bytes\t{}{used}\tprocess {}\t{}",
            one.device,
            one.size_bytes,
            one.state,
            one.pid,
            one.links.join(" ")
        );
    }
    Ok(())
}

/// Of `/dev/ublkbN`, or of a link that leads there.
fn number(device: &str) -> Result<u32, String> {
    let to = std::fs::canonicalize(device).unwrap_or_else(|_| device.into());
    let number = to.to_str().and_then(|path| path.strip_prefix("/dev/ublkb")).and_then(|number| number.parse().ok());
    number.ok_or_else(|| format!("`{device}` is no ublk device: allowed is /dev/ublkbN or a link to one"))
}

/// A device as the kernel has it.
#[derive(Debug, Serialize)]
struct Listed {
    /// `/dev/ublkbN`.
    device: String,
    /// `live`, `waiting` (nobody serves it; its hosts wait) or `dead`.
    state: &'static str,
    /// Bytes.
    size_bytes: u64,
    /// Process that serves it, or did last.
    pid: i32,
    /// Stable names that lead to it.
    links: Vec<String>,
    /// Mounted, or a part of another device.
    in_use: bool,
}

/// All of this host.
fn list() -> Result<Vec<Listed>, ControlError> {
    let mut control = Control::open()?;
    let mut all = Vec::new();
    for number in numbers() {
        let Ok(info) = control.info(number) else { continue };
        let device = format!("/dev/ublkb{number}");
        let size = control.params(number).map_or(0, |params| params.basic.dev_sectors * SECTOR);
        let state = match info.state {
            state::LIVE => "live",
            state::QUIESCED => "waiting",
            state::FAIL_IO => "failing",
            _ => "dead",
        };
        let links = [LINKS, VIEW_LINKS].iter().flat_map(|dir| links_to(Path::new(dir), &device, 0)).collect();
        let in_use = info.state == state::LIVE && is_busy(&device);
        all.push(Listed { device, state, size_bytes: size, pid: info.ublksrv_pid, links, in_use });
    }
    Ok(all)
}

/// How deep export names go.
const DEPTH: usize = 8;

fn links_to(dir: &Path, device: &str, depth: usize) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        match std::fs::read_link(&path) {
            Ok(to) if to == Path::new(device) => found.push(path.to_string_lossy().into_owned()),
            Ok(_) => {}
            Err(_) if depth < DEPTH => found.extend(links_to(&path, device, depth + 1)),
            Err(_) => {}
        }
    }
    found
}

/// Of a device that an ordinary user has made: `UID GID`. It fails of others, which stay root's.
fn owner(device: &str) -> Result<(), String> {
    let name = device.strip_prefix("/dev/").unwrap_or(device);
    let digits = name.strip_prefix("ublkc").or_else(|| name.strip_prefix("ublkb"));
    let number = digits.and_then(|digits| digits.parse().ok()).ok_or(format!("`{device}` is not ublkcN or ublkbN"))?;
    let mut control = Control::open().map_err(|error| error.to_string())?;
    let info = control.info(number).map_err(|errno| format!("{device}: {errno}"))?;
    if info.flags & feature::UNPRIVILEGED_DEV == 0 {
        return Err(format!("{device} is root's"));
    }
    println!("{} {}", info.owner_uid, info.owner_gid);
    Ok(())
}

/// Ends a device that nobody serves any more (its proxy will not come back). What its hosts wait for fails.
fn remove(number: u32, force: bool) -> Result<(), String> {
    let mut control = Control::open().map_err(|error| error.to_string())?;
    let info = control.info(number).map_err(|errno| format!("/dev/ublkb{number}: {errno}"))?;
    let device = format!("/dev/ublkb{number}");
    if info.state == state::LIVE && !force {
        let pid = info.ublksrv_pid;
        return Err(format!("{device} is served by process {pid}: take its disk out of protection, or use --force"));
    }
    if !crate::proxy::ublk::remove(&mut control, number, GONE).map_err(|why| format!("{device}: {why}"))? {
        eprintln!(
            "afterimage: ublk: {device} has ended; somebody has it open still, and its number is free after that"
        );
    }
    for path in [LINKS, VIEW_LINKS].iter().flat_map(|dir| links_to(Path::new(dir), &device, 0)) {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_its_path() {
        assert_eq!(number("/dev/ublkb7"), Ok(7));
        for wrong in ["/dev/sda", "ublkb7", "/dev/ublkbx", "/dev/ublkb7p1", ""] {
            assert!(number(wrong).unwrap_err().contains("/dev/ublkbN"), "{wrong}");
        }
    }

    #[test]
    fn links_are_found_in_folders() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("shop")).unwrap();
        std::os::unix::fs::symlink("/dev/ublkb3", dir.path().join("shop/data")).unwrap();
        std::os::unix::fs::symlink("/dev/ublkb4", dir.path().join("shop/logs")).unwrap();
        let found = links_to(dir.path(), "/dev/ublkb3", 0);
        assert_eq!(found, [dir.path().join("shop/data").to_string_lossy()]);
    }
}
