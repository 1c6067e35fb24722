//! Policy keys sealed to be kept beside a journal: under a key of the site, and under the recovery key, which the operator
//! holds and nobody shows a second time.
//!
//! Sealing the same key for the same stream again gives the same bytes: the nonce is drawn from what is sealed, so it is
//! not used twice for two contents, and nothing that compares what was said before with what is said now sees a change.

use std::fmt;
use std::str::FromStr;

use afterimage_wire::ids::{PolicyKeyId, StreamId};
use afterimage_wire::keys::{SEALED_KEY_LEN, SealedKey};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;

use crate::ca::sha256;
use crate::keys::KEY_LEN;

/// Begin of a recovery key's text.
const PREFIX: &str = "airk1-";
/// RFC 4648, without what fills up.
const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/// Bytes of the checksum in a recovery key's text.
const CHECK: usize = 4;
/// Characters of its text between two dashes.
const TOGETHER: usize = 6;

/// Whose key seals.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Holder {
    /// The target's site.
    Site,
    /// The operator.
    Recovery,
}

impl Holder {
    fn purpose(self) -> &'static [u8] {
        match self {
            Self::Site => b"afterimage site key v1",
            Self::Recovery => b"afterimage recovery key v1",
        }
    }
}

/// Seals and opens policy keys.
pub struct EscrowKey {
    /// Names it in keys files.
    pub id: [u8; 16],
    holder: Holder,
    key: LessSafeKey,
    nonces: hmac::Key,
}

impl fmt::Debug for EscrowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EscrowKey({:?})", self.holder)
    }
}

impl EscrowKey {
    /// Of 32 random bytes. Its id tells nothing of them.
    pub fn new(holder: Holder, bytes: &[u8; KEY_LEN]) -> Self {
        let master = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        let of = |what: &[u8]| hmac::sign(&master, &[holder.purpose(), what].concat());
        let key = UnboundKey::new(&AES_256_GCM, of(b" seal").as_ref()).expect("32 bytes are a key");
        let mut id = [0; 16];
        id.copy_from_slice(&of(b" id").as_ref()[..16]);
        let nonces = hmac::Key::new(hmac::HMAC_SHA256, of(b" nonces").as_ref());
        Self { id, holder, key: LessSafeKey::new(key), nonces }
    }

    fn bound(&self, stream: StreamId, policy_key: PolicyKeyId) -> Vec<u8> {
        [self.holder.purpose(), &stream.0, &policy_key.0].concat()
    }

    /// A policy key of a stream, sealed.
    pub fn seal(&self, stream: StreamId, policy_key: PolicyKeyId, key: &[u8; KEY_LEN]) -> SealedKey {
        let bound = self.bound(stream, policy_key);
        let mut out = [0; SEALED_KEY_LEN];
        let mut drawn = hmac::Context::with_key(&self.nonces);
        drawn.update(&bound);
        drawn.update(key);
        out[..NONCE_LEN].copy_from_slice(&drawn.sign().as_ref()[..NONCE_LEN]);
        let nonce = Nonce::try_assume_unique_for_key(&out[..NONCE_LEN]).expect("12 bytes are a nonce");
        let sealed = &mut out[NONCE_LEN..];
        sealed[..KEY_LEN].copy_from_slice(key);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&bound), &mut sealed[..KEY_LEN])
            .expect("32 bytes can be sealed");
        sealed[KEY_LEN..].copy_from_slice(tag.as_ref());
        out
    }

    /// The policy key again; nothing if this key has not sealed it, for this stream and id, or it was changed.
    pub fn open(&self, stream: StreamId, policy_key: PolicyKeyId, sealed: &[u8]) -> Option<[u8; KEY_LEN]> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut sealed = sealed.to_vec();
        let plain = self.key.open_in_place(nonce, Aad::from(self.bound(stream, policy_key)), &mut sealed).ok()?;
        (*plain).try_into().ok()
    }
}

/// The recovery key as the operator holds it: `airk1-`, and 36 bytes in base 32, the last four of which are a checksum.
#[derive(Clone, PartialEq, Eq)]
pub struct RecoveryKey(pub [u8; KEY_LEN]);

/// A text that is no recovery key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is no recovery key: {0}")]
pub struct BadRecoveryKey(&'static str);

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(…)")
    }
}

impl RecoveryKey {
    /// What it seals and opens with.
    pub fn escrow(&self) -> EscrowKey {
        EscrowKey::new(Holder::Recovery, &self.0)
    }

    /// The text, to be shown once.
    pub fn text(&self) -> String {
        let (mut out, mut bits, mut have) = (PREFIX.to_owned(), 0_u32, 0);
        let mut written = 0;
        let mut put = |value: u32| {
            if written > 0 && written % TOGETHER == 0 {
                out.push('-');
            }
            out.push(char::from(ALPHABET[(value & 31) as usize]));
            written += 1;
        };
        for byte in self.0.iter().chain(&check(&self.0)) {
            (bits, have) = (bits << 8 | u32::from(*byte), have + 8);
            while have >= 5 {
                have -= 5;
                put(bits >> have);
            }
        }
        if have > 0 {
            put(bits << (5 - have));
        }
        out
    }
}

fn check(bytes: &[u8; KEY_LEN]) -> [u8; CHECK] {
    let digest = sha256(&[b"afterimage recovery key text v1".as_slice(), bytes].concat());
    [digest[0], digest[1], digest[2], digest[3]]
}

impl FromStr for RecoveryKey {
    type Err = BadRecoveryKey;

    fn from_str(text: &str) -> Result<Self, BadRecoveryKey> {
        let bad = |why| Err(BadRecoveryKey(why));
        let text = text.trim();
        let Some(rest) = text.get(PREFIX.len()..).filter(|_| text[..PREFIX.len()].eq_ignore_ascii_case(PREFIX)) else {
            return bad("it does not begin with airk1-");
        };
        let (mut bytes, mut bits, mut have) = (Vec::with_capacity(KEY_LEN + CHECK), 0_u32, 0);
        for c in rest.bytes().filter(|c| *c != b'-' && !c.is_ascii_whitespace()) {
            let Some(value) = ALPHABET.iter().position(|a| *a == c.to_ascii_uppercase()) else {
                return bad("a character is none of A to Z and 2 to 7");
            };
            (bits, have) = ((bits << 5 | value as u32) & 0xfff, have + 5);
            if have >= 8 {
                have -= 8;
                bytes.push((bits >> have) as u8);
            }
        }
        if bytes.len() != KEY_LEN + CHECK {
            return bad("it is not as long as one: 58 characters in groups of six");
        }
        let mut key = [0; KEY_LEN];
        key.copy_from_slice(&bytes[..KEY_LEN]);
        if bytes[KEY_LEN..] != check(&key) {
            return bad("a character is wrong: its checksum differs");
        }
        Ok(Self(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: StreamId = StreamId([1; 16]);
    const ID: PolicyKeyId = PolicyKeyId([2; 16]);

    #[test]
    fn a_sealed_key_opens_only_for_its_stream_its_id_and_by_its_holder() {
        let key = EscrowKey::new(Holder::Site, &[3; 32]);
        let sealed = key.seal(STREAM, ID, &[9; 32]);
        assert_eq!(sealed, key.seal(STREAM, ID, &[9; 32]));
        assert_eq!(key.open(STREAM, ID, &sealed), Some([9; 32]));
        assert_eq!(key.open(StreamId([7; 16]), ID, &sealed), None);
        assert_eq!(key.open(STREAM, PolicyKeyId([7; 16]), &sealed), None);
        assert_eq!(EscrowKey::new(Holder::Recovery, &[3; 32]).open(STREAM, ID, &sealed), None);
        assert_eq!(EscrowKey::new(Holder::Site, &[4; 32]).open(STREAM, ID, &sealed), None);
        for at in 0..sealed.len() {
            let mut changed = sealed;
            changed[at] ^= 1;
            assert_eq!(key.open(STREAM, ID, &changed), None, "byte {at}");
        }
        assert_eq!(key.open(STREAM, ID, &sealed[..59]), None);
        // Another content has another nonce.
        assert_ne!(sealed[..12], key.seal(STREAM, ID, &[8; 32])[..12]);
    }

    #[test]
    fn a_recovery_key_is_typed_as_it_was_shown_and_mistakes_are_seen() {
        let mut bytes = [0; 32];
        ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes).unwrap();
        let key = RecoveryKey(bytes);
        let text = key.text();
        assert_eq!((text.len(), text.matches('-').count()), (6 + 58 + 9, 10));
        for typed in [text.clone(), text.to_lowercase(), text.replace('-', "").replacen("airk1", "airk1-", 1)] {
            assert_eq!(typed.parse::<RecoveryKey>().unwrap(), key, "{typed}");
        }
        assert_eq!(format!("  {text}\n").parse::<RecoveryKey>().unwrap(), key);
        for at in PREFIX.len()..text.len() {
            let mut wrong = text.clone().into_bytes();
            if wrong[at] == b'-' {
                continue;
            }
            wrong[at] = if wrong[at] == b'A' { b'B' } else { b'A' };
            let wrong = String::from_utf8(wrong).unwrap();
            // The last character holds two bits that nobody reads.
            assert!(wrong.parse::<RecoveryKey>().is_err() || at == text.len() - 1, "{wrong}");
        }
        for bad in ["", "airk1-", "airk2-AAAA", &text[..text.len() - 2], "airk1-äöü", &format!("{text}AA")] {
            assert!(bad.parse::<RecoveryKey>().is_err(), "{bad}");
        }
        assert!(!format!("{key:?}").contains(&text[6..12]));
    }
}
