//! How long a call may take: as its caller says (`grpc-timeout`), and never longer than [`CALL_WITHIN`]. It counts until
//! the answer begins, so a request whose body comes drop by drop ends with it, and a stream of answers does not.

use std::time::Duration;

use tonic::codegen::http::HeaderMap;

/// Longest call; the longest wait for an operation is 600 s.
pub const CALL_WITHIN: Duration = Duration::from_secs(660);
/// The transport cuts a call at its deadline with another code than the protocol wants: we are first.
const AHEAD: Duration = Duration::from_millis(2);

/// How long this call has.
pub fn of(headers: &HeaderMap) -> Duration {
    let asked = headers.get("grpc-timeout").and_then(|value| parse(value.to_str().ok()?));
    asked.map_or(CALL_WITHIN, |asked| asked.saturating_sub(AHEAD).min(CALL_WITHIN))
}

/// `1 to 8 digits` and a unit: H, M, S, m, u, n.
fn parse(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_read_as_the_protocol_writes_them() {
        for (text, wanted) in [("1H", 3_600_000), ("2M", 120_000), ("3S", 3000), ("50m", 50), ("99999999u", 99_999)] {
            assert_eq!(parse(text).unwrap().as_millis(), wanted, "{text}");
        }
        for bad in ["", "S", "1", "123456789S", "-1S", "1s", "1.5S", "\u{e9}", "1\u{e9}"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn nobody_has_longer_than_the_longest_call() {
        let mut headers = HeaderMap::new();
        assert_eq!(of(&headers), CALL_WITHIN);
        headers.insert("grpc-timeout", "99999999H".parse().unwrap());
        assert_eq!(of(&headers), CALL_WITHIN);
        headers.insert("grpc-timeout", "1S".parse().unwrap());
        assert!(of(&headers) < Duration::from_secs(1));
        headers.insert("grpc-timeout", "nonsense".parse().unwrap());
        assert_eq!(of(&headers), CALL_WITHIN);
    }
}
