//! Certificates: who has one, and that it is not to be taken any more.

use std::collections::HashSet;
use std::sync::Arc;

use afterimage_wire::v1::{self, *};
use tonic::{Request, Response, Status};

use super::auth::{Scope, actor};
use crate::certificates::{newest, shown};
use crate::coordinator::Coordinator;
use crate::paging::Page;
use crate::problem::Problem;
use crate::requests::Asked;

/// The service for certificates.
#[derive(Clone)]
pub struct CertificatesService(pub Arc<Coordinator>);

#[tonic::async_trait]
impl certificates_server::Certificates for CertificatesService {
    async fn list_certificates(
        &self,
        request: Request<ListCertificatesRequest>,
    ) -> Result<Response<ListCertificatesResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<v1::Certificate>("certificates", &r.parent, r.page_size, &r.page_token, &r.filter)?;
        let (model, now) = (self.0.model(), self.0.clock.wall_ns());
        let first: HashSet<&str> = newest(&model, |c| c.tenant == tenant).iter().map(|c| c.serial.as_str()).collect();
        let own = model.certificates.values().filter(|c| c.tenant == tenant && !c.is_over(now));
        let all = own.map(|c| (c.serial.clone(), shown(c, first.contains(c.serial.as_str()))));
        let (certificates, next_page_token) = page.take(all);
        Ok(Response::new(ListCertificatesResponse { certificates, next_page_token }))
    }

    async fn get_authorities(&self, request: Request<GetAuthoritiesRequest>) -> Result<Response<Authorities>, Status> {
        let tenant = Scope::of(&request)?.tenant("parent", &request.get_ref().parent)?;
        Ok(Response::new(self.0.authorities(&tenant)))
    }

    async fn rotate_authority(
        &self,
        request: Request<RotateAuthorityRequest>,
    ) -> Result<Response<Authorities>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        crate::audit::asked_with(&r.request_id);
        let asked = Asked::new(&tenant, &actor(&scope.0), "RotateAuthority", &r.request_id, &r)?;
        match (r.finish, r.anyway) {
            (true, anyway) => self.0.finish_rotation(&scope.0, anyway, r.validate_only, &asked).await?,
            (false, false) => self.0.begin_rotation(r.validate_only, &asked).await?,
            (false, true) => return Err(Problem::invalid("anyway", true, "true only with finish").into()),
        }
        Ok(Response::new(self.0.authorities(&tenant)))
    }

    async fn revoke_certificates(
        &self,
        request: Request<RevokeCertificatesRequest>,
    ) -> Result<Response<RevokeCertificatesResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        crate::audit::asked_with(&r.request_id);
        let asked = Asked::new(&tenant, &actor(&scope.0), "RevokeCertificates", &r.request_id, &r)?;
        let certificates = self.0.revoke(&scope.0, &tenant, &r.which, &r.reason, r.validate_only, &asked).await?;
        Ok(Response::new(RevokeCertificatesResponse { certificates }))
    }
}
