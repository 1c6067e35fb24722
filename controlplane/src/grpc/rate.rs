//! How many calls a caller has: a bucket of tokens for each identity, filled at a rate and never above its burst. A call
//! takes one; without one it is refused, with the time after which there is one again.
//!
//! A proxy's session takes none: what operators do never keeps a proxy from its coordinator. Callers without a certificate
//! share a bucket for each address (each /64 of IPv6). The table is bounded: who does not fit shares one bucket with all
//! others that do not.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::ca::Identity;

/// Calls a second of one identity, unless told.
pub const DEFAULT_RATE: u32 = 200;
/// Calls at once of one identity, unless told.
pub const DEFAULT_BURST: u32 = 1000;
/// Share of both that a caller without a certificate has.
const ANONYMOUS: u32 = 10;
/// Most identities that have a bucket of their own.
pub const MAX_CALLERS: usize = 4096;
/// Most that may be set of rate and burst.
const MOST: u32 = 1_000_000;
/// A token in the unit that buckets count in: nanoseconds at one token a second.
const TOKEN: u64 = 1_000_000_000;

/// How many calls an identity has.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Calls a second; 0: no limit.
    pub per_s: u32,
    /// Calls at once.
    pub burst: u32,
}

impl Default for Rate {
    fn default() -> Self {
        Self { per_s: DEFAULT_RATE, burst: DEFAULT_BURST }
    }
}

impl Rate {
    /// Checks what was set.
    ///
    /// # Errors
    /// The field, its value and what is allowed.
    pub fn check(self) -> Result<(), String> {
        if self.per_s > MOST {
            return Err(format!("call_rate is {}; allowed: 0 (no limit) to {MOST}", self.per_s));
        }
        if !(1..=MOST).contains(&self.burst) {
            return Err(format!("call_burst is {}; allowed: 1 to {MOST}", self.burst));
        }
        Ok(())
    }

    fn of_anonymous(self) -> Self {
        Self { per_s: (self.per_s / ANONYMOUS).max(1), burst: (self.burst / ANONYMOUS).max(1) }
    }
}

/// Whose bucket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// Tenant, role, name.
    Caller(String, &'static str, String),
    /// Without a certificate.
    Address(Option<IpAddr>),
    /// All that have no room.
    Others,
}

impl Key {
    fn of(who: Option<&Identity>, address: Option<IpAddr>) -> Self {
        match who {
            Some(who) => Self::Caller(who.tenant.clone(), who.role.as_str(), who.name.clone()),
            None => Self::Address(address.map(network)),
        }
    }

    fn rate(&self, rate: Rate) -> Rate {
        match self {
            Self::Address(_) => rate.of_anonymous(),
            _ => rate,
        }
    }
}

/// A host has a whole /64 of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 => v4,
    }
}

/// Tokens, as of a moment.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// In parts of [`TOKEN`].
    level: u64,
    /// Since the start, ns.
    at: u64,
    /// It has been empty since it was last full, and that was said.
    said: bool,
}

impl Bucket {
    fn full(rate: Rate, now: u64) -> Self {
        Self { level: u64::from(rate.burst) * TOKEN, at: now, said: false }
    }

    fn fill(&mut self, rate: Rate, now: u64) {
        let gained = now.saturating_sub(self.at).saturating_mul(rate.per_s.into());
        let most = u64::from(rate.burst) * TOKEN;
        self.level = self.level.saturating_add(gained).min(most);
        self.at = now.max(self.at);
        self.said &= self.level < most;
    }

    /// One token, or the time until there is one, ns.
    fn take(&mut self, rate: Rate, now: u64) -> Result<(), u64> {
        self.fill(rate, now);
        match self.level.checked_sub(TOKEN) {
            Some(rest) => {
                self.level = rest;
                Ok(())
            }
            None => Err((TOKEN - self.level).div_ceil(rate.per_s.max(1).into())),
        }
    }
}

/// A call that has to wait.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// For so long, at least.
    pub after: Duration,
    /// What the caller has.
    pub rate: Rate,
    /// The first in a row: worth a line in the log.
    pub first: bool,
}

/// The buckets of a coordinator.
#[derive(Debug)]
pub struct Limits {
    rate: Rate,
    began: Instant,
    buckets: Mutex<HashMap<Key, Bucket>>,
    most: usize,
}

impl Limits {
    /// With these for each identity.
    pub fn new(rate: Rate) -> Self {
        Self { rate, began: Instant::now(), buckets: Mutex::default(), most: MAX_CALLERS }
    }

    /// Takes a token for a call.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&self, who: Option<&Identity>, address: Option<IpAddr>) -> Result<(), Wait> {
        self.take_at(Key::of(who, address), u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn take_at(&self, mut key: Key, now: u64) -> Result<(), Wait> {
        if self.rate.per_s == 0 {
            return Ok(());
        }
        let mut buckets = self.buckets.lock().expect("nothing panics while it holds this");
        if !buckets.contains_key(&key) && buckets.len() >= self.most {
            // Those that are full again know nothing that a new one would not.
            buckets.retain(|key, bucket| {
                let rate = key.rate(self.rate);
                bucket.fill(rate, now);
                bucket.level < u64::from(rate.burst) * TOKEN
            });
            if buckets.len() >= self.most {
                key = Key::Others;
            }
        }
        let rate = key.rate(self.rate);
        let bucket = buckets.entry(key).or_insert_with(|| Bucket::full(rate, now));
        bucket.take(rate, now).map_err(|ns| {
            let first = !std::mem::replace(&mut bucket.said, true);
            Wait { after: Duration::from_nanos(ns), rate, first }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn key(name: usize) -> Key {
        Key::Caller("default".to_owned(), "operator", name.to_string())
    }

    fn limits(per_s: u32, burst: u32, most: usize) -> Limits {
        Limits { most, ..Limits::new(Rate { per_s, burst }) }
    }

    /// Calls that get through, of `calls` at one moment.
    fn through(limits: &Limits, key: &Key, calls: usize, now: u64) -> usize {
        (0..calls).filter(|_| limits.take_at(key.clone(), now).is_ok()).count()
    }

    #[test]
    fn a_burst_gets_through_and_then_the_rate() {
        let limits = limits(10, 50, 8);
        assert_eq!(through(&limits, &key(1), 1000, 0), 50);
        let wait = limits.take_at(key(1), 0).unwrap_err();
        assert_eq!(wait.after, Duration::from_millis(100));
        assert!(!wait.first, "the refusals before have said so");
        assert_eq!(through(&limits, &key(1), 1000, SECOND), 10);
        assert_eq!(through(&limits, &key(1), 1000, 100 * SECOND), 50, "never more than the burst");
        // Who waits as long as it is told gets through.
        let wait = limits.take_at(key(1), 100 * SECOND).unwrap_err();
        assert!(limits.take_at(key(1), 100 * SECOND + wait.after.as_nanos() as u64).is_ok());
    }

    #[test]
    fn one_caller_takes_nothing_from_another() {
        let limits = limits(1, 5, 8);
        assert_eq!(through(&limits, &key(1), 100, 0), 5);
        assert_eq!(through(&limits, &key(2), 100, 0), 5);
        let nobody = Key::of(None, Some("10.0.0.1".parse().unwrap()));
        assert_eq!(through(&limits, &nobody, 100, 0), 1, "a tenth, at least one");
    }

    #[test]
    fn the_table_is_bounded_and_the_rest_share_a_bucket() {
        let limits = limits(1, 5, 8);
        let passed: usize = (0..10_000).map(|n| through(&limits, &key(n), 2, 0)).sum();
        assert_eq!(passed, 8 * 2 + 5, "eight have their own, all others one");
        assert_eq!(limits.buckets.lock().unwrap().len(), 9);
        // When those are full again there is room for others.
        assert_eq!(through(&limits, &key(77_777), 100, 60 * SECOND), 5);
        assert!(limits.buckets.lock().unwrap().len() <= 9);
    }

    #[test]
    fn callers_are_told_apart_and_addresses_taken_together() {
        let of = |address: &str| Key::of(None, Some(address.parse().unwrap()));
        assert_eq!(of("2001:db8::1"), of("2001:db8::2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.2"), of("10.0.0.1"));
    }

    #[test]
    fn no_rate_is_no_limit_and_nonsense_is_refused() {
        assert_eq!(through(&limits(0, 1, 8), &key(1), 10_000, 0), 10_000);
        assert!(Rate { per_s: 0, burst: 0 }.check().unwrap_err().contains("call_burst"));
        assert!(Rate { per_s: MOST + 1, burst: 1 }.check().unwrap_err().contains("call_rate"));
        assert!(Rate::default().check().is_ok());
    }
}
