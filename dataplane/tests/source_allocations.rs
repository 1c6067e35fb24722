//! In steady state a protected write allocates nothing on its way from the host's buffer to the acknowledgement, and
//! its data lies in one buffer from the host to the sealer and from the sealer to the socket.
//!
//! A binary of its own: it counts what the global allocator is asked for. The world around the source is one that
//! allocates nothing itself: disks that are vectors, and a target that acknowledges each frame it is sent.

#![allow(unsafe_code)] // the counting allocator

#[path = "shared/counting_allocations.rs"]
mod counting_allocations;

use afterimage_dataplane::host::{DiskKey, Disks, HEADROOM, HostDisk, Request};
use afterimage_dataplane::io::{
    Allocation, Class, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Part, Pool, Sock, Token,
};
use afterimage_dataplane::seal::{ControlKey, PolicyKey};
use afterimage_dataplane::sealers::Sealer;
use afterimage_dataplane::source::{DiskConfig, GroupConfig, Source, SourceEvent, SourceLimits};
use afterimage_wire::control::{CONTROL_LEN, Control};
use afterimage_wire::frame::FrameHeader;
use afterimage_wire::handshake::Position;
use afterimage_wire::ids::{DiskId, PolicyKeyId, StreamId, TimelineId};
use counting_allocations::allocations;

const SIZE: u64 = 16 << 20;
const STREAM: StreamId = StreamId([7; 16]);

/// Two files (a disk and its log), one socket, and a clock that moves with each poll.
struct StillIo {
    pool: Pool,
    files: Vec<Vec<u8>>,
    pending: Vec<(Token, Op)>,
    spare: Vec<(Token, Op)>,
    receive: Option<(Token, Part)>,
    control: ControlKey,
    ready: bool,
    acked: Option<(u64, u64)>,
    now: Nanos,
    /// Where the data of disk writes lay.
    written_at: Vec<*const u8>,
    frames: u64,
}

impl StillIo {
    fn say(&mut self, message: Control, done: &mut Vec<Done>) {
        let Some((token, mut part)) = self.receive.take() else { return };
        let mut bytes = [0; CONTROL_LEN];
        self.control.seal(&message, &mut bytes);
        part.buf[part.at..part.at + CONTROL_LEN].copy_from_slice(&bytes);
        done.push(Done { token, result: Ok(CONTROL_LEN as u64), part: Some(part), parts: Vec::new() });
    }
}

impl Io for StillIo {
    fn submit(&mut self, token: Token, op: Op) {
        self.pending.push((token, op));
    }

    fn poll(&mut self, _: Option<Nanos>, done: &mut Vec<Done>) {
        self.now += 100_000;
        let mut pending = std::mem::take(&mut self.spare);
        std::mem::swap(&mut pending, &mut self.pending);
        for (token, op) in pending.drain(..) {
            let mut answer = Done { token, result: Ok(0), part: None, parts: Vec::new() };
            match op {
                Op::Read { file, offset, mut part } => {
                    let from = &self.files[file.0 as usize][offset as usize..][..part.len];
                    part.buf[part.at..part.at + part.len].copy_from_slice(from);
                    answer.part = Some(part);
                }
                Op::Write { file, offset, part, .. } => {
                    let data = &part.buf[part.at..part.at + part.len];
                    self.files[file.0 as usize][offset as usize..][..part.len].copy_from_slice(data);
                    if file.0 == 0 && self.written_at.len() < self.written_at.capacity() {
                        self.written_at.push(data.as_ptr());
                    }
                    answer.part = Some(part);
                }
                Op::Zero { file, offset, len, .. } => {
                    self.files[file.0 as usize][offset as usize..][..len as usize].fill(0);
                }
                Op::SendV { parts, .. } => {
                    for part in &parts {
                        let header = FrameHeader::parse(&part.buf).expect("a frame");
                        self.acked = Some((header.number.get(), header.last_seq.get()));
                        self.frames += 1;
                    }
                    answer.parts = parts;
                }
                Op::Recv { part, .. } => {
                    self.receive = Some((token, part));
                    continue;
                }
                _ => {}
            }
            done.push(answer);
        }
        self.spare = pending;
        if self.receive.is_some() {
            if !self.ready {
                self.ready = true;
                self.say(Control::Ready, done);
            } else if let Some((frame, seq)) = self.acked.take() {
                self.say(Control::Ack { frame, seq }, done);
            }
        }
    }

    fn now(&self) -> Nanos {
        self.now
    }
    fn wall(&self) -> u64 {
        self.now
    }
    fn wall_synced(&self) -> bool {
        true
    }
    fn boot_id(&self) -> [u8; 16] {
        [1; 16]
    }
    fn pool(&self) -> &Pool {
        &self.pool
    }
    fn random(&mut self, out: &mut [u8]) {
        out.fill(5);
    }
    fn open(&mut self, path: &str, how: OpenHow) -> Result<File, Errno> {
        match (path, how.create_new) {
            ("/disk", _) => Ok(File(0)),
            (_, true) => Ok(File(1)),
            _ => Err(Errno::NOENT),
        }
    }
    fn close(&mut self, _: File) {}
    fn close_sock(&mut self, _: Sock) {}
    fn info(&mut self, file: File) -> Result<FileInfo, Errno> {
        let size = self.files[file.0 as usize].len() as u64;
        Ok(FileInfo { size, block: 512, physical_block: 4096, discard: true, device: false, mtime_ns: 1, identity: 1 })
    }
    fn allocation(&mut self, _: File, offset: u64) -> Result<Allocation, Errno> {
        Ok(Allocation { len: SIZE - offset, hole: true })
    }
    fn set_len(&mut self, file: File, len: u64, _: bool) -> Result<(), Errno> {
        self.files[file.0 as usize].resize(len as usize, 0);
        Ok(())
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
        Ok(())
    }
    fn free_space(&mut self, _: &str) -> Result<u64, Errno> {
        Ok(u64::MAX)
    }
    fn read_small(&mut self, _: &str) -> Result<Vec<u8>, Errno> {
        Err(Errno::NOENT)
    }
    fn replace_small(&mut self, _: &str, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }
}

struct Bench {
    io: StillIo,
    source: Source<StillIo>,
    key: DiskKey,
    done: Vec<Done>,
    answered: u64,
    asked_at: Vec<*const u8>,
}

impl Bench {
    fn new() -> Self {
        let classes = [Class { capacity: 16 << 10, count: 2048 }, Class { capacity: 1 << 20, count: 16 }];
        let mut io = StillIo {
            pool: Pool::new(&classes),
            files: vec![vec![0; SIZE as usize], Vec::new()],
            pending: Vec::with_capacity(1024),
            spare: Vec::with_capacity(1024),
            receive: None,
            control: ControlKey::new(&[4; 32]),
            ready: false,
            acked: None,
            now: 0,
            written_at: Vec::with_capacity(4096),
            frames: 0,
        };
        let mut source =
            Source::new(1, SourceLimits { queue_bytes: 8 << 20, ..SourceLimits::default() }, Sealer::Inline);
        let disk = DiskConfig {
            id: DiskId([1; 16]),
            name: "disk".into(),
            path: "/disk".into(),
            log_path: "/log".into(),
            ..DiskConfig::default()
        };
        let config = GroupConfig {
            stream: STREAM,
            name: "group".into(),
            disks: vec![disk],
            policy_key: PolicyKey::new(PolicyKeyId([1; 16]), [2; 32]),
            // Cuts and looks at the log allocate a little, once a second: not in this test's time.
            cut_interval: 86_400_000_000_000,
            compress: true,
            lease: 0,
            sync_deadline: 0,
            left: Vec::new(),
        };
        source.protect(&mut io, config).expect("the disk is there");
        let key = source.disk_key(STREAM, DiskId([1; 16])).expect("protected");
        let (done, asked_at) = (Vec::with_capacity(1024), Vec::with_capacity(4096));
        Self { io, source, key, done, answered: 0, asked_at }
    }

    fn turn(&mut self) {
        self.io.poll(None, &mut self.done);
        for done in self.done.drain(..) {
            self.source.done(&mut self.io, done);
        }
        self.source.turn(&mut self.io);
        if let Some(mut disk) = Disks::<StillIo>::disk(&mut self.source, self.key) {
            for answer in HostDisk::<StillIo>::answers(&mut disk).drain(..) {
                answer.result.expect("written");
                self.answered += 1;
            }
        }
        while let Some(event) = self.source.next_event() {
            if matches!(event, SourceEvent::Connect { .. }) {
                let key = ControlKey::new(&[4; 32]);
                let (io, place) = (&mut self.io, Position::default());
                self.source.linked(io, STREAM, Sock(0), key, TimelineId::NONE, place, true);
            }
        }
    }

    /// Writes with 32 at a time, of both aligned and unaligned places.
    fn write(&mut self, count: u64) {
        let mut issued = 0;
        let goal = self.answered + count;
        while self.answered < goal {
            let answered = count - (goal - self.answered);
            while issued < count && issued - answered < 32 {
                let offset = issued * 37 % 4000 * 4096 + if issued % 8 == 0 { 100 } else { 0 };
                let at = HEADROOM + (offset % 4096) as usize;
                let mut buf = self.io.pool.take(at + 4096 + HEADROOM).expect("the pool has room");
                buf[at..at + 4096].fill(issued as u8);
                if offset % 4096 == 0 && self.asked_at.len() < self.asked_at.capacity() {
                    self.asked_at.push(buf[at..].as_ptr());
                }
                let mut disk = Disks::<StillIo>::disk(&mut self.source, self.key).expect("on offer");
                disk.request(
                    &mut self.io,
                    issued,
                    Request::Write { offset, data: Part { buf, at, len: 4096 }, fua: false },
                );
                issued += 1;
            }
            self.turn();
        }
    }
}

#[test]
fn a_write_allocates_nothing_and_keeps_its_buffer() {
    let mut bench = Bench::new();
    for _ in 0..200 {
        bench.turn();
    }
    // The extents become hot, the queues grow to their size.
    bench.write(3000);
    bench.io.written_at.clear();
    bench.asked_at.clear();
    let frames = bench.io.frames;
    let before = allocations();
    bench.write(2000);
    let allocations = allocations() - before;
    assert!(bench.io.frames > frames, "frames were shipped");
    assert_eq!(allocations, 0, "{allocations} allocations in 2000 writes");
    // Every aligned write went to the disk from where the host's data lay.
    let written: std::collections::HashSet<_> = bench.io.written_at.iter().collect();
    assert!(bench.asked_at.iter().all(|at| written.contains(at)));
}
