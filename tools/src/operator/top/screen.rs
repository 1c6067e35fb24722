//! What the picture shows: the newest state, how it is sorted, what is selected; and what keys do to that.

use std::cmp::Reverse;
use std::collections::VecDeque;

use afterimage_wire::v1::{self, Severity};
use ratatui::crossterm::event::KeyCode;

/// Events that are kept for the picture.
const EVENTS: usize = 64;

/// What groups are sorted by: the first is the one that somebody should look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// What is wrong comes first, then how near the RPO is to its target.
    Health,
    /// By name.
    Name,
    /// The largest RPO now.
    Rpo,
    /// The largest p99.
    P99,
    /// What waits, bytes.
    Lag,
    /// What is sent, bytes a second.
    Rate,
}

impl Sort {
    /// All, in the order in which a key goes through them.
    pub const ALL: [Self; 6] = [Self::Health, Self::Name, Self::Rpo, Self::P99, Self::Lag, Self::Rate];

    /// As it is typed and shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Health => "health",
            Self::Name => "name",
            Self::Rpo => "rpo",
            Self::P99 => "p99",
            Self::Lag => "lag",
            Self::Rate => "rate",
        }
    }
}

/// Bytes that the source holds and the target has not.
pub fn lag(group: &v1::GroupStatus) -> u64 {
    group.queue_bytes.saturating_add(group.spill_bytes)
}

/// The worst of some conditions.
pub fn worst(conditions: &[v1::Condition]) -> Option<&v1::Condition> {
    conditions.iter().max_by_key(|condition| condition.severity() as i32)
}

fn severity(group: &v1::GroupStatus) -> i32 {
    worst(&group.conditions).map_or(Severity::Unspecified as i32, |condition| condition.severity() as i32)
}

/// Sorts groups; the name decides between those that are alike. What is not known is as good as the worst.
pub fn sort(groups: &mut [v1::GroupStatus], by: Sort, inverted: bool) {
    let now = |group: &v1::GroupStatus| group.rpo.and_then(|rpo| rpo.now_us).unwrap_or(u64::MAX);
    groups.sort_by(|a, b| a.name.cmp(&b.name));
    match by {
        Sort::Name => {}
        Sort::Health => groups.sort_by_key(|group| {
            let target = group.rpo.map_or(1, |rpo| rpo.target_us.max(1));
            Reverse((severity(group), now(group) / (target / 1000).max(1)))
        }),
        Sort::Rpo => groups.sort_by_key(|group| Reverse(now(group))),
        Sort::P99 => groups.sort_by_key(|g| Reverse(g.rpo.and_then(|rpo| rpo.p99_us).unwrap_or(u64::MAX))),
        Sort::Lag => groups.sort_by_key(|group| Reverse(lag(group))),
        Sort::Rate => groups.sort_by(|a, b| b.wire_bytes_per_s.total_cmp(&a.wire_bytes_per_s)),
    }
    if inverted {
        groups.reverse();
    }
}

/// What is known, and how it is looked at.
pub struct Screen {
    /// The newest state.
    pub snapshot: v1::StatusSnapshot,
    /// Why it is not newer; empty if it is.
    pub trouble: String,
    /// The newest events, the newest first.
    pub events: VecDeque<v1::Event>,
    /// What groups are sorted by.
    pub sort: Sort,
    /// The other way round.
    pub inverted: bool,
    /// Name of the group that is selected: it stays so when it moves.
    pub selected: String,
    /// One group is shown, with all that is known of it.
    pub detail: bool,
    /// The keys are explained.
    pub help: bool,
    /// Lines of the detail that are scrolled over.
    pub scroll: u16,
}

impl Screen {
    /// Nothing is known yet.
    pub fn new(sort: Sort) -> Self {
        Self {
            snapshot: v1::StatusSnapshot::default(),
            trouble: String::new(),
            events: VecDeque::new(),
            sort,
            inverted: false,
            selected: String::new(),
            detail: false,
            help: false,
            scroll: 0,
        }
    }

    /// The groups as they are sorted now.
    pub fn groups(&self) -> Vec<v1::GroupStatus> {
        let mut groups = self.snapshot.groups.clone();
        sort(&mut groups, self.sort, self.inverted);
        groups
    }

    /// Which of those is selected: the first, if the one that was is gone.
    pub fn place(&self, groups: &[v1::GroupStatus]) -> Option<usize> {
        let found = groups.iter().position(|group| group.name == self.selected);
        found.or((!groups.is_empty()).then_some(0))
    }

    /// Something has happened.
    pub fn happened(&mut self, event: v1::Event) {
        self.events.push_front(event);
        self.events.truncate(EVENTS);
    }

    /// What a key does.
    pub fn key(&mut self, key: KeyCode) {
        let by = |sort: Sort| Some(sort);
        let chosen = match key {
            KeyCode::Char('c') => by(Sort::Health),
            KeyCode::Char('n') => by(Sort::Name),
            KeyCode::Char('r') => by(Sort::Rpo),
            KeyCode::Char('p') => by(Sort::P99),
            KeyCode::Char('l') => by(Sort::Lag),
            KeyCode::Char('t') => by(Sort::Rate),
            KeyCode::Char('s') => {
                let at = Sort::ALL.iter().position(|sort| *sort == self.sort).unwrap_or(0);
                by(Sort::ALL[(at + 1) % Sort::ALL.len()])
            }
            _ => None,
        };
        if let Some(sort) = chosen {
            self.sort = sort;
            return;
        }
        match key {
            KeyCode::Char('i') => self.inverted = !self.inverted,
            KeyCode::Char('?' | 'h') => self.help = !self.help,
            KeyCode::Enter => (self.detail, self.scroll) = (true, 0),
            KeyCode::Esc | KeyCode::Backspace => {
                if self.help {
                    self.help = false;
                } else {
                    self.detail = false;
                }
            }
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::PageDown => self.step(10),
            KeyCode::PageUp => self.step(-10),
            KeyCode::Home => self.step(isize::MIN),
            KeyCode::End => self.step(isize::MAX),
            _ => {}
        }
    }

    fn step(&mut self, by: isize) {
        if self.detail {
            let by = i32::try_from(by.clamp(-1000, 1000)).unwrap_or(0);
            self.scroll = u16::try_from((i32::from(self.scroll) + by).max(0)).unwrap_or(0);
            return;
        }
        let groups = self.groups();
        if let (Some(at), Some(last)) = (self.place(&groups), groups.len().checked_sub(1)) {
            let to = at.saturating_add_signed(by).min(last);
            self.selected.clone_from(&groups[to].name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, now: Option<u64>, queue: u64, severity: Severity) -> v1::GroupStatus {
        let condition = v1::Condition { severity: severity.into(), kind: "k".to_owned(), ..Default::default() };
        v1::GroupStatus {
            name: format!("tenants/default/groups/{name}"),
            rpo: Some(v1::Rpo { now_us: now, target_us: 1_000_000, ..Default::default() }),
            queue_bytes: queue,
            conditions: if severity == Severity::Unspecified { vec![] } else { vec![condition] },
            ..Default::default()
        }
    }

    fn screen() -> Screen {
        let mut screen = Screen::new(Sort::Name);
        screen.snapshot.groups = vec![
            group("b", Some(10_000), 5, Severity::Unspecified),
            group("a", Some(900_000), 1, Severity::Unspecified),
            group("c", None, 9, Severity::Warning),
            group("d", Some(5), 0, Severity::Error),
        ];
        screen
    }

    fn order(screen: &Screen) -> String {
        screen.groups().iter().map(|group| group.name.chars().last().unwrap()).collect()
    }

    #[test]
    fn groups_are_sorted_by_what_a_key_says() {
        let mut screen = screen();
        assert_eq!(order(&screen), "abcd");
        for (key, expected) in [('r', "cabd"), ('l', "cbad"), ('c', "dcab"), ('n', "abcd")] {
            screen.key(KeyCode::Char(key));
            assert_eq!(order(&screen), expected, "{key}");
        }
        screen.key(KeyCode::Char('i'));
        assert_eq!(order(&screen), "dcba");
        let begun = screen.sort;
        (0..Sort::ALL.len()).for_each(|_| screen.key(KeyCode::Char('s')));
        assert_eq!(screen.sort, begun);
    }

    #[test]
    fn the_selection_follows_its_group() {
        let mut screen = screen();
        screen.key(KeyCode::Down);
        assert!(screen.selected.ends_with("/b"), "{}", screen.selected);
        screen.key(KeyCode::Char('r'));
        assert_eq!(screen.place(&screen.groups()), Some(2));
        screen.key(KeyCode::End);
        assert!(screen.selected.ends_with("/d"));
        screen.key(KeyCode::Down);
        assert!(screen.selected.ends_with("/d"), "there is nothing below");
        screen.snapshot.groups.clear();
        assert_eq!(screen.place(&screen.groups()), None);
        for key in [KeyCode::Up, KeyCode::Down, KeyCode::Home, KeyCode::End, KeyCode::Enter, KeyCode::PageUp] {
            screen.key(key);
        }
    }

    #[test]
    fn events_are_bounded() {
        let mut screen = screen();
        (0..1000).for_each(|number| screen.happened(v1::Event { number, ..Default::default() }));
        assert_eq!((screen.events.len(), screen.events[0].number), (EVENTS, 999));
    }
}
