//! Restore points: asked of the target, which alone knows them.

use std::sync::Arc;

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;

use super::{Coordinator, misfit, unreachable};
use crate::convert;
use crate::failover::Choice;
use crate::names::Name;
use crate::objects::{GroupPhase, Proxy};
use crate::problem::Problem;
use crate::requests::Asked;
use crate::sessions::CallError;

/// Points on a page.
const DEFAULT_PAGE: u32 = 100;
/// Most points on a page.
const MAX_PAGE: u32 = 1000;
/// Longest label, bytes.
const MAX_LABEL: usize = afterimage_wire::MAX_NAME;

/// How many of a page are wanted.
pub fn page_size(given: u32) -> u32 {
    match given {
        0 => DEFAULT_PAGE,
        given => given.min(MAX_PAGE),
    }
}

impl Coordinator {
    pub(super) fn target_of(&self, name: &Name) -> Result<(Proxy, String), Problem> {
        let model = self.model();
        let group = model.group(name)?;
        let target = model.target_of(group).ok_or_else(|| Problem::not_found("proxy", &group.target))?;
        Ok((target.clone(), group.uid.clone()))
    }

    /// Points of a group.
    ///
    /// # Errors
    /// There is no such group; the target is not there.
    pub async fn list_points(
        &self,
        name: &Name,
        from_seq: u64,
        size: u32,
        cuts_only: bool,
    ) -> Result<v1::ListPointsResponse, Problem> {
        let limit = page_size(size);
        let (target, stream_uid) = self.target_of(name)?;
        let ask = Tell::ListPoints(v1::ListStreamPoints { stream_uid, from_seq, limit, cuts_only });
        match self.ask(&target, ask).await? {
            Outcome::Points(list) => Ok(v1::ListPointsResponse {
                points: list.points.into_iter().take(limit as usize).map(|p| convert::named_point(name, p)).collect(),
                next_seq: list.next_seq,
                next_page_token: String::new(),
                summary: list.summary.map(|s| convert::named_summary(name, s)),
            }),
            _ => Err(misfit(&target)),
        }
    }

    /// The one point that a choice means now.
    ///
    /// # Errors
    /// There is no such group or point; the target is not there.
    pub async fn resolve_point(&self, name: &Name, choice: Choice) -> Result<v1::Point, Problem> {
        let (target, stream_uid) = self.target_of(name)?;
        let ask = Tell::ResolvePoint(v1::ResolvePoint { stream_uid, at: Some(convert::choice_to_proto(choice)) });
        match self.ask(&target, ask).await? {
            Outcome::Point(point) => Ok(convert::named_point(name, point)),
            _ => Err(misfit(&target)),
        }
    }

    /// Makes a cut with a label at the source.
    ///
    /// # Errors
    /// There is no such group; it is not being protected; the source is not there; the label is not allowed.
    pub async fn create_cut(
        self: &Arc<Self>,
        name: &Name,
        label: &str,
        validate_only: bool,
        request: &Asked,
    ) -> Result<v1::Point, Problem> {
        if label.is_empty() || label.len() > MAX_LABEL || label.chars().any(char::is_control) {
            let allowed = format!("1 to {MAX_LABEL} bytes without control characters");
            return Err(Problem::invalid("label", label, allowed));
        }
        // Two that come at once with one id make one cut: the second waits for the first.
        let _turn = self.turns.of(request.key()).await;
        let model = self.model();
        if let Some(point) = request.done(&model)?.and_then(|done| done.point.as_ref()) {
            return Ok(convert::point_to_proto(name, point));
        }
        let group = model.group(name)?;
        if !matches!(group.phase, GroupPhase::Protecting | GroupPhase::FailedBack { .. }) {
            return Err(Problem::state(name, "not being protected by its source", "cuts are made only while it is"));
        }
        let source = model.source_of(group).ok_or_else(|| Problem::not_found("proxy", &group.source))?;
        if validate_only {
            if !self.sessions.connected(&source.uid) {
                return Err(unreachable(source, &CallError::NotConnected));
            }
            return Ok(v1::Point { label: label.to_owned(), ..v1::Point::default() });
        }
        let cut = v1::LabelCut { stream_uid: group.uid.clone(), label: label.to_owned() };
        if request.key().is_empty() {
            self.record_act(format!("cut {name}")).await?;
        }
        match self.ask_once(source, request.key(), Tell::LabelCut(cut)).await? {
            Outcome::Point(point) => {
                let (now, uid) = (self.clock.wall_ns(), group.uid.clone());
                let record = convert::point_from_proto(&point);
                // Made is made: that it cannot be remembered is no reason to say that it was not.
                let kept = self.change(|model, txn| {
                    request.record_with(model, txn, now, &uid, Some(record));
                    Ok(())
                });
                if let Err(e) = kept.await {
                    tracing::warn!(group = %name, error = %e, "a cut was made and its request is not remembered");
                }
                Ok(convert::named_point(name, point))
            }
            _ => Err(misfit(source)),
        }
    }
}
