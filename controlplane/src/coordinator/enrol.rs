//! Enrolment: tokens given out, spent for a certificate once.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{self, Severity};

use super::Coordinator;
use crate::bundle::Bundle;
use crate::ca::{Identity, Issued, Role, hex, key_and_request};
use crate::certificates::{self, Certificate};
use crate::convert;
use crate::model::{MAX_OBJECTS, MAX_TOKENS};
use crate::names::{Kind, Name, check_id};
use crate::objects::{Object, Proxy, new_uid};
use crate::problem::Problem;
use crate::requests::Asked;
use crate::token::{JoinToken, TokenRecord, TokenRefusal};

/// How long a token is good for if nothing is said.
const DEFAULT_TTL: Duration = Duration::from_secs(3600);
/// The least and the most of that, seconds.
const TTL_S: std::ops::RangeInclusive<u64> = 60..=604_800;

impl Coordinator {
    /// Gives out a token.
    ///
    /// # Errors
    /// A name or a time that is not allowed; too many tokens are out.
    pub async fn create_join_token(
        self: &Arc<Self>,
        tenant: &str,
        role: Role,
        name: &str,
        ttl_s: u64,
        validate_only: bool,
        request: &Asked,
    ) -> Result<(String, u64), Problem> {
        check_id("name", name)?;
        let ttl = match ttl_s {
            0 => DEFAULT_TTL,
            s if TTL_S.contains(&s) => Duration::from_secs(s),
            s => return Err(Problem::invalid("ttl_s", s, format!("{} to {} seconds", TTL_S.start(), TTL_S.end()))),
        };
        let now = self.clock.wall_ns();
        let (record, mut secret) = TokenRecord::new(tenant, role, name, now + ttl.as_nanos() as u64)
            .map_err(|e| Problem::Internal(e.to_string()))?;
        let (record, secret) = match request.key() {
            "" => (record, secret),
            // The secret is kept nowhere: for the same request it is made anew.
            key => {
                secret = self.keys.derive(&format!("join-token/{key}"));
                (record.with_secret(&secret), secret)
            }
        };
        let record = self
            .change(|model, txn| {
                if let Some(done) = request.done(model)? {
                    let known = model.tokens.get(&done.uid).cloned();
                    return known.ok_or_else(|| crate::requests::gone("join token", &done.uid));
                }
                if model.tokens.len() >= MAX_TOKENS {
                    return Err(Problem::Limit { what: "join tokens given out".into(), limit: MAX_TOKENS as u64 });
                }
                if !validate_only {
                    txn.put(Object::Token(record.clone()));
                    request.record(model, txn, now, &record.id);
                }
                Ok(record)
            })
            .await?;
        let expire = record.expire_time_ns;
        let token = JoinToken {
            id: record.id,
            secret,
            endpoint: self.settings.endpoint.clone(),
            ca_pem: self.trust().pem.clone(),
            role: role.as_str().to_owned(),
            name: name.to_owned(),
        };
        Ok((if validate_only { String::new() } else { token.encode() }, expire))
    }

    /// Spends a token: a certificate for the key of the request. The token is gone afterwards, whatever came of it.
    ///
    /// # Errors
    /// The token is spent, expired or wrong; the request is none.
    pub async fn join(self: &Arc<Self>, join: &v1::JoinRequest) -> Result<v1::JoinResponse, Problem> {
        let (id, secret) = (join.token_id.as_str(), join.secret.as_str());
        let now = self.clock.wall_ns();
        let spent = |r: &TokenRecord| Asked::new(&r.tenant, &format!("token/{id}"), "Join", &join.request_id, join);
        let taken = self
            .change(|model, txn| {
                let Some(record) = model.tokens.get(id) else {
                    // Spent by this very request, whose answer was lost: with the same secret and the same key.
                    let again = model.requests.values().find_map(|r| {
                        let token = r.token.as_ref().filter(|t| t.id == id)?;
                        spent(token).ok()?.done(model).ok().flatten().map(|_| token.clone())
                    });
                    return Ok(again.ok_or(TokenRefusal::Unknown));
                };
                let checked = record.check(secret, now);
                if checked == Err(TokenRefusal::WrongSecret) {
                    // Ids are no secrets: whoever guesses one must not spend it for its owner.
                    return Ok(Err(TokenRefusal::WrongSecret));
                }
                txn.delete(Object::Token(record.clone()));
                if checked.is_ok() {
                    spent(record)?.record_token(model, txn, now, record);
                }
                Ok(checked.map(|()| record.clone()))
            })
            .await?;
        let record = taken.map_err(|why| {
            tracing::warn!(token = ?id.get(..8.min(id.len())), ?why, "a join token was refused");
            Problem::Denied {
                who: "the holder of this token".into(),
                method: "afterimage.v1.Enrolment/Join".into(),
                needs: "a token that is neither spent nor expired; ask an admin for a new one".into(),
            }
        })?;
        self.issue(&record.tenant, record.role, &record.name, None, &join.csr_pem).await
    }

    /// A new certificate for who has a good one.
    ///
    /// # Errors
    /// The proxy has been deleted; the request is none.
    pub async fn renew(
        self: &Arc<Self>,
        who: &Identity,
        csr_pem: &str,
        request: &Asked,
    ) -> Result<v1::JoinResponse, Problem> {
        // One that is asked again is a certificate for the same key: nothing is lost or gained by it.
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            if request.done(model)?.is_none() {
                request.record(model, txn, now, "");
            }
            Ok(())
        })
        .await?;
        if who.role == Role::Proxy {
            self.proxy_of(who)?;
        }
        self.issue(&who.tenant, who.role, &who.name, Some(hex(&who.pin)), csr_pem).await
    }

    async fn issue(
        self: &Arc<Self>,
        tenant: &str,
        role: Role,
        name: &str,
        pin: Option<String>,
        csr_pem: &str,
    ) -> Result<v1::JoinResponse, Problem> {
        let sign = |uid: Option<&str>| {
            let model = self.model();
            let proxy = uid.and_then(|uid| model.proxy_by_uid(uid));
            let signed = self.issuer(&model, proxy).issue(csr_pem, tenant, role, name, uid);
            let issued = signed
                .map_err(|e| Problem::invalid("csr_pem", "this request", format!("a PKCS#10 request, PEM: {e}")))?;
            if certificates::is_revoked(&self.model(), tenant, &hex(&issued.pin)) {
                return Err(Problem::invalid(
                    "csr_pem",
                    "a key whose certificate was revoked",
                    "a request with a new key",
                ));
            }
            Ok(issued)
        };
        let (issued, uid) = if role == Role::Proxy {
            self.enrol_proxy(Name::new(tenant, Kind::Proxy, name), pin, sign).await?
        } else {
            let issued = sign(None)?;
            let certificate = Certificate::issued(&issued, tenant, role, name, "", self.clock.wall_ns());
            self.change(|model, txn| certificates::record(model, txn, certificate)).await?;
            (issued, String::new())
        };
        let subject = crate::names::tenant(tenant);
        self.tell(
            Severity::Info,
            "enrolment",
            &subject,
            &format!("a certificate was issued to {}/{name}", role.as_str()),
        );
        Ok(v1::JoinResponse {
            certificate_pem: issued.certificate_pem,
            ca_pem: self.trust().pem.clone(),
            expire_time_ns: issued.expire_time_ns,
            role: convert::role_to_proto(role).into(),
            name: name.to_owned(),
            uid,
            tenant: tenant.to_owned(),
            renew_time_ns: issued.renew_time_ns,
        })
    }

    /// `renews`: the key that the proxy has, if it renews by it.
    async fn enrol_proxy(
        self: &Arc<Self>,
        name: Name,
        renews: Option<String>,
        sign: impl Fn(Option<&str>) -> Result<Issued, Problem>,
    ) -> Result<(Issued, String), Problem> {
        let now = self.clock.wall_ns();
        self.change(|model, txn| {
            let old = model.proxy(&name).ok();
            if old.is_none() && model.proxies.len() >= MAX_OBJECTS {
                return Err(Problem::Limit { what: "proxies".into(), limit: MAX_OBJECTS as u64 });
            }
            let uid = old.map_or_else(new_uid, |p| p.uid.clone());
            let issued = sign(Some(&uid))?;
            let pin = hex(&issued.pin);
            let proxy = match old {
                Some(old) => Proxy {
                    version: old.version + 1,
                    // The key that it surely has: an answer that was lost on the way gave it none.
                    previous_pin: Some(renews.unwrap_or_else(|| old.pin.clone())),
                    pin,
                    expire_time_ns: issued.expire_time_ns,
                    renew_time_ns: issued.renew_time_ns,
                    ..old.clone()
                },
                None => Proxy {
                    uid: uid.clone(),
                    tenant: name.tenant.clone(),
                    id: name.id.clone(),
                    version: 1,
                    created_ns: now,
                    pin,
                    previous_pin: None,
                    expire_time_ns: issued.expire_time_ns,
                    data_address: String::new(),
                    nbd_addresses: Vec::new(),
                    capabilities: Vec::new(),
                    boot_id: String::new(),
                    software_version: String::new(),
                    renew_time_ns: issued.renew_time_ns,
                    site: String::new(),
                },
            };
            txn.put(Object::Proxy(proxy));
            let certificate = Certificate::issued(&issued, &name.tenant, Role::Proxy, &name.id, &uid, now);
            certificates::record(model, txn, certificate)?;
            Ok((issued, uid))
        })
        .await
    }

    /// A bundle made here, for the operator of this host.
    ///
    /// # Errors
    /// A key cannot be made or signed.
    pub async fn local_bundle(self: &Arc<Self>, tenant: &str, role: Role, name: &str) -> Result<Bundle, Problem> {
        let (key_pem, csr_pem) = key_and_request().map_err(|e| Problem::Internal(e.to_string()))?;
        let trust = self.trust();
        let issued = trust.issuing.issue(&csr_pem, tenant, role, name, None);
        let issued = issued.map_err(|e| Problem::Internal(e.to_string()))?;
        let certificate = Certificate::issued(&issued, tenant, role, name, "", self.clock.wall_ns());
        self.keep_certificate(certificate).await?;
        Ok(Bundle::new(
            tenant,
            role.as_str(),
            name,
            "",
            &self.settings.endpoint,
            &trust.pem,
            &issued.certificate_pem,
            &key_pem,
            issued.expire_time_ns,
            issued.renew_time_ns,
        ))
    }
}
