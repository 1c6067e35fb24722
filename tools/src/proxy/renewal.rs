//! The proxy's certificate, renewed when two thirds of its time are over, whether or not a session is open. One that has
//! ended is renewed as well, for as long as the coordinator takes it.

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use afterimage_wire::v1::{Problem, Severity};
use tokio::sync::watch;

use super::agent::{BUNDLE_FILE, identity};
use super::state::Proxy;

/// Between two looks at the clock, at most: it may be set, and a host may sleep.
const LOOK: Duration = Duration::from_secs(60);
/// Between two tries of a renewal that fails: a thirtieth of what is left of the certificate, within these.
const TRIES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// Longest that a try may take.
const TRY_WITHIN: Duration = Duration::from_secs(30);

/// Renews the bundle whenever it is due, or is to be of another authority; trusts the authorities that it is told to.
pub async fn keep(proxy: Rc<Proxy>, bundle: watch::Sender<Bundle>) {
    loop {
        if let Err(error) = trust(&proxy, &bundle) {
            proxy.event(Severity::Error, None, "certificate", format!("new authorities are not taken over: {error}"));
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let old = bundle.borrow().clone();
        let now = wall_ns();
        let due = Duration::from_nanos(old.renew_at_ns().saturating_sub(now));
        if !due.is_zero() && is_of(&old, &proxy.desired.borrow().issuer) {
            let _ = tokio::time::timeout(due.min(LOOK), proxy.told.notified()).await;
            continue;
        }
        match renew(&proxy, &old).await {
            Ok(new) => {
                proxy.event(Severity::Info, None, "certificate", "renewed".to_owned());
                *proxy.unrenewed.borrow_mut() = None;
                bundle.send_replace(new);
            }
            Err(error) => {
                let left = Duration::from_nanos(old.expire_time_ns.saturating_sub(now));
                let when = match left.as_secs() {
                    0 => "has ended".to_owned(),
                    s if s < 2 * 86_400 => format!("ends in {s} seconds"),
                    s => format!("ends in {} days", s / 86_400),
                };
                let message = format!("the certificate {when} and is not renewed: {error}");
                let first = proxy.unrenewed.borrow().is_none();
                if first {
                    proxy.event(Severity::Warning, None, "certificate", message.clone());
                } else {
                    tracing::warn!("{message}");
                }
                *proxy.unrenewed.borrow_mut() = Some(Problem { message, ..Problem::default() });
                tokio::time::sleep((left / 30).clamp(TRIES.0, TRIES.1)).await;
            }
        }
    }
}

/// Whether the certificate is of this authority, if one is wanted.
fn is_of(bundle: &Bundle, issuer: &str) -> bool {
    issuer.is_empty() || bundle.identity().is_none_or(|who| who.issuer == issuer)
}

/// Takes the authorities over that are to be trusted, durably.
fn trust(proxy: &Proxy, bundle: &watch::Sender<Bundle>) -> Result<(), String> {
    let wanted = proxy.desired.borrow().authorities_pem.clone();
    let mut new = bundle.borrow().clone();
    if wanted.is_empty() || new.ca_pem == wanted {
        return Ok(());
    }
    new.ca_pem = wanted;
    keep_it(proxy, &new)?;
    proxy.event(Severity::Info, None, "certificate", "the authorities to trust have changed".to_owned());
    bundle.send_replace(new);
    Ok(())
}

/// A new certificate, kept durably before it is used.
async fn renew(proxy: &Proxy, old: &Bundle) -> Result<Bundle, String> {
    let renewed = tokio::time::timeout(TRY_WITHIN, client::renew(old)).await;
    let renewed = renewed.map_err(|_| "the coordinator does not answer".to_owned())?.map_err(|e| e.to_string())?;
    keep_it(proxy, &renewed)?;
    Ok(renewed)
}

fn keep_it(proxy: &Proxy, bundle: &Bundle) -> Result<(), String> {
    let dir = proxy.config.state_dir.as_ref().ok_or("there is no state folder to keep it in")?;
    let identity = identity(bundle).map_err(|e| e.to_string())?;
    bundle.save(&dir.join(BUNDLE_FILE)).map_err(|e| e.to_string())?;
    *proxy.identity.borrow_mut() = Some(identity);
    Ok(())
}

fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}
