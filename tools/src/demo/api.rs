//! The demo as a client of the coordinator: the same calls that an operator's tool makes.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use afterimage_wire::v1;
use tonic::transport::Channel;

const PARENT: &str = "tenants/default";
const POLICY: &str = "tenants/default/policies/demo";

/// A connection as administrator.
pub struct Api {
    channel: Channel,
}

fn refused(status: tonic::Status) -> io::Error {
    io::Error::other(format!("the coordinator answers {:?}: {}", status.code(), status.message()))
}

impl Api {
    /// Connects with the administrator's identity; tries until the coordinator answers, at most 20 s.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn connect(identity: &Path) -> io::Result<Self> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let attempt = async {
                let bundle = Bundle::load(identity).map_err(io::Error::other)?;
                client::connect(&bundle).await.map_err(io::Error::other)
            };
            match attempt.await {
                Ok(channel) => return Ok(Self { channel }),
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// For calls of other kinds.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A token with which the proxy `name` joins.
    pub async fn join_token(&mut self, name: &str) -> io::Result<String> {
        let request = v1::CreateJoinTokenRequest {
            parent: PARENT.into(),
            role: v1::Role::Proxy.into(),
            name: name.into(),
            ttl_s: 600,
            ..Default::default()
        };
        let mut enrolment = v1::enrolment_client::EnrolmentClient::new(self.channel.clone());
        Ok(enrolment.create_join_token(request).await.map_err(refused)?.into_inner().token)
    }

    /// Proxies with an open session.
    pub async fn connected_proxies(&mut self) -> io::Result<usize> {
        let mut proxies = v1::proxies_client::ProxiesClient::new(self.channel.clone());
        let list = proxies
            .list_proxies(v1::ListProxiesRequest { parent: PARENT.into(), ..Default::default() })
            .await
            .map_err(refused)?;
        Ok(list.into_inner().proxies.iter().filter(|p| p.connected).count())
    }

    /// Creates the policy and the group.
    pub async fn protect(&mut self, group: &str, disks: &[(&str, &Path)]) -> io::Result<()> {
        let policy = v1::Policy { cut_interval_ms: Some(500), retention_s: Some(3600), ..Default::default() };
        let request = v1::CreatePolicyRequest {
            parent: PARENT.into(),
            policy_id: "demo".into(),
            policy: Some(policy),
            ..Default::default()
        };
        let mut policies = v1::policies_client::PoliciesClient::new(self.channel.clone());
        policies.create_policy(request).await.map_err(refused)?;
        let disks = disks
            .iter()
            .map(|(name, path)| v1::Disk {
                name: format!("{group}/disks/{name}"),
                path: path.display().to_string(),
                ..Default::default()
            })
            .collect();
        let request = v1::CreateGroupRequest {
            parent: PARENT.into(),
            group_id: group.rsplit('/').next().unwrap_or(group).into(),
            group: Some(v1::Group {
                policy: POLICY.into(),
                source: format!("{PARENT}/proxies/source"),
                target: format!("{PARENT}/proxies/target"),
                disks,
                ..Default::default()
            }),
            validate_only: false,
            request_id: String::new(),
        };
        let mut groups = v1::groups_client::GroupsClient::new(self.channel.clone());
        groups.create_group(request).await.map_err(refused).map(drop)
    }

    /// The group as it is now.
    pub async fn group_status(&mut self, group: &str) -> io::Result<v1::GroupStatus> {
        let mut status = v1::status_client::StatusClient::new(self.channel.clone());
        let snapshot = status.get_status(v1::GetStatusRequest { parent: group.into() }).await.map_err(refused)?;
        let mut groups = snapshot.into_inner().groups;
        groups.pop().ok_or_else(|| io::Error::other(format!("the coordinator does not know {group}")))
    }

    /// Fails over to the newest durable write; the source is gone and cannot confirm.
    pub async fn failover(&mut self, group: &str, id: &str) -> io::Result<v1::Operation> {
        let request = v1::StartFailoverRequest {
            group: group.into(),
            to: Some(v1::PointChoice { at: Some(v1::point_choice::At::Latest(true)) }),
            unconfirmed: true,
            confirm_name: id.into(),
            reason: "demo: the source site is lost".into(),
            ..Default::default()
        };
        let operation = self.failovers().start_failover(request).await.map_err(refused)?.into_inner();
        self.done(operation, 30).await
    }

    fn failovers(&self) -> v1::failovers_client::FailoversClient<Channel> {
        v1::failovers_client::FailoversClient::new(self.channel.clone())
    }

    /// Waits until an operation is done.
    async fn done(&mut self, begun: v1::Operation, within_s: u64) -> io::Result<v1::Operation> {
        let mut operations = v1::operations_client::OperationsClient::new(self.channel.clone());
        let end = Instant::now() + Duration::from_secs(within_s);
        loop {
            let wait = v1::WaitOperationRequest { name: begun.name.clone(), timeout_ms: 30_000 };
            let operation = operations.wait_operation(wait).await.map_err(refused)?.into_inner();
            let verb = &operation.verb;
            match operation.error.as_ref() {
                None if operation.state() == v1::OperationState::Done => return Ok(operation),
                None if Instant::now() < end => {}
                None => {
                    let state = operation.state();
                    return Err(io::Error::other(format!("{verb} is still {state:?} after {within_s} s")));
                }
                Some(e) => {
                    let (step, message, remedy) = (&e.step, &e.message, &e.remedy);
                    return Err(io::Error::other(format!("{verb}, step {step}: {message} ({remedy})")));
                }
            }
        }
    }

    /// Protects what is written to the view back to the source.
    pub async fn failback(&mut self, group: &str) -> io::Result<v1::Operation> {
        let request = v1::StartFailbackRequest { group: group.into(), ..Default::default() };
        let operation = self.failovers().start_failback(request).await.map_err(refused)?.into_inner();
        self.done(operation, 60).await
    }

    /// How far the failback is.
    pub async fn reverse(&mut self, group: &str) -> io::Result<v1::ReverseStatus> {
        let status = self.group_status(group).await?;
        status.reverse.ok_or_else(|| io::Error::other(format!("{group} is not failing back: {:?}", status.phase)))
    }

    /// The group runs at its source again.
    pub async fn switch(&mut self, group: &str) -> io::Result<v1::Operation> {
        let request = v1::SwitchFailbackRequest { group: group.into(), ..Default::default() };
        let operation = self.failovers().switch_failback(request).await.map_err(refused)?.into_inner();
        self.done(operation, 120).await
    }

    /// Whether the failback can be committed now.
    pub async fn can_commit(&mut self, group: &str) -> bool {
        let request = v1::CommitFailbackRequest { group: group.into(), validate_only: true, ..Default::default() };
        self.failovers().commit_failback(request).await.is_ok()
    }

    /// It stays there.
    pub async fn commit(&mut self, group: &str) -> io::Result<v1::Operation> {
        let request = v1::CommitFailbackRequest { group: group.into(), ..Default::default() };
        let operation = self.failovers().commit_failback(request).await.map_err(refused)?.into_inner();
        self.done(operation, 30).await
    }

    /// The cuts that are held, oldest first.
    pub async fn cuts(&mut self, group: &str) -> io::Result<Vec<v1::Point>> {
        let request = v1::ListPointsRequest {
            parent: group.into(),
            from_seq: 0,
            page_size: 1000,
            cuts_only: true,
            ..Default::default()
        };
        let mut points = v1::points_client::PointsClient::new(self.channel.clone());
        Ok(points.list_points(request).await.map_err(refused)?.into_inner().points)
    }

    /// Opens a point read-only.
    pub async fn open_view(&mut self, group: &str, id: &str, at: v1::point_choice::At) -> io::Result<v1::View> {
        let request = v1::CreateViewRequest {
            parent: group.into(),
            view_id: id.into(),
            view: Some(v1::View { reason: "demo".into(), ..Default::default() }),
            at: Some(v1::PointChoice { at: Some(at) }),
            ..Default::default()
        };
        let mut views = v1::views_client::ViewsClient::new(self.channel.clone());
        Ok(views.create_view(request).await.map_err(refused)?.into_inner())
    }

    /// Closes a view.
    pub async fn close_view(&mut self, name: &str) -> io::Result<()> {
        let request = v1::DeleteViewRequest { name: name.into(), ..Default::default() };
        let mut views = v1::views_client::ViewsClient::new(self.channel.clone());
        views.delete_view(request).await.map_err(refused).map(drop)
    }
}
