//! Names of resources: `tenants/default/groups/shop`. Parsed once where they enter, typed from there on.

use std::fmt;

use crate::problem::Problem;

/// The tenant that is there from the start.
pub const DEFAULT_TENANT: &str = "default";

/// Longest id in a name, characters.
pub const MAX_ID: usize = 63;

/// What an id may be, for error messages.
pub const ID_RULE: &str = "1 to 63 characters of a-z, 0-9 and \"-\", beginning with a letter or digit";

/// Whether `id` may be part of a name: see [`ID_RULE`].
pub fn is_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= MAX_ID
        && bytes[0] != b'-'
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// Checks an id that is to become part of a name.
///
/// # Errors
/// Names `field`, the value and [`ID_RULE`].
pub fn check_id(field: &str, id: &str) -> Result<(), Problem> {
    if is_id(id) { Ok(()) } else { Err(Problem::invalid(field, id, ID_RULE)) }
}

/// The kinds of objects that live right under a tenant.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// `policies`
    Policy,
    /// `groups`
    Group,
    /// `proxies`
    Proxy,
    /// `operations`
    Operation,
    /// `machines`
    Machine,
    /// `plans`
    Plan,
}

impl Kind {
    /// The collection's part of the name.
    pub fn collection(self) -> &'static str {
        match self {
            Self::Policy => "policies",
            Self::Group => "groups",
            Self::Proxy => "proxies",
            Self::Operation => "operations",
            Self::Machine => "machines",
            Self::Plan => "plans",
        }
    }

    /// For messages.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Group => "group",
            Self::Proxy => "proxy",
            Self::Operation => "operation",
            Self::Machine => "machine",
            Self::Plan => "plan",
        }
    }
}

/// `tenants/<tenant>/<collection>/<id>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Name {
    /// Tenant.
    pub tenant: String,
    /// Which collection.
    pub kind: Kind,
    /// Id within it.
    pub id: String,
}

impl Name {
    /// Puts a name together; the parts have been checked.
    pub fn new(tenant: impl Into<String>, kind: Kind, id: impl Into<String>) -> Self {
        Self { tenant: tenant.into(), kind, id: id.into() }
    }

    /// Reads a name of this kind.
    ///
    /// # Errors
    /// Names `field`, the value and the pattern.
    pub fn parse(field: &str, kind: Kind, name: &str) -> Result<Self, Problem> {
        let parts: Vec<&str> = name.split('/').collect();
        match parts[..] {
            ["tenants", tenant, collection, id] if collection == kind.collection() && is_id(tenant) && is_id(id) => {
                Ok(Self::new(tenant, kind, id))
            }
            _ => Err(Problem::invalid(field, name, format!("\"tenants/<tenant>/{}/<id>\"", kind.collection()))),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenants/{}/{}/{}", self.tenant, self.kind.collection(), self.id)
    }
}

/// Reads `tenants/<tenant>`.
///
/// # Errors
/// Names `field`, the value and the pattern.
pub fn parse_tenant(field: &str, name: &str) -> Result<String, Problem> {
    match name.strip_prefix("tenants/") {
        Some(tenant) if is_id(tenant) => Ok(tenant.to_owned()),
        _ => Err(Problem::invalid(field, name, "\"tenants/<tenant>\"")),
    }
}

/// `tenants/<tenant>`.
pub fn tenant(tenant: &str) -> String {
    format!("tenants/{tenant}")
}

/// Something under a group: `tenants/<tenant>/groups/<group>/<collection>/<id>`; its two ends.
///
/// # Errors
/// Names `field`, the value and the pattern.
pub fn parse_child(field: &str, collection: &str, name: &str) -> Result<(Name, String), Problem> {
    let parts: Vec<&str> = name.split('/').collect();
    match parts[..] {
        ["tenants", tenant, "groups", group, found, id]
            if found == collection && is_id(tenant) && is_id(group) && is_id(id) =>
        {
            Ok((Name::new(tenant, Kind::Group, group), id.to_owned()))
        }
        _ => Err(Problem::invalid(field, name, format!("\"tenants/<tenant>/groups/<group>/{collection}/<id>\""))),
    }
}

/// The name of something under a group.
pub fn child(group: &Name, collection: &str, id: impl fmt::Display) -> String {
    format!("{group}/{collection}/{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_reads_back_as_it_was_written() {
        let name = Name::new("default", Kind::Group, "shop-1");
        assert_eq!(name.to_string(), "tenants/default/groups/shop-1");
        assert_eq!(Name::parse("name", Kind::Group, &name.to_string()), Ok(name.clone()));
        let disk = child(&name, "disks", "data");
        assert_eq!(parse_child("name", "disks", &disk), Ok((name, "data".to_owned())));
    }

    #[test]
    fn hostile_names_are_refused_with_field_value_and_rule() {
        for bad in ["", "shop", "tenants/default/groups/", "tenants/default/groups/A", "tenants/default/groups/a/b"] {
            let problem = Name::parse("group", Kind::Group, bad).unwrap_err();
            let text = problem.to_string();
            assert!(text.contains("group") && text.contains("tenants/<tenant>/groups/<id>"), "{text}");
        }
        assert!(Name::parse("x", Kind::Policy, "tenants/default/groups/a").is_err());
        assert!(parse_child("x", "disks", "tenants/a/groups/b/disks/../c").is_err());
    }

    #[test]
    fn ids_are_bounded() {
        assert!(is_id("a") && is_id("0-a") && is_id(&"a".repeat(63)));
        assert!(!is_id("") && !is_id("-a") && !is_id("a_b") && !is_id("ä") && !is_id(&"a".repeat(64)));
    }
}
