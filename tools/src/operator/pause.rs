//! `afterimage group pause` and `resume`: nothing of a group is sent, until it is.

use std::time::Duration;

use afterimage_wire::v1;
use clap::Args;
use tokio::time::Instant;
use uuid::Uuid;

use super::advise::standing;
use super::documents::{self, id};
use super::failure::Failure;
use super::group::{get, object};
use super::output::fields;
use super::session::Session;
use super::values::show_time;

/// How long the source is waited for, to say that it sends nothing.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks.
const POLL: Duration = Duration::from_millis(200);

/// Options of `afterimage group pause`.
#[derive(Args, Debug)]
pub struct Pause {
    /// The group's name.
    group: String,
    /// For people: shown in the status until it is resumed.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Check only.
    #[arg(long)]
    dry_run: bool,
}

/// Options of `afterimage group resume`.
#[derive(Args, Debug)]
pub struct Resume {
    /// The group's name.
    group: String,
    /// Check only.
    #[arg(long)]
    dry_run: bool,
}

/// Pauses it, and waits until its source says so, if that is there.
pub async fn pause(args: Pause, session: &Session) -> Result<(), Failure> {
    let Pause { group, reason, dry_run } = args;
    let request = v1::PauseGroupRequest {
        name: session.group(&group),
        reason: reason.unwrap_or_default(),
        validate_only: dry_run,
        request_id: Uuid::new_v4().to_string(),
        ..Default::default()
    };
    let mut made = session.ask(object(&group), session.groups().pause_group(request)).await?;
    let mut there = true;
    if !dry_run {
        let until = Instant::now() + CONFIRMED_WITHIN;
        loop {
            let standing = standing(session, &group).await?;
            there = standing.seen.source;
            made.pause.clone_from(&standing.status.pause);
            let confirmed = made.pause.as_ref().is_none_or(|pause| pause.confirmed);
            if confirmed || !there || Instant::now() >= until {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
    }
    let confirmed = made.pause.as_ref().is_some_and(|pause| pause.confirmed);
    session.out.show(&documents::group(&made), || shown(&made));
    if !dry_run {
        session.out.note(&match (confirmed, there) {
            (true, _) => format!("its hosts go on; let it go on with: afterimage group resume {group}"),
            (false, true) => {
                format!("{} has not said yet that it sends nothing: afterimage status {group}", id(&made.source))
            }
            (false, false) => format!("{} is not connected; it is told when it is back", id(&made.source)),
        });
    }
    Ok(())
}

/// Resumes it.
pub async fn resume(args: Resume, session: &Session) -> Result<(), Failure> {
    let Resume { group, dry_run } = args;
    let before = get(session, &group).await?;
    let request = v1::ResumeGroupRequest {
        name: before.name,
        validate_only: dry_run,
        request_id: Uuid::new_v4().to_string(),
        ..Default::default()
    };
    let made = session.ask(object(&group), session.groups().resume_group(request)).await?;
    session.out.show(&documents::group(&made), || shown(&made));
    if !dry_run {
        session.out.note(&match before.pause {
            Some(pause) => {
                let since = show_time(pause.time_ns);
                format!("what was written since {since} is on its way; watch it: afterimage watch {group}")
            }
            None => "it was not paused".to_owned(),
        });
    }
    Ok(())
}

/// Since when and by whom, for a person; empty if it is not paused.
pub fn told(pause: Option<&v1::Pause>) -> String {
    let Some(pause) = pause else { return String::new() };
    let reason = if pause.reason.is_empty() { String::new() } else { format!(": {}", pause.reason) };
    format!("since {} by {}{reason}", show_time(pause.time_ns), pause.by)
}

fn shown(group: &v1::Group) -> String {
    let pause = told(group.pause.as_ref());
    fields(&[
        ("group", id(&group.name).to_owned()),
        ("phase", documents::phase_word(group.phase()).to_owned()),
        ("paused", if pause.is_empty() { "no".to_owned() } else { pause }),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_told_with_who_and_why() {
        assert_eq!(told(None), "");
        let pause = v1::Pause { by: "operator/anna".into(), reason: "new switch".into(), ..Default::default() };
        assert!(told(Some(&pause)).ends_with("by operator/anna: new switch"));
        let group = v1::Group { pause: Some(pause), ..Default::default() };
        assert!(shown(&group).contains("new switch") && shown(&v1::Group::default()).contains("no"));
    }
}
