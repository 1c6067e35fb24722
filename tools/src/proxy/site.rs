//! The key of this site. Under it lie, sealed, the policy keys in the proxy's own state, and those beside each journal:
//! with source and coordinator gone a journal opens here all the same.
//!
//! ```text
//!  `keys` (a file, a command; else site.key) ──wraps──▶ site key (site.keys) ──seals──▶ desired.pb
//!                                                                                   └─▶ JOURNAL/streams/STREAM/keys
//! ```

use std::io;
use std::path::{Path, PathBuf};

use afterimage_controlplane::escrow::{EscrowKey, Holder};
use afterimage_controlplane::wrapping::{FileWrapper, KeyWrapper, KeysConfig, WrapError};
use afterimage_dataplane::seal;
use afterimage_wire::FormatError;
use afterimage_wire::ids::{PolicyKeyId, StreamId};
use afterimage_wire::keys::{HeldKey, KeysFile, MAX_KEYS, SEALED_KEY_LEN};
use afterimage_wire::record::DiskInfo;
use afterimage_wire::v1::{DesiredState, PolicyKey, TargetDisk, TargetStream};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::convert;
use super::keep;
use super::state::Proxy;

/// The site key, wrapped, in the state folder.
const STORED: &str = "site.keys";
/// What wraps it unless told.
const OWN: &str = "site.key";
/// Version of [`STORED`].
const VERSION: u32 = 1;
/// File beside a journal.
pub const KEYS_FILE: &str = "keys";

/// Why there is no site key, or keys are not kept.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what we wrote.
    #[error("{}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A keys file.
    #[error("{}: {source}; without it nothing is acknowledged here, and it is not replaced", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The setting.
    #[error("{0}")]
    Config(String),
    /// What wraps the site key fails.
    #[error("the site key in {} does not open: {why}; set `keys` as it was when it was wrapped", path.display())]
    Wrapped {
        /// The file.
        path: PathBuf,
        /// What was tried.
        why: String,
    },
    /// What wraps does not give back what it was given.
    #[error("a site key cannot be wrapped: {0}")]
    Wrap(String),
    /// A policy key in the proxy's state.
    #[error("a policy key in the kept state does not open with the site key in {}", .0.display())]
    Sealed(PathBuf),
    /// Too many.
    #[error("{}: there is room for {MAX_KEYS} keys of a stream", .0.display())]
    Full(PathBuf),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    afterimage_site_keys: u32,
    /// "file" or "command": for people.
    by: String,
    /// As that has wrapped it, base64.
    wrapped: String,
}

/// The key of a site.
#[derive(Debug)]
pub struct SiteKey {
    path: PathBuf,
    key: EscrowKey,
}

impl SiteKey {
    /// The one of this state folder, made at the first start. One that what was configured before has wrapped is wrapped
    /// anew.
    ///
    /// # Errors
    /// [`SiteError`].
    pub fn open(dir: &Path, config: &KeysConfig) -> Result<Self, SiteError> {
        let path = dir.join(STORED);
        let own = |error: WrapError| SiteError::Config(error.to_string());
        let wrappers = config.check().map_err(SiteError::Config)?;
        let (now, is_own): (Box<dyn KeyWrapper>, bool) = match wrappers.now {
            Some(wrapper) => (wrapper, false),
            None => (Box::new(FileWrapper::open_or_make(&dir.join(OWN)).map_err(own)?), true),
        };
        let Some(wrapped) = read(&path)? else {
            let mut bytes = [0; 32];
            SystemRandom::new().fill(&mut bytes).map_err(|_| SiteError::Wrap(WrapError::Random.to_string()))?;
            write(&path, now.as_ref(), &bytes)?;
            return Ok(Self { path, key: EscrowKey::new(Holder::Site, &bytes) });
        };
        let key = |plain: Vec<u8>| <[u8; 32]>::try_from(plain).ok();
        let mut why = Vec::new();
        match now.unwrap(&wrapped).map(key) {
            Ok(Some(bytes)) => return Ok(Self { path, key: EscrowKey::new(Holder::Site, &bytes) }),
            Ok(None) => why.push(format!("a {} gives no key", now.kind())),
            Err(error) => why.push(error.to_string()),
        }
        let file = dir.join(OWN);
        let before = (!is_own && file.exists()).then(|| FileWrapper::open(&file).map_err(own)).transpose()?;
        let before = wrappers.previous.into_iter().chain(before.map(|b| Box::new(b) as Box<dyn KeyWrapper>));
        for wrapper in before {
            match wrapper.unwrap(&wrapped).map(key) {
                Ok(Some(bytes)) => {
                    write(&path, now.as_ref(), &bytes)?;
                    tracing::warn!("the site key is wrapped by what `keys` says now: what it was before may go");
                    return Ok(Self { path, key: EscrowKey::new(Holder::Site, &bytes) });
                }
                Ok(None) => why.push(format!("a {} gives no key", wrapper.kind())),
                Err(error) => why.push(error.to_string()),
            }
        }
        Err(SiteError::Wrapped { path, why: why.join("; ") })
    }

    /// The one of a state folder that is there.
    ///
    /// # Errors
    /// [`SiteError`]; there is none.
    pub fn existing(dir: &Path, config: &KeysConfig) -> Result<Self, SiteError> {
        let path = dir.join(STORED);
        match path.exists() {
            true => Self::open(dir, config),
            false => Err(SiteError::File { path, source: io::ErrorKind::NotFound.into() }),
        }
    }

    /// What seals and opens.
    pub fn into_escrow(self) -> EscrowKey {
        self.key
    }

    /// What seals and opens.
    pub fn escrow(&self) -> &EscrowKey {
        &self.key
    }

    /// A desired state as it is kept: with its keys sealed.
    pub fn sealed(&self, desired: &DesiredState) -> DesiredState {
        let mut kept = desired.clone();
        each_key(&mut kept, |stream, key| {
            if let (Ok(id), Ok(bytes)) = (key.id.parse(), <[u8; 32]>::try_from(&key.key[..])) {
                key.key = self.key.seal(stream, id, &bytes).to_vec();
            }
        });
        kept
    }

    /// Opens the keys of a kept desired state. True if some lay there in plain, as earlier versions kept them.
    ///
    /// # Errors
    /// One does not open.
    pub fn opened(&self, kept: &mut DesiredState) -> Result<bool, SiteError> {
        let (mut plain, mut bad) = (false, false);
        each_key(kept, |stream, key| match key.key.len() {
            SEALED_KEY_LEN => match key.id.parse().ok().and_then(|id| self.key.open(stream, id, &key.key)) {
                Some(bytes) => key.key = bytes.to_vec(),
                None => bad = true,
            },
            _ => plain = true,
        });
        if bad { Err(SiteError::Sealed(self.path.clone())) } else { Ok(plain) }
    }
}

fn each_key(desired: &mut DesiredState, mut each: impl FnMut(StreamId, &mut PolicyKey)) {
    let sources = desired.sources.iter_mut().map(|s| (&s.stream_uid, &mut s.key));
    let targets = desired.targets.iter_mut().map(|t| (&t.stream_uid, &mut t.key));
    for (uid, key) in sources.chain(targets) {
        let (Ok(stream), Some(key)) = (uid.parse(), key) else { continue };
        key.older.iter_mut().for_each(|older| each(stream, older));
        each(stream, key);
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, SiteError> {
    let content = |what: String| SiteError::Content { path: path.to_owned(), what };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SiteError::File { path: path.to_owned(), source }),
    };
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|e| content(e.to_string()))?;
    if stored.afterimage_site_keys != VERSION {
        return Err(content(format!("it is of version {}; known is {VERSION}", stored.afterimage_site_keys)));
    }
    STANDARD.decode(&stored.wrapped).map(Some).map_err(|e| content(e.to_string()))
}

fn write(path: &Path, wrapper: &dyn KeyWrapper, bytes: &[u8; 32]) -> Result<(), SiteError> {
    let wrapped = wrapper.wrap(bytes).map_err(|e| SiteError::Wrap(e.to_string()))?;
    if wrapper.unwrap(&wrapped).map_err(|e| SiteError::Wrap(e.to_string()))? != bytes {
        return Err(SiteError::Wrap("it is another one when it is unwrapped".to_owned()));
    }
    let wrapped = STANDARD.encode(wrapped);
    let stored = Stored { afterimage_site_keys: VERSION, by: wrapper.kind().to_owned(), wrapped };
    let text = serde_json::to_vec(&stored).map_err(|e| SiteError::Wrap(e.to_string()))?;
    keep::replace(path, &text).map_err(|source| SiteError::File { path: path.to_owned(), source })
}

/// The file with the keys of a stream.
pub fn keys_path(journal: &Path, stream: StreamId) -> PathBuf {
    journal.join("streams").join(stream.to_string()).join(KEYS_FILE)
}

/// Reads the file with the keys of a stream; nothing if there is none.
///
/// # Errors
/// It cannot be read, or is damaged.
pub fn read_keys(path: &Path) -> Result<Option<KeysFile>, SiteError> {
    match std::fs::read(path) {
        Ok(bytes) => {
            KeysFile::decode(&bytes).map(Some).map_err(|source| SiteError::Keys { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SiteError::File { path: path.to_owned(), source }),
    }
}

/// What a coordinator would say of a stream, by what lies beside its journal.
pub fn as_said(file: &KeysFile, key: PolicyKey) -> DesiredState {
    let disk = |(info, generation): &(DiskInfo, u64)| TargetDisk {
        uid: info.id.to_string(),
        slot: info.slot.into(),
        name: info.name.clone(),
        serial: info.serial.clone(),
        size_bytes: info.size,
        block_bytes: info.block,
        physical_block_bytes: info.physical_block,
        generation: *generation,
        ..TargetDisk::default()
    };
    let stream = TargetStream {
        stream_uid: file.stream.to_string(),
        name: file.name.clone(),
        key: Some(key),
        retention_s: file.retention_s,
        disks: file.disks.iter().map(disk).collect(),
        ..TargetStream::default()
    };
    DesiredState { targets: vec![stream], ..DesiredState::default() }
}

/// The keys of a file, as far as they open: the newest, with those before it.
pub fn opened(file: &KeysFile, by: &EscrowKey) -> Option<PolicyKey> {
    let sealed = |key: &HeldKey| match by.id {
        id if id == file.site_key => Some(key.site),
        id if id == file.recovery_key => key.recovery,
        _ => None,
    };
    let open = |key: &HeldKey| {
        let bytes = by.open(file.stream, key.id, &sealed(key)?)?;
        Some(PolicyKey { id: key.id.to_string(), key: bytes.to_vec(), ..PolicyKey::default() })
    };
    let mut opened = file.keys.iter().filter_map(open);
    let newest = opened.next()?;
    Some(PolicyKey { older: opened.collect(), ..newest })
}

/// Keeps what was said of a stream's keys beside its journal, durably. Those that were kept before stay, whatever is said
/// now: all of them are returned. Nothing if this proxy has no site key.
///
/// # Errors
/// [`SiteError`]; [`convert::Senseless`] as text.
pub fn keep_keys(proxy: &Proxy, said: &TargetStream) -> Result<Option<seal::PolicyKey>, SiteError> {
    let (Some(site), Some(role)) = (&proxy.site, &proxy.config.target) else { return Ok(None) };
    let senseless = |e: convert::Senseless| SiteError::Config(e.to_string());
    let stream: StreamId = convert::id("stream_uid", &said.stream_uid).map_err(senseless)?;
    let path = keys_path(&role.journal, stream);
    let before = read_keys(&path)?;
    let next = merged(site.escrow(), stream, before.clone().unwrap_or_default(), said).map_err(senseless)?;
    if next.keys.len() > MAX_KEYS {
        return Err(SiteError::Full(path));
    }
    if before.as_ref() != Some(&next) {
        let failed = |path: &Path, source| SiteError::File { path: path.to_owned(), source };
        let folder = path.parent().unwrap_or(&role.journal);
        keep::folder(folder).map_err(|e| failed(folder, e))?;
        keep::replace(&path, &next.encode()).map_err(|e| failed(&path, e))?;
    }
    opened(&next, site.escrow()).map(|key| convert::policy_key(Some(&key))).transpose().map_err(senseless)
}

fn merged(
    site: &EscrowKey,
    stream: StreamId,
    before: KeysFile,
    said: &TargetStream,
) -> Result<KeysFile, convert::Senseless> {
    let newer: Option<[u8; 16]> = said.recovery_key[..].try_into().ok();
    let config = convert::stream(said)?;
    let mut keys = Vec::new();
    for key in said.key.iter().flat_map(|key| std::iter::once(key).chain(&key.older)) {
        let id: PolicyKeyId = convert::id("key.id", &key.id)?;
        let Ok(bytes) = <[u8; 32]>::try_from(&key.key[..]) else { continue };
        let known = before.keys.iter().find(|k| k.id == id).and_then(|k| k.recovery);
        let recovery = key.recovery[..].try_into().ok().or(known.filter(|_| newer.is_none()));
        keys.push(HeldKey { id, site: site.seal(stream, id, &bytes), recovery });
    }
    for key in before.keys {
        if !keys.iter().any(|k| k.id == key.id) {
            // What nobody names any more is under the recovery key of then.
            let same = newer.is_none_or(|id| id == before.recovery_key);
            keys.push(HeldKey { recovery: key.recovery.filter(|_| same), ..key });
        }
    }
    Ok(KeysFile {
        stream,
        site_key: site.id,
        recovery_key: newer.unwrap_or(before.recovery_key),
        retention_s: said.retention_s,
        name: said.name.clone(),
        keys,
        disks: config.disks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_controlplane::escrow::RecoveryKey;

    fn said(stream: StreamId, ids: &[(PolicyKeyId, u8)], recovery: Option<&EscrowKey>) -> TargetStream {
        let one = |(id, byte): &(PolicyKeyId, u8)| PolicyKey {
            id: id.to_string(),
            key: vec![*byte; 32],
            recovery: recovery.map(|r| r.seal(stream, *id, &[*byte; 32]).to_vec()).unwrap_or_default(),
            older: Vec::new(),
        };
        let mut all: Vec<PolicyKey> = ids.iter().map(one).collect();
        let older = all.split_off(1);
        TargetStream {
            stream_uid: stream.to_string(),
            name: "shop".into(),
            key: all.pop().map(|key| PolicyKey { older, ..key }),
            retention_s: 60,
            recovery_key: recovery.map(|r| r.id.to_vec()).unwrap_or_default(),
            ..TargetStream::default()
        }
    }

    fn opens(file: &KeysFile, by: &EscrowKey, id: PolicyKeyId) -> bool {
        let key = file.keys.iter().find(|k| k.id == id).unwrap();
        let sealed = if by.id == file.site_key { Some(key.site) } else { key.recovery };
        sealed.is_some_and(|s| by.open(file.stream, id, &s).is_some())
    }

    #[test]
    fn a_key_is_never_taken_out_and_the_recovery_key_opens_what_is_named() {
        let site = EscrowKey::new(Holder::Site, &[1; 32]);
        let (first, second) = (RecoveryKey([2; 32]).escrow(), RecoveryKey([3; 32]).escrow());
        let (stream, a, b) = (StreamId::random(), PolicyKeyId::random(), PolicyKeyId::random());
        let file = merged(&site, stream, KeysFile::default(), &said(stream, &[(a, 10)], None)).unwrap();
        assert!(opens(&file, &site, a) && !opens(&file, &first, a) && file.recovery_key == [0; 16]);
        let file = merged(&site, stream, file, &said(stream, &[(a, 10)], Some(&first))).unwrap();
        assert!(opens(&file, &first, a));
        // A coordinator that knows neither the older key nor the recovery key takes nothing away.
        let file = merged(&site, stream, file, &said(stream, &[(b, 11)], None)).unwrap();
        assert_eq!(file.keys.iter().map(|k| k.id).collect::<Vec<_>>(), [b, a]);
        assert!(opens(&file, &site, a) && opens(&file, &site, b) && opens(&file, &first, a));
        let file = merged(&site, stream, file, &said(stream, &[(b, 11), (a, 10)], Some(&second))).unwrap();
        assert!(opens(&file, &second, a) && opens(&file, &second, b) && !opens(&file, &first, a));
        assert_eq!(KeysFile::decode(&file.encode()).unwrap(), file);
        let key = opened(&file, &second).unwrap();
        assert_eq!((key.id, key.older[0].id.clone()), (b.to_string(), a.to_string()));
        assert!(opened(&file, &first).is_none());
    }

    #[test]
    fn the_kept_state_has_no_key_in_plain_and_that_of_an_earlier_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let site = SiteKey::open(dir.path(), &KeysConfig::default()).unwrap();
        let stream = StreamId::random();
        let ids = [(PolicyKeyId::random(), 0xb7), (PolicyKeyId::random(), 0xb8)];
        let desired = DesiredState { targets: vec![said(stream, &ids, None)], ..DesiredState::default() };
        let mut kept = site.sealed(&desired);
        let bytes = prost::Message::encode_to_vec(&kept);
        assert!(!bytes.windows(8).any(|w| w == [0xb7; 8] || w == [0xb8; 8]));
        // The same folder opens it, another does not.
        let again = SiteKey::open(dir.path(), &KeysConfig::default()).unwrap();
        let mut copy = kept.clone();
        assert!(!again.opened(&mut copy).unwrap());
        assert_eq!(copy, desired);
        let other = tempfile::tempdir().unwrap();
        let other = SiteKey::open(other.path(), &KeysConfig::default()).unwrap();
        assert!(matches!(other.opened(&mut kept), Err(SiteError::Sealed(_))));
        let mut plain = desired.clone();
        assert!(again.opened(&mut plain).unwrap());
        assert_eq!(plain, desired);
    }

    #[test]
    fn a_site_key_is_wrapped_by_what_is_configured_and_moves_to_what_is_next() {
        let dir = tempfile::tempdir().unwrap();
        let id = SiteKey::open(dir.path(), &KeysConfig::default()).unwrap().key.id;
        let file = dir.path().join("elsewhere");
        keep::replace(&file, &[9; 32]).unwrap();
        let config = KeysConfig { file: Some(file.clone()), ..KeysConfig::default() };
        assert_eq!(SiteKey::open(dir.path(), &config).unwrap().key.id, id);
        std::fs::remove_file(dir.path().join(OWN)).unwrap();
        assert_eq!(SiteKey::open(dir.path(), &config).unwrap().key.id, id);
        let next = dir.path().join("next");
        keep::replace(&next, &[8; 32]).unwrap();
        let alone = KeysConfig { file: Some(next), ..KeysConfig::default() };
        let refused = SiteKey::open(dir.path(), &alone).unwrap_err().to_string();
        assert!(refused.contains("site.keys") && refused.contains("set `keys`"), "{refused}");
        let both = KeysConfig { previous: Some(Box::new(config)), ..alone.clone() };
        assert_eq!(SiteKey::open(dir.path(), &both).unwrap().key.id, id);
        assert_eq!(SiteKey::open(dir.path(), &alone).unwrap().key.id, id);
    }
}
