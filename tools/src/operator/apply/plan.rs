//! What is to be changed so that there is what the document says: found by comparing, without a call. Pure, so that it can
//! be tested.

use afterimage_wire::v1;
use prost_types::FieldMask;
use serde_json::{Value as Json, json};

use super::document::{Document, GroupText, Value};
use crate::operator::documents::id;
use crate::operator::failure::{Failure, Kind};

/// A field that changes.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    /// As the document calls it.
    pub field: &'static str,
    /// What there is; none for what is made anew.
    pub from: Option<Value>,
    /// What there is to be.
    pub to: Value,
}

/// What is done.
#[derive(Debug)]
pub enum What {
    /// A policy is made.
    CreatePolicy(v1::Policy),
    /// A policy is changed, if it still is what was compared.
    UpdatePolicy(v1::Policy, FieldMask),
    /// A group is made, with its disks.
    CreateGroup(v1::Group),
    /// A group is changed, if it still is what was compared.
    UpdateGroup(v1::Group, FieldMask),
    /// A disk joins a group that is there.
    CreateDisk(String, v1::Disk),
}

/// One change.
#[derive(Debug)]
pub struct Change {
    /// What is done.
    pub what: What,
    /// Name of the policy, group or disk.
    pub name: String,
    /// Its fields.
    pub differences: Vec<Difference>,
}

impl Change {
    /// What sort of object.
    pub fn kind(&self) -> &'static str {
        match self.what {
            What::CreatePolicy(_) | What::UpdatePolicy(..) => "policy",
            What::CreateGroup(_) | What::UpdateGroup(..) => "group",
            What::CreateDisk(..) => "disk",
        }
    }

    /// Whether it is made anew.
    pub fn creates(&self) -> bool {
        matches!(self.what, What::CreatePolicy(_) | What::CreateGroup(_) | What::CreateDisk(..))
    }

    /// As messages call it.
    pub fn object(&self) -> String {
        match &self.what {
            What::CreateDisk(group, _) => format!("disk \"{}\" of group \"{group}\"", self.name),
            _ => format!("{} \"{}\"", self.kind(), self.name),
        }
    }

    /// Lines as of a diff.
    pub fn shown(&self) -> String {
        let mut text = format!("{} {}\n", if self.creates() { "+" } else { "~" }, self.object());
        for difference in &self.differences {
            text += &match &difference.from {
                Some(from) => format!("    {}: {from} -> {}\n", difference.field, difference.to),
                None => format!("    {}: {}\n", difference.field, difference.to),
            };
        }
        text
    }

    /// For programs.
    pub fn to_json(&self, state: &str) -> Json {
        let group = match &self.what {
            What::CreateDisk(group, _) => Json::from(group.clone()),
            _ => Json::Null,
        };
        json!({
            "change": if self.creates() { "create" } else { "update" },
            "kind": self.kind(),
            "name": self.name,
            "group": group,
            "state": state,
            "fields": self.differences.iter().map(|d| json!({
                "field": d.field,
                "from": d.from.as_ref().map(ToString::to_string),
                "to": d.to.to_string(),
            })).collect::<Vec<_>>(),
        })
    }
}

/// What there is.
#[derive(Debug, Default)]
pub struct Present {
    /// All policies.
    pub policies: Vec<v1::Policy>,
    /// All groups.
    pub groups: Vec<v1::Group>,
}

/// All changes, in the order in which they can be done. `full` makes a name of a collection and an id.
///
/// # Errors
/// What the document says cannot be reached by changing what there is.
pub fn plan(
    document: &Document,
    present: &Present,
    full: impl Fn(&str, &str) -> String,
) -> Result<Vec<Change>, Failure> {
    let mut changes = Vec::new();
    for (name, text) in &document.policy {
        let said = text.said(name)?;
        let found = present.policies.iter().find(|policy| id(&policy.name) == name);
        let mut policy = found.cloned().unwrap_or_default();
        let mut mask = FieldMask::default();
        let mut differences = Vec::new();
        for (field, to) in said {
            let from = found.map(|policy| (field.kept)(policy));
            if from.as_ref() == Some(&to) {
                continue;
            }
            (field.set)(&mut policy, &to);
            mask.paths.push(field.path.to_owned());
            differences.push(Difference { field: field.name, from, to });
        }
        let what = match found {
            None => What::CreatePolicy(policy),
            Some(_) if differences.is_empty() => continue,
            Some(_) => What::UpdatePolicy(policy, mask),
        };
        changes.push(Change { what, name: name.clone(), differences });
    }
    // Groups that are made come before those that are changed: nothing of what there is gives way first.
    let mut later = Vec::new();
    for (name, text) in &document.group {
        match present.groups.iter().find(|group| id(&group.name) == name) {
            None => changes.push(created(name, text, &full)?),
            Some(group) => later.extend(changed(name, text, group, &full)?),
        }
    }
    changes.extend(later);
    Ok(changes)
}

fn text(value: &str) -> Value {
    Value::Text(value.to_owned())
}

fn created(name: &str, said: &GroupText, full: &impl Fn(&str, &str) -> String) -> Result<Change, Failure> {
    let missing = |field: &str| {
        Failure::new(
            Kind::Usage,
            format!("group \"{name}\""),
            format!("is new, and the document does not say its {field}"),
        )
        .hint(format!("add {field} = \"…\" to [group.{name}]"))
    };
    let policy = said.policy.as_deref().ok_or_else(|| missing("policy"))?;
    let source = said.source.as_deref().ok_or_else(|| missing("source"))?;
    // Without one the coordinator chooses.
    let target = said.target.as_deref();
    let mut differences = Vec::new();
    if let Some(description) = &said.description {
        differences.push(Difference { field: "description", from: None, to: text(description) });
    }
    let named = [("policy", Some(policy)), ("source", Some(source)), ("target", target)];
    for (field, value) in named.into_iter().filter_map(|(field, value)| Some((field, value?))) {
        differences.push(Difference { field, from: None, to: text(value) });
    }
    let mut disks = Vec::new();
    for (id, disk) in &said.disk {
        disks.push(disk.disk(name, id)?);
        differences.push(Difference { field: "disk", from: None, to: text(&format!("{id}={}", disk.path)) });
    }
    let group = v1::Group {
        policy: full("policies", policy),
        source: full("proxies", source),
        target: target.map(|target| full("proxies", target)).unwrap_or_default(),
        description: said.description.clone().unwrap_or_default(),
        disks,
        ..Default::default()
    };
    Ok(Change { what: What::CreateGroup(group), name: name.to_owned(), differences })
}

fn changed(
    name: &str,
    said: &GroupText,
    group: &v1::Group,
    full: &impl Fn(&str, &str) -> String,
) -> Result<Vec<Change>, Failure> {
    let object = format!("group \"{name}\"");
    for (field, wanted, kept) in [("source", &said.source, &group.source), ("target", &said.target, &group.target)] {
        if let Some(wanted) = wanted.as_deref().filter(|wanted| *wanted != id(kept)) {
            let message =
                format!("its {field} is {}, and the document says {wanted}: that is not changed here", id(kept));
            return Err(Failure::new(Kind::Refused, object, message)
                .hint(format!("say {field} = \"{}\" in the document, or take the line out", id(kept))));
        }
    }
    let (mut wanted, mut mask, mut differences) = (group.clone(), FieldMask::default(), Vec::new());
    if let Some(policy) = said.policy.as_deref().filter(|policy| *policy != id(&group.policy)) {
        wanted.policy = full("policies", policy);
        mask.paths.push("policy".to_owned());
        differences.push(Difference { field: "policy", from: Some(text(id(&group.policy))), to: text(policy) });
    }
    if let Some(description) = said.description.as_ref().filter(|text| **text != group.description) {
        wanted.description.clone_from(description);
        mask.paths.push("description".to_owned());
        let from = Some(text(&group.description));
        differences.push(Difference { field: "description", from, to: text(description) });
    }
    let mut changes = Vec::new();
    if !differences.is_empty() {
        changes.push(Change { what: What::UpdateGroup(wanted, mask), name: name.to_owned(), differences });
    }
    for (disk_id, said) in &said.disk {
        let disk = said.disk(name, disk_id)?;
        match group.disks.iter().find(|disk| id(&disk.name) == disk_id) {
            Some(there) => same(&object, disk_id, &disk, there)?,
            None => {
                let differences = vec![Difference { field: "path", from: None, to: text(&disk.path) }];
                let what = What::CreateDisk(name.to_owned(), disk);
                changes.push(Change { what, name: disk_id.clone(), differences });
            }
        }
    }
    Ok(changes)
}

/// A disk is what it is: another path is another disk. A seed is for the first synchronisation only.
fn same(object: &str, name: &str, said: &v1::Disk, there: &v1::Disk) -> Result<(), Failure> {
    let number =
        |wanted: u64, kept: u64| (wanted != 0 && wanted != kept).then(|| (kept.to_string(), wanted.to_string()));
    let word =
        |wanted: &str, kept: &str| (!wanted.is_empty() && wanted != kept).then(|| (kept.to_owned(), wanted.to_owned()));
    let differs = [
        ("path", word(&said.path, &there.path)),
        ("serial", word(&said.serial, &there.serial)),
        ("export", word(&said.export_name, &there.export_name)),
        ("size", number(said.size_bytes, there.size_bytes)),
        ("block", number(said.block_bytes.into(), there.block_bytes.into())),
    ];
    for (field, differs) in differs {
        if let Some((kept, wanted)) = differs {
            let message = format!("disk {name}: its {field} is {kept}, and the document says {wanted}");
            return Err(Failure::new(Kind::Refused, object, message)
                .hint("a disk is not changed by this: take it out by `afterimage disk remove`, or mend the document"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(kind: &str, id: &str) -> String {
        format!("tenants/default/{kind}/{id}")
    }

    fn planned(text: &str, present: &Present) -> Result<Vec<Change>, Failure> {
        plan(&Document::parse("x", text).unwrap(), present, full)
    }

    fn present() -> Present {
        let policy = v1::Policy {
            name: full("policies", "gold"),
            etag: "e1".to_owned(),
            rpo_target_us: Some(1_000_000),
            retention_s: Some(14_400),
            ..Default::default()
        };
        let disk = v1::Disk { name: full("groups", "shop/disks/data"), path: "/d".to_owned(), ..Default::default() };
        let group = v1::Group {
            name: full("groups", "shop"),
            etag: "e2".to_owned(),
            policy: policy.name.clone(),
            source: full("proxies", "src"),
            target: full("proxies", "dr"),
            disks: vec![disk],
            ..Default::default()
        };
        Present { policies: vec![policy], groups: vec![group] }
    }

    const SAME: &str = "[policy.gold]\nrpo = '1s'\nretention = '4h'\n[group.shop]\npolicy = 'gold'\nsource = 'src'\n\
                        target = 'dr'\n[group.shop.disk.data]\npath = '/d'\n";

    #[test]
    fn what_is_so_already_is_no_change() {
        assert!(planned(SAME, &present()).unwrap().is_empty());
    }

    #[test]
    fn policies_come_first_then_groups_then_disks_and_all_are_shown() {
        let text = "[policy.gold]\nrpo = '500ms'\n[policy.new]\nlease = '5s'\n[group.a]\npolicy = 'new'\nsource = 'src'\n\
                    target = 'dr'\n[group.a.disk.x]\npath = '/x'\n[group.shop]\npolicy = 'new'\n[group.shop.disk.y]\npath = '/y'\n";
        let changes = planned(text, &present()).unwrap();
        let objects: Vec<String> = changes.iter().map(Change::object).collect();
        let expected =
            ["policy \"gold\"", "policy \"new\"", "group \"a\"", "group \"shop\"", "disk \"y\" of group \"shop\""];
        assert_eq!(objects, expected);
        let shown: String = changes.iter().map(Change::shown).collect();
        assert!(shown.contains("~ policy \"gold\"\n    rpo: 1s -> 500ms\n"), "{shown}");
        assert!(shown.contains("+ group \"a\"\n    policy: new\n") && shown.contains("policy: gold -> new"), "{shown}");
        let What::UpdatePolicy(policy, mask) = &changes[0].what else { panic!("{:?}", changes[0]) };
        assert_eq!((policy.etag.as_str(), mask.paths.as_slice()), ("e1", ["rpo_target_us".to_owned()].as_slice()));
    }

    #[test]
    fn what_cannot_be_changed_is_refused_with_what_there_is() {
        for (text, word) in [
            (SAME.replace("'src'", "'other'"), "its source is src"),
            (SAME.replace("'dr'", "'other'"), "its target is dr"),
            (SAME.replace("'/d'", "'/e'"), "its path is /d"),
        ] {
            let refused = planned(&text, &present()).unwrap_err();
            assert!(refused.kind == Kind::Refused && refused.message.contains(word), "{refused}");
        }
        let refused = planned("[group.b]\npolicy = 'gold'\n", &present()).unwrap_err();
        assert!(refused.message.contains("source") && refused.hint.contains("[group.b]"), "{refused}");
    }
}
