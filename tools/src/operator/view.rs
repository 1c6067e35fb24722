//! `afterimage view`: a restore point as disks, beside what is running: to look into it, or to test with it.

use afterimage_wire::v1;
use clap::Subcommand;
use uuid::Uuid;

use super::documents::{self, group_of, id, view_word};
use super::failure::Failure;
use super::output::{Mood, fields, state, table, text};
use super::point::api;
use super::session::{Session, every};
use super::values::{Selector, selector, show_size, show_time};

/// Verbs of `afterimage view`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Open a restore point as NBD exports at the target, without copying.
    #[command(after_help = "Examples:\n  \
        afterimage view open shop                               the newest point, read-only\n  \
        afterimage view open shop check --to time:-5m           five minutes ago\n  \
        afterimage view open shop try --to cut:47 --writable    to test with; writes are thrown away\n\n\
        Then, on the target's host:  nbdcopy URI disk.img  ·  nbdinfo URI  ·  qemu-img info URI")]
    Open {
        /// The group's name.
        group: String,
        /// What to call the view [default: a name that is free].
        view: Option<String>,
        /// latest, cut:N, seq:N, time:2026-11-21T10:00:00Z, time:-5m (ago).
        #[arg(long, value_name = "POINT", default_value = "latest", value_parser = selector)]
        to: Selector,
        /// Let it be written to; what is written is thrown away when it is closed.
        #[arg(long)]
        writable: bool,
        /// Only this disk; may be given many times [default: all that the point holds].
        #[arg(long = "disk", value_name = "DISK")]
        disks: Vec<String>,
        /// Why, for people.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Check only.
        #[arg(long)]
        dry_run: bool,
    },
    /// List the views of a group, or of all groups.
    List {
        /// The group's name.
        group: Option<String>,
    },
    /// Show a view with its exports.
    Show {
        /// The group's name.
        group: String,
        /// The view's name.
        view: String,
    },
    /// Close a view. What was written to it goes, unless it is kept as a branch of history.
    #[command(after_help = "Examples:\n  afterimage view close shop check")]
    Close {
        /// The group's name.
        group: String,
        /// The view's name.
        view: String,
        /// Keep what was written to it.
        #[arg(long)]
        keep_delta: bool,
        /// Forget it although its target is not connected.
        #[arg(long)]
        force: bool,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::Open { group, view, to, writable, disks, reason, dry_run } => {
            let request_id = Uuid::new_v4().to_string();
            let view = view.unwrap_or_else(|| format!("v{}", &request_id[..8]));
            let request = v1::CreateViewRequest {
                parent: session.group(&group),
                view_id: view.clone(),
                view: Some(v1::View { writable, disks, reason: reason.unwrap_or_default(), ..Default::default() }),
                at: Some(api(to)),
                validate_only: dry_run,
                request_id,
            };
            let made = session.ask(object(&group, &view), session.views().create_view(request)).await?;
            out.show(&documents::view(&made), || shown(&made));
            if !dry_run {
                out.note(&format!("\nclose it: afterimage view close {group} {view}"));
            }
        }
        Verb::List { group } => {
            let request =
                v1::ListViewsRequest { parent: session.group(group.as_deref().unwrap_or("-")), ..Default::default() };
            let views: Vec<v1::View> = every!(session, "views", views.list_views(request).views);
            let document = views.iter().map(documents::view).collect::<Vec<_>>();
            out.show(&serde_json::json!({"views": document}), || listed(&views));
        }
        Verb::Show { group, view } => {
            let found = get(session, &group, &view).await?;
            out.show(&documents::view(&found), || shown(&found));
        }
        Verb::Close { group, view, keep_delta, force } => {
            let found = get(session, &group, &view).await?;
            if found.writable && !keep_delta {
                out.confirm(
                    &object(&group, &view),
                    &format!("What was written to view {view} since it was opened will be thrown away."),
                )?;
            }
            let request = v1::DeleteViewRequest { name: found.name, keep_delta, force, ..Default::default() };
            session.ask(object(&group, &view), session.views().delete_view(request)).await?;
            out.show(&serde_json::json!({"closed": {"group": group, "view": view}}), || format!("view {view} closed"));
        }
    }
    Ok(())
}

async fn get(session: &Session, group: &str, view: &str) -> Result<v1::View, Failure> {
    let request = v1::GetViewRequest { name: session.view(group, view) };
    session.ask(object(group, view), session.views().get_view(request)).await
}

fn object(group: &str, view: &str) -> String {
    format!("view \"{group}/{view}\"")
}

/// How a view's disks are reached, a line for each way.
///
/// No table: an address that is wrapped cannot be copied.
pub fn exports(view: &v1::View) -> String {
    let mut shown = String::new();
    for export in &view.exports {
        shown += &format!("  {}  {}\n", export.disk, show_size(export.size_bytes));
        for uri in &export.uris {
            shown += &format!("    {uri}\n");
        }
    }
    shown
}

/// Views as a table.
pub fn listed(views: &[v1::View]) -> String {
    if views.is_empty() {
        return "no views; open one: afterimage view open GROUP".to_owned();
    }
    table(
        &["GROUP", "VIEW", "KIND", "STATE", ">SEQ", "POINT (TIME AT SOURCE)", "DISKS"],
        views.iter().map(|view| {
            let point = view.point.clone().unwrap_or_default();
            let disks: Vec<&str> = view.exports.iter().map(|export| export.disk.as_str()).collect();
            vec![
                text(group_of(&view.name)),
                text(id(&view.name)),
                text(view_word(view.kind())),
                match (view.open, view.kept) {
                    (true, _) => state("open", Mood::Good),
                    (false, true) => state("kept", Mood::Plain),
                    (false, false) => state("not open", Mood::Care),
                },
                text(point.seq.to_string()),
                text(show_time(point.wall_ns)),
                text(disks.join(" ")),
            ]
        }),
    )
}

fn shown(view: &v1::View) -> String {
    let point = view.point.clone().unwrap_or_default();
    let mut shown = fields(&[
        ("view", format!("{}/{}", group_of(&view.name), id(&view.name))),
        ("kind", view_word(view.kind()).to_owned()),
        ("writable", if view.writable { "yes" } else { "no" }.to_owned()),
        (
            "state",
            if view.open {
                "open"
            } else if view.kept {
                "closed, and what was written is kept"
            } else {
                "not open"
            }
            .to_owned(),
        ),
        ("point", format!("write {} of {}", point.seq, show_time(point.wall_ns))),
        ("reason", view.reason.clone()),
        ("created", show_time(view.create_time_ns)),
    ]);
    if !view.exports.is_empty() {
        shown += "\n";
        shown += &exports(view);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> v1::View {
        v1::View {
            name: format!("tenants/default/groups/{}/views/{}", "g".repeat(63), "v".repeat(63)),
            exports: vec![v1::ViewExport {
                disk: "data".into(),
                uris: vec!["nbd+unix:///v/data?socket=/run/x".into(), "nbd://h:10809/v/data".into()],
                size_bytes: 1 << 30,
                ..Default::default()
            }],
            point: Some(v1::Point { seq: u64::MAX, wall_ns: 1_700_000_000_000_000_000, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_table_of_views_fits_100_columns() {
        let shown = listed(&[view()]);
        assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
    }

    #[test]
    fn an_address_is_never_wrapped() {
        let shown = exports(&view());
        assert_eq!(shown, "  data  1 GiB\n    nbd+unix:///v/data?socket=/run/x\n    nbd://h:10809/v/data\n");
    }
}
