//! The ways of hosts to disks: to the core itself, by NBD, by a ublk device.

use afterimage_dataplane::host::{DiskKey, Disks, HostDisk, Request};

use super::{Later, RETRY, Stage, disk_id};
use crate::front::{Device, Front, Way};

impl Stage {
    /// Hosts find their way to the source's disks.
    pub(super) fn connect_hosts(&mut self) {
        let Some(life) = self.source.as_mut().filter(|_| self.protected && !self.stopping) else { return };
        let mut again = false;
        for disk in 0..self.setup.disks.len() {
            let name = format!("disk{disk}");
            let way = match (self.setup.front, self.ways.get(disk)) {
                (Front::Direct, None) => Way::Direct,
                (Front::Ublk, None) => Way::Ublk(Device::make(&self.world, life, &name).expect("it is protected")),
                (Front::Nbd, None) => {
                    let (near, far) = self.world.connect(self.host_node, self.source_node);
                    life.nbd.attach(&mut life.io, far, &life.core).expect("there is room for a client of each disk");
                    Way::Nbd(self.clients.open(near, &name))
                }
                (_, Some(Way::Nbd(client))) if self.clients.is_closed(*client) => {
                    let (near, far) = self.world.connect(self.host_node, self.source_node);
                    again |= life.nbd.attach(&mut life.io, far, &life.core).is_err();
                    self.clients.close(*client);
                    self.ways[disk] = Way::Nbd(self.clients.open(near, &name));
                    continue;
                }
                (_, Some(_)) => continue,
            };
            self.ways.push(way);
        }
        self.world.wake(self.source_node);
        let waits = |way: &Way| matches!(way, Way::Nbd(client) if !self.clients.is_serving(*client));
        if again || self.ways.iter().any(waits) {
            let (at, life) = (self.world.now() + RETRY, self.source_lives);
            self.at(at, Later::Connect(life));
        }
    }

    pub(super) fn close_way(&mut self, way: Way) {
        if let Way::Nbd(client) = way {
            self.clients.close(client);
        }
    }

    /// Gives a disk of the source a request.
    pub fn request(&mut self, disk: usize, cookie: u64, request: Request) {
        match &mut self.ways[disk] {
            Way::Direct => {
                let life = self.source.as_mut().expect("the source lives");
                let key = life.core.disk_key(self.stream, disk_id(disk)).expect("the group is protected");
                let mut disk = life.core.disk(key).expect("a protected disk is on offer");
                disk.request(&mut life.io, cookie, request);
                drop(disk);
                self.world.wake(self.source_node);
            }
            Way::Nbd(client) => self.clients.ask(*client, cookie, request),
            Way::Ublk(device) => device.ask(&self.world, cookie, request),
        }
    }

    /// The hosts' way to a view.
    fn view_way(&mut self, key: DiskKey) -> Option<Way> {
        let life = self.target.as_mut()?;
        if self.setup.view_front == Front::Direct {
            return Some(Way::Direct);
        }
        let name = life.core.exports().into_iter().find(|export| export.key == key)?.name;
        if self.setup.view_front == Front::Ublk {
            return Device::make(&self.world, life, &name).ok().map(Way::Ublk);
        }
        let (near, far) = self.world.connect(self.host_node, self.target_node);
        life.nbd.attach(&mut life.io, far, &life.core).ok()?;
        self.world.wake(self.target_node);
        Some(Way::Nbd(self.clients.open(near, &name)))
    }

    /// Gives a disk of a view a request; false if it is not on offer any more.
    pub fn view_request(&mut self, key: DiskKey, cookie: u64, request: Request) -> bool {
        if !self.view_offered(key) {
            return false;
        }
        if !self.view_ways.contains_key(&key) {
            let Some(way) = self.view_way(key) else { return false };
            self.view_ways.insert(key, way);
        }
        match (self.view_ways.get_mut(&key), &mut self.target) {
            (Some(Way::Nbd(client)), _) => self.clients.ask(*client, cookie, request),
            // Nobody but the device's kernel wakes the target.
            (Some(Way::Ublk(device)), _) => device.ask(&self.world, cookie, request),
            (_, Some(life)) => {
                let Some(mut disk) = life.core.disk(key) else { return false };
                disk.request(&mut life.io, cookie, request);
                drop(disk);
                self.world.wake(self.target_node);
            }
            _ => return false,
        }
        true
    }

    /// The view's disk is there, and so is the way to it.
    pub fn view_offered(&mut self, key: DiskKey) -> bool {
        let closed = matches!(self.view_ways.get(&key), Some(Way::Nbd(client)) if self.clients.is_closed(*client));
        !closed && self.target.as_mut().is_some_and(|life| life.core.disk(key).is_some())
    }

    /// Nobody asks the view's disk any more.
    pub fn forget_view(&mut self, key: DiskKey) {
        let Some(way) = self.view_ways.remove(&key) else { return };
        if let (Way::Ublk(device), Some(life)) = (&way, &mut self.target) {
            life.ublk.retire(&mut life.io, device.served);
            self.world.ublk_stop(device.id);
            self.world.wake(self.target_node);
        }
        self.close_way(way);
    }

    /// Takes what hosts have heard by connections and devices.
    ///
    /// # Errors
    /// What no server may say.
    pub(super) fn hear(&mut self) -> Result<(), String> {
        for (disk, way) in self.ways.iter_mut().enumerate() {
            self.answers.extend(way.heard(&mut self.clients, &self.world)?.into_iter().map(|heard| (disk, heard)));
        }
        for (key, way) in &mut self.view_ways {
            self.view_answers.extend(way.heard(&mut self.clients, &self.world)?.into_iter().map(|heard| (*key, heard)));
        }
        Ok(())
    }
}
