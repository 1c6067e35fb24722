//! What is asked of the driver for a device, in which order, and what its answers mean. Everything here blocks.

use std::time::{Duration, Instant};

use afterimage_dataplane::host::Geometry;
use afterimage_dataplane::io::Errno;
use afterimage_dataplane::io::ublk::control::{Commands, Mode, device_path};
use afterimage_dataplane::io::ublk::uapi::{DeviceInfo, Params, feature, state};
use afterimage_dataplane::ublk::{device_info, needed, params};

/// Where the kernel lists devices.
const SYS: &str = "/sys/class/ublk-char";
/// Time between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(20);

/// How long is waited for what.
#[derive(Copy, Clone, Debug)]
pub struct Patience {
    /// For the process that served a device before: it ends when its last I/O has.
    pub take_over: Duration,
    /// For udev to give a fresh device to its owner.
    pub owner: Duration,
    /// For a number to be free again.
    pub gone: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let (take_over, owner) = (Duration::from_secs(60), Duration::from_secs(10));
        Self { take_over, owner, gone: Duration::from_secs(5) }
    }
}

/// A device that is there, and not served.
#[derive(Debug)]
pub struct Found {
    pub info: DeviceInfo,
    pub params: Params,
    /// It was there already, with its hosts.
    pub recovers: bool,
}

/// Which device is looked for.
#[derive(Clone, Debug)]
pub struct Sought {
    /// Tells whose it is.
    pub own: u64,
    /// The number that it had, if it had one.
    pub number: Option<u32>,
    pub geometry: Geometry,
    pub mode: Mode,
}

/// All devices of the kernel.
pub fn numbers() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(SYS) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.strip_prefix("ublkc")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// Looks until it is so, or no longer.
fn until(within: Duration, mut so: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    while !so() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

/// Of these devices the one with this mark. Devices of others may have any number there, but not these features with it.
fn find(control: &mut impl Commands, all: &[u32], own: u64) -> Option<DeviceInfo> {
    let ours = feature::USER_RECOVERY | feature::UNPRIVILEGED_DEV;
    let infos = all.iter().filter_map(|number| control.info(*number).ok());
    infos.into_iter().find(|info| info.ublksrv_flags == own && info.flags & ours != 0)
}

/// Finds the device that is ours, and waits for whoever served it to end; or makes one, by its number if that is free.
///
/// # Errors
/// Why there is none, for a person.
pub fn find_or_make(
    control: &mut impl Commands,
    all: impl Fn() -> Vec<u32>,
    sought: &Sought,
    patience: Patience,
) -> Result<Found, String> {
    let end = Instant::now() + patience.take_over;
    while let Some(info) = find(control, &all(), sought.own) {
        let number = info.dev_id;
        match info.state {
            state::DEAD => {
                // It was made, and never started; or it was stopped and not ended; or it ended with its process.
                remove(control, number, patience.gone).map_err(|why| format!("/dev/ublkc{number}: {why}"))?;
                break;
            }
            state::QUIESCED | state::FAIL_IO => match control.begin_recovery(number) {
                // Where nothing of it is fetched somebody had begun before us, and was killed: its tags wait to be fetched.
                Ok(()) | Err(Errno::INVAL) => {
                    let params = control.params(number).map_err(|errno| format!("/dev/ublkc{number}: {errno}"))?;
                    return Ok(Found { info, params, recovers: true });
                }
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(format!("/dev/ublkc{number} cannot be taken over: {errno}")),
            },
            _ => {} // The kernel has not seen yet that its process has gone.
        }
        if Instant::now() >= end {
            return Err(format!("/dev/ublkc{number} is served by process {}, which does not end", info.ublksrv_pid));
        }
        std::thread::sleep(LOOK);
    }
    make(control, sought, patience)
}

fn make(control: &mut impl Commands, sought: &Sought, patience: Patience) -> Result<Found, String> {
    let features = control.features();
    let wanted = |number| device_info(number, sought.own, sought.mode, features);
    let made = match sought.number.map(|number| control.add(wanted(number))) {
        Some(Err(Errno::EXIST)) | None => control.add(wanted(u32::MAX)),
        Some(result) => result,
    };
    let info = made.map_err(|errno| match (errno, sought.mode) {
        (Errno(code), Mode::Unprivileged) if code == EACCES => {
            "no more unprivileged devices can be made: see ublks_max of the module ublk_drv".to_owned()
        }
        _ => format!("a device cannot be made: {errno}"),
    })?;
    let give_up = |control: &mut _, why| {
        let _ = Commands::delete(control, info.dev_id);
        Err(why)
    };
    // The kernel leaves out what it does not know, and says so.
    let missing = needed(sought.mode) & !info.flags;
    if missing != 0 {
        return give_up(control, format!("the kernel has left out features {missing:#x} of its device"));
    }
    if sought.mode == Mode::Unprivileged {
        // It belongs to root until a rule of udev gives it away.
        let number = info.dev_id;
        let ours = until(patience.owner, || control.info(number).is_ok());
        if !ours {
            let path = device_path(number);
            return Err(format!(
                "{path} is not given to this user: is the rule of udev for unprivileged devices there?"
            ));
        }
    }
    let params = params(&sought.geometry);
    if let Err(errno) = control.set_params(info.dev_id, params) {
        let why = format!("the kernel does not take a device of {} bytes: {errno}", sought.geometry.size);
        return give_up(control, why);
    }
    Ok(Found { info, params, recovers: false })
}

const EACCES: i32 = 13;

/// Takes a device from its hosts, and ends it. What they have under way must be answered by whoever serves it. False: its
/// number is not free yet, since somebody holds it open; it goes with that.
///
/// # Errors
/// For a person.
pub fn remove(control: &mut impl Commands, number: u32, within: Duration) -> Result<bool, String> {
    match control.stop(number).and_then(|()| control.delete(number)) {
        Ok(()) | Err(Errno::NODEV) => {}
        Err(errno) => return Err(format!("it does not end: {errno}")),
    }
    Ok(until(within, || control.info(number).err() == Some(Errno::NODEV)))
}

/// What has come of a new size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resized {
    /// Hosts see it.
    Done,
    /// The kernel cannot tell them. The device keeps its size.
    Cannot,
}

/// Tells the hosts of a device that it has got larger.
///
/// # Errors
/// The device is not live, or the kernel says no.
pub fn resize(control: &mut impl Commands, number: u32, size: u64) -> Result<Resized, Errno> {
    if control.features() & feature::UPDATE_SIZE == 0 {
        return Ok(Resized::Cannot);
    }
    // Before 7.0 the kernel does not bear it of a device that is not there for hosts.
    if control.info(number)?.state != state::LIVE {
        return Err(Errno::BUSY);
    }
    match control.update_size(number, size) {
        Ok(()) => Ok(Resized::Done),
        Err(Errno(code)) if code == EOPNOTSUPP => Ok(Resized::Cannot),
        Err(errno) => Err(errno),
    }
}

const EOPNOTSUPP: i32 = 95;

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
