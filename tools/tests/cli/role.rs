//! The coordinator as a process: how it starts, stops, comes back, and refuses to start.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::bed::{Bed, Said, binary, run};

/// Starts one that must get ready; what it says then.
fn start(dir: &TempDir, listen: &str) -> (Child, Value) {
    let mut child = binary()
        .args(["coordinator", "--json", "--listen", listen, "--data-dir"])
        .arg(dir.path().join("data"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    (child, serde_json::from_str(&line).expect("JSON"))
}

fn terminate(child: &mut Child) -> Option<i32> {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    child.wait().expect("it ends").code()
}

fn admin(dir: &TempDir, line: &str) -> Said {
    run(binary().args(line.split(' ')).arg("--identity").arg(dir.path().join("data/admin.json")))
}

/// One that must not start.
fn refused(args: &[&str]) -> Said {
    let said = run(binary().arg("coordinator").args(args));
    assert_ne!(said.code, 0);
    said
}

#[test]
fn it_says_where_it_is_and_stops_cleanly_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, ready) = start(&dir, "127.0.0.1:0");
    assert_eq!(ready["ready"], true);
    assert_eq!(ready["endpoint"], format!("https://{}", ready["listening"][0].as_str().unwrap()));
    assert_eq!(terminate(&mut child), Some(0));
}

#[test]
fn what_it_was_told_is_there_after_a_restart_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, _) = start(&dir, "127.0.0.1:0");
    assert_eq!(admin(&dir, "policy create gold --retention 90m").code, 0);
    terminate(&mut child);
    // Another port: the admin's identity follows.
    let (mut child, _) = start(&dir, "127.0.0.1:0");
    assert_eq!(admin(&dir, "policy show gold --json").document()["retention_s"], 5400);
    terminate(&mut child);
}

#[test]
fn a_second_one_in_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, _) = start(&dir, "127.0.0.1:0");
    let data = dir.path().join("data");
    let said = refused(&["--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains(data.to_str().unwrap()), "{}", said.err);
    terminate(&mut child);
}

#[test]
fn an_address_that_is_taken_is_named() {
    let bed = Bed::new();
    let address = bed.endpoint.trim_start_matches("https://");
    let data = bed.dir.path().join("second");
    let said = refused(&["--listen", address, "--data-dir", data.to_str().unwrap()]);
    assert!(said.err.contains(address) && said.err.contains("--listen"), "{}", said.err);
}

#[test]
fn a_misspelt_field_of_its_configuration_is_a_usage_error_and_makes_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (config, data) = (dir.path().join("c.toml"), dir.path().join("data"));
    std::fs::write(&config, format!("data_dir = '{}'\nadvertize = 'x:1'\n", data.display())).unwrap();
    let said = refused(&["--config", config.to_str().unwrap(), "--json"]);
    assert_eq!((said.code, &said.error()["kind"]), (2, &"usage".into()));
    assert!(said.err.contains("advertize") && said.err.contains("advertise"), "{}", said.err);
    assert!(!data.exists());
}
