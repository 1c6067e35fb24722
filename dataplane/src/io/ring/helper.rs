//! A thread beside the ring's for what only blocking calls do: making files, and making folders durable. It does one thing
//! after the other, in the order of their submission, and wakes the ring's thread after each. It is there from the first
//! such operation on.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::files;
use super::wake::Waker;
use crate::io::{Errno, OpenHow, Token};

pub(super) enum Job {
    Create { path: String, len: u64 },
    SyncDir { dir: String },
}

/// A file that was made: its descriptor, and whether its file system can give ranges back.
pub(super) struct Made {
    pub(super) fd: OwnedFd,
    pub(super) discard: bool,
    pub(super) path: String,
}

type Answer = (Token, Result<Option<Made>, Errno>);

struct Thread {
    jobs: Sender<(Token, Job)>,
    answers: Receiver<Answer>,
    handle: JoinHandle<()>,
}

/// The ring's end of it.
#[derive(Default)]
pub(super) struct Helper {
    thread: Option<Thread>,
    /// As many as the callers have under way, who bound them.
    under_way: usize,
}

impl Helper {
    /// Gives the thread something to do.
    ///
    /// # Errors
    /// There can be no such thread.
    pub(super) fn submit(&mut self, token: Token, job: Job, waker: &Waker) -> Result<(), Errno> {
        if self.thread.is_none() {
            self.thread = Some(begin(waker.clone()).map_err(|error| super::kernel::errno(&error))?);
        }
        let Some(thread) = &self.thread else { return Err(Errno::AGAIN) };
        thread.jobs.send((token, job)).map_err(|_| Errno::IO)?;
        self.under_way += 1;
        Ok(())
    }

    /// Something that is done.
    pub(super) fn take(&mut self) -> Option<Answer> {
        if self.under_way == 0 {
            return None;
        }
        let answer = self.thread.as_ref()?.answers.try_recv().ok()?;
        self.under_way -= 1;
        Some(answer)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let Some(Thread { jobs, answers, handle }) = self.thread.take() else { return };
        drop(jobs);
        // It ends what it has begun, and what waits behind that: a file, once asked for, is whole.
        let _ = handle.join();
        drop(answers);
    }
}

fn begin(waker: Waker) -> std::io::Result<Thread> {
    let (jobs, waiting) = channel::<(Token, Job)>();
    let (done, answers) = channel();
    let handle = std::thread::Builder::new().name("files".to_owned()).spawn(move || {
        for (token, job) in waiting {
            let result = match job {
                Job::Create { path, len } => create(path, len).map(Some),
                Job::SyncDir { dir } => files::sync_dir(&dir).map(|()| None),
            };
            if done.send((token, result)).is_err() {
                break;
            }
            waker.wake();
        }
    })?;
    Ok(Thread { jobs, answers, handle })
}

fn create(path: String, len: u64) -> Result<Made, Errno> {
    let fd = files::open(&path, OpenHow { write: true, create_new: true, lock: true })?;
    if let Err(errno) = files::set_len(fd.as_fd(), len, true) {
        let _ = files::remove(&path);
        return Err(errno);
    }
    let discard = files::can_discard(fd.as_fd());
    Ok(Made { fd, discard, path })
}
