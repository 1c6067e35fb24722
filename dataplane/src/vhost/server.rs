//! The front end that an owner of disks drives: devices, their place in the token space, routing of answers.

use std::marker::PhantomData;

use crate::host::{Answer, DiskKey, Disks, ExportStatus, FrontEnd, FrontId, Geometry, HostDisk};
use crate::io::{Done, Io, Nanos, Op, Sock, Token};

use super::control::Outcome;
use super::device::{Context, Device};
use super::message::Command;

/// What one front end may hold at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Devices in use.
    pub devices: usize,
    /// Requests under way of one device; its queues are not looked at while it has this many.
    pub requests: usize,
    /// Bytes of reads that disks have, over all devices; not more than an eighth of the pool.
    pub read_bytes: usize,
    /// Bytes of writes that disks have, over all devices; not more than a quarter of the pool.
    pub write_bytes: usize,
    /// How long a device's queues are looked at without being asked to, after a request has ended: a driver that has another
    /// one within that time need not kick. 0: never.
    pub poll: Nanos,
}

impl Default for Limits {
    fn default() -> Self {
        Self { devices: 1024, requests: 512, read_bytes: 64 << 20, write_bytes: 64 << 20, poll: 30_000 }
    }
}

/// Why a device was not made.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// [`Limits::devices`].
    #[error("{0} vhost-user devices are in use, which is the limit")]
    TooMany(usize),
    /// The disk is not on offer.
    #[error("the disk is not on offer")]
    NoDisk,
    /// Another process has it.
    #[error("the disk is in use by another vhost-user connection")]
    Busy,
    /// The front end ends.
    #[error("the proxy stops")]
    Stopping,
}

/// Counts since the start.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Devices made.
    pub devices: u64,
    /// Requests taken, valid or not.
    pub requests: u64,
    /// Requests of a process before us that were done again.
    pub again: u64,
    /// Requests that ended with an error.
    pub errors: u64,
    /// Kicks heard.
    pub kicks: u64,
    /// Calls made.
    pub calls: u64,
    /// Devices that stopped because their queue made no sense.
    pub nonsense: u64,
    /// Bytes read by guests.
    pub read_bytes: u64,
    /// Bytes written by guests.
    pub written_bytes: u64,
}

/// What all devices share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub limits: Limits,
    pub counters: Counters,
    pub read_used: usize,
    pub write_used: usize,
    pool_bytes: usize,
}

impl Shared {
    pub(super) fn read_limit(&self) -> usize {
        self.limits.read_bytes.min(self.pool_bytes / 8)
    }

    pub(super) fn write_limit(&self) -> usize {
        self.limits.write_bytes.min(self.pool_bytes / 4)
    }
}

/// Names a device in use.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct DeviceId(u32);

/// How long a device that found no buffer waits before it looks again, if nothing else happens meanwhile.
const RETRY: Nanos = 5_000_000;
/// How often queues without kicks are looked at.
const UNKICKED: Nanos = 1_000_000;
/// Most rounds of asking and answering in one turn: a guest whose requests are answered at once must leave time for others.
const ROUNDS_MAX: usize = 8;
/// Devices are numbered in 16 bits, and those that are being forgotten count too.
const DEVICES_MAX: usize = 1 << 14;
/// Lives of a place that are told apart, by as many bits as cookies have for it.
const GENERATIONS: u16 = (1 << (u16::BITS - FrontId::BITS)) - 1;
/// The kind of a token that is no queue's.
const RETRY_TIMER: u16 = u16::MAX;

#[derive(Debug, Default)]
struct Place {
    generation: u16,
    device: Option<Box<Device>>,
}

/// The vhost-user front end of one data thread.
#[derive(Debug)]
pub struct Server<I: Io> {
    base: u16,
    shared: Shared,
    places: Vec<Place>,
    answers: Vec<Answer>,
    retry_timer: bool,
    shutdown: bool,
    /// A device's queues are looked at without being asked to.
    polling: bool,
    io: PhantomData<fn(&mut I)>,
}

impl<I: Io> Server<I> {
    /// A front end without devices. `base_id` is the upper 16 bits of all its tokens.
    pub fn new(base_id: u16, limits: Limits) -> Self {
        let limits = Limits { devices: limits.devices.min(DEVICES_MAX), requests: limits.requests.max(1), ..limits };
        Self {
            base: base_id,
            shared: Shared { limits, counters: Counters::default(), read_used: 0, write_used: 0, pool_bytes: 0 },
            places: Vec::new(),
            answers: Vec::new(),
            retry_timer: false,
            shutdown: false,
            polling: false,
            io: PhantomData,
        }
    }

    /// A device for this disk, before its first message. While one is there for the disk, even if only until what it has
    /// under way has ended, there is no other: what it still writes must not land after what the next one does.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(&mut self, io: &mut I, disks: &mut impl Disks<I>, key: DiskKey) -> Result<DeviceId, AttachError> {
        if self.shutdown {
            return Err(AttachError::Stopping);
        }
        self.shared.pool_bytes = io.pool().total_bytes();
        if self.places.iter().filter_map(|p| p.device.as_ref()).any(|d| d.key == key) {
            return Err(AttachError::Busy);
        }
        let geometry = disks.disk(key).ok_or(AttachError::NoDisk)?.geometry();
        let index = match self.places.iter().position(|p| p.device.is_none()) {
            Some(index) => index,
            None if self.places.len() < self.shared.limits.devices => {
                self.places.push(Place::default());
                self.places.len() - 1
            }
            None => return Err(AttachError::TooMany(self.shared.limits.devices)),
        };
        let place = &mut self.places[index];
        place.generation = place.generation.wrapping_add(1) & GENERATIONS;
        let id = u32::from(place.generation) << 16 | index as u32;
        place.device = Some(Box::new(Device::new(id, key, geometry)));
        self.shared.counters.devices += 1;
        Ok(DeviceId(id))
    }

    /// Does what a message asks. [`Outcome::Wait`] gives the command back, to be given again in a while.
    pub fn command(
        &mut self,
        io: &mut I,
        disks: &mut impl Disks<I>,
        id: DeviceId,
        command: Command<Sock>,
    ) -> Outcome<Command<Sock>> {
        let base = self.base;
        let device = device_of(&mut self.places, id.0).filter(|d| !d.silent && !d.closing);
        match device {
            Some(device) if disks.disk(device.key).is_some() => {
                let mut cx = Context { io, shared: &mut self.shared, base };
                let outcome = device.command(&mut cx, command);
                device.active = true;
                outcome
            }
            _ => {
                if let Some(sock) = command.into_event() {
                    io.close_sock(sock);
                }
                Outcome::Gone
            }
        }
    }

    /// The connection has ended: nothing is answered any more. What the disk has ends by itself.
    pub fn detach(&mut self, io: &mut I, id: DeviceId) {
        if let Some(device) = device_of(&mut self.places, id.0) {
            device.close(io);
            self.forget();
        }
    }

    /// The disk is another now (it has grown). True if its guest is to be told: see [`super::message::notice()`].
    pub fn refresh(&mut self, id: DeviceId, geometry: Geometry) -> bool {
        let Some(device) = device_of(&mut self.places, id.0) else { return false };
        let changed = device.geometry != geometry;
        device.geometry = geometry;
        changed
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.shared.counters
    }

    /// True if [`FrontEnd::collect`] is to be called again without waiting for a completion: queues are being looked at.
    pub fn is_polling(&self) -> bool {
        self.polling
    }

    /// Moves answers of the disks to their devices; true if there were any.
    fn take_answers(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool {
        let mut any = false;
        for index in 0..self.places.len() {
            let Some(device) = self.places[index].device.as_ref().filter(|d| d.is_waiting()) else { continue };
            let key = device.key;
            match disks.disk(key) {
                Some(mut disk) => FrontId::Vhost.take(disk.answers(), &mut self.answers),
                None => self.abandon(io, index),
            }
            let mut answers = std::mem::take(&mut self.answers);
            any |= !answers.is_empty();
            for Answer { cookie, result } in answers.drain(..) {
                let id = ((cookie & FrontId::OWN) >> 32) as u32;
                if let Some(device) = device_of(&mut self.places, id) {
                    device.answer(
                        &mut Context { io, shared: &mut self.shared, base: self.base },
                        cookie as u32,
                        result,
                    );
                }
            }
            self.answers = answers;
        }
        any
    }

    /// The disk has gone: what it had will not be answered.
    fn abandon(&mut self, io: &mut I, index: usize) {
        if let Some(device) = &mut self.places[index].device {
            device.abandon(&mut Context { io, shared: &mut self.shared, base: self.base });
        }
    }

    fn forget(&mut self) {
        for place in &mut self.places {
            if place.device.as_ref().is_some_and(|d| d.is_finished()) {
                place.device = None;
            }
        }
    }
}

impl<I: Io> FrontEnd<I> for Server<I> {
    fn owns(&self, token: Token) -> bool {
        (token >> 48) as u16 == self.base
    }

    fn done(&mut self, io: &mut I, _: &mut impl Disks<I>, done: Done) {
        let (kind, id) = (done.token as u16, (done.token >> 16) as u32);
        if kind == RETRY_TIMER {
            self.retry_timer = false;
            for device in self.places.iter_mut().filter_map(|p| p.device.as_mut()) {
                device.retry_due = true;
                device.active = true;
            }
            return;
        }
        if let Some(device) = device_of(&mut self.places, id) {
            device.event(&mut Context { io, shared: &mut self.shared, base: self.base }, kind, done);
        }
    }

    fn collect(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool {
        let mut any = false;
        let mut rounds = 0;
        let (starved, polling) = loop {
            rounds += 1;
            any |= self.take_answers(io, disks);
            let (mut starved, mut polling, mut asked) = (false, false, false);
            for index in 0..self.places.len() {
                let Some(device) = &mut self.places[index].device else { continue };
                if !device.active && !device.is_polling() {
                    continue;
                }
                let mut cx = Context { io, shared: &mut self.shared, base: self.base };
                let Some(mut disk) = disks.disk(device.key) else {
                    device.abandon(&mut cx);
                    continue;
                };
                asked |= device.serve(&mut cx, &mut disk, !self.shutdown);
                starved |= device.is_starved();
                polling |= device.is_polling();
            }
            // A disk may answer at once, so what was asked now may have answers already.
            if !asked {
                break (starved, polling);
            }
            if rounds == ROUNDS_MAX {
                break (starved, true);
            }
        };
        for device in self.places.iter_mut().filter_map(|p| p.device.as_mut()) {
            device.call(&mut Context { io, shared: &mut self.shared, base: self.base });
        }
        self.forget();
        self.polling = polling;
        let unkicked = self.places.iter().filter_map(|p| p.device.as_ref()).any(|d| d.is_unkicked());
        if (starved || unkicked) && !self.retry_timer {
            self.retry_timer = true;
            let token = token(self.base, 0, RETRY_TIMER);
            let pause = if unkicked { UNKICKED } else { RETRY };
            io.submit(token, Op::Timer { at: io.now().saturating_add(pause) });
        }
        any
    }

    fn close_export(&mut self, io: &mut I, key: DiskKey) {
        for index in 0..self.places.len() {
            if self.places[index].device.as_ref().is_some_and(|d| d.key == key) {
                self.abandon(io, index);
                if let Some(device) = &mut self.places[index].device {
                    device.close(io);
                }
            }
        }
        self.forget();
    }

    fn shutdown(&mut self, _: &mut I) {
        self.shutdown = true;
    }

    fn is_idle(&self) -> bool {
        let mut devices = self.places.iter().filter_map(|p| p.device.as_ref());
        if self.shutdown { devices.all(|d| d.requests() == 0) } else { devices.next().is_none() }
    }

    fn status(&self) -> Vec<ExportStatus> {
        let live = self.places.iter().filter_map(|p| p.device.as_ref()).filter(|d| !d.closing);
        live.map(|d| ExportStatus { key: d.key, clients: 1, requests: d.requests() }).collect()
    }
}

pub(super) fn token(base: u16, id: u32, kind: u16) -> Token {
    Token::from(base) << 48 | Token::from(id) << 16 | Token::from(kind)
}

/// The device with this number, unless its place has been given to another.
fn device_of(places: &mut [Place], id: u32) -> Option<&mut Device> {
    let device = places.get_mut(usize::from(id as u16))?.device.as_deref_mut()?;
    (device.id == id).then_some(device)
}
