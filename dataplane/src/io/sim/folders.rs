//! What a process asks for beside its own thread: making a file, making a folder durable.
//!
//! Each goes on step by step, and a process that dies takes the steps that are still to come with it: a file may be left
//! without its length, and its name is not durable. A step may take long ([`super::WorldConfig::slow_folders`]), as where
//! a file system has to write down first what everybody else did.

use super::Fault;
use super::names::tidy;
use super::state::{Event, LifeId, State};
use crate::io::{Errno, File, Nanos, OpenHow, Token};

/// How many times longer a slow step takes than any other operation.
const SLOW: Nanos = 100;

pub(super) enum Step {
    Create,
    Lengthen(File),
    SyncDir,
}

pub(super) struct Errand {
    pub(super) life: LifeId,
    token: Token,
    path: String,
    len: u64,
    step: Step,
}

impl State {
    pub(super) fn submit_create(&mut self, life: LifeId, token: Token, path: &str, len: u64) {
        assert!(len > 0, "a file of no length");
        self.begin_step(Errand { life, token, path: tidy(path), len, step: Step::Create });
    }

    pub(super) fn submit_sync_dir(&mut self, life: LifeId, token: Token, dir: &str) {
        self.begin_step(Errand { life, token, path: tidy(dir), len: 0, step: Step::SyncDir });
    }

    fn begin_step(&mut self, errand: Errand) {
        let mut latency = self.between(self.config.disk_latency);
        if self.rng.chance(self.config.slow_folders) {
            latency = latency.max(1) * SLOW;
        }
        let begin = self.now.max(self.nodes[self.lives[errand.life].node].stalled_until);
        let id = self.id();
        self.errands.insert(id, errand);
        self.at(begin + latency, Event::Errand(id));
    }

    pub(super) fn errand(&mut self, id: u64) {
        // Its process may be gone, and it with it.
        let Some(mut errand) = self.errands.remove(&id) else { return };
        let (life, token) = (errand.life, errand.token);
        let node = self.lives[life].node;
        let result = match errand.step {
            Step::Create => {
                match self.open(life, &errand.path, OpenHow { write: true, create_new: true, lock: true }) {
                    Ok(file) => {
                        errand.step = Step::Lengthen(file);
                        return self.begin_step(errand);
                    }
                    Err(errno) => Err(errno),
                }
            }
            Step::Lengthen(file) => {
                self.set_len(life, file, errand.len, true).map(|()| u64::from(file.0)).inspect_err(|_| {
                    self.close(life, file);
                    let _ = self.nodes[node].names.unlink(&errand.path);
                    self.collect(node);
                })
            }
            Step::SyncDir => self.sync_dir(node, &errand.path).map(|()| 0),
        };
        self.complete_at(self.now, life, token, result);
    }

    pub(super) fn sync_dir(&mut self, node: usize, dir: &str) -> Result<(), Errno> {
        if !self.nodes[node].names.is_dir(dir) {
            return Err(Errno::NOENT);
        }
        if let Some(error) = self.fault(node, dir, Fault::Sync) {
            return Err(error);
        }
        self.nodes[node].names.sync(dir);
        self.collect(node);
        Ok(())
    }

    pub(super) fn rename(&mut self, node: usize, from: &str, to: &str) -> Result<(), Errno> {
        self.nodes[node].names.rename(from, to)?;
        // Faults are asked for by name: an open file goes by its new one.
        if let Some(inode) = self.nodes[node].names.get(to) {
            let lives = self.lives.iter_mut().filter(|life| life.node == node);
            for file in lives.flat_map(|life| life.files.values_mut()).filter(|file| file.inode == inode) {
                to.clone_into(&mut file.path);
            }
        }
        self.collect(node);
        Ok(())
    }

    pub(super) fn set_len(&mut self, life: LifeId, file: File, len: u64, allocate: bool) -> Result<(), Errno> {
        let node = self.lives[life].node;
        let open = self.open_file(life, file);
        if !open.write {
            return Err(Errno::INVAL);
        }
        let inode = open.inode;
        let space = self.free_space(node);
        let wall = self.wall(node);
        let content = self.content(node, inode);
        if allocate && content.growth(0, len) > space {
            return Err(Errno::NOSPC);
        }
        content.set_len(len, allocate);
        content.mtime_ns = wall;
        Ok(())
    }
}
