//! The handshake, between two tasks of one service thread and with peers that do not keep to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use afterimage_wire::ids::{IncarnationId, StreamId};
use afterimage_wire::segment::{Predecessor, WrappedKey};

use super::super::identity::Pems;
use super::super::throwaway::Throwaway;
use super::*;

const SOURCE: &str = "00000000-0000-4000-8000-00000000000a";
const TARGET: &str = "00000000-0000-4000-8000-00000000000b";

fn hello() -> Hello {
    Hello {
        version: WIRE_VERSION,
        stream: StreamId([7; 16]),
        incarnation: IncarnationId([8; 16]),
        predecessor: Predecessor::default(),
        key: WrappedKey::default(),
        first_seq: 1,
        next_frame: 1,
        connection: 0,
        disks: Vec::new(),
    }
}

fn accepted() -> Welcome {
    Welcome::Accepted {
        timeline: TimelineId([9; 16]),
        position: Position { incarnation: IncarnationId([8; 16]), frame: 5, seq: 17 },
        whole_resync: true,
    }
}

fn identity(bundle: &Pems) -> Identity {
    Identity::new(bundle).unwrap()
}

/// A target that takes one connection.
async fn target(identity: Identity, listener: TcpListener, answer: Welcome) -> Result<Accepted, LinkError> {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    accept(&identity, stream.into_std().unwrap(), async |_, _| answer).await
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Both ends, with these certificates.
fn pair(
    source: &Pems,
    target_bundle: &Pems,
    answer: Welcome,
) -> (Result<Linked, LinkError>, Result<Accepted, LinkError>) {
    let (source, sink) = (identity(source), identity(target_bundle));
    let (listener, address) = listener();
    tokio_uring::start(async move {
        let other = tokio_uring::spawn(target(sink, listener, answer));
        let ours = connect(&source, &address.to_string(), TARGET, &[], |_| false, hello()).await;
        (ours, other.await.unwrap())
    })
}

/// A client that is no source, against a target; what the target says of it.
fn hostile(client: impl FnOnce(std::net::TcpStream) + Send + 'static) -> LinkError {
    let ca = Throwaway::new().unwrap();
    let sink = identity(&ca.proxy("dr", TARGET).unwrap());
    let (listener, address) = listener();
    let client = std::thread::spawn(move || client(std::net::TcpStream::connect(address).unwrap()));
    let error = tokio_uring::start(target(sink, listener, accepted())).unwrap_err();
    client.join().unwrap();
    error
}

#[test]
fn both_ends_agree_and_share_the_control_key_and_a_bare_socket() {
    let ca = Throwaway::new().unwrap();
    let (ours, theirs) = pair(&ca.proxy("src", SOURCE).unwrap(), &ca.proxy("dr", TARGET).unwrap(), accepted());
    let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
    assert_eq!((ours.position.frame, ours.position.seq, ours.whole_resync), (5, 17, true));
    assert_eq!(theirs.hello.stream, StreamId([7; 16]));
    assert_eq!((theirs.peer.name.as_str(), theirs.peer.uid.as_str()), ("src", SOURCE));

    let mut sealed = [0; afterimage_wire::control::CONTROL_LEN];
    let message = afterimage_wire::control::Control::Ready;
    theirs.control.seal(&message, &mut sealed);
    let mut down = std::net::TcpStream::from(theirs.fd);
    down.write_all(&sealed).unwrap();
    let mut up = std::net::TcpStream::from(ours.fd);
    let mut got = sealed;
    got.fill(0);
    up.read_exact(&mut got).unwrap();
    assert_eq!(ours.control.open(&got).unwrap(), message);
    // And nothing else is under way in either direction.
    drop(down);
    assert_eq!(up.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_target_whose_key_was_revoked_is_refused_however_good_its_certificate() {
    let ca = Throwaway::new().unwrap();
    let (source, sink) = (identity(&ca.proxy("src", SOURCE).unwrap()), identity(&ca.proxy("dr", TARGET).unwrap()));
    let (listener, address) = listener();
    let ours = tokio_uring::start(async move {
        let other = tokio_uring::spawn(target(sink, listener, accepted()));
        let ours = connect(&source, &address.to_string(), TARGET, &[], |_| true, hello()).await;
        other.await.unwrap().unwrap_err();
        ours
    });
    assert!(matches!(&ours, Err(LinkError::PeerCertificate(why)) if why.contains("revoked")), "{ours:?}");
}

#[test]
fn a_refusal_reaches_the_source_with_its_reason() {
    let ca = Throwaway::new().unwrap();
    let refused = Welcome::Refused { reason: Refusal::Branch, message: "a branch".to_owned() };
    let (ours, theirs) = pair(&ca.proxy("src", SOURCE).unwrap(), &ca.proxy("dr", TARGET).unwrap(), refused);
    assert!(matches!(ours, Err(LinkError::Refused { reason: Refusal::Branch, message }) if message == "a branch"));
    assert!(matches!(theirs, Err(LinkError::Refused { reason: Refusal::Branch, .. })));
}

#[test]
fn a_target_of_another_authority_is_refused() {
    let (ours, theirs) = pair(
        &Throwaway::new().unwrap().proxy("src", SOURCE).unwrap(),
        &Throwaway::new().unwrap().proxy("dr", TARGET).unwrap(),
        accepted(),
    );
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("another authority")));
    assert!(matches!(theirs, Err(LinkError::OwnCertificate(_))));
}

#[test]
fn a_source_of_another_authority_is_refused() {
    let (mine, other) = (Throwaway::new().unwrap(), Throwaway::new().unwrap());
    let mut source = other.proxy("src", SOURCE).unwrap();
    let target = mine.proxy("dr", TARGET).unwrap();
    source.ca_pem.clone_from(&target.ca_pem);
    let (ours, theirs) = pair(&source, &target, accepted());
    assert!(matches!(theirs, Err(LinkError::PeerCertificate(_))), "{theirs:?}");
    assert!(matches!(ours, Err(LinkError::OwnCertificate(_) | LinkError::Closed { .. })), "{ours:?}");
}

#[test]
fn an_expired_certificate_is_refused_at_either_end() {
    let ca = Throwaway::new().unwrap();
    let (ours, theirs) = pair(&ca.expired("src", SOURCE), &ca.proxy("dr", TARGET).unwrap(), accepted());
    assert!(matches!(theirs, Err(LinkError::PeerCertificate(why)) if why.contains("expired")));
    assert!(matches!(&ours, Err(LinkError::OwnCertificate(why)) if why.contains("expired")), "{ours:?}");
    let (ours, _) = pair(&ca.proxy("src", SOURCE).unwrap(), &ca.expired("dr", TARGET), accepted());
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("expired")));
}

/// Both ends, each with the key of the other paired.
fn paired(source: &Pems, target_bundle: &Pems) -> (Result<Linked, LinkError>, Result<Accepted, LinkError>) {
    use rustls::pki_types::pem::PemObject;
    let pin = |pems: &Pems| {
        let der = CertificateDer::from_pem_slice(pems.certificate_pem.as_bytes()).unwrap();
        afterimage_controlplane::ca::key_pin(&der).unwrap().to_vec()
    };
    let (ours, theirs) = (identity(source), identity(target_bundle));
    ours.pins.set([&pin(target_bundle)]);
    theirs.pins.set([&pin(source)]);
    let (listener, address) = listener();
    tokio_uring::start(async move {
        let other = tokio_uring::spawn(target(theirs, listener, accepted()));
        let ours = connect(&ours, &address.to_string(), TARGET, &[], |_| false, hello()).await;
        (ours, other.await.unwrap())
    })
}

#[test]
fn a_paired_key_outlives_its_certificate_by_its_grace_and_no_longer() {
    const DAY: u64 = 86_400;
    let ca = Throwaway::new().unwrap();
    let (good_source, good_target) = (ca.proxy("src", SOURCE).unwrap(), ca.proxy("dr", TARGET).unwrap());
    let (ours, theirs) = paired(&ca.ended("src", SOURCE, 2 * DAY), &good_target);
    assert_eq!(theirs.unwrap().expired.unwrap().as_secs() / DAY, 2);
    assert_eq!(ours.unwrap().expired, None);
    let (ours, theirs) = paired(&good_source, &ca.ended("dr", TARGET, 89 * DAY));
    assert_eq!(ours.unwrap().expired.unwrap().as_secs() / DAY, 89);
    assert_eq!(theirs.unwrap().expired, None);
    let (ours, _) = paired(&good_source, &ca.ended("dr", TARGET, 91 * DAY));
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("expired")));
    let (_, theirs) = paired(&ca.ended("src", SOURCE, 91 * DAY), &good_target);
    assert!(matches!(theirs, Err(LinkError::PeerCertificate(why)) if why.contains("expired")));
}

#[test]
fn a_paired_key_excuses_nothing_but_age() {
    let (mine, other) = (Throwaway::new().unwrap(), Throwaway::new().unwrap());
    let (ours, _) = paired(&mine.proxy("src", SOURCE).unwrap(), &other.ended("dr", TARGET, 60));
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("another authority")));
    let (ours, _) = paired(&mine.proxy("src", SOURCE).unwrap(), &mine.ended("dr", SOURCE, 60));
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("another proxy")));
}

#[test]
fn two_authorities_are_trusted_at_once() {
    let (old, new) = (Throwaway::new().unwrap(), Throwaway::new().unwrap());
    let (mut source, mut target) = (old.proxy("src", SOURCE).unwrap(), new.proxy("dr", TARGET).unwrap());
    let both = format!("{}{}", source.ca_pem, target.ca_pem);
    source.ca_pem.clone_from(&both);
    target.ca_pem = both;
    let (ours, theirs) = pair(&source, &target, accepted());
    assert!(ours.is_ok() && theirs.is_ok(), "{ours:?} {theirs:?}");
}

#[test]
fn another_proxy_in_the_place_of_the_target_is_refused() {
    let ca = Throwaway::new().unwrap();
    let (ours, _) = pair(&ca.proxy("src", SOURCE).unwrap(), &ca.proxy("other", SOURCE).unwrap(), accepted());
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("another proxy")));
}

#[test]
fn a_target_with_another_key_than_the_paired_one_is_refused() {
    let ca = Throwaway::new().unwrap();
    let (source, sink) = (identity(&ca.proxy("src", SOURCE).unwrap()), identity(&ca.proxy("dr", TARGET).unwrap()));
    let (listener, address) = listener();
    let ours = tokio_uring::start(async move {
        let _other = tokio_uring::spawn(target(sink, listener, accepted()));
        connect(&source, &address.to_string(), TARGET, &[vec![1; 32]], |_| false, hello()).await
    });
    assert!(matches!(ours, Err(LinkError::PeerCertificate(why)) if why.contains("paired")));
}

#[test]
fn a_certificate_of_another_role_opens_no_stream() {
    let ca = Throwaway::new().unwrap();
    let (_, theirs) = pair(&ca.operator("eve"), &ca.proxy("dr", TARGET).unwrap(), accepted());
    assert!(matches!(theirs, Err(LinkError::NotAProxy(who)) if who == "eve"));
}

#[test]
fn another_version_is_refused_by_number() {
    let ca = Throwaway::new().unwrap();
    let (source, sink) = (identity(&ca.proxy("src", SOURCE).unwrap()), identity(&ca.proxy("dr", TARGET).unwrap()));
    let (listener, address) = listener();
    let (ours, theirs) = tokio_uring::start(async move {
        let other = tokio_uring::spawn(target(sink, listener, accepted()));
        let newer = Hello { version: WIRE_VERSION + 1, ..hello() };
        (connect(&source, &address.to_string(), TARGET, &[], |_| false, newer).await, other.await.unwrap())
    });
    let refusal = Refusal::Version { known: WIRE_VERSION };
    assert!(matches!(ours, Err(LinkError::Refused { reason, .. }) if reason == refusal));
    assert!(matches!(theirs, Err(LinkError::Refused { reason, .. }) if reason == refusal));
}

#[test]
fn garbage_ends_only_its_connection_with_a_named_error() {
    let error = hostile(|mut stream| {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert!(matches!(error, LinkError::Tls(_)), "{error:?}");
}

#[test]
fn a_client_that_goes_away_is_named() {
    let error = hostile(drop);
    assert!(matches!(error, LinkError::Closed { step: "agreeing on TLS" }), "{error:?}");
}

#[test]
fn a_client_that_says_nothing_is_given_up() {
    let started = std::time::Instant::now();
    let error = hostile(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert!(matches!(error, LinkError::TimedOut { .. }), "{error:?}");
    assert!(started.elapsed() < WHOLE);
}
