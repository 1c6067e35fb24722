//! Messages by the names of their fields, as their descriptors tell them: masks of updates, and what filters look at.

use std::sync::OnceLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, ReflectMessage};
use prost_types::FieldMask;

use crate::problem::Problem;

/// Most paths in a mask.
const MAX_PATHS: usize = 100;

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| DescriptorPool::decode(afterimage_wire::v1::DESCRIPTORS).expect("compiled with this program"))
}

/// A message whose fields are known by name.
pub fn dynamic<M: Message + Name>(message: &M) -> DynamicMessage {
    let descriptor = pool().get_message_by_name(&M::full_name()).expect("compiled with this program");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("a message reads as itself");
    dynamic
}

/// What an update may do with the fields of a message.
pub struct Rules<'a> {
    /// The message's field in the request, such as "policy".
    pub root: &'a str,
    /// May be changed.
    pub writable: &'a [&'a str],
    /// Must not change, and what to do instead.
    pub fixed: &'a [(&'a str, &'a str)],
}

/// The message after an update: `old` with the fields of `given` that the mask names. Without a mask these are the ones
/// that are set in it; "*" names all. Fields that are neither writable nor fixed are output only, and passed over.
///
/// # Errors
/// A path that names no field, or one that must not change and would.
pub fn update<M: Message + Name + Default>(
    old: &M,
    given: &M,
    mask: Option<&FieldMask>,
    rules: &Rules<'_>,
) -> Result<M, Problem> {
    let (mut next, given) = (dynamic(old), dynamic(given));
    let descriptor = next.descriptor();
    let paths = mask.map(|m| m.paths.as_slice()).unwrap_or_default();
    if paths.len() > MAX_PATHS {
        return Err(Problem::invalid("update_mask", paths.len(), format!("up to {MAX_PATHS} paths")));
    }
    let all = paths.iter().any(|p| p == "*");
    if all && paths.len() > 1 {
        return Err(Problem::invalid("update_mask", paths.join(","), "\"*\" alone, or names of fields"));
    }
    let named = |path: &String| -> Result<FieldDescriptor, Problem> {
        // Our messages are flat where they can be written: a path below a field is a path too far.
        descriptor.get_field_by_name(path).ok_or_else(|| {
            Problem::invalid("update_mask", path, format!("\"*\", or of these: {}", rules.writable.join(", ")))
        })
    };
    let fields: Vec<FieldDescriptor> = if paths.is_empty() || all {
        descriptor.fields().filter(|f| all || given.has_field(f)).collect()
    } else {
        paths.iter().map(named).collect::<Result<_, _>>()?
    };
    for field in fields {
        let name = field.name();
        if rules.writable.contains(&name) {
            next.clear_field(&field);
            if given.has_field(&field) {
                next.set_field(&field, given.get_field(&field).into_owned());
            }
        } else if let Some((_, instead)) = rules.fixed.iter().find(|(fixed, _)| *fixed == name)
            // One that is not set says nothing, unless it is named.
            && (given.has_field(&field) || (!all && !paths.is_empty()))
            && given.get_field(&field) != next.get_field(&field)
        {
            let value = given.get_field(&field);
            let shown = value.as_str().map_or_else(|| "another value".to_owned(), str::to_owned);
            return Err(Problem::invalid(format!("{}.{name}", rules.root), shown, *instead));
        }
    }
    Ok(next.transcode_to().expect("a message reads as itself"))
}

#[cfg(test)]
mod tests {
    use afterimage_wire::v1::{Group, Policy};

    use super::*;

    const RULES: Rules<'static> =
        Rules { root: "group", writable: &["description", "policy"], fixed: &[("source", "it cannot be changed")] };

    fn mask(paths: &[&str]) -> FieldMask {
        FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() }
    }

    fn old() -> Group {
        Group { name: "g".into(), description: "d".into(), policy: "p".into(), source: "s".into(), ..Group::default() }
    }

    #[test]
    fn only_what_the_mask_names_is_taken() {
        let given = Group { description: "new".into(), policy: "q".into(), ..old() };
        let made = update(&old(), &given, Some(&mask(&["description"])), &RULES).unwrap();
        assert_eq!(made, Group { description: "new".into(), ..old() });
        // Named and not set: cleared.
        let made = update(&old(), &Group::default(), Some(&mask(&["description"])), &RULES).unwrap();
        assert_eq!(made, Group { description: String::new(), ..old() });
    }

    #[test]
    fn without_a_mask_what_is_set_is_taken_and_with_a_star_everything() {
        let given = Group { policy: "q".into(), ..Group::default() };
        let made = update(&old(), &given, None, &RULES).unwrap();
        assert_eq!(made, Group { policy: "q".into(), ..old() });
        assert_eq!(update(&old(), &given, Some(&mask(&[])), &RULES).unwrap(), made);
        let made = update(&old(), &given, Some(&mask(&["*"])), &RULES).unwrap();
        assert_eq!(made, Group { policy: "q".into(), description: String::new(), ..old() });
    }

    #[test]
    fn output_only_fields_are_passed_over_and_fixed_ones_refused_if_they_would_change() {
        let given = Group { name: "other".into(), uid: "u".into(), ..old() };
        assert_eq!(update(&old(), &given, Some(&mask(&["name", "uid"])), &RULES).unwrap(), old());
        let given = Group { source: "t".into(), ..old() };
        let field = |m: Option<&FieldMask>| match update(&old(), &given, m, &RULES) {
            Err(Problem::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(None), "group.source");
        assert_eq!(field(Some(&mask(&["source"]))), "group.source");
        assert!(update(&old(), &given, Some(&mask(&["policy"])), &RULES).is_ok());
        assert!(update(&old(), &old(), Some(&mask(&["source"])), &RULES).is_ok());
    }

    #[test]
    fn a_path_that_is_no_field_is_refused_with_those_that_are() {
        for bad in ["nonsense", "policy.name", "", "Description", "disks.path"] {
            let refused = update(&old(), &old(), Some(&mask(&[bad])), &RULES).unwrap_err().to_string();
            assert!(refused.contains("update_mask") && refused.contains("description, policy"), "{bad}: {refused}");
        }
        assert!(update(&old(), &old(), Some(&mask(&["*", "policy"])), &RULES).is_err());
    }

    #[test]
    fn a_field_with_presence_that_is_not_set_is_cleared_by_name() {
        let rules = Rules { root: "policy", writable: &["retention_s", "lease_ms"], fixed: &[] };
        let old = Policy { retention_s: Some(60), lease_ms: Some(3000), ..Policy::default() };
        let made = update(&old, &Policy::default(), Some(&mask(&["lease_ms"])), &rules).unwrap();
        assert_eq!((made.retention_s, made.lease_ms), (Some(60), None));
        let zero = Policy { lease_ms: Some(0), ..Policy::default() };
        assert_eq!(update(&old, &zero, None, &rules).unwrap().lease_ms, Some(0));
    }
}
