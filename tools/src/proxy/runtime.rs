//! A data thread: one ring, one core (source or target), its front ends, and the loop that drives them.
//!
//! The service thread sends *jobs*: closures that run on the data thread between two turns, with everything that the
//! thread owns on the [`Desk`] before them. Jobs are rare (a client connects, a stream is linked, a status is asked);
//! the path of a write never crosses a thread here. What the core has to say comes back as events. Both queues are
//! bounded, and nothing polls while there is nothing to do: the ring's waker ends a wait.

use std::sync::mpsc as std_mpsc;
use std::thread::JoinHandle;

use afterimage_dataplane::host::Disks;
use afterimage_dataplane::io::ring::{Ring, RingConfig, RingError, Waker};
use afterimage_dataplane::io::tapped::Tapped;
use afterimage_dataplane::io::{Class, Done, Io, Nanos, Pool};
use tokio::sync::{mpsc, oneshot};

use super::fronts::Fronts;

/// Jobs that may wait for a data thread. A sender beyond that waits.
const INBOX: usize = 256;
/// Events that may wait for the service thread. The core keeps what is beyond.
const OUTBOX: usize = 1024;
/// Jobs done in one turn, so that many of them do not hold up I/O.
const JOBS_PER_TURN: usize = 16;
/// Files and sockets of one thread, where the limit on open files allows it: two of each disk and one of each client.
const FILES: u64 = 8192;
/// Completions for which there is room without allocating.
const COMPLETIONS: usize = 1024;
/// Longest sleep without a deadline. Every job, stop and end of a handle wakes the ring up, and all else completes on it: a thread
/// with nothing to do does nothing at all.
const IDLE: Nanos = 24 * 3_600 * 1_000_000_000;
/// Sleep while the outbox is full: the service thread makes no wake-up when it has taken events out.
const OUTBOX_FULL: Nanos = 10_000_000;
/// How long hosts' requests may take to end at a stop, before it goes on without them.
const CLIENTS_END: Nanos = 3_000_000_000;

/// What a data thread does its I/O with.
pub type ThreadIo = Tapped<Ring>;

/// What the loop asks of a core: [`afterimage_dataplane::source::Source`] or
/// [`afterimage_dataplane::reverse::ReversibleTarget`].
pub trait Core: Disks<ThreadIo> + 'static {
    /// What it has to say.
    type Event: Send + 'static;

    /// Takes a completion of its own.
    fn done(&mut self, io: &mut ThreadIo, done: Done);
    /// Moves its queues.
    fn turn(&mut self, io: &mut ThreadIo);
    /// When it wants its next turn, if nothing happens before.
    fn deadline(&self) -> Option<Nanos>;
    /// The next thing it has to say.
    fn next_event(&mut self) -> Option<Self::Event>;
    /// Ends cleanly: what is under way is finished.
    fn stop(&mut self, io: &mut ThreadIo);
    /// Nothing is under way.
    fn is_idle(&self) -> bool;
}

/// What a data thread owns, before a job.
pub struct Desk<'a, C> {
    /// The ring.
    pub io: &'a mut ThreadIo,
    /// The core.
    pub core: &'a mut C,
    /// The front ends.
    pub fronts: &'a mut Fronts,
}

type Job<C> = Box<dyn FnOnce(&mut Desk<'_, C>) + Send>;

enum Order<C> {
    Job(Job<C>),
    /// Stop cleanly within so many nanoseconds.
    Stop(Nanos),
}

/// The data thread has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the data thread has ended")]
pub struct Gone;

/// Gives jobs to a data thread. When the last one is dropped, the thread stops cleanly.
pub struct Handle<C> {
    inbox: mpsc::Sender<Order<C>>,
    // After `inbox`: it is dropped after it, so that the thread wakes up to a closed inbox.
    waker: DropWaker,
}

/// Wakes once more when it goes.
#[derive(Clone)]
struct DropWaker(Waker);

impl Drop for DropWaker {
    fn drop(&mut self) {
        self.0.wake();
    }
}

impl<C> Clone for Handle<C> {
    fn clone(&self) -> Self {
        Self { inbox: self.inbox.clone(), waker: self.waker.clone() }
    }
}

impl<C: 'static> Handle<C> {
    /// Runs `job` on the data thread, between two turns; it must not block.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn call<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Desk<'_, C>) -> R + Send + 'static,
    ) -> Result<R, Gone> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |desk: &mut Desk<'_, C>| {
            // Whoever asked may have gone; the job is done all the same.
            let _ = reply.send(job(desk));
        });
        self.inbox.send(Order::Job(job)).await.map_err(|_| Gone)?;
        self.waker.0.wake();
        answer.await.map_err(|_| Gone)
    }

    /// As [`Handle::call`], for a thread of its own; never within a task.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn call_blocking<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Desk<'_, C>) -> R + Send + 'static,
    ) -> Result<R, Gone> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |desk: &mut Desk<'_, C>| {
            let _ = reply.send(job(desk));
        });
        self.inbox.blocking_send(Order::Job(job)).map_err(|_| Gone)?;
        self.waker.0.wake();
        answer.blocking_recv().map_err(|_| Gone)
    }

    /// Ends the thread: clients are answered, then the core stops cleanly; at the latest after `within`.
    pub async fn stop(&self, within: Nanos) {
        if self.inbox.send(Order::Stop(within)).await.is_ok() {
            self.waker.0.wake();
        }
    }
}

/// Why there is no data thread.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The ring cannot be made; says what is lacking.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// A running data thread.
pub struct DataThread<C: Core> {
    /// Gives it jobs.
    pub handle: Handle<C>,
    /// What its core says; ends with the thread.
    pub events: mpsc::Receiver<C::Event>,
    /// Joins it.
    pub thread: JoinHandle<()>,
}

/// Starts a data thread with these buffers; `build` makes its core there.
///
/// # Errors
/// [`StartError`]; nothing is left running.
pub fn start<C: Core>(
    name: &str,
    classes: &[Class],
    build: impl FnOnce(&mut ThreadIo, Waker) -> C + Send + 'static,
) -> Result<DataThread<C>, StartError> {
    let (inbox, orders) = mpsc::channel(INBOX);
    let (outbox, events) = mpsc::channel(OUTBOX);
    let (started, start) = std_mpsc::sync_channel(1);
    let (label, classes) = (name.to_owned(), classes.to_vec());
    let thread = std::thread::Builder::new().name(format!("data-{name}")).spawn(move || {
        let mut io = match make_ring(&label, &classes) {
            Ok(io) => Tapped::new(io),
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let waker = io.waker();
        let core = build(&mut io, waker.clone());
        let fronts = Fronts::new();
        if started.send(Ok(waker)).is_ok() {
            DataLoop { io, core, fronts, orders, outbox, stop: Stop::No, done: Vec::with_capacity(COMPLETIONS) }.run();
        }
    })?;
    // The thread always answers: with a waker, with an error, or by dropping its end in a panic.
    let waker = match start.recv() {
        Ok(answer) => answer?,
        Err(_) => return Err(StartError::Thread(std::io::Error::other("the data thread ended while it started"))),
    };
    Ok(DataThread { handle: Handle { inbox, waker: DropWaker(waker) }, events, thread })
}

/// A ring with a pool of these buffers. Where the kernel may not pin that much, the pool is used unregistered: slower,
/// and the log says what to set.
fn make_ring(name: &str, classes: &[Class]) -> Result<Ring, RingError> {
    let pool = Pool::new(classes);
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(FILES);
    let config = RingConfig { files: FILES.min(allowed) as u32, ..RingConfig::default() };
    match Ring::new(pool.clone(), config) {
        Err(error @ RingError::LockedMemory { .. }) => {
            tracing::warn!(thread = name, %error, "buffers are not registered with the kernel: I/O costs more");
            Ring::new(pool, RingConfig { register_pool: false, ..config })
        }
        other => other,
    }
}

/// How far a stop has come.
enum Stop {
    No,
    /// Clients are being answered.
    Clients {
        /// Go on without them then.
        until: Nanos,
        /// End then.
        end: Nanos,
    },
    /// The core finishes.
    Core {
        /// End then.
        end: Nanos,
    },
}

struct DataLoop<C: Core> {
    io: ThreadIo,
    core: C,
    fronts: Fronts,
    orders: mpsc::Receiver<Order<C>>,
    outbox: mpsc::Sender<C::Event>,
    stop: Stop,
    done: Vec<Done>,
}

impl<C: Core> DataLoop<C> {
    fn run(mut self) {
        loop {
            let mut more = self.take_orders();
            self.core.turn(&mut self.io);
            more |= self.fronts.collect(&mut self.io, &mut self.core);
            let full = self.give_events();
            if self.go_on_stopping() {
                return;
            }
            let until = if more { None } else { Some(self.until(full)) };
            self.io.poll(until, &mut self.done);
            for done in self.done.drain(..) {
                if let Some(done) = self.fronts.done(&mut self.io, &mut self.core, done) {
                    self.core.done(&mut self.io, done);
                }
            }
        }
    }

    /// Does what the service thread asks; true if there may be more of it.
    fn take_orders(&mut self) -> bool {
        for _ in 0..JOBS_PER_TURN {
            match self.orders.try_recv() {
                Ok(Order::Job(job)) => {
                    job(&mut Desk { io: &mut self.io, core: &mut self.core, fronts: &mut self.fronts });
                }
                Ok(Order::Stop(within)) => self.begin_stop(within),
                Err(mpsc::error::TryRecvError::Empty) => return false,
                // The service thread has ended without a word: so does this one, cleanly.
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    self.begin_stop(CLIENTS_END);
                    return false;
                }
            }
        }
        true
    }

    /// Hands events over; true if the outbox has no room.
    fn give_events(&mut self) -> bool {
        loop {
            match self.outbox.try_reserve() {
                Ok(room) => match self.core.next_event() {
                    Some(event) => room.send(event),
                    None => return false,
                },
                Err(mpsc::error::TrySendError::Full(())) => return true,
                // Nobody listens any more; the core must not fill up with what it has to say.
                Err(mpsc::error::TrySendError::Closed(())) => {
                    while self.core.next_event().is_some() {}
                    return false;
                }
            }
        }
    }

    fn begin_stop(&mut self, within: Nanos) {
        if matches!(self.stop, Stop::No) {
            self.fronts.shutdown(&mut self.io);
            let now = self.io.now();
            self.stop = Stop::Clients { until: now + CLIENTS_END.min(within / 2), end: now + within };
        }
    }

    /// True at the end.
    fn go_on_stopping(&mut self) -> bool {
        let now = self.io.now();
        if let Stop::Clients { until, end } = self.stop
            && (self.fronts.is_idle() || now >= until)
        {
            self.core.stop(&mut self.io);
            self.core.turn(&mut self.io);
            self.stop = Stop::Core { end };
        }
        match self.stop {
            Stop::Core { end } if self.core.is_idle() => {
                tracing::debug!(spare_ms = (end.saturating_sub(now)) / 1_000_000, "stopped cleanly");
                true
            }
            Stop::Core { end } if now >= end => {
                tracing::warn!("stopped before all was finished: the next start compares what may differ");
                true
            }
            _ => false,
        }
    }

    /// How long the ring may sleep.
    fn until(&self, outbox_full: bool) -> Nanos {
        let now = self.io.now();
        let mut until = self.core.deadline().unwrap_or(now + IDLE).min(now + IDLE);
        if outbox_full {
            until = until.min(now + OUTBOX_FULL);
        }
        match self.stop {
            Stop::No => until,
            Stop::Clients { until: limit, .. } | Stop::Core { end: limit } => until.min(limit),
        }
    }
}

#[cfg(test)]
#[path = "runtime_tests.rs"]
mod tests;
