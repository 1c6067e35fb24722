//! The front end that an owner of disks drives: devices, their place in the token space, routing of answers.

use std::marker::PhantomData;

use crate::host::{Answer, DiskKey, Disks, Export, ExportStatus, FrontEnd, FrontId, HostDisk};
use crate::io::{Done, File, Io, Nanos, Op, Token};

use super::device::{COPY, Device, FETCH, NUMBER_BITS, Room};
use super::request::Bounds;

/// What one front end may hold at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Devices.
    pub devices: usize,
    /// Bytes of reads under way, over all devices.
    pub read_bytes: usize,
    /// Bytes of writes given to disks and not yet answered, over all devices.
    pub write_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { devices: 256, read_bytes: 64 << 20, write_bytes: 64 << 20 }
    }
}

/// Why a device was not taken; its file is closed.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// [`Limits::devices`], or the process is ending.
    #[error("{0} ublk devices are served, which is the limit, or the process is ending")]
    TooMany(usize),
    /// The queue is not one that can be served.
    #[error("a ublk device with a queue of {0} tags cannot be served")]
    Depth(u16),
    /// Another device has the name.
    #[error("the disk has a ublk device already")]
    Taken,
}

/// Names a device; not used twice.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DeviceId(u32);

/// A device whose queue is taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its file.
    pub file: File,
    /// Tags.
    pub depth: u16,
    /// Longest request, bytes.
    pub longest: u32,
    /// Size as hosts see it, bytes.
    pub size: u64,
    /// Logical block as hosts see it, bytes.
    pub block: u32,
    /// Hosts may not write.
    pub read_only: bool,
}

/// How a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Which.
    pub id: DeviceId,
    /// The export that it is a device of.
    pub name: String,
    /// Its requests go to the disk; otherwise they wait for it to come back.
    pub serving: bool,
    /// Requests that it holds.
    pub requests: usize,
}

/// Counts since the start.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests taken, valid or not.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes of writes copied from hosts.
    pub written_bytes: u64,
    /// Bytes of reads copied to hosts.
    pub read_bytes: u64,
}

/// What all devices share.
#[derive(Debug)]
pub(super) struct Shared {
    pub limits: Limits,
    pub counters: Counters,
    pub read_used: usize,
    pub write_used: usize,
    /// No further requests are taken.
    pub stopping: bool,
    pool_bytes: usize,
}

impl Shared {
    /// Not more than an eighth of the pool: see the NBD front end.
    pub fn read_limit(&self) -> usize {
        self.limits.read_bytes.min(self.pool_bytes / 8)
    }

    /// Not more than a quarter of the pool.
    pub fn write_limit(&self) -> usize {
        self.limits.write_bytes.min(self.pool_bytes / 4)
    }
}

/// How long a device that found no buffer waits before it looks again, if nothing else happens meanwhile.
pub const RETRY: Nanos = 5_000_000;
/// Lives of a place that are told apart.
pub(super) const EPOCHS: u16 = (1 << 14) - 1;
/// Most devices: their number has 16 bits, less the one that the timer has.
const DEVICES_MAX: usize = (1 << 15) - 1;
/// Number of the timer in the place of a device's.
const TIMER: u16 = u16::MAX;

#[derive(Debug, Default)]
struct Place {
    epoch: u16,
    id: u32,
    device: Option<Box<Device>>,
}

/// The ublk front end of one data thread.
#[derive(Debug)]
pub struct Server<I: Io> {
    base: u16,
    shared: Shared,
    places: Vec<Place>,
    next_id: u32,
    answers: Vec<Answer>,
    timer: bool,
    io: PhantomData<fn(&mut I)>,
}

impl<I: Io> Server<I> {
    /// A front end without devices. `base_id` is the upper 16 bits of all its tokens.
    pub fn new(base_id: u16, limits: Limits) -> Self {
        let limits = Limits { devices: limits.devices.min(DEVICES_MAX), ..limits };
        let shared = Shared {
            limits,
            counters: Counters::default(),
            read_used: 0,
            write_used: 0,
            stopping: false,
            pool_bytes: 0,
        };
        Self {
            base: base_id,
            shared,
            places: Vec::new(),
            next_id: 0,
            answers: Vec::new(),
            timer: false,
            io: PhantomData,
        }
    }

    /// Serves a device as the export of this name, now or when there is one; what hosts ask before waits. All its tags are
    /// fetched from here on, for which [control](crate::io::ublk::control) waits.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(
        &mut self,
        io: &mut I,
        queue: Queue,
        name: &str,
        disks: &mut impl Disks<I>,
    ) -> Result<DeviceId, AttachError> {
        self.shared.pool_bytes = io.pool().total_bytes();
        let taken = self.devices().any(|device| device.name == name);
        let many = self.shared.stopping || self.devices().count() >= self.shared.limits.devices;
        let wrong = queue.depth == 0 || queue.depth > crate::io::ublk::uapi::MAX_DEPTH;
        if taken || many || wrong {
            io.close(queue.file);
            return Err(match () {
                () if taken => AttachError::Taken,
                () if many => AttachError::TooMany(self.shared.limits.devices),
                () => AttachError::Depth(queue.depth),
            });
        }
        let vacant = self.places.iter().position(|place| place.device.is_none());
        let index = vacant.unwrap_or_else(|| {
            self.places.push(Place::default());
            self.places.len() - 1
        });
        let place = &mut self.places[index];
        self.next_id += 1;
        place.epoch = place.epoch.wrapping_add(1) & EPOCHS;
        place.id = self.next_id;
        let token = Token::from(self.base) << 48 | (index as Token) << 32;
        let bounds = Bounds { size: queue.size, longest: queue.longest, read_only: queue.read_only, discard: false };
        let mut device =
            Device::new(token, index as u16, place.epoch, queue.file, name.to_owned(), queue.depth, bounds);
        device.block = queue.block;
        device.begin(io);
        place.device = Some(Box::new(device));
        let id = DeviceId(place.id);
        self.rebind(io, disks);
        Ok(id)
    }

    /// Ties devices whose disk had gone to the disk that is there by their name now; to be called when the owner has taken
    /// disks on. A disk that is smaller, or has another block, is not the one that hosts know: the device waits on.
    pub fn rebind(&mut self, io: &mut I, disks: &mut impl Disks<I>) {
        let exports = disks.exports();
        for device in self.places.iter_mut().filter_map(|place| place.device.as_deref_mut()) {
            let same = |export: &&Export| export.name == device.name && Some(export.key) == device.key;
            if device.failing || (device.serving && exports.iter().any(|export| same(&export))) {
                continue;
            }
            // What it has asked of the one that went is asked anew.
            device.park(&mut self.shared, io);
            let found = exports.iter().find(|export| export.name == device.name);
            if let Some(export) = found.filter(|export| fits(device, export)) {
                device.key = Some(export.key);
                device.epoch = device.epoch.wrapping_add(1) & EPOCHS;
                device.serving = true;
                device.bounds.discard = export.geometry.discard;
                device.bounds.read_only |= export.geometry.read_only;
            }
        }
    }

    /// The device has got another size, bytes.
    pub fn resize(&mut self, id: DeviceId, size: u64) {
        if let Some(device) = self.device(id) {
            (device.device_size, device.bounds.size) = (size, size);
        }
    }

    /// The device is about to be ended: what is under way is answered, what waits and what comes fails. Control stops it
    /// then; its file is closed when the kernel has given the last tag back ([`Server::is_gone`]).
    pub fn retire(&mut self, io: &mut I, id: DeviceId) {
        let Some(index) = self.index(id) else { return };
        if let Some(device) = &mut self.places[index].device {
            device.fail_all(&mut self.shared, io);
        }
    }

    /// The device is not served any more.
    pub fn is_gone(&self, id: DeviceId) -> bool {
        self.index(id).is_none()
    }

    /// All devices.
    pub fn list(&self) -> Vec<DeviceStatus> {
        let devices = self.places.iter().filter_map(|place| Some((place.id, place.device.as_deref()?)));
        let status = devices.map(|(id, device)| DeviceStatus {
            id: DeviceId(id),
            name: device.name.clone(),
            serving: device.serving,
            requests: device.requests(),
        });
        status.collect()
    }

    /// Counts since the start.
    pub fn counters(&self) -> Counters {
        self.shared.counters
    }

    fn devices(&self) -> impl Iterator<Item = &Device> {
        self.places.iter().filter_map(|place| place.device.as_deref())
    }

    fn index(&self, id: DeviceId) -> Option<usize> {
        self.places.iter().position(|place| place.id == id.0 && place.device.is_some())
    }

    fn device(&mut self, id: DeviceId) -> Option<&mut Device> {
        let index = self.index(id)?;
        self.places[index].device.as_deref_mut()
    }

    /// Moves the answers of the disks in use to their devices; true if there were any.
    fn take_answers(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool {
        let mut any = false;
        for at in 0..self.places.len() {
            let Some(device) = &mut self.places[at].device else { continue };
            let Some(key) = device.key else { continue };
            match disks.disk(key) {
                Some(mut disk) => FrontId::Ublk.take(disk.answers(), &mut self.answers),
                None => device.park(&mut self.shared, io),
            }
            let mut answers = std::mem::take(&mut self.answers);
            any |= !answers.is_empty();
            for Answer { cookie, result } in answers.drain(..) {
                let own = cookie & FrontId::OWN;
                let (index, epoch, piece) = ((own >> 46) as usize, (own >> 32) as u16 & EPOCHS, own as u32);
                if let Some(device) = self.places.get_mut(index).and_then(|place| place.device.as_deref_mut())
                    && device.epoch == epoch
                {
                    device.answer(&mut self.shared, io, piece, result);
                }
            }
            self.answers = answers;
        }
        any
    }

    /// Lets devices begin what waits.
    fn serve(&mut self, io: &mut I, disks: &mut impl Disks<I>, again: bool) -> Room {
        let mut room = Room::Enough;
        for place in &mut self.places {
            let Some(device) = place.device.as_deref_mut().filter(|device| device.wants_disk()) else { continue };
            let Some(mut disk) = device.key.and_then(|key| disks.disk(key)) else {
                device.park(&mut self.shared, io);
                continue;
            };
            if device.issue(&mut self.shared, io, &mut disk, again) == Room::Short {
                room = Room::Short;
            }
        }
        room
    }

    /// Forgets devices that the kernel has ended.
    fn forget(&mut self, io: &mut I) {
        for place in &mut self.places {
            if let Some(device) = place.device.take_if(|device| device.is_over() && !self.shared.stopping) {
                place.epoch = device.epoch;
                io.close(device.file);
            }
        }
    }
}

/// Whether a disk can stand behind a device that hosts know already.
fn fits(device: &Device, export: &Export) -> bool {
    let geometry = &export.geometry;
    let fits = geometry.size >= device.device_size
        && geometry.block <= device.block
        && (device.bounds.read_only || !geometry.read_only);
    if !fits {
        tracing::warn!(
            device = device.name,
            size = device.device_size,
            now = geometry.size,
            block = geometry.block,
            "the disk is not as hosts of its ublk device know it: their requests wait"
        );
    }
    fits
}

impl<I: Io> FrontEnd<I> for Server<I> {
    fn owns(&self, token: Token) -> bool {
        token >> 48 == Token::from(self.base)
    }

    fn done(&mut self, io: &mut I, disks: &mut impl Disks<I>, done: Done) {
        let index = (done.token >> 32) as u16;
        if index == TIMER {
            self.timer = false;
            return;
        }
        let number = done.token as u32;
        let (kind, number) = (number >> NUMBER_BITS, number & ((1 << NUMBER_BITS) - 1));
        let Some(place) = self.places.get_mut(usize::from(index)) else { return };
        let Some(device) = &mut place.device else { return };
        match kind {
            FETCH => device.fetched(&mut self.shared, io, number as u16, &done),
            COPY => {
                let mut disk = device.key.and_then(|key| disks.disk(key));
                device.copied(&mut self.shared, io, disk.as_mut(), number, done);
            }
            _ => {}
        }
    }

    fn collect(&mut self, io: &mut I, disks: &mut impl Disks<I>) -> bool {
        let mut first = true;
        let mut any = false;
        loop {
            let answered = self.take_answers(io, disks);
            any |= answered;
            if !first && !answered {
                break;
            }
            let room = if self.shared.stopping { Room::Enough } else { self.serve(io, disks, first) };
            let short = room == Room::Short
                || self.places.iter().any(|place| place.device.as_deref().is_some_and(|device| device.wants_disk()));
            if short && !self.timer {
                self.timer = true;
                let token = Token::from(self.base) << 48 | Token::from(TIMER) << 32;
                io.submit(token, Op::Timer { at: io.now().saturating_add(RETRY) });
            }
            first = false;
        }
        self.forget(io);
        any
    }

    fn close_export(&mut self, io: &mut I, key: DiskKey) {
        for place in &mut self.places {
            if let Some(device) = place.device.as_deref_mut().filter(|device| device.key == Some(key)) {
                device.park(&mut self.shared, io);
            }
        }
    }

    fn shutdown(&mut self, _io: &mut I) {
        self.shared.stopping = true;
        for place in &mut self.places {
            if let Some(device) = &mut place.device {
                device.leave();
            }
        }
    }

    /// Nothing is under way. Devices stay open: the next process takes them over.
    fn is_idle(&self) -> bool {
        self.devices().all(|device| self.shared.stopping && device.is_idle())
    }

    fn status(&self) -> Vec<ExportStatus> {
        let status = self
            .devices()
            .filter_map(|device| Some(ExportStatus { key: device.key?, clients: 1, requests: device.requests() }));
        status.collect()
    }
}
