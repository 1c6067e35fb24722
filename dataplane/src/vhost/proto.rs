//! Numbers of virtio-blk and of vhost-user, and the device's configuration space.

use crate::host::Geometry;

/// Sectors of requests are this long whatever the disk's block is, bytes.
pub const SECTOR: u64 = 512;
/// Most queues of a device.
pub const QUEUES_MAX: u16 = 64;
/// Most entries of a queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most data descriptors of a request, as the guest is told.
pub const SEG_MAX: u32 = 126;
/// Most ranges of a discard or a write of zeros.
pub const RANGES_MAX: u32 = 32;
/// Most sectors of one range of a discard or a write of zeros.
pub const RANGE_SECTORS_MAX: u32 = 1 << 22;
/// Bytes of a request's header.
pub const HEADER: usize = 16;
/// Bytes of a range of a discard or a write of zeros.
pub const RANGE: usize = 16;
/// Bytes of an identity.
pub const ID_BYTES: usize = 20;
/// Bytes of the configuration space that have a meaning here; what follows reads as zeros.
pub const CONFIG_BYTES: usize = 60;
/// Where the configuration space says whether writes are cached: the only byte that a driver may write.
pub const CONFIG_WCE: usize = 32;
/// No configuration space is longer.
pub const CONFIG_MAX: usize = 256;

/// Feature bits.
pub mod feature {
    #![allow(missing_docs)]
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user's own: protocol features can be asked for.
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Feature bits of the vhost-user protocol.
pub mod protocol {
    #![allow(missing_docs)]
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    /// All that are offered.
    pub const OFFERED: u64 =
        MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT_SHMFD | RESET_DEVICE | CONFIGURE_MEM_SLOTS | STATUS;
}

/// Types of requests.
pub mod kind {
    #![allow(missing_docs)]
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes.
pub mod status {
    #![allow(missing_docs)]
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// The flag of a range that allows to deallocate it.
pub const UNMAP: u32 = 1;

/// Features that a disk offers.
pub fn features(geometry: &Geometry) -> u64 {
    use feature as f;
    let mut all = f::SEG_MAX | f::BLK_SIZE | f::FLUSH | f::TOPOLOGY | f::CONFIG_WCE | f::MQ;
    all |= f::INDIRECT_DESC | f::EVENT_IDX | f::PROTOCOL | f::VERSION_1;
    if geometry.read_only {
        return all | f::RO;
    }
    all |= f::WRITE_ZEROES;
    if geometry.discard { all | f::DISCARD } else { all }
}

/// The configuration space, `writeback` as it is now.
pub fn config(geometry: &Geometry, writeback: bool) -> [u8; CONFIG_BYTES] {
    let mut out = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let block = geometry.block.max(512);
    let physical = geometry.physical_block.max(block);
    let exponent = (physical / block).checked_ilog2().unwrap_or(0);
    put(0, &(geometry.size / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[exponent as u8, 0]);
    // In logical blocks: whole physical ones at least.
    put(26, &((physical / block).min(u32::from(u16::MAX)) as u16).to_le_bytes());
    put(CONFIG_WCE, &[u8::from(writeback)]);
    put(34, &QUEUES_MAX.to_le_bytes());
    if !geometry.read_only {
        let whole = RANGE_SECTORS_MAX.to_le_bytes();
        put(48, &whole);
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[u8::from(geometry.discard)]);
        if geometry.discard {
            put(36, &whole);
            put(40, &RANGES_MAX.to_le_bytes());
            put(44, &(physical / 512).to_le_bytes());
        }
    }
    out
}

/// The identity that a guest gets to see: the serial, cut or filled with zeros.
pub fn identity(serial: &str) -> [u8; ID_BYTES] {
    let mut out = [0; ID_BYTES];
    let len = serial.len().min(ID_BYTES);
    out[..len].copy_from_slice(&serial.as_bytes()[..len]);
    out
}
