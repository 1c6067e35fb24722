//! What the coordinator refuses, and how it says so: a kind to match on, the field, the value, what is allowed.

/// A call that is refused. `grpc::errors` turns it into a status with the same content in its details.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A field holds what it may not.
    #[error("{field} is {value:?}; allowed: {allowed}")]
    Invalid {
        /// The field, by its path in the request.
        field: String,
        /// What was given.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// Something that a request names does not exist.
    #[error("no {kind} {name:?}")]
    NotFound {
        /// "group", "policy", …
        kind: String,
        /// Its name.
        name: String,
    },
    /// The name, path or the like is taken.
    #[error("{field} {value:?} is taken: {by}")]
    Exists {
        /// The field.
        field: String,
        /// What was given.
        value: String,
        /// By what.
        by: String,
    },
    /// The state does not allow it now.
    #[error("{subject} is {state}: {remedy}")]
    State {
        /// What is in that state.
        subject: String,
        /// The state, and why that is in the way.
        state: String,
        /// What does fit, or what to do.
        remedy: String,
    },
    /// It has changed since the caller read it.
    #[error("{subject} has changed: its etag is {found}, not {given}; read it again")]
    Changed {
        /// The object.
        subject: String,
        /// As given.
        given: String,
        /// As found.
        found: String,
    },
    /// A bound is reached.
    #[error("{what}: at most {limit}")]
    Limit {
        /// What there would be too many of.
        what: String,
        /// The bound.
        limit: u64,
    },
    /// Who asks may not.
    #[error("{who} may not call {method}: {needs}")]
    Denied {
        /// The caller.
        who: String,
        /// The method.
        method: String,
        /// What it takes.
        needs: String,
    },
    /// Nobody knows who asks.
    #[error("a caller without a certificate may not call {method}: {needs}")]
    Anonymous {
        /// The method.
        method: String,
        /// What it takes.
        needs: String,
    },
    /// The caller's certificate is not good any more.
    #[error("the certificate of {who} {state}: {remedy}")]
    Certificate {
        /// The caller.
        who: String,
        /// Since when, and why.
        state: String,
        /// What to do.
        remedy: String,
        /// By which programs tell it: "CERTIFICATE_EXPIRED", …
        reason: &'static str,
    },
    /// Who asks has asked too often.
    #[error(
        "{who} has made more calls than it may: {per_s} a second, {burst} at once; try again after {} ms",
        after.as_millis()
    )]
    TooFast {
        /// The caller.
        who: String,
        /// Calls a second that it has.
        per_s: u32,
        /// Calls at once that it has.
        burst: u32,
        /// When there is one again.
        after: std::time::Duration,
    },
    /// There is no such method.
    #[error("there is no method {method}")]
    NoMethod {
        /// As called.
        method: String,
    },
    /// A proxy that is needed did not answer, or does not answer in time.
    #[error("{proxy}: {detail}")]
    Unreachable {
        /// The proxy.
        proxy: String,
        /// What happened, and what to do.
        detail: String,
    },
    /// A proxy answered that it cannot.
    #[error("{proxy}: {detail}")]
    Refused {
        /// The proxy.
        proxy: String,
        /// As it says.
        detail: String,
    },
    /// The store or the keys failed.
    #[error("{0}")]
    Internal(String),
}

impl Problem {
    /// A field that holds what it may not.
    pub fn invalid(field: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> Self {
        // What is echoed is bounded: the value comes from outside.
        let mut value = value.to_string();
        if value.len() > 200 {
            value.truncate(crate::text::head(&value, 200).len());
            value.push('…');
        }
        Self::Invalid { field: field.into(), value, allowed: allowed.into() }
    }

    /// Something that is not there.
    pub fn not_found(kind: impl Into<String>, name: impl ToString) -> Self {
        Self::NotFound { kind: kind.into(), name: name.to_string() }
    }

    /// A state that is in the way.
    pub fn state(subject: impl ToString, state: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::State { subject: subject.to_string(), state: state.into(), remedy: remedy.into() }
    }
}
