//! What a command ends with when it does not end well: what happened, to which object, what to do; and the exit code
//! that a script can tell apart. The codes are part of the interface and are in the command's help.

use std::fmt::Write as _;

use serde_json::json;
use tonic::{Code, Status};

/// The kinds of failure, each with an exit code of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something was tried and failed.
    Failed,
    /// The command line, or a value in it, makes no sense.
    Usage,
    /// The object's state, the certificate or the operator's own answer does not allow it.
    Refused,
    /// The coordinator cannot be reached, or does not answer in time.
    Unreachable,
    /// No object of that name.
    NotFound,
    /// An object of that name is there already, or changed meanwhile.
    Conflict,
    /// What there is differs from what was asked about.
    Different,
}

impl Kind {
    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Refused => 3,
            Kind::Unreachable => 4,
            Kind::NotFound => 5,
            Kind::Conflict => 6,
            Kind::Different => 7,
        }
    }

    /// The kind's name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Failed => "failed",
            Kind::Usage => "usage",
            Kind::Refused => "refused",
            Kind::Unreachable => "unreachable",
            Kind::NotFound => "not_found",
            Kind::Conflict => "conflict",
            Kind::Different => "different",
        }
    }
}

impl From<Code> for Kind {
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::OutOfRange => Kind::Usage,
            Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated | Code::ResourceExhausted => {
                Kind::Refused
            }
            Code::Unavailable | Code::DeadlineExceeded => Kind::Unreachable,
            Code::NotFound => Kind::NotFound,
            Code::AlreadyExists | Code::Aborted => Kind::Conflict,
            _ => Kind::Failed,
        }
    }
}

/// A command that did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which sort.
    pub kind: Kind,
    /// The object that it is about, as `group "db"`; empty where there is none.
    pub object: String,
    /// What happened.
    pub message: String,
    /// What to do about it; empty where nothing better than reading the message can be said.
    pub hint: String,
}

impl Failure {
    /// A failure about an object.
    pub fn new(kind: Kind, object: impl Into<String>, message: impl Into<String>) -> Self {
        Failure { kind, object: object.into(), message: message.into(), hint: String::new() }
    }

    /// A value on the command line that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Failure::new(Kind::Usage, "", message)
    }

    /// The same with what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// What the coordinator answered to a request about `object`.
    pub fn answered(object: impl Into<String>, status: &Status) -> Self {
        let kind = Kind::from(status.code());
        let message = match status.message() {
            "" => format!("the coordinator answered {:?} without saying why", status.code()),
            text => text.to_owned(),
        };
        let failure = Failure::new(kind, object, message);
        match kind {
            Kind::Unreachable => failure.hint(
                "check that the coordinator runs and that its address is right: --coordinator, AFTERIMAGE_COORDINATOR",
            ),
            Kind::Refused if status.code() == Code::Unauthenticated => failure.hint(
                "an admin makes a token (afterimage token create NAME --role ROLE), then: afterimage join TOKEN --replace",
            ),
            _ => failure,
        }
    }

    /// One JSON document, for standard error under `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        json!({"error": {
            "kind": self.kind.name(),
            "exit_code": self.kind.exit_code(),
            "object": self.object,
            "message": self.message,
            "hint": self.hint,
        }})
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        if !self.object.is_empty() && !self.message.contains(&self.object) {
            write!(text, "{}: ", self.object)?;
        }
        text.push_str(&self.message);
        if !self.hint.is_empty() {
            write!(text, "\n  to do: {}", self.hint)?;
        }
        f.write_str(&text)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_an_exit_code_of_its_own_and_none_is_success() {
        let kinds = [
            Kind::Failed,
            Kind::Usage,
            Kind::Refused,
            Kind::Unreachable,
            Kind::NotFound,
            Kind::Conflict,
            Kind::Different,
        ];
        let mut codes: Vec<u8> = kinds.iter().map(|k| k.exit_code()).collect();
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7]);
        codes.dedup();
        assert_eq!(codes.len(), kinds.len());
    }

    #[test]
    fn the_coordinators_codes_map_to_the_documented_exit_codes() {
        for (code, exit) in [
            (Code::InvalidArgument, 2),
            (Code::FailedPrecondition, 3),
            (Code::PermissionDenied, 3),
            (Code::Unauthenticated, 3),
            (Code::Unavailable, 4),
            (Code::DeadlineExceeded, 4),
            (Code::NotFound, 5),
            (Code::AlreadyExists, 6),
            (Code::Aborted, 6),
            (Code::Internal, 1),
            (Code::Unknown, 1),
        ] {
            assert_eq!(Kind::from(code).exit_code(), exit, "{code:?}");
        }
    }

    #[test]
    fn a_failure_reads_object_message_what_to_do() {
        let failure =
            Failure::new(Kind::Refused, "group \"db\"", "holds no complete point yet").hint("wait for the sync");
        assert_eq!(failure.to_string(), "group \"db\": holds no complete point yet\n  to do: wait for the sync");
    }

    #[test]
    fn the_object_is_not_said_twice() {
        let failure = Failure::answered("group \"db\"", &Status::not_found("group \"db\" does not exist"));
        assert_eq!(failure.to_string(), "group \"db\" does not exist");
    }

    #[test]
    fn json_of_a_failure_is_stable() {
        let failure = Failure::new(Kind::NotFound, "proxy \"x\"", "does not exist");
        assert_eq!(
            failure.to_json().to_string(),
            r#"{"error":{"exit_code":5,"hint":"","kind":"not_found","message":"does not exist","object":"proxy \"x\""}}"#
        );
    }
}
