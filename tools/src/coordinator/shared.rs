//! Several coordinators on one etcd: their settings, and the move of an embedded store into it.

use std::path::{Path, PathBuf};

use afterimage_controlplane::grpc::MOVED;
use afterimage_controlplane::store::Store;
use afterimage_controlplane::store::etcd::rpc::Tls;
use afterimage_controlplane::store::etcd::{Etcd, import};
use afterimage_controlplane::store::redb::RedbStore;
use serde::Deserialize;

use crate::operator::failure::{Failure, Kind};
use crate::operator::output::{Output, fields};

/// Prefix of the keys, where none is given.
const PREFIX: &str = "afterimage";

/// Where the etcd is.
#[derive(clap::Args, Deserialize, Debug, Default, Clone)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdArgs {
    /// Share the state with other coordinators in this etcd (http://HOST:PORT or https://…); once for each member. Start
    /// etcd with --max-txn-ops=4096.
    #[arg(long = "etcd", value_name = "URL", id = "etcd")]
    members: Vec<String>,
    /// What all keys in etcd begin with [default: afterimage].
    #[arg(long = "etcd-prefix", value_name = "PREFIX", requires = "etcd")]
    prefix: Option<String>,
    /// CA of etcd's members.
    #[arg(long = "etcd-ca", value_name = "FILE", requires = "etcd")]
    ca: Option<PathBuf>,
    /// Certificate by which etcd knows this coordinator.
    #[arg(long = "etcd-cert", value_name = "FILE", requires_all = ["etcd", "key"])]
    cert: Option<PathBuf>,
    /// Its key.
    #[arg(long = "etcd-key", value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Where the other coordinators reach this one [default: the first address listened on].
    #[arg(long, value_name = "HOST:PORT", requires = "etcd")]
    reach: Option<String>,
}

impl EtcdArgs {
    /// These, or what the file says where these say nothing.
    pub fn or(self, file: Self) -> Self {
        Self {
            members: if self.members.is_empty() { file.members } else { self.members },
            prefix: self.prefix.or(file.prefix),
            ca: self.ca.or(file.ca),
            cert: self.cert.or(file.cert),
            key: self.key.or(file.key),
            reach: self.reach.or(file.reach),
        }
    }

    /// Where the other coordinators reach this one.
    pub fn reach(&self) -> Option<String> {
        self.reach.clone()
    }

    /// The etcd; none if none is named.
    pub fn etcd(&self) -> Result<Option<Etcd>, Failure> {
        if self.members.is_empty() {
            return Ok(None);
        }
        let read = |path: &PathBuf| {
            let refused = |e: std::io::Error| Failure::usage(format!("{}: {e}", path.display()));
            std::fs::read_to_string(path).map_err(refused)
        };
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
            (None, None) => None,
            _ => return Err(Failure::usage("etcd's cert and key belong together: give both")),
        };
        Ok(Some(Etcd {
            members: self.members.clone(),
            prefix: self.prefix.clone().unwrap_or_else(|| PREFIX.to_owned()),
            tls: Tls { ca_pem: self.ca.as_ref().map(read).transpose()?, identity },
        }))
    }
}

/// `afterimage coordinator move`: what the embedded store holds becomes etcd's; the file is set aside, so that no
/// coordinator goes on from it.
pub async fn move_into(etcd: &Etcd, dir: &Path, out: Output) -> Result<(), Failure> {
    let failed = |message: String| Failure::new(Kind::Failed, "move", message);
    let file = dir.join("state.redb");
    if !file.exists() {
        return Err(failed(format!("{} does not exist", file.display())));
    }
    let store = RedbStore::open(&file)
        .map_err(|e| failed(e.to_string()).hint("stop the coordinator first: this is done while none runs"))?;
    let listing = store.list("").await.map_err(|e| failed(e.to_string()))?;
    let moved = import(etcd, listing).await.map_err(|e| failed(e.to_string()))?;
    drop(store);
    let aside = dir.join(MOVED);
    std::fs::rename(&file, &aside).map_err(|e| {
        failed(format!("{} cannot be set aside: {e}", file.display()))
            .hint("move it away before a coordinator is started without --etcd")
    })?;
    let document = serde_json::json!({ "objects": moved.objects, "revision": moved.revision, "set_aside": aside });
    out.show(&document, || {
        let mut text =
            fields(&[("moved", format!("{} objects", moved.objects)), ("set aside", aside.display().to_string())]);
        text += "\nstart each coordinator with the same --etcd, and with ca.pem and keys.bin from ";
        text += &format!("{} in its data folder\n", dir.display());
        text
    });
    Ok(())
}
