//! Policies, groups, proxies, points, views, failovers, operations: names are parsed and checked against the caller's
//! tenant here, everything else is the coordinator's.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{self, *};
use tonic::{Request, Response, Status};

use super::auth::{Scope, actor};
use crate::convert;
use crate::coordinator::{Asking, Coordinator, Flow, RunFrom, Trial};
use crate::failover::{Choice, Spec, Verb};
use crate::names::{Kind, Name, check_id};
use crate::paging::Page;
use crate::problem::Problem;
use crate::requests::Asked;

/// Longest wait for an operation, milliseconds.
const MAX_WAIT_MS: u64 = 600_000;
/// The wait if nothing is said, milliseconds.
const DEFAULT_WAIT_MS: u64 = 60_000;
/// How long each wait of a planned failover may take if nothing is said, milliseconds.
const PLANNED_WITHIN_MS: u64 = 60_000;

/// Longest that a test is left running, milliseconds.
const MAX_HOLD_MS: u64 = 86_400_000;

type Answer<T> = Result<Response<T>, Status>;

/// The services for operators.
#[derive(Clone)]
pub struct Operator(pub Arc<Coordinator>);

fn required<'a, T>(field: &str, value: &'a Option<T>) -> Result<&'a T, Problem> {
    value.as_ref().ok_or_else(|| Problem::invalid(field, "nothing", "it must be set"))
}

/// What a caller asks to be done once, by the id that it gives.
pub(super) fn once(scope: &Scope, method: &str, id: &str, request: &impl prost::Message) -> Result<Asked, Problem> {
    crate::audit::asked_with(id);
    Asked::new(&scope.0.tenant, &actor(&scope.0), method, id, request)
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
        let asked = once(&scope, "CreatePolicy", &r.request_id, &r)?;
        ok(self.0.create_policy(&tenant, &r.policy_id, policy, r.validate_only, &asked).await?)
    }

    async fn get_policy(&self, request: Request<GetPolicyRequest>) -> Answer<v1::Policy> {
        let name = Scope::of(&request)?.name("name", Kind::Policy, &request.get_ref().name)?;
        let model = self.0.model();
        ok(self.0.policy_shown(&model, model.policy(&name)?))
    }

    async fn list_policies(&self, request: Request<ListPoliciesRequest>) -> Answer<ListPoliciesResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<v1::Policy>("policies", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let own = model.policies.values().filter(|p| p.tenant == tenant);
        let (policies, next_page_token) = page.take(own.map(|p| (p.id.clone(), self.0.policy_shown(&model, p))));
        ok(ListPoliciesResponse { policies, next_page_token })
    }

    async fn update_policy(&self, request: Request<UpdatePolicyRequest>) -> Answer<v1::Policy> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let policy = required("policy", &r.policy)?;
        let name = scope.name("policy.name", Kind::Policy, &policy.name)?;
        let asked = once(&scope, "UpdatePolicy", &r.request_id, &r)?;
        ok(self.0.update_policy(&name, policy, r.update_mask.as_ref(), r.validate_only, &asked).await?)
    }

    async fn delete_policy(&self, request: Request<DeletePolicyRequest>) -> Answer<DeletePolicyResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Policy, &r.name)?;
        let asked = once(&scope, "DeletePolicy", &r.request_id, &r)?;
        self.0.delete_policy(&name, &r.etag, r.validate_only, &asked).await?;
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
        let asked = once(&scope, "CreateGroup", &r.request_id, &r)?;
        ok(self.0.create_group(&name, group, r.validate_only, &r.request_id, &asked).await?)
    }

    async fn get_group(&self, request: Request<GetGroupRequest>) -> Answer<v1::Group> {
        let name = Scope::of(&request)?.name("name", Kind::Group, &request.get_ref().name)?;
        let model = self.0.model();
        ok(convert::group_to_proto(&model, model.group(&name)?))
    }

    async fn list_groups(&self, request: Request<ListGroupsRequest>) -> Answer<ListGroupsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<v1::Group>("groups", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let own = model.groups.values().filter(|g| g.tenant == tenant);
        let (groups, next_page_token) = page.take(own.map(|g| (g.id.clone(), convert::group_to_proto(&model, g))));
        ok(ListGroupsResponse { groups, next_page_token })
    }

    async fn update_group(&self, request: Request<UpdateGroupRequest>) -> Answer<v1::Group> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = required("group", &r.group)?;
        let name = scope.name("group.name", Kind::Group, &group.name)?;
        let asked = once(&scope, "UpdateGroup", &r.request_id, &r)?;
        ok(self.0.update_group(&name, group, r.update_mask.as_ref(), r.validate_only, &asked).await?)
    }

    async fn delete_group(&self, request: Request<DeleteGroupRequest>) -> Answer<DeleteGroupResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Group, &r.name)?;
        let asked = once(&scope, "DeleteGroup", &r.request_id, &r)?;
        self.0.delete_group(&name, &r.etag, r.delete_points, r.force, r.validate_only, &asked).await?;
        ok(DeleteGroupResponse {})
    }

    async fn create_disk(&self, request: Request<CreateDiskRequest>) -> Answer<v1::Disk> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        check_id("disk_id", &r.disk_id)?;
        let disk = required("disk", &r.disk)?;
        let asked = once(&scope, "CreateDisk", &r.request_id, &r)?;
        ok(self.0.create_disk(&group, &r.disk_id, disk, r.validate_only, &asked).await?)
    }

    async fn get_disk(&self, request: Request<GetDiskRequest>) -> Answer<v1::Disk> {
        let (name, id) = Scope::of(&request)?.child("name", "disks", &request.get_ref().name)?;
        let model = self.0.model();
        let group = model.group(&name)?;
        let disk = model.disks_of(group).find(|d| d.id == id);
        let disk = disk.ok_or_else(|| Problem::not_found("disk", &request.get_ref().name))?;
        ok(convert::disk_to_proto(&model, group, disk))
    }

    async fn list_disks(&self, request: Request<ListDisksRequest>) -> Answer<ListDisksResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("parent", Kind::Group, &r.parent)?;
        let page = Page::of::<v1::Disk>("disks", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let group = model.group(&name)?;
        let own = model.disks_of(group).map(|d| (format!("{:05}", d.slot), convert::disk_to_proto(&model, group, d)));
        let (disks, next_page_token) = page.take(own);
        ok(ListDisksResponse { disks, next_page_token })
    }

    async fn delete_disk(&self, request: Request<DeleteDiskRequest>) -> Answer<DeleteDiskResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let (group, id) = scope.child("name", "disks", &r.name)?;
        let asked = once(&scope, "DeleteDisk", &r.request_id, &r)?;
        self.0.delete_disk(&group, &id, &r.etag, r.validate_only, &asked).await?;
        ok(DeleteDiskResponse {})
    }

    async fn pause_group(&self, request: Request<PauseGroupRequest>) -> Answer<v1::Group> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Group, &r.name)?;
        let asked = once(&scope, "PauseGroup", &r.request_id, &r)?;
        let flow = Flow::Pause(r.reason);
        ok(self.0.set_flow(&name, flow, &actor(&scope.0), (&r.etag, r.validate_only), &asked).await?)
    }

    async fn resume_group(&self, request: Request<ResumeGroupRequest>) -> Answer<v1::Group> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Group, &r.name)?;
        let asked = once(&scope, "ResumeGroup", &r.request_id, &r)?;
        ok(self.0.set_flow(&name, Flow::Resume, &actor(&scope.0), (&r.etag, r.validate_only), &asked).await?)
    }

    async fn explain_placement(&self, request: Request<ExplainPlacementRequest>) -> Answer<v1::Placement> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        if !r.group.is_empty() {
            let name = scope.name("group", Kind::Group, &r.group)?;
            return ok(self.0.explain_group(&name)?);
        }
        let source = scope.name("source", Kind::Proxy, &r.source)?;
        let policy = scope.name("policy", Kind::Policy, &r.policy)?;
        if r.size_bytes == 0 {
            return Err(Problem::invalid("size_bytes", 0, "the size of all disks together").into());
        }
        ok(self.0.explain_placement(&tenant, &source, &policy, r.size_bytes)?)
    }

    async fn inspect_branch(&self, request: Request<InspectBranchRequest>) -> Answer<Branch> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "InspectBranch", &r.request_id, &r)?;
        ok(self.0.inspect_branch(&group, &r.export_to, &asked).await?)
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
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<v1::Proxy>("proxies", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        // They come in the order of their ids.
        let own = super::status::proxies(&self.0, &tenant).into_iter().map(|p| (p.name.clone(), p));
        let (proxies, next_page_token) = page.take(own);
        ok(ListProxiesResponse { proxies, next_page_token })
    }

    async fn delete_proxy(&self, request: Request<DeleteProxyRequest>) -> Answer<DeleteProxyResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Proxy, &r.name)?;
        let asked = once(&scope, "DeleteProxy", &r.request_id, &r)?;
        self.0.delete_proxy(&name, &r.etag, r.validate_only, &asked).await?;
        ok(DeleteProxyResponse {})
    }
}

#[tonic::async_trait]
impl points_server::Points for Operator {
    async fn list_points(&self, request: Request<ListPointsRequest>) -> Answer<ListPointsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("parent", Kind::Group, &r.parent)?;
        let parent = format!("{}\0{}", r.parent, r.cuts_only);
        let page = Page::of::<v1::Point>("points", &parent, 0, &r.page_token, "")?;
        // The token holds the last number of the page before.
        let from = if r.page_token.is_empty() { r.from_seq } else { page.after_number()?.saturating_add(1) };
        let mut listed = self.0.list_points(&group, from, r.page_size, r.cuts_only).await?;
        if listed.next_seq > 0 {
            listed.next_page_token = page.token_after(listed.next_seq - 1);
        }
        ok(listed)
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
        let asked = once(&scope, "CreateCut", &r.request_id, &r)?;
        ok(self.0.create_cut(&group, &r.label, r.validate_only, &asked).await?)
    }
}

#[tonic::async_trait]
impl failovers_server::Failovers for Operator {
    async fn start_failover(&self, request: Request<StartFailoverRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "StartFailover", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec = Spec {
            unconfirmed: r.unconfirmed,
            reason: r.reason,
            ..Spec::new(Verb::Failover, convert::choice_from_proto("to", r.to.as_ref())?)
        };
        ok(self.0.start_failover(&group, spec, &r.confirm_name, &asking, &asked).await?)
    }

    async fn start_planned_failover(&self, request: Request<StartPlannedFailoverRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let within_ms = within_ms(r.within_ms)?;
        let asked = once(&scope, "StartPlannedFailover", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec = Spec { within_ms, reason: r.reason, ..Spec::new(Verb::PlannedFailover, Choice::Latest) };
        ok(self.0.start_failover(&group, spec, "", &asking, &asked).await?)
    }

    async fn undo_failover(&self, request: Request<UndoFailoverRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "UndoFailover", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        ok(self.0.undo_failover(&group, (r.discard, r.force, r.reason), &asking, &asked).await?)
    }

    async fn change_point(&self, request: Request<ChangePointRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "ChangePoint", &r.request_id, &r)?;
        let from = match &r.choice {
            Some(change_point_request::Choice::View(view)) => RunFrom::Kept(view.clone()),
            Some(change_point_request::Choice::To(to)) => RunFrom::Point(convert::choice_from_proto("to", Some(to))?),
            None => return Err(Problem::invalid("to", "nothing", "a point, or a view that is kept").into()),
        };
        let asking = asking(&scope, r.request_id, r.validate_only);
        ok(self.0.change_point(&group, from, (r.force, r.reason), &asking, &asked).await?)
    }

    async fn test_failover(&self, request: Request<TestFailoverRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "TestFailover", &r.request_id, &r)?;
        if r.ready_within_ms != 0 && !(1_000..=3_600_000).contains(&r.ready_within_ms) {
            let allowed = "1000 to 3600000, or 0";
            return Err(Problem::invalid("ready_within_ms", r.ready_within_ms, allowed).into());
        }
        if r.hold_ms > MAX_HOLD_MS {
            return Err(Problem::invalid("hold_ms", r.hold_ms, format!("0 to {MAX_HOLD_MS}")).into());
        }
        let trial = Trial {
            to: r.to.as_ref().map(|to| convert::choice_from_proto("to", Some(to))).transpose()?,
            ready: r.readiness.as_ref().map(|ready| crate::machine::ready("readiness", Some(ready))).transpose()?,
            ready_within_ms: r.ready_within_ms,
            hold_ms: r.hold_ms,
            reason: r.reason,
        };
        let asking = asking(&scope, r.request_id, r.validate_only);
        ok(self.0.test_failover(&group, trial, &asking, &asked).await?)
    }

    async fn start_failback(&self, request: Request<StartFailbackRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "StartFailback", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec = Spec { reason: r.reason, ..Spec::new(Verb::Failback, Choice::Latest) };
        ok(self.0.start_back(&group, spec, &asking, &asked).await?)
    }

    async fn cancel_failback(&self, request: Request<CancelFailbackRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "CancelFailback", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec = Spec { reason: r.reason, ..Spec::new(Verb::CancelFailback, Choice::Latest) };
        ok(self.0.start_back(&group, spec, &asking, &asked).await?)
    }

    async fn switch_failback(&self, request: Request<SwitchFailbackRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let within_ms = within_ms(r.within_ms)?;
        let asked = once(&scope, "SwitchFailback", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec = Spec { within_ms, reason: r.reason, ..Spec::new(Verb::SwitchFailback, Choice::Latest) };
        ok(self.0.start_back(&group, spec, &asking, &asked).await?)
    }

    async fn commit_failback(&self, request: Request<CommitFailbackRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "CommitFailback", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec = Spec { reason: r.reason, ..Spec::new(Verb::CommitFailback, Choice::Latest) };
        ok(self.0.start_back(&group, spec, &asking, &asked).await?)
    }

    async fn undo_failback(&self, request: Request<UndoFailbackRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let group = scope.name("group", Kind::Group, &r.group)?;
        let asked = once(&scope, "UndoFailback", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        let spec =
            Spec { unconfirmed: r.unconfirmed, reason: r.reason, ..Spec::new(Verb::UndoFailback, Choice::Latest) };
        ok(self.0.undo_failback(&group, spec, &r.confirm_name, &asking, &asked).await?)
    }
}

/// How long each wait of a planned failover or a switch may take.
fn within_ms(given: u64) -> Result<u64, Problem> {
    match given {
        0 => Ok(PLANNED_WITHIN_MS),
        ms if (1_000..=3_600_000).contains(&ms) => Ok(ms),
        ms => Err(Problem::invalid("within_ms", ms, "1000 to 3600000, or 0 for 60000")),
    }
}

/// The place of an operation in lists.
pub(super) fn newest_first(created_ns: u64, uid: &str) -> String {
    format!("{:020} {uid}", u64::MAX - created_ns)
}

pub(super) fn asking(scope: &Scope, request_id: String, validate_only: bool) -> Asking {
    Asking { actor: actor(&scope.0), request_id, validate_only }
}

#[tonic::async_trait]
impl operations_server::Operations for Operator {
    async fn get_operation(&self, request: Request<GetOperationRequest>) -> Answer<v1::Operation> {
        let name = Scope::of(&request)?.name("name", Kind::Operation, &request.get_ref().name)?;
        ok(self.0.model().shown_operation(&name)?)
    }

    async fn list_operations(&self, request: Request<ListOperationsRequest>) -> Answer<ListOperationsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let model = self.0.model();
        let wanted = |o: &&crate::objects::Operation| o.tenant == tenant && (!r.active_only || o.ended_ns == 0);
        let parent = format!("{}\0{}", r.parent, r.active_only);
        let page = Page::of::<v1::Operation>("operations", &parent, r.page_size, &r.page_token, &r.filter)?;
        // Newest first.
        let wanted_run = |run: &&crate::plan::run::Run| run.tenant == tenant && (!r.active_only || run.ended_ns == 0);
        let runs =
            model.runs.values().filter(wanted_run).map(|run| (newest_first(run.created_ns, &run.uid), run.name()));
        let groups = model.operations.values().filter(wanted).map(|o| (newest_first(o.created_ns, &o.uid), o.name()));
        let mut own: Vec<_> = groups.chain(runs).collect();
        own.sort_by(|a, b| a.0.cmp(&b.0));
        let own = own.into_iter().filter_map(|(key, name)| Some((key, model.shown_operation(&name).ok()?)));
        let (operations, next_page_token) = page.take(own);
        ok(ListOperationsResponse { operations, next_page_token })
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

    async fn cancel_operation(&self, request: Request<CancelOperationRequest>) -> Answer<v1::Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Operation, &r.name)?;
        let asked = once(&scope, "CancelOperation", &r.request_id, &r)?;
        if self.0.model().run(&name).is_ok() {
            return ok(self.0.stop_run(&name, &actor(&scope.0), &asked).await?);
        }
        ok(self.0.cancel_operation(&name, &actor(&scope.0), &asked).await?)
    }

    async fn delete_operation(&self, request: Request<DeleteOperationRequest>) -> Answer<DeleteOperationResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Operation, &r.name)?;
        let asked = once(&scope, "DeleteOperation", &r.request_id, &r)?;
        if self.0.model().run(&name).is_ok() {
            self.0.delete_run(&name, &r.etag, r.validate_only, &asked).await?;
            return ok(DeleteOperationResponse {});
        }
        self.0.delete_operation(&name, &r.etag, r.validate_only, &asked).await?;
        ok(DeleteOperationResponse {})
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
        let asked = once(&scope, "CreateView", &r.request_id, &r)?;
        ok(self.0.create_view(&group, &r.view_id, view, choice, r.validate_only, &r.request_id, &asked).await?)
    }

    async fn get_view(&self, request: Request<GetViewRequest>) -> Answer<v1::View> {
        let (group, id) = Scope::of(&request)?.child("name", "views", &request.get_ref().name)?;
        let model = self.0.model();
        ok(convert::view_to_proto(&model, model.view(&group, &id)?))
    }

    async fn list_views(&self, request: Request<ListViewsRequest>) -> Answer<ListViewsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let page = Page::of::<v1::View>("views", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let views: Vec<_> = match r.parent.strip_suffix("/groups/-") {
            Some(tenant) => {
                let tenant = scope.tenant("parent", tenant)?;
                model.views.values().filter(|v| v.tenant == tenant).collect()
            }
            None => {
                let group = model.group(&scope.name("parent", Kind::Group, &r.parent)?)?;
                model.views_of(group).collect()
            }
        };
        // A space sorts before all that an id may hold, as the parts of the key do.
        let key = |v: &crate::objects::View| format!("{} {}", v.group, v.id);
        let (views, next_page_token) =
            page.take(views.into_iter().map(|v| (key(v), convert::view_to_proto(&model, v))));
        ok(ListViewsResponse { views, next_page_token })
    }

    async fn delete_view(&self, request: Request<DeleteViewRequest>) -> Answer<DeleteViewResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let (group, id) = scope.child("name", "views", &r.name)?;
        let asked = once(&scope, "DeleteView", &r.request_id, &r)?;
        self.0.delete_view(&group, &id, &r.etag, r.keep_delta, r.force, r.validate_only, &asked).await?;
        ok(DeleteViewResponse {})
    }
}
