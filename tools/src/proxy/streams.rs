//! Streams between this proxy and others: links that the source core asks for, links that arrive for the target core,
//! and what both cores say happened.

use std::net::TcpStream;
use std::rc::Rc;
use std::time::Duration;

use afterimage_controlplane::ca::Identity as Peer;
use afterimage_dataplane::source::{GroupState, HoldReason, LinkFailure, Rung, SourceEvent};
use afterimage_dataplane::target::TargetEvent;
use afterimage_wire::handshake::{Hello, Refusal, Welcome};
use afterimage_wire::ids::{DiskId, StreamId};
use afterimage_wire::v1::Severity;
use tokio::sync::{Semaphore, mpsc};

use super::cores::TargetCoreEvent;
use super::link::{self, LinkError};
use super::pins::GRACE;
use super::runtime::Gone;
use super::state::Proxy;

/// Handshakes of arriving streams under way together; who comes beyond that is closed and comes again.
const HANDSHAKES: usize = 32;
/// Pause after a listener failed (no descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a stream ends or is not made.
const REVOKED: &str = "the certificate of the other end was revoked";

/// Follows the source core until it ends.
pub async fn source_events(proxy: Rc<Proxy>, mut events: mpsc::Receiver<SourceEvent>) {
    while let Some(event) = events.recv().await {
        source_event(&proxy, event);
        proxy.offers.send_replace(());
    }
}

fn source_event(proxy: &Rc<Proxy>, event: SourceEvent) {
    match event {
        SourceEvent::Connect { stream, hello } => {
            let proxy = Rc::clone(proxy);
            tokio::task::spawn_local(async move {
                // Only the end of the data thread stops this, and its owner sees that, too.
                let _ = connect(&proxy, stream, *hello).await;
            });
        }
        SourceEvent::Fenced { stream, disk, generation } => {
            let disk = disk.map(|d| format!(" of disk {d}")).unwrap_or_default();
            let message = format!("the target holds generation {generation}{disk}: this source has been fenced");
            proxy.event(Severity::Error, Some(stream), "fence", message);
        }
        SourceEvent::Held { stream, reason } => {
            let (severity, message) = match reason {
                Some(HoldReason::Told) => (Severity::Warning, "all I/O is held, as it was told"),
                Some(HoldReason::SteppedDown) => (Severity::Error, "all I/O is held: another may run in its place"),
                Some(HoldReason::Lease) => {
                    (Severity::Error, "all I/O is held: no word from target or coordinator within the lease")
                }
                None => (Severity::Info, "I/O goes on"),
            };
            proxy.event(severity, Some(stream), "fence", message.to_owned());
        }
        SourceEvent::Synchronous { stream, together, why } => {
            let (severity, message) = match (together, why) {
                (true, _) => (Severity::Info, "synchronous: writes are answered when the target has them".to_owned()),
                (false, Some(why)) => (Severity::Warning, format!("asynchronous for the time being: {why}")),
                (false, None) => return,
            };
            proxy.event(severity, Some(stream), "synchronous", message);
        }
        SourceEvent::Left { stream, disk, acknowledged } => {
            let late = if acknowledged { "" } else { "; the target has not acknowledged it yet" };
            proxy.event(Severity::Info, Some(stream), "disk", format!("disk {disk} has left the stream{late}"));
            let mut waiters = proxy.waiters.borrow_mut();
            while let Some(at) = waiters.leaves.iter().position(|(s, d, _)| (*s, *d) == (stream, disk)) {
                let _ = waiters.leaves.swap_remove(at).2.send(());
            }
        }
        SourceEvent::State { stream, state } => {
            let (severity, message) = match state {
                GroupState::Opening => (Severity::Info, "opening".to_owned()),
                GroupState::Unlinked(why) => (Severity::Warning, format!("no link: {why}")),
                GroupState::CatchingUp => (Severity::Info, "linked, sending what waited in the spill".to_owned()),
                GroupState::Syncing => (Severity::Info, "linked, synchronising".to_owned()),
                GroupState::Protected => (Severity::Info, "protected".to_owned()),
                GroupState::Refused(reason, why) => (Severity::Error, format!("refused ({reason:?}): {why}")),
                GroupState::Fenced { generation } => (Severity::Error, format!("fenced by generation {generation}")),
                GroupState::Stopping => (Severity::Info, "stopping".to_owned()),
            };
            proxy.event(severity, Some(stream), "link", message);
        }
        SourceEvent::SyncBegun { stream, disk, whole } => {
            let what = if whole { "all of it" } else { "what is in doubt" };
            let message = format!("a synchronisation of disk {disk} begins ({what})");
            proxy.event(Severity::Info, Some(stream), "resync", message);
            // It may have grown: block devices are told.
            proxy.changed.notify_one();
        }
        SourceEvent::SyncEnded { stream, disk, .. } => {
            let message = format!("disk {disk} is synchronised");
            proxy.event(Severity::Info, Some(stream), "resync", message);
        }
        SourceEvent::CutTaken { stream, cut, seq, label } => {
            let mut waiters = proxy.waiters.borrow_mut();
            if let Some(at) = waiters.cuts.iter().position(|w| w.stream == stream && w.label == label) {
                let _ = waiters.cuts.swap_remove(at).taken.send((cut, seq));
            }
        }
        SourceEvent::ClockJump { stream, by } => {
            let message = format!("the wall clock jumped by {:.3} s", by as f64 / 1e9);
            proxy.event(Severity::Warning, Some(stream), "clock", message);
        }
        SourceEvent::DiskFault { disk, message } => {
            proxy.event(Severity::Error, None, "disk", format!("disk {disk}: {message}"));
        }
        SourceEvent::Rung { stream, rung } => {
            let (severity, message) = match rung {
                Rung::Normal => (Severity::Info, "room for everything"),
                Rung::Spilling => (Severity::Warning, "frames queue on disk; no restore point is lost"),
                Rung::Uncompressed => (Severity::Info, "compression is off, to seal faster"),
                Rung::Waiting => (Severity::Warning, "writes wait for room in the queue"),
                Rung::Dirty => (Severity::Error, "what was written is known only by its extents; a resync follows"),
            };
            proxy.event(severity, Some(stream), "ladder", message.to_owned());
        }
        SourceEvent::SpillFault { stream, message } => {
            proxy.event(Severity::Error, Some(stream), "spill", format!("spill: {message}"));
        }
        SourceEvent::Stopped { stream, clean } => {
            let how = if clean {
                "everything is acknowledged, or in the spill"
            } else {
                "the next start compares what may differ"
            };
            proxy.event(Severity::Info, Some(stream), "group", format!("stopped: {how}"));
            let mut waiters = proxy.waiters.borrow_mut();
            while let Some(at) = waiters.stops.iter().position(|(s, _)| *s == stream) {
                let _ = waiters.stops.swap_remove(at).1.send(clean);
            }
        }
    }
}

/// Ends streams with proxies whose keys have been revoked since they were linked.
///
/// # Errors
/// [`Gone`].
pub async fn part(proxy: &Proxy) -> Result<(), Gone> {
    let parted: Vec<StreamId> = {
        let linked = proxy.linked.borrow();
        linked.iter().filter(|(_, pin)| proxy.is_revoked(&pin[..])).map(|(stream, _)| *stream).collect()
    };
    for stream in parted {
        proxy.linked.borrow_mut().remove(&stream);
        let desired = proxy.desired.borrow().sources.iter().any(|s| s.stream_uid == stream.to_string());
        match (desired, &proxy.target) {
            (true, _) => {
                proxy.at_source(stream, move |source, io| source.cut_off(io, stream, REVOKED)).await?;
            }
            (false, Some(target)) => target.call(move |desk| desk.core.cut_off(desk.io, stream, REVOKED)).await?,
            _ => {}
        }
        proxy.event(Severity::Warning, Some(stream), "link", format!("ended: {REVOKED}"));
    }
    Ok(())
}

/// Makes the link that the source core asks for, and gives it the result.
async fn connect(proxy: &Proxy, stream: StreamId, hello: Hello) -> Result<(), Gone> {
    let failure = match try_connect(proxy, stream, hello).await {
        // Revoked while it was being made.
        Ok(link) if proxy.is_revoked(&link.pin) => LinkFailure::Unreachable(REVOKED.to_owned()),
        Ok(link) => {
            alarm(proxy, stream, "the target", link.expired);
            proxy.linked.borrow_mut().insert(stream, link.pin);
            let linked = proxy.at_source(stream, move |source, io| match io.attach(link.fd) {
                Ok(sock) => {
                    let (timeline, position, whole) = (link.timeline, link.position, link.whole_resync);
                    source.linked(io, stream, sock, link.control, timeline, position, whole);
                    None
                }
                Err(errno) => Some(format!("the connection cannot be used: {errno}")),
            });
            match linked.await?.flatten() {
                None => return Ok(()),
                Some(why) => LinkFailure::Unreachable(why),
            }
        }
        Err(LinkError::Refused { reason, message }) => LinkFailure::Refused(reason, message),
        Err(error) => LinkFailure::Unreachable(error.to_string()),
    };
    proxy.at_source(stream, move |source, io| source.link_failed(io, stream, failure)).await?;
    Ok(())
}

async fn try_connect(proxy: &Proxy, stream: StreamId, hello: Hello) -> Result<link::Linked, LinkError> {
    let uid = stream.to_string();
    let known = {
        let desired = proxy.desired.borrow();
        let group = desired.sources.iter().find(|g| g.stream_uid == uid);
        group.filter(|g| !g.target_address.is_empty()).map(|group| {
            let peer = desired.peers.iter().find(|p| p.uid == group.target_uid);
            let pins = peer.map(|p| p.key_pins.clone()).unwrap_or_default();
            (group.target_address.clone(), group.target_uid.clone(), pins)
        })
    };
    let nowhere = |why: &str| LinkError::Connect { address: "the target".into(), source: std::io::Error::other(why) };
    let (address, target, pins) = known.ok_or_else(|| nowhere("its address is not known yet"))?;
    let identity = proxy.identity.borrow().clone().ok_or_else(|| nowhere("this proxy has no certificate yet"))?;
    identity.pins.set(proxy.desired.borrow().peers.iter().flat_map(|peer| &peer.key_pins));
    link::connect(&identity, &address, &target, &pins, |pin| proxy.is_revoked(pin), hello).await
}

/// Takes streams that arrive. Plain tokio accepts: see [`link`].
pub async fn accept_streams(proxy: Rc<Proxy>, listener: tokio::net::TcpListener) {
    let room = std::sync::Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a stream");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = std::sync::Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!(%from, "{HANDSHAKES} handshakes are under way: closed");
            continue;
        };
        let stream = match stream.into_std() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%from, %error, "cannot take a stream");
                continue;
            }
        };
        let proxy = Rc::clone(&proxy);
        tokio::task::spawn_local(async move {
            let _permit = permit;
            match accept(&proxy, stream).await {
                Ok(()) => {}
                // Named once here; the source hears its own side of it.
                Err(error) => {
                    let message = format!("a stream from {from} is refused: {error}");
                    proxy.event(Severity::Warning, None, "link", message);
                }
            }
        });
    }
}

async fn accept(proxy: &Proxy, stream: TcpStream) -> Result<(), LinkError> {
    let refused = |message: &str| LinkError::Refused { reason: Refusal::Busy, message: message.to_owned() };
    let identity = proxy.identity.borrow().clone().ok_or_else(|| refused("this proxy has no certificate yet"))?;
    identity.pins.set(proxy.desired.borrow().peers.iter().flat_map(|peer| &peer.key_pins));
    let Some(target) = &proxy.target else { return Err(refused("this proxy has no target role")) };
    let accepted = link::accept(&identity, stream, async |peer, hello| {
        if let Err(refusal) = may_write(proxy, peer, hello) {
            return refusal;
        }
        let hello = hello.clone();
        let answer = target.call(move |desk| desk.core.hello(desk.io, &hello)).await;
        answer.unwrap_or_else(|gone| Welcome::Refused { reason: Refusal::Busy, message: gone.to_string() })
    });
    let accepted = accepted.await?;
    if proxy.is_revoked(&accepted.peer.pin) {
        return Err(refused(REVOKED));
    }
    proxy.linked.borrow_mut().insert(accepted.hello.stream, accepted.peer.pin);
    alarm(proxy, accepted.hello.stream, &format!("proxy `{}`", accepted.peer.name), accepted.expired);
    tracing::debug!(source = accepted.peer.name, stream = %accepted.hello.stream, "a stream is linked");
    let done = target.call(move |desk| match desk.io.attach(accepted.fd) {
        Ok(sock) => {
            desk.core.attach(desk.io, &accepted.hello, sock, accepted.control);
            Ok(())
        }
        Err(errno) => Err(format!("the connection cannot be used: {errno}")),
    });
    match done.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(why)) => Err(refused(&why)),
        Err(gone) => Err(refused(&gone.to_string())),
    }
}

/// A peer's certificate has ended, and was taken since its key is paired.
fn alarm(proxy: &Proxy, stream: StreamId, who: &str, expired: Option<Duration>) {
    let Some(late) = expired else { return };
    let days = |span: Duration| span.as_secs() / 86_400;
    let left = days(GRACE.saturating_sub(late));
    let message = format!(
        "the certificate of {who} ended {} days ago; it is taken for {left} days more, since its key is paired: renew it",
        days(late)
    );
    proxy.event(Severity::Error, Some(stream), "certificate", message);
}

/// A proxy may write only the streams whose source it is.
fn may_write(proxy: &Proxy, peer: &Peer, hello: &Hello) -> Result<(), Welcome> {
    let refused = |reason, message: String| Err(Welcome::Refused { reason, message });
    if proxy.is_revoked(&peer.pin) {
        return refused(Refusal::BadClaim, format!("the certificate of proxy `{}` was revoked", peer.name));
    }
    let uid = hello.stream.to_string();
    let desired = proxy.desired.borrow();
    let Some(stream) = desired.targets.iter().find(|s| s.stream_uid == uid) else {
        return refused(Refusal::UnknownStream, format!("stream {uid} is not kept here"));
    };
    if stream.source_uid != peer.uid {
        return refused(Refusal::BadClaim, format!("proxy `{}` is not the source of this stream", peer.name));
    }
    let pins = desired.peers.iter().find(|p| p.uid == peer.uid).map(|p| p.key_pins.as_slice()).unwrap_or_default();
    if !link::pinned(peer, pins) {
        return refused(Refusal::BadClaim, format!("the key of proxy `{}` is not the one that is paired", peer.name));
    }
    if let Some(decision) = proxy.decided(&uid) {
        // As the core says it once the generation has been raised, which it may not have been: who hears it holds all I/O.
        let disk = hello.disks.first().map_or(DiskId::NONE, |claim| claim.disk.id);
        let message = format!("the group has been failed over here, and runs from \"{}\"", decision.view);
        return refused(Refusal::Fenced { disk, generation: decision.generation }, message);
    }
    Ok(())
}

/// Follows the target core until it ends.
pub async fn target_events(proxy: Rc<Proxy>, mut events: mpsc::Receiver<TargetCoreEvent>) {
    while let Some(event) = events.recv().await {
        proxy.offers.send_replace(());
        let event = match event {
            TargetCoreEvent::Target(event) => event,
            TargetCoreEvent::Source(event) => {
                source_event(&proxy, event);
                continue;
            }
        };
        let (severity, stream, kind, message) = match event {
            TargetEvent::Ready { stream } => {
                // Views wait for this.
                proxy.changed.notify_one();
                (Severity::Info, stream, "stream", "ready".to_owned())
            }
            TargetEvent::Failed { stream, why } => (Severity::Error, stream, "stream", why),
            TargetEvent::Connected { stream, incarnation } => {
                (Severity::Info, stream, "link", format!("connected, incarnation {incarnation}"))
            }
            TargetEvent::Disconnected { stream, why } => {
                (Severity::Warning, stream, "link", format!("disconnected: {why}"))
            }
            TargetEvent::Shortened { stream, floor, why } => {
                (Severity::Warning, stream, "retention", format!("history now begins at record {floor}: {why}"))
            }
            TargetEvent::ViewLost { stream, view, why } => {
                let message = format!("view `{view}` was given up: {why}");
                let proxy = Rc::clone(&proxy);
                tokio::task::spawn_local(async move { super::commands::lose_view(&proxy, &view).await });
                (Severity::Error, stream, "view", message)
            }
            TargetEvent::Mended { stream, what } => {
                (Severity::Info, stream, "damage", format!("newer data has taken the place of what was lost: {what}"))
            }
            TargetEvent::Regained { stream, what } => {
                (Severity::Info, stream, "damage", format!("nothing is lost, it can be read again: {what}"))
            }
            TargetEvent::Damaged { stream, damage } => (Severity::Error, stream, "damage", damage.what),
        };
        proxy.event(severity, Some(stream), kind, message);
    }
}
