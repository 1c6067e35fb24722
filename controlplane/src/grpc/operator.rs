//! Policies, groups, proxies, points, views, failovers, operations: names are parsed and checked against the caller's
//! tenant here, everything else is the coordinator's.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{self, *};
use tonic::{Request, Response, Status};

use super::auth::{Scope, actor};
use crate::convert;
use crate::coordinator::{Coordinator, FailoverWanted};
use crate::names::{Kind, Name, check_id};
use crate::problem::Problem;

/// Longest wait for an operation, milliseconds.
const MAX_WAIT_MS: u64 = 600_000;
/// The wait if nothing is said, milliseconds.
const DEFAULT_WAIT_MS: u64 = 60_000;
/// Most operations in a list.
const MAX_OPERATIONS: usize = 1000;

type Answer<T> = Result<Response<T>, Status>;

/// The services for operators.
#[derive(Clone)]
pub struct Operator(pub Arc<Coordinator>);

fn required<'a, T>(field: &str, value: &'a Option<T>) -> Result<&'a T, Problem> {
    value.as_ref().ok_or_else(|| Problem::invalid(field, "nothing", "it must be set"))
}

fn ok<T>(value: T) -> Answer<T> {
    Ok(Response::new(value))
}

#[tonic::async_trait]
impl policies_server::Policies for Operator {
    async fn create_policy(&self, request: Request<CreatePolicyRequest>) -> Answer<v1::Policy> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let policy = required("policy", &r.policy)?;
        ok(self.0.create_policy(&tenant, &r.policy_id, policy, r.validate_only).await?)
    }

    async fn get_policy(&self, request: Request<GetPolicyRequest>) -> Answer<v1::Policy> {
        let name = Scope::of(&request)?.name("name", Kind::Policy, &request.get_ref().name)?;
        let model = self.0.model();
        ok(convert::policy_to_proto(&model, model.policy(&name)?))
    }

    async fn list_policies(&self, request: Request<ListPoliciesRequest>) -> Answer<ListPoliciesResponse> {
        let tenant = Scope::of(&request)?.tenant("parent", &request.get_ref().parent)?;
        let model = self.0.model();
        let own = model.policies.values().filter(|p| p.tenant == tenant);
        ok(ListPoliciesResponse { policies: own.map(|p| convert::policy_to_proto(&model, p)).collect() })
    }

    async fn update_policy(&self, request: Request<UpdatePolicyRequest>) -> Answer<v1::Policy> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let policy = required("policy", &r.policy)?;
        let name = scope.name("policy.name", Kind::Policy, &policy.name)?;
        ok(self.0.update_policy(&name, policy, r.validate_only).await?)
    }

    async fn delete_policy(&self, request: Request<DeletePolicyRequest>) -> Answer<DeletePolicyResponse> {
        let name = Scope::of(&request)?.name("name", Kind::Policy, &request.get_ref().name)?;
        self.0.delete_policy(&name, &request.get_ref().etag).await?;
        ok(DeletePolicyResponse {})
    }
}

#[tonic::async_trait]
impl groups_server::Groups for Operator {
    async fn create_group(&self, request: Request<CreateGroupRequest>) -> Answer<v1::Group> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        check_id("group_id", &r.group_id)?;
        let name = Name::new(tenant, Kind::Group, &r.group_id);
        let group = required("group", &r.group)?;
        ok(self.0.create_group(&name, group, r.validate_only, &r.request_id).await?)
    }

    async fn get_group(&self, request: Request<GetGroupRequest>) -> Answer<v1::Group> {
        let name = Scope::of(&request)?.name("name", Kind::Group, &request.get_ref().name)?;
        let model = self.0.model();
        ok(convert::group_to_proto(&model, model.group(&name)?))
    }

    async fn list_groups(&self, request: Request<ListGroupsRequest>) -> Answer<ListGroupsResponse> {
        let tenant = Scope::of(&request)?.tenant("parent", &request.get_ref().parent)?;
        let model = self.0.model();
        let own = model.groups.values().filter(|g| g.tenant == tenant);
        ok(ListGroupsResponse { groups: own.map(|g| convert::group_to_proto(&model, g)).collect() })
    }

    async fn update_group(&self, request: Request<UpdateGroupRequest>) -> Answer<v1::Group> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = required("group", &r.group)?;
        let name = scope.name("group.name", Kind::Group, &group.name)?;
        ok(self.0.update_group(&name, group, r.validate_only).await?)
    }

    async fn delete_group(&self, request: Request<DeleteGroupRequest>) -> Answer<DeleteGroupResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Group, &r.name)?;
        self.0.delete_group(&name, &r.etag, r.delete_points, r.force).await?;
        ok(DeleteGroupResponse {})
    }

    async fn create_disk(&self, request: Request<CreateDiskRequest>) -> Answer<v1::Disk> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        check_id("disk_id", &r.disk_id)?;
        let disk = required("disk", &r.disk)?;
        ok(self.0.create_disk(&group, &r.disk_id, disk, r.validate_only).await?)
    }

    async fn get_disk(&self, request: Request<GetDiskRequest>) -> Answer<v1::Disk> {
        let (name, id) = Scope::of(&request)?.child("name", "disks", &request.get_ref().name)?;
        let model = self.0.model();
        let group = model.group(&name)?;
        let disk = model.disks_of(group).find(|d| d.id == id);
        let disk = disk.ok_or_else(|| Problem::not_found("disk", &request.get_ref().name))?;
        ok(convert::disk_to_proto(group, disk))
    }

    async fn list_disks(&self, request: Request<ListDisksRequest>) -> Answer<ListDisksResponse> {
        let name = Scope::of(&request)?.name("parent", Kind::Group, &request.get_ref().parent)?;
        let model = self.0.model();
        let group = model.group(&name)?;
        ok(ListDisksResponse { disks: model.disks_of(group).map(|d| convert::disk_to_proto(group, d)).collect() })
    }

    async fn delete_disk(&self, request: Request<DeleteDiskRequest>) -> Answer<DeleteDiskResponse> {
        let (group, id) = Scope::of(&request)?.child("name", "disks", &request.get_ref().name)?;
        self.0.delete_disk(&group, &id).await?;
        ok(DeleteDiskResponse {})
    }

    async fn inspect_branch(&self, request: Request<InspectBranchRequest>) -> Answer<Branch> {
        let group = Scope::of(&request)?.name("group", Kind::Group, &request.get_ref().group)?;
        ok(self.0.inspect_branch(&group, &request.get_ref().export_to).await?)
    }
}

impl Operator {
    fn show_proxy(&self, name: &Name) -> Result<v1::Proxy, Problem> {
        self.0.look(|scene, since| {
            let proxy = scene.model.proxy(name)?;
            Ok(scene.proxy(proxy, self.0.sessions.desired_version(&proxy.uid), since))
        })
    }
}

#[tonic::async_trait]
impl proxies_server::Proxies for Operator {
    async fn get_proxy(&self, request: Request<GetProxyRequest>) -> Answer<v1::Proxy> {
        let name = Scope::of(&request)?.name("name", Kind::Proxy, &request.get_ref().name)?;
        ok(self.show_proxy(&name)?)
    }

    async fn list_proxies(&self, request: Request<ListProxiesRequest>) -> Answer<ListProxiesResponse> {
        let tenant = Scope::of(&request)?.tenant("parent", &request.get_ref().parent)?;
        ok(ListProxiesResponse { proxies: super::status::proxies(&self.0, &tenant) })
    }

    async fn delete_proxy(&self, request: Request<DeleteProxyRequest>) -> Answer<DeleteProxyResponse> {
        let name = Scope::of(&request)?.name("name", Kind::Proxy, &request.get_ref().name)?;
        self.0.delete_proxy(&name, &request.get_ref().etag).await?;
        ok(DeleteProxyResponse {})
    }
}

#[tonic::async_trait]
impl points_server::Points for Operator {
    async fn list_points(&self, request: Request<ListPointsRequest>) -> Answer<ListPointsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        ok(self.0.list_points(&group, r.from_seq, r.page_size, r.cuts_only).await?)
    }

    async fn resolve_point(&self, request: Request<ResolvePointRequest>) -> Answer<v1::Point> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        let choice = convert::choice_from_proto("at", r.at.as_ref())?;
        ok(self.0.resolve_point(&group, choice).await?)
    }

    async fn create_cut(&self, request: Request<CreateCutRequest>) -> Answer<v1::Point> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        ok(self.0.create_cut(&group, &r.label).await?)
    }
}

#[tonic::async_trait]
impl failovers_server::Failovers for Operator {
    async fn start_failover(&self, request: Request<StartFailoverRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let wanted = FailoverWanted {
            to: convert::choice_from_proto("to", r.to.as_ref())?,
            unconfirmed: r.unconfirmed,
            confirm_name: r.confirm_name,
            validate_only: r.validate_only,
            request_id: r.request_id,
            reason: r.reason,
            actor: actor(&scope.0),
        };
        ok(self.0.start_failover(&group, wanted).await?)
    }
}

#[tonic::async_trait]
impl operations_server::Operations for Operator {
    async fn get_operation(&self, request: Request<GetOperationRequest>) -> Answer<v1::Operation> {
        let name = Scope::of(&request)?.name("name", Kind::Operation, &request.get_ref().name)?;
        let model = self.0.model();
        ok(convert::operation_to_proto(&model, model.operation(&name)?))
    }

    async fn list_operations(&self, request: Request<ListOperationsRequest>) -> Answer<ListOperationsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let model = self.0.model();
        let wanted = |o: &&crate::objects::Operation| o.tenant == tenant && (!r.active_only || o.ended_ns == 0);
        let mut own: Vec<_> = model.operations.values().filter(wanted).collect();
        own.sort_by_key(|o| std::cmp::Reverse(o.created_ns));
        own.truncate(MAX_OPERATIONS);
        let operations = own.into_iter().map(|o| convert::operation_to_proto(&model, o)).collect();
        ok(ListOperationsResponse { operations })
    }

    async fn wait_operation(&self, request: Request<WaitOperationRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Operation, &r.name)?;
        let wait = match r.timeout_ms {
            0 => DEFAULT_WAIT_MS,
            1..=MAX_WAIT_MS => r.timeout_ms,
            more => return Err(Problem::invalid("timeout_ms", more, format!("0 to {MAX_WAIT_MS}")).into()),
        };
        ok(self.0.wait_operation(&name, Duration::from_millis(wait)).await?)
    }
}

#[tonic::async_trait]
impl views_server::Views for Operator {
    async fn create_view(&self, request: Request<CreateViewRequest>) -> Answer<v1::View> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        let view = required("view", &r.view)?;
        let choice = convert::choice_from_proto("at", r.at.as_ref())?;
        ok(self.0.create_view(&group, &r.view_id, view, choice, r.validate_only, &r.request_id).await?)
    }

    async fn get_view(&self, request: Request<GetViewRequest>) -> Answer<v1::View> {
        let (group, id) = Scope::of(&request)?.child("name", "views", &request.get_ref().name)?;
        let model = self.0.model();
        ok(convert::view_to_proto(&model, model.view(&group, &id)?))
    }

    async fn list_views(&self, request: Request<ListViewsRequest>) -> Answer<ListViewsResponse> {
        let scope = Scope::of(&request)?;
        let parent = request.into_inner().parent;
        let model = self.0.model();
        let views = match parent.strip_suffix("/groups/-") {
            Some(tenant) => {
                let tenant = scope.tenant("parent", tenant)?;
                model.views.values().filter(|v| v.tenant == tenant).map(|v| convert::view_to_proto(&model, v)).collect()
            }
            None => {
                let group = model.group(&scope.name("parent", Kind::Group, &parent)?)?;
                model.views_of(group).map(|v| convert::view_to_proto(&model, v)).collect()
            }
        };
        ok(ListViewsResponse { views })
    }

    async fn delete_view(&self, request: Request<DeleteViewRequest>) -> Answer<DeleteViewResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let (group, id) = scope.child("name", "views", &r.name)?;
        self.0.delete_view(&group, &id, r.keep_delta, r.force).await?;
        ok(DeleteViewResponse {})
    }
}
