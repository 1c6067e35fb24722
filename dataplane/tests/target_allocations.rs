//! In steady state a frame allocates nothing on its way from the socket to the acknowledgement; what the index grows by
//! is taken in few, large pieces.
//!
//! A binary of its own: it counts what the global allocator is asked for. The world around the target is one that
//! allocates nothing itself: files that are vectors, and a source that sends sealed frames over and over.

#![allow(unsafe_code)] // the counting allocator

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::HashMap;

use afterimage_dataplane::io::{
    Allocation, Class, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Part, Pool, Sock, Token,
};
use afterimage_dataplane::seal::{ControlKey, DataKey, FrameMeta, Item, Plan, PolicyKey, Scratch, seal_frame};
use afterimage_dataplane::target::{StreamConfig, Target, TargetConfig, TargetEvent};
use afterimage_wire::WIRE_VERSION;
use afterimage_wire::handshake::{DiskClaim, Hello, Welcome};
use afterimage_wire::ids::{DiskId, IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::record::{DiskInfo, Record, RecordKind};
use afterimage_wire::segment::Predecessor;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is handed on to the system's allocator; counting touches a thread-local cell without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

const STREAM: StreamId = StreamId([7; 16]);
const FRAMES: usize = 6000;
/// Records of a frame.
const RECORDS: u64 = 4;

/// Files in memory, one socket that brings prepared bytes.
struct StillIo {
    pool: Pool,
    names: HashMap<String, usize>,
    files: Vec<Vec<u8>>,
    pending: Vec<(Token, Op)>,
    spare: Vec<(Token, Op)>,
    /// What the source sends, where it is, and how far it may go.
    stream: Vec<u8>,
    sent: usize,
    allowed: usize,
    waiting: Option<(Token, Part)>,
    acknowledged: u64,
    now: Nanos,
}

impl StillIo {
    fn receive(&mut self, token: Token, mut part: Part, done: &mut Vec<Done>) {
        let len = part.len.min(self.allowed - self.sent).min(20_000);
        if len == 0 {
            self.waiting = Some((token, part));
            return;
        }
        part.buf[part.at..part.at + len].copy_from_slice(&self.stream[self.sent..self.sent + len]);
        self.sent += len;
        done.push(Done { token, result: Ok(len as u64), part: Some(part), parts: Vec::new() });
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
                    answer.part = Some(part);
                }
                Op::Create { path, len } => {
                    let made = self.open(&path, OpenHow { write: true, create_new: true, lock: true });
                    answer.result = made.map(|file| u64::from(file.0));
                    self.files.last_mut().expect("just made").resize(len as usize, 0);
                }
                Op::Recv { part, .. } => {
                    self.receive(token, part, done);
                    continue;
                }
                Op::Send { part, .. } => {
                    self.acknowledged += 1;
                    answer.part = Some(part);
                }
                _ => {}
            }
            done.push(answer);
        }
        self.spare = pending;
        if self.sent < self.allowed
            && let Some((token, part)) = self.waiting.take()
        {
            self.receive(token, part, done);
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
        if let Some(number) = self.names.get(path) {
            return if how.create_new { Err(Errno::EXIST) } else { Ok(File(*number as u32)) };
        }
        if !how.create_new {
            return Err(Errno::NOENT);
        }
        self.files.push(Vec::new());
        self.names.insert(path.to_owned(), self.files.len() - 1);
        Ok(File(self.files.len() as u32 - 1))
    }
    fn close(&mut self, _: File) {}
    fn close_sock(&mut self, _: Sock) {}
    fn info(&mut self, file: File) -> Result<FileInfo, Errno> {
        let size = self.files[file.0 as usize].len() as u64;
        Ok(FileInfo { size, block: 512, physical_block: 4096, discard: true, device: false, mtime_ns: 1, identity: 1 })
    }
    fn allocation(&mut self, _: File, _: u64) -> Result<Allocation, Errno> {
        Ok(Allocation { len: 4096, hole: true })
    }
    fn set_len(&mut self, file: File, len: u64, _: bool) -> Result<(), Errno> {
        self.files[file.0 as usize].resize(len as usize, 0);
        Ok(())
    }
    fn list(&mut self, dir: &str) -> Result<Vec<String>, Errno> {
        let prefix = format!("{dir}/");
        let names = self.names.keys().filter_map(|path| path.strip_prefix(&prefix).map(str::to_owned));
        Ok(names.filter(|name| !name.contains('/')).collect())
    }
    fn rename(&mut self, _: &str, _: &str) -> Result<(), Errno> {
        Err(Errno::NOENT)
    }
    fn remove(&mut self, path: &str) -> Result<(), Errno> {
        self.names.remove(path).map(|_| ()).ok_or(Errno::NOENT)
    }
    fn sync_dir(&mut self, _: &str) -> Result<(), Errno> {
        Ok(())
    }
    fn free_space(&mut self, _: &str) -> Result<u64, Errno> {
        Ok(u64::MAX)
    }
    fn read_small(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.names.get(path).map(|number| self.files[*number].clone()).ok_or(Errno::NOENT)
    }
    fn replace_small(&mut self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.files.push(bytes.to_vec());
        self.names.insert(path.to_owned(), self.files.len() - 1);
        Ok(())
    }
}

fn disk() -> DiskInfo {
    DiskInfo {
        slot: 0,
        id: DiskId([1; 16]),
        size: 1 << 30,
        block: 512,
        physical_block: 4096,
        serial: String::new(),
        name: "disk".into(),
    }
}

/// A join, then frames of a few small writes each.
fn frames(key: &DataKey, incarnation: IncarnationId) -> Vec<u8> {
    let (mut out, mut scratch, mut plan) = (Vec::new(), Scratch::default(), Plan::default());
    let (mut seq, mut join) = (1, Vec::new());
    disk().encode(&mut join);
    let payload: Vec<u8> = (0..700u32).map(|n| (n * n) as u8).collect();
    for number in 1..=FRAMES as u64 {
        let records = if number == 1 { 1 } else { RECORDS };
        let record = |seq, n: u64| Record {
            seq,
            kind: if number == 1 { RecordKind::Join } else { RecordKind::Write },
            disk: 0,
            offset: if number == 1 { 0 } else { (number * 31 + n * 7) % 4000 * 4096 },
            len: if number == 1 { 0 } else { 700 },
            mono_ns: number * 1000,
            wall_ns: number * 1000,
            payload_at: 0,
            payload_len: 0,
            crc: 0,
        };
        plan.clear();
        let body: &[u8] = if number == 1 { &join } else { &payload };
        let items: Vec<Item<'_>> = (0..records).map(|n| Item { record: record(seq + n, n), payload: body }).collect();
        items.iter().for_each(|item| assert!(plan.add(item.payload.len())));
        let meta = FrameMeta {
            stream: STREAM,
            incarnation,
            number,
            acked: number.saturating_sub(9),
            mono_ns: number * 1000,
            sync_ms: 0,
        };
        let mut frame = vec![0; plan.frame_bound()];
        let len = seal_frame(key, &meta, &plan, &items, true, &mut scratch, &mut frame);
        out.extend_from_slice(&frame[..len]);
        seq += records;
    }
    out
}

struct Bench {
    io: StillIo,
    target: Target<StillIo>,
    done: Vec<Done>,
}

impl Bench {
    fn new() -> Self {
        let (incarnation, key) = (IncarnationId([3; 16]), DataKey::new([4; 32]));
        let policy = PolicyKey::new(PolicyKeyId([1; 16]), [2; 32]);
        let wrapped = policy.wrap(incarnation, &key, [5; 12]);
        let classes = [
            Class { capacity: 8 << 10, count: 64 },
            Class { capacity: 640 << 10, count: 32 },
            Class { capacity: 4 << 20, count: 4 },
        ];
        let stream = frames(&key, incarnation);
        let io = StillIo {
            pool: Pool::new(&classes),
            names: HashMap::new(),
            files: Vec::new(),
            pending: Vec::with_capacity(1024),
            spare: Vec::with_capacity(1024),
            stream,
            sent: 0,
            allowed: 0,
            waiting: None,
            acknowledged: 0,
            now: 1,
        };
        let config = TargetConfig { scrub_interval: 0, ..TargetConfig::new("/t") };
        let target = Target::new(1, config).expect("good settings");
        let mut bench = Self { io, target, done: Vec::with_capacity(1024) };
        let config = StreamConfig {
            stream: STREAM,
            name: "group".into(),
            policy_key: policy,
            retention: 1 << 60,
            budget_bytes: 0,
            disks: vec![(disk(), 1)],
        };
        bench.target.open_stream(&mut bench.io, config).expect("opens");
        while !matches!(bench.target.next_event(), Some(TargetEvent::Ready { .. })) {
            bench.turn();
        }
        let hello = Hello {
            version: WIRE_VERSION,
            stream: STREAM,
            incarnation,
            predecessor: Predecessor::default(),
            key: wrapped,
            first_seq: 1,
            next_frame: 1,
            connection: 0,
            disks: vec![DiskClaim { disk: disk(), generation: 1 }],
        };
        let welcome = bench.target.hello(&mut bench.io, &hello);
        assert!(matches!(welcome, Welcome::Accepted { .. }), "{welcome:?}");
        bench.target.attach(&mut bench.io, &hello, Sock(0), ControlKey::new(&[6; 32]));
        bench
    }

    fn turn(&mut self) {
        self.io.poll(None, &mut self.done);
        for done in self.done.drain(..) {
            self.target.done(&mut self.io, done);
        }
        self.target.turn(&mut self.io);
    }

    /// Lets the source send up to this share of all it has, and waits until it is in the index.
    fn send(&mut self, percent: usize) {
        self.io.allowed = self.io.stream.len() * percent / 100;
        let mut quiet = 0;
        while quiet < 20 {
            let before = (self.io.sent, self.io.acknowledged);
            self.turn();
            quiet = if (self.io.sent, self.io.acknowledged) == before { quiet + 1 } else { 0 };
        }
        assert_eq!(self.io.sent, self.io.allowed);
    }
}

#[test]
fn a_frame_allocates_nothing_but_the_growth_of_the_index() {
    let mut bench = Bench::new();
    bench.send(40);
    let told = bench.target.status()[0].durable_frame;
    let before = ALLOCATIONS.get();
    bench.send(60);
    let allocations = ALLOCATIONS.get() - before;
    let frames = bench.target.status()[0].durable_frame - told;
    assert!(frames as usize > FRAMES / 6, "{frames}");
    let most = frames * RECORDS / 256 * 4;
    assert!(allocations <= most, "{allocations} allocations in {frames} frames");
}
