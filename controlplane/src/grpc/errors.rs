//! A refusal as a gRPC status: the message for a person, the same in its details for a program.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::problem::Problem;
use crate::text::shortened;

/// Domain of reasons in error details.
const DOMAIN: &str = "afterimage";
/// When to try again what failed because a proxy was not there.
const RETRY: Duration = Duration::from_secs(1);

/// Longest message, bytes. Message and details are headers: together they stay below the 16 KiB that clients take, also when
/// each byte is sent as three, or a caller whose words are echoed loses its connection instead of reading an answer.
const MAX_MESSAGE: usize = 2048;
/// Longest text in the details, bytes.
const MAX_DETAIL: usize = 512;

fn detail(text: impl AsRef<str>) -> String {
    shortened(text.as_ref(), MAX_DETAIL)
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let message = shortened(&problem.to_string(), MAX_MESSAGE);
        let mut details = ErrorDetails::new();
        details.set_error_info(reason(&problem), DOMAIN, metadata(&problem));
        let code = match &problem {
            Problem::Invalid { field, value, allowed } => {
                details.add_bad_request_violation(detail(field), detail(format!("{value:?}; allowed: {allowed}")));
                Code::InvalidArgument
            }
            Problem::NotFound { kind, name } => {
                details.set_resource_info(detail(kind), detail(name), "", "does not exist");
                Code::NotFound
            }
            Problem::Exists { field, value, by } => {
                details.add_bad_request_violation(detail(field), detail(format!("{value:?} is taken: {by}")));
                details.set_resource_info("", detail(by), "", "exists");
                Code::AlreadyExists
            }
            Problem::State { subject, state, remedy } => {
                details.add_precondition_failure_violation(
                    "STATE",
                    detail(subject),
                    detail(format!("{state}: {remedy}")),
                );
                Code::FailedPrecondition
            }
            Problem::Changed { subject, given, found } => {
                details.set_resource_info("", detail(subject), "", detail(format!("its etag is {found}, not {given}")));
                Code::Aborted
            }
            Problem::Limit { what, limit } => {
                details.add_quota_failure_violation(detail(what), format!("at most {limit}"));
                Code::ResourceExhausted
            }
            Problem::TooFast { who, per_s, after, .. } => {
                details.add_quota_failure_violation(detail(who), format!("{per_s} calls a second"));
                details.set_retry_info(Some(*after));
                Code::ResourceExhausted
            }
            Problem::Denied { .. } => Code::PermissionDenied,
            Problem::Anonymous { .. } | Problem::Certificate { .. } => Code::Unauthenticated,
            Problem::NoMethod { .. } => Code::Unimplemented,
            Problem::Unreachable { .. } => {
                details.set_retry_info(Some(RETRY));
                Code::Unavailable
            }
            Problem::Refused { proxy, detail: why } => {
                details.add_precondition_failure_violation("PROXY", detail(proxy), detail(why));
                Code::FailedPrecondition
            }
            Problem::Internal(_) => Code::Internal,
        };
        Self::with_error_details(code, message, details)
    }
}

/// The kind, as programs tell it from others.
fn reason(problem: &Problem) -> &'static str {
    match problem {
        Problem::Invalid { .. } => "INVALID_FIELD",
        Problem::NotFound { .. } => "NOT_FOUND",
        Problem::Exists { .. } => "ALREADY_EXISTS",
        Problem::State { .. } => "WRONG_STATE",
        Problem::Changed { .. } => "ETAG_MISMATCH",
        Problem::Limit { .. } => "LIMIT_REACHED",
        Problem::TooFast { .. } => "RATE_LIMITED",
        Problem::Denied { .. } => "DENIED",
        Problem::Anonymous { .. } => "NO_CERTIFICATE",
        Problem::Certificate { reason, .. } => reason,
        Problem::NoMethod { .. } => "NO_METHOD",
        Problem::Unreachable { .. } => "PROXY_UNREACHABLE",
        Problem::Refused { .. } => "PROXY_REFUSED",
        Problem::Internal(_) => "INTERNAL",
    }
}

/// What varies in the message.
fn metadata(problem: &Problem) -> HashMap<String, String> {
    let pairs: Vec<(&str, &String)> = match problem {
        Problem::Invalid { field, allowed, .. } => vec![("field", field), ("allowed", allowed)],
        Problem::NotFound { kind, name } => vec![("kind", kind), ("name", name)],
        Problem::Exists { field, by, .. } => vec![("field", field), ("by", by)],
        Problem::State { subject, state, remedy } => vec![("subject", subject), ("state", state), ("remedy", remedy)],
        Problem::Changed { subject, found, .. } => vec![("subject", subject), ("etag", found)],
        Problem::Limit { what, .. } => vec![("what", what)],
        Problem::TooFast { who, .. } => vec![("who", who)],
        Problem::Denied { needs, .. } | Problem::Anonymous { needs, .. } => vec![("needs", needs)],
        Problem::Certificate { who, .. } => vec![("who", who)],
        Problem::NoMethod { method } => vec![("method", method)],
        Problem::Unreachable { proxy, .. } | Problem::Refused { proxy, .. } => vec![("proxy", proxy)],
        Problem::Internal(_) => Vec::new(),
    };
    pairs.into_iter().map(|(key, value)| (key.to_owned(), detail(value))).collect()
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
    fn what_is_echoed_leaves_room_for_the_answer() {
        let long = "\u{1f5c4}".repeat(100_000);
        let problems = [
            Problem::invalid(&long, &long, &long),
            Problem::state(&long, &long, &long),
            Problem::Changed { subject: long.clone(), given: long.clone(), found: long.clone() },
            Problem::Exists { field: long.clone(), value: long.clone(), by: long.clone() },
            Problem::NotFound { kind: long.clone(), name: long.clone() },
            Problem::Refused { proxy: long.clone(), detail: long.clone() },
        ];
        for problem in problems {
            let headers = Status::from(problem).into_http::<()>().into_parts().0.headers;
            let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            assert!(bytes < 15 << 10, "{bytes}");
        }
    }

    #[test]
    fn a_state_says_what_does_fit() {
        let status = Status::from(Problem::state("g", "failed over", "look at its views"));
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.get_details_precondition_failure().unwrap().violations[0].description.contains("its views"));
    }
}
