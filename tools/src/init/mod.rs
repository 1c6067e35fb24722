//! `afterimage init`: a configuration file for a role, with every setting, what it is for, and its default. What it writes
//! has passed the role's own checks ([`page`]), and a coordinator is not put where it would be lost together with what it
//! protects ([`place`]).

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::operator::failure::{Failure, Kind};
use crate::operator::output::put;
use crate::operator::session::Common;
use crate::{coordinator, proxy};

mod page;
mod place;

/// Port of streams, where none is given.
const STREAM_PORT: u16 = 7800;

/// Options of `afterimage init`. The coordinator's address (`--coordinator`) is among those of every command.
#[derive(Args, Debug)]
pub struct Init {
    /// What this host is to be.
    #[arg(value_enum)]
    role: Role,
    /// The file to write; "-" for standard output.
    #[arg(long, value_name = "FILE", default_value = "-")]
    out: PathBuf,
    /// Write over a file that is there.
    #[arg(long)]
    force: bool,
    /// Go on although coordinator and source would be lost together.
    #[arg(long)]
    anyway: bool,
    /// Name of a proxy, as operators see it [default: this host's].
    #[arg(long)]
    name: Option<String>,
    /// Address to listen on: of a coordinator [default: 0.0.0.0:7700], of a target for streams [default: 0.0.0.0:7800].
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Where others reach that [default: this host's name].
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Folder of a target's journals and replicas.
    #[arg(long, value_name = "DIR", default_value = "/srv/afterimage")]
    journal: PathBuf,
    /// Folder of a proxy's or a coordinator's state [default: below /var/lib/afterimage].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// File with the token by which a proxy joins at its first start.
    #[arg(long, value_name = "FILE", default_value = "/etc/afterimage/token")]
    token_file: PathBuf,
}

/// What a host is.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The coordinator: policies, restore points, failover.
    Coordinator,
    /// A proxy at the disks.
    Source,
    /// A proxy at the journal.
    Target,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Source => "source",
            Role::Target => "target",
        }
    }
}

/// What of a page is not a default.
#[derive(Debug, Clone)]
struct Given {
    name: String,
    coordinator: String,
    listen: Option<SocketAddr>,
    advertise: Option<String>,
    journal: PathBuf,
    state: PathBuf,
    token_file: PathBuf,
}

/// Writes it.
///
/// # Errors
/// A value that the role would refuse; a place that it should not stand at; a file that is there.
pub async fn run(args: Init, common: &Common) -> Result<(), Failure> {
    let given = given(&args, common)?;
    let text = match args.role {
        Role::Coordinator => page::coordinator(&given),
        Role::Source => page::source(&given),
        Role::Target => page::target(&given),
    };
    match args.role {
        Role::Coordinator => coordinator::check_text(&text)?,
        Role::Source | Role::Target => {
            proxy::config::Config::of_text(&text).map_err(|error| Failure::usage(error.to_string()))?;
        }
    }
    if !args.anyway {
        match args.role {
            Role::Coordinator => place::of_coordinator(&args.out, common).await?,
            Role::Source => place::of_source(&args.out, &given.coordinator)?,
            Role::Target => {}
        }
    }
    let file = (args.out != Path::new("-")).then_some(&args.out);
    if let Some(path) = file {
        write(path, &text, args.force)?;
    }
    let out = common.output();
    let next = next(args.role, file);
    if out.json {
        let document = json!({"role": args.role.word(), "file": file, "config": text});
        out.show(&document, String::new);
    } else if let Some(path) = file {
        put(&format!("{} written\nnext:\n{next}", path.display()));
    } else {
        put(&text);
        eprint!("next:\n{next}");
    }
    Ok(())
}

fn given(args: &Init, common: &Common) -> Result<Given, Failure> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let coordinator = match (&common.coordinator, args.role) {
        (Some(address), _) => address.trim_start_matches("https://").to_owned(),
        (None, Role::Coordinator) => String::new(),
        (None, _) => {
            return Err(Failure::usage("a proxy has to know its coordinator")
                .hint("name it: --coordinator HOST:PORT (the port is 7700 unless it was changed)"));
        }
    };
    let (state, port) = match args.role {
        Role::Coordinator => (coordinator::DATA_DIR, coordinator::PORT),
        _ => ("/var/lib/afterimage/proxy", STREAM_PORT),
    };
    let listen = args.listen.or_else(|| {
        // A target has to say where; a coordinator has a default of its own.
        (args.role == Role::Target).then(|| SocketAddr::from(([0, 0, 0, 0], port)))
    });
    let anywhere = listen.is_none_or(|address| address.ip().is_unspecified());
    let port = listen.map_or(port, |address| address.port());
    let advertise = args.advertise.clone().or_else(|| anywhere.then(|| format!("{host}:{port}")));
    let state = args.state.clone().unwrap_or_else(|| PathBuf::from(state));
    if !state.is_absolute() || !args.journal.is_absolute() {
        return Err(Failure::usage("--state and --journal: allowed is an absolute path"));
    }
    Ok(Given {
        // Proxies are called by what operators can type.
        name: args.name.clone().unwrap_or_else(|| host.split('.').next().unwrap_or(&host).to_lowercase()),
        coordinator,
        listen,
        advertise,
        journal: args.journal.clone(),
        state,
        token_file: args.token_file.clone(),
    })
}

/// All of it or nothing: a role that starts meanwhile reads the old file or the new one.
fn write(path: &Path, text: &str, force: bool) -> Result<(), Failure> {
    let object = format!("file {}", path.display());
    let failed = |error: std::io::Error| {
        Failure::new(Kind::Failed, &object, error.to_string()).hint("make its folder, or name another file")
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut fresh = tempfile::Builder::new()
        .prefix(".afterimage-init-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(failed)?;
    fresh.write_all(text.as_bytes()).and_then(|()| fresh.as_file().sync_all()).map_err(failed)?;
    if force {
        return fresh.persist(path).map(drop).map_err(|error| failed(error.error));
    }
    match fresh.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(Failure::new(Kind::Conflict, &object, "is there already, and stays as it is")
                .hint("add --force to write over it, or name another: --out FILE"))
        }
        Err(error) => Err(failed(error.error)),
    }
}

fn next(role: Role, file: Option<&PathBuf>) -> String {
    let name = file.map_or_else(|| "FILE".to_owned(), |path| path.display().to_string());
    match role {
        Role::Coordinator => {
            format!("  afterimage doctor coordinator --config {name}\n  afterimage coordinator --config {name}\n")
        }
        _ => format!(
            "  afterimage token create NAME --role proxy           at the coordinator; into the token_file\n  \
             afterimage doctor proxy --config {name}\n  afterimage proxy --config {name}\n"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_there_stays_unless_forced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        write(&path, "one", false).unwrap();
        assert_eq!(write(&path, "two", false).unwrap_err().kind, Kind::Conflict);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one");
        write(&path, "two", true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
        assert!(write(&dir.path().join("none/a.toml"), "x", false).unwrap_err().hint.contains("folder"));
    }
}
