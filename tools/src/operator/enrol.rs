//! `afterimage join` and `afterimage token`: how somebody gets a certificate.

use std::io::Read;

use afterimage_controlplane::client;
use afterimage_controlplane::token::JoinToken;
use afterimage_wire::v1;
use clap::{Args, Subcommand, ValueEnum};

use super::failure::{Failure, Kind};
use super::output::fields;
use super::session::{Common, Session, unconnected};
use super::values::{duration_ns, json_time, show_time};

/// Options of `afterimage join`.
#[derive(Args, Debug)]
pub struct Join {
    /// The token, one line; "-" reads it from standard input, which keeps it out of the shell's history.
    token: String,
    /// Replace an identity that is there already.
    #[arg(long)]
    replace: bool,
}

/// Verbs of `afterimage token`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Make a token that lets its holder join once.
    #[command(after_help = "Examples:\n  \
        afterimage token create src --role proxy                  then: afterimage proxy --token TOKEN …\n  \
        afterimage token create anna --role operator --ttl 15m    then: afterimage join TOKEN\n\n\
        Hand the token over on a way that nobody else reads: who has it, is it.")]
    Create {
        /// Who may join with it: the proxy's name, or a person's.
        name: String,
        /// What it may do then.
        #[arg(long)]
        role: Role,
        /// How long it can be used, from 1m to 7d.
        #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration_ns)]
        ttl: u64,
    },
}

/// What a certificate allows.
#[derive(ValueEnum, Debug, Clone, Copy)]
pub enum Role {
    /// Runs as a proxy.
    Proxy,
    /// Reads.
    Viewer,
    /// Reads, creates, changes, fails over.
    Operator,
    /// All that, and lets others join.
    Admin,
}

/// Joins: spends the token and keeps the identity.
pub async fn join(args: Join, common: &Common) -> Result<(), Failure> {
    let path = common.identity_file()?;
    let token = if args.token == "-" { read_token()? } else { args.token };
    // What can go wrong here goes wrong before the token is spent.
    let parsed = JoinToken::parse(&token).map_err(|error| Failure::usage(error.to_string()))?;
    if parsed.role == "proxy" {
        return Err(Failure::new(
            Kind::Usage,
            format!("token for proxy \"{}\"", parsed.name),
            "it lets a proxy join, not a person",
        )
        .hint("use it where the proxy runs; see afterimage proxy --help"));
    }
    if path.exists() && !args.replace {
        return Err(Failure::new(Kind::Conflict, "identity", format!("{} is there already", path.display()))
            .hint("add --replace to join anew, or --identity FILE to keep both"));
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)
            .map_err(|error| Failure::new(Kind::Failed, "identity", format!("{}: {error}", folder.display())))?;
    }
    let bundle = client::join(&token, common.endpoint().as_deref()).await.map_err(|error| unconnected(&error))?;
    bundle.save(&path).map_err(|error| Failure::new(Kind::Failed, "identity", error.to_string()))?;
    let document = serde_json::json!({
        "identity": path.to_string_lossy(),
        "tenant": bundle.tenant,
        "role": bundle.role,
        "name": bundle.name,
        "coordinator": bundle.endpoint,
        "expires": json_time(bundle.expire_time_ns),
    });
    common.output().show(&document, || {
        fields(&[
            ("identity", path.display().to_string()),
            ("role", format!("{}/{}", bundle.role, bundle.name)),
            ("coordinator", bundle.endpoint.clone()),
            ("valid until", show_time(bundle.expire_time_ns)),
        ])
    });
    Ok(())
}

fn read_token() -> Result<String, Failure> {
    let mut token = String::new();
    std::io::stdin()
        .read_to_string(&mut token)
        .map_err(|error| Failure::usage(format!("the token cannot be read from standard input: {error}")))?;
    Ok(token.trim().to_owned())
}

/// Runs a verb of `afterimage token`.
pub async fn token(verb: Verb, session: &Session) -> Result<(), Failure> {
    let Verb::Create { name, role, ttl } = verb;
    let (role, word) = match role {
        Role::Proxy => (v1::Role::Proxy, "proxy"),
        Role::Viewer => (v1::Role::Viewer, "viewer"),
        Role::Operator => (v1::Role::Operator, "operator"),
        Role::Admin => (v1::Role::Admin, "admin"),
    };
    let request = v1::CreateJoinTokenRequest {
        parent: session.tenant(),
        role: role.into(),
        name: name.clone(),
        // Rounded up: 0 would stand for the default.
        ttl_s: ttl.div_ceil(1_000_000_000).max(1),
        ..Default::default()
    };
    let object = format!("token for {word} \"{name}\"");
    let made = session.ask(object, session.enrolment().create_join_token(request)).await?;
    let document = serde_json::json!({
        "token": made.token,
        "role": word,
        "name": name,
        "expires": json_time(made.expire_time_ns),
    });
    // The token alone on standard output, so that it can be piped; what to know about it, beside it.
    session.out.show(&document, || made.token.clone());
    if !session.out.json {
        eprintln!("usable once, until {}", show_time(made.expire_time_ns));
    }
    Ok(())
}
