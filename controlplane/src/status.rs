//! What is shown of a group: its phase and conditions, from the objects and what is reported. Pure.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use afterimage_wire::v1::{self, Severity};

use crate::ca::{GRACE, overdue_time_ns};
use crate::convert;
use crate::live::{Live, ProxyLive, StreamLive};
use crate::model::Model;
use crate::names::{Kind, Name, child};
use crate::objects::{Disk, Group, GroupPhase, Object, Proxy, Way};
use crate::reverse;
use crate::rpo::WINDOW_S;
use crate::text;

/// A proxy whose session is open but that says nothing for this long is silent, nanoseconds.
const SILENT_NS: u64 = 3_000_000_000;
/// When a proxy's certificate is renewed if that was not noted: so long before its end, nanoseconds.
const RENEW_BEFORE_NS: u64 = 30 * 86_400 * 1_000_000_000;

/// A condition as found; since when it has been so is the tracker's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Kind.
    pub kind: &'static str,
    /// How bad.
    pub severity: Severity,
    /// For a person.
    pub message: String,
}

pub(crate) fn finding(kind: &'static str, severity: Severity, message: impl Into<String>) -> Finding {
    Finding { kind, severity, message: message.into() }
}

/// What is looked at.
pub struct Scene<'a> {
    /// Objects.
    pub model: &'a Model,
    /// Reports.
    pub live: &'a Live,
    /// Whether a proxy (by uid) has a session.
    pub connected: &'a dyn Fn(&str) -> bool,
    /// The coordinator's monotonic clock, nanoseconds.
    pub now_ns: u64,
    /// The wall clock, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
}

impl Scene<'_> {
    fn reach(&self, role: &str, kind: &'static str, id: &str, proxy: Option<&Proxy>, out: &mut Vec<Finding>) -> bool {
        let Some(proxy) = proxy else {
            out.push(finding(kind, Severity::Error, format!("the {role} proxy \"{id}\" does not exist any more")));
            return false;
        };
        if !(self.connected)(&proxy.uid) {
            let message = format!("the {role} proxy \"{id}\" is not connected; look at that host");
            out.push(finding(kind, Severity::Error, message));
            return false;
        }
        let heard = self.live.proxies.get(&proxy.uid).and_then(|p| p.last_heard_ns);
        if heard.is_some_and(|h| self.now_ns.saturating_sub(h) > SILENT_NS) {
            let message = format!("the {role} proxy \"{id}\" is connected and reports nothing");
            out.push(finding("silent", Severity::Error, message));
        }
        true
    }

    /// The conditions of a group.
    pub fn conditions(&self, group: &Group) -> Vec<Finding> {
        let mut out = Vec::new();
        if group.phase == GroupPhase::Deleting {
            out.push(finding("deleting", Severity::Info, "being deleted; if that stopped half-way, delete it again"));
        }
        self.pause_condition(group, &mut out);
        let over = group.phase.is_failed_over();
        let (source, target) = (self.model.source_of(group), self.model.target_of(group));
        // A group that runs at its target does not need its source, unless it is failing back.
        let needed = !over || group.reverse.is_some();
        let source_there = needed && self.reach("source", "source-unreachable", &group.source, source, &mut out);
        let target_there = self.reach("target", "target-unreachable", &group.target, target, &mut out);
        let nothing = StreamLive::default();
        let stream = self.live.streams.get(&group.uid).unwrap_or(&nothing);
        if let Some((_, report)) = stream.source.as_ref().filter(|_| source_there && !over) {
            self.source_conditions(group, report, &mut out);
        }
        if let Some((_, report)) = stream.target.as_ref().filter(|_| target_there) {
            if !report.stopped.is_empty() {
                out.push(finding("target-stopped", Severity::Error, format!("takes no data: {}", report.stopped)));
            }
            if !report.damage.is_empty() {
                let severity = if report.newest_damaged { Severity::Error } else { Severity::Warning };
                out.push(finding("damaged", severity, report.damage.join("; ")));
            }
            if !report.shortened.is_empty() {
                out.push(finding("shortened", Severity::Warning, report.shortened.clone()));
            }
            if !report.folding.is_empty() {
                out.push(finding("folding", Severity::Error, format!("history cannot be folded: {}", report.folding)));
            }
        }
        if let (Some(ms), Some(policy), false) =
            (stream.alarm.raised_for_ms(self.now_ns), self.model.policy_of(group), over)
        {
            let target = policy.promises.rpo_target_us as f64 / 1000.0;
            let severity = if ms >= policy.promises.error_after_ms { Severity::Error } else { Severity::Warning };
            out.push(finding("rpo-above-target", severity, format!("above its target of {target} ms")));
        }
        self.problem_conditions(group, [source.filter(|_| needed), target], &mut out);
        self.back_conditions(group, &mut out);
        out
    }

    /// How far a failback is, and what is left of earlier ones.
    fn back_conditions(&self, group: &Group, out: &mut Vec<Finding>) {
        if let Some(uid) = group.stream(Way::Back) {
            out.push(match self.missing_back(group) {
                None => finding("ready-to-switch", Severity::Info, "its source has all of it"),
                Some(missing) => finding("failing-back", Severity::Info, format!("not ready to switch: {missing}")),
            });
            let report = self.live.streams.get(uid).and_then(|s| s.target.as_ref());
            if let Some((_, report)) = report.filter(|(_, r)| !r.stopped.is_empty()) {
                let message = format!("\"{}\" takes no data of the failback: {}", group.source, report.stopped);
                out.push(finding("reverse-stopped", Severity::Error, message));
            }
        }
        if let GroupPhase::FailedBack { .. } = group.phase {
            let message = match self.missing_back(group) {
                None => "can be committed, or undone".to_owned(),
                Some(missing) => format!("can be undone, and not be committed yet: {missing}"),
            };
            out.push(finding("failed-back", Severity::Info, message));
        }
        for leftover in &group.leftovers {
            let ends = [(leftover.at_target, &group.target), (leftover.at_source, &group.source)];
            let proxies: Vec<String> = ends.iter().filter(|(at, _)| *at).map(|(_, p)| format!("\"{p}\"")).collect();
            let message = format!(
                "{} is still to end the stream {} of an earlier failback; it is told until it has done so",
                proxies.join(" and "),
                leftover.stream_uid
            );
            out.push(finding("leftover", Severity::Warning, message));
        }
    }

    /// What is missing before a group that is failing back can switch, or before one that is failed back can be committed.
    pub fn missing_back(&self, group: &Group) -> Option<String> {
        let proxies = [(&group.target, self.model.target_of(group)), (&group.source, self.model.source_of(group))];
        let away = proxies.into_iter().find(|(_, p)| !p.is_some_and(|p| (self.connected)(&p.uid)));
        if let Some((id, _)) = away {
            return Some(format!("\"{id}\" is not connected"));
        }
        let (way, after) = match group.phase {
            GroupPhase::FailedBack { after, .. } | GroupPhase::Settling { after, .. } => (Way::Forth, after),
            _ => (Way::Back, 0),
        };
        reverse::missing(self.model, self.live, group, way, after)
    }

    /// How far a failback is, as it is shown.
    fn reverse(&self, group: &Group) -> Option<v1::ReverseStatus> {
        let uid = group.stream(Way::Back)?;
        let nothing = StreamLive::default();
        let stream = self.live.streams.get(uid).unwrap_or(&nothing);
        let source = stream.source.as_ref().map(|(_, r)| r.clone()).unwrap_or_default();
        let target = stream.target.as_ref().map(|(_, r)| r.clone()).unwrap_or_default();
        let missing = self.missing_back(group);
        let target_us = self.model.policy_of(group).map_or(0, |p| p.promises.rpo_target_us);
        Some(v1::ReverseStatus {
            stream_uid: uid.to_owned(),
            ready: missing.is_none(),
            missing: missing.unwrap_or_default(),
            rpo: Some(self.rpo_of(stream, target_us, true)),
            sync: source.sync,
            captured_seq: source.captured_seq,
            durable_seq: target.durable_seq,
            wire_bytes: source.wire_bytes,
            points: target.points,
            journal_bytes: target.journal_bytes,
        })
    }

    /// That a group is paused, and whether its source does so.
    fn pause_condition(&self, group: &Group, out: &mut Vec<Finding>) {
        let Some(pause) = &group.pause else { return };
        let since = format!("since {} by {}", text::time(pause.at_ns), pause.by);
        let why = if pause.reason.is_empty() { String::new() } else { format!(" ({})", pause.reason) };
        let message = match self.is_paused(group) {
            true => format!(
                "{since}{why}: what is written queues at its source, and the RPO grows until it is resumed; that raises no alarm"
            ),
            false => {
                format!("{since}{why}: its source has not confirmed that it sends nothing; it is told when it is there")
            }
        };
        out.push(finding("paused", Severity::Info, message));
    }

    /// Its source has said, since it was told, that it sends nothing.
    fn is_paused(&self, group: &Group) -> bool {
        let connected = self.model.source_of(group).is_some_and(|p| (self.connected)(&p.uid));
        let report = self.live.streams.get(&group.uid).and_then(|s| s.source.as_ref());
        connected && report.is_some_and(|(_, report)| report.paused)
    }

    fn source_conditions(&self, group: &Group, report: &v1::SourceGroupReport, out: &mut Vec<Finding>) {
        // What a pause brings along is no news to whoever paused it.
        let expected = |severity| if group.pause.is_some() { Severity::Info } else { severity };
        if report.held_reason == "lease" {
            let message = "the source holds all I/O: no word from target or coordinator for the time of its lease";
            out.push(finding("held", Severity::Error, message));
        } else if report.held && !group.hold {
            out.push(finding("held", Severity::Error, "the source holds all I/O though it need not"));
        } else if report.held {
            out.push(finding("held", Severity::Warning, "the source holds all I/O"));
        }
        if report.fenced {
            let message = "the target refuses the source's generation: its disks have been taken from it";
            out.push(finding("fenced", Severity::Error, message));
        }
        if report.synchronous && !report.synchronous_now {
            let message = format!("writes are answered without waiting: {}", report.synchronous_detail);
            out.push(finding("asynchronous", Severity::Warning, message));
        }
        let detail = &report.link_detail;
        match report.link() {
            v1::LinkState::Down => out.push(finding("link-down", Severity::Error, detail.clone())),
            v1::LinkState::Refused => out.push(finding("refused", Severity::Error, detail.clone())),
            _ => {}
        }
        if report.outside_hours && group.pause.is_none() {
            let message = "its policy lets nothing be sent at this hour: what is written queues at the source";
            out.push(finding("outside-hours", Severity::Info, message));
        }
        match report.rung() {
            v1::Rung::Spilling => {
                let until = report.catch_up_ms.map(|ms| format!("; sent in about {} s", ms.div_ceil(1000)));
                let message = format!("frames queue on the source's disk{}", until.unwrap_or_default());
                out.push(finding("spilling", expected(Severity::Warning), message));
            }
            v1::Rung::Dirty => {
                let message = "captured without order: a resync follows, and no new points until it is done";
                out.push(finding("dirty", expected(Severity::Error), message));
            }
            _ => {}
        }
        if !report.spill_trouble.is_empty() {
            let message = format!("the spill takes nothing: {}", report.spill_trouble);
            out.push(finding("spill-trouble", Severity::Warning, message));
        }
        if report.sync.is_some() && group.complete {
            out.push(finding("resyncing", expected(Severity::Warning), "disks are being synchronised again"));
        }
        for disk in report.disks.iter().filter(|d| d.state.starts_with("failed")) {
            out.push(finding("disk-failed", Severity::Error, format!("{}: {}", disk.disk_uid, disk.state)));
        }
    }

    fn problem_conditions(&self, group: &Group, proxies: [Option<&Proxy>; 2], out: &mut Vec<Finding>) {
        for proxy in proxies.into_iter().flatten() {
            let problems = self.live.proxies.get(&proxy.uid).map(|p| p.problems.as_slice()).unwrap_or_default();
            let own = |uid: &str| group.uid == uid || group.stream(Way::Back) == Some(uid);
            for problem in problems.iter().filter(|p| own(&p.stream_uid)) {
                out.push(finding("error", Severity::Error, format!("\"{}\": {}", proxy.id, problem.message)));
            }
        }
    }

    /// The conditions of a proxy.
    pub fn proxy_conditions(&self, proxy: &Proxy) -> Vec<Finding> {
        let mut out = Vec::new();
        let nothing = ProxyLive::default();
        let live = self.live.proxies.get(&proxy.uid).unwrap_or(&nothing);
        if !(self.connected)(&proxy.uid) {
            out.push(finding("unreachable", Severity::Error, "not connected; look at that host"));
        } else if live.last_heard_ns.is_some_and(|h| self.now_ns.saturating_sub(h) > SILENT_NS) {
            out.push(finding("silent", Severity::Error, "connected, and reports nothing"));
        }
        out.extend(self.certificate(proxy));
        for problem in live.problems.iter().filter(|p| p.stream_uid.is_empty()) {
            out.push(finding("error", Severity::Error, problem.message.clone()));
        }
        out
    }

    /// That a proxy's certificate has not been renewed in time.
    fn certificate(&self, proxy: &Proxy) -> Option<Finding> {
        let expire = proxy.expire_time_ns;
        let renew = if proxy.renew_time_ns == 0 { expire.saturating_sub(RENEW_BEFORE_NS) } else { proxy.renew_time_ns };
        if self.wall_ns > expire {
            let until = text::time(expire.saturating_add(GRACE.as_nanos() as u64));
            let message = format!(
                "its certificate ended at {}: it renews it when it reaches this coordinator; proxies that are paired with \
                 it take it until {until}",
                text::time(expire)
            );
            return Some(finding("certificate-expired", Severity::Error, message));
        }
        let message = format!(
            "its certificate ends at {} and has not been renewed: look at that host, and at its events of kind certificate",
            text::time(expire)
        );
        (self.wall_ns > overdue_time_ns(renew, expire))
            .then(|| finding("certificate-expires", Severity::Warning, message))
    }

    /// A group as it is shown. `since` gives when a condition of this group began.
    pub fn group_status(&self, group: &Group, since: &dyn Fn(&str, &str) -> u64) -> v1::GroupStatus {
        let (model, name) = (self.model, group.name());
        let subject = name.to_string();
        let nothing = StreamLive::default();
        let stream = self.live.streams.get(&group.uid).unwrap_or(&nothing);
        let source = stream.source.as_ref().map(|(_, r)| r.clone()).unwrap_or_default();
        let target = stream.target.as_ref().map(|(_, r)| r.clone()).unwrap_or_default();
        let rates = stream.rates.shown(self.now_ns);
        let disks = model.disks_of(group).map(|disk| {
            let report = source.disks.iter().find(|r| r.disk_uid == disk.uid).cloned().unwrap_or_default();
            v1::DiskStatus {
                name: child(&name, "disks", &disk.id),
                uid: disk.uid.clone(),
                state: report.state,
                sync: report.sync,
                uris: report.uris,
                clients: report.clients,
                generation: held_generation(&target, disk).unwrap_or(group.generation),
                size_bytes: disk.size,
            }
        });
        let view = |view| {
            let shown = convert::view_to_proto(model, view);
            // Open is what the target says, once it has said anything.
            let open = stream.target.is_none() || stream.views.contains_key(&view.proxy_name());
            v1::View { open: shown.open && open, ..shown }
        };
        v1::GroupStatus {
            phase: convert::phase_to_proto(group).into(),
            conditions: as_conditions(&subject, self.conditions(group), since),
            operation: model.active_operation(group).map(|o| convert::operation_to_proto(model, o)),
            rpo: Some(self.rpo(group, stream)),
            rung: source.rung,
            lease_ms: stream.lease_ms,
            synchronous: match (source.synchronous, source.synchronous_now) {
                (false, _) => String::new(),
                (true, true) => "together".to_owned(),
                (true, false) => "apart".to_owned(),
            },
            zero_loss: zero_loss(stream, self.now_ns),
            writes_per_s: rates.writes,
            captured_bytes_per_s: rates.captured,
            wire_bytes_per_s: rates.wire,
            writes: source.writes,
            captured_bytes: source.captured_bytes,
            wire_bytes: source.wire_bytes,
            queue_bytes: source.queue_bytes,
            queue_limit_bytes: source.queue_limit_bytes,
            spill_bytes: source.spill_bytes,
            spill_limit_bytes: source.spill_limit_bytes,
            catch_up_ms: source.catch_up_ms,
            captured_seq: source.captured_seq,
            sent_seq: source.sent_seq,
            durable_seq: target.durable_seq,
            sync: source.sync,
            points: target.points.clone().map(|p| convert::named_summary(&name, p)),
            journal_bytes: target.journal_bytes,
            journal_budget_bytes: target.journal_budget_bytes,
            segments: target.segments,
            scrub: target.scrub,
            reverse: self.reverse(group),
            pause: group.pause.as_ref().map(|pause| convert::pause_to_proto(pause, self.is_paused(group))),
            disks: disks.collect(),
            views: model.views_of(group).map(view).collect(),
            source: Name::new(&group.tenant, Kind::Proxy, &group.source).to_string(),
            target: Name::new(&group.tenant, Kind::Proxy, &group.target).to_string(),
            policy: Name::new(&group.tenant, Kind::Policy, &group.policy).to_string(),
            uid: group.uid.clone(),
            name: subject,
        }
    }

    /// The RPO of a group as it is shown.
    pub fn rpo(&self, group: &Group, stream: &StreamLive) -> v1::Rpo {
        let target_us = self.model.policy_of(group).map_or(0, |p| p.promises.rpo_target_us);
        self.rpo_of(stream, target_us, !group.phase.is_failed_over())
    }

    /// The RPO of a stream as it is shown, if it has one.
    fn rpo_of(&self, stream: &StreamLive, target_us: u64, has: bool) -> v1::Rpo {
        let shown = stream.rpo.shown(self.now_ns, target_us).filter(|_| has);
        v1::Rpo {
            now_us: shown.map(|s| s.now_us),
            p50_us: shown.map(|s| s.p50_us),
            p99_us: shown.map(|s| s.p99_us),
            max_us: shown.map(|s| s.max_us),
            report_age_us: shown.map(|s| s.report_age_us),
            target_us,
            within_target: shown.map(|s| s.within_target),
            window_s: WINDOW_S,
        }
    }

    /// A proxy as it is shown.
    pub fn proxy(&self, proxy: &Proxy, desired_version: u64, since: &dyn Fn(&str, &str) -> u64) -> v1::Proxy {
        let subject = proxy.name().to_string();
        let live = self.live.proxies.get(&proxy.uid);
        let heard = live.and_then(|p| p.last_heard_ns);
        v1::Proxy {
            uid: proxy.uid.clone(),
            etag: self.model.etag(&Object::Proxy(proxy.clone()).key()),
            version: proxy.version,
            create_time_ns: proxy.created_ns,
            connected: (self.connected)(&proxy.uid),
            last_heard_age_ms: heard.map(|h| self.now_ns.saturating_sub(h) / 1_000_000),
            data_address: proxy.data_address.clone(),
            nbd_addresses: proxy.nbd_addresses.clone(),
            capabilities: proxy.capabilities.clone(),
            boot_id: proxy.boot_id.clone(),
            software_version: proxy.software_version.clone(),
            key_pin: proxy.pin.clone(),
            certificate_expire_time_ns: proxy.expire_time_ns,
            observed_version: live.map_or(0, |p| p.observed_version),
            desired_version,
            site: proxy.site.clone(),
            room: live.and_then(|p| p.room),
            conditions: as_conditions(&subject, self.proxy_conditions(proxy), since),
            name: subject,
        }
    }
}

/// What the target claimed holds for as long as it said, and not while the source says that it answers by itself.
fn zero_loss(stream: &StreamLive, now_ns: u64) -> bool {
    let apart = stream.source.as_ref().is_some_and(|(_, r)| r.synchronous && !r.synchronous_now);
    let holds = |(at, r): &(u64, v1::TargetStreamReport)| {
        r.zero_loss && now_ns.saturating_sub(*at) < r.zero_loss_ms.saturating_mul(1_000_000)
    };
    !apart && stream.target.as_ref().is_some_and(holds)
}

fn as_conditions(subject: &str, found: Vec<Finding>, since: &dyn Fn(&str, &str) -> u64) -> Vec<v1::Condition> {
    let one = |f: Finding| v1::Condition {
        kind: f.kind.to_owned(),
        severity: f.severity.into(),
        since_ns: since(subject, f.kind),
        message: f.message,
    };
    found.into_iter().map(one).collect()
}

/// Since when each condition has been so; tells what has begun and ended.
#[derive(Default)]
pub struct Tracker {
    since: BTreeMap<(String, String), (u64, Severity)>,
}

impl Tracker {
    /// Since when a subject has had a condition; 0 if it has not.
    pub fn since(&self, subject: &str, kind: &str) -> u64 {
        self.since.get(&(subject.to_owned(), kind.to_owned())).map_or(0, |(since, _)| *since)
    }

    /// Takes in the conditions of a subject and returns what to tell.
    pub fn update(&mut self, subject: &str, found: &[Finding], wall_ns: u64) -> Vec<(Severity, String)> {
        let mut told = Vec::new();
        let gone: Vec<(String, String)> = self
            .since
            .keys()
            .filter(|(s, kind)| s == subject && !found.iter().any(|f| f.kind == kind))
            .cloned()
            .collect();
        for key in gone {
            self.since.remove(&key);
            told.push((Severity::Info, format!("{}: over", key.1)));
        }
        for f in found {
            let key = (subject.to_owned(), f.kind.to_owned());
            match self.since.entry(key) {
                Entry::Vacant(new) => {
                    new.insert((wall_ns, f.severity));
                }
                Entry::Occupied(mut known) if known.get().1 < f.severity => known.get_mut().1 = f.severity,
                Entry::Occupied(mut known) => {
                    known.get_mut().1 = f.severity;
                    continue;
                }
            }
            told.push((f.severity, format!("{}: {}", f.kind, f.message)));
        }
        told
    }

    /// Forgets subjects that do not exist any more.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.since.retain(|(subject, _), _| exists(subject));
    }
}

/// The generation of a disk, as its target has it: it is the arbiter.
fn held_generation(target: &v1::TargetStreamReport, disk: &Disk) -> Option<u64> {
    target.disks.iter().find(|held| held.disk_uid == disk.uid).map(|held| held.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_told_when_it_begins_and_when_it_ends() {
        let mut tracker = Tracker::default();
        let down = [finding("link-down", Severity::Error, "no route")];
        assert_eq!(tracker.update("g", &down, 7), [(Severity::Error, "link-down: no route".to_owned())]);
        assert!(tracker.update("g", &down, 8).is_empty());
        assert_eq!(tracker.since("g", "link-down"), 7);
        assert!(tracker.update("other", &[], 9).is_empty());
        assert_eq!(tracker.update("g", &[], 10).len(), 1);
        assert_eq!(tracker.since("g", "link-down"), 0);
    }

    #[test]
    fn a_condition_that_gets_worse_is_told_again() {
        let mut tracker = Tracker::default();
        let as_bad_as = |severity| [finding("rpo-above-target", severity, "x")];
        assert_eq!(tracker.update("g", &as_bad_as(Severity::Warning), 7).len(), 1);
        assert_eq!(tracker.update("g", &as_bad_as(Severity::Error), 8)[0].0, Severity::Error);
        assert!(tracker.update("g", &as_bad_as(Severity::Error), 9).is_empty());
        assert_eq!(tracker.since("g", "rpo-above-target"), 7);
    }

    #[test]
    fn zero_loss_is_claimed_for_as_long_as_the_target_said() {
        let mut stream = StreamLive::default();
        assert!(!zero_loss(&stream, 7));
        let report = v1::TargetStreamReport { zero_loss: true, zero_loss_ms: 500, ..Default::default() };
        stream.target = Some((1_000_000_000, report));
        assert!(zero_loss(&stream, 1_499_000_000));
        // The target stands still: what it said last has ended.
        assert!(!zero_loss(&stream, 1_500_000_000));
        let apart = v1::SourceGroupReport { synchronous: true, ..Default::default() };
        stream.source = Some((1_100_000_000, apart));
        assert!(!zero_loss(&stream, 1_200_000_000));
    }

    #[test]
    fn subjects_that_are_gone_are_forgotten() {
        let mut tracker = Tracker::default();
        tracker.update("g", &[finding("x", Severity::Info, "")], 7);
        tracker.retain(|s| s != "g");
        assert!(tracker.since.is_empty());
    }
}
