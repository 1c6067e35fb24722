//! What messages do to a device.

use std::os::fd::OwnedFd;

use crate::io::guest::{self, GuestMemory};
use crate::io::{Io, Sock};

use super::device::{Context, Device, Vring};
use super::events::Kind;
use super::message::{Command, REGIONS_MAX};
use super::proto::{self, CONFIG_MAX, CONFIG_WCE, QUEUE_SIZE_MAX, QUEUES_MAX, feature, protocol};
use super::queue::Queue;

/// A reply with a payload.
#[derive(Debug)]
pub enum Reply {
    /// A number.
    Number(u64),
    /// A queue, and a number.
    State(u32, u32),
    /// A range of the configuration space: offset, flags, bytes.
    Config(u32, u32, Vec<u8>),
    /// Memory for requests under way.
    Inflight {
        /// Bytes.
        len: u64,
        /// For so many queues …
        queues: u16,
        /// … of so many entries.
        size: u16,
        /// The memory.
        file: OwnedFd,
    },
    /// There is no memory for requests under way.
    NoInflight,
}

impl Reply {
    /// Its bytes. `like` is the length of the request's payload.
    pub fn payload(&self, like: usize) -> Vec<u8> {
        match self {
            Self::Number(number) => number.to_ne_bytes().to_vec(),
            Self::State(queue, number) => [queue.to_ne_bytes(), number.to_ne_bytes()].concat(),
            Self::Config(offset, flags, bytes) => {
                let mut out = [*offset, bytes.len() as u32, *flags].map(u32::to_ne_bytes).concat();
                out.extend_from_slice(bytes);
                // As long as what was asked for, unless it says that there is nothing.
                if !bytes.is_empty() {
                    out.resize(out.len().max(like), 0);
                }
                out
            }
            Self::NoInflight => vec![0; like.clamp(20, 24)],
            Self::Inflight { len, queues, size, .. } => {
                let mut out = [*len, 0].map(u64::to_ne_bytes).concat();
                out.extend_from_slice(&queues.to_ne_bytes());
                out.extend_from_slice(&size.to_ne_bytes());
                // Whose structure is padded gets it padded.
                out.resize(like.clamp(out.len(), 24), 0);
                out
            }
        }
    }

    /// What goes along with it.
    pub fn file(&self) -> Option<&OwnedFd> {
        match self {
            Self::Inflight { file, .. } => Some(file),
            _ => None,
        }
    }
}

/// What became of a command.
#[derive(Debug)]
pub enum Outcome<C> {
    /// Done; the request has a reply of its own.
    Reply(Reply),
    /// Done.
    Done,
    /// Not done, and why.
    Refused(&'static str),
    /// Not done yet: requests have to end first. To be given again.
    Wait(C),
    /// There is no such device any more, or no disk.
    Gone,
}

impl Device {
    pub(super) fn command<I: Io>(&mut self, cx: &mut Context<'_, I>, command: Command<Sock>) -> Outcome<Command<Sock>> {
        use Command as C;
        match command {
            C::GetFeatures => Outcome::Reply(Reply::Number(proto::features(&self.geometry))),
            C::SetFeatures(bits) if bits & !proto::features(&self.geometry) == 0 => {
                (self.features, self.negotiated) = (bits, true);
                self.agree();
                Outcome::Done
            }
            C::SetFeatures(_) => Outcome::Refused("features that were not offered"),
            C::GetProtocolFeatures => Outcome::Reply(Reply::Number(protocol::OFFERED)),
            C::SetProtocolFeatures(bits) if bits & !protocol::OFFERED == 0 => {
                self.protocol = bits;
                Outcome::Done
            }
            C::SetProtocolFeatures(_) => Outcome::Refused("protocol features that were not offered"),
            C::SetOwner | C::BackendRequests(_) => Outcome::Done,
            C::ResetOwner => {
                for vring in &mut self.vrings {
                    vring.enabled = false;
                }
                Outcome::Done
            }
            C::MemTable(regions) => match GuestMemory::new(regions) {
                Ok(memory) => {
                    self.remember(cx, memory);
                    Outcome::Done
                }
                Err(_) => Outcome::Refused("regions of memory that overlap"),
            },
            C::AddRegion(region) => {
                let mut regions = self.memory.regions().to_vec();
                if regions.len() >= REGIONS_MAX {
                    return Outcome::Refused("more regions of memory than are possible");
                }
                regions.push(region);
                match GuestMemory::new(regions) {
                    Ok(memory) => {
                        self.remember(cx, memory);
                        Outcome::Done
                    }
                    Err(_) => Outcome::Refused("regions of memory that overlap"),
                }
            }
            C::RemoveRegion { guest, user, len } => {
                let mut regions = self.memory.regions().to_vec();
                let same = |r: &guest::Region| r.guest == guest && r.user == user && r.map.len() as u64 == len;
                let Some(at) = regions.iter().position(same) else {
                    return Outcome::Refused("a region of memory that is not there");
                };
                regions.remove(at);
                match GuestMemory::new(regions) {
                    Ok(memory) => {
                        self.remember(cx, memory);
                        Outcome::Done
                    }
                    Err(_) => Outcome::Refused("regions of memory that overlap"),
                }
            }
            C::MaxRegions => Outcome::Reply(Reply::Number(REGIONS_MAX as u64)),
            C::QueueNum => Outcome::Reply(Reply::Number(u64::from(QUEUES_MAX))),
            C::GetConfig { offset, len, flags } => {
                let mut all = [0; CONFIG_MAX];
                let config = proto::config(&self.geometry, self.is_writeback());
                all[..config.len()].copy_from_slice(&config);
                let range = offset as usize..(offset as usize).saturating_add(len as usize);
                match all.get(range) {
                    Some(bytes) => Outcome::Reply(Reply::Config(offset, flags, bytes.to_vec())),
                    None => Outcome::Refused("a range that the configuration space does not have"),
                }
            }
            C::SetConfig { offset, bytes } => self.set_config(offset as usize, &bytes),
            C::GetInflight { queues, size } => {
                if !(1..=QUEUES_MAX).contains(&queues) || !(1..=QUEUE_SIZE_MAX).contains(&size) {
                    return Outcome::Refused("requests under way of more, or longer, queues than are possible");
                }
                let len = super::inflight::bytes(queues, size) + super::inflight::TRAILER;
                match guest::share("afterimage-inflight", len) {
                    Ok((file, _)) => Outcome::Reply(Reply::Inflight { len, queues, size, file }),
                    Err(_) => Outcome::Refused("no memory for requests under way"),
                }
            }
            C::SetInflight { queues, size, map } => {
                let possible = (1..=QUEUES_MAX).contains(&queues) && (1..=QUEUE_SIZE_MAX).contains(&size);
                if !possible || (map.len() as u64) < super::inflight::bytes(queues, size) {
                    return Outcome::Refused("memory for requests under way that is too small");
                }
                self.mode = super::inflight::Mode::new(&map, queues, size);
                self.inflight = Some((map, queues, size));
                // A driver that has set it does not do so again because we are another process.
                self.writeback = self.mode.as_ref().and_then(|mode| mode.load()).or(self.writeback);
                self.keep_mode();
                for number in 0..self.vrings.len() as u16 {
                    self.start(cx, number);
                }
                Outcome::Done
            }
            C::GetStatus => Outcome::Reply(Reply::Number(u64::from(self.status))),
            C::SetStatus(0) | C::ResetDevice => {
                if !self.stop_all() {
                    return Outcome::Wait(command);
                }
                self.reset(cx);
                Outcome::Done
            }
            C::SetStatus(status) => {
                self.status = status as u8;
                Outcome::Done
            }
            C::VringNum { queue, .. }
            | C::VringAddr { queue, .. }
            | C::VringBase { queue, .. }
            | C::GetVringBase { queue }
            | C::VringKick { queue, .. }
            | C::VringCall { queue, .. }
            | C::VringErr { queue, .. }
            | C::VringEnable { queue, .. } => {
                let Ok(number) = u16::try_from(queue) else { return self.no_queue(cx, command) };
                if number >= QUEUES_MAX {
                    return self.no_queue(cx, command);
                }
                if self.vrings.len() <= usize::from(number) {
                    self.vrings.resize_with(usize::from(number) + 1, Vring::default);
                }
                self.vring_command(cx, number, command)
            }
        }
    }

    /// Of the configuration space, all that can be set is how the cache is used. What is written around that has to be what
    /// stands there.
    fn set_config<C>(&mut self, offset: usize, bytes: &[u8]) -> Outcome<C> {
        let refused = Outcome::Refused("a byte of the configuration space that cannot be set");
        let mut all = [0; CONFIG_MAX];
        let config = proto::config(&self.geometry, self.is_writeback());
        all[..config.len()].copy_from_slice(&config);
        let Some(now) = all.get(offset..offset.saturating_add(bytes.len())) else { return refused };
        let Some(at) = CONFIG_WCE.checked_sub(offset).filter(|at| *at < bytes.len()) else { return refused };
        if bytes[at] > 1 || bytes[..at] != now[..at] || bytes[at + 1..] != now[at + 1..] {
            return refused;
        }
        self.writeback = Some(bytes[at] == 1);
        self.keep_mode();
        Outcome::Done
    }

    fn no_queue<I: Io>(&mut self, cx: &mut Context<'_, I>, command: Command<Sock>) -> Outcome<Command<Sock>> {
        if let Some(sock) = command.into_event() {
            cx.io.close_sock(sock);
        }
        Outcome::Refused("a queue that the device does not have")
    }

    fn vring_command<I: Io>(
        &mut self,
        cx: &mut Context<'_, I>,
        number: u16,
        command: Command<Sock>,
    ) -> Outcome<Command<Sock>> {
        use Command as C;
        let vring = &mut self.vrings[usize::from(number)];
        // As long as nothing was taken out of it, it may as well be another one.
        let runs = vring.queue.as_ref().is_some_and(Queue::is_touched);
        match command {
            C::VringNum { size, .. } => {
                let same = size == u32::from(vring.size);
                if runs && !same || !size.is_power_of_two() || size > u32::from(QUEUE_SIZE_MAX) {
                    return Outcome::Refused("a length that the queue cannot have");
                }
                if !same {
                    (vring.size, vring.queue) = (size as u16, None);
                }
            }
            C::VringAddr { at, .. } => {
                if !at.is_aligned() {
                    return Outcome::Refused("a queue that is not aligned");
                }
                match &mut vring.queue {
                    Some(queue) if queue.addresses() != at => {
                        if !Queue::lies(&self.memory, at, vring.size) {
                            return Outcome::Refused("a queue outside of the guest's memory");
                        }
                        queue.moved(&self.memory, at);
                    }
                    _ => {}
                }
                vring.addresses = Some(at);
            }
            C::VringBase { base, .. } => {
                let Ok(base) = u16::try_from(base) else {
                    return Outcome::Refused("a beginning that no queue has");
                };
                if runs {
                    return Outcome::Refused("another beginning for a queue that runs");
                }
                (vring.base, vring.based, vring.queue) = (base, true, None);
            }
            C::VringKick { event, .. } => {
                vring.unkicked = event.is_none();
                self.set_event(cx, number, Kind::Kick, event);
            }
            C::VringCall { event, .. } => {
                self.set_event(cx, number, Kind::Call, event);
                return Outcome::Done;
            }
            C::VringErr { event, .. } => {
                self.set_event(cx, number, Kind::Err, event);
                return Outcome::Done;
            }
            C::VringEnable { on, .. } => vring.enabled = on,
            C::GetVringBase { .. } => {
                vring.stopping = true;
                if !vring.is_quiet() {
                    return Outcome::Wait(command);
                }
                self.stop(cx, number);
                let base = self.vrings[usize::from(number)].base;
                return Outcome::Reply(Reply::State(u32::from(number), u32::from(base)));
            }
            _ => return Outcome::Refused("no command of a queue"),
        }
        self.start(cx, number);
        Outcome::Done
    }

    /// Keeps what the driver has set about the cache where the next process finds it.
    fn keep_mode(&self) {
        if let (Some(mode), Some(on)) = (&self.mode, self.writeback) {
            mode.store(on);
        }
    }

    /// Lets a queue go that has nothing under way.
    fn stop<I: Io>(&mut self, cx: &mut Context<'_, I>, number: u16) {
        // What has ended is told before.
        self.call(cx);
        let vring = &mut self.vrings[usize::from(number)];
        if let Some(queue) = vring.queue.take() {
            vring.base = queue.base();
        }
        (vring.stopping, vring.kicked, vring.based, vring.unkicked) = (false, false, false, false);
        self.set_event(cx, number, Kind::Kick, None);
    }

    /// True if nothing is under way any more.
    fn stop_all(&mut self) -> bool {
        for vring in &mut self.vrings {
            vring.stopping = true;
        }
        self.vrings.iter().all(Vring::is_quiet)
    }

    fn reset<I: Io>(&mut self, cx: &mut Context<'_, I>) {
        for number in 0..self.vrings.len() as u16 {
            self.stop(cx, number);
            self.set_event(cx, number, Kind::Call, None);
            self.set_event(cx, number, Kind::Err, None);
            self.vrings[usize::from(number)].forget();
        }
        // The guest's memory stays: whoever runs the guest tells changes of it only.
        self.features &= feature::PROTOCOL;
        (self.negotiated, self.inflight, self.mode, self.status) = (false, None, None, 0);
        // A driver that goes on afterwards (its machine was halted only) relies on what it had set.
        self.writeback = self.writeback.filter(|on| !on);
    }
}
