//! Policy keys: random, given only to the two proxies of a group. In the store they are wrapped under a *wrapping key*,
//! which lies there too, wrapped itself by what the operator has chosen ([`crate::wrapping`]): so that a copy of the
//! store alone opens nothing, and a command (a KMS) is run once at a start and not for each group.
//!
//! ```text
//!  file or command ──wraps──▶ wrapping key ──wraps──▶ policy key ──wraps──▶ data key of a writer
//!  (or keys.bin)              `wrapping`              `keys/ID`             head of a segment
//! ```
//! Records that name no wrapping key are those of earlier versions, and of an installation that has never rewrapped:
//! they are wrapped by `keys.bin` itself.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::RwLock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::bundle::write_private;
use crate::ca::hex;
use crate::objects::{KeyRecord, new_uid};
use crate::wrapping::{FileWrapper, KeyWrapper, WrapError, Wrappers};

/// Bytes of a policy key.
pub const KEY_LEN: usize = 32;

/// Keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key file is not one.
    #[error("{} is no key file: it has {found} bytes, not {KEY_LEN}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: usize,
    },
    /// A wrapped key does not open: another key file, or damage.
    #[error("the policy key {0} does not open with this key file")]
    Unwrap(String),
    /// A wrapping key does not open: other settings, or a command that fails.
    #[error("the wrapping key {id}, which a {by} has wrapped, does not open: {why}; set `keys` as it was then")]
    Wrapping {
        /// Which.
        id: String,
        /// "file" or "command".
        by: String,
        /// What was tried, and what came of it.
        why: String,
    },
    /// A new wrapping key cannot be wrapped.
    #[error("a wrapping key cannot be wrapped: {0}")]
    Wrap(#[from] WrapError),
    /// What wraps does not give back what it was given.
    #[error("a wrapping key that was wrapped is another one when it is unwrapped: nothing was changed")]
    Unfaithful,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

/// A wrapping key, wrapped.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WrappingKey {
    /// Uid.
    pub id: String,
    /// "file" or "command": for people.
    pub by: String,
    /// As that has wrapped it, hex.
    pub wrapped: String,
    /// Since when, nanoseconds since the Unix epoch.
    pub since_ns: u64,
}

/// The wrapping keys, oldest first: the last is the one of now; the others are there until nothing needs them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Wrapping {
    /// Them.
    pub keys: Vec<WrappingKey>,
}

/// The recovery key: opens the keys file beside a journal. It was shown once, when it was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recovery {
    /// It, wrapped; its id is in its text, and in keys files.
    pub key: KeyRecord,
    /// When it was made, nanoseconds since the Unix epoch.
    pub made_ns: u64,
}

/// Wraps and unwraps policy keys.
pub struct Wrapper {
    /// By `keys.bin`.
    base: LessSafeKey,
    /// For secrets that are made anew instead of kept.
    derives: ring::hmac::Key,
    random: SystemRandom,
    /// By `keys.bin`, for wrapping keys.
    own: FileWrapper,
    wrappers: Wrappers,
    ring: RwLock<Ring>,
}

/// Wrapping keys that are open.
#[derive(Default)]
struct Ring {
    newest: Option<String>,
    open: BTreeMap<String, LessSafeKey>,
}

fn aead(bytes: &[u8]) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, bytes).ok().map(LessSafeKey::new)
}

impl Wrapper {
    /// Reads the key file, or makes it.
    ///
    /// # Errors
    /// The file cannot be read or written, or is not one.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let io = |source| KeyError::Io { path: path.to_owned(), source };
        let random = SystemRandom::new();
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mut bytes = vec![0; KEY_LEN];
                random.fill(&mut bytes).map_err(|_| KeyError::Random)?;
                write_private(path, &bytes).map_err(io)?;
                bytes
            }
            Err(e) => return Err(io(e)),
        };
        let base = aead(&bytes).ok_or_else(|| KeyError::Malformed { path: path.to_owned(), found: bytes.len() })?;
        // Another key for another purpose, by the first one.
        let other = |purpose: &[u8]| {
            ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &bytes), purpose).as_ref().to_vec()
        };
        let derives = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &other(b"afterimage secrets v1"));
        let own = FileWrapper::of(path, &other(b"afterimage wrapping keys v1"));
        Ok(Self { base, derives, random, own, wrappers: Wrappers::default(), ring: RwLock::default() })
    }

    /// With what wraps wrapping keys from now on, where that is not the key file.
    pub fn by(self, wrappers: Wrappers) -> Self {
        Self { wrappers, ..self }
    }

    fn now(&self) -> &dyn KeyWrapper {
        self.wrappers.now.as_deref().unwrap_or(&self.own)
    }

    /// Opens the wrapping keys of a store. Runs a command, where one wraps: it may take a while.
    ///
    /// # Errors
    /// One does not open.
    pub fn learn(&self, known: &Wrapping) -> Result<(), KeyError> {
        for key in &known.keys {
            let opened = self.unwrap_wrapping(key)?;
            self.ring.write().expect("nothing panics while it holds this").open.insert(key.id.clone(), opened);
        }
        self.follow(Some(known));
        Ok(())
    }

    fn unwrap_wrapping(&self, key: &WrappingKey) -> Result<LessSafeKey, KeyError> {
        let mut why = Vec::new();
        let bad = |why: String| KeyError::Wrapping { id: key.id.clone(), by: key.by.clone(), why };
        let bytes = unhex(&key.wrapped).ok_or_else(|| bad("it is damaged".to_owned()))?;
        let tried = [self.wrappers.now.as_deref(), self.wrappers.previous.as_deref(), Some(&self.own as _)];
        for wrapper in tried.into_iter().flatten() {
            match wrapper.unwrap(&bytes).map(|plain| aead(&plain)) {
                Ok(Some(opened)) => return Ok(opened),
                Ok(None) => why.push(format!("a {} gives no key", wrapper.kind())),
                Err(error) => why.push(error.to_string()),
            }
        }
        Err(bad(why.join("; ")))
    }

    /// What is stored of wrapping keys has changed.
    pub fn follow(&self, known: Option<&Wrapping>) {
        let mut ring = self.ring.write().expect("nothing panics while it holds this");
        let newest = known.and_then(|k| k.keys.last()).map(|key| key.id.clone());
        ring.newest = newest.filter(|id| ring.open.contains_key(id));
    }

    /// A fresh wrapping key, wrapped by what is configured. It is used once it is stored: see [`Self::follow`].
    ///
    /// # Errors
    /// What wraps fails, or does not give back what it was given.
    pub fn make_wrapping(&self, now_ns: u64) -> Result<WrappingKey, KeyError> {
        let mut bytes = [0; KEY_LEN];
        self.random.fill(&mut bytes).map_err(|_| KeyError::Random)?;
        let wrapped = self.now().wrap(&bytes)?;
        if self.now().unwrap(&wrapped)? != bytes {
            return Err(KeyError::Unfaithful);
        }
        let id = new_uid();
        let opened = aead(&bytes).ok_or(KeyError::Random)?;
        self.ring.write().expect("nothing panics while it holds this").open.insert(id.clone(), opened);
        Ok(WrappingKey { id, by: self.now().kind().to_owned(), wrapped: hex(&wrapped), since_ns: now_ns })
    }

    /// A fresh key, wrapped.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn generate(&self, now_ns: u64) -> Result<KeyRecord, KeyError> {
        let mut key = [0; KEY_LEN];
        self.random.fill(&mut key).map_err(|_| KeyError::Random)?;
        Ok(KeyRecord { since_ns: now_ns, ..self.wrap(&new_uid(), &key)? })
    }

    /// A key that a proxy has, wrapped.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn wrap(&self, id: &str, key: &[u8]) -> Result<KeyRecord, KeyError> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| KeyError::Random)?;
        let mut sealed = key.to_vec();
        let ring = self.ring.read().expect("nothing panics while it holds this");
        let by = ring.newest.as_ref().and_then(|id| ring.open.get(id)).unwrap_or(&self.base);
        by.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(id.as_bytes()), &mut sealed)
            .map_err(|_| KeyError::Random)?;
        let wrapped = hex(&nonce) + &hex(&sealed);
        Ok(KeyRecord { id: id.to_owned(), wrapped, under: ring.newest.clone().unwrap_or_default(), since_ns: 0 })
    }

    /// The same under the newest wrapping key.
    ///
    /// # Errors
    /// As [`Self::unwrap`].
    pub fn rewrap(&self, record: &KeyRecord) -> Result<KeyRecord, KeyError> {
        let plain = self.unwrap_bytes(record)?;
        Ok(KeyRecord { since_ns: record.since_ns, ..self.wrap(&record.id, &plain)? })
    }

    /// A secret, the same for the same purpose and key file; base64 of 32 bytes.
    pub fn derive(&self, purpose: &str) -> String {
        URL_SAFE_NO_PAD.encode(ring::hmac::sign(&self.derives, purpose.as_bytes()))
    }

    /// The key itself.
    ///
    /// # Errors
    /// Wrapped under another key, or damaged.
    pub fn unwrap(&self, record: &KeyRecord) -> Result<[u8; KEY_LEN], KeyError> {
        let key = self.unwrap_bytes(record)?;
        key[..].try_into().map_err(|_| KeyError::Unwrap(record.id.clone()))
    }

    /// What was wrapped, of any length.
    ///
    /// # Errors
    /// As [`Self::unwrap`].
    pub fn unwrap_bytes(&self, record: &KeyRecord) -> Result<Vec<u8>, KeyError> {
        let bad = || KeyError::Unwrap(record.id.clone());
        let bytes = unhex(&record.wrapped).ok_or_else(bad)?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_LEN).ok_or_else(bad)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| bad())?;
        let ring = self.ring.read().expect("nothing panics while it holds this");
        let by = match record.under.as_str() {
            "" => &self.base,
            under => ring.open.get(under).ok_or_else(bad)?,
        };
        let plain = by.open_in_place(nonce, Aad::from(record.id.as_bytes()), &mut sealed).map_err(|_| bad())?;
        Ok(plain.to_vec())
    }
}

/// Bytes from lower-case hexadecimal.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wrapping::KeysConfig;

    #[test]
    fn keys_open_only_with_the_file_they_were_wrapped_under() {
        let folder = tempfile::tempdir().unwrap();
        let wrapper = Wrapper::open(&folder.path().join("a")).unwrap();
        let record = wrapper.generate(1).unwrap();
        let key = wrapper.unwrap(&record).unwrap();
        assert_eq!(Wrapper::open(&folder.path().join("a")).unwrap().unwrap(&record).unwrap(), key);
        assert_ne!(wrapper.unwrap(&wrapper.generate(1).unwrap()).unwrap(), key);
        assert!(!record.wrapped.contains(&hex(&key)));
        let other = Wrapper::open(&folder.path().join("b")).unwrap();
        assert!(matches!(other.unwrap(&record), Err(KeyError::Unwrap(_))));
    }

    #[test]
    fn a_key_is_bound_to_its_id_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let wrapper = Wrapper::open(&folder.path().join("a")).unwrap();
        let record = wrapper.generate(1).unwrap();
        assert!(wrapper.unwrap(&KeyRecord { id: "other".into(), ..record.clone() }).is_err());
        for wrapped in ["", "zz", "00", &record.wrapped[2..], "ä"] {
            assert!(wrapper.unwrap(&KeyRecord { wrapped: wrapped.into(), ..record.clone() }).is_err());
        }
    }

    #[test]
    fn a_short_key_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "short").unwrap();
        assert!(matches!(Wrapper::open(&folder.path().join("a")), Err(KeyError::Malformed { found: 5, .. })));
    }

    /// What a version without wrapping keys has stored: key file of 32 times 7, policy key of 32 times 9.
    #[test]
    fn what_an_earlier_version_has_wrapped_opens_and_is_rewrapped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.bin");
        write_private(&path, &[7; 32]).unwrap();
        let stored = format!(r#"{{"id":"old","wrapped":"{EARLIER}"}}"#);
        let record: KeyRecord = serde_json::from_str(&stored).unwrap();
        let wrapper = Wrapper::open(&path).unwrap();
        assert_eq!(wrapper.unwrap(&record).unwrap(), [9; 32]);
        let key = wrapper.make_wrapping(5).unwrap();
        // Not before it is stored.
        assert_eq!(wrapper.rewrap(&record).unwrap().under, "");
        let known = Wrapping { keys: vec![key.clone()] };
        wrapper.follow(Some(&known));
        let rewrapped = wrapper.rewrap(&record).unwrap();
        assert_eq!((rewrapped.under.as_str(), key.by.as_str()), (key.id.as_str(), "file"));
        // After a restart both open.
        let again = Wrapper::open(&path).unwrap();
        assert!(again.unwrap(&rewrapped).is_err());
        again.learn(&known).unwrap();
        assert_eq!((again.unwrap(&rewrapped).unwrap(), again.unwrap(&record).unwrap()), ([9; 32], [9; 32]));
        let other = Wrapper::open(&folder.path().join("other")).unwrap();
        let refused = other.learn(&known).unwrap_err().to_string();
        assert!(refused.contains(&key.id) && refused.contains("set `keys`"), "{refused}");
    }

    const EARLIER: &str = "000102030405060708090a0b1188e0791400d0407ebbec95eb5165f3e835bf87116b7e381fc76ab387de640c0416739193cfc1b5d6a06f56e7687332";

    #[test]
    fn what_wraps_is_replaced_by_way_of_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let file = |name: &str| KeysConfig { file: Some(at(name)), ..KeysConfig::default() };
        let wrapper = |config: &KeysConfig| Wrapper::open(&at("keys.bin")).unwrap().by(config.check().unwrap());
        write_private(&at("first"), &[1; 32]).unwrap();
        write_private(&at("second"), &[2; 32]).unwrap();
        let first = wrapper(&file("first"));
        let key = first.make_wrapping(1).unwrap();
        let known = Wrapping { keys: vec![key] };
        first.follow(Some(&known));
        let record = first.generate(2).unwrap();
        assert!(wrapper(&file("second")).learn(&known).is_err());
        assert!(wrapper(&KeysConfig::default()).learn(&known).is_err());
        let both = wrapper(&KeysConfig { previous: Some(Box::new(file("first"))), ..file("second") });
        both.learn(&known).unwrap();
        let newer = both.make_wrapping(3).unwrap();
        let known = Wrapping { keys: [known.keys, vec![newer]].concat() };
        both.follow(Some(&known));
        let rewrapped = both.rewrap(&record).unwrap();
        let after = wrapper(&file("second"));
        after.learn(&Wrapping { keys: known.keys[1..].to_vec() }).unwrap();
        assert_eq!(after.unwrap(&rewrapped).unwrap(), first.unwrap(&record).unwrap());
        assert_eq!((rewrapped.since_ns, rewrapped.id), (2, record.id));
    }

    #[test]
    fn a_command_that_does_not_give_back_what_it_was_given_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("kms");
        fs::write(&script, "#!/bin/sh\nhead -c 32 /dev/urandom\n").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let config = KeysConfig { command: vec![script.display().to_string()], ..KeysConfig::default() };
        let wrapper = Wrapper::open(&folder.path().join("keys.bin")).unwrap().by(config.check().unwrap());
        assert!(matches!(wrapper.make_wrapping(1), Err(KeyError::Unfaithful)));
    }
}
