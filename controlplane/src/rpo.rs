//! The RPO of a group, from the reports of its source: now, and its distribution over a window.
//!
//! The source samples the age of its oldest write that is in no durable restore point, on its own clock, and sends the
//! samples of each interval as a histogram. What nobody reports does not stand still: the age of the last report is
//! added to what is shown, and silence is recorded as samples too, so that an outage is in the distribution. Two hosts'
//! clocks are never compared: ages of reports are measured here, from receipt to now.

use std::collections::VecDeque;
use std::io::Cursor;

use afterimage_wire::v1;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;

use crate::history::Bucket;

/// Longest RPO that is told apart, microseconds: a day.
pub const MAX_RPO_US: u64 = 86_400_000_000;
/// Slots of the window.
const SLOTS: usize = 10;
/// Nanoseconds of a slot.
const SLOT_NS: u64 = 30_000_000_000;
/// What the distribution is taken over, seconds.
pub const WINDOW_S: u64 = SLOTS as u64 * SLOT_NS / 1_000_000_000;
/// Two digits keep a slot at some 30 KiB; the error, at most 1 %, is upwards.
const DIGITS: u8 = 2;
/// Longest histogram in a report, bytes.
const MAX_ENCODED: usize = 256 * 1024;
/// Nanoseconds between two samples of silence.
const SILENCE_SAMPLE_NS: u64 = 10_000_000;
/// A report that is no older than this is not silence, nanoseconds.
const SILENCE_AFTER_NS: u64 = 2_000_000_000;

/// A histogram that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the RPO histogram is not valid: {0}")]
pub struct BadHistogram(String);

struct Slot {
    begins_ns: u64,
    samples: Histogram<u32>,
}

/// The window of one group. Times are the coordinator's monotonic clock, nanoseconds.
#[derive(Default)]
pub struct RpoWindow {
    slots: VecDeque<Slot>,
    last: Option<Last>,
    /// Since [`Self::take`].
    interval: Option<Bucket>,
}

#[derive(Copy, Clone)]
struct Last {
    at_ns: u64,
    now_us: u64,
    /// Up to where silence has been recorded.
    recorded_ns: u64,
}

/// What is shown. All microseconds.
#[derive(Copy, Clone, PartialEq, Debug)]
pub struct RpoShown {
    /// Last report and its age.
    pub now_us: u64,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Longest.
    pub max_us: u64,
    /// Age of the last report.
    pub report_age_us: u64,
    /// Share of the window inside the target, 0 to 1.
    pub within_target: f64,
}

impl RpoWindow {
    /// Takes in a report: the RPO as the source sees it, and the encoded histogram of its samples since the last one (may
    /// be empty).
    ///
    /// # Errors
    /// The histogram is malformed; `now_us` has been taken in nevertheless.
    pub fn report(&mut self, at_ns: u64, now_us: u64, histogram: &[u8]) -> Result<(), BadHistogram> {
        self.silence(at_ns);
        self.last = Some(Last { at_ns, now_us: now_us.min(MAX_RPO_US), recorded_ns: at_ns });
        let samples = decode(histogram)?;
        let slot = self.slot(at_ns);
        if let Some(samples) = samples {
            for value in samples.iter_recorded() {
                let count = u32::try_from(value.count_at_value()).unwrap_or(u32::MAX);
                slot.saturating_record_n(value.value_iterated_to(), count);
            }
            let interval = &mut self.interval.get_or_insert_default().samples;
            for value in samples.iter_recorded() {
                let count = u32::try_from(value.count_at_value()).unwrap_or(u32::MAX);
                interval.saturating_record_n(value.value_iterated_to(), count);
            }
        } else {
            slot.saturating_record(now_us.min(MAX_RPO_US));
            self.interval.get_or_insert_default().samples.saturating_record(now_us.min(MAX_RPO_US));
        }
        Ok(())
    }

    /// Where the oldest write that is not durable was waiting at a report.
    pub fn stage(&mut self, report: &v1::SourceGroupReport) {
        let stages = &mut self.interval.get_or_insert_default().stages;
        let oldest = report.acked_seq.saturating_add(1);
        let stage = if oldest > report.captured_seq {
            &mut stages.idle
        } else if oldest > report.sealed_seq {
            &mut stages.seal
        } else if oldest > report.sent_seq {
            &mut stages.link
        } else {
            &mut stages.durable
        };
        *stage += 1;
    }

    /// What has been seen since the last time, held against the target; none if nothing has.
    pub fn take(&mut self, target_us: u64) -> Option<Bucket> {
        self.interval.take().map(|bucket| counted(bucket, target_us))
    }

    /// As [`Self::take`], and it stays.
    pub fn peek(&self, target_us: u64) -> Option<Bucket> {
        self.interval.clone().map(|bucket| counted(bucket, target_us))
    }

    /// Records the silence up to now, if there is any. Called at each report and every second or so.
    pub fn silence(&mut self, now_ns: u64) {
        let Some(last) = self.last else { return };
        if now_ns.saturating_sub(last.at_ns) < SILENCE_AFTER_NS {
            return;
        }
        // However long it was, one slot of samples at a time is enough, and bounded by the window.
        let window_begins = now_ns.saturating_sub(SLOTS as u64 * SLOT_NS);
        let mut at = last.recorded_ns.max(window_begins);
        while at < now_ns {
            let until = (at + SLOT_NS / 16).min(now_ns);
            let samples = ((until - at) / SILENCE_SAMPLE_NS).max(1);
            let shown = shown_now(&last, until);
            self.slot(until).saturating_record_n(shown, samples as u32);
            let interval = self.interval.get_or_insert_default();
            interval.samples.saturating_record_n(shown, samples as u32);
            interval.stages.silent += 1;
            at = until;
        }
        if let Some(last) = &mut self.last {
            last.recorded_ns = now_ns;
        }
    }

    /// Forgets everything but what is yet to be kept: the group does not ship from its source any more.
    pub fn clear(&mut self) {
        *self = Self { interval: self.interval.take(), ..Self::default() };
    }

    /// What is shown at `now_ns`; none while nothing has been reported.
    pub fn shown(&self, now_ns: u64, target_us: u64) -> Option<RpoShown> {
        let last = self.last?;
        let now_us = shown_now(&last, now_ns);
        let mut all = new_histogram();
        let oldest = now_ns.saturating_sub((SLOTS as u64 + 1) * SLOT_NS);
        for slot in self.slots.iter().filter(|s| s.begins_ns >= oldest) {
            // Of the same bounds: cannot fail.
            let _ = all.add(&slot.samples);
        }
        let total = all.len();
        let inside = if total == 0 { 0 } else { all.count_between(0, target_us.min(MAX_RPO_US)) };
        Some(RpoShown {
            now_us,
            p50_us: all.value_at_quantile(0.5),
            p99_us: all.value_at_quantile(0.99),
            // What is shown now has been seen, even if it is in no sample yet.
            max_us: all.max().max(now_us),
            report_age_us: now_ns.saturating_sub(last.at_ns) / 1000,
            within_target: if total == 0 { 1.0 } else { inside as f64 / total as f64 },
        })
    }

    fn slot(&mut self, at_ns: u64) -> &mut Histogram<u32> {
        let begins_ns = at_ns - at_ns % SLOT_NS;
        if self.slots.back().is_none_or(|s| s.begins_ns < begins_ns) {
            let mut samples = if self.slots.len() > SLOTS {
                self.slots.pop_front().map_or_else(new_histogram, |s| s.samples)
            } else {
                new_histogram()
            };
            samples.reset();
            self.slots.push_back(Slot { begins_ns, samples });
        }
        &mut self.slots.back_mut().expect("one was just pushed").samples
    }
}

/// Whether the RPO has been above its target for too long. Once it is said, it is taken back only after the RPO has been
/// within its target for a while, so that one that swings about its target alarms once.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Alarm {
    above_since_ns: Option<u64>,
    within_since_ns: Option<u64>,
    raised: bool,
}

impl Alarm {
    /// Takes in whether it is above its target now.
    pub fn update(&mut self, now_ns: u64, above: bool, warn_after_ms: u64, clear_after_ms: u64) {
        let passed = |since: u64, ms: u64| now_ns.saturating_sub(since) / 1_000_000 >= ms;
        if above {
            self.within_since_ns = None;
            let since = *self.above_since_ns.get_or_insert(now_ns);
            self.raised |= passed(since, warn_after_ms);
        } else if self.raised && !passed(*self.within_since_ns.get_or_insert(now_ns), clear_after_ms) {
            // Not for long enough yet.
        } else {
            *self = Self::default();
        }
    }

    /// For how long, milliseconds; none if there is no alarm.
    pub fn raised_for_ms(&self, now_ns: u64) -> Option<u64> {
        self.above_since_ns.filter(|_| self.raised).map(|since| now_ns.saturating_sub(since) / 1_000_000)
    }
}

fn counted(mut bucket: Bucket, target_us: u64) -> Bucket {
    bucket.total = bucket.samples.len();
    bucket.inside = if bucket.total == 0 { 0 } else { bucket.samples.count_between(0, target_us.min(MAX_RPO_US)) };
    bucket
}

fn shown_now(last: &Last, now_ns: u64) -> u64 {
    (last.now_us + now_ns.saturating_sub(last.at_ns) / 1000).min(MAX_RPO_US)
}

pub(crate) fn new_histogram() -> Histogram<u32> {
    Histogram::new_with_bounds(1, MAX_RPO_US, DIGITS).expect("the bounds are constants")
}

/// Reads a histogram from outside; none if there is none.
pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Histogram<u64>>, BadHistogram> {
    let bad = |why: &str| Err(BadHistogram(why.to_owned()));
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() > MAX_ENCODED {
        return bad("too long");
    }
    // What the header claims decides how much is allocated, so it is looked at first: cookie, length, offset, digits,
    // lowest, highest.
    const HEADER: usize = 40;
    if bytes.len() < HEADER {
        return bad("cut short");
    }
    let digits = u32::from_be_bytes(bytes[12..16].try_into().expect("4 bytes"));
    let highest = u64::from_be_bytes(bytes[24..32].try_into().expect("8 bytes"));
    if digits > 3 || highest > 2 * MAX_RPO_US {
        return bad("more digits or a longer range than is allowed");
    }
    Deserializer::new().deserialize(&mut Cursor::new(bytes)).map(Some).map_err(|e| BadHistogram(format!("{e:?}")))
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::{Serializer, V2Serializer};

    use super::*;

    const S: u64 = 1_000_000_000;

    fn encoded(samples: &[(u64, u64)]) -> Vec<u8> {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, MAX_RPO_US, 3).unwrap();
        for (value, count) in samples {
            histogram.record_n(*value, *count).unwrap();
        }
        let mut bytes = Vec::new();
        V2Serializer::new().serialize(&histogram, &mut bytes).unwrap();
        bytes
    }

    fn near(found: u64, expected: u64) -> bool {
        found >= expected && found as f64 <= expected as f64 * 1.02
    }

    #[test]
    fn intervals_are_merged() {
        let mut window = RpoWindow::default();
        window.report(S, 1_000, &encoded(&[(1_000, 90)])).unwrap();
        window.report(2 * S, 1_000, &encoded(&[(50_000, 10)])).unwrap();
        let shown = window.shown(2 * S, 10_000).unwrap();
        assert!(near(shown.p50_us, 1_000) && near(shown.p99_us, 50_000) && near(shown.max_us, 50_000), "{shown:?}");
        assert!((shown.within_target - 0.9).abs() < 0.001);
    }

    #[test]
    fn an_alarm_is_raised_late_and_taken_back_late() {
        let mut alarm = Alarm::default();
        let ms = |n: u64| S + n * 1_000_000;
        alarm.update(ms(0), true, 1000, 500);
        alarm.update(ms(900), false, 1000, 500);
        alarm.update(ms(950), true, 1000, 500);
        alarm.update(ms(1900), true, 1000, 500);
        assert_eq!(alarm.raised_for_ms(ms(1900)), None, "it has not been above all the time");
        alarm.update(ms(1950), true, 1000, 500);
        assert_eq!(alarm.raised_for_ms(ms(1950)), Some(1000));
        // It swings about its target: one alarm.
        for i in 0..10 {
            alarm.update(ms(2000 + i * 400), i % 2 == 0, 1000, 500);
            assert!(alarm.raised_for_ms(ms(2000 + i * 400)).is_some());
        }
        alarm.update(ms(6_200), false, 1000, 500);
        assert_eq!(alarm.raised_for_ms(ms(6_200)), None);
    }

    #[test]
    fn an_interval_is_taken_once_and_held_against_its_target() {
        let mut window = RpoWindow::default();
        assert!(window.take(1).is_none());
        window.report(S, 1_000, &encoded(&[(1_000, 90), (50_000, 10)])).unwrap();
        let at = |captured, sealed, sent, acked| v1::SourceGroupReport {
            captured_seq: captured,
            sealed_seq: sealed,
            sent_seq: sent,
            acked_seq: acked,
            ..v1::SourceGroupReport::default()
        };
        for report in [at(9, 9, 9, 9), at(9, 5, 5, 5), at(9, 9, 5, 5), at(9, 9, 9, 5), at(9, 9, 9, 4)] {
            window.stage(&report);
        }
        window.silence(6 * S);
        assert_eq!(window.peek(10_000), window.peek(10_000));
        let bucket = window.take(10_000).unwrap();
        assert_eq!((bucket.inside, bucket.total > 500), (90, true), "silence counts");
        let s = bucket.stages;
        assert_eq!((s.idle, s.seal, s.link, s.durable), (1, 1, 1, 2));
        assert!(s.silent > 0);
        assert!(window.take(10_000).is_none());
    }

    #[test]
    fn silence_is_added_to_what_is_shown() {
        let mut window = RpoWindow::default();
        window.report(S, 3_000, &[]).unwrap();
        let shown = window.shown(S + S / 2, 1).unwrap();
        assert_eq!((shown.now_us, shown.report_age_us), (503_000, 500_000));
        assert_eq!(shown.max_us, 503_000);
    }

    #[test]
    fn silence_is_in_the_distribution() {
        let mut window = RpoWindow::default();
        window.report(S, 1_000, &encoded(&[(1_000, 100)])).unwrap();
        for second in 2..=21 {
            window.silence(second * S);
        }
        let shown = window.shown(21 * S, 1_000_000).unwrap();
        assert!(shown.p99_us > 15_000_000 && shown.p50_us > 5_000_000, "{shown:?}");
        assert!(shown.within_target < 0.2);
    }

    #[test]
    fn old_samples_leave_the_window() {
        let mut window = RpoWindow::default();
        window.report(S, 1, &encoded(&[(5_000_000, 100)])).unwrap();
        for i in 1..=(WINDOW_S + 60) {
            window.report(S + i * S, 1_000, &encoded(&[(1_000, 100)])).unwrap();
        }
        let shown = window.shown(S * (WINDOW_S + 61), 1_000).unwrap();
        assert!(shown.max_us < 2_000, "{shown:?}");
        assert!(window.slots.len() <= SLOTS + 1);
    }

    #[test]
    fn shown_never_understates_what_was_reported() {
        let mut window = RpoWindow::default();
        for value in [1, 7, 999, 123_457, 86_399_999_999] {
            window.report(S, value, &encoded(&[(value, 1)])).unwrap();
            let shown = window.shown(S, 1).unwrap();
            assert!(shown.max_us >= value && shown.now_us >= value.min(shown.now_us));
        }
    }

    #[test]
    fn a_hostile_histogram_is_an_error_and_costs_nothing() {
        let mut window = RpoWindow::default();
        let good = encoded(&[(1, 1)]);
        for cut in 1..good.len() {
            let _ = window.report(S, 1, &good[..cut]);
        }
        let mut greedy = good.clone();
        greedy[12..16].copy_from_slice(&5u32.to_be_bytes());
        assert!(window.report(S, 1, &greedy).is_err());
        let mut wide = good;
        wide[24..32].copy_from_slice(&u64::MAX.to_be_bytes());
        assert!(window.report(S, 1, &wide).is_err());
        assert!(window.report(S, 1, &vec![0; MAX_ENCODED + 1]).is_err());
        assert!(window.shown(S, 1).is_some());
    }

    #[test]
    fn nothing_reported_shows_nothing() {
        assert_eq!(RpoWindow::default().shown(S, 1), None);
    }
}
