//! A real coordinator in a folder of its own, run by the built binary, and the command beside it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::client;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::proxies;

/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a command said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// It must have gone well; its one JSON document.
    pub fn document(self) -> Value {
        assert_eq!(self.code, 0, "{}\n{}", self.out, self.err);
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }

    /// The error on standard error, under `--json`.
    pub fn error(&self) -> Value {
        let document: Value = serde_json::from_str(&self.err).unwrap_or_else(|e| panic!("{e}: {}", self.err));
        document["error"].clone()
    }

    /// It must have gone well, with no line wider than 100 columns.
    pub fn text(self) -> String {
        assert_eq!(self.code, 0, "{}\n{}", self.out, self.err);
        for line in self.out.lines().filter(|line| !line.contains("nbd+unix://") && !line.contains("aij1_")) {
            assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
        }
        self.out
    }
}

/// The binary under test, with nothing of the environment that could reach a real coordinator.
pub fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.env_remove("AFTERIMAGE_IDENTITY").env_remove("AFTERIMAGE_COORDINATOR").env("HOME", "/nonexistent");
    command.env_remove("XDG_CONFIG_HOME").env("TZ", "UTC").stdin(Stdio::null());
    command
}

/// Runs the binary.
pub fn run(command: &mut Command) -> Said {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    Said {
        code: status.code().unwrap_or(-1),
        out: String::from_utf8(stdout).expect("UTF-8"),
        err: String::from_utf8(stderr).expect("UTF-8"),
    }
}

/// A coordinator that runs, and who may speak to it.
pub struct Bed {
    pub dir: TempDir,
    pub endpoint: String,
    pub admin: PathBuf,
    coordinator: Child,
    runtime: Runtime,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.coordinator.kill();
        let _ = self.coordinator.wait();
    }
}

impl Bed {
    /// Starts a coordinator on a port that is free.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut coordinator = binary()
            .args(["coordinator", "--json", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir.path().join("coordinator"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the coordinator starts");
        let mut ready = String::new();
        BufReader::new(coordinator.stdout.take().expect("piped")).read_line(&mut ready).expect("a line");
        let ready: Value = serde_json::from_str(&ready).unwrap_or_else(|error| {
            let mut text = String::new();
            let _ = std::io::Read::read_to_string(&mut coordinator.stderr.take().expect("piped"), &mut text);
            panic!("no line that says it is ready: {error}: {ready}\n{text}")
        });
        // What it logs is not read any more: a full pipe must not stop it.
        let mut log = coordinator.stderr.take().expect("piped");
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Bed {
            endpoint: ready["endpoint"].as_str().expect("an address").to_owned(),
            admin: PathBuf::from(ready["admin_identity"].as_str().expect("a file")),
            dir,
            coordinator,
            runtime: Runtime::new().expect("a runtime"),
        }
    }

    /// One with a source `src`, a target `dr`, a policy `gold` and, once it is protected, a group `shop` of two disks.
    pub fn protected() -> Self {
        let bed = Self::new();
        bed.proxy("src", false);
        bed.proxy("dr", true);
        bed.ok("policy create gold --rpo 500ms --retention 2h");
        bed.until("proxies --json", |doc| {
            doc["proxies"].as_array().is_some_and(|p| p.len() == 2 && p.iter().all(|p| p["connected"] == true))
        });
        bed.ok("group create shop --policy gold --source src --target dr --disk data=/dev/a --disk logs=/dev/b");
        bed.until("status shop --json", |doc| {
            doc["groups"][0]["phase"] == "protected" && doc["groups"][0]["rpo"]["now_ms"].is_number()
        });
        bed
    }

    /// Lets a proxy join and keeps it running.
    pub fn proxy(&self, name: &str, target: bool) {
        let token = self.run(&format!("token create {name} --role proxy")).text();
        let bundle: Bundle = self.runtime.block_on(client::join(token.trim(), None)).expect("the token is good");
        self.runtime.spawn(proxies::run(bundle, target));
    }

    /// A command as the admin; words are separated by blanks.
    pub fn run(&self, line: &str) -> Said {
        self.run_as(&self.admin, line)
    }

    /// A command as somebody.
    pub fn run_as(&self, identity: &Path, line: &str) -> Said {
        run(binary().args(line.split_whitespace()).arg("--identity").arg(identity))
    }

    /// A command that must go well.
    pub fn ok(&self, line: &str) -> String {
        let said = self.run(line);
        assert_eq!(said.code, 0, "{line}: {}{}", said.out, said.err);
        said.out
    }

    /// Asks again until the answer fits.
    pub fn until(&self, line: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let document = self.run(line).document();
            if fits(&document) {
                return document;
            }
            assert!(begun.elapsed() < PATIENCE, "{line} never came to it: {document:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the coordinator at once.
    pub fn kill_coordinator(&mut self) {
        self.coordinator.kill().expect("it runs");
        self.coordinator.wait().expect("it ends");
    }
}
