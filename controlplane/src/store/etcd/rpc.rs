//! The part of etcd's API (v3) that is used: messages by hand, so that a build needs no compiler for them, and calls that
//! go on to the next member when one does not answer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prost::{Message, Oneof};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::store::StoreError;

/// How long a member has to answer before the next is asked.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long a connection may take to be made.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// Silence after which a member is asked whether it is there, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// Longest answer, bytes: a page of the longest values.
const MAX_ANSWER: usize = 64 << 20;

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[derive(Clone, PartialEq, Message)]
        pub struct $name {
            $($(#[$meta])* pub $field: $type,)*
        })*
    };
}

messages! {
    /// As of when an answer is.
    Header {
        /// Of the store.
        #[prost(int64, tag = "3")] revision: i64,
    }
    /// A key as it is.
    KeyValue {
        /// Key.
        #[prost(bytes = "vec", tag = "1")] key: Vec<u8>,
        /// Revision at which it came to be.
        #[prost(int64, tag = "2")] create_revision: i64,
        /// Revision of its last change.
        #[prost(int64, tag = "3")] mod_revision: i64,
        /// Value.
        #[prost(bytes = "vec", tag = "5")] value: Vec<u8>,
    }
    /// Reads `[key, range_end)`, or one key.
    Range {
        /// First key.
        #[prost(bytes = "vec", tag = "1")] key: Vec<u8>,
        /// End, not in it; empty for one key.
        #[prost(bytes = "vec", tag = "2")] range_end: Vec<u8>,
        /// At most so many.
        #[prost(int64, tag = "3")] limit: i64,
        /// As of this revision; 0 for now.
        #[prost(int64, tag = "4")] revision: i64,
        /// Without values.
        #[prost(bool, tag = "8")] keys_only: bool,
    }
    /// Answer to [`Range`].
    Ranged {
        /// When.
        #[prost(message, optional, tag = "1")] header: Option<Header>,
        /// Rising by key.
        #[prost(message, repeated, tag = "2")] kvs: Vec<KeyValue>,
        /// There are more.
        #[prost(bool, tag = "3")] more: bool,
    }
    /// Writes a key.
    Put {
        /// Key.
        #[prost(bytes = "vec", tag = "1")] key: Vec<u8>,
        /// Value.
        #[prost(bytes = "vec", tag = "2")] value: Vec<u8>,
        /// Goes with this lease; 0 for none.
        #[prost(int64, tag = "3")] lease: i64,
    }
    /// Deletes a key.
    Delete {
        /// Key.
        #[prost(bytes = "vec", tag = "1")] key: Vec<u8>,
    }
    /// One operation of a transaction.
    Do {
        /// Which.
        #[prost(oneof = "Op", tags = "1, 2, 3")] op: Option<Op>,
    }
    /// One condition of a transaction: equality.
    Compare {
        /// 0: equal.
        #[prost(int32, tag = "1")] result: i32,
        /// 1: [`Revision::Create`]. 2: [`Revision::Mod`].
        #[prost(int32, tag = "2")] target: i32,
        /// Key.
        #[prost(bytes = "vec", tag = "3")] key: Vec<u8>,
        /// With what.
        #[prost(oneof = "Revision", tags = "5, 6")] revision: Option<Revision>,
    }
    /// Conditions, and what is done if they hold or do not.
    Txn {
        /// All have to hold.
        #[prost(message, repeated, tag = "1")] compare: Vec<Compare>,
        /// If they do.
        #[prost(message, repeated, tag = "2")] success: Vec<Do>,
        /// If they do not.
        #[prost(message, repeated, tag = "3")] failure: Vec<Do>,
    }
    /// What one operation of a transaction gave; only reads are looked at.
    Done {
        /// Of a read.
        #[prost(message, optional, tag = "1")] range: Option<Ranged>,
    }
    /// Answer to [`Txn`].
    TxnDone {
        /// When.
        #[prost(message, optional, tag = "1")] header: Option<Header>,
        /// The conditions held.
        #[prost(bool, tag = "2")] succeeded: bool,
        /// In the order of the operations.
        #[prost(message, repeated, tag = "3")] responses: Vec<Done>,
    }
    /// Asks for a lease, or for another term of one, or ends one.
    Lease {
        /// Seconds when asked for; the lease when it is renewed or ended.
        #[prost(int64, tag = "1")] value: i64,
    }
    /// A lease, granted or renewed.
    Leased {
        /// When.
        #[prost(message, optional, tag = "1")] header: Option<Header>,
        /// Which.
        #[prost(int64, tag = "2")] id: i64,
        /// Seconds that it lasts; 0 if there is none.
        #[prost(int64, tag = "3")] ttl: i64,
    }
    /// Begins a watch.
    WatchCreate {
        /// First key.
        #[prost(bytes = "vec", tag = "1")] key: Vec<u8>,
        /// End, not in it.
        #[prost(bytes = "vec", tag = "2")] range_end: Vec<u8>,
        /// From this revision on.
        #[prost(int64, tag = "3")] start_revision: i64,
    }
    /// Begins a watch.
    WatchAsked {
        /// As a union of one.
        #[prost(message, optional, tag = "1")] create: Option<WatchCreate>,
    }
    /// What happened to a key.
    Event {
        /// 0: put, 1: deleted.
        #[prost(int32, tag = "1")] kind: i32,
        /// The key.
        #[prost(message, optional, tag = "2")] kv: Option<KeyValue>,
    }
    /// What a watch tells.
    WatchTold {
        /// When.
        #[prost(message, optional, tag = "1")] header: Option<Header>,
        /// It has ended.
        #[prost(bool, tag = "4")] canceled: bool,
        /// The oldest revision that can be watched, if the one asked for is gone.
        #[prost(int64, tag = "5")] compact_revision: i64,
        /// Rising by revision; all of one revision together.
        #[prost(message, repeated, tag = "11")] events: Vec<Event>,
    }
}

/// An operation.
#[derive(Clone, PartialEq, Oneof)]
pub enum Op {
    /// Reads.
    #[prost(message, tag = "1")]
    Range(Range),
    /// Writes.
    #[prost(message, tag = "2")]
    Put(Put),
    /// Deletes.
    #[prost(message, tag = "3")]
    Delete(Delete),
}

/// What a condition compares with.
#[derive(Clone, PartialEq, Oneof)]
pub enum Revision {
    /// Revision at which the key came to be; 0: it is not there.
    #[prost(int64, tag = "5")]
    Create(i64),
    /// Revision of its last change; 0: it is not there.
    #[prost(int64, tag = "6")]
    Mod(i64),
}

impl Compare {
    /// The key's revision is this.
    pub fn equal(key: &str, revision: Revision) -> Self {
        let target = if matches!(revision, Revision::Create(_)) { 1 } else { 2 };
        Self { result: 0, target, key: key.into(), revision: Some(revision) }
    }
}

impl From<Op> for Do {
    fn from(op: Op) -> Self {
        Self { op: Some(op) }
    }
}

/// The end of the range of all keys that begin with `prefix`.
pub fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// Whom to trust and who one is, where the members speak TLS.
#[derive(Clone, Default)]
pub struct Tls {
    /// CA of the members, PEM.
    pub ca_pem: Option<String>,
    /// Certificate and key, PEM.
    pub identity: Option<(String, String)>,
}

/// All members.
pub struct Client {
    addresses: Vec<String>,
    members: Vec<Channel>,
    /// Where the last answer came from.
    current: AtomicUsize,
}

impl Client {
    /// Connects when the first call is made.
    ///
    /// # Errors
    /// An address is none, or the certificates are none.
    pub fn new(members: &[String], tls: &Tls) -> Result<Self, StoreError> {
        crate::client::install_crypto();
        let bad = |address: &str, e: &dyn std::fmt::Display| {
            StoreError::Failed(format!("etcd at {address:?}: {e}; allowed: http://host:port or https://host:port"))
        };
        let mut channels = Vec::new();
        for address in members {
            let mut endpoint = Endpoint::from_shared(address.clone()).map_err(|e| bad(address, &e))?;
            if address.starts_with("https://") {
                let mut config = ClientTlsConfig::new();
                if let Some(ca) = &tls.ca_pem {
                    config = config.ca_certificate(Certificate::from_pem(ca));
                }
                if let Some((certificate, key)) = &tls.identity {
                    config = config.identity(Identity::from_pem(certificate, key));
                }
                endpoint = endpoint.tls_config(config).map_err(|e| bad(address, &e))?;
            } else if !address.starts_with("http://") {
                return Err(bad(address, &"no scheme"));
            }
            let endpoint = endpoint
                .connect_timeout(CONNECT_WITHIN)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true);
            channels.push(endpoint.connect_lazy());
        }
        if channels.is_empty() {
            return Err(StoreError::Failed("no member of etcd is named; allowed: at least one".to_owned()));
        }
        Ok(Self { addresses: members.to_vec(), members: channels, current: AtomicUsize::new(0) })
    }

    /// How many there are.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Asks one member once. The next call goes to another if this one does not answer. An error other than a refusal
    /// leaves open whether the call was done.
    ///
    /// # Errors
    /// As the member says, or it does not answer in time.
    pub async fn once<A: Message + 'static, B: Message + Default + 'static>(
        &self,
        path: &'static str,
        ask: A,
    ) -> Result<B, Status> {
        let at = self.current.load(Ordering::Relaxed);
        let call = async {
            let mut grpc = Grpc::new(self.members[at].clone()).max_decoding_message_size(MAX_ANSWER);
            grpc.ready().await.map_err(|e| Status::unavailable(self.why(at, &e)))?;
            let path = PathAndQuery::from_static(path);
            grpc.unary(Request::new(ask), path, ProstCodec::default()).await.map_err(|status| self.ended(at, status))
        };
        let answer = tokio::time::timeout(ANSWER_WITHIN, call).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("it does not answer"))) {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => {
                if !is_refusal(&status) {
                    self.next(at);
                }
                Err(status)
            }
        }
    }

    /// Asks until a member answers, at most twice each: for what may be done twice.
    ///
    /// # Errors
    /// None answers, or one refuses.
    pub async fn repeat<A: Message + Clone + 'static, B: Message + Default + 'static>(
        &self,
        path: &'static str,
        ask: A,
    ) -> Result<B, StoreError> {
        let mut last = None;
        for _ in 0..2 * self.members.len() {
            match self.once(path, ask.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(status) if is_refusal(&status) => return Err(failed(&status)),
                Err(status) => last = Some(status),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(last.map_or_else(|| StoreError::Failed("etcd: no member".to_owned()), |s| failed(&s)))
    }

    /// Begins a stream with one message.
    ///
    /// # Errors
    /// The member does not answer, or refuses.
    pub async fn stream<A: Message + 'static, B: Message + Default + 'static>(
        &self,
        path: &'static str,
        first: A,
        open: tokio::sync::mpsc::Receiver<A>,
    ) -> Result<Streaming<B>, Status> {
        let at = self.current.load(Ordering::Relaxed);
        let messages = tokio_stream::StreamExt::chain(
            tokio_stream::once(first),
            tokio_stream::wrappers::ReceiverStream::new(open),
        );
        let call = async {
            let mut grpc = Grpc::new(self.members[at].clone()).max_decoding_message_size(MAX_ANSWER);
            grpc.ready().await.map_err(|e| Status::unavailable(self.why(at, &e)))?;
            grpc.streaming(Request::new(messages), PathAndQuery::from_static(path), ProstCodec::default()).await
        };
        let answer = tokio::time::timeout(ANSWER_WITHIN, call).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("it does not answer"))) {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => {
                self.next(at);
                Err(status)
            }
        }
    }

    /// Why a member cannot be reached, and which.
    fn why(&self, at: usize, error: &dyn std::error::Error) -> String {
        format!("{}: {}", self.addresses[at], crate::client::cause(error))
    }

    /// A connection that ended before the answer came, and not by the member's word. With TLS that is how it turns away
    /// whom it does not know.
    fn ended(&self, at: usize, status: Status) -> Status {
        let lost = std::error::Error::source(&status).is_some();
        if !lost && status.code() != Code::Cancelled {
            return status;
        }
        let address = &self.addresses[at];
        let why = if lost { crate::client::cause(&status) } else { "it has ended the connection".to_owned() };
        let hint = if address.starts_with("https") { "; does it accept this coordinator's certificate?" } else { "" };
        Status::unavailable(format!("{address}: {why}{hint}"))
    }

    fn next(&self, from: usize) {
        let to = (from + 1) % self.members.len();
        // Another call may have moved on already.
        let _ = self.current.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The member that is asked.
    pub fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// This member is not to be asked next, unless it has been left already.
    pub fn leave(&self, member: usize) {
        self.next(member);
    }

    /// The member asked last is not to be asked next.
    pub fn give_up_on_current(&self) {
        self.next(self.current.load(Ordering::Relaxed));
    }
}

/// The member has looked at the call and not done it.
pub fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::OutOfRange
            | Code::ResourceExhausted
    )
}

/// An error of the store.
pub fn failed(status: &Status) -> StoreError {
    StoreError::Failed(format!("etcd: {} ({:?})", status.message(), status.code()))
}
