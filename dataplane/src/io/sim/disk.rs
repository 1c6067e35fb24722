//! Disk operations under way: when they take effect, what a crash or a power loss makes of them.
//!
//! An operation takes effect at some moment between its submission and its completion, writes sometimes in two steps;
//! so operations under way overtake each other as they do on real disks.

use super::Fault;
use super::content::SECTOR;
use super::names::InodeId;
use super::state::{Event, LifeId, State};
use crate::io::guest::Scatter;
use crate::io::{Done, Errno, File, Part, Token};

pub(super) enum DiskOp {
    Read { offset: u64, part: Part },
    ReadInto { offset: u64, to: Scatter },
    Write { offset: u64, part: Part, durable: bool, from: usize },
    Sync,
    Zero { offset: u64, len: u64, unmap: bool },
}

/// One operation on a file.
pub(super) struct Flight {
    pub(super) life: LifeId,
    pub(super) node: usize,
    pub(super) file: File,
    pub(super) inode: InodeId,
    pub(super) path: String,
    pub(super) token: Token,
    pub(super) op: DiskOp,
    pub(super) writable: bool,
    /// A write that takes effect in two steps.
    pub(super) split: bool,
    /// Its outcome, once it has taken effect.
    pub(super) landed: Option<Result<u64, Errno>>,
}

impl State {
    pub(super) fn land(&mut self, id: u64) {
        let Some(mut flight) = self.flights.remove(&id) else { return };
        if flight.landed.is_none() {
            flight.landed = self.take_effect(&mut flight);
        }
        let settled = flight.landed.is_some() && !self.lives[flight.life].alive;
        if settled {
            self.settle(&flight);
        } else {
            self.flights.insert(id, flight);
        }
    }

    pub(super) fn finish(&mut self, id: u64) {
        // A write in two steps has its second one at the latest now.
        for _ in 0..2 {
            if self.flights.get(&id).is_some_and(|flight| flight.landed.is_none()) {
                self.land(id);
            }
        }
        let Some(flight) = self.flights.remove(&id) else { return };
        self.settle(&flight);
        let part = match flight.op {
            DiskOp::Read { part, .. } | DiskOp::Write { part, .. } => Some(part),
            DiskOp::ReadInto { .. } | DiskOp::Sync | DiskOp::Zero { .. } => None,
        };
        let result = flight.landed.expect("it has taken effect");
        self.complete(flight.life, Done { token: flight.token, result, part, parts: Vec::new() });
    }

    /// The operation no longer holds its file open.
    fn settle(&mut self, flight: &Flight) {
        if let Some(open) = self.lives[flight.life].files.get_mut(&flight.file.0) {
            open.in_flight -= 1;
            if open.closing && open.in_flight == 0 {
                self.close_settled(flight.life);
            }
        }
    }

    /// What the operation comes to; none if its second step is still to come.
    fn take_effect(&mut self, flight: &mut Flight) -> Option<Result<u64, Errno>> {
        let Flight { node, inode, path, writable, split, op, .. } = flight;
        let (node, inode) = (*node, *inode);
        if !*writable && matches!(op, DiskOp::Write { .. } | DiskOp::Zero { .. }) {
            return Some(Err(Errno::BADF));
        }
        Some(match op {
            DiskOp::Read { offset, part } => match self.fault(node, path, Fault::Read) {
                Some(error) => Err(error),
                None => {
                    let content = self.content(node, inode);
                    if *offset + part.len as u64 > content.size() {
                        return Some(Err(Errno::IO));
                    }
                    content.read(*offset, &mut part.buf[part.at..part.at + part.len]);
                    Ok(part.len as u64)
                }
            },
            DiskOp::ReadInto { offset, to } => {
                let mut bytes = vec![0; to.len()];
                let size = self.content(node, inode).size();
                if *offset + bytes.len() as u64 > size {
                    return Some(Err(Errno::IO));
                }
                if let Some(error) = self.fault(node, path, Fault::Read) {
                    // Nobody may rely on what lies there now.
                    bytes.fill(0xa5);
                    let _ = to.write(&bytes);
                    return Some(Err(error));
                }
                self.content(node, inode).read(*offset, &mut bytes);
                match to.write(&bytes) {
                    Ok(()) => Ok(bytes.len() as u64),
                    Err(_) => Err(Errno::FAULT),
                }
            }
            DiskOp::Write { offset, part, durable, from } => {
                if *from == 0
                    && let Some(error) = self.fault(node, path, Fault::Write)
                {
                    let State { nodes, rng, .. } = self;
                    let content = &mut nodes[node].inodes.get_mut(&inode).expect("an open file has a content").content;
                    content.write_torn(*offset, &part.buf[part.at..part.at + part.len], || rng.chance(0.5));
                    return Some(Err(error));
                }
                if *from == 0 && self.fault(node, path, Fault::Lose).is_some() {
                    self.content(node, inode).lose(*offset, &part.buf[part.at..part.at + part.len]);
                    return Some(Ok(part.len as u64));
                }
                if *from == 0 && self.fault(node, path, Fault::Misdirect).is_some() {
                    let blocks = self.content(node, inode).size() / u64::from(self.config.block);
                    let astray = self.rng.below(blocks.max(1)) * u64::from(self.config.block);
                    let content = self.content(node, inode);
                    let len = (part.len as u64).min(content.size().saturating_sub(astray)) as usize;
                    content.harm(astray, &part.buf[part.at..part.at + len], *durable);
                    content.lose(*offset, &part.buf[part.at..part.at + part.len]);
                    return Some(Ok(part.len as u64));
                }
                let first = if std::mem::take(split) && part.len > SECTOR {
                    self.rng.between(1, (part.len / SECTOR) as u64 - 1) as usize * SECTOR
                } else {
                    part.len
                };
                let (start, end) = if first == part.len { (*from, part.len) } else { (0, first) };
                let (at, bytes) = (*offset + start as u64, &part.buf[part.at + start..part.at + end]);
                if self.free_space(node) < self.content(node, inode).growth(at, bytes.len() as u64) {
                    return Some(Err(Errno::NOSPC));
                }
                let wall = self.wall(node);
                let State { nodes, rng, .. } = self;
                let content = &mut nodes[node].inodes.get_mut(&inode).expect("an open file has a content").content;
                if !*durable {
                    content.write_back(at, bytes.len() as u64, rng);
                }
                content.write(at, bytes, *durable);
                content.mtime_ns = wall;
                *from = end;
                if end < part.len {
                    return None;
                }
                Ok(part.len as u64)
            }
            DiskOp::Sync => match self.fault(node, path, Fault::Sync) {
                Some(error) => {
                    let State { nodes, rng, .. } = self;
                    let content = &mut nodes[node].inodes.get_mut(&inode).expect("an open file has a content").content;
                    content.fail_sync(rng);
                    Err(error)
                }
                None => {
                    self.content(node, inode).sync();
                    Ok(0)
                }
            },
            DiskOp::Zero { offset, len, unmap } => {
                if *unmap && !self.config.discard {
                    return Some(Err(Errno::OPNOTSUPP));
                }
                if let Some(error) = self.fault(node, path, Fault::Write) {
                    return Some(Err(error));
                }
                let wall = self.wall(node);
                let space = self.free_space(node);
                let content = self.content(node, inode);
                if !*unmap && space < content.growth(*offset, *len) {
                    return Some(Err(Errno::NOSPC));
                }
                content.zero(*offset, *len, *unmap);
                content.mtime_ns = wall;
                Ok(0)
            }
        })
    }

    /// The process is gone: what it had under way lands later, or never.
    pub(super) fn orphan_flights(&mut self, life: LifeId) {
        let ids: Vec<u64> = self.flights.iter().filter(|(_, f)| f.life == life).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(flight) = self.flights.remove(&id) else { continue };
            let changes = matches!(flight.op, DiskOp::Write { .. } | DiskOp::Zero { .. });
            if flight.landed.is_none() && changes && self.rng.chance(self.config.land_after_crash) {
                let late = self.rng.below(self.config.late + 1);
                let new = self.id();
                self.flights.insert(new, flight);
                // Twice, for a write in two steps.
                self.at(self.now + late / 2, Event::Land(new));
                self.at(self.now + late, Event::Land(new));
            } else {
                self.settle(&flight);
            }
        }
    }

    /// The power is gone: of each write under way, some sectors are on the disk.
    pub(super) fn tear_flights(&mut self, node: usize) {
        let ids: Vec<u64> = self.flights.iter().filter(|(_, f)| f.node == node).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(flight) = self.flights.remove(&id) else { continue };
            if flight.landed.is_none()
                && flight.writable
                && let DiskOp::Write { offset, part, .. } = &flight.op
                && self.rng.chance(0.5)
            {
                let keep = self.rng.below(101) as f64 / 100.0;
                let State { nodes, rng, .. } = self;
                if let Some(inode) = nodes[node].inodes.get_mut(&flight.inode) {
                    let bytes = &part.buf[part.at..part.at + part.len];
                    inode.content.write_torn(*offset, bytes, || rng.chance(keep));
                }
            }
        }
    }
}
