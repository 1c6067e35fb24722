//! Plans: translated, and decided elsewhere.

use afterimage_wire::v1::{self, Operation, *};
use tonic::{Request, Response, Status};

use super::auth::{Scope, actor};
use super::operator::{Operator, asking, newest_first, once};
use crate::convert;
use crate::failover::Choice;
use crate::names::Kind;
use crate::paging::Page;
use crate::plan::run::{Run, Spec};
use crate::plan::{self, PlanVerb};
use crate::problem::Problem;

type Answer<T> = Result<Response<T>, Status>;

fn required(plan: Option<&v1::Plan>) -> Result<&v1::Plan, Problem> {
    plan.ok_or_else(|| Problem::invalid("plan", "nothing", "it must be set"))
}

#[tonic::async_trait]
impl plans_server::Plans for Operator {
    async fn create_plan(&self, request: Request<CreatePlanRequest>) -> Answer<v1::Plan> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let plan = required(r.plan.as_ref())?;
        let asked = once(&scope, "CreatePlan", &r.request_id, &r)?;
        let made = self.0.create_plan(&tenant, &r.plan_id, plan, r.validate_only, &asked).await?;
        Ok(Response::new(made))
    }

    async fn get_plan(&self, request: Request<GetPlanRequest>) -> Answer<v1::Plan> {
        let name = Scope::of(&request)?.name("name", Kind::Plan, &request.get_ref().name)?;
        let model = self.0.model();
        Ok(Response::new(plan::to_proto(&model, model.plan(&name)?)))
    }

    async fn list_plans(&self, request: Request<ListPlansRequest>) -> Answer<ListPlansResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<v1::Plan>("plans", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let own = model.plans.values().filter(|p| p.tenant == tenant);
        let (plans, next_page_token) = page.take(own.map(|p| (p.id.clone(), plan::to_proto(&model, p))));
        Ok(Response::new(ListPlansResponse { plans, next_page_token }))
    }

    async fn update_plan(&self, request: Request<UpdatePlanRequest>) -> Answer<v1::Plan> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let plan = required(r.plan.as_ref())?;
        let name = scope.name("plan.name", Kind::Plan, &plan.name)?;
        let asked = once(&scope, "UpdatePlan", &r.request_id, &r)?;
        let made = self.0.update_plan(&name, plan, r.update_mask.as_ref(), r.validate_only, &asked).await?;
        Ok(Response::new(made))
    }

    async fn delete_plan(&self, request: Request<DeletePlanRequest>) -> Answer<DeletePlanResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Plan, &r.name)?;
        let asked = once(&scope, "DeletePlan", &r.request_id, &r)?;
        self.0.delete_plan(&name, &r.etag, r.validate_only, &asked).await?;
        Ok(Response::new(DeletePlanResponse {}))
    }

    async fn run_plan(&self, request: Request<RunPlanRequest>) -> Answer<Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("plan", Kind::Plan, &r.plan)?;
        let asked = once(&scope, "RunPlan", &r.request_id, &r)?;
        let spec = Spec {
            planned: r.planned,
            unconfirmed: r.unconfirmed,
            reason: r.reason,
            ..spec(PlanVerb::Run, r.to.as_ref())?
        };
        let asking = asking(&scope, r.request_id, r.validate_only);
        Ok(Response::new(self.0.start_plan(&name, spec, &r.confirm_name, &asking, &asked).await?))
    }

    async fn test_plan(&self, request: Request<TestPlanRequest>) -> Answer<Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("plan", Kind::Plan, &r.plan)?;
        let asked = once(&scope, "TestPlan", &r.request_id, &r)?;
        let spec = Spec { reason: r.reason, ..spec(PlanVerb::Test, r.to.as_ref())? };
        let asking = asking(&scope, r.request_id, r.validate_only);
        Ok(Response::new(self.0.start_plan(&name, spec, "", &asking, &asked).await?))
    }

    async fn undo_plan(&self, request: Request<UndoPlanRequest>) -> Answer<Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("plan", Kind::Plan, &r.plan)?;
        let asked = once(&scope, "UndoPlan", &r.request_id, &r)?;
        let spec = Spec { discard: r.discard, force: r.force, reason: r.reason, ..spec(PlanVerb::Undo, None)? };
        let asking = asking(&scope, r.request_id, r.validate_only);
        Ok(Response::new(self.0.start_plan(&name, spec, "", &asking, &asked).await?))
    }

    async fn stop_plan(&self, request: Request<StopPlanRequest>) -> Answer<Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("plan", Kind::Plan, &r.plan)?;
        let asked = once(&scope, "StopPlan", &r.request_id, &r)?;
        Ok(Response::new(self.0.stop_plan(&name, &actor(&scope.0), &asked).await?))
    }

    async fn resume_plan(&self, request: Request<ResumePlanRequest>) -> Answer<Operation> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("plan", Kind::Plan, &r.plan)?;
        let asked = once(&scope, "ResumePlan", &r.request_id, &r)?;
        let asking = asking(&scope, r.request_id, r.validate_only);
        Ok(Response::new(self.0.resume_plan(&name, &asking, &asked).await?))
    }

    async fn list_plan_runs(&self, request: Request<ListPlanRunsRequest>) -> Answer<ListPlanRunsResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("parent", Kind::Plan, &r.parent)?;
        let page = Page::of::<Operation>("runs", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let key = |run: &Run| newest_first(run.created_ns, &run.uid);
        let own = model.runs_of(model.plan(&name)?).into_iter().map(|run| (key(run), run));
        let (runs, next_page_token) = page.take(own.map(|(key, run)| (key, plan::shown::run(&model, run))));
        Ok(Response::new(ListPlanRunsResponse { runs, next_page_token }))
    }

    async fn estimate_plan(&self, request: Request<EstimatePlanRequest>) -> Answer<PlanEstimate> {
        let name = Scope::of(&request)?.name("plan", Kind::Plan, &request.get_ref().plan)?;
        let model = self.0.model();
        Ok(Response::new(plan::shown::estimated(&model, model.plan(&name)?)))
    }
}

/// A verb of a plan, as it stands without any choice but the point.
fn spec(verb: PlanVerb, to: Option<&PointChoice>) -> Result<Spec, Problem> {
    let to = to.map(|to| convert::choice_from_proto("to", Some(to))).transpose()?.unwrap_or(Choice::Latest);
    let (planned, unconfirmed, discard, force) = (false, false, false, false);
    Ok(Spec { verb, to, planned, unconfirmed, discard, force, reason: String::new() })
}
