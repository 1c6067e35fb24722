//! A measurement that is interrupted leaves no process behind: those that it has started end first. Whatever it does just
//! then fails over that, and what it has made is removed on the way out as after any other error.

use std::collections::BTreeSet;
use std::io;
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

struct State {
    interrupted: bool,
    /// Processes that were started and have not been waited for: nobody else can have their ids.
    running: BTreeSet<u32>,
}

static STATE: Mutex<State> = Mutex::new(State { interrupted: false, running: BTreeSet::new() });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT and SIGTERM end the processes of the measurement.
///
/// # Errors
/// The signals cannot be caught.
pub fn watch() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                let mut state = state();
                state.interrupted = true;
                for pid in state.running.iter().filter_map(|pid| Pid::from_raw(*pid as i32)) {
                    let _ = kill_process(pid, Signal::TERM); // one that has ended already is still ours to wait for
                }
            }
        });
    });
    Ok(())
}

/// A signal has come.
pub fn interrupted() -> bool {
    state().interrupted
}

/// Starts a process, which ends with the measurement.
///
/// # Errors
/// As `start` says; or a signal has come.
pub fn started(start: impl FnOnce() -> io::Result<Child>) -> io::Result<Child> {
    let mut state = state();
    if state.interrupted {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted"));
    }
    let child = start()?;
    state.running.insert(child.id());
    Ok(child)
}

/// A process that was [`started`] has ended: waits for it, after which its id may be another's.
///
/// # Errors
/// It cannot be waited for.
pub fn ended(child: &mut Child) -> io::Result<()> {
    state().running.remove(&child.id());
    child.wait().map(drop)
}
