//! Certificates and keys: there, for their owner only, valid, of the right role and name, and fitting each other.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::ca::not_after;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;

use super::{Check, State};
use crate::operator::values::{json_time, now_ns, show_duration, show_time};
use crate::proxy;

/// A certificate that ends within this wants somebody's look; proxies renew theirs 30 days before. ns.
const SOON: u64 = 14 * 86_400 * 1_000_000_000;
/// An authority that ends within this wants a new one beside it, ns.
const AUTHORITY_SOON: u64 = 180 * 86_400 * 1_000_000_000;

/// The certificate of a proxy (of this name) or of an operator; the bundle, if it can be used.
pub fn of_caller(path: &Path, name: Option<&str>, proxy: bool, checks: &mut Vec<Check>) -> Option<Bundle> {
    const NAME: &str = "certificate";
    let again = if proxy {
        "afterimage token create NAME --role proxy, then start it with --token"
    } else {
        "afterimage join TOKEN"
    };
    if proxy && !path.exists() {
        let found = "it has not joined yet: its first start needs a token (coordinator.token_file, --token)";
        checks.push(Check::warn(NAME, found, "afterimage token create NAME --role proxy").of(path.display()));
        return None;
    }
    let bundle = match Bundle::load(path) {
        Ok(bundle) => bundle,
        Err(error) => {
            checks.push(Check::fail(NAME, error.to_string(), format!("join (again): {again}")).of(path.display()));
            return None;
        }
    };
    checks.push(judge(&bundle, name, proxy, now_ns()).of(path.display()));
    (checks.last()?.state != State::Fail).then_some(bundle)
}

fn judge(bundle: &Bundle, name: Option<&str>, proxy: bool, now: u64) -> Check {
    const NAME: &str = "certificate";
    let whose = format!("{}/{}", bundle.role, bundle.name);
    let until = show_time(bundle.expire_time_ns);
    let wrong = |found: String, remedy: &str| Check::fail(NAME, found, remedy);
    if (bundle.role == "proxy") != proxy {
        let wanted = if proxy { "a proxy's" } else { "a person's" };
        return wrong(format!("it is {whose}'s, and {wanted} is needed"), "name another file, or join again");
    }
    if let Some(name) = name.filter(|name| *name != bundle.name) {
        return wrong(format!("it is {whose}'s, and the configuration says {name}"), "the name that it joined with");
    }
    let pems = proxy::Pems {
        uid: bundle.uid.clone(),
        ca_pem: bundle.ca_pem.clone(),
        certificate_pem: bundle.certificate_pem.clone(),
        key_pem: bundle.key_pem.clone(),
    };
    if let Err(error) = proxy::Identity::new(&pems) {
        return wrong(error.to_string(), "join again");
    }
    let left = bundle.expire_time_ns.saturating_sub(now);
    let check = if left == 0 {
        wrong(format!("{whose}'s, ended {until}"), "join again with a new token")
    } else if left < SOON {
        let found = format!("{whose}'s, ends in {}: {until}", show_duration(left));
        Check::warn(NAME, found, "a proxy renews its own when it reaches the coordinator; a person joins again")
    } else {
        Check::ok(NAME, format!("{whose}'s, valid until {until}"))
    };
    Check {
        measured: json!({"role": bundle.role, "name": bundle.name, "expires": json_time(bundle.expire_time_ns)}),
        ..check
    }
}

/// The authority of a coordinator and what wraps its policy keys; before its first start neither is there.
pub fn of_authority(dir: &Path, checks: &mut Vec<Check>) {
    let first = !dir.join("state.redb").exists() && !dir.join("ca.pem").exists();
    for (name, file) in [("authority", "ca.pem"), ("policy keys", "keys.bin")] {
        let path = dir.join(file);
        let check = match std::fs::metadata(&path) {
            Err(error) if first && error.kind() == std::io::ErrorKind::NotFound => {
                Check::ok(name, "made at the first start")
            }
            Err(error) => Check::fail(
                name,
                error.to_string(),
                "put it back from its backup: without ca.pem nobody is known, without keys.bin no journal opens",
            ),
            Ok(meta) if meta.permissions().mode() & 0o077 != 0 => {
                let found = format!("others may read it (mode {:04o})", meta.permissions().mode() & 0o7777);
                Check::fail(name, found, format!("chmod 600 {}, and take what is in it as known", path.display()))
            }
            Ok(_) if file == "ca.pem" => ends(&path),
            Ok(_) => Check::ok(name, "there, for its owner only; keep a copy elsewhere"),
        };
        checks.push(check.of(path.display()));
    }
}

fn ends(path: &Path) -> Check {
    let pem = std::fs::read(path).unwrap_or_default();
    let certificate = CertificateDer::from_pem_slice(&pem).ok();
    let Some(until) = certificate.and_then(|der| not_after(&der)) else {
        return Check::fail("authority", "there is no certificate in it", "put it back from its backup");
    };
    let until = until.saturating_mul(1_000_000_000);
    let found = format!("valid until {}", show_time(until));
    match until.saturating_sub(now_ns()) {
        0 => Check::fail("authority", format!("ended {}", show_time(until)), "a new one, and everybody joins again"),
        left if left < AUTHORITY_SOON => Check::warn("authority", found, "plan for its successor"),
        _ => Check::ok("authority", found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bundle as the coordinator's authority makes it.
    fn bundle(role: &str, name: &str, until: u64) -> Bundle {
        let signing = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["u".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&signing).unwrap();
        let text = json!({
            "version": 1, "tenant": "default", "role": role, "name": name, "uid": "u", "endpoint": "https://c:7700",
            "ca_pem": certificate.pem(), "certificate_pem": certificate.pem(), "key_pem": signing.serialize_pem(),
            "expire_time_ns": until,
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn a_certificate_must_be_of_the_role_and_the_name() {
        let day = 86_400 * 1_000_000_000;
        let now = 1000 * day;
        let good = bundle("proxy", "src-1", now + 90 * day);
        assert_eq!(judge(&good, Some("src-1"), true, now).state, State::Ok);
        assert_eq!(judge(&good, Some("src-2"), true, now).state, State::Fail);
        assert_eq!(judge(&good, None, false, now).state, State::Fail);
        assert_eq!(judge(&bundle("admin", "anna", now + 90 * day), None, false, now).state, State::Ok);
        assert_eq!(judge(&bundle("admin", "anna", now + 2 * day), None, false, now).state, State::Warn);
        assert_eq!(judge(&bundle("admin", "anna", now - day), None, false, now).state, State::Fail);
    }

    #[test]
    fn a_key_of_another_certificate_is_found_out_and_not_shown() {
        let mut mixed = bundle("admin", "anna", u64::MAX / 2);
        mixed.key_pem = bundle("admin", "anna", 1).key_pem;
        let check = judge(&mixed, None, false, 1);
        assert_eq!(check.state, State::Fail, "{check:?}");
        assert!(!format!("{check:?}").contains("PRIVATE"), "{check:?}");
    }

    #[test]
    fn half_a_coordinators_folder_fails_and_an_empty_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let states = |checks: &[Check]| checks.iter().map(|check| check.state).collect::<Vec<_>>();
        let mut checks = Vec::new();
        of_authority(dir.path(), &mut checks);
        assert_eq!(states(&checks), [State::Ok, State::Ok]);
        std::fs::write(dir.path().join("state.redb"), "").unwrap();
        std::fs::write(dir.path().join("keys.bin"), "x").unwrap();
        std::fs::set_permissions(dir.path().join("keys.bin"), std::fs::Permissions::from_mode(0o644)).unwrap();
        let mut checks = Vec::new();
        of_authority(dir.path(), &mut checks);
        assert_eq!(states(&checks), [State::Fail, State::Fail]);
    }
}
