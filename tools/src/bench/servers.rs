//! The processes under measurement: started, waited for, their CPU time read, stopped by their own id.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::interrupt;

/// A running server: one or more processes that end with it.
pub struct Server {
    pub(super) children: Vec<Child>,
    /// Where its export is.
    pub socket: PathBuf,
    /// Its export.
    pub export: String,
}

impl Server {
    /// CPU seconds that its processes have used, user and system.
    ///
    /// # Errors
    /// A process is gone.
    pub fn cpu_seconds(&self) -> io::Result<f64> {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let mut sum = 0.0;
        for child in &self.children {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
            let field = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
            sum += (field(11) + field(12)) / ticks; // utime and stime, counted behind the command's name
        }
        Ok(sum)
    }
}

impl Server {
    /// Ends one of its processes, as a lost machine does.
    ///
    /// # Errors
    /// There is no such process.
    pub fn kill(&mut self, number: usize) -> io::Result<()> {
        let child = self.children.get_mut(number).ok_or_else(|| io::Error::other("there is no such process"))?;
        child.kill()?;
        interrupt::ended(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let until = Instant::now() + Duration::from_secs(10);
            while Instant::now() < until && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill(); // already gone is as good
            let _ = interrupt::ended(child);
        }
    }
}

/// Starts `command`, its output into `log`.
///
/// # Errors
/// It cannot be started.
pub fn spawn(mut command: Command, log: &Path) -> io::Result<Child> {
    let out = File::create(log)?;
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let program = command.get_program().to_string_lossy().into_owned();
    let started = interrupt::started(|| command.spawn());
    started.map_err(|e| io::Error::other(format!("{program} does not start: {e}")))
}

/// Waits until something answers at `socket`.
///
/// # Errors
/// The process ended, or nothing answered in 30 s; the tail of its log is in the error.
pub fn wait_for_socket(child: &mut Child, socket: &Path, log: &Path) -> io::Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        if UnixStream::connect(socket).is_ok() {
            return Ok(());
        }
        let ended = child.try_wait()?;
        if ended.is_some() || Instant::now() > until {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(5).collect();
            let state = ended.map_or("does not answer".to_owned(), |s| format!("ended: {s}"));
            return Err(io::Error::other(format!("{} {state}: {}", socket.display(), tail.join(" | "))));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The peer serving a raw file.
///
/// # Errors
/// qemu-storage-daemon is missing or does not come up.
pub fn peer(dir: &Path, name: &str, disk: &Path) -> io::Result<Server> {
    let socket = dir.join(format!("{name}.sock"));
    let log = dir.join(format!("{name}.log"));
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args([
            "--blockdev",
            &format!("driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring", disk.display()),
        ])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=16", socket.display())])
        .args(["--export", &format!("type=nbd,id=export,node-name=disk,name={name},writable=on")])
        .args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", qmp_path(dir, name).display())])
        .args(["--monitor", "chardev=qmp"]);
    let mut child = spawn(command, &log)?;
    let ready = wait_for_socket(&mut child, &socket, &log);
    let server = Server { children: vec![child], socket, export: name.to_owned() };
    ready.map(|()| server)
}

fn qmp_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.qmp"))
}

/// The peer, mirroring each write to a second one (`blockdev-mirror`, which copies in the background; `sync=none`, so
/// that the measured state is the steady one after a first copy).
///
/// # Errors
/// As [`peer`], or the mirror does not become ready.
pub fn peer_with_mirror(dir: &Path, name: &str, disk: &Path, copy: &Path) -> io::Result<Server> {
    let mut second = peer(dir, &format!("{name}-copy"), copy)?;
    let mut first = peer(dir, name, disk)?;
    let mut qmp = Qmp::connect(&qmp_path(dir, name))?;
    qmp.call(
        "blockdev-add",
        serde_json::json!({
            "driver": "nbd", "node-name": "copy", "export": second.export,
            "server": {"type": "unix", "path": second.socket},
        }),
    )?;
    qmp.call(
        "blockdev-mirror",
        serde_json::json!({"job-id": "mirror", "device": "disk", "target": "copy", "sync": "none"}),
    )?;
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        let jobs = qmp.call("query-jobs", serde_json::json!({}))?;
        match jobs[0]["status"].as_str() {
            Some("ready") => break,
            Some("created" | "running") if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            other => return Err(io::Error::other(format!("the peer's mirror is not ready: {other:?} {jobs}"))),
        }
    }
    let mut children = std::mem::take(&mut second.children);
    children.append(&mut first.children);
    Ok(Server { children, socket: first.socket.clone(), export: first.export.clone() })
}

/// A minimal QMP client.
struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
}

impl Qmp {
    fn connect(path: &Path) -> io::Result<Self> {
        let output = UnixStream::connect(path)?;
        output.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut qmp = Self { input: BufReader::new(output.try_clone()?), output };
        qmp.line()?; // the greeting
        qmp.call("qmp_capabilities", serde_json::json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> io::Result<serde_json::Value> {
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            return Err(io::Error::other("the peer closed its monitor"));
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }

    fn call(&mut self, command: &str, arguments: serde_json::Value) -> io::Result<serde_json::Value> {
        writeln!(self.output, "{}", serde_json::json!({"execute": command, "arguments": arguments}))?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("the peer refuses {command}: {error}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

/// Our proxy serving a raw file without protection.
///
/// # Errors
/// It does not come up.
pub fn ours(dir: &Path, name: &str, disk: &Path) -> io::Result<Server> {
    let socket = dir.join(format!("{name}.sock"));
    let log = dir.join(format!("{name}.log"));
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("proxy")
        .args(["--serve", &format!("{name}={}", disk.display())])
        .args(["--nbd", &format!("unix:{}", socket.display())])
        .args(["--name", name]);
    let mut child = spawn(command, &log)?;
    let ready = wait_for_socket(&mut child, &socket, &log);
    let server = Server { children: vec![child], socket, export: name.to_owned() };
    ready.map(|()| server)
}
