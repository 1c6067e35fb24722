//! Control commands: making, starting, recovering and ending devices.
//!
//! Each blocks until the kernel has done it, on a small ring of its own: never on a data thread. Starting and the end of
//! a recovery wait for the queue's tags to be fetched there, and the kernel then reads the device for its partitions.

use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::{Mode, OFlags};
use zerocopy::{FromZeros, IntoBytes};

use super::uapi::{self, ControlCommand, DeviceInfo, Params, cmd, feature};
use crate::io::Errno;

/// What of the driver's features is needed.
const NEEDED: [(u64, &str); 3] = [
    (feature::USER_COPY, "UBLK_F_USER_COPY"),
    (feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE, "UBLK_F_USER_RECOVERY_REISSUE"),
    (feature::CMD_IOCTL_ENCODE, "UBLK_F_CMD_IOCTL_ENCODE"),
];

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
}

/// The control device, and a ring for its commands.
pub struct Control {
    ring: IoUring<squeue::Entry128>,
    file: OwnedFd,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Control({})", self.file.as_raw_fd())
    }
}

impl Control {
    /// Opens it, and makes sure that the driver has what is needed. Says also which features it has.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn open() -> Result<(Self, u64), ControlError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(uapi::CONTROL_PATH, flags, Mode::empty()).map_err(|error| match error {
            rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NXIO => ControlError::NoDriver,
            error => ControlError::Open { errno: Errno(error.raw_os_error()) },
        })?;
        let ring = IoUring::<squeue::Entry128>::builder().build(2);
        let ring = ring.map_err(|error| ControlError::Ring(Errno(error.raw_os_error().unwrap_or(libc::EIO))))?;
        let mut control = Self { ring, file };
        let mut features = 0u64;
        let asked = ControlCommand { dev_id: 0, ..ControlCommand::default() };
        control.command(cmd::GET_FEATURES, asked, features.as_mut_bytes()).map_err(ControlError::TooOld)?;
        match NEEDED.iter().find(|(bits, _)| features & bits != *bits) {
            Some((_, name)) => Err(ControlError::Feature(name)),
            None => Ok((control, features)),
        }
    }

    /// Does a command; `buffer` is what it reads or fills.
    fn command(&mut self, number: u32, command: ControlCommand, buffer: &mut [u8]) -> Result<i32, Errno> {
        let command = ControlCommand {
            queue_id: u16::MAX,
            len: u16::try_from(buffer.len()).map_err(|_| Errno::INVAL)?,
            addr: if buffer.is_empty() { 0 } else { buffer.as_mut_ptr().addr() as u64 },
            ..command
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<ControlCommand>()].copy_from_slice(command.as_bytes());
        buffer.as_mut_ptr().expose_provenance();
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
                return if done.result() < 0 { Err(Errno(-done.result())) } else { Ok(done.result()) };
            }
        }
    }

    fn plain(&mut self, number: u32, dev_id: u32, data: u64) -> Result<(), Errno> {
        self.command(number, ControlCommand { dev_id, data, ..ControlCommand::default() }, &mut []).map(|_| ())
    }

    /// Makes a device, dead still. `info.dev_id` `u32::MAX` lets the kernel choose; what it made comes back.
    ///
    /// # Errors
    /// The kernel's; `EEXIST` if the number is taken.
    pub fn add(&mut self, info: DeviceInfo) -> Result<DeviceInfo, Errno> {
        let mut info = info;
        let command = ControlCommand { dev_id: info.dev_id, ..ControlCommand::default() };
        self.command(cmd::ADD_DEV, command, info.as_mut_bytes())?;
        Ok(info)
    }

    /// What a device is now.
    ///
    /// # Errors
    /// `ENODEV`: there is none of that number.
    pub fn info(&mut self, dev_id: u32) -> Result<DeviceInfo, Errno> {
        let mut info = DeviceInfo::new_zeroed();
        let command = ControlCommand { dev_id, ..ControlCommand::default() };
        self.command(cmd::GET_DEV_INFO, command, info.as_mut_bytes())?;
        Ok(info)
    }

    /// Says what hosts will see; before the start.
    ///
    /// # Errors
    /// `EINVAL`: the kernel does not take these.
    pub fn set_params(&mut self, dev_id: u32, params: Params) -> Result<(), Errno> {
        let mut params = Params { len: size_of::<Params>() as u32, ..params };
        let command = ControlCommand { dev_id, ..ControlCommand::default() };
        self.command(cmd::SET_PARAMS, command, params.as_mut_bytes()).map(|_| ())
    }

    /// What hosts see.
    ///
    /// # Errors
    /// The kernel's.
    pub fn params(&mut self, dev_id: u32) -> Result<Params, Errno> {
        let mut params = Params { len: size_of::<Params>() as u32, ..Params::default() };
        let command = ControlCommand { dev_id, ..ControlCommand::default() };
        self.command(cmd::GET_PARAMS, command, params.as_mut_bytes())?;
        Ok(params)
    }

    /// Lets hosts see the device, once its tags are fetched by a thread of this process, which is waited for. The device is
    /// read for partitions before this returns.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.plain(cmd::START_DEV, dev_id, u64::from(std::process::id()))
    }

    /// Takes the device from its hosts. What they have under way has to be answered first.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stop(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.plain(cmd::STOP_DEV, dev_id, 0)
    }

    /// Ends the device, once nobody has it open any more, which is waited for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.plain(cmd::DEL_DEV, dev_id, 0)
    }

    /// Begins to take over a quiesced device.
    ///
    /// # Errors
    /// `EBUSY`: the process that served it has not quite ended.
    pub fn begin_recovery(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.plain(cmd::START_USER_RECOVERY, dev_id, 0)
    }

    /// Goes on with its hosts, once its tags are fetched, which is waited for; what was under way is asked again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn end_recovery(&mut self, dev_id: u32) -> Result<(), Errno> {
        self.plain(cmd::END_USER_RECOVERY, dev_id, u64::from(std::process::id()))
    }

    /// Tells hosts of another size, bytes; where the driver has [`feature::UPDATE_SIZE`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn update_size(&mut self, dev_id: u32, size: u64) -> Result<(), Errno> {
        self.plain(cmd::UPDATE_SIZE, dev_id, size / uapi::SECTOR)
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
}
