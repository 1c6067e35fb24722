//! TLS of the port, by certificates that change while it is open: the coordinator's own is renewed, authorities come and
//! go. A connection keeps what it was made with.
//!
//! A client's certificate that has only expired is let in here, so that its holder is told so by an answer instead of an
//! alert: `auth` refuses its calls. All else about it is checked, as of the moment at which it ended.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::{Connected, TcpConnectInfo, TlsConnectInfo};

use super::bound::{Bounded, Counted};
use crate::ca::{identify, verify_though_expired};
use crate::connections::{Connections, Guard};

/// How long a TLS handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Connections whose handshake is done and that the server has not taken yet.
const READY: usize = 64;

/// What the port's TLS is made of now.
#[derive(Debug)]
pub struct Tls(RwLock<Arc<ServerConfig>>);

impl Tls {
    /// With the coordinator's certificate and key, for clients of these authorities (all PEM).
    ///
    /// # Errors
    /// What of it is of no use.
    pub fn new(certificate_pem: &str, key_pem: &str, authorities_pem: &str) -> Result<Self, String> {
        Ok(Self(RwLock::new(config(certificate_pem, key_pem, authorities_pem)?)))
    }

    /// For connections from now on.
    ///
    /// # Errors
    /// As [`Self::new`]; what was there stays.
    pub fn change(&self, certificate_pem: &str, key_pem: &str, authorities_pem: &str) -> Result<(), String> {
        let new = config(certificate_pem, key_pem, authorities_pem)?;
        *self.0.write().expect("nothing panics while it holds this") = new;
        Ok(())
    }

    fn now(&self) -> Arc<ServerConfig> {
        self.0.read().expect("nothing panics while it holds this").clone()
    }
}

fn config(certificate_pem: &str, key_pem: &str, authorities_pem: &str) -> Result<Arc<ServerConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in certificates(authorities_pem)? {
        roots.add(authority).map_err(|e| format!("an authority: {e}"))?;
    }
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::<CryptoProvider>::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|e| format!("the authorities: {e}"))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| format!("the key: {e}"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(Arc::new(Expired { inner: clients }))
        .with_single_cert(certificates(certificate_pem)?, key)
        .map_err(|e| format!("the coordinator's certificate: {e}"))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // Who comes again shows its certificate again.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    all.map_err(|e| e.to_string())
        .and_then(|all| if all.is_empty() { Err("no certificate".to_owned()) } else { Ok(all) })
}

/// Lets in who has an expired certificate.
#[derive(Debug)]
struct Expired {
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for Expired {
    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verify = |at| self.inner.verify_client_cert(end_entity, intermediates, at);
        verify_though_expired(end_entity, now, verify, |_| true)
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

/// Connections whose handshake is done. Handshakes run beside each other: a slow one holds nobody up, and there are never
/// more than connections may be open.
pub fn secured(
    mut incoming: Bounded,
    tls: Arc<Tls>,
    connections: Arc<Connections>,
) -> impl Stream<Item = io::Result<Secured>> + Send + 'static {
    let (ready, taken) = mpsc::channel(READY);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = incoming.next() => accepted,
                () = ready.closed() => return,
            };
            let stream = match accepted {
                Some(Ok(stream)) => stream,
                // A server that is handed an error looks at it and goes on.
                Some(Err(error)) => {
                    let _ = ready.send(Err(error)).await;
                    continue;
                }
                None => return,
            };
            let (acceptor, connections, ready) = (TlsAcceptor::from(tls.now()), connections.clone(), ready.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => drop(ready.send(Ok(Secured::new(stream, &connections))).await),
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(_) => tracing::debug!("a TLS handshake took too long"),
                }
            });
        }
    });
    ReceiverStream::new(taken)
}

/// A connection by TLS, until it is ended by its holder, or here.
#[derive(Debug)]
pub struct Secured {
    stream: TlsStream<Counted>,
    guard: Option<Guard>,
}

impl Secured {
    fn new(stream: TlsStream<Counted>, connections: &Arc<Connections>) -> Self {
        let certificates = stream.get_ref().1.peer_certificates();
        let who = certificates.and_then(<[CertificateDer<'_>]>::first).and_then(|leaf| identify(leaf));
        let guard = who.map(|who| connections.enter(who));
        Self { stream, guard }
    }

    /// An error once the connection has been ended here.
    fn goes_on(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let ended = self.guard.as_mut().is_some_and(|guard| guard.ended(cx));
        if ended { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

impl Connected for Secured {
    type ConnectInfo = TlsConnectInfo<TcpConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Secured {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.goes_on(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
