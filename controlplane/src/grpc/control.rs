//! Sessions of proxies: messages in, messages out.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::proxy_message::Message;
use afterimage_wire::v1::{self, *};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::auth::caller;
use crate::audit::CALLER;
use crate::ca::Identity;
use crate::coordinator::Coordinator;
use crate::problem::Problem;
use crate::sessions::{MAX_OUTBOX, Outgoing};

/// How long a proxy may take to register after it has connected.
const REGISTER_WITHIN: Duration = Duration::from_secs(10);

/// The service for proxies.
#[derive(Clone)]
pub struct ControlService(pub Arc<Coordinator>);

async fn first(messages: &mut Streaming<ProxyMessage>) -> Result<v1::Register, Status> {
    let wanted = || Problem::invalid("message", "something else", "register, first and within 10 seconds");
    match tokio::time::timeout(REGISTER_WITHIN, messages.message()).await {
        Ok(Ok(Some(ProxyMessage { message: Some(Message::Register(register)) }))) => Ok(register),
        Ok(Err(status)) => Err(status),
        Ok(Ok(_)) | Err(_) => Err(wanted().into()),
    }
}

/// Reads until the proxy goes away, says what it may not, or its session is taken from it.
async fn listen(
    coordinator: &Coordinator,
    who: &Identity,
    uid: &str,
    epoch: u64,
    messages: &mut Streaming<ProxyMessage>,
) -> Result<(), Status> {
    while let Some(message) = messages.message().await? {
        match message.message {
            Some(Message::Report(report)) => coordinator.report(who, uid, report),
            Some(Message::Result(CommandResult { id, outcome: Some(outcome) })) => {
                coordinator.sessions.answered(uid, epoch, &id, outcome);
            }
            Some(Message::Result(CommandResult { outcome: None, .. })) => {
                return Err(Problem::invalid("result.outcome", "nothing", "exactly one outcome").into());
            }
            Some(Message::Register(_)) | None => {
                return Err(Problem::invalid("message", "register or nothing", "report or result").into());
            }
        }
    }
    Ok(())
}

#[tonic::async_trait]
impl proxy_control_server::ProxyControl for ControlService {
    type SessionStream = Pin<Box<dyn Stream<Item = Outgoing> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<ProxyMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let who = caller(request.extensions())?;
        let mut messages = request.into_inner();
        let coordinator = self.0.clone();
        let (sender, receiver) = mpsc::channel(MAX_OUTBOX);
        // Answered at once: a client may wait for the response's head before it sends anything.
        let task = async move {
            let register = match first(&mut messages).await {
                Ok(register) => register,
                Err(status) => return drop(sender.try_send(Err(status))),
            };
            let (uid, epoch) = match coordinator.register(&who, register, sender.clone()).await {
                Ok(session) => session,
                Err(problem) => return drop(sender.try_send(Err(problem.into()))),
            };
            let ended = tokio::select! {
                ended = listen(&coordinator, &who, &uid, epoch, &mut messages) => ended,
                () = taken(&coordinator, &uid, epoch) => Ok(()),
                () = sender.closed() => Ok(()),
            };
            if let Err(status) = ended {
                tracing::debug!(proxy = %who.name, %status, "session ended");
                let _ = sender.try_send(Err(status));
            }
            coordinator.deregister(&who, &uid, epoch);
        };
        // What registering changes is the proxy's doing.
        match CALLER.try_with(Clone::clone) {
            Ok(caller) => tokio::spawn(CALLER.scope(caller, task)),
            Err(_) => tokio::spawn(task),
        };
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Until this session is not the proxy's any more.
async fn taken(coordinator: &Coordinator, uid: &str, epoch: u64) {
    let mut changes = coordinator.sessions.changes();
    while coordinator.sessions.is_current(uid, epoch) {
        if changes.changed().await.is_err() {
            return;
        }
    }
}
