//! How two proxies become a stream: connect, TLS 1.3 with certificates on both sides, agree by
//! [`wire::handshake`](afterimage_wire::handshake), leave TLS, hand the bare socket to the data thread.
//!
//! Bytes are read from the socket TLS record by TLS record, never further: when the last message of the handshake has
//! been read, nothing of what follows has left the kernel. That makes leaving TLS safe whatever the peer does, and a
//! peer that sends more inside TLS than was agreed is found out.
//!
//! Reads and writes are tokio-uring's. Dropping one of its futures does not cancel it, so no read stands in a
//! `select!` or a `timeout`: a [`Watchdog`] shuts the socket down when a step takes too long, and the read ends. The
//! connection itself is made and accepted by plain tokio, because a connect must be given up cleanly and because
//! tokio-uring's own streams cannot be turned into an [`OwnedFd`] without `unsafe`.

use std::cell::Cell;
use std::io;
use std::net::TcpStream as StdStream;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use afterimage_controlplane::ca::{Identity as Peer, Role, identify, not_after};
use afterimage_dataplane::seal::ControlKey;
use afterimage_wire::handshake::{ALPN, EXPORTER_LABEL, Handshake, Hello, MAX_HANDSHAKE, Position, Refusal, Welcome};
use afterimage_wire::ids::TimelineId;
use afterimage_wire::{FormatError, WIRE_VERSION};
use rustls::client::ClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ServerConnection;
use rustls::{CertificateError, ConnectionCommon, SideData};
use tokio::time::Instant;
use tokio_uring::buf::BoundedBuf;

use super::identity::Identity;

/// Longest that one step of a handshake may take.
pub const STEP: Duration = Duration::from_secs(5);
/// Longest that a whole handshake may take, however many small steps a peer makes of it.
pub const WHOLE: Duration = Duration::from_secs(15);
/// Bytes of a TLS record's header.
const RECORD_HEADER: usize = 5;
/// Longest TLS record without its header (RFC 8446, 5.2).
const MAX_RECORD: usize = 16 * 1024 + 256;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The socket failed.
    #[error("the connection failed while {step}: {source}")]
    Socket {
        /// What was going on.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The peer took too long.
    #[error("the peer took too long while {step}")]
    TimedOut {
        /// What was going on.
        step: &'static str,
    },
    /// The peer closed the connection.
    #[error("the peer closed the connection while {step}")]
    Closed {
        /// What was going on.
        step: &'static str,
    },
    /// The peer's certificate is not one that we accept.
    #[error("the peer's certificate is refused: {0}")]
    PeerCertificate(String),
    /// The peer does not accept our certificate.
    #[error("the peer refuses this proxy's certificate: {0}")]
    OwnCertificate(String),
    /// The certificate is valid, but not a proxy's.
    #[error("the peer's certificate is that of `{0}`, who is not a proxy")]
    NotAProxy(String),
    /// Bytes that are no TLS 1.3 as agreed.
    #[error("the peer does not speak TLS 1.3 as agreed: {0}")]
    Tls(String),
    /// Bytes inside TLS that make no sense.
    #[error("the peer's handshake makes no sense: {0}")]
    Format(#[from] FormatError),
    /// A message that is not due.
    #[error("the peer sent another message than is due while {0}")]
    OutOfTurn(&'static str),
    /// The target said no.
    #[error("the target refuses the stream ({reason:?}): {message}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// For a person.
        message: String,
    },
}

/// A source's side of a stream that has been agreed.
#[derive(Debug)]
pub struct Linked {
    /// The socket: TLS has been left, nothing of what follows has been read.
    pub fd: OwnedFd,
    /// Key of the target's control messages.
    pub control: ControlKey,
    /// Branch that the stream writes on.
    pub timeline: TimelineId,
    /// What the target holds.
    pub position: Position,
    /// Every disk is compared in full.
    pub whole_resync: bool,
    /// SHA-256 of the target's public key.
    pub pin: [u8; 32],
    /// How long ago the target's certificate ended, if it did: see [`super::pins`].
    pub expired: Option<Duration>,
}

/// A target's side of a stream that has been agreed.
#[derive(Debug)]
pub struct Accepted {
    /// The socket.
    pub fd: OwnedFd,
    /// Key of our control messages.
    pub control: ControlKey,
    /// As it was accepted.
    pub hello: Hello,
    /// Whose it is.
    pub peer: Peer,
    /// How long ago its certificate ended, if it did: see [`super::pins`].
    pub expired: Option<Duration>,
}

/// Makes the link of a source to `target` at `address`. The key of the target's certificate must be among `pins`, if
/// there are any, and must not be `revoked`.
///
/// # Errors
/// [`LinkError`]; a refusal by the target is [`LinkError::Refused`].
pub async fn connect(
    identity: &Identity,
    address: &str,
    target: &str,
    pins: &[Vec<u8>],
    revoked: impl Fn(&[u8]) -> bool,
    hello: Hello,
) -> Result<Linked, LinkError> {
    let failed = |source| LinkError::Connect { address: address.to_owned(), source };
    let stream = tokio::time::timeout(STEP, tokio::net::TcpStream::connect(address))
        .await
        .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
        .and_then(tokio::net::TcpStream::into_std)
        .map_err(failed)?;
    let name = ServerName::try_from(target.to_owned())
        .map_err(|_| LinkError::PeerCertificate(format!("`{target}` is no name that a certificate can have")))?;
    let tls = ClientConnection::new(Arc::clone(&identity.client), name).map_err(tls_error)?;
    let mut channel = Channel::new(stream, tls)?;

    channel.shake_hands().await?;
    channel.check_alpn()?;
    let peer = channel.proxy()?;
    if revoked(&peer.pin) {
        return Err(LinkError::PeerCertificate("it was revoked".to_owned()));
    }
    if !pinned(&peer, pins) {
        return Err(LinkError::PeerCertificate("its key is not the one that is paired with this proxy".to_owned()));
    }
    channel.send(&Handshake::Hello(hello), "sending the hello").await?;
    let (timeline, position, whole_resync) = match channel.receive("waiting for the target's answer").await? {
        Handshake::Welcome(Welcome::Accepted { timeline, position, whole_resync }) => {
            (timeline, position, whole_resync)
        }
        Handshake::Welcome(Welcome::Refused { reason, message }) => return Err(LinkError::Refused { reason, message }),
        _ => return Err(LinkError::OutOfTurn("waiting for the target's answer")),
    };
    channel.send(&Handshake::Begin, "beginning the stream").await?;
    let expired = channel.expired();
    let (fd, control) = channel.leave()?;
    Ok(Linked { fd, control, timeline, position, whole_resync, pin: peer.pin, expired })
}

/// Takes the link of a source; `welcome` decides about its hello.
///
/// # Errors
/// [`LinkError`]. What `welcome` refused is [`LinkError::Refused`], after the source has been told.
pub async fn accept(
    identity: &Identity,
    stream: StdStream,
    welcome: impl AsyncFnOnce(&Peer, &Hello) -> Welcome,
) -> Result<Accepted, LinkError> {
    let tls = ServerConnection::new(Arc::clone(&identity.server)).map_err(tls_error)?;
    let mut channel = Channel::new(stream, tls)?;

    channel.shake_hands().await?;
    channel.check_alpn()?;
    if channel.tls.server_name() != Some(identity.uid.as_str()) {
        return Err(LinkError::Tls("another target is asked for by name".to_owned()));
    }
    let peer = channel.proxy()?;
    let hello = match channel.receive("waiting for the hello").await {
        Ok(Handshake::Hello(hello)) => hello,
        Ok(_) => return Err(LinkError::OutOfTurn("waiting for the hello")),
        Err(LinkError::Format(FormatError::Version { found, .. })) => {
            let message = format!("this target speaks version {WIRE_VERSION} of the stream, the source {found}");
            return channel.refuse(Refusal::Version { known: WIRE_VERSION }, message).await;
        }
        Err(error) => return Err(error),
    };
    // The data thread answers this; it is bounded by the watchdog like every step, as the socket is dead after it.
    let answer = welcome(&peer, &hello).await;
    if let Welcome::Refused { reason, message } = answer {
        return channel.refuse(reason, message).await;
    }
    channel.send(&Handshake::Welcome(answer), "answering the hello").await?;
    match channel.receive("waiting for the stream to begin").await? {
        Handshake::Begin => {}
        _ => return Err(LinkError::OutOfTurn("waiting for the stream to begin")),
    }
    let expired = channel.expired();
    let (fd, control) = channel.leave()?;
    Ok(Accepted { fd, control, hello, peer, expired })
}

/// True if the peer's key is one of these, or none are known.
pub fn pinned(peer: &Peer, pins: &[Vec<u8>]) -> bool {
    pins.is_empty() || pins.iter().any(|pin| pin[..] == peer.pin)
}

/// One connection while it is in TLS.
struct Channel<C> {
    /// For tokio-uring: a duplicate of `fd`.
    socket: tokio_uring::net::TcpStream,
    /// What is handed over at the end.
    fd: Rc<OwnedFd>,
    watchdog: Watchdog,
    tls: C,
    /// Plain bytes that belong to no whole message yet.
    plain: Vec<u8>,
    /// One TLS record; moves into each read and comes back.
    record: Vec<u8>,
}

impl<C, S> Channel<C>
where
    C: std::ops::DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    fn new(stream: StdStream, tls: C) -> Result<Self, LinkError> {
        let prepared = (|| {
            // A ring wants to wait for the socket, not to be told EAGAIN.
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            // Buffer sizes stay the kernel's: set by hand they would be cut at net.core.[rw]mem_max (208 KiB unless
            // somebody has raised it) and no longer grow with the distance up to tcp_[rw]mem (4 and 6 MiB).
            rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
            Ok((stream.try_clone()?, OwnedFd::from(stream)))
        })();
        let (copy, fd) = prepared.map_err(|source| LinkError::Socket { step: "preparing the socket", source })?;
        let fd = Rc::new(fd);
        Ok(Self {
            socket: tokio_uring::net::TcpStream::from_std(copy),
            watchdog: Watchdog::new(Rc::clone(&fd)),
            fd,
            tls,
            plain: Vec::new(),
            record: Vec::with_capacity(RECORD_HEADER + MAX_RECORD),
        })
    }

    async fn shake_hands(&mut self) -> Result<(), LinkError> {
        const STEP: &str = "agreeing on TLS";
        while self.tls.is_handshaking() {
            self.write(STEP).await?;
            if self.tls.is_handshaking() {
                self.read_record(STEP).await?;
            }
        }
        self.write(STEP).await
    }

    fn check_alpn(&self) -> Result<(), LinkError> {
        if self.tls.alpn_protocol() == Some(ALPN) {
            return Ok(());
        }
        Err(LinkError::Tls(format!("protocol `{}` was not agreed", String::from_utf8_lossy(ALPN))))
    }

    /// The proxy at the other end.
    fn proxy(&self) -> Result<Peer, LinkError> {
        let certificate = self.tls.peer_certificates().and_then(<[CertificateDer<'_>]>::first);
        let certificate = certificate.ok_or_else(|| LinkError::PeerCertificate("there is none".to_owned()))?;
        let peer = identify(certificate).ok_or_else(|| LinkError::PeerCertificate("it names no role".to_owned()))?;
        if peer.role == Role::Proxy { Ok(peer) } else { Err(LinkError::NotAProxy(peer.name)) }
    }

    /// How long ago the peer's certificate ended, if it did and was taken nevertheless.
    fn expired(&self) -> Option<Duration> {
        let certificate = self.tls.peer_certificates().and_then(<[CertificateDer<'_>]>::first)?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
        now.checked_sub(Duration::from_secs(not_after(certificate)?)).filter(|late| !late.is_zero())
    }

    async fn send(&mut self, message: &Handshake, step: &'static str) -> Result<(), LinkError> {
        let bytes = message.encode();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            // The writer takes what fits below its own bound; what it took is sent before the next.
            let taken =
                io::Write::write(&mut self.tls.writer(), rest).map_err(|source| LinkError::Socket { step, source })?;
            rest = &rest[taken..];
            self.write(step).await?;
        }
        Ok(())
    }

    async fn receive(&mut self, step: &'static str) -> Result<Handshake, LinkError> {
        loop {
            if let Some((message, used)) = Handshake::read(&self.plain)? {
                self.plain.drain(..used);
                return Ok(message);
            }
            debug_assert!(self.plain.len() <= MAX_HANDSHAKE + 4 + MAX_RECORD);
            self.read_record(step).await?;
        }
    }

    async fn refuse<T>(mut self, reason: Refusal, message: String) -> Result<T, LinkError> {
        let answer = Handshake::Welcome(Welcome::Refused { reason: reason.clone(), message: message.clone() });
        self.send(&answer, "refusing the hello").await?;
        self.tls.send_close_notify();
        let _ = self.write("refusing the hello").await;
        Err(LinkError::Refused { reason, message })
    }

    /// The bare socket and the key of the target's control messages.
    fn leave(self) -> Result<(OwnedFd, ControlKey), LinkError> {
        if !self.plain.is_empty() || self.tls.wants_write() {
            return Err(LinkError::OutOfTurn("leaving TLS"));
        }
        let keys = self.tls.export_keying_material([0; 64], EXPORTER_LABEL, None).map_err(tls_error)?;
        let mut control = [0; 32];
        control.copy_from_slice(&keys[..32]);
        // The watchdog holds the descriptor too: end it first, or it would shut down a socket that is in use.
        drop(self.watchdog);
        drop(self.socket);
        let fd = match Rc::try_unwrap(self.fd) {
            Ok(fd) => fd,
            Err(shared) => shared.try_clone().map_err(|source| LinkError::Socket { step: "leaving TLS", source })?,
        };
        Ok((fd, ControlKey::new(&control)))
    }

    /// Sends what TLS has to send.
    async fn write(&mut self, step: &'static str) -> Result<(), LinkError> {
        while self.tls.wants_write() {
            let mut out = Vec::new();
            self.tls.write_tls(&mut out).map_err(|source| LinkError::Socket { step, source })?;
            self.watchdog.step();
            let (result, _) = self.socket.write_all(out).await;
            result.map_err(|source| self.failure(step, source))?;
        }
        Ok(())
    }

    /// Reads one TLS record, not a byte more, and takes what it brings.
    async fn read_record(&mut self, step: &'static str) -> Result<(), LinkError> {
        self.watchdog.step();
        self.record.clear();
        self.fill(RECORD_HEADER, step).await?;
        let length = usize::from(u16::from_be_bytes([self.record[3], self.record[4]]));
        // Content types 20 to 23 and version 3.x: other protocols show here, before their bytes are taken for a length.
        if !(20..=23).contains(&self.record[0]) || self.record[1] != 3 || length == 0 || length > MAX_RECORD {
            return Err(LinkError::Tls("what came is no TLS record".to_owned()));
        }
        self.fill(RECORD_HEADER + length, step).await?;

        let mut input = &self.record[..];
        while !input.is_empty() {
            self.tls.read_tls(&mut input).map_err(|source| LinkError::Socket { step, source })?;
            let state = match self.tls.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // The alert that tells the peer why; whether it arrives changes nothing here.
                    let _ = self.write(step).await;
                    return Err(tls_error(error));
                }
            };
            let bytes = state.plaintext_bytes_to_read();
            let closed = state.peer_has_closed();
            let at = self.plain.len();
            self.plain.resize(at + bytes, 0);
            io::Read::read_exact(&mut self.tls.reader(), &mut self.plain[at..])
                .map_err(|source| LinkError::Socket { step, source })?;
            if closed {
                return Err(LinkError::Closed { step });
            }
        }
        Ok(())
    }

    /// Reads until `record` has `len` bytes.
    async fn fill(&mut self, len: usize, step: &'static str) -> Result<(), LinkError> {
        while self.record.len() < len {
            let have = self.record.len();
            let mut record = std::mem::take(&mut self.record);
            record.resize(len, 0);
            let (result, slice) = self.socket.read(record.slice(have..len)).await;
            self.record = slice.into_inner();
            match result {
                Ok(0) => return Err(self.failure(step, io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.record.truncate(have + count),
                Err(source) => return Err(self.failure(step, source)),
            }
        }
        Ok(())
    }

    fn failure(&self, step: &'static str, source: io::Error) -> LinkError {
        match source.kind() {
            _ if self.watchdog.fired() => LinkError::TimedOut { step },
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                LinkError::Closed { step }
            }
            _ => LinkError::Socket { step, source },
        }
    }
}

/// Shuts a socket down when a step, or the whole handshake, takes too long.
struct Watchdog {
    until: Rc<Cell<Instant>>,
    end: Instant,
    fired: Rc<Cell<bool>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watchdog {
    fn new(fd: Rc<OwnedFd>) -> Self {
        let now = Instant::now();
        let until = Rc::new(Cell::new(now + STEP));
        let fired = Rc::new(Cell::new(false));
        let task = tokio::task::spawn_local({
            let (until, fired) = (Rc::clone(&until), Rc::clone(&fired));
            // Weak, so that the descriptor can be handed over while the ended task is still being dropped.
            let fd = Rc::downgrade(&fd);
            async move {
                while Instant::now() < until.get() {
                    tokio::time::sleep_until(until.get()).await;
                }
                fired.set(true);
                if let Some(fd) = fd.upgrade() {
                    let _ = rustix::net::shutdown(fd.as_fd(), rustix::net::Shutdown::Both);
                }
            }
        });
        Self { until, end: now + WHOLE, fired, task }
    }

    /// A new step begins.
    fn step(&self) {
        self.until.set((Instant::now() + STEP).min(self.end));
    }

    fn fired(&self) -> bool {
        self.fired.get()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Names what TLS found.
fn tls_error(error: rustls::Error) -> LinkError {
    use rustls::AlertDescription as Alert;
    use rustls::Error;
    match &error {
        Error::InvalidCertificate(problem) => LinkError::PeerCertificate(match problem {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".to_owned(),
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "it is not valid yet (do the clocks differ?)".to_owned()
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "another authority than this system's issued it".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "it names another proxy than the target of this stream".to_owned()
            }
            other => other.to_string(),
        }),
        Error::NoCertificatesPresented => LinkError::PeerCertificate("there is none".to_owned()),
        Error::AlertReceived(
            alert @ (Alert::CertificateExpired
            | Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateUnknown
            | Alert::CertificateRevoked
            | Alert::CertificateRequired
            | Alert::UnsupportedCertificate
            | Alert::AccessDenied
            | Alert::DecryptError),
        ) => LinkError::OwnCertificate(match alert {
            Alert::CertificateExpired => "it has expired".to_owned(),
            Alert::UnknownCA => "another authority issued it".to_owned(),
            other => format!("{other:?}"),
        }),
        _ => LinkError::Tls(error.to_string()),
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
