//! The kernel's interface to ublk (`linux/ublk_cmd.h`): numbers and layouts, in the host's byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device of control commands.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// An encoded ioctl: `direction` 2 reads, 3 reads and writes.
const fn ioctl(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}

const fn control(direction: u32, number: u32) -> u32 {
    ioctl(direction, number, size_of::<ControlCommand>())
}

const fn queue(number: u32) -> u32 {
    ioctl(3, number, size_of::<QueueCommand>())
}

/// Control commands.
pub mod cmd {
    #![allow(missing_docs)]
    use super::control;

    pub const GET_DEV_INFO: u32 = control(2, 0x02);
    pub const ADD_DEV: u32 = control(3, 0x04);
    pub const DEL_DEV: u32 = control(3, 0x05);
    pub const START_DEV: u32 = control(3, 0x06);
    pub const STOP_DEV: u32 = control(3, 0x07);
    pub const SET_PARAMS: u32 = control(3, 0x08);
    pub const GET_PARAMS: u32 = control(2, 0x09);
    pub const START_USER_RECOVERY: u32 = control(3, 0x10);
    pub const END_USER_RECOVERY: u32 = control(3, 0x11);
    pub const GET_DEV_INFO2: u32 = control(2, 0x12);
    pub const GET_FEATURES: u32 = control(2, 0x13);
    pub const DEL_DEV_ASYNC: u32 = control(2, 0x14);
    pub const UPDATE_SIZE: u32 = control(3, 0x15);
}

/// Commands of a queue.
pub mod io_cmd {
    #![allow(missing_docs)]
    use super::queue;

    pub const FETCH_REQ: u32 = queue(0x20);
    pub const COMMIT_AND_FETCH_REQ: u32 = queue(0x21);
}

/// Features, of a device and of the driver.
pub mod feature {
    #![allow(missing_docs)]
    pub const SUPPORT_ZERO_COPY: u64 = 1 << 0;
    pub const NEED_GET_DATA: u64 = 1 << 2;
    pub const USER_RECOVERY: u64 = 1 << 3;
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub const UNPRIVILEGED_DEV: u64 = 1 << 5;
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    pub const USER_COPY: u64 = 1 << 7;
    pub const ZONED: u64 = 1 << 8;
    pub const USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
    pub const UPDATE_SIZE: u64 = 1 << 10;
}

/// States of a device.
pub mod state {
    #![allow(missing_docs)]
    pub const DEAD: u16 = 0;
    pub const LIVE: u16 = 1;
    pub const QUIESCED: u16 = 2;
    pub const FAIL_IO: u16 = 3;
}

/// What a request wants; bits 0 to 7 of [`Descriptor::op_flags`].
pub mod op {
    #![allow(missing_docs)]
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const FLUSH: u8 = 2;
    pub const DISCARD: u8 = 3;
    pub const WRITE_ZEROES: u8 = 5;
}

/// How; further bits of [`Descriptor::op_flags`].
pub mod op_flag {
    #![allow(missing_docs)]
    pub const FUA: u32 = 1 << 13;
    pub const NOUNMAP: u32 = 1 << 15;
}

/// Attributes of a device, [`Basic::attrs`].
pub mod attr {
    #![allow(missing_docs)]
    pub const READ_ONLY: u32 = 1 << 0;
    pub const VOLATILE_CACHE: u32 = 1 << 2;
    pub const FUA: u32 = 1 << 3;
}

/// Which parameters are set, [`Params::types`].
pub mod param {
    #![allow(missing_docs)]
    pub const BASIC: u32 = 1 << 0;
    pub const DISCARD: u32 = 1 << 1;
}

/// Bytes of a sector in every field that counts sectors.
pub const SECTOR: u64 = 512;
/// Most tags of a queue.
pub const MAX_DEPTH: u16 = 4096;
/// Longest request, bytes: so many offsets within its data can be named.
pub const MAX_REQUEST: u32 = 1 << BUFFER_BITS;
/// Where the descriptors of queue 0 are mapped from.
pub const DESCRIPTORS_OFFSET: u64 = 0;

const BUFFER_OFFSET: u64 = 0x8000_0000;
const BUFFER_BITS: u32 = 25;

/// Where byte `at` of the data of a tag of queue 0 is read and written.
pub const fn data_offset(tag: u16, at: u32) -> u64 {
    BUFFER_OFFSET + ((tag as u64) << BUFFER_BITS | at as u64)
}

/// Whose data an offset is, and which byte of it: see [`data_offset`].
pub const fn data_place(offset: u64) -> (u16, u32) {
    let place = offset - BUFFER_OFFSET;
    ((place >> BUFFER_BITS) as u16, (place & (MAX_REQUEST as u64 - 1)) as u32)
}

/// A control command (`ublksrv_ctrl_cmd`).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ControlCommand {
    /// Device; `u32::MAX` where the kernel is to choose.
    pub dev_id: u32,
    /// `u16::MAX`: none.
    pub queue_id: u16,
    /// Bytes at `addr`.
    pub len: u16,
    /// A buffer, in or out.
    pub addr: u64,
    /// Inline.
    pub data: u64,
    /// Of unprivileged devices: so many bytes at `addr` are the path of `/dev/ublkcN`, and what is else there follows.
    pub dev_path_len: u16,
    /// Unused.
    pub pad: u16,
    /// Unused.
    pub reserved: u32,
}

/// A device (`ublksrv_ctrl_dev_info`).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DeviceInfo {
    /// Queues.
    pub nr_hw_queues: u16,
    /// Tags of each.
    pub queue_depth: u16,
    /// [`state`].
    pub state: u16,
    /// Unused.
    pub pad0: u16,
    /// Longest request, bytes.
    pub max_io_buf_bytes: u32,
    /// Number: `/dev/ublkcN`, `/dev/ublkbN`.
    pub dev_id: u32,
    /// Process that serves it.
    pub ublksrv_pid: i32,
    /// Unused.
    pub pad1: u32,
    /// [`feature`].
    pub flags: u64,
    /// The server's own, kept by the kernel.
    pub ublksrv_flags: u64,
    /// Of whoever made it.
    pub owner_uid: u32,
    /// As above.
    pub owner_gid: u32,
    /// Unused.
    pub reserved1: u64,
    /// Unused.
    pub reserved2: u64,
}

/// Parameters that every device has (`ublk_param_basic`).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Basic {
    /// [`attr`].
    pub attrs: u32,
    /// Logical block, as a power of two; so the next three.
    pub logical_bs_shift: u8,
    /// Physical block.
    pub physical_bs_shift: u8,
    /// Best I/O.
    pub io_opt_shift: u8,
    /// Smallest I/O without a penalty.
    pub io_min_shift: u8,
    /// Longest request.
    pub max_sectors: u32,
    /// No request crosses a multiple of this.
    pub chunk_sectors: u32,
    /// Size.
    pub dev_sectors: u64,
    /// 0: none.
    pub virt_boundary_mask: u64,
}

/// Discarding and zeroing (`ublk_param_discard`).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Discard {
    /// Bytes.
    pub discard_alignment: u32,
    /// Bytes.
    pub discard_granularity: u32,
    /// 0: no discard.
    pub max_discard_sectors: u32,
    /// 0: no zeroing.
    pub max_write_zeroes_sectors: u32,
    /// 1 where there is discard.
    pub max_discard_segments: u16,
    /// Unused.
    pub reserved0: u16,
}

/// All parameters that we know (`ublk_params`, its beginning: `len` says how much of it there is).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Params {
    /// Bytes of this.
    pub len: u32,
    /// [`param`].
    pub types: u32,
    /// Always.
    pub basic: Basic,
    /// With [`param::DISCARD`].
    pub discard: Discard,
    /// Up to a multiple of 8.
    pub pad: u32,
}

/// A command of a queue (`ublksrv_io_cmd`).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct QueueCommand {
    /// Queue.
    pub q_id: u16,
    /// Tag.
    pub tag: u16,
    /// Of the request that it answers: bytes of a read or write, 0 of others, or a negated errno.
    pub result: i32,
    /// Where the kernel copies data from and to, itself; 0 with `UBLK_F_USER_COPY`.
    pub addr: u64,
}

/// A request (`ublksrv_io_desc`), as the kernel has written it.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Descriptor {
    /// [`op`] and [`op_flag`].
    pub op_flags: u32,
    /// Length.
    pub nr_sectors: u32,
    /// Begin.
    pub start_sector: u64,
    /// Unused with `UBLK_F_USER_COPY`.
    pub addr: u64,
}

impl Descriptor {
    /// [`op`].
    pub fn op(&self) -> u8 {
        self.op_flags as u8
    }
}

// What the kernel's own header says.
const _: () = {
    assert!(size_of::<ControlCommand>() == 32 && std::mem::offset_of!(ControlCommand, dev_path_len) == 24);
    assert!(size_of::<DeviceInfo>() == 64 && std::mem::offset_of!(DeviceInfo, flags) == 24);
    assert!(size_of::<Basic>() == 32 && std::mem::offset_of!(Basic, dev_sectors) == 16);
    assert!(size_of::<Discard>() == 20 && std::mem::offset_of!(Params, discard) == 40);
    assert!(size_of::<QueueCommand>() == 16 && size_of::<Descriptor>() == 24);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_that_the_kernel_knows() {
        // Computed by a C compiler from linux/ublk_cmd.h.
        assert_eq!(cmd::GET_DEV_INFO, 0x8020_7502);
        assert_eq!(cmd::ADD_DEV, 0xc020_7504);
        assert_eq!(cmd::GET_DEV_INFO2, 0x8020_7512);
        assert_eq!(cmd::GET_FEATURES, 0x8020_7513);
        assert_eq!(cmd::DEL_DEV_ASYNC, 0x8020_7514);
        assert_eq!(cmd::UPDATE_SIZE, 0xc020_7515);
        assert_eq!(io_cmd::FETCH_REQ, 0xc010_7520);
        assert_eq!(io_cmd::COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn data_of_a_tag_lies_where_the_kernel_looks_for_it() {
        assert_eq!(data_offset(0, 0), 0x8000_0000);
        assert_eq!(data_offset(1, 512), 0x8000_0000 + (1 << 25) + 512);
        assert_eq!(data_offset(MAX_DEPTH - 1, MAX_REQUEST - 1), 0x8000_0000 + (4096u64 << 25) - 1);
        for place in [(0, 0), (1, 512), (MAX_DEPTH - 1, MAX_REQUEST - 1)] {
            assert_eq!(data_place(data_offset(place.0, place.1)), place);
        }
    }

    #[test]
    fn fields_stand_where_the_kernel_has_them() {
        let info =
            DeviceInfo { nr_hw_queues: 1, queue_depth: 2, dev_id: 3, flags: 4, owner_gid: 5, ..Default::default() };
        let bytes = info.as_bytes();
        assert_eq!((bytes[0], bytes[2], bytes[12], bytes[24], bytes[44]), (1, 2, 3, 4, 5));
        let params = Params {
            basic: Basic { logical_bs_shift: 9, max_sectors: 7, ..Default::default() },
            discard: Discard { max_discard_segments: 1, ..Default::default() },
            ..Default::default()
        };
        let bytes = params.as_bytes();
        assert_eq!((bytes[12], bytes[16], bytes[56]), (9, 7, 1));
        let request =
            Descriptor::read_from_bytes(&[1, 0x20, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let request = request.unwrap_or_default();
        assert_eq!((request.op(), request.op_flags & op_flag::FUA), (op::WRITE, op_flag::FUA));
        assert_eq!((request.nr_sectors, request.start_sector), (8, 16));
    }
}
