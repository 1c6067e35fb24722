//! `afterimage apply`: what a document says is brought about, and nothing else.
//!
//! The document is compared with what there is ([`mod@plan`]); the difference is shown and asked about; all of it is checked
//! by the coordinator before any of it is done. An object is changed only if it still is what was compared (etags). Nothing
//! is ever deleted, moved or started over: what is not in the document stays as it is.

use std::io::Read as _;
use std::path::PathBuf;

use afterimage_wire::v1;
use clap::Args;
use serde_json::json;
use uuid::Uuid;

use super::documents::id;
use super::failure::{Failure, Kind};
use super::output::put;
use super::session::{Session, every};
use document::Document;
use plan::{Change, Present, What, plan};

mod document;
mod plan;

/// Largest document, bytes.
const MAX_DOCUMENT: u64 = 16 << 20;

/// Options of `afterimage apply`.
#[derive(Args, Debug)]
pub struct Apply {
    /// A document; "-" for standard input; may be given many times.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Show the difference and check it; exit with 7 if there is one.
    #[arg(long)]
    dry_run: bool,
}

/// Applies it.
///
/// # Errors
/// The document, or what the coordinator says to it; with `--dry-run`, that there is a difference.
pub async fn run(args: Apply, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    let document = read(&args.files)?;
    let request = v1::ListPoliciesRequest { parent: session.tenant(), ..Default::default() };
    let policies: Vec<v1::Policy> = every!(session, "policies", policies.list_policies(request).policies);
    let request = v1::ListGroupsRequest { parent: session.tenant(), ..Default::default() };
    let groups: Vec<v1::Group> = every!(session, "groups", groups.list_groups(request).groups);
    let request = v1::ListPlansRequest { parent: session.tenant(), ..Default::default() };
    let plans: Vec<v1::Plan> = every!(session, "plans", plans.list_plans(request).plans);
    let present = Present { policies, groups, plans };
    let tenant = session.tenant();
    let changes = plan(&document, &present, |kind, id| format!("{tenant}/{kind}/{id}"))?;
    let diff: String = changes.iter().map(Change::shown).collect();
    if !out.json {
        put(if changes.is_empty() { "nothing to change\n" } else { &diff });
    }
    // A group whose policy is yet to be made cannot be judged by the coordinator before that.
    let waits = |change: &Change| match &change.what {
        What::CreateGroup(group) | What::UpdateGroup(group, _) => {
            !present.policies.iter().any(|policy| policy.name == group.policy)
                && document.policy.contains_key(id(&group.policy))
        }
        // Nor a plan, before its groups are made.
        What::CreatePlan(plan) | What::UpdatePlan(plan, _) => plan.steps.iter().any(|step| {
            !present.groups.iter().any(|group| group.name == step.group) && document.group.contains_key(id(&step.group))
        }),
        _ => false,
    };
    for change in changes.iter().filter(|change| !waits(change)) {
        give(session, change, true).await?;
    }
    if args.dry_run {
        tell(session, &changes, "planned", true);
        return match changes.len() {
            0 => Ok(()),
            n => Err(Failure::new(Kind::Different, "", format!("{n} to change; nothing was changed"))),
        };
    }
    if changes.is_empty() {
        tell(session, &changes, "done", false);
        return Ok(());
    }
    out.confirm("apply", &format!("{} to change, as shown above.", changes.len()))?;
    let first = made_first(session, &changes, waits).await?;
    let mut done = first;
    for change in changes.iter().filter(|change| !matches!(change.what, What::CreatePolicy(_))) {
        if let Err(mut failure) = give(session, change, false).await {
            failure.message += &format!("; {done} of {} were done before", changes.len());
            if failure.hint.is_empty() {
                failure.hint = "the same command goes on from there".to_owned();
            }
            return Err(failure);
        }
        done += 1;
    }
    tell(session, &changes, "done", false);
    out.note(&format!("{done} changed"));
    Ok(())
}

fn read(files: &[PathBuf]) -> Result<Document, Failure> {
    let mut all = Document::default();
    for path in files {
        let name = path.display().to_string();
        let mut text = String::new();
        let opened: std::io::Result<Box<dyn std::io::Read>> = match name.as_str() {
            "-" => Ok(Box::new(std::io::stdin())),
            _ => std::fs::File::open(path).map(|file| Box::new(file) as _),
        };
        let got = opened.and_then(|from| from.take(MAX_DOCUMENT + 1).read_to_string(&mut text));
        match got {
            Ok(bytes) if bytes as u64 > MAX_DOCUMENT => {
                return Err(Failure::usage(format!("document {name} has more than {MAX_DOCUMENT} bytes")));
            }
            Ok(_) => all.add(&name, Document::parse(&name, &text)?)?,
            Err(error) => {
                return Err(Failure::new(Kind::Usage, format!("document {name}"), format!("cannot be read: {error}")));
            }
        }
    }
    Ok(all)
}

/// Makes the new policies, then has the groups that name them checked. If one is refused the policies, which nobody names
/// yet, are taken back: nothing has changed.
async fn made_first(session: &Session, changes: &[Change], waits: impl Fn(&Change) -> bool) -> Result<usize, Failure> {
    let mut made = Vec::new();
    let mut refused = None;
    for change in changes.iter().filter(|change| matches!(change.what, What::CreatePolicy(_))) {
        match give(session, change, false).await {
            Ok(()) => made.push(change),
            Err(failure) => {
                refused = Some(failure);
                break;
            }
        }
    }
    if refused.is_none() {
        // A plan waits for groups, which are made later.
        for change in changes.iter().filter(|change| waits(change) && change.kind() != "plan") {
            if let Err(failure) = give(session, change, true).await {
                refused = Some(failure);
                break;
            }
        }
    }
    let Some(mut failure) = refused else { return Ok(made.len()) };
    let mut left = Vec::new();
    for change in made {
        let request = v1::DeletePolicyRequest { name: session.policy(&change.name), ..Default::default() };
        if session.ask(change.object(), session.policies().delete_policy(request)).await.is_err() {
            left.push(change.name.as_str());
        }
    }
    failure.message += &if left.is_empty() {
        "; nothing was changed".to_owned()
    } else {
        format!("; nothing was changed but that there are now the policies {}", left.join(", "))
    };
    Err(failure)
}

/// Does a change, or has it checked.
async fn give(session: &Session, change: &Change, validate_only: bool) -> Result<(), Failure> {
    let request_id = if validate_only { String::new() } else { Uuid::new_v4().to_string() };
    let (parent, object) = (session.tenant(), change.object());
    match &change.what {
        What::CreatePolicy(policy) => {
            let (policy, policy_id) = (Some(policy.clone()), change.name.clone());
            let request = v1::CreatePolicyRequest { parent, policy_id, policy, validate_only, request_id };
            session.ask(object, session.policies().create_policy(request)).await.map(drop)
        }
        What::UpdatePolicy(policy, mask) => {
            let (policy, update_mask) = (Some(policy.clone()), Some(mask.clone()));
            let request = v1::UpdatePolicyRequest { policy, validate_only, update_mask, request_id };
            session.ask(object, session.policies().update_policy(request)).await.map(drop)
        }
        What::CreateGroup(group) => {
            let (group, group_id) = (Some(group.clone()), change.name.clone());
            let request = v1::CreateGroupRequest { parent, group_id, group, validate_only, request_id };
            session.ask(object, session.groups().create_group(request)).await.map(drop)
        }
        What::UpdateGroup(group, mask) => {
            let (group, update_mask) = (Some(group.clone()), Some(mask.clone()));
            let request = v1::UpdateGroupRequest { group, validate_only, update_mask, request_id };
            session.ask(object, session.groups().update_group(request)).await.map(drop)
        }
        What::CreateDisk(group, disk) => {
            let (disk, disk_id) = (Some(disk.clone()), change.name.clone());
            let request =
                v1::CreateDiskRequest { parent: session.group(group), disk_id, disk, validate_only, request_id };
            session.ask(object, session.groups().create_disk(request)).await.map(drop)
        }
        What::CreatePlan(plan) => {
            let (plan, plan_id) = (Some(plan.clone()), change.name.clone());
            let request = v1::CreatePlanRequest { parent, plan_id, plan, validate_only, request_id };
            session.ask(object, session.plans().create_plan(request)).await.map(drop)
        }
        What::UpdatePlan(plan, mask) => {
            let (plan, update_mask) = (Some(plan.clone()), Some(mask.clone()));
            let request = v1::UpdatePlanRequest { plan, validate_only, update_mask, request_id };
            session.ask(object, session.plans().update_plan(request)).await.map(drop)
        }
    }
}

fn tell(session: &Session, changes: &[Change], state: &str, dry_run: bool) {
    if session.out.json {
        let changes: Vec<_> = changes.iter().map(|change| change.to_json(state)).collect();
        session.out.show(&json!({"changes": changes, "dry_run": dry_run}), String::new);
    }
}
