//! Certificates that have been issued and have not ended: who has one, until when, whether it still counts. Pure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use afterimage_wire::v1;
use serde::{Deserialize, Serialize};

use crate::ca::{GRACE, Identity, Issued, Role, hex, overdue_time_ns, renew_time_ns};
use crate::model::{Model, Txn};
use crate::objects::Object;
use crate::problem::Problem;

/// Most certificates of a tenant that are known; those of a holder who has a newer one are forgotten first.
pub const MAX_CERTIFICATES: usize = 8192;

/// A certificate of a proxy or a person.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Certificate {
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Tenant.
    pub tenant: String,
    /// What its holder may do.
    pub role: Role,
    /// Id of the proxy, or a person's name.
    pub name: String,
    /// Of a proxy, else empty.
    pub uid: String,
    /// SHA-256 of its public key, hex.
    pub pin: String,
    /// Which authority issued it.
    pub issuer: String,
    /// Nanoseconds since the Unix epoch.
    pub issued_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub expire_time_ns: u64,
    /// That nobody is to take it any more.
    #[serde(default)]
    pub revoked: Option<Revoked>,
}

/// When and why a certificate was revoked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Revoked {
    /// Nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// By whom, "role/name".
    pub by: String,
    /// For people.
    pub reason: String,
}

impl Certificate {
    /// One just issued.
    pub fn issued(issued: &Issued, tenant: &str, role: Role, name: &str, uid: &str, now_ns: u64) -> Self {
        Self {
            serial: issued.serial.clone(),
            tenant: tenant.to_owned(),
            role,
            name: name.to_owned(),
            uid: uid.to_owned(),
            pin: hex(&issued.pin),
            issuer: issued.issuer.clone(),
            issued_ns: now_ns,
            expire_time_ns: issued.expire_time_ns,
            revoked: None,
        }
    }

    /// One that somebody has shown: issued before records were kept, or by a coordinator whose state was lost since.
    pub fn seen(who: &Identity) -> Self {
        Self {
            serial: who.serial.clone(),
            tenant: who.tenant.clone(),
            role: who.role,
            name: who.name.clone(),
            uid: who.uid.clone(),
            pin: hex(&who.pin),
            issuer: who.issuer.clone(),
            issued_ns: who.issue_time_ns,
            expire_time_ns: who.expire_time_ns,
            revoked: None,
        }
    }

    /// "role/name".
    pub fn holder(&self) -> String {
        format!("{}/{}", self.role.as_str(), self.name)
    }

    /// When it should be renewed, nanoseconds since the Unix epoch.
    pub fn renew_time_ns(&self) -> u64 {
        renew_time_ns(self.issued_ns, self.expire_time_ns)
    }

    /// Nobody takes it any more, whatever is said of it.
    pub fn is_over(&self, now_ns: u64) -> bool {
        let grace = if self.role == Role::Proxy { GRACE.as_nanos() as u64 } else { 0 };
        self.expire_time_ns.saturating_add(grace) < now_ns
    }

    /// It should have been renewed, and has not ended yet or only just: an alarm, if it is its holder's newest.
    pub fn is_overdue(&self, now_ns: u64) -> bool {
        overdue_time_ns(self.renew_time_ns(), self.expire_time_ns) < now_ns
    }
}

/// The newest certificate of each holder of the tenant-wide kind that `wanted` names.
pub fn newest(model: &Model, wanted: impl Fn(&Certificate) -> bool) -> Vec<&Arc<Certificate>> {
    let mut newest: HashMap<(&str, Role, &str), &Arc<Certificate>> = HashMap::new();
    for certificate in model.certificates.values().filter(|c| wanted(c)) {
        let holder = (certificate.tenant.as_str(), certificate.role, certificate.name.as_str());
        let known = newest.entry(holder).or_insert(certificate);
        if known.issued_ns < certificate.issued_ns {
            *known = certificate;
        }
    }
    newest.into_values().collect()
}

/// Takes one into the records. If there are too many, the oldest one whose holder has a newer one is forgotten.
///
/// # Errors
/// All of them are somebody's newest.
pub fn record(model: &Model, txn: &mut Txn, certificate: Certificate) -> Result<(), Problem> {
    let own = |c: &Certificate| c.tenant == certificate.tenant;
    if model.certificates.values().filter(|c| own(c)).count() >= MAX_CERTIFICATES {
        let kept: HashSet<&str> = newest(model, own).into_iter().map(|c| c.serial.as_str()).collect();
        let may_go = |c: &&Arc<Certificate>| own(c) && c.revoked.is_none() && !kept.contains(c.serial.as_str());
        let superseded = model.certificates.values().filter(may_go);
        let oldest = superseded.min_by_key(|c| c.issued_ns);
        let full = || Problem::Limit { what: "certificates that are good".into(), limit: MAX_CERTIFICATES as u64 };
        txn.delete(Object::Certificate(oldest.ok_or_else(full)?.as_ref().clone()));
    }
    txn.put(Object::Certificate(certificate));
    Ok(())
}

/// The certificates that somebody means by "ROLE/NAME", "NAME" or a serial number, those that are over left out.
///
/// # Errors
/// There is none; the name is that of several roles.
pub fn meant<'a>(
    model: &'a Model,
    tenant: &str,
    which: &str,
    now_ns: u64,
) -> Result<Vec<&'a Arc<Certificate>>, Problem> {
    let good = model.certificates.values().filter(|c| c.tenant == tenant && !c.is_over(now_ns));
    let (mut serials, mut holders, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for certificate in good {
        if certificate.serial == which {
            serials.push(certificate);
        } else if certificate.holder() == which {
            holders.push(certificate);
        } else if certificate.name == which {
            names.push(certificate);
        }
    }
    if names.iter().any(|c| c.role != names[0].role) {
        let allowed = "ROLE/NAME: more than one role has a certificate of that name";
        return Err(Problem::invalid("which", which, allowed));
    }
    let found = [serials, holders, names].into_iter().find(|found| !found.is_empty());
    found.ok_or_else(|| Problem::not_found("certificate", which))
}

/// Whether a key of the tenant was revoked.
pub fn is_revoked(model: &Model, tenant: &str, pin: &str) -> bool {
    model.certificates.values().any(|c| c.revoked.is_some() && c.tenant == tenant && c.pin == pin)
}

/// As the API shows it; `newest`: of its holder.
pub fn shown(certificate: &Certificate, newest: bool) -> v1::Certificate {
    let c = certificate;
    let revoked = c.revoked.as_ref();
    v1::Certificate {
        name: format!("{}/certificates/{}", crate::names::tenant(&c.tenant), c.serial),
        serial: c.serial.clone(),
        role: crate::convert::role_to_proto(c.role).into(),
        holder: c.name.clone(),
        proxy_uid: c.uid.clone(),
        key_pin: c.pin.clone(),
        issuer: c.issuer.clone(),
        issue_time_ns: c.issued_ns,
        expire_time_ns: c.expire_time_ns,
        renew_time_ns: c.renew_time_ns(),
        newest,
        revoke_time_ns: revoked.map_or(0, |r| r.at_ns),
        revoked_by: revoked.map(|r| r.by.clone()).unwrap_or_default(),
        revoke_reason: revoked.map(|r| r.reason.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn certificate(serial: &str, name: &str, issued_ns: u64, expire_time_ns: u64) -> Certificate {
        Certificate {
            serial: serial.into(),
            tenant: "default".into(),
            role: Role::Operator,
            name: name.into(),
            uid: String::new(),
            pin: serial.into(),
            issuer: "ca".into(),
            issued_ns,
            expire_time_ns,
            revoked: None,
        }
    }

    fn model(certificates: impl IntoIterator<Item = Certificate>) -> Model {
        let mut txn = Txn::default();
        certificates.into_iter().for_each(|c| txn.put(Object::Certificate(c)));
        Model::default().applied(txn, 1)
    }

    #[test]
    fn the_newest_of_each_holder_counts() {
        let model = model([certificate("1", "a", 10, 90), certificate("2", "a", 20, 90), certificate("3", "b", 5, 90)]);
        let mut serials: Vec<&str> = newest(&model, |_| true).iter().map(|c| c.serial.as_str()).collect();
        serials.sort_unstable();
        assert_eq!(serials, ["2", "3"]);
    }

    #[test]
    fn a_holder_or_a_serial_number_is_meant_and_no_other_role() {
        let viewer = Certificate { role: Role::Viewer, ..certificate("4", "b", 5, 90) };
        let all = [certificate("1", "a", 10, 90), certificate("2", "a", 20, 90), certificate("3", "b", 5, 90), viewer];
        let model = model(all);
        let meant = |which: &str, now| {
            let found = meant(&model, "default", which, now)?;
            Ok::<_, Problem>(found.iter().map(|c| c.serial.clone()).collect::<Vec<_>>())
        };
        assert_eq!(meant("a", 50).unwrap(), ["1", "2"]);
        assert_eq!(meant("operator/a", 50).unwrap(), ["1", "2"]);
        assert_eq!(meant("2", 50).unwrap(), ["2"]);
        assert_eq!(meant("viewer/b", 50).unwrap(), ["4"]);
        assert!(matches!(meant("b", 50), Err(Problem::Invalid { .. })));
        assert!(matches!(meant("a", 91), Err(Problem::NotFound { .. })));
        assert!(matches!(meant("viewer/a", 50), Err(Problem::NotFound { .. })));
    }

    #[test]
    fn it_is_due_overdue_and_over_in_this_order() {
        let operators = certificate("1", "a", 0, 1200);
        assert_eq!(operators.renew_time_ns(), 800);
        assert!(!operators.is_overdue(900) && operators.is_overdue(901));
        assert!(!operators.is_over(1200) && operators.is_over(1201));
        let proxys = Certificate { role: Role::Proxy, ..operators };
        assert!(!proxys.is_over(1201) && proxys.is_over(1201 + GRACE.as_nanos() as u64));
    }

    #[test]
    fn there_are_never_too_many_and_nobodys_newest_is_forgotten() {
        let many = (0..MAX_CERTIFICATES as u64).map(|n| certificate(&n.to_string(), &format!("n{}", n / 2), n, 90));
        let model = model(many);
        let mut txn = Txn::default();
        record(&model, &mut txn, certificate("x", "new", 9, 90)).unwrap();
        let next = model.applied(txn, 2);
        assert_eq!(next.certificates.len(), MAX_CERTIFICATES);
        assert!(!next.certificates.contains_key(&("default".into(), "0".into())));
        let one_each = (0..MAX_CERTIFICATES as u64).map(|n| certificate(&n.to_string(), &format!("n{n}"), n, 90));
        let full = super::tests::model(one_each);
        assert!(record(&full, &mut Txn::default(), certificate("x", "new", 9, 90)).is_err());
    }
}
