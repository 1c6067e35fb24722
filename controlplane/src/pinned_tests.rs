//! The bytes of every kind of record, as they are stored and as earlier versions stored them. What is stored somewhere is
//! read for ever: bytes that change need a new line here, and the old one stays.

use super::*;

/// As this version writes them. A field that comes goes behind the others, with a default, and its kind's old bytes go into
/// [`EARLIER`].
const NOW: [(&str, &str); 19] = [
    ("term", "7"),
    (
        "policies/default/gold",
        r#"{"uid":"u","tenant":"default","id":"gold","version":3,"created_ns":1,"updated_ns":2,"description":"d","promises":{"rpo_target_us":500000,"cut_interval_ms":1000,"retention_s":60,"journal_budget_bytes":0,"compression":"auto","warn_after_ms":5000,"error_after_ms":60000,"clear_after_ms":5000,"lease_ms":0,"sync_deadline_ms":0,"bandwidth_bytes_per_s":0,"allowed_hours":[],"time_zone":"UTC","priority":50,"excluded_disks":[],"same_site":false}}"#,
    ),
    (
        "groups/default/shop",
        r#"{"uid":"g","tenant":"default","id":"shop","version":4,"created_ns":1,"updated_ns":2,"description":"d","policy":"gold","source":"src","target":"dr","key":"k","generation":2,"writer_generation":1,"next_slot":1,"phase":{"failed_over":{"view":"failover"}},"hold":true,"complete":true,"request_id":"","placement":"","reverse":null,"overwritten":false,"leftovers":[],"older_keys":[],"next_key":"","pause":null}"#,
    ),
    (
        "disks/g/00000",
        r#"{"uid":"d","group_uid":"g","id":"data","slot":0,"path":"/dev/vg0/data","serial":"s","size":1048576,"block":512,"physical_block":4096,"export_name":"shop/data","created_ns":1,"leaving":false,"seed_path":""}"#,
    ),
    (
        "proxies/default/src",
        r#"{"uid":"p","tenant":"default","id":"src","version":2,"created_ns":1,"pin":"aa","previous_pin":null,"expire_time_ns":9,"data_address":"","nbd_addresses":[],"capabilities":[],"boot_id":"","software_version":"","renew_time_ns":0,"site":""}"#,
    ),
    (
        "views/default/shop/failover",
        r#"{"uid":"v","tenant":"default","group":"shop","id":"failover","version":2,"created_ns":1,"kind":"failover","writable":true,"point":{"seq":90,"cut":null,"wall_ns":5,"label":"","clock_synced":false,"flush_clean":false,"disks":["d"],"timeline":""},"disk_uids":["d"],"exports":[{"disk":"data","disk_uid":"d","name":"shop.failover/data","uris":["nbd+unix:///x"],"size":1048576}],"reason":"r","open":true,"closing":false,"request_id":"","kept":false}"#,
    ),
    (
        "operations/default/o",
        r#"{"uid":"o","tenant":"default","version":9,"group":"shop","request_id":"r","actor":"admin/local","created_ns":1,"ended_ns":2,"work":{"spec":{"to":"latest","unconfirmed":false,"reason":"","verb":"failover","discard":false,"within_ms":0},"state":"done","steps":[{"name":"raise-generation","state":"done","detail":"","started_ns":1,"ended_ns":2}],"facts":{"rpo_at_start_us":1,"disks":[],"last_seq":null,"fence":"confirmed","lease_ms":0,"zero_loss":false,"at_least":2,"generation":2,"point":null,"exports":[],"view":"failover","leaves":"","reopens":false,"reverse":"","after":0},"error":null,"cancelled_by":""}}"#,
    ),
    (
        "tokens/t",
        r#"{"id":"t","secret_hash":"cc","tenant":"default","role":"operator","name":"anna","expire_time_ns":9}"#,
    ),
    (
        "authorities",
        r#"{"issuing":{"id":"n","wrapped":"00ff","since_ns":5,"under":""},"replaced":{"id":"o","wrapped":null,"since_ns":0,"under":""}}"#,
    ),
    (
        "machines/default/web",
        r#"{"uid":"m","tenant":"default","id":"web","version":2,"created_ns":1,"updated_ns":2,"description":"d","group":"shop","disks":["data"],"cpus":2,"memory":1073741824,"firmware":"bios","nics":[{"mac":"","network":"lan","addresses":[],"gateways":[],"name_servers":[],"target_addresses":[]}],"source":{"proxy":"","driver":"libvirt","profile":"default","machine":"web01"},"target":{"proxy":"dr2","driver":"qemu","profile":"default","machine":""},"ready":{"tcp":"10.0.0.7:80"},"stop_within_ms":120000,"ready_within_ms":300000,"stopped_at_source":true,"runs_from":"failover"}"#,
    ),
    (
        "plans/default/site",
        r#"{"uid":"p","tenant":"default","id":"site","version":2,"created_ns":1,"updated_ns":2,"description":"d","steps":[{"id":"db","group":"shop-db","after":[],"delay_ms":500,"check":null,"ready_within_ms":300000,"retries":0,"before":[],"then":[]},{"id":"web","group":"web","after":["db"],"delay_ms":0,"check":{"by":{"tcp":"10.0.0.7:80"},"proxy":"dr2"},"ready_within_ms":60000,"retries":2,"before":[{"name":"dns","proxy":"","verbs":["run","undo"]}],"then":[{"name":"tell","proxy":"dr2","verbs":["test"]}]}],"parallel":4,"moved":[{"group_uid":"g","generation":3}]}"#,
    ),
    (
        "runs/default/r",
        r#"{"uid":"r","tenant":"default","version":3,"plan":"site","request_id":"q","actor":"operator/anna","created_ns":1,"ended_ns":2,"spec":{"verb":"run","to":{"time":5},"planned":false,"unconfirmed":true,"discard":false,"force":false,"reason":"d"},"parallel":4,"steps":[{"wanted":{"id":"db","group":"shop-db","after":[],"delay_ms":500,"check":{"by":{"script":"up"},"proxy":""},"ready_within_ms":300000,"retries":1,"before":[],"then":[]},"state":"failed","stage":"failover","script":0,"attempt":2,"told":false,"paused_ns":0,"midway":false,"detail":"broken","remedy":"mend it","operation":"o","machines":["web"],"point_seq":90,"point_ns":5,"started_ns":1,"answered_ns":0,"ended_ns":2}],"state":"failed","stopped_by":"admin/local","continues":"p"}"#,
    ),
    ("keys/k", r#"{"id":"k","wrapped":"00ff","under":"","since_ns":0}"#),
    ("wrapping", r#"{"keys":[{"id":"w","by":"file","wrapped":"00ff","since_ns":5}]}"#),
    ("recovery", r#"{"key":{"id":"recovery","wrapped":"00ff","under":"w","since_ns":0},"made_ns":5}"#),
    (
        "certificates/default/4a",
        r#"{"serial":"4a","tenant":"default","role":"operator","name":"anna","uid":"","pin":"aa","issuer":"ca","issued_ns":1,"expire_time_ns":9,"revoked":{"at_ns":5,"by":"admin/local","reason":"r"}}"#,
    ),
    ("requests/default/aa", r#"{"key":"aa","tenant":"default","fingerprint":"bb","uid":"u","point":null,"at_ns":5}"#),
    ("audit", r#"{"seq":5,"hash":"ab","floor":1}"#),
    ("restored", r#"{"backup_ns":1,"restored_ns":2,"offset":812,"observing":true,"seen":["p"],"findings":["f"]}"#),
];

/// As earlier versions wrote them: by kind, what [`NOW`] has of the same.
const EARLIER: [(&str, &str); 19] = [
    (
        "groups/default/shop",
        r#"{"uid":"g","tenant":"default","id":"shop","version":4,"created_ns":1,"updated_ns":2,"description":"d","policy":"gold","source":"src","target":"dr","key":"k","generation":2,"writer_generation":1,"next_slot":1,"phase":{"failed_over":{"view":"failover"}},"hold":true,"complete":true,"request_id":"","placement":"","reverse":null,"overwritten":false,"leftovers":[],"older_keys":[],"next_key":""}"#,
    ),
    (
        "machines/default/web",
        r#"{"uid":"m","tenant":"default","id":"web","version":2,"created_ns":1,"updated_ns":2,"description":"d","group":"shop","disks":["data"],"cpus":2,"memory":1073741824,"firmware":"bios","nics":[{"mac":"","network":"lan"}],"source":{"proxy":"","driver":"libvirt","profile":"default","machine":"web01"},"target":{"proxy":"dr2","driver":"qemu","profile":"default","machine":""},"ready":{"tcp":"10.0.0.7:80"},"stop_within_ms":120000,"ready_within_ms":300000,"stopped_at_source":true,"runs_from":"failover"}"#,
    ),
    (
        "groups/default/shop",
        r#"{"uid":"g","tenant":"default","id":"shop","version":4,"created_ns":1,"updated_ns":2,"description":"d","policy":"gold","source":"src","target":"dr","key":"k","generation":2,"writer_generation":1,"next_slot":1,"phase":{"failed_over":{"view":"failover"}},"hold":true,"complete":true,"request_id":"","placement":""}"#,
    ),
    (
        "operations/default/o",
        r#"{"uid":"o","tenant":"default","version":9,"group":"shop","request_id":"r","actor":"admin/local","created_ns":1,"ended_ns":2,"work":{"spec":{"to":"latest","unconfirmed":false,"reason":"","verb":"failover","discard":false,"within_ms":0},"state":"done","steps":[{"name":"raise-generation","state":"done","detail":"","started_ns":1,"ended_ns":2}],"facts":{"rpo_at_start_us":1,"disks":[],"last_seq":null,"fence":"confirmed","lease_ms":0,"zero_loss":false,"at_least":2,"generation":2,"point":null,"exports":[],"view":"failover","leaves":"","reopens":false},"error":null,"cancelled_by":""}}"#,
    ),
    (
        "authorities",
        r#"{"issuing":{"id":"n","wrapped":"00ff","since_ns":5},"replaced":{"id":"o","wrapped":null,"since_ns":0}}"#,
    ),
    ("keys/k", r#"{"id":"k","wrapped":"00ff"}"#),
    (
        "policies/default/gold",
        r#"{"uid":"u","tenant":"default","id":"gold","version":3,"created_ns":1,"updated_ns":2,"description":"d","promises":{"rpo_target_us":500000,"cut_interval_ms":1000,"retention_s":60,"journal_budget_bytes":0,"compression":"auto","warn_after_ms":5000,"error_after_ms":60000,"clear_after_ms":5000,"lease_ms":0,"sync_deadline_ms":0,"bandwidth_bytes_per_s":0,"allowed_hours":[],"time_zone":"UTC","priority":50,"excluded_disks":[]}}"#,
    ),
    (
        "groups/default/shop",
        r#"{"uid":"g","tenant":"default","id":"shop","version":4,"created_ns":1,"updated_ns":2,"description":"d","policy":"gold","source":"src","target":"dr","key":"k","generation":2,"writer_generation":1,"next_slot":1,"phase":{"failed_over":{"view":"failover"}},"hold":true,"complete":true,"request_id":""}"#,
    ),
    (
        "proxies/default/src",
        r#"{"uid":"p","tenant":"default","id":"src","version":2,"created_ns":1,"pin":"aa","previous_pin":null,"expire_time_ns":9,"data_address":"","nbd_addresses":[],"capabilities":[],"boot_id":"","software_version":"","renew_time_ns":0}"#,
    ),
    (
        "views/default/shop/failover",
        r#"{"uid":"v","tenant":"default","group":"shop","id":"failover","version":2,"created_ns":1,"kind":"failover","writable":true,"point":{"seq":90,"cut":null,"wall_ns":5,"label":"","clock_synced":false,"flush_clean":false,"disks":["d"],"timeline":""},"disk_uids":["d"],"exports":[{"disk":"data","disk_uid":"d","name":"shop.failover/data","uris":["nbd+unix:///x"],"size":1048576}],"reason":"r","open":true,"closing":false,"request_id":""}"#,
    ),
    (
        "operations/default/o",
        r#"{"uid":"o","tenant":"default","version":9,"group":"shop","request_id":"r","actor":"admin/local","created_ns":1,"ended_ns":2,"work":{"spec":{"to":"latest","unconfirmed":false,"reason":""},"state":"done","steps":[{"name":"raise-generation","state":"done","detail":"","started_ns":1,"ended_ns":2}],"facts":{"rpo_at_start_us":1,"disks":[],"last_seq":null,"fence":"confirmed","lease_ms":0,"zero_loss":false,"at_least":2,"generation":2,"point":null,"exports":[]},"error":null,"cancelled_by":""}}"#,
    ),
    (
        "policies/default/gold",
        r#"{"uid":"u","tenant":"default","id":"gold","version":3,"created_ns":1,"updated_ns":2,"description":"d","promises":{"rpo_target_us":500000,"cut_interval_ms":1000,"retention_s":60,"journal_budget_bytes":0,"compression":"auto","warn_after_ms":5000,"error_after_ms":60000,"clear_after_ms":5000,"lease_ms":0,"sync_deadline_ms":0}}"#,
    ),
    (
        "policies/default/gold",
        r#"{"uid":"u","tenant":"default","id":"gold","version":3,"created_ns":1,"updated_ns":2,"description":"d","promises":{"rpo_target_us":500000,"cut_interval_ms":1000,"retention_s":60,"journal_budget_bytes":0,"compression":"auto","warn_after_ms":5000}}"#,
    ),
    (
        "groups/default/shop",
        r#"{"uid":"g","tenant":"default","id":"shop","version":4,"created_ns":1,"updated_ns":2,"description":"d","policy":"gold","source":"src","target":"dr","key":"k","generation":2,"writer_generation":1,"next_slot":1,"phase":{"failed_over":{"view":"failover"}},"hold":true,"complete":true}"#,
    ),
    (
        "disks/g/00000",
        r#"{"uid":"d","group_uid":"g","id":"data","slot":0,"path":"/dev/vg0/data","serial":"s","size":1048576,"block":512,"physical_block":4096,"export_name":"shop/data","created_ns":1}"#,
    ),
    (
        "proxies/default/src",
        r#"{"uid":"p","tenant":"default","id":"src","version":2,"created_ns":1,"pin":"aa","previous_pin":null,"expire_time_ns":9,"data_address":"","nbd_addresses":[],"capabilities":[],"boot_id":"","software_version":""}"#,
    ),
    (
        "proxies/default/src",
        r#"{"uid":"p","tenant":"default","id":"src","version":2,"created_ns":1,"pin":"aa","expire_time_ns":9}"#,
    ),
    (
        "views/default/shop/failover",
        r#"{"uid":"v","tenant":"default","group":"shop","id":"failover","version":2,"created_ns":1,"kind":"failover","writable":true,"point":{"seq":90,"cut":null,"wall_ns":5,"disks":["d"]},"disk_uids":["d"],"exports":[{"disk":"data","disk_uid":"d","name":"shop.failover/data","uris":["nbd+unix:///x"],"size":1048576}],"reason":"r","open":true}"#,
    ),
    (
        "operations/default/o",
        r#"{"uid":"o","tenant":"default","version":9,"group":"shop","request_id":"r","actor":"admin/local","created_ns":1,"ended_ns":2,"work":{"spec":{"to":"latest","unconfirmed":false,"reason":""},"state":"done","steps":[{"name":"raise-generation","state":"done","detail":"","started_ns":1,"ended_ns":2}],"facts":{"rpo_at_start_us":1,"disks":[],"last_seq":null,"fence":"confirmed","at_least":2,"generation":2,"point":null,"exports":[]},"error":null}}"#,
    ),
];

#[test]
fn every_kind_is_stored_as_it_is_pinned() {
    for (key, bytes) in NOW {
        let object = Object::decode(key, bytes.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(String::from_utf8(object.encode()).unwrap(), bytes, "{key}");
        assert_eq!(object.key(), key);
    }
    let kinds: std::collections::BTreeSet<&str> = NOW.iter().map(|(key, _)| key.split('/').next().unwrap()).collect();
    assert_eq!(kinds.len(), NOW.len(), "each kind once");
}

/// A group whose failback goes on, and what its phases are called.
#[test]
fn a_failback_is_stored_as_it_is_pinned() {
    let group = NOW.iter().find(|(key, _)| key.starts_with("groups/")).expect("a group").1;
    let reverse = r#"{"stream_uid":"r","view":"failover","generation":2,"writer_generation":1,"hold":true}"#;
    let leftover = r#"[{"stream_uid":"q","at_target":false,"at_source":true}]"#;
    let reverse = group.replace(r#""reverse":null"#, &format!(r#""reverse":{reverse}"#));
    let group = reverse.replace(r#""leftovers":[]"#, &format!(r#""leftovers":{leftover}"#));
    for phase in [
        r#"{"failing_back":{"view":"failover"}}"#,
        r#"{"failed_back":{"view":"failover","after":90}}"#,
        r#"{"settling":{"operation":"o","view":"failover","after":90}}"#,
    ] {
        let bytes = group.replace(r#"{"failed_over":{"view":"failover"}}"#, phase);
        let object = Object::decode("groups/default/shop", bytes.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(object.encode()).unwrap(), bytes);
    }
}

/// A group that is paused.
#[test]
fn a_pause_is_stored_as_it_is_pinned() {
    let group = NOW.iter().find(|(key, _)| key.starts_with("groups/")).expect("a group").1;
    let bytes = group.replace(r#""pause":null"#, r#""pause":{"at_ns":5,"by":"operator/anna","reason":"r"}"#);
    assert_ne!(bytes, group);
    let object = Object::decode("groups/default/shop", bytes.as_bytes()).unwrap();
    assert_eq!(String::from_utf8(object.encode()).unwrap(), bytes);
}

#[test]
fn what_earlier_versions_stored_is_read_and_written_as_now() {
    for (key, bytes) in EARLIER {
        let object = Object::decode(key, bytes.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
        let now = NOW.iter().find(|(k, _)| *k == key).expect("the same of now").1;
        assert_eq!(String::from_utf8(object.encode()).unwrap(), now, "{key}");
    }
}

#[test]
fn what_no_version_stored_is_refused_by_its_key() {
    for (key, bytes) in [("groups/default/shop", "{}"), ("gizmos/default/x", "{}"), ("term", "\"seven\"")] {
        assert!(Object::decode(key, bytes.as_bytes()).unwrap_err().starts_with(key), "{key}");
    }
}
