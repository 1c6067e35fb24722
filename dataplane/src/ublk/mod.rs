//! ublk front end: disks as block devices of this host (`/dev/ublkbN`), as a synchronous machine over [`crate::io::Io`].
//!
//! - [`server`]: what an owner of disks drives; devices, answers to their device, timer, limits.
//! - `device`: one device; its tags, and the pieces of their requests that are under way.
//! - `request`: what the kernel asks, judged.
//!
//! A host has no way to be told "later, elsewhere", and takes an error for the loss of its file system. So a request whose
//! disk goes away (it is taken over by another process, or opened again with other settings) is kept, and asked again of
//! the disk that comes back by that name; the kernel keeps it over the end of this process.
//!
//! Making, recovering and ending devices is control ([`crate::io::ublk::control`]): it blocks, and stands elsewhere.

use crate::host::{Geometry, MAX_PART};
use crate::io::ublk::control::Mode;
use crate::io::ublk::uapi::{Basic, DeviceInfo, Discard, Params, SECTOR, attr, feature, param};

pub(crate) mod device;
pub(crate) mod request;
pub mod server;

pub use server::{AttachError, Counters, DeviceId, DeviceStatus, Limits, Queue, Server};

/// Tags of a device.
pub const DEPTH: u16 = 128;
/// Tags of an unprivileged device: each has memory for the longest request.
pub const UNPRIVILEGED_DEPTH: u16 = 32;
/// Longest request of a device, bytes: a part, so that most requests are one.
pub const MAX_REQUEST: u32 = MAX_PART as u32;
/// Longest discard or zeroing, sectors (2 GiB).
const MAX_ZERO_SECTORS: u32 = 1 << 22;

/// Features that a device of this mode cannot do without.
pub const fn needed(mode: Mode) -> u64 {
    match mode {
        Mode::Full => feature::USER_COPY | feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE,
        Mode::Unprivileged => feature::UNPRIVILEGED_DEV,
    }
}

/// A device to be made, by a driver with these features. `own` comes back from the kernel as long as the device lives: it
/// tells whose it is.
pub fn device_info(dev_id: u32, own: u64, mode: Mode, features: u64) -> DeviceInfo {
    let wanted = feature::CMD_IOCTL_ENCODE | feature::UPDATE_SIZE;
    DeviceInfo {
        nr_hw_queues: 1,
        queue_depth: match mode {
            Mode::Full => DEPTH,
            Mode::Unprivileged => UNPRIVILEGED_DEPTH,
        },
        max_io_buf_bytes: MAX_REQUEST,
        dev_id,
        flags: needed(mode) | wanted & features,
        ublksrv_flags: own,
        ..DeviceInfo::default()
    }
}

/// What hosts see of a disk.
pub fn params(geometry: &Geometry) -> Params {
    let shift = |bytes: u32| bytes.max(SECTOR as u32).ilog2() as u8;
    let logical = shift(geometry.block);
    let physical = shift(geometry.physical_block.max(geometry.block));
    let chunk = (MAX_PART as u64 / SECTOR) as u32;
    let read_only = if geometry.read_only { attr::READ_ONLY } else { 0 };
    let zero = if geometry.read_only { 0 } else { MAX_ZERO_SECTORS };
    let discard = geometry.discard && !geometry.read_only;
    Params {
        types: param::BASIC | param::DISCARD,
        basic: Basic {
            attrs: attr::VOLATILE_CACHE | attr::FUA | read_only,
            logical_bs_shift: logical,
            physical_bs_shift: physical,
            io_opt_shift: physical,
            io_min_shift: physical,
            max_sectors: chunk,
            chunk_sectors: chunk,
            dev_sectors: geometry.size / SECTOR,
            virt_boundary_mask: 0,
        },
        discard: Discard {
            discard_alignment: 0,
            discard_granularity: geometry.physical_block.max(geometry.block),
            max_discard_sectors: if discard { zero } else { 0 },
            max_write_zeroes_sectors: zero,
            max_discard_segments: 1,
            reserved0: 0,
        },
        ..Params::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        let serial = "1".to_owned();
        Geometry { size: 1 << 30, block: 512, physical_block: 4096, read_only: false, discard: true, serial }
    }

    #[test]
    fn a_device_is_as_its_disk() {
        let params = params(&geometry());
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (9, 12));
        assert_eq!(params.basic.dev_sectors, (1 << 30) / 512);
        assert_eq!(params.basic.attrs, attr::VOLATILE_CACHE | attr::FUA);
        assert!(params.discard.max_discard_sectors > 0 && params.discard.max_write_zeroes_sectors > 0);
    }

    #[test]
    fn nothing_can_be_written_to_a_read_only_disk_and_nothing_discarded_where_the_disk_cannot() {
        let read_only = params(&Geometry { read_only: true, ..geometry() });
        assert!(read_only.basic.attrs & attr::READ_ONLY != 0);
        assert_eq!((read_only.discard.max_discard_sectors, read_only.discard.max_write_zeroes_sectors), (0, 0));
        let firm = params(&Geometry { discard: false, ..geometry() });
        assert_eq!(firm.discard.max_discard_sectors, 0);
        assert!(firm.discard.max_write_zeroes_sectors > 0);
    }
}
