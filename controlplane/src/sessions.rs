//! Sessions of proxies: at most one each; commands out, results back. What a session does is in `grpc::control`.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::coordinator_message::Message;
use afterimage_wire::v1::{Command, CoordinatorMessage, DesiredState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

/// Messages to a proxy that wait; one that takes none for so long is disconnected.
pub const MAX_OUTBOX: usize = 64;
/// Commands to a proxy without an answer yet.
const MAX_PENDING: usize = 256;

/// What goes to a proxy, or the status that ends its session.
pub type Outgoing = Result<CoordinatorMessage, tonic::Status>;

struct Session {
    /// Tells it from its successor.
    epoch: u64,
    outbox: mpsc::Sender<Outgoing>,
    pending: HashMap<String, oneshot::Sender<Outcome>>,
    /// As last sent.
    desired: DesiredState,
}

/// A command without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No session.
    #[error("it is not connected")]
    NotConnected,
    /// No answer in time.
    #[error("it did not answer in time")]
    TimedOut,
    /// Too many commands wait already.
    #[error("too many commands wait for it")]
    Busy,
}

/// All sessions.
pub struct Sessions {
    by_uid: Mutex<HashMap<String, Session>>,
    /// Rises with each session that begins or ends.
    changed: watch::Sender<u64>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { by_uid: Mutex::default(), changed: watch::channel(0).0 }
    }
}

impl Sessions {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Session>> {
        self.by_uid.lock().expect("nothing panics while it holds this")
    }

    /// Begins a session; an older one of the same proxy ends with `ABORTED`.
    pub fn begin(&self, uid: &str, outbox: mpsc::Sender<Outgoing>) -> u64 {
        let mut epoch = 0;
        self.changed.send_modify(|n| {
            *n += 1;
            epoch = *n;
        });
        let session = Session { epoch, outbox, pending: HashMap::new(), desired: DesiredState::default() };
        if let Some(old) = self.lock().insert(uid.to_owned(), session) {
            // Full or closed: it ends anyway, since its sender is dropped here.
            let _ = old.outbox.try_send(Err(tonic::Status::aborted("a newer session of this proxy has begun")));
        }
        self.changed.send_modify(|n| *n += 1);
        epoch
    }

    /// Ends a session, unless a newer one has taken its place.
    pub fn end(&self, uid: &str, epoch: u64) -> bool {
        let mut all = self.lock();
        let own = all.get(uid).is_some_and(|s| s.epoch == epoch);
        if own {
            all.remove(uid);
            drop(all);
            self.changed.send_modify(|n| *n += 1);
        }
        own
    }

    /// Ends whatever session the proxy has, with this status.
    pub fn expel(&self, uid: &str, status: tonic::Status) {
        if let Some(old) = self.lock().remove(uid) {
            let _ = old.outbox.try_send(Err(status));
        }
        self.changed.send_modify(|n| *n += 1);
    }

    /// Ends all sessions.
    pub fn close(&self) {
        self.lock().clear();
        self.changed.send_modify(|n| *n += 1);
    }

    /// Whether the proxy has a session.
    pub fn connected(&self, uid: &str) -> bool {
        self.lock().contains_key(uid)
    }

    /// Whether this session is still the proxy's.
    pub fn is_current(&self, uid: &str, epoch: u64) -> bool {
        self.lock().get(uid).is_some_and(|s| s.epoch == epoch)
    }

    /// Told whenever a session begins or ends.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Version of the desired state last sent to the proxy; 0 without a session.
    pub fn desired_version(&self, uid: &str) -> u64 {
        self.lock().get(uid).map_or(0, |s| s.desired.version)
    }

    /// Sends a message that may be lost; nothing if there is no session or its outbox is full.
    pub fn say(&self, uid: &str, message: Message) {
        if let Some(session) = self.lock().get(uid) {
            let _ = session.outbox.try_send(Ok(CoordinatorMessage { message: Some(message) }));
        }
    }

    /// Sends a desired state unless the proxy has been sent the same; `first` sends it in any case. True if it was (or
    /// was tried to be) sent.
    pub fn converge(&self, uid: &str, state: DesiredState, first: bool) -> bool {
        let mut all = self.lock();
        let Some(session) = all.get_mut(uid) else { return false };
        let same = DesiredState { version: session.desired.version, ..state.clone() } == session.desired;
        if (same && !first) || state.version < session.desired.version {
            return false;
        }
        session.desired = state.clone();
        let message = CoordinatorMessage { message: Some(Message::Desired(state)) };
        if session.outbox.try_send(Ok(message)).is_err() {
            // It takes nothing: without a session it comes back and gets the newest.
            all.remove(uid);
            drop(all);
            self.changed.send_modify(|n| *n += 1);
        }
        true
    }

    /// The answer to a command has come. One that nobody waits for any more is dropped.
    pub fn answered(&self, uid: &str, epoch: u64, id: &str, outcome: Outcome) {
        let mut all = self.lock();
        let waiting = all.get_mut(uid).filter(|s| s.epoch == epoch).and_then(|s| s.pending.remove(id));
        if let Some(waiting) = waiting {
            let _ = waiting.send(outcome);
        }
    }

    /// Gives a proxy a command and waits for its answer. If its session ends in between, the same command goes to the
    /// next one: proxies do a command with the same id only once.
    ///
    /// # Errors
    /// Not connected within `connect`, or no answer within `answer` after that.
    pub async fn call(
        &self,
        uid: &str,
        command: Command,
        connect: Duration,
        answer: Duration,
    ) -> Result<Outcome, CallError> {
        let mut changes = self.changes();
        let mut connect_until = Some(Instant::now() + connect);
        let mut answer_until = None;
        loop {
            changes.mark_unchanged();
            match self.post(uid, &command) {
                Ok(receiver) => {
                    connect_until = None;
                    let until = *answer_until.get_or_insert_with(|| Instant::now() + answer);
                    match timeout_at(until, receiver).await {
                        Ok(Ok(outcome)) => return Ok(outcome),
                        // The session has ended.
                        Ok(Err(_)) => {}
                        Err(_) => {
                            self.forget(uid, &command.id);
                            return Err(CallError::TimedOut);
                        }
                    }
                }
                Err(CallError::NotConnected) => {
                    let until = connect_until.or(answer_until).unwrap_or_else(Instant::now);
                    if timeout_at(until, changes.changed()).await.is_err() {
                        return Err(CallError::NotConnected);
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn post(&self, uid: &str, command: &Command) -> Result<oneshot::Receiver<Outcome>, CallError> {
        let mut all = self.lock();
        let session = all.get_mut(uid).ok_or(CallError::NotConnected)?;
        session.pending.retain(|_, waiting| !waiting.is_closed());
        if session.pending.len() >= MAX_PENDING {
            return Err(CallError::Busy);
        }
        let message = CoordinatorMessage { message: Some(Message::Command(command.clone())) };
        session.outbox.try_send(Ok(message)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => CallError::Busy,
            mpsc::error::TrySendError::Closed(_) => CallError::NotConnected,
        })?;
        let (sender, receiver) = oneshot::channel();
        session.pending.insert(command.id.clone(), sender);
        Ok(receiver)
    }

    fn forget(&self, uid: &str, id: &str) {
        if let Some(session) = self.lock().get_mut(uid) {
            session.pending.remove(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use afterimage_wire::v1::Done;

    use super::*;

    fn command(id: &str) -> Command {
        Command { id: id.into(), ..Command::default() }
    }

    fn sent(message: Option<Outgoing>) -> Command {
        match message.unwrap().unwrap().message.unwrap() {
            Message::Command(c) => c,
            other => panic!("{other:?}"),
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn an_answer_reaches_who_asked() {
        let sessions = Arc::new(Sessions::default());
        let (sender, mut receiver) = mpsc::channel(MAX_OUTBOX);
        let epoch = sessions.begin("p", sender);
        let asking = tokio::spawn({
            let sessions = sessions.clone();
            async move { sessions.call("p", command("c"), SECOND, SECOND).await }
        });
        assert_eq!(sent(receiver.recv().await).id, "c");
        sessions.answered("p", epoch, "other", Outcome::Done(Done {}));
        sessions.answered("p", epoch, "c", Outcome::Done(Done {}));
        assert_eq!(asking.await.unwrap(), Ok(Outcome::Done(Done {})));
    }

    #[tokio::test]
    async fn a_command_goes_to_the_next_session_if_the_first_ends() {
        let sessions = Arc::new(Sessions::default());
        let (sender, mut first) = mpsc::channel(MAX_OUTBOX);
        let old = sessions.begin("p", sender);
        let asking = tokio::spawn({
            let sessions = sessions.clone();
            async move { sessions.call("p", command("c"), SECOND, SECOND).await }
        });
        sent(first.recv().await);
        assert!(sessions.end("p", old));
        let (sender, mut second) = mpsc::channel(MAX_OUTBOX);
        let new = sessions.begin("p", sender);
        assert_eq!(sent(second.recv().await).id, "c");
        sessions.answered("p", old, "c", Outcome::Done(Done {}));
        sessions.answered("p", new, "c", Outcome::Done(Done {}));
        assert!(asking.await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_newer_session_ends_the_older_and_is_not_ended_by_it() {
        let sessions = Sessions::default();
        let (sender, mut first) = mpsc::channel(MAX_OUTBOX);
        let old = sessions.begin("p", sender);
        let (sender, _second) = mpsc::channel(MAX_OUTBOX);
        sessions.begin("p", sender);
        assert_eq!(first.recv().await.unwrap().unwrap_err().code(), tonic::Code::Aborted);
        assert!(!sessions.end("p", old));
        assert!(sessions.connected("p"));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_there_and_no_answer_are_told_apart() {
        let sessions = Sessions::default();
        let soon = Duration::from_millis(20);
        assert_eq!(sessions.call("p", command("c"), Duration::ZERO, soon).await, Err(CallError::NotConnected));
        let (sender, _receiver) = mpsc::channel(MAX_OUTBOX);
        sessions.begin("p", sender);
        assert_eq!(sessions.call("p", command("c"), Duration::ZERO, soon).await, Err(CallError::TimedOut));
    }

    #[tokio::test]
    async fn an_unchanged_desired_state_is_not_sent_again() {
        let sessions = Sessions::default();
        let (sender, mut receiver) = mpsc::channel(MAX_OUTBOX);
        sessions.begin("p", sender);
        let state = |version, term| DesiredState { version, term, ..DesiredState::default() };
        sessions.converge("p", state(1, 1), true);
        sessions.converge("p", state(2, 1), false);
        sessions.converge("p", state(3, 2), false);
        sessions.converge("p", state(2, 3), false);
        let mut versions = Vec::new();
        while let Ok(Ok(m)) = receiver.try_recv() {
            if let Some(Message::Desired(d)) = m.message {
                versions.push(d.version);
            }
        }
        assert_eq!(versions, [1, 3]);
    }

    #[tokio::test]
    async fn a_proxy_that_takes_nothing_loses_its_session() {
        let sessions = Sessions::default();
        let (sender, _receiver) = mpsc::channel(1);
        sessions.begin("p", sender);
        sessions.converge("p", DesiredState { version: 1, term: 1, ..Default::default() }, true);
        sessions.converge("p", DesiredState { version: 2, term: 2, ..Default::default() }, false);
        assert!(!sessions.connected("p"));
    }
}
