//! ublk as the seam sees it: a block device of this host whose requests come to this process.
//!
//! [`uapi`] numbers and layouts of the kernel's interface · [`control`] making, starting and ending devices, blocking ·
//! [`UblkOp`] what a data thread does with a device's requests.
//!
//! A device has one queue of so many *tags*. A tag is at any time either with the kernel ([`UblkOp::Fetch`] under way) or
//! with us, holding one request. Data lies in the host's pages and is copied by [`UblkOp::CopyIn`] and
//! [`UblkOp::CopyOut`] (`UBLK_F_USER_COPY`), into and out of our own buffers.

use super::{File, Part};

pub mod control;
pub mod uapi;

/// An operation on a ublk device.
#[derive(Debug)]
pub enum UblkOp {
    /// Answers the request that the tag holds, if it holds one, and completes with 0 when the tag holds the next one, or
    /// with an error (`ENODEV`: the device is being stopped) when there will be none.
    ///
    /// The answer reaches the host when this starts, not when it completes.
    Fetch {
        /// The device.
        device: File,
        /// Its tag.
        tag: u16,
        /// Bytes done or a negated errno: see [`uapi`].
        commit: Option<i32>,
    },
    /// Fills `part` from the data of a write.
    CopyIn {
        /// The device.
        device: File,
        /// The tag that holds the write.
        tag: u16,
        /// From this byte of its data on.
        at: u32,
        /// Into this.
        part: Part,
    },
    /// Fills data of a read from `part`.
    CopyOut {
        /// The device.
        device: File,
        /// The tag that holds the read.
        tag: u16,
        /// From this byte of its data on.
        at: u32,
        /// This.
        part: Part,
    },
}
