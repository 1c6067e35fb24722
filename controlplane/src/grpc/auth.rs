//! Who may call what: one table, denied unless it is in there. Runs before any message is read.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tonic::body::Body;
use tonic::codegen::http::{HeaderValue, Request, Response};
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Extensions, Status};
use tower::{Layer, Service};

use super::deadline;
use super::rate::Limits;
use crate::audit::{CALLER, Caller};
use crate::ca::{GRACE, Identity, Role, identify};
use crate::certificates::Certificate;
use crate::coordinator::Coordinator;
use crate::names::{self, Kind, Name};
use crate::problem::Problem;
use crate::text;

/// Header of each answer: the coordinator's wall clock, nanoseconds since the Unix epoch, so that whoever has a certificate
/// can see how far its own is from it.
pub const TIME_HEADER: &str = "afterimage-time-ns";

/// In answers to who should renew the certificate now: its authority is being replaced.
pub const RENEW_HEADER: &str = "afterimage-renew";
/// What keeps a proxy and its coordinator together.
const SESSION: &str = "/afterimage.v1.ProxyControl/Session";

/// What a method takes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Needs {
    /// Nothing: the one way in without a certificate.
    Nothing,
    /// Any certificate of ours.
    Certificate,
    /// A proxy's.
    Proxy,
    /// A viewer's or more.
    Viewer,
    /// An operator's or more.
    Operator,
    /// An admin's.
    Admin,
}

/// The table: method by its path. Nothing for what is not in it.
pub fn needs(path: &str) -> Option<Needs> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let Some(service) = service.strip_prefix("afterimage.v1.") else {
        // Health and reflection tell nothing of anybody's, but are for those who belong here.
        let known = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"];
        return known.contains(&service).then_some(Needs::Certificate);
    };
    Some(match (service, method) {
        ("Enrolment", "Join") => Needs::Nothing,
        ("Enrolment", "Renew") => Needs::Certificate,
        ("Enrolment", "CreateJoinToken") | ("Proxies", "DeleteProxy") => Needs::Admin,
        ("Audit", "ListAuditRecords" | "VerifyAudit") => Needs::Admin,
        ("Backups", "CreateBackup" | "ConfirmRestore") => Needs::Admin,
        ("Backups", "GetRestore") | ("Certificates", "ListCertificates" | "GetAuthorities") => Needs::Viewer,
        ("Certificates", "RevokeCertificates" | "RotateAuthority") => Needs::Admin,
        ("Keys", "GetKeys") => Needs::Viewer,
        ("Keys", "RotateKey" | "RewrapKeys" | "MakeRecoveryKey") => Needs::Admin,
        ("ProxyControl", "Session") => Needs::Proxy,
        ("Policies", "GetPolicy" | "ListPolicies")
        | ("Groups", "GetGroup" | "ListGroups" | "GetDisk" | "ListDisks" | "ExplainPlacement")
        | ("Proxies", "GetProxy" | "ListProxies")
        | ("Points", "ListPoints" | "ResolvePoint")
        | ("Operations", "GetOperation" | "ListOperations" | "WaitOperation")
        | ("Views", "GetView" | "ListViews")
        | ("Machines", "GetMachine" | "ListMachines" | "ProbeMachine")
        | ("Plans", "GetPlan" | "ListPlans" | "ListPlanRuns" | "EstimatePlan")
        | ("Status", "GetStatus" | "GetRpo" | "Watch" | "ListEvents") => Needs::Viewer,
        ("Policies", "CreatePolicy" | "UpdatePolicy" | "DeletePolicy")
        | ("Groups", "CreateGroup" | "UpdateGroup" | "DeleteGroup" | "CreateDisk" | "DeleteDisk" | "InspectBranch")
        | ("Groups", "PauseGroup" | "ResumeGroup")
        | ("Points", "CreateCut")
        | ("Failovers", "StartFailover" | "StartPlannedFailover" | "UndoFailover" | "ChangePoint" | "TestFailover")
        | ("Failovers", "StartFailback" | "CancelFailback" | "SwitchFailback" | "CommitFailback" | "UndoFailback")
        | ("Operations", "CancelOperation" | "DeleteOperation")
        | ("Machines", "CreateMachine" | "UpdateMachine" | "DeleteMachine")
        | ("Plans", "CreatePlan" | "UpdatePlan" | "DeletePlan")
        | ("Plans", "RunPlan" | "TestPlan" | "UndoPlan" | "StopPlan" | "ResumePlan")
        | ("Views", "CreateView" | "DeleteView") => Needs::Operator,
        _ => return None,
    })
}

/// Whether a caller may, by role alone.
pub fn allows(needs: Needs, role: Option<Role>) -> bool {
    match (needs, role) {
        (Needs::Nothing, _) | (Needs::Certificate, Some(_)) | (Needs::Proxy, Some(Role::Proxy)) => true,
        (Needs::Viewer, Some(role)) => matches!(role, Role::Viewer | Role::Operator | Role::Admin),
        (Needs::Operator, Some(role)) => matches!(role, Role::Operator | Role::Admin),
        (Needs::Admin, Some(role)) => role == Role::Admin,
        _ => false,
    }
}

fn check(path: &str, who: Option<&Identity>) -> Result<(), Problem> {
    let known = needs(path);
    if known.is_some_and(|n| allows(n, who.map(|w| w.role))) {
        return Ok(());
    }
    let needs = match known {
        Some(Needs::Nothing | Needs::Certificate) => "a certificate of this coordinator",
        Some(Needs::Proxy) => "a proxy's certificate",
        Some(Needs::Viewer) => "the role viewer, operator or admin",
        Some(Needs::Operator) => "the role operator or admin",
        Some(Needs::Admin) => "the role admin",
        None => "there is no such method",
    };
    let method: String = path.trim_start_matches('/').chars().take(100).collect();
    Err(match who {
        None => Problem::Anonymous { method, needs: needs.into() },
        Some(_) if known.is_none() => Problem::NoMethod { method },
        Some(who) => Problem::Denied { who: actor(who), method, needs: needs.into() },
    })
}

/// Whether the caller's certificate is still good. One that has ended is, for a while, to have it renewed: if it is a
/// proxy's, whose key the coordinator knows.
fn good(who: &Identity, path: &str, now_ns: u64, known: Option<&Certificate>) -> Result<(), Problem> {
    if let Some(revoked) = known.and_then(|c| c.revoked.as_ref()) {
        return Err(Problem::Certificate {
            who: actor(who),
            state: format!("was revoked at {}", text::time(revoked.at_ns)),
            remedy: "an admin has to let its holder join anew".to_owned(),
            reason: "CERTIFICATE_REVOKED",
        });
    }
    if now_ns <= who.expire_time_ns {
        return Ok(());
    }
    let late = Duration::from_nanos(now_ns - who.expire_time_ns);
    if who.role == Role::Proxy && path == "/afterimage.v1.Enrolment/Renew" && late <= GRACE {
        return Ok(());
    }
    Err(Problem::Certificate {
        who: actor(who),
        state: format!("ended at {}", text::time(who.expire_time_ns)),
        remedy: "join again; an admin makes the token (afterimage token create)".to_owned(),
        reason: "CERTIFICATE_EXPIRED",
    })
}

fn wall_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// "role/name".
pub fn actor(who: &Identity) -> String {
    format!("{}/{}", who.role.as_str(), who.name)
}

fn caller_of(who: &Identity, path: &str) -> Caller {
    caller_named(&who.tenant, &actor(who), path)
}

fn caller_named(tenant: &str, actor: &str, path: &str) -> Caller {
    let method: String = path.trim_start_matches('/').trim_start_matches("afterimage.v1.").chars().take(100).collect();
    Caller::new(tenant, actor, &method)
}

/// The caller of a method that needs a certificate.
///
/// # Errors
/// There is none: the table was not asked.
pub fn caller(extensions: &Extensions) -> Result<Identity, Status> {
    extensions.get::<Identity>().cloned().ok_or_else(|| Status::unauthenticated("a certificate is needed"))
}

/// What a caller may name: what is under its own tenant.
pub struct Scope(pub Identity);

impl Scope {
    /// Of a request.
    ///
    /// # Errors
    /// No certificate.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        caller(request.extensions()).map(Self)
    }

    fn own(&self, field: &str, tenant: &str, value: &str) -> Result<(), Problem> {
        if tenant == self.0.tenant {
            return Ok(());
        }
        // As if there were nothing: another tenant's names are not to be found out.
        Err(Problem::invalid(field, value, format!("under \"tenants/{}\"", self.0.tenant)))
    }

    /// A tenant's name.
    ///
    /// # Errors
    /// Malformed, or another tenant's.
    pub fn tenant(&self, field: &str, value: &str) -> Result<String, Problem> {
        let tenant = names::parse_tenant(field, value)?;
        self.own(field, &tenant, value)?;
        Ok(tenant)
    }

    /// The name of a policy, group, proxy, operation, machine or plan.
    ///
    /// # Errors
    /// Malformed, or another tenant's.
    pub fn name(&self, field: &str, kind: Kind, value: &str) -> Result<Name, Problem> {
        let name = Name::parse(field, kind, value)?;
        self.own(field, &name.tenant, value)?;
        Ok(name)
    }

    /// The name of something under a group.
    ///
    /// # Errors
    /// Malformed, or another tenant's.
    pub fn child(&self, field: &str, collection: &str, value: &str) -> Result<(Name, String), Problem> {
        let (group, id) = names::parse_child(field, collection, value)?;
        self.own(field, &group.tenant, value)?;
        Ok((group, id))
    }
}

/// Puts [`Authorised`] around the services.
#[derive(Clone, Default)]
pub struct AuthLayer {
    /// Who keeps the audit log; none: nobody does.
    coordinator: Option<Arc<Coordinator>>,
    /// How many calls each caller has; none: any number.
    limits: Option<Arc<Limits>>,
}

impl AuthLayer {
    /// For a coordinator's services.
    pub fn of(coordinator: Arc<Coordinator>, limits: Arc<Limits>) -> Self {
        Self { coordinator: Some(coordinator), limits: Some(limits) }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Authorised<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Authorised { inner, coordinator: self.coordinator.clone(), limits: self.limits.clone() }
    }
}

/// Lets a call through only if the table allows it; hands the caller's identity on.
#[derive(Clone)]
pub struct Authorised<S> {
    inner: S,
    coordinator: Option<Arc<Coordinator>>,
    limits: Option<Arc<Limits>>,
}

impl<S> Authorised<S> {
    /// Takes one call from what the caller has, before anything else is done for it: a refusal costs an entry of the audit
    /// log. A proxy's session is never refused.
    fn within_rate(&self, request: &Request<Body>, who: Option<&Identity>) -> Result<(), Problem> {
        let session = request.uri().path() == SESSION && who.is_some_and(|who| who.role == Role::Proxy);
        let Some(limits) = self.limits.as_ref().filter(|_| !session) else { return Ok(()) };
        let from = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        let address = from.and_then(|tls| tls.get_ref().remote_addr()).map(|address| address.ip());
        limits.take(who, address).map_err(|wait| {
            let who = who.map_or_else(|| "a caller without a certificate".to_owned(), actor);
            let problem = Problem::TooFast { who, per_s: wait.rate.per_s, burst: wait.rate.burst, after: wait.after };
            if wait.first {
                tracing::warn!(%problem, "refused, and not said again before it has made a pause");
            }
            problem
        })
    }
}

impl<S> Service<Request<Body>> for Authorised<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let certificates =
            request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>().and_then(|tls| tls.peer_certs());
        let who = certificates.as_deref().and_then(|all| all.first()).and_then(|leaf| identify(leaf));
        if let Err(problem) = self.within_rate(&request, who.as_ref()) {
            let response = Status::from(problem).into_http();
            return Box::pin(async move { Ok(response) });
        }
        let path = request.uri().path();
        let checked = who.as_ref().map_or(Ok(()), |who| {
            let model = self.coordinator.as_ref().map(|c| c.model());
            let known = model.as_ref().and_then(|m| m.certificate(&who.tenant, &who.serial));
            // A connection that was made before its authority was given up is still open for a moment.
            if let Some(coordinator) = self.coordinator.as_ref().filter(|c| !c.trust().trusts(&who.issuer)) {
                return Err(Problem::Certificate {
                    who: actor(who),
                    state: format!(
                        "is of authority {}; {} is trusted now",
                        who.issuer,
                        coordinator.trust().issuing.id()
                    ),
                    remedy: "join again; an admin makes the token (afterimage token create)".to_owned(),
                    reason: "CERTIFICATE_AUTHORITY",
                });
            }
            good(who, path, wall_ns(), known.map(AsRef::as_ref))
        });
        if let Err(problem) = checked.and_then(|()| check(path, who.as_ref())) {
            tracing::warn!(%problem, "denied");
            // Who comes again and again with a certificate that is not good is recorded once a minute.
            let news = |who: &Identity, coordinator: &Coordinator| {
                !matches!(problem, Problem::Certificate { .. }) || coordinator.is_news(&who.serial)
            };
            if let (Some(who), Some(coordinator)) = (&who, &self.coordinator)
                && news(who, coordinator)
            {
                let (coordinator, caller) = (coordinator.clone(), caller_of(who, request.uri().path()));
                let what = format!("denied: {problem}");
                // The answer does not wait for the log: nothing is done.
                tokio::spawn(CALLER.scope(caller, async move { coordinator.record_denial(what).await }));
            }
            let response = Status::from(problem).into_http();
            return Box::pin(async move { Ok(response) });
        }
        let caller = who.as_ref().map(|who| caller_of(who, request.uri().path()));
        let mut renew = false;
        if let Some(who) = who {
            renew = self.coordinator.as_ref().is_some_and(|c| c.trust().issuing.id() != who.issuer);
            if let Some(coordinator) = &self.coordinator {
                coordinator.note_certificate(&who);
            }
            request.extensions_mut().insert(who);
        }
        let within = deadline::of(request.headers());
        // By its token only: what it joins as is in the record.
        let nobody = || Caller { actor: "nobody".to_owned(), ..caller_named("", "", "/Enrolment/Join") };
        let call = CALLER.scope(caller.unwrap_or_else(nobody), self.inner.call(request));
        let clock = self.coordinator.clone();
        Box::pin(async move {
            let late = || Status::deadline_exceeded("the call has taken longer than it may").into_http();
            let mut answer = tokio::time::timeout(within, call).await.unwrap_or_else(|_| Ok(late()))?;
            if let Some(coordinator) = clock {
                answer.headers_mut().insert(TIME_HEADER, coordinator.clock.wall_ns().into());
            }
            if renew {
                answer.headers_mut().insert(RENEW_HEADER, HeaderValue::from_static("authority"));
            }
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::super::rate::Rate;
    use super::*;

    /// Every method of our services, from the descriptors that clients see.
    fn methods() -> Vec<String> {
        let set = tonic_types_descriptors();
        assert!(set.len() > 20, "{set:?}");
        set
    }

    /// Reads service and method names out of the descriptor set: field 1 (file) → 2 (package), 6 (service) → 1 (name),
    /// 2 (method) → 1 (name).
    fn tonic_types_descriptors() -> Vec<String> {
        fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
            let varint = |bytes: &mut &[u8]| {
                let (mut value, mut shift) = (0u64, 0);
                loop {
                    let byte = bytes[0];
                    *bytes = &bytes[1..];
                    value |= u64::from(byte & 0x7f) << shift;
                    if byte < 0x80 {
                        return value;
                    }
                    shift += 7;
                }
            };
            let mut out = Vec::new();
            while !bytes.is_empty() {
                let tag = varint(&mut bytes);
                match tag & 7 {
                    0 => drop(varint(&mut bytes)),
                    2 => {
                        let length = varint(&mut bytes) as usize;
                        out.push((tag >> 3, &bytes[..length]));
                        bytes = &bytes[length..];
                    }
                    other => panic!("wire type {other}"),
                }
            }
            out
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let mut all = Vec::new();
        for (_, file) in fields(afterimage_wire::v1::DESCRIPTORS) {
            for (_, service) in fields(file).into_iter().filter(|(n, _)| *n == 6) {
                let parts = fields(service);
                let name = text(parts.iter().find(|(n, _)| *n == 1).unwrap().1);
                for (_, method) in parts.iter().filter(|(n, _)| *n == 2) {
                    let method = text(fields(method).iter().find(|(n, _)| *n == 1).unwrap().1);
                    all.push(format!("/afterimage.v1.{name}/{method}"));
                }
            }
        }
        all
    }

    #[test]
    fn every_method_is_in_the_table() {
        for method in methods() {
            assert!(needs(&method).is_some(), "{method} is denied to everybody");
        }
    }

    #[test]
    fn only_join_is_open() {
        let open: Vec<String> = methods().into_iter().filter(|m| allows(needs(m).unwrap(), None)).collect();
        assert_eq!(open, ["/afterimage.v1.Enrolment/Join"]);
    }

    #[test]
    fn what_is_unknown_is_denied() {
        for path in ["", "/", "/x", "/afterimage.v1.Policies/Nuke", "/afterimage.v2.Policies/GetPolicy", "//Join"] {
            assert!(check(path, None).is_err(), "{path}");
            assert_eq!(needs(path), None);
        }
    }

    /// Who may call what, written down a second time: method by method, and for each role and for nobody. A method that is
    /// not in here fails the test, so whoever adds one has to say who may call it.
    #[test]
    fn every_method_is_for_the_roles_that_are_named_here() {
        const READ: &[Role] = &[Role::Viewer, Role::Operator, Role::Admin];
        const CHANGE: &[Role] = &[Role::Operator, Role::Admin];
        const EVERYBODY: &[Role] = &[Role::Proxy, Role::Viewer, Role::Operator, Role::Admin];
        let expected: &[(&str, &[Role], &str)] = &[
            ("Policies", READ, "GetPolicy ListPolicies"),
            ("Policies", CHANGE, "CreatePolicy UpdatePolicy DeletePolicy"),
            ("Groups", READ, "GetGroup ListGroups GetDisk ListDisks ExplainPlacement"),
            ("Groups", CHANGE, "CreateGroup UpdateGroup DeleteGroup CreateDisk DeleteDisk InspectBranch"),
            ("Groups", CHANGE, "PauseGroup ResumeGroup"),
            ("Proxies", READ, "GetProxy ListProxies"),
            ("Proxies", &[Role::Admin], "DeleteProxy"),
            ("Points", READ, "ListPoints ResolvePoint"),
            ("Points", CHANGE, "CreateCut"),
            ("Failovers", CHANGE, "StartFailover StartPlannedFailover UndoFailover ChangePoint TestFailover"),
            ("Failovers", CHANGE, "StartFailback CancelFailback SwitchFailback CommitFailback UndoFailback"),
            ("Operations", READ, "GetOperation ListOperations WaitOperation"),
            ("Operations", CHANGE, "CancelOperation DeleteOperation"),
            ("Views", READ, "GetView ListViews"),
            ("Views", CHANGE, "CreateView DeleteView"),
            ("Machines", READ, "GetMachine ListMachines ProbeMachine"),
            ("Machines", CHANGE, "CreateMachine UpdateMachine DeleteMachine"),
            ("Plans", READ, "GetPlan ListPlans ListPlanRuns EstimatePlan"),
            ("Plans", CHANGE, "CreatePlan UpdatePlan DeletePlan"),
            ("Plans", CHANGE, "RunPlan TestPlan UndoPlan StopPlan ResumePlan"),
            ("Status", READ, "GetStatus GetRpo Watch ListEvents"),
            ("Audit", &[Role::Admin], "ListAuditRecords VerifyAudit"),
            ("Enrolment", &[Role::Admin], "CreateJoinToken"),
            ("Enrolment", EVERYBODY, "Join Renew"),
            ("Backups", &[Role::Admin], "CreateBackup ConfirmRestore"),
            ("Backups", READ, "GetRestore"),
            ("Certificates", READ, "ListCertificates GetAuthorities"),
            ("Certificates", &[Role::Admin], "RevokeCertificates RotateAuthority"),
            ("Keys", READ, "GetKeys"),
            ("Keys", &[Role::Admin], "RotateKey RewrapKeys MakeRecoveryKey"),
            ("ProxyControl", &[Role::Proxy], "Session"),
        ];
        let mut left = methods();
        for (service, roles, names) in expected {
            for name in names.split(' ') {
                let method = format!("/afterimage.v1.{service}/{name}");
                let needs = needs(&method).unwrap_or_else(|| panic!("{method} is denied to everybody"));
                for role in EVERYBODY {
                    assert_eq!(allows(needs, Some(*role)), roles.contains(role), "{method} for {role:?}");
                }
                assert_eq!(allows(needs, None), name == "Join", "{method} for nobody");
                let before = left.len();
                left.retain(|m| *m != method);
                assert_eq!(left.len() + 1, before, "{method} is no method of the API");
            }
        }
        assert!(left.is_empty(), "nobody has said who may call {left:?}");
    }

    #[test]
    fn a_proxy_may_only_be_a_proxy() {
        let allowed: Vec<String> =
            methods().into_iter().filter(|m| allows(needs(m).unwrap(), Some(Role::Proxy))).collect();
        let expected =
            ["Enrolment/Join", "Enrolment/Renew", "ProxyControl/Session"].map(|m| format!("/afterimage.v1.{m}"));
        assert_eq!(allowed.len(), 3);
        assert!(expected.iter().all(|m| allowed.contains(m)));
    }

    fn identity() -> Identity {
        Identity {
            tenant: "default".to_owned(),
            role: Role::Viewer,
            name: "somebody".to_owned(),
            uid: String::new(),
            pin: [0; 32],
            serial: String::new(),
            issuer: String::new(),
            issue_time_ns: 0,
            expire_time_ns: u64::MAX,
        }
    }

    /// Takes every call and answers none.
    #[derive(Clone)]
    struct Mute;

    impl Service<Request<Body>> for Mute {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_at_its_deadline() {
        let call = |timeout: Option<&str>| {
            let mut request = Request::new(Body::empty());
            *request.uri_mut() = "/afterimage.v1.Enrolment/Join".parse().unwrap();
            if let Some(timeout) = timeout {
                request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
            }
            AuthLayer::default().layer(Mute).call(request)
        };
        for (timeout, least) in [(Some("300m"), 0.29), (Some("90S"), 89.0), (None, 600.0), (Some("99H"), 600.0)] {
            let begun = tokio::time::Instant::now();
            let answer = call(timeout).await.unwrap();
            let code = answer.headers()["grpc-status"].to_str().unwrap();
            assert_eq!(code, (tonic::Code::DeadlineExceeded as i32).to_string());
            assert!(begun.elapsed().as_secs_f64() >= least, "{timeout:?}");
            assert!(begun.elapsed() <= deadline::CALL_WITHIN + std::time::Duration::from_secs(1));
        }
    }

    #[test]
    fn what_has_ended_is_for_nothing_but_a_proxys_renewal() {
        let who = |role| Identity {
            tenant: "default".into(),
            role,
            name: "a".into(),
            uid: String::new(),
            pin: [0; 32],
            serial: "1".into(),
            issuer: "ca".into(),
            issue_time_ns: 0,
            expire_time_ns: 1_000,
        };
        let grace = GRACE.as_nanos() as u64;
        for method in methods() {
            for role in [Role::Proxy, Role::Viewer, Role::Operator, Role::Admin] {
                assert!(good(&who(role), &method, 1_000, None).is_ok());
                let renews = role == Role::Proxy && method.ends_with("/Renew");
                for (late, taken) in [(1, renews), (grace, renews), (grace + 1, false)] {
                    assert_eq!(
                        good(&who(role), &method, 1_000 + late, None).is_ok(),
                        taken,
                        "{method} {role:?} {late}"
                    );
                }
            }
        }
        let text =
            good(&who(Role::Operator), "/afterimage.v1.Policies/GetPolicy", u64::MAX, None).unwrap_err().to_string();
        assert!(text.contains("operator/a ended at 1970-01-01T00:00:00Z"), "{text}");
    }

    #[test]
    fn who_calls_without_end_is_told_when_to_come_back() {
        let limits = Arc::new(Limits::new(Rate { per_s: 20, burst: 100 }));
        let service = AuthLayer { coordinator: None, limits: Some(limits) }.layer(Mute);
        let call = |path: &str, role: Option<Role>| {
            let mut request = Request::new(Body::empty());
            *request.uri_mut() = path.parse().unwrap();
            let who = role.map(|role| Identity { role, ..identity() });
            service.within_rate(&request, who.as_ref()).map_err(Status::from)
        };
        // A tenth of both for who has no certificate.
        let join = "/afterimage.v1.Enrolment/Join";
        let refused: Vec<_> = (0..20).filter_map(|_| call(join, None).err()).collect();
        // Tokens come back while the test runs.
        assert!((8..=10).contains(&refused.len()), "{}", refused.len());
        assert_eq!(refused[0].code(), tonic::Code::ResourceExhausted);
        let after = refused[0].get_details_retry_info().unwrap().retry_delay.unwrap();
        assert!(after.as_millis() > 0 && after.as_millis() <= 500, "{after:?}");
        assert!(refused[0].message().contains("2 a second"), "{}", refused[0].message());
        // A proxy's session never is, however often; another method of it is.
        assert!((0..1000).all(|_| call(SESSION, Some(Role::Proxy)).is_ok()));
        let renewals = (0..1000).filter(|_| call("/afterimage.v1.Enrolment/Renew", Some(Role::Proxy)).is_ok()).count();
        assert!((100..120).contains(&renewals), "{renewals}");
        assert!((0..1000).filter(|_| call(SESSION, Some(Role::Operator)).is_ok()).count() < 120, "it is a proxy's");
    }

    #[test]
    fn a_viewer_changes_nothing() {
        for method in methods().iter().filter(|m| allows(needs(m).unwrap(), Some(Role::Viewer))) {
            let verb = method.rsplit('/').next().unwrap();
            let reads = ["Get", "List", "Wait", "Watch", "Resolve", "Explain", "Probe", "Estimate", "Join", "Renew"];
            let reads = reads.iter().any(|v| verb.starts_with(v));
            assert!(reads, "{method}");
        }
    }
}
