//! `afterimage proxies`: the proxies that have joined. (`afterimage proxy` runs one.)

use afterimage_wire::v1;
use clap::Subcommand;

use super::documents::{self, id, severity_word};
use super::failure::Failure;
use super::output::{Mood, fields, state, table, text};
use super::session::{Session, every};
use super::values::{show_duration, show_size, show_time};

/// Verbs of `afterimage proxies`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// List the proxies (the default).
    List,
    /// Show one proxy.
    Show {
        /// The proxy's name.
        proxy: String,
    },
    /// Remove a proxy that no group names: its certificate is not accepted any more.
    Remove {
        /// The proxy's name.
        proxy: String,
    },
}

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    let out = session.out;
    match verb {
        Verb::List => {
            let request = v1::ListProxiesRequest { parent: session.tenant(), ..Default::default() };
            let proxies: Vec<v1::Proxy> = every!(session, "proxies", proxies.list_proxies(request).proxies);
            let document = proxies.iter().map(documents::proxy).collect::<Vec<_>>();
            out.show(&serde_json::json!({"proxies": document}), || listed(&proxies));
        }
        Verb::Show { proxy } => {
            let found = get(session, &proxy).await?;
            out.show(&documents::proxy(&found), || shown(&found));
        }
        Verb::Remove { proxy } => {
            let found = get(session, &proxy).await?;
            out.confirm(&object(&proxy), &format!("Proxy {proxy} will have to join again before it is let in."))?;
            let request = v1::DeleteProxyRequest { name: found.name, etag: found.etag, ..Default::default() };
            session.ask(object(&proxy), session.proxies().delete_proxy(request)).await?;
            out.show(&serde_json::json!({"deleted": {"proxy": proxy}}), || format!("proxy {proxy} removed"));
        }
    }
    Ok(())
}

async fn get(session: &Session, proxy: &str) -> Result<v1::Proxy, Failure> {
    let request = v1::GetProxyRequest { name: session.proxy(proxy) };
    session.ask(object(proxy), session.proxies().get_proxy(request)).await
}

fn object(proxy: &str) -> String {
    format!("proxy \"{proxy}\"")
}

fn heard(proxy: &v1::Proxy) -> String {
    proxy
        .last_heard_age_ms
        .map_or_else(|| "not since start".to_owned(), |ms| format!("{} ago", show_duration(ms * 1_000_000)))
}

fn connection(proxy: &v1::Proxy) -> comfy_table::Cell {
    if proxy.connected { state("connected", Mood::Good) } else { state("not connected", Mood::Bad) }
}

fn room(room: v1::TargetRoom) -> String {
    let [free, total, reserve] = [room.free_bytes, room.total_bytes, room.reserve_bytes].map(show_size);
    format!("{free} free of {total}, {reserve} in reserve")
}

/// Whether the proxy has taken over the newest desired state.
fn converged(proxy: &v1::Proxy) -> String {
    if proxy.observed_version >= proxy.desired_version {
        "yes".to_owned()
    } else {
        format!("no ({} of {})", proxy.observed_version, proxy.desired_version)
    }
}

/// The proxies as a table.
pub fn listed(proxies: &[v1::Proxy]) -> String {
    if proxies.is_empty() {
        return "no proxies; let one join: afterimage token create NAME --role proxy".to_owned();
    }
    table(
        &["PROXY", "STATE", "HEARD", "CONVERGED", "DATA ADDRESS", "CAN"],
        proxies.iter().map(|proxy| {
            vec![
                text(id(&proxy.name)),
                connection(proxy),
                text(heard(proxy)),
                text(converged(proxy)),
                text(&proxy.data_address),
                text(proxy.capabilities.join(" ")),
            ]
        }),
    )
}

fn shown(proxy: &v1::Proxy) -> String {
    let mut text = fields(&[
        ("proxy", id(&proxy.name).to_owned()),
        ("state", if proxy.connected { "connected" } else { "not connected" }.to_owned()),
        ("last heard", heard(proxy)),
        ("converged", converged(proxy)),
        ("site", proxy.site.clone()),
        ("data address", proxy.data_address.clone()),
        ("room", proxy.room.map(room).unwrap_or_default()),
        ("NBD addresses", proxy.nbd_addresses.join(" ")),
        ("capabilities", proxy.capabilities.join(" ")),
        ("software", proxy.software_version.clone()),
        ("boot id", proxy.boot_id.clone()),
        ("uid", proxy.uid.clone()),
        ("key pin", proxy.key_pin.clone()),
        ("certificate until", show_time(proxy.certificate_expire_time_ns)),
        ("joined", show_time(proxy.create_time_ns)),
    ]);
    for condition in &proxy.conditions {
        text += &format!("{}: {}: {}\n", severity_word(condition.severity()), condition.kind, condition.message);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_proxies_fits_100_columns() {
        let proxy = v1::Proxy {
            name: format!("tenants/default/proxies/{}", "p".repeat(63)),
            last_heard_age_ms: Some(123_456_789),
            desired_version: 1_000_000,
            data_address: "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535".into(),
            capabilities: vec!["source".into(), "target".into(), "nbd-unix".into(), "nbd-tcp".into()],
            ..Default::default()
        };
        assert!(listed(&[proxy]).lines().all(|line| line.chars().count() <= 100));
    }

    #[test]
    fn a_proxy_behind_its_desired_state_says_so() {
        let proxy = v1::Proxy { observed_version: 3, desired_version: 5, ..Default::default() };
        assert_eq!(converged(&proxy), "no (3 of 5)");
    }
}
