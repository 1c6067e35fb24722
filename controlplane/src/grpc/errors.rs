//! A refusal as a gRPC status: the message for a person, the same in its details for a program.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::problem::Problem;

/// Domain of reasons in error details.
const DOMAIN: &str = "afterimage";

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let message = problem.to_string();
        let mut details = ErrorDetails::new();
        let code = match &problem {
            Problem::Invalid { field, value, allowed } => {
                details.add_bad_request_violation(field, format!("{value:?}; allowed: {allowed}"));
                Code::InvalidArgument
            }
            Problem::NotFound { kind, name } => {
                details.set_resource_info(kind, name, "", "does not exist");
                Code::NotFound
            }
            Problem::Exists { field, value, by } => {
                details.add_bad_request_violation(field, format!("{value:?} is taken: {by}"));
                Code::AlreadyExists
            }
            Problem::State { subject, state, remedy } => {
                details.add_precondition_failure_violation("STATE", subject, format!("{state}: {remedy}"));
                Code::FailedPrecondition
            }
            Problem::Changed { subject, given, found } => {
                details.set_resource_info("", subject, "", format!("its etag is {found}, not {given}"));
                Code::Aborted
            }
            Problem::Limit { what, limit } => {
                details.add_quota_failure_violation(what, format!("at most {limit}"));
                Code::ResourceExhausted
            }
            Problem::Denied { needs, .. } => {
                details.set_error_info("DENIED", DOMAIN, [("needs".to_owned(), needs.clone())]);
                Code::PermissionDenied
            }
            Problem::Anonymous { needs, .. } => {
                details.set_error_info("NO_CERTIFICATE", DOMAIN, [("needs".to_owned(), needs.clone())]);
                Code::Unauthenticated
            }
            Problem::NoMethod { .. } => Code::Unimplemented,
            Problem::Unreachable { proxy, .. } => {
                details.set_error_info("PROXY_UNREACHABLE", DOMAIN, [("proxy".to_owned(), proxy.clone())]);
                Code::Unavailable
            }
            Problem::Refused { proxy, detail } => {
                details.add_precondition_failure_violation("PROXY", proxy, detail);
                Code::FailedPrecondition
            }
            Problem::Internal(_) => Code::Internal,
        };
        Self::with_error_details(code, message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_field_is_named_to_programs_too() {
        let status = Status::from(Problem::invalid("policy.rpo_target_us", 0, "1000 to 9"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let violation = &status.get_details_bad_request().unwrap().field_violations[0];
        assert_eq!(violation.field, "policy.rpo_target_us");
        assert!(violation.description.contains("1000 to 9") && status.message().contains("1000 to 9"));
    }

    #[test]
    fn a_state_says_what_does_fit() {
        let status = Status::from(Problem::state("g", "failed over", "look at its views"));
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.get_details_precondition_failure().unwrap().violations[0].description.contains("its views"));
    }
}
