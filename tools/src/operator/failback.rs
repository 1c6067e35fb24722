//! `afterimage failback`: bring a group that runs at its target back to its source, with all that was written meanwhile.

use afterimage_wire::v1;
use clap::Subcommand;

use super::advise;
use super::documents::{self, id, operation_word, phase_word};
use super::failover::{Begin, follow_to_end};
use super::failure::{Failure, Kind};
use super::group::object;
use super::output::fields;
use super::session::Session;
use super::status::{micros, progress};
use super::values::{duration_ns, show_count, show_size};

/// Verbs of `afterimage failback`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Protect what is written at the target back to the source; the machine there runs on.
    #[command(after_help = "Examples:\n  \
        afterimage failback start shop --dry-run    check only\n  \
        afterimage failback start shop\n  \
        afterimage failback status shop             how far it is, and whether it is ready\n\n\
        Only what differs is sent. The source proxy has to take streams: `target.journal` and `target.listen`.\n\
        Exit codes: 0 done, 1 a step failed (the group runs on as it did), 3 not allowed now, 4 unreachable.")]
    Start {
        /// The group's name.
        group: String,
        #[command(flatten)]
        start: Begin,
    },
    /// Give a failback up: the group stays failed over, and its source's disks as they are.
    #[command(after_help = "Examples:\n  afterimage failback cancel shop\n\n\
        To give up an operation that is being done: afterimage failover cancel OPERATION.\n\
        Exit codes: 0 done, 3 not allowed now, 4 unreachable.")]
    Cancel {
        /// The group's name.
        group: String,
        #[command(flatten)]
        start: Begin,
    },
    /// Run the group at its source again, with all that was written at the target; it is protected from its first write.
    #[command(after_help = "Examples:\n  \
        afterimage failback switch shop --dry-run       is it ready?\n  \
        afterimage failback switch shop --within 5m     a long way to catch up\n\n\
        A machine with a driver is stopped there and started here; another one you stop at the target first: what it\n\
        still writes is held and not answered. If the source, or its machine, does not start, the group runs on at the\n\
        target.\n\
        Exit codes: 0 done, 1 a step failed (the group runs on at its target), 3 not allowed now, 4 unreachable.")]
    Switch {
        /// The group's name.
        group: String,
        /// How long catching up may take, and again what is left once I/O is held.
        #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = duration_ns)]
        within: u64,
        #[command(flatten)]
        start: Begin,
    },
    /// Stay at the source: what the target kept to go back to is deleted.
    #[command(after_help = "Examples:\n  afterimage failback commit shop --yes\n\n\
        Possible once the group is protected again: see `afterimage failback status`.\n\
        Exit codes: 0 done, 1 a step failed (nothing has changed), 3 not allowed now, 4 unreachable.")]
    Commit {
        /// The group's name.
        group: String,
        #[command(flatten)]
        start: Begin,
    },
    /// Go back to the target, as the group was there when it switched.
    #[command(after_help = "Examples:\n  \
        afterimage failback undo shop\n  \
        afterimage failback undo shop --unconfirmed shop    its machine is off: you made sure\n\n\
        What the source wrote since the switch does not come along. Its machine is stopped, and the replica started, by\n\
        their drivers.\n\
        Exit codes: 0 done, 1 a step failed (the group runs on as it did), 3 not allowed now, 4 unreachable.")]
    Undo {
        /// The group's name.
        group: String,
        /// Go on although nobody confirms that the source is off; NAME is the group's name, typed again.
        #[arg(long, value_name = "NAME")]
        unconfirmed: Option<String>,
        #[command(flatten)]
        start: Begin,
    },
    /// Show how far a failback is, and what is still missing.
    #[command(after_help = "Examples:\n  \
        afterimage failback status shop\n  \
        afterimage failback status shop --json | jq .reverse.ready")]
    Status {
        /// The group's name.
        group: String,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    match verb {
        Verb::Start { group, start } => {
            let request = v1::StartFailbackRequest {
                group: session.group(&group),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().start_failback(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Cancel { group, start } => {
            let request = v1::CancelFailbackRequest {
                group: session.group(&group),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().cancel_failback(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Switch { group, within, start } => {
            ask(session, &group, &start, advise::Verb::Switch, |group| {
                format!(
                    "Group {group} will run at its source, with all that was written to its view. All I/O of the view's disks \
                     will be held, and the view closed. What the source's disks held themselves is overwritten."
                )
            })
            .await?;
            let request = v1::SwitchFailbackRequest {
                group: session.group(&group),
                within_ms: (within / 1_000_000).max(1),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().switch_failback(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Commit { group, start } => {
            ask(session, &group, &start, advise::Verb::Commit, |group| {
                format!("Group {group} will stay at its source: it cannot go back to its view, which is deleted.")
            })
            .await?;
            let request = v1::CommitFailbackRequest {
                group: session.group(&group),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().commit_failback(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Undo { group, unconfirmed, start } => {
            if let Some(name) = unconfirmed.as_ref().filter(|name| **name != group) {
                let message = format!("--unconfirmed names \"{name}\", and the group is \"{group}\"");
                return Err(Failure::new(Kind::Usage, object(&group), message)
                    .hint(format!("to say that the source's machine is off, write --unconfirmed {group}")));
            }
            ask(session, &group, &start, advise::Verb::UndoFailback, |group| {
                format!(
                    "Group {group} will run at its target again, as it was there when it switched. What its source wrote since \
                     does not come along. All I/O of the source's disks will be held."
                )
            })
            .await?;
            let request = v1::UndoFailbackRequest {
                group: session.group(&group),
                unconfirmed: unconfirmed.is_some(),
                confirm_name: unconfirmed.unwrap_or_default(),
                validate_only: start.dry_run,
                request_id: start.request_id(),
                reason: start.reason(),
            };
            let started = session.ask(object(&group), session.failovers().undo_failback(request)).await?;
            follow_to_end(session, &group, started, &start).await
        }
        Verb::Status { group } => {
            let request = v1::GetStatusRequest { parent: session.group(&group) };
            let snapshot = session.ask(object(&group), session.status().get_status(request)).await?;
            let status = snapshot.groups.into_iter().next().unwrap_or_default();
            session.out.show(&documents::failback(&status), || shown(&status));
            Ok(())
        }
    }
}

/// Says what is lost and asks, unless it is only checked.
async fn ask(
    session: &Session,
    group: &str,
    start: &Begin,
    verb: advise::Verb,
    loss: impl FnOnce(&str) -> String,
) -> Result<(), Failure> {
    if start.dry_run { Ok(()) } else { advise::confirm(verb, group, session, &loss(group)).await }
}

/// How far a failback is.
fn shown(status: &v1::GroupStatus) -> String {
    let mut shown = fields(&[
        ("group", id(&status.name).to_owned()),
        ("phase", phase_word(status.phase()).to_owned()),
        ("from, to", format!("{} → {}", id(&status.target), id(&status.source))),
    ]);
    match &status.reverse {
        Some(reverse) => shown += &reverse_fields(reverse),
        None => {
            let about = |c: &&v1::Condition| matches!(c.kind.as_str(), "failed-back" | "leftover");
            for condition in status.conditions.iter().filter(about) {
                shown += &format!("{}\n", condition.message);
            }
        }
    }
    if let Some(operation) = &status.operation {
        let (verb, name) = (&operation.verb, id(&operation.name));
        shown += &format!("\n{verb} {name}: {}\n", operation_word(operation.state()));
    }
    shown
}

/// A reverse stream for a person.
pub fn reverse_fields(reverse: &v1::ReverseStatus) -> String {
    let rpo = reverse.rpo.unwrap_or_default();
    fields(&[
        ("ready to switch", if reverse.ready { "yes".to_owned() } else { format!("no: {}", reverse.missing) }),
        ("synchronised", reverse.sync.as_ref().map_or_else(String::new, progress)),
        ("RPO at the source", micros(rpo.now_us)),
        ("written at the view", format!("up to record {}", show_count(reverse.captured_seq))),
        ("at the source", format!("up to record {}", show_count(reverse.durable_seq))),
        ("on the wire", format!("{} in all", show_size(reverse.wire_bytes))),
        ("journal there", show_size(reverse.journal_bytes)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_it_is_is_said_in_lines_that_fit() {
        let sync = v1::SyncProgress { done_bytes: 5, total_bytes: 10, left_ms: Some(4_000), ..Default::default() };
        let reverse = v1::ReverseStatus {
            missing: "synchronising, 5 of 10 bytes, about 4 s left".into(),
            rpo: Some(v1::Rpo { now_us: Some(8_000), ..Default::default() }),
            sync: Some(sync),
            captured_seq: 1_234,
            ..Default::default()
        };
        let status = v1::GroupStatus {
            name: format!("tenants/default/groups/{}", "g".repeat(63)),
            phase: v1::Phase::FailingBack.into(),
            reverse: Some(reverse),
            ..Default::default()
        };
        let text = shown(&status);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        for part in ["failing-back", "no: synchronising", "50 %", "8.00 ms", "1_234"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let back =
            v1::Condition { kind: "failed-back".into(), message: "protected again".into(), ..Default::default() };
        let status = v1::GroupStatus { reverse: None, conditions: vec![back], ..status };
        assert!(shown(&status).contains("protected again"));
    }
}
