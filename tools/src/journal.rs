//! `afterimage journal`: a journal folder by itself, with no coordinator and no source: what is in it, and any point of it
//! as disks. It is opened by the key of the target's site, or by the recovery key alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use afterimage_controlplane::escrow::{EscrowKey, RecoveryKey};
use afterimage_wire::keys::KeysFile;
use clap::Subcommand;
use serde_json::json;

use crate::operator::failure::{Failure, Kind};
use crate::operator::output::{Output, table, text};
use crate::operator::point;
use crate::operator::values::{Selector, selector, show_size};
use crate::proxy::config::Listen;
use crate::proxy::site::{self, SiteKey};
use crate::proxy::{self, OpenJournal};

/// Options of `afterimage journal`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// List the groups whose journals are in a folder, and whether a key opens them.
    #[command(after_help = "Examples:\n  \
        afterimage journal list /srv/journal\n  \
        afterimage journal list /srv/journal --recovery-key-file /media/safe/recovery-key --json")]
    List {
        /// The folder: `target.journal` of the proxy that kept it, or a copy of that.
        folder: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Offer a point of a group as disks, until it is stopped. The proxy of this journal must not run.
    #[command(after_help = "Examples:\n  \
        afterimage journal serve /srv/journal --recovery-key-file key --views unix:/run/rescue.sock\n  \
        afterimage journal serve /srv/journal --group shop --to time:-10m --recovery-key-file key \\\n    \
            --views unix:/run/rescue.sock --writable\n  \
        qemu-img convert -O qcow2 'nbd+unix:///rescue.shop/data?socket=/run/rescue.sock' data.qcow2\n\n\
        It says where each disk is: NBD, as of a proxy's views. With --writable what is written goes to a delta of its\n\
        own beside the journal; the journal itself is not changed.")]
    Serve {
        /// The folder: `target.journal` of the proxy that kept it, or a copy of that.
        folder: PathBuf,
        /// Which group, by its name or the id of its stream [default: the only one].
        #[arg(long)]
        group: Option<String>,
        /// Which point: latest, cut:N, time:WHEN or seq:N.
        #[arg(long, value_name = "POINT", default_value = "latest", value_parser = selector)]
        to: Selector,
        /// Where hosts come in: unix:/path or tcp:address:port; may be given many times.
        #[arg(long, required = true, value_name = "LISTEN")]
        views: Vec<Listen>,
        /// Let them write, into a delta.
        #[arg(long)]
        writable: bool,
        #[command(flatten)]
        key: KeyArgs,
        /// Say as one line of JSON where the disks are.
        #[arg(long)]
        json: bool,
    },
}

/// Which key opens it.
#[derive(clap::Args, Debug)]
#[group(multiple = false)]
pub struct KeyArgs {
    /// A file with the recovery key, as `afterimage key recovery` has shown it.
    #[arg(long, value_name = "FILE")]
    recovery_key_file: Option<PathBuf>,
    /// The state folder of the proxy that kept it: by the key of its site.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The configuration of that proxy, where that says what wraps the key of its site.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

const OBJECT: &str = "journal";

impl KeyArgs {
    /// The state folder that is named.
    pub fn state(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    /// The configuration that is named.
    pub fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// The key; nothing if none is named.
    fn open(&self) -> Result<Option<EscrowKey>, Failure> {
        let refused = |error: String| Failure::new(Kind::Refused, OBJECT, error);
        if let Some(path) = &self.recovery_key_file {
            let object = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|e| Failure::new(Kind::Usage, &object, format!("cannot be read: {e}")))?;
            let key: RecoveryKey = text.parse().map_err(|e| Failure::new(Kind::Refused, &object, format!("{e}")))?;
            return Ok(Some(key.escrow()));
        }
        let (dir, keys) = match (&self.state, &self.config) {
            (Some(dir), _) => (dir.clone(), Default::default()),
            (None, Some(path)) => {
                let args = proxy::Args { config: Some(path.clone()), ..proxy::Args::default() };
                let config = proxy::config::Config::load(&args).map_err(|e| Failure::usage(e.to_string()))?;
                (config.state_dir().map_err(|e| Failure::usage(e.to_string()))?.to_owned(), config.keys)
            }
            (None, None) => return Ok(None),
        };
        let site = SiteKey::existing(&dir, &keys).map_err(|e| refused(e.to_string()))?;
        Ok(Some(site.into_escrow()))
    }
}

/// Runs it.
pub fn run(args: Args) -> ExitCode {
    let json = matches!(args.verb, Verb::List { json: true, .. } | Verb::Serve { json: true, .. });
    let done = match args.verb {
        Verb::List { folder, key, json } => list(&folder, &key, Output { json, yes: false }),
        Verb::Serve { folder, group, to, views, writable, key, json } => wanted(&folder, group.as_deref(), &key)
            .and_then(|(file, key)| {
                let wish = OpenJournal {
                    folder,
                    desired: site::as_said(&file, key),
                    view: format!("rescue.{}", file.name),
                    at: point::api(to),
                    writable,
                    json,
                    failover: None,
                };
                let failed = |e: String| Failure::new(Kind::Failed, OBJECT, e);
                proxy::serve_journal(wish, views).map_err(failed)
            }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => crate::operator::report(&failure, json),
    }
}

/// The keys files of a folder.
fn found(folder: &Path) -> Result<Vec<KeysFile>, Failure> {
    let streams = folder.join("streams");
    let unread = |error: String| Failure::new(Kind::Usage, streams.display().to_string(), error);
    let entries = std::fs::read_dir(&streams).map_err(|e| unread(format!("cannot be read: {e}")))?;
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| unread(e.to_string()))?.path().join(site::KEYS_FILE);
        all.extend(site::read_keys(&path).map_err(|e| Failure::new(Kind::Failed, OBJECT, e.to_string()))?);
    }
    all.sort_by(|a, b| (&a.name, a.stream).cmp(&(&b.name, b.stream)));
    Ok(all)
}

fn list(folder: &Path, key: &KeyArgs, out: Output) -> Result<(), Failure> {
    let (all, key) = (found(folder)?, key.open()?);
    let opens = |file: &KeysFile| key.as_ref().map(|key| site::opened(file, key).is_some());
    let disk = |disk: &afterimage_wire::record::DiskInfo| json!({ "disk": disk.name, "size_bytes": disk.size });
    let document = json!({
        "journals": all.iter().map(|file| json!({
            "group": file.name,
            "stream": file.stream.to_string(),
            "keys": file.keys.len(),
            "recovery_key_id": (file.recovery_key != [0; 16]).then(|| hex(&file.recovery_key)),
            "opens": opens(file),
            "disks": file.disks.iter().map(|(info, _)| disk(info)).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
    });
    out.show(&document, || {
        let rows = all.iter().map(|file| {
            let disks = file.disks.iter().map(|(d, _)| format!("{} {}", d.name, show_size(d.size)));
            let word = match opens(file) {
                None => "no key named",
                Some(true) => "opens",
                Some(false) => "does not open",
            };
            let recovery = if file.recovery_key == [0; 16] { "none".to_owned() } else { hex(&file.recovery_key) };
            let row = [file.name.clone(), file.stream.to_string(), disks.collect::<Vec<_>>().join(", ")];
            row.into_iter().chain([word.to_owned(), recovery]).map(text).collect()
        });
        table(&["GROUP", "STREAM", "DISKS", "KEY", "RECOVERY KEY"], rows)
    });
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The journal that is meant, and its keys, opened.
///
/// # Errors
/// There is none, or several; no key opens it.
pub fn wanted(
    folder: &Path,
    group: Option<&str>,
    key: &KeyArgs,
) -> Result<(KeysFile, afterimage_wire::v1::PolicyKey), Failure> {
    let Some(key) = key.open()? else {
        return Err(Failure::usage("which key opens it: --recovery-key-file FILE, --state DIR or --config FILE"));
    };
    let fits = |file: &KeysFile| group.is_none_or(|g| file.name == g || file.stream.to_string() == g);
    let all = found(folder)?;
    let names = all.iter().map(|f| format!("{} ({})", f.name, f.stream)).collect::<Vec<_>>().join(", ");
    let mut meant = all.into_iter().filter(fits);
    let file = match (meant.next(), meant.next()) {
        (Some(file), None) => file,
        (Some(_), Some(_)) => return Err(Failure::usage(format!("which group: --group; there are {names}"))),
        (None, _) => {
            let there = if names.is_empty() { "no journal with a keys file".to_owned() } else { names };
            return Err(Failure::new(Kind::NotFound, OBJECT, format!("{} has {there}", folder.display())));
        }
    };
    let opened = site::opened(&file, &key).ok_or_else(|| {
        let what = format!("the keys of \"{}\" do not open with this key", file.name);
        Failure::new(Kind::Refused, OBJECT, what)
            .hint("afterimage journal list shows which recovery key they are under")
    })?;
    Ok((file, opened))
}
