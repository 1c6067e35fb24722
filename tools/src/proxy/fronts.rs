//! The front ends of a data thread: each speaks one protocol to hosts, all ask the same disks.

use afterimage_dataplane::host::{DiskKey, Disks, ExportStatus, FrontEnd as _};
use afterimage_dataplane::io::Done;
use afterimage_dataplane::io::ring::Ring;
use afterimage_dataplane::{nbd, ublk, vhost};

/// Machine id of the NBD front end (the upper 16 bits of its tokens).
const NBD_ID: u16 = 0x4000;
/// Machine id of the vhost-user front end.
const VHOST_ID: u16 = 0x4001;
/// Machine id of the ublk front end.
const UBLK_ID: u16 = 0x5000;

/// All of them.
pub struct Fronts {
    /// NBD.
    pub nbd: nbd::Server<Ring>,
    /// vhost-user-blk.
    pub vhost: vhost::Server<Ring>,
    /// ublk.
    pub ublk: ublk::Server<Ring>,
}

impl Fronts {
    /// Without hosts.
    pub fn new() -> Self {
        Self {
            nbd: nbd::Server::new(NBD_ID, nbd::Limits::default()),
            vhost: vhost::Server::new(VHOST_ID, vhost::Limits::default()),
            ublk: ublk::Server::new(UBLK_ID, ublk::Limits::default()),
        }
    }

    /// Takes a completion, or gives it back if it is no front end's.
    pub fn done(&mut self, io: &mut Ring, disks: &mut impl Disks<Ring>, done: Done) -> Option<Done> {
        if self.nbd.owns(done.token) {
            self.nbd.done(io, disks, done);
            return None;
        }
        if self.vhost.owns(done.token) {
            self.vhost.done(io, disks, done);
            return None;
        }
        if self.ublk.owns(done.token) {
            self.ublk.done(io, disks, done);
            return None;
        }
        Some(done)
    }

    /// Gives hosts their answers, and disks what hosts ask. True if a further call may find more without a completion in
    /// between: what a later front end asks may let go what an earlier one waits for.
    pub fn collect(&mut self, io: &mut Ring, disks: &mut impl Disks<Ring>) -> bool {
        self.nbd.collect(io, disks);
        // What one front end found answered may let another one's requests go on.
        let more = self.vhost.collect(io, disks) && !self.nbd.is_idle();
        let more = self.ublk.collect(io, disks) && !(self.nbd.is_idle() && self.vhost.is_idle()) || more;
        more || self.vhost.is_polling()
    }

    /// Drops the hosts of an export that is no longer on offer.
    pub fn close_export(&mut self, io: &mut Ring, key: DiskKey) {
        self.nbd.close_export(io, key);
        self.vhost.close_export(io, key);
        self.ublk.close_export(io, key);
    }

    /// Lets all hosts go.
    pub fn shutdown(&mut self, io: &mut Ring) {
        self.nbd.shutdown(io);
        self.vhost.shutdown(io);
        self.ublk.shutdown(io);
    }

    /// No hosts are left.
    pub fn is_idle(&self) -> bool {
        self.nbd.is_idle() && self.vhost.is_idle() && self.ublk.is_idle()
    }

    /// Users of each export that has any, by front end: one may be named more than once.
    pub fn status(&self) -> Vec<ExportStatus> {
        let mut all = self.nbd.status();
        all.extend(self.vhost.status());
        all.extend(self.ublk.status());
        all
    }
}
