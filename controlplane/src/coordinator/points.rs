//! Restore points: asked of the target, which alone knows them.

use afterimage_wire::v1;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::command_result::Outcome;

use super::{Coordinator, misfit};
use crate::convert;
use crate::failover::Choice;
use crate::names::Name;
use crate::objects::{GroupPhase, Proxy};
use crate::problem::Problem;

/// Points on a page.
const DEFAULT_PAGE: u32 = 100;
/// Most points on a page.
const MAX_PAGE: u32 = 1000;
/// Longest label, bytes.
const MAX_LABEL: usize = afterimage_wire::MAX_NAME;

/// How many of a page are wanted.
///
/// # Errors
/// Too many.
pub fn page_size(given: u32) -> Result<u32, Problem> {
    match given {
        0 => Ok(DEFAULT_PAGE),
        1..=MAX_PAGE => Ok(given),
        more => Err(Problem::invalid("page_size", more, format!("0 to {MAX_PAGE}"))),
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
    /// There is no such group; the target is not there; the page is too long.
    pub async fn list_points(
        &self,
        name: &Name,
        from_seq: u64,
        size: u32,
        cuts_only: bool,
    ) -> Result<v1::ListPointsResponse, Problem> {
        let limit = page_size(size)?;
        let (target, stream_uid) = self.target_of(name)?;
        let ask = Tell::ListPoints(v1::ListStreamPoints { stream_uid, from_seq, limit, cuts_only });
        match self.ask(&target, ask).await? {
            Outcome::Points(list) => Ok(v1::ListPointsResponse {
                points: list.points.into_iter().take(limit as usize).map(|p| convert::named_point(name, p)).collect(),
                next_seq: list.next_seq,
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
    pub async fn create_cut(&self, name: &Name, label: &str) -> Result<v1::Point, Problem> {
        if label.is_empty() || label.len() > MAX_LABEL || label.chars().any(char::is_control) {
            let allowed = format!("1 to {MAX_LABEL} bytes without control characters");
            return Err(Problem::invalid("label", label, allowed));
        }
        let model = self.model();
        let group = model.group(name)?;
        if group.phase != GroupPhase::Protecting {
            return Err(Problem::state(name, "not being protected by its source", "cuts are made only while it is"));
        }
        let source = model.source_of(group).ok_or_else(|| Problem::not_found("proxy", &group.source))?;
        let cut = v1::LabelCut { stream_uid: group.uid.clone(), label: label.to_owned() };
        match self.ask(source, Tell::LabelCut(cut)).await? {
            Outcome::Point(point) => Ok(convert::named_point(name, point)),
            _ => Err(misfit(source)),
        }
    }
}
