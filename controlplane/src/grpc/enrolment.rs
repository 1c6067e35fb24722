//! Enrolment.

use std::sync::Arc;

use afterimage_wire::v1::{self, *};
use tonic::{Request, Response, Status};

use super::auth::Scope;
use super::operator::once;
use crate::convert;
use crate::coordinator::Coordinator;
use crate::problem::Problem;

/// The enrolment service.
#[derive(Clone)]
pub struct EnrolmentService(pub Arc<Coordinator>);

#[tonic::async_trait]
impl enrolment_server::Enrolment for EnrolmentService {
    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let role = v1::Role::try_from(r.role).ok().and_then(convert::role_from_proto);
        let allowed = "ROLE_PROXY, ROLE_VIEWER, ROLE_OPERATOR, ROLE_ADMIN";
        let role = role.ok_or_else(|| Problem::invalid("role", r.role, allowed))?;
        let asked = once(&scope, "CreateJoinToken", &r.request_id, &r)?;
        let (token, expire_time_ns) =
            self.0.create_join_token(&tenant, role, &r.name, r.ttl_s, r.validate_only, &asked).await?;
        Ok(Response::new(CreateJoinTokenResponse { token, expire_time_ns }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        Ok(Response::new(self.0.join(request.get_ref()).await?))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<JoinResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let asked = once(&scope, "Renew", &r.request_id, &r)?;
        Ok(Response::new(self.0.renew(&scope.0, &r.csr_pem, &asked).await?))
    }
}
