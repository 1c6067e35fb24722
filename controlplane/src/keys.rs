//! Policy keys: one per group, random, given only to the group's two proxies. In the store they are wrapped under a key
//! that lies in a file beside it, so that a copy of the store alone opens nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

use crate::bundle::write_private;
use crate::ca::hex;
use crate::objects::{KeyRecord, new_uid};

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
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

/// Wraps and unwraps policy keys.
pub struct Wrapper {
    key: LessSafeKey,
    /// For secrets that are made anew instead of kept.
    derives: ring::hmac::Key,
    random: SystemRandom,
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
        let key = UnboundKey::new(&AES_256_GCM, &bytes)
            .map_err(|_| KeyError::Malformed { path: path.to_owned(), found: bytes.len() })?;
        // Another key for another purpose, by the first one.
        let seed = ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &bytes), b"afterimage secrets v1");
        let derives = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, seed.as_ref());
        Ok(Self { key: LessSafeKey::new(key), derives, random })
    }

    /// A fresh key, wrapped.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn generate(&self) -> Result<KeyRecord, KeyError> {
        let mut key = [0; KEY_LEN];
        self.random.fill(&mut key).map_err(|_| KeyError::Random)?;
        self.wrap(&new_uid(), &key)
    }

    /// A key that a proxy has, wrapped.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn wrap(&self, id: &str, key: &[u8]) -> Result<KeyRecord, KeyError> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| KeyError::Random)?;
        let id = id.to_owned();
        let mut sealed = key.to_vec();
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(id.as_bytes()), &mut sealed)
            .map_err(|_| KeyError::Random)?;
        Ok(KeyRecord { id, wrapped: hex(&nonce) + &hex(&sealed) })
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
        let plain = self.key.open_in_place(nonce, Aad::from(record.id.as_bytes()), &mut sealed).map_err(|_| bad())?;
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

    #[test]
    fn keys_open_only_with_the_file_they_were_wrapped_under() {
        let folder = tempfile::tempdir().unwrap();
        let wrapper = Wrapper::open(&folder.path().join("a")).unwrap();
        let record = wrapper.generate().unwrap();
        let key = wrapper.unwrap(&record).unwrap();
        assert_eq!(Wrapper::open(&folder.path().join("a")).unwrap().unwrap(&record).unwrap(), key);
        assert_ne!(wrapper.unwrap(&wrapper.generate().unwrap()).unwrap(), key);
        assert!(!record.wrapped.contains(&hex(&key)));
        let other = Wrapper::open(&folder.path().join("b")).unwrap();
        assert!(matches!(other.unwrap(&record), Err(KeyError::Unwrap(_))));
    }

    #[test]
    fn a_key_is_bound_to_its_id_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let wrapper = Wrapper::open(&folder.path().join("a")).unwrap();
        let record = wrapper.generate().unwrap();
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
}
