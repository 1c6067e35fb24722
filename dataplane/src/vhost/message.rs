//! Messages of the vhost-user socket: bytes and descriptors in, commands out; and replies.
//!
//! All numbers are in the byte order of the machine, and so is everything here.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::io::Errno;
use crate::io::guest::{Map, Region};

use super::control::Reply;
use super::proto::CONFIG_MAX;
use super::queue::Addresses;

/// Bytes of a message's header.
pub const HEADER: usize = 12;
/// Longest payload that any message has here, bytes.
pub const PAYLOAD_MAX: usize = 4096;
/// Most descriptors that come with one message.
pub const FDS_MAX: usize = 32;
/// Most regions of a guest's memory.
pub const REGIONS_MAX: usize = 256;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Requests, as the header names them.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// What we tell the other side by itself, over the socket that it gave for that.
pub mod notice {
    /// The configuration space has changed.
    pub const CONFIG_CHANGE: u32 = 2;
}

/// A message's header.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// One of [`request`].
    pub request: u32,
    /// An answer is wanted though the request has none by itself.
    pub need_reply: bool,
    /// Bytes that follow, at most [`PAYLOAD_MAX`].
    pub len: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// Another version, or a message that is too long: nothing that follows can be understood.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, Refused> {
        let (flags, len) = (u32_at(bytes, 4), u32_at(bytes, 8) as usize);
        if flags & 3 != VERSION || flags & REPLY != 0 {
            return Err(Refused("a message of another version"));
        }
        if len > PAYLOAD_MAX {
            return Err(Refused("a message that is too long"));
        }
        Ok(Self { request: u32_at(bytes, 0), need_reply: flags & NEED_REPLY != 0, len })
    }
}

/// Why a message is refused.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub &'static str);

/// What is asked; `E` is an event counter.
#[derive(Debug)]
#[allow(missing_docs, reason = "as the text of vhost-user has them")]
pub enum Command<E> {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    MemTable(Vec<Region>),
    AddRegion(Region),
    RemoveRegion { guest: u64, user: u64, len: u64 },
    MaxRegions,
    VringNum { queue: u32, size: u32 },
    VringAddr { queue: u32, at: Addresses },
    VringBase { queue: u32, base: u32 },
    GetVringBase { queue: u32 },
    VringKick { queue: u32, event: Option<E> },
    VringCall { queue: u32, event: Option<E> },
    VringErr { queue: u32, event: Option<E> },
    VringEnable { queue: u32, on: bool },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    QueueNum,
    BackendRequests(OwnedFd),
    GetConfig { offset: u32, len: u32, flags: u32 },
    SetConfig { offset: u32, bytes: Vec<u8> },
    GetInflight { queues: u16, size: u16 },
    SetInflight { queues: u16, size: u16, map: Arc<Map> },
    ResetDevice,
    SetStatus(u64),
    GetStatus,
}

impl<E> Command<E> {
    /// The event counter that it brings.
    pub fn into_event(self) -> Option<E> {
        match self {
            Self::VringKick { event, .. } | Self::VringCall { event, .. } | Self::VringErr { event, .. } => event,
            _ => None,
        }
    }

    /// With its event counter taken over by somebody.
    ///
    /// # Errors
    /// Those of `attach`.
    pub fn attach<T, R>(self, attach: impl FnOnce(E) -> Result<T, R>) -> Result<Command<T>, R> {
        use Command as C;
        Ok(match self {
            C::GetFeatures => C::GetFeatures,
            C::SetFeatures(bits) => C::SetFeatures(bits),
            C::SetOwner => C::SetOwner,
            C::ResetOwner => C::ResetOwner,
            C::MemTable(regions) => C::MemTable(regions),
            C::AddRegion(region) => C::AddRegion(region),
            C::RemoveRegion { guest, user, len } => C::RemoveRegion { guest, user, len },
            C::MaxRegions => C::MaxRegions,
            C::VringNum { queue, size } => C::VringNum { queue, size },
            C::VringAddr { queue, at } => C::VringAddr { queue, at },
            C::VringBase { queue, base } => C::VringBase { queue, base },
            C::GetVringBase { queue } => C::GetVringBase { queue },
            C::VringKick { queue, event } => C::VringKick { queue, event: event.map(attach).transpose()? },
            C::VringCall { queue, event } => C::VringCall { queue, event: event.map(attach).transpose()? },
            C::VringErr { queue, event } => C::VringErr { queue, event: event.map(attach).transpose()? },
            C::VringEnable { queue, on } => C::VringEnable { queue, on },
            C::GetProtocolFeatures => C::GetProtocolFeatures,
            C::SetProtocolFeatures(bits) => C::SetProtocolFeatures(bits),
            C::QueueNum => C::QueueNum,
            C::BackendRequests(fd) => C::BackendRequests(fd),
            C::GetConfig { offset, len, flags } => C::GetConfig { offset, len, flags },
            C::SetConfig { offset, bytes } => C::SetConfig { offset, bytes },
            C::GetInflight { queues, size } => C::GetInflight { queues, size },
            C::SetInflight { queues, size, map } => C::SetInflight { queues, size, map },
            C::ResetDevice => C::ResetDevice,
            C::SetStatus(status) => C::SetStatus(status),
            C::GetStatus => C::GetStatus,
        })
    }
}

/// Reads a message, with the descriptors that came along; maps the memory that it shares.
///
/// # Errors
/// What is wrong. The next message can be read nevertheless.
pub fn parse(header: &Header, payload: &[u8], mut fds: Vec<OwnedFd>) -> Result<Command<OwnedFd>, Refused> {
    use Command as C;
    let exactly = |len: usize| if payload.len() == len { Ok(()) } else { Err(Refused("a message of another length")) };
    let number = || exactly(8).map(|()| u64_at(payload, 0));
    let state = || exactly(8).map(|()| (u32_at(payload, 0), u32_at(payload, 4)));
    let nothing = || exactly(0);
    Ok(match header.request {
        request::GET_FEATURES => nothing().map(|()| C::GetFeatures)?,
        request::SET_FEATURES => C::SetFeatures(number()?),
        request::SET_OWNER => nothing().map(|()| C::SetOwner)?,
        request::RESET_OWNER => nothing().map(|()| C::ResetOwner)?,
        request::SET_MEM_TABLE => C::MemTable(mem_table(payload, fds)?),
        request::SET_VRING_NUM => state().map(|(queue, size)| C::VringNum { queue, size })?,
        request::SET_VRING_ADDR => {
            exactly(40)?;
            let (desc, used, avail) = (u64_at(payload, 8), u64_at(payload, 16), u64_at(payload, 24));
            if u32_at(payload, 4) & 1 != 0 {
                return Err(Refused("a log of what is written, which was not offered"));
            }
            C::VringAddr { queue: u32_at(payload, 0), at: Addresses { desc, avail, used } }
        }
        request::SET_VRING_BASE => state().map(|(queue, base)| C::VringBase { queue, base })?,
        request::GET_VRING_BASE => state().map(|(queue, _)| C::GetVringBase { queue })?,
        request::SET_VRING_KICK => vring_event(number()?, fds).map(|(queue, event)| C::VringKick { queue, event })?,
        request::SET_VRING_CALL => vring_event(number()?, fds).map(|(queue, event)| C::VringCall { queue, event })?,
        request::SET_VRING_ERR => vring_event(number()?, fds).map(|(queue, event)| C::VringErr { queue, event })?,
        request::GET_PROTOCOL_FEATURES => nothing().map(|()| C::GetProtocolFeatures)?,
        request::SET_PROTOCOL_FEATURES => C::SetProtocolFeatures(number()?),
        request::GET_QUEUE_NUM => nothing().map(|()| C::QueueNum)?,
        request::SET_VRING_ENABLE => match state()? {
            (queue, on @ 0..=1) => C::VringEnable { queue, on: on == 1 },
            _ => return Err(Refused("a queue that is to be neither on nor off")),
        },
        request::SET_BACKEND_REQ_FD => C::BackendRequests(only(&mut fds)?),
        request::GET_CONFIG | request::SET_CONFIG => {
            let (offset, len) = config_range(header.request, payload)?;
            if header.request == request::GET_CONFIG {
                C::GetConfig { offset, len, flags: u32_at(payload, 8) }
            } else {
                C::SetConfig { offset, bytes: payload[12..12 + len as usize].to_vec() }
            }
        }
        request::GET_INFLIGHT_FD => inflight(payload).map(|at| C::GetInflight { queues: at.queues, size: at.size })?,
        request::SET_INFLIGHT_FD => {
            let at = inflight(payload)?;
            let map = Map::new(only(&mut fds)?.as_fd(), at.offset, at.len).map_err(unmapped)?;
            C::SetInflight { queues: at.queues, size: at.size, map: Arc::new(map) }
        }
        request::RESET_DEVICE => nothing().map(|()| C::ResetDevice)?,
        request::GET_MAX_MEM_SLOTS => nothing().map(|()| C::MaxRegions)?,
        request::ADD_MEM_REG => {
            exactly(40)?;
            C::AddRegion(region(&payload[8..], &only(&mut fds)?)?)
        }
        request::REM_MEM_REG => {
            exactly(40)?;
            C::RemoveRegion { guest: u64_at(payload, 8), len: u64_at(payload, 16), user: u64_at(payload, 24) }
        }
        request::SET_STATUS => C::SetStatus(number()?),
        request::GET_STATUS => nothing().map(|()| C::GetStatus)?,
        _ => return Err(Refused("a request that is not known here")),
    })
}

fn only(fds: &mut Vec<OwnedFd>) -> Result<OwnedFd, Refused> {
    match fds.len() {
        1 => fds.pop().ok_or(Refused("no descriptor")),
        0 => Err(Refused("no descriptor")),
        _ => Err(Refused("more than one descriptor")),
    }
}

fn unmapped(errno: Errno) -> Refused {
    match errno {
        Errno::INVAL => Refused("shared memory that its file does not have"),
        Errno::NFILE => Refused("more shared memory than can be kept track of"),
        _ => Refused("shared memory that cannot be mapped"),
    }
}

/// A region of 32 bytes: guest address, length, user address, offset in the file.
fn region(bytes: &[u8], file: &OwnedFd) -> Result<Region, Refused> {
    let map = Map::new(file.as_fd(), u64_at(bytes, 24), u64_at(bytes, 8)).map_err(unmapped)?;
    Ok(Region { guest: u64_at(bytes, 0), user: u64_at(bytes, 16), map: Arc::new(map) })
}

fn mem_table(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<Region>, Refused> {
    const REGION: usize = 32;
    let count = if payload.len() >= 8 { u32_at(payload, 0) as usize } else { 0 };
    if count > FDS_MAX || payload.len() != 8 + count * REGION || fds.len() != count {
        return Err(Refused("a table of memory that is not whole"));
    }
    payload[8..].chunks_exact(REGION).zip(&fds).map(|(bytes, file)| region(bytes, file)).collect()
}

fn vring_event(number: u64, mut fds: Vec<OwnedFd>) -> Result<(u32, Option<OwnedFd>), Refused> {
    const NO_FD: u64 = 1 << 8;
    let event = if number & NO_FD != 0 { None } else { Some(only(&mut fds)?) };
    Ok(((number & 0xff) as u32, event))
}

fn config_range(request: u32, payload: &[u8]) -> Result<(u32, u32), Refused> {
    if payload.len() < 12 {
        return Err(Refused("a message of another length"));
    }
    let (offset, len) = (u32_at(payload, 0), u32_at(payload, 4));
    let fits = offset.checked_add(len).is_some_and(|end| end as usize <= CONFIG_MAX);
    // Who asks need not send as many bytes as it wants; who sends may send its buffer whole.
    if fits && (request == request::GET_CONFIG || payload.len() >= 12 + len as usize) {
        Ok((offset, len))
    } else {
        Err(Refused("a range that the configuration space does not have"))
    }
}

struct InflightAt {
    len: u64,
    offset: u64,
    queues: u16,
    size: u16,
}

fn inflight(payload: &[u8]) -> Result<InflightAt, Refused> {
    // 20 bytes have a meaning; some send the padding of their structure, too.
    if payload.len() != 20 && payload.len() != 24 {
        return Err(Refused("a message of another length"));
    }
    let half = |at: usize| u16::from_ne_bytes([payload[at], payload[at + 1]]);
    Ok(InflightAt { len: u64_at(payload, 0), offset: u64_at(payload, 8), queues: half(16), size: half(18) })
}

/// The reply to a request that is refused, where its own reply can say so: `payload` is the request's. None for those that
/// have a reply which cannot: their connection is to end, for nobody would understand a number in its place.
///
/// The others have no reply of their own; whether theirs is refused they hear if they asked to.
pub fn refusal(request: u32, payload: &[u8]) -> Option<Reply> {
    match request {
        // A range without bytes.
        request::GET_CONFIG => {
            let word = |at: usize| if payload.len() >= at + 4 { u32_at(payload, at) } else { 0 };
            Some(Reply::Config(word(0), word(8), Vec::new()))
        }
        // Memory without bytes: whoever asked does without.
        request::GET_INFLIGHT_FD => Some(Reply::NoInflight),
        _ => None,
    }
}

/// Whether a request has a reply of its own.
pub fn has_reply(request: u32) -> bool {
    matches!(
        request,
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_VRING_BASE
            | request::GET_CONFIG
            | request::GET_INFLIGHT_FD
            | request::GET_MAX_MEM_SLOTS
            | request::GET_STATUS
    )
}

/// The bytes of a reply.
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, REPLY, payload)
}

/// The bytes of a message that begins with us.
pub fn notice(request: u32) -> Vec<u8> {
    message(request, 0, &[])
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.extend_from_slice(&request.to_ne_bytes());
    out.extend_from_slice(&(VERSION | flags).to_ne_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
    out.extend_from_slice(payload);
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}
