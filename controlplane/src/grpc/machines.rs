//! Machines: translated, and decided elsewhere.

use afterimage_wire::v1::{self, *};
use tonic::{Request, Response, Status};

use super::auth::Scope;
use super::operator::{Operator, once};
use crate::machine;
use crate::names::Kind;
use crate::paging::Page;
use crate::problem::Problem;

type Answer<T> = Result<Response<T>, Status>;

fn required(machine: Option<&v1::Machine>) -> Result<&v1::Machine, Problem> {
    machine.ok_or_else(|| Problem::invalid("machine", "nothing", "it must be set"))
}

#[tonic::async_trait]
impl machines_server::Machines for Operator {
    async fn create_machine(&self, request: Request<CreateMachineRequest>) -> Answer<v1::Machine> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let machine = required(r.machine.as_ref())?;
        let asked = once(&scope, "CreateMachine", &r.request_id, &r)?;
        let made = self.0.create_machine(&tenant, &r.machine_id, machine, r.validate_only, &asked).await?;
        Ok(Response::new(made))
    }

    async fn get_machine(&self, request: Request<GetMachineRequest>) -> Answer<v1::Machine> {
        let name = Scope::of(&request)?.name("name", Kind::Machine, &request.get_ref().name)?;
        let model = self.0.model();
        Ok(Response::new(machine::to_proto(&model, model.machine(&name)?)))
    }

    async fn list_machines(&self, request: Request<ListMachinesRequest>) -> Answer<ListMachinesResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<v1::Machine>("machines", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let model = self.0.model();
        let own = model.machines.values().filter(|m| m.tenant == tenant);
        let (machines, next_page_token) = page.take(own.map(|m| (m.id.clone(), machine::to_proto(&model, m))));
        Ok(Response::new(ListMachinesResponse { machines, next_page_token }))
    }

    async fn update_machine(&self, request: Request<UpdateMachineRequest>) -> Answer<v1::Machine> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let machine = required(r.machine.as_ref())?;
        let name = scope.name("machine.name", Kind::Machine, &machine.name)?;
        let asked = once(&scope, "UpdateMachine", &r.request_id, &r)?;
        let made = self.0.update_machine(&name, machine, r.update_mask.as_ref(), r.validate_only, &asked).await?;
        Ok(Response::new(made))
    }

    async fn delete_machine(&self, request: Request<DeleteMachineRequest>) -> Answer<DeleteMachineResponse> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("name", Kind::Machine, &r.name)?;
        let asked = once(&scope, "DeleteMachine", &r.request_id, &r)?;
        self.0.delete_machine(&name, &r.etag, r.validate_only, &asked).await?;
        Ok(Response::new(DeleteMachineResponse {}))
    }

    async fn probe_machine(&self, request: Request<ProbeMachineRequest>) -> Answer<ProbeMachineResponse> {
        let name = Scope::of(&request)?.name("name", Kind::Machine, &request.get_ref().name)?;
        Ok(Response::new(self.0.probe_machine(&name).await?))
    }
}
