//! Who this proxy is: what the TLS of streams is built from.

use std::fmt;
use std::sync::Arc;

use afterimage_wire::handshake::ALPN;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use super::pins::{Graceful, Pins};

/// Why there is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the certificate of this proxy is of no use: {0}")]
pub struct IdentityError(String);

/// A certificate with its key and the authorities to trust.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pems {
    /// Uid: a DNS name of the certificate, and the SNI of the data port.
    pub uid: String,
    /// Authorities to trust, PEM, one or more.
    pub ca_pem: String,
    /// Own certificate, PEM.
    pub certificate_pem: String,
    /// Its key, PEM.
    pub key_pem: String,
}

impl fmt::Debug for Pems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pems({})", self.uid)
    }
}

/// What streams' TLS is made of.
#[derive(Clone)]
pub struct Identity {
    /// Uid of this proxy.
    pub uid: String,
    /// As a source.
    pub client: Arc<ClientConfig>,
    /// As a target.
    pub server: Arc<ServerConfig>,
    /// Keys of paired proxies: set before each handshake.
    pub pins: Pins,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.uid)
    }
}

impl Identity {
    /// From what was joined with.
    ///
    /// # Errors
    /// [`IdentityError`], naming what is wrong.
    pub fn new(pems: &Pems) -> Result<Self, IdentityError> {
        let bad = |what: &str| {
            let what = what.to_owned();
            move |error: &dyn fmt::Display| IdentityError(format!("{what}: {error}"))
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates(&pems.certificate_pem).map_err(|e| bad("certificate")(&e))?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(&pems.ca_pem).map_err(|e| bad("authority")(&e))? {
            roots.add(authority).map_err(|e| bad("authority")(&e))?;
        }
        let roots = Arc::new(roots);
        let key = || PrivateKeyDer::from_pem_slice(pems.key_pem.as_bytes()).map_err(|e| bad("key")(&e));

        let pins = Pins::default();
        let targets =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::<CryptoProvider>::clone(&provider))
                .build()
                .map_err(|e| bad("authority")(&e))?;
        let mut client = ClientConfig::builder_with_provider(Arc::<CryptoProvider>::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| bad("TLS")(&e))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Graceful::new(targets, pins.clone())))
            .with_client_auth_cert(chain.clone(), key()?)
            .map_err(|e| bad("certificate and key")(&e))?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();

        let sources = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|e| bad("authority")(&e))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| bad("TLS")(&e))?
            .with_client_cert_verifier(Arc::new(Graceful::new(sources, pins.clone())))
            .with_single_cert(chain, key()?)
            .map_err(|e| bad("certificate and key")(&e))?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        // A ticket would be a TLS record after the last message: the raw stream begins there.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { uid: pems.uid.clone(), client: Arc::new(client), server: Arc::new(server), pins })
    }
}

/// All certificates of a PEM text; at least one.
fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err("there is none in the PEM text".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
