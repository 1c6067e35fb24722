//! A protected disk for the comparison: a source and a target process with a real link between them, compressed,
//! sealed and journalled, in the steady state after the first synchronisation.

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::servers::{Server, spawn, wait_for_socket};
use crate::proxy::standalone::pair;

/// What the source logs once a group's points hold all its disks.
const SYNCHRONISED: &str = "INFO protected ";
/// Longest wait for the first synchronisation.
const SYNC_WAIT: Duration = Duration::from_secs(180);

/// What a source is told beside its disk.
#[derive(Copy, Clone, Debug, Default)]
pub struct Setting<'a> {
    /// Most bytes that wait in memory, MiB.
    pub queue_mib: Option<u64>,
    /// Its state folder, with the write-intent log, if not in the folder of the run.
    pub state: Option<&'a Path>,
}

/// Starts the pair; the files of an earlier run in `dir` are taken up again, so only the first one synchronises. The
/// target is the first of the server's processes.
///
/// # Errors
/// A process does not come up, or the synchronisation does not end.
pub fn start(dir: &Path, disk: &Path, setting: Setting<'_>) -> io::Result<Server> {
    let (source_file, target_file) = (dir.join("source.toml"), dir.join("target.toml"));
    let address_file = dir.join("stream-address");
    if !source_file.exists() {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let path = disk.to_str().ok_or_else(|| io::Error::other("the folder's name is not UTF-8"))?;
        let (source, target) =
            pair(&address, &[("protected", path, disk.metadata()?.len())]).map_err(io::Error::other)?;
        source.save(&source_file)?;
        target.save(&target_file)?;
        std::fs::write(&address_file, address)?;
    }
    let address = std::fs::read_to_string(&address_file)?;
    let (socket, views) = (dir.join("protected.sock"), dir.join("views.sock"));
    let (source_log, target_log) = (dir.join("source.log"), dir.join("target.log"));

    let mut target = Command::new(std::env::current_exe()?);
    target
        .args(["proxy", "--name", "target", "--listen", &address])
        .args(["--views", &format!("unix:{}", views.display())])
        .args(["--standalone".as_ref(), target_file.as_os_str()])
        .args(["--state".as_ref(), dir.join("target.state").as_os_str()])
        .args(["--journal".as_ref(), dir.join("journal").as_os_str()]);
    let mut server =
        Server { children: vec![spawn(target, &target_log)?], socket: socket.clone(), export: "protected".to_owned() };
    wait_for_socket(&mut server.children[0], &views, &target_log)?;

    let mut source = Command::new(std::env::current_exe()?);
    source
        .args(["proxy", "--name", "source", "--nbd", &format!("unix:{}", socket.display())])
        .args(["--standalone".as_ref(), source_file.as_os_str()])
        .args(["--state".as_ref(), setting.state.unwrap_or(&dir.join("source.state")).as_os_str()]);
    if let Some(queue) = setting.queue_mib {
        let config = dir.join("source.config");
        std::fs::write(&config, format!("[source]\nqueue = \"{queue}MiB\"\n"))?;
        source.args(["--config".as_ref(), config.as_os_str()]);
    }
    server.children.push(spawn(source, &source_log)?);
    wait_for_socket(&mut server.children[1], &socket, &source_log)?;

    let until = Instant::now() + SYNC_WAIT;
    while !std::fs::read_to_string(&source_log)?.contains(SYNCHRONISED) {
        if Instant::now() > until || server.children[1].try_wait()?.is_some() {
            let log = std::fs::read_to_string(&source_log)?;
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            return Err(io::Error::other(format!("the first synchronisation does not end: {}", tail.join(" | "))));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(server)
}
