//! Between the API's messages and the coordinator's own types.

use afterimage_wire::v1;

use crate::ca::Role;

/// A role of the API; none if it is unspecified.
pub fn role_from_proto(role: v1::Role) -> Option<Role> {
    match role {
        v1::Role::Unspecified => None,
        v1::Role::Proxy => Some(Role::Proxy),
        v1::Role::Viewer => Some(Role::Viewer),
        v1::Role::Operator => Some(Role::Operator),
        v1::Role::Admin => Some(Role::Admin),
    }
}

/// A role for the API.
pub fn role_to_proto(role: Role) -> v1::Role {
    match role {
        Role::Proxy => v1::Role::Proxy,
        Role::Viewer => v1::Role::Viewer,
        Role::Operator => v1::Role::Operator,
        Role::Admin => v1::Role::Admin,
    }
}
