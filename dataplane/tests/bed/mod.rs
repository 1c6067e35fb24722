//! Where the cases run: a ring with a folder on a real disk, or a node of a simulated world.

use std::collections::VecDeque;

use afterimage_dataplane::io::ring::{Ring, RingConfig};
use afterimage_dataplane::io::sim::{NodeId, SimIo, World, WorldConfig};
use afterimage_dataplane::io::{Class, Done, Errno, File, Io, Nanos, Op, Part, Pool, Sock, Token};

/// One process with a folder, and sockets to itself.
pub trait Bed {
    /// The implementation under test.
    type I: Io;

    /// It.
    fn io(&mut self) -> &mut Self::I;

    /// A path in the folder.
    fn path(&self, name: &str) -> String;

    /// Two ends of a connection.
    fn pair(&mut self) -> (Sock, Sock);

    /// Lets time pass until there is a completion, or `until`; what came is in `queue`.
    fn pass(&mut self, until: Nanos);

    /// Completions that were polled and not yet asked for.
    fn queue(&mut self) -> &mut VecDeque<Done>;

    /// The next completion.
    fn wait(&mut self) -> Done {
        let deadline = self.io().now() + 20_000_000_000;
        loop {
            if let Some(done) = self.queue().pop_front() {
                return done;
            }
            assert!(self.io().now() < deadline, "no completion came");
            self.pass(deadline);
        }
    }

    /// Lets that much time pass; no completion is expected.
    fn settle(&mut self, nanos: Nanos) {
        let until = self.io().now() + nanos;
        while self.io().now() < until {
            self.pass(until);
        }
        assert!(self.queue().is_empty(), "an operation completed early: {:?}", self.queue());
    }

    /// Runs one operation.
    fn run(&mut self, token: Token, op: Op) -> Done {
        self.io().submit(token, op);
        let done = self.wait();
        assert_eq!(done.token, token);
        done
    }

    /// Writes all.
    fn write(&mut self, file: File, offset: u64, data: &[u8]) {
        let source = part(self.io(), 0, data);
        let done = self.run(99, Op::Write { file, offset, part: source, durable: false });
        assert_eq!(done.result, Ok(data.len() as u64));
    }

    /// Reads.
    fn read(&mut self, file: File, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let target = part(self.io(), 0, &vec![0xee; len]);
        let done = self.run(98, Op::Read { file, offset, part: target });
        let part = done.part.expect("the buffer comes back");
        done.result.map(|_| part.buf[part.at..part.at + part.len].to_vec())
    }
}

/// Bytes that tell where they came from.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    afterimage_dataplane::io::sim::Rng::new(seed).fill(&mut out);
    out
}

/// A part of a fresh buffer with these bytes.
pub fn part(io: &impl Io, at: usize, bytes: &[u8]) -> Part {
    let mut buf = io.pool().take(at + bytes.len()).expect("the pool has room");
    buf[at..at + bytes.len()].copy_from_slice(bytes);
    Part { buf, at, len: bytes.len() }
}

fn classes() -> Vec<Class> {
    vec![
        Class { capacity: 16 * 1024, count: 256 },
        Class { capacity: 256 * 1024, count: 16 },
        Class { capacity: 4 * 1024 * 1024, count: 4 },
    ]
}

/// Real files and sockets.
pub struct RingBed {
    ring: Ring,
    dir: tempfile::TempDir,
    queue: VecDeque<Done>,
}

impl RingBed {
    /// A ring with a small submission queue, so that it overflows, and few files, so that their slots come again.
    pub fn new() -> Self {
        let config = RingConfig { entries: 32, files: 16, ..RingConfig::default() };
        let ring = Ring::new(Pool::new(&classes()), config).expect("this kernel has what the ring needs");
        // Not in the default folder, which may be a tmpfs.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
        Self { ring, dir, queue: VecDeque::new() }
    }
}

impl Bed for RingBed {
    type I = Ring;

    fn io(&mut self) -> &mut Ring {
        &mut self.ring
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir.path().display())
    }

    fn pair(&mut self) -> (Sock, Sock) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let a = std::net::TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
        let (b, _) = listener.accept().expect("its other end");
        // As a socket that comes from an async runtime is.
        b.set_nonblocking(true).expect("a flag");
        (self.ring.attach(a.into()).expect("a slot"), self.ring.attach(b.into()).expect("a slot"))
    }

    fn pass(&mut self, until: Nanos) {
        let mut done = Vec::new();
        self.ring.poll(Some(until), &mut done);
        self.queue.extend(done);
    }

    fn queue(&mut self) -> &mut VecDeque<Done> {
        &mut self.queue
    }
}

/// A simulated node.
pub struct SimBed {
    world: World,
    node: NodeId,
    io: SimIo,
    queue: VecDeque<Done>,
}

impl SimBed {
    /// A world without faults.
    pub fn new(seed: u64) -> Self {
        let world = World::new(seed, WorldConfig { classes: classes(), ..WorldConfig::default() });
        let node = world.node("bed");
        let io = world.io(node);
        Self { world, node, io, queue: VecDeque::new() }
    }
}

impl Bed for SimBed {
    type I = SimIo;

    fn io(&mut self) -> &mut SimIo {
        &mut self.io
    }

    fn path(&self, name: &str) -> String {
        name.to_owned()
    }

    fn pair(&mut self) -> (Sock, Sock) {
        self.world.connect(self.node, self.node)
    }

    fn pass(&mut self, until: Nanos) {
        let mut done = Vec::new();
        self.io.poll(Some(until), &mut done);
        if done.is_empty() {
            assert_eq!(self.world.step(), Some(self.node));
            self.io.poll(Some(until), &mut done);
        }
        self.queue.extend(done);
    }

    fn queue(&mut self) -> &mut VecDeque<Done> {
        &mut self.queue
    }
}
