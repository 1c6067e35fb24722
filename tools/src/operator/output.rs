//! How a command speaks: tables for people, at most 100 columns wide; JSON for programs, one document for a command
//! that ends and one line for each event of one that goes on.

use std::io::{BufRead, IsTerminal, Write};

use comfy_table::{Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table, presets};

use super::failure::{Failure, Kind};

/// Widest a table gets, columns, however wide the terminal is.
pub const MAX_WIDTH: u16 = 100;

/// Narrowest a table gets, columns: below this, wrapping makes it unreadable and the terminal may as well do it.
const MIN_WIDTH: u16 = 40;

/// Where a command's results go.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// Programs read this.
    pub json: bool,
    /// No question is asked before something is lost.
    pub yes: bool,
}

impl Output {
    /// A result: `document` under `--json`, else what `text` makes.
    pub fn show(&self, document: &serde_json::Value, text: impl FnOnce() -> String) {
        if self.json { line(&document.to_string()) } else { line(text().trim_end()) }
    }

    /// Something for people only, such as what to do next.
    pub fn note(&self, text: &str) {
        if !self.json {
            line(text);
        }
    }

    /// Whether a live picture can be drawn.
    pub fn live(&self) -> bool {
        !self.json && std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
    }

    /// Says what would be lost and asks. Without a terminal to ask on, only `--yes` is a yes.
    pub fn confirm(&self, object: &str, loss: &str) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        let refused = |message: String| {
            Err(Failure::new(Kind::Refused, object, message).hint("add --yes to go on without being asked"))
        };
        if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return refused(format!("{loss}\nNot done: this needs a yes, and there is no terminal to ask on."));
        }
        let mut asked = std::io::stderr().lock();
        let mut answer = String::new();
        let heard = write!(asked, "{loss}\nType yes to go on: ")
            .and_then(|()| asked.flush())
            .and_then(|()| std::io::stdin().lock().read_line(&mut answer));
        match heard {
            Ok(_) if answer.trim().eq_ignore_ascii_case("yes") => Ok(()),
            _ => refused("not done: the answer was not yes".to_owned()),
        }
    }
}

/// Writes one line to standard output. A reader that has gone (`… | head`) ends the process quietly, as with any
/// command of Unix.
pub fn line(text: &str) {
    put(&format!("{text}\n"));
}

/// Writes to standard output as it is.
pub fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        std::process::exit(if error.kind() == std::io::ErrorKind::BrokenPipe { 0 } else { 1 });
    }
}

/// Columns to use: those of the terminal, at most [`MAX_WIDTH`].
pub fn width() -> u16 {
    // Terminals that do not know their size say 0.
    let known = Table::new().width().filter(|width| *width >= MIN_WIDTH);
    known.unwrap_or(MAX_WIDTH).min(MAX_WIDTH)
}

/// A table as text, within the terminal and [`MAX_WIDTH`]. A column whose name begins with `>` holds quantities and is
/// set to the right, so that digits stand below each other; one whose name begins with `=` is never wrapped, so that it
/// can be copied.
pub fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<Cell>>) -> String {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    render(&mut Table::new(), width(), colour, head, rows)
}

fn render(
    table: &mut Table,
    width: u16,
    colour: bool,
    head: &[&str],
    rows: impl IntoIterator<Item = Vec<Cell>>,
) -> String {
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    if colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table.set_header(
        head.iter().map(|name| Cell::new(name.trim_start_matches(['>', '='])).add_attribute(Attribute::Bold)),
    );
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        // Columns stand apart by two spaces, and the first begins where the line does.
        let left = u16::from(column.index > 0);
        column.set_padding((left, 1));
        if head.get(column.index).is_some_and(|name| name.starts_with('>')) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        if head.get(column.index).is_some_and(|name| name.starts_with('=')) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    // Trailing spaces would wrap on a terminal that is exactly as wide, and are noise in a pipe.
    table.lines().map(|l| l.trim_end().to_owned() + "\n").collect()
}

/// A plain cell.
pub fn text(value: impl Into<String>) -> Cell {
    let value = value.into();
    Cell::new(if value.is_empty() { "-".to_owned() } else { value })
}

/// How a state is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// As it should be.
    Good,
    /// On its way, or short of what was asked for.
    Care,
    /// Somebody must look.
    Bad,
    /// Neither.
    Plain,
}

/// A state, in the colour of its mood.
pub fn state(value: impl Into<String>, mood: Mood) -> Cell {
    let cell = text(value);
    match mood {
        Mood::Good => cell.fg(Color::Green),
        Mood::Care => cell.fg(Color::Yellow),
        Mood::Bad => cell.fg(Color::Red),
        Mood::Plain => cell,
    }
}

/// Names and values of one object, values below each other: a line each, or more where a value has more words than fit.
pub fn fields(fields: &[(&str, String)]) -> String {
    let widest = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let room = usize::from(width()).saturating_sub(widest + 2);
    let shown = |(name, value): &(&str, String)| {
        let lines = folded(if value.is_empty() { "-" } else { value }, room);
        let names = std::iter::once(*name).chain(std::iter::repeat(""));
        lines.iter().zip(names).map(|(line, name)| format!("{name:widest$}  {line}\n")).collect::<String>()
    };
    fields.iter().map(shown).collect()
}

/// Lines of at most so many characters, broken between words; a word that is longer stays whole, so that it can be copied.
fn folded(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_go_on_below_themselves() {
        let shown = fields(&[("uid", "u".repeat(120)), ("placed at", "some words ".repeat(20).trim_end().to_owned())]);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0].len(), 131, "what is one word stays one: {shown}");
        assert!(lines.len() > 3 && lines[1..].iter().all(|line| line.len() <= usize::from(MAX_WIDTH)), "{shown}");
        assert!(lines[2].starts_with("           "), "{shown}");
        assert_eq!(folded("a  b", 10), ["a  b"]);
    }

    fn widths(text: &str) -> usize {
        text.lines().map(|l| l.chars().count()).max().unwrap_or(0)
    }

    #[test]
    fn a_table_stays_within_its_width_whatever_is_in_it() {
        let long = "a-very-long-name-of-a-group-".repeat(12);
        let row = || vec![text(long.clone()), text("123456789"), state(long.clone(), Mood::Bad), text("x")];
        for width in [40, 80, 100] {
            let shown =
                render(&mut Table::new(), width, false, &["GROUP", ">RPO NOW", "STATE", "NOTE"], vec![row(), row()]);
            assert!(widths(&shown) <= usize::from(width), "{width}: {}\n{shown}", widths(&shown));
            assert!(!shown.contains('\u{1b}'), "colour where none was asked for");
        }
    }

    #[test]
    fn a_narrow_table_takes_only_the_room_it_needs() {
        let shown = render(&mut Table::new(), 100, false, &["NAME", ">SIZE"], vec![vec![text("db"), text("1 GiB")]]);
        assert_eq!(shown, "NAME   SIZE\ndb    1 GiB\n");
    }

    #[test]
    fn what_is_to_be_copied_is_not_wrapped() {
        let id = "3c0e5f0a-94a7-4a52-9d29-1b7f5d3f6f11";
        let row = vec![text(id), text("word ".repeat(30))];
        let shown = render(&mut Table::new(), 60, false, &["=ID", "TEXT"], [row]);
        assert!(shown.contains(id), "{shown}");
        assert!(widths(&shown) <= 60, "{shown}");
    }

    #[test]
    fn an_empty_value_is_shown_as_a_dash() {
        let shown = render(&mut Table::new(), 100, false, &["A", "B"], vec![vec![text(""), text("b")]]);
        assert!(shown.lines().nth(1).unwrap().starts_with('-'), "{shown}");
        assert_eq!(fields(&[("name", String::new())]), "name  -\n");
    }

    #[test]
    fn fields_stand_below_each_other() {
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }

    #[test]
    fn without_a_terminal_only_yes_is_a_yes() {
        assert!(Output { json: false, yes: true }.confirm("group \"db\"", "all of it").is_ok());
        // Test runners have no terminal on standard input or capture standard error.
        if !std::io::stdin().is_terminal() {
            let refused = Output { json: false, yes: false }.confirm("group \"db\"", "all of it").unwrap_err();
            assert_eq!(refused.kind, Kind::Refused);
            assert!(refused.to_string().contains("all of it") && refused.to_string().contains("--yes"));
        }
    }
}
