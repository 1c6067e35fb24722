//! In steady state the NBD front end allocates nothing per request.
//!
//! A binary of its own: it counts what the global allocator is asked for. The world around the server is one that
//! allocates nothing itself: a socket that is a slice of bytes, a disk that is a vector.

#![allow(unsafe_code)] // the counting allocator

#[path = "shared/counting_allocations.rs"]
mod counting_allocations;

use std::collections::VecDeque;

use afterimage_dataplane::host::{
    Answer, DiskKey, Disks, Export, FrontEnd as _, Geometry, HEADROOM, HostDisk, Request,
};
use afterimage_dataplane::io::{
    Allocation, Class, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Part, Pool, Sock, Token,
};
use afterimage_dataplane::nbd::proto::{self, RequestHeader, cmd, option};
use afterimage_dataplane::nbd::{Limits, Server};
use counting_allocations::allocations;

/// One socket: the client's bytes are there from the start, the server's are counted.
struct SliceIo {
    pool: Pool,
    input: Vec<u8>,
    at: usize,
    sent: usize,
    pending: Vec<(Token, Op)>,
    spare: Vec<(Token, Op)>,
}

impl SliceIo {
    fn fill(&mut self, part: &mut Part) -> usize {
        let len = part.len.min(self.input.len() - self.at);
        part.buf[part.at..part.at + len].copy_from_slice(&self.input[self.at..self.at + len]);
        self.at += len;
        len
    }
}

impl Io for SliceIo {
    fn submit(&mut self, token: Token, op: Op) {
        self.pending.push((token, op));
    }

    fn poll(&mut self, _: Option<Nanos>, done: &mut Vec<Done>) {
        let mut pending = std::mem::take(&mut self.spare);
        std::mem::swap(&mut pending, &mut self.pending);
        let waits = self.at == self.input.len();
        for (token, op) in pending.drain(..) {
            match op {
                Op::Recv { mut part, .. } if !waits => {
                    let len = self.fill(&mut part);
                    done.push(Done { token, result: Ok(len as u64), part: Some(part), parts: Vec::new() });
                }
                Op::RecvV { mut parts, .. } if !waits => {
                    let len: usize = parts.iter_mut().map(|part| self.fill(part)).sum();
                    done.push(Done { token, result: Ok(len as u64), part: None, parts });
                }
                Op::Send { part, .. } => {
                    self.sent += part.len;
                    done.push(Done { token, result: Ok(part.len as u64), part: Some(part), parts: Vec::new() });
                }
                Op::SendV { parts, .. } => {
                    let len: usize = parts.iter().map(|p| p.len).sum();
                    self.sent += len;
                    done.push(Done { token, result: Ok(len as u64), part: None, parts });
                }
                other => self.pending.push((token, other)),
            }
        }
        self.spare = pending;
    }

    fn now(&self) -> Nanos {
        0
    }

    fn wall(&self) -> u64 {
        0
    }

    fn wall_synced(&self) -> bool {
        false
    }

    fn boot_id(&self) -> [u8; 16] {
        [0; 16]
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn random(&mut self, _: &mut [u8]) {}

    fn open(&mut self, _: &str, _: OpenHow) -> Result<File, Errno> {
        Err(Errno::NOENT)
    }

    fn close(&mut self, _: File) {}

    fn close_sock(&mut self, _: Sock) {}

    fn info(&mut self, _: File) -> Result<FileInfo, Errno> {
        Err(Errno::NOENT)
    }

    fn allocation(&mut self, _: File, _: u64) -> Result<Allocation, Errno> {
        Err(Errno::NOENT)
    }

    fn set_len(&mut self, _: File, _: u64, _: bool) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }

    fn list(&mut self, _: &str) -> Result<Vec<String>, Errno> {
        Err(Errno::NOENT)
    }

    fn rename(&mut self, _: &str, _: &str) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }

    fn remove(&mut self, _: &str) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }

    fn sync_dir(&mut self, _: &str) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }

    fn free_space(&mut self, _: &str) -> Result<u64, Errno> {
        Err(Errno::NOENT)
    }

    fn read_small(&mut self, _: &str) -> Result<Vec<u8>, Errno> {
        Err(Errno::NOENT)
    }

    fn replace_small(&mut self, _: &str, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }
}

struct Disk {
    data: Vec<u8>,
    answers: VecDeque<Answer>,
}

fn geometry(len: usize) -> Geometry {
    Geometry {
        size: len as u64,
        block: 512,
        physical_block: 4096,
        read_only: false,
        discard: true,
        serial: String::new(),
    }
}

impl HostDisk<SliceIo> for &mut Disk {
    fn geometry(&self) -> Geometry {
        geometry(self.data.len())
    }

    fn request(&mut self, io: &mut SliceIo, cookie: u64, request: Request) {
        let result = match request {
            Request::ReadInto { .. } => Err(Errno::INVAL),
            Request::Read { offset, len } => {
                let mut buf = io.pool.take(HEADROOM + len).expect("a buffer is free");
                buf[HEADROOM..HEADROOM + len].copy_from_slice(&self.data[offset as usize..][..len]);
                Ok(Some(Part { buf, at: HEADROOM, len }))
            }
            Request::Write { offset, data, .. } => {
                self.data[offset as usize..][..data.len].copy_from_slice(&data.buf[data.at..data.at + data.len]);
                Ok(None)
            }
            _ => Ok(None),
        };
        self.answers.push_back(Answer { cookie, result });
    }

    fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.answers
    }

    fn allocation(&mut self, _: &mut SliceIo, _: u64) -> Result<Allocation, Errno> {
        Err(Errno::IO)
    }
}

impl Disks<SliceIo> for Disk {
    fn exports(&self) -> Vec<Export> {
        let geometry = geometry(self.data.len());
        vec![Export { key: DiskKey(1), name: "disk".into(), description: String::new(), geometry }]
    }

    fn disk(&mut self, _: DiskKey) -> Option<impl HostDisk<SliceIo> + '_> {
        Some(self)
    }
}

/// `count` requests, as the client sends them.
fn requests(kind: u16, count: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for n in 0..count {
        let offset = n % 1000 * 4096;
        bytes.extend_from_slice(&RequestHeader { flags: 0, kind, cookie: n, offset, len: len as u32 }.bytes());
        if kind == cmd::WRITE {
            bytes.resize(bytes.len() + len, n as u8);
        }
    }
    bytes
}

#[test]
fn a_request_in_steady_state_allocates_nothing() {
    let pool = Pool::new(&[
        Class { capacity: 12 * 1024, count: 1024 },
        Class { capacity: 32 * 1024, count: 64 },
        Class { capacity: 532 * 1024, count: 16 },
    ]);
    let mut io = SliceIo { pool, input: Vec::new(), at: 0, sent: 0, pending: Vec::new(), spare: Vec::new() };
    let mut disk = Disk { data: vec![0; 8 << 20], answers: VecDeque::new() };
    let mut server = Server::new(0x4000, Limits::default());
    server.attach(&mut io, Sock(1), &disk).expect("there is room");
    let mut input = 3u32.to_be_bytes().to_vec();
    input.extend_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
    input.extend_from_slice(&option::EXPORT_NAME.to_be_bytes());
    input.extend_from_slice(&4u32.to_be_bytes());
    input.extend_from_slice(b"disk");
    let mut done = Vec::with_capacity(16);
    let mut play = |io: &mut SliceIo, input: Vec<u8>, replies: usize| {
        (io.input, io.at, io.sent) = (input, 0, 0);
        let before = allocations();
        while io.sent < replies {
            io.poll(None, &mut done);
            for done in done.drain(..) {
                server.done(io, &mut disk, done);
            }
            server.collect(io, &mut disk);
        }
        (allocations() - before, server.counters().copied_bytes)
    };
    play(&mut io, input, 18 + 10);
    for (kind, len, count) in
        [(cmd::WRITE, 4096, 3000), (cmd::READ, 4096, 3000), (cmd::WRITE, 1 << 20, 20), (cmd::FLUSH, 0, 900)]
    {
        let replies = count as usize * (16 + if kind == cmd::READ { len } else { 0 });
        let stream = requests(kind, count, len);
        let stream = if kind == cmd::FLUSH { flushes(count) } else { stream };
        let (_, warm) = play(&mut io, stream.clone(), replies);
        let (allocations, copied) = play(&mut io, stream, replies);
        assert_eq!(allocations, 0, "command {kind} of {len} bytes");
        assert_eq!(copied, warm, "command {kind} of {len} bytes: nothing was copied");
    }
}

fn flushes(count: u64) -> Vec<u8> {
    (0..count)
        .flat_map(|cookie| RequestHeader { flags: 0, kind: cmd::FLUSH, cookie, offset: 0, len: 0 }.bytes())
        .collect()
}
