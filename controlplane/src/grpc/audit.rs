//! The audit log, to be read.

use std::path::PathBuf;
use std::sync::Arc;

use afterimage_wire::v1::{self, *};
use tonic::{Request, Response, Status};

use super::auth::Scope;
use crate::audit::{self, Record};
use crate::coordinator::{Coordinator, page_size};
use crate::names::DEFAULT_TENANT;
use crate::paging::Page;
use crate::problem::Problem;

/// The audit service.
#[derive(Clone)]
pub struct AuditService(pub Arc<Coordinator>);

/// Runs what reads files where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Problem> {
    let failed = |why: String| Problem::Internal(format!("the audit log cannot be read: {why}"));
    tokio::task::spawn_blocking(work).await.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
}

fn shown(record: &Record) -> v1::AuditRecord {
    v1::AuditRecord {
        number: record.seq,
        time_ns: record.time_ns,
        actor: record.actor.clone(),
        method: record.method.clone(),
        request_id: record.request_id.clone(),
        objects: record.objects.clone(),
        outcome: record.outcome.clone(),
        previous_hash: record.prev.clone(),
    }
}

#[tonic::async_trait]
impl audit_server::Audit for AuditService {
    async fn list_audit_records(
        &self,
        request: Request<ListAuditRecordsRequest>,
    ) -> Result<Response<ListAuditRecordsResponse>, Status> {
        let scope = Scope::of(&request)?;
        let r = request.into_inner();
        let tenant = scope.tenant("parent", &r.parent)?;
        let page = Page::of::<AuditRecord>("audit", &r.parent, 0, &r.page_token, &r.filter)?;
        let from = if r.page_token.is_empty() { r.from_number } else { page.after_number()?.saturating_add(1) };
        let limit = page_size(r.page_size) as usize;
        let (dir, _): (PathBuf, _) = self.0.audited();
        let (records, page) = blocking(move || {
            // What the coordinator does by itself is its owner's to see.
            let own =
                |record: &Record| record.tenant == tenant || (record.tenant.is_empty() && tenant == DEFAULT_TENANT);
            // One more, to see whether there is a next page.
            let records = audit::read(&dir, from, limit + 1, |record| own(record) && page.fits(&shown(record)))?;
            Ok((records, page))
        })
        .await?;
        let more = records.len() > limit;
        let records: Vec<AuditRecord> = records.iter().take(limit).map(shown).collect();
        let last = records.last().filter(|_| more).map(|r| page.token_after(r.number));
        Ok(Response::new(ListAuditRecordsResponse { records, next_page_token: last.unwrap_or_default() }))
    }

    async fn verify_audit(
        &self,
        request: Request<VerifyAuditRequest>,
    ) -> Result<Response<VerifyAuditResponse>, Status> {
        Scope::of(&request)?.tenant("parent", &request.get_ref().parent)?;
        let (dir, head) = self.0.audited();
        let verdict = blocking(move || audit::verify(&[dir], Some(&head))).await?;
        Ok(Response::new(VerifyAuditResponse {
            records: verdict.records,
            first: verdict.first,
            last: verdict.last,
            hash: verdict.hash,
            faults: verdict.faults.iter().map(ToString::to_string).collect(),
        }))
    }
}
