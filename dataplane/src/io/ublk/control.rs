//! Control commands: making, starting, recovering and ending devices.
//!
//! Each blocks until the kernel has done it, on a small ring of its own: never on a data thread. Starting and the end of
//! a recovery wait for the queue's tags to be fetched there, and the kernel then reads the device for its partitions.
//!
//! Commands are [`Commands`], so that what is decided about devices can be tested against a driver that is not there.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::{Mode as FileMode, OFlags};
use zerocopy::{FromZeros, IntoBytes};

use super::uapi::{self, ControlCommand, DeviceInfo, Params, cmd, feature};
use crate::io::Errno;

/// How devices are made.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By root: a device outlives its process ([`feature::USER_RECOVERY_REISSUE`]), and we copy its data.
    Full,
    /// By anybody ([`feature::UNPRIVILEGED_DEV`]): the kernel lets such a device end with its process, and copies data itself.
    Unprivileged,
}

/// What of the driver's features is needed.
const NEEDED: [(Mode, u64, &str); 4] = [
    (Mode::Full, feature::USER_COPY, "UBLK_F_USER_COPY"),
    (Mode::Full, feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE, "UBLK_F_USER_RECOVERY_REISSUE"),
    (Mode::Full, feature::CMD_IOCTL_ENCODE, "UBLK_F_CMD_IOCTL_ENCODE"),
    (Mode::Unprivileged, feature::UNPRIVILEGED_DEV, "UBLK_F_UNPRIVILEGED_DEV"),
];
/// How often a command that a signal has interrupted is given again.
const INTERRUPTED: usize = 100;

/// Why there is no ublk here; each names what is missing and what to do.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// No driver.
    #[error(
        "this kernel offers no ublk: {} is missing; load the module ublk_drv (`modprobe ublk_drv`; Linux 6.5 or later \
         with CONFIG_BLK_DEV_UBLK)",
        uapi::CONTROL_PATH
    )]
    NoDriver,
    /// The device of control commands cannot be opened.
    #[error("{} cannot be opened ({errno}): only root may, unless udev rules say otherwise", uapi::CONTROL_PATH)]
    Open {
        /// Why.
        errno: Errno,
    },
    /// No ring with large entries.
    #[error("io_uring with large entries (IORING_SETUP_SQE128) cannot be set up: {0}")]
    Ring(Errno),
    /// The driver does not say what it can.
    #[error("this kernel's ublk is too old: it cannot say what it can ({0}); Linux 6.5 and later can")]
    TooOld(Errno),
    /// The driver lacks something.
    #[error("this kernel's ublk lacks {0}; Linux 6.5 and later have it")]
    Feature(&'static str),
    /// Not root.
    #[error(
        "devices that outlive this process are made by root only (CAP_SYS_ADMIN); an ordinary user can have ones that end \
         with it: `\"unprivileged\"`"
    )]
    Privilege,
}

/// Whether these features of a driver do.
///
/// # Errors
/// [`ControlError::Feature`].
pub fn check(features: u64, mode: Mode) -> Result<(), ControlError> {
    match NEEDED.iter().find(|(of, bits, _)| *of == mode && features & bits != *bits) {
        Some((.., name)) => Err(ControlError::Feature(name)),
        None => Ok(()),
    }
}

/// Whether this process may make devices that outlive it.
pub fn is_privileged() -> bool {
    let sets = rustix::thread::capabilities(None);
    sets.is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN))
}

/// What a driver does on command.
pub trait Commands {
    /// [`feature`]s of the driver.
    fn features(&self) -> u64;

    /// Makes a device, dead still. `info.dev_id` `u32::MAX` lets the kernel choose; what it made comes back, with those of
    /// the features asked for that it has got.
    ///
    /// # Errors
    /// The kernel's; `EEXIST` if the number is taken, `EACCES` if there are as many unprivileged ones as may be.
    fn add(&mut self, info: DeviceInfo) -> Result<DeviceInfo, Errno>;

    /// What a device is now.
    ///
    /// # Errors
    /// `ENODEV`: there is none of that number. `EACCES` or `EPERM`: it is somebody else's.
    fn info(&mut self, dev_id: u32) -> Result<DeviceInfo, Errno>;

    /// Says what hosts will see; before the start.
    ///
    /// # Errors
    /// `EINVAL`: the kernel does not take these.
    fn set_params(&mut self, dev_id: u32, params: Params) -> Result<(), Errno>;

    /// What hosts see.
    ///
    /// # Errors
    /// The kernel's.
    fn params(&mut self, dev_id: u32) -> Result<Params, Errno>;

    /// Lets hosts see the device, once its tags are fetched by a thread of this process, which is waited for. The device is
    /// read for partitions before this returns.
    ///
    /// # Errors
    /// The kernel's.
    fn start(&mut self, dev_id: u32) -> Result<(), Errno>;

    /// Takes the device from its hosts. What they have under way has to be answered first.
    ///
    /// # Errors
    /// The kernel's.
    fn stop(&mut self, dev_id: u32) -> Result<(), Errno>;

    /// Ends the device. Its number is free ([`Commands::info`] says `ENODEV`) when nobody has it open any more, which is not
    /// waited for where the kernel can do without (6.9; not for unprivileged devices).
    ///
    /// # Errors
    /// The kernel's.
    fn delete(&mut self, dev_id: u32) -> Result<(), Errno>;

    /// Begins to take over a device that waits.
    ///
    /// # Errors
    /// `EBUSY`: the process that served it has not quite ended. `EINVAL`: none of its tags is fetched, so that there is
    /// nothing to be taken over: somebody has begun this, and ended.
    fn begin_recovery(&mut self, dev_id: u32) -> Result<(), Errno>;

    /// Goes on with its hosts, once its tags are fetched, which is waited for; what was under way is asked again.
    ///
    /// # Errors
    /// The kernel's.
    fn end_recovery(&mut self, dev_id: u32) -> Result<(), Errno>;

    /// Tells hosts of another size, bytes; where the driver has [`feature::UPDATE_SIZE`], and only of a live device.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: the driver cannot.
    fn update_size(&mut self, dev_id: u32, size: u64) -> Result<(), Errno>;
}

/// The control device, and a ring for its commands.
pub struct Control {
    ring: IoUring<squeue::Entry128>,
    file: OwnedFd,
    features: u64,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Control({})", self.file.as_raw_fd())
    }
}

/// What a command is about.
#[derive(Copy, Clone, Default)]
struct About {
    dev_id: u32,
    data: u64,
    /// The path of the device is to be said.
    path: bool,
}

impl Control {
    /// Opens it, and asks the driver what it can.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn open() -> Result<Self, ControlError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(uapi::CONTROL_PATH, flags, FileMode::empty()).map_err(|error| match error {
            rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NXIO => ControlError::NoDriver,
            error => ControlError::Open { errno: Errno(error.raw_os_error()) },
        })?;
        let ring = IoUring::<squeue::Entry128>::builder().build(2);
        let ring = ring.map_err(|error| ControlError::Ring(Errno(error.raw_os_error().unwrap_or(libc::EIO))))?;
        let mut control = Self { ring, file, features: 0 };
        let mut features = 0u64;
        control.command(cmd::GET_FEATURES, About::default(), features.as_mut_bytes()).map_err(ControlError::TooOld)?;
        control.features = features;
        Ok(control)
    }

    /// Does a command; `data` is what it reads or fills.
    fn command(&mut self, number: u32, about: About, data: &mut [u8]) -> Result<(), Errno> {
        let path = if about.path { device_path(about.dev_id) } else { String::new() };
        let mut buffer = with_path(&path, data);
        let command = ControlCommand {
            dev_id: about.dev_id,
            queue_id: u16::MAX,
            len: u16::try_from(buffer.len()).map_err(|_| Errno::INVAL)?,
            addr: 0,
            data: about.data,
            dev_path_len: path.len() as u16,
            ..ControlCommand::default()
        };
        let mut tries = 0;
        loop {
            let result = self.give(number, command, &mut buffer);
            tries += 1;
            if result != Err(Errno(libc::EINTR)) || tries == INTERRUPTED {
                data.copy_from_slice(&buffer[path.len()..]);
                return result;
            }
        }
    }

    fn give(&mut self, number: u32, command: ControlCommand, buffer: &mut [u8]) -> Result<(), Errno> {
        let addr = if buffer.is_empty() { 0 } else { buffer.as_mut_ptr().expose_provenance() as u64 };
        let command = ControlCommand { addr, ..command };
        let mut bytes = [0; 80];
        bytes[..size_of::<ControlCommand>()].copy_from_slice(command.as_bytes());
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), number).cmd(bytes).build();
        // SAFETY: the descriptor is open as long as `self`; the kernel uses the buffer at most until the completion, which
        // is waited for below, whatever happens, while it is borrowed here.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(Errno::BUSY);
        }
        loop {
            // A signal, or want of memory, only means that it has to be asked again.
            let _ = self.ring.submit_and_wait(1);
            if let Some(done) = self.ring.completion().next() {
                return if done.result() < 0 { Err(Errno(-done.result())) } else { Ok(()) };
            }
        }
    }

    /// A command to a device that is there. Of an unprivileged one the kernel wants the path, whoever asks; of others it takes
    /// none.
    fn tell(&mut self, number: u32, dev_id: u32, data: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let path = self.wants_path(dev_id)?;
        self.command(number, About { dev_id, data, path }, buffer)
    }

    fn wants_path(&mut self, dev_id: u32) -> Result<bool, Errno> {
        Ok(self.info(dev_id)?.flags & feature::UNPRIVILEGED_DEV != 0)
    }
}

/// The device that a process serves a device by.
pub fn device_path(dev_id: u32) -> String {
    format!("/dev/ublkc{dev_id}")
}

/// The path of a device stands before what a command is about.
fn with_path(path: &str, data: &[u8]) -> Vec<u8> {
    let mut buffer = Vec::with_capacity(path.len() + data.len());
    buffer.extend_from_slice(path.as_bytes());
    buffer.extend_from_slice(data);
    buffer
}

impl Commands for Control {
    fn features(&self) -> u64 {
        self.features
    }

    fn add(&mut self, info: DeviceInfo) -> Result<DeviceInfo, Errno> {
        let mut info = info;
        self.command(cmd::ADD_DEV, About { dev_id: info.dev_id, ..About::default() }, info.as_mut_bytes())?;
        Ok(info)
    }

    fn info(&mut self, dev_id: u32) -> Result<DeviceInfo, Errno> {
        let mut info = DeviceInfo::new_zeroed();
        let about = About { dev_id, data: 0, path: true };
        match self.command(cmd::GET_DEV_INFO2, about, info.as_mut_bytes()) {
            // Its path is not here: root may do without.
            Err(Errno(libc::ENOENT)) => {
                self.command(cmd::GET_DEV_INFO, About { path: false, ..about }, info.as_mut_bytes())?;
            }
            result => result?,
        }
        Ok(info)
    }

    fn set_params(&mut self, dev_id: u32, params: Params) -> Result<(), Errno> {
        let mut params = Params { len: size_of::<Params>() as u32, ..params };
        self.tell(cmd::SET_PARAMS, dev_id, 0, params.as_mut_bytes())
    }

    fn params(&mut self, dev_id: u32) -> Result<Params, Errno> {
        let mut params = Params { len: size_of::<Params>() as u32, ..Params::default() };
        self.tell(cmd::GET_PARAMS, dev_id, 0, params.as_mut_bytes())?;
        Ok(params)
    }

    fn start(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.tell(cmd::START_DEV, dev_id, u64::from(std::process::id()), &mut [])
    }

    fn stop(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.tell(cmd::STOP_DEV, dev_id, 0, &mut [])
    }

    fn delete(&mut self, dev_id: u32) -> Result<(), Errno> {
        let path = self.wants_path(dev_id)?;
        let about = About { dev_id, data: 0, path };
        if !path {
            match self.command(cmd::DEL_DEV_ASYNC, about, &mut []) {
                Err(Errno(libc::EOPNOTSUPP | libc::EINVAL)) => {}
                result => return result,
            }
        }
        self.command(cmd::DEL_DEV, about, &mut [])
    }

    fn begin_recovery(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.tell(cmd::START_USER_RECOVERY, dev_id, 0, &mut [])
    }

    fn end_recovery(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.tell(cmd::END_USER_RECOVERY, dev_id, u64::from(std::process::id()), &mut [])
    }

    fn update_size(&mut self, dev_id: u32, size: u64) -> Result<(), Errno> {
        self.tell(cmd::UPDATE_SIZE, dev_id, size / uapi::SECTOR, &mut [])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_ublk_is_named() {
        if std::path::Path::new(uapi::CONTROL_PATH).exists() {
            return; // This one has it: the guests' test sees to the rest.
        }
        let error = Control::open().expect_err("there is no driver");
        assert_eq!(error, ControlError::NoDriver);
        assert!(error.to_string().contains("modprobe ublk_drv"), "{error}");
    }

    #[test]
    fn a_driver_that_lacks_something_is_named_and_what_it_has_besides_does_not_matter() {
        for (mode, bits, name) in NEEDED {
            assert_eq!(check(!bits, mode), Err(ControlError::Feature(name)));
        }
        assert_eq!((check(u64::MAX, Mode::Full), check(u64::MAX, Mode::Unprivileged)), (Ok(()), Ok(())));
        // Linux 6.5, and 6.12.
        assert_eq!((check(0xff, Mode::Full), check(0x3ff, Mode::Unprivileged)), (Ok(()), Ok(())));
        // Linux 6.0 had no copies by the server; an ordinary user could have a device from 6.2 on.
        assert_eq!((check(0x7f, Mode::Full).is_err(), check(0x7f, Mode::Unprivileged)), (true, Ok(())));
    }

    #[test]
    fn the_path_of_a_device_stands_before_its_data() {
        assert_eq!(with_path(&device_path(7), &[1, 2]), b"/dev/ublkc7\x01\x02");
        assert_eq!(with_path("", &[3]), [3]);
    }
}
