//! What has to be renewed while the port is open: the coordinator's own certificate, the local operator's bundle. And
//! connections of people whose certificate has ended are ended.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::Severity;

use super::tls::Tls;
use super::{LOCAL_ADMIN, ServeError};
use crate::bundle::Bundle;
use crate::ca::{Role, renew_time_ns};
use crate::coordinator::Coordinator;
use crate::names::DEFAULT_TENANT;

/// Between two looks, at most; sooner where certificates are short-lived.
const LOOK: Duration = Duration::from_secs(60);
/// … and at least.
const LEAST: Duration = Duration::from_millis(200);

/// What is looked after.
pub(super) struct Upkeep {
    coordinator: Arc<Coordinator>,
    tls: Arc<Tls>,
    /// In the coordinator's certificate.
    names: Vec<String>,
    admin: PathBuf,
    /// When the coordinator's own certificate is renewed, nanoseconds since the Unix epoch.
    renew_ns: u64,
}

impl Upkeep {
    /// With a fresh certificate for these names; makes the local operator's bundle.
    pub(super) async fn begin(
        coordinator: Arc<Coordinator>,
        names: Vec<String>,
        admin: PathBuf,
    ) -> Result<(Self, Arc<Tls>), ServeError> {
        let trust = coordinator.trust();
        let (certificate, key) = trust.serving().server(&names)?;
        let tls = Tls::new(&certificate, &key, &trust.pem).map_err(ServeError::Config)?;
        let tls = Arc::new(tls);
        keep_admin(&coordinator, &admin).await?;
        let mut upkeep = Self { coordinator, tls: tls.clone(), names, admin, renew_ns: 0 };
        upkeep.renew_ns = upkeep.next();
        Ok((upkeep, tls))
    }

    fn next(&self) -> u64 {
        let now = self.coordinator.clock.wall_ns();
        renew_time_ns(now, now + self.coordinator.trust().issuing.lifetime().as_nanos() as u64)
    }

    /// Until the coordinator stops.
    pub(super) async fn run(mut self) {
        let mut closing = self.coordinator.closing();
        let look = (self.coordinator.trust().issuing.lifetime() / 20).clamp(LEAST, LOOK);
        let mut trust = self.coordinator.trust_changes();
        loop {
            tokio::select! {
                () = tokio::time::sleep(look) => {}
                Ok(()) = trust.changed() => self.renew_ns = 0,
                _ = closing.wait_for(|c| *c) => return,
            }
            let now = self.coordinator.clock.wall_ns();
            if now >= self.renew_ns {
                let renewed = self.renew();
                self.said(renewed, "the coordinator's certificate was renewed");
                self.renew_ns = self.next();
            }
            if let Err(error) = keep_admin(&self.coordinator, &self.admin).await {
                self.said(Err(format!("{}: {error}", self.admin.display())), "");
            }
            let ended = self.coordinator.connections.end(|w| w.role != Role::Proxy && w.expire_time_ns < now);
            if ended > 0 {
                tracing::info!(ended, "connections whose certificates have ended are closed");
            }
        }
    }

    fn renew(&self) -> Result<(), String> {
        let trust = self.coordinator.trust();
        let (certificate, key) = trust.serving().server(&self.names).map_err(|e| e.to_string())?;
        self.tls.change(&certificate, &key, &trust.pem)
    }

    fn said(&self, result: Result<(), String>, done: &str) {
        let subject = crate::names::tenant(DEFAULT_TENANT);
        match result {
            Ok(()) => self.coordinator.tell(Severity::Info, "certificate", &subject, done),
            Err(error) => {
                let message = format!("the coordinator's certificate is not renewed: {error}");
                self.coordinator.tell(Severity::Error, "certificate", &subject, &message);
            }
        }
    }
}

/// The local operator's bundle: made at the first start, again when it is damaged or due, and kept pointing at this
/// coordinator.
async fn keep_admin(coordinator: &Arc<Coordinator>, path: &Path) -> Result<(), ServeError> {
    let now = coordinator.clock.wall_ns();
    let (model, trust) = (coordinator.model(), coordinator.trust());
    let good = |bundle: &Bundle| {
        let who = bundle.identity();
        let known = who.as_ref().and_then(|who| model.certificate(&who.tenant, &who.serial));
        who.is_some_and(|who| who.issuer == trust.issuing.id())
            && known.is_none_or(|c| c.revoked.is_none())
            && now < bundle.renew_at_ns()
    };
    let bundle = match Bundle::load(path) {
        Ok(mut old) if old.ca_pem == trust.pem && good(&old) => {
            if old.endpoint == coordinator.settings.endpoint {
                return Ok(());
            }
            old.endpoint.clone_from(&coordinator.settings.endpoint);
            old
        }
        _ => coordinator.local_bundle(DEFAULT_TENANT, Role::Admin, LOCAL_ADMIN).await?,
    };
    Ok(bundle.save(path)?)
}
