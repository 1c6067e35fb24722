//! The coordinator's own certificate authority: ECDSA P-256, one level.
//!
//! A client certificate says who its holder is in a URI: `afterimage://<tenant>/<role>/<name>`. A proxy's also has the
//! proxy's uid as a DNS name, since it serves the data port under that name. Of a signing request only the public key is
//! used, never what it says about itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::CertificateError;
use rustls::pki_types::UnixTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::{COORDINATOR_NAME, write_private};
use crate::names::is_id;

/// How long a certificate lasts if nothing else is said; the coordinator's own, too.
pub const LIFETIME: Duration = Duration::from_secs(365 * 86_400);
/// How long after its end the certificate of a proxy is still taken where its key is known: by the proxies that it is paired
/// with, and by the coordinator to have it renewed.
pub const GRACE: Duration = Duration::from_secs(90 * 86_400);
/// How long the CA lasts.
const CA_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);
/// Clocks of others may be behind ours by this much when a certificate begins.
const BACKDATE: Duration = Duration::from_secs(3600);
/// Longest signing request, bytes.
const MAX_CSR: usize = 16 * 1024;

/// What a caller may do; later ones include [`Role::Viewer`], [`Role::Operator`] and so on, a proxy none of them.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Opens a session.
    Proxy,
    /// Reads.
    Viewer,
    /// Reads, creates, changes, fails over.
    Operator,
    /// Also enrols.
    Admin,
}

impl Role {
    /// As in certificates and bundles.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Proxy, Self::Viewer, Self::Operator, Self::Admin].into_iter().find(|r| r.as_str() == text)
    }
}

/// Whom a certificate names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Tenant.
    pub tenant: String,
    /// Role.
    pub role: Role,
    /// Id of a proxy, or a person's name.
    pub name: String,
    /// Of a proxy, else empty.
    pub uid: String,
    /// SHA-256 of the public key (SubjectPublicKeyInfo).
    pub pin: [u8; 32],
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Which authority issued it: see [`Ca::id`].
    pub issuer: String,
    /// When the certificate was issued, nanoseconds since the Unix epoch.
    pub issue_time_ns: u64,
    /// When it ends, nanoseconds since the Unix epoch.
    pub expire_time_ns: u64,
}

/// A certificate just issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// PEM.
    pub certificate_pem: String,
    /// When it ends, nanoseconds since the Unix epoch.
    pub expire_time_ns: u64,
    /// When its holder should ask for the next one, nanoseconds since the Unix epoch.
    pub renew_time_ns: u64,
    /// SHA-256 of the public key.
    pub pin: [u8; 32],
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Which authority issued it: see [`Ca::id`].
    pub issuer: String,
}

/// When a certificate that was issued and ends then is to be renewed: when two thirds of its time are over.
pub fn renew_time_ns(issue_ns: u64, expire_ns: u64) -> u64 {
    issue_ns + expire_ns.saturating_sub(issue_ns) / 3 * 2
}

/// From when on it is an alarm that a certificate has not been renewed: a quarter of the time that was left for it is over.
pub fn overdue_time_ns(renew_ns: u64, expire_ns: u64) -> u64 {
    renew_ns + expire_ns.saturating_sub(renew_ns) / 4
}

/// What can go wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The CA's file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The CA's file is not what it should be.
    #[error("{} does not hold a CA certificate and its key: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The signing request is not one, or is not signed by its own key.
    #[error("the certificate request is not valid: {0}")]
    Request(String),
    /// Signing failed.
    #[error("signing a certificate: {0}")]
    Sign(#[from] rcgen::Error),
}

/// The authority.
pub struct Ca {
    certificate_pem: String,
    id: String,
    expire_time_ns: u64,
    issuer: Issuer<'static, KeyPair>,
    lifetime: Duration,
}

impl Ca {
    /// Reads the CA from `path`, or makes one there. Certificate and key are one file, so that never one of them alone is
    /// there.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds something else.
    pub fn open(path: &Path) -> Result<Self, CaError> {
        let io = |source| CaError::Io { path: path.to_owned(), source };
        match fs::read_to_string(path) {
            Ok(text) => Self::from_pem(&text).map_err(|detail| CaError::Malformed { path: path.to_owned(), detail }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let text = Self::generate()?;
                write_private(path, text.as_bytes()).map_err(io)?;
                Self::from_pem(&text).map_err(|detail| CaError::Malformed { path: path.to_owned(), detail })
            }
            Err(e) => Err(io(e)),
        }
    }

    /// A new one: certificate and key, PEM.
    pub(crate) fn generate() -> Result<String, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = parameters("Afterimage CA", CA_LIFETIME);
        // Two CAs that are trusted at once have to differ in name, or a verifier may try the wrong one.
        let id = uuid::Uuid::new_v4().simple().to_string();
        params.distinguished_name.push(DnType::OrganizationalUnitName, id);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        Ok(format!("{}{}", certificate.pem(), key.serialize_pem()))
    }

    /// From certificate and key, PEM.
    pub(crate) fn from_pem(text: &str) -> Result<Self, String> {
        let at = text.find("-----BEGIN PRIVATE KEY-----").ok_or("no private key in it")?;
        let (certificate_pem, key_pem) = text.split_at(at);
        let key = KeyPair::from_pem(key_pem).map_err(|e| e.to_string())?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(|e| e.to_string())?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes()).map_err(|e| e.to_string())?;
        let (_, certificate) = X509Certificate::from_der(&pem.contents).map_err(|e| e.to_string())?;
        let id = authority_id(certificate.subject());
        let expire_time_ns = not_after(&pem.contents).unwrap_or(0).saturating_mul(1_000_000_000);
        Ok(Self { certificate_pem: certificate_pem.to_owned(), id, expire_time_ns, issuer, lifetime: LIFETIME })
    }

    /// With certificates that last so long.
    #[must_use]
    pub fn lasting(self, lifetime: Duration) -> Self {
        Self { lifetime, ..self }
    }

    /// How long certificates last.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// When its own certificate ends, nanoseconds since the Unix epoch.
    pub fn expire_time_ns(&self) -> u64 {
        self.expire_time_ns
    }

    /// Tells it from other authorities: of its name, which each has for itself.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The CA's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A certificate for the coordinator's port: [`COORDINATOR_NAME`] and `names` (DNS names or addresses). Returns
    /// certificate and key, PEM.
    ///
    /// # Errors
    /// A name that is none, or signing fails.
    pub fn server(&self, names: &[String]) -> Result<(String, String), CaError> {
        let key = KeyPair::generate()?;
        let mut params = parameters(COORDINATOR_NAME, self.lifetime);
        let all = [COORDINATOR_NAME.to_owned(), "localhost".to_owned()].into_iter().chain(names.iter().cloned());
        for name in all {
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.try_into()?),
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// A certificate for whoever holds the key of this signing request.
    ///
    /// # Errors
    /// The request is malformed or not signed by its key; signing fails.
    pub fn issue(
        &self,
        csr_pem: &str,
        tenant: &str,
        role: Role,
        name: &str,
        uid: Option<&str>,
    ) -> Result<Issued, CaError> {
        if csr_pem.len() > MAX_CSR {
            return Err(CaError::Request(format!("longer than {MAX_CSR} bytes")));
        }
        let request =
            CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| CaError::Request(e.to_string()))?;
        let public = request.public_key;
        let mut params = parameters(name, self.lifetime);
        let uri = format!("afterimage://{tenant}/{}/{name}", role.as_str());
        params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if let Some(uid) = uid {
            params.subject_alt_names.push(SanType::DnsName(uid.to_owned().try_into()?));
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let certificate = params.signed_by(&public, &self.issuer)?;
        // Certificates know whole seconds.
        let expire_time_ns = u64::try_from(params.not_after.unix_timestamp()).unwrap_or(0) * 1_000_000_000;
        let issue_time_ns = expire_time_ns.saturating_sub(self.lifetime.as_nanos() as u64);
        Ok(Issued {
            certificate_pem: certificate.pem(),
            expire_time_ns,
            renew_time_ns: renew_time_ns(issue_time_ns, expire_time_ns),
            pin: sha256(&public.subject_public_key_info()),
            issuer: self.id.clone(),
            serial: params.serial_number.as_ref().map(|s| hex(&s.to_bytes())).unwrap_or_default(),
        })
    }
}

fn parameters(common_name: &str, lifetime: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    // Random, positive, and without a leading zero, so that it has one way to be written.
    let mut serial = uuid::Uuid::new_v4().into_bytes();
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.distinguished_name.push(DnType::OrganizationName, "Afterimage");
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + lifetime).into();
    params.use_authority_key_identifier_extension = true;
    params
}

/// A fresh private key and the signing request for it; both PEM.
///
/// # Errors
/// The key cannot be made.
pub fn key_and_request() -> Result<(String, String), CaError> {
    let key = KeyPair::generate()?;
    let params = CertificateParams::default();
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key.serialize_pem(), request))
}

/// Whom a verified client certificate (DER) names; none if it is not one of ours in form.
pub fn identify(der: &[u8]) -> Option<Identity> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let pin = sha256(certificate.public_key().raw);
    let names = &certificate.subject_alternative_name().ok()??.value.general_names;
    let mut uris = names.iter().filter_map(|n| match n {
        GeneralName::URI(uri) => uri.strip_prefix("afterimage://"),
        _ => None,
    });
    let uri = uris.next()?;
    if uris.next().is_some() {
        return None;
    }
    let parts: Vec<&str> = uri.split('/').collect();
    let [tenant, role, name] = parts[..] else { return None };
    let role = Role::parse(role)?;
    if !is_id(tenant) || !is_id(name) {
        return None;
    }
    let uid = names
        .iter()
        .find_map(|n| match n {
            GeneralName::DNSName(dns) => Some((*dns).to_owned()),
            _ => None,
        })
        .unwrap_or_default();
    let validity = certificate.validity();
    let ns = |at: i64| u64::try_from(at).unwrap_or(0).saturating_mul(1_000_000_000);
    Some(Identity {
        tenant: tenant.to_owned(),
        role,
        name: name.to_owned(),
        uid,
        pin,
        serial: hex(certificate.raw_serial()),
        issuer: authority_id(certificate.issuer()),
        issue_time_ns: ns(validity.not_before.timestamp()) + BACKDATE.as_nanos() as u64,
        expire_time_ns: ns(validity.not_after.timestamp()),
    })
}

fn authority_id(name: &x509_parser::x509::X509Name<'_>) -> String {
    hex(&sha256(name.as_raw())[..8])
}

/// SHA-256 of the public key (SubjectPublicKeyInfo) of a certificate, DER: what peers pin.
pub fn key_pin(der: &[u8]) -> Option<[u8; 32]> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(sha256(certificate.public_key().raw))
}

/// When a certificate (DER) ends, seconds since the Unix epoch; none if it cannot be read or ended before that.
pub fn not_after(der: &[u8]) -> Option<u64> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    u64::try_from(certificate.validity().not_after.timestamp()).ok()
}

/// Verifies a certificate as of `now`, and once more as of its end if nothing but its age is wrong and it `may` be taken
/// although it ended then (seconds since the Unix epoch).
///
/// # Errors
/// What is wrong with it.
pub fn verify_though_expired<T>(
    certificate: &[u8],
    now: UnixTime,
    verify: impl Fn(UnixTime) -> Result<T, rustls::Error>,
    may: impl FnOnce(u64) -> bool,
) -> Result<T, rustls::Error> {
    verify(now).or_else(|error| {
        let expired = matches!(
            error,
            rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })
        );
        match not_after(certificate).filter(|ended| expired && may(*ended)) {
            Some(ended) => verify(UnixTime::since_unix_epoch(Duration::from_secs(ended))),
            None => Err(error),
        }
    })
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn der(pem: &str) -> Vec<u8> {
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents
    }

    #[test]
    fn the_ca_is_made_once_and_its_key_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let first = Ca::open(&path).unwrap().certificate_pem().to_owned();
        assert_eq!(Ca::open(&path).unwrap().certificate_pem(), first);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!first.contains("PRIVATE"));
    }

    #[test]
    fn a_damaged_ca_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        fs::write(&path, "hello").unwrap();
        assert!(matches!(Ca::open(&path), Err(CaError::Malformed { .. })));
    }

    #[test]
    fn a_certificate_names_its_holder_and_nothing_of_the_request() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::open(&folder.path().join("ca.pem")).unwrap();
        // The request claims to be an admin; that is not what is asked for.
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI("afterimage://default/admin/eve".try_into().unwrap()));
        let request = params.serialize_request(&key).unwrap().pem().unwrap();
        let issued = ca.issue(&request, "default", Role::Proxy, "src", Some("u-1")).unwrap();
        let who = identify(&der(&issued.certificate_pem)).unwrap();
        assert_eq!((who.role, who.name.as_str(), who.uid.as_str()), (Role::Proxy, "src", "u-1"));
        assert_eq!((who.pin, &who.serial, who.expire_time_ns), (issued.pin, &issued.serial, issued.expire_time_ns));
        assert_eq!((who.serial.len(), who.issuer.as_str()), (32, ca.id()));
        assert_eq!(who.pin, sha256(&key.subject_public_key_info()));
    }

    #[test]
    fn a_certificate_lasts_as_long_as_is_said_and_is_renewed_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::open(&folder.path().join("ca.pem")).unwrap().lasting(Duration::from_secs(90));
        let (_, request) = key_and_request().unwrap();
        let issued = ca.issue(&request, "default", Role::Viewer, "a", None).unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seconds = |at: u64| (at.saturating_sub(now) + 500_000_000) / 1_000_000_000;
        assert!((88..=90).contains(&seconds(issued.expire_time_ns)));
        assert!((58..=60).contains(&seconds(issued.renew_time_ns)));
        assert!((66..=68).contains(&seconds(overdue_time_ns(issued.renew_time_ns, issued.expire_time_ns))));
    }

    #[test]
    fn a_request_not_signed_by_its_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::open(&folder.path().join("ca.pem")).unwrap();
        assert!(matches!(ca.issue("nonsense", "default", Role::Viewer, "a", None), Err(CaError::Request(_))));
        let (_, request) = key_and_request().unwrap();
        let mut lines: Vec<String> = request.lines().map(str::to_owned).collect();
        let last = lines.len() - 2;
        let flipped: String = lines[last].chars().rev().collect();
        lines[last] = flipped;
        assert!(matches!(ca.issue(&lines.join("\n"), "default", Role::Viewer, "a", None), Err(CaError::Request(_))));
        assert!(ca.issue(&"x".repeat(MAX_CSR + 1), "default", Role::Viewer, "a", None).is_err());
    }

    #[test]
    fn a_server_certificate_is_no_identity() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::open(&folder.path().join("ca.pem")).unwrap();
        let (certificate, _) = ca.server(&["10.0.0.1".to_owned(), "dr.example".to_owned()]).unwrap();
        assert_eq!(identify(&der(&certificate)), None);
        assert_eq!(identify(b"garbage"), None);
    }
}
