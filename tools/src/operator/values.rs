//! Values on the command line and how they are shown: durations, sizes, times, points. What is shown can be typed
//! back.

use jiff::{Timestamp, Zoned, tz::TimeZone};

/// A place in a group's history, as typed: `latest`, `cut:N`, `time:…`, `seq:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selector {
    /// The newest complete point that is durable on the target.
    Latest,
    /// The cut with this number.
    Cut(u64),
    /// The newest point not after this time, in ns since 1970.
    Time(u64),
    /// Just after this one write.
    Seq(u64),
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selector::Latest => f.write_str("latest"),
            Selector::Cut(cut) => write!(f, "cut:{cut}"),
            Selector::Time(ns) => write!(f, "time:{}", rfc3339(*ns)),
            Selector::Seq(seq) => write!(f, "seq:{seq}"),
        }
    }
}

/// Reads a point: `latest`, `cut:42`, `seq:123456`, `time:2026-11-21T10:00:00Z`, `time:-5m` (ago).
pub fn selector(text: &str) -> Result<Selector, String> {
    let number = |digits: &str, what: &str| {
        digits.replace('_', "").parse::<u64>().map_err(|_| format!("`{digits}` is no {what} number"))
    };
    match text.split_once(':') {
        None if text == "latest" => Ok(Selector::Latest),
        Some(("cut", digits)) => number(digits, "cut").map(Selector::Cut),
        Some(("seq", digits)) => number(digits, "sequence").map(Selector::Seq),
        Some(("time", when)) => time(when).map(Selector::Time),
        _ => Err(format!(
            "`{text}` names no point; allowed are latest, cut:NUMBER, seq:NUMBER, time:2026-11-21T10:00:00Z, time:-5m"
        )),
    }
}

/// Reads a time into ns since 1970: RFC 3339 with its offset, or `-5m` for five minutes ago.
///
/// A time without a zone is refused: two operators in two zones would mean two restore points by it.
pub fn time(text: &str) -> Result<u64, String> {
    if let Some(ago) = text.strip_prefix('-') {
        let now = now_ns();
        return Ok(now.saturating_sub(duration_ns(ago)?));
    }
    let stamp = text.parse::<Timestamp>().or_else(|_| text.parse::<Zoned>().map(|z| z.timestamp())).map_err(|_| {
        format!("`{text}` is no time with a zone; write 2026-11-21T10:00:00Z, 2026-11-21T11:00:00+01:00 or -5m (ago)")
    })?;
    u64::try_from(stamp.as_nanosecond()).map_err(|_| format!("`{text}` is before 1970"))
}

/// The wall clock, ns since 1970.
pub fn now_ns() -> u64 {
    u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0)
}

/// Reads a duration into ns: `250ms`, `1s`, `5m`, `2h30m`, `7d`, `1w`. A bare number is refused: seconds or
/// milliseconds would be a guess.
pub fn duration_ns(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no duration; write 250ms, 10s, 5m, 2h30m, 7d");
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let unit: u64 = match &rest[..letters] {
            "us" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" | "min" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "d" => 86_400_000_000_000,
            "w" => 604_800_000_000_000,
            _ => return Err(bad()),
        };
        rest = rest[letters..].trim_start();
        total = number
            .checked_mul(unit)
            .and_then(|ns| total.checked_add(ns))
            .ok_or_else(|| format!("`{text}` is longer than can be counted"))?;
    }
    Ok(total)
}

/// Reads a size into bytes: `4096`, `64K`, `1GiB`, `256M`. Units are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no size; write bytes, or 64K, 256M, 1GiB, 2T (powers of 1024)");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| bad())?;
    let shift = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is larger than can be counted"))
}

/// A size for people, exact where it is a round one: `1 GiB`, `1.50 MiB`, `512 B`.
pub fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut scaled = bytes as f64;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if scaled.fract() == 0.0 {
        format!("{scaled} {}", UNITS[unit])
    } else {
        format!("{} {}", digits(scaled), UNITS[unit])
    }
}

/// Bytes a second, in MiB/s: one unit, so that rows can be compared.
pub fn show_rate(bytes_per_second: f64) -> String {
    format!("{} MiB/s", digits(bytes_per_second / (1 << 20) as f64))
}

/// A span of time with three digits that matter: `0 ms`, `4.21 ms`, `1.50 s`, `3 h 20 min`.
pub fn show_duration(ns: u64) -> String {
    const MINUTE: u64 = 60_000_000_000;
    let two = |large: u64, a: &str, small: u64, b: &str| {
        if small == 0 { format!("{large} {a}") } else { format!("{large} {a} {small} {b}") }
    };
    match ns {
        0..1_000_000_000 => format!("{} ms", digits(ns as f64 / 1e6)),
        1_000_000_000..MINUTE => {
            if ns.is_multiple_of(1_000_000_000) {
                format!("{} s", ns / 1_000_000_000)
            } else {
                format!("{} s", digits(ns as f64 / 1e9))
            }
        }
        _ => {
            let minutes = ns / MINUTE;
            match minutes {
                0..60 => two(minutes, "min", ns % MINUTE / 1_000_000_000, "s"),
                60..1440 => two(minutes / 60, "h", minutes % 60, "min"),
                _ => two(minutes / 1440, "d", minutes % 1440 / 60, "h"),
            }
        }
    }
}

/// ns as milliseconds for JSON, to the microsecond.
pub fn millis(ns: u64) -> f64 {
    (ns as f64 / 1e3).round() / 1e3
}

/// A time in the operator's zone, to the millisecond, with the zone: `2026-11-21 10:00:00.123 +01:00`.
pub fn show_time(ns: u64) -> String {
    show_time_in(ns, &TimeZone::system())
}

fn show_time_in(ns: u64, zone: &TimeZone) -> String {
    match stamp(ns) {
        Some(stamp) => stamp.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S%.3f %:z").to_string(),
        None => "-".to_owned(),
    }
}

/// A time for JSON: RFC 3339 in UTC to the nanosecond; null for 0, which the API uses for "none".
pub fn json_time(ns: u64) -> serde_json::Value {
    if ns == 0 { serde_json::Value::Null } else { rfc3339(ns).into() }
}

fn rfc3339(ns: u64) -> String {
    stamp(ns).map_or_else(|| ns.to_string(), |stamp| stamp.to_string())
}

fn stamp(ns: u64) -> Option<Timestamp> {
    if ns == 0 { None } else { Timestamp::from_nanosecond(i128::from(ns)).ok() }
}

/// Three significant digits, none invented for whole zeros.
fn digits(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// A count with its thousands apart, as it may also be typed: `1_234_567`.
pub fn show_count(count: u64) -> String {
    let plain = count.to_string();
    let mut out = String::with_capacity(plain.len() + plain.len() / 3);
    for (at, digit) in plain.chars().enumerate() {
        if at > 0 && (plain.len() - at).is_multiple_of(3) {
            out.push('_');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_as_documented() {
        assert_eq!(selector("latest"), Ok(Selector::Latest));
        assert_eq!(selector("cut:42"), Ok(Selector::Cut(42)));
        assert_eq!(selector("seq:1_000_000"), Ok(Selector::Seq(1_000_000)));
        assert_eq!(selector("time:1970-01-01T00:00:01Z"), Ok(Selector::Time(1_000_000_000)));
        assert_eq!(selector("time:1970-01-01T01:00:01.5+01:00"), Ok(Selector::Time(1_500_000_000)));
    }

    #[test]
    fn a_point_that_is_none_is_refused_with_what_is_allowed() {
        for text in ["", "last", "cut", "cut:", "cut:x", "seq:-1", "time:", "time:yesterday", "cut:1:2"] {
            assert!(selector(text).is_err(), "{text}");
        }
        assert!(selector("newest").unwrap_err().contains("cut:NUMBER"));
    }

    #[test]
    fn a_shown_point_can_be_typed_back() {
        for point in [Selector::Latest, Selector::Cut(7), Selector::Seq(9), Selector::Time(1_700_000_000_123_456_789)] {
            assert_eq!(selector(&point.to_string()), Ok(point));
        }
    }

    #[test]
    fn a_time_without_a_zone_is_refused() {
        assert!(time("2026-11-21T10:00:00").unwrap_err().contains("zone"));
        assert!(time("2026-11-21T10:00:00Z").is_ok());
    }

    #[test]
    fn a_time_ago_counts_from_now() {
        let ago = time("-5m").unwrap();
        let elapsed = now_ns() - ago;
        assert!((300_000_000_000..301_000_000_000).contains(&elapsed), "{elapsed}");
    }

    #[test]
    fn durations_need_a_unit_and_add_up() {
        assert_eq!(duration_ns("250ms"), Ok(250_000_000));
        assert_eq!(duration_ns("2h30m"), Ok(9_000_000_000_000));
        assert_eq!(duration_ns("1h 5min"), Ok(3_900_000_000_000));
        assert_eq!(duration_ns("7d"), Ok(604_800_000_000_000));
        for text in ["", "5", "s", "5 s5", "1.5s", "-1s", "5y", "99999999999999w"] {
            assert!(duration_ns(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64K"), Ok(65536));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert_eq!(size("2 t"), Ok(2 << 40));
        for text in ["", "G", "1.5G", "-1", "1GB2", "1X", "99999999999999T"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn quantities_are_shown_with_units() {
        assert_eq!(show_size(1 << 30), "1 GiB");
        assert_eq!(show_size(1_572_864), "1.50 MiB");
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_rate(12.5 * 1_048_576.0), "12.5 MiB/s");
        assert_eq!(show_duration(0), "0 ms");
        assert_eq!(show_duration(4_213_000), "4.21 ms");
        assert_eq!(show_duration(1_500_000_000), "1.50 s");
        assert_eq!(show_duration(10_000_000_000), "10 s");
        assert_eq!(show_duration(12_000_000_000_000), "3 h 20 min");
        assert_eq!(show_duration(604_800_000_000_000), "7 d");
        assert_eq!(show_count(1_234_567), "1_234_567");
        assert_eq!(show_count(12), "12");
    }

    #[test]
    fn times_carry_their_zone() {
        let berlin = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(show_time_in(1_700_000_000_123_000_000, &berlin), "2023-11-14 23:13:20.123 +01:00");
        assert_eq!(show_time_in(0, &berlin), "-");
        assert_eq!(json_time(1_700_000_000_000_000_000), "2023-11-14T22:13:20Z");
        assert!(json_time(0).is_null());
    }

    #[test]
    fn milliseconds_keep_the_microsecond() {
        assert_eq!(millis(1_234_567), 1.235);
    }
}
