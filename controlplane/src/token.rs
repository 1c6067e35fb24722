//! Join tokens: one line that lets its holder ask once for one certificate. The coordinator keeps only a hash.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::ca::{Role, hex, sha256};

/// Begins every token; the digit is its version.
const PREFIX: &str = "aij1_";
/// Longest token, characters.
const MAX_TOKEN: usize = 16 * 1024;

/// A token, taken apart.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Names it to the coordinator.
    #[serde(rename = "i")]
    pub id: String,
    /// Proves that the caller was given it.
    #[serde(rename = "s")]
    pub secret: String,
    /// `https://host:port`.
    #[serde(rename = "e")]
    pub endpoint: String,
    /// The coordinator's CA: the joiner trusts only this.
    #[serde(rename = "c")]
    pub ca_pem: String,
    /// "proxy", …; for the joiner to see.
    #[serde(rename = "r")]
    pub role: String,
    /// Whose it is; for the joiner to see.
    #[serde(rename = "n")]
    pub name: String,
}

/// Not a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is no join token: {0}")]
pub struct TokenError(&'static str);

impl JoinToken {
    /// The line.
    pub fn encode(&self) -> String {
        let json = serde_json::to_vec(self).expect("a token is plain strings");
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(json))
    }

    /// Reads the line.
    ///
    /// # Errors
    /// It is none, or of another version.
    pub fn parse(line: &str) -> Result<Self, TokenError> {
        let line = line.trim();
        if line.len() > MAX_TOKEN {
            return Err(TokenError("too long"));
        }
        let body = line.strip_prefix(PREFIX).ok_or(TokenError("it does not begin with \"aij1_\""))?;
        let json = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError("it is cut short or mistyped"))?;
        serde_json::from_slice(&json).map_err(|_| TokenError("it is cut short or mistyped"))
    }
}

/// What the coordinator keeps of a token until it is spent or expired.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Its id.
    pub id: String,
    /// SHA-256 of the secret, hex.
    pub secret_hash: String,
    /// Tenant.
    pub tenant: String,
    /// Role that it gives.
    pub role: Role,
    /// Name that it gives.
    pub name: String,
    /// Nanoseconds since the Unix epoch.
    pub expire_time_ns: u64,
}

/// Why a token is not taken. Told to the caller as one sentence: which of these it was helps only who guesses.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum TokenRefusal {
    /// Spent, or never given out.
    Unknown,
    /// Too late.
    Expired,
    /// Not its secret.
    WrongSecret,
}

impl TokenRecord {
    /// A new token's record and its secret.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn new(tenant: &str, role: Role, name: &str, expire_time_ns: u64) -> Result<(Self, String), TokenError> {
        let mut random = [0u8; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| TokenError("the system gives no random numbers"))?;
        let secret = URL_SAFE_NO_PAD.encode(random);
        let record = Self {
            id: uuid::Uuid::new_v4().to_string(),
            secret_hash: hash(&secret),
            tenant: tenant.to_owned(),
            role,
            name: name.to_owned(),
            expire_time_ns,
        };
        Ok((record, secret))
    }

    /// The same with another secret.
    #[must_use]
    pub fn with_secret(self, secret: &str) -> Self {
        Self { secret_hash: hash(secret), ..self }
    }

    /// Whether this secret is taken at this time.
    ///
    /// # Errors
    /// Too late, or another secret.
    pub fn check(&self, secret: &str, now_ns: u64) -> Result<(), TokenRefusal> {
        // Hashes are compared: how long that takes says nothing about the secret.
        if hash(secret) != self.secret_hash {
            return Err(TokenRefusal::WrongSecret);
        }
        if now_ns >= self.expire_time_ns {
            return Err(TokenRefusal::Expired);
        }
        Ok(())
    }
}

fn hash(secret: &str) -> String {
    hex(&sha256(secret.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back() {
        let token = JoinToken {
            id: "i".into(),
            secret: "s".into(),
            endpoint: "https://h:1".into(),
            ca_pem: "CA".into(),
            role: "proxy".into(),
            name: "src".into(),
        };
        assert!(JoinToken::parse(&format!("  {}\n", token.encode())).unwrap() == token);
    }

    #[test]
    fn a_mistyped_token_is_refused() {
        for bad in ["", "hello", "aij1_", "aij1_!!!", "aij1_e30", "aij2_e30"] {
            assert!(JoinToken::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_secret_opens_and_only_in_time() {
        let (record, secret) = TokenRecord::new("default", Role::Proxy, "src", 100).unwrap();
        assert_eq!(record.check(&secret, 99), Ok(()));
        assert_eq!(record.check(&secret, 100), Err(TokenRefusal::Expired));
        assert_eq!(record.check("other", 99), Err(TokenRefusal::WrongSecret));
        assert!(!serde_json::to_string(&record).unwrap().contains(&secret));
    }
}
