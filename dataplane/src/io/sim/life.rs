//! [`SimIo`]: what a machine sees of the world.

use super::disk::DiskOp;
use super::names::tidy;
use super::state::State;
use super::{Fault, NodeId, World};
use crate::io::{Allocation, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Pool, Sock, Token};

/// What the unfinished replacement of a small file is called.
const SUFFIX: &str = ".new";

/// One life of a node's process.
///
/// It outlives its process only as a shell: after a crash what is submitted vanishes and what is asked fails.
pub struct SimIo {
    pub(super) world: World,
    pub(super) node: NodeId,
    pub(super) life: usize,
    pub(super) pool: Pool,
}

impl SimIo {
    /// The node it runs on.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The world it runs in.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// False once the process was crashed.
    pub fn alive(&self) -> bool {
        self.world.0.borrow().lives[self.life].alive
    }

    /// Does something with the disk of the node, if the process is alive.
    fn with<T>(&self, act: impl FnOnce(&mut State, usize) -> Result<T, Errno>) -> Result<T, Errno> {
        let mut state = self.world.0.borrow_mut();
        let life = &state.lives[self.life];
        if !life.alive {
            return Err(Errno::IO);
        }
        let node = life.node;
        act(&mut state, node)
    }
}

impl Io for SimIo {
    fn submit(&mut self, token: Token, op: Op) {
        let mut state = self.world.0.borrow_mut();
        if !state.lives[self.life].alive {
            return;
        }
        match op {
            Op::Read { file, offset, part } => {
                assert!(part.at + part.len <= part.buf.len(), "a read past its buffer");
                state.check_range(offset, part.at, part.len);
                state.submit_disk(self.life, token, file, DiskOp::Read { offset, part });
            }
            Op::ReadInto { file, offset, to } => {
                state.check_range(offset, 0, to.len());
                assert!(to.is_aligned(state.config.block as usize), "a read into ranges that are not made of blocks");
                state.submit_disk(self.life, token, file, DiskOp::ReadInto { offset, to });
            }
            Op::Write { file, offset, part, durable } => {
                assert!(part.at + part.len <= part.buf.len(), "a write past its buffer");
                state.check_range(offset, part.at, part.len);
                state.submit_disk(self.life, token, file, DiskOp::Write { offset, part, durable, from: 0 });
            }
            Op::Sync { file } => state.submit_disk(self.life, token, file, DiskOp::Sync),
            Op::Zero { file, offset, len, unmap } => {
                let block = u64::from(state.config.block);
                assert!(
                    len > 0 && offset % block == 0 && len % block == 0,
                    "a zero of {len} bytes at {offset} is not made of blocks of {block}"
                );
                state.submit_disk(self.life, token, file, DiskOp::Zero { offset, len, unmap });
            }
            Op::Timer { at } => {
                let at = state.world_time(self.node.0 as usize, at);
                state.complete_at(at, self.life, token, Ok(0));
            }
            Op::Create { path, len } => state.submit_create(self.life, token, &path, len),
            Op::SyncDir { dir } => state.submit_sync_dir(self.life, token, &dir),
            Op::Ublk(op) => state.submit_ublk(self.life, token, op),
            other => state.submit_net(self.life, token, other),
        }
    }

    fn poll(&mut self, until: Option<Nanos>, done: &mut Vec<Done>) {
        let mut state = self.world.0.borrow_mut();
        let life = &mut state.lives[self.life];
        if !life.alive {
            return;
        }
        if life.done.is_empty() {
            let until = until.map(|until| state.world_time(self.node.0 as usize, until));
            state.wake_at(self.life, until);
        } else {
            done.append(&mut life.done);
        }
    }

    fn now(&self) -> Nanos {
        self.world.0.borrow().mono(self.node.0 as usize)
    }

    fn since_boot(&self) -> Nanos {
        self.world.0.borrow().since_boot(self.node.0 as usize)
    }

    fn wall(&self) -> u64 {
        self.world.0.borrow().wall(self.node.0 as usize)
    }

    fn wall_synced(&self) -> bool {
        self.world.0.borrow().nodes[self.node.0 as usize].wall_synced
    }

    fn boot_id(&self) -> [u8; 16] {
        self.world.0.borrow().boot_id(self.node.0 as usize)
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn random(&mut self, out: &mut [u8]) {
        self.world.0.borrow_mut().rng.fill(out);
    }

    fn open(&mut self, path: &str, how: OpenHow) -> Result<File, Errno> {
        let life = self.life;
        self.with(|state, _| state.open(life, path, how))
    }

    fn close(&mut self, file: File) {
        self.world.0.borrow_mut().close(self.life, file);
    }

    fn close_sock(&mut self, sock: Sock) {
        self.world.0.borrow_mut().close_sock(self.life, sock);
    }

    fn info(&mut self, file: File) -> Result<FileInfo, Errno> {
        let life = self.life;
        self.with(|state, node| {
            let inode = state.open_file(life, file).inode;
            let (block, discard) = (state.config.block, state.config.discard);
            let content = state.content(node, inode);
            Ok(FileInfo {
                size: content.size(),
                block,
                physical_block: 4096,
                discard,
                device: false,
                mtime_ns: content.mtime_ns,
                identity: 1 + inode,
            })
        })
    }

    fn allocation(&mut self, file: File, offset: u64) -> Result<Allocation, Errno> {
        let life = self.life;
        self.with(|state, node| {
            let inode = state.open_file(life, file).inode;
            let content = state.content(node, inode);
            if offset >= content.size() {
                return Err(Errno::INVAL);
            }
            let (len, hole) = content.allocation(offset);
            Ok(Allocation { len, hole })
        })
    }

    fn set_len(&mut self, file: File, len: u64, allocate: bool) -> Result<(), Errno> {
        let life = self.life;
        self.with(|state, _| state.set_len(life, file, len, allocate))
    }

    fn list(&mut self, dir: &str) -> Result<Vec<String>, Errno> {
        self.with(|state, node| {
            let dir = tidy(dir);
            let names = &mut state.nodes[node].names;
            if names.get(&dir).is_some() {
                return Err(Errno::NOTDIR);
            }
            names.make_dir(&dir);
            Ok(names.list(&dir))
        })
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Errno> {
        self.with(|state, node| state.rename(node, &tidy(from), &tidy(to)))
    }

    fn remove(&mut self, path: &str) -> Result<(), Errno> {
        self.with(|state, node| {
            state.nodes[node].names.unlink(&tidy(path))?;
            state.collect(node);
            Ok(())
        })
    }

    fn sync_dir(&mut self, dir: &str) -> Result<(), Errno> {
        self.with(|state, node| state.sync_dir(node, &tidy(dir)))
    }

    fn free_space(&mut self, dir: &str) -> Result<u64, Errno> {
        self.with(|state, node| {
            if !state.nodes[node].names.is_dir(&tidy(dir)) {
                return Err(Errno::NOENT);
            }
            Ok(state.free_space(node))
        })
    }

    fn read_small(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.with(|state, node| {
            let path = tidy(path);
            let inode = state.nodes[node].names.get(&path).ok_or(Errno::NOENT)?;
            if let Some(error) = state.fault(node, &path, Fault::Read) {
                return Err(error);
            }
            let content = state.content(node, inode);
            let mut bytes = vec![0; content.size() as usize];
            content.read(0, &mut bytes);
            Ok(bytes)
        })
    }

    fn ublk_request(&mut self, device: File, tag: u16) -> Result<[u8; 24], Errno> {
        self.world.0.borrow().ublk_descriptor(self.life, device, tag)
    }

    fn replace_small(&mut self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.with(|state, node| {
            let path = tidy(path);
            let fresh = format!("{path}{SUFFIX}");
            if !state.nodes[node].names.has_folder(&path) {
                return Err(Errno::NOENT);
            }
            if state.free_space(node) < bytes.len() as u64 {
                return Err(Errno::NOSPC);
            }
            if let Some(error) = state.fault(node, &path, Fault::Write) {
                // It failed before the rename: the old content stands, the new one lies beside it, unfinished.
                state.put(node, &fresh, &bytes[..bytes.len() / 2], false);
                return Err(error);
            }
            if let Some(error) = state.fault(node, &path, Fault::Sync) {
                // It failed after the rename: the new content is seen, and may be gone after a power loss.
                state.put(node, &path, bytes, false);
                return Err(error);
            }
            state.put(node, &path, bytes, true);
            Ok(())
        })
    }
}
