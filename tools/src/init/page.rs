//! The files: every setting with a sentence, its default as a line that is commented out, made from the constants that the
//! roles themselves use.
//!
//! `#key = value` is a default: taking the `#` away changes nothing. `#~key = value` is an example of a setting that is
//! not set by default. Other comments are for people.

use std::fmt::Display;

use afterimage_controlplane::grpc::rate::{DEFAULT_BURST, DEFAULT_RATE};

use super::Given;
use crate::coordinator::{DATA_DIR, PORT};
use crate::proxy::config::machines::{DEFAULT_HOOK_S, DEFAULT_LIBVIRT_URI, DEFAULT_QEMU, DEFAULT_SEEDS};
use crate::proxy::config::{
    DEFAULT_MAX_WAIT_MS, DEFAULT_POOL, DEFAULT_RESERVE, DEFAULT_SCRUB_HOURS, DEFAULT_SCRUB_RATE, DEFAULT_SEGMENT,
    DEFAULT_SPILL, DEFAULT_SPILL_RESERVE, DEFAULT_SPILL_SEGMENT, Size, default_seal_threads,
};

const HOW: &str = "A line `#setting = value` shows a default: it may be taken as it is. A line `#~setting = value` is an \
                   example of what is not set by default: without `#~` it is. Changes take effect at the next start.";

/// A file that is being written.
struct Page(String);

impl Page {
    fn new(title: &str) -> Self {
        let mut page = Self(String::new());
        page.say(title);
        page.say(HOW);
        page
    }

    /// A paragraph for people, within 100 columns.
    fn say(&mut self, text: &str) {
        let mut line = "#".to_owned();
        for word in text.split_whitespace() {
            if line.len() + 1 + word.len() > 100 {
                self.0 += &(line + "\n");
                line = "#".to_owned();
            }
            line += &format!(" {word}");
        }
        self.0 += &(line + "\n");
    }

    fn blank(&mut self) {
        self.0 += "\n";
    }

    fn table(&mut self, name: &str) {
        self.0 += &format!("\n[{name}]\n");
    }

    /// What is set.
    fn set(&mut self, key: &str, value: impl Display, what: &str) {
        self.say(what);
        self.0 += &format!("{key} = {value}\n");
    }

    /// What is so anyway.
    fn default(&mut self, key: &str, value: impl Display, what: &str) {
        self.say(what);
        self.0 += &format!("#{key} = {value}\n");
    }

    /// What could be.
    fn example(&mut self, key: &str, value: impl Display, what: &str) {
        self.say(what);
        self.0 += &format!("#~{key} = {value}\n");
    }
}

/// As TOML writes a text.
fn text(value: impl Display) -> String {
    toml::Value::String(value.to_string()).to_string()
}

fn size(bytes: u64) -> String {
    text(Size(bytes))
}

/// The coordinator's.
pub fn coordinator(given: &Given) -> String {
    let mut page = Page::new("The coordinator of Afterimage: afterimage coordinator --config THIS-FILE");
    page.blank();
    let listen = "Addresses on which proxies and people are served; several may be given.";
    match given.listen {
        Some(address) => page.set("listen", format!("[{}]", text(address)), listen),
        None => page.default("listen", format!("[{}]", text(format!("0.0.0.0:{PORT}"))), listen),
    }
    if let Some(address) = &given.advertise {
        page.set("advertise", text(address), "Where they reach it, as written into join tokens; several with commas.");
    } else {
        page.example("advertise", text("coordinator.example:7700"), "Where they reach it, if not there.");
    }
    let folder = "Folder of the state, the certificate authority, the keys and the audit log.";
    if given.state.as_os_str() == DATA_DIR {
        page.default("data_dir", text(DATA_DIR), folder);
    } else {
        page.set("data_dir", text(given.state.display()), folder);
    }
    page.example("metrics", text("127.0.0.1:9700"), "Numbers for Prometheus, over plain HTTP, to whoever reaches it.");
    page.example(
        "certificate_lifetime",
        text("90d"),
        "How long certificates last that are issued from now on, 10s to 3650d. Not set: 365d.",
    );
    page.default(
        "call_rate",
        DEFAULT_RATE,
        "Calls a second that each identity has; 0: no limit. Who has no certificate yet has a tenth; sessions of proxies \
         are never limited.",
    );
    page.default("call_burst", DEFAULT_BURST, "Calls at once that each identity has.");
    page.default("log", text("text"), "How the log is written, to standard error: text or json.");
    page.blank();
    page.say(
        "Several coordinators share their state in an etcd. Start etcd with --max-txn-ops=4096, name all coordinators in \
         advertise, and give each the same ca.pem and keys.bin.",
    );
    page.0 += "#~[etcd]\n";
    page.example("members", "[\"https://10.0.0.1:2379\", \"https://10.0.0.2:2379\"]", "Its members.");
    page.example("prefix", text("afterimage"), "What all keys begin with.");
    page.example("reach", text("10.0.0.5:7700"), "Where the other coordinators reach this one.");
    page.blank();
    page.say("Policy keys are wrapped by keys.bin in data_dir, or by this, from the next `afterimage key rewrap` on.");
    page.0 += "#~[keys]\n";
    keys(&mut page);
    page.example("timeout_s", 10, "How long it may take.");
    page.blank();
    page.say("Events go to a command or a web address; one such table for each hook.");
    page.0 += "#~[[hook]]\n";
    page.example("name", text("pager"), "How far it has got is kept under this name.");
    page.example(
        "command",
        "[\"/bin/sh\", \"-c\", \"exec logger -t afterimage\"]",
        "Gets the event on its standard input; or else url.",
    );
    page.example("severity", text("error"), "This and above: info, warning, error.");
    page.example("filter", text("kind = condition"), "Which of them, as in `afterimage events --filter`.");
    page.example("timeout_s", 10, "How long one try may take.");
    page.example("retry_s", 3600, "For how long it is tried again.");
    page.0
}

fn keys(page: &mut Page) {
    page.example(
        "command",
        "[\"/bin/sh\", \"/etc/afterimage/wrap-key\"]",
        "Run with wrap or unwrap behind it, the bytes on its standard input; or else file, a key of 32 bytes, mode 0600.",
    );
}

fn head(given: &Given, role: &str) -> Page {
    let mut page = Page::new(&format!("A {role} of Afterimage: afterimage proxy --config THIS-FILE"));
    page.blank();
    page.set("name", text(&given.name), "Name of this proxy, as operators see it; the token is for this name.");
    page.set(
        "state_dir",
        text(given.state.display()),
        "Folder of the certificate, the last desired state and the logs.",
    );
    page.example(
        "site",
        text("vienna"),
        "Where it stands: a group that names no target is not placed at the site of its source.",
    );
    page.default("log", text("text"), "How the log is written, to standard error: text or json.");
    page.table("coordinator");
    page.set("address", text(&given.coordinator), "HOST:PORT; of several coordinators all, with commas.");
    page.set(
        "token_file",
        text(given.token_file.display()),
        "Holds the token by which it joins at its first start; may be gone afterwards.",
    );
    page.table("keys");
    page.say(
        "The key of this site, under which policy keys are kept, is wrapped by site.key in state_dir, or by this.",
    );
    keys(&mut page);
    page
}

/// Of both roles.
fn machines(page: &mut Page) {
    page.table("machines");
    page.say(
        "What failovers may start and stop on this host, by names that machines refer to as DRIVER:NAME. Nothing of it ever \
         comes from the coordinator.",
    );
    page.example(
        "hook.web",
        r#"{ start = ["/opt/web/start"], stop = ["/opt/web/stop"], probe = ["/opt/web/probe"] }"#,
        &format!(
            "Commands: 0 is yes, 3 is no (off; not answering), anything else that they cannot say. They read JSON. Also ready, \
             and deadline_s = {DEFAULT_HOOK_S}."
        ),
    );
    page.example(
        "qemu.default",
        r#"{ networks = { wan = "user" } }"#,
        &format!(
            "Processes: program = \"{DEFAULT_QEMU}\", accelerators = [\"kvm\", \"tcg\"], arguments = [], uefi = an image; \
             networks as for -netdev, for those that are no bridge."
        ),
    );
    page.example(
        "libvirt.default",
        "{}",
        &format!(
            "Domains, by virsh: uri = \"{DEFAULT_LIBVIRT_URI}\", virsh = \"virsh\", kind = \"kvm\", seeds = \"{DEFAULT_SEEDS}\"."
        ),
    );
    page.example(
        "network.lan",
        r#"{ bridge = "br0", addresses = [{ from = "192.0.2.0/24", to = "198.51.100.0/24" }] }"#,
        "What a network of machines is here: a bridge, or unplugged = true; and what addresses of the source become. Also \
         gateways and name_servers.",
    );
    page.example(
        "script.dns",
        r#"{ command = ["/opt/web/dns"] }"#,
        &format!("Scripts that plans run before and after their steps; also deadline_s = {DEFAULT_HOOK_S}."),
    );
}

/// A source's.
pub fn source(given: &Given) -> String {
    let mut page = head(given, "source");
    page.table("source");
    page.set(
        "nbd",
        "[\"unix:/run/afterimage/nbd.sock\"]",
        "Where hosts reach their disks by NBD: unix:/path or tcp:address:port.",
    );
    page.example(
        "vhost_user",
        text("/run/afterimage/vhost"),
        "Folder in which each disk has a socket for guests, by vhost-user-blk.",
    );
    page.default(
        "ublk",
        false,
        "Each disk is also a block device of this host, /dev/afterimage/GROUP/DISK: true; \"unprivileged\" for an \
         ordinary user, whose devices end with the proxy.",
    );
    page.default("memory", size(DEFAULT_POOL), "Buffers, pinned.");
    page.default("queue", size(DEFAULT_POOL / 2), "Captured and not yet acknowledged, in memory; at most half of it.");
    page.default(
        "seal_threads",
        default_seal_threads(),
        "Threads that compress and seal; 0: the data thread does it. By default one core fewer than there are here, 1 to 4.",
    );
    page.default("max_wait_ms", DEFAULT_MAX_WAIT_MS, "Longest that a write waits for room in the queue.");
    page.example("sync_rate", size(100 << 20), "Most that the synchronisation of one group reads in a second.");
    page.default(
        "trust_reboot",
        false,
        "true: nobody else uses the disks while this host is down, so that after a reboot the write-intent log is enough; \
         otherwise a disk that was not stopped cleanly is compared in full.",
    );
    page.example(
        "witness",
        text("/run/afterimage"),
        "Folder by which an older copy of state_dir is found out, if not in state_dir.",
    );
    page.blank();
    page.say("The spill: frames queue on a disk when memory runs short, so that an outage costs no restore point.");
    page.default("spill", text(given.state.join("spill").display()), "Its folder.");
    page.default(
        "spill_budget",
        size(DEFAULT_SPILL),
        "Most of it for each group; 0: no spill, outages end in a resync.",
    );
    page.default("spill_segment", size(DEFAULT_SPILL_SEGMENT), "Bytes of one file.");
    page.default("spill_reserve", size(DEFAULT_SPILL_RESERVE), "Left free on its file system.");
    machines(&mut page);
    page.0
}

/// A target's.
pub fn target(given: &Given) -> String {
    let mut page = head(given, "target");
    page.table("target");
    page.set("journal", text(given.journal.display()), "Folder of journals and replicas: on a disk of its own.");
    if let Some(address) = given.listen {
        page.set("listen", text(address), "Where streams of sources arrive.");
    }
    match &given.advertise {
        Some(address) => page.set("advertise", text(address), "By which sources reach that."),
        None => page.example("advertise", text("backup.example:7800"), "By which sources reach that, if another."),
    }
    page.set(
        "views",
        "[\"unix:/run/afterimage/views.sock\"]",
        "Where views are reached by NBD: unix:/path or tcp:address:port.",
    );
    page.example(
        "vhost_user",
        text("/run/afterimage/view-vhost"),
        "Folder in which each disk of a view has a socket for guests, by vhost-user-blk.",
    );
    page.default("ublk", false, "true: each disk of a view is also a block device, /dev/afterimage-views/VIEW/DISK.");
    page.default("memory", size(DEFAULT_POOL), "Buffers, pinned.");
    page.example(
        "budget",
        text("200GiB"),
        "Journal of a group whose policy says nothing. Not set: 16GiB. At the budget history shortens from its old end.",
    );
    page.default("segment", size(DEFAULT_SEGMENT), "Bytes after which a file of the journal is closed.");
    page.default(
        "reserve",
        size(DEFAULT_RESERVE),
        "Left free on the file system by what arrives, for folding and for machines that have failed over.",
    );
    page.default("scrub_hours", DEFAULT_SCRUB_HOURS, "How often all that is held is verified; 0: never.");
    page.default("scrub_rate", size(DEFAULT_SCRUB_RATE), "Most bytes a second that this reads.");
    machines(&mut page);
    page.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::{check_text, shown_settings};
    use crate::proxy::config::Config;

    fn given() -> Given {
        Given {
            name: "host".to_owned(),
            coordinator: "10.0.0.5:7700".to_owned(),
            listen: Some("10.0.0.6:7800".parse().unwrap()),
            advertise: None,
            journal: "/srv/journal".into(),
            state: "/var/lib/afterimage/proxy".into(),
            token_file: "/nonexistent/token".into(),
        }
    }

    /// Lines that are commented out by `mark` and a setting, with the mark taken away.
    fn without(page: &str, mark: &str) -> (String, usize) {
        let mut count = 0;
        let lines = page.lines().map(|line| match line.strip_prefix(mark) {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => {
                count += 1;
                rest
            }
            _ => line,
        });
        (lines.map(|line| format!("{line}\n")).collect(), count)
    }

    #[test]
    fn what_is_written_passes_and_each_default_in_it_is_the_true_one() {
        for page in [source(&given()), target(&given())] {
            let config = Config::of_text(&page).unwrap();
            let (all, count) = without(&page, "#");
            assert!(count >= 6, "{count}");
            assert_eq!(Config::of_text(&all).unwrap(), config, "{all}");
        }
        let bare = Given { listen: None, state: DATA_DIR.into(), ..given() };
        let page = coordinator(&bare);
        let (all, count) = without(&page, "#");
        assert_eq!(count, 5);
        assert_eq!(shown_settings(&all).unwrap(), shown_settings(&page).unwrap());
        assert_eq!(shown_settings("").unwrap(), shown_settings(&page).unwrap(), "nothing else is set");
    }

    #[test]
    fn each_example_is_taken_and_changes_something() {
        for page in [source(&given()), target(&given())] {
            let config = Config::of_text(&page).unwrap();
            for line in page.lines().filter(|line| line.starts_with("#~")) {
                let taken = Config::of_text(&page.replace(line, &line[2..])).unwrap();
                assert_ne!(taken, config, "{line}");
            }
        }
        let (all, count) = without(&coordinator(&given()), "#~");
        assert!(count > 8, "{count}");
        check_text(&all).unwrap();
    }

    #[test]
    fn every_setting_of_a_role_is_in_its_page() {
        // The parser names all fields of a table when it is given one that it does not know.
        let of = |page: &str, table: &str| {
            let wrong = page.replace(&format!("[{table}]\n"), &format!("[{table}]\nnonsense = 1\n"));
            let error = Config::of_text(&wrong).unwrap_err().to_string();
            let (_, expected) = error.split_once("expected one of ").unwrap();
            expected.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
        };
        for (page, table) in [(source(&given()), "source"), (target(&given()), "target")] {
            for field in of(&page, table) {
                let there = page.lines().any(|l| l.trim_start_matches(['#', '~']).starts_with(&format!("{field} = ")));
                assert!(there || field == "advertise", "`{field}` is not in the page of a {table}");
            }
        }
    }

    #[test]
    fn every_setting_of_a_coordinator_is_in_its_page() {
        let page = coordinator(&given());
        let error = check_text("nonsense = 1\n").unwrap_err().message;
        let (_, expected) = error.split_once("expected one of ").unwrap();
        for field in expected.split('`').skip(1).step_by(2) {
            let bare = |line: &str| line.trim_start_matches(['#', '~', '[']).to_owned();
            let there = page
                .lines()
                .map(bare)
                .any(|l| l.starts_with(&format!("{field} = ")) || l.starts_with(&format!("{field}]")));
            assert!(there, "`{field}` is not in the page of a coordinator");
        }
    }

    #[test]
    fn pages_fit_100_columns() {
        for page in [source(&given()), target(&given()), coordinator(&given())] {
            assert!(page.lines().all(|line| line.chars().count() <= 100), "{page}");
        }
    }
}
