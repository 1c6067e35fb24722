//! Sessions from the coordinator's side: a proxy registers, reports, leaves.

use std::sync::Arc;

use afterimage_wire::v1::coordinator_message::Message;
use afterimage_wire::v1::{self, Severity};
use tokio::sync::mpsc;

use super::Coordinator;
use crate::ca::{Identity, hex};
use crate::failover::Verb;
use crate::local;
use crate::names::{Kind, Name, check_id};
use crate::objects::{Group, GroupPhase, Object, Proxy};
use crate::problem::Problem;
use crate::sessions::Outgoing;

/// Longest text of a registration, bytes.
const MAX_TEXT: usize = 512;
/// Most entries of a list in a registration.
const MAX_LIST: usize = 64;
/// Most failovers that a target may have decided by itself.
const MAX_DECIDED: usize = 1_024;
/// Most events taken from one report.
const MAX_REPORT_EVENTS: usize = 64;

impl Coordinator {
    /// The proxy that a certificate stands for.
    ///
    /// # Errors
    /// It has been deleted, or has joined again with another key since.
    pub fn proxy_of(&self, who: &Identity) -> Result<Proxy, Problem> {
        let name = Name::new(&who.tenant, Kind::Proxy, &who.name);
        let pin = hex(&who.pin);
        let denied = |needs: &str| Problem::Denied {
            who: format!("proxy/{}", who.name),
            method: "afterimage.v1.ProxyControl/Session".to_owned(),
            needs: needs.to_owned(),
        };
        match self.model().proxy(&name) {
            Ok(p) if p.uid == who.uid && (p.pin == pin || p.previous_pin.as_ref() == Some(&pin)) => Ok(p.clone()),
            Ok(_) => Err(denied("this proxy has joined again since: use its newest certificate")),
            Err(_) => Err(denied("this proxy has been deleted: have it join again")),
        }
    }

    /// A proxy begins a session. Returns its uid and the session's epoch.
    ///
    /// # Errors
    /// Not the proxy of its certificate; it has seen a newer term or state than this coordinator has.
    pub async fn register(
        self: &Arc<Self>,
        who: &Identity,
        mut register: v1::Register,
        outbox: mpsc::Sender<Outgoing>,
    ) -> Result<(String, u64), Problem> {
        let proxy = self.proxy_of(who)?;
        let subject = proxy.name().to_string();
        check_register(&proxy, &register)?;
        let model = self.model();
        let unasked = model.unasked(&proxy.uid);
        let ahead = register.observed_version > model.version() || register.observed_term > model.term;
        if ahead && !unasked {
            // The store is older than what this proxy has seen: it was restored from a backup, or is another one.
            let state = format!(
                "ahead of this coordinator: it has seen version {} in term {}, the store is at {} in {}",
                register.observed_version,
                register.observed_term,
                model.version(),
                model.term
            );
            self.tell(Severity::Error, "proxy", &subject, &state);
            return Err(Problem::state(subject, state, "start the coordinator with its newest store"));
        }
        let decided = std::mem::take(&mut register.local_failovers);
        let (pin, now) = (hex(&who.pin), self.clock.wall_ns());
        let seen = (register.observed_term, register.observed_version);
        let changed = self
            .change_always(|model, txn| {
                if let Some(restored) = model.restored.as_ref().filter(|_| unasked) {
                    // Above all that it has seen, so that it takes what comes.
                    if seen.0 >= model.term {
                        txn.put(Object::Term(seen.0 + 1));
                    }
                    if seen.1 >= model.version() {
                        let offset = restored.offset + (seen.1 - model.version()) + 1;
                        txn.put(Object::Restored(crate::restore::Restored { offset, ..restored.clone() }));
                    }
                }
                let old = model.proxy(&proxy.name())?;
                let new = Proxy {
                    data_address: register.data_address,
                    nbd_addresses: register.nbd_addresses,
                    capabilities: register.capabilities,
                    boot_id: register.boot_id,
                    software_version: register.software_version,
                    site: register.site,
                    // Once it is here with its new key, the old one is done with.
                    previous_pin: old.previous_pin.clone().filter(|_| old.pin != pin),
                    ..old.clone()
                };
                if new != *old {
                    txn.put(Object::Proxy(Proxy { version: old.version + 1, ..new.clone() }));
                }
                // Before it is told anything, and before a command of an operation that was overtaken reaches it.
                let observing = model.unasked(&proxy.uid);
                Ok(decided.iter().map(|d| local::adopt(model, &proxy, d, now, observing, txn)).collect::<Vec<_>>())
            })
            .await;
        for found in changed? {
            match found {
                Ok(Some((group, message))) => self.tell(Severity::Warning, "failover", &group, &message),
                Ok(None) => {}
                Err(message) => self.tell(Severity::Error, "failover", &subject, &message),
            }
        }
        let epoch = self.sessions.begin(&proxy.uid, outbox.clone());
        let model = self.model();
        let registered =
            v1::Registered { term: model.term, report_interval_ms: self.settings.report_interval.as_millis() as u32 };
        let first = v1::CoordinatorMessage { message: Some(Message::Registered(registered)) };
        // Its outbox is new and empty.
        let _ = outbox.try_send(Ok(first));
        self.live.lock().expect("nothing panics while it holds this").proxies.entry(proxy.uid.clone()).or_default();
        if model.unasked(&proxy.uid) {
            self.observe(proxy.clone(), epoch);
        } else {
            self.converge(&model, &proxy, true);
        }
        self.tell(Severity::Info, "proxy", &subject, "connected");
        Ok((proxy.uid, epoch))
    }

    /// A proxy's session has ended.
    pub fn deregister(&self, who: &Identity, uid: &str, epoch: u64) {
        if self.sessions.end(uid, epoch) {
            let subject = Name::new(&who.tenant, Kind::Proxy, &who.name).to_string();
            self.tell(Severity::Warning, "proxy", &subject, "not connected any more");
        }
    }

    /// Tells a source which streams are its own: its leases go on from when it asked. Once a failover has begun, they
    /// do not.
    fn answer_report(&self, who: &Identity, uid: &str, model: &crate::model::Model, report: &v1::Report) {
        // Who leads no more prolongs no lease: the next leader may be waiting for its end.
        if report.number == 0 || !self.store.in_office() {
            return;
        }
        let own = |g: &&Group| {
            g.tenant == who.tenant
                && g.source == who.name
                && runs_at_its_source(model, g)
                && !g.hold
                && g.generation == g.writer_generation
                // After a restore only the target knows whether that is still so.
                && !model.unasked(uid)
                && !model.target_of(g).is_some_and(|t| model.unasked(&t.uid))
        };
        let streams = report.sources.iter().filter_map(|s| model.group_by_uid(&s.stream_uid));
        let stream_uids = streams.filter(own).map(|g| g.uid.clone()).collect();
        self.sessions.say(uid, Message::Heard(v1::Heard { report: report.number, stream_uids }));
    }

    /// A report has come.
    pub fn report(&self, who: &Identity, uid: &str, mut report: v1::Report) {
        let model = self.model();
        let stream = |uid: &str| model.stream(uid).filter(|(g, _)| g.tenant == who.tenant);
        let subject = |uid: &str| match stream(uid) {
            Some((g, _)) if g.source == who.name || g.target == who.name => g.name().to_string(),
            _ => Name::new(&who.tenant, Kind::Proxy, &who.name).to_string(),
        };
        self.answer_report(who, uid, &model, &report);
        let events: Vec<v1::ProxyEvent> = std::mem::take(&mut report.events);
        for event in events.iter().take(MAX_REPORT_EVENTS) {
            let kind = if is_word(&event.kind) { event.kind.as_str() } else { "proxy" };
            self.tell(event.severity(), kind, &subject(&event.stream_uid), &event.message);
        }
        let is_source = |uid: &str| stream(uid).is_some_and(|(g, way)| g.sender(way) == who.name);
        let is_target = |uid: &str| stream(uid).is_some_and(|(g, way)| g.keeper(way) == who.name);
        let now = self.clock.mono_ns();
        let remarks = {
            let mut live = self.live.lock().expect("nothing panics while it holds this");
            // Read inside: what is sent after it resets the lease afterwards.
            let told = self.sessions.desired_version(uid);
            live.report(now, uid, report, told, is_source, is_target)
        };
        for remark in remarks {
            self.tell(Severity::Warning, "report", &subject(&remark.stream_uid), &remark.message);
        }
    }
}

/// Its source's leases go on: nobody is about to take its disks from it.
fn runs_at_its_source(model: &crate::model::Model, group: &Group) -> bool {
    match group.phase {
        GroupPhase::Protecting | GroupPhase::FailedBack { .. } => true,
        // A commitment takes nothing.
        GroupPhase::Settling { .. } => {
            model.active_operation(group).is_some_and(|o| o.work.spec.verb == Verb::CommitFailback)
        }
        _ => false,
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= 32 && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
}

fn check_register(proxy: &Proxy, register: &v1::Register) -> Result<(), Problem> {
    if register.name != proxy.id {
        return Err(Problem::invalid(
            "register.name",
            &register.name,
            format!("as in its certificate: {:?}", proxy.id),
        ));
    }
    if register.uid != proxy.uid {
        return Err(Problem::invalid("register.uid", &register.uid, format!("as given when it joined: {}", proxy.uid)));
    }
    let texts = [&register.software_version, &register.data_address, &register.boot_id];
    let lists = [&register.nbd_addresses, &register.capabilities];
    let long = |t: &String| t.len() > MAX_TEXT || t.chars().any(char::is_control);
    if lists.iter().any(|l| l.len() > MAX_LIST) || texts.into_iter().chain(lists.into_iter().flatten()).any(long) {
        let allowed = format!("lists of up to {MAX_LIST}, texts of up to {MAX_TEXT} bytes without control characters");
        return Err(Problem::invalid("register", "too much", allowed));
    }
    let decided = register.local_failovers.len();
    if decided > MAX_DECIDED {
        return Err(Problem::invalid("register.local_failovers", decided, format!("at most {MAX_DECIDED}")));
    }
    if !register.site.is_empty() {
        check_id("register.site", &register.site)?;
    }
    if !register.data_address.is_empty() {
        let port = register
            .data_address
            .rsplit_once(':')
            .and_then(|(host, port)| port.parse::<u16>().ok().filter(|p| *p != 0 && !host.is_empty()));
        if port.is_none() {
            return Err(Problem::invalid("register.data_address", &register.data_address, "\"host:port\""));
        }
    }
    Ok(())
}
