//! Hooks: events go to a command or a web address, each at least once and in order. What is configured is checked at the
//! start; delivery is in `coordinator::hooks`.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::v1::{Event, Severity};
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::filter::Filter;
use crate::names::is_id;

/// Most hooks.
pub const MAX_HOOKS: usize = 32;
/// Longest answer of a web server that is read, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// Longest file of a secret or of authorities, bytes.
const MAX_FILE: u64 = 1 << 20;
/// Where the authorities of the web are.
const SYSTEM_CAS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A hook as configured.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct HookConfig {
    /// How far it has got is kept under this name: a-z, 0-9 and "-".
    pub name: String,
    /// Program and arguments; the event comes on its standard input. Or else `url`.
    #[serde(default)]
    pub command: Vec<String>,
    /// `http://` or `https://`: the event is posted there.
    #[serde(default)]
    pub url: String,
    /// "info", "warning" (the default) or "error": events below are passed over.
    #[serde(default)]
    pub severity: String,
    /// Which of them, as in `afterimage events --filter`; empty for all.
    #[serde(default)]
    pub filter: String,
    /// How long one try may take, seconds: 1 to 300. Default 10.
    #[serde(default)]
    pub timeout_s: u64,
    /// For how long an event is tried again before it is given up, seconds: 0 to 86,400. Default 3,600.
    #[serde(default)]
    pub retry_s: Option<u64>,
    /// A file, only its owner's, with a secret: posts are signed with it.
    #[serde(default)]
    pub secret_file: Option<PathBuf>,
    /// Authorities for `https`, PEM. Default: those of the system.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
}

/// A hook that can be used.
#[derive(Clone)]
pub struct Hook {
    /// Name.
    pub name: String,
    least: Severity,
    filter: Arc<Filter>,
    timeout: Duration,
    /// For how long an event is tried again.
    pub retry: Duration,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Command(Vec<String>),
    Web { tls: Option<Arc<rustls::ClientConfig>>, host: String, port: u16, path: String, secret: Option<Arc<Vec<u8>>> },
}

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hook({})", self.name)
    }
}

/// Checks all hooks.
///
/// # Errors
/// Names the hook, the field, what it holds and what is allowed.
pub fn check(hooks: &[HookConfig]) -> Result<Vec<Hook>, String> {
    if hooks.len() > MAX_HOOKS {
        return Err(format!("hook: {} of them; allowed: {MAX_HOOKS}", hooks.len()));
    }
    let mut checked: Vec<Hook> = Vec::new();
    for hook in hooks {
        if checked.iter().any(|h| h.name == hook.name) {
            return Err(format!("hook \"{}\": name: there are two", hook.name));
        }
        checked.push(hook.check().map_err(|why| format!("hook \"{}\": {why}", hook.name))?);
    }
    Ok(checked)
}

impl HookConfig {
    fn check(&self) -> Result<Hook, String> {
        if !is_id(&self.name) {
            return Err("name; allowed: 1 to 63 characters of a-z, 0-9 and \"-\"".to_owned());
        }
        let least = match self.severity.as_str() {
            "info" => Severity::Info,
            "" | "warning" => Severity::Warning,
            "error" => Severity::Error,
            other => return Err(format!("severity is \"{other}\"; allowed: info, warning, error")),
        };
        let filter = Filter::parse::<Event>(&self.filter).map_err(|e| format!("filter: {e}"))?;
        let timeout = match self.timeout_s {
            0 => 10,
            s @ 1..=300 => s,
            s => return Err(format!("timeout_s is {s}; allowed: 1 to 300")),
        };
        let retry = self.retry_s.unwrap_or(3600);
        if retry > 86_400 {
            return Err(format!("retry_s is {retry}; allowed: 0 to 86400"));
        }
        let way = match (self.command.first(), self.url.as_str()) {
            (Some(program), "") => {
                let path = Path::new(program);
                let runs = std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
                if !path.is_absolute() || !runs {
                    return Err(format!("command is \"{program}\"; allowed: the absolute path of a program"));
                }
                if self.secret_file.is_some() || self.ca_file.is_some() {
                    return Err("secret_file and ca_file go with url".to_owned());
                }
                Way::Command(self.command.clone())
            }
            (None, url) if !url.is_empty() => self.web(url)?,
            _ => return Err("allowed: exactly one of command and url".to_owned()),
        };
        let (timeout, retry) = (Duration::from_secs(timeout), Duration::from_secs(retry));
        Ok(Hook { name: self.name.clone(), least, filter: Arc::new(filter), timeout, retry, way })
    }

    fn web(&self, url: &str) -> Result<Way, String> {
        let wrong =
            || format!("url is \"{url}\"; allowed: http://HOST[:PORT]/PATH or https://…, without user or fragment");
        let uri: hyper::Uri = url.parse().map_err(|_| wrong())?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong()),
        };
        let authority = uri.authority().filter(|a| !a.as_str().contains('@')).ok_or_else(wrong)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() || url.contains('#') {
            return Err(wrong());
        }
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        let secret = self.secret_file.as_deref().map(secret).transpose()?;
        let tls = secure.then(|| tls(self.ca_file.as_deref().unwrap_or(Path::new(SYSTEM_CAS)))).transpose()?;
        if secure {
            ServerName::try_from(host.clone()).map_err(|_| wrong())?;
        }
        Ok(Way::Web { tls, host, port, path, secret: secret.map(Arc::new) })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let unreadable = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

fn secret(path: &Path) -> Result<Vec<u8>, String> {
    let bytes = read(path).map_err(|e| format!("secret_file: {e}"))?;
    let mode = std::fs::metadata(path).map_or(0, |m| m.permissions().mode());
    if mode & 0o077 != 0 {
        return Err(format!("secret_file: {} is others' to read; allowed: mode 0600", path.display()));
    }
    let end = bytes.iter().rposition(|b| !b.is_ascii_whitespace()).map_or(0, |at| at + 1);
    if end < 16 {
        return Err(format!("secret_file: {} is too short; allowed: at least 16 bytes", path.display()));
    }
    Ok(bytes[..end].to_vec())
}

fn tls(path: &Path) -> Result<Arc<rustls::ClientConfig>, String> {
    let bytes = read(path).map_err(|e| format!("ca_file: {e}"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bytes) {
        let certificate = certificate.map_err(|e| format!("ca_file: {}: {e}", path.display()))?;
        roots.add(certificate).map_err(|e| format!("ca_file: {}: {e}", path.display()))?;
    }
    if roots.is_empty() {
        return Err(format!("ca_file: {} holds no certificate", path.display()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|e| format!("ca_file: {e}"))?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

/// What a hook is given: the event, and an id that stays the same when it is given again.
pub fn document(event: &Event, id: &str) -> String {
    let severity = match event.severity() {
        Severity::Error => "error",
        Severity::Warning => "warning",
        _ => "info",
    };
    serde_json::json!({
        "id": id,
        "number": event.number,
        "time_ns": event.time_ns,
        "severity": severity,
        "kind": event.kind,
        "subject": event.subject,
        "message": event.message,
    })
    .to_string()
}

impl Hook {
    /// Whether it wants this event. Never one about a hook: it would tell of itself without end.
    pub fn wants(&self, event: &Event) -> bool {
        event.kind != "hook" && event.severity >= self.least as i32 && self.filter.fits(event)
    }

    /// One try.
    ///
    /// # Errors
    /// Why it has not been taken, for a person.
    pub async fn deliver(&self, event: &Event, id: &str) -> Result<(), String> {
        let body = document(event, id);
        let tried = async {
            match &self.way {
                Way::Command(command) => run(command, event, id, &body).await,
                Way::Web { tls, host, port, path, secret } => {
                    post(tls.clone(), host, *port, path, secret.as_deref().map(Vec::as_slice), id, body).await
                }
            }
        };
        match tokio::time::timeout(self.timeout, tried).await {
            Ok(done) => done,
            Err(_) => Err(format!("not within {} s", self.timeout.as_secs())),
        }
    }
}

async fn run(command: &[String], event: &Event, id: &str, body: &str) -> Result<(), String> {
    let mut child = tokio::process::Command::new(&command[0])
        .args(&command[1..])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("AFTERIMAGE_EVENT_ID", id)
        .env("AFTERIMAGE_EVENT_KIND", &event.kind)
        .env("AFTERIMAGE_EVENT_SUBJECT", &event.subject)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Past its time it is killed.
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("cannot be run: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read its input is done all the same.
        let _ = stdin.write_all(body.as_bytes()).await;
    }
    let status = child.wait().await.map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("ended with {status}")) }
}

async fn post(
    tls: Option<Arc<rustls::ClientConfig>>,
    host: &str,
    port: u16,
    path: &str,
    secret: Option<&[u8]>,
    id: &str,
    body: String,
) -> Result<(), String> {
    let stream = TcpStream::connect((host, port)).await.map_err(|e| format!("cannot connect: {e}"))?;
    let mut request = Request::post(path)
        .header(HOST, if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
        .header(CONTENT_TYPE, "application/json")
        .header(USER_AGENT, concat!("afterimage/", env!("CARGO_PKG_VERSION")))
        .header("Afterimage-Event-Id", id);
    if let Some(secret) = secret {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
        let signature = crate::ca::hex(ring::hmac::sign(&key, body.as_bytes()).as_ref());
        request = request.header("Afterimage-Signature", format!("sha256={signature}"));
    }
    let request = request.body(Full::new(Bytes::from(body))).map_err(|e| e.to_string())?;
    match tls {
        None => exchange(stream, request).await,
        Some(config) => {
            let name = ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
            let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await;
            exchange(stream.map_err(|e| format!("TLS: {e}"))?, request).await
        }
    }
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Result<(), String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // Ends with the exchange: what it has to say comes by `sender`.
    let connection = tokio::spawn(connection);
    let answered = async {
        let answer = sender.send_request(request).await.map_err(|e| format!("no answer: {e}"))?;
        let status = answer.status();
        // Read to its end, or the server may take it for a client that went away.
        let _ = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        if status.is_success() { Ok(()) } else { Err(format!("answered with {status}")) }
    };
    let answered = answered.await;
    connection.abort();
    answered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> HookConfig {
        HookConfig { name: "h".into(), command: vec!["/bin/cat".into()], ..HookConfig::default() }
    }

    fn web(url: &str) -> HookConfig {
        HookConfig { name: "h".into(), url: url.into(), ..HookConfig::default() }
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_hook_and_field() {
        let refused = |hook: HookConfig, says: &str| {
            let why = check(&[hook]).unwrap_err();
            assert!(why.contains(says), "{why}: no {says}");
        };
        refused(HookConfig { name: "A b".into(), ..base() }, "name");
        refused(HookConfig { command: vec!["cat".into()], ..base() }, "absolute");
        refused(HookConfig { command: vec!["/etc/passwd".into()], ..base() }, "command");
        refused(HookConfig { url: "http://a/".into(), ..base() }, "exactly one");
        refused(HookConfig { command: vec![], ..base() }, "exactly one");
        refused(HookConfig { severity: "loud".into(), ..base() }, "severity");
        refused(HookConfig { filter: "nothing = 1".into(), ..base() }, "filter");
        refused(HookConfig { timeout_s: 301, ..base() }, "timeout_s");
        refused(HookConfig { retry_s: Some(86_401), ..base() }, "retry_s");
        for url in ["ftp://a/", "http:///x", "a.example", "http://u:p@a/", "http://a/#x", "https://a b/"] {
            refused(web(url), "url");
        }
        refused(HookConfig { ca_file: Some("/nonexistent".into()), ..web("https://a/") }, "ca_file");
        refused(HookConfig { secret_file: Some("/etc/passwd".into()), ..web("http://a/") }, "secret_file");
        assert!(check(&[base(), base()]).unwrap_err().contains("two"));
        assert!(check(&[base(), HookConfig { name: "w".into(), ..web("http://[::1]:8080/a?b=c") }]).is_ok());
    }

    #[test]
    fn events_are_chosen_by_severity_and_filter() {
        let hook = HookConfig { filter: "kind = condition".into(), ..base() }.check().unwrap();
        let event =
            |severity: Severity, kind: &str| Event { severity: severity.into(), kind: kind.into(), ..Event::default() };
        assert!(hook.wants(&event(Severity::Warning, "condition")) && hook.wants(&event(Severity::Error, "condition")));
        assert!(!hook.wants(&event(Severity::Info, "condition")) && !hook.wants(&event(Severity::Error, "step")));
        let all = HookConfig { severity: "info".into(), ..base() }.check().unwrap();
        assert!(all.wants(&event(Severity::Info, "step")) && !all.wants(&event(Severity::Error, "hook")));
    }

    #[tokio::test]
    async fn a_command_gets_the_event_and_its_failure_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let script = |text: &str| HookConfig {
            command: vec!["/bin/sh".into(), "-c".into(), text.into()],
            timeout_s: 1,
            ..base()
        };
        let event = Event { number: 7, kind: "condition".into(), message: "it's \"so\"".into(), ..Event::default() };
        let to = out.display();
        let hook = script(&format!("cat >{to}; echo \" $AFTERIMAGE_EVENT_ID\" >>{to}")).check().unwrap();
        hook.deliver(&event, "3-7").await.unwrap();
        let said = std::fs::read_to_string(&out).unwrap();
        assert_eq!(said, format!("{} 3-7\n", document(&event, "3-7")));
        let failed = script("exit 3").check().unwrap().deliver(&event, "3-7").await.unwrap_err();
        assert!(failed.contains('3'), "{failed}");
        let late = script("sleep 30").check().unwrap().deliver(&event, "3-7").await.unwrap_err();
        assert!(late.contains("within 1 s"), "{late}");
    }
}
