//! What a target answers to a source that introduces itself.

use std::sync::Arc;

use afterimage_wire::WIRE_VERSION;
use afterimage_wire::handshake::{Hello, Position, Refusal, Welcome};
use afterimage_wire::ids::IncarnationId;
use afterimage_wire::segment::Predecessor;

use super::stream::{Phase, Stream};
use crate::journal::{Place, Writer};

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
    check_claims(stream, hello)?;
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
        return Ok(Accepted { position, whole_resync: stream.owes_whole(), writer, next });
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
    Ok(Accepted { position, whole_resync: whole_resync || stream.owes_whole(), writer, next })
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
