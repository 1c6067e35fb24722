//! `afterimage certificate`: who may get in until when, and that somebody may no more.

use afterimage_wire::v1;
use clap::Subcommand;
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::{Mood, state, table, text};
use super::session::{Session, Which, every};
use super::values::{json_time, show_time};

/// Verbs of `afterimage certificate`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// List the certificates that have been issued and have not ended.
    #[command(after_help = "Examples:\n  \
        afterimage certificate list\n  \
        afterimage certificate list --filter 'newest = true AND revoke_time_ns = 0'\n  \
        afterimage certificate list --filter 'holder = anna' --json")]
    List(Which),
    /// Revoke certificates: nothing takes them any more, and what goes on by them ends.
    #[command(after_help = "Examples:\n  \
        afterimage certificate revoke operator/anna --reason 'has left'\n  \
        afterimage certificate revoke src                              the proxy, if only it has that name\n  \
        afterimage certificate revoke 4a8c01…                          one of them, by its serial number\n\n\
        Whoever is to come back joins anew: afterimage token create NAME --role ROLE.\n\
        Replication with a proxy whose certificate is revoked ends.")]
    Revoke {
        /// ROLE/NAME, a NAME that only one role has, or a serial number.
        which: String,
        /// Why, for others to read.
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::List(which) => {
            let request =
                v1::ListCertificatesRequest { parent: session.tenant(), filter: which.filter, ..Default::default() };
            let mut all: Vec<v1::Certificate> =
                every!(session, "certificates", certificates.list_certificates(request).certificates);
            all.sort_by(|a, b| (a.role, &a.holder, a.issue_time_ns).cmp(&(b.role, &b.holder, b.issue_time_ns)));
            let document = all.iter().map(document).collect::<Vec<_>>();
            out.show(&json!({ "certificates": document }), || listed(&all));
        }
        Verb::Revoke { which, reason } => {
            let object = format!("certificate \"{which}\"");
            let mut request = v1::RevokeCertificatesRequest {
                parent: session.tenant(),
                which,
                reason,
                validate_only: true,
                ..Default::default()
            };
            let meant = session.ask(&object, session.certificates().revoke_certificates(request.clone())).await?;
            out.confirm(&object, &warning(&meant.certificates))?;
            request.validate_only = false;
            let answer = session.ask(&object, session.certificates().revoke_certificates(request)).await?;
            let revoked = answer.certificates;
            let document = revoked.iter().map(document).collect::<Vec<_>>();
            out.show(&json!({ "revoked": document }), || listed(&revoked));
        }
    }
    Ok(())
}

fn holder(certificate: &v1::Certificate) -> String {
    format!("{}/{}", role(certificate), certificate.holder)
}

fn role(certificate: &v1::Certificate) -> String {
    certificate.role().as_str_name().trim_start_matches("ROLE_").to_lowercase()
}

fn warning(meant: &[v1::Certificate]) -> String {
    let mut holders: Vec<String> = meant.iter().map(holder).collect();
    holders.dedup();
    let proxy = meant.iter().any(|c| c.role() == v1::Role::Proxy);
    let streams = if proxy { " Replication with it ends." } else { "" };
    format!("{} of {} will not be taken any more.{streams}", plural(meant.len()), holders.join(", "))
}

fn plural(count: usize) -> String {
    if count == 1 { "1 certificate".to_owned() } else { format!("{count} certificates") }
}

/// A certificate as JSON.
pub fn document(certificate: &v1::Certificate) -> Value {
    let c = certificate;
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "serial": c.serial,
        "role": role(c),
        "name": c.holder,
        "proxy_uid": some(&c.proxy_uid),
        "key_pin": c.key_pin,
        "issuer": c.issuer,
        "issued": json_time(c.issue_time_ns),
        "renews": json_time(c.renew_time_ns),
        "expires": json_time(c.expire_time_ns),
        "newest": c.newest,
        "revoked": (c.revoke_time_ns > 0).then(|| json!({
            "time": json_time(c.revoke_time_ns),
            "by": c.revoked_by,
            "reason": c.revoke_reason,
        })),
    })
}

/// The certificates as a table.
pub fn listed(certificates: &[v1::Certificate]) -> String {
    if certificates.is_empty() {
        return "no certificates".to_owned();
    }
    table(
        &["HOLDER", "SERIAL", "STATE", "UNTIL", "ISSUER"],
        certificates.iter().map(|c| {
            let now = match (c.revoke_time_ns, c.newest) {
                (0, true) => state("good", Mood::Good),
                (0, false) => state("renewed", Mood::Plain),
                _ => state("revoked", Mood::Bad),
            };
            vec![text(holder(c)), text(&c.serial), now, text(show_time(c.expire_time_ns)), text(&c.issuer)]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(name: &str, role: v1::Role) -> v1::Certificate {
        v1::Certificate {
            serial: "4a".repeat(16),
            holder: name.into(),
            role: role.into(),
            issuer: "ab".repeat(8),
            expire_time_ns: 1_800_000_000_000_000_000,
            ..Default::default()
        }
    }

    #[test]
    fn a_table_of_certificates_fits_100_columns() {
        let long = [certificate(&"n".repeat(63), v1::Role::Operator), certificate("a", v1::Role::Proxy)];
        let shown = listed(&long);
        assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
    }

    #[test]
    fn what_ends_is_said_before_it_does() {
        let people = [certificate("anna", v1::Role::Operator), certificate("anna", v1::Role::Operator)];
        assert_eq!(warning(&people), "2 certificates of operator/anna will not be taken any more.");
        assert!(warning(&[certificate("src", v1::Role::Proxy)]).ends_with("Replication with it ends."));
    }
}
