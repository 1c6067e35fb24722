//! Hours of a week at which something is allowed: written by people, looked up by the minute.

use crate::problem::Problem;

/// Minutes of a week, from Monday 00:00 on.
pub const WEEK: usize = 7 * DAY;
const DAY: usize = 24 * 60;
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// Most lines.
pub const MAX_LINES: usize = 32;
/// What a line may be, for error messages.
const ALLOWED: &str = "[DAYS] HH:MM-HH:MM, such as \"mon-fri 20:00-06:00\", \"sat,sun 00:00-24:00\" or \"12:30-13:30\"";

/// The allowed minutes of a week.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hours {
    open: Vec<bool>,
}

impl Hours {
    /// Reads lines such as `mon-fri 20:00-06:00`: a period that ends before it begins ends on the next day. Without a line
    /// every minute is allowed.
    ///
    /// # Errors
    /// Names the line of `field`.
    pub fn parse(field: &str, lines: &[String]) -> Result<Self, Problem> {
        if lines.len() > MAX_LINES {
            return Err(Problem::invalid(field, lines.len(), format!("up to {MAX_LINES} lines")));
        }
        let mut open = vec![lines.is_empty(); WEEK];
        for (i, line) in lines.iter().enumerate() {
            let (days, from, to) =
                period(line).ok_or_else(|| Problem::invalid(format!("{field}[{i}]"), line, ALLOWED))?;
            let length = if to > from { to - from } else { DAY - from + to };
            for day in days {
                for minute in 0..length {
                    open[(day * DAY + from + minute) % WEEK] = true;
                }
            }
        }
        Ok(Self { open })
    }

    /// Is this minute of the week allowed? Minutes count from Monday 00:00.
    pub fn is_open(&self, minute: usize) -> bool {
        self.open[minute % WEEK]
    }

    /// The longest time that is not allowed, minutes.
    pub fn longest_gap(&self) -> usize {
        let (mut longest, mut run) = (0, 0);
        for minute in 0..2 * WEEK {
            run = if self.is_open(minute) { 0 } else { run + 1 };
            longest = longest.max(run);
        }
        longest.min(WEEK)
    }
}

/// Days, and the first and the last minute of the day.
fn period(line: &str) -> Option<(Vec<usize>, usize, usize)> {
    let lower = line.trim().to_ascii_lowercase();
    let (days, times) = match lower.split_once(char::is_whitespace) {
        Some((days, times)) => (named_days(days)?, times.trim().to_owned()),
        None => ((0..7).collect(), lower),
    };
    let (from, to) = times.split_once('-')?;
    let (from, to) = (clock(from)?, clock(to)?);
    (from != to && from < DAY).then_some((days, from, to))
}

fn named_days(text: &str) -> Option<Vec<usize>> {
    let day = |name: &str| DAYS.iter().position(|d| *d == name);
    let mut days = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => days.push(day(part)?),
            Some((first, last)) => {
                let (first, last) = (day(first)?, day(last)?);
                // "sat-mon" goes over the end of the week.
                days.extend((0..=(last + 7 - first) % 7).map(|i| (first + i) % 7));
            }
        }
    }
    Some(days)
}

fn clock(text: &str) -> Option<usize> {
    let (hours, minutes) = text.split_once(':')?;
    let digits = |t: &str| t.len() == 2 && t.bytes().all(|b| b.is_ascii_digit());
    if !digits(hours) || !digits(minutes) {
        return None;
    }
    let (hours, minutes): (usize, usize) = (hours.parse().ok()?, minutes.parse().ok()?);
    let minute = hours * 60 + minutes;
    (minutes < 60 && minute <= DAY).then_some(minute)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hours(lines: &[&str]) -> Hours {
        Hours::parse("h", &lines.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    fn at(day: usize, hour: usize, minute: usize) -> usize {
        day * DAY + hour * 60 + minute
    }

    #[test]
    fn without_a_line_everything_is_allowed() {
        assert_eq!(hours(&[]).longest_gap(), 0);
    }

    #[test]
    fn nights_go_over_midnight_and_the_week_over_its_end() {
        let nights = hours(&["Mon-Fri 20:00-06:00"]);
        assert!(nights.is_open(at(0, 20, 0)) && nights.is_open(at(1, 5, 59)) && !nights.is_open(at(1, 6, 0)));
        assert!(nights.is_open(at(5, 5, 0)), "Saturday morning is Friday's night");
        assert!(!nights.is_open(at(0, 5, 0)), "Monday morning is Sunday's");
        let sunday = hours(&["sun 23:00-01:00"]);
        assert!(sunday.is_open(at(0, 0, 59)) && !sunday.is_open(at(0, 1, 0)));
        assert_eq!(hours(&["sat-mon 00:00-24:00"]).longest_gap(), 4 * DAY);
    }

    #[test]
    fn lines_add_up() {
        let both = hours(&["12:30-13:30", "sat,sun 00:00-24:00"]);
        assert!(both.is_open(at(3, 12, 30)) && !both.is_open(at(3, 13, 30)) && both.is_open(at(6, 3, 0)));
        assert_eq!(both.longest_gap(), 23 * 60);
    }

    #[test]
    fn what_is_no_period_is_refused_by_its_line() {
        for bad in ["", "mon", "mon 8:00-09:00", "08:00-08:00", "24:00-01:00", "08:00-24:01", "08:60-09:00", "day 1"] {
            let refused = Hours::parse("policy.allowed_hours", &["00:00-24:00".into(), bad.into()]).unwrap_err();
            assert!(refused.to_string().contains("policy.allowed_hours[1]"), "{bad}: {refused}");
        }
    }
}
