//! `afterimage top`: groups and proxies, live, on a terminal; once and plain where there is none.
//!
//! What is known ([`Screen`]) and how it is drawn ([`mod@draw`]) know nothing of the terminal, so that both can be tested. The
//! terminal is given back however this ends: by a key, a signal, an error ([`Terminal`]) or a panic (ratatui's hook).

use std::time::Duration;

use afterimage_wire::v1::{self, watch_response::Update};
use clap::{Args, ValueEnum};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::documents;
use super::failure::{Failure, Kind};
use super::session::Session;
use super::status;
use super::values::duration_ns;

mod draw;
mod screen;

use draw::draw;
use screen::{Screen, Sort};

/// Keys that may wait.
const KEYS: usize = 32;
/// How long one look for a key takes: so long the reader outlives the picture at most.
const LOOK: Duration = Duration::from_millis(100);
/// Pause before a coordinator that is gone is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Options of `afterimage top`.
#[derive(Args, Debug)]
pub struct Top {
    /// Time between two states, 100ms to 1m.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration_ns)]
    interval: u64,
    /// What groups are sorted by at first.
    #[arg(long, value_enum, default_value_t = Sort::Health)]
    sort: Sort,
}

/// Shows it until `q`.
///
/// # Errors
/// The coordinator refuses, or cannot be reached at first; the terminal fails.
pub async fn run(args: Top, session: &Session) -> Result<(), Failure> {
    if !session.out.live() {
        return once(args.sort, session).await;
    }
    // The first state comes before the terminal is taken: what is wrong from the start is said as by any command.
    let mut screen = Screen::new(args.sort);
    screen.snapshot = snapshot(session).await?;
    let mut terminal = Terminal::take()?;
    live(&args, session, &mut screen, &mut terminal).await
}

async fn snapshot(session: &Session) -> Result<v1::StatusSnapshot, Failure> {
    let request = v1::GetStatusRequest { parent: session.tenant() };
    session.ask("status", session.status().get_status(request)).await
}

async fn once(sort: Sort, session: &Session) -> Result<(), Failure> {
    let mut snapshot = snapshot(session).await?;
    screen::sort(&mut snapshot.groups, sort, false);
    session.out.show(&documents::status(&snapshot), || status::all(&snapshot));
    Ok(())
}

/// The terminal, while it is ours.
struct Terminal(DefaultTerminal);

impl Terminal {
    fn take() -> Result<Self, Failure> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                ratatui::restore();
                Err(failed(&error))
            }
        }
    }

    fn draw(&mut self, screen: &mut Screen) -> Result<(), Failure> {
        self.0.draw(|frame| draw(frame, screen)).map(drop).map_err(|error| failed(&error))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

fn failed(error: &std::io::Error) -> Failure {
    Failure::new(Kind::Failed, "terminal", error.to_string()).hint("afterimage status shows the same once")
}

/// Reads keys on a thread of its own, as that blocks; it ends when nobody listens.
fn keys() -> mpsc::Receiver<Event> {
    let (tell, told) = mpsc::channel(KEYS);
    std::thread::spawn(move || {
        while !tell.is_closed() {
            match event::poll(LOOK) {
                Ok(false) => {}
                // One that does not fit is passed over: a picture is not a text.
                Ok(true) => match event::read() {
                    Ok(event) => drop(tell.try_send(event)),
                    Err(_) => return,
                },
                Err(_) => return,
            }
        }
    });
    told
}

async fn live(args: &Top, session: &Session, screen: &mut Screen, terminal: &mut Terminal) -> Result<(), Failure> {
    let caught = |error: std::io::Error| failed(&error);
    let mut terminate = signal(SignalKind::terminate()).map_err(caught)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(caught)?;
    let mut keys = keys();
    let mut newer: Option<Session> = None;
    loop {
        let session = newer.as_ref().unwrap_or(session);
        let ended = tokio::select! {
            ended = follow(args, session, screen, terminal, &mut keys) => ended,
            _ = terminate.recv() => return Ok(()),
            _ = hangup.recv() => return Ok(()),
        };
        match ended? {
            Ended::Quit => return Ok(()),
            Ended::Lost(why) => screen.trouble = why,
            Ended::Due => {}
        }
        terminal.draw(screen)?;
        // Keys go on meanwhile.
        let again = async {
            if !screen.trouble.is_empty() {
                tokio::time::sleep(AGAIN).await;
            }
            session.again().await
        };
        tokio::select! {
            opened = again => match opened {
                Ok(opened) => newer = Some(opened),
                Err(failure) if failure.kind == Kind::Unreachable => {}
                Err(failure) => return Err(failure),
            },
            key = keys.recv() => if key.is_none_or(|key| quits(&key)) { return Ok(()) },
            _ = terminate.recv() => return Ok(()),
            _ = hangup.recv() => return Ok(()),
        }
    }
}

/// Why a stream of states ended.
enum Ended {
    /// By a key.
    Quit,
    /// The coordinator is gone.
    Lost(String),
    /// Another certificate is due.
    Due,
}

async fn follow(
    args: &Top,
    session: &Session,
    screen: &mut Screen,
    terminal: &mut Terminal,
    keys: &mut mpsc::Receiver<Event>,
) -> Result<Ended, Failure> {
    let interval_ms = u32::try_from(args.interval / 1_000_000).unwrap_or(u32::MAX);
    let request = v1::WatchRequest { parent: session.tenant(), interval_ms, ..Default::default() };
    let lost = |failure: Failure| match failure.kind {
        Kind::Unreachable => Ok(Ended::Lost(failure.to_string().lines().next().unwrap_or_default().to_owned())),
        _ => Err(failure),
    };
    let mut updates = match session.ask("top", session.status().watch(request)).await {
        Ok(updates) => updates,
        Err(failure) => return lost(failure),
    };
    screen.trouble.clear();
    let mut due = std::pin::pin!(session.due());
    terminal.draw(screen)?;
    loop {
        tokio::select! {
            message = updates.message() => match message {
                Ok(Some(v1::WatchResponse { update: Some(Update::Status(snapshot)), .. })) => screen.snapshot = snapshot,
                Ok(Some(v1::WatchResponse { update: Some(Update::Event(event)), .. })) => screen.happened(event),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(Ended::Lost("the coordinator has stopped".to_owned())),
                Err(status) => return lost(session.answered("top", &status)),
            },
            key = keys.recv() => match key {
                None => return Ok(Ended::Quit),
                Some(key) if quits(&key) => return Ok(Ended::Quit),
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => screen.key(key.code),
                // Another size: drawn anew.
                Some(_) => {}
            },
            () = &mut due => return Ok(Ended::Due),
        }
        terminal.draw(screen)?;
    }
}

fn quits(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let interrupt = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
    interrupt || key.code == KeyCode::Char('q')
}

impl ValueEnum for Sort {
    fn value_variants<'a>() -> &'a [Self] {
        &Sort::ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.word()))
    }
}
