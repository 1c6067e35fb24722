//! `afterimage key`: the keys of groups, what they are wrapped under, and the recovery key.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use afterimage_wire::v1;
use clap::Subcommand;
use serde_json::json;

use super::failure::{Failure, Kind};
use super::output::{fields, table, text};
use super::session::Session;
use super::values::{json_time, show_time};

/// Verbs of `afterimage key`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Show the keys of groups, what they are wrapped under, and whether there is a recovery key. Never a key itself.
    #[command(after_help = "Examples:\n  \
        afterimage key list\n  \
        afterimage key list --json | jq '.groups[] | select(.key != .written_under)'")]
    List,
    /// Give groups a new key: their target has it first, then what is written is under it. Nothing is sent again.
    #[command(after_help = "Examples:\n  \
        afterimage key rotate shop web\n  \
        afterimage key rotate --all\n\n\
        A source takes the new key as soon as nothing is on its way to the target; under load that may take until it is\n\
        started the next time: `key list` shows under which key it writes. Older keys are kept: journals need them.")]
    Rotate {
        /// Groups.
        #[arg(required_unless_present = "all", value_name = "GROUP")]
        groups: Vec<String>,
        /// All of them.
        #[arg(long, conflicts_with = "groups")]
        all: bool,
    },
    /// Make a new wrapping key, wrapped by what the coordinator's `keys` says, and wrap all keys under it.
    #[command(after_help = "Examples:\n  \
        afterimage key rewrap --check      whether what wraps gives back what it is given\n  \
        afterimage key rewrap\n\n\
        To move keys to a KMS: set `keys.command` at the coordinator, start it again, and rewrap.")]
    Rewrap {
        /// Only try what wraps.
        #[arg(long)]
        check: bool,
    },
    /// Make the recovery key, with which alone a journal can be opened. It is shown this once.
    #[command(after_help = "Examples:\n  \
        afterimage key recovery                                  print it, to be written down\n  \
        afterimage key recovery --out /media/safe/recovery-key   into a new file, for its owner only\n  \
        afterimage key recovery --replace                        another; the one before opens nothing\n\n\
        With it: afterimage journal serve FOLDER --recovery-key-file FILE")]
    Recovery {
        /// Another one in the place of the one that there is.
        #[arg(long)]
        replace: bool,
        /// Write it there instead of to standard output; the file must not exist. Needed with --json.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

const OBJECT: &str = "keys";

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let parent = session.tenant();
    let get = || v1::GetKeysRequest { parent: parent.clone() };
    let keys = match verb {
        Verb::List => session.ask(OBJECT, session.keys().get_keys(get())).await?,
        Verb::Rotate { groups, all } => {
            let mut shown = session.ask(OBJECT, session.keys().get_keys(get())).await?;
            let groups = match all {
                true => shown.groups.iter().map(|g| g.group.clone()).collect(),
                false => groups.iter().map(|g| session.group(g)).collect::<Vec<_>>(),
            };
            for group in groups {
                let object = format!("group \"{}\"", group.rsplit('/').next().unwrap_or_default());
                let request = v1::RotateKeyRequest { group, request_id: request_id(), ..Default::default() };
                shown = session.ask(object, session.keys().rotate_key(request)).await?;
            }
            shown
        }
        Verb::Rewrap { check } => {
            let request = v1::RewrapKeysRequest { parent, validate_only: check, request_id: request_id() };
            session.ask(OBJECT, session.keys().rewrap_keys(request)).await?
        }
        Verb::Recovery { replace, out } => return recovery(session, replace, out).await,
    };
    session.out.show(&document(&keys), || said(&keys));
    Ok(())
}

fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

async fn recovery(session: &Session, replace: bool, out: Option<PathBuf>) -> Result<(), Failure> {
    if session.out.json && out.is_none() {
        return Err(Failure::usage("a recovery key is no part of a document: name a file for it, --out FILE"));
    }
    // Before there is a key that could be lost.
    let file = out.map(|path| {
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let failed = |error| Failure::new(Kind::Failed, path.display().to_string(), format!("cannot be made: {error}"));
        made.map(|file| (path.clone(), file)).map_err(failed)
    });
    let file = file.transpose()?;
    let unmade = |failure: Failure| {
        if let Some((path, _)) = &file {
            let _ = std::fs::remove_file(path);
        }
        failure
    };
    if replace {
        session.out.confirm(OBJECT, "The recovery key of before will open no journal any more.").map_err(unmade)?;
    }
    let request = v1::MakeRecoveryKeyRequest {
        parent: session.tenant(),
        replace,
        request_id: request_id(),
        ..Default::default()
    };
    let made = session.ask(OBJECT, session.keys().make_recovery_key(request)).await.map_err(unmade)?;
    let keys = made.keys.unwrap_or_default();
    if let Some((path, mut file)) = file {
        let written = writeln!(file, "{}", made.recovery_key).and_then(|()| file.sync_all());
        written.map_err(|error| {
            let what = format!("cannot be written ({error}): the key is lost");
            Failure::new(Kind::Failed, path.display().to_string(), what)
                .hint("make another: afterimage key recovery --replace")
        })?;
        let document = json!({ "recovery_key_id": keys.recovery_key, "file": path.display().to_string() });
        session.out.show(&document, || format!("recovery key {} is in {}\n", keys.recovery_key, path.display()));
    } else {
        println!("{}", made.recovery_key);
        eprintln!(
            "This is recovery key {}. It opens the journals of this tenant and is not shown again:\n\
             write it down, and keep it away from the target.",
            keys.recovery_key
        );
    }
    Ok(())
}

/// A document with the ids of keys.
fn document(keys: &v1::PolicyKeys) -> serde_json::Value {
    let of = |g: &v1::GroupKeys, state| g.versions.iter().find(|v| v.state() == state).map(|v| v.uid.clone());
    let version = |v: &v1::KeyVersion| {
        json!({
            "id": v.uid,
            "state": state(v.state()),
            "created": (v.create_time_ns > 0).then(|| json_time(v.create_time_ns)),
            "wrapping_key": (!v.wrapping_key.is_empty()).then_some(&v.wrapping_key),
        })
    };
    let group = |g: &v1::GroupKeys| {
        json!({
            "group": g.group.rsplit('/').next(),
            "key": of(g, v1::KeyState::Current),
            "next_key": of(g, v1::KeyState::Next),
            "written_under": (!g.written_under.is_empty()).then_some(&g.written_under),
            "versions": g.versions.iter().map(version).collect::<Vec<_>>(),
        })
    };
    let wrapping = |w: &v1::WrappingKey| json!({ "id": w.uid, "by": w.by, "created": json_time(w.create_time_ns) });
    let made = keys.recovery_create_time_ns;
    json!({
        "groups": keys.groups.iter().map(group).collect::<Vec<_>>(),
        "wrapping": keys.wrapping.iter().map(wrapping).collect::<Vec<_>>(),
        "recovery_key_id": (!keys.recovery_key.is_empty()).then_some(&keys.recovery_key),
        "recovery_key_created": (made > 0).then(|| json_time(made)),
    })
}

fn state(state: v1::KeyState) -> &'static str {
    match state {
        v1::KeyState::Next => "next",
        v1::KeyState::Current => "current",
        v1::KeyState::Older => "older",
        v1::KeyState::Unspecified => "unknown",
    }
}

fn said(keys: &v1::PolicyKeys) -> String {
    let rows = keys.groups.iter().flat_map(|g| {
        g.versions.iter().map(|v| {
            let since = if v.create_time_ns == 0 { "the first".to_owned() } else { show_time(v.create_time_ns) };
            let written = if v.uid == g.written_under { "written under" } else { "" };
            let group = g.group.rsplit('/').next().unwrap_or_default();
            vec![text(group), text(&v.uid), text(state(v.state())), text(since), text(written)]
        })
    });
    let mut out = table(&["GROUP", "KEY", "STATE", "SINCE", ""], rows);
    let newest = keys.wrapping.last();
    let wrapped = newest.map_or("the coordinator's key file".to_owned(), |w| {
        format!("{}, by a {}, since {}", w.uid, w.by, show_time(w.create_time_ns))
    });
    let recovery = match keys.recovery_key.is_empty() {
        true => "none: afterimage key recovery".to_owned(),
        false => format!("{}, made {}", keys.recovery_key, show_time(keys.recovery_create_time_ns)),
    };
    out += "\n";
    out += &fields(&[("wrapped under", wrapped), ("recovery key", recovery)]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_names_keys_and_holds_none() {
        let version = |uid: &str, state: v1::KeyState| v1::KeyVersion {
            uid: uid.into(),
            state: state.into(),
            create_time_ns: 0,
            wrapping_key: String::new(),
        };
        let keys = v1::PolicyKeys {
            groups: vec![v1::GroupKeys {
                group: "tenants/default/groups/shop".into(),
                versions: vec![version("b", v1::KeyState::Current), version("a", v1::KeyState::Older)],
                written_under: "a".into(),
            }],
            ..v1::PolicyKeys::default()
        };
        let document = document(&keys);
        let group = &document["groups"][0];
        assert_eq!(
            (&group["group"], &group["key"], &group["written_under"]),
            (&json!("shop"), &json!("b"), &json!("a"))
        );
        assert_eq!((&group["next_key"], &document["recovery_key_id"]), (&json!(null), &json!(null)));
        assert_eq!(group["versions"][1], json!({"id": "a", "state": "older", "created": null, "wrapping_key": null}));
        let said = said(&keys);
        assert!(
            said.contains("the coordinator's key file") && said.contains("none: afterimage key recovery"),
            "{said}"
        );
        assert!(said.lines().all(|line| line.chars().count() <= 100), "{said}");
    }
}
