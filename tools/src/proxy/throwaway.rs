//! A certificate authority for one occasion: benchmarks, tests and pairs of proxies without a coordinator. Its key is
//! forgotten with the value, so nothing can be issued later.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::identity::Pems;

/// The authority.
pub struct Throwaway {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Throwaway {
    /// With a fresh key.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new() -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "afterimage throw-away authority");
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    /// What a proxy of this name and uid would have joined with.
    ///
    /// # Errors
    /// A name that cannot stand in a certificate.
    pub fn proxy(&self, name: &str, uid: &str) -> Result<Pems, rcgen::Error> {
        self.issue("proxy", name, uid, |_| ())
    }

    /// A certificate of any role; `change` has the last word on it.
    fn issue(
        &self,
        role: &str,
        name: &str,
        uid: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<Pems, rcgen::Error> {
        let mut params = CertificateParams::new(vec![uid.to_owned()])?;
        params.subject_alt_names.push(SanType::URI(format!("afterimage://default/{role}/{name}").try_into()?));
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Pems {
            uid: uid.to_owned(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            ca_pem: self.issuer.pem(),
        })
    }
}

#[cfg(test)]
impl Throwaway {
    /// A proxy's, that ended in 2021.
    pub fn expired(&self, name: &str, uid: &str) -> Pems {
        self.issue("proxy", name, uid, |params| {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        })
        .unwrap()
    }

    /// A proxy's, that ended so many seconds ago.
    pub fn ended(&self, name: &str, uid: &str, ago: u64) -> Pems {
        self.issue("proxy", name, uid, |params| {
            let end = std::time::SystemTime::now() - std::time::Duration::from_secs(ago);
            params.not_before = (end - std::time::Duration::from_secs(86_400)).into();
            params.not_after = end.into();
        })
        .unwrap()
    }

    /// An operator's.
    pub fn operator(&self, name: &str) -> Pems {
        self.issue("operator", name, name, |_| ()).unwrap()
    }
}
