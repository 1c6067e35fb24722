//! A ublk front end with disks in memory, and the kernel of the simulated world that asks it.

#[path = "../nbd/bed.rs"]
pub mod bed;

use std::collections::BTreeMap;

use afterimage_dataplane::host::{FrontEnd as _, Geometry};
use afterimage_dataplane::io::sim::{NodeId, Rng, SimIo, UblkAnswer, UblkId, World, WorldConfig};
use afterimage_dataplane::io::ublk::uapi::{Descriptor, op};
use afterimage_dataplane::io::{Class, Io, Pool};
use afterimage_dataplane::ublk::{DeviceId, Limits, MAX_REQUEST, Queue, Server};
use bed::{MemDisk, MemDisks, classes};
use zerocopy::IntoBytes;

pub const BASE: u16 = 0x5000;
pub const SIZE: u64 = 4 << 20;
pub const DEPTH: u16 = 16;

pub struct Rig {
    pub world: World,
    pub node: NodeId,
    pub io: SimIo,
    pub server: Server<SimIo>,
    pub disks: MemDisks,
    pub devices: Vec<UblkId>,
    /// What hosts know of each.
    known: Vec<(String, Geometry)>,
    pub ids: Vec<DeviceId>,
    pub rng: Rng,
    pub classes: Vec<Class>,
    pub answers: BTreeMap<u64, UblkAnswer>,
}

impl Rig {
    pub fn new(seed: u64) -> Self {
        Self::with(seed, vec![MemDisk::new(7, "disk", SIZE as usize)], classes())
    }

    pub fn with(seed: u64, disks: Vec<MemDisk>, classes: Vec<Class>) -> Self {
        let world = World::new(seed, WorldConfig::default());
        let node = world.node("host");
        let io = world.io_with_pool(node, Pool::new(&classes));
        let rng = world.rng();
        let devices = disks.iter().map(|_| world.ublk_device(node, DEPTH)).collect();
        let known = disks.iter().map(|disk| (disk.export.name.clone(), disk.export.geometry.clone())).collect();
        let server = Server::new(BASE, Limits::default());
        let (disks, answers) = (MemDisks(disks), BTreeMap::new());
        let mut rig = Self { world, node, io, server, disks, devices, known, ids: Vec::new(), rng, classes, answers };
        rig.attach();
        rig
    }

    pub fn attach(&mut self) {
        self.ids.clear();
        for (device, (name, geometry)) in self.devices.clone().into_iter().zip(self.known.clone()) {
            let file = self.io.attach_ublk(device).expect("nobody else serves it");
            let Geometry { size, block, read_only, .. } = geometry;
            let queue = Queue { file, depth: DEPTH, longest: MAX_REQUEST, size, block, read_only };
            let id = self.server.attach(&mut self.io, queue, &name, &mut self.disks).expect("there is room");
            self.ids.push(id);
        }
        self.turn();
    }

    /// The process dies, and another one takes its devices over.
    pub fn crash(&mut self) {
        self.world.crash(self.node);
        for disk in &mut self.disks.0 {
            // What the disk had it has done; nobody is there to hear.
            disk.forget();
        }
        self.live();
    }

    pub fn live(&mut self) {
        self.io = self.world.io_with_pool(self.node, Pool::new(&self.classes));
        self.server = Server::new(BASE, Limits::default());
        self.attach();
    }

    pub fn ask(&mut self, device: usize, op_flags: u32, offset: u64, data: Vec<u8>, len: u64) -> u64 {
        let descriptor = Descriptor { op_flags, nr_sectors: (len / 512) as u32, start_sector: offset / 512, addr: 0 };
        self.raw(device, descriptor, data)
    }

    pub fn raw(&mut self, device: usize, descriptor: Descriptor, data: Vec<u8>) -> u64 {
        let mut bytes = [0; 24];
        bytes.copy_from_slice(descriptor.as_bytes());
        self.world.ublk_ask(self.devices[device], bytes, data)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u64 {
        self.ask(0, u32::from(op::WRITE), offset, data.to_vec(), data.len() as u64)
    }

    pub fn read(&mut self, offset: u64, len: usize) -> u64 {
        self.ask(0, u32::from(op::READ), offset, vec![0xaa; len], len as u64)
    }

    pub fn turn(&mut self) {
        for disk in &mut self.disks.0 {
            disk.ripen(&mut self.rng);
        }
        self.server.collect(&mut self.io, &mut self.disks);
        if self.disks.0.iter().any(MemDisk::is_late) {
            self.world.wake(self.node);
        }
        self.harvest();
    }

    /// Takes what hosts have heard.
    pub fn harvest(&mut self) {
        for device in &self.devices {
            for answer in self.world.ublk_answers(*device) {
                assert!(self.answers.insert(answer.request, answer).is_none(), "a request is answered twice");
            }
        }
    }

    pub fn step(&mut self) -> bool {
        if self.world.step().is_none() {
            return false;
        }
        self.turn();
        // The poll that finds nothing sets the time to be woken at.
        for _ in 0..1000 {
            let mut done = Vec::new();
            self.io.poll(None, &mut done);
            if done.is_empty() {
                return true;
            }
            for done in done {
                assert!(self.server.owns(done.token));
                self.server.done(&mut self.io, &mut self.disks, done);
            }
            self.turn();
        }
        panic!("the device never rests")
    }

    /// Steps until the request is answered.
    pub fn answer(&mut self, request: u64) -> UblkAnswer {
        for _ in 0..100_000 {
            self.harvest();
            if let Some(answer) = self.answers.remove(&request) {
                return answer;
            }
            assert!(self.step(), "the world stands still before request {request} is answered");
        }
        panic!("request {request} is not answered")
    }

    pub fn result(&mut self, request: u64) -> i32 {
        self.answer(request).result
    }

    pub fn pending(&self) -> usize {
        self.devices.iter().map(|device| self.world.ublk_pending(*device)).sum()
    }

    pub fn steps(&mut self, count: usize) {
        for _ in 0..count {
            if !self.step() {
                return;
            }
        }
    }

    pub fn free(&self) -> bool {
        self.io.pool().free_bytes() == self.io.pool().total_bytes()
    }
}
