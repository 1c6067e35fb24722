//! Who is connected, so that a connection can be ended when its certificate is not good any more.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use crate::ca::Identity;

/// Connections with a certificate that are open. There are as many as `bound` allows.
#[derive(Debug, Default)]
pub struct Connections(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    by_number: HashMap<u64, (Identity, oneshot::Sender<()>)>,
}

impl Connections {
    /// One more, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>, who: Identity) -> Guard {
        let (end, ended) = oneshot::channel();
        let mut open = self.0.lock().expect("nothing panics while it holds this");
        let number = open.next;
        open.next += 1;
        open.by_number.insert(number, (who, end));
        Guard { connections: self.clone(), number, ended, over: false }
    }

    /// Ends the connections of those; returns how many.
    pub fn end(&self, those: impl Fn(&Identity) -> bool) -> usize {
        let mut open = self.0.lock().expect("nothing panics while it holds this");
        let ended: Vec<_> = open.by_number.extract_if(|_, (who, _)| those(who)).collect();
        drop(open);
        // Dropped: each of them is told by that.
        ended.len()
    }
}

/// An open connection's entry.
#[derive(Debug)]
pub(crate) struct Guard {
    connections: Arc<Connections>,
    number: u64,
    ended: oneshot::Receiver<()>,
    over: bool,
}

impl Guard {
    /// Whether it has been ended; who asks is woken when it is.
    pub(crate) fn ended(&mut self, cx: &mut Context<'_>) -> bool {
        // Ready by an error: nothing is ever sent.
        self.over = self.over || matches!(Pin::new(&mut self.ended).poll(cx), Poll::Ready(_));
        self.over
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.connections.0.lock().expect("nothing panics while it holds this").by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::ca::Role;

    fn who(name: &str) -> Identity {
        Identity {
            tenant: "default".into(),
            role: Role::Viewer,
            name: name.into(),
            uid: String::new(),
            pin: [0; 32],
            serial: name.into(),
            issuer: "ca".into(),
            issue_time_ns: 0,
            expire_time_ns: 1,
        }
    }

    #[test]
    fn those_that_are_meant_end_and_no_others() {
        let connections = Arc::new(Connections::default());
        let (mut a, mut b) = (connections.enter(who("a")), connections.enter(who("b")));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(!a.ended(&mut cx) && !b.ended(&mut cx));
        assert_eq!(connections.end(|w| w.name == "a"), 1);
        assert!(a.ended(&mut cx) && a.ended(&mut cx) && !b.ended(&mut cx));
        drop((a, b));
        assert!(connections.0.lock().unwrap().by_number.is_empty());
    }
}
