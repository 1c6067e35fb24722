//! How proxies and operators reach a coordinator.

use std::time::Duration;

use afterimage_wire::v1::enrolment_client::EnrolmentClient;
use afterimage_wire::v1::{JoinRequest, JoinResponse, RenewRequest};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::bundle::{Bundle, COORDINATOR_NAME};
use crate::ca::{CaError, key_and_request};
use crate::token::{JoinToken, TokenError};

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence after which the other end is asked whether it is there, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// How often a request to join is sent if its answer is lost.
const TRIES: u32 = 3;

/// A coordinator that cannot be reached or joined.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("the coordinator's address {endpoint:?} is not valid: {detail}; allowed: https://host:port")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// Why.
        detail: String,
    },
    /// The connection failed: not there, or certificates do not fit.
    #[error("cannot reach the coordinator at {endpoint}: {detail}")]
    Connect {
        /// Its address.
        endpoint: String,
        /// Why.
        detail: String,
    },
    /// The join token is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The key cannot be made.
    #[error(transparent)]
    Key(#[from] CaError),
    /// The coordinator refused.
    #[error("the coordinator refused: {}", .0.message())]
    Refused(Box<tonic::Status>),
    /// Its answer makes no sense.
    #[error("the coordinator's answer makes no sense: {0}")]
    Answer(&'static str),
}

/// Makes `ring` the process's provider of cryptography, unless one is set already. TLS of this crate calls it by itself.
pub fn install_crypto() {
    // An error says that one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn endpoint(address: &str, ca_pem: &str, identity: Option<Identity>) -> Result<Endpoint, ClientError> {
    install_crypto();
    let bad = |e: tonic::transport::Error| ClientError::Endpoint { endpoint: address.to_owned(), detail: cause(&e) };
    let mut tls = ClientTlsConfig::new().domain_name(COORDINATOR_NAME).ca_certificate(Certificate::from_pem(ca_pem));
    if let Some(identity) = identity {
        tls = tls.identity(identity);
    }
    Endpoint::from_shared(address.to_owned())
        .map_err(bad)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .tcp_nodelay(true)
        .tls_config(tls)
        .map_err(bad)
}

/// The innermost cause: what transport errors say by themselves is "transport error".
pub(crate) fn cause(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(next) = inner.source() {
        inner = next;
    }
    inner.to_string()
}

/// Opens one of several addresses (`https://a:1,b:2`): the first that answers. Any coordinator leads to the leader.
async fn open(addresses: &str, ca_pem: &str, identity: Option<Identity>) -> Result<Channel, ClientError> {
    let mut last = None;
    for address in each(addresses) {
        let connect = endpoint(&address, ca_pem, identity.clone())?;
        // The handshake, too: one that is stopped accepts and says nothing.
        let detail = match tokio::time::timeout(CONNECT_TIMEOUT, connect.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(e)) => cause(&e),
            Err(_) => "it does not answer".to_owned(),
        };
        last = Some(ClientError::Connect { endpoint: address, detail });
    }
    Err(last.unwrap_or_else(|| ClientError::Endpoint { endpoint: addresses.to_owned(), detail: "none".to_owned() }))
}

/// The addresses of a list, each in full.
fn each(addresses: &str) -> impl Iterator<Item = String> + '_ {
    let parts = addresses.split(',').map(str::trim).filter(|a| !a.is_empty());
    parts.map(|a| if a.contains("://") { a.to_owned() } else { format!("https://{a}") })
}

/// Connects with the bundle's certificate. The channel reconnects by itself when it is lost.
///
/// # Errors
/// The address is none, nothing answers there, or it is not the bundle's coordinator.
pub async fn connect(bundle: &Bundle) -> Result<Channel, ClientError> {
    let identity = Identity::from_pem(&bundle.certificate_pem, &bundle.key_pem);
    open(&bundle.endpoint, &bundle.ca_pem, Some(identity)).await
}

/// Spends a join token: makes a key here, has its certificate issued, and returns the bundle to keep. The private key
/// never leaves this process.
///
/// `address` overrides the one in the token (`https://host:port`).
///
/// # Errors
/// The token is none, is spent or expired, or the coordinator cannot be reached.
pub async fn join(token: &str, address: Option<&str>) -> Result<Bundle, ClientError> {
    let token = JoinToken::parse(token)?;
    let address = address.unwrap_or(&token.endpoint);
    let (key_pem, csr_pem) = key_and_request()?;
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = JoinRequest { token_id: token.id, secret: token.secret, csr_pem, request_id };
    let mut tries = TRIES;
    let answer = loop {
        tries -= 1;
        let channel = open(address, &token.ca_pem, None).await?;
        match EnrolmentClient::new(channel).join(request.clone()).await {
            Ok(answer) => break answer,
            // The answer was lost on its way: the same request gets it again.
            Err(status) if tries > 0 && std::error::Error::source(&status).is_some() => {}
            Err(status) => return Err(ClientError::Refused(Box::new(status))),
        }
    };
    bundle(address, &key_pem, answer.into_inner())
}

/// A bundle with a new key and certificate for the same role and name, by the one that is still valid.
///
/// # Errors
/// The coordinator cannot be reached or refuses.
pub async fn renew(old: &Bundle) -> Result<Bundle, ClientError> {
    let (key_pem, csr_pem) = key_and_request()?;
    let answer = EnrolmentClient::new(connect(old).await?)
        .renew(RenewRequest { csr_pem, request_id: uuid::Uuid::new_v4().to_string() })
        .await
        .map_err(|s| ClientError::Refused(Box::new(s)))?;
    bundle(&old.endpoint, &key_pem, answer.into_inner())
}

fn bundle(address: &str, key_pem: &str, answer: JoinResponse) -> Result<Bundle, ClientError> {
    let role = crate::convert::role_from_proto(answer.role()).ok_or(ClientError::Answer("no role"))?;
    Ok(Bundle::new(
        &answer.tenant,
        role.as_str(),
        &answer.name,
        &answer.uid,
        address,
        &answer.ca_pem,
        &answer.certificate_pem,
        key_pem,
        answer.expire_time_ns,
        answer.renew_time_ns,
    ))
}
