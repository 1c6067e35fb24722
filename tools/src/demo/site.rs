//! The demo's processes and files. Whatever it started ends with it, unless it is to be kept.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::api::Api;

/// Two sites in one folder.
pub struct Site {
    dir: PathBuf,
    /// Removes the folder at the end.
    temporary: Option<tempfile::TempDir>,
    children: Vec<(&'static str, Child)>,
    coordinator: String,
    stream: String,
    /// Where streams arrive at the source's site, on the way back.
    back: String,
    /// How the source proxy was started.
    source_args: Vec<std::ffi::OsString>,
    keep: bool,
}

impl Site {
    /// A site in `dir`, or in a temporary folder.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(dir: Option<&Path>) -> io::Result<Self> {
        let (dir, temporary) = match dir {
            Some(dir) => {
                std::fs::create_dir_all(dir)?;
                if std::fs::read_dir(dir)?.next().is_some() {
                    return Err(io::Error::other(format!("--dir {}: the folder is not empty", dir.display())));
                }
                (dir.canonicalize()?, None)
            }
            None => {
                let temporary = tempfile::Builder::new().prefix("afterimage-demo-").tempdir()?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let (coordinator, stream, back) = (free_address()?, free_address()?, free_address()?);
        let (children, source_args) = (Vec::new(), Vec::new());
        Ok(Self { dir, temporary, children, coordinator, stream, back, source_args, keep: false })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where hosts reach the source disks.
    pub fn source_socket(&self) -> PathBuf {
        self.dir.join("source.sock")
    }

    /// Where views are reached.
    pub fn view_socket(&self) -> PathBuf {
        self.dir.join("views.sock")
    }

    /// A raw disk.
    ///
    /// # Errors
    /// No room, or the file cannot be made.
    pub fn make_disk(&self, name: &str, bytes: u64) -> io::Result<PathBuf> {
        let path = self.dir.join(name);
        File::create_new(&path)?.set_len(bytes)?;
        Ok(path)
    }

    /// Starts the three processes and waits until both proxies are known.
    ///
    /// # Errors
    /// A process does not start, ends, or does not come up in time: with the end of its log.
    pub async fn start(&mut self) -> io::Result<Api> {
        let data = self.dir.join("coordinator");
        self.spawn(
            "coordinator",
            &[
                "coordinator".as_ref(),
                "--data-dir".as_ref(),
                data.as_ref(),
                "--listen".as_ref(),
                self.coordinator.clone().as_ref(),
            ],
        )?;
        let identity = data.join("admin.json");
        self.wait("coordinator", || identity.exists()).await?;
        let mut api = Api::connect(&identity).await?;
        let target = [
            ("--journal", self.dir.join("journal").into_os_string()),
            ("--listen", self.stream.clone().into()),
            ("--views", format!("unix:{}", self.view_socket().display()).into()),
        ];
        // It takes streams, too: on the way back it is the target.
        let source = [
            ("--nbd", format!("unix:{}", self.source_socket().display()).into()),
            ("--journal", self.dir.join("source-journal").into_os_string()),
            ("--listen", self.back.clone().into()),
            ("--views", format!("unix:{}", self.dir.join("source-views.sock").display()).into()),
        ];
        self.proxy(&mut api, "target", &target).await?;
        self.proxy(&mut api, "source", &source).await?;
        self.wait_connected(&mut api).await?;
        Ok(api)
    }

    /// Waits until both proxies have reached the coordinator.
    ///
    /// # Errors
    /// A process has ended, or one does not reach it in time: with the ends of the logs.
    pub async fn wait_connected(&mut self, api: &mut Api) -> io::Result<()> {
        let until = Instant::now() + Duration::from_secs(30);
        while api.connected_proxies().await? < 2 {
            self.check_alive()?;
            if Instant::now() > until {
                return Err(self.trouble("the proxies do not reach the coordinator"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    async fn proxy(
        &mut self,
        api: &mut Api,
        name: &'static str,
        options: &[(&str, std::ffi::OsString)],
    ) -> io::Result<()> {
        let token_file = self.dir.join(format!("{name}.token"));
        write_secret(&token_file, &api.join_token(name).await?)?;
        let state = self.dir.join(format!("{name}.state"));
        let mut args: Vec<&std::ffi::OsStr> = vec![
            "proxy".as_ref(),
            "--name".as_ref(),
            name.as_ref(),
            "--coordinator".as_ref(),
            self.coordinator.as_ref(),
            "--token-file".as_ref(),
            token_file.as_ref(),
            "--state".as_ref(),
            state.as_ref(),
        ];
        for (option, value) in options {
            args.push(option.as_ref());
            args.push(value);
        }
        let args: Vec<std::ffi::OsString> = args.into_iter().map(ToOwned::to_owned).collect();
        if name == "source" {
            self.source_args.clone_from(&args);
        }
        self.spawn(name, &args.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    /// Starts the source proxy again, as it was.
    ///
    /// # Errors
    /// It does not start.
    pub fn restart_source(&mut self) -> io::Result<()> {
        let args = self.source_args.clone();
        self.spawn("source", &args.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    fn spawn(&mut self, name: &'static str, args: &[&std::ffi::OsStr]) -> io::Result<()> {
        let log = File::options().create(true).append(true).open(self.log(name))?;
        let child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.children.push((name, child));
        Ok(())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    async fn wait(&mut self, name: &'static str, ready: impl Fn() -> bool) -> io::Result<()> {
        let until = Instant::now() + Duration::from_secs(30);
        while !ready() {
            self.check_alive()?;
            if Instant::now() > until {
                return Err(self.trouble(&format!("the {name} does not come up")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn check_alive(&mut self) -> io::Result<()> {
        for at in 0..self.children.len() {
            let (name, child) = &mut self.children[at];
            let name = *name;
            if let Some(status) = child.try_wait()? {
                return Err(self.trouble(&format!("the {name} ended: {status}")));
            }
        }
        Ok(())
    }

    /// An error with the last lines of each log.
    fn trouble(&self, what: &str) -> io::Error {
        let mut text = what.to_owned();
        for (name, _) in &self.children {
            let mut log = String::new();
            if File::open(self.log(name)).and_then(|mut f| f.read_to_string(&mut log)).is_ok() {
                let lines: Vec<&str> = log.lines().collect();
                for line in &lines[lines.len().saturating_sub(5)..] {
                    text.push_str(&format!("\n   {name}: {line}"));
                }
            }
        }
        io::Error::other(text)
    }

    /// SIGKILL to the source proxy.
    ///
    /// # Errors
    /// It is not running any more.
    pub fn kill_source(&mut self) -> io::Result<()> {
        let Some(at) = self.children.iter().position(|(name, _)| *name == "source") else {
            return Err(io::Error::other("the source proxy is not running"));
        };
        let (_, child) = &mut self.children[at];
        if let Some(status) = child.try_wait()? {
            return Err(self.trouble(&format!("the source proxy had ended before the disaster: {status}")));
        }
        let (_, mut child) = self.children.remove(at);
        child.kill()?;
        child.wait().map(drop)
    }

    /// Commands that show what is running.
    pub fn look_around(&self, exports: &[String; 2]) -> Vec<String> {
        let program = std::env::current_exe().map_or("afterimage".to_owned(), |p| p.display().to_string());
        let socket = self.view_socket();
        let socket = socket.display();
        let mut commands = vec![
            format!("export AFTERIMAGE_COORDINATOR={}", self.coordinator),
            format!("export AFTERIMAGE_IDENTITY={}", self.dir.join("coordinator/admin.json").display()),
            format!("{program} status"),
            format!("{program} point list shop"),
            format!("nbdinfo 'nbd+unix:///{}?socket={socket}'", exports[0]),
        ];
        let pids: Vec<String> = self.children.iter().map(|(_, child)| child.id().to_string()).collect();
        commands.push(format!("kill {}; rm -r {}     # when you have seen enough", pids.join(" "), self.dir.display()));
        commands
    }

    /// Leaves everything running and in place.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.keep {
            if let Some(temporary) = self.temporary.take() {
                let _ = temporary.keep();
            }
            return;
        }
        for (_, child) in &mut self.children {
            let _ = child.kill(); // it may have ended already
            let _ = child.wait();
        }
    }
}

fn free_address() -> io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().create_new(true).write(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}
