//! What people and other programs write for us: configuration, names, tokens, bundles, and what a store gives back.

use std::cell::OnceCell;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::str::FromStr;

use afterimage_controlplane::bundle::Bundle;
use afterimage_controlplane::ca;
use afterimage_controlplane::model::Model;
use afterimage_controlplane::names::{self, Kind, Name};
use afterimage_controlplane::objects::Object;
use afterimage_controlplane::store::{Entry, Listing};
use afterimage_controlplane::token::JoinToken;
use afterimage_wire::ids::DiskId;

use crate::input::Input;

#[allow(dead_code)]
#[path = "../../../tools/src/proxy/config.rs"]
mod proxy_config;

use proxy_config::{Args, Config, Listen, Serve, Size};

thread_local! {
    static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

/// A file of this thread with that content, readable by its owner only.
fn file(content: &[u8]) -> PathBuf {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| tempfile::tempdir().expect("a folder for temporary files"));
        let path = folder.path().join("input");
        std::fs::write(&path, content).expect("the folder takes files");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("it is ours");
        path
    })
}

/// Lines of a proxy's file, put together at random by [`config`].
const LINES: &[&str] = &[
    "name = \"src-1\"",
    "state_dir = \"/var/lib/afterimage/proxy\"",
    "log = \"text\"",
    "[coordinator]",
    "address = \"10.0.0.5:7700\"",
    "token = \"x\"",
    "[source]",
    "nbd = [\"unix:/run/nbd.sock\", \"tcp:127.0.0.1:10809\"]",
    "memory = \"512MiB\"",
    "queue = \"256MiB\"",
    "seal_threads = 2",
    "max_wait_ms = 20",
    "trust_reboot = false",
    "[target]",
    "journal = \"/srv/journal\"",
    "listen = \"10.0.0.6:7800\"",
    "advertise = \"backup.example.org:7800\"",
    "views = [\"unix:/run/views.sock\"]",
    "budget = \"200GiB\"",
    "segment = \"64MiB\"",
];

/// The file of a proxy, and the values of its flags. What is accepted keeps its bounds.
pub fn config(data: &[u8]) {
    let mut input = Input::new(data);
    let text = if input.flag() {
        input.rest().to_vec()
    } else {
        let mut text = String::new();
        let drops = input.below(8);
        for line in LINES {
            match input.byte() {
                choice if u64::from(choice) < drops * 8 => continue,
                230.. => {
                    let key = line.split('=').next().unwrap_or(line);
                    let values = ["-1", "0", "18446744073709551616", "\"16777216TiB\"", "\"\"", "[]", "{}", "1.5e99"];
                    let value = match input.below(12) {
                        at @ 0..8 => values[at as usize].to_owned(),
                        8 => format!("\"{}\"", input.number(1 << 26)),
                        _ => format!("{}", input.number(1 << 26)),
                    };
                    text.push_str(&format!("{key} = {value}"));
                }
                _ => text.push_str(line),
            }
            text.push('\n');
        }
        text.into_bytes()
    };
    let args = Args { config: Some(file(&text)), ..Args::default() };
    match Config::load(&args) {
        Ok(config) => {
            assert!(!config.name.is_empty() && config.name.len() <= 63);
            assert!(config.source.is_some() || config.target.is_some());
            if let Some(source) = config.source {
                assert!((proxy_config::MIN_POOL..=proxy_config::MAX_POOL).contains(&source.memory));
                assert!(source.seal_threads <= proxy_config::MAX_SEAL_THREADS && !source.nbd.is_empty());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let text = String::from_utf8_lossy(&text);
    if let Ok(listen) = Listen::from_str(&text) {
        assert_eq!(Listen::from_str(&listen.to_string()).as_ref(), Ok(&listen));
    }
    let _ = Size::from_str(&text);
    let _ = Serve::from_str(&text);
}

/// Names of resources, ids, join tokens, bundles, certificates.
pub fn names(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for kind in [Kind::Policy, Kind::Group, Kind::Proxy, Kind::Operation] {
        if let Ok(name) = Name::parse("field", kind, &text) {
            assert_eq!(name.to_string(), text);
        }
    }
    if let Ok((group, id)) = names::parse_child("field", "disks", &text) {
        assert_eq!(names::child(&group, "disks", id), text);
    }
    if let Ok(tenant) = names::parse_tenant("field", &text) {
        assert_eq!(names::tenant(&tenant), text);
    }
    if let Ok(id) = text.parse::<DiskId>() {
        assert_eq!(id.to_string().parse::<DiskId>(), Ok(id));
    }
    for line in [text.to_string(), format!("aij1_{text}")] {
        if let Ok(token) = JoinToken::parse(&line) {
            let _ = JoinToken::parse(&token.encode()).expect("what was read can be written");
        }
    }
    let _ = Bundle::load(&file(data));
    let _ = ca::identify(data);
    let _ = ca::key_pin(data);
}

/// What stands in the store of a coordinator.
pub fn objects(data: &[u8]) {
    let mut input = Input::new(data);
    let kinds = ["policies/default/gold", "groups/default/shop", "disks/u/00000", "proxies/default/src"];
    let more = ["views/default/shop/v", "operations/default/u", "tokens/t", "keys/k", "term", "nonsense", ""];
    let at = input.below(11) as usize;
    let key = kinds.iter().chain(&more).nth(at).copied().unwrap_or_default();
    let value = input.rest();
    if let Ok(object) = Object::decode(key, value) {
        let again = Object::decode(&object.key(), &object.encode()).expect("what was read can be written");
        assert_eq!(again.encode(), object.encode());
        let entry = Entry { key: object.key(), revision: 1, value: object.encode() };
        let _ = Model::load(Listing { revision: 1, entries: vec![entry] });
    }
    let entry = Entry { key: key.to_owned(), revision: 1, value: value.to_vec() };
    let _ = Model::load(Listing { revision: 1, entries: vec![entry] });
}
