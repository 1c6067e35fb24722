//! What is shown of groups and proxies as numbers for Prometheus, over plain HTTP: `GET /metrics` and nothing else. There
//! is no certificate to show here, so it is off unless an address is named, which is best one of the host itself.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::certificates::Certificate;
use crate::coordinator::Coordinator;

/// Connections at once; beyond that they wait to be accepted.
const MAX_CONNECTIONS: usize = 16;
/// Longest request, bytes.
const MAX_REQUEST: usize = 8192;
/// How long a connection may take in all.
const WITHIN: Duration = Duration::from_secs(10);

/// Answers until the coordinator stops.
pub async fn serve(coordinator: Arc<Coordinator>, listener: TcpListener) {
    let open = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut closing = coordinator.closing();
    loop {
        let permit = open.clone().acquire_owned().await.expect("it is never closed");
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|c| *c) => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let coordinator = coordinator.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    // Who is slow, or goes away, has had its chance.
                    let _ = tokio::time::timeout(WITHIN, answer(&coordinator, stream)).await;
                });
            }
            // Out of descriptors, most likely: not to be tried in a tight loop.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn answer(coordinator: &Coordinator, mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let mut part = [0; 1024];
        let length = stream.read(&mut part).await?;
        if length == 0 || request.len() + length > MAX_REQUEST {
            return respond(&mut stream, "400 Bad Request", "", "a request of up to 8 KiB\n", true).await;
        }
        request.extend(&part[..length]);
    }
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !words.next().is_some_and(|version| version.starts_with("HTTP/1.")) {
        return respond(&mut stream, "400 Bad Request", "", "HTTP/1.1\n", true).await;
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET" | "HEAD", "/metrics") => {
            let text = coordinator.metrics();
            let kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n";
            respond(&mut stream, "200 OK", kind, &text, method == "GET").await
        }
        ("GET" | "HEAD", _) => respond(&mut stream, "404 Not Found", "", "there is /metrics\n", method == "GET").await,
        _ => respond(&mut stream, "405 Method Not Allowed", "Allow: GET, HEAD\r\n", "GET\n", true).await,
    }
}

async fn respond(stream: &mut TcpStream, status: &str, more: &str, body: &str, with: bool) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {status}\r\n{more}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    if with {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}

/// Families of numbers, in the text format.
#[derive(Default)]
struct Text {
    text: String,
}

impl Text {
    /// A family: its name, what it is, and a number for each set of labels.
    fn family(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        numbers: impl IntoIterator<Item = (Vec<(&'static str, String)>, f64)>,
    ) {
        let mut numbers = numbers.into_iter().peekable();
        if numbers.peek().is_none() {
            return;
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "# HELP afterimage_{name} {help}\n# TYPE afterimage_{name} {kind}");
        for (labels, number) in numbers {
            let labels: Vec<String> =
                labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(self.text, "afterimage_{name}{labels} {number}");
        }
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn owner(name: &str, what: &'static str) -> Vec<(&'static str, String)> {
    let parts: Vec<&str> = name.split('/').collect();
    let part = |i: usize| parts.get(i).copied().unwrap_or_default().to_owned();
    vec![("tenant", part(1)), (what, part(3))]
}

/// A 1 for each condition of what has these labels.
fn marked(
    labels: Vec<(&'static str, String)>,
    conditions: &[v1::Condition],
) -> impl Iterator<Item = (Vec<(&'static str, String)>, f64)> {
    conditions.iter().map(move |c| {
        let severity = c.severity().as_str_name().trim_start_matches("SEVERITY_").to_lowercase();
        let own = [("kind", c.kind.clone()), ("severity", severity)];
        (labels.iter().cloned().chain(own).collect(), 1.0)
    })
}

/// The numbers of these groups and proxies, and of the coordinator itself.
pub fn render(
    status: &v1::CoordinatorStatus,
    groups: &[v1::GroupStatus],
    proxies: &[v1::Proxy],
    operations: &[(&'static str, usize)],
    certificates: &[&Certificate],
    authorities: &[v1::Authority],
) -> String {
    let mut out = Text::default();
    let version = vec![("version", status.software_version.clone())];
    out.family("build_info", "gauge", "The version of the coordinator.", [(version, 1.0)]);
    out.family("coordinator_uptime_seconds", "gauge", "Since it started.", [(vec![], status.uptime_ms as f64 / 1e3)]);
    out.family("coordinator_term", "gauge", "Rises with each start.", [(vec![], status.term as f64)]);
    out.family("coordinator_store_revision", "counter", "Changes of the store.", [(vec![], status.revision as f64)]);
    let states = operations.iter().map(|(state, count)| (vec![("state", (*state).to_owned())], *count as f64));
    out.family("operations", "gauge", "Operations that are kept, by their state.", states);

    let of = |group: &v1::GroupStatus| owner(&group.name, "group");
    let rpo = |f: fn(&v1::Rpo) -> Option<u64>| {
        groups.iter().filter_map(move |g| Some((of(g), f(g.rpo.as_ref()?)? as f64 / 1e6)))
    };
    let help = "Age of the oldest write in no durable restore point: the last report and its age.";
    out.family("group_rpo_seconds", "gauge", help, rpo(|r| r.now_us));
    out.family("group_rpo_target_seconds", "gauge", "As its policy says.", rpo(|r| Some(r.target_us)));
    out.family("group_rpo_report_age_seconds", "gauge", "Age of the source's last report.", rpo(|r| r.report_age_us));
    type Quantile = (&'static str, fn(&v1::Rpo) -> Option<u64>);
    let quantiles: [Quantile; 3] = [("0.5", |r| r.p50_us), ("0.99", |r| r.p99_us), ("1", |r| r.max_us)];
    let windowed = groups.iter().flat_map(|g| {
        quantiles.iter().filter_map(move |(q, f)| {
            let mut labels = of(g);
            labels.push(("quantile", (*q).to_owned()));
            Some((labels, f(g.rpo.as_ref()?)? as f64 / 1e6))
        })
    });
    out.family("group_rpo_window_seconds", "gauge", "The RPO over the last five minutes.", windowed);
    let within = groups.iter().filter_map(|g| Some((of(g), g.rpo.as_ref()?.within_target?)));
    let help = "Share of the last five minutes within the target, 0 to 1.";
    out.family("group_rpo_within_target_ratio", "gauge", help, within);
    let phases = groups.iter().map(|g| {
        let mut labels = of(g);
        labels.push(("phase", g.phase().as_str_name().trim_start_matches("PHASE_").to_lowercase()));
        (labels, 1.0)
    });
    out.family("group_phase", "gauge", "1 for the phase that it is in.", phases);
    let conditions = groups.iter().flat_map(|g| marked(of(g), &g.conditions));
    out.family("group_condition", "gauge", "1 for each condition that it has.", conditions);
    type Number = fn(&v1::GroupStatus) -> f64;
    let numbers: [(&str, &str, &str, Number); 12] = [
        ("group_writes_total", "counter", "Writes captured since the source proxy started.", |g| g.writes as f64),
        ("group_captured_bytes_total", "counter", "Their bytes.", |g| g.captured_bytes as f64),
        ("group_wire_bytes_total", "counter", "Bytes sent, resends included.", |g| g.wire_bytes as f64),
        ("group_queue_bytes", "gauge", "Captured and not acknowledged.", |g| g.queue_bytes as f64),
        ("group_queue_limit_bytes", "gauge", "Most of that.", |g| g.queue_limit_bytes as f64),
        ("group_spill_bytes", "gauge", "Of that on the source's disk.", |g| g.spill_bytes as f64),
        ("group_journal_bytes", "gauge", "Journal at the target.", |g| g.journal_bytes as f64),
        ("group_journal_budget_bytes", "gauge", "Most of that.", |g| g.journal_budget_bytes as f64),
        ("group_captured_sequence", "gauge", "Newest record captured.", |g| g.captured_seq as f64),
        ("group_durable_sequence", "gauge", "Newest record durable at the target.", |g| g.durable_seq as f64),
        ("group_restore_points", "gauge", "Restore points held.", |g| {
            g.points.as_ref().map_or(0.0, |p| p.count as f64)
        }),
        ("group_damaged_frames_total", "counter", "Frames found damaged since the target proxy started.", |g| {
            g.scrub.as_ref().map_or(0.0, |s| s.bad_frames as f64)
        }),
    ];
    for (name, kind, help, number) in numbers {
        out.family(name, kind, help, groups.iter().map(|g| (of(g), number(g))));
    }

    let of = |proxy: &v1::Proxy| owner(&proxy.name, "proxy");
    let connected = proxies.iter().map(|p| (of(p), f64::from(u8::from(p.connected))));
    out.family("proxy_connected", "gauge", "1 while its session is open.", connected);
    let heard = proxies.iter().filter_map(|p| Some((of(p), p.last_heard_age_ms? as f64 / 1e3)));
    out.family("proxy_last_heard_age_seconds", "gauge", "Since it was last heard.", heard);
    let expires = proxies.iter().map(|p| (of(p), (p.certificate_expire_time_ns / 1_000_000_000) as f64));
    out.family("proxy_certificate_expire_timestamp_seconds", "gauge", "When its certificate ends.", expires);
    let conditions = proxies.iter().flat_map(|p| marked(of(p), &p.conditions));
    out.family("proxy_condition", "gauge", "1 for each condition that it has.", conditions);

    let expires = certificates.iter().map(|c| {
        let labels = [("tenant", &c.tenant), ("name", &c.name)].map(|(key, value)| (key, value.clone()));
        let labels = labels.into_iter().chain([("role", c.role.as_str().to_owned())]).collect();
        (labels, (c.expire_time_ns / 1_000_000_000) as f64)
    });
    let authorities = authorities.iter().map(|a| {
        let labels = vec![("authority", a.id.clone()), ("issuing", u8::from(a.issuing).to_string())];
        (labels, (a.expire_time_ns / 1_000_000_000) as f64)
    });
    let help = "When an authority that is trusted ends.";
    out.family("authority_expire_timestamp_seconds", "gauge", help, authorities);
    let help = "When the newest certificate of a person ends.";
    out.family("certificate_expire_timestamp_seconds", "gauge", help, expires);
    out.text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_family_and_what_is_not_known_is_left_out() {
        let condition = v1::Condition { kind: "silent".into(), severity: 3, ..v1::Condition::default() };
        let group = |name: &str, now_us| v1::GroupStatus {
            name: format!("tenants/default/groups/{name}"),
            phase: v1::Phase::Protected.into(),
            rpo: Some(v1::Rpo { now_us, target_us: 500_000, ..v1::Rpo::default() }),
            conditions: vec![condition.clone()],
            writes: 7,
            ..v1::GroupStatus::default()
        };
        let groups = [group("a", Some(1_500_000)), group("b", None)];
        let anna = crate::certificates::tests::certificate("1", "anna", 0, 1_700_000_000_000_000_000);
        let text = render(&v1::CoordinatorStatus::default(), &groups, &[], &[("running", 2)], &[&anna], &[]);
        for line in [
            "# TYPE afterimage_group_rpo_seconds gauge",
            "afterimage_group_rpo_seconds{tenant=\"default\",group=\"a\"} 1.5",
            "afterimage_group_rpo_target_seconds{tenant=\"default\",group=\"b\"} 0.5",
            "afterimage_group_phase{tenant=\"default\",group=\"b\",phase=\"protected\"} 1",
            "afterimage_group_condition{tenant=\"default\",group=\"a\",kind=\"silent\",severity=\"error\"} 1",
            "afterimage_group_writes_total{tenant=\"default\",group=\"a\"} 7",
            "afterimage_operations{state=\"running\"} 2",
            "afterimage_certificate_expire_timestamp_seconds{tenant=\"default\",name=\"anna\",role=\"operator\"} 1700000000",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
        assert!(!text.contains("afterimage_group_rpo_seconds{tenant=\"default\",group=\"b\"}"));
        assert!(!text.contains("proxy_connected"), "no family without a number");
        let mut families = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                families.push(rest.split(' ').next().unwrap());
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                assert_eq!(families.last(), Some(&name), "{line}");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
            }
        }
        let mut once = families.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), families.len(), "a family comes once");
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
