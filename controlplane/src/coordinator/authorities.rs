//! Replacing the authority: begun, carried out by everybody's renewal, ended.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{self, Severity};

use super::Coordinator;
use crate::authorities::{Authorities, Authority, Trust, needed_by};
use crate::ca::{Ca, Identity};
use crate::certificates::shown;
use crate::model::Model;
use crate::names::{DEFAULT_TENANT, tenant};
use crate::objects::{Object, Proxy};
use crate::problem::Problem;
use crate::requests::Asked;
use crate::status::{Finding, finding};
use crate::text;

/// How long an answer has to reach who has locked itself out.
const ANSWERED: Duration = Duration::from_secs(1);
/// Holders that a refusal names.
const NAMED: usize = 5;
/// An authority that ends sooner than this should be replaced, nanoseconds.
const SOON_NS: u64 = 365 * 86_400 * 1_000_000_000;

impl Coordinator {
    /// The authority that a proxy's certificate is to be of: the new one only once each proxy at the other end of one of its
    /// streams trusts it, or that would refuse it.
    pub(super) fn issuer_of(&self, model: &Model, proxy: &Proxy) -> String {
        let trust = self.trust();
        let Some(replaced) = &trust.replaced else { return trust.issuing.id().to_owned() };
        let version = model.authorities_version();
        let live = self.live.lock().expect("nothing panics while it holds this");
        let knows = |p: &Proxy| live.proxies.get(&p.uid).is_some_and(|l| l.observed_version >= version);
        let groups = model.groups.values().filter(|g| g.tenant == proxy.tenant);
        let ends = groups.filter(|g| g.source == proxy.id || g.target == proxy.id);
        let mut peers = ends.flat_map(|g| [model.source_of(g), model.target_of(g)]).flatten();
        let ready = knows(proxy) && peers.all(knows);
        if ready { trust.issuing.id().to_owned() } else { replaced.id().to_owned() }
    }

    /// The authority that issues a certificate to this proxy, or to a person.
    pub(super) fn issuer(&self, model: &Model, proxy: Option<&Proxy>) -> Arc<Ca> {
        let trust = self.trust();
        match (&trust.replaced, proxy) {
            (Some(replaced), Some(proxy)) if self.issuer_of(model, proxy) == replaced.id() => replaced.clone(),
            _ => trust.issuing.clone(),
        }
    }

    /// While the authority is being replaced: tells proxies to renew as soon as they may.
    pub(super) fn further_rotation(&self, model: &Model) {
        if self.trust().replaced.is_some() {
            for proxy in model.proxies.values().filter(|p| self.sessions.connected(&p.uid)) {
                self.converge(model, proxy, false);
            }
        }
    }

    /// Authorities that end within a year: to be replaced.
    pub(super) fn ending_authorities(&self, now_ns: u64) -> Vec<(String, Vec<Finding>)> {
        let trust = self.trust();
        let soon = |ca: &&Arc<Ca>| ca.expire_time_ns() < now_ns.saturating_add(SOON_NS);
        let found = std::iter::once(&trust.issuing).filter(soon).map(|ca| {
            let message = format!("it ends at {}: replace it (afterimage ca rotate)", text::time(ca.expire_time_ns()));
            let subject = format!("{}/authorities/{}", tenant(DEFAULT_TENANT), ca.id());
            (subject, vec![finding("authority-expires", Severity::Warning, message)])
        });
        found.collect()
    }

    /// The authorities as they are shown to a tenant.
    pub fn authorities(&self, of: &str) -> v1::Authorities {
        let (trust, model) = (self.trust(), self.model());
        let since = |id: &str| {
            let known = model.authorities.as_ref();
            let all = known.into_iter().flat_map(|k| std::iter::once(&k.issuing).chain(&k.replaced));
            all.filter(|a| a.id == id).map(|a| a.since_ns).next().unwrap_or(0)
        };
        let one = |ca: &Arc<Ca>, issuing| v1::Authority {
            id: ca.id().to_owned(),
            certificate_pem: ca.certificate_pem().to_owned(),
            issuing,
            begin_time_ns: since(ca.id()),
            expire_time_ns: ca.expire_time_ns(),
        };
        let replaced = trust.replaced.as_ref();
        let left = replaced.map(|ca| needed_by(&model, ca.id(), self.clock.wall_ns())).unwrap_or_default();
        v1::Authorities {
            authorities: std::iter::once(one(&trust.issuing, true)).chain(replaced.map(|ca| one(ca, false))).collect(),
            needed_by: left.into_iter().filter(|c| c.tenant == of).map(|c| shown(c, true)).collect(),
        }
    }

    /// Begins to replace the authority.
    ///
    /// # Errors
    /// It is being replaced already.
    pub async fn begin_rotation(self: &Arc<Self>, validate_only: bool, request: &Asked) -> Result<(), Problem> {
        let now = self.clock.wall_ns();
        let begun = self
            .change(|model, txn| {
                if request.done(model)?.is_some() {
                    return Ok(None);
                }
                let known = model.authorities.clone();
                if let Some(old) = known.as_ref().and_then(|k| k.replaced.as_ref()) {
                    let remedy = "end that first: afterimage ca rotate --finish";
                    return Err(Problem::state(
                        "the authority",
                        format!("being replaced already ({})", old.id),
                        remedy,
                    ));
                }
                let id = self.file_ca.id().to_owned();
                let first = Authority { id, wrapped: None, since_ns: 0, under: String::new() };
                let replaced = Some(known.map_or(first, |k| k.issuing));
                if validate_only {
                    return Ok(None);
                }
                // In its turn: the wrapping key of now is not given up meanwhile.
                let new = Authority::generate(&self.keys, now).map_err(Problem::Internal)?;
                let issuing = new.id.clone();
                txn.put(Object::Authorities(Authorities { issuing: new, replaced }));
                request.record(model, txn, now, &issuing);
                Ok(Some(issuing))
            })
            .await?;
        if let Some(issuing) = begun {
            let message = format!("authority {issuing} issues from now on; the one before is trusted beside it");
            self.tell(Severity::Warning, "authority", &tenant(DEFAULT_TENANT), &message);
        }
        Ok(())
    }

    /// Ends a rotation: certificates of the old authority are taken no more.
    ///
    /// # Errors
    /// There is none; somebody needs the old one, and it is not said to be done `anyway`.
    pub async fn finish_rotation(
        self: &Arc<Self>,
        by: &Identity,
        anyway: bool,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(), Problem> {
        let now = self.clock.wall_ns();
        let ended = self
            .change(|model, txn| {
                if request.done(model)?.is_some() {
                    return Ok(None);
                }
                let known = model.authorities.clone();
                let Some((known, old)) = known.and_then(|k| k.replaced.clone().map(|old| (k, old))) else {
                    let remedy = "begin with: afterimage ca rotate";
                    return Err(Problem::state("the authority", "not being replaced", remedy));
                };
                let left = needed_by(model, &old.id, now);
                if !left.is_empty() && !anyway {
                    let mut names: Vec<String> = left.iter().take(NAMED).map(|c| c.holder()).collect();
                    if left.len() > NAMED {
                        names.push(format!("{} more", left.len() - NAMED));
                    }
                    let remedy = "they renew by themselves when they are here; --anyway locks them out";
                    let state = format!("needed still by {}", names.join(", "));
                    return Err(Problem::state(format!("authority {}", old.id), state, remedy));
                }
                if validate_only {
                    return Ok(None);
                }
                txn.put(Object::Authorities(Authorities { replaced: None, ..known }));
                request.record(model, txn, now, &old.id);
                Ok(Some((old.id, left.len())))
            })
            .await?;
        if let Some((old, left)) = ended {
            // From here on no call by them is let in. Who asked for it is to have its answer first.
            self.connections.end(|who| who.issuer == old && who.serial != by.serial);
            if by.issuer == old {
                let (connections, old) = (self.connections.clone(), old.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(ANSWERED).await;
                    connections.end(|who| who.issuer == old);
                });
            }
            let locked = if left > 0 { format!("; {left} who have not renewed are locked out") } else { String::new() };
            let message = format!("authority {old} is trusted no more{locked}");
            self.tell(Severity::Warning, "authority", &tenant(DEFAULT_TENANT), &message);
        }
        Ok(())
    }

    /// Opens the authorities that a new model has.
    pub(super) fn reopen_trust(&self, model: &Model) {
        match Trust::open(&self.file_ca, model.authorities.as_ref(), &self.keys) {
            Ok(trust) => drop(self.trust.send_replace(Arc::new(trust))),
            // What was wrapped a moment ago opens.
            Err(error) => tracing::error!(error, "the authorities do not open"),
        }
    }
}
