//! What is known of certificates: noted when they are shown, forgotten when they are over, alarms when they are not
//! renewed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_wire::v1::{self, Severity};

use super::Coordinator;
use crate::ca::{Identity, Role};
use crate::certificates::{self, Certificate, Revoked, newest};
use crate::model::Model;
use crate::objects::Object;
use crate::problem::Problem;
use crate::requests::Asked;
use crate::status::{Finding, finding};
use crate::text;

/// Certificates that are being noted at once; others are when they are next shown.
const MAX_NOTING: usize = 64;
/// Longest reason of a revocation, bytes.
const MAX_REASON: usize = 256;
/// Between two records that the same certificate was refused.
const NEWS: Duration = Duration::from_secs(60);
/// Certificates whose refusal is remembered for that.
const MAX_REFUSED: usize = 1024;

impl Coordinator {
    /// A caller has shown a certificate. One of which nothing is known is noted: it was issued by an earlier version.
    pub fn note_certificate(self: &Arc<Self>, who: &Identity) {
        let model = self.model();
        if model.certificate(&who.tenant, &who.serial).is_some() || model.observing() {
            return;
        }
        let fresh = {
            let mut noting = self.noting.lock().expect("nothing panics while it holds this");
            noting.len() < MAX_NOTING && noting.insert(who.serial.clone())
        };
        if !fresh {
            return;
        }
        let (coordinator, certificate) = (self.clone(), Certificate::seen(who));
        tokio::spawn(async move {
            let serial = certificate.serial.clone();
            let noted = coordinator.change(|model, txn| match model.certificate(&certificate.tenant, &serial) {
                Some(_) => Ok(()),
                None => certificates::record(model, txn, certificate),
            });
            if let Err(error) = noted.await {
                tracing::warn!(%error, serial, "a certificate is not noted");
            }
            coordinator.noting.lock().expect("nothing panics while it holds this").remove(&serial);
        });
    }

    /// Revokes the certificates of a holder, or one by its serial number: nothing takes them any more. Tokens that are out for
    /// the same holder are void. Returns all that are meant, those that were revoked before among them.
    ///
    /// # Errors
    /// There is none; it is the caller's own; the reason is too long.
    pub async fn revoke(
        self: &Arc<Self>,
        who: &Identity,
        tenant: &str,
        which: &str,
        reason: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<Vec<v1::Certificate>, Problem> {
        if reason.len() > MAX_REASON || reason.chars().any(char::is_control) {
            let allowed = format!("up to {MAX_REASON} bytes without control characters");
            return Err(Problem::invalid("reason", reason, allowed));
        }
        let now = self.clock.wall_ns();
        let revoked =
            Revoked { at_ns: now, by: format!("{}/{}", who.role.as_str(), who.name), reason: reason.to_owned() };
        let revoked = self
            .change(|model, txn| {
                let meant = certificates::meant(model, tenant, which, now)?;
                if request.done(model)?.is_some() {
                    return Ok(meant.into_iter().cloned().collect());
                }
                if meant.iter().any(|c| c.serial == who.serial) {
                    let remedy = "let another admin revoke it, or name those that are meant by their serial numbers";
                    return Err(Problem::state(which, "the certificate of who asks", remedy));
                }
                let new: Vec<Arc<Certificate>> = meant
                    .into_iter()
                    .map(|c| match c.revoked {
                        Some(_) => c.clone(),
                        None => Arc::new(Certificate { revoked: Some(revoked.clone()), ..c.as_ref().clone() }),
                    })
                    .collect();
                if validate_only {
                    return Ok(new);
                }
                for certificate in new.iter().filter(|c| c.revoked.as_ref() == Some(&revoked)) {
                    txn.put(Object::Certificate(certificate.as_ref().clone()));
                }
                let holds = |t: &&crate::token::TokenRecord| {
                    t.tenant == tenant && new.iter().any(|c| c.role == t.role && c.name == t.name)
                };
                model.tokens.values().filter(holds).for_each(|t| txn.delete(Object::Token(t.clone())));
                request.record(model, txn, now, which);
                Ok(new)
            })
            .await?;
        if !validate_only {
            self.end_revoked(&revoked);
        }
        let model = self.model();
        let first: Vec<String> = newest(&model, |c| c.tenant == tenant).iter().map(|c| c.serial.clone()).collect();
        Ok(revoked.iter().map(|c| certificates::shown(c, first.contains(&c.serial))).collect())
    }

    /// Ends what goes on by these certificates, and says so.
    fn end_revoked(&self, revoked: &[Arc<Certificate>]) {
        for certificate in revoked {
            let message = format!(
                "the certificate {} of {} was revoked by {}",
                certificate.serial,
                certificate.holder(),
                certificate.revoked.as_ref().map_or("nobody", |r| r.by.as_str())
            );
            self.tell(Severity::Warning, "certificate", &subject(certificate), &message);
            let model = self.model();
            // Only if the session is by that key: it may have joined anew already.
            let session = model.proxy_by_uid(&certificate.uid).filter(|p| p.pin == certificate.pin);
            if let Some(proxy) = session {
                let status = tonic::Status::unauthenticated("the certificate of this proxy was revoked");
                self.sessions.expel(&proxy.uid, status);
            }
        }
        self.connections.end(|who| revoked.iter().any(|c| c.tenant == who.tenant && c.serial == who.serial));
    }

    /// Whether a refusal of this certificate is worth a record of its own: not if there was one a minute ago.
    pub fn is_news(&self, serial: &str) -> bool {
        let mut refused = self.refused.lock().expect("nothing panics while it holds this");
        refused.retain(|_, at| at.elapsed() < NEWS);
        if refused.len() >= MAX_REFUSED || refused.contains_key(serial) {
            return false;
        }
        refused.insert(serial.to_owned(), Instant::now());
        true
    }

    /// Takes a certificate that was made here into the records.
    pub(super) async fn keep_certificate(self: &Arc<Self>, certificate: Certificate) -> Result<(), Problem> {
        self.change_always(|model, txn| certificates::record(model, txn, certificate)).await
    }

    /// Forgets certificates that nobody takes any more.
    pub(super) async fn sweep_certificates(self: &Arc<Self>, model: &Model) {
        let now = self.clock.wall_ns();
        if !model.certificates.values().any(|c| c.is_over(now)) {
            return;
        }
        let swept = self
            .change(|model, txn| {
                // A bounded share of them: what is left goes with the next round.
                let over = model.certificates.values().filter(|c| c.is_over(now)).take(500);
                over.for_each(|c| txn.delete(Object::Certificate(c.as_ref().clone())));
                Ok(())
            })
            .await;
        if let Err(error) = swept {
            tracing::error!(%error, "cannot forget certificates that have ended");
        }
    }
}

/// The name by which alarms of a person's certificate go: "tenants/default/certificates/operator/anna".
pub(super) fn subject(certificate: &Certificate) -> String {
    format!("{}/certificates/{}", crate::names::tenant(&certificate.tenant), certificate.holder())
}

/// People whose newest certificate should have been renewed, and what there is to say. Proxies have conditions of their own.
pub(super) fn overdue(model: &Model, now_ns: u64) -> Vec<(String, Vec<Finding>)> {
    let people = |c: &Certificate| c.role != Role::Proxy;
    if !model.certificates.values().any(|c| people(c) && c.is_overdue(now_ns)) {
        return Vec::new();
    }
    let overdue = newest(model, people).into_iter().filter(|c| c.is_overdue(now_ns) && c.revoked.is_none());
    let found = overdue.map(|c| {
        let ends = if c.expire_time_ns < now_ns { "ended" } else { "ends" };
        let message = format!(
            "the certificate of {} {ends} at {} and was not renewed: any command of its holder renews it while it is good",
            c.holder(),
            text::time(c.expire_time_ns)
        );
        (subject(c), vec![finding("certificate-expires", Severity::Warning, message)])
    });
    found.collect()
}
