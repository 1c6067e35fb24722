//! `afterimage coordinator backup`, `restore`, `confirm`: the state in a file, and back.

use std::path::{Path, PathBuf};

use afterimage_controlplane::backup as format;
use afterimage_controlplane::bundle::write_private;
use afterimage_controlplane::store::etcd::import;
use afterimage_controlplane::store::redb::RedbStore;
use afterimage_controlplane::store::{Entry, Listing, Store};
use afterimage_wire::v1;
use serde_json::json;

use super::DATA_DIR;
use super::shared::EtcdArgs;
use crate::operator::failure::{Failure, Kind};
use crate::operator::output::{Output, fields};
use crate::operator::session::{Common, Session};
use crate::operator::values::{json_time, now_ns, show_time};

/// Options of `backup`.
#[derive(clap::Args, Debug)]
pub struct Backup {
    /// Where to; replaced whole if it is there.
    file: PathBuf,
    /// Of the coordinator that stood in this folder and does not run. Without it the one that runs is asked.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

/// Options of `restore`.
#[derive(clap::Args, Debug)]
pub struct Restore {
    /// A backup.
    file: PathBuf,
    /// Folder of the state, with the ca.pem and keys.bin that belong to it
    /// [default: /var/lib/afterimage/coordinator].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `confirm`.
#[derive(clap::Args, Debug)]
pub struct Confirm {
    /// Go on although proxies that groups name have not been heard; they are asked when they come.
    #[arg(long)]
    without_unseen: bool,
    /// Show only.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    pub common: Common,
}

fn failed(what: &str, message: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Failed, what, message.to_string())
}

/// Writes the file: whole and durable, or not at all.
pub async fn backup(args: Backup) -> Result<(), Failure> {
    let bytes = match &args.data_dir {
        Some(dir) => offline(dir).await?,
        None => online(&Session::open(&args.common).await?).await?,
    };
    // What has been written is what can be read.
    let read = format::read(&bytes).map_err(|e| failed("backup", e))?;
    write_private(&args.file, &bytes).map_err(|e| failed("backup", format!("{}: {e}", args.file.display())))?;
    let (objects, revision) = (read.listing.entries.len(), read.listing.revision);
    let document = json!({ "file": args.file, "objects": objects, "revision": revision, "bytes": bytes.len() });
    args.common.output().show(&document, || {
        let mut text = fields(&[("backup", args.file.display().to_string()), ("objects", objects.to_string())]);
        text += "\nit is of use with the ca.pem and keys.bin of the coordinator's folder only: keep those, too\n";
        text
    });
    Ok(())
}

async fn online(session: &Session) -> Result<Vec<u8>, Failure> {
    let mut parts = session.ask("backup", session.backups().create_backup(v1::CreateBackupRequest {})).await?;
    let mut bytes = Vec::new();
    while let Some(part) = parts.message().await.map_err(|status| session.answered("backup", &status))? {
        bytes.extend(part.data);
    }
    Ok(bytes)
}

async fn offline(dir: &Path) -> Result<Vec<u8>, Failure> {
    let file = dir.join("state.redb");
    if !file.exists() {
        return Err(failed("backup", format!("{} does not exist", file.display())));
    }
    let hint = "it runs: leave out --data-dir, and it is asked";
    let store = RedbStore::open(&file).map_err(|e| failed("backup", e).hint(hint))?;
    let listing = store.list("").await.map_err(|e| failed("backup", e))?;
    let shared = format::fingerprint(dir)
        .ok_or_else(|| failed("backup", format!("{} lacks ca.pem or keys.bin", dir.display())))?;
    format::write(&listing, &shared, now_ns()).map_err(|e| failed("backup", e))
}

/// Makes a state of a backup.
pub async fn restore(args: Restore) -> Result<(), Failure> {
    let bytes = std::fs::read(&args.file).map_err(|e| failed("restore", format!("{}: {e}", args.file.display())))?;
    let backup = format::read(&bytes).map_err(|e| failed("restore", e))?;
    let time_ns = backup.time_ns;
    let dir = args.data_dir.unwrap_or_else(|| PathBuf::from(DATA_DIR));
    let objects = match args.etcd.etcd()? {
        None => format::restore_into(&dir, backup, now_ns()).await.map_err(|e| failed("restore", e))?,
        Some(etcd) => {
            format::check_files(&dir, &backup.shared).map_err(|e| failed("restore", e))?;
            let changes = format::beginning(backup, now_ns()).map_err(|e| failed("restore", e))?;
            let mut entries: Vec<Entry> =
                changes.into_iter().filter_map(|c| Some(Entry { key: c.key, revision: 0, value: c.value? })).collect();
            entries.sort_by(|a, b| a.key.cmp(&b.key));
            let listing = Listing { entries, revision: 0 };
            import(&etcd, listing).await.map_err(|e| failed("restore", e))?.objects
        }
    };
    let document = json!({ "objects": objects, "backup_time": json_time(time_ns), "data_dir": dir });
    Output { json: args.json, yes: false }.show(&document, || {
        let mut text = fields(&[("restored", format!("{objects} objects")), ("as of", show_time(time_ns))]);
        text += "\nstart the coordinator: it only observes, and asks its proxies what is newer. Then:\n";
        text += "  afterimage coordinator confirm\n";
        text
    });
    Ok(())
}

/// Shows what was found, and lets the coordinator go on.
pub async fn confirm(args: Confirm) -> Result<(), Failure> {
    let session = Session::open(&args.common).await?;
    let found = session.ask("restore", session.backups().get_restore(v1::GetRestoreRequest {})).await?;
    let mut shown = found.clone();
    if found.observing && !args.dry_run {
        if !session.out.json {
            session.out.note(text(&found).trim_end());
        }
        session.out.confirm("the restored state", "From now on proxies are told what is in it.")?;
        let ask = v1::ConfirmRestoreRequest { without_unseen: args.without_unseen };
        shown = session.ask("restore", session.backups().confirm_restore(ask)).await?;
    }
    let document = json!({
        "restored": shown.restored,
        "observing": shown.observing,
        "backup_time": json_time(shown.backup_time_ns),
        "findings": shown.findings,
        "unseen": shown.unseen,
        "ended": shown.ended,
    });
    session.out.show(&document, || text(&shown));
    Ok(())
}

fn text(restore: &v1::Restore) -> String {
    if !restore.restored {
        return "this state was never restored from a backup\n".to_owned();
    }
    let state = if restore.observing { "observes, until it is confirmed" } else { "confirmed" };
    let mut text = fields(&[("backup of", show_time(restore.backup_time_ns)), ("state", state.to_owned())]);
    let lists = [
        ("found at proxies, newer than the backup, and taken over", &restore.findings),
        ("not heard yet", &restore.unseen),
        ("known to neither of their proxies: forgotten when it is confirmed", &restore.ended),
    ];
    for (title, lines) in lists.into_iter().filter(|(_, lines)| !lines.is_empty()) {
        text += &format!("\n{title}:\n");
        lines.iter().for_each(|line| text += &format!("  {line}\n"));
    }
    text
}
