//! What devices are called: links under `/dev`, files for the rule of udev, and the numbers that they had.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Role;
use crate::proxy::keep;
use crate::proxy::state::Proxy;

/// File of the numbers that devices have.
const FILE: &str = "ublk.json";
/// Stable names of devices of disks, …
pub const LINKS: &str = "/dev/afterimage";
/// … and of views.
pub const VIEW_LINKS: &str = "/dev/afterimage-views";
/// Names of devices, for the udev rule of `tools/systemd`.
const NAMES: &str = "/run/afterimage/ublk";

/// A line of [`FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    role: Role,
    name: String,
    number: u32,
}

fn links(role: Role) -> &'static str {
    match role {
        Role::Source => LINKS,
        Role::Target => VIEW_LINKS,
    }
}

fn path(proxy: &Proxy) -> Option<PathBuf> {
    proxy.config.state_dir.as_ref().map(|dir| dir.join(FILE))
}

fn kept(proxy: &Proxy) -> Vec<Kept> {
    // A number is a convenience: without it, the device is known by its mark, or gets another one.
    let bytes = path(proxy).and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// The number that a device had.
pub fn number(proxy: &Proxy, role: Role, name: &str) -> Option<u32> {
    kept(proxy).into_iter().find(|kept| kept.role == role && kept.name == name).map(|kept| kept.number)
}

fn write(proxy: &Proxy, all: &[Kept]) -> Result<(), String> {
    let Some(path) = path(proxy) else { return Ok(()) };
    let text = serde_json::to_vec_pretty(all).map_err(|error| error.to_string())?;
    keep::replace(&path, &text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Keeps the number of a device.
///
/// # Errors
/// For a person.
pub fn keep_number(proxy: &Proxy, role: Role, name: &str, number: u32) -> Result<(), String> {
    let mut all = kept(proxy);
    let line = Kept { role, name: name.to_owned(), number };
    if all.contains(&line) {
        return Ok(());
    }
    all.retain(|kept| (kept.role, kept.name.as_str()) != (role, name));
    all.push(line);
    write(proxy, &all)
}

/// Forgets it.
pub fn forget_number(proxy: &Proxy, role: Role, name: &str) {
    let mut all = kept(proxy);
    all.retain(|kept| (kept.role, kept.name.as_str()) != (role, name));
    if let Err(error) = write(proxy, &all) {
        tracing::warn!(error, "the number of a ublk device is not forgotten");
    }
}

/// The stable name of a device; none if its export's name does not do for a path.
fn link_path(role: Role, name: &str) -> Option<PathBuf> {
    let fits = name.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    fits.then(|| Path::new(links(role)).join(name))
}

/// Makes the link to a device.
///
/// # Errors
/// The file system's.
pub fn link(role: Role, name: &str, number: u32) -> std::io::Result<()> {
    let Some(path) = link_path(role, name) else { return Ok(()) };
    let device = format!("/dev/ublkb{number}");
    if std::fs::read_link(&path).is_ok_and(|to| to == Path::new(&device)) {
        return Ok(());
    }
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    // Whoever opens it finds the old or the new one.
    let fresh = path.with_extension("new");
    let _ = std::fs::remove_file(&fresh);
    std::os::unix::fs::symlink(device, &fresh)?;
    std::fs::rename(fresh, path)
}

/// Says what a device is called before the kernel shows it. Where there is no udev, nobody reads it.
pub fn name_for_udev(role: Role, name: &str, number: u32) {
    let Some(path) = link_path(role, name) else { return };
    let Ok(name) = path.strip_prefix("/dev") else { return };
    let written = std::fs::create_dir_all(NAMES).and_then(|()| {
        std::fs::write(Path::new(NAMES).join(format!("ublkb{number}")), name.as_os_str().as_encoded_bytes())
    });
    if let Err(error) = written {
        tracing::debug!(%error, "udev is not told the name of a ublk device");
    }
}

/// Removes the link to a device, and its name for udev.
pub fn unlink(role: Role, name: &str, number: u32) {
    let _ = std::fs::remove_file(Path::new(NAMES).join(format!("ublkb{number}")));
    let Some(path) = link_path(role, name) else { return };
    let _ = std::fs::remove_file(&path);
    if let Some(folder) = path.parent().filter(|folder| *folder != Path::new(links(role))) {
        let _ = std::fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_their_folder() {
        assert_eq!(link_path(Role::Source, "shop/data"), Some(PathBuf::from("/dev/afterimage/shop/data")));
        for bad in ["", "/x", "../x", "a/../b", "a//b", "a/.", "a\0b"] {
            assert_eq!(link_path(Role::Source, bad), None, "{bad:?}");
        }
    }
}
