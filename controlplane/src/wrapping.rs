//! What keys are wrapped by: a key in a file, or a command of the operator's, which is how a KMS, an HSM or a TPM is
//! attached.
//!
//! Few keys are wrapped so: those under which all others are ([`crate::keys`]). A command is therefore run once at a
//! start and once for each rewrap, not for each group.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Deserialize;

use crate::keys::KEY_LEN;

/// What a key file's seals are bound to.
const PURPOSE: &[u8] = b"afterimage wrapping key v1";
/// How long a command may take unless told, seconds.
const TIMEOUT_S: u64 = 10;
/// Longest wrapped key, bytes.
pub const MAX_WRAPPED: usize = 16 * 1024;
/// Between two looks at a command that runs.
const LOOK: Duration = Duration::from_millis(5);
/// Most of what a command says on standard error that is passed on, characters.
const SAID: usize = 160;

/// Wraps a key, and unwraps what it has wrapped.
pub trait KeyWrapper: Send + Sync {
    /// "file" or "command".
    fn kind(&self) -> &'static str;

    /// Wraps a key.
    ///
    /// # Errors
    /// [`WrapError`].
    fn wrap(&self, key: &[u8]) -> Result<Vec<u8>, WrapError>;

    /// The key again.
    ///
    /// # Errors
    /// [`WrapError`]; also for what another has wrapped.
    fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, WrapError>;
}

/// Why a key is not wrapped or unwrapped.
#[derive(Debug, thiserror::Error)]
pub enum WrapError {
    /// The key file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is none, or others may read it.
    #[error("{} {what}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// It was wrapped under another key, or changed.
    #[error("it does not open with the key in {}", .0.display())]
    OtherKey(PathBuf),
    /// A command failed.
    #[error("{program} {verb} {what}")]
    Command {
        /// The program.
        program: String,
        /// "wrap" or "unwrap".
        verb: &'static str,
        /// What went wrong.
        what: String,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

/// Wraps by a key of 32 bytes in a file.
pub struct FileWrapper {
    path: PathBuf,
    key: LessSafeKey,
    random: SystemRandom,
}

impl FileWrapper {
    /// Reads the file, which only its owner may be able to.
    ///
    /// # Errors
    /// It cannot be read, is none, or others may read it.
    pub fn open(path: &Path) -> Result<Self, WrapError> {
        let file = |source| WrapError::File { path: path.to_owned(), source };
        let bad = |what: String| WrapError::BadFile { path: path.to_owned(), what };
        let mode = std::fs::metadata(path).map_err(file)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(bad(format!("may be read by others (mode {mode:04o}): chmod 600 it, and consider it known")));
        }
        let bytes = std::fs::read(path).map_err(file)?;
        if bytes.len() != KEY_LEN {
            return Err(bad(format!("is no key file: it has {} bytes, not {KEY_LEN}", bytes.len())));
        }
        Ok(Self::of(path, &bytes))
    }

    /// Of a key that has been read.
    pub(crate) fn of(path: &Path, bytes: &[u8]) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, bytes).expect("32 bytes are a key");
        Self { path: path.to_owned(), key: LessSafeKey::new(key), random: SystemRandom::new() }
    }

    /// Reads the file, or makes it, for its owner only.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_or_make(path: &Path) -> Result<Self, WrapError> {
        if !path.exists() {
            let mut bytes = [0; KEY_LEN];
            SystemRandom::new().fill(&mut bytes).map_err(|_| WrapError::Random)?;
            crate::bundle::write_private(path, &bytes)
                .map_err(|source| WrapError::File { path: path.to_owned(), source })?;
        }
        Self::open(path)
    }
}

impl KeyWrapper for FileWrapper {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn wrap(&self, key: &[u8]) -> Result<Vec<u8>, WrapError> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| WrapError::Random)?;
        let mut sealed = key.to_vec();
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(PURPOSE), &mut sealed)
            .map_err(|_| WrapError::Random)?;
        Ok([&nonce[..], &sealed].concat())
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, WrapError> {
        let other = || WrapError::OtherKey(self.path.clone());
        let (nonce, sealed) = wrapped.split_at_checked(NONCE_LEN).ok_or_else(other)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| other())?;
        let mut sealed = sealed.to_vec();
        let plain = self.key.open_in_place(nonce, Aad::from(PURPOSE), &mut sealed).map_err(|_| other())?;
        Ok(plain.to_vec())
    }
}

/// Wraps by a command: it is run with one more argument, `wrap` or `unwrap`, has the bytes on its standard input, and
/// writes the result to its standard output.
pub struct CommandWrapper {
    program: String,
    arguments: Vec<String>,
    timeout: Duration,
}

impl CommandWrapper {
    fn run(&self, verb: &'static str, input: &[u8]) -> Result<Vec<u8>, WrapError> {
        let failed = |what: String| WrapError::Command { program: self.program.clone(), verb, what };
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(verb)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // What it starts ends with it.
            .process_group(0)
            .spawn()
            .map_err(|e| failed(format!("cannot be started: {e}")))?;
        let (mut stdin, input) = (child.stdin.take().expect("a pipe"), input.to_vec());
        // One that does not read its input is told so by its result.
        std::thread::spawn(move || drop(stdin.write_all(&input)));
        let out = read_all(child.stdout.take().expect("a pipe"), MAX_WRAPPED);
        let said = read_all(child.stderr.take().expect("a pipe"), 4096);
        let end = Instant::now() + self.timeout;
        let left = || end.saturating_duration_since(Instant::now());
        let done = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if left().is_zero() => break None,
                Ok(None) => std::thread::sleep(LOOK),
                Err(e) => return Err(failed(format!("cannot be waited for: {e}"))),
            }
        };
        // Also what it has left behind, which could keep its output open.
        if let Some(group) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let Some(status) = done else {
            let _ = child.wait();
            return Err(failed(format!("has not ended within {} s", self.timeout.as_secs())));
        };
        if !status.success() {
            let said = said.recv_timeout(LOOK * 20).unwrap_or_default();
            let said: String = String::from_utf8_lossy(&said)
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .filter(|c| !c.is_control())
                .take(SAID)
                .collect();
            let said = if said.is_empty() { String::new() } else { format!(": {said}") };
            return Err(failed(format!("failed ({status}){said}")));
        }
        let out = out.recv_timeout(left().max(LOOK * 20)).unwrap_or_default();
        match out.len() {
            0 => Err(failed("has written nothing to standard output".to_owned())),
            n if n > MAX_WRAPPED => Err(failed(format!("has written more than {MAX_WRAPPED} bytes"))),
            _ => Ok(out),
        }
    }
}

/// Reads until the end, but no more than a byte above `most`.
fn read_all(pipe: impl Read + Send + 'static, most: usize) -> mpsc::Receiver<Vec<u8>> {
    let (done, read) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.take(most as u64 + 1).read_to_end(&mut bytes);
        let _ = done.send(bytes);
    });
    read
}

impl KeyWrapper for CommandWrapper {
    fn kind(&self) -> &'static str {
        "command"
    }

    fn wrap(&self, key: &[u8]) -> Result<Vec<u8>, WrapError> {
        self.run("wrap", key)
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, WrapError> {
        self.run("unwrap", wrapped)
    }
}

/// What keys are wrapped by, as configured. At most one of `file` and `command`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct KeysConfig {
    /// A file with a key of 32 bytes, only its owner's.
    pub file: Option<PathBuf>,
    /// Program and arguments.
    #[serde(default)]
    pub command: Vec<String>,
    /// How long it may take, seconds: 1 to 300. Default 10.
    #[serde(default)]
    pub timeout_s: u64,
    /// What they were wrapped by before, until all of them have been rewrapped.
    #[serde(default)]
    pub previous: Option<Box<KeysConfig>>,
}

/// What keys are wrapped by, ready to be used.
#[derive(Default)]
pub struct Wrappers {
    /// From now on; none: the role's own key file.
    pub now: Option<Box<dyn KeyWrapper>>,
    /// Before.
    pub previous: Option<Box<dyn KeyWrapper>>,
}

impl KeysConfig {
    /// Checks what can be checked without running anything.
    ///
    /// # Errors
    /// Names the field, what it holds and what is allowed.
    pub fn check(&self) -> Result<Wrappers, String> {
        let previous = match &self.previous {
            None => None,
            Some(previous) if previous.previous.is_some() => {
                return Err("keys.previous.previous: there is none; allowed: one before the one of now".to_owned());
            }
            Some(previous) => match previous.one("keys.previous")? {
                None => return Err("keys.previous is empty; allowed: file, or command".to_owned()),
                some => some,
            },
        };
        Ok(Wrappers { now: self.one("keys")?, previous })
    }

    fn one(&self, field: &str) -> Result<Option<Box<dyn KeyWrapper>>, String> {
        let timeout = match self.timeout_s {
            0 => TIMEOUT_S,
            s @ 1..=300 => s,
            s => return Err(format!("{field}.timeout_s is {s}; allowed: 1 to 300")),
        };
        match (&self.file, self.command.first()) {
            (None, None) if self.timeout_s > 0 => Err(format!("{field}.timeout_s goes with {field}.command")),
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(format!("{field}.file and {field}.command are both set; allowed: one of them")),
            (Some(path), None) => {
                let allowed = "allowed: the absolute path of a file of 32 bytes with mode 0600 \
                               (head -c 32 /dev/urandom)";
                if !path.is_absolute() {
                    return Err(format!("{field}.file is \"{}\"; {allowed}", path.display()));
                }
                let wrapper = FileWrapper::open(path).map_err(|e| format!("{field}.file: {e}; {allowed}"))?;
                Ok(Some(Box::new(wrapper)))
            }
            (None, Some(program)) => {
                let runs = std::fs::metadata(program).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
                if !Path::new(program).is_absolute() || !runs {
                    return Err(format!(
                        "{field}.command is \"{program}\"; allowed: the absolute path of a program, and arguments"
                    ));
                }
                let arguments = self.command[1..].to_vec();
                let timeout = Duration::from_secs(timeout);
                Ok(Some(Box::new(CommandWrapper { program: program.clone(), arguments, timeout })))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn private(path: &Path, bytes: &[u8]) {
        crate::bundle::write_private(path, bytes).unwrap();
    }

    fn script(folder: &Path, text: &str) -> Vec<String> {
        let path = folder.join("kms");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        vec![path.display().to_string()]
    }

    fn command(folder: &Path, text: &str) -> Box<dyn KeyWrapper> {
        let config = KeysConfig { command: script(folder, text), timeout_s: 1, ..KeysConfig::default() };
        config.check().unwrap().now.unwrap()
    }

    #[test]
    fn a_file_wraps_what_only_it_unwraps() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        private(&a, &[1; 32]);
        private(&b, &[2; 32]);
        let wrapped = FileWrapper::open(&a).unwrap().wrap(b"secret").unwrap();
        assert!(!wrapped.windows(6).any(|w| w == b"secret"));
        assert_eq!(FileWrapper::open(&a).unwrap().unwrap(&wrapped).unwrap(), b"secret");
        assert!(FileWrapper::open(&b).unwrap().unwrap(&wrapped).is_err());
        for changed in [&wrapped[1..], &wrapped[..wrapped.len() - 1], b""] {
            assert!(FileWrapper::open(&a).unwrap().unwrap(changed).is_err());
        }
    }

    #[test]
    fn a_command_has_the_bytes_and_the_verb_and_says_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let turned = "case $1 in wrap) printf W; cat;; unwrap) tail -c +2;; esac";
        let wrapper = command(folder.path(), turned);
        let key: Vec<u8> = (0..=255).collect();
        let wrapped = wrapper.wrap(&key).unwrap();
        assert_eq!((wrapped[0], wrapped.len()), (b'W', 257));
        assert_eq!(wrapper.unwrap(&wrapped).unwrap(), key);
        let said = |text: &str| command(folder.path(), text).wrap(b"x").unwrap_err().to_string();
        assert!(said("echo the vault is sealed >&2; exit 3").contains("wrap failed (exit status: 3): the vault"));
        assert!(said("exit 0").contains("written nothing"));
        assert!(said("head -c 20000 /dev/zero").contains("more than 16384 bytes"));
    }

    #[test]
    fn a_command_that_hangs_or_leaves_something_behind_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let said = command(folder.path(), "sleep 60").wrap(b"x").unwrap_err().to_string();
        assert!(said.contains("wrap has not ended within 1 s"), "{said}");
        let out = command(folder.path(), "sleep 60 & cat").wrap(b"x").unwrap();
        assert_eq!(out, b"x");
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_is_configured_wrongly_is_refused_by_its_field() {
        let folder = tempfile::tempdir().unwrap();
        let (open, short) = (folder.path().join("open"), folder.path().join("short"));
        std::fs::write(&open, [1; 32]).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o640)).unwrap();
        private(&short, b"short");
        let file = |path: &Path| KeysConfig { file: Some(path.to_owned()), ..KeysConfig::default() };
        let program = |program: &str| KeysConfig { command: vec![program.to_owned()], ..KeysConfig::default() };
        let refused = |config: KeysConfig| config.check().err().unwrap();
        assert!(refused(file(&open)).starts_with("keys.file: ") && refused(file(&open)).contains("mode 0640"));
        assert!(refused(file(&short)).contains("5 bytes"));
        assert!(refused(file(Path::new("key"))).starts_with("keys.file is \"key\""));
        assert!(refused(file(&folder.path().join("none"))).contains("No such file"));
        assert!(refused(program("kms")).starts_with("keys.command is \"kms\""));
        assert!(refused(program("/etc/passwd")).starts_with("keys.command is"));
        let long = KeysConfig { timeout_s: 301, ..program("/bin/cat") };
        assert!(refused(long).starts_with("keys.timeout_s is 301"));
        assert!(refused(KeysConfig { timeout_s: 3, ..KeysConfig::default() }).starts_with("keys.timeout_s goes"));
        let both = KeysConfig { file: Some(short.clone()), ..program("/bin/cat") };
        assert!(refused(both).contains("both set"));
        let before = |previous: KeysConfig| KeysConfig { previous: Some(Box::new(previous)), ..program("/bin/cat") };
        assert!(refused(before(file(&open))).starts_with("keys.previous.file: "));
        assert!(refused(before(KeysConfig::default())).starts_with("keys.previous is empty"));
        assert!(refused(before(before(program("/bin/cat")))).starts_with("keys.previous.previous"));
        assert!(KeysConfig::default().check().unwrap().now.is_none());
    }
}
