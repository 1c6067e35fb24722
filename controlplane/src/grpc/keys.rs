//! Keys of policies: which there are, and that they are rotated. Only the recovery key ever leaves by here, once.

use std::sync::Arc;

use afterimage_wire::v1::*;
use tonic::{Request, Response, Status};

use super::auth::{Scope, actor};
use crate::coordinator::Coordinator;
use crate::names::Kind;
use crate::requests::Asked;

/// The service for keys.
#[derive(Clone)]
pub struct KeysService(pub Arc<Coordinator>);

#[tonic::async_trait]
impl keys_server::Keys for KeysService {
    async fn get_keys(&self, request: Request<GetKeysRequest>) -> Result<Response<PolicyKeys>, Status> {
        let tenant = Scope::of(&request)?.tenant("parent", &request.get_ref().parent)?;
        Ok(Response::new(self.0.keys_of(&tenant)))
    }

    async fn rotate_key(&self, request: Request<RotateKeyRequest>) -> Result<Response<PolicyKeys>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let name = scope.name("group", Kind::Group, &r.group)?;
        crate::audit::asked_with(&r.request_id);
        let asked = Asked::new(&name.tenant, &actor(&scope.0), "RotateKey", &r.request_id, &r)?;
        self.0.rotate_key(&name, r.validate_only, &asked).await?;
        Ok(Response::new(self.0.keys_of(&name.tenant)))
    }

    async fn rewrap_keys(&self, request: Request<RewrapKeysRequest>) -> Result<Response<PolicyKeys>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        crate::audit::asked_with(&r.request_id);
        let asked = Asked::new(&tenant, &actor(&scope.0), "RewrapKeys", &r.request_id, &r)?;
        self.0.rewrap(r.validate_only, &asked).await?;
        Ok(Response::new(self.0.keys_of(&tenant)))
    }

    async fn make_recovery_key(
        &self,
        request: Request<MakeRecoveryKeyRequest>,
    ) -> Result<Response<MakeRecoveryKeyResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        crate::audit::asked_with(&r.request_id);
        let asked = Asked::new(&tenant, &actor(&scope.0), "MakeRecoveryKey", &r.request_id, &r)?;
        let text = self.0.make_recovery(r.replace, r.validate_only, &asked).await?;
        Ok(Response::new(MakeRecoveryKeyResponse { recovery_key: text, keys: Some(self.0.keys_of(&tenant)) }))
    }
}
