//! Bad input and bad surroundings: refused at once, by name, with an exit code of its own, and nothing half-made left.

use crate::bed::{Bed, binary, run};

#[test]
fn a_misspelt_option_is_a_usage_error_that_names_it() {
    let said = run(binary().args(["failover", "start", "shop", "--to", "latest", "--dryrun"]));
    assert_eq!(said.code, 2);
    assert!(said.err.contains("--dryrun") && said.err.contains("--dry-run"), "{}", said.err);
    let said = run(binary().args(["failover", "start", "shop", "--to", "newest", "--json"]));
    assert_eq!((said.code, &said.error()["kind"]), (2, &"usage".into()));
    assert!(said.error()["message"].as_str().unwrap().contains("newest"));
}

#[test]
fn without_an_identity_it_says_how_to_get_one() {
    let said = run(binary().args(["status", "--identity", "/nonexistent/identity.json"]));
    assert_eq!(said.code, 3);
    assert!(said.err.contains("/nonexistent/identity.json") && said.err.contains("afterimage join"), "{}", said.err);
}

#[test]
fn an_identity_that_others_can_read_is_refused() {
    let bed = Bed::new();
    let open = bed.dir.path().join("open.json");
    std::fs::copy(&bed.admin, &open).unwrap();
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let said = bed.run_as(&open, "status");
    assert_eq!(said.code, 3);
    assert!(said.err.contains("chmod 600"), "{}", said.err);
}

#[test]
fn a_coordinator_that_is_gone_is_unreachable() {
    let mut bed = Bed::new();
    bed.kill_coordinator();
    let said = bed.run("status --json");
    assert_eq!((said.code, &said.error()["kind"]), (4, &"unreachable".into()));
    assert!(said.error()["object"].as_str().unwrap().contains("127.0.0.1"), "{}", said.err);
}

#[test]
fn an_identity_of_another_coordinator_is_refused_by_its_certificate() {
    let (one, other) = (Bed::new(), Bed::new());
    let address = other.endpoint.trim_start_matches("https://").to_owned();
    let said = one.run(&format!("status --coordinator {address} --json"));
    assert_eq!((said.code, &said.error()["kind"]), (3, &"refused".into()), "{}", said.err);
    assert!(said.error()["hint"].as_str().unwrap().contains("--identity"));
}

#[test]
fn an_address_that_is_none_is_a_usage_error() {
    let bed = Bed::new();
    let said = bed.run("status --coordinator nonsense://x --timeout 5s");
    assert!([2, 4].contains(&said.code), "{}", said.err);
}

#[test]
fn objects_that_do_not_exist_are_not_found_by_name() {
    let bed = Bed::new();
    for line in [
        "group show nosuch",
        "policy show nosuch",
        "proxies show nosuch",
        "point list nosuch",
        "point show nosuch",
        "disk list nosuch",
        "view show nosuch x",
        "status nosuch",
        "failover show 00000000-0000-4000-8000-000000000000",
        "failover start nosuch --to latest --yes",
        "failover list nosuch",
    ] {
        let said = bed.run(line);
        assert_eq!(said.code, 5, "{line}: {}{}", said.out, said.err);
        assert!(said.err.contains("nosuch") || said.err.contains("00000000"), "{line}: {}", said.err);
    }
}

#[test]
fn a_group_with_an_unknown_proxy_is_refused_and_not_made() {
    let bed = Bed::protected();
    let said = bed.run("group create second --policy gold --source nosuch --target dr --disk d=/dev/c");
    assert_ne!(said.code, 0);
    assert!(said.err.contains("nosuch"), "{}", said.err);
    assert_eq!(bed.run("group show second").code, 5);
}

#[test]
fn a_disk_that_is_not_there_is_refused_and_nothing_is_made() {
    let bed = Bed::protected();
    let said = bed.run("group create second --policy gold --source src --target dr --disk d=/srv/missing.img");
    assert_ne!(said.code, 0);
    assert!(said.err.contains("/srv/missing.img"), "{}", said.err);
    assert_eq!(bed.run("group show second").code, 5);
}

#[test]
fn a_disk_of_another_size_is_refused() {
    let bed = Bed::protected();
    let said = bed.run("disk add shop extra --path /dev/c --size 2GiB");
    assert_ne!(said.code, 0);
    assert!(said.err.contains("size"), "{}", said.err);
    assert_eq!(bed.run("disk list shop --json").document()["disks"].as_array().unwrap().len(), 2);
}

#[test]
fn a_name_that_is_none_is_a_usage_error_that_says_the_rule() {
    let bed = Bed::new();
    let said = bed.run("policy create Gold_1");
    assert_eq!(said.code, 2);
    assert!(said.err.contains("Gold_1") && said.err.contains("a-z"), "{}", said.err);
}

#[test]
fn a_promise_out_of_range_names_field_value_and_range() {
    let bed = Bed::new();
    let said = bed.run("policy create gold --cut-interval 1ms");
    assert_eq!(said.code, 2);
    assert!(said.err.contains("cut_interval_ms"), "{}", said.err);
}

#[test]
fn a_name_that_is_taken_is_a_conflict() {
    let bed = Bed::new();
    bed.ok("policy create gold");
    assert_eq!(bed.run("policy create gold").code, 6);
}

#[test]
fn a_policy_that_is_in_use_is_not_deleted() {
    let bed = Bed::protected();
    let said = bed.run("policy delete gold");
    assert_eq!(said.code, 3);
    assert!(said.err.contains("shop"), "{}", said.err);
}

#[test]
fn a_token_works_once() {
    let bed = Bed::new();
    let token = bed.run("token create anna --role operator").text();
    let join = |file: &str| run(binary().args(["join", token.trim(), "--identity"]).arg(bed.dir.path().join(file)));
    assert_eq!(join("first.json").code, 0);
    let again = join("second.json");
    assert_eq!(again.code, 3, "{}", again.err);
    assert!(!bed.dir.path().join("second.json").exists());
}

#[test]
fn what_is_no_token_is_told_before_anything_is_asked() {
    let said = run(binary().args(["join", "hello", "--identity", "/nonexistent/x.json"]));
    assert_eq!(said.code, 2);
    assert!(said.err.contains("no join token"), "{}", said.err);
}

#[test]
fn a_token_for_a_proxy_is_not_spent_by_a_person() {
    let bed = Bed::new();
    let token = bed.run("token create src --role proxy").text();
    let said = run(binary().args(["join", token.trim(), "--identity"]).arg(bed.dir.path().join("x.json")));
    assert_eq!(said.code, 2);
    assert!(said.err.contains("afterimage proxy"), "{}", said.err);
}

#[test]
fn unconfirmed_names_the_group_again() {
    let bed = Bed::protected();
    let said = bed.run("failover start shop --to latest --unconfirmed other --yes");
    assert_eq!(said.code, 2);
    assert!(said.err.contains("--unconfirmed shop"), "{}", said.err);
}

#[test]
fn a_point_that_is_not_held_is_refused_before_anything_is_fenced() {
    let bed = Bed::protected();
    let said = bed.run("failover start shop --to seq:99999 --yes");
    assert_ne!(said.code, 0);
    assert_eq!(bed.run("group show shop --json").document()["phase"], "protected");
}
