//! The authorities that are trusted: one, or two while the older is being replaced. The first lies in `ca.pem`; each that
//! replaces one lies in the store, its key wrapped under `keys.bin`, so that all coordinators have it.
//!
//! ```text
//!  rotate ─▶ both trusted · the new one issues · the port still shows a certificate of the old one, which all know
//!         ─▶ everybody renews ─▶ finish: the new one alone
//! ```

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ca::{Ca, Role};
use crate::certificates::{Certificate, newest};
use crate::keys::{KeyError, Wrapper};
use crate::model::Model;
use crate::objects::KeyRecord;

/// What the store knows of authorities. Nothing is in there before the first rotation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Authorities {
    /// The one that issues.
    pub issuing: Authority,
    /// The one that it replaces and that is trusted still.
    pub replaced: Option<Authority>,
}

/// An authority.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Authority {
    /// See [`Ca::id`].
    pub id: String,
    /// Its certificate and its key, PEM, wrapped; none: it is the one in `ca.pem`.
    pub wrapped: Option<String>,
    /// Since when it issues, nanoseconds since the Unix epoch; 0 for the first one.
    pub since_ns: u64,
    /// Id of the wrapping key; empty for `keys.bin` itself.
    #[serde(default)]
    pub under: String,
}

impl Authority {
    /// A new one, and itself wrapped.
    ///
    /// # Errors
    /// No key can be made.
    pub fn generate(keys: &Wrapper, now_ns: u64) -> Result<Self, String> {
        let text = Ca::generate().map_err(|e| e.to_string())?;
        let ca = Ca::from_pem(&text)?;
        let record = keys.wrap(&bound(ca.id()), text.as_bytes()).map_err(|e| e.to_string())?;
        Ok(Self { id: ca.id().to_owned(), wrapped: Some(record.wrapped), since_ns: now_ns, under: record.under })
    }

    fn record(&self) -> Option<KeyRecord> {
        let wrapped = self.wrapped.clone()?;
        Some(KeyRecord { id: bound(&self.id), wrapped, under: self.under.clone(), since_ns: 0 })
    }

    /// Whether it is wrapped, and not under this wrapping key.
    pub fn is_under_another(&self, newest: &str) -> bool {
        self.wrapped.is_some() && self.under != newest
    }

    /// The same under the newest wrapping key.
    ///
    /// # Errors
    /// It does not open.
    pub fn rewrapped(&self, keys: &Wrapper) -> Result<Self, KeyError> {
        let Some(record) = self.record() else { return Ok(self.clone()) };
        let record = keys.rewrap(&record)?;
        Ok(Self { wrapped: Some(record.wrapped), under: record.under, ..self.clone() })
    }

    fn open(&self, file: &Arc<Ca>, keys: &Wrapper, lifetime: Duration) -> Result<Arc<Ca>, String> {
        let Some(record) = self.record() else {
            return if file.id() == self.id {
                Ok(file.clone())
            } else {
                Err(format!("ca.pem holds authority {}; the store knows {}", file.id(), self.id))
            };
        };
        let bytes = keys.unwrap_bytes(&record).map_err(|e| e.to_string())?;
        let text = String::from_utf8(bytes).map_err(|_| format!("authority {} is no text", self.id))?;
        Ok(Arc::new(Ca::from_pem(&text)?.lasting(lifetime)))
    }
}

/// What a wrapped authority is bound to: it is no policy's key.
fn bound(id: &str) -> String {
    format!("authority/{id}")
}

/// The authorities, opened.
pub struct Trust {
    /// Issues.
    pub issuing: Arc<Ca>,
    /// Is trusted still.
    pub replaced: Option<Arc<Ca>>,
    /// Certificates of all that are trusted, PEM.
    pub pem: String,
}

impl Trust {
    /// As the store says; `file`: what is in `ca.pem`.
    ///
    /// # Errors
    /// One does not open: another `ca.pem` or `keys.bin`.
    pub fn open(file: &Arc<Ca>, known: Option<&Authorities>, keys: &Wrapper) -> Result<Self, String> {
        let lifetime = file.lifetime();
        let (issuing, replaced) = match known {
            None => (file.clone(), None),
            Some(known) => {
                let replaced = known.replaced.as_ref().map(|a| a.open(file, keys, lifetime)).transpose()?;
                (known.issuing.open(file, keys, lifetime)?, replaced)
            }
        };
        let older = replaced.as_ref().map(|ca| ca.certificate_pem()).unwrap_or_default();
        let pem = format!("{older}{}", issuing.certificate_pem());
        Ok(Self { issuing, replaced, pem })
    }

    /// Whether certificates of this authority are taken.
    pub fn trusts(&self, issuer: &str) -> bool {
        self.issuing.id() == issuer || self.replaced.as_ref().is_some_and(|ca| ca.id() == issuer)
    }

    /// The one whose certificate the port shows: who is to be replaced while there is one, since everybody knows it.
    pub fn serving(&self) -> &Arc<Ca> {
        self.replaced.as_ref().unwrap_or(&self.issuing)
    }
}

/// Whose newest certificate is of this authority and good still, by "role/name"; and proxies that have not come back with
/// their newer one.
pub fn needed_by<'a>(model: &'a Model, issuer: &str, now_ns: u64) -> Vec<&'a Arc<Certificate>> {
    let good = |c: &Certificate| c.revoked.is_none() && !c.is_over(now_ns);
    let mut found: Vec<_> =
        newest(model, good).into_iter().filter(|c| c.issuer == issuer || uses_older(model, c, issuer)).collect();
    found.sort_by_key(|c| (c.role.as_str(), c.name.as_str()));
    found
}

/// Whether a proxy still uses its certificate from before, and that is of this authority.
fn uses_older(model: &Model, newest: &Certificate, issuer: &str) -> bool {
    let proxy = (newest.role == Role::Proxy).then(|| model.proxy_by_uid(&newest.uid)).flatten();
    let Some(pin) = proxy.and_then(|p| p.previous_pin.as_ref()) else { return false };
    model.certificates.values().any(|c| c.issuer == issuer && c.pin == *pin && c.uid == newest.uid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::tests::certificate;
    use crate::group::tests::proxy;
    use crate::model::Txn;
    use crate::objects::Object;

    #[test]
    fn a_rotation_trusts_both_and_its_end_the_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Wrapper::open(&folder.path().join("keys.bin")).unwrap();
        let file = Arc::new(Ca::open(&folder.path().join("ca.pem")).unwrap().lasting(Duration::from_secs(77)));
        let first = Trust::open(&file, None, &keys).unwrap();
        assert_eq!((first.issuing.id(), first.pem.as_str()), (file.id(), file.certificate_pem()));
        let new = Authority::generate(&keys, 5).unwrap();
        let old = Authority { id: file.id().to_owned(), wrapped: None, since_ns: 0, under: String::new() };
        let known = Authorities { issuing: new.clone(), replaced: Some(old) };
        let both = Trust::open(&file, Some(&known), &keys).unwrap();
        assert_eq!((both.issuing.id(), both.serving().id()), (new.id.as_str(), file.id()));
        assert_eq!(both.issuing.lifetime(), Duration::from_secs(77));
        assert_eq!(both.pem.matches("BEGIN CERTIFICATE").count(), 2);
        assert!(!both.pem.contains("PRIVATE"));
        let known = Authorities { issuing: new.clone(), replaced: None };
        let after = Trust::open(&file, Some(&known), &keys).unwrap();
        assert_eq!((after.serving().id(), after.pem.matches("BEGIN").count()), (new.id.as_str(), 1));
        let others = Wrapper::open(&folder.path().join("other.bin")).unwrap();
        assert!(Trust::open(&file, Some(&known), &others).is_err());
        assert!(!serde_json::to_string(&known).unwrap().contains("PRIVATE"));
    }

    #[test]
    fn an_authority_is_needed_while_somebodys_newest_certificate_is_of_it() {
        let of = |serial: &str, name: &str, issued, issuer: &str| Certificate {
            issuer: issuer.into(),
            ..certificate(serial, name, issued, 90)
        };
        let source = proxy("src", "");
        let source = crate::objects::Proxy { pin: "new".into(), previous_pin: Some("old".into()), ..source };
        let proxys = |serial: &str, issued, issuer: &str| Certificate {
            role: Role::Proxy,
            uid: source.uid.clone(),
            pin: serial.into(),
            ..of(serial, "src", issued, issuer)
        };
        let mut txn = Txn::default();
        for c in [
            of("1", "anna", 10, "old"),
            of("2", "anna", 20, "new"),
            of("3", "bob", 10, "old"),
            proxys("old", 10, "old"),
            proxys("new", 20, "new"),
        ] {
            txn.put(Object::Certificate(c));
        }
        txn.put(Object::Proxy(source.clone()));
        let model = Model::default().applied(txn, 1);
        let left = |model: &Model, now| needed_by(model, "old", now).iter().map(|c| c.holder()).collect::<Vec<_>>();
        assert_eq!(left(&model, 50), ["operator/bob", "proxy/src"]);
        let mut txn = Txn::default();
        txn.put(Object::Proxy(crate::objects::Proxy { previous_pin: None, ..source }));
        let model = model.applied(txn, 2);
        assert_eq!(left(&model, 50), ["operator/bob"]);
        assert!(left(&model, 91).is_empty(), "what has ended needs nobody");
    }
}
