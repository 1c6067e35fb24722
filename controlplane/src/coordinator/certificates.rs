//! What is known of certificates: noted when they are shown, forgotten when they are over, alarms when they are not
//! renewed.

use std::sync::Arc;

use afterimage_wire::v1::Severity;

use super::Coordinator;
use crate::ca::{Identity, Role};
use crate::certificates::{self, Certificate, newest};
use crate::model::Model;
use crate::objects::Object;
use crate::status::{Finding, finding};
use crate::text;

/// Certificates that are being noted at once; others are when they are next shown.
const MAX_NOTING: usize = 64;

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

    /// Takes a certificate that was made here into the records.
    pub(super) async fn keep_certificate(
        self: &Arc<Self>,
        certificate: Certificate,
    ) -> Result<(), crate::problem::Problem> {
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
    let overdue = newest(model, people).into_iter().filter(|c| c.is_overdue(now_ns));
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
