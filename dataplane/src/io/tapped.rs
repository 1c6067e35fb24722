//! Files that are no files: a disk that somebody in this thread serves ([`crate::host::Disks`]), as if it were one.
//!
//! [`Tapped`] is any [`Io`] beside which such disks can be opened under a name. What is submitted for them is kept until
//! whoever serves them fetches it ([`crate::loopback`]), and completes like all else, in a poll. Everything that is not
//! theirs passes through.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Deref, DerefMut};

use super::{Allocation, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Pool, Token, ublk};

/// What the names of served disks begin with. No path of a file does: those are absolute.
pub const TAP_PREFIX: &str = "view:";

/// Numbers of such files have this bit.
const TAP: u32 = 1 << 31;

/// Served disks that can be opened, and what was asked of those that are open.
#[derive(Debug, Default)]
pub struct Taps {
    offered: BTreeMap<String, FileInfo>,
    open: BTreeMap<u32, String>,
    next: u32,
    asked: VecDeque<(Token, File, Op)>,
    done: VecDeque<Done>,
}

impl Taps {
    /// From now on a disk can be opened under this name, which begins with [`TAP_PREFIX`], once at a time.
    pub fn offer(&mut self, name: &str, info: FileInfo) {
        self.offered.insert(name.to_owned(), info);
    }

    /// It cannot be opened any more. Who has it open keeps it.
    pub fn withdraw(&mut self, name: &str) {
        self.offered.remove(name);
    }

    /// Name of an open disk.
    pub fn name(&self, file: File) -> Option<&str> {
        self.open.get(&file.0).map(String::as_str)
    }

    /// The next operation that waits to be done: any of [`Op::Read`], [`Op::Write`], [`Op::Sync`], [`Op::Zero`].
    pub fn next_asked(&mut self) -> Option<(Token, File, Op)> {
        self.asked.pop_front()
    }

    /// Puts back what cannot be done yet.
    pub fn put_back(&mut self, asked: (Token, File, Op)) {
        self.asked.push_front(asked);
    }

    /// An operation is done.
    pub fn complete(&mut self, done: Done) {
        self.done.push_back(done);
    }

    /// Something is to be done, or has been done and is not fetched.
    pub fn is_busy(&self) -> bool {
        !self.asked.is_empty() || !self.done.is_empty()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Tapped<I> {
    io: I,
    /// Its served disks.
    pub taps: Taps,
}

impl<I> Tapped<I> {
    /// Without served disks.
    pub fn new(io: I) -> Self {
        Self { io, taps: Taps::default() }
    }
}

impl<I> Deref for Tapped<I> {
    type Target = I;

    fn deref(&self) -> &I {
        &self.io
    }
}

impl<I> DerefMut for Tapped<I> {
    fn deref_mut(&mut self) -> &mut I {
        &mut self.io
    }
}

/// The served disk that an operation is on.
fn tap_of(op: &Op) -> Option<File> {
    let file = match op {
        Op::Read { file, .. }
        | Op::ReadInto { file, .. }
        | Op::Write { file, .. }
        | Op::Sync { file }
        | Op::Zero { file, .. } => *file,
        _ => return None,
    };
    (file.0 & TAP != 0).then_some(file)
}

fn bare(token: Token, result: Result<u64, Errno>) -> Done {
    Done { token, result, part: None, parts: Vec::new() }
}

impl<I: Io> Io for Tapped<I> {
    fn submit(&mut self, token: Token, op: Op) {
        let Some(file) = tap_of(&op) else { return self.io.submit(token, op) };
        match op {
            op if self.taps.open.contains_key(&file.0) => match op {
                // Whoever asked reads into a buffer of its own instead.
                Op::ReadInto { .. } => self.taps.complete(bare(token, Err(Errno::INVAL))),
                op => self.taps.asked.push_back((token, file, op)),
            },
            Op::Read { part, .. } | Op::Write { part, .. } => {
                self.taps.complete(Done { part: Some(part), ..bare(token, Err(Errno::BADF)) });
            }
            _ => self.taps.complete(bare(token, Err(Errno::BADF))),
        }
    }

    fn poll(&mut self, until: Option<Nanos>, done: &mut Vec<Done>) {
        // What is asked of a served disk is done in a turn of whoever serves it: it must have one.
        let until = until.filter(|_| !self.taps.is_busy());
        done.extend(self.taps.done.drain(..));
        self.io.poll(until, done);
    }

    fn now(&self) -> Nanos {
        self.io.now()
    }

    fn since_boot(&self) -> Nanos {
        self.io.since_boot()
    }

    fn wall(&self) -> u64 {
        self.io.wall()
    }

    fn wall_synced(&self) -> bool {
        self.io.wall_synced()
    }

    fn boot_id(&self) -> [u8; 16] {
        self.io.boot_id()
    }

    fn pool(&self) -> &Pool {
        self.io.pool()
    }

    fn random(&mut self, out: &mut [u8]) {
        self.io.random(out);
    }

    fn open(&mut self, path: &str, how: OpenHow) -> Result<File, Errno> {
        if !path.starts_with(TAP_PREFIX) {
            return self.io.open(path, how);
        }
        if how.create_new || !self.taps.offered.contains_key(path) {
            return Err(Errno::NOENT);
        }
        if self.taps.open.values().any(|open| open == path) {
            return Err(Errno::BUSY);
        }
        let number = self.taps.next | TAP;
        self.taps.next = (self.taps.next + 1) & !TAP;
        self.taps.open.insert(number, path.to_owned());
        Ok(File(number))
    }

    fn close(&mut self, file: File) {
        if file.0 & TAP == 0 {
            return self.io.close(file);
        }
        self.taps.open.remove(&file.0);
    }

    fn close_sock(&mut self, sock: super::Sock) {
        self.io.close_sock(sock);
    }

    fn info(&mut self, file: File) -> Result<FileInfo, Errno> {
        if file.0 & TAP == 0 {
            return self.io.info(file);
        }
        let name = self.taps.open.get(&file.0).ok_or(Errno::BADF)?;
        self.taps.offered.get(name).copied().ok_or(Errno::NODEV)
    }

    fn allocation(&mut self, file: File, offset: u64) -> Result<Allocation, Errno> {
        if file.0 & TAP == 0 { self.io.allocation(file, offset) } else { Err(Errno::OPNOTSUPP) }
    }

    fn set_len(&mut self, file: File, len: u64, allocate: bool) -> Result<(), Errno> {
        if file.0 & TAP == 0 { self.io.set_len(file, len, allocate) } else { Err(Errno::INVAL) }
    }

    fn list(&mut self, dir: &str) -> Result<Vec<String>, Errno> {
        self.io.list(dir)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Errno> {
        self.io.rename(from, to)
    }

    fn remove(&mut self, path: &str) -> Result<(), Errno> {
        self.io.remove(path)
    }

    fn sync_dir(&mut self, dir: &str) -> Result<(), Errno> {
        self.io.sync_dir(dir)
    }

    fn free_space(&mut self, dir: &str) -> Result<u64, Errno> {
        self.io.free_space(dir)
    }

    fn read_small(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.io.read_small(path)
    }

    fn ublk_request(&mut self, device: File, tag: u16) -> Result<[u8; size_of::<ublk::uapi::Descriptor>()], Errno> {
        self.io.ublk_request(device, tag)
    }

    fn replace_small(&mut self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.io.replace_small(path, bytes)
    }
}
