//! `afterimage group`: machines whose disks share one history.

use afterimage_wire::v1;
use clap::Subcommand;
use uuid::Uuid;

use super::documents::{self, id, phase_word};
use super::failure::{Failure, Kind};
use super::output::{fields, state, table, text};
use super::session::{Session, Which, every};
use super::values::{show_count, show_size, show_time};
use super::{disk, pause, phase_mood};

/// Verbs of `afterimage group`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Create a group and protect its disks from now on.
    #[command(after_help = "Examples:\n  \
        afterimage group create shop --policy gold --source src --target dr \\\n      \
            --disk data=/dev/vg0/data --disk logs=/dev/vg0/logs\n  \
        afterimage group create shop --policy gold --source src --disk data=/dev/vg0/data\n\n\
        Without --target one is chosen by room, load and site; see afterimage placement explain.\n\
        A disk is NAME=PATH, then what is not to be the default: size=10GiB, block=4K, serial=S1, export=X,\n\
        as in --disk data=/dev/vg0/data,block=4K. PATH is on the source proxy's host.")]
    Create {
        /// The group's name: a-z, 0-9 and "-", at most 63 characters.
        group: String,
        /// The policy that says what is promised.
        #[arg(long)]
        policy: String,
        /// The proxy that stands at the disks.
        #[arg(long, value_name = "PROXY")]
        source: String,
        /// The proxy that keeps the journal [default: the one that fits best].
        #[arg(long, value_name = "PROXY")]
        target: Option<String>,
        /// A disk; may be given many times.
        #[arg(long = "disk", value_name = "NAME=PATH", value_parser = disk::written)]
        disks: Vec<v1::Disk>,
        /// For people.
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// List the groups.
    #[command(after_help = "Examples:\n  \
        afterimage group list\n  \
        afterimage group list --filter 'phase = PHASE_PROTECTED AND disks.path:\"/dev/vg0/*\"'")]
    List {
        #[command(flatten)]
        which: Which,
    },
    /// Show one group with its disks.
    Show {
        /// The group's name.
        group: String,
    },
    /// Give a group another policy or description.
    #[command(after_help = "Examples:\n  afterimage group update shop --policy silver")]
    Update {
        /// The group's name.
        group: String,
        /// The policy that says what is promised from now on.
        #[arg(long)]
        policy: Option<String>,
        /// For people.
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// Show what the source's disks hold that the target may not: after a failover, the losing branch.
    #[command(after_help = "Examples:\n  \
        afterimage group branch shop\n  \
        afterimage group branch shop --export /var/tmp/shop-branch    sparse images, on the source's host")]
    Branch {
        /// The group's name.
        group: String,
        /// Write it to this folder on the source's host: one sparse image for each disk, and branch.json. Only while
        /// the source is held.
        #[arg(long, value_name = "FOLDER")]
        export: Option<String>,
    },
    /// Send nothing of a group until it is resumed. Its hosts go on, and nothing that they write is forgotten.
    #[command(after_help = "Examples:\n  \
        afterimage group pause shop --reason 'new switch at the target'\n  \
        afterimage group resume shop\n\n\
        What is written queues at the source, in memory and then in its spill: no restore point is lost while it fits.\n\
        Then it is noted which blocks differ, and the points of that time are left out. The RPO grows without an alarm.\n\
        While it is paused failover start fits, to what the target holds; failover planned does not.")]
    Pause(pause::Pause),
    /// Send what has been written since a group was paused, and what follows.
    #[command(after_help = "Examples:\n  afterimage group resume shop")]
    Resume(pause::Resume),
    /// End the protection of a group. Its source disks stay as they are.
    #[command(after_help = "Examples:\n  \
        afterimage group delete shop                    the target keeps the journal\n  \
        afterimage group delete shop --delete-points    every restore point goes")]
    Delete {
        /// The group's name.
        group: String,
        /// Delete its restore points as well.
        #[arg(long)]
        delete_points: bool,
        /// Go on although one of its proxies is not connected.
        #[arg(long)]
        force: bool,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::Create { group, policy, source, target, disks, description, dry_run } => {
            let request = v1::CreateGroupRequest {
                parent: session.tenant(),
                group_id: group.clone(),
                group: Some(v1::Group {
                    policy: session.policy(&policy),
                    source: session.proxy(&source),
                    target: target.map(|target| session.proxy(&target)).unwrap_or_default(),
                    disks,
                    description: description.unwrap_or_default(),
                    ..Default::default()
                }),
                validate_only: dry_run,
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&group), session.groups().create_group(request)).await?;
            out.show(&documents::group(&made), || shown(&made));
            if !dry_run {
                out.note(&format!("it is being synchronised now; watch it: afterimage watch {group}"));
            }
        }
        Verb::List { which } => {
            let request =
                v1::ListGroupsRequest { parent: session.tenant(), filter: which.filter, ..Default::default() };
            let groups: Vec<v1::Group> = every!(session, "groups", groups.list_groups(request).groups);
            let document = groups.iter().map(documents::group).collect::<Vec<_>>();
            out.show(&serde_json::json!({"groups": document}), || listed(&groups));
        }
        Verb::Show { group } => {
            let found = get(session, &group).await?;
            out.show(&documents::group(&found), || shown(&found));
        }
        Verb::Update { group, policy, description, dry_run } => {
            if policy.is_none() && description.is_none() {
                return Err(Failure::new(Kind::Usage, object(&group), "nothing to change was given")
                    .hint("name what changes: --policy, --description"));
            }
            let mut wanted = get(session, &group).await?;
            let mut paths = Vec::new();
            if let Some(policy) = policy {
                wanted.policy = session.policy(&policy);
                paths.push("policy".to_owned());
            }
            if let Some(description) = description {
                wanted.description = description;
                paths.push("description".to_owned());
            }
            let request = v1::UpdateGroupRequest {
                group: Some(wanted),
                validate_only: dry_run,
                update_mask: Some(prost_types::FieldMask { paths }),
                request_id: Uuid::new_v4().to_string(),
            };
            let made = session.ask(object(&group), session.groups().update_group(request)).await?;
            out.show(&documents::group(&made), || shown(&made));
        }
        Verb::Branch { group, export } => {
            let request = v1::InspectBranchRequest {
                group: session.group(&group),
                export_to: export.unwrap_or_default(),
                ..Default::default()
            };
            let branch = session.ask(object(&group), session.groups().inspect_branch(request)).await?;
            out.show(&documents::branch(&branch), || branched(&branch));
        }
        Verb::Pause(args) => pause::pause(args, session).await?,
        Verb::Resume(args) => pause::resume(args, session).await?,
        Verb::Delete { group, delete_points, force } => {
            let found = get(session, &group).await?;
            out.confirm(&object(&group), &loss(session, &found, delete_points).await)?;
            let request = v1::DeleteGroupRequest {
                name: found.name,
                etag: found.etag,
                delete_points,
                force,
                ..Default::default()
            };
            session.ask(object(&group), session.groups().delete_group(request)).await?;
            let document = serde_json::json!({"deleted": {"group": group, "points": delete_points}});
            out.show(&document, || format!("group {group} deleted"));
        }
    }
    Ok(())
}

/// The group of that name.
pub async fn get(session: &Session, group: &str) -> Result<v1::Group, Failure> {
    let request = v1::GetGroupRequest { name: session.group(group) };
    session.ask(object(group), session.groups().get_group(request)).await
}

/// How a group is named in messages.
pub fn object(group: &str) -> String {
    format!("group \"{group}\"")
}

/// What deleting a group takes away, as far as the coordinator can say it now.
async fn loss(session: &Session, group: &v1::Group, delete_points: bool) -> String {
    let name = id(&group.name);
    let mut loss = format!("Group {name} with {} disks will not be protected any more.", group.disks.len());
    if !delete_points {
        return loss + "\nIts journal stays at the target; its source disks are not touched.";
    }
    let request = v1::GetStatusRequest { parent: group.name.clone() };
    let held = session.ask("", session.status().get_status(request)).await.ok().and_then(|snapshot| {
        let status = snapshot.groups.into_iter().next()?;
        Some((status.points?, status.journal_bytes))
    });
    match held {
        Some((points, journal)) => {
            let time = |point: Option<v1::Point>| point.map_or_else(|| "-".to_owned(), |p| show_time(p.wall_ns));
            loss += &format!(
                "\nGone for good: {} restore points, {} of them cuts, from {} to {}, and {} of journal.",
                show_count(points.count),
                show_count(points.cuts),
                time(points.oldest),
                time(points.newest),
                show_size(journal)
            );
        }
        None => loss += "\nGone for good: all its restore points, its journal and its replica.",
    }
    loss + "\nIts source disks are not touched."
}

fn listed(groups: &[v1::Group]) -> String {
    if groups.is_empty() {
        return "no groups; create one: afterimage group create --help".to_owned();
    }
    table(
        &["GROUP", "PHASE", "POLICY", "SOURCE", "TARGET", ">DISKS", ">SIZE"],
        groups.iter().map(|group| {
            vec![
                text(id(&group.name)),
                state(phase_word(group.phase()), phase_mood(group.phase())),
                text(id(&group.policy)),
                text(id(&group.source)),
                text(id(&group.target)),
                text(group.disks.len().to_string()),
                text(show_size(group.disks.iter().map(|disk| disk.size_bytes).sum())),
            ]
        }),
    )
}

/// What of each disk the target may not hold.
fn branched(branch: &v1::Branch) -> String {
    let row = |disk: &v1::BranchDisk| {
        let length = disk.ranges.iter().map(|range| range.length).sum();
        let what = match (disk.fenced, disk.whole) {
            (true, _) => "fenced",
            (false, true) => "all in doubt",
            (false, false) => "in doubt",
        };
        vec![
            text(disk.name.as_str()),
            text(what),
            text(disk.generation.to_string()),
            text(disk.ranges.len().to_string()),
            text(show_size(length)),
            text(disk.file.as_str()),
        ]
    };
    table(&["DISK", "STATE", ">GENERATION", ">RANGES", ">SIZE", "FILE"], branch.disks.iter().map(row))
}

fn shown(group: &v1::Group) -> String {
    let mut text = fields(&[
        ("group", id(&group.name).to_owned()),
        ("description", group.description.clone()),
        ("phase", phase_word(group.phase()).to_owned()),
        ("policy", id(&group.policy).to_owned()),
        ("source", id(&group.source).to_owned()),
        ("target", id(&group.target).to_owned()),
        ("placed at", group.placement.clone()),
        ("paused", pause::told(group.pause.as_ref())),
        ("operation", id(&group.operation).to_owned()),
        ("runs from view", id(&group.failover_view).to_owned()),
        ("uid", group.uid.clone()),
        ("version", group.version.to_string()),
        ("created", show_time(group.create_time_ns)),
        ("updated", show_time(group.update_time_ns)),
    ]);
    if !group.disks.is_empty() {
        text += "\n";
        text += &disk::listed(&group.disks);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_fields_of_groups_fit_100_columns() {
        let group = v1::Group {
            name: format!("tenants/default/groups/{}", "g".repeat(63)),
            policy: format!("tenants/default/policies/{}", "p".repeat(63)),
            source: format!("tenants/default/proxies/{}", "s".repeat(63)),
            target: format!("tenants/default/proxies/{}", "t".repeat(63)),
            phase: v1::Phase::FailingOver.into(),
            disks: vec![v1::Disk { path: "/dev/x".into(), ..Default::default() }],
            ..Default::default()
        };
        let both = listed(std::slice::from_ref(&group)) + &shown(&group);
        assert!(both.lines().all(|line| line.chars().count() <= 100), "{both}");
        assert!(both.contains("failing-over"));
    }
}
