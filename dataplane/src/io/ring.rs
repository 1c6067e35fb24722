//! Raw io_uring: one [`Ring`] for each data thread.
//!
//! `kernel` what the kernel must have · `pinning` registered memory · `table` registered files · `flight` operations
//! under way · `files` names, lengths, locks · `helper` those of them that must not stop the thread · `wake` waking from
//! other threads.
//!
//! One `io_uring_enter` both submits and waits; with nothing to submit and nothing reported by the kernel, a poll makes
//! no system call. The kernel runs this ring's completions only within that call (DEFER_TASKRUN), on this thread, the
//! only one that may use the ring (SINGLE_ISSUER).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use ::ring::rand::{SecureRandom as _, SystemRandom};
use io_uring::{EnterFlags, IoUring, opcode, types};
use rustix::time::{ClockId, clock_gettime};

use super::{Allocation, Done, Errno, File, FileInfo, Io, Nanos, Op, OpenHow, Pool, Sock, Token};
use flight::{Flight, Message, Outcome};
use helper::{Helper, Job};
use pinning::Pinning;
use table::Table;

mod files;
mod flight;
mod helper;
mod kernel;
mod pinning;
mod table;
mod ublk;
mod wake;

pub use kernel::{RingError, check_kernel};
pub use wake::Waker;

/// `user_data` of the read that waits for a wake-up; operations have their slab index.
const WAKE: u64 = u64::MAX;
/// `user_data` of the cancellation at the end.
const CANCEL: u64 = u64::MAX - 1;
/// Wait this long when the kernel cannot take an operation for lack of memory, nanoseconds.
const NO_MEMORY_PAUSE: Nanos = 1_000_000;
/// Most entries of the submission queue (the kernel's own bound).
const MAX_ENTRIES: u32 = 32 * 1024;
/// Most files and sockets.
const MAX_FILES: u32 = 32 * 1024;

/// How large a ring is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries of the submission queue; rounded up to a power of two, at most 32 Ki. More operations than that may be
    /// under way.
    pub entries: u32,
    /// Files and sockets that can be open together, at most 32 Ki.
    pub files: u32,
    /// Register the pool's memory with the kernel (counts against the locked-memory limit). Large pools are registered
    /// bit by bit, in polls.
    pub register_pool: bool,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self { entries: 256, files: 1024, register_pool: true }
    }
}

/// What a ring has done so far.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct RingStats {
    /// `io_uring_enter` calls.
    pub enters: u64,
    /// Operations (and continuations of short ones) given to the kernel.
    pub submitted: u64,
    /// Operations completed.
    pub completed: u64,
}

/// The ring of one thread. Made, used and dropped on that thread.
///
/// Dropping it cancels what can be cancelled and waits for the rest: no buffer is freed while the kernel may use it.
pub struct Ring {
    uring: IoUring,
    pool: Pool,
    /// How much of the pool's memory is registered.
    pinning: Pinning,
    table: Table,
    flights: Vec<Option<Flight>>,
    free: Vec<u32>,
    /// Flights whose entry did not fit into the submission queue yet.
    backlog: VecDeque<u32>,
    /// Slots of closed event counters, on which operations are to be cancelled: nothing else ends them.
    silent: Vec<u16>,
    /// Headers of vectored operations, for reuse.
    #[expect(clippy::vec_box, reason = "the kernel has their addresses")]
    messages: Vec<Box<Message>>,
    /// Entries that the kernel has, or will have at the next enter, and has not completed.
    held: usize,
    /// Those of them that wait for requests of ublk devices: see [`Ring::drain`].
    fetching: usize,
    timers: BinaryHeap<Reverse<(Nanos, u64, Token)>>,
    timer_order: u64,
    /// Completions that needed no kernel.
    ready: Vec<Done>,
    /// Completions just taken from the queue: `user_data` and result.
    taken: Vec<(u64, i32)>,
    waker: Waker,
    helper: Helper,
    /// Where the wake-up read puts the counter; boxed, since the kernel has its address.
    wake_count: Box<u64>,
    /// The wake-up read is with the kernel.
    wake_armed: bool,
    /// A wake-up came since the last poll began.
    woken: bool,
    random: SystemRandom,
    boot_id: [u8; 16],
    stats: RingStats,
    /// SINGLE_ISSUER: it stays on its thread.
    thread: PhantomData<Rc<()>>,
}

impl Ring {
    /// A ring that works on buffers of `pool`. Buffers of other pools work too, more slowly.
    ///
    /// # Errors
    /// What the kernel lacks, by name.
    pub fn new(pool: Pool, config: RingConfig) -> Result<Self, RingError> {
        let config = RingConfig {
            entries: config.entries.clamp(8, MAX_ENTRIES).next_power_of_two(),
            files: config.files.clamp(1, MAX_FILES),
            ..config
        };
        let uring = kernel::build(&config)?;
        let submitter = uring.submitter();
        submitter.register_files_sparse(config.files).map_err(|e| RingError::os("registering a table of files", e))?;
        let pinning = if config.register_pool { Pinning::begin(&uring, &pool)? } else { Pinning::none() };
        let expected = config.entries as usize * 2;
        Ok(Self {
            pool,
            pinning,
            table: Table::new(config.files as u16),
            flights: Vec::with_capacity(expected),
            free: Vec::with_capacity(expected),
            backlog: VecDeque::with_capacity(expected),
            silent: Vec::new(),
            messages: Vec::new(),
            held: 0,
            fetching: 0,
            timers: BinaryHeap::new(),
            timer_order: 0,
            ready: Vec::new(),
            taken: Vec::with_capacity(expected),
            waker: Waker::new()?,
            helper: Helper::default(),
            wake_count: Box::new(0),
            wake_armed: false,
            woken: false,
            random: SystemRandom::new(),
            boot_id: read_boot_id()?,
            stats: RingStats::default(),
            thread: PhantomData,
            uring,
        })
    }

    /// Takes over a connected stream socket, Unix or TCP.
    ///
    /// # Errors
    /// `ENFILE` if [`RingConfig::files`] are open.
    pub fn attach(&mut self, socket: OwnedFd) -> Result<Sock, Errno> {
        // On a non-blocking socket the kernel would answer EAGAIN instead of waiting for bytes.
        let flags = rustix::fs::fcntl_getfl(&socket).map_err(|e| Errno(e.raw_os_error()))?;
        rustix::fs::fcntl_setfl(&socket, flags - rustix::fs::OFlags::NONBLOCK).map_err(|e| Errno(e.raw_os_error()))?;
        // Frames and answers leave at once; not every socket is TCP.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        self.table.insert(&self.uring, socket, true, false).map(Sock)
    }

    /// Takes over an event counter (`eventfd`) that is shared with another process; see [`Sock`].
    ///
    /// # Errors
    /// `EINVAL` if it is none, `ENFILE` if [`RingConfig::files`] are open.
    pub fn attach_event(&mut self, event: OwnedFd) -> Result<Sock, Errno> {
        if !wake::is_event(&event) {
            return Err(Errno::INVAL);
        }
        self.table.insert_event(&self.uring, event).map(Sock)
    }

    /// Wakes this ring's [`Io::poll`] from other threads.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// What it has done so far.
    pub fn stats(&self) -> RingStats {
        self.stats
    }

    /// Operations under way.
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Gives entries to the submission queue as far as it has room.
    fn fill(&mut self) {
        if !self.wake_armed {
            let fd = types::Fd(self.waker.raw());
            let entry = opcode::Read::new(fd, (&raw mut *self.wake_count).cast(), 8).build().user_data(WAKE);
            // SAFETY: the counter is boxed and lives until the ring has been drained.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                self.wake_armed = true;
                self.held += 1;
            }
        }
        if self.backlog.is_empty() {
            return self.silence();
        }
        self.pinning.go_on(&self.uring, &self.pool);
        let mut queue = self.uring.submission();
        while let Some(index) = self.backlog.front().copied() {
            if queue.is_full() {
                break;
            }
            let flight = self.flights[index as usize].as_mut().expect("the backlog names flights");
            let entry = flight.entry(&self.pool, self.pinning.registered()).user_data(u64::from(index));
            // SAFETY: buffers, vectors and header belong to the flight (they are on the heap, so that moving the slab
            // moves none of them), and so do its handles of mappings that other processes share, to which no reference
            // exists; the flight stays in the slab until this entry's completion was taken; the descriptor stays in
            // the table as long as the flight is counted there.
            unsafe { queue.push(&entry) }.expect("the queue is not full");
            self.backlog.pop_front();
            self.held += 1;
            self.fetching += usize::from(flight.is_fetch());
        }
        drop(queue);
        self.silence();
    }

    /// Cancels what is under way on closed event counters, once the kernel has been given all of it.
    fn silence(&mut self) {
        if !self.backlog.is_empty() {
            return;
        }
        while let Some(slot) = self.silent.last().copied() {
            let which = types::CancelBuilder::fd(types::Fixed(u32::from(slot))).all();
            let entry = opcode::AsyncCancel2::new(which).build().user_data(CANCEL);
            // SAFETY: a cancellation uses no memory of ours.
            if unsafe { self.uring.submission().push(&entry) }.is_err() {
                break;
            }
            self.held += 1;
            self.silent.pop();
        }
    }

    /// Enters the kernel: submits that many queued entries, runs what is deferred, and waits for one completion if
    /// `wait` says how long, nanoseconds. False if nothing could be submitted for want of memory or room.
    fn enter(&mut self, submit: u32, wait: Option<Nanos>) -> bool {
        self.stats.enters += 1;
        let submitter = self.uring.submitter();
        let result = match wait {
            Some(nanos) => {
                let time = types::Timespec::new().sec(nanos / 1_000_000_000).nsec((nanos % 1_000_000_000) as u32);
                let args = types::SubmitArgs::new().timespec(&time);
                let flags = (EnterFlags::GETEVENTS | EnterFlags::EXT_ARG).bits();
                // SAFETY: `submit` entries are queued; the argument is what EXT_ARG wants and outlives the call.
                unsafe { submitter.enter(submit, 1, flags, Some(&args)) }
            }
            None => {
                // SAFETY: as above, without an argument.
                unsafe { submitter.enter::<libc::sigset_t>(submit, 0, EnterFlags::GETEVENTS.bits(), None) }
            }
        };
        match result {
            Ok(submitted) => {
                self.stats.submitted += submitted as u64;
                true
            }
            // Time is up, or a signal: whoever waits looks again.
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => true,
                Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => false,
                _ => panic!("io_uring_enter on a ring of this thread: {error}"),
            },
        }
    }

    /// Takes completions from the queue.
    fn reap(&mut self, done: &mut Vec<Done>) {
        self.taken.clear();
        self.taken.extend(self.uring.completion().map(|entry| (entry.user_data(), entry.result())));
        for at in 0..self.taken.len() {
            let (data, result) = self.taken[at];
            self.held -= 1;
            match data {
                WAKE => {
                    self.waker.hear();
                    self.wake_armed = false;
                    self.woken = true;
                }
                CANCEL => {}
                index => self.completed(index as u32, result, done),
            }
        }
    }

    fn completed(&mut self, index: u32, result: i32, done: &mut Vec<Done>) {
        let slot = &mut self.flights[index as usize];
        let flight = slot.as_mut().expect("a completion belongs to a flight");
        if flight.kind == flight::Kind::Hear
            && result >= 0
            && let Ok(fd) = self.table.fd(flight.number)
        {
            // Back to zero, without waiting in case somebody else has read it meanwhile.
            wake::clear(fd);
        }
        self.fetching -= usize::from(flight.is_fetch());
        match flight.outcome(result) {
            Outcome::Continue => self.backlog.push_back(index),
            Outcome::Over(result) => {
                let Some(flight) = slot.take() else { return };
                self.free.push(index);
                self.table.end(&self.uring, flight.number);
                self.messages.extend(flight.message);
                self.stats.completed += 1;
                done.push(Done { token: flight.token, result, part: flight.part, parts: flight.parts });
            }
        }
    }

    fn help(&mut self, token: Token, job: Job) {
        if let Err(errno) = self.helper.submit(token, job, &self.waker) {
            self.ready.push(Done { token, result: Err(errno), part: None, parts: Vec::new() });
        }
    }

    /// Takes what the helper has done.
    fn helped(&mut self, done: &mut Vec<Done>) {
        while let Some((token, result)) = self.helper.take() {
            let result = result.and_then(|made| {
                let Some(made) = made else { return Ok(0) };
                self.table.insert(&self.uring, made.fd, false, made.discard).map(u64::from).inspect_err(|_| {
                    let _ = files::remove(&made.path);
                })
            });
            done.push(Done { token, result, part: None, parts: Vec::new() });
        }
    }

    /// Completes the timers whose time has come.
    fn expire(&mut self, now: Nanos, done: &mut Vec<Done>) {
        while let Some(Reverse((at, _, token))) = self.timers.peek().copied() {
            if at > now {
                break;
            }
            self.timers.pop();
            done.push(Done { token, result: Ok(0), part: None, parts: Vec::new() });
        }
    }

    /// Ends everything that is under way, and waits for it. But not for fetches of ublk devices: only their device's end
    /// or that of the ring ends them, and the kernel has no memory of ours for them.
    fn drain(&mut self) {
        // What the kernel has not seen ends here.
        for index in std::mem::take(&mut self.backlog) {
            self.flights[index as usize] = None;
        }
        self.table.shut_sockets();
        self.waker.wake();
        let mut cancelled = false;
        let mut done = Vec::new();
        while self.held > self.fetching {
            if !cancelled {
                let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any().all()).build().user_data(CANCEL);
                // SAFETY: a cancellation uses no memory of ours.
                if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                    self.held += 1;
                    cancelled = true;
                }
            }
            let queued = self.uring.submission().len() as u32;
            self.enter(queued, Some(NO_MEMORY_PAUSE));
            self.reap(&mut done);
            done.clear();
            self.backlog.clear();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

impl Io for Ring {
    fn submit(&mut self, token: Token, op: Op) {
        if let Op::Timer { at } = op {
            self.timer_order += 1;
            self.timers.push(Reverse((at, self.timer_order, token)));
            return;
        }
        let op = match op {
            Op::Create { path, len } => return self.help(token, Job::Create { path, len }),
            Op::SyncDir { dir } => return self.help(token, Job::SyncDir { dir }),
            op => op,
        };
        let mut flight = Flight::new(token, op);
        if !self.table.begin(flight.number, flight.is_net()) {
            let Flight { part, parts, .. } = flight;
            self.ready.push(Done { token, result: Err(Errno::BADF), part, parts });
            return;
        }
        if self.table.get(flight.number).is_some_and(|entry| entry.event) {
            flight.on_event();
        }
        if let Some(result) = self.prepare_ublk(&mut flight) {
            self.table.end(&self.uring, flight.number);
            self.ready.push(Done { token, result, part: flight.part, parts: flight.parts });
            return;
        }
        if flight.needs_message() {
            flight.message = Some(self.messages.pop().unwrap_or_else(Message::new));
        }
        let index = match self.free.pop() {
            Some(index) => {
                self.flights[index as usize] = Some(flight);
                index
            }
            None => {
                self.flights.push(Some(flight));
                self.flights.len() as u32 - 1
            }
        };
        self.backlog.push_back(index);
    }

    fn poll(&mut self, until: Option<Nanos>, done: &mut Vec<Done>) {
        let before = done.len();
        self.woken = false;
        done.append(&mut self.ready);
        self.reap(done);
        self.helped(done);
        loop {
            self.fill();
            // The clock is read only where time matters.
            let mut wait = None;
            if until.is_some() || !self.timers.is_empty() {
                let now = self.now();
                self.expire(now, done);
                if let Some(until) = until
                    && done.len() == before
                    && !self.woken
                    && until > now
                    && self.backlog.is_empty()
                {
                    let next = self.timers.peek().map_or(until, |Reverse((at, ..))| until.min(*at));
                    wait = Some(next - now);
                }
            }
            let (queued, reported) = {
                let queue = self.uring.submission();
                (queue.len() as u32, queue.taskrun() || queue.cq_overflow())
            };
            if queued == 0 && !reported && wait.is_none() {
                return;
            }
            let accepted = self.enter(queued, wait);
            self.reap(done);
            self.helped(done);
            if !accepted && done.len() == before {
                // The kernel is short of memory, or of room for completions. What is queued stays queued.
                self.enter(0, Some(NO_MEMORY_PAUSE));
                self.reap(done);
            }
            if !self.timers.is_empty() {
                let now = self.now();
                self.expire(now, done);
            }
            let satisfied = wait.is_none() || done.len() > before || self.woken;
            if satisfied && (self.backlog.is_empty() || !accepted) {
                return;
            }
        }
    }

    fn now(&self) -> Nanos {
        let time = clock_gettime(ClockId::Monotonic);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }

    fn since_boot(&self) -> Nanos {
        let time = clock_gettime(ClockId::Boottime);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }

    fn wall(&self) -> u64 {
        let time = clock_gettime(ClockId::Realtime);
        time.tv_sec.max(0) as u64 * 1_000_000_000 + time.tv_nsec as u64
    }

    fn wall_synced(&self) -> bool {
        clock_synced()
    }

    fn boot_id(&self) -> [u8; 16] {
        self.boot_id
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn random(&mut self, out: &mut [u8]) {
        self.random.fill(out).expect("the kernel's random generator is there once the system runs");
    }

    fn open(&mut self, path: &str, how: OpenHow) -> Result<File, Errno> {
        if self.table.is_full() {
            return Err(Errno::NFILE);
        }
        use std::os::fd::AsFd as _;
        let fd = files::open(path, how)?;
        let discard = files::can_discard(fd.as_fd());
        self.table.insert(&self.uring, fd, false, discard).map(File)
    }

    fn close(&mut self, file: File) {
        self.table.close(&self.uring, file.0);
    }

    fn close_sock(&mut self, sock: Sock) {
        if self.table.busy_event(sock.0) {
            self.silent.push(sock.0 as u16);
        }
        self.table.close(&self.uring, sock.0);
    }

    fn info(&mut self, file: File) -> Result<FileInfo, Errno> {
        let discard = self.table.get(file.0).is_some_and(|entry| entry.discard);
        files::info(self.table.fd(file.0)?, discard)
    }

    fn allocation(&mut self, file: File, offset: u64) -> Result<Allocation, Errno> {
        files::allocation(self.table.fd(file.0)?, offset)
    }

    fn set_len(&mut self, file: File, len: u64, allocate: bool) -> Result<(), Errno> {
        files::set_len(self.table.fd(file.0)?, len, allocate)
    }

    fn list(&mut self, dir: &str) -> Result<Vec<String>, Errno> {
        files::list(dir)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Errno> {
        files::rename(from, to)
    }

    fn remove(&mut self, path: &str) -> Result<(), Errno> {
        files::remove(path)
    }

    fn sync_dir(&mut self, dir: &str) -> Result<(), Errno> {
        files::sync_dir(dir)
    }

    fn free_space(&mut self, dir: &str) -> Result<u64, Errno> {
        files::free_space(dir)
    }

    fn read_small(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        files::read_small(path)
    }

    fn ublk_request(&mut self, device: File, tag: u16) -> Result<[u8; ublk::DESCRIPTOR], Errno> {
        self.descriptor(device, tag)
    }

    fn replace_small(&mut self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        files::replace_small(path, bytes)
    }
}

fn read_boot_id() -> Result<[u8; 16], RingError> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).map_err(|e| RingError::os("reading the boot id", e))?;
    let id = uuid::Uuid::try_parse(text.trim());
    Ok(id.map_err(|_| RingError::Os { what: "reading the boot id", errno: Errno::INVAL })?.into_bytes())
}
/// Whether the kernel says that something keeps its wall clock.
pub fn clock_synced() -> bool {
    // SAFETY: all zeros is a valid `timex`, which asks for nothing but the state.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is a whole `timex`.
    let answer = unsafe { libc::adjtimex(&mut state) };
    answer >= 0 && answer != libc::TIME_ERROR && state.status & libc::STA_UNSYNC == 0
}
