//! Desired state from a file instead of from a coordinator: for benchmarks and for pairs of proxies that stand alone.
//!
//! The file says what a coordinator would have said, and becomes the same [`DesiredState`]; from there on the code is
//! the same. Certificates stand in it too, made by [`super::throwaway`] or by any authority of the user's.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use afterimage_wire::ids::{DiskId, PolicyKeyId, StreamId};
use afterimage_wire::v1::{
    Compression, DesiredState, OpenView, PolicyKey, SourceDisk, SourceGroup, TargetDisk, TargetStream, ViewKind,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::config::{ConfigError, Secret, Serve};
use super::identity::Pems;
use super::keep;
use super::throwaway::Throwaway;

/// A stand-alone proxy's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standalone {
    /// Certificate, key and authorities.
    pub identity: Pems,
    /// Groups whose disks are here.
    #[serde(default)]
    pub source: Vec<Group>,
    /// Groups whose journal is kept here.
    #[serde(default)]
    pub target: Vec<Group>,
}

/// A group, the same in the source's and in the target's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Id of the stream.
    pub stream: String,
    /// Name.
    pub name: String,
    /// Id of the key under which data keys are wrapped.
    pub key_id: String,
    /// That key: 32 bytes in base64.
    pub key: Secret,
    /// Time between two cuts, milliseconds.
    #[serde(default = "Group::cut_interval_ms")]
    pub cut_interval_ms: u64,
    /// How long every write stays a restore point, seconds.
    #[serde(default = "Group::retention_s")]
    pub retention_s: u64,
    /// LZ4 where it pays.
    #[serde(default = "Group::compress")]
    pub compress: bool,
    /// Without a word from the target for this long the source holds all I/O, milliseconds; 0: never.
    #[serde(default)]
    pub lease_ms: u64,
    /// A write is answered when the target has it, or after so many milliseconds; 0: at once.
    #[serde(default)]
    pub sync_deadline_ms: u64,
    /// Uid of the source.
    pub source_uid: String,
    /// Uid of the target.
    pub target_uid: String,
    /// Where the target's streams arrive, `host:port`.
    pub target_address: String,
    /// Disks, in the order of their slots.
    pub disks: Vec<Disk>,
    /// Views that the target opens when it starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub views: Vec<View>,
}

/// A view.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Name; its exports are called `<name>/<disk>`.
    pub name: String,
    /// The point: state after this record; 0 for the newest complete point.
    #[serde(default)]
    pub seq: u64,
    /// What is written to it goes to a delta.
    #[serde(default)]
    pub writable: bool,
}

impl Group {
    fn cut_interval_ms() -> u64 {
        1000
    }
    fn retention_s() -> u64 {
        4 * 3600
    }
    fn compress() -> bool {
        true
    }
}

/// A disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Id of the disk.
    pub uid: String,
    /// Name; the NBD export is called so, too.
    pub name: String,
    /// Raw file or block device on the source's host.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    #[serde(default = "Disk::block")]
    pub block: u32,
    /// Raw image on the target's host with which the replica begins: it is moved into place.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub seed_path: String,
}

impl Disk {
    fn block() -> u32 {
        512
    }
}

impl Standalone {
    /// Reads the file.
    ///
    /// # Errors
    /// [`ConfigError`], naming the line and the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: error.to_string().trim_end().into() })
    }

    /// Writes the file, for its owner only.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        let text = toml::to_string(self).map_err(std::io::Error::other)?;
        keep::replace(path, text.as_bytes())
    }

    /// What a coordinator would have said.
    ///
    /// # Errors
    /// A key that is none.
    pub fn desired(&self) -> Result<DesiredState, ConfigError> {
        let sources = self.source.iter().map(source_group).collect::<Result<_, _>>()?;
        let targets = self.target.iter().map(target_stream).collect::<Result<_, _>>()?;
        Ok(DesiredState { term: 0, version: 1, sources, targets, ..DesiredState::default() })
    }
}

fn key(group: &Group) -> Result<PolicyKey, ConfigError> {
    let wrong = || ConfigError::Field { field: "key", value: "(secret)".into(), allowed: "32 bytes in base64".into() };
    let key = STANDARD.decode(&group.key.0).map_err(|_| wrong())?;
    if key.len() != 32 {
        return Err(wrong());
    }
    Ok(PolicyKey { id: group.key_id.clone(), key, ..PolicyKey::default() })
}

fn source_group(group: &Group) -> Result<SourceGroup, ConfigError> {
    let disks = group.disks.iter().enumerate().map(|(slot, disk)| SourceDisk {
        uid: disk.uid.clone(),
        slot: slot as u32,
        name: disk.name.clone(),
        path: disk.path.clone(),
        export_name: disk.name.clone(),
        serial: serial(disk),
        size_bytes: disk.size,
        block_bytes: disk.block,
        physical_block_bytes: disk.block.max(4096),
        generation: 1,
        view: String::new(),
    });
    Ok(SourceGroup {
        stream_uid: group.stream.clone(),
        name: group.name.clone(),
        key: Some(key(group)?),
        cut_interval_ms: group.cut_interval_ms,
        compression: if group.compress { Compression::Auto } else { Compression::Off }.into(),
        disks: disks.collect(),
        target_address: group.target_address.clone(),
        target_uid: group.target_uid.clone(),
        hold: false,
        rpo_target_us: 1_000_000,
        lease_ms: group.lease_ms,
        sync_deadline_ms: group.sync_deadline_ms,
        ..SourceGroup::default()
    })
}

fn target_stream(group: &Group) -> Result<TargetStream, ConfigError> {
    let disks = group.disks.iter().enumerate().map(|(slot, disk)| TargetDisk {
        uid: disk.uid.clone(),
        slot: slot as u32,
        name: disk.name.clone(),
        serial: serial(disk),
        size_bytes: disk.size,
        block_bytes: disk.block,
        physical_block_bytes: disk.block.max(4096),
        generation: 1,
        seed_path: disk.seed_path.clone(),
        base_path: String::new(),
    });
    Ok(TargetStream {
        stream_uid: group.stream.clone(),
        name: group.name.clone(),
        key: Some(key(group)?),
        retention_s: group.retention_s,
        journal_budget_bytes: 0,
        disks: disks.collect(),
        source_uid: group.source_uid.clone(),
        views: group.views.iter().map(|view| open_view(group, view)).collect(),
        recovery_key: Vec::new(),
        machines: Vec::new(),
    })
}

fn open_view(group: &Group, view: &View) -> OpenView {
    OpenView {
        stream_uid: group.stream.clone(),
        view: view.name.clone(),
        seq: view.seq,
        disk_uids: Vec::new(),
        writable: view.writable,
        kind: if view.writable { ViewKind::Test } else { ViewKind::Browse }.into(),
        reason: "stand-alone".to_owned(),
    }
}

/// As a coordinator chooses it: the first 20 digits of the uid.
fn serial(disk: &Disk) -> String {
    disk.uid.chars().filter(|c| *c != '-').take(20).collect()
}

/// The files of a source and a target that trust each other, with fresh keys and one group of these disks
/// (name, path, bytes).
///
/// # Errors
/// The system gives no randomness.
pub fn pair(target_address: &str, disks: &[(&str, &str, u64)]) -> Result<(Standalone, Standalone), rcgen::Error> {
    let authority = Throwaway::new()?;
    let (source_uid, target_uid) = (uuid::Uuid::new_v4().to_string(), uuid::Uuid::new_v4().to_string());
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| rcgen::Error::RingUnspecified)?;
    let group = Group {
        stream: StreamId::random().to_string(),
        name: "group".to_owned(),
        key_id: PolicyKeyId::random().to_string(),
        key: Secret(STANDARD.encode(bytes)),
        cut_interval_ms: Group::cut_interval_ms(),
        retention_s: Group::retention_s(),
        compress: true,
        lease_ms: 0,
        sync_deadline_ms: 0,
        source_uid: source_uid.clone(),
        target_uid: target_uid.clone(),
        target_address: target_address.to_owned(),
        disks: disks
            .iter()
            .map(|(name, path, size)| Disk {
                uid: DiskId::random().to_string(),
                name: (*name).to_owned(),
                path: (*path).to_owned(),
                size: *size,
                block: Disk::block(),
                seed_path: String::new(),
            })
            .collect(),
        views: Vec::new(),
    };
    let source = Standalone {
        identity: authority.proxy("source", &source_uid)?,
        source: vec![group.clone()],
        target: Vec::new(),
    };
    let target =
        Standalone { identity: authority.proxy("target", &target_uid)?, source: Vec::new(), target: vec![group] };
    Ok((source, target))
}

/// Why there is no pair.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// A disk of the pair cannot be measured.
    #[error("`{}`: {source}", path.display())]
    Disk {
        /// The disk.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("`{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No certificates.
    #[error("certificates: {0}")]
    Certificates(#[from] rcgen::Error),
}

/// Writes `source.toml` and `target.toml` of a new pair into `dir`.
///
/// # Errors
/// [`PairError`].
pub fn write_pair(dir: &Path, target_address: &str, disks: &[Serve]) -> Result<(), PairError> {
    let sized: Vec<(&str, &str, u64)> = disks
        .iter()
        .map(|disk| {
            let bad = |source| PairError::Disk { path: disk.path.clone(), source };
            // Seeking finds the size of files and devices alike.
            let size = File::open(&disk.path).and_then(|mut file| file.seek(SeekFrom::End(0))).map_err(bad)?;
            let path = disk.path.to_str().filter(|path| path.starts_with('/'));
            let path = path.ok_or_else(|| bad(std::io::Error::other("the path must be absolute and UTF-8")))?;
            Ok((disk.name.as_str(), path, size))
        })
        .collect::<Result<_, PairError>>()?;
    let (source, target) = pair(target_address, &sized)?;
    keep::folder(dir).map_err(|source| PairError::Write { path: dir.to_owned(), source })?;
    for (name, standalone) in [("source.toml", source), ("target.toml", target)] {
        let path = dir.join(name);
        standalone.save(&path).map_err(|source| PairError::Write { path, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_reads_back_and_says_the_same_group_to_both() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = pair("127.0.0.1:7800", &[("a", "/a.raw", 1 << 20), ("b", "/b.raw", 2 << 20)]).unwrap();
        source.save(&dir.path().join("s.toml")).unwrap();
        target.save(&dir.path().join("t.toml")).unwrap();
        let source = Standalone::load(&dir.path().join("s.toml")).unwrap().desired().unwrap();
        let target = Standalone::load(&dir.path().join("t.toml")).unwrap().desired().unwrap();
        assert_eq!((source.sources.len(), source.targets.len()), (1, 0));
        assert_eq!((target.sources.len(), target.targets.len()), (0, 1));
        assert_eq!(source.sources[0].stream_uid, target.targets[0].stream_uid);
        assert_eq!(source.sources[0].key, target.targets[0].key);
        assert_eq!(source.sources[0].disks[1].size_bytes, target.targets[0].disks[1].size_bytes);
        assert_eq!(target.targets[0].disks[1].slot, 1);
    }

    #[test]
    fn a_short_key_is_refused_without_being_shown() {
        let (mut source, _) = pair("127.0.0.1:7800", &[]).unwrap();
        source.source[0].key = Secret("aGk=".to_owned());
        let error = source.desired().unwrap_err().to_string();
        assert!(error.contains("32 bytes") && !error.contains("aGk="), "{error}");
    }
}
