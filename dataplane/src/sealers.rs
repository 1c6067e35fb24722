//! Sealing, on the data thread or spread over threads. A [`Job`] goes out with its records and a buffer, and comes back
//! with the sealed frame, in any order: it says which frame it is, and the shipper puts it in its place.
//!
//! Threads are fed by single-producer queues of fixed length; a worker that finds none sleeps until it is woken. The
//! only threads that a data path starts are these.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use afterimage_wire::record::Record;
use rtrb::{Consumer, Producer, RingBuffer};

use crate::io::{Buf, Part};
use crate::seal::{DataKey, FrameMeta, Item, Plan, Scratch, seal_frame};

/// Most jobs that one thread has before it.
pub const JOBS_PER_THREAD: usize = 16;
/// Most jobs sealed on the data thread that wait to be fetched.
pub const JOBS_INLINE: usize = 8;
/// With the pool idle, a frame of at most this much payload is sealed at once: waking a thread costs more.
pub const INLINE_BYTES: usize = 8 * 1024;
/// Most sealing threads.
pub const MAX_SEALERS: usize = 64;

/// What a record carries.
#[derive(Debug)]
pub enum Payload {
    /// Nothing.
    None,
    /// The data of a write: the host's stable copy.
    Part(Part),
    /// The body of a mark (cut, join, …).
    Mark(Vec<u8>),
}

impl Payload {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Part(part) => &part.buf[part.at..part.at + part.len],
            Self::Mark(bytes) => bytes,
        }
    }
}

/// A numbered record with what it carries.
#[derive(Debug)]
pub struct Entry {
    /// The record.
    pub record: Record,
    /// Its payload.
    pub payload: Payload,
    /// Bytes of the queue's room that it holds.
    pub cost: usize,
}

/// A frame to be sealed.
#[derive(Debug)]
pub struct Job {
    /// Whose it is: chosen by the owner.
    pub owner: u64,
    /// Header.
    pub meta: FrameMeta,
    /// Key of the incarnation.
    pub key: Arc<DataKey>,
    /// Try to compress.
    pub compress: bool,
    /// The records; emptied (its memory kept) when sealed, which frees their buffers.
    pub entries: Vec<Entry>,
    /// How they are cut into chunks.
    pub plan: Plan,
    /// Where the frame goes, at least [`Plan::frame_bound`] bytes.
    pub out: Option<Buf>,
    /// Bytes of the frame, once sealed.
    pub len: usize,
}

/// Memory of whoever seals.
#[derive(Debug, Default)]
struct Worker {
    scratch: Scratch,
    /// Kept for its memory only; empty between jobs.
    items: Vec<Item<'static>>,
}

impl Worker {
    fn seal(&mut self, job: &mut Job) {
        // The lifetime of the items is that of one job: an empty vector is turned from one lifetime to another, in its
        // place.
        let mut items: Vec<Item<'_>> = relabel(std::mem::take(&mut self.items));
        items.extend(job.entries.iter().map(|e| Item { record: e.record, payload: e.payload.bytes() }));
        let out = job.out.as_mut().expect("a job is submitted with its buffer");
        job.len = seal_frame(&job.key, &job.meta, &job.plan, &items, job.compress, &mut self.scratch, out);
        items.clear();
        self.items = relabel(items);
        job.entries.clear();
    }
}

/// An empty vector of another lifetime, with the same memory: collecting in place is what the standard library does for
/// items of one layout.
fn relabel<'b>(mut items: Vec<Item<'_>>) -> Vec<Item<'b>> {
    items.clear();
    items.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}

/// Who seals, as the owner of a source chooses.
#[derive(Debug, Default)]
pub enum Sealer {
    /// The data thread: deterministic, for the simulator and for tests.
    #[default]
    Inline,
    /// Threads.
    Threads(Threads),
}

impl Sealer {
    /// `threads` threads seal (0: the data thread does); `wake` is called from them when a result is ready.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub fn threads(threads: usize, wake: impl Fn() + Send + Sync + 'static) -> Self {
        let wake = Arc::new(wake);
        let start = |number| {
            let (jobs, inbox) = RingBuffer::new(JOBS_PER_THREAD);
            let (outbox, results) = RingBuffer::new(JOBS_PER_THREAD);
            let wake = wake.clone();
            let handle = std::thread::Builder::new()
                .name(format!("seal-{number}"))
                .spawn(move || work(inbox, outbox, &*wake))
                .expect("a thread can be started");
            Thread { jobs: Some(jobs), results, handle: Some(handle), under_way: 0 }
        };
        match threads.min(MAX_SEALERS) {
            0 => Self::Inline,
            threads => Self::Threads(Threads((0..threads).map(start).collect())),
        }
    }
}

#[derive(Debug)]
struct Thread {
    jobs: Option<Producer<Box<Job>>>,
    results: Consumer<Box<Job>>,
    handle: Option<JoinHandle<()>>,
    under_way: usize,
}

impl Drop for Thread {
    fn drop(&mut self) {
        // Its queue is abandoned: the thread ends when it has emptied it.
        self.jobs = None;
        if let Some(handle) = self.handle.take() {
            handle.thread().unpark();
            let _ = handle.join();
        }
    }
}

/// Sealing threads; they end when this is dropped.
#[derive(Debug)]
pub struct Threads(Vec<Thread>);

/// The work of sealing. Jobs are boxed once and go round: the box comes back with the result and is used again.
#[derive(Debug)]
pub struct Sealing {
    inline: Worker,
    done: VecDeque<Box<Job>>,
    threads: Vec<Thread>,
}

impl From<Sealer> for Sealing {
    fn from(sealer: Sealer) -> Self {
        let threads = match sealer {
            Sealer::Inline => Vec::new(),
            Sealer::Threads(Threads(threads)) => threads,
        };
        Self { inline: Worker::default(), done: VecDeque::with_capacity(JOBS_INLINE), threads }
    }
}

impl Sealing {
    /// True if [`Self::submit`] may be called.
    pub fn has_room(&self) -> bool {
        self.done.len() < JOBS_INLINE
            && (self.threads.is_empty() || self.threads.iter().any(|t| t.under_way < JOBS_PER_THREAD))
    }

    /// Takes a job. Ask [`Self::has_room`] first.
    ///
    /// # Panics
    /// Without room: a bug of the caller.
    pub fn submit(&mut self, mut job: Box<Job>) {
        let payload: usize = job.entries.iter().map(|e| e.record.payload_len as usize).sum();
        let idle = self.threads.iter().all(|t| t.under_way == 0);
        if self.threads.is_empty() || (idle && payload <= INLINE_BYTES) {
            self.inline.seal(&mut job);
            self.done.push_back(job);
            return;
        }
        let thread = self.threads.iter_mut().min_by_key(|t| t.under_way).expect("there are threads");
        thread.under_way += 1;
        let jobs = thread.jobs.as_mut().expect("taken only when dropped");
        assert!(jobs.push(job).is_ok(), "submitted without room");
        if let Some(handle) = &thread.handle {
            handle.thread().unpark();
        }
    }

    /// A job that is done.
    pub fn next_done(&mut self) -> Option<Box<Job>> {
        if let Some(job) = self.done.pop_front() {
            return Some(job);
        }
        for thread in &mut self.threads {
            if thread.under_way > 0
                && let Ok(job) = thread.results.pop()
            {
                thread.under_way -= 1;
                return Some(job);
            }
        }
        None
    }

    /// A job is with a thread.
    pub fn is_busy(&self) -> bool {
        !self.done.is_empty() || self.threads.iter().any(|t| t.under_way > 0)
    }
}

fn work(mut inbox: Consumer<Box<Job>>, mut outbox: Producer<Box<Job>>, wake: &(dyn Fn() + Send + Sync)) {
    let mut worker = Worker::default();
    loop {
        match inbox.pop() {
            Ok(mut job) => {
                worker.seal(&mut job);
                if outbox.push(job).is_err() {
                    // Cannot be: no more jobs are under way than either queue holds. The owner is gone.
                    return;
                }
                wake();
            }
            // `unpark` leaves a token, so a job that comes between the look and the sleep ends the sleep at once.
            Err(_) if inbox.is_abandoned() => return,
            Err(_) => std::thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use afterimage_wire::frame::check_frame;
    use afterimage_wire::ids::{IncarnationId, StreamId};
    use afterimage_wire::record::RecordKind;

    use super::*;
    use crate::io::{Class, Pool};

    fn job(pool: &Pool, number: u64, payload: usize) -> Box<Job> {
        let mut plan = Plan::default();
        assert!(plan.add(payload));
        let mut buf = pool.take(payload).expect("the pool has room");
        buf[..payload].fill(number as u8);
        let record = Record {
            seq: number,
            kind: RecordKind::Write,
            disk: 0,
            offset: 0,
            len: payload as u32,
            mono_ns: 0,
            wall_ns: 0,
            payload_at: 0,
            payload_len: payload as u32,
            crc: 0,
        };
        Box::new(Job {
            owner: 7,
            meta: FrameMeta {
                stream: StreamId([1; 16]),
                incarnation: IncarnationId([2; 16]),
                number,
                acked: 0,
                mono_ns: 0,
                sync_ms: 0,
            },
            key: Arc::new(DataKey::new([3; 32])),
            compress: true,
            entries: vec![Entry { record, payload: Payload::Part(Part { buf, at: 0, len: payload }), cost: payload }],
            out: pool.take(plan.frame_bound()),
            plan,
            len: 0,
        })
    }

    fn pool() -> Pool {
        Pool::new(&[Class { capacity: 128 << 10, count: 64 }])
    }

    #[test]
    fn seals_on_the_data_thread() {
        let pool = pool();
        let mut sealer = Sealing::from(Sealer::Inline);
        sealer.submit(job(&pool, 1, 4096));
        let done = sealer.next_done().expect("sealed at once");
        assert!(done.entries.is_empty());
        assert!(check_frame(&done.out.as_ref().expect("kept")[..done.len]).is_ok());
        assert!(sealer.next_done().is_none());
    }

    #[test]
    fn threads_return_every_job_and_wake() {
        let pool = pool();
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = woken.clone();
        let mut sealer = Sealing::from(Sealer::threads(2, move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        let mut seen = Vec::new();
        for number in 1..=20 {
            assert!(sealer.has_room());
            sealer.submit(job(&pool, number, 65536));
        }
        while seen.len() < 20 {
            match sealer.next_done() {
                Some(job) => {
                    let (header, _) = check_frame(&job.out.as_ref().expect("kept")[..job.len]).expect("a valid frame");
                    assert_eq!(header.number.get(), job.meta.number);
                    seen.push(job.meta.number);
                }
                None => std::thread::yield_now(),
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (1..=20).collect::<Vec<_>>());
        assert!(woken.load(Ordering::SeqCst) >= 19);
    }

    #[test]
    fn a_small_frame_does_not_wake_an_idle_pool() {
        let pool = pool();
        let mut sealer = Sealing::from(Sealer::threads(1, || panic!("woken")));
        sealer.submit(job(&pool, 1, 4096));
        assert!(sealer.next_done().is_some());
    }
}
