//! Keys of paired proxies, and the grace that they have: a certificate that has only expired is taken for [`GRACE`] more
//! if its key is the one that the coordinator has paired. Expiry is then an alarm, not the end of replication. All else
//! about the certificate is checked as ever, as of the moment at which it ended.

use std::collections::HashSet;
use std::sync::{Arc, RwLock};

pub use afterimage_controlplane::ca::GRACE;
use afterimage_controlplane::ca::{key_pin, verify_though_expired};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// The keys (SHA-256 of the public key) of the proxies that this one is paired with.
#[derive(Clone, Debug, Default)]
pub struct Pins(Arc<RwLock<HashSet<Vec<u8>>>>);

impl Pins {
    /// These and no others.
    pub fn set<'a>(&self, pins: impl IntoIterator<Item = &'a Vec<u8>>) {
        let pins = pins.into_iter().cloned().collect();
        *self.0.write().expect("nothing panics while it holds this") = pins;
    }

    /// It is a paired proxy's, and has not ended too long ago.
    fn may_be_late(&self, certificate: &CertificateDer<'_>, now: UnixTime, ended: u64) -> bool {
        let late = now.as_secs().checked_sub(ended);
        late.is_some_and(|late| late <= GRACE.as_secs())
            && key_pin(certificate)
                .is_some_and(|key| self.0.read().expect("nothing panics while it holds this").contains(&key[..]))
    }

    /// Verifies now, and once more as of the certificate's end if nothing but its age is wrong.
    fn verify<T>(
        &self,
        certificate: &CertificateDer<'_>,
        now: UnixTime,
        verify: impl Fn(UnixTime) -> Result<T, Error>,
    ) -> Result<T, Error> {
        verify_though_expired(certificate, now, verify, |ended| self.may_be_late(certificate, now, ended))
    }
}

/// A verifier with the grace of paired keys.
#[derive(Debug)]
pub struct Graceful<V: ?Sized> {
    pins: Pins,
    inner: Arc<V>,
}

impl<V: ?Sized> Graceful<V> {
    /// Around another one.
    pub fn new(inner: Arc<V>, pins: Pins) -> Self {
        Self { pins, inner }
    }
}

impl<V: ServerCertVerifier + ?Sized> ServerCertVerifier for Graceful<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.pins.verify(end_entity, now, |at| {
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, at)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

impl<V: ClientCertVerifier + ?Sized> ClientCertVerifier for Graceful<V> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.pins.verify(end_entity, now, |at| self.inner.verify_client_cert(end_entity, intermediates, at))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
