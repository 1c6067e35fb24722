//! `afterimage ca`: the authority that issues certificates, and its replacement by another one.

use afterimage_wire::v1;
use clap::Subcommand;
use serde_json::json;

use super::certificate;
use super::failure::Failure;
use super::output::{fields, table, text};
use super::session::Session;
use super::values::{json_time, show_time};

/// Verbs of `afterimage ca`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Show the authorities that are trusted, and who needs the one that is being replaced.
    Status,
    /// Replace the authority: a new one issues from now on, and both are trusted until --finish.
    #[command(after_help = "Examples:\n  \
        afterimage ca rotate             proxies renew at once, people with their next command\n  \
        afterimage ca status             who is left\n  \
        afterimage ca rotate --finish    the old one is trusted no more\n\n\
        Streams go on all the time.")]
    Rotate {
        /// End it: certificates of the old authority are taken no more. Refused while somebody needs it.
        #[arg(long)]
        finish: bool,
        /// Lock out those who have not renewed.
        #[arg(long, requires = "finish")]
        anyway: bool,
    },
}

const OBJECT: &str = "certificate authority";

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let parent = session.tenant();
    let get = v1::GetAuthoritiesRequest { parent: parent.clone() };
    let now = session.ask(OBJECT, session.certificates().get_authorities(get)).await?;
    let shown = match verb {
        Verb::Status => now,
        Verb::Rotate { finish, anyway } => {
            if anyway && !now.needed_by.is_empty() {
                let left = now.needed_by.len();
                session.out.confirm(OBJECT, &format!("{left} who have not renewed will have to join again."))?;
            }
            let request = v1::RotateAuthorityRequest { parent, finish, anyway, ..Default::default() };
            session.ask(OBJECT, session.certificates().rotate_authority(request)).await?
        }
    };
    let authority = |a: &v1::Authority| {
        json!({
            "id": a.id,
            "issuing": a.issuing,
            "since": (a.begin_time_ns > 0).then(|| json_time(a.begin_time_ns)),
            "expires": json_time(a.expire_time_ns),
            "certificate_pem": a.certificate_pem,
        })
    };
    let document = json!({
        "rotating": shown.authorities.len() > 1,
        "authorities": shown.authorities.iter().map(authority).collect::<Vec<_>>(),
        "needed_by": shown.needed_by.iter().map(certificate::document).collect::<Vec<_>>(),
    });
    session.out.show(&document, || said(&shown));
    Ok(())
}

fn said(shown: &v1::Authorities) -> String {
    let rows = shown.authorities.iter().map(|a| {
        let state = if a.issuing { "issues" } else { "is being replaced" };
        let since = if a.begin_time_ns == 0 { "the first".to_owned() } else { show_time(a.begin_time_ns) };
        vec![text(&a.id), text(state), text(since), text(show_time(a.expire_time_ns))]
    });
    let mut out = table(&["AUTHORITY", "STATE", "SINCE", "UNTIL"], rows);
    if shown.authorities.len() > 1 {
        out += "\n";
        out += &match shown.needed_by.len() {
            0 => "nobody needs the old one: afterimage ca rotate --finish\n".to_owned(),
            left => fields(&[("needed still by", left.to_string())]) + &certificate::listed(&shown.needed_by),
        };
    }
    out
}
