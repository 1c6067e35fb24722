//! What is to be changed so that there is what the document says: found by comparing, without a call. Pure, so that it can
//! be tested.

use afterimage_wire::v1;
use prost_types::FieldMask;
use serde_json::{Value as Json, json};

use super::document::{Document, GroupText, PlanText, Value};
use crate::operator::documents::id;
use crate::operator::failure::{Failure, Kind};
use crate::operator::plan::step;

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
    /// A plan is made.
    CreatePlan(v1::Plan),
    /// A plan is changed, if it still is what was compared.
    UpdatePlan(v1::Plan, FieldMask),
}

/// One change.
#[derive(Debug)]
pub struct Change {
    /// What is done.
    pub what: What,
    /// Name of the policy, group, disk or plan.
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
            What::CreatePlan(_) | What::UpdatePlan(..) => "plan",
        }
    }

    /// Whether it is made anew.
    pub fn creates(&self) -> bool {
        matches!(self.what, What::CreatePolicy(_) | What::CreateGroup(_) | What::CreateDisk(..) | What::CreatePlan(_))
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
    /// All plans.
    pub plans: Vec<v1::Plan>,
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
    for (name, text) in &document.plan {
        changes.extend(of_plan(name, text, present.plans.iter().find(|plan| id(&plan.name) == name), &full)?);
    }
    Ok(changes)
}

/// A step as it is typed, with what the coordinator would fill in.
fn typed(step: &v1::PlanStep) -> String {
    let mut step = step.clone();
    if step.id.is_empty() {
        id(&step.group).clone_into(&mut step.id);
    }
    step::typed(&step)
}

fn of_plan(
    name: &str,
    said: &PlanText,
    found: Option<&v1::Plan>,
    full: &impl Fn(&str, &str) -> String,
) -> Result<Option<Change>, Failure> {
    let refused = |message: String| Failure::new(Kind::Usage, format!("plan \"{name}\""), message);
    let (mut wanted, mut mask, mut differences) =
        (found.cloned().unwrap_or_default(), FieldMask::default(), Vec::new());
    let mut differs = |field: &'static str, from: Option<Value>, to: Value| {
        let differs = from.as_ref() != Some(&to);
        if differs {
            mask.paths.push(field.to_owned());
            differences.push(Difference { field, from, to });
        }
        differs
    };
    if let Some(description) = &said.description
        && differs("description", found.map(|plan| text(&plan.description)), text(description))
    {
        wanted.description.clone_from(description);
    }
    if let Some(parallel) = said.parallel
        && differs("parallel", found.map(|p| Value::Number(p.parallel.into())), Value::Number(parallel.into()))
    {
        wanted.parallel = parallel;
    }
    match &said.steps {
        None if found.is_none() => {
            let hint = format!("add steps = [\"GROUP\", …] to [plan.{name}]");
            return Err(refused("is new, and the document does not say its steps".to_owned()).hint(hint));
        }
        None => {}
        Some(lines) => {
            let steps: Result<Vec<v1::PlanStep>, String> = lines.iter().map(|line| step::parse(line, full)).collect();
            let steps = steps.map_err(refused)?;
            let lines = |steps: &[v1::PlanStep]| Value::List(steps.iter().map(typed).collect());
            if differs("steps", found.map(|plan| lines(&plan.steps)), lines(&steps)) {
                wanted.steps = steps;
            }
        }
    }
    let what = match found {
        None => What::CreatePlan(wanted),
        Some(_) if differences.is_empty() => return Ok(None),
        Some(_) => What::UpdatePlan(wanted, mask),
    };
    Ok(Some(Change { what, name: name.to_owned(), differences }))
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
        let front = v1::PlanStep { id: "shop".to_owned(), group: group.name.clone(), ..Default::default() };
        let plan = v1::Plan { name: full("plans", "site"), parallel: 4, steps: vec![front], ..Default::default() };
        Present { policies: vec![policy], groups: vec![group], plans: vec![plan] }
    }

    const SAME: &str = "[policy.gold]\nrpo = '1s'\nretention = '4h'\n[group.shop]\npolicy = 'gold'\nsource = 'src'\n\
                        target = 'dr'\n[group.shop.disk.data]\npath = '/d'\n[plan.site]\nparallel = 4\nsteps = ['shop']\n";

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
    fn plans_come_last_and_are_changed_by_their_steps() {
        let text = "[plan.site]\nsteps = ['shop delay=10s']\n[plan.other]\nsteps = ['a', 'shop after=a']\n[group.a]\n\
                    policy = 'gold'\nsource = 'src'\n";
        let changes = planned(text, &present()).unwrap();
        let objects: Vec<String> = changes.iter().map(Change::object).collect();
        assert_eq!(objects, ["group \"a\"", "plan \"other\"", "plan \"site\""]);
        assert_eq!(changes[2].shown(), "~ plan \"site\"\n    steps: [shop] -> [shop delay=10s]\n");
        let What::UpdatePlan(plan, mask) = &changes[2].what else { panic!("{:?}", changes[2]) };
        assert_eq!((plan.steps[0].delay_ms, plan.parallel, mask.paths.join(",")), (10_000, 4, "steps".to_owned()));
        let refused = planned("[plan.new]\nparallel = 2\n", &present()).unwrap_err();
        assert!(refused.message.contains("steps") && refused.hint.contains("[plan.new]"), "{refused}");
        assert!(planned("[plan.site]\nsteps = ['shop soon']\n", &present()).unwrap_err().message.contains("`soon`"));
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
