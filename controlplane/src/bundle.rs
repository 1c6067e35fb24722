//! A bundle: everything that one caller needs to reach its coordinator: address, CA, certificate, key. One JSON file,
//! readable by its owner only.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ca::{Identity, identify};

/// Version of the file.
const BUNDLE_VERSION: u32 = 1;

/// The certificate name of every coordinator: what clients expect whatever address they reach it by.
pub const COORDINATOR_NAME: &str = "coordinator.afterimage";

/// Who a caller is, and whom it trusts.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Version of the file.
    version: u32,
    /// Tenant.
    pub tenant: String,
    /// "proxy", "viewer", "operator" or "admin".
    pub role: String,
    /// Id of the proxy, or a person's name.
    pub name: String,
    /// Of a proxy; else empty. Also a DNS name of the certificate.
    pub uid: String,
    /// `https://host:port` of the coordinator.
    pub endpoint: String,
    /// CAs, PEM.
    pub ca_pem: String,
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// Its private key, PKCS#8 PEM.
    pub key_pem: String,
    /// When the certificate ends, nanoseconds since the Unix epoch.
    pub expire_time_ns: u64,
    /// When the next one is to be asked for, nanoseconds since the Unix epoch. 0 in bundles of versions that did not say.
    #[serde(default)]
    pub renew_time_ns: u64,
}

/// When a bundle that does not say is renewed: so long before its end, nanoseconds.
const RENEW_BEFORE_NS: u64 = 30 * 86_400 * 1_000_000_000;

impl std::fmt::Debug for Bundle {
    // The key is left out: bundles end up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bundle({}/{} at {})", self.role, self.name, self.endpoint)
    }
}

/// A bundle that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others may read the key.
    #[error("{} may be read by others (mode {mode:04o}): chmod 600 it, and consider its key known", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Not a bundle.
    #[error("{} is no certificate bundle: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

impl Bundle {
    /// Puts one together.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        tenant: &str,
        role: &str,
        name: &str,
        uid: &str,
        endpoint: &str,
        ca_pem: &str,
        certificate_pem: &str,
        key_pem: &str,
        expire_time_ns: u64,
        renew_time_ns: u64,
    ) -> Self {
        let own = str::to_owned;
        Self {
            version: BUNDLE_VERSION,
            tenant: own(tenant),
            role: own(role),
            name: own(name),
            uid: own(uid),
            endpoint: own(endpoint),
            ca_pem: own(ca_pem),
            certificate_pem: own(certificate_pem),
            key_pem: own(key_pem),
            expire_time_ns,
            renew_time_ns,
        }
    }

    /// Whom the certificate names; none if it is none.
    pub fn identity(&self) -> Option<Identity> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(self.certificate_pem.as_bytes()).ok()?;
        identify(&pem.contents)
    }

    /// When the next certificate is to be asked for, nanoseconds since the Unix epoch.
    pub fn renew_at_ns(&self) -> u64 {
        match self.renew_time_ns {
            0 => self.expire_time_ns.saturating_sub(RENEW_BEFORE_NS),
            at => at,
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// The file cannot be read, may be read by others, or is no bundle.
    pub fn load(path: &Path) -> Result<Self, BundleError> {
        let io = |source| BundleError::Io { path: path.to_owned(), source };
        let malformed = |detail: String| BundleError::Malformed { path: path.to_owned(), detail };
        let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(BundleError::Exposed { path: path.to_owned(), mode });
        }
        let bundle: Self =
            serde_json::from_slice(&fs::read(path).map_err(io)?).map_err(|e| malformed(e.to_string()))?;
        if bundle.version != BUNDLE_VERSION {
            return Err(malformed(format!(
                "it is of version {}; this program reads version {BUNDLE_VERSION}",
                bundle.version
            )));
        }
        Ok(bundle)
    }

    /// Writes it, replacing what is there at once, with mode 0600.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), BundleError> {
        let text = serde_json::to_vec_pretty(self).expect("a bundle is plain strings");
        write_private(path, &text).map_err(|source| BundleError::Io { path: path.to_owned(), source })
    }
}

/// Replaces a file as a whole, durably, readable by its owner only: whoever reads it, also after a crash, finds the old or
/// the new content.
///
/// # Errors
/// The file system's.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".tmp");
    let temporary = folder.join(name);
    // One left over by a crash may have another mode.
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> Bundle {
        Bundle::new("default", "admin", "ann", "", "https://127.0.0.1:1", "CA", "CERT", "KEY", 7, 5)
    }

    #[test]
    fn reads_back_what_was_saved_and_only_for_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.json");
        bundle().save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Bundle::load(&path).unwrap(), bundle());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.json");
        bundle().save(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Bundle::load(&path), Err(BundleError::Exposed { mode: 0o644, .. })));
    }

    #[test]
    fn another_version_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.json");
        Bundle { version: 9, ..bundle() }.save(&path).unwrap();
        assert!(Bundle::load(&path).unwrap_err().to_string().contains("version 9"));
    }

    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", bundle()).contains("KEY"));
    }
}
