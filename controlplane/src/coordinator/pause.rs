//! Pausing a group's stream and letting it go on. One change of what the source is to be, and so one commit: a coordinator that
//! dies has done it or has not, and a source that is away is told when it is back. Why it is no operation:
//! `docs/decisions/0035`.

use std::sync::Arc;

use afterimage_wire::v1::{self, Severity};

use super::Coordinator;
use crate::convert;
use crate::failover::check_pause;
use crate::names::Name;
use crate::objects::{Group, Pause};
use crate::policy::check_text;
use crate::problem::Problem;
use crate::requests::Asked;

/// What is asked of a group's stream.
#[derive(Clone, Debug)]
pub enum Flow {
    /// Nothing is sent, for this reason.
    Pause(String),
    /// It goes on.
    Resume,
}

impl Coordinator {
    /// Pauses a group, or resumes it; what is so already stays as it is. `by`: who asks, as in the audit log.
    ///
    /// # Errors
    /// There is none of that name; it has changed; it does not run at its source, protected.
    pub async fn set_flow(
        self: &Arc<Self>,
        name: &Name,
        flow: Flow,
        by: &str,
        (etag, validate_only): (&str, bool),
        request: &Asked,
    ) -> Result<v1::Group, Problem> {
        if let Flow::Pause(reason) = &flow {
            check_text("reason", reason)?;
        }
        let mut changed = false;
        let group = self
            .update_object(name, etag, validate_only, request, |_, old: &Group, now| {
                check_pause(old)?;
                let pause = match (&flow, &old.pause) {
                    (Flow::Pause(_), Some(known)) => Some(known.clone()),
                    (Flow::Pause(reason), None) => {
                        Some(Pause { at_ns: now, by: by.to_owned(), reason: reason.clone() })
                    }
                    (Flow::Resume, _) => None,
                };
                if pause == old.pause {
                    return Ok(old.clone());
                }
                changed = !validate_only;
                Ok(Group { version: old.version + 1, updated_ns: now, pause, ..old.clone() })
            })
            .await?;
        if changed {
            // The one event of a pause that is more than information: who is to be told is told once.
            let (severity, message) = match &flow {
                Flow::Pause(reason) if reason.is_empty() => (Severity::Warning, format!("paused by {by}")),
                Flow::Pause(reason) => (Severity::Warning, format!("paused by {by}: {reason}")),
                Flow::Resume => (Severity::Info, format!("resumed by {by}")),
            };
            self.tell(severity, "pause", &name.to_string(), &message);
        }
        Ok(convert::group_to_proto(&self.model(), &group))
    }
}
