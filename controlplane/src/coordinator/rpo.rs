//! The RPO of a group over any period, from what is kept of each minute and hour.

use std::collections::BTreeMap;

use afterimage_wire::v1;

use super::Coordinator;
use crate::failover::State;
use crate::history::{Bucket, HOUR, MINUTE};
use crate::names::Name;
use crate::problem::Problem;

/// Most parts of a report.
const MAX_PERIODS: u64 = 1000;
/// The period if none is named, seconds.
const DAY_S: u64 = 86_400;
const NS: u64 = 1_000_000_000;

impl Coordinator {
    /// Everything as numbers for Prometheus.
    pub fn metrics(&self) -> String {
        let (groups, proxies) = self.look(|scene, since| {
            let groups: Vec<_> = scene.model.groups.values().map(|g| scene.group_status(g, since)).collect();
            let proxy = |p: &crate::objects::Proxy| scene.proxy(p, self.sessions.desired_version(&p.uid), since);
            (groups, scene.model.proxies.values().map(proxy).collect::<Vec<_>>())
        });
        let model = self.model();
        let states = [
            ("running", State::Running),
            ("undoing", State::Undoing),
            ("done", State::Done),
            ("failed", State::Failed),
        ];
        let count = |state| model.operations.values().filter(|o| o.work.state == state).count();
        let operations = states.map(|(word, state)| (word, count(state)));
        let people = crate::certificates::newest(&model, |c| c.role != crate::ca::Role::Proxy);
        let people: Vec<_> = people.into_iter().map(AsRef::as_ref).collect();
        crate::metrics::render(
            &self.status(),
            &groups,
            &proxies,
            &operations,
            &people,
            &self.authorities("").authorities,
        )
    }

    /// How the coordinator itself is.
    pub fn status(&self) -> v1::CoordinatorStatus {
        let model = self.model();
        v1::CoordinatorStatus {
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            term: model.term,
            uptime_ms: self.clock.uptime().as_millis() as u64,
            revision: model.revision,
        }
    }

    /// The RPO of a group over a period, as a whole and in parts of `step_s` (0: the whole only).
    ///
    /// # Errors
    /// There is no such group; the period or the step makes no sense; what is kept cannot be read.
    pub async fn rpo_report(
        &self,
        name: &Name,
        start_ns: u64,
        end_ns: u64,
        step_s: u64,
    ) -> Result<v1::RpoReport, Problem> {
        let now_s = self.clock.wall_ns() / NS;
        let to = if end_ns == 0 { now_s } else { (end_ns.div_ceil(NS)).min(now_s) };
        let from = if start_ns == 0 { to.saturating_sub(DAY_S) } else { start_ns / NS };
        if from >= to || (end_ns != 0 && start_ns >= end_ns) {
            return Err(Problem::invalid("start_time_ns", start_ns, "a time before the end, which is not after now"));
        }
        // Minutes are kept for two days.
        let minutes = from >= (now_s + MINUTE.0).saturating_sub(MINUTE.1);
        let unit = if minutes { MINUTE.0 } else { HOUR.0 };
        let (from, to) = (from - from % unit, to.div_ceil(unit) * unit);
        if step_s != 0 && (!step_s.is_multiple_of(unit) || (to - from).div_ceil(step_s) > MAX_PERIODS) {
            let least = (to - from).div_ceil(MAX_PERIODS).div_ceil(unit) * unit;
            let allowed =
                format!("0, or a multiple of {unit}, at least {least}: what is kept of that time is by {unit} seconds");
            return Err(Problem::invalid("step_s", step_s, allowed));
        }
        let model = self.model();
        let group = model.group(name)?;
        let target_us = model.policy_of(group).map_or(u64::MAX, |p| p.promises.rpo_target_us);
        let (history, uid) = (self.history.clone(), group.uid.clone());
        let read = tokio::task::spawn_blocking(move || history.read(&uid, unit, from, to)).await;
        let failed = |e: String| Problem::Internal(format!("the history cannot be read: {e}"));
        let mut kept = read.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
        // Of the present minute, which is not kept yet.
        let present = {
            let live = self.live.lock().expect("nothing panics while it holds this");
            live.streams.get(&group.uid).and_then(|s| s.rpo.peek(target_us))
        };
        let minute = self.minute();
        if let Some(present) = present.filter(|_| minute < to && minute >= from) {
            kept.push((minute - minute % unit, present));
        }
        let mut whole = Bucket::default();
        let mut parts: BTreeMap<u64, Bucket> = BTreeMap::new();
        for (begins, bucket) in &kept {
            whole.add(bucket);
            if let Some(number) = (begins - from).checked_div(step_s) {
                parts.entry(number).or_default().add(bucket);
            }
        }
        let periods = if step_s == 0 { 0 } else { (to - from).div_ceil(step_s) };
        let part = |i: u64| {
            let begins = from + i * step_s;
            period(begins, (begins + step_s).min(to), parts.get(&i))
        };
        Ok(v1::RpoReport {
            group: name.to_string(),
            target_us: if target_us == u64::MAX { 0 } else { target_us },
            whole: Some(period(from, to, Some(&whole))),
            periods: (0..periods).map(part).collect(),
        })
    }
}

/// What is not known is not set.
fn period(from_s: u64, to_s: u64, bucket: Option<&Bucket>) -> v1::RpoPeriod {
    let shown = v1::RpoPeriod { start_time_ns: from_s * NS, end_time_ns: to_s * NS, ..v1::RpoPeriod::default() };
    let Some(bucket) = bucket.filter(|b| b.total > 0) else { return shown };
    let at = |q: f64| Some(bucket.samples.value_at_quantile(q));
    let s = bucket.stages;
    v1::RpoPeriod {
        samples: bucket.total,
        p50_us: at(0.5),
        p95_us: at(0.95),
        p99_us: at(0.99),
        max_us: Some(bucket.samples.max()),
        within_target: Some(bucket.inside as f64 / bucket.total as f64),
        stages: Some(v1::RpoStages { idle: s.idle, seal: s.seal, link: s.link, durable: s.durable, silent: s.silent }),
        ..shown
    }
}
