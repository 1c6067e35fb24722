//! The loop, with a core that has no disks: jobs, events, waking, stopping.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use afterimage_dataplane::host::{Answer, DiskKey, Export, Geometry, HostDisk, Request};
use afterimage_dataplane::io::{Allocation, Errno};

use super::*;

/// A core that counts its turns.
struct Idle {
    turns: Arc<AtomicUsize>,
    say: VecDeque<u32>,
    stopped: bool,
    /// Never idle: something hangs.
    hangs: bool,
}

struct NoDisk(VecDeque<Answer>);

impl HostDisk<ThreadIo> for NoDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: 0, block: 512, physical_block: 512, read_only: true, discard: false, serial: String::new() }
    }
    fn request(&mut self, _: &mut ThreadIo, _: u64, _: Request) {}
    fn answers(&mut self) -> &mut VecDeque<Answer> {
        &mut self.0
    }
    fn allocation(&mut self, _: &mut ThreadIo, _: u64) -> Result<Allocation, Errno> {
        Err(Errno::IO)
    }
}

impl Disks<ThreadIo> for Idle {
    fn exports(&self) -> Vec<Export> {
        Vec::new()
    }
    fn disk(&mut self, _: DiskKey) -> Option<impl HostDisk<ThreadIo> + '_> {
        None::<NoDisk>
    }
}

impl Core for Idle {
    type Event = u32;
    fn done(&mut self, _: &mut ThreadIo, _: Done) {}
    fn turn(&mut self, _: &mut ThreadIo) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }
    fn deadline(&self) -> Option<Nanos> {
        None
    }
    fn next_event(&mut self) -> Option<u32> {
        self.say.pop_front()
    }
    fn stop(&mut self, _: &mut ThreadIo) {
        self.stopped = true;
    }
    fn is_idle(&self) -> bool {
        self.stopped && !self.hangs
    }
}

fn begin(hangs: bool) -> (DataThread<Idle>, Arc<AtomicUsize>) {
    let turns = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&turns);
    let classes = [Class { capacity: 264 * 1024, count: 8 }, Class { capacity: 2112 * 1024, count: 2 }];
    let thread = start("test", &classes, move |_, _| Idle { turns, say: VecDeque::new(), stopped: false, hangs });
    (thread.unwrap(), seen)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), future).await.expect("it hangs") })
}

#[test]
fn a_job_runs_on_the_thread_and_its_answer_comes_back() {
    let (thread, _) = begin(false);
    block_on(async {
        let name = thread.handle.call(|_| std::thread::current().name().map(str::to_owned)).await.unwrap();
        assert_eq!(name.as_deref(), Some("data-test"));
        thread.handle.stop(1_000_000_000).await;
    });
    thread.thread.join().unwrap();
}

#[test]
fn what_the_core_says_comes_in_order_even_if_the_outbox_was_full() {
    let (mut thread, _) = begin(false);
    block_on(async {
        let many = OUTBOX as u32 + 100;
        thread.handle.call(move |desk| desk.core.say.extend(0..many)).await.unwrap();
        for expected in 0..many {
            assert_eq!(thread.events.recv().await, Some(expected));
        }
        thread.handle.stop(1_000_000_000).await;
        assert_eq!(thread.events.recv().await, None);
    });
    thread.thread.join().unwrap();
}

#[test]
fn a_thread_with_nothing_to_do_sleeps() {
    let (thread, turns) = begin(false);
    block_on(thread.handle.call(|_| ())).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let before = turns.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    assert!(turns.load(Ordering::Relaxed) - before <= 1);
    drop(thread.handle);
}

#[test]
fn a_thread_whose_owner_is_gone_ends() {
    let (thread, _) = begin(false);
    let DataThread { handle, events, thread } = thread;
    drop((handle, events));
    thread.join().unwrap();
}

#[test]
fn a_stop_ends_in_time_although_the_core_hangs() {
    let (thread, _) = begin(true);
    let started = Instant::now();
    block_on(thread.handle.stop(200_000_000));
    thread.thread.join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_job_for_a_thread_that_has_ended_is_refused() {
    let (thread, _) = begin(false);
    block_on(thread.handle.stop(1_000_000_000));
    thread.thread.join().unwrap();
    assert_eq!(block_on(thread.handle.call(|_| ())), Err(Gone));
}
