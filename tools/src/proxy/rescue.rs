//! A journal without coordinator and source: one point of it is offered, and that is all.

use std::rc::Rc;

use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{OpenView, PointChoice, ResolvePoint, ViewExport, ViewKind};
use serde_json::json;

use super::commands::{self, Refused};
use super::config::{
    Config, Control, DEFAULT_POOL, DEFAULT_RESERVE, DEFAULT_SEGMENT, Listen, LogFormat, OpenJournal, TargetRole,
};
use super::local;
use super::state::Proxy;
use crate::operator::output::Output;

impl OpenJournal {
    /// One that is written to stays beside the journal, and goes on where it was when the same point is opened again.
    fn name(&self, seq: u64) -> String {
        if self.writable { format!("{}.{seq}", self.view) } else { self.view.clone() }
    }

    /// Opens it, and says where its disks are.
    ///
    /// # Errors
    /// For a person.
    pub async fn open(&self, proxy: &Rc<Proxy>) -> Result<(), String> {
        let stream_uid = self.desired.targets.first().map(|t| t.stream_uid.clone()).unwrap_or_default();
        let said = OpenView {
            stream_uid,
            writable: self.writable,
            kind: if self.writable { ViewKind::Test } else { ViewKind::Browse }.into(),
            reason: "afterimage journal serve".to_owned(),
            ..OpenView::default()
        };
        let failed = |Refused(_, why)| {
            let others = proxy.problems.borrow().iter().map(|p| p.message.clone()).collect::<Vec<_>>().join("; ");
            let others = if others.is_empty() { others } else { format!(" ({others})") };
            format!("the point is not opened: {why}{others}; does the proxy of this journal still run?")
        };
        if let Some(request) = &self.failover {
            let answer = local::fail_over(proxy, request).await.map_err(failed)?;
            let name = self.desired.targets.first().map_or("", |t| t.name.as_str());
            crate::operator::local::show(&answer, name, Output { json: self.json, yes: true });
            return Ok(());
        }
        let (seq, exports) = open_at(proxy, said, self.at, |seq| self.name(seq)).await.map_err(failed)?;
        if self.json {
            let disks = exports.iter().map(|e| json!({ "disk": e.disk, "uris": e.uris, "size_bytes": e.size_bytes }));
            println!("{}", json!({ "ready": true, "seq": seq, "disks": disks.collect::<Vec<_>>() }));
        } else {
            println!("the state after write {seq}, until this is stopped:");
            for export in &exports {
                println!("  {}  {}", export.disk, export.uris.join(" "));
            }
        }
        Ok(())
    }
}

/// Opens a view of a point; which one that is, and its disks.
pub(super) async fn open_at(
    proxy: &Proxy,
    said: OpenView,
    at: PointChoice,
    name: impl FnOnce(u64) -> String,
) -> Result<(u64, Vec<ViewExport>), Refused> {
    let resolve = ResolvePoint { stream_uid: said.stream_uid.clone(), at: Some(at) };
    let Outcome::Point(point) = commands::resolve_point(proxy, &resolve).await? else { return Ok((0, Vec::new())) };
    let said = OpenView { seq: point.seq, disk_uids: point.disks, view: name(point.seq), ..said };
    let Outcome::View(view) = commands::open_view(proxy, &said).await? else { return Ok((0, Vec::new())) };
    Ok((point.seq, view.exports))
}

/// Serves a point of a journal until it is told to stop.
///
/// # Errors
/// For a person.
pub fn serve_journal(wish: OpenJournal, views: Vec<Listen>) -> Result<(), String> {
    super::log(LogFormat::Text);
    let target = TargetRole {
        journal: wish.folder.clone(),
        // No stream is let in: there is no certificate.
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        views,
        vhost_user: None,
        ublk: super::config::Wish::No,
        memory: DEFAULT_POOL,
        budget: None,
        segment: DEFAULT_SEGMENT,
        reserve: DEFAULT_RESERVE,
        scrub_hours: 0,
        scrub_rate: super::config::DEFAULT_SCRUB_RATE,
    };
    let config = Config {
        name: "journal".to_owned(),
        state_dir: None,
        control: Control::Journal(Box::new(wish)),
        source: None,
        target: Some(target),
        log: LogFormat::Text,
        site: String::new(),
        machines: Default::default(),
        keys: Default::default(),
    };
    super::service::run(config).map_err(|error| error.to_string())
}
