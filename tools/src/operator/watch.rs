//! `afterimage watch` and `afterimage events`: what happens, as it happens. On a terminal a picture that renews itself;
//! elsewhere a line for each group at each interval, and one for each event.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use afterimage_wire::v1::{self, Severity, watch_response::Update};
use clap::Args;

use super::documents::{self, id, rung_word, severity_word};
use super::failure::{Failure, Kind};
use super::group::object;
use super::output::{line, put, width};
use super::session::{Recent, Session};
use super::status::{groups, micros, notes, phase};
use super::values::{duration_ns, show_count, show_rate, show_size, show_time};

/// Events kept in the picture.
const PICTURE_EVENTS: usize = 8;

/// Pause before a coordinator that is gone is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Options of `afterimage watch`.
#[derive(Args, Debug)]
pub struct Watch {
    /// Only this group.
    pub group: Option<String>,
    /// Time between two states, 100ms to 1m.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration_ns)]
    pub interval: u64,
    /// End after this long [default: when stopped].
    #[arg(long = "for", value_name = "DURATION", value_parser = duration_ns)]
    pub at_most: Option<u64>,
    /// Only events, no states.
    #[arg(long)]
    pub events: bool,
    /// Go on after this token, from an earlier watch's JSON: the events since then come first.
    #[arg(long, value_name = "TOKEN")]
    pub resume: Option<String>,
}

/// Watches until stopped.
pub async fn run(args: Watch, session: &Session) -> Result<(), Failure> {
    let until = args.at_most.map(|ns| Instant::now() + Duration::from_nanos(ns));
    let mut resume = args.resume.clone().unwrap_or_default();
    let mut picture = (session.out.live() && !args.events).then(Picture::default);
    let mut newer: Option<Session> = None;
    loop {
        let session = newer.as_ref().unwrap_or(session);
        let ended = match until {
            None => stream(&args, session, &mut picture, &mut resume).await,
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                match tokio::time::timeout(left, stream(&args, session, &mut picture, &mut resume)).await {
                    Ok(ended) => ended,
                    Err(_) => return Ok(()),
                }
            }
        };
        match (ended, &mut picture) {
            // A session goes on behind where the one before was.
            (Ok(()), _) => match session.again().await {
                Ok(opened) => newer = Some(opened),
                Err(failure) if failure.kind == Kind::Unreachable => tokio::time::sleep(AGAIN).await,
                Err(failure) => return Err(failure),
            },
            // Somebody who looks at a picture wants to see the coordinator come back; a program wants to know.
            (Err(failure), Some(picture)) if failure.kind == Kind::Unreachable && picture.status.time_ns > 0 => {
                picture.trouble = format!("{failure}").lines().next().unwrap_or_default().to_owned();
                picture.draw();
                tokio::time::sleep(AGAIN).await;
            }
            (ended, _) => return ended,
        }
    }
}

/// Shows what comes, until it ends: which is a failure, as it does not end by itself; or until another certificate is due.
async fn stream(
    args: &Watch,
    session: &Session,
    picture: &mut Option<Picture>,
    resume: &mut String,
) -> Result<(), Failure> {
    let parent = args.group.as_ref().map_or_else(|| session.tenant(), |group| session.group(group));
    let about = args.group.as_deref().map_or_else(|| "watch".to_owned(), object);
    let interval_ms = u32::try_from(args.interval / 1_000_000).unwrap_or(u32::MAX);
    let request = v1::WatchRequest { parent, interval_ms, events_only: args.events, resume_token: resume.clone() };
    let mut updates = session.ask(&about, session.status().watch(request)).await?;
    let mut due = std::pin::pin!(session.due());
    loop {
        let message = tokio::select! {
            message = updates.message() => message,
            () = &mut due => return Ok(()),
        };
        match message {
            Ok(Some(v1::WatchResponse { update: Some(update), resume_token, gap })) => {
                resume.clone_from(&resume_token);
                match picture {
                    Some(picture) => picture.update(update),
                    None => tell(&update, session.out.json, &resume_token, gap),
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => {
                return Err(Failure::new(
                    Kind::Unreachable,
                    format!("coordinator {}", session.endpoint()),
                    "it has ended the watch, as it does when it stops",
                ));
            }
            Err(status) => return Err(session.answered(about, &status)),
        }
    }
}

/// Shows recent events.
pub async fn events(args: Recent, session: &Session) -> Result<(), Failure> {
    let mut found: VecDeque<v1::Event> = VecDeque::new();
    let mut request = v1::ListEventsRequest {
        parent: session.tenant(),
        from_number: args.from,
        page_size: 1000,
        filter: args.which.filter,
        ..Default::default()
    };
    loop {
        let page = session.ask("events", session.status().list_events(request.clone())).await?;
        found.extend(page.events);
        while args.limit > 0 && found.len() > args.limit as usize {
            found.pop_front();
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let document = found.iter().map(documents::event).collect::<Vec<_>>();
    session.out.show(&serde_json::json!({"events": document}), || {
        if found.is_empty() {
            return "no events".to_owned();
        }
        found.iter().map(|event| event_line(event) + "\n").collect()
    });
    Ok(())
}

/// Writes an update as lines.
fn tell(update: &Update, json: bool, resume_token: &str, gap: bool) {
    let typed = |kind: &str, document| typed(kind, document, resume_token, gap);
    if gap && !json {
        line("some events have been missed: they are not kept any more");
    }
    match (update, json) {
        (Update::Status(status), true) => line(&typed("status", documents::status(status))),
        (Update::Event(event), true) => line(&typed("event", documents::event(event))),
        (Update::Status(status), false) => {
            for group in &status.groups {
                line(&group_line(status.time_ns, group));
            }
        }
        (Update::Event(event), false) => line(&event_line(event)),
    }
}

/// A line of JSON that says what it is.
fn typed(kind: &str, mut document: serde_json::Value, resume_token: &str, gap: bool) -> String {
    document["type"] = kind.into();
    document["resume_token"] = resume_token.into();
    document["gap"] = gap.into();
    document.to_string()
}

fn group_line(time_ns: u64, group: &v1::GroupStatus) -> String {
    let rpo = group.rpo.unwrap_or_default();
    let known = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    format!(
        "{}  {}  {}  {}  rpo {}  p99 {}  {} writes/s  {} captured  {} on wire  {} queued",
        show_time(time_ns),
        id(&group.name),
        phase(group),
        rung_word(group.rung()),
        known(micros(rpo.now_us)),
        known(micros(rpo.p99_us)),
        show_count(group.writes_per_s.round() as u64),
        show_rate(group.captured_bytes_per_s),
        show_rate(group.wire_bytes_per_s),
        show_size(group.queue_bytes),
    )
}

fn event_line(event: &v1::Event) -> String {
    let mark = match event.severity() {
        Severity::Error | Severity::Warning => severity_word(event.severity()),
        _ => "event",
    };
    format!("{}  {}  {mark}  {}: {}", show_time(event.time_ns), id(&event.subject), event.kind, event.message)
}

/// What is drawn again and again on a terminal.
#[derive(Default)]
struct Picture {
    status: v1::StatusSnapshot,
    events: VecDeque<v1::Event>,
    /// Why nothing new comes; empty if it does.
    trouble: String,
    /// Lines of the last drawing, to go back over.
    drawn: usize,
}

impl Picture {
    fn update(&mut self, update: Update) {
        self.trouble.clear();
        match update {
            Update::Status(status) => self.status = status,
            Update::Event(event) => {
                if self.events.len() == PICTURE_EVENTS {
                    self.events.pop_front();
                }
                self.events.push_back(event);
            }
        }
        self.draw();
    }

    fn draw(&mut self) {
        let text = self.text();
        // Up to the first line of the last drawing, then clear to the end of the screen: no flicker, and what was on
        // the terminal before stays above.
        let back = if self.drawn > 0 { format!("\x1b[{}A\r\x1b[J", self.drawn) } else { String::new() };
        self.drawn = text.lines().count();
        put(&(back + &text));
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n", show_time(self.status.time_ns));
        text += &if self.trouble.is_empty() { "\n".to_owned() } else { cut(&self.trouble) };
        if self.status.groups.is_empty() {
            text += "no groups\n";
        } else {
            text += &groups(&self.status.groups);
        }
        for group in &self.status.groups {
            if let Some(v1::PointSummary { oldest: Some(oldest), newest: Some(newest), count, .. }) = &group.points {
                text += &cut(&format!(
                    "{}: {} restore points, {} to {}",
                    id(&group.name),
                    show_count(*count),
                    show_time(oldest.wall_ns),
                    show_time(newest.wall_ns)
                ));
            }
        }
        text.extend(notes(&self.status).lines().map(cut));
        if !self.events.is_empty() {
            text += "\n";
        }
        for event in &self.events {
            text += &cut(&event_line(event));
        }
        text
    }
}

/// A line no wider than the terminal: one that wraps would count as two when going back over it.
fn cut(line: &str) -> String {
    let most = usize::from(width());
    if line.chars().count() <= most {
        return format!("{line}\n");
    }
    line.chars().take(most.saturating_sub(1)).chain(['…', '\n']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_says_what_it_is() {
        let event = v1::Event { number: 7, kind: "phase".into(), ..Default::default() };
        let document: serde_json::Value =
            serde_json::from_str(&typed("event", documents::event(&event), "t", false)).unwrap();
        assert_eq!(document["type"], "event");
        assert_eq!(document["number"], 7);
    }

    #[test]
    fn the_picture_fits_100_columns_and_keeps_the_last_events() {
        let mut picture = Picture::default();
        picture.status.groups.push(v1::GroupStatus { name: "g".repeat(200), ..Default::default() });
        for number in 0..20 {
            picture.events.push_back(v1::Event { number, message: "m".repeat(300), ..Default::default() });
        }
        let text = picture.text();
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn a_plain_line_has_all_its_units() {
        let group = v1::GroupStatus {
            name: "tenants/default/groups/shop".into(),
            phase: v1::Phase::Protected.into(),
            rung: v1::Rung::Streaming.into(),
            rpo: Some(v1::Rpo { now_us: Some(4_200), ..Default::default() }),
            writes_per_s: 1234.4,
            captured_bytes_per_s: 5_242_880.0,
            ..Default::default()
        };
        let text = group_line(1_700_000_000_000_000_000, &group);
        assert!(
            text.ends_with(
                "shop  protected  streaming  rpo 4.20 ms  p99 -  1_234 writes/s  5.00 MiB/s captured  0 MiB/s on wire  0 B queued"
            ),
            "{text}"
        );
    }
}
