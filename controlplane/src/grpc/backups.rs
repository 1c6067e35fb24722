//! Backup of the coordinator's state, and what comes after a restore.

use std::pin::Pin;
use std::sync::Arc;

use afterimage_wire::v1::*;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::auth::{actor, caller};
use crate::backup;
use crate::coordinator::Coordinator;
use crate::problem::Problem;

/// Bytes in one message.
const PIECE: usize = 256 * 1024;

/// The backup service.
#[derive(Clone)]
pub struct BackupsService(pub Arc<Coordinator>);

#[tonic::async_trait]
impl backups_server::Backups for BackupsService {
    type CreateBackupStream = Pin<Box<dyn Stream<Item = Result<BackupPart, Status>> + Send>>;

    async fn create_backup(
        &self,
        request: Request<CreateBackupRequest>,
    ) -> Result<Response<Self::CreateBackupStream>, Status> {
        let who = caller(request.extensions())?;
        let listing = self.0.whole_store().await.map_err(|e| Problem::Internal(e.to_string()))?;
        let shared = backup::fingerprint(&self.0.settings.data_dir).unwrap_or_default();
        let file = backup::write(&listing, &shared, self.0.clock.wall_ns()).map_err(Problem::Internal)?;
        tracing::info!(by = actor(&who), bytes = file.len(), "backup of the state");
        let parts: Vec<_> = file.chunks(PIECE).map(|data| Ok(BackupPart { data: data.to_vec() })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn get_restore(&self, _: Request<GetRestoreRequest>) -> Result<Response<Restore>, Status> {
        Ok(Response::new(self.0.restore_state()))
    }

    async fn confirm_restore(&self, request: Request<ConfirmRestoreRequest>) -> Result<Response<Restore>, Status> {
        let who = caller(request.extensions())?;
        let confirmed = self.0.confirm_restore(request.get_ref().without_unseen).await?;
        tracing::warn!(by = actor(&who), "the restored state is confirmed");
        Ok(Response::new(confirmed))
    }
}
