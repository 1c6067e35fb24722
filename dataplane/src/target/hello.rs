//! What a target answers to a source that introduces itself.

use std::sync::Arc;

use afterimage_wire::WIRE_VERSION;
use afterimage_wire::control::StopReason;
use afterimage_wire::handshake::{Hello, Position, Refusal, Welcome};
use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::segment::Predecessor;

use super::Target;
use super::status::TargetEvent;
use super::stream::{Phase, Stream, Welcomed};
use crate::io::{Io, Sock};
use crate::journal::{Place, Writer};
use crate::receive::Connection;
use crate::seal::ControlKey;

/// An accepted hello.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub position: Position,
    pub whole_resync: bool,
    pub writer: Arc<Writer>,
    /// Frame and record that come next.
    pub next: (u64, u64),
}

pub(crate) fn refuse(reason: Refusal, message: impl Into<String>) -> Welcome {
    Welcome::Refused { reason, message: message.into() }
}

impl<I: Io> Target<I> {
    /// Decides about a source that introduces itself.
    pub fn hello(&mut self, io: &mut I, hello: &Hello) -> Welcome {
        let id = self.id_of(hello.stream);
        let Some(stream) = id.and_then(|id| self.streams.get_mut(&id)) else {
            return refuse(Refusal::UnknownStream, format!("stream {} is not known here", hello.stream));
        };
        match decide(stream, hello) {
            Ok(accepted) => {
                if stream.position().incarnation != hello.incarnation {
                    stream.welcomed =
                        Some(Welcomed { incarnation: hello.incarnation, whole_resync: accepted.whole_resync });
                }
                let held = accepted.position;
                let ours = held.incarnation == hello.incarnation;
                stream.promise.begin(hello.incarnation, if ours { held.frame } else { 0 });
                let timeline = stream.history.table().current;
                // From here on the position must not move under the source by frames of an older connection that are
                // not on their way to the disk yet.
                if let Some(old) = stream.connection
                    && let Some(connection) = self.connections.get_mut(&old)
                {
                    connection.stop(StopReason::Replaced, 0, "a newer connection of the source took over".into());
                    connection.discard();
                    stream.journal.drop_queue();
                }
                self.pump_connections(io);
                Welcome::Accepted { timeline, position: accepted.position, whole_resync: accepted.whole_resync }
            }
            Err(refused) => refused,
        }
    }

    /// Ends a stream's connection: its source is not to be heard any more, or not by this connection.
    pub fn cut_off(&mut self, io: &mut I, stream: StreamId, why: &str) {
        let id = self.stream(stream).ok().and_then(|stream| stream.connection);
        if let Some(connection) = id.and_then(|id| self.connections.get_mut(&id)) {
            connection.stop(StopReason::ShuttingDown, 0, why.to_owned());
            connection.discard();
        }
        self.turn(io);
    }

    /// Takes a connection after its handshake: `hello` was accepted, and `Begin` has come. It is decided about again
    /// (a fence may have come between); a refusal then is a sealed `Stop`. Replaces the stream's older connection.
    /// `control` seals target → source.
    pub fn attach(&mut self, io: &mut I, hello: &Hello, sock: Sock, control: ControlKey) {
        let Ok(stream) = self.stream(hello.stream) else { return io.close_sock(sock) };
        let (number, stream_id, id) = (stream.id, stream.config.stream, stream.connection.take());
        let decision = decide(stream, hello);
        if decision.is_ok() {
            stream.journal.drop_queue();
        } else {
            stream.connection = id;
        }
        // Decided again, since the queue is gone.
        let decision = decision.and_then(|_| match self.stream(hello.stream) {
            Ok(stream) => decide(stream, hello),
            Err(_) => Err(refuse(Refusal::UnknownStream, "")),
        });
        let claims = hello.disks.iter().map(|claim| (claim.disk.id, claim.generation)).collect();
        let connection_id = self.take_id();
        let now = io.now();
        match decision {
            Ok(accepted) => {
                if let Some(old) = id.and_then(|id| self.connections.get_mut(&id)) {
                    old.stop(StopReason::Replaced, 0, "a newer connection of the source took over".into());
                    old.discard();
                }
                let held = accepted.position;
                let control = crate::mutant::control_key(control, &accepted.writer.key);
                let mut connection = Connection::new(
                    connection_id,
                    number,
                    stream_id,
                    accepted.writer,
                    claims,
                    sock,
                    control,
                    accepted.next,
                    now,
                );
                // What was on its way when the welcome was said may be durable by now.
                if held.incarnation == hello.incarnation && held.frame > 0 {
                    connection.acknowledge(held.frame, held.seq);
                }
                self.connections.insert(connection_id, connection);
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.note_behind(hello.predecessor, &mut self.events);
                    stream.connection = Some(connection_id);
                    stream.mend_at = 0;
                    stream.last_heard = Some(now);
                    if held.incarnation == hello.incarnation && held.frame > 0 {
                        stream.promise.told(held.incarnation, held.frame, io.since_boot());
                    }
                }
                self.event(TargetEvent::Connected { stream: hello.stream, incarnation: hello.incarnation });
            }
            Err(refused) => {
                let (reason, value, why) = match refused {
                    Welcome::Refused { reason: Refusal::Fenced { generation, .. }, message } => {
                        (StopReason::Fenced, generation, message)
                    }
                    Welcome::Refused { reason: Refusal::Unable, message } => (StopReason::NoSpace, 0, message),
                    Welcome::Refused { message, .. } => (StopReason::Replaced, 0, message),
                    Welcome::Accepted { .. } => return io.close_sock(sock),
                };
                let Some(writer) = self.throwaway(hello) else { return io.close_sock(sock) };
                let mut connection =
                    Connection::new(connection_id, number, stream_id, writer, claims, sock, control, (1, 1), now);
                connection.stop(reason, value, why);
                self.connections.insert(connection_id, connection);
            }
        }
        self.pump_connections(io);
    }

    /// Stands for the writer of a connection that is only told why it ends.
    fn throwaway(&mut self, hello: &Hello) -> Option<Arc<Writer>> {
        let key = self.stream(hello.stream).ok()?.config.policy_key.unwrap(hello.incarnation, &hello.key).ok()?;
        Some(Arc::new(Writer {
            incarnation: hello.incarnation,
            predecessor: hello.predecessor,
            wrapped: hello.key,
            key,
            disks: Vec::new(),
        }))
    }
}

/// Decides about a hello. Nothing changes.
///
/// | newest writer here | source | answer |
/// |---|---|---|
/// | none | any | accepted, whole |
/// | the same | goes on | accepted from the frame after the newest |
/// | its predecessor | everything acknowledged is here | accepted, what is in doubt is enough |
/// | its predecessor | something acknowledged is missing | accepted, whole |
/// | another one | predecessor known here, not the newest | refused: a branch |
/// | another one | predecessor unknown or none (the log was lost) | accepted, whole |
pub(crate) fn decide(stream: &Stream, hello: &Hello) -> Result<Accepted, Welcome> {
    if hello.version != WIRE_VERSION {
        let message = format!("version {} is not spoken here", hello.version);
        return Err(refuse(Refusal::Version { known: WIRE_VERSION }, message));
    }
    match &stream.phase {
        Phase::Ready => {}
        Phase::Failed(why) => return Err(refuse(Refusal::Unable, why.clone())),
        _ => return Err(refuse(Refusal::Busy, "the stream is being recovered")),
    }
    // A stale source learns that it is one, whatever else keeps it out: nobody else may tell it.
    check_claims(stream, hello)?;
    if let Some(why) = &stream.seeds.error {
        return Err(refuse(Refusal::Unable, why.clone()));
    }
    if stream.seeds.is_busy() {
        return Err(refuse(Refusal::Busy, "a seed is being made durable"));
    }
    if let Some(errno) = stream.journal.failed() {
        return Err(refuse(Refusal::Unable, format!("the journal's disk failed: {errno}")));
    }
    if let Some(why) = &stream.no_space {
        return Err(refuse(Refusal::Unable, why.clone()));
    }
    if hello.connection != 0 {
        return Err(refuse(Refusal::BadClaim, "a stream has one connection, number 0"));
    }
    let writer = match stream.writer(hello.incarnation) {
        Some(writer) => writer,
        None => {
            let key = stream
                .config
                .policy_key
                .unwrap(hello.incarnation, &hello.key)
                .map_err(|error| refuse(Refusal::BadClaim, error.to_string()))?;
            Arc::new(Writer {
                incarnation: hello.incarnation,
                predecessor: hello.predecessor,
                wrapped: hello.key,
                key,
                disks: hello.disks.iter().map(|claim| claim.disk.clone()).collect(),
            })
        }
    };
    let held = stream.position();
    let position = Position { incarnation: held.incarnation, frame: held.frame, seq: held.seq };
    // What is on its way to the disk counts as taken: a resend of it is passed over.
    let accepted = stream.journal.accepted;
    if accepted.incarnation != held.incarnation && accepted.incarnation != hello.incarnation {
        return Err(refuse(Refusal::Busy, "frames of another writer are on their way to the disk"));
    }
    let next = if accepted.incarnation == hello.incarnation {
        (accepted.frame + 1, accepted.seq + 1)
    } else {
        (1, hello.first_seq)
    };
    if held.incarnation == hello.incarnation {
        if hello.next_frame <= held.frame {
            let message =
                format!("frame {} is held here, and the source has sent {}", held.frame, hello.next_frame - 1);
            return Err(refuse(Refusal::Branch, message));
        }
        return Ok(Accepted { position, whole_resync: stream.owes_whole(&hello.disks), writer, next });
    }
    let whole_resync = if held.incarnation.is_none() {
        // A source that never had a predecessor owes the whole anyway.
        true
    } else {
        if stream.knows(hello.incarnation) && stream.writer(hello.incarnation).is_none() {
            return Err(refuse(Refusal::Branch, "a newer writer has been here since"));
        }
        descends(stream, hello)?
    };
    if hello.first_seq <= held.seq {
        let message = format!("record {} is held here already", held.seq);
        return Err(refuse(Refusal::SeqBehind { newest: held.seq }, message));
    }
    Ok(Accepted { position, whole_resync: whole_resync || stream.owes_whole(&hello.disks), writer, next })
}

fn check_claims(stream: &Stream, hello: &Hello) -> Result<(), Welcome> {
    let table = stream.history.table();
    if hello.disks.is_empty() {
        return Err(refuse(Refusal::BadClaim, "no disk is claimed"));
    }
    for claim in &hello.disks {
        let id = claim.disk.id;
        let Some(known) = table.disk(id) else {
            return Err(refuse(Refusal::BadClaim, format!("disk {id} is not known in this stream")));
        };
        if claim.generation < known.generation && !mutant!(StaleGeneration) {
            let message = format!("disk {id} is at generation {}", known.generation);
            return Err(refuse(Refusal::Fenced { disk: id, generation: known.generation }, message));
        }
        if claim.generation > known.generation {
            let message =
                format!("generation {} of disk {id} was never issued here ({})", claim.generation, known.generation);
            return Err(refuse(Refusal::BadClaim, message));
        }
        if claim.disk.slot != known.disk.slot {
            let message = format!("disk {id} has slot {}, not {}", known.disk.slot, claim.disk.slot);
            return Err(refuse(Refusal::BadClaim, message));
        }
        // One that has grown says so in the stream; the table follows.
        if claim.disk.size < known.disk.size {
            let message = format!("disk {id} has {} bytes here and {} there", known.disk.size, claim.disk.size);
            return Err(refuse(Refusal::BadClaim, message));
        }
    }
    Ok(())
}

/// The newest writer here is another one: is everything in doubt enough (false), or the whole owed (true)?
fn descends(stream: &Stream, hello: &Hello) -> Result<bool, Welcome> {
    let (held, predecessor) = (stream.position(), hello.predecessor);
    if predecessor.incarnation == held.incarnation {
        return Ok(is_behind(held, predecessor));
    }
    if let Some(welcomed) = stream.welcomed
        && welcomed.incarnation == predecessor.incarnation
        && predecessor.frame == 0
    {
        // It was accepted here and had nothing acknowledged: whatever it owed, its successor owes.
        return Ok(welcomed.whole_resync);
    }
    if predecessor.incarnation != IncarnationId::NONE && stream.knows(predecessor.incarnation) {
        return Err(refuse(Refusal::Branch, "its predecessor is not the newest writer here"));
    }
    Ok(true)
}

/// Less is here than the writer of what is here was told to be safe.
pub(crate) fn is_behind(held: Place, predecessor: Predecessor) -> bool {
    predecessor.incarnation == held.incarnation
        && (held.frame < predecessor.frame || held.seq < predecessor.seq)
        && !mutant!(PredecessorNotCompared)
}
