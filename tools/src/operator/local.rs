//! `afterimage failover local`: on the target's host, with the coordinator gone. The proxy of that host is asked over the
//! socket in its state folder; where there is none any more, its journal is opened by itself.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_wire::v1::{
    CommandErrorKind, LocalFailover, LocalFailoverAnswer, LocalFailoverRequest, LocalMachine, MachinePower,
};
use prost::Message;
use serde_json::json;

use super::documents::{id, point, view_export};
use super::failure::{Failure, Kind};
use super::group::object;
use super::output::{Mood, Output, fields, state, table, text};
use super::point::api;
use super::values::{Selector, selector, show_count, show_time};
use crate::journal::{KeyArgs, wanted};
use crate::proxy::config::{Config, Listen};
use crate::proxy::{self, MAX_MESSAGE, OpenJournal, SOCKET, site};

/// How long a proxy may take: a stream may have to be recovered first, and machines started.
const ANSWER: Duration = Duration::from_secs(600);

/// Options of `afterimage failover local`.
#[derive(clap::Args, Debug)]
pub struct Local {
    /// The group's name, or the id of its stream.
    group: String,
    /// latest, cut:N, time:2026-11-21T10:00:00Z, time:-5m (ago), seq:N.
    #[arg(long, value_name = "POINT", default_value = "latest", value_parser = selector)]
    to: Selector,
    /// That its source is off, or cut off: you made sure, and nobody here can. NAME is the group, typed again.
    #[arg(long, value_name = "NAME")]
    unconfirmed: String,
    /// The folder of a journal whose proxy is gone: it is opened by itself, and offered until this command is stopped.
    #[arg(long, value_name = "DIR", requires = "views")]
    journal: Option<PathBuf>,
    /// With --journal: where hosts come in, unix:/path or tcp:address:port; may be given many times.
    #[arg(long, value_name = "LISTEN", requires = "journal")]
    views: Vec<Listen>,
    #[command(flatten)]
    key: KeyArgs,
    /// Why, for people; kept with the decision.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
}

/// Runs it. Without a runtime: a journal by itself brings its own.
pub fn run(local: Local, out: Output) -> Result<(), Failure> {
    let Local { group, to, unconfirmed, journal, views, key, reason } = local;
    if unconfirmed != group {
        let message = format!("--unconfirmed names \"{unconfirmed}\", and the group is \"{group}\"");
        return Err(Failure::new(Kind::Usage, object(&group), message)
            .hint(format!("to say that the source's machine is off, write --unconfirmed {group}")));
    }
    let loss = format!(
        "Group {group} will run from its replica at this host, without anybody else being asked. Its source is not fenced: \
         where its machine still runs, both will be written to. What the target does not hold stays behind. The next \
         coordinator takes this over; here it cannot be undone."
    );
    out.confirm(&object(&group), &loss)?;
    let decided_by = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_default();
    let decided_by = if decided_by.is_empty() { "somebody at the target's host".to_owned() } else { decided_by };
    let request = LocalFailoverRequest { group: group.clone(), at: Some(api(to)), reason, decided_by };
    if let Some(folder) = journal {
        let (file, opened) = wanted(&folder, Some(&group), &key)?;
        let request = LocalFailoverRequest { group: file.stream.to_string(), ..request };
        let wish = OpenJournal {
            folder,
            desired: site::as_said(&file, opened),
            view: String::new(),
            at: api(to),
            writable: true,
            json: out.json,
            failover: Some(request),
        };
        return proxy::serve_journal(wish, views).map_err(|e| Failure::new(Kind::Failed, object(&group), e));
    }
    let dir = match (key.state(), key.config()) {
        (Some(dir), _) => dir.to_owned(),
        (None, Some(path)) => {
            let args = proxy::Args { config: Some(path.to_owned()), ..proxy::Args::default() };
            let config = Config::load(&args).map_err(|e| Failure::usage(e.to_string()))?;
            config.state_dir().map_err(|e| Failure::usage(e.to_string()))?.to_owned()
        }
        (None, None) => {
            let message = "which proxy: --state DIR or --config FILE of the proxy of this host; or --journal DIR, where it is gone";
            return Err(Failure::usage(message));
        }
    };
    let answer = ask(&dir, &request, &group)?;
    if let Some(error) = &answer.error {
        let kind = match error.kind() {
            CommandErrorKind::NotFound => Kind::NotFound,
            CommandErrorKind::WrongState | CommandErrorKind::Invalid => Kind::Refused,
            _ => Kind::Failed,
        };
        let failure = Failure::new(kind, object(&group), &error.message);
        return Err(failure.hint("what has been decided stays decided: say the same again to go on with it"));
    }
    show(&answer, &group, out);
    let off: Vec<&str> = answer.machines.iter().filter(|m| !is_on(m)).map(|m| id(&m.name)).collect();
    if !off.is_empty() {
        let message = format!("the group is failed over, and {} not on", off.join(", "));
        return Err(Failure::new(Kind::Failed, object(&group), message)
            .hint("look at the driver's settings here, then say the same again"));
    }
    Ok(())
}

fn ask(dir: &Path, request: &LocalFailoverRequest, group: &str) -> Result<LocalFailoverAnswer, Failure> {
    let path = dir.join(SOCKET);
    let failed = |error: std::io::Error| {
        Failure::new(Kind::Unreachable, object(group), format!("{}: {error}", path.display())).hint(
            "the proxy of this host does not answer there: start it, which it does without a coordinator; or, where it is gone \
             for good, open its journal by --journal",
        )
    };
    let mut stream = UnixStream::connect(&path).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER)).map_err(failed)?;
    let bytes = request.encode_to_vec();
    let length = (bytes.len() as u32).to_le_bytes();
    stream.write_all(&length).and_then(|()| stream.write_all(&bytes)).map_err(failed)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).map_err(failed)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(failed(std::io::ErrorKind::InvalidData.into()));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).map_err(failed)?;
    LocalFailoverAnswer::decode(&bytes[..]).map_err(|error| failed(std::io::Error::other(error)))
}

fn is_on(machine: &LocalMachine) -> bool {
    machine.trouble.is_empty() && machine.state.as_ref().is_some_and(|s| s.power() == MachinePower::On)
}

/// The document of a failover that was decided here.
pub fn document(answer: &LocalFailoverAnswer, group: &str) -> serde_json::Value {
    let LocalFailover { uid, view, point: at, generation, zero_loss, .. } = answer.decision.clone().unwrap_or_default();
    let machine = |m: &LocalMachine| json!({ "machine": id(&m.name), "on": is_on(m), "trouble": m.trouble });
    json!({
        "ready": true,
        "group": group,
        "operation": uid,
        "view": view,
        "point": at.as_ref().map(point),
        "generation": generation,
        "fence": "unconfirmed",
        "zero_loss": zero_loss,
        "repeated": answer.repeated,
        "exports": answer.exports.iter().map(view_export).collect::<Vec<_>>(),
        "machines": answer.machines.iter().map(machine).collect::<Vec<_>>(),
    })
}

/// Says what came of it.
pub fn show(answer: &LocalFailoverAnswer, group: &str, out: Output) {
    out.show(&document(answer, group), || {
        let decision = answer.decision.clone().unwrap_or_default();
        let point = decision.point.unwrap_or_default();
        let loss = if decision.zero_loss { "nothing answered is missing" } else { "not known" };
        let mut shown = fields(&[
            ("group", group.to_owned()),
            ("runs from", decision.view),
            ("point", format!("record {}, {}", show_count(point.seq), show_time(point.wall_ns))),
            ("generation", decision.generation.to_string()),
            ("lost", loss.to_owned()),
            ("decided", if answer.repeated { "before this; gone on with".to_owned() } else { "now".to_owned() }),
        ]);
        for export in &answer.exports {
            shown += &format!("  {}  {}\n", export.disk, export.uris.join(" "));
        }
        if !answer.machines.is_empty() {
            let rows = answer.machines.iter().map(|m| {
                let on = if is_on(m) { state("on", Mood::Good) } else { state("not on", Mood::Bad) };
                vec![text(id(&m.name)), on, text(&m.trouble)]
            });
            shown += &table(&["MACHINE", "STATE", "WHY"], rows);
        }
        shown
    });
}

#[cfg(test)]
mod tests {
    use afterimage_wire::v1::{MachineState, Point, ViewExport};

    use super::*;

    #[test]
    fn the_document_says_where_the_disks_are_and_which_machines_are_on() {
        let on = MachineState { power: MachinePower::On.into(), ..MachineState::default() };
        let machine = |id: &str, state, trouble: &str| LocalMachine {
            name: format!("tenants/default/machines/{id}"),
            state,
            trouble: trouble.to_owned(),
        };
        let answer = LocalFailoverAnswer {
            decision: Some(LocalFailover {
                uid: "u".into(),
                view: "shop.local-u".into(),
                point: Some(Point { seq: 7, ..Point::default() }),
                generation: 3,
                ..LocalFailover::default()
            }),
            exports: vec![ViewExport { disk: "data".into(), uris: vec!["nbd://h/x".into()], ..ViewExport::default() }],
            machines: vec![machine("web", Some(on), ""), machine("db", None, "no room")],
            ..LocalFailoverAnswer::default()
        };
        let document = document(&answer, "shop");
        assert_eq!((&document["view"], &document["point"]["seq"]), (&"shop.local-u".into(), &7.into()));
        assert_eq!((&document["operation"], &document["fence"]), (&"u".into(), &"unconfirmed".into()));
        assert_eq!(document["exports"][0]["uris"][0], "nbd://h/x");
        let machines = &document["machines"];
        assert_eq!(
            (&machines[0]["on"], &machines[1]["on"], &machines[1]["trouble"]),
            (&true.into(), &false.into(), &"no room".into())
        );
    }
}
