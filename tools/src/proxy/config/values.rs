//! What settings are made of: sizes, addresses, words; and what is said of one that makes no sense.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};

use super::MIB;

/// What is wrong with a configuration, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no valid configuration; the parser's message names line, field and what is allowed.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, field and what is wrong with it.
        message: String,
    },
    /// A field has a value that is not allowed.
    #[error("`{field}` is {value}: allowed is {allowed}")]
    Field {
        /// The field, with its table.
        field: &'static str,
        /// As given.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A field that is needed is missing.
    #[error("`{field}` is missing: {why}")]
    Missing {
        /// The field.
        field: &'static str,
        /// What it is needed for.
        why: &'static str,
    },
    /// What wraps keys: names the field.
    #[error("{0}")]
    Keys(String),
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(Self(s.to_owned()))
    }
}

/// How the log is written.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON document for each line.
    Json,
}

/// Where clients of NBD come in: `unix:/path` or `tcp:address:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

impl FromStr for Listen {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let allowed = || format!("`{s}`: allowed is unix:/absolute/path or tcp:address:port");
        if let Some(path) = s.strip_prefix("unix:") {
            // sun_path holds 108 bytes with its final zero.
            return if path.starts_with('/') && path.len() < 108 {
                Ok(Self::Unix(path.into()))
            } else {
                Err(allowed())
            };
        }
        let address = s.strip_prefix("tcp:").ok_or_else(allowed)?;
        address.parse().map(Self::Tcp).map_err(|_| allowed())
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        String::deserialize(input)?.parse().map_err(de::Error::custom)
    }
}

/// A number of bytes: `268435456`, `256MiB`, `1GiB` (K, M, G and T mean powers of 1024, with or without `iB`).
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("`{s}`: allowed is a number of bytes, or one with KiB, MiB, GiB or TiB");
        let digits = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
        let number: u64 = s[..digits].parse().map_err(|_| bad())?;
        let shift = match s[digits..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(bad()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for Size {
    /// As it can be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n > 0 && n.is_multiple_of(1024 * MIB) => write!(f, "{}GiB", n / (1024 * MIB)),
            n if n > 0 && n.is_multiple_of(MIB) => write!(f, "{}MiB", n / MIB),
            n => write!(f, "{n}"),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(input)? {
            Raw::Number(n) => Ok(Self(n)),
            Raw::Text(s) => s.parse().map_err(de::Error::custom),
        }
    }
}

/// A disk that is served without protection: `NAME=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Name of the export.
    pub name: String,
    /// Raw file or block device.
    pub path: PathBuf,
}

impl FromStr for Serve {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.to_owned(), path: path.into() })
            }
            _ => Err(format!("`{s}`: allowed is NAME=PATH")),
        }
    }
}

/// Whether disks have devices, and which: what `ublk` is set to.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// None.
    #[default]
    No,
    /// Ones that outlive this process.
    Full,
    /// Ones that an ordinary user may have. Root has the others all the same: they can do more.
    Unprivileged,
}

impl Wish {
    /// Any.
    pub fn is_some(self) -> bool {
        self != Self::No
    }
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "full" => Ok(Self::Full),
            "unprivileged" => Ok(Self::Unprivileged),
            _ => Err("it is `full` or `unprivileged`".to_owned()),
        }
    }
}

impl<'de> Deserialize<'de> for Wish {
    /// `true`, `false`, or a word.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "true, false, \"full\" or \"unprivileged\"")]
        enum Said {
            Flag(bool),
            Word(String),
        }
        match Said::deserialize(from)? {
            Said::Flag(false) => Ok(Self::No),
            Said::Flag(true) => Ok(Self::Full),
            Said::Word(word) => word.parse().map_err(de::Error::custom),
        }
    }
}
