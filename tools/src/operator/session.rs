//! A command's connection to its coordinator: whose certificate it uses, the clients of the services, names in full,
//! and what becomes of an error.

use std::cell::Cell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use afterimage_controlplane::bundle::{Bundle, BundleError};
use afterimage_controlplane::ca::overdue_time_ns;
use afterimage_controlplane::client::{self, ClientError};
use afterimage_controlplane::grpc::auth::RENEW_HEADER;
use afterimage_wire::v1;
use clap::Args;
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::failure::{Failure, Kind};
use super::output::Output;
use super::values::{duration_ns, show_duration, show_time};

/// Most bytes of one answer: a full page of points with their disks' uids.
const MAX_ANSWER: usize = 64 << 20;
/// Longest that a command waits for its certificate to be renewed before it goes on with the one it has.
const RENEW_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks at the clock: it may be set.
const DUE_LOOK: Duration = Duration::from_secs(60);
/// … at least.
const DUE_LEAST: Duration = Duration::from_millis(100);
/// Between two tries of a renewal.
const RETRY: Duration = Duration::from_secs(60);

/// Options of every operator's command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Everywhere")]
pub struct Common {
    /// Print JSON: one document, or one line for each event.
    #[arg(long, global = true)]
    pub json: bool,
    /// Do not ask before something is lost.
    #[arg(long, short, global = true)]
    pub yes: bool,
    /// Who is asking: the file that `afterimage join` wrote [default: ~/.config/afterimage/identity.json].
    #[arg(long, global = true, value_name = "FILE", env = "AFTERIMAGE_IDENTITY")]
    pub identity: Option<PathBuf>,
    /// Reach the coordinator here instead of where the identity says.
    #[arg(long, global = true, value_name = "HOST:PORT", env = "AFTERIMAGE_COORDINATOR")]
    pub coordinator: Option<String>,
    /// Give up when a call takes longer.
    #[arg(long, global = true, value_name = "DURATION", default_value = "30s", value_parser = duration_ns)]
    pub timeout: u64,
}

impl Common {
    /// How to speak.
    pub fn output(&self) -> Output {
        Output { json: self.json, yes: self.yes }
    }

    /// The file with the identity.
    pub fn identity_file(&self) -> Result<PathBuf, Failure> {
        if let Some(path) = &self.identity {
            return Ok(path.clone());
        }
        let folder = match (std::env::var_os("XDG_CONFIG_HOME"), std::env::var_os("HOME")) {
            (Some(folder), _) if !folder.is_empty() => PathBuf::from(folder),
            (_, Some(home)) if !home.is_empty() => Path::new(&home).join(".config"),
            _ => {
                return Err(Failure::usage("there is no home folder to find the identity in")
                    .hint("name the file: --identity FILE, or AFTERIMAGE_IDENTITY"));
            }
        };
        Ok(folder.join("afterimage/identity.json"))
    }

    /// The coordinator's address that was given, in full.
    pub fn endpoint(&self) -> Option<String> {
        self.coordinator.as_deref().map(endpoint)
    }
}

/// An address as a URL: `host:port` means TLS, and nothing else is spoken.
pub fn endpoint(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("https://{address}") }
}

/// All of a list, page by page: `every!(session, "groups", groups.list_groups(request).groups)`.
macro_rules! every {
    ($session:expr, $object:expr, $client:ident.$method:ident($request:expr).$field:ident) => {{
        let mut request = $request;
        let mut all = Vec::new();
        loop {
            let page = $session.ask($object, $session.$client().$method(request.clone())).await?;
            all.extend(page.$field);
            if page.next_page_token.is_empty() {
                break all;
            }
            request.page_token = page.next_page_token;
        }
    }};
}
pub(crate) use every;

/// Which objects of a list.
#[derive(Args, Debug, Default, Clone)]
pub struct Which {
    /// Only those that fit: fields as in the API, such as 'description:web AND version > 1'.
    #[arg(long, value_name = "FILTER", default_value = "", hide_default_value = true)]
    pub filter: String,
}

/// Which of what is numbered as it happens.
#[derive(Args, Debug, Default, Clone)]
pub struct Recent {
    /// Only those with this number or above it.
    #[arg(long, default_value_t = 0)]
    pub from: u64,
    /// The newest so many of them; 0 for all.
    #[arg(long, default_value_t = 50)]
    pub limit: u32,
    /// And which of those.
    #[command(flatten)]
    pub which: Which,
}

/// An open connection.
pub struct Session {
    channel: Channel,
    bundle: Bundle,
    /// Where the bundle lies.
    path: PathBuf,
    /// The coordinator's address, if it is not the bundle's.
    endpoint: Option<String>,
    /// When the certificate's renewal is tried next, if it has failed.
    retry: Option<Instant>,
    /// The coordinator has asked for another certificate, and was heard.
    asked: Cell<bool>,
    limit: Duration,
    /// How to speak.
    pub out: Output,
}

impl Session {
    /// Reads the identity and connects.
    pub async fn open(common: &Common) -> Result<Self, Failure> {
        let limit = Duration::from_nanos(common.timeout);
        Self::connect(common.identity_file()?, common.endpoint(), limit, common.output()).await
    }

    async fn connect(path: PathBuf, endpoint: Option<String>, limit: Duration, out: Output) -> Result<Self, Failure> {
        let mut bundle = Bundle::load(&path).map_err(|error| unusable(&path, &error))?;
        let own = bundle.endpoint.clone();
        if let Some(endpoint) = &endpoint {
            bundle.endpoint.clone_from(endpoint);
        }
        let mut retry = None;
        if is_due(&bundle) {
            let failed = || Some(Instant::now() + RETRY);
            match tokio::time::timeout(limit.min(RENEW_WITHIN), client::renew(&bundle)).await {
                Ok(Ok(mut renewed)) => {
                    // The file keeps the address that is in it.
                    let here = std::mem::replace(&mut renewed.endpoint, own);
                    if let Err(error) = renewed.save(&path) {
                        eprintln!("afterimage: the certificate is renewed and cannot be kept: {error}");
                    }
                    renewed.endpoint = here;
                    bundle = renewed;
                }
                // The call itself says what is wrong; until the certificate ends nothing is.
                Ok(Err(error)) => {
                    unrenewed(&bundle, &error.to_string());
                    retry = failed();
                }
                Err(_) => {
                    unrenewed(&bundle, "the coordinator does not answer");
                    retry = failed();
                }
            }
        }
        let channel = match tokio::time::timeout(limit, client::connect(&bundle)).await {
            Ok(connected) => connected.map_err(|error| unconnected(&error))?,
            Err(_) => return Err(silent(&bundle.endpoint, limit.as_nanos() as u64)),
        };
        Ok(Session { channel, bundle, path, endpoint, retry, asked: Cell::default(), limit, out })
    }

    /// Another one, with whichever coordinator answers now: this one's may be gone, and others there.
    pub async fn again(&self) -> Result<Self, Failure> {
        Self::connect(self.path.clone(), self.endpoint.clone(), self.limit, self.out).await
    }

    /// Renews the certificate because the coordinator asks for it; the connection goes on by the one that it has.
    async fn renew_once(&self) {
        if self.asked.replace(true) {
            return;
        }
        let renewed = tokio::time::timeout(self.limit.min(RENEW_WITHIN), client::renew(&self.bundle)).await;
        if let Ok(Ok(mut renewed)) = renewed {
            // The file keeps the address that is in it. If nothing comes of this, the next command tries again.
            if let Ok(kept) = Bundle::load(&self.path) {
                renewed.endpoint = kept.endpoint;
                let _ = renewed.save(&self.path);
            }
        }
    }

    /// Whether the certificate should be renewed: by [`Self::again`].
    pub fn is_due(&self) -> bool {
        is_due(&self.bundle) && self.retry.is_none_or(|at| at <= Instant::now())
    }

    /// Until [`Self::is_due`].
    pub async fn due(&self) {
        while !self.is_due() {
            let left = Duration::from_nanos(self.bundle.renew_at_ns().saturating_sub(wall_ns()));
            let left = self.retry.map_or(left, |at| at.saturating_duration_since(Instant::now()));
            tokio::time::sleep(left.clamp(DUE_LEAST, DUE_LOOK)).await;
        }
    }

    /// Awaits the answer to a call about `object`.
    pub async fn ask<T>(
        &self,
        object: impl Into<String>,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(self.limit, call).await {
            Ok(Ok(answer)) => {
                if answer.metadata().contains_key(RENEW_HEADER) {
                    self.renew_once().await;
                }
                Ok(answer.into_inner())
            }
            Ok(Err(status)) => Err(self.answered(object, &status)),
            Err(_) => Err(silent(&self.bundle.endpoint, self.limit.as_nanos() as u64)),
        }
    }

    /// The failure that an answer stands for.
    pub fn answered(&self, object: impl Into<String>, status: &Status) -> Failure {
        match transport_cause(status) {
            Some(cause) => unreached(&self.bundle.endpoint, &cause),
            None => {
                let mut failure = Failure::answered(object, status);
                failure.message = short(&failure.message, &self.bundle.tenant);
                failure
            }
        }
    }

    /// Where the coordinator is.
    pub fn endpoint(&self) -> &str {
        &self.bundle.endpoint
    }

    /// `tenants/<tenant>`.
    pub fn tenant(&self) -> String {
        format!("tenants/{}", self.bundle.tenant)
    }

    fn name(&self, collection: &str, id: &str) -> String {
        format!("tenants/{}/{collection}/{id}", self.bundle.tenant)
    }

    /// A policy's name in full.
    pub fn policy(&self, id: &str) -> String {
        self.name("policies", id)
    }

    /// A proxy's name in full.
    pub fn proxy(&self, id: &str) -> String {
        self.name("proxies", id)
    }

    /// A group's name in full.
    pub fn group(&self, id: &str) -> String {
        self.name("groups", id)
    }

    /// An operation's name in full.
    pub fn operation(&self, id: &str) -> String {
        self.name("operations", id)
    }

    /// A machine's name in full.
    pub fn machine(&self, id: &str) -> String {
        self.name("machines", id)
    }

    /// A plan's name in full.
    pub fn plan(&self, id: &str) -> String {
        self.name("plans", id)
    }

    /// A disk's name in full.
    pub fn disk(&self, group: &str, id: &str) -> String {
        format!("{}/disks/{id}", self.group(group))
    }

    /// A view's name in full.
    pub fn view(&self, group: &str, id: &str) -> String {
        format!("{}/views/{id}", self.group(group))
    }

    /// Policies.
    pub fn policies(&self) -> v1::policies_client::PoliciesClient<Channel> {
        v1::policies_client::PoliciesClient::new(self.channel.clone())
    }

    /// Groups and their disks.
    pub fn groups(&self) -> v1::groups_client::GroupsClient<Channel> {
        v1::groups_client::GroupsClient::new(self.channel.clone())
    }

    /// Machines.
    pub fn machines(&self) -> v1::machines_client::MachinesClient<Channel> {
        v1::machines_client::MachinesClient::new(self.channel.clone())
    }

    /// Plans.
    pub fn plans(&self) -> v1::plans_client::PlansClient<Channel> {
        v1::plans_client::PlansClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Proxies.
    pub fn proxies(&self) -> v1::proxies_client::ProxiesClient<Channel> {
        v1::proxies_client::ProxiesClient::new(self.channel.clone())
    }

    /// Restore points.
    pub fn points(&self) -> v1::points_client::PointsClient<Channel> {
        v1::points_client::PointsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Failovers.
    pub fn failovers(&self) -> v1::failovers_client::FailoversClient<Channel> {
        v1::failovers_client::FailoversClient::new(self.channel.clone())
    }

    /// Operations.
    pub fn operations(&self) -> v1::operations_client::OperationsClient<Channel> {
        v1::operations_client::OperationsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Views.
    pub fn views(&self) -> v1::views_client::ViewsClient<Channel> {
        v1::views_client::ViewsClient::new(self.channel.clone())
    }

    /// Status and events.
    pub fn status(&self) -> v1::status_client::StatusClient<Channel> {
        v1::status_client::StatusClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// The coordinator's own state.
    pub fn backups(&self) -> v1::backups_client::BackupsClient<Channel> {
        v1::backups_client::BackupsClient::new(self.channel.clone())
    }

    /// Certificates by join tokens.
    pub fn audit(&self) -> v1::audit_client::AuditClient<Channel> {
        v1::audit_client::AuditClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Certificates that have been issued.
    pub fn certificates(&self) -> v1::certificates_client::CertificatesClient<Channel> {
        v1::certificates_client::CertificatesClient::new(self.channel.clone())
    }

    /// Keys of groups.
    pub fn keys(&self) -> v1::keys_client::KeysClient<Channel> {
        v1::keys_client::KeysClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Enrolment.
    pub fn enrolment(&self) -> v1::enrolment_client::EnrolmentClient<Channel> {
        v1::enrolment_client::EnrolmentClient::new(self.channel.clone())
    }
}

/// Due to be renewed, and good still: what has ended only another token replaces.
fn is_due(bundle: &Bundle) -> bool {
    (bundle.renew_at_ns()..bundle.expire_time_ns).contains(&wall_ns())
}

/// Says that a certificate is not renewed, once there is reason to worry.
fn unrenewed(bundle: &Bundle, why: &str) {
    if overdue_time_ns(bundle.renew_at_ns(), bundle.expire_time_ns) < wall_ns() {
        let until = show_time(bundle.expire_time_ns);
        eprintln!("afterimage: the certificate ends at {until} and is not renewed: {why}");
    }
}

fn wall_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn unusable(path: &Path, error: &BundleError) -> Failure {
    let failure = Failure::new(Kind::Refused, "identity", error.to_string());
    match error {
        BundleError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Failure::new(Kind::Refused, "identity", format!("there is no {}", path.display())).hint(
                "ask an admin for a token (afterimage token create NAME --role operator), then: afterimage join TOKEN; \
             or name the file: --identity FILE, AFTERIMAGE_IDENTITY",
            )
        }
        BundleError::Malformed { .. } => failure.hint("join again: afterimage join TOKEN"),
        _ => failure,
    }
}

/// What a connection that was not made means for the command.
pub fn unconnected(error: &ClientError) -> Failure {
    match error {
        ClientError::Connect { endpoint, detail } => unreached(endpoint, detail),
        ClientError::Refused(status) => Failure::answered("", status),
        ClientError::Endpoint { .. } | ClientError::Token(_) => Failure::usage(error.to_string()),
        _ => Failure::new(Kind::Failed, "", error.to_string()),
    }
}

/// A connection that failed: by its certificates, which trying again does not mend, or otherwise.
fn unreached(endpoint: &str, cause: &str) -> Failure {
    if cause.contains("certificate") || cause.contains("fatal alert") {
        return Failure::new(Kind::Refused, format!("coordinator {endpoint}"), cause).hint(
            "the identity and this coordinator do not know each other: check --identity and --coordinator, or join again",
        );
    }
    Failure::new(Kind::Unreachable, format!("coordinator {endpoint}"), format!("cannot be reached: {cause}"))
        .hint("check that it runs and that the address is right: --coordinator, AFTERIMAGE_COORDINATOR")
}

fn silent(endpoint: &str, limit: u64) -> Failure {
    let message = format!("did not answer within {}", show_duration(limit));
    Failure::new(Kind::Unreachable, format!("coordinator {endpoint}"), message)
        .hint("try again, or wait longer: --timeout 2m")
}

/// A message with names as the operator types them: `shop`, not `tenants/default/groups/shop`.
fn short(message: &str, tenant: &str) -> String {
    ["policies", "proxies", "groups", "operations", "plans"]
        .iter()
        .fold(message.to_owned(), |text, kind| text.replace(&format!("tenants/{tenant}/{kind}/"), ""))
}

/// The innermost cause, if the connection failed; nothing if the coordinator answered.
///
/// An answer of the coordinator has no source: those come from the transport below.
fn transport_cause(status: &Status) -> Option<String> {
    let mut cause: &dyn std::error::Error = std::error::Error::source(status)?;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    Some(cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_scheme_means_tls() {
        assert_eq!(endpoint("dr:7700"), "https://dr:7700");
        assert_eq!(endpoint("https://dr:7700"), "https://dr:7700");
    }

    #[test]
    fn a_wrong_certificate_is_a_refusal_and_no_network_trouble() {
        assert_eq!(unreached("https://x:1", "invalid peer certificate: UnknownIssuer").kind, Kind::Refused);
        assert_eq!(unreached("https://x:1", "received fatal alert: UnknownCA").kind, Kind::Refused);
        assert_eq!(unreached("https://x:1", "Connection refused (os error 111)").kind, Kind::Unreachable);
    }

    #[test]
    fn names_in_messages_are_as_they_are_typed() {
        let message = "tenants/default/proxies/dr is in use by tenants/default/groups/shop: delete that group first";
        assert_eq!(short(message, "default"), "dr is in use by shop: delete that group first");
    }

    #[test]
    fn a_missing_identity_says_how_to_get_one() {
        let path = Path::new("/nowhere/identity.json");
        let error = BundleError::Io { path: path.to_owned(), source: std::io::ErrorKind::NotFound.into() };
        let failure = unusable(path, &error);
        assert_eq!(failure.kind, Kind::Refused);
        assert!(failure.to_string().contains("/nowhere/identity.json") && failure.hint.contains("afterimage join"));
    }

    #[test]
    fn an_answer_is_told_from_a_broken_connection() {
        assert_eq!(transport_cause(&Status::unavailable("proxy src: not connected")), None);
        let broken = Status::from_error(Box::new(std::io::Error::other("reset")));
        assert_eq!(transport_cause(&broken).as_deref(), Some("reset"));
    }
}
