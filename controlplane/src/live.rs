//! What is, as the proxies last reported it: in memory only, gone with a restart, back with the next report. Times are
//! the coordinator's monotonic clock, nanoseconds.

use std::collections::{HashMap, VecDeque};

use afterimage_wire::v1;

use crate::rpo::{Alarm, RpoWindow};

/// What rates are taken over, nanoseconds.
const RATE_WINDOW_NS: u64 = 3_000_000_000;
/// Reports in that at most.
const MAX_RATE_SAMPLES: usize = 256;
/// Most views in a report that are looked at.
const MAX_VIEWS: usize = 4096;

/// Counters of a source at one moment.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
struct Counters {
    at_ns: u64,
    writes: u64,
    captured: u64,
    wire: u64,
}

/// Rates from counters that rise, until their proxy restarts.
#[derive(Default)]
pub struct Rates {
    samples: VecDeque<Counters>,
}

/// Per second.
#[derive(Copy, Clone, PartialEq, Debug, Default)]
pub struct Shown {
    /// Writes.
    pub writes: f64,
    /// Bytes captured.
    pub captured: f64,
    /// Bytes sent.
    pub wire: f64,
}

impl Rates {
    fn report(&mut self, at_ns: u64, report: &v1::SourceGroupReport) {
        let now = Counters { at_ns, writes: report.writes, captured: report.captured_bytes, wire: report.wire_bytes };
        let restarted =
            |last: &Counters| now.writes < last.writes || now.captured < last.captured || now.wire < last.wire;
        if self.samples.back().is_some_and(restarted) {
            self.samples.clear();
        }
        if self.samples.len() == MAX_RATE_SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(now);
        // One sample from before the window stays, as its beginning.
        while self.samples.len() > 2 && at_ns.saturating_sub(self.samples[1].at_ns) > RATE_WINDOW_NS {
            self.samples.pop_front();
        }
    }

    /// What is shown at `now_ns`: nothing once the reports have stopped.
    pub fn shown(&self, now_ns: u64) -> Shown {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return Shown::default() };
        let seconds = last.at_ns.saturating_sub(first.at_ns) as f64 / 1e9;
        if seconds <= 0.0 || now_ns.saturating_sub(last.at_ns) > RATE_WINDOW_NS {
            return Shown::default();
        }
        Shown {
            writes: (last.writes - first.writes) as f64 / seconds,
            captured: (last.captured - first.captured) as f64 / seconds,
            wire: (last.wire - first.wire) as f64 / seconds,
        }
    }
}

/// One stream as its two ends report it.
#[derive(Default)]
pub struct StreamLive {
    /// The source's last report, and when it came.
    pub source: Option<(u64, v1::SourceGroupReport)>,
    /// The target's last report, and when it came.
    pub target: Option<(u64, v1::TargetStreamReport)>,
    /// RPO.
    pub rpo: RpoWindow,
    /// Rates.
    pub rates: Rates,
    /// Whether the RPO has been above its target for too long.
    pub alarm: Alarm,
    /// Lease that the source keeps to, milliseconds: as it has reported since it was last told what to be; else 0.
    pub lease_ms: u64,
    /// Views that the target has open, by their name there.
    pub views: HashMap<String, v1::ViewReport>,
}

/// One proxy.
#[derive(Default)]
pub struct ProxyLive {
    /// When it was last heard.
    pub last_heard_ns: Option<u64>,
    /// Version of the desired state that it has.
    pub observed_version: u64,
    /// What it could not do.
    pub problems: Vec<v1::Problem>,
    /// Room for journals.
    pub room: Option<v1::TargetRoom>,
}

/// Everything reported.
#[derive(Default)]
pub struct Live {
    /// By uid of the stream. Only streams of groups that exist.
    pub streams: HashMap<String, StreamLive>,
    /// By uid of the proxy. Only proxies that exist.
    pub proxies: HashMap<String, ProxyLive>,
}

/// What is wrong with a report, or what it tells besides: for events.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remark {
    /// Uid of the stream.
    pub stream_uid: String,
    /// For a person.
    pub message: String,
}

impl Live {
    /// Takes in a report. `told` is the version that the proxy was last told. `is_source` and `is_target` say whether this proxy is that end of a stream: what it says of
    /// others' streams is not believed.
    pub fn report(
        &mut self,
        now_ns: u64,
        proxy_uid: &str,
        report: v1::Report,
        told: u64,
        is_source: impl Fn(&str) -> bool,
        is_target: impl Fn(&str) -> bool,
    ) -> Vec<Remark> {
        let mut remarks = Vec::new();
        let proxy = self.proxies.entry(proxy_uid.to_owned()).or_default();
        proxy.last_heard_ns = Some(now_ns);
        proxy.observed_version = report.observed_version;
        let current = report.observed_version >= told;
        proxy.problems = report.problems.into_iter().take(64).collect();
        proxy.room = report.room;
        for group in report.sources {
            if !is_source(&group.stream_uid) {
                continue;
            }
            let stream = self.streams.entry(group.stream_uid.clone()).or_default();
            if let Err(e) = stream.rpo.report(now_ns, group.rpo_now_us, &group.rpo_histogram) {
                remarks.push(Remark { stream_uid: group.stream_uid.clone(), message: e.to_string() });
            }
            stream.rpo.stage(&group);
            stream.lease_ms = if current { group.lease_ms } else { 0 };
            stream.rates.report(now_ns, &group);
            let paused = group.paused && current;
            stream.source = Some((now_ns, v1::SourceGroupReport { rpo_histogram: Vec::new(), paused, ..group }));
        }
        let mut seen = Vec::new();
        for target in report.targets {
            if !is_target(&target.stream_uid) {
                continue;
            }
            let stream = self.streams.entry(target.stream_uid.clone()).or_default();
            stream.views.clear();
            seen.push(target.stream_uid.clone());
            stream.target = Some((now_ns, target));
        }
        for view in report.views.into_iter().take(MAX_VIEWS) {
            if seen.contains(&view.stream_uid)
                && let Some(stream) = self.streams.get_mut(&view.stream_uid)
            {
                stream.views.insert(view.view.clone(), view);
            }
        }
        remarks
    }

    /// These streams' source has been told something else: what lease it keeps to, and that it sends nothing, is not known
    /// before it says so.
    pub fn told<'a>(&mut self, streams: impl Iterator<Item = &'a str>) {
        for stream in streams {
            if let Some(live) = self.streams.get_mut(stream) {
                live.lease_ms = 0;
                live.source.iter_mut().for_each(|(_, report)| report.paused = false);
            }
        }
    }

    /// Forgets what no object stands for any more.
    pub fn retain(&mut self, stream: impl Fn(&str) -> bool, proxy: impl Fn(&str) -> bool) {
        self.streams.retain(|uid, _| stream(uid));
        self.proxies.retain(|uid, _| proxy(uid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn counters(writes: u64) -> v1::SourceGroupReport {
        v1::SourceGroupReport {
            stream_uid: "s".into(),
            writes,
            captured_bytes: writes * 4096,
            wire_bytes: writes * 2048,
            ..v1::SourceGroupReport::default()
        }
    }

    fn report(writes: u64) -> v1::Report {
        v1::Report { sources: vec![counters(writes)], ..v1::Report::default() }
    }

    #[test]
    fn rates_are_over_the_last_seconds() {
        let mut live = Live::default();
        for i in 0..20 {
            live.report(i * S / 2, "p", report(i * 500), 0, |_| true, |_| true);
        }
        let shown = live.streams["s"].rates.shown(10 * S);
        assert!((shown.writes - 1000.0).abs() < 1.0, "{shown:?}");
        assert!((shown.captured - 4_096_000.0).abs() < 4096.0);
        assert_eq!(live.streams["s"].rates.shown(20 * S), Shown::default());
    }

    #[test]
    fn a_restarted_proxy_does_not_make_rates_negative() {
        let mut rates = Rates::default();
        rates.report(S, &counters(1_000_000));
        rates.report(2 * S, &counters(10));
        assert_eq!(rates.shown(2 * S), Shown::default());
        rates.report(3 * S, &counters(110));
        assert!((rates.shown(3 * S).writes - 100.0).abs() < 0.1);
    }

    #[test]
    fn what_a_proxy_says_of_others_streams_is_not_believed() {
        let mut live = Live::default();
        let both = v1::Report {
            sources: vec![counters(1)],
            targets: vec![v1::TargetStreamReport { stream_uid: "s".into(), ..Default::default() }],
            ..v1::Report::default()
        };
        live.report(S, "p", both, 0, |_| false, |_| false);
        assert!(live.streams.is_empty());
    }

    #[test]
    fn views_are_as_last_reported() {
        let mut live = Live::default();
        let target = v1::TargetStreamReport { stream_uid: "s".into(), ..Default::default() };
        let view = v1::ViewReport { view: "shop.v".into(), stream_uid: "s".into(), ..Default::default() };
        let with = v1::Report { targets: vec![target.clone()], views: vec![view], ..Default::default() };
        live.report(S, "p", with, 0, |_| true, |_| true);
        assert_eq!(live.streams["s"].views.len(), 1);
        live.report(S, "p", v1::Report { targets: vec![target], ..Default::default() }, 0, |_| true, |_| true);
        assert!(live.streams["s"].views.is_empty());
    }

    #[test]
    fn a_bad_histogram_is_remarked_and_the_rest_is_taken() {
        let mut live = Live::default();
        let mut bad = report(5);
        bad.sources[0].rpo_histogram = vec![1, 2, 3];
        let remarks = live.report(S, "p", bad, 0, |_| true, |_| true);
        assert_eq!(remarks.len(), 1);
        assert_eq!(live.streams["s"].source.as_ref().unwrap().1.writes, 5);
    }
}
