//! How the picture is drawn, at any size.

use afterimage_wire::v1::{self, Severity};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState, Wrap};

use super::screen::{Screen, lag, worst};
use crate::operator::documents::{id, rung_word, severity_word};
use crate::operator::output::Mood;
use crate::operator::phase_mood;
use crate::operator::status::{self, micros, phase};
use crate::operator::values::{show_duration, show_rate, show_size, show_time};

/// Rows of proxies at most, so that groups keep most of the room.
const PROXIES: usize = 8;
/// Rows of events.
const EVENTS: u16 = 4;

const KEYS: &str = "q quit  ? keys  enter detail  s sort  i invert";
const HELP: &str = "\
 q, ctrl-c        quit
 up, down, j, k   select a group (page up, page down, home, end)
 enter, esc       all about that group, and back
 c n r p l t      sort by condition, name, RPO, p99, lag, throughput
 s                sort by the next of these
 i                the other way round
 ?                this, and away

 LAG is what the source holds and the target has not acknowledged, in memory and in the spill. LINK is what leaves the
 source. RUNG is the step of the outage ladder: streaming, queueing, spilling, dirty.
 A proxy in brackets is not connected.";

/// Draws it.
pub fn draw(frame: &mut Frame, screen: &mut Screen) {
    let groups = screen.groups();
    let proxies = &screen.snapshot.proxies;
    let proxy_rows = proxies.len().min(PROXIES) as u16 + 1;
    let spare = frame.area().height > proxy_rows + EVENTS + 8;
    let [head, body, below, events, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(if screen.detail || !spare { 0 } else { proxy_rows + 1 }),
        Constraint::Length(if spare { EVENTS } else { 0 }),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(header(screen), head);
    if screen.help {
        frame.render_widget(Paragraph::new(HELP).wrap(Wrap { trim: false }), body);
    } else if let (true, Some(at)) = (screen.detail, screen.place(&groups)) {
        let text = status::one(&groups[at]);
        let most = u16::try_from(text.lines().count()).unwrap_or(u16::MAX).saturating_sub(1);
        screen.scroll = screen.scroll.min(most);
        frame.render_widget(Paragraph::new(plain(&text)).scroll((screen.scroll, 0)), body);
    } else {
        let mut state = TableState::default().with_selected(screen.place(&groups));
        frame.render_stateful_widget(table(&groups, proxies, body), body, &mut state);
    }
    if below.height > 0 {
        frame.render_widget(proxy_table(proxies), below);
    }
    let shown = screen.events.iter().take(events.height.into()).map(event_line).collect::<Vec<_>>();
    frame.render_widget(Paragraph::new(shown), events);
    let sorted = format!("{KEYS}   by {}{}", screen.sort.word(), if screen.inverted { ", inverted" } else { "" });
    frame.render_widget(Paragraph::new(sorted).style(Style::new().add_modifier(Modifier::DIM)), foot);
}

/// Text as a table makes it, without what colours a terminal by itself.
fn plain(text: &str) -> Text<'static> {
    let mut out = String::with_capacity(text.len());
    let mut escape = false;
    for c in text.chars() {
        match c {
            '\u{1b}' => escape = true,
            c if escape => escape = !c.is_ascii_alphabetic(),
            c => out.push(c),
        }
    }
    Text::from(out)
}

fn colour(mood: Mood) -> Style {
    match mood {
        Mood::Good => Style::new().fg(Color::Green),
        Mood::Care => Style::new().fg(Color::Yellow),
        Mood::Bad => Style::new().fg(Color::Red),
        Mood::Plain => Style::new(),
    }
}

fn of_severity(severity: Severity) -> Mood {
    match severity {
        Severity::Error => Mood::Bad,
        Severity::Warning => Mood::Care,
        _ => Mood::Plain,
    }
}

fn header(screen: &Screen) -> Line<'static> {
    if !screen.trouble.is_empty() {
        let text = format!("{} (as it was {})", screen.trouble, show_time(screen.snapshot.time_ns));
        return Line::styled(text, Style::new().fg(Color::Red).add_modifier(Modifier::BOLD));
    }
    let groups = &screen.snapshot.groups;
    let connected = screen.snapshot.proxies.iter().filter(|proxy| proxy.connected).count();
    let wrong = groups.iter().filter(|g| worst(&g.conditions).is_some_and(|c| c.severity() == Severity::Error)).count();
    let rate: f64 = groups.iter().map(|group| group.wire_bytes_per_s).sum();
    let text = format!(
        "afterimage  {}  {} groups, {wrong} in error  {connected} of {} proxies connected  {}",
        show_time(screen.snapshot.time_ns),
        groups.len(),
        screen.snapshot.proxies.len(),
        show_rate(rate)
    );
    Line::styled(text, Style::new().add_modifier(Modifier::BOLD))
}

/// A column: its name, width, and from which width of the screen on it has room.
type Column = (&'static str, Constraint, u16, bool);

const COLUMNS: [Column; 11] = [
    ("GROUP", Constraint::Fill(2), 0, false),
    ("PHASE", Constraint::Length(12), 0, false),
    ("RUNG", Constraint::Length(9), 64, false),
    ("RPO NOW", Constraint::Length(9), 0, true),
    ("P99", Constraint::Length(9), 78, true),
    ("TARGET", Constraint::Length(8), 90, true),
    ("LAG", Constraint::Length(9), 70, true),
    ("WRITES/S", Constraint::Length(8), 120, true),
    ("LINK", Constraint::Length(11), 100, true),
    ("FROM > TO", Constraint::Fill(2), 110, false),
    ("CONDITION", Constraint::Fill(2), 80, false),
];

fn table(groups: &[v1::GroupStatus], proxies: &[v1::Proxy], area: Rect) -> Table<'static> {
    let columns: Vec<(usize, &Column)> =
        COLUMNS.iter().enumerate().filter(|(_, column)| column.2 <= area.width).collect();
    let aligned = |text: String, right: bool| {
        let line = Line::from(text);
        if right { line.right_aligned() } else { line }
    };
    let head = Row::new(columns.iter().map(|(_, (name, _, _, right))| Cell::from(aligned((*name).to_owned(), *right))));
    let rows = groups.iter().map(|group| {
        Row::new(columns.iter().map(|(number, (_, _, _, right))| {
            let (text, mood) = cell(*number, group, proxies);
            let text = if text.is_empty() { "-".to_owned() } else { text };
            Cell::from(aligned(text, *right)).style(colour(mood))
        }))
    });
    Table::new(rows, columns.iter().map(|(_, column)| column.1))
        .header(head.style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
}

fn cell(column: usize, group: &v1::GroupStatus, proxies: &[v1::Proxy]) -> (String, Mood) {
    let rpo = group.rpo.unwrap_or_default();
    let plain = |text: String| (text, Mood::Plain);
    let end = |name: &str| {
        let connected = proxies.iter().any(|proxy| proxy.name == name && proxy.connected);
        if connected { id(name).to_owned() } else { format!("[{}]", id(name)) }
    };
    match COLUMNS[column].0 {
        "GROUP" => plain(id(&group.name).to_owned()),
        "PHASE" => (phase(group), phase_mood(group.phase())),
        "RUNG" => {
            let mood = match group.rung() {
                v1::Rung::Spilling | v1::Rung::Queueing => Mood::Care,
                v1::Rung::Dirty => Mood::Bad,
                _ => Mood::Plain,
            };
            (rung_word(group.rung()).to_owned(), mood)
        }
        "RPO NOW" => {
            let late = rpo.now_us.is_some_and(|now| now > rpo.target_us);
            (micros(rpo.now_us), if late { Mood::Bad } else { Mood::Plain })
        }
        "P99" => plain(micros(rpo.p99_us)),
        "TARGET" => plain(show_duration(rpo.target_us.saturating_mul(1000))),
        "LAG" => plain(show_size(lag(group))),
        "WRITES/S" => plain(format!("{:.0}", group.writes_per_s)),
        "LINK" => plain(show_rate(group.wire_bytes_per_s)),
        "FROM > TO" => plain(format!("{} > {}", end(&group.source), end(&group.target))),
        _ => match worst(&group.conditions) {
            None => plain(String::new()),
            Some(condition) => {
                let more = group.conditions.len() - 1;
                let more = if more > 0 { format!(" +{more}") } else { String::new() };
                (format!("{}{more}", condition.kind), of_severity(condition.severity()))
            }
        },
    }
}

fn proxy_table(proxies: &[v1::Proxy]) -> Table<'static> {
    let mut all: Vec<&v1::Proxy> = proxies.iter().collect();
    // Those that somebody should look at have to be among the few that are shown.
    all.sort_by_key(|p| (p.connected, std::cmp::Reverse(worst(&p.conditions).map_or(0, |c| c.severity() as i32))));
    let rows = all.into_iter().take(PROXIES).map(|proxy| {
        let (word, mood) = if proxy.connected { ("connected", Mood::Good) } else { ("not connected", Mood::Bad) };
        let condition = worst(&proxy.conditions);
        let heard = micros(proxy.last_heard_age_ms.map(|ms| ms.saturating_mul(1000)));
        Row::new([
            Cell::from(id(&proxy.name).to_owned()),
            Cell::from(word).style(colour(mood)),
            Cell::from(if heard.is_empty() { "-".to_owned() } else { heard }),
            Cell::from(proxy.data_address.clone()),
            Cell::from(condition.map_or_else(String::new, |condition| condition.kind.clone()))
                .style(colour(condition.map_or(Mood::Plain, |condition| of_severity(condition.severity())))),
        ])
    });
    let widths =
        [Constraint::Fill(2), Constraint::Length(13), Constraint::Length(9), Constraint::Fill(2), Constraint::Fill(2)];
    let head = Row::new(["PROXY", "STATE", "HEARD", "ADDRESS", "CONDITION"]);
    Table::new(rows, widths).header(head.style(Style::new().add_modifier(Modifier::BOLD)))
}

fn event_line(event: &v1::Event) -> Line<'static> {
    let text = format!(
        "{}  {}  {}: {}",
        show_time(event.time_ns),
        severity_word(event.severity()),
        id(&event.subject),
        event.message
    );
    Line::from(Span::styled(text, colour(of_severity(event.severity()))))
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::KeyCode;

    use super::super::screen::Sort;
    use super::*;

    fn screen() -> Screen {
        let mut screen = Screen::new(Sort::Name);
        let name = |kind: &str, id: &str| format!("tenants/default/{kind}/{id}");
        let condition = |kind: &str, severity: Severity| v1::Condition {
            kind: kind.to_owned(),
            severity: severity.into(),
            ..Default::default()
        };
        screen.snapshot.proxies = vec![
            v1::Proxy { name: name("proxies", "src"), connected: true, ..Default::default() },
            v1::Proxy { name: name("proxies", "dr"), ..Default::default() },
        ];
        screen.snapshot.groups = vec![v1::GroupStatus {
            name: name("groups", "shop"),
            source: name("proxies", "src"),
            target: name("proxies", "dr"),
            phase: v1::Phase::Protected.into(),
            rung: v1::Rung::Spilling.into(),
            rpo: Some(v1::Rpo {
                now_us: Some(4_200_000),
                p99_us: Some(7_000),
                target_us: 1_000_000,
                ..Default::default()
            }),
            queue_bytes: 1 << 20,
            spill_bytes: 1 << 20,
            wire_bytes_per_s: 3_145_728.0,
            conditions: vec![
                condition("target-unreachable", Severity::Error),
                condition("rpo-above-target", Severity::Warning),
            ],
            ..Default::default()
        }];
        screen.happened(v1::Event { message: "something happened".to_owned(), ..Default::default() });
        screen
    }

    fn shown(screen: &mut Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_wide_screen_has_everything_of_a_group() {
        let shown = shown(&mut screen(), 160, 30);
        let words = [
            "shop",
            "protected",
            "spilling",
            "4.20 s",
            "7.00 ms",
            "1 s",
            "2 MiB",
            "3.00 MiB/s",
            "src > [dr]",
            "target-unreachable +1",
            "1 of 2 proxies",
            "1 in error",
            "not connected",
            "something happened",
            "by name",
        ];
        for word in words {
            assert!(shown.contains(word), "{word}\n{shown}");
        }
    }

    #[test]
    fn a_narrow_screen_keeps_what_matters_and_none_is_too_small() {
        let narrow = shown(&mut screen(), 50, 10);
        assert!(narrow.contains("shop") && narrow.contains("4.20 s") && !narrow.contains("WRITES/S"), "{narrow}");
        for (width, height) in [(1, 1), (3, 2), (20, 4), (500, 200)] {
            for key in [None, Some(KeyCode::Enter), Some(KeyCode::Char('?'))] {
                let mut screen = screen();
                key.into_iter().for_each(|key| screen.key(key));
                shown(&mut screen, width, height);
            }
        }
        shown(&mut Screen::new(Sort::Health), 80, 24);
    }

    #[test]
    fn a_detail_is_scrolled_no_further_than_it_goes() {
        let mut screen = screen();
        screen.key(KeyCode::Enter);
        assert!(shown(&mut screen, 100, 40).contains("target-unreachable"));
        screen.key(KeyCode::End);
        shown(&mut screen, 100, 40);
        assert!(screen.scroll < 200, "{}", screen.scroll);
        screen.key(KeyCode::Esc);
        assert!(shown(&mut screen, 100, 40).contains("GROUP"));
    }

    #[test]
    fn a_coordinator_that_is_gone_is_said() {
        let mut screen = screen();
        screen.trouble = "the coordinator has stopped".to_owned();
        let shown = shown(&mut screen, 100, 24);
        assert!(shown.contains("has stopped") && shown.contains("shop"), "{shown}");
    }
}
